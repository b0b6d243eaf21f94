"""The documents keep up: settings, commands and routes are described. Of the README see test_readme.py."""

from __future__ import annotations

import ast
import dataclasses
import re

import click
from starlette.routing import Route

import manage
import settings
from commands.migrate import migrate
from tests.conftest import ROOT
from web import api, operations

OPERATING = (ROOT / "docs" / "operating.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
README = (ROOT / "README.md").read_text()
CODE = (ROOT / "docs" / "code.md").read_text()
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("hookline/**/*.py"), *ROOT.glob("web/*.py"), *ROOT.glob("commands/*.py")]
NAMES = [field.name.upper() for field in dataclasses.fields(settings.Settings)]


def test_every_setting_is_documented_and_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text()
    assert re.findall(r"^#([A-Z_]+)=", example, re.MULTILINE) == NAMES
    assert re.findall(r"^\| `([A-Z_]+)` \|", OPERATING, re.MULTILINE) == NAMES
    assert settings.load({line[1:].split("=")[0]: line.split("=")[1] for line in example.splitlines() if "=" in line})


def commands(group: click.Group, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, command in group.commands.items():
        found += commands(command, f"{prefix}{name} ") if isinstance(command, click.Group) else [prefix + name]
    return found


def test_every_command_is_documented_and_has_help() -> None:
    for name in commands(manage.main):
        assert re.search(rf"^\| `{name}[ `]", OPERATING, re.MULTILINE), name
    for group in (manage.main, migrate):
        assert all(command.help for command in group.commands.values())


def test_every_route_is_documented() -> None:
    for route in [*api.routes, *operations.routes]:
        assert isinstance(route, Route)
        assert f"{route.path_format}`" in API, route.path


def test_every_dependency_is_justified() -> None:
    for name in ("requirements.txt", "requirements-postgres.txt"):
        for line in re.findall(r"^[\w-].*", (ROOT / name).read_text(), re.MULTILINE):
            assert re.match(r"[\w-]+", line)[0] in README  # type: ignore[index]


def test_the_map_of_the_code_names_what_is_there() -> None:
    """`module.name`, `Class.name` and `name.py`, wherever they are."""
    assert len(CODE.splitlines()) <= 60
    known: dict[str, set[str]] = {}
    for path in SOURCES:
        module = known.setdefault(path.stem, set())
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    module.add(name)
                case ast.ClassDef(name=name, body=body):
                    module.add(name)
                    members = (one.name for one in body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
                    known.setdefault(name, set()).update(members)
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    module.add(name)
    for module, name in re.findall(r"`(\w+)\.(\w+)`", CODE):
        assert name == "py" or (module == "hookline" and name in known) or name in known[module], f"{module}.{name}"
    for name in re.findall(r"[\w/]+\.py\b", CODE):
        assert (ROOT / name).exists() or any(str(path).endswith(f"/{name}") for path in SOURCES), name
