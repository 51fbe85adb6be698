"""`tailrace retrain`: once, from a log or from the clicks topic, or as a service on a schedule."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compression.home import home
from compression.smaller.plan import PLANS
from infra.commands import options, settings
from infra.commands.again import again
from infra.commands.probes import check_listens
from infra.commands.training import PRECISIONS, RECIPES, SPLITS, print_metrics
from infra.console import log_to_stderr, print_json
from infra.retraining import REFUSED

if TYPE_CHECKING:
    from compression.retraining.pipeline import Retrained
    from compression.retrieval.recipe import RetrievalRecipe

NETWORKS = ("ranking", "retrieval")
_OF_RANKING = ("--compress", "--goal", "--precision", "--processes", "--device", "--from-serving")
# What the service tells its runs itself, and what is of one run only.
OF_SERVICE = (
    *("schedule", "bootstrap", "redis_url", "runs", "http_host", "http_port", "as_json"),
    *("run_name", "repeat", "force"),
)
_LOG = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.command()
@click.option("--log", type=_LOG, help="Taobao-format log or item lists, gzip or not.")
@click.option("--topic", help="Learn from this topic's clicks instead: --topic clicks.")
@click.option(
    "--from",
    "since",
    default="earliest",
    show_default=True,
    help="Of a topic: earliest, last (where the latest published run ended) or a run (where it ended).",
)
@click.option(
    "--until", default="now", show_default=True, help="Of a topic: now, or a run (where that one ended)."
)
@options.registry
@click.option(
    "--network",
    type=click.Choice(NETWORKS),
    default="ranking",
    show_default=True,
    help="ranking reads candidates beside the history; of retrieval a user's vector scores every item.",
)
@click.option(
    "--recipe",
    default="laptop",
    show_default=True,
    help=f"{', '.join(RECIPES)}; of a retrieval network one of `bench accuracy` or a file.",
)
@click.option(
    "--compress",
    "plan",
    type=click.Choice(list(PLANS)),
    help="What is released of the trained network: a student of it, its feed-forward part halved, its tables "
    "in 8 bits, or all of that. With --run: anew from the network that was trained.  [default: none]",
)
@click.option("--epochs", type=click.IntRange(1), help="At most so many; the recipe says otherwise.")
@click.option(
    "--max-minutes",
    type=options.FiniteRange(0, min_open=True),
    help="Of training; the recipe says otherwise.",
)
@click.option(
    "--goal",
    "goals",
    metavar="NAME=WEIGHT",
    multiple=True,
    help="What a pv, cart, fav or buy weighs as a target; 1 where it is not said. May be repeated.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="f32",
    show_default=True,
    help="Of the products in training; weights and losses are f32.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that train together. Under torchrun: as many as it started.",
)
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    show_default=True,
    help="Where the network trains; no GPU has run it yet.",
)
@click.option("--max-events", type=click.IntRange(1), help="Keep the last rows of a longer log.")
@click.option("--split", type=click.Choice(SPLITS), default="leave-one-out", show_default=True)
@options.seed()
@click.option("--from-serving", is_flag=True, help="Start from the weights of the version that serves.")
@click.option("--alias", default="serving", show_default=True, help="Alias that will stand for the version.")
@click.option("--no-promote", is_flag=True, help="Publish only; the alias stays as it is.")
@click.option("--force", metavar="NOTE", help="Publish what the gate refuses; NOTE stands in the manifest.")
@click.option("--run", "run_name", help="Name of the run; one that was begun goes on where it stands.")
@click.option("--repeat", metavar="RUN", help="What RUN was asked for once more, from the same records.")
@click.option("--schedule", metavar="CRON", help="Stay, and retrain when CRON (five fields, UTC) says so.")
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="TAILRACE_RUNS",
    show_envvar=True,
    default=lambda: home() / "runs",
    show_default=".tailrace/runs of the checkout",
    help="Folder of runs: state, report.",
)
@click.option("--bootstrap", help="Announce the release on this broker; the topic is read from there too.")
@options.topic_suffix
@click.option(
    "--redis-url",
    envvar="RETRAIN_REDIS_URL",
    show_envvar=True,
    callback=options.redis_address,
    help="Hold the lease there, so that one process retrains an alias at a time.",
)
@click.option(
    "--lease-seconds",
    "lease_s",
    type=options.FiniteRange(0.1),
    envvar="RETRAIN_LEASE_S",
    default=30.0,
    show_default=True,
    help="How long the lease outlives its holder.",
)
@click.option("--http-host", envvar="RETRAIN_HTTP_HOST", default="127.0.0.1", show_default=True)
@click.option(
    "--http-port",
    envvar="RETRAIN_HTTP_PORT",
    type=click.IntRange(0, 65535),
    default=6067,
    show_default=True,
    help="With --schedule: /healthz, /metrics, /runs; 0 takes a free port.",
)
@options.one_json
def retrain(
    *,
    log: Path | None,
    topic: str | None,
    since: str,
    until: str,
    registry: Path,
    network: str,
    recipe: str,
    plan: str | None,
    epochs: int | None,
    max_minutes: float | None,
    goals: tuple[str, ...],
    precision: Any,
    processes: int,
    device: str,
    max_events: int | None,
    split: Any,
    seed: int,
    from_serving: bool,
    alias: str,
    no_promote: bool,
    force: str | None,
    run_name: str | None,
    repeat: str | None,
    schedule: str | None,
    runs: Path,
    bootstrap: str | None,
    topic_suffix: str,
    redis_url: str | None,
    lease_s: float,
    http_host: str,
    http_port: int,
    as_json: bool,
) -> None:
    """Train and release a model: read, train, evaluate, export, gate, publish, promote, announce.

    --compress puts distilling, pruning and quantizing between train and evaluate; the gate then judges the
    smaller network, beside the version that serves and beside the one it was made of.

    Each step is kept in the run's folder. A run that was killed goes on with --run. The command ends with 0
    when a version was published, 3 when the gate refused it, 4 when another process retrains the alias, and
    75 when it was asked to end before it was through.

    \b
    tailrace retrain --log clicks.csv
    tailrace retrain --log UserBehavior.csv.gz --recipe full --max-minutes 30
    tailrace retrain --log clicks.csv --compress all
    tailrace retrain --log clicks.csv --network retrieval --recipe stream
    tailrace retrain --log ratings.txt --network retrieval --recipe ml-1m
    tailrace retrain --log clicks.csv --goal buy=4 --goal cart=2 --processes 2
    torchrun --nproc-per-node 2 -m -- infra.cli retrain --log clicks.csv
    tailrace retrain --topic clicks --bootstrap localhost:9092 --redis-url redis://localhost:6379/0
    tailrace retrain --topic clicks --from last --from-serving --schedule '0 * * * *'
    tailrace retrain --run 20171203T101500-3f9c1a
    """
    # Beside a busy broker, threads that spin while they wait for one another cost several times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _need_training_extra()
    from compression.evaluation.verdict import GateLimits, GateRefused
    from compression.logs.dataset import MAX_EVENTS
    from compression.logs.log_reader import LogInvalid
    from compression.releases.aliases import check_name
    from compression.releases.registry import ArtefactInvalid
    from compression.retraining.runs import Run, RunInvalid
    from compression.training.export import ParityError
    from compression.training.goals import Goals
    from compression.training.processes import Launched, Local, ProcessLost
    from compression.training.train import RECIPES as RECIPE_NAMED
    from infra.local.endpoints import endpoints
    from infra.retraining.job import Job, compressed, job, topic_bounds
    from infra.retraining.torchrun import assist, place_of
    from infra.retraining.work import report, work

    # What would be stumbled over after the training.
    settings.read(GateLimits)
    try:
        check_name(alias)
    except ArtefactInvalid as error:
        raise click.BadParameter(str(error), param_hint="--alias") from None
    place = place_of(device, processes, schedule)
    if place is not None and place.rank > 0:
        assist(place, device)
        return
    topic = topic + topic_suffix if topic else None
    if topic or schedule:
        bootstrap = bootstrap or endpoints().bootstrap
        redis_url = redis_url or endpoints().redis_url
    begun = run_name is not None and (runs / run_name / "run.json").is_file()
    if not (begun or repeat) and (log is None) == (topic is None):
        absent = f"there is no run {run_name!r} in {runs}; to begin it, " if run_name else ""
        raise click.UsageError(f"{absent}one of --log and --topic says what to learn from")
    if schedule is not None:
        _serve(schedule, runs, str(bootstrap), str(redis_url), topic_suffix, alias, http_host, http_port)
        return
    retrieval = None
    if network == "retrieval":
        alone = (plan or "none", goals, precision, processes, device, from_serving)
        if place is not None or alone != ("none", (), "f32", 1, "cpu", False):
            raise click.UsageError(
                "a retrieval network is trained by one process on the processor, from random weights, all "
                "clicks alike, and is not compressed: leave out " + ", ".join(_OF_RANKING)
            )
        retrieval, recipe = _retrieval_recipe(recipe, epochs, max_minutes), "laptop"
    elif recipe not in RECIPES:
        raise click.BadParameter(f"{recipe!r} is not one of {', '.join(RECIPES)}", param_hint="--recipe")
    chosen = RECIPE_NAMED[recipe]
    chosen = replace(chosen, epochs=epochs) if epochs is not None else chosen
    chosen = replace(chosen, max_minutes=max_minutes) if max_minutes is not None else chosen
    chosen = replace(chosen, compression=PLANS[plan or "none"], precision=precision)
    try:
        chosen = replace(chosen, goals=Goals.parse(goals))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--goal") from None
    try:
        if begun:
            run = Run.find(runs, str(run_name))
            asked = Job.of(run) if plan is None else compressed(run, PLANS[plan])
        else:
            asked = (
                Job.of(Run.find(runs, repeat))
                if repeat
                else job(
                    log=log,
                    bounds=topic_bounds(runs, str(bootstrap), topic, since, until) if topic else None,
                    registry=registry,
                    alias=None if no_promote else alias,
                    recipe=chosen,
                    retrieval=retrieval,
                    split=split,
                    seed=seed,
                    max_events=max_events or MAX_EVENTS,
                    from_serving=from_serving,
                    processes=place.size if place else processes,
                )
            )
            run = Run.begin(runs, run_name, asked.model_dump(mode="json"))
        if asked.bounds is not None:  # whether the topic was named now or when the run was begun
            bootstrap = bootstrap or endpoints().bootstrap
            redis_url = redis_url or endpoints().redis_url
        if place is not None and place.size != asked.processes:
            raise RunInvalid(
                f"run {run.state.run} is for {asked.processes} processes, torchrun has started {place.size}"
            )
        with Launched(place, device) if place else nullcontext(Local(asked.processes, device)) as team:
            done = work(run, asked, bootstrap, redis_url, topic_suffix, force, lease_s, team, quiet=as_json)
    except GateRefused as error:
        report(runs, run, quiet=as_json)
        click.echo(str(error), err=True)
        if asked.compression.stages:
            click.echo(
                f"nothing was published; `tailrace retrain --run {run.state.run} --compress none` puts the "
                "network as it was trained before the gate, another --compress compresses it anew",
                err=True,
            )
        click.echo(
            f"`tailrace retrain --run {run.state.run} --force NOTE` publishes it all the same", err=True
        )
        raise SystemExit(REFUSED) from None
    except (LogInvalid, ArtefactInvalid, ParityError, RunInvalid, ProcessLost) as error:
        raise click.ClickException(str(error)) from None
    path = report(runs, run, quiet=as_json)
    summary = _summary(done) | {"run": run.state.run, "report": str(path)}
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, Path(asked.registry))


commands: list[click.Command] = [retrain]


def _retrieval_recipe(name: str, epochs: int | None, max_minutes: float | None) -> RetrievalRecipe:
    """`max_minutes` are of one core."""
    from compression.retrieval.recipe import RecipeInvalid, change, load_recipe

    asked = {"epochs": epochs, "max_core_minutes": max_minutes}
    try:
        return change(
            load_recipe(name), {field: one for field, one in asked.items() if one is not None}, name
        )
    except RecipeInvalid as error:
        raise click.BadParameter(str(error), param_hint="--recipe") from None


def _serve(
    schedule: str,
    runs: Path,
    bootstrap: str,
    redis_url: str,
    topic_suffix: str,
    alias: str,
    host: str,
    port: int,
) -> None:
    """The command line once more without its schedule, whenever the schedule says so."""
    import asyncio

    from infra.retraining.schedule import Cron, ScheduleInvalid, Service

    log_to_stderr("INFO")
    try:
        cron = Cron(schedule)
    except ScheduleInvalid as error:
        raise click.UsageError(str(error)) from None
    check_listens(host, port)
    command = again(*OF_SERVICE)
    command += ["--bootstrap", bootstrap, "--runs", str(runs), "--json"]
    # Not on the command line: others may read that, and the address may hold a password.
    os.environ["RETRAIN_REDIS_URL"] = redis_url
    service = Service(cron, command, runs, alias)
    raise SystemExit(asyncio.run(service.run(host, port)))


def _need_training_extra() -> None:
    from importlib.util import find_spec

    needed = ("torch", "onnx", "onnxruntime", "safetensors", "scipy", "matplotlib")
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        raise click.ClickException(
            f"training needs {', '.join(missing)}: pip install 'tailrace[train]' brings what is missing"
        )


def _summary(done: Retrained) -> dict[str, Any]:
    manifest = done.manifest
    return {
        "version": manifest.version,
        "alias": done.alias,
        "path": str(done.path),
        "manifest_sha256": done.manifest_sha256,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "model": manifest.model.model_dump(),
        "data": manifest.data,
        "metrics": manifest.metrics,
        "gate": done.verdict.model_dump(),
        "seconds": done.seconds,
        "announced": done.announced,
    }


def _print_summary(summary: dict[str, Any], registry: Path) -> None:
    data = summary["data"]
    click.echo(f"{summary['version']} in {registry}: {summary['bytes'] / 1e6:.1f} MB")
    if data["bad_rows"]:
        click.echo(f"{data['bad_rows']} bad rows of {data['log']} were left out")
    if data["truncated"]:
        click.echo(f"{data['log']}: {data['truncated']}")
    print_metrics(summary["metrics"])
    for check in summary["gate"]["checks"]:
        click.echo(f"gate: {check['name']} {check['outcome']}: {check['detail']}")
    if summary["alias"]:
        click.echo(f"{summary['alias']} now stands for {summary['version']}")
