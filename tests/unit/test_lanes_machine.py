"""Lanes against a simple model: whatever comes and ends in whichever order, nothing sticks."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kafka_broker._lanes import Lanes, Partition, Work
from kafka_broker._transport.memory_log import MemoryRecord

QUEUED, FRESH, RUNS, GATHERS, CALLED, TURN, RESTS, RETURNS, OVER = (
    "queued",  # behind others, or nobody has asked for it
    "fresh",  # it has a seat, and nothing is decided
    "runs",
    "gathers",  # in a batch, without a seat
    "called",  # in a batch whose function runs
    "turn",  # waits for those before it
    "rests",  # between two tries
    "returns",  # waits for a seat
    "over",
)
OPEN, CLOSED, CLEARED = "open", "closed", "cleared"
BEGUN = (FRESH, RUNS, GATHERS, CALLED, TURN, RESTS, RETURNS)
KEYS = [None, None, b"a", b"b", b"c"]


@dataclass(eq=False)
class One:
    """What the model knows of a record."""

    lane: list[One]
    number: int
    offset: int
    key: bytes | None
    batched: bool
    state: str = QUEUED
    seat: bool = False
    waits: int = 0
    passed: bool = False
    begun: bool = False
    committed: bool = False
    work: Work = field(init=False, repr=False)

    @property
    def over(self) -> bool:
        return self.state == OVER

    @property
    def ended(self) -> bool:
        """Whether it is over, and was not dropped."""
        return self.over and self.work.ended

    @property
    def size(self) -> int:
        return 100 + self.offset + len(self.key or b"")

    @property
    def before(self) -> list[One]:
        """What has to end before it may run by itself."""
        earlier = takewhile(lambda other: other is not self, self.lane)
        return [other for other in earlier if not other.over]


class Several(RuleBasedStateMachine):
    """Does with `Lanes` what a dispatcher and its batches may do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ones: list[One] = []
        self.old: list[One] = []
        self.batch: list[One] = []
        self.closing = False
        self.phase = OPEN
        self.limits: dict[int, float] = {}
        self.unacknowledged: dict[int, int] = {}
        self.gaps: dict[int, float] = {}
        self.lanes_of: dict[tuple[int, bytes], list[One]] = {}

    @initialize(
        concurrency=st.integers(1, 6),
        max_events=st.integers(1, 24),
        max_bytes=st.integers(100, 4000),
        count=st.integers(1, 4),
    )
    def start(self, concurrency: int, max_events: int, max_bytes: int, count: int) -> None:
        self.concurrency = concurrency
        self.max_events, self.max_bytes = max_events, max_bytes
        self.lanes = Lanes(concurrency, max_events=max_events, max_bytes=max_bytes)
        self._assign(count)

    # What the model says

    def _assign(self, count: int) -> None:
        self.lanes.assign(range(count))
        self.events_share = max(1, self.max_events // max(1, count))
        self.bytes_share = max(1, self.max_bytes // max(1, count))
        self.ends = dict.fromkeys(range(count), 0)
        self.lanes_of = {}

    def _of(self, number: int) -> list[One]:
        return [one for one in self.ones if one.number == number]

    def _begun(self, number: int) -> int:
        return sum(one.begun and not one.committed for one in self._of(number))

    def _seated(self) -> list[One]:
        return [one for one in (*self.old, *self.ones) if one.seat]

    def _runs_nothing(self, number: int) -> bool:
        return not any(one.seat for one in self._of(number))

    def _reserved(self) -> int:
        quiet = sum(self._runs_nothing(number) for number in self.ends)
        return min(quiet, self.concurrency // 2)

    def _may_begin(self) -> list[One]:
        """Return the records that `next` may return now."""
        free = self.concurrency - len(self._seated())
        return [
            one
            for one in self.ones
            if one.state == QUEUED
            and self._is_first(one)
            and free > (0 if self._runs_nothing(one.number) else self._reserved())
            and self._has_share(one)
        ]

    def _is_first(self, one: One) -> bool:
        before = one.before
        one.passed = one.passed or (bool(before) and before[-1] in self.batch)
        return one.passed or not before

    def _note_who_passed(self) -> None:
        """Note who may begin beside a batch, before it changes; it will wait there for its turn."""
        for one in self.ones:
            if one.state == QUEUED:
                self._is_first(one)

    def _has_share(self, one: One) -> bool:
        """The last place of a partition is for what holds all commits up, until that has begun."""
        if self.phase != OPEN:
            return self.phase == CLOSED
        begun = self._begun(one.number)
        oldest = next(other for other in self._of(one.number) if not other.over)
        last = begun == self.events_share - 1
        return begun < self.events_share - 1 or (last and (oldest.begun or one is oldest))

    # What happens

    @precondition(lambda self: self.phase == OPEN)
    @rule(
        number=st.integers(0, 3),
        records=st.lists(
            st.tuples(st.sampled_from(KEYS), st.booleans(), st.integers(1, 3)),
            min_size=1,
            max_size=6,
        ),
    )
    def add(self, number: int, records: list[tuple[bytes | None, bool, int]]) -> None:
        number %= len(self.ends)
        made = []
        for key, batched, gap in records:
            offset = self.ends[number] = self.ends[number] + gap
            value = b"x" * offset
            made.append(MemoryRecord("t", number, offset, 0, key, value, ()))
            lane = [] if key is None else self.lanes_of.setdefault((number, key), [])
            lane.append(One(lane, number, offset, key, batched))
            self.ones.append(lane[-1])
        engine: Any = None
        self.lanes.add(made, engine)

    @rule(times=st.integers(1, 5))
    def begin(self, times: int) -> None:
        for _ in range(times):
            self._begin()

    def _begin(self) -> None:
        """Check that a record begins exactly when the model knows one that may."""
        eligible = self._may_begin()
        work = self.lanes.next()
        if work is None:
            assert [] == eligible
            return
        [one] = [
            one
            for one in eligible
            if one.offset == work.record.offset and one.number == work.record.partition
        ]
        assert self.lanes.partitions[one.number] is work.partition
        one.work, one.state, one.seat, one.begun = work, FRESH, True, True

    def _in(self, *states: str) -> list[One]:
        return [one for one in (*self.old, *self.ones) if one.state in states]

    @precondition(lambda self: self._in(FRESH))
    @rule(at=st.integers(0, 30), joins=st.booleans())
    def go_on(self, at: int, *, joins: bool) -> None:
        """A record that begins runs, joins the batch that gathers, or waits for its turn."""
        fresh = self._in(FRESH)
        one = fresh[at % len(fresh)]
        before = one.before
        assert (before[-1].work if before else None) is one.work.behind
        joinable = before[-1] in self.batch if before else not (self.closing and not self.batch)
        if one.batched and joins and joinable and self._is_here(one):
            self.batch.append(one)
            one.state, one.seat = GATHERS, False
            self.lanes.give_up_seat(one.work)
            self.lanes.let_pass(one.work)
        elif not before:
            one.state = RUNS
        else:
            one.state, one.seat = TURN, False
            one.work.turn = asyncio.Event()
            self.lanes.give_up_seat(one.work)

    def _is_here(self, one: One) -> bool:
        return self.phase != CLEARED and one not in self.old

    @precondition(lambda self: self.batch and not self.closing)
    @rule()
    def close_batch(self) -> None:
        """The first of a batch returns to a seat; then the function is called with all of them."""
        self.closing = True
        self.lanes.return_to_seat(self.batch[0].work, partial(self._call, self.batch[0]))

    def _call(self, leader: One) -> None:
        assert leader is self.batch[0]
        self._note_who_passed()
        leader.seat = True
        for member in self.batch:
            member.state = CALLED
            member.work.passable = False
        self.batch, self.closing = [], False

    def _return(self, one: One) -> None:
        one.state, one.waits = RETURNS, one.waits + 1
        self.lanes.return_to_seat(one.work, partial(self._is_seated, one, one.waits))

    def _is_seated(self, one: One, wait: int) -> None:
        assert (RETURNS, False, wait) == (one.state, one.seat, one.waits)
        one.state, one.seat = FRESH, True

    @precondition(lambda self: self._in(TURN))
    @rule(at=st.integers(0, 30))
    def take_turn(self, at: int) -> None:
        """The turn of a record comes exactly when all before it have ended."""
        waiting = self._in(TURN)
        one = waiting[at % len(waiting)]
        assert one.work.turn is not None
        assert (not one.before) == one.work.turn.is_set()
        if one.work.turn.is_set():
            one.work.turn = None
            self._return(one)

    @precondition(lambda self: self._in(RUNS, CALLED))
    @rule(at=st.integers(0, 30))
    def rest(self, at: int) -> None:
        busy = self._in(RUNS, CALLED)
        one = busy[at % len(busy)]
        one.state, one.seat, one.work.resting = RESTS, False, True
        self.lanes.give_up_seat(one.work)

    @precondition(lambda self: self._in(RESTS))
    @rule(at=st.integers(0, 30))
    def wake(self, at: int) -> None:
        resting = self._in(RESTS)
        one = resting[at % len(resting)]
        one.work.resting = False
        self._return(one)

    @precondition(lambda self: self._in(RETURNS))
    @rule(at=st.integers(0, 30))
    def rest_again(self, at: int) -> None:
        """A wait for a seat is cut off, by a time limit for example, and begins anew later."""
        returning = self._in(RETURNS)
        one = returning[at % len(returning)]
        one.state, one.work.resting = RESTS, True
        self.lanes.stay_away(one.work)

    @precondition(lambda self: self._in(RUNS, CALLED))
    @rule(at=st.integers(0, 30))
    def end(self, at: int) -> None:
        busy = self._in(RUNS, CALLED)
        self._end(busy[at % len(busy)])

    @precondition(lambda self: self.phase == CLEARED and self._in(*BEGUN))
    @rule(at=st.integers(0, 30))
    def drop(self, at: int) -> None:
        """A rebalance cancels what has not ended in time."""
        begun = self._in(*BEGUN)
        self._end(begun[at % len(begun)], well=False)

    def _end(self, one: One, *, well: bool = True) -> None:
        self._note_who_passed()
        one.work.ended = well
        one.state, one.seat = OVER, False
        if one in self.batch:
            self._break_up(one)
        self.lanes.end(one.work)

    def _break_up(self, one: One) -> None:
        """Without the one that leads it a batch cannot be called: whoever is left tries again."""
        self.batch.remove(one)
        if self.closing or not self.batch:
            for member in self.batch:
                member.state, member.work.resting = RESTS, True
                member.work.passable = False
            self.batch, self.closing = [], False

    @rule()
    def commit(self) -> None:
        """Offsets are on their way; more may begin when they are known to be committed."""
        for number, partition in self.lanes.partitions.items():
            offset = partition.watermark.advance()
            expected, gap = 0, self.gaps.get(number, math.inf)
            for one in self._of(number):
                if not one.ended or one.offset > gap:
                    break
                expected = one.offset + 1
            fresh = any(one.offset < expected and not one.committed for one in self._of(number))
            assert (expected if fresh else None) == offset
            if offset is not None:
                self.unacknowledged[number] = offset

    @precondition(lambda self: self.unacknowledged)
    @rule()
    def acknowledge(self) -> None:
        for number, offset in self.unacknowledged.items():
            self.lanes.committed(number, offset)
            for one in self._of(number):
                one.committed = one.committed or one.offset < offset
        self.unacknowledged = {}

    @precondition(lambda self: self.phase == OPEN)
    @rule()
    def close(self) -> None:
        """A rebalance begins: only what is before something that was begun is begun as well."""
        self.phase = CLOSED
        for number in self.ends:
            ones = self._of(number)
            ended = [one.offset for one in ones if one.ended]
            busy = [one.offset for one in ones if one.begun and one.state not in (RESTS, OVER)]
            self.limits[number] = max([-1, *ended, *busy])
        self.lanes.close()
        self.ones = [one for one in self.ones if one.offset <= self.limits[one.number] or one.begun]
        for one in self._in(RESTS):
            if one in self.ones and one.offset > self.limits[one.number]:
                self._end(one, well=False)

    @precondition(lambda self: self.phase == CLOSED)
    @rule()
    def clear(self) -> None:
        """The time for that is over."""
        self.phase = CLEARED
        self.lanes.clear()
        for one in self.ones:  # what has not begun is the next replica's, and holds up commits
            if not one.begun:
                self.gaps[one.number] = min(one.offset, self.gaps.get(one.number, math.inf))
        self.ones = [one for one in self.ones if one.begun]

    @precondition(lambda self: self.phase != OPEN and (self.phase == CLEARED or self.lanes.idle))
    @rule(count=st.integers(0, 4))
    def assign(self, count: int) -> None:
        """A rebalance ends, although a handler may have ignored that it was cancelled."""
        for one in self._in(GATHERS, TURN, RETURNS):
            self._end(one, well=False)
        self.old = self._in(*BEGUN)
        self.ones, self.unacknowledged, self.batch, self.closing = [], {}, [], False
        self.gaps.clear()
        self.lanes.assign(())
        self._assign(count)
        self.phase = OPEN if count else CLEARED

    # What always holds

    @invariant()
    def holds(self) -> None:
        lanes = self.lanes
        assert len(self._seated()) <= self.concurrency
        assert len(self._seated()) == lanes._seated
        begun = {one.work for one in (*self.old, *self.ones) if one.begun and not one.over}
        assert begun == lanes.working
        for number, partition in lanes.partitions.items():
            ones = self._of(number)
            assert sum(one.seat for one in ones) == partition.running
            assert self._begun(number) == partition.begun
            if self.phase == OPEN:
                assert partition.begun <= self.events_share
                assert sum(one.size for one in ones if not one.over) == partition.size
                assert sum(not one.committed for one in ones) == len(partition.watermark)
                self._check_tails(ones, partition)
        quiet = sum(self._runs_nothing(number) for number in self.ends)
        assert quiet == lanes._quiet

    def _check_tails(self, ones: list[One], partition: Partition) -> None:
        last = {one.key: one.offset for one in ones if one.key is not None and not one.over}
        assert last == {key: work.record.offset for key, work in partition.tails.items()}

    @invariant()
    def is_full(self) -> None:
        if self.phase != OPEN:
            return
        full = [
            number
            for number in self.ends
            if sum(not one.committed for one in self._of(number)) >= self.events_share
            or sum(one.size for one in self._of(number) if not one.over) >= self.bytes_share
        ]
        assert full == self.lanes.full()

    @invariant()
    def keys_run_alone(self) -> None:
        """Two of a lane run side by side in one batch only."""
        for one in self._in(RUNS):
            assert [] == one.before
        for one in self._in(CALLED):
            assert {CALLED, RESTS, RETURNS, FRESH, RUNS, GATHERS} >= {
                other.state for other in one.before
            }

    @invariant()
    def a_seat_for_each_quiet_partition(self) -> None:
        """As long as half of the seats suffice, a partition that runs nothing can begin at once."""
        if len(self.ends) > self.concurrency // 2:
            return
        free = self.concurrency - len(self._seated())
        old = sum(one.seat for one in self.old)
        quiet = sum(self._runs_nothing(number) for number in self.ends)
        assert free + old >= quiet

    @invariant()
    def all_that_was_closed_ends(self) -> None:
        """When nothing is left to do in a rebalance, all that has ended can be committed."""
        assert self.lanes.idle == (not self.lanes.working and not self.lanes._turns)
        if self.phase != CLOSED or not self.lanes.idle:
            return
        assert [] == [one for one in self.ones if not one.over]
        for number, partition in self.lanes.partitions.items():
            ended = [one.offset for one in self._of(number) if one.ended]
            partition.watermark.advance()
            assert max(ended, default=-1) + 1 == (partition.watermark._low or 0)

    def teardown(self) -> None:
        """When everything ends and is committed, everything has run and nothing is left."""
        if not hasattr(self, "lanes"):
            return
        for _ in range(10_000):
            if not self._step():
                break
        if self.phase != OPEN:
            self.all_that_was_closed_ends()
            self.assign(2)
        assert [] == self.old + [one for one in self.ones if not one.over or not one.committed]
        self.holds()
        assert (0, len(self.ends)) == (self.lanes._seated, self.lanes._quiet)
        assert not self.lanes._turns
        assert not self.lanes._returning
        assert set() == self.lanes.working
        for partition in self.lanes.partitions.values():
            assert (0, 0, 0) == (partition.running, partition.begun, partition.size)
            assert (0, {}) == (len(partition.watermark), partition.tails)

    def _step(self) -> bool:
        """Do something that goes on; returns whether anything did."""
        self.old = [one for one in self.old if not one.over]
        if self._in(FRESH):
            self.go_on(0, joins=True)
        elif self._in(RUNS, CALLED):
            self.end(0)
        elif self._in(RESTS):
            self.wake(0)
        elif ready := [at for at, one in enumerate(self._in(TURN)) if not one.before]:
            self.take_turn(ready[0])
        elif self._may_begin():
            self._begin()
        elif self.batch and not self.closing:
            self.close_batch()
        else:
            self.commit()
            acknowledged = bool(self.unacknowledged)
            self.acknowledge()
            return acknowledged
        return True


TestSeveral = Several.TestCase
TestSeveral.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
