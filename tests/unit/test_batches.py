"""Batches: one call for several events, and a verdict for each of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fast_depends import Depends
from pydantic import BaseModel
from tests.unit.test_engine import Works, _engine, _now, leaves_nothing, serves, until

from kafka_broker import BrokerManager, EventObject, EventRouter, Reject, RetryPolicy
from kafka_broker._transport import TopicSpec
from kafka_broker.errors import ConfigurationError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

virtual = pytest.mark.looptime
once = RetryPolicy(attempts=1)


class Row(BaseModel):
    number: int


class Table(Works):
    """A service that notes the data of each list, and the time at which it got it."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.calls: list[list[Any]] = []
        self.times: list[float] = []

    def called(self, events: list[EventObject]) -> list[Any]:
        self.calls.append([event.data for event in events])
        self.times.append(_now())
        return self.calls[-1]

    async def answers(
        self, broker: BrokerManager, *data: object, event: str = "row"
    ) -> list[EventObject | BaseException]:
        """Ask for each, at once; returns the replies and the errors."""
        asking = [broker.request("Works", event, one, timeout=30) for one in data]
        return list(await asyncio.gather(*asking, return_exceptions=True))

    def put_rows(self, *data: object, **more: Any) -> None:
        for one in data:
            self.put(one, event="row", **more)


def _table(batch: int = 3, within: float = 0.05, *, lasts: float = 0, **values: Any) -> Table:
    """Return a table whose function notes its list, takes a while and returns what it got."""
    more = {name: values.pop(name) for name in ("timeout", "retry") if name in values}
    table = Table(**values)

    @table.router.bind_event("row", batch=batch, within=within, **more)
    async def row(events: list[EventObject]) -> list[Any]:
        data = table.called(events)
        await asyncio.sleep(lasts)
        return data

    return table


# Sizes and times


@virtual
async def test_a_batch_is_called_when_it_is_full_or_its_time_is_over() -> None:
    """Full ones at once; the rest when the first of it has waited long enough."""
    table = _table(within=2)
    async with serves(table):
        began = _now()
        table.put_rows(*range(7))
        await until(lambda: len(table.calls) == 3)
        times = [round(at - began) for at in table.times]
    assert ([[0, 1, 2], [3, 4, 5], [6]], [0, 0, 2]) == (table.calls, times)


@virtual
async def test_a_batch_of_one_waits_for_nobody() -> None:
    """It is full with its first event."""
    table = _table(batch=1, within=3600)
    async with serves(table):
        table.put_rows(1, 2)
        await until(lambda: table.calls == [[1], [2]], within=1)


@virtual
async def test_a_batch_fills_though_there_is_one_seat() -> None:
    """What waits in a batch needs none."""
    table = _table(batch=50, within=3600, concurrency=1)
    async with serves(table):
        table.put_rows(*range(100))
        await until(lambda: len(table.calls) == 2, within=1)
    assert [[*range(50)], [*range(50, 100)]] == table.calls


@virtual
async def test_the_call_needs_a_seat() -> None:
    """A batch that is full waits until one is free, and no more handlers run than there are."""
    table = _table(batch=2, concurrency=1)
    async with serves(table):
        table.put_rows(1)
        table.put("busy", event="wait")
        await until(lambda: table.begun == ["busy"])
        table.put_rows(2)
        await asyncio.sleep(5)
        assert [] == table.calls
        table.go.set()
        await until(lambda: sum(table.calls, []) == [1, 2])  # noqa: RUF017  # two at the most


@virtual
async def test_a_batch_mixes_partitions_and_keys() -> None:
    """And with a wildcard the names of events."""
    table = Table(partitions=3)

    @table.router.bind_event("row.*", batch=3, within=3600)
    async def row(events: list[EventObject]) -> None:
        table.calls.append(sorted((event.event, event.data) for event in events))

    async with serves(table):
        for number, name in enumerate("abc"):
            table.put(number, event=f"row.{name}", key=name, partition=number)
        await until(lambda: table.committed == {0: 1, 1: 1, 2: 1})
    assert [[("row.a", 0), ("row.b", 1), ("row.c", 2)]] == table.calls


# What the function takes and returns


def _events(table: Table) -> Callable[..., Any]:
    async def row(events: list[EventObject]) -> list[Any]:
        return [type(one).__name__ for one in events] + table.called(events)[len(events) :]

    return row


def _typed_events(_: Table) -> Callable[..., Any]:
    async def row(events: list[EventObject[Row]]) -> list[Any]:
        return [f"EventObject of {type(one.data).__name__}" for one in events]

    return row


def _models(_: Table) -> Callable[..., Any]:
    async def row(rows: list[Row]) -> list[Any]:
        return [type(one).__name__ for one in rows]

    return row


def _unannotated(_: Table) -> Callable[..., Any]:
    async def row(events):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # that is the point
        return [type(one).__name__ for one in events]

    return row


def _plain(_: Table) -> Callable[..., Any]:
    def row(rows: list[Row]) -> list[Any]:
        return [type(one).__name__ for one in rows]

    return row


def _tuple(_: Table) -> Callable[..., Any]:
    async def row(rows: list[Row]) -> tuple[Any, ...]:
        return tuple(type(one).__name__ for one in rows)

    return row


@virtual
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_events, "EventObject"),
        (_typed_events, "EventObject of Row"),
        (_models, "Row"),
        (_unannotated, "EventObject"),
        (_plain, "Row"),
        (_tuple, "Row"),
    ],
)
async def test_what_a_function_may_take(
    make: Callable[[Table], Callable[..., Awaitable[Any]]], kind: str
) -> None:
    """Events, events with a model, models, whatever is not annotated; and plain functions."""
    table = Table()
    table.router.bind_event("row", batch=2)(make(table))
    async with serves(table) as broker:
        replies = await table.answers(broker, {"number": 1}, {"number": 2})
    assert [kind, kind] == [reply.data for reply in replies if isinstance(reply, EventObject)]


@virtual
async def test_each_event_has_its_own_reply() -> None:
    """In the order of the list; with None each gets None."""
    table = _table()

    @table.router.bind_event("none", batch=2)
    async def none(events: list[EventObject]) -> None:
        table.called(events)

    async with serves(table) as broker:
        replies = await table.answers(broker, *"abcd")
        assert [*"abcd"] == [reply.data for reply in replies if isinstance(reply, EventObject)]
        replies = await table.answers(broker, 1, 2, event="none")
        assert [None, None] == [one.data for one in replies if isinstance(one, EventObject)]


@virtual
async def test_data_that_does_not_fit_fails_alone() -> None:
    """It is not in the list, takes nobody's place, and is not tried again."""
    table = Table()

    @table.router.bind_event("row", batch=2, within=3600)
    async def row(rows: list[Row]) -> list[int]:
        table.calls.append([one.number for one in rows])
        return table.calls[-1]

    async with serves(table) as broker:
        asked = [{"number": 1}, {"number": "one"}, {"number": 2}]
        first, bad, second = await table.answers(broker, *asked)
        assert isinstance(first, EventObject)
        assert isinstance(second, EventObject)
        assert isinstance(bad, RemoteError)
        assert (1, 422, 2) == (first.data, bad.status, second.data)
    assert [[1, 2]] == table.calls


@virtual
async def test_an_exception_in_the_list_is_the_verdict_on_its_event() -> None:
    """The others are done; it is tried again in a later batch, and then becomes a dead letter."""
    table = Table(retry=RetryPolicy(attempts=2, base=0.1, jitter=0))

    @table.router.bind_event("row", batch=3)
    async def row(events: list[EventObject]) -> list[Any]:
        table.calls.append([(event.data, event.attempt) for event in events])
        verdicts: dict[Any, Exception] = {"fails": LookupError(), "no": Reject(404)}
        return [verdicts.get(event.data) for event in events]

    async with serves(table):
        table.put_rows("a", "fails", "no")
        await until(lambda: table.committed == {0: 3})
    assert [[("a", 1), ("fails", 1), ("no", 1)], [("fails", 2)]] == table.calls
    assert {"fails", "no"} == set(table.dead)


@virtual
@pytest.mark.parametrize("wrong", ["raises", "too few", "too many", "no list", "cancelled"])
async def test_what_is_wrong_with_the_call_is_raised_for_all(wrong: str) -> None:
    """An exception, another number of results, something that is no list: each event failed."""
    table = Table(retry=once)

    @table.router.bind_event("row", batch=2)
    async def row(events: list[EventObject]) -> Any:
        table.called(events)
        if wrong == "raises":
            raise LookupError
        if wrong == "cancelled":
            raise asyncio.CancelledError
        return {"too few": [1], "too many": [1, 2, 3], "no list": "ab"}[wrong]

    async with serves(table) as broker:
        errors = await table.answers(broker, 1, 2)
        table.put_rows(3, 4)
        await until(lambda: table.committed == {0: 4})
    name = {"raises": "LookupError", "cancelled": "HandlerCancelledError"}.get(wrong, "TypeError")
    expected = [f"{name} in the handler of 'row'; see the log of Works"] * 2
    assert expected == [error.detail for error in errors if isinstance(error, RemoteError)]
    assert [[1, 2], [3, 4]] == table.calls
    assert {3, 4} == set(table.dead)


@virtual
async def test_a_call_may_have_dependencies_and_the_broker() -> None:
    """They are made once for the whole list."""
    table, made = Table(), list[str]()

    def connection() -> str:
        made.append("connection")
        return made[-1]

    @table.router.bind_event("row", batch=2)
    async def row(
        broker: BrokerManager, rows: list[Row], used: str = Depends(connection)
    ) -> list[Any]:
        return [(broker.settings.module, one.number, used) for one in rows]

    async with serves(table) as broker:
        replies = await table.answers(broker, {"number": 1}, {"number": 2})
    assert [["Works", 1, "connection"], ["Works", 2, "connection"]] == [
        reply.data for reply in replies if isinstance(reply, EventObject)
    ]
    assert ["connection"] == made


@virtual
async def test_what_a_call_produces_holds_the_commits_of_all() -> None:
    """Without an await, too, and in whichever partition they are: nothing is lost in a crash."""
    table = Table(partitions=2)
    table.cluster._node.create([TopicSpec("Other", 1)], "")

    @table.router.bind_event("row", batch=2, within=3600)
    async def row(broker: BrokerManager, events: list[EventObject]) -> None:
        table.called(events)
        broker.produce("Other", EventObject(event="x"))

    async with serves(table):
        with table.cluster.hold_sends("Other"):
            table.put_rows(0)
            table.put_rows(1, partition=1)
            await until(lambda: len(table.calls) == 1)
            await asyncio.sleep(5)
            assert {} == table.committed
        await until(lambda: table.committed == {0: 1, 1: 1})


# The order of keys


@virtual
async def test_one_key_is_in_one_list_in_order() -> None:
    """As many as fit; the rest waits until the call has ended."""
    table = _table(batch=3, lasts=1)
    async with serves(table):
        began = _now()
        table.put_rows(*range(7), key="a")
        await until(lambda: table.committed == {0: 7})
    assert [[0, 1, 2], [3, 4, 5], [6]] == table.calls
    assert [0, 1, 2] == [int(at - began) for at in table.times]


@virtual
@pytest.mark.parametrize("retried", [False, True])
async def test_another_handler_of_the_key_waits_for_the_end(retried: bool) -> None:  # noqa: FBT001  # a case
    """Of the event in the batch and of all its tries; then it is handled, and others behind it."""
    table = Table(retry=RetryPolicy(attempts=3, base=1, cap=1, jitter=0))
    seen = table.handled

    @table.router.bind_event("row", batch=2)
    async def row(events: list[EventObject]) -> None:
        seen.append(f"row {events[0].attempt}")
        await asyncio.sleep(1)
        if retried and events[0].attempt < 3:
            raise LookupError

    async with serves(table):
        table.put_rows("a", key="a")
        table.put("note 1", key="a")
        table.put_rows("b", key="a")
        table.put("note 2", key="a")
        table.put("other key", key="b")
        await until(lambda: table.committed == {0: 5})
    rows = ["row 1", "row 2", "row 3"] if retried else ["row 1"]
    rest = [one for one in seen if one != "other key"][: 2 * len(rows) + 2]
    assert [*rows, "note 1", *rows, "note 2"] == rest
    assert "other key" in seen[:2]


@virtual
async def test_the_next_of_a_key_waits_without_spending_its_own_time() -> None:
    """While the call before it runs its time limit does not: it has not begun its try."""
    table = _table(batch=2, lasts=0.6, timeout=1, retry=once)
    async with serves(table):
        for data, key in [("a", "k"), ("x", "x"), ("b", "k")]:
            table.put_rows(data, key=key)
        await until(lambda: table.committed == {0: 3})
    assert ([["a", "x"], ["b"]], []) == (table.calls, table.dead)


# The time limit


@virtual
async def test_a_call_that_takes_too_long_fails_for_all() -> None:
    """The function is cancelled once, and each event has failed for want of time."""
    table = _table(batch=3, lasts=60, timeout=1, retry=once)
    async with serves(table) as broker:
        began = _now()
        errors = await table.answers(broker, 1, 2, 3)
        assert _now() - began < 2
    assert [504] * 3 == [error.status for error in errors if isinstance(error, RemoteError)]
    assert [[1, 2, 3]] == table.calls


@virtual
async def test_a_batch_without_a_seat_in_time_is_tried_again() -> None:
    """It gets one later, and meanwhile keeps none from others."""
    policy = RetryPolicy(attempts=2, base=5, jitter=0)
    table = _table(batch=2, timeout=1, retry=policy, concurrency=1)
    async with serves(table):
        table.put_rows("late")
        table.put("busy", event="wait")
        await asyncio.sleep(1.2)
        table.go.set()
        table.put("next")
        await until(lambda: table.handled == ["busy", "next"], within=1)
        await until(lambda: table.committed == {0: 3})
    assert ([["late"]], []) == (table.calls, table.dead)


# Stops, rebalances, and a leader that is gone


@virtual
@pytest.mark.parametrize("what", ["stop", "rebalance"])
async def test_a_batch_that_gathers_keeps_nobody(what: str) -> None:
    """Nobody else may come, so it waits no longer; each event is handled, once."""
    table = _table(within=3600)
    async with leaves_nothing(table):
        async with table.broker() as broker:
            table.put_rows(1, 2, key="a")
            await until(lambda: len(_engine(broker)._lanes.working) == 2)
            began = _now()
            if what == "rebalance":
                table.cluster.rebalance("Works")
                await until(lambda: bool(table.calls or _now() - began > 1))
        assert _now() - began < 3
    async with table.broker():
        await asyncio.sleep(1)
    assert ({0: 2}, [[1, 2]]) == (table.committed, table.calls)


@virtual
@pytest.mark.parametrize("what", ["stop", "rebalance"])
async def test_a_call_that_runs_may_end(what: str) -> None:
    """Its events are committed, and not handled again."""
    table = _table(lasts=1)
    async with leaves_nothing(table):
        async with table.broker():
            table.put_rows(1, 2, 3)
            await until(lambda: len(table.calls) == 1)
            if what == "rebalance":
                table.cluster.rebalance("Works")
                await asyncio.sleep(3)
        assert ({0: 3}, [[1, 2, 3]]) == (table.committed, table.calls)


@virtual
async def test_a_stop_that_finds_an_event_on_its_way_into_a_batch() -> None:
    """It is not waited for others then: a stop is not as long as that."""

    def slow(handle: Any) -> Any:
        async def slowly(event: EventObject) -> Any:
            table.begun.append(event.data)
            await asyncio.sleep(0.5)
            return await handle(event)

        return slowly

    table = Table()
    table.router = EventRouter("Works", middleware=[slow])

    @table.router.bind_event("row", batch=2, within=3600)
    async def row(events: list[EventObject]) -> None:
        table.called(events)

    async with leaves_nothing(table):
        async with table.broker():
            table.put_rows(1)
            await until(lambda: table.begun == [1])
            began = _now()
        assert _now() - began < 2
    assert table.calls == [[1]] or table.committed == {}


@virtual
@pytest.mark.parametrize("calls", [False, True])
async def test_a_leader_that_is_cancelled_from_outside(calls: bool) -> None:  # noqa: FBT001  # a case
    """Those that waited for it are tried again, like itself: none is lost, none hangs."""
    table = _table(within=2, lasts=2)
    async with serves(table) as broker:
        table.put_rows(1, 2)
        await until(lambda: len(_engine(broker)._lanes.working) == 2)
        if calls:
            await until(lambda: len(table.calls) == 1)
        leader = min(_engine(broker)._lanes.working, key=lambda work: work.record.offset)
        assert leader.task is not None
        leader.task.cancel()
        await until(lambda: table.committed == {0: 2})
    assert ([1, 2], []) == (sorted(table.calls[-1]), table.dead)


@virtual
async def test_a_member_that_is_cancelled_from_outside_leaves_the_batch() -> None:
    """The others are called without it, and it is tried again."""
    table = _table(within=1)
    async with serves(table) as broker:
        table.put_rows(1, 2)
        await until(lambda: len(_engine(broker)._lanes.working) == 2)
        member = max(_engine(broker)._lanes.working, key=lambda work: work.record.offset)
        assert member.task is not None
        member.task.cancel()
        await until(lambda: table.committed == {0: 2})
    assert [1, 2] == sorted(data for call in table.calls for data in call)


# Binding, and loops of the user's own


def _no_list() -> None: ...
def _two(first: list[Row], second: list[Row]) -> None: ...
def _one_event(event: EventObject) -> None: ...
def _one_model(row: Row) -> None: ...
def _other_collection(rows: tuple[Row, ...]) -> None: ...
def _of_nothing(rows: list[Row] = []) -> None: ...  # noqa: B006  # a default is kept


@pytest.mark.parametrize(
    "function", [_no_list, _two, _one_event, _one_model, _other_collection, _of_nothing]
)
def test_a_function_that_takes_no_list_is_refused(function: Callable[..., Any]) -> None:
    """When it is bound, and by name."""
    with pytest.raises(ConfigurationError, match=rf"handler .*{function.__name__} takes a batch"):
        EventRouter("Works").bind_event("row", batch=2)(function)


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"batch": -1}, "batch must be 1 or more, got -1"),
        ({"batch": 2, "within": 0}, "within must be a positive number of seconds"),
        ({"batch": 2, "within": -1}, "within must be a positive number of seconds"),
        ({"batch": 2, "within": float("inf")}, "within must be a positive number of seconds"),
        ({"batch": 2, "within": float("nan")}, "within must be a positive number of seconds"),
    ],
)
def test_numbers_that_make_no_batch_are_refused(terms: dict[str, Any], text: str) -> None:
    """Before the function is looked at."""
    with pytest.raises(ConfigurationError, match=text):
        EventRouter("Works").bind_event("row", **terms)


async def test_execute_event_calls_with_a_list_of_one() -> None:
    """In a loop of the user's own nobody else comes; its result is that of the event."""
    router = EventRouter("Works")

    @router.bind_event("row", batch=50, within=3600)
    async def row(rows: list[Row]) -> list[Any]:
        return [LookupError(f"{one.number}") if one.number else "done" for one in rows]

    @router.bind_event("none", batch=50)
    async def none(events: list[EventObject]) -> None: ...

    assert "done" == await router.execute_event(EventObject(event="row", data={"number": 0}))
    assert await router.execute_event(EventObject(event="none")) is None
    with pytest.raises(LookupError, match="7"):
        await router.execute_event(EventObject(event="row", data={"number": 7}))
