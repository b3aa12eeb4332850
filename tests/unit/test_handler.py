"""Handlers: what a function is given for its parameters, and where it runs."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import threading
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import anyio
import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from kafka_broker import EventObject
from kafka_broker._event import Request, remember, request_of
from kafka_broker._handler import Handler, Payload, Scope
from kafka_broker.errors import ConfigurationError, EventDecodeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from decimal import Decimal

SECRET = "4000-secret"
"""Data that no text may show."""


class Card(BaseModel):
    number: str
    amount: int = 0


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    day: date
    id: UUID
    amount: int


@dataclass
class Point:
    x: int


class Row(TypedDict):
    x: int


class Debit(BaseModel):
    kind: Literal["debit"]


class Credit(BaseModel):
    kind: Literal["credit"]


class Unfinished(BaseModel):
    nothing: Nowhere  # type: ignore[name-defined]  # noqa: F821  # what the test is about


class Subclass(EventObject[Card]):
    pass


class Validated(BaseModel):
    amount: int
    other: int = 1

    @field_validator("amount")
    @classmethod
    def _checked(cls, amount: int) -> int:
        raise ValueError(f"{amount} is too much")

    @field_validator("other")
    @classmethod
    def _worded(cls, _: int) -> int:
        raise PydanticCustomError("odd", "must be even")


async def call(function: Callable[..., Any], data: Any = None, **fields: Any) -> Any:
    event = EventObject(event="card.charge", data=data, **fields)
    return await Handler(function).call(event, Scope(anyio.CapacityLimiter(1)))


async def turn() -> None:
    """Let every task go as far as it can without us."""
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(function: Callable[..., Any], data: Any) -> str:
    """Return the text of the error that the data of an event ends in."""
    with pytest.raises(EventDecodeError) as raised:
        await call(function, data)
    assert (None, True) == (raised.value.__cause__, raised.value.__suppress_context__)
    return str(raised.value)


def takes(wanted: Any) -> Callable[[Any], Any]:
    """Make a handler that returns its payload of a type."""

    async def handler(payload: Any) -> Any:
        return payload

    handler.__annotations__["payload"] = wanted
    return handler


# What a parameter is given


async def test_a_parameter_annotated_as_the_event_is_given_it() -> None:
    """The event itself, not a copy."""

    async def handler(it: EventObject) -> EventObject:
        return it

    event = EventObject(event="a")
    assert event is await Handler(handler).call(event, Scope(anyio.CapacityLimiter(1)))


async def test_a_bare_parameter_is_given_the_event() -> None:
    """The first parameter without an annotation is the event, wherever it stands."""

    async def alone(it):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # as users write
        return it.event

    async def last(card: Card, it):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # as above
        return it.event, card.number

    assert "card.charge" == await call(alone)
    assert ("card.charge", "1") == await call(last, {"number": "1"})


async def test_no_parameters_are_fine() -> None:
    """A handler that looks at nothing is called with nothing."""

    async def handler() -> str:
        return "it"

    assert "it" == await call(handler)


async def test_the_event_may_be_annotated_with_more() -> None:
    """What Annotated adds does not hide the event."""

    async def handler(it: Annotated[EventObject, "more"]) -> str:
        return it.event

    assert "card.charge" == await call(handler)


async def test_the_event_with_its_data_as_a_model() -> None:
    """EventObject[Model] is the event with its data validated; the event received is as before."""

    async def handler(it: EventObject[Card]) -> EventObject[Card]:
        return it

    data = {"number": "1", "amount": "2"}
    event = EventObject(event="a", data=data, status="odd")
    before = event.model_dump()
    request = Request("topic", 1, b"id")
    remember(event, request=request)
    given: EventObject[Card] = await Handler(handler).call(event, Scope(anyio.CapacityLimiter(1)))
    assert Card(number="1", amount=2) == given.data
    assert isinstance(given, EventObject)
    assert before == event.model_dump()
    assert {**before, "data": given.data.model_dump()} == given.model_dump()
    assert (request, event.audit_log) == (request_of(given), given.audit_log)
    assert request is request_of(given)


@pytest.mark.parametrize(
    ("wanted", "data", "expected"),
    [
        (Card, {"number": "1"}, Card(number="1")),
        (Card, Card(number="1"), Card(number="1")),
        (Point, {"x": 1}, Point(1)),
        (Point, Point(1), Point(1)),
        (Row, {"x": "1"}, {"x": 1}),
        (dict, {"x": {"y": 1}}, {"x": {"y": 1}}),
        (dict[str, int], {"x": "1"}, {"x": 1}),
        (list[int], ["1", 2], [1, 2]),
        (int, 3, 3),
        (int | None, None, None),
        (Any, {"x": 1}, {"x": 1}),
        (Annotated[int, Field(gt=0)], 1, 1),
        (Card | None, {"number": "1"}, Card(number="1")),
    ],
)
async def test_the_payload_is_given_as_the_type(wanted: Any, data: Any, expected: Any) -> None:
    """Any annotation that is not the event is the type of the payload, which stays as it is."""
    before = copy.deepcopy(data)
    actual = await call(takes(wanted), data)
    assert (type(expected), expected, before) == (type(actual), actual, data)


async def test_an_instance_of_the_model_is_taken_as_it_is() -> None:
    """Within one process data may be the model already; it is not copied."""
    card = Card(number="1")
    assert card is await call(takes(Card), card)


async def test_a_strict_model_takes_the_forms_of_json() -> None:
    """JSON has no dates and ids, so their text is taken where a strict model wants one."""
    uuid = "00000000-0000-0000-0000-000000000001"
    expected = Strict(day=date(2024, 1, 2), id=UUID(uuid), amount=1)
    assert expected == await call(takes(Strict), {"day": "2024-01-02", "id": uuid, "amount": 1})


async def test_parameters_with_a_default_keep_it() -> None:
    """Only the event is given to a parameter that has a default, wherever that stands."""
    other = EventObject(event="other")

    async def handler(
        first: int = 1, it: EventObject = other, third: int = 3, *, last: str = "last"
    ) -> object:
        return first, it.event, third, last

    assert (1, "card.charge", 3, "last") == await call(handler, 9)


async def test_places_and_names_are_given() -> None:
    """Parameters that take a place only and those that take a name only work side by side."""

    async def handler(card: Card, /, default: int = 1, *, it: EventObject) -> object:
        return card.number, default, it.event

    assert ("1", 1, "card.charge") == await call(handler, {"number": "1"})


async def test_a_place_only_default_before_the_event_is_kept() -> None:
    """The event does not slip into the place of a default."""

    async def handler(default: int = 1, it: EventObject = EventObject(event="x"), /) -> object:  # noqa: B008  # never changed
        return default, it.event

    assert (1, "card.charge") == await call(handler)


async def test_variadic_parameters_are_given_nothing() -> None:
    """A function that takes anything is called with what it names."""

    async def handler(it: EventObject, *rest: Decimal, **more: Decimal) -> object:
        return it.event, rest, more

    assert ("card.charge", (), {}) == await call(handler)


async def test_other_annotations_need_not_be_found() -> None:
    """What a handler returns and its variadic parameters may be known to a type checker only."""

    async def handler(card: Card, *rest: Decimal) -> Decimal:
        return card.amount + sum(rest)  # type: ignore[return-value]  # an int will do

    assert 2 == await call(handler, {"number": "1", "amount": 2})


# What can be a handler


class Methods:
    async def asynchronous(self, card: Card) -> str:
        return f"async {card.number}"

    def plain(self, card: Card) -> str:
        return f"plain {card.number}"

    @classmethod
    async def of_class(cls, card: Card) -> str:
        return f"class {card.number}"

    @staticmethod
    async def static(card: Card) -> str:
        return f"static {card.number}"


class AsyncCallable:
    async def __call__(self, card: Card) -> str:
        return f"async {card.number}"


class PlainCallable:
    def __call__(self, card: Card) -> str:
        return f"plain {card.number}"


async def two(prefix: str, card: Card, suffix: str = "") -> str:
    return f"{prefix} {card.number}{suffix}"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Methods().asynchronous, "async 1"),
        (Methods().plain, "plain 1"),
        (Methods.of_class, "class 1"),
        (Methods.static, "static 1"),
        (AsyncCallable(), "async 1"),
        (PlainCallable(), "plain 1"),
        (functools.partial(two, "partial"), "partial 1"),
        (functools.partial(two, prefix="named"), "named 1"),
        (functools.partial(functools.partial(two, "nested"), suffix="!"), "nested 1!"),
        (functools.partial(AsyncCallable()), "async 1"),
    ],
)
async def test_anything_that_can_be_called(function: Callable[..., Any], expected: str) -> None:
    """Methods, objects, partials and wrappers are handlers like any function."""
    assert expected == await call(function, {"number": "1"})


async def test_a_plain_wrapper_of_an_async_function_is_awaited() -> None:
    """What a decorator that knows nothing of async returns is awaited all the same."""

    @functools.wraps(Methods.static)
    def wrapper(*args: Any) -> Any:
        return Methods.static(*args)

    assert "static 1" == await call(wrapper, {"number": "1"})


async def test_the_parameters_of_what_is_wrapped_count() -> None:
    """An object that wraps a function, like a cache, is given what the function asks for."""

    @functools.lru_cache
    def cached(amount: int) -> int:
        return amount + 1

    assert 3 == await call(cached, "2")


async def test_what_a_partial_binds_is_left_to_it() -> None:
    """An event that a partial gives is not replaced."""

    async def handler(it: EventObject, card: Card) -> object:
        return it.event, card.number

    bound = functools.partial(handler, it=EventObject(event="bound"))
    assert ("bound", "1") == await call(bound, {"number": "1"})


async def test_async_functions_run_in_the_loop_and_plain_ones_in_threads() -> None:
    """A plain function runs elsewhere, with the caller's context variables."""
    variable = contextvars.ContextVar[str]("variable")
    variable.set("ours")

    async def asynchronous() -> object:
        return threading.get_ident(), variable.get()

    def plain() -> tuple[int, str]:
        return threading.get_ident(), variable.get()

    ours = threading.get_ident()
    thread, value = await call(plain)
    assert (ours, "ours") == await call(asynchronous)
    assert (True, "ours") == (thread != ours, value)


# What is refused when it is bound


def generator(card: Card) -> Iterator[int]:
    yield card.amount


async def async_generator(card: Card) -> AsyncIterator[int]:
    yield card.amount


def two_payloads(one: Card, other: Card) -> None: ...
def bare_second(it, other) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001  # what is tested
def bare_beside_event(bare, it: EventObject) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001  # same
def of_type_variable(bad: type[Methods] | Methods) -> None: ...
def unfinished(bad: Unfinished) -> None: ...
def checker_only(bad: Decimal) -> None: ...
def subclassed(it: Subclass) -> None: ...
def bad_event_data(it: EventObject[Methods]) -> None: ...


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (generator, ["generator", "return the reply"]),
        (async_generator, ["generator", "return the reply"]),
        (functools.partial(generator), ["generator"]),
        (two_payloads, ["'other'", "'one'", "annotate one with EventObject"]),
        (bare_second, ["'other'", "no annotation", "annotate one with EventObject"]),
        (bare_beside_event, ["'bare'", "no annotation", "annotate one with EventObject"]),
        (of_type_variable, ["'bad'", "Methods"]),
        (unfinished, ["'bad'", "Nowhere"]),
        (checker_only, ["'bad'", "'Decimal'", "top of the module", "TYPE_CHECKING"]),
        (subclassed, ["'it'", "Subclass", "EventObject[Model]"]),
        (bad_event_data, ["'it'", "Methods"]),
        (dict.get, ["dict.get"]),
        (Card, ["Card", "no function"]),
        ("text", ["no function"]),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(function: Any, texts: list[str]) -> None:
    """The error names the function and the parameter and says what to do."""
    with pytest.raises(ConfigurationError) as raised:
        Handler(function)
    name = getattr(function, "__qualname__", "")
    assert [] == [text for text in [name, *texts] if text not in str(raised.value)]


def test_a_local_type_is_refused_with_the_way_out() -> None:
    """An annotation that is text and names something local cannot be read."""

    class Local(BaseModel):
        x: int

    async def handler(payload: Local) -> None: ...

    with pytest.raises(ConfigurationError, match=r"'Local'.* top of the module"):
        Handler(handler)


# Data that is something else


async def test_the_error_names_event_type_and_places() -> None:
    """Every problem has its place and what was expected there."""
    text = await refusal(takes(list[Card]), [{"number": "1"}, {"number": 2, "amount": SECRET}])
    expected = (
        "the data of event 'card.charge' is no list[test_handler.Card]: "
        "1.number: Input should be a valid string; "
        "1.amount: Input should be a valid integer, unable to parse string as an integer"
    )
    assert expected.replace("test_handler.", f"{__name__}.") == text


async def test_the_error_of_data_without_places() -> None:
    """Data that is altogether different is called data."""
    text = await refusal(takes(int), SECRET)
    assert text.startswith("the data of event 'card.charge' is no int: data: Input should be")


async def test_the_error_of_an_event_with_a_model() -> None:
    """EventObject[Model] fails as the model itself does."""

    async def handler(it: EventObject[Card]) -> None: ...

    assert (await refusal(handler, {})).endswith("is no Card: number: Field required")


async def test_many_problems_are_counted() -> None:
    """The text stays short whatever is sent."""
    text = await refusal(takes(list[int]), ["x"] * 1_000)
    assert text.endswith("; and 995 more")


async def test_a_strict_model_complains_of_what_is_wrong_in_json_only() -> None:
    """The date that JSON writes as text is not among the problems."""
    uuid = "00000000-0000-0000-0000-000000000001"
    text = await refusal(takes(Strict), {"day": "2024-01-02", "id": uuid, "amount": SECRET})
    assert text.endswith("is no Strict: amount: Input should be a valid integer")


@pytest.mark.parametrize(
    ("wanted", "data"),
    [
        (Card, {"number": [SECRET]}),
        (Card, SECRET),
        (Strict, {"day": SECRET, "id": SECRET, "amount": SECRET}),
        (Annotated[Debit | Credit, Field(discriminator="kind")], {"kind": SECRET}),
        (Literal["a"], SECRET),
        (UUID, SECRET),
        (Validated, {"amount": 4000}),
        (Card, {SECRET}),
        (int, object()),
    ],
)
async def test_the_error_never_shows_the_data(wanted: Any, data: Any) -> None:
    """Neither in pydantic's texts nor in those of a validator's ValueError."""
    assert "4000" not in await refusal(takes(wanted), data)


async def test_a_validator_can_word_its_error() -> None:
    """The text of a ValueError may quote the data and is left out; one worded for us is shown."""
    text = await refusal(takes(Validated), {"amount": 1, "other": 2})
    assert text.endswith("is no Validated: amount: value error; other: must be even")


def test_a_payload_of_no_type_is_a_type_error() -> None:
    """Whoever reads data as a type that pydantic does not know learns of it at once."""
    with pytest.raises(TypeError, match="Methods"):
        Payload(Methods)


# Cancellation, at every await


async def test_a_cancelled_async_handler_is_cancelled() -> None:
    """The handler itself is what is awaited."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handler() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(call(handler))
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert (True, True) == (task.cancelled(), ended.is_set())


async def test_a_cancelled_wait_abandons_the_thread() -> None:
    """The wait ends at once; the thread runs to its end, and holds its place until then."""
    loop, begun, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    go_on = threading.Event()

    def plain() -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        loop.call_soon_threadsafe(ended.set)

    limiter = anyio.CapacityLimiter(1)
    event = EventObject(event="a")
    task = asyncio.ensure_future(Handler(plain).call(event, Scope(limiter)))
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert (True, False, 1) == (task.cancelled(), ended.is_set(), limiter.borrowed_tokens)
    go_on.set()
    await ended.wait()
    async with limiter:
        assert 1 == limiter.borrowed_tokens


async def test_a_cancelled_scope_abandons_the_thread() -> None:
    """A cancel scope of anyio, as FastAPI has them, does not wait for the thread either."""
    loop, begun, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    go_on = threading.Event()

    def plain() -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(5)
        loop.call_soon_threadsafe(ended.set)

    async with anyio.create_task_group() as group:
        group.start_soon(call, plain)
        await begun.wait()
        group.cancel_scope.cancel()
    assert not ended.is_set()
    go_on.set()
    await ended.wait()


async def test_a_cancelled_wait_for_a_thread_never_runs_the_function() -> None:
    """While all threads are busy the function has not begun; then it never does."""
    limiter = anyio.CapacityLimiter(1)
    called: list[str] = []
    event = EventObject(event="a")
    async with limiter:
        task = asyncio.ensure_future(
            Handler(lambda: called.append("it")).call(event, Scope(limiter))
        )
        await turn()
        assert 1 == limiter.statistics().tasks_waiting
        task.cancel()
        await asyncio.wait({task})
    assert (True, [], 0) == (task.cancelled(), called, limiter.borrowed_tokens)


async def test_a_cancelled_wait_for_what_a_wrapper_returned_cancels_it() -> None:
    """The coroutine of a plain wrapper is cancelled like any async handler."""
    begun = asyncio.Event()

    async def waits() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(call(lambda: waits()))  # noqa: PLW0108  # the function must be plain
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
