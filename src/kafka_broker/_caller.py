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

_GONE: Final = frozenset({"http.disconnect", "websocket.disconnect"})
_LAST_WORDS: Final = 1.0
"""Seconds that a server has to give up a read that was cancelled."""
_HELD: Final = 64 * 1024
"""Bytes that are read ahead for an application that does not read, at most one message more."""
_OVERHEAD: Final = 64


class Caller:
    """One HTTP request or WebSocket while it is answered, in the task that answers it.

    Whoever waits for a reply in its context does so inside of `waiting`. While somebody does, the
    messages of the client are read ahead, and if it goes away the task is cancelled, once.

    Args:
        receive, send: those of ASGI.
        trace: see below.
        shy: nothing is read before the application has read, as to read is to ask for the body.

    Attributes:
        deadline: the time of the loop at which the client gives up.
        trace: the headers of its trace, for what is produced on its behalf.
        started: whether its answer has begun.
        answered: whether its answer is complete; from then on nothing is done on its behalf.
        left: whether the task was cancelled because it went away.
    """

    def __init__(
        self, receive: Receive, send: Send, trace: Trace = (), *, shy: bool = False
    ) -> None:
        self.deadline = math.inf
        self.trace = trace
        self.started = False
        self.answered = False
        self.left = False
        self._receive = receive
        self._send = send
        self._gone = False
        self._over = False
        self._body_ended = False
        self._reading = False
        self._deaf = shy
        self._failure: BaseException | None = None
        self._waits = 0
        self._before: Token[Caller | None]
        self._held: deque[Message] = deque()
        self._ahead: asyncio.Task[Message] | None = None
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0

    def expect_answer(self, seconds: float) -> None:
        """Note that the client gives up *seconds* after it has asked."""
        self.deadline = min(self.deadline, self._begun + seconds)

    def remaining(self) -> float:
        """Return the seconds that the client still waits: infinity when it does not say."""
        if self._served:
            return math.inf
        return max(0.0, self.deadline - self._loop.time())

    def served(self) -> Caller:
        """Return what stands for this client once it has its answer: only its trace goes on."""
        served = Caller(_nothing_more, _no_answer, self.trace)
        served.answered = True
        served._task = None  # which would keep the request, and its body, alive
        return served

    @property
    def _served(self) -> bool:
        """Whether nobody waits for an answer any more: a background task has all its time."""
        return self.answered or self._over

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Cancel the task that answers if the client goes away inside of this context."""
        if self._served:
            yield
            return
        self._waits += 1
        if self._gone:
            self._cancel()
        else:
            self._read_ahead()
        try:
            yield
        finally:
            self._waits -= 1

    def _cancel(self) -> None:
        if self.left or self._served or self._task is None:
            return
        self.left = True
        self._task.cancel()

    def _read_ahead(self) -> None:
        """Fetch a message, unless much is held that the application has to take first."""
        if self._reading or self._deaf or self._ahead is not None:
            return
        if sum(map(_size, self._held)) < _HELD:
            self._ahead = self._loop.create_task(self._next())
            self._ahead.add_done_callback(self._arrived)

    async def _next(self) -> Message:
        return await self._receive()

    def _arrived(self, ahead: asyncio.Task[Message]) -> None:
        self._ahead = None
        if ahead.cancelled():
            return
        self._failure = ahead.exception()
        self._deaf = self._failure is not None
        if self._deaf:
            return  # the application meets it when it has read what came before
        message = ahead.result()
        if self._body_ended and message["type"] == "http.request":
            self._deaf = True  # a replay of the body, as some middleware makes them without end
            return
        self._note(message)
        self._held.append(message)
        if self._waits and not self._gone:
            self._read_ahead()

    def _note(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._body_ended = not message.get("more_body", False)
        elif message["type"] in _GONE:
            self._gone = True
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
        if message["type"] not in _GONE:  # which is told as often as one asks
            self._held.popleft()
        return message

    async def _read(self) -> Message:
        """Read for the application itself; a server has one reader at a time."""
        self._reading = True
        try:
            message = await self._receive()
            self._deaf = False
            self._note(message)
        finally:
            self._reading = False
            if self._waits and not self._gone:  # another task waits, and nobody reads for it
                self._read_ahead()
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
        self._before = caller_now.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Give up reading ahead, and take back a cancellation of ours; returns whether it was one.

        A cancellation from elsewhere goes on, as with `asyncio.timeout`.
        """
        self._over = True
        caller_now.reset(self._before)
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait({self._ahead}, timeout=_LAST_WORDS)
        if not self.left or self._task is None:
            return False
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # where it arrives if the application has met no await since
        only_ours = self._task.uncancel() <= self._cancelling
        if kind is None and not only_ours:
            raise asyncio.CancelledError
        return only_ours and error.__class__ is asyncio.CancelledError


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


async def _no_answer(_: Message) -> None: ...


def _size(message: Message) -> int:
    content = message.get("body") or message.get("bytes") or message.get("text") or ""
    return _OVERHEAD + len(content)


caller_now: ContextVar[Caller | None] = ContextVar("kafka_broker_caller_now", default=None)
"""The client that the code in this context works for."""


def client_waits() -> AbstractContextManager[None]:
    """Return the context to wait in for what the client of this context wants, if there is one."""
    caller = caller_now.get()
    return _NOBODY if caller is None else caller.waiting()


_NOBODY: Final = nullcontext()
