"""The application that web servers run in tests; as a script, the payments that it asks.

Usage: web_app.py MODULE

Settings of the application come from the environment. What payments hold is let go by a line with
its name on their standard input; when that ends they end.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, WebSocket

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker.fastapi import Broker, broker_from, health_router

PAYMENTS = os.environ.get("WEB_PAYMENTS", "")
AUDIT = os.environ.get("WEB_AUDIT", "")
PATIENCE = 60

router = EventRouter("web")
broker_manager = BrokerManager(router=router)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Come after the broker's start, and fail if the test says how."""
    if why := os.environ.get("WEB_FAILURE"):
        raise RuntimeError(why)
    yield


app = FastAPI(lifespan=lifespan)
app.include_router(health_router)
broker_manager.init_consumer_app(app)
if AUDIT:
    BrokerManager(AUDIT).init_consumer_app(app)


@app.get("/charges/{number}")
async def charge(broker: Broker, number: int) -> dict[str, int]:
    """Ask payments, and tell which process has asked."""
    reply = await broker.request(PAYMENTS, "charge", number, timeout=PATIENCE)
    return {"number": reply.data, "pid": os.getpid()}


@app.get("/holds/{name}")
async def hold(broker: Broker, name: str) -> str:
    """Wait until the test lets payments go on."""
    reply = await broker.request(PAYMENTS, "hold", name, timeout=PATIENCE)
    return str(reply.data)


@app.get("/storage")
async def storage(broker: Broker) -> dict[str, int]:
    """Tell how many waits are open in this process, and how many replies nobody has taken."""
    await broker.consumer_storage.poll()
    waiting, kept = broker.consumer_storage.waiting, len(broker.consumer_storage)
    return {"pid": os.getpid(), "waiting": waiting, "kept": kept}


@app.get("/both/{number}")
async def both(
    first: Broker, second: Annotated[BrokerManager, Depends(broker_from(AUDIT))], number: int
) -> list[Any]:
    """Ask by both brokers."""
    asked = (one.request(PAYMENTS, "charge", number, timeout=PATIENCE) for one in (first, second))
    replies = await asyncio.gather(*asked)
    return [first.settings.module, second.settings.module, *(reply.data for reply in replies)]


@app.websocket("/charges")
async def charges(websocket: WebSocket, broker: Broker) -> None:
    """Answer each number with the reply of payments."""
    await websocket.accept()
    async for number in websocket.iter_text():
        reply = await broker.request(PAYMENTS, "charge", int(number), timeout=PATIENCE)
        await websocket.send_text(str(reply.data))


@app.websocket("/holds/{name}")
async def holds(websocket: WebSocket, broker: Broker, name: str) -> None:
    """Wait until the test lets payments go on."""
    await websocket.accept()
    reply = await broker.request(PAYMENTS, "hold", name, timeout=PATIENCE)
    await websocket.send_text(str(reply.data))


@router.bind_event("relay")
async def relay(event: EventObject, broker: BrokerManager) -> str:
    """Handle an event that takes as long as payments hold it."""
    reply = await broker.request(PAYMENTS, "hold", event.data, timeout=PATIENCE)
    return f"relayed {reply.data}"


async def pay(module: str) -> None:
    """Be payments."""
    payments = EventRouter(module)
    let_go: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    @payments.bind_event("charge")
    async def charged(event: EventObject) -> Any:
        return event.data

    @payments.bind_event("hold")
    async def held(event: EventObject) -> Any:
        print(f"holds {event.data}", flush=True)
        await let_go[event.data].wait()
        return event.data

    async with BrokerManager(module, router=payments):
        print(f"{module} is ready", flush=True)
        while name := await asyncio.to_thread(sys.stdin.readline):
            let_go[name.strip()].set()


if __name__ == "__main__":
    asyncio.run(pay(sys.argv[1]))
