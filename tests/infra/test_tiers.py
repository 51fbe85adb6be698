"""`tailrace tiers` as a person runs it, against a real Redis."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from infra.cli import main
from infra.local.server import free_port


def run(*arguments, code: int = 0, **environment):
    done = CliRunner().invoke(main, ["tiers", *arguments], env=environment)
    assert done.exit_code == code, done.output
    return done.output


def test_a_user_is_put_into_a_tier_and_taken_out_again(redis_url):
    on = ["--redis-url", redis_url]
    assert run("show", "7", *on) == "user 7: standard (the default)\n"
    assert run("set", "7", "premium", *on) == "user 7: premium\n"
    assert run("show", "7", *on) == "user 7: premium\n"
    assert json.loads(run("show", "7", *on, "--json")) == {
        "user_id": 7,
        "tier": "premium",
        "set_to": "premium",
    }
    assert run("show", "8", *on) == "user 8: standard (the default)\n"
    assert run("clear", "7", *on) == "user 7: standard (the default)\n"
    assert run("show", "7", *on) == "user 7: standard (the default)\n"


def test_a_tier_nobody_knows_is_refused_and_one_that_is_gone_is_said_to_be(redis_url):
    on = ["--redis-url", redis_url]
    assert "'gold' is none of free, standard, premium" in run("set", "7", "gold", *on, code=2)
    run("set", "7", "gold", *on, ADMISSION_TIERS='[{"name":"standard"},{"name":"gold"}]')
    assert run("show", "7", *on) == "user 7: standard ('gold' is not known here)\n"


def test_the_limits_are_told_as_the_worker_would_have_them():
    tiers = '[{"name":"free","rate":200,"burst":400,"client_rate":0.5},{"name":"premium"}]'
    environment = {"ADMISSION_TIERS": tiers, "ADMISSION_DEFAULT_TIER": "free"}
    shown = run("list-limits", **environment)
    free, premium = (line for line in shown.splitlines() if "free" in line or "premium" in line)
    assert [word.strip() for word in free.split("│")[1:-1]] == ["free (default)", "200", "400", "0.5", "1"]
    assert premium.count("unlimited") == 4
    first, _ = map(json.loads, run("list-limits", "--json", **environment).splitlines())
    assert (first["name"], first["rate"], first["default"]) == ("free", 200, True)


@pytest.mark.parametrize("arguments", [["set", "7", "free"], ["show", "7"], ["clear", "7"]])
def test_a_redis_that_is_away_is_a_sentence(arguments):
    said = run(*arguments, "--redis-url", f"redis://127.0.0.1:{free_port()}/0", code=1)
    assert said.startswith("Error: Redis")


def test_wrong_settings_are_a_sentence():
    assert "a setting is wrong" in run("list-limits", code=1, ADMISSION_DEFAULT_TIER="gold")


def test_every_command_has_an_example_in_its_help():
    for command in ("set", "clear", "show", "list-limits"):
        assert f"tailrace tiers {command}" in run(command, "--help")
