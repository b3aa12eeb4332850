"""The shop without its page: `make demo`, which ends by itself, and how `make shop` ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .shop import PROCESS, RUN, alive, running_shop

REPLY = re.compile(r"^  mug +12  R-[0-9a-f]{8} +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms$", re.MULTILINE)


def demo(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  # our own program
        [sys.executable, RUN, "--demo"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.integration
def test_three_processes_on_kafka(kafka: str) -> None:
    """Each order is answered through Kafka, and all services are gone afterwards."""
    done = demo(KAFKA_BROKER_BOOTSTRAP_SERVERS=kafka)
    assert 0 == done.returncode, done.stderr
    assert 21 == len(REPLY.findall(done.stdout))
    assert "Payments  respond" in done.stdout
    assert "409 teapot: an order of 1, and 0 left" in done.stdout
    services = [int(pid) for pid in PROCESS.findall(done.stdout)]
    assert 3 == len(services)
    assert not any(alive(pid) for pid in services)


@pytest.mark.integration
def test_open_until_interrupted(kafka: str) -> None:
    """The shop stays open, and Ctrl-C ends its services and itself well."""
    with running_shop(KAFKA_BROKER_BOOTSTRAP_SERVERS=kafka) as shop:
        assert [True, True, True] == [alive(pid) for pid in shop.services]
        assert 0 == shop.interrupt()
        assert "is killed" not in shop.output
        assert [False, False, False] == [alive(pid) for pid in shop.services]


@pytest.mark.integration
def test_failing_service_is_shown(kafka: str) -> None:
    """When a service cannot start, the demo fails and shows what the service printed."""
    done = demo(KAFKA_BROKER_BOOTSTRAP_SERVERS=kafka, KAFKA_BROKER_COMMIT_INTERVAL="never")
    assert 1 == done.returncode
    assert "commit_interval" in done.stderr
    assert not any(alive(int(pid)) for pid in PROCESS.findall(done.stdout))


def test_one_process_in_memory(tmp_path: Path) -> None:
    """Without Docker and Java the demo says what is missing and succeeds in memory."""
    environment = {"PATH": os.fspath(tmp_path), "JAVA_HOME": "", "DOCKER_HOST": "tcp://127.0.0.1:1"}
    done = demo(KAFKA_BROKER_BOOTSTRAP_SERVERS="", **environment)
    assert 0 == done.returncode, done.stderr
    assert "install Java" in done.stdout
    assert "in this one process, on memory://" in done.stdout
    assert 21 == len(REPLY.findall(done.stdout))
