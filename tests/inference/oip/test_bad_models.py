"""Versions that are not what they should be: refused with a sentence, while the server goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from compression.releases.registry import ITEM_TABLE, MANIFEST, Artefact, Registry
from inference.oip.client import Client
from tests.inference.oip.conftest import FIRST, SECOND, Running, list_inputs, rank_inputs
from tests.inference.test_model_file import custom, external, poisoned, renamed, wider
from tests.support import eventually_async

Spoil = Callable[[Path], None]


def graph(change: Callable[[onnx.ModelProto], object], name: str = "score") -> Spoil:
    def spoil(staging: Path) -> None:
        path = staging / f"{name}.onnx"
        model = onnx.load_model_from_string(path.read_bytes())
        change(model)
        path.write_bytes(model.SerializeToString())

    return spoil


def truncated(staging: Path) -> None:
    path = staging / "encode.onnx"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(staging: Path) -> None:
    (staging / "rank.onnx").write_bytes(b"")


def swapped(staging: Path) -> None:
    (staging / "encode.onnx").write_bytes((staging / "score.onnx").read_bytes())


def table(value: float, rows: int | None = None) -> Spoil:
    def spoil(staging: Path) -> None:
        found = np.load(staging / ITEM_TABLE)[:rows]
        found[3, 3] = value
        np.save(staging / ITEM_TABLE, found)

    return spoil


def no_table(staging: Path) -> None:
    np.save(staging / ITEM_TABLE, np.array([{}], object), allow_pickle=True)


FAULTS: dict[str, tuple[Spoil, str]] = {
    "a truncated graph": (truncated, "truncated"),
    "an empty graph": (empty, "refused"),
    "another graph's file": (swapped, "inputs are"),
    "external data outside its folder": (graph(external, "rank"), "another file"),
    "inputs of another name": (graph(renamed, "encode"), "pauses"),
    "inputs of another type": (graph(wider, "encode"), "INT64"),
    "custom operators": (graph(custom("ai.evil", "Shell"), "rank"), "'ai.evil'"),
    "NaN weights": (graph(poisoned(float("nan")), "encode"), "not finite"),
    "infinite weights in the graph that only the server serves": (
        graph(poisoned(float("inf")), "rank"),
        "not finite",
    ),
    "a NaN in the item table": (table(float("nan")), "not finite"),
    "a short item table": (table(0.0, rows=10), ITEM_TABLE),
    "an item table that is pickled": (no_table, ITEM_TABLE),
}


def files_of(artefact: Artefact, staging: Path) -> Path:
    staging.mkdir()
    for path in artefact.path.iterdir():
        if path.name != MANIFEST:
            (staging / path.name).write_bytes(path.read_bytes())
    return staging


@pytest.fixture(scope="module")
def server(artefact: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("faulty")
    registry = Registry(folder / "models")
    registry.publish(
        files_of(artefact, folder / "good"), artefact.manifest.model_copy(update={"version": FIRST})
    )
    registry.promote(FIRST)
    with Running(registry, alias_poll_s=0.02) as running:
        yield running


async def _goes_on(server: Running) -> None:
    async with Client(server.grpc) as client:
        assert await client.ready()
        assert (await client.infer("tailrace-lists", list_inputs()))["counts"].tolist() == [10, 10]
        await client.infer("tailrace-rank", rank_inputs())
        assert {version for _, version in await client.models()} == {FIRST}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_version_is_refused_by_hand_and_by_alias_and_the_server_goes_on(
    fault: str, server: Running, artefact: Artefact, tmp_path: Path
) -> None:
    spoil, sentence = FAULTS[fault]
    version = f"faulty-{list(FAULTS).index(fault)}"
    staging = files_of(artefact, tmp_path / "staging")
    spoil(staging)
    server.registry.publish(staging, artefact.manifest.model_copy(update={"version": version}))
    for serve in (False, True):
        status, told = await server.post("/load", version=version, serve=serve)
        assert (status, sentence in told["error"]) == (503, True), told
        assert len(told["error"]) < 400
    await _goes_on(server)
    server.registry.promote(version)
    releases = server.server.releases
    await eventually_async(lambda: sentence in releases.describe()["refused"].get("serving", ""))
    await _goes_on(server)
    server.registry.promote(FIRST)
    # What served before, as the alias has it now, is not taken either.
    await eventually_async(lambda: "serving" not in releases.describe()["refused"])


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda folder: (folder / "rank.onnx").write_bytes(b"x"), "rank.onnx has 1 bytes"),
        (lambda folder: (folder / "rank.onnx").unlink(), "rank.onnx cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "checksum"),
        (
            lambda folder: (folder / MANIFEST).write_text(
                json.dumps(json.loads((folder / MANIFEST).read_text()) | {"created_at": "1970"})
            ),
            "checksum",
        ),
    ],
)
async def test_a_version_that_was_harmed_after_its_release_is_not_served(
    two: Registry, harm: Callable[[Path], object], sentence: str
) -> None:
    two.promote(SECOND)
    two.promote(FIRST)
    with Running(two, alias_poll_s=0, keep_previous=0) as running:
        harm(two.root / "versions" / SECOND)
        two.rollback()
        status, told = await running.post("/refresh")
        assert status == 200
        assert not told["changed"]
        assert sentence in " ".join(told["refused"].values()), told["refused"]
        await _goes_on(running)
