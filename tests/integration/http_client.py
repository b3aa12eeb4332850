"""A small HTTP/1.1 client for load; a general one takes more CPU than what it measures.

It understands what Uvicorn answers to a GET: a head and a body of a known length.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Self

Address = tuple[str, int]


class ClosedError(Exception):
    """The server closed the connection instead of answering."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: Address) -> Self:
        return cls(*await asyncio.open_connection(*address))

    async def send(self, target: str, *headers: str) -> None:
        lines = (f"GET {target} HTTP/1.1", "host: test", *headers, "", "")
        self._writer.write("\r\n".join(lines).encode())
        try:
            await self._writer.drain()
        except ConnectionError as exc:
            raise ClosedError from exc

    async def answer(self) -> Answer:
        """Read the answer to what was sent.

        Raises:
            ClosedError: the connection ended before the answer began.
            asyncio.IncompleteReadError: it ended in the middle of it.
        """
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                raise
            raise ClosedError from exc
        except ConnectionError as exc:
            raise ClosedError from exc
        first, *lines = head.decode().split("\r\n")[:-2]
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        body = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(first.split()[1]), headers, body)

    async def close(self) -> None:
        """Leave; what was asked and not answered is given up."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return  # the server was faster


class Client:
    """Sends one request after the other, as RFC 9110 (9.2.2) and 9112 (9.3.1) let a client do.

    A server may close a connection at any time. A request that is idempotent, as all of these are,
    is then sent again on a new one.

    Args:
        address: of the server.
        keeps: whether it keeps its connection, or makes one for each request.

    Attributes:
        stale: how often a kept connection was closed instead of an answer.
        dropped: how often a new one was.
    """

    def __init__(self, address: Address, *, keeps: bool) -> None:
        self._address = address
        self._keeps = keeps
        self._kept: Connection | None = None
        self.stale = 0
        self.dropped = 0

    async def get(self, target: str) -> Answer:
        """Return the answer of the server, whatever its status."""
        while True:
            kept, self._kept = self._kept, None
            connection = kept or await Connection.open(self._address)
            try:
                await connection.send(target, *([] if self._keeps else ["connection: close"]))
                answer = await connection.answer()
            except ClosedError:
                await connection.close()
                self.stale += kept is not None
                self.dropped += kept is None
                continue
            if answer.headers.get("connection") == "close":
                await connection.close()
            else:
                self._kept = connection
            return answer

    async def leave(self, target: str, patience: float) -> bool:
        """Ask, and go away after *patience* seconds; returns whether no answer had come."""
        connection = self._kept or await Connection.open(self._address)
        self._kept = None
        await connection.send(target)
        try:
            async with asyncio.timeout(patience):
                await connection.answer()
        except TimeoutError:
            return True
        finally:
            await connection.close()
        return False

    async def close(self) -> None:
        if self._kept is not None:
            await self._kept.close()
