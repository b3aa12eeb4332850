"""`PendingReplies`: answered with 202 at once, fetched when the reply is there."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from pydantic import BaseModel
from tests.unit.test_caller import Exchange
from tests.unit.test_engine import Works, leaves_nothing, until
from tests.unit.test_fastapi import Serving

from kafka_broker import BrokerManager, EventObject, Reject
from kafka_broker.errors import BrokerClosedError, ConfigurationError, OutboxFullError
from kafka_broker.fastapi import Accepted, Broker, PendingReplies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from kafka_broker._delivery import Delivery

virtual = pytest.mark.looptime


class Receipt(BaseModel):
    number: int


class Later(Serving):
    """An application whose route answers 202, and its client."""

    def __init__(self, works: Works, **limits: Any) -> None:
        super().__init__(works)
        self.replies = PendingReplies(**limits)
        self.app.include_router(self.replies.router)
        self.app.add_api_route("/ask/{event}", self._ask, methods=["POST"], status_code=202)

    async def _ask(
        self, broker: Broker, event: str, data: int = 0, timeout: float = 1000
    ) -> Accepted:
        return await self.replies.ask(broker, "Works", event, data, timeout=timeout)

    async def ask_later(self, event: str = "wait", **params: Any) -> str:
        """Ask, and return the location of the reply."""
        answer = await self.client.post(f"/ask/{event}", params=params)
        assert 202 == answer.status_code
        location: str = answer.json()["location"]
        return location

    async def get(self, location: str, **params: Any) -> tuple[int, Any]:
        answer = await self.client.get(location, params=params)
        return answer.status_code, answer.json()

    async def events(self, location: str) -> list[tuple[str, Any]]:
        answer = await self.client.get(f"{location}/events")
        assert (200, "text/event-stream") == (
            answer.status_code,
            answer.headers["content-type"].split(";")[0],
        )
        told = []
        for event in answer.text.split("\n\n"):
            fields = [line.partition(": ")[::2] for line in event.splitlines()]
            named = {name: value for name, value in fields if name}
            if named:
                told.append((named["event"], json.loads(named["data"])))
        return told


@asynccontextmanager
async def later(**limits: Any) -> AsyncIterator[Later]:
    """Run the application and the service that it asks, and check that nothing is left."""
    works = Works(handler_timeout=10_000, commit_interval=1)
    one = Later(works, **limits)
    transport = httpx2.ASGITransport(one.served)
    async with leaves_nothing(works), works.broker():
        async with (
            one.app.router.lifespan_context(one.app) as state,
            httpx2.AsyncClient(transport=transport, base_url="http://test") as one.client,
        ):
            one.state = state
            yield one
            works.go.set()
        assert (0, 0) == (one.waiting, len(one.replies))


# Polls


@virtual
async def test_a_reply_is_fetched_when_it_is_there() -> None:
    """202 with the same body and Retry-After before, 200 with the event after, each time."""
    async with later() as one:
        accepted = await one.client.post("/ask/wait", params={"data": 7})
        body = accepted.json()
        assert {"correlation_id", "location"} == set(body)
        assert f"/replies/{body['correlation_id']}" == body["location"]
        pending = await one.client.get(body["location"])
        assert (202, body, "1") == (
            pending.status_code,
            pending.json(),
            pending.headers["retry-after"],
        )
        one.works.go.set()
        await until(lambda: one.waiting == 0)
        first, second = await one.get(body["location"]), await one.get(body["location"])
        assert first == second
        status, event = first
        assert (200, 7, body["correlation_id"]) == (status, event["data"], event["correlation_id"])
        assert ("respond", "COMPLETED") == (event["event"], event["status"].upper())


@virtual
async def test_it_is_answered_before_the_reply_is_there() -> None:
    """And after the request is on its way."""
    async with later() as one:
        await one.ask_later()
        assert (1, 1) == (one.waiting, len(one.replies))
        await until(lambda: len(one.works.begun) == 1)


@virtual
async def test_a_long_poll_ends_with_the_reply_or_with_its_time() -> None:
    """Whichever is first."""
    async with later() as one:
        loop = asyncio.get_running_loop()
        location = await one.ask_later(data=7)
        began = loop.time()
        assert 202 == (await one.get(location, timeout=10))[0]
        assert 10 == pytest.approx(loop.time() - began, abs=0.1)
        loop.call_later(3, one.works.go.set)
        began = loop.time()
        status, event = await one.get(location, timeout=30)
        assert (200, 7) == (status, event["data"])
        assert 3 == pytest.approx(loop.time() - began, abs=0.5)


@virtual
@pytest.mark.parametrize("timeout", ["-1", "30.1", "1e9", "nan", "inf", "soon", ""])
async def test_a_long_poll_has_its_bounds(timeout: str) -> None:
    """From none to 30 seconds; FastAPI's 422 otherwise."""
    async with later() as one:
        location = await one.ask_later()
        answer = await one.client.get(location, params={"timeout": timeout})
        assert 422 == answer.status_code


@virtual
async def test_an_unknown_reply_is_404() -> None:
    """As a problem, or as the event of one."""
    async with later() as one:
        answer = await one.client.get("/replies/nobodys")
        assert (404, "application/problem+json") == (
            answer.status_code,
            answer.headers["content-type"],
        )
        assert ("unknown-reply", "urn:kafka-broker:unknown-reply") == (
            answer.json()["code"],
            answer.json()["type"],
        )
        assert [("problem", answer.json())] == await one.events("/replies/nobodys")


@virtual
async def test_a_failure_is_its_problem_each_time() -> None:
    """As a route that had waited would answer it."""
    async with later() as one:

        @one.works.router.bind_event("refuse")
        async def refuse() -> None:
            raise Reject(404, "no such order", code="no-order")

        location = await one.ask_later("refuse")
        first = await one.get(location, timeout=5)
        assert first == await one.get(location)
        assert (404, "no-order", "no such order") == (
            first[0],
            first[1]["code"],
            first[1]["detail"],
        )
        assert location.endswith(first[1]["correlation_id"])
        assert [("problem", first[1])] == await one.events(location)


@virtual
async def test_a_request_ends_by_its_timeout() -> None:
    """Nobody has to come for it; who comes is told."""
    async with later() as one:
        location = await one.ask_later(timeout=5)
        await asyncio.sleep(6)
        assert 0 == one.waiting
        assert (504, "reply-timeout") == (
            (await one.get(location))[0],
            (await one.get(location))[1]["code"],
        )


@virtual
async def test_a_reply_is_read_as_the_response_that_was_asked_for() -> None:
    """And is that type's JSON; what cannot be read as it is a problem."""
    async with later() as one:
        accepted = [
            await one.replies.ask(one.broker, "Works", "note", data, response=Receipt)
            for data in ({"number": "7", "more": 1}, {})
        ]
        status, event = await one.get(accepted[0].location, timeout=5)
        assert (200, {"number": 7}) == (status, event["data"])
        status, problem = await one.get(accepted[1].location, timeout=5)
        assert (502, "bad-reply") == (status, problem["code"])


@virtual
async def test_a_reply_that_json_has_no_word_for_can_be_fetched() -> None:
    """Not a number is null, as in FastAPI's own answers."""
    async with later() as one:

        @one.works.router.bind_event("nan")
        async def nan() -> float:
            return math.nan

        location = await one.ask_later("nan")
        status, event = await one.get(location, timeout=5)
        assert (200, None) == (status, event["data"])
        ((kind, told),) = await one.events(location)
        assert ("reply", None) == (kind, told["data"])


# Event streams


@virtual
async def test_an_event_stream_has_the_reply_and_ends() -> None:
    """However long it takes, and when it is there already."""
    async with later() as one:
        location = await one.ask_later(data=7)
        asyncio.get_running_loop().call_later(100, one.works.go.set)
        ((kind, event),) = await one.events(location)
        assert ("reply", 7) == (kind, event["data"])
        assert location.endswith(event["correlation_id"])
        assert [("reply", event)] == await one.events(location)
        assert event == (await one.get(location))[1]


@virtual
async def test_many_may_wait_for_one_reply() -> None:
    """Each gets it."""
    async with later() as one:
        location = await one.ask_later(data=7)
        waits = [asyncio.create_task(one.get(location, timeout=30)) for _ in range(3)]
        streams = [asyncio.create_task(one.events(location)) for _ in range(3)]
        await asyncio.sleep(1)
        one.works.go.set()
        assert [7] * 3 == [event["data"] for _, event in await asyncio.gather(*waits)]
        assert [7] * 3 == [event["data"] for ((_, event),) in await asyncio.gather(*streams)]


# Clients that leave


@virtual
@pytest.mark.parametrize("what", ["", "/events"])
async def test_a_client_that_leaves_does_not_end_the_request(what: str) -> None:
    """Its wait ends, the reply can be fetched by the next one."""
    async with later() as one:
        location = await one.ask_later(data=7)
        await asyncio.sleep(1)
        before = asyncio.all_tasks()
        exchange = Exchange(
            one.served, f"{location}{what}", method="GET", query_string=b"timeout=30"
        )
        exchange.sends(b"")
        exchange.begin()
        await asyncio.sleep(1)
        exchange.leaves()
        await exchange.end(within=2)
        assert 0 == exchange.cancelling
        assert (200 if what else 499) == exchange.status
        await asyncio.sleep(0)
        assert set() == asyncio.all_tasks() - before
        assert (1, 1) == (one.waiting, len(one.replies))
        one.works.go.set()
        assert 200 == (await one.get(location, timeout=5))[0]


@virtual
async def test_a_client_that_leaves_after_202_does_not_end_the_request() -> None:
    """Nor does the time that it has given in X-Request-Timeout."""
    async with later() as one:
        headers = {"x-request-timeout": "1"}
        answer = await one.client.post("/ask/wait", headers=headers)
        await asyncio.sleep(10)
        one.works.go.set()
        assert 200 == (await one.get(answer.json()["location"], timeout=5))[0]


@virtual
@pytest.mark.parametrize("what", ["", "/events"])
async def test_a_poll_that_is_cancelled_by_the_server_leaves_nothing(what: str) -> None:
    """And the request goes on."""
    async with later() as one:
        location = await one.ask_later()
        await asyncio.sleep(1)
        before = asyncio.all_tasks()
        exchange = Exchange(
            one.served, f"{location}{what}", method="GET", query_string=b"timeout=30"
        )
        exchange.sends(b"")
        task = exchange.begin()
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.end(within=2)
        await asyncio.sleep(0)
        assert set() == asyncio.all_tasks() - before
        assert 1 == one.waiting
        one.works.go.set()
        assert 200 == (await one.get(location, timeout=5))[0]


@virtual
async def test_asking_that_is_cancelled_goes_on_and_ends() -> None:
    """It may be on its way; nothing of it is left after its reply and the ttl."""
    async with later(ttl=5) as one:
        asking = asyncio.create_task(one.replies.ask(one.broker, "Works", "note"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        await until(lambda: len(one.works.handled) == 1 and one.waiting == 0)
        await asyncio.sleep(6)
        assert 0 == len(one.replies)


# Limits


@virtual
async def test_more_than_the_limit_are_refused() -> None:
    """503 overloaded, at once, nothing was sent; there is room again when one has ended."""
    async with later(limit=2) as one:
        for _ in range(2):
            await one.ask_later()
        answer = await one.client.post("/ask/wait")
        assert (503, "overloaded") == (answer.status_code, answer.json()["code"])
        assert int(answer.headers["retry-after"]) >= 1
        assert (2, 2) == (one.waiting, len(one.replies))
        one.works.go.set()
        await until(lambda: one.waiting == 0)
        await one.ask_later("note")
        await until(lambda: one.waiting == 0)
        assert 3 == len(one.works.cluster.records("Works"))


@virtual
async def test_more_replies_than_the_limit_forget_the_oldest() -> None:
    """The others are kept."""
    async with later(limit=2) as one:
        locations = []
        for number in range(3):
            locations.append(await one.ask_later("note", data=number))
            await until(lambda: one.waiting == 0)
        assert [404, 200, 200] == [(await one.get(location))[0] for location in locations]
        assert 2 == len(one.replies)


@virtual
async def test_a_reply_is_kept_for_the_ttl() -> None:
    """From its arrival on, however long it took, and however often it is fetched."""
    async with later(ttl=100) as one:
        location = await one.ask_later()
        await asyncio.sleep(200)
        one.works.go.set()
        await until(lambda: one.waiting == 0)
        for _ in range(3):
            await asyncio.sleep(33)
            assert 200 == (await one.get(location))[0]
        await asyncio.sleep(2)
        assert (404, 0) == ((await one.get(location))[0], len(one.replies))


# What is refused at once


@virtual
async def test_data_without_a_form_in_json_is_refused_at_once() -> None:
    """To the one who asks; nothing is pending or kept, and the replies that are kept stay."""
    async with later(limit=3) as one:
        location = await one.ask_later("note")
        await until(lambda: one.waiting == 0)
        for _ in range(10):
            with pytest.raises(TypeError, match="no form in JSON"):
                await one.replies.ask(one.broker, "Works", "note", object())
        await asyncio.sleep(0)
        assert (0, 1) == (one.waiting, len(one.replies))
        assert 200 == (await one.get(location))[0]


@virtual
async def test_a_timeout_that_is_none_is_refused_at_once() -> None:
    """As by request()."""
    async with later() as one:
        with pytest.raises(ConfigurationError):
            await one.replies.ask(one.broker, "Works", "note", timeout=0)
        await asyncio.sleep(0)
        assert 0 == len(one.replies)


def _fill(broker: BrokerManager, data: str) -> Iterator[Delivery]:
    """Produce until the outbox takes no more of this size."""
    with suppress(OutboxFullError):
        while True:
            yield broker.produce("Works", EventObject(event="note", data=data))


@virtual
async def test_a_full_outbox_is_refused_at_once() -> None:
    """503 overloaded, in place of a 202 that cannot be kept."""
    async with later() as one:
        with one.works.cluster.hold_sends("Works"):
            filling = [
                delivery
                for size in (1_000_000, 10_000, 1)
                for delivery in _fill(one.broker, "x" * size)
            ]
            answer = await one.client.post("/ask/note")
            assert (503, "overloaded") == (answer.status_code, answer.json()["code"])
            await asyncio.sleep(0)
            assert 0 == len(one.replies)
        await asyncio.gather(*filling)


@virtual
async def test_a_broker_that_stopped_is_refused_at_once() -> None:
    """503 closed."""
    async with later() as one:
        await one.broker.stop()
        with pytest.raises(BrokerClosedError):
            await one.replies.ask(one.broker, "Works", "note")
        answer = await one.client.post("/ask/note")
        assert (503, "closed") == (answer.status_code, answer.json()["code"])
        await asyncio.sleep(0)
        assert 0 == len(one.replies)


@pytest.mark.parametrize(
    "wrong", [{"limit": 0}, {"limit": -1}, {"ttl": 0}, {"ttl": math.nan}, {"path": "replies"}]
)
def test_limits_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    """As it is made, before any request."""
    with pytest.raises(ConfigurationError):
        PendingReplies(**wrong)


@virtual
@pytest.mark.parametrize(("path", "below"), [("/v1/answers/", "/v1/answers"), ("/", "")])
async def test_replies_may_be_below_another_path(path: str, below: str) -> None:
    """Which their location tells."""
    async with later(path=path) as one:
        accepted = await one.replies.ask(one.broker, "Works", "note", 7)
        assert f"{below}/{accepted.correlation_id}" == accepted.location
        assert 7 == (await one.get(accepted.location, timeout=5))[1]["data"]


# Ends


@virtual
async def test_the_end_of_the_application_ends_what_is_pending() -> None:
    """No task and no timer is left, and the next start begins with none."""
    works = Works()
    one = Later(works)
    transport = httpx2.ASGITransport(one.served)
    async with leaves_nothing(works), works.broker():
        for _ in range(2):
            before = asyncio.all_tasks()
            async with (
                one.app.router.lifespan_context(one.app) as one.state,
                httpx2.AsyncClient(transport=transport, base_url="http://test") as one.client,
            ):
                assert 0 == len(one.replies)
                await one.ask_later()
                await one.ask_later("note")
                await until(lambda: one.waiting == 1)
                assert 2 == len(one.replies)
            await asyncio.sleep(0)
            assert set() == {task for task in asyncio.all_tasks() - before if "Web" in repr(task)}
            assert (0, 0) == (len(one.replies), one.waiting)
        loop: Any = asyncio.get_running_loop()
        timers = [timer for timer in loop._scheduled if not timer.cancelled()]
        assert [] == [timer for timer in timers if "pop" in repr(timer)]
        works.go.set()


@virtual
async def test_a_broker_that_stops_is_a_problem_for_who_waits() -> None:
    """503 closed, for a long poll and a stream that are open, and for whoever comes later."""
    async with later() as one:
        location = await one.ask_later()
        poll = asyncio.create_task(one.get(location, timeout=30))
        stream = asyncio.create_task(one.events(location))
        await asyncio.sleep(1)
        await one.broker.stop()
        status, problem = await poll
        assert (503, "closed") == (status, problem["code"])
        assert [("problem", problem)] == await stream
        assert (503, problem) == await one.get(location)


@virtual
async def test_a_long_poll_that_is_open_at_the_end_of_the_application_ends() -> None:
    """A server that does not wait for it leaves nothing behind."""
    works = Works()
    one = Later(works)
    transport = httpx2.ASGITransport(one.served)
    async with leaves_nothing(works), works.broker():
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as one.client:
            async with one.app.router.lifespan_context(one.app) as one.state:
                location = await one.ask_later()
                poll = asyncio.create_task(one.get(location, timeout=30))
                await asyncio.sleep(1)
            assert 404 == (await poll)[0]
        works.go.set()
