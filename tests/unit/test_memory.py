"""The memory transport where it does more than every transport: faults, time, threads."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from kafka_broker._settings import BrokerSettings
from kafka_broker._transport import Outgoing, TopicSpec
from kafka_broker._transport.memory import MemoryCluster, MemoryTransport, cluster
from kafka_broker.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DeliveryUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from kafka_broker._transport import Appended, Reader, Record, Subscription

TOPIC = "orders"
GROUP = "payments"
VIRTUAL = pytest.mark.looptime


@pytest.fixture
def name() -> str:
    """The name of a cluster that no other test uses."""
    return uuid4().hex


@pytest.fixture
def kafka(name: str) -> MemoryCluster:
    """The cluster that the test may look into and break."""
    return cluster(name)


@pytest.fixture
async def transport(name: str) -> AsyncIterator[MemoryTransport]:
    """A started transport; the topic has two partitions."""
    started = build(name)
    await started.start()
    await started.create_topics([TopicSpec(TOPIC, 2)])
    yield started
    await started.stop()


def build(name: str, **values: Any) -> MemoryTransport:
    """Return a transport that is not started; the ids of its members follow their joins."""
    values = {"module": GROUP, "bootstrap_servers": f"memory://{name}", "instance": "i", **values}
    return MemoryTransport(BrokerSettings(**values))


async def started(name: str, **values: Any) -> MemoryTransport:
    """Return a transport that is started."""
    transport = build(name, **values)
    await transport.start()
    return transport


def send(
    transport: MemoryTransport, *values: bytes, topic: str = TOPIC, partition: int = 0
) -> asyncio.Future[Appended]:
    """Send one batch of *values*."""
    return transport.send(topic, partition, [Outgoing(None, value, ()) for value in values])


def values(records: Sequence[Record]) -> list[bytes | None]:
    """Return the value of each record."""
    return [record.value for record in records]


async def fetched(reader: Reader | Subscription, count: int) -> list[Record]:
    """Fetch until *count* records are there."""
    records: list[Record] = []
    async with asyncio.timeout(5):
        while len(records) < count:
            records += await reader.fetch()
    return records


class Member:
    """A subscription and what it was told."""

    subscription: Subscription

    def __init__(self, on_revoked: Callable[[Member], Awaitable[object]] | None) -> None:
        self.events: list[tuple[str, list[int]]] = []
        self.told = asyncio.Event()
        self._on_revoked = on_revoked

    def assign(self, partitions: frozenset[int]) -> None:
        """Note an assignment."""
        self.events.append(("assigned", sorted(partitions)))
        self.told.set()

    async def revoke(self, partitions: frozenset[int]) -> None:
        """Note a revocation, and do what the test wants done."""
        self.events.append(("revoked", sorted(partitions)))
        self.told.set()
        if self._on_revoked is not None:
            await self._on_revoked(self)

    async def until(self, count: int) -> list[tuple[str, list[int]]]:
        """Wait until *count* events were told, and return all."""
        async with asyncio.timeout(60):
            while len(self.events) < count:
                self.told.clear()
                await self.told.wait()
        return self.events


async def join(
    transport: MemoryTransport, on_revoked: Callable[[Member], Awaitable[object]] | None = None
) -> Member:
    """Join the group of *transport*, without waiting for partitions."""
    member = Member(on_revoked)
    member.subscription = await transport.subscribe(
        TOPIC, on_assigned=member.assign, on_revoked=member.revoke
    )
    return member


# The cluster


def test_other_servers_are_refused() -> None:
    """Only memory:// leads here."""
    settings = BrokerSettings(module=GROUP, bootstrap_servers="localhost:9092")
    with pytest.raises(ConfigurationError, match="memory://"):
        MemoryTransport(settings)


@pytest.mark.parametrize("other", [cluster, MemoryCluster])
async def test_one_name_is_one_cluster(
    name: str, transport: MemoryTransport, other: Callable[[str], MemoryCluster]
) -> None:
    """Whoever uses a name sees the same log, also after the transport that wrote it stopped."""
    await send(transport, b"v")
    await transport.stop()
    assert [b"v"] == values(other(name).records(TOPIC))


async def test_other_names_are_other_clusters(transport: MemoryTransport) -> None:
    """A topic exists in its own cluster only."""
    other = await started(uuid4().hex)
    assert (2, 0) == (await transport.partitions(TOPIC), await other.partitions(TOPIC))


async def test_the_log_outlives_the_loop(name: str) -> None:
    """What one event loop wrote, another reads later."""

    async def write() -> None:
        transport = await started(name)
        await transport.create_topics([TopicSpec(TOPIC, 1)])
        await send(transport, b"v")

    await asyncio.to_thread(asyncio.run, write())
    reader = await (await started(name)).read(TOPIC, 0, 0)
    assert [b"v"] == values(await fetched(reader, 1))


async def test_records_come_by_partition(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """A test sees all records of a topic, partition by partition."""
    await send(transport, b"1", partition=1)
    await send(transport, b"0", b"0", partition=0)
    seen = [(record.partition, record.offset, record.value) for record in kafka.records(TOPIC)]
    assert [(0, 0, b"0"), (0, 1, b"0"), (1, 0, b"1")] == seen


def test_a_missing_topic_has_no_records(kafka: MemoryCluster) -> None:
    """Looking at a missing topic shows nothing."""
    assert [] == kafka.records("missing")


async def test_append_injects_a_raw_record(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """An injected record reaches an open reader as it is, null header included."""
    reader = await transport.read(TOPIC, 1)
    offset = kafka.append(TOPIC, partition=1, key=b"k", value=b"\xff", headers=[("h", None)])
    (record,) = await fetched(reader, 1)
    assert (0, 1, 0) == (offset, record.partition, record.offset)
    assert (b"k", b"\xff", (("h", None),)) == (record.key, record.value, record.headers)


@pytest.mark.parametrize(("topic", "partition"), [("missing", 0), (TOPIC, 2), (TOPIC, -1)])
async def test_nothing_springs_into_being(
    kafka: MemoryCluster, transport: MemoryTransport, topic: str, partition: int
) -> None:
    """What does not exist can be neither read nor appended to; the error names it."""
    with pytest.raises(BrokerUnavailableError, match=f"{topic}.*does not exist"):
        await transport.read(topic, partition)
    with pytest.raises(BrokerUnavailableError, match=f"{topic}.*does not exist"):
        kafka.append(topic, partition=partition)
    with pytest.raises(DeliveryError, match=f"{topic}.*does not exist") as caught:
        await send(transport, b"v", topic=topic, partition=partition)
    assert caught.value.retriable
    assert [] == kafka.records(topic)


async def test_a_missing_topic_cannot_be_subscribed_to(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A subscription to a missing topic is refused, and nobody joins."""
    member = Member(None)
    with pytest.raises(BrokerUnavailableError, match="'missing' does not exist"):
        await transport.subscribe("missing", on_assigned=member.assign, on_revoked=member.revoke)
    assert 0 == kafka.members(GROUP)


# Faults of sends


async def test_a_failed_send_is_not_appended(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """As many sends as asked for end in the given error and leave nothing behind."""
    kafka.fail_sends(TOPIC, DeliveryError(TOPIC, "too large"), count=2)
    outcomes = await asyncio.gather(
        *(send(transport, b"%d" % number) for number in range(3)), return_exceptions=True
    )
    assert [True, True, False] == [isinstance(outcome, DeliveryError) for outcome in outcomes]
    assert [b"2"] == values(kafka.records(TOPIC))


async def test_a_lost_acknowledgement_is_appended(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A send of unknown outcome is in the log although the sender got an error."""
    kafka.fail_sends(TOPIC, DeliveryUnknownError(TOPIC, "lost"))
    with pytest.raises(DeliveryUnknownError):
        await send(transport, b"v")
    assert [b"v"] == values(kafka.records(TOPIC))


async def test_faults_belong_to_a_topic(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """Sends to other topics do not fail."""
    kafka.fail_sends("other", DeliveryError("other", "no"))
    assert 0 == (await send(transport, b"v")).offset


async def test_held_sends_can_be_read(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """While sends are held their records are readable, and nobody is told that they are."""
    reader = await transport.read(TOPIC, 0)
    with kafka.hold_sends(TOPIC):
        future = send(transport, b"v")
        assert [b"v"] == values(await fetched(reader, 1))
        assert not future.done()
    async with asyncio.timeout(5):
        assert 0 == (await future).offset


async def test_holds_nest(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """Sends are acknowledged when the last hold ends, and at once afterwards."""
    reader = await transport.read(TOPIC, 0)
    with kafka.hold_sends(TOPIC):
        with kafka.hold_sends(TOPIC):
            future = send(transport, b"1")
        await fetched(reader, 1)
        assert not future.done()
    async with asyncio.timeout(5):
        await future
        await send(transport, b"2")


async def test_a_hold_belongs_to_a_topic(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """Sends to other topics are not held."""
    with kafka.hold_sends("other"):
        async with asyncio.timeout(5):
            await send(transport, b"v")


@VIRTUAL
async def test_delayed_sends(
    kafka: MemoryCluster, transport: MemoryTransport, looptime: Any
) -> None:
    """A delayed send is acknowledged that much later; 0 ends the delay."""
    kafka.delay_sends(TOPIC, 3.0)
    await send(transport, b"1")
    kafka.delay_sends(TOPIC, 0)
    await send(transport, b"2")
    assert 3 == looptime


async def test_a_cancelled_send_is_no_harm(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """The answer to a send that nobody waits for any more is dropped."""
    with kafka.hold_sends(TOPIC):
        send(transport, b"1").cancel()
    assert 1 == (await send(transport, b"2")).offset


async def test_stop_ends_held_sends(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """A send that was not acknowledged before the stop ends as unknown."""
    with kafka.hold_sends(TOPIC):
        future = send(transport, b"v")
        await transport.stop()
        async with asyncio.timeout(5):
            with pytest.raises(DeliveryUnknownError):
                await future


# Down and up


def _calls(transport: MemoryTransport) -> dict[str, Callable[[], Awaitable[object]]]:
    return {
        "start": transport.start,
        "partitions": lambda: transport.partitions(TOPIC),
        "create": lambda: transport.create_topics([TopicSpec("new", 1)]),
        "read": lambda: transport.read(TOPIC, 0),
        "subscribe": lambda: join(transport),
    }


@pytest.mark.parametrize("call", ["start", "partitions", "create", "read", "subscribe"])
async def test_a_cluster_that_is_down_answers_nobody(
    kafka: MemoryCluster, transport: MemoryTransport, call: str
) -> None:
    """Every call fails while the cluster is down, and works again when it is up."""
    kafka.down()
    with pytest.raises(BrokerUnavailableError):
        await _calls(transport)[call]()
    kafka.up()
    await _calls(transport)[call]()


@pytest.mark.parametrize("call", ["partitions", "create", "read", "subscribe"])
async def test_a_transport_that_stopped_answers_nobody(
    transport: MemoryTransport, call: str
) -> None:
    """Every call fails after the stop."""
    await transport.stop()
    with pytest.raises(BrokerUnavailableError):
        await _calls(transport)[call]()


async def test_sends_wait_until_the_cluster_is_up(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """Sends stay open while the cluster is down, and are appended in order when it is up."""
    kafka.down()
    futures = [send(transport, b"1"), send(transport, b"2")]
    assert [] == kafka.records(TOPIC)
    kafka.up()
    async with asyncio.timeout(5):
        assert [0, 1] == [(await future).offset for future in futures]
    assert [b"1", b"2"] == values(kafka.records(TOPIC))


async def test_what_ended_while_down_is_not_appended(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A send that was cancelled or stopped while the cluster was down never reaches it."""
    kafka.down()
    send(transport, b"cancelled").cancel()
    future = send(transport, b"stopped")
    await transport.stop()
    kafka.up()
    async with asyncio.timeout(5):
        with pytest.raises(DeliveryUnknownError):
            await future
    assert [] == kafka.records(TOPIC)


@VIRTUAL
async def test_nothing_is_fetched_while_down(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A fetch is empty while the cluster is down; up() lets one that waits go on."""
    reader = await transport.read(TOPIC, 0)
    kafka.append(TOPIC, value=b"v")
    kafka.down()
    assert [] == list(await reader.fetch())
    asyncio.get_running_loop().call_later(0.2, kafka.up)
    assert [b"v"] == values(await reader.fetch())


async def test_no_commit_while_down(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """A commit fails while the cluster is down."""
    member = await join(transport)
    await member.until(1)
    kafka.down()
    with pytest.raises(BrokerUnavailableError):
        await member.subscription.commit({0: 0})
    assert {} == kafka.committed(GROUP, TOPIC)


async def test_creating_can_be_denied(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """A denied topic comes with the command that creates it; one that exists is no problem."""
    kafka.deny_create()
    await transport.create_topics([TopicSpec(TOPIC, 2)])
    with pytest.raises(BrokerUnavailableError, match="--create --topic new --partitions 3"):
        await transport.create_topics([TopicSpec("new", 3)])
    assert 0 == await transport.partitions("new")


async def test_broken_readers_must_be_reopened(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """Open readers and subscriptions of the topic break, also in a fetch; new ones do not."""
    member, reader = await join(transport), await transport.read(TOPIC, 0, 0)
    fetches = [asyncio.create_task(each.fetch()) for each in (reader, member.subscription)]
    await member.until(1)
    kafka.break_readers(TOPIC)
    for fetch in fetches:
        with pytest.raises(BrokerUnavailableError, match=TOPIC):
            await fetch
    kafka.append(TOPIC, value=b"v")
    assert [b"v"] == values(await fetched(await transport.read(TOPIC, 0, 0), 1))


# Fetching and time


@VIRTUAL
async def test_fetch_waits_half_a_second(transport: MemoryTransport, looptime: Any) -> None:
    """In silence a fetch takes half a second of the loop's time."""
    reader = await transport.read(TOPIC, 0)
    assert [] == list(await reader.fetch())
    assert 0.5 == looptime


@VIRTUAL
async def test_now_moves_with_the_loop(name: str, transport: MemoryTransport) -> None:
    """Now is the wall clock plus the virtual time that passed, the same for every transport."""
    first = transport.now()
    await asyncio.sleep(1000)
    later = await started(name)
    assert pytest.approx(time.time(), abs=60) == first
    assert pytest.approx(first + 1000, abs=0.001) == transport.now()
    assert transport.now() == later.now()


@VIRTUAL
async def test_timestamps_move_with_the_loop(transport: MemoryTransport) -> None:
    """Records carry the time of their sender's clock in milliseconds."""
    await asyncio.sleep(1000)
    appended = await send(transport, b"v")
    assert int(transport.now() * 1000) == appended.timestamp


def test_now_without_a_loop(name: str) -> None:
    """Before there is a loop, now is the wall clock."""
    assert pytest.approx(time.time(), abs=1) == build(name).now()


async def test_fetch_returns_500_at_most(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """A backlog comes in pieces, and a busy partition leaves room for the other."""
    for number in range(1200):
        kafka.append(TOPIC, value=b"%d" % number)
    kafka.append(TOPIC, partition=1, value=b"other")
    member = await join(transport)
    pieces = [await fetched(member.subscription, 1) for _ in range(3)]
    assert [500, 500, 201] == [len(piece) for piece in pieces]
    assert b"other" in values(pieces[0] + pieces[1])


async def test_a_backlog_does_not_block_the_loop(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A fetch that need not wait still lets others run."""
    kafka.append(TOPIC, value=b"v")
    ran = asyncio.Event()
    reader = await transport.read(TOPIC, 0, 0)
    asyncio.get_running_loop().call_soon(ran.set)
    await reader.fetch()
    assert ran.is_set()


@VIRTUAL
@pytest.mark.parametrize("append_first", [True, False])
async def test_a_cancelled_fetch_keeps_its_position(
    kafka: MemoryCluster, transport: MemoryTransport, *, append_first: bool
) -> None:
    """A record that arrives while its fetch is cancelled is there for the next fetch."""
    reader = await transport.read(TOPIC, 0)
    fetch = asyncio.create_task(reader.fetch())
    await asyncio.wait({fetch}, timeout=0.1)
    if append_first:
        kafka.append(TOPIC, value=b"v")
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    if not append_first:
        kafka.append(TOPIC, value=b"v")
    assert [b"v"] == values(await reader.fetch())


@VIRTUAL
async def test_fetches_leave_nothing_behind(transport: MemoryTransport) -> None:
    """No future survives the fetches that were cancelled or found nothing."""
    reader = await transport.read(TOPIC, 0)
    before = futures()
    for timeout in (0.1, 0.2, 1.0, 1.0):
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await reader.fetch()
    await asyncio.sleep(0)  # the call that ended the last fetch holds its future until then
    assert before == futures()


def futures() -> int:
    """Return how many futures there are in this process, tasks not counted."""
    gc.collect()
    return sum(type(thing) is asyncio.Future for thing in gc.get_objects())


async def test_close_ends_a_fetch(transport: MemoryTransport) -> None:
    """A fetch that waits is told when its reader is closed."""
    reader = await transport.read(TOPIC, 0)
    fetch = asyncio.create_task(reader.fetch())
    await reader.close()
    with pytest.raises(BrokerUnavailableError, match="closed"):
        await fetch


# Consumer groups


async def test_partitions_go_in_ranges_by_member_id(
    name: str, transport: MemoryTransport, kafka: MemoryCluster
) -> None:
    """The first members in the order of their ids get one partition more."""
    await transport.create_topics([TopicSpec("wide", 5)])
    members = [Member(None), Member(None)]
    for instance, member in zip("ba", members, strict=True):
        await (await started(name, instance=instance)).subscribe(
            "wide", on_assigned=member.assign, on_revoked=member.revoke
        )
    b, a = members
    assert [("assigned", [0, 1, 2])] == await a.until(1)
    assert [
        ("assigned", [0, 1, 2, 3, 4]),
        ("revoked", [0, 1, 2, 3, 4]),
        ("assigned", [3, 4]),
    ] == await b.until(3)
    assert 2 == kafka.members(GROUP)


async def test_a_rebalance_on_demand(kafka: MemoryCluster, transport: MemoryTransport) -> None:
    """Partitions are given up and come back; reading goes on where the group has committed."""
    for number in range(3):
        kafka.append(TOPIC, value=b"%d" % number)
    member = await join(transport)
    await fetched(member.subscription, 3)
    await member.subscription.commit({0: 1})
    kafka.rebalance(GROUP)
    everything = [("assigned", [0, 1]), ("revoked", [0, 1]), ("assigned", [0, 1])]
    assert everything == await member.until(3)
    assert [b"1", b"2"] == values(await fetched(member.subscription, 2))
    assert {0: 1} == kafka.committed(GROUP, TOPIC)


async def test_a_rebalance_of_nobody(kafka: MemoryCluster) -> None:
    """A group without members has nothing to rebalance."""
    kafka.rebalance(GROUP)
    assert 0 == kafka.members(GROUP)


async def test_a_commit_past_the_end_starts_over(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A committed offset that is not in the log counts as the earliest."""
    kafka.append(TOPIC, value=b"v")
    member = await join(transport)
    await member.until(1)
    await member.subscription.commit({0: 1000})
    kafka.rebalance(GROUP)
    await member.until(3)
    assert [b"v"] == values(await fetched(member.subscription, 1))


@VIRTUAL
@pytest.mark.parametrize("events_before", [0, 1])
async def test_nothing_is_fetched_while_giving_up(
    kafka: MemoryCluster, transport: MemoryTransport, events_before: int
) -> None:
    """From the beginning of a rebalance to its end, however early it comes, nothing is fetched."""
    go_on = asyncio.Event()
    member = await join(transport, lambda _: go_on.wait())
    await member.until(events_before)
    kafka.append(TOPIC, value=b"v")
    kafka.rebalance(GROUP)
    assert [] == list(await member.subscription.fetch())
    assert [("assigned", [0, 1]), ("revoked", [0, 1])] == member.events
    go_on.set()
    assert [b"v"] == values(await member.subscription.fetch())


@VIRTUAL
async def test_a_slow_member_is_given_up_and_joins_again(
    name: str, kafka: MemoryCluster, transport: MemoryTransport, looptime: Any
) -> None:
    """After rebalance_timeout a member is gone and may not commit; later it is back."""
    answers: list[bool] = []

    async def dawdle(member: Member) -> None:
        if not answers:
            await asyncio.sleep(10)
            answers.append(await member.subscription.commit({0: 1}))

    slow = await join(await started(name, rebalance_timeout=4.0), dawdle)
    await slow.until(1)
    fast = await join(transport)
    assert [("assigned", [0, 1])] == await fast.until(1)
    assert (4, 1) == (looptime, kafka.members(GROUP))
    assert ("assigned", [0]) == (await slow.until(3))[-1]
    assert (10, 2, [False]) == (looptime, kafka.members(GROUP), answers)


@VIRTUAL
@pytest.mark.parametrize(("seconds", "committed"), [(2, {0: 1}), (60, {})])
async def test_close_lets_a_rebalance_end(
    kafka: MemoryCluster, transport: MemoryTransport, seconds: float, committed: dict[int, int]
) -> None:
    """A member that closes while it gives up may finish, but only within three seconds."""

    async def dawdle(member: Member) -> None:
        await asyncio.sleep(seconds)
        await member.subscription.commit({0: 1})

    member = await join(transport, dawdle)
    await member.until(1)
    kafka.rebalance(GROUP)
    await member.until(2)
    async with asyncio.timeout(3.5):
        await member.subscription.close()
    assert (committed, 0) == (kafka.committed(GROUP, TOPIC), kafka.members(GROUP))
    assert {asyncio.current_task()} == asyncio.all_tasks()


async def test_expelled_members_join_again(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """Each member is told once of its loss, and afterwards all of them share the partitions."""
    members = []
    for expected in (["01"], ["0", "1"], ["0", "1", ""]):
        members.append(await join(transport))
        await until_shared(members, expected)
    before = [len(member.events) for member in members]
    kafka.expel(GROUP)
    assert 1 == kafka.members(GROUP)  # who had no partitions is back at once
    await members[0].until(before[0] + 2)
    await members[1].until(before[1] + 2)
    losses = [member.events[count] for member, count in zip(members, before, strict=True)]
    assert [("revoked", [0]), ("revoked", [1]), ("assigned", [0, 1])] == losses
    await until_shared(members, ["0", "1", ""])


async def until_shared(members: Sequence[Member], expected: list[str]) -> None:
    """Wait until the members were told last of just these partitions, one string for each."""

    def told(member: Member) -> tuple[str, str]:
        kind, partitions = member.events[-1] if member.events else ("", [])
        return kind, "".join(map(str, partitions))

    async with asyncio.timeout(5):
        while [("assigned", partitions) for partitions in expected] != [*map(told, members)]:
            for member in members:
                member.told.clear()
            waits = [asyncio.ensure_future(member.told.wait()) for member in members]
            _, others = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in others:
                wait.cancel()


@VIRTUAL
async def test_who_is_expelled_while_it_gives_up_is_told_once(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A rebalance that is cut short by lost sessions ends with everyone back."""
    go_on = asyncio.Event()
    answers: list[bool] = []

    async def wait(member: Member) -> None:
        await go_on.wait()
        answers.append(await member.subscription.commit({0: 1}))

    slow = await join(transport, wait)
    await slow.until(1)
    quick = await join(transport)
    await slow.until(2)
    kafka.expel(GROUP)
    assert [("assigned", [0, 1])] == await quick.until(1)
    go_on.set()
    told = [("assigned", [0, 1]), ("revoked", [0, 1]), ("assigned", [0])]
    assert (told, [False]) == (await slow.until(3), answers)
    assert [("revoked", [0, 1]), ("assigned", [1])] == (await quick.until(3))[1:]


async def test_a_commit_under_way_is_not_made_in_the_next_assignment(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A commit that began before its partitions were given up is refused when they are back."""
    commits: list[asyncio.Task[bool]] = []

    async def begin(member: Member) -> None:
        commits.append(asyncio.create_task(member.subscription.commit({0: 1})))
        await asyncio.sleep(0)

    member = await join(transport, begin)
    await member.until(1)
    kafka.rebalance(GROUP)
    await member.until(3)
    assert ([False], {}) == (await asyncio.gather(*commits), kafka.committed(GROUP, TOPIC))


async def test_who_waits_for_others_is_expelled_too(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A member that has given up, and waits for one that has not, is back at once."""
    go_on = asyncio.Event()
    members = [await join(transport, lambda _: go_on.wait()), await join(transport)]
    go_on.set()
    await members[1].until(1)
    go_on.clear()
    kafka.rebalance(GROUP)
    await members[1].until(2)
    assert await members[1].subscription.commit({1: 1}) is False
    kafka.expel(GROUP)
    assert 1 == kafka.members(GROUP)
    go_on.set()
    await until_shared(members, ["0", "1"])


async def test_a_closed_member_does_not_come_back(
    kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """Who leaves while it is told of its loss stays away."""
    member = await join(transport)
    await member.until(1)
    kafka.expel(GROUP)
    await member.subscription.close()
    assert 0 == kafka.members(GROUP)


async def test_leaving_while_others_give_up(transport: MemoryTransport) -> None:
    """A member that leaves during a rebalance is not waited for."""
    go_on = asyncio.Event()
    first = await join(transport, lambda _: go_on.wait())
    await first.until(1)
    second, third = await join(transport), await join(transport)
    await second.subscription.close()
    go_on.set()
    assert ("assigned", [1]) == (await third.until(1))[-1]
    assert [] == second.events


@pytest.mark.parametrize("callback", ["on_assigned", "on_revoked"])
async def test_errors_of_callbacks_are_logged(
    kafka: MemoryCluster,
    transport: MemoryTransport,
    caplog: pytest.LogCaptureFixture,
    callback: str,
) -> None:
    """A callback that raises is logged, and the group goes on."""

    def fail(_: frozenset[int]) -> None:
        raise ZeroDivisionError

    async def fail_later(partitions: frozenset[int]) -> None:
        fail(partitions)

    member = Member(None)
    subscription = await transport.subscribe(
        TOPIC,
        on_assigned=fail if callback == "on_assigned" else member.assign,
        on_revoked=fail_later if callback == "on_revoked" else member.revoke,
    )
    kafka.append(TOPIC, value=b"v")
    await fetched(subscription, 1)
    kafka.rebalance(GROUP)
    assert [b"v"] == values(await fetched(subscription, 1))
    assert {"ZeroDivisionError"} == {
        record.exc_info[0].__name__
        for record in caplog.records
        if record.exc_info and record.exc_info[0]
    }


# Other threads and loops


class SlowLoop(asyncio.SelectorEventLoop):
    """A loop where the half second of a fetch takes the better part of a minute."""

    def time(self) -> float:
        """Return a hundredth of the time that passed."""
        return super().time() / 100


async def test_a_record_wakes_a_reader_in_another_loop(
    name: str, transport: MemoryTransport
) -> None:
    """A fetch that waits in another thread returns what is sent here, at once."""
    loop, opened = asyncio.get_running_loop(), asyncio.Event()

    async def read() -> list[bytes | None]:
        reader = await (await started(name)).read(TOPIC, 0)
        loop.call_soon_threadsafe(opened.set)
        return values(await reader.fetch())

    def run() -> list[bytes | None]:
        with asyncio.Runner(loop_factory=SlowLoop) as runner:
            return runner.run(read())

    async with asyncio.timeout(10):
        reading = asyncio.create_task(asyncio.to_thread(run))
        await opened.wait()
        await send(transport, b"v")
        assert [b"v"] == await reading


@pytest.mark.usefixtures("transport")
async def test_a_hold_answers_in_the_loop_of_the_sender(name: str, kafka: MemoryCluster) -> None:
    """A send of another thread ends there when the hold is ended here."""
    loop, sent = asyncio.get_running_loop(), asyncio.Event()

    async def write() -> int:
        future = send(await started(name), b"v")
        loop.call_soon_threadsafe(sent.set)
        async with asyncio.timeout(5):
            return (await future).offset

    with kafka.hold_sends(TOPIC):
        writing = asyncio.create_task(asyncio.to_thread(asyncio.run, write()))
        await sent.wait()
        assert [b"v"] == values(kafka.records(TOPIC))
        assert not writing.done()
    assert 0 == await writing


async def test_members_in_two_loops_share(
    name: str, kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """A member in another thread takes its part, and gives it back when it leaves."""
    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    told: list[tuple[str, list[int]]] = []

    async def visit() -> None:
        member = await join(await started(name))
        told.extend(await member.until(1))
        await member.subscription.close()
        loop.call_soon_threadsafe(leave.set)

    here = await join(transport)
    await here.until(1)
    await asyncio.to_thread(asyncio.run, visit())
    await leave.wait()
    assert ("assigned", [0, 1]) == (await here.until(5))[-1]
    assert [("assigned", [1])] == told
    assert 1 == kafka.members(GROUP)


@pytest.mark.parametrize("joined_before", [True, False])
async def test_a_dead_loop_is_not_waited_for(
    name: str, kafka: MemoryCluster, transport: MemoryTransport, *, joined_before: bool
) -> None:
    """The partitions of a member whose loop ended without a close go to the others."""

    async def die() -> None:
        member = await join(await started(name))
        await member.until(1)

    here = await join(transport) if joined_before else None
    await asyncio.to_thread(asyncio.run, die())
    here = here or await join(transport)
    kafka.append(TOPIC, partition=0, value=b"v")
    kafka.append(TOPIC, partition=1, value=b"v")
    assert 2 == len(await fetched(here.subscription, 2))
    assert ("assigned", [0, 1]) == here.events[-1]
    assert 1 == kafka.members(GROUP)


async def test_what_a_dead_loop_left_open_is_no_harm(
    name: str, kafka: MemoryCluster, transport: MemoryTransport
) -> None:
    """Open fetches and sends of a loop that was closed neither fail nor block anybody."""
    abandoned: list[asyncio.Future[Appended]] = []
    loop = asyncio.new_event_loop()

    async def leave_open() -> asyncio.Task[Sequence[Record]]:
        other = await started(name)
        reader = await other.read(TOPIC, 1)
        abandoned.append(send(other, b"held"))
        kafka.down()
        abandoned.append(send(other, b"never sent"))
        fetch = asyncio.create_task(reader.fetch())
        await asyncio.wait({fetch}, timeout=0.05)
        return fetch

    with kafka.hold_sends(TOPIC):
        fetch = await asyncio.to_thread(loop.run_until_complete, leave_open())
        loop.close()
    kafka.up()
    await send(transport, b"v", partition=1)
    assert [b"held", b"v"] == values(kafka.records(TOPIC))
    assert [False, False, False] == [*(future.done() for future in abandoned), fetch.done()]
