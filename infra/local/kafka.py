"""A real Kafka broker from Maven's jars: one KRaft node, broker and controller in one process."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

from compression.home import home
from infra.local.paths import INFRA
from infra.local.server import HOST, LocalServer, ServerFailed, free_port
from topics.admin import TopicsUnavailable, ping

POM = INFRA / "kafka" / "pom.xml"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=BROKER://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=BROKER://{host}:{port}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
controller.quorum.voters=1@{host}:{controller_port}
log.dirs={log_dir}
auto.create.topics.enable=false
num.partitions=1
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# After a crash the node's old registration must expire before it is let in again: 9 s by default.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=500
message.max.bytes={max_message_bytes}
log.cleaner.dedupe.buffer.size=8388608
num.network.threads=2
num.io.threads=4
"""


def kafka_version() -> str:
    """The broker's version, which only the pom states."""
    found = re.search(r"<kafka.version>([^<]+)<", POM.read_text())
    if found is None:
        raise ServerFailed(f"{POM} names no kafka.version")
    return found[1]


def jars_dir() -> Path:
    """Where this version's jars are, or will be. The name changes with the pom."""
    return home() / "kafka" / f"libs-{kafka_version()}"


def ensure_jars() -> Path:
    """The folder of the broker's jars, fetched by Maven the first time (about half a minute)."""
    target = jars_dir()
    if target.is_dir():
        return target
    maven = shutil.which("mvn")
    if maven is None:
        raise ServerFailed("Maven is not installed: apt-get install maven")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as fetching:
        jars = Path(fetching) / "libs"
        copied = subprocess.run(
            [
                *(maven, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"),
                *("-DincludeScope=runtime", f"-DoutputDirectory={jars}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if copied.returncode != 0:
            raise ServerFailed(f"Maven could not fetch the broker's jars:\n{copied.stdout[-2000:]}")
        try:
            jars.rename(target)
        except OSError:
            # Somebody else fetched them meanwhile: theirs are as good.
            if not target.is_dir():
                raise
    return target


class LocalKafka(LocalServer):
    """`bootstrap` is its address. `jars` defaults to `ensure_jars()`, `heap_mb` bounds the Java heap."""

    name = "kafka"

    def __init__(
        self, data_dir: Path, *, port: int | None = None, jars: Path | None = None, heap_mb: int = 512
    ) -> None:
        super().__init__(data_dir, port=port)
        self._jars = jars
        self._heap_mb = heap_mb
        self._properties = self.data_dir / "server.properties"

    @property
    def bootstrap(self) -> str:
        return self.address

    def _command(self) -> list[str]:
        # Written at each start: nothing in it but the ports can differ, and Kafka keeps neither.
        self._properties.write_text(
            _PROPERTIES.format(
                host=HOST,
                port=self.port,
                controller_port=free_port(self.port),
                log_dir=self.data_dir / "log",
                max_message_bytes=MAX_MESSAGE_BYTES,
            )
        )
        if not (self.data_dir / "log" / "meta.properties").is_file():
            self._format()
        return [
            *self._java(),
            f"-Xmx{self._heap_mb}m",
            "-XX:+UseSerialGC",
            # The optimising compiler keeps a small machine busy for the broker's first minute.
            "-XX:TieredStopAtLevel=1",
            "-Djava.awt.headless=true",
            "kafka.Kafka",
            str(self._properties),
        ]

    def _format(self) -> None:
        # Kafka's ids are UUIDs in URL-safe base64; one that begins with "-" reads as an option.
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode().replace("-", "A")
        formatted = subprocess.run(
            [
                *(*self._java(), "-XX:TieredStopAtLevel=1", "kafka.tools.StorageTool", "format"),
                *("-t", cluster_id, "-c", str(self._properties)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if formatted.returncode != 0:
            raise ServerFailed(f"kafka could not format {self.data_dir}:\n{formatted.stderr[-2000:]}")

    def _java(self) -> list[str]:
        java = shutil.which("java", path=_java_path())
        if java is None:
            raise ServerFailed("Java is not installed: apt-get install openjdk-17-jre-headless")
        jars = self._jars or ensure_jars()
        return [java, "-cp", f"{jars}/*", f"-Dlog4j2.configurationFile={INFRA / 'kafka' / 'log4j2.xml'}"]

    def _answers(self) -> bool:
        try:
            ping(self.bootstrap, timeout_s=5.0)
        except TopicsUnavailable:
            return False
        return True


def _java_path() -> str:
    """PATH with $JAVA_HOME/bin in front, as Java's own tools search."""
    path = os.environ.get("PATH", "")
    java_home = os.environ.get("JAVA_HOME")
    return f"{java_home}/bin{os.pathsep}{path}" if java_home else path
