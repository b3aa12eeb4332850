"""Dependencies: parameters with the ``Depends`` of fast-depends, solved for each event.

Only its marker is used, so nothing here imports fast-depends. Its own solver does not close a plain
generator when a handler is cancelled, and gives one dependency's value to any parameter of another
that has the same name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from contextvars import copy_context
from functools import partial
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_type_hints

from anyio import CancelScope, CapacityLimiter, to_thread

from kafka_broker._threads import in_thread
from kafka_broker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

_EMPTY: Final = inspect.Parameter.empty
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_OURS: Final = ("fast_depends.dependencies", "Dependant")
_FASTAPI: Final = ("fastapi.params", "Depends")


def is_dependency(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter, its annotation evaluated, has ``Depends``, even FastAPI's."""
    return bool(_marks(parameter, *_OURS) or _marks(parameter, *_FASTAPI))


class Dependencies:
    """The parameters of one handler that have ``Depends``, compiled when it is bound.

    A dependency's own parameters have ``Depends`` again, or one of the *given* types as annotation,
    or a default. It is solved once for an event, unless its ``Depends`` has ``use_cache=False``.
    What it yields is open while the event is handled; it sees a failure, but cannot hide it.

    Raises:
        ConfigurationError: a dependency that cannot be called, or with a parameter that nothing
            can be given for; the ``Depends`` of FastAPI.
    """

    def __init__(
        self, handler_name: str, parameters: Sequence[inspect.Parameter], given: Collection[type]
    ) -> None:
        self._needs = _Needs(f"handler {handler_name}", parameters, given)

    @property
    def is_async(self) -> bool:
        """Whether solving them needs the event loop, with the overrides of this moment."""
        return any(dependency.is_async for dependency in _steps(self._needs, {}).values())

    def asks_for(self, wanted: type) -> bool:
        """Return whether one of them is given *wanted*, with the overrides of this moment."""
        steps = _steps(self._needs, {}).values()
        return any(needs.asks_for(wanted) for needs in (self._needs, *(s.needs for s in steps)))

    @asynccontextmanager
    async def solved(
        self, given: Mapping[type, object], limiter: CapacityLimiter
    ) -> AsyncIterator[dict[str, Any]]:
        """Solve them in this task, and the plain functions among them in worker threads.

        Raises:
            Exception: whatever a dependency raises, also at its end.
        """
        values: dict[Any, Any] = {**given}
        async with AsyncExitStack() as stack:
            for key, dependency in _steps(self._needs, {}).items():
                values[key] = await dependency.solve(values, stack, limiter)
            yield self._needs.among(values)

    @contextmanager
    def solved_in_thread(self, given: Mapping[type, object]) -> Iterator[dict[str, Any]]:
        """Solve them in this thread. None of them may be async.

        Raises:
            Exception: whatever a dependency raises, also at its end.
        """
        values: dict[Any, Any] = {**given}
        with ExitStack() as stack:
            for key, dependency in _steps(self._needs, {}).items():
                values[key] = dependency.solve_in_thread(values, stack)
            yield self._needs.among(values)


_replacements: Final[dict[Callable[..., Any], _Dependency]] = {}


@contextmanager
def replaced(
    dependency: Callable[..., Any], replacement: Callable[..., Any], given: Collection[type]
) -> Iterator[None]:
    """Solve *replacement* in every handler wherever *dependency* is asked for.

    Raises:
        ConfigurationError: the replacement cannot be solved, or depends on what it replaces.
    """
    place = f"override of {_name(dependency)}"
    substitute = _Dependency(place, replacement, given)
    keys = _steps(substitute.needs, {}).keys()
    if dependency in {key.function if isinstance(key, _Dependency) else key for key in keys}:
        raise ConfigurationError(f"{place}: {_name(replacement)} depends on what it replaces")
    before = _replacements.get(dependency)
    _replacements[dependency] = substitute
    try:
        yield
    finally:
        del _replacements[dependency]
        if before is not None:
            _replacements[dependency] = before


class _Needs:
    """What parameters are given: the keys under which an event's values have it.

    The key is a given type, a dependency's function or, where that is not to be shared, the
    `_Dependency` itself.
    """

    def __init__(
        self, place: str, parameters: Sequence[inspect.Parameter], given: Collection[type]
    ) -> None:
        self._place = place
        self._given = tuple(given)
        self._keys: dict[str, Hashable] = {}
        self.dependencies: dict[Hashable, _Dependency] = {}
        for parameter in parameters:
            self._add(parameter)

    def asks_for(self, key: Hashable) -> bool:
        return key in self._keys.values()

    def among(self, values: Mapping[Hashable, Any]) -> dict[str, Any]:
        return {name: values[key] for name, key in self._keys.items()}

    def _add(self, parameter: inspect.Parameter) -> None:
        (wanted, _), marks = _read(parameter.annotation), _marks(parameter, *_OURS)
        if len(marks) > 1:
            self._refuse(parameter, "has more than one Depends")
        asked = marks[0].dependency if marks else wanted
        if asked in self._given:
            self._keys[parameter.name] = asked
        elif marks:
            dependency = _Dependency(self._place, asked, self._given)
            key = asked if marks[0].use_cache else dependency
            self._keys[parameter.name] = key
            self.dependencies[key] = dependency
        elif _marks(parameter, *_FASTAPI):
            install = "pip install 'kafka-broker-aio[depends]'"
            self._refuse(parameter, f"has FastAPI's Depends; use that of fast_depends ({install})")
        elif parameter.default is _EMPTY:
            what = "no type" if wanted is _EMPTY else getattr(wanted, "__name__", wanted)
            names = " or ".join(sorted(each.__name__ for each in self._given))
            why = f"is annotated with {what} and nothing can be given for it; annotate it with"
            self._refuse(parameter, f"{why} {names}, or give it Depends or a default")

    def _refuse(self, parameter: inspect.Parameter, why: str) -> NoReturn:
        raise ConfigurationError(f"{self._place}, parameter {parameter.name!r}: it {why}")


class _Dependency:
    """A function that returns a value, or a generator that yields it."""

    def __init__(self, place: str, function: Callable[..., Any], given: Collection[type]) -> None:
        place = f"{place}, dependency {_name(function)}"
        if not callable(function) or not isinstance(function, Hashable):
            raise ConfigurationError(f"{place}: it cannot be called, or has no hash")
        self.function = function
        self.needs = _Needs(place, _parameters(place, function), given)
        yields_async = _is(inspect.isasyncgenfunction, function)
        self.is_async = yields_async or _is(inspect.iscoroutinefunction, function)
        self._yields = yields_async or _is(inspect.isgeneratorfunction, function)
        self._call: Callable[..., Any] = function
        if self._yields:
            self._call = (asynccontextmanager if self.is_async else contextmanager)(function)

    async def solve(
        self, values: Mapping[Hashable, Any], stack: AsyncExitStack, limiter: CapacityLimiter
    ) -> Any:
        call = partial(self._call, **self.needs.among(values))
        if not self._yields:
            return await (call() if self.is_async else in_thread(call, limiter))
        if self.is_async:
            manager = call()
            value = await manager.__aenter__()
            stack.push_async_exit(partial(_leave, manager))
            return value
        threaded = _Threaded(call())
        stack.push_async_exit(threaded.leave)  # first: entering it may be cancelled halfway
        return await in_thread(threaded.enter, limiter)

    def solve_in_thread(self, values: Mapping[Hashable, Any], stack: ExitStack) -> Any:
        called = self._call(**self.needs.among(values))
        if not self._yields:
            return called
        value = called.__enter__()
        stack.push(partial(_leave_in_thread, called))
        return value


class _Threaded:
    """A plain generator, entered and left in worker threads, one at a time and in one context."""

    def __init__(self, manager: AbstractContextManager[Any]) -> None:
        self._manager = manager
        self._context = copy_context()
        self._turn = Lock()

    def enter(self) -> Any:
        with self._turn:
            return self._context.run(self._manager.__enter__)

    async def leave(self, *failure: Any) -> None:
        """Wait for an `enter` that was cancelled, for its thread goes on; none comes after this."""
        with CancelScope(shield=True):
            # The common limiter may be used up by those who wait for what is given back here.
            await to_thread.run_sync(self._leave, *failure, limiter=CapacityLimiter(1))

    def _leave(self, *failure: Any) -> None:
        with self._turn:
            self._context.run(self._manager.__exit__, *failure)


async def _leave(manager: AbstractAsyncContextManager[Any], *failure: Any) -> None:
    await manager.__aexit__(*failure)  # its answer would hide the failure


def _leave_in_thread(manager: AbstractContextManager[Any], *failure: Any) -> None:
    manager.__exit__(*failure)  # as above


def _steps(needs: _Needs, steps: dict[Hashable, _Dependency]) -> dict[Hashable, _Dependency]:
    """Add what has to be solved to *steps*, in that order, replacements in their places."""
    for key, dependency in needs.dependencies.items():
        if key not in steps:
            used = _replacements.get(dependency.function, dependency)
            _steps(used.needs, steps)
            steps[key] = used
    return steps


def _parameters(place: str, function: Any) -> list[inspect.Parameter]:
    """Return the parameters of a dependency that something may be given for."""
    bound = function.keywords if isinstance(function, partial) else {}
    names = getattr(inspect.unwrap(_home(function)), "__globals__", {})
    try:
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as exc:
        why = f"its parameters cannot be read ({exc}); write a function that calls it"
        raise ConfigurationError(f"{place}: {why}") from exc
    return [
        parameter.replace(annotation=_evaluated(place, parameter, names))
        for parameter in parameters
        if parameter.kind not in _VARIADIC and parameter.name not in bound
    ]


def _evaluated(place: str, parameter: inspect.Parameter, names: dict[str, Any]) -> Any:
    """Evaluate an annotation; whatever has a default can do without."""
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise ConfigurationError(f"{place}, parameter {parameter.name!r}: it has to have a name")
    annotated: Any = SimpleNamespace(__annotations__={"": parameter.annotation})
    try:
        return get_type_hints(annotated, names, include_extras=True)[""]
    except (NameError, AttributeError, SyntaxError, TypeError) as exc:
        if parameter.default is not _EMPTY:
            return _EMPTY
        why = f"its annotation cannot be read ({exc}); import it outside of `if TYPE_CHECKING`"
        raise ConfigurationError(f"{place}, parameter {parameter.name!r}: {why}") from exc


def _read(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type, and what Annotated adds to it, also under a name (PEP 695)."""
    annotation = getattr(annotation, "__value__", annotation)
    added = getattr(annotation, "__metadata__", ())
    return (annotation.__origin__ if added else annotation), added


def _marks(parameter: inspect.Parameter, module: str, name: str) -> list[Any]:
    """Return what a parameter has of a class; nobody has it if its module is not imported."""
    kind = getattr(sys.modules.get(module), name, ())
    _, added = _read(parameter.annotation)
    return [mark for mark in (*added, parameter.default) if isinstance(mark, kind)]


def _name(function: Any) -> str:
    function = function.func if isinstance(function, partial) else function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _home(function: Any) -> Any:
    """Return where a callable is written down: itself, or a method of its class."""
    if isinstance(function, partial):
        return _home(function.func)
    if inspect.isclass(function):
        return function.__init__
    return function if inspect.isroutine(function) else type(function).__call__


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    return kind(function) or kind(_home(function))
