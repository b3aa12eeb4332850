"""The web servers that run applications: start, replies, clients that leave, stop, failure."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamEnded
from websockets.asyncio.client import connect

from kafka_broker import BrokerManager

from .observer import Observer

pytestmark = pytest.mark.integration

HERE: Final = Path(__file__).parent
LOOK_AGAIN: Final = 0.05
STOPS_WITHIN: Final = 15
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Never used; a client would make its own, which takes as long as some requests."""
NO_KAFKA: Final = "127.0.0.1:9"


@dataclass(frozen=True)
class Kind:
    """A server, and how it behaves by itself.

    Attributes:
        arguments: its module and options; ``{port}`` is one that is free.
        impatient: the options with which it does not wait long for requests as it stops.
        stopping: what it says as soon as it stops.
        ended: its exit code after SIGTERM.
        failed: its exit code when the application does not start.
        workers: how many processes answer.
    """

    name: str
    arguments: tuple[str, ...]
    impatient: tuple[str, ...]
    stopping: str
    ended: int
    failed: int
    workers: int = 1


UVICORN = Kind(
    "uvicorn",
    ("uvicorn", "web_app:app", "--port", "{port}"),
    ("--timeout-graceful-shutdown", "1"),
    stopping="Waiting for connections to close",
    ended=-signal.SIGTERM,  # it ends by the signal that has stopped it
    failed=3,
)
WORKERS = Kind(
    "uvicorn --workers 4",
    (*UVICORN.arguments, "--workers", "4"),
    UVICORN.impatient,
    stopping=UVICORN.stopping,
    ended=0,
    failed=0,  # the parent forgets why its worker has failed
    workers=4,
)
HYPERCORN = Kind(
    "hypercorn",
    ("hypercorn", "web_app:app", "--bind", "127.0.0.1:{port}"),
    ("--graceful-timeout", "1"),
    stopping="",  # it says nothing
    ended=0,
    failed=0,  # the same
)
GRANIAN = Kind(
    "granian",
    ("granian", "web_app:app", "--interface", "asgi", "--port", "{port}"),
    ("--workers-kill-timeout", "2"),
    stopping="Stopping worker-1",
    ended=0,
    failed=1,
)
RELOADING = Kind(
    "uvicorn --reload",
    ("uvicorn", "reloaded:app", "--port", "{port}", "--reload"),
    (),
    stopping="Stopping reloader",
    ended=0,
    failed=0,
)
KINDS = [UVICORN, WORKERS, HYPERCORN, GRANIAN]
STARTED_OFTEN = [
    UVICORN,
    replace(WORKERS, name="uvicorn --workers 2", arguments=(*UVICORN.arguments, "--workers", "2")),
    HYPERCORN,
    GRANIAN,
]
SINGLE = [UVICORN, HYPERCORN, GRANIAN]
HTTP2 = [HYPERCORN, GRANIAN]


def named(kind: Kind) -> str:
    return kind.name.replace(" --", " ").replace(" ", "-")


# Processes


class Process:
    """A process with all that it has printed; it and its children are a group."""

    def __init__(self, command: list[str], environment: dict[str, str], directory: Path) -> None:
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(  # noqa: S603  # our own programs, and servers for them
            [sys.executable, "-u", *command],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.output = ""
        self._silent = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.output += line
                self._news.notify_all()
        with self._news:
            self._silent = True
            self._news.notify_all()

    def says(self, pattern: str) -> re.Match[str]:
        """Return what matches *pattern*, as soon as it has been printed."""
        with self._news:
            self._news.wait_for(lambda: self._silent or re.search(pattern, self.output), 30)
            found = re.search(pattern, self.output)
        assert found is not None, f"no {pattern!r} in:\n{self.output}"
        return found

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def terminate(self) -> None:
        """Send SIGTERM to it, and not to its children."""
        self._process.terminate()

    def ends(self, within: float = STOPS_WITHIN) -> int:
        """Return its exit code as soon as it has ended by itself."""
        return self._process.wait(within)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Leave nothing of it."""
        for pid in family(self.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        print("---", self._process.args, self.output, sep="\n")


def family(leader: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,pgid=,stat="],  # noqa: S607  # wherever it is
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, of, stat in rows if int(of) == leader and not stat.startswith("Z")]


async def until(what: str, condition: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not await condition():  # noqa: ASYNC110  # nobody calls back
                await asyncio.sleep(LOOK_AGAIN)
            return
    pytest.fail(f"not within {seconds:g} s: {what}")


class Server(Process):
    """A server that runs `web_app`, or another application in *directory*."""

    def __init__(
        self, kind: Kind, environment: dict[str, str], *options: str, directory: Path = HERE
    ) -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
        self.kind = kind
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        arguments = [argument.format(port=port) for argument in kind.arguments]
        super().__init__(["-m", *arguments, *options], environment, directory)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
        async with httpx2.AsyncClient(
            base_url=self.url, timeout=30, trust_env=False, verify=NO_TLS, **options
        ) as client:
            yield client

    @property
    def websockets(self) -> str:
        return self.url.replace("http", "ws", 1)

    async def is_gone(self) -> None:
        """Wait until none of its children is left either, once it has ended."""

        async def gone() -> bool:
            return not family(self.pid)

        await until("its children are gone", gone, 5)

    async def get(self, path: str) -> Any:
        """Return what a route answers, which has to be well."""
        async with self.client() as client:
            answer = await client.get(path)
        assert 200 == answer.status_code, answer.text
        return answer.json()

    async def ready(self) -> bool:
        """Tell whether ``/readyz`` is answered, and with 200."""
        assert self.running, self.output
        async with self.client() as client:
            try:
                return (await client.get("/readyz")).status_code == 200
            except httpx2.TransportError:
                return False

    async def storages(self) -> dict[int, dict[str, int]]:
        """Return what each of its processes tells of its storage, by process id."""
        found: dict[int, dict[str, int]] = {}
        while len(found) < self.kind.workers:
            answers = await asyncio.gather(
                *(self.get("/storage") for _ in range(self.kind.workers))
            )
            found.update({answer["pid"]: answer for answer in answers})
        return found

    async def waits(self, count: int) -> None:
        """Wait until as many waits are open in all its processes."""

        async def so_many() -> bool:
            return count == sum(one["waiting"] for one in (await self.storages()).values())

        await until(f"{count} waits are open", so_many, 10)


def settings(kafka: str, payments: Process, module: str) -> dict[str, str]:
    return {
        "KAFKA_BROKER_BOOTSTRAP_SERVERS": kafka,
        "KAFKA_BROKER_MODULE": module,
        "KAFKA_BROKER_MODULE_PARTITIONS": "2",
        "KAFKA_BROKER_REPLY_PARTITIONS": "2",  # fewer than workers: some have to share
        "WEB_PAYMENTS": payments.says(r"(\S+) is ready")[1],
    }


@contextmanager
def ended(process: Process) -> Iterator[None]:
    try:
        yield
    finally:
        process.end()


@pytest.fixture(scope="module")
def payments(kafka: str) -> Iterator[Process]:
    """The process that is asked."""
    environment = {"KAFKA_BROKER_BOOTSTRAP_SERVERS": kafka, "KAFKA_BROKER_REPLY_PARTITIONS": "1"}
    made = Process(["web_app.py", f"payments-{uuid.uuid4().hex}"], environment, HERE)
    with ended(made):
        made.says("is ready")
        yield made


@pytest.fixture(scope="module", params=KINDS, ids=named)
def shared(request: pytest.FixtureRequest, kafka: str, payments: Process) -> Iterator[Server]:
    """Start a server of each kind, for all tests that it survives."""
    made = Server(request.param, settings(kafka, payments, f"m{uuid.uuid4().hex}"))
    with ended(made):
        yield made


@pytest.fixture
async def server(shared: Server) -> Server:
    """Give a test a server of each kind that is ready."""
    await until("it is ready", shared.ready)
    return shared


@pytest.fixture
def start(kafka: str, payments: Process, module: str) -> Iterator[Callable[..., Server]]:
    """Start a server of the test's own."""
    made: list[Server] = []

    def starter(kind: Kind, *options: str, directory: Path = HERE, **environment: str) -> Server:
        whole = {**settings(kafka, payments, module), **environment}
        made.append(Server(kind, whole, *options, directory=directory))
        return made[-1]

    yield starter
    for one in made:
        one.end()


class Held:
    """What payments hold for a test."""

    def __init__(self, payments: Process) -> None:
        self._payments = payments
        self._names: list[str] = []

    def name(self) -> str:
        """Make a name that nobody else has."""
        self._names.append(uuid.uuid4().hex)
        return self._names[-1]

    async def there(self, *names: str) -> None:
        """Wait until payments hold them."""
        for name in names:
            await asyncio.to_thread(self._payments.says, f"holds {name}")

    def let_go(self, *names: str) -> None:
        """Let payments reply, to all unless some are named."""
        for name in names or self._names:
            self._payments.say(name)


@pytest.fixture
def held(payments: Process) -> Iterator[Held]:
    """Names for payments to hold; after the test nothing is."""
    made = Held(payments)
    yield made
    made.let_go()


# Replies


async def test_each_route_gets_its_own_reply(server: Server) -> None:
    """On every server, once it is ready, whichever of its processes asks."""
    pids: set[int] = set()
    numbers = itertools.count()
    while len(pids) < server.kind.workers:
        asked = list(itertools.islice(numbers, 20))
        answers = await asyncio.gather(*(server.get(f"/charges/{number}") for number in asked))
        assert asked == [answer["number"] for answer in answers]
        pids |= {answer["pid"] for answer in answers}
    storages = await server.storages()
    assert {(0, 0)} == {(one["waiting"], one["kept"]) for one in storages.values()}


async def test_one_connection_serves_many_requests(server: Server) -> None:
    """What was read ahead for one of them takes nothing from the next, body or not."""
    async with server.client(limits=httpx2.Limits(max_connections=1)) as client:
        for number in range(10):
            body = b"unread" * (number % 2)
            answer = await client.request("GET", f"/charges/{number}", content=body)
            assert number == answer.json()["number"]


async def test_a_websocket_gets_its_replies(server: Server) -> None:
    """One after the other, on one connection."""
    async with connect(f"{server.websockets}/charges", proxy=None) as websocket:
        for number in ("1", "2"):
            await websocket.send(number)
            assert number == await websocket.recv()


async def test_two_brokers_in_one_application(start: Callable[..., Server], module: str) -> None:
    """Each asks under its own name, and the application is ready when both are."""
    server = start(UVICORN, WEB_AUDIT=f"{module}.audit")
    await until("it is ready", server.ready)
    assert [module, f"{module}.audit", 7, 7] == await server.get("/both/7")


# Clients that leave


@asynccontextmanager
async def connection(server: Server) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("body", ["", "of a request"], ids=["no body", "unread body"])
async def test_clients_that_leave_free_their_slots(server: Server, held: Held, body: str) -> None:
    """HTTP/1.1: every server tells at once, with several processes, too."""
    names = [held.name() for _ in range(6)]
    async with AsyncExitStack() as clients:
        for name in names:
            _, writer = await clients.enter_async_context(connection(server))
            head = f"GET /holds/{name} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}"
            writer.write(f"{head}\r\n\r\n{body}".encode())
        await held.there(*names)
        await server.waits(len(names))
    await server.waits(0)


@pytest.mark.parametrize("shared", HTTP2, ids=named, indirect=True)
async def test_a_stream_that_is_reset_frees_its_slot(server: Server, held: Held) -> None:
    """HTTP/2: the others of its connection go on, until the connection is closed."""
    names = {1: held.name(), 3: held.name(), 5: held.name()}
    async with connection(server) as (reader, writer):
        streams = H2Connection()
        streams.initiate_connection()
        for number, name in names.items():
            target = [(":method", "GET"), (":path", f"/holds/{name}")]
            streams.send_headers(
                number, [*target, (":scheme", "http"), (":authority", "test")], end_stream=True
            )
        writer.write(streams.data_to_send())
        await held.there(*names.values())
        await server.waits(3)
        streams.reset_stream(1, ErrorCodes.CANCEL)
        writer.write(streams.data_to_send())
        await server.waits(2)
        held.let_go(names[3])
        assert f'"{names[3]}"' == await body_of(3, streams, reader)
        await server.waits(1)
    await server.waits(0)


async def body_of(number: int, streams: H2Connection, reader: StreamReader) -> str:
    body = b""
    while True:
        for event in streams.receive_data(await reader.read(65536)):
            if isinstance(event, DataReceived) and event.stream_id == number:
                body += event.data
            if isinstance(event, StreamEnded) and event.stream_id == number:
                return body.decode()


@pytest.mark.parametrize("words", [0, 1], ids=["silent", "talks"])
async def test_a_websocket_that_is_closed_frees_its_slot(
    server: Server, held: Held, words: int
) -> None:
    """Whatever it has said meanwhile, and whether it says goodbye or not."""
    for farewell in (True, False):
        name = held.name()
        async with connect(f"{server.websockets}/holds/{name}", proxy=None) as websocket:
            await held.there(name)
            await server.waits(1)
            for _ in range(words):
                await websocket.send("are you there?")
            if not farewell:
                websocket.transport.abort()
        await server.waits(0)


# Stops


@pytest.mark.parametrize("kind", STARTED_OFTEN, ids=named)
async def test_a_stop_lets_work_end(
    kind: Kind,
    start: Callable[..., Server],
    held: Held,
    source: BrokerManager,
    module: str,
) -> None:
    """The request that waits and the handler that runs get their replies, and are answered."""
    server = start(kind)
    await until("it is ready", server.ready)
    asked, handled = held.name(), held.name()
    asking = asyncio.create_task(server.get(f"/holds/{asked}"))
    handling = asyncio.create_task(source.request(module, "relay", handled, timeout=30))
    for name in (asked, handled):
        await held.there(name)
    server.terminate()
    await asyncio.to_thread(server.says, kind.stopping)
    held.let_go(asked)
    assert asked == await asking
    held.let_go(handled)
    assert f"relayed {handled}" == (await handling).data
    assert kind.ended == await asyncio.to_thread(server.ends), server.output
    await server.is_gone()
    assert "Traceback" not in server.output


@pytest.mark.parametrize("kind", SINGLE, ids=named)
async def test_a_stop_does_not_wait_for_ever(
    kind: Kind, start: Callable[..., Server], held: Held
) -> None:
    """A request that gets no reply is ended as the server's own options say."""
    server = start(kind, *kind.impatient)
    await until("it is ready", server.ready)
    name = held.name()
    async with server.client() as client:
        asking = asyncio.create_task(client.get(f"/holds/{name}"))
        await held.there(name)
        server.terminate()
        outcome: Any = (await asyncio.gather(asking, return_exceptions=True))[0]
    assert isinstance(outcome, httpx2.TransportError) or outcome.is_server_error
    assert kind.ended == await asyncio.to_thread(server.ends), server.output
    await server.is_gone()


# Failures


@pytest.mark.parametrize("kind", STARTED_OFTEN, ids=named)
async def test_an_application_that_fails_to_start(
    kind: Kind, start: Callable[..., Server], observer: Observer
) -> None:
    """Its own lifespan raises after the broker has started: nothing is left, and it says why."""
    server = start(kind, WEB_FAILURE="no database")
    assert kind.failed == await asyncio.to_thread(server.ends, 30), server.output
    await server.is_gone()
    assert "RuntimeError: no database" in server.output
    assert {} == observer.shares()


@pytest.mark.parametrize("kind", SINGLE, ids=named)
async def test_a_kafka_that_is_not_there(kind: Kind, start: Callable[..., Server]) -> None:
    """The server ends after ``start_timeout``, and says which address it has tried."""
    server = start(kind, KAFKA_BROKER_BOOTSTRAP_SERVERS=NO_KAFKA, KAFKA_BROKER_START_TIMEOUT="0.5")
    assert kind.failed == await asyncio.to_thread(server.ends, 30), server.output
    await server.is_gone()
    why = f"BrokerUnavailableError: cannot connect to Kafka at {NO_KAFKA}.*check bootstrap_servers"
    assert re.search(why, server.output)


# Reload

RELOADED: Final = """
from kafka_broker import EventRouter, broker_manager
from kafka_broker.fastapi import Broker, health_router
from fastapi import FastAPI
import os

broker_manager.router = EventRouter("web")
app = FastAPI(lifespan=broker_manager.lifespan)
app.include_router(health_router)

@app.get("/version")
async def version(broker: Broker) -> list[int]:
    reply = await broker.request(os.environ["WEB_PAYMENTS"], "charge", {version})
    return [reply.data, os.getpid()]
"""


async def answers(server: Server, version: int) -> bool:
    return await server.ready() and version == (await server.get("/version"))[0]


async def test_reloads(start: Callable[..., Server], tmp_path: Path, observer: Observer) -> None:
    """The new code answers, the old process is gone, and it has left its group."""
    application = tmp_path / "reloaded.py"
    application.write_text(RELOADED.format(version=0))
    server = start(RELOADING, directory=tmp_path)
    pids: list[int] = []

    async def alone() -> bool:
        return 1 == len(await asyncio.to_thread(observer.shares))

    for version in range(4):
        application.write_text(RELOADED.format(version=version))

        await until(f"version {version} answers", partial(answers, server, version))
        pids.append((await server.get("/version"))[1])
        assert not {*pids[:-1]} & {*family(server.pid)}
        await until("one member is left", alone, 10)
    assert 4 == len({*pids})
    server.terminate()
    assert 0 == await asyncio.to_thread(server.ends), server.output
    await server.is_gone()
