"""How a Kafka for tests is found, started and ended; `java` and `mvn` are small fakes here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kafka_broker.testing import NativeKafka, NoKafkaError, kafka_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VARIABLE = "KAFKA_BROKER_BOOTSTRAP_SERVERS"
CONTAINER = "testcontainers.community.kafka"
CLIENT = "testcontainers.core.docker_client"

JAVA = f"""#!{sys.executable} -IS
import pathlib, re, signal, socket, sys
here = pathlib.Path(sys.argv[0])
if "-version" in sys.argv:
    sys.exit('openjdk version "%s" 2025-04-15' % here.with_name("version").read_text())
if "format" in sys.argv:
    pathlib.Path("records").mkdir()
    pathlib.Path("records/meta.properties").touch()
    sys.exit()
mood = here.with_name("mood").read_text()
if mood == "ill":
    sys.exit("the disk is on fire")
print("the disk is slow", flush=True)
port = int(re.search(r"advertised.*:(\\d+)", pathlib.Path("server.properties").read_text())[1])
with socket.create_server(("127.0.0.1", port)):
    if mood == "well":
        print("Kafka Server started", flush=True)
    signal.pause()
"""
MVN = f"""#!{sys.executable} -IS
import pathlib, sys
here = pathlib.Path(sys.argv[0])
with here.with_name("fetches").open("a") as fetches:
    fetches.write("x")
rival = here.with_name("rival").read_text()
if rival:
    pathlib.Path(rival).mkdir(parents=True)
    pathlib.Path(rival, "theirs.jar").touch()
pathlib.Path("jars").mkdir()
pathlib.Path("jars/ours.jar").touch()
sys.exit(here.with_name("failure").read_text() or None)
"""


class Machine:
    """A computer that has only what a test installs on it."""

    def __init__(self, root: Path) -> None:
        self.programs = root / "bin"
        self.programs.mkdir()
        self.cache = root / "cache" / "kafka-broker-aio"
        self.reports: list[str] = []

    def install_java(self, version: str = "17.0.15", mood: str = "well") -> None:
        (self.programs / "version").write_text(version)
        (self.programs / "mood").write_text(mood)
        self._install("java", JAVA)

    def install_maven(self, *, failure: str = "", rival: str = "") -> None:
        (self.programs / "failure").write_text(failure)
        (self.programs / "rival").write_text(rival)
        self._install("mvn", MVN)

    def _install(self, name: str, program: str) -> None:
        (self.programs / name).write_text(program)
        (self.programs / name).chmod(0o755)

    @property
    def fetches(self) -> int:
        """How often Maven was called."""
        log = self.programs / "fetches"
        return len(log.read_text()) if log.exists() else 0

    @property
    def cached(self) -> list[str]:
        """What the cache holds, left-overs included."""
        return sorted(os.fspath(path.relative_to(self.cache)) for path in self.cache.rglob("*"))

    def native(self) -> NativeKafka:
        return NativeKafka(report=self.reports.append)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Hide whatever this computer could start a Kafka with."""
    machine = Machine(tmp_path)
    monkeypatch.setenv("PATH", os.fspath(machine.programs))
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(machine.cache.parent))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, CONTAINER, None)
    return machine


class Container:
    """What is used of testcontainers' KafkaContainer."""

    fault: Exception | None = None
    running = False

    def __call__(self) -> Container:
        return self

    def with_kraft(self) -> Container:
        return self

    def with_env(self, key: str, value: str) -> None:
        pass

    def start(self, *, timeout: float) -> None:
        assert timeout > 0
        self.running = True
        if self.fault:
            raise self.fault

    def stop(self) -> None:
        self.running = False

    def get_bootstrap_server(self) -> str:
        return "docker:9093"


@pytest.fixture
def daemon() -> SimpleNamespace:
    """Return the Docker daemon's client, to be made faulty by a test."""
    return SimpleNamespace(ping=lambda: True)


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch, daemon: SimpleNamespace) -> Container:
    """Install testcontainers and a Docker daemon."""
    container = Container()
    connected = SimpleNamespace(client=daemon)
    monkeypatch.setitem(sys.modules, CONTAINER, SimpleNamespace(KafkaContainer=container))
    client = SimpleNamespace(DockerClient=lambda timeout: timeout and connected)
    monkeypatch.setitem(sys.modules, CLIENT, client)
    return container


@pytest.fixture
def native(machine: Machine) -> Iterator[NativeKafka]:
    """Return a Kafka on a machine with Java and Maven, not yet started."""
    machine.install_java()
    machine.install_maven()
    with machine.native() as kafka:
        yield kafka


def reason_for_no_kafka(machine: Machine) -> str:
    with (
        pytest.raises(NoKafkaError) as refusal,
        kafka_server(report=machine.reports.append),
    ):
        pass
    return str(refusal.value)


def accepts_connections(servers: str) -> bool:
    host, port = servers.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def test_named_kafka_comes_first(
    machine: Machine, docker: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Kafka named in the environment is used as it is, and nothing is started."""
    machine.install_java()
    machine.install_maven()
    monkeypatch.setenv(VARIABLE, "kafka.test:9092")
    with kafka_server(report=machine.reports.append) as servers:
        assert "kafka.test:9092" == servers
        assert not docker.running
    assert [] == machine.reports


def test_memory_is_not_a_kafka(
    machine: Machine, docker: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An in-memory address in the environment is passed over with a line that says so."""
    monkeypatch.setenv(VARIABLE, "memory://")
    with kafka_server(report=machine.reports.append) as servers:
        assert docker.get_bootstrap_server() == servers
    assert f"{VARIABLE}=memory:// is not a Kafka: ignored" == machine.reports[0]


def test_docker_comes_before_java(machine: Machine, docker: Container) -> None:
    """Docker is preferred to Java, and its container ends with the context."""
    machine.install_java()
    machine.install_maven()
    with kafka_server(report=machine.reports.append) as servers:
        assert ("docker:9093", True) == (servers, docker.running)
    assert not docker.running


def test_failing_container_leaves_it_to_java(machine: Machine, docker: Container) -> None:
    """A container that does not start is removed, reported, and Java is used."""
    machine.install_java()
    machine.install_maven()
    docker.fault = OSError("no space left")
    with kafka_server(report=machine.reports.append) as servers:
        assert servers.startswith("127.0.0.1:")
    assert not docker.running
    assert "Docker could not start Kafka: no space left" in machine.reports


@pytest.mark.usefixtures("docker")
def test_silent_daemon_leaves_it_to_java(machine: Machine, daemon: SimpleNamespace) -> None:
    """Without an answer from the Docker daemon Java is used."""
    machine.install_java()
    machine.install_maven()

    def refuse() -> None:
        raise ConnectionRefusedError

    daemon.ping = refuse
    with kafka_server(report=machine.reports.append) as servers:
        assert accepts_connections(servers)
    assert not accepts_connections(servers)


def test_no_kafka_names_every_door(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing works, the error says why for each way and what to do."""
    monkeypatch.setenv(VARIABLE, " ")
    assert (
        "No Kafka to test with: KAFKA_BROKER_BOOTSTRAP_SERVERS: not set; "
        "Docker: the Python package testcontainers is not installed; "
        "Java: `java` not found. "
        "Start Docker (and `pip install testcontainers`), or install Java 17 and Maven, "
        "or set KAFKA_BROKER_BOOTSTRAP_SERVERS."
    ) == reason_for_no_kafka(machine)


@pytest.mark.usefixtures("docker")
def test_no_kafka_tells_of_a_silent_daemon(machine: Machine, daemon: SimpleNamespace) -> None:
    """An installed testcontainers without a daemon is told apart from a missing one."""
    daemon.ping = lambda: 1 / 0
    assert "Docker: no daemon answers; " in reason_for_no_kafka(machine)


@pytest.mark.parametrize(
    ("version", "found"), [("1.8.0_392", "1.8.0_392"), ("11.0.2", "11.0.2"), ("16-ea", "16-ea")]
)
def test_old_java_is_refused(machine: Machine, version: str, found: str) -> None:
    """A Java that Kafka cannot run on is named with its version."""
    machine.install_java(version)
    expected = f"Java: found {found}, but Kafka needs 17 or newer"
    assert expected in reason_for_no_kafka(machine)


def test_stub_of_java_is_refused(machine: Machine) -> None:
    """A `java` that only says where to download Java counts as none."""
    machine.install_java()
    machine.programs.joinpath("java").write_text("#!/bin/sh\nexit 1\n")
    assert "`java -version` does not answer with a version" in reason_for_no_kafka(machine)


def test_java_home_comes_first(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Java is taken from JAVA_HOME where that is set, as Maven does."""
    machine.install_java("11.0.2")
    (tmp_path / "home").mkdir()
    machine.programs.rename(tmp_path / "home" / "bin")
    monkeypatch.setenv("JAVA_HOME", os.fspath(tmp_path / "home"))
    assert "found 11.0.2" in reason_for_no_kafka(machine)


def test_missing_maven_is_named(machine: Machine) -> None:
    """Maven is asked for where Kafka was never fetched."""
    machine.install_java()
    with pytest.raises(NoKafkaError, match=r"`mvn` \(Maven\) not found"):
        machine.native()


def test_maven_is_not_needed_twice(machine: Machine, native: NativeKafka) -> None:
    """Once Kafka is fetched it starts without Maven."""
    native.start()
    (machine.programs / "mvn").unlink()
    with machine.native() as second:
        second.start()
        assert accepts_connections(second.bootstrap_servers)
    assert 1 == machine.fetches


def test_fetch_is_reported(machine: Machine, native: NativeKafka) -> None:
    """The first start says that it fetches, where to, and that this is once only."""
    assert [] == machine.reports
    native.start()
    place = machine.cache / "kafka-4.3.1"
    first = f"fetching Apache Kafka 4.3.1 with Maven into {place}, once only (about 45 MB)"
    assert first == machine.reports[0]
    assert "fetching Apache Kafka: 0 jars downloaded" == machine.reports[1]
    assert f"starting Apache Kafka 4.3.1 on {native.bootstrap_servers}" == machine.reports[-1]


def test_fetch_leaves_only_the_jars(machine: Machine, native: NativeKafka) -> None:
    """The cache holds the finished directory and nothing of the fetch."""
    native.start()
    assert ["kafka-4.3.1", "kafka-4.3.1/ours.jar"] == machine.cached


def test_failed_fetch_leaves_nothing(machine: Machine) -> None:
    """A failing Maven leaves no half cache, and the error has the end of its output."""
    machine.install_java()
    machine.install_maven(failure="Could not resolve kafka_2.13")
    with machine.native() as kafka, pytest.raises(NoKafkaError, match=r"resolve kafka_2.13"):
        kafka.start()
    assert [] == machine.cached


def test_interrupted_fetch_leaves_nothing(machine: Machine) -> None:
    """Ctrl-C while Maven runs leaves no half cache."""
    machine.install_java()
    machine.install_maven()

    def interrupt(line: str) -> None:
        if line.endswith("downloaded"):
            raise KeyboardInterrupt

    with NativeKafka(report=interrupt) as kafka, pytest.raises(KeyboardInterrupt):
        kafka.start()
    assert [] == machine.cached


def test_faster_fetch_wins(machine: Machine) -> None:
    """Of two fetches at once the first to finish stays, and both starts succeed."""
    machine.install_java()
    machine.install_maven(rival=os.fspath(machine.cache / "kafka-4.3.1"))
    with machine.native() as kafka:
        kafka.start()
        assert ["kafka-4.3.1", "kafka-4.3.1/theirs.jar"] == machine.cached


def test_address_is_known_before_the_start(native: NativeKafka) -> None:
    """A client can be given the address of a Kafka that does not run yet."""
    assert not accepts_connections(native.bootstrap_servers)
    assert not native.data_directory.exists()
    assert native.pid is None


def test_second_start_changes_nothing(native: NativeKafka) -> None:
    """Starting a Kafka that runs leaves it alone."""
    native.start()
    pid = native.pid
    native.start()
    assert pid == native.pid


@pytest.mark.parametrize("end", [NativeKafka.stop, NativeKafka.kill])
def test_ended_kafka_starts_again(native: NativeKafka, end: object) -> None:
    """After a stop or a kill the same address serves again from the same data."""
    assert callable(end)
    native.start()
    marker = native.data_directory / "records" / "marker"
    marker.touch()
    end(native)
    assert (None, False) == (native.pid, accepts_connections(native.bootstrap_servers))
    native.start()
    assert (True, True) == (marker.exists(), accepts_connections(native.bootstrap_servers))


def test_crashed_kafka_starts_again(native: NativeKafka) -> None:
    """A node that ended by itself can be started again."""
    native.start()
    first = native.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    native.kill()
    native.start()
    assert native.pid not in {None, first}


def test_ending_what_never_ran_is_harmless(native: NativeKafka) -> None:
    """Stop and kill do nothing before the first start."""
    native.stop()
    native.kill()
    assert native.pid is None


def test_leaving_ends_all(native: NativeKafka) -> None:
    """Leaving the context frees the port and deletes the data."""
    native.start()
    with native:
        assert native.data_directory.exists()
    assert not native.data_directory.exists()
    assert not accepts_connections(native.bootstrap_servers)


def test_failing_node_shows_its_log(machine: Machine, native: NativeKafka) -> None:
    """A node that ends while it starts raises with the end of its log."""
    machine.install_java(mood="ill")
    with pytest.raises(RuntimeError, match="ended with code 1:\nthe disk is on fire"):
        native.start()


def test_late_node_is_killed(machine: Machine, native: NativeKafka) -> None:
    """A node that is not ready in time is killed and raises with the end of its log."""
    machine.install_java(mood="silent")
    with pytest.raises(RuntimeError, match=r"not ready after 0.2 s:\nthe disk is slow"):
        native.start(timeout=0.2)
    assert native.pid is None


def test_failing_node_is_not_a_missing_one(machine: Machine) -> None:
    """A Kafka that is there but fails is an error to see, not a reason to skip tests."""
    machine.install_java(mood="ill")
    machine.install_maven()
    with pytest.raises(RuntimeError) as failure, kafka_server(report=machine.reports.append):
        pass
    assert not isinstance(failure.value, NoKafkaError)


def test_ctrl_c_does_not_reach_the_node(native: NativeKafka) -> None:
    """The node runs in a session of its own, so Ctrl-C in a terminal is for Python alone."""
    native.start()
    assert native.pid is not None
    assert os.getsid(0) != os.getsid(native.pid)


def test_import_is_light() -> None:
    """Importing the module does not import testcontainers or docker."""
    program = (
        "import sys, kafka_broker.testing; print({'testcontainers', 'docker'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert "set()" == answer.stdout.strip()
