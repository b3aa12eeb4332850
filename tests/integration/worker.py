"""One process of a test: a replica that logs each handling, or a source of numbered events.

Usage: worker.py serve MODULE LOG
       worker.py produce MODULE LOG COUNT AT_ONCE PER_SECOND

Settings come from the environment. The log has one JSON object per line. Lines are written at once,
so that SIGKILL loses nothing that had begun; their times are of a clock that processes share.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from kafka_broker import BrokerManager, EventObject, EventRouter, Reject, RetryLater, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTEMPTS: Final = 3
TIMEOUT: Final = 3.0
PAUSE: Final = 0.2
KEYS: Final = 500
_EVERY: Final = 25
_TICK: Final = 0.05


class Log:
    """A file that lines are appended to, from any thread."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._calls = itertools.count(1)

    def write(self, what: str, **about: object) -> None:
        line = {"what": what, "pid": os.getpid(), "at": time.monotonic_ns(), **about}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    @contextmanager
    def handling(self, event: EventObject) -> Iterator[None]:
        """Log the beginning of a handling, and its end with what became of it."""
        record, call = event.record, next(self._calls)
        assert record is not None
        self.write(
            "begin",
            call=call,
            event=event.event,
            number=event.data["number"],
            key=(record.key or b"").decode(),
            partition=record.partition,
            offset=record.offset,
            attempt=event.attempt,
        )
        try:
            yield
        except asyncio.CancelledError:
            self.write("cut", call=call)
            raise
        except BaseException:
            self.write("failed", call=call)
            raise
        self.write("end", call=call)


def routes(module: str, log: Log) -> EventRouter:
    """Return what a replica can handle: work, and what goes wrong in every way."""
    router = EventRouter(module)
    _bind_work(router, log)
    _bind_failing(router, log)
    _bind_endless(router, log)
    return router


def _bind_work(router: EventRouter, log: Log) -> None:
    @router.bind_event("work")
    async def work(event: EventObject) -> None:
        with log.handling(event):
            if event.data["seconds"]:
                await asyncio.sleep(event.data["seconds"])

    @router.bind_event("work.sync")
    def work_sync(event: EventObject) -> None:
        with log.handling(event):
            time.sleep(event.data["seconds"])


def _bind_failing(router: EventRouter, log: Log) -> None:
    soon = RetryPolicy(attempts=ATTEMPTS, base=PAUSE)
    much_later = RetryPolicy(attempts=ATTEMPTS, base=600, cap=600)

    @router.bind_event("fails", retry=soon)
    @router.bind_event("fails.slowly", retry=much_later)
    async def fails(event: EventObject) -> None:
        with log.handling(event):
            raise LookupError(event.data["number"])

    @router.bind_event("recovers", retry=soon)
    async def recovers(event: EventObject) -> None:
        with log.handling(event):
            if event.attempt < ATTEMPTS:
                raise LookupError(event.data["number"])

    @router.bind_event("refuses", retry=soon)
    async def refuses(event: EventObject) -> None:
        with log.handling(event):
            raise Reject(404, "no such order")

    @router.bind_event("later", retry=RetryPolicy(attempts=1))
    async def later(event: EventObject) -> None:
        with log.handling(event):
            if event.attempt < ATTEMPTS:
                raise RetryLater(event.data["seconds"])


def _bind_endless(router: EventRouter, log: Log) -> None:
    once = RetryPolicy(attempts=1)

    @router.bind_event("hangs", timeout=TIMEOUT, retry=once)
    async def hangs(event: EventObject) -> None:
        with log.handling(event):
            await asyncio.Event().wait()

    @router.bind_event("blocks", timeout=TIMEOUT, retry=once)
    def blocks(event: EventObject) -> None:
        with log.handling(event):
            time.sleep(event.data["seconds"])


async def serve(module: str, path: str) -> None:
    """Handle events until SIGTERM."""
    log = Log(path)
    async with BrokerManager(module, router=routes(module, log)) as broker:
        log.write("ready", instance=broker.settings.instance)
        await broker.wait_closed()
    log.write("stopped")


def load(number: int) -> tuple[str, EventObject]:
    """Return the key and the event of a number: 0 to 20 ms of work, now and then in a thread."""
    chance = zlib.crc32(b"%d" % number)
    event = "work" if number % _EVERY else "work.sync"
    data = {"number": number, "seconds": chance // KEYS % 21 / 1000}
    return f"k{chance % KEYS}", EventObject(event=event, data=data)


async def produce(module: str, path: str, count: int, at_once: int, per_second: int) -> None:
    """Produce numbered events, the first *at_once* as fast as possible; SIGTERM ends it early."""
    log, began, number, told = Log(path), 0.0, 0, asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with BrokerManager(f"{module}-source") as broker:
        log.write("ready", instance=broker.settings.instance)
        deliveries = []
        while number < count and not told.is_set():
            if number == at_once:
                began = time.monotonic()
            if number >= at_once and (number - at_once) % max(1, int(per_second * _TICK)) == 0:
                log.write("produced", count=number)
                due = began + (number - at_once) / per_second
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            key, event = load(number)
            deliveries.append(broker.produce(module, event, key=key))
            number += 1
        for delivery in deliveries:
            await delivery
    log.write("produced", count=number)


def main() -> None:
    """Run the role that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.WARNING)
    role, module, path, *numbers = sys.argv[1:]
    arguments: list[Any] = [int(number) for number in numbers]
    asyncio.run(serve(module, path) if role == "serve" else produce(module, path, *arguments))


if __name__ == "__main__":
    main()
