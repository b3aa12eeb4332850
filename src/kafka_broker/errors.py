"""Every error of kafka_broker: one class for each decision a caller can take.

```
BrokerError
├ ConfigurationError (ValueError)      wrong settings or bind; raised before any I/O
├ BrokerClosedError                    not running, or stopped while you waited
├ BrokerUnavailableError               Kafka unreachable or refusing; says what to fix
├ DeliveryError  .topic .retriable     not in the log
│ ├ DeliveryUnknownError               sent, outcome unknown: retrying may double it
│ └ OutboxFullError                    overload: nothing was taken
├ RequestError  .correlation_id
│ ├ ReplyTimeoutError (TimeoutError)   may still have been handled
│ ├ NoHandlerError                     nobody there handles this event
│ └ RemoteError  .status .code .detail the remote handler failed or refused
└ EventDecodeError (ValueError)        the bytes are not what the handler asked for
```

The error of a client library is the ``__cause__``; of an event that was tried until its time was
over, the text names the last one. No text ever quotes a payload.
"""

from __future__ import annotations

__all__ = [
    "BrokerClosedError",
    "BrokerError",
    "BrokerUnavailableError",
    "ConfigurationError",
    "DeliveryError",
    "DeliveryUnknownError",
    "EventDecodeError",
    "NoHandlerError",
    "OutboxFullError",
    "RemoteError",
    "ReplyTimeoutError",
    "RequestError",
]


class BrokerError(Exception):
    """The root: ``except BrokerError`` catches everything this library raises on purpose."""


class ConfigurationError(BrokerError, ValueError):
    """A setting or a bind is wrong; fix the code or the environment. Raised before any I/O."""


class BrokerClosedError(BrokerError):
    """The broker is not running, or was stopped while you waited."""


class BrokerUnavailableError(BrokerError):
    """Kafka cannot be reached or refuses us; the text says what to fix."""


class DeliveryError(BrokerError):
    """An event is not in the log.

    Attributes:
        topic: where it should have gone.
        retriable: whether producing it again can succeed without a change elsewhere.
        too_large: whether it is larger than Kafka or the topic takes.
    """

    _claim = "not delivered to"

    def __init__(
        self, topic: str, reason: str, *, retriable: bool = False, too_large: bool = False
    ) -> None:
        super().__init__(f"{self._claim} topic {topic!r}: {reason}")
        self.topic = topic
        self.retriable = retriable
        self.too_large = too_large


class DeliveryUnknownError(DeliveryError):
    """An event was sent and its outcome is unknown: producing it again may double it."""

    _claim = "perhaps delivered, perhaps not, to"

    def __init__(self, topic: str, reason: str) -> None:
        super().__init__(topic, reason, retriable=True)


class OutboxFullError(DeliveryError):
    """Too much is waiting; nothing was taken. Slow down or raise the limit."""

    def __init__(self, topic: str, reason: str) -> None:
        super().__init__(topic, reason, retriable=True)


class RequestError(BrokerError):
    """A request ended without its reply.

    Attributes:
        correlation_id: of the request.
    """

    def __init__(self, message: str, correlation_id: str) -> None:
        super().__init__(message)
        self.correlation_id = correlation_id


class ReplyTimeoutError(RequestError, TimeoutError):
    """No reply came in time. The request may still have been handled.

    Attributes:
        timeout: seconds that were waited.
    """

    def __init__(self, correlation_id: str, timeout: float) -> None:
        super().__init__(f"no reply to {correlation_id} within {timeout:.3g} s", correlation_id)
        self.timeout = timeout


class NoHandlerError(RequestError):
    """The module that got the event has no bind for its name.

    Attributes:
        event: the name that nobody there handles.
    """

    def __init__(self, event: str, correlation_id: str) -> None:
        super().__init__(f"no handler is bound to event {event!r}", correlation_id)
        self.event = event


class RemoteError(RequestError):
    """The remote handler failed or refused; the fields are those of its RFC 9457 problem.

    Attributes:
        status: the HTTP status that fits, for example 500.
        code: a short machine-readable reason, for example ``"handler-failed"``.
        detail: a sentence for people.
    """

    def __init__(self, correlation_id: str, *, status: int, code: str, detail: str) -> None:
        super().__init__(f"the remote handler answered {status} {code}: {detail}", correlation_id)
        self.status = status
        self.code = code
        self.detail = detail


class EventDecodeError(BrokerError, ValueError):
    """The bytes of an event are not what its reader asked for; the payload is not quoted."""
