"""Many replicas in processes of their own, on a real Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kafka_broker._run import connect
from kafka_broker._settings import load_settings
from kafka_broker._transport import TopicSpec

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

REPLICA = Path(__file__).with_name("replica.py")


@asynccontextmanager
async def _replica(servers: str, *arguments: object) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(REPLICA),
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,
        env={**os.environ, "KAFKA_BROKER_BOOTSTRAP_SERVERS": servers},
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _result(process: Process) -> dict[str, Any]:
    async with asyncio.timeout(180):
        output, _ = await process.communicate()
    assert 0 == process.returncode
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


async def _create(servers: str, topic: str, partitions: int) -> None:
    transport = connect(load_settings(topic, {"bootstrap_servers": servers}))
    await transport.start()
    await transport.create_topics([TopicSpec(topic, partitions)])
    await transport.stop()


async def test_three_ask_and_three_answer(kafka: str) -> None:
    """10,000 requests over 6 partitions: each reply where it is awaited, none lost or doubled."""
    name = uuid.uuid4().hex[:8]
    answering = f"answering-{name}"
    await _create(kafka, answering, 6)
    async with AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(_replica(kafka, "answer", answering)) for _ in range(3)
        ]
        askers = [
            await stack.enter_async_context(
                _replica(kafka, "ask", f"asking-{name}", answering, count, 100)
            )
            for count in (3334, 3333, 3333)
        ]
        asked = await asyncio.gather(*map(_result, askers))
        for service in services:
            service.send_signal(signal.SIGTERM)
        served = await asyncio.gather(*map(_result, services))
    answers = {key: by for result in asked for key, by in result["answers"].items()}
    handled = [key for result in served for key in result["handled"]]
    assert [[], [], []] == [result["wrong"] for result in asked]
    assert 10_000 == len(answers)
    assert sorted(answers) == sorted(handled)
    assert 10_000 == sum(result["counts"]["replies_received"] for result in asked)
    assert [0, 0, 0] == [result["counts"].get("replies_late", 0) for result in asked]


async def test_sigterm_stops_a_service_gracefully(kafka: str) -> None:
    """SIGTERM ends wait_closed(); the process stops by itself with code 0."""
    async with _replica(kafka, "answer", f"service-{uuid.uuid4().hex[:8]}") as service:
        assert service.stdout is not None
        async with asyncio.timeout(60):
            assert b"ready\n" == await service.stdout.readline()
        service.send_signal(signal.SIGTERM)
        assert {"handled": []} == await _result(service)
