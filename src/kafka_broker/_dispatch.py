"""Consuming: one task that handles one event after the other and commits what is done.

This is the place of the concurrent engine; what surrounds it (`Handling`, the transport's
subscription, the order of a stop) does not change with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from kafka_broker._delivery import Delivery
from kafka_broker._outbox import Burial
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from kafka_broker._event import Ending
    from kafka_broker._outbox import Outbox
    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Record, Subscription, Transport

_logger = logging.getLogger("kafka_broker.dispatch")

_BACKOFF: Final = (0.1, 5.0)
_TURN: Final = 50
_DRAIN_SHARE: Final = 0.8
"""Of the rebalance timeout; the rest is for the commit to travel and the group to settle."""


class Dispatcher:
    """Reads the module's topic as a member of its group.

    An offset is committed when its event and all before it in the partition have ended. Everything
    it knows of a partition is forgotten when the partition goes to another replica.

    Args:
        handle: what happens to a record; its offset waits for the ending that is returned.
        outbox: nothing is handled while it is full.
        forget: called when events that were handed on are another replica's from now on.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        transport: Transport,
        *,
        handle: Callable[[Record], Awaitable[Ending | None]],
        outbox: Outbox,
        forget: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._handle = handle
        self._outbox = outbox
        self._forget = forget
        self._subscription: Subscription | None = None
        self._epoch = 0
        self._waiting: dict[int, deque[tuple[int, Ending | None]]] = defaultdict(deque)
        self._done: dict[int, int] = {}
        self._committing = asyncio.Lock()
        self._commit_due = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._interruptible = False
        self._ours = asyncio.Event()
        self._ours.set()
        self._stopping = False

    async def open(self) -> None:
        """Join the group; does not wait for partitions.

        Raises:
            BrokerUnavailableError: Kafka does not answer, or the topic cannot be read.
        """
        self._subscription = await self._transport.subscribe(
            self._settings.module, on_assigned=self._assigned, on_revoked=self._revoked
        )

    async def run(self) -> None:
        """Handle events until `stop`; a subscription that breaks is replaced."""
        pause = _BACKOFF[0]
        while not self._stopping:
            try:
                if self._subscription is None:
                    await self.open()
                records = await self._fetch(self._subscription)
                await self._handle_all(records, self._epoch)
                await self._commit_if_due()
                await asyncio.sleep(0)  # neither a full buffer nor a handler need suspend
                pause = _BACKOFF[0]
            except BrokerUnavailableError as exc:
                _logger.warning("events cannot be read, trying again in %.1f s: %s", pause, exc)
                await self._leave()
                await self._rest(pause)
                pause = min(pause * 2, _BACKOFF[1])

    async def stop(self, task: asyncio.Task[None]) -> None:
        """Stop fetching, let the running handler end, commit, leave the group.

        Args:
            task: the one that executes `run`.
        """
        self._stopping = True
        self._forget()
        if self._interruptible:
            task.cancel()
        _, running = await asyncio.wait({task}, timeout=self._settings.drain_timeout)
        if running:
            _logger.warning(
                "a handler still runs after %g s; its event will be handled again",
                self._settings.drain_timeout,
            )
            task.cancel()
            await asyncio.wait({task}, timeout=1.0)
        await self._replies_delivered(self._settings.drain_timeout)
        await self._leave(commit=True)

    async def _fetch(self, subscription: Subscription | None) -> Sequence[Record]:
        with self._interrupted_by_stop():
            await self._ours.wait()
            return await subscription.fetch() if subscription else ()
        return ()  # reached when a stop has cut the wait

    async def _rest(self, seconds: float) -> None:
        with self._interrupted_by_stop():
            await asyncio.sleep(seconds)

    @contextmanager
    def _interrupted_by_stop(self) -> Iterator[None]:
        """Mark a wait that a stop may cut short by cancelling it."""
        self._interruptible = True
        try:
            yield
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        finally:
            self._interruptible = False

    async def _handle_all(self, records: Sequence[Record], epoch: int) -> None:
        """Handle what was fetched in *epoch*, as long as that lasts."""
        for number, record in enumerate(records, 1):
            if number % _TURN == 0 or self._outbox.full:
                with self._interrupted_by_stop():
                    await asyncio.sleep(0)  # let replies leave while the next are made
                    await self._outbox.room()
            if self._stopping or not await self._step(record, epoch):
                return

    async def _step(self, record: Record, epoch: int) -> bool:
        """Handle one record of *epoch*; returns whether the next one may be handled."""
        if epoch != self._epoch or not self._ours.is_set():
            return False
        self._idle.clear()
        try:
            ending = await self._handle(record)
        finally:
            self._idle.set()
        if epoch == self._epoch:
            self._waiting[record.partition].append((record.offset + 1, ending))
        if not self._ours.is_set() or epoch != self._epoch:
            self._forget()
            return False
        return True

    def _assigned(self, partitions: frozenset[int]) -> None:
        _logger.info("%s handles partitions %s", self._settings.module, sorted(partitions))

    async def _revoked(self, partitions: frozenset[int]) -> None:
        """End and commit what can be ended in time, then forget the partitions."""
        _logger.info("%s gives up partitions %s", self._settings.module, sorted(partitions))
        self._ours.clear()
        self._forget()
        try:
            async with asyncio.timeout(self._settings.rebalance_timeout * _DRAIN_SHARE):
                await self._idle.wait()
                await self._replies_delivered(self._settings.rebalance_timeout * _DRAIN_SHARE / 2)
                await self._commit()
        except (TimeoutError, BrokerUnavailableError) as exc:
            _logger.warning("partitions move before their events ended: %r", exc)
        finally:
            self._new_epoch()
            self._ours.set()

    async def _replies_delivered(self, timeout: float) -> None:
        endings = [ending for waiting in self._waiting.values() for _, ending in waiting]
        endings = [end.delivery if isinstance(end, Burial) else end for end in endings]
        waits = [self._outbox.wait_for(end) for end in endings if isinstance(end, Delivery)]
        if waits:
            await asyncio.wait(waits, timeout=timeout)

    def _new_epoch(self) -> None:
        self._epoch += 1
        self._waiting.clear()
        self._done.clear()

    async def _commit_if_due(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._commit_due:
            return
        self._commit_due = now + self._settings.commit_interval
        try:
            await self._commit()
        except BrokerUnavailableError as exc:
            _logger.warning("offsets are committed later: %s", exc)

    async def _commit(self) -> None:
        """Commit the offsets up to which everything has ended."""
        async with self._committing:
            epoch = self._epoch
            for partition, waiting in self._waiting.items():
                while waiting and ((ending := waiting[0][1]) is None or ending.done()):
                    self._done[partition] = waiting.popleft()[0]
            offsets = dict(self._done)
            if not offsets or self._subscription is None:
                return
            await self._subscription.commit(offsets)
            if epoch == self._epoch:
                for partition, offset in offsets.items():
                    if self._done.get(partition) == offset:
                        del self._done[partition]

    async def _leave(self, *, commit: bool = False) -> None:
        subscription = self._subscription
        if subscription is None:
            return
        if commit:
            try:
                async with asyncio.timeout(self._settings.drain_timeout):
                    await self._commit()
            except (TimeoutError, BrokerUnavailableError) as exc:
                _logger.warning("the last offsets were not committed: %r", exc)
        self._subscription = None
        self._new_epoch()
        self._forget()
        await subscription.close()
