"""Where the systems run: what cannot live in our own environment is built below a cache folder.

kafka-broker 0.4.10 has our import name. With uvloop installed, uvicorn and so the project's tests
would change their loop. Spring needs Maven, NestJS needs npm.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = Path(__file__).parent
CACHE: Final = Path(
    os.environ.get("KAFKA_BROKER_BENCH_CACHE", "~/.cache/kafka-broker-bench")
).expanduser()
UVLOOP: Final = "uvloop==0.23.0"
ORIGINAL: Final = "kafka-broker==0.4.10"
_PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
_NEEDS: Final = {"Spring": ("java", "mvn"), "NestJS": ("node", "npm")}
_IMPORTS: Final = {
    "FastStream": "faststream",
    "FastStream ACK": "faststream",
    "confluent-kafka": "confluent_kafka",
}


def command(system: str, loop: str) -> tuple[list[str], dict[str, str]]:
    """Return how to run a worker of *system*: its command, and additions to the environment."""
    if system == "Spring":
        target = _place("Spring") / "target"
        return ["java", "-Xmx512m", "-cp", f"{target}/classes:{target}/libs/*", "bench.Main"], {}
    if system == "NestJS":
        return ["node", str(_place("NestJS") / "main.js")], {}
    python = str(_place(system) / "bin/python") if system in _BUILD else sys.executable
    path = [str(_place("uvloop"))] if loop == "uvloop" else []
    if system not in _BUILD:  # one of its own must not see what we may be imported from
        path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {"PYTHONPATH": os.pathsep.join(path)}
    return [python, str(HERE / "worker.py"), system, loop], environment


def available(name: str) -> bool:
    """Return whether a system, or uvloop, can run now."""
    if name in _BUILD:
        return (_place(name) / ".built").exists()
    return name not in _IMPORTS or find_spec(_IMPORTS[name]) is not None


def build(name: str, report: Callable[[str], None]) -> None:
    """Build what is not there yet; without the tools for it, say so."""
    missing = [tool for tool in _NEEDS.get(name, ()) if shutil.which(tool) is None]
    if available(name):
        return
    if name not in _BUILD or missing:
        report(f"{name} is left out: needs {', '.join(missing) or '`make install`'}")
        return
    place = _place(name)
    report(f"building {name} in {place}")
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        _BUILD[name](place)
    except (subprocess.CalledProcessError, OSError) as exc:
        report(f"{name} is left out: {exc}")
    else:
        (place / ".built").touch()


def _original(place: Path) -> None:
    venv.create(place, with_pip=True)
    _run(str(place / "bin/python"), "-m", "pip", "install", "--quiet", ORIGINAL)


def _uvloop(place: Path) -> None:
    arguments = ("--quiet", "--no-deps", "--target", str(place), UVLOOP)
    _run(sys.executable, "-m", "pip", "install", *arguments)


def _spring(place: Path) -> None:
    shutil.copytree(HERE / "peers/spring", place)
    pom = str(place / "pom.xml")
    _run("mvn", "-q", "-B", "-f", pom, "compile", "dependency:copy-dependencies")


def _nest(place: Path) -> None:
    shutil.copytree(HERE / "peers/nest", place)
    _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(place))


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, stdout=sys.stderr, timeout=600)


_BUILD: Final[dict[str, Callable[[Path], None]]] = {
    "kafka-broker 0.4": _original,
    "uvloop": _uvloop,
    "Spring": _spring,
    "NestJS": _nest,
}


def _place(name: str) -> Path:
    """Return the folder of *name*; another one if its sources change."""
    if name in _NEEDS:
        digest = hashlib.sha256()
        for path in sorted((HERE / "peers" / name.lower().removesuffix("js")).rglob("*")):
            if path.is_file():
                digest.update(path.read_bytes())
        return CACHE / f"{name}-{digest.hexdigest()[:12]}"
    return CACHE / f"{ORIGINAL if name != 'uvloop' else UVLOOP}-{_PYTHON}".replace("==", "-")
