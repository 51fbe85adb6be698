"""BentoML: its adaptive batching, in as many workers as told.

A batchable method of a public service takes JSON, multipart or nothing; so the raw body travels as one
base64 string, which costs its parser less than numbers would.
"""

# No `from __future__ import annotations`: BentoML reads the annotations as they stand.
import base64
import sys

import bentoml

from infra.bench.serve.rivals.session import MAX_BATCH, PORT, WORKERS, Ranker


@bentoml.service(
    workers=WORKERS,
    threads=1,
    traffic={"timeout": 30},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Rank:
    def __init__(self) -> None:
        self._ranker = Ranker()

    @bentoml.api(batchable=True, max_batch_size=max(2, MAX_BATCH))
    def rank(self, bodies: list[str], /) -> list[str]:
        scores = self._ranker.rank([base64.b64decode(body) for body in bodies])
        return [base64.b64encode(answer).decode() for answer in scores]


if __name__ == "__main__":
    from bentoml_cli.cli import cli

    target = "infra.bench.serve.rivals.bentoml_server:Rank"
    sys.argv[1:] = ["serve", target, "--host", "127.0.0.1", "--port", str(PORT)]
    cli()
