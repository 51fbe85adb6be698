"""The load of arms with an address, a process of its own.

python -m infra.bench.serve.load WIRE HOST PORT TARGET LISTS ITEMS CATEGORIES; the last two as in
`payload.Known`. Reads steps and writes results as `driver` says.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Final

import uvloop

from infra.bench.serve import payload
from infra.bench.serve.driver import Sender, drive
from infra.bench.serve.grpc_client import GrpcSender
from infra.bench.serve.http_client import HttpSender

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an arm listens, and which of `payload.WIRES` it speaks. The target is HTTP's path, or the
    model's name."""

    wire: str
    host: str
    port: int
    target: str


async def connect(address: Address, known: payload.Known, lists: int) -> Sender:
    """A sender of the requests that all arms get; `OSError` where nobody listens."""
    wire = payload.WIRES[address.wire]
    bodies = [wire.write(rows, address.target) for rows in payload.requests(known, lists)]
    if wire.content_type:
        return HttpSender(address.host, address.port, address.target, bodies, wire.content_type)
    grpc = GrpcSender(address.host, address.port, METHOD, bodies)
    await grpc.connect()
    return grpc


async def first_scores(
    address: Address, known: payload.Known, lists: int, *, timeout_s: float = 5.0
) -> payload.Float32 | None:
    """The scores of the first request; None where no answer comes."""
    try:
        sender = await connect(address, known, lists)
    except OSError:
        return None
    answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    sender.send(0, lambda body: None if answer.done() else answer.set_result(body))
    await asyncio.wait([answer], timeout=timeout_s)
    body = answer.result() if answer.done() else None
    sender.close()
    return None if body is None else payload.WIRES[address.wire].read(body)


async def main(wire: str, host: str, port: str, target: str, *numbers: str) -> None:
    lists, items, categories = map(int, numbers)
    sender = await connect(Address(wire, host, int(port), target), payload.Known(items, categories), lists)
    await drive(sender, lists)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
