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


def broker(job: Job, role: str = "", router: EventRouter | None = None) -> BrokerManager:
    """Return the broker of a module that is named after the job."""
    return BrokerManager(
        job.name + role,
        router=router,
        bootstrap_servers=job.servers,
        module_partitions=job.partitions,
        reply_partitions=job.partitions,
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
    async with broker(job, "-ask") as asker:
        yield partial(asker.request, job.name, "echo", DATA, timeout=TIMEOUT)


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that produces some events and returns the delivery of the last."""
    async with broker(job, "-produce") as producer:

        async def produce(count: int) -> Awaitable[Any]:
            for _ in range(count - 1):
                producer.produce(job.name, EventObject(event="text", data=DATA))
            return producer.produce(job.name, EventObject(event="text", data=DATA))

        yield produce


async def consume(job: Job, count: int) -> dict[str, float]:
    """Handle the events that are in the topic."""
    tally, full, router = Tally(count), asyncio.Event(), EventRouter(job.name)

    @router.bind_event("text")
    async def text(event: EventObject[Text]) -> None:
        assert event.data.text  # noqa: S101  # it is a model
        if tally.add():
            full.set()

    async with broker(job, router=router), asyncio.timeout(4 * TIMEOUT):
        await full.wait()
    return tally.result


@asynccontextmanager
async def waiting(job: Job) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Yield a function that waits for the event with an id."""
    async with broker(job) as waiter:
        yield waiter.consumer_storage.consume


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
