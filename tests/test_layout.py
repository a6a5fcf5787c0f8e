"""The shape of the code: which part may import which, everything public says what it is, nothing is long."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mllm_crossget"
FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60

_BASE = {"atomic_files", "config", "field_types", "schedule", "ops"}
_FLOOR = {*_BASE, "flop_formulas", "families", "methods"}
# Rooms of ``hooks`` from the ground up: each may import those below it.
ROOMS = ("ground", "tower", "projector", "text", "language", "request", "reuse", "model", "apply")
_HOOKS = {*_FLOOR, *(f"hooks.{room}" for room in ROOMS)}
_FILES = {"user_files"}
_API = {*_HOOKS, "support", "transaction", "api", "batching", "checkpoint", "moved"}
_USES = {*_API, *_FILES, "retrieval", "training", "benchmark", "costs", "integrations", "embedded", "visualize"}
# What each part may import from the package. A part that is not listed may not exist.
ARROWS: dict[str, set[str]] = {
    "atomic_files": set(),
    "config": {"atomic_files", "field_types"},
    "field_types": set(),
    "moved": set(),
    "user_files": set(),
    "schedule": {"config"},
    "flop_formulas": set(),
    "kernels": {"kernels"},
    "ops": {"ops", "kernels"},
    "methods": {*_BASE, "methods"},
    "families": {*_BASE, "flop_formulas", "families"},
    "hooks": set(),
    **{
        f"hooks.{room}": {*_FLOOR, "moved", *(f"hooks.{below}" for below in ROOMS[: number + 1])}
        for number, room in enumerate(ROOMS)
    },
    "support": _HOOKS,
    "transaction": _HOOKS,
    "costs": {*_FLOOR, "costs", "support", "moved"},
    "api": _API,
    "batching": _API,
    "checkpoint": _API,
    "retrieval": set(),
    "training": _USES - {"benchmark"},
    **dict.fromkeys(("benchmark", "integrations", "embedded", "visualize"), _USES),
    "cli": {*_USES, "cli", "__init__"},
    "__main__": {"cli"},
    "__init__": {*_API, "retrieval"},
}
# Third-party packages; parts that are not listed are free.
PACKAGES: dict[str, set[str]] = {
    "atomic_files": set(),
    "kernels": {"numba", "numpy", "torch", "triton"},
    "ops": {"torch"},
    "schedule": set(),
    "field_types": set(),
    "flop_formulas": set(),
    "methods": {"torch"},
    "families": {"torch"},
    "config": {"huggingface_hub"},
    "retrieval": {"torch"},
}


def part_of(module: str) -> str:
    """The part that a dotted name belongs to; the rooms of ``hooks`` are parts of their own."""
    names = module.split(".")
    if len(names) > 2 and names[1] == "hooks":
        return f"hooks.{names[2]}"
    return names[1] if len(names) > 1 else "__init__"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            # ``from mllm_crossget import x``: x is a part of its own if it is a file or a folder
            yield from (
                f"{module}.{alias.name}" if module == "mllm_crossget" and alias.name in PARTS else module
                for alias in node.names
            )


def definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes of a file, methods included, with their dotted names."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.")

    return walk(ast.parse(path.read_text()), "")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(module_of(path))
    assert part in ARROWS, f"{name_of(path)}: say in ARROWS what {part!r} may import"
    for module in imports(path):
        if module.split(".")[0] == "mllm_crossget":
            assert part_of(module) in ARROWS[part], f"{name_of(path)} imports {module}"
        elif part in PACKAGES and module.split(".")[0] not in sys.stdlib_module_names:
            assert module.split(".")[0] in PACKAGES[part], f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, f"{name_of(path)} does not say what it is"
    functions = {name for name, node in definitions(path) if not isinstance(node, ast.ClassDef)}
    missing = [
        name
        for name, node in definitions(path)
        if not any(part.startswith("_") for part in name.split("."))
        and name.rpartition(".")[0] not in functions
        and not ast.get_docstring(node)
    ]
    assert not missing, f"{name_of(path)}: no docstring on {missing}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES_OF_A_FILE
    functions = [(name, node) for name, node in definitions(path) if not isinstance(node, ast.ClassDef)]
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions}
    long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION}
    assert not long, f"{name_of(path)}: {long}"


def test_no_module_imports_itself_over_others() -> None:
    names = {module_of(path) for path in FILES}
    needs = {module_of(path): {name for name in imports(path) if name in names} - {module_of(path)} for path in FILES}
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    cycles = {name: sorted(others & needs.keys()) for name, others in needs.items()}
    assert not cycles


def test_the_arrows_are_looked_at() -> None:
    """A change of the layout must not turn the tests above into tests of nothing."""
    found = {part_of(module) for path in FILES for module in imports(path) if module.startswith("mllm_crossget")}
    rooms = {f"hooks.{room}" for room in ROOMS}
    assert {"api", "config", "families", "methods", "ops", "schedule", *rooms} <= found


def names_of_methods() -> dict[str, str]:
    """File of every class in ``methods`` that derives from another one of these, or from the settings."""
    files = [path for path in FILES if part_of(module_of(path)) == "methods"]
    made = [
        (node, path) for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    found = {"ReductionConfig": ""}
    for _ in made:  # a class may derive from one of a later file
        found |= {
            node.name: name_of(path) for node, path in made if {ast.unparse(base) for base in node.bases} & found.keys()
        }
    del found["ReductionConfig"]
    return found


METHOD_CLASSES = names_of_methods()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_asks_which_method_it_is(path: Path) -> None:
    """A method is one file: others ask for capabilities, not for its class, its fields or its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        called, arguments = node.func.id, [ast.unparse(argument) for argument in node.args]
        if called in ("isinstance", "issubclass") and len(arguments) == 2:
            asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & METHOD_CLASSES.keys()
            assert all(METHOD_CLASSES[name] == name_of(path) for name in asked), f"line {node.lineno}: {asked}"
        named = called == "getattr" and isinstance(node.args[1], ast.Constant)
        if (called == "vars" or named) and arguments:
            assert not arguments[0].endswith(("method", "_method(model)")), f"line {node.lineno}: {ast.unparse(node)}"


def test_methods_are_found() -> None:
    assert {"CrossGetConfig", "DynamicMethod", "MadtpConfig", "Method", "SelectionMethod"} <= METHOD_CLASSES.keys()
