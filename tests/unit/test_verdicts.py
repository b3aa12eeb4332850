"""What a handler may say instead of a reply, and when a failed try is followed by another."""

from __future__ import annotations

import asyncio
import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kafka_broker import BrokerSettings, EventObject, Reject, RetryLater, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker._settings import load_settings
from kafka_broker._verdicts import HandlerCancelledError, HandlerTimeoutError
from kafka_broker.errors import (
    ConfigurationError,
    DeliveryError,
    EventDecodeError,
    NoHandlerError,
    RemoteError,
)

from .test_dispatch import serves
from .test_failures import EXACT, ONCE, Shop, about, now, until

if TYPE_CHECKING:
    from kafka_broker import BrokerManager
    from kafka_broker._metrics import Counted
    from kafka_broker._transport.memory_log import MemoryRecord

virtual = pytest.mark.looptime

ERROR = LookupError()
FAR = 3600.0


# RetryPolicy


def _delays(policy: RetryPolicy, error: Exception = ERROR) -> list[float | None]:
    return [policy.delay(failures, error) for failures in range(1, 7)]


def test_the_pauses_double_up_to_the_cap() -> None:
    """Without jitter they are exact; after the last try there is none."""
    policy = RetryPolicy(attempts=6, base=0.5, cap=3, jitter=0)
    assert [0.5, 1, 2, 3, 3, None] == _delays(policy)


def test_the_defaults() -> None:
    """Three tries, a tenth and two tenths of a second between them, halved at the most."""
    policy = RetryPolicy()
    first, second, *rest = _delays(policy)
    assert first is not None
    assert second is not None
    assert 0.05 <= first <= 0.1
    assert 0.1 <= second <= 0.2
    assert [None] * 4 == rest


def test_one_attempt_is_no_retry() -> None:
    """Then no failure is followed by another try."""
    assert [None] * 6 == _delays(RetryPolicy(attempts=1))


SECONDS = st.floats(0, 1e300, exclude_min=True, allow_subnormal=False)


@given(
    ends=st.tuples(SECONDS, SECONDS),
    jitter=st.floats(0, 1),
    failures=st.one_of(st.integers(1, 100), st.integers(1, 10**30)),
)
def test_a_pause_has_bounds(ends: tuple[float, float], jitter: float, failures: int) -> None:
    """It is never above the cap and never below the base but for the jitter, after any count."""
    base, cap = sorted(ends)
    policy = RetryPolicy(attempts=10**31, base=base, cap=cap, jitter=jitter)
    pause = policy.delay(failures, ERROR)
    assert pause is not None
    assert base * (1 - jitter) <= pause <= cap


@given(jitter=st.floats(0, 1), failures=st.integers(1, 20))
def test_jitter_shortens_the_exact_pause(jitter: float, failures: int) -> None:
    """A pause is between the exact one and what the share of it leaves."""
    exact = RetryPolicy(attempts=99, jitter=0).delay(failures, ERROR)
    pause = RetryPolicy(attempts=99, jitter=jitter).delay(failures, ERROR)
    assert exact is not None
    assert pause is not None
    assert exact * (1 - jitter) <= pause <= exact


def test_jitter_varies() -> None:
    """Replicas with one policy do not try in step."""
    policy = RetryPolicy()
    assert 1 < len({policy.delay(1, ERROR) for _ in range(20)})


@pytest.mark.parametrize(
    ("policy", "error", "again"),
    [
        (RetryPolicy(), OSError(), True),
        (RetryPolicy(on=(OSError,)), OSError(), True),
        (RetryPolicy(on=(OSError,)), ConnectionResetError(), True),
        (RetryPolicy(on=(OSError,)), ValueError(), False),
        (RetryPolicy(on=()), ValueError(), False),
        (RetryPolicy(never=(OSError,)), ConnectionResetError(), False),
        (RetryPolicy(never=(OSError,)), ValueError(), True),
        (RetryPolicy(on=(OSError,), never=(ConnectionError,)), ConnectionResetError(), False),
        (RetryPolicy(on=(OSError,), never=(ConnectionError,)), FileNotFoundError(), True),
        (RetryPolicy(on=(TimeoutError,)), HandlerTimeoutError(), True),
        (RetryPolicy(), HandlerCancelledError(), True),
    ],
)
def test_which_exceptions_are_tried_again(
    policy: RetryPolicy, error: Exception, *, again: bool
) -> None:
    """Those of ``on`` and their subclasses, without those of ``never``."""
    assert again is (policy.delay(1, error) is not None)


@pytest.mark.parametrize(
    "error", [Reject(), EventDecodeError(), NoHandlerError("event", "id")], ids=repr
)
@pytest.mark.parametrize("on", [(Exception,), (Reject, EventDecodeError, NoHandlerError)])
def test_some_are_never_tried_again(error: Exception, on: tuple[type[Exception], ...]) -> None:
    """A refusal, data of another shape and a missing handler stay so, whatever the policy says."""
    assert None is RetryPolicy(on=on).delay(1, error)


@pytest.mark.parametrize(
    "values",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 1.5},
        {"base": 0},
        {"base": -0.1},
        {"base": math.nan},
        {"base": math.inf},
        {"cap": 0},
        {"cap": math.nan},
        {"cap": math.inf},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": math.nan},
        {"on": ("LookupError",)},
        {"on": (BaseException,)},
        {"never": (int,)},
        {"tries": 3},
    ],
    ids=str,
)
def test_what_a_policy_refuses(values: dict[str, Any]) -> None:
    """Numbers out of range, what is no class of exceptions, and names it does not know."""
    with pytest.raises(ValidationError):
        RetryPolicy(**values)


def test_a_policy_does_not_change() -> None:
    """It may be shared among binds."""
    with pytest.raises(ValidationError):
        RetryPolicy().attempts = 5


def test_a_policy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``KAFKA_BROKER_RETRY`` is a JSON object with its numbers; the others keep their defaults."""
    monkeypatch.setenv("KAFKA_BROKER_RETRY", '{"attempts": 7, "base": 0.5, "cap": 60}')
    assert RetryPolicy(attempts=7, base=0.5, cap=60) == BrokerSettings(module="Bank").retry
    assert EXACT == BrokerSettings(module="Bank", retry=EXACT).retry


@pytest.mark.parametrize(
    "value",
    ["", "7", "no json", "[]", '{"attempts": 0}', '{"tries": 1}', '{"on": ["LookupError"]}'],
)
def test_an_environment_without_a_policy(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is none is a ConfigurationError that names the setting and does not quote the value."""
    monkeypatch.setenv("KAFKA_BROKER_RETRY", value)
    with pytest.raises(ConfigurationError, match="retry") as caught:
        load_settings("Bank", {})
    assert "LookupError" not in str(caught.value)


# Verdicts by themselves


@pytest.mark.parametrize("status", [0, 200, 399, 600, -404, "404", None, 404.5, math.nan])
def test_a_reject_needs_the_status_of_an_error(status: Any) -> None:
    """Anything but 400 to 599 is a ConfigurationError at once."""
    with pytest.raises(ConfigurationError, match="400 to 599"):
        Reject(status)


def test_what_a_reject_says() -> None:
    """It has three fields, and its text has them all."""
    reject = Reject(HTTPStatus.NOT_FOUND, "no such order", code="no-order")
    assert (404, "no such order", "no-order") == (reject.status, reject.detail, reject.code)
    assert "404 no-order: no such order" == str(reject)
    default = Reject()
    assert (422, "the event was refused", "rejected") == (
        default.status,
        default.detail,
        default.code,
    )
    assert [400, 599] == [Reject(status).status for status in (400, 599)]


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, -math.inf, 7 * 24 * 3600 + 1])
def test_a_retry_later_needs_seconds(seconds: float) -> None:
    """Those out of range are a ConfigurationError at once."""
    with pytest.raises(ConfigurationError, match="more than 0"):
        RetryLater(seconds)


def test_what_a_retry_later_says() -> None:
    """It has its seconds, up to seven days, and its reason."""
    later = RetryLater(7 * 24 * 3600, "the bank is closed")
    assert (604800, "the bank is closed") == (later.seconds, later.reason)
    assert "the bank is closed" == str(later)


# Reject


def _refuses(shop: Shop, verdict: Exception, ends: str) -> None:
    @shop.router.bind_event("refuses")
    async def refuses(event: EventObject) -> Exception:
        shop.note_try(event)
        if ends == "raises":
            raise verdict
        return verdict


@virtual
@pytest.mark.parametrize("ends", ["raises", "returns"])
async def test_a_reject_reaches_the_requester(ends: str) -> None:
    """At once, with its status, code and detail; it is not tried again and leaves no letter."""
    shop = Shop()
    _refuses(shop, Reject(404, "no such order", code="no-order"), ends)
    async with serves(shop) as broker:
        began = now()
        with pytest.raises(RemoteError) as caught:
            await broker.request("Bank", "refuses", timeout=5)
        assert about(0) == [now() - began]
    error = caught.value
    assert (404, "no-order", "no such order") == (error.status, error.code, error.detail)
    assert (1, []) == (len(shop.tries), shop.dead)


@virtual
@pytest.mark.parametrize("ends", ["raises", "returns"])
async def test_a_reject_that_nobody_waits_for_is_a_dead_letter(ends: str) -> None:
    """After one try, with the name of the verdict."""
    shop = Shop()
    _refuses(shop, Reject(404), ends)
    async with serves(shop):
        shop.put("it", event="refuses", key=b"k")
        await until(lambda: shop.committed == 1)
    [letter] = shop.letters
    ours = [
        (wire.ORIGIN, b"Bank:0:0"),
        (wire.GROUP, b"Bank"),
        (wire.ATTEMPT, b"1"),
        (wire.FAILURE, b"Reject"),
    ]
    assert ours == list(letter.headers)
    assert [("it", 1)] == shop.tries


@virtual
async def test_what_a_reject_counts(caplog: pytest.LogCaptureFixture) -> None:
    """It is a rejected event, neither a failed nor a handled one, and a line at INFO."""
    caplog.set_level("INFO", "kafka_broker.handling")
    shop = Shop()
    _refuses(shop, Reject(404, "no such order"), "raises")
    async with shop.broker():
        shop.put(event="refuses")
        await until(lambda: shop.committed == 1)
    names: tuple[Counted, ...] = ("events_rejected", "events_failed", "events_handled")
    assert [1, 0, 0] == shop.metrics.of(*names)
    assert [("Bank:0:0", "refuses", Reject)] == shop.metrics.told
    assert [("INFO", None)] == [(one.levelname, one.exc_info) for one in caplog.records]
    assert "was refused in try 1: 404 rejected: no such order" in caplog.text


@virtual
async def test_a_bad_status_in_a_handler_is_its_failure() -> None:
    """The requester is told of a failed handler, not of a status that is none."""
    shop = Shop()

    @shop.router.bind_event("refuses")
    async def refuses() -> None:
        raise Reject(200)

    async with serves(shop) as broker:
        with pytest.raises(RemoteError, match="ConfigurationError in the handler") as caught:
            await broker.request("Bank", "refuses", timeout=5)
    assert 500 == caught.value.status


async def test_a_reject_from_a_plain_function() -> None:
    """It may be returned by one that runs in a thread, too."""
    shop = Shop()
    shop.router.bind_event("plain")(lambda: Reject(409))
    async with serves(shop) as broker:
        with pytest.raises(RemoteError) as caught:
            await broker.request("Bank", "plain", timeout=5)
    assert 409 == caught.value.status


# RetryLater in place


def _asks(shop: Shop, seconds: float, *, count: int = 1, ends: str = "raises") -> None:
    """Bind a handler that asks for another try *count* times."""

    @shop.router.bind_event("later")
    async def later(event: EventObject) -> object:
        shop.note_try(event)
        verdict = RetryLater(seconds, "not yet")
        if event.attempt > count:
            shop.handled.append(event.data)
            return "done"
        if ends == "raises":
            raise verdict
        return verdict


@virtual
@pytest.mark.parametrize("ends", ["raises", "returns"])
async def test_up_to_five_seconds_are_waited_for_in_place(ends: str) -> None:
    """Later events of the key wait behind it, others go on, and the retry topic stays empty."""
    shop = Shop()
    _asks(shop, 5, ends=ends)
    async with serves(shop):
        shop.put("it", event="later", key=b"a")
        shop.put("behind", key=b"a")
        shop.put("other", key=b"b")
        await until(lambda: shop.committed == 3)
    assert ["other", "it", "behind"] == shop.handled[:3]
    assert [("it", 1), ("it", 2)] == shop.tries
    assert about(0, 5) == [time - shop.times[0] for time in shop.times]
    assert [] == shop.cluster.records("Bank.retry")


@virtual
async def test_asking_for_another_try_is_no_failure() -> None:
    """It may be done more often than the policy has tries, and counts as a retry only."""
    shop = Shop(retry=ONCE)
    _asks(shop, 1, count=5)
    async with serves(shop) as broker:
        assert "done" == (await broker.request("Bank", "later", timeout=60)).data
    names: tuple[Counted, ...] = ("events_retried", "events_failed", "events_postponed")
    assert [5, 0, 0] == shop.metrics.of(*names)
    assert [1, 2, 3, 4, 5, 6] == [attempt for _, attempt in shop.tries]


@virtual
async def test_only_failures_count_for_the_policy() -> None:
    """Among tries that ask for another, those that fail are three at the most."""
    shop = Shop()

    @shop.router.bind_event("both")
    async def both(event: EventObject) -> None:
        shop.note_try(event)
        if event.attempt % 2:
            raise RetryLater(1)
        raise LookupError

    async with serves(shop):
        shop.put(event="both")
        await until(lambda: shop.committed == 1)
    assert about(0, 1, 1.1, 2.1, 2.3, 3.3) == [time - shop.times[0] for time in shop.times]
    [letter] = shop.letters
    assert b"6" == dict(letter.headers)[wire.ATTEMPT]


# RetryLater through the retry topic


def _waiting(shop: Shop) -> list[MemoryRecord]:
    return shop.cluster.records("Bank.retry")


def _clock(broker: BrokerManager) -> float:
    assert broker._run is not None
    return broker._run.transport.now()


async def _pass(seconds: float) -> None:
    """Let virtual time pass."""
    await asyncio.sleep(seconds)


@virtual
async def test_longer_waits_are_in_the_retry_topic() -> None:
    """The record waits there as it came, with origin, next attempt and the time it is due."""
    shop = Shop()
    _asks(shop, 6)
    headers = [("x", b"\xff"), ("x", b"")]
    async with shop.broker() as broker:
        shop.put("it", event="later", key=b"k", headers=headers)
        await until(lambda: shop.committed == 1)
        due = _clock(broker) - (now() - shop.times[0]) + 6
    [came, *_] = shop.cluster.records("Bank")
    [waits] = _waiting(shop)
    assert (came.key, came.value) == (waits.key, waits.value)
    assert [
        *headers,
        (wire.ORIGIN, b"Bank:0:0"),
        (wire.GROUP, b"Bank"),
        (wire.ATTEMPT, b"2"),
    ] == list(waits.headers)[:-1]
    name, value = waits.headers[-1]
    assert wire.DUE == name
    assert due == pytest.approx(int(value or b"") / 1000, abs=0.1)


@virtual
@pytest.mark.parametrize("key", [None, b"a", b"b", b"c"])
@pytest.mark.parametrize("partition", [0, 2])
async def test_it_comes_back_to_its_own_partition(key: bytes | None, partition: int) -> None:
    """Not earlier than due, as the next attempt, and with the key, value and headers it had."""
    shop = Shop(module_partitions=3)
    _asks(shop, 6)
    value = b'{"correlation_id":"7", "event":"later", "data":"it"}'
    headers = [("x", b"\xff"), ("x", None)]
    async with shop.broker():
        shop.cluster.append("Bank", partition=partition, key=key, value=value, headers=headers)
        await until(lambda: len(shop.tries) == 2)
        await _pass(1)
    assert [("it", 1), ("it", 2)] == shop.tries
    first, second = shop.times
    assert 6 <= second - first < 6.5
    came, back = shop.cluster.records("Bank")
    assert (came.partition, key, value) == (back.partition, back.key, back.value)
    origin = (wire.ORIGIN, b"Bank:%d:0" % partition)
    assert [*headers, origin, (wire.GROUP, b"Bank"), (wire.ATTEMPT, b"2")] == list(back.headers)
    assert {partition: 2} == shop.cluster.committed("Bank", "Bank")


@virtual
async def test_a_request_gets_its_reply_after_the_wait() -> None:
    """Its address travels along: the one reply is that of the try that returns."""
    shop = Shop()
    _asks(shop, 6, count=2)
    async with serves(shop) as broker:
        began = now()
        assert "done" == (await broker.request("Bank", "later", timeout=60)).data
        assert 12 <= now() - began < 13
        assert ["done"] == shop.replies


@virtual
async def test_a_request_gets_the_failure_after_the_wait() -> None:
    """A try that fails after the wait is an error reply like any other, and no dead letter."""
    shop = Shop(retry=ONCE)

    @shop.router.bind_event("later")
    async def later(event: EventObject) -> None:
        raise RetryLater(6) if event.attempt == 1 else LookupError

    async with serves(shop) as broker:
        with pytest.raises(RemoteError, match="LookupError in the handler"):
            await broker.request("Bank", "later", timeout=60)
        assert 1 == len(shop.replies)
    assert [] == shop.dead


@virtual
@pytest.mark.parametrize(("seconds", "timeout"), [(3, 2), (6, 5), (FAR, 30)])
async def test_a_wait_past_the_deadline_is_an_answer_at_once(
    seconds: float, timeout: float
) -> None:
    """The requester gets 503 ``retry-later``, and nothing is kept for a later try."""
    shop = Shop()
    _asks(shop, seconds)
    async with serves(shop) as broker:
        began = now()
        with pytest.raises(RemoteError) as caught:
            await broker.request("Bank", "later", timeout=timeout)
        assert about(0) == [now() - began]
    assert (503, "retry-later") == (caught.value.status, caught.value.code)
    assert f"possible in {seconds:g} s" in caught.value.detail
    assert ([], []) == (shop.dead, _waiting(shop))
    assert [1, 0] == shop.metrics.of("events_failed", "events_postponed")


@virtual
async def test_what_a_postponed_event_counts(caplog: pytest.LogCaptureFixture) -> None:
    """It is postponed, not failed; each of its ways through the handler is told by its place."""
    caplog.set_level("WARNING", "kafka_broker")
    shop = Shop()
    _asks(shop, 6)
    async with shop.broker():
        shop.put(event="later")
        await until(lambda: shop.committed == 2)
    names: tuple[Counted, ...] = ("events_postponed", "events_failed", "events_dead_lettered")
    assert [1, 0, 0] == shop.metrics.of(*names)
    assert [1] == shop.metrics.of("events_handled")
    told = [("Bank:0:0", "later", RetryLater), ("Bank:0:1", "later", None)]
    assert told == shop.metrics.told
    assert "" == caplog.text


@virtual
async def test_attempts_add_up_over_several_waits() -> None:
    """The dead letter of the last try has their number and the place where it all began."""
    shop = Shop()

    @shop.router.bind_event("later")
    async def later(event: EventObject) -> None:
        shop.note_try(event)
        if event.attempt < 3:
            raise RetryLater(6)
        raise LookupError

    async with serves(shop):
        shop.put(event="later", headers=[("x", b"y")])
        await until(lambda: len(shop.letters) == 1)
        await until(lambda: shop.committed == 3)
    assert [1, 2, 3, 4, 5] == [attempt for _, attempt in shop.tries]
    assert about(0, 6, 12, 12.1, 12.3) == [time - shop.times[0] for time in shop.times]
    [letter] = shop.letters
    ours = [
        (wire.ORIGIN, b"Bank:0:0"),
        (wire.GROUP, b"Bank"),
        (wire.ATTEMPT, b"5"),
        (wire.FAILURE, b"LookupError"),
    ]
    assert [("x", b"y"), *ours] == list(letter.headers)


@virtual
async def test_later_events_of_its_key_overtake_it() -> None:
    """An event in the retry topic holds nothing up in the topic that it left."""
    shop = Shop()
    _asks(shop, 6)
    async with serves(shop):
        shop.put("it", event="later", key=b"a")
        shop.put("behind", key=b"a")
        await until(lambda: shop.committed == 2)
        await until(lambda: shop.committed == 3)
    assert ["behind", "it"] == shop.handled[:2]


def _by_data(shop: Shop) -> None:
    """Bind a handler that asks for another try as many seconds later as the data says."""

    @shop.router.bind_event("later")
    async def later(event: EventObject) -> None:
        shop.note_try(event)
        if event.attempt == 1:
            raise RetryLater(event.data)
        shop.handled.append(event.data)


@virtual
async def test_what_is_due_early_comes_early() -> None:
    """Each event waits for itself, whatever its place in the retry topic."""
    shop = Shop()
    _by_data(shop)
    async with shop.broker():
        for seconds in (90, 6, 30):
            shop.put(seconds, event="later")
        await _pass(95)
    assert [6, 30, 90] == shop.handled


@virtual
async def test_what_is_due_is_not_held_up_by_another_of_its_key() -> None:
    """Order is lost in the retry topic anyway: one that waits longer holds no other up."""
    shop = Shop()
    _by_data(shop)
    async with shop.broker():
        shop.put(90, event="later", key=b"a")
        shop.put(6, event="later", key=b"a")
        await _pass(10)
        assert [6] == shop.handled
        await _pass(85)
    assert [6, 90] == shop.handled


@virtual
async def test_one_that_waits_long_does_not_stop_the_retry_topic() -> None:
    """However many come and go behind it, they are handled when they are due."""
    shop = Shop(in_flight_events=4)
    _by_data(shop)
    async with shop.broker():
        shop.put(90, event="later")
        for _ in range(10):
            shop.put(6, event="later")
        await _pass(30)
        assert [6] * 10 == shop.handled
        await _pass(65)
    assert [*[6] * 10, 90] == shop.handled


async def _stop(_: Shop, broker: BrokerManager) -> None:
    await broker.stop()
    await broker._enter()


async def _rebalance(shop: Shop, _: BrokerManager) -> None:
    shop.cluster.rebalance("Bank.retry")
    await _pass(0.1)


async def _crash(shop: Shop, _: BrokerManager) -> None:
    shop.cluster.expel("Bank.retry")
    await _pass(0.1)


@virtual
@pytest.mark.parametrize("interrupt", [_stop, _rebalance, _crash])
async def test_a_wait_that_is_interrupted_goes_on(interrupt: Any) -> None:
    """An event in the retry topic is neither lost nor doubled, and still comes when it is due."""
    shop = Shop()
    _by_data(shop)
    async with shop.broker() as broker:
        shop.put(20, event="later", key=b"a")
        await until(lambda: shop.committed == 1)
        await _pass(5)
        await interrupt(shop, broker)
        await _pass(30)
    assert [20] == shop.handled
    assert [(20, 1), (20, 2)] == shop.tries
    first, second = shop.times
    assert 20 <= second - first < 21
    assert 1 == len(_waiting(shop))


@virtual
@pytest.mark.parametrize("interrupt", [_stop, _rebalance])
@pytest.mark.parametrize(
    ("seconds", "at"),
    [
        ((40, 6), 10),
        ((40, 6, 6, 6), 10),
        ((40, 6, 30), 10),
        ((40, 6, 30), 35),
        ((30, 40, 6), 10),
        ((40, 6, 50, 6, 30), 10),
        ((6, 40), 10),
        ((40, 6, 30), 2),
    ],
)
async def test_what_was_handled_behind_one_that_waits_does_not_come_again(
    seconds: tuple[int, ...], at: float, interrupt: Any
) -> None:
    """An earlier record that still waits leads to no repetition: all are handled once, when due."""
    shop = Shop()
    _by_data(shop)
    async with shop.broker() as broker:
        for number in seconds:
            shop.put(number, event="later")
        await _pass(at)
        await interrupt(shop, broker)
        await _pass(100)
        await interrupt(shop, broker)
        await _pass(10)
    assert sorted(seconds) == shop.handled
    began = shop.times[0]
    second = shop.times[len(seconds) :]
    assert all(
        due <= time - began < due + 2 for due, time in zip(shop.handled, second, strict=True)
    )


@virtual
async def test_a_stop_while_one_is_on_its_way_back() -> None:
    """An event whose way back is not acknowledged yet at a stop is not sent a second time."""
    shop = Shop()
    _by_data(shop)
    async with shop.broker() as broker:
        shop.put(40, event="later")
        shop.put(6, event="later")
        await until(lambda: shop.committed == 2)
        shop.cluster.delay_sends("Bank", 3)
        await _pass(7)  # it is due and sent
        await broker.stop()
        shop.cluster.delay_sends("Bank", 0)
        await broker._enter()
        await _pass(60)
    assert [6, 40] == shop.handled


@virtual
async def test_a_way_back_that_fails_is_tried_again() -> None:
    """A record that cannot be put into its topic waits for that and is not lost."""
    shop = Shop()
    _by_data(shop)
    async with shop.broker():
        shop.put(6, event="later")
        await until(lambda: shop.committed == 1)
        shop.cluster.fail_sends("Bank", DeliveryError("Bank", "too large"), 2)
        await _pass(30)
    assert [6] == shop.handled


@virtual
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(wire.DUE, b"rubbish")],
        [(wire.DUE, b"1"), (wire.ORIGIN, b"rubbish"), (wire.ATTEMPT, b"x")],
        [(wire.ORIGIN, b"Other:5:0")],
        [(wire.ORIGIN, b"Bank:99:0")],
        [(wire.ORIGIN, b"Bank:9999999999:0")],
        [(wire.ORIGIN, b"Bank:\xb2:0")],
    ],
    ids=str,
)
async def test_strange_records_in_the_retry_topic(headers: list[tuple[str, bytes]]) -> None:
    """They go on to the handler at once, and do not hold up those behind them."""
    shop = Shop()
    async with shop.broker():
        value = b'{"correlation_id":"7", "event":"note", "data":"strange"}'
        shop.cluster.append("Bank.retry", value=value, headers=headers)
        await _pass(3)
        assert ["strange"] == shop.handled
        assert {0: 1} == shop.cluster.committed("Bank.retry", "Bank.retry")
