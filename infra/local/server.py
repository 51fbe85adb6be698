"""A server process of ours, found again by a later process through the file it leaves in its folder."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import psutil

from infra.ending import uninterrupted

HOST = "127.0.0.1"
_FIRST_PORT = 10_000


class ServerFailed(RuntimeError):
    """A local server did not start or did not stop; the message ends with the tail of its log."""


def free_port(*but: int) -> int:
    """A port nobody listens on, none of `but`, and none that the system gives to outgoing connections: a
    client that keeps trying a stopped server could be given the server's own port, and hold it."""
    while (port := random.randrange(_FIRST_PORT, _first_outgoing_port())) in but or not is_free(port):
        continue
    return port


def free_ports(count: int, *but: int) -> int:
    """The first of so many such ports that follow one another."""
    while True:
        first = free_port(*but)
        ports = range(first, first + count)
        if all(is_free(port) for port in ports) and not set(ports) & set(but):
            return first


def is_free(port: int) -> bool:
    """Whether a server could listen here now, on this machine's loopback and on all addresses."""
    for host in (HOST, ""):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True


def _first_outgoing_port() -> int:
    setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(setting.read_text().split()[0]) if setting.is_file() else 32768
    return max(first, _FIRST_PORT + 1000)


class LocalServer(ABC):
    """Start, stop and break one server whose data live in `data_dir`.

    The process outlives the one that started it: `stop` it, or use it as a context manager. A new
    object on the same folder finds the running process. Restarting keeps the port and the data.
    """

    name: str

    def __init__(self, data_dir: Path, *, port: int | None = None) -> None:
        self.data_dir = data_dir.resolve()
        self.log_path = self.data_dir / f"{self.name}.log"
        self._run_file = self.data_dir / "run.json"
        self._child: subprocess.Popen[bytes] | None = None
        self.port = port or self._recorded_port() or free_port()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def known(self) -> bool:
        """Whether it was ever started in this folder; before that its port is a guess."""
        return self._run_file.is_file()

    @property
    def pid(self) -> int | None:
        """The running process, None where there is none."""
        process = self._process()
        return process.pid if process else None

    def start(self, *, timeout_s: float = 60.0) -> Self:
        """Return once it answers its protocol. Does nothing where it already runs."""
        if self._process():
            return self
        try:
            child = self.launch()
            deadline_s = time.monotonic() + timeout_s
            while not self._answers():
                if child.poll() is not None:
                    raise ServerFailed(f"{self.name} ended with {child.returncode}{self._log_tail()}")
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"{self.name} did not answer in {timeout_s:.0f} s{self._log_tail()}")
                time.sleep(0.05)
        except BaseException:
            # Nobody stops what was not started; a Ctrl-C comes here, too.
            self.kill()
            raise
        return self

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process and do not wait for it to answer."""
        # Otherwise the stranger that listens there might answer for ours.
        if not is_free(self.port):
            raise ServerFailed(f"port {self.port} for {self.name} is taken by another program")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        argv = self._command()
        with uninterrupted(), self.log_path.open("ab") as log:
            child = self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            process = psutil.Process(child.pid)
            record = {"pid": process.pid, "created_s": process.create_time(), "port": self.port}
            self._run_file.write_text(json.dumps(record))
        return child

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """SIGTERM and wait; SIGKILL past the timeout. The data stay. Does nothing where none runs."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        if not self._gone(timeout_s):
            self.kill()

    def kill(self) -> None:
        """SIGKILL, as a crash does it."""
        self._signal(signal.SIGKILL)
        if not self._gone(10.0):
            raise ServerFailed(f"{self.name} (process {self.pid}) survives SIGKILL")

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    @abstractmethod
    def _command(self) -> list[str]:
        """Prepare the folder and give the command line."""

    @abstractmethod
    def _answers(self) -> bool:
        """One quick attempt at the protocol."""

    def _process(self) -> psutil.Process | None:
        """The process that the run file names, if it is still that one: pids are used again."""
        try:
            record = json.loads(self._run_file.read_text())
            process = psutil.Process(record["pid"])
            same = abs(process.create_time() - record["created_s"]) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def _recorded_port(self) -> int | None:
        if not self._run_file.is_file():
            return None
        port: int = json.loads(self._run_file.read_text())["port"]
        return port

    def _signal(self, number: signal.Signals) -> None:
        process = self._process()
        if process:
            process.send_signal(number)

    def _gone(self, timeout_s: float) -> bool:
        process = self._process()
        if process:
            try:
                process.wait(timeout_s)
            except psutil.TimeoutExpired:
                return False
        if self._child:
            self._child.wait()
            self._child = None
        return True

    def _log_tail(self, lines: int = 12) -> str:
        """The last lines that say something: a Java stack would push out the sentence above it."""
        if not self.log_path.is_file():
            return ""
        said = self.log_path.read_text(errors="replace").splitlines()
        return "".join(f"\n  {line}" for line in [line for line in said if line[:1] != "\t"][-lines:])
