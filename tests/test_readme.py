"""README.md and docs/: figures are those of the result files; imports, links, pictures and commands exist."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mllm_crossget
from mllm_crossget.cli import COMMANDS, parse_command

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "eval" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES = 150
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_lines(page: Path, language: str) -> Iterator[str]:
    """The lines of a page's code blocks, continued lines as one."""
    for block in re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
        yield from block.replace("\\\n", " ").splitlines()


def test_the_readme_is_one_screen() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_tables_are_made_from_the_result_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tables

    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    code = readme_tables.main()
    assert code == 0, f"run python scripts/readme_tables.py\n{capsys.readouterr().out}"


@pytest.mark.parametrize("change", ["| untouched | 145 |", "<!-- table:unknown -->\n<!-- /table:unknown -->"])
def test_the_check_of_the_tables_can_fail(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tables

    tables = {"demo_short": "| untouched | 144 |"}
    text = "<!-- table:demo_short -->\n| untouched | 144 |\n<!-- /table:demo_short -->\n"
    assert readme_tables.rendered(text, tables) == (text, ["demo_short"])
    if "unknown" in change:
        with pytest.raises(ValueError, match="no table 'unknown'; there are demo_short"):
            readme_tables.rendered(text + change, tables)
    else:
        assert readme_tables.rendered(text.replace("| untouched | 144 |", change), tables)[0] == text


@pages
def test_what_a_page_imports_exists(page: Path) -> None:
    for line in code_lines(page, "python"):
        if found := re.fullmatch(r"from mllm_crossget import (.+)", line):
            for name in found[1].split(", "):
                assert hasattr(mllm_crossget, name), name


@pages
def test_links_and_pictures_exist(page: Path) -> None:
    for path in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert path.startswith("https://") or (page.parent / path).is_file(), path


@pages
def test_commands_have_these_options(page: Path) -> None:
    for line in code_lines(page, "bash"):
        line = line.replace("$model", "llava-1.5-7b").replace("keynorm", "tome").strip()  # of the recipe for a method
        line = re.sub(r'^\w+="(mllm-crossget .*)"$', r"\1", line)  # a variable of the shell
        if not line.startswith("mllm-crossget ") or "EXPERIMENT" in line:
            continue
        words = shlex.split(line, comments=True)
        name = words[1]
        try:
            parse_command(
                name, COMMANDS[name], [*words[2:], *(["--bf16", "false", "--tf32", "false"] if name == "train" else [])]
            )
        except ImportError as error:  # an extra, or the newer transformers that training needs
            pytest.skip(f"{line}: {error}")
        except (SystemExit, ValueError, TypeError) as error:
            pytest.fail(f"{line}: {error}")
