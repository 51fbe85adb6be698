"""`tailrace models`: the versions there are, who serves, who is tried, and going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.commands import options

if TYPE_CHECKING:
    from compression.releases.aliases import AliasState
    from compression.releases.registry import Registry
    from topics.messages import Stage

Command = Callable[..., Any]

DEFAULT_SHADOW_PERCENT = 10.0

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_alias = click.option(
    "--alias", envvar="STREAM_ALIAS", default="serving", show_default=True, help="Whose versions these are."
)


def _announcing(command: Command) -> Command:
    """Options of a command that changes a stage."""
    for option in (
        _json,
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
        _alias,
        options.registry,
    ):
        command = option(command)
    return command


@click.group()
def models() -> None:
    """Released versions: which there are, who serves, who is tried, and going back.

    A change is written into the registry's alias. Running workers and servers look at it every two
    seconds (STREAM_ALIAS_POLL_S, SERVE_ALIAS_POLL_S), load, check and switch without a restart;
    --bootstrap tells the workers at once, --server a server.

    \b
    tailrace models list
    tailrace models canary 20171203T101500-3f9c --percent 5 --bootstrap localhost:9092
    tailrace models promote 20171203T101500-3f9c --bootstrap localhost:9092
    tailrace models rollback --bootstrap localhost:9092
    """


@models.command(name="list")
@options.registry
@_alias
@_json
def list_(*, registry: Path, alias: str, as_json: bool) -> None:
    """Every version with its stage, accuracy, size and signature.

    \b
    tailrace models list
    tailrace models list --json | jq -r '.versions[] | select(.stage == "serving") | .version'
    """
    from infra.console import console

    with _sentences():
        found = _registry(registry)
        state = found.state(alias)
        rows = [_row(found, version, state) for version in found.versions()]
    if as_json:
        _print_json({"registry": str(registry), "alias": alias, "versions": rows})
        return
    if not rows:
        click.echo(f"no versions in {registry}; `tailrace retrain --log FILE` publishes one")
        return
    from rich.table import Table

    table = Table(title=f"{registry}, alias {alias}", title_justify="left")
    for name in ("version", "stage", "created", "HR@10", "NDCG@10 of 50", "MB", "signature"):
        table.add_column(name, justify="right" if name in ("HR@10", "NDCG@10 of 50", "MB") else "left")
    for row in rows:
        if "error" in row:
            table.add_row(row["version"], "[red]cannot be read[/]", "", "", "", "", "")
            continue
        table.add_row(
            row["version"],
            _stage_words(row),
            row["created_at"],
            _figure(row["hr@10"]),
            _figure(row["ndcg@10_50"]),
            f"{row['bytes'] / 1e6:.1f}",
            _signature_words(row["signature"]),
        )
    console().print(table)


@models.command()
@click.argument("version")
@options.registry
@_alias
@_json
def show(*, version: str, registry: Path, alias: str, as_json: bool) -> None:
    """What VERSION (or an alias) is, where it came from and how good it was.

    \b
    tailrace models show serving
    tailrace models show 20171203T101500-3f9c --json | jq .manifest.metrics
    """
    from infra.console import console

    with _sentences():
        found = _registry(registry)
        name = found.resolve(version)
        manifest = found.manifest(name)
        row = _row(found, name, found.state(alias))
        digest = found.manifest_sha256(name)
    if as_json:
        _print_json({**row, "manifest_sha256": digest, "manifest": manifest.model_dump(mode="json")})
        return
    from rich.table import Table

    table = Table(title=name, title_justify="left", show_header=False)
    shape, data = manifest.model, manifest.data
    for label, value in (
        ("stage", _stage_words(row) or "-"),
        ("created", manifest.created_at),
        ("parent", manifest.parent or "-"),
        ("signature", _signature_words(row["signature"])),
        ("manifest SHA-256", digest),
        ("network", f"{shape.layers} layers, {shape.dim} wide, {shape.item_rows:,} item rows"),
        ("trained on", f"{data.get('log', '-')}: {data.get('events', 0):,} events"),
        ("HR@10, NDCG@10 of 50", f"{_figure(row['hr@10'])}, {_figure(row['ndcg@10_50'])}"),
        ("git revision", manifest.git_revision or "-"),
        ("files", ", ".join(f"{file} {entry.bytes / 1e6:.2f} MB" for file, entry in manifest.files.items())),
    ):
        table.add_row(label, value)
    console().print(table)


@models.command()
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


@models.command()
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


@models.command()
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


@models.command()
@_announcing
def rollback(**told: Any) -> None:
    """Let the version before serve again, for all users. Workers keep it warm, so this takes effect
    at once.

    \b
    tailrace models rollback --bootstrap localhost:9092
    """
    with _sentences():
        state = _registry(told["registry"]).state(told["alias"])
        before = state.serving if state else None
    _change(
        state.previous.version if state and state.previous else None,
        lambda registry, alias: registry.rollback(alias),
        stage="serving",
        words="{alias} stands for {version} again",
        rolled_back=before,
        **told,
    )


@models.command()
@click.argument("version", required=False)
@options.registry
@_json
def verify(*, version: str | None, registry: Path, as_json: bool) -> None:
    """Check signature and every file of VERSION, or of all versions; ends with 1 if one is not whole.

    \b
    tailrace models verify
    tailrace models verify serving --json
    """
    with _sentences():
        found = _registry(registry)
        names = [found.resolve(version)] if version else found.versions()
    rows = [_verified(found, name) for name in names]
    if as_json:
        _print_json({"registry": str(registry), "versions": rows})
    else:
        for row in rows:
            signed = _signature_words(row["signature"]) if row["valid"] else ""
            click.echo(f"{row['version']}  {'whole, ' + signed if row['valid'] else row['error']}")
        if not rows:
            click.echo(f"no versions in {registry}")
    if not all(row["valid"] for row in rows):
        raise SystemExit(1)


@models.command()
@click.argument("version")
@options.registry
@_json
def sign(*, version: str, registry: Path, as_json: bool) -> None:
    """Sign a version that was published without a signature, once its files have been checked.

    \b
    TAILRACE_SIGNING_KEY=.tailrace/signing-key.pem tailrace models sign 20171203T101500-3f9c
    """
    with _sentences():
        found = _registry(registry)
        name = found.resolve(version)
        key_id = found.sign(name)
    if as_json:
        _print_json({"version": name, "key_id": key_id})
    else:
        click.echo(f"{name} is signed by key {key_id[:16]}")


@models.command()
@click.option(
    "--private",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the private key goes; .tailrace/signing-key.pem otherwise.",
)
@click.option(
    "--trusted",
    type=click.Path(path_type=Path),
    help="Folder or file that the public key joins; what TAILRACE_TRUSTED_KEYS names otherwise.",
)
@_json
def keygen(*, private: Path | None, trusted: Path | None, as_json: bool) -> None:
    """Make an Ed25519 key pair. From then on only signed versions are used on this machine.

    \b
    tailrace models keygen
    export TAILRACE_SIGNING_KEY=.tailrace/signing-key.pem
    tailrace models sign serving
    """
    from compression.releases.signing import generate

    with _sentences():
        try:
            pair = generate(private, trusted)
        except OSError as error:
            raise click.ClickException(str(error)) from None
    if as_json:
        _print_json({"key_id": pair.key_id, "private": str(pair.private), "public": str(pair.public)})
        return
    click.echo(f"key {pair.key_id[:16]}")
    click.echo(f"private  {pair.private}: keep it where models are trained")
    click.echo(f"public   {pair.public}: copy it to every machine that serves")
    click.echo("Unsigned versions are refused here from now on. Next:")
    click.echo(f"  export TAILRACE_SIGNING_KEY={pair.private}")
    click.echo("  tailrace models sign serving")


# -------------------------------------------------------------------------------------------------


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
    """Verify, change the alias, announce, say so; ends with 1 where a server does not take it."""
    from infra.announce import announce
    from infra.servers import refresh
    from topics.messages import ModelReleased

    with _sentences():
        found = _registry(registry)
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
        _print_json({**body, "state": state.model_dump(exclude_none=True)})
    else:
        click.echo(words.format(alias=alias, version=name))
    if not_taken:
        raise SystemExit(1)


def _message(registry: Path, version: str, sha256: str, stage: Stage, percent: float) -> Any:
    from topics.messages import ModelReleased

    uri = (registry / "versions" / version).resolve().as_uri()
    return ModelReleased(version=version, uri=uri, sha256=sha256, stage=stage, traffic_percent=percent)


def _registry(root: Path) -> Registry:
    from compression.releases.registry import Registry

    return Registry(root)


@contextmanager
def _sentences() -> Iterator[None]:
    """What is wrong with a version or a wish is a sentence, not a traceback."""
    from compression.errors import ArtefactInvalid, ReleaseRefused

    try:
        yield
    except (ArtefactInvalid, ReleaseRefused) as error:
        raise click.ClickException(str(error)) from None


def _row(registry: Registry, version: str, state: AliasState | None) -> dict[str, Any]:
    """A version in a few fields; `error` instead of most of them where its manifest cannot be read."""
    from compression.errors import ArtefactInvalid

    try:
        manifest = registry.manifest(version)
    except ArtefactInvalid as error:
        return {"version": version, "error": str(error)}
    stage = state.stages().get(version) if state else None
    trial = {"canary": state.canary, "shadow": state.shadow}.get(stage or "") if state else None
    metrics = manifest.metrics
    return {
        "version": version,
        "stage": stage,
        "percent": trial.percent if trial else None,
        "created_at": manifest.created_at,
        "parent": manifest.parent,
        "hr@10": metrics.get("retrieval", {}).get("hr@10"),
        "ndcg@10_50": metrics.get("ranking_50", {}).get("ndcg@10"),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "signature": _signature(registry, version),
    }


def _signature(registry: Registry, version: str) -> dict[str, Any]:
    from compression.errors import ArtefactInvalid

    try:
        return {"key_id": registry.signed_by(version), "error": None}
    except ArtefactInvalid as error:
        return {"key_id": None, "error": str(error)}


def _verified(registry: Registry, version: str) -> dict[str, Any]:
    from compression.errors import ArtefactInvalid

    try:
        artefact = registry.open(version, kind=None)
        artefact.vocabulary()
        if artefact.manifest.kind == "ranking":
            artefact.item_table()
    except ArtefactInvalid as error:
        return {"version": version, "valid": False, "error": str(error), "signature": None}
    return {
        "version": version,
        "valid": True,
        "error": None,
        "signature": _signature(registry, version),
        "files": len(artefact.manifest.files),
        "bytes": sum(entry.bytes for entry in artefact.manifest.files.values()),
    }


def _stage_words(row: dict[str, Any]) -> str:
    stage = row["stage"] or ""
    return f"{stage} {row['percent']:g} %" if row["percent"] is not None else stage


def _signature_words(signature: dict[str, Any]) -> str:
    if signature["error"]:
        return "refused"
    return f"signed by {signature['key_id'][:16]}" if signature["key_id"] else "not signed"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print_json(value: dict[str, Any]) -> None:
    import orjson

    click.echo(orjson.dumps(value).decode())
