"""The payments service: a script. Start as many of it as you like.

KAFKA_BROKER_BOOTSTRAP_SERVERS=localhost:9092 python payments.py
"""

from __future__ import annotations

import asyncio

from kafka_broker import BrokerManager, EventRouter
from messages import Charge, Receipt

router = EventRouter("Payments")
card = EventRouter("card")


@card.bind_event("charge")
async def charge(order: Charge) -> Receipt:
    """Handle ``card.charge``; what it returns is the reply."""
    return Receipt(number=f"R-{order.order:04}", order=order.order, amount=order.amount)


router.include_binder(card)


async def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    async with BrokerManager("Payments", router=router) as broker:
        print("payments is ready", flush=True)
        await broker.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
