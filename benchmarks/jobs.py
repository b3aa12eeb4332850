"""The processes of the benchmark, as the one that measures sees them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from job import TIMEOUT, Job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

ENDS_WITHIN: Final = 10.0


class FailedError(Exception):
    """A process ended, or did not answer in time."""


class Process:
    """A process that does one job after the other."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Any) -> None:
        self._process, self._errors = process, errors

    @property
    def ended(self) -> bool:
        """Whether it is of no use any more."""
        return self._process.returncode is not None

    async def do(self, job: Job) -> dict[str, float]:
        """Let it do *job* and return the result.

        Raises:
            FailedError: It could not.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101  # both are pipes
        assert stdout is not None  # noqa: S101
        try:
            async with asyncio.timeout(4 * job.seconds + 5 * TIMEOUT):
                stdin.write(json.dumps(asdict(job)).encode() + b"\n")
                await stdin.drain()
                line = await stdout.readline()
            result: dict[str, float] = json.loads(line)
        except (TimeoutError, OSError, ValueError) as exc:
            self._kill()
            self._errors.seek(0)
            told = self._errors.read().decode(errors="replace")[-2000:]
            raise FailedError(f"{job.system}: {job.role}: {exc!r}\n{told}") from exc
        return result

    def cpu_seconds(self) -> float:
        """Return what it and its children have used so far."""
        return cpu_seconds(self._process.pid)

    def megabytes(self) -> float:
        """Return the memory that it has now."""
        return resident_bytes(self._process.pid) / 1e6

    async def end(self) -> None:
        """End it, and what it may have left behind."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), ENDS_WITHIN)
        except TimeoutError:
            pass
        finally:
            self._kill()
            await self._process.wait()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own


@asynccontextmanager
async def process(command: Sequence[str], environment: dict[str, str]) -> AsyncIterator[Process]:
    """Run *command* as a process that takes jobs."""
    pipe = asyncio.subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        started = Process(
            await asyncio.create_subprocess_exec(
                *command,
                stdin=pipe,
                stdout=pipe,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, **environment},
                limit=2**20,
            ),
            errors,
        )
        try:
            yield started
        finally:
            await started.end()


def cpu_seconds(pid: int) -> float:
    """Return what a process and its children have used so far; NaN where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return float("nan")
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


@cache
def listening(servers: str) -> int | None:
    """Return the process of a Kafka on this machine, or None: elsewhere, or not ours to see."""
    host, _, port = servers.partition(",")[0].rpartition(":")
    if host not in {"localhost", "127.0.0.1"}:
        return None
    listens = f":{int(port):04X} ", " 0A "  # the state, as numbered by Linux
    try:
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path("/proc/net", name).read_text().splitlines()
            if all(each in line for each in listens)
        ]
        sockets = {f"socket:[{line[9]}]" for line in lines}
        return next(
            int(each.parts[2])
            for each in Path("/proc").glob("[0-9]*/fd/*")
            if _target(each) in sockets
            and "java" in Path("/proc", each.parts[2], "comm").read_text()
        )
    except (OSError, StopIteration):
        return None


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""  # closed by now, or another user's


def resident_bytes(pid: int) -> float:
    """Return the memory of a process; NaN where there is no /proc."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("nan")
