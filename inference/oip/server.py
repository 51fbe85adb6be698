"""The whole server: two fronts, the admin listener, and the versions behind them.

It listens at once, alive and not ready; it is ready when every bucket of every model is warmed. At the
end it says that it is not ready, finishes what is in hand, and closes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry

from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from features.store import StoreUnavailable
from inference.admission.load import LoadProbe
from inference.admission.settings import AdmissionSettings
from inference.admission.users import TierStore, UserTiers
from inference.errors import InferenceError, ModelUnavailable
from inference.oip import admin, dealt, rest, tls
from inference.oip.admin import is_loopback
from inference.oip.dealt import Dealt
from inference.oip.gate import Gate, GateMetrics, admission_of
from inference.oip.grpc_server import make_server
from inference.oip.list_model import ListModel
from inference.oip.listening import Http
from inference.oip.models import Catalogue
from inference.oip.service import Service
from inference.oip.settings import ServeSettings
from inference.oip.versions import Versions
from inference.plane import Plane
from inference.releases.held import Held
from inference.releases.metrics import ReleaseMetrics
from inference.releases.serving import ServingModel
from inference.releases.settings import ReleaseRules
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest

log = logging.getLogger(__name__)

_REFRESH_S = 5.0


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the server listens, once it does."""

    grpc: int
    http: int
    admin: int


class InferenceServer:
    """start → load → serve → close; or `async with`, which starts and closes."""

    def __init__(
        self,
        registry: Path,
        statistics: ItemStatistics,
        *,
        serve: ServeSettings | None = None,
        inference: InferenceSettings | None = None,
        features: FeatureSettings | None = None,
        token: str = "",
        alias: str = "serving",
        admission: AdmissionSettings | None = None,
        tiers: TierStore | None = None,
        redis_url: str | None = None,
        alone: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises `TlsInvalid` and `AdminRefused`. `token` is the admin listener's; `alias` may be a
        version. Without `tiers` every user has the
        default one; rates are shared with other processes through `redis_url`. `alone` is called when the
        process that dealt connections has gone."""
        self.settings = serve or ServeSettings()
        self._tls = tls.load(self.settings)
        # What follows what is read with appends, and nobody appends here: the weights were chosen for lists
        # that have it.
        inference = (inference or InferenceSettings()).model_copy(update={"fusion": 0.0})
        self.catalogue = Catalogue()
        self.service = Service(self.catalogue, max_requests=self.settings.max_requests)
        self._statistics = statistics
        self.metrics = CollectorRegistry()
        limits = admission or AdmissionSettings()
        self.admission = admission_of(limits, inference.max_queue, redis_url)
        users = UserTiers(
            tiers, self.admission.tiers, ttl_s=self.settings.tier_ttl_s, kept=limits.clients_kept
        )
        gauges = GateMetrics(self.metrics)
        gate = Gate(self.admission, users, gauges)
        self._load = LoadProbe(self.admission, gauges)
        self._released = ReleaseMetrics(self.metrics)
        self.releases = ServingModel(
            Versions(
                Plane(inference, features or FeatureSettings(), statistics), inference, self.catalogue, gate
            ),
            _rules(registry, alias, self.settings),
            self._released,
            switched=self._switched,
        )
        self.catalogue.route(ListModel(lambda: self.catalogue.serving, gate.lists(self._rank)))
        self._admin = admin.make_app(self.releases, self.metrics, self.settings, token)
        self._rest = rest.make_app(self.service, self.settings)
        self._grpc = make_server(self.service, self.settings)
        self._http: list[Http] = []
        self._dealt: Dealt | None = None
        self._alone = alone
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> Ports:
        """Listen on every port, before or after loading; where connections are dealt, on the admin's only.
        Raises `OSError` where one is taken."""
        settings = self.settings
        context = self._tls.context if self._tls else None
        http = await self._begin(self._rest, context)
        grpc_port, http_port = settings.grpc_port, settings.http_port
        if settings.dealt_fd is None:
            grpc_port = await self._start_grpc()
            http_port = await http.listen(settings.host, settings.http_port)
        else:
            self._grpc.begin(tls=self._tls.h2 if self._tls else None)
        # The admin listener's token does not travel in the clear.
        beyond = not is_loopback(settings.admin_host)
        guarded = await self._begin(self._admin, context if beyond else None)
        admin_port = await guarded.listen(settings.admin_host, settings.admin_port)
        if settings.dealt_fd is not None:
            line = socket.socket(fileno=settings.dealt_fd)
            self._dealt = Dealt(line, {dealt.GRPC: self._grpc, dealt.HTTP: http}, self._alone)
            self._dealt.begin()
        await self.admission.leases.renew()
        self._tasks += map(
            asyncio.create_task, (self._refresh(), self._load.run(), self.admission.leases.run())
        )
        self.ports = Ports(grpc_port, http_port, admin_port)
        return self.ports

    async def load(self) -> float:
        """Serve what the alias stands for, and be ready; seconds it took. From then on the alias is
        followed. Raises `ModelUnavailable` with the reason."""
        started_s = time.perf_counter()
        await self.releases.load()
        if self.releases.version is None:
            raise ModelUnavailable(self.releases.refusal or "no version serves")
        self.service.ready = True
        if self.settings.alias_poll_s:
            watching = self.releases.watch(self.settings.alias_poll_s, self.releases.load)
            self._tasks.append(asyncio.create_task(watching))
        return time.perf_counter() - started_s

    async def close(self) -> bool:
        """Refuse what is new, finish what is in hand; True where all of it was answered in time."""
        self.service.ready = False
        grace_s = self.settings.drain_timeout_ms / 1e3
        idle = await self.service.idle(grace_s)
        if not idle:
            log.warning("%d requests are given up", self.service.requests)
        if self._dealt is not None:
            await self._dealt.close()
        await self._grpc.stop(0.1)
        for http in self._http:
            await http.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.releases.close()
        await self.admission.leases.close()
        return idle

    def _switched(self, held: Held) -> None:
        self.catalogue.serve(held.version)
        self._released.serves(held.version, held.opened.engine)

    async def _rank(
        self, requests: Sequence[RankRequest], known: bool
    ) -> Sequence[RankedList | InferenceError]:
        return await self.releases.rank(requests, by_user=known)

    async def _start_grpc(self) -> int:
        host, port = self.settings.host, self.settings.grpc_port
        context = self._tls.h2 if self._tls else None
        try:
            return await self._grpc.start(host, port, tls=context)
        except OSError as error:
            raise OSError(f"gRPC cannot listen on {host}:{port}: {error}") from error

    async def _begin(self, app: web.Application, tls: SSLContext | None) -> Http:
        settings = self.settings
        http = Http(app, tls=tls, most=settings.max_connections, idle_s=settings.idle_timeout_ms / 1e3)
        await http.begin()
        self._http.append(http)
        return http

    async def _refresh(self) -> None:
        """What is popular, as the stream's workers learn it."""
        while True:
            try:
                await self._statistics.refresh()
            except StoreUnavailable as error:
                log.warning("What is popular is not known: %s", error)
            await asyncio.sleep(_REFRESH_S)


def _rules(registry: Path, alias: str, settings: ServeSettings) -> ReleaseRules:
    return ReleaseRules(
        registry=registry,
        alias=alias,
        check_requests=settings.check_requests,
        check_limit_s=settings.check_limit_ms / 1000,
        keep_previous=bool(settings.keep_previous),
    )
