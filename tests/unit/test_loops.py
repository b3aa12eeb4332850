"""Applications in their users' tests: whichever plugin makes the event loop, and how often."""

from __future__ import annotations

from typing import Final

import pytest

pytest_plugins = ["pytester"]

INI: Final = """
[pytest]
addopts = -p no:cacheprovider -p {plugin}
filterwarnings = error
{more}
"""
APPLICATION: Final = """
from fastapi import FastAPI

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker.fastapi import Broker, health_router

router = EventRouter("Shop")


@router.bind_event("double")
async def double(event: EventObject) -> int:
    return 2 * event.data


def routes(app):
    app.include_router(health_router)

    @app.get("/doubled/{number}")
    async def doubled(broker: Broker, number: int) -> int:
        return (await broker.request("Shop", "double", number, timeout=5)).data

    @app.get("/never")
    async def never(broker: Broker) -> None:
        await broker.consumer_storage.consume("never", timeout=0.1)

    return app


def through_lifespan():
    broker = BrokerManager("Shop", router=router, bootstrap_servers="memory://")
    return routes(FastAPI(lifespan=broker.lifespan))


def through_init_consumer_app():
    app = routes(FastAPI())
    BrokerManager("Shop", router=router, bootstrap_servers="memory://").init_consumer_app(app)
    return app


apps = [through_lifespan(), through_init_consumer_app()]
"""
FIXTURES: Final = """
from contextlib import asynccontextmanager

import httpx2
import pytest
{imports}

from application import apps


@asynccontextmanager
async def served(app):
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope, receive, send):  # as a server does
            await app({{**scope, "state": dict(state)}}, receive, send)

        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


{more}
@{fixture}
async def client(request):
    async with served(request.param) as client:
        yield client
"""
TESTS: Final = """
import asyncio

{mark}


async def test_a_reply(client):
    answer = await client.get("/doubled/1")
    assert (200, 2) == (answer.status_code, answer.json())


async def test_many_replies(client):
    answers = await asyncio.gather(*(client.get(f"/doubled/{{n}}") for n in range(20)))
    assert [2 * n for n in range(20)] == [answer.json() for answer in answers]


async def test_a_wait_in_vain(client):
    answer = await client.get("/never")
    assert (504, "reply-timeout") == (answer.status_code, answer.json()["code"])


async def test_it_gets_ready(client):
    async with asyncio.timeout(5):
        while 200 != (await client.get("/readyz")).status_code:
            await asyncio.sleep(0.01)
"""
ASYNCIO_ONLY: Final = """
@pytest.fixture(scope="{scope}")
def anyio_backend():
    return "asyncio"


"""
DEFAULT_MANAGER: Final = """
import pytest
from fastapi import FastAPI

from kafka_broker import EventRouter, broker_manager

router = EventRouter("Shop")
router.bind_event("echo")(lambda event: event.data)
broker_manager.router = router
app = FastAPI()
broker_manager.init_consumer_app(app)


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_it_starts_in_the_loop_of_each_test(number):
    async with app.router.lifespan_context(app):
        assert number == (await broker_manager.request("Shop", "echo", number, timeout=5)).data
    assert not broker_manager.ready


async def test_it_starts_without_an_application():
    async with broker_manager:
        assert 4 == (await broker_manager.request("Shop", "echo", 4, timeout=5)).data


async def test_it_is_left_running():
    await broker_manager.init_consumer()


async def test_it_starts_after_a_loop_that_has_not_stopped_it():
    async with app.router.lifespan_context(app):
        assert 5 == (await broker_manager.request("Shop", "echo", 5, timeout=5)).data
"""


@pytest.fixture(autouse=True)
def _one_plugin_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load what a run names, and none of what happens to be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.mark.parametrize("scope", ["function", "session"])
@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_pytest_asyncio(pytester: pytest.Pytester, mode: str, scope: str) -> None:
    """An application runs in the loop of each test, or in one of the session, in both modes."""
    fixture = "pytest.fixture" if mode == "auto" else "pytest_asyncio.fixture"
    pytester.makeini(
        INI.format(
            plugin="pytest_asyncio.plugin",
            more=(
                f"asyncio_mode = {mode}\n"
                f"asyncio_default_fixture_loop_scope = {scope}\n"
                f"asyncio_default_test_loop_scope = {scope}"
            ),
        )
    )
    pytester.makepyfile(
        application=APPLICATION,
        conftest=FIXTURES.format(
            imports="import pytest_asyncio" if mode == "strict" else "",
            fixture=f"{fixture}(scope={scope!r}, params=apps)",
            more="",
        ),
        test_inner=TESTS.format(
            mark="import pytest\npytestmark = pytest.mark.asyncio" if mode == "strict" else ""
        ),
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=8)


@pytest.mark.parametrize("scope", ["function", "session"])
def test_anyio(pytester: pytest.Pytester, scope: str) -> None:
    """The same under anyio's plugin, where fixtures run in a task of their own."""
    pytester.makeini(INI.format(plugin="anyio.pytest_plugin", more=""))
    pytester.makepyfile(
        application=APPLICATION,
        conftest=FIXTURES.format(
            imports="",
            fixture=f"pytest.fixture(scope={scope!r}, params=apps)",
            more=ASYNCIO_ONLY.format(scope=scope),
        ),
        test_inner=TESTS.format(mark="import pytest\npytestmark = pytest.mark.anyio"),
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=8)


def test_the_default_manager(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """`broker_manager` reads the environment, and starts again in the loop of the next test."""
    monkeypatch.setenv("KAFKA_BROKER_MODULE", "Shop")
    monkeypatch.setenv("KAFKA_BROKER_BOOTSTRAP_SERVERS", "memory://")
    pytester.makeini(
        INI.format(
            plugin="pytest_asyncio.plugin",
            more="asyncio_mode = auto\nasyncio_default_fixture_loop_scope = function",
        )
    )
    pytester.makepyfile(test_inner=DEFAULT_MANAGER)
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=6)
