"""docs/architecture.md against a traced ``generate``: the stops are entered in its order, and nothing else is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import mllm_crossget
from mllm_crossget import accelerate_mllm
from mllm_crossget.hooks.ground.arguments import positional_names
from tests.helpers.tiny import prompt_batch, tiny_llava

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
PACKAGE = Path(mllm_crossget.__file__).parent
MOST_STOPS = 20
Entry = tuple[str, str]  # file, relative to the package, and function


def rows(name: str) -> list[list[str]]:
    """The cells of a marked table of the page."""
    block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE.read_text(), flags=re.S)
    assert block, f"docs/architecture.md has no table {name}"
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in block[1].splitlines()[2:]]


def traced() -> list[Entry]:
    """The functions of the package that one ``generate`` enters, in the order of their first entry."""
    model = tiny_llava()
    accelerate_mllm(model, keep_ratio=0.5)
    batch = prompt_batch(model)
    entered: dict[Entry, None] = {}

    def enter(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            entered.setdefault((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        with torch.no_grad():
            model.generate(**batch, max_new_tokens=3)
    finally:
        sys.setprofile(before)
    return list(entered)


@pytest.fixture(scope="module")
def entered() -> Iterable[list[Entry]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLM_CROSSGET_FUSED_MATCHING", "0")
        positional_names.cache_clear()  # another test may have asked for the same names
        yield traced()


def to_paste(entered: list[Entry]) -> str:
    """The table of stops as it should be: known sentences in the order of the trace, new files to be described."""
    told = {(file, function): text for _, file, function, text in rows("stops")}
    described = {file for file, _ in told if any(file == one for one, _ in entered)} | {
        file for file, _ in rows("helpers")
    }
    stops = [entry for entry in entered if entry in told]
    lost = {file for file, _ in told} - {file for file, _ in stops}
    for file in dict.fromkeys(file for file, _ in entered):
        if file in lost or file not in described:
            stops.append(next(entry for entry in entered if entry[0] == file))
    stops.sort(key=entered.index)
    by_file = {file: text for (file, _), text in told.items()}
    texts = [told.get((file, function)) or by_file.get(file) or "SAY WHAT HAPPENS." for file, function in stops]
    lines = [
        f"| {number} | `{file}` | `{function}` | {text} |"
        for number, ((file, function), text) in enumerate(zip(stops, texts, strict=True), 1)
    ]
    functions: dict[str, list[str]] = {}
    for file, function in entered:
        functions.setdefault(file, []).append(function)
    seen = [f"{file}: {', '.join(names)}" for file, names in functions.items()]
    return "\n".join(["Stops to paste into docs/architecture.md:", *lines, "", "Entered functions:", *seen])


def test_the_stops_are_entered_in_this_order(entered: list[Entry]) -> None:
    stops = [(file, function) for _, file, function, _ in rows("stops")]
    found = [entry for entry in entered if entry in stops]
    assert stops == found, to_paste(entered)


def test_everything_that_is_entered_is_on_the_page(entered: list[Entry]) -> None:
    told = {file for _, file, *_ in rows("stops")} | {file for file, _ in rows("helpers")}
    missing = {file for file, _ in entered} - told
    assert not missing, f"not on the page: {sorted(missing)}\n{to_paste(entered)}"
    idle = {file for file, _ in rows("helpers")} - {file for file, _ in entered}
    assert not idle, f"helpers that are not entered: {sorted(idle)}\n{to_paste(entered)}"


def test_the_walk_is_short_and_numbered() -> None:
    numbers = [int(number) for number, *_ in rows("stops")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 10 <= len(numbers) <= MOST_STOPS


def test_a_change_gives_a_list_to_paste(entered: list[Entry]) -> None:
    """A renamed function keeps its sentence, a new file asks for one."""
    renamed = [(file, "merged") if function == "merge" else (file, function) for file, function in entered]
    text = to_paste([*renamed, ("ops/new.py", "new")])
    assert re.search(r"\| `ops/merging.py` \| `merged` \| Merges the removed tokens", text)
    assert re.search(r"\| `ops/new.py` \| `new` \| SAY WHAT HAPPENS", text)


def test_files_that_the_page_names_exist() -> None:
    names = re.findall(r"`((?:[\w]+/)*[\w]+\.py|(?:\w+/)+)`", PAGE.read_text())
    assert len(names) > MOST_STOPS
    missing = [name for name in names if not ((PACKAGE / name).exists() or (PACKAGE.parent / name).exists())]
    assert not missing
