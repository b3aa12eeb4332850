"""Every benchmark, once and tiny: `make bench-smoke`, so that none rots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
PAGE = """# Page
<!-- begin: requests/rate -->
old figures
<!-- end: requests/rate -->
Text.
"""


@pytest.mark.integration
def test_every_benchmark_runs(kafka: str, tmp_path: Path) -> None:
    """Each suite measures ours and each peer that is installed, and a report is made of it."""
    results, plot, page = (tmp_path / name for name in ("results.jsonl", "plot.svg", "page.md"))
    arguments = ["--smoke", "--servers", kafka, "--output", str(results)]
    if os.environ.get("CI"):
        arguments += ["--build", "uvloop", "--build", "kafka-broker 0.4"]
    done = run("bench.py", *arguments)
    assert 0 == done.returncode, done.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [] == [line for line in lines if "error" in line]
    measured = {(line["suite"], line["system"]) for line in lines if "suite" in line}
    suites = {"requests", "payloads", "open loop", "produce", "consume", "start", "idle"}
    peers = {"aiokafka", "FastStream", "confluent-kafka"}
    for suite in suites:
        assert {(suite, peer) for peer in ("ours", *peers)} <= measured
    assert {("memory", "ours"), ("lookup", "ours"), ("soak", "ours")} <= measured
    for suite in ("partitions", "replicas"):
        assert {(suite, "ours"), (suite, "aiokafka")} <= measured
    report = run("report.py", str(results), "--plot", str(plot))
    assert 0 == report.returncode, report.stderr
    assert "| **ours / aiokafka** |" in report.stdout
    assert plot.read_text().startswith("<svg")
    page.write_text(PAGE)
    assert 0 == run("report.py", str(results), "--plot", str(plot), "--doc", str(page)).returncode
    begin, old, end = PAGE.partition("old figures")
    assert page.read_text().startswith(begin)
    assert page.read_text().endswith(end)
    assert old not in page.read_text()
    assert "| **ours / aiokafka** |" in page.read_text()


def test_a_ratio_is_of_one_round(tmp_path: Path) -> None:
    """A cell is the median and the spread; a ratio is the median of those of rounds with both."""
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    rates = {"aiokafka": {1: 10, 2: 1, 0: 5}, "ours": {0: 10, 1: 30}}
    line = {"suite": "requests", "case": {"in flight": 1}}
    results.write_text(
        "".join(
            json.dumps(line | {"system": system, "round": number, "result": {"rate": rate}}) + "\n"
            for system, rounds in rates.items()
            for number, rate in rounds.items()
        )
    )
    page.write_text(PAGE)
    done = run("report.py", str(results), "--plot", str(tmp_path / "plot"), "--doc", str(page))
    assert 0 == done.returncode, done.stderr
    assert [
        "| aiokafka | 5.00 (1.00..10.0) |",
        "| ours | 20.0 (10.0..30.0) |",
        "| **ours / aiokafka** | **2.50** |",
    ] == [row for row in page.read_text().splitlines() if "|" in row][2:]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  # our own program
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
