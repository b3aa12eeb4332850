"""`init_consumer_app`: a broker around an application's lifespan, and handling inside of it."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tests.unit.test_engine import Works, _engine, _now, leaves_nothing, until

from kafka_broker import BrokerManager, EventObject
from kafka_broker.errors import BrokerUnavailableError
from kafka_broker.fastapi import Broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

virtual = pytest.mark.looptime


class Service(Works):
    """A service with an application whose own lifespan does what the test says."""

    def __init__(self, make: Callable[..., Any] = FastAPI, **values: Any) -> None:
        super().__init__(**values)
        self.broker_manager = self.broker()
        self.seen: list[Any] = []
        self.start: Callable[[], Any] = self._nothing
        self.finish: Callable[[], Any] = self._nothing
        self.state: dict[str, Any] | None = {"pool": "connections"}
        self.app = make(lifespan=self._own)
        self.broker_manager.init_consumer_app(self.app)
        self.router.bind_event("state")(self._pool)

    async def _nothing(self) -> None: ...

    async def _pool(self, broker: BrokerManager) -> Any:
        return broker.state.get("pool")

    @asynccontextmanager
    async def _own(self, _: Any) -> AsyncIterator[dict[str, Any] | None]:
        self.seen.append("starts")
        await self.start()
        try:
            yield self.state
        finally:
            self.seen.append("ends")
            await self.finish()

    def lives(self) -> AbstractAsyncContextManager[Any]:
        lives: AbstractAsyncContextManager[Any] = self.app.router.lifespan_context(self.app)
        return lives

    async def asks(self, event: str = "note", data: object = None) -> Any:
        return (await self.broker_manager.request("Works", event, data, timeout=5)).data


async def _a_while() -> None:
    await asyncio.sleep(2)


# Handling


@virtual
@pytest.mark.parametrize("make", [FastAPI, Starlette])
async def test_events_are_handled_between_start_and_end(make: Callable[..., Any]) -> None:
    """Not before the application has started, and not after it has begun to end."""
    service = Service(make)

    async def start() -> None:
        service.put("early")
        await _a_while()
        service.seen.append(list(service.handled))

    async def finish() -> None:
        service.put("late")
        await _a_while()
        service.seen.append(list(service.handled))

    service.start, service.finish = start, finish
    async with leaves_nothing(service):
        async with service.lives():
            await until(lambda: service.handled == ["early"])
            service.put("then")
            await until(lambda: service.handled == ["early", "then"])
        assert not service.broker_manager.ready
    assert ["starts", [], "ends", ["early", "then"]] == service.seen
    assert {0: 2} == service.committed


@virtual
async def test_the_handler_that_runs_ends_before_the_application_does() -> None:
    """What it uses is still there: its event is committed, and its reply delivered."""
    service = Service()

    @service.router.bind_event("slow")
    async def slow() -> str:
        await asyncio.sleep(1)
        service.seen.append("handled")
        return "done"

    async with leaves_nothing(service), service.lives():
        asking = asyncio.create_task(service.asks("slow"))
        await until(lambda: len(_engine(service.broker_manager)._lanes.working) == 1)
        asking.add_done_callback(lambda _: None)
    assert "done" == await asking
    assert (["starts", "handled", "ends"], {0: 1}) == (service.seen, service.committed)


@virtual
async def test_an_application_asks_as_it_starts_and_ends() -> None:
    """Another service answers: the broker is there before and after the application is."""
    service = Service()
    other = BrokerManager("Other", router=service.router, **service.values)

    async def ask() -> None:
        reply = await service.broker_manager.request("Other", "note", "asked", timeout=5)
        service.seen.append(reply.data)

    service.start = service.finish = ask
    async with leaves_nothing(service), other, service.lives():
        assert service.broker_manager.ready
    assert ["starts", "asked", "ends", "asked"] == service.seen


@virtual
async def test_what_an_application_produces_as_it_ends_is_delivered() -> None:
    """Without an await, too."""
    service = Service()

    async def finish() -> None:
        service.broker_manager.produce("Works", EventObject(event="note", data="last"))

    service.finish = finish
    async with leaves_nothing(service), service.lives():
        pass
    assert 1 == len(service.cluster.records("Works"))
    assert [] == service.handled


# State


@virtual
@pytest.mark.parametrize("state", [{"pool": "connections"}, {}, None])
async def test_the_state_of_the_application_is_the_broker_s(state: dict[str, Any] | None) -> None:
    """Handlers see it through their broker; the application sees its own, and the broker."""
    service = Service()
    service.state = state
    service.broker_manager.state["mine"] = 1
    async with leaves_nothing(service), service.lives() as whole:
        broker = service.broker_manager
        assert {"broker": broker, "broker:Works": broker, **(state or {})} == whole
        assert {"mine": 1, **(state or {})} == service.broker_manager.state
        assert (state or {}).get("pool") == await service.asks("state")


@virtual
async def test_the_state_is_there_for_the_first_event() -> None:
    """One that waited since before the start is handled with it."""
    service = Service()
    service.put(event="state")
    pools = service.handled

    @service.router.bind_event("first")
    async def first(broker: BrokerManager) -> None:
        pools.append(broker.state["pool"])

    service.put(event="first")
    async with leaves_nothing(service), service.lives():
        await until(lambda: service.committed == {0: 2})
    assert ["connections"] == pools
    assert [] == service.dead


def test_a_route_and_a_handler_under_a_test_client() -> None:
    """In real time, with the loop of the client: the route asks, and the handler has the state."""
    service = Service()

    async def ask(broker: Broker) -> Any:
        return (await broker.request("Works", "state", timeout=5)).data

    service.app.add_api_route("/ask", ask)

    for _ in range(2):  # it can be started again, in another loop
        with TestClient(service.app) as client:
            assert "connections" == client.get("/ask").json()
        assert not service.broker_manager.ready


# Starts and ends that fail


@virtual
async def test_an_application_that_does_not_start_stops_the_broker() -> None:
    """At once: its error is raised, nothing was handled, and the next start works."""
    service = Service()

    async def fail() -> None:
        service.put("early")
        await asyncio.sleep(0.1)
        raise LookupError

    service.start = fail
    async with leaves_nothing(service):
        began = _now()
        with pytest.raises(LookupError):
            await service.lives().__aenter__()
        assert not service.broker_manager.ready
        assert [] == service.handled
        assert _now() - began < 1
    service.start = service._nothing
    async with leaves_nothing(service), service.lives():
        await until(lambda: service.handled == ["early"])


@virtual
async def test_an_application_that_starts_without_events_ends_at_once() -> None:
    """A stop waits for nothing that there is not."""
    service = Service()
    async with leaves_nothing(service):
        async with service.lives():
            await _a_while()
            began = _now()
        assert _now() - began < 1


@virtual
async def test_an_application_that_fails_as_it_ends_stops_the_broker() -> None:
    """What was handled is committed, and its error is raised."""
    service = Service()

    async def fail() -> None:
        raise LookupError

    service.finish = fail
    async with leaves_nothing(service):
        with pytest.raises(LookupError):
            async with service.lives():
                await service.asks()
        assert not service.broker_manager.ready
    assert {0: 1} == service.committed


@virtual
async def test_an_error_within_the_application_stops_the_broker() -> None:
    """It ends as it would otherwise, and the error is raised."""
    service = Service()

    async def fail() -> None:
        async with service.lives():
            await service.asks()
            raise LookupError

    async with leaves_nothing(service):
        with pytest.raises(LookupError):
            await fail()
        assert not service.broker_manager.ready
    assert ["starts", "ends"] == service.seen


@virtual
async def test_an_application_does_not_start_without_kafka() -> None:
    """Its own lifespan is not even begun."""
    service = Service(start_timeout=1)
    service.cluster.down()
    async with leaves_nothing(service):
        with pytest.raises(BrokerUnavailableError):
            await service.lives().__aenter__()
    assert [] == service.seen


@virtual
@pytest.mark.parametrize("count", range(0, 30, 3))
async def test_a_start_that_is_cancelled_leaves_nothing(count: int) -> None:
    """In whichever turn: what had started has ended, and nothing is left."""
    service = Service()
    async with leaves_nothing(service):
        context = service.lives()
        starting: asyncio.Task[Any] = asyncio.create_task(context.__aenter__())
        for _ in range(count):
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        if not starting.cancelled():
            await context.__aexit__(None, None, None)
        await service.broker_manager.stop()
    assert service.seen in ([], ["starts", "ends"])


# Somebody else's broker


@virtual
@pytest.mark.parametrize("door", ["async with", "init_consumer"])
async def test_a_broker_that_was_started_before_goes_on(door: str) -> None:
    """It handles before the application starts and after it has ended; who started it stops it."""
    service = Service()
    broker = service.broker_manager
    async with leaves_nothing(service):
        await (broker.__aenter__() if door == "async with" else broker.init_consumer())
        assert "before" == await service.asks(data="before")
        async with service.lives():
            assert "connections" == await service.asks("state")
        assert broker.ready
        assert "after" == await service.asks(data="after")
        await (broker.__aexit__(None, None, None) if door == "async with" else broker.stop())
        assert not broker.ready


@virtual
async def test_an_application_outlives_who_started_the_broker() -> None:
    """The last one to leave stops it; until then everything goes on."""
    service = Service()
    async with leaves_nothing(service):
        async with service.broker_manager:
            context = service.lives()
            await context.__aenter__()
        assert "still here" == await service.asks(data="still here")
        await context.__aexit__(None, None, None)
        assert not service.broker_manager.ready


@virtual
async def test_two_applications_share_a_broker() -> None:
    """Events are handled until the last of them ends, with the state of both."""
    service = Service()
    second = Starlette(lifespan=_second)
    service.broker_manager.init_consumer_app(second)
    async with leaves_nothing(service):
        async with second.router.lifespan_context(second):
            async with service.lives():
                assert "connections" == await service.asks("state")
            assert "still here" == await service.asks(data="still here")
        assert {"pool": "connections", "second": 2} == service.broker_manager.state


@asynccontextmanager
async def _second(_: Any) -> AsyncIterator[dict[str, Any]]:
    yield {"second": 2}


@virtual
async def test_the_end_of_an_application_is_not_the_end_of_a_broker_it_shares() -> None:
    """A broker that was stopped meanwhile is stopped; the application ends as ever."""
    service = Service()
    async with leaves_nothing(service), service.lives():
        await service.broker_manager.stop()
    assert ["starts", "ends"] == service.seen
