"""The command line: options made from the dataclasses, reports without weights, errors as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from mllm_crossget import __version__, cli, method_names
from mllm_crossget.config import method_class
from mllm_crossget.costs.picture import Saving
from tests.helpers.tiny import tiny_llava
from tests.helpers.versions import TRAINS

GEOMETRY = "llava-1.5-7b"


def inspected(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main(["inspect", GEOMETRY, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_the_published_counts(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspected(capsys, "--r", "13")
    assert report["visual_tokens"] == {"before": 576, "after": 278}
    assert report["tokens_by_layer"][:2] == [578, 565]
    assert report["method"] == {"method": "crossget", "format_version": 2, "r": 13, **_crossget_options()}
    assert report["flops"]["ratio"] == pytest.approx(0.534, abs=5e-4)
    assert (report["tower"], report["layers"]) == ("clip_vision_model", 24)


def _crossget_options() -> dict:
    settings = method_class("crossget")().to_dict()
    return {name: value for name, value in settings.items() if name not in ("method", "format_version", "keep_ratio")}


@pytest.mark.parametrize("words", [["--keep_ratio", "0.25"], ["--keep-ratio", "0.25"], ["--visual-tokens", "144"]])
def test_dials_in_both_spellings(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert inspected(capsys, *words)["visual_tokens"]["after"] == 144


def test_layers_of_the_language_model_with_fewer_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspected(capsys, "--method", "fastv", "--visual-tokens", "64")
    assert report["visual_tokens"]["after"] == 576
    assert report["language_tokens_by_layer"] == [576] * 2 + [64] * 30
    assert inspected(capsys)["language_tokens_by_layer"] == []
    assert cli.main(["inspect", GEOMETRY, "--method", "fastv", "--visual-tokens", "64"]) == 0
    assert "576 tokens in 2, 64 tokens in 30; 96.0 tokens on average" in " ".join(capsys.readouterr().out.split())


def test_r_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspected(capsys, "--r", "40", *["0"] * 22, "7")
    assert report["removed_by_layer"] == [40, *[0] * 22, 7]


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_its_own_options(capsys: pytest.CaptureFixture[str], method: str) -> None:
    assert inspected(capsys, "--method", method)["method"]["method"] == method
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "--method", method, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{field.name}" in printed for field in fields(method_class(method)))
    assert "share of the visual tokens that reaches the language" in printed


def test_counts_of_text_and_new_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (
        inspected(capsys, "--text-tokens", "10"),
        inspected(capsys, "--text_tokens", "60", "--new_tokens", "9"),
    )
    assert short["flops"]["before"]["prefill"] < long["flops"]["before"]["prefill"]
    assert short["flops"]["before"]["decode"] == 0 < long["flops"]["before"]["decode"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", GEOMETRY, "--r", "13"]) == 0
    printed = capsys.readouterr().out
    assert "576 -> 278 visual tokens" in printed
    assert "reducer" in printed
    assert "0.534" in printed


def test_inspect_a_local_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llava().config.save_pretrained(tmp_path)
    assert cli.main(["inspect", "--name_or_path", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == {"before": 16, "after": 8}


def test_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    known = {row["model_type"]: row for row in printed["supported"]}
    assert not known.keys() & {row["model_type"] for row in printed["refused"]}
    assert all(row["reduces"] for row in known.values())
    assert all(row["reason"] for row in printed["refused"])
    assert "siglip_vision_model" in known["llava"]["towers"]
    pictures = {name: row["picture"] for name, row in known.items()}
    assert (pictures["qwen2_5_vl"]["before"], pictures["qwen2_5_vl"]["after"]) == (37 * 37, 37 * 37 // 2)
    assert 0.4 < pictures["qwen2_5_vl"]["share"] < 0.5
    assert all((row["share"] is None) == bool(row["why"]) for row in pictures.values())
    assert {name for name, row in pictures.items() if row["why"].startswith("no FLOPs formula for a ")} == set()


def test_families_as_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_crossget.costs.family_table.saving_of", lambda *_: Saving(5, 2, None, "no reason"))
    assert cli.main(["families"]) == 0
    printed = capsys.readouterr().out
    assert "llava" in printed
    assert "5 -> 2" in printed
    assert "- (no reason)" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", GEOMETRY, "--keep_ratio", "1.5"], "keep_ratio must be in (0, 1], got 1.5"),
        (["inspect", GEOMETRY, "--keep_ratio", "0.5", "--r", "3"], "exactly one of"),
        (["inspect", GEOMETRY, "--visual_tokens", "577"], "more than the 576 tokens"),
        (["inspect", GEOMETRY, "--r", "1", "2"], "r lists 2 layers, the vision tower has 24"),
        (["inspect", GEOMETRY, "--method", "nonsense"], "unknown method 'nonsense'; known methods: cdpruner, crossget"),
        (["inspect", "nonsense"], "is no built-in geometry"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "words",
    [[], ["nonsense"], ["inspect"], ["inspect", GEOMETRY, "--unknown", "1"], ["inspect", GEOMETRY, "--r", "many"]],
)
def test_unknown_words_are_one_line_that_names_the_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert "--help lists what is possible" in printed


def test_help_lists_every_command_and_needs_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_tells_its_options(capsys: pytest.CaptureFixture[str], name: str) -> None:
    if name == "train" and not TRAINS:
        assert cli.main([name, "--help"]) == 2
        assert "needs transformers 5.23 or newer" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: mllm-crossget {name}" in capsys.readouterr().out


def test_options_of_the_demo() -> None:
    (options,) = cli.parse_command("demo", cli.COMMANDS["demo"], ["--limit", "60", "--keep-ratios", "0.5", "0.25"])
    assert options.limit == 60
    assert options.keep_ratios == [0.5, 0.25]


@dataclass
class _NeedsNothing:
    """Options of a command for the test below."""

    size: int = 1


def _wants_a_missing_package(options: _NeedsNothing) -> None:
    import package_that_nobody_has  # noqa: F401


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"{__name__}:"
    command = cli.Command(here + "_NeedsNothing", here + "_wants_a_missing_package", "a test", extra="viz")
    monkeypatch.setitem(cli.COMMANDS, "needy", command)
    assert cli.main(["needy", "--size", "3"]) == 2
    assert "pip install 'mllm-crossget[viz]'" in capsys.readouterr().err


def test_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mllm_crossget", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __version__
