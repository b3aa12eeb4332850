"""What an event costs without Kafka, as a whole and step by step, in one process.

The transport here takes what is sent and gives what is ready at once, so what is left is our own
work. Its steps are private parts of the library: this file changes with them.
"""

from __future__ import annotations

import asyncio
import gc
import time
import timeit
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, cast
from unittest.mock import patch

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from job import Job, Text
from kafka_broker import BrokerManager, EventObject, EventRouter, _run, _wire
from kafka_broker._event import request_of
from kafka_broker._handler import Payload
from kafka_broker._lanes import Lanes
from kafka_broker._transport import Appended, Outgoing
from kafka_broker._transport.kafka_reader import Fetched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kafka_broker._dispatch import Dispatcher

_FETCHED: Final = 500
_TRIES: Final = 5
_ASKING: Final = 100


class Nowhere:
    """A transport that is always there: topics have one partition, and batches arrive at once."""

    now = staticmethod(time.time)

    def __init__(self, ready: Sequence[Fetched], *, echoes: bool = False) -> None:
        self._ready, self._echoes = deque(ready), echoes
        self._replies: asyncio.Queue[list[Fetched]] = asyncio.Queue()
        self._offset = 0
        self.position = 0

    async def start(self) -> None:
        """Do nothing, as `stop` and `close` do."""

    stop = close = start

    async def partitions(self, _: str) -> int:
        """Return 1."""
        return 1

    async def create_topics(self, _: Any) -> None:
        """Do nothing."""

    def send(self, topic: str, _: int, records: Sequence[Outgoing]) -> asyncio.Future[Appended]:
        """Acknowledge, and if this is an echo let the records come back as their replies."""
        loop = asyncio.get_running_loop()
        appended = loop.create_future()
        loop.call_soon(appended.set_result, Appended(self._offset, 0))
        if self._echoes:
            self._replies.put_nowait([_arrived(topic, 0, record) for record in records])
        self._offset += len(records)
        return appended

    async def read(self, *_: Any) -> Nowhere:
        """Read replies."""
        return self

    async def subscribe(self, topic: str, _: str, *, on_assigned: Any, **__: Any) -> Any:
        """Read what is ready, of the module's own topic."""
        asyncio.get_running_loop().call_soon(on_assigned, frozenset({0}))
        return _Subscription(deque() if topic.endswith(".retry") else self._ready)

    async def fetch(self) -> list[Fetched]:
        """Return the next replies."""
        return await self._replies.get()


class _Subscription:
    def __init__(self, ready: deque[Fetched]) -> None:
        self._ready = ready

    async def fetch(self, *_: Any, timeout: float) -> list[Fetched]:
        await asyncio.sleep(0 if self._ready else timeout)
        return [self._ready.popleft() for _ in range(min(_FETCHED, len(self._ready)))]

    async def commit(self, _: Any) -> bool:
        return True

    async def close(self) -> None: ...


def _arrived(topic: str, offset: int, record: Outgoing) -> Fetched:
    return Fetched(topic, 0, offset, 0, *record)


def _records(job: Job, count: int) -> list[Fetched]:
    """Return requests as they arrive; the ids differ."""
    address = _wire.address("asker.replies", 0, "asker")
    records = []
    for offset in range(count):
        event = EventObject(event="text", data=job.data)
        headers = [*_wire.request_headers(event.correlation_id, time.time() + 1000), *address]
        key, value = event.correlation_id.encode(), _wire.encode(event, "asker")
        records.append(Fetched("m", 0, offset, 0, key, value, headers))
    return records


@asynccontextmanager
async def _broker(
    ready: Sequence[Fetched] = (), router: EventRouter | None = None, *, echoes: bool = False
) -> AsyncIterator[BrokerManager]:
    with patch.object(_run, "connect", lambda _: Nowhere(ready, echoes=echoes)):
        async with BrokerManager("m", router=router, bootstrap_servers="nowhere:1") as broker:
            yield broker


async def _handled(job: Job, *, answered: bool) -> float:
    """Return the CPU seconds of events that are validated, handled, answered if so, committed."""
    records, done, seen = _records(job, job.count), asyncio.Event(), 0
    if not answered:
        records = [record._replace(headers=record.headers[:1]) for record in records]
    router = EventRouter("m")

    @router.bind_event("text")
    async def text(event: EventObject[Text]) -> dict[str, str] | None:
        nonlocal seen
        seen += 1
        if seen == job.count:
            done.set()
        return {"text": event.data.text} if answered else None

    begin = time.process_time()
    async with _broker(records, router):
        await done.wait()
        return time.process_time() - begin


async def _produced(job: Job) -> float:
    async with _broker() as broker:
        begin = time.process_time()
        for _ in range(job.count // _FETCHED):
            for _ in range(_FETCHED):
                last = broker.produce("m", EventObject(event="text", data=job.data))
            await asyncio.sleep(0)
        await last
        return time.process_time() - begin


async def _asked(job: Job) -> float:
    async with _broker(echoes=True) as broker:

        async def client() -> None:
            for _ in range(job.count // _ASKING):
                await broker.request("m", "text", job.data, timeout=30)

        begin = time.process_time()
        await asyncio.gather(*(client() for _ in range(_ASKING)))
        return time.process_time() - begin


def _batch(record: Fetched | Outgoing) -> bytes:
    """Return a hundred times the same record as it goes to Kafka."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=1,
        producer_epoch=0,
        base_sequence=0,
        batch_size=1 << 30,
    )
    for number in range(100):
        builder.append(number, 0, record.key, record.value, list(record.headers))
    data: bytes = builder.build()
    return data


def _sizes(job: Job) -> dict[str, float]:
    """Return the bytes of a request and of its reply, as they are in the log."""
    [record] = _records(job, 1)
    event = _wire.decode(record)
    request = request_of(event)
    assert request is not None  # noqa: S101  # it has the headers of one
    value = _wire.encode_reply(event, event.data, request, "m")
    reply = Outgoing(event.correlation_id.encode(), value, _wire.reply_headers(request))
    return {"request": len(_batch(record)) / 100, "reply": len(_batch(reply)) / 100}


def _steps(job: Job) -> dict[str, Callable[[], Any]]:
    """Return what can be measured by itself, each for one event."""
    [record] = _records(job, 1)
    made, event, payload = (
        EventObject(event="text", data=job.data),
        _wire.decode(record),
        Payload(Text),
    )
    plain = record._replace(headers=record.headers[:1])
    lanes = Lanes(100, max_events=100, max_bytes=1 << 30)
    lanes.assign([0])
    nobody = cast("Dispatcher", None)
    offset = 0

    def pass_lanes() -> None:
        nonlocal offset
        offset += 1
        lanes.add([record._replace(offset=offset)], nobody)
        work = lanes.next()
        assert work is not None  # noqa: S101  # it was just added
        work.ended = True
        lanes.end(work)
        lanes.committed(0, lanes.partitions[0].watermark.advance() or 0)

    return {
        "make": lambda: EventObject(event="text", data=job.data),
        "encode": lambda: _wire.encode(made, "m"),
        "100 records": lambda: _batch(plain),
        "decode": lambda: _wire.decode(plain),
        "validate": lambda: payload.event_of(event),
        "lanes": pass_lanes,
    }


async def costs(job: Job) -> dict[str, float]:
    """Return microseconds of CPU for each event, the least of some tries; and bytes."""
    wholes: dict[str, Callable[[], Any]] = {
        "produce": lambda: _produced(job),
        "handle": lambda: _handled(job, answered=False),
        "answer": lambda: _handled(job, answered=True),
        "ask": lambda: _asked(job),
    }
    result = {}
    for name, whole in wholes.items():
        seconds = []
        for _ in range(_TRIES):
            gc.collect()
            seconds.append(await whole())
        result[name] = min(seconds) / job.count * 1e6
    for name, step in _steps(job).items():
        number = job.count // 100 if name == "100 records" else job.count
        took = min(timeit.repeat(step, number=number, repeat=_TRIES))
        result[name] = took / job.count * 1e6
    return result | _sizes(job)
