"""A client of aiokafka that is replaced when it can do nothing more."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from kafka_broker._transport.kafka_client import FOREIGN, REQUEST_TIMEOUT, close, connect, is_dead
from kafka_broker.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from kafka_broker._settings import BrokerSettings

_logger = logging.getLogger("kafka_broker.transport")

PATIENCE: Final = 10.0
"""Seconds of nothing but failures after which bootstrap_servers are asked where Kafka is now."""


class KeptClient:
    """A client that works, as far as there can be one.

    aiokafka asks only the nodes that it knows, so when all of them have moved it never finds them.

    Attributes:
        now: the client of the moment; None before the start and after the end.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._options = {"request_timeout_ms": int(REQUEST_TIMEOUT * 1000)}
        self._replacing = asyncio.Lock()
        self._failing_since: float | None = None
        self._closed = True
        self.now: Any = None

    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailableError: nothing answers, or it refuses us.
        """
        self.now = await connect(self._settings, self._options)
        self._closed = False

    async def close(self) -> None:
        """Close the connections. Never raises."""
        self._closed = True
        client, self.now = self.now, None
        if client is not None:
            await close(client, client.close())

    def works(self) -> None:
        """Note a good answer."""
        self._failing_since = None

    def fails(self) -> None:
        """Note that something failed, and another client might do better."""
        if self._failing_since is None:
            self._failing_since = asyncio.get_running_loop().time()

    async def get(self) -> Any:
        """Return a client that works, if need be a new one; one that only fails is kept till then.

        Raises:
            BrokerUnavailableError: it is closed, or none could connect.
        """
        client, now = self.now, asyncio.get_running_loop().time()
        if client is not None and is_dead(client):
            _logger.warning("the connection to Kafka was cut from inside; connecting again")
            await self._replace(client)
        elif self._failing_since is not None and now - self._failing_since >= PATIENCE:
            self._failing_since = now  # who comes meanwhile goes on with what there is
            _logger.warning("nothing has worked for %g s; connecting to Kafka anew", PATIENCE)
            try:
                await self._replace(client)
            except BrokerUnavailableError as exc:
                _logger.warning("%s", exc)
        if self.now is None:
            msg = "the connection to Kafka is closed"
            raise BrokerUnavailableError(msg)
        return self.now

    async def _replace(self, client: Any) -> None:
        async with self._replacing:
            if self.now is not client or self._closed:
                return
            another = await connect(self._settings, self._options)
            if self._closed:
                client = another
            else:
                self.now = another
            await close(client, client.close())

    async def ask(self, client: Any, request: Any) -> Any:
        """Return what any node answers; raises what aiokafka does, and TimeoutError."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                answer = await client.send(client.get_random_node(), request)
        except FOREIGN:
            self.fails()
            raise
        self.works()
        return answer
