"""Every code block of README.md and docs/ is run, or says in a comment before it why not.

``<!-- not run: REASON -->`` marks a block that needs a download, a GPU or hours: its commands must still be ones that
the parsers take. ``<!-- run by: tests/... -->`` marks a block that another test runs. All other blocks are run here:
Python on the embedded model, which also answers for models of the hub, and the lines of a shell block if they are
commands of ``mllm-crossget``.
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from PIL import Image
from sybil.evaluators.python import PythonEvaluator

from mllm_crossget.cli import main
from mllm_crossget.embedded import held_out_questions, load_embedded
from tests.helpers.code_blocks import PAGES, ROOT, Block, blocks_of, problem_of

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash" and not block.run_by]
RUN = [block for block in BLOCKS if not block.not_run and not block.run_by]
LANGUAGES = ("python", "bash", "json", "yaml", "text")


def each(blocks: list[Block]) -> Any:
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.place)


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with a picture, and the embedded model under the name of any model of the hub."""
    held_out_questions(limit=1)[0].image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    model, processor = load_embedded()
    for kind in (transformers.LlavaForConditionalGeneration, transformers.AutoModelForImageTextToText):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)


def run_line(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "eval/leaderboard.py"]:
        with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(ROOT / "eval"))
            patch.setattr(sys, "argv", words[1:])
            assert status_of(runpy.run_path(words[1])["main"]) == 0, line
        return
    assert words[0] == "mllm-crossget", f"{line}: only mllm-crossget is run here; mark the block"
    assert status_of(main, words[1:]) == 0, line


def status_of(program: Callable[..., int], *arguments: Any) -> Any:
    """What a program exits with."""
    try:
        return program(*arguments)
    except SystemExit as end:  # --help
        return end.code


def test_all_blocks_are_found() -> None:
    assert BLOCKS
    for page in PAGES:
        assert len(blocks_of(page)) == len(re.findall(r"^ *```\w", page.read_text(), flags=re.M)), page


def test_an_unmarked_block_that_cannot_run_is_refused() -> None:
    with pytest.raises(AssertionError, match="mark the block"):
        run_line("hf auth login")


@pytest.mark.parametrize(
    "line",
    [
        "mllm-crossget inspect llava-1.5-7b --keep_ration 0.5",
        "mllm-crossget nothing",
        "pip install 'mllm-crossget[nothing]' && mllm-crossget demo",
        "make nothing",
        "python eval/nothing.py",
        "python eval/paired.py --no_such_option 1",
        "pytest tests/nothing.py",
    ],
)
def test_a_line_that_cannot_work_is_found(line: str) -> None:
    assert problem_of(line)


@each(BLOCKS)
def test_a_block_names_its_language_and_a_mark_is_true(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.place}: write the language behind the fence"
    assert block.language != "text" or block.not_run, f"{block.place}: say why it is not run"
    if block.run_by:
        page = Path(block.example.path)
        assert page.stem in (ROOT / block.run_by).read_text(), f"{block.run_by} does not name {page.name}"


@each(SHELL)
def test_the_parsers_take_every_shell_line(block: Block) -> None:
    for line in block.lines():
        try:
            problem = problem_of(line)
        except ImportError as error:  # an extra, or the newer transformers that training needs
            pytest.skip(f"{line}: {error}")
        assert problem is None, f"{block.place}: {problem}"


@each([block for block in RUN if block.language in ("bash", "json", "yaml")])
@pytest.mark.usefixtures("_here")
def test_shell_lines_and_files_run(block: Block) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    else:
        for line in block.lines():
            run_line(line)


@pytest.mark.parametrize("page", sorted({Path(block.example.path) for block in RUN if block.language == "python"}),
                         ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip
@pytest.mark.usefixtures("_here")
def test_python_blocks_run_in_their_order(page: Path) -> None:
    run = PythonEvaluator()
    for block in blocks_of(page):
        if block.language == "python" and not block.not_run and not block.run_by:
            block.example.namespace.setdefault(
                "image", Image.open("photo.jpg")
            )  # README.md has a picture of the reader
            run(block.example)
