"""For tests: a real Kafka on any machine that has Docker or Java, faults, and replacements.

    @pytest.fixture(scope="session")
    def bootstrap_servers():
        with kafka_server() as servers:
            yield servers

`kafka_server` and `NativeKafka` block: call them from fixtures, not from coroutines.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kafka_broker import _depends
from kafka_broker._event import EventObject
from kafka_broker._faults import InjectedError, delay, duplicate, fail_some
from kafka_broker._manager import BrokerManager
from kafka_broker._native_kafka import (
    OLDEST_JAVA,
    NativeKafka,
    NoKafkaError,
    Report,
    to_stderr,
)
from kafka_broker._transport.memory import MemoryCluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from testcontainers.community.kafka import KafkaContainer

__all__ = [
    "InjectedError",
    "MemoryCluster",
    "NativeKafka",
    "NoKafkaError",
    "delay",
    "duplicate",
    "fail_some",
    "kafka_server",
    "override",
]

_VARIABLE = "KAFKA_BROKER_BOOTSTRAP_SERVERS"


@contextmanager
def kafka_server(*, report: Report = to_stderr) -> Iterator[str]:
    """Yield the bootstrap servers of a Kafka that is ready, and end what was started for it.

    The first that works of: ``KAFKA_BROKER_BOOTSTRAP_SERVERS``, Docker (through testcontainers),
    Java (see `NativeKafka`). Topics are not created automatically by what is started here.

    Args:
        report: Called with one line of text whenever something slow begins.

    Raises:
        NoKafkaError: None of the three works.
        RuntimeError: Apache Kafka did not start; the text has the end of its log.
    """
    reasons = []
    with ExitStack() as stack:
        for door in (_named_kafka, _docker_kafka, _java_kafka):
            try:
                servers = stack.enter_context(door(report))
            except NoKafkaError as exc:
                reasons.append(str(exc))
            else:
                break
        else:
            raise NoKafkaError(
                f"No Kafka to test with: {'; '.join(reasons)}. Start Docker (and `pip install "
                f"testcontainers`), or install Java {OLDEST_JAVA} and Maven, or set {_VARIABLE}."
            )
        yield servers


@contextmanager
def override(dependency: Callable[..., Any], replacement: Callable[..., Any]) -> Iterator[None]:
    """Give every handler what *replacement* returns, for ``Depends(dependency)``, in a ``with``.

    Its parameters follow the rules of any dependency. Overrides may be nested: the inner one holds.

    Raises:
        ConfigurationError: a parameter of the replacement that nothing can be given for; it depends
            on what it replaces.
        ImportError: fast-depends is not installed.
    """
    if find_spec("fast_depends") is None:
        raise ImportError("override needs fast-depends: pip install 'kafka-broker-aio[depends]'")
    with _depends.replaced(dependency, replacement, (EventObject, BrokerManager)):
        yield


@contextmanager
def _named_kafka(report: Report) -> Iterator[str]:
    servers = os.environ.get(_VARIABLE, "").strip()
    if servers.startswith("memory://"):
        report(f"{_VARIABLE}={servers} is not a Kafka: ignored")
        raise NoKafkaError(f"{_VARIABLE}: {servers} is not a Kafka")
    if not servers:
        raise NoKafkaError(f"{_VARIABLE}: not set")
    yield servers


@contextmanager
def _docker_kafka(report: Report) -> Iterator[str]:
    container = _kafka_container()
    report("starting Kafka in Docker; the first time its image is pulled")
    with ExitStack() as stack:
        stack.callback(container.stop)
        try:
            container.start(timeout=60)
        except Exception as exc:  # whatever Docker lacks, Java may still work
            report(f"Docker could not start Kafka: {exc}")
            raise NoKafkaError(f"Docker: Kafka did not start ({exc})") from exc
        yield container.get_bootstrap_server()


def _kafka_container() -> KafkaContainer:
    """Describe a container, once a Docker daemon has answered.

    KafkaContainer can start Confluent's images only, not ``apache/kafka``.
    """
    try:
        from testcontainers.community.kafka import KafkaContainer  # noqa: PLC0415  # optional
        from testcontainers.core.docker_client import DockerClient  # noqa: PLC0415  # optional
    except ImportError as exc:
        raise NoKafkaError("Docker: the Python package testcontainers is not installed") from exc
    try:
        DockerClient(timeout=3).client.ping()
    except Exception as exc:  # docker, requests and paramiko have no common base
        raise NoKafkaError("Docker: no daemon answers") from exc
    container = KafkaContainer().with_kraft()
    container.with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
    container.with_env("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1")
    container.with_env("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1")
    return container


@contextmanager
def _java_kafka(report: Report) -> Iterator[str]:
    with NativeKafka(report=report) as kafka:
        kafka.start()
        yield kafka.bootstrap_servers
