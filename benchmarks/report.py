"""Write Markdown tables and a plot from results: ``python benchmarks/report.py results.jsonl``.

The tables go to the standard output, or with ``--doc`` between the markers of a page; the plot goes
to docs/images. A cell is the median of the rounds, and in parentheses the lowest and the highest. A
ratio is the median of those of the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from plot import Chart, drawing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PLOT: Final = Path(__file__).parent.parent / "docs/images/performance.svg"
Key = tuple[tuple[str, Any], ...]
Place = tuple[str, str, Key, str]
Turn = tuple[int, int, int]
_LATENCIES: Final = {"p50": "p50, ms", "p99": "p99, ms", "p999": "p99.9, ms"}
_CPU: Final = {
    "cpu asking": "CPU of a request in the process that asks, µs",
    "cpu answering": "CPU of a request in the process that answers, µs",
}
_KAFKA: Final = {"cpu Kafka": "CPU of a request in Kafka, µs"}
_REQUESTS: Final = {"rate": "requests/s", **_LATENCIES, **_CPU, **_KAFKA}
_REPLICAS: Final = {"cpu": "CPU of a request in all processes but Kafka, µs", **_KAFKA}
_EVENTS: Final = {"rate": "events/s", "cpu": "CPU of an event, µs"}
TITLES: Final[dict[str, dict[str, str]]] = {  # what is shown of each suite
    "requests": _REQUESTS,
    "partitions": _REQUESTS,
    "replicas": {"rate": "requests/s", "p50": "p50, ms", "p99": "p99, ms", **_REPLICAS},
    "payloads": _REQUESTS,
    "uvloop": _REQUESTS,
    "open loop": {**_REQUESTS, "rate": "answered per second", "failed": "not answered"},
    "produce": _EVENTS,
    "consume": {**_EVENTS, "committed": "committed, of those handled"},
    "start": {"ready": "started, s", "handled": "first event handled, s"},
    "idle": {"percent": "CPU while idle, % of a core"},
    "soak": {"rate": "requests/s", "MB asking": "MB, asking", "MB answering": "MB, answering"},
    "memory": {"bytes": "bytes of a pending wait", "resident": "as the system counts"},
    "lookup": {"nanoseconds": "to find a handler, ns"},
    "costs": {
        "produce": "to produce an event, µs",
        "make": "of that: to make the `EventObject`",
        "encode": "of that: the envelope",
        "100 records": "of that: the record in its batch, by aiokafka",
        "handle": "to handle an event, from its record to its commit, µs",
        "decode": "of that: to decode the envelope",
        "validate": "of that: to validate the model",
        "lanes": "of that: order of keys, seats, watermark",
        "answer": "to handle and answer a request, µs",
        "ask": "to send a request and return its reply, µs",
        "request": "a request in the log, bytes",
        "reply": "its reply, bytes",
    },
}
_AGAINST: Final = {"consume": "FastStream ACK"}
_UNITS: Final = {"size": "{:,} B", "handler": "`{}`"}
_DIGITS: Final = 3
_MARKED: Final = re.compile(
    r"(?P<begin><!-- begin: (?P<name>[^\n]+) -->)\n.*?(?P<end><!-- end: (?P=name) -->)", re.DOTALL
)


@dataclass(frozen=True)
class Results:
    """The values of all rounds, by suite, metric, case and system.

    Each has its turn: the run, the round, and which of several in this round it was.
    """

    machines: list[dict[str, Any]]
    errors: list[str]
    values: dict[Place, dict[Turn, float]]

    @classmethod
    def read(cls, lines: Iterable[str]) -> Results:
        """Return what the lines of some runs say."""
        machines, errors = list[dict[str, Any]](), list[str]()
        values = defaultdict[Place, dict[Turn, float]](dict)
        for line in map(json.loads, lines):
            if "machine" in line:
                machines.append(line["machine"])
            elif "error" in line:
                errors.append(f"{line['suite']}: {line['error']}")
            else:
                suite, key = line["suite"].removesuffix(" 0.4"), tuple(line["case"].items())
                for metric, value in line["result"].items():
                    found, turn = values[suite, metric, key, line["system"]], line["round"]
                    same = sum(each[:2] == (len(machines), turn) for each in found)
                    found[len(machines), turn, same] = value
        return cls(machines, errors, dict(values))

    def keys(self, suite: str) -> list[Key]:
        """Return the cases of a suite in the order of the run."""
        return list(dict.fromkeys(key for at, _, key, _ in self.values if at == suite))

    def systems(self, suite: str) -> list[str]:
        """Return the systems of a suite in the order of the run."""
        return list(dict.fromkeys(system for at, _, _, system in self.values if at == suite))

    def all(self, suite: str, metric: str, key: Key, system: str) -> list[float]:
        """Return the values of all rounds."""
        return list(self.values.get((suite, metric, key, system), {}).values())

    def median(self, suite: str, metric: str, key: Key, system: str) -> float | None:
        """Return the median of the rounds, or None if it was not measured."""
        values = self.all(suite, metric, key, system)
        return statistics.median(values) if values else None

    def ratios(self, suite: str, metric: str, key: Key, peer: str) -> list[float]:
        """Return ours to a peer's, for each round that has both."""
        ours = self.values.get((suite, metric, key, "ours"), {})
        theirs = self.values.get((suite, metric, key, peer), {})
        return [ours[turn] / theirs[turn] for turn in ours if theirs.get(turn)]


def tables(results: Results) -> Iterator[str]:
    """Yield the lines of all tables."""
    yield from machines(results)
    yield ""
    for suite in TITLES:
        if results.keys(suite):
            yield f"## {suite}\n"
            yield from section(results, suite)
            yield ""
    for error in results.errors:
        yield f"failed: {error}"


def machines(results: Results) -> Iterator[str]:
    """Yield what the results depend on, a line for each run."""
    for machine in results.machines:
        about = (f"{name} {value}" for name, value in machine.items() if name != "command")
        yield f"- `{machine['command']}`: {', '.join(about)}"


def section(results: Results, suite: str, metric: str = "") -> Iterator[str]:
    """Yield the tables of a suite, or that of one metric, below what all its cases share."""
    keys = results.keys(suite)
    metrics = {name: title for name, title in TITLES[suite].items() if metric in {"", name}}
    same = [pair for pair in keys[0] if all(pair in key for key in keys)]
    rounds = len(
        {turn[:2] for at, each in results.values.items() if at[0] == suite for turn in each}
    )
    yield f"{', '.join(_shown([('rounds', rounds), *same]))}."
    if len(keys) == 1:
        yield from _table(results, suite, "", [(metrics[each], each, keys[0]) for each in metrics])
        return
    names = [", ".join(_shown(pair for pair in key if pair not in same)) for key in keys]
    for each, title in metrics.items():
        columns = [(name, each, key) for name, key in zip(names, keys, strict=True)]
        yield from _table(results, suite, title, columns)


def _table(
    results: Results, suite: str, head: str, columns: list[tuple[str, str, Key]]
) -> Iterator[str]:
    """Yield the systems, and ours to each peer that counts; the longer side goes down."""
    systems = results.systems(suite)
    grid = [[head, *(name for name, _, _ in columns)]]
    for system in systems:
        cells = [_cell(results.all(suite, metric, key, system)) for _, metric, key in columns]
        grid.append([system, *cells])
    for peer in [each for each in systems if each in {"aiokafka", _AGAINST.get(suite)}]:
        ratios = [results.ratios(suite, metric, key, peer) for _, metric, key in columns]
        cells = [f"**{_number(statistics.median(each))}**" if each else "-" for each in ratios]
        grid.append([f"**ours / {peer}**", *cells])
    if len(grid[0]) > len(grid):
        grid = [list(row) for row in zip(*grid, strict=True)]
    yield ""
    for number, row in enumerate(grid):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield "| --- |" + " ---: |" * (len(row) - 1)


def _shown(pairs: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for name, value in pairs:
        counted = name.removesuffix("s") if value == 1 else name
        form = "{:,} " + counted if isinstance(value, int) else "{}"
        yield _UNITS.get(name, form).format(value)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    median, low, high = map(_number, (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low}..{high})"


def _number(value: float) -> str:
    """Return a number with the three digits that mean something."""
    if not value or math.isnan(value):
        return f"{value:.0f}"
    digits = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def filled(page: str, results: Results) -> str:
    """Return a page with what stands between its markers made anew.

    A marker has the name of a suite, of one of its metrics as in ``requests/rate``, or ``machine``.

    Raises:
        SystemExit: There are no results for a marker.
    """

    def fill(found: re.Match[str]) -> str:
        suite, _, metric = found["name"].partition("/")
        if suite == "machine":
            lines = machines(results)
        elif not results.keys(suite) or metric not in {"", *TITLES[suite]}:
            raise SystemExit(f"no results for {found['name']!r}")
        else:
            lines = section(results, suite, metric)
        return "\n\n".join((found["begin"], "\n".join(lines), found["end"]))

    return _MARKED.sub(fill, page)


def charts(results: Results) -> Iterator[Chart]:
    """Yield what is plotted."""
    yield _lines(results, "requests", "rate", "in flight", "requests/s by requests in flight")
    yield _lines(results, "requests", "p50", "in flight", "p50 in ms by requests in flight")
    yield _lines(results, "requests", "p99", "in flight", "p99 in ms by requests in flight")
    title = "p99 in ms by requests sent per second (open loop)"
    yield _lines(results, "open loop", "p99", "per second", title)
    bars = {
        "produced/s, 100 B": ("produce", ("size", 100)),
        "handled and committed/s, async def": ("consume", ("handler", "async def")),
    }
    for title, (suite, wanted) in bars.items():
        key = next((key for key in results.keys(suite) if wanted in key), ())
        found = {
            system: value
            for system in results.systems(suite)
            if (value := results.median(suite, "rate", key, system))
        }
        yield Chart(title, bars=found)


def _lines(results: Results, suite: str, metric: str, along: str, title: str) -> Chart:
    lines: dict[str, list[tuple[float, float]]] = {}
    for system in results.systems(suite):
        points = [
            (dict(key)[along], value)
            for key in results.keys(suite)
            if (value := results.median(suite, metric, key, system))
        ]
        lines[system] = sorted(points)
    return Chart(title, lines=lines)


def main() -> None:
    """Read the command line, print the tables and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--doc", type=Path, help="a page to fill, instead of printing")
    options = parser.parse_args()
    lines = [line for path in options.results for line in path.read_text().splitlines()]
    results = Results.read(lines)
    if options.doc:
        options.doc.write_text(filled(options.doc.read_text(), results))
    else:
        print(*tables(results), sep="\n")
    options.plot.write_text(drawing([chart for chart in charts(results) if not chart.empty]))


if __name__ == "__main__":
    main()
