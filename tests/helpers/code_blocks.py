"""The code blocks of a Markdown page, and what can be said of a shell line without running it."""

from __future__ import annotations

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from mllm_crossget.cli import COMMANDS, parse_command

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "eval" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_INFO = re.compile(r"(?P<language>\w*)(?P<title>[^\n]*)\n")
_MARK = re.compile(r"<!-- (not run|run by): ([^\n]+) -->\s*\Z")
# What stands for something else in a line that is only parsed.
_STANDS_FOR = {"$model": "llava-1.5-7b", "keynorm": "tome"}
_NEEDED = {"train": ["--bf16", "false", "--tf32", "false"]}  # their defaults ask for a GPU


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        example: the block as Sybil found it, which has its page, its line and its text.
        language: the first word behind the fence.
        not_run: why it is not run, as a comment before it says.
        run_by: the test file that runs it, as a comment before it says.
    """

    example: Example
    language: str
    not_run: str | None
    run_by: str | None

    @property
    def text(self) -> str:
        return str(self.example.parsed)

    @property
    def place(self) -> str:
        return f"{Path(self.example.path).relative_to(ROOT).as_posix()}:{self.example.line}"

    def lines(self) -> Iterator[str]:
        """The lines of a shell block, continued ones as one, without empty ones and comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page. They share one namespace, in which Sybil runs them."""
    lexer = RawFencedCodeBlockLexer(_INFO)

    def parser(document: Document) -> Iterator[Region]:
        for region in lexer(document):
            region.parsed = region.lexemes["source"]
            yield region

    document = Document.parse(str(page), parser)
    found = []
    for example in document.examples():
        mark = _MARK.search(document.text[: example.start])
        kind, said = (mark[1], mark[2]) if mark else ("", None)
        found.append(
            Block(
                example,
                example.region.lexemes["language"],
                not_run=said if kind == "not run" else None,
                run_by=said if kind == "run by" else None,
            )
        )
    return found


def problem_of(line: str) -> str | None:
    """What is wrong with a line of a shell block, as far as that can be seen without running it; None if nothing is.

    Raises:
        ImportError: an extra that a command needs is not installed.
    """
    line = re.sub(r'^\w+="(mllm-crossget .*)"$', r"\1", line)  # a variable of the shell
    for name, other in _STANDS_FOR.items():
        line = line.replace(name, other)
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    words = words[: words.index(">")] if ">" in words else words
    if not words:
        return None
    program, rest = Path(words[0]).name, words[1:]
    if "&&" in words:
        parts = shlex.join(words).split(" '&&' ")
        return next(filter(None, map(problem_of, parts)), None)
    known = {"mllm-crossget": _command, "pip": _installation, "make": _target, "python": _script, "pytest": _tests}
    return known[program](rest) if program in known else None


def _command(words: list[str]) -> str | None:
    if words[0] in ("--help", "--version"):
        return None
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    try:
        parse_command(words[0], COMMANDS[words[0]], [*words[1:], *_NEEDED.get(words[0], [])])
    except (SystemExit, ValueError, TypeError, argparse.ArgumentError) as error:
        return f"mllm-crossget {shlex.join(words)}: {error}"
    return None


def _installation(words: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for word in words for found in re.findall(r"(?:^\.|^mllm-crossget)\[(.+)\]$", word)
             for name in found.split(",")]  # fmt: skip
    unknown = sorted(set(named) - set(extras))
    return f"there is no extra {unknown}" if unknown else None


def _target(words: list[str]) -> str | None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    unknown = sorted(set(words) - targets)
    return f"there is no target {unknown}" if unknown else None


def _script(words: list[str]) -> str | None:
    if words[0] == "-m":
        return None
    script = ROOT / words[0]
    if not script.is_file():
        return f"there is no {words[0]}"
    code = script.read_text()
    options = [word.removeprefix("--").replace("-", "_") for word in words[1:] if word.startswith("--")]
    unknown = [name for name in options if not re.search(rf"\b{name}\b", code.replace("-", "_"))]
    return f"{words[0]} knows no {unknown}" if unknown else None


def _tests(words: list[str]) -> str | None:
    missing = [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
    return f"there is no {missing}" if missing else None
