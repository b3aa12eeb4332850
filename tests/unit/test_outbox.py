"""The outbox: what is produced leaves it in order, in batches, and always comes to an end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_broker._delivery import Delivery, murmur2
from kafka_broker._metrics import Counted, Metrics
from kafka_broker._outbox import BATCH_BYTES, Outbox
from kafka_broker._transport import Appended, Outgoing
from kafka_broker.errors import (
    BrokerClosedError,
    BrokerUnavailableError,
    DeliveryError,
    DeliveryUnknownError,
    OutboxFullError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kafka_broker._transport import Transport

virtual = pytest.mark.looptime


class Counts(Metrics):
    """Metrics that a test can look at."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()

    def count(self, what: Counted, amount: int = 1) -> None:
        self.counted[what] += amount


@dataclass
class Sent:
    """One batch that the outbox has handed over; the test decides what becomes of it."""

    topic: str
    partition: int
    records: list[Outgoing]
    time: float
    future: asyncio.Future[Appended]

    @property
    def values(self) -> list[bytes | None]:
        return [record.value for record in self.records]


class FakeKafka:
    """As much of a transport as an outbox needs.

    Args:
        automatic: acknowledge every batch at once.
        topics: partitions by topic; an error instead of a number is raised.
    """

    def __init__(self, *, automatic: bool = False, **topics: int | Exception) -> None:
        self.automatic = automatic
        self.topics: dict[str, int | Exception] = dict(topics)
        self.batches: list[Sent] = []
        self.asked: list[str] = []
        self.log: defaultdict[tuple[str, int], list[Outgoing]] = defaultdict(list)
        self._changed = asyncio.Event()

    async def partitions(self, topic: str) -> int:
        self.asked.append(topic)
        count = self.topics.get(topic, 0)
        if isinstance(count, Exception):
            raise count
        return count

    def send(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> asyncio.Future[Appended]:
        loop = asyncio.get_running_loop()
        batch = Sent(topic, partition, list(records), loop.time(), loop.create_future())
        open_before = [one for one in self.batches if not one.future.done()]
        assert (topic, partition) not in [(one.topic, one.partition) for one in open_before]
        self.batches.append(batch)
        self._changed.set()
        if self.automatic:
            self.acknowledge(batch)
        return batch.future

    def acknowledge(self, batch: Sent) -> None:
        log = self.log[batch.topic, batch.partition]
        batch.future.set_result(Appended(len(log), 1_500_000))
        log.extend(batch.records)

    async def batch(self, number: int) -> Sent:
        """Wait for the batch with this number, from 0."""
        while len(self.batches) <= number:
            self._changed.clear()
            await self._changed.wait()
        return self.batches[number]

    def values(self, topic: str = "Bank") -> list[bytes | None]:
        return [one.value for (name, _), log in self.log.items() if name == topic for one in log]


def outgoing(value: int | bytes, key: bytes | None = b"k") -> Outgoing:
    return Outgoing(key, value if isinstance(value, bytes) else b"%d" % value, ())


def new_outbox(
    kafka: FakeKafka | None = None,
    *,
    timeout: float = 30.0,
    max_events: int = 10_000,
    max_bytes: int = 1_000_000,
    metrics: Metrics | None = None,
) -> Outbox:
    """Return an outbox, opened when there is a Kafka."""
    outbox = Outbox(
        delivery_timeout=timeout,
        max_events=max_events,
        max_bytes=max_bytes,
        metrics=metrics or Metrics(),
    )
    if kafka is not None:
        outbox.open(cast("Transport", kafka))
    return outbox


def put(outbox: Outbox, *values: int, topic: str = "Bank", **how: Any) -> list[Delivery]:
    return [outbox.put(topic, outgoing(value), **how) for value in values]


async def ends(deliveries: Sequence[Delivery]) -> list[DeliveryError | None]:
    """Wait for deliveries; returns the error of each, None for those that went well."""
    outcomes: list[DeliveryError | None] = []
    for delivery in deliveries:
        try:
            await delivery
        except DeliveryError as exc:
            outcomes.append(exc)
        else:
            outcomes.append(None)
    return outcomes


def living_deliveries() -> int:
    gc.collect()
    return sum(type(one) is Delivery for one in gc.get_objects())


def remember(told: list[DeliveryError]) -> Callable[[DeliveryError], bool]:
    """Return an `on_failure` that keeps what it is told."""

    def on_failure(error: DeliveryError) -> bool:
        told.append(error)
        return True

    return on_failure


class Losses:
    """What the log says of lost events, without those that other tests have left."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        gc.collect()
        caplog.clear()
        self._caplog = caplog

    def logged(self) -> list[str]:
        gc.collect()
        return [one.getMessage() for one in self._caplog.records if one.levelno >= logging.ERROR]


@pytest.fixture
def losses(caplog: pytest.LogCaptureFixture) -> Losses:
    return Losses(caplog)


# Sending


@virtual
async def test_one_event_is_sent_at_once(looptime: Any) -> None:
    """Nothing waits for a batch to fill."""
    kafka = FakeKafka(Bank=1, automatic=True)
    delivery = await new_outbox(kafka).put("Bank", outgoing(1))
    assert ("Bank", 0, 0, 1500.0) == (
        delivery.topic,
        delivery.partition,
        delivery.offset,
        delivery.timestamp,
    )
    assert delivery.done()
    assert 0 == looptime


async def test_what_is_produced_meanwhile_travels_together() -> None:
    """While a batch is on its way the next one gathers; its events get their own offsets."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    put(outbox, 1)
    first = await kafka.batch(0)
    deliveries = put(outbox, 2, 3, 4)
    kafka.acknowledge(first)
    second = await kafka.batch(1)
    kafka.acknowledge(second)
    assert [None] * 3 == await ends(deliveries)
    assert ([b"1"], [b"2", b"3", b"4"]) == (first.values, second.values)
    assert [1, 2, 3] == [delivery.offset for delivery in deliveries]
    assert 2 == len(kafka.batches)


async def test_an_offset_that_kafka_does_not_tell() -> None:
    """Where Kafka has a batch and does not say where, no delivery gets an offset of another."""
    kafka = FakeKafka(Bank=1)
    deliveries = put(new_outbox(kafka), 1, 2, 3)
    (await kafka.batch(0)).future.set_result(Appended(-1, 1_500_000))
    assert [None] * 3 == await ends(deliveries)
    assert [(-1, 1500.0)] * 3 == [(each.offset, each.timestamp) for each in deliveries]


async def test_each_partition_has_its_own_batch_on_its_way() -> None:
    """A slow partition does not hold up the others, nor one topic the next."""
    kafka = FakeKafka(Bank=2, Shop=1)
    outbox = new_outbox(kafka)
    put(outbox, 1, 2, partition=0)
    put(outbox, 3, partition=1)
    put(outbox, 4, topic="Shop")
    await kafka.batch(2)
    expected = {("Bank", 0): [b"1", b"2"], ("Bank", 1): [b"3"], ("Shop", 0): [b"4"]}
    assert expected == {(one.topic, one.partition): one.values for one in kafka.batches}


async def test_a_batch_has_at_most_64_kib() -> None:
    """A big backlog leaves in several batches, in order."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox()
    values = [b"%02d" % number + b"x" * 20_000 for number in range(10)]
    deliveries = [outbox.put("Bank", outgoing(value)) for value in values]
    outbox.open(cast("Transport", kafka))
    assert [None] * 10 == await ends(deliveries)
    assert values == kafka.values()
    assert [3, 3, 3, 1] == [len(batch.records) for batch in kafka.batches]


async def test_an_event_bigger_than_a_batch_travels_alone() -> None:
    """It neither blocks the others nor takes them with it."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox()
    sizes = [1, 1, BATCH_BYTES * 2, 1, BATCH_BYTES * 2, BATCH_BYTES * 2]
    deliveries = [outbox.put("Bank", outgoing(b"x" * size)) for size in sizes]
    outbox.open(cast("Transport", kafka))
    await ends(deliveries)
    assert [2, 1, 1, 1, 1] == [len(batch.records) for batch in kafka.batches]


async def test_what_is_produced_before_the_start_is_sent_first() -> None:
    """It waits in its order, and what comes after the start is behind it."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox()
    deliveries = put(outbox, 1, 2)
    assert 2 == len(outbox)
    outbox.open(cast("Transport", kafka))
    deliveries += put(outbox, 3)
    await ends(deliveries)
    assert [b"1", b"2", b"3"] == kafka.values()
    assert 0 == len(outbox)


async def test_requests_get_our_address_and_other_events_do_not() -> None:
    """The address is known at the start only, so it is added when an event leaves."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox()
    record = Outgoing(b"k", b"v", (("own", b"1"),))
    deliveries = [outbox.put("Bank", record, addressed=True), outbox.put("Bank", record)]
    outbox.open(cast("Transport", kafka), [("address", b"here")])
    await ends(deliveries)
    first, second = kafka.log["Bank", 0]
    assert (("own", b"1"), ("address", b"here")) == tuple(first.headers)
    assert (("own", b"1"),) == tuple(second.headers)


def test_a_key_is_hashed_as_in_java() -> None:
    """The values are those of Kafka's own tests, without the sign."""
    known = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    assert {key: value & 0x7FFFFFFF for key, value in known.items()} == {
        key: murmur2(key) for key in known
    }


@given(st.binary(max_size=80), st.integers(1, 50))
def test_a_key_goes_to_the_partition_that_aiokafka_would_choose(key: bytes, count: int) -> None:
    """So events of a peer with the same key are in the same partition."""
    partitions = list(range(count))
    assert DefaultPartitioner()(key, partitions, partitions) == murmur2(key) % count


async def test_a_key_of_the_user_decides_the_partition() -> None:
    """By the hash of the Java client, whatever else is on its way."""
    kafka = FakeKafka(Bank=7, automatic=True)
    outbox = new_outbox(kafka)
    for key in (b"21", b"foobar", b"abc"):
        delivery = await outbox.put("Bank", outgoing(1, key), keyed=True)
        assert murmur2(key) % 7 == delivery.partition


async def test_one_correlation_id_stays_in_one_partition_and_many_spread() -> None:
    """The order of one conversation is kept; the work is shared."""
    kafka = FakeKafka(Bank=4, automatic=True)
    outbox = new_outbox(kafka)
    used = set()
    for number in range(50):
        same = [outbox.put("Bank", outgoing(1, b"id-%d" % number)) for _ in range(3)]
        await ends(same)
        assert 1 == len({delivery.partition for delivery in same})
        used.add(same[0].partition)
    assert {0, 1, 2, 3} == used


@virtual
@settings(max_examples=50, deadline=None)
@given(
    events=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60),
    fates=st.lists(st.sampled_from(["ok", "again", "later"]), max_size=40),
)
async def test_the_order_of_calls_is_the_order_per_key(
    events: list[tuple[int, bool]], fates: list[str]
) -> None:
    """Whatever fails and is tried again, each event is in the log once and in its order."""
    kafka = FakeKafka(Bank=3)
    outbox = new_outbox(kafka)
    deliveries = []
    fate = iter(fates)

    async def broker() -> None:
        number = 0
        while True:
            batch = await kafka.batch(number)
            number += 1
            todo = next(fate, "ok")
            if todo == "again":
                batch.future.set_exception(DeliveryError("Bank", "not now", retriable=True))
                continue
            if todo == "later":
                await asyncio.sleep(0.3)
            kafka.acknowledge(batch)

    running = asyncio.create_task(broker())
    for number, (key, pause) in enumerate(events):
        deliveries.append(outbox.put("Bank", outgoing(number, b"%d" % key)))
        if pause:
            await asyncio.sleep(0.01)
    assert [None] * len(events) == await ends(deliveries)
    running.cancel()
    for key in range(6):
        expected = [b"%d" % number for number, (one, _) in enumerate(events) if one == key]
        actual = [
            record.value
            for log in kafka.log.values()
            for record in log
            if record.key == b"%d" % key
        ]
        assert expected == actual


async def test_the_order_is_kept_while_a_topic_is_looked_up() -> None:
    """Nothing overtakes what waits for the number of partitions, in whichever turn it comes."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox(kafka)
    deliveries = []
    for number in range(20):
        deliveries += put(outbox, number)
        await asyncio.sleep(0)
    await ends(deliveries)
    assert [b"%d" % number for number in range(20)] == kafka.values()


# Threads and loops


async def test_worker_threads_may_produce() -> None:
    """Nothing is lost, and the events of one thread keep their order."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox(kafka)

    def work(thread: int) -> list[Delivery]:
        return [outbox.put("Bank", outgoing(b"%d:%d" % (thread, one))) for one in range(300)]

    batches = await asyncio.gather(*(asyncio.to_thread(work, thread) for thread in range(4)))
    for deliveries in batches:
        assert [None] * 300 == await ends(deliveries)
    values = [value for value in kafka.values() if value is not None]
    for thread in range(4):
        expected = [b"%d:%d" % (thread, one) for one in range(300)]
        assert expected == [value for value in values if value.startswith(b"%d:" % thread)]


async def test_another_event_loop_may_await_a_delivery() -> None:
    """It wakes up there, with the place in the log or with the error."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)

    async def produce(value: int) -> int | None:
        return (await outbox.put("Bank", outgoing(value))).offset

    well = asyncio.create_task(asyncio.to_thread(asyncio.run, produce(1)))
    kafka.acknowledge(await kafka.batch(0))
    assert 0 == await well
    ill = asyncio.create_task(asyncio.to_thread(asyncio.run, produce(2)))
    (await kafka.batch(1)).future.set_exception(DeliveryError("Bank", "too big"))
    with pytest.raises(DeliveryError, match="too big"):
        await ill


async def test_a_waiting_loop_that_is_gone_does_no_harm() -> None:
    """A delivery that was awaited in a loop that ended still ends well for the others."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    [delivery] = put(outbox, 1)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(delivery, 0.001)

    await asyncio.to_thread(asyncio.run, give_up())
    kafka.acknowledge(await kafka.batch(0))
    assert 0 == (await delivery).offset


@pytest.mark.parametrize("same_thread", [True, False])
def test_a_loop_that_was_closed_without_a_stop_refuses(same_thread: bool) -> None:  # noqa: FBT001
    """Nothing is taken that nobody can send; the error says why."""
    kept: list[Outbox] = []

    async def open_only() -> None:
        kept.append(new_outbox(FakeKafka(Bank=1)))

    asyncio.run(open_only())

    def produce() -> None:
        with pytest.raises(BrokerClosedError, match="loop of the broker was closed"):
            put(kept[0], 1)

    if same_thread:
        produce()
    else:
        thread = threading.Thread(target=produce)
        thread.start()
        thread.join()
    assert 0 == len(kept[0])


# Limits


async def test_a_full_outbox_refuses_at_once_and_takes_again_after() -> None:
    """Nothing of a refused event is taken."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka, max_events=3)
    deliveries = put(outbox, 1, 2, 3)
    with pytest.raises(OutboxFullError, match="outbox_events") as caught:
        put(outbox, 4)
    assert ("Bank", True, 3) == (caught.value.topic, caught.value.retriable, len(outbox))
    kafka.acknowledge(await kafka.batch(0))
    await ends(deliveries)
    deliveries = put(outbox, 5)
    kafka.acknowledge(await kafka.batch(1))
    await ends(deliveries)
    assert [b"1", b"2", b"3", b"5"] == kafka.values()


async def test_bytes_are_limited_too() -> None:
    """Keys, values and headers count, and the room comes back."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox(kafka, max_bytes=1000)
    record = Outgoing(b"k" * 100, b"v" * 300, (("h", b"x" * 100),))
    for _ in range(3):
        [delivery] = [outbox.put("Bank", record)]
        with pytest.raises(OutboxFullError, match="outbox_bytes"):
            outbox.put("Bank", record)
        await delivery


async def test_an_answer_is_taken_even_when_it_is_full() -> None:
    """What ends work must not be refused because of work."""
    outbox = new_outbox(FakeKafka(Bank=1, automatic=True), max_events=1, max_bytes=60)
    deliveries = put(outbox, 1)
    deliveries += put(outbox, 2, urgent=True)
    assert [None, None] == await ends(deliveries)


@virtual
async def test_a_failed_event_gives_its_room_back() -> None:
    """Whatever way an event ends, its room is free again."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka, max_events=1)
    for number, error in enumerate(
        [DeliveryError("Bank", "too big"), DeliveryUnknownError("Bank", "who knows")]
    ):
        deliveries = put(outbox, number)
        (await kafka.batch(number)).future.set_exception(error)
        assert [error] == await ends(deliveries)
    await ends(put(outbox, 1, topic="Nowhere"))
    [delivery] = put(outbox, 1, topic="Nowhere")
    assert outbox.withdraw(delivery) is not None
    assert 0 == len(outbox)
    put(outbox, 1)


# Ends


@virtual
async def test_an_event_that_was_never_sent_is_not_delivered(looptime: Any) -> None:
    """It may be produced again: it is surely not in the log."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka, timeout=5)
    sent, unsent = put(outbox, 1), []
    await kafka.batch(0)
    await asyncio.sleep(1)
    unsent = put(outbox, 2)
    [first] = await ends(sent)
    assert 5 == looptime
    assert isinstance(first, DeliveryUnknownError)
    [second] = await ends(unsent)
    assert 6 == looptime
    assert type(second) is DeliveryError
    assert (True, True) == (first.retriable, second.retriable)
    assert "5 s" in str(second)


@virtual
async def test_every_event_ends_in_its_own_time(looptime: Any) -> None:
    """Not when another one does: each partition has events on their way."""
    kafka = FakeKafka(Bank=2)
    outbox = new_outbox(kafka, timeout=5)
    first = put(outbox, 1, partition=0)
    await asyncio.sleep(1)
    second = put(outbox, 2, partition=1)
    await ends(first)
    assert 5 == looptime
    await ends(second)
    assert 6 == looptime


@virtual
async def test_a_late_acknowledgement_changes_nothing_and_the_lane_goes_on() -> None:
    """An event that has ended stays as it is; those behind it are sent."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka, timeout=5)
    [late] = put(outbox, 1)
    batch = await kafka.batch(0)
    [error] = await ends([late])
    behind = put(outbox, 2)
    kafka.acknowledge(batch)
    kafka.acknowledge(await kafka.batch(1))
    assert [None] == await ends(behind)
    assert late.offset is None
    assert [error] == await ends([late])


@virtual
async def test_a_late_failure_does_not_send_it_again() -> None:
    """What has ended as unknown is not tried again behind the user's back."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka, timeout=5)
    late = put(outbox, 1)
    batch = await kafka.batch(0)
    await ends(late)
    behind = put(outbox, 2)
    batch.future.set_exception(DeliveryError("Bank", "not now", retriable=True))
    second = await kafka.batch(1)
    kafka.acknowledge(second)
    assert [None] == await ends(behind)
    assert [b"2"] == second.values


@virtual
async def test_a_failure_that_may_pass_is_tried_again_in_order(looptime: Any) -> None:
    """The same events, before those that came meanwhile, after growing pauses."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    deliveries = put(outbox, 1, 2)
    first = await kafka.batch(0)
    deliveries += put(outbox, 3)
    await asyncio.sleep(0.5)
    first.future.set_exception(DeliveryError("Bank", "not now", retriable=True))
    for number in range(1, 7):
        batch = await kafka.batch(number)
        batch.future.set_exception(DeliveryError("Bank", "not now", retriable=True))
    last = await kafka.batch(7)
    kafka.acknowledge(last)
    assert [None] * 3 == await ends(deliveries)
    assert [b"1", b"2", b"3"] == last.values
    times = [batch.time for batch in kafka.batches]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pytest.approx([0.55, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]) == pauses
    assert pytest.approx(4.05) == looptime


@virtual
async def test_it_is_tried_until_its_time_is_over(looptime: Any) -> None:
    """Then the last reason is told; a success afterwards begins anew, without it."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka, timeout=5)
    deliveries = put(outbox, 1)

    async def refuse() -> None:
        number = 0
        while True:
            batch = await kafka.batch(number)
            batch.future.set_exception(DeliveryError("Bank", "not now", retriable=True))
            number += 1

    refusing = asyncio.create_task(refuse())
    [error] = await ends(deliveries)
    assert 5 == looptime
    assert type(error) is DeliveryError
    assert error.retriable
    assert "not now" in str(error)
    refusing.cancel()
    tries = len(kafka.batches)
    deliveries = put(outbox, 2)
    kafka.acknowledge(await kafka.batch(tries))
    assert [None] == await ends(deliveries)
    put(outbox, 3)
    await kafka.batch(tries + 1)
    [error] = await ends(put(outbox, 4))
    assert "not now" not in str(error)


@virtual
async def test_a_failure_for_good_fails_at_once_and_alone(looptime: Any) -> None:
    """The batch ends in it; the next batch is sent."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    bad = put(outbox, 1, 2)
    batch = await kafka.batch(0)
    good = put(outbox, 3)
    error = DeliveryError("Bank", "too big")
    batch.future.set_exception(error)
    kafka.acknowledge(await kafka.batch(1))
    assert [error, error] == await ends(bad)
    assert [None] == await ends(good)
    assert [b"3"] == kafka.values()
    assert 0 == looptime


async def test_an_unknown_outcome_is_not_tried_again() -> None:
    """Trying again might double it: the caller decides."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    deliveries = put(outbox, 1)
    error = DeliveryUnknownError("Bank", "who knows")
    (await kafka.batch(0)).future.set_exception(error)
    assert [error] == await ends(deliveries)
    assert 1 == len(kafka.batches)


async def test_a_bug_of_a_transport_ends_deliveries_too(caplog: pytest.LogCaptureFixture) -> None:
    """A foreign exception and a cancelled send mean an unknown outcome; the lane goes on."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    deliveries = put(outbox, 1)
    (await kafka.batch(0)).future.set_exception(ZeroDivisionError())
    [error] = await ends(deliveries)
    assert isinstance(error, DeliveryUnknownError)
    assert "ZeroDivisionError" in caplog.text
    deliveries = put(outbox, 2)
    (await kafka.batch(1)).future.cancel()
    [error] = await ends(deliveries)
    assert isinstance(error, DeliveryUnknownError)
    deliveries = put(outbox, 3)
    kafka.acknowledge(await kafka.batch(2))
    assert [None] == await ends(deliveries)


@virtual
async def test_an_unknown_topic_is_waited_for(looptime: Any) -> None:
    """The module may be deployed a moment later: nothing is lost and the order is kept."""
    kafka = FakeKafka(automatic=True)
    outbox = new_outbox(kafka)
    deliveries = put(outbox, 1, 2)
    await asyncio.sleep(3)
    kafka.topics["Bank"] = 2
    deliveries += put(outbox, 3)
    assert [None] * 3 == await ends(deliveries)
    assert [b"1", b"2", b"3"] == kafka.values()
    assert looptime < 4.1


@virtual
@pytest.mark.parametrize(
    ("answer", "reason"),
    [(0, "does not exist"), (BrokerUnavailableError("no permission: grant it"), "grant it")],
)
async def test_an_unknown_topic_fails_in_the_end(
    answer: int | Exception, reason: str, looptime: Any
) -> None:
    """The error tells why its partitions are not known, and producing again may succeed."""
    kafka = FakeKafka(Bank=answer)
    outbox = new_outbox(kafka, timeout=5)
    [error] = await ends(put(outbox, 1))
    assert 5 == looptime
    assert type(error) is DeliveryError
    assert error.retriable
    assert reason in str(error)


@virtual
async def test_a_partition_that_does_not_exist_fails_with_a_reason() -> None:
    """Only that event does; those behind it are delivered."""
    kafka = FakeKafka(Bank=2, automatic=True)
    outbox = new_outbox(kafka)
    for _ in range(2):  # the second time, the topic is known
        deliveries = [*put(outbox, 1, partition=5), *put(outbox, 2, partition=1)]
        bad, good = await ends(deliveries)
        assert type(bad) is DeliveryError
        assert "no partition 5, only 2" in str(bad)
        assert not bad.retriable
        assert good is None


@virtual
async def test_a_partition_that_is_new_is_found() -> None:
    """A topic may have grown since it was looked up."""
    kafka = FakeKafka(Bank=2, automatic=True)
    outbox = new_outbox(kafka)
    await ends(put(outbox, 1))
    kafka.topics["Bank"] = 6
    assert [None] == await ends(put(outbox, 2, partition=5))


@virtual
async def test_new_partitions_are_used_after_a_while() -> None:
    """The number of partitions is looked up again now and then, without holding up an event."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox(kafka)
    await ends(put(outbox, 1))
    kafka.topics["Bank"] = 50
    await asyncio.sleep(61)
    await ends(put(outbox, 2))
    deliveries = [outbox.put("Bank", outgoing(1, b"%d" % one)) for one in range(200)]
    await ends(deliveries)
    assert len({delivery.partition for delivery in deliveries}) > 40
    assert 2 == len(kafka.asked)


@virtual
async def test_an_event_that_is_of_no_use_any_more_is_not_sent(looptime: Any) -> None:
    """A request whose deadline has passed while it waited ends unsent."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    put(outbox, 1)
    first = await kafka.batch(0)
    useless = put(outbox, 2, useless_after=2.0)
    useful = put(outbox, 3, useless_after=20.0)
    await asyncio.sleep(3)
    kafka.acknowledge(first)
    kafka.acknowledge(await kafka.batch(1))
    [error] = await ends(useless)
    assert type(error) is DeliveryError
    assert "deadline" in str(error)
    assert [None] == await ends(useful)
    assert [b"1", b"3"] == kafka.values()
    assert 3 == looptime


# Giving up


@virtual
async def test_an_unsent_event_can_be_withdrawn(losses: Losses) -> None:
    """It is never sent, the reason why it was not is told, and nothing is logged."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    told: list[DeliveryError] = []
    put(outbox, 1)
    first = await kafka.batch(0)
    [delivery] = put(outbox, 2, on_failure=remember(told))
    behind = put(outbox, 3)
    await asyncio.sleep(1)
    error = outbox.withdraw(delivery)
    assert isinstance(error, DeliveryError)
    assert (True, "Bank") == (error.retriable, error.topic)
    assert delivery.done()
    assert outbox.withdraw(delivery) is None
    kafka.acknowledge(first)
    kafka.acknowledge(await kafka.batch(1))
    assert [None] == await ends(behind)
    assert [b"1", b"3"] == kafka.values()
    assert [] == told
    del delivery, error
    assert [] == losses.logged()


@virtual
async def test_withdrawing_tells_what_it_waited_for() -> None:
    """An unknown topic is another reason than a broker that was never started."""
    outbox = new_outbox()
    [delivery] = put(outbox, 1)
    assert "not started" in str(outbox.withdraw(delivery))
    kafka = FakeKafka(automatic=True)
    outbox.open(cast("Transport", kafka))
    [delivery] = put(outbox, 2, topic="Nowhere")
    await asyncio.sleep(1)
    assert "the topic does not exist" in str(outbox.withdraw(delivery))


async def test_what_was_sent_cannot_be_withdrawn() -> None:
    """It takes its course."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    [delivery] = put(outbox, 1)
    batch = await kafka.batch(0)
    assert outbox.withdraw(delivery) is None
    kafka.acknowledge(batch)
    assert 0 == (await delivery).offset
    assert outbox.withdraw(delivery) is None


@virtual
async def test_nobody_asks_for_a_topic_that_nobody_waits_for() -> None:
    """An event that is withdrawn before the first look leaves no task behind."""
    kafka = FakeKafka()
    outbox = new_outbox(kafka)
    for number in range(5):
        [delivery] = put(outbox, number, topic=f"t{number}")
        outbox.withdraw(delivery)
    await asyncio.sleep(100)
    assert 1 == len(asyncio.all_tasks())


async def test_a_cancelled_wait_leaves_the_delivery_alone() -> None:
    """It goes on, and can be awaited again."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    [delivery] = put(outbox, 1)

    async def wait() -> None:
        await delivery

    waiting = asyncio.create_task(wait())
    batch = await kafka.batch(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    kafka.acknowledge(batch)
    assert 0 == (await delivery).offset


@virtual
async def test_a_wait_before_the_start_ends_when_the_start_does_not_come(looptime: Any) -> None:
    """Nobody waits for ever for a broker that nobody started."""
    outbox = new_outbox(timeout=5)
    deliveries = put(outbox, 1, 2)
    first = await ends(deliveries[:1])
    assert 5 == looptime
    assert first[0] is not None
    assert "was not started within 5 s" in str(first[0])
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox.open(cast("Transport", kafka))
    assert [None] == await ends(deliveries[1:])
    assert [b"2"] == kafka.values()


# Flush, refuse, close


@virtual
async def test_flush_returns_when_everything_has_ended(looptime: Any) -> None:
    """Well or not; and at once when there is nothing."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    await outbox.flush(10)
    put(outbox, 1)
    asyncio.get_running_loop().call_later(
        2, lambda: kafka.batches[0].future.set_result(Appended(0, 0))
    )
    await outbox.flush(10)
    assert 2 == looptime
    assert 0 == len(outbox)


@virtual
async def test_flush_is_bounded(looptime: Any) -> None:
    """It says nothing about what is left; that goes on."""
    outbox = new_outbox(FakeKafka(Bank=1))
    put(outbox, 1)
    await outbox.flush(3)
    assert 3 == looptime
    assert 1 == len(outbox)


@virtual
async def test_several_may_flush_at_once(looptime: Any) -> None:
    """A rebalance and a stop may coincide: each returns when everything has ended."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    put(outbox, 1)
    asyncio.get_running_loop().call_later(
        2, lambda: kafka.batches[0].future.set_result(Appended(0, 0))
    )
    await asyncio.gather(outbox.flush(10), outbox.flush(1), outbox.flush(20))
    assert 2 == looptime


async def test_after_a_refusal_nothing_is_taken_and_the_rest_is_sent() -> None:
    """Even an answer is not; the error says why."""
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox(kafka)
    deliveries = put(outbox, 1)
    outbox.refuse("the broker was stopped")
    for urgent in (False, True):
        with pytest.raises(BrokerClosedError, match="the broker was stopped"):
            put(outbox, 2, urgent=urgent)
    assert [None] == await ends(deliveries)
    assert [b"1"] == kafka.values()


@virtual
async def test_close_ends_everything_that_is_pending() -> None:
    """What was on its way is unknown; what was not is not delivered, and may be produced again."""
    kafka = FakeKafka(Bank=1, Shop=1)
    outbox = new_outbox(kafka)
    on_its_way = put(outbox, 1)
    await kafka.batch(0)
    behind_it = put(outbox, 2)
    no_topic = put(outbox, 3, topic="Nowhere")
    resting = put(outbox, 4, topic="Shop")
    error = DeliveryError("Shop", "not now", retriable=True)
    (await kafka.batch(1)).future.set_exception(error)
    await asyncio.sleep(0.01)
    just_put = put(outbox, 5)
    outbox.refuse("the broker was stopped")
    outbox.close()
    [unknown] = await ends(on_its_way)
    assert isinstance(unknown, DeliveryUnknownError)
    for error_ in await ends([*behind_it, *no_topic, *resting, *just_put]):
        assert type(error_) is DeliveryError
        assert error_.retriable
        assert "stopped" in str(error_)
    assert 0 == len(outbox)
    kafka.acknowledge(kafka.batches[0])
    await asyncio.sleep(100)
    assert 2 == len(kafka.batches)
    assert 1 == len(asyncio.all_tasks())


async def test_closing_what_was_never_opened_ends_everything_too() -> None:
    """A start that failed leaves nobody waiting."""
    outbox = new_outbox()
    deliveries = put(outbox, 1, 2)
    outbox.refuse("the broker failed")
    outbox.close()
    assert [DeliveryError, DeliveryError] == [type(error) for error in await ends(deliveries)]
    outbox.close()


# Who gets to know


async def fail(
    kafka: FakeKafka, outbox: Outbox, on_failure: Callable[[DeliveryError], bool] | None = None
) -> list[Delivery]:
    """Produce an event that fails for good, after what was sent before."""
    number = len(kafka.batches)
    deliveries = put(outbox, 1, on_failure=on_failure)
    (await kafka.batch(number)).future.set_exception(DeliveryError("Bank", "too big"))
    await outbox.flush(10)
    return deliveries


async def test_a_failure_that_nobody_awaits_is_logged_once(losses: Losses) -> None:
    """Dropping a delivery is allowed, losing an event silently is not."""
    kafka = FakeKafka(Bank=1)
    await fail(kafka, new_outbox(kafka))
    [line] = losses.logged()
    assert "'Bank'" in line
    assert "too big" in line


async def test_a_failure_that_is_awaited_is_not_logged(losses: Losses) -> None:
    """Whoever got the exception knows."""
    kafka = FakeKafka(Bank=1)
    assert [None] != await ends(await fail(kafka, new_outbox(kafka)))
    assert [] == losses.logged()


@pytest.mark.parametrize("known", [True, False])
async def test_a_failure_that_somebody_else_got_to_know_is_not_logged(
    known: bool,  # noqa: FBT001
    losses: Losses,
) -> None:
    """A waiting `consume()` is told instead; when none waited, it is logged."""
    told: list[DeliveryError] = []

    def tell(error: DeliveryError) -> bool:
        told.append(error)
        return known

    kafka = FakeKafka(Bank=1)
    await fail(kafka, new_outbox(kafka), tell)
    [error] = told
    assert "too big" in str(error)
    assert (0 if known else 1) == len(losses.logged())


async def test_success_is_told_to_nobody(losses: Losses) -> None:
    """Neither `on_failure` nor the log hear of it."""
    told: list[DeliveryError] = []
    outbox = new_outbox(FakeKafka(Bank=1, automatic=True))
    await ends(put(outbox, 1, on_failure=remember(told)))
    assert [] == told
    assert [] == losses.logged()


@virtual
async def test_every_end_is_counted() -> None:
    """Delivered and undelivered events add up to what was put."""
    counts = Counts()
    kafka = FakeKafka(Bank=1, automatic=True)
    outbox = new_outbox(kafka, metrics=counts)
    await ends([*put(outbox, 1, 2, 3), *put(outbox, 4, topic="Nowhere")])
    assert {"events_delivered": 3, "events_undelivered": 1} == dict(counts.counted)


async def test_a_failure_shared_by_a_batch_keeps_a_short_traceback() -> None:
    """Each of a thousand tasks that await one failed batch shows its own frames only."""
    kafka = FakeKafka(Bank=1)
    outbox = new_outbox(kafka)
    deliveries = put(outbox, *range(50))
    (await kafka.batch(0)).future.set_exception(DeliveryError("Bank", "too big"))
    lengths = {len(traceback.extract_tb(e.__traceback__)) for e in await ends(deliveries) if e}
    assert max(lengths) < 5


# Nothing is left


async def test_deliveries_are_forgotten() -> None:
    """What has ended and was dropped takes no memory."""
    kafka = FakeKafka(Bank=3, automatic=True)
    outbox = new_outbox(kafka)
    before = living_deliveries()
    for number in range(500):
        outbox.put("Bank", outgoing(number, b"%d" % number))
    await outbox.flush(10)
    assert before == living_deliveries()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Silence the log of lost events, which keeps its records while a test runs."""
    logger = logging.getLogger("kafka_broker.outbox")
    logger.disabled = True
    yield
    logger.disabled = False


@virtual
@pytest.mark.usefixtures("quiet")
async def test_many_topics_may_come_and_go() -> None:
    """Names that never exist leave nothing behind: no task, no object."""
    outbox = new_outbox(FakeKafka(), timeout=5)

    async def produce_to(prefix: str) -> int:
        for number in range(200):
            put(outbox, number, topic=f"{prefix}{number}")
        await outbox.flush(100)
        await asyncio.sleep(10)
        gc.collect()
        return len(gc.get_objects())

    await produce_to("warm-up")
    before = await produce_to("first")
    for number in range(4):
        after = await produce_to(f"again{number}")
    assert after - before < 100
    assert 1 == len(asyncio.all_tasks())


def test_what_nobody_ever_sent_is_told_at_the_end() -> None:
    """A program that produces and never starts a broker hears of it, not of what had ended."""
    program = """
from kafka_broker._metrics import Metrics
from kafka_broker._outbox import Outbox
from kafka_broker._transport import Outgoing
outbox = Outbox(delivery_timeout=1, max_events=9, max_bytes=999, metrics=Metrics())
first, *_ = [outbox.put("Bank", Outgoing(b"k", b"hunter2", ())) for _ in range(3)]
outbox.withdraw(first)
"""
    done = subprocess.run(  # noqa: S603  # our own program
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = "2 events were produced and never sent: no broker was started\n"
    assert expected == done.stderr
