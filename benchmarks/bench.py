"""Measure ours and what else there is, on a real Kafka: ``python benchmarks/bench.py``.

The systems take turns, round by round; each measurement has processes of its own. Each result is
one line of JSON, on the standard output or in a file; `report.py` makes tables and plots of them.
What counts is the ratio to a peer in the same round. For the figures of our documentation:

    python benchmarks/bench.py --short --seconds 1.5 --output results.jsonl
    python benchmarks/report.py results.jsonl --doc docs/explanation/performance.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import aclosing
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import environments
import raw
from jobs import FailedError
from kafka_broker.testing import kafka_server
from suites import OPTIONAL, PREFIX, SUITES, Bench, Suite, short

if TYPE_CHECKING:
    from collections.abc import Iterator

say = partial(print, file=sys.stderr, flush=True)


class Run:
    """What the command line asks for."""

    def __init__(self, options: argparse.Namespace, output: TextIO) -> None:
        self._options, self._output = options, output
        self.failed = 0
        chosen = [SUITES[name] for name in options.only or SUITES]
        if options.short:
            chosen = [short(suite) for suite in chosen]
        self.suites = [
            suite
            for suite in chosen
            if not any(case.get("loop") == "uvloop" for case in suite.cases)
            or environments.available("uvloop")
        ]

    def systems(self, suite: Suite) -> list[str]:
        """Return the systems of a suite that can run and are wanted."""
        wanted = self._options.systems
        names = suite.systems[: 1 if self._options.smoke and suite.name == "uvloop" else None]
        return [
            name
            for name in names
            if environments.available(name)
            and (name in wanted if wanted else not (self._options.smoke and name in OPTIONAL))
        ]

    def plan(self) -> str:
        """Return about how many minutes it is going to take, in all and by suite."""
        rounds, seconds = self._options.rounds, self._options.seconds
        minutes = {
            suite.name: suite.seconds(len(self.systems(suite)), rounds, seconds) / 60
            for suite in self.suites
        }
        each = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
        return f"This is going to take at most about {sum(minutes.values()):.0f} minutes: {each}."

    async def measure(self, servers: str) -> None:
        """Measure everything, in turns."""
        self._write(machine())
        bench = Bench(servers, self._options.seconds, self._options.smoke)
        try:
            if bench.smoke:
                await bench.prepare({name for each in self.suites for name in self.systems(each)})
            for suite in self.suites:
                for number in range(suite.rounds(self._options.rounds)):
                    await self._round(bench, suite, number)
        finally:
            await bench.close()
            await raw.delete_topics(servers, PREFIX)

    async def _round(self, bench: Bench, suite: Suite, number: int) -> None:
        for case in [suite.cases[suite.smoke_case]] if bench.smoke else suite.cases:
            for system in self._in_turn(suite, number):
                begin = time.monotonic()
                try:
                    async with aclosing(suite.measure(bench, system, case, suite)) as results:
                        async for at, result in results:
                            line = {"suite": suite.name, "system": system, "case": at}
                            self._write(line | {"round": number, "result": _rounded(result)})
                except FailedError as exc:
                    self.failed += 1
                    say(exc)
                    line = {"suite": suite.name, "system": system, "case": case}
                    self._write(line | {"round": number, "error": str(exc).split("\n")[0]})
                say(f"{suite.name} {number + 1}: {system}: {time.monotonic() - begin:.1f} s")

    def _in_turn(self, suite: Suite, number: int) -> Iterator[str]:
        """Yield the systems; another one begins each round."""
        systems = self.systems(suite)
        for place in range(len(systems)):
            yield systems[(place + number) % len(systems)]

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._output, flush=True)


def machine() -> dict[str, Any]:
    """Return what the results depend on."""
    return {
        "machine": {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "cpus": os.cpu_count(),
            "cpu": _cpu(),
            "load": round(os.getloadavg()[0], 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "commit": _commit(),
            "command": _command(),
            **{name: _version(name) for name in ("aiokafka", "pydantic", "confluent-kafka")},
            "faststream": _version("faststream"),
        }
    }


def _command() -> str:
    """Return the command without what is only of this machine."""
    given, words = iter(sys.argv[1:]), ["python", "benchmarks/bench.py"]
    for each in given:
        name, equals, _ = each.partition("=")
        if name not in {"--servers", "--output"}:
            words.append(shlex.quote(each))
        elif not equals:
            next(given)
    return " ".join(words)


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = (line.partition(": ")[2] for line in text.splitlines() if "model name" in line)
    return next(names, platform.machine())


def _commit() -> str:
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _rounded(result: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=SUITES, help="a suite; repeatable")
    parser.add_argument("--systems", action="append", help="a system; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="what the documentation needs")
    parser.add_argument("--plan", action="store_true", help="only say how long it would take")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--output", type=Path, help="file to append the results to")
    parser.add_argument("--smoke", action="store_true", help="each benchmark once, tiny")
    parser.add_argument("--build", action="append", help="a system to build first, or uvloop")
    parser.add_argument("--servers", help="a Kafka that runs")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 0.2
    elif options.build is None and not options.plan:
        systems = {name for each in options.only or SUITES for name in SUITES[each].systems}
        options.build = ["uvloop", *sorted(systems & set(options.systems or systems))]
    return options


def main() -> None:
    """Read the command line and run."""
    options = _options()
    if options.servers:
        os.environ["KAFKA_BROKER_BOOTSTRAP_SERVERS"] = options.servers
    for name in options.build or ():
        environments.build(name, say)
    if options.plan:
        say(Run(options, sys.stdout).plan())
        return
    # Tests start Kafka without the JVM's second compiler; this variable overrules its arguments.
    os.environ.setdefault("_JAVA_OPTIONS", "-XX:TieredStopAtLevel=4")
    with (
        open(options.output or os.devnull, "a", encoding="utf-8") as file,  # noqa: PTH123  # or not
        kafka_server(report=say) as servers,
    ):
        run = Run(options, file if options.output else sys.stdout)
        if not options.smoke:
            say(run.plan())
        asyncio.run(run.measure(servers))
    if run.failed and options.smoke:
        sys.exit(f"{run.failed} failed")


if __name__ == "__main__":
    main()
