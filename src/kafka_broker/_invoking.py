"""Invoking a handler: its deadline, time limit and retries, and what becomes of its outcome.

All of it is one coroutine around the handler and the users' middleware. As a middleware each, these
steps would cost 4 us more for every event.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from kafka_broker import _wire
from kafka_broker._event import EventObject, remember, request_of
from kafka_broker._isolation import absorb_cancellations
from kafka_broker._metrics import Metrics
from kafka_broker._verdicts import (
    HandlerCancelledError,
    HandlerDiedError,
    HandlerTimeoutError,
    Reject,
    RetryLater,
    RetryPolicy,
)
from kafka_broker.errors import EventDecodeError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_broker._lanes import Work
    from kafka_broker._middleware import Handle
    from kafka_broker._replying import Replier

_logger = logging.getLogger("kafka_broker.handling")

_IN_PLACE: Final = 5.0
"""Seconds that a key waits for a `RetryLater`; longer ones go through the retry topic."""


class Invoker:
    """Has a handler invoked until its event has an outcome: a reply, a dead letter, or nothing.

    Or another try, much later.

    Args:
        replier: sends the replies.
        bury: puts a record into the dead-letter topic, with the error.
        postpone: sends a record through the retry topic, to come back so many seconds later.
        now: the seconds since the epoch.
        metrics: told of every outcome.
        ending: whether all tasks of the loop are being cancelled.
    """

    def __init__(  # noqa: PLR0913  # it is where all ends of an event meet
        self,
        *,
        replier: Replier,
        bury: Callable[[Work, Exception], None],
        postpone: Callable[[Work, float], None],
        now: Callable[[], float],
        metrics: Metrics,
        ending: Callable[[], bool],
    ) -> None:
        self._replier = replier
        self._bury = bury
        self._postpone = postpone
        self._now = now
        self._metrics = metrics
        self._is_observed = type(metrics).handled is not Metrics.handled
        self._ending = ending

    async def invoke(
        self,
        handle: Handle,
        work: Work,
        event: EventObject[Any],
        *,
        policy: RetryPolicy,
        timeout: float,
    ) -> None:
        """Handle an event to its end: its reply, another topic, or nothing.

        An event whose sender does not wait any more is left out.
        """
        if work.request is not None and self._time_left(work) <= 0:
            self._metrics.count("events_expired")
            _logger.debug("event %r came after its deadline and is not handled", event.event)
            return
        began = time.perf_counter() if self._is_observed else 0.0  # else no clock is read
        name = event.event  # a handler may change it
        try:
            result = await self._try(handle, work, event, policy, timeout)
        except Exception as exc:  # noqa: BLE001  # whatever a handler raises ends here
            if isinstance(exc, RetryLater) and self._time_left(work) > exc.seconds:
                self._observe(work, name, began, exc)
                self._come_back(work, exc)
            else:
                self._report(work, event, exc)
                self._observe(work, name, began, exc)
                self._reply_or_bury(work, event, exc)
            if isinstance(exc, (Reject, RetryLater)):
                # a handler may raise one object again and again: each time it would grow
                exc.__traceback__ = None
        else:
            self._metrics.count("events_expired" if work.too_late else "events_handled")
            self._observe(work, name, began, None)
            self._reply(work, event, result)

    def _time_left(self, work: Work) -> float:
        request = work.request
        if request is None or not request.deadline:
            return math.inf
        return request.deadline - self._now()

    def _observe(self, work: Work, name: str, began: float, error: Exception | None) -> None:
        if self._is_observed:
            self._metrics.handled(work.where, name, time.perf_counter() - began, error)

    # The tries

    async def _try(
        self,
        handle: Handle,
        work: Work,
        event: EventObject[Any],
        policy: RetryPolicy,
        timeout: float,
    ) -> Any:
        """Try in place as often as *policy* allows; only the event's own lane waits.

        Raises:
            Exception: the failure, or the verdict, of the last try.
        """
        failures = 0
        while True:
            work.dispatcher.expect_end(work, timeout)
            try:
                result = await handle(event)
            except BaseException as exc:  # noqa: BLE001  # sorted out there
                failure = await self._failure(work, exc, timeout)
            else:
                work.expires = math.inf
                if work.timed_out or (work.task is not None and work.task.cancelling()):
                    await self._settle(work)
                if not isinstance(result, (Reject, RetryLater)):
                    return result
                failure = result  # returned where it should have been raised
            failures += not isinstance(failure, RetryLater)
            try:
                if not await self._may_try_again(work, failure, failures, policy):
                    raise failure
            finally:
                del failure  # whose traceback has this frame: a cycle would keep the payload
            event = _afresh(event, work)

    async def _failure(self, work: Work, error: BaseException, timeout: float) -> Exception:
        """Return what a try that raised *error* has failed with.

        Raises:
            BaseException: the task itself is to end, or the process.
        """
        cancelled, timed_out = isinstance(error, asyncio.CancelledError), work.timed_out
        if cancelled and (work.dropped or self._ending()):
            raise error
        await self._settle(work)
        if isinstance(error, Exception):
            return error
        failure: Exception
        if not cancelled:
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                raise error
            failure = HandlerDiedError(type(error).__name__)  # of Rust, or sys.exit()
        elif timed_out:
            failure = HandlerTimeoutError(f"the handler did not end within {timeout:g} s")
        else:
            failure = HandlerCancelledError()
        failure.__cause__ = error
        return failure

    async def _settle(self, work: Work) -> None:
        """Take the time limit back, and cancellations that came too late or for nobody."""
        work.expires, work.timed_out = math.inf, False
        await absorb_cancellations(self._ending)
        if work.dropped:
            raise asyncio.CancelledError

    async def _may_try_again(
        self, work: Work, failure: Exception, failures: int, policy: RetryPolicy
    ) -> bool:
        """Return whether there is another try, when it may begin."""
        if isinstance(failure, RetryLater):
            pause = failure.seconds if failure.seconds <= _IN_PLACE else None
            why = failure.reason
        else:
            pause, why = policy.delay(failures, failure), type(failure).__name__
        if pause is None or self._time_left(work) <= pause:
            return False
        self._metrics.count("events_retried")
        _logger.info("%s is tried again in %.1f s: %s", work.where, pause, why)
        await work.dispatcher.rest(work, pause)
        if self._time_left(work) <= 0:  # there was no seat in time
            return False
        work.attempt += 1
        return True

    # The outcome

    def _reply(self, work: Work, event: EventObject[Any], result: object) -> None:
        """Reply with what a handler returned."""
        try:
            self._replier.reply(work, event, result)
        except Exception as exc:  # noqa: BLE001  # it has no form in JSON, or raises as it is read
            self._report(work, event, exc)
            self._reply_or_bury(work, event, exc)

    def _come_back(self, work: Work, verdict: RetryLater) -> None:
        """Have an event handled again much later."""
        self._postpone(work, verdict.seconds)
        self._metrics.count("events_postponed")
        text = "%s is handled again in %g s: %s"
        _logger.info(text, work.where, verdict.seconds, verdict.reason)

    def _reply_or_bury(self, work: Work, event: EventObject[Any], error: Exception) -> None:
        """Tell whoever waits for a reply of a failure; keep an event that nobody waits for."""
        if not self._replier.reply_with_error(work, event, error):
            self._bury(work, error)

    def _report(self, work: Work, event: EventObject[Any], error: Exception) -> None:
        """Count a failure and log it, once, without the payload."""
        expected = isinstance(error, (NoHandlerError, EventDecodeError, Reject, RetryLater))
        refused = isinstance(error, Reject)
        self._metrics.count("events_rejected" if refused else "events_failed")
        _logger.log(
            logging.INFO if refused else logging.ERROR,
            "event %r (%s, correlation id %s) %s in try %d: %s",
            event.event,
            work.where,
            event.correlation_id,
            "was refused" if refused else "failed",
            work.attempt,
            error if expected else type(error).__name__,
            exc_info=None if expected else _traceback(error),
        )


def _afresh(event: EventObject[Any], work: Work) -> EventObject[Any]:
    """Return the event as it came: the try that failed may have changed it."""
    again = _wire.decode(work.record)
    remember(again, request=request_of(event), work=work)
    return again


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
