"""What `make demo` does with the shop: it places orders and prints what became of them."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from contextlib import closing
from typing import Any

ORDERS = 20


class ShopError(Exception):
    """The shop or the demo cannot go on; the text says why."""


def show(url: str) -> None:
    """Place orders one after the other; print each reply, the times, one audit log, one refusal."""
    address = url.removeprefix("http://")
    with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        print("\n  item  total  receipt     item.reserve  card.charge  order and answer")
        times = [show_order(connection) for _ in range(1 + ORDERS)]  # the first opens connections
        first, *others = times
        print(f"\n  The first answer came after {first:.1f} ms, {len(others)} more after", end=" ")
        print(f"{statistics.median(others):.1f} ms (median) to {max(others):.1f} ms (slowest).")
        show_way(post(connection, "mug", expected=200))
        refused = post(connection, "teapot", expected=409)
        print("\n  The answer to an order that stock refuses, of the type", end=" ")
        print(f"{refused['type']}:\n\n  {refused['status']} {refused['detail']}\n")


def show_order(connection: http.client.HTTPConnection) -> float:
    """Place an order and print it; return the milliseconds until its answer."""
    begin = time.perf_counter()
    order = post(connection, "mug", expected=200)
    spent = (time.perf_counter() - begin) * 1000
    receipt, (reserve, charge) = order["receipt"], order["steps"]
    print(
        f"  {order['item']:4}  {receipt['amount']:5}  {receipt['number']}  "
        f"{reserve['milliseconds']:9.1f} ms  {charge['milliseconds']:8.1f} ms  {spent:13.1f} ms"
    )
    if receipt["order"] != order["number"]:
        raise ShopError(f"order {order['number']} got the receipt of order {receipt['order']}")
    return spent


def show_way(order: Any) -> None:
    """Print the audit logs of an order's replies, and who answered."""
    print(f"\n  The way of order {order['number']}, from its audit logs:", end="\n\n")
    print("  module    event         sent      received  answered by")
    for step in order["steps"]:
        question, answer = step["reply"]["audit_log"]
        for hop, who in ((question, ""), (answer, step["reply"]["data"]["served_by"])):
            sent, received = clock(hop["time_sent"]), clock(hop["time_received"])
            print(f"  {hop['location']:8}  {hop['event']:12}  {sent}  {received}  {who}".rstrip())


def post(connection: http.client.HTTPConnection, item: str, *, expected: int) -> Any:
    """Order one item; return the JSON of the answer."""
    body = json.dumps({"item": item, "card": "4000 0001"})
    try:
        connection.request("POST", "/orders", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise ShopError(f"POST /orders failed: {exc!r}") from exc
    if response.status != expected:
        raise ShopError(f"POST /orders was answered with {response.status}: {answer.decode()}")
    return json.loads(answer)


def clock(seconds: float | None) -> str:
    """Return a time of an audit log as the time of day."""
    return "-" if seconds is None else time.strftime("%H:%M:%S", time.localtime(seconds))
