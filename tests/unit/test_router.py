"""The router: which handler an event finds, and what becomes of a handler that runs."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kafka_broker import EventObject, EventRouter
from kafka_broker.errors import BrokerError, ConfigurationError, EventDecodeError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

LOGGER = "kafka_broker.router"


def named(name: str) -> Callable[[], Awaitable[str]]:
    """Make a handler that returns a name."""

    async def handler() -> str:
        return name

    return handler


def router_of(*patterns: str) -> EventRouter:
    router = EventRouter("root")
    for pattern in patterns:
        router.bind_event(pattern)(named(pattern))
    return router


async def result(router: EventRouter, event: str) -> Any:
    return await router.execute_event(EventObject(event=event))


async def found(router: EventRouter, event: str) -> Any:
    """Return what the handler of an event says, or None without one."""
    return None if router.match(event) is None else await result(router, event)


async def all_ended() -> None:
    """Wait until no other task runs."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def turn() -> None:
    """Let every task go as far as it can without us."""
    for _ in range(5):
        await asyncio.sleep(0)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the text of every logged error, from whatever logger."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


class Gate:
    """A handler that says that it has begun, waits, and then fails or returns."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.ended = asyncio.Event()
        self.error = error

    async def handle(self) -> str:
        self.begun.set()
        await self.open.wait()
        self.ended.set()
        if self.error is not None:
            raise self.error
        return "done"


def gated(error: Exception | None = None) -> tuple[Gate, EventRouter]:
    gate, router = Gate(error), EventRouter("root")
    router.bind_event("slow")(gate.handle)
    return gate, router


# Binding and finding


async def test_the_binder_and_then_its_bind_are_found() -> None:
    """The event "test.return" finds the router "test", and there the bind "return"."""
    root, test = EventRouter("module"), EventRouter("test")
    test.bind_event("return")(named("it"))
    root.include_binder(test)
    assert "it" == await found(root, "test.return")


def test_the_name_of_the_highest_router_is_not_in_the_event() -> None:
    """An event that begins with the module's name finds nothing."""
    root, test = EventRouter("module"), EventRouter("test")
    test.bind_event("return")(named("it"))
    root.include_binder(test)
    assert [None, None] == [root.match("module.test.return"), root.match("return")]


def test_the_decorated_function_is_returned_unchanged() -> None:
    """Decorators of two binds can be stacked on one function."""
    router = EventRouter("root")

    def handler() -> None: ...

    assert handler is router.bind_event("a")(router.bind_event("b")(handler))
    assert [True, True] == [router.match(name) is not None for name in ("a", "b")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_binds_and_includes_come_in_any_order(order: Sequence[int]) -> None:
    """A bind is found through every router above, whenever those were included."""
    root, middle, leaf = EventRouter("root"), EventRouter("middle"), EventRouter("leaf")
    steps: list[Callable[[], object]] = [
        lambda: root.include_binder(middle),
        lambda: middle.include_binder(leaf),
        lambda: leaf.bind_event("go")(named("it")),
    ]
    for step in order:
        steps[step]()
    names = [(root, "middle.leaf.go"), (middle, "leaf.go"), (leaf, "go")]
    assert ["it", "it", "it"] == [await found(router, name) for router, name in names]


async def test_a_pattern_is_mounted_below_the_name_of_its_router() -> None:
    """The pattern "*.done" in the router "card" handles "card.x.done" and nothing outside of it."""
    root, card = EventRouter("root"), EventRouter("card")
    root.include_binder(card)
    card.bind_event("*.done")(named("it"))
    events = ["card.x.done", "x.done", "cash.x.done"]
    assert ["it", None, None] == [await found(root, event) for event in events]


async def test_a_router_can_be_in_two_others() -> None:
    """A later bind of a shared router is found through both that include it."""
    one, two, shared = EventRouter("one"), EventRouter("two"), EventRouter("shared")
    one.include_binder(shared)
    two.include_binder(shared)
    shared.bind_event("go")(named("it"))
    assert ["it", "it"] == [await found(router, "shared.go") for router in (one, two)]


async def test_routers_nest_to_any_depth() -> None:
    """Routers nested deeper than Python recurses are no more than a long name."""
    root = inner = EventRouter("root")
    for _ in range(1_100):
        inner, outer = EventRouter("r"), inner
        outer.include_binder(inner)
    inner.bind_event("go")(named("it"))
    assert "it" == await found(root, "r." * 1_100 + "go")


async def test_ten_thousand_binds_are_all_found() -> None:
    """Each of many exact names and patterns finds its own handler."""
    names = [f"a{number}.b" for number in range(10_000)]
    patterns = [f"a{number}.*" for number in range(10_000)]
    router = router_of(*names, *patterns)
    some = range(0, 10_000, 997)
    assert [names[number] for number in some] == [await found(router, names[n]) for n in some]
    assert [patterns[number] for number in some] == [
        await found(router, f"a{number}.c") for number in some
    ]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "event", "fits"),
    [
        ("*", "a", True),
        ("*", "a.b", False),
        ("*", "", False),
        ("#", "", True),
        ("#", "a.b.c", True),
        ("#.#", "", True),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("a.#", "b.a", False),
        ("#.c", "c", True),
        ("#.c", "a.b.c", True),
        ("#.c", "c.d", False),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.c", False),
        ("*.#", "", False),
        ("#.a.#.b.#", "x.a.y.b.z", True),
        ("#.a.#.b.#", "x.b.y.a.z", False),
        ("a.#", "A.b", False),
    ],
)
def test_a_pattern_fits(pattern: str, event: str, fits: bool) -> None:  # noqa: FBT001  # a table
    """One star is one word, a hash is any number of words, none included."""
    assert fits == (router_of(pattern).match(event) is not None)


@pytest.mark.parametrize(
    ("event", "patterns"),
    [
        ("a.b", ["a.b", "a.*", "a.*.#", "a.#", "*.b", "*.*", "*.#", "#.b", "#"]),
        ("x.a", ["*.a", "#.a", "#.*.#", "#"]),
        ("a", ["a", "a.#", "*", "*.#", "#"]),
    ],
)
async def test_the_most_specific_pattern_wins(event: str, patterns: list[str]) -> None:
    """Word by word from the left a word is before a star, and a star before a hash."""
    winners = [
        await found(router_of(*reversed(patterns[first:])), event) for first in range(len(patterns))
    ]
    assert patterns == winners


def fits(pattern: Sequence[str], event: Sequence[str]) -> bool:
    """Match as RabbitMQ describes it, in the simplest words."""
    if not pattern:
        return not event
    if pattern[0] == "#":
        return any(fits(pattern[1:], event[start:]) for start in range(len(event) + 1))
    return bool(event) and pattern[0] in ("*", event[0]) and fits(pattern[1:], event[1:])


def order(pattern: str) -> tuple[list[int], list[str]]:
    """Sort the more specific first; where a pattern ends it is between a star and a hash."""
    words = pattern.split(".")
    return [{"*": 1, "#": 3}.get(word, 0) for word in words] + [2], words


def dotted(words: str, *, least: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), min_size=least, max_size=5).map(".".join)


@given(st.sets(dotted("ab*#", least=1), max_size=12), st.lists(dotted("abc*#", least=0)))
def test_the_router_agrees_with_a_simple_matcher(patterns: set[str], events: list[str]) -> None:
    """Whatever is bound, in whatever order, the simple matcher finds the same handler."""
    router = EventRouter("root")
    handlers = {pattern: named(pattern) for pattern in patterns}
    for pattern, handler in handlers.items():
        router.bind_event(pattern)(handler)
    for event in events:
        words = event.split(".") if event else []
        expected = min((p for p in patterns if fits(p.split("."), words)), key=order, default=None)
        actual = router.match(event)
        assert (expected and handlers[expected]) == (actual and actual.function)


@pytest.mark.parametrize(
    "event",
    ["." * 100_000, "a." * 100_000, ".".join("ab" * 120), "a." * 255 + "c", "*.#" * 80, "\0", " "],
)
async def test_hostile_names_are_harmless(event: str) -> None:
    """Names from the wire that are made to cost much are looked up like any other."""
    router = router_of("#.a.#.b.#.c", "#.*.#.*.#.*.#.d", "#.a.#.a.#.a.#.e")
    assert None is await found(router, event)


async def test_the_catch_all_catches_names_of_any_length() -> None:
    """Of the patterns only the hash alone fits a name of more than 256 words."""
    router = router_of("#", "a.#")
    events = ["a" + ".a" * 255, "a" + ".a" * 256, "." * 100_000]
    assert ["a.#", "#", "#"] == [await found(router, event) for event in events]


# Mistakes


@pytest.mark.parametrize(
    "name", ["", ".", "a.", ".a", "a..b", "a b", "a\n", "a*", "#a", "**", "a.b#"]
)
def test_a_malformed_pattern_is_refused(name: str) -> None:
    """Words are not empty, without white space, and a wildcard is a whole word."""
    with pytest.raises(ConfigurationError, match="words"):
        EventRouter("root").bind_event(name)


@pytest.mark.parametrize("name", ["", "a.", "a b", "*", "#", "a.*", "a*"])
def test_a_malformed_router_name_is_refused(name: str) -> None:
    """The name of a router is made of words, without wildcards."""
    with pytest.raises(ConfigurationError, match="words"):
        EventRouter(name)


def first() -> None: ...
def second() -> None: ...


@pytest.mark.parametrize("pattern", ["a.b", "a.*", "#"])
def test_a_name_bound_twice_is_refused(pattern: str) -> None:
    """The error names both functions, and the first bind stays."""
    router = EventRouter("root")
    router.bind_event(pattern)(first)
    with pytest.raises(ConfigurationError, match=r"first .*second"):
        router.bind_event(pattern)(second)
    handler = router.match("a.b")
    assert first == (handler and handler.function)


def test_an_include_that_would_bind_twice_changes_nothing() -> None:
    """Nothing of a router is included when one of its names is taken."""
    root, child = EventRouter("root"), EventRouter("a")
    root.bind_event("a.b")(first)
    child.bind_event("free")(second)
    child.bind_event("b")(second)
    with pytest.raises(ConfigurationError, match=r"first .*second"):
        root.include_binder(child)
    child.bind_event("later")(second)
    handler = root.match("a.b")
    assert first == (handler and handler.function)
    assert [None, None] == [root.match("a.free"), root.match("a.later")]


def test_a_later_bind_of_an_included_router_that_would_bind_twice_changes_nothing() -> None:
    """A name that is taken above is not bound below either."""
    root, child = EventRouter("root"), EventRouter("a")
    root.bind_event("a.b")(first)
    root.include_binder(child)
    with pytest.raises(ConfigurationError, match=r"first .*second"):
        child.bind_event("b")(second)
    assert None is child.match("b")


def test_a_bind_that_reaches_one_name_on_two_ways_is_refused() -> None:
    """Two routers of one name with the same router in them bind its names twice."""
    root, one, two, leaf = (EventRouter(name) for name in ("root", "same", "same", "leaf"))
    for middle in (one, two):
        middle.include_binder(leaf)
        root.include_binder(middle)
    with pytest.raises(ConfigurationError, match="bound twice"):
        leaf.bind_event("go")(first)
    assert [None, None] == [root.match("same.leaf.go"), leaf.match("go")]


def test_a_router_is_included_once() -> None:
    """The same router a second time in one router is a mistake."""
    root, child = EventRouter("root"), EventRouter("child")
    root.include_binder(child)
    with pytest.raises(ConfigurationError, match="already"):
        root.include_binder(child)


def test_a_router_cannot_contain_itself() -> None:
    """A router is neither included in itself nor in what it includes."""
    root, middle, leaf = (EventRouter(name) for name in ("root", "middle", "leaf"))
    root.include_binder(middle)
    middle.include_binder(leaf)
    for outer in (root, middle, leaf):
        with pytest.raises(ConfigurationError, match="itself"):
            outer.include_binder(root)


# Execution


async def test_the_result_can_be_awaited_more_than_once() -> None:
    """Every await gives what the handler returned."""
    execution = router_of("a").execute_event(EventObject(event="a"))
    assert ["a", "a", "a"] == [await execution, *await asyncio.gather(execution, execution)]


async def test_a_dropped_execution_runs() -> None:
    """A handler whose result nobody keeps runs to its end, even through garbage collection."""
    gate, router = gated()
    router.execute_event(EventObject(event="slow"))
    await gate.begun.wait()
    gc.collect()
    gate.open.set()
    await all_ended()
    assert gate.ended.is_set()


async def test_the_router_keeps_a_dropped_handler_alive() -> None:
    """A handler that waits for what only itself refers to is not garbage."""
    waited: list[weakref.ref[asyncio.Future[None]]] = []
    ended = asyncio.Event()

    async def handler() -> None:
        future = asyncio.get_running_loop().create_future()
        waited.append(weakref.ref(future))
        await future
        ended.set()

    router = EventRouter("root")
    router.bind_event("a")(handler)
    router.execute_event(EventObject(event="a"))
    await turn()
    gc.collect()
    future = waited[0]()
    assert future is not None
    future.set_result(None)
    await ended.wait()


async def test_a_failure_is_raised_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever awaits gets the exception itself, and the log stays empty."""
    error = LookupError("no such card")
    gate, router = gated(error)
    gate.open.set()
    with pytest.raises(LookupError) as raised:
        await result(router, "slow")
    assert error is raised.value
    del raised
    gc.collect()
    assert [] == errors(caplog)


async def test_a_failure_that_is_awaited_late_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A result that is kept can be awaited long after the handler has failed."""
    gate, router = gated(LookupError("no such card"))
    gate.open.set()
    execution = router.execute_event(EventObject(event="slow"))
    await all_ended()
    assert [] == errors(caplog)
    with pytest.raises(LookupError):
        await execution
    del execution
    gc.collect()
    assert [] == errors(caplog)


async def test_a_dropped_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The log names the event as it came and its id, has the traceback, and no data."""

    async def fails(event: EventObject) -> None:
        event.event = "respond"
        raise LookupError("no such card")

    router = EventRouter("root")
    router.bind_event("card.charge")(fails)
    router.execute_event(EventObject(event="card.charge", correlation_id="id-1", data="secret"))
    await all_ended()
    gc.collect()
    (record,) = caplog.records
    assert "the handler of event 'card.charge' (correlation id id-1) failed" == record.getMessage()
    assert (LOGGER, LookupError) == (record.name, record.exc_info and record.exc_info[0])
    assert "secret" not in caplog.text


async def test_a_kept_failure_is_logged_when_it_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A result that was kept and never awaited is logged when its last reference goes."""
    gate, router = gated(LookupError("no such card"))
    gate.open.set()
    execution = router.execute_event(EventObject(event="slow"))
    await all_ended()
    del execution
    gc.collect()
    assert 1 == len(errors(caplog))


async def test_nothing_bound_is_an_error_of_the_awaitable() -> None:
    """NoHandlerError has the event's name and id, and comes with the await."""
    execution = router_of("a").execute_event(EventObject(event="b", correlation_id="id-1"))
    with pytest.raises(NoHandlerError) as raised:
        await execution
    assert ("b", "id-1") == (raised.value.event, raised.value.correlation_id)


async def test_nothing_bound_is_logged_when_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """An event that nobody handles does not vanish silently."""
    router_of("a").execute_event(EventObject(event="b", correlation_id="id-1"))
    await all_ended()
    assert ["the handler of event 'b' (correlation id id-1) failed"] == errors(caplog)


async def test_data_of_another_type_is_an_error_of_the_awaitable() -> None:
    """A payload that does not validate is raised like any failure of the handler."""

    async def handler(amount: int) -> int:
        return amount

    router = EventRouter("root")
    router.bind_event("a")(handler)
    execution = router.execute_event(EventObject(event="a", data="much"))
    with pytest.raises(EventDecodeError):
        await execution


def test_without_a_loop_the_error_says_so() -> None:
    """Called outside of a coroutine, execute_event says what is missing."""
    with pytest.raises(BrokerError, match="needs a running event loop"):
        router_of("a").execute_event(EventObject(event="a"))


def test_a_router_serves_one_loop_after_another() -> None:
    """Plain functions run in threads of whichever loop calls."""
    router = EventRouter("root")
    router.bind_event("a")(lambda: "it")
    assert ["it", "it"] == [asyncio.run(result(router, "a")) for _ in range(2)]


async def test_a_plain_function_runs_in_a_thread_with_our_context() -> None:
    """The loop is free meanwhile, and context variables reach the thread."""
    variable = contextvars.ContextVar[str]("variable")
    router = EventRouter("root")
    router.bind_event("a")(lambda: (threading.get_ident(), variable.get()))
    variable.set("ours")
    thread, value = await result(router, "a")
    assert "ours" == value
    assert threading.get_ident() != thread


# Cancellation, at every await


async def cancelled_while_waiting(gate: Gate, router: EventRouter) -> None:
    """Await the slow handler in a task and cancel that."""
    waiting = asyncio.create_task(result(router, "slow"))
    await gate.begun.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()


async def test_a_cancelled_wait_leaves_the_handler_alone() -> None:
    """The wait ends, the handler goes on."""
    gate, router = gated()
    await cancelled_while_waiting(gate, router)
    assert not gate.ended.is_set()
    gate.open.set()
    await all_ended()
    assert gate.ended.is_set()


async def test_a_failure_after_a_cancelled_wait_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """When the one who waited is gone, the log has the failure, once."""
    gate, router = gated(LookupError("no such card"))
    await cancelled_while_waiting(gate, router)
    gate.open.set()
    await all_ended()
    gc.collect()
    assert 1 == len(errors(caplog))


async def test_a_failure_in_the_moment_of_the_cancel_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wait that is cancelled when the handler has failed, before it woke, loses nothing."""
    gate, router = gated(LookupError("no such card"))
    waiting = asyncio.create_task(result(router, "slow"))
    await gate.begun.wait()
    gate.open.set()
    await gate.ended.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    del waiting
    gc.collect()
    assert 1 == len(errors(caplog))


async def test_a_wait_that_is_cancelled_before_the_handler_begins() -> None:
    """A handler that was handed over runs, even if nobody waits from the start."""
    gate, router = gated()
    gate.open.set()
    execution = router.execute_event(EventObject(event="slow"))

    async def wait() -> object:
        return await execution

    waiting = asyncio.create_task(wait())
    waiting.cancel()
    await all_ended()
    assert (True, True) == (waiting.cancelled(), gate.ended.is_set())


async def test_after_a_timeout_the_result_can_be_awaited_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wait that was given up does not take the failure from the next one."""
    gate, router = gated(LookupError("no such card"))
    execution = router.execute_event(EventObject(event="slow"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(execution, 0)
    gate.open.set()
    with pytest.raises(LookupError):
        await execution
    assert [] == errors(caplog)


async def test_one_of_two_waits_is_cancelled() -> None:
    """The other one gets the result."""
    gate, router = gated()
    execution = router.execute_event(EventObject(event="slow"))

    async def wait() -> object:
        return await execution

    gone, stays = asyncio.create_task(wait()), asyncio.create_task(wait())
    await gate.begun.wait()
    gone.cancel()
    gate.open.set()
    assert ("done", True) == (await stays, gone.cancelled())


def test_a_closing_loop_cancels_the_handler_without_a_log(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that is cancelled with its loop has not failed."""

    async def leave() -> None:
        gate, router = gated()
        router.execute_event(EventObject(event="slow"))
        await gate.begun.wait()

    asyncio.run(leave())
    assert [] == errors(caplog)
