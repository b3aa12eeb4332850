"""A connection to one node whose answers are handled where they arrive: no stream, no task.

aiokafka opens it, so TLS, SASL and the addresses of nodes stay its own; then its transport gets
another protocol. What aiokafka would do for each exchange, a task, a timer and a schema, is most of
what an exchange with a near Kafka costs.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aiokafka import errors as kafka
from aiokafka.conn import CloseReason

from kafka_broker._transport.kafka_client import describe
from kafka_broker._transport.kafka_requests import FETCH, PRODUCE, Kind, text_of, throttled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

GROUP: Final = "kafka_broker"
"""Of connections, in a client of aiokafka: nothing else travels on those of this one."""
_LONGEST: Final = 1 << 28
"""Bytes of an answer; more is no Kafka, or one that we are out of step with."""
_REQUEST: Final = struct.Struct(">ihhi")
_ANSWER: Final = struct.Struct(">ii")
_CORRELATION_IDS: Final = 1 << 31


class Wire(asyncio.Protocol):
    """A connection that is open, until it is not; another one takes its place then.

    Kafka answers in the order in which it was asked, so an answer belongs to the oldest request.

    Attributes:
        timeout: seconds that the node may be silent while an answer is waited for.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._stream = connection._writer  # noqa: SLF001  # it would abort when it is collected
        self._transport: asyncio.Transport = self._stream.transport
        self._before: Any = self._transport.get_protocol()
        self.timeout: float = connection._request_timeout  # noqa: SLF001
        self._client_id = text_of(connection._client_id)  # noqa: SLF001
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[int, float, Kind, Callable[[bytes | Exception], None]]]
        self._pending = deque()
        self._correlation_id = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._rest = bytearray()
        self._needed = 0
        self._lost = False
        self._transport.set_protocol(self)

    @classmethod
    async def to(cls, client: Any, node: int) -> Wire:
        """Return the connection to a node, opened if there is none.

        Raises:
            NodeNotReadyError: it cannot be reached now.
            IncompatibleBrokerVersion: it does not know the requests that we send.
        """
        connection = await client._get_conn(node, group=GROUP)  # noqa: SLF001  # ADR 0007
        if connection is None or not connection.connected():
            raise kafka.NodeNotReadyError(node)
        protocol = connection._writer.transport.get_protocol()  # noqa: SLF001  # the same
        if isinstance(protocol, cls):
            return protocol
        for key, version in (PRODUCE, FETCH):
            lowest, highest = connection._versions.get(key, (0, -1))  # noqa: SLF001  # the same
            if not lowest <= version <= highest:
                text = f"request {key} in version {version}; Kafka 2.1 or newer is needed"
                raise kafka.IncompatibleBrokerVersion(f"the node does not know {text}")
        return cls(connection)

    @property
    def open(self) -> bool:
        """Whether a request may be sent."""
        return not self._lost and not self._transport.is_closing()

    @property
    def busy(self) -> bool:
        """Whether an answer is waited for."""
        return bool(self._pending)

    def ask(
        self, kind: Kind, body: Iterable[bytes], answered: Callable[[bytes | Exception], None]
    ) -> None:
        """Send a request; *answered* is called once, with the answer or what came in its place.

        It must not raise: what follows in the same packet would be lost.

        Raises:
            NodeNotReadyError: the connection is not open; nothing was sent.
        """
        if not self.open:
            raise kafka.NodeNotReadyError("the connection was closed")
        number = self._correlation_id = (self._correlation_id + 1) % _CORRELATION_IDS
        content = b"".join((self._client_id, *body))
        now = self._loop.time()
        self._pending.append((number, now, kind, answered))
        if self._sweeper is None:
            self._sweeper = self._loop.call_at(now + self.timeout, self._sweep)
        self._connection._last_action = time.monotonic()  # noqa: SLF001  # it is not idle
        size = _REQUEST.size - 4 + len(content)
        self._transport.write(_REQUEST.pack(size, *kind, number) + content)

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that are complete; see `asyncio.Protocol`."""
        self._heard = max(self._heard, self._loop.time())
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data, self._rest = bytes(self._rest), bytearray()
        begin, self._needed = 0, _ANSWER.size
        while len(data) - begin >= _ANSWER.size:
            size, number = _ANSWER.unpack_from(data, begin)
            if (error := self._check(size, number)) is not None:
                self._fail(error, CloseReason.OUT_OF_SYNC)
                return
            end = begin + 4 + size
            if end > len(data):
                self._needed = end - begin
                break
            _, _, kind, answered = self._pending.popleft()
            answer = data[begin + _ANSWER.size : end]
            if (pause := throttled(kind, answer)) > 0:
                self._heard = max(self._heard, self._loop.time() + pause)
            answered(answer)
            begin = end
        if begin < len(data) and not self._lost:
            self._rest += data[begin:]

    def _check(self, size: int, number: int) -> Exception | None:
        """Return what is wrong with the head of an answer."""
        error: Exception | None = None
        if not self._pending or self._pending[0][0] != number:
            error = kafka.CorrelationIdError(
                f"an answer to {number}, which is not the next request"
            )
        elif not _ANSWER.size - 4 <= size <= _LONGEST:
            error = kafka.KafkaProtocolError(f"an answer of {size} bytes")
        return error

    def _sweep(self) -> None:
        """Give up on a node that is silent for too long, else look again when it would be."""
        self._sweeper = None
        if not self._pending:
            return
        _, asked, _, _ = self._pending[0]
        expires = max(asked, self._heard) + self.timeout
        if expires <= self._loop.time():
            error = kafka.RequestTimedOutError(f"no answer within {self.timeout:g} s")
            self._fail(error, CloseReason.CONNECTION_TIMEOUT)
        else:
            self._sweeper = self._loop.call_at(expires, self._sweep)

    def eof_received(self) -> None:
        """Let the transport close itself; see `asyncio.Protocol`."""
        self._before.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """End every exchange; see `asyncio.Protocol`."""
        self._before.connection_lost(exc)  # aiokafka waits for it when it closes
        error = kafka.KafkaConnectionError(describe(exc) if exc else "the connection was closed")
        error.__cause__ = exc
        self._fail(error, CloseReason.CONNECTION_BROKEN)

    def close(self) -> None:
        """Close at once; nobody knows what becomes of the requests that have no answer yet."""
        self._fail(kafka.KafkaConnectionError("the connection was closed"), CloseReason.SHUTDOWN)

    def _fail(self, error: Exception, reason: CloseReason) -> None:
        """Close, and let every exchange end in *error*."""
        if self._lost:
            return
        self._lost = True
        self._rest.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._transport.abort()
        self._connection.close(reason, error)
        while self._pending:
            _, _, _, answered = self._pending.popleft()
            answered(error)
