"""Charts as SVG: lines on logarithmic axes, and bars."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WIDTH, HEIGHT, COLUMNS = 480, 330, 2
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 44, 34
LEGEND: Final = 40
COLOURS: Final = {
    "ours": "#d6336c",
    "aiokafka": "#1c7ed6",
    "aiokafka batches": "#74c0fc",
    "FastStream": "#2f9e44",
    "FastStream ACK": "#8ce99a",
    "confluent-kafka": "#e8590c",
    "kafka-broker 0.4": "#868e96",
    "Spring": "#7048e8",
    "NestJS": "#b08900",
}


@dataclass(frozen=True)
class Chart:
    """Points by system, joined by lines; or one bar for each system."""

    title: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.bars and not any(self.lines.values())


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis that covers *values*, from whole decade to whole decade."""

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float) -> Scale:
        """Return the scale for some values."""
        logs = [math.log10(value) for value in values]
        low = math.floor(min(logs) + 1e-9)
        return cls(low, max(low + 1, math.ceil(max(logs) - 1e-9)), start, end)

    def place(self, value: float) -> float:
        """Return where a value is."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def decades(self) -> Iterator[float]:
        """Yield the values that are marked."""
        for power in range(self.low, self.high + 1):
            yield 10.0**power


def drawing(charts: list[Chart]) -> str:
    """Return an SVG document with all charts and one legend."""
    rows = math.ceil(len(charts) / COLUMNS)
    width, height = COLUMNS * WIDTH, LEGEND + rows * HEIGHT
    systems = dict.fromkeys(name for chart in charts for name in (*chart.lines, *chart.bars))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        '<g font-family="sans-serif" font-size="12" fill="#212529">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_legend(list(systems), width),
    ]
    for number, chart in enumerate(charts):
        x, y = number % COLUMNS * WIDTH, LEGEND + number // COLUMNS * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">')
        parts.append(f'<text x="{LEFT}" y="26" font-weight="bold">{escape(chart.title)}</text>')
        parts.extend(_bars(chart.bars) if chart.bars else _lines(chart.lines))
        parts.append("</g>")
    return "\n".join((*parts, "</g></svg>", ""))


def _legend(systems: list[str], width: int) -> Iterator[str]:
    step = (width - LEFT) / max(len(systems), 1)
    for number, name in enumerate(systems):
        x = round(LEFT + number * step)
        yield f'<circle cx="{x}" cy="22" r="5" fill="{COLOURS.get(name, "#000")}"/>'
        yield f'<text x="{x + 9}" y="26" font-size="11">{escape(name)}</text>'


def _lines(lines: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    points = [point for each in lines.values() for point in each]
    across = Scale.of((x for x, _ in points), LEFT, WIDTH - RIGHT)
    up = Scale.of((y for _, y in points), HEIGHT - BOTTOM, TOP)
    for value in across.decades():
        x = across.place(value)
        yield f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="#e9ecef"/>'
        yield f'<text x="{x}" y="{HEIGHT - 14}" text-anchor="middle">{value:,g}</text>'
    for value in up.decades():
        y = up.place(value)
        yield f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#e9ecef"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:,g}</text>'
    for name, some in lines.items():
        colour = COLOURS.get(name, "#000")
        places = [(across.place(x), up.place(y)) for x, y in some]
        path = " ".join(f"{x},{y}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in places:
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'


def _bars(bars: dict[str, float]) -> Iterator[str]:
    """Draw them from the left, as long as their values: bars have no logarithmic scale."""
    step = (HEIGHT - TOP - BOTTOM) / len(bars)
    longest, room = max(bars.values()), WIDTH - LEFT - 100
    for number, (name, value) in enumerate(bars.items()):
        y, length = TOP + number * step, max(1.0, value / longest * room)
        colour = COLOURS.get(name, "#000")
        yield (
            f'<rect x="{LEFT}" y="{y + 2:.1f}" width="{length:.1f}" '
            f'height="{step - 4:.1f}" fill="{colour}"/>'
        )
        middle = y + step / 2 + 4
        yield f'<text x="{LEFT + length + 6:.1f}" y="{middle:.1f}">{value:,.0f}</text>'
