"""FastAPI: `Broker`, the running broker as a dependency of a route."""

from __future__ import annotations

from typing import Annotated

try:
    from fastapi import Depends
    from starlette.requests import HTTPConnection
except ImportError as _missing:
    msg = "kafka_broker.fastapi needs FastAPI: pip install 'kafka-broker-aio[fastapi]'"
    raise ImportError(msg) from _missing

from kafka_broker._manager import BrokerManager
from kafka_broker.errors import BrokerClosedError

__all__ = ["Broker"]


async def _running_broker(connection: HTTPConnection) -> BrokerManager:
    broker = getattr(connection.state, "broker", None)
    if not isinstance(broker, BrokerManager):
        msg = (
            "this application has no running broker: pass lifespan=broker_manager.lifespan to "
            "FastAPI or call broker_manager.init_consumer_app(app), and run the app's lifespan"
        )
        raise BrokerClosedError(msg)
    return broker


Broker = Annotated[BrokerManager, Depends(_running_broker)]
"""The broker that runs with the application: ``async def route(broker: Broker)``."""
