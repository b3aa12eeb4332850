"""Handlers that fail, hang and block, in one service with others that must not notice."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import pytest

from kafka_broker import BrokerManager, EventObject
from kafka_broker.errors import RemoteError, ReplyTimeoutError

from .checker import lost
from .worker import ATTEMPTS, TIMEOUT

if TYPE_CHECKING:
    from .checker import Handling
    from .fleet import Fleet, Worker
    from .observer import Found, Observer

pytestmark = pytest.mark.integration

ADDED: Final = {"kb-origin", "kb-error", "kb-attempt"}
OTHERS: Final = range(100, 400)
FAILING: Final = {
    "fails": (1, b"LookupError", ATTEMPTS),
    "hangs": (2, b"HandlerTimeoutError", 1),
    "blocks": (3, b"HandlerTimeoutError", 1),
    "refuses": (4, b"Reject", 1),
}
"""The number, and what its dead letter says: the error, and how many tries there were."""


def _send(source: BrokerManager, module: str, name: str, number: int, seconds: float = 0) -> None:
    event = EventObject(event=name, data={"number": number, "seconds": seconds})
    source.produce(module, event, key=f"{name}-{number % 50}")


def _tries(replica: Worker, event: str) -> list[Handling]:
    return [one for one in replica.handlings() if one.event == event]


def _about(letter: Found) -> dict[str, bytes | None]:
    """Return what was added to a dead letter."""
    return {name: value for name, value in letter.headers if name in ADDED}


async def test_each_ends_as_documented_and_others_go_on(
    fleet: Fleet, observer: Observer, source: BrokerManager
) -> None:
    """Failing, hanging and blocking handlers hold up their own key only, and leave dead letters."""
    replica = await fleet.serve(drain_timeout=3)
    for name, (number, _, _) in FAILING.items():
        _send(source, fleet.module, name, number, seconds=TIMEOUT * 3)
    _send(source, fleet.module, "recovers", 5)
    _send(source, fleet.module, "later", 6, seconds=0.2)
    names = {*FAILING, "recovers", "later"}
    begun = lambda: names == {one.event for one in replica.handlings()}  # noqa: E731  # a condition
    await fleet.until("all have begun", begun)
    for number in OTHERS:
        _send(source, fleet.module, "work", number)
    await fleet.until("the others are handled", lambda: not lost(OTHERS, replica.handlings()))
    stuck = {one.event for one in replica.open()}
    assert {"hangs", "blocks"} <= stuck, "the others had to wait for a timeout"
    await fleet.until("all is committed", observer.drained)
    assert ["failed", "failed", "end"] == [one.outcome for one in _tries(replica, "recovers")]
    assert ["failed", "failed", "end"] == [one.outcome for one in _tries(replica, "later")]
    assert ["cut"] == [one.outcome for one in _tries(replica, "hangs")]
    assert [""] == [one.outcome for one in _tries(replica, "blocks")]
    expected = {}
    for name, (_, error, attempts) in FAILING.items():
        first, *_ = tries = _tries(replica, name)
        assert list(range(1, attempts + 1)) == [one.attempt for one in tries]
        expected[first.key.encode()] = {
            "kb-origin": f"{fleet.module}:{first.partition}:{first.offset}".encode(),
            "kb-error": error,
            "kb-attempt": b"%d" % attempts,
        }
    letters = observer.dead_letters()
    assert expected == {letter.key: _about(letter) for letter in letters}
    assert len(FAILING) == len(letters)
    await replica.stop()


async def test_a_request_past_its_deadline_is_not_executed(
    fleet: Fleet, observer: Observer, source: BrokerManager
) -> None:
    """A request that waits behind others until nobody waits for it any more is not handled."""
    replica = await fleet.serve(concurrency=1)
    _send(source, fleet.module, "work", 1, seconds=4)
    await fleet.until("it is busy", lambda: bool(replica.open()))
    with pytest.raises(ReplyTimeoutError):
        await source.request(fleet.module, "work", {"number": 2, "seconds": 0}, timeout=1.5)
    assert replica.open(), "it was busy all the time"
    _send(source, fleet.module, "work", 3)
    await fleet.until("all is committed", lambda: 3 == sum(observer.committed().values()))
    await replica.stop()
    assert [1, 3] == [one.number for one in replica.handlings()]


@pytest.mark.parametrize(("event", "error"), [("fails.slowly", "LookupError"), ("later", "later")])
async def test_a_try_past_the_deadline_is_not_waited_for(
    fleet: Fleet, source: BrokerManager, event: str, error: str
) -> None:
    """Who waits gets the error at once when another try would come after the deadline."""
    replica = await fleet.serve()
    began = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        await source.request(fleet.module, event, {"number": 1, "seconds": 600}, timeout=30)
    assert time.monotonic() - began < 15
    assert 500 <= caught.value.status
    await asyncio.wait_for(replica.stop(), 30)
    assert [(1, "failed")] == [(one.attempt, one.outcome) for one in replica.handlings()]
    assert error in f"{caught.value.detail} {caught.value.code}"
