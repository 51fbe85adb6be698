"""What both fronts do with a request, once it is parsed: find the model, check, limit, ask, answer.

The parameters `priority` and `timeout` are Triton's: 0 is the default priority and a lower number comes
first; the timeout is in microseconds, and 0 is none. A request that is late is answered
`DeadlineExceeded` at once, whatever its engine is doing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from inference.errors import (
    DeadlineExceeded,
    EngineFailed,
    InferenceError,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
)
from inference.oip.models import Answer, Catalogue, Question, ServedModel
from inference.oip.tensors import Given, check
from inference.types import Priority, Tensors

logger = logging.getLogger(__name__)

NAME: Final = "tailrace"
EXTENSIONS: Final = ("binary_tensor_data", "model_repository(index)", "parameters", "schedule_policy")
LOWEST_PRIORITY: Final = 10
_REFUSED: Final = ("shared_memory_region", "classification", "sequence_id")
_MAX_TIMEOUT_US: Final = 24 * 3600 * 10**6


@dataclass(frozen=True, slots=True)
class Call:
    """A request for inference. `remaining_s` is what the transport's own deadline leaves, None for none.
    `checked` are inputs that the model's specs have been held against, instead of `inputs`."""

    model: str
    version: str
    inputs: Sequence[Given]
    outputs: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    remaining_s: float | None = None
    id: str = ""
    checked: Tensors | None = None


class Service:
    """At most `max_requests` requests at once; one more is `Overloaded`. `ready` is for the owner to set."""

    def __init__(self, catalogue: Catalogue, *, max_requests: int = 1024) -> None:
        self.catalogue = catalogue
        self.max_requests = max_requests
        self.ready = False
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def requests(self) -> int:
        """How many are in hand."""
        return self._requests

    async def infer(self, call: Call) -> tuple[ServedModel, Answer]:
        """The model that answered, and its outputs in the order asked for. Raises `InferenceError`."""
        if not self.ready:
            raise ModelUnavailable("the server is warming up, or leaving", retry_after_s=1.0)
        if self._requests >= self.max_requests:
            raise Overloaded(f"{self.max_requests} requests are in hand already")
        self._requests += 1
        self._idle.clear()
        try:
            return await self._infer(call)
        except InferenceError:
            raise
        except Exception as error:
            logger.exception("%s failed", call.model)
            raise EngineFailed("the server failed; its log says how") from error
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in hand; False where that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _infer(self, call: Call) -> tuple[ServedModel, Answer]:
        model = self.catalogue.find(call.model, call.version)
        priority = priority_of(call.parameters)
        timeout_s = timeout_of(call.parameters)
        outputs = _outputs(call.outputs, model)
        inputs = check(call.inputs, model.inputs, model.most) if call.checked is None else call.checked
        left_s = min((limit for limit in (timeout_s, call.remaining_s) if limit is not None), default=None)
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        deadline_s = None if left_s is None else asyncio.get_running_loop().time() + left_s
        answers, version = await model.infer(Question(inputs, outputs, priority, deadline_s))
        for name in outputs:
            if answers[name].dtype.kind == "f" and not np.isfinite(answers[name]).all():
                raise EngineFailed(f"{model.name}: {name} came out with numbers that are not finite")
        return model, Answer({name: answers[name] for name in outputs}, version)


def priority_of(parameters: Mapping[str, Any]) -> Priority:
    """1 is high, 2 and the default normal, the rest low."""
    number = _integer(parameters, "priority")
    if not 0 <= number <= LOWEST_PRIORITY:
        raise InvalidRequest(f"parameter priority is 0 (default) to {LOWEST_PRIORITY}, not {number}")
    return "high" if number == 1 else "normal" if number in (0, 2) else "low"


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """Seconds, None where there is no limit."""
    timeout_us = _integer(parameters, "timeout")
    if not 0 <= timeout_us <= _MAX_TIMEOUT_US:
        raise InvalidRequest(f"parameter timeout is 0 to {_MAX_TIMEOUT_US} microseconds, not {timeout_us}")
    return timeout_us / 1e6 if timeout_us else None


def refuse_unserved(parameters: Container[str]) -> None:
    """Extensions that change what an answer means are refused; what else we do not know changes nothing."""
    for name in _REFUSED:
        if name in parameters:
            raise InvalidRequest(f"parameter {name} is not served here")


def _integer(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"parameter {name} is an integer, not {str(value)[:32]!r}")
    return value


def _outputs(asked: Sequence[str], model: ServedModel) -> tuple[str, ...]:
    known = [spec.name for spec in model.outputs]
    for name in asked:
        if name not in known:
            raise InvalidRequest(f"no output is called {name[:64]!r}; there are {', '.join(known)}")
    if len(set(asked)) < len(asked):
        raise InvalidRequest("an output is asked for twice")
    return tuple(asked) or tuple(known)
