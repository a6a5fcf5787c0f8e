"""Names of a command's options without importing what defines them: the source files are parsed.

A mistyped name is then told at once. Importing transformers' training arguments, and with them torch, takes seconds.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path


def field_names(*modules: str) -> set[str]:
    """Names of the annotated fields of all classes in some modules; of all modules in a package and its folders.

    Args:
        modules: dotted names; only the first part is looked up, so that nothing is imported.

    Returns:
        The names, without those of class variables and private ones; empty for a module that is not installed.
    """
    return {name for module in modules for file in _files(module) for name in _names_in(file)}


def check_names(words: Iterable[str], from_file: Collection[str], known: Collection[str]) -> None:
    """Refuse unknown names of options.

    Args:
        words: the command line.
        from_file: names of a YAML file's values.
        known: fields of the options.

    Raises:
        ValueError: the first unknown name, and what it may mean.
    """
    for name in from_file:
        if name not in known:
            raise ValueError(f"unknown option {name!r} in the file{_near(name, known, '{!r}')}")
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name.removeprefix("no_") not in known and name not in known:
            raise ValueError(f"unknown option {word.partition('=')[0]}{_near(name, known, '--{}')}")


def _near(name: str, known: Collection[str], form: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {form.format(near[0])}?" if near else ""


def _files(module: str) -> list[Path]:
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def _names_in(file: Path) -> set[str]:
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = [node for kind in classes for node in kind.body if isinstance(node, ast.AnnAssign)]
    names = {ast.unparse(node.target) for node in fields if "ClassVar" not in ast.unparse(node.annotation)}
    return {name for name in names if not name.startswith("_")}
