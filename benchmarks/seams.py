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
from dataclasses import asdict, replace
from functools import partial
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
    "memory": {"bytes": ("a pending consume() and its task, bytes", "1,600 bytes")},
    "resident": {"bytes": ("  as the system counts", "")},
    "lookup": {"nanoseconds": ("1 of 10,000 binds (peer: 1 of 10), ns", "1")},
    "soak": {
        "rate": ("requests/s, 1,000 in flight for 30 s", ""),
        "asking 1/3": ("  memory asking, MB, after 10 s", ""),
        "asking 2/3": ("  after 20 s", "flat"),
        "asking 3/3": ("  after 30 s", "flat"),
        "answering 1/3": ("  memory answering, MB, after 10 s", ""),
        "answering 2/3": ("  after 20 s", "flat"),
        "answering 3/3": ("  after 30 s", "flat"),
        "slots": ("  slots left", "0"),
        "tasks": ("  tasks left", "0"),
        "timers": ("  timers left", "0"),
    },
}


async def run(names: list[str], rounds: int, job: Job) -> None:
    """Measure in turns, as *job* says, and print the table."""
    try:
        print(f"{'':40}{'ours':>28}{'raw aiokafka':>28}   ratio  goal")
        for name in names:
            await _measure(rounds, replace(job, role=name))
    finally:
        if not job.smoke:
            await raw.delete_topics(job.servers, PREFIX)


async def _measure(rounds: int, job: Job) -> None:
    """Measure one group of rows; soaking has no peer, and memory:// has none."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(1 if job.role == "soak" else rounds):
        for system in ("ours",) if job.smoke or job.role == "soak" else ("ours", "raw"):
            one = replace(job, system=system, name=f"{PREFIX}-{uuid.uuid4().hex[:8]}")
            for value, measured in (await _once(one)).items():
                found[system, value].append(measured)
    for value, (title, goal) in ROWS[job.role].items():
        mine, peers = found["ours", value], found["raw", value]
        ratios = list(map(float.__truediv__, mine, peers))
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        print(f"{title:40}{_spread(mine):>28}{_spread(peers):>28}{ratio:>8}  {goal}", flush=True)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = 2 if min(values) < 100 else 0  # noqa: PLR2004  # enough to compare
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


@asynccontextmanager
async def _answering(job: Job) -> AsyncIterator[int]:
    """Run the other side; yields its process id."""
    if job.smoke:
        async with ours.answering(job):
            yield os.getpid()
        return
    await ours.create_topics(job)
    async with _process(replace(job, role="answer")) as process:
        yield process.pid


async def _once(job: Job) -> dict[str, float]:
    if job.role not in {"requests", "soak"}:
        return await _done(job)
    async with _answering(job) as pid:
        return await _done(replace(job, pid=pid))


async def _done(job: Job) -> dict[str, float]:
    """Let a process do *job*."""
    if job.smoke:
        return await JOBS[job.role](job)
    async with _process(job) as process, asyncio.timeout(10 * job.seconds + 6 * TIMEOUT):
        output, _ = await process.communicate()
    if process.returncode:
        sys.exit(f"{job.role} of {job.system} failed")
    result: dict[str, float] = json.loads(output)
    return result


@asynccontextmanager
async def _process(job: Job) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a worker; it ends when its standard input does, else it is killed."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, __file__, "--work", json.dumps(asdict(job)))
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
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
        job = Job(**json.loads(options.work))
        print(json.dumps(asyncio.run(JOBS[job.role](job))))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiokafka", "pydantic"))
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} CPUs")
    names = [options.only] if options.only else list(ROWS)
    if options.smoke:
        asyncio.run(run(names, 1, Job("", "", "memory://seams", "", 1, 0.2)))
        return
    # Tests start Kafka without the JVM's second compiler; this variable overrules its arguments.
    os.environ.setdefault("_JAVA_OPTIONS", "-XX:TieredStopAtLevel=4")
    with kafka_server(report=partial(print, flush=True)) as servers:
        print(f"Kafka at {servers}", flush=True)
        job = Job("", "", servers, "", options.partitions, options.seconds)
        asyncio.run(run(names, options.rounds, job))


if __name__ == "__main__":
    main()
