"""One tiny released version, and statistics with something popular in them."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compression.releases.registry import ITEM_TABLE, VOCABULARY, Artefact, Manifest, ModelShape, Registry
from features.encoding import Vocabulary
from features.memory_store import MemoryStore
from features.statistics import ItemStatistics
from features.store import Append

ITEMS = np.arange(1_000, 1_300, dtype=np.int64) * 7
CATEGORIES = np.arange(50, 60, dtype=np.int64)
MAX_HISTORY = 70
NOW_S = 1_700_000_000


def vocabulary() -> Vocabulary:
    places = np.arange(len(ITEMS)) % len(CATEGORIES)
    return Vocabulary(ITEMS, (places + 1).astype(np.int32), CATEGORIES, 16, 4)


def publish(root: Path, version: str, *, seed: int = 5) -> None:
    """A version with random weights."""
    torch = pytest.importorskip("torch", reason="the artefact of these tests is exported from torch")
    from safetensors.torch import save_file

    from compression.training.export import export
    from compression.training.model import Recommender

    words = vocabulary()
    shape = ModelShape(
        dim=16,
        layers=2,
        heads=1,
        ffn=32,
        max_history=MAX_HISTORY,
        item_rows=words.item_rows,
        category_rows=words.category_rows,
    )
    torch.manual_seed(seed)
    network = Recommender(shape)
    with torch.no_grad():
        network.no_history.normal_()
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        graphs = export(network, staging)
        save_file(dict(network.state_dict()), str(staging / "weights.safetensors"))
        words.save(staging / VOCABULARY)
        table = network.items.weight.detach().numpy().copy()
        table[1 : 1 + len(ITEMS)] += network.categories.weight.detach().numpy()[words.item_categories]
        np.save(staging / ITEM_TABLE, table)
        registry = Registry(root)
        registry.publish(
            staging, Manifest(version=version, created_at="2026-01-01T00:00:00Z", model=shape, graphs=graphs)
        )
    registry.promote(version)


@pytest.fixture(scope="session")
def registry(pytestconfig: pytest.Config) -> Registry:
    """Exporting takes many seconds, so it is done once for each state of the code that decides it."""
    import compression

    code = [Path(__file__), *sorted(Path(compression.__path__[0]).glob("*.py"))]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:16]
    kept = Path(pytestconfig.cache.mkdir("released"))
    root = kept / state
    if not root.exists():
        shutil.rmtree(kept)
        kept.mkdir()
        work = Path(tempfile.mkdtemp(dir=kept))
        publish(work, "20260101T000000-test")
        work.rename(root)
    return Registry(root)


@pytest.fixture(scope="session")
def artefact(registry: Registry) -> Artefact:
    return registry.open()


def sequence(items: Sequence[int], *, behavior: int = 0) -> bytes | None:
    """The packed sequence of a user who viewed these items, a minute apart."""
    if not items:
        return None
    appends = [
        Append(1, item, 50 + item // 7 % 10, behavior, NOW_S + 60 * place, 1, 0, place)
        for place, item in enumerate(items)
    ]
    appended, _ = asyncio.run(MemoryStore().append(appends))
    return appended[-1].sequence


@pytest.fixture
def statistics() -> ItemStatistics:
    """Twenty popular items: the first 20 of the catalogue, the first most."""
    store = MemoryStore()
    kept = ItemStatistics(store)

    async def fill() -> None:
        appends = [
            Append(user, int(ITEMS[place]), 50 + place % 10, 0, NOW_S, 1, 0, 100 * place + user)
            for place in range(20)
            for user in range(20 - place)
        ]
        appended, _ = await store.append(appends)
        kept.observe(appends, appended)
        await kept.flush()
        await kept.refresh()

    asyncio.run(fill())
    return kept
