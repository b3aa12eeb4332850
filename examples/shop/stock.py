"""The stock service: a script, like payments. Its shelf is in memory: full again at every start.

KAFKA_BROKER_BOOTSTRAP_SERVERS=localhost:9092 python stock.py

Events come at least once, and one that is late may follow the one that undoes it. So an order that
has reserved gets the same reply again, and one that was released can reserve nothing any more.
"""

from __future__ import annotations

import asyncio

from kafka_broker import BrokerManager, EventRouter, Reject
from messages import Item, Release, Reserve, Reserved, Shelf
from service import serve, served_by, service

shelf = {
    item.name: item
    for item in (
        Item(name="mug", price=12, left=500),
        Item(name="poster", price=8, left=20),
        Item(name="lamp", price=45, left=3),
        Item(name="teapot", price=30, left=0),
    )
}
reserved: dict[str, Reserved] = {}
released: set[str] = set()

router = EventRouter("Stock")
items = EventRouter("item")


@items.bind_event("list")
async def show(broker: BrokerManager) -> Shelf:
    """Handle ``item.list``."""
    return Shelf(items=list(shelf.values()), served_by=served_by(broker))


@items.bind_event("reserve")
async def reserve(wanted: Reserve, broker: BrokerManager) -> Reserved:
    """Handle ``item.reserve``."""
    if wanted.order in reserved:
        return reserved[wanted.order]
    item = shelf.get(wanted.item)
    if item is None:
        raise Reject(404, f"there is no {wanted.item} in this shop", code="no-such-item")
    if wanted.order in released:
        raise Reject(409, "the order was given up", code="given-up")
    if item.left < wanted.quantity:
        refusal = f"an order of {wanted.quantity}, and {item.left} left"
        raise Reject(409, f"{item.name}: {refusal}", code="sold-out")
    item.left -= wanted.quantity
    reserved[wanted.order] = Reserved(
        item=item.name,
        quantity=wanted.quantity,
        total=item.price * wanted.quantity,
        served_by=served_by(broker),
    )
    return reserved[wanted.order]


@items.bind_event("release")
async def release(given_up: Release) -> None:
    """Handle ``item.release``."""
    released.add(given_up.order)
    if back := reserved.pop(given_up.order, None):
        shelf[back.item].left += back.quantity


router.include_binder(items)
router.include_binder(service)

if __name__ == "__main__":
    asyncio.run(serve("Stock", router))
