"""Where the processes of a training come from: started here, or by torchrun.

    Local(2)                   this process and one it starts, for as long as the training lasts
    Launched(torchrun_place()) every process was started by torchrun, on one machine or several

Processes talk through gloo, over loopback where they were started here. It does not know who calls: several
machines need a network that nobody else is on.

    python -m compression.training.processes RENDEZVOUS RANK SIZE DEVICE      a process that `Local` starts
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as rendezvous_at

from compression.training.checkpoint import Stopped
from compression.training.group import ALONE, Group
from compression.training.train import assist

MAX_PROCESSES: Final = 64
# A process that dies is noticed at once, by its connection; this is for one that hangs.
_HANGS_S: Final = 1_800.0
_STARTS_S: Final = 120.0
_ENDS_S: Final = 10.0
# Reading a log comes before training, and takes what it takes.
_READING_S: Final = 86_400.0
_BEGIN: Final = "tailrace/begin"
_PR_SET_PDEATHSIG: Final = 1
_LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"


class ProcessesInvalid(ValueError):
    """The environment names no place among processes; the sentence says why."""


class ProcessLost(RuntimeError):
    """A process of the training ended before it; the sentence says which and how."""


class Team(Protocol):
    """The processes of a training. `size` decides, with the seed, what comes of it."""

    @property
    def size(self) -> int: ...

    def joined(self) -> AbstractContextManager[Group]:
        """Around the training, in the process that leads."""
        ...


class Local:
    """This process and `size` - 1 that it starts. Each has its part of the threads that this one had."""

    def __init__(self, size: int = 1, device: str = "cpu") -> None:
        self.size, self._device = size, device

    @contextmanager
    def joined(self) -> Iterator[Group]:
        if self.size == 1:
            yield ALONE if self._device == "cpu" else Group(device=self._device)
            return
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory(prefix="tailrace-training-") as folder:
            children = _Children(Path(folder), self.size, self._device)
            try:
                torch.set_num_threads(max(1, threads // self.size))
                children.await_all()
                with _process_group(children.rendezvous, 0, self.size, self._device):
                    yield Group(0, self.size, _device_of(self._device, 0))
                children.await_end()
            except Stopped:
                children.await_end()
                raise
            except ProcessLost:
                raise
            except RuntimeError as error:
                # Only what a sum or broadcast says is of another process: after any other error here the
                # others lose their connection, and end too.
                if gone := _gone(error):
                    raise ProcessLost(children.lost() or gone) from error
                raise
            finally:
                children.close()
                torch.set_num_threads(threads)


class _Children:
    """The processes that lend a hand, each with a file for its complaints."""

    def __init__(self, folder: Path, size: int, device: str) -> None:
        self.rendezvous = folder / "rendezvous"
        self._folder = folder
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        ours = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
        for rank in range(1, size):
            command = [sys.executable, "-m", "compression.training.processes", str(self.rendezvous)]
            with self._complaints(rank).open("wb") as complaints:
                # A session of its own: Ctrl-C is for the process that leads, which tells the others.
                self._started[rank] = subprocess.Popen(
                    [*command, str(rank), str(size), device],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    env={**os.environ, "PYTHONPATH": paths},
                    start_new_session=True,
                )

    def await_all(self) -> None:
        """Until each has come to the rendezvous."""
        ends_s = time.monotonic() + _STARTS_S
        while not all(_ready(self.rendezvous, rank).exists() for rank in self._started):
            if lost := self.lost(wait_s=0.0):
                raise ProcessLost(lost)
            if time.monotonic() > ends_s:
                raise ProcessLost(f"not every process has started within {_STARTS_S:g} s")
            time.sleep(0.02)

    def await_end(self) -> None:
        """Each comes to its end by itself; one that does not is ended by `close`."""
        for child in self._started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_ENDS_S)

    def lost(self, wait_s: float = 1.0) -> str | None:
        """Who has failed, and its last words. Its connection may be closed before it has ended."""
        ends_s = time.monotonic() + wait_s
        while True:
            for rank, child in self._started.items():
                if child.poll():
                    words = self._complaints(rank).read_text(errors="replace").strip().splitlines()[-1:]
                    how = f"signal {-child.returncode}" if child.returncode < 0 else f"{child.returncode}"
                    return f"process {rank} of the training ended with {how}" + "".join(
                        f": {w}" for w in words
                    )
            if time.monotonic() >= ends_s:
                return None
            time.sleep(0.02)

    def close(self) -> None:
        for child in self._started.values():
            if child.poll() is None:
                child.kill()
            child.wait()

    def _complaints(self, rank: int) -> Path:
        return self._folder / f"complaints-{rank}"


@dataclass(frozen=True, slots=True)
class Place:
    """What torchrun told this process of itself. `local_rank`: among those of its machine."""

    rank: int
    size: int
    local_rank: int


def torchrun_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """None where torchrun did not start this process, `ProcessesInvalid` where that cannot be said."""
    told = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    if missing := [name for name in told if not environment.get(name)]:
        raise ProcessesInvalid(
            f"RANK or WORLD_SIZE is set, as torchrun does it, but {', '.join(missing)} is not: start with "
            "torchrun, or unset RANK and WORLD_SIZE and use --processes"
        )
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ProcessesInvalid(f"{name} is a number, not {environment[name][:40]!r}")
        numbers[name] = int(environment[name])
    rank, size, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
    if not 1 <= size <= MAX_PROCESSES:
        raise ProcessesInvalid(f"WORLD_SIZE is from 1 to {MAX_PROCESSES}, not {size}")
    if rank >= size or numbers["LOCAL_RANK"] > rank:
        raise ProcessesInvalid(
            f"RANK {rank}, LOCAL_RANK {numbers['LOCAL_RANK']} and WORLD_SIZE {size} do not go together"
        )
    if not 0 < port < 65536:
        raise ProcessesInvalid(f"MASTER_PORT is a port, not {port}")
    return Place(rank, size, numbers["LOCAL_RANK"])


class Launched:
    """The processes that torchrun started. Entered by all of them; the first one leads, the others wait for
    it to begin, and for nothing where it ends without a training."""

    def __init__(self, place: Place, device: str = "cpu") -> None:
        self._place, self.size, self._device = place, place.size, device
        self._told = False

    def __enter__(self) -> Launched:
        self._store, rank, size = next(rendezvous_at("env://", timeout=timedelta(seconds=_HANGS_S)))
        _connect(self._store, rank, size, self._device)
        return self

    def __exit__(self, *error: object) -> None:
        if self._place.rank == 0:
            self._begin("nothing")
        dist.destroy_process_group()

    @contextmanager
    def joined(self) -> Iterator[Group]:
        self._begin("training")
        try:
            yield self._group()
        except Stopped:
            raise
        except RuntimeError as error:
            if lost := _gone(error):
                raise ProcessLost(lost) from error
            raise

    def assist(self, stopping: Callable[[], bool]) -> None:
        """The whole part of a process that does not lead."""
        self._store.wait([_BEGIN], timedelta(seconds=_READING_S))
        if self._store.get(_BEGIN) == b"training":
            assist(self._group(), stopping)

    def _group(self) -> Group:
        return Group(self._place.rank, self.size, _device_of(self._device, self._place.local_rank))

    def _begin(self, what: str) -> None:
        if not self._told:
            self._store.set(_BEGIN, what)
            self._told = True


def _connect(store: Store, rank: int, size: int, device: str) -> None:
    """Until `dist.destroy_process_group`, which ends gloo's threads only where nothing else holds the group.

    An optimizer's first step imports torch.distributed.nn, whose functions keep the group of that moment as
    the default of an argument. A thread that then frees a tensor of numpy's while the interpreter ends aborts
    the process (pytorch#179291), so it is imported before there is a group.
    """
    import torch.distributed.nn.functional  # noqa: F401

    timeout = timedelta(seconds=_HANGS_S)
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=timeout)


@contextmanager
def _process_group(rendezvous: Path, rank: int, size: int, device: str) -> Iterator[None]:
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = before or _LOOPBACK
    try:
        _connect(FileStore(str(rendezvous), size), rank, size, device)
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        if dist.is_initialized():
            dist.destroy_process_group()


def _gone(error: RuntimeError) -> str | None:
    """What an error of a sum or broadcast says of another process; None where it says something else."""
    words = str(error)
    if not any(sign in words for sign in ("Connection", "peer", "pipe", "Timed out", "timeout")):
        return None
    return f"another process of the training has ended or hangs: {words.splitlines()[0][:200]}"


def _backend(device: str) -> str:
    """What carries tensors of the processor, and of a GPU. No GPU has run this yet."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def _device_of(device: str, local_rank: int) -> str:
    return device if device == "cpu" else f"{device}:{local_rank}"


def _ready(rendezvous: Path, rank: int) -> Path:
    return rendezvous.with_name(f"ready-{rank}")


def main(rendezvous: Path, rank: int, size: int, device: str) -> None:
    """A process that `Local` started: it helps with one training and ends, or dies with its parent."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the connection tells
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _ready(rendezvous, rank).touch()
    with _process_group(rendezvous, rank, size, device), contextlib.suppress(Stopped):
        assist(Group(rank, size, _device_of(device, rank)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
