"""The measurements, each done by one process."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
import sys
import time
import tracemalloc
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ours
import raw
from job import DATA, TIMEOUT, Job

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kafka_broker import BrokerManager

SYSTEMS: dict[str, Any] = {"ours": ours, "raw": raw}  # FastStream's place is here
_UNDER_WAY, _BURST = 10_000, 500


async def answer(job: Job) -> dict[str, float]:
    """Echo until the standard input ends, as it does when the parent dies."""
    async with SYSTEMS[job.system].answering(job):
        await asyncio.to_thread(sys.stdin.read)
    return {}


async def ask(job: Job) -> dict[str, float]:
    """Measure requests, for each number of them in flight."""
    result: dict[str, float] = {}
    async with SYSTEMS[job.system].asking(job) as request:
        assert (await request()).data == DATA  # noqa: S101  # an echo; waits for the other side
        for number in job.in_flight:
            result |= await _load(request, number, job)
    return result


async def _load(request: Callable[[], Awaitable[Any]], number: int, job: Job) -> dict[str, float]:
    """Keep *number* requests in flight; the first quarter warms up."""
    begin = time.perf_counter() + job.seconds / 4
    end = begin + job.seconds
    took: list[float] = []

    async def client() -> None:
        while (sent := time.perf_counter()) < end:
            await request()
            if begin <= (now := time.perf_counter()) <= end:
                took.append(now - sent)

    async def cpu(pid: int) -> float:
        await asyncio.sleep(begin - time.perf_counter())
        before = cpu_seconds(pid)
        await asyncio.sleep(end - time.perf_counter())
        return (cpu_seconds(pid) - before) / max(len(took), 1) * 1e6

    clients = (client() for _ in range(number))
    asking, answering, *_ = await asyncio.gather(cpu(os.getpid()), cpu(job.pid), *clients)
    measured = {"rate": len(took) / job.seconds, "p50": statistics.median(took) * 1e3}
    measured |= {"cpu asking": asking, "cpu answering": answering}
    return {f"{name}@{number}": value for name, value in measured.items()}


async def produce(job: Job) -> dict[str, float]:
    """Measure how many events are acknowledged: from one loop, and from many coroutines."""
    count, under_way = 0, deque[Any]()
    async with SYSTEMS[job.system].producing(job) as burst:
        start, begin, cpu = time.perf_counter(), 0.0, 0.0
        while (now := time.perf_counter()) < start + job.seconds * 1.25:
            if not begin and now > start + job.seconds / 4:
                count, begin, cpu = 0, now, time.process_time()
            under_way.append(await burst(_BURST))
            if len(under_way) * _BURST >= _UNDER_WAY:
                await asyncio.wait_for(under_way.popleft(), TIMEOUT)
                count += _BURST
        result = {"rate": count / (now - begin), "cpu": (time.process_time() - cpu) / count * 1e6}
        await asyncio.wait_for(under_way.pop(), TIMEOUT)

        async def acknowledged() -> None:
            await (await burst(1))

        return result | await _load(acknowledged, 1000, job)


async def load(job: Job) -> dict[str, float]:
    """Fill a topic for `consume`."""
    async with ours.producing(job) as burst, asyncio.timeout(4 * TIMEOUT):
        for _ in range(job.count // _BURST):
            await (await burst(_BURST))
    return {}


async def consume(job: Job) -> dict[str, float]:
    """Measure how many events are handled, and check that they were committed."""
    result: dict[str, float] = await SYSTEMS[job.system].consume(job)
    if not job.servers.startswith("memory://"):
        assert job.count == await raw.committed(job)  # noqa: S101  # else it was cheaper work
    return result


async def memory(job: Job) -> dict[str, float]:
    """Measure the memory of a pending wait, its task included."""
    ids = [str(uuid4()) for _ in range(job.count)]
    if job.traced:
        tracemalloc.start()
    async with SYSTEMS[job.system].waiting(job) as wait:
        before = _allocated(job)
        tasks = [asyncio.ensure_future(wait(each)) for each in ids]
        await asyncio.sleep(0)
        used = _allocated(job) - before
        for task in tasks:
            assert task.cancel()  # noqa: S101  # it was waiting
        await asyncio.wait(tasks, timeout=TIMEOUT)
    tracemalloc.stop()
    return {"traced" if job.traced else "resident": used / job.count}


def _allocated(job: Job) -> float:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if job.traced else resident_bytes(os.getpid())


async def lookup(job: Job) -> dict[str, float]:
    """Measure finding the handler of an event among so many; the least of thirty tries."""
    router, names = ours.routes(job.count)
    asked = random.Random(1).choices(names, k=1000)  # noqa: S311  # the same in every run
    tries = []
    for _ in range(30):
        begin = time.perf_counter()
        for name in asked:
            router.match(name)
        tries.append(time.perf_counter() - begin)
    return {"nanoseconds": min(tries) / len(asked) * 1e9}


async def soak(job: Job) -> dict[str, float]:
    """Keep requests in flight; measure memory meanwhile, and what is left afterwards."""
    result: dict[str, float] = {}
    async with ours.broker(job, "-ask") as broker:

        async def request() -> None:
            await broker.request(job.name, "echo", DATA, timeout=TIMEOUT)

        await request()
        before = await _left(broker)
        begin = time.perf_counter()
        running = asyncio.create_task(_load(request, job.in_flight[0], job))
        for third in (1, 2, 3):
            await asyncio.sleep(begin + job.seconds * third / 3 - time.perf_counter())
            for side, pid in (("asking", os.getpid()), ("answering", job.pid)):
                result[f"{side} MB, {third}/3"] = resident_bytes(pid) / 1e6
        load = await asyncio.wait_for(running, job.seconds + TIMEOUT)
        result["requests/s"] = load[f"rate@{job.in_flight[0]}"]
        after = await _left(broker)
    return result | {f"{name} left": after[name] - before[name] for name in after}


async def _left(broker: BrokerManager) -> dict[str, int]:
    """Count what waits; the least of a second, because the client has tasks that come and go."""
    loop: Any = asyncio.get_running_loop()
    storage = broker.consumer_storage
    counts = []
    for _ in range(10):
        await asyncio.sleep(0.1)
        timers = sum(not timer.cancelled() for timer in loop._scheduled)  # noqa: SLF001  # no other way
        counts.append((len(storage._slots) + len(storage), len(asyncio.all_tasks()), timers))  # noqa: SLF001
    return dict(zip(("slots", "tasks", "timers"), map(min, *counts), strict=True))


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
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("nan")


JOBS = {job.__name__: job for job in (answer, ask, produce, load, consume, memory, lookup, soak)}
