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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import ours
import raw
from job import DATA, TIMEOUT, Job

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kafka_broker import BrokerManager

SYSTEMS: dict[str, Any] = {"ours": ours, "raw": raw}  # FastStream's place is here
LEVELS: Final = (1, 100, 1000)
BINDS: Final = {"ours": 10_000, "raw": 10}
_UNDER_WAY, _BURST = 10_000, 500


async def answer(job: Job) -> dict[str, float]:
    """Echo until the standard input ends, as it does when the parent dies."""
    async with SYSTEMS[job.system].answering(job):
        await asyncio.to_thread(sys.stdin.read)
    return {}


async def requests(job: Job) -> dict[str, float]:
    """Measure requests, for each number of them in flight."""
    result: dict[str, float] = {}
    async with SYSTEMS[job.system].asking(job) as request:
        assert (await request()).data == DATA  # noqa: S101  # an echo; waits for the other side
        for number in LEVELS:
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

    clients = asyncio.gather(*(client() for _ in range(number)))
    asking, answering = await asyncio.gather(cpu(os.getpid()), cpu(job.pid))
    await clients
    measured = {"rate": len(took) / job.seconds, "p50": statistics.median(took) * 1e3}
    measured |= {"cpu asking": asking, "cpu answering": answering}
    return {f"{name}@{number}": value for name, value in measured.items()}


async def produce(job: Job) -> dict[str, float]:
    """Measure how many events are acknowledged: from one loop, and from many coroutines."""
    await ours.create_topics(job)
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


async def consume(job: Job) -> dict[str, float]:
    """Measure how many events are handled, and check that they were committed."""
    count = int(job.seconds * 10) * 1000
    await ours.create_topics(job)
    async with ours.producing(job) as burst, asyncio.timeout(4 * TIMEOUT):
        for _ in range(count // _BURST):
            await (await burst(_BURST))
    result: dict[str, float] = await SYSTEMS[job.system].consume(job, count)
    if not job.smoke:
        assert count == await raw.committed(job)  # noqa: S101  # else it was cheaper work
    return result


async def memory(job: Job) -> dict[str, float]:
    """Measure the memory of a pending wait, its task included."""
    tracemalloc.start()
    used = await _occupied(job, lambda: tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return {"bytes": used}


async def resident(job: Job) -> dict[str, float]:
    """Measure the same as the system sees it; for itself, because tracing takes memory too."""
    return {"bytes": await _occupied(job, lambda: resident_bytes(os.getpid()))}


async def _occupied(job: Job, allocated: Callable[[], float]) -> float:
    ids = [str(uuid4()) for _ in range(1000 if job.smoke else 100_000)]
    async with SYSTEMS[job.system].waiting(replace(job, servers="memory://waits")) as wait:
        gc.collect()
        before = allocated()
        tasks = [asyncio.ensure_future(wait(each)) for each in ids]
        await asyncio.sleep(0)
        gc.collect()
        used = allocated() - before
        for task in tasks:
            assert task.cancel()  # noqa: S101  # it was waiting
        await asyncio.wait(tasks, timeout=TIMEOUT)
    return used / len(ids)


async def lookup(job: Job) -> dict[str, float]:
    """Measure finding the handler of an event; the peer is ourselves with few binds."""
    router, names = ours.routes(BINDS[job.system])
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
    job = job if job.smoke else replace(job, seconds=30.0)
    result: dict[str, float] = {}
    async with ours.broker(job, "-ask") as broker:
        count = 0
        await broker.request(job.name, "echo", DATA, timeout=TIMEOUT)
        before = await _left(broker)
        begin = time.perf_counter()

        async def client() -> None:
            nonlocal count
            while time.perf_counter() < begin + job.seconds:
                await broker.request(job.name, "echo", DATA, timeout=TIMEOUT)
                count += 1

        clients = [asyncio.create_task(client()) for _ in range(LEVELS[-1])]
        for third in (1, 2, 3):
            await asyncio.sleep(begin + job.seconds * third / 3 - time.perf_counter())
            result[f"asking {third}/3"] = resident_bytes(os.getpid()) / 1e6
            result[f"answering {third}/3"] = resident_bytes(job.pid) / 1e6
        await asyncio.wait_for(asyncio.gather(*clients), TIMEOUT)
        result["rate"] = count / job.seconds
        after = await _left(broker)
    return result | {name: after[name] - before[name] for name in after}


async def _left(broker: BrokerManager) -> dict[str, int]:
    """Count what waits, without what aiokafka keeps to itself, which comes and goes."""
    await asyncio.sleep(0.1)
    storage: Any = broker.consumer_storage
    coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
    timers: list[Any] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]  # noqa: SLF001  # no public list
    callbacks = [timer._callback for timer in timers if not timer.cancelled()]  # noqa: SLF001  # nor of these
    return {
        "slots": storage.waiting + len(storage),
        "tasks": sum("aiokafka" not in each.cr_code.co_filename for each in coroutines),
        "timers": sum(each.__module__.startswith("kafka_broker") for each in callbacks),
    }


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


JOBS = {
    job.__name__: job
    for job in (answer, requests, produce, consume, memory, resident, lookup, soak)
}
