"""`ConsumerStorage`: what has arrived, by correlation id, and those who wait for it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from kafka_broker import _wire
from kafka_broker._caller import at_most, while_client_waits
from kafka_broker._event import PENDING, EventObject
from kafka_broker._slots import DEFAULT, Arrival, Default, Slot
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerError,
    ConfigurationError,
    DeliveryError,
)

if TYPE_CHECKING:
    from uuid import UUID

    from kafka_broker._metrics import Metrics
    from kafka_broker._transport import Record

_logger = logging.getLogger("kafka_broker.storage")

_REMEMBERED: Final = 8192


class ConsumerStorage:
    """Holds what has arrived until it is taken, and hands each reply to the one who waits for it.

    *Events* of the module's own topic come here when the broker has no router. They are never
    dropped: when ``limit`` of them are held, fetching stops until some are taken. *Replies* that
    nobody waits for yet are kept for ``ttl`` seconds, at most ``limit`` of them, oldest out first.

    It belongs to the event loop of its broker.
    """

    def __init__(self, *, timeout: float, ttl: float, limit: int, metrics: Metrics) -> None:
        self._timeout = timeout
        self._ttl = ttl
        self._limit = limit
        self._metrics = metrics
        self._closed: str | None = "the broker is not running: start it first"
        self._ended: set[str] = set()
        self._ended_before: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._slots: dict[str, list[Slot]] = {}
        self._stored: dict[str, list[Arrival]] = {}
        self._arrived: asyncio.Queue[Arrival] = asyncio.Queue()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._events: OrderedDict[Arrival, None] = OrderedDict()
        self._parked: OrderedDict[Arrival, None] = OrderedDict()
        self._expiry: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = math.inf
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_full = False

    async def receive(self) -> bool:
        """Wait until something new has arrived, move it into the storage and return True.

        Raises:
            BrokerClosedError: the broker is not running, or stopped meanwhile.
        """
        while True:
            self._check_open()
            with while_client_waits():
                await self._news.wait()
            if await self.poll():
                return True

    def _check_open(self) -> None:
        if self._closed is not None:
            raise BrokerClosedError(self._closed)
        if self._loop is not asyncio.get_running_loop():
            msg = "the broker runs in another event loop: wait in that one"
            raise ConfigurationError(msg)

    async def poll(self) -> bool:
        """Move what has arrived into the storage without waiting; returns whether anything came.

        Raises:
            BrokerClosedError: the broker is not running.
            ConfigurationError: the broker runs in another event loop.
        """
        self._check_open()
        news = self._news.is_set()
        self._news.clear()
        self._move()
        return news

    def _move(self) -> None:
        while not self._arrived.empty():
            arrival = self._arrived.get_nowait()
            if arrival in self._events or arrival in self._parked:
                self._stored.setdefault(arrival.correlation_id, []).append(arrival)

    async def consume(
        self, correlation_id: str | UUID, *, timeout: float | Default | None = DEFAULT
    ) -> EventObject[Any]:
        """Wait for the event with this id, remove it and return it.

        Several waiters on one id are served in order, one event each.

        Args:
            correlation_id: of the event.
            timeout: in seconds; ``reply_timeout`` of the settings unless given, None for no limit.

        Raises:
            ReplyTimeoutError: nothing came in time.
            RemoteError: the reply tells that the handler failed.
            NoHandlerError: the reply tells that nobody there handles the event.
            DeliveryError: an event that was produced with this id was not delivered.
            EventDecodeError: what came is no event.
            BrokerClosedError: the broker is not running, or stopped meanwhile.
        """
        key = str(correlation_id)
        self._move()
        if key in self._stored:
            return _read(self._take(self._stored[key][0]))
        return await self.collect(self.expect(key, timeout))

    def expect(
        self,
        correlation_id: str,
        timeout: float | Default | None = DEFAULT,
        *,
        replies_only: bool = False,
    ) -> Slot:
        """Open a slot for *correlation_id*; whoever opens it has to `collect` or `release` it.

        Args:
            correlation_id: of what is waited for.
            timeout: as `consume`.
            replies_only: an event with this id that asks for something is no reply.

        Raises:
            BrokerClosedError: the broker is not running.
            ConfigurationError: the broker runs in another event loop.
        """
        self._check_open()
        self._room.set()  # the event that is waited for may be the one that waits for room
        loop = asyncio.get_running_loop()
        slot = Slot(loop=loop)
        slot.replies_only = replies_only
        slot.correlation_id = correlation_id
        slot.timeout = self._seconds(timeout)
        slot.expires = loop.time() + slot.timeout
        self._slots.setdefault(correlation_id, []).append(slot)
        if slot.expires < self._sweep_at:
            self._sweep_from(slot.expires)
        return slot

    def _sweep_from(self, when: float) -> None:
        """End waits at *when*; a timer for each of them costs 2 us and 200 bytes more."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep_at = when
        self._sweeper = None
        if when < math.inf and self._loop is not None:
            self._sweeper = self._loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        """End the waits whose time is over; come again for the next one that still waits."""
        waits = [slot for slots in self._slots.values() for slot in slots if not slot.done()]
        now = asyncio.get_running_loop().time()
        for slot in waits:
            if slot.expires <= now:
                slot.expire()
        self._sweep_from(min((slot.expires for slot in waits if not slot.done()), default=math.inf))

    def _seconds(self, timeout: float | Default | None) -> float:
        """Return how long to wait: no longer than the client that is answered here does."""
        if isinstance(timeout, Default):
            timeout = self._timeout
        return at_most(math.inf if timeout is None else timeout)

    async def collect(self, slot: Slot) -> EventObject[Any]:
        """Wait for what comes into *slot*, close it, and return the event; raises as `consume`."""
        try:
            with while_client_waits():
                arrival = await slot
        except asyncio.CancelledError:
            self.release(slot)
            if slot.done() and not slot.cancelled() and slot.exception() is None:
                self._give_back(slot.result())
            raise
        except BaseException:
            self.release(slot)
            raise
        self.release(slot)
        arrival.taken = True
        return _read(arrival)

    def begin(self, correlation_id: str) -> None:
        """Take replies under this id again: a new event with it has been produced."""
        self._ended.discard(correlation_id)
        self._ended_before.discard(correlation_id)

    def release(self, slot: Slot) -> None:
        """Close a slot, whatever became of its wait."""
        slots = self._slots.get(slot.correlation_id)
        if slots is None or slot not in slots:
            return
        slots.remove(slot)
        if not slots:
            del self._slots[slot.correlation_id]
            self._remember(slot.correlation_id)
        if not self._slots:
            self._sweep_from(math.inf)
        if slot.done() and not slot.cancelled():
            slot.exception()  # retrieved: a wait that was cancelled as it failed logs no noise

    async def consume_all(self) -> dict[str, EventObject[Any]]:
        """Take everything that has arrived, without waiting: events by correlation id.

        Of several events with one id the first is taken; the others stay for the next call.
        What cannot be read is logged and left out.
        """
        await self.poll()
        taken: dict[str, EventObject[Any]] = {}
        for key in list(self._stored):
            arrival = self._take(self._stored[key][0])
            try:
                taken[key] = arrival.open()
            except BrokerError as exc:
                _logger.error("what arrived as %s is no event: %s", key, exc)  # noqa: TRY400  # no payload
        if self._stored:
            self._news.set()
        return taken

    def get(
        self, correlation_id: str | UUID, default: EventObject[Any] | None = None
    ) -> EventObject[Any] | None:
        """Return the event with this id and leave it there; *default* if it is not in the storage.

        Raises:
            DeliveryError: an event that was produced with this id was not delivered.
            EventDecodeError: what came is no event.
        """
        arrivals = self._stored.get(str(correlation_id))
        return arrivals[0].open() if arrivals else default

    def remove(self, correlation_id: str | UUID) -> EventObject[Any] | None:
        """Take the event with this id out of the storage, if it is there; raises as `get`."""
        arrivals = self._stored.get(str(correlation_id))
        return self._take(arrivals[0]).open() if arrivals else None

    def __len__(self) -> int:
        """Return how many events are in the storage."""
        return sum(map(len, self._stored.values()))

    def __contains__(self, correlation_id: object) -> bool:
        """Return whether an event with this id is in the storage."""
        return str(correlation_id) in self._stored

    @property
    def waiting(self) -> int:
        """How many waits are open."""
        return sum(map(len, self._slots.values()))

    def waits_for(self, correlation_id: str) -> bool:
        """Return whether somebody waits for this id now."""
        return any(not slot.done() for slot in self._slots.get(correlation_id, ()))

    async def offer(self, event: EventObject[Any]) -> Arrival:
        """Add an event of the module's topic, as soon as there is room for it."""
        while len(self._events) >= self._limit and not self.waits_for(event.correlation_id):
            self._tell_full()
            self._room.clear()
            await self._room.wait()
        arrival = Arrival(event.correlation_id, event)
        self._add_event(arrival)
        return arrival

    def _tell_full(self) -> None:
        if not self._told_full:
            self._told_full = True
            _logger.warning(
                "%d events wait in the storage, so no more are fetched: consume them, give the "
                "broker a router, or raise storage_events",
                self._limit,
            )

    def _add_event(self, arrival: Arrival) -> None:
        if not self._hand_over(arrival):
            self._events[arrival] = None
            self._arrive(arrival)

    def put_reply(self, correlation_id: str, record: Record) -> None:
        """Hand a reply to the one who waits for it, or keep it for a while."""
        arrival = Arrival(correlation_id, record)
        if self._hand_over(arrival):
            self._metrics.count("replies_received")
        elif self._has_ended(correlation_id):
            self._metrics.count("replies_late")
        else:
            self._park(arrival)

    def fail(self, correlation_id: str, error: DeliveryError) -> bool:
        """Tell whoever waits for this id that nothing will come; returns whether anybody did."""
        for slot in self._slots.get(correlation_id, ()):
            if not slot.done():
                slot.set_exception(error)
                return True
        if self._closed is None and not self._has_ended(correlation_id):
            self._park(Arrival(correlation_id, error))
        return False

    def _hand_over(self, arrival: Arrival) -> bool:
        asks = isinstance(arrival.content, EventObject) and arrival.content.status == PENDING
        for slot in self._slots.get(arrival.correlation_id, ()):
            if not slot.done() and not (asks and slot.replies_only):
                slot.set_result(arrival)
                return True
        return False

    def _give_back(self, arrival: Arrival) -> None:
        """Let the next one have what came at the moment its waiter was cancelled."""
        if isinstance(arrival.content, EventObject):
            self._add_event(arrival)
        elif not self._hand_over(arrival):
            self._metrics.count("replies_late")

    def _park(self, arrival: Arrival) -> None:
        loop = asyncio.get_running_loop()
        arrival.expires = loop.time() + self._ttl
        self._parked[arrival] = None
        self._arrive(arrival)
        if len(self._parked) > self._limit:
            self._drop_oldest()
        if self._expiry is None:
            self._expiry = loop.call_at(arrival.expires, self._expire)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._expiry = None
        while self._parked:
            oldest = next(iter(self._parked))
            if oldest.expires > loop.time():
                self._expiry = loop.call_at(oldest.expires, self._expire)
                return
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._metrics.count("replies_dropped")
        self._move()  # or the queue of a broker that never polls would keep what is dropped here
        self._forget(next(iter(self._parked)))

    def _arrive(self, arrival: Arrival) -> None:
        self._arrived.put_nowait(arrival)
        self._news.set()

    def _take(self, arrival: Arrival) -> Arrival:
        arrival.taken = True
        self._forget(arrival)
        return arrival

    def _forget(self, arrival: Arrival) -> None:
        self._parked.pop(arrival, None)
        if arrival in self._events:
            del self._events[arrival]
            self._room.set()
        arrivals = self._stored.get(arrival.correlation_id)
        if arrivals and arrival in arrivals:
            arrivals.remove(arrival)
            if not arrivals:
                del self._stored[arrival.correlation_id]

    def _remember(self, correlation_id: str) -> None:
        """Know a late reply by its id for as long as some thousand further waits."""
        if len(self._ended) >= _REMEMBERED:
            self._ended_before, self._ended = self._ended, set()
        self._ended.add(correlation_id)

    def _has_ended(self, correlation_id: str) -> bool:
        """Return whether the waits for an id that nobody waits for now are over, or just ending."""
        known = (self._slots, self._ended, self._ended_before)
        return any(correlation_id in ids for ids in known)

    def forget_events(self) -> None:
        """Drop the events nobody took: their partitions moved, so another replica has them now."""
        self._move()
        for arrival in list(self._events):
            self._forget(arrival)

    def open(self) -> None:
        """Begin to take arrivals and waits, in the running loop."""
        self._begin()
        self._loop = asyncio.get_running_loop()
        self._closed = None

    def abandon(self) -> None:
        """Forget everything of an event loop that was closed without a stop."""
        self._begin()
        self._closed = "the event loop of the broker was closed"

    def close(self, why: str) -> None:
        """End every wait in `BrokerClosedError`; untaken events go back to Kafka."""
        self._closed = why
        for slots in self._slots.values():
            for slot in slots:
                if not slot.done():
                    slot.set_exception(BrokerClosedError(why))
        self._news.set()
        self.forget_events()
        for timer in (self._expiry, self._sweeper):
            if timer is not None:
                timer.cancel()


def _read(arrival: Arrival) -> EventObject[Any]:
    event = arrival.open()
    if (error := _wire.error_of(event)) is not None:
        raise error
    return event
