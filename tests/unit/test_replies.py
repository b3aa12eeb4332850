"""The reply inbox: one partition, no group, and headers decide."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import pytest

from kafka_broker import _wire as wire
from kafka_broker._event import EventObject
from kafka_broker._metrics import Counted, Metrics
from kafka_broker._replies import ReplyInbox
from kafka_broker._storage import ConsumerStorage
from kafka_broker._transport.memory_log import MemoryRecord
from kafka_broker.errors import BrokerUnavailableError, EventDecodeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from kafka_broker._transport import Headers, Transport

TOPIC = "Shop.replies"
GONE = BrokerUnavailableError("the connection is gone")


class Counts(Metrics):
    """Metrics that a test can look at."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()

    def count(self, what: Counted, amount: int = 1) -> None:
        self.counted[what] += amount


class FakeReader:
    """Reads the log of a fake Kafka; may be broken."""

    def __init__(self, kafka: FakeKafka, position: int) -> None:
        self.position = position
        self.broken = False
        self.closed = False
        self._kafka = kafka

    async def fetch(self) -> Sequence[MemoryRecord]:
        await self._kafka.news(self)
        if self.broken:
            raise GONE
        records = self._kafka.log[self.position :]
        self.position += len(records)
        return records

    async def close(self) -> None:
        self.closed = True


class FakeKafka:
    """As much of a transport as an inbox needs: one log, readers that a test can break."""

    def __init__(self, partitions: int = 16) -> None:
        self.log: list[MemoryRecord] = []
        self.readers: list[FakeReader] = []
        self.reads: list[tuple[str, int, int | None, float]] = []
        self.refusals = 0
        self._partitions = partitions
        self._changed = asyncio.Event()

    async def partitions(self, topic: str) -> int:
        assert topic == TOPIC
        return self._partitions

    async def read(self, topic: str, partition: int, offset: int | None = None) -> FakeReader:
        self.reads.append((topic, partition, offset, asyncio.get_running_loop().time()))
        if self.refusals:
            self.refusals -= 1
            raise GONE
        self.readers.append(FakeReader(self, len(self.log) if offset is None else offset))
        return self.readers[-1]

    async def news(self, reader: FakeReader) -> None:
        while reader.position >= len(self.log) and not reader.broken:
            self._changed.clear()
            await self._changed.wait()

    def append(self, value: bytes | None, *headers: tuple[str, bytes | None]) -> None:
        given: Headers = headers
        self.log.append(MemoryRecord(TOPIC, 0, len(self.log), 0, None, value, given))
        self._changed.set()

    def reply(self, correlation_id: str, data: Any = None, *, instance: str | None = "me") -> None:
        """Append what another module answers."""
        event = EventObject(event="respond", correlation_id=correlation_id, data=data)
        headers = [(wire.CORRELATION_ID, correlation_id.encode())]
        if instance is not None:
            headers.append((wire.INSTANCE, instance.encode()))
        self.append(wire.encode(event, "Bank"), *headers)

    def break_reader(self) -> None:
        self.readers[-1].broken = True
        self._changed.set()


class Inbox(ReplyInbox):
    """An inbox with its storage and its counts."""

    def __init__(self, instance: str = "me") -> None:
        self.metrics = Counts()
        self.storage = ConsumerStorage(timeout=30, ttl=60, limit=1000, metrics=self.metrics)
        self.storage.open()
        super().__init__(TOPIC, instance, self.storage, self.metrics)

    async def consume(self, correlation_id: str) -> Any:
        return (await self.storage.consume(correlation_id)).data


@pytest.fixture
async def kafka() -> FakeKafka:
    return FakeKafka()


@pytest.fixture
async def inbox(kafka: FakeKafka) -> AsyncIterator[Inbox]:
    inbox = Inbox()
    transport = cast("Transport", kafka)
    await inbox.open(transport)
    running = asyncio.create_task(inbox.run(transport))
    yield inbox
    running.cancel()
    await asyncio.wait({running})
    await inbox.close()
    assert kafka.readers[-1].closed
    assert running.cancelled()


async def test_a_replica_has_one_partition_that_is_always_the_same() -> None:
    """It follows from its name, so that replies find it after a restart; many replicas spread."""
    used = set()
    for number in range(100):
        inboxes = [Inbox(f"replica-{number}") for _ in range(2)]
        for inbox in inboxes:
            await inbox.open(cast("Transport", FakeKafka(4)))
        assert inboxes[0].partition == inboxes[1].partition
        used.add(inboxes[0].partition)
    assert {0, 1, 2, 3} == used


async def test_a_missing_reply_topic_is_named() -> None:
    """The start fails with what has to be created."""
    with pytest.raises(BrokerUnavailableError, match=r"'Shop\.replies' does not exist"):
        await Inbox().open(cast("Transport", FakeKafka(0)))


async def test_old_replies_are_not_read(kafka: FakeKafka) -> None:
    """Reading begins at the end, where it was when the inbox was opened."""
    kafka.reply("a", "old")
    inbox = Inbox()
    await inbox.open(cast("Transport", kafka))
    kafka.reply("a", "new")
    running = asyncio.create_task(inbox.run(cast("Transport", kafka)))
    assert "new" == await inbox.consume("a")
    running.cancel()
    await asyncio.wait({running})
    assert [(TOPIC, inbox.partition, None)] == [read[:3] for read in kafka.reads]


async def test_a_reply_ends_its_wait(kafka: FakeKafka, inbox: Inbox) -> None:
    """A hundred in one fetch find a hundred waits."""
    waits = [asyncio.create_task(inbox.consume(str(number))) for number in range(100)]
    await asyncio.sleep(0)
    for number in reversed(range(100)):
        kafka.reply(str(number), number)
    assert list(range(100)) == await asyncio.gather(*waits)
    assert {"replies_received": 100} == dict(inbox.metrics.counted)


async def test_a_foreign_reply_is_dropped_on_its_header(kafka: FakeKafka, inbox: Inbox) -> None:
    """Its value is not even decoded; it is counted, and nobody is told."""
    foreign = (wire.INSTANCE, b"somebody else")
    kafka.append(b"?", (wire.CORRELATION_ID, b"a"), foreign)
    kafka.append(b"?", (wire.CORRELATION_ID, b"a"), (wire.INSTANCE, b""))
    kafka.append(b"?", foreign)
    kafka.append(b"?", (wire.CORRELATION_ID, None))
    kafka.append(None)
    kafka.reply("a", 1)
    assert 1 == await inbox.consume("a")
    assert {"replies_foreign": 5, "replies_received": 1} == dict(inbox.metrics.counted)
    assert await inbox.storage.poll() is False


async def test_a_reply_of_a_peer_without_instances_is_ours(kafka: FakeKafka, inbox: Inbox) -> None:
    """Spring and NestJS echo the correlation id only, also one of 16 bytes; their data is bare."""
    given = uuid.UUID("8e6786f1-891e-4ae9-8f8f-2d294c0adb4f")
    kafka.append(b'{"sum": 3}', (wire.CORRELATION_ID, b"a"))
    kafka.append(b'{"sum": 4}', (wire.CORRELATION_ID, given.bytes))
    assert {"sum": 3} == await inbox.consume("a")
    assert {"sum": 4} == await inbox.consume(str(given))


async def test_a_reply_without_a_value_is_a_reply(kafka: FakeKafka, inbox: Inbox) -> None:
    """It says that there is nothing to say."""
    kafka.append(None, (wire.CORRELATION_ID, b"a"))
    assert await inbox.consume("a") is None


async def test_a_reply_that_cannot_be_read_fails_its_own_wait_only(
    kafka: FakeKafka, inbox: Inbox
) -> None:
    """Decoding is left to the one who waited: the inbox goes on."""
    kafka.append(b"?", (wire.CORRELATION_ID, b"a"))
    with pytest.raises(EventDecodeError):
        await inbox.consume("a")
    kafka.reply("b", 1)
    assert 1 == await inbox.consume("b")


async def test_a_repeated_header_counts_by_its_last_value(kafka: FakeKafka, inbox: Inbox) -> None:
    """A peer that copies our headers and adds its own is understood."""
    first, last = (wire.CORRELATION_ID, b"x"), (wire.CORRELATION_ID, b"a")
    kafka.append(b"1", first, last)
    assert 1 == await inbox.consume("a")


@pytest.mark.looptime
async def test_a_broken_reader_is_replaced_where_it_stopped(
    kafka: FakeKafka, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost meanwhile and nothing comes twice; the log says what happened."""
    kafka.reply("a", 1)
    assert 1 == await inbox.consume("a")
    kafka.break_reader()
    kafka.reply("b", 2)
    assert 2 == await inbox.consume("b")
    assert kafka.readers[0].closed
    assert [None, 1] == [offset for _, _, offset, _ in kafka.reads]
    assert 1 == len({(topic, partition) for topic, partition, _, _ in kafka.reads})
    assert {"replies_received": 2} == dict(inbox.metrics.counted)
    assert "the connection is gone" in caplog.text


@pytest.mark.looptime
async def test_a_reader_is_replaced_as_often_as_needed(kafka: FakeKafka, inbox: Inbox) -> None:
    """After growing pauses, at most five seconds, beginning anew after a success."""
    await asyncio.sleep(0)
    for _ in range(2):
        first = len(kafka.reads)
        begin = asyncio.get_running_loop().time()
        kafka.refusals = 8
        kafka.break_reader()
        kafka.reply("a")
        waiting = asyncio.create_task(inbox.storage.consume("a", timeout=None))
        await waiting
        times = [begin, *(time for *_, time in kafka.reads[first:])]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]) == pauses


@pytest.mark.looptime
async def test_a_new_reader_has_to_read_before_it_is_well(kafka: FakeKafka, inbox: Inbox) -> None:
    """Health does not take a reader that was opened for one that can read."""
    assert inbox.pulse.check().ok
    opened: list[tuple[int, bool]] = []

    def look() -> None:
        opened.append((len(kafka.readers), inbox.pulse.check().ok))
        kafka.reply("a", 1)

    await asyncio.sleep(0)
    kafka.break_reader()
    asyncio.get_running_loop().call_later(1.0, look)
    assert 1 == await inbox.consume("a")
    assert ([(2, False)], True) == (opened, inbox.pulse.check().ok)


async def test_closing_what_is_not_open_is_fine() -> None:
    """A start that failed is closed like any other."""
    inbox = Inbox()
    await inbox.close()
    kafka = FakeKafka()
    await inbox.open(cast("Transport", kafka))
    await inbox.close()
    await inbox.close()
    assert kafka.readers[0].closed
