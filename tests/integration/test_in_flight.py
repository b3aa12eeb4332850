"""What is in work when a replica stops or another joins, and records that nobody meant to send.

Each of these loses, doubles or skips a record in other frameworks.
"""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import pytest

from kafka_broker import BrokerManager, EventObject

from .checker import doubled, falling, lost, overlapping, unfinished
from .worker import ATTEMPTS, PAUSE

if TYPE_CHECKING:
    from .fleet import Fleet, Worker
    from .observer import Observer

pytestmark = pytest.mark.integration

UUID_BYTES: Final = b"\x8f" * 16
"""What Spring writes for a correlation id; it is not UTF-8."""


async def _work(source: BrokerManager, module: str, count: int, seconds: float) -> None:
    """Produce *count* events, each with a key of its own, and wait until they are in the log."""
    for number in range(count):
        event = EventObject(event="work", data={"number": number, "seconds": seconds})
        delivery = source.produce(module, event, key=f"k{number}")
    await delivery


def _envelope(number: int, event: str = "work", seconds: float = 0) -> bytes:
    data = {"number": number, "seconds": seconds}
    return json.dumps({"correlation_id": f"c{number}", "event": event, "data": data}).encode()


async def _shared_by(fleet: Fleet, observer: Observer, *replicas: Worker) -> None:
    names = {replica.instance for replica in replicas}

    def shared() -> bool:
        shares = observer.shares()
        return names == shares.keys() and all(shares.values())

    await fleet.until(f"{len(names)} replicas share the partitions", shared)


def _handled_once(fleet: Fleet, observer: Observer, count: int) -> None:
    handled = fleet.handlings()
    assert count == len(handled)
    assert [] == lost(range(count), handled)
    assert [] == doubled(handled)
    assert [] == overlapping(handled)
    assert [] == falling(observer.commits())
    assert [] == fleet.errors()


async def test_a_stop_doubles_nothing(
    fleet: Fleet, observer: Observer, source: BrokerManager
) -> None:
    """What is in the handlers of a replica that stops ends there, and runs nowhere else."""
    leaving, staying = await fleet.serve(), await fleet.serve()
    await _shared_by(fleet, observer, leaving, staying)
    await _work(source, fleet.module, 24, seconds=2)
    await fleet.until("all is in work", lambda: 24 == len(leaving.open() + staying.open()))
    assert leaving.open()
    await leaving.stop()
    await fleet.until("all is committed", observer.drained)
    await staying.stop()
    _handled_once(fleet, observer, 24)


async def test_a_replica_that_joins_doubles_nothing(
    fleet: Fleet, observer: Observer, source: BrokerManager
) -> None:
    """A record that is in work when its partition moves is not handled there again."""
    working = await fleet.serve()
    await _work(source, fleet.module, 24, seconds=4)
    await fleet.until("all is in work", lambda: 24 == len(working.open()))
    joining = await fleet.serve()
    await _shared_by(fleet, observer, working, joining)
    await fleet.until("all is committed", observer.drained)
    await asyncio.gather(working.stop(), joining.stop())
    _handled_once(fleet, observer, 24)


async def test_a_crash_repeats_what_was_not_committed(fleet: Fleet, observer: Observer) -> None:
    """After SIGKILL another handles what had no end, and what had ended beyond it; no more."""
    dying = await fleet.serve(module_partitions=1, session_timeout=6)
    for number in range(30):
        seconds = 3 if 10 <= number < 20 else 0
        observer.append(_envelope(number, seconds=seconds), key=f"k{number}".encode())
    quick = [*range(10), *range(20, 30)]
    await fleet.until("the quick ones are handled", lambda: not lost(quick, dying.handlings()))
    await fleet.until("the first are committed", lambda: observer.committed().get(0, 0) >= 10)
    await dying.kill()
    assert 10 == len(dying.open())
    following = await fleet.serve()
    await fleet.until("all is committed", lambda: {0: 30} == observer.committed())
    await following.stop()
    assert list(range(10, 30)) == sorted(one.number for one in following.handlings())
    assert [] == lost(range(30), fleet.handlings())
    assert [] == overlapping(fleet.handlings(), fleet.killed())


async def test_a_stop_leaves_no_gap_behind_a_slow_key(fleet: Fleet, observer: Observer) -> None:
    """What ended beyond the queue of a slow key is not repeated: a stop works that queue off."""
    leaving = await fleet.serve(module_partitions=1)
    for number in range(3):
        observer.append(_envelope(number, seconds=1), key=b"slow")
    for number in range(3, 20):
        observer.append(_envelope(number), key=f"k{number}".encode())
    quick = range(3, 20)
    await fleet.until("the others are handled", lambda: not lost(quick, leaving.handlings()))
    assert [0] == [one.number for one in leaving.open()]
    await leaving.stop()
    following = await fleet.serve()
    await fleet.until("all is committed", lambda: {0: 20} == observer.committed())
    await following.stop()
    _handled_once(fleet, observer, 20)


async def test_a_slow_key_does_not_block_its_partition(
    fleet: Fleet, observer: Observer, source: BrokerManager
) -> None:
    """However few events may be in flight, the one that all commits wait for is among them."""
    replica = await fleet.serve(module_partitions=1, in_flight_events=10)
    for number in range(40):
        about = {"number": number, "seconds": 0 if number > 1 else 1}
        key = f"k{max(number, 1)}"  # the first two have the same
        source.produce(fleet.module, EventObject(event="work", data=about), key=key)
    await fleet.until("all is committed", lambda: {0: 40} == observer.committed(), seconds=20)
    await replica.stop()
    _handled_once(fleet, observer, 40)


@pytest.mark.parametrize("concurrency", [1, 10])
async def test_a_stop_loses_nothing(
    fleet: Fleet, observer: Observer, source: BrokerManager, concurrency: int
) -> None:
    """What is committed at a stop was finished, and the next replica does exactly the rest."""
    leaving = await fleet.serve(concurrency=concurrency)
    await _work(source, fleet.module, 100, seconds=0.5)
    await fleet.until("it is in the middle", lambda: len(leaving.handlings()) > concurrency)
    await leaving.stop()
    begun = leaving.handlings()
    assert len(begun) < 100
    assert [] == [one for one in begun if one.outcome != "end"]
    assert [] == unfinished(observer.committed(), begun)
    following = await fleet.serve(concurrency=100)
    await fleet.until("all is committed", observer.drained)
    await following.stop()
    _handled_once(fleet, observer, 100)


async def test_poison_is_never_skipped(fleet: Fleet, observer: Observer) -> None:
    """Headers of any bytes are handled; a value that is no JSON is dead, and the next goes on."""
    replica = await fleet.serve(module_partitions=1)
    observer.append(_envelope(0), [("id", UUID_BYTES), ("kafka_correlationId", UUID_BYTES)])
    observer.append(_envelope(1), [("id", None), ("kafka_correlationId", None)])
    observer.append(b"\xff not JSON", [("id", UUID_BYTES), ("nothing", None)])
    observer.append(_envelope(2))
    await fleet.until("all is committed", lambda: {0: 4} == observer.committed())
    await replica.stop()
    assert [0, 1, 2] == [one.number for one in replica.handlings()]
    (letter,) = observer.dead_letters()
    assert (b"k", b"\xff not JSON") == (letter.key, letter.value)
    assert [("id", UUID_BYTES), ("nothing", None)] == letter.headers[:2]
    about = dict(letter.headers)
    assert f"{fleet.module}:0:2".encode() == about["kb-origin"]
    assert b"EventDecodeError" == about["kb-error"]


async def test_a_failing_handler_is_no_hot_loop(fleet: Fleet, observer: Observer) -> None:
    """A handler that fails has its tries, each a while after the last, and then a dead letter."""
    replica = await fleet.serve(module_partitions=1)
    observer.append(_envelope(0, "fails"))
    observer.append(_envelope(1))
    await fleet.until("all is committed", lambda: {0: 2} == observer.committed())
    await replica.stop()
    tries: list[Any] = [one for one in replica.handlings() if one.event == "fails"]
    assert list(range(1, ATTEMPTS + 1)) == [one.attempt for one in tries]
    for before, after in pairwise(tries):
        assert after.begin - before.end >= PAUSE / 2 * 1e9
    (letter,) = observer.dead_letters()
    assert _envelope(0, "fails") == letter.value
    assert [1] == [one.number for one in replica.handlings() if one.outcome == "end"]


async def test_a_retry_that_waits_at_a_stop_doubles_no_others(
    fleet: Fleet, observer: Observer
) -> None:
    """An event that rests before its next try does not make a stop repeat what ended behind it."""
    leaving = await fleet.serve(module_partitions=1)
    observer.append(_envelope(0, "fails.slowly"))
    for number in range(1, 20):
        observer.append(_envelope(number), key=f"k{number}".encode())
    others = range(1, 20)
    await fleet.until("the others are handled", lambda: not lost(others, leaving.handlings()))
    await leaving.stop()
    following = await fleet.serve()
    observer.append(_envelope(20), key=b"k20")
    await fleet.until("the last is handled", lambda: not lost([20], following.handlings()))
    await following.stop()
    handled = fleet.handlings()
    assert [] == [two for _, two in doubled(handled) if two.number in others]
    assert [] == lost(others, handled)
