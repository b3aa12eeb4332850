"""`make demo`: an HTTP request, a real Kafka, and a handler that awaits the reply.

Payments (payments.py) and orders (orders.py) run as two processes. On a machine that can have no
Kafka they run in this one process, on ``memory://``.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn

from kafka_broker import BrokerManager
from kafka_broker.testing import NoKafkaError, kafka_server

REQUESTS = 20
UP_WITHIN = 60.0
DOWN_WITHIN = 30.0  # longer than a broker takes to drain


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


def say(line: str) -> None:
    """Tell at once what happens."""
    print(f"demo: {line}", flush=True)


def show(url: str) -> None:
    """Send the requests one after the other; print each reply, the times, and one audit log."""
    print("\n  order  amount  receipt  round trip")
    times: list[float] = []
    reply: Any = None
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    for order in range(1, 1 + REQUESTS + 1):  # the first one opens connections
        begin = time.perf_counter()
        reply = get(connection, f"/charge?order={order}&amount={10 * order}")
        times.append((time.perf_counter() - begin) * 1000)
        receipt = reply["data"]
        print(f"  {order:5}  {receipt['amount']:6}  {receipt['number']:7}  {times[-1]:7.1f} ms")
        if receipt["order"] != order:
            raise DemoError(f"order {order} got the receipt of order {receipt['order']}")
    connection.close()
    first, *others = times
    print(f"\n  The first reply came after {first:.1f} ms, {len(others)} more after", end=" ")
    print(f"{statistics.median(others):.1f} ms (median) to {max(others):.1f} ms (slowest).")
    print(f"\n  The way of order {reply['data']['order']}, from its audit log:", end="\n\n")
    print("  module    event        sent      received")
    for hop in reply["audit_log"]:
        sent, received = clock(hop["time_sent"]), clock(hop["time_received"])
        print(f"  {hop['location']:8}  {hop['event']:11}  {sent}  {received}")
    print()


def get(connection: http.client.HTTPConnection, path: str) -> Any:
    """Return the JSON that a request is answered with."""
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise DemoError(f"GET {path} failed: {exc!r}") from exc
    if response.status != http.HTTPStatus.OK:
        raise DemoError(f"GET {path} was answered with {response.status}: {body.decode()}")
    return json.loads(body)


def clock(seconds: float | None) -> str:
    """Return a time of an audit log as the time of day."""
    return "-" if seconds is None else time.strftime("%H:%M:%S", time.localtime(seconds))


class Service:
    """One service in a process of its own; what it prints goes to a file."""

    def __init__(
        self, name: str, command: list[str], logs: Path, environment: dict[str, str]
    ) -> None:
        self._name = name
        self._log = logs / name
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=Path(__file__).parent,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,  # Ctrl-C is for the demo, which stops its services in order
            )

    def wait_for(self, pattern: str) -> str:
        """Return what *pattern* finds in the output, as soon as it is there."""
        deadline = time.monotonic() + UP_WITHIN
        while not (found := re.search(pattern, self._log.read_text())):
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{self._name} was not up after {UP_WITHIN:g} s")
            time.sleep(0.02)
        say(f"{self._name} is up (process {self._process.pid})")
        return found[0]

    def check(self) -> None:
        """Make sure that it runs."""
        if self._process.poll() is not None:
            raise DemoError(f"{self._name} ended with code {self._process.returncode}")

    def tail(self) -> str:
        """Return the end of the output."""
        lines = self._log.read_text().splitlines()[-20:]
        return "\n".join([f"--- the end of what {self._name} printed:", *lines])

    def stop(self) -> None:
        """End the process as an operator would; one that does not end is killed."""
        self._process.terminate()
        try:
            self._process.wait(DOWN_WITHIN)
        except subprocess.TimeoutExpired:
            say(f"{self._name} did not end within {DOWN_WITHIN:g} s and is killed")
        finally:
            self._process.kill()
            self._process.wait()


def on_kafka(servers: str, *, keep: bool) -> None:
    """Run the services as two processes; payments is the first to come and the last to go."""
    say(f"Kafka is at {servers}")
    kafka = {"KAFKA_BROKER_BOOTSTRAP_SERVERS": servers}
    services: list[Service] = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, *command: str, **environment: str) -> Service:
            service = Service(name, [*command], logs, kafka | environment)
            stack.callback(service.stop)
            services.append(service)
            return service

        try:
            payments = start("payments", "payments.py")
            orders = start(
                "orders", "-m", "uvicorn", "orders:app", "--port", "0", KAFKA_BROKER_MODULE="Orders"
            )
            payments.wait_for("payments is ready")
            url = orders.wait_for(r"http://[\d.]+:\d+")
            show(url)
            if keep:
                say_kept(url)
            while keep:
                for service in services:
                    service.check()
                time.sleep(0.2)
        except DemoError as exc:
            tails = [service.tail() for service in services]
            raise DemoError("\n".join([str(exc), *tails])) from exc


async def in_memory(*, keep: bool) -> None:
    """Run the same services as tasks of this process."""
    os.environ["KAFKA_BROKER_BOOTSTRAP_SERVERS"] = "memory://"
    os.environ["KAFKA_BROKER_MODULE"] = "Orders"
    import orders  # noqa: PLC0415 - not needed in this process otherwise
    import payments  # noqa: PLC0415 - the same

    server = uvicorn.Server(uvicorn.Config(orders.app, log_level="warning"))
    # Named as TCP, asyncio sends without delay what comes through it.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with BrokerManager("Payments", router=payments.router):
            serving = asyncio.create_task(server.serve([listener]))
            try:
                await asyncio.to_thread(show, url)
                if keep:
                    say_kept(url)
                    await serving
            finally:
                server.should_exit = True
                await serving


def say_kept(url: str) -> None:
    """Tell where to look at what runs."""
    say(f"it stays up until Ctrl-C: open {url}/charge?order=7&amount=70 or {url}/docs")


def run(*, keep: bool) -> None:
    """Run the demo on a Kafka if this machine can have one, else in memory."""
    try:
        with kafka_server(report=say) as servers:
            on_kafka(servers, keep=keep)
    except NoKafkaError as exc:
        say(str(exc))
        say("so both services run in this one process, on memory://")
        asyncio.run(in_memory(keep=keep))


def main() -> int:
    """Return the exit code: 0 when every request was answered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave it up until Ctrl-C")
    keep = parser.parse_args().keep
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without
    for number in (signal.SIGTERM, signal.SIGHUP):  # all that ends it is a Ctrl-C
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run(keep=keep)
    except KeyboardInterrupt:
        say("stopped")
        return 0 if keep else 130
    except (DemoError, RuntimeError) as exc:
        print(f"demo: failed: {exc}", file=sys.stderr)
        return 1
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
