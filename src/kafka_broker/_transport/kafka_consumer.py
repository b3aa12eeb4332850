"""Reading from Kafka: one partition without a group, or a topic as a member of a group."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka

from kafka_broker._transport.kafka_client import (
    FOREIGN,
    REQUEST_TIMEOUT,
    close,
    options,
    unavailable,
)
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kafka_broker._settings import BrokerSettings
    from kafka_broker._transport import OnAssigned, OnRevoked, Record

_logger = logging.getLogger("kafka_broker.transport")

_POLL_MS: Final = 500
_POLL_RECORDS: Final = 200
_LOST_MEMBERSHIP: Final = (
    kafka.CommitFailedError,
    kafka.IllegalStateError,
    kafka.IllegalGenerationError,
    kafka.UnknownMemberIdError,
    kafka.RebalanceInProgressError,
)


def consumer_options(settings: BrokerSettings, group: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "fetch_max_wait_ms": 100,
        "request_timeout_ms": int(REQUEST_TIMEOUT * 1000),
        **group,
    }
    return options(AIOKafkaConsumer, settings, defaults)


class _Consumer:
    """What a reader and a subscription share: fetching and closing."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    async def fetch(self) -> Sequence[Record]:
        """Return what has arrived; see `Reader.fetch`."""
        try:
            batches = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except Exception as exc:  # one record that cannot be parsed raises anything
            raise unavailable("fetching failed", exc) from exc
        if not batches:
            self._check_alive()
        return [record for batch in batches.values() for record in batch]

    def _check_alive(self) -> None:
        """Notice what aiokafka keeps to itself: after its fetch task died it is silent for ever."""
        fetching = self._consumer._fetcher._fetch_task  # noqa: SLF001  # no public sign of it
        if fetching.done():
            msg = "the fetch task of the consumer died"
            raise BrokerUnavailableError(msg)

    async def close(self) -> None:
        """Stop the consumer; see `Reader.close`."""
        await close(self._consumer, self._consumer.stop())


class KafkaReader(_Consumer):
    """A `Reader` over a consumer without a group."""

    def __init__(self, consumer: Any, position: int) -> None:
        super().__init__(consumer)
        self.position = position

    async def fetch(self) -> Sequence[Record]:
        """Return what has arrived; see `Reader.fetch`."""
        records = await super().fetch()
        if records:
            self.position = records[-1].offset + 1
        return records


class KafkaSubscription(_Consumer, ConsumerRebalanceListener):  # type: ignore[misc]  # untyped base
    """A `Subscription` over a consumer of a group."""

    def __init__(
        self, consumer: Any, topic: str, on_assigned: OnAssigned, on_revoked: OnRevoked
    ) -> None:
        super().__init__(consumer)
        self._topic = topic
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._assigned = asyncio.Event()
        self._epoch = 0
        self._held: Sequence[Record] = ()
        self._held_epoch = 0
        self._closed = False

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Let records through; called by aiokafka."""
        self._epoch += 1
        self._on_assigned(frozenset(place.partition for place in assigned))
        self._assigned.set()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Hold records back until the next assignment; called by aiokafka."""
        self._epoch += 1
        self._assigned.clear()
        if not revoked:
            return
        try:
            await self._on_revoked(frozenset(place.partition for place in revoked))
        except Exception:  # aiokafka would swallow it
            _logger.exception("giving up partitions of %s failed", self._topic)

    async def fetch(self) -> Sequence[Record]:
        """Return what has arrived; see `Subscription.fetch`.

        aiokafka hands out records of an assignment before it tells of it: those wait here, and are
        dropped, to be read again, when it is over before they could be handed on.
        """
        if not self._held:
            self._held = await super().fetch()
            self._held_epoch = self._epoch if self._assigned.is_set() else self._epoch + 1
        if self._held and not self._assigned.is_set():
            await self._wait_assigned()
            return ()
        records, self._held = self._held, ()
        return records if self._epoch == self._held_epoch else ()

    async def _wait_assigned(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_MS / 1000):
                await self._assigned.wait()

    async def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commit; see `Subscription.commit`."""
        if self._closed or not offsets:
            return not self._closed
        places = {TopicPartition(self._topic, number): at for number, at in offsets.items()}
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                await self._consumer.commit(places)
        except _LOST_MEMBERSHIP as exc:
            _logger.info("a commit on %s came after the partitions moved: %r", self._topic, exc)
            return False
        except FOREIGN as exc:
            action = f"cannot commit offsets of topic {self._topic!r}"
            raise unavailable(action, exc) from exc
        return True

    async def close(self) -> None:
        """Leave the group; see `Subscription.close`."""
        self._closed = True
        await super().close()
