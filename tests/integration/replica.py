"""One replica of a service, run by tests as a process of its own; prints one JSON line at its end.

Usage: replica.py answer MODULE
       replica.py ask MODULE ANSWERING COUNT IN_FLIGHT
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

from kafka_broker import BrokerManager, EventObject, EventRouter
from kafka_broker._metrics import Counted, Metrics


class Counting(Metrics):
    """Counts in memory."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, what: Counted, amount: int = 1) -> None:
        """Add to the count."""
        self.counts[what] += amount


async def answer(module: str) -> dict[str, Any]:
    """Answer until SIGTERM; returns which requests were handled here."""
    router = EventRouter(module)
    handled: list[str] = []

    @router.bind_event("work")
    async def work(event: EventObject) -> dict[str, Any]:
        handled.append(event.data["id"])
        return {"id": event.data["id"], "by": broker.settings.instance}

    async with BrokerManager(module, router=router) as broker:
        asyncio.get_running_loop().call_soon(lambda: print("ready", flush=True))
        await broker.wait_closed()
    return {"handled": handled}


async def ask(module: str, answering: str, count: int, in_flight: int) -> dict[str, Any]:
    """Send requests, the first as soon as the start returns; returns what became of them."""
    metrics = Counting()
    answers: dict[str, str] = {}
    wrong: list[str] = []
    async with BrokerManager(module, metrics=metrics) as broker:
        numbers = iter(range(count))

        async def worker() -> None:
            for number in numbers:
                asked = f"{broker.settings.instance}/{number}"
                reply = await broker.request(answering, "work", {"id": asked}, timeout=60)
                if reply.data["id"] != asked or asked in answers:
                    wrong.append(asked)
                answers[asked] = reply.data["by"]

        await asyncio.gather(*(worker() for _ in range(in_flight)))
    return {"answers": answers, "wrong": wrong, "counts": metrics.counts}


def main() -> None:
    """Run the role that the command line names."""
    role, *arguments = sys.argv[1:]
    if role == "answer":
        result = asyncio.run(answer(*arguments))
    else:
        module, answering, count, in_flight = arguments
        result = asyncio.run(ask(module, answering, int(count), int(in_flight)))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
