"""What a storage holds: arrivals, and the slots of those who wait for one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from kafka_broker import _wire
from kafka_broker._event import EventObject
from kafka_broker.errors import DeliveryError, ReplyTimeoutError

if TYPE_CHECKING:
    from kafka_broker._transport import Record


class Default:
    """Stands for a timeout that was not given: the settings' ``reply_timeout``."""

    def __repr__(self) -> str:
        """Show what a reader of a signature has to know."""
        return "<reply_timeout of the settings>"


DEFAULT: Final = Default()


class Arrival:
    """What arrived under a correlation id: an event, a reply not decoded yet, or a failure."""

    __slots__ = ("content", "correlation_id", "expires", "taken")

    def __init__(
        self, correlation_id: str, content: EventObject[Any] | Record | DeliveryError
    ) -> None:
        self.correlation_id = correlation_id
        self.content = content
        self.expires = 0.0
        self.taken = False

    def done(self) -> bool:
        """Return whether it was taken, so that its offset may be committed."""
        return self.taken

    def open(self) -> EventObject[Any]:
        """Return the event.

        Raises:
            DeliveryError: what arrived is that the event was not delivered.
            EventDecodeError: its bytes are no event.
        """
        if isinstance(self.content, DeliveryError):
            raise self.content.with_traceback(None)
        if isinstance(self.content, EventObject):
            return self.content
        event = _wire.decode(self.content)
        event.correlation_id = self.correlation_id
        return event


class Slot(asyncio.Future[Arrival]):
    """One wait for one correlation id."""

    __slots__ = ("correlation_id", "expires", "replies_only", "timeout")

    correlation_id: str
    expires: float
    replies_only: bool
    timeout: float

    def expire(self) -> None:
        """End the wait: nothing came in time."""
        if not self.done():
            self.set_exception(ReplyTimeoutError(self.correlation_id, self.timeout))
