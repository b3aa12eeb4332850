"""Starting when Kafka is not there, not right, or does not let us."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker.errors import BrokerUnavailableError, DeliveryError, ReplyTimeoutError
from kafka_broker.testing import NativeKafka, NoKafkaError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration


def _native(**properties: str) -> NativeKafka:
    try:
        return NativeKafka(properties=properties)
    except NoKafkaError as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))  # a laptop may have no Java; in CI it raised above


@pytest.fixture
def node() -> Iterator[NativeKafka]:
    """A Kafka of this test's own, which it may start late and kill."""
    with _native() as kafka:
        yield kafka


async def test_kafka_that_comes_up_later(node: NativeKafka, module: str) -> None:
    """A broker started before Kafka is ready once Kafka is, and has lost nothing meanwhile."""
    router = EventRouter(module)
    router.bind_event("echo")(lambda event: event.data)
    broker = BrokerManager(
        module, router=router, bootstrap_servers=node.bootstrap_servers, start_timeout=120
    )
    delivery = broker.produce(module, EventObject(event="echo", data="early"))
    starting = broker.init_consumer()
    asking = asyncio.create_task(broker.request(module, "echo", 1, timeout=60))
    await asyncio.sleep(0)
    assert not broker.ready
    await asyncio.to_thread(node.start)
    await starting
    assert (await delivery).offset is not None
    assert 1 == (await asking).data
    await broker.stop()


async def test_kafka_that_goes_and_comes_back(node: NativeKafka, module: str) -> None:
    """Requests go on after Kafka was killed and started again; a stop without Kafka is bounded."""
    router = EventRouter(module)
    router.bind_event("echo")(lambda event: event.data)
    await asyncio.to_thread(node.start)
    async with BrokerManager(
        module, router=router, bootstrap_servers=node.bootstrap_servers, drain_timeout=1
    ) as broker:
        assert 1 == (await broker.request(module, "echo", 1, timeout=30)).data
        await asyncio.to_thread(node.kill)
        with pytest.raises((ReplyTimeoutError, DeliveryError)):
            await broker.request(module, "echo", "lost or late", timeout=0.5)
        asking = asyncio.create_task(broker.request(module, "echo", 2, timeout=60))
        await asyncio.to_thread(node.start)
        assert 2 == (await asking).data
        await asyncio.to_thread(node.kill)
        began = time.monotonic()
    assert time.monotonic() - began < 25


async def test_a_wrong_address() -> None:
    """Nothing listens there: the error says so, after start_timeout."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    broker = BrokerManager("m", bootstrap_servers=address, start_timeout=0.5)
    before = asyncio.all_tasks()
    with pytest.raises(BrokerUnavailableError, match=f"{address}.*bootstrap_servers"):
        async with broker:
            pytest.fail("it cannot start")
    assert set() == asyncio.all_tasks() - before


async def test_an_address_that_never_answers(module: str) -> None:
    """Something listens and says nothing: the start ends in time all the same."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        broker = BrokerManager(module, bootstrap_servers=address, start_timeout=0.5)
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError):
            await broker.init_consumer()
        await broker.stop()
    assert time.monotonic() - began < 20


async def test_tls_to_a_listener_without(kafka: str, module: str) -> None:
    """A wrong security protocol is an error that names the setting."""
    broker = BrokerManager(
        module, bootstrap_servers=kafka, security_protocol="SSL", start_timeout=0.5
    )
    with pytest.raises(BrokerUnavailableError, match="security_protocol"):
        await broker.init_consumer()
    await broker.stop()


def _deny_create(servers: str) -> None:
    """Take the right to create topics from everybody, and leave every other."""
    admin = AdminClient({"bootstrap.servers": servers})
    acls = [
        AclBinding(kind, name, pattern, "User:*", "*", operation, permission)
        for kind, name, pattern in (
            (ResourceType.BROKER, "kafka-cluster", ResourcePatternType.LITERAL),
            (ResourceType.TOPIC, "*", ResourcePatternType.LITERAL),
        )
        for operation, permission in (
            (AclOperation.ALL, AclPermissionType.ALLOW),
            (AclOperation.CREATE, AclPermissionType.DENY),
        )
    ]
    for result in admin.create_acls(acls, request_timeout=20).values():
        result.result(20)


async def test_topics_that_may_not_be_created(module: str) -> None:
    """Without the right to create topics a start says which command creates the missing one."""
    properties = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    with _native(**properties) as node:
        await asyncio.to_thread(node.start)
        servers = node.bootstrap_servers
        async with BrokerManager(module, bootstrap_servers=servers):
            pass
        await asyncio.to_thread(_deny_create, servers)
        async with BrokerManager(module, bootstrap_servers=servers) as allowed:
            assert allowed.ready
        denied = BrokerManager(f"{module}.new", bootstrap_servers=servers, start_timeout=0.5)
        with pytest.raises(BrokerUnavailableError, match=r"AuthorizationFailed.*--create --topic"):
            await denied.init_consumer()
        await denied.stop()
