"""What users put around handlers: in which order, how often, and what it may do there."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker import BrokerManager, EventObject, EventRouter, Reject
from kafka_broker.errors import ConfigurationError, RemoteError

from .test_dispatch import serves
from .test_failures import ONCE, Shop, until

if TYPE_CHECKING:
    from kafka_broker import Handle, Middleware

virtual = pytest.mark.looptime

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


def named(name: str, calls: list[str]) -> Middleware:
    """Return a middleware that notes when it is entered and left."""

    def wrap(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            calls.append(name)
            try:
                return await handle(event)
            finally:
                calls.append(f"/{name}")

        return around

    return wrap


def routed(parent: EventRouter, *routers: EventRouter) -> EventRouter:
    """Mount each router in the one before."""
    above = parent
    for router in routers:
        above.include_binder(router)
        above = router
    return parent


async def run(router: EventRouter, event: str, data: object = None) -> Any:
    return await router.execute_event(EventObject(event=event, data=data))


async def test_middleware_is_given_a_function_with_a_name() -> None:
    """So that it can say what it wraps, and `functools.wraps` works."""
    names: list[str] = []

    def wrap(handle: Handle) -> Handle:
        names.append(handle.__qualname__)
        return handle

    router = EventRouter("module", middleware=[wrap])
    router.bind_event("one")(returns_data)
    router.bind_event("all")(takes_nothing)
    assert 1 == await run(router, "one", 1)
    assert await run(router, "all") is None
    assert 2 == len(names)


async def returns_data(event: EventObject) -> Any:
    return event.data


async def takes_nothing() -> None: ...


# Order


@virtual
async def test_the_order_from_the_outside_in() -> None:
    """The broker's, that of its router, that of the routers below; of each the first outermost."""
    calls: list[str] = []
    shop = Shop(named("broker 1", calls), named("broker 2", calls))
    shop.router = EventRouter("Bank", middleware=[named("top 1", calls), named("top 2", calls)])
    inner = EventRouter("inner", middleware=[named("inner", calls)])
    routed(shop.router, EventRouter("middle", middleware=[named("middle", calls)]), inner)

    @inner.bind_event("event")
    async def handler() -> str:
        calls.append("handler")
        return "done"

    async with shop.broker() as broker:
        assert "done" == (await broker.request("Bank", "middle.inner.event", timeout=5)).data
    names = ["broker 1", "broker 2", "top 1", "top 2", "middle", "inner"]
    assert [*names, "handler", *(f"/{name}" for name in reversed(names))] == calls


async def test_a_router_in_two_parents_has_the_middleware_of_each() -> None:
    """By the name in one parent an event goes through the middleware of that parent only."""
    calls: list[str] = []
    shared = EventRouter("shared", middleware=[named("shared", calls)])
    shared.bind_event("before")(lambda: None)
    one = routed(EventRouter("one", middleware=[named("one", calls)]), shared)
    two = routed(EventRouter("two", middleware=[named("two", calls)]), shared)
    top = EventRouter("top", middleware=[named("top", calls)])
    top.include_binder(one)
    top.include_binder(two)
    shared.bind_event("after")(lambda: None)
    for event in ("before", "after"):
        for parent in ("one", "two"):
            calls.clear()
            await run(top, f"{parent}.shared.{event}")
            assert ["top", parent, "shared", "/shared", f"/{parent}", "/top"] == calls
        calls.clear()
        await run(one, f"shared.{event}")
        assert ["one", "shared", "/shared", "/one"] == calls
        calls.clear()
        await run(shared, event)
        assert ["shared", "/shared"] == calls


@pytest.mark.parametrize("pattern", ["exact", "*.exact", "#"])
async def test_binds_that_are_added_later_have_it_too(pattern: str) -> None:
    """Whether a router is included or bound to first does not matter, patterns included."""
    calls: list[str] = []
    child = EventRouter("child", middleware=[named("child", calls)])
    parent = routed(EventRouter("parent", middleware=[named("parent", calls)]), child)
    child.bind_event(pattern)(lambda: None)
    await run(parent, f"child.{pattern.replace('*', 'word')}")
    assert ["parent", "child", "/child", "/parent"] == calls


async def test_routers_beside_each_other_share_nothing() -> None:
    """The middleware of one is not put around the handlers of the other."""
    calls: list[str] = []
    top = EventRouter("top")
    for name in ("one", "two"):
        router = EventRouter(name, middleware=[named(name, calls)])
        router.bind_event("event")(lambda: None)
        top.include_binder(router)
    top.bind_event("own")(lambda: None)
    await run(top, "one.event")
    await run(top, "own")
    assert ["one", "/one"] == calls


# How often


@virtual
async def test_it_is_run_once_for_each_try() -> None:
    """It sees the number of the try, and each failure."""
    tries: list[tuple[int, str | None]] = []

    def counted(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            try:
                result = await handle(event)
            except LookupError as exc:
                tries.append((event.attempt, type(exc).__name__))
                raise
            tries.append((event.attempt, None))
            return result

        return around

    shop = Shop(counted)
    shop.fails(2)
    async with shop.broker() as broker:
        assert 3 == (await broker.request("Bank", "fails", timeout=5)).data
    assert [(1, "LookupError"), (2, "LookupError"), (3, None)] == tries


@virtual
async def test_it_is_not_run_without_a_handler() -> None:
    """Nor for an event whose requester waits no longer."""
    calls: list[str] = []
    shop = Shop(named("broker", calls))
    late = [("kafka_replyTopic", b"Bank.replies"), ("kb-deadline", b"1")]
    async with shop.broker():
        shop.put(event="unknown")
        shop.put(event="note", headers=late)
        await until(lambda: shop.committed == 2)
    assert [] == calls


async def test_it_is_made_once_for_each_handler() -> None:
    """Wrapping is done ahead of the events, not for each of them."""
    wrapped: list[int] = []

    def counted(handle: Handle) -> Handle:
        wrapped.append(1)
        return handle

    shop = Shop(counted)
    async with serves(shop) as broker:
        for number in range(5):
            await broker.request("Bank", "note", number, timeout=5)
    assert [1] == wrapped


# What it may do


@virtual
async def test_it_may_change_the_event_and_the_result() -> None:
    """The handler sees a changed copy, the requester a changed result."""

    def doubling(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            result = await handle(event.model_copy(update={"data": event.data * 2}))
            return {"result": result}

        return around

    shop = Shop(doubling)
    async with shop.broker() as broker:
        assert {"result": 14} == (await broker.request("Bank", "note", 7, timeout=5)).data
    assert [14] == shop.handled


@virtual
@pytest.mark.parametrize("deep", [True, False])
async def test_it_may_hand_on_a_copy(*, deep: bool) -> None:
    """A copy, deep or not, still knows its record, its attempt and where its reply goes."""

    def copying(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            return await handle(event.model_copy(deep=deep))

        return around

    shop, seen = Shop(copying, retry=ONCE), list[Any]()

    @shop.router.bind_event("answers")
    async def answers(event: EventObject, broker: BrokerManager) -> None:
        assert event.record is not None
        seen.append((event.record.offset, event.attempt))
        event.event, event.data = "respond", "answer"
        broker.produce("Bank", event)

    async with shop.broker() as broker:
        assert "answer" == (await broker.request("Bank", "answers", timeout=5)).data
    assert ["answer"] == shop.replies
    assert [(0, 1)] == seen


@virtual
async def test_it_may_answer_without_the_handler() -> None:
    """What it returns is the reply."""

    def cached(_: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            return f"cached {event.data}"

        return around

    shop = Shop(cached)
    async with shop.broker() as broker:
        assert "cached 7" == (await broker.request("Bank", "note", 7, timeout=5)).data
    assert [] == shop.handled


@virtual
async def test_it_may_make_a_success_of_a_failure() -> None:
    """An exception that it does not let through is none: no further try, no dead letter."""

    def forgiving(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            try:
                return await handle(event)
            except LookupError:
                return "forgiven"

        return around

    shop = Shop(forgiving)
    shop.fails(9)
    async with shop.broker() as broker:
        assert "forgiven" == (await broker.request("Bank", "fails", timeout=5)).data
    assert (1, []) == (len(shop.tries), shop.dead)


@virtual
@pytest.mark.parametrize("after", [True, False])
async def test_an_exception_in_it_is_a_failure(*, after: bool) -> None:
    """Before or after the handler: tried again, then an error reply or a dead letter."""
    tries: list[int] = []

    def failing(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            tries.append(event.attempt)
            if after:
                await handle(event)
            raise LookupError

        return around

    shop = Shop(failing)
    async with shop.broker() as broker:
        with pytest.raises(RemoteError, match="LookupError in the handler"):
            await broker.request("Bank", "note", "it", timeout=5)
        shop.put("it")
        await until(lambda: shop.committed == 2)
    assert [1, 2, 3] * 2 == tries
    assert ["it"] * (6 if after else 0) == shop.handled
    assert [b"Bank:0:1"] == shop.dead


@virtual
@pytest.mark.parametrize("ends", ["raises", "returns"])
async def test_it_may_refuse(ends: str) -> None:
    """A verdict of a middleware counts like one of the handler."""

    def strict(_: Handle) -> Handle:
        async def around(_: EventObject) -> Any:
            verdict = Reject(403, code="forbidden")
            if ends == "raises":
                raise verdict
            return verdict

        return around

    shop = Shop(strict)
    async with shop.broker() as broker:
        with pytest.raises(RemoteError) as caught:
            await broker.request("Bank", "note", timeout=5)
    assert (403, "forbidden") == (caught.value.status, caught.value.code)
    assert [] == shop.handled


@virtual
async def test_it_sees_the_cancellation_of_a_timeout() -> None:
    """When the handler's time is over it can clean up, and lets the CancelledError through."""
    seen: list[str] = []

    def watching(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            try:
                return await handle(event)
            except BaseException as exc:
                seen.append(type(exc).__name__)
                raise

        return around

    shop = Shop(watching, retry=ONCE)

    @shop.router.bind_event("hangs", timeout=1)
    async def hangs() -> None:
        await asyncio.Event().wait()

    async with shop.broker() as broker:
        with pytest.raises(RemoteError, match="did not end within 1 s"):
            await broker.request("Bank", "hangs", timeout=5)
    assert ["CancelledError"] == seen


# Without a broker


async def test_execute_event_runs_that_of_the_routers_once() -> None:
    """In the user's own loop there is no retry: what is raised comes to the one who called."""
    calls: list[str] = []
    router = EventRouter("top", middleware=[named("router", calls)])

    @router.bind_event("fails")
    async def fails() -> None:
        calls.append("handler")
        raise LookupError

    with pytest.raises(LookupError):
        await run(router, "fails")
    assert ["router", "handler", "/router"] == calls


@virtual
async def test_execute_event_leaves_out_that_of_the_broker() -> None:
    """A router that a broker has runs without the broker's middleware when a user calls it."""
    calls: list[str] = []
    shop = Shop(named("broker", calls))
    async with shop.broker():
        assert "data" == await run(shop.router, "note", "data")
    assert [] == calls


# The broker as a parameter


@pytest.mark.parametrize("plain", [True, False])
async def test_a_handler_is_given_the_broker_that_runs_it(*, plain: bool) -> None:
    """By annotation, beside event and payload; with one router, each replica gives itself."""
    shop, given = Shop(), list[BrokerManager]()

    async def handler(data: int, broker: BrokerManager, *, event: EventObject) -> str:
        given.append(broker)
        return f"{event.event} {data}"

    def plain_handler(data: int, broker: BrokerManager, *, event: EventObject) -> str:
        given.append(broker)
        return f"{event.event} {data}"

    shop.router.bind_event("ask")(plain_handler if plain else handler)
    replicas = []
    for _ in range(2):
        async with shop.broker() as broker:
            replicas.append(broker)
            assert "ask 7" == (await broker.request("Bank", "ask", 7, timeout=5)).data
    assert replicas == given


async def test_without_a_broker_there_is_none_to_give() -> None:
    """A handler that asks for it says so when a user's own loop runs it."""
    router = EventRouter("top")

    @router.bind_event("ask")
    async def ask(broker: BrokerManager) -> None:
        raise AssertionError(broker)

    with pytest.raises(ConfigurationError, match="asks for a BrokerManager"):
        await run(router, "ask")


# Context variables


@virtual
async def test_a_context_variable_ends_with_its_event() -> None:
    """What a handler sets is not seen by the next event, the next try or the broker's own tasks."""
    shop, seen = Shop(concurrency=1), list[str]()

    @shop.router.bind_event("sets")
    async def sets(event: EventObject) -> None:
        seen.append(tenant.get())
        tenant.set(f"{event.data}")
        if event.attempt == 1:
            await asyncio.sleep(0.1)
            seen.append(tenant.get())

    async with shop.broker():
        for number in range(3):
            shop.put(number, event="sets")
        await until(lambda: shop.committed == 3)
    assert ["nobody", "0", "nobody", "1", "nobody", "2"] == seen
    assert "nobody" == tenant.get()


@virtual
async def test_events_side_by_side_do_not_see_each_other() -> None:
    """Each handler that waits finds what it has set itself."""
    shop, seen = Shop(), dict[int, str]()

    @shop.router.bind_event("sets")
    async def sets(event: EventObject) -> None:
        tenant.set(f"{event.data}")
        await asyncio.sleep(1 - event.data / 10)
        seen[event.data] = tenant.get()

    async with shop.broker():
        for number in range(5):
            shop.put(number, event="sets")
        await until(lambda: len(seen) == 5)
    assert {number: f"{number}" for number in range(5)} == seen


@virtual
async def test_a_task_of_a_handler_inherits_its_context() -> None:
    """What middleware and handler have set is seen there, also after the handler has returned."""

    def setting(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            tenant.set("of the middleware")
            return await handle(event)

        return around

    shop, seen, tasks = Shop(setting), list[str](), list[asyncio.Task[None]]()

    async def child() -> None:
        await asyncio.sleep(1)
        seen.append(tenant.get())

    @shop.router.bind_event("spawns")
    async def spawns(event: EventObject) -> None:
        seen.append(tenant.get())
        tenant.set(f"{event.data}")
        tasks.append(asyncio.create_task(child()))
        await asyncio.sleep(0.1)

    async with shop.broker():
        for number in range(2):
            shop.put(number, event="spawns", key=b"k")
        await until(lambda: len(tasks) == 2)
        await asyncio.gather(*tasks)
    assert ["of the middleware", "of the middleware", "0", "1"] == seen


async def test_a_plain_function_sees_the_context() -> None:
    """Its thread has what the middleware has set, and what it sets stays there."""

    def setting(handle: Handle) -> Handle:
        async def around(event: EventObject) -> Any:
            tenant.set("of the middleware")
            return [await handle(event), tenant.get()]

        return around

    shop = Shop(setting)

    @shop.router.bind_event("plain")
    def plain() -> str:
        before = tenant.get()
        tenant.set("of the function")
        return before

    async with shop.broker() as broker:
        reply = await broker.request("Bank", "plain", timeout=5)
    assert ["of the middleware", "of the middleware"] == reply.data
