"""Every benchmark, once and tiny: `make bench-smoke`, so that none rots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.integration
def test_every_benchmark_runs(kafka: str, tmp_path: Path) -> None:
    """Each suite measures ours and each peer that is installed, and a report is made of it."""
    results, plot = tmp_path / "results.jsonl", tmp_path / "plot.svg"
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
    report = run("report.py", str(results), "--plot", str(plot))
    assert 0 == report.returncode, report.stderr
    assert "| ours / aiokafka |" in report.stdout
    assert plot.read_text().startswith("<svg")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  # our own program
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
