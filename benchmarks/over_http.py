"""Measure what HTTP costs on top of a request, on a real Kafka: ``python benchmarks/over_http.py``.

A service echoes. It is asked by this process, and by the route of an application in a process of
its own, which this process calls. The two take turns, round by round. Then a route that awaits
nothing is called, with `BrokerMiddleware` around it and without. What counts is the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import sys
import time
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from aiokafka.admin import AIOKafkaAdminClient
from fastapi import FastAPI
from pydantic import BaseModel

from kafka_broker import BrokerManager, EventRouter
from kafka_broker.fastapi import Broker, BrokerMiddleware
from kafka_broker.testing import kafka_server

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

PREFIX: Final = f"over-http-{uuid.uuid4().hex[:8]}"
TIMEOUT: Final = 30.0
"""Seconds that any single wait may take."""
LEVELS: Final = (1, 50, 500)
MANY: Final = 50
TURNS: Final = 5
"""How often a route that awaits nothing is measured in a round."""
TITLES: Final = {
    "p50": "p50, ms",
    "p99": "p99, ms",
    "rate": "per second",
    "cpu": "CPU of one, us",
}
_FEWER: Final = 5  # one at a time takes long
_WARM: Final = 200
_TEXT: Final = "x" * 89  # 100 bytes of JSON
_BODY: Final = json.dumps({"text": _TEXT}).encode()
_ECHO: Final = (
    b"POST /echo HTTP/1.1\r\nhost: benchmark\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)
_CONSTANT: Final = b"GET /constant HTTP/1.1\r\nhost: benchmark\r\n\r\n"


class Text(BaseModel):
    """What is sent, and comes back."""

    text: str


@dataclass(frozen=True)
class Job:
    """What a process does: its role is ``payments``, ``broker``, ``bare`` or ``wrapped``."""

    role: str
    servers: str
    name: str

    def broker(self, suffix: str = "", router: EventRouter | None = None) -> BrokerManager:
        """Return the broker of a module that is named after the job."""
        return BrokerManager(
            self.name + suffix,
            router=router,
            bootstrap_servers=self.servers,
            module_partitions=1,
            reply_partitions=1,
        )


@dataclass(frozen=True)
class Figures:
    """What was measured: times in milliseconds, requests per second, CPU in microseconds."""

    p50: float
    p99: float
    rate: float
    cpu: float
    """Of one request, in the process that has the broker or the route."""


class Connection:
    """One kept HTTP/1.1 connection, with as little work of its own as possible."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def call(self, request: bytes) -> None:
        """Send *request* and read its answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head  # noqa: S101  # else it was other work
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await self._reader.readexactly(int(length))

    async def close(self) -> None:
        """End it."""
        self._writer.close()
        await self._writer.wait_closed()


@dataclass(frozen=True)
class Service:
    """A process of this benchmark that is ready."""

    pid: int
    port: int

    async def measure(self, request: bytes, count: int, concurrency: int) -> Figures:
        """Measure one of its routes."""
        opened: list[Connection] = []
        try:
            while len(opened) < concurrency:
                streams = await asyncio.open_connection("127.0.0.1", self.port)
                opened.append(Connection(*streams))
            asks = [partial(connection.call, request) for connection in opened]
            return await _load(asks, count, self.pid)
        finally:
            for connection in opened:
                await connection.close()


async def _load(asks: Sequence[Callable[[], Awaitable[Any]]], count: int, pid: int) -> Figures:
    """Let all of *asks* go on side by side until *count* are answered."""
    took: list[float] = []
    numbers = iter(range(count))

    async def client(ask: Callable[[], Awaitable[Any]]) -> None:
        for _ in numbers:
            sent = time.perf_counter()
            await ask()
            took.append(time.perf_counter() - sent)

    begin, before = time.perf_counter(), cpu_seconds(pid)
    await asyncio.gather(*map(client, asks))
    seconds, cpu = time.perf_counter() - begin, cpu_seconds(pid) - before
    p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[-1]
    return Figures(p50 * 1e3, p99 * 1e3, count / seconds, cpu / count * 1e6)


def application(job: Job) -> FastAPI:
    """Return what is called."""
    app = FastAPI(lifespan=job.broker("-http").lifespan if job.role == "broker" else None)
    if job.role == "wrapped":
        app.add_middleware(BrokerMiddleware)

    @app.post("/echo")
    async def asking(broker: Broker, text: Text) -> Text:
        reply = await broker.request(job.name, "echo", text, timeout=TIMEOUT, response=Text)
        return reply.data

    @app.get("/constant")
    async def constant() -> Text:
        return Text(text=_TEXT)

    return app


router: EventRouter = EventRouter("payments")


@router.bind_event("echo")
async def echo(text: Text) -> Text:
    """Answer with what was sent."""
    return text


async def work(job: Job) -> None:
    """Be one of the processes, until the standard input ends, as it does when the parent dies."""
    if job.role == "payments":
        async with job.broker(router=router):
            print(0, flush=True)
            await asyncio.to_thread(sys.stdin.read)
        return
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        # asyncio does so only for sockets of its own making; each answer would wait for an ACK
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(application(job), log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listening]))
        print(listening.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving


def cpu_seconds(pid: int) -> float:
    """Return what a process has used so far; not a number where this is not Linux."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) does
    except OSError:
        return float("nan")


@asynccontextmanager
async def _service(job: Job) -> AsyncIterator[Service]:
    """Run a process of this benchmark; it ends when its standard input does, else it is killed."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, __file__, "--work", json.dumps(asdict(job)))
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield Service(process.pid, await _told(process))
    finally:
        try:
            async with asyncio.timeout(TIMEOUT):
                await process.communicate(b"")  # ends its standard input
        except TimeoutError:
            process.kill()
            await process.wait()


async def _told(process: Process) -> int:
    """Return the port that a process tells once it is ready."""
    async with asyncio.timeout(TIMEOUT):
        line = await process.stdout.readline() if process.stdout else b""
    if not line:
        sys.exit("a process of the benchmark failed")
    return int(line)


async def requests(rounds: int, count: int, job: Job) -> list[Row]:
    """Measure requests of a process without HTTP, and through the route of another one."""
    found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    async with (
        _service(replace(job, role="payments")),
        _service(replace(job, role="broker")) as app,
        job.broker("-ask") as asking,
    ):
        ask = partial(
            asking.request, job.name, "echo", Text(text=_TEXT), timeout=TIMEOUT, response=Text
        )
        await _load([ask] * MANY, _WARM, os.getpid())
        await app.measure(_ECHO, _WARM, MANY)
        for _ in range(rounds):
            for level in LEVELS:
                some = count // _FEWER if level == 1 else count
                found["direct", level].append(await _load([ask] * level, some, os.getpid()))
                found["HTTP", level].append(await app.measure(_ECHO, some, level))
    return [
        row
        for level in LEVELS
        for row in _compared(
            f"request, {level} in flight",
            ("direct", found["direct", level]),
            ("HTTP", found["HTTP", level]),
        )
    ]


async def constant(rounds: int, count: int, job: Job) -> list[Row]:
    """Measure a route that awaits nothing; each round has processes of its own."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for number in range(rounds):
        async with (
            _service(replace(job, role="bare")) as bare,
            _service(replace(job, role="wrapped")) as wrapped,
        ):
            services = {"bare": bare, "wrapped": wrapped}
            for service in services.values():
                await service.measure(_CONSTANT, _WARM, MANY)
            for turn in range(TURNS):
                for name in sorted(services, reverse=bool((number + turn) % 2)):
                    figures = await services[name].measure(_CONSTANT, count, MANY)
                    found[name].append(figures)
    what = f"constant, {MANY} in flight"
    return _compared(what, ("bare", found["bare"]), ("wrapped", found["wrapped"]))


@dataclass(frozen=True)
class Row:
    """One figure of two ways to do the same: the median of the rounds, the lowest, the highest.

    The ratio is the median of those of the rounds, the second way's to the first's.
    """

    what: str
    figure: str
    ways: tuple[str, str]
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    ratio: float

    def table_row(self) -> str:
        """Return it as a line of a Markdown table."""
        cells = [f"{mid:,.4g} ({low:,.4g} to {top:,.4g})" for mid, low, top in self._sides()]
        return f"| {self.what}: {self.figure} | {' | '.join(cells)} | {self.ratio:.2f} |"

    def _sides(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        return self.first, self.second


def _compared(
    what: str, first: tuple[str, list[Figures]], second: tuple[str, list[Figures]]
) -> list[Row]:
    """Return the rows of two ways, and print them as JSON."""
    rows = []
    for name, title in TITLES.items():
        ones = [getattr(figures, name) for figures in first[1]]
        others = [getattr(figures, name) for figures in second[1]]
        ratio = statistics.median(map(float.__truediv__, others, ones))
        ways = first[0], second[0]
        row = Row(what, title, ways, _spread(ones), _spread(others), round(ratio, 3))
        print(json.dumps(asdict(row)), flush=True)
        rows.append(row)
    return rows


def _spread(values: list[float]) -> tuple[float, float, float]:
    median, low, high = statistics.median(values), min(values), max(values)
    return round(median, 3), round(low, 3), round(high, 3)


async def run(rounds: int, count: int, job: Job) -> None:
    """Measure, and print a JSON line for each figure and a table of all."""
    try:
        for measure in (requests, constant):
            rows = await measure(rounds, count, job)
            first, second = rows[0].ways
            print(f"\n| | {first} | {second} | ratio |\n| --- | --- | --- | --- |")
            print(*(row.table_row() for row in rows), sep="\n", end="\n\n", flush=True)
    finally:
        await _delete_topics(job.servers)


async def _delete_topics(servers: str) -> None:
    """Delete what this run has created."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.delete_topics(
        [name for name in await admin.list_topics() if name.startswith(PREFIX)]
    )
    await admin.close()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2_000, help="of each measurement")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        asyncio.run(work(Job(**json.loads(options.work))))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiokafka", "fastapi", "uvicorn"))
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} CPUs")
    # Tests start Kafka without the JVM's second compiler; this variable overrules its arguments.
    os.environ.setdefault("_JAVA_OPTIONS", "-XX:TieredStopAtLevel=4")
    with kafka_server(report=partial(print, flush=True)) as servers:
        job = Job("", servers, f"{PREFIX}-echo")
        asyncio.run(run(options.rounds, options.requests, job))


if __name__ == "__main__":
    main()
