"""kafka-broker 0.4.10, in an environment of its own, because it is imported by our name.

Its documentation lets a service sleep for a second between looks at its storage; here it waits in
`receive()`. Logging is off. A requester awaits `consume()`; a deadline is left out, because a wait
that is cut off takes another's reply with it. Handlers are plain functions; it commits in the
background. To consume at full speed, its `consume()` without a second process is faster.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import tempfile
import threading
import uuid
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from job import Job, Text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

BURST: Final = 1
_INI: Final = """[general]
current_location = {location}
[kafka.default]
bootstrap.servers = {servers}
[kafka.consumer]
auto.offset.reset = {reset}
group.id = {group}
[kafka.producer]
[logging]
log_level = 50
[memcached]
cache_location = localhost
cache_port = 11211
"""


@contextmanager
def _package(job: Job, location: str, group: str = "", reset: str = "earliest") -> Iterator[Any]:
    """Give the package its settings: a file that it reads from the folder it is imported in."""
    text = _INI.format(location=location, servers=job.servers, group=group or job.name, reset=reset)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "broker_config.ini").write_text(text)
        before = Path.cwd()
        os.chdir(folder)
        try:
            package: Any = importlib.import_module("kafka_broker")
            package.broker_manager.config = package.BrokerManager().config
        finally:
            os.chdir(before)
    yield package


@asynccontextmanager
async def _storage(package: Any) -> AsyncIterator[Any]:
    process = package.broker_manager.init_consumer()
    try:
        yield package.broker_manager.consumer_storage
    finally:
        process.kill()  # it has no other end
        process.join()


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests."""
    with _package(job, job.name) as package:
        manager, router = package.broker_manager, package.EventRouter("bench")

        def echo(event_object: Any) -> None:
            manager.respond(event_object, 200, "", event_object.data)

        router.bind_event("echo")(echo)

        async def serve() -> None:
            while await storage.receive():
                for event in (await storage.consume_all()).values():
                    router.execute_event(event)

        async with _storage(package) as storage:
            task = asyncio.create_task(serve())
            yield
            task.cancel()


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    replies = f"{job.name}.replies"
    with _package(job, replies, group=f"{job.name}-ask") as package:
        manager, data = package.broker_manager, job.data

        async def ask() -> Any:
            key = str(uuid.uuid4())
            event = package.EventObject(correlation_id=key, event="echo", data=data)
            manager.produce(job.name, event)
            return (await storage.consume(key)).data["payload"]

        async with _storage(package) as storage:
            yield ask


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that produces some events; each is acknowledged when that returns."""
    with _package(job, job.name) as package:
        data = job.data

        async def burst(count: int) -> Awaitable[Any]:
            for _ in range(count):
                event = package.EventObject(event="text", data=data)
                package.broker_manager.produce(job.name, event)
            done = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done

        yield burst


@asynccontextmanager
async def consuming(job: Job, handled: Callable[[], None]) -> AsyncIterator[None]:
    """Handle the events that are in the topic."""
    with _package(job, job.source) as package:
        manager, router, leaving = (
            package.broker_manager,
            package.EventRouter("bench"),
            threading.Event(),
        )

        def text(event_object: Any) -> None:
            assert Text(**event_object.data).text  # noqa: S101  # it is a model
            handled()

        router.bind_event("text")(text)

        def work() -> None:
            while not leaving.is_set():
                event = manager.consume()
                if event is not None:
                    router.execute_event(event)

        manager.consumer = None
        task = asyncio.ensure_future(asyncio.to_thread(work))
        yield
        leaving.set()
        await _unblock(task, manager)


async def _unblock(task: Any, manager: Any) -> None:
    """Its `consume()` ends when a record comes, or not at all: it is left alone then."""
    await asyncio.wait([task], timeout=1)
    if task.done():
        await asyncio.to_thread(manager.consumer.close)
