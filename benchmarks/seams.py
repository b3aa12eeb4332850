"""Measure the library against bare aiokafka, on a real Kafka: ``python benchmarks/seams.py``.

The systems take turns, round by round, and each measurement has processes of its own: what counts
is the ratio of a round. Envelopes, headers, deadlines and guarantees are the same (see raw.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
import sys
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import ours
import raw
from job import TIMEOUT, Job
from jobs import JOBS

from kafka_broker.testing import kafka_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PREFIX: Final = f"seams-{uuid.uuid4().hex[:8]}"
PEAK: Final = "-XX:TieredStopAtLevel=4"  # tests start Kafka without the JVM's second compiler
LEVELS: Final = (1, 100, 1000)


@dataclass(frozen=True)
class Row:
    """One line of the table: a measured value, and what its ratio to the peer should be."""

    title: str
    value: str
    goal: str = ""


ROWS: Final = {
    "requests": (
        Row("request/reply p50, 1 in flight, ms", "p50@1", "<= 0.85, at first 1.10"),
        Row("requests/s, 1 in flight", "rate@1"),
        Row("requests/s, 100 in flight", "rate@100", ">= 1.5, later 2"),
        Row("requests/s, 1,000 in flight", "rate@1000", ">= 2, later 3"),
        Row("  p50, ms", "p50@1000"),
        Row("  CPU of a request, asking, us", "cpu asking@1000"),
        Row("  CPU of a request, answering, us", "cpu answering@1000"),
    ),
    "produce": (
        Row("events produced/s, 10,000 under way", "rate", ">= 3"),
        Row("  CPU of an event, us", "cpu"),
    ),
    "consume": (
        Row("events validated, handled, committed/s", "rate", ">= 4 against FastStream"),
        Row("  CPU of an event, us", "cpu"),
    ),
    "memory": (
        Row("a pending consume() and its task, bytes", "traced", "<= 1,600 bytes"),
        Row("  as the system counts", "resident"),
    ),
    "lookup": (Row("finding 1 of 10,000 binds (of 10), ns", "nanoseconds", "1"),),
    "soak": (),
}


@dataclass
class Bench:
    """One run: what to measure, on which Kafka."""

    servers: str
    rounds: int
    seconds: float
    partitions: int
    smoke: bool

    def systems(self) -> tuple[str, ...]:
        """Return who takes part; there is no peer in memory."""
        return ("ours",) if self.smoke else ("ours", "raw")

    def job(self, role: str, system: str, name: str = "", **values: object) -> Job:
        """Describe a measurement; its module is its own unless named."""
        name = f"{PREFIX}-{name or uuid.uuid4().hex[:8]}"
        job = Job(
            role, system, self.servers, name, f"{name}-{system}", self.partitions, self.seconds
        )
        return replace(job, **values)  # type: ignore[arg-type]  # names of its fields

    async def done(self, job: Job) -> dict[str, float]:
        """Let a process do *job*; in memory, do it here."""
        if self.smoke:
            return await JOBS[job.role](job)
        process = await _process(job)
        try:
            limit = (len(job.in_flight) or 1) * job.seconds * 2 + 5 * TIMEOUT
            output, _ = await asyncio.wait_for(process.communicate(), limit)
        finally:
            await _end(process)
        if process.returncode:
            sys.exit(f"{job.role} of {job.system} failed")
        result: dict[str, float] = json.loads(output)
        return result

    @asynccontextmanager
    async def answering(self, job: Job) -> AsyncIterator[int]:
        """Run the other side of *job*; yields its process id."""
        if self.smoke:
            async with ours.answering(job):
                yield os.getpid()
            return
        await ours.create_topics(job)
        process = await _process(replace(job, role="answer"))
        try:
            yield process.pid
        finally:
            assert process.stdin is not None  # noqa: S101  # it is a pipe
            process.stdin.close()
            await _end(process)

    async def requests(self, system: str, _: int) -> dict[str, float]:
        """Measure requests and replies."""
        job = self.job("ask", system, in_flight=LEVELS)
        async with self.answering(job) as pid:
            return await self.done(replace(job, pid=pid))

    async def produce(self, system: str, _: int) -> dict[str, float]:
        """Measure producing."""
        job = self.job("produce", system)
        await ours.create_topics(job)
        return await self.done(job)

    async def consume(self, system: str, number: int) -> dict[str, float]:
        """Measure handling; every system reads the same topic."""
        count = 1000 if self.smoke else int(self.seconds * 10) * 1000
        job = self.job("consume", system, "consume", count=count)
        if number == 0 and system == "ours":
            await ours.create_topics(job)
            await self.done(replace(job, role="load", group=f"{job.name}-load"))
        return await self.done(replace(job, group=f"{job.group}-{number}"))

    async def memory(self, system: str, _: int) -> dict[str, float]:
        """Measure what a wait occupies, in two ways that disturb each other."""
        job = self.job("memory", system, count=1000 if self.smoke else 100_000)
        job = replace(job, servers="memory://waits")
        return await self.done(job) | await self.done(replace(job, traced=True))

    async def lookup(self, system: str, _: int) -> dict[str, float]:
        """Measure routing; the peer is ourselves with few binds."""
        return await self.done(self.job("lookup", system, count=10_000 if system == "ours" else 10))

    async def soak(self, system: str, _: int) -> dict[str, float]:
        """Show that nothing grows and nothing is left."""
        if system != "ours":
            return {}
        seconds = self.seconds if self.smoke else 30.0
        job = self.job("soak", system, in_flight=LEVELS[-1:], seconds=seconds)
        async with self.answering(job) as pid:
            result = await self.done(replace(job, pid=pid))
        print("soak: " + ", ".join(f"{name} {value:,.0f}" for name, value in result.items()))
        return result

    async def run(self, names: list[str]) -> None:
        """Measure, in turns, and print the table."""
        print(f"{'':41}{'ours':>29}{'raw aiokafka':>29}   ratio   goal")
        for name in names:
            found: dict[tuple[str, str], list[float]] = defaultdict(list)
            for number in range(1 if name == "soak" else self.rounds):
                for system in self.systems():
                    for value, measured in (await getattr(self, name)(system, number)).items():
                        found[system, value].append(measured)
            for row in ROWS[name]:
                print(_line(row, found["ours", row.value], found["raw", row.value]), flush=True)


def _line(row: Row, ours_: list[float], peer: list[float]) -> str:
    ratio = statistics.median(map(float.__truediv__, ours_, peer)) if peer else math.nan
    return f"{row.title:41}{_spread(ours_):>29}{_spread(peer):>29}{ratio:8.2f}   {row.goal}"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    median, *bounds = statistics.median(values), min(values), max(values)
    digits = 2 if median < 100 else 0  # noqa: PLR2004  # enough to compare
    return "{:,.{d}f} ({:,.{d}f} - {:,.{d}f})".format(median, *bounds, d=digits)


async def _process(job: Job) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *(__file__, "--work", json.dumps(asdict(job))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


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
    parser.add_argument("--partitions", type=int, default=1, help="of the topic that is asked")
    parser.add_argument("--only", choices=ROWS, help="one group of rows")
    parser.add_argument("--smoke", action="store_true", help="once through it all, in memory")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        values = json.loads(options.work)
        job = Job(**values | {"in_flight": tuple(values["in_flight"])})
        print(json.dumps(asyncio.run(JOBS[job.role](job))))
        return
    names = [options.only] if options.only else list(ROWS)
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiokafka", "pydantic"))
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} CPUs")
    if options.smoke:
        asyncio.run(Bench("memory://seams", 1, 0.2, 1, smoke=True).run(names))
        return
    os.environ.setdefault("_JAVA_OPTIONS", PEAK)
    with kafka_server() as servers:
        asyncio.run(
            _measured(
                Bench(servers, options.rounds, options.seconds, options.partitions, smoke=False),
                names,
            )
        )


async def _measured(bench: Bench, names: list[str]) -> None:
    try:
        await bench.run(names)
    finally:
        await raw.delete_topics(bench.servers, PREFIX)


if __name__ == "__main__":
    main()
