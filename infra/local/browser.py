"""A headless Chromium of our own, and a folder served to it."""

from __future__ import annotations

import functools
import http.server
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra.local.server import HOST

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SCRIPT_TIMEOUT_S: Final = 60
_OPTIONS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
REMEDY: Final = "apt-get install chromium chromium-driver"
_PROGRAMS: Final = (("chromium", "google-chrome"), ("chromedriver",))


class BrowserMissing(RuntimeError):
    """No browser can be driven here; the message says what is missing."""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Isolated, so that the page may take the time in microseconds."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder's files, on this machine only."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer((HOST, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def check_browser() -> tuple[str, str]:
    """Where Chromium and its driver are. Raises `BrowserMissing`."""
    found = [next(filter(None, map(shutil.which, names)), "") for names in _PROGRAMS]
    if not all(found):
        missing = " and ".join(names[0] for names, path in zip(_PROGRAMS, found, strict=True) if not path)
        raise BrowserMissing(f"{missing} not found: {REMEDY}")
    return found[0], found[1]


@contextmanager
def chromium() -> Iterator[Chrome]:
    """A browser with an empty profile, gone with everything it kept at the end. Raises `BrowserMissing`."""
    program, driver = check_browser()
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError:
        raise BrowserMissing("selenium is missing: pip install -c constraints.txt '.[dev]'") from None
    with tempfile.TemporaryDirectory(prefix="tailrace-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for option in (*_OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        try:
            browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
        except WebDriverException as error:
            raise BrowserMissing(f"Chromium does not start here: {error.msg}") from error
        try:
            browser.set_script_timeout(SCRIPT_TIMEOUT_S)
            yield browser
        finally:
            browser.quit()
