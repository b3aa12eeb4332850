"""Handlers that fail, refuse and ask for another try: the same on memory and on a real Kafka."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import BrokerManager, EventObject, EventRouter, Reject, RetryLater, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker._run import connect
from kafka_broker.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kafka_broker._transport import Record


class Service:
    """A module with a router to bind to, and one that asks it."""

    def __init__(self, servers: str, module: str) -> None:
        self.module = module
        self.router = EventRouter(module)
        self.answering = BrokerManager(
            module,
            router=self.router,
            bootstrap_servers=servers,
            module_partitions=3,
            retry=RetryPolicy(base=0.01),
        )
        self.asking = BrokerManager(f"{module}-ask", bootstrap_servers=servers)

    async def ask(self, event: str, data: Any = None, timeout: float = 10) -> Any:
        return (await self.asking.request(self.module, event, data, timeout=timeout)).data

    async def dead_letter(self) -> Record:
        """Wait for the first dead letter."""
        transport = connect(self.answering.settings)
        await transport.start()
        try:
            reader = await transport.read(self.answering.settings.dead_letter_topic, 0, 0)
            try:
                async with asyncio.timeout(10):
                    while not (records := await reader.fetch()):
                        pass
            finally:
                await reader.close()
        finally:
            await transport.stop()
        return records[0]


@asynccontextmanager
async def serving(servers: str, module: str) -> AsyncIterator[Service]:
    service = Service(servers, module)
    async with service.answering, service.asking:
        yield service


async def test_a_handler_that_fails_twice_and_returns_replies_once(
    bootstrap_servers: str, module: str
) -> None:
    """The requester gets what the third try returns."""
    async with serving(bootstrap_servers, module) as service:
        tries: list[tuple[Any, int]] = []

        @service.router.bind_event("fails")
        async def fails(event: EventObject) -> str:
            tries.append((event.data, event.attempt))
            if event.attempt < 3:
                raise LookupError
            return "done"

        assert "done" == await service.ask("fails", "it")
    assert [("it", 1), ("it", 2), ("it", 3)] == tries


async def test_a_refusal_reaches_the_requester(bootstrap_servers: str, module: str) -> None:
    """With the status, the code and the sentence that the handler gave it."""
    async with serving(bootstrap_servers, module) as service:

        @service.router.bind_event("refuses")
        async def refuses() -> None:
            raise Reject(404, "no such order: \u00e9", code="no-order")

        with pytest.raises(RemoteError) as caught:
            await service.ask("refuses")
    error = caught.value
    assert (404, "no-order", "no such order: \u00e9") == (error.status, error.code, error.detail)


async def test_a_dead_letter_is_the_record_as_it_came(bootstrap_servers: str, module: str) -> None:
    """Key, value and headers are its own; origin, attempt and error follow them."""
    async with serving(bootstrap_servers, module) as service:
        origins: list[Record] = []

        @service.router.bind_event("fails")
        async def fails(event: EventObject) -> None:
            assert event.record is not None
            origins.append(event.record)
            raise LookupError

        event = EventObject(event="fails", data={"\u00e9": 1})
        delivery = await service.asking.produce(module, event, key=b"\xffkey")
        letter = await service.dead_letter()
    origin, *others = origins
    assert [delivery.offset] * 2 == [one.offset for one in others]
    assert (b"\xffkey", origin.value) == (letter.key, letter.value)
    where = f"{module}:{delivery.partition}:{delivery.offset}".encode()
    group = (wire.GROUP, module.encode())
    ours = [(wire.ORIGIN, where), group, (wire.ATTEMPT, b"3"), (wire.FAILURE, b"LookupError")]
    assert [*origin.headers, *ours] == list(letter.headers)


async def test_what_is_to_be_handled_later_comes_back(bootstrap_servers: str, module: str) -> None:
    """Into its own partition, when it is due and as it was, and who waits gets the reply then."""
    async with serving(bootstrap_servers, module) as service:
        tries: dict[str, list[tuple[float, Record]]] = {"produced": [], "asked": []}
        done = {name: asyncio.Event() for name in tries}

        @service.router.bind_event("later")
        async def later(event: EventObject) -> str:
            assert event.record is not None
            tries[event.data].append((time.monotonic(), event.record))
            if event.attempt == 1:
                raise RetryLater(5.1)
            done[event.data].set()
            return "done"

        event = EventObject(event="later", data="produced")
        service.asking.produce(module, event, key="some key")
        asking = asyncio.create_task(service.ask("later", "asked", timeout=30))
        async with asyncio.timeout(20):
            await done["produced"].wait()
            await done["asked"].wait()
        assert "done" == await asking
    for (first_time, first), (second_time, second) in tries.values():
        assert second_time - first_time > 5.09
        place = first.partition, first.key, first.value
        assert place == (second.partition, second.key, second.value)
        assert set(first.headers) < set(second.headers)
