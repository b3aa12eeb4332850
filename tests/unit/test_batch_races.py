"""Batches whose events give up, time out or come too late: no seat leaks, no call has a ghost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import BrokerManager, EventObject, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker.errors import ReplyTimeoutError

from .test_dispatch import Bank, serves, until

if TYPE_CHECKING:
    from kafka_broker._middleware import Handle, Middleware

virtual = pytest.mark.looptime

EXACT = RetryPolicy(attempts=3, base=0.1, jitter=0)
TWICE = RetryPolicy(attempts=2, base=0.1, jitter=0)
ONCE = RetryPolicy(attempts=1)


def _seated(broker: BrokerManager) -> int:
    assert broker._run is not None
    return broker._run._dispatchers["events"]._lanes._seated


def _gathers(bank: Bank, **terms: Any) -> list[list[Any]]:
    """Bind a batch function; returns the data of each of its calls."""
    calls: list[list[Any]] = []

    @bank.router.bind_event("row", **terms)
    async def row(events: list[EventObject]) -> None:
        calls.append([event.data for event in events])

    return calls


def _impatient(data: str, *, tries: int) -> Middleware:
    """Give the event with that *data* 0.2 seconds in each of its first *tries*."""

    def wrap(handle: Handle) -> Handle:
        async def limited(event: EventObject) -> Any:
            short = event.data == data and event.attempt <= tries
            async with asyncio.timeout(0.2 if short else None):
                return await handle(event)

        return limited

    return wrap


# Seats


@virtual
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_leaders_timed_out_before_they_have_a_seat_leak_none(concurrency: int) -> None:
    """The batches are called when there are seats, and all seats are free in the end."""
    bank = Bank(concurrency=concurrency, retry=EXACT)
    calls: list[str] = []

    @bank.router.bind_event("slow")
    async def slow() -> None:
        await asyncio.sleep(1)

    async def row(events: list[EventObject]) -> None:
        calls.extend(event.event for event in events)

    names = [f"row.{number}" for number in range(concurrency)]
    for name in names:
        bank.router.bind_event(name, batch=10, within=0.05, timeout=0.5)(row)
    async with serves(bank) as broker:
        for name in names:
            bank.put(event=name)
        await asyncio.sleep(0.01)
        for _ in range(concurrency):
            bank.put(event="slow")
        await until(lambda: bank.committed == concurrency * 2)
        assert 0 == _seated(broker)
        bank.put("behind them")
        await until(lambda: bank.handled == ["behind them"])
    assert concurrency <= bank.metrics.counted["events_retried"]
    assert (names, []) == (sorted(calls), bank.dead)


# Events that give up


@virtual
async def test_a_leader_that_gives_up_is_in_no_call() -> None:
    """Alone it has failed with its own error, and the function is not called at all."""
    bank = Bank(retry=ONCE, middleware=[_impatient("leader", tries=1)])
    calls = _gathers(bank, batch=3, within=5)
    async with serves(bank):
        bank.put("leader", event="row")
        await until(lambda: bank.committed == 1)
        await asyncio.sleep(6)
    [letter] = bank.cluster.records("Bank.dlq")
    assert ([], b"TimeoutError") == (calls, dict(letter.headers)[wire.FAILURE])


@virtual
async def test_a_follower_that_gives_up_is_in_no_call() -> None:
    """The others are called without it, though it tried twice to be among them."""
    bank = Bank(retry=TWICE, middleware=[_impatient("follower", tries=2)])
    calls = _gathers(bank, batch=10, within=1)
    async with serves(bank):
        bank.put("leader", event="row")
        await asyncio.sleep(0.05)
        bank.put("follower", event="row")
        await until(lambda: bank.committed == 2)
    assert ([["leader"]], [b"Bank:0:1"]) == (calls, bank.dead)


@virtual
async def test_a_follower_that_comes_again_is_in_the_call_once() -> None:
    """Its first try has left the batch that its second one joins."""
    bank = Bank(retry=TWICE, middleware=[_impatient("follower", tries=1)])
    calls = _gathers(bank, batch=10, within=1)
    async with serves(bank):
        bank.put("leader", event="row")
        await asyncio.sleep(0.05)
        bank.put("follower", event="row")
        await until(lambda: bank.committed == 2)
    assert 1 == bank.metrics.counted["events_retried"]
    assert ([["leader", "follower"]], []) == (calls, bank.dead)


@virtual
async def test_a_follower_whose_time_is_over_while_the_call_runs_is_in_no_second_one() -> None:
    """In the call only the leader's time counts."""

    def slowly(handle: Handle) -> Handle:
        async def looks_up(event: EventObject) -> Any:
            if event.data == "follower" and event.attempt == 1:
                await asyncio.sleep(0.6)
            return await handle(event)

        return looks_up

    bank = Bank(middleware=[slowly])
    calls: list[list[Any]] = []

    @bank.router.bind_event("row", batch=2, within=0.2, timeout=1, retry=TWICE)
    async def row(events: list[EventObject]) -> None:
        calls.append([event.data for event in events])
        await asyncio.sleep(0.9)

    async with serves(bank):
        bank.put("follower", event="row", key=b"f")
        await asyncio.sleep(0.55)
        bank.put("leader", event="row", key=b"l")
        await until(lambda: bank.committed == 2)
    assert ([["leader", "follower"]], []) == (calls, bank.dead)


@virtual
@pytest.mark.parametrize("others", [[], ["other"]])
async def test_a_deadline_that_passes_while_a_batch_gathers(others: list[str]) -> None:
    """Nobody waits for that event: it is in no call, has no reply, and is counted as expired."""
    bank = Bank()
    calls = _gathers(bank, batch=10, within=1)
    async with serves(bank) as broker:
        for data in others:
            bank.put(data, event="row")
        with pytest.raises(ReplyTimeoutError):
            await broker.request("Bank", "row", "late", timeout=0.3)
        await until(lambda: bank.committed == len(others) + 1)
        assert 1 == bank.metrics.counted["events_expired"]
        assert [] == bank.cluster.records("Bank.replies")
    assert ([others] if others else [], []) == (calls, bank.dead)


@virtual
async def test_a_seat_that_comes_after_the_deadline_is_no_second_try() -> None:
    """Who failed and waits for a seat again is not handled for somebody who has left."""
    bank = Bank(concurrency=1, retry=EXACT)
    tries: list[int] = []

    @bank.router.bind_event("fails")
    async def fails(event: EventObject) -> None:
        tries.append(event.attempt)
        raise LookupError

    @bank.router.bind_event("slow")
    async def slow() -> None:
        await asyncio.sleep(2)

    async with serves(bank) as broker:
        asking = asyncio.create_task(broker.request("Bank", "fails", timeout=0.5))
        await until(lambda: tries == [1])
        bank.put(event="slow")
        with pytest.raises(ReplyTimeoutError):
            await asking
        await until(lambda: bank.committed == 2)
    assert [1] == tries


# Commits


@virtual
async def test_what_a_batch_produces_holds_the_commits_in_every_partition() -> None:
    """Not only that of its leader: none is committed before all of it is delivered."""
    bank = Bank(module_partitions=2)

    @bank.router.bind_event("row", batch=2, within=1)
    async def row(events: list[EventObject], broker: BrokerManager) -> None:
        for event in events:
            broker.produce("Bank.dlq", EventObject(event="out", data=event.data))

    async with bank.broker():
        with bank.cluster.hold_sends("Bank.dlq"):
            for partition in (0, 1):
                value = EventObject(event="row", data=partition).model_dump_json().encode()
                bank.cluster.append("Bank", partition=partition, key=b"k", value=value)
            await until(lambda: len(bank.cluster.records("Bank.dlq")) == 2)
            await asyncio.sleep(1)
            assert {} == bank.cluster.committed("Bank", "Bank")
        await until(lambda: bank.cluster.committed("Bank", "Bank") == {0: 1, 1: 1})
