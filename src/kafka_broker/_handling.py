"""What happens to a record: of the module's topic to its reply; of the retry topic, back to it."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from kafka_broker import _wire
from kafka_broker._event import PENDING, RESPOND, EventObject, remember, request_of
from kafka_broker._invoking import Invoker
from kafka_broker._middleware import Handle, Middleware, wrapped
from kafka_broker._outbox import Transfer
from kafka_broker._replying import Replier
from kafka_broker._transport import Outgoing
from kafka_broker.errors import ConfigurationError, EventDecodeError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from kafka_broker._handler import Handler, Scope
    from kafka_broker._lanes import Work
    from kafka_broker._metrics import Metrics
    from kafka_broker._outbox import Outbox
    from kafka_broker._router import EventRouter
    from kafka_broker._settings import BrokerSettings
    from kafka_broker._storage import ConsumerStorage
    from kafka_broker._transport import Transport

    Invocation = Callable[[Work, EventObject[Any]], Coroutine[Any, Any, None]]

_logger = logging.getLogger("kafka_broker.handling")


class Handling:
    """Decodes, routes, answers. Every way a record can end goes through one call of this.

    Args:
        middleware: what users put around every handler.
        scope: what handlers may be given, and the threads of the plain ones.
        ending: whether all tasks of the loop are being cancelled.

    Raises:
        ConfigurationError: middleware of the user raises when it is put around a handler.
    """

    def __init__(  # noqa: PLR0913  # it is where all parts meet
        self,
        settings: BrokerSettings,
        router: EventRouter | None,
        middleware: Sequence[Middleware],
        *,
        storage: ConsumerStorage,
        metrics: Metrics,
        transport: Transport,
        outbox: Outbox,
        scope: Scope,
        ending: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._router = router
        self._middleware = middleware
        self._storage = storage
        self._metrics = metrics
        self._transport = transport
        self._outbox = outbox
        self._scope = scope
        self._invoker = Invoker(
            replier=Replier(outbox, settings.module),
            bury=self._bury,
            postpone=self._postpone,
            now=transport.now,
            metrics=metrics,
            ending=ending,
        )
        self._group = settings.group_id.encode()
        self._invocations: dict[Handler | None, Invocation] = {}
        for handler in router.handlers() if router is not None else ():
            self._compile(handler)

    async def __call__(self, work: Work) -> None:
        """Handle a record; its offset may be committed when the endings of *work* are done."""
        record = work.record
        headers = _wire.named(record.headers)
        work.attempt, group = _wire.standing_of(headers)
        if group is not None and group != self._group:
            return  # it came back for those who share the topic as another group
        try:
            event = _wire.decode(record, headers)
        except EventDecodeError as exc:
            _logger.error("%s", exc)  # noqa: TRY400  # the traceback would quote the payload
            self._bury(work, exc)
            return
        if event.event == RESPOND and self._is_reply(event):
            self._storage.put_reply(event.correlation_id, record)
        elif self._router is None:
            await self._store(work, event)
        else:
            remember(event, work=work)
            work.request = request_of(event)
            handler = self._router.match(event.event)
            if work.behind is not None and (handler is None or handler.terms.batch is None):
                await work.dispatcher.wait_for_turn(work)
            try:
                invoke = self._invocations.get(handler) or self._compile(handler)
            except ConfigurationError as exc:  # it was bound after the start
                _logger.exception("event %r (%s) cannot be handled", event.event, work.where)
                self._bury(work, exc)
            else:
                await invoke(work, event)

    def put_off(self, work: Work) -> None:
        """Leave an event that waits for its next try to the next replica."""
        self._postpone(work, 0)

    def _postpone(self, work: Work, seconds: float) -> None:
        """Send a record through the retry topic."""
        record, due = work.record, self._transport.now() + seconds
        group = self._settings.group_id
        headers = _wire.postponed_headers(record, group, work.attempt + 1, due)
        later = Outgoing(record.key, record.value, headers)
        stump = self._stump(work, TooLargeError())
        topic = self._settings.retry_topic
        work.endings.append(Transfer(self._outbox, topic, later, if_too_large=stump))

    def _bury(self, work: Work, error: Exception) -> None:
        """Put a record into the dead-letter topic as it came, with its origin and the error."""
        record, group = work.record, self._settings.group_id
        headers = _wire.dead_letter_headers(record, group, work.attempt, error)
        letter = Outgoing(record.key, record.value, headers)
        stump, topic = self._stump(work, error), self._settings.dead_letter_topic
        work.endings.append(Transfer(self._outbox, topic, letter, if_too_large=stump))
        self._metrics.count("events_dead_lettered")

    def _stump(self, work: Work, error: Exception) -> tuple[str, Outgoing]:
        """Return a dead letter that says where the value still is, for want of room for it."""
        settings = self._settings
        headers = _wire.stump_headers(work.record, settings.group_id, work.attempt, error)
        return settings.dead_letter_topic, Outgoing(work.record.key, None, headers)

    def _is_reply(self, event: EventObject[Any]) -> bool:
        """Return whether a peer without reply headers, a kafka-broker 0.4, answers to our topic."""
        if event.status == PENDING:
            return False
        unbound = self._router is None or self._router.match(RESPOND) is None
        return unbound or self._storage.waits_for(event.correlation_id)

    async def _store(self, work: Work, event: EventObject[Any]) -> None:
        """Add an event to the storage; it is done when somebody takes it."""
        work.resting = True  # it may wait for room: a rebalance need not wait for that
        try:
            work.endings.append(await self._storage.offer(event))
        finally:
            work.resting = False

    def _compile(self, handler: Handler | None) -> Invocation:
        """Return how to invoke a handler inside of its middleware; once for each."""
        policy, timeout = self._settings.retry, self._settings.handler_timeout
        handle: Handle = _refuse
        if handler is not None:
            policy, timeout = handler.terms.retry or policy, handler.terms.timeout or timeout
            handle = self._wrapped(handler)
        invocation = partial(self._invoker.invoke, handle, policy=policy, timeout=timeout)
        self._invocations[handler] = invocation
        return invocation

    def _wrapped(self, handler: Handler) -> Handle:
        try:
            return wrapped(handler.handle(self._scope), self._middleware)
        except ConfigurationError:
            raise
        except Exception as exc:  # it is the user's code, and runs at the start
            raise ConfigurationError(
                f"middleware around handler {handler.name} raised {type(exc).__name__} as it was "
                "put there"
            ) from exc


async def _refuse(event: EventObject[Any]) -> Any:
    raise NoHandlerError(event.event, event.correlation_id)


class TooLargeError(Exception):
    """With the headers that it needs to come back an event is larger than Kafka takes."""


class Postponed:
    """What happens to a record of the retry topic: when it is due it goes back where it came from.

    There its key is in order again with the others, and in one handler at a time.
    """

    def __init__(self, settings: BrokerSettings, transport: Transport, outbox: Outbox) -> None:
        self._settings = settings
        self._transport = transport
        self._outbox = outbox

    async def __call__(self, work: Work) -> None:
        """Wait until *work* is due, then send it on."""
        record = work.record
        _, group = _wire.standing_of(_wire.named(record.headers))
        if group is not None and group != self._settings.group_id.encode():
            return  # those who share the topic as another group will
        seconds = _wire.due_of(record) - self._transport.now()
        if seconds > 0:
            await work.dispatcher.rest(work, seconds)
        origin = _wire.origin_of(record)[1].decode("utf-8", "replace")
        place = _wire.place_of_origin(origin)
        partition = place[1] if place and place[0] == self._settings.module else None
        back = Outgoing(record.key, record.value, _wire.due_headers(record))
        work.endings.append(
            Transfer(self._outbox, self._settings.module, back, partition=partition)
        )

    def put_off(self, work: Work) -> None:
        """Send a record that still waits to the end of the retry topic."""
        record = work.record
        again = Outgoing(record.key, record.value, record.headers)
        work.endings.append(Transfer(self._outbox, self._settings.retry_topic, again))
