"""The same work on bare aiokafka, as fast as its public `send()` and `getmany()` allow.

The envelope, ids, headers, deadlines, timeouts, guarantees (idempotent, acknowledged by all) and
batch sizes are the same. There is no routing, no retry, no back-pressure and no supervision. The
caller chooses partitions, which saves aiokafka's slow hash of the key.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pydantic import BaseModel
from pydantic_core import to_json

from job import TIMEOUT, Job, Text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BURST: Final = 500
Data = TypeVar("Data")


class Envelope(BaseModel, Generic[Data]):
    """The value of a record."""

    correlation_id: str
    event: str
    data: Data
    status: str = "pending"
    audit_log: list[dict[str, Any]] = []


_Echo, _Text = Envelope[Any], Envelope[Text]


def value(correlation_id: str, event: str, data: Any, log: Any = ()) -> bytes:
    """Return the value of a record."""
    hop = {"data": None, "event": event, "location": "raw", "time_sent": int(time.time())}
    envelope = {"correlation_id": correlation_id, "event": event, "data": data}
    return to_json(
        envelope | {"status": "pending", "audit_log": [*log, hop | {"time_received": None}]}
    )


def record(job: Job, event: str, data: Any, deadline: float = 0) -> dict[str, Any]:
    """Return key, value, partition and headers of an event."""
    correlation_id = str(uuid4())
    key = correlation_id.encode()
    headers = [
        ("kafka_correlationId", key),
        ("kafka_replyTopic", f"{job.name}.replies".encode()),
        ("kafka_replyPartition", job.replica.to_bytes(4, "big")),
        ("kb-instance", b"raw"),
    ]
    if deadline:
        headers.append(("kb-deadline", b"%d" % round(deadline * 1000)))
    return {
        "key": key,
        "value": value(correlation_id, event, data),
        "partition": zlib.crc32(key) % job.partitions,
        "headers": headers,
    }


def open_producer(job: Job) -> Any:
    """Return a producer, not started."""
    options = {"acks": "all", "enable_idempotence": True, "max_batch_size": 64 * 1024}
    return AIOKafkaProducer(bootstrap_servers=job.servers, **options)


def _consumer(job: Job, *topics: str) -> Any:
    return AIOKafkaConsumer(
        *topics,
        bootstrap_servers=job.servers,
        group_id=job.name if topics else None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )


async def _batches(consumer: Any, *, commit: bool) -> AsyncIterator[list[Any]]:
    """Yield records by partition; commit what was handled every second, as we do."""
    due = time.monotonic() + 1
    while True:
        for records in (await consumer.getmany(timeout_ms=500, max_records=500)).values():
            yield records
        if commit and time.monotonic() > due:
            due = time.monotonic() + 1
            await consumer.commit()


async def _records(consumer: Any, *, commit: bool) -> AsyncIterator[Any]:
    async for records in _batches(consumer, commit=commit):
        for each in records:
            yield each


@asynccontextmanager
async def _meanwhile(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests."""

    async def answer() -> None:
        async for received in _records(consumer, commit=True):
            headers = dict(received.headers)
            event = _Echo.model_validate_json(received.value)
            if int(headers["kb-deadline"]) < time.time() * 1000:
                continue
            await producer.send(
                headers["kafka_replyTopic"].decode(),
                value(event.correlation_id, "respond", event.data, event.audit_log),
                key=event.correlation_id.encode(),
                partition=int.from_bytes(headers["kafka_replyPartition"], "big"),
                headers=[(name, headers[name]) for name in ("kafka_correlationId", "kb-instance")],
            )

    async with (
        open_producer(job) as producer,
        _consumer(job, job.name) as consumer,
        _meanwhile(answer()),
    ):
        yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    waits: dict[bytes, asyncio.Future[Any]] = {}

    async def receive() -> None:
        async for received in _records(consumer, commit=False):
            wait = waits.pop(dict(received.headers)["kafka_correlationId"], None)
            if wait is not None and not wait.done():
                wait.set_result(received)

    data = job.data

    async def ask() -> Any:
        sent = record(job, "echo", data, time.time() + TIMEOUT)
        waits[sent["key"]] = wait = asyncio.get_running_loop().create_future()
        await producer.send(job.name, **sent)
        async with asyncio.timeout(TIMEOUT):
            return _Echo.model_validate_json((await wait).value).data

    async with open_producer(job) as producer, _consumer(job) as consumer:
        place = TopicPartition(f"{job.name}.replies", job.replica)
        consumer.assign([place])
        await consumer.seek_to_end(place)
        await consumer.position(place)
        async with _meanwhile(receive()):
            yield ask


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that sends some events and returns the future of the last."""
    async with open_producer(job) as producer:
        data = job.data

        async def produce(count: int) -> Any:
            for _ in range(count - 1):
                await producer.send(job.name, **record(job, "text", data))
            return await producer.send(job.name, **record(job, "text", data))

        yield produce


@asynccontextmanager
async def consuming(job: Job, handled: Callable[[], None]) -> AsyncIterator[None]:
    """Handle the events that are in the topic; plain functions in threads, one batch at a time."""

    def text(event: Envelope[Text]) -> None:
        assert event.data.text  # noqa: S101  # it is a model
        handled()

    async def text_async(event: Envelope[Text]) -> None:
        text(event)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        async for records in _batches(consumer, commit=True):
            if job.sync:
                await asyncio.gather(
                    *(
                        loop.run_in_executor(None, text, _Text.model_validate_json(each.value))
                        for each in records
                    )
                )
                continue
            for each in records:
                await text_async(_Text.model_validate_json(each.value))

    async with _consumer(job, job.source) as consumer:
        async with _meanwhile(work()):
            yield
        await consumer.commit()


async def committed(job: Job) -> int:
    """Return how many events the group of *job* has committed."""
    admin = AIOKafkaAdminClient(bootstrap_servers=job.servers)
    await admin.start()
    places = await admin.list_consumer_group_offsets(job.name)
    await admin.close()
    return sum(max(place.offset, 0) for place in places.values())


async def joined(job: Job, members: int) -> None:
    """Wait until the group of *job* has so many members, and each knows its partitions."""
    admin = AIOKafkaAdminClient(bootstrap_servers=job.servers)
    await admin.start()
    try:
        async with asyncio.timeout(TIMEOUT):
            state, count = "", 0
            while (state, count) != ("Stable", members):
                await asyncio.sleep(0.1)
                (found,) = await admin.describe_consumer_groups([job.name])
                state, count = found.groups[0][2], len(found.groups[0][5])
    finally:
        await admin.close()


@asynccontextmanager
async def waiting(_: Job) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Yield a function that waits in the barest way: for a future in a dictionary."""
    waits: dict[str, asyncio.Future[Any]] = {}

    async def wait(correlation_id: str) -> Any:
        waits[correlation_id] = future = asyncio.get_running_loop().create_future()
        return await future

    yield wait


async def create_topics(servers: str, names: list[str], partitions: int) -> None:
    """Create topics of one replica, as those of ours are on one node."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(name, partitions, 1) for name in names])
    await admin.close()


async def delete_topics(servers: str, prefix: str) -> None:
    """Delete what this run has created."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.delete_topics(
        [name for name in await admin.list_topics() if name.startswith(prefix)]
    )
    await admin.close()
