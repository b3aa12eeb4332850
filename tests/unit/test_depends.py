"""Dependencies: what the `Depends` of fast-depends gives to a handler, and when it ends."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import AsyncMock

import anyio
import fastapi
import pytest
from anyio import to_thread
from fast_depends import Depends
from pydantic import BaseModel
from typing_extensions import TypeAliasType

from kafka_broker import BrokerManager, EventObject
from kafka_broker._depends import Dependencies, is_dependency
from kafka_broker.errors import ConfigurationError
from kafka_broker.testing import override

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from decimal import Decimal

GIVEN = (EventObject, BrokerManager)
TENANT: ContextVar[str] = ContextVar("TENANT", default="nobody")

log: list[Any] = []
"""What the dependencies of a test did."""


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    log.clear()


class Card(BaseModel):
    number: str


class Boom(Exception):  # noqa: N818  # it stands for any
    pass


class Pager:
    def __init__(self, size: int = 5) -> None:
        self.size = size

    async def __call__(self) -> int:
        return self.size

    def get(self) -> int:
        return self.size + 1


PAGE = Pager(3)
TRIPLE = partial(lambda size, *, factor: size * factor, 2, factor=3)


def parameters(handler: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(handler, eval_str=True).parameters.values()
    return [parameter for parameter in found if is_dependency(parameter)]


def compiled(handler: Callable[..., Any]) -> Dependencies:
    return Dependencies("shop.charge", parameters(handler), GIVEN)


def one(dependency: Any) -> Dependencies:
    """Compile a handler whose only parameter ``it`` has this dependency."""
    kind = inspect.Parameter.KEYWORD_ONLY
    it = inspect.Parameter("it", kind, default=Depends(dependency))
    return Dependencies("shop.charge", [it], GIVEN)


def given() -> dict[type, object]:
    return {EventObject: EventObject(event="card.charge"), BrokerManager: BrokerManager()}


async def solved(
    dependencies: Dependencies, limiter: anyio.CapacityLimiter | None = None
) -> dict[str, Any]:
    async with dependencies.solved(given(), limiter or anyio.CapacityLimiter(40)) as values:
        return values


def refusal(dependency: Any) -> str:
    with pytest.raises(ConfigurationError) as raised:
        one(dependency)
    return str(raised.value)


async def session() -> AsyncIterator[str]:
    log.append("open")
    try:
        yield "session"
    except BaseException as exc:
        log.append(type(exc).__name__)
        raise
    finally:
        log.append("close")


def plain_session() -> Iterator[str]:
    log.append("open")
    try:
        yield "session"
    except BaseException as exc:
        log.append(type(exc).__name__)
        raise
    finally:
        log.append("close")


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# Detection


def test_a_parameter_with_depends_is_a_dependency() -> None:
    """In the annotation, behind a name for it, or as the default; nothing else is one."""
    alias = TypeAliasType("alias", Annotated[str, Depends(session)])

    def handler(
        card: Annotated[Card, "noted"],
        a: Annotated[str, Depends(session)],
        b: str = Depends(session),
        c: int = 1,
    ) -> None: ...

    named = inspect.Parameter("n", inspect.Parameter.KEYWORD_ONLY, annotation=alias)
    assert ["a", "b"] == [parameter.name for parameter in parameters(handler)]
    assert is_dependency(named)


def test_nothing_imports_fast_depends() -> None:
    """Neither an import of the package nor a handler without Depends loads it, nor FastAPI."""
    script = """
import sys, inspect, kafka_broker, kafka_broker.testing
from kafka_broker._depends import is_dependency
plain = inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=int)
print(is_dependency(plain), sorted({"fast_depends", "fastapi"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  # ours
    assert "False []\n" == done.stdout


def test_fastapis_depends_is_a_mistake() -> None:
    """The text says what to install, for a handler and for a dependency, and where it is."""

    def as_default(x: str = fastapi.Depends(session)) -> None: ...

    async def inner(x: Annotated[str, fastapi.Security(session)]) -> None: ...

    expected = (
        "handler shop.charge, parameter 'x': it has FastAPI's Depends; use that of fast_depends "
        "(pip install 'kafka-broker-aio[depends]')"
    )
    with pytest.raises(ConfigurationError) as raised:
        compiled(as_default)
    assert expected == str(raised.value)
    assert "inner, parameter 'x': it has FastAPI's Depends" in refusal(inner)


def test_fastapis_depends_in_the_annotation_is_seen() -> None:
    """It is reported as a dependency, so that binding the handler says what is wrong."""

    def handler(x: Annotated[str, fastapi.Depends(session)]) -> None: ...

    assert ["x"] == [parameter.name for parameter in parameters(handler)]


async def test_fastapis_alias_of_the_broker_is_the_broker() -> None:
    """A dependency may be annotated with `kafka_broker.fastapi.Broker`."""

    async def broker(it: Annotated[BrokerManager, fastapi.Depends(session)]) -> object:
        return it

    values = given()
    async with one(broker).solved(values, anyio.CapacityLimiter(40)) as arguments:
        assert {"it": values[BrokerManager]} == arguments


# What is given


async def test_a_dependency_gives_the_handler_its_value() -> None:
    """Functions, generators, methods, classes, partials, objects; with Annotated or as default."""

    async def handler(  # noqa: PLR0913  # one of each
        *,
        a: Annotated[str, Depends(session)],
        b: Annotated[int, Depends(PAGE)],
        c: int = Depends(PAGE.get),
        d: Pager = Depends(Pager),
        e: int = Depends(TRIPLE),
        f: str = Depends(plain_session),
        g: int = Depends(lambda: 7),
    ) -> None: ...

    values = await solved(compiled(handler))
    values["d"] = values["d"].size
    assert {"a": "session", "b": 3, "c": 4, "d": 5, "e": 6, "f": "session", "g": 7} == values


async def test_a_dependency_is_given_event_and_broker_by_annotation() -> None:
    """Anywhere in the tree, under any name, without the rest of its parameters."""

    async def inner(e: EventObject, limit: int = 3, *args: int, **kwargs: int) -> Any:
        return e, limit, args, kwargs

    def outer(
        event: BrokerManager,
        found: object = Depends(inner),
        again: object = Depends(EventObject),
    ) -> Any:
        return event, found, again

    values = given()
    event, broker = values[EventObject], values[BrokerManager]
    async with one(outer).solved(values, anyio.CapacityLimiter(40)) as arguments:
        assert {"it": (broker, (event, 3, (), {}), event)} == arguments


async def test_annotations_are_read_where_they_are_written() -> None:
    """Those of a class, and of a function behind a decorator."""

    class Repository:
        def __init__(self, broker: BrokerManager) -> None:
            self.broker = broker

    @lru_cache
    def cached(broker: BrokerManager, repository: Any = Depends(Repository)) -> Any:
        return repository.broker is broker

    assert {"it": True} == await solved(one(cached))


async def test_equal_names_are_different_parameters() -> None:
    """What ``x`` is for the handler says nothing about ``x`` of a dependency."""

    def repository(x: str = Depends(lambda: "replica"), y: int = 1) -> Any:
        return x, y

    def handler(
        x: str = Depends(lambda: "primary"),
        y: int = Depends(lambda: 2),
        z: Any = Depends(repository),
    ) -> None: ...

    assert {"x": "primary", "y": 2, "z": ("replica", 1)} == await solved(compiled(handler))


async def test_one_value_for_each_event() -> None:
    """Two dependencies share a session, two events do not, nor those without the cache."""
    made = iter(range(10))

    async def number() -> int:
        return next(made)

    async def left(n: int = Depends(number)) -> int:
        return n

    async def handler(
        a: int = Depends(left),
        b: int = Depends(number),
        c: int = Depends(number, use_cache=False),
        d: int = Depends(number, use_cache=False),
    ) -> None: ...

    dependencies = compiled(handler)
    first, second = await solved(dependencies), await solved(dependencies)
    assert {"a": 0, "b": 0, "c": 1, "d": 2} == first
    assert {"a": 3, "b": 3, "c": 4, "d": 5} == second


async def test_nothing_is_cast() -> None:
    """A value reaches the handler as the dependency made it."""

    def handler(x: Annotated[int, Depends(lambda: "1")]) -> None: ...

    assert {"x": "1"} == await solved(compiled(handler))


async def test_plain_dependencies_run_in_worker_threads() -> None:
    """They may block; async ones run in the handler's task."""

    def plain() -> str:
        return threading.current_thread().name

    async def awaited(name: str = Depends(plain)) -> Any:
        return name, asyncio.current_task()

    name, task = (await solved(one(awaited)))["it"]
    assert threading.current_thread().name != name
    assert asyncio.current_task() is task


async def test_context_variables_reach_the_handler() -> None:
    """What an async dependency sets is seen by the handler; a plain one can reset its own."""

    def plain() -> Iterator[None]:
        token = TENANT.set("plain")
        yield
        log.append(TENANT.get())
        TENANT.reset(token)

    async def tenant(_: None = Depends(plain)) -> AsyncIterator[None]:
        token = TENANT.set("acme")
        yield
        TENANT.reset(token)

    async with one(tenant).solved(given(), anyio.CapacityLimiter(40)):
        assert "acme" == TENANT.get()
    assert "nobody" == TENANT.get()
    assert ["plain"] == log


# In a thread


async def test_a_plain_tree_is_solved_in_one_thread() -> None:
    """The dependencies of a plain handler run where it does, and it sees what they set."""

    def tenant() -> Iterator[int]:
        token = TENANT.set("acme")
        yield threading.get_ident()
        log.append(threading.get_ident())
        TENANT.reset(token)

    def ident() -> int:
        return threading.get_ident()

    def handler(a: int = Depends(tenant), b: int = Depends(ident)) -> None: ...

    def run() -> tuple[Any, ...]:
        with compiled(handler).solved_in_thread(given()) as values:
            return values, TENANT.get(), threading.get_ident()

    values, tenant_name, here = await to_thread.run_sync(run)
    assert ({"a": here, "b": here}, "acme", [here]) == (values, tenant_name, log)


def test_a_plain_tree_is_given_event_and_broker() -> None:
    """As in the event loop, and one value is shared."""

    def source(event: EventObject) -> object:
        return event

    def both(a: object = Depends(source), b: object = Depends(source)) -> Any:
        return a, b

    values = given()
    with one(both).solved_in_thread(values) as arguments:
        assert {"it": (values[EventObject],) * 2} == arguments


def test_a_failure_in_a_thread_reaches_the_dependencies() -> None:
    """A plain handler's session rolls back, and a dependency cannot hide the failure."""

    def hiding(_: str = Depends(plain_session)) -> Iterator[None]:
        try:
            yield
        except Boom:
            log.append("hidden")

    with pytest.raises(Boom), one(hiding).solved_in_thread(given()):
        raise Boom
    assert ["open", "hidden", "Boom", "close"] == log


def test_whether_the_event_loop_is_needed() -> None:
    """One async function or generator anywhere in the tree needs it."""

    def plain(_: str = Depends(plain_session)) -> None: ...

    def mixed(_: str = Depends(session)) -> None: ...

    async def awaited() -> None: ...

    assert [False, True, True] == [one(it).is_async for it in (plain, mixed, awaited)]


# How it ends


@pytest.mark.parametrize("dependency", [session, plain_session])
async def test_it_is_open_while_the_handler_runs(dependency: Any) -> None:
    """It is closed once, afterwards."""
    async with one(dependency).solved(given(), anyio.CapacityLimiter(40)):
        assert ["open"] == log
    assert ["open", "close"] == log


@pytest.mark.parametrize("dependency", [session, plain_session])
async def test_a_failed_handler_rolls_back(dependency: Any) -> None:
    """What the handler raised is raised in the dependency, and goes on as it is."""
    boom = Boom()
    with pytest.raises(Boom) as raised:
        async with one(dependency).solved(given(), anyio.CapacityLimiter(40)):
            raise boom
    assert boom is raised.value
    assert ["open", "Boom", "close"] == log


@pytest.mark.parametrize("dependency", [session, plain_session])
async def test_a_cancelled_handler_rolls_back(dependency: Any) -> None:
    """The teardown runs once, without the help of the garbage collector."""
    reached = asyncio.Event()

    async def handle() -> None:
        async with one(dependency).solved(given(), anyio.CapacityLimiter(40)):
            reached.set()
            await asyncio.Event().wait()

    gc.disable()
    try:
        task = asyncio.create_task(handle())
        await reached.wait()
        await cancelled(task)
        assert ["open", "CancelledError", "close"] == log
    finally:
        gc.enable()


@pytest.mark.parametrize("dependency", [session, plain_session])
async def test_a_cancel_scope_rolls_back(dependency: Any) -> None:
    """The same with a scope of anyio, which cancels every wait in it again."""
    with anyio.CancelScope() as scope:
        async with one(dependency).solved(given(), anyio.CapacityLimiter(40)):
            scope.cancel()
            await anyio.sleep_forever()
    assert ["open", "CancelledError", "close"] == log


async def test_a_cancel_inside_an_async_dependency() -> None:
    """It and those before it are closed once; those after it are never opened."""
    reached = asyncio.Event()

    async def slow(_: str = Depends(session)) -> AsyncIterator[None]:
        try:
            reached.set()
            await asyncio.Event().wait()
            yield
        finally:
            log.append("slow")

    async def handler(a: None = Depends(slow), b: str = Depends(plain_session)) -> None: ...

    task = asyncio.create_task(solved(compiled(handler)))
    await reached.wait()
    await cancelled(task)
    assert ["open", "slow", "CancelledError", "close"] == log


async def test_a_cancel_while_a_plain_dependency_opens() -> None:
    """Its thread goes on; what it opened is closed once, before what it depends on."""
    reached, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(_: str = Depends(session)) -> Iterator[None]:
        loop.call_soon_threadsafe(reached.set)
        release.wait(10)
        log.append("slow open")
        try:
            yield
        finally:
            log.append("slow close")

    task = asyncio.create_task(solved(one(slow)))
    await reached.wait()
    task.cancel()
    for _ in range(1000):  # time for a teardown that does not wait
        await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ["open", "slow open", "slow close", "CancelledError", "close"] == log


async def test_a_cancel_before_a_plain_dependency_opens() -> None:
    """It is never opened, and what was opened before is closed."""

    def handler(a: str = Depends(session), b: str = Depends(plain_session)) -> None: ...

    limiter = anyio.CapacityLimiter(1)
    async with limiter:
        task = asyncio.create_task(solved(compiled(handler), limiter))
        while limiter.statistics().tasks_waiting == 0:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0)
        await cancelled(task)
    assert ["open", "CancelledError", "close"] == log


async def test_a_teardown_needs_no_common_thread() -> None:
    """What others wait for in every thread can still be given back."""
    limiter = to_thread.current_default_thread_limiter()
    tokens = limiter.total_tokens
    try:
        async with one(plain_session).solved(given(), anyio.CapacityLimiter(40)):
            limiter.total_tokens = 0
    finally:
        limiter.total_tokens = tokens
    assert ["open", "close"] == log


async def test_a_dependency_cannot_hide_a_failure() -> None:
    """Neither from the session that it depends on, nor from whoever calls the handler."""

    async def hiding(_: str = Depends(session)) -> AsyncIterator[None]:
        try:
            yield
        except Boom:
            log.append("hidden")

    def hiding_too(_: None = Depends(hiding)) -> Iterator[None]:
        try:
            yield
        except Boom:
            log.append("hidden, too")

    with pytest.raises(Boom):
        async with one(hiding_too).solved(given(), anyio.CapacityLimiter(40)):
            raise Boom
    assert ["open", "hidden, too", "hidden", "Boom", "close"] == log


async def test_a_failure_in_a_teardown_surfaces() -> None:
    """The commit that failed is the handler's failure, and the rest is still closed."""

    async def committing(_: str = Depends(plain_session)) -> AsyncIterator[None]:
        yield
        raise Boom("commit")

    with pytest.raises(Boom, match="commit"):
        await solved(one(committing))
    assert ["open", "Boom", "close"] == log


async def test_a_failure_in_a_dependency_closes_those_before() -> None:
    """The handler is not called."""

    def failing(_: str = Depends(session)) -> None:
        raise Boom

    with pytest.raises(Boom):
        async with one(failing).solved(given(), anyio.CapacityLimiter(40)):
            log.append("handler")
    assert ["open", "Boom", "close"] == log


# Mistakes at bind time


def test_a_parameter_that_nothing_can_be_given_for() -> None:
    """The text names the handler, each dependency on the way, and the parameter."""

    def inner(dsn: str) -> None: ...

    def outer(_: None = Depends(inner)) -> None: ...

    here = "test_a_parameter_that_nothing_can_be_given_for.<locals>"
    assert (
        f"handler shop.charge, dependency {__name__}.{here}.outer, "
        f"dependency {__name__}.{here}.inner, parameter 'dsn': it is annotated with str and "
        "nothing can be given for it; annotate it with BrokerManager or EventObject, or give it "
        "Depends or a default"
    ) == refusal(outer)


def test_an_event_with_a_type_is_not_given() -> None:
    """Only the handler reads the payload as a model."""

    def dependency(event: EventObject[Card]) -> None: ...

    assert "it is annotated with EventObject[Card] and nothing can be given" in refusal(dependency)


def test_other_mistakes_are_named() -> None:
    """Each is found when the handler is bound."""

    def bare(it):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # as users write
        ...

    def twice(it: Annotated[str, Depends(session)] = Depends(session)) -> None: ...

    def hidden(it: Decimal) -> None: ...

    def unnamed(it: EventObject, /) -> None: ...

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]  # what the test is about

        def __call__(self) -> None: ...

    assert "parameter 'it': it is annotated with no type and" in refusal(bare)
    assert "parameter 'it': it has more than one Depends" in refusal(twice)
    assert "'it': its annotation cannot be read (name 'Decimal' is not" in refusal(hidden)
    assert "parameter 'it': it has to have a name" in refusal(unnamed)
    assert "Unhashable: it cannot be called, or has no hash" in refusal(Unhashable())
    assert "builtins.int: it cannot be called, or has no hash" in refusal(1)
    assert "dependency builtins.dict: its parameters cannot be read" in refusal(dict)


async def test_annotations_that_are_not_needed_are_not_read() -> None:
    """Those of results, and of parameters with a default."""

    def dependency(a: Decimal | None = None, b: Decimal = Depends(session)) -> Decimal | str:
        return a or b

    assert {"it": "session"} == await solved(one(dependency))


async def test_a_value_that_a_partial_has_is_kept() -> None:
    """Depends in its annotation says nothing any more."""

    async def dependency(x: Annotated[str, Depends(session)]) -> str:
        return x

    assert {"it": "mine"} == await solved(one(partial(dependency, x="mine")))


# Overrides


def name() -> str:
    return "real"


def shown(it: str = Depends(name)) -> str:
    return f"<{it}>"


async def test_an_override_holds_for_its_duration() -> None:
    """In handlers bound before and after, everywhere in the tree."""
    before = one(shown)
    with override(name, lambda: "fake"):
        inside = [await solved(before), await solved(one(shown)), await solved(one(name))]
    assert [{"it": "<fake>"}, {"it": "<fake>"}, {"it": "fake"}] == inside
    assert {"it": "<real>"} == await solved(before)


async def test_overrides_nest_and_are_undone_by_errors() -> None:
    """The inner one holds; whatever ends it, the outer one holds again."""
    dependencies = one(shown)
    with override(name, lambda: "outer"):
        with override(name, lambda: "inner"):
            assert {"it": "<inner>"} == await solved(dependencies)
        assert {"it": "<outer>"} == await solved(dependencies)
        with pytest.raises(Boom), override(name, lambda: "inner"):
            raise Boom
        assert {"it": "<outer>"} == await solved(dependencies)
    assert {"it": "<real>"} == await solved(dependencies)


async def test_a_replacement_is_a_dependency_like_any_other() -> None:
    """It is given the event and its own dependencies, and what it yields is closed."""

    async def replacement(
        event: EventObject, inner: Annotated[str, Depends(session)]
    ) -> AsyncIterator[str]:
        yield f"{event.event} {inner}"
        log.append("end")

    dependencies = one(shown)
    assert not dependencies.is_async
    with override(name, replacement):
        assert dependencies.is_async
        assert {"it": "<card.charge session>"} == await solved(dependencies)
    assert ["open", "end", "close"] == log


async def test_a_mock_can_be_a_replacement() -> None:
    """An AsyncMock is awaited, once for an event."""
    mock = AsyncMock(return_value="mocked")
    with override(name, mock):
        assert {"it": "<mocked>"} == await solved(one(shown))
    mock.assert_awaited_once_with()


async def test_an_override_during_an_event_is_for_the_next_one() -> None:
    """An event is solved with what held when it began."""

    async def slow() -> AsyncIterator[None]:
        with override(name, session):
            yield

    async def handler(a: None = Depends(slow), b: str = Depends(name)) -> None: ...

    assert {"a": None, "b": "real"} == await solved(compiled(handler))


def test_a_replacement_is_checked_at_once() -> None:
    """It has to be solvable, and must not depend on what it replaces, even through another."""

    def bad(dsn: str) -> str:
        return dsn

    def around(it: str = Depends(name, use_cache=False)) -> str:
        return it

    def through_session(it: str = Depends(session)) -> str:
        return it

    def through_name(it: str = Depends(shown)) -> str:
        return it

    def refused(replacement: Any) -> str:
        with pytest.raises(ConfigurationError) as raised, override(name, replacement):
            pass
        return str(raised.value)

    assert f"override of {__name__}.name, dependency {__name__}" in refused(bad)
    assert "bad, parameter 'dsn': it is annotated with str" in refused(bad)
    assert refused(around).endswith("around depends on what it replaces")
    with override(session, through_name):
        assert refused(through_session).endswith("depends on what it replaces")


def test_an_override_without_fast_depends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "fast_depends", None)
    expected = r"pip install 'kafka-broker-aio\[depends\]'"
    with pytest.raises(ImportError, match=expected), override(name, name):
        pass
