"""What the rest of the library needs of Kafka, in two implementations: aiokafka and memory.

Everything here belongs to one event loop. Errors that leave a transport are those of
`kafka_broker.errors`; no exception of a client library gets past it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio

FETCH_TIMEOUT: Final = 0.5
"""Seconds of silence after which a fetch returns nothing, unless told otherwise."""

Headers = Sequence[tuple[str, bytes | None]]
"""Kafka's headers: ordered, a name may repeat, a value may be null or any bytes."""


class Record(Protocol):
    """One record as it was read. ``timestamp`` is in milliseconds since the epoch."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class Outgoing(NamedTuple):
    """One record to be written."""

    key: bytes | None
    value: bytes | None
    headers: Headers


UNKNOWN: Final = -1
"""The offset of what is in the log, but Kafka does not say where."""


class Appended(NamedTuple):
    """Where a batch is in the log: the offset of its first record, and its time in milliseconds."""

    offset: int
    timestamp: int


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic that should exist; ``config`` is Kafka's topic configuration."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)

    def command(self, bootstrap_servers: str) -> str:
        """Return the shell command that creates this topic with Kafka's own tools."""
        config = "".join(f" --config {name}={value}" for name, value in self.config.items())
        return (
            f"kafka-topics.sh --bootstrap-server {bootstrap_servers} --create "
            f"--topic {self.name} --partitions {self.partitions}{config}"
        )


class Reader(Protocol):
    """Reads one partition that was assigned by hand: no group, no commit."""

    @property
    def position(self) -> int:
        """The offset of the next record that `fetch` will return."""

    async def fetch(self) -> Sequence[Record]:
        """Return what has arrived, in offset order; empty after at most half a second of silence.

        That it returns shows that Kafka answers: an outage is waited for, for some seconds.

        Raises:
            BrokerUnavailableError: this reader is broken; close it and open another.
        """

    async def close(self) -> None:
        """Give everything back within a few seconds; never raises."""


class Subscription(Protocol):
    """A group member on one topic; begins at the committed offset, else the earliest."""

    async def fetch(
        self, leave_out: Collection[int] = (), *, timeout: float = FETCH_TIMEOUT
    ) -> Sequence[Record]:
        """As `Reader.fetch`, over the partitions assigned now; offset order within each.

        No partition waits for another that has more than one fetch can return. Also in a rebalance
        it returns after *timeout*.

        Args:
            leave_out: partitions whose records stay where they are until a later fetch.
            timeout: seconds to wait for a record.
        """

    async def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commit the next offset to read of each partition.

        Returns False when a partition is not ours any more: what was read under one assignment is
        never committed under another, nor after the group has lost us, however long that takes.

        Raises:
            BrokerUnavailableError: Kafka did not answer in time; it may have been committed.
        """

    async def close(self) -> None:
        """Leave the group and give everything back within a few seconds; never raises."""


OnAssigned = Callable[[frozenset[int]], None]
"""Called with the partitions just assigned, before the first of their records is fetched."""
OnRevoked = Callable[[frozenset[int]], Awaitable[None]]
"""Awaited before the partitions go to another member; commits made inside it still count.

After a lost session it is awaited, too, but the partitions are gone: commits are refused.
"""


class Transport(Protocol):
    """The seam between this library and Kafka."""

    async def start(self) -> None:
        """Connect once, without retrying.

        Raises:
            BrokerUnavailableError: nothing answers, or it refuses us.
        """

    async def stop(self) -> None:
        """Close every connection within a few seconds; what is still being sent ends as unknown.

        Never raises; readers and subscriptions are closed by whoever opened them.
        """

    def now(self) -> float:
        """Return the seconds since the epoch, on the clock that deadlines are written in."""

    async def partitions(self, topic: str) -> int:
        """Return how many partitions *topic* has; 0 when it does not exist.

        Raises:
            BrokerUnavailableError: Kafka does not answer, or refuses to describe the topic.
        """

    async def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create those of *topics* that do not exist; one that does is left as it is.

        Raises:
            BrokerUnavailableError: Kafka does not answer, or we may not create topics.
        """

    def send(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> asyncio.Future[Appended]:
        """Append *records* in order, all or none; at most one call per partition may be open.

        The future ends with
            DeliveryError: nothing was appended; ``retriable`` tells whether to try again.
            DeliveryUnknownError: they may have been appended.
        """

    async def read(self, topic: str, partition: int, offset: int | None = None) -> Reader:
        """Open a reader at *offset*, or at the end, and return once its position is known.

        Whatever is appended after this returns will be read. An offset that is no longer in the
        log moves to the earliest that is, and one behind the end of the log to its end.

        Raises:
            BrokerUnavailableError: as `partitions`.
        """

    async def subscribe(
        self,
        topic: str,
        group_id: str | None = None,
        *,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
    ) -> Subscription:
        """Join a consumer group on *topic*, that of the settings unless another is given.

        It does not wait for an assignment.

        Raises:
            BrokerUnavailableError: as `partitions`.
        """
