"""A released version as a folder that ranks in a browser.

manifest.json            what the folder is, and size and SHA-256 of every other file
rank.onnx                histories and candidates in, scores out; tables cut and narrowed (`tables`)
vocabulary.bin           ids to rows (`vocabulary_file`)
tailrace-edge.js         reads all of this: `Ranker.load(url)`, `ranker.rank(history, candidates)`
index.html               a page that shows it
ort.*.mjs, ort-*.wasm    ONNX Runtime (`onnxruntime_web`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from compression.releases.registry import Artefact, FileEntry
from features.encoding import Vocabulary
from inference.engines.model_file import check_graph, read_graph
from inference.settings import InferenceSettings
from infra.export import onnxruntime_web, vocabulary_file
from infra.export.folder import MANIFEST, ExportFailed, check_free, entries, write_folder
from infra.export.parity import Run, rank_inputs, reference
from infra.export.tables import Numbers, keep_rows, narrow
from infra.export.vocabulary_file import VocabularyEntry
from topics.messages import BEHAVIORS

GRAPH: Final = "rank.onnx"
# What scores may differ by from the server's. Half of it is for the tables; a browser sums in another
# order, and has the rest.
TOLERANCE: Final = 1e-3
TABLES_TOLERANCE: Final = TOLERANCE / 2
SMALLEST_FIRST: Final[tuple[Numbers, ...]] = ("int8", "int16", "f32")

_OURS: Final = Path(__file__).parent / "browser"

Int64 = npt.NDArray[np.int64]


class RuntimeEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = onnxruntime_web.PACKAGE
    version: str = onnxruntime_web.VERSION
    loader: str = onnxruntime_web.LOADER
    wasm: str = onnxruntime_web.WASM


class EdgeManifest(BaseModel):
    """What the folder holds. `max_difference` is that of scores, from ONNX Runtime on the published graph."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    version: str
    released_manifest_sha256: str
    graph: str = GRAPH
    max_history: int
    history_hop: int = 0
    """By how many events a full history may start later (`features.anchor`)."""
    behaviors: tuple[str, ...] = BEHAVIORS
    numbers: Numbers
    items: int
    max_difference: float
    vocabulary: VocabularyEntry
    runtime: RuntimeEntry = RuntimeEntry()
    files: dict[str, FileEntry] = {}

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1, by_alias=True).encode()


def export(
    artefact: Artefact, out: Path, *, items: Int64 | None = None, numbers: Numbers | None = None
) -> EdgeManifest:
    """Write the folder `out`, whole or not at all.

    `items` are the ids the client will know, None for all of the version's; the others have the rows of hash
    buckets, as items that the server does not know. `numbers` None takes the smallest that keeps scores
    within `TABLES_TOLERANCE`. Raises `ExportFailed`, `ArtefactInvalid`, `ModelUnavailable`, `RuntimeMissing`.
    """
    check_free(out)
    published = read_graph(artefact, "rank")
    vocabulary = artefact.vocabulary()
    places = _places(vocabulary, items)
    kept = vocabulary_file.with_items(vocabulary, places)
    rows = _rows(vocabulary, places)
    content = published if items is None else keep_rows(published, rows)
    longest = artefact.manifest.model.max_history
    graph, numbers, difference = _narrowed(content, numbers, reference(published), kept, rows, longest)
    check_graph(graph, "rank", artefact.manifest.model)
    words, described = vocabulary_file.write(kept)
    contents = {
        GRAPH: graph,
        described.file: words,
        **{path.name: path.read_bytes() for path in sorted(_OURS.iterdir())},
        **onnxruntime_web.runtime_files(),
    }
    manifest = EdgeManifest(
        version=artefact.version,
        released_manifest_sha256=artefact.manifest_sha256,
        max_history=longest,
        history_hop=InferenceSettings().hop_of(artefact.manifest, longest),
        numbers=numbers,
        items=len(kept.item_ids),
        max_difference=difference,
        vocabulary=described,
        files=entries(contents),
    )
    write_folder(out, {**contents, MANIFEST: manifest.to_bytes()})
    return manifest


def _places(vocabulary: Vocabulary, items: Int64 | None) -> Int64:
    if items is None:
        return np.arange(len(vocabulary.item_ids))
    known = np.unique(items[vocabulary.is_known(items)])
    if not len(known):
        raise ExportFailed("the version knows none of these items: is --log the log it was trained on?")
    return np.searchsorted(vocabulary.item_ids, known)


def _rows(vocabulary: Vocabulary, places: Int64) -> Int64:
    """The row of the published table for each row of the cut one: padding, kept items, all buckets."""
    buckets = np.arange(1 + len(vocabulary.item_ids), vocabulary.item_rows)
    return np.concatenate([np.zeros(1, np.int64), 1 + places, buckets])


def _narrowed(
    content: bytes, numbers: Numbers | None, published: Run, kept: Vocabulary, rows: Int64, longest: int
) -> tuple[bytes, Numbers, float]:
    """The graph in the numbers asked for, else in the first that will do; and its largest difference."""
    asked: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    for inputs in rank_inputs(kept, longest):
        full = {name: rows[inputs[name]].astype(np.int32) for name in ("items", "candidates")}
        asked.append((inputs, published({**inputs, **full})["scores"]))
    tried = (numbers,) if numbers else SMALLEST_FIRST
    for choice in tried:
        graph = narrow(content, choice)
        run = reference(graph)
        difference = max(float(np.abs(run(inputs)["scores"] - scores).max()) for inputs, scores in asked)
        if numbers or difference <= TABLES_TOLERANCE:
            return graph, choice, difference
    raise ExportFailed(f"the cut graph differs from the published one by {difference:.1e}")
