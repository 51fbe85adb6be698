"""`tailrace bench`: the command group. Each measurement lives in a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compression.errors import ArtefactInvalid
from inference.errors import ModelUnavailable
from infra.bench import options as bench_options
from infra.commands import options
from infra.ending import tidy_on_sigterm
from infra.lazy_group import LazyGroup

# name -> (module, one line for --help): benches that hold their own command.
BENCHES = {
    "swap": ("infra.bench.swap", "Versions swapped under load: failures, p99, memory."),
    "batching": ("infra.bench.batching", "Ways to wait for a fuller batch, compared under the same load."),
    "cache": ("infra.bench.cache", "What an ask costs when its history is known already."),
    "engines": (
        "infra.bench.engines",
        "Every engine and precision on one model: time, parity, memory.",
    ),
    "cost-model": ("infra.bench.cost_model", "What every warmed shape takes, and formulas fitted to it."),
    "dispatch": ("infra.bench.dispatch", "What batcher and dispatcher cost per request."),
    "engine-faults": ("infra.bench.engine_faults", "An engine that hangs, crashes, answers NaN, slows down."),
    "serve": ("infra.bench.serve.command", "Lists per second within 50 ms, against five other servers."),
    "edge": ("infra.bench.edge", "The browser bundle in headless Chromium: scores, time, sizes."),
    "accuracy": ("infra.bench.accuracy", "A retrieval model and its fusion with counts, over seeds."),
    "table1": (
        "infra.bench.table1.command",
        "The paper's Table I: pruned, quantized, distilled, shared history.",
    ),
    "attention": ("infra.bench.attention", "Ways to attend, each beside what its formula predicts."),
    "overload": ("infra.bench.overload", "Half again as many asks as can be ranked, from three tiers."),
}


class _Bench(LazyGroup):
    """The measurements."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ArtefactInvalid, ModelUnavailable) as error:
            # No version is there, or none that this machine can run: a sentence, not a traceback.
            raise click.ClickException(str(error)) from error


@click.group(cls=_Bench, lazy=BENCHES)
def bench() -> None:
    """Measure on real parts; each prints a table, --json FILE keeps it with machine and versions.

    Those of the stream start a broker, a Redis and a worker of their own on free ports.

    \b
    tailrace bench stream --rate 200
    tailrace bench pass-through
    tailrace bench kills
    tailrace bench memory
    """
    tidy_on_sigterm()


@bench.command()
@click.option(
    "--rate", type=click.FloatRange(0), default=200, show_default=True, help="Per second; 0: at once."
)
@click.option("--clicks", type=click.IntRange(100), default=6_000, show_default=True)
@click.option("--runs", type=click.IntRange(1, 20), default=1, show_default=True)
@click.option("--engine", default="auto", show_default=True)
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def stream(
    *,
    rate: float,
    clicks: int,
    runs: int,
    engine: str,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Click to ranked list, open loop: rate, p50 … p99.9, CPU per 1,000 clicks, lost, duplicated.

    Clicks are due at Poisson times and latency counts from the due time, so a slow service cannot
    hide behind a generator that waits for it. An independent consumer process takes the time.

    \b
    tailrace bench stream --rate 200
    tailrace bench stream --rate 0 --log stream_20171126_2h.csv.gz --clicks 110300
    """
    from infra.bench import stream as measure

    bench_options.note_unreleased(registry)
    events, name = bench_options.events(log, clicks, seed)
    results = [
        measure.run(events, registry=registry, rate=rate, seed=seed + number, options=["--engine", engine])
        for number in range(runs)
    ]
    measure.show(results, rate=rate, log=name, seed=seed, json_path=json_path)


@bench.command(name="pass-through")
@click.option("--clicks", type=click.IntRange(1_000), default=100_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@bench_options.seed
@bench_options.json_path
def pass_through(*, clicks: int, rounds: int, seed: int, json_path: Path | None) -> None:
    """What consuming and answering costs without ranking, against stock Faust, interleaved."""
    from infra.bench import pass_through as measure
    from infra.bench.load import records

    events, _ = bench_options.events(None, clicks, seed)
    drains = measure.run(records(events), rounds=rounds)
    measure.show(drains, clicks=len(events), json_path=json_path)


@bench.command()
@click.option("--kills", type=click.IntRange(1, 100), default=10, show_default=True)
@click.option("--duration-s", type=click.FloatRange(5), default=60.0, show_default=True)
@click.option("--clicks", type=click.IntRange(100), default=12_000, show_default=True)
@click.option("--control/--no-control", default=True, help="Also stock Faust with concurrency 2.")
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def kills(
    *,
    kills: int,
    duration_s: float,
    clicks: int,
    control: bool,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """kill -9 the worker at random moments of a replay: lost, duplicated, sequences against the log."""
    from infra.bench import faults
    from infra.bench.rig import rig

    bench_options.note_unreleased(registry)
    events, name = bench_options.events(log, clicks, seed)
    with rig(registry) as parts:
        outcomes = [faults.kills(parts, events, duration_s=duration_s, kills=kills, seed=seed)]
    if control:
        with rig(registry) as parts:
            outcomes.append(faults.control(parts, events, duration_s=duration_s, kills=kills, seed=seed))
    faults.show(outcomes, log=name, seed=seed, json_path=json_path)
    _insist(outcomes[0].kept_its_promise)


@bench.command()
@click.option("--outage-s", type=click.FloatRange(1), default=20.0, show_default=True)
@click.option("--duration-s", type=click.FloatRange(5), default=40.0, show_default=True)
@click.option("--clicks", type=click.IntRange(100), default=4_000, show_default=True)
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def outages(
    *,
    outage_s: float,
    duration_s: float,
    clicks: int,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Stop the broker, then Redis, for a while under load: the worker recovers without a restart."""
    from infra.bench import faults
    from infra.bench.rig import rig

    bench_options.note_unreleased(registry)
    events, name = bench_options.events(log, clicks, seed)
    outcomes = []
    for what in ("kafka", "redis"):
        with rig(registry) as parts:
            outcomes.append(
                faults.outage(parts, events, duration_s=duration_s, what=what, outage_s=outage_s, at_s=5.0)
            )
    faults.show(outcomes, log=name, seed=seed, json_path=json_path)
    _insist(all(outcome.kept_its_promise for outcome in outcomes))


@bench.command()
@click.option("--good", type=click.IntRange(10), default=10_000, show_default=True)
@click.option("--bad", type=click.IntRange(1), default=1_000, show_default=True)
@click.option("--rate", type=click.FloatRange(0), default=1_000, show_default=True)
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def malformed(
    *, good: int, bad: int, rate: float, log: Path | None, registry: Path, seed: int, json_path: Path | None
) -> None:
    """Bad messages among good ones: a dead letter for each bad, a list for each good, no restart."""
    from infra.bench import faults
    from infra.bench.rig import rig

    bench_options.note_unreleased(registry)
    events, name = bench_options.events(log, good, seed)
    with rig(registry) as parts:
        outcome = faults.malformed(parts, events, bad=bad, rate=rate, seed=seed)
    faults.show([outcome], log=name, seed=seed, json_path=json_path)
    _insist(outcome.kept_its_promise and outcome.notes["dead_letters"] == bad and outcome.worker_starts == 1)


@bench.command()
@click.option("--users", type=click.IntRange(100), default=100_000, show_default=True)
@bench_options.json_path
def memory(*, users: int, json_path: Path | None) -> None:
    """Redis memory per user with 100 events, key, expiry and hash tables included."""
    import tempfile

    from infra.bench import report, sequence_memory
    from infra.local.redis import LocalRedis

    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder, LocalRedis(Path(folder)) as redis:
        measured = sequence_memory.run(redis.url, users)
    report.table(
        "memory: behaviour sequences in Redis", ["", "value"], [[k, str(v)] for k, v in measured.items()]
    )
    report.write(json_path, "memory", measured)
    _insist(measured["bytes_per_user"] <= measured["goal_bytes_per_user"])


def _insist(held: bool) -> None:
    if not held:
        raise click.ClickException("the promise did not hold: see the table")
