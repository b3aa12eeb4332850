"""Raced requests: what must hold whichever of two things comes first."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import BrokerManager, EventObject, EventRouter, Metrics, Reject
from kafka_broker._replies import ReplyInbox
from kafka_broker._transport.memory import MemoryCluster
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerUnavailableError,
    DeliveryError,
    DeliveryUnknownError,
    OutboxFullError,
    RemoteError,
    ReplyTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kafka_broker._metrics import Counted


class Counting(Metrics):
    """Counts, and lets a test wait for a count."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def count(self, what: Counted, amount: int = 1) -> None:
        self.counts[what] += amount
        self._changed.set()

    async def until(self, what: Counted, amount: int) -> None:
        """Wait until *what* was counted that often."""
        async with asyncio.timeout(10):
            while self.counts[what] < amount:
                self._changed.clear()
                await self._changed.wait()


class Setting:
    """A broker that asks, one that answers, and the cluster between them."""

    def __init__(self) -> None:
        name = uuid.uuid4().hex
        self.cluster = MemoryCluster(name)
        self.router = EventRouter("answer")
        self.metrics = Counting()
        self.answer = BrokerManager(
            "answer", router=self.router, bootstrap_servers=f"memory://{name}"
        )
        self.ask = BrokerManager(
            "ask",
            metrics=self.metrics,
            bootstrap_servers=f"memory://{name}",
            drain_timeout=0.2,
            outbox_events=1000,
        )
        self.router.bind_event("echo")(self._echo)

    async def _echo(self, event: EventObject) -> Any:
        return event.data

    def reply_partition(self) -> int:
        """Return the partition of ask.replies that has been written to."""
        return next(record.partition for record in self.cluster.records("ask.replies"))


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    made = Setting()
    async with made.answer, made.ask:
        yield made


@asynccontextmanager
async def _leaves_nothing(broker: BrokerManager) -> AsyncIterator[None]:
    """Check that no task and no wait is left behind."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before
    assert [] == [task for task in left if not task.get_name().endswith(" worker")]  # a pool
    assert 0 == len(broker.consumer_storage)
    assert 0 == broker.consumer_storage.waiting


async def test_a_reply_before_the_acknowledgement(setting: Setting) -> None:
    """A reply that overtakes the acknowledgement of its request ends the wait."""
    with setting.cluster.hold_sends("answer"):
        reply = await setting.ask.request("answer", "echo", 1, timeout=5)
    assert 1 == reply.data


async def test_a_reply_after_the_timeout_is_dropped(setting: Setting) -> None:
    """A late reply is counted as late; it is not kept and wakes nobody."""
    release = asyncio.Event()

    @setting.router.bind_event("slow")
    async def slow() -> None:
        await release.wait()

    async with _leaves_nothing(setting.ask):
        with pytest.raises(ReplyTimeoutError):
            await setting.ask.request("answer", "slow", timeout=0.05)
        release.set()
        await setting.metrics.until("replies_late", 1)


async def test_a_duplicate_reply_is_dropped(setting: Setting) -> None:
    """The second copy of a reply is counted and dropped."""
    async with _leaves_nothing(setting.ask):
        await setting.ask.request("answer", "echo", 1, timeout=5)
        [reply] = setting.cluster.records("ask.replies")
        setting.cluster.append(
            "ask.replies",
            partition=reply.partition,
            key=reply.key,
            value=reply.value,
            headers=reply.headers,
        )
        await setting.metrics.until("replies_late", 1)


async def test_a_foreign_reply_is_dropped_undecoded(setting: Setting) -> None:
    """A reply for another replica on our partition is dropped by its headers alone."""
    await setting.ask.request("answer", "echo", 1, timeout=5)
    setting.cluster.append(
        "ask.replies",
        partition=setting.reply_partition(),
        value=b"not even JSON",
        headers=[("kafka_correlationId", b"id"), ("kb-instance", b"another")],
    )
    await setting.metrics.until("replies_foreign", 1)
    assert 0 == len(setting.ask.consumer_storage)


async def test_two_waiters_on_one_id(setting: Setting) -> None:
    """Two waits on one id get one reply each, in order."""
    storage = setting.ask.consumer_storage
    waits = [asyncio.create_task(storage.consume("same", timeout=5)) for _ in range(2)]
    await asyncio.sleep(0)
    for n in range(2):
        event = EventObject(correlation_id="same", event="echo", data=n)
        await setting.ask.produce("answer", event, key="k")
    assert [0, 1] == [(await wait).data for wait in waits]


async def test_a_failed_delivery_ends_the_request_at_once(setting: Setting) -> None:
    """A request that Kafka refuses raises why, without waiting for its timeout."""
    setting.cluster.fail_sends("answer", DeliveryError("answer", "too large"))
    async with _leaves_nothing(setting.ask):
        with pytest.raises(DeliveryError, match="too large"):
            await setting.ask.request("answer", "echo", timeout=60)


async def test_an_unknown_delivery_ends_the_request_as_unknown(setting: Setting) -> None:
    """A request whose outcome is unknown raises that; the reply that comes anyway is dropped."""
    setting.cluster.fail_sends("answer", DeliveryUnknownError("answer", "no answer"))
    with pytest.raises(DeliveryUnknownError):
        await setting.ask.request("answer", "echo", timeout=60)
    await setting.metrics.until("replies_late", 1)


async def test_a_request_to_a_missing_topic_says_so(setting: Setting) -> None:
    """A request that could not be sent within its timeout raises a delivery error."""
    async with _leaves_nothing_but_lookups(setting):
        with pytest.raises(DeliveryError, match="does not exist"):
            await setting.ask.request("nowhere", "echo", timeout=0.2)


async def test_a_request_of_the_run_before_is_withdrawn_there() -> None:
    """A request that times out unsent, as the broker stops and starts anew, says why it was not."""
    made = Setting()
    await made.ask.init_consumer()
    asking = asyncio.create_task(made.ask.request("nowhere", "echo", timeout=0.1))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(made.ask.stop())
    await asyncio.sleep(0)
    starting = made.ask.init_consumer()
    with pytest.raises(DeliveryError, match="does not exist"):
        await asking
    await stopping
    await starting
    assert made.ask.ready
    await made.ask.stop()


@asynccontextmanager
async def _leaves_nothing_but_lookups(setting: Setting) -> AsyncIterator[None]:
    yield
    assert 0 == setting.ask.consumer_storage.waiting


async def test_an_event_waits_for_its_topic_to_appear(setting: Setting) -> None:
    """What is produced before the other service made its topic is delivered once it has."""
    delivery = setting.ask.produce("later", EventObject(event="e"))
    later = BrokerManager("later", bootstrap_servers=setting.ask.settings.bootstrap_servers)
    async with later:
        assert 0 == (await delivery).offset


async def test_a_cancelled_request_leaves_nothing(setting: Setting) -> None:
    """A request cancelled at any of its awaits frees its slot; what was not sent is not sent."""
    for turns in range(6):
        async with _leaves_nothing(setting.ask):
            task = asyncio.create_task(setting.ask.request("answer", "echo", 1, timeout=60))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            await _idle(setting)


async def _idle(setting: Setting) -> None:
    """Wait until everything that was produced has been answered and the reply has come."""
    await setting.ask.request("answer", "echo", timeout=5)
    await setting.ask.request("answer", "echo", timeout=5)


async def test_a_full_outbox_fails_the_request_at_once(setting: Setting) -> None:
    """An overload raises before anything is waited for."""
    for _ in range(1000):
        setting.ask.produce("nowhere", EventObject(event="e"))
    async with _leaves_nothing(setting.ask):
        with pytest.raises(OutboxFullError):
            await setting.ask.request("answer", "echo", timeout=60)


async def test_unserializable_data_fails_the_request_at_once(setting: Setting) -> None:
    """Data without a form in JSON is a TypeError, and leaves no slot."""
    async with _leaves_nothing(setting.ask):
        with pytest.raises(TypeError, match="no form in JSON"):
            await setting.ask.request("answer", "echo", object(), timeout=60)


async def test_requests_survive_a_broken_reader(setting: Setting) -> None:
    """When the reader of replies breaks, a new one goes on where it stopped."""
    for n in range(3):
        with setting.cluster.hold_sends("answer"):
            asking = asyncio.create_task(setting.ask.request("answer", "echo", n, timeout=10))
            setting.cluster.break_readers("ask.replies")
        assert n == (await asking).data


async def test_handling_survives_a_broken_subscription(setting: Setting) -> None:
    """When the subscription breaks, the service joins again and goes on."""
    setting.cluster.break_readers("answer")
    assert 1 == (await setting.ask.request("answer", "echo", 1, timeout=10)).data


async def test_kafka_that_comes_back_in_time(setting: Setting) -> None:
    """A request made while Kafka is down is answered when it is back before the timeout."""
    setting.cluster.down()
    asking = asyncio.create_task(setting.ask.request("answer", "echo", 1, timeout=10))
    await asyncio.sleep(0)
    setting.cluster.up()
    assert 1 == (await asking).data


async def test_a_start_waits_for_kafka() -> None:
    """A broker that starts while Kafka is down is ready once Kafka is up."""
    made = Setting()
    made.cluster.down()
    starting = made.ask.init_consumer()
    asking = asyncio.create_task(made.ask.request("answer", "echo", 1, timeout=10))
    await asyncio.sleep(0)
    made.cluster.up()
    await starting
    async with made.answer:
        assert 1 == (await asking).data
    await made.ask.stop()


async def test_a_start_without_kafka_ends_in_time() -> None:
    """A start that Kafka does not answer raises after start_timeout; nothing is left running."""
    made = Setting()
    made.cluster.down()
    broker = BrokerManager(
        "late", bootstrap_servers=made.ask.settings.bootstrap_servers, start_timeout=0.2
    )
    delivery = broker.produce("answer", EventObject(event="e"))
    before = asyncio.all_tasks()
    with pytest.raises(BrokerUnavailableError):
        async with broker:
            pytest.fail("it cannot start")
    assert set() == asyncio.all_tasks() - before
    with pytest.raises(DeliveryError):
        await delivery


async def test_topics_that_may_not_be_created() -> None:
    """A start that may not create its topics says which command does."""
    made = Setting()
    made.cluster.deny_create()
    broker = BrokerManager(
        "ask", bootstrap_servers=made.ask.settings.bootstrap_servers, start_timeout=0.2
    )
    with pytest.raises(BrokerUnavailableError, match="--create --topic"):
        await broker.init_consumer()
    await broker.stop()


async def test_a_bug_in_a_worker_stops_the_broker(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one of our own tasks dies, every wait ends and the failure surfaces."""

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ReplyInbox, "_take", bug)
    broker = BrokerManager("buggy", bootstrap_servers=setting.ask.settings.bootstrap_servers)
    await broker.init_consumer()
    waiting = asyncio.create_task(broker.consumer_storage.consume("id", timeout=None))
    await asyncio.sleep(0)
    for partition in range(16):
        setting.cluster.append("buggy.replies", partition=partition, value=b"no headers")
    with pytest.raises(ZeroDivisionError):
        await broker.wait_closed()
    with pytest.raises(BrokerClosedError):
        await waiting
    assert not broker.ready


async def test_an_observer_that_raises_is_logged_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Requests are answered, failures told and events committed as if nobody looked on."""

    class Broken(Metrics):
        def count(self, what: Counted, amount: int = 1) -> None:
            raise LookupError(what, amount)

        def handled(self, where: str, event: str, seconds: float, error: object) -> None:
            raise LookupError(where, event, seconds, error)

    name, router = uuid.uuid4().hex, EventRouter("observed")

    @router.bind_event("fails")
    async def fails() -> None:
        raise Reject

    @router.bind_event("echo")
    async def echo(event: EventObject) -> Any:
        return event.data

    async with BrokerManager(
        "observed", router=router, metrics=Broken(), bootstrap_servers=f"memory://{name}"
    ) as broker:
        for number in range(3):
            with pytest.raises(RemoteError):
                await broker.request("observed", "fails", timeout=5)
            assert number == (await broker.request("observed", "echo", number, timeout=5)).data
    assert "the observer raised as it was told of events_handled" in caplog.text
    assert "the observer raised as it was told of observed:" in caplog.text


async def test_a_thousand_in_flight_leave_nothing() -> None:
    """After 10,000 requests, a thousand at a time, no slot, task, timer or memory is left."""

    async def rounds() -> Counter[str]:
        made = Setting()
        numbers = iter(range(10_000))

        async def worker() -> None:
            for number in numbers:
                reply = await made.ask.request("answer", "echo", number, timeout=30)
                assert number == reply.data

        async with made.answer, made.ask, _leaves_nothing(made.ask):
            await asyncio.gather(*(worker() for _ in range(1000)))
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    watched = ("Slot", "Arrival", "Delivery", "Task", "TimerHandle", "Request", "Hop")
    before, after = await rounds(), await rounds()
    grown = {name: max(0, after[name] - before[name]) for name in watched}  # others may go
    assert dict.fromkeys(watched, 0) == grown
