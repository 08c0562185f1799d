"""The house: which room may import which, and that no import leads in a circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import tieredkv

PACKAGE = Path(tieredkv.__file__).parent

# A room is a folder of the package or a file at its root. Each row names the rooms that it may import, all of them from
# rows above its own: arrows point up this table, and down in every drawing of it.
ALLOWED = {
    "errors": "",
    "progress": "",
    "environment": "errors",
    "codecs": "",
    "memory": "codecs errors",
    "policy": "errors",
    "attention": "environment errors",
    "ops": "codecs policy",
    "video": "errors memory progress",
    "config": "errors memory policy",
    "models": "attention config environment errors memory video",
    "planning": "codecs config errors memory models ops policy video",
    "cache": "attention codecs config environment errors memory models ops planning policy",
    "storage": "environment errors memory progress",
    "tiny": "environment progress storage",
    "evidence": "cache errors memory models progress storage video",
    "session": "cache codecs config environment errors evidence memory models planning progress storage tiny video",
    "api": "config errors evidence models session storage video",
    "batch": "errors evidence session storage video",
    "demo": "api config errors memory models planning progress session storage tiny video",
    "doctor": "memory models",
    "serve": "api config errors evidence memory models progress session storage tiny video",
    "cli": (
        "api batch demo doctor errors evidence memory models planning policy progress serve session storage tiny video"
    ),
}
FACES = ("__init__", "__main__")
"""They re-export names, and may import anything."""


def module_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parts[-2] != "benchmarks"}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that `module` imports anywhere: at its top, in a function, or for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tieredkv":
            base = (node.module or "").partition(".")[2]
            for name in node.names:
                inner = f"{base}.{name.name}".lstrip(".")
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("tieredkv.")}
    return frozenset(found - {"", module})


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_is_in_the_table():
    assert {room(module) for module in MODULES} - set(FACES) == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_the_table_allows_a_room_only_what_stands_above_it(name):
    above = list(ALLOWED)[: list(ALLOWED).index(name)]
    assert set(ALLOWED[name].split()) <= set(above)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_what_the_table_allows_and_nothing_else(name):
    used = {
        (room(other), module)
        for module in MODULES
        if room(module) == name
        for other in imports(module)
        if room(other) not in (name, *FACES)
    }
    allowed = set(ALLOWED[name].split())
    assert sorted(f"{module} imports {other}" for other, module in used if other not in allowed) == []
    assert allowed - {other for other, _ in used} == set(), "the table allows what nobody uses"


def test_no_import_leads_in_a_circle():
    """Neither through an import inside a function nor through one for types alone."""
    state: dict[str, str] = {}
    circles = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        state[module] = "open"
        for other in sorted(imports(module)):
            if other not in MODULES or other in FACES:
                continue
            if state.get(other) == "open":
                circles.append(" -> ".join([*path[path.index(other) :], other]))
            elif other not in state:
                visit(other, (*path, other))
        state[module] = "done"

    for module in MODULES:
        if module not in state and module not in FACES:
            visit(module, (module,))
    assert circles == []


def test_the_root_holds_entry_points_and_what_every_room_shares():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*FACES, "api", "config", "errors", "progress"}
