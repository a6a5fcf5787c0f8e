"""The shape of the code: which part may import which, all that is public says what it is, nothing is long.

One test per rule; it looks at every file and names those that break it. Three rules are about the tests themselves.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mllm_crossget"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PARTS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_WORDS_OF_A_SENTENCE = 45

_BASE = {"arithmetic", "config", "field_types", "files", "schedule", "ops"}
_FLOOR = {*_BASE, "families", "methods"}
# Rooms of ``hooks`` from the ground up: each may import those below it.
ROOMS = ("ground", "tower", "projector", "text", "language", "request", "reuse", "model", "apply")
_HOOKS = {*_FLOOR, *(f"hooks.{room}" for room in ROOMS)}
_API = {*_HOOKS, "unlisted", "support", "transaction", "api", "batching", "checkpoint", "moved", "vision_half"}
_USES = {*_API, "retrieval", "training", "benchmark", "costs", "integrations", "embedded", "compare", "look"}
# What each part may import from the package. A part that is not listed may not exist.
ARROWS: dict[str, set[str]] = {
    "field_types": set(),
    "moved": set(),
    "files": {"files"},
    "arithmetic": {"arithmetic", "field_types"},
    "config": {"arithmetic", "field_types", "files"},
    "schedule": {"arithmetic", "config"},
    "kernels": {"kernels"},
    "ops": {"ops", "kernels"},
    "methods": {*_BASE, "methods"},
    "families": {*_BASE, "families"},
    "hooks": set(),
    **{
        f"hooks.{room}": {*_FLOOR, "moved", *(f"hooks.{below}" for below in ROOMS[: number + 1])}
        for number, room in enumerate(ROOMS)
    },
    "unlisted": _FLOOR,
    "support": {*_HOOKS, "unlisted"},
    "transaction": _HOOKS,
    "costs": {*_FLOOR, "costs", "support", "unlisted", "moved"},
    "api": _API,
    "batching": _API,
    "checkpoint": _API,
    "vision_half": _API,
    "retrieval": set(),
    "training": _USES - {"benchmark", "compare"},
    **dict.fromkeys(("benchmark", "compare", "integrations", "embedded", "look"), _USES),
    "cli": {*_USES, "cli", "__init__"},
    "__main__": {"cli"},
    "__init__": {*_API, "retrieval"},
}
# Third-party packages; parts that are not listed are free.
PACKAGES: dict[str, set[str]] = {
    "arithmetic": {"numpy"},
    "kernels": {"numba", "numpy", "torch", "triton"},
    "ops": {"torch"},
    "schedule": set(),
    "field_types": set(),
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
                f"{module}.{alias.name}"
                if (module == "mllm_crossget" and alias.name in PARTS) or module.split(".")[0] == "tests"
                else module
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


def broken_arrows(path: Path) -> Iterator[str]:
    part = part_of(module_of(path))
    if part not in ARROWS:
        yield f"say in ARROWS what {part!r} may import"
        return
    for module in imports(path):
        if module.split(".")[0] == "mllm_crossget":
            allowed = part_of(module) in ARROWS[part]
        else:
            name = module.split(".")[0]
            allowed = part not in PACKAGES or name in sys.stdlib_module_names or name in PACKAGES[part]
        if not allowed:
            yield f"imports {module}"


def test_imports_follow_the_arrows() -> None:
    broken = [f"{name_of(path)}: {what}" for path in FILES for what in broken_arrows(path)]
    assert not broken, "\n".join(broken)


def without_docstring(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    functions = {name for name, node in definitions(path) if not isinstance(node, ast.ClassDef)}
    for name, node in definitions(path):
        public = not any(part.startswith("_") for part in name.split("."))
        if public and name.rpartition(".")[0] not in functions and not ast.get_docstring(node):
            yield name


def test_everything_public_has_a_docstring() -> None:
    missing = [f"{name_of(path)}: no docstring on {name}" for path in FILES for name in without_docstring(path)]
    assert not missing, "\n".join(missing)


# Folders whose modules are entries of a registry, one method or one family each, and what these share.
REGISTRIES = {"mllm_crossget/families", "mllm_crossget/methods/rivals"}
MOST_MODULES_OF_A_FOLDER = 15
# A family has one file of costs and one for vLLM beside its own, under its name.
SHARED_NAMES = {"__init__", "__main__", "blip", "llava"}


def test_a_folder_can_be_read() -> None:
    sizes = Counter(name_of(path.parent) for path in FILES if path.name != "__init__.py")
    assert {name for name, size in sizes.items() if size > MOST_MODULES_OF_A_FOLDER} <= REGISTRIES


def test_a_file_name_means_one_thing() -> None:
    names = Counter(path.stem for path in FILES)
    assert {name for name, count in names.items() if count > 1} == SHARED_NAMES


def long_parts(path: Path) -> Iterator[str]:
    lines = len(path.read_text().splitlines())
    if lines > MOST_LINES_OF_A_FILE:
        yield f"{lines} lines, {MOST_LINES_OF_A_FILE} are allowed"
    for name, node in definitions(path):
        lines = node.end_lineno - node.lineno + 1
        if not isinstance(node, ast.ClassDef) and lines > MOST_LINES_OF_A_FUNCTION:
            yield f"{name} has {lines} lines, {MOST_LINES_OF_A_FUNCTION} are allowed"


def test_nothing_is_long() -> None:
    long = [f"{name_of(path)}: {what}" for path in FILES for what in long_parts(path)]
    assert not long, "\n".join(long)


# What begins a text of its own in a docstring: a section, an entry of it such as a parameter, an item of a list.
_BEGINS_A_TEXT = re.compile(r"\s*(\w+( \w+)?:$|[-*] |\d+\. )| {4}[\w*]+(, [\w*]+)*: ")
_END_OF_A_SENTENCE = re.compile(r"""(?<=[.!?])[`"')\]]*\s+(?=[A-Z`"'(\[])""")


def sentences(docstring: str) -> Iterator[str]:
    """The sentences of a docstring, without blocks of code."""
    texts, in_code = [""], False
    for line in docstring.splitlines():
        fence = line.strip().startswith("```")
        in_code ^= fence
        if fence or in_code or line.strip().startswith((">>>", "...")):
            texts.append("")
            continue
        if not line.strip() or _BEGINS_A_TEXT.match(line):
            texts.append("")
        texts[-1] += f" {line.strip()}"
    for text in texts:
        yield from (sentence for sentence in _END_OF_A_SENTENCE.split(text.strip()) if sentence)


def long_sentences(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for name, node in [("the module", tree), *definitions(path)]:
        for sentence in sentences(ast.get_docstring(node) or ""):
            words = len(sentence.split())
            if words > MOST_WORDS_OF_A_SENTENCE:
                yield f"{name} has a sentence of {words} words, {MOST_WORDS_OF_A_SENTENCE} are allowed: {sentence}"


def test_no_sentence_of_a_docstring_is_long() -> None:
    long = [f"{name_of(path)}: {what}" for path in FILES for what in long_sentences(path)]
    assert not long, "\n".join(long)


def test_nearly_all_lines_are_typed_strictly() -> None:
    """mypy's error codes are off for what compilers other than Python read, at most a tenth of the lines."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    loose = [one["module"].removesuffix(".*") for one in settings["overrides"] if "disable_error_code" in one]
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    off = sum(count for path, count in lines.items() if module_of(path).startswith(tuple(loose)))
    assert settings["strict"]
    assert 0 < off < 0.1 * sum(lines.values())


def test_folders_of_tests_are_those_of_the_package() -> None:
    """A folder is named after a room of the package, or after a module that has several test files."""
    rooms = {name_of(path.with_suffix("")).removeprefix("mllm_crossget/") for path in FILES}
    rooms |= {name_of(path.parent).removeprefix("mllm_crossget/") for path in FILES if path.name == "__init__.py"}
    others = {"tests", "tests/helpers", "tests/helpers/families", "tests/golden", "tests/robustness"}
    found = {name_of(path.parent) for path in TESTS} - others
    stray = sorted(name for name in found if name.removeprefix("tests/") not in rooms)
    assert not stray, f"the package has no such part: {stray}"


def test_no_module_imports_itself_over_others() -> None:
    names = {module_of(path) for path in FILES}
    needs = {module_of(path): {name for name in imports(path) if name in names} - {module_of(path)} for path in FILES}
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    cycles = {name: sorted(others & needs.keys()) for name, others in needs.items()}
    assert not cycles


def test_no_test_imports_from_another() -> None:
    """What two test files need lies in tests/helpers: a test file can be moved, renamed or left out."""
    own = {"mllm_crossget", "tests"}
    found = [
        f"{name_of(path)} imports {module}; what they share belongs to tests/helpers"
        for path in TESTS
        for module in imports(path)
        if module.split(".")[0] in own and any(name.startswith(("test_", "conftest")) for name in module.split("."))
    ]
    assert not found, "\n".join(found)


def test_helpers_of_tests_live_in_one_folder() -> None:
    """``golden/files.py`` is the reader of the vectors beside it."""
    places = {"tests/helpers", "tests/helpers/families"}
    names = ("test_*.py", "conftest.py", "__init__.py")
    stray = [
        name_of(path)
        for path in TESTS
        if not any(path.match(name) for name in names)
        and name_of(path.parent) not in places
        and name_of(path) != "tests/golden/files.py"
    ]
    assert not stray, f"no test files, so they belong to tests/helpers: {stray}"


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


def test_nobody_asks_which_method_it_is() -> None:
    """A method is one file: others ask for capabilities, not for its class, its fields or its name."""
    asked = [f"{name_of(path)}:{line}" for path in FILES for line in lines_that_ask(path)]
    assert not asked


def lines_that_ask(path: Path) -> Iterator[int]:
    """Lines that ask for a method's class outside its own file, or for its fields by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        called, arguments = node.func.id, [ast.unparse(argument) for argument in node.args]
        if called in ("isinstance", "issubclass") and len(arguments) == 2:
            classes = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & METHOD_CLASSES.keys()
            if any(METHOD_CLASSES[name] != name_of(path) for name in classes):
                yield node.lineno
        named = called == "getattr" and isinstance(node.args[1], ast.Constant)
        if (called == "vars" or named) and arguments and arguments[0].endswith(("method", "_method(model)")):
            yield node.lineno


def test_methods_are_found() -> None:
    assert {"CrossGetConfig", "DynamicMethod", "MadtpConfig", "Method", "SelectionMethod"} <= METHOD_CLASSES.keys()
