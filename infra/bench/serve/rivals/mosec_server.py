"""mosec: a Rust front before worker processes. One stage; batches form in the front."""

from __future__ import annotations

import sys

from mosec import Server, Worker

from infra.bench.serve.rivals.session import MAX_BATCH, PORT, WAIT_MS, WORKERS, Ranker


class Rank(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._ranker = Ranker()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    # A worker that takes single requests is handed a value, not a list.
    def forward(self, data: list[bytes] | bytes) -> list[bytes] | bytes:
        return self._ranker.rank(data) if isinstance(data, list) else self._ranker.rank([data])[0]


if __name__ == "__main__":
    sys.argv += ["--port", str(PORT), "--address", "127.0.0.1", "--log-level", "warning"]
    server = Server()
    server.append_worker(Rank, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=int(WAIT_MS))
    server.run()
