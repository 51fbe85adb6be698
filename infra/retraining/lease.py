"""One retraining of an alias at a time: a lease in Redis whose token fences the registry.

Redis says who may begin; the fence in the registry (`compression.releases.fence`) says who may promote, so
that a holder that was paused past its lease, or cut off from Redis, cannot undo what a later one has done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from compression.releases.fence import Fence, Superseded
from features import keys

TTL_S: Final = 30.0
_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.2
_SCRIPT: Final = Path(__file__).with_name("lease.lua").read_text()

log = logging.getLogger(__name__)


class LeaseHeld(RuntimeError):
    """Another process retrains this alias."""


class LeaseUnavailable(ConnectionError):
    """Redis does not say who holds the lease."""


class Lease:
    """Held from `with` to its end, renewed by a thread three times a lifetime.

    `patience_s` is how long one that is held is waited for: a process that was killed leaves its own behind.
    `check` is cheap and to be called often; `changing` surrounds each change of the registry. Both raise
    `Superseded` once the lease is another's. While Redis is away the lease is held until it would have
    run out, by this process's clock.
    """

    def __init__(
        self,
        url: str,
        registry: Path,
        alias: str,
        *,
        ttl_s: float = TTL_S,
        patience_s: float = 0.0,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = redis.Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._alias = alias
        self._fence = Fence(registry, alias)
        self._keys = (keys.retraining_lease(alias), keys.retraining_token(alias))
        self._ttl_s = ttl_s
        self._patience_s = patience_s
        self._stopping = stopping
        self._until_s = 0.0
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.token = 0

    def __enter__(self) -> Self:
        asked_s = self._take()
        self._until_s = asked_s + self._ttl_s
        try:
            # From now on a holder from before is shut out of the registry, too.
            with self._fence.passed(self.token):
                pass
        except BaseException:
            self._give()
            raise
        self._renewing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewing.join(2 * _TIMEOUT_S)
        self._give()
        self._client.close()

    def check(self) -> None:
        """Nothing while the lease is ours, `Superseded` from when it is not."""
        if not self._lost.is_set() and time.monotonic() > self._until_s:
            # The process was paused, or Redis has been away for long: ask before anything is done.
            self._ask()
        if self._lost.is_set():
            raise Superseded(f"the lease on retraining {self._alias} (token {self.token}) went to another")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Asks Redis and the registry; nobody with a later token gets in meanwhile."""
        self._ask()
        self.check()
        with self._fence.passed(self.token):
            yield

    def _take(self) -> float:
        """When the lease was asked for that was given; `LeaseHeld` once patience is at its end."""
        patient_until_s = time.monotonic() + self._patience_s
        while True:
            asked_s = time.monotonic()
            try:
                self.token = self._call("take", self._fence.seen())
            except redis.RedisError as error:
                raise LeaseUnavailable(f"Redis does not give the lease on {self._alias}: {error}") from None
            if self.token:
                return asked_s
            if asked_s >= patient_until_s or self._stopping():
                raise LeaseHeld(f"another process retrains {self._alias}: try again when it is through")
            time.sleep(_POLL_S)

    def _renew(self) -> None:
        while not self._ended.wait(self._ttl_s / 3) and not self._lost.is_set():
            self._ask(patient=True)

    def _ask(self, *, patient: bool = False) -> None:
        """Renew. Where Redis does not answer the lease counts as lost once it has run out, and not before."""
        asked_s = time.monotonic()
        try:
            ours = self._call("renew", self.token) == self.token
        except redis.RedisError as error:
            log.warning("the lease on retraining %s was not renewed: %s", self._alias, error)
            if not patient and asked_s > self._until_s:
                self._lost.set()
            return
        if ours:
            self._until_s = asked_s + self._ttl_s
        else:
            self._lost.set()

    def _give(self) -> None:
        try:
            self._call("give", self.token)
        except redis.RedisError as error:
            log.warning("the lease on retraining %s ends by itself: %s", self._alias, error)

    def _call(self, verb: str, token: int) -> int:
        told = (verb, str(int(self._ttl_s * 1000)), str(token))
        return int(self._client.eval(_SCRIPT, 2, *self._keys, *told))
