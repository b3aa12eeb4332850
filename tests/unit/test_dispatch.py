"""Handling and dispatching, whatever handlers, rebalances and stops do: an event is never lost."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from kafka_broker import BrokerManager, EventObject, EventRouter, Metrics
from kafka_broker import _wire as wire
from kafka_broker.errors import DeliveryError, DeliveryUnknownError, RemoteError
from kafka_broker.testing import MemoryCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kafka_broker._metrics import Counted

virtual = pytest.mark.looptime

REFUSED = DeliveryError("Bank.dlq", "too large")
SECRET = "4111-SECRET"


class Counting(Metrics):
    """Metrics that a test can look at."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()

    def count(self, what: Counted, amount: int = 1) -> None:
        self.counted[what] += amount


class Bank:
    """A service with one partition, which a test fills and looks into past all brokers."""

    def __init__(self, *, routed: bool = True, **values: Any) -> None:
        name = uuid.uuid4().hex
        self.cluster = MemoryCluster(name)
        self.router = EventRouter("Bank")
        self.metrics = Counting()
        self._routed = routed
        self._values = {
            "bootstrap_servers": f"memory://{name}",
            "module_partitions": 1,
            "commit_interval": 0.01,
            **values,
        }
        self.handled: list[Any] = []
        self.router.bind_event("note")(self._note)

    async def _note(self, event: EventObject) -> Any:
        self.handled.append(event.data)
        return event.data

    def broker(self) -> BrokerManager:
        """Make one replica; those of one bank follow one another."""
        router = self.router if self._routed else None
        return BrokerManager("Bank", router=router, metrics=self.metrics, **self._values)

    def put(
        self,
        data: Any = None,
        *,
        event: str = "note",
        reply_to: str | None = None,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Append an event; with *reply_to* somebody waits for its reply there."""
        correlation_id = uuid.uuid4().hex
        headers = list(headers)
        if reply_to is not None:
            correlation = (wire.CORRELATION_ID, correlation_id.encode())
            headers += [correlation, (wire.REPLY_TOPIC, reply_to.encode())]
        value = json.dumps({"correlation_id": correlation_id, "event": event, "data": data})
        self.cluster.append("Bank", key=key, value=value.encode(), headers=headers)

    @property
    def committed(self) -> int:
        """The offset that the next replica begins at."""
        return self.cluster.committed("Bank", "Bank").get(0, 0)

    @property
    def dead(self) -> list[bytes | None]:
        """Where the dead letters come from."""
        records = self.cluster.records("Bank.dlq")
        return [dict(record.headers)[wire.ORIGIN] for record in records]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*, not for ever."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # conditions of every kind
            await asyncio.sleep(0.001)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def takes(broker: BrokerManager, taken: list[Any], count: int) -> None:
    """Take events out of the storage until there are *count*."""
    async with asyncio.timeout(10):
        while len(taken) < count:
            await broker.consumer_storage.receive()
            events = await broker.consumer_storage.consume_all()
            taken += [event.data for event in events.values()]


@asynccontextmanager
async def serves(bank: Bank) -> AsyncIterator[BrokerManager]:
    """Run a replica that still serves at the end, and has committed everything after it."""
    async with bank.broker() as broker:
        yield broker
        assert "still here" == (await broker.request("Bank", "note", "still here", timeout=5)).data
        assert broker.ready
    assert len(bank.cluster.records("Bank")) == bank.committed


# Rebalances


@virtual
@pytest.mark.parametrize("after", range(12))
async def test_a_rebalance_within_a_batch_loses_and_doubles_no_stored_event(after: int) -> None:
    """In whichever turn it comes, each event is taken once and in order, also after a restart."""
    bank, taken = Bank(routed=False), list[Any]()
    async with bank.broker() as broker:
        await turns(10)
        for number in range(200):
            bank.put(number)
        await turns(after)
        bank.cluster.rebalance("Bank")
        await turns(3)
        await takes(broker, taken, 200)
    bank.put("new")
    async with bank.broker() as broker:
        await takes(broker, taken, 201)
    assert [*range(200), "new"] == taken
    assert 201 == bank.committed


@virtual
@pytest.mark.parametrize("after", range(12))
async def test_a_rebalance_after_some_were_taken_doubles_none(after: int) -> None:
    """What was taken in the old epoch is committed in it; the rest comes again."""
    bank, taken = Bank(routed=False), list[Any]()
    async with bank.broker() as broker:
        await turns(10)
        for number in range(200):
            bank.put(number)
        await turns(after)
        taken += [event.data for event in (await broker.consumer_storage.consume_all()).values()]
        bank.cluster.rebalance("Bank")
        await takes(broker, taken, 200)
    assert list(range(200)) == taken
    assert 200 == bank.committed


@virtual
@pytest.mark.parametrize("after", range(12))
async def test_a_rebalance_within_a_batch_handles_each_event_once(after: int) -> None:
    """With a router, too: what was handled is committed before its partition moves."""
    bank = Bank()
    async with bank.broker():
        await turns(10)
        for number in range(200):
            bank.put(number)
        await turns(after)
        bank.cluster.rebalance("Bank")
        await until(lambda: len(bank.handled) >= 200)
    async with bank.broker():
        await asyncio.sleep(1)
    assert list(range(200)) == bank.handled


@virtual
async def test_a_rebalance_while_the_storage_is_full() -> None:
    """The event that waits for room comes again with the others, once."""
    bank, taken = Bank(routed=False, storage_events=2), list[Any]()
    async with bank.broker() as broker:
        for number in range(5):
            bank.put(number)
        await asyncio.sleep(1)
        bank.cluster.rebalance("Bank")
        await asyncio.sleep(1)
        await takes(broker, taken, 5)
    assert list(range(5)) == taken
    assert 5 == bank.committed


# Dead letters


@virtual
@pytest.mark.parametrize("event", ["fails", "unknown"])
async def test_a_dead_letter_that_fails_holds_its_offset_back(event: str) -> None:
    """Nothing is committed before the dead letter is written; then everything is."""
    bank = Bank()

    @bank.router.bind_event("fails")
    async def fails() -> None:
        raise LookupError

    bank.cluster.fail_sends("Bank.dlq", REFUSED, 2)
    async with serves(bank):
        bank.put(event=event)
        bank.put("behind it")
        await until(lambda: bank.handled == ["behind it"])
        await asyncio.sleep(0.5)
        assert (0, []) == (bank.committed, bank.dead)
        await until(lambda: bank.committed == 2)
        assert [b"Bank:0:0"] == bank.dead


@virtual
async def test_bytes_that_are_no_event_are_not_lost_either() -> None:
    """Their dead letter, too, is written again until it is there, as it came."""
    bank = Bank()
    bank.cluster.fail_sends("Bank.dlq", REFUSED, 2)
    async with serves(bank):
        bank.cluster.append("Bank", key=b"key", value=b"\xff no json")
        await until(lambda: bank.committed == 1)
    [record] = bank.cluster.records("Bank.dlq")
    assert (b"key", b"\xff no json") == (record.key, record.value)


@virtual
async def test_a_dead_letter_whose_outcome_is_unknown_is_written_again() -> None:
    """Twice there is better than not at all."""
    bank = Bank()
    bank.cluster.fail_sends("Bank.dlq", DeliveryUnknownError("Bank.dlq", "no answer"))
    async with serves(bank):
        bank.put(event="unknown")
        await until(lambda: bank.committed == 1)
    assert [b"Bank:0:0", b"Bank:0:0"] == bank.dead


@virtual
async def test_a_stop_before_a_dead_letter_is_written_leaves_it_to_the_next() -> None:
    """Its event is handled again, and buried then."""
    bank = Bank()
    bank.cluster.fail_sends("Bank.dlq", REFUSED)
    async with bank.broker():
        bank.put(event="unknown")
        await until(lambda: bank.metrics.counted["events_undelivered"] == 1)
    assert (0, []) == (bank.committed, bank.dead)
    async with serves(bank):
        await until(lambda: bank.committed == 1)
    assert [b"Bank:0:0"] == bank.dead


# Handlers that spoil their event


class _Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


RUBBISH = [
    ("correlation_id", uuid.UUID(int=7)),
    ("correlation_id", None),
    ("correlation_id", object()),
    ("correlation_id", _Unprintable()),
    ("event", None),
    ("event", object()),
    ("event", _Unprintable()),
    ("data", object()),
    ("status", object()),
    ("audit_log", None),
    ("audit_log", [object()]),
    ("audit_log", "rubbish"),
]


@virtual
@pytest.mark.parametrize(("field", "value"), RUBBISH)
@pytest.mark.parametrize("ends", ["returns", "raises"])
@pytest.mark.parametrize("reply_to", ["Bank.dlq", None])
async def test_a_handler_that_spoils_its_event_harms_no_other(
    field: str,
    value: object,
    ends: str,
    reply_to: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it assigns: its event ends, answered or buried, and the next one is handled."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # one value cannot even be logged
    bank = Bank()

    @bank.router.bind_event("spoil")
    async def spoil(event: EventObject) -> str:
        setattr(event, field, value)
        if ends == "raises":
            raise LookupError
        return "done"

    async with serves(bank):
        bank.put(event="spoil", reply_to=reply_to)
        await until(lambda: bank.committed == 1)
    expected = 1 if reply_to or ends == "raises" else 0
    assert expected == len(bank.cluster.records("Bank.dlq"))


@virtual
async def test_a_new_correlation_id_does_not_lead_the_reply_astray() -> None:
    """A handler that assigns a UUID, as the constructor takes one, answers the one who asked."""
    bank = Bank()

    @bank.router.bind_event("spoil")
    async def spoil(event: EventObject) -> str:
        event.correlation_id = uuid.uuid4()  # type: ignore[assignment]  # that is the mistake
        return "done"

    async with serves(bank) as broker:
        assert "done" == (await broker.request("Bank", "spoil", timeout=5)).data


# Handlers and cancellation


async def _raises() -> None:
    raise asyncio.CancelledError


async def _awaits_a_cancelled_task() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task


async def _cancels_its_task() -> None:
    _own_task().cancel()
    await asyncio.sleep(0)


async def _cancels_its_task_twice() -> None:
    _own_task().cancel()
    _own_task().cancel()
    await asyncio.sleep(0)


def _own_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


@virtual
@pytest.mark.parametrize(
    "handler", [_raises, _awaits_a_cancelled_task, _cancels_its_task, _cancels_its_task_twice]
)
async def test_a_cancelled_handler_has_failed(handler: Callable[[], Any]) -> None:
    """The one who asked is told, what nobody awaits is buried, and the next event is handled."""
    bank = Bank()
    bank.router.bind_event("cancelled")(handler)
    async with serves(bank) as broker:
        with pytest.raises(RemoteError, match="CancelledError in the handler") as caught:
            await broker.request("Bank", "cancelled", timeout=5)
        assert "handler-failed" == caught.value.code
        bank.put(event="cancelled")
        await until(lambda: bank.committed == 2)
    assert [b"Bank:0:1"] == bank.dead


@virtual
async def test_a_handler_that_cancels_its_task_as_it_returns() -> None:
    """It has returned: its reply counts, and the broker does not end in its place."""
    bank = Bank()

    @bank.router.bind_event("cancels")
    async def cancels() -> str:
        _own_task().cancel()
        return "done"

    async with serves(bank) as broker:
        assert "done" == (await broker.request("Bank", "cancels", timeout=5)).data


@virtual
@pytest.mark.parametrize("second", ["fails", "cancelled", "slow", "note"])
async def test_a_cancellation_that_a_handler_swallowed_harms_no_other(second: str) -> None:
    """A timeout made by hand leaves a cancellation behind; the next handlers end as they do."""
    bank = Bank()

    @bank.router.bind_event("slow")
    async def slow() -> str:
        asyncio.get_running_loop().call_later(0.05, _own_task().cancel)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "gave up"
        return "slept"

    @bank.router.bind_event("fails")
    async def fails() -> None:
        raise LookupError

    bank.router.bind_event("cancelled")(_raises)
    async with serves(bank) as broker:
        assert "gave up" == (await broker.request("Bank", "slow", timeout=5)).data
        bank.put(event=second)
        await until(lambda: bank.committed == 2)
    assert ([b"Bank:0:1"] if second in {"fails", "cancelled"} else []) == bank.dead


# What is logged


class Card(BaseModel):
    number: int


def _validates(data: Any) -> None:
    Card(number=data)


def _raises_from_it(data: Any) -> None:
    try:
        Card(number=data)
    except ValueError as exc:
        raise LookupError from exc


def _raises_while_handling_it(data: Any) -> None:
    try:
        Card(number=data)
    except ValueError:
        raise LookupError  # noqa: B904  # that is the point


def _raises_a_group(data: Any) -> None:
    try:
        Card(number=data)
    except ValueError as exc:
        message = "several"
        raise ExceptionGroup(message, [ExceptionGroup(message, [exc])]) from None


@virtual
@pytest.mark.parametrize(
    "fails", [_validates, _raises_from_it, _raises_while_handling_it, _raises_a_group]
)
async def test_what_pydantic_refused_in_a_handler_is_not_logged(
    fails: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    """However the error is wrapped: the log names it, without the data that it quotes."""
    bank = Bank()

    @bank.router.bind_event("check")
    async def check(event: EventObject) -> None:
        fails(event.data)

    async with serves(bank) as broker:
        with pytest.raises(RemoteError) as caught:
            await broker.request("Bank", "check", SECRET, timeout=5)
    assert SECRET not in caplog.text
    assert SECRET not in str(caught.value)
    assert "event 'check' (Bank:0:0" in caplog.text


@virtual
async def test_an_error_that_is_its_own_cause_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A chain of causes need not have an end; the log has the traceback all the same."""
    bank = Bank()

    @bank.router.bind_event("fails")
    async def fails() -> None:
        error = LookupError("of the handler")
        raise error from error

    async with serves(bank) as broker:
        with pytest.raises(RemoteError):
            await broker.request("Bank", "fails", timeout=5)
    assert "LookupError: of the handler" in caplog.text


# Room


@virtual
async def test_handling_waits_while_the_outbox_is_full() -> None:
    """Replies are always taken, so no event is handled for which there is no room."""
    bank = Bank(outbox_events=3)
    async with serves(bank):
        with bank.cluster.hold_sends("Bank.dlq"):
            for number in range(20):
                bank.put(number, reply_to="Bank.dlq")
            await asyncio.sleep(5)
            assert list(range(3)) == bank.handled
        await until(lambda: bank.committed == 20)
        assert list(range(20)) == bank.handled


@virtual
async def test_a_rebalance_while_the_outbox_is_full() -> None:
    """Handling goes on afterwards, and nothing is handled twice."""
    bank = Bank(outbox_events=3)
    async with serves(bank):
        with bank.cluster.hold_sends("Bank.dlq"):
            for number in range(20):
                bank.put(number, reply_to="Bank.dlq")
            await until(lambda: len(bank.handled) == 3)
            bank.cluster.rebalance("Bank")
            await asyncio.sleep(1)
        await until(lambda: bank.committed == 20)
        assert list(range(20)) == bank.handled


@virtual
async def test_a_stop_does_not_wait_for_room() -> None:
    """What was not handled is left to the next replica."""
    bank = Bank(outbox_events=3, drain_timeout=0.5)
    broker = bank.broker()
    await broker.init_consumer()
    with bank.cluster.hold_sends("Bank.dlq"):
        for number in range(20):
            bank.put(number, reply_to="Bank.dlq")
        await until(lambda: len(bank.handled) == 3)
        await asyncio.sleep(1)
        began = _now()
        await broker.stop()
        assert _now() - began < 2
    assert (list(range(3)), 0) == (bank.handled, bank.committed)


# Commits


@virtual
async def test_a_commit_never_passes_an_unfinished_reply() -> None:
    """One that is not delivered holds back what came behind it, whose replies are."""
    bank = Bank()
    async with serves(bank):
        bank.put("before")
        await until(lambda: bank.committed == 1)
        with bank.cluster.hold_sends("Bank.dlq"):
            bank.put("held", reply_to="Bank.dlq")
            bank.put("behind", reply_to="Bank.replies")
            bank.put("last")
            await until(lambda: len(bank.handled) == 4)
            await asyncio.sleep(1)
            assert 1 == bank.committed
        await until(lambda: bank.committed == 4)


@virtual
async def test_a_reply_that_fails_does_not_hold_commits_back() -> None:
    """It has ended: to handle its event again would help nobody."""
    bank = Bank()
    async with serves(bank):
        bank.cluster.fail_sends("Bank.dlq", REFUSED)
        bank.put(reply_to="Bank.dlq")
        await until(lambda: bank.committed == 1)
    assert [None] == bank.handled[:1]


@virtual
async def test_a_stop_commits_what_has_ended() -> None:
    """However long the interval of commits is, nothing is handled again after a stop."""
    bank = Bank(commit_interval=3600)
    async with bank.broker():
        for number in range(5):
            bank.put(number)
            await until(lambda: bank.handled[-1:] == [number])  # noqa: B023  # awaited here
    assert 5 == bank.committed
    async with bank.broker():
        await asyncio.sleep(1)
    assert list(range(5)) == bank.handled


# Stops


def _patient(bank: Bank) -> tuple[asyncio.Event, asyncio.Event]:
    """Bind a handler that tells when it began and waits until it may end."""
    began, release = asyncio.Event(), asyncio.Event()

    @bank.router.bind_event("work")
    async def work(event: EventObject) -> str:
        bank.handled.append(event.data)
        began.set()
        await release.wait()
        return "done"

    return began, release


@virtual
async def test_a_stop_lets_the_running_handler_end() -> None:
    """Its reply is delivered and its event committed; the one behind it is not begun."""
    bank = Bank()
    began, release = _patient(bank)
    broker = bank.broker()
    await broker.init_consumer()
    bank.put("first", event="work", reply_to="Bank.dlq", key=b"k")
    bank.put("second", event="work", reply_to="Bank.dlq", key=b"k")
    await until(began.is_set)
    stopping = asyncio.create_task(broker.stop())
    await asyncio.sleep(5)
    assert not stopping.done()
    release.set()
    await stopping
    assert (["first"], 1) == (bank.handled, bank.committed)
    [reply] = bank.cluster.records("Bank.dlq")
    assert b'"data":"done"' in (reply.value or b"")


@virtual
async def test_a_stop_waits_for_a_handler_for_a_while_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After drain_timeout it is cancelled, not answered, and its event handled again."""
    bank = Bank(drain_timeout=2)
    began, release = _patient(bank)
    broker = bank.broker()
    await broker.init_consumer()
    bank.put("again", event="work", reply_to="Bank.dlq")
    await until(began.is_set)
    before = _now()
    await broker.stop()
    assert 2 <= _now() - before < 4
    assert "1 handlers still run after 2 s" in caplog.text
    assert "handled again: Bank:0:0" in caplog.text
    assert (0, []) == (bank.committed, bank.cluster.records("Bank.dlq"))
    release.set()
    async with serves(bank):
        await until(lambda: bank.committed == 1)
    assert ["again", "again"] == bank.handled[:2]


@virtual
async def test_a_handler_that_will_not_end_does_not_keep_a_stop() -> None:
    """One that swallows its cancellation is left alone a second later."""
    bank = Bank(drain_timeout=2)
    began, release = asyncio.Event(), asyncio.Event()

    @bank.router.bind_event("stubborn")
    async def stubborn() -> None:
        began.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    broker = bank.broker()
    await broker.init_consumer()
    bank.put(event="stubborn")
    await until(began.is_set)
    before = _now()
    await broker.stop()
    assert 3 <= _now() - before < 5
    assert 0 == bank.committed
    release.set()
    await turns(5)


@virtual
async def test_an_event_is_handled_at_least_once() -> None:
    """One whose handler was cut off, as by a loop that ends, comes again to the next replica."""
    bank = Bank()
    began, release = _patient(bank)
    before = asyncio.all_tasks()
    broker = bank.broker()
    await broker.init_consumer()
    bank.put("before")
    bank.put("cut off", event="work", reply_to="Bank.dlq")
    await until(began.is_set)
    ours = asyncio.all_tasks() - before
    for task in ours:
        task.cancel()
    await asyncio.wait(ours)
    assert not broker.ready
    assert (1, []) == (bank.committed, bank.cluster.records("Bank.dlq"))
    release.set()
    async with serves(bank):
        await until(lambda: bank.committed == 2)
    assert ["before", "cut off", "cut off"] == bank.handled[:3]
    assert 1 == len(bank.cluster.records("Bank.dlq"))


@virtual
async def test_stored_events_that_nobody_took_come_again() -> None:
    """In storage mode an event is handled when it is taken; those before a stop were."""
    bank, taken = Bank(routed=False), list[Any]()
    async with bank.broker() as broker:
        for number in range(3):
            bank.put(number)
        [first, *_] = [json.loads(one.value or b"") for one in bank.cluster.records("Bank")]
        taken.append((await broker.consumer_storage.consume(first["correlation_id"])).data)
    assert ([0], 1) == (taken, bank.committed)
    async with bank.broker() as broker:
        await takes(broker, taken, 3)
    assert ([0, 1, 2], 3) == (taken, bank.committed)
