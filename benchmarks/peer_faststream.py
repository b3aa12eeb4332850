"""FastStream: its how-to for RPC on Kafka, tuned.

Tuned: no log line per record, an idempotent producer with batches of 64 KiB, as everywhere here,
requests that do not wait for their acknowledgement, 100 workers for the echo, and a reply handler
that is a coroutine (the how-to's plain function sets a future from a thread). It has no deadline
that the service sees, no envelope but its headers, and one reply topic that every replica reads.

"FastStream" commits in the background, also what was not handled: its default. "FastStream ACK"
commits what was handled, which is what ours promises.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage

from job import TIMEOUT, Job, Text
from raw import Envelope  # noqa: TC001  # FastStream reads annotations at run time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BURST: Final = 500


def _broker(job: Job) -> KafkaBroker:
    return KafkaBroker(
        job.servers,
        logger=None,
        acks="all",
        enable_idempotence=True,
        max_batch_size=64 * 1024,
        graceful_timeout=5,
    )


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests."""
    broker = _broker(job)

    @broker.subscriber(job.name, group_id=job.name, auto_offset_reset="earliest", max_workers=100)
    async def echo(body: Text) -> Text:
        return body

    async with broker:
        await broker.start()
        yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    broker, responses = _broker(job), dict[str, Future[Any]]()
    data, replies = job.data, f"{job.name}.replies"

    @broker.subscriber(replies, auto_offset_reset="latest")
    async def receive(msg: KafkaMessage) -> None:
        future = responses.pop(msg.correlation_id or "", None)
        if future is not None and not future.done():
            future.set_result(await msg.decode())

    async def ask() -> Any:
        correlation_id = str(uuid4())
        future = responses[correlation_id] = asyncio.get_running_loop().create_future()
        await broker.publish(
            data, job.name, reply_to=replies, correlation_id=correlation_id, no_confirm=True
        )
        try:
            return await asyncio.wait_for(future, TIMEOUT)
        finally:
            responses.pop(correlation_id, None)

    async with broker:
        await broker.start()
        yield ask


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that publishes some events and returns the future of the last."""
    broker, data = _broker(job), job.data

    async def publish() -> Any:
        correlation_id = str(uuid4())
        event = {"correlation_id": correlation_id, "event": "text", "data": data}
        return await broker.publish(
            event,
            job.name,
            key=correlation_id.encode(),
            correlation_id=correlation_id,
            no_confirm=True,
        )

    async def burst(count: int) -> Any:
        for _ in range(count - 1):
            await publish()
        return await publish()

    async with broker:
        await broker.start()
        yield burst


@asynccontextmanager
async def consuming(job: Job, handled: Callable[[], None]) -> AsyncIterator[None]:
    """Handle the events that are in the topic."""
    broker = _broker(job)
    policy = AckPolicy.ACK if job.system.endswith("ACK") else AckPolicy.ACK_FIRST

    def text(body: Envelope[Text]) -> None:
        assert body.data.text  # noqa: S101  # it is a model
        handled()

    async def text_async(body: Envelope[Text]) -> None:
        assert body.data.text  # noqa: S101  # it is a model
        handled()

    subscriber = broker.subscriber(
        job.source, group_id=job.name, auto_offset_reset="earliest", ack_policy=policy
    )
    if job.sync:
        subscriber(text)
    else:
        subscriber(text_async)
    async with broker:
        await broker.start()
        yield
