"""Produce events, route them to functions, and await the reply: Kafka for asyncio services."""

from __future__ import annotations

from kafka_broker._dead_letters import DeadLetter
from kafka_broker._delivery import Delivery
from kafka_broker._event import EventObject
from kafka_broker._health import Check, Health
from kafka_broker._manager import BrokerManager, broker_manager
from kafka_broker._metrics import Metrics
from kafka_broker._middleware import Handle, Middleware
from kafka_broker._router import EventRouter
from kafka_broker._settings import BrokerSettings
from kafka_broker._storage import ConsumerStorage
from kafka_broker._verdicts import Reject, RetryLater, RetryPolicy

__all__ = [
    "BrokerManager",
    "BrokerSettings",
    "Check",
    "ConsumerStorage",
    "DeadLetter",
    "Delivery",
    "EventObject",
    "EventRouter",
    "Handle",
    "Health",
    "Metrics",
    "Middleware",
    "Reject",
    "RetryLater",
    "RetryPolicy",
    "broker_manager",
]
