"""What a process of the benchmark is told to do, and what all of them agree on."""

from __future__ import annotations

import time
from dataclasses import dataclass
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
    """One measurement of one system: *role* names a function of `jobs`, *name* a module of its own.

    *pid* is the process that answers.
    """

    role: str
    system: str
    servers: str
    name: str
    partitions: int
    seconds: float
    pid: int = 0

    @property
    def smoke(self) -> bool:
        """Whether to show only that everything works: small, and in one process."""
        return self.servers.startswith("memory://")


class Tally:
    """Counts events up to *count*; the first fifth warms up and is not timed."""

    def __init__(self, count: int) -> None:
        self._count, self._warm, self._seen = count, count // 5, 0
        self._begin = self._cpu = 0.0
        self.result: dict[str, float] = {}

    def add(self) -> bool:
        """Count one event; returns whether it was the last."""
        self._seen += 1
        if self._seen == self._warm:
            self._begin, self._cpu = time.perf_counter(), time.process_time()
        elif self._seen == self._count:
            events = self._count - self._warm
            seconds, cpu = time.perf_counter() - self._begin, time.process_time() - self._cpu
            self.result = {"rate": events / seconds, "cpu": cpu / events * 1e6}
        return self._seen == self._count
