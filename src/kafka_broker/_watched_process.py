"""A command that is gone soon after the Python process that started it, however that ended."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

_END_TIMEOUT: Final = 5.0


class WatchedProcess:
    """One command at a time in a directory of its own; both are gone soon after we are.

    The command is the child of a watchdog process, whose standard input is a pipe from us. The
    kernel closes that pipe however we end, and the watchdog then cleans up: see `_watch`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program = f"{_WATCH_IMPORTS}\n{inspect.getsource(_watch)}\n_watch(sys.argv[1])"
        self._watchdog = subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, "-I", "-S", "-c", program, os.fspath(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
        self._requests = cast("IO[str]", self._watchdog.stdin)
        self._answers = cast("IO[str]", self._watchdog.stdout)
        directory.mkdir(mode=0o700)

    def close(self) -> None:
        """Kill the command and delete the directory."""
        with suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._watchdog.wait(timeout=_END_TIMEOUT)
        except subprocess.TimeoutExpired:  # somebody forked, and holds our end of the pipe
            self._watchdog.terminate()
            self._watchdog.wait(timeout=_END_TIMEOUT)
        self._answers.close()

    @property
    def pid(self) -> int | None:
        """The process id of the command while it runs."""
        pid, code = self._ask("wait", 0)
        return pid if code is None else None

    def run(self, command: list[str], *, timeout: float, every: float = 0.02) -> Iterator[None]:
        """Start *command* and yield every *every* seconds until it ends well.

        Raises:
            RuntimeError: It failed, or still runs after *timeout* seconds and was killed.
        """
        deadline = time.monotonic() + timeout
        _, code = self._ask("start", *command)
        while code is None:
            if time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                raise RuntimeError(f"not ready after {timeout:g} s:\n{self.tail()}")
            _, code = self._ask("wait", every)
            yield
        if code != 0:
            raise RuntimeError(f"ended with code {code}:\n{self.tail()}")

    def end(self, number: signal.Signals) -> bool:
        """Send the command a signal; tell whether it has ended within 5 seconds."""
        self._ask("signal", number)
        _, code = self._ask("wait", _END_TIMEOUT)
        return code is not None

    def output(self) -> str:
        """Return what the command has written since it was started."""
        return (self.directory / "output.log").read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """Return the last lines of the output, for an error."""
        return "\n".join(self.output().splitlines()[-20:])

    def _ask(self, *request: object) -> tuple[int | None, int | None]:
        """Tell the watchdog what to do; return the command's process id and exit code."""
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError("the watchdog process has died")
        pid, code = json.loads(answer)
        return pid, code


_WATCH_IMPORTS = """
import json, os, shutil, signal, subprocess, sys
from contextlib import suppress
from pathlib import Path
"""


def _watch(directory: str) -> None:  # pragma: no cover - runs in the watchdog process
    """Run and signal one command as standard input says; at its end kill it, delete *directory*."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    child = None
    try:
        for line in sys.stdin:
            verb, *rest = json.loads(line)
            if verb == "start":
                with Path(directory, "output.log").open("wb") as output:
                    child = subprocess.Popen(  # noqa: S603  # what our owner asks for
                        rest,
                        cwd=directory,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        process_group=0,  # `mvn` may be a shell script with a child
                    )
            elif verb == "signal" and child and child.poll() is None:
                os.killpg(child.pid, rest[0])
            elif verb == "wait" and child:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(rest[0])
            state = [child.pid, child.poll()] if child else [None, None]
            sys.stdout.write(json.dumps(state) + "\n")
            sys.stdout.flush()
    finally:
        if child and child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        shutil.rmtree(directory, ignore_errors=True)
