"""What a hostile review found broken and has no other home: each was mended once."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fast_depends import Depends
from pydantic import BaseModel, Field
from starlette.applications import Starlette

from kafka_broker import BrokerManager, EventObject, EventRouter, RetryLater, RetryPolicy
from kafka_broker import _wire as wire
from kafka_broker._transport.memory_consumer import MemorySubscription
from kafka_broker.errors import BrokerUnavailableError, ConfigurationError, RemoteError

from .test_dispatch import SECRET, Bank, serves, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from kafka_broker._middleware import Handle

virtual = pytest.mark.looptime

ONCE = RetryPolicy(attempts=1)


# Stops and applications


def _lives(app: Starlette) -> AbstractAsyncContextManager[Any]:
    lives: AbstractAsyncContextManager[Any] = app.router.lifespan_context(app)
    return lives


@asynccontextmanager
async def _ends_slowly(_: Any) -> AsyncIterator[None]:
    yield
    await asyncio.sleep(0.3)


@virtual
async def test_a_stop_while_an_application_ends_waits_for_the_same_handlers() -> None:
    """When it returns their reply and dead letter are delivered, and nothing comes again."""
    bank, begun = Bank(retry=ONCE), list[str]()

    @bank.router.bind_event("slow.*")
    async def slow(event: EventObject) -> str:
        begun.append(event.event)
        await asyncio.sleep(1)
        if event.event == "slow.fails":
            raise LookupError
        return "done"

    broker, app = bank.broker(), Starlette()
    broker.init_consumer_app(app)
    lives = _lives(app)
    await lives.__aenter__()
    bank.put(event="slow.asked", reply_to="Bank.replies")
    bank.put(event="slow.fails")
    await until(lambda: len(begun) == 2)
    ending = asyncio.create_task(lives.__aexit__(None, None, None))
    await asyncio.sleep(0.05)
    await broker.stop()
    [reply] = bank.cluster.records("Bank.replies")
    assert b'"data":"done"' in (reply.value or b"")
    assert ([b"Bank:0:1"], 2) == (bank.dead, bank.committed)
    await ending
    async with bank.broker():
        await asyncio.sleep(2)
    assert ["slow.asked", "slow.fails"] == begun


@virtual
async def test_an_application_that_starts_while_another_ends_handles() -> None:
    """It does not join a broker whose handling is over."""
    bank = Bank()
    broker, first, second = bank.broker(), Starlette(lifespan=_ends_slowly), Starlette()
    broker.init_consumer_app(first)
    broker.init_consumer_app(second)
    leaves = _lives(first)
    await leaves.__aenter__()
    leaving = asyncio.create_task(leaves.__aexit__(None, None, None))
    await asyncio.sleep(0.1)
    async with _lives(second):
        await leaving
        assert broker.ready
        bank.put("it")
        await until(lambda: bank.handled == ["it"])
    assert (1, 0) == (bank.committed, bank.cluster.members("Bank"))


@virtual
async def test_a_commit_task_that_dies_stops_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failure surfaces, instead of a broker that handles and never commits."""

    async def commit(_: MemorySubscription, offsets: object) -> bool:  # noqa: ARG001  # as the real one
        raise ZeroDivisionError

    bank = Bank()
    broker = bank.broker()
    await broker.init_consumer()
    with monkeypatch.context() as patched:
        patched.setattr(MemorySubscription, "commit", commit)
        bank.put("it")
        async with asyncio.timeout(30):
            with pytest.raises(ZeroDivisionError):
                await broker.wait_closed()
    assert not broker.ready
    async with bank.broker():
        await until(lambda: bank.committed == 1)


# Binding


def _looks_something_up(handle: Handle) -> Handle:
    raise LookupError(handle)


@virtual
@pytest.mark.parametrize("place", ["broker", "router"])
async def test_middleware_that_raises_as_it_is_put_around_a_handler(place: str) -> None:
    """The start says so, and not the first event."""
    around = [_looks_something_up]
    bank = Bank(middleware=around if place == "broker" else [])
    if place == "router":
        bank.router = EventRouter("Bank", middleware=around)
        bank.router.bind_event("note")(bank._note)
    with pytest.raises(ConfigurationError, match=r"middleware around handler .* LookupError"):
        await bank.broker().init_consumer()
    assert 0 == bank.cluster.members("Bank")


UNREADABLE = [{"a": 1}, [int]]
READABLE = [Annotated[int, {"doc": 1}], Annotated[int, Field(json_schema_extra={"a": 1})]]


@pytest.mark.parametrize("wanted", UNREADABLE)
@pytest.mark.parametrize("batch", [None, 2])
def test_annotations_that_are_no_types_and_have_no_hash(wanted: Any, batch: int | None) -> None:
    """The bind refuses them in a sentence, as it does others."""

    async def handler(payload):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # set below
        """Do nothing."""

    handler.__annotations__ = {"payload": list[wanted] if batch else wanted}
    with pytest.raises(ConfigurationError, match=r"handler .*\.handler.* 'payload'"):
        EventRouter("Bank").bind_event("x", batch=batch)(handler)


@virtual
@pytest.mark.parametrize("wanted", READABLE)
async def test_annotated_types_without_a_hash(wanted: Any) -> None:
    """A handler may take one, alone or in lists, and a request may ask for one."""
    bank = Bank()

    async def one(number):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # set below
        return number + 1

    async def many(numbers):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # set below
        return [number + 2 for number in numbers]

    one.__annotations__, many.__annotations__ = {"number": wanted}, {"numbers": list[wanted]}
    bank.router.bind_event("one")(one)
    bank.router.bind_event("many", batch=2)(many)
    async with serves(bank) as broker:
        for event, expected in (("one", 6), ("many", 7)):
            reply = await broker.request("Bank", event, 5, response=wanted, timeout=5)
            assert expected == reply.data


# Threads


async def test_plain_dependencies_count_among_the_threads() -> None:
    """One whose handler was timed out still blocks its thread, and no other takes its place."""
    bank, release = Bank(concurrency=2, retry=ONCE), threading.Event()
    begun: list[int] = []

    def blocks() -> int:
        begun.append(1)
        release.wait(30)
        return 1

    @bank.router.bind_event("slow", timeout=0.05)
    async def slow(_: EventObject, number: int = Depends(blocks)) -> int:
        return number

    async with serves(bank):
        for _ in range(6):
            bank.put(event="slow")
        await until(lambda: bank.metrics.counted["events_failed"] == 6)
        count = len(begun)
        release.set()
    assert (2, 6) == (count, len(bank.dead))


# Dead letters


async def _list(broker: BrokerManager, listed: list[int], bank: Bank) -> None:
    async for letter in broker.dead_letters():
        listed.append(letter.offset)
        if len(listed) == 10:
            bank.cluster.down()


@virtual
async def test_dead_letters_that_kafka_does_not_give() -> None:
    """The loop says that it does not know them all, instead of ending short."""
    bank, listed = Bank(), list[int]()
    async with serves(bank) as broker:
        for number in range(1200):
            bank.cluster.append("Bank.dlq", value=b"%d" % number)
        with pytest.raises(BrokerUnavailableError):
            await _list(broker, listed, bank)
        bank.cluster.up()
        assert 10 <= len(listed) < 1200


# What is said


class Account(BaseModel):
    number: int
    balances: dict[str, int]


@virtual
@pytest.mark.parametrize(
    ("wanted", "data", "place"),
    [
        (dict[str, int], {SECRET: "x"}, r"\*: "),
        (Account, {"number": 1, "balances": {SECRET: "x"}}, r"balances\.\*: "),
        (Account, {"number": "x", "balances": {}}, "number: "),
        (list[Account], [{"number": "x", "balances": {SECRET: 1}}], r"0\.number: "),
    ],
)
async def test_keys_of_a_mapping_are_said_nowhere(
    wanted: Any, data: Any, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are data: in logs and replies `*` stands for them, and fields have their names."""
    bank = Bank()

    async def check(payload):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # set below
        """Do nothing."""

    check.__annotations__ = {"payload": wanted}
    bank.router.bind_event("check")(check)
    async with serves(bank) as broker:
        with pytest.raises(RemoteError, match=place) as caught:
            await broker.request("Bank", "check", data, timeout=5)
    assert caught.value.detail in caplog.text
    assert SECRET not in caplog.text + str(caught.value)


# Two groups that share a topic


class Shared(Bank):
    """A module with two services, each in a group of its own, that both get every event."""

    def __init__(self) -> None:
        super().__init__(retry=ONCE)
        self.seen: list[tuple[str, int]] = []

    def service(self, group: str, error: Exception) -> BrokerManager:
        """Make a replica of the group whose first try of the event ``fails`` raises."""
        router = EventRouter("Bank")

        @router.bind_event("fails")
        async def fails(event: EventObject) -> None:
            self.seen.append((group, event.attempt))
            if event.attempt == 1 and event.data == group:
                raise error

        return BrokerManager("Bank", router=router, group_id=group, **self._values)


@virtual
@pytest.mark.parametrize("group", ["a", "b"])
async def test_what_is_handled_later_comes_again_to_its_own_group(group: str) -> None:
    """The other one has handled the event, and is not given it again."""
    bank, verdict = Shared(), RetryLater(6)
    async with bank.service("a", verdict), bank.service("b", verdict):
        bank.put(group, event="fails")
        await until(lambda: len(bank.seen) == 2)
        await asyncio.sleep(20)
    assert sorted([("a", 1), ("b", 1), (group, 2)]) == sorted(bank.seen)
    assert [{0: 2}, {0: 2}] == [bank.cluster.committed(each, "Bank") for each in ("a", "b")]


@virtual
@pytest.mark.parametrize("through", ["a", "b"])
async def test_a_replay_is_for_the_group_that_buried_it(through: str) -> None:
    """Whichever service sends it back."""
    bank, error = Shared(), LookupError()
    async with bank.service("a", error) as a, bank.service("b", error) as b:
        bank.put("a", event="fails")
        await until(lambda: len(bank.dead) == 1)
        broker = {"a": a, "b": b}[through]
        [letter] = [letter async for letter in broker.dead_letters()]
        assert b"a" == dict(letter.headers)[wire.GROUP]
        await broker.replay(letter)
        await asyncio.sleep(5)
    assert [("a", 1), ("a", 2), ("b", 1)] == sorted(bank.seen)


def test_retry_of_a_bind_has_to_be_a_policy() -> None:
    """A dict, which the setting of a broker takes, is refused at once."""
    with pytest.raises(ConfigurationError, match="has to be a RetryPolicy"):
        EventRouter("Shop").bind_event("paid", retry={"attempts": 1})  # type: ignore[arg-type]  # mistake


async def test_middleware_that_forgets_to_return_is_named_at_the_start() -> None:
    """It is a mistake of the program, so no event has to come to show it."""

    def forgets(handle: Handle) -> Handle:  # type: ignore[return]  # the mistake
        del handle

    router = EventRouter("Shop", middleware=[forgets])
    router.bind_event("paid")(lambda event: event.data)
    with pytest.raises(ConfigurationError, match="forgets returned None"):
        async with BrokerManager("Shop", router=router, bootstrap_servers="memory://forgets"):
            pass
