"""Measure the library against bare aiokafka, on a real Kafka: ``python benchmarks/seams.py``.

The systems take turns, round by round, and each measurement has processes of its own. What counts
is the ratio, the median of those of the rounds. Both do the same work (see raw.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import ours
import raw
from job import TIMEOUT, Job
from jobs import JOBS

from kafka_broker.testing import kafka_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PREFIX: Final = f"seams-{uuid.uuid4().hex[:8]}"
LEVELS: Final = (1, 100, 1000)
ROWS: Final = {  # what is shown of each measurement: its name, and the ratio to reach
    "requests": {
        "p50@1": ("request/reply p50, 1 in flight, ms", "<= 0.85, at first 1.10"),
        "rate@1": ("requests/s, 1 in flight", ""),
        "rate@100": ("requests/s, 100 in flight", ">= 1.5, later 2"),
        "rate@1000": ("requests/s, 1,000 in flight", ">= 2, later 3"),
        "p50@1000": ("  p50, ms", ""),
        "cpu asking@1000": ("  CPU of a request, asking, us", ""),
        "cpu answering@1000": ("  CPU of a request, answering, us", ""),
    },
    "produce": {
        "rate": ("events/s from one loop, 10,000 under way", ">= 3"),
        "cpu": ("  CPU of an event, us", ""),
        "rate@1000": ("events/s, 1,000 coroutines await each", ""),
    },
    "consume": {
        "rate": ("events validated, handled, committed/s", "against FastStream: >= 4"),
        "cpu": ("  CPU of an event, us", ""),
    },
    "memory": {
        "traced": ("a pending consume() and its task, bytes", "1,600 bytes"),
        "resident": ("  as the system counts", ""),
    },
    "lookup": {"nanoseconds": ("1 of 10,000 binds (peer: 1 of 10), ns", "1")},
    "soak": {},
}


@dataclass
class Bench:
    """One run of the benchmark; on ``memory://`` it is a smoke test, small and in one process."""

    servers: str
    rounds: int
    seconds: float
    partitions: int

    @property
    def smoke(self) -> bool:
        """Whether it only shows that everything works."""
        return self.servers.startswith("memory://")

    def job(self, role: str, system: str, name: str = "", **values: Any) -> Job:
        """Describe a measurement; its module is its own unless named."""
        name = f"{PREFIX}-{name or uuid.uuid4().hex[:8]}"
        group = f"{name}-{uuid.uuid4().hex[:8]}"
        job = Job(role, system, self.servers, name, group, self.partitions, self.seconds)
        return replace(job, **values)

    async def done(self, job: Job) -> dict[str, float]:
        """Let a process do *job*."""
        if self.smoke:
            return await JOBS[job.role](job)
        process = await _process(job)
        try:
            limit = 2 * job.seconds * (1 + len(job.in_flight)) + 5 * TIMEOUT
            output, _ = await asyncio.wait_for(process.communicate(), limit)
        finally:
            await _end(process)
        if process.returncode:
            sys.exit(f"{job.role} of {job.system} failed")
        result: dict[str, float] = json.loads(output)
        return result

    @asynccontextmanager
    async def answering(self, job: Job) -> AsyncIterator[Job]:
        """Run the other side of *job*, which is told its process id."""
        if self.smoke:
            async with ours.answering(job):
                yield replace(job, pid=os.getpid())
            return
        await ours.create_topics(job)
        process = await _process(replace(job, role="answer"))
        try:
            yield replace(job, pid=process.pid)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            await _end(process)

    async def requests(self, system: str) -> dict[str, float]:
        """Measure requests and replies."""
        async with self.answering(self.job("ask", system, in_flight=LEVELS)) as job:
            return await self.done(job)

    async def produce(self, system: str) -> dict[str, float]:
        """Measure producing."""
        job = self.job("produce", system)
        await ours.create_topics(job)
        return await self.done(job)

    async def consume(self, system: str) -> dict[str, float]:
        """Measure handling what is in a topic."""
        count = 1000 if self.smoke else int(self.seconds * 10) * 1000
        job = self.job("consume", system, count=count)
        await ours.create_topics(job)
        await self.done(replace(job, role="load", group=f"{job.group}-load"))
        return await self.done(job)

    async def memory(self, system: str) -> dict[str, float]:
        """Measure what a wait occupies, in two ways that disturb each other."""
        job = self.job("memory", system, count=1000 if self.smoke else 100_000)
        job = replace(job, servers="memory://waits")
        return await self.done(job) | await self.done(replace(job, traced=True))

    async def lookup(self, system: str) -> dict[str, float]:
        """Measure routing; the peer is ourselves with few binds."""
        return await self.done(self.job("lookup", system, count=10_000 if system == "ours" else 10))

    async def soak(self, system: str) -> dict[str, float]:
        """Show that nothing grows and nothing is left."""
        seconds = self.seconds if self.smoke else 30.0
        async with self.answering(
            self.job("soak", system, in_flight=LEVELS[-1:], seconds=seconds)
        ) as job:
            result = await self.done(job)
        print(f"soak, {LEVELS[-1]:,} in flight for {seconds:g} s:", end=" ")
        print(", ".join(f"{name} {value:,.0f}" for name, value in result.items()))
        return result

    async def run(self, names: list[str]) -> None:
        """Measure in turns and print the table."""
        try:
            print(f"{'':40}{'ours':>28}{'raw aiokafka':>28}   ratio  goal")
            for name in names:
                await self.measure(name)
        finally:
            if not self.smoke:
                await raw.delete_topics(self.servers, PREFIX)

    async def measure(self, name: str) -> None:
        """Measure one group of rows; soaking has no peer, and memory:// has none."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(1 if name == "soak" else self.rounds):
            for system in ("ours",) if self.smoke or name == "soak" else ("ours", "raw"):
                for value, measured in (await getattr(self, name)(system)).items():
                    found[system, value].append(measured)
        for value, (title, goal) in ROWS[name].items():
            mine, peers = found["ours", value], found["raw", value]
            ratios = list(map(float.__truediv__, mine, peers))
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            print(
                f"{title:40}{_spread(mine):>28}{_spread(peers):>28}{ratio:>8}  {goal}", flush=True
            )


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = 2 if min(values) < 100 else 0  # noqa: PLR2004  # enough to compare
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


async def _process(job: Job) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, __file__, "--work", json.dumps(asdict(job)))
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait until a process has ended; one that does not is killed."""
    try:
        await asyncio.wait_for(process.wait(), TIMEOUT)
    except TimeoutError:
        process.kill()
        await process.wait()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--partitions", type=int, default=1, help="of the topics")
    parser.add_argument("--only", choices=ROWS, help="one group of rows")
    parser.add_argument("--smoke", action="store_true", help="once through it all, in memory")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        values = json.loads(options.work)
        job = Job(**values | {"in_flight": tuple(values["in_flight"])})
        print(json.dumps(asyncio.run(JOBS[job.role](job))))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiokafka", "pydantic"))
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} CPUs")
    names = [options.only] if options.only else list(ROWS)
    if options.smoke:
        asyncio.run(Bench("memory://seams", 1, 0.2, 1).run(names))
        return
    # Tests start Kafka without the JVM's second compiler; this variable overrules its arguments.
    os.environ.setdefault("_JAVA_OPTIONS", "-XX:TieredStopAtLevel=4")
    with kafka_server(report=partial(print, flush=True)) as servers:
        bench = Bench(servers, options.rounds, options.seconds, options.partitions)
        asyncio.run(bench.run(names))


if __name__ == "__main__":
    main()
