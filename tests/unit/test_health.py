"""Health: what a broker says of itself, and what the probes make of it."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from tests.unit.test_engine import Works, leaves_nothing, until

from kafka_broker import BrokerManager, EventObject
from kafka_broker._health import Health
from kafka_broker._transport.memory import MemoryTransport
from kafka_broker._transport.memory_consumer import MemoryReader, MemorySubscription
from kafka_broker.errors import BrokerUnavailableError
from kafka_broker.fastapi import health_router

if TYPE_CHECKING:
    from collections.abc import Sequence

virtual = pytest.mark.looptime


class Slow(Works):
    """Virtual minutes pass quickly where little is to be done in them."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"commit_interval": 1.0, **values})


def well(health: Health) -> dict[str, bool]:
    return {name: check.ok for name, check in health.checks.items()}


def state(broker: BrokerManager) -> tuple[bool, bool, str]:
    health = broker.health()
    return health.live, health.ready, health.checks["life"].detail


async def ready(broker: BrokerManager, *, within: float = 5) -> None:
    await until(lambda: broker.health().ready, within)


async def for_ever() -> Any:
    await asyncio.get_running_loop().create_future()


ALL_WELL = dict.fromkeys(("life", "kafka", "replies", "outbox", "events", "postponed events"), True)


# Life


@virtual
async def test_a_broker_tells_of_its_life() -> None:
    """Not started, starts, running, stops, stopped: only one that runs is ready."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works):
        assert (True, False, "not started") == state(broker)
        assert {"life": False} == well(broker.health())
        works.cluster.down()
        starting = broker.init_consumer()
        await asyncio.sleep(1)
        assert (True, False, "starts") == state(broker)
        works.cluster.up()
        await starting
        await ready(broker)
        assert (True, True, "running") == state(broker)
        assert ALL_WELL == well(broker.health())
        assert "Works" == broker.health().module
        works.put("a", event="wait")
        await until(lambda: works.begun == ["a"])
        stopping = asyncio.create_task(broker.stop())
        await asyncio.sleep(3)
        assert (True, False, "stops") == state(broker)
        assert 3 == pytest.approx(broker.health().checks["life"].age)
        works.go.set()
        await stopping
        assert (True, False, "stopped") == state(broker)
    assert ["a"] == works.handled


@virtual
async def test_a_broker_that_starts_again_is_ready_again() -> None:
    """Nothing of its first life is left in its health."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works):
        for _ in range(2):
            async with broker:
                await ready(broker)
                assert ALL_WELL == well(broker.health())
            assert not broker.health().ready


@virtual
async def test_a_broker_that_waits_for_the_end_of_its_last_life_is_not_ready() -> None:
    """It starts when that one has drained."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works):
        await broker.init_consumer()
        works.put("a", event="wait")
        await until(lambda: works.begun == ["a"])
        stopping = asyncio.create_task(broker.stop())
        await asyncio.sleep(0.1)
        starting = broker.init_consumer()
        await asyncio.sleep(1)
        assert (True, False, "starts") == state(broker)
        works.go.set()
        await starting
        await stopping
        await ready(broker)
        await broker.stop()


@virtual
async def test_a_broker_whose_own_task_died_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a new process helps: neither live nor ready, and it says so."""
    works = Slow()
    broker = works.broker()

    async def dies(_: object) -> None:
        raise ZeroDivisionError

    async with leaves_nothing(works):
        await broker.init_consumer()
        await ready(broker)
        monkeypatch.setattr(MemoryReader, "fetch", dies)
        await until(lambda: not broker.health().live)
        assert (False, False, "failed") == state(broker)
        await broker.stop()
        assert (False, False, "failed") == state(broker)


@virtual
async def test_a_start_that_failed_is_a_failure() -> None:
    """As of a task that died."""
    works = Slow(start_timeout=1)
    broker = works.broker()
    works.cluster.down()
    async with leaves_nothing(works):
        with pytest.raises(BrokerUnavailableError):
            await broker.init_consumer()
        assert (False, False, "failed") == state(broker)


@virtual
async def test_a_broker_without_a_router_is_asked_about_less() -> None:
    """It has no topic for postponed events."""
    broker = BrokerManager("Works", bootstrap_servers=f"memory://{uuid.uuid4().hex}")
    async with broker:
        await ready(broker)
        assert {"life", "kafka", "replies", "outbox", "events"} == set(broker.health().checks)


# Kafka


@virtual
@pytest.mark.parametrize("silent", [True, False])
async def test_an_outage_makes_it_unready_and_not_dead(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    silent: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    """Fifteen seconds without an answer, be it an error or silence; one answer heals it.

    The log tells of each once.
    """
    works = Slow()
    broker = works.broker()

    async def partitions(*_: object) -> int:
        if silent:
            await for_ever()
        raise BrokerUnavailableError

    async with leaves_nothing(works), broker:
        await ready(broker)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryTransport, "partitions", partitions)
            await asyncio.sleep(11)
            assert broker.health().ready
            await asyncio.sleep(7)
            assert (True, False, "running") == state(broker)
            assert {**ALL_WELL, "kafka": False} == well(broker.health())
            assert 15 <= broker.health().checks["kafka"].age <= 18
            await asyncio.sleep(200)
            assert (True, False, "running") == state(broker)
        await ready(broker, within=3)
        assert broker.health().checks["kafka"].age < 3.1
    told = [one.getMessage() for one in caplog.records if "answer" in one.getMessage()]
    assert ["Kafka has not answered", "Kafka answers again"] == [text[:22].strip() for text in told]


@virtual
async def test_a_cluster_that_is_down_for_long_is_survived() -> None:
    """Four minutes: never dead, ready again when it is back."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        works.cluster.down()
        for _ in range(4):
            await asyncio.sleep(60)
            assert (True, False, "running") == state(broker)
        works.cluster.up()
        await ready(broker, within=20)


@virtual
async def test_ages_stay_small_while_nothing_happens() -> None:
    """An idle broker is well for minutes: every age is seconds."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        for _ in range(20):
            await asyncio.sleep(10)
            health = broker.health()
            assert health.ready
            ages = [check.age for name, check in health.checks.items() if name != "life"]
            assert max(ages) < 5


# Outbox


@virtual
async def test_an_event_that_cannot_leave_makes_it_unready() -> None:
    """Not at once: after fifteen seconds, until it has gone."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        with works.cluster.hold_sends("Works"):
            delivery = broker.produce("Works", EventObject(event="note"))
            await asyncio.sleep(10)
            assert broker.health().ready
            await asyncio.sleep(6)
            assert {**ALL_WELL, "outbox": False} == well(broker.health())
            assert broker.health().live
            check = broker.health().checks["outbox"]
            assert "1 events wait" == check.detail
            assert 16 == pytest.approx(check.age)
        await delivery
        assert broker.health().ready


@virtual
async def test_an_event_for_a_topic_that_is_not_there_leaves_it_ready() -> None:
    """That says nothing about Kafka; the others go on, also behind one that was given up."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        asking = asyncio.create_task(broker.request("Nowhere", "note", timeout=5))
        await asyncio.sleep(0)
        behind = broker.produce("Nowhere", EventObject(event="note"))
        await asyncio.wait({asking})
        assert isinstance(asking.exception(), Exception)
        await asyncio.sleep(18)
        assert ALL_WELL == well(broker.health())
        works.cluster._node.create([_topic("Nowhere")], "")
        await behind


def _topic(name: str) -> Any:
    from kafka_broker._transport import TopicSpec  # noqa: PLC0415  # only here

    return TopicSpec(name, 1)


# Events


@virtual
async def test_handlers_that_keep_up_reading_are_no_fault() -> None:
    """Reading stops until there is room for more: that is back-pressure, for however long."""
    works = Slow(in_flight_events=4, concurrency=2, handler_timeout=10_000)
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        for number in range(20):
            works.put(number, event="wait")
        await until(lambda: len(works.begun) == 2)
        await asyncio.sleep(40)
        health = broker.health()
        assert (True, True, ALL_WELL) == (health.live, health.ready, well(health))
        assert "waits for handlers before it reads on" == health.checks["events"].detail
        works.go.set()
        await until(lambda: len(works.handled) == 20)
        await until(lambda: works.committed == {0: 20})
        assert broker.health().ready


@virtual
@pytest.mark.parametrize("name", ["events", "replies"])
async def test_a_loop_that_never_goes_round_again_is_dead(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Unready after fifteen seconds, dead after minutes; the others are well."""
    works = Slow()
    broker = works.broker()
    reader: Any = MemorySubscription if name == "events" else MemoryReader
    fetch = reader.fetch

    async def fetches(self: Any, *args: Any, **more: Any) -> Sequence[Any]:
        if self.topic in {"Works", broker._run and broker._run._inbox.topic}:
            await for_ever()
        records: Sequence[Any] = await fetch(self, *args, **more)
        return records

    async with leaves_nothing(works), broker:
        await ready(broker)
        with monkeypatch.context() as patch:
            patch.setattr(reader, "fetch", fetches)
            await asyncio.sleep(20)
            assert {**ALL_WELL, name: False} == well(broker.health())
            await asyncio.sleep(90)
            assert broker.health().live
            await asyncio.sleep(80)
            assert (False, False) == (broker.health().live, broker.health().ready)


@virtual
async def test_without_a_first_assignment_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not for a moment: a rollout waits until its new replica takes part."""
    works = Slow()
    broker = works.broker()
    start = MemorySubscription.start
    with monkeypatch.context() as patch:
        patch.setattr(MemorySubscription, "start", lambda *_: None)
        async with leaves_nothing(works):
            await broker.init_consumer()
            for _ in range(10):
                assert {**ALL_WELL, "events": False, "postponed events": False} == well(
                    broker.health()
                )
                assert "it has no partitions" == broker.health().checks["events"].detail
                await asyncio.sleep(10)
            assert broker.health().live
            patch.setattr(MemorySubscription, "start", start)
            works.cluster.rebalance("Works")
            works.cluster.rebalance("Works.retry")
            await ready(broker)
            await broker.stop()


@virtual
async def test_a_replica_that_no_partition_is_left_for_is_ready() -> None:
    """It stands by; it can ask, and takes over when the other one goes."""
    works = Slow(partitions=1)
    first, second = works.broker(), works.broker()
    async with leaves_nothing(works), first, second:
        await until(lambda: works.cluster.members("Works") == 2)
        await ready(first)
        await ready(second)
        details = {one.health().checks["events"].detail for one in (first, second)}
        assert {"reads 1 partitions", "stands by"} == details


@virtual
async def test_a_rebalance_leaves_it_ready() -> None:
    """A handler runs on for half of its time; the probe sees nothing of it."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        works.put("a", event="wait")
        await until(lambda: works.begun == ["a"])
        works.cluster.rebalance("Works")
        for _ in range(40):
            await asyncio.sleep(0.5)
            assert (True, True, ALL_WELL) == (*state(broker)[:2], well(broker.health()))
        works.go.set()


@virtual
async def test_a_long_rebalance_leaves_it_ready() -> None:
    """A service whose handlers may take a minute has set its rebalance_timeout accordingly."""
    works = Slow(rebalance_timeout=120.0)
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        works.put("a", event="wait")
        await until(lambda: works.begun == ["a"])
        works.cluster.rebalance("Works")
        for second in range(50):
            await asyncio.sleep(1)
            assert broker.health().ready, (second, broker.health())
        works.go.set()
        await until(lambda: works.committed == {0: 1})
        await ready(broker)


@virtual
async def test_a_rebalance_that_does_not_end_makes_it_unready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its partitions were given up and none come back: after the grace, which is its timeouts'."""
    works = Slow(rebalance_timeout=20.0, session_timeout=10.0)
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        with monkeypatch.context() as patch:
            patch.setattr(MemorySubscription, "start", lambda *_: None)
            works.cluster.rebalance("Works")
            await asyncio.sleep(28)
            assert (True, "its partitions move") == (
                broker.health().ready,
                broker.health().checks["events"].detail,
            )
            await asyncio.sleep(4)
            assert {**ALL_WELL, "events": False} == well(broker.health())
            assert broker.health().live
        works.cluster.rebalance("Works")
        await ready(broker)


@virtual
async def test_a_subscription_that_broke_is_not_a_fault_for_a_while() -> None:
    """It is replaced, as are the replies' reader; that takes less than the grace."""
    works = Slow()
    broker = works.broker()
    async with leaves_nothing(works), broker:
        await ready(broker)
        works.cluster.break_readers("Works")
        for _ in range(50):
            await asyncio.sleep(0.1)
            assert broker.health().ready
        works.put("a")
        await until(lambda: works.handled == ["a"])


# Probes


def probed(*brokers: BrokerManager) -> FastAPI:
    app = FastAPI()
    for broker in brokers:
        broker.init_consumer_app(app)
    app.include_router(health_router)
    return app


async def probe(app: FastAPI, path: str, state: Any) -> tuple[int, Any]:
    async def served(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    transport = httpx2.ASGITransport(served)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get(path)
    assert "no-store" == answer.headers["cache-control"]
    return answer.status_code, answer.json()


@virtual
async def test_probes_tell_of_every_broker() -> None:
    """200 where all are well, else 503; the body says which one, and why."""
    works = Slow()
    broker = works.broker()
    other = BrokerManager("Other", bootstrap_servers=works.values["bootstrap_servers"])
    app = probed(broker, other)
    async with leaves_nothing(works), app.router.lifespan_context(app) as lives:
        await ready(broker)
        await ready(other)
        for path in ("/livez", "/readyz"):
            status, body = await probe(app, path, lives)
            assert (200, "ok") == (status, body["status"])
            assert ["Works", "Other"] == [one["module"] for one in body["brokers"]]
        first = body["brokers"][0]
        assert {"module", "live", "ready", "checks"} == set(first)
        assert {"ok": True, "detail": "reads 1 partitions"} == {
            name: first["checks"]["events"][name] for name in ("ok", "detail")
        }
        assert isinstance(first["checks"]["kafka"]["age"], float)
        await other.stop()
        status, body = await probe(app, "/readyz", lives)
        assert (503, "unavailable") == (status, body["status"])
        assert [True, False] == [one["ready"] for one in body["brokers"]]
        assert "stopped" == body["brokers"][1]["checks"]["life"]["detail"]
        assert 200 == (await probe(app, "/livez", lives))[0]


@virtual
async def test_a_broker_that_failed_fails_both_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a new process is made."""
    works = Slow()
    broker = works.broker()
    app = probed(broker)

    async def dies(_: object) -> None:
        raise ZeroDivisionError

    async with leaves_nothing(works):
        lifespan = app.router.lifespan_context(app)
        lives = await lifespan.__aenter__()
        monkeypatch.setattr(MemoryReader, "fetch", dies)
        await until(lambda: not broker.health().live)
        for path in ("/livez", "/readyz"):
            status, body = await probe(app, path, lives)
            assert (503, "unavailable") == (status, body["status"])
        with pytest.raises(ZeroDivisionError):
            await lifespan.__aexit__(None, None, None)


@virtual
async def test_probes_of_an_application_without_a_broker_are_unavailable() -> None:
    """It was forgotten, or its lifespan does not run; better told than healthy."""
    app = probed()
    for path in ("/livez", "/readyz"):
        status, body = await probe(app, path, {})
        assert (503, "unavailable", []) == (status, body["status"], body["brokers"])
        assert "no broker runs with this application" == body["detail"]


def test_probes_answer_a_test_client() -> None:
    """In real time; while a broker of a composed lifespan runs, by the same router."""
    broker = BrokerManager("Works", bootstrap_servers=f"memory://{uuid.uuid4().hex}")
    app = FastAPI(lifespan=broker.lifespan)
    app.include_router(health_router)
    with TestClient(app) as client:
        assert 200 == client.get("/livez").status_code
        assert {"/livez", "/readyz"} <= set(client.get("/openapi.json").json()["paths"])
