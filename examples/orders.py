"""The orders service: a FastAPI application whose route awaits the reply to an event.

KAFKA_BROKER_MODULE=Orders KAFKA_BROKER_BOOTSTRAP_SERVERS=localhost:9092 uvicorn orders:app
"""

from __future__ import annotations

from fastapi import FastAPI

from kafka_broker import EventObject, broker_manager
from kafka_broker.fastapi import Broker
from messages import Charge, Receipt

app = FastAPI(title="Orders", lifespan=broker_manager.lifespan)


@app.get("/charge")
async def charge(broker: Broker, amount: int, order: int = 1) -> EventObject[Receipt]:
    """Ask payments for the money; the answer is the receipt with the audit log of its way."""
    asked = Charge(order=order, amount=amount)
    return await broker.request("Payments", "card.charge", asked, timeout=5, response=Receipt)
