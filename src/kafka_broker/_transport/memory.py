"""The transport without Kafka: a log in this process, with Kafka's semantics.

All transports on the same ``memory://name`` share one log, whichever thread and event loop they
live in; it lasts as long as the process. `MemoryCluster` looks into it and breaks it on demand.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from kafka_broker._transport.memory_consumer import MemoryReader, MemorySubscription
from kafka_broker._transport.memory_log import MemoryRecord, Send, node_of, now_of, settle
from kafka_broker.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import (
        Appended,
        Headers,
        OnAssigned,
        OnRevoked,
        Outgoing,
        TopicSpec,
    )

_SCHEME: Final = "memory://"


def cluster(name: str = "") -> MemoryCluster:
    """Return the cluster behind ``memory://name``; it comes into being when first asked for."""
    return MemoryCluster(name)


class MemoryCluster:
    """The log behind ``memory://name``: look into it, write to it, break it; from any thread.

    Two objects of the same name are the same cluster.
    """

    def __init__(self, name: str = "") -> None:
        self._node = node_of(name)

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

    def expel(self, group_id: str) -> None:
        """Let the sessions of all members of the group time out.

        Each is told that it has lost its partitions, may commit nothing more, and joins again by
        itself when it has been told.
        """
        with self._node.lock:
            self._node.groups[group_id].expel()

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
        self._node = node_of(servers.removeprefix(_SCHEME))
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
            settle(future, DeliveryUnknownError(topic, "the transport stopped"))

    def now(self) -> float:
        """Return the seconds since the epoch; they move with the clock of our event loop."""
        if self._loop is None:
            with suppress(RuntimeError):
                self._loop = asyncio.get_running_loop()
        return time.time() if self._loop is None else now_of(self._loop)

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
        self._node.accept(Send(topic, partition, records, future))
        return future

    async def read(self, topic: str, partition: int, offset: int | None = None) -> MemoryReader:
        """Open a reader without a group; see `Transport.read`."""
        await self._reach()
        with self._node.lock:
            position = self._node.position(topic, partition, None)
            if offset is not None:
                position = min(max(offset, 0), position)
            return MemoryReader(self._node, topic, {partition: position})

    async def subscribe(
        self,
        topic: str,
        group_id: str | None = None,
        *,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
    ) -> MemorySubscription:
        """Join the group; see `Transport.subscribe`."""
        await self._reach()
        with self._node.lock:
            self._node.log(topic, 0)
            group = self._node.groups[group_id or self._settings.group_id]
            member = MemorySubscription(group, topic, self._settings, on_assigned, on_revoked)
            group.join(member)
        return member
