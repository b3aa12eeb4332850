"""The faults of `kafka_broker.testing`: they do what they say, as often as they say."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import EventObject, EventRouter, Reject
from kafka_broker.errors import ConfigurationError, RemoteError
from kafka_broker.testing import InjectedError, delay, duplicate, fail_some

from .test_dispatch import serves
from .test_failures import ONCE, Shop, about, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_broker import Middleware

virtual = pytest.mark.looptime


class Line:
    """A handler inside of a fault, without a broker."""

    def __init__(self, *faults: Middleware) -> None:
        self.router = EventRouter("line", middleware=faults)
        self.handled: list[Any] = []
        self.router.bind_event("count")(self._count)

    async def _count(self, event: EventObject) -> int:
        self.handled.append(event.data)
        return len(self.handled)

    async def run(self, data: Any = None) -> Any:
        return await self.router.execute_event(EventObject(event="count", data=data))

    async def outcomes(self, count: int) -> list[Any]:
        """Run *count* events; returns their results, None for one that failed."""
        outcomes: list[Any] = []
        for _ in range(count):
            try:
                outcomes.append(await self.run())
            except InjectedError:
                outcomes.append(None)
        return outcomes


# duplicate


async def test_every_event_is_handled_twice() -> None:
    """The second result counts."""
    line = Line(duplicate())
    assert [2, 4, 6] == await line.outcomes(3)


async def test_some_events_are_handled_twice() -> None:
    """About as many as the share says; none with 0."""
    line = Line(duplicate(0.3, seed=7))
    await line.outcomes(1000)
    assert 250 < len(line.handled) - 1000 < 350
    never = Line(duplicate(0))
    assert [1, 2, 3] == await never.outcomes(3)


async def test_the_second_handling_sees_the_event_as_it_came() -> None:
    """What the first one did to it, however deep, the second one does not see."""
    seen: list[str] = []
    router = EventRouter("line", middleware=[duplicate()])

    @router.bind_event("spoil")
    async def spoil(event: EventObject) -> None:
        seen.append(f"{event.event} {event.data}")
        event.data["items"].append(1)
        event.event = "other"

    await router.execute_event(EventObject(event="spoil", data={"items": []}))
    assert ["spoil {'items': []}"] * 2 == seen


async def test_a_first_handling_that_fails_has_failed() -> None:
    """Then there is no second one."""
    line = Line(duplicate(), fail_some(1, after=True))
    assert [None] == await line.outcomes(1)
    assert 1 == len(line.handled)


@virtual
async def test_a_broker_handles_events_twice() -> None:
    """The requester gets one reply, that of the second, and both know record and attempt."""
    shop = Shop(duplicate(), retry=ONCE)
    seen: list[Any] = []

    @shop.router.bind_event("count")
    async def count(event: EventObject) -> int:
        assert event.record is not None
        seen.append((event.record.offset, event.attempt, event.data))
        return len(seen)

    async with shop.broker() as broker:
        assert 2 == (await broker.request("Bank", "count", "it", timeout=5)).data
        assert [2] == shop.replies
    assert [(0, 1, "it")] * 2 == seen


# fail_some


async def test_about_half_of_the_tries_fail() -> None:
    """Those that fail do not reach the handler."""
    line = Line(fail_some(seed=7))
    outcomes = await line.outcomes(1000)
    assert 450 < outcomes.count(None) < 550
    assert 1000 - outcomes.count(None) == len(line.handled)


@pytest.mark.parametrize(("share", "expected"), [(0, [1, 2, 3]), (1, [None] * 3)])
async def test_none_or_all_fail(share: float, expected: list[int | None]) -> None:
    """The ends of the share are exact."""
    assert expected == await Line(fail_some(share)).outcomes(3)


async def test_a_failure_after_the_handler() -> None:
    """It has run, and what it returned is lost."""
    line = Line(fail_some(1, after=True))
    assert [None] * 3 == await line.outcomes(3)
    assert 3 == len(line.handled)


async def test_a_failure_of_the_users_own() -> None:
    """Each failure is a new exception, of the kind that was asked for."""
    made: list[Exception] = []

    def refuse() -> Exception:
        made.append(Reject(409))
        return made[-1]

    line = Line(fail_some(1, error=refuse))
    for number in range(2):
        with pytest.raises(Reject) as caught:
            await line.run()
        assert made[number] is caught.value


@pytest.mark.parametrize("fault", [duplicate, fail_some])
async def test_a_seed_makes_the_choice_repeatable(fault: Callable[..., Middleware]) -> None:
    """With one seed the same events are chosen; with another others are."""
    runs = [await Line(fault(0.5, seed=seed)).outcomes(50) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@virtual
async def test_a_broker_tries_again_what_was_made_to_fail() -> None:
    """The fault meets each try anew, and is a failure like any other."""
    shop = Shop(fail_some(1))
    async with shop.broker() as broker:
        with pytest.raises(RemoteError, match="InjectedError in the handler"):
            await broker.request("Bank", "note", timeout=5)
    assert [2, 1] == shop.metrics.of("events_retried", "events_failed")
    assert [] == shop.handled


# delay


@virtual
async def test_a_delay_comes_before_the_handler() -> None:
    """Of exactly so many seconds."""
    shop, began = Shop(delay(3)), list[float]()

    @shop.router.bind_event("work")
    async def work() -> None:
        began.append(now())

    async with serves(shop) as broker:
        asked = now()
        await broker.request("Bank", "work", timeout=5)
    assert about(3) == [began[0] - asked]


@virtual
async def test_a_delay_by_chance() -> None:
    """It is between its ends, differs from try to try, and a seed repeats it."""

    async def measured(seed: int) -> list[float]:
        line, times = Line(delay(1, up_to=3, seed=seed)), list[float]()
        for _ in range(20):
            began = now()
            await line.run()
            times.append(round(now() - began, 3))
        return times

    runs = [await measured(seed) for seed in (1, 1, 2)]
    assert all(1 <= time <= 3 for time in runs[0])
    assert 15 < len(set(runs[0]))
    assert pytest.approx(runs[0], abs=0.002) == runs[1]
    assert pytest.approx(runs[0], abs=0.002) != runs[2]


@virtual
async def test_a_delay_may_be_cancelled() -> None:
    """The time limit of a handler includes it."""
    shop = Shop(delay(60), retry=ONCE, handler_timeout=1)
    async with shop.broker() as broker:
        with pytest.raises(RemoteError, match="did not end within 1 s"):
            await broker.request("Bank", "note", timeout=5)
    assert [] == shop.handled


async def test_no_delay() -> None:
    """Zero seconds are allowed."""
    assert 1 == await asyncio.wait_for(Line(delay(0)).run(), 1)


# Arguments


@pytest.mark.parametrize("fault", [duplicate, fail_some])
@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf])
def test_a_share_is_from_0_to_1(fault: Callable[..., Middleware], share: float) -> None:
    """Another is a ConfigurationError when the fault is made."""
    with pytest.raises(ConfigurationError, match="a share is from 0 to 1"):
        fault(share)


@pytest.mark.parametrize(
    ("seconds", "up_to"),
    [(-1, None), (2, 1), (-1, 1), (math.nan, None), (1, math.nan), (math.inf, None), (0, math.inf)],
)
def test_a_delay_is_from_less_to_more(seconds: float, up_to: float | None) -> None:
    """Seconds that are negative, in the wrong order or no number of seconds are refused."""
    with pytest.raises(ConfigurationError, match="seconds <= up_to"):
        delay(seconds, up_to=up_to)
