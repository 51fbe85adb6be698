"""Connections that are accepted and never answered.

A port may take connections before, or instead of, the broker behind it: a container engine that holds
the port while the container starts, a proxy whose upstream is gone, a broker that is stuck. aiokafka
gives the handshake on such a connection its whole request timeout (40 s for a consumer, which must be
longer than a rebalance), and everything for that node waits behind it. `bound` has it try again after
`HANDSHAKE_S`.
"""

from __future__ import annotations

import asyncio
from functools import wraps
from typing import Any

from aiokafka.conn import AIOKafkaConnection

HANDSHAKE_S = 5.0


def bound() -> None:
    """For every connection this process opens to Kafka, Faust's included."""
    AIOKafkaConnection.connect = _connect


_UNBOUND: Any = AIOKafkaConnection.connect


@wraps(_UNBOUND)
async def _connect(self: AIOKafkaConnection) -> Any:
    # Clients take a TimeoutError here as they take a refused connection.
    async with asyncio.timeout(HANDSHAKE_S):
        return await _UNBOUND(self)
