"""The completion script, as bash runs it."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from mllm_crossget import cli
from mllm_crossget.config import method_class, method_names
from tests.helpers.versions import TRAINS

# bash calls the function when a key is pressed, with the words of the line.
PRESS = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_mllm_crossget; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert cli.main(["completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["in"], ["inspect"]),
        (["inspect", "llava-1"], ["llava-1.5-13b", "llava-1.5-7b"]),
        (["inspect", "llava-1.5-7b", "--keep"], ["--keep_ratio"]),
        (["inspect", "--method", "vi"], ["visionzip", "vispruner"]),
        (["demo", "--methods", "tome", "vi"], ["visionzip", "vispruner"]),
        (["show", "--schedule", "l"], ["late"]),
        (["show", "script"], ["script.bash"]),
    ],
)
def test_a_pressed_key(script: Path, words: list[str], expected: list[str]) -> None:
    shell = ["bash", "-c", f"source {script}; {PRESS}", "bash", "mllm-crossget", *words]
    done = subprocess.run(shell, cwd=script.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected, done.stderr


def test_every_command_with_every_option(script: Path) -> None:
    offered = dict(re.findall(r"^_shtab_mllm_crossget_(\w+)_option_strings=\((.*)\)$", script.read_text(), flags=re.M))
    for name, command in cli.COMMANDS.items():
        if name == "train" and not TRAINS:
            continue
        module, kind = command.options.split(":")
        kinds = [getattr(importlib.import_module(module), kind)]
        kinds += [method_class(method) for method in method_names()] if command.takes_method else []
        wanted = {f"--{field.name}" for kind in kinds for field in dataclasses.fields(kind)}
        assert wanted <= set(offered[name.replace("-", "_")].split()), name


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("bench-reducer", "keep_ratio", "llava-1.5-7b"))
