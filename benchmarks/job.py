"""What one process of the benchmark is told to do, and what all of them agree on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel

TIMEOUT: Final = 30.0
"""Seconds that any single wait may take."""
DATA: Final = {"text": "x" * 89}  # 100 bytes of JSON


class Text(BaseModel):
    """The payload that handlers ask for."""

    text: str


@dataclass(frozen=True)
class Job:
    """One measurement of one system.

    Attributes:
        role: which function of `jobs` does it.
        system: ``ours``, or the peer's name.
        name: of the module, which is its topic; unique for the systems and rounds.
        group: the consumer group.
        in_flight: requests at a time, one measurement for each.
        count: of events, waits or binds.
        pid: of the process that answers.
        traced: memory as Python counts it; else as the system does.
    """

    role: str
    system: str
    servers: str
    name: str
    group: str = ""
    partitions: int = 1
    seconds: float = 4.0
    in_flight: tuple[int, ...] = ()
    count: int = 0
    pid: int = 0
    traced: bool = False


class Tally:
    """Counts events up to *count*; the first fifth warms up and is not timed."""

    def __init__(self, count: int) -> None:
        self._warm = count // 5
        self._count = count
        self._seen = 0
        self._begin = self._cpu = 0.0
        self.full = False
        self.result: dict[str, float] = {}

    def add(self) -> None:
        """Count one event."""
        self._seen += 1
        if self._seen == self._warm:
            self._begin, self._cpu = time.perf_counter(), time.process_time()
        elif self._seen == self._count:
            events = self._count - self._warm
            cpu = (time.process_time() - self._cpu) / events * 1e6
            self.result = {"rate": events / (time.perf_counter() - self._begin), "cpu": cpu}
            self.full = True


def cpu_seconds(pid: int) -> float:
    """Return what a process has used so far; not a number where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> float:
    """Return the memory of a process; not a number where there is no /proc."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return float("nan")
    return int(pages) * float(os.sysconf("SC_PAGE_SIZE"))
