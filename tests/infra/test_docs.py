"""What README and docs name is there: options, variables, metrics, files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic_settings import BaseSettings

from compression.evaluation.verdict import GateLimits
from features.settings import FeatureSettings
from inference.admission.settings import AdmissionSettings
from inference.oip.settings import ServeSettings
from inference.settings import InferenceSettings
from infra.cli import main
from stream.settings import StreamSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/operating.md", "docs/architecture.md", "CHANGELOG.md", "docker-compose.yml")
SETTINGS: tuple[type[BaseSettings], ...] = (
    *(StreamSettings, FeatureSettings, InferenceSettings),
    *(AdmissionSettings, ServeSettings, GateLimits),
)
PREFIXES = "STREAM|FEATURES|INFERENCE|ADMISSION|SERVE|GATE|RETRAIN|TAILRACE"
# Options of torchrun and redis-server, and click's own.
OF_OTHERS = {
    *("--help", "--nproc-per-node", "--nnodes", "--rdzv-endpoint"),
    *("--dir", "--maxmemory", "--protected-mode"),
}


def variables() -> dict[str, Any]:
    """Every setting's variable, with its default."""
    return {
        f"{kind.model_config.get('env_prefix', '')}{field}".upper(): about.default
        for kind in SETTINGS
        for field, about in kind.model_fields.items()
    }


def options(command: click.Command) -> set[str]:
    found = {word for one in command.params for word in (*one.opts, *one.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            own = command.get_command(context, name)
            assert own is not None, name
            found |= options(own)
    return found


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    return options(main)


@pytest.fixture(scope="module")
def source() -> str:
    """All that is ours but tests and the pages themselves."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kinds = (".py", ".sh", ".yml", "Dockerfile")
    own = [
        name for name in names.split() if name.endswith(kinds) and not name.startswith(("tests/", "docker-"))
    ]
    return "\n".join((ROOT / name).read_text() for name in own)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_nothing_that_is_not_there(page, source, known_options):
    text = (ROOT / page).read_text()
    # A compose file's own are those it substitutes.
    of_page = {*variables(), *re.findall(r"\$\{(\w+)", text)}
    named = set(re.findall(rf"\b(?:{PREFIXES})_[A-Z_0-9]*[A-Z0-9]\b", text)) - of_page
    assert {name for name in named if not re.search(rf"\b{name}\b", source)} == set()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known_options - OF_OTHERS == set()
    metrics = {name.removesuffix("_total") for name in re.findall(r"\btailrace_[a-z_]+", text)}
    assert {name for name in metrics if name not in source} == set()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_a_default_in_the_readme_is_the_one_in_force():
    """Numbers and plain words of the settings' table; hosts' names and files are for the reader."""
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| ([^|]*) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    said = {
        name: default
        for names, defaults in rows
        for name, default in zip(
            re.findall(r"`(\w+)`", names),
            [one.strip(" `") for one in re.split("[,;]", defaults)],
            strict=False,
        )
    }
    in_force = {
        name: one for name, one in variables().items() if name in said and isinstance(one, int | float)
    }
    assert len(in_force) > 20
    units = {"": 1, "MiB": 2**20, "GiB": 2**30}
    for name, default in in_force.items():
        amount, _, unit = said[name].partition(" ")
        assert float(amount) * units[unit] == default, name
