"""What a member of a group can meet on Kafka: a commit that comes too late, a static member."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import errors as kafka_errors
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.commit import OffsetCommitRequest
from confluent_kafka.admin import AdminClient

from kafka_broker._run import connect
from kafka_broker._settings import load_settings
from kafka_broker._transport import TopicSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kafka_broker._transport import Subscription, Transport

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
