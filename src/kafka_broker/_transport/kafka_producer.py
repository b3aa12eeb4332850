"""Appending to Kafka: our own produce requests, over connections and metadata that are aiokafka's.

`AIOKafkaProducer` has no delivery deadline, may be poisoned for good, and cannot say whether a
batch has left it. With one batch per partition at a time all three are small: a batch keeps its
bytes, and in them its sequence number, until its outcome is known, so Kafka appends it once however
often it is sent.

As long as all goes well a batch needs no task: it leaves with `KafkaProducer.send`, and its answer
ends it. Whatever else happens to it is for a task of its own.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.transaction import InitProducerIdRequest

from kafka_broker._transport import Appended
from kafka_broker._transport.kafka_batch import (
    APPENDED,
    IDENTITY_LOST,
    Batch,
    Identity,
    compression,
)
from kafka_broker._transport.kafka_client import (
    CLOSE_TIMEOUT,
    FOREIGN,
    REQUEST_TIMEOUT,
    describe,
    error_of,
    leader_of,
    to_its_end,
    translated,
    undelivered,
)
from kafka_broker._transport.kafka_departure import Departure
from kafka_broker._transport.kafka_kept import KeptClient
from kafka_broker._transport.kafka_wire import Wire
from kafka_broker.errors import BrokerUnavailableError, DeliveryError, DeliveryUnknownError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Outgoing
    from kafka_broker._transport.kafka_requests import Produced

_logger = logging.getLogger("kafka_broker.transport")

_PAUSE: Final = 0.1
_TRIES: Final = 5
_LOADING: Final = kafka.GroupLoadInProgressError.errno


class _Send:
    """One call of `KafkaProducer.send` until its outcome is known, or can no more be known.

    Attributes:
        appended: what the caller waits for, or does not any more.
        batch: once it is built.
        before: the one of the same partition that has to end first.
        ended: after which the next batch of the partition may be built.
        task: takes care of it, if it needs care.
    """

    __slots__ = ("appended", "batch", "before", "ended", "place", "records", "task")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        place: TopicPartition,
        records: Sequence[Outgoing],
    ) -> None:
        self.place = place
        self.records = records
        self.appended: asyncio.Future[Appended] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.batch: Batch | None = None
        self.before: _Send | None = None
        self.task: asyncio.Task[Appended] | None = None

    def cut_off(self, why: str) -> DeliveryError:
        """Return the error of a send that is not taken care of any more."""
        topic = self.place.topic
        if self.batch is not None and self.batch.sent:
            return DeliveryUnknownError(topic, why)
        return _unsent(topic)


class KafkaProducer:
    """Appends batches, idempotently, acknowledged by all replicas in sync.

    Attributes:
        client: what it asks Kafka by.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._codec = compression(settings)
        self.client = KeptClient(settings)
        self._first: Identity | None = None
        self._identities: dict[TopicPartition, Identity | None] = {}
        self._wires: dict[int, Wire] = {}
        self._departure = Departure()
        self._sends: dict[_Send, None] = {}
        self._latest: dict[TopicPartition, _Send] = {}
        self._running = False

    async def start(self) -> None:
        """Connect and get leave to produce.

        Raises:
            BrokerUnavailableError: nothing answers, or it refuses us.
        """
        await self.client.open()
        self._running = True
        try:
            self._first = await self._new_identity()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close the connections; what is on its way ends as unknown. Never raises."""
        self._running = False
        tasks = {send.task for send in self._sends if send.task is not None}
        for task in tasks:
            task.cancel()
        for send in tuple(self._sends):
            if send.task is None:
                self._end(send, send.cut_off("the broker stopped"))
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT)
        for wire in self._wires.values():
            wire.close()
        self._identities.clear()
        self._latest.clear()
        self._wires.clear()
        await self.client.close()

    def send(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> asyncio.Future[Appended]:
        """Append a batch; see `Transport.send`."""
        place = TopicPartition(topic, partition)
        send = _Send(asyncio.get_running_loop(), place, records)
        send.before = self._latest.get(place)
        self._latest[place] = send
        self._sends[send] = None
        if send.before is not None or not self._send_at_once(send):
            self._take_care(send)
        return send.appended

    def _send_at_once(self, send: _Send) -> bool:
        """Send a batch that has all it needs: an identity, a leader, a connection to it."""
        identity = self._identities.get(send.place)
        if identity is None or not self._running:
            return False
        wire = self._wires.get(self.client.now.cluster.leader_for_partition(send.place))
        if wire is None or not wire.open:
            return False
        try:
            send.batch = self._build(send, identity)
        except Exception:  # noqa: BLE001  # a record of a wrong type; the task meets it again
            return False
        self._departure.add(wire, send.batch, partial(self._arrived, send))
        return True

    def _build(self, send: _Send, identity: Identity) -> Batch:
        deadline = asyncio.get_running_loop().time() + self._settings.delivery_timeout
        return Batch(send.place, send.records, identity, self._codec, deadline)

    def _arrived(self, send: _Send, answer: Produced | Exception) -> None:
        """End a send that nobody takes care of, unless it is time that somebody does."""
        if send not in self._sends:  # a stop has ended it
            return
        batch = send.batch
        if batch is not None and not isinstance(answer, Exception) and answer.code in APPENDED:
            self._end(send, _appended(batch, answer))
        else:
            self._take_care(send, answer=answer)

    def _take_care(self, send: _Send, answer: Produced | Exception | None = None) -> None:
        """Go on in a task, after the batch before it, or with what came of the first try."""
        send.task = asyncio.get_running_loop().create_task(self._append(send, answer))
        send.task.add_done_callback(partial(self._settle, send))

    def _settle(self, send: _Send, task: asyncio.Task[Appended]) -> None:
        if not task.cancelled():
            self._end(send, task.exception() or task.result())
        elif self._running and send.batch is not None and send.batch.sent:  # it had not begun
            self._take_care(send, answer=kafka.KafkaConnectionError("cut off"))
        else:
            self._end(send, send.cut_off("the broker stopped"))

    def _end(self, send: _Send, outcome: Appended | BaseException) -> None:
        if send not in self._sends:
            return
        del self._sends[send]
        if isinstance(outcome, Appended):
            self.client.works()
        before, send.before = send.before, None
        if before is None or before.ended.done():
            self._let_next_go(send)
        else:  # it was cut off while it waited; what comes next still waits for the one before
            before.ended.add_done_callback(lambda _: self._let_next_go(send))
        if send.appended.done():
            return
        if isinstance(outcome, BaseException):
            send.appended.set_exception(outcome)
        else:
            send.appended.set_result(outcome)

    def _let_next_go(self, send: _Send) -> None:
        send.ended.set_result(None)
        if self._latest.get(send.place) is send:
            del self._latest[send.place]

    async def _append(self, send: _Send, answer: Produced | Exception | None) -> Appended:
        """Send until the outcome is known, or can no more be known."""
        place = send.place
        try:
            if send.before is not None:  # whose caller does not wait for it any more
                await asyncio.wait({send.before.ended})
            batch = send.batch
            if batch is None:
                batch = send.batch = self._build(send, await self._identity(place))
        except asyncio.CancelledError as exc:
            raise _unsent(place.topic) from exc
        while True:
            try:
                return await self._try(batch, answer)
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
            answer = None
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(_PAUSE)

    def _check_time(self, batch: Batch, error: DeliveryError) -> None:
        """Give up on a batch, and on its sequence, when its time is over."""
        if self._running and asyncio.get_running_loop().time() < batch.deadline:
            return
        if not batch.unknown:
            raise error
        self._identities[batch.place] = None
        why = describe(error.__cause__ or error)
        raise DeliveryUnknownError(batch.place.topic, why) from error

    def _outlive(self, batch: Batch, error: asyncio.CancelledError) -> None:
        """Go on when it was not us who cancelled: a loop that closes cancels every task at once."""
        if self._running:
            return
        if batch.unknown:
            raise DeliveryUnknownError(batch.place.topic, "the broker stopped") from error
        raise _unsent(batch.place.topic) from error

    async def _identity(self, place: TopicPartition) -> Identity:
        """Return what the next batch of a partition is known by; a new one after a loss."""
        identity = self._identities.get(place, self._first)
        try:
            if identity is None:
                identity = await self._new_identity()
        except BrokerUnavailableError as exc:
            raise DeliveryError(place.topic, str(exc), retriable=True) from exc
        if identity is self._first:
            identity = Identity(identity.producer_id, identity.epoch)
        self._identities[place] = identity
        return identity

    async def _new_identity(self) -> Identity:
        client = await self.client.get()
        with translated("Kafka gives no leave to produce"):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = InitProducerIdRequest(None, 0)
                answer = await self.client.ask(client, request)
                while answer.error_code == _LOADING:  # a Kafka that has just started
                    await asyncio.sleep(_PAUSE)
                    answer = await self.client.ask(client, request)
                if answer.error_code:
                    raise kafka.for_code(answer.error_code)
        return Identity(answer.producer_id, answer.producer_epoch)

    async def _try(self, batch: Batch, answer: Produced | Exception | None) -> Appended:
        """Send a batch once, unless that was done and this is what came of it.

        Raises:
            DeliveryError: this time it did not get into the log.
            DeliveryUnknownError: it may be in the log.
        """
        topic = batch.place.topic
        if answer is None:
            try:
                wire = await self._wire_to(batch.place)
            except (BrokerUnavailableError, *FOREIGN) as exc:
                self.client.fails()
                passing = not isinstance(exc, kafka.IncompatibleBrokerVersion)
                raise DeliveryError(topic, describe(exc), retriable=passing) from exc
            answer = await self._departure.exchange(wire, batch)
        if not isinstance(answer, Exception):
            return self._outcome(batch, answer)
        self.client.fails()
        self._renew_metadata()
        if isinstance(answer, kafka.NodeNotReadyError):
            raise DeliveryError(topic, describe(answer), retriable=True) from answer
        raise DeliveryUnknownError(topic, describe(answer)) from answer

    async def _wire_to(self, place: TopicPartition) -> Wire:
        client = await self.client.get()
        leader = await leader_of(client, place)
        wire = await to_its_end(Wire.to(client, leader))
        if client is self.client.now:
            self._wires[leader] = wire
        return wire

    def _renew_metadata(self) -> None:
        if self.client.now is not None:
            self.client.now.force_metadata_update()

    def _outcome(self, batch: Batch, answer: Produced) -> Appended:
        """Read the answer to a batch; raises as `_try`."""
        if answer.code in APPENDED:
            return _appended(batch, answer)
        error = error_of(answer.code, batch.place.topic)
        if error.invalid_metadata:
            self.client.fails()
        else:
            self.client.works()
        self._renew_metadata()
        if isinstance(error, IDENTITY_LOST):
            self._identities[batch.place] = None
            batch.deadline = 0.0  # its bytes carry the lost identity; it has to be built anew
            raise DeliveryError(batch.place.topic, describe(error), retriable=True) from error
        raise undelivered(batch.place.topic, error) from error


def _appended(batch: Batch, answer: Produced) -> Appended:
    """Return where a batch is; the next one of its partition has the next sequence number."""
    batch.identity.advance(batch.count)
    return Appended(answer.offset, answer.timestamp if answer.timestamp != -1 else batch.built_at)


def _unsent(topic: str) -> DeliveryError:
    """Return the error of a batch that was cancelled before it left."""
    return DeliveryError(topic, "it was not sent before the broker stopped", retriable=True)
