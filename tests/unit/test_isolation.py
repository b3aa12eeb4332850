"""What one handler does to its task or its context harms no other event."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import EventObject, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker.errors import RemoteError

from .test_dispatch import Bank, serves, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_broker._middleware import Handle

virtual = pytest.mark.looptime

SHORT = RetryPolicy(attempts=3, base=0.01, jitter=0)
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


# What is no Exception


class PanicError(BaseException):
    """As a library in another language raises it."""


async def _panics() -> None:
    raise PanicError


async def _exits() -> None:
    raise SystemExit(3)


def _panics_in_a_thread() -> None:
    raise PanicError


def _exits_in_a_thread() -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("handler", [_panics, _exits, _panics_in_a_thread, _exits_in_a_thread])
async def test_a_handler_that_raises_no_exception_has_failed(handler: Callable[[], Any]) -> None:
    """The one who asked is told, what nobody awaits is buried, and the next event is handled."""
    bank = Bank(retry=SHORT)
    bank.router.bind_event("dies")(handler)
    async with serves(bank) as broker:
        with pytest.raises(RemoteError, match="HandlerDiedError in the handler") as caught:
            await broker.request("Bank", "dies", timeout=5)
        assert "handler-failed" == caught.value.code
        bank.put(event="dies")
        await until(lambda: bank.committed == 2)
    [letter] = bank.cluster.records("Bank.dlq")
    about = dict(letter.headers)
    assert (b"HandlerDiedError", b"Bank:0:1") == (about[wire.FAILURE], about[wire.ORIGIN])


@virtual
async def test_a_handler_that_raises_no_exception_is_tried_again() -> None:
    """As after any other failure: its second try may return."""
    bank = Bank(retry=SHORT)

    @bank.router.bind_event("dies")
    async def dies(event: EventObject) -> int:
        if event.attempt == 1:
            raise PanicError
        return event.attempt

    async with serves(bank) as broker:
        assert 2 == (await broker.request("Bank", "dies", timeout=5)).data


# Context variables


def _in_middleware(handle: Handle) -> Handle:
    async def tenancy(event: EventObject) -> Any:
        if event.data is not None:
            tenant.set(event.data)
        return await handle(event)

    return tenancy


def _asks_who(bank: Bank) -> list[str]:
    """Bind a handler that notes which tenant it sees, and keeps its seat for a while."""
    seen: list[str] = []

    @bank.router.bind_event("who")
    async def who() -> None:
        seen.append(tenant.get())
        await asyncio.sleep(0.01)

    return seen


@virtual
@pytest.mark.parametrize("sets", ["handler", "middleware"])
async def test_a_variable_of_an_event_between_its_tries_is_seen_by_no_other(sets: str) -> None:
    """Neither while it rests nor afterwards, whichever seat the other gets."""
    bank = Bank(
        concurrency=2,
        retry=RetryPolicy(attempts=2, base=0.1, jitter=0),
        middleware=[_in_middleware] if sets == "middleware" else [],
    )
    seen = _asks_who(bank)

    @bank.router.bind_event("fails")
    async def fails(event: EventObject) -> None:
        tenant.set("Alice")
        await asyncio.sleep(0.01)
        if event.attempt == 1:
            raise LookupError

    async with serves(bank):
        for _ in range(2):
            bank.put("Alice", event="fails")
        for _ in range(20):
            bank.put(event="who")
        await until(lambda: bank.committed == 22)
        for _ in range(4):
            bank.put(event="who")
        await until(lambda: bank.committed == 26)
    assert ["nobody"] * 24 == seen


@virtual
async def test_a_variable_of_an_event_in_a_batch_is_seen_by_no_other() -> None:
    """Its seat goes to others while it waits for the batch to fill."""
    bank = Bank(concurrency=1, middleware=[_in_middleware])
    seen = _asks_who(bank)

    @bank.router.bind_event("row", batch=10, within=1)
    async def row(events: list[EventObject]) -> None:
        tenant.set(str(len(events)))

    async with serves(bank):
        for _ in range(4):
            bank.put("Alice", event="row")
        for _ in range(10):
            bank.put(event="who")
        await until(lambda: bank.committed == 14)
        for _ in range(4):
            bank.put(event="who")
        await until(lambda: bank.committed == 18)
    assert ["nobody"] * 14 == seen
