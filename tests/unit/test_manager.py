"""The manager: starts and stops that cross, loops that end, and calls that cannot be right."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import BrokerManager, BrokerSettings, EventObject, EventRouter
from kafka_broker._transport.memory import MemoryTransport
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerUnavailableError,
    ConfigurationError,
    ReplyTimeoutError,
)
from kafka_broker.testing import MemoryCluster

if TYPE_CHECKING:
    from collections.abc import Callable

virtual = pytest.mark.looptime


class Shop:
    """A broker that is not started, and the cluster that it will find."""

    def __init__(self, *, routed: bool = False, **values: Any) -> None:
        name = uuid.uuid4().hex
        self.cluster = MemoryCluster(name)
        self.router = EventRouter("Shop")
        self.router.bind_event("echo")(self._echo)
        self.broker = BrokerManager(
            "Shop",
            router=self.router if routed else None,
            bootstrap_servers=f"memory://{name}",
            module_partitions=1,
            **values,
        )

    async def _echo(self, event: EventObject) -> Any:
        return event.data

    def put(self, correlation_id: str) -> None:
        value = f'{{"correlation_id":"{correlation_id}","event":"sale"}}'
        self.cluster.append("Shop", value=value.encode())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*, not for ever."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # conditions of every kind
            await asyncio.sleep(0.001)


# Starts that fail


def _kafka_is_down(shop: Shop, _: pytest.MonkeyPatch) -> None:
    shop.cluster.down()


def _a_bug(_: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        message = "a bug in the start"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(MemoryTransport, "create_topics", fails)


@virtual
@pytest.mark.parametrize(
    ("breaks", "error"),
    [(_kafka_is_down, BrokerUnavailableError), (_a_bug, ZeroDivisionError)],
)
async def test_a_start_that_fails_is_told_though_nobody_awaits_it(
    breaks: Callable[[Shop, pytest.MonkeyPatch], None],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log has it, the waits that are open end, and later ones are refused with the reason."""
    shop = Shop(start_timeout=0.5)
    breaks(shop, monkeypatch)
    shop.broker.init_consumer()
    early = asyncio.create_task(shop.broker.consumer_storage.consume("id", timeout=None))
    await asyncio.wait({early})
    with pytest.raises(BrokerClosedError, match="the broker failed"):
        await early
    await until(lambda: "did not start, and nobody waits for it" in caplog.text)
    storage = shop.broker.consumer_storage
    for wait in (storage.receive(), storage.consume_all(), storage.poll(), storage.consume("id")):
        with pytest.raises(BrokerClosedError, match="the broker failed"):
            await wait
    with pytest.raises(BrokerClosedError, match="the broker failed"):
        await shop.broker.request("Bank", "e", timeout=1)
    with pytest.raises(BrokerClosedError):
        shop.broker.produce("Bank", EventObject(event="e"))
    with pytest.raises(error):
        await shop.broker.wait_closed()
    assert not shop.broker.ready


@virtual
async def test_a_start_that_fails_is_not_logged_for_the_one_who_awaits_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They have the exception; the log has no more than warnings."""
    shop = Shop(start_timeout=0.5)
    shop.cluster.down()
    with pytest.raises(BrokerUnavailableError):
        await shop.broker.init_consumer()
    await shop.broker.stop()
    assert [] == [record for record in caplog.records if record.levelno > logging.WARNING]


# Starts, stops and doors


@virtual
@pytest.mark.parametrize("turns", range(1, 9))
@pytest.mark.parametrize("running", [True, False])
async def test_a_start_during_a_stop_begins_anew(turns: int, running: bool) -> None:  # noqa: FBT001
    """It waits for the stop, whether of a broker that ran or that was starting, and then works."""
    shop = Shop(routed=True)
    starting = shop.broker.init_consumer()
    if running:
        await starting
    stopping = asyncio.create_task(shop.broker.stop())
    for _ in range(turns):
        await asyncio.sleep(0)
    async with shop.broker:
        assert stopping.done()
        assert shop.broker.ready
        assert 1 == (await shop.broker.request("Shop", "echo", 1, timeout=5)).data
        assert 0 == (await shop.broker.produce("Shop.dlq", EventObject(event="e"))).offset
    await stopping
    assert not shop.broker.ready


@virtual
async def test_a_start_during_a_stop_waits_for_its_handlers() -> None:
    """An event whose handler ends during the stop is not handled again by the next life."""
    shop, began, release, handled = Shop(routed=True), asyncio.Event(), asyncio.Event(), []

    @shop.router.bind_event("sale")
    async def sale(event: EventObject) -> None:
        handled.append(event.correlation_id)
        began.set()
        await release.wait()

    await shop.broker.init_consumer()
    shop.put("a")
    await until(began.is_set)
    stopping = asyncio.create_task(shop.broker.stop())
    await asyncio.sleep(1)
    starting = shop.broker.init_consumer()
    await asyncio.sleep(1)
    assert not shop.broker.ready
    release.set()
    await starting
    await stopping
    assert 1 == (await shop.broker.request("Shop", "echo", 1, timeout=5)).data
    await shop.broker.stop()
    assert ["a"] == handled


@virtual
async def test_a_context_within_a_started_broker_does_not_stop_it() -> None:
    """Who started it by init_consumer() stops it, and nobody else."""
    shop = Shop()
    await shop.broker.init_consumer()
    for _ in range(2):
        async with shop.broker:
            assert shop.broker.ready
        assert shop.broker.ready
    await shop.broker.stop()
    assert not shop.broker.ready
    async with shop.broker:
        assert shop.broker.ready
    assert not shop.broker.ready


@virtual
async def test_a_start_that_failed_does_not_hold_the_next() -> None:
    """After init_consumer() has failed, a context stops the broker that it starts."""
    shop = Shop(start_timeout=0.5)
    shop.cluster.down()
    with pytest.raises(BrokerUnavailableError):
        await shop.broker.init_consumer()
    shop.cluster.up()
    async with shop.broker:
        assert shop.broker.ready
    assert not shop.broker.ready


# Programs of their own

TWO_BROKERS = """
import asyncio
from kafka_broker import BrokerManager

async def serve(name, ready):
    async with BrokerManager(name, bootstrap_servers="memory://") as broker:
        ready.release()
        await broker.wait_closed()
        print(name, "closed", flush=True)

async def main():
    ready = asyncio.Semaphore(0)
    serving = [asyncio.create_task(serve(name, ready)) for name in ("A", "B")]
    for _ in serving:
        await ready.acquire()
    await asyncio.sleep(0)
    print("ready", flush=True)
    await asyncio.gather(*serving)

asyncio.run(main())
"""

CLOSED_LOOP = """
import asyncio, logging, os
from kafka_broker import BrokerManager, EventRouter
from kafka_broker.testing import MemoryCluster

logging.disable(logging.CRITICAL)
cluster = MemoryCluster()
broker = BrokerManager("Shop", router=EventRouter("Shop"), bootstrap_servers="memory://")
kept = []

async def first():
    await broker.__aenter__()
    for _ in range(3):
        kept.append(asyncio.create_task(broker.request("Shop.dlq", "e", timeout=5)))
    kept.append(asyncio.create_task(broker.consumer_storage.receive()))
    while len(cluster.records("Shop.dlq")) < 3:
        await asyncio.sleep(0.001)

async def second():
    @broker.router.bind_event("echo")
    async def echo(event): return event.data
    async with broker:
        print(broker.ready, broker.consumer_storage.waiting)
        print((await broker.request("Shop", "echo", "answered", timeout=5)).data)
    print(broker.ready)

with cluster.hold_sends("Shop.dlq"):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    loop.close()
    asyncio.run(second())
    print("end", flush=True)
    os._exit(0)  # the first loop left everything as it was
"""


def _program(text: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(  # noqa: S603  # our own program
        [sys.executable, "-W", "error", "-c", text],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_stops_all_brokers(number: signal.Signals) -> None:
    """Two that serve in one process both stop, and the program ends as it should."""
    with _program(TWO_BROKERS) as process:
        assert process.stdout is not None
        assert "ready\n" == process.stdout.readline()
        process.send_signal(number)
        try:
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert ["A closed", "B closed"] == sorted(output.splitlines())
    assert 0 == process.returncode


def test_a_loop_closed_with_open_requests_does_not_block_the_next() -> None:
    """The next start works, holds nothing of the first life, and its door stops it."""
    with _program(CLOSED_LOOP) as process:
        try:
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert ["True 0", "answered", "False", "end"] == output.splitlines()


# Requests


@virtual
async def test_a_request_to_the_own_module_is_not_answered_by_itself() -> None:
    """Without a router it comes to the storage as an event, and whoever takes it answers it."""
    shop = Shop()
    async with shop.broker:
        asking = asyncio.create_task(shop.broker.request("Shop", "check", 1, timeout=5))
        await asyncio.wait_for(shop.broker.consumer_storage.receive(), 5)
        assert not asking.done()
        [event] = (await shop.broker.consumer_storage.consume_all()).values()
        event.event, event.data = "respond", event.data + 1
        shop.broker.produce("Shop", event)
        reply = await asking
        assert ("respond", "completed", 2) == (reply.event, reply.status, reply.data)


@virtual
async def test_a_question_back_is_not_the_reply() -> None:
    """The module that is asked may ask the asking one, under the same id, before it answers."""
    shop = Shop()
    router = EventRouter("Bank")
    bank = BrokerManager(
        "Bank", router=router, bootstrap_servers=shop.broker.settings.bootstrap_servers
    )

    @router.bind_event("charge")
    async def charge(event: EventObject) -> None:
        event.event = "limits.check"
        bank.produce("Shop", event)

    async with bank, shop.broker:
        asking = asyncio.create_task(shop.broker.request("Bank", "charge", timeout=5))
        await asyncio.wait_for(shop.broker.consumer_storage.receive(), 5)
        [event] = (await shop.broker.consumer_storage.consume_all()).values()
        assert ("limits.check", False) == (event.event, asking.done())
        with pytest.raises(ReplyTimeoutError):
            await asking


@virtual
@pytest.mark.parametrize("timeout", [None, 0, -1, 0.0, math.inf, math.nan, "1"])
async def test_a_request_needs_a_time_to_end(timeout: Any) -> None:
    """It is refused before anything is sent or waited for."""
    shop = Shop()
    async with shop.broker:
        with pytest.raises(ConfigurationError, match="needs a timeout in seconds"):
            await shop.broker.request("Shop.dlq", "e", timeout=timeout)
        assert 0 == shop.broker.consumer_storage.waiting
    assert [] == shop.cluster.records("Shop.dlq")


@virtual
async def test_an_event_that_waits_for_room_is_there_for_the_one_who_wants_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full storage says so once, and consume() still gets the next event by its id."""
    shop = Shop(storage_events=2)
    async with shop.broker:
        for correlation_id in "abcd":
            shop.put(correlation_id)
        await until(lambda: "2 events wait in the storage" in caplog.text)
        storage = shop.broker.consumer_storage
        for correlation_id in "cdab":
            event = await storage.consume(correlation_id, timeout=5)
            assert correlation_id == event.correlation_id
    assert 1 == caplog.text.count("events wait in the storage")
    assert {0: 4} == shop.cluster.committed("Shop", "Shop")


# Other event loops


@pytest.mark.parametrize(
    "use",
    [
        lambda broker: broker.request("Shop", "echo", timeout=5),
        lambda broker: broker.consumer_storage.consume("id", timeout=5),
        lambda broker: broker.consumer_storage.consume("id", timeout=None),
        lambda broker: broker.consumer_storage.receive(),
        lambda broker: broker.consumer_storage.poll(),
        lambda broker: broker.consumer_storage.consume_all(),
        lambda broker: broker.wait_closed(),
        lambda broker: broker.stop(),
    ],
)
async def test_nobody_waits_in_another_event_loop(use: Callable[[BrokerManager], Any]) -> None:
    """Nothing would wake it there, so it is refused at once; the broker goes on."""
    shop = Shop(routed=True)

    async def waits() -> None:
        async with asyncio.timeout(5):
            with pytest.raises(ConfigurationError, match="another event loop"):
                await use(shop.broker)

    async with shop.broker:
        await asyncio.to_thread(lambda: asyncio.run(waits()))
        assert 0 == shop.broker.consumer_storage.waiting
        assert 1 == (await shop.broker.request("Shop", "echo", 1, timeout=5)).data


# Calls that say what they do


@virtual
@pytest.mark.parametrize(
    ("key", "expected"), [("é", "é".encode()), (b"\xff", b"\xff"), ("", b""), (None, b"the id")]
)
async def test_the_key_of_an_event(key: str | bytes | None, expected: bytes) -> None:
    """Text and bytes are taken as they are; without one it is the correlation id."""
    shop = Shop()
    async with shop.broker:
        event = EventObject(correlation_id="the id", event="e")
        await shop.broker.produce("Shop.dlq", event, key=key)
    assert [expected] == [record.key for record in shop.cluster.records("Shop.dlq")]


@pytest.mark.parametrize("values", [{"module": "Shop"}, {"drain_timeout": 1}])
def test_settings_come_from_one_place(values: dict[str, Any]) -> None:
    """Settings that are ready-made and single arguments cannot both be meant."""
    settings = BrokerSettings(module="Shop")
    with pytest.raises(ConfigurationError, match="not both"):
        BrokerManager(settings=settings, **values)
    assert settings is BrokerManager(settings=settings).settings
