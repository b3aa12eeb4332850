"""Lanes and seats: keys in order, nobody starved, nothing stuck."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kafka_broker._lanes import Lanes, Work
from kafka_broker._transport.memory_log import MemoryRecord

ENGINE: Any = None


def _lanes(
    concurrency: int = 10, *, partitions: int = 1, events: int = 1000, size: int = 100_000
) -> Lanes:
    lanes = Lanes(concurrency, max_events=events * partitions, max_bytes=size * partitions)
    lanes.assign(range(partitions))
    return lanes


def _add(lanes: Lanes, *keys: str, partition: int = 0, at: int = 0) -> None:
    """Add a record for each key, an empty one is none; offsets go on from *at*."""
    lanes.add(
        [
            MemoryRecord("t", partition, at + index, 0, key.encode() or None, b"12345", ())
            for index, key in enumerate(keys)
        ],
        ENGINE,
    )


def _begin(lanes: Lanes) -> list[Work]:
    """Begin whatever may begin."""
    begun = []
    while (work := lanes.next()) is not None:
        begun.append(work)
    return begun


def _offsets(works: list[Work]) -> list[int]:
    return [work.record.offset for work in works]


def _end(lanes: Lanes, *works: Work) -> None:
    for work in works:
        work.ended = True
        lanes.end(work)


def _commit(lanes: Lanes, partition: int = 0) -> int | None:
    offset = lanes.partitions[partition].watermark.advance()
    if offset is not None:
        lanes.committed(partition, offset)
    return offset


def _nothing_left(lanes: Lanes) -> None:
    assert (0, len(lanes.partitions)) == (lanes._seated, lanes._quiet)
    assert (0, 0, set()) == (len(lanes._turns), len(lanes._returning), lanes.working)
    for one in lanes.partitions.values():
        assert (0, 0, 0, {}) == (one.running, one.begun, one.size, one.tails)
        assert 0 == len(one.watermark)


# Lanes


def test_one_key_runs_one_after_the_other() -> None:
    """The next of a key begins when the one before has ended; other keys do not wait."""
    lanes = _lanes()
    _add(lanes, "a", "a", "b", "a")
    first, other = _begin(lanes)
    assert [0, 2] == _offsets([first, other])
    _end(lanes, first)
    [second] = _begin(lanes)
    assert 1 == second.record.offset
    _end(lanes, second, other)
    [third] = _begin(lanes)
    _end(lanes, third)
    assert 4 == _commit(lanes)
    _nothing_left(lanes)


def test_records_without_a_key_wait_for_nobody() -> None:
    """They have no order to keep."""
    lanes = _lanes()
    _add(lanes, "", "", "")
    assert [0, 1, 2] == _offsets(_begin(lanes))


def test_an_empty_key_is_a_key() -> None:
    """Only a key that is missing is none."""
    lanes = _lanes()
    lanes.add([MemoryRecord("t", 0, at, 0, b"", None, ()) for at in range(2)], ENGINE)
    assert [0] == _offsets(_begin(lanes))


def test_the_same_key_in_two_partitions_is_two_lanes() -> None:
    """Kafka orders a key within a partition only."""
    lanes = _lanes(partitions=2)
    _add(lanes, "a")
    _add(lanes, "a", partition=1)
    assert [0, 1] == [work.record.partition for work in _begin(lanes)]


def test_a_key_whose_records_have_ended_is_forgotten() -> None:
    """What comes later begins at once, and a lane costs nothing when it is empty."""
    lanes = _lanes()
    _add(lanes, "a")
    _end(lanes, *_begin(lanes))
    assert {} == lanes.partitions[0].tails
    _add(lanes, "a", at=1)
    assert [1] == _offsets(_begin(lanes))


def test_partitions_take_turns() -> None:
    """However much one has, each may begin one record in its turn."""
    lanes = _lanes(partitions=3)
    _add(lanes, "", "", "")
    _add(lanes, "", "", partition=1)
    _add(lanes, "", partition=2)
    assert [0, 1, 2, 0, 1, 0] == [work.record.partition for work in _begin(lanes)]


def test_where_and_done() -> None:
    """A record names its place; it is done when its handling and all of its endings are."""
    lanes = _lanes()
    _add(lanes, "a", at=7)
    [work] = _begin(lanes)
    ending = asyncio.Event()

    class Ends:
        def done(self) -> bool:
            return ending.is_set()

    work.endings.append(Ends())
    assert ("t:0:7", False) == (work.where, work.done())
    _end(lanes, work)
    assert (False, None) == (work.done(), _commit(lanes))
    ending.set()
    assert (True, 8) == (work.done(), _commit(lanes))


# Seats


def test_there_are_no_more_seats_than_concurrency() -> None:
    """What has no seat begins when one is free, the oldest first."""
    lanes = _lanes(2)
    _add(lanes, "a", "b", "c", "d")
    first, _ = _begin(lanes)
    assert not lanes.startable
    _end(lanes, first)
    assert lanes.startable
    assert [2] == _offsets(_begin(lanes))


@pytest.mark.parametrize(
    ("concurrency", "partitions", "hot"), [(1, 5, 1), (2, 2, 1), (10, 3, 8), (10, 9, 5), (7, 1, 7)]
)
def test_a_hot_partition_leaves_seats_to_those_that_run_nothing(
    concurrency: int, partitions: int, hot: int
) -> None:
    """One for each of them, but not more than half of all."""
    lanes = _lanes(concurrency, partitions=partitions)
    _add(lanes, *[""] * 20)
    assert hot == len(_begin(lanes))
    assert lanes.startable == (hot < concurrency)
    for partition in range(1, min(partitions, concurrency - hot + 1)):
        _add(lanes, "", "", partition=partition)
        assert [partition] == [work.record.partition for work in _begin(lanes)]


def test_a_seat_that_is_given_up_is_another_s() -> None:
    """Who rests needs none, and does not let the next of its key pass."""
    lanes = _lanes(1)
    _add(lanes, "a", "a", "b")
    [resting] = _begin(lanes)
    lanes.give_up_seat(resting)
    lanes.give_up_seat(resting)
    [other] = _begin(lanes)
    assert 2 == other.record.offset
    _end(lanes, resting)
    assert ([], 1) == (_begin(lanes), lanes._seated)
    _end(lanes, other)
    assert [1] == _offsets(_begin(lanes))


def test_who_comes_back_is_before_those_that_are_new() -> None:
    """In the order in which they came back, each when a seat is free."""
    lanes, seated = _lanes(2), list[str]()
    _add(lanes, *[""] * 6)
    first, second = _begin(lanes)
    lanes.give_up_seat(first)
    lanes.give_up_seat(second)
    third, fourth = _begin(lanes)
    lanes.return_to_seat(second, lambda: seated.append("second"))
    lanes.return_to_seat(first, lambda: seated.append("first"))
    assert ([], []) == (_begin(lanes), seated)
    _end(lanes, third)
    assert ([], ["second"]) == (_begin(lanes), seated)
    _end(lanes, fourth)
    assert ([], ["second", "first"]) == (_begin(lanes), seated)
    _end(lanes, second)
    assert [4] == _offsets(_begin(lanes))


def test_who_comes_back_to_a_free_seat_has_it_at_once() -> None:
    """Nobody has to end first."""
    lanes, seated = _lanes(), list[str]()
    _add(lanes, "")
    [work] = _begin(lanes)
    lanes.give_up_seat(work)
    lanes.return_to_seat(work, lambda: seated.append("it"))
    assert (["it"], True, 1) == (seated, work.seated, lanes._seated)


def test_who_ended_while_it_waited_gets_no_seat() -> None:
    """A rebalance drops what waits; its seat is the next one's."""
    lanes, seated = _lanes(1), list[str]()
    _add(lanes, "", "", "")
    [dropped] = _begin(lanes)
    lanes.give_up_seat(dropped)
    [running] = _begin(lanes)
    lanes.return_to_seat(dropped, lambda: seated.append("dropped"))
    lanes.end(dropped)
    _end(lanes, running)
    assert [2] == _offsets(_begin(lanes))
    assert ([], False) == (seated, dropped.seated)


def test_a_second_wait_for_a_seat_replaces_the_first() -> None:
    """A wait that was cut off, by a time limit for example, must not take the seat of the next."""
    lanes, seated = _lanes(1), list[str]()
    _add(lanes, "", "")
    [work] = _begin(lanes)
    lanes.give_up_seat(work)
    [running] = _begin(lanes)
    lanes.return_to_seat(work, lambda: seated.append("cut off"))
    lanes.return_to_seat(work, lambda: seated.append("again"))
    _end(lanes, running)
    assert "again" in seated
    _end(lanes, work)
    assert 2 == _commit(lanes)
    _nothing_left(lanes)


def test_who_comes_back_leaves_a_seat_to_partitions_that_run_nothing() -> None:
    """Retries of a hot partition may not take the last seat, on which another's records rely."""
    lanes, seated = _lanes(4, partitions=2), list[int]()
    _add(lanes, *[""] * 6)
    resting = _begin(lanes)
    for work in resting:
        lanes.give_up_seat(work)
    running = _begin(lanes)
    for work in resting:
        lanes.return_to_seat(work, lambda work=work: seated.append(work.record.offset))  # type: ignore[misc]  # bound
    assert (3, 3) == (len(resting), len(running))
    _add(lanes, "", partition=1)
    assert [1] == [work.record.partition for work in _begin(lanes)]
    _end(lanes, *running)
    assert _offsets(resting) == seated


# What is in flight


def test_no_more_are_begun_than_may_be_uncommitted() -> None:
    """Ended or not: what is not committed counts, for its own partition alone."""
    lanes = _lanes(partitions=2, events=3)
    _add(lanes, *[""] * 5)
    first, *rest = _begin(lanes)
    assert [0, 1, 2] == _offsets([first, *rest])
    _add(lanes, "", partition=1)
    assert [1] == [work.record.partition for work in _begin(lanes)]
    _end(lanes, *rest)
    assert (None, []) == (_commit(lanes), _begin(lanes))
    _end(lanes, first)
    assert [] == _begin(lanes)
    assert (3, [3, 4]) == (_commit(lanes), _offsets(_begin(lanes)))


def test_the_last_place_is_for_the_record_that_all_commits_wait_for() -> None:
    """Else those behind it could use up the share, and nothing would ever be committed."""
    lanes = _lanes(events=3)
    _add(lanes, "a", "a", "b", "c", "d")
    begun = _begin(lanes)
    assert [0, 2, 3] == _offsets(begun)
    _end(lanes, *begun)
    assert 1 == _commit(lanes)
    [held_up] = _begin(lanes)
    assert 1 == held_up.record.offset
    _end(lanes, held_up)
    assert (4, [4]) == (_commit(lanes), _offsets(_begin(lanes)))


def test_a_partition_is_full_until_enough_is_committed() -> None:
    """Nothing more is read of a full one; the others are read on."""
    lanes = _lanes(partitions=2, events=3)
    _add(lanes, "", "")
    assert [] == lanes.full()
    _add(lanes, "", at=2)
    assert [0] == lanes.full()
    _end(lanes, *_begin(lanes))
    assert [0] == lanes.full()
    assert (3, []) == (_commit(lanes), lanes.full())


def test_a_partition_is_full_while_its_records_are_too_large() -> None:
    """Their bytes count until their handling ends, committed or not."""
    lanes = _lanes(partitions=2, size=250)
    _add(lanes, "", "")
    assert [] == lanes.full()
    _add(lanes, "k", at=2)
    assert (316, [0]) == (lanes.partitions[0].size, lanes.full())
    _, second, _ = _begin(lanes)
    _end(lanes, second)
    assert (211, []) == (lanes.partitions[0].size, lanes.full())


@pytest.mark.parametrize("events", [1, 2, 5])
def test_the_oldest_can_always_begin(events: int) -> None:
    """What was read later never uses up the room that the next to be committed needs."""
    lanes = _lanes(events=events)
    _add(lanes, "a", "a", "a", *[""] * 10)
    ended = list[int]()
    while begun := _begin(lanes):
        _end(lanes, *begun[1:], begun[0])
        ended += _offsets(begun)
        _commit(lanes)
    assert list(range(13)) == sorted(ended)
    _nothing_left(lanes)


def test_shares_are_at_least_one() -> None:
    """With more partitions than may be in flight each may still have one."""
    lanes = Lanes(10, max_events=2, max_bytes=2)
    lanes.assign(range(5))
    assert (1, 1) == (lanes.events_share, lanes.bytes_share)
    lanes.assign(())
    assert ([], False, None) == (lanes.full(), lanes.startable, lanes.next())


def test_the_last_that_has_ended() -> None:
    """A partition knows the highest offset whose handling ended; what was dropped did not."""
    lanes = _lanes()
    _add(lanes, "", "", "", "")
    first, second, third, dropped = _begin(lanes)
    assert -1 == lanes.partitions[0].last_ended
    _end(lanes, third)
    _end(lanes, first)
    lanes.end(dropped)
    assert 2 == lanes.partitions[0].last_ended
    _end(lanes, second)
    assert 2 == lanes.partitions[0].last_ended


# Beside each other, in a batch


def _row(lanes: Lanes, *keys: str) -> list[Work]:
    """Begin one record after the other, each waiting in a batch and letting the next pass."""
    _add(lanes, *keys)
    works = []
    while (work := lanes.next()) is not None:
        works.append(work)
        lanes.give_up_seat(work)
        lanes.let_pass(work)
    return works


def test_the_next_of_a_key_may_join_a_batch() -> None:
    """It begins beside the one before and knows it; so does one that comes later."""
    lanes = _lanes(1)
    first, second = _row(lanes, "a", "a")
    _add(lanes, "a", at=2)
    [third] = _begin(lanes)
    assert (None, first, second) == (first.behind, second.behind, third.behind)
    _add(lanes, "a", at=3)
    assert [] == _begin(lanes)


def test_a_batch_that_is_closed_lets_nobody_pass() -> None:
    """Who comes then waits until all before it have ended, in whichever order they do."""
    for order in ([0, 1], [1, 0]):
        lanes = _lanes()
        works = _row(lanes, "a", "a")
        for work in works:
            work.passable = False
        _add(lanes, "a", at=2)
        assert [] == _begin(lanes)
        _end(lanes, works[order[0]])
        assert [] == _begin(lanes)
        _end(lanes, works[order[1]])
        [third] = _begin(lanes)
        assert (2, None) == (third.record.offset, third.behind)
        _end(lanes, third)
        assert 3 == _commit(lanes)
        _nothing_left(lanes)


def test_the_turn_of_one_that_passed_comes_when_all_before_have_ended() -> None:
    """It may have begun beside a batch that it could not join."""
    for order in ([0, 1], [1, 0]):
        lanes = _lanes()
        works = _row(lanes, "a", "a", "a")
        waiting = works.pop()
        waiting.turn = asyncio.Event()
        _end(lanes, works[order[0]])
        assert not waiting.turn.is_set()
        _end(lanes, works[order[1]])
        assert waiting.turn.is_set()
        assert waiting.behind is None


def test_one_that_ends_within_a_batch_closes_the_gap() -> None:
    """Those before and behind it are neighbours then, and the order of the key stays."""
    lanes = _lanes()
    first, second, third = _row(lanes, "a", "a", "a")
    _end(lanes, second)
    assert (third, first) == (first.beside, third.behind)
    _end(lanes, third)
    assert (None, first) == (first.beside, lanes.partitions[0].tails[b"a"])
    _add(lanes, "a", at=3)
    [fourth] = _begin(lanes)
    assert first is fourth.behind


def test_the_last_of_a_batch_hands_its_follower_on() -> None:
    """When it ends before the others, its follower may join them, or waits for them."""
    lanes = _lanes()
    first, second = _row(lanes, "a", "a")
    second.passable = False
    _add(lanes, "a", at=2)
    _end(lanes, second)
    [third] = _begin(lanes)
    assert first is third.behind


def test_nobody_passes_one_that_runs() -> None:
    """Only what waits in a batch lets the next of its key begin."""
    lanes = _lanes()
    _add(lanes, "a", "a")
    [first] = _begin(lanes)
    lanes.give_up_seat(first)
    assert [] == _begin(lanes)


# Rebalances


def _ended_beyond(lanes: Lanes) -> list[Work]:
    """Have the fourth record ended before the second and the third, of its key, have begun."""
    _add(lanes, "a", "a", "a", "b", "a", "c")
    first, fourth, sixth = _begin(lanes)
    assert [0, 3, 5] == _offsets([first, fourth, sixth])
    _end(lanes, fourth)
    return [first, sixth]


def test_a_rebalance_closes_the_gaps() -> None:
    """What is before something that has ended is begun as well, so that it can be committed."""
    lanes = _lanes()
    first, sixth = _ended_beyond(lanes)
    sixth.resting = True
    lanes.close()
    lanes.end(sixth)
    ended = []
    while not lanes.idle:
        _end(lanes, first)
        ended.append(first.record.offset)
        first = next(iter(_begin(lanes)), first)
    assert ([0, 1, 2], 4) == (ended, _commit(lanes))


def test_a_rebalance_closes_the_gaps_before_what_runs() -> None:
    """That will end, too, unless it only rests until its next try."""
    lanes = _lanes()
    first, sixth = _ended_beyond(lanes)
    lanes.close()
    assert not lanes.idle
    _end(lanes, first, sixth)
    for offset in (1, 2, 4):
        [work] = _begin(lanes)
        assert offset == work.record.offset
        _end(lanes, work)
    assert (True, 6) == (lanes.idle, _commit(lanes))


def test_a_rebalance_closes_gaps_whatever_is_in_flight() -> None:
    """The share is no limit then: nothing is committed before all of that has ended."""
    lanes = _lanes(events=2)
    _add(lanes, "a", "a", "a", "a", "b")
    lanes.partitions[0].last_ended = 3
    lanes.close()
    for offset in range(4):
        [work] = _begin(lanes)
        assert offset == work.record.offset
        _end(lanes, work)
    assert ([], True, 4) == (_begin(lanes), lanes.idle, _commit(lanes))


def test_a_rebalance_begins_nothing_when_nothing_was_begun() -> None:
    """Everything is the next replica's then, in each partition by itself."""
    lanes = _lanes(partitions=2)
    _add(lanes, "a", "a")
    [running] = _begin(lanes)
    _add(lanes, "a", "", partition=1)
    lanes.close()
    assert ([], False) == (_begin(lanes), lanes.idle)
    _end(lanes, running)
    assert ([], True) == (_begin(lanes), lanes.idle)


def test_a_rebalance_forgets_what_was_not_begun() -> None:
    """What runs goes on, and what was behind it begins nowhere here."""
    lanes = _lanes(2)
    _add(lanes, "a", "a", "b", "c")
    works = _begin(lanes)
    lanes.clear()
    assert (False, set(works)) == (lanes.startable, lanes.working)
    _end(lanes, *works)
    assert ([], 1) == (_begin(lanes), _commit(lanes))


@pytest.mark.parametrize("passes", [False, True])
def test_what_ends_after_a_rebalance_disturbs_nothing(passes: bool) -> None:  # noqa: FBT001  # a case
    """A handler may ignore that it was cancelled: its end frees its seat, and no more than that."""
    lanes = _lanes(2)
    _add(lanes, "a", "a")
    [old] = _begin(lanes)
    if passes:
        lanes.let_pass(old)
    lanes.clear()
    lanes.assign(())
    lanes.assign({0, 1})
    _add(lanes, "a", "a")
    [new] = _begin(lanes)
    assert (2, 1, 1) == (lanes._seated, lanes._quiet, lanes.partitions[0].running)
    lanes.let_pass(old)
    _end(lanes, old)
    assert (1, 1, 1) == (lanes._seated, lanes._quiet, lanes.partitions[0].running)
    assert (new, None, -1) == (
        new.partition.tails[b"a"].behind or new,
        _commit(lanes),
        new.partition.last_ended,
    )
    _end(lanes, new)
    _end(lanes, *_begin(lanes))
    assert 2 == _commit(lanes)
    _nothing_left(lanes)


def test_an_old_record_comes_back_to_a_seat() -> None:
    """It holds one like any other, until it ends, but is none of the new partition's."""
    lanes, seated = _lanes(1), list[str]()
    _add(lanes, "")
    [old] = _begin(lanes)
    lanes.give_up_seat(old)
    lanes.clear()
    lanes.assign({0})
    lanes.return_to_seat(old, lambda: seated.append("old"))
    _add(lanes, "")
    assert (["old"], [], 0) == (seated, _begin(lanes), lanes.partitions[0].running)
    _end(lanes, old)
    [new] = _begin(lanes)
    _end(lanes, new)
    assert 1 == _commit(lanes)
    _nothing_left(lanes)


def test_what_has_ended_is_not_asked_again() -> None:
    """However much a handler has produced, it costs nothing while another record waits for it."""

    class Ending:
        over = False
        asked = 0

        def done(self) -> bool:
            self.asked += 1
            return self.over

    lanes, endings = _lanes(), [Ending() for _ in range(5)]
    _add(lanes, "", "", "")
    first, *others = _begin(lanes)
    first.endings += endings
    for ending in endings[:4]:
        ending.over = True
    _end(lanes, first, *others)
    assert (None, [0, 0, 0, 0]) == (_commit(lanes), [ending.asked for ending in endings[:4]])
    endings[4].over = True
    assert (3, [1, 1, 1, 1]) == (_commit(lanes), [ending.asked for ending in endings[:4]])


def test_what_is_done_is_let_go_before_the_commit() -> None:
    """Else the garbage collector would find it in an old generation."""
    lanes = _lanes()
    _add(lanes, *"abc")
    first, *others = _begin(lanes)
    _end(lanes, *others)
    assert [first, *others] == list(lanes.partitions[0].watermark.pending())
    _end(lanes, first)
    assert [] == list(lanes.partitions[0].watermark.pending())
    assert 3 == _commit(lanes)
