"""Replying: what a handler returns, or that it failed, goes to the one who asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kafka_broker import _wire
from kafka_broker._event import COMPLETED, ERROR, EventObject
from kafka_broker._transport import Outgoing

if TYPE_CHECKING:
    from kafka_broker._event import Request
    from kafka_broker._lanes import Work
    from kafka_broker._outbox import Outbox

_logger = logging.getLogger("kafka_broker.handling")


class Replier:
    """Sends the reply to an event, at most once: the event remembers that it was answered."""

    def __init__(self, outbox: Outbox, module: str) -> None:
        self._outbox = outbox
        self._module = module

    def reply(self, work: Work, event: EventObject[Any], result: object) -> None:
        """Reply with what a handler returned, unless it has answered, or nobody waits for None.

        Raises:
            TypeError: it has no form in JSON.
        """
        request = work.request
        if request is None or request.answered or work.too_late:
            return
        if result is None and (request.handed_on or not request.awaited):
            return
        data = result.data if isinstance(result, EventObject) else result
        self._send(work, event, request, data)

    def reply_with_error(self, work: Work, event: EventObject[Any], error: Exception) -> bool:
        """Reply with *error* to whoever may wait; returns whether somebody surely does."""
        request = work.request
        if request is None or request.answered:
            return False
        try:
            problem = _wire.problem(error, event, self._module)
            self._send(work, event, request, problem, status=ERROR)
        except Exception:  # a handler may have put anything into its event
            _logger.exception("event %r was changed so that it cannot be answered", event.event)
            return False
        return request.awaited

    def _send(
        self,
        work: Work,
        event: EventObject[Any],
        request: Request,
        data: object,
        *,
        status: str = COMPLETED,
    ) -> None:
        record = Outgoing(
            str(event.correlation_id).encode(),
            _wire.encode_reply(event, data, request, self._module, status=status),
            _wire.reply_headers(request),
        )
        delivery = self._outbox.put(request.topic, record, partition=request.partition, urgent=True)
        work.endings.append(delivery)
        request.handed_on = delivery
        request.answered = True
