"""`BrokerMiddleware`: what a web application needs around routes that await replies. Pure ASGI."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from kafka_broker import _problems, _wire
from kafka_broker._caller import Caller, Receive, Scope, Send, trace_now
from kafka_broker.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kafka_broker._problems import Problem

ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_logger = logging.getLogger("kafka_broker.http")

_KEY: Final = "kafka_broker.caller"
_CLIENT_CLOSED_REQUEST: Final = 499
"""Not registered, but what nginx logs for a client that has left."""
_TRY_AGAIN_LATER, _INTERNAL_ERROR = 1013, 1011
_LONGEST_REASON: Final = 123
"""Bytes that a WebSocket's close frame has room for."""
_SERVER_ERRORS, _UNAVAILABLE = 500, 503


class BrokerMiddleware:
    """ASGI middleware for routes that await replies.

    `BrokerManager.lifespan` and `BrokerManager.init_consumer_app` put it around the routes of their
    application by themselves. Add it by hand to an application that starts its broker in another
    way: ``app.add_middleware(BrokerMiddleware)``, before any other, so that it lies inside of them.

    - A route that waits for a reply is cancelled when its client goes away.
    - Errors of the broker that no exception handler takes become problem documents (RFC 9457); on a
      WebSocket they become a close code.
    - The client's W3C trace headers go on in the events that its route produces.

    Args:
        app: what it is put around.
        problems: whether errors are answered; without it they go on to the server.

    Attributes:
        offered: state for requests that come without that of the lifespan, as from a client in
            tests; what a request brings along wins.
    """

    def __init__(self, app: ASGIApp, *, problems: bool = True) -> None:
        self.app = app
        self.problems = problems
        self.offered: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI asks for."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
        elif _KEY in scope:  # of an application that this one is mounted in
            await self._answer(scope, receive, send, scope[_KEY])
        else:
            if self.offered:  # a test's client may know nothing of the lifespan's state
                scope["state"] = {**self.offered, **scope.get("state", {})}
            await self._answer_caller(scope, receive, send)

    async def _answer_caller(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        expects_continue = any(name == b"expect" for name, _ in headers)
        token = trace_now.set(_trace_of(headers))
        try:
            async with Caller(receive, send, expects_continue=expects_continue) as caller:
                scope[_KEY] = caller
                await self._answer(scope, caller.receive, caller.send, caller)
        finally:
            trace_now.reset(token)
            scope.pop(_KEY, None)  # whoever is outside may use it again
        if caller.cancelled and scope["type"] == "http":
            await _answer_nobody(scope, caller)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as exc:  # most go on; ours are answered
            problem = _problems.problem_of(exc) if self.problems else None
            websocket = scope["type"] == "websocket"
            if problem is None or caller.answered or (caller.started and not websocket):
                raise
            _log(scope, problem, exc)
            if websocket:
                await _close(scope, caller, send, problem)
            else:
                await _respond("http.response", send, problem)


def _log(scope: Scope, problem: Problem, error: Exception) -> None:
    level = logging.WARNING if problem.status >= _SERVER_ERRORS else logging.INFO
    # what a handler says in its refusal may quote its data
    cause = type(error).__name__ if isinstance(error, RemoteError) else error
    asked = f" (correlation id {problem.correlation_id})" if problem.correlation_id else ""
    told = _summary(problem)
    _logger.log(level, "%s is answered with %s: %s%s", _exchange(scope), told, cause, asked)


def _exchange(scope: Scope) -> str:
    """Return the method and the path on one line, whatever characters the client has sent."""
    return f"{scope.get('method', 'WebSocket')} {quote(scope['path'])}"


def _summary(problem: Problem) -> str:
    return f"{problem.status} {quote(problem.code)}"


def _trace_of(headers: Iterable[tuple[bytes, bytes]]) -> _wire.Trace:
    parent, states = None, []
    for name, value in headers:
        if name == b"traceparent":
            parent = value
        elif name == b"tracestate":
            states.append(value)
    return _wire.trace(parent, b",".join(states))


async def _respond(kind: str, send: Send, problem: Problem) -> None:
    body = json.dumps(problem.document()).encode()
    headers = {
        "content-type": _problems.MEDIA_TYPE,
        "content-length": str(len(body)),
        **problem.headers(),
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": f"{kind}.start", "status": problem.status, "headers": encoded})
    await send({"type": f"{kind}.body", "body": body})


async def _close(scope: Scope, caller: Caller, send: Send, problem: Problem) -> None:
    if not caller.started and "websocket.http.response" in scope.get("extensions", {}):
        await _respond("websocket.http.response", send, problem)
        return
    code = _TRY_AGAIN_LATER if problem.status == _UNAVAILABLE else _INTERNAL_ERROR
    reason = _summary(problem)[:_LONGEST_REASON]
    await send({"type": "websocket.close", "code": code, "reason": reason})


async def _answer_nobody(scope: Scope, caller: Caller) -> None:
    """End the exchange in order; other middleware would take no answer for a bug."""
    _logger.info("%s: the client left, its wait is over", _exchange(scope))
    with suppress(OSError):  # which a server may raise for a client that has left
        if not caller.started:
            status = _CLIENT_CLOSED_REQUEST
            await caller.send({"type": "http.response.start", "status": status, "headers": []})
        if not caller.answered:
            await caller.send({"type": "http.response.body", "body": b""})


class _Documented:
    """FastAPI's ``app.openapi``, with the problems in what it returns."""

    def __init__(self, openapi: Callable[[], dict[str, Any]]) -> None:
        self._openapi = openapi

    def __call__(self) -> dict[str, Any]:
        schema = self._openapi()
        _problems.add_to_schema(schema)
        return schema


def surround(app: Any, *, problems: bool) -> BrokerMiddleware | None:
    """Put `BrokerMiddleware` around the routes of a Starlette or FastAPI application, once.

    Also around those of the applications that are mounted in it, which catch their own errors; what
    is wrapped in something else is not found. It is put inside of the application's exception
    handlers, which therefore come first, and works although the application has started.

    Returns:
        What is around the routes now; None if *app* is of another framework.
    """
    routes = getattr(app, "routes", None)
    for route in routes if isinstance(routes, list) else ():
        surround(getattr(route, "app", None), problems=problems)
    stack: Any = getattr(getattr(app, "router", None), "middleware_stack", None)
    if stack is None:
        return None
    openapi: Any = getattr(app, "openapi", None)  # of FastAPI
    if problems and openapi and not isinstance(openapi, _Documented):
        app.openapi = _Documented(openapi)
    if isinstance(stack, BrokerMiddleware):
        return stack
    app.router.middleware_stack = added = BrokerMiddleware(stack, problems=problems)
    return added


@contextmanager
def surrounding(app: Any, state: Mapping[str, Any], *, problems: bool) -> Iterator[dict[str, Any]]:
    """Be around the routes of an application that runs, and offer *state* to its requests.

    Yields what is offered under those names: of several brokers the first remains the first.
    """
    middleware = surround(app, problems=problems)
    offered = {} if middleware is None else middleware.offered
    added = {name: value for name, value in state.items() if name not in offered}
    offered.update(added)
    try:
        yield {name: offered[name] for name in state}
    finally:
        for name in added:  # the others are of a broker that runs on
            del offered[name]
