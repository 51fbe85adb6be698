"""What can be wrong with a version, and with what is asked of it."""

from __future__ import annotations


class ArtefactInvalid(ValueError):
    """A version that must not serve: missing, altered, cut short, unsigned, or not what its manifest says."""


class ReleaseRefused(ValueError):
    """A change of stage that makes no sense; the sentence says why and what does."""
