"""A gRPC server on asyncio: HTTP/2 (RFC 9113) as far as gRPC needs it, and gRPC's calls over it.

    server.py (listens, sweeps, drains) → connection.py (frames in) → call.py (a stream is a call)
    → sending.py (frames out, within the peer's windows)

`frames.py` and `headers.py` are the bytes, `heads.py` what a request's headers ask for, `status.py` how a
call ends, `limits.py` every bound. A call costs little because much is done for many at once: a buffer is
walked for all its frames, a header block that was read before is looked up, and what several calls answer
within one turn of the loop leaves in one write. Knows nothing of models.
"""
