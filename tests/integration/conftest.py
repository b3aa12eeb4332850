"""What tests with services in processes of their own may ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kafka_broker import BrokerManager

from .fleet import Fleet
from .observer import Observer


@pytest.fixture
async def fleet(kafka: str, module: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Replicas of a module of the test's own, in processes that end with the test."""
    made = Fleet(kafka, module, tmp_path)
    try:
        yield made
    finally:
        await made.end()


@pytest.fixture
def observer(kafka: str, module: str) -> Observer:
    """Kafka's own view of that module."""
    return Observer(kafka, module)


@pytest.fixture
async def source(kafka: str, module: str) -> AsyncIterator[BrokerManager]:
    """A broker in the process of the test that sends events to that module."""
    name = f"{module}-source"
    async with BrokerManager(name, bootstrap_servers=kafka, module_partitions=1) as broker:
        yield broker
