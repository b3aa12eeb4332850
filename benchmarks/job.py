"""What a process of the benchmark is told to do, and what all of them agree on."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

TIMEOUT: Final = 30.0
"""Seconds that any single wait may take."""
DATA: Final = {"text": "x" * 89}  # 100 bytes of JSON


class Text(BaseModel):
    """The payload that handlers ask for."""

    text: str


@dataclass(frozen=True)
class Job:
    """One thing to do for one system: *role* names a method of `worker.Worker`.

    Attributes:
        name: of the service, of its topic and of its group; its own for each measurement.
        topic: to read from, if several groups read the same.
        level: requests in flight, or requests per second, of each process that asks.
        size: of a payload, in bytes of JSON.
        sync: whether the handler is a plain function.
        count: how many events are in the topic.
        replies: partitions of the reply topic.
        replica: which of the processes that ask this is; replies come to a partition of its own.
    """

    role: str
    system: str
    servers: str
    name: str
    partitions: int
    seconds: float
    topic: str = ""
    level: int = 1
    size: int = 100
    sync: bool = False
    count: int = 0
    replies: int = 1
    replica: int = 0

    @property
    def source(self) -> str:
        """The topic that is consumed."""
        return self.topic or self.name

    @property
    def data(self) -> dict[str, Any]:
        """The payload."""
        return {"text": "x" * (self.size - 11)}


class Tally:
    """Counts what was handled, from any thread, and tells of the first and of the last."""

    def __init__(self, count: int) -> None:
        self.seen = 0
        self.began = 0.0
        """When the first one was handled, as of `time.perf_counter`."""
        self.first, self.last = asyncio.Event(), asyncio.Event()
        self._count, self._loop = count, asyncio.get_running_loop()

    def add(self) -> None:
        """Count one event."""
        self.seen += 1  # no thread is switched between these few instructions
        if self.seen == 1:
            self.began = time.perf_counter()
            self._loop.call_soon_threadsafe(self.first.set)
        if self.seen == self._count:
            self._loop.call_soon_threadsafe(self.last.set)
