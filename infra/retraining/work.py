"""One run in this process: under its lease, until it is through or asked to end; announced and reported."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from infra.progress import ProgressBar
from infra.retraining import HELD, STOPPED

if TYPE_CHECKING:
    from compression.retraining.pipeline import Announce, Retrained
    from compression.retraining.runs import Run
    from compression.training.processes import Team
    from infra.retraining.job import Job


def work(
    run: Run,
    asked: Job,
    bootstrap: str | None,
    redis_url: str | None,
    topic_suffix: str,
    force: str | None,
    lease_s: float,
    team: Team,
    *,
    quiet: bool,
) -> Retrained:
    """The run's version. Ends the process where the lease is another's or SIGTERM asks it to end."""
    from compression.errors import ReleaseRefused
    from compression.releases.registry import SERVING
    from compression.retraining.pipeline import retrain
    from compression.training.checkpoint import Stopped
    from infra.retraining.lease import Lease, LeaseHeld

    # Taken up again: the process that was killed has left its lease behind.
    patience_s = 1.2 * lease_s if run.state.attempts else 0.0

    def lease(stopping: Callable[[], bool]) -> Any:
        if not redis_url:
            return nullcontext()
        told: dict[str, Any] = {"ttl_s": lease_s, "patience_s": patience_s, "stopping": stopping}
        return Lease(redis_url, Path(asked.registry), asked.alias or SERVING, **told)

    settings = asked.settings(bootstrap or "", force)
    announce = _announcer(bootstrap, topic_suffix, asked.alias) if bootstrap and asked.alias else None
    try:
        with asked_to_end() as stopping, lease(stopping) as guard, ProgressBar(quiet=quiet) as bar:
            return retrain(
                settings, bar, run=run, guard=guard, announce=announce, stopping=stopping, team=team
            )
    except LeaseHeld as error:
        if not run.state.attempts:
            shutil.rmtree(run.folder)
        click.echo(str(error), err=True)
        raise SystemExit(HELD) from None
    except Stopped as error:
        click.echo(f"{error}; `tailrace retrain --run {run.state.run}` goes on", err=True)
        raise SystemExit(STOPPED) from None
    except ReleaseRefused as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def asked_to_end() -> Iterator[Any]:
    """Whether SIGTERM or Ctrl-C has come. The second one ends the process as it always does."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announcer(bootstrap: str, topic_suffix: str, alias: str) -> Announce:
    """Says which version the alias now stands for. Where the broker cannot be reached a sentence on
    stderr says so: the version is promoted all the same."""
    from infra.announce import announce
    from topics.messages import ModelReleased

    def say(manifest: Any, digest: str, path: Path) -> str | None:
        message = ModelReleased(
            version=manifest.version, uri=path.resolve().as_uri(), sha256=digest, stage="serving"
        )
        error = announce(bootstrap, topic_suffix, alias, [message])
        if error is not None:
            click.echo(error, err=True)
        return error

    return say


def report(runs: Path, run: Run, *, quiet: bool) -> Path:
    """Write the run's page, remove what is old, say where the page is."""
    from compression.retraining.report import write
    from compression.retraining.runs import prune

    path = write(run)
    prune(runs)
    if not quiet:
        click.echo(f"report: {path}")
    return path
