"""A producer of our own: no task while all goes well, and one true outcome whatever happens."""

from __future__ import annotations

import asyncio
import gc
import io
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from aiokafka.record.memory_records import MemoryRecords

from kafka_broker._settings import BrokerSettings
from kafka_broker._transport import Appended, Outgoing, kafka_kept
from kafka_broker._transport.kafka_producer import KafkaProducer
from kafka_broker._transport.kafka_requests import PRODUCE, Kind
from kafka_broker._transport.kafka_wire import Wire
from kafka_broker.errors import BrokerUnavailableError, DeliveryError, DeliveryUnknownError

VIRTUAL = pytest.mark.looptime
"""Pauses of the producer take no time."""
SETTINGS = BrokerSettings(module="asking", bootstrap_servers="127.0.0.1:1", delivery_timeout=30)
NOT_LEADER = kafka.NotLeaderForPartitionError.errno
DENIED = kafka.TopicAuthorizationFailedError.errno
INVALID_RECORD = 87
NOT_ENOUGH = kafka.NotEnoughReplicasError.errno
OUT_OF_ORDER = kafka.OutOfOrderSequenceNumber.errno
DUPLICATE = kafka.DuplicateSequenceNumber.errno

Answered = Callable[[bytes | Exception], None]
Outcome = Exception | int | None
"""What a request meets: an error of the connection, a code of Kafka, or nothing, for ever."""


class Node:
    """A log of every partition that appends each batch once, as its sequence number says."""

    def __init__(self) -> None:
        self.logs: dict[TopicPartition, list[bytes]] = {}
        self.sequences: dict[tuple[TopicPartition, int], int] = {}
        self.requests: list[dict[TopicPartition, bytes]] = []
        self.timeouts: set[int] = set()
        self.outcomes: deque[tuple[bool, Outcome]] = deque()
        self.producers = 0
        self.renewed = 0
        self.leader = 1
        self.open = True
        self.opened: list[int] = []
        self.connects = 0
        self.reachable = True
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.pending: deque[Answered] = deque()

    def meets(self, *outcomes: Outcome, appended: bool = False) -> None:
        """Let the next requests end in these, after the batches were appended, or before."""
        self.outcomes.extend((appended, outcome) for outcome in outcomes)

    def handle(self, body: bytes, answered: Answered) -> None:
        """Answer a request some turns later."""
        request = ProduceRequest_v7.decode(io.BytesIO(body))
        self.timeouts.add(request.timeout)
        topics = request.topics
        batches = {
            TopicPartition(topic, partition): bytes(content)
            for topic, partitions in topics
            for partition, content in partitions
        }
        self.requests.append(batches)
        appended, outcome = self.outcomes.popleft() if self.outcomes else (True, 0)
        answers: dict[str, list[tuple[int, ...]]] = {}
        for place, content in batches.items():
            offset = self._append(place, content) if appended else -1
            code = outcome if isinstance(outcome, int) else 0
            answers.setdefault(place.topic, []).append((place.partition, code, offset, -1, 0))
        self.pending.append(answered)
        answer: bytes = ProduceResponse_v7(list(answers.items()), 0).encode()
        if outcome is not None:
            self._answer_in(3, answered, outcome if isinstance(outcome, Exception) else answer)

    def _append(self, place: TopicPartition, content: bytes) -> int:
        batch = MemoryRecords(content).next_batch()
        assert batch is not None
        log = self.logs.setdefault(place, [])
        values = [record.value for record in batch]
        known = self.sequences.get((place, batch.producer_id), 0)
        if batch.base_sequence == known:
            self.sequences[place, batch.producer_id] = known + len(values)
            log.extend(values)
        else:
            assert known == batch.base_sequence + len(values)
        return len(log) - len(values)

    def _answer_in(self, turns: int, answered: Answered, answer: bytes | Exception) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._answer_in, turns - 1, answered, answer)
        elif answered in self.pending:
            self.pending.remove(answered)
            answered(answer)

    def lose(self) -> None:
        """Cut the connection."""
        self.open = False
        while self.pending:
            self.pending.popleft()(kafka.KafkaConnectionError("lost"))


class Link:
    """Stands for a `Wire`."""

    timeout = 12.0

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def open(self) -> bool:
        return self._node.open

    @property
    def busy(self) -> bool:
        return bool(self._node.pending)

    def ask(self, kind: Kind, body: Iterable[bytes], answered: Answered) -> None:
        assert PRODUCE == kind
        if not self._node.open:
            raise kafka.NodeNotReadyError
        self._node.handle(b"".join(body), answered)

    def close(self) -> None:
        self._node.lose()


class Client:
    """Stands for an `AIOKafkaClient`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cluster = self
        self.link = Link(node)
        self._sync_task: asyncio.Task[object] | None = asyncio.create_task(asyncio.Event().wait())

    def leader_for_partition(self, _: TopicPartition) -> int:
        return self.node.leader

    def get_random_node(self) -> int:
        return 1

    def add_topic(self, _: str) -> None: ...

    def force_metadata_update(self) -> asyncio.Future[None]:
        self.node.renewed += 1
        renewed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        renewed.set_result(None)
        return renewed

    async def send(self, _node: int, _request: object) -> Any:
        await asyncio.sleep(0)
        self.node.producers += 1
        return type("Answer", (), {"error_code": 0, "producer_id": self.node.producers} | EPOCH)

    async def open(self, number: int) -> Link:
        await asyncio.sleep(0)
        await self.node.may_open.wait()
        self.node.opened.append(number)
        self.node.open = True
        return self.link

    async def close(self) -> None:
        task, self._sync_task = self._sync_task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self.node.lose()


EPOCH = {"producer_epoch": 0}


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """What the producer of this test connects to; after it no task and no complaint is left."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    made = Node()

    async def connect(*_: object) -> Client:
        await asyncio.sleep(0)
        made.connects += 1
        if not made.reachable:
            raise BrokerUnavailableError("nothing answers")
        return Client(made)

    monkeypatch.setattr(kafka_kept, "connect", connect)
    monkeypatch.setattr(Wire, "to", Client.open)
    yield made
    gc.collect(1)
    assert ([], set()) == (reported, others())


@pytest.fixture
async def producer(node: Node) -> AsyncIterator[KafkaProducer]:
    """One that has sent something to two partitions, so all that it needs is there."""
    made = KafkaProducer(SETTINGS)
    await made.start()
    for partition in range(2):
        await made.send("log", partition, outgoing(b"first"))
    node.requests.clear()
    yield made
    await made.stop()


def outgoing(*values: bytes) -> list[Outgoing]:
    return [Outgoing(None, value, []) for value in values]


def others() -> set[asyncio.Task[Any]]:
    current = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not current}


def log(node: Node, partition: int = 0) -> list[bytes]:
    return node.logs[TopicPartition("log", partition)]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# While all goes well


async def test_a_batch_needs_no_task(node: Node, producer: KafkaProducer) -> None:
    """With leader, connection and identity known a batch is sent by the call, and by no task."""
    before = others()
    sent = producer.send("log", 0, outgoing(b"a", b"b"))
    assert 1 == len(node.requests)
    assert before == others()
    assert 1 == (await sent).offset
    assert before == others()
    assert [b"first", b"a", b"b"] == log(node)


async def test_the_answer_ends_a_batch(node: Node, producer: KafkaProducer) -> None:
    """What waits for a batch is told where the answer is handled."""
    node.meets(None, appended=True)
    sent = producer.send("log", 0, outgoing(b"a"))
    await turns(5)
    assert not sent.done()
    node.pending.popleft()(ProduceResponse_v7([("log", [(0, 0, 1, 99, 0)])], 0).encode())
    assert sent.done()
    assert Appended(1, 99) == sent.result()


async def test_batches_of_one_turn_travel_together(node: Node, producer: KafkaProducer) -> None:
    """While a node is busy, what is sent to it in one turn is one request; all get their answer."""
    node.meets(None, appended=True)
    alone = producer.send("log", 2, outgoing(b"alone"))
    await turns(10)
    together = [producer.send("log", partition, outgoing(b"x")) for partition in range(2)]
    assert 1 == len(node.requests)
    await turns(1)
    assert [1, 2] == [len(request) for request in node.requests]
    assert [1, 1] == [(await sent).offset for sent in together]
    await producer.stop()
    assert isinstance(alone.exception(), DeliveryUnknownError)


async def test_a_batch_waits_for_the_one_before(node: Node, producer: KafkaProducer) -> None:
    """A batch whose caller has given it up still has its place before the next one."""
    node.meets(None, appended=True)
    given_up = producer.send("log", 0, outgoing(b"a"))
    await turns(5)
    given_up.cancel()
    following = producer.send("log", 0, outgoing(b"b"))
    await turns(10)
    assert 1 == len(node.requests)
    node.pending.popleft()(ProduceResponse_v7([("log", [(0, 0, 1, -1, 0)])], 0).encode())
    assert 2 == (await following).offset
    assert [b"first", b"a", b"b"] == log(node)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("waiting", [1, 3])
async def test_a_batch_that_waits_is_cut_off(
    node: Node, producer: KafkaProducer, step: int, waiting: int
) -> None:
    """What comes after it still waits for the batch that is open: no sequence is used twice."""
    node.meets(None, appended=True)
    producer.send("log", 0, outgoing(b"a")).cancel()
    behind = [producer.send("log", 0, outgoing(b"b")) for _ in range(waiting)]
    await turns(step)
    for task in others():
        if "_append" in repr(task):
            task.cancel()
    ended = await asyncio.gather(*behind, return_exceptions=True)
    assert [DeliveryError] * waiting == [type(end) for end in ended]
    last = producer.send("log", 0, outgoing(b"c"))
    await turns(10)
    assert 1 == len(node.requests)
    node.pending.popleft()(ProduceResponse_v7([("log", [(0, 0, 1, -1, 0)])], 0).encode())
    assert 2 == (await last).offset
    assert [b"first", b"a", b"c"] == log(node)


async def test_another_leader_is_sent_to(node: Node, producer: KafkaProducer) -> None:
    """Once the metadata has another leader the next batch goes there, over a new connection."""
    node.leader = 2
    await producer.send("log", 0, outgoing(b"a"))
    assert [1, 1, 2] == node.opened


async def test_kafka_has_less_time_than_the_connection(node: Node, producer: KafkaProducer) -> None:
    """Kafka tells which replica hangs long before the connection would be given up for it."""
    await producer.send("log", 0, outgoing(b"a"))
    assert {6000} == node.timeouts


# When something happens


@VIRTUAL
async def test_a_partition_without_a_leader(node: Node, producer: KafkaProducer) -> None:
    """Nothing is sent, the metadata is renewed once for each call, and the batch goes back."""
    node.leader = -1
    for calls in range(1, 4):
        with pytest.raises(DeliveryError, match="LeaderNotAvailable") as caught:
            await producer.send("log", 0, outgoing(b"a"))
        assert caught.value.retriable
        assert calls == node.renewed
    node.leader = 1
    assert 1 == (await producer.send("log", 0, outgoing(b"a"))).offset


async def test_a_kafka_that_is_too_old(
    node: Node, producer: KafkaProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that does not know our requests is not tried again: the reason is the caller's."""

    async def refuse(*_: object) -> None:
        raise kafka.IncompatibleBrokerVersion("Kafka 2.1 or newer is needed")

    node.lose()
    monkeypatch.setattr(Wire, "to", refuse)
    with pytest.raises(DeliveryError, match=r"Kafka 2\.1") as caught:
        await producer.send("log", 0, outgoing(b"a"))
    assert not caught.value.retriable


@VIRTUAL
@pytest.mark.parametrize("fate", ["appended", "lost"])
@pytest.mark.parametrize(
    "outcome",
    [
        kafka.KafkaConnectionError("lost"),
        kafka.RequestTimedOutError(),
        kafka.CorrelationIdError(),
        NOT_LEADER,
        kafka.RequestTimedOutError.errno,
        kafka.KafkaStorageError.errno,
    ],
)
async def test_what_is_not_known_is_sent_again(
    node: Node, producer: KafkaProducer, outcome: Exception | int, fate: str
) -> None:
    """Whether it was appended or not, the same bytes go out until that is known: one copy."""
    node.meets(outcome, outcome, appended=fate == "appended")
    assert 1 == (await producer.send("log", 0, outgoing(b"a"))).offset
    assert 2 == (await producer.send("log", 0, outgoing(b"b"))).offset
    first, second, third, _ = node.requests
    assert first == second == third
    assert [b"first", b"a", b"b"] == log(node)


async def test_a_duplicate_is_in_the_log(node: Node, producer: KafkaProducer) -> None:
    """Kafka that has the batch already says so, and that is success."""
    node.meets(DUPLICATE, appended=True)
    assert 1 == (await producer.send("log", 0, outgoing(b"a"))).offset
    assert 2 == (await producer.send("log", 0, outgoing(b"b"))).offset


@VIRTUAL
async def test_what_was_not_appended_is_tried_some_times(
    node: Node, producer: KafkaProducer
) -> None:
    """Too few replicas: some tries, then it goes back as not appended; the next one comes."""
    node.meets(*[NOT_ENOUGH] * 6)
    with pytest.raises(DeliveryError, match="NotEnoughReplicas") as caught:
        await producer.send("log", 0, outgoing(b"a"))
    assert caught.value.retriable
    assert not isinstance(caught.value, DeliveryUnknownError)
    assert 1 == (await producer.send("log", 0, outgoing(b"b"))).offset


@pytest.mark.parametrize(
    ("code", "name"), [(DENIED, "TopicAuthorization"), (INVALID_RECORD, "InvalidRecord")]
)
async def test_a_refusal_ends_a_batch(
    node: Node, producer: KafkaProducer, code: int, name: str
) -> None:
    """What Kafka refuses is not tried again, and takes no sequence number."""
    node.meets(code)
    with pytest.raises(DeliveryError, match=name) as caught:
        await producer.send("log", 0, outgoing(b"a"))
    assert not caught.value.retriable
    assert 1 == (await producer.send("log", 0, outgoing(b"b"))).offset


@VIRTUAL
async def test_a_refusal_after_a_lost_answer_is_unknown(
    node: Node, producer: KafkaProducer
) -> None:
    """What may be in the log is not called undelivered; then comes another identity."""
    node.meets(kafka.KafkaConnectionError("lost"), DENIED)
    with pytest.raises(DeliveryUnknownError):
        await producer.send("log", 0, outgoing(b"a"))
    before = node.producers
    assert 1 == (await producer.send("log", 0, outgoing(b"b"))).offset
    assert before + 1 == node.producers


@VIRTUAL
async def test_a_lost_identity_is_replaced(node: Node, producer: KafkaProducer) -> None:
    """After Kafka has forgotten the producer the next batch has a new identity."""
    node.meets(OUT_OF_ORDER)
    with pytest.raises(DeliveryError, match="OutOfOrder"):
        await producer.send("log", 0, outgoing(b"a"))
    before = node.producers
    assert 1 == (await producer.send("log", 0, outgoing(b"b"))).offset
    assert before + 1 == node.producers


@VIRTUAL
@pytest.mark.parametrize(
    ("outcome", "match"), [(kafka.KafkaConnectionError("lost"), "lost"), (999, "code 999")]
)
async def test_a_delivery_ends_in_time(
    node: Node, producer: KafkaProducer, looptime: Any, outcome: Outcome, match: str
) -> None:
    """What is never answered ends as unknown when its time is over."""
    node.meets(*[outcome] * 1000)
    with pytest.raises(DeliveryUnknownError, match=match) as caught:
        await producer.send("log", 0, outgoing(b"a"))
    assert 1 == str(caught.value).count("perhaps delivered")
    assert 30 <= looptime <= 31
    node.outcomes.clear()
    assert 1 == (await producer.send("log", 0, outgoing(b"b"))).offset


@VIRTUAL
async def test_a_connection_that_is_lost_is_opened_again(
    node: Node, producer: KafkaProducer
) -> None:
    """Without a connection, before or while it is sent, a batch gets there once."""
    node.lose()
    assert 1 == (await producer.send("log", 0, outgoing(b"a"))).offset
    node.meets(None, appended=True)
    sent = producer.send("log", 0, outgoing(b"b"))
    await turns(5)
    node.lose()
    assert 2 == (await sent).offset
    assert [b"first", b"a", b"b"] == log(node)


@VIRTUAL
async def test_a_connection_that_is_lost_before_a_batch_leaves(
    node: Node, producer: KafkaProducer
) -> None:
    """Batches that wait for the end of the turn are sent over the next connection."""
    node.meets(None)
    producer.send("log", 0, outgoing(b"a"))
    waiting = producer.send("log", 1, outgoing(b"b"))
    node.lose()
    assert 1 == (await waiting).offset
    await producer.stop()


@VIRTUAL
async def test_an_answer_that_cannot_be_read(node: Node, producer: KafkaProducer) -> None:
    """It is as good as lost: the batch goes out again, and is in the log once."""
    for answer in (b"", ProduceResponse_v7([], 0).encode()):
        node.meets(None, appended=True)
        sent = producer.send("log", 0, outgoing(answer))
        await turns(5)
        node.pending.popleft()(answer)
        await sent
    assert 3 == len(log(node))


async def test_a_record_of_a_wrong_type_hurts_nobody(producer: KafkaProducer) -> None:
    """What cannot be packed ends in that error; the next batch goes out."""
    wrong: Any = [Outgoing(None, "text", [])]  # type: ignore[arg-type]  # that is what it is about
    with pytest.raises(TypeError):
        await producer.send("log", 0, wrong)
    assert 1 == (await producer.send("log", 0, outgoing(b"b"))).offset


# A client that only fails

FAILURES: list[Outcome] = [
    kafka.KafkaConnectionError("lost"),
    kafka.NodeNotReadyError(),
    kafka.RequestTimedOutError(),
    NOT_LEADER,
]


@VIRTUAL
@pytest.mark.parametrize("failure", FAILURES, ids=str)
async def test_a_client_that_only_fails_is_replaced(
    node: Node, producer: KafkaProducer, failure: Outcome, looptime: Any
) -> None:
    """After ten seconds of failures another client asks bootstrap_servers where Kafka is."""
    before = producer.client.now
    node.meets(*[failure] * 120)
    ended: list[Appended] = []
    while not ended:
        with suppress(DeliveryError):
            ended.append(await producer.send("log", 0, outgoing(b"a")))
    assert (2, False) == (node.connects, before is producer.client.now)
    assert looptime >= 10


@VIRTUAL
async def test_a_good_answer_keeps_the_client(
    node: Node, producer: KafkaProducer, looptime: Any
) -> None:
    """Failures with good answers in between, of any partition, say nothing about the client."""
    before = producer.client.now
    while looptime < 25:
        node.meets(*[kafka.KafkaConnectionError("lost")] * 50)
        await producer.send("log", 0, outgoing(b"a"))
    assert (1, True) == (node.connects, before is producer.client.now)


@VIRTUAL
async def test_a_client_is_kept_when_no_other_can_connect(
    node: Node, producer: KafkaProducer, looptime: Any
) -> None:
    """Where nothing answers the old client goes on, and each ten seconds another is tried."""
    before = producer.client.now
    node.reachable = False
    node.meets(*[kafka.KafkaConnectionError("lost")] * 240, appended=True)
    await producer.send("log", 0, outgoing(b"a"))
    assert (3, True) == (node.connects, before is producer.client.now)
    assert 20 < looptime < 30


# Cut off


@VIRTUAL
@pytest.mark.parametrize("before", [[], [kafka.KafkaConnectionError("lost")], [NOT_LEADER, 0]])
async def test_every_task_is_cancelled_at_each_wait(node: Node, before: list[Outcome]) -> None:
    """A loop that closes cancels all there is: each batch ends, known, and is there once."""
    for after, step in ((after, step) for after in (0.0, 0.1) for step in range(20)):
        node.logs.clear()
        node.sequences.clear()
        node.outcomes.clear()
        producer = KafkaProducer(SETTINGS)
        await producer.start()
        await producer.send("log", 0, outgoing(b"first"))
        node.meets(*before, appended=True)
        sent = [producer.send("log", partition, outgoing(b"x")) for partition in range(2)]
        await asyncio.sleep(after)
        await turns(step)
        for task in others():
            task.cancel()
        ended = await asyncio.gather(*sent, return_exceptions=True)
        for partition, end in enumerate(ended):
            there = log(node, partition)[1 - partition :] if isinstance(end, Appended) else []
            assert there == [b"x"] * len(there)
            assert isinstance(end, Appended) or (
                type(end) is DeliveryError
                and TopicPartition("log", partition) not in list(node.requests[-1])
            )
        assert isinstance(ended[0], Appended)
        assert [b"first", b"x"] == log(node)
        await producer.stop()


@VIRTUAL
@pytest.mark.parametrize("connected", ["connected", "connecting"])
async def test_a_stop_ends_everything(node: Node, connected: str) -> None:
    """What was sent ends as unknown, what was not as unsent, in seconds; nothing leaves later."""
    loop = asyncio.get_running_loop()
    for step in range(12):
        producer = KafkaProducer(SETTINGS)
        await producer.start()
        await producer.send("log", 0, outgoing(b"first"))
        node.requests.clear()
        if connected == "connecting":
            node.lose()
            node.may_open.clear()
        node.meets(*[None] * 10)
        sent = [producer.send("log", partition, outgoing(b"x")) for partition in (0, 0, 1)]
        await turns(step)
        begin = loop.time()
        await producer.stop()
        assert loop.time() < begin + 5
        first, second, _ = ended = [each.exception() for each in sent]
        assert all(isinstance(end, DeliveryError) for end in ended)
        left = [set(request) for request in node.requests]
        was_sent = TopicPartition("log", 0) in set().union(*left)
        assert was_sent is isinstance(first, DeliveryUnknownError)
        assert not isinstance(second, DeliveryUnknownError)
        node.outcomes.clear()
        node.may_open.set()
        await turns(5)
        assert left == [set(request) for request in node.requests]
