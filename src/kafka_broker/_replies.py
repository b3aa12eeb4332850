"""The reply inbox: reads the one partition of the reply topic that this replica waits at.

No consumer group: nothing to join, nothing to lose in a rebalance. Replicas may share a partition;
a foreign reply is dropped on its headers, before its value is decoded.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from typing import TYPE_CHECKING, Final

from kafka_broker import _wire
from kafka_broker._health import Pulse
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from kafka_broker._metrics import Metrics
    from kafka_broker._storage import ConsumerStorage
    from kafka_broker._transport import Reader, Record, Transport

_logger = logging.getLogger("kafka_broker.replies")

_BACKOFF: Final = (0.1, 5.0)


class ReplyInbox:
    """Reads replies and resolves waits; decoding is left to the one who waited."""

    def __init__(
        self, topic: str, instance: str, storage: ConsumerStorage, metrics: Metrics
    ) -> None:
        self.topic = topic
        self.partition = 0
        self._instance = instance.encode()
        self._storage = storage
        self._metrics = metrics
        self._reader: Reader | None = None
        self._next: int | None = None
        self.pulse = Pulse(asyncio.get_running_loop().time)

    async def open(self, transport: Transport) -> None:
        """Take our partition and wait until it is read from its end.

        Raises:
            BrokerUnavailableError: the reply topic is not there, or cannot be read.
        """
        partitions = await transport.partitions(self.topic)
        if not partitions:
            msg = f"the reply topic {self.topic!r} does not exist"
            raise BrokerUnavailableError(msg)
        self.partition = zlib.crc32(self._instance) % partitions
        self._reader = await transport.read(self.topic, self.partition)
        self._next = self._reader.position
        self.pulse.has_partitions(1)

    async def run(self, transport: Transport) -> None:
        """Resolve waits until cancelled; a reader that breaks is replaced where it stopped."""
        pause = _BACKOFF[0]
        while True:
            self.pulse.goes_round()
            try:
                if self._reader is None:
                    self._reader = await transport.read(self.topic, self.partition, self._next)
                records = await self._reader.fetch()
            except BrokerUnavailableError as exc:
                _logger.warning("replies cannot be read, trying again in %.1f s: %s", pause, exc)
                await self.close()
                await asyncio.sleep(pause)
                pause = min(pause * 2, _BACKOFF[1])
                continue
            pause = _BACKOFF[0]
            self.pulse.has_partitions(1)  # not before: a reader that was opened may yet fail
            for record in records:
                self._take(record)
            self._next = self._reader.position
            await asyncio.sleep(0)  # a full buffer need not suspend

    def _take(self, record: Record) -> None:
        headers = _wire.named(record.headers)
        correlation = headers.get(_wire.CORRELATION_ID)
        instance = headers.get(_wire.INSTANCE)
        if correlation is None or (instance is not None and instance != self._instance):
            self._metrics.count("replies_foreign")
            return
        self._storage.put_reply(_wire.id_text(correlation), record)

    async def close(self) -> None:
        """Close the reader, if one is open."""
        reader, self._reader = self._reader, None
        self.pulse.has_none()
        if reader is not None:
            await reader.close()
