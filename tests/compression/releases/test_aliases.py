"""Who serves and who is tried: what each change leaves behind, and that a file brings it back."""

import json
import multiprocessing

import pytest

from compression.errors import ReleaseRefused
from compression.releases.registry import ArtefactInvalid, Registry
from tests.compression.versions import registry_of


@pytest.fixture
def registry(tmp_path):
    ours = registry_of(tmp_path, "v1", "v2", "v3")
    ours.promote("v1")
    return ours


def stages(registry):
    return Registry(registry.root).state().stages()


def test_a_trial_is_read_back_by_the_next_reader(registry):
    registry.canary("v2", 5.25)
    registry.shadow("v3", 10)
    state = Registry(registry.root).state()
    assert stages(registry) == {"v1": "serving", "v2": "canary", "v3": "shadow"}
    assert (state.canary.percent, state.shadow.percent) == (5.25, 10.0)
    assert state.canary.manifest_sha256 == registry.manifest_sha256("v2")


def test_a_canary_that_is_promoted_serves_and_the_one_before_is_kept(registry):
    registry.canary("v2", 50)
    registry.promote("v2")
    assert stages(registry) == {"v2": "serving", "v1": "previous"}
    registry.promote("v2")
    assert stages(registry) == {"v2": "serving", "v1": "previous"}


def test_a_promotion_beside_a_trial_lets_the_trial_go_on(registry):
    registry.canary("v2", 50)
    registry.promote("v3")
    assert stages(registry) == {"v3": "serving", "v1": "previous", "v2": "canary"}


def test_a_rollback_goes_one_step_back_and_ends_the_canary(registry):
    registry.promote("v2")
    registry.canary("v3", 50)
    registry.rollback()
    assert stages(registry) == {"v1": "serving"}
    with pytest.raises(ReleaseRefused, match="no version before"):
        registry.rollback()


def test_a_version_moves_between_trials_and_out_of_them(registry):
    registry.shadow("v2", 1)
    registry.canary("v2", 1)
    assert stages(registry) == {"v1": "serving", "v2": "canary"}
    registry.canary("v3", 2)
    assert stages(registry) == {"v1": "serving", "v3": "canary"}
    registry.retire("v3")
    assert stages(registry) == {"v1": "serving"}
    with pytest.raises(ReleaseRefused, match="neither canary nor shadow"):
        registry.retire("v3")


def test_the_version_that_serves_cannot_be_tried(registry):
    with pytest.raises(ReleaseRefused, match="serves already"):
        registry.canary("v1", 5)
    with pytest.raises(ReleaseRefused, match="serves already"):
        registry.shadow("v1", 5)


@pytest.mark.parametrize("percent", [0, -1, 100.01, 0.005, 3.333, float("nan"), float("inf")])
def test_a_share_is_a_hundredth_of_a_percent_to_all(registry, percent):
    with pytest.raises(ReleaseRefused, match="percent"):
        registry.canary("v2", percent)


def test_a_version_that_is_not_there_is_refused_and_changes_nothing(registry):
    for change in (registry.promote, lambda v: registry.canary(v, 5), lambda v: registry.shadow(v, 5)):
        with pytest.raises(ArtefactInvalid, match="v9"):
            change("v9")
    assert stages(registry) == {"v1": "serving"}


def test_a_trial_needs_somebody_who_serves(tmp_path):
    ours = registry_of(tmp_path, "v1")
    with pytest.raises(ReleaseRefused, match="promote VERSION"):
        ours.canary("v1", 5)
    assert ours.state() is None


def test_an_alias_file_from_before_there_were_trials_is_read(registry):
    path = registry.root / "aliases" / "serving.json"
    path.write_text(json.dumps({"version": "v1", "manifest_sha256": registry.manifest_sha256("v1")}))
    assert stages(registry) == {"v1": "serving"}
    registry.canary("v2", 5)
    fields = json.loads(path.read_text())
    assert (fields["version"], fields["manifest_sha256"]) == ("v1", registry.manifest_sha256("v1"))


def test_a_trial_in_the_file_cannot_point_outside(registry):
    registry.canary("v2", 5)
    path = registry.root / "aliases" / "serving.json"
    fields = json.loads(path.read_text())
    fields["canary"]["version"] = "../../elsewhere"
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtefactInvalid, match="not a version"):
        registry.state()


def _shadow(root, version):
    for _ in range(20):
        Registry(root).canary(version, 5)
        Registry(root).shadow("v3", 5)


def test_two_commands_at_once_lose_no_change_of_each_other(registry):
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_shadow, args=(registry.root, "v2")) for _ in range(2)]
    for other in others:
        other.start()
    for _ in range(20):
        registry.promote("v1")
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0]
    assert stages(registry) == {"v1": "serving", "v2": "canary", "v3": "shadow"}
