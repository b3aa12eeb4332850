"""Many HTTP clients at once, some of which leave, while replicas of both sides are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from kafka_broker import BrokerManager

from .http_client import Address, Answer, Client
from .load_app import NOBODY

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable

pytestmark = pytest.mark.integration

HERE: Final = Path(__file__).parent
BENCHMARK: Final = HERE.parents[1] / "benchmarks" / "over_http.py"
CLIENTS: Final = 500
REQUESTS: Final = 10
LONGEST: Final = 0.05
BETWEEN: Final = 500
"""Answers between two replacements, at least."""


_BAD: Final = re.compile(r"Traceback|Exception|ERROR|CRITICAL")


class Server:
    """One process of `load_app.py`."""

    def __init__(self, name: str, process: Process, errors: Path) -> None:
        self.name = name
        self._process = process
        self._errors = errors

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ready(self) -> None:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = await self._process.stdout.readline()
        assert b"ready\n" == line, self.errors()

    async def stop(self) -> list[str]:
        """End it as an operator would; returns its last words."""
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            output, _ = await self._process.communicate()
        # Uvicorn ends by the signal once it has done all that it does on it
        assert self._process.returncode in {0, -signal.SIGTERM}, self.errors()
        return output.decode().splitlines()

    async def end(self) -> None:
        """Leave nothing of it."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()  # which also closes its pipe

    def errors(self) -> str:
        """Return what it wrote to its standard error."""
        return self._errors.read_text()


class Servers:
    """The application's replicas behind one address, and those of the service that they ask.

    The address is a listening socket that all replicas inherit. The kernel gives a new connection
    to any of them; one that stops leaves those that wait to the others.
    """

    def __init__(self, kafka: str, module: str, directory: Path, listening: socket.socket) -> None:
        self._environment = {**os.environ, "KAFKA_BROKER_BOOTSTRAP_SERVERS": kafka}
        self._module = module
        self._directory = directory
        self._listening = listening
        self.address: Address = listening.getsockname()
        self.started: list[Server] = []

    async def application(self) -> Server:
        """Start a replica of the application and wait until it is ready."""
        return await self._start(
            "application",
            *("-m", "uvicorn", "--factory", "load_app:application", "--app-dir", str(HERE)),
            *("--fd", str(self._listening.fileno()), "--no-access-log"),
            KAFKA_BROKER_MODULE=f"{self._module}-orders",
            PAYMENTS=self._module,
        )

    async def payments(self) -> Server:
        """Start a replica of the service; ready says nothing of its partitions."""
        path = str(HERE / "load_app.py")
        return await self._start("payments", path, KAFKA_BROKER_MODULE=self._module)

    async def _start(self, role: str, *arguments: str, **environment: str) -> Server:
        name = f"{role}-{len(self.started)}"
        errors = self._directory / f"{name}.txt"
        with errors.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-W", "error", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                pass_fds=[self._listening.fileno()],
                env={**self._environment, **environment},
            )
        server = Server(name, process, errors)
        self.started.append(server)
        await server.ready()
        return server

    async def stop(self) -> None:
        """Stop those that run, and check that all went well; the applications leave nothing."""
        running = [server for server in self.started if server.running]
        for words in await asyncio.gather(*(server.stop() for server in running)):
            nothing_is_left(words)
        assert "" == self.bad_news()

    def bad_news(self) -> str:
        """Return what servers have said that they should not."""
        said = [(server.name, server.errors()) for server in self.started]
        return "\n".join(f"{name}: {text}" for name, text in said if _BAD.search(text))


def nothing_is_left(words: list[str]) -> None:
    """Check the last words of an application; a service has none."""
    for word in words:
        state = json.loads(word)
        assert (0, 0) == (state["waiting"], state["outbox"])


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as one:
        # asyncio does so only for sockets of its own making; each answer would wait for an ACK
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield one


@pytest.fixture
async def servers(kafka: str, module: str, tmp_path: Path) -> AsyncIterator[Servers]:
    """Replicas of an application and of a service, in processes that end with the test."""
    with listening() as one:
        made = Servers(kafka, module, tmp_path, one)
        try:
            yield made
        finally:
            for server in made.started:
                await server.end()


@dataclass
class Tally:
    """What became of the requests of all clients."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    left: Counter[str] = field(default_factory=Counter)
    stale: int = 0
    dropped: int = 0
    slowest: float = 0.0
    _awaited: list[tuple[Callable[[], bool], asyncio.Event]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.statuses.total()

    async def ask(self, client: Client, number: int) -> None:
        """Send one request, count its answer, and judge it."""
        begin = time.monotonic()
        answer = await client.get(target(number, seconds_of(number)))
        self.slowest = max(self.slowest, time.monotonic() - begin)
        self.statuses[answer.status] += 1
        if not self._is_right(number, answer):
            self.wrong.append(f"{number}: {answer}")
        for condition, event in self._awaited:
            if condition():
                event.set()

    def _is_right(self, number: int, answer: Answer) -> bool:
        if answer.status == 200:
            body = answer.json()
            self.pids |= {body["app"], body["payments"]}
            return bool(number == body["number"])
        kind = answer.headers["content-type"]
        return answer.status in {503, 504} and kind == "application/problem+json"

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the answer after which *condition* holds."""
        event = asyncio.Event()
        self._awaited.append((condition, event))
        async with asyncio.timeout(60):
            await event.wait()

    async def used(self, server: Server) -> None:
        """Wait until a new replica has worked, and some more answers have come."""
        enough = self.count + BETWEEN
        await self.until(lambda: server.pid in self.pids and self.count >= enough)

    def told(self) -> str:
        return (
            f"answers by status {dict(self.statuses)}, the slowest after {self.slowest:.1f} s; "
            f"left {dict(self.left)}; sent again: {self.stale} on a stale connection, "
            f"{self.dropped} on a new one"
        )


def seconds_of(number: int) -> float:
    """Return how long the handler of a request takes."""
    return zlib.crc32(b"%d" % number) % 1000 / 1000 * LONGEST


def target(number: int, seconds: float) -> str:
    return f"/orders/{number}?seconds={seconds}"


@asynccontextmanager
async def client_of(servers: Servers, tally: Tally, *, keeps: bool) -> AsyncIterator[Client]:
    client = Client(servers.address, keeps=keeps)
    try:
        yield client
    finally:
        await client.close()
        tally.stale += client.stale
        tally.dropped += client.dropped


async def ask_and_leave(servers: Servers, tally: Tally, which: int) -> None:
    """Send some requests, one after the other; one client of ten leaves in the middle of one."""
    leaves_at = leaves_at_its(which)
    async with client_of(servers, tally, keeps=which % 2 == 0 or which % 3 == 0) as client:
        for number in range(which * REQUESTS, (which + 1) * REQUESTS):
            if number % REQUESTS == leaves_at:
                await leave(client, tally, number, where="orders" if which % 20 else "nobody")
                return
            await tally.ask(client, number)


def leaves_at_its(which: int) -> int:
    """Return which of its requests a client leaves at; that may be none of them."""
    return REQUESTS if which % 10 else which // 20 % REQUESTS


async def leave(client: Client, tally: Tally, number: int, where: str) -> None:
    """Ask and go away before an answer can come; from ``nobody`` none ever will."""
    asked = f"/nobody/{number}" if where == "nobody" else target(number, LONGEST)
    assert await client.leave(asked, patience=seconds_of(number) / 2)
    tally.left[where] += 1


async def test_500_clients_of_which_some_leave(
    kafka: str, module: str, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients that leave free their slots; all others get the right answer, and nothing is left."""
    async with BrokerManager(module + NOBODY, bootstrap_servers=kafka):
        pass  # its topic is there now
    application, _ = await asyncio.gather(servers.application(), servers.payments())
    tally = Tally()
    async with asyncio.TaskGroup() as group:
        for which in range(CLIENTS):
            group.create_task(ask_and_leave(servers, tally, which))
    with capsys.disabled():
        print(f"\n{tally.told()}")
    client = Client(servers.address, keeps=True)
    await client.get("/livez")
    state = await settled(client, tally.left)
    ready = await client.get("/readyz")
    await client.close()
    assert {"waiting": 0, "outbox": 0, "cancelled": dict(tally.left)} == state
    assert {"orders": 25, "nobody": 25} == tally.left
    assert {200: sum(map(leaves_at_its, range(CLIENTS)))} == tally.statuses
    assert ([], 0) == (tally.wrong, tally.dropped)
    assert (200, "ok") == (ready.status, ready.json()["status"])
    assert application.running
    await servers.stop()


async def settled(client: Client, left: Counter[str]) -> Any:
    """Return the application's state once it has noticed who has left."""
    state = None
    with suppress(TimeoutError):
        async with asyncio.timeout(5):  # far less than a wait that nobody ends
            while state is None or state["waiting"] or state["cancelled"] != left:
                state = (await client.get("/state")).json()
    return state


async def ask_until(stop: asyncio.Event, servers: Servers, tally: Tally, which: int) -> None:
    """Send requests, one after the other."""
    number = which * 1_000_000
    async with client_of(servers, tally, keeps=which % 2 == 0) as client:
        while not stop.is_set():
            await tally.ask(client, number)
            number += 1


async def test_rolling_restart_under_load(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replicas of both sides are replaced under load, and each client gets its right answer.

    As it stops, Uvicorn closes new connections whose request it has not read: those are sent again.
    """
    applications = [await servers.application(), await servers.application()]
    payments = [await servers.payments(), await servers.payments()]
    tally, stop = Tally(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for which in range(CLIENTS):
            group.create_task(ask_until(stop, servers, tally, which))
        for one in servers.started:
            await tally.used(one)
        for old_application, old_service in zip(applications, payments, strict=True):
            new, words = await asyncio.gather(servers.application(), old_application.stop())
            nothing_is_left(words)
            await tally.used(new)
            new, _ = await asyncio.gather(servers.payments(), old_service.stop())
            await tally.used(new)
        stop.set()
    with capsys.disabled():
        print(f"\n{tally.told()}")
    assert [] == tally.wrong
    assert {server.pid for server in servers.started} == tally.pids
    await servers.stop()
    assert {200: tally.count} == tally.statuses


async def test_the_benchmark_runs(kafka: str) -> None:
    """The benchmark of HTTP goes through to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(BENCHMARK), "--rounds", "1", "--requests", "100"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "KAFKA_BROKER_BOOTSTRAP_SERVERS": kafka},
    )
    try:
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert 0 == process.returncode
    figures = [json.loads(line) for line in output.splitlines() if line.startswith(b"{")]
    assert 16 == len(figures)
    assert all(figure["ratio"] > 0 for figure in figures)
