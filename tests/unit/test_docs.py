"""The documentation: its samples run, its links resolve, its tables are those of the code."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import uuid
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import pytest
from pydantic_core import PydanticUndefined
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import kafka_broker
from kafka_broker import BrokerSettings, _manager, _metrics, _wire, errors, testing

if TYPE_CHECKING:
    from sybil import Example

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
OUTPUT = io.StringIO()

LOOP = "asyncio_default_fixture_loop_scope=function"

run_python = PythonEvaluator()


def _run(example: Example) -> None:
    OUTPUT.seek(0)
    OUTPUT.truncate()
    run_python(example)


def _compare(example: Example) -> None:
    assert str(example.parsed) == OUTPUT.getvalue()


SAMPLES = Sybil(
    parsers=[
        CodeBlockParser("python", _run),
        CodeBlockParser("output", _compare),
    ]
)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _text(page: str) -> str:
    return _read(DOCS / page)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure brokers as a reader does, with a log and a default broker that no one else has."""
    for name in [name for name in os.environ if name.startswith("KAFKA_BROKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAFKA_BROKER_BOOTSTRAP_SERVERS", f"memory://{uuid.uuid4().hex}")
    monkeypatch.setenv("KAFKA_BROKER_MODULE", "Docs")
    broker = kafka_broker.BrokerManager()
    monkeypatch.setattr(kafka_broker, "broker_manager", broker)
    monkeypatch.setattr(_manager, "broker_manager", broker)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_samples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run one after the other and print what the page says."""
    module = ModuleType("a_page")  # pydantic looks for the module that a model is in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    document = SAMPLES.parse(page)
    document.namespace = vars(module)
    with redirect_stdout(OUTPUT):
        for example in document.examples():
            example.evaluate()


def test_every_python_block_is_found() -> None:
    """No fence is overlooked because of how it is written."""
    fences = sum(
        len(re.findall(r"^ *(?:```|~~~) *py", _read(page), re.MULTILINE)) for page in PAGES
    )
    hidden = sum(_read(page).count("invisible-code-block: python") for page in PAGES)
    runs = [
        example
        for page in PAGES
        for example in SAMPLES.parse(page).examples()
        if example.region.evaluator is _run
    ]
    assert fences + hidden == len(runs)


@pytest.mark.usefixtures("environment")
def test_the_sample_of_a_test_file_passes(tmp_path: Path) -> None:
    """The page about tests is a test file that passes as it stands; its Kafka is left out here."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", _text("howto/test-your-service.md"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "test_sample.py").write_text("\n\n".join(blocks), encoding="utf-8")
    source = Path(kafka_broker.__file__).parents[1]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not kafka", "-o", LOOP]
    run = subprocess.run(  # noqa: S603  # the page is the test
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (0, "") == (run.returncode, run.stderr), run.stdout


# What a page names exists


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them from its headings."""
    headings = re.findall(r"^#+ (.*)$", _read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_resolve(page: Path) -> None:
    """A relative link leads to a file of the repository, and to a heading if it names one."""
    text = re.sub(r"^```.*?^```", "", _read(page), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert [] == broken


def _tests_of(path: Path) -> set[str]:
    if not path.exists():
        return set()
    tree = ast.parse(_read(path))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_named_tests_exist(page: Path) -> None:
    """A test that is named as proof is there."""
    text = _read(page)
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text)
    missing = [
        f"{path}::{test}"
        for path, test in named
        if not (ROOT / path).exists() or (test and test not in _tests_of(ROOT / path))
    ]
    assert [] == missing


def test_every_page_is_in_the_index() -> None:
    """Whoever reads the index finds everything."""
    index = _text("README.md")
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert ["README.md"] == [page for page in pages if f"]({page})" not in index]


# The tables of the reference are those of the code


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "(required)" if field.default_factory is None else "(computed)"
    if field.default in (None, ""):
        return "(none)"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{field.default}`"


def _unit(name: str, field: Any) -> str:
    if field.annotation is float:
        return "s"
    if field.annotation is int:
        return "bytes" if name.endswith("_bytes") else "count"
    return ""


def test_settings_are_all_there() -> None:
    """Every setting has its row, with the name of its variable, its default and its unit."""
    expected = [
        [f"`{name}`", f"`KAFKA_BROKER_{name.upper()}`", _default(field), _unit(name, field)]
        for name, field in BrokerSettings.model_fields.items()
    ]
    assert expected == [row[:4] for row in _rows(_text("reference/settings.md"))]
    assert all(row[4] for row in _rows(_text("reference/settings.md")))


def test_errors_are_all_there() -> None:
    """Every error has its row, and the tree is the one in the code."""
    page = _text("reference/errors.md")
    assert sorted(errors.__all__) == sorted(row[0].strip("`") for row in _rows(page))
    tree = re.search(r"```\n(BrokerError.*?)```", errors.__doc__ or "", re.DOTALL)
    assert tree is not None
    assert tree[1] in page


def test_headers_are_all_there() -> None:
    """Every header that the codec knows is described."""
    page = _text("reference/wire.md")
    names = [
        value
        for name, value in vars(_wire).items()
        if name.isupper() and isinstance(value, str) and value.startswith(("kb-", "kafka_"))
    ]
    assert sorted(names) == sorted(
        row[0].strip("`") for row in _rows(page) if "-" in row[0] or "_" in row[0]
    )


def test_names_are_all_there() -> None:
    """Every public name of the package is described."""
    page = _text("reference/api.md")
    names = [*kafka_broker.__all__, *testing.__all__, "Broker", *get_args(_metrics.Counted)]
    for described in (kafka_broker.BrokerManager, kafka_broker.EventObject, kafka_broker.Delivery):
        names += [name for name in vars(described) if not name.startswith(("_", "model_"))]
    names += kafka_broker.EventObject.model_fields
    assert [] == [name for name in names if f"`{name}" not in page and f".{name}" not in page]
