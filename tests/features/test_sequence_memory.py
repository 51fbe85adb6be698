from __future__ import annotations

import pytest

from infra.bench.sequence_memory import GOAL_BYTES, run


def test_a_user_with_a_hundred_events_fits_in_a_kibibyte_and_a_half(redis_url: str) -> None:
    report = run(redis_url, users=2_000)
    # Fewer users than the full measure has: fixed costs and table growth weigh more, not less.
    assert 1_218 < report["bytes_per_user"] <= GOAL_BYTES


def test_the_measure_refuses_a_redis_with_data_in_it(redis_url: str) -> None:
    run(redis_url, users=1)
    with pytest.raises(ValueError, match="not empty"):
        run(redis_url, users=1)
