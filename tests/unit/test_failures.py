"""Handlers that fail: tried again in place, answered or buried, ended when their time is over."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import EventObject, Reject, RetryLater, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker._event import Hop, work_of
from kafka_broker.errors import RemoteError, ReplyTimeoutError

from .test_dispatch import SECRET, Bank, Counting, serves, turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CapacityLimiter

    from kafka_broker import BrokerManager
    from kafka_broker._metrics import Counted
    from kafka_broker._middleware import Middleware
    from kafka_broker._transport.memory_log import MemoryRecord

virtual = pytest.mark.looptime

EXACT = RetryPolicy(jitter=0)
"""Three tries, 0.1 and 0.2 seconds between them."""
ONCE = RetryPolicy(attempts=1)


class Watching(Counting):
    """Metrics that remember what they were told of each event."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str, type[Exception] | None]] = []

    def handled(self, where: str, event: str, seconds: float, error: Exception | None) -> None:
        assert seconds >= 0
        self.told.append((where, event, None if error is None else type(error)))

    def of(self, *names: Counted) -> list[int]:
        return [self.counted[name] for name in names]


class Shop(Bank):
    """A bank that says when its handlers were tried."""

    metrics: Watching

    def __init__(self, *middleware: Middleware, **values: Any) -> None:
        super().__init__(**{"retry": EXACT, "commit_interval": 0.1, **values})
        self.metrics = Watching()
        self.middleware = middleware
        self.tries: list[tuple[Any, int]] = []
        self.times: list[float] = []

    def broker(self) -> BrokerManager:
        broker = super().broker()
        broker._middleware = self.middleware
        return broker

    def note_try(self, event: EventObject) -> None:
        self.tries.append((event.data, event.attempt))
        self.times.append(now())

    def fails(self, count: int, error: Exception | None = None, **terms: Any) -> None:
        """Bind a handler whose first *count* tries raise *error* and whose others return."""

        @self.router.bind_event("fails", **terms)
        async def fails(event: EventObject) -> int:
            self.note_try(event)
            if event.attempt <= count:
                raise error or LookupError
            self.handled.append(event.data)
            return event.attempt

    @property
    def letters(self) -> list[MemoryRecord]:
        return self.cluster.records("Bank.dlq")

    @property
    def replies(self) -> list[Any]:
        """What was answered, by whatever replica."""
        values = [record.value for record in self.cluster.records("Bank.replies")]
        return [json.loads(value or b"")["data"] for value in values]


def now() -> float:
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for *condition*, not for ever, in steps that suit seconds of virtual time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # conditions of every kind
            await asyncio.sleep(0.005)


def about(*seconds: float) -> Any:
    return pytest.approx(list(seconds), abs=0.02)


# Tries in place


@virtual
async def test_an_event_that_fails_twice_is_answered_once() -> None:
    """Its third try gives the one reply, after pauses of 0.1 and 0.2 seconds."""
    shop = Shop()
    shop.fails(2)
    async with serves(shop) as broker:
        assert 3 == (await broker.request("Bank", "fails", "it", timeout=5)).data
        assert [3] == shop.replies
    assert [("it", 1), ("it", 2), ("it", 3)] == shop.tries
    assert about(0, 0.1, 0.3) == [time - shop.times[0] for time in shop.times]
    assert [] == shop.dead


@virtual
async def test_what_a_success_after_failures_counts() -> None:
    """It was retried twice, handled once and never failed, and the observer is told once."""
    shop = Shop()
    shop.fails(2)
    async with shop.broker() as broker:
        await broker.request("Bank", "fails", timeout=5)
    assert [2, 1, 0] == shop.metrics.of("events_retried", "events_handled", "events_failed")
    assert [("Bank:0:0", "fails", None)] == shop.metrics.told


@virtual
async def test_what_a_failure_counts() -> None:
    """It was retried twice and failed once, and the observer is told once, of the error."""
    shop = Shop()
    shop.fails(3)
    async with shop.broker():
        shop.put(event="fails")
        await until(lambda: shop.committed == 1)
    names: tuple[Counted, ...] = ("events_retried", "events_failed", "events_dead_lettered")
    assert [2, 1, 1] == shop.metrics.of(*names)
    assert [0] == shop.metrics.of("events_handled")
    assert [("Bank:0:0", "fails", LookupError)] == shop.metrics.told


@virtual
async def test_only_its_key_waits_between_tries() -> None:
    """Later events of its key keep their order behind it; others of the partition go on."""
    shop = Shop()
    shop.fails(2)
    async with serves(shop):
        shop.put("it", event="fails", key=b"a")
        shop.put("behind", key=b"a")
        shop.put("other key", key=b"b")
        shop.put("last", key=b"a")
        shop.put("no key")
        await until(lambda: shop.committed == 5)
    assert ["other key", "no key", "it", "behind", "last"] == shop.handled[:5]


@virtual
async def test_an_event_that_rests_holds_no_seat() -> None:
    """With the only seat another key is handled between two tries, not after them."""
    shop = Shop(concurrency=1)
    shop.fails(1)
    done: list[tuple[Any, float]] = []

    @shop.router.bind_event("work")
    async def work(event: EventObject) -> None:
        await asyncio.sleep(0.05)
        done.append((event.data, now()))

    async with serves(shop):
        began = now()
        shop.put(event="fails", key=b"a")
        shop.put("other", event="work", key=b"b")
        await until(lambda: shop.committed == 2)
    assert ["other"] == [data for data, _ in done]
    assert about(0.05) == [at - began for _, at in done]
    assert about(0, 0.1) == [time - began for time in shop.times]


@virtual
async def test_a_try_waits_for_a_seat_that_is_taken() -> None:
    """One seat is one handler: the next try begins when the other has ended, before new events."""
    shop = Shop(concurrency=1)
    shop.fails(1)

    @shop.router.bind_event("work")
    async def work(event: EventObject) -> None:
        await asyncio.sleep(1)
        shop.handled.append(event.data)

    async with serves(shop):
        began = now()
        shop.put("it", event="fails", key=b"a")
        for number in range(3):
            shop.put(number, event="work")
        await until(lambda: shop.committed == 4)
    assert [0, "it", 1, 2] == shop.handled[:4]
    assert about(0, 1) == [time - began for time in shop.times]


@virtual
async def test_each_try_sees_the_event_as_it_came() -> None:
    """What a failed try did to its event, in place or anew, the next one does not see."""
    shop = Shop()
    seen: list[tuple[Any, ...]] = []

    @shop.router.bind_event("spoil")
    async def spoil(event: EventObject) -> str:
        log = [hop.location for hop in event.audit_log]
        seen.append((event.event, str(event.data), event.status, log, event.correlation_id))
        event.data["items"].append(event.attempt)
        event.data = {**event.data, "new": 1}
        event.event, event.status, event.correlation_id = "other", "spoilt", "another"
        event.audit_log.append(Hop(location="nowhere"))
        if event.attempt < 3:
            raise LookupError
        return "done"

    async with serves(shop) as broker:
        data = {"items": [0]}
        assert "done" == (await broker.request("Bank", "spoil", data, timeout=5)).data
    first, *others = seen
    assert ("spoil", "{'items': [0]}", "pending", ["Bank"]) == first[:4]
    assert [first, first] == others


@virtual
async def test_an_event_says_where_it_comes_from_in_each_try() -> None:
    """The record behind it is the same one each time."""
    shop = Shop()
    records: list[Any] = []

    @shop.router.bind_event("look")
    async def look(event: EventObject) -> None:
        records.append(event.record)
        raise LookupError

    async with serves(shop):
        shop.put(event="look", key=b"k")
        await until(lambda: shop.committed == 1)
    assert [("Bank", 0, 0, b"k")] * 3 == [
        (one.topic, one.partition, one.offset, one.key) for one in records
    ]


async def test_a_plain_function_is_tried_again() -> None:
    """One in a thread, too, has three tries."""
    shop = Shop(retry=RetryPolicy(base=0.001))

    @shop.router.bind_event("plain")
    def plain(event: EventObject) -> int:
        if event.attempt < 3:
            raise LookupError
        return event.attempt

    async with serves(shop) as broker:
        assert 3 == (await broker.request("Bank", "plain", timeout=5)).data


@virtual
async def test_the_policy_of_a_bind_comes_before_that_of_the_settings() -> None:
    """A handler whose bind says one try has one."""
    shop = Shop()
    shop.fails(9, retry=ONCE)
    async with serves(shop):
        shop.put("it", event="fails")
        await until(lambda: shop.committed == 1)
    assert [("it", 1)] == shop.tries


@virtual
@pytest.mark.parametrize(
    ("policy", "tries"),
    [
        (RetryPolicy(on=(OSError,)), 1),
        (RetryPolicy(on=(LookupError,)), 3),
        (RetryPolicy(never=(LookupError,)), 1),
        (RetryPolicy(on=(OSError, LookupError), never=(KeyError,)), 1),
        (RetryPolicy(never=(IndexError,)), 3),
        (RetryPolicy(attempts=5), 5),
    ],
)
async def test_a_policy_decides_by_the_exception(policy: RetryPolicy, tries: int) -> None:
    """A KeyError is tried again if its class is among ``on`` and not among ``never``."""
    shop = Shop(retry=policy)
    shop.fails(9, KeyError("it"))
    async with serves(shop):
        shop.put(event="fails")
        await until(lambda: shop.committed == 1)
    assert tries == len(shop.tries)


# After the last try


@virtual
async def test_who_waits_gets_the_last_error() -> None:
    """Three tries later the requester gets a RemoteError, and there is no dead letter."""
    shop = Shop()
    shop.fails(3)
    async with serves(shop) as broker:
        with pytest.raises(RemoteError, match="LookupError in the handler") as caught:
            await broker.request("Bank", "fails", timeout=5)
        assert about(0.3) == [now() - shop.times[0]]
    assert (500, "handler-failed") == (caught.value.status, caught.value.code)
    assert (3, []) == (len(shop.tries), shop.dead)


@virtual
async def test_a_dead_letter_is_the_record_as_it_came() -> None:
    """Key, value and headers are untouched, and three headers of ours follow them."""
    shop = Shop()
    shop.fails(9)
    value = b' {"event":"fails",  "data":{"b":1,"a":"\\u00e9"},"correlation_id":"7","extra":[]}\n'
    headers = [("a", b"\xff\x00"), ("a", b"again"), ("none", None), ("kafka_x", b"")]
    async with serves(shop):
        shop.cluster.append("Bank", value=b"{}", key=b"before")
        shop.cluster.append("Bank", key=b"\xfekey", value=value, headers=headers)
        await until(lambda: shop.committed == 2)
    letter = shop.letters[-1]
    assert (b"\xfekey", value) == (letter.key, letter.value)
    ours = [
        (wire.ORIGIN, b"Bank:0:1"),
        (wire.GROUP, b"Bank"),
        (wire.ATTEMPT, b"3"),
        (wire.FAILURE, b"LookupError"),
    ]
    assert [*headers, *ours] == list(letter.headers)


@virtual
async def test_the_headers_of_an_earlier_death_are_replaced() -> None:
    """A dead letter that failed before has each header of ours once, and its first origin."""
    shop = Shop(retry=ONCE)
    shop.fails(9)
    old = [(wire.ORIGIN, b"Bank:0:77"), (wire.ATTEMPT, b"4"), (wire.FAILURE, b"Old"), ("x", b"y")]
    async with serves(shop):
        shop.put(event="fails", headers=old)
        await until(lambda: shop.committed == 1)
    [letter] = shop.letters
    ours = [
        (wire.ORIGIN, b"Bank:0:77"),
        (wire.GROUP, b"Bank"),
        (wire.ATTEMPT, b"4"),
        (wire.FAILURE, b"LookupError"),
    ]
    assert [("x", b"y"), *ours] == list(letter.headers)


@virtual
async def test_a_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """At ERROR after the last try, with place and traceback; never with the data."""
    caplog.set_level(logging.DEBUG, "kafka_broker")
    shop = Shop()
    shop.fails(9)
    async with serves(shop):
        shop.put(SECRET, event="fails")
        await until(lambda: shop.committed == 1)
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    text = record.getMessage()
    assert "event 'fails' (Bank:0:0, correlation id" in text
    assert "failed in try 3: LookupError" in text
    assert record.exc_info is not None
    assert LookupError is record.exc_info[0]
    assert "raise error or LookupError" in caplog.text  # fmt: skip
    assert SECRET not in caplog.text
    assert 2 == sum("is tried again in" in one.getMessage() for one in caplog.records)


@virtual
async def test_an_answer_given_before_the_failure_stands() -> None:
    """A handler that has answered by ``produce`` and fails gives no second answer."""
    shop = Shop(retry=ONCE)

    async with serves(shop) as broker:

        @shop.router.bind_event("answers")
        async def answers(event: EventObject) -> None:
            event.event, event.data = "respond", "first"
            broker.produce("Bank", event)
            raise LookupError

        assert "first" == (await broker.request("Bank", "answers", timeout=5)).data
        assert ["first"] == shop.replies
    assert [b"Bank:0:0"] == shop.dead


# Deadlines


@virtual
async def test_a_try_past_the_deadline_is_not_waited_for() -> None:
    """The requester gets the error before its timeout, as soon as no further try fits in."""
    shop = Shop()
    shop.fails(9)
    async with serves(shop) as broker:
        began = now()
        with pytest.raises(RemoteError, match="LookupError"):
            await broker.request("Bank", "fails", timeout=0.25)
        assert about(0.1) == [now() - began]
    assert 2 == len(shop.tries)


@virtual
async def test_a_deadline_that_passes_while_a_try_waits_for_a_seat() -> None:
    """Nobody waits any more when the seat is free, so the handler is not tried again."""
    shop = Shop(concurrency=1)
    shop.fails(9)

    @shop.router.bind_event("busy")
    async def busy() -> None:
        await asyncio.sleep(10)

    async with serves(shop) as broker:
        request = asyncio.create_task(broker.request("Bank", "fails", "it", timeout=2))
        await until(lambda: len(shop.tries) == 1)
        shop.put(event="busy")
        with pytest.raises(ReplyTimeoutError):
            await request
        await until(lambda: shop.committed == 2)
    assert [("it", 1)] == shop.tries


@virtual
async def test_an_event_without_a_deadline_has_all_its_tries() -> None:
    """One that nobody sets a limit for is tried however long its pauses are."""
    shop = Shop(retry=RetryPolicy(base=60, cap=60, jitter=0))
    shop.fails(2)
    async with serves(shop):
        shop.put("it", event="fails")
        await asyncio.sleep(121)
        assert 1 == shop.committed
    assert about(0, 60, 120) == [time - shop.times[0] for time in shop.times]


# Time limits


@virtual
async def test_a_handler_that_never_returns_is_cancelled() -> None:
    """When its time is over it sees a CancelledError, is tried again, and the requester is told."""
    shop, cancelled = Shop(), list[float]()

    @shop.router.bind_event("hangs", timeout=1)
    async def hangs(event: EventObject) -> None:
        shop.note_try(event)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(now())
            raise

    async with serves(shop) as broker:
        began = now()
        with pytest.raises(RemoteError, match="did not end within 1 s") as caught:
            await broker.request("Bank", "hangs", timeout=60)
    assert about(0, 1.1, 2.3) == [time - began for time in shop.times]
    assert about(1, 2.1, 3.3) == [time - began for time in cancelled]
    assert (504, "handler-timeout") == (caught.value.status, caught.value.code)
    assert [1] == shop.metrics.of("events_failed")


@virtual
@pytest.mark.parametrize(("limit", "seconds"), [(None, 2), (1, 1), (3, 3)])
async def test_the_limit_of_the_settings(limit: float | None, seconds: float) -> None:
    """It holds where a bind has none of its own, shorter or longer."""
    shop = Shop(retry=ONCE, handler_timeout=2)

    @shop.router.bind_event("hangs", timeout=limit)
    async def hangs() -> None:
        await asyncio.Event().wait()

    async with serves(shop) as broker:
        began = now()
        with pytest.raises(RemoteError, match="did not end"):
            await broker.request("Bank", "hangs", timeout=60)
        assert about(seconds) == [now() - began]


@virtual
@pytest.mark.parametrize(
    ("policy", "tries"),
    [
        (RetryPolicy(on=(TimeoutError,)), 3),
        (RetryPolicy(on=(LookupError,)), 1),
        (RetryPolicy(never=(TimeoutError,)), 1),
    ],
)
async def test_a_timeout_is_a_timeout_error(policy: RetryPolicy, tries: int) -> None:
    """Policies know it by that class, and the dead letter tells it."""
    shop = Shop(retry=policy)

    @shop.router.bind_event("hangs", timeout=1)
    async def hangs(event: EventObject) -> None:
        shop.note_try(event)
        await asyncio.Event().wait()

    async with serves(shop):
        shop.put(event="hangs")
        await until(lambda: shop.committed == 1)
    assert tries == len(shop.tries)
    [letter] = shop.letters
    assert b"HandlerTimeoutError" == dict(letter.headers)[wire.FAILURE]


@virtual
async def test_each_try_has_the_whole_time() -> None:
    """The limit is for one try: three that each end within it may take longer together."""
    shop = Shop()

    @shop.router.bind_event("slow", timeout=1)
    async def slow(event: EventObject) -> int:
        await asyncio.sleep(0.9)
        if event.attempt < 3:
            raise LookupError
        return event.attempt

    async with serves(shop) as broker:
        assert 3 == (await broker.request("Bank", "slow", timeout=5)).data


@virtual
async def test_limits_of_several_handlers_at_a_time() -> None:
    """Each is cancelled at its own time, whichever began first."""
    shop, cancelled = Shop(retry=ONCE), list[tuple[float, float]]()

    def bind(seconds: float) -> None:
        @shop.router.bind_event(f"hangs.{seconds:g}", timeout=seconds)
        async def hangs() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append((seconds, now()))
                raise

    limits = [5, 1, 3, 2, 4]
    for limit in limits:
        bind(limit)
    async with serves(shop):
        began = now()
        for limit in limits:
            shop.put(event=f"hangs.{limit}")
        await until(lambda: shop.committed == 5)
    assert [1, 2, 3, 4, 5] == [limit for limit, _ in cancelled]
    assert about(1, 2, 3, 4, 5) == [time - began for _, time in cancelled]


@virtual
async def test_a_handler_that_swallows_its_cancellation_and_returns() -> None:
    """It has returned, if late: that is the reply, and there is no further try."""
    shop = Shop()

    @shop.router.bind_event("stubborn", timeout=1)
    async def stubborn(event: EventObject) -> str:
        shop.note_try(event)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(3)
        return "late"

    async with serves(shop) as broker:
        began = now()
        assert "late" == (await broker.request("Bank", "stubborn", timeout=60)).data
        assert about(4) == [now() - began]
    assert 1 == len(shop.tries)
    assert [0] == shop.metrics.of("events_failed")


@virtual
async def test_a_handler_that_turns_its_cancellation_into_an_error() -> None:
    """What it raises is its failure, and is tried again as such."""
    shop = Shop()

    @shop.router.bind_event("turns", timeout=1)
    async def turns_it(event: EventObject) -> None:
        shop.note_try(event)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise LookupError from None

    async with serves(shop) as broker:
        with pytest.raises(RemoteError, match="LookupError in the handler"):
            await broker.request("Bank", "turns", timeout=60)
    assert 3 == len(shop.tries)


@virtual
async def test_a_handler_that_ignores_its_cancellation(caplog: pytest.LogCaptureFixture) -> None:
    """The log says that it goes on; other keys are handled, and its event ends when it does."""
    shop = Shop(retry=ONCE, handler_timeout=2)
    release = asyncio.Event()

    @shop.router.bind_event("ignores")
    async def ignores() -> str:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return "at last"

    async with serves(shop) as broker:
        request = asyncio.create_task(broker.request("Bank", "ignores", timeout=60))
        await asyncio.sleep(3)
        assert "goes on after it was cancelled" not in caplog.text
        await asyncio.sleep(2)
        shop.put("other key", key=b"other")
        await until(lambda: shop.handled == ["other key"])
        assert "the handler of Bank:0:0 goes on after it was cancelled" in caplog.text
        assert 0 == shop.committed
        release.set()
        assert "at last" == (await request).data


def _settle(future: asyncio.Future[str]) -> None:
    if not future.done():
        future.set_result("done")


@virtual
@pytest.mark.parametrize("catches", [True, False])
async def test_a_handler_that_ends_in_the_turn_of_its_timeout(*, catches: bool) -> None:
    """The timeout was first; the event has its one outcome and the next is handled as ever."""
    shop = Shop(retry=ONCE)

    @shop.router.bind_event("close", timeout=1)
    async def close(event: EventObject) -> str:
        shop.note_try(event)
        work, loop = work_of(event), asyncio.get_running_loop()
        assert work is not None
        done: asyncio.Future[str] = loop.create_future()
        loop.call_at(work.expires, _settle, done)
        try:
            return await done
        except asyncio.CancelledError:
            if not catches:
                raise
            return "caught"

    async with serves(shop) as broker:
        for _ in range(3):
            if catches:
                assert "caught" == (await broker.request("Bank", "close", timeout=60)).data
            else:
                with pytest.raises(RemoteError, match="did not end within 1 s"):
                    await broker.request("Bank", "close", timeout=60)
            assert "next" == (await broker.request("Bank", "note", "next", timeout=5)).data
    assert 3 == len(shop.tries)


@virtual
@pytest.mark.parametrize("ends", ["returns", "raises"])
async def test_a_cancellation_that_comes_as_a_handler_ends(ends: str) -> None:
    """A sweep between its last step and our next one takes nothing from the event behind it."""
    shop = Shop(retry=ONCE)

    @shop.router.bind_event("close", timeout=1)
    async def close(event: EventObject) -> str:
        work = work_of(event)
        assert work is not None
        work.expires = now() - 1
        work.dispatcher._sweep()  # our own task: the cancellation waits for the next await
        if ends == "raises":
            raise LookupError
        return "done"

    async with serves(shop) as broker:
        if ends == "raises":
            with pytest.raises(RemoteError, match="LookupError"):
                await broker.request("Bank", "close", timeout=5)
        else:
            assert "done" == (await broker.request("Bank", "close", timeout=5)).data
        assert "next" == (await broker.request("Bank", "note", "next", timeout=5)).data


def _limiter(broker: BrokerManager) -> CapacityLimiter:
    assert broker._run is not None
    handling: Any = broker._run._dispatchers["events"]._handle
    limiter: CapacityLimiter = handling._scope.limiter
    return limiter


def _blocking(shop: Shop) -> threading.Event:
    """Bind a plain function that blocks its thread until it is released."""
    release = threading.Event()

    @shop.router.bind_event("blocks", timeout=0.3)
    def blocks() -> str:
        assert release.wait(10)
        return "too late"

    return release


async def test_a_plain_function_that_blocks_its_thread() -> None:
    """Its event ends in time and other keys go on; the thread counts until it really ends."""
    shop = Shop(retry=ONCE, concurrency=2)
    release = _blocking(shop)
    try:
        async with serves(shop) as broker:
            with pytest.raises(RemoteError) as caught:
                await broker.request("Bank", "blocks", timeout=5)
            assert (504, "handler-timeout") == (caught.value.status, caught.value.code)
            assert "next" == (await broker.request("Bank", "note", "next", timeout=5)).data
            await until(lambda: shop.committed == 2)
            assert 1 == _limiter(broker).borrowed_tokens
            release.set()
            await until(lambda: _limiter(broker).borrowed_tokens == 0)
    finally:
        release.set()
    assert [0] == shop.metrics.of("events_dead_lettered")


async def test_a_plain_function_waits_for_a_thread() -> None:
    """While one is blocked and there is no other, plain functions wait and async ones do not."""
    shop = Shop(retry=ONCE, concurrency=1)
    release = _blocking(shop)
    shop.router.bind_event("plain", timeout=5)(lambda: "done")
    try:
        async with serves(shop) as broker:
            with pytest.raises(RemoteError):
                await broker.request("Bank", "blocks", timeout=5)
            waiting = asyncio.create_task(broker.request("Bank", "plain", timeout=10))
            await until(lambda: _limiter(broker).statistics().tasks_waiting == 1)
            assert not waiting.done()
            release.set()
            assert "done" == (await waiting).data
    finally:
        release.set()


# Stops and rebalances


@virtual
async def test_a_stop_does_not_wait_for_the_pause_between_tries() -> None:
    """Neither answered nor committed, the event is the next replica's, before those behind it."""
    shop = Shop(retry=RetryPolicy(base=60, cap=60, jitter=0))
    shop.fails(1)
    async with shop.broker():
        shop.put("it", event="fails", reply_to="Bank.dlq", key=b"a")
        shop.put("behind", key=b"a")
        await until(lambda: len(shop.tries) == 1)
        began = now()
    assert now() - began < 1
    assert (0, []) == (shop.committed, shop.letters)
    async with shop.broker():
        await until(lambda: len(shop.tries) == 2)
        await asyncio.sleep(61)
    assert [("it", 1), ("it", 1), ("it", 2)] == shop.tries
    assert ["it", "behind"] == shop.handled
    assert (2, 1) == (shop.committed, len(shop.letters))


@virtual
async def test_a_stop_during_a_long_pause_repeats_no_other_event() -> None:
    """What has ended behind the event is committed; it goes through the retry topic instead."""
    shop = Shop(retry=RetryPolicy(base=60, cap=60, jitter=0))
    shop.fails(1)
    async with shop.broker():
        shop.put("it", event="fails", reply_to="Bank.dlq", key=b"a")
        shop.put("other", key=b"b")
        await until(lambda: shop.handled == ["other"])
        began = now()
    assert now() - began < 1
    async with shop.broker():
        await asyncio.sleep(130)
    assert [("it", 1), ("it", 2)] == shop.tries
    assert ["other", "it"] == shop.handled
    assert 1 == len(shop.letters)


@virtual
async def test_a_stop_waits_for_a_short_pause_that_others_have_overtaken() -> None:
    """If the next try comes within the deadline of the stop, the order of the key is kept."""
    shop = Shop(retry=RetryPolicy(base=3, cap=3, jitter=0))
    shop.fails(1)
    async with shop.broker():
        shop.put("it", event="fails", key=b"a")
        shop.put("behind", key=b"a")
        shop.put("other", key=b"b")
        await until(lambda: shop.handled == ["other"])
    assert ["other", "it", "behind"] == shop.handled
    assert 3 == shop.committed


@virtual
async def test_nobody_is_told_of_an_event_that_was_given_up() -> None:
    """An event that a stop leaves to the next replica has not ended, so it counts nowhere."""
    shop = Shop(retry=RetryPolicy(base=60, cap=60, jitter=0))
    shop.fails(1)
    async with shop.broker():
        shop.put(event="fails")
        await until(lambda: len(shop.tries) == 1)
    assert [] == shop.metrics.told
    assert [0, 0] == shop.metrics.of("events_handled", "events_failed")


@virtual
async def test_a_try_that_fails_during_a_stop_is_not_followed_by_another() -> None:
    """The stop waits for the try that runs, not for the pause after it."""
    shop = Shop(retry=RetryPolicy(base=60, cap=60, jitter=0))

    @shop.router.bind_event("slow")
    async def slow(event: EventObject) -> None:
        shop.note_try(event)
        await asyncio.sleep(2)
        raise LookupError

    before = asyncio.all_tasks()
    broker = shop.broker()
    await broker.init_consumer()
    shop.put(event="slow")
    await until(lambda: len(shop.tries) == 1)
    began = now()
    await broker.stop()
    assert about(2) == [now() - began]
    assert before == asyncio.all_tasks()
    assert (0, []) == (shop.committed, shop.dead)


@virtual
@pytest.mark.parametrize("ends", ["returns", "raises", "passes"])
async def test_a_handler_cut_off_by_a_stop_is_not_answered(ends: str) -> None:
    """However it ends after its cancellation: no reply, no dead letter, no further try."""
    shop = Shop(drain_timeout=1)

    @shop.router.bind_event("cut")
    async def cut(event: EventObject) -> str:
        shop.note_try(event)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if ends == "passes":
                raise
            if ends == "raises":
                raise LookupError from None
        return "done"

    before = asyncio.all_tasks()
    broker = shop.broker()
    await broker.init_consumer()
    shop.put(event="cut", reply_to="Bank.replies")
    shop.put(event="cut")
    await until(lambda: len(shop.tries) == 2)
    await broker.stop()
    await turns(3)
    assert before == asyncio.all_tasks()
    assert (0, [], []) == (shop.committed, shop.replies, shop.dead)
    assert 2 == len(shop.tries)


@virtual
async def test_a_stop_leaves_nothing_behind() -> None:
    """No task of ours is left and every seat is free, whatever the handlers were doing."""
    shop = Shop(drain_timeout=1, handler_timeout=5, retry=RetryPolicy(base=60, cap=60))
    shop.fails(9)

    @shop.router.bind_event("hangs")
    async def hangs() -> None:
        await asyncio.Event().wait()

    @shop.router.bind_event("swallows")
    async def swallows() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done"
        return "never"

    before = asyncio.all_tasks()
    broker = shop.broker()
    await broker.init_consumer()
    for event in ["fails", "hangs", "swallows", "note"] * 3:
        shop.put(event=event, key=event.encode())
        shop.put(event=event)
    await until(lambda: len(shop.handled) == 6)
    await broker.stop()
    await turns(3)
    assert before == asyncio.all_tasks()
    assert broker._run is not None
    for dispatcher in broker._run._dispatchers.values():
        assert (set(), 0) == (dispatcher._lanes.working, dispatcher._lanes._seated)
        assert set() == dispatcher._workers
        assert dispatcher._sweeper is None or dispatcher._sweeper.cancelled()


@virtual
async def test_a_rebalance_does_not_wait_for_the_pause_between_tries() -> None:
    """The event is handled again after it, before those behind it, and nothing is lost."""
    shop = Shop(retry=RetryPolicy(base=60, cap=60, jitter=0))
    shop.fails(1)
    async with shop.broker():
        shop.put("it", event="fails", key=b"a")
        shop.put("behind", key=b"a")
        await until(lambda: len(shop.tries) == 1)
        shop.cluster.rebalance("Bank")
        began = now()
        await until(lambda: len(shop.tries) == 2)
        assert now() - began < 5
        await asyncio.sleep(61)
        assert ["it", "behind"] == shop.handled
        assert 2 == shop.committed


@virtual
@pytest.mark.parametrize("stop", [True, False])
async def test_seats_are_free_after_a_rebalance(*, stop: bool) -> None:
    """Events that rested or waited for a seat when their partition moved hold none afterwards."""
    shop = Shop(concurrency=1, retry=RetryPolicy(base=1, cap=1, jitter=0))
    shop.fails(9)

    @shop.router.bind_event("work")
    async def work() -> None:
        await asyncio.sleep(3)

    async with serves(shop) as broker:
        shop.put(event="fails")
        shop.put(event="fails")
        shop.put(event="work")
        await asyncio.sleep(2)  # both wait for the seat of the third
        if stop:
            await broker.stop()
            await broker.init_consumer()
        else:
            shop.cluster.rebalance("Bank")
        await until(lambda: shop.committed == 3)
        assert broker._run is not None
        assert 0 == broker._run._dispatchers["events"]._lanes._seated
        if stop:
            await broker.stop()
            await broker._enter()


# What is left of failures

SHARED = Reject(404)


@pytest.mark.parametrize(
    "fail",
    [LookupError, lambda: Reject(404), lambda: SHARED],
    ids=["error", "new", "shared"],
)
@pytest.mark.parametrize("returned", [False, True])
@virtual
async def test_a_failed_event_is_forgotten_at_once(
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[], Exception],
    returned: bool,  # noqa: FBT001  # a case
) -> None:
    """No cycle keeps its payload until the garbage collector comes, however it was refused."""
    shop = Shop(retry=ONCE)
    events: list[weakref.ref[EventObject]] = []

    @shop.router.bind_event("refuses")
    async def refuses(event: EventObject) -> Any:
        events.append(weakref.ref(event))
        if returned and fail is not LookupError:
            return fail()
        raise fail()

    caplog.set_level(logging.CRITICAL, "kafka_broker.handling")  # pytest keeps tracebacks
    gc.collect()
    gc.disable()
    try:
        async with serves(shop):
            for _ in range(5):
                shop.put(event="refuses")
            await until(lambda: shop.committed == 5)
        assert 5 == len(events)
        assert not any(event() for event in events)
    finally:
        gc.enable()


@virtual
async def test_an_event_that_is_cancelled_from_outside_twice_is_handled_again() -> None:
    """Also when the second time comes while it waits for a seat; nothing is held up by it."""
    shop, tasks, go = Shop(concurrency=1), list[asyncio.Task[Any]](), asyncio.Event()

    @shop.router.bind_event("later")
    async def later(event: EventObject) -> None:
        work = work_of(event)
        assert work is not None
        assert work.task is not None
        tasks.append(work.task)
        if len(tasks) == 1:
            raise RetryLater(0.1)

    @shop.router.bind_event("holds")
    async def holds() -> None:
        await go.wait()

    async with serves(shop):
        shop.put(event="later", key=b"a")
        shop.put(event="holds", key=b"b")
        await asyncio.sleep(1)
        for _ in range(2):
            tasks[0].cancel()
            await asyncio.sleep(1)
        go.set()
        await until(lambda: shop.committed == 2)
        assert 2 == len(tasks)
