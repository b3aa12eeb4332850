"""The transport over aiokafka 0.14; only the modules ``kafka*`` import it.

What aiokafka leaves open is closed here: starts and stops are bounded, a dead fetch or send task is
noticed, a late commit is refused, and every exception becomes one of `kafka_broker.errors`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.metadata import MetadataRequest

from kafka_broker._transport.kafka_client import (
    REQUEST_TIMEOUT,
    check_options,
    close,
    options,
    translated,
)
from kafka_broker._transport.kafka_consumer import (
    History,
    KafkaSubscription,
    consumer_options,
)
from kafka_broker._transport.kafka_producer import KafkaProducer
from kafka_broker._transport.kafka_reader import KafkaReader
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Appended, OnAssigned, OnRevoked, Outgoing, TopicSpec

_DAY_MS: Final = 24 * 3600 * 1000
"""aiokafka takes slow handlers for dead members; heartbeats tell better."""


class KafkaTransport:
    """A `Transport` on a real Kafka."""

    def __init__(self, settings: BrokerSettings) -> None:
        check_options(settings)
        self._settings = settings
        self._producer = KafkaProducer(settings)
        self._histories: dict[str, History] = {}

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    async def start(self) -> None:
        """Connect; see `Transport.start`."""
        await self._producer.start()

    async def stop(self) -> None:
        """Disconnect; see `Transport.stop`."""
        await self._producer.stop()

    async def partitions(self, topic: str) -> int:
        """Ask Kafka, without creating the topic; see `Transport.partitions`."""
        client = await self._producer.client.get()
        with translated(f"cannot look up topic {topic!r}"):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = MetadataRequest([topic], allow_auto_topic_creation=False)
                answer = await self._producer.client.ask(client, request)
                error, _, _, partitions = answer.topics[0]
                if error == kafka.TopicAuthorizationFailedError.errno:
                    raise kafka.TopicAuthorizationFailedError(topic)
                if error:
                    return 0
                await client.add_topic(topic)
        return len(partitions)

    async def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing; see `Transport.create_topics`."""
        missing = [spec for spec in topics if not await self.partitions(spec.name)]
        if not missing:
            return
        admin = AIOKafkaAdminClient(**options(AIOKafkaAdminClient, self._settings, {}))
        try:
            with translated("cannot create topics"):
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    await admin.start()
                    answer = await admin.create_topics([_new_topic(spec) for spec in missing])
        finally:
            await close(admin, admin.close())
        answers = {name: (code, text) for name, code, text in answer.topic_errors}
        self._check_created(missing, answers)
        for spec in missing:
            await self._until_known(spec.name)

    def _check_created(
        self, topics: Sequence[TopicSpec], answers: Mapping[str, tuple[int, str | None]]
    ) -> None:
        for spec in topics:
            code, text = answers[spec.name]
            if code in (0, kafka.TopicAlreadyExistsError.errno):
                continue
            refused = kafka.for_code(code)
            msg = (
                f"topic {spec.name!r} does not exist and cannot be created by this client "
                f"({refused.__name__}{': ' + text if text else ''}); allow it to, or run: "
                f"{spec.command(self._settings.bootstrap_servers)}"
            )
            raise BrokerUnavailableError(msg) from refused(text)

    async def _until_known(self, topic: str) -> None:
        """Wait until the nodes tell of a topic that was just created."""
        with translated(f"topic {topic!r} was created but is not known"):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                while not await self.partitions(topic):  # noqa: ASYNC110  # Kafka tells nobody
                    await asyncio.sleep(0.02)

    def send(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> asyncio.Future[Appended]:
        """Append a batch; see `Transport.send`."""
        return self._producer.send(topic, partition, records)

    async def _check_exists(self, topic: str, partition: int = 0) -> None:
        """Refuse what aiokafka would wait for without a word."""
        partitions = await self.partitions(topic)
        if partition >= partitions:
            what = f"has no partition {partition}" if partitions else "does not exist"
            msg = f"topic {topic!r} {what}"
            raise BrokerUnavailableError(msg)

    async def read(self, topic: str, partition: int, offset: int | None = None) -> KafkaReader:
        """Open a consumer without a group; see `Transport.read`."""
        await self._check_exists(topic, partition)
        return await KafkaReader.open(self._settings, TopicPartition(topic, partition), offset)

    async def subscribe(
        self,
        topic: str,
        group_id: str | None = None,
        *,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
    ) -> KafkaSubscription:
        """Join the group; see `Transport.subscribe`."""
        await self._check_exists(topic)
        settings = self._settings
        group_id = group_id or settings.group_id
        group = {
            "group_id": group_id,
            "group_instance_id": settings.group_instance_id,
            "session_timeout_ms": int(settings.session_timeout * 1000),
            "heartbeat_interval_ms": int(min(1.0, settings.session_timeout / 3) * 1000),
            "rebalance_timeout_ms": int(settings.rebalance_timeout * 1000),
            "request_timeout_ms": int((settings.rebalance_timeout + 10) * 1000),
            "max_poll_interval_ms": _DAY_MS,
        }
        consumer = AIOKafkaConsumer(**consumer_options(settings, group))
        history = self._histories.setdefault(topic, History(settings.group_instance_id))
        subscription = KafkaSubscription(consumer, topic, on_assigned, on_revoked, history)
        try:
            with translated(f"cannot join group {group_id!r} on topic {topic!r}"):
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    await consumer.start()
                    consumer.subscribe([topic], listener=subscription)
        except BaseException:
            await close(consumer, consumer.stop())
            raise
        return subscription


def _new_topic(spec: TopicSpec) -> NewTopic:
    topic = NewTopic(spec.name, spec.partitions, 1, topic_configs=dict(spec.config))
    topic.replication_factor = -1  # the cluster's default; aiokafka's constructor refuses it
    return topic
