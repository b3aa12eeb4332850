"""Apache Kafka itself, run by `NativeKafka`: it answers, survives a kill, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from kafka_broker.testing import NativeKafka, NoKafkaError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

Result = TypeVar("Result")
pytestmark = pytest.mark.integration

OWNER = """
import signal
from kafka_broker.testing import NativeKafka
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without
with NativeKafka() as kafka:
    kafka.start()
    print(kafka.pid, kafka.bootstrap_servers, kafka.data_directory, flush=True)
    signal.pause()
"""


@pytest.fixture
def kafka() -> Iterator[NativeKafka]:
    """Return a Kafka that is not started; skip without Java or Maven, but not in CI."""
    try:
        kafka = NativeKafka()
    except NoKafkaError as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(exc))  # a laptop may have no Java; in CI it raised above
    with kafka:
        yield kafka


def eventually(condition: Callable[[], bool], *, within: float) -> bool:
    """Tell whether *condition* became true in the next *within* seconds."""
    deadline, tick = time.monotonic() + within, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        tick.wait(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def listening(servers: str) -> bool:
    host, port = servers.split(":")
    with closing(socket.socket()) as client:
        return client.connect_ex((host, int(port))) == 0


def run(steps: Coroutine[Any, Any, Result]) -> Result:
    """Do what `asyncio.run` does, but leave pytest-asyncio's event loop alone."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(steps)


async def create_topic(servers: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def produce(servers: str, topic: str, value: bytes) -> int:
    """Return the offset of the new record."""
    async with AIOKafkaProducer(bootstrap_servers=servers, acks="all") as producer:
        record = await producer.send_and_wait(topic, value)
    return int(record.offset)


async def first_value(servers: str, topic: str) -> bytes | None:
    async with AIOKafkaConsumer(bootstrap_servers=servers) as consumer:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        record = await asyncio.wait_for(consumer.getone(), timeout=20)
    value: bytes | None = record.value
    return value


async def create_and_produce(servers: str, topic: str, value: bytes) -> int:
    await create_topic(servers, topic)
    return await produce(servers, topic, value)


def test_started_kafka_takes_a_record(kafka: NativeKafka) -> None:
    """A started Kafka accepts the first record of a new topic at offset 0."""
    kafka.start()
    assert 0 == run(create_and_produce(kafka.bootstrap_servers, "orders", b"1"))


def test_killed_kafka_keeps_its_records(kafka: NativeKafka) -> None:
    """After SIGKILL and a new start the same address serves the record produced before."""
    kafka.start()
    run(create_and_produce(kafka.bootstrap_servers, "orders", b"kept"))
    kafka.kill()
    assert not listening(kafka.bootstrap_servers)
    kafka.start()
    assert b"kept" == run(first_value(kafka.bootstrap_servers, "orders"))


def test_stopped_kafka_keeps_its_records(kafka: NativeKafka) -> None:
    """After an orderly stop and a new start the same address serves the record produced before."""
    kafka.start()
    run(create_and_produce(kafka.bootstrap_servers, "orders", b"kept"))
    kafka.stop()
    assert not listening(kafka.bootstrap_servers)
    kafka.start()
    assert b"kept" == run(first_value(kafka.bootstrap_servers, "orders"))


def test_leaving_leaves_nothing(kafka: NativeKafka) -> None:
    """Leaving the context leaves no process, no listener and no data."""
    with kafka:
        kafka.start()
        pid = kafka.pid
        assert pid is not None
        assert kafka.data_directory.exists()
    assert not alive(pid)
    assert not listening(kafka.bootstrap_servers)
    assert not kafka.data_directory.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("kafka")
def test_kafka_ends_with_its_owner(number: signal.Signals) -> None:
    """When the Python process that started Kafka is killed, Kafka and its data go too."""
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as owner:
        assert owner.stdout is not None
        pid, servers, directory = owner.stdout.readline().split()
        assert alive(int(pid))
        os.killpg(owner.pid, number)
        try:
            owner.wait(timeout=10)
        finally:
            owner.kill()
    assert eventually(lambda: not alive(int(pid)), within=10)
    assert eventually(lambda: not Path(directory).exists(), within=10)
    assert not listening(servers)
