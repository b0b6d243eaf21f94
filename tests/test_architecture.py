"""The arrows of the design: app, manage → web → hookline → models → peewee."""

from __future__ import annotations

import ast
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
PURE = {"policy", "signing", "clock", "errors"}
MODULES = sorted(path for name in OURS for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    roots = {name.partition(".")[0] for name in imports(path)}
    assert roots & OURS <= MAY_IMPORT[package]
    if package in ("hookline", "models"):
        assert not roots & FOREIGN_TO_THE_DOMAIN
    if package == "web":
        assert not roots & {"peewee", "playhouse", "sqlite3", "click"}
    if package == "hookline" and path.stem in PURE:
        assert not roots & OURS
    assert len(path.read_text().splitlines()) <= 410


def test_only_settings_reads_the_environment() -> None:
    readers = [path.name for path in MODULES if "environ" in path.read_text() or "getenv" in path.read_text()]
    assert readers == ["settings.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "migrations").glob("*.py")), ids=lambda path: path.name)
def test_migrations_use_peewee_alone(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & OURS
