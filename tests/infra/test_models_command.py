"""`tailrace models` on a registry, without a broker."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from infra.commands.models import models
from infra.local.server import free_port
from tests.compression.versions import registry_of


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TAILRACE_REGISTRY", str(tmp_path / "models"))
    for name in ("TAILRACE_TRUSTED_KEYS", "TAILRACE_SIGNING_KEY", "TAILRACE_REQUIRE_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    return registry_of(tmp_path, "v1", "v2", "v3")


def run(*words):
    return CliRunner().invoke(models, [str(word) for word in words])


def said(*words):
    answer = run(*words, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def stages():
    return {row["version"]: row["stage"] for row in said("list")["versions"] if row["stage"]}


def test_a_release_goes_from_canary_to_serving_and_back(registry):
    assert said("promote", "v1") | {"state": None} == {
        "alias": "serving",
        "version": "v1",
        "stage": "serving",
        "announced": False,
        "servers": 0,
        "state": None,
    }
    assert run("canary", "v2", "--percent", 2.5).output == "2.5 % of users get lists from v2\n"
    run("shadow", "v3")
    assert stages() == {"v1": "serving", "v2": "canary", "v3": "shadow"}
    assert "canary 2.5 %" in run("list").output
    assert "shadow 10 %" in run("show", "v3").output
    run("promote", "v2")
    assert stages() == {"v2": "serving", "v1": "previous", "v3": "shadow"}
    assert run("rollback").output == "serving stands for v1 again\n"
    run("shadow", "v3", "--percent", 0)
    assert stages() == {"v1": "serving"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("promote", "v9"), "no version or alias 'v9'"),
        (("canary", "v2", "--percent", "5"), "no version serves yet"),
        (("rollback",), "no version serves yet"),
        (("show", "../etc"), "is not a version or alias"),
        (("sign", "v1"), "TAILRACE_SIGNING_KEY"),
        (("list", "--alias", "a/b"), "is not a version or alias"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(registry, words, sentence):
    answer = run(*words)
    assert answer.exit_code == 1
    assert sentence in answer.output
    assert "Traceback" not in answer.output


@pytest.mark.parametrize("words", [("promote", "serving"), ("canary", "serving", "--percent", "5")])
def test_an_alias_is_no_version_to_promote_or_try(registry, words):
    run("promote", "v1")
    answer = run(*words)
    assert answer.exit_code == 1
    assert "'serving' is an alias, which stands for v1: name a version" in answer.output


@pytest.mark.parametrize("percent", ["101", "-1", "0.001", "nan"])
def test_a_share_that_is_none_is_refused(registry, percent):
    run("promote", "v1")
    answer = run("canary", "v2", "--percent", percent)
    assert answer.exit_code == 1
    assert "percent" in answer.output
    assert stages() == {"v1": "serving"}


def test_a_harmed_version_is_neither_promoted_nor_tried_nor_gone_back_to(registry):
    run("promote", "v1")
    run("promote", "v2")
    (registry.root / "versions" / "v1" / "rank.onnx").write_bytes(b"harmed")
    for words in (("promote", "v1"), ("canary", "v1", "--percent", "5"), ("shadow", "v1"), ("rollback",)):
        answer = run(*words)
        assert (answer.exit_code, "rank.onnx" in answer.output) == (1, True)
    assert stages() == {"v2": "serving", "v1": "previous"}


def test_verify_names_what_is_not_whole_and_ends_with_one(registry):
    assert run("verify").exit_code == 0
    (registry.root / "versions" / "v2" / "score.onnx").unlink()
    answer = run("verify")
    assert answer.exit_code == 1
    assert "v1  whole" in answer.output
    assert "v2: score.onnx cannot be read" in answer.output
    assert run("verify", "v3").exit_code == 0


def test_a_new_key_signs_what_was_there_and_refuses_what_is_not_signed(registry, monkeypatch):
    made = said("keygen")
    refused = run("promote", "v1")
    assert (refused.exit_code, "tailrace models sign v1" in refused.output) == (1, True)
    monkeypatch.setenv("TAILRACE_SIGNING_KEY", made["private"])
    assert said("sign", "v1") == {"version": "v1", "key_id": made["key_id"]}
    assert run("promote", "v1").exit_code == 0
    assert run("verify").exit_code == 1
    listed = {row["version"]: row["signature"] for row in said("list")["versions"]}
    assert listed["v1"] == {"key_id": made["key_id"], "error": None}
    assert "not signed" in listed["v2"]["error"]
    assert run("keygen").exit_code == 1


def test_an_empty_registry_says_how_to_fill_it(tmp_path):
    assert "tailrace retrain" in run("list", "--registry", tmp_path).output


def test_a_broker_that_is_away_leaves_the_change_made_and_says_so(registry, monkeypatch):
    monkeypatch.setattr("infra.announce.announce", lambda *_: "x:1: the release was not announced")
    answer = run("promote", "v1", "--bootstrap", "x:1", "--json")
    assert answer.exit_code == 1
    assert "not announced" in answer.stderr
    assert json.loads(answer.stdout)["announced"] is False
    assert stages() == {"v1": "serving"}


def test_a_server_that_is_away_leaves_the_change_made_and_says_so(registry):
    nobody = f"127.0.0.1:{free_port()}"
    answer = run("promote", "v1", "--server", nobody)
    assert answer.exit_code == 1
    assert f"{nobody}: not told" in answer.stderr
    assert stages() == {"v1": "serving"}


@pytest.mark.parametrize("name", sorted(models.commands))
def test_every_command_has_help_with_an_example(name):
    assert f"tailrace models {name}" in run(name, "--help").output
