"""Released models for other places than our own servers: browsers, phones, other runtimes.

Everything here starts from a version whose signature and checksums were verified, and ends with the
largest difference from ONNX Runtime on the same inputs.
"""
