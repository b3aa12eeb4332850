"""A batch that is appended once: its bytes, who it is from, and what Kafka says of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from aiokafka import errors as kafka
from aiokafka.codec import has_gzip, has_lz4, has_snappy, has_zstd
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from kafka_broker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokafka import TopicPartition

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import Outgoing

_NO_LIMIT: Final = 1 << 30
_CODECS: Final = {
    "gzip": (1, has_gzip),
    "snappy": (2, has_snappy),
    "lz4": (3, has_lz4),
    "zstd": (4, has_zstd),
}
APPENDED: Final = frozenset({kafka.NoError.errno, kafka.DuplicateSequenceNumber.errno})
"""Codes of a batch that is in the log, by this try or an earlier one."""
IDENTITY_LOST: Final = (
    kafka.OutOfOrderSequenceNumber,
    kafka.InvalidProducerEpoch,
    kafka.UnknownProducerId,
    kafka.ProducerFenced,
)


class Identity:
    """What makes a batch of one partition known to Kafka, so that it is appended once."""

    __slots__ = ("epoch", "producer_id", "sequence")

    def __init__(self, producer_id: int, epoch: int) -> None:
        self.producer_id = producer_id
        self.epoch = epoch
        self.sequence = 0

    def advance(self, count: int) -> None:
        """Take note that so many records are in the log."""
        self.sequence = (self.sequence + count) % 2**31


class Batch:
    """The bytes of one batch, and whether Kafka may have them already."""

    __slots__ = (
        "buffer",
        "built_at",
        "count",
        "deadline",
        "identity",
        "place",
        "sent",
        "tries",
        "unknown",
    )

    def __init__(
        self,
        place: TopicPartition,
        records: Sequence[Outgoing],
        identity: Identity,
        codec: int,
        deadline: float,
    ) -> None:
        self.place = place
        self.identity = identity
        self.count = len(records)
        self.sent = False
        self.tries = 0
        self.unknown = False
        self.deadline = deadline
        self.built_at = int(time.time() * 1000)
        builder = DefaultRecordBatchBuilder(
            magic=2,
            compression_type=codec,
            is_transactional=0,
            producer_id=identity.producer_id,
            producer_epoch=identity.epoch,
            base_sequence=identity.sequence,
            batch_size=_NO_LIMIT,
        )
        for offset, (key, value, headers) in enumerate(records):
            builder.append(offset, self.built_at, key, value, list(headers))
        self.buffer: bytes = builder.build()


def compression(settings: BrokerSettings) -> int:
    """Return Kafka's number of the codec that ``client_options`` ask for; 0 for none.

    Raises:
        ConfigurationError: there is no such codec, or its library is not installed.
    """
    name = settings.client_options.get("compression_type")
    if name is None:
        return 0
    if name not in _CODECS:
        msg = f"client_options: compression_type must be one of {', '.join(_CODECS)}"
        raise ConfigurationError(msg)
    number, installed = _CODECS[name]
    if not installed():
        msg = f"compression_type {name!r} needs a library: pip install 'aiokafka[{name}]'"
        raise ConfigurationError(msg)
    return number
