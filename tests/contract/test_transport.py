"""What every transport does, stated once and held against memory and against a real Kafka."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from kafka_broker._settings import BrokerSettings
from kafka_broker._transport import Appended, Outgoing, TopicSpec
from kafka_broker._transport.memory import MemoryTransport, cluster
from kafka_broker.errors import BrokerUnavailableError, DeliveryError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from kafka_broker._transport import Reader, Record, Subscription, Transport

PATIENCE = 30.0
BINARY = bytes(range(256))


def build(bootstrap_servers: str) -> Transport:
    """Return a transport that is not started, with a consumer group of its own."""
    settings = BrokerSettings(
        module=unique("module"),
        bootstrap_servers=bootstrap_servers,
        session_timeout=6.0,
        rebalance_timeout=10.0,
    )
    if bootstrap_servers.startswith("memory://"):
        return MemoryTransport(settings)
    from kafka_broker._transport.kafka import KafkaTransport  # noqa: PLC0415  # needs aiokafka

    return KafkaTransport(settings)


def unique(kind: str) -> str:
    """Return a name that no other test uses."""
    return f"{kind}-{uuid4().hex}"


def outgoing(value: bytes | None, key: bytes | None = None, headers: Any = ()) -> Outgoing:
    """Return a record; its headers may hold null, as Kafka's may."""
    return Outgoing(key, value, headers)


async def send(transport: Transport, topic: str, partition: int, *values: bytes) -> Appended:
    """Append *values* as one batch and wait for the acknowledgement."""
    async with asyncio.timeout(PATIENCE):
        return await transport.send(topic, partition, [outgoing(value) for value in values])


async def fetched(reader: Reader | Subscription, count: int) -> list[Record]:
    """Fetch until *count* records are there."""
    records: list[Record] = []
    async with asyncio.timeout(PATIENCE):
        while len(records) < count:
            records += await reader.fetch()
    return records


def values(records: Sequence[Record]) -> list[bytes | None]:
    """Return the value of each record."""
    return [record.value for record in records]


def places(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Return the partition and the offset of each record, sorted."""
    return sorted((record.partition, record.offset) for record in records)


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def servers(request: pytest.FixtureRequest) -> str:
    """Bootstrap servers of a cluster that runs."""
    if request.param == "memory":
        return f"memory://{uuid4().hex}"
    address: str = request.getfixturevalue("kafka")
    return address


@pytest.fixture
async def transport(servers: str) -> AsyncIterator[Transport]:
    """A transport that is started, and stopped after the test."""
    started = build(servers)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
async def topic(transport: Transport) -> str:
    """A topic with two empty partitions."""
    name = unique("topic")
    await transport.create_topics([TopicSpec(name, 2)])
    return name


@asynccontextmanager
async def reading(
    transport: Transport, topic: str, partition: int = 0, offset: int | None = None
) -> AsyncIterator[Reader]:
    """Hold a reader open."""
    reader = await transport.read(topic, partition, offset)
    try:
        yield reader
    finally:
        await reader.close()


class Group:
    """Members of one consumer group and what happened to them, in order."""

    def __init__(self, transport: Transport, topic: str) -> None:
        self.events: list[tuple[str, str]] = []
        self._transport = transport
        self._topic = topic
        self._happened = asyncio.Event()

    def report(self, member: str, event: str) -> None:
        """Note that *event* happened to *member*."""
        self.events.append((member, event))
        self._happened.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that happened makes *condition* true."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._happened.clear()
                await self._happened.wait()

    @asynccontextmanager
    async def member(
        self,
        name: str,
        on_revoked: Callable[[Member], Awaitable[object]] | None = None,
        *,
        group_id: str | None = None,
    ) -> AsyncIterator[Member]:
        """Join under *name*, and read until this context ends."""
        member = Member(self, name, on_revoked)
        member.subscription = await self._transport.subscribe(
            self._topic, group_id, on_assigned=member.assign, on_revoked=member.revoke
        )
        pump = asyncio.create_task(member.read())
        try:
            yield member
        finally:
            pump.cancel()
            with suppress(asyncio.CancelledError):
                await pump
            await member.subscription.close()


class Member:
    """One subscription that is read by a task of its own."""

    subscription: Subscription

    def __init__(
        self, group: Group, name: str, on_revoked: Callable[[Member], Awaitable[object]] | None
    ) -> None:
        self.assigned: frozenset[int] | None = None
        self.revoked: list[frozenset[int]] = []
        self.records: list[Record] = []
        self._group = group
        self._name = name
        self._on_revoked = on_revoked

    def assign(self, partitions: frozenset[int]) -> None:
        """Note the assignment."""
        self.assigned = partitions
        self._group.report(self._name, "assigned")

    async def revoke(self, partitions: frozenset[int]) -> None:
        """Do what the test wants done, then note the end of the assignment."""
        try:
            if self._on_revoked is not None:
                await self._on_revoked(self)
        finally:
            self.revoked.append(partitions)
            self._group.report(self._name, "revoked")

    async def read(self) -> None:
        """Note every record."""
        while True:
            records = await self.subscription.fetch()
            self.records += records
            if records:
                self._group.report(self._name, "read")

    def count(self) -> int:
        """Return how many partitions are assigned now; -1 before the first assignment."""
        return -1 if self.assigned is None else len(self.assigned)

    def owns(self, count: int) -> bool:
        """Tell whether *count* partitions are assigned now."""
        return count == self.count()


def committing(offsets: Mapping[int, int]) -> Callable[[Member], Awaitable[bool]]:
    """Return what commits *offsets* for a member."""

    async def commit(member: Member) -> bool:
        return await member.subscription.commit(offsets)

    return commit


# Start, stop, time


async def test_start_without_a_cluster_raises(servers: str) -> None:
    """A start that nothing answers ends in BrokerUnavailableError, without a retry."""
    if servers.startswith("memory://"):
        cluster(servers.removeprefix("memory://")).down()
    transport = build(servers if servers.startswith("memory://") else "127.0.0.1:1")
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(BrokerUnavailableError):
            await transport.start()
    await transport.stop()


async def test_stop_is_idempotent(transport: Transport) -> None:
    """A second stop does nothing."""
    async with asyncio.timeout(PATIENCE):
        await transport.stop()
        await transport.stop()


async def test_stop_before_start(servers: str) -> None:
    """A stop without a start does nothing."""
    await build(servers).stop()


async def test_stop_ends_open_sends(transport: Transport, topic: str) -> None:
    """No send is open after a stop: it was acknowledged, or it ended in DeliveryError."""
    future = transport.send(topic, 0, [outgoing(b"v")])
    async with asyncio.timeout(PATIENCE):
        await transport.stop()
        (outcome,) = await asyncio.gather(future, return_exceptions=True)
    assert isinstance(outcome, Appended | DeliveryError)


async def test_send_after_stop_is_not_delivered(transport: Transport, topic: str) -> None:
    """A send after the stop ends in DeliveryError."""
    await transport.stop()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(DeliveryError):
            await transport.send(topic, 0, [outgoing(b"v")])


async def test_stop_leaves_readers_to_their_owner(transport: Transport, topic: str) -> None:
    """A stop with an open reader and an open subscription returns; both can be closed later."""
    reader = await transport.read(topic, 0)
    group = Group(transport, topic)
    async with group.member("a") as member:
        await group.until(lambda: member.owns(2))
        async with asyncio.timeout(PATIENCE):
            await transport.stop()
    async with asyncio.timeout(PATIENCE):
        await reader.close()


async def test_now_is_the_wall_clock(transport: Transport) -> None:
    """Now is in seconds since the epoch."""
    assert pytest.approx(time.time(), abs=1.0) == transport.now()


# Topics


async def test_a_missing_topic_has_no_partitions(transport: Transport) -> None:
    """A missing topic has 0 partitions, and asking does not create it."""
    missing = unique("missing")
    counts = [await transport.partitions(missing) for _ in range(2)]
    assert [0, 0] == counts


async def test_created_topics_exist(transport: Transport) -> None:
    """Every topic has the partitions that its specification asked for."""
    specs = [TopicSpec(unique("t"), 1), TopicSpec(unique("t"), 3, {"retention.ms": "60000"})]
    await transport.create_topics(specs)
    assert [1, 3] == [await transport.partitions(spec.name) for spec in specs]


async def test_an_existing_topic_is_left_as_it_is(transport: Transport, topic: str) -> None:
    """Creating a topic again changes nothing, and creates the others of the call."""
    other = unique("topic")
    await transport.create_topics([TopicSpec(topic, 5), TopicSpec(other, 1)])
    assert (2, 1) == (await transport.partitions(topic), await transport.partitions(other))


def test_command_creates_the_topic() -> None:
    """The shell command has the servers, the name, the partitions and the configuration."""
    spec = TopicSpec("orders", 3, {"retention.ms": "60000"})
    expected = (
        "kafka-topics.sh --bootstrap-server localhost:9092 --create "
        "--topic orders --partitions 3 --config retention.ms=60000"
    )
    assert expected == spec.command("localhost:9092")


# Sending and reading


@pytest.mark.parametrize(
    ("key", "value", "headers"),
    [
        (b"key", b"value", []),
        (None, None, []),
        (b"", b"", []),
        (BINARY, BINARY, [("binary", BINARY), ("empty", b"")]),
        (None, b"v", [("again", b"1"), ("other", b"2"), ("again", b"1"), ("null", None)]),
    ],
    ids=["plain", "null", "empty", "binary", "headers"],
)
async def test_a_record_comes_back_as_it_was_sent(
    transport: Transport, topic: str, key: bytes | None, value: bytes | None, headers: Any
) -> None:
    """Key, value and headers keep every byte, their order, their repetitions and their nulls."""
    async with reading(transport, topic, 1) as reader:
        async with asyncio.timeout(PATIENCE):
            await transport.send(topic, 1, [outgoing(value, key, headers)])
        (record,) = await fetched(reader, 1)
    actual = (record.topic, record.partition, record.key, record.value, list(record.headers))
    assert (topic, 1, key, value, headers) == actual


async def test_appended_tells_where_a_batch_begins(transport: Transport, topic: str) -> None:
    """The offsets of a batch follow each other, and Appended has the first of them."""
    appended = [await send(transport, topic, 0, b"1", b"2"), await send(transport, topic, 0, b"3")]
    async with reading(transport, topic, 0, 0) as reader:
        records = await fetched(reader, 3)
    assert [0, 2] == [batch.offset for batch in appended]
    assert [0, 1, 2] == [record.offset for record in records]


async def test_appended_tells_when(transport: Transport, topic: str) -> None:
    """The time of a batch is that of its first record: milliseconds, about now."""
    appended = await send(transport, topic, 0, b"v")
    async with reading(transport, topic, 0, 0) as reader:
        (record,) = await fetched(reader, 1)
    assert pytest.approx(time.time() * 1000, abs=5000) == record.timestamp
    assert appended.timestamp in {record.timestamp, -1}


async def test_order_is_kept_within_a_partition(transport: Transport, topic: str) -> None:
    """Records are read in the order in which they were sent."""
    sent = [b"%d" % number for number in range(1200)]
    for start in range(0, len(sent), 100):
        await send(transport, topic, 0, *sent[start : start + 100])
    async with reading(transport, topic, 0, 0) as reader:
        assert sent == values(await fetched(reader, len(sent)))


async def test_partitions_do_not_mix(transport: Transport, topic: str) -> None:
    """A reader gets the records of its partition only."""
    await send(transport, topic, 0, b"zero")
    await send(transport, topic, 1, b"one")
    async with reading(transport, topic, 1, 0) as reader:
        records = [*await fetched(reader, 1), *await reader.fetch()]
    assert [b"one"] == values(records)


async def test_partitions_can_be_sent_to_at_once(transport: Transport, topic: str) -> None:
    """One open send per partition does not disturb the other."""
    open_sends = [transport.send(topic, partition, [outgoing(b"v")]) for partition in range(2)]
    async with asyncio.timeout(PATIENCE):
        appended = await asyncio.gather(*open_sends)
    assert [0, 0] == [batch.offset for batch in appended]


async def test_send_to_a_missing_topic_can_be_tried_again(transport: Transport) -> None:
    """A missing topic refuses a send with an error that names it, and is not created by it."""
    missing = unique("missing")
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(DeliveryError) as caught:
            await transport.send(missing, 0, [outgoing(b"v")])
    assert (missing, True) == (caught.value.topic, caught.value.retriable)
    assert 0 == await transport.partitions(missing)


async def test_a_cancelled_send_leaves_the_partition_usable(
    transport: Transport, topic: str
) -> None:
    """After its future was cancelled, later sends are appended and read in order."""
    transport.send(topic, 0, [outgoing(b"dropped")]).cancel()
    await send(transport, topic, 0, b"1")
    last = await send(transport, topic, 0, b"2")
    async with reading(transport, topic, 0, 0) as reader:
        records = await fetched(reader, last.offset + 1)
    assert [b"1", b"2"] == values(records)[-2:]


async def test_read_at_the_end(transport: Transport, topic: str) -> None:
    """A reader at the end gets all that is appended after it was opened, and nothing older."""
    await send(transport, topic, 0, b"old")
    async with reading(transport, topic, 0) as reader:
        await send(transport, topic, 0, b"new", b"newer")
        assert [b"new", b"newer"] == values(await fetched(reader, 2))


@pytest.mark.parametrize(("offset", "expected"), [(0, [b"0", b"1", b"2"]), (2, [b"2"])])
async def test_read_at_an_offset(
    transport: Transport, topic: str, offset: int, expected: list[bytes]
) -> None:
    """A reader at an offset begins with the record there."""
    await send(transport, topic, 0, b"0", b"1", b"2")
    async with reading(transport, topic, 0, offset) as reader:
        assert expected == values(await fetched(reader, len(expected)))


async def test_read_at_the_next_offset(transport: Transport, topic: str) -> None:
    """A reader at the offset after the last record waits for what comes there."""
    await send(transport, topic, 0, b"0", b"1")
    async with reading(transport, topic, 0, 2) as reader:
        await send(transport, topic, 0, b"2")
        assert [b"2"] == values(await fetched(reader, 1))


async def test_read_behind_the_end_moves_to_the_end(transport: Transport, topic: str) -> None:
    """A reader at an offset behind the end of the log reads nothing again, and what comes."""
    await send(transport, topic, 0, b"0", b"1")
    async with reading(transport, topic, 0, 1000) as reader:
        assert [] == list(await reader.fetch())
        assert 2 == reader.position
        await send(transport, topic, 0, b"2")
        assert [b"2"] == values(await fetched(reader, 1))
        assert 3 == reader.position


async def test_a_missing_topic_cannot_be_read(transport: Transport) -> None:
    """Reading a missing topic ends in an error that names it."""
    missing = unique("missing")
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(BrokerUnavailableError, match=missing):
            await transport.read(missing, 0)


async def test_fetch_is_empty_after_silence(transport: Transport, topic: str) -> None:
    """Where nothing arrives, a fetch returns nothing, soon."""
    async with reading(transport, topic) as reader, asyncio.timeout(5):
        assert [] == list(await reader.fetch())


async def test_fetch_returns_before_silence_ends(transport: Transport, topic: str) -> None:
    """A fetch that already waits returns the record that arrives."""
    async with reading(transport, topic) as reader:
        waiting = asyncio.create_task(fetched(reader, 1))
        await send(transport, topic, 0, b"v")
        assert [b"v"] == values(await waiting)


async def test_nothing_is_lost_by_a_cancelled_fetch(transport: Transport, topic: str) -> None:
    """A reader that is opened where a cancelled one stopped continues without gap or double."""
    sent = [b"%d" % number for number in range(5)]
    got: list[bytes | None] = []
    position = 0
    for value in sent:
        async with reading(transport, topic, 0, position) as reader:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await reader.fetch()
            position = reader.position
        await send(transport, topic, 0, value)
        async with reading(transport, topic, 0, position) as reader:
            got += values(await fetched(reader, 1))
            position = reader.position
    assert sent == got


async def test_position_is_that_of_the_next_record(transport: Transport, topic: str) -> None:
    """A reader tells where it begins, and after each fetch where it goes on."""
    await send(transport, topic, 0, b"0", b"1", b"2")
    async with reading(transport, topic) as at_end, reading(transport, topic, 0, 1) as inside:
        positions = [at_end.position, inside.position]
        await fetched(inside, 2)
        positions.append(inside.position)
        await send(transport, topic, 0, b"3")
        await fetched(at_end, 1)
        positions.append(at_end.position)
    assert [3, 1, 3, 4] == positions


async def test_two_readers_both_get_everything(transport: Transport, topic: str) -> None:
    """Readers of one partition do not share: each gets every record."""
    async with reading(transport, topic) as one, reading(transport, topic) as other:
        await send(transport, topic, 0, b"v")
        assert [b"v"] == values(await fetched(one, 1))
        assert [b"v"] == values(await fetched(other, 1))


async def test_a_reader_closes_twice(transport: Transport, topic: str) -> None:
    """A second close does nothing, and a closed reader does not fetch."""
    reader = await transport.read(topic, 0)
    async with asyncio.timeout(PATIENCE):
        await reader.close()
        await reader.close()
    with pytest.raises(BrokerUnavailableError):
        await reader.fetch()


# Consumer groups


async def test_a_new_group_starts_at_the_earliest(transport: Transport, topic: str) -> None:
    """A group that never committed reads everything, in offset order within each partition."""
    for partition in range(2):
        await send(transport, topic, partition, b"0", b"1", b"2")
    group = Group(transport, topic)
    async with group.member("a") as member:
        await group.until(lambda: len(member.records) >= 6)
    assert sorted(places(member.records)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for partition in range(2):
        own = [record.offset for record in member.records if record.partition == partition]
        assert [0, 1, 2] == own


async def test_on_assigned_comes_first(transport: Transport, topic: str) -> None:
    """A member is told of its partitions before it fetches the first of their records."""
    await send(transport, topic, 0, b"0")
    group = Group(transport, topic)
    async with group.member("a") as member:
        await group.until(lambda: member.records)
    assert [("a", "assigned"), ("a", "read")] == group.events[:2]
    assert frozenset({0, 1}) == member.assigned


async def test_a_new_member_resumes_at_the_committed_offset(
    transport: Transport, topic: str
) -> None:
    """What was committed is not read again; what was only read is."""
    await send(transport, topic, 0, b"0", b"1", b"2")
    group = Group(transport, topic)
    async with group.member("a") as first:
        await group.until(lambda: len(first.records) >= 3)
        assert await first.subscription.commit({0: 1})
    async with group.member("b") as second:
        await group.until(lambda: len(second.records) >= 2)
    assert [b"1", b"2"] == values(second.records)


async def test_groups_do_not_share(transport: Transport, servers: str, topic: str) -> None:
    """Each group reads every record."""
    await send(transport, topic, 0, b"v")
    other = build(servers)
    await other.start()
    one, two = Group(transport, topic), Group(other, topic)
    async with one.member("a") as first, two.member("b") as second:
        await one.until(lambda: first.records)
        await two.until(lambda: second.records)
    await other.stop()
    assert [b"v"] == values(first.records) == values(second.records)


async def test_one_transport_joins_two_groups(transport: Transport, topic: str) -> None:
    """A group that is named reads and commits beside the group of the settings."""
    await send(transport, topic, 0, b"0", b"1")
    group, other = Group(transport, topic), unique("group")
    async with group.member("a") as first, group.member("b", group_id=other) as second:
        await group.until(lambda: len(first.records) == len(second.records) == 2)
        assert await second.subscription.commit({0: 1})
    async with group.member("c") as first, group.member("d", group_id=other) as second:
        await group.until(lambda: len(first.records) >= 2 and second.records)
    assert ([b"0", b"1"], [b"1"]) == (values(first.records), values(second.records))


async def test_two_members_share_the_partitions(transport: Transport, topic: str) -> None:
    """Each partition belongs to one member, so each record is read by exactly one."""
    group = Group(transport, topic)
    async with group.member("a") as first, group.member("b") as second:
        await group.until(lambda: first.owns(1) and second.owns(1))
        for partition in range(2):
            await send(transport, topic, partition, b"0", b"1")
        await group.until(lambda: len(first.records) + len(second.records) >= 4)
        assert not (first.assigned or set()) & (second.assigned or set())
    assert [(0, 0), (0, 1), (1, 0), (1, 1)] == places(first.records + second.records)
    assert (2, 2) == (len(first.records), len(second.records))


async def test_a_commit_while_giving_up_counts(transport: Transport, topic: str) -> None:
    """A joining member waits for on_revoked, and reads on from what was committed inside it."""
    for partition in range(2):
        await send(transport, topic, partition, b"0", b"1")
    group = Group(transport, topic)
    async with group.member("a", committing({0: 1, 1: 1})) as first:
        await group.until(lambda: len(first.records) >= 4)
        first.records.clear()
        async with group.member("b") as second:
            await group.until(lambda: len(first.records) + len(second.records) >= 2)
    assert frozenset({0, 1}) == first.revoked[0]
    assert group.events.index(("a", "revoked")) < group.events.index(("b", "assigned"))
    assert group.events.index(("b", "assigned")) < group.events.index(("b", "read"))
    assert [(0, 1), (1, 1)] == places(first.records[:1] + second.records[:1])


async def test_an_error_while_giving_up_holds_nobody_up(transport: Transport, topic: str) -> None:
    """The partitions move although on_revoked raised."""

    async def fail(_: Member) -> None:
        raise ZeroDivisionError

    group = Group(transport, topic)
    async with group.member("a", fail) as first:
        await group.until(lambda: first.owns(2))
        async with group.member("b") as second:
            await group.until(lambda: first.owns(1) and second.owns(1))


async def test_a_commit_for_a_partition_that_moved_is_refused(
    transport: Transport, topic: str
) -> None:
    """A commit returns True for a partition that is ours, False for one that went elsewhere."""
    await send(transport, topic, 0, b"0", b"1")
    await send(transport, topic, 1, b"0", b"1")
    group = Group(transport, topic)
    async with group.member("a") as first:
        await group.until(lambda: first.owns(2))
        async with group.member("b") as second:
            await group.until(lambda: first.owns(1) and second.owns(1))
            answers = [
                await first.subscription.commit(dict.fromkeys(member.assigned or (), 1))
                for member in (first, second)
            ]
    assert [True, False] == answers


async def test_partitions_of_a_closed_member_move(transport: Transport, topic: str) -> None:
    """Who stays gets the partitions of who leaves."""
    group = Group(transport, topic)
    async with group.member("a") as first:
        async with group.member("b") as second:
            await group.until(lambda: first.owns(1) and second.owns(1))
        await group.until(lambda: first.owns(2))
        await send(transport, topic, 0, b"0")
        await send(transport, topic, 1, b"1")
        await group.until(lambda: len(first.records) >= 2)


async def test_a_member_too_many_waits(transport: Transport, topic: str) -> None:
    """With more members than partitions one has nothing, until another leaves."""
    group = Group(transport, topic)
    async with group.member("a") as a, group.member("b") as b:
        async with group.member("c") as c:
            members = (a, b, c)
            await group.until(lambda: [0, 1, 1] == sorted(map(Member.count, members)))
        await group.until(lambda: a.owns(1) and b.owns(1))


async def test_a_subscription_closes_twice(transport: Transport, topic: str) -> None:
    """A second close does nothing, and a closed subscription does not fetch."""
    group = Group(transport, topic)
    async with group.member("a") as member:
        await group.until(lambda: member.owns(2))
    async with asyncio.timeout(PATIENCE):
        await member.subscription.close()
    with pytest.raises(BrokerUnavailableError):
        await member.subscription.fetch()


async def test_a_commit_after_the_close_is_refused(transport: Transport, topic: str) -> None:
    """Who left the group owns nothing, so nothing of its is committed."""
    group = Group(transport, topic)
    async with group.member("a") as member:
        await group.until(lambda: member.owns(2))
    assert await member.subscription.commit({0: 0}) is False


async def lose_session(transport: Any, servers: str, member: Member) -> None:
    """Remove the only member from its group behind its back, as when Kafka missed it too long."""
    if servers.startswith("memory://"):
        cluster(servers.removeprefix("memory://")).expel(transport._settings.group_id)
        return
    from aiokafka.protocol.group import LeaveGroupRequest  # noqa: PLC0415  # needs aiokafka

    subscription: Any = member.subscription
    coordinator = subscription._consumer._coordinator
    await coordinator._send_req(LeaveGroupRequest(coordinator.group_id, coordinator.member_id))


async def test_nothing_is_committed_after_a_lost_session(
    transport: Transport, servers: str, topic: str
) -> None:
    """Who lost its session commits nothing, not in on_revoked either; then it joins again."""
    await send(transport, topic, 0, b"0", b"1", b"2")
    answers: list[bool] = []

    async def commit_late(member: Member) -> None:
        answers.append(await member.subscription.commit({0: 1}))

    group = Group(transport, topic)
    async with group.member("a", commit_late) as member:
        await group.until(lambda: len(member.records) >= 3)
        assert await member.subscription.commit({0: 2})
        member.records.clear()
        await lose_session(transport, servers, member)
        await commit_late(member)
        await group.until(lambda: member.records)
    assert [False, False] == answers
    assert [b"2"] == values(member.records)


async def test_a_commit_after_giving_up_is_refused(transport: Transport, topic: str) -> None:
    """When on_revoked has returned, nothing is committed until there is a new assignment."""
    group = Group(transport, topic)
    async with group.member("a") as first:
        await group.until(lambda: first.owns(2))
        assert await first.subscription.commit({0: 0})
        async with group.member("b"):
            await group.until(lambda: first.revoked)
            assert await first.subscription.commit({0: 0}) is False


@asynccontextmanager
async def subscribed(
    transport: Transport, topic: str, on_revoked: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[Subscription]:
    """Hold a subscription that has its partitions, and leave fetching to the test."""
    assigned = asyncio.Event()

    async def revoke(_: frozenset[int]) -> None:
        if on_revoked is not None:
            await on_revoked()

    subscription = await transport.subscribe(
        topic, on_assigned=lambda _: assigned.set(), on_revoked=revoke
    )
    try:
        async with asyncio.timeout(PATIENCE):
            await assigned.wait()
        yield subscription
    finally:
        await subscription.close()


async def test_partitions_can_be_left_out(transport: Transport, topic: str) -> None:
    """What is left out stays where it is: none of it is lost, doubled or out of order."""
    sent = [b"%d" % number for number in range(700)]
    for partition in range(2):
        await send(transport, topic, partition, *sent)
    records: list[Record] = []
    choices: list[frozenset[int]] = [frozenset({0}), frozenset({1}), frozenset()]
    async with subscribed(transport, topic) as subscription, asyncio.timeout(PATIENCE):
        while len(records) < 2 * len(sent):
            leave_out = choices[0]
            choices = choices[1:] + choices[:1]
            fetched = await subscription.fetch(leave_out)
            assert leave_out.isdisjoint(record.partition for record in fetched)
            records += fetched
    for partition in range(2):
        own = [record.value for record in records if record.partition == partition]
        assert sent == own


@pytest.mark.parametrize("leave_out", [(), (0,), (0, 1)])
async def test_a_fetch_waits_as_long_as_it_is_told(
    transport: Transport, topic: str, leave_out: tuple[int, ...]
) -> None:
    """Where nothing may be returned it takes its timeout, also when all is left out."""
    loop = asyncio.get_running_loop()
    await send(transport, topic, 0, b"0")
    async with subscribed(transport, topic) as subscription:
        if not leave_out:
            await fetched(subscription, 1)
        begin = loop.time()
        records = await subscription.fetch(leave_out, timeout=0.2)
        elapsed = loop.time() - begin
    assert [] == list(records)
    assert 0.19 < elapsed < 0.5


async def test_a_fetch_does_not_wait_for_a_rebalance(transport: Transport, topic: str) -> None:
    """While partitions are given up, a fetch returns nothing after its timeout."""
    revoking, go_on = asyncio.Event(), asyncio.Event()

    async def give_up() -> None:
        revoking.set()
        await go_on.wait()

    group = Group(transport, topic)
    async with subscribed(transport, topic, give_up) as subscription, group.member("b"):
        await send(transport, topic, 0, b"0")
        async with asyncio.timeout(PATIENCE):
            await revoking.wait()
        async with asyncio.timeout(2):
            assert [] == list(await subscription.fetch(timeout=0.2))
        go_on.set()


async def test_no_partition_waits_for_a_hot_one(transport: Transport) -> None:
    """Of four partitions that each have more than a fetch returns, four fetches return some."""
    topic = unique("topic")
    await transport.create_topics([TopicSpec(topic, 4)])
    for partition in range(4):
        await send(transport, topic, partition, *[b"v"] * 1200)
    fetches: list[Sequence[Record]] = []
    async with subscribed(transport, topic) as subscription, asyncio.timeout(PATIENCE):
        while len(fetches) < 4:
            if records := await subscription.fetch():
                fetches.append(records)
    assert {0, 1, 2, 3} == {record.partition for records in fetches for record in records}


async def test_a_silent_subscription_fetches_nothing(transport: Transport, topic: str) -> None:
    """Where nothing arrives, a fetch of a member returns nothing, soon."""
    async with subscribed(transport, topic) as subscription, asyncio.timeout(5):
        assert [] == list(await subscription.fetch())
