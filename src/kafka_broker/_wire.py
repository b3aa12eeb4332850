"""The codec: events and their headers to bytes and back.

The value is the envelope of kafka-broker 0.4. Reply addressing is in headers, with the names and
encodings of Spring Kafka and NestJS. Reading is tolerant: whatever bytes come in, the result is an
event or an `EventDecodeError`.
"""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from kafka_broker._event import (
    COMPLETED,
    ERROR,
    PENDING,
    RESPOND,
    EventObject,
    Hop,
    Request,
    note_receipt,
    remember,
)
from kafka_broker._verdicts import HandlerTimeoutError, Reject, RetryLater
from kafka_broker.errors import EventDecodeError, NoHandlerError, RemoteError, RequestError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from kafka_broker._transport import Headers, Record

Trace = tuple[tuple[str, bytes], ...]
"""The headers ``traceparent`` and ``tracestate``, or none."""

CORRELATION_ID = "kafka_correlationId"
REPLY_TOPIC = "kafka_replyTopic"
REPLY_PARTITION = "kafka_replyPartition"
INSTANCE = "kb-instance"
DEADLINE = "kb-deadline"
FORWARDED = "kb-forwarded"
ORIGIN = "kb-origin"
FAILURE = "kb-error"
ATTEMPT = "kb-attempt"
DUE = "kb-due"
GROUP = "kb-group"
TOO_LARGE = "kb-too-large"
TRACE_PARENT = "traceparent"
TRACE_STATE = "tracestate"

_OURS = frozenset({ORIGIN, FAILURE, ATTEMPT, DUE, GROUP})
_MAX_PARTITION = 1_000_000
_MAX_DIGITS = 9
_ENVELOPE = frozenset({"correlation_id", "event"})
_TRACE_PARENT = re.compile(
    rb"(?!ff)[\da-f]{2}-(?!0{32})[\da-f]{32}-(?!0{16})[\da-f]{16}-[\da-f]{2}"  # W3C
)
_read_envelope: Final = EventObject.__pydantic_validator__.validate_json
"""By way of `EventObject.model_validate_json` it costs 0.6 us more."""
_TRACE_STATE = re.compile(rb"[\x20-\x7e]{1,512}")


def encode(event: EventObject[Any], location: str) -> bytes:
    """Return the envelope of *event* as it leaves the module *location*; the event is not changed.

    Raises:
        TypeError: the data has no form in JSON.
    """
    log = event.audit_log
    return _envelope(event.correlation_id, event.event, event.data, event.status, log, location)


def encode_request(correlation_id: str, event: str, data: object, location: str) -> bytes:
    """Return the envelope of a new event; to make an `EventObject` first costs 5 us more.

    Raises:
        TypeError: the data has no form in JSON.
    """
    return _envelope(correlation_id, event, data, PENDING, (), location)


def encode_reply(
    event: EventObject[Any],
    data: object,
    request: Request,
    location: str,
    *,
    status: str = COMPLETED,
) -> bytes:
    """Return the value of a reply: an envelope, or bare data for a peer that sent bare data.

    It has the id and the audit log of *event*, which it answers.
    """
    if request.enveloped:
        correlation_id, log = str(event.correlation_id), event.audit_log
        return _envelope(correlation_id, RESPOND, data, status, log, location)
    return _to_json(data, RESPOND)


def _envelope(  # noqa: PLR0913, PLR0917  # an event and where it leaves
    correlation_id: str,
    event: str,
    data: object,
    status: str,
    audit_log: Sequence[Hop],
    location: str,
) -> bytes:
    hop = {
        "data": None,
        "event": event,
        "location": location,
        "time_sent": int(time.time()),
        "time_received": None,
    }
    envelope = {
        "correlation_id": correlation_id,
        "event": event,
        "data": data,
        "status": status,
        "audit_log": [*audit_log, hop],
    }
    return _to_json(envelope, event)


def _to_json(value: object, name: str) -> bytes:
    try:
        return to_json(value)
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        reason = type(exc).__name__
    # raised out here: the text of a serializer's own exception may quote the data
    msg = f"the data of event {name!r} has no form in JSON ({reason})"
    raise TypeError(msg)


def address(topic: str, partition: int, instance: str) -> tuple[tuple[str, bytes], ...]:
    """Return the headers that tell a peer where replies to this replica have to go."""
    return (
        (REPLY_TOPIC, topic.encode()),
        (REPLY_PARTITION, partition.to_bytes(4, "big")),
        (INSTANCE, instance.encode()),
    )


def request_headers(correlation_id: str, deadline: float | None) -> tuple[tuple[str, bytes], ...]:
    """Return the headers of one request; an `address` follows them."""
    correlation = (CORRELATION_ID, correlation_id.encode())
    if deadline is None:
        return (correlation,)
    return (correlation, (DEADLINE, b"%d" % round(deadline * 1000)))


def forward_headers(request: Request) -> tuple[tuple[str, bytes], ...]:
    """Return the headers with which a received event goes on: the first sender gets the reply."""
    headers = [*reply_headers(request), (REPLY_TOPIC, request.topic.encode()), (FORWARDED, b"1")]
    if request.partition is not None:
        headers.append((REPLY_PARTITION, request.partition.to_bytes(4, "big")))
    if request.deadline is not None:
        headers.append((DEADLINE, b"%d" % round(request.deadline * 1000)))
    return tuple(headers)


def reply_headers(request: Request) -> tuple[tuple[str, bytes], ...]:
    """Return the headers that lead a reply to the one who waits for it."""
    correlation = (CORRELATION_ID, request.correlation)
    if request.instance is None:
        return (correlation,)
    return (correlation, (INSTANCE, request.instance))


def trace(parent: bytes | None, state: bytes | None) -> Trace:
    """Return the headers with which a trace goes on (W3C Trace Context); none if it is broken."""
    if parent is None or not _TRACE_PARENT.fullmatch(parent):
        return ()
    if not state or not _TRACE_STATE.fullmatch(state):
        return ((TRACE_PARENT, parent),)
    return ((TRACE_PARENT, parent), (TRACE_STATE, state))


def trace_of(record: Record) -> Trace:
    """Return the headers of the trace that a record belongs to."""
    headers = named(record.headers)
    return trace(headers.get(TRACE_PARENT), headers.get(TRACE_STATE))


def origin_of(record: Record) -> tuple[str, bytes]:
    """Return the header that tells where an event was first read: ``topic:partition:offset``."""
    for name, value in record.headers:
        if name == ORIGIN and value:
            return ORIGIN, value
    return ORIGIN, f"{record.topic}:{record.partition}:{record.offset}".encode()


def dead_letter_headers(record: Record, group: str, attempt: int, error: BaseException) -> Headers:
    """Return a record's own headers and after them where it came from and why it is dead."""
    failure = (FAILURE, type(error).__name__.encode())
    return (*_going_back(record, group, attempt), failure)


def stump_headers(record: Record, group: str, attempt: int, error: BaseException) -> Headers:
    """Return the headers of a dead letter without value: ours alone, and that one is missing."""
    ours = (origin_of(record), (GROUP, group.encode()), _attempt(attempt))
    return (*ours, (FAILURE, type(error).__name__.encode()), (TOO_LARGE, b"1"))


def postponed_headers(record: Record, group: str, attempt: int, due: float) -> Headers:
    """Return a record's own headers and after them when the try number *attempt* is due."""
    return (*_going_back(record, group, attempt), (DUE, b"%d" % math.ceil(due * 1000)))


def _going_back(record: Record, group: str, attempt: int) -> Headers:
    own, ours = _without(record.headers, _OURS), (GROUP, group.encode())
    return (*own, origin_of(record), ours, _attempt(attempt))


def due_headers(record: Record) -> Headers:
    """Return the headers of a postponed record as it goes back to the topic it came from."""
    return _without(record.headers, {DUE})


def replayed_headers(headers: Headers, attempt: int) -> Headers:
    """Return the headers of a dead letter that goes back: nobody waits for its reply any more."""
    return (*_without(headers, (_OURS | {DEADLINE}) - {GROUP}), _attempt(attempt))


def _without(headers: Headers, names: Container[str]) -> Headers:
    return [header for header in headers if header[0] not in names]


def _attempt(attempt: int) -> tuple[str, bytes]:
    return ATTEMPT, b"%d" % attempt


def standing_of(headers: Mapping[str, bytes | None]) -> tuple[int, bytes | None]:
    """Return the number of the try that comes next, or that a dead letter failed in, and the group.

    A record that comes back is only for the consumer group that has sent it back.
    """
    attempt, value = 1, headers.get(ATTEMPT)
    if value and value.isdigit() and len(value) <= _MAX_DIGITS:
        attempt = max(1, int(value))
    return attempt, headers.get(GROUP)


def due_of(record: Record) -> float:
    """Return when a postponed record is due, in seconds since the epoch; 0 if it does not say."""
    return _deadline(named(record.headers).get(DUE)) or 0.0


def place_of_origin(origin: str) -> tuple[str, int, int] | None:
    """Return the topic, partition and offset that an origin names, if it does."""
    topic, _, rest = origin.partition(":")
    partition, _, offset = rest.partition(":")
    digits = (partition + offset).isascii() and partition.isdigit() and offset.isdigit()
    if not (topic and digits) or max(len(partition), len(offset)) > _MAX_DIGITS * 2:
        return None
    return topic, int(partition), int(offset)


def named(headers: Headers) -> dict[str, bytes | None]:
    """Return headers by name; of a repeated one the last, as Kafka's own clients do."""
    return dict(headers)


def decode(record: Record, headers: Mapping[str, bytes | None] | None = None) -> EventObject[Any]:
    """Return the event that *record* carries, remembering where its reply has to go.

    A value that is no envelope becomes the ``data`` of an event without a name.

    Raises:
        EventDecodeError: the value is not JSON.
    """
    headers = named(record.headers) if headers is None else headers
    event, enveloped = _read_value(record)
    correlation = headers.get(CORRELATION_ID)
    if correlation is not None and not enveloped:
        event.correlation_id = id_text(correlation)
    note_receipt(event, int(time.time()))
    if (request := _request(event, headers, enveloped=enveloped)) is not None:
        remember(event, request=request)
    return event


def _request(
    event: EventObject[Any], headers: Mapping[str, bytes | None], *, enveloped: bool
) -> Request | None:
    """Return where a reply to *event* has to go, or None when nobody can be answered."""
    topic = headers.get(REPLY_TOPIC)
    correlation = headers.get(CORRELATION_ID) or event.correlation_id.encode()
    if topic:
        instance, deadline = headers.get(INSTANCE), _deadline(headers.get(DEADLINE))
        return Request(
            topic=topic.decode("utf-8", "replace"),
            partition=_partition(headers.get(REPLY_PARTITION)),
            correlation=correlation,
            instance=instance,
            deadline=deadline,
            awaited=(instance is None or deadline is not None) and FORWARDED not in headers,
            enveloped=enveloped,
        )
    if event.status == PENDING and event.audit_log:  # kafka-broker 0.4 has no headers
        return Request(event.audit_log[0].location, None, correlation)
    return None


def _read_value(record: Record) -> tuple[EventObject[Any], bool]:
    if record.value is None:
        return EventObject(event=""), False
    try:
        event: EventObject[Any] = _read_envelope(record.value)
    except ValidationError:
        return _read_foreign(record)
    if "correlation_id" in event.__pydantic_fields_set__:
        return event, True
    return _read_foreign(record)


def _read_foreign(record: Record) -> tuple[EventObject[Any], bool]:
    try:
        value = from_json(record.value or b"")
    except ValueError as exc:
        where = f"{record.topic}:{record.partition}:{record.offset}"
        msg = f"the value of {where} is not JSON ({len(record.value or b'')} bytes)"
        raise EventDecodeError(msg) from exc
    if isinstance(value, dict) and value.keys() >= _ENVELOPE and isinstance(value["event"], str):
        return _read_sloppy(value), True
    return EventObject(event="", data=value), False


def _read_sloppy(value: Mapping[str, Any]) -> EventObject[Any]:
    """Read an envelope some of whose fields have an unexpected type: those take their default."""
    event = EventObject(event=value["event"], data=value.get("data"))
    if isinstance(value["correlation_id"], (str, int)):
        event.correlation_id = str(value["correlation_id"])
    if isinstance(value.get("status"), str):
        event.status = value["status"]
    if isinstance(value.get("audit_log"), list):
        event.audit_log = _read_hops(value["audit_log"])
    return event


def _read_hops(entries: Sequence[object]) -> list[Hop]:
    hops = []
    for entry in entries:
        try:
            hops.append(Hop.model_validate(entry))
        except ValidationError:
            continue
    return hops


def id_text(raw: bytes) -> str:
    """Return a correlation id as text: UTF-8, else the UUID of 16 bytes, else hexadecimal."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return str(UUID(bytes=raw)) if len(raw) == 16 else raw.hex()  # noqa: PLR2004  # a UUID


def _partition(raw: bytes | None) -> int | None:
    """Read a partition: 4 bytes big-endian (Spring), or digits (NestJS); 4 digits are digits."""
    if not raw:
        return None
    if raw.isdigit() and len(raw) <= 7:  # noqa: PLR2004  # as many digits as _MAX_PARTITION has
        number = int(raw)
    elif len(raw) == 4:  # noqa: PLR2004  # an int of Java
        number = int.from_bytes(raw, "big")
    else:
        return None
    return number if number < _MAX_PARTITION else None


def _deadline(raw: bytes | None) -> float | None:
    if raw is None or not raw.isdigit() or len(raw) > 15:  # noqa: PLR2004  # ms until the year 33658
        return None
    return int(raw) / 1000


def problem(error: BaseException, event: EventObject[Any], module: str) -> dict[str, Any]:
    """Return the RFC 9457 problem that tells a requester of *error*.

    The text of a handler's exception stays here: it may quote data that the requester must not see.
    """
    if isinstance(error, NoHandlerError) and error.correlation_id == event.correlation_id:
        status, code, detail = 501, "no-handler", f"no handler is bound to event {event.event!r}"
    elif isinstance(error, EventDecodeError):
        status, code, detail = 422, "bad-data", str(error)
    elif isinstance(error, Reject):
        status, code, detail = error.status, error.code, error.detail
    elif isinstance(error, RetryLater):
        status, code = 503, "retry-later"
        detail = f"another try is possible in {error.seconds:g} s, after the deadline"
    elif isinstance(error, HandlerTimeoutError):
        status, code, detail = 504, "handler-timeout", str(error)
    else:
        status, code = 500, "handler-failed"
        detail = (
            f"{type(error).__name__} in the handler of {event.event!r}; see the log of {module}"
        )
    return {
        "type": f"urn:kafka-broker:{code}",
        "title": code.replace("-", " "),
        "status": status,
        "code": code,
        "detail": detail,
        "module": module,
        "event": event.event,
    }


def error_of(reply: EventObject[Any]) -> RequestError | None:
    """Return the error that a reply stands for, or None when it is none."""
    if reply.status != ERROR:
        return None
    body = reply.data if isinstance(reply.data, dict) else {}
    code = str(body.get("code", "error"))
    if code == "no-handler":
        return NoHandlerError(str(body.get("event", "")), reply.correlation_id)
    status = body.get("status")
    return RemoteError(
        reply.correlation_id,
        status=status if isinstance(status, int) and 400 <= status <= 599 else 500,  # noqa: PLR2004  # errors
        code=code,
        detail=str(body.get("detail", "no detail was given")),
    )
