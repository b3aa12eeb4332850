"""`EventRouter`: from an event's dotted name to the function that handles it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from kafka_broker._handler import Handler
from kafka_broker.errors import ConfigurationError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from kafka_broker._event import EventObject

_logger = logging.getLogger("kafka_broker.router")

_THREADS: Final = 40
_MAX_WORDS: Final = 64
_ONE, _ANY = "*", "#"

Function = TypeVar("Function", bound="Callable[..., Any]")


class _Node:
    """A place in the tree of wildcard patterns, one level for each word."""

    __slots__ = ("handler", "next")

    def __init__(self) -> None:
        self.next: dict[str, _Node] = {}
        self.handler: Handler | None = None


class EventRouter:
    """Binds event names to handlers, and other routers below a name of their own.

    The router that a broker has is the highest: its name is the module's and is not part of an
    event's name. ``"test.return"`` finds the router ``test`` in it, and there the bind ``return``.

    Args:
        name: one or more dotted words.

    Raises:
        ConfigurationError: the name is not that.
    """

    def __init__(self, name: str) -> None:
        _check_words(name, wildcards=False)
        self.name = name
        self._exact: dict[str, Handler] = {}
        self._patterns: dict[str, Handler] = {}
        self._tree = _Node()
        self._parents: list[EventRouter] = []
        self._limiter: anyio.CapacityLimiter | None = None
        self._running: set[asyncio.Task[Any]] = set()

    def bind_event(self, pattern: str) -> Callable[[Function], Function]:
        """Bind the decorated function to an event name, or to all names that a pattern matches.

        As in RabbitMQ's topic exchange ``*`` stands for one word and ``#`` for any number of words,
        none included; of several that match, the most specific wins, word by word from the left.

        Raises:
            ConfigurationError: the pattern is malformed or bound before, or the function has a
                parameter that nothing can be given for.
        """
        _check_words(pattern, wildcards=True)

        def bind(function: Function) -> Function:
            self._add({pattern: Handler(function)})
            return function

        return bind

    def include_binder(self, router: EventRouter) -> None:
        """Mount *router* below its name; what is bound to it later is found, too.

        Raises:
            ConfigurationError: a name would be bound twice, or a router would contain itself.
        """
        if router is self or router in self._ancestors():
            raise ConfigurationError(f"router {router.name!r} cannot be included in itself")
        binds = {**router._exact, **router._patterns}
        self._add({f"{router.name}.{pattern}": handler for pattern, handler in binds.items()})
        router._parents.append(self)

    def _ancestors(self) -> Iterator[EventRouter]:
        for parent in self._parents:
            yield parent
            yield from parent._ancestors()

    def _add(self, binds: dict[str, Handler]) -> None:
        """Add binds here and in every router above, or nowhere."""
        places = list(self._places(binds))
        for router, named in places:
            for pattern, handler in named.items():
                taken = router._exact.get(pattern) or router._patterns.get(pattern)
                if taken is not None:
                    raise ConfigurationError(
                        f"event {pattern!r} of router {router.name!r} is bound twice: "
                        f"to {taken.name} and to {handler.name}"
                    )
        for router, named in places:
            for pattern, handler in named.items():
                router._insert(pattern, handler)

    def _places(
        self, binds: dict[str, Handler]
    ) -> Iterator[tuple[EventRouter, dict[str, Handler]]]:
        yield self, binds
        for parent in self._parents:
            yield from parent._places({f"{self.name}.{name}": bind for name, bind in binds.items()})

    def _insert(self, pattern: str, handler: Handler) -> None:
        words = pattern.split(".")
        if _ONE not in words and _ANY not in words:
            self._exact[pattern] = handler
            return
        self._patterns[pattern] = handler
        node = self._tree
        for word in words:
            node = node.next.setdefault(word, _Node())
        node.handler = handler

    def match(self, event: str) -> Handler | None:
        """Return the handler of the event of this name, or None."""
        handler = self._exact.get(event)
        if handler is None and self._patterns and event.count(".") < _MAX_WORDS:
            handler = _find(self._tree, event.split(".") if event else [], 0, set())
        return handler

    def execute_event(self, event: EventObject[Any]) -> Execution:
        """Handle *event* in the running loop; the result may be awaited or dropped.

        The handler runs either way, and nothing is replied. Cancelling whoever awaits the result
        does not cancel the handler.

        Returns:
            An awaitable for what the handler returns. It raises what the handler raises; a failure
            that nobody awaits is logged.

        Raises:
            NoHandlerError: through the awaitable: nothing is bound to the event's name.
            ConfigurationError: no event loop is running.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as exc:
            raise ConfigurationError("execute_event() needs a running event loop") from exc
        task = loop.create_task(self._execute(event))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return Execution(task, event)

    async def _execute(self, event: EventObject[Any]) -> Any:
        handler = self.match(event.event)
        if handler is None:
            raise NoHandlerError(event.event, event.correlation_id)
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_THREADS)
        return await handler.call(event, self._limiter)


class Execution:
    """A handler that runs; await it for its result."""

    def __init__(self, task: asyncio.Task[Any], event: EventObject[Any]) -> None:
        self._task = task
        self._name, self._correlation_id = event.event, event.correlation_id
        self._waiters = 0
        self._told = False
        task.add_done_callback(self._ended)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the handler; returns what it returns, raises what it raises."""
        self._waiters += 1
        try:
            yield from asyncio.wait({self._task}).__await__()
        finally:
            self._waiters -= 1
        self._told = True
        return self._task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """Log the failure that nobody waits for, once nobody can any more."""
        if not task.cancelled() and task.exception() is not None and not self._waiters:
            task.get_loop().call_soon(self._log_unless_told, task)

    def _log_unless_told(self, task: asyncio.Task[Any]) -> None:
        if not self._told:
            _logger.error(
                "the handler of event %r (correlation id %s) failed",
                self._name,
                self._correlation_id,
                exc_info=task.exception(),
            )


def _find(node: _Node, words: list[str], at: int, failed: set[tuple[int, int]]) -> Handler | None:
    """Return the most specific handler for the words from *at* on.

    What has failed is remembered, so the work is bounded by words times nodes.
    """
    if (id(node), at) in failed:
        return None
    found = node.handler if at == len(words) else None
    if found is None and at < len(words):
        exact = node.next.get(words[at])
        found = _find(exact, words, at + 1, failed) if exact else None
        if found is None and (one := node.next.get(_ONE)):
            found = _find(one, words, at + 1, failed)
    if found is None and (any_number := node.next.get(_ANY)):
        for end in range(at, len(words) + 1):
            found = _find(any_number, words, end, failed)
            if found is not None:
                break
    if found is None:
        failed.add((id(node), at))
    return found


def _check_words(name: str, *, wildcards: bool) -> None:
    for word in name.split("."):
        if not word or any(letter.isspace() for letter in word):
            raise ConfigurationError(f"{name!r} must be words with dots between them")
        if (_ONE in word or _ANY in word) and not (wildcards and word in (_ONE, _ANY)):
            raise ConfigurationError(
                f"{name!r}: the wildcards * and # stand for whole words, in event names only"
            )
