"""The subcommands of `tailrace`, imported by `infra.cli` when asked for."""
