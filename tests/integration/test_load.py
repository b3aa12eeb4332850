"""Many events with many keys, while replicas come, go, die and freeze."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from kafka_broker import BrokerManager, EventObject

from .checker import (
    doubled,
    falling,
    lost,
    out_of_order,
    overlapping,
    unexplained,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .checker import Handling
    from .fleet import Fleet, Worker
    from .observer import Observer

pytestmark = pytest.mark.integration

EVENTS: Final = 50_000
PARTITIONS: Final = 12
CONCURRENCY: Final = 200
IN_FLIGHT: Final = 1_000
SESSION: Final = 6.0
CHANGES: Final = "add kill add stop add kill stop add add kill stop add"


async def _all_share(fleet: Fleet, observer: Observer, count: int) -> None:
    def shared() -> bool:
        shares = observer.shares()
        return count == len(shares) and all(shares.values())

    await fleet.until(f"{count} replicas share the partitions", shared)


async def _drained(fleet: Fleet, observer: Observer, seconds: float = 90) -> None:
    await fleet.until("all is committed", observer.drained, seconds)


def _nothing_is_wrong(fleet: Fleet, observer: Observer, events: int) -> None:
    handled = fleet.handlings()
    assert [] == lost(range(events), handled)
    assert [] == doubled(handled)
    assert [] == out_of_order(handled)
    assert [] == overlapping(handled)
    assert [] == falling(observer.commits())
    assert [] == fleet.errors()


async def test_one_replica_handles_many_keys_at_once(fleet: Fleet, observer: Observer) -> None:
    """50,000 events run side by side, each once, each key in order and never two at a time."""
    replica = await fleet.serve(concurrency=CONCURRENCY)
    source = await fleet.produce(EVENTS)
    await source.ended()
    await _drained(fleet, observer)
    await replica.stop()
    _nothing_is_wrong(fleet, observer, EVENTS)
    assert CONCURRENCY // 2 < _most_at_once(fleet.handlings()) <= CONCURRENCY


def _most_at_once(handled: list[Handling]) -> int:
    """Return how many handlings ran at the same time, at the most."""
    steps = [(one.begin, 1) for one in handled] + [(one.end or one.begin, -1) for one in handled]
    now = most = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most


async def test_replicas_come_go_and_die(fleet: Fleet, observer: Observer) -> None:
    """Whatever happens to replicas, no event is lost; only a kill doubles, what was in flight."""
    settings = {
        "concurrency": CONCURRENCY,
        "in_flight_events": IN_FLIGHT,
        "session_timeout": SESSION,
        "commit_interval": 0.05,  # a commit of what has not ended would be there when a kill comes
    }
    alive = [await fleet.serve(**settings), await fleet.serve(**settings)]
    await _all_share(fleet, observer, 2)
    source = await fleet.produce(EVENTS, at_once=10_000, per_second=1_100)
    stopping: list[asyncio.Task[None]] = []
    for step, change in enumerate(CHANGES.split()):
        await fleet.until(f"step {step}", _has_produced(source, 10_000 + step * 3_300))
        if change == "add":
            alive.append(await fleet.start("serve", **settings))
        elif change == "kill":
            await _ready(fleet, alive[0])
            await alive.pop(0).kill()
        else:
            await _ready(fleet, alive[0])
            stopping.append(asyncio.create_task(alive.pop(0).stop()))
    await source.ended()
    await _drained(fleet, observer)
    await asyncio.gather(*stopping, *(replica.stop() for replica in alive))
    handled, killed = fleet.handlings(), fleet.killed()
    doubles = doubled(handled)
    assert [] == lost(range(EVENTS), handled)
    assert [] == unexplained(doubles, killed)
    for pid in killed:
        assert sum(first.pid == pid for first, _ in doubles) <= IN_FLIGHT
    assert [] == out_of_order(handled)
    assert [] == overlapping(handled, killed)
    assert [] == falling(observer.commits())
    assert [] == fleet.errors()


def _has_produced(source: Worker, count: int) -> Callable[[], bool]:
    def condition() -> bool:
        produced = source.entries("produced")
        return bool(produced) and produced[-1]["count"] >= count

    return condition


async def _ready(fleet: Fleet, replica: Worker) -> None:
    await fleet.until(f"{replica.name} is ready", lambda: replica.ready)


async def test_rolling_restart(fleet: Fleet, observer: Observer) -> None:
    """Replicas that are replaced one after the other by SIGTERM lose and double nothing."""
    old = [await fleet.serve(concurrency=CONCURRENCY) for _ in range(3)]
    await _all_share(fleet, observer, 3)
    source = await fleet.produce(EVENTS, at_once=3_000, per_second=1_000)
    await fleet.until("the load has begun", _has_produced(source, 3_000))
    new = []
    for replica in old:
        starting = asyncio.create_task(fleet.serve(concurrency=CONCURRENCY))
        await replica.stop()
        new.append(await starting)
    await source.stop()
    events = source.entries("produced")[-1]["count"]
    assert events < EVENTS, "the load lasts longer than the restart"
    await _drained(fleet, observer)
    await asyncio.gather(*(replica.stop() for replica in new))
    _nothing_is_wrong(fleet, observer, events)


async def test_a_frozen_replica_comes_back(
    fleet: Fleet, observer: Observer, source: BrokerManager
) -> None:
    """A replica that sleeps through its session commits nothing late, and then works again."""
    settings = {"session_timeout": SESSION, "in_flight_events": IN_FLIGHT}
    frozen, other = await fleet.serve(**settings), await fleet.serve(**settings)
    await _all_share(fleet, observer, 2)
    _produce(source, fleet.module, range(600), seconds=0.5)
    await fleet.until("both work", lambda: len(frozen.open()) > 5 and len(other.open()) > 5)
    frozen.freeze()
    held = {(one.partition, one.offset) for one in frozen.open()}
    await fleet.until("another has taken over", lambda: _has_begun(other, held))
    frozen.wake()
    await _drained(fleet, observer)
    await _all_share(fleet, observer, 2)
    _produce(source, fleet.module, range(600, 1_200), seconds=0.01)
    await _drained_after(fleet, observer, 1_200)
    await asyncio.gather(frozen.stop(), other.stop())
    handled = fleet.handlings()
    assert [] == lost(range(1_200), handled)
    assert [] == falling(observer.commits())
    assert observer.ends() == observer.committed()
    assert any(one.number >= 600 for one in frozen.handlings())
    sound = [one for one in handled if one.pid == other.pid or one.number >= 600]
    assert [] == doubled(sound)
    assert [] == out_of_order(sound)
    assert [] == overlapping(sound)
    assert len(doubled(handled)) <= IN_FLIGHT
    assert [] == fleet.errors()


def _produce(source: BrokerManager, module: str, numbers: range, seconds: float) -> None:
    for number in numbers:
        event = EventObject(event="work", data={"number": number, "seconds": seconds})
        source.produce(module, event, key=f"k{number % 60}")


def _has_begun(replica: Worker, places: set[tuple[int, int]]) -> bool:
    return any((one.partition, one.offset) in places for one in replica.handlings())


async def _drained_after(fleet: Fleet, observer: Observer, count: int) -> None:
    """Wait until *count* events are in the topic and committed."""
    await fleet.until(
        f"all {count} are committed",
        lambda: count == sum(observer.committed().values()) and observer.drained(),
    )
