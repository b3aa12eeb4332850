"""Appending to Kafka: our own produce requests, over connections and metadata that are aiokafka's.

`AIOKafkaProducer` has no delivery deadline, may be poisoned for good, and cannot say whether a
batch has left it. With one batch per partition at a time all three are small: a batch keeps its
bytes, and in them its sequence number, until its outcome is known, so Kafka appends it once however
often it is sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.codec import has_gzip, has_lz4, has_snappy, has_zstd
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from kafka_broker._transport import Appended
from kafka_broker._transport.kafka_client import (
    CLOSE_TIMEOUT,
    FOREIGN,
    REQUEST_TIMEOUT,
    close,
    connect,
    describe,
    is_dead,
    leader_of,
    translated,
    undelivered,
)
from kafka_broker.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Outgoing

_logger = logging.getLogger("kafka_broker.transport")

_ALL_REPLICAS: Final = -1
_NO_LIMIT: Final = 1 << 30
_PAUSE: Final = 0.1
_TRIES: Final = 5
_LOADING: Final = kafka.GroupLoadInProgressError.errno
_CODECS: Final = {
    "gzip": (1, has_gzip),
    "snappy": (2, has_snappy),
    "lz4": (3, has_lz4),
    "zstd": (4, has_zstd),
}
_IDENTITY_LOST: Final = (
    kafka.OutOfOrderSequenceNumber,
    kafka.InvalidProducerEpoch,
    kafka.UnknownProducerId,
    kafka.ProducerFenced,
)
_MAY_HAVE_APPENDED: Final = (
    kafka.NotLeaderForPartitionError,  # also when it lost the lead while the replicas copied
    kafka.RequestTimedOutError,
    kafka.NotEnoughReplicasAfterAppendError,
    kafka.KafkaStorageError,
)


_Answer = tuple[int, int, int]
"""Of one partition: the error code, the first offset, the timestamp in milliseconds or -1."""


class _Identity:
    """What makes a batch of one partition known to Kafka, so that it is appended once."""

    __slots__ = ("epoch", "producer_id", "sequence")

    def __init__(self, producer_id: int, epoch: int) -> None:
        self.producer_id = producer_id
        self.epoch = epoch
        self.sequence = 0


class _Batch:
    """The bytes of one batch, and whether Kafka may have them already."""

    __slots__ = (
        "buffer",
        "built_at",
        "count",
        "deadline",
        "identity",
        "place",
        "sent",
        "tries",
        "unknown",
    )

    def __init__(
        self, place: TopicPartition, records: Sequence[Outgoing], identity: _Identity, codec: int
    ) -> None:
        self.place = place
        self.identity = identity
        self.count = len(records)
        self.sent = False
        self.tries = 0
        self.unknown = False
        self.deadline = 0.0
        self.built_at = int(time.time() * 1000)
        builder = DefaultRecordBatchBuilder(
            magic=2,
            compression_type=codec,
            is_transactional=0,
            producer_id=identity.producer_id,
            producer_epoch=identity.epoch,
            base_sequence=identity.sequence,
            batch_size=_NO_LIMIT,
        )
        for offset, (key, value, headers) in enumerate(records):
            builder.append(offset, self.built_at, key, value, list(headers))
        self.buffer = builder.build()


def compression(settings: BrokerSettings) -> int:
    """Return Kafka's number of the codec that ``client_options`` ask for; 0 for none.

    Raises:
        ConfigurationError: there is no such codec, or its library is not installed.
    """
    name = settings.client_options.get("compression_type")
    if name is None:
        return 0
    if name not in _CODECS:
        msg = f"client_options: compression_type must be one of {', '.join(_CODECS)}"
        raise ConfigurationError(msg)
    number, installed = _CODECS[name]
    if not installed():
        msg = f"compression_type {name!r} needs a library: pip install 'aiokafka[{name}]'"
        raise ConfigurationError(msg)
    return number


class KafkaProducer:
    """Appends batches, idempotently, acknowledged by all replicas in sync."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._codec = compression(settings)
        self._options = {"request_timeout_ms": int(REQUEST_TIMEOUT * 1000)}
        self._client: Any = None
        self._connecting = asyncio.Lock()
        self._first: _Identity | None = None
        self._identities: dict[TopicPartition, _Identity | None] = {}
        self._sends: set[asyncio.Task[Appended]] = set()
        self._latest: dict[TopicPartition, asyncio.Task[Appended]] = {}
        self._leaving: dict[int, dict[_Batch, asyncio.Future[_Answer]]] = {}
        self._running = False

    async def start(self) -> None:
        """Connect and get leave to produce.

        Raises:
            BrokerUnavailableError: nothing answers, or it refuses us.
        """
        self._client = await connect(self._settings, self._options)
        self._running = True
        try:
            self._first = await self._new_identity()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close the connections; what is on its way ends as unknown. Never raises."""
        self._running = False
        for send in self._sends:
            send.cancel()
        if self._sends:
            await asyncio.wait(self._sends, timeout=CLOSE_TIMEOUT)
        client, self._client = self._client, None
        self._identities.clear()
        self._latest.clear()
        if client is not None:
            await close(client, client.close())

    async def client(self) -> Any:
        """Return a client that works, in place of one whose tasks were cancelled a new one.

        Raises:
            BrokerUnavailableError: it is stopped, or no new one could connect.
        """
        if not self._running:
            msg = "the connection to Kafka is closed"
            raise BrokerUnavailableError(msg)
        client = self._client
        if not is_dead(client):
            return client
        async with self._connecting:
            if self._client is client:
                _logger.warning("the connection to Kafka was cut from inside; connecting again")
                self._client = await connect(self._settings, self._options)
                await close(client, client.close())
                if not self._running:  # stopped meanwhile
                    client, self._client = self._client, None
                    await close(client, client.close())
        if self._client is None:
            msg = "the connection to Kafka is closed"
            raise BrokerUnavailableError(msg)
        return self._client

    def send(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> asyncio.Future[Appended]:
        """Append a batch; see `Transport.send`."""
        loop = asyncio.get_running_loop()
        appended: asyncio.Future[Appended] = loop.create_future()
        place = TopicPartition(topic, partition)
        send = loop.create_task(self._append(place, records, self._latest.get(place)))
        self._latest[place] = send
        self._sends.add(send)

        def settle(send: asyncio.Task[Appended]) -> None:
            self._sends.discard(send)
            if self._latest.get(place) is send:
                del self._latest[place]
            error = _unsent(topic) if send.cancelled() else send.exception()
            if appended.done():
                return
            if error is None:
                appended.set_result(send.result())
            else:
                appended.set_exception(error)

        send.add_done_callback(settle)
        return appended

    async def _append(
        self,
        place: TopicPartition,
        records: Sequence[Outgoing],
        before: asyncio.Task[Appended] | None,
    ) -> Appended:
        """Send until the outcome is known, or can no more be known."""
        try:
            if before is not None and not before.done():
                await asyncio.wait({before})  # whose caller does not wait for it any more
            batch = _Batch(place, records, await self._identity(place), self._codec)
            batch.deadline = asyncio.get_running_loop().time() + self._settings.delivery_timeout
        except asyncio.CancelledError as exc:
            raise _unsent(place.topic) from exc
        while True:
            try:
                return await self._try(batch)
            except DeliveryError as exc:
                batch.unknown = batch.unknown or isinstance(exc, DeliveryUnknownError)
                batch.tries += 1
                patient = batch.sent and batch.tries <= _TRIES
                if not batch.unknown and not (exc.retriable and patient):
                    raise
                if not exc.retriable:
                    batch.deadline = 0.0  # refused now, but an earlier try may be in the log
                self._check_time(batch, exc)
            except asyncio.CancelledError as exc:
                batch.unknown = batch.unknown or batch.sent
                self._outlive(batch, exc)
            except Exception as exc:  # whatever a client raises, the batch may have left
                self._identities[place] = None
                raise DeliveryUnknownError(place.topic, describe(exc)) from exc
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(_PAUSE)

    def _check_time(self, batch: _Batch, error: DeliveryError) -> None:
        """Give up on a batch, and on its sequence, when its time is over."""
        if self._running and asyncio.get_running_loop().time() < batch.deadline:
            return
        if not batch.unknown:
            raise error
        self._identities[batch.place] = None
        raise DeliveryUnknownError(batch.place.topic, describe(error)) from error

    def _outlive(self, batch: _Batch, error: asyncio.CancelledError) -> None:
        """Go on when it was not us who cancelled: a loop that closes cancels every task at once."""
        if self._running:
            return
        if batch.unknown:
            raise DeliveryUnknownError(batch.place.topic, "the broker stopped") from error
        raise _unsent(batch.place.topic) from error

    async def _identity(self, place: TopicPartition) -> _Identity:
        """Return what the next batch of a partition is known by; a new one after a loss."""
        identity = self._identities.get(place, self._first)
        try:
            if identity is None:
                identity = await self._new_identity()
        except BrokerUnavailableError as exc:
            raise DeliveryError(place.topic, str(exc), retriable=True) from exc
        if identity is self._first:
            identity = _Identity(identity.producer_id, identity.epoch)
        self._identities[place] = identity
        return identity

    async def _new_identity(self) -> _Identity:
        client = await self.client()
        with translated("Kafka gives no leave to produce"):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = InitProducerIdRequest(None, 0)
                answer = await client.send(client.get_random_node(), request)
                while answer.error_code == _LOADING:  # a Kafka that has just started
                    await asyncio.sleep(_PAUSE)
                    answer = await client.send(client.get_random_node(), request)
                if answer.error_code:
                    raise kafka.for_code(answer.error_code)
        return _Identity(answer.producer_id, answer.producer_epoch)

    async def _try(self, batch: _Batch) -> Appended:
        """Send a batch once.

        Raises:
            DeliveryError: this time it did not get into the log.
            DeliveryUnknownError: it may be in the log.
        """
        topic = batch.place.topic
        try:
            client, leader = await self._leader(batch.place)
        except (BrokerUnavailableError, *FOREIGN) as exc:
            raise DeliveryError(topic, describe(exc), retriable=True) from exc
        batch.sent = True
        try:
            answer = await self._carry(client, leader, batch)
        except FOREIGN as exc:
            client.force_metadata_update()
            raise DeliveryUnknownError(topic, describe(exc)) from exc
        return self._outcome(batch, client, answer)

    async def _carry(self, client: Any, leader: int, batch: _Batch) -> _Answer:
        """Send a batch together with all that go to the same node in this turn of the loop."""
        companions = self._leaving.get(leader)
        if companions is not None:
            answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
            companions[batch] = answer
            return await answer
        companions = self._leaving[leader] = {}
        try:
            try:
                if len(self._sends) > 1:
                    await asyncio.sleep(0)
            finally:
                del self._leaving[leader]
            batches = [batch, *companions]
            answers = _answers(await client.send(leader, _request(batches)), batches)
        except BaseException as exc:
            error = exc if isinstance(exc, FOREIGN) else kafka.KafkaConnectionError("cut off")
            for answer in companions.values():
                if not answer.done():
                    answer.set_exception(error)
            raise
        for companion, answer in companions.items():
            if not answer.done():
                answer.set_result(answers[companion.place])
        return answers[batch.place]

    async def _leader(self, place: TopicPartition) -> tuple[Any, int]:
        client = await self.client()
        return client, await leader_of(client, place)

    def _outcome(self, batch: _Batch, client: Any, answer: _Answer) -> Appended:
        """Read the answer to a batch; raises as `_try`."""
        code, offset, timestamp = answer
        kind = kafka.for_code(code)
        if kind in (kafka.NoError, kafka.DuplicateSequenceNumber):
            batch.identity.sequence = (batch.identity.sequence + batch.count) % 2**31
            return Appended(offset, timestamp if timestamp != -1 else batch.built_at)
        error = kind(batch.place.topic)
        client.force_metadata_update()
        if isinstance(error, _MAY_HAVE_APPENDED):
            raise DeliveryUnknownError(batch.place.topic, describe(error)) from error
        if isinstance(error, _IDENTITY_LOST):
            self._identities[batch.place] = None
            batch.deadline = 0.0  # its bytes carry the lost identity; it has to be built anew
            raise DeliveryError(batch.place.topic, describe(error), retriable=True) from error
        raise undelivered(batch.place.topic, error) from error


def _unsent(topic: str) -> DeliveryError:
    """Return the error of a batch that was cancelled before it left."""
    return DeliveryError(topic, "it was not sent before the broker stopped", retriable=True)


def _request(batches: Sequence[_Batch]) -> ProduceRequest:
    topics: dict[str, list[tuple[int, bytes]]] = {}
    for batch in batches:
        topics.setdefault(batch.place.topic, []).append((batch.place.partition, batch.buffer))
    milliseconds = int(REQUEST_TIMEOUT * 1000)
    return ProduceRequest(None, _ALL_REPLICAS, milliseconds, list(topics.items()))


def _answers(response: Any, batches: Sequence[_Batch]) -> dict[TopicPartition, _Answer]:
    """Return what a response says of each partition; every batch must have its answer."""
    answers = {
        TopicPartition(topic, partition): (code, offset, timestamp)
        for topic, partitions in response.topics
        for partition, code, offset, timestamp, *_ in partitions
    }
    for batch in batches:
        if batch.place not in answers:
            raise kafka.KafkaProtocolError(f"no answer for {batch.place}")
    return answers
