"""`Delivery`: what became of one produced event; and the partition of a key."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from kafka_broker._transport import Outgoing
    from kafka_broker.errors import DeliveryError

_logger = logging.getLogger("kafka_broker.outbox")

_RECORD_OVERHEAD: Final = 24

WAITING, SENT, ENDED = range(3)


class _Waits(Protocol):
    """What a delivery needs of its outbox."""

    def wait_for(self, delivery: Delivery) -> asyncio.Future[None]: ...


class Delivery:
    """What became of one produced event. Await it for its place in the log, or drop it.

    A failure that nobody awaits is logged.

    Attributes:
        topic: where it goes.
        partition: where it is, None until it is known.
        offset: where it is, None until Kafka has acknowledged it; -1 if Kafka did not say, as of
            an event whose first acknowledgement was lost.
        timestamp: seconds since the epoch, None until Kafka has acknowledged it.
    """

    # Defaults of the class: an instance that sets each of them itself costs 0.4 us more.
    offset: int | None = None
    timestamp: float | None = None
    _keyed: bool = False
    _addressed: bool = False
    _expires: float = 0.0
    _useless_after: float | None = None
    _state: int = WAITING
    _error: DeliveryError | None = None
    _noticed: bool = False
    _on_failure: Callable[[DeliveryError], bool] | None = None
    _waiters: Sequence[asyncio.Future[None]] = ()

    def __init__(self, outbox: _Waits, topic: str, record: Outgoing, partition: int | None) -> None:
        self.topic: str = topic
        self.partition: int | None = partition
        self._outbox = outbox
        self._record: Outgoing | None = record
        self._size = _size_of(record)

    def done(self) -> bool:
        """Return whether it ended, well or not."""
        return self._state is ENDED

    def __await__(self) -> Generator[Any, None, Delivery]:
        """Wait until Kafka has acknowledged the event; returns this delivery.

        Raises:
            DeliveryError: it is not in the log.
            DeliveryUnknownError: it may be in the log.
        """
        if self._state is not ENDED:
            yield from self._outbox.wait_for(self).__await__()
        self._noticed = True
        if self._error is not None:
            # a batch shares it: its traceback would grow with each raise
            raise self._error.with_traceback(None)
        return self

    def _end(self, error: DeliveryError | None) -> None:
        self._state, self._error, self._record = ENDED, error, None
        if self._on_failure is not None and error is not None:
            self._noticed = self._on_failure(error)
        self._on_failure = None
        for waiter in self._waiters:
            wake(waiter)

    def __del__(self) -> None:
        if self._error is not None and not self._noticed:
            _logger.error("an event was lost: %s", self._error)


def _size_of(record: Outgoing) -> int:
    size = _RECORD_OVERHEAD + len(record.key or b"") + len(record.value or b"")
    for name, value in record.headers:
        size += len(name) + len(value or b"")
    return size


def wake(waiter: asyncio.Future[None]) -> None:
    """Wake a waiter in whichever loop it waits; one whose loop is gone no longer waits."""

    def set_result() -> None:
        if not waiter.done():
            waiter.set_result(None)

    loop = waiter.get_loop()
    if asyncio._get_running_loop() is loop:
        set_result()
        return
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(set_result)


@lru_cache(maxsize=4096)
def murmur2(key: bytes) -> int:
    """Return the hash by which Kafka's Java client chooses the partition of a key, 31 bits."""
    mask, mix, length = 0xFFFFFFFF, 0x5BD1E995, len(key)
    state = 0x9747B28C ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * mix & mask
        state = (state * mix & mask) ^ ((word ^ word >> 24) * mix & mask)
    if whole < length:
        state = (state ^ int.from_bytes(key[whole:], "little")) * mix & mask
    state = (state ^ state >> 13) * mix & mask
    return (state ^ state >> 15) & 0x7FFFFFFF
