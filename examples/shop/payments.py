"""The payments service: a script. Start as many of it as you like.

KAFKA_BROKER_BOOTSTRAP_SERVERS=localhost:9092 python payments.py
"""

from __future__ import annotations

import asyncio

from kafka_broker import BrokerManager, EventRouter, Reject
from messages import Charge, Receipt
from service import serve, served_by, service

DECLINED = "4000 0002"

router = EventRouter("Payments")
card = EventRouter("card")


@card.bind_event("charge")
async def charge(asked: Charge, broker: BrokerManager) -> Receipt:
    """Handle ``card.charge``; what it returns is the reply, and what it raises is a problem."""
    if asked.card == DECLINED:
        raise Reject(402, f"the bank declines the card {asked.card}", code="card-declined")
    return Receipt(
        number=f"R-{asked.order}",
        order=asked.order,
        amount=asked.amount,
        served_by=served_by(broker),
    )


router.include_binder(card)
router.include_binder(service)

if __name__ == "__main__":
    asyncio.run(serve("Payments", router))
