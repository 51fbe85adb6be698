"""The Open Inference Protocol, version 2: a server over gRPC and REST, and a client.

    grpc_server.py, rest.py → service.py (checks, limits, deadlines) → models.py (what is served)

The two fronts translate bytes and statuses and know nothing of engines; `service.py` knows tensors and
models by name; `graph_models.py` and `list_model.py` are what stands behind the names. gRPC's calls come
through `inference.http2`, which knows no models; grpc itself is imported for the client and for reflection,
protobuf by the gRPC front and the client.
"""
