"""What every aiokafka client needs: its options, a bounded close, and errors of our own."""

from __future__ import annotations

import asyncio
import inspect
import logging
import ssl
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aiokafka import AIOKafkaConsumer
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient

from kafka_broker.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterator

    from aiokafka import TopicPartition

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Headers

Result = TypeVar("Result")

REQUEST_TIMEOUT: Final = 12.0
"""Seconds that one exchange with Kafka may take."""
_OURS: Final = frozenset(
    {"enable_auto_commit", "group_id", "key_deserializer", "loop", "value_deserializer"}
)
CLOSE_TIMEOUT: Final = 3.0
"""Seconds that a client may take to stop, before what it holds is taken away."""

FOREIGN: Final = (
    kafka.KafkaError,
    kafka.ConsumerStoppedError,
    kafka.IllegalOperation,
    OSError,
    TimeoutError,
)
_FORBIDDEN: Final = (
    kafka.TopicAuthorizationFailedError,
    kafka.GroupAuthorizationFailedError,
    kafka.ClusterAuthorizationFailedError,
    kafka.TransactionalIdAuthorizationFailed,
)
_LOCKED_OUT: Final = (
    kafka.KafkaConnectionError,
    kafka.AuthenticationFailedError,
    kafka.AuthenticationMethodNotSupported,
    kafka.SaslAuthenticationFailed,
    kafka.UnsupportedSaslMechanismError,
)


class InvalidRecordError(kafka.BrokerResponseError):  # type: ignore[misc]  # untyped base
    """Kafka has refused a record, such as one without a key where it compacts."""

    errno = 87
    message = "INVALID_RECORD"


_TOO_LARGE: Final = (kafka.MessageSizeTooLargeError, kafka.RecordListTooLargeError)
_REFUSED: Final = (
    *_FORBIDDEN,
    *_TOO_LARGE,
    kafka.InvalidTopicError,
    kafka.InvalidTimestampError,
    kafka.UnsupportedForMessageFormatError,
    kafka.PolicyViolationError,
    kafka.InvalidRequiredAcksError,
    InvalidRecordError,
)
_NOT_YET: Final = (
    kafka.UnknownTopicOrPartitionError,
    kafka.LeaderNotAvailableError,
    kafka.NotEnoughReplicasError,
    kafka.NodeNotReadyError,
    kafka.ProducerClosed,
)
"""Not `NotLeaderForPartitionError`: so ends what lost the lead while the replicas copied."""


class Unparsable(NamedTuple):
    """Stands for a record that aiokafka cannot parse; an empty value is no event, so it fails."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None = None
    value: bytes | None = b""
    headers: Headers = ()


def describe(error: BaseException) -> str:
    """Return the error's class and text; ``str()`` of some aiokafka errors raises."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  # str(BrokerResponseError()) raises AttributeError
        text = ""
    name = type(error).__name__
    return text if name in text else f"{name}: {text}".removesuffix(": ")


def unavailable(action: str, error: BaseException, hint: str = "") -> BrokerUnavailableError:
    """Return the error that says which action failed, why, and what to fix."""
    if isinstance(error, _FORBIDDEN):
        hint = hint or "grant the missing permission (ACL) to this user"
    elif isinstance(error, _LOCKED_OUT):
        hint = hint or (
            "check bootstrap_servers, security_protocol and the credentials "
            "(bootstrap_servers=memory:// needs no Kafka)"
        )
    return BrokerUnavailableError(f"{action}: {describe(error)}" + (f"; {hint}" if hint else ""))


def error_of(code: int, topic: str) -> kafka.BrokerResponseError:
    """Return the error that a code means; aiokafka knows those up to 79."""
    if code == InvalidRecordError.errno:
        return InvalidRecordError(topic)
    kind = kafka.for_code(code)
    return kind(topic if kind.errno == code else f"{topic}: code {code}")


def undelivered(topic: str, error: BaseException) -> DeliveryError:
    """Return what a failed append means to the producer: refused, not yet, or unknown."""
    if isinstance(error, _REFUSED):
        return DeliveryError(topic, describe(error), too_large=isinstance(error, _TOO_LARGE))
    if isinstance(error, _NOT_YET):
        return DeliveryError(topic, describe(error), retriable=True)
    return DeliveryUnknownError(topic, describe(error))


@contextmanager
def translated(action: str) -> Iterator[None]:
    try:
        yield
    except FOREIGN as exc:
        raise unavailable(action, exc) from exc


@contextmanager
def reasons_logged() -> Iterator[list[str]]:
    """Collect what aiokafka only logs: why it could not connect."""
    reasons: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reasons.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logger = logging.getLogger("aiokafka")
    logger.addHandler(collector)
    try:
        yield reasons
    finally:
        logger.removeHandler(collector)


def _ssl_context(settings: BrokerSettings) -> ssl.SSLContext | None:
    if "SSL" not in settings.security_protocol.split("_"):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
        if settings.ssl_certfile:
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as exc:
        msg = f"ssl_cafile, ssl_certfile or ssl_keyfile cannot be used: {exc}"
        raise ConfigurationError(msg) from exc
    return context


def options(client: type, settings: BrokerSettings, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for *client*: what every client needs, its own, then the user's."""
    known = inspect.signature(client).parameters
    common = {
        "bootstrap_servers": settings.bootstrap_servers,
        "client_id": settings.instance,
        "security_protocol": settings.security_protocol,
        "ssl_context": _ssl_context(settings),
        "sasl_mechanism": settings.sasl_mechanism,
        "sasl_plain_username": settings.username,
        "sasl_plain_password": settings.password and settings.password.get_secret_value(),
        "metadata_max_age_ms": 30_000,
    }
    chosen = {name: value for name, value in settings.client_options.items() if name in known}
    return {**common, **defaults, **chosen}


def check_options(settings: BrokerSettings) -> None:
    known = {
        name
        for client in (AIOKafkaClient, AIOKafkaConsumer, AIOKafkaAdminClient)
        for name in inspect.signature(client).parameters
    }
    if ours := sorted(settings.client_options.keys() & _OURS):
        msg = f"client_options: {', '.join(ours)} cannot be changed: commits and replies rest on it"
        raise ConfigurationError(msg)
    if unknown := sorted(settings.client_options.keys() - known - {"compression_type"}):
        msg = f"client_options: aiokafka does not know {', '.join(unknown)}"
        raise ConfigurationError(msg)


def tasks_of(client: Any) -> Iterator[asyncio.Future[Any]]:
    """Yield the background tasks of an aiokafka client: private names; ADR 0007 lists them all."""
    coordinator = getattr(client, "_coordinator", None)
    fetcher = getattr(client, "_fetcher", None)
    owners = [
        (coordinator, ("_coordination_task", "_heartbeat_task", "_commit_refresh_task")),
        (coordinator, ("_reset_committed_task", "_reassign_task")),
        (fetcher, ("_fetch_task",)),
        (getattr(client, "_client", client), ("_sync_task",)),
    ]
    for owner, names in owners:
        for name in names:
            if isinstance(task := getattr(owner, name, None), asyncio.Future):
                yield task
    yield from getattr(fetcher, "_pending_tasks", ())


async def close(client: Any, stop: Awaitable[None]) -> None:
    """Stop an aiokafka client within seconds, whatever state it is in.

    Its own ``stop()`` may hang, or raise CancelledError that is not ours: so it runs in a task of
    its own, and what it leaves behind is cancelled.
    """
    stopping = asyncio.ensure_future(stop)
    await asyncio.wait({stopping}, timeout=CLOSE_TIMEOUT)
    leftovers = {stopping, *tasks_of(client)}
    leftovers = {task for task in leftovers if not task.done()}
    for task in leftovers:
        task.cancel()
    if leftovers:
        await asyncio.wait(leftovers, timeout=1.0)
    for task in leftovers:
        if task.done() and not task.cancelled():
            task.exception()  # retrieved: what a client says as it dies helps nobody
    if stopping.done() and not stopping.cancelled() and stopping.exception() is None:
        return
    connections = getattr(client, "_client", client)
    with suppress(Exception, asyncio.CancelledError):
        await asyncio.wait_for(connections.close(), CLOSE_TIMEOUT)


async def connect(settings: BrokerSettings, defaults: dict[str, Any]) -> Any:
    """Return an `AIOKafkaClient` that is connected.

    Raises:
        BrokerUnavailableError: nothing answers, or it refuses us.
    """
    client = AIOKafkaClient(**options(AIOKafkaClient, settings, defaults))
    action = f"cannot connect to Kafka at {settings.bootstrap_servers}"
    with reasons_logged() as reasons:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                await to_its_end(client.bootstrap())
        except FOREIGN as exc:
            await close(client, client.close())
            error = unavailable(action, exc)
            why = f" ({reasons[-1]})" if reasons else ""
            raise BrokerUnavailableError(f"{error}{why}") from exc
        except BaseException:
            await close(client, client.close())
            raise
    return client


async def to_its_end(connecting: Coroutine[Any, Any, Result]) -> Result:
    """Connect; when cancelled give it a second to end by itself: cut off, it leaves a socket."""
    task = asyncio.ensure_future(connecting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=1.0)
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)
        if task.done() and not task.cancelled():
            task.exception()  # retrieved: nobody waits for it any more
        raise


def is_dead(client: Any) -> bool:
    """Return whether the task that keeps the metadata was cancelled; nobody is told."""
    keeper = client._sync_task  # noqa: SLF001  # no public sign of it
    return keeper is None or keeper.done() or keeper.cancelling() > 0


async def leader_of(client: Any, place: TopicPartition) -> int:
    """Return the node that leads a partition; raises what aiokafka does."""
    leader = client.cluster.leader_for_partition(place)
    if leader is None or leader == -1:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            client.add_topic(place.topic)  # a new client knows no topics
            await client.force_metadata_update()
        leader = client.cluster.leader_for_partition(place)
    if leader is None or leader == -1:
        raise kafka.LeaderNotAvailableError(place)
    number: int = leader
    return number
