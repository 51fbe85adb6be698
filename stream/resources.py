"""Everything a worker holds open, opened and closed in order."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from features.redis_store import RedisStore
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from features.store import StoreUnavailable
from inference.admission.control import Admission
from inference.admission.load import LoadProbe
from inference.admission.settings import AdmissionSettings
from inference.plane import Plane
from inference.releases.serving import ServingModel
from inference.settings import InferenceSettings
from stream.delivery import Backoff, Delivery
from stream.feeder import Feeder, HandOver
from stream.metrics import StreamMetrics
from stream.recommend import RequestPath
from stream.settings import StreamSettings
from stream.web import serve
from topics.admin import topic_epochs

log = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 2.0
# Of a click's deadline, waiting for an engine.
QUEUE_SHARE = 0.5


class Resources:
    """Store, model, producers, feeder and probes of one worker.

    Opening order is dependency order; closing is the reverse, after the work in hand is drained.
    """

    def __init__(
        self,
        stream: StreamSettings,
        features: FeatureSettings,
        inference: InferenceSettings,
        admission: AdmissionSettings | None = None,
    ) -> None:
        self.settings = stream
        self.metrics = StreamMetrics()
        self.store = RedisStore(stream.redis_url, settings=features)
        self.statistics = ItemStatistics(self.store, settings=features)
        self.model = ServingModel(
            Plane(inference, features, self.statistics),
            stream.releases,
            self.metrics.releases,
            switched=lambda held: self.metrics.releases.serves(held.version, held.opened.engine),
        )
        self.admission = admission_of(stream, admission or AdmissionSettings())
        self.load = LoadProbe(self.admission, self.metrics)
        backoff = Backoff(stream.retry_min_ms / 1000, stream.retry_max_ms / 1000)
        self.results = Delivery(stream.bootstrap, backoff)
        self.dead_letters = Delivery(stream.bootstrap, backoff, idempotent=False)
        self.path = RequestPath(
            store=self.store,
            statistics=self.statistics,
            ranking=self.model,
            admission=self.admission,
            results=self.results,
            dead_letters=self.dead_letters,
            settings=stream,
            metrics=self.metrics,
        )
        self.hand_over: dict[str, HandOver] = {}
        self.feeder: Feeder | None = None
        self.http_port = 0
        self._runner: web.AppRunner | None = None
        self._loaded = False
        self._frozen = False

    async def open(self) -> None:
        """Open everything but the tap; `tasks` starts consuming into `hand_over`."""
        self._runner, self.http_port = await serve(
            self, self.metrics.registry, self.settings.http_host, self.settings.http_port
        )
        log.info("Probes and metrics on http://%s:%d", self.settings.http_host, self.http_port)
        await self.results.start()
        await self.dead_letters.start()
        await self.load_model()
        self._loaded = True
        await self._maintain_statistics_once()
        await self.admission.leases.renew()
        # Late: of a topic that was made anew meanwhile, ids and fences need the new epoch.
        epochs = await asyncio.to_thread(topic_epochs, self.settings.bootstrap, list(self.hand_over))
        self.feeder = Feeder(
            settings=self.settings, epochs=epochs, hand_over=self.hand_over, metrics=self.metrics
        )
        await self.feeder.start()

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """What runs as long as the worker does. If one ends with an error, so does the worker."""
        assert self.feeder is not None
        tasks = [
            self.feeder.run(),
            self.feeder.commit_periodically(),
            self._maintain_statistics(),
            self.load.run(),
        ]
        if self.settings.alias_poll_s:
            tasks.append(self.model.watch(self.settings.alias_poll_s, self.load_model))
        return [*tasks, self.admission.leases.run()] if self.admission.leases.any_limit else tasks

    async def load_model(self, announced: str | None = None, sha256: str | None = None) -> None:
        """Serve what the alias names now, checked against the announcement if there is one."""
        if await self.model.load(announced, sha256) and not self._frozen:
            # Once: a collection stops all threads for as long as it takes, and a version that is
            # freed later is in no cycle that only a collection would find.
            gc.collect()
            gc.freeze()
            self._frozen = True

    async def _maintain_statistics(self) -> None:
        """Write what was observed, read what is popular; a Redis that is away is tried again."""
        flush_s = self.settings.flush_interval_ms / 1000
        elapsed_s = 0.0
        while True:
            await asyncio.sleep(flush_s)
            elapsed_s += flush_s
            try:
                await self.statistics.flush()
                if elapsed_s >= REFRESH_INTERVAL_S:
                    await self.statistics.refresh()
                    elapsed_s = 0.0
            except StoreUnavailable as error:
                log.info("Item statistics wait for Redis: %s", error)
            except Exception:
                # Lists are poorer without them, and there all the same.
                log.exception("Item statistics are not kept up")

    async def _maintain_statistics_once(self) -> None:
        try:
            await self.statistics.refresh()
        except StoreUnavailable as error:
            log.warning("Starting without item statistics: %s", error)
        except Exception:
            log.exception("Starting without item statistics")

    async def drain(self) -> None:
        """Stop reading, answer and commit what is in hand, within the drain timeout."""
        if self.feeder is not None:
            await self.feeder.drain()
        left = await self.path.drain(0.0)
        if left:
            log.warning("%d units were not answered in time; they will be read again", left)

    async def close(self) -> None:
        stopping = [self.results.stop(), self.dead_letters.stop()]
        if self.feeder is not None:
            stopping.append(self.feeder.stop())
        for error in await asyncio.gather(*stopping, return_exceptions=True):
            if error is not None:
                log.warning("Not closed in order: %r", error)
        await self.model.close()
        try:
            await self.statistics.flush()
        except StoreUnavailable as error:
            log.info("The last item statistics were not written: %s", error)
        await self.admission.leases.close()
        await self.store.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def left(self) -> str:
        """What is in hand, in words. Callable from any thread."""
        records = self.feeder.in_flight if self.feeder else 0
        return f"{records} records in hand, which their next owner reads again"

    def models(self) -> dict[str, object]:
        """Which versions answer whom, and what comparing them has found."""
        return self.model.describe()

    # Probes ------------------------------------------------------------------------------------

    def health(self) -> dict[str, object]:
        stalled_s = self.feeder.stalled_s() if self.feeder else 0.0
        # A restart brings no Redis back: that is for /readyz to say.
        waits_for_store = self.path.waits_for_store
        return {
            "healthy": stalled_s * 1000 < self.settings.stall_ms or waits_for_store,
            "waits_for": "redis" if waits_for_store else None,
            "stalled_s": round(stalled_s, 3),
            "in_flight": self.feeder.in_flight if self.feeder else 0,
            "lag": self.feeder.lag if self.feeder else 0,
        }

    async def readiness(self) -> dict[str, object]:
        """Ready means: the model (if one is released) is warmed, the group has assigned partitions,
        Redis answers."""
        redis = True
        try:
            await self.store.ping()
        except StoreUnavailable:
            redis = False
        assigned = self.feeder is not None and self.feeder.assigned.is_set()
        return {
            "ready": self._loaded and assigned and redis,
            "model": self.model.version or "none",
            "engine": self.model.engine or "none",
            "assigned": assigned,
            "redis": redis,
            "instance": self.settings.instance_id,
        }


def admission_of(stream: StreamSettings, settings: AdmissionSettings) -> Admission:
    """The admission control of a worker: what is left unset follows from the stream's own bounds."""
    return Admission.of(
        settings,
        # The feeder stops reading at max_in_flight and may have one more poll in hand then.
        ceiling=stream.max_in_flight + stream.poll_max_records,
        queue_target_ms=QUEUE_SHARE * stream.click_deadline_ms,
        redis_url=stream.redis_url,
    )
