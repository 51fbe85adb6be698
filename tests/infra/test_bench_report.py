"""A kept measurement: JSON that any reader takes, with what it depends on."""

import json

import numpy as np

from infra.bench import options, report


def test_what_was_not_measured_is_null_and_other_figures_stay(tmp_path):
    kept = tmp_path / "new" / "figures.json"
    report.write(kept, "engines", {"rows": [{"p50_ms": {1: 0.5}, "error": float("nan"), "n": np.int64(3)}]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    said = json.loads(kept.read_text(), parse_constant=refuse)
    assert said["bench"] == "engines" and said["machine"]["cores"] and said["git_revision"]
    assert said["rows"] == [{"p50_ms": {"1": 0.5}, "error": None, "n": 3}]


def test_a_measurement_says_beforehand_that_nothing_ranks(tmp_path, registry, capsys):
    options.note_unreleased(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "No version is released" in said and "tailrace retrain" in said
    options.note_unreleased(registry)
    assert capsys.readouterr().out == ""
