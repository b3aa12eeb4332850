"""SIGTERM and SIGINT: both stop every broker of the event loop that waits to be closed."""

from __future__ import annotations

import asyncio
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Signals:
    """The two signals of one event loop, and all brokers that they stop."""

    def __init__(self) -> None:
        self._stops: list[Callable[[], None]] = []
        self._before: dict[signal.Signals, Any] = {}

    def add(self, stop: Callable[[], None]) -> None:
        """Stop this one, too; the first takes the signals."""
        self._stops.append(stop)
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, ValueError, RuntimeError):  # as on Windows
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(number)
                loop.add_signal_handler(number, self._stop_all)
                self._before[number] = before

    def remove(self, stop: Callable[[], None]) -> None:
        """Leave this one alone; after the last the signals have their usual effect again."""
        if stop in self._stops:
            self._stops.remove(stop)
        if not self._stops:
            self._give_back()

    def _stop_all(self) -> None:
        self._give_back()
        for stop in self._stops:
            stop()

    def _give_back(self) -> None:
        loop = asyncio.get_running_loop()
        while self._before:
            number, before = self._before.popitem()
            loop.remove_signal_handler(number)
            if before is not None:
                signal.signal(number, before)


_stops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Signals] = WeakKeyDictionary()


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Let SIGTERM and SIGINT call *stop*, the first time, where the platform allows it."""
    signals = _stops.setdefault(asyncio.get_running_loop(), _Signals())
    signals.add(stop)
    try:
        yield
    finally:
        signals.remove(stop)
