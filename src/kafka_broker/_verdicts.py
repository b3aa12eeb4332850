"""What a handler may say instead of a reply, and when a try that failed is followed by another."""

from __future__ import annotations

import random
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from kafka_broker.errors import ConfigurationError, EventDecodeError, NoHandlerError

_LONGEST: Final = 7 * 24 * 3600.0
_ERRORS: Final = range(400, 600)
_DOUBLINGS: Final = 63


class Reject(Exception):  # noqa: N818  # a verdict, not an error
    """Raise it in a handler to refuse an event for good: ``raise Reject(404, "no such order")``.

    It is not tried again. Whoever waits for a reply gets a `RemoteError` with these fields; an
    event that nobody waits for goes to the dead-letter topic.

    Args:
        status: the HTTP status that fits, 400 to 599.
        detail: a sentence for the one who asked; unlike the text of other exceptions it is sent.
        code: a short machine-readable reason.

    Raises:
        ConfigurationError: the status is no HTTP error.
    """

    def __init__(
        self, status: int = 422, detail: str = "the event was refused", *, code: str = "rejected"
    ) -> None:
        if status not in _ERRORS:
            raise ConfigurationError(f"Reject needs an HTTP status from 400 to 599, got {status!r}")
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.detail = detail
        self.code = code


class RetryLater(Exception):  # noqa: N818  # a verdict, not an error
    """Raise it in a handler to have the event handled again, *seconds* later at the earliest.

    Up to five seconds the event waits in its place and later events of its key behind it. Longer
    ones go through the topic ``<module>.retry``: later events of the key overtake it. A request is
    not tried again after its deadline; the one who waits for it is told at once.

    It does not count as a failure: how often is up to the handler, which knows ``event.attempt``.

    Args:
        seconds: to wait, more than 0 and at most seven days.
        reason: for the log.

    Raises:
        ConfigurationError: the seconds are out of range.
    """

    def __init__(self, seconds: float, reason: str = "the handler asks for another try") -> None:
        if not 0 < seconds <= _LONGEST:
            raise ConfigurationError(
                f"RetryLater needs more than 0 and at most {_LONGEST:g} seconds, got {seconds!r}"
            )
        super().__init__(reason)
        self.seconds = seconds
        self.reason = reason


class HandlerTimeoutError(TimeoutError):
    """A handler was cancelled because its time was over."""


class HandlerCancelledError(Exception):
    """A handler ended in a CancelledError, although nobody wanted it to end."""


class HandlerDiedError(Exception):
    """A handler raised something that is no Exception, which would have ended the broker."""


class RetryPolicy(BaseModel):
    """When a handler that raised is tried again in place, only its own key waiting.

    The pauses double from ``base`` to ``cap``, each shortened by up to the share ``jitter``. With
    the defaults an event has three tries, after about 0.1 and 0.2 seconds. Never tried again are
    `Reject`, data that is not what the handler asks for, and a request past its deadline.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    attempts: int = Field(default=3, ge=1)
    """Tries in all, the first included; 1 for none but the first."""
    base: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Seconds before the second try."""
    cap: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Seconds that no pause is longer than."""
    jitter: float = Field(default=0.5, ge=0, le=1)
    """The share of a pause that chance may take away, so that replicas do not try in step."""
    on: tuple[type[Exception], ...] = Field(default=(Exception,), repr=False)
    """Only these exceptions are worth another try."""
    never: tuple[type[Exception], ...] = Field(default=(), repr=False)
    """These are not, although they are among ``on``."""

    def delay(self, failures: int, error: Exception) -> float | None:
        """Return the seconds to wait after the *failures*-th failed try, or None to give up."""
        final = (*self.never, Reject, EventDecodeError, NoHandlerError)
        if failures >= self.attempts or isinstance(error, final) or not isinstance(error, self.on):
            return None
        pause = min(self.cap, self.base * 2.0 ** min(failures - 1, _DOUBLINGS))
        return pause * (1 - self.jitter * random.random())  # noqa: S311  # no secret
