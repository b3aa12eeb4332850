"""`Broker`, the running broker as a dependency of a route."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header
from starlette.requests import HTTPConnection

from kafka_broker._caller import caller_now
from kafka_broker._manager import BrokerManager
from kafka_broker._problems import TIMEOUT_HEADER
from kafka_broker.errors import BrokerClosedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RequestTimeout = Annotated[
    float | None,
    Header(
        alias=TIMEOUT_HEADER,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which the caller gives up, so that nothing is done for nobody.",
    ),
]


def broker_from(name: str | None = None) -> Callable[..., Awaitable[BrokerManager]]:
    """Return the dependency that gives a broker of the application.

    It is the same function for the same name, so that ``app.dependency_overrides[broker_from()]``
    replaces it in tests. A route that has it takes the header ``X-Request-Timeout``, in seconds:
    its waits for replies end by then, at the latest.

    Args:
        name: of a module, or the key in the lifespan's state; the first broker unless given.

    Raises:
        BrokerClosedError: from the dependency: no such broker runs with the application.
    """
    return _dependency(name)


@cache  # of one form of call: broker_from(), (None) and (name=None) would be three functions
def _dependency(name: str | None) -> Callable[..., Awaitable[BrokerManager]]:
    async def running_broker(
        connection: HTTPConnection, seconds: RequestTimeout = None
    ) -> BrokerManager:
        caller = caller_now.get()
        is_request = connection.scope["type"] == "http"  # a WebSocket has many waits
        if caller is not None and seconds is not None and is_request:
            caller.expect_answer(seconds)
        return _find(connection, name)

    return running_broker


def _find(connection: HTTPConnection, name: str | None) -> BrokerManager:
    for key in ("broker",) if name is None else (f"broker:{name}", name):
        broker: Any = getattr(connection.state, key, None)
        if isinstance(broker, BrokerManager):
            return broker
    state = connection.scope.get("state", {})
    others = sorted(key.removeprefix("broker:") for key in state if key.startswith("broker:"))
    which = "broker" if name is None else f"broker {name!r}"
    if others:
        raise BrokerClosedError(f"no {which} runs with this application, but {', '.join(others)}")
    msg = (
        f"no {which} runs with this application: pass lifespan=broker_manager.lifespan to FastAPI "
        "or call broker_manager.init_consumer_app(app), and run the app's lifespan; that of an "
        "application which is mounted in another one is not run, so give it to the outer one"
    )
    raise BrokerClosedError(msg)


Broker = Annotated[BrokerManager, Depends(broker_from())]
"""The broker that runs with the application: ``async def route(broker: Broker)``."""
