"""A web application and the service that it asks, each run by tests as processes of their own.

Usage: uvicorn --factory load_app:application
       load_app.py

Settings come from the environment; PAYMENTS names the module that the application asks. Each says
``ready`` on its standard output; the application's last line there is what was left at its stop.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel

from kafka_broker import BrokerManager, EventRouter, broker_manager
from kafka_broker.fastapi import Broker, health_router

NOBODY: Final = "-nobody"
"""What the name of a module that answers nothing ends in."""


class Charge(BaseModel):
    number: int
    seconds: float


class Receipt(BaseModel):
    number: int
    payments: int


class Order(Receipt):
    app: int


cancelled: Counter[str] = Counter()


@contextmanager
def _counted(route: str) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:
        cancelled[route] += 1
        raise


def state(broker: BrokerManager) -> dict[str, Any]:
    """Return what a route may have left behind."""
    outbox = broker._outbox
    return {
        "waiting": broker.consumer_storage.waiting,
        "outbox": 0 if outbox is None else len(outbox),
        "cancelled": cancelled,
    }


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    async with broker_manager.lifespan(app) as started:
        print("ready", flush=True)
        yield started
        print(json.dumps(state(broker_manager)), flush=True)


def application() -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    app.include_router(health_router)
    payments = os.environ["PAYMENTS"]

    @app.get("/orders/{number}")
    async def order(broker: Broker, number: int, seconds: float) -> Order:
        charge = Charge(number=number, seconds=seconds)
        with _counted("orders"):
            reply = await broker.request(payments, "charge", charge, response=Receipt)
        return Order(app=os.getpid(), **reply.data.model_dump())

    @app.get("/nobody/{number}")
    async def nobody(broker: Broker, number: int) -> None:
        charge = Charge(number=number, seconds=0)
        with _counted("nobody"):
            await broker.request(payments + NOBODY, "charge", charge, timeout=600)

    @app.get("/state")
    async def left(broker: Broker) -> dict[str, Any]:
        return state(broker)

    return app


router: EventRouter = EventRouter("payments")


@router.bind_event("charge")
async def charge(data: Charge) -> Receipt:
    await asyncio.sleep(data.seconds)
    return Receipt(number=data.number, payments=os.getpid())


async def serve() -> None:
    """Charge until SIGTERM."""
    async with BrokerManager(router=router) as broker:
        print("ready", flush=True)
        await broker.wait_closed()


if __name__ == "__main__":
    asyncio.run(serve())
