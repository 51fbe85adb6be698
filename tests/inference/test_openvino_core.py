"""An engine of OpenVINO comes and goes, and the process still takes its signals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compression.releases.registry import Registry

pytest.importorskip("openvino")

# A process of its own: where this fails, it ends by a segmentation fault. Python runs signal handlers on an
# alternate stack where the thread has one, and asks for none itself unless faulthandler is on.
COMES_AND_GOES = """
import gc, os, signal, sys, threading
from pathlib import Path
from compression.releases.registry import Registry
from inference import engines
from inference.engines.base import EngineOptions

held = [engines.create("openvino", EngineOptions())]
held[0].load(Registry(Path(sys.argv[1])).open())
def end():
    held.pop().close()
    gc.collect()
ending = threading.Thread(target=end)
ending.start()
ending.join()
taken = []
signal.signal(signal.SIGTERM, lambda *_: taken.append(True))
os.kill(os.getpid(), signal.SIGTERM)
print("taken" if taken else "not taken")
"""


def test_a_signal_after_an_engine_was_closed_by_another_thread_is_taken(registry: Registry) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", COMES_AND_GOES, str(registry.root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (ended.returncode, ended.stdout) == (0, "taken\n"), ended.stderr
