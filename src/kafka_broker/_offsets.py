"""Which offset of a partition may be committed: the one up to which everything has ended."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from kafka_broker._event import Ending

if TYPE_CHECKING:
    from collections.abc import Iterator

One = TypeVar("One", bound=Ending)


class Watermark(Generic[One]):
    """The contiguous low watermark of one partition, for as long as it is assigned to us.

    Pure bookkeeping: nothing here waits, and a value that was handed out never goes down.
    """

    __slots__ = ("_advanced", "_begun", "_last", "_low", "_passed")

    def __init__(self) -> None:
        self._begun: deque[tuple[int, One]] = deque()
        self._last = -1
        self._low: int | None = None
        self._passed = 0
        self._advanced: tuple[int | None, int] = None, 0

    def __len__(self) -> int:
        """Return how many records were read and are not below a committed offset."""
        return len(self._begun) + self._passed

    def begin(self, offset: int, ending: One) -> None:
        """Take in the record at *offset*, as it was read; it holds the watermark until it is done.

        Raises:
            ValueError: the offsets do not rise.
        """
        if offset <= self._last:
            msg = f"offset {offset} comes after {self._last}"
            raise ValueError(msg)
        self._last = offset
        self._begun.append((offset, ending))

    def advance(self) -> int | None:
        """Return the offset to commit: the next one to read; None if it is committed already."""
        self.pass_done()
        self._advanced = self._low, self._passed
        return self._low if self._passed else None

    def first(self) -> One | None:
        """Return what holds the watermark, or None."""
        self.pass_done()
        return self._begun[0][1] if self._begun else None

    def pass_done(self) -> None:
        """Let go of what is done, up to the first that is not."""
        while self._begun and self._begun[0][1].done():
            self._low = self._begun.popleft()[0] + 1
            self._passed += 1

    def committed(self, offset: int) -> int:
        """Note that *offset*, as `advance` gave it last, is committed; returns how many that are.

        What has ended since then is not among them.
        """
        low, passed = self._advanced
        if offset != low:
            return 0
        self._advanced = None, 0
        self._passed -= passed
        return passed

    def pending(self) -> Iterator[One]:
        """Yield what was read and holds the watermark, in the order of offsets."""
        for _, ending in self._begun:
            yield ending
