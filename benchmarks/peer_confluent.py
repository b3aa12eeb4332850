"""confluent-kafka's asyncio client, as it is documented.

Its producer refuses headers, so the reply topic is agreed beforehand and the id is in the
envelope: no deadline that the service sees. For requests it is tuned: batches of one and no
linger, else an awaited request takes 2 s, and one poll that waits before one `consume()` that
takes what is there.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.aio import AIOConsumer, AIOProducer

from job import TIMEOUT, Job, Text
from raw import Envelope, value

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BURST: Final = 500
_Echo, _Text = Envelope[Any], Envelope[Text]


@asynccontextmanager
async def _producer(job: Job, **options: Any) -> AsyncIterator[Any]:
    settings = {"bootstrap.servers": job.servers, "enable.idempotence": True}
    if options:
        settings["linger.ms"] = 0
    async with AIOProducer(settings, **options) as producer:
        yield producer


def _consumer(job: Job, reset: str) -> Any:
    settings = {
        "bootstrap.servers": job.servers,
        "group.id": job.name,
        "auto.offset.reset": reset,
        "enable.auto.commit": False,
    }
    return AIOConsumer(settings, max_workers=2)


async def _messages(consumer: Any) -> AsyncIterator[list[Any]]:
    while True:
        first = await consumer.poll(timeout=0.5)
        if first is None:
            continue
        messages = [first, *await consumer.consume(num_messages=499, timeout=0)]
        yield [each for each in messages if each.error() is None]


@asynccontextmanager
async def _meanwhile(work: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests; offsets are committed every second."""

    async def answer() -> None:
        due = asyncio.get_running_loop().time() + 1
        async for messages in _messages(consumer):
            for each in messages:
                event = _Echo.model_validate_json(each.value())
                await producer.produce(
                    f"{job.name}.replies",
                    value(event.correlation_id, "respond", event.data, event.audit_log),
                    event.correlation_id.encode(),
                )
            if asyncio.get_running_loop().time() > due:
                due = asyncio.get_running_loop().time() + 1
                await consumer.commit(asynchronous=True)

    async with (
        _producer(job, batch_size=1, buffer_timeout=0) as producer,
        _consumer(job, "earliest") as consumer,
    ):
        await consumer.subscribe([job.name])
        async with _meanwhile(answer()):
            yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    waits: dict[str, asyncio.Future[Any]] = {}
    data = job.data

    async def receive() -> None:
        async for messages in _messages(consumer):
            for each in messages:
                wait = waits.pop(each.key().decode(), None)
                if wait is not None and not wait.done():
                    wait.set_result(each)

    async def ask() -> Any:
        key = str(uuid4())
        waits[key] = wait = asyncio.get_running_loop().create_future()
        await producer.produce(job.name, value(key, "echo", data), key.encode())
        async with asyncio.timeout(TIMEOUT):
            return _Echo.model_validate_json((await wait).value()).data

    async with (
        _producer(job, batch_size=1, buffer_timeout=0) as producer,
        _consumer(job, "latest") as consumer,
    ):
        place = TopicPartition(f"{job.name}.replies", 0)
        place.offset = await _end(consumer, place)
        await consumer.assign([place])
        async with _meanwhile(receive()):
            yield ask


async def _end(consumer: Any, place: TopicPartition) -> int:
    """Return the offset at the end, as soon as the new topic has a leader."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                offset: int = (await consumer.get_watermark_offsets(place))[1]
            except KafkaException:
                await asyncio.sleep(0.1)
            else:
                return offset


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that produces some events and returns the delivery of the last."""
    data = job.data
    async with _producer(job) as producer:

        async def burst(count: int) -> Awaitable[Any]:
            for _ in range(count):
                key = str(uuid4())
                last = await producer.produce(job.name, value(key, "text", data), key.encode())
            await producer.flush(0)
            delivery: Awaitable[Any] = last
            return delivery

        yield burst


@asynccontextmanager
async def consuming(job: Job, handled: Callable[[], None]) -> AsyncIterator[None]:
    """Handle the events that are in the topic; plain functions in threads, a batch at a time."""

    def text(event: Envelope[Text]) -> None:
        assert event.data.text  # noqa: S101  # it is a model
        handled()

    async def text_async(event: Envelope[Text]) -> None:
        text(event)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + 1
        async for messages in _messages(consumer):
            events = [_Text.model_validate_json(each.value()) for each in messages]
            if job.sync:
                threads = (loop.run_in_executor(None, text, each) for each in events)
                await asyncio.gather(*threads)
            else:
                for each in events:
                    await text_async(each)
            if loop.time() > due:
                due = loop.time() + 1
                await consumer.commit(asynchronous=True)

    async with _consumer(job, "earliest") as consumer:
        await consumer.subscribe([job.source])
        async with _meanwhile(work()):
            yield
        await consumer.commit(asynchronous=False)
