"""Errors as HTTP answers: RFC 9457 problem documents, and close codes of WebSockets."""

from __future__ import annotations

import json
import logging
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Host, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket
from tests.unit.test_caller import CONNECT, Exchange, Passing, a_web

from kafka_broker import BrokerManager, Reject, RetryLater, errors
from kafka_broker._problems import problem_of
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerError,
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
    EventDecodeError,
    NoHandlerError,
    OutboxFullError,
    RemoteError,
    ReplyTimeoutError,
    RequestError,
)
from kafka_broker.fastapi import BrokerMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

virtual = pytest.mark.looptime

SECRET = "kafka-7.internal:9092"

ROWS: dict[str, list[tuple[BrokerError, int | None, str, str | None]]] = {
    "BrokerError": [(BrokerError(SECRET), 500, "error", None)],
    "ConfigurationError": [(ConfigurationError(SECRET), None, "", None)],
    "BrokerClosedError": [(BrokerClosedError(SECRET), 503, "closed", "5")],
    "BrokerUnavailableError": [(BrokerUnavailableError(SECRET), 503, "unavailable", "5")],
    "DeliveryError": [
        (DeliveryError(SECRET, SECRET), 502, "not-delivered", None),
        (DeliveryError(SECRET, SECRET, retriable=True), 503, "not-delivered", "5"),
        (DeliveryError(SECRET, SECRET, too_large=True), 502, "not-delivered", None),
    ],
    "DeliveryUnknownError": [(DeliveryUnknownError(SECRET, SECRET), 504, "delivery-unknown", None)],
    "OutboxFullError": [(OutboxFullError(SECRET, SECRET), 503, "overloaded", "1")],
    "RequestError": [(RequestError(SECRET, "an-id"), 500, "error", None)],
    "ReplyTimeoutError": [(ReplyTimeoutError("an-id", 3), 504, "reply-timeout", None)],
    "NoHandlerError": [(NoHandlerError(SECRET, "an-id"), 502, "no-handler", None)],
    "RemoteError": [
        (RemoteError("an-id", status=404, code="no-order", detail="none"), 404, "no-order", None),
        (RemoteError("an-id", status=503, code="retry-later", detail=""), 503, "retry-later", "5"),
        (
            RemoteError("an-id", status=500, code="handler-failed", detail=SECRET),
            500,
            "handler-failed",
            None,
        ),
        (RemoteError("an-id", status=500, code="error", detail=SECRET), 500, "error", None),
        (RemoteError("an-id", status=422, code="bad-data", detail=SECRET), 502, "bad-data", None),
        (
            RemoteError("an-id", status=504, code="handler-timeout", detail=SECRET),
            504,
            "handler-timeout",
            None,
        ),
    ],
    "EventDecodeError": [(EventDecodeError(SECRET), 502, "bad-reply", None)],
}


def _rows() -> list[Any]:
    assert set(ROWS) == set(errors.__all__)
    return [row for rows in ROWS.values() for row in rows]


def a_broker() -> BrokerManager:
    return BrokerManager("Web", bootstrap_servers=f"memory://{uuid.uuid4().hex}")


def raising(error: Exception, make: Callable[..., Any] = FastAPI, **more: Any) -> Any:
    """Return an application one route of which raises; its broker is not started."""

    async def route(_: Request) -> Response:
        raise error

    app = make(routes=[Route("/", route, methods=["POST"])])
    a_broker().init_consumer_app(app, **more)
    return app


async def exchanged(app: Any, path: str = "/", **scope: Any) -> Exchange:
    exchange = Exchange(app, path, **scope)
    exchange.sends(b"")
    exchange.begin()
    await exchange.end()
    return exchange


def problem(exchange: Exchange) -> dict[str, Any]:
    assert "application/problem+json" == exchange.header["content-type"]
    assert str(len(exchange.body)) == exchange.header["content-length"]
    members: dict[str, Any] = json.loads(exchange.body)
    assert exchange.status == members["status"]
    return members


# Each error


def test_every_error_has_its_row() -> None:
    """A new one is thought of here: what is its answer?"""
    assert set(ROWS) == set(errors.__all__)


@virtual
@pytest.mark.parametrize("make", [FastAPI, Starlette])
@pytest.mark.parametrize(("error", "status", "code", "again"), _rows())
async def test_each_error_has_its_answer(
    make: Callable[..., Any],
    error: BrokerError,
    status: int | None,
    code: str,
    again: str | None,
) -> None:
    """Its status and code, Retry-After where that helps, its id, and no word of what went wrong."""
    if status is None:
        exchange = Exchange(raising(error, make))
        exchange.sends(b"")
        exchange.begin()
        with pytest.raises(type(error)):
            await exchange.end()
        assert (500, b"Internal Server Error") == (exchange.status, exchange.body)
        return
    exchange = await exchanged(raising(error, make))
    members = problem(exchange)
    assert (status, code, f"urn:kafka-broker:{code}") == (
        members["status"],
        members["code"],
        members["type"],
    )
    assert code.replace("-", " ") == members["title"]
    assert again == exchange.header.get("retry-after")
    assert getattr(error, "correlation_id", None) == members.get("correlation_id")
    assert SECRET.encode() not in exchange.body
    assert members["detail"] or code == "retry-later"


@virtual
async def test_a_class_of_one_s_own_is_answered_as_its_base() -> None:
    """Also where an application derives from ours."""

    class SlowError(ReplyTimeoutError):
        pass

    assert 504 == problem(await exchanged(raising(SlowError("an-id", 1))))["status"]


@virtual
@pytest.mark.parametrize(
    "error", [LookupError("a bug"), ExceptionGroup("", [LookupError("a bug")])]
)
async def test_other_errors_are_none_of_ours(error: Exception) -> None:
    """They go on to the server, as without us."""
    exchange = Exchange(raising(error))
    exchange.sends(b"")
    exchange.begin()
    with pytest.raises(type(error)):
        await exchange.end()
    assert 500 == exchange.status


@virtual
async def test_an_http_exception_is_fastapi_s() -> None:
    """Its answer is not touched."""
    exchange = await exchanged(raising(HTTPException(418, "a teapot")))
    assert (418, b'{"detail":"a teapot"}') == (exchange.status, exchange.body)


# Groups


def test_a_group_of_ours_is_answered_as_its_first() -> None:
    """However deep it is."""
    timeout, closed = ReplyTimeoutError("an-id", 1), BrokerClosedError()
    group = ExceptionGroup("", [ExceptionGroup("", [timeout]), closed])
    answer = problem_of(group)
    assert answer is not None
    assert ("reply-timeout", "an-id") == (answer.code, answer.correlation_id)


@pytest.mark.parametrize(
    "errors_in",
    [
        [ReplyTimeoutError("an-id", 1), LookupError()],
        [LookupError(), ReplyTimeoutError("an-id", 1)],
        [ConfigurationError()],
        [ConfigurationError(), ReplyTimeoutError("an-id", 1)],
        [ReplyTimeoutError("an-id", 1), ConfigurationError()],
        [ExceptionGroup("", [ReplyTimeoutError("an-id", 1), LookupError()])],
    ],
)
def test_a_group_with_a_bug_in_it_is_a_bug(errors_in: list[Exception]) -> None:
    """Wherever in the group it is."""
    assert problem_of(ExceptionGroup("", errors_in)) is None


@virtual
async def test_a_task_group_s_error_is_answered() -> None:
    """As it leaves a route that asks several at a time."""
    error = ExceptionGroup("unhandled errors in a TaskGroup", [NoHandlerError("e", "an-id")])
    assert "no-handler" == problem(await exchanged(raising(error)))["code"]


# The application's own


@virtual
@pytest.mark.parametrize("kind", [BrokerError, ReplyTimeoutError, TimeoutError])
@pytest.mark.parametrize("make", [FastAPI, Starlette])
async def test_a_handler_of_the_application_wins(
    make: Callable[..., Any], kind: type[Exception]
) -> None:
    """For the class itself, its base, or a built-in that it is one of."""

    async def own(_: Request, error: Exception) -> Response:
        return JSONResponse({"own": type(error).__name__}, 418)

    app = raising(ReplyTimeoutError("an-id", 1), make)
    app.add_exception_handler(kind, own)
    exchange = await exchanged(app)
    assert (418, b'{"own":"ReplyTimeoutError"}') == (exchange.status, exchange.body)


@virtual
async def test_a_handler_for_another_class_does_not_matter() -> None:
    """What it does not take is answered as ever."""

    async def own(_: Request, __: Exception) -> Response:
        return JSONResponse({}, 418)

    app = raising(ReplyTimeoutError("an-id", 1))
    app.add_exception_handler(DeliveryError, own)
    assert 504 == problem(await exchanged(app))["status"]


@virtual
async def test_a_route_that_catches_the_error_answers_itself() -> None:
    """Nothing is done behind its back."""

    async def route(_: Request) -> Response:
        try:
            raise BrokerClosedError
        except BrokerError:
            return JSONResponse("caught")

    app = FastAPI(routes=[Route("/", route, methods=["POST"])])
    a_broker().init_consumer_app(app)
    exchange = await exchanged(app)
    assert (200, b'"caught"') == (exchange.status, exchange.body)


@virtual
@pytest.mark.parametrize("door", ["lifespan", "init_consumer_app"])
async def test_problems_can_be_switched_off(door: str) -> None:
    """Through both doors: then the error goes on to the server."""
    broker = a_broker()

    async def route(_: Request) -> Response:
        raise BrokerUnavailableError

    routes: list[BaseRoute] = [Route("/", route, methods=["POST"])]
    if door == "lifespan":
        app = FastAPI(routes=routes, lifespan=partial(broker.lifespan, problems=False))
    else:
        app = FastAPI(routes=routes)
        broker.init_consumer_app(app, problems=False)
    async with app.router.lifespan_context(app):
        exchange = Exchange(app)
        exchange.sends(b"")
        exchange.begin()
        with pytest.raises(BrokerUnavailableError):
            await exchange.end()
    assert 500 == exchange.status


@virtual
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_an_answer_that_has_begun_is_not_answered_again(spec: str) -> None:
    """The error goes on to the server, which breaks the connection."""

    async def parts() -> AsyncIterator[str]:
        yield "first"
        raise BrokerClosedError

    async def route(_: Request) -> Response:
        return StreamingResponse(parts())

    app = FastAPI(routes=[Route("/", route, methods=["POST"])])
    a_broker().init_consumer_app(app)
    exchange = Exchange(app, asgi={"version": "3.0", "spec_version": spec})
    exchange.sends(b"")
    exchange.begin()
    with pytest.raises(BrokerClosedError):
        await exchange.end()
    assert (200, b"first") == (exchange.status, exchange.body)


# Applications in applications


def _mounted(inner: Any) -> Any:
    app = FastAPI()
    app.mount("/inner", inner)
    return app


def _mounted_twice(inner: Any) -> Any:
    app = FastAPI()
    app.mount("/inner", Starlette(routes=[Mount("/", app=inner)]))
    return app


def _of_a_host(inner: Any) -> Any:
    return Starlette(routes=[Host("api.test", app=Starlette(routes=[Mount("/inner", app=inner)]))])


def _in_a_mount_of_routes(inner: Any) -> Any:
    return FastAPI(routes=[Mount("/inner", routes=[Mount("/", app=inner)])])


def _behind_middleware(inner: Any) -> Any:
    inner.add_middleware(BrokerMiddleware)  # what is wrapped is not found
    return FastAPI(routes=[Mount("/inner", app=inner, middleware=[Middleware(Passing)])])


def _in_an_included_router(inner: Any) -> Any:
    inner.add_middleware(BrokerMiddleware)  # nor is this one
    router, app = APIRouter(), FastAPI()
    router.mount("/inner", inner)
    app.include_router(router)
    return app


@virtual
@pytest.mark.parametrize(
    "place",
    [
        _mounted,
        _mounted_twice,
        _of_a_host,
        _in_a_mount_of_routes,
        _behind_middleware,
        _in_an_included_router,
    ],
)
@pytest.mark.parametrize("make", [FastAPI, Starlette])
async def test_the_routes_of_a_mounted_application_are_answered(
    make: Callable[..., Any], place: Callable[[Any], Any]
) -> None:
    """Wherever it is mounted: otherwise it would answer 500 itself."""

    async def route(_: Request) -> Response:
        raise BrokerClosedError

    app = place(make(routes=[Route("/", route, methods=["POST"])]))
    broker = a_broker()
    broker.init_consumer_app(app)
    async with app.router.lifespan_context(app):
        exchange = await exchanged(app, "/inner/", headers=[(b"host", b"api.test")])
    assert "closed" == problem(exchange)["code"]


# End to end


@virtual
@pytest.mark.parametrize(
    ("verdict", "status", "code", "detail"),
    [
        (Reject(404, "no such order", code="no-order"), 404, "no-order", "no such order"),
        (Reject(), 422, "rejected", "the event was refused"),
        (
            LookupError("4711 secret"),
            500,
            "handler-failed",
            "the service that was asked has failed",
        ),
        (RetryLater(100), 503, "retry-later", "another try is possible in 100 s"),
        (
            EventDecodeError("secret"),
            502,
            "bad-data",
            "the service that was asked cannot read this",
        ),
    ],
)
async def test_what_another_service_says_comes_through(
    verdict: Exception, status: int, code: str, detail: str
) -> None:
    """What it tells by `Reject` does; the text of its exception, and its class, do not."""
    async with a_web() as web:

        @web.works.router.bind_event("refuse")
        async def refuse() -> None:
            raise verdict

        async def route(_: Request) -> Response:
            return JSONResponse(await web.ask("refuse", timeout=5))

        app = FastAPI(routes=[Route("/", route, methods=["POST"])])
        web.broker.init_consumer_app(app)
        exchange = await exchanged(app)
        members = problem(exchange)
        assert (status, code) == (members["status"], members["code"])
        assert members["detail"].startswith(detail)
        assert members["correlation_id"]
        for hidden in (b"secret", b"LookupError", b"Works"):
            assert hidden not in exchange.body


@virtual
async def test_what_nobody_handles_is_502() -> None:
    """The other service is there and does not know the event."""
    async with a_web() as web:

        async def route(_: Request) -> Response:
            return JSONResponse(await web.ask("unheard.of", timeout=5))

        app = FastAPI(routes=[Route("/", route, methods=["POST"])])
        web.broker.init_consumer_app(app)
        members = problem(await exchanged(app))
        assert (502, "no-handler") == (members["status"], members["code"])


# The log


@virtual
async def test_the_log_has_the_reason_and_no_payload(caplog: pytest.LogCaptureFixture) -> None:
    """Of ours the text, of another service's refusal the class; and the correlation id."""
    caplog.set_level(logging.DEBUG, "kafka_broker.http")
    await exchanged(raising(BrokerUnavailableError(SECRET)))
    await exchanged(
        raising(RemoteError("an-id", status=409, code="twice", detail="card 4711 is used"))
    )
    told = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert [
        ("WARNING", f"POST / is answered with 503 unavailable: {SECRET}"),
        ("INFO", "POST / is answered with 409 twice: RemoteError (correlation id an-id)"),
    ] == told


@virtual
async def test_a_group_s_refusal_is_not_quoted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It may quote data there, too."""
    caplog.set_level(logging.DEBUG, "kafka_broker.http")
    refusal = RemoteError("an-id", status=409, code="twice", detail="card 4711 is used")
    await exchanged(raising(ExceptionGroup("", [refusal])))
    assert "4711" not in caplog.text


@virtual
async def test_a_client_cannot_write_lines_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """What it has put into the path, or a service into its code, stays in one line."""
    caplog.set_level(logging.DEBUG, "kafka_broker.http")

    async def route(_: Request) -> Response:
        raise RemoteError("an-id", status=409, code="twi\nce", detail="")

    app = FastAPI(routes=[Route("/{name}", route, methods=["POST"])])
    a_broker().init_consumer_app(app)
    await exchanged(app, "/a\nCRITICAL all is lost")
    assert 1 == len(caplog.records)
    assert "\n" not in caplog.records[0].getMessage()


# WebSockets


@virtual
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (BrokerClosedError(), 1013, "503 closed"),
        (BrokerUnavailableError(), 1013, "503 unavailable"),
        (OutboxFullError("t", "full"), 1013, "503 overloaded"),
        (ReplyTimeoutError("an-id", 1), 1011, "504 reply-timeout"),
        (NoHandlerError("e", "an-id"), 1011, "502 no-handler"),
        (RemoteError("an-id", status=404, code="no-order", detail=""), 1011, "404 no-order"),
    ],
)
@pytest.mark.parametrize("accepted", [True, False])
async def test_an_error_closes_a_websocket(
    error: BrokerError,
    code: int,
    reason: str,
    accepted: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """With 1013, try again later, or 1011; before it is accepted, too, without the extension."""

    async def route(socket: WebSocket) -> None:
        if accepted:
            await socket.accept()
        raise error

    app = FastAPI(routes=[WebSocketRoute("/", route)])
    a_broker().init_consumer_app(app)
    exchange = Exchange(app, kind="websocket")
    exchange.says(CONNECT)
    exchange.begin()
    await exchange.end()
    assert {"type": "websocket.close", "code": code, "reason": reason} == exchange.sent[-1]


@virtual
@pytest.mark.parametrize("code", ["x" * 300, "ü" * 100], ids=["long", "of several bytes"])
async def test_the_reason_of_a_close_fits_into_its_frame(code: str) -> None:
    """However long the code is that the other service gives: servers take 123 bytes."""

    async def route(socket: WebSocket) -> None:
        await socket.accept()
        raise RemoteError("an-id", status=409, code=code, detail="")

    app = FastAPI(routes=[WebSocketRoute("/", route)])
    a_broker().init_consumer_app(app)
    exchange = Exchange(app, kind="websocket")
    exchange.says(CONNECT)
    exchange.begin()
    await exchange.end()
    assert 123 >= len(exchange.sent[-1]["reason"].encode())


@virtual
async def test_problems_that_are_switched_off_close_no_websocket() -> None:
    """The error goes on to the server."""

    async def route(socket: WebSocket) -> None:
        await socket.accept()
        raise BrokerClosedError

    app = FastAPI(routes=[WebSocketRoute("/", route)])
    a_broker().init_consumer_app(app, problems=False)
    exchange = Exchange(app, kind="websocket")
    exchange.says(CONNECT)
    exchange.begin()
    with pytest.raises(BrokerClosedError):
        await exchange.end()
