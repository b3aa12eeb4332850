"""Middleware that does what Kafka, networks and handlers do at the worst moment, for tests."""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING, Any

from kafka_broker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_broker._event import EventObject
    from kafka_broker._middleware import Handle, Middleware


class InjectedError(Exception):
    """What `fail_some` raises unless it is given something else."""


def duplicate(share: float = 1.0, *, seed: int | None = None) -> Middleware:
    """Handle events twice in a row, as after a crash before the commit; the second reply counts.

    Args:
        share: of the events, from 0 to 1.
        seed: makes the choice repeatable.

    Raises:
        ConfigurationError: the share is out of range.
    """
    chosen = _chooser(share, seed)

    def wrap(handle: Handle) -> Handle:
        async def doubled(event: EventObject[Any]) -> Any:
            if chosen():
                await handle(event.model_copy(deep=True))
            return await handle(event)

        return doubled

    return wrap


def fail_some(
    share: float = 0.5,
    *,
    error: Callable[[], Exception] = InjectedError,
    after: bool = False,
    seed: int | None = None,
) -> Middleware:
    """Raise in place of some tries.

    Args:
        share: of the tries, from 0 to 1.
        error: makes the exception.
        after: let the handler run first and lose what it returned.
        seed: makes the choice repeatable.

    Raises:
        ConfigurationError: the share is out of range.
    """
    chosen = _chooser(share, seed)

    def wrap(handle: Handle) -> Handle:
        async def failing(event: EventObject[Any]) -> Any:
            fails = chosen()
            if fails and not after:
                raise error()
            result = await handle(event)
            if fails:
                raise error()
            return result

        return failing

    return wrap


def delay(seconds: float, *, up_to: float | None = None, seed: int | None = None) -> Middleware:
    """Wait before every try: *seconds*, or by chance between that and *up_to*.

    Raises:
        ConfigurationError: the seconds are negative, or the second number is the smaller one.
    """
    longest = seconds if up_to is None else up_to
    if not 0 <= seconds <= longest < math.inf:
        raise ConfigurationError(f"delay needs 0 <= seconds <= up_to, got {seconds!r}, {up_to!r}")
    chance = random.Random(seed)  # noqa: S311  # no secret

    def wrap(handle: Handle) -> Handle:
        async def delayed(event: EventObject[Any]) -> Any:
            await asyncio.sleep(chance.uniform(seconds, longest))
            return await handle(event)

        return delayed

    return wrap


def _chooser(share: float, seed: int | None) -> Callable[[], bool]:
    if not 0 <= share <= 1:
        raise ConfigurationError(f"a share is from 0 to 1, got {share!r}")
    chance = random.Random(seed)  # noqa: S311  # no secret
    return lambda: chance.random() < share
