"""The load of arms with an address, a process of its own.

python -m infra.bench.serve.load WIRE HOST PORT TARGET PADDING SESSIONS LISTS; the last but one is a file
(`Sessions.save`). Reads steps and writes results as `driver` says.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import uvloop

from infra.bench.serve import payload
from infra.bench.serve.driver import Sender, drive
from infra.bench.serve.grpc_client import GrpcSender
from infra.bench.serve.http_client import HttpSender
from infra.bench.serve.sessions import Sessions

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an arm listens, which of `payload.WIRES` it speaks, and what suits it as padding. The target is
    HTTP's path, or the model's name."""

    wire: str
    host: str
    port: int
    target: str
    padding: payload.Padding = "whole"


async def connect(address: Address, requests: Sequence[payload.Int32]) -> Sender:
    """A sender of requests [lists, ROW] in turn; `OSError` where nobody listens."""
    wire = payload.WIRES[address.wire]
    bodies = [wire.write(rows, payload.slots_of(rows, address.padding), address.target) for rows in requests]
    if wire.content_type:
        return HttpSender(address.host, address.port, address.target, bodies, wire.content_type)
    grpc = GrpcSender(address.host, address.port, METHOD, bodies)
    await grpc.connect()
    return grpc


async def first_scores(
    address: Address, requests: Sequence[payload.Int32], *, timeout_s: float = 5.0
) -> list[payload.Float32] | None:
    """The scores of these requests; None where not all of them are answered."""
    try:
        sender = await connect(address, requests)
    except OSError:
        return None
    loop = asyncio.get_running_loop()
    answers: list[asyncio.Future[bytes | None]] = [loop.create_future() for _ in requests]
    for number, answer in enumerate(answers):
        sender.send(number, partial(_keep, answer))
    await asyncio.wait(answers, timeout=timeout_s)
    bodies = [answer.result() if answer.done() else None for answer in answers]
    sender.close()
    read = payload.WIRES[address.wire].read
    scores = [read(body) for body in bodies if body is not None]
    return scores if len(scores) == len(requests) else None


def _keep(answer: asyncio.Future[bytes | None], body: bytes | None) -> None:
    if not answer.done():
        answer.set_result(body)


async def main(wire: str, host: str, port: str, target: str, padding: str, sessions: str, lists: str) -> None:
    address = Address(wire, host, int(port), target, cast(payload.Padding, padding))
    sender = await connect(address, Sessions.load(Path(sessions)).requests(int(lists)))
    await drive(sender, int(lists))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
