"""Lanes: which record may be handled next, so that keys keep their order and none starves another.

Records of one key in one partition form a lane and are handled one after the other; different keys
run side by side. A *seat* is the right to run, and there are ``concurrency`` of them. This is pure
bookkeeping: nothing here waits, and `kafka_broker._dispatch` does the running.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

from kafka_broker._offsets import Watermark

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection, Iterable

    from kafka_broker._batches import Batch
    from kafka_broker._dispatch import Dispatcher
    from kafka_broker._event import Ending, Request
    from kafka_broker._transport import Record

_RECORD_OVERHEAD: Final = 100


class Work:
    """One record on its way: queued, handled, and ended when its offset may be committed.

    Attributes:
        record: as it was read.
        partition: that it is of, in the assignment under which it was read.
        dispatcher: runs it; whoever handles it may ask that for a rest, or for a seat.
        size: bytes that it is counted with.
        request: whom to answer, if anybody.
        attempt: the number of the try that runs or comes next, from 1.
        endings: what has to be done before the offset may be committed: replies, dead letters.
        begun: whether it has been handed out.
        ended: whether its handling is over.
        dropped: whether its handling is cut off: its partition moves, the broker stops, or it was
            put off, and then it has ended all the same.
        resting: whether it only waits for time to pass, and may be dropped at once.
        resumes: the time of the loop at which that is over.
        expires: the time of the loop at which its handler has had its time.
        timed_out: whether that time has come.
        too_late: whether its deadline passed while it waited in a batch.
        seated: whether it holds a seat.
        task: the worker that handles it.
        follower: the next of its lane, which waits for its end.
        passable: whether the next of its lane may run beside it: it waits in a batch.
        behind, beside: its neighbours in the lane that run beside it; it may only join their batch.
        batch: the one it waits in.
        turn: ends its wait for those that are before it.
    """

    # Defaults of the class: an instance that sets each of them itself costs 1 us more.
    request: Request | None = None
    attempt: int = 1
    begun: bool = False
    ended: bool = False
    dropped: bool = False
    resting: bool = False
    resumes: float = 0.0
    expires: float = math.inf
    timed_out: bool = False
    too_late: bool = False
    seated: bool = False
    task: asyncio.Task[None] | None = None
    follower: Work | None = None
    passable: bool = False
    behind: Work | None = None
    beside: Work | None = None
    batch: Batch | None = None
    turn: asyncio.Event | None = None

    def __init__(self, record: Record, partition: Partition, dispatcher: Dispatcher) -> None:
        self.record = record
        self.partition = partition
        self.dispatcher = dispatcher
        self.size = len(record.value or b"") + len(record.key or b"") + _RECORD_OVERHEAD
        self.endings: list[Ending] = []

    def __deepcopy__(self, memo: object) -> Work:
        """Return this one: a copy of an event is handled with it."""
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Stay here when an event goes to another process."""
        return type(None), ()

    @property
    def where(self) -> str:
        """Which event it is, in logs and headers: ``topic:partition:offset``."""
        return f"{self.record.topic}:{self.record.partition}:{self.record.offset}"

    def done(self) -> bool:
        """Return whether the offset may be committed as far as this record goes."""
        if not self.ended:
            return False
        while self.endings and self.endings[-1].done():
            self.endings.pop()  # there may be thousands, and it is asked again and again
        return not self.endings


class Partition:
    """One partition, for as long as it is assigned to us: a new assignment makes a new one.

    Attributes:
        watermark: which offset may be committed.
        tails: the last record of each lane, by key.
        ready: the records that may run, each the first of its lane.
        running: how many of its records hold a seat.
        begun: how many were begun and are not committed yet.
        size: the bytes of its records whose handling is not over.
        last_ended: the highest offset whose handling has ended.
        limit: the offset beyond which nothing is begun any more.
    """

    __slots__ = (
        "begun",
        "last_ended",
        "limit",
        "number",
        "ready",
        "running",
        "size",
        "tails",
        "watermark",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.watermark: Watermark[Work] = Watermark()
        self.tails: dict[bytes, Work] = {}
        self.ready: deque[Work] = deque()
        self.running = 0
        self.begun = 0
        self.size = 0
        self.last_ended = -1
        self.limit = math.inf


class Lanes:
    """The records that are here and the seats they run in.

    Every partition gets the same share of what may be in flight, so that one which is full leaves
    the others alone. And as long as they need less than half of the seats, there is one free for
    each partition that runs nothing.

    Args:
        concurrency: the number of seats.
        keyed: whether records of one key wait for each other.
        max_events: how many may be begun and not committed.
        max_bytes: how large the records may be whose handling is not over.
    """

    def __init__(
        self, concurrency: int, *, max_events: int, max_bytes: int, keyed: bool = True
    ) -> None:
        self._concurrency = concurrency
        self._keyed = keyed
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._turns: deque[Partition] = deque()
        self._returning: dict[Work, Callable[[], None]] = {}
        self._quiet = 0
        self._seated = 0
        self.working: set[Work] = set()
        self.assign(())

    def assign(self, numbers: Collection[int]) -> None:
        """Begin anew with these partitions; what was here of others is forgotten."""
        self.partitions: dict[int, Partition] = {number: Partition(number) for number in numbers}
        self._turns.clear()
        self._quiet = len(self.partitions)
        self.events_share = max(1, self._max_events // max(1, len(numbers)))
        self.bytes_share = max(1, self._max_bytes // max(1, len(numbers)))

    def add(self, records: Iterable[Record], dispatcher: Dispatcher) -> None:
        """Queue records that were just read; those of one partition in the order of offsets."""
        for record in records:
            partition = self.partitions[record.partition]
            work = Work(record, partition, dispatcher)
            partition.watermark.begin(record.offset, work)
            partition.size += work.size
            key = record.key
            if key is not None and self._keyed:
                tail = partition.tails.get(key)
                partition.tails[key] = work
                if tail is not None:
                    tail.follower = work
                    if tail.passable:
                        self._let_pass(tail)
                    continue
            self._make_ready(work)

    def _make_ready(self, work: Work) -> None:
        partition = work.partition
        if work.record.offset > partition.limit:
            return
        if not partition.ready:
            self._turns.append(partition)
        partition.ready.append(work)

    def full(self) -> list[int]:
        """Return the partitions of which nothing more should be read for now."""
        return [
            number
            for number, partition in self.partitions.items()
            if len(partition.watermark) >= self.events_share or partition.size >= self.bytes_share
        ]

    @property
    def startable(self) -> bool:
        """Whether `next` is worth a call."""
        return bool(self._turns) and self._seated < self._concurrency

    def next(self) -> Work | None:
        """Seat the next record, each partition in its turn; None if none may run now."""
        for _ in range(len(self._turns)):
            partition = self._turns[0]
            work = self._first_of(partition) if self._may_seat(partition) else None
            if work is None:
                self._turns.rotate(-1)
                continue
            if partition.ready:
                self._turns.rotate(-1)
            else:
                self._turns.popleft()
            partition.begun += 1
            work.begun = True
            self.working.add(work)
            self._seat(work)
            return work
        return None

    def _first_of(self, partition: Partition) -> Work | None:
        """Take the next record of a partition; the last place is for the one that all wait for.

        If that one has been begun, its end makes room.
        """
        if partition.begun < self.events_share - 1 or partition.limit < math.inf:
            return partition.ready.popleft()
        if partition.begun >= self.events_share:
            return None
        first = partition.watermark.first()
        if first is None or first.begun:
            return partition.ready.popleft()
        if first not in partition.ready:
            return None
        partition.ready.remove(first)
        return first

    def _may_seat(self, partition: Partition) -> bool:
        free = self._concurrency - self._seated
        return free > (min(self._quiet, self._concurrency // 2) if partition.running else 0)

    def _seat(self, work: Work) -> None:
        work.seated = True
        self._seated += 1
        if not work.partition.running and self._is_ours(work.partition):
            self._quiet -= 1
        work.partition.running += 1

    def _is_ours(self, partition: Partition) -> bool:
        return self.partitions.get(partition.number) is partition

    def give_up_seat(self, work: Work) -> None:
        """Let another run while this one only waits."""
        if not work.seated:
            return
        work.seated = False
        self._seated -= 1
        work.partition.running -= 1
        if not work.partition.running and self._is_ours(work.partition):
            self._quiet += 1
        if self._returning:
            self._seat_returning()

    def return_to_seat(self, work: Work, seated: Callable[[], None]) -> None:
        """Seat a record that has waited, before any new one; *seated* is called when it is."""
        if work.seated:
            seated()
            return
        self._returning[work] = seated
        self._seat_returning()

    def stay_away(self, work: Work) -> None:
        """Take back a `return_to_seat` whose wait was cut off."""
        self._returning.pop(work, None)

    def _seat_returning(self) -> None:
        for work in list(self._returning):
            if self._seated >= self._concurrency:
                return
            if self._may_seat(work.partition):
                self._seat(work)
                self._returning.pop(work)()

    def let_pass(self, work: Work) -> None:
        """Let the next of the lane run beside this one: it may join the batch that this is in."""
        work.passable = True
        self._let_pass(work)

    def _let_pass(self, work: Work) -> None:
        follower, work.follower = work.follower, None
        if follower is not None:
            work.beside, follower.behind = follower, work
            self._make_ready(follower)

    def end(self, work: Work) -> None:
        """Take note that a record's handling is over, or was dropped; the next of its lane may."""
        self.working.discard(work)
        self._returning.pop(work, None)
        self.give_up_seat(work)
        work.passable = False
        partition = work.partition
        partition.size -= work.size
        if work.ended:
            partition.last_ended = max(partition.last_ended, work.record.offset)
            # not at the next commit: by then all of it is in an old generation of the collector,
            # whose rounds double the 99th percentile of a request
            partition.watermark.pass_done()
        neighbour = work.follower or work.behind or work.beside
        before = self._leave_lane(work) if neighbour is not None else None
        key = work.record.key
        if key is not None and partition.tails.get(key) is work:
            if before is not None:
                partition.tails[key] = before
            else:
                del partition.tails[key]

    def _leave_lane(self, work: Work) -> Work | None:
        """Close the gap in the lane; returns the one before that still runs."""
        before, after, follower = work.behind, work.beside, work.follower
        work.behind = work.beside = work.follower = None
        if after is not None:
            after.behind = before
            if before is None and after.turn is not None:
                after.turn.set()
        if before is not None:
            before.beside = after
        if follower is not None and self._is_ours(follower.partition):
            if before is None:
                self._make_ready(follower)
            else:
                before.follower = follower
                if before.passable:
                    self._let_pass(before)
        return before

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing may begin."""
        return not self.working and not self._turns

    def close(self) -> None:
        """Begin only what is before something that has ended or runs; a rest does not count.

        Otherwise nothing behind the gap could be committed, and all of that would be repeated.
        """
        for partition in self.partitions.values():
            partition.limit = partition.last_ended
        for work in self.working:
            if not work.resting:
                work.partition.limit = max(work.partition.limit, work.record.offset)
        for partition in list(self._turns):
            limit = partition.limit
            partition.ready = deque(w for w in partition.ready if w.record.offset <= limit)
        self._turns = deque(partition for partition in self._turns if partition.ready)

    def clear(self) -> None:
        """Begin nothing any more; what runs goes on."""
        self._turns.clear()
        for partition in self.partitions.values():
            partition.limit = -1
            partition.ready.clear()

    def committed(self, number: int, offset: int) -> None:
        """Take note of a committed offset: as many more may be begun."""
        partition = self.partitions[number]
        partition.begun -= partition.watermark.committed(offset)
