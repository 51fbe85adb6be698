"""`tailrace models promote`, `canary`, `shadow` and `rollback`: the alias, and whom to tell of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.commands import options
from infra.commands.models.common import alias_option, registry_of, sentences
from infra.console import print_json

if TYPE_CHECKING:
    from compression.releases.aliases import AliasState
    from compression.releases.registry import Registry
    from topics.messages import Stage

Command = Callable[..., Any]

DEFAULT_SHADOW_PERCENT = 10.0


def _announcing(command: Command) -> Command:
    """Options of a command that changes a stage."""
    for option in (
        options.one_json,
        options.topic_suffix,
        click.option("--bootstrap", help="Announce it on this broker's model-releases topic."),
        click.option(
            "--server",
            "servers",
            multiple=True,
            envvar="TAILRACE_SERVERS",
            metavar="HOST:PORT",
            help="Have this server's admin listener take it now, and say how it went.",
        ),
        alias_option,
        options.registry,
    ):
        command = option(command)
    return command


@click.command()
@click.argument("version")
@_announcing
def promote(*, version: str, **told: Any) -> None:
    """Let VERSION serve all users. It is verified first; the version before is kept for `rollback`.

    A running worker ranks recent requests with it before it switches, and keeps the version before
    if an answer is missing, too short or not finite.

    \b
    tailrace models promote 20171203T101500-3f9c
    tailrace models promote 20171203T101500-3f9c --bootstrap localhost:9092
    """
    _change(
        version,
        lambda registry, alias: registry.promote(version, alias),
        stage="serving",
        words="{alias} now stands for {version}",
        **told,
    )


@click.command()
@click.argument("version")
@click.option("--percent", type=float, required=True, help="Share of users, 0.01 to 100; 0 ends the canary.")
@_announcing
def canary(*, version: str, percent: float, **told: Any) -> None:
    """Let VERSION serve a share of the users: the same ones everywhere, chosen by a hash of their id.

    \b
    tailrace models canary 20171203T101500-3f9c --percent 5
    tailrace models canary 20171203T101500-3f9c --percent 0
    """
    _try(version, percent, "canary", "of users get lists from {version}", **told)


@click.command()
@click.argument("version")
@click.option(
    "--percent",
    type=float,
    default=DEFAULT_SHADOW_PERCENT,
    show_default=True,
    help="Share of requests it ranks too, 0.01 to 100; 0 ends the shadow.",
)
@_announcing
def shadow(*, version: str, percent: float, **told: Any) -> None:
    """Let VERSION rank a share of live requests too. Nobody sees its lists; workers compare them with
    those that were sent and show the figures under /models.

    \b
    tailrace models shadow 20171203T101500-3f9c
    curl -s localhost:6066/models | jq .shadow
    """
    _try(version, percent, "shadow", "of requests are also ranked by {version}", **told)


@click.command()
@_announcing
def rollback(**told: Any) -> None:
    """Let the version before serve again, for all users. Workers keep it warm, so this takes effect
    at once.

    \b
    tailrace models rollback --bootstrap localhost:9092
    """
    with sentences():
        state = registry_of(told["registry"]).state(told["alias"])
        before = state.serving if state else None
    _change(
        state.previous.version if state and state.previous else None,
        lambda registry, alias: registry.rollback(alias),
        stage="serving",
        words="{alias} stands for {version} again",
        rolled_back=before,
        **told,
    )


commands: list[click.Command] = [promote, canary, shadow, rollback]


def _try(version: str, percent: float, stage: Stage, words: str, **told: Any) -> None:
    def change(registry: Registry, alias: str) -> AliasState:
        if percent == 0:
            return registry.retire(version, alias)
        start = registry.canary if stage == "canary" else registry.shadow
        return start(version, percent, alias)

    _change(
        version,
        change,
        stage=stage if percent else "retired",
        percent=percent,
        words=f"{percent:g} % {words}" if percent else f"{{version}} is no {stage} any more",
        **told,
    )


def _change(
    version: str | None,
    change: Callable[[Registry, str], AliasState],
    *,
    stage: Stage,
    words: str,
    registry: Path,
    alias: str,
    bootstrap: str | None,
    servers: Sequence[str],
    topic_suffix: str,
    as_json: bool,
    percent: float = 100.0,
    rolled_back: Any = None,
) -> None:
    """Verify, change the alias, announce, say so; ends with 1 where the broker or a server was not told."""
    from infra.announce import announce
    from infra.servers import refresh
    from topics.messages import ModelReleased

    with sentences():
        found = registry_of(registry)
        if version is not None and stage != "retired":
            found.open(version)
        state = change(found, alias)
        name = version or state.version
        digest = found.manifest_sha256(name)
    told: list[ModelReleased] = []
    if rolled_back is not None:
        told.append(_message(registry, rolled_back.version, rolled_back.manifest_sha256, "rolled_back", 0))
    told.append(_message(registry, name, digest, stage, percent))
    error = announce(bootstrap, topic_suffix, alias, told) if bootstrap else None
    if error is not None:
        click.echo(error, err=True)
    not_taken = refresh(servers, name, digest)
    for sentence in not_taken:
        click.echo(sentence, err=True)
    if as_json:
        body = {
            "alias": alias,
            "version": name,
            "stage": stage,
            "announced": bool(bootstrap and not error),
            "servers": len(servers) - len(not_taken),
        }
        print_json({**body, "state": state.model_dump(exclude_none=True)})
    else:
        click.echo(words.format(alias=alias, version=name))
    if error or not_taken:
        raise SystemExit(1)


def _message(registry: Path, version: str, sha256: str, stage: Stage, percent: float) -> Any:
    from topics.messages import ModelReleased

    uri = (registry / "versions" / version).resolve().as_uri()
    return ModelReleased(version=version, uri=uri, sha256=sha256, stage=stage, traffic_percent=percent)
