"""`tailrace bench edge`: the browser bundle in headless Chromium, beside the server's ranker.

A bundle is exported from a released version and served on this machine. Random histories of 0 to 130
events, unknown items and clocks that run backwards among them, are ranked with 50 candidates in the page,
one at a time, and by the server's own ranker on ONNX Runtime. Scores are compared item by item.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np
import numpy.typing as npt

from compression.releases.registry import Artefact, ArtefactInvalid, Registry
from features.encoding import Vocabulary
from features.memory_store import MemoryStore
from features.sequence import pack
from features.statistics import ItemStatistics
from inference.errors import InferenceError
from inference.ranker import Ranker
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest
from infra.bench import options as bench_options
from infra.bench import report
from infra.commands import options
from infra.commands.export import item_options, popular_items
from infra.export.edge import TOLERANCE, EdgeManifest, export
from infra.export.folder import ExportFailed
from infra.export.onnxruntime_web import RuntimeMissing
from infra.export.tables import Numbers
from infra.export.vocabulary_file import with_items
from infra.local.browser import BrowserMissing, chromium, served
from topics.messages import BEHAVIORS

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CANDIDATES: Final = 50
LONGEST: Final = 130  # past what the network reads, so that the cut is measured too
_AWKWARD: Final = (0, 1, 2, 99, 100, 101, LONGEST)
_UNKNOWN: Final = 0.04
_START_S: Final = 1_500_000_000
_SERVER_BATCH: Final = 16
_WARM_LISTS: Final = 20

# Loads the bundle once more, then ranks every ask and takes its time.
_RANK: Final = """
const [asks, warm, done] = arguments;
(async () => {
  const { Ranker } = await import("./tailrace-edge.js");
  const started = performance.now();
  const ranker = await Ranker.load("./");
  const load_ms = performance.now() - started;
  for (const ask of asks.slice(0, warm)) await ranker.rank(ask.history, ask.candidates);
  const lists = [], took_ms = [];
  for (const { history, candidates } of asks) {
    const from = performance.now();
    const list = await ranker.rank(history, candidates);
    took_ms.push(performance.now() - from);
    lists.push(list.map(({ item_id, score }) => [String(item_id), score]));
  }
  return { lists, took_ms, load_ms, parts_ms: ranker.loaded_ms };
})().then(done, (error) => done({ error: String(error) }));
"""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A history by columns, oldest event first, and the items to be scored."""

    items: Int64
    categories: Int64
    behaviors: Int64
    timestamps: Int64
    candidates: list[int]

    def for_browser(self) -> dict[str, Any]:
        """As JavaScript reads it: ids beyond 2^53 are none of ours here."""
        columns = (self.items, self.categories, self.behaviors, self.timestamps)
        events = zip(*(column.tolist() for column in columns), strict=True)
        history = [
            {
                "item_id": item,
                "category_id": category,
                "behavior": BEHAVIORS[behavior],
                "timestamp": timestamp,
            }
            for item, category, behavior, timestamp in events
        ]
        return {"history": history, "candidates": self.candidates}

    def for_server(self, user: int) -> RankRequest:
        sequence = pack(self.items, self.categories, self.behaviors, self.timestamps)
        return RankRequest(user, sequence, k=CANDIDATES, candidates=tuple(self.candidates))


@dataclass(frozen=True, slots=True)
class InBrowser:
    """What the page answered: item → score by ask, best first, and the milliseconds each took."""

    lists: list[dict[int, float]]
    took_ms: list[float]
    load_ms: float
    session_ms: float


def draw_asks(client: Vocabulary, server: Vocabulary, count: int, seed: int) -> list[Ask]:
    """Histories and candidates of items the client knows, and of some that nobody does."""
    rng = np.random.default_rng(seed)
    asks: list[Ask] = []
    for place in range(count):
        length = _AWKWARD[place] if place < len(_AWKWARD) else int(rng.integers(0, LONGEST + 1))
        asked = rng.choice(client.item_ids, min(CANDIDATES, len(client.item_ids)), replace=False)
        drawn = np.concatenate([rng.choice(client.item_ids, length), asked])
        rows = client.category_rows_of_items(drawn)[:length]
        categories = client.category_ids[np.minimum(rows, len(client.category_ids)) - 1]
        items = np.where(rng.random(len(drawn)) < _UNKNOWN, _nobodys(server.item_ids, len(drawn), rng), drawn)
        strange = rng.random(length) < _UNKNOWN
        categories = np.where(strange, _nobodys(server.category_ids, length, rng), categories)
        gaps = np.floor(2 ** rng.uniform(-1, 22, length)).astype(np.int64)
        backwards = rng.random(length) < _UNKNOWN
        asks.append(
            Ask(
                items=items[:length],
                categories=categories,
                behaviors=rng.integers(0, len(BEHAVIORS), length),
                timestamps=_START_S + np.cumsum(np.where(backwards, -gaps, gaps)),
                candidates=items[length:].tolist(),
            )
        )
    return asks


def _nobodys(known: Int64, count: int, rng: np.random.Generator) -> Int64:
    """Ids beyond all that are known."""
    return np.asarray(known.max(initial=0) + rng.integers(1, 2**34, count))


def ask_browser(browser: Chrome, url: str, asks: Sequence[Ask], *, warm: int = 0) -> InBrowser:
    """Every ask, one after another, in a page of the bundle at `url`, after the first `warm` were tried.
    Raises `ExportFailed` with what the page says."""
    browser.get(url)
    said = browser.execute_async_script(_RANK, [ask.for_browser() for ask in asks], warm)
    if "error" in said:
        raise ExportFailed(f"the page fails: {said['error']}")
    lists = [{int(item): score for item, score in ranked} for ranked in said["lists"]]
    return InBrowser(lists, said["took_ms"], said["load_ms"], said["parts_ms"]["session"])


def ask_server(registry: Path, version: str, asks: Sequence[Ask]) -> list[dict[int, float]]:
    """The same from the ranker that serves: item → score by ask, best first."""
    # The browser has the network alone: nothing is counted there.
    settings = InferenceSettings(
        engine="onnx", fusion=0.0, batches=(1, _SERVER_BATCH), candidate_sizes=(CANDIDATES,)
    )
    ranker = Ranker.open(registry, version, settings=settings)
    warmed = ranker.warm("onnx")
    try:
        requests = [ask.for_server(user) for user, ask in enumerate(asks)]
        answers: list[dict[int, float]] = []
        for start in range(0, len(requests), _SERVER_BATCH):
            some = requests[start : start + _SERVER_BATCH]
            for answer in ranker.rank(warmed, some, ItemStatistics(MemoryStore())):
                if not isinstance(answer, RankedList):
                    raise answer
                answers.append(dict(zip(answer.items, answer.scores, strict=True)))
    finally:
        warmed.close()
    return answers


def largest_difference(ours: Sequence[dict[int, float]], theirs: Sequence[dict[int, float]]) -> float:
    """Of any item's score; infinite where the lists hold other items."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.keys() != other.keys():
            return float("inf")
        worst = max(worst, *(abs(score - other[item]) for item, score in one.items()))
    return worst


def run(
    registry: Path, version: str, *, items: Int64 | None, numbers: Numbers | None, lists: int, seed: int
) -> dict[str, Any]:
    """Export, ask both, compare."""
    artefact = Registry(registry).open(version)
    with tempfile.TemporaryDirectory(prefix="tailrace-edge-") as name:
        folder = Path(name) / "bundle"
        manifest = export(artefact, folder, items=items, numbers=numbers)
        asks = draw_asks(_client(artefact, items), artefact.vocabulary(), lists, seed)
        with served(folder) as url, chromium() as page:
            browser = ask_browser(page, url, asks, warm=_WARM_LISTS)
        sizes = _sizes(folder, manifest)
    server = ask_server(registry, artefact.version, asks)
    return {
        "version": artefact.version,
        "items": manifest.items,
        "numbers": manifest.numbers,
        "lists": lists,
        "candidates": CANDIDATES,
        "seed": seed,
        "max_difference": largest_difference(browser.lists, server),
        "same_order": _same_order(browser.lists, server),
        "tables_difference": manifest.max_difference,
        "p50_ms": float(np.percentile(browser.took_ms, 50)),
        "p99_ms": float(np.percentile(browser.took_ms, 99)),
        "load_ms": browser.load_ms,
        "of_that_session_ms": browser.session_ms,
        "bytes": sizes,
        "total_bytes": sum(size["plain"] for size in sizes.values()),
        "total_gzip_bytes": sum(size["gzip"] for size in sizes.values()),
    }


def _client(artefact: Artefact, items: Int64 | None) -> Vocabulary:
    vocabulary = artefact.vocabulary()
    if items is None:
        return vocabulary
    return with_items(vocabulary, np.flatnonzero(np.isin(vocabulary.item_ids, items)))


def _same_order(ours: Sequence[dict[int, float]], theirs: Sequence[dict[int, float]]) -> float:
    """The share of lists whose ten best are the same items in the same order."""
    same = [list(one)[:10] == list(other)[:10] for one, other in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def _sizes(folder: Path, manifest: EdgeManifest) -> dict[str, dict[str, int]]:
    """Each file as it is, and as a server that compresses sends it."""
    return {
        name: {"plain": entry.bytes, "gzip": len(gzip.compress((folder / name).read_bytes(), 6))}
        for name, entry in manifest.files.items()
    }


@click.command()
@click.argument("version", default="serving")
@item_options
@click.option("--lists", type=click.IntRange(10, 5_000), default=500, show_default=True)
@options.registry
@bench_options.seed
@bench_options.json_path
def edge(
    *,
    version: str,
    items: str,
    log: Path | None,
    numbers: Numbers | None,
    lists: int,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """The browser bundle in headless Chromium: scores against the server's, time per list, sizes.

    \b
    tailrace bench edge
    tailrace bench edge 20171203T101500-3f9c --items 10000 --log clicks.csv --json edge.json
    """
    try:
        chosen = popular_items(items, log)
        figures = run(registry, version, items=chosen, numbers=numbers, lists=lists, seed=seed)
    except (ArtefactInvalid, InferenceError, ExportFailed, RuntimeMissing, BrowserMissing) as error:
        raise click.ClickException(str(error)) from None
    _show(figures)
    report.write(json_path, "edge", figures)
    if not figures["max_difference"] <= TOLERANCE:
        raise click.ClickException(f"scores differ from the server's by more than {TOLERANCE}")


def _show(figures: dict[str, Any]) -> None:
    title = f"edge: {figures['lists']} lists of {CANDIDATES} candidates, {figures['items']:,} items"
    rows = [
        ["largest difference from the server's scores", f"{figures['max_difference']:.1e}"],
        ["of that, tables in " + figures["numbers"], f"{figures['tables_difference']:.1e}"],
        ["lists with the same ten best in the same order", f"{figures['same_order']:.1%}"],
        ["a list, p50", f"{figures['p50_ms']:.2f} ms"],
        ["a list, p99", f"{figures['p99_ms']:.2f} ms"],
        ["load: fetch, check, compile", f"{figures['load_ms']:.0f} ms"],
        ["of that, compile", f"{figures['of_that_session_ms']:.0f} ms"],
    ]
    report.table(title, ["", "value"], rows)
    sizes = [[name, *map(_mb, (size["plain"], size["gzip"]))] for name, size in figures["bytes"].items()]
    sizes.append(["together", _mb(figures["total_bytes"]), _mb(figures["total_gzip_bytes"])])
    report.table("what a client fetches", ["file", "MB", "MB, gzip"], sizes)


def _mb(size: int) -> str:
    return f"{size / 1e6:.3f}"
