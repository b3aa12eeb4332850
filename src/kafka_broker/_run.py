"""One life of a broker, from its start to its stop, owned by one supervisor task."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import anyio

from kafka_broker import _wire
from kafka_broker._dispatch import Dispatcher
from kafka_broker._handler import Scope
from kafka_broker._handling import Handling, Postponed
from kafka_broker._health import SILENCE, Check, Health
from kafka_broker._replies import ReplyInbox
from kafka_broker._transport import TopicSpec
from kafka_broker.errors import BrokerClosedError, BrokerError, BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from kafka_broker._metrics import Metrics
    from kafka_broker._middleware import Middleware
    from kafka_broker._outbox import Outbox
    from kafka_broker._router import EventRouter
    from kafka_broker._settings import BrokerSettings
    from kafka_broker._storage import ConsumerStorage
    from kafka_broker._transport import Transport

_logger = logging.getLogger("kafka_broker.life")

_BACKOFF: Final = (0.1, 2.0)
_ASK_EVERY: Final = 3.0
"""Seconds between an answer of Kafka's and the next question whether it is there."""
_ASK_AGAIN: Final = 0.5
"""The same after a question that was not answered: perhaps it was one node of several."""
_ANSWER_WITHIN: Final = 2.0
STOPPED: Final = "the broker was stopped"


def connect(settings: BrokerSettings) -> Transport:
    """Return the transport that the bootstrap servers ask for; nothing is connected yet."""
    if settings.bootstrap_servers.startswith("memory://"):
        from kafka_broker._transport.memory import MemoryTransport  # noqa: PLC0415  # one is enough

        return MemoryTransport(settings)
    from kafka_broker._transport.kafka import KafkaTransport  # noqa: PLC0415  # aiokafka loads slowly

    return KafkaTransport(settings)


class Run:
    """Everything that lives from a start to a stop; belongs to the loop that it is made in.

    Attributes:
        loop: that loop.
        started: ends when the broker is ready, or in the error that kept it from starting.
        failure: what ended it, when that was not a stop.
        awaited: whether somebody waits for its start, and so gets to know how that went.
    """

    def __init__(  # noqa: PLR0913  # the parts that outlive one run, and the run before
        self,
        settings: BrokerSettings,
        router: EventRouter | None,
        storage: ConsumerStorage,
        outbox: Outbox,
        metrics: Metrics,
        *,
        middleware: Sequence[Middleware],
        given: Mapping[type, object],
        after: Run | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = self.loop.create_future()
        self.failure: Exception | None = None
        self.awaited = False
        self._ready = False
        self.outbox = outbox
        self.transport = connect(settings)
        self._settings = settings
        self._router = router
        self._storage = storage
        self._inbox = ReplyInbox(settings.reply_topic, settings.instance, storage, metrics)
        handling = Handling(
            settings,
            router,
            middleware,
            storage=storage,
            metrics=metrics,
            transport=self.transport,
            outbox=outbox,
            scope=Scope(anyio.CapacityLimiter(settings.concurrency), given),
            ending=self._is_cut_off,
        )
        self._dispatchers = {"events": self._dispatcher(settings.module, handling)}
        if router is not None:
            postponed = Postponed(settings, self.transport, outbox)
            self._dispatchers["postponed events"] = self._dispatcher(
                settings.retry_topic, postponed
            )
        self._after = after
        if after is None:
            storage.open()
        self._stopping = asyncio.Event()
        self._handles = asyncio.Event()
        self._replies: list[asyncio.Task[None]] = []
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._watched: set[asyncio.Future[Any]] = set()
        self._drained: asyncio.Future[list[None]] | None = None
        self._changed_at = self._answered_at = self.loop.time()
        self._away = False
        self._task = self.loop.create_task(
            self._supervise(), name=f"kafka_broker {settings.module}"
        )

    @property
    def ready(self) -> bool:
        """Whether it takes part: connected, its reply partition positioned, not stopping."""
        return self._ready and not self.stopping

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stopping.is_set()

    @property
    def over(self) -> bool:
        """Whether nothing of it is left, or nothing can be: its loop was closed."""
        return self._task.done() or self.loop.is_closed()

    def _is_cut_off(self) -> bool:
        """Whether our tasks are cancelled because the loop closes."""
        return self._task.cancelling() > 0 or self._task.done()

    def begin_handling(self) -> None:
        """Join the group and handle events from now on; until then it only sends and asks."""
        self._handles.set()

    async def end_handling(self) -> None:
        """Let what is handled end, commit it, and leave the group; all the rest goes on."""
        if self.ready:
            await self._stop_handling()

    def request_stop(self) -> None:
        """Begin to stop; returns at once."""
        if not self.stopping:
            self._changed_at = self.loop.time()
        self._stopping.set()

    def health(self) -> Health:
        """Return what this run knows of itself."""
        now = self.loop.time()
        reading = {
            name: self._dispatchers[name].pulse for name in self._reading if self._handles.is_set()
        }
        pulses = {"replies": self._inbox.pulse, **reading}
        silent, stuck = now - self._answered_at, self.outbox.stuck()
        steady = self.ready and not self.handling_over  # else loops begin or end
        dead = steady and any(pulse.dead for pulse in pulses.values())
        checks = {
            "life": self._life(now),
            "kafka": Check(silent < SILENCE, silent, "since its last answer"),
            "outbox": Check(
                stuck < SILENCE and not self.outbox.full, stuck, f"{len(self.outbox)} events wait"
            ),
            **{name: pulse.check() for name, pulse in pulses.items()},
        }
        return Health(
            self._settings.module,
            live=self.failure is None and not dead,
            ready=all(check.ok for check in checks.values()),
            checks=checks,
        )

    def _life(self, now: float) -> Check:
        if self.failure is not None:
            detail = "failed"
        elif self.over:
            detail = "stopped"
        elif self.stopping or self.handling_over:
            detail = "stops"
        else:
            detail = "running" if self._ready else "starts"
        return Check(detail == "running", now - self._changed_at, detail)

    def _dispatcher(self, topic: str, handle: Handling | Postponed) -> Dispatcher:
        settings = self._settings
        stored = self._router is None
        return Dispatcher(
            settings,
            self.transport,
            topic=topic,
            group_id=settings.group_id + topic.removeprefix(settings.module),
            concurrency=1 if stored else settings.concurrency,
            # what is stored is bounded by the storage, whichever partitions it comes from
            max_events=(
                (settings.storage_events + settings.in_flight_events) * settings.module_partitions
                if stored
                else settings.in_flight_events
            ),
            handle=handle,
            outbox=self.outbox,
            forget=self._storage.forget_events if stored else _nothing,
            ending=self._is_cut_off,
            put_off=None if stored else handle.put_off,
            keyed=not isinstance(handle, Postponed),
        )

    async def wait_over(self) -> None:
        """Wait until it has stopped; cancelling the wait does not cancel the stop."""
        await asyncio.wait({self._task})

    async def _supervise(self) -> None:
        try:
            if self._after is not None:
                await self._after.wait_over()
                self._after = None
                self._storage.open()
            if await self._until_stopping(self._start()):
                self._ready, self._changed_at = True, self.loop.time()
                self.started.set_result(None)
                name, servers = self._settings.module, self._settings.bootstrap_servers
                _logger.info("%s has started on %s", name, servers)
                await self._watch()
        except BaseException as exc:  # noqa: BLE001  # kept for whoever waits
            self._note(exc)
        await self._shut_down()

    def _note(self, error: BaseException) -> None:
        """Keep what ended this run for those who wait; what nobody will see is logged."""
        if isinstance(error, Exception):
            self.failure = error
        elif not isinstance(error, asyncio.CancelledError):
            self.failure = BrokerError(f"the broker was ended by {error!r}")
            self.failure.__cause__ = error
        if self.started.done():
            if self.failure is not None:
                _logger.critical("the broker stops because one of its tasks died", exc_info=error)
            return
        self.started.set_exception(self.failure or BrokerClosedError(STOPPED))
        if self.failure is not None and not self.awaited:
            _logger.critical("the broker did not start, and nobody waits for it: %s", error)

    async def _until_stopping(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do *work* unless a stop comes first; returns whether it was done."""
        doing = self.loop.create_task(work)
        stopping = self.loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not doing.done():
                doing.cancel()
                await asyncio.wait({doing})
        if doing.cancelled():
            if not self.started.done():
                self.started.set_exception(
                    BrokerClosedError("the broker was stopped as it started")
                )
            return False
        doing.result()
        return True

    async def _start(self) -> None:
        """Try until Kafka answers, at most ``start_timeout`` seconds."""
        deadline = self.loop.time() + self._settings.start_timeout
        pause = _BACKOFF[0]
        refusal: BrokerUnavailableError | None = None
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._connect()
            except TimeoutError as exc:
                if refusal is not None:
                    raise refusal from refusal.__cause__
                msg = f"Kafka did not answer within {self._settings.start_timeout:g} s"
                raise BrokerUnavailableError(msg) from exc
            except BrokerUnavailableError as exc:
                if self.loop.time() + pause > deadline:
                    raise
                refusal = exc
                _logger.warning("not started yet, trying again in %.1f s: %s", pause, exc)
            else:
                return
            await self._disconnect()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _BACKOFF[1])

    async def _connect(self) -> None:
        await self.transport.start()
        await self._ensure_topics()
        await self._inbox.open(self.transport)
        if self._handles.is_set():
            for dispatcher in self._dispatchers.values():
                await dispatcher.open()
        self._answered_at = self.loop.time()
        self._replies = [
            self.loop.create_task(self._inbox.run(self.transport)),
            self.loop.create_task(self._ask_regularly()),
        ]
        self._reading = {
            name: self.loop.create_task(dispatcher.run(self._handles))
            for name, dispatcher in self._dispatchers.items()
        }
        failed = [dispatcher.failed for dispatcher in self._dispatchers.values()]
        self._watched = {*self._replies, *self._reading.values(), *failed}
        instance = self._settings.instance
        self.outbox.open(
            self.transport, _wire.address(self._inbox.topic, self._inbox.partition, instance)
        )

    async def _ask_regularly(self) -> None:
        """Know whether Kafka is there: one that is not, is silent for those who read it."""
        while True:
            try:
                async with asyncio.timeout(_ANSWER_WITHIN):
                    await self.transport.partitions(self._inbox.topic)
            except (TimeoutError, BrokerUnavailableError) as exc:
                silent = self.loop.time() - self._answered_at
                if silent > SILENCE and not self._away:
                    self._away = True
                    reason = str(exc) or "silence"
                    _logger.error("Kafka has not answered for %.0f s: %s", silent, reason)  # noqa: TRY400  # an outage is no bug
                await asyncio.sleep(_ASK_AGAIN)
            else:
                self._answered_at = self.loop.time()
                if self._away:
                    self._away = False
                    _logger.warning("Kafka answers again")
                await asyncio.sleep(_ASK_EVERY)

    async def _ensure_topics(self) -> None:
        settings = self._settings
        retention = str(int(settings.reply_retention * 1000))
        topics = [
            TopicSpec(settings.module, settings.module_partitions),
            TopicSpec(
                settings.reply_topic,
                settings.reply_partitions,
                {"retention.ms": retention, "segment.ms": retention},
            ),
            TopicSpec(settings.dead_letter_topic, 1),
        ]
        if self._router is not None:
            forever = {
                "retention.ms": "-1"
            }  # an event may be postponed for longer than the default
            topics.append(TopicSpec(settings.retry_topic, 1, forever))
        if settings.create_topics:
            await self.transport.create_topics(topics)
            return
        for topic in topics:
            if not await self.transport.partitions(topic.name):
                command = topic.command(settings.bootstrap_servers)
                msg = (
                    f"topic {topic.name!r} does not exist and create_topics is off; run: {command}"
                )
                raise BrokerUnavailableError(msg)

    async def _disconnect(self) -> None:
        for dispatcher in self._dispatchers.values():
            await dispatcher.close()
        await self._inbox.close()
        await self.transport.stop()

    async def _watch(self) -> None:
        """Wait for a stop; a worker that ends before is a bug of ours, and ends everything."""
        stopping = self.loop.create_task(self._stopping.wait())
        ended: set[asyncio.Future[Any]] = set()
        try:
            while not ended and not self.stopping:
                done, _ = await asyncio.wait(
                    {stopping, *self._watched}, return_when=asyncio.FIRST_COMPLETED
                )
                ended = done & self._watched
        finally:
            stopping.cancel()
        for worker in ended:
            if worker.cancelled():
                msg = "one of the broker's own tasks was cancelled, perhaps by a handler"
                raise BrokerError(msg)
            worker.result()

    async def _shut_down(self) -> None:
        """Stop in the order that loses and doubles nothing; every step has a deadline."""
        self._ready = False
        settings = self._settings
        why = STOPPED if self.failure is None else f"the broker failed: {self.failure!r}"
        try:
            _logger.info("%s stops: no more events are read", settings.module)
            await self._stop_handling()
            self.outbox.refuse(why)
            if self.started.exception() is None:
                await self.outbox.flush(settings.drain_timeout)
        finally:
            self._storage.close(why)
            for worker in self._replies:
                worker.cancel()
                await asyncio.wait({worker}, timeout=1.0)
            await self._disconnect()
            self.outbox.close()
            _logger.info("%s has stopped", settings.module)

    async def _stop_handling(self) -> None:
        """Let what is handled end, and commit it; both topics at a time, however often asked."""
        self._watched = {*self._replies}
        if not self._reading:
            return
        if self._drained is None or self._drained.cancelled():
            stops = (self._dispatchers[name].stop(task) for name, task in self._reading.items())
            self._drained = asyncio.gather(*stops)
        await asyncio.wait({self._drained})
        self._drained.result()

    @property
    def handling_over(self) -> bool:
        """Whether it handles no events any more, although it may still send and ask."""
        return self._drained is not None


def _nothing() -> None:
    """Forget nothing: without a storage no events are kept."""
