"""The `tailrace` command. A subcommand's module is imported when that subcommand is asked for."""

from __future__ import annotations

from typing import Any

import click

from infra.lazy_group import LazyGroup

# name -> (module, one line for `tailrace --help`). The module holds a click command of that name.
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("infra.commands.local", "Start a real Kafka broker and Redis on this machine."),
    "down": ("infra.commands.local", "Stop what `up` started."),
    "status": ("infra.commands.local", "What runs here, and where."),
    "doctor": ("infra.commands.doctor", "What is missing on this machine, and how to get it."),
    "engines": ("infra.commands.engines", "Which engines are usable here, and why not."),
    "worker": ("infra.commands.worker", "The stream worker: clicks in, ranked lists out."),
    "serve": ("infra.commands.serve", "The inference server: gRPC and REST."),
    "replay": ("infra.commands.replay", "A Taobao-format log as a stream of clicks."),
    "watch": ("infra.commands.lists", "Follow the ranked lists."),
    "recommend": ("infra.commands.lists", "Ask for one user's list, once."),
    "dead-letters": ("infra.commands.dead_letters", "Clicks that could not be read: list, replay."),
    "tiers": ("infra.commands.tiers", "Service tiers: who is in which, and what each may use."),
    "synth": ("infra.commands.training", "A Taobao-format log with learnable structure."),
    "retrain": ("infra.commands.retraining", "Train and release a model, once or on a schedule."),
    "evaluate": ("infra.commands.training", "A model's accuracy on a log."),
    "models": ("infra.commands.models", "Released versions: canary, promote, roll back, verify."),
    "export": ("infra.commands.export", "A version for browsers, OpenVINO, TensorRT, phones."),
    "tune": ("infra.commands.tune", "Search for compressions that are fast, small and accurate."),
    "bench": ("infra.bench.cli", "Measure; each prints a table."),
}


class _Tailrace(LazyGroup):
    """The whole command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConnectionError as error:
            # A server that is not there is the machine's matter: a sentence, not a traceback.
            raise click.ClickException(str(error)) from error


@click.group(cls=_Tailrace, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tailrace")
def main() -> None:
    """Clicks in, ranked lists out, before the next click.

    \b
    tailrace doctor                        is everything here?
    tailrace up                            a Kafka broker and a Redis
    tailrace synth clicks.csv              a log to learn from
    tailrace retrain --log clicks.csv      a model
    tailrace worker                        the service
    tailrace replay clicks.csv --rate 200  clicks
    tailrace watch                         ranked lists
    """


if __name__ == "__main__":
    main()
