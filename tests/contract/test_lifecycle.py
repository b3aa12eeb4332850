"""Starting and stopping a broker: the same on memory and on a real Kafka."""

from __future__ import annotations

import asyncio
import threading
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerUnavailableError,
    ConfigurationError,
    ReplyTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@pytest.fixture
def broker(bootstrap_servers: str, module: str) -> BrokerManager:
    """Make a broker that is not started."""
    return BrokerManager(module, bootstrap_servers=bootstrap_servers)


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    """Check that no task outlives a test."""
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if "kafka" in repr(task.get_coro())}
    assert set() == left


async def _taken(servers: str, module: str, count: int) -> list[Any]:
    """Return the data of the first events of a module's topic, as another replica reads them."""
    got: list[Any] = []
    async with BrokerManager(module, bootstrap_servers=servers) as reader:
        async with asyncio.timeout(30):
            while len(got) < count:
                await reader.consumer_storage.receive()
                got += [e.data for e in (await reader.consumer_storage.consume_all()).values()]
    return sorted(got)


async def test_a_broker_is_ready_between_start_and_stop(broker: BrokerManager) -> None:
    """It is ready when the start returns, and not before or afterwards."""
    assert not broker.ready
    async with broker:
        assert broker.ready
    assert not broker.ready


async def test_init_consumer_can_be_awaited(broker: BrokerManager) -> None:
    """init_consumer() starts at once; its result is ready when the broker is."""
    starting = broker.init_consumer()
    assert not broker.ready
    await starting
    assert broker.ready
    await broker.stop()


async def test_two_starts_are_one(broker: BrokerManager) -> None:
    """A second start joins the first; the last context to leave stops it."""
    async with broker:
        await broker.init_consumer()
        async with broker:
            assert broker.ready
        assert broker.ready
    assert not broker.ready


async def test_stop_is_idempotent(broker: BrokerManager) -> None:
    """Stopping a broker that never ran, or twice, or twice at once, is fine."""
    await broker.stop()
    await broker.init_consumer()
    await asyncio.gather(broker.stop(), broker.stop())
    await broker.stop()
    assert not broker.ready


async def test_start_after_stop(broker: BrokerManager) -> None:
    """A broker can be started again, and works."""
    module = broker.settings.module
    for n in range(2):
        async with broker:
            event = EventObject(event="e", data=n)
            await broker.produce(module, event)
            reply = await broker.consumer_storage.consume(event.correlation_id, timeout=20)
            assert n == reply.data


async def test_stop_during_a_start(broker: BrokerManager) -> None:
    """A stop ends a start that is under way; whoever awaits the start is told."""
    starting = broker.init_consumer()
    await asyncio.sleep(0)
    await broker.stop()
    with pytest.raises(BrokerClosedError):
        await starting
    assert not broker.ready


async def test_a_start_can_be_cancelled(broker: BrokerManager) -> None:
    """Cancelling ``async with`` while it starts leaves nothing behind."""

    async def enter() -> None:
        async with broker:
            pytest.fail("it was cancelled before")

    task = asyncio.create_task(enter())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not broker.ready


async def test_a_stop_can_be_cancelled(broker: BrokerManager) -> None:
    """Cancelling stop() ends the wait for it, not the stop."""
    await broker.init_consumer()
    stopping = asyncio.create_task(broker.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await broker.stop()
    assert not broker.ready


async def test_wait_closed_returns_after_stop(broker: BrokerManager) -> None:
    """wait_closed() waits for a stop from elsewhere; its cancellation leaves the broker running."""
    with pytest.raises(BrokerClosedError):
        await broker.wait_closed()
    async with broker:
        waiting = asyncio.create_task(broker.wait_closed())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert broker.ready
        waiting = asyncio.create_task(broker.wait_closed())
        await broker.stop()
        await waiting


async def test_a_stop_ends_every_wait(bootstrap_servers: str, module: str) -> None:
    """1,000 open waits end in BrokerClosedError within the stop's deadline."""
    loop = asyncio.get_running_loop()
    broker = BrokerManager(module, bootstrap_servers=bootstrap_servers, drain_timeout=0.5)
    async with broker:
        name = broker.settings.module
        asks = [broker.request(f"{name}.nobody", "x", timeout=60) for _ in range(200)]
        waits = [broker.consumer_storage.consume(str(n), timeout=None) for n in range(799)]
        all_waits = asyncio.gather(
            *asks, *waits, broker.consumer_storage.receive(), return_exceptions=True
        )
        await asyncio.sleep(0)
        began = loop.time()
        await broker.stop()
        ended = await asyncio.wait_for(all_waits, 5)
    assert 1000 == len(ended)
    assert {BrokerClosedError} == {type(error) for error in ended}
    assert loop.time() - began < 5


@pytest.mark.parametrize(
    "use",
    [
        lambda broker: broker.request("m", "e", timeout=1),
        lambda broker: broker.consumer_storage.consume("id", timeout=1),
        lambda broker: broker.consumer_storage.receive(),
        lambda broker: broker.wait_closed(),
    ],
)
async def test_nothing_waits_for_a_broker_that_does_not_run(
    broker: BrokerManager, use: Callable[[BrokerManager], Any]
) -> None:
    """A wait before the start raises at once and says so."""
    with pytest.raises(BrokerClosedError, match="not running"):
        await use(broker)


async def test_produce_after_a_stop_is_refused(broker: BrokerManager) -> None:
    """A stopped broker takes no events, so none is lost silently."""
    async with broker:
        pass
    with pytest.raises(BrokerClosedError):
        broker.produce("m", EventObject(event="e"))


async def test_events_produced_before_the_start_are_delivered(
    bootstrap_servers: str, broker: BrokerManager
) -> None:
    """produce() queues until the start; the delivery can be awaited across it."""
    module = f"{broker.settings.module}.other"
    deliveries = [broker.produce(module, EventObject(event="e", data=n)) for n in range(3)]
    async with BrokerManager(module, bootstrap_servers=bootstrap_servers) as other, broker:
        ended = [await delivery for delivery in deliveries]
        assert all(delivery.offset is not None for delivery in ended)
        got: list[Any] = []
        while len(got) < 3:
            await other.consumer_storage.receive()
            got += [e.data for e in (await other.consumer_storage.consume_all()).values()]
    assert [0, 1, 2] == sorted(got)


async def test_produce_from_a_worker_thread(bootstrap_servers: str, broker: BrokerManager) -> None:
    """A plain function in another thread produces as the loop does."""
    module = broker.settings.module
    async with broker:
        await asyncio.to_thread(
            lambda: [broker.produce(module, EventObject(event="e", data=n)) for n in range(3)]
        )
    assert [0, 1, 2] == await _taken(bootstrap_servers, module, 3)


async def test_produce_from_a_sync_handler(bootstrap_servers: str, module: str) -> None:
    """A handler in a worker thread produces to another module."""
    router = EventRouter(module)
    service = BrokerManager(module, router=router, bootstrap_servers=bootstrap_servers)

    @router.bind_event("go")
    def go() -> None:
        service.produce(f"{module}.other", EventObject(event="e", data="from the thread"))

    other = BrokerManager(f"{module}.other", bootstrap_servers=bootstrap_servers)
    async with service, other:
        await other.produce(module, EventObject(event="go"))
        async with asyncio.timeout(20):
            await other.consumer_storage.receive()
        events = await other.consumer_storage.consume_all()
    assert ["from the thread"] == [event.data for event in events.values()]


def _run_in_thread(main: Callable[[], Any]) -> None:
    """Run a program of its own loop, as a script does, and raise what it raises."""
    failure: list[BaseException] = []

    def program() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001  # raised below, in the test's thread
            failure.append(exc)

    thread = threading.Thread(target=program)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if failure:
        raise failure[0]


@pytest.mark.parametrize("turns", [0, 1, 3, 10])
async def test_a_loop_that_closes_flushes(
    bootstrap_servers: str, broker: BrokerManager, turns: int
) -> None:
    """What was produced right before the loop ends is delivered, without a stop."""
    module = broker.settings.module

    async def script() -> None:
        await broker.init_consumer()
        for n in range(100):
            broker.produce(module, EventObject(event="e", data=n))
        for _ in range(turns):
            await asyncio.sleep(0)

    await asyncio.to_thread(_run_in_thread, script)
    assert list(range(100)) == await _taken(bootstrap_servers, module, 100)


async def test_one_broker_in_several_loops_one_after_another(broker: BrokerManager) -> None:
    """A module-level broker serves one event loop after the other."""
    module = broker.settings.module
    got: list[Any] = []

    async def script() -> None:
        async with broker:
            event = EventObject(event="e", data=len(got))
            broker.produce(module, event)
            got.append(
                (await broker.consumer_storage.consume(event.correlation_id, timeout=20)).data
            )

    for _ in range(3):
        await asyncio.to_thread(_run_in_thread, script)
    assert [0, 1, 2] == got


async def test_a_second_loop_at_the_same_time_is_an_error(broker: BrokerManager) -> None:
    """One broker cannot run in two loops at once, and says so."""

    async def script() -> None:
        await broker.init_consumer()

    async with broker:
        with pytest.raises(ConfigurationError, match="another event loop"):
            await asyncio.to_thread(_run_in_thread, script)
        assert broker.ready


async def test_a_loop_closed_without_a_stop_does_not_block_the_next(broker: BrokerManager) -> None:
    """A broker whose loop was closed under it starts again in the next loop."""

    def program() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(_started(broker))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    await asyncio.to_thread(_run_in_thread, lambda: _started_and_stopped(broker))
    async with broker:
        assert broker.ready


async def _started(broker: BrokerManager) -> None:
    await broker.init_consumer()


async def _started_and_stopped(broker: BrokerManager) -> None:
    await broker.init_consumer()
    await broker.stop()


async def test_requests_in_the_first_millisecond(bootstrap_servers: str, module: str) -> None:
    """Requests sent as soon as the start returns get their replies."""
    router = EventRouter(module)
    router.bind_event("echo")(_echo)
    async with BrokerManager(module, router=router, bootstrap_servers=bootstrap_servers):
        for _ in range(3):
            name = f"ask-{uuid.uuid4().hex}"
            async with BrokerManager(name, bootstrap_servers=bootstrap_servers) as asking:
                replies = await asyncio.gather(
                    *(asking.request(module, "echo", n, timeout=20) for n in range(20))
                )
            assert list(range(20)) == [reply.data for reply in replies]


async def _echo(event: EventObject) -> Any:
    return event.data


async def test_a_request_made_while_it_starts_is_answered(
    bootstrap_servers: str, module: str
) -> None:
    """request() waits for a start that is under way, within its own timeout."""
    router = EventRouter(module)
    router.bind_event("echo")(_echo)
    async with BrokerManager(module, router=router, bootstrap_servers=bootstrap_servers):
        asking = BrokerManager(f"{module}.ask", bootstrap_servers=bootstrap_servers)
        asking.init_consumer()
        assert 1 == (await asking.request(module, "echo", 1, timeout=20)).data
        await asking.stop()


async def test_a_missing_reply_topic_says_which_command_creates_it(
    bootstrap_servers: str, module: str
) -> None:
    """With create_topics off, a start names the missing topic and the command to run."""
    broker = BrokerManager(
        module, bootstrap_servers=bootstrap_servers, create_topics=False, start_timeout=0.5
    )
    with pytest.raises(BrokerUnavailableError, match=r"kafka-topics\.sh .*--create --topic"):
        await broker.init_consumer()
    await broker.stop()


async def test_lifespan_composes_with_the_applications_own(
    bootstrap_servers: str, module: str
) -> None:
    """init_consumer_app() keeps the lifespan that an application has, inside its own."""
    broker = BrokerManager(module, bootstrap_servers=bootstrap_servers)
    seen = []

    @asynccontextmanager
    async def own(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        seen.append(broker.ready)
        yield {"pool": 1}
        seen.append(broker.ready)

    app = FastAPI(lifespan=own)
    broker.init_consumer_app(app)
    async with app.router.lifespan_context(app) as state:
        ours = {"broker": broker, f"broker:{broker.settings.module}": broker}
        assert {**ours, "pool": 1} == state
    assert [True, True] == seen
    assert not broker.ready


async def test_a_timeout_leaves_nothing_behind(broker: BrokerManager) -> None:
    """A request to a topic that exists and nobody reads ends in its timeout, to the point."""
    async with broker:
        with pytest.raises(ReplyTimeoutError):
            await broker.request(f"{broker.settings.module}.dlq", "e", timeout=0.3)
