"""`make shop` and `make demo`: Kafka and the shop's three services, with one command.

Stock, payments and orders run as a process each; stock and payments are started again when they
end. On a machine that can have no Kafka all run in this one process, on ``memory://``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from demo import ShopError, show
from kafka_broker import BrokerManager
from kafka_broker.testing import NoKafkaError, kafka_server

UP_WITHIN = 60.0
DOWN_WITHIN = 30.0  # longer than a broker takes to drain
RESTART_AFTER = 8.0  # long enough to see in the page what an outage does
CUT_AFTER = 2  # seconds for routes that still wait, and for pages that are open


def say(line: str) -> None:
    """Tell at once what happens."""
    print(f"shop: {line}", flush=True)


class ServiceProcess:
    """One service in a process of its own; what it prints goes to a file."""

    def __init__(self, name: str, command: list[str], ready: str, logs: Path, kafka: str) -> None:
        self._name = name
        self._command = command
        self._ready = ready
        self._log = logs / name
        self._environment = {**os.environ, "KAFKA_BROKER_BOOTSTRAP_SERVERS": kafka}
        self._restart_at: float | None = None
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *self._command],
                cwd=Path(__file__).parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,  # Ctrl-C is for this program, which stops its services in order
            )

    def wait_ready(self) -> str:
        """Return what it prints when it is ready, as soon as it does."""
        deadline = time.monotonic() + UP_WITHIN
        while not (found := re.search(self._ready, self._log.read_text())):
            self.check()
            if time.monotonic() > deadline:
                raise ShopError(f"{self._name} was not up after {UP_WITHIN:g} s")
            time.sleep(0.02)
        say(f"{self._name} is up (process {self._process.pid})")
        return found[0]

    def check(self) -> None:
        """Make sure that it runs."""
        if self._process.poll() is not None:
            raise ShopError(f"{self._name} ended with code {self._process.returncode}")

    def keep_up(self) -> None:
        """Start it again some seconds after it has ended, whatever ended it."""
        if self._process.poll() is None:
            return
        if self._restart_at is None:
            self._restart_at = time.monotonic() + RESTART_AFTER
            ended = f"{self._name} has ended (code {self._process.returncode})"
            say(f"{ended}; it starts again in {RESTART_AFTER:g} s")
        elif time.monotonic() >= self._restart_at:
            self._restart_at = None
            self._process = self._start()
            self.wait_ready()

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


def on_kafka(kafka: str, *, demo: bool) -> None:
    """Run the services as three processes; orders is the last to come and the first to go."""
    say(f"Kafka is at {kafka}")
    serving = ["-m", "uvicorn", "orders:app", "--port", "0"]
    serving += ["--timeout-graceful-shutdown", str(CUT_AFTER)]
    started: list[ServiceProcess] = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, command: list[str], ready: str) -> ServiceProcess:
            service = ServiceProcess(name, command, ready, logs, kafka)
            stack.callback(service.stop)
            started.append(service)
            return service

        try:
            stock = start("stock", ["stock.py"], "stock is ready")
            payments = start("payments", ["payments.py"], "payments is ready")
            orders = start("orders", serving, r"http://[\d.]+:\d+")
            stock.wait_ready()
            payments.wait_ready()
            url = orders.wait_ready()
            if demo:
                show(url)
                return
            say_open(url)
            while True:
                orders.check()  # its address would be another one after a restart
                stock.keep_up()
                payments.keep_up()
                time.sleep(0.1)
        except KeyboardInterrupt:
            say("stopping; what is being handled has some seconds")
            raise
        except ShopError as exc:
            tails = [service.tail() for service in started]
            raise ShopError("\n".join([str(exc), *tails])) from exc


async def in_memory(*, demo: bool) -> None:
    """Run the same services as tasks of this process."""
    os.environ["KAFKA_BROKER_BOOTSTRAP_SERVERS"] = "memory://"
    import orders  # noqa: PLC0415  # reads its settings from the environment
    import payments  # noqa: PLC0415  # not needed in this process otherwise
    import stock  # noqa: PLC0415  # the same

    server = uvicorn.Server(
        uvicorn.Config(orders.app, log_level="warning", timeout_graceful_shutdown=CUT_AFTER)
    )
    # Named as TCP, asyncio sends without delay what comes through it.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with (
            BrokerManager("Stock", router=stock.router),
            BrokerManager("Payments", router=payments.router),
        ):
            serving = asyncio.create_task(server.serve([listener]))
            try:
                if demo:
                    await asyncio.to_thread(show, url)
                else:
                    say_open(url)
                    await serving
            finally:
                server.should_exit = True
                await serving


def say_open(url: str) -> None:
    """Tell where the page is."""
    say(f"it stays up until Ctrl-C: open {url}")


def run(*, demo: bool) -> None:
    """Run the shop on a Kafka if this machine can have one, else in memory."""
    try:
        with kafka_server(report=say) as kafka:
            on_kafka(kafka, demo=demo)
    except NoKafkaError as exc:
        say(str(exc))
        say("so all services run in this one process, on memory://")
        asyncio.run(in_memory(demo=demo))


def main() -> int:
    """Return the exit code: 0 when the shop was stopped, or the demo went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="place some orders, print them, end")
    demo = parser.parse_args().demo
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without
    for number in (signal.SIGTERM, signal.SIGHUP):  # all that ends it is a Ctrl-C
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run(demo=demo)
    except KeyboardInterrupt:
        say("stopped")
        return 130 if demo else 0
    except (ShopError, RuntimeError) as exc:
        print(f"shop: failed: {exc}", file=sys.stderr)
        return 1
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
