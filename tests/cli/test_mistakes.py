"""A user's mistake on the command line is one line that says what to write instead, exit status 2, and no traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from mllm_crossget import cli

FILES = {
    "bad.yaml": "a: b: c\n",
    "twice.yaml": "lora_r: 2\nlora_r: 4\n",
    "spellings.yaml": "lora-r: 2\nlora_r: 4\n",
    "deep.yaml": "[" * 5000,
    "keys.yaml": "1: 2\n",
    "types.yaml": "model: embedded\ntrain_data: d.json\noutput_dir: out\nlora_r: [1, 2]\n",
    "half.yaml": "model: embedded\ntrain_data: d.json\noutput_dir: out\nlora_r: 2.5\n",
    "no_model.yaml": "model: /nonexistent\ntrain_data: d.json\noutput_dir: out\nuse_cpu: true\n",
    "suite.yaml": "- tasks: one\n",
    "d.json": json.dumps([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
    "bad.jpg": "x",
    "afile": "x",
    "binary.yaml": "\udcff\n",
}
CASES = [
    (["train", "d.json"], "'d.json' is no YAML file"),
    (["inspect", "llava-1.5-7b", "--text_keep_ratio", "0.5"], "no text tower of its own to reduce"),
    (["train", "bad.yaml"], "bad.yaml is no valid YAML"),
    (["train", "deep.yaml"], "deep.yaml is no valid YAML"),
    (["train", "binary.yaml"], "binary.yaml is no valid YAML"),
    (["train", "missing.yaml"], "missing.yaml does not exist"),
    (["train", "twice.yaml"], "'lora_r' is given twice"),
    (["train", "spellings.yaml"], "two spellings"),
    (["train", "keys.yaml"], "unknown option '1'"),
    (["train", "types.yaml"], "lora_r must be an integer, got [1, 2]"),
    (["train", "half.yaml"], "lora_r must be an integer, got 2.5"),
    (["train", "no_model.yaml"], "there is no folder /nonexistent"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--output_dir", "afile/out"], "cannot write"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--max_length", "-1"], "max_length must be at least 1"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--max_steps", "0"], "max_steps must be at least 1"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--lora_dropout", "2"], "lora_dropout must be below 1"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--eval_data", "d.json"], "eval_strategy"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--budget", "0.8", "--r", "3"], "would not be used"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--calibration_every", "3"], "calibration_every"),
    (["train", "--model", "embedded", "--train_data", "d.json", "--image_folder", "gone"], "gone does not exist"),
    (["train", "--model", "embedded", "--lora_r", "2", "--lora-r=4"], "--lora_r is given twice"),
    (["inspect", "llava-1.5-7b", "--r", "1", "--r", "2"], "--r is given twice"),
    (["show", "--images", "missing.jpg"], "missing.jpg cannot be read: there is no such file"),
    (["show", "--images", "bad.jpg"], "bad.jpg cannot be read"),
    (["show", "--images", "."], "cannot be read"),
    (["show", "--scenes", "1", "--output", "afile/y.png"], "cannot write afile/y.png"),
    (["show", "--scenes", "1", "--output", "y.txt"], "ending names no format of a picture"),
    (["show", "--scenes", "1", "--keep_ratio", "1"], "merges nothing"),
    (["show", "--scenes", "1", "--calibrate_on", "bad.jpg"], "calibrate_on is for methods that choose"),
    (["show", "--images", "ok.png", "--model", "./gone"], "there is no folder ./gone"),
    (["show", "--images", "ok.png", "--model", "."], "cannot be loaded"),
    (["bench", "--dtype", "float7"], "dtype must be one of float32, bfloat16, float16; got 'float7'"),
    (["bench", "--methods", "nonsense"], "unknown method 'nonsense'"),
    (["bench", "--keep_ratios", "2"], "keep_ratio must be in (0, 1], got 2.0"),
    (["bench", "--r", "-1"], "r must be at least 0"),
    (["bench", "--r", "900"], "r=900 is more than the 576"),
    (["bench", "--rounds", "0"], "rounds must be at least 1"),
    (["bench", "--batch_sizes", "0"], "batch_sizes must be at least 1"),
    (["bench", "--new_tokens", "0"], "new_tokens must be at least 1"),
    (["bench", "--attn_implementation", "fast"], "attn_implementation must be one of"),
    (["bench", "--output", "afile/x.jsonl"], "cannot write"),
    (["bench", "--plot", "x.abc"], "ending names no format"),
    (["bench", "--output", "afile", "--plot", "x.png"], "does not hold JSON lines"),
    (["bench", "--compile", "--freeze"], "give one of them"),
    (["bench-reducer", "--tokens", "0"], "tokens must be at least"),
    (["bench-reducer", "--heads", "7"], "give a multiple"),
    (["bench-reducer", "--removed", "0.9"], "removed must be in (0, 0.5]"),
    (["bench-reuse", "--dtype", "int"], "dtype must be one of"),
    (["bench-reuse", "--images", "-1"], "images must be at least 0"),
    (["bench-reuse", "--geometry", "clip-vit-b-16"], "no image features to keep"),
    (["bench-reuse", "--method", "madtp"], "is not calibrated here"),
    (["demo", "--limit", "0"], "limit must be at least 1"),
    (["demo", "--methods", "tome", "nonsense"], "unknown method 'nonsense'"),
    (["demo", "--keep_ratios", "0"], "keep_ratio must be in (0, 1]"),
    (["demo", "--methods", "madtp"], "chooses the number of tokens per image"),
    (["demo", "--output_dir", "afile/out"], "cannot write into the folder"),
    (["inspect", "llava-1.5-7b", "--text_tokens", "-1"], "text_tokens must be at least"),
    (["inspect", "./gone"], "is no built-in geometry"),
]
if os.path.exists("/dev/full"):
    CASES.append((["show", "--scenes", "1", "--output", "/dev/full/x.png"], "cannot write"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text, errors="surrogateescape")
    Image.new("RGB", (96, 96)).save(folder / "ok.png")
    return folder


@pytest.mark.parametrize(("words", "message"), CASES, ids=lambda value: " ".join(value)[:60])
def test_one_line_and_status_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "bad.yaml"], "bad.yaml is no valid YAML"),
        (["--suite", "suite.yaml", "--keep_ratios", "2"], "keep_ratio must be in"),
        (["--suite", "suite.yaml", "--rs", "-1"], "r must be at least 0"),
        (["--suite", "suite.yaml", "--adapter", "x"], "adapter is for reduced runs"),
        (["--suite", "suite.yaml", "--adapter", "./gone", "--rs", "1"], "./gone does not exist"),
        (["--suite", "suite.yaml", "--output_dir", "afile/out"], "cannot write into the folder"),
    ],
)
def test_mistakes_of_eval(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_stopped_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mllm_crossget.costs.family_table.list_families", stopped)
    assert cli.main(["families"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_seed_of_the_run_and_one_of_the_method() -> None:
    words = ["--model", "embedded", "--train_data", "d.json", "--method", "random", "--seed", "3"]
    _, method, args = cli.parse_command("train", cli.COMMANDS["train"], [*words, "--method_seed", "5"])
    assert (args.seed, method.seed) == (3, 5)
    _, method, args = cli.parse_command("train", cli.COMMANDS["train"], words)
    assert (args.seed, method.seed) == (3, 0)


def test_files_in_both_spellings_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text('model: ~/model\ntrain-data: d.json\nkeep-ratio: 0.25\nlora_r: "4"\nimage_folder: ~\n')
    options, method, args = cli.parse_command("train", cli.COMMANDS["train"], [str(file), "--output_dir=~/out"])
    assert (options.model, options.lora_r, method.keep_ratio) == (str(tmp_path / "model"), 4, 0.25)
    assert args.output_dir == str(tmp_path / "out")
    (options,) = cli.parse_command("demo", cli.COMMANDS["demo"], ["--output_dir=~/demo"])
    assert options.output_dir == str(tmp_path / "demo")


def test_the_help_of_train_shows_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    start = printed.index('{"id": "1"')
    sample = printed[start : printed.index("\n\n", start)].replace("\n", " ")
    assert json.loads(sample)["conversations"][1]["from"] == "gpt"
    import mllm_crossget.training.data as data

    assert '"conversations"' in (data.__doc__ or "")
