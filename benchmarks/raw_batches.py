"""Bare aiokafka's batch API: the caller fills batches of 64 KiB, two for each partition.

It is what its documentation offers for more than `send()` can do. `ours` has to do better than
`raw`; this shows what there is to gain.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from raw import open_producer, record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from job import Job

BURST: Final = 500


@asynccontextmanager
async def producing(job: Job) -> AsyncIterator[Callable[[int], Awaitable[Awaitable[Any]]]]:
    """Yield a function that sends some events and returns the future of the last batches."""
    async with open_producer(job) as producer:
        data = job.data

        async def send(batch: Any, partition: int) -> Any:
            batch.close()
            return await producer.send_batch(batch, job.name, partition=partition)

        async def produce(count: int) -> Any:
            batches: dict[int, Any] = {}
            sent = []
            for _ in range(count):
                event = record(job, "text", data)
                partition = event.pop("partition")
                batch = batches.get(partition) or producer.create_batch()
                if batch.append(timestamp=None, **event) is None:
                    sent.append(await send(batch, partition))
                    batch = producer.create_batch()
                    batch.append(timestamp=None, **event)
                batches[partition] = batch
            for partition, batch in batches.items():
                sent.append(await send(batch, partition))
            return asyncio.gather(*sent)

        yield produce
