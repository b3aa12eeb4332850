"""Errors as HTTP answers: RFC 9457 problem documents.

The texts of errors may tell of topics and addresses, which clients of a web application must not
see: they are logged there. What the other service says by `Reject` is passed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from kafka_broker.errors import (
    BrokerClosedError,
    BrokerError,
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
    EventDecodeError,
    NoHandlerError,
    OutboxFullError,
    RemoteError,
    ReplyTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import MutableMapping

MEDIA_TYPE: Final = "application/problem+json"
SCHEMA_NAME: Final = "BrokerProblem"
TIMEOUT_HEADER: Final = "x-request-timeout"
"""An operation that takes this header waits for replies."""
SCHEMA: Final = {
    "title": SCHEMA_NAME,
    "description": "What went wrong (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "correlation_id": {"type": "string"},
    },
}
_DOCUMENTED: Final = {
    "502": "Nobody handles this, or the reply cannot be read",
    "503": "Overloaded, or not running now; try again after the time in Retry-After",
    "504": "No reply in time; it may still be handled",
    "default": "What the service that handles this has answered",
}
_SOON, _LATER = 1, 5
"""Seconds of ``Retry-After``: until some room is made, and until something is up again."""
_DETAILS: Final = {
    "bad-data": "the service that was asked cannot read this",
    "error": "the service that was asked has failed",
    "handler-failed": "the service that was asked has failed",
    "handler-timeout": "the service that was asked took too long",
}
"""By code: what is said in place of a detail that names handlers, models and fields elsewhere."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem document; ``retry_after`` is in seconds, and a header of the answer."""

    status: int
    code: str
    detail: str
    retry_after: int | None = None
    correlation_id: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the members of the document."""
        members: dict[str, Any] = {
            "type": f"urn:kafka-broker:{quote(self.code)}",
            "title": self.code.replace("-", " "),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.correlation_id is not None:
            members["correlation_id"] = self.correlation_id
        return members

    def headers(self) -> dict[str, str]:
        """Return the headers that the answer has besides its content type."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def problem_of(error: BaseException) -> Problem | None:
    """Return the answer to a request that ended in *error*; None if that is a bug, or not ours.

    Of a group of errors that are all ours it is the first one's.
    """
    if isinstance(error, BaseExceptionGroup):
        problems = [problem_of(one) for one in error.exceptions]
        return problems[0] if all(problems) else None
    if not isinstance(error, BrokerError) or isinstance(error, ConfigurationError):
        return None
    if isinstance(error, RemoteError):
        return _remote(error)
    correlation_id = getattr(error, "correlation_id", None)
    for kind, status, code, detail, retry_after in _ANSWERS:
        if isinstance(error, kind):
            return Problem(status, code, detail, retry_after, correlation_id)
    if isinstance(error, DeliveryError):
        again = _LATER if error.retriable else None
        return Problem(503 if error.retriable else 502, "not-delivered", "it was not sent", again)
    return Problem(500, "error", "it could not be done", None, correlation_id)


_ANSWERS: Final[tuple[tuple[type[BrokerError], int, str, str, int | None], ...]] = (
    (ReplyTimeoutError, 504, "reply-timeout", "no reply in time; it may still be handled", None),
    (NoHandlerError, 502, "no-handler", "the service that was asked does not handle this", None),
    (OutboxFullError, 503, "overloaded", "too much is waiting already", _SOON),
    (DeliveryUnknownError, 504, "delivery-unknown", "perhaps it was sent, perhaps not", None),
    (BrokerClosedError, 503, "closed", "this replica is not running, or is stopping", _LATER),
    (BrokerUnavailableError, 503, "unavailable", "Kafka cannot be reached", _LATER),
    (EventDecodeError, 502, "bad-reply", "the reply is not what was asked for", None),
)


def _remote(error: RemoteError) -> Problem:
    if error.code == "bad-data":  # this service has sent it, not its client
        return Problem(502, error.code, _DETAILS[error.code], None, error.correlation_id)
    detail = _DETAILS.get(error.code, error.detail)
    again = _LATER if error.code == "retry-later" else None
    return Problem(error.status, error.code, detail, again, error.correlation_id)


def add_to_schema(schema: MutableMapping[str, Any]) -> None:
    """Add the problems to those operations of an OpenAPI document that wait for replies."""
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{SCHEMA_NAME}"}}}
    for path in schema.get("paths", {}).values():
        for operation in path.values():
            if not isinstance(operation, dict) or not _waits(operation):
                continue
            responses = operation.setdefault("responses", {})
            for status, description in _DOCUMENTED.items():
                responses.setdefault(status, {"description": description, "content": content})
            schema.setdefault("components", {}).setdefault("schemas", {})[SCHEMA_NAME] = SCHEMA


def _waits(operation: dict[str, Any]) -> bool:
    return any(one.get("name") == TIMEOUT_HEADER for one in operation.get("parameters", ()))
