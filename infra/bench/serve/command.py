"""`tailrace bench serve`."""

from __future__ import annotations

from pathlib import Path

import click

from infra.bench import options as bench_options
from infra.commands import options

ARM_NAMES = (
    "in-process",
    "in-process-uncached",
    "tailrace",
    "mosec",
    "triton",
    "litserve",
    "bentoml",
    "ray-serve",
)


@click.command()
@click.option("--arms", default=",".join(ARM_NAMES), show_default=True, help="Which, by name.")
@click.option("--rounds", type=click.IntRange(1, 20), default=2, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=2.0, show_default=True, help="Per rate offered."
)
@click.option("--full", is_flag=True, help="Only clicks of users whose history is full.")
@click.option("--quick", is_flag=True, help="One short round with two workers each: does it all run?")
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def serve(
    *,
    arms: str,
    rounds: int,
    seconds: float,
    full: bool,
    quick: bool,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Lists per second within 50 ms: ours against Triton, mosec, LitServe, BentoML and Ray Serve.

    Everybody serves the released `rank` graph with one thread a session, in batches of at most 64 lists,
    and is tried with two worker processes and one (ours with a lane a core; in process: lanes): the others
    in ONNX Runtime, ours in OpenVINO's bf16 where the processor has matrix units for it, else in ONNX
    Runtime, too. Requests are those of a log's users: a list at every click of some thousand sessions,
    with the history as of the click (at most 100 events) and 50 candidates. All arms get the same in the
    same order. Rivals compute the whole graph for each list. In process, which is the path of the stream,
    what is known of a user may be kept, and a click costs one appended event; the same without that is a row
    of its own. So it is over gRPC, where the network scores by a user vector.
    Load is open loop and comes in bursts; rates rise until the p99, counted from when a request was due,
    passes 50 ms three times. All arms are up, and each takes one step in turn, the others paused: what
    slows the machine for a while slows all of them. Rivals are installed under .tailrace/rivals the first
    time, which takes minutes; all arms and two rounds then take half an hour.

    \b
    tailrace bench serve --quick
    tailrace bench serve --arms in-process,mosec --rounds 5 --log users_1k.csv.gz --json serve.json
    tailrace bench serve --full
    """
    from compression.logs.log_reader import LogInvalid
    from compression.releases.registry import Registry
    from inference.settings import InferenceSettings
    from infra.bench.serve import measure
    from infra.bench.serve.arms import ARMS
    from infra.bench.serve.sessions import Events, Sessions
    from infra.bench.serve.shape import HISTORY

    wanted = [name.strip() for name in arms.split(",")]
    if unknown := sorted(set(wanted) - set(ARM_NAMES)):
        raise click.UsageError(f"no arm is called {unknown[0]!r}; there are {', '.join(ARM_NAMES)}")
    try:
        artefact = Registry(registry).open()
        vocabulary = artefact.vocabulary()
        events = Events.drawn(vocabulary, seed, full=full) if log is None else Events.read(log)
        hop = InferenceSettings().hop_of(artefact.manifest, HISTORY)
        sessions = Sessions.drawn(events, vocabulary, seed=seed, hop=hop, full=full)
    except LogInvalid as error:
        raise click.ClickException(str(error)) from None
    if quick:
        rounds, seconds = 1, min(seconds, 1.0)
    chosen = [arm for arm in ARMS if arm.name in wanted]
    plan = measure.Plan(registry.resolve(), sessions, events.name, rounds, seconds, seed, quick)
    outcomes = measure.run(plan, chosen, say=lambda line: click.echo(line, err=True))
    measure.show(outcomes, plan, model=artefact.version, json_path=json_path)
