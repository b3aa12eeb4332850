"""scratch"""

from __future__ import annotations
import asyncio, logging, uuid, json
from typing import Any
import pytest
from kafka_broker import BrokerManager, EventObject, EventRouter, RetryPolicy
from kafka_broker._lanes import Lanes
from tests.unit.test_dispatch import Bank, until, turns, _now, virtual


@virtual
async def test_A_stale() -> None:
    bank = Bank(concurrency=1, retry=RetryPolicy(attempts=2, base=0.1, jitter=0))
    go = asyncio.Event()

    @bank.router.bind_event("block")
    async def block() -> None:
        await go.wait()

    @bank.router.bind_event("row", batch=2, within=0.05, timeout=1)
    async def row(events: list[EventObject]) -> None:
        bank.handled.append(len(events))

    async with bank.broker() as b:
        bank.put(event="row")
        bank.put(event="block")
        await asyncio.sleep(1.05)
        go.set()
        await asyncio.sleep(5)
        print(b._run._dispatchers["events"]._lanes._seated, bank.handled, bank.committed)
        assert bank.committed == 2


@virtual
async def test_B_turn_timer() -> None:
    bank = Bank(retry=RetryPolicy(attempts=1))
    calls = []

    @bank.router.bind_event("row", batch=2, within=0.05, timeout=1)
    async def row(events: list[EventObject]) -> None:
        calls.append([e.data for e in events])
        await asyncio.sleep(0.6)

    async with bank.broker() as b:
        bank.put("a", event="row", key=b"k")
        bank.put("x", event="row", key=b"x")
        bank.put("b", event="row", key=b"k")
        await until(lambda: bank.committed == 3)
    print(calls, bank.dead)
    assert [] == bank.dead


@virtual
async def test_C_cancel_resting() -> None:
    bank = Bank(retry=RetryPolicy(attempts=2, base=1, jitter=0))

    @bank.router.bind_event("f")
    async def f() -> None:
        bank.handled.append("f")
        raise LookupError

    async with bank.broker() as b:
        d = b._run._dispatchers["events"]
        bank.put(event="f")
        await until(lambda: bank.handled == ["f"])
        await turns(5)
        [w] = d._lanes.working
        w.task.cancel()
        await asyncio.sleep(5)
        bank.put("n")
        await asyncio.sleep(5)
        print(bank.handled, bank.committed)
        assert bank.committed == 2


@virtual
async def test_D_commit_task(monkeypatch) -> None:
    bank = Bank()
    async with bank.broker() as b:

        def boom(*a):
            raise ZeroDivisionError

        monkeypatch.setattr(Lanes, "committed", boom)
        bank.put("n")
        await asyncio.sleep(5)
        print(b.ready)
        monkeypatch.undo()
        assert not b.ready


@virtual
async def test_E_stop_unopened() -> None:
    bank = Bank()
    b = bank.broker()
    t = _now()
    await b._enter(handling=False)
    await b._leave()
    print(_now() - t)
    assert _now() - t < 1


@virtual
@pytest.mark.parametrize("n", range(14))
async def test_F_leak(n) -> None:
    bank = Bank()
    before = asyncio.all_tasks()
    b = bank.broker()
    t = asyncio.create_task(b.__aenter__())
    await turns(n)
    t.cancel()
    await asyncio.wait({t})
    if not t.cancelled():
        await b.stop()
    else:
        await until(lambda: b._run is None or b._run.over)
    left = asyncio.all_tasks() - before
    assert (0, 0, set()) == (bank.cluster.members("Bank"), bank.cluster.members("Bank.retry"), left)


@virtual
async def test_TT() -> None:
    bank = Bank(drain_timeout=1)
    before = asyncio.all_tasks()

    @bank.router.bind_event("f")
    async def f() -> None:
        bank.handled.append("f")
        await asyncio.sleep(3600)

    async with bank.broker() as b:
        bank.put(event="f")
        await until(lambda: bank.handled == ["f"])
        t = _now()
    print(_now() - t)
    left = asyncio.all_tasks() - before
    assert set() == left


@virtual
async def test_BA() -> None:
    bank = Bank(module_partitions=2)

    @bank.router.bind_event("row", batch=2, within=0.05)
    async def row(events: list[EventObject]) -> None:
        bank.handled.append(len(events))
        b.produce("Other", EventObject(event="x"))

    async with bank.broker() as b:
        from kafka_broker._transport import TopicSpec

        bank.cluster._node.create([TopicSpec("Other", 1)], "")
        with bank.cluster.hold_sends("Other"):
            for p in (0, 1):
                v = json.dumps({"correlation_id": str(p), "event": "row", "data": p})
                bank.cluster.append("Bank", partition=p, value=v.encode())
            await until(lambda: bank.handled == [2])
            await asyncio.sleep(1)
            c = bank.cluster.committed("Bank", "Bank")
            print(c)
        assert c == {}


@virtual
async def test_H() -> None:
    bank = Bank(router_middleware=()) if False else Bank()

    def slow(handle):
        async def h(event):
            bank.handled.append("mw")
            await asyncio.sleep(1)
            return await handle(event)

        return h

    bank.router._middleware = (slow,)
    bank2 = EventRouter("Bank", middleware=[slow])
    bank.router = bank2

    @bank2.bind_event("row", batch=2, within=60)
    async def row(events: list[EventObject]) -> None:
        bank.handled.append(len(events))

    async with bank.broker() as b:
        bank.put(event="row")
        await until(lambda: bank.handled == ["mw"])
        t = _now()
    print(_now() - t)
    assert _now() - t < 2


@virtual
async def test_I() -> None:
    bank = Bank()
    async with bank.broker() as b:
        for _ in range(3):
            bank.cluster.append("Bank.dlq", value=b"x")
        got = []
        async for l in b.dead_letters():
            got.append(l)
        assert 3 == len(got)
        import kafka_broker._transport.memory as m

        node = bank.cluster._node

        async def go():
            return [l async for l in b.dead_letters()]

        for n in range(12):
            t = asyncio.create_task(go())
            await turns(n)
            bank.cluster.down()
            await asyncio.wait({t})
            bank.cluster.up()
            print(n, t.exception() or len(t.result()))
