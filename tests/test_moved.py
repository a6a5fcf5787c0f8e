"""Import paths of version 0.1 still work: names are those of the new modules, and a warning says where these are."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_crossget.moved import MOVED

ROOT = Path(__file__).resolve().parent.parent
# Names of modules that are packages now.
PACKAGES = (
    ("mllm_crossget.hooks.tower", "LayerTrace"),
    ("mllm_crossget.hooks.tower", "hook_tower"),
    ("mllm_crossget.hooks.tower", "first_cross_token"),
    ("mllm_crossget.hooks.tower", "CrossInPlace"),
    ("mllm_crossget.hooks.text", "positional_names"),
    ("mllm_crossget.hooks.model", "ReducedModel"),
    ("mllm_crossget.hooks.reuse", "use_cache"),
    ("mllm_crossget.costs", "linear_flops"),
    ("mllm_crossget.benchmark", "model_flops"),
)
# They need packages that may be missing.
OPTIONAL = {
    "kernels.graph", "kernels.importance", "integrations.lmms_eval.costs", "training.budget", "training.columns",
    "training.records",
}  # fmt: skip


@pytest.mark.parametrize("old", sorted(MOVED.keys() - OPTIONAL))
def test_an_old_module_is_found_and_says_where_it_is(old: str) -> None:
    sys.modules.pop(f"mllm_crossget.{old}", None)
    with pytest.warns(FutureWarning, match=f"moved to mllm_crossget.{MOVED[old]}"):
        module = importlib.import_module(f"mllm_crossget.{old}")
    new = importlib.import_module(f"mllm_crossget.{MOVED[old]}")
    public = {name for name in vars(new) if not name.startswith("_")}
    assert public
    assert all(getattr(module, name) is getattr(new, name) for name in public)


@pytest.mark.parametrize(("package", "name"), PACKAGES)
def test_a_name_of_a_module_that_is_a_package_now(package: str, name: str) -> None:
    with pytest.warns(FutureWarning, match=f"{package}.{name} has moved"):
        assert getattr(importlib.import_module(package), name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(package).no_such_name  # noqa: B018 - reading it is the test


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, and names that it takes from them; also those in strings, as "module:function"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.split(":")[0]


def test_the_library_itself_uses_no_old_path() -> None:
    old = {f"mllm_crossget.{name}" for name in MOVED} | {f"{package}.{name}" for package, name in PACKAGES}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("mllm_crossget", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        for name in sorted(old.intersection(imported(ast.parse(path.read_text()))))
    ]
    assert not found
    assert "mllm_crossget.costs.linear_flops" in imported(ast.parse("from mllm_crossget.costs import linear_flops"))
