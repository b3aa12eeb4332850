"""The storage: what has arrived is there until it is taken, and who waits for it gets it."""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_broker import _wire as wire
from kafka_broker._event import EventObject
from kafka_broker._metrics import Counted, Metrics
from kafka_broker._slots import Arrival, Slot
from kafka_broker._storage import ConsumerStorage
from kafka_broker._transport.memory_log import MemoryRecord
from kafka_broker.errors import (
    BrokerClosedError,
    DeliveryError,
    EventDecodeError,
    NoHandlerError,
    RemoteError,
    ReplyTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

virtual = pytest.mark.looptime

NOT_RUNNING = "the broker is not running"


class Counts(Metrics):
    """Metrics that a test can look at."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()

    def count(self, what: Counted, amount: int = 1) -> None:
        self.counted[what] += amount


class Storage(ConsumerStorage):
    """A storage that is open, with counts, and with short ways to put something into it."""

    def __init__(self, *, limit: int = 100, ttl: float = 60.0) -> None:
        self.metrics = Counts()
        super().__init__(timeout=30.0, ttl=ttl, limit=limit, metrics=self.metrics)
        self.open()

    @property
    def counted(self) -> dict[str, int]:
        return dict(self.metrics.counted)

    def reply(self, correlation_id: str, data: Any = None, *, status: str = "completed") -> None:
        event = EventObject(
            correlation_id=correlation_id, event="respond", data=data, status=status
        )
        self.put_reply(correlation_id, record(wire.encode(event, "Bank")))

    async def event(self, correlation_id: str, data: Any = None) -> Arrival:
        return await self.offer(EventObject(correlation_id=correlation_id, event="sale", data=data))


def record(value: bytes | None) -> MemoryRecord:
    return MemoryRecord("Shop.replies", 0, 5, 0, None, value, ())


@pytest.fixture
async def storage() -> Storage:
    return Storage()


async def turn() -> None:
    """Let every task run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def waiting(wait: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Begin to wait in a task of its own."""
    task = asyncio.create_task(wait)
    await turn()
    assert not task.done()
    return task


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def living(kind: type) -> int:
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


def timers() -> int:
    gc.collect()
    return sum(
        isinstance(one, asyncio.TimerHandle) and not one.cancelled() for one in gc.get_objects()
    )


@pytest.fixture
async def noise() -> list[dict[str, Any]]:
    """Collect what the loop would log, such as exceptions that were never retrieved."""
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    return heard


# receive and poll


async def test_receive_waits_until_something_arrives(storage: Storage) -> None:
    """It moves it into the storage and returns True."""
    receiving = await waiting(storage.receive())
    await storage.event("a")
    assert await receiving is True
    assert "a" in storage


async def test_receive_waits_for_something_new(storage: Storage) -> None:
    """What it has told of before is old, taken or not."""
    await storage.event("a")
    assert await storage.receive()
    receiving = await waiting(storage.receive())
    storage.reply("b")
    assert await receiving


async def test_receive_tells_of_what_a_consume_has_moved(storage: Storage) -> None:
    """A `consume()` for another id looks through what has arrived; a receiver still wakes up."""
    receiving = await waiting(storage.receive())
    await storage.event("a")
    with pytest.raises(ReplyTimeoutError):
        await storage.consume("b", timeout=0)
    assert "a" in storage
    assert await receiving


async def test_receive_can_be_cancelled(storage: Storage) -> None:
    """What arrived at that moment is told to the next one."""
    receiving = await waiting(storage.receive())
    await storage.event("a")
    await cancelled(receiving)
    assert await storage.receive()
    assert "a" in storage


async def test_receive_tells_of_what_consume_all_has_left(storage: Storage) -> None:
    """A loop of both takes every event, also the second one with the same id."""
    taken = []
    for number in range(3):
        await storage.event("a", number)
    for _ in range(3):
        assert await storage.receive()
        taken += [event.data for event in (await storage.consume_all()).values()]
    assert [0, 1, 2] == taken
    await cancelled(await waiting(storage.receive()))


async def test_receive_ends_with_the_broker(storage: Storage) -> None:
    """Every receiver gets to know, and there is none without a broker."""
    receiving = [await waiting(storage.receive()) for _ in range(3)]
    storage.close("the broker was stopped")
    for task in receiving:
        with pytest.raises(BrokerClosedError, match="was stopped"):
            await task
    with pytest.raises(BrokerClosedError):
        await storage.receive()


async def test_poll_tells_whether_anything_came(storage: Storage) -> None:
    """It never waits."""
    assert await storage.poll() is False
    await storage.event("a")
    storage.reply("b")
    assert "a" not in storage
    assert await storage.poll() is True
    assert "a" in storage
    assert "b" in storage
    assert await storage.poll() is False


async def test_poll_without_a_broker_says_so(storage: Storage) -> None:
    """Polling never waits; on a storage whose broker stopped it raises, as every wait does."""
    storage.close("the broker was stopped")
    with pytest.raises(BrokerClosedError, match="was stopped"):
        await storage.poll()


# consume


async def test_consume_returns_at_once_what_came_before(storage: Storage) -> None:
    """And removes it."""
    await storage.event("a", 1)
    storage.reply("b", 2)
    assert 1 == (await storage.consume("a", timeout=0)).data
    assert 2 == (await storage.consume("b", timeout=0)).data
    assert 0 == len(storage)


async def test_consume_waits_for_an_event(storage: Storage) -> None:
    """One of the module's topic, and it does not get into the storage."""
    consuming = await waiting(storage.consume("a"))
    arrival = await storage.event("a", 1)
    event = await consuming
    assert arrival.done()
    assert ("a", "sale", 1) == (event.correlation_id, event.event, event.data)
    assert await storage.poll() is False
    assert "a" not in storage


async def test_consume_waits_for_a_reply(storage: Storage) -> None:
    """It is decoded for the one who waited, and counted."""
    consuming = await waiting(storage.consume("a"))
    storage.reply("a", {"sum": 3})
    event = await consuming
    assert ("a", "respond", {"sum": 3}) == (event.correlation_id, event.event, event.data)
    assert {"replies_received": 1} == storage.counted


async def test_consume_takes_a_uuid(storage: Storage) -> None:
    """Its text is what travels; 0.4 never matched one."""
    given_id = uuid.uuid4()
    consuming = await waiting(storage.consume(given_id))
    storage.reply(str(given_id), 1)
    assert 1 == (await consuming).data
    given_id = uuid.uuid4()
    await storage.event(str(given_id), 2)
    await storage.poll()
    assert given_id in storage
    event = storage.get(given_id)
    assert event is not None
    assert event is storage.remove(given_id)


async def test_several_waiters_are_served_in_order(storage: Storage) -> None:
    """One event each."""
    tasks = [await waiting(storage.consume("a")) for _ in range(4)]
    await storage.event("a", 0)
    storage.reply("a", 1)
    await turn()
    await storage.event("a", 2)
    storage.reply("a", 3)
    assert [0, 1, 2, 3] == [(await task).data for task in tasks]


async def test_a_waiter_that_is_gone_is_passed_over(storage: Storage) -> None:
    """The next one in the row gets the event, whichever has left."""
    first, second, third, fourth = [await waiting(storage.consume("a")) for _ in range(4)]
    await cancelled(first)
    await cancelled(third)
    storage.reply("a", 1)
    storage.reply("a", 2)
    assert [1, 2] == [(await task).data for task in (second, fourth)]


@virtual
async def test_a_wait_is_bounded_by_the_settings(storage: Storage, looptime: Any) -> None:
    """Unless a timeout is given."""
    with pytest.raises(ReplyTimeoutError) as caught:
        await storage.consume("a")
    assert 30 == looptime
    assert ("a", 30) == (caught.value.correlation_id, caught.value.timeout)
    with pytest.raises(TimeoutError, match=r"no reply to b within 5 s"):
        await storage.consume("b", timeout=5)
    assert 35 == looptime


@virtual
async def test_a_wait_may_be_without_limit(storage: Storage) -> None:
    """`None` waits for days."""
    consuming = await waiting(storage.consume("a", timeout=None))
    await asyncio.sleep(1_000_000)
    storage.reply("a", 1)
    assert 1 == (await consuming).data


@virtual
@pytest.mark.parametrize("timeout", [0, 0.0, -1])
async def test_a_wait_may_be_a_look(timeout: float, storage: Storage, looptime: Any) -> None:
    """No time to wait means: only if it is there."""
    with pytest.raises(ReplyTimeoutError):
        await storage.consume("a", timeout=timeout)
    await storage.event("b", 1)
    assert 1 == (await storage.consume("b", timeout=timeout)).data
    assert 0 == looptime


async def test_an_error_reply_raises(storage: Storage) -> None:
    """Whether it came before the call or after."""
    for before in (True, False):
        for data, kind in (
            ({"status": 409}, RemoteError),
            ({"code": "no-handler"}, NoHandlerError),
        ):
            correlation_id = f"{before} {kind}"
            if before:
                storage.reply(correlation_id, data, status="error")
                task = asyncio.create_task(storage.consume(correlation_id))
            else:
                task = await waiting(storage.consume(correlation_id))
                storage.reply(correlation_id, data, status="error")
            with pytest.raises(kind):
                await task
    assert 0 == len(storage)


async def test_a_reply_that_cannot_be_read_raises(storage: Storage) -> None:
    """Whoever waited for it gets to know."""
    storage.put_reply("a", record(b"?"))
    with pytest.raises(EventDecodeError):
        await storage.consume("a")
    consuming = await waiting(storage.consume("b"))
    storage.put_reply("b", record(b"?"))
    with pytest.raises(EventDecodeError):
        await consuming


async def test_a_reply_has_the_id_that_was_waited_for(storage: Storage) -> None:
    """Also one of a peer that sends bare data."""
    consuming = await waiting(storage.consume("a"))
    storage.put_reply("a", record(b'{"sum": 3}'))
    event = await consuming
    assert ("a", {"sum": 3}) == (event.correlation_id, event.data)


async def test_nobody_can_wait_without_a_broker() -> None:
    """Before the start and after the stop the error says which of the two it is."""
    storage = ConsumerStorage(timeout=1, ttl=1, limit=1, metrics=Metrics())
    with pytest.raises(BrokerClosedError, match=NOT_RUNNING):
        await storage.consume("a")
    with pytest.raises(BrokerClosedError, match=NOT_RUNNING):
        await storage.receive()
    with pytest.raises(BrokerClosedError, match=NOT_RUNNING):
        await storage.consume_all()
    storage.open()
    storage.close("the broker was stopped")
    with pytest.raises(BrokerClosedError, match="was stopped"):
        await storage.consume("a")


# consume_all, get, remove, len, in


async def test_consume_all_takes_everything(storage: Storage) -> None:
    """Events and parked replies, by correlation id."""
    await storage.event("a", 1)
    storage.reply("b", 2)
    taken = await storage.consume_all()
    assert {"a": 1, "b": 2} == {key: event.data for key, event in taken.items()}
    assert 0 == len(storage)
    assert {} == await storage.consume_all()


async def test_a_second_event_with_the_same_id_stays_for_the_next_call(storage: Storage) -> None:
    """Nothing is overwritten, and the order is kept."""
    for number in range(3):
        await storage.event("a", number)
    await storage.event("b", 10)
    calls = [await storage.consume_all() for _ in range(4)]
    data = [{key: event.data for key, event in taken.items()} for taken in calls]
    assert [{"a": 0, "b": 10}, {"a": 1}, {"a": 2}, {}] == data


async def test_consume_all_returns_error_replies_as_they_are(storage: Storage) -> None:
    """One failure does not hide the others."""
    storage.reply("a", {"detail": "x"}, status="error")
    storage.reply("b", 1)
    taken = await storage.consume_all()
    assert {"a": "error", "b": "completed"} == {key: one.status for key, one in taken.items()}


async def test_consume_all_leaves_out_what_cannot_be_read(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, without its payload, and does not stay."""
    storage.put_reply("a", record(b"hunter2"))
    storage.fail("b", DeliveryError("Bank", "too big"))
    storage.reply("c", 1)
    assert ["c"] == list(await storage.consume_all())
    assert 2 == len([one for one in caplog.records if one.levelno == logging.ERROR])
    assert "too big" in caplog.text
    assert "hunter2" not in caplog.text
    assert 0 == len(storage)


async def test_get_looks_and_remove_takes(storage: Storage) -> None:
    """Neither waits, and both see what was moved into the storage only."""
    await storage.event("a", 1)
    await storage.event("a", 2)
    assert storage.get("a") is None
    assert storage.remove("a") is None
    await storage.poll()
    other = EventObject(event="other")
    first = storage.get("a", other)
    assert first is not None
    assert 1 == first.data
    assert first is storage.get("a")
    assert other is storage.get("b", other)
    assert 2 == len(storage)
    assert first is storage.remove("a")
    second = storage.remove("a")
    assert second is not None
    assert 2 == second.data
    assert storage.remove("a") is None
    assert 0 == len(storage)


async def test_get_and_remove_raise_what_is_no_event(storage: Storage) -> None:
    """A failed delivery and bytes that are no event are there under their id."""
    storage.fail("a", DeliveryError("Bank", "too big"))
    storage.put_reply("b", record(b"?"))
    await storage.poll()
    for correlation_id, kind in (("a", DeliveryError), ("b", EventDecodeError)):
        assert correlation_id in storage
        with pytest.raises(kind):
            storage.get(correlation_id)
        with pytest.raises(kind):
            storage.remove(correlation_id)
        assert correlation_id not in storage


async def test_an_error_reply_is_only_looked_at(storage: Storage) -> None:
    """`get` and `remove` return it; only `consume` raises."""
    storage.reply("a", {}, status="error")
    await storage.poll()
    event = storage.get("a")
    assert event is not None
    assert "error" == event.status
    assert storage.remove("a") is not None


# Replies that nobody waits for


@virtual
async def test_a_parked_reply_is_kept_for_a_while() -> None:
    """After `ttl` it is dropped and counted, whether it was moved or not."""
    storage = Storage(ttl=10)
    storage.reply("a")
    await asyncio.sleep(1)
    storage.reply("b")
    storage.reply("taken")
    await storage.poll()
    assert storage.remove("taken")
    await asyncio.sleep(8.9)
    assert 2 == len(storage)
    await asyncio.sleep(0.2)
    assert "a" not in storage
    assert "b" in storage
    await asyncio.sleep(1)
    assert 0 == len(storage)
    assert {"replies_dropped": 2} == storage.counted
    with pytest.raises(ReplyTimeoutError):
        await storage.consume("b", timeout=0)


async def test_parked_replies_are_bounded() -> None:
    """The oldest goes first, and is counted."""
    storage = Storage(limit=3)
    for number in range(5):
        storage.reply(str(number))
    await storage.poll()
    assert [False, False, True, True, True] == [str(one) in storage for one in range(5)]
    assert {"replies_dropped": 2} == storage.counted


async def test_replies_take_no_room_of_events() -> None:
    """A flood of replies neither stops fetching nor pushes an event out."""
    storage = Storage(limit=2)
    await storage.event("a")
    for number in range(5):
        storage.reply(str(number))
    await storage.event("b")
    assert {"a", "3", "4", "b"} == set(await storage.consume_all())


async def test_parked_replies_take_no_memory_when_nobody_ever_polls() -> None:
    """A broker that only produces gets replies, too, and lives for months."""
    storage = Storage(limit=10)
    before = living(Arrival)
    for number in range(1000):
        storage.reply(str(number))
    assert living(Arrival) - before < 20


async def test_events_that_moved_away_take_no_memory_when_nobody_ever_polls() -> None:
    """However often the partitions move."""
    storage = Storage(limit=10)
    before = living(Arrival)
    for number in range(1000):
        await storage.event(str(number))
        if number % 10 == 9:
            storage.forget_events()
    assert living(Arrival) - before < 20


async def ended_by_timeout(storage: Storage) -> None:
    with pytest.raises(ReplyTimeoutError):
        await storage.consume("a", timeout=0)


async def ended_by_cancel(storage: Storage) -> None:
    await cancelled(await waiting(storage.consume("a")))


async def ended_by_reply(storage: Storage) -> None:
    consuming = await waiting(storage.consume("a"))
    storage.reply("a")
    await consuming


@pytest.mark.parametrize("ended", [ended_by_timeout, ended_by_cancel, ended_by_reply])
async def test_a_late_or_second_reply_is_dropped_and_counted(
    ended: Callable[[Storage], Coroutine[Any, Any, None]], storage: Storage
) -> None:
    """Nobody waits for it any more, so it is not kept."""
    await ended(storage)
    storage.reply("a", "late")
    assert 1 == storage.counted["replies_late"]
    assert await storage.poll() is False
    assert 0 == len(storage)


async def test_a_late_event_is_kept(storage: Storage) -> None:
    """Events of the module's own topic are never dropped."""
    await ended_by_timeout(storage)
    await storage.event("a", 1)
    assert 1 == (await storage.consume("a", timeout=0)).data


async def test_a_new_wait_for_an_old_id_gets_its_reply(storage: Storage) -> None:
    """Waiting again, after a timeout, is no mistake."""
    await ended_by_timeout(storage)
    consuming = await waiting(storage.consume("a"))
    storage.reply("a", 1)
    assert 1 == (await consuming).data
    assert {"replies_received": 1} == storage.counted


async def test_ended_waits_are_remembered_for_some_thousand_further_ones(storage: Storage) -> None:
    """Long enough for every late reply, and not for ever."""

    def end(correlation_id: str) -> None:
        storage.release(storage.expect(correlation_id))

    end("a")
    for number in range(8000):
        end(str(number))
    storage.reply("a")
    assert {"replies_late": 1} == storage.counted
    for number in range(20_000):
        end(str(number))
    storage.reply("a")
    assert {"replies_late": 1} == storage.counted
    assert await storage.poll()


# Failed deliveries


async def test_a_failed_delivery_ends_the_wait(storage: Storage) -> None:
    """Nothing will come: the first of those who wait gets the error at once."""
    first, second = [await waiting(storage.consume("a")) for _ in range(2)]
    error = DeliveryError("Bank", "too big")
    assert storage.fail("a", error) is True
    with pytest.raises(DeliveryError) as caught:
        await first
    assert error is caught.value
    storage.reply("a", 1)
    assert 1 == (await second).data


async def test_a_failed_delivery_that_nobody_waits_for_is_kept(storage: Storage) -> None:
    """A `consume()` afterwards gets it; until then nobody knows."""
    assert storage.fail("a", DeliveryError("Bank", "too big")) is False
    with pytest.raises(DeliveryError, match="too big"):
        await storage.consume("a")
    assert "a" not in storage


async def test_a_failed_delivery_after_the_wait_is_not_kept(storage: Storage) -> None:
    """Its wait has ended, so nobody will ask for it."""
    await ended_by_timeout(storage)
    assert storage.fail("a", DeliveryError("Bank", "too big")) is False
    assert await storage.poll() is False


async def test_a_failed_delivery_after_the_stop_is_not_kept(storage: Storage) -> None:
    """The outbox closes after the storage."""
    storage.close("the broker was stopped")
    assert storage.fail("a", DeliveryError("Bank", "too big")) is False
    assert 0 == len(storage)


# Back-pressure


async def test_a_full_storage_takes_an_event_when_another_is_taken() -> None:
    """It waits as long as nobody takes one; nothing is ever dropped."""
    storage = Storage(limit=2)
    await storage.event("a")
    await storage.event("b")
    offering = await waiting(storage.event("c"))
    for take in (storage.consume("a"), storage.consume("c")):
        await take
        await turn()
        assert offering.done()
    await storage.event("d")
    offering = await waiting(storage.event("e"))
    assert {"b", "d"} == set(await storage.consume_all())
    await offering
    assert {"e"} == set(await storage.consume_all())


async def test_a_full_storage_lets_an_event_pass_that_is_waited_for() -> None:
    """The one who waits for it would wait in vain otherwise."""
    storage = Storage(limit=1)
    await storage.event("a")
    consuming = await waiting(storage.consume("b"))
    await storage.event("b", 1)
    assert 1 == (await consuming).data
    assert {"a"} == set(await storage.consume_all())


async def test_an_offer_can_be_cancelled() -> None:
    """The event is not taken: it is still Kafka's."""
    storage = Storage(limit=1)
    await storage.event("a")
    await cancelled(await waiting(storage.event("b")))
    assert {"a"} == set(await storage.consume_all())
    assert await storage.poll() is False


async def test_an_event_is_done_when_it_is_taken(storage: Storage) -> None:
    """Whichever way: only then its offset may be committed."""
    arrivals = [await storage.event(name) for name in ("a", "b", "c")]
    await storage.poll()
    assert [False] * 3 == [arrival.done() for arrival in arrivals]
    storage.get("a")
    assert not arrivals[0].done()
    storage.remove("a")
    assert arrivals[0].done()
    await storage.consume("b")
    assert arrivals[1].done()
    await storage.consume_all()
    assert arrivals[2].done()


async def test_events_whose_partition_moved_are_forgotten() -> None:
    """Another replica has them now; replies are ours still, and there is room again."""
    storage = Storage(limit=1)
    arrival = await storage.event("a")
    storage.reply("b")
    offering = await waiting(storage.event("c"))
    storage.forget_events()
    await offering
    assert {"b", "c"} == set(await storage.consume_all())
    assert not arrival.done()


# Cancels and coincidences


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_cancelled_wait_leaves_nothing_behind(
    handed_over: bool,  # noqa: FBT001
    storage: Storage,
    noise: list[dict[str, Any]],
) -> None:
    """No slot and no timer, also when something came at that moment."""
    before = living(Slot), timers()
    consuming = await waiting(storage.consume("a"))
    assert storage.waits_for("a")
    if handed_over:
        await storage.event("a")
    await cancelled(consuming)
    del consuming
    await turn()
    assert not storage.waits_for("a")
    assert before == (living(Slot), timers())
    assert [] == noise


async def test_an_event_handed_over_to_a_cancelled_wait_is_not_lost(storage: Storage) -> None:
    """It goes back to the storage, and is not done."""
    consuming = await waiting(storage.consume("a"))
    arrival = await storage.event("a", 1)
    await cancelled(consuming)
    assert not arrival.done()
    assert await storage.poll()
    assert 1 == (await storage.consume("a", timeout=0)).data
    assert arrival.done()


async def test_an_event_handed_over_to_a_cancelled_wait_goes_to_the_next(storage: Storage) -> None:
    """Whoever waits for the same id gets it, as does the next for a reply."""
    first, second, third = [await waiting(storage.consume("a")) for _ in range(3)]
    await storage.event("a", 1)
    await cancelled(first)
    assert 1 == (await second).data
    storage.reply("a", 2)
    third.cancel()
    fourth = await waiting(storage.consume("a"))
    with pytest.raises(asyncio.CancelledError):
        await third
    assert not fourth.done()
    fifth = await waiting(storage.consume("a"))
    storage.reply("a", 3)
    fourth.cancel()
    assert 3 == (await fifth).data


async def test_a_reply_handed_over_to_a_cancelled_wait_is_late(storage: Storage) -> None:
    """Its wait has ended; it is dropped and counted, like one that comes a moment later."""
    consuming = await waiting(storage.consume("a"))
    storage.reply("a")
    await cancelled(consuming)
    assert 1 == storage.counted["replies_late"]
    assert await storage.poll() is False


async def test_a_wait_that_fails_as_it_is_cancelled_makes_no_noise(
    storage: Storage, noise: list[dict[str, Any]]
) -> None:
    """The exception that nobody gets is nobody's business."""
    for closing in (False, True):
        consuming = await waiting(storage.consume("a"))
        if closing:
            storage.close("the broker was stopped")
        else:
            storage.fail("a", DeliveryError("Bank", "too big"))
        await cancelled(consuming)
        del consuming
        await turn()
        gc.collect()
        assert [] == noise


@virtual
@pytest.mark.parametrize("delay", [29.999, 30.0, 30.001])
async def test_a_reply_at_the_last_moment_is_received_or_late(
    delay: float, storage: Storage, noise: list[dict[str, Any]]
) -> None:
    """It is never both and never neither, also in the same turn of the loop."""
    loop = asyncio.get_running_loop()
    for before in (True, False):
        storage.metrics.counted.clear()
        start = loop.time()
        if before:
            loop.call_at(start + delay, storage.reply, f"{before}", 1)
        consuming = asyncio.create_task(storage.consume(f"{before}"))
        await asyncio.sleep(0)
        if not before:
            loop.call_at(start + delay, storage.reply, f"{before}", 1)
        try:
            await consuming
        except ReplyTimeoutError:
            await asyncio.sleep(1)
            assert {"replies_late": 1} == storage.counted
        else:
            assert {"replies_received": 1} == storage.counted
    assert [] == noise


async def test_two_replies_in_one_turn_serve_one_wait(storage: Storage) -> None:
    """The second is not held for somebody who has already been served."""
    consuming = await waiting(storage.consume("a"))
    storage.reply("a", 1)
    assert not storage.waits_for("a")
    storage.reply("a", 2)
    assert {"replies_received": 1, "replies_late": 1} == storage.counted
    assert 1 == (await consuming).data
    assert await storage.poll() is False


async def test_close_ends_every_wait(storage: Storage, noise: list[dict[str, Any]]) -> None:
    """A thousand of them, each in an error of its own, and without noise."""
    tasks = [asyncio.create_task(storage.consume(f"{one % 300}")) for one in range(1000)]
    await turn()
    storage.close("the broker was stopped")
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {BrokerClosedError} == {type(error) for error in errors}
    assert {"the broker was stopped"} == {str(error) for error in errors}
    del tasks, errors
    await turn()
    assert 0 == living(Slot)
    assert [] == noise


@virtual
async def test_close_leaves_no_timer(storage: Storage) -> None:
    """Neither of waits nor of parked replies; untaken events are Kafka's again."""
    before = timers()
    consuming = await waiting(storage.consume("a"))
    storage.reply("b")
    arrival = await storage.event("c")
    storage.close("the broker was stopped")
    with pytest.raises(BrokerClosedError):
        await consuming
    del consuming
    assert before == timers()
    assert not arrival.done()
    assert "c" not in storage


async def test_a_storage_can_be_opened_again(storage: Storage) -> None:
    """A broker may be started again after its stop, and begins with an empty storage."""
    storage.reply("old")
    await storage.event("old")
    storage.close("the broker was stopped")
    storage.open()
    assert {} == await storage.consume_all()
    consuming = await waiting(storage.consume("a"))
    storage.reply("a", 1)
    assert 1 == (await consuming).data


async def test_a_slot_can_be_opened_before_the_request_is_sent(storage: Storage) -> None:
    """Then no reply can be too early, and releasing it leaves nothing."""
    slot = storage.expect("a", 5)
    storage.reply("a", 1)
    assert 1 == (await storage.collect(slot)).data
    before = timers()
    slot = storage.expect("b", 5)
    storage.release(slot)
    storage.release(slot)
    assert not storage.waits_for("b")
    assert before == timers()


async def test_a_slot_that_failed_before_its_wait_makes_no_noise(
    storage: Storage, noise: list[dict[str, Any]]
) -> None:
    """A request that could not be sent is told by its own error."""
    slot = storage.expect("a", 5)
    storage.fail("a", DeliveryError("Bank", "too big"))
    storage.release(slot)
    del slot
    gc.collect()
    assert [] == noise


IDS = st.sampled_from(["a", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), IDS),
        st.tuples(st.just("consume"), IDS),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("expire"), st.integers(0, 1)),
        st.tuples(st.just("all"), st.just(0)),
        st.tuples(st.just("remove"), IDS),
        st.tuples(st.just("turn"), st.just(0)),
    ),
    max_size=40,
)


@virtual
@settings(max_examples=100, deadline=None)
@given(STEPS)
async def test_every_event_is_taken_exactly_once(steps: list[tuple[str, Any]]) -> None:
    """Whatever happens in whatever order, none is lost and none is doubled."""
    storage = Storage()
    offered: dict[int, Arrival] = {}
    consumers: list[asyncio.Task[EventObject[Any]]] = []
    taken: list[int] = []
    for step, argument in steps:
        if step == "offer":
            offered[len(offered)] = await storage.event(argument, len(offered))
        elif step == "consume":
            consumers.append(asyncio.create_task(storage.consume(argument, timeout=5)))
        elif step == "cancel" and consumers:
            consumers[argument % len(consumers)].cancel()
        elif step == "expire":
            await asyncio.sleep(3 * argument)
        elif step == "all":
            taken += [event.data for event in (await storage.consume_all()).values()]
        elif step == "remove" and (event := storage.remove(argument)) is not None:
            taken.append(event.data)
        elif step == "turn":
            await turn()
    results = await asyncio.gather(*consumers, return_exceptions=True)
    taken += [one.data for one in results if isinstance(one, EventObject)]
    ends = {type(one) for one in results} - {EventObject}
    assert ends <= {ReplyTimeoutError, asyncio.CancelledError}
    assert set(taken) == {number for number, arrival in offered.items() if arrival.done()}
    while rest := await storage.consume_all():
        taken += [event.data for event in rest.values()]
    assert list(range(len(offered))) == sorted(taken)


# Memory


@pytest.fixture
def measured() -> Iterator[Callable[[], int]]:
    """Count the bytes that were allocated since."""
    gc.collect()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()


async def test_a_pending_wait_costs_less_than_two_kilobytes(
    storage: Storage, measured: Callable[[], int]
) -> None:
    """Its task included; ten thousand of them."""
    ids = [f"{number:036}" for number in range(10_000)]
    before = measured()
    tasks = [asyncio.create_task(storage.consume(one)) for one in ids]
    await asyncio.sleep(0)
    assert (measured() - before) / len(ids) < 1900
    storage.close("the broker was stopped")
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_event_is_done_when_its_waiter_has_it(storage: Storage) -> None:
    """Not when it is handed over: its offset would be committed, and it could not come again."""
    first = await waiting(storage.consume("a"))
    arrival = await storage.event("a", 1)
    first.cancel()
    await asyncio.wait({first})
    assert not arrival.done()
    assert 1 == (await storage.consume("a")).data
    assert arrival.done()
