"""Reading a topic as a member of a group, by a consumer of aiokafka."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import OffsetAndMetadata

from kafka_broker._transport import FETCH_TIMEOUT
from kafka_broker._transport.kafka_client import (
    FOREIGN,
    REQUEST_TIMEOUT,
    Unparsable,
    close,
    describe,
    options,
    unavailable,
)
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import OnAssigned, OnRevoked, Record

_logger = logging.getLogger("kafka_broker.transport")

_POLL_RECORDS: Final = 200
_GRACE: Final = 0.1
"""Seconds that aiokafka is given to end a fetch by itself; cut off, it forgets a future."""
_REST: Final = 0.1
"""Seconds between two tries of a commit."""
_CAREFUL: Final = 60.0
"""Seconds without a record that cannot be parsed, after which many are fetched at a time again."""
_LOOK: Final = 0.02
"""Seconds between two looks for a single record."""
_LOSSES: Final = 3
_LOST_WITHIN: Final = 60.0
"""So many lost memberships within so many seconds: another has our group_instance_id."""
_STAND_BACK: Final = 30.0
"""Seconds that we leave the group to the one that seems to be us."""
_FORGET_LOSSES: Final = 300.0
_LOST_MEMBERSHIP: Final = (
    kafka.IllegalGenerationError,
    kafka.UnknownMemberIdError,
    kafka.RebalanceInProgressError,
)


class _Membership(NamedTuple):
    """Who we are in the group while an assignment lasts, and the partitions it gave us."""

    generation: int
    member_id: str
    partitions: frozenset[int]


def consumer_options(settings: BrokerSettings, group: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "fetch_max_wait_ms": 100,
        "client_rack": settings.rack_id,
        "request_timeout_ms": int(REQUEST_TIMEOUT * 1000),
        **group,
    }
    return options(AIOKafkaConsumer, settings, defaults)


class History:
    """What a consumer has to know of those before it on its topic."""

    def __init__(self, instance_id: str | None = None) -> None:
        self._instance_id = instance_id
        self._careful_until = -math.inf
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._contested = False

    @property
    def careful(self) -> bool:
        """Whether records are fetched one at a time, so that an error tells which one it means."""
        return _now() < self._careful_until

    def met_unparsable(self) -> None:
        """Be careful from now on."""
        self._careful_until = _now() + _CAREFUL

    def lost_membership(self, topic: str) -> bool:
        """Note a loss; return whether to stand back, as another seems to have our instance id."""
        if self._instance_id is None:
            return False
        now = _now()
        if self._losses and now - self._losses[-1] > _FORGET_LOSSES:
            self._losses.clear()
            self._contested = False
        self._losses.append(now)
        often = len(self._losses) == _LOSSES and now - self._losses[0] < _LOST_WITHIN
        if often and not self._contested:
            self._contested = True
            _logger.error(
                "%s: this replica loses its partitions again and again; two live replicas seem to "
                "have the same group_instance_id %r: give each its own",
                topic,
                self._instance_id,
            )
        return self._contested


def _now() -> float:
    return asyncio.get_running_loop().time()


class KafkaSubscription(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped base
    """A `Subscription` over a consumer of a group."""

    def __init__(
        self,
        consumer: Any,
        topic: str,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
        history: History,
    ) -> None:
        self._consumer = consumer
        self._history = history
        self._turn = 0
        self._topic = topic
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._assigned = asyncio.Event()
        self._epoch = 0
        self._held: list[Record] = []
        self._held_epoch = 0
        self._served: set[TopicPartition] = set()
        self._membership: _Membership | None = None
        self._committing = asyncio.Lock()
        self._closed = False

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Let records through; called by aiokafka."""
        self._epoch += 1
        partitions = frozenset(place.partition for place in assigned)
        self._membership = _Membership(*self._identity(), partitions)
        try:
            self._on_assigned(partitions)
        finally:  # aiokafka logs the error and goes on; so do we
            self._assigned.set()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Hold records back until the next assignment; called by aiokafka.

        aiokafka joins again as soon as this returns. So while another replica seems to be us it
        does not return for a while: else each would take the partitions from the other at once.
        """
        self._epoch += 1
        self._assigned.clear()
        lost = self._membership is not None and self._identity()[0] < 0
        stand_back = lost and self._history.lost_membership(self._topic)
        try:
            if revoked:
                await self._on_revoked(frozenset(place.partition for place in revoked))
        except Exception:  # aiokafka would swallow it
            _logger.exception("giving up partitions of %s failed", self._topic)
        finally:
            self._membership = None
        if stand_back:
            await asyncio.sleep(_STAND_BACK)  # a close cuts it short

    def _identity(self) -> tuple[int, str]:
        """Return who aiokafka takes us for now; a lost session leaves -1 and no name."""
        coordinator = self._consumer._coordinator  # noqa: SLF001  # ADR 0007 lists what we use
        return coordinator.generation, coordinator.member_id

    async def fetch(
        self, leave_out: Collection[int] = (), *, timeout: float = FETCH_TIMEOUT
    ) -> Sequence[Record]:
        """Return what has arrived; see `Subscription.fetch`.

        aiokafka hands out records of an assignment before it tells of it: those wait here, and are
        dropped, to be read again, when it is over before they could be handed on.
        """
        if self._held and self._held_epoch > self._epoch:
            await self._wait_assigned(timeout)
            return self._release(leave_out)
        if records := self._release(leave_out):
            return records
        self._hold(await self._poll_fairly(leave_out, timeout))
        return self._release(leave_out)

    async def _wait_assigned(self, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._assigned.wait()

    def _hold(self, records: Sequence[Record]) -> None:
        """Keep records with the epoch that they belong to; of an older one nothing is kept."""
        epoch = self._epoch if self._assigned.is_set() else self._epoch + 1
        if epoch != self._held_epoch:
            self._held, self._held_epoch = [], epoch
        self._held += records

    def _release(self, leave_out: Collection[int]) -> list[Record]:
        """Hand on what is held, if its epoch is the one that lasts."""
        if self._held_epoch != self._epoch or not self._assigned.is_set():
            return []
        held, self._held = self._held, []
        if not leave_out:
            return held
        self._held = [record for record in held if record.partition in leave_out]
        return [record for record in held if record.partition not in leave_out]

    async def _poll_fairly(self, leave_out: Collection[int], timeout: float) -> Sequence[Record]:
        """Return records, first of partitions that others have kept waiting.

        aiokafka empties its buffer of one partition, up to a megabyte, before it looks at the next:
        so after a fetch that was full its partitions wait until all others have had their turn.
        """
        places = [
            place for place in self._consumer.assignment() if place.partition not in leave_out
        ]
        others = [place for place in places if place not in self._served]
        single = sorted(places) if self._history.careful else None
        if not leave_out:
            places = []  # that means all, also those that are assigned while we wait
        elif not places:
            places = [TopicPartition(self._topic, -1)]  # wait, but for nothing
        batches: dict[TopicPartition, list[Record]] = {}
        try:
            async with asyncio.timeout(timeout + _GRACE):
                if single is not None:
                    return await self._poll_carefully(single, timeout)
                if self._served and others:
                    batches = await self._poll(*others, timeout=0)
                if not batches:
                    self._served.clear()
                    batches = await self._poll(*places, timeout=timeout)
        except TimeoutError:  # in a rebalance aiokafka waits for its end
            self._check_alive()
        records = [record for batch in batches.values() for record in batch]
        if len(records) < _POLL_RECORDS:
            self._served.clear()
        else:
            self._served.update(batches)
        return records

    async def _poll(
        self, *places: TopicPartition, timeout: float
    ) -> dict[TopicPartition, list[Record]]:
        """Return what has arrived, or has in *places* if there are any."""
        try:
            batches: dict[TopicPartition, list[Record]] = await self._consumer.getmany(
                *places, timeout_ms=timeout * 1000, max_records=_POLL_RECORDS
            )
        except FOREIGN as exc:
            raise unavailable("fetching failed", exc) from exc
        except Exception as exc:  # one record that cannot be parsed raises anything
            self._history.met_unparsable()
            raise unavailable("a record cannot be parsed", exc) from exc
        if not batches:
            self._check_alive()
        return batches

    async def _poll_carefully(
        self, places: Sequence[TopicPartition], timeout: float
    ) -> Sequence[Record]:
        """Return one record, of another partition each time; none after *timeout*."""
        deadline = _now() + timeout
        while True:
            for _ in places:
                self._turn += 1
                if records := await self._poll_one(places[self._turn % len(places)]):
                    return records
            if _now() >= deadline:
                self._check_alive()
                return []
            await asyncio.sleep(_LOOK)

    async def _poll_one(self, place: TopicPartition) -> Sequence[Record]:
        """Return the next record of *place*, if it is there, or what stands for it."""
        try:
            batches = await self._consumer.getmany(place, timeout_ms=0, max_records=1)
        except FOREIGN as exc:
            raise unavailable("fetching failed", exc) from exc
        except Exception as exc:  # the record that cannot be parsed raises anything
            self._history.met_unparsable()
            offset = self._offset_to_parse(place)
            if offset is None:
                raise unavailable("a record cannot be parsed", exc) from exc
            return [self._step_over(place, offset, exc)]
        records: Sequence[Record] = batches.get(place, ())
        return records

    def _step_over(self, place: TopicPartition, offset: int, error: Exception) -> Record:
        _logger.error(
            "%s:%d:%d cannot be parsed and is handed on empty: %s",
            place.topic,
            place.partition,
            offset,
            describe(error),
        )
        self._consumer.seek(place, offset + 1)
        return Unparsable(place.topic, place.partition, offset, int(time.time() * 1000))

    def _offset_to_parse(self, place: TopicPartition) -> int | None:
        """Return the offset behind what was parsed; a position stays before control records."""
        buffered = self._consumer._fetcher._records.get(place)  # noqa: SLF001  # ADR 0007
        offset: int | None = getattr(
            getattr(buffered, "_partition_records", None), "next_fetch_offset", None
        )
        return offset

    def _check_alive(self) -> None:
        """Notice what aiokafka keeps to itself: after its fetch task died it is silent for ever."""
        fetching = self._consumer._fetcher._fetch_task  # noqa: SLF001  # no public sign of it
        if fetching.done():
            msg = "the fetch task of the consumer died"
            raise BrokerUnavailableError(msg)

    async def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commit; see `Subscription.commit`."""
        if self._closed or not offsets:
            return not self._closed
        membership = self._membership
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT), self._committing:
                return await self._commit_as(membership, offsets)
        except _LOST_MEMBERSHIP as exc:
            _logger.info("a commit on %s came after the partitions moved: %r", self._topic, exc)
            return False
        except FOREIGN as exc:
            action = f"cannot commit offsets of topic {self._topic!r}"
            raise unavailable(action, exc) from exc

    async def _commit_as(self, member: _Membership | None, offsets: Mapping[int, int]) -> bool:
        """Try as *member* until there is an answer or we are that no more.

        ``consumer.commit()`` tries for ever, as whoever we are by then; and without a session as
        nobody, whom Kafka lets commit anything while the group is empty.
        """
        coordinator = self._consumer._coordinator  # noqa: SLF001  # ADR 0007 lists what we use
        places = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(offset, "")
            for partition, offset in offsets.items()
        }
        while self._is_still(member, offsets):
            try:
                await coordinator.ensure_coordinator_known()
                if not self._is_still(member, offsets):
                    break
                # it writes down who we are before it first waits, and does not try again
                await coordinator._do_commit_offsets(None, places)  # noqa: SLF001  # as above
            except kafka.KafkaError as exc:
                if not exc.retriable:
                    raise
                await asyncio.sleep(_REST)
            else:
                return True
        _logger.info("a commit on %s came after the partitions moved", self._topic)
        return False

    def _is_still(self, member: _Membership | None, partitions: Collection[int]) -> bool:
        """Return whether we are *member* now, and *partitions* are ours."""
        if self._closed or member is None or member is not self._membership:
            return False
        if (member.generation, member.member_id) != self._identity():
            return False
        return member.generation >= 0 and member.partitions.issuperset(partitions)

    async def close(self) -> None:
        """Leave the group; see `Subscription.close`."""
        try:
            await close(self._consumer, self._consumer.stop())
        finally:
            self._closed = True
