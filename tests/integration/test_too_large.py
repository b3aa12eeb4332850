"""A record so large that its dead letter, which has headers of ours as well, is too large."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Final

import pytest
from confluent_kafka import Producer

from kafka_broker import BrokerManager, EventObject, EventRouter, Reject

if TYPE_CHECKING:
    from .observer import Observer

pytestmark = pytest.mark.integration

_LARGEST: Final = 1_048_588
"""What Kafka takes for one batch of records, unless it is configured."""
_AROUND: Final = 61 + 40
"""What is around a value in a batch of one record, and less than our headers need."""


def _put(servers: str, module: str, *values: bytes) -> None:
    """Append each value in a batch of its own."""
    options = {"bootstrap.servers": servers, "message.max.bytes": 2_000_000, "log_level": 2}
    producer = Producer(options)
    failed: list[object] = []
    for value in values:
        producer.produce(
            module,
            value,
            partition=0,
            on_delivery=lambda error, _: failed.append(error) if error else None,
        )
        assert 0 == producer.flush(20)
    assert [] == failed


def _envelope(data: str) -> bytes:
    return json.dumps({"correlation_id": "c", "event": "check", "data": data}).encode()


async def test_a_dead_letter_that_is_too_large_says_where_its_value_is(
    kafka: str, module: str, observer: Observer
) -> None:
    """It has our headers and no value, and the partition goes on behind it."""
    router, handled = EventRouter(module), list[str]()
    behind = asyncio.Event()

    @router.bind_event("check")
    async def check(event: EventObject[str]) -> None:
        if len(event.data) > 100:
            raise Reject
        handled.append(event.data)
        behind.set()

    broker = BrokerManager(module, router=router, bootstrap_servers=kafka, module_partitions=1)
    async with broker:
        large = _envelope("z" * (_LARGEST - _AROUND - len(_envelope(""))))
        await asyncio.to_thread(_put, kafka, module, large, _envelope("behind"))
        async with asyncio.timeout(30):
            await behind.wait()
    [letter] = await asyncio.to_thread(observer.dead_letters)
    assert letter.value is None
    expected = {
        "kb-too-large": b"1",
        "kb-origin": f"{module}:0:0".encode(),
        "kb-error": b"Reject",
        "kb-attempt": b"1",
        "kb-group": module.encode(),
    }
    assert expected == dict(letter.headers)
    assert ["behind"] == handled
    assert {0: 2} == await asyncio.to_thread(observer.committed)
