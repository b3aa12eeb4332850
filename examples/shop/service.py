"""What stock and payments share: they say who they are, and can be asked to stop."""

from __future__ import annotations

import os
import signal

from kafka_broker import BrokerManager, EventRouter, Reject
from messages import Served

service = EventRouter("service")


def served_by(broker: BrokerManager) -> str:
    """Name this replica; a container has its id as ``HOSTNAME``."""
    name = f"{broker.settings.module.lower()}, process {os.getpid()}"
    host = os.environ.get("HOSTNAME")
    return f"{name} on {host}" if host else name


@service.bind_event("status")
async def status(broker: BrokerManager) -> Served:
    """Handle ``service.status``: whoever answers is up."""
    return Served(served_by=served_by(broker))


@service.bind_event("stop")
async def stop(broker: BrokerManager) -> Served:
    """Handle ``service.stop`` as an operator would: this reply is still sent, then all ends."""
    if broker.settings.bootstrap_servers.startswith("memory://"):
        raise Reject(409, "in memory all services share one process", code="one-process")
    signal.raise_signal(signal.SIGTERM)
    return Served(served_by=served_by(broker))


async def serve(module: str, router: EventRouter) -> None:
    """Run a service until SIGTERM or Ctrl-C."""
    async with BrokerManager(module, router=router) as broker:
        print(f"{module.lower()} is ready", flush=True)
        await broker.wait_closed()
