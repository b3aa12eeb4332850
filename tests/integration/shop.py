"""The shop of examples/shop, started as its users start it, and a browser to visit it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

RUN = Path(__file__).parents[2] / "examples" / "shop" / "run.py"
PROCESS = re.compile(r"\(process (\d+)\)")
NO_CHROMIUM = "no Chromium to visit the shop with: apt-get install chromium, or Google Chrome"
STOP_TIMEOUT = 90


class Shop:
    """The shop that `make shop` runs, with what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.output = ""
        self.url = self.wait_for(r"it stays up until Ctrl-C: open (\S+)")

    @property
    def services(self) -> list[int]:
        """The process ids that it has told."""
        return [int(pid) for pid in PROCESS.findall(self.output)]

    def wait_for(self, pattern: str) -> str:
        """Return the first group of *pattern*, as soon as a line that is printed has it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line
            if found := re.search(pattern, line):
                return found[found.re.groups]
        raise AssertionError(f"it ended without {pattern!r}:\n{self.output}")

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self._process.send_signal(signal.SIGINT)
        rest, _ = self._process.communicate(timeout=STOP_TIMEOUT)
        self.output += rest
        return self._process.returncode


@contextmanager
def running_shop(**environment: str) -> Iterator[Shop]:
    """Run the shop in a ``with``."""
    with subprocess.Popen(  # noqa: S603  # our own program
        [sys.executable, "-u", RUN],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Shop(process)
        finally:
            process.send_signal(signal.SIGINT)  # killed, it would leave its services behind
            try:
                process.communicate(timeout=STOP_TIMEOUT)
            finally:
                process.kill()


@contextmanager
def running_chromium(executable: str) -> Iterator[Browser]:
    """Run a Chromium that is installed; Playwright has none of its own here."""
    expect.set_options(timeout=20_000)  # milliseconds, for a machine that is busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            chromium_sandbox=os.geteuid() != 0,  # root cannot have one
            args=[
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        try:
            yield browser
        finally:
            browser.close()


def find_chromium() -> str | None:
    """Return the path of a Chromium, or of Chrome, if one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def order(page: Page, item: str, *, quantity: int = 1, card: str = "", answer: str = "") -> None:
    """Fill in the form as a customer does; the order is the first in the list then."""
    page.get_by_role("group", name="Item").get_by_text(item).click()
    page.get_by_label("Quantity").fill(str(quantity))
    page.get_by_label("Card").select_option(card or "4000 0001")
    page.get_by_label(answer or "30 seconds at most").check()
    page.get_by_role("button", name="Place the order").click()


def alive(pid: int) -> bool:
    """Tell whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
