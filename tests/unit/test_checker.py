"""The checker of the integration tests finds what hand-made logs have wrong."""

from __future__ import annotations

from typing import Any

from tests.integration import checker
from tests.integration.checker import Handling

A, B = 1, 2


def _handled(pid: int, number: int, begin: int, end: int | None = None, **more: Any) -> Handling:
    about: dict[str, Any] = {"event": "work", "key": "k", "partition": 0, "attempt": 1}
    about |= {"pid": pid, "number": number, "offset": number, "begin": begin, "end": end, **more}
    about.setdefault("outcome", "end" if end else "")
    return Handling(**about)


def test_lines_become_handlings() -> None:
    """A beginning and its end are one handling; a killed process leaves one without an end."""
    about = {"pid": A, "event": "work", "key": "k", "partition": 3, "attempt": 1}
    lines: list[dict[str, Any]] = [
        {"what": "ready", "pid": A, "at": 1},
        {"what": "begin", "call": 2, "number": 8, "offset": 5, "at": 20, **about},
        {"what": "begin", "call": 1, "number": 7, "offset": 4, "at": 10, **about},
        {"what": "cut", "call": 1, "pid": A, "at": 30},
    ]
    assert [
        Handling(A, "work", 7, "k", 3, 4, 1, 10, 30, "cut"),
        Handling(A, "work", 8, "k", 3, 5, 1, 20),
    ] == checker.handlings(lines)


def test_lost() -> None:
    """What never began and what began without returning is lost."""
    handled = [_handled(A, 0, 1, 2), _handled(A, 1, 3), _handled(A, 2, 4, 5, outcome="failed")]
    assert [1, 2, 3] == checker.lost(range(4), handled)


def test_doubled() -> None:
    """The same attempt at the same record twice is a double; the next attempt is none."""
    handled = [_handled(A, 0, 1, 2), _handled(A, 0, 3, 4, attempt=2), _handled(B, 0, 5, 6)]
    assert [(handled[0], handled[2])] == checker.doubled(handled)


def test_a_double_is_explained_by_the_end_of_the_first_process() -> None:
    """Only a process that was killed before the repetition began explains it."""
    pair = (_handled(A, 0, 1, 2), _handled(B, 0, 5, 6))
    assert [] == checker.unexplained([pair], {A: 4})
    assert [pair] == checker.unexplained([pair], {A: 5})
    assert [pair] == checker.unexplained([pair], {B: 4})


def test_out_of_order() -> None:
    """A first handling after a higher number of its key is out of order, wherever it is."""
    handled = [_handled(A, 5, 1, 2), _handled(B, 4, 3, 4), _handled(B, 3, 5, 6, key="other")]
    assert [(handled[0], handled[1])] == checker.out_of_order(handled)


def test_a_repetition_by_another_process_is_in_order() -> None:
    """After a crash another process begins again; what never began may not come before that."""
    repeated = [_handled(A, 4, 1, 2), _handled(A, 5, 3), _handled(B, 4, 5, 6), _handled(B, 5, 7, 8)]
    assert [] == checker.out_of_order(repeated)
    back = _handled(B, 4, 9, 10)
    assert [(repeated[3], back)] == checker.out_of_order([*repeated, back])


def test_overlapping() -> None:
    """Two handlings of one key at a time are found, also when one of them never ended."""
    long, short = _handled(A, 0, 1, 9), _handled(A, 1, 2, 3)
    late, apart = _handled(B, 2, 8, 9), _handled(B, 3, 2, 3, key="other")
    assert [(long, short), (long, late)] == checker.overlapping([long, short, apart, late])
    opened, after = _handled(A, 4, 10), _handled(B, 5, 20, 21)
    assert [(opened, after)] == checker.overlapping([opened, after])
    assert [(opened, after)] == checker.overlapping([opened, after], {A: 30})
    assert [] == checker.overlapping([opened, after], {A: 15})


def test_falling() -> None:
    """A commit that is lower than the one before is found in its partition."""
    assert [(1, 4, 3)] == checker.falling({0: [1, 1, 2], 1: [2, 4, 3, 5]})


def test_unfinished() -> None:
    """What is committed has an end."""
    handled = [_handled(A, 0, 1, 2), _handled(A, 1, 3), _handled(A, 2, 4, 5)]
    assert [(0, 1)] == checker.unfinished({0: 3, 1: 0}, handled)
