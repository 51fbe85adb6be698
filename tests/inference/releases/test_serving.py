"""Versions side by side: who answers whom, how one takes over, and what goes wrong without being noticed."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry

from inference.errors import InvalidRequest, ModelNotFound, ModelUnavailable, Overloaded
from inference.releases.metrics import ReleaseMetrics
from inference.releases.serving import ServingModel
from inference.releases.settings import ReleaseRules
from inference.types import RankedList
from tests.inference.releases.planes import FakePlane, registry_of, request
from tests.support import eventually_async

USERS = range(400)


class Worker:
    """A serving model on a registry of three versions, v1 serving."""

    def __init__(self, folder, **rules) -> None:
        self.registry = registry_of(folder, "v1", "v2", "v3", "v4")
        self.registry.promote("v1")
        self.plane = FakePlane()
        self.counts = CollectorRegistry()
        self._metrics = ReleaseMetrics(self.counts)
        self._rules = ReleaseRules(self.registry.root, **{"check_requests": 8, **rules})
        self.served: list[str] = []
        self._start()

    def restart(self) -> None:
        self.plane = FakePlane()
        self._start()

    def _start(self) -> None:
        self.model = ServingModel(
            self.plane, self._rules, self._metrics, switched=lambda held: self.served.append(held.version)
        )

    async def load(self, *told) -> bool:
        changed = await self.model.load(*told)
        await self.model.settled()
        return changed

    async def versions(self, users=USERS) -> dict[int, str]:
        """Which version answers which user."""
        answers = await self.model.rank([request(user) for user in users])
        assert all(isinstance(answer, RankedList) for answer in answers), answers
        return {user: answer.model_version for user, answer in zip(users, answers, strict=True)}

    def count(self, name: str, **labels: str) -> float:
        return self.counts.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def worker(tmp_path):
    found = Worker(tmp_path)
    await found.load()
    await found.versions()
    return found


async def test_a_canary_ranks_for_its_share_and_always_for_the_same_users(worker):
    worker.registry.canary("v2", 25)
    assert await worker.load("v2")
    arms = await worker.versions()
    counts = Counter(arms.values())
    assert counts.total() == len(USERS)
    assert 0.15 < counts["v2"] / len(USERS) < 0.35
    assert await worker.versions(list(reversed(USERS))) == arms
    for user in list(USERS)[:50]:
        assert (await worker.versions([user]))[user] == arms[user]
    worker.restart()
    await worker.load()
    assert await worker.versions() == arms
    assert worker.count("tailrace_release_lists_total", version="v2", arm="canary") >= counts["v2"]


async def test_answers_stay_in_the_order_of_their_requests(worker):
    worker.registry.canary("v2", 50)
    await worker.load("v2")
    answers = await worker.model.rank([request(user, k=user % 7 + 1) for user in USERS])
    assert [len(answer.items) for answer in answers] == [user % 7 + 1 for user in USERS]


async def test_promote_and_rollback_switch_all_users_and_keep_the_one_before_warm(worker):
    worker.registry.canary("v2", 50)
    await worker.load("v2")
    worker.registry.promote("v2")
    await worker.load("v2")
    assert set((await worker.versions()).values()) == {"v2"}
    assert (worker.plane.opens, sorted(worker.plane.opened)) == (2, ["v1", "v2"])
    worker.registry.rollback()
    await worker.load("v1")
    assert set((await worker.versions()).values()) == {"v1"}
    assert worker.plane.opens == 2
    assert worker.plane.retired == ["v2"]


async def test_a_version_two_steps_back_is_freed(worker):
    for version in ("v2", "v3"):
        worker.registry.promote(version)
        await worker.load(version)
    assert sorted(worker.plane.opened) == ["v2", "v3"]
    assert worker.count("tailrace_release_lists_total", version="v1", arm="serving") == 0


async def test_without_keep_previous_only_what_serves_is_open(tmp_path):
    worker = Worker(tmp_path, keep_previous=False)
    await worker.load()
    worker.registry.promote("v2")
    await worker.load("v2")
    assert list(worker.plane.opened) == ["v2"]


async def test_a_restarted_worker_has_the_split_and_the_version_to_go_back_to(worker):
    worker.registry.promote("v2")
    worker.registry.canary("v3", 50)
    worker.restart()
    await worker.load()
    assert set((await worker.versions()).values()) == {"v2", "v3"}
    assert sorted(worker.plane.opened) == ["v1", "v2", "v3"]


async def test_what_was_accepted_before_a_switch_is_answered_by_the_version_that_took_it(worker):
    worker.registry.canary("v3", 50)
    await worker.load("v3")
    worker.plane.hold = asyncio.Event()
    asking = asyncio.ensure_future(worker.model.rank([request(user) for user in USERS]))
    await asyncio.sleep(0)
    worker.registry.promote("v2")
    worker.registry.retire("v3")
    switching = asyncio.ensure_future(worker.load("v2"))
    await eventually_async(lambda: worker.model.version == "v2")
    assert worker.plane.retired == []
    worker.plane.hold.set()
    assert {answer.model_version for answer in await asking} == {"v1", "v3"}
    await switching
    assert worker.plane.retired == ["v3"]


@pytest.mark.parametrize("trouble", ["broken", "short", "nan", "missing"])
@pytest.mark.parametrize("stage", ["promote", "canary"])
async def test_a_version_that_is_not_well_answers_nobody(worker, trouble, stage, caplog):
    getattr(worker.plane, trouble).add("v2")
    if stage == "promote":
        worker.registry.promote("v2")
    else:
        worker.registry.canary("v2", 50)
    assert not await worker.load("v2")
    assert set((await worker.versions()).values()) == {"v1"}
    assert "v2" not in worker.plane.opened
    label = "serving" if stage == "promote" else "canary"
    assert worker.count("tailrace_releases_refused_total", stage=label) == 1
    assert "v2" in caplog.text
    assert label in worker.model.describe()["refused"]


async def test_a_version_whose_lists_are_only_different_is_taken(worker):
    worker.registry.promote("v2")
    assert await worker.load("v2")
    check = worker.model.describe()["last_check"]
    assert (check["version"], check["failed"], check["short"]) == ("v2", 0, 0)
    assert check["compared"] == len(worker.plane.opened["v2"].rehearsed) > 0
    assert all(asked.priority == "low" for asked in worker.plane.opened["v2"].rehearsed)


async def test_a_version_that_cannot_be_opened_at_the_start_leaves_the_one_before_serving(worker):
    worker.registry.promote("v2")
    worker.restart()
    worker.plane.missing.add("v2")
    await worker.load()
    assert set((await worker.versions()).values()) == {"v1"}


async def test_a_canary_that_falls_over_is_answered_for_and_then_left_out(worker):
    worker.registry.canary("v2", 50)
    await worker.load("v2")
    worker.plane.broken.add("v2")
    assert set((await worker.versions()).values()) == {"v1"}
    await worker.model.settled()
    assert "v2" not in worker.plane.opened
    assert worker.count("tailrace_releases_refused_total", stage="canary") == 1
    worker.plane.broken.clear()
    await worker.load("v1")
    assert set((await worker.versions()).values()) == {"v1"}
    await worker.load("v2")
    assert set((await worker.versions()).values()) == {"v1", "v2"}


async def test_one_request_that_no_version_can_answer_does_not_end_a_canary(worker):
    worker.registry.canary("v2", 100)
    await worker.load("v2")
    worker.plane.broken |= {"v1", "v2"}
    for _ in range(5):
        await worker.model.rank([request(1)])
    worker.plane.broken.clear()
    assert set((await worker.versions()).values()) == {"v2"}


async def test_a_shadow_ranks_what_was_answered_and_nobody_sees_its_lists(worker):
    worker.registry.shadow("v2", 100)
    await worker.load("v2")
    assert set((await worker.versions(range(10))).values()) == {"v1"}
    await eventually_async(lambda: worker.model.describe()["shadow"]["compared"] == 10)
    figures = worker.model.describe()["shadow"]
    assert (figures["overlap"], figures["failed"], figures["version"]) == (1.0, 0, "v2")
    assert worker.count("tailrace_shadow_requests_total", outcome="compared") == 10
    assert worker.count("tailrace_release_lists_total", version="v2", arm="shadow") == 10
    worker.registry.retire("v2")
    await worker.load("v2")
    assert worker.model.describe()["shadow"] is None
    assert worker.plane.retired == ["v2"]


async def test_a_shadow_waits_while_somebody_is_asking_and_what_is_too_much_is_dropped(worker):
    worker.registry.shadow("v2", 100)
    await worker.load("v2")
    worker.plane.hold = asyncio.Event()
    asking = asyncio.ensure_future(worker.model.rank([request(1)]))
    await asyncio.sleep(0)
    worker.model._arms.shadow.offer(*[list(pair) for pair in zip(*_answered(200), strict=True)])
    await asyncio.sleep(0.02)
    assert worker.plane.opened["v2"].asked == []
    worker.plane.hold.set()
    await asking
    await eventually_async(lambda: worker.model.describe()["shadow"]["compared"] >= 64)
    assert worker.model.describe()["shadow"]["dropped"] >= 200 - 64


async def test_a_shadow_that_fails_at_everything_is_asked_no_more(worker):
    worker.registry.shadow("v2", 100)
    await worker.load("v2")
    worker.plane.broken.add("v2")
    for _ in range(20):
        await worker.versions(range(4))
        await asyncio.sleep(0.001)
    asked = len(worker.plane.opened["v2"].asked)
    assert 12 <= asked < 60
    assert worker.model.describe()["shadow"]["failed"] == asked


async def test_a_shadow_is_checked_before_it_is_promoted(worker):
    worker.registry.shadow("v2", 100)
    await worker.load("v2")
    worker.plane.nan.add("v2")
    worker.registry.promote("v2")
    await worker.load("v2")
    assert set((await worker.versions()).values()) == {"v1"}
    assert worker.plane.retired == ["v2"]


@pytest.mark.parametrize("told", [("v2", "0" * 64), ("v9", "0" * 64), ("v1", None)])
async def test_a_forged_or_late_announcement_brings_nothing(worker, told):
    worker.registry.promote("v2")
    await worker.load("v2")
    assert not await worker.load(*told)
    assert worker.model.version == "v2"


async def test_an_announcement_with_another_checksum_changes_nothing(worker):
    worker.registry.promote("v2")
    assert not await worker.load("v2", "0" * 64)
    assert worker.model.version == "v1"
    assert await worker.load("v2", worker.registry.manifest_sha256("v2"))


async def test_an_alias_that_cannot_be_read_leaves_everything_as_it_is(worker):
    (worker.registry.root / "aliases" / "serving.json").write_text("{")
    assert not await worker.load("v2")
    assert worker.model.version == "v1"
    assert worker.count("tailrace_releases_refused_total", stage="announcement") == 1


async def test_a_change_that_nobody_announces_is_noticed(worker):
    watching = asyncio.ensure_future(worker.model.watch(0.001, worker.model.load))
    opens = worker.plane.opens
    await asyncio.sleep(0.02)
    assert worker.plane.opens == opens
    worker.registry.promote("v2")
    await eventually_async(lambda: worker.model.version == "v2")
    worker.registry.canary("v3", 50)
    await eventually_async(lambda: worker.model.describe()["canary"])
    worker.registry.rollback()
    await eventually_async(lambda: worker.model.version == "v1")
    assert worker.served == ["v1", "v2", "v1"]
    watching.cancel()


async def test_the_first_version_of_all_is_noticed(tmp_path):
    worker = Worker(tmp_path)
    alias = worker.registry.root / "aliases" / "serving.json"
    body = alias.read_bytes()
    alias.unlink()
    assert not await worker.load()
    assert not await worker.model.moved()
    alias.write_bytes(body)
    assert await worker.model.moved()
    await worker.load()
    assert worker.model.version == "v1"
    assert not await worker.model.moved()


async def test_what_was_refused_or_cannot_be_read_is_tried_once_for_each_change(worker):
    worker.plane.missing.add("v2")
    worker.registry.promote("v2")
    assert await worker.model.moved()
    await worker.load()
    assert not await worker.model.moved()
    alias = worker.registry.root / "aliases" / "serving.json"
    alias.write_text("{")
    assert await worker.model.moved()
    await worker.load()
    assert not await worker.model.moved()
    assert worker.model.version == "v1"


async def test_a_canary_that_was_given_up_is_tried_again_when_its_share_is_set_anew(worker):
    worker.registry.canary("v2", 50)
    await worker.load()
    worker.plane.broken.add("v2")
    await worker.versions()
    worker.plane.broken.clear()
    worker.registry.shadow("v3", 10)
    await worker.load()
    assert set((await worker.versions()).values()) == {"v1"}
    worker.registry.canary("v2", 60)
    await worker.load()
    assert set((await worker.versions()).values()) == {"v1", "v2"}


async def test_whose_request_is_not_known_gets_the_version_that_serves(worker):
    worker.registry.canary("v2", 100)
    await worker.load()
    answers = await worker.model.rank([request(user) for user in USERS], by_user=False)
    assert {answer.model_version for answer in answers} == {"v1"}


async def test_what_serves_by_hand_does_so_until_the_alias_moves(worker):
    assert await worker.model.serve("v2") == "v2"
    await worker.model.settled()
    assert set((await worker.versions()).values()) == {"v2"}
    assert sorted(worker.plane.opened) == ["v1", "v2"]
    assert not await worker.model.moved()
    assert await worker.model.serve("serving") == "v1"
    worker.registry.promote("v3")
    assert await worker.model.moved()
    await worker.load()
    assert worker.model.version == "v3"


@pytest.mark.parametrize("trouble", ["broken", "missing"])
async def test_what_cannot_serve_by_hand_leaves_the_canary_too(worker, trouble):
    worker.registry.canary("v3", 50)
    await worker.load()
    getattr(worker.plane, trouble).add("v2")
    with pytest.raises(ModelUnavailable, match="v2"):
        await worker.model.serve("v2")
    await worker.model.settled()
    assert set((await worker.versions()).values()) == {"v1", "v3"}
    assert sorted(worker.plane.opened) == ["v1", "v3"]


async def test_a_version_opened_by_hand_answers_nobody_and_stays_until_it_is_let_go(worker):
    with pytest.raises(ModelUnavailable, match="checksum"):
        await worker.model.pin("v2", "0" * 64)
    assert await worker.model.pin("v2") == "v2"
    worker.registry.promote("v3")
    await worker.load()
    assert set((await worker.versions()).values()) == {"v3"}
    assert sorted(worker.plane.opened) == ["v1", "v2", "v3"]
    assert await worker.model.pin("v1", most=3) == "v1"
    with pytest.raises(Overloaded, match="3 versions"):
        await worker.model.pin("v4", most=3)
    await worker.model.unpin("v2")
    assert worker.plane.retired == ["v2"]
    for version, kind in (("v3", InvalidRequest), ("v2", ModelNotFound)):
        with pytest.raises(kind, match=version):
            await worker.model.unpin(version)
    await worker.model.unpin("v1")
    assert list(worker.plane.opened) == ["v3"]


async def test_a_name_that_is_announced_is_escaped_in_the_log(worker, caplog):
    with caplog.at_level("INFO"):
        await worker.load("v9\nForged line")
    assert r"'v9\nForged line' was announced; alias 'serving' stands for v1 by now" in caplog.text


async def test_closing_frees_all(worker):
    worker.registry.shadow("v2", 100)
    await worker.load("v2")
    await worker.versions()
    await worker.model.close()
    assert worker.plane.closed
    (answer,) = await worker.model.rank([request(1)])
    assert "no model" in str(answer)


def _answered(count):
    return [
        (request(user), RankedList([0, 1, 2], [1.0, 0.5, 0.3], ["retrieval"] * 3, "v1", "fake"))
        for user in range(count)
    ]
