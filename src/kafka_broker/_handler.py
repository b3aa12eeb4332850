"""Handlers: a function and its parameters, compiled once when it is bound."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args, get_origin, get_type_hints

from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import SchemaError, to_json

from kafka_broker._batches import Batches
from kafka_broker._depends import Dependencies, is_dependency
from kafka_broker._event import EventObject, with_data
from kafka_broker._middleware import Handle, Middleware, wrapped
from kafka_broker._threads import in_thread
from kafka_broker._verdicts import RetryPolicy
from kafka_broker.errors import ConfigurationError, EventDecodeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from anyio import CapacityLimiter

    Source = Callable[[EventObject[Any]], Any]

_EMPTY: Final = inspect.Parameter.empty
_NAMED: Final = inspect.Parameter.KEYWORD_ONLY
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_PROBLEMS: Final = 5
_RAISED: Final = {"assertion_error", "get_attribute_error", "iteration_error", "mapping_type"}
_QUOTING: Final = {"import_error", "union_tag_invalid", "uuid_parsing", "value_error", *_RAISED}
"""Pydantic's errors whose text quotes the input, or an exception that may."""


class Payload:
    """Reads an event's data as a type.

    Raises:
        TypeError: pydantic cannot read that type.
    """

    def __init__(self, wanted: Any) -> None:
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(wanted)
            if not self._adapter.pydantic_complete:
                self._adapter.rebuild(raise_errors=True)
        except (PydanticUserError, PydanticUndefinedAnnotation, SchemaError) as exc:
            raise TypeError(str(exc)) from exc
        except KeyError as exc:  # pydantic takes a dict for a schema of its core
            raise TypeError(f"{_type_name(wanted)} is no type") from exc
        self._validate = self._adapter.validator.validate_python
        self._name = _type_name(wanted)

    def of(self, event: EventObject[Any]) -> Any:
        """Return the data of *event* as the type.

        Raises:
            EventDecodeError: it is something else; the text names the places, never the data. Of a
                validator that raises ValueError it says only that; PydanticCustomError is quoted.
        """
        try:
            return self._validate(event.data)
        except ValidationError as exc:
            return self._of_json(event, exc)

    def _of_json(self, event: EventObject[Any], error: ValidationError) -> Any:
        """Read the data as JSON again: strict models take dates, for example, only from JSON."""
        try:
            return self._adapter.validate_json(to_json(event.data))
        except ValidationError as exc:
            error = exc
        except ValueError:
            pass  # the data has no form in JSON: the first error says what is wrong with it
        raise EventDecodeError(self._sentence(event, error)) from None

    def _sentence(self, event: EventObject[Any], error: ValidationError) -> str:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        places = [
            f"{'.'.join(map(self._place, problem['loc'])) or 'data'}: {_reason(problem)}"
            for problem in problems[:_PROBLEMS]
        ]
        if len(problems) > _PROBLEMS:
            places.append(f"and {len(problems) - _PROBLEMS} more")
        return f"the data of event {event.event!r} is no {self._name}: {'; '.join(places)}"

    def _place(self, part: int | str) -> str:
        """Return a step to a wrong value; a key of a mapping is data, and is not quoted."""
        return str(part) if isinstance(part, int) or part in self._fields else "*"

    @cached_property
    def _fields(self) -> frozenset[str]:
        """The names of all fields that the type has, at any depth."""
        try:
            schema = self._adapter.json_schema()
        except (PydanticUserError, PydanticInvalidForJsonSchema):
            return frozenset()
        parts = [schema, *schema.get("$defs", {}).values()]
        found: set[str] = set()
        for part in parts:  # grows as it is read
            found |= part.get("properties", {}).keys()
            parts += [one for one in _nested(part) if isinstance(one, dict)]
        return frozenset(found)

    def event_of(self, event: EventObject[Any]) -> EventObject[Any]:
        """Return *event* with its data as the type; everything else is shared with it."""
        return with_data(event, self.of(event))


INJECTED: Final[set[type]] = set()
"""The types that handlers and their dependencies are given by the broker that runs them."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What the handlers of one run share.

    Attributes:
        limiter: of the worker threads for plain functions.
        given: the value of each type in `INJECTED`.
    """

    limiter: CapacityLimiter
    given: Mapping[type, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a bind asks for besides its function; None is what the broker's settings say.

    Attributes:
        timeout: seconds for one try.
        retry: when a try that failed is followed by another.
        batch: the most events for one call; None for a call for each event.
        within: seconds that the first event of a batch waits for the others.
    """

    timeout: float | None = None
    retry: RetryPolicy | None = None
    batch: int | None = None
    within: float = 0.05

    def __post_init__(self) -> None:
        for name in ("timeout", "within"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ConfigurationError(f"{name} must be a positive number of seconds")
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise ConfigurationError(f"retry of a bind has to be a RetryPolicy, got {self.retry!r}")
        if self.batch is not None and self.batch < 1:
            raise ConfigurationError(f"batch must be 1 or more, got {self.batch}")


class Handler:
    """A bound function: what it is called with, where it runs, and the middleware around it.

    Parameters are given, in this order of rules:

    - with `Depends` of fast-depends: what that gives;
    - annotated `BrokerManager`: the broker that handles the event;
    - annotated ``EventObject``: the event; ``EventObject[Model]``: it, with its data as ``Model``;
    - with a default: nothing, they keep it;
    - the first without an annotation: the event, unless another is annotated as the event;
    - any other, one at the most: the payload as the type it is annotated with.

    Plain functions run in a worker thread.

    Raises:
        ConfigurationError: a parameter that nothing can be given for, an annotation that cannot be
            read, a generator, a class.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        terms: Terms = Terms(),  # it is frozen
        middleware: Sequence[Middleware] = (),
    ) -> None:
        self.function = function
        self.terms = terms
        self.middleware: tuple[Middleware, ...] = tuple(middleware)
        self.name: str = _function_name(function)
        if _is(inspect.isgeneratorfunction, function) or _is(inspect.isasyncgenfunction, function):
            self._refuse("is a generator; return the reply instead")
        if not callable(function) or inspect.isclass(function):
            self._refuse("is no function; bind a function or a method")
        self._is_async = _is(inspect.iscoroutinefunction, function)
        parameters = self._parameters()
        self._given = {
            parameter.name: wanted
            for parameter in parameters
            if (wanted := _injected(parameter)) is not None
        }
        parameters = [one for one in parameters if one.name not in self._given]
        depending = [one for one in parameters if is_dependency(one)]
        self._dependencies: Dependencies | None = None
        if depending:
            given = INJECTED if terms.batch else {EventObject, *INJECTED}
            self._dependencies = Dependencies(self.name, depending, given)
        names = {one.name for one in depending}
        parameters = [one for one in parameters if one.name not in names]
        if terms.batch is not None:
            parameters = self._listed(parameters)
        sources = self._sources(parameters)
        by_place = not names and not self._given
        self._positional = _positional(parameters, sources) if by_place else []
        self._named = {
            parameter.name: sources[parameter.name]
            for parameter in parameters
            if (parameter.kind is _NAMED or not by_place) and parameter.name in sources
        }

    def _listed(self, parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
        """Return the one parameter that takes the list, annotated as one event of it."""
        wanted = [one for one in parameters if one.default is _EMPTY]
        if len(wanted) != 1:
            self._refuse("takes a batch, so it needs exactly one parameter, for a list of events")
        [one] = wanted
        annotation, of = _plain(one.annotation), get_args(_plain(one.annotation))
        if annotation is not _EMPTY and get_origin(annotation) is not list:
            self._refuse(
                f"takes a batch, so its parameter {one.name!r} has to be list[EventObject], "
                "list[EventObject[Model]] or list[Model]"
            )
        self._list = one.name
        return [one.replace(annotation=of[0] if of else _EMPTY, kind=_NAMED)]

    def within(self, middleware: Sequence[Middleware]) -> Handler:
        """Return this handler inside of more middleware."""
        if not middleware:
            return self
        other = object.__new__(Handler)
        other.__dict__.update(self.__dict__)
        other.middleware = (*middleware, *self.middleware)
        return other

    def handle(self, scope: Scope) -> Handle:
        """Return what handles an event in *scope*: the function inside of its middleware."""

        def call(event: EventObject[Any]) -> Awaitable[Any]:
            return self.call(event, scope)

        if self.terms.batch is None:
            return wrapped(self._direct() or call, self.middleware)
        batches = Batches(
            self.terms.batch,
            self.terms.within,
            read=self._named[self._list],
            call=lambda items: self._call({self._list: items}, scope),
        )
        return wrapped(batches, self.middleware)

    def _direct(self) -> Handle | None:
        """Return the direct call of a coroutine function with one argument, as most are.

        It takes 0.7 us less; None for any other function.
        """
        others = self._named or self._given or self._dependencies
        if others or not self._is_async or len(self._positional) != 1:
            return None
        function, [source] = self.function, self._positional

        def call(event: EventObject[Any]) -> Awaitable[Any]:
            awaitable: Awaitable[Any] = function(source(event))
            return awaitable

        return call

    def _parameters(self) -> list[inspect.Parameter]:
        """Return the parameters that something may be given for, their annotations evaluated."""
        bound, names = _bound(self.function), _names(self.function)
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (NameError, TypeError, ValueError) as exc:
            raise ConfigurationError(
                f"handler {self.name}: its parameters cannot be read ({exc}); "
                "bind a function of your own that calls it"
            ) from exc
        return [
            parameter.replace(annotation=self._annotation(parameter, names))
            for parameter in parameters
            if parameter.kind not in _VARIADIC and parameter.name not in bound
        ]

    def _annotation(self, parameter: inspect.Parameter, names: dict[str, Any]) -> Any:
        """Evaluate an annotation that is still text, where the function was written."""
        if parameter.annotation is _EMPTY:
            return _EMPTY
        annotated: Any = SimpleNamespace(__annotations__={"": parameter.annotation})
        try:
            return get_type_hints(annotated, names, include_extras=True)[""]
        except (NameError, AttributeError, SyntaxError, TypeError, PydanticUserError) as exc:
            raise ConfigurationError(
                f"handler {self.name}, parameter {parameter.name!r}: its annotation cannot be read "
                f"({exc}); use a type that pydantic knows, defined or imported at the top of the "
                "module, outside of `if TYPE_CHECKING`"
            ) from exc

    def _sources(self, parameters: Sequence[inspect.Parameter]) -> dict[str, Source]:
        """Return what gives each parameter its value; those without keep their default."""
        sources: dict[str, Source] = {}
        rest: list[inspect.Parameter] = []
        for parameter in parameters:
            source = self._event_source(parameter)
            if source is not None:
                sources[parameter.name] = source
            elif parameter.default is _EMPTY:
                rest.append(parameter)
        bare = next((parameter for parameter in rest if parameter.annotation is _EMPTY), None)
        if bare is not None and not sources:
            sources[bare.name] = _same
            rest.remove(bare)
        for parameter in rest[1:]:
            self._refuse_parameter(parameter, f"comes after {rest[0].name!r}, the payload")
        for parameter in rest:
            sources[parameter.name] = self._payload_source(parameter)
        return sources

    def _event_source(self, parameter: inspect.Parameter) -> Source | None:
        """Return what gives a parameter the event, or None if it wants something else."""
        wanted = _plain(parameter.annotation)
        if wanted is EventObject:
            return _same
        if not (isinstance(wanted, type) and issubclass(wanted, EventObject)):
            return None
        generic = wanted.__pydantic_generic_metadata__
        if generic["origin"] is not EventObject:
            self._refuse_parameter(parameter, f"wants {wanted.__name__}, a subclass,")
        data = generic["args"][0]
        return _same if data is Any else self._payload(parameter, data).event_of

    def _payload_source(self, parameter: inspect.Parameter) -> Source:
        if parameter.annotation is _EMPTY:
            self._refuse_parameter(parameter, "has no annotation")
        return self._payload(parameter, parameter.annotation).of

    def _payload(self, parameter: inspect.Parameter, wanted: Any) -> Payload:
        try:
            return Payload(wanted)
        except TypeError as exc:
            raise ConfigurationError(
                f"handler {self.name}, parameter {parameter.name!r}: {exc}"
            ) from exc

    def _refuse_parameter(self, parameter: inspect.Parameter, why: str) -> NoReturn:
        self._refuse(
            f"has a parameter {parameter.name!r} that {why} and that nothing can be given for; "
            "annotate one with EventObject or EventObject[Model] for the event and at most one "
            "other with the type of the payload, and give the rest a default"
        )

    def _refuse(self, why: str) -> NoReturn:
        raise ConfigurationError(f"handler {self.name} {why}")

    def call(self, event: EventObject[Any], scope: Scope) -> Awaitable[Any]:
        """Call the function for *event*; in one of the scope's threads if it is a plain one.

        A wait that is cancelled leaves a thread alone: it runs to its end, its result is dropped,
        and until then the limiter counts it.

        Raises:
            EventDecodeError: at once: the data is not what the function asks for.
            Exception: whatever the function raises, through the awaitable.
        """
        positional = [source(event) for source in self._positional]
        named = {name: source(event) for name, source in self._named.items()} if self._named else {}
        if self._given or self._dependencies is not None:
            return self._call(named, scope, event)
        if self._is_async:
            awaitable: Awaitable[Any] = self.function(*positional, **named)
            return awaitable
        return in_thread(partial(self.function, *positional, **named), scope.limiter)

    async def _call(
        self, named: dict[str, Any], scope: Scope, event: EventObject[Any] | None = None
    ) -> Any:
        """Call the function with what is *named*, and what scope and dependencies give."""
        named |= {name: self._value(wanted, scope) for name, wanted in self._given.items()}
        dependencies = self._dependencies
        if dependencies is None:
            return await self._run(named, scope)
        for wanted in INJECTED:
            if dependencies.asks_for(wanted):
                self._value(wanted, scope)  # refuses, where there is none
        given = {**scope.given, EventObject: event}
        if not self._is_async and not dependencies.is_async:

            def call() -> Any:
                with dependencies.solved_in_thread(given) as solved:
                    return self.function(**named, **solved)

            return await in_thread(call, scope.limiter)
        async with dependencies.solved(given, scope.limiter) as solved:
            return await self._run({**named, **solved}, scope)

    async def _run(self, named: dict[str, Any], scope: Scope) -> Any:
        if self._is_async:
            return await self.function(**named)
        return await in_thread(partial(self.function, **named), scope.limiter)

    def _value(self, wanted: type, scope: Scope) -> object:
        try:
            return scope.given[wanted]
        except KeyError:
            msg = (
                f"handler {self.name} asks for a {wanted.__name__}, which only a broker that runs "
                "the handler can give: pass the router to one"
            )
            raise ConfigurationError(msg) from None


def _nested(schema: dict[str, Any]) -> list[Any]:
    """Return the schemas that are directly in one."""
    lists = [schema.get(name, []) for name in ("anyOf", "oneOf", "allOf", "prefixItems")]
    single = [schema.get(name) for name in ("items", "additionalProperties")]
    return [
        *schema.get("properties", {}).values(),
        *single,
        *(one for many in lists for one in many),
    ]


def _reason(problem: Mapping[str, Any]) -> str:
    kind: str = problem["type"]
    return kind.replace("_", " ") if kind in _QUOTING else problem["msg"]


def _bound(function: Any) -> set[str]:
    """Return the names that a partial gives a value itself."""
    names: set[str] = set()
    while isinstance(function, partial):
        names |= function.keywords.keys()
        function = function.func
    return names


def _names(function: Any) -> dict[str, Any]:
    """Return what the names in the annotations of *function* stand for."""
    home = inspect.unwrap(_innermost(function))
    if not hasattr(home, "__globals__"):
        home = inspect.unwrap(type(home).__call__)
    return getattr(home, "__globals__", {})


def _positional(
    parameters: Sequence[inspect.Parameter], sources: Mapping[str, Source]
) -> list[Source]:
    """Return a source for each argument that is passed by its place, up to the last we give."""
    places = [parameter for parameter in parameters if parameter.kind is not _NAMED]
    while places and places[-1].name not in sources:
        places.pop()
    return [sources.get(place.name) or partial(_default, place.default) for place in places]


def _innermost(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    """Return whether *function*, a partial of it or its ``__call__`` is of this kind."""
    function = _innermost(function)
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004  # its kind


def _function_name(function: Any) -> str:
    function = _innermost(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None) or "builtins"
    return f"{module}.{named.__qualname__}"


def _type_name(wanted: Any) -> str:
    wanted = _plain(wanted)
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)


def _injected(parameter: inspect.Parameter) -> type | None:
    """Return the type that a parameter asks the broker for, if it does."""
    wanted = _plain(parameter.annotation)
    return next((one for one in INJECTED if one is wanted), None)


def _plain(annotation: Any) -> Any:
    """Return the type without what Annotated adds to it."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _same(event: EventObject[Any]) -> EventObject[Any]:
    return event


def _default(default: Any, _: EventObject[Any]) -> Any:
    return default
