"""Requests and replies between two brokers: the same on memory and on a real Kafka."""

from __future__ import annotations

import asyncio
import threading
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker._run import connect
from kafka_broker._transport import Outgoing
from kafka_broker.errors import (
    EventDecodeError,
    NoHandlerError,
    RemoteError,
    ReplyTimeoutError,
    RequestError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Charge(BaseModel):
    """A typed payload."""

    amount: int


Pair = tuple[BrokerManager, BrokerManager, EventRouter]


@asynccontextmanager
async def _pair(servers: str, *, concurrency: int = 100, **asking: Any) -> AsyncIterator[Pair]:
    """Run a broker that asks and one that answers, with a router to bind to."""
    name = uuid.uuid4().hex[:12]
    router = EventRouter(f"answer-{name}")
    answering = BrokerManager(
        f"answer-{name}", router=router, bootstrap_servers=servers, concurrency=concurrency
    )
    async with (
        answering,
        BrokerManager(f"ask-{name}", bootstrap_servers=servers, **asking) as broker,
    ):
        yield broker, answering, router


@pytest.fixture
async def pair(bootstrap_servers: str) -> AsyncIterator[Pair]:
    """Yield the two brokers and the router of the answering one."""
    async with _pair(bootstrap_servers) as brokers:
        yield brokers


async def test_a_returned_value_is_the_reply(pair: Pair) -> None:
    """What a handler returns reaches the caller, with both hops in the audit log."""
    broker, answering, router = pair
    router.bind_event("echo")(lambda event: event.data)
    reply = await broker.request(answering.settings.module, "echo", {"n": [1, "é"]}, timeout=10)
    assert ("respond", "completed", {"n": [1, "é"]}) == (reply.event, reply.status, reply.data)
    locations = [broker.settings.module, answering.settings.module]
    assert locations == [hop.location for hop in reply.audit_log]
    assert all(hop.time_received is not None for hop in reply.audit_log)


async def test_none_is_a_reply_to_a_request(pair: Pair) -> None:
    """A handler that returns nothing still ends the wait of a request."""
    broker, answering, router = pair

    @router.bind_event("quiet")
    async def quiet() -> None:
        return None

    assert None is (await broker.request(answering.settings.module, "quiet", timeout=10)).data


async def test_typed_payload_and_response(pair: Pair) -> None:
    """A handler gets its model, the caller gets the model it asked for."""
    broker, answering, router = pair

    @router.bind_event("charge")
    def charge(payload: Charge, event: EventObject) -> Charge:
        assert event.event == "charge"
        return Charge(amount=payload.amount * 2)

    reply = await broker.request(
        answering.settings.module, "charge", Charge(amount=2), timeout=10, response=Charge
    )
    assert Charge(amount=4) == reply.data


async def test_a_reply_of_another_shape_is_a_decode_error(pair: Pair) -> None:
    """A reply that is not what the caller asked for raises, without quoting it."""
    broker, answering, router = pair
    router.bind_event("odd")(lambda: {"amount": "secret"})
    with pytest.raises(EventDecodeError) as caught:
        await broker.request(answering.settings.module, "odd", timeout=10, response=Charge)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("event", "data", "error", "code"),
    [
        ("raises", None, RemoteError, "handler-failed"),
        ("charge", {"amount": "no number"}, RemoteError, "bad-data"),
        ("strange", None, RemoteError, "handler-failed"),
        ("unknown", None, NoHandlerError, None),
    ],
)
async def test_a_failure_is_an_error_reply(
    pair: Pair, event: str, data: object, error: type[RequestError], code: str | None
) -> None:
    """Whatever goes wrong at the handler reaches the caller at once, as a typed error."""
    broker, answering, router = pair
    router.bind_event("charge")(lambda _: None)

    @router.bind_event("raises")
    def raises() -> None:
        msg = "a secret of the handler"
        raise LookupError(msg)

    @router.bind_event("strange")
    def strange() -> object:
        return object()

    def charge(payload: Charge) -> None:
        raise AssertionError(payload)

    typed = EventRouter("typed")
    typed.bind_event("charge")(charge)
    router.include_binder(typed)
    name = "typed.charge" if event == "charge" else event
    with pytest.raises(error) as caught:
        await broker.request(answering.settings.module, name, data, timeout=10)
    assert code == getattr(caught.value, "code", None)
    assert "secret" not in str(caught.value)
    assert "no number" not in str(caught.value)


async def test_no_reply_is_a_timeout(pair: Pair) -> None:
    """A wait ends at its timeout; the late reply is counted and dropped."""
    broker, answering, router = pair
    release = asyncio.Event()

    @router.bind_event("slow")
    async def slow() -> str:
        await release.wait()
        return "late"

    router.bind_event("quick")(lambda: "quick")
    with pytest.raises(ReplyTimeoutError):
        await broker.request(answering.settings.module, "slow", timeout=0.3)
    release.set()
    assert "quick" == (await broker.request(answering.settings.module, "quick", timeout=10)).data
    assert 0 == len(broker.consumer_storage)


async def test_an_expired_request_is_not_handled(bootstrap_servers: str) -> None:
    """A request whose deadline passed while it waited for its turn is not executed."""
    async with _pair(bootstrap_servers, concurrency=1) as pair:
        await _let_one_expire(pair)


async def _let_one_expire(pair: Pair) -> None:
    broker, answering, router = pair
    began, release, handled = asyncio.Event(), asyncio.Event(), []

    @router.bind_event("work")
    async def work(event: EventObject) -> str:
        handled.append(event.data)
        began.set()
        await release.wait()
        return "done"

    module = answering.settings.module
    first = asyncio.create_task(broker.request(module, "work", "first", timeout=20))
    await began.wait()
    with pytest.raises(ReplyTimeoutError):
        await broker.request(module, "work", "second", timeout=0.2)
    release.set()
    await first
    assert "done" == (await broker.request(module, "work", "third", timeout=10)).data
    assert ["first", "third"] == handled


async def test_produce_then_consume(pair: Pair) -> None:
    """A reply to a produced event is kept until it is asked for by its id."""
    broker, answering, router = pair
    router.bind_event("echo")(lambda event: event.data)
    correlation_id = uuid.uuid4()
    delivery = await broker.produce(
        answering.settings.module, EventObject(correlation_id=correlation_id, event="echo", data=1)
    )
    assert await broker.consumer_storage.receive()
    assert str(correlation_id) in broker.consumer_storage
    assert 1 == (await broker.consumer_storage.consume(correlation_id, timeout=10)).data
    assert delivery.offset is not None
    assert delivery.partition is not None


async def test_a_handler_that_produces_the_answer_is_not_answered_for(pair: Pair) -> None:
    """The old idiom reaches the waiting replica, once."""
    broker, answering, router = pair

    @router.bind_event("old")
    def old(event: EventObject) -> None:
        event.data, event.event = {"by": "produce"}, "respond"
        answering.produce(broker.settings.module, event)

    router.bind_event("next")(lambda: "next")
    reply = await broker.request(answering.settings.module, "old", timeout=10)
    assert {"by": "produce"} == reply.data
    await broker.request(answering.settings.module, "next", timeout=10)
    assert {} == await broker.consumer_storage.consume_all()


@pytest.mark.parametrize("ends", ["returns", "raises"])
async def test_an_answered_event_is_not_answered_again(pair: Pair, ends: str) -> None:
    """After an answer by produce(), neither a returned value nor an exception is a second reply."""
    broker, answering, router = pair

    @router.bind_event("old")
    async def old(event: EventObject) -> str:
        event.data, event.event = "first", "respond"
        answering.produce(broker.settings.module, event)
        if ends == "raises":
            raise LookupError
        return "second"

    router.bind_event("next")(lambda: "next")
    event = EventObject(event="old")
    module = answering.settings.module
    await broker.produce(module, event, key="same")
    assert "first" == (await broker.consumer_storage.consume(event.correlation_id, timeout=10)).data
    await broker.produce(module, EventObject(correlation_id="next", event="next"), key="same")
    assert "next" == (await broker.consumer_storage.consume("next", timeout=10)).data
    assert {} == await broker.consumer_storage.consume_all()


async def test_a_uuid_may_be_assigned(pair: Pair) -> None:
    """An id that was assigned as a UUID is sent and waited for as its text."""
    broker, answering, router = pair
    router.bind_event("echo")(lambda event: event.data)
    event = EventObject(event="echo", data=1)
    event.correlation_id = given = uuid.uuid4()  # type: ignore[assignment]  # users do
    broker.produce(answering.settings.module, event)
    assert 1 == (await broker.consumer_storage.consume(given, timeout=10)).data


async def test_a_correlation_id_may_be_used_again(pair: Pair) -> None:
    """The reply to a second event with an id that was waited for before is not taken for late."""
    broker, answering, router = pair
    router.bind_event("echo")(lambda event: event.data)
    for n in range(2):
        event = EventObject(correlation_id="again", event="echo", data=n)
        await broker.produce(answering.settings.module, event)
        await broker.consumer_storage.receive()
        assert n == (await broker.consumer_storage.consume("again", timeout=10)).data


async def test_an_event_that_goes_on_is_answered_by_the_last(bootstrap_servers: str) -> None:
    """A module that hands a request on leaves the answer to the next one."""
    async with _pair(bootstrap_servers) as (broker, middle, router):
        last = EventRouter("last")
        last.bind_event("work")(lambda: "from the last")
        name = f"last-{uuid.uuid4().hex[:8]}"

        @router.bind_event("work")
        async def hand_on(event: EventObject) -> None:
            middle.produce(name, event)

        async with BrokerManager(name, router=last, bootstrap_servers=bootstrap_servers):
            reply = await broker.request(middle.settings.module, "work", timeout=10)
    assert "from the last" == reply.data
    assert [broker.settings.module, middle.settings.module, name] == [
        hop.location for hop in reply.audit_log
    ]


async def test_sync_and_async_handlers(pair: Pair) -> None:
    """A plain function runs in a worker thread, a coroutine in the loop."""
    broker, answering, router = pair
    router.bind_event("sync")(lambda: threading.current_thread() is threading.main_thread())

    @router.bind_event("async")
    async def in_loop() -> bool:
        return threading.current_thread() is threading.main_thread()

    module = answering.settings.module
    assert False is (await broker.request(module, "sync", timeout=10)).data
    assert True is (await broker.request(module, "async", timeout=10)).data


async def test_events_with_one_key_arrive_in_order(bootstrap_servers: str) -> None:
    """The order of produce() calls is the order at the handler, per key."""
    got: dict[str, list[int]] = {"a": [], "b": []}
    complete = asyncio.Event()
    async with _pair(bootstrap_servers) as (broker, answering, router):

        @router.bind_event("note")
        async def note(event: EventObject) -> None:
            got[event.data["key"]].append(event.data["n"])
            if sum(map(len, got.values())) == 400:
                complete.set()

        for n in range(200):
            for key in got:
                event = EventObject(event="note", data={"key": key, "n": n})
                broker.produce(answering.settings.module, event, key=key)
        await asyncio.wait_for(complete.wait(), 30)
    assert {"a": list(range(200)), "b": list(range(200))} == got


async def test_without_a_router_events_come_to_the_storage(pair: Pair) -> None:
    """A broker without a router stores the events of its topic; nothing is overwritten."""
    broker, answering, _ = pair
    for n in range(2):
        await answering.produce(
            broker.settings.module, EventObject(correlation_id="same", event="e", data=n), key="k"
        )
    got: list[Any] = []
    while len(got) < 2:
        await broker.consumer_storage.receive()
        got += [event.data for event in (await broker.consumer_storage.consume_all()).values()]
        got += [event.data for event in (await broker.consumer_storage.consume_all()).values()]
    assert [0, 1] == got


async def test_an_undecodable_record_goes_to_the_dead_letter_topic(pair: Pair) -> None:
    """Bytes that are no JSON stay as they are in the dead-letter topic, and the next event runs."""
    broker, answering, router = pair
    router.bind_event("next")(lambda: "next")
    module = answering.settings.module
    transport = _transport_of(broker)
    await transport.start()
    try:
        graves = await transport.read(f"{module}.dlq", 0)
        for partition in range(await transport.partitions(module)):
            await transport.send(module, partition, [_record(b"\xff no json", b"\x00\x01")])
        assert "next" == (await broker.request(module, "next", timeout=10)).data
        dead: list[Any] = []
        while not dead:
            dead = list(await graves.fetch())
        await graves.close()
    finally:
        await transport.stop()
    assert b"\xff no json" == dead[0].value
    assert b"\x00\x01" == dict(dead[0].headers)["binary"]
    assert dict(dead[0].headers)["kb-origin"] is not None


def _record(value: bytes, header: bytes) -> Any:
    return Outgoing(b"key", value, [("binary", header)])


def _transport_of(broker: BrokerManager) -> Any:
    return connect(broker.settings)


async def test_many_requests_at_once(pair: Pair) -> None:
    """A thousand requests in flight get their own replies."""
    broker, answering, router = pair
    router.bind_event("echo")(_echo)
    module = answering.settings.module
    replies = await asyncio.gather(
        *(broker.request(module, "echo", n, timeout=30) for n in range(1000))
    )
    assert list(range(1000)) == [reply.data for reply in replies]
    assert 0 == len(broker.consumer_storage)


async def _echo(event: EventObject) -> Any:
    return event.data


@pytest.mark.parametrize("call", [str, lambda text: text.encode()])
async def test_a_key_is_text_or_bytes(pair: Pair, call: Callable[[str], str | bytes]) -> None:
    """Both forms of one key go to one partition."""
    broker, answering, _ = pair
    module = answering.settings.module
    first = await broker.produce(module, EventObject(event="a"), key="order-1")
    second = await broker.produce(module, EventObject(event="a"), key=call("order-1"))
    assert first.partition == second.partition
