"""Dead letters: what is in a dead-letter topic, and its way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kafka_broker import _wire
from kafka_broker._transport import Outgoing
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from kafka_broker._delivery import Delivery
    from kafka_broker._outbox import Outbox
    from kafka_broker._transport import Headers, Record, Transport


_PATIENCE: Final = 20
"""Fetches of half a second that may bring nothing."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that could not be handled, as it came.

    Attributes:
        partition, offset: where it is in the dead-letter topic.
        timestamp: when it was put there, in seconds since the epoch.
        origin: where it was first read, as ``topic:partition:offset``; empty if it does not say.
        error: the class name of the error, for example ``"ValueError"``.
        attempt: the number of the try that failed last.
        key, value, headers: of the record; behind its own headers are those with ``kb-``.
    """

    partition: int
    offset: int
    timestamp: float
    origin: str
    error: str
    attempt: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def _opened(record: Record) -> DeadLetter:
    headers = _wire.named(record.headers)
    error, origin = headers.get(_wire.FAILURE) or b"", headers.get(_wire.ORIGIN) or b""
    return DeadLetter(
        partition=record.partition,
        offset=record.offset,
        timestamp=record.timestamp / 1000,
        origin=origin.decode("utf-8", "replace"),
        error=error.decode("utf-8", "replace"),
        attempt=_wire.standing_of(headers)[0],
        key=record.key,
        value=record.value,
        headers=record.headers,
    )


async def read_dead_letters(transport: Transport, topic: str) -> AsyncGenerator[DeadLetter]:
    """Yield what is in *topic* now, partition by partition.

    Raises:
        BrokerUnavailableError: Kafka does not answer, or the topic cannot be read.
    """
    for partition in range(await transport.partitions(topic)):
        at_end = await transport.read(topic, partition)
        end = at_end.position
        await at_end.close()
        reader = await transport.read(topic, partition, 0)
        try:
            silent = 0
            while reader.position < end:
                records = await reader.fetch()
                silent = 0 if records else silent + 1
                if silent > _PATIENCE:
                    where = f"{topic}:{partition}:{reader.position}"
                    raise BrokerUnavailableError(f"Kafka gives no dead letter from {where} on")
                for record in records:
                    if record.offset < end:
                        yield _opened(record)
        finally:
            await reader.close()


def replay(letter: DeadLetter, outbox: Outbox, module: str) -> Delivery:
    """Produce *letter* to the topic of *module* again; raises as `Outbox.put`.

    It goes into the partition that it came from, if its origin is that topic.
    """
    place = _wire.place_of_origin(letter.origin)
    partition = place[1] if place and place[0] == module else None
    headers = _wire.replayed_headers(letter.headers, letter.attempt + 1)
    record = Outgoing(letter.key, letter.value, headers)
    return outbox.put(module, record, keyed=letter.key is not None, partition=partition)
