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
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from pydantic import BaseModel
from pydantic_core import to_json

from job import DATA, TIMEOUT, Job, Tally, Text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

Data = TypeVar("Data")


class Envelope(BaseModel, Generic[Data]):
    """The value of a record."""

    correlation_id: str
    event: str
    data: Data
    status: str = "pending"
    audit_log: list[dict[str, Any]] = []


_Echo, _Text = Envelope[Any], Envelope[Text]


def _value(correlation_id: str, event: str, data: Any = DATA, log: Any = ()) -> bytes:
    hop = {"data": None, "event": event, "location": "raw", "time_sent": int(time.time())}
    envelope = {"correlation_id": correlation_id, "event": event, "data": data}
    return to_json(
        envelope | {"status": "pending", "audit_log": [*log, hop | {"time_received": None}]}
    )


async def _send(producer: Any, job: Job, event: str, key: bytes, deadline: float = 0) -> Any:
    headers = [
        ("kafka_correlationId", key),
        ("kafka_replyTopic", f"{job.name}.replies".encode()),
        ("kafka_replyPartition", b"\0\0\0\0"),
        ("kb-instance", b"raw"),
    ]
    if deadline:
        headers.append(("kb-deadline", b"%d" % round(deadline * 1000)))
    value, partition = _value(key.decode(), event), zlib.crc32(key) % job.partitions
    return await producer.send(job.name, value, key=key, partition=partition, headers=headers)


def _producer(job: Job) -> Any:
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


async def _records(consumer: Any, *, commit: bool) -> AsyncIterator[Any]:
    """Yield records; commit what was handled every second, as we do."""
    due = time.monotonic() + 1
    while True:
        for records in (await consumer.getmany(timeout_ms=500, max_records=500)).values():
            for record in records:
                yield record
        if commit and time.monotonic() > due:
            due = time.monotonic() + 1
            await consumer.commit()


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
        async for record in _records(consumer, commit=True):
            headers = dict(record.headers)
            event = _Echo.model_validate_json(record.value)
            if int(headers["kb-deadline"]) < time.time() * 1000:
                continue
            await producer.send(
                headers["kafka_replyTopic"].decode(),
                _value(event.correlation_id, "respond", event.data, event.audit_log),
                key=event.correlation_id.encode(),
                partition=int.from_bytes(headers["kafka_replyPartition"], "big"),
                headers=[(name, headers[name]) for name in ("kafka_correlationId", "kb-instance")],
            )

    async with (
        _producer(job) as producer,
        _consumer(job, job.name) as consumer,
        _meanwhile(answer()),
    ):
        yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    waits: dict[bytes, asyncio.Future[Any]] = {}

    async def receive() -> None:
        async for record in _records(consumer, commit=False):
            wait = waits.pop(dict(record.headers)["kafka_correlationId"], None)
            if wait is not None and not wait.done():
                wait.set_result(record)

    async def ask() -> Any:
        key = str(uuid4()).encode()
        waits[key] = wait = asyncio.get_running_loop().create_future()
        await _send(producer, job, "echo", key, time.time() + TIMEOUT)
        async with asyncio.timeout(TIMEOUT):
            return _Echo.model_validate_json((await wait).value)

    async with _producer(job) as producer, _consumer(job) as consumer:
        place = TopicPartition(f"{job.name}.replies", 0)
        consumer.assign([place])
        await consumer.seek_to_end(place)
        await consumer.position(place)
        async with _meanwhile(receive()):
            yield ask


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that sends some events and returns the future of the last."""
    async with _producer(job) as producer:

        async def produce(count: int) -> Any:
            for _ in range(count - 1):
                await _send(producer, job, "text", str(uuid4()).encode())
            return await _send(producer, job, "text", str(uuid4()).encode())

        yield produce


async def consume(job: Job, count: int) -> dict[str, float]:
    """Handle the events that are in the topic."""
    tally = Tally(count)

    async def text(event: Envelope[Text]) -> bool:
        assert event.data.text  # noqa: S101  # it is a model
        return tally.add()

    async with asyncio.timeout(4 * TIMEOUT), _consumer(job, job.name) as consumer:
        async for record in _records(consumer, commit=True):
            if await text(_Text.model_validate_json(record.value)):
                break
        await consumer.commit()
    return tally.result


async def committed(job: Job) -> int:
    """Return how many events the group of *job* has committed."""
    async with _consumer(job, job.name) as consumer:
        places = [TopicPartition(job.name, number) for number in range(job.partitions)]
        return sum([await consumer.committed(place) or 0 for place in places])


@asynccontextmanager
async def waiting(_: Job) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Yield a function that waits in the barest way: for a future in a dictionary."""
    waits: dict[str, asyncio.Future[Any]] = {}

    async def wait(correlation_id: str) -> Any:
        waits[correlation_id] = future = asyncio.get_running_loop().create_future()
        return await future

    yield wait


async def delete_topics(servers: str, prefix: str) -> None:
    """Delete what this run has created."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.delete_topics(
        [name for name in await admin.list_topics() if name.startswith(prefix)]
    )
    await admin.close()
