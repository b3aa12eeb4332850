"""`EventRouter`: from an event's dotted name to the function that handles it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from kafka_broker._handler import Handler, Scope, Terms
from kafka_broker.errors import ConfigurationError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from kafka_broker._event import EventObject
    from kafka_broker._middleware import Middleware
    from kafka_broker._verdicts import RetryPolicy

_logger = logging.getLogger("kafka_broker.router")

_THREADS: Final = 40
_MAX_WORDS: Final = 256
_ONE, _ANY = "*", "#"
_EXACT_RANK, _ONE_RANK, _END_RANK, _ANY_RANK = range(4)

Function = TypeVar("Function", bound="Callable[..., Any]")


class EventRouter:
    """Binds event names to handlers, and other routers below a name of their own.

    The router that a broker has is the highest: its name is the module's and is not part of an
    event's name. ``"test.return"`` finds the router ``test`` in it, and there the bind ``return``.

    Args:
        name: one or more dotted words.
        middleware: what is put around every handler that is bound here or in a router below, the
            first outermost.

    Raises:
        ConfigurationError: the name is not that.
    """

    def __init__(self, name: str, *, middleware: Sequence[Middleware] = ()) -> None:
        _check_words(name, wildcards=False)
        self.name = name
        self._middleware = tuple(middleware)
        self._exact: dict[str, Handler] = {}
        self._patterns: dict[str, Handler] = {}
        self._tree = _Node()
        self._parents: list[EventRouter] = []
        self._scope: Scope | None = None
        self._running: set[asyncio.Task[Any]] = set()

    def bind_event(
        self,
        pattern: str,
        *,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        batch: int | None = None,
        within: float = 0.05,
    ) -> Callable[[Function], Function]:
        """Bind the decorated function to an event name, or to all names that a pattern matches.

        As in RabbitMQ's topic exchange ``*`` stands for one word and ``#`` for any number of words,
        none included; of several that match, the most specific wins, word by word from the left.
        A name of more than 256 words is found by no pattern but ``#`` alone.

        With *batch* the function takes a list, ``list[EventObject]``, ``list[EventObject[Model]]``
        or ``list[Model]``, and returns None or a list with a result for each event, in their order.
        An exception in that list is the verdict on its event alone; one that is raised is that on
        all of them.

        Args:
            pattern: dotted words.
            timeout: seconds for one try; ``handler_timeout`` of the broker unless given.
            retry: when a failed try is followed by another; ``retry`` of the broker unless given.
            batch: the most events for one call.
            within: seconds that the first event of a batch waits for the others.

        Raises:
            ConfigurationError: the pattern is malformed or bound before, a number is out of range,
                or the function has a parameter that nothing can be given for.
        """
        _check_words(pattern, wildcards=True)
        terms = Terms(timeout, retry, batch, within)

        def bind(function: Function) -> Function:
            self._add({pattern: Handler(function, terms)})
            return function

        return bind

    def include_binder(self, router: EventRouter) -> None:
        """Mount *router* below its name; what is bound to it later is found, too.

        Raises:
            ConfigurationError: a name would be bound twice, *router* is included here already, or
                a router would contain itself.
        """
        if any(router is place for place, _, _ in self._places()):
            raise ConfigurationError(f"router {router.name!r} cannot be included in itself")
        if self in router._parents:
            raise ConfigurationError(f"router {router.name!r} is in {self.name!r} already")
        binds = {**router._exact, **router._patterns}
        self._add({f"{router.name}.{pattern}": handler for pattern, handler in binds.items()})
        router._parents.append(self)

    def _places(self) -> list[tuple[EventRouter, str, tuple[Middleware, ...]]]:
        """Return this router and those above, each with what it puts before a name of ours.

        And with the middleware that it puts around a handler of ours, from its own to ours.
        """
        places = [(self, "", self._middleware)]
        for router, prefix, middleware in places:  # grows as it is read
            places += [
                (parent, f"{router.name}.{prefix}", (*parent._middleware, *middleware))
                for parent in router._parents
            ]
        return places

    def _add(self, binds: dict[str, Handler]) -> None:
        """Add binds here and in every router above, or nowhere."""
        added: defaultdict[EventRouter, dict[str, Handler]] = defaultdict(dict)
        for router, prefix, middleware in self._places():
            for pattern, handler in binds.items():
                name = prefix + pattern
                taken = router._bound_to(name) or added[router].get(name)
                if taken is not None:
                    raise ConfigurationError(
                        f"event {name!r} of router {router.name!r} is bound twice: "
                        f"to {taken.name} and to {handler.name}"
                    )
                added[router][name] = handler.within(middleware)
        for router, named in added.items():
            for name, handler in named.items():
                router._insert(name, handler)

    def _bound_to(self, pattern: str) -> Handler | None:
        return self._exact.get(pattern) or self._patterns.get(pattern)

    def _insert(self, pattern: str, handler: Handler) -> None:
        words = pattern.split(".")
        if _ONE in words or _ANY in words:
            self._patterns[pattern] = handler
            self._tree.insert(words, handler)
        else:
            self._exact[pattern] = handler

    def handlers(self) -> list[Handler]:
        """Return everything that is bound here and below."""
        return [*self._exact.values(), *self._patterns.values()]

    def match(self, event: str) -> Handler | None:
        """Return the handler of the event of this name, or None."""
        handler = self._exact.get(event)
        if handler is not None or not self._patterns:
            return handler
        if event.count(".") >= _MAX_WORDS:
            return self._patterns.get(_ANY)
        return self._tree.find(event.split(".") if event else [])

    def execute_event(self, event: EventObject[Any]) -> Execution:
        """Handle *event* in the running loop; the result may be awaited or dropped.

        The handler runs either way, and nothing is replied. Cancelling whoever awaits the result
        does not cancel the handler.

        Returns:
            An awaitable for what the handler returns. It raises what the handler raises; the
            failure of one that is dropped unawaited is logged.

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
        if self._scope is None:
            self._scope = Scope(anyio.CapacityLimiter(_THREADS))
        return await handler.handle(self._scope)(event)


class Execution:
    """A handler that runs; await it for its result, as often as you like.

    A failure is raised to those who await it. Only when none has and none can any more, because
    the last reference is gone, is it logged.
    """

    def __init__(self, task: asyncio.Task[Any], event: EventObject[Any]) -> None:
        self._task = task
        self._report = partial(_log_failure, event.event, event.correlation_id)
        self._told = False

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the handler; returns what it returns, raises what it raises."""
        yield from asyncio.wait({self._task}).__await__()
        self._told = True
        return self._task.result()

    def __del__(self) -> None:
        """Leave a failure that nobody was told to the log."""
        if self._told:
            return
        if self._task.done():
            self._report(self._task)
        else:
            self._task.add_done_callback(self._report)


def _log_failure(event: str, correlation_id: str, task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _logger.error(
            "the handler of event %r (correlation id %s) failed",
            event,
            correlation_id,
            exc_info=error,
        )


class _Node:
    """A place in the tree of wildcard patterns, one level for each word."""

    __slots__ = ("handler", "next", "rank", "stays")

    def __init__(self, *, stays: bool = False) -> None:
        self.next: dict[str, _Node] = {}
        self.stays = stays
        self.handler: Handler | None = None
        self.rank: tuple[list[int], list[str]] = ([], [])

    def insert(self, words: list[str], handler: Handler) -> None:
        node = self
        for word in words:
            node = node.next.setdefault(word, _Node(stays=word == _ANY))
        node.handler = handler
        node.rank = ([*map(_rank, words), _END_RANK], words)

    def find(self, words: list[str]) -> Handler | None:
        """Return the handler of the most specific pattern that matches.

        All patterns are followed at once, so the work is bounded by words times nodes.
        """
        nodes: set[_Node] = set()
        _enter(self, nodes)
        for word in words:
            nodes = _step(nodes, word)
        ends = [node for node in nodes if node.handler is not None]
        return min(ends, key=lambda node: node.rank).handler if ends else None


def _rank(word: str) -> int:
    return {_ONE: _ONE_RANK, _ANY: _ANY_RANK}.get(word, _EXACT_RANK)


def _step(nodes: set[_Node], word: str) -> set[_Node]:
    """Return the nodes that are reached from these by one more word."""
    reached: set[_Node] = set()
    for node in nodes:
        if node.stays:
            reached.add(node)
        _enter(node.next.get(word), reached)
        _enter(node.next.get(_ONE), reached)
    return reached


def _enter(node: _Node | None, nodes: set[_Node]) -> None:
    """Add a node, and those below it that need no further word."""
    while node is not None:
        nodes.add(node)
        node = node.next.get(_ANY)


def _check_words(name: str, *, wildcards: bool) -> None:
    for word in name.split("."):
        if not word or any(letter.isspace() for letter in word):
            raise ConfigurationError(f"{name!r} must be words with dots between them")
        if (_ONE in word or _ANY in word) and not (wildcards and word in (_ONE, _ANY)):
            raise ConfigurationError(
                f"{name!r}: the wildcards * and # stand for whole words, in event names only"
            )
