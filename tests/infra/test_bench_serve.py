"""The comparison of servers: fair load, honest latencies, and no figures of an arm that answers wrongly."""

from __future__ import annotations

import asyncio
import base64
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from aiohttp import web

from compression.releases.registry import Registry
from features.anchor import from_anchors
from features.encoding import encode_histories
from features.sequence import unpack
from inference.buckets import HISTORIES
from inference.engines.base import TOLERANCE
from inference.settings import InferenceSettings
from infra.bench.serve import measure, payload
from infra.bench.serve.arms import Arm, NoServer, OurServer, Served, spawn_server
from infra.bench.serve.arrivals import BURST_S, bursty
from infra.bench.serve.driver import Done, Offer, summary
from infra.bench.serve.grpc_client import CONNECTIONS, GrpcSender
from infra.bench.serve.http_client import HttpSender
from infra.bench.serve.parity import difference, expected_scores
from infra.bench.serve.running import ArmFailed, running
from infra.bench.serve.search import GOAL_MS, Search, Step, place_of, rate
from infra.bench.serve.sessions import Events, Sessions
from infra.bench.serve.shape import CANDIDATES, HISTORY, ROW, row_ints
from infra.bench.serve.venvs import CannotInstall, ensure
from infra.local.server import HOST, free_port, free_ports
from tests.support import eventually

# Arrivals ----------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_schedule() -> None:
    first, again = bursty(700, 3, seed=4), bursty(700, 3, seed=4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, bursty(700, 3, seed=5)[: len(first)])


def test_the_rate_is_kept_and_arrivals_are_uneven() -> None:
    due_s = bursty(1_000, 60, seed=1)
    assert len(due_s) == pytest.approx(60_000, rel=0.02)
    assert (np.diff(due_s) >= 0).all()
    assert due_s[0] >= 0
    assert due_s[-1] <= 60
    counts = np.histogram(due_s, bins=np.arange(0, 60, BURST_S))[0]
    # Poisson arrivals would have a variance like their mean.
    assert counts.var() > 3 * counts.mean()


# Search ------------------------------------------------------------------------------------------


def step(lists_per_s: float, p99_ms: float) -> Step:
    return Step(lists_per_s, lists_per_s, 100, 0, 1.0, p99_ms, 0.0)


@dataclass
class Server:
    """Keeps up with so many lists a second and with no more."""

    capacity: float
    asked: int = 0

    def offer(self, place: int) -> Step:
        self.asked += 1
        return step(rate(place), 20.0 if rate(place) <= self.capacity else float("inf"))


def highest(offer: Callable[[int], Step], *, start: int, stride: int) -> tuple[int, Step] | None:
    search = Search(start=start, stride=stride)
    while search.place is not None:
        search.take(offer(search.place))
    return search.found


@pytest.mark.parametrize("capacity", [21, 180, 3_000, 9_000])
@pytest.mark.parametrize(("start", "stride"), [(0, 1), (40, 8), (80, 1), (60, 3)])
def test_the_highest_rate_is_found_from_wherever_the_search_starts(
    capacity: float, start: int, stride: int
) -> None:
    server = Server(capacity)
    found = highest(server.offer, start=start, stride=stride)
    assert found is not None
    place, best = found
    assert place == place_of(capacity)
    assert best.lists_per_s <= capacity < rate(place + 1)


def test_a_search_that_starts_where_it_ended_tries_two_rates() -> None:
    server = Server(3_000)
    highest(server.offer, start=place_of(3_000), stride=1)
    assert server.asked == 1 + 3


def test_a_server_that_never_keeps_up_has_no_rate() -> None:
    assert highest(Server(1).offer, start=40, stride=8) is None


def test_a_rate_fails_when_it_has_failed_three_times() -> None:
    taken: list[int] = []

    def offer(place: int) -> Step:
        taken.append(place)
        hiccup = place == 10 and taken.count(10) < 3
        return step(rate(place), 2 * GOAL_MS if hiccup else 20.0 if place <= 10 else float("inf"))

    found = highest(offer, start=10, stride=1)
    assert found is not None
    assert found[0] == 10
    assert taken == [10, 10, 10, 11, 11, 11]


class Wavering:
    """A machine whose speed goes up and down fivefold, slowly beside a step, and arms that share it."""

    def __init__(self) -> None:
        self.stepped: list[str] = []
        self.up: set[str] = set()

    @contextmanager
    def running(self, arm: Arm, *_: Any, workers: int, **__: Any) -> Iterator[Any]:
        capacity = 2_000.0 * workers * (2.0 if arm.name == "tailrace" else 1.0)
        if arm.name == "litserve" and len(self.stepped) > 40:
            raise ArmFailed("ended with 1")
        step = partial(self.step, arm.name, capacity)
        yield SimpleNamespace(
            difference=0.0,
            step=step,
            pause=partial(self.up.discard, arm.name),
            resume=partial(self.up.add, arm.name),
        )

    def step(self, name: str, capacity: float, lists_per_s: float, **_: Any) -> Step:
        assert self.up <= {name}, "the others are paused"
        self.stepped.append(name)
        speed = 0.6 + 0.4 * np.sin(len(self.stepped) / 40)
        kept_up = lists_per_s <= capacity * speed
        return step(lists_per_s, 20.0 if kept_up else float("inf"))


def test_arms_climb_side_by_side_so_that_a_slow_minute_is_one_for_all(
    monkeypatch: pytest.MonkeyPatch, sessions: Sessions
) -> None:
    machine, names = Wavering(), ["tailrace", "mosec", "litserve"]
    monkeypatch.setattr(measure, "running", machine.running)
    arms = [NoServer(name) for name in names]
    plan = measure.Plan(Path("none"), sessions, "none", rounds=9, seconds=1.0, seed=1)
    said: list[str] = []
    outcomes = measure.run(plan, arms, said.append)
    assert machine.stepped[:12] == names * 4
    assert "litserve, 16 per request: ended with 1" in said
    kept = [one for one in outcomes if not one.failure]
    assert [one.workers for one in kept] == [2] * len(kept)
    assert max(kept[0].goodputs) > 1.5 * min(kept[0].goodputs)
    for name in ("gRPC, 1 list, over mosec", "gRPC, 16 lists, over all"):
        assert measure.ratios(outcomes)[name].ratio == pytest.approx(2.0, rel=0.1)
        assert measure.ratios(outcomes)[name].over == "mosec"


# Latency -----------------------------------------------------------------------------------------


def test_a_request_without_an_answer_counts_as_late() -> None:
    latency_s = np.array([0.01] * 95 + [np.inf] * 5)
    found = summary(latency_s, np.zeros(100), seconds=1.0, lists=16)
    assert found["failed"] == 5
    assert found["p99_ms"] == np.inf
    assert found["goodput"] == 95 * 16
    assert found["lists_per_s"] == 100 * 16


class Stalling:
    """Answers nothing until it has five requests, then everything at once."""

    def __init__(self) -> None:
        self._held: list[Done] = []
        self.was_reset = False

    def send(self, number: int, done: Done) -> None:
        self._held.append(done)
        if number >= 4:
            held, self._held = self._held, []
            for one in held:
                one(b"answer")

    async def ready(self) -> None: ...

    async def reset(self) -> None:
        self.was_reset = True

    def close(self) -> None: ...


async def test_latency_counts_from_when_a_request_was_due() -> None:
    due_s = np.array([0.0, 0.01, 0.02, 0.03, 0.1])
    latency_s, behind_s = await Offer(Stalling(), due_s).run()
    # The stall ends with the fifth request, whichever of the others waited for it.
    assert latency_s[:4] == pytest.approx(due_s[4] - due_s[:4], abs=0.03)
    assert (np.diff(latency_s[:4]) < 0).all()
    assert len(behind_s) == 5


async def test_a_hopeless_step_is_ended_and_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.bench.serve.driver.GIVE_UP_S", 0.05)
    monkeypatch.setattr("infra.bench.serve.driver.DRAIN_S", 0.05)
    sender = Stalling()
    latency_s, behind_s = await Offer(sender, np.array([0.0, 0.01, 0.08, 0.09, 60.0])).run()
    assert np.isinf(latency_s).all()
    assert len(behind_s) < 5
    assert sender.was_reset


# Clients -----------------------------------------------------------------------------------------


async def ask_all(send: Callable[[int, Done], None], count: int) -> list[bytes | None]:
    answers: list[bytes | None] = [b"none came"] * count
    over, left = asyncio.get_running_loop().create_future(), count

    def taker(number: int) -> Done:
        def take(answer: bytes | None) -> None:
            nonlocal left
            answers[number] = answer
            left -= 1
            if not left:
                over.set_result(None)

        return take

    for number in range(count):
        send(number, taker(number))
    await asyncio.wait_for(over, 20)
    return answers


@asynccontextmanager
async def http_server(answer: Callable[[bytes], web.StreamResponse]) -> AsyncIterator[int]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return answer(await request.read())

    app = web.Application()
    app.router.add_post("/rank", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, HOST, port).start()
    try:
        yield port
    finally:
        await runner.cleanup()


async def test_http_answers_come_back_to_their_requests() -> None:
    bodies = [bytes([number]) * (1 + 9_000 * number) for number in range(20)]
    async with http_server(lambda body: web.Response(body=body)) as port:
        sender = HttpSender(HOST, port, "/rank", bodies, "application/octet-stream")
        for _ in range(2):  # on new connections, then on kept ones
            answers = await ask_all(sender.send, 100)
            assert answers == [bodies[number % 20] for number in range(100)]
        sender.close()


async def test_http_errors_are_no_answers() -> None:
    async with http_server(lambda _: web.Response(status=503, body=b"busy")) as port:
        sender = HttpSender(HOST, port, "/rank", [b"body"], "application/octet-stream")
        assert await ask_all(sender.send, 3) == [None] * 3
        sender.close()
    # Nobody listens any more.
    gone = HttpSender(HOST, port, "/rank", [b"body"], "application/octet-stream")
    assert await ask_all(gone.send, 3) == [None] * 3


@asynccontextmanager
async def grpc_server(answer: Callable[[bytes, Any], Any], port: int = 0) -> AsyncIterator[int]:
    handler = grpc.method_handlers_generic_handler(
        "echo", {"Echo": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def test_grpc_answers_come_back_to_their_calls_beyond_frames_and_windows() -> None:
    # A frame holds 16 KiB and a window at first 64 KiB.
    messages = [bytes([number]) * (1 + 30_000 * number) for number in range(10)]

    async def echo(message: bytes, _: Any) -> bytes:
        return message

    async with grpc_server(echo) as port:
        sender = GrpcSender(HOST, port, "/echo/Echo", messages)
        await sender.connect()
        answers = await ask_all(sender.send, 120)
        connections = 8
        for number, answer in enumerate(answers):
            assert answer == messages[number % 10], number
        assert len(answers) > 10 * connections
        sender.close()


async def test_a_grpc_call_that_fails_has_no_answer() -> None:
    async def refuse(_: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
        return b""

    async with grpc_server(refuse) as port:
        sender = GrpcSender(HOST, port, "/echo/Echo", [b"message"])
        await sender.connect()
        assert await ask_all(sender.send, 3) == [None] * 3
        hung = GrpcSender(HOST, port, "/echo/Other", [b"message"])
        await hung.connect()
        assert await ask_all(hung.send, 3) == [None] * 3
        sender.close()
        hung.close()


async def test_connections_that_ended_between_two_steps_are_opened_anew() -> None:
    async def echo(message: bytes, _: Any) -> bytes:
        return message

    async with grpc_server(echo) as port:
        sender = GrpcSender(HOST, port, "/echo/Echo", [b"message"])
        await sender.connect()
        assert await ask_all(sender.send, CONNECTIONS) == [b"message"] * CONNECTIONS
    async with grpc_server(echo, port):
        assert await ask_all(sender.send, CONNECTIONS) == [None] * CONNECTIONS
        await sender.ready()
        assert await ask_all(sender.send, CONNECTIONS) == [b"message"] * CONNECTIONS
        sender.close()


# Arms --------------------------------------------------------------------------------------------


HOP = InferenceSettings().history_hop


@pytest.fixture(scope="module")
def sessions(registry: Path) -> Sessions:
    vocabulary = Registry(registry).open().vocabulary()
    return Sessions.drawn(
        Events.drawn(vocabulary, seed=1), vocabulary, seed=1, hop=HOP, active=200, clicks=5, times=1
    )


@pytest.fixture(scope="module")
def sessions_file(sessions: Sessions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sessions") / "sessions.npz"
    sessions.save(path)
    return path


def over_again(sessions: Sessions) -> np.ndarray:
    """Whose the lists are, asked for twice."""
    return np.concatenate([sessions.users, sessions.users + sessions.again])


def test_a_click_adds_one_event_to_its_users_history(sessions: Sessions) -> None:
    assert len(sessions) == 200 * 5
    histories = list(sessions.sequences()) * 2
    users = over_again(sessions)
    for user in np.unique(users):
        clicks = np.flatnonzero(users == user)
        assert len(clicks) == 1 or (np.diff(clicks) > 1).any()  # others come between
        for before, after in pairwise(clicks):
            old, new = (unpack([histories[at]]).items.tolist() for at in (before, after))
            assert len(new) == min(HISTORY, len(old) + 1)
            assert new[:-1] == old[len(old) + 1 - len(new) :]


def test_somebody_new_comes_at_every_turn(sessions: Sessions) -> None:
    known: set[int] = set()
    for turn in range(10):
        users = set(over_again(sessions)[200 * turn : 200 * (turn + 1)].tolist())
        assert len(users) == 200
        if turn:
            assert len(users - known) == 200 // 5
        known |= users


def test_histories_are_of_many_lengths_and_candidates_differ(sessions: Sessions) -> None:
    assert sessions.lengths.min() < 25
    assert sessions.lengths.max() == HISTORY
    assert 40 < sessions.lengths.mean() < 80
    assert all(len(set(asked)) == CANDIDATES for asked in sessions.candidates.tolist())


def test_of_those_who_have_come_for_long_every_history_is_full(registry: Path) -> None:
    vocabulary = Registry(registry).open().vocabulary()
    log = Events.drawn(vocabulary, seed=1, full=True)
    made = Sessions.drawn(log, vocabulary, seed=1, hop=HOP, active=50, clicks=5, times=1, full=True)
    assert len(made) == 50 * 5 and (made.lengths == HISTORY).all()
    assert HISTORY - HOP <= made.shown.min() < made.shown.max() <= HISTORY
    with pytest.raises(ValueError, match="nobody has 100 events"):
        Sessions.drawn(replace(log, users=np.arange(len(log.users))), vocabulary, seed=1, full=True)


def test_sessions_are_the_same_in_every_process(sessions: Sessions, sessions_file: Path) -> None:
    again = Sessions.load(sessions_file)
    for name in ("users", "lengths", "events", "candidates", "rows"):
        assert np.array_equal(getattr(sessions, name), getattr(again, name)), name


def test_users_of_a_short_log_end_their_sessions_early(registry: Path) -> None:
    vocabulary = Registry(registry).open().vocabulary()
    once = np.arange(30)
    log = Events("short", once % 20, vocabulary.item_ids[once % 3], once * 0 + 7, once % 4, 1_000 + once)
    made = Sessions.drawn(log, vocabulary, seed=1, active=40, clicks=5, times=1)
    assert made.lengths.max() == 2
    assert len(made) == 40 * 2
    assert all(len(set(asked)) == CANDIDATES for asked in made.candidates.tolist())


def test_every_arm_asks_for_the_same_lists(registry: Path, sessions: Sessions) -> None:
    """What the servers get as table rows, the in-process path gets as ids; both mean the same."""
    vocabulary = Registry(registry).open().vocabulary()
    tensors = payload.tensors(sessions.rows)
    shown = from_anchors(unpack(list(sessions.sequences())), HISTORY, HOP)
    histories = encode_histories(shown, vocabulary, HISTORY)
    for name in ("items", "categories", "behaviors", "gaps", "lengths"):
        assert np.array_equal(getattr(histories, name), tensors[name]), name
    assert np.array_equal(vocabulary.item_rows_of(sessions.candidates), tensors["candidates"])
    asked = sessions.requests(16)
    assert len(asked) == len(sessions) // 16
    assert np.array_equal(np.concatenate(asked), sessions.rows[: 16 * len(asked)])


def test_a_client_that_pads_to_a_bucket_sends_what_the_histories_fill(sessions: Sessions) -> None:
    for rows in sessions.requests(1)[:50]:
        length, slots = int(payload.tensors(rows)["lengths"][0]), payload.slots_of(rows, "bucket")
        assert slots in HISTORIES
        assert slots >= length
        assert not any(slots > size >= length for size in HISTORIES)
        assert len(payload.WIRES["raw"].write(rows, slots, "")) == 4 * row_ints(slots)
    assert payload.slots_of(sessions.rows, "whole") == HISTORY


@pytest.mark.parametrize("cache_mb", [0.0, 8.0])
def test_the_path_without_a_server_answers_under_load(
    registry: Path, sessions_file: Path, cache_mb: float
) -> None:
    arm = NoServer("in-process", cache_mb=cache_mb)
    with running(arm, registry, sessions_file, lists=4, workers=2) as up:
        found = up.step(200, seconds=1.0, seed=1)
    assert up.difference <= TOLERANCE[arm.precision]
    assert found.requests > 20
    assert found.failed == 0
    assert found.client_cpu_us > 0


SCRIPT = """
    from aiohttp import web
    from infra.bench.serve.rivals.session import PORT, Ranker

    ranker = Ranker()

    async def rank(request):
        answer = ranker.rank([await request.read()])[0]
        return web.Response(body=answer{spoil})

    app = web.Application()
    app.router.add_post("/", rank)
    web.run_app(app, host="127.0.0.1", port=PORT, print=None)
"""


@dataclass(frozen=True, slots=True)
class Scripted(Arm):
    """A small server with a rival's session."""

    spoil: str = ""

    def start(self, served: Served) -> subprocess.Popen[bytes]:
        script = textwrap.dedent(SCRIPT).replace("{spoil}", self.spoil)
        return spawn_server([sys.executable, "-c", script], served.folder, served.told())


def test_a_server_is_measured_with_its_cpu(registry: Path, sessions_file: Path) -> None:
    with running(Scripted("scripted", "raw"), registry, sessions_file, lists=2, workers=1) as up:
        (server,) = [
            child
            for child in psutil.Process().children()
            if child.status() != psutil.STATUS_ZOMBIE and any("run_app" in part for part in child.cmdline())
        ]
        up.pause()
        eventually(lambda: server.status() == psutil.STATUS_STOPPED)
        up.resume()
        found = up.step(100, seconds=1.0, seed=1)
        up.pause()  # and so it ends
    assert found.failed == 0
    assert found.server_cpu_us > 0
    assert not server.is_running()
    assert up.difference < 1e-4


def test_our_server_has_as_many_processes_as_the_others_and_load_on_each(
    registry: Path, sessions_file: Path
) -> None:
    arm = OurServer("tailrace", "oip", "tailrace-rank")
    with running(arm, registry, sessions_file, lists=2, workers=2) as up:
        found = up.step(100, seconds=1.0, seed=1)
        connected = [
            sum(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp"))
            for process in psutil.Process().children(recursive=True)
            if "serve" in process.cmdline() and "--workers" not in process.cmdline()
        ]
    assert found.failed == 0
    assert connected == [CONNECTIONS / 2] * 2


def test_ports_that_follow_one_another_are_none_of_those_in_use() -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind((HOST, port))
        for _ in range(20):
            first = free_ports(3, port + 10)
            assert not {port, port + 10} & set(range(first, first + 3))


def test_a_server_that_answers_with_other_scores_is_not_measured(registry: Path, sessions_file: Path) -> None:
    arm = Scripted("scripted", "raw", spoil="[4:] + bytes(4)")
    failed = pytest.raises(ArmFailed, match="other scores")
    with failed, running(arm, registry, sessions_file, lists=2, workers=1):
        pass


def test_a_server_that_does_not_start_says_why(registry: Path, sessions_file: Path) -> None:
    arm = Scripted("scripted", "raw", spoil="; raise SystemExit(")  # no Python
    failed = pytest.raises(ArmFailed, match=r"ended with 1(.|\n)*SyntaxError")
    with failed, running(arm, registry, sessions_file, lists=1, workers=1):
        pass


@pytest.mark.parametrize("padding", ["whole", "bucket"])
@pytest.mark.parametrize("lists", [1, 16])
def test_rivals_compute_what_our_engine_does(
    registry: Path, sessions: Sessions, lists: int, padding: payload.Padding
) -> None:
    """However a client pads, and whatever else is in the batch."""
    from infra.bench.serve.rivals.session import Ranker

    artefact = Registry(registry).open()
    ranker = Ranker(str(artefact.path / artefact.manifest.graphs["rank"]), lists)
    asked, raw = sessions.requests(lists)[:6], payload.WIRES["raw"]
    bodies = [raw.write(rows, payload.slots_of(rows, padding), "") for rows in asked]
    if lists == 1 and padding == "bucket":
        assert len(set(map(len, bodies))) > 1
    answers = [raw.read(answer) for answer in ranker.rank(bodies)]
    assert difference(answers, expected_scores(artefact, asked)) < 1e-4


def test_base64_says_what_raw_bytes_say() -> None:
    rows = np.arange(2 * ROW, dtype=np.int32).reshape(2, -1)
    written = payload.WIRES["base64"].write(rows, 25, "")
    assert written.startswith(b'["')
    assert base64.b64decode(written[2:-2]) == payload.WIRES["raw"].write(rows, 25, "")


def test_a_rival_that_cannot_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path))
    with pytest.raises(CannotInstall, match=r"nobody cannot be installed: .*no-such-package"):
        ensure("nobody", [f"{tmp_path}/no-such-package"])
    assert not (tmp_path / "rivals" / "nobody" / "installed").exists()


def test_processes_share_the_users_and_a_schedule(sessions: Sessions) -> None:
    parts = [sessions.of(part, 3) for part in range(3)]
    assert sum(map(len, parts)) == len(sessions)
    assert not set(parts[0].users.tolist()) & set(parts[1].users.tolist())
    steps = [
        Step(100.0, 90.0, 50, 0, 2.0, 9.0, 1.0, client_cpu_us=10.0),
        Step(100.0, 40.0, 50, 30, 5.0, 70.0, 0.5, client_cpu_us=45.0),
    ]
    both = Step.together(steps)
    assert (both.lists_per_s, both.goodput, both.requests, both.failed) == (200.0, 130.0, 100, 30)
    assert (both.p50_ms, both.p99_ms, both.behind_p99_ms) == (5.0, 70.0, 1.0)
    assert both.client_cpu_us == 20.0
    assert not both.kept_up
