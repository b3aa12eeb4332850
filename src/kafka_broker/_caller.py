"""The client that a web application answers: how long it waits, and whether it is still there.

Pure ASGI, no framework: the messages are those of the specification's HTTP and WebSocket parts.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from contextvars import Token
    from types import TracebackType

    from kafka_broker._wire import Trace

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_DISCONNECTS: Final = frozenset({"http.disconnect", "websocket.disconnect"})
_GIVE_UP_WITHIN: Final = 1.0
"""Seconds that a server has to give up a read that was cancelled."""
_MAX_HELD: Final = 64 * 1024
"""Bytes that are read ahead for an application that does not read, at most one message more."""
_MESSAGE_SIZE: Final = 64
"""Bytes that a message counts for besides its content: empty ones are bounded, too."""


class Caller:
    """One HTTP request or WebSocket while it is answered, in the task that answers it.

    Whoever waits for a reply in its context does so inside of `waiting`. While somebody does, the
    messages of the client are read ahead, and if it goes away the task is cancelled, once.

    Args:
        receive, send: those of ASGI.
        expects_continue: nothing is read before the application reads: that asks for the body.

    Attributes:
        started: whether its answer has begun.
        answered: whether its answer is complete; from then on nothing is done on its behalf.
        cancelled: whether the task was cancelled because the client went away.
    """

    def __init__(self, receive: Receive, send: Send, *, expects_continue: bool = False) -> None:
        self.started = False
        self.answered = False
        self.cancelled = False
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._begun_at = self._loop.time()
        self._deadline = math.inf
        self._token: Token[Caller | None]
        self._exited = False
        # who answers, and what is cancelled when the client goes away
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0
        self._waits = 0
        # what the client has sent: read by the application, or ahead of it and held for it
        self._body_ended = False
        self._disconnected = False
        self._reading = False
        self._may_read_ahead = not expects_continue
        self._ahead: asyncio.Task[Message] | None = None
        self._held: deque[Message] = deque()
        self._failure: BaseException | None = None

    def expect_answer(self, seconds: float) -> None:
        """Note that the client gives up *seconds* after it has asked."""
        self._deadline = min(self._deadline, self._begun_at + seconds)

    def remaining(self) -> float:
        """Return the seconds that the client still waits: infinity when it does not say."""
        if self._done:
            return math.inf
        return max(0.0, self._deadline - self._loop.time())

    @property
    def _done(self) -> bool:
        """Whether nobody waits for an answer any more: a background task has all its time."""
        return self.answered or self._exited

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Cancel the task that answers if the client goes away inside of this context."""
        if self._done:
            yield
            return
        self._waits += 1
        if self._disconnected:
            self._cancel()
        self._read_ahead()
        try:
            yield
        finally:
            self._waits -= 1

    def _cancel(self) -> None:
        if self.cancelled or self._done or self._task is None:
            return
        self.cancelled = True
        self._task.cancel()

    def _read_ahead(self) -> None:
        """Fetch a message if somebody waits, unless much is held that has to be taken first."""
        if self._done or not self._waits or self._disconnected or self._failure is not None:
            return
        if self._reading or self._ahead is not None:  # a server has one reader at a time
            return
        if self._may_read_ahead and sum(map(_size, self._held)) < _MAX_HELD:
            self._ahead = self._loop.create_task(self._next())
            self._ahead.add_done_callback(self._arrived)

    async def _next(self) -> Message:
        """Return the next message: ASGI's `receive` may be no coroutine, and a task needs one."""
        return await self._receive()

    def _arrived(self, ahead: asyncio.Task[Message]) -> None:
        self._ahead = None
        if ahead.cancelled():
            return
        self._failure = ahead.exception()
        if self._failure is not None:
            return  # the application meets it when it has read what came before
        message = ahead.result()
        if self._body_ended and message["type"] == "http.request":
            self._may_read_ahead = False  # some middleware replays the body without end
            return
        self._note(message)
        self._held.append(message)
        self._read_ahead()

    def _note(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._body_ended = not message.get("more_body", False)
        elif message["type"] in _DISCONNECTS:
            self._disconnected = True
            if self._waits:
                self._cancel()

    async def receive(self) -> Message:
        """Return the client's next message to the application."""
        while not self._held:
            if self._failure is not None:
                raise self._failure
            if self._ahead is None:
                return await self._read()
            await asyncio.wait({self._ahead})
        message = self._held[0]
        if message["type"] not in _DISCONNECTS:  # which is told as often as one asks
            self._held.popleft()
        return message

    async def _read(self) -> Message:
        """Read for the application itself."""
        self._reading = True
        try:
            message = await self._receive()
            self._may_read_ahead = True
            self._note(message)
        finally:
            self._reading = False
            self._read_ahead()  # for a task that has begun to wait meanwhile
        return message

    async def send(self, message: Message) -> None:
        """Send the application's message to the client."""
        kind = message["type"]
        if kind in {"http.response.start", "websocket.accept", "websocket.http.response.start"}:
            self.started = True
        elif kind == "websocket.close" or (
            kind in {"http.response.body", "websocket.http.response.body", "http.response.pathsend"}
            and not message.get("more_body", False)
        ):
            self.answered = True
        await self._send(message)

    async def __aenter__(self) -> Self:
        """Let `caller_now` be this one."""
        self._token = caller_now.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        _: BaseException | None,
        __: TracebackType | None,
    ) -> bool:
        """Give up reading ahead, and take back a cancellation of ours; returns whether it was one.

        A cancellation from elsewhere goes on, as with `asyncio.timeout`.
        """
        self._exited = True
        caller_now.reset(self._token)
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait({self._ahead}, timeout=_GIVE_UP_WITHIN)
        if not self.cancelled or self._task is None:
            return False
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # where it arrives if the application has met no await since
        only_ours = self._task.uncancel() <= self._cancelling
        if kind is None and not only_ours:
            raise asyncio.CancelledError
        return only_ours and kind is asyncio.CancelledError


def _size(message: Message) -> int:
    content = message.get("body") or message.get("bytes") or message.get("text") or ""
    return _MESSAGE_SIZE + len(content)


caller_now: ContextVar[Caller | None] = ContextVar("kafka_broker_caller_now", default=None)
"""The client that the code in this context works for."""

trace_now: ContextVar[Trace] = ContextVar("kafka_broker_trace_now", default=())
"""The trace headers of that client; they also go on with what outlives its answer."""


def while_client_waits() -> AbstractContextManager[None]:
    """Return the context to wait in for what the client of this context wants, if there is one."""
    caller = caller_now.get()
    return nullcontext() if caller is None else caller.waiting()


def at_most(seconds: float) -> float:
    """Return *seconds*, or the fewer that the client of this context still waits."""
    caller = caller_now.get()
    return seconds if caller is None else min(seconds, caller.remaining())
