"""What the three services say to each other, and orders to the browser."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from kafka_broker import EventObject


class Served(BaseModel):
    """Which replica answered; every reply of stock and payments says it."""

    served_by: str


class Reserve(BaseModel):
    """Take items off the shelf for an order."""

    order: str
    item: str
    quantity: int


class Reserved(Served):
    """They are put aside, and this is what they cost."""

    item: str
    quantity: int
    total: int


class Release(BaseModel):
    """Put back on the shelf whatever an order has reserved."""

    order: str


class Item(BaseModel):
    """One kind of thing on the shelf."""

    name: str
    price: int
    left: int


class Shelf(Served):
    """All that stock has."""

    items: list[Item]


class Charge(BaseModel):
    """Take money for an order."""

    order: str
    card: str
    amount: int


class Receipt(Served):
    """Money was taken."""

    number: str
    order: str
    amount: int


class NewOrder(BaseModel):
    """What a customer wants."""

    item: str
    quantity: int = Field(default=1, ge=1, le=10)
    card: str = Field(min_length=1, max_length=30)


class Step(BaseModel):
    """One request of an order, and its reply with the audit log."""

    topic: str
    event: str
    milliseconds: float
    reply: EventObject[Any]


class Order(BaseModel):
    """An order that is paid."""

    number: str
    item: str
    quantity: int
    receipt: Receipt
    steps: list[Step]


class Service(BaseModel):
    """Whether a service answers at the moment, and which replica did."""

    name: str
    up: bool
    served_by: str | None = None


class Services(BaseModel):
    """The state of the shop."""

    kafka: str
    can_stop: bool
    services: list[Service]
