from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.bench.sequence_memory import GOAL_BYTES, run


def test_a_user_with_a_hundred_events_fits_in_a_kibibyte_and_a_half(redis_url: str, tmp_path: Path) -> None:
    report = run(redis_url, users=2_000, json_path=tmp_path / "memory.json")
    # Fewer users than the full measure has: fixed costs and table growth weigh more, not less.
    assert 1_218 < report["bytes_per_user"] <= GOAL_BYTES
    assert json.loads((tmp_path / "memory.json").read_text()) == report


def test_the_measure_refuses_a_redis_with_data_in_it(redis_url: str) -> None:
    run(redis_url, users=1)
    with pytest.raises(ValueError, match="not empty"):
        run(redis_url, users=1)
