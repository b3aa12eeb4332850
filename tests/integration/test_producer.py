"""What a produce request can meet on its way: one copy in the log, and a true answer."""

from __future__ import annotations

import asyncio
import io
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import errors as kafka_errors
from aiokafka.protocol.produce import ProduceResponse_v7

from kafka_broker._run import connect
from kafka_broker._settings import load_settings
from kafka_broker._transport import Outgoing, TopicSpec
from kafka_broker._transport.kafka_requests import PRODUCE, Kind
from kafka_broker._transport.kafka_wire import Wire
from kafka_broker.errors import DeliveryUnknownError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.integration

TRUE_ASK = Wire.ask


class Producing:
    """A transport on a topic of its own, whose produce requests meet faults."""

    def __init__(self, servers: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.topic = f"topic-{uuid.uuid4().hex}"
        settings = {"bootstrap_servers": servers, "delivery_timeout": 2.0}
        self.transport = connect(load_settings(self.topic, settings))
        self._monkeypatch = monkeypatch

    def meet(self, *faults: Callable[[Any], Any]) -> None:
        """Let the answers to the next requests go through these; the ones after come unchanged."""
        left = list(faults)

        def ask(wire: Wire, kind: Kind, body: Any, answered: Callable[[Any], None]) -> None:
            def meet(answer: Any) -> None:
                if left and kind == PRODUCE and isinstance(answer, bytes):
                    answer = changed(answer, left.pop(0))
                answered(answer)

            TRUE_ASK(wire, kind, body, meet)

        self._monkeypatch.setattr(Wire, "ask", ask)

    def send(self, *values: bytes, partition: int = 0) -> asyncio.Future[Any]:
        records = [Outgoing(None, value, []) for value in values]
        return self.transport.send(self.topic, partition, records)

    async def log(self, count: int) -> list[bytes | None]:
        """Return the first partition from its start, as soon as it has *count* records."""
        reader = await self.transport.read(self.topic, 0, 0)
        values: list[bytes | None] = []
        async with asyncio.timeout(10):
            while len(values) < count:
                values += [record.value for record in await reader.fetch()]
        values += [record.value for record in await reader.fetch()]
        await reader.close()
        return values


@pytest.fixture
async def producing(kafka: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Producing]:
    made = Producing(kafka, monkeypatch)
    await made.transport.start()
    await made.transport.create_topics([TopicSpec(made.topic, 3)])
    yield made
    await made.transport.stop()


def changed(answer: bytes, fault: Callable[[Any], Any]) -> bytes | Exception:
    """Return what arrives in place of an answer, read and written by aiokafka."""
    try:
        made: bytes | Exception = fault(ProduceResponse_v7.decode(io.BytesIO(answer))).encode()
    except kafka_errors.KafkaError as exc:
        made = exc
    return made


def cut(answer: Any) -> Any:
    """Lose the answer after Kafka has appended the batch."""
    raise kafka_errors.KafkaConnectionError(answer)


def coded(code: int) -> Callable[[Any], Any]:
    """Put this error in place of what Kafka answers."""

    def change(answer: Any) -> Any:
        topic, [(partition, _, *rest)] = answer.topics[0]
        answer.topics[0] = (topic, [(partition, code, *rest)])
        return answer

    return change


def emptied(answer: Any) -> Any:
    """Leave every partition out of the answer."""
    answer.topics.clear()
    return answer


async def test_a_lost_answer_doubles_nothing(producing: Producing) -> None:
    """A batch whose answer was lost is sent again, and is in the log once, where it says."""
    producing.meet(cut)
    assert 0 == (await producing.send(b"a", b"b")).offset
    assert 2 == (await producing.send(b"c")).offset
    assert [b"a", b"b", b"c"] == await producing.log(3)


async def test_a_refusal_after_a_lost_answer_is_unknown(producing: Producing) -> None:
    """What may be in the log is not called undelivered, and its sequence is not used again."""
    producing.meet(cut, coded(kafka_errors.TopicAuthorizationFailedError.errno))
    with pytest.raises(DeliveryUnknownError):
        await producing.send(b"a")
    assert 1 == (await producing.send(b"b")).offset
    assert [b"a", b"b"] == await producing.log(2)


async def test_a_leader_that_steps_down_doubles_nothing(producing: Producing) -> None:
    """A leader may append and then answer that it leads no more: the batch is kept as it is."""
    not_leader = coded(kafka_errors.NotLeaderForPartitionError.errno)
    producing.meet(*[not_leader] * 8)
    assert 0 == (await producing.send(b"a")).offset
    assert [b"a"] == await producing.log(1)


async def test_an_answer_that_lacks_a_partition_hangs_nobody(producing: Producing) -> None:
    """Batches that travelled together are all sent again when one of them has no answer."""
    producing.meet(emptied, emptied, emptied)
    sends = [producing.send(b"x", partition=partition) for partition in range(3)]
    async with asyncio.timeout(20):
        assert [0, 0, 0] == [(await send).offset for send in sends]


async def test_a_lost_identity_is_replaced(producing: Producing) -> None:
    """A producer whose sequence Kafka no longer knows goes on under a new identity."""
    await producing.send(b"a")
    producing.meet(coded(kafka_errors.OutOfOrderSequenceNumber.errno))
    with pytest.raises(Exception, match="OutOfOrderSequence"):
        await producing.send(b"b")
    assert 2 == (await producing.send(b"c")).offset
    assert [b"a", b"b", b"c"] == await producing.log(3)


@pytest.mark.parametrize("how", ["lost", "closed", "cancelled"])
async def test_what_is_cut_all_the_time_is_there_once(producing: Producing, how: str) -> None:
    """Connections that are lost or closed, or tasks that are cancelled, double and lose nothing."""
    count = 24
    await producing.send(b"0")
    producer = producing.transport._producer  # type: ignore[attr-defined]  # a `KafkaTransport`
    current = asyncio.current_task()
    for number in range(1, count):
        sent = producing.send(b"%d" % number)
        for _ in range(number % 8):
            await asyncio.sleep(0)
        if how == "cancelled":
            for task in asyncio.all_tasks() - {current}:
                task.cancel()
        for wire in producer._wires.values():
            if how == "lost":
                wire._transport.abort()
            elif how == "closed":
                wire._connection.close()
        assert number == (await sent).offset
    assert [b"%d" % number for number in range(count)] == await producing.log(count)
