"""Spellings of options, the overview, and mistakes that are told before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_crossget import cli
from mllm_crossget.cli.commands import COMMANDS, GROUPS
from mllm_crossget.cli.option_names import check_names, field_names
from mllm_crossget.config import method_class, method_names
from tests.helpers.versions import TRAINS

commands = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.skipif(name == "train" and not TRAINS, reason="training needs a newer one"))
     for name in COMMANDS],
)  # fmt: skip


@commands
def test_every_option_in_both_spellings(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", printed.partition("options:")[2]))
    assert "--help" in options
    words = {option.replace("_", "-") for option in options if option.startswith("--")}
    lone = [word for word in words if "-" in word[2:] and not {word, f"--{word[2:].replace('-', '_')}"} <= options]
    assert not lone


@commands
def test_every_command_has_an_example_that_can_be_parsed(name: str) -> None:
    command = COMMANDS[name]
    first, *words = shlex.split(command.example)
    assert first == name
    assert command.group in GROUPS
    plain = ["--bf16", "false", "--tf32", "false"] if name == "train" else []
    assert cli.parse_command(name, command, [*words, *plain])


def test_the_overview_has_groups_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    places = [printed.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    for name, command in COMMANDS.items():
        start = printed.index(f"\n  {name:<14}{command.help}")
        assert printed.rindex(f"\n{command.group}:\n", 0, start + 1) == max(place for place in places if place < start)
        assert printed.index(f"$ mllm-crossget {command.example}") > start


@pytest.mark.skipif(not TRAINS, reason="training needs a newer transformers")
def test_names_read_from_sources_are_those_of_the_classes() -> None:
    from mllm_crossget.training.options import TrainerSettings, TrainOptions

    found = {module: field_names(module) for module in COMMANDS["train"].names}
    assert all(found.values())
    known = set().union(*found.values())
    kinds = [TrainOptions, TrainerSettings, *map(method_class, method_names())]
    assert {field.name for kind in kinds for field in dataclasses.fields(kind)} <= known
    assert field_names("package_that_nobody_has.module") == set()


@pytest.mark.parametrize(
    ("words", "names", "message"),
    [
        (["--lora_rr", "2"], [], "unknown option --lora_rr; did you mean --lora_r?"),
        (["--lora-rr=2"], [], "unknown option --lora-rr; did you mean --lora_r?"),
        (["--no-lora_s"], [], "unknown option --no-lora_s"),
        ([], ["lora-s"], "unknown option 'lora-s' in the file"),
    ],
)
def test_mistyped_names(words: list[str], names: list[str], message: str) -> None:
    known = {"lora_r", "vision_tower"}
    check_names(["file.yaml", "--lora-r", "--lora_r=3", "-1", "--no_vision-tower"], ["lora_r"], known)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_names(words, names, known)


@pytest.mark.skipif(not TRAINS, reason="training needs a newer transformers")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--help", "measure speed:"),
        ("train --model embedded --train_data d.json --lora_rr 2", "unknown option --lora_rr; did you mean --lora_r?"),
        ("train run.yaml", "unknown option 'lora_rr' in the file; did you mean 'lora_r'?"),
        ("train --model embedded --train_data d.json --lora_dropout 2", "lora_dropout must be below 1"),
        ("train --model embedded --train_data gone.json", "gone.json does not exist"),
        ("train --model ./gone --train_data d.json", "there is no folder ./gone"),
    ],
)
def test_mistakes_do_not_wait_for_torch(tmp_path: Path, words: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text("model: embedded\nlora_rr: 2\n")
    (tmp_path / "d.json").write_text("[]")
    code = (
        "import sys\nfrom mllm_crossget import cli\n"
        "try:\n    status = cli.main(sys.argv[1:])\nexcept SystemExit as stop:\n    status = stop.code\n"
        "print(status, 'torch' in sys.modules, 'transformers.training_args' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert message in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{0 if words == '--help' else 2} False False"
