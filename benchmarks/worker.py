"""A process of the benchmark: it has one system, reads a job a line, and prints a result a line."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
import time
import tracemalloc
from collections import deque
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from job import TIMEOUT, Job, Tally
from jobs import resident_bytes
from loads import closed, opened

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MODULES: Final = {
    "ours": "ours",
    "aiokafka": "raw",
    "aiokafka batches": "raw_batches",
    "FastStream": "peer_faststream",
    "FastStream ACK": "peer_faststream",
    "confluent-kafka": "peer_confluent",
    "kafka-broker 0.4": "peer_original",
}
UNDER_WAY: Final = 10_000
"""Events that are produced and not acknowledged yet."""


class Worker:
    """What a job can ask for. An ``answer`` or an ``ask`` stays until ``leave``."""

    def __init__(self, system: str) -> None:
        self.system: Any = importlib.import_module(MODULES[system])
        self.entered = AsyncExitStack()
        self.request: Callable[[], Awaitable[Any]] | None = None

    async def answer(self, job: Job) -> dict[str, float]:
        """Start to echo."""
        await self.entered.enter_async_context(self.system.answering(job))
        return {}

    async def ask(self, job: Job) -> dict[str, float]:
        """Start to ask, and wait for a first reply: a client may miss some until it is settled."""
        request = await self.entered.enter_async_context(self.system.asking(job))
        for _ in range(5):
            try:
                data = await asyncio.wait_for(request(), TIMEOUT / 5)
            except TimeoutError:
                continue
            assert data == job.data, data  # noqa: S101  # an echo, or it was other work
            self.request = request
            return {}
        raise TimeoutError("no reply")

    async def leave(self, _: Job) -> dict[str, float]:
        """Stop what was started."""
        await self.entered.aclose()
        self.entered = AsyncExitStack()
        return {}

    async def closed(self, job: Job) -> dict[str, float]:
        """Keep a number of requests in flight."""
        assert self.request is not None  # noqa: S101  # after ask
        return await closed(self.request, job.level, job.seconds)

    async def opened(self, job: Job) -> dict[str, float]:
        """Send at a fixed rate."""
        assert self.request is not None  # noqa: S101  # after ask
        return await opened(self.request, job.level, job.seconds)

    async def produce(self, job: Job) -> dict[str, float]:
        """Measure how many events are acknowledged, from one loop that has many under way."""
        size = min(self.system.BURST, max(1, 10_000_000 // job.size // 20))
        most = min(UNDER_WAY, 30_000_000 // job.size, int(4000 * job.seconds)) // size
        count, under_way = 0, deque[Any]()
        async with self.system.producing(job) as burst:
            start, begin, cpu = time.perf_counter(), 0.0, 0.0
            while (now := time.perf_counter()) < start + job.seconds * 1.25:
                if not begin and now > start + job.seconds / 4:
                    count, begin, cpu = 0, now, time.process_time()
                under_way.append(await burst(size))
                if len(under_way) > most or size == 1:
                    await asyncio.wait_for(under_way.popleft(), TIMEOUT)
                    count += size
            used = time.process_time() - cpu
            for each in under_way:
                await asyncio.wait_for(each, TIMEOUT)
        return {"rate": count / (now - begin), "cpu": used / max(count, 1) * 1e6}

    async def fill(self, job: Job) -> dict[str, float]:
        """Produce what is to be consumed."""
        left, size = job.count, min(self.system.BURST, job.count)
        async with self.system.producing(job) as burst, asyncio.timeout(4 * TIMEOUT):
            while left > 0:
                await (await burst(min(size, left)))
                left -= size
        return {}

    async def consume(self, job: Job) -> dict[str, float]:
        """Measure how many events are handled, from the second quarter on."""
        tally, loop = Tally(job.count), asyncio.get_running_loop()
        async with self.system.consuming(job, tally.add), asyncio.timeout(3 * TIMEOUT):
            await tally.first.wait()
            await asyncio.sleep(job.seconds / 4)
            seen, begin, cpu = tally.seen, loop.time(), time.process_time()
            with suppress(TimeoutError):
                async with asyncio.timeout(job.seconds):
                    await tally.last.wait()
            events, took = tally.seen - seen, loop.time() - begin
            used = time.process_time() - cpu
        result = {"rate": events / took, "cpu": used / max(events, 1) * 1e6}
        return result | {"handled": float(tally.seen)}

    async def start(self, job: Job) -> dict[str, float]:
        """Measure the second start: all is imported, and the topics are there."""
        result: dict[str, float] = {}
        for group in ("-first", "-second"):
            tally, begin = Tally(1), time.perf_counter()
            async with (
                self.system.consuming(
                    replace(job, name=job.name + group, topic=job.name), tally.add
                ),
                asyncio.timeout(TIMEOUT),
            ):
                ready = time.perf_counter()
                await tally.first.wait()
                result = {"ready": ready - begin, "handled": tally.began - begin}
        return result

    async def traced(self, job: Job) -> dict[str, float]:
        """Measure what Python has allocated for a pending wait, its task included."""
        tracemalloc.start()
        used = await self._occupied(job, lambda: tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return {"bytes": used}

    async def resident(self, job: Job) -> dict[str, float]:
        """Measure the same as the system sees it; for itself, because tracing takes memory too."""
        return {"resident": await self._occupied(job, lambda: resident_bytes(os.getpid()))}

    async def _occupied(self, job: Job, allocated: Callable[[], float]) -> float:
        ids = [str(uuid4()) for _ in range(job.count)]
        async with self.system.waiting(replace(job, servers="memory://waits")) as wait:
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

    async def costs(self, job: Job) -> dict[str, float]:
        """Measure an event without Kafka, step by step."""
        result: dict[str, float] = await self.system.costs(job)
        return result

    async def lookup(self, job: Job) -> dict[str, float]:
        """Measure finding the handler of an event among *count* binds."""
        return {"nanoseconds": self.system.lookup(job.count)}


async def main(system: str) -> None:
    """Do one job after the other until the input ends, as it does when the parent dies."""
    worker = Worker(system)
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = Job(**json.loads(line))
        result = await getattr(worker, job.role)(job)
        print(json.dumps(result), flush=True)
    await worker.entered.aclose()


if __name__ == "__main__":
    if sys.argv[2] == "uvloop":
        uvloop = importlib.import_module("uvloop")  # see environments.py
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(sys.argv[1]))
    else:
        asyncio.run(main(sys.argv[1]))
