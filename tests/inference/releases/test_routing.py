"""Who gets the canary: always the same users, as many as were wished."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from inference.releases.routing import Split

USERS = np.arange(200_000)


@pytest.mark.parametrize("percent", [0.01, 0.5, 5, 50, 99.99])
def test_the_share_is_what_was_wished(percent):
    chosen = Split.of("v2", percent).chosen(USERS.tolist(), len(USERS))
    expected = percent / 100
    assert abs(chosen.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(USERS)) + 1e-9


def test_all_and_none():
    assert Split.of("v2", 100).chosen(USERS.tolist(), len(USERS)).all()
    assert not Split.of("v2", 0).chosen(USERS.tolist(), len(USERS)).any()


def test_a_larger_share_keeps_the_users_of_a_smaller_one():
    small, large = (Split.of("v2", percent).chosen(USERS.tolist(), len(USERS)) for percent in (5, 20))
    assert large[small].all()


def test_another_canary_draws_other_users():
    one, other = (Split.of(version, 10).chosen(USERS.tolist(), len(USERS)) for version in ("v2", "v3"))
    assert 0.08 < other[one].mean() < 0.12


@pytest.mark.parametrize("place", [0, 7, 99])
def test_a_user_is_in_the_same_arm_whatever_else_is_in_the_batch(place):
    users = USERS[:100].tolist()
    together = Split.of("v2", 50).chosen(users, 100)
    alone = Split.of("v2", 50).chosen([users[place]], 1)
    assert together[place] == alone[0]


def test_another_process_chooses_the_same_users_also_at_the_ends_of_the_range():
    users = [0, 1, 2**63 - 1, 2**62, 12345, 777, 31, 10**12]
    script = (
        f"from inference.releases.routing import Split; print(Split.of('v2', 50).chosen({users}, 8).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(Split.of("v2", 50).chosen(users, 8).tolist())
