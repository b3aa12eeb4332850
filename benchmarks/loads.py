"""Two ways to put load on a function that sends a request, and what is measured of them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PLACES: Final = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


async def closed(
    request: Callable[[], Awaitable[Any]], number: int, seconds: float
) -> dict[str, float]:
    """Keep *number* requests in flight; a quarter of *seconds* more goes before, to warm up."""
    begin = time.perf_counter() + seconds / 4
    end = begin + seconds
    took: list[float] = []
    count = 0

    async def client() -> None:
        nonlocal count
        while (sent := time.perf_counter()) < end:
            await request()
            count += 1
            if begin <= (now := time.perf_counter()) <= end:
                took.append(now - sent)

    await asyncio.gather(*(client() for _ in range(number)))
    return {"count": count, "rate": len(took) / seconds} | percentiles(took)


async def opened(
    request: Callable[[], Awaitable[Any]], rate: int, seconds: float
) -> dict[str, float]:
    """Send *rate* requests per second, whatever becomes of them; the first quarter warms up.

    A latency counts from when the request was due, not from when there was time to send it.
    Otherwise a stall would hide all the requests that it has delayed.
    """
    total, warm = int(rate * seconds * 1.25), int(rate * seconds / 4)
    begin = time.perf_counter() + 0.01
    took: list[float] = []
    failed = 0

    async def client(number: int) -> None:
        nonlocal failed
        try:
            await request()
        except TimeoutError:
            failed += 1
        else:
            if number >= warm:
                took.append(time.perf_counter() - begin - number / rate)

    tasks = set[asyncio.Task[None]]()
    number = 0
    while number < total:
        due = min(total, int((time.perf_counter() - begin) * rate) + 1)
        for each in range(number, due):
            task = asyncio.create_task(client(each))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        number = max(number, due)
        await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
    while tasks:
        await asyncio.wait(tasks)
    span = time.perf_counter() - begin - warm / rate
    result: dict[str, float] = {"count": total, "rate": len(took) / span, "failed": failed}
    return result | percentiles(took)


def combined(results: list[dict[str, float]]) -> dict[str, float]:
    """Return the result of several processes: sums, and the latencies of the slowest.

    A percentile of all their requests is never above the highest of theirs.
    """
    names = dict.fromkeys(name for each in results for name in each)
    found = {name: [each[name] for each in results if name in each] for name in names}
    return {name: (max if name in PLACES else sum)(values) for name, values in found.items()}


def percentiles(took: list[float]) -> dict[str, float]:
    """Return percentiles in milliseconds; empty if nothing was measured."""
    ordered = sorted(took)
    return {
        name: ordered[min(len(ordered) - 1, int(place * len(ordered)))] * 1e3
        for name, place in PLACES.items()
        if ordered
    }
