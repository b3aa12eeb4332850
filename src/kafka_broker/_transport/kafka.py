"""The transport over aiokafka 0.14; only it and the two modules beside it import aiokafka.

What aiokafka leaves open is closed here: starts and stops are bounded, a dead fetch or send task is
noticed, a late commit is refused, and every exception becomes one of `kafka_broker.errors`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.metadata import MetadataRequest

from kafka_broker._transport import Appended
from kafka_broker._transport.kafka_client import (
    CLOSE_TIMEOUT,
    FOREIGN,
    REFUSED,
    REQUEST_TIMEOUT,
    check_options,
    close,
    describe,
    options,
    reasons_logged,
    translated,
    unavailable,
    undelivered,
)
from kafka_broker._transport.kafka_consumer import (
    KafkaReader,
    KafkaSubscription,
    consumer_options,
)
from kafka_broker.errors import BrokerUnavailableError, DeliveryError, DeliveryUnknownError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import OnAssigned, OnRevoked, Outgoing, TopicSpec

_logger = logging.getLogger("kafka_broker.transport")

_DAY_MS: Final = 24 * 3600 * 1000


class KafkaTransport:
    """A `Transport` on a real Kafka."""

    def __init__(self, settings: BrokerSettings) -> None:
        check_options(settings)
        self._settings = settings
        self._producer_options = options(
            AIOKafkaProducer,
            settings,
            {
                "acks": "all",
                "enable_idempotence": True,
                "linger_ms": 0,
                "request_timeout_ms": int(REQUEST_TIMEOUT * 1000),
                "max_batch_size": 1_000_000,
            },
        )
        self._producer: Any = None
        self._replacing = asyncio.Lock()
        self._sends: set[asyncio.Task[Appended]] = set()

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    async def start(self) -> None:
        """Connect a producer; see `Transport.start`."""
        self._producer = await self._connect()

    async def _connect(self) -> Any:
        producer = AIOKafkaProducer(**self._producer_options)
        action = f"cannot connect to Kafka at {self._settings.bootstrap_servers}"
        with reasons_logged() as reasons:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    await producer.start()
            except FOREIGN as exc:
                await close(producer, producer.stop())
                error = unavailable(action, exc)
                why = f" ({reasons[-1]})" if reasons else ""
                raise BrokerUnavailableError(f"{error}{why}") from exc
            except BaseException:
                await close(producer, producer.stop())
                raise
        return producer

    async def stop(self) -> None:
        """Close the producer; see `Transport.stop`."""
        producer, self._producer = self._producer, None
        await asyncio.sleep(0)  # cancelled before its first step, a task cannot say how it ended
        for send in self._sends:
            send.cancel()
        if self._sends:
            await asyncio.wait(self._sends, timeout=CLOSE_TIMEOUT)
        if producer is not None:
            await close(producer, producer.stop())

    async def partitions(self, topic: str) -> int:
        """Ask Kafka, without creating the topic; see `Transport.partitions`."""
        producer = await self._healthy_producer()
        client = producer.client
        with translated(f"cannot look up topic {topic!r}"):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = MetadataRequest([topic], allow_auto_topic_creation=False)
                answer = await client.send(client.get_random_node(), request)
                error, _, _, partitions = answer.topics[0]
                if error == kafka.TopicAuthorizationFailedError.errno:
                    raise kafka.TopicAuthorizationFailedError(topic)
                if error:
                    return 0
                await producer.partitions_for(topic)
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
        send = asyncio.get_running_loop().create_task(self._append(topic, partition, records))
        self._sends.add(send)
        send.add_done_callback(self._sends.discard)
        return send

    async def _append(self, topic: str, partition: int, records: Sequence[Outgoing]) -> Appended:
        try:
            producer = await self._healthy_producer()
            if producer.client.cluster.partitions_for_topic(topic) is None:
                await self._check_exists(topic, partition)
            batch = producer.create_batch()
            for key, value, headers in records:
                batch.append(timestamp=None, key=key, value=value, headers=list(headers))
            acknowledged = await producer.send_batch(batch, topic, partition=partition)
        except BrokerUnavailableError as exc:
            raise DeliveryError(topic, str(exc), retriable=True) from exc
        except REFUSED as exc:
            raise DeliveryError(topic, describe(exc)) from exc
        except (*FOREIGN, AssertionError, asyncio.CancelledError) as exc:
            raise DeliveryError(topic, describe(exc), retriable=True) from exc
        sent_at = time.time()
        try:
            appended = await acknowledged
        except asyncio.CancelledError as exc:
            if _recalled(producer, TopicPartition(topic, partition), batch):
                raise DeliveryError(topic, "the client stopped", retriable=True) from exc
            raise DeliveryUnknownError(topic, "the client stopped") from exc
        except Exception as exc:
            raise undelivered(topic, exc) from exc
        stamped_by_kafka = appended.timestamp != -1
        timestamp = appended.timestamp if stamped_by_kafka else int(sent_at * 1000)
        return Appended(appended.offset, timestamp)

    async def _healthy_producer(self) -> Any:
        """Return the producer, in place of one that can never send again a new one."""
        producer = self._producer
        if producer is None:
            msg = "the connection to Kafka is closed"
            raise BrokerUnavailableError(msg)
        if not producer._sender.sender_task.done():  # noqa: SLF001  # aiokafka tells nobody
            return producer
        async with self._replacing:
            if self._producer is producer:
                _logger.warning("the producer of %s died; replacing it", self._settings.instance)
                await close(producer, producer.stop())
                self._producer = await self._connect()
        return self._producer

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
        consumer = AIOKafkaConsumer(**consumer_options(self._settings, {}))
        place = TopicPartition(topic, partition)
        try:
            with translated(f"cannot read {topic}:{partition}"):
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    await consumer.start()
                    consumer.assign([place])
                    if offset is None:
                        await consumer.seek_to_end(place)
                    else:
                        consumer.seek(place, offset)
                    position = await consumer.position(place)
        except BaseException:
            await close(consumer, consumer.stop())
            raise
        return KafkaReader(consumer, position)

    async def subscribe(
        self, topic: str, *, on_assigned: OnAssigned, on_revoked: OnRevoked
    ) -> KafkaSubscription:
        """Join the group; see `Transport.subscribe`."""
        await self._check_exists(topic)
        settings = self._settings
        group = {
            "group_id": settings.group_id,
            "session_timeout_ms": int(settings.session_timeout * 1000),
            "heartbeat_interval_ms": int(min(1.0, settings.session_timeout / 3) * 1000),
            "rebalance_timeout_ms": int(settings.rebalance_timeout * 1000),
            "request_timeout_ms": int((settings.rebalance_timeout + 10) * 1000),
            "max_poll_interval_ms": _DAY_MS,
        }
        consumer = AIOKafkaConsumer(**consumer_options(settings, group))
        subscription = KafkaSubscription(consumer, topic, on_assigned, on_revoked)
        try:
            with translated(f"cannot join group {settings.group_id!r} on topic {topic!r}"):
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


def _recalled(producer: Any, place: TopicPartition, batch: Any) -> bool:
    """Take a batch back that the producer has queued but never sent; False if it is too late."""
    queue = producer._message_accumulator._batches.get(place, ())  # noqa: SLF001  # no public way
    for queued in queue:
        if queued._builder is batch and queued.retry_count == 0:  # noqa: SLF001  # as above
            queue.remove(queued)
            return True
    return False
