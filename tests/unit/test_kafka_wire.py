"""A connection of our own: whatever arrives on it, every exchange ends once, in order."""

from __future__ import annotations

import asyncio
import gc
import io
import ssl
import struct
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.protocol.fetch import FetchRequest_v10, FetchResponse_v10
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7

from kafka_broker._transport.kafka_requests import (
    FETCH,
    PRODUCE,
    Kind,
    Produced,
    fetch_request,
    fetched,
    produce_request,
    produced,
    throttled,
)
from kafka_broker._transport.kafka_wire import Wire

API_VERSIONS = 18
PLACE = TopicPartition("replies", 3)
KNOWN = {PRODUCE.key: (3, 12), FETCH.key: (4, 17), API_VERSIONS: (0, 4)}
"""What a node of Kafka 4 knows."""


class Node:
    """A node that says what the test tells it to."""

    def __init__(self) -> None:
        self.known = KNOWN
        self.links = 0
        self.requests: asyncio.Queue[tuple[int, int, int, str, bytes]] = asyncio.Queue()
        self.writer: asyncio.StreamWriter | None = None
        self.gone = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.links += 1
        self.writer = writer
        try:
            while True:
                request = await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
                key, version, number, size = struct.unpack_from(">hhih", request)
                client, body = request[10 : 10 + size].decode(), request[10 + size :]
                if key == API_VERSIONS:
                    known = [struct.pack(">hhh", kind, *span) for kind, span in self.known.items()]
                    self.answer(number, struct.pack(">hi", 0, len(known)) + b"".join(known))
                else:
                    self.requests.put_nowait((key, version, number, client, body))
        except (asyncio.IncompleteReadError, OSError):
            pass  # it was closed
        finally:
            writer.transport.abort()
            self.links -= 1
            self.gone.set()

    def say(self, *frames: bytes) -> None:
        assert self.writer is not None
        self.writer.write(b"".join(frames))

    def answer(self, number: int, content: bytes = b"") -> None:
        self.say(frame(number, content))

    async def asked_once(self) -> int:
        (number,) = await self.asked(1)
        return number

    async def asked(self, count: int) -> list[int]:
        """Wait for so many requests; returns their correlation ids."""
        async with asyncio.timeout(5):
            return [(await self.requests.get())[2] for _ in range(count)]


def frame(number: int, content: bytes = b"") -> bytes:
    return struct.pack(">ii", 4 + len(content), number) + content


class Client:
    """The part of aiokafka's client that opens connections."""

    def __init__(self, port: int, **options: Any) -> None:
        self._port = port
        self._options = options
        self.connection: Any = None
        self.closed: list[object] = []

    async def _get_conn(self, node: int, *, group: object) -> Any:
        assert (1, "kafka_broker") == (node, group)
        if self.connection is None or not self.connection.connected():
            self.connection = await create_conn(
                "127.0.0.1",
                self._port,
                client_id="asking",
                on_close=lambda _, reason: self.closed.append(reason),
                **self._options,
            )
        return self.connection


class Asking:
    """What came of some exchanges, in the order in which they ended."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.ended: list[tuple[int, bytes | Exception]] = []
        self._ended = asyncio.Event()

    def ask(self, number: int, kind: Kind = FETCH) -> None:
        def answered(answer: bytes | Exception) -> None:
            self.ended.append((number, answer))
            self._ended.set()

        self.wire.ask(kind, [b"body"], answered)

    async def until(self, count: int) -> list[Any]:
        """Wait until so many exchanges have ended; returns how, or the classes of errors."""
        async with asyncio.timeout(5):
            while len(self.ended) < count:
                self._ended.clear()
                await self._ended.wait()
        assert [number for number, _ in self.ended] == list(range(count))
        return [end if isinstance(end, bytes) else type(end) for _, end in self.ended]


@asynccontextmanager
async def opened(
    node: Node, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[tuple[Client, Asking]]:
    """Connect; at the end the connection is closed, and neither socket nor task is left."""
    before = asyncio.all_tasks()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    async with await asyncio.start_server(node.serve, "127.0.0.1", 0, ssl=tls) as server:
        client = Client(server.sockets[0].getsockname()[1], **options)
        try:
            yield client, Asking(await Wire.to(client, 1))
        finally:
            async with asyncio.timeout(5):
                await client.connection.close()
                await node.gone.wait()
                left = asyncio.all_tasks() - before
                if left:
                    await asyncio.wait(left)
    gc.collect(1)
    assert (0, []) == (node.links, complaints)


@pytest.fixture
def node() -> Node:
    return Node()


# Answers


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 11, 12, 13, 20, 1000])
async def test_answers_in_pieces_and_together(node: Node, size: int) -> None:
    """However answers are cut into packets each is handed out once, whole and in order."""
    contents = [b"", b"one", b"two" * 10, b"", b"four" * 30]
    async with opened(node) as (_, asking):
        for number in range(len(contents)):
            asking.ask(number)
        ids = await node.asked(len(contents))
        said = b"".join(map(frame, ids, contents))
        for begin in range(0, len(said), size):
            asking.wire.data_received(said[begin : begin + size])
        assert contents == await asking.until(len(contents))
        assert not asking.wire.busy
        asking.ask(len(contents))
        node.answer(await node.asked_once(), b"after")
        assert b"after" == (await asking.until(len(contents) + 1))[-1]


async def test_a_large_answer_arrives(node: Node) -> None:
    """An answer of many packets comes whole, and so does the one behind it."""
    large = bytes(range(256)) * 20_000
    async with opened(node) as (_, asking):
        asking.ask(0)
        asking.ask(1)
        first, second = await node.asked(2)
        node.say(frame(first, large), frame(second, b"small"))
        assert [large, b"small"] == await asking.until(2)


async def test_an_answer_may_ask(node: Node) -> None:
    """A request that is made while an answer is handed out is sent, and gets its own answer."""
    async with opened(node) as (_, asking):
        asking.wire.ask(FETCH, [], lambda _: asking.ask(0))
        node.answer(await node.asked_once())
        node.answer(await node.asked_once(), b"next")
        assert [b"next"] == await asking.until(1)


async def test_the_head_of_a_request(node: Node) -> None:
    """A request names its kind, version and client, and counts up."""
    async with opened(node) as (_, asking):
        asking.wire.ask(PRODUCE, [b"a", b"b"], lambda _: None)
        asking.wire.ask(FETCH, [], lambda _: None)
        first, second = [await node.requests.get() for _ in range(2)]
    assert (0, 7, "asking", b"ab") == (*first[:2], *first[3:])
    assert (1, 10, "asking", b"") == (*second[:2], *second[3:])
    assert second[2] == first[2] + 1


async def test_encrypted_answers(node: Node) -> None:
    """Over TLS it is the same, also for an answer that is larger than a packet."""
    authority = trustme.CA()
    tls, trusting = (
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
        ssl.create_default_context(),
    )
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.configure_trust(trusting)
    options = {"security_protocol": "SSL", "ssl_context": trusting}
    async with opened(node, tls, **options) as (_, asking):
        for number in range(3):
            asking.ask(number)
        ids = await node.asked(3)
        contents = [b"small", b"large" * 20_000, b""]
        node.say(*map(frame, ids, contents))
        assert contents == await asking.until(3)
        asking.ask(3)
        asking.wire.close()
        assert kafka.KafkaConnectionError == (await asking.until(4))[-1]


# Ends


async def is_closed(client: Client, asking: Asking) -> bool:
    """Return whether nothing can be asked and another connection takes the place of this one."""
    assert not asking.wire.open
    assert not client.connection.connected()
    with pytest.raises(kafka.NodeNotReadyError):
        asking.ask(-1)
    another = await Wire.to(client, 1)
    return another is not asking.wire and another.open


WRONG = {
    "unknown": lambda number: frame(number + 7),
    "the second first": lambda number: frame(number + 1),
    "long": lambda number: struct.pack(">ii", (1 << 28) + 1, number),
    "short": lambda number: struct.pack(">ii", 3, number),
    "negative": lambda number: struct.pack(">ii", -1, number),
    "not Kafka": lambda _: b"HTTP/1.1 400 Bad Request",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
async def test_what_is_no_answer_ends_all(node: Node, wrong: Callable[[int], bytes]) -> None:
    """An answer out of order, or of an impossible size, ends every exchange in an error."""
    async with opened(node) as (client, asking):
        for number in range(3):
            asking.ask(number)
        first, second, _ = await node.asked(3)
        node.say(frame(first, b"right"), wrong(second))
        right, *errors = await asking.until(3)
        assert b"right" == right
        assert errors in ([kafka.CorrelationIdError] * 2, [kafka.KafkaProtocolError] * 2)
        assert await is_closed(client, asking)


async def test_an_answer_to_nothing(node: Node) -> None:
    """What nobody asked for closes the connection."""
    async with opened(node) as (client, asking):
        node.answer(5)
        await node.gone.wait()
        assert await is_closed(client, asking)


@pytest.mark.parametrize("how", ["whole", "half"])
async def test_a_lost_connection_ends_all(node: Node, how: str) -> None:
    """Every exchange ends at once in an error, in the midst of an answer, too."""
    async with opened(node) as (client, asking):
        asking.ask(0)
        asking.ask(1)
        first, _ = await node.asked(2)
        node.say(frame(first, b"cut off")[:9])
        assert node.writer is not None
        if how == "half":
            node.writer.write_eof()
        else:
            node.writer.transport.abort()
        assert [kafka.KafkaConnectionError] * 2 == await asking.until(2)
        assert await is_closed(client, asking)
        assert 1 == len(client.closed)


async def test_aiokafka_closes_it(node: Node) -> None:
    """When aiokafka closes its connection every exchange ends, and the close with it."""
    async with opened(node) as (client, asking):
        asking.ask(0)
        async with asyncio.timeout(5):
            await client.connection.close()
        assert [kafka.KafkaConnectionError] == await asking.until(1)
        assert await is_closed(client, asking)


async def test_it_is_closed_at_once(node: Node) -> None:
    """A close ends every exchange before it returns, and may be repeated."""
    async with opened(node) as (client, asking):
        asking.ask(0)
        asking.wire.close()
        asking.wire.close()
        assert [0] == [number for number, _ in asking.ended]
        assert await is_closed(client, asking)


IN_TIME = bytes(4) + b"in time"
"""An answer to a fetch that begins with no throttle."""


async def test_a_silent_node_is_given_up(node: Node) -> None:
    """When an answer is due every exchange ends, also those whose own time is not over."""
    async with opened(node, request_timeout_ms=150) as (client, asking):
        asking.ask(0)
        asking.ask(1)
        node.answer((await node.asked(2))[0], IN_TIME)
        await asking.until(1)
        asking.ask(2)
        in_time, *errors = await asking.until(3)
        assert (IN_TIME, [kafka.RequestTimedOutError] * 2) == (in_time, errors)
        assert await is_closed(client, asking)


async def test_a_busy_node_is_not_given_up(node: Node) -> None:
    """A node that answers each request in time is asked for longer than one may take."""
    loop = asyncio.get_running_loop()
    async with opened(node, request_timeout_ms=150) as (_, asking):
        begin, number = loop.time(), 0
        while loop.time() < begin + 0.5:
            asking.ask(number)
            node.answer(await node.asked_once())
            number += 1
            await asking.until(number)
        assert asking.wire.open


async def test_a_slow_answer_is_waited_for(node: Node) -> None:
    """An answer may take longer than a node may be silent, as long as more of it arrives."""
    loop = asyncio.get_running_loop()
    async with opened(node, request_timeout_ms=150) as (client, asking):
        asking.ask(0)
        said, begin = frame(await node.asked_once(), bytes(20)), loop.time()
        for at in range(len(said)):
            asking.wire.data_received(said[at : at + 1])
            await until(loop.time() + 0.02)
        assert loop.time() > begin + 0.3
        assert [bytes(20)] == await asking.until(1)
        asking.ask(1)
        asking.wire.data_received(frame(await node.asked_once(), b"half")[:-2])
        assert kafka.RequestTimedOutError == (await asking.until(2))[-1]
        assert await is_closed(client, asking)


@pytest.mark.parametrize("kind", [FETCH, PRODUCE])
async def test_a_node_that_slows_us_down_is_not_given_up(node: Node, kind: Kind) -> None:
    """For as long as its answer says a node may be silent on top, and no longer."""
    loop, throttle = asyncio.get_running_loop(), (300).to_bytes(4, "big")
    content = throttle + bytes(4) if kind == FETCH else bytes(4) + throttle
    async with opened(node, request_timeout_ms=100) as (client, asking):
        asking.ask(0, kind)
        node.answer(await node.asked_once(), content)
        await asking.until(1)
        begin = loop.time()
        asking.ask(1, kind)
        assert kafka.RequestTimedOutError == (await asking.until(2))[-1]
        assert 0.35 < loop.time() - begin < 1
        assert await is_closed(client, asking)


def test_how_long_kafka_slows_us_down() -> None:
    """What cannot be meant, below zero or beyond a minute, is not believed."""
    for told, believed in ((0, 0), (1500, 1.5), (-1, 0), (1 << 30, 60)):
        assert believed == throttled(PRODUCE, ProduceResponse_v7([], told).encode())
        assert believed == throttled(FETCH, FetchResponse_v10(told, 0, 0, []).encode())
    assert 0 == throttled(FETCH, b"")


async def until(moment: float) -> None:
    """Return at a time of the loop."""
    reached = asyncio.Event()
    asyncio.get_running_loop().call_at(moment, reached.set)
    await reached.wait()


async def test_a_connection_that_is_used_is_not_idle(node: Node) -> None:
    """aiokafka, which closes what nobody uses, sees our requests."""
    async with opened(node, max_idle_ms=10_000) as (client, asking):
        client.connection._last_action -= 11
        asking.ask(0)
        AIOKafkaConnection._idle_check(weakref.ref(client.connection))
        assert asking.wire.open


# Opening


async def test_there_is_one_connection_to_a_node(node: Node) -> None:
    """Who wants a node that is connected gets the same connection."""
    async with opened(node) as (client, asking):
        assert asking.wire is await Wire.to(client, 1)


@pytest.mark.parametrize(
    "known", [{PRODUCE.key: (0, 5)}, {FETCH.key: (0, 8)}, {FETCH.key: (11, 20)}]
)
async def test_a_kafka_that_is_too_old_or_too_new(
    node: Node, known: dict[int, tuple[int, int]]
) -> None:
    """A node that does not know our requests is refused with the reason."""
    async with opened(node) as (client, _):
        await client.connection.close()
        node.known = {**KNOWN, **known}
        with pytest.raises(kafka.IncompatibleBrokerVersion, match=r"Kafka 2\.1"):
            await Wire.to(client, 1)


async def test_a_node_that_cannot_be_reached() -> None:
    """Without a connection there is no wire."""

    class Nowhere:
        async def _get_conn(self, *_: object, **__: object) -> None:
            return None

    with pytest.raises(kafka.NodeNotReadyError):
        await Wire.to(Nowhere(), 1)


async def test_opening_is_cut_off_at_each_of_its_waits(node: Node) -> None:
    """Whoever is cancelled while a connection is opened ends so, and the next one gets it."""
    async with opened(node) as (client, _):
        for step in range(40):
            await client.connection.close()
            opening = asyncio.create_task(Wire.to(client, 1))
            for _ in range(step):
                await asyncio.sleep(0)
            ended_by_itself = opening.done()
            opening.cancel()
            await asyncio.wait({opening})
            assert ended_by_itself is not opening.cancelled()
            wire = await Wire.to(client, 1)
            assert wire.open
            wire.close()


# Requests and answers, as aiokafka reads and writes them


def test_what_a_produce_request_says() -> None:
    """All replicas shall acknowledge; the partitions of one topic are together."""
    other = TopicPartition("ähnlich", 0)
    batches = [(PLACE, b"a"), (other, b"bb"), (TopicPartition("replies", 4), b"ccc")]
    read = ProduceRequest_v7.decode(io.BytesIO(b"".join(produce_request(12.0, batches))))
    assert (None, -1, 12_000) == (read.transactional_id, read.required_acks, read.timeout)
    assert [("replies", [(3, b"a"), (4, b"ccc")]), ("ähnlich", [(0, b"bb")])] == read.topics


def test_what_the_answer_to_it_says() -> None:
    """Each partition has its code, its offset and its time."""
    topics = [("replies", [(3, 0, 7, -1, 0), (4, 6, -1, -1, -1)]), ("ähnlich", [(0, 0, 1, 99, 0)])]
    assert {
        PLACE: Produced(0, 7, -1),
        TopicPartition("replies", 4): Produced(6, -1, -1),
        TopicPartition("ähnlich", 0): Produced(0, 1, 99),
    } == produced(ProduceResponse_v7(topics, 0).encode())
    assert {} == produced(ProduceResponse_v7([], 0).encode())


def test_what_a_fetch_request_says() -> None:
    """It asks for whatever is in one partition from an offset on, without a session."""
    make = fetch_request(PLACE, 0.5, 1 << 20)
    for offset in (0, 1 << 40):
        read = FetchRequest_v10.decode(io.BytesIO(b"".join(make(offset))))
        assert [("replies", [(3, -1, offset, -1, 1 << 20)])] == read.topics
        assert (-1, 500, 1, 1 << 20, 0) == (
            *(read.replica_id, read.max_wait_time, read.min_bytes),
            *(read.max_bytes, read.isolation_level),
        )
        assert (0, -1, []) == (read.session_id, read.session_epoch, read.forgotten_topics_data)


def fetch_answer(*partition: object, topic: str = "replies") -> bytes:
    made: bytes = FetchResponse_v10(0, 0, 0, [(topic, [partition])]).encode()
    return made


@pytest.mark.parametrize("aborted", [[], [(1, 2), (3, 4)], None])
@pytest.mark.parametrize("content", [b"batches", b"", None])
def test_what_the_answer_to_that_says(aborted: object, content: bytes | None) -> None:
    """It has a code and batches, which may be missing, behind what is told of transactions."""
    answer = fetch_answer(3, 6, 9, 9, 0, aborted, content)
    assert (6, content or b"") == fetched(answer, PLACE)


def test_a_fetch_that_is_over_its_quota() -> None:
    """An answer without any partition means to ask again later."""
    with pytest.raises(kafka.QuotaViolationError):
        fetched(FetchResponse_v10(0, 0, 0, []).encode(), PLACE)


def test_a_fetch_that_failed_as_a_whole() -> None:
    """An answer without any partition that has an error of its own is that error."""
    with pytest.raises(kafka.UnsupportedVersionError):
        fetched(FetchResponse_v10(0, 35, 0, []).encode(), PLACE)


def test_an_answer_about_another_partition() -> None:
    """What was not asked for is not taken for what was."""
    for answer in (
        fetch_answer(4, 0, 9, 9, 0, [], b""),
        fetch_answer(3, 0, 9, 9, 0, [], b"", topic="x"),
    ):
        with pytest.raises(kafka.KafkaProtocolError, match="replies"):
            fetched(answer, PLACE)


def test_negative_sizes_and_counts() -> None:
    """A size or a number below zero, other than what stands for nothing, is no answer."""
    right = ProduceResponse_v7([("replies", [(3, 0, 7, -1, 0)])], 0).encode()
    for at, kind in ((0, ">i"), (4, ">h"), (13, ">i")):
        with pytest.raises(kafka.KafkaProtocolError):
            produced(negative(right, at, kind))
    right = fetch_answer(3, 0, 9, 9, 0, [(1, 2)], b"batches")
    for at, kind in ((10, ">i"), (14, ">h"), (23, ">i"), (57, ">i"), (77, ">i")):
        with pytest.raises(kafka.KafkaProtocolError):
            fetched(negative(right, at, kind), PLACE)


def negative(answer: bytes, at: int, kind: str) -> bytes:
    """Return a copy where a number that is positive is below zero."""
    copy = bytearray(answer)
    assert struct.unpack_from(kind, copy, at)[0] > 0
    struct.pack_into(kind, copy, at, -2)
    return bytes(copy)


def test_answers_that_cannot_be_read() -> None:
    """An answer that ends too early, wherever, or is no text, is an error of the protocol."""
    right = ProduceResponse_v7([("replies", [(3, 0, 7, -1, 0)])], 0).encode()[:-4]
    for size in range(len(right)):
        with pytest.raises(kafka.KafkaProtocolError):
            produced(right[:size])
    with pytest.raises(kafka.KafkaProtocolError):
        produced(right.replace(b"replies", b"\xff" * 7))
    right = fetch_answer(3, 0, 9, 9, 0, [(1, 2)], b"batches")
    for size in range(len(right)):
        with pytest.raises(kafka.KafkaProtocolError):
            fetched(right[:size], PLACE)
