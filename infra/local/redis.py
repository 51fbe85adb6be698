"""A private redis-server: own port, own folder, append-only file; one that is running is never touched."""

from __future__ import annotations

import shutil
import socket

from infra.local.paths import INFRA
from infra.local.server import HOST, LocalServer, ServerFailed


class LocalRedis(LocalServer):
    """`url` names database 0; the others are there as well."""

    name = "redis"

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def _command(self) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            raise ServerFailed("redis-server is not installed: apt-get install redis-server")
        settings = {"port": str(self.port), "bind": HOST, "dir": str(self.data_dir), "daemonize": "no"}
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [program, str(INFRA / "redis" / "redis.conf"), *options]

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                # While it reads its append-only file it answers -LOADING.
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
