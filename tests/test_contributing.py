"""CONTRIBUTING.md and the recipes of docs/: every name in them exists, and following them gives code that passes."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers.processes import Child
from tests.helpers.runs_in_processes import pytest_in

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("adding-a-method", "adding-a-family")
PAGES = ("CONTRIBUTING.md", *(f"docs/{name}.md" for name in RECIPES))
_ADDED = "add to "
# Where a name in backticks may be defined.
SOURCES = ("mllm_crossget", "tests", "scripts", "pyproject.toml", "Makefile", ".ci/run")


def recipe(page: str) -> dict[str, str]:
    """The files that a page says to write or to add to, by the titles of its code blocks."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', text, flags=re.M | re.S))


def commands(page: str) -> list[list[str]]:
    """The pytest commands of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return [shlex.split(line) for line in re.findall(r"^(pytest .+)$", text, flags=re.M)]


def follow(page: str, root: Path) -> None:
    """Do in a copy of the project what the page says."""
    for title, code in recipe(page).items():
        path = root / title.removeprefix(_ADDED)
        if title.startswith(_ADDED):
            path.write_text(path.read_text() + code)
        else:
            assert not path.exists(), f"docs/{page}.md: {title} is there already"
            path.write_text(code)


def without_the_example(page: str, root: Path) -> None:
    """Take what the page describes out of a copy: a recipe's example may be part of the package, as the page has it."""
    for title, code in recipe(page).items():
        path, shipped = root / title.removeprefix(_ADDED), ROOT / title.removeprefix(_ADDED)
        if title.startswith(_ADDED):
            text = path.read_text()
            for name in re.findall(r"^from mllm_crossget\.\w+ import (\w+)$", code, flags=re.M):
                text = re.sub(rf'^    "?{name}"?,\n', "", text, flags=re.M)
            path.write_text(text)
        elif shipped.exists():
            assert shipped.read_text() == code, f"docs/{page}.md: {title} is another one in the package"
            path.unlink()


def spans(page: str) -> list[str]:
    """What stands in backticks in a page, outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.timeout(900)  # a second pytest, which imports everything anew
@pytest.mark.parametrize("page", RECIPES)
def test_the_recipe_works(page: str, tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for part in ("mllm_crossget", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    without_the_example(page, tmp_path)
    follow(page, tmp_path)
    assert commands(page), f"docs/{page}.md has no pytest command"
    for words in commands(page):
        # without Numba, which would compile its kernels anew for the copy
        plain = {"MLLM_CROSSGET_FUSED_MATCHING": "0"}
        child = Child(pytest_in, str(tmp_path), words[1:], output=tmp_path / "said.txt", environment=plain)
        code = child.end(800)
        assert code == 0, f"docs/{page}.md: {shlex.join(words)}\n{child.said()[-6000:]}"
        assert re.search(r"\d+ passed", child.said())


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    written = {title for name in RECIPES for title in recipe(name)}
    endings = (".py", ".md", ".toml", ".yaml", "/")
    words = [word for span in spans(page) for word in span.split()]
    paths = [word for word in words if "/" in word or word.endswith(endings)]
    assert paths
    patterns = {path: re.sub(r"<\w+>", "*", path).rstrip("/") for path in paths if path not in written}
    missing = [path for path, pattern in patterns.items() if not list(ROOT.glob(pattern))]
    assert not missing, f"{page} names files that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_names_are_defined(page: str) -> None:
    files = [
        path for part in SOURCES for path in ([ROOT / part] if (ROOT / part).is_file() else (ROOT / part).rglob("*"))
    ]
    code = "\n".join(path.read_text() for path in files if path.suffix in (".py", ".toml", "") and path.is_file())
    code += "\n".join(body for name in RECIPES for body in recipe(name).values())
    names = {name for span in spans(page) if "/" not in span for name in re.findall(r"[A-Za-z_]\w{2,}", span)}
    assert names
    unknown = sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", code))
    assert not unknown, f"{page} names what is not in the code: {unknown}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"\bmake (\w+)", (ROOT / "CONTRIBUTING.md").read_text()))
    made = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets
    assert targets <= made
