"""Makes the gRPC stubs of the Open Inference Protocol again: `python -m infra.local.stubs`."""

from __future__ import annotations

from pathlib import Path

from infra.local.paths import INFRA

ROOT = INFRA.parent
PROTO = Path("inference/oip/open_inference.proto")
STUBS = ("open_inference_pb2.py", "open_inference_pb2_grpc.py")


def generate(folder: Path) -> None:
    """Write the stubs below `folder`, at the place that the proto has in the checkout."""
    from grpc_tools import protoc

    arguments = [f"-I{ROOT}", f"--python_out={folder}", f"--grpc_python_out={folder}", str(ROOT / PROTO)]
    if protoc.main(["protoc", *arguments]):
        raise RuntimeError(f"protoc refused {PROTO}")


if __name__ == "__main__":
    generate(ROOT)
