"""A batch through a lane, in the lane's thread; in parts where the whole fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from inference.errors import DeadlineExceeded, EngineFailed, ModelUnavailable, Overloaded

logger = logging.getLogger(__name__)

# How often one failed batch may be run again in parts. Finding one bad item among 64 takes 12.
_MAX_RETRIES: Final = 16


def answers_of(
    run: Callable[[list[Any]], Sequence[Any]], items: list[Any], *, in_parts: bool
) -> tuple[list[Any], int, bool]:
    """One answer per item; where the whole fails, in parts if told so. Also says how often again, and
    whether the whole failed."""
    most = _MAX_RETRIES if in_parts else 0
    answers, left, whole = _attempt(run, items, most)
    return answers, most - left, whole


# Not a closure: one that calls itself is a cycle, which would keep each batch and its version alive.
def _attempt(
    run: Callable[[list[Any]], Sequence[Any]], part: list[Any], left: int
) -> tuple[list[Any], int, bool]:
    """Answers, how many more runs are left of `left`, and whether all of them failed."""
    try:
        answers = list(run(part))
    except (ModelUnavailable, DeadlineExceeded, Overloaded) as error:
        return [error for _ in part], left, False
    except Exception as error:
        if isinstance(error, EngineFailed):
            logger.warning("a batch of %d failed: %s", len(part), error)
        else:
            logger.exception("a batch of %d failed", len(part))
        if len(part) > 1 and left >= 2:
            half = len(part) // 2
            first, left, first_failed = _attempt(run, part[:half], left - 2)
            second, left, second_failed = _attempt(run, part[half:], left)
            return first + second, left, first_failed and second_failed
        return [EngineFailed(f"{type(error).__name__}: {error}") for _ in part], left, True
    if len(answers) != len(part):
        told = f"asked {len(part)} questions, got {len(answers)} answers"
        return [EngineFailed(told) for _ in part], left, True
    return answers, left, False
