"""``mllm-crossget train config.yaml --any_option value`` on the embedded architecture with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from mllm_crossget.cli import COMMANDS, main, parse_command
from mllm_crossget.embedded.architecture import build_model
from mllm_crossget.training import load_finetuned
from tests.helpers.small_files import weights_in

CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"


def parsed(work, *words):
    return parse_command("train", COMMANDS["train"], [str(work / "config.yaml"), "--output_dir", str(work), *words])


def test_the_file_gives_values_and_the_command_line_wins(work):
    options, method, args = parsed(work, "--max_steps", "7", "--alignment_weight", "0.1", "--lora_r", "8")
    assert (options.lora_r, options.lora_alpha, options.on_bad_sample) == (8, 4, "skip")
    assert (method.keep_ratio, method.alignment_weight) == (0.25, 0.1)
    assert (args.max_steps, args.learning_rate, args.per_device_train_batch_size) == (7, 1e-3, 2)
    assert args.report_to == ["tensorboard"]
    assert args.enable_jit_checkpoint


def test_trains_reports_and_saves(work, tmp_path, capsys):
    config = str(work / "config.yaml")
    words = ["--output_dir", str(tmp_path), "--save_steps", "2"]
    assert main(["train", config, *words]) == 0
    output = capsys.readouterr().out
    assert "1 bad samples were skipped" in output
    assert "saved to" in output
    assert json.loads((tmp_path / "bad_samples.jsonl").read_text())["id"] == "3"
    assert {"adapter_model.safetensors", "crossget_weights", "README.md", "checkpoint-4", "runs"} <= {
        path.name for path in tmp_path.iterdir()
    }
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    entry = state["log_history"][0]
    assert entry["visual_tokens"] == 36
    assert math.isfinite(entry["alignment_loss"])
    load_finetuned(build_model(), tmp_path)
    # Started again, it has nothing left to do and leaves its result alone.
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert main(["train", config, *words]) == 0
    assert "is finished (step 4 of 4): nothing to do" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    # With more steps it goes on; with another reduction or adapter it is refused by name.
    for changed, name in ((["--keep_ratio", "0.5"], "keep_ratio=0.5 (it was 0.25)"), (["--lora_r", "4"], "lora_r=4")):
        assert main(["train", config, *words, "--max_steps", "6", *changed]) == 2
        assert name in capsys.readouterr().err
    # What a killed run left unwritten is written from its last checkpoint.
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    assert main(["train", config, *words]) == 0
    assert "all 4 steps are trained" in capsys.readouterr().out
    for path, data in before.items():  # the files' headers have their words in any order
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, load(data)[name])
    assert main(["train", config, *words, "--max_steps", "6"]) == 0
    assert "going on from" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert str(work) not in card
    assert "base_model:" not in card


@pytest.mark.parametrize("tuning", ["full", "cross_tokens"])
def test_other_ways_of_tuning(work, tmp_path, tuning):
    words = ["--output_dir", str(tmp_path), "--tuning", tuning, "--max_steps", "2", "--report_to", "none"]
    assert main(["train", str(work / "config.yaml"), *words]) == 0
    saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path, work / "model"))
    assert saved.keys() == before.keys()
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert not any("vision_tower" in name for name in changed)
    assert bool(changed) == (tuning == "full")
    assert load_file(weights_in(tmp_path))["vision.cross"].abs().sum() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on_bad_sample", "stop"], "sample '3': its image cannot be read"),
        (["--on_bad_sample", "ignore"], "on_bad_sample must be one of"),
        (["--tuning", "half"], "tuning must be one of"),
        (["--bits", "4", "--tuning", "full"], "freezes the weights"),
        (["--train_data", "nowhere.json"], "does not exist"),
        (["--keep_ratio", "2"], "keep_ratio must be in"),
        (["--resume_from_checkpoint", "nowhere"], "cannot go on from nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(work, tmp_path, capsys, words, message):
    words = ["--output_dir", str(tmp_path), "--report_to", "none", *words]
    assert main(["train", str(work / "config.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_mistakes_in_the_file(tmp_path, capsys):
    for text, message in (("learn_rate: 3", "did you mean 'learning_rate'"), ("- 1", "expected option names")):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "other.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if "accelerate" not in path.name))
def test_shipped_files_are_valid(name, tmp_path):
    words = ["--output_dir", str(tmp_path), "--bf16", "false", "--tf32", "false"]
    options, method, args = parse_command("train", COMMANDS["train"], [str(CONFIGS / name), *words])
    assert options.model
    assert method.method == "crossget"
    assert args.learning_rate in (1e-5, 2e-5, 2e-4, 2e-3)


def test_full_tuning_without_reduction_goes_on(work, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path), "--tuning", "full", "--keep_ratio", "1.0", "--report_to", "none"]
    assert main(["train", str(work / "config.yaml"), *words, "--max_steps", "1", "--save_steps", "1"]) == 0
    assert main(["train", str(work / "config.yaml"), *words, "--max_steps", "2"]) == 0
    output = capsys.readouterr().out
    assert "going on from" in output
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


def test_bad_samples_of_an_earlier_run_are_not_this_runs(work, tmp_path, capsys):
    (tmp_path / "bad_samples.jsonl").write_text(json.dumps({"id": "of yesterday", "reason": "x"}) + "\n")
    words = ["--output_dir", str(tmp_path), "--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    assert main(["train", str(work / "config.yaml"), *words]) == 0
    file = tmp_path / "bad_samples.jsonl"
    assert not file.exists() or "of yesterday" not in file.read_text()


def test_two_runs_of_one_process_have_logs_of_their_own(work, tmp_path) -> None:
    for name in ("one", "two"):
        words = ["--output_dir", str(tmp_path / name), "--max_steps", "1"]
        assert main(["train", str(work / "config.yaml"), *words]) == 0
        assert list((tmp_path / name / "runs").rglob("events.*")), name
