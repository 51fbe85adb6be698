"""The browser bundle of a small trained model, opened in headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from compression.releases.registry import Artefact, Registry
from features.encoding import Vocabulary
from infra.bench.edge import ask_browser, ask_server, draw_asks, largest_difference
from infra.commands.export import export as command
from infra.export import onnxruntime_web, vocabulary_file
from infra.export.edge import GRAPH, TOLERANCE, EdgeManifest, export
from infra.export.folder import MANIFEST, entries
from infra.export.onnxruntime_web import LOADER, WASM, RuntimeMissing, runtime_files
from infra.export.parity import rank_inputs, reference
from infra.export.tables import narrow
from infra.local.browser import BrowserMissing, chromium, served
from tests.models import SYNTH
from tests.support import eventually

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

LISTS = 60
RANK = """
const [history, candidates, done] = arguments;
(async () => {
  const { Ranker } = await import("./tailrace-edge.js");
  const ranker = await Ranker.load("./");
  const id = (given) => (typeof given === "string" ? BigInt(given) : given);
  const events = history.map((event) => ({ ...event, item_id: id(event.item_id) }));
  const list = await ranker.rank(events, candidates.map(id));
  return list.map(({ item_id, score }) => [String(item_id), score]);
})().then(done, (error) => done(error.message));
"""
EVENT = {"item_id": 1, "category_id": 1, "behavior": "pv", "timestamp": 1_700_000_000}

Rank = Callable[[Path, list[dict[str, Any]], list[Any]], Any]


def lacking(reason: Exception) -> None:
    """What this machine lacks is told; where every change is judged it must be there."""
    if os.environ.get("CI"):
        pytest.fail(str(reason))
    pytest.skip(str(reason))


@pytest.fixture(scope="module", autouse=True)
def runtime() -> None:
    try:
        runtime_files()
    except RuntimeMissing as reason:
        lacking(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    try:
        with chromium() as found:
            yield found
    except BrowserMissing as reason:
        lacking(reason)


@pytest.fixture(scope="module")
def artefact(registry: Path) -> Artefact:
    return Registry(registry).open()


@pytest.fixture(scope="module")
def vocabulary(artefact: Artefact) -> Vocabulary:
    return artefact.vocabulary()


@pytest.fixture(scope="module")
def bundle(artefact: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge") / "bundle"
    export(artefact, folder)
    return folder


@pytest.fixture
def rank(browser: Chrome) -> Rank:
    """The page's answer: item and score, best first, or the sentence it fails with."""

    def ask(folder: Path, history: list[dict[str, Any]], candidates: list[Any]) -> Any:
        with served(folder) as url:
            browser.get(url)
            return browser.execute_async_script(RANK, history, candidates)

    return ask


def copied(bundle: Path, tmp_path: Path, **changed: bytes) -> Path:
    """The bundle with other bytes in some of its files."""
    folder = tmp_path / "changed"
    shutil.copytree(bundle, folder)
    for name, content in changed.items():
        (folder / name).write_bytes(content)
    return folder


def test_scores_are_those_of_the_server(
    registry: Path, artefact: Artefact, vocabulary: Vocabulary, bundle: Path, browser: Chrome
) -> None:
    asks = draw_asks(vocabulary, vocabulary, LISTS, seed=3)
    lengths = {len(ask.items) for ask in asks}
    assert min(lengths) == 0
    assert max(lengths) > artefact.manifest.model.max_history
    assert any(not vocabulary.is_known(ask.items).all() for ask in asks)
    assert any(not vocabulary.is_known(np.array(ask.candidates)).all() for ask in asks)
    with served(bundle) as url:
        answered = ask_browser(browser, url, asks)
    server = ask_server(registry, artefact.version, asks)
    assert largest_difference(answered.lists, server) <= TOLERANCE
    for scores in answered.lists:
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert len({round(score, 2) for scores in server for score in scores.values()}) > 100


def test_a_client_that_knows_fewer_items_scores_those_alike(
    registry: Path, artefact: Artefact, vocabulary: Vocabulary, tmp_path: Path, browser: Chrome
) -> None:
    chosen = vocabulary.item_ids[::3]
    manifest = export(artefact, tmp_path / "cut", items=chosen)
    assert manifest.items == len(chosen)
    kept = vocabulary_file.with_items(vocabulary, np.arange(0, len(vocabulary.item_ids), 3))
    asks = draw_asks(kept, vocabulary, LISTS, seed=4)
    with served(tmp_path / "cut") as url:
        answered = ask_browser(browser, url, asks)
    assert largest_difference(answered.lists, ask_server(registry, artefact.version, asks)) <= TOLERANCE


def test_an_item_that_was_left_out_is_an_unknown_one(
    artefact: Artefact, vocabulary: Vocabulary, tmp_path: Path, rank: Rank
) -> None:
    left_out = vocabulary.item_ids[1:2]
    export(artefact, tmp_path / "cut", items=vocabulary.item_ids[:1])
    ((item, score),) = rank(tmp_path / "cut", [], left_out.tolist())
    assert int(item) == left_out[0]
    nothing = np.zeros((1, 1), np.int32)
    inputs = dict.fromkeys(("items", "categories", "behaviors", "gaps"), nothing)
    inputs |= {
        "lengths": np.zeros(1, np.int32),
        "candidates": vocabulary.bucket_rows_of(left_out)[None],
        "candidate_categories": np.array([[vocabulary.unknown_category_row]], np.int32),
    }
    expected = reference(artefact.read("rank.onnx"))(inputs)["scores"]
    assert score == pytest.approx(float(expected[0, 0]), abs=TOLERANCE)


def test_ids_beyond_what_a_number_holds_are_big(
    vocabulary: Vocabulary, bundle: Path, tmp_path: Path, rank: Rank
) -> None:
    far = 2**60
    moved = Vocabulary(
        vocabulary.item_ids + far,
        vocabulary.item_categories,
        vocabulary.category_ids,
        vocabulary.item_buckets,
        vocabulary.category_buckets,
    )
    words, described = vocabulary_file.write(moved)
    assert described.arrays["item_ids"].type == "int64"
    manifest = EdgeManifest.model_validate_json((bundle / MANIFEST).read_bytes())
    files = {**manifest.files, **entries({described.file: words})}
    manifest = manifest.model_copy(update={"vocabulary": described, "files": files})
    wide = copied(bundle, tmp_path, **{MANIFEST: manifest.to_bytes(), described.file: words})
    history = [{**EVENT, "item_id": int(item)} for item in vocabulary.item_ids[:5]]
    candidates = vocabulary.item_ids[:20].tolist()
    expected = rank(bundle, history, candidates)
    there = [{**event, "item_id": str(int(event["item_id"]) + far)} for event in history]
    answered = rank(wide, there, [str(item + far) for item in candidates])
    assert [(int(item) - far, score) for item, score in answered] == [
        (int(item), score) for item, score in expected
    ]


@pytest.mark.parametrize("name", [GRAPH, vocabulary_file.FILE, LOADER, WASM])
def test_a_file_that_was_altered_is_refused(name: str, bundle: Path, tmp_path: Path, rank: Rank) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    changed = copied(bundle, tmp_path, **{name: bytes(content)})
    sentence = f"{name} is not the file that was exported: its SHA-256 differs"
    assert rank(changed, [EVENT], [1]) == sentence
    cut = copied(bundle, tmp_path / "cut", **{name: bytes(content[:-1])})
    assert rank(cut, [EVENT], [1]) == f"{name} has {len(content) - 1} bytes, not {len(content)}"
    longer = copied(bundle, tmp_path / "longer", **{name: bytes(content) + b"\0"})
    assert rank(longer, [EVENT], [1]) == f"{name} has more than {len(content)} bytes"


def test_a_manifest_that_nobody_promised_is_refused(bundle: Path, browser: Chrome) -> None:
    script = """
    const [sha256, done] = arguments;
    import("./tailrace-edge.js")
      .then(({ Ranker }) => Ranker.load("./", { sha256 }))
      .then(() => done("loaded"), (error) => done(error.message));
    """
    promised = entries({MANIFEST: (bundle / MANIFEST).read_bytes()})[MANIFEST].sha256
    with served(bundle) as url:
        browser.get(url)
        assert browser.execute_async_script(script, promised) == "loaded"
        refused = browser.execute_async_script(script, promised[::-1])
    assert refused == f"{MANIFEST} is not the file that was exported: its SHA-256 differs"


@pytest.mark.parametrize(
    ("event", "candidates", "sentence"),
    [
        ({"item_id": -1}, [1], "-1 is not an id: a whole number from 0 to 2^63 - 1"),
        ({}, [1.5], "1.5 is not an id: a whole number from 0 to 2^63 - 1"),
        ({}, [str(2**63)], f"{2**63} is not an id: a whole number from 0 to 2^63 - 1"),
        ({"behavior": "look"}, [1], "look is not one of pv, cart, fav, buy"),
        ({"timestamp": "now"}, [1], "now is not a time in Unix seconds"),
    ],
)
def test_an_ask_that_makes_no_sense_is_a_sentence(
    event: dict[str, Any], candidates: list[Any], sentence: str, bundle: Path, rank: Rank
) -> None:
    assert rank(bundle, [EVENT | event], candidates) == sentence


def test_candidates_count_once_and_none_is_no_list(bundle: Path, rank: Rank) -> None:
    assert sorted(int(item) for item, _ in rank(bundle, [EVENT], [3, 1, 3, 2, 1])) == [1, 2, 3]
    assert rank(bundle, [EVENT], []) == []


def test_asks_at_the_same_time_do_not_mix(bundle: Path, browser: Chrome) -> None:
    script = """
    const [asks, done] = arguments;
    (async () => {
      const { Ranker } = await import("./tailrace-edge.js");
      const ranker = await Ranker.load("./");
      const together = await Promise.all(asks.map((ask) => ranker.rank(ask, [1, 2, 3, 4, 5])));
      const apart = [];
      for (const ask of asks) apart.push(await ranker.rank(ask, [1, 2, 3, 4, 5]));
      return [together, apart];
    })().then(done, (error) => done(error.message));
    """
    asks = [[{**EVENT, "item_id": item}] * item for item in range(1, 9)]
    with served(bundle) as url:
        browser.get(url)
        together, apart = browser.execute_async_script(script, asks)
    assert together == apart
    assert together[0] != together[1]


def test_the_page_shows_a_list_its_time_and_the_sizes(bundle: Path, browser: Chrome) -> None:
    def text(name: str) -> str:
        return str(browser.execute_script(f"return document.getElementById('{name}').innerText"))

    with served(bundle) as url:
        browser.get(url)
        eventually(lambda: " ms." in text("status"), 30, what="the page's ranking")
        first = text("list")
        assert re.fullmatch(r"\d+ candidates after \d+ events: [\d.]+ ms\.", text("status"))
        assert len(first.splitlines()) >= 10
        assert "together" in text("files")
        browser.execute_script("document.getElementById('another').click()")
        eventually(lambda: text("list") != first, what="another list")


def test_the_page_says_what_is_wrong(bundle: Path, tmp_path: Path, browser: Chrome) -> None:
    with served(copied(bundle, tmp_path, **{MANIFEST: b"{"})) as url:
        browser.get(url)
        status = "return document.getElementById('status').innerText"
        eventually(lambda: browser.execute_script(status) == f"{MANIFEST} is damaged", what="the sentence")


def test_tables_take_the_smallest_numbers_that_will_do(
    artefact: Artefact, vocabulary: Vocabulary, bundle: Path
) -> None:
    published = artefact.read("rank.onnx")
    asked = list(rank_inputs(vocabulary, artefact.manifest.model.max_history))

    def difference(numbers: Any) -> float:
        run, right = reference(narrow(published, numbers)), reference(published)
        return max(float(np.abs(run(i)["scores"] - right(i)["scores"]).max()) for i in asked)

    manifest = EdgeManifest.model_validate_json((bundle / MANIFEST).read_bytes())
    assert manifest.numbers == "int16"
    assert difference("int8") > TOLERANCE / 2 >= difference("int16") > 0
    assert manifest.max_difference == difference("int16")
    assert len(narrow(published, "int8")) < len(narrow(published, "int16")) < len(published)


def run(*words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_command_says_what_it_wrote(registry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = registry.parent / "clicks.csv"
    answer = run("edge", "--registry", registry, "--out", out, "--items", 50, "--log", log, "--json")
    assert answer.exit_code == 0, answer.output
    said = json.loads(answer.stdout)
    assert said["items"] == 50 < SYNTH["items"]
    assert entries({name: (out / name).read_bytes() for name in said["files"]}) == (
        EdgeManifest.model_validate_json((out / MANIFEST).read_bytes()).files
    )
    again = run("edge", "--registry", registry, "--out", out)
    assert (again.exit_code, again.output) == (
        1,
        f"Error: {out} is there already, and not empty: name another folder\n",
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("v9",), "no version or alias 'v9'"),
        (("--items", "some"), "--items takes a number, or all"),
        (("--items", "5"), "--items N needs --log FILE"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(
    words: tuple[str, ...], sentence: str, registry: Path, tmp_path: Path
) -> None:
    answer = run("edge", *words, "--registry", registry, "--out", tmp_path / "out")
    assert answer.exit_code != 0
    assert sentence in answer.output
    assert not (tmp_path / "out").exists()


def test_without_npm_a_sentence_says_how_to_get_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeMissing, match="npm is missing"):
        runtime_files()


def test_a_runtime_that_is_not_the_one_we_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path))
    archive = tmp_path / "edge" / f"{onnxruntime_web.PACKAGE}-{onnxruntime_web.VERSION}.tgz"
    archive.parent.mkdir()
    archive.write_bytes(b"another")
    with pytest.raises(RuntimeMissing, match=r"is not onnxruntime-web .*: remove it"):
        runtime_files()
