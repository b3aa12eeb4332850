"""The orders service: a FastAPI application whose routes await replies; ``/`` is a page to use it.

KAFKA_BROKER_BOOTSTRAP_SERVERS=localhost:9092 uvicorn orders:app

What stock and payments refuse, and what does not come in time, reaches the browser as a problem
document: no route here has code for it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Literal, TypeVar
from uuid import uuid4

from fastapi import FastAPI
from fastapi.responses import FileResponse
from pydantic import BaseModel

from kafka_broker import BrokerManager, EventObject, EventRouter, Reject
from kafka_broker.errors import DeliveryError, RemoteError, ReplyTimeoutError, RequestError
from kafka_broker.fastapi import Accepted, Broker, PendingReplies, health_router
from messages import (
    Charge,
    NewOrder,
    Order,
    Receipt,
    Release,
    Reserve,
    Reserved,
    Served,
    Service,
    Services,
    Shelf,
    Step,
)

PAGE = Path(__file__).with_name("index.html")
REPLY_TIMEOUT = 30.0  # a customer who is in a hurry sends X-Request-Timeout
STATUS_TIMEOUT = 1.0

Model = TypeVar("Model", bound=BaseModel)
Module = Literal["Stock", "Payments"]

router = EventRouter("Orders")
replies = PendingReplies(limit=1000, ttl=300)
app = FastAPI(title="Orders", lifespan=BrokerManager("Orders", router=router).lifespan)
app.include_router(health_router)
app.include_router(replies.router)


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Show the shop."""
    return FileResponse(PAGE)


@app.post("/orders")
async def order_now(broker: Broker, order: NewOrder) -> Order:
    """Order, and wait: the answer is the paid order, or the problem of whoever refused."""
    return await place(broker, uuid4().hex[:8], order)


@app.post("/orders/later", status_code=202)
async def order_later(broker: Broker, order: NewOrder) -> Accepted:
    """Order, and get at once the address where the answer is going to be."""
    return await replies.ask(
        broker, "Orders", "order.place", order, timeout=2 * REPLY_TIMEOUT, response=Order
    )


@router.bind_event("order.place")
async def order_placed(event: EventObject[NewOrder], broker: BrokerManager) -> Order:
    """Do what was left for later; any replica of orders may get it."""
    try:
        return await place(broker, event.correlation_id[:8], event.data)
    except RemoteError as exc:  # of another module: it is passed on because we say so
        raise Reject(exc.status, exc.detail, code=exc.code) from exc
    except (RequestError, DeliveryError) as exc:
        raise Reject(504, "a service did not answer in time", code="no-answer") from exc


async def place(broker: BrokerManager, number: str, wanted: NewOrder) -> Order:
    """Reserve the items, charge the card; when either fails, give the items back.

    A charge that was not answered in time may have been made: a real shop would ask for the money
    back here, too.
    """
    steps: list[Step] = []

    async def ask(module: Module, event: str, data: BaseModel, response: type[Model]) -> Model:
        begin = time.perf_counter()
        reply = await broker.request(module, event, data, timeout=REPLY_TIMEOUT, response=response)
        spent = (time.perf_counter() - begin) * 1000
        steps.append(Step(topic=module, event=event, milliseconds=spent, reply=reply))
        return reply.data

    reserve = Reserve(order=number, item=wanted.item, quantity=wanted.quantity)
    try:
        reserved = await ask("Stock", "item.reserve", reserve, Reserved)
        charge = Charge(order=number, card=wanted.card, amount=reserved.total)
        receipt = await ask("Payments", "card.charge", charge, Receipt)
    except (asyncio.CancelledError, RequestError, DeliveryError):  # the customer may have left
        give_up(broker, number)
        raise
    return Order(
        number=number, item=wanted.item, quantity=wanted.quantity, receipt=receipt, steps=steps
    )


def give_up(broker: BrokerManager, number: str) -> None:
    """Tell stock, without waiting, to put back what the order has reserved."""
    broker.produce("Stock", EventObject(event="item.release", data=Release(order=number)))


@app.get("/stock")
async def stock(broker: Broker) -> Shelf:
    """Ask stock what there is."""
    reply = await broker.request("Stock", "item.list", timeout=STATUS_TIMEOUT, response=Shelf)
    return reply.data


@app.get("/services")
async def services(broker: Broker) -> Services:
    """Tell which services answer."""
    kafka = broker.settings.bootstrap_servers
    answers = await asyncio.gather(status(broker, "Stock"), status(broker, "Payments"))
    return Services(kafka=kafka, can_stop=not kafka.startswith("memory://"), services=list(answers))


async def status(broker: BrokerManager, module: Module) -> Service:
    """Ask one service who it is; silence means that it is down."""
    try:
        reply = await broker.request(
            module, "service.status", timeout=STATUS_TIMEOUT, response=Served
        )
    except ReplyTimeoutError:
        return Service(name=module, up=False)
    return Service(name=module, up=True, served_by=reply.data.served_by)


@app.post("/services/{module}/stop")
async def stop(broker: Broker, module: Module) -> Served:
    """Ask a service to end its process; who looks after it starts it again."""
    reply = await broker.request(module, "service.stop", timeout=STATUS_TIMEOUT, response=Served)
    return reply.data
