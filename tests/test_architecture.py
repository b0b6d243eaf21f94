"""The arrows of the design, by path: app, manage → web → hookline → models → peewee; and the sizes of its parts."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = {"app", "assembly", "manage", "commands", "settings", "models", "hookline", "web"}
MAY_IMPORT = {
    "app": {"assembly", "web", "hookline", "models", "settings"},
    "manage": {"commands"},
    "commands": {"commands", "assembly", "hookline", "models", "settings"},
    "assembly": {"hookline", "models", "settings"},
    "web": {"web", "hookline"},
    "hookline": {"hookline", "models"},
    "models": set(),
    "settings": set(),
}
FOREIGN_TO_THE_DOMAIN = {"starlette", "uvicorn", "click", "jinja2", "dotenv", "argparse", "pydantic"}
PURE = ("hookline/policy.py", "hookline/clock.py", "hookline/errors.py")
OF_THE_STORE = ("hookline.store", "hookline.errors")
ASSEMBLE_A_WORKER = ("app.py", "assembly.py", "hookline/manager.py", "hookline/worker/")
MODULES = sorted(path for name in OURS for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]
MAX_FUNCTION, MAX_CLASS, MAX_FILE = 40, 250, 350  # lines


def imports(path: Path) -> set[str]:
    """The modules and names that this file imports, also inside its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def imports_from(name: str, *packages: str) -> set[str]:
    """What the file of this name imports from these packages."""
    return {
        imported
        for imported in imports(ROOT / name)
        if any(f"{imported}.".startswith(f"{package}.") for package in packages)
    }


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_one_way(name: str) -> None:
    package = name.partition("/")[0].removesuffix(".py")
    assert roots(ROOT / name) & OURS <= MAY_IMPORT[package]
    if package in ("hookline", "models"):
        assert not roots(ROOT / name) & FOREIGN_TO_THE_DOMAIN
    if package == "web":
        assert not roots(ROOT / name) & {"peewee", "playhouse", "sqlite3", "click"}
        assert not imports_from(name, "hookline.tables")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("hookline/store/")])
def test_the_store_knows_nothing_of_webhooks(name: str) -> None:
    also = ("hookline.tables",) if name.endswith("/schema.py") else ()
    assert imports_from(name, "hookline") <= imports_from(name, *OF_THE_STORE, *also)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(ASSEMBLE_A_WORKER)])
def test_only_what_assembles_knows_the_worker(name: str) -> None:
    assert not imports_from(name, "hookline.worker")


def test_lanes_are_below_publishing() -> None:
    assert not imports_from("hookline/lanes.py", "hookline.events", "hookline.worker")


@pytest.mark.parametrize("name", PURE)
def test_what_decides_is_pure(name: str) -> None:
    assert not imports_from(name, "hookline", "models", "peewee")


@pytest.mark.parametrize("name", NAMES)
def test_no_part_is_too_large(name: str) -> None:
    text = (ROOT / name).read_text()
    sizes = {name: len(text.splitlines())}
    assert sizes[name] <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= (MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION), node.name


VAGUE = {"lost", "held", "aside", "found", "given", "place", "one", "again", "those"}
RIDDLES = ("What", "Which", "Those", "Who", "Whoever", "Whether")


@pytest.mark.parametrize("name", NAMES)
def test_names_and_docstrings_say_what_a_thing_is(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        match node:
            case ast.Name(id=word, ctx=ast.Store()) | ast.arg(arg=word):
                assert word not in VAGUE, f"line {node.lineno}: {word}"
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Module():
                first = (ast.get_docstring(node) or "A").split()[0].strip(",:")
                assert first not in RIDDLES, f"line {getattr(node, 'lineno', 1)}"


def test_no_two_classes_have_one_name() -> None:
    classes = Counter(
        node.name for path in MODULES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_only_settings_reads_the_environment() -> None:
    readers = [path.name for path in MODULES if "environ" in path.read_text() or "getenv" in path.read_text()]
    assert readers == ["settings.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "migrations").glob("*.py")), ids=lambda path: path.name)
def test_migrations_use_peewee_alone(path: Path) -> None:
    assert not roots(path) & OURS
