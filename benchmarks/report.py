"""Write Markdown tables and a plot from results: ``python benchmarks/report.py results.jsonl``.

The tables go to the standard output, the plot to docs/images. A cell is the median of the rounds,
and in parentheses the lowest and the highest. A ratio is the median of those of the rounds.
"""

from __future__ import annotations

import argparse
import json
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
_LATENCIES: Final = {"p50": "p50, ms", "p99": "p99, ms", "p999": "p99.9, ms"}
_CPU: Final = {
    "cpu asking": "CPU of a request in the process that asks, µs",
    "cpu answering": "CPU of a request in the process that answers, µs",
}
_REQUESTS: Final = {"rate": "requests/s", **_LATENCIES, **_CPU}
_EVENTS: Final = {"rate": "events/s", "cpu": "CPU of an event, µs"}
TITLES: Final[dict[str, dict[str, str]]] = {  # what is shown of each suite
    "requests": _REQUESTS,
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
}
_AGAINST: Final = {"consume": "FastStream ACK"}
_SMALL: Final = 100
_UNITS: Final = {"size": "{:,} B", "partitions": "{} partitions", "binds": "{:,} binds"}


@dataclass(frozen=True)
class Results:
    """The values of all rounds, by suite, metric, case and system."""

    machines: list[dict[str, Any]]
    errors: list[str]
    values: dict[tuple[str, str, Key, str], list[float]]

    @classmethod
    def read(cls, lines: Iterable[str]) -> Results:
        """Return what the lines of a run say."""
        machines, errors, values = [], [], defaultdict[tuple[str, str, Key, str], list[float]](list)
        for line in map(json.loads, lines):
            if "machine" in line:
                machines.append(line["machine"])
            elif "error" in line:
                errors.append(f"{line['suite']}: {line['error']}")
            else:
                suite, key = line["suite"].removesuffix(" 0.4"), tuple(line["case"].items())
                for metric, value in line["result"].items():
                    values[suite, metric, key, line["system"]].append(value)
        return cls(machines, errors, values)

    def keys(self, suite: str) -> list[Key]:
        """Return the cases of a suite in the order of the run."""
        return list(dict.fromkeys(key for at, _, key, _ in self.values if at == suite))

    def systems(self, suite: str) -> list[str]:
        """Return the systems of a suite in the order of the run."""
        return list(dict.fromkeys(system for at, _, _, system in self.values if at == suite))

    def median(self, suite: str, metric: str, key: Key, system: str) -> float | None:
        """Return the median of the rounds, or None if it was not measured."""
        values = self.values.get((suite, metric, key, system))
        return statistics.median(values) if values else None


def tables(results: Results) -> Iterator[str]:
    """Yield the lines of all tables."""
    for machine in results.machines:
        yield f"`{machine['command']}`: " + ", ".join(
            f"{name} {value}" for name, value in machine.items() if name != "command"
        )
        yield ""
    for suite, metrics in TITLES.items():
        if not (keys := results.keys(suite)):
            continue
        rounds = max(len(each) for at, each in results.values.items() if at[0] == suite)
        yield f"## {suite} ({rounds} rounds)\n"
        same = set.intersection(*(set(key) for key in keys)) if len(keys) > 1 else set()
        for metric, title in metrics.items():
            names = [_case(key, same) for key in keys]
            yield f"| {title} | {' | '.join(names)} |"
            yield "| --- |" + " ---: |" * len(keys)
            for system in results.systems(suite):
                cells = (_cell(results.values.get((suite, metric, key, system))) for key in keys)
                yield f"| {system} | {' | '.join(cells)} |"
            yield from _ratios(results, suite, metric, keys)
            yield ""
    for error in results.errors:
        yield f"failed: {error}"


def _ratios(results: Results, suite: str, metric: str, keys: list[Key]) -> Iterator[str]:
    peers = {"aiokafka", _AGAINST.get(suite, "aiokafka")} & set(results.systems(suite))
    for peer in sorted(peers):
        cells = []
        for key in keys:
            ours = results.values.get((suite, metric, key, "ours"), [])
            theirs = results.values.get((suite, metric, key, peer), [])
            ratios = [mine / other for mine, other in zip(ours, theirs, strict=False) if other]
            cells.append(f"**{statistics.median(ratios):.2f}**" if ratios else "-")
        yield f"| ours / {peer} | {' | '.join(cells)} |"


def _case(key: Key, same: set[tuple[str, Any]]) -> str:
    shown = [(name, value) for name, value in key if (name, value) not in same]
    return (
        ", ".join(
            _UNITS.get(name, "{:,} " + name if isinstance(value, int) else "{}").format(value)
            for name, value in shown
        )
        or "all"
    )


def _cell(values: list[float] | None) -> str:
    if not values:
        return "-"
    digits = 2 if min(values) < _SMALL else 0
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


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
    options = parser.parse_args()
    lines = [line for path in options.results for line in path.read_text().splitlines()]
    results = Results.read(lines)
    print(*tables(results), sep="\n")
    options.plot.write_text(drawing([chart for chart in charts(results) if not chart.empty]))


if __name__ == "__main__":
    main()
