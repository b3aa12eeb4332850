"""What a reader of our own meets on a real Kafka: its log, its outages, its silence."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import struct
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as Place
from confluent_kafka.admin import AdminClient

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker._run import connect
from kafka_broker._settings import load_settings
from kafka_broker._transport import Outgoing, TopicSpec
from kafka_broker._transport.kafka_reader import KafkaReader
from kafka_broker.errors import BrokerUnavailableError
from kafka_broker.testing import NativeKafka, NoKafkaError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from kafka_broker._transport import Reader, Record

pytestmark = pytest.mark.integration

PATIENCE = 30.0
CRC, ATTRIBUTES = 17, 21
"""Where a batch has its checksum, and where that begins which it is over."""
ALTER_CLIENT_QUOTAS = 49


class Log:
    """The only partition of a topic of its own, and who reads it."""

    def __init__(self, servers: str, topic: str, **settings: Any) -> None:
        self.servers, self.topic = servers, topic
        self.settings = load_settings(topic, {"bootstrap_servers": servers, **settings})
        self.transport = connect(self.settings)

    def producer(self, **options: Any) -> Producer:
        """Return a client that is not ours."""
        return Producer({"bootstrap.servers": self.servers, **options})

    async def write(self, *values: bytes, **options: Any) -> None:
        """Append these as one batch, with keys and headers."""
        options = {"linger.ms": 200, "message.max.bytes": 8_000_000, **options}
        producer = self.producer(**options)
        for value in values:
            producer.produce(self.topic, value, b"key", partition=0, headers=[("name", b"\xff")])
        assert 0 == await asyncio.to_thread(producer.flush, PATIENCE)

    async def append(self, *values: bytes) -> None:
        """Append these with our own producer."""
        await self.transport.send(self.topic, 0, [Outgoing(None, value, []) for value in values])

    @asynccontextmanager
    async def reading(self, offset: int | None = 0) -> AsyncIterator[Reader]:
        """Hold a reader open."""
        reader = await self.transport.read(self.topic, 0, offset)
        try:
            yield reader
        finally:
            await reader.close()


@pytest.fixture
async def log(kafka: str, module: str) -> AsyncIterator[Log]:
    """An empty log on the Kafka of all tests, whose records may be large."""
    made = Log(kafka, module)
    await made.transport.start()
    await made.transport.create_topics([TopicSpec(module, 1, {"max.message.bytes": "4000000"})])
    yield made
    await made.transport.stop()


async def fetched(reader: Reader, count: int) -> list[Record]:
    """Fetch until *count* records are there."""
    records: list[Record] = []
    async with asyncio.timeout(PATIENCE):
        while len(records) < count:
            records += await reader.fetch()
    return records


def simple(records: list[Record]) -> list[tuple[int, bytes | None]]:
    return [(record.offset, record.value) for record in records]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the reader has logged."""
    lines = [each for each in caplog.records if each.name == "kafka_broker.transport"]
    return [each.getMessage() for each in lines if each.levelno >= logging.WARNING]


# What is in the log


async def test_transactions_of_others_are_read(log: Log) -> None:
    """Records of transactions come, what ends them does not, and reading goes on behind it."""
    producer = log.producer(**{"transactional.id": log.topic})
    await asyncio.to_thread(producer.init_transactions, PATIENCE)
    for value, end in ((b"a", producer.commit_transaction), (b"b", producer.abort_transaction)):
        producer.begin_transaction()
        producer.produce(log.topic, value, partition=0)
        await asyncio.to_thread(producer.flush, PATIENCE)
        await asyncio.to_thread(end, PATIENCE)
    async with log.reading() as reader, log.reading(None) as at_end:
        assert [(0, b"a"), (2, b"b")] == simple(await fetched(reader, 2))
        assert (4, 4) == (reader.position, at_end.position)
        await log.append(b"c")
        assert [(4, b"c")] == simple(await fetched(reader, 1))
        assert [(4, b"c")] == simple(await fetched(at_end, 1))


@pytest.mark.parametrize("codec", ["none", "gzip"])
async def test_batches_of_others_are_read_from_their_middle(log: Log, codec: str) -> None:
    """A batch that another client wrote, and compressed, is read from any offset in it."""
    values = [b"%d" % number * 500 for number in range(5)]
    await log.write(*values, **{"compression.type": codec})
    async with log.reading(3) as reader:
        records = await fetched(reader, 2)
    assert list(enumerate(values))[3:] == simple(records)
    assert [(b"key", [("name", b"\xff")])] * 2 == [(each.key, each.headers) for each in records]
    assert all(abs(time.time() * 1000 - each.timestamp) < 60_000 for each in records)


async def test_what_retention_removed_is_passed(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """Records that are removed before they were fetched are passed, and the log says so."""
    await log.append(b"a")
    async with log.reading() as reader:
        assert [(0, b"a")] == simple(await fetched(reader, 1))
        await log.append(*[b"b"] * 4)
        await log.append(b"c")
        admin = AdminClient({"bootstrap.servers": log.servers})
        (future,) = admin.delete_records([Place(log.topic, 0, 5)]).values()
        await asyncio.to_thread(future.result, PATIENCE)
        async with log.reading(1) as late:
            assert [(5, b"c")] == simple(await fetched(late, 1))
    assert any(f"{log.topic}:0: offset 1 " in line and "at 5" in line for line in told(caplog))


async def test_large_records_are_read(log: Log) -> None:
    """A record that is larger than what one answer may have comes, and so does what follows."""
    large = os.urandom(3_000_000)
    await log.write(large)
    await log.append(b"small")
    async with log.reading() as reader:
        assert [(0, large), (1, b"small")] == simple(await fetched(reader, 2))


async def append_unparsable(log: Log, *values: bytes, broken: int) -> None:
    """Append a batch with one record whose header has a name that is not UTF-8."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 20,
    )
    for offset, value in enumerate(values):
        headers: list[tuple[str, bytes | None]] = [("to be broken", b"")] * (offset == broken)
        builder.append(offset, 1000, None, value, headers)
    batch = bytearray(builder.build().replace(b"to be broken", b"\xff" * 12))
    struct.pack_into(">I", batch, CRC, calc_crc32c(bytes(batch[ATTRIBUTES:])))
    client = AIOKafkaClient(bootstrap_servers=log.servers)
    try:
        await client.bootstrap()
        await client.add_topic(log.topic)
        leader = client.cluster.leader_for_partition(TopicPartition(log.topic, 0))
        request = ProduceRequest(None, 1, 5000, [(log.topic, [(0, bytes(batch))])])
        answer = await client.send(leader, request)
    finally:
        await client.close()
    assert 0 == answer.topics[0][1][0][1]


async def test_what_cannot_be_parsed_is_handed_on_empty(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes empty with the rest of its batch; what is before and behind comes as it is."""
    await log.append(b"a")
    await append_unparsable(log, b"b", b"c", b"d", broken=1)
    await log.append(b"e")
    async with log.reading() as reader:
        records = await fetched(reader, 5)
        assert 5 == reader.position
    assert [(0, b"a"), (1, b"b"), (2, b""), (3, b""), (4, b"e")] == simple(records)
    (line,) = told(caplog)
    assert line.startswith(f"{log.topic}:0:2 ")


async def test_a_fetch_that_is_cancelled_at_any_time_loses_nothing(log: Log) -> None:
    """Fetches that are cut off all the time return every record, once and in order."""
    count = 150
    records: list[Record] = []

    async def append() -> None:
        for number in range(count):
            await log.append(b"%d" % number)

    async with log.reading() as reader, asyncio.timeout(PATIENCE):
        appending = asyncio.create_task(append())
        cut = 0
        while len(records) < count:
            fetching = asyncio.create_task(reader.fetch())
            await asyncio.wait({fetching}, timeout=cut % 7 / 1000)
            fetching.cancel()
            with suppress(asyncio.CancelledError):
                records += await fetching
            cut += 1
        await appending
        records += await reader.fetch()
    assert [(number, b"%d" % number) for number in range(count)] == simple(records)
    assert cut > 20


async def test_a_reader_that_a_loop_cut_off_is_replaced(log: Log) -> None:
    """When every task of the loop was cancelled the next fetch raises, and another goes on."""
    await log.append(b"a")
    async with log.reading() as reader:
        await fetched(reader, 1)
        before = asyncio.all_tasks() - {asyncio.current_task()}
        for task in before:
            task.cancel()
        with pytest.raises(BrokerUnavailableError):
            await reader.fetch()
    await log.append(b"b")
    async with log.reading(reader.position) as another:
        assert [(1, b"b")] == simple(await fetched(another, 1))


# A Kafka of our own


class Node:
    """A Kafka with two addresses: its own, and one where a test stands between."""

    def __init__(self) -> None:
        self.kafka = NativeKafka()
        self.direct = self.kafka.bootstrap_servers
        self.ports = [_free_port() for _ in range(3)]
        between, door, controller = (f"127.0.0.1:{port}" for port in self.ports)
        self.between = between
        self.kafka.properties |= {
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{self.direct},BETWEEN://{door},CONTROLLER://{controller}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,"
            "BETWEEN:PLAINTEXT",
            "advertised.listeners": f"PLAINTEXT://{self.direct},BETWEEN://{between}",
            "quota.window.num": "2",  # a quota is over what was read in the last second
        }

    def signal(self, number: signal.Signals) -> None:
        assert self.kafka.pid is not None
        os.kill(self.kafka.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """Yield it, started; skip without Java or Maven, but not in CI."""
    try:
        made = Node()
    except NoKafkaError as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))  # a laptop may have no Java; in CI it raised above
    with made.kafka:
        made.kafka.start()
        yield made


class Between:
    """Passes on what Kafka and its clients say, until it is told not to."""

    def __init__(self, door: int) -> None:
        self._door = door
        self._links: set[asyncio.StreamWriter] = set()
        self._answers: float = float("inf")
        self._gone = asyncio.Condition()
        self.silent = asyncio.Event()

    def mute_after(self, answers: float) -> None:
        """Pass on so many answers more, and no other."""
        self._answers = answers
        self.silent.clear()

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._links:
            writer.transport.abort()

    async def until_nobody(self) -> None:
        """Wait until every client has closed its connections."""
        async with asyncio.timeout(5), self._gone:
            await self._gone.wait_for(lambda: not self._links)

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._links.add(to_client)
        kafka, to_kafka = await asyncio.open_connection("127.0.0.1", self._door)
        answering = asyncio.create_task(self._answer(kafka, to_client))
        try:
            while said := await client.read(1 << 16):
                to_kafka.write(said)
        except OSError:
            pass  # it was cut
        finally:
            answering.cancel()
            await asyncio.wait({answering})
            for writer in (to_kafka, to_client):
                writer.transport.abort()
            async with self._gone:
                self._links.discard(to_client)
                self._gone.notify_all()

    async def _answer(self, kafka: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                size = await kafka.readexactly(4)
                answer = await kafka.readexactly(int.from_bytes(size, "big"))
                if self._answers <= 0:
                    self.silent.set()
                    continue
                self._answers -= 1
                to_client.write(size + answer)


@pytest.fixture
async def between(node: Node) -> AsyncIterator[Between]:
    """What stands between; after the test no connection is left."""
    port, door, _ = node.ports
    made = Between(door)
    async with await asyncio.start_server(made.serve, "127.0.0.1", port):
        yield made
        await made.until_nobody()


@asynccontextmanager
async def log_of(node: Node, topic: str, servers: str, **settings: Any) -> AsyncIterator[Log]:
    """Make an empty log that is written directly and read through *servers*."""
    log = Log(node.direct, topic, **settings)
    await log.transport.start()
    try:
        await log.transport.create_topics([TopicSpec(topic, 1)])
        log.settings = load_settings(topic, {"bootstrap_servers": servers, **settings})
        yield log
    finally:
        await log.transport.stop()


async def opened(log: Log, offset: int | None = None) -> KafkaReader:
    return await KafkaReader.open(log.settings, TopicPartition(log.topic, 0), offset)


@pytest.mark.parametrize("answers", [0, 3, 4])
async def test_an_open_that_is_cancelled_leaves_no_socket(
    node: Node, between: Between, module: str, answers: int
) -> None:
    """Whatever answer an open waits for when it is cancelled, its connections are closed.

    But for the second, Metadata: aiokafka leaves that socket to the garbage collector.
    """
    async with log_of(node, module, node.between) as log:
        between.mute_after(answers)
        opening = asyncio.create_task(opened(log))
        async with asyncio.timeout(PATIENCE):
            await between.silent.wait()
            opening.cancel()
            await asyncio.wait({opening})
        assert opening.cancelled()
        await between.until_nobody()


async def test_a_close_leaves_no_socket(node: Node, between: Between, module: str) -> None:
    """Whether its reader waits, connects or has been closed, a fetch ends and nothing is left."""
    async with log_of(node, module, node.between) as log:
        for mute_after in (1, 0):  # it waits for records; it connects again
            between.mute_after(float("inf"))
            reader = await opened(log)
            if not mute_after:
                between.cut()
            between.mute_after(mute_after)
            fetching = asyncio.create_task(reader.fetch())
            async with asyncio.timeout(PATIENCE):
                await between.silent.wait()
                await asyncio.gather(reader.close(), reader.close())
                (ended,) = await asyncio.gather(fetching, return_exceptions=True)
            assert ended == [] or isinstance(ended, BrokerUnavailableError)
            with pytest.raises(BrokerUnavailableError):
                await reader.fetch()
            await between.until_nobody()


async def test_connections_that_break_lose_nothing(
    node: Node, between: Between, module: str
) -> None:
    """Every record comes once, though the connection breaks around each of them."""
    async with log_of(node, module, node.between) as log:
        reader = await opened(log)
        records: list[Record] = []
        for number in range(8):
            await log.append(b"%d" % number)
            if number % 2:
                between.cut()
            records += await fetched(reader, 1)
            between.cut()
        await reader.close()
    assert [(number, b"%d" % number) for number in range(8)] == simple(records)


async def limit(node: Node, client: str, bytes_per_second: float) -> None:
    """Set how much one client may read."""

    def text(value: str) -> bytes:
        return struct.pack(">h", len(value)) + value.encode()

    one = struct.pack(">i", 1)
    entity = one + text("client-id") + text(client)
    operation = one + text("consumer_byte_rate") + struct.pack(">dx", bytes_per_second)
    header = struct.pack(">hhi", ALTER_CLIENT_QUOTAS, 0, 1) + text("test")
    request = header + one + entity + operation + b"\0"
    reader, writer = await asyncio.open_connection(*node.direct.split(":"))
    writer.write(struct.pack(">i", len(request)) + request)
    answer = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
    writer.close()
    await writer.wait_closed()
    assert (1, 0, 1, 0) == struct.unpack_from(">iiih", answer)


async def test_a_quota_slows_down_and_loses_nothing(node: Node, module: str) -> None:
    """A client that reads more than its quota gets the rest later, each record once."""
    async with log_of(node, module, node.direct, instance=module) as log:
        await limit(node, module, 30_000)
        values = [b"%d" % number * 28_000 for number in range(4)]
        for value in values:
            await log.append(value)
        reader = await opened(log, 0)
        records = await fetched(reader, 4)
        await reader.close()
    assert list(enumerate(values)) == simple(records)


async def test_a_frozen_kafka_is_survived(
    node: Node, module: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While Kafka is silent fetch, open and close end in time; then another reader goes on."""
    async with log_of(node, module, node.direct) as log:
        reader, other = await opened(log), await opened(log)
        waiting = asyncio.create_task(other.fetch())
        await asyncio.gather(reader.fetch(), waiting)
        node.signal(signal.SIGSTOP)
        try:
            fetching = asyncio.create_task(reader.fetch())
            async with asyncio.timeout(6):
                refused, _ = await asyncio.gather(
                    opened(log), other.close(), return_exceptions=True
                )
            assert isinstance(refused, BrokerUnavailableError)
            async with asyncio.timeout(20):
                with pytest.raises(BrokerUnavailableError):
                    await fetching
                await reader.close()
        finally:
            node.signal(signal.SIGCONT)
        await log.append(b"a")
        another = await opened(log, reader.position)
        assert [(0, b"a")] == simple(await fetched(another, 1))
        await another.close()
    assert 1 == sum("cannot be read" in line for line in told(caplog))


async def test_a_request_waits_over_a_restart(node: Node, module: str) -> None:
    """A reply that is sent after Kafka was killed and started reaches the one who waits."""
    router = EventRouter(module)
    begun, may_end = asyncio.Event(), asyncio.Event()

    @router.bind_event("slow")
    async def slow(event: EventObject) -> object:
        begun.set()
        await may_end.wait()
        return event.data

    async with BrokerManager(module, router=router, bootstrap_servers=node.direct) as broker:
        asking = asyncio.create_task(broker.request(module, "slow", 1, timeout=60))
        await begun.wait()
        await asyncio.to_thread(node.kafka.kill)
        await asyncio.to_thread(node.kafka.start)
        may_end.set()
        assert 1 == (await asking).data
        assert 2 == (await broker.request(module, "slow", 2, timeout=60)).data
