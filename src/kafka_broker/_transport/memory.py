"""The transport without Kafka: a log in this process, with Kafka's semantics.

All transports on the same ``memory://name`` share one log, whichever thread and event loop they
live in; it lasts as long as the process. `MemoryCluster` looks into it and breaks it on demand.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from kafka_broker._transport import Appended, Outgoing
from kafka_broker.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Headers, OnAssigned, OnRevoked, TopicSpec

_logger = logging.getLogger("kafka_broker.transport")

_SCHEME: Final = "memory://"
_POLL_TIMEOUT: Final = 0.5
_POLL_RECORDS: Final = 500
_CLOSE_TIMEOUT: Final = 3.0

_registry = threading.Lock()
_nodes: dict[str, _Node] = {}
_epochs: WeakKeyDictionary[asyncio.AbstractEventLoop, float] = WeakKeyDictionary()
_joined = itertools.count(1)


class MemoryRecord(NamedTuple):
    """One record of the log; ``timestamp`` is in milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def cluster(name: str = "") -> MemoryCluster:
    """Return the cluster behind ``memory://name``; it comes into being when first asked for."""
    return MemoryCluster(name)


class MemoryCluster:
    """The log behind ``memory://name``: look into it, write to it, break it; from any thread.

    Two objects of the same name are the same cluster.
    """

    def __init__(self, name: str = "") -> None:
        self._node = _node(name)

    def down(self) -> None:
        """Answer nobody until `up`: calls fail, fetches stay empty, sends stay open."""
        self._node.down = True

    def up(self) -> None:
        """Answer again, beginning with the sends that are still open."""
        self._node.up()

    def deny_create(self) -> None:
        """Refuse from now on to create topics, like a Kafka that does not grant it."""
        self._node.creatable = False

    def fail_sends(self, topic: str, error: DeliveryError, count: int = 1) -> None:
        """End the next *count* sends to *topic* in *error*.

        With a `DeliveryUnknownError` the records are appended and only their acknowledgement is
        lost; with any other error they are not appended.
        """
        with self._node.lock:
            self._node.faults[topic].extend([error] * count)

    def delay_sends(self, topic: str, seconds: float) -> None:
        """Append at once but acknowledge sends to *topic* only after *seconds*; 0 ends this."""
        self._node.delays[topic] = seconds

    @contextmanager
    def hold_sends(self, topic: str) -> Iterator[None]:
        """Append at once but acknowledge no send to *topic* before this context ends."""
        self._node.hold(topic)
        try:
            yield
        finally:
            self._node.release(topic)

    def break_readers(self, topic: str) -> None:
        """Break every open reader and subscription of *topic*: their fetch raises from now on."""
        with self._node.lock:
            self._node.breaks[topic] += 1
            self._node.wake(topic)

    def rebalance(self, group_id: str) -> None:
        """Make the members of the group give their partitions up and get new ones."""
        with self._node.lock:
            self._node.groups[group_id].rebalance()

    def members(self, group_id: str) -> int:
        """Return how many members the group has."""
        with self._node.lock:
            return len(self._node.groups[group_id].alive())

    def committed(self, group_id: str, topic: str) -> dict[int, int]:
        """Return the next offset to read, for each partition where the group has committed."""
        with self._node.lock:
            offsets = sorted(self._node.groups[group_id].committed.items())
        return {partition: offset for (name, partition), offset in offsets if name == topic}

    def records(self, topic: str) -> list[MemoryRecord]:
        """Return everything in *topic*, partition by partition; a missing topic has nothing."""
        with self._node.lock:
            return list(itertools.chain.from_iterable(self._node.topics.get(topic, ())))

    def append(
        self,
        topic: str,
        *,
        partition: int = 0,
        key: bytes | None = None,
        value: bytes | None = None,
        headers: Headers = (),
    ) -> int:
        """Append one record, past all faults, and return its offset.

        Raises:
            BrokerUnavailableError: the topic or the partition does not exist.
        """
        record: tuple[bytes | None, bytes | None, Headers] = (key, value, headers)
        return self._node.append(topic, partition, [record], time.time()).offset


def _node(name: str) -> _Node:
    with _registry:
        return _nodes.setdefault(name, _Node())


def _now(loop: asyncio.AbstractEventLoop) -> float:
    """Return the seconds since the epoch on a clock that moves with the loop's, virtual or not."""
    with _registry:
        return loop.time() + _epochs.setdefault(loop, time.time() - loop.time())


def _soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """Call *callback* in *loop*, from any thread."""
    with suppress(RuntimeError):  # that loop was closed meanwhile
        loop.call_soon_threadsafe(callback, *args)


def _settle(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


@dataclass(eq=False, slots=True)
class _Send:
    """A send that is still open; its future belongs to the loop of the sender."""

    topic: str
    partition: int
    records: Sequence[Outgoing]
    future: asyncio.Future[Appended]
    outcome: Appended | DeliveryError | None = None

    @property
    def abandoned(self) -> bool:
        return self.future.done() or self.future.get_loop().is_closed()

    def answer(self, delay: float = 0.0) -> None:
        loop = self.future.get_loop()
        if delay:
            _soon(loop, loop.call_later, delay, _settle, self.future, self.outcome)
        else:
            _soon(loop, _settle, self.future, self.outcome)


class _Node:
    """The state of one cluster: under one lock, which is never held across an await."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.topics: dict[str, list[list[MemoryRecord]]] = {}
        self.groups: defaultdict[str, _Group] = defaultdict(lambda: _Group(self))
        self.down = False
        self.creatable = True
        self.faults: defaultdict[str, deque[DeliveryError]] = defaultdict(deque)
        self.delays: dict[str, float] = {}
        self.breaks: Counter[str] = Counter()
        self._holds: Counter[str] = Counter()
        self._held: defaultdict[str, list[_Send]] = defaultdict(list)
        self._parked: list[_Send] = []
        self._waiters: dict[asyncio.Future[None], str] = {}

    def check(self) -> None:
        if self.down:
            raise BrokerUnavailableError("the memory cluster is down; call its up()")

    def log(self, topic: str, partition: int) -> list[MemoryRecord]:
        partitions = self.topics.get(topic)
        if partitions is None:
            raise BrokerUnavailableError(f"topic {topic!r} does not exist")
        if not 0 <= partition < len(partitions):
            raise BrokerUnavailableError(f"partition {partition} of {topic!r} does not exist")
        return partitions[partition]

    def position(self, topic: str, partition: int, offset: int | None) -> int:
        """Return where a reader that asks for *offset* begins: None is the end."""
        end = len(self.log(topic, partition))
        if offset is None:
            return end
        return offset if 0 <= offset <= end else 0

    def create(self, topics: Sequence[TopicSpec], servers: str) -> None:
        with self.lock:
            self.check()
            for spec in topics:
                if spec.name in self.topics:
                    continue
                if not self.creatable:
                    raise BrokerUnavailableError(
                        f"topic {spec.name!r} does not exist and cannot be created by this client; "
                        f"allow it to, or run: {spec.command(servers)}"
                    )
                self.topics[spec.name] = [[] for _ in range(spec.partitions)]

    def append(
        self,
        topic: str,
        partition: int,
        records: Iterable[tuple[bytes | None, bytes | None, Headers]],
        now: float,
    ) -> Appended:
        timestamp = int(now * 1000)
        with self.lock:
            log = self.log(topic, partition)
            first = len(log)
            for offset, (key, value, headers) in enumerate(records, first):
                at = (topic, partition, offset, timestamp)
                log.append(MemoryRecord(*at, key, value, tuple(headers)))
            self.wake(topic)
        return Appended(first, timestamp)

    def accept(self, send: _Send) -> None:
        with self.lock:
            if self.down:
                self._parked.append(send)
                return
            send.outcome = self._handle(send)
            if self._holds[send.topic]:
                self._held[send.topic].append(send)
            else:
                send.answer(self.delays.get(send.topic, 0.0))

    def _handle(self, send: _Send) -> Appended | DeliveryError:
        faults = self.faults[send.topic]
        fault = faults.popleft() if faults else None
        if fault is not None and not isinstance(fault, DeliveryUnknownError):
            return fault
        now = _now(send.future.get_loop())
        try:
            appended = self.append(send.topic, send.partition, send.records, now)
        except BrokerUnavailableError as exc:
            return DeliveryError(send.topic, str(exc), retriable=True)
        return fault or appended

    def up(self) -> None:
        with self.lock:
            self.down = False
            parked, self._parked = self._parked, []
            for send in parked:
                if not send.abandoned:
                    self.accept(send)
            self.wake()

    def hold(self, topic: str) -> None:
        with self.lock:
            self._holds[topic] += 1

    def release(self, topic: str) -> None:
        with self.lock:
            self._holds[topic] -= 1
            if not self._holds[topic]:
                for send in self._held.pop(topic, ()):
                    send.answer()

    def wake(self, topic: str | None = None) -> None:
        """Let fetches on *topic*, or on all topics, look again."""
        with self.lock:
            for waiter, waits_for in list(self._waiters.items()):
                if topic in (None, waits_for):
                    del self._waiters[waiter]
                    _soon(waiter.get_loop(), _settle, waiter, None)

    async def poll(self, topic: str, take: Callable[[], list[MemoryRecord]]) -> list[MemoryRecord]:
        """Return what *take* returns as soon as that is something, or half a second is over."""
        await asyncio.sleep(0)  # a backlog must not keep the other tasks of the loop from running
        loop = asyncio.get_running_loop()
        end = loop.time() + _POLL_TIMEOUT
        while True:
            with self.lock:
                records = take()
                if records or loop.time() >= end:
                    return records
                waiter: asyncio.Future[None] = loop.create_future()
                self._waiters[waiter] = topic
            timer = loop.call_at(end, _settle, waiter, None)
            try:
                await waiter
            finally:
                timer.cancel()
                with self.lock:
                    self._waiters.pop(waiter, None)


class _Group:
    """A consumer group that rebalances eagerly; its methods are called under the node's lock."""

    def __init__(self, node: _Node) -> None:
        self.committed: dict[tuple[str, int], int] = {}
        self.generation = 0
        self._node = node
        self._members: set[MemorySubscription] = set()
        self._revoking: set[MemorySubscription] | None = None

    def alive(self) -> set[MemorySubscription]:
        return {member for member in self._members if not member.loop.is_closed()}

    def stable(self, generation: int) -> bool:
        return self._revoking is None and self.generation == generation

    def look_after(self) -> None:
        """Notice members whose loop ended without a close, as Kafka does by their silence."""
        if len(self.alive()) < len(self._members):
            self.rebalance()

    def join(self, member: MemorySubscription) -> None:
        self._members.add(member)
        self.rebalance()

    def leave(self, member: MemorySubscription) -> None:
        member.owned = frozenset()
        if member in self._members:
            self._members.remove(member)
            self.rebalance()

    def revoked(self, member: MemorySubscription) -> None:
        """Go on without waiting for *member*; one that was given up meanwhile joins again."""
        if member not in self._members:
            if not member.closed:
                self.join(member)
        elif self._revoking is not None:
            self._revoking.discard(member)
            self._advance()

    def rebalance(self) -> None:
        """Begin a rebalance; one under way takes everyone in who is there at its end."""
        if self._revoking is None:
            self._revoking = {member for member in self._members if member.owned}
            for member in self._members:
                member.pause()
        self._advance()

    def _advance(self) -> None:
        self._members = self.alive()
        if self._revoking is None or self._revoking & self._members:
            return
        self._revoking = None
        self.generation += 1
        for topic in {member.topic for member in self._members}:
            self._assign(topic)

    def _assign(self, topic: str) -> None:
        """Deal out ranges of partitions to the members in the order of their ids, as Kafka does."""
        sharing = sorted((m for m in self._members if m.topic == topic), key=lambda m: m.member_id)
        size, larger = divmod(len(self._node.topics[topic]), len(sharing))
        start = 0
        for index, member in enumerate(sharing):
            end = start + size + (index < larger)
            member.owned = frozenset(range(start, end))
            _soon(member.loop, member.start, member.owned, self.generation)
            start = end


class _Fetcher:
    """What a reader and a subscription share: the next offset of each of their partitions."""

    def __init__(self, node: _Node, topic: str, positions: dict[int, int]) -> None:
        self.topic = topic
        self.closed = False
        self._node = node
        self._breaks = node.breaks[topic]
        self._positions = positions

    @property
    def position(self) -> int:
        """The offset of the next record of the one partition; see `Reader.position`."""
        return next(iter(self._positions.values()), 0)

    async def fetch(self) -> Sequence[MemoryRecord]:
        """Return what has arrived, at most 500 records; see `Reader.fetch`."""
        return await self._node.poll(self.topic, self._take)

    async def close(self) -> None:
        """Wake whoever still fetches; see `Reader.close`."""
        self.closed = True
        self._node.wake(self.topic)

    def _take(self) -> list[MemoryRecord]:
        if self.closed:
            raise BrokerUnavailableError(f"the reader of topic {self.topic!r} is closed")
        if self._breaks != self._node.breaks[self.topic]:
            raise BrokerUnavailableError(f"fetching from topic {self.topic!r} failed")
        records: list[MemoryRecord] = []
        if self._node.down:
            return records
        for partition, position in list(self._positions.items()):
            log = self._node.log(self.topic, partition)
            batch = log[position : position + _POLL_RECORDS - len(records)]
            if batch:
                del self._positions[partition]  # to the end, so that no partition starves another
                self._positions[partition] = batch[-1].offset + 1
                records += batch
        return records


class MemoryReader(_Fetcher):
    """A `Reader` of the memory log: a fetcher of one partition."""

    @property
    def position(self) -> int:
        """The offset of the next record that `fetch` will return."""
        (position,) = self._positions.values()
        return position


class MemorySubscription(_Fetcher):
    """A `Subscription` of the memory log.

    Everything that other members touch is under the node's lock; the callbacks run in our loop.
    """

    def __init__(
        self,
        node: _Node,
        topic: str,
        settings: BrokerSettings,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
    ) -> None:
        super().__init__(node, topic, {})
        self.loop = asyncio.get_running_loop()
        self.member_id = f"{settings.instance}-{next(_joined):09d}"
        self.owned: frozenset[int] = frozenset()
        self._group = node.groups[settings.group_id]
        self._rebalance_timeout = settings.rebalance_timeout
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._giving_up: asyncio.Task[None] | None = None

    async def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commit, if all of the partitions are still ours; see `Subscription.commit`."""
        await asyncio.sleep(0)
        with self._node.lock:
            self._node.check()
            if not self.owned.issuperset(offsets):
                return False
            places = {(self.topic, partition): offset for partition, offset in offsets.items()}
            self._group.committed.update(places)
            return True

    async def close(self) -> None:
        """Let a rebalance that runs end within seconds, then leave; see `Subscription.close`."""
        self.closed = True
        task = self._giving_up
        try:
            if task is not None:
                await asyncio.wait({task}, timeout=_CLOSE_TIMEOUT)
                if task.cancel():
                    await asyncio.wait({task}, timeout=_CLOSE_TIMEOUT)
        finally:
            with self._node.lock:
                self._group.leave(self)
                self._node.wake(self.topic)

    def pause(self) -> None:
        """Fetch nothing more, and begin to give up what we own; called from any loop."""
        self._positions = {}
        if self.owned:
            _soon(self.loop, self._begin_giving_up, self.owned)

    def _begin_giving_up(self, partitions: frozenset[int]) -> None:
        if not self.closed:
            self._giving_up = self.loop.create_task(self._give_up(partitions))

    async def _give_up(self, partitions: frozenset[int]) -> None:
        expiry = self.loop.call_later(self._rebalance_timeout, self._expire)
        try:
            await self._on_revoked(partitions)
        except Exception:
            _logger.exception("giving up partitions of %s failed", self.topic)
        finally:
            expiry.cancel()
            with self._node.lock:
                self._group.revoked(self)

    def _expire(self) -> None:
        _logger.warning("%s took too long to give up its partitions", self.member_id)
        with self._node.lock:
            self._group.leave(self)

    def start(self, partitions: frozenset[int], generation: int) -> None:
        """Tell of an assignment, then fetch from its committed offsets; called in our loop."""
        if self.closed:
            return
        try:
            self._on_assigned(partitions)
        except Exception:
            _logger.exception("taking partitions of %s failed", self.topic)
        with self._node.lock:
            if self._group.stable(generation):
                committed = self._group.committed
                self._positions = {
                    partition: self._node.position(
                        self.topic, partition, committed.get((self.topic, partition), 0)
                    )
                    for partition in sorted(partitions)
                }
                self._node.wake(self.topic)

    def _take(self) -> list[MemoryRecord]:
        self._group.look_after()
        return super()._take()


class MemoryTransport:
    """A `Transport` on a `MemoryCluster`; all waiting is on the clock of the event loop.

    Raises:
        ConfigurationError: ``bootstrap_servers`` does not begin with ``memory://``.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        servers = settings.bootstrap_servers
        if not servers.startswith(_SCHEME):
            raise ConfigurationError(f"bootstrap_servers must begin with {_SCHEME}: {servers}")
        self._settings = settings
        self._node = _node(servers.removeprefix(_SCHEME))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = False
        self._sends: dict[asyncio.Future[Appended], str] = {}

    async def start(self) -> None:
        """Find the cluster up; see `Transport.start`."""
        self._loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        self._node.check()
        self._running = True

    async def stop(self) -> None:
        """End what is still being sent; see `Transport.stop`."""
        self._running = False
        for future, topic in list(self._sends.items()):
            _settle(future, DeliveryUnknownError(topic, "the transport stopped"))

    def now(self) -> float:
        """Return the seconds since the epoch; they move with the clock of our event loop."""
        if self._loop is None:
            with suppress(RuntimeError):
                self._loop = asyncio.get_running_loop()
        return time.time() if self._loop is None else _now(self._loop)

    async def partitions(self, topic: str) -> int:
        """Look the topic up; see `Transport.partitions`."""
        await self._reach()
        return len(self._node.topics.get(topic, ()))

    async def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing; see `Transport.create_topics`."""
        await self._reach()
        self._node.create(topics, self._settings.bootstrap_servers)

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if not self._running:
            raise BrokerUnavailableError("this transport is not running")
        self._node.check()

    def send(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> asyncio.Future[Appended]:
        """Append a batch at once and acknowledge it soon after; see `Transport.send`."""
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        if not self._running:
            reason = "this transport is not running"
            future.set_exception(DeliveryError(topic, reason, retriable=True))
            return future
        self._sends[future] = topic
        future.add_done_callback(self._sends.pop)
        self._node.accept(_Send(topic, partition, records, future))
        return future

    async def read(self, topic: str, partition: int, offset: int | None = None) -> MemoryReader:
        """Open a reader without a group; see `Transport.read`."""
        await self._reach()
        with self._node.lock:
            position = self._node.position(topic, partition, offset)
            return MemoryReader(self._node, topic, {partition: position})

    async def subscribe(
        self, topic: str, *, on_assigned: OnAssigned, on_revoked: OnRevoked
    ) -> MemorySubscription:
        """Join the group; see `Transport.subscribe`."""
        await self._reach()
        with self._node.lock:
            self._node.log(topic, 0)
            member = MemorySubscription(self._node, topic, self._settings, on_assigned, on_revoked)
            self._node.groups[self._settings.group_id].join(member)
        return member
