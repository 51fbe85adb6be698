"""Versions on disk: manifests with checksums, aliases, signatures, and the fence of a lease."""
