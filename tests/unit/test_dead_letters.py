"""Dead letters: reading all of them once, and sending one back to be handled again."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.test_dispatch import turns
from tests.unit.test_engine import Works, serves, until

from kafka_broker import BrokerManager, DeadLetter, EventObject, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker._transport import TopicSpec
from kafka_broker._transport.memory import MemoryTransport
from kafka_broker.errors import BrokerClosedError, BrokerUnavailableError

if TYPE_CHECKING:
    from kafka_broker._transport.memory_consumer import MemoryReader

virtual = pytest.mark.looptime
OWN = [("trace", b"1"), ("trace", None), (wire.CORRELATION_ID, b"\xff")]


class Sick(Works):
    """A service that fails until it is healed, in two tries for each event."""

    def __init__(self, **values: Any) -> None:
        super().__init__(retry=RetryPolicy(attempts=2, base=0.01, jitter=0), **values)
        self.healed = False
        self.tries: list[tuple[Any, int]] = []
        self.router.bind_event("heals")(self._heals)

    async def _heals(self, event: EventObject) -> None:
        self.tries.append((event.data, event.attempt))
        if not self.healed:
            raise LookupError

    def bury(self, *numbers: int, partition: int = 0) -> None:
        """Put letters into the topic as an engine would."""
        headers = [("kb-origin", b"Works:0:0"), ("kb-attempt", b"2"), ("kb-error", b"KeyError")]
        for number in numbers:
            value = json.dumps({"correlation_id": f"{number}", "event": "heals", "data": number})
            self.cluster.append(
                "Works.dlq", partition=partition, value=value.encode(), headers=headers
            )


async def _letters(broker: BrokerManager) -> list[DeadLetter]:
    return [letter async for letter in broker.dead_letters()]


def _data(letters: list[DeadLetter]) -> list[Any]:
    return [json.loads(letter.value or b"")["data"] for letter in letters]


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[MemoryReader]:
    """Every reader of a dead-letter topic that is opened."""
    opened: list[MemoryReader] = []
    read = MemoryTransport.read

    async def reading(self: MemoryTransport, topic: str, *more: Any) -> MemoryReader:
        reader = await read(self, topic, *more)
        if topic.endswith(".dlq"):
            opened.append(reader)
        return reader

    monkeypatch.setattr(MemoryTransport, "read", reading)
    return opened


# Reading


@virtual
async def test_all_that_is_there_comes_once(readers: list[MemoryReader]) -> None:
    """More than one fetch of them, in order; and then the loop ends, also when there is none."""
    sick = Sick()
    async with serves(sick) as broker:
        assert [] == await _letters(broker)
        sick.bury(*range(1200))
        assert [*range(1200)] == _data(await _letters(broker))
        assert [*range(1200)] == _data(await _letters(broker))
    assert all(reader.closed for reader in readers)


@virtual
async def test_what_comes_meanwhile_is_left_to_the_next_loop() -> None:
    """Otherwise one that replays what fails again would never end."""
    sick, seen = Sick(), list[DeadLetter]()
    async with serves(sick) as broker:
        sick.bury(1, 2)
        async for letter in broker.dead_letters():
            seen.append(letter)
            sick.bury(len(seen) + 2)
        assert [1, 2] == _data(seen)
        assert [1, 2, 3, 4] == _data(await _letters(broker))


@virtual
async def test_what_comes_as_the_loop_begins_is_left_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A letter that is in the same fetch as those before it is no different."""
    sick = Sick()
    read = MemoryTransport.read

    async def reading(self: MemoryTransport, topic: str, *place: Any) -> MemoryReader:
        if topic.endswith(".dlq") and place[1:] == (0,):
            sick.bury(3)
        return await read(self, topic, *place)

    async with serves(sick) as broker:
        sick.bury(1, 2)
        monkeypatch.setattr(MemoryTransport, "read", reading)
        assert [1, 2] == _data(await _letters(broker))
        assert [1, 2, 3] == _data(await _letters(broker))


@virtual
async def test_every_partition_is_read() -> None:
    """One after the other, though we make the topic with one."""
    sick = Sick()
    sick.cluster._node.create([TopicSpec("Works.dlq", 3)], "")
    async with serves(sick) as broker:
        sick.bury(1, 2, partition=2)
        sick.bury(3, partition=0)
        letters = await _letters(broker)
    assert [(0, 0), (2, 0), (2, 1)] == [(one.partition, one.offset) for one in letters]
    assert [3, 1, 2] == _data(letters)


@virtual
async def test_what_a_letter_says() -> None:
    """Where it is and was, when and why, which try failed, and the record as it came."""
    sick = Sick(partitions=3)
    async with serves(sick) as broker:
        value = b'{"correlation_id": "id", "event": "heals", "data": 7}'
        sick.cluster.append("Works", partition=2, key=b"k", value=value, headers=OWN)
        await until(lambda: sick.dead == [7])
        assert broker._run is not None
        now = broker._run.transport.now()
        [letter] = await _letters(broker)
    assert (0, 0, "Works:2:0", "LookupError", 2) == (
        letter.partition,
        letter.offset,
        letter.origin,
        letter.error,
        letter.attempt,
    )
    assert abs(now - letter.timestamp) < 5
    assert (b"k", value, OWN) == (letter.key, letter.value, list(letter.headers)[: len(OWN)])
    assert {name.startswith("kb-") for name, _ in list(letter.headers)[len(OWN) :]} == {True}


@virtual
async def test_a_letter_that_somebody_else_put_there() -> None:
    """Whatever is in the topic is a letter: what it does not say is empty."""
    sick = Sick()
    async with serves(sick) as broker:
        sick.cluster.append("Works.dlq")
        sick.cluster.append("Works.dlq", headers=[("kb-error", b"\xff"), ("kb-attempt", b"x")])
        first, second = await _letters(broker)
    assert (None, None, "", 1) == (first.key, first.value, first.error, first.attempt)
    assert ("\ufffd", 1) == (second.error, second.attempt)


@virtual
@pytest.mark.parametrize("how", ["break", "error", "cancel", "aclose"])
async def test_a_loop_that_is_left_early_closes_its_reader(
    how: str, readers: list[MemoryReader]
) -> None:
    """However it is left."""
    sick = Sick()

    async def leave(broker: BrokerManager) -> None:
        async with aclosing(broker.dead_letters()) as letters:  # type: ignore[type-var]  # a generator
            async for _ in letters:
                return

    async def loop(broker: BrokerManager) -> None:
        if how == "aclose":
            await leave(broker)
            return
        async for _ in broker.dead_letters():
            if how == "break":
                break
            if how == "error":
                raise LookupError
            await asyncio.Event().wait()

    async with serves(sick) as broker:
        sick.bury(1, 2)
        looping = asyncio.create_task(loop(broker))
        await until(lambda: len(readers) == 2)
        await asyncio.sleep(1)
        looping.cancel()
        await asyncio.wait({looping})
        if how == "error":
            assert isinstance(looping.exception(), LookupError)
        del looping
        gc.collect()  # an error holds the frames, and they the loop
        await turns(10)
        assert [True, True] == [reader.closed for reader in readers]


@virtual
async def test_letters_of_a_kafka_that_does_not_answer() -> None:
    """It is an error that callers know, at once or after a while; never a loop that just ends."""
    sick = Sick()
    async with serves(sick) as broker:
        sick.bury(1, 2)
        for count in range(8):
            reading = asyncio.create_task(_letters(broker))
            await turns(count)
            sick.cluster.down()
            await asyncio.wait({reading}, timeout=60)
            sick.cluster.up()
            error = reading.exception()
            assert isinstance(error, BrokerUnavailableError) or _data(reading.result()) == [1, 2]


@virtual
async def test_a_broker_that_does_not_run_has_no_letters() -> None:
    """Before the start and after the stop; a letter cannot be replayed after it either."""
    sick = Sick()
    broker = sick.broker()
    with pytest.raises(BrokerClosedError, match="the broker is not running: start it first"):
        await _letters(broker)
    async with broker:
        sick.bury(1)
        [letter] = await _letters(broker)
    with pytest.raises(BrokerClosedError, match="the broker is not running: start it first"):
        await _letters(broker)
    with pytest.raises(BrokerClosedError):
        broker.replay(letter)


# Sending back


@virtual
async def test_a_letter_goes_back_where_it_came_from() -> None:
    """With its key, value and own headers, and its tries are counted on."""
    sick = Sick(partitions=3)
    async with serves(sick) as broker:
        value = b'{"correlation_id": "id", "event": "heals", "data": 7}'
        deadline = (wire.DEADLINE, b"99999999999999")
        headers = [*OWN, deadline]
        sick.cluster.append("Works", partition=2, key=b"k", value=value, headers=headers)
        await until(lambda: sick.dead == [7])
        [letter] = await _letters(broker)
        sick.healed = True
        delivery = await broker.replay(letter)
        await until(lambda: len(sick.tries) == 3)
        assert ("Works", 2, 1) == (delivery.topic, delivery.partition, delivery.offset)
        record = sick.cluster.records("Works")[1]
        assert [letter] == await _letters(broker)
    assert (b"k", value) == (record.key, record.value)
    assert OWN == [one for one in record.headers if not one[0].startswith("kb-")]
    names = {name for name, _ in record.headers}
    assert set() == names & {wire.FAILURE, wire.ORIGIN, wire.DEADLINE, wire.DUE}
    assert [(7, 1), (7, 2), (7, 3)] == sick.tries


@virtual
async def test_a_letter_that_fails_again_is_a_letter_again() -> None:
    """Of the same place, with more tries."""
    sick = Sick()
    async with serves(sick) as broker:
        sick.put(7, event="heals", key="k")
        await until(lambda: sick.dead == [7])
        [letter] = await _letters(broker)
        await broker.replay(letter)
        await until(lambda: sick.dead == [7, 7])
        [_, again] = await _letters(broker)
    assert ("Works:0:1", "LookupError", 4) == (again.origin, again.error, again.attempt)


@virtual
@pytest.mark.parametrize("origin", [b"", b"rubbish", b"Works:x:1", b"\xff:0:0", b"Works:0"])
async def test_a_letter_whose_origin_is_unreadable_goes_to_the_module(origin: bytes) -> None:
    """To the partition of its key, where events of that key are."""
    sick = Sick(partitions=5)
    sick.healed = True
    value = b'{"correlation_id": "id", "event": "heals", "data": 7}'
    async with serves(sick) as broker:
        sick.cluster.append("Works.dlq", key=b"21", value=value, headers=[("kb-origin", origin)])
        [letter] = await _letters(broker)
        delivery = await broker.replay(letter)
        expected = await broker.produce("Works", EventObject(event="note"), key=b"21")
        assert ("Works", expected.partition) == (delivery.topic, delivery.partition)
        await until(lambda: len(sick.tries) == 1)


@virtual
async def test_a_letter_that_came_nowhere_from_is_handled() -> None:
    """What somebody else put into the topic has no other origin; it goes to the module."""
    sick = Sick()
    sick.healed = True
    value = b'{"correlation_id": "id", "event": "heals", "data": 7}'
    async with serves(sick) as broker:
        sick.cluster.append("Works.dlq", value=value)
        [letter] = await _letters(broker)
        delivery = await broker.replay(letter)
        assert "Works" == delivery.topic
        await until(lambda: sick.tries == [(7, 2)])


@virtual
async def test_a_letter_without_a_value_or_a_key() -> None:
    """It goes back as it is."""
    sick = Sick()
    async with serves(sick) as broker:
        sick.cluster.append("Works")
        await until(lambda: len(sick.cluster.records("Works.dlq")) == 1)
        [letter] = await _letters(broker)
        await broker.replay(letter)
        await until(lambda: len(sick.cluster.records("Works.dlq")) == 2)
    again = sick.cluster.records("Works")[1]
    assert (None, None) == (again.key, again.value)


@virtual
async def test_a_letter_that_a_handler_replays_holds_its_commit() -> None:
    """As whatever it produces: a crash right after it would lose that."""
    sick = Sick(partitions=2)

    @sick.router.bind_event("again")
    async def again(broker: BrokerManager) -> None:
        async for letter in broker.dead_letters():
            broker.replay(letter)

    sick.healed = True
    async with serves(sick):
        sick.bury(1)
        with sick.cluster.hold_sends("Works"):
            sick.put(event="again", partition=1)
            await until(lambda: len(sick.tries) == 1)
            await asyncio.sleep(2)
            assert 1 not in sick.committed
