"""`NativeKafka`: one Apache Kafka node from Java and Maven, without Docker."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import uuid4

from kafka_broker._watched_process import WatchedProcess

_KAFKA = "4.3.1"
_LOG4J = "2.25.3"
OLDEST_JAVA = 17
_FETCH_TIMEOUT = 600.0
_MAVEN_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_ARTIFACTS = (
    ("org.apache.kafka", "kafka_2.13", _KAFKA),
    ("org.apache.logging.log4j", "log4j-core", _LOG4J),
    ("org.apache.logging.log4j", "log4j-slf4j-impl", _LOG4J),
)
_DEPENDENCY = (
    "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>"
)
_POM = """<project><modelVersion>4.0.0</modelVersion><groupId>local</groupId>
<artifactId>kafka-jars</artifactId><version>1</version><packaging>pom</packaging>
<dependencies>{}</dependencies></project>
"""
_JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",  # a third less time to start; a test has no use for peak speed
    "-XX:-UsePerfData",  # its file in the temporary directory would survive a kill
    "-Djava.io.tmpdir=.",
    "-Dorg.apache.logging.log4j.level=INFO",
)
_PROPERTIES = """process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs=records
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=5
offsets.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=5
transaction.state.log.replication.factor=1
"""

Report = Callable[[str], None]


class NoKafkaError(RuntimeError):
    """This machine cannot give a Kafka; the text says what to install or to set."""


def to_stderr(line: str) -> None:
    """Report a line where a person looks while tests run."""
    sys.stderr.write(f"kafka_broker.testing: {line}\n")


class NativeKafka(AbstractContextManager["NativeKafka"]):
    """One Apache Kafka node on this machine that a test can start late, kill and restart.

        with NativeKafka() as kafka:
            client = connect(kafka.bootstrap_servers)
            kafka.start()
            kafka.kill()
            kafka.start()  # same address, same records

    Leaving the context ends the node and deletes its data at once; so does the end of the
    Python process, even by SIGKILL.

    Args:
        report: Called with one line of text whenever something slow begins.

    Attributes:
        bootstrap_servers: Host and port; known, and unused, before the first start.
        properties: Added to the node's ``server.properties`` at its first start; they win.
        data_directory: Holds the records and ``output.log``; exists from the first start on.

    Raises:
        NoKafkaError: Java 17 is missing, or Maven is and Kafka was never fetched before.
    """

    def __init__(
        self, *, report: Report = to_stderr, properties: Mapping[str, str] | None = None
    ) -> None:
        self._java = _java()
        if not _jar_cache().is_dir():
            _maven()
        self._report = report
        self.properties: dict[str, str] = dict(properties or {})
        self._broker_port, self._controller_port = _free_ports(2)
        self._process: WatchedProcess | None = None
        self.bootstrap_servers: str = f"127.0.0.1:{self._broker_port}"
        self.data_directory: Path = Path(tempfile.gettempdir()) / f"kafka-broker-{uuid4().hex}"

    def __exit__(self, *_: object) -> None:
        """End the node and delete its data."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    @property
    def pid(self) -> int | None:
        """The process id of the running JVM; ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the node and return when it serves clients; do nothing if it runs.

        The first start on a machine fetches Kafka, for which *timeout* does not count.

        Args:
            timeout: Seconds until the node must be ready.

        Raises:
            NoKafkaError: Maven could not fetch Kafka; the text has the end of Maven's output.
            RuntimeError: The node ended or was late; the text has the end of its log.
        """
        if self.pid is not None:
            return
        if self._process is None:
            jars = _fetched_jars(self._report)
            self._process = WatchedProcess(self.data_directory)
            self._jvm = [self._java, *_JVM_OPTIONS, "-cp", f"{jars}/*"]
        self._format(self._process, timeout)
        self._report(f"starting Apache Kafka {_KAFKA} on {self.bootstrap_servers}")
        self._serve(self._process, timeout)

    def _format(self, process: WatchedProcess, timeout: float) -> None:
        if (self.data_directory / "records" / "meta.properties").exists():
            return
        properties = self.data_directory / "server.properties"
        ports = {"broker": self._broker_port, "controller": self._controller_port}
        added = "".join(f"{name}={value}\n" for name, value in self.properties.items())
        properties.write_text(_PROPERTIES.format(**ports) + added, encoding="utf-8")
        arguments = ("format", "-t", "A" * 22, "-c", properties.name)
        for _ in process.run([*self._jvm, "kafka.tools.StorageTool", *arguments], timeout=timeout):
            pass

    def _serve(self, process: WatchedProcess, timeout: float) -> None:
        command = [*self._jvm, "kafka.Kafka", "server.properties"]
        for _ in process.run(command, timeout=timeout):
            if "Kafka Server started" in process.output() and _listening(self._broker_port):
                return
        raise RuntimeError(f"Kafka ended before it was ready:\n{process.tail()}")

    def stop(self) -> None:
        """End the node as an operator would and keep its data; after 5 s it is killed."""
        if self._process is not None and not self._process.end(signal.SIGTERM):
            self.kill()

    def kill(self) -> None:
        """End the node with SIGKILL, as a crash would, and keep its data."""
        if self._process is not None:
            self._process.end(signal.SIGKILL)


def _java() -> str:
    """Find a Java that can run Kafka: first in JAVA_HOME, as Maven does, then on the PATH."""
    home, path = os.environ.get("JAVA_HOME"), os.environ.get("PATH", os.defpath)
    java = shutil.which("java", path=f"{home}/bin{os.pathsep}{path}" if home else path)
    if java is None:
        raise NoKafkaError("Java: `java` not found")
    command = [java, "-version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # java
    version = re.search(r'version "((\d+)[^"]*)"', answer.stderr)
    if version is None:  # macOS has a stub in place of Java
        raise NoKafkaError("Java: `java -version` does not answer with a version")
    if int(version[2]) < OLDEST_JAVA:
        raise NoKafkaError(f"Java: found {version[1]}, but Kafka needs {OLDEST_JAVA} or newer")
    return java


def _maven() -> str:
    maven = shutil.which("mvn")
    if maven is None:
        raise NoKafkaError("Java: `mvn` (Maven) not found, which fetches Kafka the first time")
    return maven


def _jar_cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "kafka-broker-aio" / f"kafka-{_KAFKA}"


def _fetched_jars(report: Report) -> Path:
    """Return the directory with Kafka's jars; it is complete or does not exist."""
    cache = _jar_cache()
    if cache.is_dir():
        return cache
    report(f"fetching Apache Kafka {_KAFKA} with Maven into {cache}, once only (about 45 MB)")
    cache.parent.mkdir(parents=True, exist_ok=True)
    process = WatchedProcess(cache.with_name(f"fetching-{uuid4().hex}"))
    try:
        _copied_jars(process, report).rename(cache)
    except RuntimeError as exc:
        raise NoKafkaError(f"Java: Maven could not fetch Kafka: {exc}") from exc
    except OSError:
        if not cache.is_dir():  # else another process was faster
            raise
    finally:
        process.close()
    return cache


def _copied_jars(process: WatchedProcess, report: Report) -> Path:
    dependencies = "".join(_DEPENDENCY.format(*artifact) for artifact in _ARTIFACTS)
    (process.directory / "pom.xml").write_text(_POM.format(dependencies), encoding="utf-8")
    command = [_maven(), "-B", "-Dstyle.color=never", _MAVEN_GOAL, "-DoutputDirectory=jars"]
    for _ in process.run(command, timeout=_FETCH_TIMEOUT, every=1.0):
        report(f"fetching Apache Kafka: {process.output().count('.jar (')} jars downloaded")
    return process.directory / "jars"


def _free_ports(count: int) -> list[int]:
    """Pick ports below those that systems hand out to outgoing connections.

    Otherwise a client that retries to connect to a node that is down may be given the very
    port it connects to, reach itself, and keep the node from coming back.
    """
    candidates = random.SystemRandom().sample(range(20_000, 32_000), k=1_000)
    return list(itertools.islice(filter(_bindable, candidates), count))


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
