"""Dispatching: one task reads, a pool of workers handles, and what has ended is committed.

A worker takes one record after the other, so a handler that does not suspend costs no task. While
one waits in its handler, another worker goes on. Which record may run is up to `Lanes`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Final

from kafka_broker._delivery import Delivery
from kafka_broker._health import Pulse
from kafka_broker._isolation import absorb_cancellations, isolated
from kafka_broker._lanes import Lanes
from kafka_broker._outbox import Transfer
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from typing import Any

    from kafka_broker._lanes import Partition, Work
    from kafka_broker._outbox import Outbox
    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Subscription, Transport

_logger = logging.getLogger("kafka_broker.dispatch")

_BACKOFF: Final = (0.1, 5.0)
"""The first and the longest pause, in seconds, before a broken subscription is replaced."""
_TURN: Final = 0.003
"""Seconds for which records are handled that do not suspend before the loop goes round.

A shorter turn makes smaller batches of replies: with a third of it, requests cost a tenth more.
"""
_POLL: Final = 0.5
"""Seconds that a fetch waits for records."""
_POLL_SOME: Final = 0.01
"""Seconds to wait for other partitions while some are full: those may have room soon."""
_PRESSED: Final = 0.02
"""Seconds between commits while so much is uncommitted that handling may have to wait for one."""
_SHARES: Final = (0.5, 0.2, 0.1)
"""Of a rebalance's time: for handlers, for their replies, for the commit; the rest is Kafka's."""
_LISTED: Final = 5
"""Events that a warning names."""
_LAST_WORDS: Final = 1.0
"""Seconds that a handler has to end after it was cancelled."""


class Dispatcher:
    """Reads a topic as a member of a group and has every record handled.

    An offset is committed when its event and all before it in the partition have ended. Everything
    it knows of a partition is forgotten when the partition goes to another replica.

    Args:
        topic, group_id: what is read, and as whom.
        concurrency: how many records are handled at a time.
        max_events: how many may be begun and not committed.
        handle: what happens to a record; it notes the endings that the offset waits for.
        outbox: nothing is begun while it is full.
        forget: called when events that were handed on are another replica's from now on.
        ending: tells whether all our tasks are to end.
        put_off: leaves a record that only rests to the next replica, when commits wait for it.
        keyed: whether records of one key wait for each other; without that a rest may be long.

    Attributes:
        draining: whether nothing new is begun, because partitions move or the broker stops.
        failed: ends in the error of a worker that died: a bug of ours.
        pulse: its signs of life.
    """

    def __init__(  # noqa: PLR0913  # the two topics that a broker reads differ in nearly all of them
        self,
        settings: BrokerSettings,
        transport: Transport,
        *,
        topic: str,
        group_id: str,
        concurrency: int,
        max_events: int,
        handle: Callable[[Work], Coroutine[Any, Any, None]],
        outbox: Outbox,
        forget: Callable[[], None],
        ending: Callable[[], bool],
        put_off: Callable[[Work], None] | None,
        keyed: bool,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._topic = topic
        self._group_id = group_id
        self._handle = handle
        self._outbox = outbox
        self._forget = forget
        self._ending = ending
        self._put_off = put_off
        self._keyed = keyed
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._lanes = Lanes(
            concurrency,
            max_events=max_events,
            max_bytes=settings.in_flight_bytes,
            keyed=keyed,
        )
        self._subscription: Subscription | None = None
        self._ours = asyncio.Event()
        self.draining = False
        self._stopping = False
        self._closed = False
        self._interruptible = False
        self._drained = asyncio.Event()
        self._room = asyncio.Event()
        self._workers: set[asyncio.Task[None]] = set()
        self._idle: list[asyncio.Future[None]] = []
        self._waking = False
        self._at_door = 0
        self._turn_ends: float | None = None
        self._committing = asyncio.Lock()
        self._commit_due = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = math.inf
        self.failed: asyncio.Future[None] = self._loop.create_future()
        grace = settings.rebalance_timeout + settings.session_timeout
        self.pulse = Pulse(self._loop.time, grace)

    async def open(self) -> None:
        """Join the group; does not wait for partitions.

        Raises:
            BrokerUnavailableError: Kafka does not answer, or the topic cannot be read.
        """
        self._ours.set()
        self._subscription = await self._transport.subscribe(
            self._topic, self._group_id, on_assigned=self._assigned, on_revoked=self._revoked
        )

    # Reading

    async def run(self, begin: asyncio.Event) -> None:
        """Read from *begin* until `stop`; a subscription that breaks is replaced."""
        pause = _BACKOFF[0]
        with self._interrupted_by_stop():
            await begin.wait()
        committing = self._loop.create_task(self._commit_regularly())
        committing.add_done_callback(self._commits_ended)
        try:
            while not self._stopping:
                self.pulse.goes_round()
                try:
                    with self._interrupted_by_stop():
                        await self._read()
                    pause = _BACKOFF[0]
                except BrokerUnavailableError as exc:
                    _logger.warning(
                        "events of %s cannot be read, trying again in %.1f s: %s",
                        self._topic,
                        pause,
                        exc,
                    )
                    await self._leave(*self._shares())
                    with self._interrupted_by_stop():
                        await asyncio.sleep(pause)
                    pause = min(pause * 2, _BACKOFF[1])
        finally:
            committing.remove_done_callback(self._commits_ended)
            committing.cancel()
            await asyncio.wait({committing})

    async def _read(self) -> None:
        """Fetch what there is room for, and queue it."""
        if self._subscription is None:
            await self.open()
        await self._ours.wait()
        subscription, full = self._subscription, self._lanes.full()
        if subscription is None:
            return
        if full and len(full) == len(self._lanes.partitions):
            self._commit_due.set()
            self._room.clear()
            self.pulse.pauses(pausing=True)
            await self._room.wait()
            self.pulse.pauses(pausing=False)
            return
        records = await subscription.fetch(full, timeout=_POLL_SOME if full else _POLL)
        self.pulse.has_read()
        if records and self._ours.is_set():
            self._lanes.add(records, self)
            self.wake()
        await asyncio.sleep(0)  # a full buffer need not suspend

    @contextmanager
    def _interrupted_by_stop(self) -> Iterator[None]:
        """Mark waits that a stop may cut short by cancelling them."""
        self._interruptible = True
        try:
            yield
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        finally:
            self._interruptible = False

    # Handling

    def wake(self) -> None:
        """Have a worker look for something to do, unless one is on its way to do so."""
        if self._waking or self._at_door or not self._lanes.startable:
            return
        self._waking = True
        while self._idle:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)
                return
        worker = self._loop.create_task(
            self._work(),
            name=f"kafka_broker {self._topic} worker",
            context=self._context.copy(),  # not that of the handler that happens to run here
        )
        self._workers.add(worker)
        worker.add_done_callback(self._worker_ended)

    async def _work(self) -> None:
        """Handle one record after the other; wait when there is none that may run."""
        self._waking = False
        task = asyncio.current_task()
        while not self._closed:
            if self._turn_is_over():
                await asyncio.sleep(0)  # let replies leave while the next are made
            if self._outbox.full:
                await self._wait_at_door()
            work = self._lanes.next()
            if work is None:
                waiter = self._loop.create_future()
                self._idle.append(waiter)
                await waiter
                self._waking = False
                continue
            await self._run(work, task)
            if task is not None and task.cancelling():
                await absorb_cancellations(self._ending)

    def _turn_is_over(self) -> bool:
        """Return whether the loop has to go round before any worker takes another record."""
        now = self._loop.time()
        if self._turn_ends is None:
            self._turn_ends = now + _TURN
            self._loop.call_soon(self._begin_turn, context=self._context)
        return now >= self._turn_ends

    def _begin_turn(self) -> None:
        self._turn_ends = None

    async def _wait_at_door(self) -> None:
        self._at_door += 1
        try:
            await self._outbox.room()
        finally:
            self._at_door -= 1

    async def _run(self, work: Work, task: asyncio.Task[None] | None) -> None:
        """Handle a record, and again if somebody has cancelled that from outside."""
        work.task = task
        try:
            while True:
                try:
                    if not work.seated:
                        await self.return_to_seat(work)
                    await isolated(self._handle(work), work)
                except asyncio.CancelledError:
                    if work.dropped:  # or put off: it is over, and its worker goes on
                        return
                    if self._closed or self._ending():
                        raise
                else:
                    work.ended = not work.dropped
                    return
                _logger.warning("%s: cancelled from outside, handled again", work.where)
                await absorb_cancellations(self._ending)
        finally:
            work.task = None
            self._end(work)

    def _end(self, work: Work) -> None:
        lanes = self._lanes
        lanes.end(work)
        if not self._room.is_set():
            self._room.set()
        if lanes.idle:
            self._drained.set()
        if work.partition.begun * 2 >= lanes.events_share and not self._commit_due.is_set():
            self._commit_due.set()

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        """Go on without a worker; only a bug of ours ends one, or somebody who cancels it."""
        self._workers.discard(worker)
        if self._ending() or self._stopping:
            return
        if worker.cancelled():
            _logger.warning("%s: a task of the broker was cancelled from outside", self._topic)
            self._waking = False
            self.wake()
        self._note_failure(worker)

    def _commits_ended(self, committing: asyncio.Task[None]) -> None:
        if committing.cancelled() and not self._ending():
            self.failed.cancel()
        self._note_failure(committing)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """Let a bug of ours stop the broker."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    # What a record's handling may ask for

    async def rest(self, work: Work, seconds: float) -> None:
        """Wait without a seat; a rebalance or a stop drops what rests at once.

        Raises:
            CancelledError: it was dropped.
        """
        work.resting, work.resumes = True, self._loop.time() + seconds
        self._lanes.give_up_seat(work)
        self.wake()
        try:
            # the one that has set the limit may go, too: nothing behind it has ended
            if self.draining and work.record.offset >= work.partition.limit:
                self._drop([work])
            await asyncio.sleep(seconds)
        finally:
            work.resting = False
        await self.return_to_seat(work)

    async def return_to_seat(self, work: Work) -> None:
        """Wait for a seat again; those that have waited come before those that are new."""
        seated = asyncio.Event()
        self._lanes.return_to_seat(work, seated.set)
        try:
            await seated.wait()
        except asyncio.CancelledError:
            self._lanes.stay_away(work)
            raise

    def now(self) -> float:
        """Return the seconds since the epoch, as deadlines count them."""
        return self._transport.now()

    def let_wait(self, work: Work) -> None:
        """Let *work* wait in a batch: it needs no seat, and the next of its lane may join it."""
        self._lanes.give_up_seat(work)
        self._lanes.let_pass(work)
        self.wake()

    def let_nobody_pass(self, work: Work) -> None:
        """End what `let_wait` has begun: the batch is closed."""
        work.passable = False

    async def wait_for_turn(self, work: Work) -> None:
        """Wait without a seat, and without spending its time, for those before it in its lane."""
        left, work.expires = work.expires - self._loop.time(), math.inf
        work.turn = asyncio.Event()
        self._lanes.give_up_seat(work)
        self.wake()
        try:
            await work.turn.wait()
        finally:
            work.turn = None
        await self.return_to_seat(work)
        if left < math.inf:
            self.expect_end(work, left)

    def expect_end(self, work: Work, timeout: float) -> None:
        """Cancel the handler of *work* if it still runs *timeout* seconds from now."""
        work.expires = self._loop.time() + timeout
        if work.expires < self._sweep_at:
            self._sweep_at = work.expires
            if self._sweeper is not None:
                self._sweeper.cancel()
            self._sweeper = self._loop.call_at(work.expires, self._sweep, context=self._context)

    def _sweep(self) -> None:
        """Cancel the handlers whose time is over; come again for the next."""
        now, self._sweep_at, self._sweeper = self._loop.time(), math.inf, None
        for work in self._lanes.working:
            if work.expires <= now and work.task is not None:
                if work.timed_out:
                    _logger.error("the handler of %s goes on after it was cancelled", work.where)
                work.timed_out = True
                work.expires = now + self._settings.handler_timeout
                work.task.cancel()
            self._sweep_at = min(self._sweep_at, work.expires)
        if self._sweep_at < math.inf:
            self._sweeper = self._loop.call_at(self._sweep_at, self._sweep, context=self._context)

    # Commits

    async def _commit_regularly(self) -> None:
        while True:
            partitions = self._lanes.partitions.values()
            begun = max((partition.begun for partition in partitions), default=0)
            if begun * 2 >= self._lanes.events_share:
                await asyncio.sleep(_PRESSED)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.commit_interval):
                        await self._commit_due.wait()
            self._commit_due.clear()
            if begun >= self._lanes.events_share and not self._keyed:
                self._put_off_those(before=lambda one: one.last_ended)
            try:
                await self._commit()
            except BrokerUnavailableError as exc:
                _logger.warning("%s: offsets are committed later: %s", self._topic, exc)

    async def _commit(self) -> None:
        """Commit the offsets up to which everything has ended."""
        async with self._committing:
            partitions = self._lanes.partitions
            offsets = {
                number: offset
                for number, partition in partitions.items()
                if (offset := partition.watermark.advance()) is not None
            }
            if not offsets or self._subscription is None:
                return
            accepted = await self._subscription.commit(offsets)
            if not accepted or partitions is not self._lanes.partitions:
                return
            for number, offset in offsets.items():
                self._lanes.committed(number, offset)
            self._room.set()
            self.wake()

    # Rebalances and the stop

    def _assigned(self, partitions: frozenset[int]) -> None:
        if partitions:
            _logger.info("%s: handles partitions %s", self._topic, sorted(partitions))
        else:
            # expected of the retry topic, which has one
            level = logging.WARNING if self._keyed else logging.INFO
            _logger.log(
                level,
                "%s: no partition is left for this replica, which stands by: there are more "
                "replicas than partitions",
                self._topic,
            )
        self._lanes.assign(partitions)
        self.pulse.has_partitions(len(partitions))
        self.draining = self._stopping
        self._room.set()

    async def _revoked(self, partitions: frozenset[int]) -> None:
        """End and commit what can be ended in time, then forget the partitions."""
        _logger.info("%s: gives up partitions %s", self._topic, sorted(partitions))
        self._ours.clear()
        self.pulse.has_none()
        try:
            await self._finish(*self._shares())
        finally:
            self._let_go()
            self._ours.set()
        _logger.info("%s: gave up partitions %s", self._topic, sorted(partitions))

    def _shares(self) -> tuple[float, float, float]:
        handlers, replies, commit = _SHARES
        seconds = self._settings.rebalance_timeout
        return handlers * seconds, replies * seconds, commit * seconds

    async def stop(self, task: asyncio.Task[None]) -> None:
        """Stop reading, let what runs end, commit, leave the group; each step has its deadline.

        Args:
            task: the one that executes `run`.
        """
        timeout = self._settings.drain_timeout
        self._stopping = True
        if self._interruptible:
            task.cancel()
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_LAST_WORDS)
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("%s: reading failed as it was stopped", self._topic, exc_info=error)
        if self._subscription is not None:
            with suppress(TimeoutError):  # a rebalance that has begun has deadlines of its own
                async with asyncio.timeout(timeout):
                    await self._ours.wait()
        await self._leave(timeout, timeout, timeout)
        self._closed = True
        for worker in self._workers:
            worker.cancel()
        if self._workers:
            await asyncio.wait(self._workers, timeout=_LAST_WORDS)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.failed.cancel()
        _logger.info("%s: left the group %s", self._topic, self._group_id)

    async def close(self) -> None:
        """Leave the group at once; called alone after a start that did not come to reading."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def _leave(self, for_handlers: float, for_replies: float, for_commit: float) -> None:
        """Give everything up and leave the group."""
        try:
            if self._subscription is not None:
                await self._finish(for_handlers, for_replies, for_commit)
        except Exception:  # a bug of ours: leave the group all the same
            _logger.exception("%s was not given up in order", self._topic)
        finally:
            self._let_go()
            await self.close()

    async def _finish(self, for_handlers: float, for_replies: float, for_commit: float) -> None:
        """Let what was begun end, and what is before it; have its replies delivered; commit."""
        lanes = self._lanes
        self.draining = True
        self._forget()
        lanes.close()
        self._put_off_those(before=lambda one: one.limit, after=self._loop.time() + for_handlers)
        self._drop([w for w in lanes.working if w.resting and w.record.offset > w.partition.limit])
        for work in lanes.working:
            if work.batch is not None:
                work.batch.full.set()  # nobody else may come
        if not lanes.idle:
            _logger.info("%s: waits for handlers, up to %g s", self._topic, for_handlers)
        if not await self._idle_within(for_handlers):
            self._put_off_those(before=lambda one: one.limit)
            lanes.clear()
            running = sorted(work.where for work in lanes.working if not work.dropped)
            _logger.warning(
                "%s: %d handlers still run after %g s; they are cancelled and their events will "
                "be handled again: %s",
                self._topic,
                len(running),
                for_handlers,
                ", ".join(running[:_LISTED]),
            )
            self._drop(lanes.working)
            await self._idle_within(_LAST_WORDS)
        self._forget()
        await self._delivered(for_replies)
        try:
            async with asyncio.timeout(for_commit):
                await self._commit()
        except (TimeoutError, BrokerUnavailableError) as exc:
            _logger.warning("%s: the last offsets were not committed: %r", self._topic, exc)

    def _put_off_those(
        self, *, before: Callable[[Partition], float], after: float = -math.inf
    ) -> None:
        """Put off what rests *before* an offset, as something behind it has ended or will.

        Only what rests until *after* that time of the loop.
        """
        if self._put_off is None:
            return
        for work in self._lanes.working:
            holds_up = work.record.offset < before(work.partition)
            if holds_up and work.resting and work.resumes > after and not work.dropped:
                self._put_off(work)
                work.ended = True
                self._drop([work])

    def _drop(self, works: Iterable[Work]) -> None:
        for work in works:
            work.dropped = True
            if work.task is not None:
                work.task.cancel()

    async def _idle_within(self, timeout: float) -> bool:
        """Return whether nothing is handled any more, at the latest after *timeout* seconds."""
        if not self._lanes.idle:
            self._drained.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._drained.wait()
        return self._lanes.idle

    async def _delivered(self, timeout: float) -> None:
        """Wait until the replies and dead letters of what has ended are in the log."""
        deadline, waited = self._loop.time() + timeout, set[Delivery]()
        while new := self._deliveries() - waited:  # one that is too large is followed by another
            waits = [self._outbox.wait_for(delivery) for delivery in new]
            await asyncio.wait(waits, timeout=max(0.0, deadline - self._loop.time()))
            waited |= new

    def _deliveries(self) -> set[Delivery]:
        """Return what commits wait for."""
        endings = [
            ending.delivery if isinstance(ending, Transfer) else ending
            for partition in self._lanes.partitions.values()
            for work in partition.watermark.pending()
            for ending in work.endings
        ]
        return {ending for ending in endings if isinstance(ending, Delivery)}

    def _let_go(self) -> None:
        self._lanes.assign(())
        self.pulse.has_none()
        self._forget()
