"""What strangers send. Each gets its status and a sentence, over both protocols, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import orjson
import pytest
from aiohttp import ClientSession

from inference.oip import open_inference_pb2 as pb
from inference.oip.messages import channel_of
from inference.oip.models import DTYPES
from inference.oip.rest import HEADER_LENGTH, STATUS
from tests.inference.oip.conftest import Running, list_inputs, rank_inputs

INFER = "/inference.GRPCInferenceService/ModelInfer"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, name: str, array: npt.NDArray[Any]) -> Tensor:
        return cls(name, NAMES[array.dtype], array.shape, array.tobytes())


@dataclass(frozen=True)
class Ask:
    """A request that would be answered, until a test spoils it."""

    inputs: tuple[Tensor, ...]
    model: str = "tailrace-rank"
    version: str = ""
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)

    def tensor(self, which: str, **changed: Any) -> Ask:
        """With one input changed."""
        inputs = (replace(tensor, **changed) if tensor.name == which else tensor for tensor in self.inputs)
        return replace(self, inputs=tuple(inputs))

    def values(self, name: str, change: Callable[[npt.NDArray[Any]], None]) -> Ask:
        """With numbers of one input changed in place."""
        (tensor,) = (tensor for tensor in self.inputs if tensor.name == name)
        array = np.frombuffer(tensor.data, DTYPES[tensor.datatype]).copy()
        change(array)
        return self.tensor(name, data=array.tobytes())


def rank() -> Ask:
    return Ask(tuple(Tensor.of(name, array) for name, array in rank_inputs(2, 6, 4).items()))


def score() -> Ask:
    rng = np.random.default_rng(1)
    floats = {
        **{name: rng.normal(size=(2, 6, 16)) for name in ("key_0", "value_0", "key_1", "value_1")},
        "user_vector": rng.normal(size=(2, 16)),
    }
    integers = rank_inputs(2, 6, 4)
    inputs = {
        **{name: array.astype(np.float32) for name, array in floats.items()},
        **{name: integers[name] for name in ("lengths", "candidates", "candidate_categories")},
    }
    return Ask(tuple(Tensor.of(name, array) for name, array in inputs.items()), "tailrace-score")


def lists() -> Ask:
    inputs = list_inputs(2, 5, candidates=np.array([[1007, -1], [1014, 1021]]), k=np.array([3], np.int32))
    return Ask(tuple(Tensor.of(name, array) for name, array in inputs.items()), "tailrace-lists")


def with_users(*users: int) -> Ask:
    ask = lists()
    return replace(ask, inputs=(*ask.inputs, Tensor.of("user_ids", np.array(users))))


def put(place: int, value: float) -> Callable[[npt.NDArray[Any]], None]:
    def change(array: npt.NDArray[Any]) -> None:
        array[place] = value

    return change


HUGE = 2**31 - 1
BAD: dict[str, tuple[Callable[[], Ask], str, str]] = {
    "unknown model": (lambda: replace(rank(), model="nobody"), "NOT_FOUND", "no model is called 'nobody'"),
    "unknown version": (lambda: replace(rank(), version="9"), "NOT_FOUND", "no version '9'"),
    "a version that is a path": (
        lambda: replace(rank(), version="..%2F..%2Fetc"),
        "NOT_FOUND",
        "has no version",
    ),
    "wrong name": (lambda: rank().tensor("items", name="itemz"), "INVALID_ARGUMENT", "'itemz'"),
    "missing input": (
        lambda: replace(rank(), inputs=rank().inputs[1:]),
        "INVALID_ARGUMENT",
        "input items is missing",
    ),
    "no input at all": (lambda: replace(rank(), inputs=()), "INVALID_ARGUMENT", "missing"),
    "twice the same input": (
        lambda: replace(rank(), inputs=(*rank().inputs, rank().inputs[0])),
        "INVALID_ARGUMENT",
        "given twice",
    ),
    "wrong type": (lambda: rank().tensor("items", datatype="INT64"), "INVALID_ARGUMENT", "items is INT32"),
    "a type nobody has": (lambda: rank().tensor("items", datatype="X" * 500), "INVALID_ARGUMENT", "INT32"),
    "strings": (lambda: rank().tensor("items", datatype="BYTES"), "INVALID_ARGUMENT", "not 'BYTES'"),
    "wrong rank": (lambda: rank().tensor("items", shape=(12,)), "INVALID_ARGUMENT", "2 dimensions"),
    "many dimensions": (lambda: rank().tensor("items", shape=(1,) * 999), "INVALID_ARGUMENT", "not 999"),
    "no users": (lambda: rank().tensor("items", shape=(0, 6), data=b""), "INVALID_ARGUMENT", "not 0"),
    "negative": (lambda: rank().tensor("items", shape=(-1, 6)), "INVALID_ARGUMENT", "not -1"),
    "two negatives": (lambda: rank().tensor("items", shape=(-2, -6)), "INVALID_ARGUMENT", "not -2"),
    "huge": (lambda: rank().tensor("items", shape=(HUGE, HUGE)), "INVALID_ARGUMENT", "users"),
    "overflowing": (
        lambda: rank().tensor("items", shape=(2**62, 2**62)),
        "INVALID_ARGUMENT",
        "is 1 to 8",
    ),
    "too many users": (lambda: rank().tensor("items", shape=(9, 6)), "INVALID_ARGUMENT", "1 to 8, not 9"),
    "too long a history": (lambda: rank().tensor("items", shape=(2, 71)), "INVALID_ARGUMENT", "1 to 70"),
    "users that differ": (
        lambda: rank().tensor("lengths", shape=(1,), data=b"\1\0\0\0"),
        "INVALID_ARGUMENT",
        "has 1 users, input items has 2",
    ),
    "a fixed size that differs": (
        lambda: score().tensor("user_vector", shape=(2, 15)),
        "INVALID_ARGUMENT",
        "dimension 1 is 16",
    ),
    "too few bytes": (lambda: rank().tensor("items", data=b"\0" * 47), "INVALID_ARGUMENT", "47 bytes"),
    "too many bytes": (lambda: rank().tensor("items", data=b"\0" * 52), "INVALID_ARGUMENT", "52 bytes"),
    "no bytes": (lambda: rank().tensor("items", data=b""), "INVALID_ARGUMENT", "0 bytes"),
    "NaN": (lambda: score().values("user_vector", put(3, np.nan)), "INVALID_ARGUMENT", "not finite"),
    "Inf": (lambda: score().values("key_1", put(-1, np.inf)), "INVALID_ARGUMENT", "not finite"),
    "a row below the table": (lambda: rank().values("items", put(0, -1)), "INVALID_ARGUMENT", "-1; 0"),
    "a row beyond the table": (
        lambda: rank().values("candidates", put(0, HUGE)),
        "INVALID_ARGUMENT",
        "most allowed",
    ),
    "a behaviour nobody has": (lambda: rank().values("behaviors", put(0, 6)), "INVALID_ARGUMENT", "6; 5"),
    "longer than its slots": (lambda: rank().values("lengths", put(1, 7)), "INVALID_ARGUMENT", "7; 6"),
    "negative length": (lambda: rank().values("lengths", put(1, -1)), "INVALID_ARGUMENT", "-1; 0"),
    "unknown output": (
        lambda: replace(rank(), outputs=("x",)),
        "INVALID_ARGUMENT",
        "output is called 'x'",
    ),
    "an output twice": (
        lambda: replace(rank(), outputs=("scores", "scores")),
        "INVALID_ARGUMENT",
        "twice",
    ),
    "negative timeout": (
        lambda: replace(rank(), parameters={"timeout": -1}),
        "INVALID_ARGUMENT",
        "parameter timeout",
    ),
    "endless timeout": (
        lambda: replace(rank(), parameters={"timeout": 2**62}),
        "INVALID_ARGUMENT",
        "parameter timeout",
    ),
    "a timeout in words": (
        lambda: replace(rank(), parameters={"timeout": "soon"}),
        "INVALID_ARGUMENT",
        "is an integer",
    ),
    "expired": (lambda: replace(rank(), parameters={"timeout": 1}), "DEADLINE_EXCEEDED", "deadline"),
    "unknown priority": (
        lambda: replace(rank(), parameters={"priority": 11}),
        "INVALID_ARGUMENT",
        "parameter priority",
    ),
    "negative priority": (
        lambda: replace(rank(), parameters={"priority": -1}),
        "INVALID_ARGUMENT",
        "parameter priority",
    ),
    "a priority in words": (
        lambda: replace(rank(), parameters={"priority": "first"}),
        "INVALID_ARGUMENT",
        "is an integer",
    ),
    "shared memory": (
        lambda: replace(rank(), parameters={"shared_memory_region": "x"}),
        "INVALID_ARGUMENT",
        "not served",
    ),
    "lists: a user below zero": (
        lambda: with_users(-1, 5),
        "INVALID_ARGUMENT",
        "user_ids holds -1; 0",
    ),
    "lists: users for other rows": (lambda: with_users(1, 2, 3), "INVALID_ARGUMENT", "has 3 users"),
    "lists: an item below zero": (lambda: lists().values("items", put(0, -5)), "INVALID_ARGUMENT", "-5"),
    "lists: a time to come": (
        lambda: lists().values("timestamps", put(0, 2**40)),
        "INVALID_ARGUMENT",
        "most allowed",
    ),
    "lists: no item wanted": (lambda: lists().values("k", put(0, 0)), "INVALID_ARGUMENT", "0; 1"),
    "lists: a million wanted": (lambda: lists().values("k", put(0, 10**6)), "INVALID_ARGUMENT", "1000"),
    "lists: several ks": (
        lambda: lists().tensor("k", shape=(2,), data=b"\1\0\0\0" * 2),
        "INVALID_ARGUMENT",
        "dimension 0 is 1",
    ),
}


def message(ask: Ask) -> Any:
    request = pb.ModelInferRequest(model_name=ask.model, model_version=ask.version)
    for tensor in ask.inputs:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.data)
    for name in ask.outputs:
        request.outputs.add(name=name)
    for name, value in ask.parameters.items():
        choice = "string_param" if isinstance(value, str) else "int64_param"
        setattr(request.parameters[name], choice, value)
    return request


def over_grpc(running: Running, request: Any, timeout_s: float = 20.0) -> tuple[str, str]:
    """Status and sentence, of a message or of bytes that claim to be one."""
    content = request if isinstance(request, bytes) else request.SerializeToString()
    with channel_of(running.grpc, blocking=True) as channel:
        try:
            channel.unary_unary(INFER)(content, timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
    return "OK", ""


async def over_rest(
    running: Running, path: str, content: bytes, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    async with (
        ClientSession() as session,
        session.post(f"http://{running.http}{path}", data=BytesIO(content), headers=headers) as response,
    ):
        body = orjson.loads(await response.read())
        return response.status, body.get("error", "")


def binary(ask: Ask) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of a REST request with binary tensors."""
    body = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "parameters": {"binary_data_size": len(tensor.data)},
            }
            for tensor in ask.inputs
        ],
        "outputs": [{"name": name} for name in ask.outputs],
        "parameters": ask.parameters,
    }
    header = orjson.dumps(body)
    path = f"/v2/models/{ask.model}" + (f"/versions/{ask.version}" if ask.version else "") + "/infer"
    content = header + b"".join(tensor.data for tensor in ask.inputs)
    return path, content, {HEADER_LENGTH: str(len(header))}


def plain(ask: Ask) -> tuple[str, bytes] | None:
    """Path and body of a REST request with numbers in JSON; None where bytes are no numbers of a type."""
    inputs = []
    for tensor in ask.inputs:
        dtype = DTYPES.get(tensor.datatype, np.dtype("<i4"))
        if len(tensor.data) % dtype.itemsize:
            return None
        data = np.frombuffer(tensor.data, dtype).tolist()
        inputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, "data": data})
    body = {"inputs": inputs, "outputs": [{"name": name} for name in ask.outputs]}
    return binary(ask)[0], orjson.dumps({**body, "parameters": ask.parameters})


@pytest.mark.parametrize("good", [rank, score, lists])
async def test_requests_are_good_before_they_are_spoilt(running: Running, good: Callable[[], Ask]) -> None:
    assert await asyncio.to_thread(over_grpc, running, message(good())) == ("OK", "")
    assert await over_rest(running, *binary(good())) == (200, "")
    asked = plain(good())
    assert asked is not None
    assert await over_rest(running, *asked) == (200, "")


@pytest.mark.parametrize("fault", BAD)
async def test_a_fault_has_its_status_and_a_sentence(running: Running, fault: str) -> None:
    spoil, status, sentence = BAD[fault]
    code, told = await asyncio.to_thread(over_grpc, running, message(spoil()))
    assert (code, sentence in told) == (status, True), told
    assert len(told) < 300
    number, told = await over_rest(running, *binary(spoil()))
    assert (number, sentence in told) == (STATUS[status], True), told
    if (asked := plain(spoil())) is not None:
        # JSON has no NaN, and counts numbers instead of bytes: the sentence may be another one.
        number, told = await over_rest(running, *asked)
        assert (number, bool(told)) == (STATUS[status], True), told
    assert await asyncio.to_thread(over_grpc, running, message(rank())) == ("OK", "")
    assert (await over_rest(running, *binary(rank())))[0] == 200


def test_raw_and_typed_contents_are_not_mixed_or_short(running: Running) -> None:
    request = message(rank())
    del request.raw_input_contents[-1]
    code, told = over_grpc(running, request)
    assert (code, told) == ("INVALID_ARGUMENT", "7 inputs come with 6 raw contents")
    request = message(rank())
    request.inputs[0].contents.int_contents.append(1)
    assert "raw contents and others" in over_grpc(running, request)[1]


def test_typed_contents_are_read_and_counted(running: Running) -> None:
    request = message(rank())
    del request.raw_input_contents[:]
    for tensor, given in zip(request.inputs, rank().inputs, strict=True):
        tensor.contents.int_contents.extend(np.frombuffer(given.data, np.int32).tolist())
    assert over_grpc(running, request) == ("OK", "")
    request.inputs[0].contents.int_contents.append(1)
    assert over_grpc(running, request) == (
        "INVALID_ARGUMENT",
        "input items has 13 numbers; its shape makes 12",
    )


def test_numbers_of_another_type_and_numbers_that_are_not_finite_are_refused(running: Running) -> None:
    request = message(score())
    del request.raw_input_contents[:]
    for tensor, given in zip(request.inputs, score().inputs, strict=True):
        numbers = np.frombuffer(given.data, DTYPES[given.datatype]).tolist()
        field = "fp32_contents" if given.datatype == "FP32" else "int_contents"
        getattr(tensor.contents, field).extend(numbers)
    assert over_grpc(running, request) == ("OK", "")
    for number in (float("nan"), float("-inf")):
        request.inputs[0].contents.fp32_contents[5] = number
        code, told = over_grpc(running, request)
        assert (code, "not finite" in told) == ("INVALID_ARGUMENT", True)
    del request.inputs[0].contents.fp32_contents[:]
    request.inputs[0].contents.int64_contents.append(1)
    code, told = over_grpc(running, request)
    assert (code, "has 0 numbers" in told) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(
    ("name", "choice", "value"),
    [
        ("priority", "uint64_param", 2**64 - 1),
        ("priority", "bool_param", True),
        ("priority", "double_param", 1.0),
        ("timeout", "double_param", float("nan")),
        ("timeout", "string_param", "1"),
        ("timeout", "uint64_param", 2**64 - 1),
    ],
)
def test_a_parameter_of_another_kind_is_refused(running: Running, name: str, choice: str, value: Any) -> None:
    request = message(rank())
    setattr(request.parameters[name], choice, value)
    code, told = over_grpc(running, request)
    assert (code, f"parameter {name}" in told) == ("INVALID_ARGUMENT", True), told


def test_bytes_that_are_no_message_are_refused(running: Running) -> None:
    refused = ("INVALID_ARGUMENT", "the bytes are no ModelInferRequest")
    assert over_grpc(running, b"\xff" * 64) == refused
    assert over_grpc(running, message(rank())) == ("OK", "")


def test_a_message_beyond_the_limit_is_refused_before_it_is_read(small: Running) -> None:
    request = message(rank())
    request.raw_input_contents.append(b"\0" * 2_000_000)
    assert over_grpc(small, request)[0] == "RESOURCE_EXHAUSTED"
    assert over_grpc(small, message(rank())) == ("OK", "")


async def test_a_body_beyond_the_limit_is_refused(small: Running) -> None:
    path, content, headers = binary(rank())
    number, told = await over_rest(small, path, content + b"\0" * 2_000_000, headers)
    assert (number, bool(told)) == (413, True)
    number, told = await over_rest(small, path, b'{"inputs": [' + b" " * 20_000 + b"]}")
    assert number == 413
    assert "binary" in told
    # A few kilobytes that inflate to two million.
    number, _ = await over_rest(small, path, zlib.compress(b" " * 2_000_000), {"Content-Encoding": "deflate"})
    assert number == 413
    assert (await over_rest(small, path, content, headers))[0] == 200


def tensor(**changed: Any) -> bytes:
    """A JSON body whose first input is changed."""
    inputs = [
        {"name": name, "datatype": "INT32", "shape": list(array.shape), "data": array.tolist()}
        for name, array in rank_inputs(2, 6, 4).items()
    ]
    inputs[0] |= changed
    # The standard library writes numbers that no server should read.
    return json.dumps({"inputs": inputs}).encode()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "a JSON object"),
        (b'{"inputs": {}}', "list of objects"),
        (b'{"inputs": [5]}', "list of objects"),
        (b'{"inputs": [{"name": 5}]}', "string"),
        (b'{"inputs": [], "outputs": 5}', "list of objects"),
        (b'{"inputs": [], "parameters": 5}', "object"),
        (tensor(shape="2, 6"), "shape of integers"),
        (tensor(shape=[2.0, 6]), "shape of integers"),
        (tensor(shape=[True, 6]), "shape of integers"),
        (tensor(data=None), "needs data"),
        (tensor(data=[[1], [2, 3]]), "rows of equal length"),
        (tensor(data=["1"] * 12), "32-bit integers"),
        (tensor(data=[1.5] * 12), "32-bit integers"),
        (tensor(data=[True] * 12), "32-bit integers"),
        (tensor(data=[2**40] * 12), "32-bit integers"),
        (tensor(data=[{}] * 12), "32-bit integers"),
        (tensor(data=[1] * 11), "11 numbers"),
        (tensor(data=[2**70] * 12), "32-bit integers"),
        (tensor(data="1" * 12), "needs data"),
        (tensor(data=[float("nan")] * 12), "not JSON"),
        (tensor(data=[float("inf")] * 12), "not JSON"),
        (tensor(shape=[10**30, 6]), "shape of integers"),
        (tensor(shape=[[2], 6]), "shape of integers"),
        (tensor(datatype=5), "string"),
        (tensor(name="x" * 100_000), "no input is called"),
        (tensor(parameters={"binary_data_size": 48}), "binary_data_size"),
        (tensor(parameters={"binary_data_size": -1}), "binary_data_size"),
        (tensor(parameters={"binary_data_size": "48"}), "binary_data_size"),
    ],
)
async def test_json_that_makes_no_request_is_refused(running: Running, content: bytes, sentence: str) -> None:
    number, told = await over_rest(running, "/v2/models/tailrace-rank/infer", content)
    assert (number, sentence in told) == (400, True), told


async def test_the_json_parts_length_is_not_believed(running: Running) -> None:
    path, content, _ = binary(rank())
    for told in ("-1", "1e3", "99999999", "9" * 5_000, "²"):
        headers = {HEADER_LENGTH: told}
        number, _ = await over_rest(running, path, content, headers)
        assert number == 400, told
    number, said = await over_rest(running, *_with_tail(binary(rank())))
    assert (number, "follow the last tensor" in said) == (400, True)


def _with_tail(request: tuple[str, bytes, dict[str, str]]) -> tuple[str, bytes, dict[str, str]]:
    path, content, headers = request
    return path, content + b"more", headers


async def test_a_path_that_is_not_served_is_a_sentence(running: Running) -> None:
    assert (await over_rest(running, "/v2/models/tailrace-rank/config", b""))[0] == 404
    assert (await over_rest(running, "/v2/models/nobody/infer", b"{}"))[0] == 404
    assert (await over_rest(running, "/v2/health/live", b""))[0] == 405
