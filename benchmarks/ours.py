"""kafka_broker, as its users write it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from job import DATA, TIMEOUT, Job, Tally, Text

from kafka_broker import BrokerManager, EventObject, EventRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


def _broker(job: Job, module: str, router: EventRouter | None = None) -> BrokerManager:
    return BrokerManager(
        module,
        router=router,
        bootstrap_servers=job.servers,
        group_id=job.group,
        module_partitions=job.partitions,
        reply_partitions=job.partitions,
    )


async def create_topics(job: Job) -> None:
    """Create the topics of a module, which peers use too."""
    async with _broker(job, job.name):
        pass


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests."""
    router = EventRouter(job.name)

    @router.bind_event("echo")
    async def echo(event: EventObject) -> Any:
        return event.data

    async with _broker(job, job.name, router):
        yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    async with _broker(job, f"{job.name}-ask") as broker:
        yield partial(broker.request, job.name, "echo", DATA, timeout=TIMEOUT)


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that produces events and returns the delivery of the last."""
    async with _broker(job, f"{job.name}-produce") as broker:

        async def produce(count: int) -> Awaitable[Any]:
            for _ in range(count - 1):
                broker.produce(job.name, EventObject(event="text", data=DATA))
            return broker.produce(job.name, EventObject(event="text", data=DATA))

        yield produce


async def consume(job: Job) -> dict[str, float]:
    """Handle the events that are in the topic."""
    tally, router, full = Tally(job.count), EventRouter(job.name), asyncio.Event()

    @router.bind_event("text")
    async def text(event: EventObject[Text]) -> None:
        assert event.data.text  # noqa: S101  # it was validated
        tally.add()
        if tally.full:
            full.set()

    async with _broker(job, job.name, router), asyncio.timeout(4 * TIMEOUT):
        await full.wait()
    return tally.result


@asynccontextmanager
async def waiting(job: Job) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Yield a function that waits for the event with an id."""
    async with _broker(job, job.name) as broker:
        yield broker.consumer_storage.consume


def binder(count: int) -> tuple[EventRouter, list[str]]:
    """Return a router with *count* binds, and their names."""
    groups = max(1, count // 100)
    top, names = EventRouter("module"), []
    for group in range(groups):
        router = EventRouter(f"group{group}")
        for number in range(count // groups):
            router.bind_event(f"event{number}")(_ignore)
            names.append(f"group{group}.event{number}")
        top.include_binder(router)
    return top, names


async def _ignore(event: EventObject) -> None: ...
