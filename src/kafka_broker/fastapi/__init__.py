"""FastAPI: routes that await replies, health probes, and replies that are fetched later."""

from __future__ import annotations

try:
    import fastapi.sse  # noqa: F401  # the newest part that is needed
except ImportError as _missing:
    msg = "kafka_broker.fastapi needs FastAPI: pip install 'kafka-broker-aio[fastapi]'"
    raise ImportError(msg) from _missing

from kafka_broker._asgi import BrokerMiddleware
from kafka_broker.fastapi._dependency import Broker, broker_from
from kafka_broker.fastapi._health import health_router
from kafka_broker.fastapi._pending import Accepted, PendingReplies

__all__ = [
    "Accepted",
    "Broker",
    "BrokerMiddleware",
    "PendingReplies",
    "broker_from",
    "health_router",
]
