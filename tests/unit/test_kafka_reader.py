"""A reader of our own: every answer that Kafka can give, every await cut off, nothing lost."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from itertools import pairwise, product
from typing import Any

import aiokafka.codec
import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.fetch import FetchRequest_v10, FetchResponse_v10
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from kafka_broker._settings import BrokerSettings
from kafka_broker._transport import FETCH_TIMEOUT, Record, kafka_client
from kafka_broker._transport.kafka_client import REQUEST_TIMEOUT
from kafka_broker._transport.kafka_reader import KafkaReader
from kafka_broker._transport.kafka_requests import FETCH, Kind
from kafka_broker._transport.kafka_wire import Wire
from kafka_broker.errors import BrokerUnavailableError

VIRTUAL = pytest.mark.looptime
"""Pauses of the reader take no time."""
PLACE = TopicPartition("replies", 3)
SETTINGS = BrokerSettings(module="asking", bootstrap_servers="127.0.0.1:1")
GZIP = 1
BASE, SIZE, LEADER_EPOCH, CRC, ATTRIBUTES, LAST_DELTA = 0, 8, 12, 17, 21, 23
"""Where these fields are in a batch; the checksum is over all that follows it."""
CONTROL = 0x20
NOT_LEADER = kafka.NotLeaderForPartitionError.errno
OUT_OF_RANGE = kafka.OffsetOutOfRangeError.errno
LEADERLESS = kafka.LeaderNotAvailableError.errno
DENIED = kafka.TopicAuthorizationFailedError.errno
OURS = 1000
"""What is added to a node's number where the connection is the reader's own."""
NO_TEXT = b"\xff\xfe\xff\xfe"

Fault = Callable[[list[Any]], Awaitable[None]]
"""What is done to the answer of a fetch: error code, then content."""


# Batches


def batch(base: int, *values: bytes | None, codec: int = 0) -> bytearray:
    """Return a batch as a log has it; its records have a key, a header and a time of their own."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=codec,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 30,
    )
    for delta, value in enumerate(values):
        offset = base + delta
        headers = [("name", b"%d" % offset), ("null", None), ("name", b"")]
        builder.append(delta, 1000 + offset, b"key %d" % offset, value, headers)
    made = bytearray(builder.build())
    struct.pack_into(">q", made, BASE, base)
    return made


def signed(made: bytearray) -> bytearray:
    """Return a batch that was changed, with a checksum that fits again."""
    struct.pack_into(">I", made, CRC, calc_crc32c(bytes(made[ATTRIBUTES:])))
    return made


def control(base: int) -> bytearray:
    """Return what ends a transaction."""
    made = batch(base, b"")
    made[ATTRIBUTES + 1] |= CONTROL
    return signed(made)


def compacted(base: int, end: int, *values: bytes) -> bytearray:
    """Return a batch whose last records were compacted away."""
    made = batch(base, *values)
    struct.pack_into(">i", made, LAST_DELTA, end - base - 1)
    return signed(made)


def unparsable(base: int, *values: bytes, broken: int) -> bytearray:
    """Return a batch with a record whose header has a name that is not UTF-8."""
    made = batch(base, *values)
    header = b"name" + b"\x02" + b"%d" % broken
    assert 1 == made.count(header)
    return signed(made.replace(header, NO_TEXT + header[4:]))


def end_of(made: bytearray) -> int:
    base, last = (struct.unpack_from(kind, made, at)[0] for kind, at in ((">q", 0), (">i", 23)))
    return int(base + last + 1)


# Kafka, as a client sees it


class Kafka:
    """A log, and what happens to the next requests; every answer takes some turns of the loop."""

    def __init__(self, *log: bytearray) -> None:
        self.log = list(log)
        self.faults: deque[Fault] = deque()
        self.refusals: deque[int] = deque()
        self.asked: list[tuple[float, int, int]] = []
        self.renewed = 0
        self.leader: int | None = 1
        self.sockets: set[int] = set()
        self.silent = False
        self.connecting = asyncio.Event()
        self.may_connect = asyncio.Event()
        self.may_connect.set()

    def append(self, made: bytearray) -> None:
        self.log.append(made)

    def fails(self, *faults: Fault) -> None:
        self.faults.extend(faults)

    def offsets(self) -> list[int]:
        """Return where each fetch wanted to begin."""
        return [offset for _, _, offset in self.asked]

    def pauses(self) -> list[float]:
        """Return the seconds between the fetches."""
        times = [when for when, _, _ in self.asked]
        return [round(after - before, 3) for before, after in pairwise(times)]


class Client:
    """Stands for an `AIOKafkaClient`, its careless ways included: it connects after its close."""

    def __init__(self, server: Kafka) -> None:
        self.server = server
        self.cluster = self
        self._sync_task: asyncio.Task[object] | None = None
        self._waiting: set[asyncio.Future[object]] = set()
        self._connected: set[int] = set()

    async def bootstrap(self) -> None:
        await self._connect(0)
        await turns(2)
        self._disconnect(0)
        self._sync_task = asyncio.create_task(asyncio.Event().wait())

    async def _connect(self, node: int) -> None:
        self.server.sockets.add(id(self) + node)  # cut off from here on, it stays
        self.server.connecting.set()
        await turns(2)
        await self.server.may_connect.wait()
        self._connected.add(node)

    def _disconnect(self, node: int) -> None:
        self._connected.discard(node)
        self.server.sockets.discard(id(self) + node)

    def leader_for_partition(self, place: TopicPartition) -> int | None:
        assert PLACE == place
        return self.server.leader

    def add_topic(self, topic: str) -> None:
        assert PLACE.topic == topic

    def force_metadata_update(self) -> asyncio.Future[bool]:
        self.server.renewed += 1
        return asyncio.ensure_future(turns(2)) if self._sync_task else asyncio.Future()

    async def ready(self, node: int) -> bool:
        if node not in self._connected:
            await self._connect(node)
        return True

    async def send(self, node: int, request: Any) -> Any:
        assert isinstance(request, OffsetRequest)
        await self.ready(node)
        answering = self._begin(self._find(request))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            answering.cancel()
            if node in self._connected:
                raise
            raise kafka.KafkaConnectionError("closed") from None

    def _begin(self, answer: Awaitable[Any]) -> asyncio.Future[Any]:
        answering = asyncio.ensure_future(answer)
        self._waiting.add(answering)
        answering.add_done_callback(self._waiting.discard)
        return answering

    async def _answer(self, node: int, request: Any) -> Any:
        ((topic, ((partition, epoch, offset, begin, most),)),) = request.topics
        assert (PLACE, 1 << 20) == (TopicPartition(topic, partition), most)
        assert (-1, -1, 1, 0, 0, -1) == (
            *(epoch, begin, request.min_bytes, request.isolation_level),
            *(request.session_id, request.session_epoch),
        )
        assert FETCH_TIMEOUT * 1000 == request.max_wait_time
        self.server.asked.append((asyncio.get_running_loop().time(), node, offset))
        answer: list[Any] = [0, b""]
        await turns(2)
        if self.server.faults:
            await self.server.faults.popleft()(answer)
        if not answer[0] and offset < end_of_first_gap(self.server.log):
            answer[0] = OUT_OF_RANGE
        if answer == [0, b""]:
            found = [made for made in self.server.log if end_of(made) > offset]
            if self.server.silent and not found:
                await asyncio.Event().wait()
            answer[1] = b"".join(found)
        return Answer([(topic, [(partition, answer[0], 0, 0, 0, [(1, 2)], *answer[1:])])])

    async def _find(self, request: OffsetRequest) -> Any:
        ((topic, ((partition, where),)),) = request._topics
        await turns(2)
        code = self.server.refusals.popleft() if self.server.refusals else 0
        log = self.server.log
        begin, end = end_of_first_gap(log), end_of(log[-1]) if log else 0
        return Answer([(topic, [(partition, code, -1, end if where == -1 else begin, 0)])])

    async def close(self) -> None:
        task, self._sync_task = self._sync_task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        for node in tuple(self._connected):
            self._disconnect(node)
        for waiting in tuple(self._waiting):
            waiting.cancel()
        await turns(2)


class Link:
    """Stands for a `Wire`; what it is asked and answers is read and written by aiokafka."""

    def __init__(self, client: Client, node: int) -> None:
        self.client = client
        self.node = node

    @classmethod
    async def to(cls, client: Client, node: int) -> Link:
        number = node + OURS
        if number not in client._connected:
            await client._connect(number)
        return cls(client, node)

    @property
    def open(self) -> bool:
        return self.node + OURS in self.client._connected

    def ask(
        self, kind: Kind, body: Iterable[bytes], answered: Callable[[bytes | Exception], None]
    ) -> None:
        assert self.open
        assert FETCH == kind == (FetchRequest_v10.API_KEY, FetchRequest_v10.API_VERSION)
        request = FetchRequest_v10.decode(io.BytesIO(b"".join(body)))

        async def answer() -> None:
            try:
                topics = (await self.client._answer(self.node, request)).topics
            except asyncio.CancelledError:
                answered(kafka.KafkaConnectionError("closed"))
            except (kafka.KafkaError, OSError, TimeoutError) as exc:
                self.client._disconnect(self.node + OURS)
                answered(exc)
            else:
                answered(FetchResponse_v10(0, 0, 0, topics).encode())

        self.client._begin(answer())

    def close(self) -> None:
        self.client._disconnect(self.node + OURS)


class Answer:
    def __init__(self, topics: list[Any]) -> None:
        self.topics = topics


def end_of_first_gap(log: list[bytearray]) -> int:
    """Return the first offset that retention has left."""
    return int(struct.unpack_from(">q", log[0])[0]) if log else 0


async def turns(count: int) -> bool:
    for _ in range(count):
        await asyncio.sleep(0)
    return True


def code(number: int) -> Fault:
    """Answer with an error."""

    async def fault(answer: list[Any]) -> None:
        answer[0] = number

    return fault


def raising(error: Exception) -> Fault:
    """Do not answer, but end in this."""

    async def fault(_: list[Any]) -> None:
        raise error

    return fault


def content(made: bytes) -> Fault:
    """Answer with these bytes."""

    async def fault(answer: list[Any]) -> None:
        answer[1] = bytes(made)

    return fault


async def never(_: list[Any]) -> None:
    """Do not answer at all."""
    await asyncio.Event().wait()


async def late(_: list[Any]) -> None:
    """Answer after a while."""
    await turns(5)


def damaged(made: bytearray) -> bytearray:
    """Return a copy whose last byte is another."""
    copy = bytearray(made)
    copy[-1] ^= 1
    return copy


def too_short(made: bytearray) -> bytearray:
    """Return a copy that says it is shorter than any batch."""
    copy = bytearray(made)
    struct.pack_into(">i", copy, SIZE, 5)
    return copy


# Readers


@pytest.fixture
async def complaints() -> AsyncIterator[list[dict[str, Any]]]:
    """Collect what asyncio reports; after the test there is nothing, and no task is left."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    yield reported
    await turns(3)
    gc.collect(1)
    assert [] == reported
    assert set() == others()


def others() -> set[asyncio.Task[Any]]:
    current = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not current}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kafka]]:
    """Return what makes the Kafka that readers of this test connect to."""
    made: list[Kafka] = []

    def make(*log: bytearray) -> Kafka:
        made.append(Kafka(*log))
        monkeypatch.setattr(kafka_client, "AIOKafkaClient", lambda **_: Client(made[-1]))
        monkeypatch.setattr(kafka_client, "options", lambda *_: {})
        monkeypatch.setattr(Wire, "to", Link.to)
        return made[-1]

    yield make
    assert [set()] * len(made) == [each.sockets for each in made]


Serve = Callable[..., Kafka]
pytestmark = pytest.mark.usefixtures("complaints")


async def open_reader(offset: int | None = 0) -> KafkaReader:
    return await KafkaReader.open(SETTINGS, PLACE, offset)


async def fetched(reader: KafkaReader, count: int, tries: int = 30) -> list[Record]:
    """Fetch until *count* records are there."""
    records: list[Record] = []
    for _ in range(tries):
        if len(records) >= count:
            break
        records += await reader.fetch()
    return records


def simple(records: list[Record]) -> list[tuple[int, bytes | None]]:
    return [(record.offset, record.value) for record in records]


async def read(count: int, offset: int = 0) -> list[tuple[int, bytes | None]]:
    """Open, fetch until *count* records are there and once more, and close."""
    reader = await open_reader(offset)
    try:
        records = [*await fetched(reader, count), *await reader.fetch()]
        assert reader.position >= max((record.offset for record in records), default=-1) + 1
        return simple(records)
    finally:
        await reader.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage()
        for each in caplog.records
        if each.levelno >= logging.WARNING and each.name == "kafka_broker.transport"
    ]


# What is in the log


async def test_records_come_as_they_are(server: Serve) -> None:
    """A record has its topic, partition, offset, time, key, value and headers, in order."""
    server(batch(0, b"a", None), batch(2, b""))
    reader = await open_reader()
    records = await fetched(reader, 3)
    await reader.close()
    assert [(0, b"a"), (1, None), (2, b"")] == simple(records)
    for offset, record in enumerate(records):
        place = (record.topic, record.partition, record.timestamp, record.key)
        assert (*PLACE, 1000 + offset, b"key %d" % offset) == place
        headers = [("name", b"%d" % offset), ("null", None), ("name", b"")]
        assert headers == list(record.headers)


async def test_reading_begins_in_the_middle_of_a_batch(server: Serve) -> None:
    """What is before the position in its batch is left out."""
    server(batch(0, b"a", b"b", b"c"), batch(3, b"d"))
    assert [(2, b"c"), (3, b"d")] == await read(2, offset=2)


async def test_compressed_batches_are_read(server: Serve) -> None:
    """A batch that gzip has made small is read like any other, from its middle, too."""
    server(batch(0, b"a" * 1000, b"b", codec=GZIP), batch(2, b"c", codec=GZIP))
    assert [(1, b"b"), (2, b"c")] == await read(2, offset=1)


async def test_the_end_of_transactions_is_no_record(server: Serve) -> None:
    """Control batches are skipped, and reading goes on behind them, also where nothing follows."""
    kafka = server(batch(0, b"a"), control(1), batch(2, b"b"), control(3))
    reader = await open_reader()
    assert [(0, b"a"), (2, b"b")] == simple(await fetched(reader, 2))
    assert 4 == reader.position
    kafka.append(control(4))
    assert [] == list(await reader.fetch())
    assert [] == list(await reader.fetch())
    kafka.append(batch(5, b"c"))
    assert [(5, b"c")] == simple(await fetched(reader, 1))
    await reader.close()


async def test_what_was_compacted_away_is_passed(server: Serve) -> None:
    """Offsets that are in the log no more, in a batch and between two, stop nobody."""
    kafka = server(compacted(0, 5, b"a"), batch(9, b"b"))
    assert [(0, b"a"), (9, b"b")] == await read(2)
    assert {0, 10} == set(kafka.offsets())


async def test_a_batch_that_was_cut_is_read_from_the_next_answer(server: Serve) -> None:
    """Kafka cuts an answer where the limit is: the rest of the last batch comes with the next."""
    log = [batch(0, b"a"), batch(1, b"b" * 100)]
    server(*log).fails(content(b"".join(log)[:-10]))
    assert [(0, b"a"), (1, b"b" * 100)] == await read(2)


async def test_what_retention_removed_is_passed(
    server: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """A position that is gone moves to the earliest that is there, and the log says so."""
    server(batch(7, b"a", b"b"))
    assert [(7, b"a"), (8, b"b")] == await read(2, offset=2)
    (line,) = warnings(caplog)
    assert "replies:3" in line
    assert "2" in line
    assert "7" in line


async def test_retention_may_overtake_an_open_reader(server: Serve) -> None:
    """What was removed while nobody fetched is passed; the rest comes once."""
    kafka = server(batch(0, b"a"))
    reader = await open_reader()
    assert [(0, b"a")] == simple(await fetched(reader, 1))
    kafka.log[:] = [batch(40, b"b")]
    assert [(40, b"b")] == simple([*await fetched(reader, 1), *await reader.fetch()])
    await reader.close()


async def test_a_position_behind_the_end_moves_to_the_end(
    server: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """A log that has lost its end, or was made anew, is not read again from its beginning."""
    kafka = server(batch(2, b"a", b"b"))
    kafka.fails(code(OUT_OF_RANGE))
    reader = await open_reader(300)
    assert [] == list(await reader.fetch())
    assert 4 == reader.position
    kafka.append(batch(4, b"c"))
    assert [(4, b"c")] == simple(await fetched(reader, 1))
    await reader.close()
    (line,) = warnings(caplog)
    assert line == "replies:3: offset 300 is not in the log, which begins at 2 and ends at 4"


@VIRTUAL
async def test_an_offset_that_is_in_the_log_after_all(server: Serve) -> None:
    """A node that calls a position out of range, where it is not, is asked again after a pause."""
    kafka = server(batch(0, b"a", b"b"))
    kafka.fails(*[code(OUT_OF_RANGE)] * 2)
    assert [(1, b"b")] == await read(1, offset=1)
    assert [1, 1, 1] == kafka.offsets()[:3]


@VIRTUAL
@pytest.mark.parametrize("at", [0, 1])
async def test_a_checksum_that_does_not_fit_skips_nothing(
    server: Serve, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    """What was damaged on its way is asked for again, and no record of it is trusted."""
    log = [batch(0, b"a"), batch(1, b"b")]
    wrong = [damaged(made) if number == at else made for number, made in enumerate(log)]
    server(*log).fails(*[content(b"".join(wrong))] * 3)
    assert [(0, b"a"), (1, b"b")] == await read(2)
    assert 1 == len(warnings(caplog))


@VIRTUAL
@pytest.mark.parametrize("wrong", [damaged, too_short])
async def test_what_stays_damaged_breaks_the_reader(
    server: Serve, wrong: Callable[[bytearray], bytearray]
) -> None:
    """Good batches before it are handed on; then fetches fail until the reader breaks there."""
    kafka = server(batch(0, b"a"), batch(1, b"b"), wrong(batch(2, b"c")), batch(3, b"d"))
    reader = await open_reader()
    assert [(0, b"a"), (1, b"b")] == simple(await fetched(reader, 2))
    with pytest.raises(BrokerUnavailableError, match="CorruptRecord"):
        await reader.fetch()
    assert 2 == reader.position
    assert {0, 2} == set(kafka.offsets())
    assert len(kafka.asked) < 20
    await reader.close()


@VIRTUAL
@pytest.mark.parametrize("useless", [batch(4, b"x" * 99)[:-3], batch(1, b"x", b"y"), b"?"])
async def test_an_answer_that_leads_nowhere_is_a_failure(
    server: Serve, caplog: pytest.LogCaptureFixture, useless: bytes
) -> None:
    """Bytes without a whole batch, or of before the position, are asked for again after a pause."""
    kafka = server(batch(4, b"a"))
    kafka.fails(*[content(useless)] * 3)
    assert [(4, b"a")] == await read(1, offset=4)
    assert [0.05, 0.1, 0.2] == kafka.pauses()[:3]
    assert [4, 4, 4, 4] == kafka.offsets()[:4]
    assert 1 == len(warnings(caplog))


async def test_the_position_never_goes_back(server: Serve) -> None:
    """Batches of before the position, in an answer with one that is wanted, are passed."""
    log = [batch(4, b"a"), batch(0, b"x", b"y"), batch(3, b"z", b"a")]
    kafka = server(batch(4, b"a"))
    kafka.fails(content(b"".join(log)))
    assert [(4, b"a")] == await read(1, offset=4)
    assert {4, 5} == set(kafka.offsets())


async def test_a_record_that_cannot_be_parsed_is_handed_on_empty(
    server: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes empty with the rest of its batch; what is before and behind comes as it is."""
    server(batch(0, b"a"), unparsable(1, b"b", b"c", b"d", broken=2), batch(4, b"e"))
    reader = await open_reader()
    records = await fetched(reader, 5)
    await reader.close()
    assert [(0, b"a"), (1, b"b"), (2, b""), (3, b""), (4, b"e")] == simple(records)
    assert [(None, ())] * 2 == [(each.key, each.headers) for each in records[2:4]]
    (line,) = warnings(caplog)
    assert line.startswith("replies:3:2 ")
    assert "UnicodeDecodeError" in line
    assert 5 == reader.position


async def test_nothing_is_made_up_where_records_are_missing(server: Serve) -> None:
    """Where offsets are missing before a batch that cannot be parsed, nothing stands for them."""
    server(batch(0, b"a"), unparsable(5, b"b", b"c", broken=5))
    assert [(0, b"a"), (5, b""), (6, b"")] == await read(3)


async def test_a_codec_that_is_not_installed_breaks_the_reader(
    server: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that another installation could read are not taken for broken ones."""
    server(batch(0, b"a", codec=GZIP))
    monkeypatch.setattr(aiokafka.codec, "has_gzip", lambda: False)
    reader = await open_reader()
    with pytest.raises(BrokerUnavailableError, match="gzip"):
        await reader.fetch()
    assert 0 == reader.position
    await reader.close()


# What can happen to a request

PASSING = {
    **{
        kind.__name__: code(kind.errno)
        for kind in (
            kafka.NotLeaderForPartitionError,
            kafka.LeaderNotAvailableError,
            kafka.UnknownTopicOrPartitionError,
            kafka.RequestTimedOutError,
            kafka.KafkaStorageError,
        )
    },
    "lost": raising(kafka.KafkaConnectionError("lost")),
    "silent": raising(kafka.RequestTimedOutError()),
    "not ready": raising(kafka.NodeNotReadyError(1)),
    "mixed up": raising(kafka.CorrelationIdError()),
    "reset": raising(ConnectionResetError()),
    "timeout": raising(TimeoutError()),
}


@VIRTUAL
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_what_passes_is_waited_for(
    server: Serve, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    """A request is made again after growing pauses with new metadata; the log tells it once."""
    kafka = server(batch(0, b"a"))
    kafka.fails(*[fault] * 8)
    reader = await open_reader()
    records = await fetched(reader, 1)
    assert [(0, b"a")] == simple(records)
    assert [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0] == kafka.pauses()[:8]
    assert 8 == kafka.renewed
    (line,) = warnings(caplog)
    assert "replies:3" in line
    kafka.append(batch(1, b"b"))
    assert [(1, b"b")] == simple([*await fetched(reader, 1), *await reader.fetch()])
    await reader.close()


@VIRTUAL
async def test_each_outage_is_told(server: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Once it is over the next one begins with a short pause, and is told again."""
    kafka = server(batch(0, b"a"))
    kafka.fails(code(NOT_LEADER), code(NOT_LEADER), late, code(NOT_LEADER), late)
    reader = await open_reader()
    await fetched(reader, 1)
    kafka.append(batch(1, b"b"))
    await fetched(reader, 1)
    await reader.close()
    assert 2 == len(warnings(caplog))
    assert 2 == kafka.pauses().count(0.05)


@VIRTUAL
async def test_the_new_leader_is_asked(server: Serve) -> None:
    """After a leader stepped down the next request goes to the one that the metadata has."""
    kafka = server(batch(0, b"a"))

    async def move(answer: list[Any]) -> None:
        answer[0] = NOT_LEADER
        kafka.leader = 2

    kafka.fails(move)
    assert [(0, b"a")] == await read(1)
    assert [1, 2] == [node for _, node, _ in kafka.asked][:2]


@VIRTUAL
async def test_a_partition_without_a_leader_is_waited_for(server: Serve) -> None:
    """While no node leads the partition nothing is asked, and the metadata is renewed."""
    kafka = server(batch(0, b"a"))
    kafka.leader = -1
    reader = await open_reader()
    asyncio.get_running_loop().call_later(0.5, setattr, kafka, "leader", 1)
    assert [(0, b"a")] == simple(list(await reader.fetch()))
    assert (0, 8) == (kafka.asked[0][-1], kafka.renewed)
    await reader.close()


@VIRTUAL
async def test_an_answer_that_lacks_the_partition_is_passed(
    server: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka answers without a partition when a quota is used up: it is asked as long as it is."""
    kafka = server(batch(0, b"a"))
    left = [True] * 17
    true_answer = Client._answer

    async def answer(client: Client, node: int, request: Any) -> Any:
        given = await true_answer(client, node, request)
        return Answer([]) if left and left.pop(0) else given

    monkeypatch.setattr(Client, "_answer", answer)
    assert [(0, b"a")] == await read(1)
    assert [0] * 18 == kafka.offsets()[:18]


@VIRTUAL
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_what_does_not_pass_in_time_breaks_the_reader(
    server: Serve, looptime: Any, fault: Fault
) -> None:
    """Ten seconds without a good answer end in an error, so another reader looks for Kafka."""
    kafka = server(batch(0, b"a"))
    kafka.fails(*[fault] * 5, late, *[fault] * 100)
    reader = await open_reader()
    assert [(0, b"a")] == simple(await fetched(reader, 1))
    with pytest.raises(BrokerUnavailableError, match="replies:3"):
        await fetched(reader, 1)
    assert 10 <= looptime < 14
    assert 1 == reader.position
    await reader.close()


FINAL = {
    "denied": code(DENIED),
    "unknown": code(kafka.UnknownError.errno),
    "unheard of": code(999),
    "too old": code(kafka.UnsupportedVersionError.errno),
    "locked out": raising(kafka.AuthenticationFailedError()),
    "incompatible": raising(kafka.IncompatibleBrokerVersion()),
}


@pytest.mark.parametrize("fault", FINAL.values(), ids=FINAL)
async def test_what_does_not_pass_breaks_the_reader(server: Serve, fault: Fault) -> None:
    """A refusal, or an error that nobody knows, ends in ours, where another reader can go on."""
    server(batch(0, b"a"), batch(1, b"b")).fails(fault)
    reader = await open_reader(1)
    with pytest.raises(BrokerUnavailableError, match="replies:3") as caught:
        await reader.fetch()
    assert isinstance(caught.value.__cause__, kafka.KafkaError)
    assert 1 == reader.position
    await reader.close()
    assert [(1, b"b")] == await read(1, offset=reader.position)


async def test_the_next_request_is_on_its_way(server: Serve) -> None:
    """Kafka is asked for what follows before records are handed on; it is asked for once."""
    kafka = server(batch(0, b"a"))
    reader = await open_reader()
    assert [(0, b"a")] == simple(list(await reader.fetch()))
    await turns(2)
    assert [0, 1] == kafka.offsets()
    await turns(10)
    assert [0, 1] == kafka.offsets()
    await reader.close()


async def test_many_records_come_in_portions(server: Serve) -> None:
    """What is handed on has a limit; the position is that of what comes next, also for another."""
    values = [b"%d" % number for number in range(120)]
    kafka = server(batch(0, *values))
    reader = await open_reader()
    records: list[Record] = []
    while len(records) < 100:
        portion = await reader.fetch()
        assert 0 < len(portion) <= 50
        records += portion
        assert len(records) == reader.position
    await turns(2)
    assert [0, 120] == kafka.offsets()
    await reader.close()
    another = await open_reader(reader.position)
    records += await fetched(another, 20)
    assert 120 == another.position
    await another.close()
    assert list(enumerate(values)) == simple(records)


# The end of a reader


async def test_a_reader_that_was_cut_off_is_noticed(server: Serve) -> None:
    """After a loop has cancelled every task, a fetch raises, and a close leaves nothing."""
    server(batch(0, b"a"))
    reader = await open_reader()
    await reader.fetch()
    for task in others():
        task.cancel()
    with pytest.raises(BrokerUnavailableError, match="replies:3"):
        await reader.fetch()
    await turns(3)
    with pytest.raises(BrokerUnavailableError):
        await reader.fetch()
    await reader.close()


async def test_a_closed_reader_reads_nothing(server: Serve) -> None:
    """A fetch after the close raises, asks nothing and opens no connection; a close may repeat."""
    kafka = server(batch(0, b"a"))
    reader = await open_reader()
    await reader.fetch()
    await reader.close()
    asked = kafka.offsets()
    await reader.close()
    with pytest.raises(BrokerUnavailableError):
        await reader.fetch()
    await turns(5)
    assert (asked, set()) == (kafka.offsets(), kafka.sockets)


async def test_a_failure_that_nobody_fetched_is_not_reported(server: Serve) -> None:
    """A reader is closed whose next request has failed already: asyncio has nothing to tell."""
    server(batch(0, b"a")).fails(late, raising(kafka.KafkaConnectionError("lost")))
    reader = await open_reader()
    await reader.fetch()
    await turns(10)
    await reader.close()
    del reader
    gc.collect()


async def outcome(fetching: asyncio.Task[Any]) -> object:
    """Return how a fetch ended: with these records, or this error."""
    await asyncio.wait({fetching}, timeout=60)
    assert fetching.done()
    assert not fetching.cancelled()
    return fetching.exception() or list(fetching.result())


def is_end(ended: object) -> bool:
    return ended == [] or isinstance(ended, BrokerUnavailableError)


@VIRTUAL
@pytest.mark.parametrize("closes", [1, 2])
async def test_close_while_it_waits(server: Serve, closes: int) -> None:
    """A close ends the fetch that waits for an answer, once or twice at a time."""
    kafka = server()
    kafka.fails(never)
    reader = await open_reader()
    fetching = asyncio.create_task(reader.fetch())
    await turns(10)
    assert [0] == kafka.offsets()
    await asyncio.gather(*[reader.close() for _ in range(closes)])
    assert is_end(await outcome(fetching))
    with pytest.raises(BrokerUnavailableError):
        await reader.fetch()
    assert set() == kafka.sockets


@VIRTUAL
async def test_close_while_it_connects(server: Serve) -> None:
    """A close ends a fetch that connects, and the connection, once it is made, does not stay."""
    kafka = server(batch(0, b"a"))
    reader = await open_reader()
    kafka.may_connect.clear()
    kafka.connecting.clear()
    fetching = asyncio.create_task(reader.fetch())
    await kafka.connecting.wait()
    closing = asyncio.create_task(reader.close())
    await turns(5)
    kafka.may_connect.set()
    await closing
    assert is_end(await outcome(fetching))
    await turns(10)
    assert ([], set()) == (kafka.offsets(), kafka.sockets)


@VIRTUAL
@pytest.mark.parametrize("fault", [late, code(NOT_LEADER), code(OUT_OF_RANGE)])
async def test_close_in_any_step_of_a_fetch(server: Serve, fault: Fault) -> None:
    """Whatever a fetch waits for when its reader is closed, it ends, and nothing is left."""
    for step in range(40):
        kafka = server(batch(0, b"a"))
        kafka.fails(fault)
        reader = await open_reader()
        fetching = asyncio.create_task(reader.fetch())
        await turns(step)
        await reader.close()
        ended = await outcome(fetching)
        assert isinstance(ended, list | BrokerUnavailableError)
        await turns(10)
        assert (set(), set()) == (others(), kafka.sockets)


@VIRTUAL
async def test_a_fetch_that_is_cancelled_in_a_close_is_cancelled(server: Serve) -> None:
    """Who is cancelled while its reader is closed ends as cancelled, not in an error."""
    server().fails(never)
    reader = await open_reader()
    fetching = asyncio.create_task(reader.fetch())
    await turns(10)
    closing = asyncio.create_task(reader.close())
    await turns(1)
    fetching.cancel()
    await asyncio.wait({fetching, closing})
    assert fetching.cancelled()


# Cut off

AFTER = (0.0, 0.05, 0.1)
"""Seconds after which another try begins."""
CUT = {
    "plain": [late],
    "moved": [code(NOT_LEADER), late],
    "removed": [code(OUT_OF_RANGE), late],
    "damaged": [content(bytes(damaged(batch(0, b"a")))), late],
    "lost": [raising(kafka.KafkaConnectionError("lost")), late],
}


@VIRTUAL
@pytest.mark.parametrize("faults", CUT.values(), ids=CUT)
async def test_a_fetch_is_cut_off_at_each_of_its_waits(server: Serve, faults: list[Fault]) -> None:
    """A cancelled fetch ends as cancelled, and the next ones return every record, once."""
    for after, step in product(AFTER[: len(faults)], range(25)):
        kafka = server(batch(0, b"a"), batch(1, b"b"))
        kafka.fails(*faults)
        reader = await open_reader()
        seen: list[Record] = []

        async def reading(reader: KafkaReader = reader, seen: list[Record] = seen) -> None:
            while len(seen) < 2:
                seen += await reader.fetch()

        cut = asyncio.create_task(reading())
        await asyncio.sleep(after)
        await turns(step)
        ended_by_itself = cut.done()
        cut.cancel()
        await asyncio.wait({cut}, timeout=60)
        assert ended_by_itself is not cut.cancelled()
        seen += [*await fetched(reader, 2 - len(seen)), *await reader.fetch()]
        assert [(0, b"a"), (1, b"b")] == simple(seen)
        await reader.close()
        assert (set(), set()) == (others(), kafka.sockets)
        if ended_by_itself:
            return
    pytest.fail("it never ended")


@VIRTUAL
@pytest.mark.parametrize("again", [0, 1, 2])
async def test_open_is_cut_off_at_each_of_its_waits(server: Serve, again: int) -> None:
    """An open that is cancelled while it connects or asks ends so, and leaves no socket or task."""
    for after, step in product(AFTER[: again + 1], range(25)):
        kafka = server(batch(0, b"a"))
        kafka.refusals.extend([NOT_LEADER] * again)
        opening = asyncio.create_task(open_reader(None))
        await asyncio.sleep(after)
        await turns(step)
        ended_by_itself = opening.done()
        opening.cancel()
        await asyncio.wait({opening}, timeout=60)
        if ended_by_itself:
            reader = opening.result()
            assert 1 == reader.position
            await reader.close()
        assert ended_by_itself is not opening.cancelled()
        assert (set(), set()) == (others(), kafka.sockets)
        if ended_by_itself:
            return
    pytest.fail("it never ended")


@VIRTUAL
async def test_open_gives_up_on_a_silent_kafka(server: Serve, looptime: Any) -> None:
    """A Kafka that accepts and never answers ends an open in seconds, without a socket."""
    kafka = server()
    kafka.may_connect.clear()
    with pytest.raises(BrokerUnavailableError, match=r"127\.0\.0\.1:1"):
        await open_reader()
    assert looptime < REQUEST_TIMEOUT + 5
    await turns(3)
    kafka.sockets.clear()  # this client leaves it for ever; a true one closes it when it is cut off


@VIRTUAL
async def test_open_gives_up_without_a_leader(server: Serve, looptime: Any) -> None:
    """A partition that nobody leads ends an open at its end in seconds, with the reason."""
    kafka = server()
    kafka.leader = None
    with pytest.raises(BrokerUnavailableError, match="LeaderNotAvailable"):
        await open_reader(None)
    assert looptime < REQUEST_TIMEOUT + 1
    assert set() == kafka.sockets


async def test_open_is_refused(server: Serve) -> None:
    """A position that we may not know ends in an error that says what to do, and is closed."""
    kafka = server()
    kafka.refusals.append(DENIED)
    with pytest.raises(BrokerUnavailableError, match=r"TopicAuthorizationFailed.*ACL"):
        await open_reader(None)
    assert set() == kafka.sockets


async def test_open_waits_for_a_leader(server: Serve) -> None:
    """A leader that is being chosen is waited for, and the position is that of the end."""
    kafka = server(batch(0, b"a", b"b"))
    kafka.refusals.extend([NOT_LEADER, LEADERLESS])
    reader = await open_reader(None)
    assert 2 == reader.position
    kafka.append(batch(2, b"c"))
    assert [(2, b"c")] == simple(await fetched(reader, 1))
    await reader.close()


async def test_what_the_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka may be silent for a few seconds beyond the time that it is told to wait, no longer."""
    told: dict[str, Any] = {}

    def make(**options: Any) -> Client:
        told.update(options)
        return Client(Kafka())

    monkeypatch.setattr(kafka_client, "AIOKafkaClient", make)
    monkeypatch.setattr(kafka_client, "options", lambda _kind, _settings, defaults: defaults)
    reader = await open_reader()
    await reader.close()
    assert FETCH_TIMEOUT * 1000 + 1000 <= told["request_timeout_ms"] <= 5000
