"""`BrokerManager`: produce, request, and the four doors to one start and stop."""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import aclosing, asynccontextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from kafka_broker import _asgi, _wire
from kafka_broker._caller import at_most, trace_now
from kafka_broker._dead_letters import DeadLetter, read_dead_letters, replay
from kafka_broker._event import COMPLETED, PENDING, RESPOND, EventObject, new_id, request_of
from kafka_broker._handler import INJECTED, Payload
from kafka_broker._health import Check, Health
from kafka_broker._isolation import handled_now
from kafka_broker._metrics import Metrics, ShieldedMetrics
from kafka_broker._outbox import Outbox
from kafka_broker._run import Run
from kafka_broker._settings import BrokerSettings, load_settings
from kafka_broker._signals import stopped_by_signals
from kafka_broker._slots import DEFAULT, Default
from kafka_broker._storage import ConsumerStorage
from kafka_broker._transport import Outgoing
from kafka_broker.errors import BrokerClosedError, ConfigurationError, ReplyTimeoutError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
    from types import TracebackType

    from kafka_broker._delivery import Delivery
    from kafka_broker._middleware import Middleware
    from kafka_broker._router import EventRouter

Reply = TypeVar("Reply")


class BrokerManager:
    """One module's connection to Kafka: a service, or one replica of it.

    Making one does no I/O. It is started by one of four doors, ``async with``, `lifespan`,
    `init_consumer_app` or `init_consumer`, and can be started again after a stop, in the same event
    loop or in another.

    Args:
        module: the name of this service and of its topic; ``KAFKA_BROKER_MODULE`` unless given.
        router: what incoming events go to; without one they go to `consumer_storage`.
        middleware: what is put around every handler, outside of that of its routers, the first
            outermost. It is run for each try.
        settings: ready-made settings, in place of *module* and the other arguments.
        metrics: told of everything that is counted.
        **values: any setting of `BrokerSettings` by its name.

    Attributes:
        state: what handlers and their dependencies may use, for example a pool of connections; put
            it there before the start. A lifespan that this broker is added to puts its own there.

    Raises:
        ConfigurationError: a setting is wrong or missing.
    """

    def __init__(
        self,
        module: str | None = None,
        *,
        router: EventRouter | None = None,
        middleware: Sequence[Middleware] = (),
        settings: BrokerSettings | None = None,
        metrics: Metrics | None = None,
        **values: Any,
    ) -> None:
        if settings is not None and (module is not None or values):
            msg = "give either settings or single arguments, not both"
            raise ConfigurationError(msg)
        self.router = router
        self.state: dict[str, Any] = {}
        self._middleware = tuple(middleware)
        self._metrics = Metrics() if metrics is None else ShieldedMetrics(metrics)
        self._settings = settings
        if module is not None or values:
            self._settings = load_settings(module, values)
        self._storage: ConsumerStorage | None = None
        self._outbox: Outbox | None = None
        self._making = threading.Lock()
        self._run: Run | None = None
        self._doors = 0
        self._held = False

    @property
    def settings(self) -> BrokerSettings:
        """The settings; those of the environment are read at the first use.

        Raises:
            ConfigurationError: the environment lacks a setting.
        """
        if self._settings is None:
            self._settings = load_settings(None, {})
        return self._settings

    @property
    def consumer_storage(self) -> ConsumerStorage:
        """What has arrived and was not taken yet, and the waits for what has not arrived."""
        storage = self._storage
        if storage is not None:
            return storage
        with self._making:
            if self._storage is None:
                settings = self.settings
                self._storage = ConsumerStorage(
                    timeout=settings.reply_timeout,
                    ttl=settings.reply_ttl,
                    limit=settings.storage_events,
                    metrics=self._metrics,
                )
            return self._storage

    @property
    def ready(self) -> bool:
        """Whether it is connected, can get replies, and is not stopping."""
        return self._run is not None and self._run.ready and not self._run.over

    def produce(
        self, topic: str, event: EventObject[Any], *, key: str | bytes | None = None
    ) -> Delivery:
        """Send *event* to *topic*; callable with and without ``await``, from any thread.

        The order of calls is the order of events with one key. Before the start events are queued.
        An event that was received keeps the address of its first sender: with the name ``respond``
        and that sender's topic it is the reply, else it goes on and the next module may answer.

        Args:
            topic: a module's name.
            event: sent as it is now; later changes do not matter.
            key: decides the partition as Kafka's Java client does; the correlation id unless given.

        Returns:
            A delivery: await it to know that the event is in the log, or drop it.

        Raises:
            OutboxFullError: too much is waiting; nothing was taken.
            BrokerClosedError: the broker was stopped.
            TypeError: the data has no form in JSON.
        """
        request = request_of(event)
        if request is None:
            correlation_id = str(event.correlation_id)  # a UUID may have been assigned
            value = _wire.encode(event, self.settings.module)
            return self._send(topic, correlation_id, value, key=key)
        origin = event.audit_log[0].location if event.audit_log else None
        is_answer = event.event == RESPOND and topic == origin
        if is_answer:
            status = COMPLETED if event.status == PENDING else event.status
            value = _wire.encode_reply(
                event, event.data, request, self.settings.module, status=status
            )
            headers, topic, partition = (
                _wire.reply_headers(request),
                request.topic,
                request.partition,
            )
        else:
            value = _wire.encode(event, self.settings.module)
            headers, partition = (*_wire.forward_headers(request), *_trace()), None
        record = Outgoing(_bytes(key, str(event.correlation_id)), value, headers)
        delivery = self._open_outbox().put(
            topic, record, keyed=key is not None, partition=partition
        )
        _hold_back(delivery)
        request.handed_on = delivery
        request.answered = request.answered or is_answer
        return delivery

    def _send(
        self,
        topic: str,
        correlation_id: str,
        value: bytes,
        *,
        key: str | bytes | None = None,
        timeout: float | None = None,
    ) -> Delivery:
        outbox, storage = self._open_outbox(), self.consumer_storage
        deadline = useless_after = None
        if timeout is not None and self._run is not None:
            deadline = self._run.transport.now() + timeout
            useless_after = self._run.loop.time() + timeout
        storage.begin(correlation_id)
        record = Outgoing(
            _bytes(key, correlation_id),
            value,
            (*_wire.request_headers(correlation_id, deadline), *_trace()),
        )
        delivery = outbox.put(
            topic,
            record,
            keyed=key is not None,
            addressed=True,
            useless_after=useless_after,
            on_failure=partial(storage.fail, correlation_id),
        )
        _hold_back(delivery)
        return delivery

    def _open_outbox(self) -> Outbox:
        outbox = self._outbox
        if outbox is not None:
            return outbox
        with self._making:
            if self._outbox is None:
                settings = self.settings
                self._outbox = Outbox(
                    delivery_timeout=settings.delivery_timeout,
                    max_events=settings.outbox_events,
                    max_bytes=settings.outbox_bytes,
                    metrics=self._metrics,
                )
            return self._outbox

    @overload
    async def request(
        self,
        topic: str,
        event: str,
        data: object = None,
        *,
        timeout: float | Default = DEFAULT,
        response: type[Reply],
        correlation_id: str | None = None,
        key: str | bytes | None = None,
    ) -> EventObject[Reply]: ...

    @overload
    async def request(
        self,
        topic: str,
        event: str,
        data: object = None,
        *,
        timeout: float | Default = DEFAULT,
        response: None = None,
        correlation_id: str | None = None,
        key: str | bytes | None = None,
    ) -> EventObject[Any]: ...

    async def request(  # noqa: PLR0913  # what one request can ask for
        self,
        topic: str,
        event: str,
        data: object = None,
        *,
        timeout: float | Default = DEFAULT,
        response: type[Any] | None = None,
        correlation_id: str | None = None,
        key: str | bytes | None = None,
    ) -> EventObject[Any]:
        """Send an event and wait for its reply.

        Args:
            topic: the module that is asked.
            event: the dotted name it routes by.
            data: anything that JSON can say, or a pydantic model.
            timeout: in seconds; ``reply_timeout`` of the settings unless given. It travels with the
                request, which is not handled any more once it has passed.
            response: a type, for example a pydantic model, that the reply's data is read as.
            correlation_id: of the request, which nobody else may use; a new UUID unless given.
            key: as `produce`: requests with one key are handled in the order of the calls.

        Raises:
            ReplyTimeoutError: no reply in time; the request may still have been handled.
            RemoteError: the handler failed.
            NoHandlerError: the module does not handle this event.
            DeliveryError: the request could not be delivered.
            ConfigurationError: the timeout is not a positive number of seconds.
            EventDecodeError: the reply is not what *response* asks for.
            BrokerClosedError: the broker is not running, or stopped meanwhile.
            TypeError: the data has no form in JSON.
        """
        seconds = self._seconds(timeout)
        payload = None if response is None else _payload_of(response)
        correlation_id = new_id() if correlation_id is None else correlation_id
        if not seconds:
            raise ReplyTimeoutError(correlation_id, seconds)  # its client has given up
        storage, outbox = self.consumer_storage, self._open_outbox()
        slot = storage.expect(correlation_id, seconds, replies_only=True)
        try:
            value = _wire.encode_request(correlation_id, event, data, self.settings.module)
            delivery = self._send(topic, correlation_id, value, key=key, timeout=seconds)
        except BaseException:
            storage.release(slot)
            raise
        self._metrics.count("requests_sent")
        try:
            reply = await storage.collect(slot)
        except (ReplyTimeoutError, BrokerClosedError, asyncio.CancelledError) as exc:
            unsent = outbox.withdraw(delivery)  # its own: a new start has another one
            if unsent is not None and isinstance(exc, ReplyTimeoutError):
                raise unsent from exc
            raise
        if payload is None:
            return reply
        return payload.event_of(reply)

    def _seconds(self, timeout: float | Default) -> float:
        seconds = self.settings.reply_timeout if isinstance(timeout, Default) else timeout
        if not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
            msg = f"request() needs a timeout in seconds, more than 0; got {seconds!r}"
            raise ConfigurationError(msg)
        return at_most(seconds)

    async def dead_letters(self) -> AsyncIterator[DeadLetter]:
        """Yield what is in this module's dead-letter topic now; it stays there.

        Raises:
            BrokerClosedError: the broker is not running.
            BrokerUnavailableError: Kafka does not answer, or the topic cannot be read.
        """
        run = self._run
        if run is None or not run.ready:
            msg = "the broker is not running: start it first"
            raise BrokerClosedError(msg)
        async with aclosing(
            read_dead_letters(run.transport, self.settings.dead_letter_topic)
        ) as letters:
            async for letter in letters:
                yield letter

    def replay(self, letter: DeadLetter) -> Delivery:
        """Send a dead letter of this module to its topic again, to be handled again.

        It goes into the partition that it came from, with its own key, value and headers, and its
        count of attempts goes on. It stays in the dead-letter topic: replayed twice it is handled
        twice.

        Raises:
            OutboxFullError: too much is waiting; nothing was taken.
            BrokerClosedError: the broker was stopped.
        """
        delivery = replay(letter, self._open_outbox(), self.settings.module)
        _hold_back(delivery)
        return delivery

    def init_consumer(self) -> Awaitable[None]:
        """Start in the running loop; the result can be awaited until the broker is ready.

        Starting a broker that runs joins it. Whoever starts by this door stops by `stop`, or lets
        the loop end: then what was produced is flushed.

        Raises:
            ConfigurationError: a setting is wrong, or it runs in another event loop.
            BrokerUnavailableError: through the awaitable: Kafka did not answer, or refuses us.
            BrokerClosedError: through the awaitable: it was stopped as it started.
        """
        before = self._run
        started = self._start()
        self._held = self._held or self._run is not before
        return started

    def _start(self, *, handling: bool = True) -> _Started:
        run = self._run
        if run is not None and not run.over:
            if run.loop is not asyncio.get_running_loop():
                raise ConfigurationError(self._elsewhere())
            if not run.stopping and not run.handling_over:
                if handling:
                    run.begin_handling()
                return _Started(run)
            run.request_stop()  # it may be that of an application that ends
        run = self._begin(run)
        if handling:
            run.begin_handling()
        return _Started(run)

    def _elsewhere(self) -> str:
        return f"broker {self.settings.module!r} runs in another event loop; stop it there first"

    def _begin(self, before: Run | None) -> Run:
        """Make a new run, which waits for the end of one that is still stopping."""
        storage, ended = self.consumer_storage, before is None or before.over
        if before is not None:
            if before.loop.is_closed():
                storage.abandon()
                before.outbox.close()
            if self._outbox is before.outbox:
                self._outbox = None
            self._doors = 0 if ended else self._doors
            self._held = False
        after = None if ended else before
        outbox = self._open_outbox()
        self._run = Run(
            self.settings,
            self.router,
            storage,
            outbox,
            self._metrics,
            middleware=self._middleware,
            given={BrokerManager: self},
            after=after,
        )
        return self._run

    async def stop(self) -> None:
        """Stop: end handlers, commit, flush, fail the remaining waits. Stopping twice is fine.

        The handler that runs, its reply, the commit and the flush may take ``drain_timeout``
        seconds each; closing the connections takes some seconds more when Kafka does not answer.
        Cancelling the call does not cancel the stop.

        Raises:
            ConfigurationError: it runs in another event loop.
        """
        run = self._run
        self._held = False
        if run is None or run.over:
            return
        if run.loop is not asyncio.get_running_loop():
            raise ConfigurationError(self._elsewhere())
        run.request_stop()
        await run.wait_over()

    async def wait_closed(self) -> None:
        """Return when the broker has stopped: by SIGTERM, SIGINT or `stop`.

        A second signal, while it stops, has its usual effect.

        Raises:
            BrokerClosedError: it is not running.
            ConfigurationError: it runs in another event loop.
            Exception: whatever bug of ours ended it.
        """
        run = self._run
        if run is None or run.loop.is_closed():
            msg = "the broker is not running: start it first"
            raise BrokerClosedError(msg)
        if run.loop is not asyncio.get_running_loop():
            raise ConfigurationError(self._elsewhere())
        with stopped_by_signals(run.request_stop):
            await run.wait_over()
        if run.failure is not None:
            raise run.failure

    async def __aenter__(self) -> Self:
        """Start and wait until ready; raises as `init_consumer`."""
        await self._enter()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, unless others use it; raises what ended it early, if anything did."""
        await self._leave()
        if error is None and self._run is not None and self._run.failure is not None:
            raise self._run.failure

    @asynccontextmanager
    async def _handling(self) -> AsyncIterator[None]:
        """Handle events in this context; after it only if somebody else has started the broker."""
        run = self._run
        if run is not None:
            run.begin_handling()
        try:
            yield
        finally:
            if run is not None and self._doors == 1 and not self._held:
                await run.end_handling()

    async def _enter(self, *, handling: bool = True) -> None:
        started = self._start(handling=handling)
        self._doors += 1
        try:
            await started
        except BaseException:
            await self._leave()
            raise

    async def _leave(self) -> None:
        self._doors = max(0, self._doors - 1)
        if self._doors == 0 and not self._held:
            await self.stop()

    def health(self) -> Health:
        """Return what this broker knows of itself now; see `kafka_broker.fastapi.health_router`.

        Raises:
            ConfigurationError: the environment lacks a setting.
        """
        if self._run is None:
            life = Check(ok=False, age=0.0, detail="not started")
            return Health(self.settings.module, live=True, ready=False, checks={"life": life})
        return self._run.health()

    @asynccontextmanager
    async def lifespan(
        self, app: object = None, *, problems: bool = True
    ) -> AsyncIterator[dict[str, Any]]:
        """Run while an ASGI application does: ``FastAPI(lifespan=broker_manager.lifespan)``.

        It puts `kafka_broker.fastapi.BrokerMiddleware` around the application's routes. The state
        ``{"broker": self, "broker:<module>": self}`` is what `kafka_broker.fastapi.Broker` reads.

        Args:
            app: a Starlette or FastAPI application; another one only runs the broker.
            problems: whether errors that a route raises become HTTP problem answers.
        """
        with _asgi.surrounding(app, self._app_state(), problems=problems) as state:
            async with self:
                yield state

    def _app_state(self) -> dict[str, Any]:
        return {"broker": self, f"broker:{self.settings.module}": self}

    def init_consumer_app(self, app: Any, *, problems: bool = True) -> None:
        """Add this broker to the lifespan of a Starlette or FastAPI application that is made.

        The broker starts before the application's own lifespan, which may send and ask, and stops
        after it. Events are handled only in between, with the state of that lifespan in `state`.
        Otherwise it is as `lifespan`.

        Args:
            app: the application.
            problems: whether errors that a route raises become HTTP problem answers.
        """
        _asgi.surround(app, problems=problems)
        inner: Callable[[Any], Any] = app.router.lifespan_context

        @asynccontextmanager
        async def composed(started: Any) -> AsyncIterator[dict[str, Any]]:
            await self._enter(handling=False)
            try:
                async with inner(started) as theirs:
                    self.state.update(theirs or {})
                    state = {**self._app_state(), **(theirs or {})}
                    with _asgi.surrounding(app, state, problems=problems):  # what came since, too
                        async with self._handling():
                            yield state
            except BaseException:
                await self._leave()
                raise
            await self.__aexit__(None, None, None)

        app.router.lifespan_context = composed


class _Started:
    """Awaits the start of a run without being able to cancel it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __await__(self) -> Generator[Any, Any, None]:
        self._run.awaited = True
        yield from asyncio.wait({self._run.started}).__await__()
        self._run.started.result()


def _trace() -> _wire.Trace:
    """Return the trace headers of the event, or else the client, that the code here works for."""
    work = handled_now.get()
    return trace_now.get() if work is None else _wire.trace_of(work.record)


def _hold_back(delivery: Delivery) -> None:
    """Let the event that is handled here wait with its commit until *delivery* has ended."""
    work = handled_now.get()
    if work is None:
        return
    members = [one for one, _, _ in work.batch.members] if work.batch else [work]
    for one in members:
        if not one.ended:
            one.endings.append(delivery)


def _payload_of(response: Any) -> Payload:
    try:
        hash(response)
    except TypeError:  # Annotated with a dict, for example
        return Payload(response)
    return _payload(response)


@lru_cache(maxsize=512)
def _payload(response: Any) -> Payload:
    return Payload(response)


def _bytes(key: str | bytes | None, correlation_id: str) -> bytes:
    if key is None:
        return correlation_id.encode()
    return key.encode() if isinstance(key, str) else key


INJECTED.add(BrokerManager)
broker_manager: BrokerManager = BrokerManager()
