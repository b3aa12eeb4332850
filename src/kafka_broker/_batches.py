"""Batches: events that are handled by one call of their function, each with its own verdict.

Every event goes through its middleware by itself and meets the others here. The first to come
leads: it waits for the others, takes a seat and calls the function; the rest wait without one.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kafka_broker._event import work_of
from kafka_broker._verdicts import HandlerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kafka_broker._event import EventObject
    from kafka_broker._lanes import Work


class Batch:
    """The events of one call, in the order in which they came.

    Attributes:
        full: set when no others are to come: it has its size, or the broker drains.
        called: whether the function has been called, so that nobody leaves the call any more.
        members: each event's work, what the function takes of it, and what its verdict comes to.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.full = asyncio.Event()
        self.called = False
        self.members: list[tuple[Work, Any, asyncio.Future[Any]]] = []

    def add(self, work: Work, item: Any) -> asyncio.Future[Any]:
        """Take in an event; returns what its verdict will come to."""
        verdict: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.members.append((work, item, verdict))
        work.batch = self
        if len(self.members) >= self._size:
            self.full.set()
        return verdict

    def leave(self, work: Work) -> None:
        """Let an event go that has ended otherwise, unless it is in the call already."""
        work.batch = None
        if not self.called:
            self.members = [member for member in self.members if member[0] is not work]

    def call(self, leader: Work) -> list[Any]:
        """Close the batch; returns what the function takes.

        From now on only the time limit of the *leader* counts. What nobody waits for any more is
        left out.
        """
        for work, _, verdict in self.members:
            request = work.request
            if request and request.deadline and request.deadline <= work.dispatcher.now():
                work.too_late = True
                verdict.set_result(None)
            elif work is not leader:
                work.expires = math.inf
            work.dispatcher.let_nobody_pass(work)
        self.members = [member for member in self.members if not member[2].done()]
        self.called = True
        return [item for _, item, _ in self.members]

    def settle(self, results: list[Any]) -> None:
        """Give each event its verdict."""
        for (_, _, verdict), result in zip(self.members, results, strict=True):
            if verdict.done():
                continue
            if isinstance(result, Exception):
                verdict.set_exception(result)
                verdict.exception()  # retrieved: who waited for it may have been dropped
            else:
                verdict.set_result(result)

    def break_up(self) -> None:
        """Nobody leads any more: whoever waits is cancelled."""
        for _, _, verdict in self.members:
            verdict.cancel()


class Batches:
    """Gathers the events of one bind.

    Args:
        size: the most events for one call.
        within: seconds that the first waits for the others.
        read: from an event to what its function takes; raises what is wrong with the event alone.
        call: calls the function with a list.
    """

    def __init__(
        self,
        size: int,
        within: float,
        *,
        read: Callable[[EventObject[Any]], Any],
        call: Callable[[list[Any]], Awaitable[Any]],
    ) -> None:
        self._size = size
        self._within = within
        self._read = read
        self._call = call
        self._open: Batch | None = None

    async def __call__(self, event: EventObject[Any]) -> Any:
        """Handle *event* together with others; raises what is said of it alone, or of all."""
        item = self._read(event)
        work = work_of(event)
        if work is None:  # by execute_event(): no broker gathers others
            [result] = _results(await self._call([item]), 1)
            if isinstance(result, Exception):
                raise result
            return result
        if work.behind is not None and (self._open is None or work.behind.batch is not self._open):
            await work.dispatcher.wait_for_turn(work)
        batch, leads = self._open, self._open is None
        if batch is None:
            batch = self._open = Batch(self._size)
        verdict = batch.add(work, item)
        if work.dispatcher.draining:
            batch.full.set()  # nobody else may come
        if batch.full.is_set():
            self._open = None
        work.dispatcher.let_wait(work)
        try:
            if leads:
                await self._lead(batch, work)
            return await verdict
        finally:
            batch.leave(work)

    async def _lead(self, batch: Batch, leader: Work) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._within):
                    await batch.full.wait()
            await leader.dispatcher.return_to_seat(leader)
            if self._open is batch:
                self._open = None
            items = batch.call(leader)
            if items:
                batch.settle(await self._results_of(items))
        except asyncio.CancelledError:
            if leader.timed_out:
                late = HandlerTimeoutError("the function of the batch did not end in time")
                batch.settle([late] * len(batch.members))
            raise
        finally:
            if self._open is batch:
                self._open = None
            batch.break_up()

    async def _results_of(self, items: list[Any]) -> list[Any]:
        try:
            return _results(await self._call(items), len(items))
        except Exception as exc:  # noqa: BLE001  # each event of the batch fails with it
            return [exc] * len(items)


def _results(returned: Any, count: int) -> list[Any]:
    """Return a result for each event.

    Raises:
        TypeError: there are more or fewer.
    """
    if returned is None:
        return [None] * count
    if not isinstance(returned, (list, tuple)) or len(returned) != count:
        msg = f"the function of a batch has to return None or a list of {count} results"
        raise TypeError(msg)
    return list(returned)
