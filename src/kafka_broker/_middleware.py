"""Middleware: what users put around handlers, each a function that wraps a handler in another.

`Handle` is a coroutine function from an event to its result; a `Middleware` takes one and returns
one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

from kafka_broker._event import EventObject
from kafka_broker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

Handle = Callable[[EventObject[Any]], Awaitable[Any]]
"""Handles an event; what it returns is the reply, and what it raises is the failure."""
Middleware = Callable[[Handle], Handle]
"""Wraps a `Handle` in another one."""


def wrapped(handle: Handle, middleware: Sequence[Middleware]) -> Handle:
    """Return *handle* inside of *middleware*, the first outermost.

    Raises:
        ConfigurationError: one of them returns something that cannot be called.
    """
    return reduce(_inside, reversed(middleware), handle)


def _inside(inner: Handle, middleware: Middleware) -> Handle:
    handle: object = middleware(inner)
    if not callable(handle):
        name = getattr(middleware, "__qualname__", repr(middleware))
        raise ConfigurationError(f"middleware {name} returned {handle!r}, which handles nothing")
    return handle
