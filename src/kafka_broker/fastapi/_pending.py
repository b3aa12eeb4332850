"""`PendingReplies`: answer 202 at once, and let the reply be fetched when it is there."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import TYPE_CHECKING, Annotated, Any, Final
from uuid import uuid4

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from kafka_broker._caller import trace_now, while_client_waits
from kafka_broker._event import EventObject
from kafka_broker._problems import MEDIA_TYPE, Problem, problem_of
from kafka_broker._slots import DEFAULT, Default
from kafka_broker.errors import ConfigurationError, OutboxFullError

if TYPE_CHECKING:
    from kafka_broker._manager import BrokerManager

_LONGEST_POLL: Final = 30.0
_RETRY_AFTER: Final = "1"
_UNKNOWN: Final = Problem(404, "unknown-reply", "no such reply is expected here, or it is too old")


class Accepted(BaseModel):
    """A request is on its way; its reply will be at ``location``."""

    correlation_id: str
    location: str


_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": EventObject, "description": "The reply"},
    202: {"model": Accepted, "description": "It is not there yet; ask again"},
    404: {"description": _UNKNOWN.detail, "content": {MEDIA_TYPE: {}}},
}


class PendingReplies:
    """Requests whose replies are fetched later, by ``GET /replies/{correlation_id}``.

    Include its ``router`` into the application. Its replies are kept by this process: of several
    replicas behind one address the client has to come back to the one that has asked.

    Args:
        limit: how many requests may be pending, and replies be kept; of those the oldest goes
            first.
        ttl: seconds that a reply is kept after it has come.
        path: below which the replies are, whole: a prefix at ``include_router`` is not known here.

    Raises:
        ConfigurationError: a limit is not positive, or the path does not begin with ``/``.
    """

    def __init__(self, *, limit: int = 10_000, ttl: float = 300.0, path: str = "/replies") -> None:
        if limit < 1 or not ttl > 0 or not path.startswith("/"):
            msg = "PendingReplies needs a limit and a ttl above 0, and a path that begins with /"
            raise ConfigurationError(msg)
        self._limit = limit
        self._ttl = ttl
        self._path = path.rstrip("/")
        self._asking: dict[str, asyncio.Task[EventObject[Any]]] = {}
        self._replies: dict[str, asyncio.Future[EventObject[Any]]] = {}
        self._expires: OrderedDict[str, float] = OrderedDict()
        self._sweeper: asyncio.TimerHandle | None = None
        self._applications = 0
        self.router: APIRouter = self._make_router()

    def __len__(self) -> int:
        """Return how many are pending or kept."""
        return len(self._replies)

    async def ask(  # noqa: PLR0913  # those of BrokerManager.request
        self,
        broker: BrokerManager,
        topic: str,
        event: str,
        data: object = None,
        *,
        timeout: float | Default = DEFAULT,
        response: type[Any] | None = None,
    ) -> Accepted:
        """Send a request as `BrokerManager.request` does, and return once it is sent.

        It goes on when its client leaves, until its reply, its timeout or the broker's stop.

        Raises:
            OutboxFullError: as many as the limit are pending, or the outbox is full.
            BrokerClosedError, ConfigurationError, TypeError: as `BrokerManager.request`, at once.
        """
        if len(self._asking) >= self._limit:
            raise OutboxFullError(topic, f"{self._limit} replies are pending; raise the limit")
        correlation_id = str(uuid4())
        request = broker.request(
            topic, event, data, timeout=timeout, response=response, correlation_id=correlation_id
        )
        context = _after_the_answer()
        asking = asyncio.create_task(request, context=context)
        self._asking[correlation_id] = asking
        self._replies[correlation_id] = asking.get_loop().create_future()
        asking.add_done_callback(lambda _: self._keep(correlation_id), context=context)
        await asyncio.sleep(0)  # it is sent now, or refused
        if asking.done() and not asking.cancelled() and (error := asking.exception()) is not None:
            self._asking.pop(correlation_id, None)
            self._drop(correlation_id)
            raise error
        return self._accepted(correlation_id)

    def _accepted(self, correlation_id: str) -> Accepted:
        return Accepted(correlation_id=correlation_id, location=f"{self._path}/{correlation_id}")

    def _keep(self, correlation_id: str) -> None:
        """Keep what a request has ended in, and of its task, which knows its client, nothing."""
        asking = self._asking.pop(correlation_id, None)
        reply = self._replies.get(correlation_id)
        if asking is None or reply is None:
            return
        if asking.cancelled():
            self._drop(correlation_id)
            return
        if (error := asking.exception()) is not None:
            reply.set_exception(error.with_traceback(None))
            reply.exception()  # retrieved: whoever asks for the reply gets it
        else:
            reply.set_result(asking.result())
        self._expires[correlation_id] = asking.get_loop().time() + self._ttl
        if len(self._expires) > self._limit:
            self._drop(next(iter(self._expires)))
        if self._sweeper is None:
            self._sweep()

    def _drop(self, correlation_id: str) -> None:
        self._expires.pop(correlation_id, None)
        if (reply := self._replies.pop(correlation_id, None)) is not None:
            reply.cancel()

    def _sweep(self) -> None:
        """Drop what is too old; come again for the next one."""
        loop = asyncio.get_running_loop()
        self._sweeper = None
        while self._expires:
            oldest, expires = next(iter(self._expires.items()))
            if expires > loop.time():
                self._sweeper = loop.call_at(expires, self._sweep)
                return
            self._drop(oldest)

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        """End with the last application: nobody can fetch a reply any more."""
        self._applications += 1
        try:
            yield
        finally:
            self._applications -= 1
            if not self._applications:
                await self._end()

    async def _end(self) -> None:
        asking = set(self._asking.values())
        for one in asking:
            one.cancel()
        if asking:
            await asyncio.wait(asking)
        for correlation_id in list(self._replies):
            self._drop(correlation_id)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _make_router(self) -> APIRouter:
        router = APIRouter(prefix=self._path, tags=["replies"], lifespan=self._lifespan)
        router.add_api_route(
            "/{correlation_id}", self._reply, name="reply", response_model=None, responses=_ANSWERS
        )
        router.add_api_route(
            "/{correlation_id}/events",
            self._events,
            name="events",
            response_class=EventSourceResponse,
        )
        return router

    async def _reply(
        self, correlation_id: str, timeout: Annotated[float, Query(ge=0, le=_LONGEST_POLL)] = 0
    ) -> Response:
        """Return the reply, waiting for it up to *timeout* seconds."""
        reply = self._replies.get(correlation_id)
        if reply is not None:
            await _ended_within(reply, timeout)
        if reply is None or reply.cancelled():
            return JSONResponse(_UNKNOWN.document(), _UNKNOWN.status, media_type=MEDIA_TYPE)
        if not reply.done():
            accepted = self._accepted(correlation_id).model_dump()
            return JSONResponse(accepted, 202, headers={"retry-after": _RETRY_AFTER})
        if (error := reply.exception()) is not None:
            raise error.with_traceback(None)  # else it grows with each poll
        return JSONResponse(reply.result().model_dump(mode="json"))

    async def _events(self, correlation_id: str) -> AsyncIterator[ServerSentEvent]:
        """Send the reply as the event ``reply`` when it is there, or else a ``problem``."""
        reply = self._replies.get(correlation_id)
        if reply is not None:
            await _ended_within(reply, None)
        yield _event_of(reply)


def _after_the_answer() -> Context:
    """Return a context with the client's trace only: the client would keep its request alive."""
    context = Context()
    context.run(trace_now.set, trace_now.get())
    return context


async def _ended_within(reply: asyncio.Future[Any], timeout: float | None) -> None:
    """Wait for a reply, but not for longer than there is a client."""
    with while_client_waits():
        await asyncio.wait({reply}, timeout=timeout)


def _event_of(reply: asyncio.Future[EventObject[Any]] | None) -> ServerSentEvent:
    if reply is None or reply.cancelled():
        return ServerSentEvent(event="problem", data=_UNKNOWN.document())
    error = reply.exception()
    if error is None:
        return ServerSentEvent(event="reply", data=reply.result().model_dump(mode="json"))
    problem = problem_of(error)
    if problem is None:
        raise error.with_traceback(None)
    return ServerSentEvent(event="problem", data=problem.document())
