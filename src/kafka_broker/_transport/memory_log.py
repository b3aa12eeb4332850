"""The log in memory and its consumer groups: what all transports of one name share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from kafka_broker._transport import FETCH_TIMEOUT, Appended, Outgoing
from kafka_broker.errors import BrokerUnavailableError, DeliveryError, DeliveryUnknownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kafka_broker._transport import Headers, TopicSpec
    from kafka_broker._transport.memory_consumer import MemorySubscription

_registry = threading.Lock()
_nodes: dict[str, Node] = {}
_epochs: WeakKeyDictionary[asyncio.AbstractEventLoop, float] = WeakKeyDictionary()


class MemoryRecord(NamedTuple):
    """One record of the log; ``timestamp`` is in milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def node_of(name: str) -> Node:
    with _registry:
        return _nodes.setdefault(name, Node())


def now_of(loop: asyncio.AbstractEventLoop) -> float:
    """Return the seconds since the epoch on a clock that moves with the loop's, virtual or not."""
    with _registry:
        return loop.time() + _epochs.setdefault(loop, time.time() - loop.time())


def soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """Call *callback* in *loop*, from any thread."""
    with suppress(RuntimeError):  # that loop was closed meanwhile
        loop.call_soon_threadsafe(callback, *args)


def settle(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


@dataclass(eq=False, slots=True)
class Send:
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
            soon(loop, loop.call_later, delay, settle, self.future, self.outcome)
        else:
            soon(loop, settle, self.future, self.outcome)


class Node:
    """The state of one cluster: under one lock, which is never held across an await."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.topics: dict[str, list[list[MemoryRecord]]] = {}
        self.groups: defaultdict[str, Group] = defaultdict(lambda: Group(self))
        self.down = False
        self.creatable = True
        self.faults: defaultdict[str, deque[DeliveryError]] = defaultdict(deque)
        self.delays: dict[str, float] = {}
        self.breaks: Counter[str] = Counter()
        self._holds: Counter[str] = Counter()
        self._held: defaultdict[str, list[Send]] = defaultdict(list)
        self._parked: list[Send] = []
        self._waiters: dict[asyncio.Future[bool], str] = {}

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
        """Return where one begins who asks for *offset*: None is the end, beyond it the start."""
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

    def accept(self, send: Send) -> None:
        with self.lock:
            if self.down:
                self._parked.append(send)
                return
            send.outcome = self._handle(send)
            if self._holds[send.topic]:
                self._held[send.topic].append(send)
            else:
                send.answer(self.delays.get(send.topic, 0.0))

    def _handle(self, send: Send) -> Appended | DeliveryError:
        faults = self.faults[send.topic]
        fault = faults.popleft() if faults else None
        if fault is not None and not isinstance(fault, DeliveryUnknownError):
            return fault
        now = now_of(send.future.get_loop())
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
                    soon(waiter.get_loop(), settle, waiter, False)  # noqa: FBT003  # the outcome

    async def poll(
        self,
        topic: str,
        take: Callable[[], list[MemoryRecord]],
        timeout: float = FETCH_TIMEOUT,
    ) -> list[MemoryRecord]:
        """Return what *take* returns as soon as that is something, or *timeout* is over."""
        await asyncio.sleep(0)  # a backlog must not keep the other tasks of the loop from running
        loop = asyncio.get_running_loop()
        end, over = loop.time() + timeout, False
        while True:
            with self.lock:
                records = take()
                if records or over:
                    return records
                waiter: asyncio.Future[bool] = loop.create_future()
                self._waiters[waiter] = topic
            timer = loop.call_at(end, settle, waiter, True)  # noqa: FBT003  # the outcome
            try:
                over = await waiter
            finally:
                timer.cancel()
                with self.lock:
                    self._waiters.pop(waiter, None)


class Group:
    """A consumer group that rebalances eagerly; its methods are called under the node's lock."""

    def __init__(self, node: Node) -> None:
        self.committed: dict[tuple[str, int], int] = {}
        self.generation = 0
        self.node = node
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

    def expel(self) -> None:
        """Remove everyone; who has partitions joins again when it has been told that it lost them.

        Who is just giving them up need not be told again, and who has none joins again at once.
        """
        expelled, giving_up = self._members, self._revoking
        self._members, self._revoking = set(), None
        self.generation += 1
        if giving_up is None:
            giving_up = {member for member in expelled if member.owned}
            for member in giving_up:
                member.pause()
        for member in expelled:
            member.owned = frozenset()
        for member in expelled - giving_up:
            self.join(member)

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
        size, larger = divmod(len(self.node.topics[topic]), len(sharing))
        start = 0
        for index, member in enumerate(sharing):
            end = start + size + (index < larger)
            member.owned = frozenset(range(start, end))
            soon(member.loop, member.start, member.owned, self.generation)
            start = end
