"""What happens to one record of the module's topic, from its bytes to its reply."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from kafka_broker import _wire
from kafka_broker._answering import answering
from kafka_broker._event import PENDING, RESPOND, EventObject, set_work
from kafka_broker._middleware import (
    Handle,
    Middleware,
    bury,
    dead_lettering,
    deadline,
    guarding,
    observing,
    postponing,
    retrying,
    wrapped,
)
from kafka_broker._outbox import Transfer
from kafka_broker._transport import Outgoing
from kafka_broker.errors import EventDecodeError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kafka_broker._handler import Handler, Scope
    from kafka_broker._lanes import Work
    from kafka_broker._metrics import Metrics
    from kafka_broker._outbox import Outbox
    from kafka_broker._router import EventRouter
    from kafka_broker._settings import BrokerSettings
    from kafka_broker._storage import ConsumerStorage
    from kafka_broker._transport import Transport

_logger = logging.getLogger("kafka_broker.handling")


class Handling:
    """Decodes, routes, answers. Every way a record can end goes through one call of this.

    Args:
        middleware: what users put around every handler.
        scope: what handlers may be given, and the threads of the plain ones.
        ending: whether all tasks of the loop are being cancelled.
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
        self._ending = ending
        self._handles: dict[Handler | None, Handle] = {}

    async def __call__(self, work: Work) -> None:
        """Handle a record; its offset may be committed when the endings of *work* are done."""
        record = work.record
        try:
            event = _wire.decode(record)
        except EventDecodeError as exc:
            _logger.error("%s", exc)  # noqa: TRY400  # the traceback would quote the payload
            bury(work, exc, self._outbox, self._settings.dead_letter_topic, self._metrics)
            return
        if self._is_reply(event):
            self._storage.put_reply(event.correlation_id, record)
        elif self._router is None:
            await self._store(work, event)
        else:
            set_work(event, work)
            work.request = event._request  # noqa: SLF001  # kept from the user's eyes only
            work.attempt = _wire.attempt_of(record)
            handler = self._router.match(event.event)
            if work.behind is not None and (handler is None or handler.terms.batch is None):
                await work.engine.wait_for_turn(work)
            handle = self._handles.get(handler) or self._compile(handler)
            await handle(event)

    def _is_reply(self, event: EventObject[Any]) -> bool:
        """Return whether a peer without reply headers, a kafka-broker 0.4, answers to our topic."""
        if event.event != RESPOND or event.status == PENDING:
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

    def _compile(self, handler: Handler | None) -> Handle:
        """Put everything around a handler that belongs there, once."""
        settings, metrics, outbox = self._settings, self._metrics, self._outbox
        now = self._transport.now
        around = [
            deadline(now, metrics),
            dead_lettering(outbox, settings.dead_letter_topic, metrics),
            answering(outbox, settings.module, metrics),
            postponing(outbox, settings.retry_topic, now, metrics),
            observing(now, metrics),
        ]
        if handler is None:
            handle = wrapped(_refuse, around)
        else:
            around += [
                retrying(handler.terms.retry or settings.retry, now, metrics),
                guarding(handler.terms.timeout or settings.handler_timeout, self._ending),
                *self._middleware,
            ]
            handle = wrapped(handler.handle(self._scope), around)
        self._handles[handler] = handle
        return handle


async def _refuse(event: EventObject[Any]) -> Any:
    raise NoHandlerError(event.event, event.correlation_id)


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
        seconds = _wire.due_of(record) - self._transport.now()
        if seconds > 0:
            try:
                await work.engine.rest(work, seconds)
            except asyncio.CancelledError:
                if not work.dropped or not work.partition.watermark.ended_beyond(record.offset):
                    raise
                # The next replica would begin here and repeat what is done behind it already.
                work.dropped = False
                again = Outgoing(record.key, record.value, record.headers)
                work.endings.append(Transfer(self._outbox, self._settings.retry_topic, again))
                return
        origin = _wire.origin_of(record)[1].decode("utf-8", "replace")
        place = _wire.place_of_origin(origin)
        partition = place[1] if place and place[0] == self._settings.module else None
        back = Outgoing(record.key, record.value, _wire.due_headers(record))
        work.endings.append(
            Transfer(self._outbox, self._settings.module, back, partition=partition)
        )
