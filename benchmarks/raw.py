"""The same work on bare aiokafka, as fast as its public `send()` and `getmany()` allow.

Same envelope, ids, headers, deadlines, timeouts, guarantees (all acks, idempotent) and batch sizes;
nothing else: no routing, no retries, no order, no back-pressure, no supervision. Partitions are
chosen by the caller, which saves aiokafka's slow hash of the key.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from job import DATA, TIMEOUT, Job, Tally, Text
from pydantic import BaseModel
from pydantic_core import to_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

_COMMIT_INTERVAL = 1.0
Data = TypeVar("Data")


class Envelope(BaseModel, Generic[Data]):
    """The envelope on the wire."""

    correlation_id: str
    event: str
    data: Data
    status: str
    audit_log: list[dict[str, Any]]


AnyEnvelope, TextEnvelope = Envelope[Any], Envelope[Text]


def _envelope(correlation_id: str, event: str, log: Sequence[Any] = (), data: Any = DATA) -> bytes:
    hop = {"data": None, "event": event, "location": "raw", "time_received": None}
    hop["time_sent"] = int(time.time())
    body = {"correlation_id": correlation_id, "event": event, "data": data, "status": "pending"}
    return to_json(body | {"audit_log": [*log, hop]})


def _headers(job: Job, correlation_id: bytes) -> list[tuple[str, bytes]]:
    return [
        ("kafka_correlationId", correlation_id),
        ("kafka_replyTopic", f"{job.name}.replies".encode()),
        ("kafka_replyPartition", b"\0\0\0\0"),
        ("kb-instance", b"raw"),
    ]


@asynccontextmanager
async def _producer(job: Job) -> AsyncIterator[Any]:
    producer = AIOKafkaProducer(
        bootstrap_servers=job.servers,
        acks="all",
        enable_idempotence=True,
        linger_ms=0,
        max_batch_size=64 * 1024,
    )
    async with producer:
        yield producer


@asynccontextmanager
async def _consumer(job: Job, *topics: str, group: str | None = None) -> AsyncIterator[Any]:
    consumer = AIOKafkaConsumer(
        *topics,
        bootstrap_servers=job.servers,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )
    async with consumer:
        yield consumer


async def _events(consumer: Any) -> AsyncIterator[Any]:
    """Yield records; commit what was handled every second."""
    due = time.monotonic() + _COMMIT_INTERVAL
    while True:
        for records in (await consumer.getmany(timeout_ms=500, max_records=500)).values():
            for record in records:
                yield record
        if time.monotonic() > due:
            due = time.monotonic() + _COMMIT_INTERVAL
            await consumer.commit()


@asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        if task.done():
            task.result()
        task.cancel()
        await asyncio.wait({task}, timeout=TIMEOUT)


@asynccontextmanager
async def answering(job: Job) -> AsyncIterator[None]:
    """Echo requests."""

    async def answer(producer: Any, consumer: Any) -> None:
        async for record in _events(consumer):
            headers = dict(record.headers)
            event = AnyEnvelope.model_validate_json(record.value)
            if int(headers["kb-deadline"]) < time.time() * 1000:
                continue
            await producer.send(
                headers["kafka_replyTopic"].decode(),
                _envelope(event.correlation_id, "respond", event.audit_log, event.data),
                key=event.correlation_id.encode(),
                partition=int.from_bytes(headers["kafka_replyPartition"], "big"),
                headers=[(name, headers[name]) for name in ("kafka_correlationId", "kb-instance")],
            )

    async with _producer(job) as producer, _consumer(job, job.name, group=job.group) as consumer:
        async with _running(answer(producer, consumer)):
            yield


@asynccontextmanager
async def asking(job: Job) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield a function that sends one request and returns its reply."""
    waits: dict[bytes, asyncio.Future[Any]] = {}
    loop = asyncio.get_running_loop()

    async def receive(consumer: Any) -> None:
        while True:
            for records in (await consumer.getmany(timeout_ms=500, max_records=500)).values():
                for record in records:
                    wait = waits.pop(dict(record.headers)["kafka_correlationId"], None)
                    if wait is not None and not wait.done():
                        wait.set_result(record)

    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(_producer(job))
        consumer = await stack.enter_async_context(_consumer(job))
        place = TopicPartition(f"{job.name}.replies", 0)
        consumer.assign([place])
        await consumer.seek_to_end(place)
        await consumer.position(place)
        await stack.enter_async_context(_running(receive(consumer)))

        async def ask() -> Any:
            correlation_id = str(uuid4())
            key = correlation_id.encode()
            waits[key] = wait = loop.create_future()
            partition = zlib.crc32(key) % job.partitions
            value, headers = _envelope(correlation_id, "echo"), _headers(job, key)
            headers.append(("kb-deadline", b"%d" % round((time.time() + TIMEOUT) * 1000)))
            await producer.send(job.name, value, key=key, partition=partition, headers=headers)
            async with asyncio.timeout(TIMEOUT):
                return AnyEnvelope.model_validate_json((await wait).value)

        yield ask


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that sends events and returns the future of the last."""
    async with _producer(job) as producer:

        async def produce(count: int) -> Awaitable[Any]:
            for _ in range(count):
                correlation_id = str(uuid4())
                key = correlation_id.encode()
                sent: Awaitable[Any] = await producer.send(
                    job.name,
                    _envelope(correlation_id, "text"),
                    key=key,
                    partition=zlib.crc32(key) % job.partitions,
                    headers=_headers(job, key),
                )
            return sent

        yield produce


async def consume(job: Job) -> dict[str, float]:
    """Handle the events that are in the topic."""
    tally = Tally(job.count)

    async def text(event: Envelope[Text]) -> None:
        assert event.data.text  # noqa: S101  # it was validated
        tally.add()

    async with asyncio.timeout(4 * TIMEOUT), _consumer(job, job.name, group=job.group) as consumer:
        async for record in _events(consumer):
            await text(TextEnvelope.model_validate_json(record.value))
            if tally.full:
                break
        await consumer.commit()
    return tally.result


@asynccontextmanager
async def waiting(job: Job) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:  # noqa: ARG001
    """Yield a function that waits in the barest way: a future in a dictionary."""
    waits: dict[str, asyncio.Future[Any]] = {}
    loop = asyncio.get_running_loop()

    async def wait(correlation_id: str) -> Any:
        waits[correlation_id] = future = loop.create_future()
        return await future

    yield wait


async def committed(job: Job) -> int:
    """Return how many events the group of *job* has committed."""
    async with _consumer(job, group=job.group) as consumer:
        places = [TopicPartition(job.name, number) for number in range(job.partitions)]
        consumer.assign(places)
        return sum([await consumer.committed(place) or 0 for place in places])


async def delete_topics(servers: str, prefix: str) -> None:
    """Delete what this run has created."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.delete_topics([n for n in await admin.list_topics() if n.startswith(prefix)])
    finally:
        await admin.close()
