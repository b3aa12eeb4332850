"""Keeping what one event does to its surroundings from the next one in the same task."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, copy_context
from types import coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from kafka_broker._lanes import Work

handled_now: ContextVar[Work | None] = ContextVar("kafka_broker_handled_now", default=None)
"""The event whose handler runs here, also in the tasks and threads that it began."""


@coroutine
def isolated(handling: Coroutine[Any, Any, None], work: Work) -> Generator[Any, Any, None]:
    """Run *handling* in this task but with context variables of its own, as a task would have.

    Each time it waits another worker is woken.
    """
    run = copy_context().run
    run(handled_now.set, work)
    step: Callable[[Any], Any] = handling.send
    argument: Any = None
    while True:
        try:
            waits_for = run(step, argument)
        except StopIteration:
            return
        work.dispatcher.wake()
        try:
            argument = yield waits_for
            step = handling.send
        except BaseException as exc:  # noqa: BLE001  # a cancellation, for example: it is passed on
            step, argument = handling.throw, exc


async def absorb_cancellations(ending: Callable[[], bool]) -> None:
    """Undo the cancellations that a handler left on its worker's task, unless all are to end.

    Raises:
        CancelledError: they are.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    try:
        await asyncio.sleep(0)  # where one that was asked for and not delivered yet arrives
    except asyncio.CancelledError:
        if ending():
            raise
    while task.cancelling():
        task.uncancel()
