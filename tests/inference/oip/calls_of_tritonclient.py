"""What a program with NVIDIA's tritonclient does; run by the Python that has it, not by ours.

    python calls_of_tritonclient.py GRPC_ADDRESS HTTP_ADDRESS INPUTS.npz

Prints one JSON object with what both clients were told.
"""

import json
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def ask(library, address, inputs, **options):
    with library.InferenceServerClient(address) as client:
        given = []
        for name, array in inputs.items():
            tensor = library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            given.append(tensor)
        wanted = [library.InferRequestedOutput("scores")]
        all_of_them = client.infer("tailrace-rank", given, request_id="7")
        answer = client.infer(
            "tailrace-rank",
            given,
            outputs=wanted,
            model_version=options["version"],
            priority=1,
            timeout=5_000_000,
        )
        lists = client.infer("tailrace-lists", lists_of(library), outputs=None)
        errors = {}
        for name, call in {
            "unknown model": lambda: client.infer("nobody", given),
            "unknown version": lambda: client.infer("tailrace-rank", given, model_version="9"),
            "missing input": lambda: client.infer("tailrace-rank", given[:-1]),
            "late": lambda: client.infer("tailrace-rank", given, timeout=1),
            "low priority": lambda: client.infer("tailrace-rank", given, priority=1_000),
        }.items():
            try:
                call()
            except InferenceServerException as error:
                errors[name] = [error.status(), error.message()]
        told = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model": client.is_model_ready("tailrace-rank", options["version"]),
            "other": client.is_model_ready("nobody"),
            "scores": answer.as_numpy("scores").tolist(),
            "all": sorted(
                name for name in ("scores", "user_vector") if all_of_them.as_numpy(name) is not None
            ),
            "items": lists.as_numpy("items").tolist(),
            "errors": errors,
        }
        if library is tritonclient.grpc:
            told |= {
                "server": client.get_server_metadata(as_json=True)["name"],
                "inputs": [
                    t["name"] for t in client.get_model_metadata("tailrace-rank", as_json=True)["inputs"]
                ],
                "index": [m["name"] for m in client.get_model_repository_index(as_json=True)["models"]],
            }
        else:
            told |= {
                "server": client.get_server_metadata()["name"],
                "inputs": [tensor["name"] for tensor in client.get_model_metadata("tailrace-rank")["inputs"]],
                "index": [model["name"] for model in client.get_model_repository_index()],
            }
            plain = library.InferInput("lengths", [2], "INT32")
            plain.set_data_from_numpy(inputs["lengths"], binary_data=False)
            mixed = [plain if tensor.name() == "lengths" else tensor for tensor in given]
            json_output = [library.InferRequestedOutput("scores", binary_data=False)]
            for name, how in {"mixed": {}, "gzip": {"request_compression_algorithm": "gzip"}}.items():
                told[name] = (
                    client.infer("tailrace-rank", mixed, outputs=json_output, **how)
                    .as_numpy("scores")
                    .tolist()
                )
        return told


def lists_of(library):
    items = np.array([[1007, 1014, 1021]])
    arrays = {
        "items": items,
        "categories": items % 10 + 50,
        "behaviors": np.zeros((1, 3), np.int32),
        "timestamps": np.array([[1_700_000_000, 1_700_000_060, 1_700_000_120]]),
        "lengths": np.array([3], np.int32),
        "candidates": np.array([[1070, 1077]]),
        "k": np.array([2], np.int32),
    }
    tensors = []
    for name, array in arrays.items():
        tensors.append(library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    return tensors


if __name__ == "__main__":
    grpc_address, http_address, path, version = sys.argv[1:]
    with np.load(path, allow_pickle=False) as arrays:
        inputs = dict(arrays)
    print(
        json.dumps(
            {
                "grpc": ask(tritonclient.grpc, grpc_address, inputs, version=version),
                "http": ask(tritonclient.http, http_address, inputs, version=version),
            }
        )
    )
