"""Middleware: everything around a handler, each a function that wraps a handler in another.

`Handle` is a coroutine function from an event to its result; a `Middleware` takes one and returns
one. What the broker itself puts around every handler has that shape, too. From the outside in:
deadline, dead letter, reply, retry topic, observation, retry, time limit; then what users add.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from kafka_broker import _wire
from kafka_broker._event import EventObject, request_of, set_request, set_work
from kafka_broker._isolation import absorb_cancellations, handled_now
from kafka_broker._metrics import Metrics
from kafka_broker._verdicts import (
    HandlerCancelledError,
    HandlerDiedError,
    HandlerTimeoutError,
    Reject,
    RetryLater,
    RetryPolicy,
)
from kafka_broker.errors import ConfigurationError, EventDecodeError, NoHandlerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kafka_broker._lanes import Work

_logger = logging.getLogger("kafka_broker.handling")

Handle = Callable[[EventObject[Any]], Awaitable[Any]]
"""Handles an event; what it returns is the reply, and what it raises is the failure."""
Middleware = Callable[[Handle], Handle]
"""Wraps a `Handle` in another one."""

_IN_PLACE: Final = 5.0
"""Seconds that a key waits for a `RetryLater`; longer ones go through the retry topic."""


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


def current_work() -> Work:
    """Return what is handled here: the broker's own middleware is only around its work."""
    work = handled_now.get()
    assert work is not None  # noqa: S101  # see above
    return work


def _time_left(work: Work, now: float) -> float:
    request = work.request
    return math.inf if request is None or not request.deadline else request.deadline - now


def _may_wait(verdict: RetryLater, now: float) -> bool:
    return _time_left(current_work(), now) > verdict.seconds


def deadline(now: Callable[[], float], metrics: Metrics) -> Middleware:
    """Leave out events whose sender does not wait any more."""

    def wrap(handle: Handle) -> Handle:
        async def in_time(event: EventObject[Any]) -> Any:
            request = current_work().request
            if request is None or not request.deadline or request.deadline > now():
                return await handle(event)
            metrics.count("events_expired")
            _logger.debug("event %r came after its deadline and is not handled", event.event)
            return None

        return in_time

    return wrap


def dead_lettering(bury: Callable[[Work, Exception], None]) -> Middleware:
    """Keep the events that failed and that nobody surely waits for."""

    def wrap(handle: Handle) -> Handle:
        async def kept(event: EventObject[Any]) -> Any:
            try:
                return await handle(event)
            except Exception as exc:  # noqa: BLE001  # whatever a handler raises ends here
                bury(current_work(), exc)

        return kept

    return wrap


def postponing(
    postpone: Callable[[Work, float], None], now: Callable[[], float], metrics: Metrics
) -> Middleware:
    """Send what is to be handled much later through the retry topic."""

    def wrap(handle: Handle) -> Handle:
        async def postponed(event: EventObject[Any]) -> Any:
            try:
                return await handle(event)
            except RetryLater as exc:
                work = current_work()
                if not _may_wait(exc, now()):
                    raise
                postpone(work, exc.seconds)
                work.postponed = True
                metrics.count("events_postponed")
                _logger.info("%s is handled again in %g s: %s", work.where, exc.seconds, exc.reason)

        return postponed

    return wrap


def observing(now: Callable[[], float], metrics: Metrics) -> Middleware:
    """Count and log how events end, and tell the observer."""
    tells = type(metrics).handled is not Metrics.handled

    def tell(began: float, name: str, error: Exception | None) -> None:
        if tells:
            seconds = time.perf_counter() - began
            metrics.handled(current_work().where, name, seconds, error)

    def wrap(handle: Handle) -> Handle:
        async def observed(event: EventObject[Any]) -> Any:
            began, name = time.perf_counter() if tells else 0.0, event.event
            try:
                result = await handle(event)
            except Exception as exc:  # seen and passed on
                if not isinstance(exc, RetryLater) or not _may_wait(exc, now()):
                    report(event, exc, metrics)
                tell(began, name, exc)
                raise
            metrics.count("events_expired" if current_work().too_late else "events_handled")
            tell(began, name, None)
            return result

        return observed

    return wrap


def report(event: EventObject[Any], error: Exception, metrics: Metrics) -> None:
    """Count a failure and log it, once, without the payload."""
    expected = isinstance(error, (NoHandlerError, EventDecodeError, Reject, RetryLater))
    refused = isinstance(error, Reject)
    metrics.count("events_rejected" if refused else "events_failed")
    work = current_work()
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


def retrying(policy: RetryPolicy, now: Callable[[], float], metrics: Metrics) -> Middleware:
    """Try again in place what failed; only the event's own lane waits."""

    def wrap(handle: Handle) -> Handle:
        async def retried(event: EventObject[Any]) -> Any:
            failures = 0
            while True:
                try:
                    return await handle(event)
                except Exception as exc:  # the policy chooses which are worth a try
                    work = current_work()
                    failures += not isinstance(exc, RetryLater)
                    pause = _pause_after(exc, failures, policy)
                    if pause is None or _time_left(work, now()) <= pause:
                        raise
                    why = exc.reason if isinstance(exc, RetryLater) else type(exc).__name__
                    failure = exc
                metrics.count("events_retried")
                _logger.info("%s is tried again in %.1f s: %s", work.where, pause, why)
                await work.engine.rest(work, pause)
                if _time_left(work, now()) <= 0:  # there was no seat in time
                    raise failure
                work.attempt += 1
                event = _afresh(event, work)

        return retried

    return wrap


def _pause_after(error: Exception, failures: int, policy: RetryPolicy) -> float | None:
    if isinstance(error, RetryLater):
        return error.seconds if error.seconds <= _IN_PLACE else None
    return policy.delay(failures, error)


def _afresh(event: EventObject[Any], work: Work) -> EventObject[Any]:
    """Return the event as it came: the try that failed may have changed it."""
    again = _wire.decode(work.record)
    if (request := request_of(event)) is not None:
        set_request(again, request)
    set_work(again, work)
    return again


def guarding(timeout: float, ending: Callable[[], bool]) -> Middleware:
    """End a handler whose time is over, and keep its cancellations to itself.

    Args:
        timeout: seconds for one try.
        ending: whether all tasks of the loop are being cancelled.
    """

    def wrap(handle: Handle) -> Handle:
        async def guarded(event: EventObject[Any]) -> Any:
            work = current_work()
            work.engine.expect_end(work, timeout)
            try:
                result = await handle(event)
            except asyncio.CancelledError as exc:
                if work.dropped or ending():
                    raise
                timed_out = work.timed_out
                await _settle(work, ending)
                if timed_out:
                    text = f"the handler did not end within {timeout:g} s"
                    raise HandlerTimeoutError(text) from exc
                raise HandlerCancelledError from exc
            except (Exception, KeyboardInterrupt, GeneratorExit):
                await _settle(work, ending)
                raise
            except BaseException as exc:  # of a library in another language, or sys.exit()
                await _settle(work, ending)
                raise HandlerDiedError(type(exc).__name__) from exc
            work.expires = math.inf
            if work.timed_out or (work.task is not None and work.task.cancelling()):
                await _settle(work, ending)
            if isinstance(result, (Reject, RetryLater)):
                raise result  # returned where it should have been raised
            return result

        return guarded

    return wrap


async def _settle(work: Work, ending: Callable[[], bool]) -> None:
    """Take the time limit back, and cancellations that came too late or for nobody."""
    work.expires, work.timed_out = math.inf, False
    await absorb_cancellations(ending)
    if work.dropped:
        raise asyncio.CancelledError
