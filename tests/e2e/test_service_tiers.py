"""The story of a crowd: two workers share a tier's rate, and the tier above notices nothing."""

from __future__ import annotations

import time

from click.testing import CliRunner

from infra.bench.load import poisson, records, send
from infra.clients import everything, reader
from infra.commands.tiers import tiers
from tests.support import eventually
from topics.codec import decode_recommendation
from topics.messages import BehaviorEvent

RATE, BURST, SHARE = 10, 40, 0.25
ENVIRONMENT = {
    "ADMISSION_TIERS": f'[{{"name":"free","rate":{RATE},"burst":{BURST}}},{{"name":"premium"}}]',
    "ADMISSION_DEFAULT_TIER": "free",
    "ADMISSION_LEASE_SHARE": str(SHARE),
}
USERS, PREMIUM = range(1, 41), (3, 17)
CLICKS = 600


def test_two_workers_hold_one_tier_to_its_rate_and_every_click_has_a_list(parts, start_worker):
    workers = [start_worker(environment=ENVIRONMENT) for _ in range(2)]
    for user in PREMIUM:
        told = CliRunner().invoke(
            tiers, ["set", str(user), "premium", "--redis-url", parts.redis.url], env=ENVIRONMENT
        )
        assert told.exit_code == 0, told.output
    now_s = int(time.time())
    events = [
        BehaviorEvent(
            event_id=str(n),
            user_id=USERS[n % 40],
            item_id=n + 1,
            category_id=1,
            behavior="pv",
            timestamp=now_s,
        )
        for n in range(CLICKS)
    ]
    started_s = time.time()
    send(parts.kafka.bootstrap, parts.topics.clicks, records(events), poisson(CLICKS, 300.0, seed=3))
    eventually(lambda: sum(worker.metric("tailrace_lists_total") for worker in workers) >= CLICKS, 60.0)
    span_s = time.time() - started_s

    consumer = reader(parts.kafka.bootstrap, parts.topics.recommendations)
    lists = [decode_recommendation(record.value, record.headers) for record in everything(consumer)]
    consumer.close()
    assert len({body.recommendation_id for body in lists}) == CLICKS
    premium = [body for body in lists if body.user_id in PREMIUM]
    free = [body for body in lists if body.user_id not in PREMIUM]
    assert {body.degraded for body in premium} == {None}
    ranked = sum(body.degraded is None for body in free)
    assert BURST * SHARE <= ranked <= RATE * span_s + BURST + 2 * SHARE * BURST
    assert all(worker.metric("tailrace_lists_total") for worker in workers)
    shed = sum(worker.metric("tailrace_stream_shed_total") for worker in workers)
    assert shed == len(free) - ranked > 0
    assert all(worker.health()["healthy"] and worker.readiness()["ready"] for worker in workers)
