"""The demo that `make demo` runs, as its users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
REPLY = re.compile(r"^ +\d+ +\d+ +R-\d+ +[\d.]+ ms$", re.MULTILINE)
PROCESS = re.compile(r"\(process (\d+)\)")


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own program
        [sys.executable, DEMO, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.integration
def test_two_processes_on_kafka(kafka: str) -> None:
    """Each request through Kafka is answered, and both services are gone afterwards."""
    done = demo(KAFKA_BROKER_BOOTSTRAP_SERVERS=kafka)
    assert 0 == done.returncode, done.stderr
    assert 21 == len(REPLY.findall(done.stdout))
    assert "Payments  respond" in done.stdout
    services = [int(pid) for pid in PROCESS.findall(done.stdout)]
    assert 2 == len(services)
    assert not any(alive(pid) for pid in services)


@pytest.mark.integration
def test_kept_until_interrupted(kafka: str) -> None:
    """With --keep the services stay up, and Ctrl-C ends them and the demo well."""
    with subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-u", DEMO, "--keep"],
        env={**os.environ, "KAFKA_BROKER_BOOTSTRAP_SERVERS": kafka},
        stdout=subprocess.PIPE,
        text=True,
    ) as kept:
        try:
            output = _until(kept, "until Ctrl-C: open http://127.0.0.1:")
            services = [int(pid) for pid in PROCESS.findall(output)]
            assert [True, True] == [alive(pid) for pid in services]
            kept.send_signal(signal.SIGINT)
            assert 0 == kept.wait(timeout=60)
        finally:
            kept.kill()
    assert not any(alive(pid) for pid in services)


def _until(process: subprocess.Popen[str], text: str) -> str:
    """Return what a process has printed as soon as *text* is in it."""
    assert process.stdout is not None
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    return output


@pytest.mark.integration
def test_failing_service_is_shown(kafka: str) -> None:
    """When a service cannot start, the demo fails and shows what the service printed."""
    done = demo(KAFKA_BROKER_BOOTSTRAP_SERVERS=kafka, KAFKA_BROKER_COMMIT_INTERVAL="never")
    assert 1 == done.returncode
    assert "commit_interval" in done.stderr
    assert not any(alive(int(pid)) for pid in PROCESS.findall(done.stdout))


def test_one_process_in_memory(tmp_path: Path) -> None:
    """Without Docker and Java the demo says what is missing and succeeds in memory."""
    environment = {"PATH": os.fspath(tmp_path), "JAVA_HOME": "", "DOCKER_HOST": "tcp://127.0.0.1:1"}
    done = demo(KAFKA_BROKER_BOOTSTRAP_SERVERS="", **environment)
    assert 0 == done.returncode, done.stderr
    assert "install Java" in done.stdout
    assert "in this one process, on memory://" in done.stdout
    assert 21 == len(REPLY.findall(done.stdout))
