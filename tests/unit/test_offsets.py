"""The watermark: in whichever order events end, what is committed has ended, and all before it."""

from __future__ import annotations

from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kafka_broker._offsets import Watermark

if TYPE_CHECKING:
    from collections.abc import Iterable

STEPS = ["begin", "end", "pass", "look", "commit"]


class Task:
    """Something that ends when the test says so."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over


def _begun(offsets: Iterable[int]) -> tuple[Watermark[Task], dict[int, Task]]:
    watermark, tasks = Watermark[Task](), {offset: Task() for offset in offsets}
    for offset, task in tasks.items():
        watermark.begin(offset, task)
    return watermark, tasks


def _low(tasks: dict[int, Task]) -> int | None:
    """Return what the definition says: the offset behind all that have ended without a gap."""
    ended = [offset for offset, _ in takewhile(lambda one: one[1].over, tasks.items())]
    return ended[-1] + 1 if ended else None


gaps = st.lists(st.integers(1, 1000), min_size=1, max_size=12)
offsets = gaps.map(lambda steps: [at - 1 for at in accumulate(steps)])
orders = offsets.flatmap(lambda ones: st.tuples(st.just(ones), st.permutations(ones)))


@given(orders)
def test_the_watermark_is_the_contiguous_low_one(order: tuple[list[int], list[int]]) -> None:
    """After each ending, in any order and with any gaps between offsets, it is where it should."""
    numbers, endings = order
    watermark, tasks = _begun(numbers)
    assert watermark.advance() is None
    for offset in endings:
        tasks[offset].over = True
        assert _low(tasks) == watermark.advance()
    assert numbers[-1] + 1 == watermark.advance()
    assert [] == list(watermark.pending())


@given(orders, st.sets(st.integers(0, 11)))
def test_endings_that_come_by_themselves_count(
    order: tuple[list[int], list[int]], looked: set[int]
) -> None:
    """Nobody has to tell: what has ended by the next look counts, however much that is."""
    numbers, endings = order
    watermark, tasks = _begun(numbers)
    for turn, offset in enumerate(endings):
        tasks[offset].over = True
        if turn in looked:
            assert _low(tasks) == watermark.advance()
    assert _low(tasks) == watermark.advance()


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 30))))
def test_commits_that_come_late(steps: list[tuple[str, int]]) -> None:
    """Whatever begins and ends meanwhile: the counts hold, and nothing handed out goes down."""
    watermark, tasks = Watermark[Task](), dict[int, Task]()
    seen: int | None = None
    committed = 0
    handed_out = [0]
    for step, number in steps:
        if step == "begin":
            offset = max(tasks, default=-1) + 1 + number
            tasks[offset] = Task()
            watermark.begin(offset, tasks[offset])
        elif step == "end" and tasks:
            list(tasks.values())[number % len(tasks)].over = True
        elif step == "look":
            low = _low(tasks)
            seen = low or seen
            below = sum(offset < (low or 0) for offset in tasks)
            assert (low if below > committed else None) == watermark.advance()
            handed_out.append(low or 0)
        elif step == "pass":
            watermark.pass_done()
        elif step == "commit":
            offset = handed_out[number % len(handed_out)]
            below = sum(one < offset for one in tasks)
            adds = below - committed if offset == seen else 0
            assert adds == watermark.committed(offset)
            committed += adds
        assert len(tasks) - committed == len(watermark)
    assert sorted(handed_out) == handed_out


def test_what_ends_during_a_commit_does_not_hide_it() -> None:
    """The places of what was committed are free at once, however much has ended since."""
    watermark, tasks = _begun(range(3))
    tasks[0].over = True
    assert 1 == watermark.advance()
    tasks[1].over = True
    watermark.pass_done()
    assert (1, 2) == (watermark.committed(1), len(watermark))
    assert (2, 1, 1) == (watermark.advance(), watermark.committed(2), len(watermark))


def test_nothing_new_is_none() -> None:
    """An offset that is committed is not handed out again; one that is not, is."""
    watermark, tasks = _begun([4, 5])
    tasks[4].over = True
    assert (5, 5) == (watermark.advance(), watermark.advance())
    assert 1 == watermark.committed(5)
    assert (None, 0) == (watermark.advance(), watermark.committed(5))
    tasks[5].over = True
    assert 6 == watermark.advance()


def test_a_late_commit_adds_nothing_by_itself() -> None:
    """Of an offset that is not the newest nothing is known; the newest one adds all of them."""
    watermark, tasks = _begun(range(3))
    tasks[0].over = True
    assert 1 == watermark.advance()
    tasks[1].over = True
    assert 2 == watermark.advance()
    assert (0, 3) == (watermark.committed(1), len(watermark))
    assert (2, 1) == (watermark.committed(2), len(watermark))


@pytest.mark.parametrize("offset", [7, 6, 0, -1])
def test_offsets_that_do_not_rise_are_refused(offset: int) -> None:
    """The same offset or one before the last is a bug of the caller, also when that has ended."""
    watermark, tasks = _begun([7])
    with pytest.raises(ValueError, match=f"offset {offset} comes after 7"):
        watermark.begin(offset, Task())
    tasks[7].over = True
    assert 8 == watermark.advance()
    with pytest.raises(ValueError, match=f"offset {offset} comes after 7"):
        watermark.begin(offset, Task())
    assert 1 == len(watermark)


def test_what_is_pending() -> None:
    """In the order of offsets, whatever has ended behind the first that has not."""
    watermark, tasks = _begun([1, 3, 8])
    tasks[3].over = True
    assert watermark.advance() is None
    assert list(tasks.values()) == list(watermark.pending())
