"""Reading one partition without a group: fetch requests of our own, the next always on its way.

Replies come through here, so what counts is the time from the log to the one who waits. A consumer
of aiokafka takes each record through a task, a buffer and a waiter more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiokafka import errors as kafka
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.record.memory_records import MemoryRecords

from kafka_broker._transport import FETCH_TIMEOUT
from kafka_broker._transport.kafka_client import (
    CLOSE_TIMEOUT,
    FOREIGN,
    REQUEST_TIMEOUT,
    Unparsable,
    close,
    connect,
    describe,
    is_dead,
    leader_of,
    to_its_end,
    unavailable,
)
from kafka_broker._transport.kafka_kept import PATIENCE
from kafka_broker._transport.kafka_requests import FETCH, fetch_request, fetched
from kafka_broker._transport.kafka_wire import Wire
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokafka import TopicPartition

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Headers, Record

_logger = logging.getLogger("kafka_broker.transport")

_MOST_BYTES: Final = 1024 * 1024
"""Of one answer, unless a single record is larger."""
_AT_ONCE: Final = 50
"""Records that a fetch returns at most. With more of them whoever waits for a reply each would go
on together, and again at the next reply: while they work Kafka and those who answer have nothing to
do, and the other way round.
"""
_SILENCE: Final = 3.0
"""Seconds that Kafka may keep silent beyond the time that it is told to wait."""
_PAUSE: Final = (0.05, 1.0)
_PASSING: Final = (
    OSError,
    TimeoutError,
    kafka.CorruptRecordException,
    kafka.OffsetOutOfRangeError,
    kafka.QuotaViolationError,
)
_NOT_YET: Final = (
    kafka.UnknownTopicOrPartitionError,
    kafka.NotLeaderForPartitionError,
    kafka.LeaderNotAvailableError,
    kafka.NodeNotReadyError,
)
_AT_END, _AT_BEGINNING = -1, -2
_UNCOMMITTED, _CLIENT = 0, -1


class Fetched(NamedTuple):
    """A `Record`."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def _next_whole(batches: Any) -> Any:
    """Return the next batch; None if there is none, or it is damaged: what is before it is good."""
    try:
        batch = batches.next_batch()
        return batch if batch is not None and batch.validate_crc() else None
    except kafka.CorruptRecordException:
        return None


class KafkaReader:
    """A `Reader` with a connection of its own, as Kafka answers one request of each at a time."""

    def __init__(self, client: Any, place: TopicPartition) -> None:
        self._client = client
        self._place = place
        self._loop = asyncio.get_running_loop()
        self._request = fetch_request(place, FETCH_TIMEOUT, _MOST_BYTES)
        self._wire: Wire | None = None
        self._asking: asyncio.Future[Any] | None = None
        self._pause = _PAUSE[0]
        self._failing_since: float | None = None
        self._closed = False
        self._left: deque[Record] = deque()
        self._next = 0

    @classmethod
    async def open(
        cls, settings: BrokerSettings, place: TopicPartition, offset: int | None
    ) -> KafkaReader:
        """Connect, and know the position; see `Transport.read`."""
        milliseconds = int((FETCH_TIMEOUT + _SILENCE) * 1000)
        client = await connect(settings, {"request_timeout_ms": milliseconds})
        reader = cls(client, place)
        try:
            reader._next = await reader._find(_AT_END) if offset is None else offset
        except BaseException:
            await reader.close()
            raise
        return reader

    @property
    def position(self) -> int:
        """The offset of the next record that `fetch` returns."""
        return self._left[0].offset if self._left else self._next

    async def _find(self, where: int) -> int:
        """Return the offset at an end of the partition; a leader may have to be chosen yet."""
        what = f"the position in {self._place.topic}:{self._place.partition} cannot be found"
        places = [(self._place.topic, [(self._place.partition, where)])]
        refusal: BaseException = TimeoutError()
        with suppress(TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                while True:
                    try:
                        leader = await leader_of(self._client, self._place)
                        if not await to_its_end(self._client.ready(leader)):
                            raise kafka.NodeNotReadyError(leader)
                        request = OffsetRequest(_CLIENT, _UNCOMMITTED, places)
                        answer = (await self._client.send(leader, request)).topics[0][1][0]
                        if not answer[1]:
                            offset: int = answer[3]
                            return offset
                        refusal = kafka.for_code(answer[1])(self._place)
                    except FOREIGN as exc:
                        refusal = exc
                    if not isinstance(refusal, _NOT_YET):
                        break
                    self._client.force_metadata_update()
                    await asyncio.sleep(_PAUSE[0])
        raise unavailable(what, refusal) from refusal

    async def fetch(self) -> Sequence[Record]:
        """Return what has arrived; see `Reader.fetch`."""
        answered = False
        while not answered:
            if self._closed or is_dead(self._client):
                raise self._ended()
            answered = bool(self._left) or await self._fetch_more()
        return [self._left.popleft() for _ in range(min(_AT_ONCE, len(self._left)))]

    async def _fetch_more(self) -> bool:
        """Take the next answer; returns whether it was a good one."""
        self._asking = asking = self._asking or self._ask()  # where a close finds it
        try:
            self._left.extend(await self._read(await asking))
        except asyncio.CancelledError:
            self._asking = None
            current = asyncio.current_task()
            if current is not None and not current.cancelling():  # it was not us who were cancelled
                raise self._ended() from None
            raise
        except FOREIGN as exc:
            self._asking = None
            await self._recover(exc)
            return False
        self._pause, self._failing_since = _PAUSE[0], None
        self._asking = None if self._closed else self._ask()
        return True

    def _ended(self) -> BrokerUnavailableError:
        msg = f"{self._place.topic}:{self._place.partition} is not read any more"
        return BrokerUnavailableError(msg)

    def _ask(self) -> asyncio.Future[bytes]:
        """Have Kafka answer as soon as there is a record, or that there is none for a while."""
        if self._wire is None or not self._wire.open:
            return self._loop.create_task(self._connect_and_ask())
        return self._exchange(self._wire)

    def _exchange(self, wire: Wire) -> asyncio.Future[bytes]:
        asking: asyncio.Future[bytes] = self._loop.create_future()

        def answered(answer: bytes | Exception) -> None:
            if asking.done():  # nobody waits any more
                return
            if isinstance(answer, bytes):
                asking.set_result(answer)
            else:
                asking.set_exception(answer)

        wire.ask(FETCH, self._request(self._next), answered)
        return asking

    async def _connect_and_ask(self) -> bytes:
        leader = await leader_of(self._client, self._place)
        self._wire = await to_its_end(Wire.to(self._client, leader))
        return await self._exchange(self._wire)

    async def _read(self, answer: bytes) -> list[Record]:
        code, content = fetched(answer, self._place)
        if code == kafka.OffsetOutOfRangeError.errno:
            await self._go_into_the_log()
            return []
        if code:
            raise kafka.for_code(code)(self._place)
        begin = self._next
        records = self._parse(content) if content else []
        if content and self._next == begin:
            text = f"{len(content)} bytes, and no whole batch of offset {begin} or behind it"
            raise kafka.CorruptRecordException(text)
        return records

    async def _go_into_the_log(self) -> None:
        """Go to where the log begins, or ends, if that is behind, or before, the position."""
        if self._closed:
            raise self._ended()
        self._asking = finding = self._loop.create_task(self._find_both())
        begin, end = await finding
        if begin <= self._next <= end:
            raise kafka.OffsetOutOfRangeError(self._place)  # not any more, or it comes to itself
        _logger.warning(
            "%s:%d: offset %d is not in the log, which begins at %d and ends at %d",
            *self._place,
            self._next,
            begin,
            end,
        )
        self._next = max(begin, min(self._next, end))

    async def _find_both(self) -> tuple[int, int]:
        return await self._find(_AT_BEGINNING), await self._find(_AT_END)

    def _parse(self, content: bytes) -> list[Record]:
        topic, partition = self._place
        records: list[Record] = []
        position, batches = self._next, MemoryRecords(content)
        while (batch := _next_whole(batches)) is not None:
            if not batch.is_control_batch:
                try:
                    for one in batch:
                        if (offset := one.offset) < position:  # before where we begin in a batch
                            continue
                        position = offset + 1
                        records.append(
                            Fetched(
                                topic,
                                partition,
                                offset,
                                one.timestamp,
                                one.key,
                                one.value,
                                one.headers,
                            )
                        )
                except kafka.UnsupportedCodecError:
                    raise
                except Exception as exc:  # noqa: BLE001  # one that cannot be parsed raises anything
                    begin = max(position, getattr(batch, "base_offset", position))
                    records += self._unparsable(begin, batch.next_offset, exc)
            position = max(position, batch.next_offset)
        self._next = position
        return records

    def _unparsable(self, begin: int, end: int, error: Exception) -> list[Record]:
        """Return what stands for the rest of a batch that cannot be parsed from *begin* on."""
        _logger.error(
            "%s:%d:%d and the rest of its batch, up to %d, cannot be parsed and are handed on "
            "empty: %s",
            *self._place,
            begin,
            end - 1,
            describe(error),
        )
        now = int(time.time() * 1000)
        topic, partition = self._place
        return [Unparsable(topic, partition, offset, now) for offset in range(begin, end)]

    async def _recover(self, error: BaseException) -> None:
        """Wait a little before the next try.

        Raises:
            BrokerUnavailableError: another try is of no use.
        """
        what = f"{self._place.topic}:{self._place.partition} cannot be read"
        now = self._loop.time()
        if self._failing_since is None or isinstance(error, kafka.QuotaViolationError):
            self._failing_since = now  # who slows us down is there
        passing = isinstance(error, _PASSING) or getattr(error, "retriable", False)
        if not passing or now - self._failing_since >= PATIENCE:
            raise unavailable(what, error) from error
        if self._pause == _PAUSE[0]:
            _logger.warning("%s, trying again: %s", what, describe(error))
        self._wire = None
        self._client.force_metadata_update()
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, _PAUSE[1])

    async def close(self) -> None:
        """Disconnect; see `Reader.close`."""
        self._closed = True
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.wait({asking}, timeout=CLOSE_TIMEOUT)
            if asking.done() and not asking.cancelled():
                asking.exception()  # retrieved: nobody waits for it any more
        if self._wire is not None:
            self._wire.close()
        await close(self._client, self._client.close())
