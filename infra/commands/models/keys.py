"""`tailrace models sign` and `keygen`."""

from __future__ import annotations

from pathlib import Path

import click

from infra.commands import options
from infra.commands.models.common import registry_of, sentences
from infra.console import print_json


@click.command()
@click.argument("version")
@options.registry
@options.one_json
def sign(*, version: str, registry: Path, as_json: bool) -> None:
    """Sign a version that was published without a signature, once its files have been checked.

    \b
    TAILRACE_SIGNING_KEY=.tailrace/signing-key.pem tailrace models sign 20171203T101500-3f9c
    """
    with sentences():
        found = registry_of(registry)
        name = found.resolve(version)
        key_id = found.sign(name)
    if as_json:
        print_json({"version": name, "key_id": key_id})
    else:
        click.echo(f"{name} is signed by key {key_id[:16]}")


@click.command()
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
@options.one_json
def keygen(*, private: Path | None, trusted: Path | None, as_json: bool) -> None:
    """Make an Ed25519 key pair. From then on only signed versions are used on this machine.

    \b
    tailrace models keygen
    export TAILRACE_SIGNING_KEY=.tailrace/signing-key.pem
    tailrace models sign serving
    """
    from compression.releases.signing import generate

    with sentences():
        try:
            pair = generate(private, trusted)
        except OSError as error:
            raise click.ClickException(str(error)) from None
    if as_json:
        print_json({"key_id": pair.key_id, "private": str(pair.private), "public": str(pair.public)})
        return
    click.echo(f"key {pair.key_id[:16]}")
    click.echo(f"private  {pair.private}: keep it where models are trained")
    click.echo(f"public   {pair.public}: copy it to every machine that serves")
    click.echo("Unsigned versions are refused here from now on. Next:")
    click.echo(f"  export TAILRACE_SIGNING_KEY={pair.private}")
    click.echo("  tailrace models sign serving")


commands: list[click.Command] = [sign, keygen]
