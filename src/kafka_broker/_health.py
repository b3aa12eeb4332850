"""Health: what a broker knows of itself, for the probes that ask whether it is alive and ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SILENCE: Final = 15.0
"""Seconds without a sign of life after which something is not well."""
_DEAD: Final = 120.0
"""Seconds without going round after which a loop never will, besides what a rebalance may take."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a broker is asked about.

    Attributes:
        ok: whether it is well.
        age: seconds since its last sign of life, or since it is as `detail` says.
        detail: what is the case, in a few words, without addresses or names of topics.
    """

    ok: bool
    age: float
    detail: str


@dataclass(frozen=True, slots=True)
class Health:
    """What a broker knows of itself at this moment.

    Attributes:
        module: whose health it is.
        live: false when only a new process helps: it failed, or one of its loops is dead.
        ready: whether it should be given work: false in a start, a stop and an outage.
        checks: why, by name: ``life``, ``kafka``, ``replies``, ``outbox``, and ``events`` and
            ``postponed events`` of what it reads as a member of a group.
    """

    module: str
    live: bool
    ready: bool
    checks: Mapping[str, Check]


class Pulse:
    """When a loop that reads a topic last showed a sign of life.

    Args:
        now: the time of the event loop.
        grace: seconds for which partitions may be moving.
    """

    def __init__(self, now: Callable[[], float], grace: float = 0.0) -> None:
        self._now = now
        self._grace = grace
        self._round_at = self._read_at = self._changed_at = now()
        self._partitions: int | None = None
        self._had_partitions = False
        self._pausing = False

    def goes_round(self) -> None:
        """Note that the loop is at its beginning."""
        self._round_at = self._now()

    def has_read(self) -> None:
        """Note that a fetch has ended well, be it with nothing."""
        self._round_at = self._read_at = self._now()

    def has_partitions(self, number: int) -> None:
        """Note an assignment."""
        self._had_partitions = True
        self._partitions, self._changed_at = number, self._now()
        self.has_read()

    def has_none(self) -> None:
        """Note that it has none now: they move, or what it reads with broke and is replaced."""
        if self._partitions is not None:
            self._partitions, self._changed_at = None, self._now()

    def pauses(self, *, pausing: bool) -> None:
        """Note whether it waits until there is room for what it would read."""
        self._pausing = pausing
        self.has_read()

    @property
    def dead(self) -> bool:
        """Whether it should have gone round long ago."""
        return not self._pausing and self._now() - self._round_at > _DEAD + self._grace

    def check(self) -> Check:
        """Return how it is."""
        now = self._now()
        if self._partitions is None:
            age = now - self._changed_at
            moving = self._had_partitions and age < self._grace
            return Check(moving, age, "its partitions move" if moving else "it has no partitions")
        age = now - self._read_at
        if self._pausing:
            return Check(ok=True, age=age, detail="waits for handlers before it reads on")
        what = f"reads {self._partitions} partitions" if self._partitions else "stands by"
        return Check(age < SILENCE, age, what)
