"""What happens to one record of the module's topic, from its bytes to its reply."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kafka_broker import _wire
from kafka_broker._event import COMPLETED, ERROR, PENDING, RESPOND, Ending, EventObject
from kafka_broker._outbox import Burial
from kafka_broker._transport import Outgoing
from kafka_broker.errors import EventDecodeError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Callable

    import anyio

    from kafka_broker._delivery import Delivery
    from kafka_broker._metrics import Metrics
    from kafka_broker._outbox import Outbox
    from kafka_broker._router import EventRouter
    from kafka_broker._settings import BrokerSettings
    from kafka_broker._storage import ConsumerStorage
    from kafka_broker._transport import Record, Transport

_logger = logging.getLogger("kafka_broker.handling")


class Handling:
    """Decodes, routes, answers. Every way a record can end goes through one call of this."""

    def __init__(
        self,
        settings: BrokerSettings,
        router: EventRouter | None,
        storage: ConsumerStorage,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._router = router
        self._storage = storage
        self._metrics = metrics

    def open(
        self,
        transport: Transport,
        outbox: Outbox,
        limiter: anyio.CapacityLimiter,
        ending: Callable[[], bool],
    ) -> None:
        """Bind to the parts of one run; *ending* tells whether its tasks are to end."""
        self._transport = transport
        self._ending = ending
        self._outbox = outbox
        self._limiter = limiter

    async def __call__(self, record: Record) -> Ending | None:
        """Handle *record*; its offset may be committed when the ending that is returned is done."""
        try:
            event = _wire.decode(record)
        except EventDecodeError as exc:
            _logger.error("%s", exc)  # noqa: TRY400  # the traceback would quote the payload
            return self._bury(record, exc)
        if self._is_reply(event):
            self._storage.put_reply(event.correlation_id, record)
            return None
        if self._router is None:
            return await self._storage.offer(event)
        request = event._request  # noqa: SLF001  # kept from the user's eyes only
        if request and request.deadline and request.deadline <= self._transport.now():
            self._metrics.count("events_expired")
            _logger.debug("event %r came after its deadline and is not handled", event.event)
            return None
        ending = await self._handle(self._router, event, record)
        await self._take_back_cancellations()
        return ending

    async def _take_back_cancellations(self) -> None:
        """Undo what a handler did to the task that is not its own, also as it returned."""
        task = asyncio.current_task()
        if task is None or not task.cancelling() or self._ending():
            return
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            if self._ending():
                raise
        while task.cancelling():
            task.uncancel()

    def _is_reply(self, event: EventObject[Any]) -> bool:
        """Return whether a peer without reply headers, a kafka-broker 0.4, answers to our topic."""
        if event.event != RESPOND or event.status == PENDING:
            return False
        unbound = self._router is None or self._router.match(RESPOND) is None
        return unbound or self._storage.waits_for(event.correlation_id)

    async def _handle(
        self, router: EventRouter, event: EventObject[Any], record: Record
    ) -> Ending | None:
        handler = router.match(event.event)
        if handler is None:
            return self._fail(event, record, NoHandlerError(event.event, event.correlation_id))
        try:
            result = await handler.call(event, self._limiter)
            ending = self._answer(event, result)
        except asyncio.CancelledError as exc:
            if self._ending():
                raise
            return self._fail(event, record, exc)
        except Exception as exc:  # noqa: BLE001  # whatever a handler raises ends here, answered
            return self._fail(event, record, exc)
        self._metrics.count("events_handled")
        return ending

    def _answer(self, event: EventObject[Any], result: object) -> Ending | None:
        request = event._request  # noqa: SLF001  # as above
        if request is None:
            return None
        if request.answered or (result is None and (request.handed_on or not request.awaited)):
            return request.handed_on
        if isinstance(result, EventObject):
            result = result.data
        return self._reply(event, result)

    def _reply(self, event: EventObject[Any], data: object, *, status: str = COMPLETED) -> Delivery:
        """Send the answer to *event*, which remembers it: it is answered once.

        Raises:
            TypeError: the data has no form in JSON.
        """
        request = event._request  # noqa: SLF001  # as above
        assert request is not None  # noqa: S101  # whoever calls this has looked
        answer = _wire.reply_to(event, data, status=status)
        record = Outgoing(
            str(event.correlation_id).encode(),
            _wire.encode_reply(answer, request, self._settings.module),
            _wire.reply_headers(request),
        )
        request.handed_on = delivery = self._outbox.put(
            request.topic, record, partition=request.partition, urgent=True
        )
        request.answered = True
        return delivery

    def _fail(self, event: EventObject[Any], record: Record, error: BaseException) -> Ending:
        """Tell the one who waits; what nobody waits for is kept in the dead-letter topic."""
        where = f"{record.topic}:{record.partition}:{record.offset}"
        expected = isinstance(error, (NoHandlerError, EventDecodeError))
        _logger.error(
            "event %r (%s, correlation id %s) failed: %s",
            event.event,
            where,
            event.correlation_id,
            error if expected else type(error).__name__,
            exc_info=None if expected else _traceback(error),
        )
        self._metrics.count("events_failed")
        request = event._request  # noqa: SLF001  # as above
        if request is not None and not request.answered:
            answer = self._answer_failure(event, error)
            if answer is not None and request.awaited:
                return answer
        return self._bury(record, error)

    def _answer_failure(self, event: EventObject[Any], error: BaseException) -> Delivery | None:
        try:
            problem = _wire.problem(error, event, self._settings.module)
            return self._reply(event, problem, status=ERROR)
        except Exception:  # a handler may have put anything into its event
            _logger.exception("event %r was changed so that it cannot be answered", event.event)
            return None

    def _bury(self, record: Record, error: BaseException) -> Burial:
        """Put a record into the dead-letter topic as it came, with its origin and the error."""
        self._metrics.count("events_dead_lettered")
        headers = _wire.dead_letter_headers(record, error)
        buried = Outgoing(record.key, record.value, headers)
        return Burial(self._outbox, self._settings.dead_letter_topic, buried)


def _traceback(error: BaseException) -> BaseException | None:
    """Return what may be logged in full: pydantic's errors quote the data they refuse."""
    seen: dict[int, BaseException] = {}  # a chain of causes may bite its own tail
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, ValidationError):
            return None
        seen[id(one)] = one
        ahead += [one.__cause__, one.__context__]
        ahead += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return error
