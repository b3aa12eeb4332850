"""What a member of a group can meet on Kafka: late commits, twins, records nobody can parse."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka_errors
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.structs import TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker._run import connect
from kafka_broker._settings import load_settings
from kafka_broker._transport import TopicSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kafka_broker._transport import Subscription, Transport

    from .observer import Observer

pytestmark = pytest.mark.integration

TRUE_SEND = AIOKafkaClient.send


class Member:
    """The only member of a group on a topic of its own."""

    subscription: Subscription
    transport: Transport

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self.topic = f"topic-{uuid.uuid4().hex}"
        self.assigned = asyncio.Event()

    async def join(self, **settings: Any) -> None:
        """Join, and wait for the partition."""
        values = {"bootstrap_servers": self.servers, "session_timeout": 6.0, **settings}
        self.transport = connect(load_settings(self.topic, values))
        await self.transport.start()
        await self.transport.create_topics([TopicSpec(self.topic, 1)])
        self.subscription = await self.transport.subscribe(
            self.topic, on_assigned=lambda _: self.assigned.set(), on_revoked=self._revoked
        )
        await self.until_assigned()

    async def until_assigned(self) -> None:
        """Wait for the next assignment."""
        async with asyncio.timeout(30):
            await self.assigned.wait()

    async def _revoked(self, _: frozenset[int]) -> None:
        self.assigned.clear()

    @property
    def consumer(self) -> Any:
        subscription: Any = self.subscription
        return subscription._consumer

    async def committed(self) -> object:
        """Return the offset that the group resumes at."""
        (place,) = self.consumer.assignment()
        return await self.consumer.committed(place)


@pytest.fixture
async def member(kafka: str) -> AsyncIterator[Member]:
    made = Member(kafka)
    yield made
    await made.subscription.close()
    await made.transport.stop()


async def test_a_commit_is_not_tried_again_in_the_next_generation(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit whose answer was lost ends when the group has rebalanced meanwhile."""
    await member.join()
    assert await member.subscription.commit({0: 5})
    sent = []

    async def send(client: Any, node: int, request: Any, **more: Any) -> Any:
        if isinstance(request, OffsetCommitRequest):
            sent.append(request)
            if len(sent) == 1:
                member.assigned.clear()
                member.consumer._coordinator.request_rejoin()
                await member.until_assigned()
                raise kafka_errors.KafkaConnectionError
        return await TRUE_SEND(client, node, request, **more)

    monkeypatch.setattr(AIOKafkaClient, "send", send)
    assert await member.subscription.commit({0: 3}) is False
    assert (1, 5) == (len(sent), await member.committed())


async def test_a_commit_is_tried_again_in_its_generation(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that found no coordinator looks for it and is made."""
    await member.join()
    sent = []

    async def send(client: Any, node: int, request: Any, **more: Any) -> Any:
        if isinstance(request, OffsetCommitRequest):
            sent.append(request)
            if len(sent) == 1:
                raise kafka_errors.KafkaConnectionError
        return await TRUE_SEND(client, node, request, **more)

    monkeypatch.setattr(AIOKafkaClient, "send", send)
    assert await member.subscription.commit({0: 3})
    assert (2, 3) == (len(sent), await member.committed())


async def test_a_static_member_has_its_name_and_its_rack(member: Member) -> None:
    """Kafka knows a member with an instance id by it, and takes its commits."""
    await member.join(group_instance_id="replica-1", rack_id="zone-a")
    admin = AdminClient({"bootstrap.servers": member.servers})
    (future,) = admin.describe_consumer_groups([member.topic]).values()
    description = await asyncio.to_thread(future.result, 30)
    assert ["replica-1"] == [each.group_instance_id for each in description.members]
    assert "zone-a" == member.consumer._client_rack
    assert await member.subscription.commit({0: 3})


class NoText(str):
    """A name of a header as librdkafka may write it: any bytes."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:  # asked by aiokafka only
        return b"\xff\xfe"


async def append_unparsable(servers: str, topic: str, partition: int = 0) -> None:
    """Append a record whose header has a name that is not UTF-8."""
    batch = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, -1, 1000)
    headers: list[tuple[str, bytes | None]] = [(NoText("name"), b"v")]
    batch.append(0, int(time.time() * 1000), None, b"{}", headers)
    request = ProduceRequest(None, 1, 5000, [(topic, [(partition, bytes(batch.build()))])])
    async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
        await producer.partitions_for(topic)
        place = TopicPartition(topic, partition)
        node = producer.client.cluster.leader_for_partition(place)
        answer = await producer.client.send(node, request)
    assert 0 == answer.topics[0][1][0][1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # Kafka tells nobody
            await asyncio.sleep(0.1)


async def test_a_record_that_cannot_be_parsed_is_stepped_over(
    kafka: str, module: str, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """It becomes a dead letter that says where it is; all others are handled, and once."""
    router = EventRouter(module)
    handled: Counter[int] = Counter()

    @router.bind_event("number")
    async def count(event: EventObject) -> None:
        handled[event.data] += 1

    def append(numbers: range) -> None:
        for number in numbers:
            value = EventObject(event="number", data=number).model_dump_json().encode()
            observer.append(value, partition=number % 2)

    async with BrokerManager(
        module, router=router, bootstrap_servers=kafka, module_partitions=2
    ) as broker:
        append(range(10))
        await append_unparsable(kafka, module, 0)
        append(range(10, 20))
        await append_unparsable(kafka, module, 1)
        await append_unparsable(kafka, module, 1)
        append(range(20, 500))
        await until(lambda: len(handled) == 500)
        letters: list[str] = []
        while len(letters) < 3:
            letters = [letter.origin async for letter in broker.dead_letters()]
        await until(observer.drained)
    assert Counter(range(500)) == handled
    places = [f"{module}:0:5", f"{module}:1:10", f"{module}:1:11"]
    assert places == sorted(letters)
    errors = [each for each in caplog.records if each.levelno == logging.ERROR]
    told = [each.getMessage() for each in errors if each.name == "kafka_broker.transport"]
    assert places == sorted(line.split()[0] for line in told)
    assert all("UnicodeDecodeError" in line for line in told)


async def test_a_reader_gets_past_what_cannot_be_parsed(
    kafka: str, module: str, observer: Observer
) -> None:
    """What a reader cannot parse comes empty, at its place, between its neighbours."""
    transport = connect(load_settings(module, {"bootstrap_servers": kafka}))
    await transport.start()
    await transport.create_topics([TopicSpec(module, 1)])
    for number in range(6):
        if number in {2, 5}:
            await append_unparsable(kafka, module)
        else:
            observer.append(b"%d" % number)
    reader = await transport.read(module, 0, 0)
    try:
        found: list[tuple[int, bytes | None]] = []
        while len(found) < 6:
            found += [(each.offset, each.value) for each in await reader.fetch()]
    finally:
        await reader.close()
        await transport.stop()
    values = [b"0", b"1", b"", b"3", b"4", b""]
    assert list(enumerate(values)) == found
    assert 6 == reader.position


async def test_twins_stand_back_from_each_other(
    kafka: str, module: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two replicas with one instance id are told so, and nearly every event is handled once."""
    handled: Counter[int] = Counter()
    router = EventRouter(module)

    @router.bind_event("number")
    async def count(event: EventObject) -> None:
        handled[event.data] += 1

    def replica() -> BrokerManager:
        return BrokerManager(
            module,
            router=router,
            bootstrap_servers=kafka,
            module_partitions=2,
            group_instance_id="twin",
        )

    async with replica() as one, replica():
        await until(lambda: "group_instance_id 'twin'" in caplog.text)
        for number in range(100):
            one.produce(module, EventObject(event="number", data=number))
        await until(lambda: len(handled) == 100)
    assert handled.total() < 300
