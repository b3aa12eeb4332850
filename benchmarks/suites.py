"""What is measured: for each suite its systems, its cases, and how one of them is measured once."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import environments
import raw
from job import Job
from jobs import Process, cpu_seconds, listening, process
from loads import combined

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    Results = AsyncIterator[tuple["Case", dict[str, float]]]

PREFIX: Final = f"bench-{uuid.uuid4().hex[:8]}"
Case = dict[str, Any]

PYTHON: Final = ("ours", "aiokafka", "FastStream", "confluent-kafka")
OPTIONAL: Final = ("Spring", "NestJS")
OTHERS: Final = ("kafka-broker 0.4", *OPTIONAL)
_FILLS: Final = "aiokafka batches"  # the fastest
_FILL: Final = 60_000
"""Events for each second of consuming: more than any system here handles."""
_WARM_UP: Final = {"Spring": (1000, 12.0), "NestJS": (200, 5.0)}
"""Requests in flight and seconds before measuring, where a compiler has to see them first."""
_FIRST: Final = 0.05
"""Seconds that it takes Kafka at most to write the first records of a partition."""
_WAVES, _LONGEST = 3, 1.7
_ENOUGH: Final = 0.9
"""A system that does not answer this share of a fixed rate is not asked for more."""


@dataclass
class Bench:
    """One run: where Kafka is, how long a measurement takes; keeps what may be used again."""

    servers: str
    seconds: float
    smoke: bool
    topics: dict[str, str] = field(default_factory=dict)
    _kept: dict[tuple[str, ...], Process] = field(default_factory=dict)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def job(self, system: str, case: Case) -> Job:
        """Return a job with a name of its own."""
        name = f"{PREFIX}-{uuid.uuid4().hex[:8]}"
        partitions, replies = case.get("partitions", 1), case.get("reply partitions", 1)
        job = Job("", system, self.servers, name, partitions, self.seconds, replies=replies)
        return replace(job, size=case.get("size", job.size))

    async def create_topics(self, partitions: int, *names: str) -> None:
        """Create topics."""
        await raw.create_topics(self.servers, list(names), partitions)

    def cpu_seconds(self, asks: Sequence[Process], answers: Sequence[Process]) -> dict[str, float]:
        """Return what each side has used so far, and Kafka if it is on this machine."""
        asking = sum(each.cpu_seconds() for each in asks)
        answering = sum(each.cpu_seconds() for each in answers)
        used = {"cpu asking": asking, "cpu answering": answering, "cpu": asking + answering}
        kafka = listening(self.servers)
        return used if kafka is None else used | {"cpu Kafka": cpu_seconds(kafka)}

    @asynccontextmanager
    async def process(
        self, system: str, case: Case, part: str = "asking 0"
    ) -> AsyncIterator[Process]:
        """Run a process for a system; a smoke run uses each again."""
        loop = case.get("loop", "asyncio")
        started = process(*environments.command(system, loop))
        if not self.smoke:
            async with started as one:
                yield one
            return
        kept = self._kept.get((system, loop, part))
        if kept is None or kept.ended:
            kept = self._kept[system, loop, part] = await self._stack.enter_async_context(started)
        yield kept

    async def prepare(self, systems: set[str]) -> None:
        """Start what a smoke run uses all at once: it takes them a second to import."""
        for system in systems:
            for part in ("asking 0", "answering 0"):
                async with self.process(system, {}, part):
                    pass

    async def close(self) -> None:
        """End what was kept."""
        await asyncio.gather(*(kept.end() for kept in self._kept.values()))
        await self._stack.aclose()


async def requests(bench: Bench, system: str, case: Case, suite: Suite) -> Results:
    """Measure requests in flight, or at fixed rates: so many of each process that asks.

    All that ask are replicas of one module, all that answer are members of one group.
    """
    job = bench.job(system, case)
    role = "opened" if suite.name == "open loop" else "closed"
    await bench.create_topics(job.partitions, job.name)
    await bench.create_topics(job.replies, f"{job.name}.replies", f"{job.name}.reply")
    async with AsyncExitStack() as stack:
        asks, answers = [
            await asyncio.gather(
                *(
                    stack.enter_async_context(bench.process(system, case, f"{part} {number}"))
                    for number in range(case.get(part, 1))
                )
            )
            for part in ("asking", "answering")
        ]
        await together(answers, replace(job, role="answer"))
        if len(answers) > 1:
            await raw.joined(job, len(answers))
        await together(asks, replace(job, role="ask"))
        if not bench.smoke:
            level, seconds = _WARM_UP.get(system, (50, job.seconds + _FIRST * job.partitions))
            await together(asks, replace(job, role="closed", level=level, seconds=seconds))
        wave = 0.0  # how long it probably takes to answer all that are in flight once
        levels = suite.smoke_levels if bench.smoke else suite.levels
        for level, following in zip(levels, (*levels[1:], 0), strict=True):
            seconds = max(job.seconds, _WAVES * wave)
            before = bench.cpu_seconds(asks, answers)
            result = await together(asks, replace(job, role=role, level=level, seconds=seconds))
            after = bench.cpu_seconds(asks, answers)
            for name, used in after.items():
                result[name] = (used - before[name]) / max(result["count"], 1) * 1e6
            result["MB asking"] = sum(each.megabytes() for each in asks)
            result["MB answering"] = sum(each.megabytes() for each in answers)
            yield case | {"per second" if role == "opened" else "in flight": level}, result
            if role == "opened" and result["rate"] < _ENOUGH * level * len(asks):
                break
            if role == "closed":
                wave = following * len(asks) / max(result["rate"], 1)
                if wave > _LONGEST * job.seconds:
                    break
        await together([*asks, *answers], replace(job, role="leave"))


async def together(some: Sequence[Process], job: Job) -> dict[str, float]:
    """Let each replica do *job* at the same time."""
    jobs = (each.do(replace(job, replica=number)) for number, each in enumerate(some))
    return combined(await asyncio.gather(*jobs))


async def produce(bench: Bench, system: str, case: Case, _: Suite) -> Results:
    """Measure how many events are acknowledged."""
    job = replace(bench.job(system, case), role="produce")
    await bench.create_topics(job.partitions, job.name)
    async with bench.process(system, case) as one:
        yield case, await one.do(job)


async def consume(bench: Bench, system: str, case: Case, _: Suite) -> Results:
    """Measure how many events are handled, and which part of them was committed at the end."""
    topic = await _filled(bench, case)
    count = _count(bench)
    job = replace(bench.job(system, case), topic=topic, count=count, sync=case["handler"] == "def")
    async with bench.process(system, case) as one:
        result = await one.do(replace(job, role="consume"))
    result["committed"] = await raw.committed(job) / result.pop("handled")
    yield case, result


async def start(bench: Bench, system: str, case: Case, _: Suite) -> Results:
    """Measure the start of a service that finds an event waiting."""
    job = replace(bench.job(system, case), count=1)
    await bench.create_topics(job.partitions, job.name)
    async with bench.process("ours", case) as one:
        await one.do(replace(job, role="fill", system="ours"))
    async with bench.process(system, case) as one:
        yield case, await one.do(replace(job, role="start"))


async def idle(bench: Bench, system: str, case: Case, _: Suite) -> Results:
    """Measure what a service costs that has nothing to do."""
    job = bench.job(system, case)
    await bench.create_topics(job.partitions, job.name, f"{job.name}.replies")
    async with bench.process(system, case, "answering 0") as one:
        await one.do(replace(job, role="answer"))
        await asyncio.sleep(0 if bench.smoke else _SETTLES)
        seconds = bench.seconds if bench.smoke else _IDLE
        before = one.cpu_seconds()
        await asyncio.sleep(seconds)
        yield case, {"percent": (one.cpu_seconds() - before) / seconds * 100}
        await one.do(replace(job, role="leave"))


async def memory(bench: Bench, system: str, case: Case, _: Suite) -> Results:
    """Measure a pending wait, twice, because tracing takes memory too."""
    job = replace(bench.job(system, case), count=case["waits"])
    result: dict[str, float] = {}
    for role in ("traced", "resident"):
        async with bench.process(system, case) as one:
            result |= await one.do(replace(job, role=role))
    yield case, result


async def alone(bench: Bench, system: str, case: Case, suite: Suite) -> Results:
    """Measure what needs no Kafka."""
    count = case.get("binds") or (1000 if bench.smoke else 20_000)
    job = replace(bench.job(system, case), role=suite.name, count=count)
    async with bench.process(system, case) as one:
        yield case, await one.do(job)


def _count(bench: Bench) -> int:
    return 20_000 if bench.smoke else int(bench.seconds * 1.25 * _FILL)


async def _filled(bench: Bench, case: Case) -> str:
    """Return a topic full of events, which all systems read: each is a group of its own."""
    key = str(case["partitions"])
    if key not in bench.topics:
        job = replace(bench.job(_FILLS, case), role="fill", count=_count(bench))
        await bench.create_topics(job.partitions, job.name)
        async with bench.process(_FILLS, {}) as one:
            await one.do(job)
        bench.topics[key] = job.name
    return bench.topics[key]


@dataclass(frozen=True)
class Suite:
    """One group of measurements.

    Attributes:
        overhead: about how many seconds a system takes for a case besides measuring.
        fixed: how long a measurement takes, if that is not for the command line to say.
        enough: rounds after which more would say the same.
        smoke_case: the case that a smoke run measures.
    """

    name: str
    measure: Callable[[Bench, str, Case, Suite], Any]
    systems: tuple[str, ...]
    cases: tuple[Case, ...]
    levels: tuple[int, ...] = (1,)
    smoke_levels: tuple[int, ...] = (1,)
    overhead: float = 0.7
    fixed: float | None = None
    enough: int | None = None
    smoke_case: int = 0

    def rounds(self, wanted: int) -> int:
        """Return how many rounds there are."""
        return min(wanted, self.enough or wanted)

    def seconds(self, systems: int, rounds: int, seconds: float) -> float:
        """Return about how long it takes."""
        once = len(self.levels) * (1.3 * seconds if self.fixed is None else self.fixed)
        if self.measure is requests:
            once += 1.3 * seconds  # to warm up
        return systems * len(self.cases) * self.rounds(rounds) * (self.overhead + once)


_SETTLES, _IDLE = 3.0, 10.0
_SMALL: Final[Case] = {"size": 100, "loop": "asyncio"}
_LIKE_OURS: Final[Case] = _SMALL | {"reply partitions": 16}  # our default
_SIZES: Final = (100, 1024, 102_400)
SUITES: Final = {
    suite.name: suite
    for suite in (
        Suite(
            "requests",
            requests,
            PYTHON + OTHERS,
            (_SMALL,),
            levels=(1, 10, 100, 1000, 10_000),
            smoke_levels=(1, 10),
            overhead=2.5,
        ),
        Suite(
            "partitions",
            requests,
            PYTHON[:2],
            tuple(_LIKE_OURS | {"partitions": number} for number in (1, 4, 16, 64)),
            levels=(100,),
            overhead=2.5,
        ),
        # On two cores, which Kafka has a share of, replicas cannot raise the rate, and waiting for
        # a core makes most of the latency. What counts is the CPU of a request over all processes:
        # as far as it stays the same, each core more is worth as much as the one before. It is
        # higher where the load of a replica comes in smaller batches, so there are two loads.
        Suite(
            "replicas",
            requests,
            PYTHON[:2],
            tuple(
                _LIKE_OURS | {"partitions": 8, "asking": asking, "answering": answering}
                for asking, answering in ((1, 1), (2, 2), (4, 4), (8, 8), (1, 8))
            ),
            levels=(100, 400),
            overhead=4.5,
            smoke_case=1,
        ),
        Suite(
            "payloads",
            requests,
            PYTHON,
            tuple({"size": size, "loop": "asyncio"} for size in _SIZES[1:]),
            levels=(1, 100),
            overhead=2.5,
        ),
        Suite(
            "uvloop",
            requests,
            PYTHON,
            ({"size": 100, "loop": "uvloop"},),
            levels=(1, 10, 100, 1000),
            overhead=2.5,
        ),
        Suite(
            "open loop",
            requests,
            (*PYTHON, "kafka-broker 0.4"),
            (_SMALL,),
            levels=(50, 200, 500, 1000, 2000, 5000, 10_000, 20_000),
            smoke_levels=(20,),
            overhead=2.5,
        ),
        Suite(
            "produce",
            produce,
            ("ours", "aiokafka", "aiokafka batches", *PYTHON[2:], "kafka-broker 0.4"),
            tuple({"size": size} for size in _SIZES),
        ),
        Suite(
            "consume",
            consume,
            (*PYTHON, "FastStream ACK"),
            tuple(
                {"handler": handler, "partitions": partitions}
                for handler in ("async def", "def")
                for partitions in (1, 12)
            ),
        ),
        Suite(
            "consume 0.4",  # it knows plain functions only
            consume,
            ("kafka-broker 0.4",),
            ({"handler": "def", "partitions": 1},),
        ),
        Suite("start", start, (*PYTHON, "kafka-broker 0.4"), ({},), fixed=3.0),
        Suite("idle", idle, PYTHON + OTHERS, ({},), fixed=_IDLE + _SETTLES, enough=2),
        Suite("soak", requests, ("ours",), (_SMALL,), levels=(1000,) * 10, enough=1),
        Suite(
            "memory",
            memory,
            ("ours", "aiokafka"),
            tuple({"waits": waits} for waits in (1000, 10_000, 100_000)),
            fixed=5.0,
            enough=2,
        ),
        Suite(
            "lookup",
            alone,
            ("ours",),
            tuple({"binds": binds} for binds in (10, 100, 1000, 10_000)),
            fixed=0.5,
            enough=3,
        ),
        Suite("costs", alone, ("ours",), ({},), fixed=15.0, enough=3),
    )
}
_SHORT: Final[dict[str, dict[str, Any]]] = {
    "partitions": {"enough": 3},
    "replicas": {"without": {"asking": 2}, "enough": 3},
    "payloads": {"systems": PYTHON[:2], "levels": (100,)},
    "uvloop": {"systems": PYTHON[:2], "levels": (1, 100, 1000)},
    "open loop": {"levels": (50, 200, 1000, 5000, 10_000)},
    "produce": {"without": {"size": 1024}},
    "consume": {"without": {"handler": "def", "partitions": 12}},
    "idle": {"systems": (*PYTHON, "kafka-broker 0.4"), "enough": 1},
    "memory": {"enough": 1},
}


def short(suite: Suite) -> Suite:
    """Return what our documentation needs of a suite: 5 rounds of 1.5 s of all take 40 minutes."""
    changes = dict(_SHORT.get(suite.name, {}))
    without = changes.pop("without", {"size": 0})
    cases = (case for case in suite.cases if not without.items() <= case.items())
    return replace(suite, cases=tuple(cases), **changes)
