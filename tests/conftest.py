"""What every test may ask for: a Kafka, or a broker address in memory."""

from __future__ import annotations

import os
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from kafka_broker.testing import NoKafkaError, kafka_server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Bootstrap servers of a real Kafka; without one a laptop skips and CI fails."""
    try:
        with kafka_server(
            report=lambda line: print(line, file=sys.__stderr__)
        ) as bootstrap_servers:
            yield bootstrap_servers
    except NoKafkaError as exc:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a real Kafka: {exc}")
        pytest.skip(str(exc))  # a laptop may have neither Docker nor Java; CI failed above


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def bootstrap_servers(request: pytest.FixtureRequest) -> str:
    """Run the test twice: in memory and on a real Kafka."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    servers: str = request.getfixturevalue("kafka")
    return servers


@pytest.fixture
def module() -> str:
    """Name a module that no other test uses."""
    return f"m{uuid.uuid4().hex[:12]}"
