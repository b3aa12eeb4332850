"""Batches that go to one node in the same turn of the event loop travel in one request."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiokafka import errors as kafka

from kafka_broker._transport.kafka_requests import PRODUCE, Produced, produce_request, produced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kafka_broker._transport.kafka_batch import Batch
    from kafka_broker._transport.kafka_wire import Wire


class Departure:
    """Sends batches, each alone or with others, and hands out what becomes of each."""

    def __init__(self) -> None:
        self._leaving: dict[Wire, list[tuple[Batch, Callable[[Produced | Exception], None]]]] = {}

    def add(
        self, wire: Wire, batch: Batch, arrived: Callable[[Produced | Exception], None]
    ) -> None:
        """Send a batch at once, or when this turn ends if the node has something to do already.

        *arrived* is called once: with the answer, `NodeNotReadyError` if the batch has not left, or
        another error if nobody knows what became of it. It must not raise.
        """
        batch.sent = True  # or will be, unless the connection is lost before
        if (leaving := self._leaving.get(wire)) is not None:
            leaving.append((batch, arrived))
            return
        self._leaving[wire] = [(batch, arrived)]
        if wire.busy:
            asyncio.get_running_loop().call_soon(self._leave, wire)
        else:
            self._leave(wire)

    async def exchange(self, wire: Wire, batch: Batch) -> Produced | Exception:
        """Send a batch and return what became of it, as `add` tells it."""
        exchanged: asyncio.Future[Produced | Exception] = asyncio.get_running_loop().create_future()

        def arrived(answer: Produced | Exception) -> None:
            if not exchanged.done():
                exchanged.set_result(answer)

        self.add(wire, batch, arrived)
        return await exchanged

    def _leave(self, wire: Wire) -> None:
        leaving = self._leaving.pop(wire)
        batches = [(batch.place, batch.buffer) for batch, _ in leaving]
        limit = wire.timeout / 2  # so Kafka's word on a replica that hangs comes before we hang up
        try:
            wire.ask(PRODUCE, produce_request(limit, batches), partial(_arrived, leaving))
        except kafka.NodeNotReadyError as exc:
            _arrived(leaving, exc)


def _arrived(
    leaving: Sequence[tuple[Batch, Callable[[Produced | Exception], None]]],
    answer: bytes | Exception,
) -> None:
    """Hand out to each of the batches what became of it."""
    answers: dict[tuple[str, int], Produced] = {}
    error = answer if isinstance(answer, Exception) else None
    if not isinstance(answer, Exception):
        try:
            answers = produced(answer)
        except kafka.KafkaProtocolError as exc:
            error = exc
    for batch, arrived in leaving:
        outcome = answers.get(batch.place) or error
        arrived(outcome or kafka.KafkaProtocolError(f"no answer for {batch.place}"))
