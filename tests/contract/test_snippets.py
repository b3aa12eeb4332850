"""The snippets of the library's contract run word for word, in memory and on a real Kafka.

Only the address is put in: a snippet says ``localhost:9092`` or takes it from the environment.
"""

from __future__ import annotations

import asyncio
import textwrap
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import httpx2 as httpx
import pytest
from fastapi import Depends, FastAPI
from pydantic import BaseModel

import kafka_broker
from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker.fastapi import Broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# ruff: noqa: E501  # the snippets stand here word for word
SCRIPT = """
async with BrokerManager("Orders", bootstrap_servers="localhost:9092") as broker:
    correlation_id = str(uuid.uuid4())
    broker.produce("Payments", EventObject(correlation_id=correlation_id, event="card.charge", data={"amount": 3}))
    reply = await broker.consumer_storage.consume(correlation_id, timeout=5)
"""

REQUEST = """
reply = await broker.request("Payments", "card.charge", {"amount": 3}, timeout=5, response=Receipt)
"""

FASTAPI = """
app = FastAPI(lifespan=broker_manager.lifespan)
@app.get("/charge")
async def charge(broker: Broker): ...
"""

FASTAPI_AFTERWARDS = """
app = FastAPI()
@app.get("/charge")
async def charge(broker: Broker): ...
broker_manager.init_consumer_app(app)
"""

ROUTING = """
event_router = EventRouter("module")
test_router = EventRouter("test")
@test_router.bind_event("return")
def return_event(event_object: EventObject):
    event_object.data = some_function()
    event_object.event = "respond"
    broker_manager.produce("SomeModule", event_object)
event_router.include_binder(test_router)
"""

SERVICE = """
async with BrokerManager("Payments", router=event_router) as broker:
    await broker.wait_closed()
"""

OWN_LOOP = """
broker_manager.init_consumer()
while True:
    await asyncio.sleep(1)
    data = await broker_manager.consumer_storage.consume_all()
    if data:
        for _, event_object in data.items():
            event_router.execute_event(event_object)
"""


class Receipt(BaseModel):
    """What a charge answers with."""

    amount: int


def _names(**more: Any) -> dict[str, Any]:
    public = {name: getattr(kafka_broker, name) for name in kafka_broker.__all__}
    return {**public, "asyncio": asyncio, "uuid": uuid, **more}


async def _run(snippet: str, servers: str, **names: Any) -> dict[str, Any]:
    """Execute a snippet inside a coroutine; returns its local names."""
    body = textwrap.indent(snippet.replace("localhost:9092", servers), "    ")
    scope = _names(**names)
    exec(f"async def snippet():\n{body}\n    return locals()", scope)  # noqa: S102
    result: dict[str, Any] = await scope["snippet"]()
    return result


def _define(snippet: str, **names: Any) -> dict[str, Any]:
    scope = _names(**names)
    exec(snippet, scope)  # noqa: S102  # the snippet is the test
    return scope


@asynccontextmanager
async def _payments(servers: str) -> AsyncIterator[None]:
    """Answer ``card.charge`` as the module Payments."""
    router = EventRouter("Payments")

    @router.bind_event("card.charge")
    async def charge(event: EventObject) -> dict[str, int]:
        return {"amount": event.data["amount"]}

    async with BrokerManager("Payments", router=router, bootstrap_servers=servers):
        yield


@pytest.fixture
def environment(bootstrap_servers: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Configure brokers by the environment, as their users do."""
    monkeypatch.setenv("KAFKA_BROKER_BOOTSTRAP_SERVERS", bootstrap_servers)
    monkeypatch.setenv("KAFKA_BROKER_MODULE", "SomeModule")
    return bootstrap_servers


async def test_script(bootstrap_servers: str) -> None:
    """(a) A script produces an event and consumes its reply."""
    async with _payments(bootstrap_servers):
        names = await _run(SCRIPT, bootstrap_servers)
    assert {"amount": 3} == names["reply"].data
    assert ["Orders", "Payments"] == [hop.location for hop in names["reply"].audit_log]


async def test_request_with_a_model(bootstrap_servers: str) -> None:
    """(b) The same in one call; the reply's data is the model."""
    async with (
        _payments(bootstrap_servers),
        BrokerManager("Orders", bootstrap_servers=bootstrap_servers) as broker,
    ):
        names = await _run(REQUEST, bootstrap_servers, broker=broker, Receipt=Receipt)
    assert Receipt(amount=3) == names["reply"].data


@pytest.mark.parametrize("snippet", [FASTAPI, FASTAPI_AFTERWARDS])
@pytest.mark.usefixtures("environment")
async def test_fastapi(snippet: str) -> None:
    """(c) The default instance runs with the application, and a route gets it as a dependency."""
    seen = []

    async def remember(broker: Broker) -> BrokerManager:
        seen.append(broker)
        return broker

    dependency = Annotated[BrokerManager, Depends(remember)]
    manager = BrokerManager()
    app = _define(snippet, FastAPI=FastAPI, Broker=dependency, broker_manager=manager)["app"]
    async with app.router.lifespan_context(app) as state:
        transport = httpx.ASGITransport(app=_with_state(app, state))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.get("/charge")
        assert manager.ready
    assert 200 == response.status_code
    assert [manager] == seen
    assert not manager.ready


def _with_state(app: Any, state: dict[str, Any]) -> Any:
    """Hand the lifespan's state to each request, as an ASGI server does."""

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    return with_state


@pytest.mark.usefixtures("environment")
async def test_routing() -> None:
    """(d, e) A handler answers with produce() to the module that asked."""
    manager = BrokerManager("module")
    router = _define(ROUTING, broker_manager=manager, some_function=lambda: {"some": 1})
    manager.router = router["event_router"]
    async with manager, BrokerManager("SomeModule") as asking:
        reply = await asking.request("module", "test.return", {}, timeout=10)
    assert ("respond", "completed", {"some": 1}) == (reply.event, reply.status, reply.data)


async def test_service(environment: str) -> None:
    """(e) A service runs until it is told to stop."""
    router = EventRouter("Payments")
    router.bind_event("ping")(lambda: "pong")
    managers = []

    class Remembered(BrokerManager):
        def __init__(self, *args: Any, **values: Any) -> None:
            super().__init__(*args, **values)
            managers.append(self)

    names = {"BrokerManager": Remembered, "event_router": router}
    service = asyncio.create_task(_run(SERVICE, environment, **names))
    async with BrokerManager("Orders") as asking:
        assert "pong" == (await asking.request("Payments", "ping", timeout=10)).data
    await managers[0].stop()
    await asyncio.wait_for(service, 20)


async def test_own_loop(environment: str) -> None:
    """(f) A loop of the user's own takes everything and executes it."""
    handled: asyncio.Future[EventObject] = asyncio.get_running_loop().create_future()
    router = EventRouter("SomeModule")
    manager = BrokerManager()

    @router.bind_event("test.return")
    async def take(event: EventObject) -> None:
        if not handled.done():
            handled.set_result(event)

    loop = asyncio.create_task(
        _run(OWN_LOOP, environment, broker_manager=manager, event_router=router)
    )
    async with BrokerManager("Orders") as asking:
        await asking.produce("SomeModule", EventObject(event="test.return", data={"n": 1}))
        event = await asyncio.wait_for(handled, 20)
    loop.cancel()
    await asyncio.wait({loop})
    await manager.stop()
    assert {"n": 1} == event.data
