"""The client that a web application answers: whether it is still there, as pure ASGI."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from tests.unit.test_engine import Works, leaves_nothing, until

from kafka_broker import BrokerManager
from kafka_broker._asgi import BrokerMiddleware
from kafka_broker._caller import Caller, caller_now
from kafka_broker.errors import NoHandlerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping

    App = Callable[[Any, Any, Any], Awaitable[None]]
    Endpoint = Callable[[Any, Any, Any], Awaitable[None]]

virtual = pytest.mark.looptime


class Exchange:
    """One request to an ASGI application, by a client that does what the test says."""

    def __init__(self, app: App, path: str = "/", *, kind: str = "http", **scope: Any) -> None:
        self.scope: dict[str, Any] = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "server": ("test", 80),
            "client": ("test", 1),
            "state": {},
            "extensions": {},
            **scope,
        }
        self._app = app
        self._incoming: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.reads = 0
        self.cancelling = -1
        self.task: asyncio.Task[None] | None = None

    def says(self, *messages: dict[str, Any] | Exception) -> None:
        for message in messages:
            self._incoming.put_nowait(message)

    def sends(self, *chunks: bytes, more: bool = False) -> None:
        for index, chunk in enumerate(chunks, 1):
            more_body = more or index < len(chunks)
            self.says({"type": "http.request", "body": chunk, "more_body": more_body})

    def leaves(self) -> None:
        kind = self.scope["type"]
        self.says({"type": f"{kind}.disconnect", **({"code": 1001} if kind != "http" else {})})

    async def receive(self) -> MutableMapping[str, Any]:
        self.reads += 1
        message = await self._incoming.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(dict(message))

    async def run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._app(self.scope, self.receive, self.send)
        finally:
            self.cancelling = task.cancelling()

    def begin(self) -> asyncio.Task[None]:
        self.task = asyncio.create_task(self.run())
        return self.task

    async def end(self, within: float = 5) -> None:
        """Wait until it has ended, in time, and raise what it has raised."""
        assert self.task is not None
        async with asyncio.timeout(within):
            await asyncio.wait({self.task})
        self.task.result()

    @property
    def status(self) -> int | None:
        starts = [one for one in self.sent if one["type"].endswith("http.response.start")]
        assert len(starts) <= 1
        return starts[0]["status"] if starts else None

    @property
    def body(self) -> bytes:
        return b"".join(
            one.get("body", b"") for one in self.sent if one["type"].endswith("response.body")
        )

    @property
    def header(self) -> dict[str, str]:
        start = next(one for one in self.sent if one["type"].endswith("response.start"))
        return {name.decode(): value.decode() for name, value in start["headers"]}


class Web:
    """A web application's broker, and a service that it asks: ``note`` echoes, ``wait`` waits."""

    def __init__(self, works: Works) -> None:
        self.works = works
        self.cancelled = 0
        servers = works.values["bootstrap_servers"]
        self.broker = BrokerManager("Web", bootstrap_servers=servers)

    @property
    def waiting(self) -> int:
        return self.broker.consumer_storage.waiting

    async def ask(self, event: str = "note", data: object = None, timeout: float = 60) -> Any:
        try:
            return (await self.broker.request("Works", event, data, timeout=timeout)).data
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def asked(self, times: int = 1) -> None:
        """Wait until so many replies are awaited, and the service has got so many requests."""
        await until(lambda: self.waiting == times and len(self.works.begun) >= times)


@asynccontextmanager
async def a_web() -> AsyncIterator[Web]:
    """Run both, and check that nothing is left of them."""
    works = Works()
    web = Web(works)
    async with leaves_nothing(works), works.broker(), web.broker:
        yield web
        assert 0 == web.waiting
        works.go.set()


async def answer(send: Any, body: bytes = b"done", status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def of(endpoint: Endpoint) -> BrokerMiddleware:
    return BrokerMiddleware(endpoint)


async def left(exchange: Exchange, web: Web, waits: int = 1) -> None:
    """Begin an exchange, have its client leave while it waits, and wait for the end."""
    exchange.begin()
    await web.asked(waits)
    exchange.leaves()
    await exchange.end()


# A client that leaves


@virtual
@pytest.mark.parametrize("body_read", [True, False])
async def test_a_client_that_leaves_during_a_request_cancels_the_route(
    body_read: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """Once: its slot is free, the exchange ends in order with 499, no cancellation is left."""
    async with a_web() as web:

        async def route(_: Any, receive: Any, send: Any) -> None:
            if body_read:
                await receive()
            await web.ask("wait")
            await answer(send)

        exchange = Exchange(of(route))
        exchange.sends(b"body")
        await left(exchange, web)
        assert (499, b"", 1, 0, 0) == (
            exchange.status,
            exchange.body,
            web.cancelled,
            web.waiting,
            exchange.cancelling,
        )
        assert "http.response.body" == exchange.sent[-1]["type"]


@virtual
@pytest.mark.parametrize("timeout", [60, None])
async def test_a_client_that_leaves_during_consume_cancels_the_route(timeout: float | None) -> None:
    """As during a request, also where the wait has no limit."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            await web.broker.consumer_storage.consume("nothing", timeout=timeout)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.begin()
        await until(lambda: web.waiting == 1)
        exchange.leaves()
        await exchange.end()
        assert (499, 0, 0) == (exchange.status, web.waiting, exchange.cancelling)


@virtual
async def test_a_client_that_leaves_while_its_route_waits_for_anything_cancels_it() -> None:
    """`receive()` of the storage is a wait, too."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            await web.broker.consumer_storage.receive()

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.begin()
        await until(lambda: exchange.reads == 2)
        exchange.leaves()
        await exchange.end()
        assert (499, 0) == (exchange.status, exchange.cancelling)


@virtual
async def test_a_client_that_has_left_before_the_wait_cancels_the_route() -> None:
    """Its disconnect was there already, unread."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            await web.ask("wait")

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.leaves()
        exchange.begin()
        await exchange.end()
        assert (499, 1, 0) == (exchange.status, web.cancelled, exchange.cancelling)


@virtual
async def test_a_route_that_knows_that_its_client_has_left_does_not_wait() -> None:
    """It has read the disconnect itself, and asks all the same: that is cancelled at once."""
    async with a_web() as web:

        async def route(_: Any, receive: Any, __: Any) -> None:
            await receive()
            assert "http.disconnect" == (await receive())["type"]
            await web.ask("wait")

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.leaves()
        exchange.begin()
        await exchange.end(within=0.1)
        assert (499, 1, 0) == (exchange.status, web.cancelled, exchange.cancelling)


async def _gather(web: Web) -> None:
    await asyncio.gather(*(web.ask("wait", number) for number in range(3)))


async def _task_group(web: Web) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(web.ask("wait", number))


@virtual
@pytest.mark.parametrize("several", [_gather, _task_group])
async def test_a_client_that_leaves_cancels_several_waits(
    several: Callable[[Web], Awaitable[None]],
) -> None:
    """All requests that the route makes at a time end, and it ends as with one."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            await several(web)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        await left(exchange, web, waits=3)
        assert (499, 3, 0, 0) == (exchange.status, web.cancelled, web.waiting, exchange.cancelling)


@virtual
async def test_a_timeout_of_the_route_s_own_around_the_wait_is_kept() -> None:
    """`asyncio.timeout` and `wait_for` let the cancellation pass, and turn it into no timeout."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            async with asyncio.timeout(30):
                await asyncio.wait_for(web.ask("wait"), 20)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        await left(exchange, web)
        assert (499, 1, 0) == (exchange.status, web.cancelled, exchange.cancelling)


@virtual
async def test_work_in_a_task_of_its_own_goes_on_when_the_client_leaves() -> None:
    """The route that watches it by `asyncio.shield` is cancelled; the task has its reply."""
    async with a_web() as web:
        tasks: list[asyncio.Task[Any]] = []

        async def work() -> Any:
            first = await web.ask("wait", "first")
            return first, await web.ask("note", "second")

        async def route(*_: Any) -> None:
            tasks.append(asyncio.create_task(work()))
            await asyncio.shield(tasks[0])

        exchange = Exchange(of(route))
        exchange.sends(b"")
        await left(exchange, web)
        assert (499, 1) == (exchange.status, web.waiting)
        web.works.go.set()
        assert ("first", "second") == await tasks[0]
        assert 0 == web.cancelled


# A client that leaves, and a route that is left alone


@virtual
async def test_a_route_that_waits_for_something_else_is_left_alone() -> None:
    """Its client leaves while it sleeps, after a reply: it ends as if it were still there."""
    async with a_web() as web:

        async def route(_: Any, __: Any, send: Any) -> None:
            await web.ask()
            exchange.leaves()
            await asyncio.sleep(10)
            await answer(send)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.begin()
        await exchange.end(within=20)
        assert (200, b"done", 0) == (exchange.status, exchange.body, exchange.cancelling)


@virtual
async def test_a_background_task_is_left_alone() -> None:
    """It waits when the answer is complete and the client goes: it gets its reply."""
    async with a_web() as web:
        seen: list[Any] = []

        async def later() -> None:
            seen.append(await web.ask("wait", "later"))

        async def route(_: Request) -> Response:
            await web.ask()
            return PlainTextResponse("done", background=BackgroundTask(later))

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        exchange = Exchange(of(app))
        exchange.sends(b"")
        exchange.begin()
        await until(lambda: web.waiting == 1 and b"done" == exchange.body)
        exchange.leaves()
        await asyncio.sleep(5)
        assert 1 == web.waiting
        web.works.go.set()
        await exchange.end()
        assert (["later"], 200, 0) == (seen, exchange.status, exchange.cancelling)


@virtual
@pytest.mark.parametrize("event", ["wait", "note"])
async def test_a_task_that_outlives_the_answer_is_left_alone(event: str) -> None:
    """Whether it began to wait before the answer or after: it reads nothing, and gets its reply."""
    async with a_web() as web:
        tasks: list[asyncio.Task[Any]] = []

        async def work() -> Any:
            await web.ask(event)
            return await web.ask("note", "reply")

        async def route(_: Any, __: Any, send: Any) -> None:
            tasks.append(asyncio.create_task(work()))
            await asyncio.sleep(0 if event == "note" else 1)
            await answer(send)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.begin()
        await exchange.end()
        exchange.leaves()
        web.works.go.set()
        assert "reply" == await tasks[0]
        assert (200, 0, 0) == (exchange.status, web.cancelled, exchange.cancelling)


@virtual
async def test_a_task_that_outlives_a_route_that_failed_is_left_alone() -> None:
    """What asks for the request is told of its end: it neither reads nor cancels any more."""
    async with a_web() as web:
        tasks: list[asyncio.Task[Any]] = []

        async def work() -> Any:
            await web.ask("wait")
            return await web.ask("note", "reply")

        async def route(*_: Any) -> None:
            tasks.append(asyncio.create_task(work()))
            await asyncio.sleep(1)
            raise LookupError

        exchange = Exchange(of(route))
        exchange.sends(b"")

        async def server() -> str:
            with pytest.raises(LookupError):
                await exchange.run()
            reads = exchange.reads
            exchange.leaves()
            web.works.go.set()
            assert "reply" == await tasks[0]
            assert reads == exchange.reads
            await asyncio.sleep(1)
            return "not cancelled"

        assert "not cancelled" == await asyncio.create_task(server())


# The body


@virtual
@pytest.mark.parametrize("chunks", [(b"body",), (b"a", b"b", b"c"), (b"",)])
async def test_a_body_can_be_read_after_a_wait(chunks: tuple[bytes, ...]) -> None:
    """Nothing of it was taken, and the end of it is told."""
    async with a_web() as web:

        async def route(request: Request) -> Response:
            await web.ask()
            await web.ask()
            return PlainTextResponse(await request.body())

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        exchange = Exchange(of(app))
        exchange.sends(*chunks)
        exchange.begin()
        await exchange.end()
        assert (200, b"".join(chunks)) == (exchange.status, exchange.body)


@virtual
async def test_a_body_that_comes_during_the_wait_can_be_read_after_it() -> None:
    """In its order, whether its parts came before, during or after the wait."""
    async with a_web() as web:

        async def route(request: Request) -> Response:
            await web.ask("wait")
            return PlainTextResponse(await request.body())

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        exchange = Exchange(of(app))
        exchange.begin()
        await web.asked()
        exchange.sends(b"a", b"b", more=True)
        await asyncio.sleep(1)
        assert 3 == exchange.reads
        web.works.go.set()
        await until(lambda: web.waiting == 0)
        exchange.sends(b"c")
        await exchange.end()
        assert b"abc" == exchange.body


@virtual
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_client_cannot_fill_the_memory_of_a_route_that_waits(kind: str) -> None:
    """What it sends meanwhile is read only up to a limit, and all of it comes in the end."""
    async with a_web() as web:
        got: list[int] = []
        part = b"x" * 50_000

        async def route(_: Any, receive: Any, send: Any) -> None:
            await web.ask("wait")
            for _number in range(40):
                got.append(len((await receive()).get("body", part)))
                await web.ask()
            await send({"type": "websocket.close"})

        exchange = Exchange(of(route), kind=kind)
        if kind == "http":
            exchange.sends(*[part] * 40)
        else:
            exchange.says(*[{"type": "websocket.receive", "bytes": part}] * 40)
        exchange.begin()
        await web.asked()
        await asyncio.sleep(1)
        assert exchange.reads <= 3
        web.works.go.set()
        await exchange.end()
        assert [50_000] * 40 == got


@virtual
async def test_a_client_that_asks_before_it_sends_is_asked_by_the_route_alone() -> None:
    """Of Expect: 100-continue: to read is to say yes, so nothing is read before the route does."""
    async with a_web() as web:

        async def route(request: Request) -> Response:
            await web.ask("note")
            assert 0 == exchange.reads
            body = await request.body()
            await web.ask("wait")
            return PlainTextResponse(body)

        app = of(Starlette(routes=[Route("/", route, methods=["POST"])]))
        exchange = Exchange(app, headers=[(b"expect", b"100-continue")])
        exchange.sends(b"body")
        exchange.begin()
        await until(lambda: len(web.works.begun) == 2)
        exchange.leaves()
        await exchange.end()
        assert (499, 1, 0) == (exchange.status, web.cancelled, exchange.cancelling)


@virtual
async def test_a_client_that_leaves_in_the_middle_of_its_body_cancels_the_wait() -> None:
    """Although nobody has read what it has sent."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            await web.ask("wait")

        exchange = Exchange(of(route))
        exchange.sends(b"half", more=True)
        await left(exchange, web)
        assert (499, 1, 0) == (exchange.status, web.cancelled, exchange.cancelling)


@virtual
async def test_a_route_may_stream_the_body_and_ask_for_each_part() -> None:
    """Each part is asked about once, in its order."""
    async with a_web() as web:

        async def route(request: Request) -> Response:
            told = [
                await web.ask("note", chunk.decode()) async for chunk in request.stream() if chunk
            ]
            return JSONResponse(told)

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        exchange = Exchange(of(app))
        exchange.sends(b"a", b"b", b"c")
        exchange.begin()
        await exchange.end()
        assert b'["a","b","c"]' == exchange.body


@virtual
async def test_a_route_that_reads_on_in_a_task_while_it_waits_gets_every_part() -> None:
    """A read that was under way before the wait, or begins in it, loses nothing."""
    async with a_web() as web:
        got: list[bytes] = []

        async def read(receive: Any) -> None:
            more = True
            while more:
                message = await receive()
                got.append(message["body"])
                more = message["more_body"]

        async def route(_: Any, receive: Any, send: Any) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(read(receive))
                await asyncio.sleep(0)
                tasks.create_task(web.ask("wait"))
            await answer(send)

        exchange = Exchange(of(route))
        exchange.begin()
        await web.asked()
        for chunk in (b"a", b"b", b"c"):
            exchange.sends(chunk, more=True)
            await asyncio.sleep(0.1)
        exchange.sends(b"d")
        web.works.go.set()
        await exchange.end()
        assert [b"a", b"b", b"c", b"d"] == got


@virtual
async def test_a_read_that_is_cancelled_during_a_wait_loses_nothing() -> None:
    """The message that it waited for goes to the next one who reads."""
    async with a_web() as web:
        got: list[Any] = []

        async def route(_: Any, receive: Any, send: Any) -> None:
            asking = asyncio.create_task(web.ask("wait"))
            await web.asked()
            reading = asyncio.create_task(receive())
            await asyncio.sleep(1)
            reading.cancel()
            await asyncio.wait({reading})
            assert reading.cancelled()
            exchange.sends(b"body")
            got.append((await receive())["body"])
            web.works.go.set()
            await asking
            await answer(send)

        exchange = Exchange(of(route))
        exchange.begin()
        await exchange.end()
        assert ([b"body"], 200) == (got, exchange.status)


@virtual
async def test_is_disconnected_tells_the_truth_after_a_wait() -> None:
    """No while the client is there, yes each time once it has left; the body is not lost by it."""
    async with a_web() as web:
        seen: list[bool] = []

        async def route(request: Request) -> Response:
            body = await request.body()
            await web.ask()
            seen.append(await request.is_disconnected())
            exchange.leaves()
            with contextlib.suppress(asyncio.CancelledError):
                await web.ask("wait")
            seen.extend([await request.is_disconnected(), await request.is_disconnected()])
            return PlainTextResponse(body)

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        exchange = Exchange(of(app))
        exchange.sends(b"body")
        exchange.begin()
        await exchange.end()
        assert ([False, True, True], b"body", 0) == (seen, exchange.body, exchange.cancelling)


@virtual
async def test_a_body_that_is_cut_off_raises_for_the_one_who_reads_it() -> None:
    """Starlette's own error comes, as it would without a wait before."""
    async with a_web() as web:
        seen: list[str] = []

        async def route(request: Request) -> Response:
            await web.ask()
            exchange.leaves()
            try:
                await request.body()
            except Exception as exc:
                seen.append(type(exc).__name__)
                raise
            return Response()

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        exchange = Exchange(of(app))
        exchange.sends(b"half", more=True)
        exchange.begin()
        with contextlib.suppress(Exception):
            await exchange.end()
        assert ["ClientDisconnect"] == seen


# Cancellations from elsewhere


@virtual
@pytest.mark.parametrize("order", ["alone", "after", "before", "later"])
async def test_a_cancellation_from_elsewhere_goes_on(order: str) -> None:
    """Alone, or at the same moment as the client's: the server's own task is cancelled."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            try:
                await web.ask("wait")
            except asyncio.CancelledError:
                if order == "later":
                    exchange.task.cancel()  # type: ignore[union-attr]  # it runs
                raise

        exchange = Exchange(of(route))
        exchange.sends(b"")
        task = exchange.begin()
        await web.asked()
        caller: Caller = exchange.scope["kafka_broker.caller"]
        if order == "later":
            exchange.leaves()
        if order == "after":
            caller._note({"type": "http.disconnect"})
        if order != "later":
            task.cancel()
        if order == "before":
            caller._note({"type": "http.disconnect"})
        with pytest.raises(asyncio.CancelledError):
            await exchange.end()
        assert (True, 1, 0) == (task.cancelled(), exchange.cancelling, web.waiting)


@virtual
@pytest.mark.parametrize("turns", range(6))
async def test_a_shutdown_and_a_disconnect_end_in_the_shutdown(turns: int) -> None:
    """However few turns of the loop are between them."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            await web.ask("wait")

        exchange = Exchange(of(route))
        exchange.sends(b"")
        task = exchange.begin()
        await web.asked()
        exchange.leaves()
        for _ in range(turns):
            await asyncio.sleep(0)
        ended = task.done()
        task.cancel()
        await asyncio.wait({task})
        assert (not ended) == task.cancelled()


@virtual
async def test_a_route_that_swallows_a_foreign_cancellation_does_not_swallow_it_for_all() -> None:
    """The client's was taken back, the server's goes on."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await web.ask("wait")

        exchange = Exchange(of(route))
        exchange.sends(b"")
        task = exchange.begin()
        await web.asked()
        exchange.scope["kafka_broker.caller"]._note({"type": "http.disconnect"})
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.end()


@virtual
@pytest.mark.parametrize("answers", [True, False])
async def test_a_route_that_swallows_the_cancellation_ends_as_it_likes(
    answers: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """No cancellation is left on the server's task; without an answer of its own it is 499."""
    async with a_web() as web:

        async def route(_: Any, __: Any, send: Any) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await web.ask("wait")
            if answers:
                await asyncio.sleep(1)
                await answer(send)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        await left(exchange, web)
        assert (200 if answers else 499, 0) == (exchange.status, exchange.cancelling)


@virtual
async def test_a_route_that_fails_after_the_cancellation_fails() -> None:
    """Its own error goes on to the server, without a cancellation on its task."""
    async with a_web() as web:

        async def route(*_: Any) -> None:
            try:
                await web.ask("wait")
            finally:
                raise LookupError

        exchange = Exchange(of(route))
        exchange.sends(b"")
        with pytest.raises(LookupError):
            await left(exchange, web)
        assert (0, 0) == (web.waiting, exchange.cancelling)


@virtual
async def test_a_second_wait_after_the_client_left_is_not_cancelled_again() -> None:
    """A route is cancelled once; what it asks for in its clean-up it gets."""
    async with a_web() as web:
        seen: list[Any] = []

        async def route(*_: Any) -> None:
            try:
                await web.ask("wait")
            finally:
                seen.append(await web.ask("note", "cleaned up"))

        exchange = Exchange(of(route))
        exchange.sends(b"")
        await left(exchange, web)
        assert (499, ["cleaned up"], 0) == (exchange.status, seen, exchange.cancelling)


@virtual
async def test_a_reply_at_the_moment_the_client_leaves_leaves_no_cancellation() -> None:
    """Whichever comes first: the exchange ends in order, and nothing is left."""
    for turns in range(12):
        async with a_web() as web:

            async def route(_: Any, __: Any, send: Any, web: Web = web) -> None:
                await web.ask("wait")
                await answer(send)

            exchange = Exchange(of(route))
            exchange.sends(b"")
            exchange.begin()
            await web.asked()
            web.works.go.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            exchange.leaves()
            await exchange.end()
            assert exchange.status in {200, 499}
            assert (0, 0) == (exchange.cancelling, web.waiting)


# Servers, and the end of an exchange


@virtual
async def test_a_server_whose_receive_raises_is_met_by_the_one_who_reads() -> None:
    """The wait goes on and gets its reply; nothing is logged as never retrieved."""
    async with a_web() as web:

        async def route(_: Any, __: Any, send: Any) -> None:
            await answer(send, str(await web.ask("wait", "reply")).encode())

        exchange = Exchange(of(route))
        exchange.says(OSError("the connection broke"))
        exchange.begin()
        await web.asked()
        web.works.go.set()
        await exchange.end()
        assert (200, b"reply") == (exchange.status, exchange.body)


@virtual
async def test_a_server_that_does_not_give_up_reading_delays_the_end_by_a_second() -> None:
    """Not for ever; the answer is out before."""
    async with a_web() as web:
        stubborn, ended = asyncio.Event(), asyncio.Event()

        async def route(_: Any, __: Any, send: Any) -> None:
            await web.ask()
            await answer(send)

        async def receive() -> Any:
            try:
                await stubborn.wait()
            except asyncio.CancelledError:
                await stubborn.wait()
            ended.set()
            return {"type": "http.disconnect"}

        exchange = Exchange(of(route))
        exchange.receive = receive  # type: ignore[method-assign]  # another server
        began = asyncio.get_running_loop().time()
        exchange.begin()
        await exchange.end()
        assert 200 == exchange.status
        assert asyncio.get_running_loop().time() - began < 2
        stubborn.set()
        await ended.wait()


@virtual
async def test_a_cancellation_while_reading_is_given_up_goes_on() -> None:
    """At the last await of ours: the exchange is cancelled, and no task is left."""
    async with a_web() as web:
        stubborn, told = asyncio.Event(), asyncio.Event()

        async def route(*_: Any) -> None:
            await web.ask()

        async def receive() -> Any:
            try:
                await stubborn.wait()
            except asyncio.CancelledError:
                told.set()
                await stubborn.wait()
            return {"type": "http.disconnect"}

        exchange = Exchange(of(route))
        exchange.receive = receive  # type: ignore[method-assign]  # another server
        task = exchange.begin()
        await told.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.end()
        assert caller_now.get() is None
        stubborn.set()
        await until(lambda: not any("_next" in repr(one) for one in asyncio.all_tasks()))


@virtual
@pytest.mark.parametrize("started", [True, False])
async def test_a_server_that_refuses_to_send_to_nobody_is_no_error(
    started: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """ASGI 2.4 has it raise OSError once the client has left; there is nothing to report."""
    async with a_web() as web:
        gone = asyncio.Event()

        async def route(_: Any, __: Any, send: Any) -> None:
            if started:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await web.ask("wait")

        async def send(message: Any) -> None:
            if gone.is_set():
                raise OSError
            exchange.sent.append(message)

        exchange = Exchange(of(route))
        exchange.send = send  # type: ignore[method-assign]  # another server
        exchange.sends(b"")
        exchange.begin()
        await web.asked()
        gone.set()
        exchange.leaves()
        await exchange.end()
        assert (200 if started else None, 0) == (exchange.status, exchange.cancelling)


@virtual
async def test_middleware_of_one_s_own_and_the_door_s_are_one() -> None:
    """An application that has both watches its client once, and answers once."""
    async with a_web() as web:

        async def route(request: Request) -> Response:
            return PlainTextResponse(str(await web.ask((await request.body()).decode(), "reply")))

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        web.broker.init_consumer_app(app)
        app.add_middleware(BrokerMiddleware)
        stays, leaves, fails = Exchange(app), Exchange(app), Exchange(app)
        stays.sends(b"note")
        stays.begin()
        await stays.end()
        assert (200, b"reply") == (stays.status, stays.body)
        fails.sends(b"unheard.of")
        fails.begin()
        await fails.end()
        assert 502 == fails.status
        leaves.sends(b"wait")
        leaves.begin()
        await until(lambda: web.waiting == 1)
        leaves.leaves()
        await leaves.end()
        assert (499, 1, 0) == (leaves.status, web.cancelled, leaves.cancelling)


@virtual
async def test_the_server_is_not_read_from_without_a_wait() -> None:
    """A route that asks nobody costs no task and no read."""
    async with a_web():

        async def route(_: Any, __: Any, send: Any) -> None:
            await asyncio.sleep(1)
            await answer(send)

        exchange = Exchange(of(route))
        exchange.sends(b"")
        exchange.begin()
        await exchange.end()
        assert 0 == exchange.reads


@virtual
async def test_an_exchange_without_a_client_s_word_leaves_no_task() -> None:
    """Reading ahead ends with the answer, also when the client says nothing more."""
    async with a_web() as web:

        async def route(_: Any, __: Any, send: Any) -> None:
            await web.ask()
            await answer(send)

        exchange = Exchange(of(route))
        exchange.begin()
        await exchange.end()
        assert 1 == exchange.reads
        assert [] == [one for one in asyncio.all_tasks() if "_next" in repr(one)]


@virtual
async def test_a_scope_may_be_used_again() -> None:
    """Middleware may call the application twice: its client is watched the second time, too."""
    async with a_web() as web:
        events = ["note", "wait"]

        async def route(_: Any, __: Any, send: Any) -> None:
            await web.ask(events.pop(0))
            await answer(send)

        app = of(route)

        async def twice(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, _nothing)
            await app(scope, receive, send)

        exchange = Exchange(twice)
        exchange.sends(b"")
        exchange.begin()
        await until(lambda: not events and web.waiting == 1)
        exchange.leaves()
        await until(lambda: web.waiting == 0, within=5)
        await exchange.end()
        assert 499 == exchange.status


async def _nothing(_: Any) -> None: ...


@virtual
async def test_another_kind_of_scope_passes() -> None:
    """The lifespan is the application's own."""
    seen: list[str] = []

    async def app(scope: Any, _: Any, __: Any) -> None:
        seen.append(scope["type"])
        assert caller_now.get() is None

    await of(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]  # not looked at
    assert ["lifespan"] == seen


# Streams and other middleware


@virtual
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_a_client_that_leaves_a_stream_ends_it(spec: str) -> None:
    """An answer that asks as it goes: what was sent stays, the wait ends, and the body ends."""
    async with a_web() as web:

        async def parts() -> AsyncIterator[str]:
            yield str(await web.ask("note", "first"))
            yield str(await web.ask("wait"))

        async def route(_: Request) -> Response:
            return StreamingResponse(parts())

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        app.router.middleware_stack = of(app.router.middleware_stack)
        exchange = Exchange(app, asgi={"version": "3.0", "spec_version": spec})
        exchange.sends(b"")
        exchange.begin()
        await until(lambda: web.works.begun == ["first", None])
        exchange.leaves()
        await exchange.end()
        assert (200, b"first", 0) == (exchange.status, exchange.body, exchange.cancelling)
        assert 0 == web.waiting


@virtual
async def test_a_stream_whose_client_stays_is_sent_to_its_end() -> None:
    """Each of its parts may be a reply."""
    async with a_web() as web:

        async def parts() -> AsyncIterator[str]:
            for part in "abc":
                yield str(await web.ask("note", part))

        async def route(_: Request) -> Response:
            return StreamingResponse(parts())

        app = Starlette(routes=[Route("/", route, methods=["POST"])])
        app.router.middleware_stack = of(app.router.middleware_stack)
        exchange = Exchange(app)
        exchange.sends(b"")
        exchange.begin()
        await exchange.end()
        assert (200, b"abc", 0) == (exchange.status, exchange.body, exchange.cancelling)


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["x-passed"] = "yes"
        return response


def _outside(route: Any) -> App:
    app = Starlette(
        routes=[Route("/", route, methods=["POST"])], middleware=[Middleware(Passing)] * 2
    )
    app.router.middleware_stack = of(app.router.middleware_stack)
    return app


def _inside(route: Any) -> App:
    inner = Route("/", route, methods=["POST"])
    app = Starlette(routes=[Mount("/", routes=[inner], middleware=[Middleware(Passing)] * 2)])
    app.router.middleware_stack = of(app.router.middleware_stack)
    return app


@virtual
@pytest.mark.parametrize("make", [_outside, _inside])
async def test_base_http_middleware_may_be_around_it_or_in_it(make: Callable[[Any], App]) -> None:
    """A client that leaves frees the slot and ends the exchange; one that stays gets its answer."""
    async with a_web() as web:

        async def route(request: Request) -> Response:
            return PlainTextResponse(str(await web.ask((await request.body()).decode(), "reply")))

        app = make(route)
        stays = Exchange(app)
        stays.sends(b"note")
        stays.begin()
        await stays.end()
        assert (200, b"reply", "yes") == (stays.status, stays.body, stays.header["x-passed"])
        leaves = Exchange(app)
        leaves.sends(b"wait")
        leaves.begin()
        await until(lambda: web.waiting == 1)
        leaves.leaves()
        await leaves.end()
        assert (499, 0, 1, 0) == (leaves.status, leaves.cancelling, web.cancelled, web.waiting)


@virtual
@pytest.mark.parametrize("make", [_outside, _inside])
async def test_background_tasks_are_left_alone_within_base_http_middleware(
    make: Callable[[Any], App],
) -> None:
    """A task that begins as the last of the answer is on its way through is after the answer."""
    async with a_web() as web:
        seen: list[Any] = []

        async def later() -> None:
            seen.append(await web.ask("wait", "reply"))

        async def route(request: Request) -> Response:
            request.scope["kafka_broker.caller"].expect_answer(2)
            return PlainTextResponse("done", background=BackgroundTask(later))

        exchange = Exchange(make(route))
        exchange.sends(b"")
        exchange.begin()
        await until(lambda: web.waiting == 1 and b"done" == exchange.body)
        exchange.leaves()
        await asyncio.sleep(5)
        web.works.go.set()
        await exchange.end()
        assert (["reply"], 200) == (seen, exchange.status)


# WebSockets


def _socket(endpoint: Any) -> App:
    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    app.router.middleware_stack = of(app.router.middleware_stack)
    return app


CONNECT = {"type": "websocket.connect"}


def text(what: str) -> dict[str, Any]:
    return {"type": "websocket.receive", "text": what}


@virtual
async def test_a_websocket_that_is_closed_during_a_wait_cancels_its_route() -> None:
    """Once, and its slot is free."""
    async with a_web() as web:

        async def route(socket: WebSocket) -> None:
            await socket.accept()
            await web.ask("wait")

        exchange = Exchange(_socket(route), kind="websocket")
        exchange.says(CONNECT)
        await left(exchange, web)
        assert (["websocket.accept"], 1, 0) == (
            [one["type"] for one in exchange.sent],
            web.cancelled,
            exchange.cancelling,
        )


@virtual
async def test_messages_of_a_websocket_keep_their_order_across_waits() -> None:
    """What comes while the route waits is not lost, and comes before what comes later."""
    async with a_web() as web:
        got: list[str] = []

        async def route(socket: WebSocket) -> None:
            await socket.accept()
            await web.ask("wait")
            for number in range(5):
                got.append(await socket.receive_text())
                await web.ask("note", number)
            await socket.close()

        exchange = Exchange(_socket(route), kind="websocket")
        exchange.says(CONNECT)
        exchange.begin()
        await web.asked()
        exchange.says(text("a"), text("b"), text("c"))
        await asyncio.sleep(1)
        web.works.go.set()
        await until(lambda: len(got) >= 2)
        exchange.says(text("d"), text("e"))
        await exchange.end()
        assert ["a", "b", "c", "d", "e"] == got


@virtual
async def test_a_websocket_is_told_of_its_end_after_a_wait() -> None:
    """It comes after the messages that came before it."""
    async with a_web() as web:
        got: list[str] = []

        async def route(socket: WebSocket) -> None:
            await socket.accept()
            await web.ask("wait")
            try:
                while True:
                    got.append(await socket.receive_text())
            except WebSocketDisconnect as exc:
                got.append(f"{exc.code}")

        exchange = Exchange(_socket(route), kind="websocket")
        exchange.says(CONNECT)
        exchange.begin()
        await web.asked()
        exchange.says(text("a"), text("b"))
        await asyncio.sleep(1)
        web.works.go.set()
        await until(lambda: web.waiting == 0)
        exchange.leaves()
        await exchange.end()
        assert ["a", "b", "1001"] == got


@virtual
@pytest.mark.parametrize("accepted", [True, False])
async def test_a_websocket_that_ends_behind_unread_messages_cancels_its_route(
    accepted: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """Its end is seen although the application has taken none of what came before."""
    async with a_web() as web:

        async def route(socket: WebSocket) -> None:
            if accepted:
                await socket.accept()
            await web.ask("wait")

        exchange = Exchange(_socket(route), kind="websocket")
        exchange.says(CONNECT)
        exchange.begin()
        await web.asked()
        exchange.says(*([text("a"), text("b")] if accepted else []))
        exchange.leaves()
        await exchange.end()
        assert (1, 0, 0) == (web.cancelled, web.waiting, exchange.cancelling)


@virtual
async def test_a_socket_that_is_asked_for_before_it_is_accepted_may_be_accepted_later() -> None:
    """The wait before `accept` takes nothing away."""
    async with a_web() as web:

        async def route(socket: WebSocket) -> None:
            reply = await web.ask("note", "reply")
            await socket.accept()
            await socket.send_text(reply)
            await socket.close()

        exchange = Exchange(_socket(route), kind="websocket")
        exchange.says(CONNECT)
        exchange.begin()
        await exchange.end()
        kinds = [one["type"].removeprefix("websocket.") for one in exchange.sent]
        assert ["accept", "send", "close"] == kinds


@virtual
@pytest.mark.parametrize("extension", [True, False])
async def test_an_error_before_a_websocket_is_accepted_refuses_it(
    extension: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """By the problem where the server can send it, else by a close."""

    async def route(_: WebSocket) -> None:
        raise NoHandlerError("nobody", "id")

    extensions: dict[str, Any] = {"websocket.http.response": {}} if extension else {}
    exchange = Exchange(_socket(route), kind="websocket", extensions=extensions)
    exchange.says(CONNECT)
    exchange.begin()
    await exchange.end()
    if extension:
        assert 502 == exchange.status
        assert "application/problem+json" == exchange.header["content-type"]
        assert b'"urn:kafka-broker:no-handler"' in exchange.body
    else:
        close = {"type": "websocket.close", "code": 1011, "reason": "502 no-handler"}
        assert [close] == exchange.sent


@virtual
async def test_an_error_after_a_websocket_was_closed_goes_on() -> None:
    """There is nobody to tell; the server logs it."""

    async def route(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()
        raise NoHandlerError("nobody", "id")

    exchange = Exchange(_socket(route), kind="websocket")
    exchange.says(CONNECT)
    exchange.begin()
    with pytest.raises(NoHandlerError):
        await exchange.end()
    assert "websocket.close" == exchange.sent[-1]["type"]


async def test_nobody_reads_after_the_end_for_a_task_that_still_waits() -> None:
    """Also where a server answers a read that was cancelled with a message."""
    reads, begun, over = 0, asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal reads
        reads += 1
        begun.set()
        with suppress(asyncio.CancelledError):
            await over.wait()
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(_: Any) -> None: ...

    async def wait_in(caller: Caller) -> None:
        with caller.waiting():
            await over.wait()

    async with Caller(receive, send) as caller:
        waiting = asyncio.create_task(wait_in(caller))
        await begun.wait()
    over.set()
    await waiting
    assert (1, None) == (reads, caller._ahead)
