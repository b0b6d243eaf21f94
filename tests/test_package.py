"""The package: what `pip install .` installs, that it needs what it declares, and what importing it loads.

The environment that it is installed into is empty, apart from a path to the dependencies in that of the tests.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import hookline
from tests.conftest import ROOT
from tests.test_readme import PYTHON, blocks

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USERS_OWN = ("models", "settings", "app", "assembly", "manage", "web", "migrations", "tables", "webhooks")
IMPORTS_EVERYTHING = """
import importlib, pathlib, pkgutil, sys, hookline
for module in pkgutil.walk_packages(hookline.__path__, "hookline."):
    importlib.import_module(module.name)
for name in sys.argv[1:]:
    assert importlib.import_module(name).OWNER == "the user", name
folder = pathlib.Path(hookline.__file__).parent
assert hookline.store.schema.DIRECTORY == folder / "migrations", hookline.store.schema.DIRECTORY
assert hookline.tables.Webhook.__module__ == "hookline.models"
print(folder)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What it prints; its environment has no PYTHONPATH, so that it finds what is installed and nothing else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> None:
    """Run pip, without the network."""
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (program,) = folder.glob("bin/python")
    pip("--python", program, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return program


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A program's folder, with modules that have the names of ours."""
    for name in USERS_OWN:
        (tmp_path / f"{name}.py").write_text('OWNER = "the user"\n')
    return tmp_path


def test_the_wheel_has_hookline_alone_with_tables_and_migrations(wheel: Path) -> None:
    package = [path.relative_to(ROOT) for path in (ROOT / "hookline").rglob("*") if path.suffix in (".py", ".typed")]
    moved = [Path("models.py"), *(path.relative_to(ROOT) for path in (ROOT / "migrations").glob("*.py"))]
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
    info = f"hookline-{PROJECT['version']}.dist-info"
    assert {name.parts[0] for name in names} == {"hookline", info}
    assert {name for name in names if name.parts[0] == "hookline"} == {*package, *(Path("hookline", m) for m in moved)}


def test_every_module_works_beside_a_users_own_of_the_same_name(python: Path, users_folder: Path) -> None:
    (users_folder / "main.py").write_text(IMPORTS_EVERYTHING)
    folder = Path(run(python, "main.py", *USERS_OWN, cwd=users_folder).strip())
    assert folder.is_relative_to(python.parent.parent)


def test_the_readmes_python_runs_there(python: Path, users_folder: Path) -> None:
    for heading in PYTHON:
        (snippet,) = blocks(heading)
        (users_folder / "main.py").write_text(
            f"import models, settings\n{snippet}\nassert models.OWNER == 'the user'\n"
        )
        run(python, "main.py", cwd=users_folder)


def test_the_dependencies_are_those_of_the_service() -> None:
    service, postgres = ((ROOT / f"requirements{part}.txt").read_text().splitlines() for part in ("", "-postgres"))
    assert set(PROJECT["dependencies"]) <= set(service)
    assert PROJECT["optional-dependencies"] == {"postgres": [line for line in postgres if not line.startswith("#")]}


def test_what_the_package_imports_is_declared() -> None:
    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["postgres"]]
    distributions = metadata.packages_distributions()
    files = [*(ROOT / "hookline").rglob("*.py"), ROOT / "models.py"]
    roots = {root for path in files for root in imported(path)} - sys.stdlib_module_names - {"hookline", "models"}
    roots -= {"certifi"}  # taken where it is installed and the system has no roots
    needed = {name.replace("_", "-") for root in roots for name in distributions[root]}
    assert needed == {re.split(r"[^\w-]", requirement)[0] for requirement in declared}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)


@pytest.mark.parametrize("statement", ["import hookline", "import hookline.errors", "from hookline import Invalid"])
def test_importing_it_loads_neither_the_http_client_nor_peewee(statement: str) -> None:
    assert loaded(statement) == []


def test_publishing_loads_no_http_client() -> None:
    assert loaded("import hookline; hookline.connect; hookline.publish") == ["peewee", "playhouse"]


def loaded(statement: str) -> list[str]:
    """The heavy ones among the modules that a program with this statement has loaded."""
    heavy = ["httptools", "hookline.egress", "peewee", "playhouse"]
    script = f"{statement}\nimport sys\nprint(*[name for name in {heavy} if name in sys.modules])"
    return run(sys.executable, "-c", script).split()


def test_each_exported_name_is_there_and_no_other() -> None:
    assert set(hookline.__all__) <= set(dir(hookline))
    assert all(getattr(hookline, name).__name__ == name for name in hookline.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'another'"):
        _ = hookline.another
