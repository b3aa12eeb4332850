"""The member of a group on Kafka, over a client that does what the test says."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka

from kafka_broker._transport.kafka_client import REQUEST_TIMEOUT
from kafka_broker._transport.kafka_consumer import History, KafkaSubscription
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

TOPIC = "orders"
PLACES = {TopicPartition(TOPIC, partition) for partition in range(2)}
VIRTUAL = pytest.mark.looptime


class Coordinator:
    """The group's side of a consumer; each try of a commit meets what is next in *answers*."""

    def __init__(self) -> None:
        self.generation = 1
        self.member_id = "me"
        self.tries: list[dict[int, int]] = []
        self.answers: list[Callable[[], object]] = []
        self.search: Callable[[], object] = lambda: None

    async def ensure_coordinator_known(self) -> None:
        self.search()

    async def _do_commit_offsets(self, _: object, offsets: Any) -> None:
        self.tries.append({place.partition: at.offset for place, at in offsets.items()})
        await asyncio.sleep(0)
        if self.answers:
            await asyncio.ensure_future(_answer(self.answers.pop(0)))


async def _answer(action: Callable[[], object]) -> None:
    outcome = action()
    if isinstance(outcome, asyncio.Event):
        await outcome.wait()
    elif isinstance(outcome, Exception):
        raise outcome


class Consumer:
    """A consumer whose buffer is *waiting*: partition and offset of each record."""

    def __init__(self) -> None:
        self._coordinator = Coordinator()
        self._fetcher = SimpleNamespace(
            _fetch_task=asyncio.get_running_loop().create_future(), _records={}
        )
        self.waiting: list[tuple[int, int]] = []
        self.asked: list[set[int]] = []
        self.assigned = PLACES
        self.stuck = False
        self.bad: set[tuple[int, int]] = set()

    def assignment(self) -> set[TopicPartition]:
        return self.assigned

    async def getmany(
        self, *places: TopicPartition, timeout_ms: float, max_records: int
    ) -> dict[TopicPartition, list[Any]]:
        asked = {place.partition for place in places} or {0, 1}
        self.asked.append(asked)
        if self.stuck:
            await asyncio.Event().wait()
        taken = [place for place in self.waiting if place[0] in asked][:max_records]
        for place in taken:
            if place in self.bad:
                parsed = SimpleNamespace(next_fetch_offset=place[1])
                buffered = SimpleNamespace(_partition_records=parsed)
                self._fetcher._records = {TopicPartition(TOPIC, place[0]): buffered}
                b"\xff".decode()
            self.waiting.remove(place)
        if not taken:
            await asyncio.sleep(timeout_ms / 1000)
        records = [SimpleNamespace(topic=TOPIC, partition=p, offset=at) for p, at in taken]
        return {TopicPartition(TOPIC, records[0].partition): records} if records else {}

    def seek(self, place: TopicPartition, offset: int) -> None:
        self.waiting = [
            each for each in self.waiting if each[0] != place.partition or each[1] >= offset
        ]

    async def stop(self) -> None:
        self._coordinator.generation, self._coordinator.member_id = -1, ""


class Setting:
    """A subscription, and the client under it."""

    def __init__(self) -> None:
        self.consumer = Consumer()
        self.coordinator = self.consumer._coordinator
        self.history = History("me")
        self.told: list[frozenset[int]] = []
        self.give_up: Callable[[], object] = lambda: None
        self.subscribe()

    def subscribe(self) -> None:
        """Begin anew, as after an error."""
        self.subscription = KafkaSubscription(
            self.consumer, TOPIC, self.told.append, self._revoked, self.history
        )

    async def _revoked(self, _: frozenset[int]) -> None:
        outcome = self.give_up()
        if asyncio.iscoroutine(outcome):
            await outcome

    async def assign(self, places: set[TopicPartition] | None = None) -> None:
        await self.subscription.on_partitions_assigned(PLACES if places is None else places)

    async def revoke(self) -> None:
        await self.subscription.on_partitions_revoked(PLACES)

    async def fetch(self, *leave_out: int, timeout: float = 0.5) -> list[tuple[int, int]]:
        records = await self.subscription.fetch(leave_out, timeout=timeout)
        return [(record.partition, record.offset) for record in records]

    def join_again(self) -> None:
        """Be a member of the next generation, which nobody has been told of yet."""
        self.coordinator.generation += 1

    def lose_session(self) -> None:
        self.coordinator.generation, self.coordinator.member_id = -1, ""


@pytest.fixture
async def setting() -> Setting:
    return Setting()


# Commits


@VIRTUAL
async def test_a_commit_is_tried_again(setting: Setting, looptime: Any) -> None:
    """What may pass is tried again after a rest, until it is done."""
    await setting.assign()
    setting.coordinator.answers = [kafka.NodeNotReadyError, kafka.GroupLoadInProgressError]
    assert await setting.subscription.commit({0: 7, 1: 8})
    assert [{0: 7, 1: 8}] * 3 == setting.coordinator.tries
    assert pytest.approx(0.2, abs=0.01) == looptime


@VIRTUAL
@pytest.mark.parametrize("answer", [kafka.RequestTimedOutError, asyncio.Event])
async def test_a_commit_is_bounded(
    setting: Setting, looptime: Any, answer: Callable[[], object]
) -> None:
    """A commit that gets no answer, or none that helps, ends in an error after its time."""
    await setting.assign()
    setting.coordinator.answers = [answer] * 1000
    with pytest.raises(BrokerUnavailableError, match=TOPIC):
        await setting.subscription.commit({0: 7})
    assert pytest.approx(REQUEST_TIMEOUT, abs=0.01) == looptime


async def test_a_refused_commit_is_not_tried_again(setting: Setting) -> None:
    """An error that stays is told at once."""
    await setting.assign()
    setting.coordinator.answers = [kafka.GroupAuthorizationFailedError]
    with pytest.raises(BrokerUnavailableError, match="ACL"):
        await setting.subscription.commit({0: 7})
    assert 1 == len(setting.coordinator.tries)


@pytest.mark.parametrize(
    "answer",
    [kafka.UnknownMemberIdError, kafka.IllegalGenerationError, kafka.RebalanceInProgressError],
)
async def test_a_commit_that_the_group_refuses(
    setting: Setting, answer: Callable[[], object]
) -> None:
    """When Kafka does not know us as this member any more the commit is refused."""
    await setting.assign()
    setting.coordinator.answers = [answer]
    assert await setting.subscription.commit({0: 7}) is False
    assert 1 == len(setting.coordinator.tries)


@VIRTUAL
@pytest.mark.parametrize("lose", [Setting.join_again, Setting.lose_session])
@pytest.mark.parametrize("moment", ["before", "search", "answer"])
async def test_a_commit_ends_with_its_membership(
    setting: Setting, lose: Callable[[Setting], None], moment: str
) -> None:
    """No try is made in another generation or without a session, whenever that comes."""
    await setting.assign()

    def fail() -> Exception:
        lose(setting)
        error: Exception = kafka.NodeNotReadyError()
        return error

    if moment == "before":
        lose(setting)
    elif moment == "search":
        setting.coordinator.search = lambda: lose(setting)
    else:
        setting.coordinator.answers = [fail]
    assert await setting.subscription.commit({0: 7}) is False
    assert (moment == "answer") == len(setting.coordinator.tries)


@VIRTUAL
async def test_a_commit_does_not_reach_the_next_assignment(setting: Setting) -> None:
    """What is tried again while partitions go and come back is refused, though they are ours."""
    await setting.assign()
    commit = asyncio.create_task(setting.subscription.commit({0: 7}))
    setting.coordinator.answers = [kafka.NodeNotReadyError]
    await asyncio.sleep(0.05)
    await setting.revoke()
    await setting.assign()
    assert await commit is False
    assert await setting.subscription.commit({0: 8})
    assert [{0: 7}, {0: 8}] == setting.coordinator.tries


async def test_a_commit_while_giving_up_is_made(setting: Setting) -> None:
    """Inside on_revoked commits are made in a live session, and afterwards refused."""
    answers: list[bool] = []

    async def commit() -> None:
        answers.append(await setting.subscription.commit({0: 7}))

    await setting.assign()
    setting.give_up = commit
    await setting.revoke()
    await commit()
    assert [True, False] == answers


@pytest.mark.parametrize("lost_first", [True, False])
async def test_without_a_session_nothing_is_committed(
    setting: Setting, *, lost_first: bool
) -> None:
    """A session that is lost before the assignment was told of is none, too."""
    if lost_first:
        setting.lose_session()
    await setting.assign()
    setting.lose_session()
    assert await setting.subscription.commit({0: 7}) is False
    assert [] == setting.coordinator.tries


async def test_a_partition_of_others_is_not_committed(setting: Setting) -> None:
    """One partition that was not assigned refuses the whole commit."""
    await setting.assign({TopicPartition(TOPIC, 1)})
    assert await setting.subscription.commit({0: 7, 1: 8}) is False
    assert await setting.subscription.commit({1: 8})
    assert [{1: 8}] == setting.coordinator.tries


@VIRTUAL
async def test_commits_are_made_in_their_order(setting: Setting) -> None:
    """A commit that is tried again does not land after one that was made later."""
    await setting.assign()
    setting.coordinator.answers = [kafka.NodeNotReadyError]
    commits = [setting.subscription.commit({0: offset}) for offset in (7, 8)]
    assert [True, True] == await asyncio.gather(*commits)
    assert [{0: 7}, {0: 7}, {0: 8}] == setting.coordinator.tries


@VIRTUAL
async def test_a_cancelled_commit_leaves_nothing_behind(setting: Setting) -> None:
    """Cancelled in a try, a rest or a queue, it has no task left, and the next is made."""
    await setting.assign()
    for answer in (asyncio.Event, kafka.NodeNotReadyError):
        setting.coordinator.answers = [answer]
        commits = [asyncio.create_task(setting.subscription.commit({0: 7})) for _ in range(2)]
        await asyncio.sleep(0.05)
        for commit in commits:
            commit.cancel()
        await asyncio.wait(commits)
        assert [True, True] == [commit.cancelled() for commit in commits]
        assert {asyncio.current_task()} == asyncio.all_tasks()
    assert await setting.subscription.commit({0: 8})
    assert [{0: 7}, {0: 7}, {0: 8}] == setting.coordinator.tries


# Fetches


async def test_what_comes_early_is_held(setting: Setting) -> None:
    """Records that come before their assignment is told of wait for it, also if left out then."""
    setting.consumer.waiting = [(0, 1), (1, 1), (0, 2)]
    assert [] == await setting.fetch(timeout=0)
    assert [] == setting.consumer.waiting
    await setting.assign()
    setting.consumer.waiting = [(1, 2), (0, 3)]
    assert [(1, 1)] == await setting.fetch(0, timeout=0)
    assert [(1, 2)] == await setting.fetch(0, timeout=0)
    assert [] == await setting.fetch(0, timeout=0)
    assert [(0, 1), (0, 2)] == await setting.fetch(timeout=0)
    assert [(0, 3)] == await setting.fetch(timeout=0)


async def test_what_is_held_is_handed_on_as_soon_as_it_may(setting: Setting) -> None:
    """A fetch that waits for the assignment returns what it has for it."""
    setting.consumer.waiting = [(0, 1)]
    assert [] == await setting.fetch()
    fetch = asyncio.create_task(setting.fetch())
    await asyncio.sleep(0)
    await setting.assign()
    assert [(0, 1)] == await fetch


async def test_what_is_held_too_long_is_dropped(setting: Setting) -> None:
    """What was left out until its assignment was over comes again from Kafka, not from here."""
    setting.consumer.waiting = [(0, 1)]
    assert [] == await setting.fetch()
    await setting.assign()
    assert [] == await setting.fetch(0, timeout=0)
    await setting.revoke()
    await setting.assign()
    setting.consumer.waiting = [(0, 1), (0, 2)]
    assert [(0, 1), (0, 2)] == await setting.fetch()


@VIRTUAL
async def test_nothing_is_asked_of_what_is_left_out(setting: Setting, looptime: Any) -> None:
    """Left out is not asked for; if that is all, one call waits for nothing."""
    await setting.assign()
    setting.consumer.waiting = [(0, 1), (1, 1)]
    assert [(1, 1)] == await setting.fetch(0)
    assert [] == await setting.fetch(0, 1)
    assert [{1}, {-1}] == setting.consumer.asked
    assert pytest.approx(0.5, abs=0.01) == looptime


@VIRTUAL
async def test_a_fetch_is_bounded(setting: Setting, looptime: Any) -> None:
    """When aiokafka waits for the end of a rebalance, a fetch does not."""
    await setting.assign()
    setting.consumer.stuck = True
    async with asyncio.timeout(60):
        assert [] == await setting.fetch(timeout=2.0)
    assert pytest.approx(2.1, abs=0.01) == looptime
    setting.consumer._fetcher._fetch_task.set_result(None)
    with pytest.raises(BrokerUnavailableError, match="died"):
        await setting.fetch()


async def test_a_full_partition_waits_for_the_others(setting: Setting) -> None:
    """After a fetch that was full the others come first, and then it goes on."""
    await setting.assign()
    setting.consumer.waiting = [*((0, at) for at in range(500)), (1, 0)]
    fetches = [await setting.fetch() for _ in range(4)]
    assert [200, 1, 200, 100] == [len(records) for records in fetches]
    assert [(1, 0)] == fetches[1]


async def test_an_error_of_on_assigned_does_not_silence_a_member(setting: Setting) -> None:
    """Records come although the callback raised; aiokafka logs what."""

    def fail(_: frozenset[int]) -> None:
        raise ZeroDivisionError

    subscription = KafkaSubscription(
        setting.consumer, TOPIC, fail, setting._revoked, setting.history
    )
    with pytest.raises(ZeroDivisionError):
        await subscription.on_partitions_assigned(PLACES)
    setting.consumer.waiting = [(0, 1)]
    assert 1 == len(await subscription.fetch())


# Records that cannot be parsed


@VIRTUAL
async def test_after_a_record_that_cannot_be_parsed_each_comes_alone(setting: Setting) -> None:
    """The subscription breaks; the next hands on a stand-in, and for a minute one at a time."""
    await setting.assign()
    setting.consumer.waiting = [*((0, at) for at in range(4)), (1, 0), (1, 1)]
    setting.consumer.bad = {(0, 1), (1, 1)}
    waiting = list(setting.consumer.waiting)
    with pytest.raises(BrokerUnavailableError, match="UnicodeDecodeError"):
        await setting.fetch()
    setting.consumer.waiting = list(waiting)  # what was thrown away comes again
    setting.subscribe()
    await setting.assign()
    fetched = [await setting.subscription.fetch() for _ in waiting]
    assert [1] * 6 == [len(records) for records in fetched]
    records = [record for (record,) in fetched]
    assert Counter(waiting) == Counter((each.partition, each.offset) for each in records)
    assert {(0, 1), (1, 1)} == {(each.partition, each.offset) for each in records if _empty(each)}
    assert [] == await setting.fetch()
    await asyncio.sleep(60)
    setting.consumer.waiting = [(0, 4), (0, 5)]
    assert [(0, 4), (0, 5)] == await setting.fetch()


def _empty(record: Any) -> bool:
    return getattr(record, "value", None) == b""


@VIRTUAL
async def test_being_careful_respects_what_is_left_out(setting: Setting, looptime: Any) -> None:
    """Neither records nor stand-ins come of what is left out; a fetch keeps its time."""
    setting.history.met_unparsable()
    await setting.assign()
    setting.consumer.waiting = [(0, 1), (1, 1)]
    setting.consumer.bad = {(0, 1)}
    assert [(1, 1)] == await setting.fetch(0)
    assert [] == await setting.fetch(0)
    assert pytest.approx(0.5, abs=0.03) == looptime
    assert [(0, 1)] == await setting.fetch()


async def test_an_error_at_no_known_place_is_raised(setting: Setting) -> None:
    """Without an offset to step over there is no stand-in."""

    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    setting.history.met_unparsable()
    await setting.assign()
    setting.consumer.getmany = fail  # type: ignore[method-assign,assignment]  # a fake's
    with pytest.raises(BrokerUnavailableError, match="ZeroDivisionError"):
        await setting.fetch()


# Twins


async def _lose(setting: Setting) -> None:
    await setting.assign()
    setting.lose_session()
    await setting.revoke()
    setting.coordinator.generation = 5


@VIRTUAL
async def test_a_member_that_is_always_lost_stands_back(
    setting: Setting, looptime: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """After three losses in a minute it is told once of its setting, and rests from then on."""
    for _ in range(2):
        await _lose(setting)
    assert ("", 0) == (caplog.text, looptime)
    for seconds in (30, 60):
        await _lose(setting)
        assert pytest.approx(seconds, abs=0.01) == looptime
    assert 1 == caplog.text.count("group_instance_id 'me'")


@VIRTUAL
async def test_losses_far_apart_are_no_twin(
    setting: Setting, looptime: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss now and then, or a rebalance, does not make a member rest."""
    for _ in range(5):
        await _lose(setting)
        await asyncio.sleep(31)
        await setting.assign()
        await setting.revoke()
    assert pytest.approx(5 * 31, abs=0.01) == looptime
    assert "" == caplog.text
