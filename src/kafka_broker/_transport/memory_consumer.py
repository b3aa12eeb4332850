"""Reading the log in memory: one partition without a group, or a topic as a member of a group."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Final

from kafka_broker._transport import FETCH_TIMEOUT
from kafka_broker._transport.memory_log import soon
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import OnAssigned, OnRevoked
    from kafka_broker._transport.memory_log import Group, MemoryRecord, Node

_logger = logging.getLogger("kafka_broker.transport")

_POLL_RECORDS: Final = 500
_CLOSE_TIMEOUT: Final = 3.0

_joined = itertools.count(1)


class Fetcher:
    """What a reader and a subscription share: the next offset of each of their partitions."""

    def __init__(self, node: Node, topic: str, positions: dict[int, int]) -> None:
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

    def _take(self, leave_out: Collection[int] = ()) -> list[MemoryRecord]:
        if self.closed:
            raise BrokerUnavailableError(f"the reader of topic {self.topic!r} is closed")
        if self._breaks != self._node.breaks[self.topic]:
            raise BrokerUnavailableError(f"fetching from topic {self.topic!r} failed")
        records: list[MemoryRecord] = []
        if self._node.down:
            return records
        for partition, position in list(self._positions.items()):
            if partition in leave_out:
                continue
            log = self._node.log(self.topic, partition)
            batch = log[position : position + _POLL_RECORDS - len(records)]
            if batch:
                del self._positions[partition]  # to the end, so that no partition starves another
                self._positions[partition] = batch[-1].offset + 1
                records += batch
        return records


class MemoryReader(Fetcher):
    """A `Reader` of the memory log: a fetcher of one partition."""

    @property
    def position(self) -> int:
        """The offset of the next record that `fetch` will return."""
        (position,) = self._positions.values()
        return position


class MemorySubscription(Fetcher):
    """A `Subscription` of the memory log.

    Everything that other members touch is under the node's lock; the callbacks run in our loop.
    """

    def __init__(
        self,
        group: Group,
        topic: str,
        settings: BrokerSettings,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
    ) -> None:
        super().__init__(group.node, topic, {})
        self.loop = asyncio.get_running_loop()
        self.member_id = f"{settings.instance}-{next(_joined):09d}"
        self.owned: frozenset[int] = frozenset()
        self._group = group
        self._told: frozenset[int] = frozenset()
        self._rebalance_timeout = settings.rebalance_timeout
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._giving_up: asyncio.Task[None] | None = None

    async def fetch(
        self, leave_out: Collection[int] = (), *, timeout: float = FETCH_TIMEOUT
    ) -> Sequence[MemoryRecord]:
        """Return what has arrived, at most 500 records; see `Subscription.fetch`."""
        return await self._node.poll(self.topic, lambda: self._take(leave_out), timeout)

    async def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commit, if all of the partitions are still ours; see `Subscription.commit`."""
        told = self._told
        await asyncio.sleep(0)
        with self._node.lock:
            self._node.check()
            if told is not self._told or not (self.owned & told).issuperset(offsets):
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
            soon(self.loop, self._begin_giving_up, self.owned)

    def _begin_giving_up(self, partitions: frozenset[int]) -> None:
        if not self.closed:
            self._giving_up = self.loop.create_task(self._give_up(partitions))

    async def _give_up(self, partitions: frozenset[int]) -> None:
        expiry = self.loop.call_later(self._rebalance_timeout, self._expire)
        try:
            await self._on_revoked(partitions)
        except Exception:  # logged, and the rebalance goes on, as with aiokafka
            _logger.exception("giving up partitions of %s failed", self.topic)
        finally:
            expiry.cancel()
            self._told = frozenset()
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
        self._told = partitions
        try:
            self._on_assigned(partitions)
        except Exception:  # logged, and records are fetched, as with aiokafka
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

    def _take(self, leave_out: Collection[int] = ()) -> list[MemoryRecord]:
        self._group.look_after()
        return super()._take(leave_out)
