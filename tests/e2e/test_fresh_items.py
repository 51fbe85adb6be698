"""An item newer than the model gets into the lists of those whose last click it often follows."""

from __future__ import annotations

import shutil

from compression.releases.registry import MANIFEST, Registry
from features.fusion import Fusion
from tests.e2e.test_click_changes_ranking import Shop, click
from tests.support import eventually

CLICKED, FRESH = 5, 7_654_321
FUSION = Fusion(transition=32.0, recent=1.0)


def test_an_item_newer_than_the_model_leads_the_list_after_some_clicks_without_a_retraining(
    parts, registry, start_worker, tmp_path
):
    fused = _with_fusion(registry, tmp_path / "models")
    options = ["--registry", str(fused)]
    worker = start_worker(environment={"FEATURES_STATISTICS_FRESH_MS": "100"}, options=options)
    version = worker.readiness()["model"]
    with Shop(parts) as shop:
        before = shop.answer(click(1, CLICKED))
        for user in range(2, 14):
            shop.answer(click(user, CLICKED))
            shop.answer(click(user, FRESH))
        users = iter(range(100, 200))
        # What was counted is written twice a second, and read with a click.
        after = eventually(lambda: _leads(shop.answer(click(next(users), CLICKED))), 30)
    assert FRESH not in [item.item_id for item in before.items]
    assert after.degraded is None
    assert after.model_version == version == worker.readiness()["model"]
    assert after.items[0].source == "transition"
    assert after.items == sorted(after.items, key=lambda item: -item.score)


def _leads(answer):
    return answer if answer.items and answer.items[0].item_id == FRESH else None


def _with_fusion(registry, root):
    """The run's version once more, with these weights instead of those that were chosen."""
    artefact = Registry(registry).open()
    staging = root.parent / "staging"
    shutil.copytree(artefact.path, staging)
    for file in (MANIFEST, "manifest.sig"):
        (staging / file).unlink(missing_ok=True)
    copied = Registry(root)
    copied.publish(staging, artefact.manifest.model_copy(update={"fusion": FUSION}))
    copied.promote(artefact.version)
    return root
