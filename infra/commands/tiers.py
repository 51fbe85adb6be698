"""`tailrace tiers`: who is in which service tier, and what the tiers may use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from infra.commands import options, settings
from topics.messages import MAX_ID

if TYPE_CHECKING:
    from features.store import FeatureStore
    from inference.admission.settings import AdmissionSettings

R = TypeVar("R")
USER = click.IntRange(0, MAX_ID)
TIMEOUT_MS = 5_000


@click.group()
def tiers() -> None:
    """Service tiers: when not everybody can have a ranked list, the lowest tier goes without first.

    Tiers and their limits are named by ADMISSION_TIERS; workers and this command must be told the same.

    \b
    tailrace tiers set 100234 premium
    tailrace tiers show 100234
    ADMISSION_TIERS='[{"name":"standard","rate":500},{"name":"gold"}]' tailrace tiers list-limits
    """


@tiers.command(name="set")
@click.argument("user", type=USER)
@click.argument("tier")
@options.redis_url
def set_(*, user: int, tier: str, redis_url: str) -> None:
    """Put USER into TIER, from the next click on, until told otherwise.

    \b
    tailrace tiers set 100234 premium
    tailrace tiers set 100234 free --redis-url redis://localhost:6379/0
    """
    known = [each.name for each in _settings().tiers]
    if tier not in known:
        raise click.BadParameter(f"{tier!r} is none of {', '.join(known)}", param_hint="TIER")
    _in_store(redis_url, lambda store: store.set_tier(user, tier))
    click.echo(f"user {user}: {tier}")


@tiers.command()
@click.argument("user", type=USER)
@options.redis_url
def clear(*, user: int, redis_url: str) -> None:
    """Take USER out of any tier, which leaves the default one.

    \b
    tailrace tiers clear 100234
    """
    _in_store(redis_url, lambda store: store.set_tier(user, None))
    click.echo(f"user {user}: {_settings().default_tier} (the default)")


@tiers.command()
@click.argument("user", type=USER)
@options.redis_url
@options.as_json
def show(*, user: int, redis_url: str, as_json: bool) -> None:
    """The tier of USER.

    \b
    tailrace tiers show 100234
    tailrace tiers show 100234 --json | jq -r .tier
    """
    limits = _settings()
    (found,) = _in_store(redis_url, lambda store: store.read([user]))
    is_known = found.tier in [tier.name for tier in limits.tiers]
    tier = found.tier if is_known else limits.default_tier
    if as_json:
        click.echo(json.dumps({"user_id": user, "tier": tier, "set_to": found.tier}))
        return
    why = (
        "" if is_known else " (the default)" if found.tier is None else f" ({found.tier!r} is not known here)"
    )
    click.echo(f"user {user}: {tier}{why}")


@tiers.command(name="list-limits")
@options.as_json
def list_limits(*, as_json: bool) -> None:
    """What each tier may use, the lowest first: lists a second and at once, of all its users and of each.

    \b
    tailrace tiers list-limits
    tailrace tiers list-limits --json
    """
    limits = _settings()
    if as_json:
        for tier in limits.tiers:
            click.echo(json.dumps(tier.model_dump() | {"default": tier.name == limits.default_tier}))
        return
    from rich.table import Table

    from infra.console import console

    table = Table("tier", "lists/s, all users", "at once", "lists/s, each user", "at once")
    for tier in limits.tiers:
        name = f"{tier.name} (default)" if tier.name == limits.default_tier else tier.name
        shared = (tier.rate, tier.most if tier.rate else None)
        table.add_row(name, *(_amount(value) for value in (*shared, tier.client_rate, tier.at_once)))
    console().print(table)


def _amount(value: float | None) -> str:
    return "unlimited" if value is None else f"{value:,g}"


def _settings() -> AdmissionSettings:
    from inference.admission.settings import AdmissionSettings

    return settings.read(AdmissionSettings)


def _in_store(redis_url: str, call: Callable[[FeatureStore], Awaitable[R]]) -> R:
    from features.redis_store import RedisStore
    from features.settings import FeatureSettings

    async def run() -> R:
        store = RedisStore(redis_url, settings=FeatureSettings(store_timeout_ms=TIMEOUT_MS))
        try:
            return await call(store)
        finally:
            await store.close()

    return asyncio.run(run())
