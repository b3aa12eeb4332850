"""Handlers: a function and its parameters, compiled once when it is bound."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args, get_origin, get_type_hints

import anyio.to_thread
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import to_json

from kafka_broker._event import EventObject
from kafka_broker.errors import ConfigurationError, EventDecodeError

if TYPE_CHECKING:
    from collections.abc import Callable

    import anyio

_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Payload:
    """Reads an event's data as a type.

    Raises:
        TypeError: pydantic cannot read that type.
    """

    def __init__(self, wanted: Any) -> None:
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(wanted)
        except PydanticUserError as exc:
            raise TypeError(str(exc)) from exc
        self._name = getattr(wanted, "__name__", str(wanted))

    def of(self, event: EventObject[Any]) -> Any:
        """Return the data of *event* as the type.

        Raises:
            EventDecodeError: it is something else; the text names the places, never the data.
        """
        try:
            return self._adapter.validate_python(event.data)
        except ValidationError as exc:
            return self._of_json(event, exc)

    def _of_json(self, event: EventObject[Any], error: ValidationError) -> Any:
        """Read the data as JSON again: strict models take dates, for example, only from JSON."""
        try:
            return self._adapter.validate_json(to_json(event.data))
        except ValueError:
            raise EventDecodeError(self._sentence(event, error)) from None

    def _sentence(self, event: EventObject[Any], error: ValidationError) -> str:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        places = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'data'}: {problem['msg']}"
            for problem in problems[:5]
        )
        return f"the data of event {event.event!r} is no {self._name}: {places}"

    def event_of(self, event: EventObject[Any]) -> EventObject[Any]:
        """Return *event* with its data as the type; everything else is shared with it."""
        return event.model_copy(update={"data": self.of(event)})


class Handler:
    """A bound function: what it is called with, and where it runs.

    A parameter gets the event when it is annotated `EventObject`, or when it is the first without
    an annotation; ``EventObject[Model]`` gets the event with its data as ``Model``. Any other
    annotation is the type of the payload, one at the most. Parameters with a default that are
    neither keep their default. Plain functions run in a worker thread.

    Raises:
        ConfigurationError: a parameter that nothing can be given for; a generator.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__qualname__", repr(function))
        if _is(inspect.isgeneratorfunction, function) or _is(inspect.isasyncgenfunction, function):
            raise ConfigurationError(f"handler {self.name} is a generator; return the reply instead")
        self._arguments = self._compile()
        self._is_async = _is(inspect.iscoroutinefunction, function)

    def _compile(self) -> list[tuple[str | None, Callable[[EventObject[Any]], Any]]]:
        """Return a source for each parameter, with its name if it is passed by name."""
        hints = self._hints()
        sources: dict[str, Callable[[EventObject[Any]], Any]] = {}
        parameters = inspect.signature(self.function).parameters.values()
        payload: str | None = None
        for parameter in parameters:
            if parameter.kind in _VARIADIC:
                continue
            wanted = hints.get(parameter.name, inspect.Parameter.empty)
            source = _event_source(wanted, first=not sources)
            optional = parameter.default is not inspect.Parameter.empty
            if source is None and not optional and payload is None:
                payload = parameter.name
                source = self._payload_source(parameter.name, wanted)
            if source is not None:
                sources[parameter.name] = source
            elif not optional:
                self._refuse(parameter.name, f"besides the payload {payload!r}" if payload else "")
        by_name = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return [(name if name in by_name else None, source) for name, source in sources.items()]

    def _hints(self) -> dict[str, Any]:
        function: Any = self.function
        while isinstance(function, partial):
            function = function.func
        if not inspect.isroutine(function):
            function = type(function).__call__
        try:
            return get_type_hints(function, include_extras=True)
        except NameError as exc:
            raise ConfigurationError(
                f"handler {self.name}: its annotations name {exc.name!r}, which cannot be found; "
                "define the type at the top of the module"
            ) from exc

    def _payload_source(self, name: str, wanted: Any) -> Callable[[EventObject[Any]], Any]:
        if wanted is inspect.Parameter.empty:
            self._refuse(name, "without an annotation")
        try:
            return Payload(wanted).of
        except TypeError as exc:
            raise ConfigurationError(f"handler {self.name}, parameter {name!r}: {exc}") from exc

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise ConfigurationError(
            f"handler {self.name} has a parameter {name!r} {what} that nothing can be given for; "
            "a handler takes the event (EventObject) and its payload (any other type)"
        )

    async def call(self, event: EventObject[Any], limiter: anyio.CapacityLimiter) -> Any:
        """Call the function for *event*; in one of the limiter's threads if it is a plain one.

        Raises:
            EventDecodeError: the data is not what the function asks for.
            Exception: whatever the function raises.
        """
        positional = [source(event) for name, source in self._arguments if name is None]
        named = {name: source(event) for name, source in self._arguments if name is not None}
        if self._is_async:
            return await self.function(*positional, **named)
        return await anyio.to_thread.run_sync(
            partial(self.function, *positional, **named), limiter=limiter, abandon_on_cancel=True
        )


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    """Return whether *function*, a partial of it or its ``__call__`` is of this kind."""
    while isinstance(function, partial):
        function = function.func
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004  # its kind


def _event_source(wanted: Any, *, first: bool) -> Callable[[EventObject[Any]], Any] | None:
    """Return what gives a parameter the event, or None if it wants something else."""
    if wanted is EventObject or (wanted is inspect.Parameter.empty and first):
        return _same
    if isinstance(wanted, type) and issubclass(wanted, EventObject):
        data = wanted.__pydantic_generic_metadata__["args"] or get_args(wanted)
        return Payload(data[0]).event_of if data and data[0] is not Any else _same
    return None


def _same(event: EventObject[Any]) -> EventObject[Any]:
    return event
