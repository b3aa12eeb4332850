"""The outbox: `produce()` appends to it and returns; batches leave it, one per partition at a time.

A batch is whatever was produced while the one before it was on its way, so nothing waits for a
batch to fill: one event in flight is sent at once, a thousand travel together.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import weakref
import zlib
from collections import deque
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Final

from kafka_broker._delivery import ENDED, SENT, WAITING, Delivery, murmur2, wake
from kafka_broker._transport import UNKNOWN, Appended, Outgoing, Transport
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerUnavailableError,
    DeliveryError,
    DeliveryUnknownError,
    OutboxFullError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kafka_broker._metrics import Metrics

_logger = logging.getLogger("kafka_broker.outbox")

BATCH_BYTES: Final = 64 * 1024
_BACKOFF: Final = (0.05, 1.0)
_LOOK_AGAIN: Final = 60.0
_NO_TOPIC: Final = (
    "the topic does not exist: no module of this name has started on this Kafka (case matters)"
)
_NOT_TAKEN: Final = "Kafka has not taken it yet"


class _Lane:
    """What waits for one partition, in order, and the batch that is on its way there."""

    __slots__ = ("backoff", "partition", "queue", "reason", "resting", "sending", "topic")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self.queue: deque[Delivery] = deque()
        self.sending: list[Delivery] = []
        self.resting = False
        self.backoff = _BACKOFF[0]
        self.reason = _NOT_TAKEN


class _Topic:
    """The partitions of one topic; until their number is known its events wait here."""

    __slots__ = ("count", "lanes", "looked_up", "lookup", "name", "reason", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.looked_up = 0.0
        self.lookup: asyncio.Task[None] | None = None
        self.lanes: dict[int, _Lane] = {}
        self.waiting: deque[Delivery] = deque()
        self.reason = "its partitions are not known yet"


def _report_unsent(arrived: deque[Delivery]) -> None:
    if unsent := sum(not delivery.done() for delivery in arrived):
        _logger.error("%d events were produced and never sent: no broker was started", unsent)


class Outbox:
    """Takes events from any thread, at any time; sends them while it is open.

    Args:
        delivery_timeout: seconds after which a delivery ends, whatever became of it.
        max_events, max_bytes: what may wait before `put` refuses.
    """

    def __init__(
        self, *, delivery_timeout: float, max_events: int, max_bytes: int, metrics: Metrics
    ) -> None:
        self._timeout = delivery_timeout
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._lock = threading.Lock()
        self._events = 0
        self._bytes = 0
        self._arrived: deque[Delivery] = deque()
        self._topics: dict[str, _Topic] = {}
        self._transport: Transport | None = None
        self._address: tuple[tuple[str, bytes], ...] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context = Context()
        self._thread = 0
        self._scheduled = False
        self._acknowledged_at = 0.0
        self._closed: str | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None
        self._roomy = asyncio.Event()
        weakref.finalize(self, _report_unsent, self._arrived)

    def __len__(self) -> int:
        """Return how many events wait for their end."""
        return self._events

    def put(  # noqa: PLR0913  # what one event can ask for
        self,
        topic: str,
        record: Outgoing,
        *,
        keyed: bool = False,
        addressed: bool = False,
        urgent: bool = False,
        partition: int | None = None,
        useless_after: float | None = None,
        on_failure: Callable[[DeliveryError], bool] | None = None,
    ) -> Delivery:
        """Take an event; callable from any thread.

        Args:
            topic: where it goes.
            record: what goes there.
            keyed: the key was chosen by the user, so its partition is the one Java would take.
            addressed: it is a request, so our reply address is added to its headers.
            urgent: it is taken even when the outbox is full: an answer that ends work.
            partition: the only partition that will do.
            useless_after: the time of the loop after which it need not be sent any more.
            on_failure: told of a failure; returns whether somebody got to know of it.

        Raises:
            OutboxFullError: too much is waiting; nothing was taken.
            BrokerClosedError: the broker has stopped.
        """
        delivery = Delivery(self, topic, record, partition)
        if keyed or addressed or useless_after is not None:
            delivery._keyed = keyed
            delivery._addressed = addressed
            delivery._useless_after = useless_after
        delivery._on_failure = on_failure
        with self._lock:
            if self._closed is not None:
                raise BrokerClosedError(self._closed)
            if not urgent and self._is_full(delivery._size):
                raise OutboxFullError(topic, self._fullness())
            if not self._scheduled:
                self._schedule()
            self._events += 1
            self._bytes += delivery._size
            self._arrived.append(delivery)
        return delivery

    def _fullness(self) -> str:
        return (
            f"the outbox is full ({self._events} events, {self._bytes} bytes wait for Kafka); "
            "produce more slowly, or raise outbox_events or outbox_bytes"
        )

    def _is_full(self, size: int) -> bool:
        return self._events >= self._max_events or self._bytes + size > self._max_bytes

    def _schedule(self) -> None:
        if self._loop is None:
            return
        ours = threading.get_ident() == self._thread
        call_soon = self._loop.call_soon if ours else self._loop.call_soon_threadsafe
        try:
            call_soon(self._pump, context=self._context)  # not that of who produces: it would stay
        except RuntimeError as exc:
            msg = "the event loop of the broker was closed without stopping it"
            raise BrokerClosedError(msg) from exc
        self._scheduled = True

    def open(self, transport: Transport, address: Sequence[tuple[str, bytes]] = ()) -> None:
        """Start sending in the running loop; *address* is added to the headers of requests."""
        with self._lock:
            self._address = tuple(address)
            self._transport = transport
            self._loop = asyncio.get_running_loop()
            self._context = copy_context()
            self._thread = threading.get_ident()
            self._schedule()

    @property
    def full(self) -> bool:
        """Whether so much waits that `put` refuses what is not urgent."""
        return self._is_full(0)

    def stuck(self) -> float:
        """Return the seconds without an acknowledgement while something waits for one; else 0.

        One topic that does not exist, or one partition that takes nothing, is not Kafka.
        """
        if self._loop is None:
            return 0.0
        lanes = (lane for topic in self._topics.values() for lane in topic.lanes.values())
        heads = [
            queue[0]._expires for lane in lanes for queue in (lane.queue, lane.sending) if queue
        ]
        if not heads:
            return 0.0
        began = min(heads) - self._timeout
        return max(0.0, self._loop.time() - max(began, self._acknowledged_at))

    async def room(self) -> None:
        """Return when something more may be put."""
        while self.full:
            self._roomy.clear()
            await self._roomy.wait()

    async def flush(self, timeout: float) -> None:
        """Return when everything has ended, or *timeout* seconds have passed."""
        self._resume_all()
        if self._events:
            if self._emptied is None or self._emptied.done():
                self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._emptied}, timeout=timeout)

    def _resume_all(self) -> None:
        """Go on where a loop that is closing has cancelled what was under way."""
        self._pump()
        for topic in list(self._topics.values()):
            if topic.waiting:
                self._look_up(topic)
            for lane in topic.lanes.values():
                self._send(lane)

    def refuse(self, why: str) -> None:
        """Take nothing any more; what was taken is still sent."""
        with self._lock:
            self._closed = why

    def close(self) -> None:
        """Stop sending; what has not ended fails."""
        self._transport = None
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._take_arrived(self._loop.time() if self._loop else 0.0)
        for topic in self._topics.values():
            if topic.lookup is not None:
                with suppress(RuntimeError):  # its loop was closed
                    topic.lookup.cancel()
            self._fail(topic.waiting, "the broker stopped before it was sent")
            for lane in topic.lanes.values():
                self._end(lane.sending, DeliveryUnknownError(topic.name, "the broker stopped"))
                self._fail(lane.queue, "the broker stopped before it was sent")
        self._topics.clear()
        self._loop = None

    def withdraw(self, delivery: Delivery) -> DeliveryError | None:
        """Give up an event that was not sent yet; returns why it was not, or None if it was."""
        if delivery._state is not WAITING:
            return None
        topic = self._topics.get(delivery.topic)
        lane = topic.lanes.get(delivery.partition or 0) if topic else None
        reason = lane.reason if lane else topic.reason if topic else "the broker has not started"
        error = DeliveryError(delivery.topic, reason, retriable=True)
        delivery._noticed = True
        delivery._on_failure = None
        self._end([delivery], error)
        return error

    def wait_for(self, delivery: Delivery) -> asyncio.Future[None]:
        """Return a future of the running loop that ends with *delivery*."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._lock:  # it may be awaited from several threads
            delivery._waiters = (*delivery._waiters, waiter)
        if delivery._state is ENDED:
            wake(waiter)
        elif self._loop is None:
            self._bound_wait(loop, waiter, delivery)
        return waiter

    def _bound_wait(
        self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None], delivery: Delivery
    ) -> None:
        """End a wait that began before the start, in case the start never comes."""

        def give_up() -> None:
            if self._loop is None and delivery._state is WAITING:
                reason = f"the broker was not started within {self._timeout:g} s"
                self._end([delivery], DeliveryError(delivery.topic, reason, retriable=True))

        timer = loop.call_later(self._timeout, give_up)
        waiter.add_done_callback(lambda _: timer.cancel())

    def _pump(self) -> None:
        with self._lock:
            self._scheduled = False
        if self._transport is None or self._loop is None:
            return
        for lane in self._take_arrived(self._loop.time()):
            self._send(lane)
        if self._events and self._sweeper is None:
            self._sweeper = self._loop.call_later(self._timeout, self._sweep)

    def _take_arrived(self, now: float) -> dict[_Lane, None]:
        """Move what has arrived to its lanes; returns the lanes that were touched."""
        touched: dict[_Lane, None] = {}
        while self._arrived:
            delivery = self._arrived.popleft()
            if delivery._state is ENDED:
                continue
            delivery._expires = now + self._timeout
            if delivery._addressed and delivery._record is not None:
                key, value, headers = delivery._record
                delivery._record = Outgoing(key, value, (*headers, *self._address))
            topic = self._topics.get(delivery.topic)
            if topic is None:
                topic = self._topics[delivery.topic] = _Topic(delivery.topic)
            if (lane := self._lane(topic, delivery)) is not None:
                lane.queue.append(delivery)
                touched[lane] = None
            else:
                topic.waiting.append(delivery)
            if now - topic.looked_up > _LOOK_AGAIN or topic.waiting:
                self._look_up(topic)
        return touched

    def _lane(self, topic: _Topic, delivery: Delivery) -> _Lane | None:
        """Return the lane of a delivery; None until its partition is known to exist."""
        if topic.waiting or not topic.count:
            return None
        if delivery.partition is None:
            key = (delivery._record and delivery._record.key) or b""
            number = murmur2(key) if delivery._keyed else zlib.crc32(key)
            delivery.partition = number % topic.count
        elif delivery.partition >= topic.count:
            return None
        lane = topic.lanes.get(delivery.partition)
        if lane is None:
            lane = topic.lanes[delivery.partition] = _Lane(topic.name, delivery.partition)
        return lane

    def _look_up(self, topic: _Topic) -> None:
        if self._transport is None or topic.lookup is not None:
            return
        topic.lookup = asyncio.get_running_loop().create_task(
            self._look_up_until_known(topic, self._transport)
        )
        topic.lookup.add_done_callback(lambda lookup: self._looked_up(topic, lookup))

    def _looked_up(self, topic: _Topic, lookup: asyncio.Task[None]) -> None:
        """Hand out what waited; a lookup that a closing loop has cancelled is begun again."""
        topic.lookup = None
        if not lookup.cancelled() and (error := lookup.exception()) is not None:
            _logger.error("looking up topic %s failed", topic.name, exc_info=error)
        elif topic.count:
            self._release(topic)
        elif topic.waiting:
            self._look_up(topic)
        else:
            self._topics.pop(topic.name, None)

    async def _look_up_until_known(self, topic: _Topic, transport: Transport) -> None:
        """Ask for a topic's partitions until there are any or nobody waits for them."""
        loop, pause = asyncio.get_running_loop(), _BACKOFF[0]
        while True:
            count = await self._ask(topic, transport)
            if count:
                topic.count, topic.looked_up = count, loop.time()
                return
            if not topic.waiting:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _BACKOFF[1])

    async def _ask(self, topic: _Topic, transport: Transport) -> int:
        try:
            count = await transport.partitions(topic.name)
        except BrokerUnavailableError as exc:
            topic.reason = str(exc)
            return 0
        topic.reason = "" if count else _NO_TOPIC
        return count

    def _release(self, topic: _Topic) -> None:
        """Hand out what waited for the number of partitions."""
        waiting, topic.waiting = topic.waiting, deque()
        lanes: dict[_Lane, None] = {}
        for delivery in waiting:
            if delivery._state is ENDED:
                continue
            if (lane := self._lane(topic, delivery)) is not None:
                lane.queue.append(delivery)
                lanes[lane] = None
            else:
                reason = f"it has no partition {delivery.partition}, only {topic.count}"
                self._end([delivery], DeliveryError(topic.name, reason))
        for lane in lanes:
            self._send(lane)

    def _send(self, lane: _Lane) -> None:
        """Send the next batch of a lane, unless one is on its way."""
        if lane.sending or lane.resting or self._transport is None or self._loop is None:
            return
        batch = self._next_batch(lane, self._loop.time())
        if not batch:
            return
        lane.sending = batch
        records = [delivery._record for delivery in batch if delivery._record is not None]
        sent = self._transport.send(lane.topic, lane.partition, records)
        sent.add_done_callback(partial(self._sent, lane))

    def _next_batch(self, lane: _Lane, now: float) -> list[Delivery]:
        batch: list[Delivery] = []
        size = 0
        while lane.queue:
            delivery = lane.queue[0]
            if delivery._state is not ENDED:
                size += delivery._size
                if batch and size > BATCH_BYTES:
                    break
                if delivery._useless_after is None or delivery._useless_after > now:
                    delivery._state = SENT
                    batch.append(delivery)
                else:
                    delivery._on_failure = None
                    self._end([delivery], DeliveryError(lane.topic, "its deadline passed unsent"))
                    delivery._noticed = True  # by the timeout of the one who asked
            lane.queue.popleft()
        return batch

    def _sent(self, lane: _Lane, sent: asyncio.Future[Appended]) -> None:
        """Settle the batch that was on its way and send the next."""
        batch, lane.sending = lane.sending, []
        error = self._error_of(lane, sent)
        if error is None:
            self._settle(batch, sent.result())
            lane.backoff, lane.reason = _BACKOFF[0], _NOT_TAKEN
        elif error.retriable and not isinstance(error, DeliveryUnknownError):
            self._put_back(lane, batch, error)
            return
        else:
            self._end(batch, error)
        self._send(lane)

    def _error_of(self, lane: _Lane, sent: asyncio.Future[Appended]) -> DeliveryError | None:
        if sent.cancelled():
            return DeliveryUnknownError(lane.topic, "sending was cancelled")
        error = sent.exception()
        if error is None or isinstance(error, DeliveryError):
            return error
        _logger.error("a transport must end a send in a DeliveryError", exc_info=error)
        return DeliveryUnknownError(lane.topic, type(error).__name__)

    def _settle(self, batch: list[Delivery], appended: Appended) -> None:
        timestamp = appended.timestamp / 1000
        if self._loop is not None:
            self._acknowledged_at = self._loop.time()
        known = appended.offset != UNKNOWN
        offsets = itertools.count(appended.offset) if known else itertools.repeat(UNKNOWN)
        for offset, delivery in zip(offsets, batch, strict=False):
            if delivery._state is not ENDED:
                delivery.offset, delivery.timestamp = offset, timestamp
        self._end(batch, None)

    def _put_back(self, lane: _Lane, batch: list[Delivery], error: DeliveryError) -> None:
        """Queue a batch again that is surely not in the log, and rest a little."""
        again = [delivery for delivery in batch if delivery._state is not ENDED]
        for delivery in again:
            delivery._state = WAITING
        lane.queue.extendleft(reversed(again))
        lane.reason = str(error)
        if self._loop is None:
            return
        lane.resting = True
        self._loop.call_later(lane.backoff, self._resume, lane)
        lane.backoff = min(lane.backoff * 2, _BACKOFF[1])

    def _resume(self, lane: _Lane) -> None:
        lane.resting = False
        self._send(lane)

    def _sweep(self) -> None:
        """End what has waited too long; come again when the next one will have."""
        self._sweeper = None
        if self._loop is None:
            return
        now = self._loop.time()
        earliest = now + self._timeout
        for topic in self._topics.values():
            earliest = min(earliest, self._expire(topic.waiting, now, topic.reason))
            for lane in topic.lanes.values():
                for delivery in lane.sending:
                    if delivery._expires <= now:
                        reason = f"no acknowledgement within {self._timeout:g} s"
                        self._end([delivery], DeliveryUnknownError(lane.topic, reason))
                    elif delivery._state is not ENDED:
                        earliest = min(earliest, delivery._expires)
                earliest = min(earliest, self._expire(lane.queue, now, lane.reason))
        if self._events:
            self._sweeper = self._loop.call_at(earliest, self._sweep)

    def _expire(self, queue: deque[Delivery], now: float, reason: str) -> float:
        """End the expired head of a queue; returns when the next one expires."""
        while queue and (queue[0]._expires <= now or queue[0]._state is ENDED):
            delivery = queue.popleft()
            text = f"not sent within {self._timeout:g} s: {reason}"
            self._end([delivery], DeliveryError(delivery.topic, text, retriable=True))
        return queue[0]._expires if queue else now + self._timeout

    def _fail(self, queue: deque[Delivery], reason: str) -> None:
        while queue:
            delivery = queue.popleft()
            self._end([delivery], DeliveryError(delivery.topic, reason, retriable=True))

    def _end(self, deliveries: Iterable[Delivery], error: DeliveryError | None) -> None:
        """End those that have not ended; every delivery is ended here, once."""
        events = size = 0
        for delivery in deliveries:
            if delivery._state is not ENDED:
                events += 1
                size += delivery._size
                delivery._end(error)
        if not events:
            return
        self._metrics.count("events_undelivered" if error else "events_delivered", events)
        with self._lock:
            self._events -= events
            self._bytes -= size
        if not self._is_full(0):
            self._roomy.set()
        if not self._events and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)


class Transfer:
    """A record on its way to a topic of ours; done once it is there, however often it fails.

    Until then the offset that it comes from is not committed, so it is not lost when the broker
    stops before. With our headers it may be too large for Kafka; *if_too_large* goes instead.
    """

    def __init__(
        self,
        outbox: Outbox,
        topic: str,
        record: Outgoing,
        *,
        partition: int | None = None,
        if_too_large: tuple[str, Outgoing] | None = None,
    ) -> None:
        self._outbox = outbox
        self._if_too_large = if_too_large
        self._topic = topic
        self._record = record
        self._partition = partition
        self.delivery = self._put()

    def _put(self) -> Delivery:
        return self._outbox.put(
            self._topic,
            self._record,
            keyed=self._record.key is not None,
            urgent=True,
            partition=self._partition,
            on_failure=self._try_again,
        )

    def _try_again(self, error: DeliveryError) -> bool:
        if error.too_large and self._if_too_large is not None:
            (self._topic, self._record), self._if_too_large = self._if_too_large, None
            self._partition = None
            _logger.error("an event goes to %s without its value: %s", self._topic, error)
            self._put_again()
            return True
        _logger.error("an event waits for its way out and holds back commits: %s", error)
        if not error.retriable:
            self._partition = None  # the topic may have fewer partitions than it had
        asyncio.get_running_loop().call_later(_BACKOFF[1], self._put_again)
        return True

    def _put_again(self) -> None:
        with suppress(BrokerClosedError):
            self.delivery = self._put()

    def done(self) -> bool:
        """Return whether it is there."""
        return self.delivery.offset is not None
