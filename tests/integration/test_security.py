"""Encrypted and authenticated connections to a real Kafka."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from kafka_broker import BrokerManager, EventRouter
from kafka_broker.errors import BrokerUnavailableError
from kafka_broker.testing import NativeKafka, NoKafkaError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

PASSWORD = "correct horse"  # of a Kafka that lives as long as the test
LOGIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield the settings that reach a listener with TLS and a password."""
    directory: Path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    server = authority.issue_cert("127.0.0.1")
    chain = b"".join(pem.bytes() for pem in server.cert_chain_pems)
    (directory / "server.pem").write_bytes(_pkcs8(server.private_key_pem.bytes()) + chain)
    try:
        node = NativeKafka()
    except NoKafkaError as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))  # a laptop may have no Java; in CI it raised above
    with node:
        port, controller = _free_port(), _free_port()
        node.properties |= _listeners(node.bootstrap_servers, port, controller)
        node.properties |= {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(directory / "server.pem"),
        }
        node.start()
        yield {
            "bootstrap_servers": f"127.0.0.1:{port}",
            "security_protocol": "SASL_SSL",
            "ssl_cafile": str(directory / "ca.pem"),
            "username": "alice",
            "password": PASSWORD,
            "start_timeout": 0.5,
        }


def _pkcs8(key: bytes) -> bytes:
    """Return a private key in the only form that Java reads."""
    return load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


def _listeners(plain: str, port: int, controller: int) -> dict[str, str]:
    return {
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": f"PLAINTEXT://{plain},SASL_SSL://127.0.0.1:{port},"
        f"CONTROLLER://127.0.0.1:{controller}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,"
        "SASL_SSL:SASL_SSL",
        "advertised.listeners": f"PLAINTEXT://{plain},SASL_SSL://127.0.0.1:{port}",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": f'{LOGIN} user_alice="{PASSWORD}";',
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def test_tls_and_password(secured: dict[str, Any], module: str) -> None:
    """Requests work over TLS with a user's name and password."""
    router = EventRouter(module)
    router.bind_event("echo")(lambda event: event.data)
    async with BrokerManager(module, router=router, **{**secured, "start_timeout": 20}) as broker:
        assert 1 == (await broker.request(module, "echo", 1, timeout=20)).data


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"password": "wrong"}, "credentials.*[Aa]uthentication"),
        ({"ssl_cafile": None}, "security_protocol.*[Cc]ertificate"),
        ({"security_protocol": "PLAINTEXT"}, "security_protocol"),
    ],
)
async def test_what_is_wrong_is_said(
    secured: dict[str, Any], module: str, wrong: dict[str, Any], reason: str
) -> None:
    """A wrong password, an unknown certificate and a wrong protocol are told with the reason."""
    broker = BrokerManager(module, **{**secured, **wrong})
    with pytest.raises(BrokerUnavailableError, match=reason) as caught:
        await asyncio.wait_for(asyncio.ensure_future(_start(broker)), 60)
    await broker.stop()
    assert PASSWORD not in str(caught.value)
    assert "wrong" not in str(caught.value)


async def _start(broker: BrokerManager) -> None:
    await broker.init_consumer()
