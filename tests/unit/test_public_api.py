"""What users may import, and what an import does: nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import kafka_broker
from kafka_broker import errors

ROOT = [
    "BrokerManager",
    "BrokerSettings",
    "Check",
    "ConsumerStorage",
    "DeadLetter",
    "Delivery",
    "EventObject",
    "EventRouter",
    "Handle",
    "Health",
    "Metrics",
    "Middleware",
    "Reject",
    "RetryLater",
    "RetryPolicy",
    "broker_manager",
]

IMPORT = """
import asyncio, gc, json, sys, threading

done = []

def hook(name, arguments):
    if name == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+"):
        return  # Python reads the source
    if name.startswith(("open", "socket.", "subprocess.", "_thread.", "os.fork", "os.mkdir")):
        done.append([name, repr(arguments)])

sys.addaudithook(hook)
import kafka_broker
audited, done = done, None
print(json.dumps({
    "audited": audited,
    "threads": threading.active_count(),
    "loops": sum(isinstance(it, asyncio.AbstractEventLoop) for it in gc.get_objects()),
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def after_import() -> dict[str, Any]:
    """Import the package in a new process that writes no bytecode; return what happened."""
    command = [sys.executable, "-B", "-c", IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  # ours
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_root_has_exactly_its_names() -> None:
    """The root lists its public names, has each of them, and shows no other class or function."""
    shown = [name for name, it in vars(kafka_broker).items() if callable(it) or name in ROOT]
    assert ROOT == sorted(kafka_broker.__all__)
    assert ROOT == sorted(shown)


def test_every_error_is_listed() -> None:
    """The errors module lists every exception class that it defines."""
    defined = [name for name, it in vars(errors).items() if isinstance(it, type)]
    assert sorted(defined) == sorted(errors.__all__)
    assert all(issubclass(getattr(errors, name), errors.BrokerError) for name in errors.__all__)


def test_import_does_nothing() -> None:
    """Importing the package opens no file or socket and starts no process, thread or loop."""
    happened = after_import()
    assert [] == happened["audited"]
    assert 1 == happened["threads"]
    assert 0 == happened["loops"]


def test_import_is_light() -> None:
    """Importing the package loads neither the client library nor what extras bring."""
    loaded = after_import()["modules"]
    heavy = {"aiokafka", "fast_depends", "fastapi", "starlette", "testcontainers", "uvicorn"}
    assert set() == heavy.intersection(loaded)
