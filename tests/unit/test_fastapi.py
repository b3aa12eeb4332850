"""The edge to FastAPI: `Broker`, deadlines, traces, OpenAPI, and the doors of an application."""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import httpx2
import pytest
import uvicorn
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Request, WebSocket
from fastapi.openapi.models import OpenAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from tests.unit.test_caller import Exchange, Web
from tests.unit.test_engine import Works, leaves_nothing, until

from kafka_broker import BrokerManager, EventObject
from kafka_broker.errors import BrokerClosedError, ReplyTimeoutError
from kafka_broker.fastapi import Accepted, Broker, BrokerMiddleware, PendingReplies, broker_from

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

virtual = pytest.mark.looptime

Audit = Annotated[BrokerManager, Depends(broker_from("Audit"))]


def a_broker(module: str = "Web") -> BrokerManager:
    return BrokerManager(module, bootstrap_servers=f"memory://{uuid.uuid4().hex}")


async def module_of(broker: Broker) -> str:
    return broker.settings.module


async def indirectly(module: Annotated[str, Depends(module_of)]) -> str:
    return module


async def module_of_audit(broker: Audit) -> str:
    return broker.settings.module


class Serving(Web):
    """An application on a broker that is started, and a client of it, in one loop."""

    client: httpx2.AsyncClient

    def __init__(self, works: Works) -> None:
        super().__init__(works)
        self.app = FastAPI()
        self.broker.init_consumer_app(self.app)
        self.state: Mapping[str, Any] | None = None

    async def served(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app({**scope, "state": dict(self.state or {})}, receive, send)

    @property
    def traces(self) -> list[dict[str, str]]:
        """The trace headers of what is in the topic of the service, in its order."""
        return [
            {
                name: (value or b"").decode()
                for name, value in record.headers
                if name in {"traceparent", "tracestate"}
            }
            for record in self.works.cluster.records("Works")
        ]


@asynccontextmanager
async def serving() -> AsyncIterator[Serving]:
    works = Works(handler_timeout=10_000, commit_interval=1)
    one = Serving(works)
    transport = httpx2.ASGITransport(one.served)
    async with leaves_nothing(works), works.broker():
        async with (
            one.app.router.lifespan_context(one.app) as one.state,
            httpx2.AsyncClient(transport=transport, base_url="http://test") as one.client,
        ):
            yield one
            works.go.set()
        assert 0 == one.waiting


# Broker


def test_routes_have_the_broker() -> None:
    """In routes, by a dependency of theirs, in included routers, and in WebSockets."""
    app, router = FastAPI(lifespan=a_broker().lifespan), APIRouter(prefix="/v2")
    for where in (app, router):
        where.add_api_route("/direct", module_of)
        where.add_api_route("/indirect", indirectly)

    @app.websocket("/socket")
    async def socket(socket: WebSocket, broker: Broker) -> None:
        await socket.accept()
        await socket.send_text(broker.settings.module)
        await socket.close()

    app.include_router(router)
    with TestClient(app) as client:
        for path in ("/direct", "/indirect", "/v2/direct", "/v2/indirect"):
            assert "Web" == client.get(path).json()
        with client.websocket_connect("/socket") as connected:
            assert "Web" == connected.receive_text()


def test_a_background_task_has_the_broker() -> None:
    """It is handed on to it, and asks when the answer is out."""
    broker, seen = a_broker(), list[bool]()
    app = FastAPI(lifespan=broker.lifespan)

    async def later(broker: BrokerManager) -> None:
        await broker.produce("Web", EventObject(event="told"))
        seen.append(broker.ready)

    @app.get("/")
    async def route(broker: Broker, background: BackgroundTasks) -> str:
        background.add_task(later, broker)
        return "done"

    with TestClient(app) as client:
        assert "done" == client.get("/").json()
    assert [True] == seen


def test_several_brokers_of_init_consumer_app() -> None:
    """`Broker` is the first that was added; each is there by the name of its module."""
    app = FastAPI()
    for module in ("Web", "Audit"):
        a_broker(module).init_consumer_app(app)
    app.add_api_route("/first", module_of)
    app.add_api_route("/audit", module_of_audit)
    with TestClient(app) as client:
        assert "Web" == client.get("/first").json()
        assert "Audit" == client.get("/audit").json()


async def test_a_client_without_the_state_gets_the_same_brokers() -> None:
    """Where the transport does not pass it on: `Broker` is the first one, as long as it runs."""
    app, web = FastAPI(), a_broker()
    web.init_consumer_app(app)
    a_broker("Audit").init_consumer_app(app)
    app.add_api_route("/first", module_of)
    app.add_api_route("/audit", module_of_audit)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        async with app.router.lifespan_context(app):
            answers = [(await client.get(path)).json() for path in ("/first", "/audit")]
            assert ["Web", "Audit"] == answers
        async with web.lifespan(app):
            async with a_broker("Audit").lifespan(app):
                pass
            assert "Web" == (await client.get("/first")).json()


def test_several_brokers_of_a_composed_lifespan() -> None:
    """By the names of their modules, or by keys of its own."""
    web, audit, third = a_broker(), a_broker("Audit"), a_broker("Third")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with web.lifespan(app) as one, audit.lifespan(app) as two, third:
            yield {**two, **one, "mine": third}

    @asynccontextmanager
    async def mine(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with lifespan(app) as state:
            yield state

    app = FastAPI(lifespan=mine)
    app.add_api_route("/first", module_of)
    app.add_api_route("/audit", module_of_audit)

    @app.get("/mine")
    async def by_key(broker: Annotated[BrokerManager, Depends(broker_from("mine"))]) -> str:
        return broker.settings.module

    with TestClient(app) as client:
        answers = [client.get(path).json() for path in ("/first", "/audit", "/mine")]
    assert ["Web", "Audit", "Third"] == answers


def test_the_dependency_can_be_overridden() -> None:
    """By its function, which is the same one for the same name; no lifespan has to run then."""
    assert broker_from() is broker_from(None) is broker_from(name=None)
    assert broker_from("Audit") is broker_from(name="Audit")
    app = FastAPI()
    app.add_api_route("/", module_of)
    app.add_api_route("/audit", module_of_audit)
    other, audit = a_broker("Other"), a_broker("AlsoOther")
    app.dependency_overrides[broker_from()] = lambda: other
    app.dependency_overrides[broker_from("Audit")] = lambda: audit
    client = TestClient(app)
    assert ["Other", "AlsoOther"] == [client.get(path).json() for path in ("/", "/audit")]


@pytest.mark.parametrize(
    ("route", "what"), [(module_of, "no broker runs"), (module_of_audit, "no broker 'Audit' runs")]
)
def test_without_its_broker_an_application_says_what_to_do(
    route: Callable[..., Any], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the error and in the log; its client gets a problem that does not."""
    app = FastAPI()
    app.add_api_route("/", route)
    with pytest.raises(BrokerClosedError, match=f"{what}.*init_consumer_app"):
        TestClient(app).get("/")
    a_broker().init_consumer_app(app)
    answer = TestClient(app).get("/")  # it is not entered, so no lifespan runs
    assert (503, "closed") == (answer.status_code, answer.json()["code"])
    assert "init_consumer_app" not in answer.text
    assert "init_consumer_app" in caplog.text


def test_a_name_that_no_broker_has_is_told_with_those_that_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A typing mistake needs no other advice."""
    app = FastAPI(lifespan=a_broker().lifespan)
    app.add_api_route("/", module_of_audit)
    with TestClient(app) as client:
        assert 503 == client.get("/").status_code
    assert "no broker 'Audit' runs with this application, but Web" in caplog.text


async def test_of_two_nested_lifespans_the_first_broker_is_the_default() -> None:
    """Also where the state of the second is merged over that of the first."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with a_broker().lifespan(app) as first, a_broker("Audit").lifespan(app) as second:
            yield {**first, **second}

    app = FastAPI(lifespan=lifespan)
    async with app.router.lifespan_context(app) as state:
        assert state is not None
        assert "Web" == state["broker"].settings.module
        assert {"broker", "broker:Web", "broker:Audit"} == set(state)


# Deadlines


@virtual
@pytest.mark.parametrize(
    ("says", "timeout", "waited"),
    [("2", 60.0, 2), ("0.5", 60.0, 0.5), ("100", 3.0, 3), (None, 3.0, 3), ("1e-9", 60.0, 0)],
)
async def test_a_caller_may_give_less_time(says: str | None, timeout: float, waited: float) -> None:
    """A request ends by the caller's limit or by the route's, whichever is first."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> None:
            await broker.request("Works", "wait", timeout=timeout)

        headers = {} if says is None else {"x-request-timeout": says}
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await one.client.get("/", headers=headers)
        assert (504, "reply-timeout") == (answer.status_code, answer.json()["code"])
        assert waited == pytest.approx(loop.time() - began, abs=0.05)


@virtual
@pytest.mark.parametrize("timeout", [60, None])
async def test_a_consume_ends_by_the_caller_s_time(timeout: float | None) -> None:
    """Also one that would wait for ever."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> None:
            await broker.consumer_storage.consume("nothing", timeout=timeout)

        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await one.client.get("/", headers={"x-request-timeout": "2"})
        assert 504 == answer.status_code
        assert 2 == pytest.approx(loop.time() - began, abs=0.05)


@virtual
async def test_a_deadline_travels_with_the_request() -> None:
    """The service that is asked does not begin what nobody waits for."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> None:
            await broker.request("Works", "wait", timeout=600)

        await one.client.get("/", headers={"x-request-timeout": "2"})
        (record,) = one.works.cluster.records("Works")
        deadline = int(dict(record.headers)["kb-deadline"] or 0)
        assert 2000 == pytest.approx(deadline - record.timestamp, abs=50)


@virtual
async def test_after_its_time_a_caller_s_route_asks_nobody() -> None:
    """The second request ends at once, and is not sent."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> str:
            for number in range(2):
                with pytest.raises(ReplyTimeoutError):
                    await broker.request("Works", "wait", number, timeout=60)
            return "done"

        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await one.client.get("/", headers={"x-request-timeout": "2"})
        assert "done" == answer.json()
        assert 2 == pytest.approx(loop.time() - began, abs=0.05)
        assert 1 == len(one.works.cluster.records("Works"))


@virtual
async def test_a_caller_s_time_is_for_all_that_its_route_does() -> None:
    """What other work has used up is gone for the wait."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> None:
            await asyncio.sleep(3)
            await broker.request("Works", "wait", timeout=60)

        loop = asyncio.get_running_loop()
        began = loop.time()
        assert 504 == (await one.client.get("/", headers={"x-request-timeout": "5"})).status_code
        assert 5 == pytest.approx(loop.time() - began, abs=0.05)


@virtual
@pytest.mark.parametrize("says", ["0", "-1", "nan", "inf", "1e999", "soon", ""])
async def test_a_time_that_is_none_is_refused(says: str) -> None:
    """By FastAPI, with a 422 that names the header; the route is not run."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> str:
            return broker.settings.module

        answer = await one.client.get("/", headers={"x-request-timeout": says})
        assert 422 == answer.status_code
        assert ["header", "x-request-timeout"] == answer.json()["detail"][0]["loc"]


@virtual
async def test_a_caller_s_time_does_not_bound_what_comes_after_the_answer() -> None:
    """A background task, and a reply that is fetched later."""
    async with serving() as one:
        replies, seen = PendingReplies(), list[Any]()
        one.app.include_router(replies.router)

        async def later(broker: BrokerManager) -> None:
            seen.append((await broker.request("Works", "wait", "later", timeout=60)).data)

        @one.app.post("/")
        async def route(broker: Broker, background: BackgroundTasks) -> Accepted:
            background.add_task(later, broker)
            return await replies.ask(broker, "Works", "wait", "fetched", timeout=60)

        loop = asyncio.get_running_loop()
        loop.call_later(10, one.works.go.set)
        answer = await one.client.post("/", headers={"x-request-timeout": "1"})
        reply = await one.client.get(answer.json()["location"], params={"timeout": 20})
        assert ("fetched", ["later"]) == (reply.json()["data"], seen)


# Traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "vendor=1,other=2"


async def _traced(one: Serving, headers: list[tuple[str, str]]) -> None:
    @one.app.get("/")
    async def route(broker: Broker) -> None:
        await broker.request("Works", "note", timeout=5)
        await broker.produce("Works", EventObject(event="note"))

    assert 200 == (await one.client.get("/", headers=headers)).status_code


@virtual
async def test_a_trace_goes_on_with_what_a_route_produces() -> None:
    """Requests and events alike have the headers of the HTTP request."""
    async with serving() as one:
        await _traced(one, [("traceparent", PARENT), ("tracestate", STATE)])
        assert [{"traceparent": PARENT, "tracestate": STATE}] * 2 == one.traces


@virtual
async def test_without_a_trace_none_is_made_up() -> None:
    """Nor is the last one's taken."""
    async with serving() as one:
        await _traced(one, [("traceparent", PARENT)])
        await one.client.get("/")
        assert [{"traceparent": PARENT}] * 2 + [{}] * 2 == one.traces


@virtual
@pytest.mark.parametrize(
    "parent",
    [
        "",
        "nonsense",
        PARENT.upper(),
        PARENT + "0",
        PARENT[:-1],
        PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        PARENT.replace("b7ad6b7169203331", "0" * 16),
        PARENT.replace("00-", "ff-", 1),
        PARENT + "\n",
    ],
)
async def test_a_broken_trace_is_dropped(parent: str) -> None:
    """With its state: nobody could go on with it (W3C Trace Context)."""
    async with serving() as one:

        @one.app.get("/")
        async def route(broker: Broker) -> None:
            await broker.produce("Works", EventObject(event="note"))

        headers = [(b"traceparent", parent.encode()), (b"tracestate", STATE.encode())]
        exchange = Exchange(one.served, method="GET", headers=headers)
        exchange.sends(b"")
        exchange.begin()
        await exchange.end()
        assert (200, [{}]) == (exchange.status, one.traces)


@virtual
@pytest.mark.parametrize("state", ["", "x=" + "y" * 600])
async def test_a_state_that_is_too_long_is_dropped_alone(state: str) -> None:
    """As is an empty one; the trace goes on."""
    async with serving() as one:
        await _traced(one, [("traceparent", PARENT), ("tracestate", state)])
        assert [{"traceparent": PARENT}] * 2 == one.traces


@virtual
async def test_a_state_in_several_headers_is_one() -> None:
    """In their order, as W3C Trace Context has it."""
    async with serving() as one:
        first, second = STATE.split(",")
        headers = [("traceparent", PARENT), ("tracestate", first), ("tracestate", second)]
        await _traced(one, headers)
        assert [{"traceparent": PARENT, "tracestate": STATE}] * 2 == one.traces


@virtual
async def test_a_trace_goes_through_handlers() -> None:
    """Through what they produce, request and forward; each event has its own."""
    async with serving() as one:

        @one.works.router.bind_event("chain")
        async def chain(event: EventObject, broker: BrokerManager) -> None:
            await broker.request("Works", "note", timeout=5)
            await broker.produce("Works", EventObject(event="note"))
            event.event = "note"
            await broker.produce("Works", event)

        @one.app.get("/")
        async def route(broker: Broker) -> None:
            await broker.request("Works", "chain", "data", timeout=5)

        other = PARENT.replace("0af7", "1111")
        for parent in (PARENT, other):
            answer = await one.client.get("/", headers={"traceparent": parent})
            assert 200 == answer.status_code
        assert [{"traceparent": PARENT}] * 4 + [{"traceparent": other}] * 4 == one.traces
        await one.client.get("/")
        assert [{}] * 4 == one.traces[8:]


@virtual
async def test_a_trace_goes_on_after_the_answer() -> None:
    """In background tasks, in tasks of the route's own, and in what is fetched later."""
    async with serving() as one:
        replies, tasks = PendingReplies(), list[asyncio.Task[Any]]()
        one.app.include_router(replies.router)

        @one.app.post("/")
        async def route(broker: Broker, background: BackgroundTasks) -> None:
            background.add_task(broker.request, "Works", "note")
            tasks.append(asyncio.create_task(broker.request("Works", "note", timeout=5)))
            await replies.ask(broker, "Works", "note")

        await one.client.post("/", headers={"traceparent": PARENT})
        await tasks[0]
        await until(lambda: one.waiting == 0)
        assert [{"traceparent": PARENT}] * 3 == one.traces


@virtual
async def test_a_plain_route_produces_with_its_trace() -> None:
    """It runs in a thread."""
    async with serving() as one:

        @one.app.get("/")
        def route(request: Request) -> None:
            request.state.broker.produce("Works", EventObject(event="note"))

        await one.client.get("/", headers={"traceparent": PARENT})
        await until(lambda: len(one.works.handled) == 1)
        assert [{"traceparent": PARENT}] == one.traces


# OpenAPI


def documented(app: FastAPI) -> set[str]:
    """Return the operations that have the problems among their responses."""
    return {
        f"{method} {path}"
        for path, item in app.openapi()["paths"].items()
        for method, operation in item.items()
        if "application/problem+json" in str(operation["responses"])
    }


def an_app(**more: Any) -> FastAPI:
    """Return an application some of whose routes have a broker."""
    app, router = FastAPI(**more), APIRouter(prefix="/v2")
    inner = APIRouter(prefix="/inner")
    for where in (app, router, inner):
        where.add_api_route("/direct", module_of, methods=["GET"])
        where.add_api_route("/direct", module_of, methods=["POST"])
        where.add_api_route("/indirect", indirectly)
        where.add_api_route("/audit", module_of_audit)

        @where.get("/plain")
        async def plain(x_other: Annotated[str, Header()] = "") -> str:
            return x_other

    router.include_router(inner)
    app.include_router(router)
    return app


WAITING = {
    f"{operation}"
    for prefix in ("", "/v2", "/v2/inner")
    for operation in (
        f"get {prefix}/direct",
        f"post {prefix}/direct",
        f"get {prefix}/indirect",
        f"get {prefix}/audit",
    )
}


@pytest.mark.parametrize("door", ["lifespan", "init_consumer_app"])
def test_problems_are_documented_where_they_can_come(door: str) -> None:
    """At the operations with a broker, however they have it, and at no other."""
    broker = a_broker()
    app = an_app(lifespan=broker.lifespan) if door == "lifespan" else an_app()
    if door == "init_consumer_app":
        broker.init_consumer_app(app)
    with TestClient(app):
        assert WAITING == documented(app)
    responses = app.openapi()["paths"]["/direct"]["get"]["responses"]
    assert {"200", "422", "502", "503", "504", "default"} == set(responses)
    schema = app.openapi()["components"]["schemas"]["BrokerProblem"]
    assert {"type", "title", "status", "detail", "code"} == set(schema["required"])


def test_the_document_is_one_and_stays_the_same() -> None:
    """It validates as OpenAPI, its references exist, and asking twice changes nothing."""
    app = an_app()
    a_broker().init_consumer_app(app)
    first = copy.deepcopy(app.openapi())
    assert first == app.openapi()
    OpenAPI.model_validate(first)
    assert {"$ref": "#/components/schemas/BrokerProblem"} == (
        first["paths"]["/direct"]["get"]["responses"]["503"]["content"]["application/problem+json"][
            "schema"
        ]
    )
    with TestClient(app) as client:
        assert first == client.get("/openapi.json").json()
        assert 200 == client.get("/docs").status_code


def test_responses_of_the_application_s_own_are_kept() -> None:
    """What a route says of a status is what is there."""
    app = FastAPI()

    @app.get("/", responses={504: {"description": "mine"}, "default": {"description": "mine"}})
    async def route(broker: Broker) -> str:
        return broker.settings.module

    a_broker().init_consumer_app(app)
    responses = app.openapi()["paths"]["/"]["get"]["responses"]
    assert ["mine", "mine"] == [responses[one]["description"] for one in ("504", "default")]
    assert "application/problem+json" in responses["503"]["content"]


def test_a_mounted_application_documents_its_own() -> None:
    """In its own document, and not in the outer one's."""
    app, inner = FastAPI(), an_app()
    app.mount("/inner", inner)
    a_broker().init_consumer_app(app)
    assert WAITING == documented(inner)
    assert set() == documented(app)
    assert "components" not in app.openapi()


def test_problems_that_are_switched_off_are_not_documented() -> None:
    """Nor is their schema there."""
    app = an_app()
    a_broker().init_consumer_app(app, problems=False)
    assert set() == documented(app)
    assert "BrokerProblem" not in app.openapi()["components"]["schemas"]


# Doors


@pytest.mark.parametrize("first", ["own", "broker"])
def test_a_lifespan_of_one_s_own_may_be_inside_or_outside(first: str) -> None:
    """Either way routes have the broker and the state, and both end."""
    broker, seen = a_broker(), list[Any]()

    @asynccontextmanager
    async def outside(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        seen.append(broker.ready)
        async with broker.lifespan(app) as state:
            yield {**state, "pool": "mine"}
        seen.append(broker.ready)

    @asynccontextmanager
    async def inside(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        seen.append(broker.ready)
        yield {"pool": "mine"}
        seen.append(broker.ready)

    app = FastAPI(lifespan=outside if first == "own" else inside)
    if first == "broker":
        broker.init_consumer_app(app)

    @app.get("/")
    async def route(broker: Broker, request: Request) -> list[Any]:
        return [broker.ready, request.state.pool]

    with TestClient(app) as client:
        assert [True, "mine"] == client.get("/").json()
    assert [first == "broker"] * 2 == seen
    assert not broker.ready


def test_a_lifespan_that_forgets_the_state_has_the_broker_all_the_same() -> None:
    """While the broker runs; the first of two is `Broker`, and afterwards there is none."""
    web, audit = a_broker(), a_broker("Audit")

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        async with web.lifespan(app), audit.lifespan(app):
            yield

    app = FastAPI(lifespan=own)
    app.add_api_route("/first", module_of)
    app.add_api_route("/audit", module_of_audit)
    for _ in range(2):
        with TestClient(app) as client:
            assert ["Web", "Audit"] == [client.get(path).json() for path in ("/first", "/audit")]
        assert 503 == TestClient(app).get("/first").status_code


def test_a_router_may_bring_the_broker() -> None:
    """`APIRouter(lifespan=broker.lifespan)`, which is included: with problems and all."""
    broker = a_broker()
    router = APIRouter(lifespan=broker.lifespan)
    router.add_api_route("/module", module_of)

    @router.get("/fails")
    async def fails(broker: Broker) -> None:
        raise BrokerClosedError(broker.settings.module)

    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as client:
        assert "Web" == client.get("/module").json()
        assert 503 == client.get("/fails").status_code
        assert {"get /module", "get /fails"} == documented(app)
    assert not broker.ready


@pytest.mark.parametrize("door", ["lifespan", "init_consumer_app"])
def test_a_mounted_application_has_the_outer_one_s_broker(door: str) -> None:
    """FastAPI and Starlette alike: by `Broker` or by its state, with the problems."""
    broker, inner = a_broker(), FastAPI()
    inner.add_api_route("/module", module_of)

    @inner.get("/fails")
    async def fails(broker: Broker) -> None:
        raise BrokerClosedError(broker.settings.module)

    async def module(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.broker.settings.module)

    async def breaks(_: Request) -> PlainTextResponse:
        raise BrokerClosedError

    starlette = Starlette(routes=[Route("/module", module), Route("/fails", breaks)])
    app = FastAPI(lifespan=broker.lifespan if door == "lifespan" else None)
    if door == "init_consumer_app":
        broker.init_consumer_app(app)
    app.mount("/fastapi", inner)
    app.mount("/starlette", starlette)
    with TestClient(app) as client:
        for path in ("/fastapi", "/starlette"):
            assert "Web" == client.get(f"{path}/module").text.strip('"')
            answer = client.get(f"{path}/fails")
            assert (503, "closed") == (answer.status_code, answer.json()["code"])


def test_a_starlette_application_has_the_same_doors() -> None:
    """Without OpenAPI there is nothing to document."""
    broker = a_broker()

    async def breaks(_: Request) -> PlainTextResponse:
        raise BrokerClosedError

    app = Starlette(
        routes=[Mount("/in", routes=[Route("/fails", breaks)])], lifespan=broker.lifespan
    )
    with TestClient(app) as client:
        assert 503 == client.get("/in/fails").status_code


def test_middleware_that_was_added_by_hand_is_enough() -> None:
    """For an application that starts its broker in its own way."""
    broker = a_broker()

    @asynccontextmanager
    async def own(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with broker:
            yield {"broker": broker}

    app = FastAPI(lifespan=own)
    app.add_middleware(BrokerMiddleware)

    @app.get("/")
    async def route(broker: Broker) -> None:
        raise BrokerClosedError(broker.settings.module)

    with TestClient(app) as client:
        assert 503 == client.get("/").status_code


@pytest.mark.parametrize("door", ["lifespan", "init_consumer_app"])
def test_an_application_that_starts_twice_is_surrounded_once(door: str) -> None:
    """In a row, with two test clients; the second one works as the first."""
    broker, inner = a_broker(), FastAPI()
    app = FastAPI(lifespan=broker.lifespan if door == "lifespan" else None)
    if door == "init_consumer_app":
        broker.init_consumer_app(app)
    app.add_api_route("/", module_of)
    app.mount("/inner", inner)
    stacks = []
    for _ in range(2):
        with TestClient(app) as client:
            assert "Web" == client.get("/").json()
            stacks.append((app.router.middleware_stack, inner.router.middleware_stack))
            assert {"get /"} == documented(app)
    assert stacks[0] == stacks[1]
    for stack in stacks[0]:
        assert isinstance(stack, BrokerMiddleware)
        assert not isinstance(stack.app, BrokerMiddleware)


@virtual
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("door", ["outside", "init_consumer_app"])
async def test_a_start_that_fails_half_way_leaves_nothing(
    door: str,
    before: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """The application's own lifespan raises before the broker starts, or after: it is stopped."""
    works = Works()
    broker = works.broker()
    ready: list[bool] = []

    @asynccontextmanager
    async def outside(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        if before:
            raise LookupError
        async with broker.lifespan(app) as state:
            ready.append(broker.ready)
            raise LookupError
            yield state

    @asynccontextmanager
    async def inside(_: FastAPI) -> AsyncIterator[None]:
        ready.append(broker.ready)
        raise LookupError
        yield

    app = FastAPI(lifespan=outside if door == "outside" else inside)
    if door == "init_consumer_app":
        broker.init_consumer_app(app)
    async with leaves_nothing(works):
        for _ in range(2):
            with pytest.raises(LookupError):
                await app.router.lifespan_context(app).__aenter__()
            assert not broker.ready
            assert not broker.health().ready
    assert ([] if door == "outside" and before else [True] * 2) == ready


@pytest.mark.parametrize("problems", [True, False])
def test_both_doors_take_problems(problems: bool) -> None:  # noqa: FBT001  # a parameter of the test
    """And the lifespan by `partial`."""
    broker = a_broker()
    app = FastAPI(lifespan=partial(broker.lifespan, problems=problems))

    @app.get("/")
    async def route(broker: Broker) -> None:
        raise BrokerClosedError(broker.settings.module)

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/")
    assert (503 if problems else 500) == answer.status_code


# A real server


class Server(uvicorn.Server):
    """uvicorn on a port of its own, in this loop, without its signal handlers."""

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


@asynccontextmanager
async def a_server(app: Any) -> AsyncIterator[Server]:
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none")
    server = Server(config)
    serve = asyncio.create_task(server._serve())
    await until(lambda: server.started or serve.done())
    try:
        yield server
    finally:
        server.should_exit = True
        await serve


async def _connected(
    port: int, path: str, body: bytes, length: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("sent", [b"", b"half", b"whole body"])
async def test_a_client_of_a_real_server_that_leaves_frees_its_slot(sent: bytes) -> None:
    """Whatever of its body it has sent; the server goes on, and the broker stops in order."""
    works = Works()
    one = Serving(works)
    seen: list[str] = []

    @one.app.post("/wait")
    async def wait(broker: Broker) -> None:
        try:
            await broker.request("Works", "wait", timeout=60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    @one.app.post("/echo")
    async def echo(request: Request, broker: Broker) -> Any:
        told = (await broker.request("Works", "note", "reply", timeout=5)).data
        return [told, (await request.body()).decode()]

    async with leaves_nothing(works), works.broker(), a_server(one.app) as server:
        _, writer = await _connected(server.port, "/wait", sent, len(b"whole body"))
        await until(lambda: one.waiting == 1)
        writer.close()
        await writer.wait_closed()
        await until(lambda: one.waiting == 0)
        assert ["cancelled"] == seen
        reader, writer = await _connected(server.port, "/echo", b"whole ", len(b"whole body"))
        await until(lambda: works.handled == ["reply"])
        writer.write(b"body")
        answer = await reader.readuntil(b"]")
        assert ["reply", "whole body"] == json.loads(answer.rpartition(b"\r\n")[2])
        writer.close()
        await writer.wait_closed()
        works.go.set()
    assert not one.broker.ready
