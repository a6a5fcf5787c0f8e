"""Stopping and going on: kill -9, SIGTERM, truncated files, a full disk. One process, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from mllm_crossget.training import checkpoint_problem, last_complete_checkpoint
from mllm_crossget.training.finetune import resume_point
from tests.helpers.processes import Child
from tests.helpers.runs_in_processes import slow_training
from tests.helpers.toy import ToySamples, losses, toy_arguments, toy_model, toy_trainer


def start(folder, pause):
    return Child(slow_training, str(folder), pause, output=folder / "said.txt")


def state_of(folder):
    log = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    return load_file(folder / "checkpoint-12" / "adapter_model.safetensors"), [e["loss"] for e in log if "loss" in e]


def same(first, second):
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, 0).end() == 0
    return state_of(folder)


def test_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted):
    run = start(tmp_path, 1)
    run.wait_for_line("6")
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    assert start(tmp_path, 0).end() == 0
    same(state_of(tmp_path), uninterrupted)


def test_sigterm_saves_and_ends_cleanly(tmp_path, uninterrupted):
    run = start(tmp_path, 5)  # transformers asks for the checkpoint 3 s after the signal: within this pause
    run.wait_for_line("5")
    run.process.terminate()  # SIGTERM
    assert run.end() == 0
    stopped = int(next(line for line in run.said().splitlines() if line.startswith("end ")).split()[1])
    assert 5 <= stopped < 12
    assert last_complete_checkpoint(tmp_path).endswith(f"checkpoint-{stopped}")
    assert start(tmp_path, 0).end() == 0
    same(state_of(tmp_path), uninterrupted)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    toy_trainer(folder, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.json", "truncate"),
        ("trainer_state.json", "remove"),
        ("adapter_model.safetensors", "truncate"),
        ("adapter_model.safetensors", "remove"),
        ("optimizer.pt", "truncate"),
        ("rng_state.pth", "truncate"),
        ("checkpoint-is-incomplete.txt", "write"),
        ("crossget_config.json", "truncate"),
        ("crossget_weights", "truncate"),
        ("crossget_weights", "remove"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, two_checkpoints, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    path = folder / "checkpoint-4" / name
    path = next(path.iterdir()) if path.is_dir() else path
    if damage == "write":
        path.write_text("")
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    with (
        pytest.warns(UserWarning, match="not complete"),
        pytest.raises(ValueError, match=r"cannot go on from .*; the last complete .*-2"),
    ):
        resume_point(toy_arguments(folder, resume_from_checkpoint=str(folder / "checkpoint-4")))


def test_goes_on_from_the_one_before(tmp_path, two_checkpoints):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="not complete"):
        point = resume_point(toy_arguments(folder))
    trainer = toy_trainer(folder)
    trainer.train(resume_from_checkpoint=point)
    assert trainer.state.global_step == 4


def test_whole_checkpoints(two_checkpoints, tmp_path):
    assert checkpoint_problem(two_checkpoints / "checkpoint-2") is None
    assert "no folder" in checkpoint_problem(tmp_path / "nothing")
    assert last_complete_checkpoint(tmp_path) is None
    assert resume_point(toy_arguments(tmp_path)) is None
    assert resume_point(toy_arguments(two_checkpoints, resume_from_checkpoint="no")) is None


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("file write failed")])
def test_full_disk_is_told_and_the_checkpoint_before_survives(tmp_path, monkeypatch, error):
    trainer = toy_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    whole = trainer._save_optimizer_and_scheduler

    def fails_at_step_4(folder):
        if trainer.state.global_step == 4:
            raise error
        whole(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fails_at_step_4)
    with (
        pytest.warns(UserWarning, match="not complete"),
        pytest.raises(OSError, match=r"is the disk full\? .*checkpoint-2"),
    ):
        trainer.train()
    with pytest.warns(UserWarning, match="not complete"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_resume_in_one_process_is_exact(tmp_path):
    whole = toy_trainer(tmp_path / "a", toy_model(dropout=0.1), ToySamples(16))
    whole.train()
    toy_trainer(
        tmp_path / "b", toy_model(dropout=0.1), ToySamples(16), max_steps=2, save_strategy="steps", save_steps=2
    ).train()
    second = toy_trainer(tmp_path / "b", toy_model(dropout=0.1), ToySamples(16))
    second.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "b"))
    assert losses(second) == losses(whole)
