"""kafka_broker, as its users write it."""

from __future__ import annotations

import random
import time
import zlib
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from costs import costs  # noqa: F401  # a role of a worker, like the functions here
from job import TIMEOUT, Job, Text
from kafka_broker import BrokerManager, EventObject, EventRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BURST: Final = 500


def broker(
    job: Job, role: str = "", router: EventRouter | None = None, **settings: Any
) -> BrokerManager:
    """Return the broker of a module that is named after the job."""
    return BrokerManager(
        job.name + role,
        router=router,
        bootstrap_servers=job.servers,
        module_partitions=job.partitions,
        reply_partitions=job.replies,
        **settings,
    )


async def create_topics(job: Job) -> None:
    """Create the topics of a module, which the peer uses too."""
    async with broker(job):
        pass


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests."""
    router = EventRouter(job.name)

    @router.bind_event("echo")
    async def echo(event: EventObject) -> Any:
        return event.data

    async with broker(job, router=router):
        yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    async with broker(job, "-ask", instance=_instance(job)) as asker:
        data = job.data

        async def ask() -> Any:
            return (await asker.request(job.name, "echo", data, timeout=TIMEOUT)).data

        yield ask


def _instance(job: Job) -> str:
    """Return a name of the replica that leads to its own reply partition: no two share one."""
    names = (f"{job.name}-{number}" for number in count())
    return next(name for name in names if zlib.crc32(name.encode()) % job.replies == job.replica)


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that produces some events and returns the delivery of the last."""
    async with broker(job, "-produce") as producer:
        data = job.data

        async def produce(count: int) -> Awaitable[Any]:
            for _ in range(count - 1):
                producer.produce(job.name, EventObject(event="text", data=data))
            return producer.produce(job.name, EventObject(event="text", data=data))

        yield produce


@asynccontextmanager
async def consuming(job: Job, handled: Callable[[], None]) -> AsyncIterator[None]:
    """Handle the events that are in the topic."""
    router = EventRouter(job.source)

    def text(event: EventObject[Text]) -> None:
        assert event.data.text  # noqa: S101  # it is a model
        handled()

    async def text_async(event: EventObject[Text]) -> None:
        assert event.data.text  # noqa: S101  # it is a model
        handled()

    router.bind_event("text")(text if job.sync else text_async)
    async with BrokerManager(
        job.source,
        router=router,
        bootstrap_servers=job.servers,
        group_id=job.name,
        module_partitions=job.partitions,
        reply_partitions=job.replies,
    ):
        yield


@asynccontextmanager
async def waiting(job: Job) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Yield a function that waits for the event with an id."""
    async with broker(job) as waiter:
        yield waiter.consumer_storage.consume


def lookup(count: int) -> float:
    """Return how many nanoseconds it takes to find one of *count* binds."""
    router, names = routes(count)
    asked = random.Random(1).choices(names, k=1000)  # noqa: S311  # the same in every run
    tries = []
    for _ in range(30):
        begin = time.perf_counter()
        for name in asked:
            router.match(name)
        tries.append(time.perf_counter() - begin)
    return min(tries) / len(asked) * 1e9


def routes(count: int) -> tuple[EventRouter, list[str]]:
    """Return a router with *count* binds, at most a hundred in each binder, and their names."""
    top, names = EventRouter("module"), []
    for start in range(0, count, 100):
        binder = EventRouter(f"group{start}")
        for number in range(start, min(start + 100, count)):
            binder.bind_event(f"event{number}")(_ignore)
            names.append(f"group{start}.event{number}")
        top.include_binder(binder)
    return top, names


async def _ignore(event: EventObject) -> None: ...
