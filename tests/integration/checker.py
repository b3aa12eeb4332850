"""Judges what the workers logged: lost, doubled, out of order, two at a time; no I/O.

A *handling* is one call of a handler. A process that was killed or frozen explains some faults, and
no others: what explains one is an argument here, and never guessed from the logs.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Pair = tuple["Handling", "Handling"]


class Handling(NamedTuple):
    """One call of a handler; times are nanoseconds of the machine's monotonic clock.

    Attributes:
        end: None as long as it has none, as in a process that was killed.
        outcome: ``end``, ``failed`` or ``cut`` (cancelled); empty as long as it has no end.
    """

    pid: int
    event: str
    number: int
    key: str
    partition: int
    offset: int
    attempt: int
    begin: int
    end: int | None = None
    outcome: str = ""


def handlings(entries: Iterable[Mapping[str, Any]]) -> list[Handling]:
    """Return what the lines of any number of logs tell, in the order of the beginnings."""
    begun: dict[tuple[int, int], Handling] = {}
    for entry in entries:
        call = (entry["pid"], entry.get("call", 0))
        if entry["what"] == "begin":
            about = {name: entry[name] for name in Handling._fields[:7]}
            begun[call] = Handling(**about, begin=entry["at"])
        elif call in begun:
            begun[call] = begun[call]._replace(end=entry["at"], outcome=entry["what"])
    return sorted(begun.values(), key=lambda one: one.begin)


def lost(numbers: Iterable[int], handled: Iterable[Handling]) -> list[int]:
    """Return the numbers for which no handler has returned."""
    return sorted(set(numbers) - {one.number for one in handled if one.outcome == "end"})


def doubled(handled: Iterable[Handling]) -> list[Pair]:
    """Return each handling that repeats an earlier one of the same record and the same attempt."""
    latest: dict[tuple[int, int, int], Handling] = {}
    pairs = []
    for one in handled:
        place = (one.partition, one.offset, one.attempt)
        if place in latest:
            pairs.append((latest[place], one))
        latest[place] = one
    return pairs


def unexplained(pairs: Iterable[Pair], killed: Mapping[int, int]) -> list[Pair]:
    """Return the pairs whose first process had not been killed before the second began.

    Args:
        pairs: as `doubled` returns them.
        killed: when each process that was killed was gone.
    """
    return [
        (first, second) for first, second in pairs if second.begin <= killed.get(first.pid, inf)
    ]


def out_of_order(handled: Iterable[Handling]) -> list[Pair]:
    """Return the handlings that began after one of their key with a higher number.

    That must not be for the first handling of an event, whoever handles it; and not for any
    handling within one process, which never comes back to what is behind it. What is left is the
    repetition that a crash explains: another process begins again at what was committed.
    """
    highest: dict[str, Handling] = {}
    highest_here: dict[tuple[int, str], Handling] = {}
    known: set[int] = set()
    pairs = []
    for one in handled:
        here = highest_here.setdefault((one.pid, one.key), one)
        first = highest.setdefault(one.key, one)
        if one.number < here.number:
            pairs.append((here, one))
        elif one.number < first.number and one.number not in known:
            pairs.append((first, one))
        known.add(one.number)
        highest_here[one.pid, one.key] = max(here, one, key=lambda each: each.number)
        highest[one.key] = max(first, one, key=lambda each: each.number)
    return pairs


def overlapping(handled: Iterable[Handling], killed: Mapping[int, int] | None = None) -> list[Pair]:
    """Return the handlings that began while another one of their key ran.

    Args:
        handled: in the order of their beginnings.
        killed: when each process that was killed was gone: no handling there outlived that.
    """
    gone = killed or {}
    last: dict[str, tuple[float, Handling]] = {}
    pairs = []
    for one in handled:
        end = gone.get(one.pid, inf) if one.end is None else one.end
        until, other = last.get(one.key, (-inf, one))
        if one.begin < until:
            pairs.append((other, one))
        last[one.key] = max((until, other), (end, one), key=lambda each: each[0])
    return pairs


def falling(commits: Mapping[int, Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return (partition, before, after) for each commit that is lower than the one before."""
    return [
        (partition, before, after)
        for partition, offsets in sorted(commits.items())
        for before, after in pairwise(offsets)
        if after < before
    ]


def unfinished(committed: Mapping[int, int], handled: Iterable[Handling]) -> list[tuple[int, int]]:
    """Return the places (partition, offset) that are committed and that no handler has ended."""
    ended: dict[int, set[int]] = defaultdict(set)
    for one in handled:
        if one.outcome == "end":
            ended[one.partition].add(one.offset)
    return [
        (partition, offset)
        for partition, end in sorted(committed.items())
        for offset in range(end)
        if offset not in ended[partition]
    ]
