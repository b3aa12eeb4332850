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
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ours
import raw
from job import DATA, TIMEOUT, Job, cpu_seconds, resident_bytes

from kafka_broker import BrokerManager, EventObject

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SYSTEMS: dict[str, Any] = {"ours": ours, "raw": raw}  # FastStream's place is here
_OUTSTANDING, _BURST = 10_000, 500


async def answer(job: Job) -> dict[str, float]:
    """Echo until the standard input ends, which it also does when the parent dies."""
    async with SYSTEMS[job.system].answering(job):
        await asyncio.to_thread(sys.stdin.read)
    return {}


async def ask(job: Job) -> dict[str, float]:
    """Measure requests, for each number of them in flight."""
    result: dict[str, float] = {}
    async with SYSTEMS[job.system].asking(job) as request:
        reply = await request()  # the first one waits for the other side
        assert reply.data == DATA  # noqa: S101  # an echo
        for number in job.in_flight:
            load = await _load(request, number, job)
            result |= {f"{name}@{number}": value for name, value in load.items()}
    return result


async def _load(request: Callable[[], Awaitable[Any]], number: int, job: Job) -> dict[str, float]:
    begin = time.perf_counter() + job.seconds / 4  # to warm up
    end = begin + job.seconds
    took: list[float] = []

    async def client() -> None:
        while (sent := time.perf_counter()) < end:
            await request()
            if begin <= (now := time.perf_counter()) <= end:
                took.append(now - sent)

    async def cpu() -> tuple[float, float]:
        await asyncio.sleep(begin - time.perf_counter())
        before = cpu_seconds(os.getpid()), cpu_seconds(job.pid)
        await asyncio.sleep(end - time.perf_counter())
        return cpu_seconds(os.getpid()) - before[0], cpu_seconds(job.pid) - before[1]

    (asking, answering), *_ = await asyncio.gather(cpu(), *(client() for _ in range(number)))
    return {
        "rate": len(took) / job.seconds,
        "p50": statistics.median(took) * 1e3,
        "cpu asking": asking / len(took) * 1e6,
        "cpu answering": answering / len(took) * 1e6,
    }


async def produce(job: Job) -> dict[str, float]:
    """Measure how many events are acknowledged, with a bounded number under way."""
    counted = 0
    under_way: deque[Awaitable[Any]] = deque()
    async with SYSTEMS[job.system].producing(job) as burst, asyncio.timeout(job.seconds + TIMEOUT):
        begin = time.perf_counter() + job.seconds / 4
        cpu: float | None = None
        while (now := time.perf_counter()) < begin + job.seconds:
            if now >= begin and cpu is None:
                begin, cpu = now, time.process_time()
            under_way.append(await burst(_BURST))
            if len(under_way) * _BURST >= _OUTSTANDING:
                await under_way.popleft()
                counted += _BURST if cpu is not None else 0
        seconds, used = now - begin, time.process_time() - (cpu or 0)
        while under_way:
            await under_way.popleft()
    return {"rate": counted / seconds, "cpu": used / max(counted, 1) * 1e6}


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
        gc.collect()
        before = _allocated(job)
        tasks = [asyncio.ensure_future(wait(each)) for each in ids]
        await asyncio.sleep(0)
        gc.collect()
        used = _allocated(job) - before
        assert not any(task.done() for task in tasks)  # noqa: S101  # they wait
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=TIMEOUT)
    tracemalloc.stop()
    return {"traced" if job.traced else "resident": used / job.count}


def _allocated(job: Job) -> float:
    return tracemalloc.get_traced_memory()[0] if job.traced else resident_bytes(os.getpid())


async def lookup(job: Job) -> dict[str, float]:
    """Measure finding the handler of an event, among so many."""
    router, names = ours.binder(job.count)
    asked = random.Random(1).choices(names, k=1000)  # noqa: S311  # the same in every run
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        for name in asked:
            router.match(name)
        best = min(best, time.perf_counter() - begin)
    return {"nanoseconds": best / len(asked) * 1e9}


async def soak(job: Job) -> dict[str, float]:
    """Keep requests in flight; measure memory meanwhile, and what is left afterwards."""
    result: dict[str, float] = {}
    broker = BrokerManager(f"{job.name}-ask", bootstrap_servers=job.servers, reply_partitions=1)
    async with broker:
        await broker.request(job.name, "echo", DATA, timeout=TIMEOUT)
        before = _left(broker)
        begin, count = time.perf_counter(), 0

        async def client() -> None:
            nonlocal count
            while time.perf_counter() < begin + job.seconds:
                await broker.request(job.name, "echo", DATA, timeout=TIMEOUT)
                count += 1

        clients = [asyncio.create_task(client()) for _ in range(job.in_flight[0])]
        for third in (1, 2, 3):
            await asyncio.sleep(begin + job.seconds * third / 3 - time.perf_counter())
            at = f"at {job.seconds * third / 3:.3g} s, MB"
            result[f"asking {at}"] = resident_bytes(os.getpid()) / 1e6
            result[f"answering {at}"] = resident_bytes(job.pid) / 1e6
        await asyncio.wait_for(asyncio.gather(*clients), TIMEOUT)
        clients.clear()
        await asyncio.sleep(0.1)
        result["requests"] = count
        for name, number in _left(broker).items():
            result[f"{name} left"] = number - before[name]
    return result


def _left(broker: BrokerManager) -> dict[str, int]:
    loop: Any = asyncio.get_running_loop()
    storage = broker.consumer_storage
    return {
        "slots": len(storage._slots) + len(storage),  # noqa: SLF001  # users cannot see them
        "tasks": len(asyncio.all_tasks()),
        "timers": len([timer for timer in loop._scheduled if not timer.cancelled()]),  # noqa: SLF001
    }


JOBS = {job.__name__: job for job in (answer, ask, produce, load, consume, memory, lookup, soak)}
