"""The processes of one test, and what they have logged so far."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .checker import Handling, handlings

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable

_SCRIPT: Final = Path(__file__).with_name("worker.py")
_LOOK_AGAIN: Final = 0.05
_ERROR: Final = re.compile(r" (ERROR|CRITICAL) (kafka_broker|asyncio)")


class Worker:
    """One process of `worker.py`.

    Attributes:
        name: of its two files, the log and what it said.
        killed: when it was gone, if it was killed: nanoseconds of the monotonic clock.
    """

    def __init__(self, process: Process, log: Path, said: Path) -> None:
        self._process = process
        self._log = log
        self._said = said
        self._at = 0
        self._entries: list[dict[str, Any]] = []
        self.name = log.stem
        self.killed: int | None = None
        self.leaving = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def entries(self, what: str = "") -> list[dict[str, Any]]:
        """Return the lines of its log, all or those of one kind."""
        with suppress(FileNotFoundError), self._log.open("rb") as log:
            log.seek(self._at)
            whole, newline, _ = log.read().rpartition(b"\n")
            self._at += len(whole) + len(newline)
            self._entries += map(json.loads, whole.splitlines())
        return [entry for entry in self._entries if what in ("", entry["what"])]

    def handlings(self) -> list[Handling]:
        return handlings(self.entries())

    def open(self) -> list[Handling]:
        """Return the handlings that have no end yet."""
        return [one for one in self.handlings() if one.end is None]

    @property
    def ready(self) -> bool:
        return bool(self.entries("ready"))

    @property
    def instance(self) -> str:
        """The name of this replica in its group."""
        name: str = self.entries("ready")[0]["instance"]
        return name

    def said(self) -> str:
        """Return what it wrote to its standard output and error."""
        return self._said.read_text()

    def freeze(self) -> None:
        """Stop it where it is, as a machine that swaps or is suspended would."""
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """End it as a crash would."""
        self.leaving = True
        self._process.kill()
        await self._process.wait()
        self.killed = time.monotonic_ns()

    async def stop(self, seconds: float = 60) -> None:
        """End it as an operator would; it has to end by itself, without an error."""
        self._process.send_signal(signal.SIGTERM)
        await self.ended(seconds)

    async def ended(self, seconds: float = 120) -> None:
        """Wait until it has ended by itself, without an error."""
        self.leaving = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                assert 0 == await self._process.wait(), self.tail()
                return
        pytest.fail(f"{self.name} had not ended after {seconds:g} s:\n{self.tail()}")

    def tail(self) -> str:
        """Return its last words."""
        state = "runs" if self.running else f"ended with {self._process.returncode}"
        logged = self.entries()
        counts = {what: len(self.entries(what)) for what in {entry["what"] for entry in logged}}
        last = "\n".join(self.said().splitlines()[-15:])
        return f"--- {self.name} (pid {self.pid}) {state}; logged {counts}\n{last}"

    async def end(self) -> None:
        """Leave nothing of it."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class Fleet:
    """Starts processes for one module; whoever makes one ends it.

    Args:
        servers: the address of Kafka.
        module: what the replicas are replicas of.
        directory: where their logs go.
    """

    def __init__(self, servers: str, module: str, directory: Path) -> None:
        self._servers = servers
        self._directory = directory
        self.module = module
        self.workers: list[Worker] = []

    async def end(self) -> None:
        """Leave none of them."""
        for worker in self.workers:
            await worker.end()

    async def start(self, role: str, *numbers: int, **settings: object) -> Worker:
        """Start a process; does not wait until it is ready."""
        name = f"{role}-{len(self.workers)}"
        log, said = self._directory / f"{name}.log", self._directory / f"{name}.txt"
        arguments = [str(_SCRIPT), role, self.module, str(log), *map(str, numbers)]
        environment = {f"KAFKA_BROKER_{key.upper()}": str(at) for key, at in settings.items()}
        environment["KAFKA_BROKER_BOOTSTRAP_SERVERS"] = self._servers
        with said.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
            )
        worker = Worker(process, log, said)
        self.workers.append(worker)
        return worker

    async def serve(self, **settings: object) -> Worker:
        """Start a replica and wait until it is ready, which says nothing of its partitions."""
        worker = await self.start("serve", **settings)
        await self.until(f"{worker.name} is ready", lambda: worker.ready)
        return worker

    async def produce(self, count: int, at_once: int | None = None, per_second: int = 1) -> Worker:
        """Start a source of *count* events, those after the first *at_once* at a measured pace."""
        first = count if at_once is None else at_once
        return await self.start("produce", count, first, per_second, module_partitions=1)

    async def until(self, what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until *condition* holds; it is called in a thread, and may block there.

        A process that ends meanwhile, without having been asked to, fails the test at once.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not await asyncio.to_thread(condition):
                    self._check()
                    await asyncio.sleep(_LOOK_AGAIN)  # neither a file nor Kafka calls back
                return
        pytest.fail(f"not within {seconds:g} s: {what}\n{self.report()}")

    def _check(self) -> None:
        for worker in self.workers:
            if not worker.running and not worker.leaving and not worker.entries("stopped"):
                produced = worker.entries("produced")
                assert produced, worker.tail()

    def report(self) -> str:
        """Return the last words of all."""
        return "\n".join(worker.tail() for worker in self.workers)

    def handlings(self) -> list[Handling]:
        """Return what all replicas have handled so far, in the order of the beginnings."""
        return handlings(entry for worker in self.workers for entry in worker.entries())

    def errors(self) -> list[str]:
        """Return what our own code and the event loop have called an error."""
        lines = [line for worker in self.workers for line in worker.said().splitlines()]
        return [line for line in lines if _ERROR.search(line)]

    def killed(self) -> dict[int, int]:
        """Return when each process that was killed was gone."""
        return {worker.pid: worker.killed for worker in self.workers if worker.killed is not None}
