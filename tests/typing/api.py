"""The public API as users call it: checked by mypy with the rest, never run."""

from __future__ import annotations

import uuid
from typing import Any, assert_type

from pydantic import BaseModel

from kafka_broker import BrokerManager, Check, Delivery, EventObject, EventRouter, Health
from kafka_broker.fastapi import Accepted, Broker, PendingReplies


class Receipt(BaseModel):
    amount: int


router = EventRouter("Payments")


@router.bind_event("card.charge")
async def charge(payload: Receipt, event: EventObject) -> Receipt:
    assert_type(event, EventObject[Any])
    return payload


@router.bind_event("card.refund")
def refund(event: EventObject[Receipt]) -> int:
    assert_type(event.data, Receipt)
    return event.data.amount


async def use(broker: BrokerManager) -> None:
    event = EventObject(correlation_id=uuid.uuid4(), event="card.charge", data={"amount": 3})
    assert_type(broker.produce("Payments", event), Delivery)
    assert_type(await broker.produce("Payments", event, key=b"k"), Delivery)
    assert_type(event.correlation_id, str)

    typed = await broker.request("Payments", "card.charge", timeout=5, response=Receipt)
    assert_type(typed, EventObject[Receipt])
    assert_type(typed.data.amount, int)
    plain = await broker.request("Payments", "card.charge", {"amount": 3})
    assert_type(plain, EventObject[Any])

    storage = broker.consumer_storage
    assert_type(await storage.consume("id", timeout=None), EventObject[Any])
    assert_type(await storage.consume_all(), dict[str, EventObject[Any]])
    assert_type(await storage.poll(), bool)
    assert_type(storage.get("id"), EventObject[Any] | None)

    async with broker as entered:
        assert_type(entered, BrokerManager)
    await broker.init_consumer()
    assert_type(await router.execute_event(event), Any)
    assert_type(await charge(Receipt(amount=1), event), Receipt)


async def route(broker: Broker, replies: PendingReplies) -> Accepted:
    assert_type(broker, BrokerManager)
    assert_type(broker.health(), Health)
    assert_type(broker.health().checks["kafka"], Check)
    return await replies.ask(broker, "Payments", "card.charge", {"amount": 3}, response=Receipt)
