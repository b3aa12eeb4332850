"""Worker threads for plain functions, counted as long as they run."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from anyio import CapacityLimiter, to_thread

if TYPE_CHECKING:
    from collections.abc import Callable

_UNLIMITED: Final = CapacityLimiter(math.inf)
"""Anyio's own count would forget a thread that a cancellation has left alone."""


async def in_thread(call: Callable[[], Any], limiter: CapacityLimiter) -> Any:
    """Run *call* in a worker thread; one that is left alone by a cancellation still counts.

    Raises:
        Exception: whatever *call* raises.
    """
    seat, claim = object(), threading.Lock()
    await limiter.acquire_on_behalf_of(seat)
    loop = asyncio.get_running_loop()

    def run() -> Any:
        if not claim.acquire(blocking=False):
            return None  # cancelled before it began
        try:
            return call()
        finally:
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(limiter.release_on_behalf_of, seat)

    try:
        result = await to_thread.run_sync(run, limiter=_UNLIMITED, abandon_on_cancel=True)
    finally:
        if claim.acquire(blocking=False):  # it did not begin, and will not
            limiter.release_on_behalf_of(seat)
    # A plain function around an async one gives a coroutine, which nobody else would await.
    return await result if inspect.iscoroutine(result) else result
