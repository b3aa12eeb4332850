"""`Metrics`: what the library counts, told to an observer that does nothing by itself."""

from __future__ import annotations

import logging
from typing import Literal

_logger = logging.getLogger("kafka_broker.metrics")

Counted = Literal[
    "events_delivered",
    "events_undelivered",
    "events_handled",
    "events_failed",
    "events_rejected",
    "events_retried",
    "events_postponed",
    "events_dead_lettered",
    "events_expired",
    "requests_sent",
    "replies_received",
    "replies_late",
    "replies_foreign",
    "replies_dropped",
]


class Metrics:
    """An observer of one broker; subclass it and pass it as ``metrics=``.

    Called in the broker's event loop, between two awaits: it must return at once and never raise.
    """

    def count(self, what: Counted, amount: int = 1) -> None:
        """Something that is counted happened *amount* times."""

    def handled(self, where: str, event: str, seconds: float, error: Exception | None) -> None:
        """Take note that the handling of an event ended, its tries in place included.

        Args:
            where: which event, as ``topic:partition:offset``.
            event: its name.
            seconds: that it took.
            error: what the last try raised; None when a handler returned.
        """


class ShieldedMetrics(Metrics):
    """An observer of the user's, whose errors are logged and go no further."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def count(self, what: Counted, amount: int = 1) -> None:
        """Pass it on."""
        try:
            self._metrics.count(what, amount)
        except Exception:  # what is observed must not fail by that
            _logger.exception("the observer raised as it was told of %s", what)

    def handled(self, where: str, event: str, seconds: float, error: Exception | None) -> None:
        """Pass it on."""
        try:
            self._metrics.handled(where, event, seconds, error)
        except Exception:  # it is the user's code, and the event has ended well or not without it
            _logger.exception("the observer raised as it was told of %s", where)
