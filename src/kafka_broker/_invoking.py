"""Invoking a handler: its deadline, time limit and retries, and what becomes of its outcome.

Users put middleware around a handler. What the broker itself has to do is in one place around that:
as seven middlewares, one coroutine each, it costs 4 us more for every event.
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

    from kafka_broker._answering import Answers
    from kafka_broker._lanes import Work
    from kafka_broker._middleware import Handle

_logger = logging.getLogger("kafka_broker.handling")

_IN_PLACE: Final = 5.0
"""Seconds that a key waits for a `RetryLater`; longer ones go through the retry topic."""


class Invoker:
    """Invokes handlers; what it needs for all of them is here, what for one is in the call.

    Args:
        answers: sends the replies.
        bury: puts a record into the dead-letter topic, with the error.
        postpone: sends a record through the retry topic, to come back so many seconds later.
        now: the seconds since the epoch.
        metrics: told of every outcome.
        ending: whether all tasks of the loop are being cancelled.
    """

    def __init__(  # noqa: PLR0913  # it is where all ends of an event meet
        self,
        *,
        answers: Answers,
        bury: Callable[[Work, Exception], None],
        postpone: Callable[[Work, float], None],
        now: Callable[[], float],
        metrics: Metrics,
        ending: Callable[[], bool],
    ) -> None:
        self._answers = answers
        self._bury = bury
        self._postpone = postpone
        self._now = now
        self._metrics = metrics
        self._tells = type(metrics).handled is not Metrics.handled
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
        began, name = time.perf_counter() if self._tells else 0.0, event.event
        try:
            result = await self._try(handle, work, event, policy, timeout)
        except Exception as exc:  # noqa: BLE001  # whatever a handler raises ends here
            self._tell(work, name, began, exc)
            self._end_failed(work, event, exc)
        else:
            self._metrics.count("events_expired" if work.too_late else "events_handled")
            self._tell(work, name, began, None)
            self._end(work, event, result)

    def _time_left(self, work: Work) -> float:
        request = work.request
        if request is None or not request.deadline:
            return math.inf
        return request.deadline - self._now()

    def _tell(self, work: Work, name: str, began: float, error: Exception | None) -> None:
        if self._tells:
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
            work.engine.expect_end(work, timeout)
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
            await self._wait_for_next(work, failure, failures, policy)
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

    async def _wait_for_next(
        self, work: Work, failure: Exception, failures: int, policy: RetryPolicy
    ) -> None:
        """Return when the next try may begin.

        Raises:
            Exception: *failure*: there is none.
        """
        if isinstance(failure, RetryLater):
            pause = failure.seconds if failure.seconds <= _IN_PLACE else None
            why = failure.reason
        else:
            pause, why = policy.delay(failures, failure), type(failure).__name__
        if pause is None or self._time_left(work) <= pause:
            raise failure
        self._metrics.count("events_retried")
        _logger.info("%s is tried again in %.1f s: %s", work.where, pause, why)
        await work.engine.rest(work, pause)
        if self._time_left(work) <= 0:  # there was no seat in time
            raise failure
        work.attempt += 1

    # The outcome

    def _end(self, work: Work, event: EventObject[Any], result: object) -> None:
        """Reply with what a handler returned."""
        try:
            self._answers.tell(work, event, result)
        except Exception as exc:  # noqa: BLE001  # it has no form in JSON, or raises as it is read
            self._report(work, event, exc)
            self._tell_or_bury(work, event, exc)

    def _end_failed(self, work: Work, event: EventObject[Any], error: Exception) -> None:
        """Have an event come back later, or tell who waits, or keep it as a dead letter."""
        if isinstance(error, RetryLater) and self._time_left(work) > error.seconds:
            self._postpone(work, error.seconds)
            self._metrics.count("events_postponed")
            _logger.info("%s is handled again in %g s: %s", work.where, error.seconds, error.reason)
            return
        self._report(work, event, error)
        self._tell_or_bury(work, event, error)

    def _tell_or_bury(self, work: Work, event: EventObject[Any], error: Exception) -> None:
        if not self._answers.tell_failure(work, event, error):
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
