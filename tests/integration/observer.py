"""Kafka as others see it: topics, groups and commits, through a client that is not ours."""

from __future__ import annotations

import struct
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    ConsumerGroupState,
    ConsumerGroupTopicPartitions,
    KafkaError,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECONDS: Final = 20.0
_COMMITS: Final = "__consumer_offsets"
_OF_AN_OFFSET: Final = (0, 1)
"""Versions of a key in Kafka's own log of commits; other versions are of group members."""


class Found(NamedTuple):
    """One record of a topic."""

    partition: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


class Observer:
    """Looks at one module's topics and group. Everything here blocks.

    Args:
        servers: the address of Kafka.
        module: the topic, and the group that reads it.
    """

    def __init__(self, servers: str, module: str) -> None:
        self._servers = servers
        self._module = module
        options: dict[str, Any] = {
            "bootstrap.servers": servers,
            "log_level": 2,
        }  # Kafka ends before they do
        self._admin = AdminClient(options)
        self._producer = Producer(options)

    def append(
        self,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        *,
        key: bytes = b"k",
        partition: int = 0,
    ) -> None:
        """Append a record as it is, such as none of our clients would write."""
        self._producer.produce(self._module, value, key, partition, headers=list(headers))
        assert 0 == self._producer.flush(_SECONDS)

    def contents(self, topic: str) -> list[Found]:
        """Return all records of a topic, in the order of each partition."""
        options = {
            "bootstrap.servers": self._servers,
            "group.id": "observer",  # demanded, and never used
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
        known = self._partitions(topic)
        left = set(known)
        consumer = Consumer(options)
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in known])
        found: list[Found] = []
        while left:
            message = consumer.poll(_SECONDS)
            assert message is not None, f"Kafka does not answer; {topic} {left} not read to its end"
            error, partition = message.error(), message.partition() or 0
            if error is None:
                headers: Any = message.headers() or []
                found.append(Found(partition, message.key(), message.value(), headers))
            else:
                assert KafkaError._PARTITION_EOF == error.code(), error
                left.discard(partition)
        consumer.close()
        return found

    def _partitions(self, topic: str) -> list[int]:
        return list(self._admin.list_topics(topic, timeout=_SECONDS).topics[topic].partitions)

    def dead_letters(self) -> list[Found]:
        return self.contents(f"{self._module}.dlq")

    def commits(self) -> dict[int, list[int]]:
        """Return every offset that the group has ever committed, by partition, in order.

        They are read from the topic that Kafka keeps them in: samples could miss one that was
        lower and was put right a moment later.
        """
        history: dict[int, list[int]] = defaultdict(list)
        for found in self.contents(_COMMITS):
            group, topic, partition = _committed_by(found.key or b"")
            if found.value is not None and (group, topic) == (self._module, self._module):
                history[partition].append(struct.unpack_from(">q", found.value, 2)[0])
        return history

    def committed(self) -> dict[int, int]:
        """Return the offset that is committed of each partition."""
        asked = [ConsumerGroupTopicPartitions(self._module)]
        answer = self._admin.list_consumer_group_offsets(asked, request_timeout=_SECONDS)
        group = answer[self._module].result()
        return {
            place.partition: place.offset for place in group.topic_partitions if place.offset >= 0
        }

    def ends(self) -> dict[int, int]:
        """Return the end of each partition that has records."""
        end: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # their omission
        partitions = self._partitions(self._module)
        asked = {TopicPartition(self._module, number): end for number in partitions}
        answers = self._admin.list_offsets(asked, request_timeout=_SECONDS)
        ends = {place.partition: future.result().offset for place, future in answers.items()}
        return {partition: end for partition, end in ends.items() if end}

    def drained(self) -> bool:
        """Return whether all that is in the topic is committed."""
        return self.committed() == self.ends()

    def shares(self) -> dict[str, int]:
        """Return how many partitions each replica has; empty while the group is moving."""
        answer: Any = self._admin.describe_consumer_groups([self._module], request_timeout=_SECONDS)
        group = answer[self._module].result()
        if group.state != ConsumerGroupState.STABLE:
            return {}
        return {
            member.client_id: len(member.assignment.topic_partitions) for member in group.members
        }


def _committed_by(key: bytes) -> tuple[str, str, int]:
    """Read a key of Kafka's log of commits: group, topic, partition; empty when it is another."""
    (version,) = struct.unpack_from(">h", key)
    if version not in _OF_AN_OFFSET:
        return "", "", 0
    texts, at = [], 2
    for _ in range(2):
        (size,) = struct.unpack_from(">h", key, at)
        texts.append(key[at + 2 : at + 2 + size].decode())
        at += 2 + size
    return texts[0], texts[1], struct.unpack_from(">i", key, at)[0]
