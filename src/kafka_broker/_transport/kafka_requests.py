"""The two requests that we pack ourselves, produce and fetch, and what is in their answers.

Kafka's own description of them is https://kafka.apache.org/protocol; the fields are in that order.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokafka import TopicPartition
from aiokafka import errors as kafka

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Kind(NamedTuple):
    """A request of Kafka's, in the one version that we speak."""

    key: int
    version: int


PRODUCE: Final = Kind(0, 7)
FETCH: Final = Kind(1, 10)
"""Both are known to Kafka 2.1 and all that came after it, and the first with every codec."""


class Produced(NamedTuple):
    """What became of the batch for one partition; the timestamp is that of the log, or -1."""

    code: int
    offset: int
    timestamp: int


_TOPIC_HEAD: Final = struct.Struct(">h")
_COUNT: Final = struct.Struct(">i")
_BATCH_HEAD: Final = struct.Struct(">ii")
_PRODUCED: Final = struct.Struct(">ihqqq")
_FETCHED: Final = struct.Struct(">ihqqq")
_FETCH_ANSWER: Final = struct.Struct(">ihi")
_ABORTED_SIZE: Final = 16
_LONGEST_THROTTLE: Final = 60.0
"""Seconds that are believed; Kafka's own limit is that of its quotas, eleven unless it is changed.
"""


def throttled(kind: Kind, answer: bytes) -> float:
    """Return the seconds for which Kafka leaves the connection alone, as a quota is used up."""
    field = answer[:4] if kind == FETCH else answer[-4:]
    return min(max(int.from_bytes(field, "big", signed=True) / 1000, 0.0), _LONGEST_THROTTLE)


def text_of(text: str) -> bytes:
    encoded = text.encode()
    return _TOPIC_HEAD.pack(len(encoded)) + encoded


def produce_request(timeout: float, batches: Sequence[tuple[TopicPartition, bytes]]) -> list[bytes]:
    """Return the body of a request that all replicas in sync shall acknowledge."""
    topics: dict[str, list[tuple[int, bytes]]] = {}
    for (topic, partition), records in batches:
        topics.setdefault(topic, []).append((partition, records))
    body = [struct.pack(">hhii", -1, -1, int(timeout * 1000), len(topics))]
    for topic, partitions in topics.items():
        body += (text_of(topic), _COUNT.pack(len(partitions)))
        for partition, records in partitions:
            body += (_BATCH_HEAD.pack(partition, len(records)), records)
    return body


def produced(answer: bytes) -> dict[TopicPartition, Produced]:
    """Return what an answer says of each partition.

    Raises:
        KafkaProtocolError: it cannot be read.
    """
    outcomes: dict[TopicPartition, Produced] = {}
    try:
        topics, at = _read_count(answer, 0)
        for _ in range(topics):
            topic, at = _read_text(answer, at)
            partitions, at = _read_count(answer, at)
            for _ in range(partitions):
                partition, code, offset, timestamp, _ = _PRODUCED.unpack_from(answer, at)
                outcomes[TopicPartition(topic, partition)] = Produced(code, offset, timestamp)
                at += _PRODUCED.size
    except (struct.error, UnicodeDecodeError) as exc:
        raise kafka.KafkaProtocolError(f"the answer to a produce request: {exc}") from exc
    return outcomes


def _read_text(answer: bytes, at: int) -> tuple[str, int]:
    (size,) = _TOPIC_HEAD.unpack_from(answer, at)
    if size < 0:
        raise kafka.KafkaProtocolError(f"a name of {size} bytes")
    begin = at + _TOPIC_HEAD.size
    return answer[begin : begin + size].decode(), begin + size


def _read_count(answer: bytes, at: int, nothing: int = 0) -> tuple[int, int]:
    """Return a number of things, or of bytes, and where it ends; some may be *nothing*, -1."""
    (count,) = _COUNT.unpack_from(answer, at)
    if count < nothing:
        raise kafka.KafkaProtocolError(f"a count of {count}")
    return max(count, 0), at + _COUNT.size


def fetch_request(
    place: TopicPartition, wait: float, most_bytes: int
) -> Callable[[int], Iterable[bytes]]:
    """Return what makes the body of a request for what is in a partition from an offset on.

    Uncommitted records are wanted, too, and an answer as soon as there is a record.
    """
    consumer, one_byte, uncommitted, session, epoch, any_leader = -1, 1, 0, 0, -1, -1
    milliseconds = int(wait * 1000)
    head = struct.pack(
        ">iiiibiii", consumer, milliseconds, one_byte, most_bytes, uncommitted, session, epoch, 1
    )
    before = head + text_of(place.topic) + struct.pack(">iii", 1, place.partition, any_leader)
    unknown_start, forgotten = -1, 0
    after = struct.pack(">qii", unknown_start, most_bytes, forgotten)
    return lambda offset: (before, offset.to_bytes(8, "big"), after)


def fetched(answer: bytes, place: TopicPartition) -> tuple[int, bytes]:
    """Return the error code and the batches of the partition that was asked for.

    Raises:
        QuotaViolationError: there is none: it is Kafka's way to slow us down.
        BrokerResponseError: there is none, and this is why.
        KafkaProtocolError: it cannot be read.
    """
    try:
        topics, at = _read_count(answer, _FETCH_ANSWER.size)
        _, failed, _ = _FETCH_ANSWER.unpack_from(answer)
        if not topics:
            raise kafka.for_code(failed)(place) if failed else kafka.QuotaViolationError(place)
        topic, at = _read_text(answer, at)
        _, at = _read_count(answer, at)
        partition, code, _, _, _ = _FETCHED.unpack_from(answer, at)
        aborted, at = _read_count(answer, at + _FETCHED.size, -1)
        size, at = _read_count(answer, at + aborted * _ABORTED_SIZE, -1)
    except (struct.error, UnicodeDecodeError) as exc:
        raise kafka.KafkaProtocolError(f"the answer to a fetch request: {exc}") from exc
    if (topic, partition) != place:
        raise kafka.KafkaProtocolError(f"{place} was asked for, not {topic}:{partition}")
    content = answer[at : at + size]
    if len(content) < size:
        raise kafka.KafkaProtocolError(f"{len(content)} of {size} bytes were answered")
    return code, content
