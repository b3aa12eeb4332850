"""What orders and payments say to each other."""

from __future__ import annotations

from pydantic import BaseModel


class Charge(BaseModel):
    """Take money for an order."""

    order: int
    amount: int


class Receipt(BaseModel):
    """Money was taken."""

    number: str
    order: int
    amount: int
