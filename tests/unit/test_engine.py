"""The engine as a whole: whatever handlers, rebalances, faults and stops do, every event ends."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_dispatch import turns

from kafka_broker import BrokerManager, EventObject, EventRouter, RetryPolicy
from kafka_broker._lanes import Lanes
from kafka_broker._transport import TopicSpec
from kafka_broker._transport.memory_consumer import MemorySubscription
from kafka_broker.errors import BrokerClosedError, BrokerUnavailableError
from kafka_broker.testing import MemoryCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kafka_broker._dispatch import Dispatcher

virtual = pytest.mark.looptime


class Works:
    """A service whose handlers wait, where they wait at all, until the test lets them."""

    def __init__(self, *, partitions: int = 1, **values: Any) -> None:
        name = uuid.uuid4().hex
        self.cluster = MemoryCluster(name)
        self.router = EventRouter("Works")
        self.values: dict[str, Any] = {
            "bootstrap_servers": f"memory://{name}",
            "module_partitions": partitions,
            "commit_interval": 0.01,
            **values,
        }
        self.partitions = partitions
        self.begun: list[Any] = []
        self.handled: list[Any] = []
        self.go = asyncio.Event()
        self.router.bind_event("note")(self._note)
        self.router.bind_event("wait")(self._wait)
        self.cluster._node.create([TopicSpec("Works", partitions)], "")

    async def _note(self, event: EventObject) -> Any:
        self.begun.append(event.data)
        self.handled.append(event.data)
        return event.data

    async def _wait(self, event: EventObject) -> Any:
        self.begun.append(event.data)
        await self.go.wait()
        self.handled.append(event.data)
        return event.data

    def broker(self) -> BrokerManager:
        return BrokerManager("Works", router=self.router, **self.values)

    def put(
        self, data: Any = None, *, event: str = "note", key: str | None = None, partition: int = 0
    ) -> None:
        envelope = {"correlation_id": uuid.uuid4().hex, "event": event, "data": data}
        value, raw = json.dumps(envelope).encode(), None if key is None else key.encode()
        self.cluster.append("Works", partition=partition, key=raw, value=value)

    @property
    def committed(self) -> dict[int, int]:
        return self.cluster.committed("Works", "Works")

    @property
    def end(self) -> dict[int, int]:
        """The offset behind the last record of each partition that has any."""
        return dict(Counter(record.partition for record in self.cluster.records("Works")))

    @property
    def dead(self) -> list[Any]:
        """The data of the dead letters."""
        return [json.loads(one.value or b"")["data"] for one in self.cluster.records("Works.dlq")]


def _engine(broker: BrokerManager, name: str = "events") -> Dispatcher:
    assert broker._run is not None
    return broker._run._dispatchers[name]


def _now() -> float:
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], bool], within: float = 60) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110  # conditions of every kind
            await asyncio.sleep(0.01)


def _timers() -> list[asyncio.TimerHandle]:
    """Return what our own code still wants to be called for."""
    loop: Any = asyncio.get_running_loop()
    return [one for one in loop._scheduled if not one.cancelled() and "kafka_broker" in repr(one)]


def _check_empty(engine: Dispatcher) -> None:
    lanes = engine._lanes
    assert (set(), 0, 0) == (lanes.working, lanes._seated, len(lanes._turns))
    assert ({}, 0, set()) == (lanes.partitions, len(lanes._returning), engine._workers)
    assert engine._sweeper is None or engine._sweeper.cancelled()


@asynccontextmanager
async def leaves_nothing(works: Works) -> AsyncIterator[None]:
    """Check that nothing is left of any broker in this context: no task, timer or membership."""
    before = asyncio.all_tasks()
    yield
    await turns(3)
    assert set() == asyncio.all_tasks() - before
    assert [] == _timers()
    groups = ("Works", "Works.retry")
    assert [0, 0] == [works.cluster.members(group) for group in groups]


@asynccontextmanager
async def serves(works: Works) -> AsyncIterator[BrokerManager]:
    """Run a broker that still answers at the end, commits everything and leaves nothing."""
    async with leaves_nothing(works):
        async with works.broker() as broker:
            yield broker
            works.go.set()
            for partition in range(works.partitions):
                works.put("still here", partition=partition)
            await until(lambda: works.committed == works.end)
            assert broker.ready
            engine = _engine(broker)
        _check_empty(engine)


# Workers and seats


@virtual
async def test_a_handler_that_does_not_suspend_costs_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand events are handled by the few tasks of the pool."""
    works, made = Works(), list[str]()
    async with serves(works):
        works.put("first")
        await until(lambda: works.handled == ["first"])
        loop = asyncio.get_running_loop()
        create_task = loop.create_task

        def counting(coro: Any, **more: Any) -> asyncio.Task[Any]:
            made.append(repr(coro))
            return create_task(coro, **more)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "create_task", counting)
            for number in range(1000):
                works.put(number, key=f"{number % 7}")
            await until(lambda: len(works.handled) == 1001)
    assert len(made) < 10


@virtual
@pytest.mark.parametrize("concurrency", [1, 3, 8])
async def test_no_more_handlers_run_than_concurrency(concurrency: int) -> None:
    """However many partitions and keys there are; and so many do."""
    works = Works(partitions=3, concurrency=concurrency)
    async with serves(works):
        for number in range(12):
            works.put(number, event="wait", partition=number % 3)
        await until(lambda: len(works.begun) == concurrency)
        await asyncio.sleep(10)
        assert concurrency == len(works.begun)


@virtual
async def test_reading_waits_for_no_handler() -> None:
    """While one is stuck the other keys of its partition, and other partitions, go on."""
    works = Works(partitions=2)
    async with serves(works):
        works.put("stuck", event="wait", key="a")
        works.put("behind", key="a")
        await until(lambda: works.begun == ["stuck"])
        works.put("another key", key="b")
        works.put("no key")
        works.put("another partition", key="a", partition=1)
        await until(lambda: len(works.handled) == 3)
        await asyncio.sleep(10)
        assert {"another key", "no key", "another partition"} == set(works.handled)
        assert {1: 1} == works.committed


@virtual
async def test_a_hot_partition_starves_no_other() -> None:
    """All its handlers are stuck, and more wait; the other partition's are handled at once."""
    works = Works(partitions=2, concurrency=4)
    async with serves(works):
        for number in range(50):
            works.put(number, event="wait")
        await until(lambda: len(works.begun) == 3)
        for _ in range(50):
            works.put("other", partition=1)
        began = _now()
        await until(lambda: works.committed == {1: 50})
        assert _now() - began < 2


@virtual
async def test_retries_of_a_hot_partition_starve_no_other() -> None:
    """They come back to their seats, but not to the one that is another partition's."""
    works = Works(
        partitions=2, concurrency=4, retry=RetryPolicy(attempts=2, base=1, cap=1, jitter=0)
    )

    @works.router.bind_event("stuck.later")
    async def stuck(event: EventObject) -> None:
        if event.attempt == 1:
            raise LookupError
        works.begun.append(event.data)
        await works.go.wait()

    async with serves(works):
        for number in range(20):
            works.put(number, event="stuck.later")
        await until(lambda: len(works.begun) >= 3)
        await asyncio.sleep(5)
        works.put("other", partition=1)
        await until(lambda: "other" in works.handled, within=5)


@virtual
async def test_keys_keep_their_order() -> None:
    """Each of many keys in its own order, however long its handlers take."""
    works = Works(partitions=2, concurrency=5)

    @works.router.bind_event("slow")
    async def slow(event: EventObject) -> None:
        await asyncio.sleep(event.data["number"] * 7 % 5 / 10)
        works.handled.append((event.data["key"], event.data["number"]))

    async with serves(works):
        for number in range(60):
            key = f"{number % 6}"
            data = {"key": key, "number": number}
            works.put(data, event="slow", key=key, partition=number % 2)
        await until(lambda: len(works.handled) == 60)
    for first in range(6):
        numbers = [one[1] for one in works.handled[:60] if one[0] == f"{first}"]
        assert list(range(first, 60, 6)) == numbers


# What is in flight


@virtual
@pytest.mark.parametrize(
    "limit",
    [{"in_flight_events": 20}, {"in_flight_bytes": 4000}],
    ids=lambda limit: next(iter(limit)),
)
async def test_only_the_full_partition_is_read_no_further(limit: dict[str, int]) -> None:
    """One whose handlers are stuck fills up; the others are read and handled on."""
    works = Works(partitions=2, **limit)
    async with serves(works) as broker:
        for number in range(3000):
            works.put(number, event="wait", key="a")
        await until(lambda: len(works.begun) == 1)
        for number in range(3000):
            works.put(number, partition=1)
        await until(lambda: works.committed == {1: 3000})
        subscription: Any = _engine(broker)._subscription
        assert subscription._positions[0] <= 500  # one fetch
        assert 1 == len(works.begun) - 3000


@virtual
async def test_nothing_is_fetched_while_everything_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for room instead of asking again and again, and goes on when there is some."""
    works, fetches = Works(in_flight_events=2, commit_interval=60), list[float]()
    fetch = MemorySubscription.fetch

    async def counting(self: MemorySubscription, *of: Any, **more: Any) -> Any:
        if self.topic == "Works":
            fetches.append(_now())
        return await fetch(self, *of, **more)

    async with serves(works):
        for number in range(40):
            works.put(number, event="wait")
        await until(lambda: len(works.begun) == 2)
        with monkeypatch.context() as patch:
            patch.setattr(MemorySubscription, "fetch", counting)
            began = _now()
            await asyncio.sleep(30)
        assert [] == [at for at in fetches if at > began + 1]


@virtual
@pytest.mark.parametrize("events", [1, 3, 10])
async def test_no_more_are_begun_than_may_be_uncommitted(events: int) -> None:
    """After a crash at most so many are handled again, however fast handlers are."""
    works, most = Works(in_flight_events=events), list[int]()

    @works.router.bind_event("count")
    async def count(event: EventObject) -> None:
        works.begun.append(event.data)
        most.append(len(works.begun) - works.committed.get(0, 0))
        if event.data % 3:
            await asyncio.sleep(0.001)

    async with serves(works):
        for number in range(200):
            works.put(number, event="count", key=f"{number % 5}")
        await until(lambda: len(works.begun) == 200)
    assert events == max(most)


@virtual
@pytest.mark.parametrize("events", [1, 2, 10])
async def test_the_event_that_all_commits_wait_for_can_always_begin(events: int) -> None:
    """Though others, which were read later, have used up all that may be in flight."""
    works = Works(in_flight_events=events)
    async with serves(works):
        works.put("first", event="wait", key="a")
        works.put("second", key="a")
        for number in range(300):
            works.put(number)
        await until(lambda: works.begun[:1] == ["first"])
        await asyncio.sleep(1)
        works.go.set()
        await until(lambda: works.committed == {0: 302})


@virtual
@pytest.mark.parametrize("kind", ["async", "plain", "task"])
async def test_what_a_handler_produces_holds_its_commit(kind: str) -> None:
    """Without an await, too, in a thread or in a task of its own: nothing is lost in a crash."""
    works = Works()
    works.cluster._node.create([TopicSpec("Other", 1)], "")

    @works.router.bind_event("async")
    async def produce(broker: BrokerManager) -> None:
        broker.produce("Other", EventObject(event="x"))

    @works.router.bind_event("plain")
    def produce_in_thread(broker: BrokerManager) -> None:
        broker.produce("Other", EventObject(event="x"))

    @works.router.bind_event("task")
    async def produce_in_task(broker: BrokerManager) -> None:
        await asyncio.create_task(produce(broker))

    async with serves(works):
        with works.cluster.hold_sends("Other"):
            works.put(event=kind)
            works.put("behind it")
            await until(lambda: len(works.cluster.records("Other")) == 1)
            await asyncio.sleep(5)
            assert ({}, ["behind it"]) == (works.committed, works.handled)
        await until(lambda: works.committed == {0: 2})


# Tasks that end, and bugs


@virtual
@pytest.mark.parametrize("when", ["it is idle", "it is woken", "its handler runs"])
async def test_a_worker_that_is_cancelled_is_replaced(when: str) -> None:
    """Whoever cancels it: what comes next is handled, and what it handled has failed."""
    works = Works(retry=RetryPolicy(attempts=1))
    async with serves(works) as broker:
        works.put("stuck", event="wait")
        works.put("first")
        await until(lambda: works.begun == ["stuck", "first"])
        tasks = _engine(broker)._workers
        handling = {work.task for work in _engine(broker)._lanes.working}
        [victim] = handling if when == "its handler runs" else tasks - handling
        assert victim is not None
        if when == "it is woken":
            works.put("second")
            async with asyncio.timeout(5):
                while not _engine(broker)._waking:  # noqa: ASYNC110  # for one turn only
                    await asyncio.sleep(0)
        victim.cancel()
        works.put("third")
        await until(lambda: "third" in works.handled)
    assert (["stuck"] if when == "its handler runs" else []) == works.dead


@virtual
async def test_a_worker_that_is_cancelled_while_its_event_waits_loses_nothing() -> None:
    """An event that waited for its next try has failed or is tried again, and commits go on."""
    works = Works(retry=RetryPolicy(attempts=2, base=1, jitter=0))

    @works.router.bind_event("fails")
    async def fails(event: EventObject) -> None:
        works.begun.append(event.data)
        raise LookupError

    async with serves(works) as broker:
        works.put("it", event="fails")
        await until(lambda: works.begun == ["it"])
        await turns(5)
        [work] = _engine(broker)._lanes.working
        assert work.task is not None
        work.task.cancel()
        await asyncio.sleep(5)
        assert {0: 1} == works.committed
    assert ["it"] == works.dead


def _breaks(*_: object) -> None:
    raise ZeroDivisionError


@virtual
@pytest.mark.parametrize("broken", ["next", "end", "add", "committed", "full"])
async def test_a_bug_of_the_engine_stops_the_broker(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is never a silent hang: the waits fail, it is not ready any more, the log has it."""
    works = Works(drain_timeout=1)
    async with leaves_nothing(works):
        broker = works.broker()
        await broker.init_consumer()
        monkeypatch.setattr(Lanes, broken, _breaks)
        asking = asyncio.create_task(broker.request("Works", "wait", timeout=60))
        works.put()
        done, _ = await asyncio.wait({asking}, timeout=30)
        monkeypatch.undo()
        try:
            assert {asking} == done
            assert isinstance(asking.exception(), BrokerClosedError)
            with pytest.raises(ZeroDivisionError):
                await broker.wait_closed()
            assert not broker.ready
            assert "the broker stops because one of its tasks died" in caplog.text
        finally:
            works.go.set()
            await broker.stop()
            with suppress(Exception):
                await asking


@virtual
async def test_a_commit_task_that_is_cancelled_from_outside() -> None:
    """Commits go on, or the broker stops and says so; they do not just end."""
    works = Works()
    async with leaves_nothing(works):
        broker = works.broker()
        await broker.init_consumer()
        works.put()
        await until(lambda: works.committed == {0: 1})
        [task] = [
            task
            for task in asyncio.all_tasks()
            if "_commit_regularly" in repr(task.get_coro())
            and task.get_coro().cr_frame.f_locals["self"] is _engine(broker)  # type: ignore[union-attr]  # ours
        ]
        task.cancel()
        works.put()
        await asyncio.sleep(5)
        assert not broker.ready or works.committed == {0: 2}
        await broker.stop()


# Rebalances and stops


@virtual
async def test_a_handler_that_runs_longer_than_its_share_of_a_rebalance() -> None:
    """It is cancelled, and its event handled again by whoever has the partition then."""
    works, cancelled = Works(rebalance_timeout=4), list[float]()

    @works.router.bind_event("long")
    async def long(event: EventObject) -> None:
        works.begun.append(event.data)
        try:
            await works.go.wait()
        except asyncio.CancelledError:
            cancelled.append(_now())
            raise
        works.handled.append(event.data)

    async with serves(works):
        works.put("long", event="long", key="a")
        works.put("next", key="a")
        await until(lambda: works.begun == ["long"])
        began = _now()
        works.cluster.rebalance("Works")
        await until(lambda: works.begun == ["long", "long"])
        assert [2] == [round(at - began, 1) for at in cancelled]
        works.go.set()
        await until(lambda: works.committed == {0: 2})
    assert ["long", "next"] == works.handled[:2]


@virtual
@pytest.mark.parametrize("after", [0, 0.5, 1, 1.5, 2, 3])
async def test_a_stop_during_a_rebalance(after: float) -> None:
    """Whenever it comes, it ends, and what had not ended is handled by the next one."""
    works = Works(rebalance_timeout=4, drain_timeout=1)
    async with leaves_nothing(works):
        broker = works.broker()
        await broker.init_consumer()
        engine = _engine(broker)
        works.put("first")
        works.put("long", event="wait")
        await until(lambda: works.begun == ["first", "long"])
        works.cluster.rebalance("Works")
        await asyncio.sleep(after)
        began = _now()
        await broker.stop()
        assert _now() - began < 6
        _check_empty(engine)
    works.go.set()
    async with serves(works):
        await until(lambda: works.handled == ["first", "long"])


@virtual
@pytest.mark.parametrize("count", range(0, 30, 2))
async def test_a_start_that_is_cancelled_leaves_nothing(count: int) -> None:
    """In whichever turn: no task, no member of a group; and it can be started again."""
    works = Works()
    async with leaves_nothing(works):
        broker = works.broker()
        starting = asyncio.create_task(broker.__aenter__())
        await turns(count)
        starting.cancel()
        await asyncio.wait({starting})
        if not starting.cancelled():
            await broker.__aexit__(None, None, None)
        await broker.stop()
    async with serves(works):
        pass


@virtual
@pytest.mark.parametrize("count", range(12))
async def test_a_start_that_finds_kafka_gone_half_way_leaves_nothing(count: int) -> None:
    """It has joined one group and not the other: the next try joins both once."""
    works = Works(start_timeout=1)
    async with leaves_nothing(works):
        starting = asyncio.create_task(works.broker().__aenter__())
        await turns(count)
        works.cluster.down()
        await asyncio.wait({starting})
        works.cluster.up()
        if starting.exception() is None:
            await starting.result().__aexit__(None, None, None)
        else:
            assert isinstance(starting.exception(), BrokerUnavailableError)
    async with serves(works):
        pass


@virtual
@pytest.mark.parametrize("count", range(0, 24, 2))
async def test_a_stop_that_is_cancelled_goes_on(count: int) -> None:
    """Cancelling the wait for it cancels nothing else."""
    works = Works()
    async with leaves_nothing(works):
        broker = works.broker()
        await broker.init_consumer()
        engine = _engine(broker)
        works.put("it", event="wait")
        await until(lambda: works.begun == ["it"])
        stopping = asyncio.create_task(broker.stop())
        await turns(count)
        stopping.cancel()
        await asyncio.wait({stopping})
        works.go.set()
        await broker.stop()
        _check_empty(engine)
    assert {0: 1} == works.committed


@virtual
@pytest.mark.parametrize("count", range(16))
async def test_a_request_that_is_cancelled_leaves_nothing(count: int) -> None:
    """In whichever turn: its wait is gone, and the next one is answered."""
    works = Works()
    async with serves(works) as broker:
        before = asyncio.all_tasks()
        asking = asyncio.create_task(broker.request("Works", "note", 1, timeout=5))
        await turns(count)
        asking.cancel()
        await asyncio.wait({asking})
        assert 0 == broker.consumer_storage.waiting
        assert 2 == (await broker.request("Works", "note", 2, timeout=5)).data
        left = asyncio.all_tasks() - before
        assert [] == [task for task in left if not task.get_name().endswith(" worker")]


@virtual
async def test_a_worker_does_not_outlive_a_stop() -> None:
    """Not even one whose handler was cancelled as the time of the stop was over."""
    works = Works(drain_timeout=1)
    async with leaves_nothing(works):
        async with works.broker() as broker:
            engine = _engine(broker)
            for number in range(3):
                works.put(number, event="wait")
            await until(lambda: len(works.begun) == 3)
        _check_empty(engine)


# All of it together

FAILING = {"raises", "cancelled", "never"}
ENDING = {"returns", "sleeps", "stubborn", "plain", "row"}


class Everything(Works):
    """Handlers of every kind, and a checker that watches them."""

    def __init__(self, partitions: int, **values: Any) -> None:
        super().__init__(
            partitions=partitions,
            drain_timeout=1,
            rebalance_timeout=2,
            commit_interval=0.02,
            handler_timeout=1,
            retry=RetryPolicy(attempts=2, base=0.05, jitter=0),
            **values,
        )
        self.kinds: dict[int, str] = {}
        self.lane_of: dict[int, object] = {}
        self.running: list[tuple[object, int]] = []
        self.ended: set[int] = set()
        self.faults: list[str] = []
        self.highest: dict[int, int] = {}
        for kind in ("returns", "sleeps", "raises", "cancelled", "never", "stubborn"):
            self.router.bind_event(kind)(self._handle)
        self.router.bind_event("plain")(self._handle_plain)
        # its limit counts while it waits for a seat, too
        self.router.bind_event("row", batch=3, within=0.03, timeout=60)(self._handle_row)

    def put_all(self, events: list[tuple[int, str | None, str]]) -> None:
        for partition, key, kind in events:
            partition %= self.partitions  # noqa: PLW2901  # as drawn, for fewer
            number = len(self.kinds)
            self.kinds[number] = kind
            self.lane_of[number] = None if key is None else (partition, key)
            self.put(number, event=kind, key=key, partition=partition)

    def _lane(self, number: int) -> list[int]:
        lane = self.lane_of[number]
        return [one for one in self.lane_of if lane is not None and self.lane_of[one] == lane]

    def _begins(self, where: object, *numbers: int) -> None:
        for number in numbers:
            lane = self._lane(number)
            beside = [
                one
                for there, one in self.running
                if there is where and one in lane and self.kinds[one] != "stubborn"
            ]
            if beside:
                self.faults.append(f"{number} runs beside {beside}")
            early = [
                one
                for one in lane
                if one < number
                and one not in self.ended
                and one not in numbers
                and self.kinds[one] in {"returns", "sleeps", "row"}
            ]
            if early:
                self.faults.append(f"{number} runs before {early}")
        self.running += [(where, number) for number in numbers]

    def _ends(self, where: object, *numbers: int) -> None:
        for number in numbers:
            self.running.remove((where, number))

    async def _handle(self, event: EventObject, broker: BrokerManager) -> None:
        number, kind = event.data, event.event
        self._begins(broker, number)
        try:
            await self._do(kind)
        finally:
            self._ends(broker, number)
        self.ended.add(number)

    async def _do(self, kind: str) -> None:
        if kind == "sleeps":
            await asyncio.sleep(0.1)
        elif kind == "raises":
            raise LookupError
        elif kind == "cancelled":
            raise asyncio.CancelledError
        elif kind == "never":
            await asyncio.Event().wait()
        elif kind == "stubborn":
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.8)
            await asyncio.sleep(0.3)

    def _handle_plain(self, event: EventObject) -> None:
        time.sleep(0)
        self.ended.add(event.data)

    async def _handle_row(self, events: list[EventObject], broker: BrokerManager) -> None:
        numbers = [event.data for event in events]
        self._begins(broker, *numbers)
        try:
            await asyncio.sleep(0.02)
        finally:
            self._ends(broker, *numbers)
        self.ended |= set(numbers)

    async def watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0.01)

    def look(self) -> None:
        """See to it that no committed offset goes down."""
        for partition, offset in self.committed.items():
            if offset < self.highest.get(partition, 0):
                self.faults.append(f"{partition} goes down to {offset}")
            self.highest[partition] = offset

    def is_done(self) -> bool:
        retries = Counter(one.partition for one in self.cluster.records("Works.retry"))
        postponed = self.cluster.committed("Works.retry", "Works.retry")
        return (self.end, retries) == (self.committed, postponed)

    def check(self) -> None:
        self.look()
        assert [] == self.faults
        assert ([], self.end) == (self.running, self.highest)
        dead, kinds = set(self.dead), self.kinds.items()
        failing = {number: kind for number, kind in kinds if kind in FAILING}
        assert {} == {number: kind for number, kind in failing.items() if number not in dead}
        ended = self.ended | dead
        assert {} == {number: kind for number, kind in kinds if number not in ended}
        well = {number: kind for number, kind in kinds if kind in {"returns", "sleeps", "row"}}
        assert {} == {number: kind for number, kind in well.items() if number in dead}


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([None, "a", "b"]),
        st.sampled_from([*sorted(ENDING | FAILING), "returns", "sleeps", "row"]),
    ),
    max_size=20,
)
FAULTS = ["nothing", "rebalance", "expel", "break", "restart", "second", "third off"]


@virtual
@settings(max_examples=40, deadline=None)
@given(
    partitions=st.integers(1, 3),
    concurrency=st.integers(1, 5),
    in_flight=st.integers(1, 30),
    steps=st.lists(
        st.tuples(EVENTS, st.sampled_from(FAULTS), st.sampled_from([0, 0.01, 0.1, 0.6, 3])),
        max_size=6,
    ),
)
async def test_every_event_ends(
    partitions: int,
    concurrency: int,
    in_flight: int,
    steps: list[tuple[list[tuple[int, str | None, str]], str, float]],
) -> None:
    """It is handled or a dead letter, keys in order and alone, and everything is committed."""
    works = Everything(partitions, concurrency=concurrency, in_flight_events=in_flight)
    async with leaves_nothing(works):
        watching = asyncio.create_task(works.watch())
        broker, second = works.broker(), works.broker()
        await broker.init_consumer()
        for events, fault, seconds in steps:
            works.put_all(events)
            await asyncio.sleep(seconds)
            if fault == "rebalance":
                works.cluster.rebalance("Works")
            elif fault == "expel":
                works.cluster.expel("Works")
            elif fault == "break":
                works.cluster.break_readers("Works")
            elif fault == "restart":
                await broker.stop()
                await broker.init_consumer()
            elif fault == "second":
                await second.init_consumer()
            elif fault == "third off":
                await second.stop()
        await until(works.is_done, within=60)
        engines = [_engine(one) for one in (broker, second) if one._run is not None]
        await broker.stop()
        await second.stop()
        watching.cancel()
        for engine in engines:
            _check_empty(engine)
    works.check()


def test_the_checker_has_eyes() -> None:
    """It sees a key in two handlers, one out of order, and an event that is nowhere."""
    works = Everything(1)
    works.kinds = {0: "returns", 1: "returns"}
    works.lane_of = {0: (0, "a"), 1: (0, "a")}
    works._begins("here", 1)
    works._begins("there", 0)
    works._begins("here", 0)
    assert ["1 runs before [0]", "0 runs beside [1]"] == works.faults
    works.faults, works.running = [], []
    with pytest.raises(AssertionError):
        works.check()
