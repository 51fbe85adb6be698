"""`tailrace models list`, `show` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.commands import options
from infra.commands.models.common import alias_option, registry_of, sentences
from infra.console import console, print_json

if TYPE_CHECKING:
    from compression.releases.aliases import AliasState
    from compression.releases.registry import Registry


@click.command(name="list")
@options.registry
@alias_option
@options.one_json
def list_(*, registry: Path, alias: str, as_json: bool) -> None:
    """Every version with its stage, accuracy, size and signature.

    \b
    tailrace models list
    tailrace models list --json | jq -r '.versions[] | select(.stage == "serving") | .version'
    """
    with sentences():
        found = registry_of(registry)
        state = found.state(alias)
        rows = [_row(found, version, state) for version in found.versions()]
    if as_json:
        print_json({"registry": str(registry), "alias": alias, "versions": rows})
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


@click.command()
@click.argument("version")
@options.registry
@alias_option
@options.one_json
def show(*, version: str, registry: Path, alias: str, as_json: bool) -> None:
    """What VERSION (or an alias) is, where it came from and how good it was.

    \b
    tailrace models show serving
    tailrace models show 20171203T101500-3f9c --json | jq .manifest.metrics
    """
    with sentences():
        found = registry_of(registry)
        name = found.resolve(version)
        manifest = found.manifest(name)
        row = _row(found, name, found.state(alias))
        digest = found.manifest_sha256(name)
    if as_json:
        print_json({**row, "manifest_sha256": digest, "manifest": manifest.model_dump(mode="json")})
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


@click.command()
@click.argument("version", required=False)
@options.registry
@options.one_json
def verify(*, version: str | None, registry: Path, as_json: bool) -> None:
    """Check signature and every file of VERSION, or of all versions; ends with 1 if one is not whole.

    \b
    tailrace models verify
    tailrace models verify serving --json
    """
    with sentences():
        found = registry_of(registry)
        names = [found.resolve(version)] if version else found.versions()
    rows = [_verified(found, name) for name in names]
    if as_json:
        print_json({"registry": str(registry), "versions": rows})
    else:
        for row in rows:
            signed = _signature_words(row["signature"]) if row["valid"] else ""
            click.echo(f"{row['version']}  {'whole, ' + signed if row['valid'] else row['error']}")
        if not rows:
            click.echo(f"no versions in {registry}")
    if not all(row["valid"] for row in rows):
        raise SystemExit(1)


commands: list[click.Command] = [list_, show, verify]


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
        artefact = registry.open(version, serves=False)
        artefact.vocabulary()
        if artefact.manifest.graphs:
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
