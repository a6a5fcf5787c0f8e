"""Two processes on the CPU follow the loss trajectory of one, at the same global batch, and save the same tokens.

DDP runs with the other tests, the rest where asked for (about 15 seconds each on an idle machine):

    python -m pytest tests/training/test_distributed.py -m slow
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import ranks
from tests.helpers.products import REST
from tests.helpers.runs_in_processes import distributed_training
from tests.helpers.small_files import weights_in
from tests.helpers.train_distributed import run

ROOT = Path(__file__).parents[2]
STEPS = 12
TOLERANCE = 1e-4  # sums in another order, amplified from step to step; measured 6e-6 after 50


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run("one", folder, 1, STEPS)
    return folder


def same_trajectory(folder, reference, kind, steps=STEPS):
    found, wanted = (json.loads((path / "losses.json").read_text()) for path in (folder, reference))
    assert found["kind"] == kind  # else these tests would pass on plain DDP
    for name in ("loss", "task_loss", "alignment_loss", "grad_norm"):
        assert len(found[name]) == steps
        assert found[name] == pytest.approx(wanted[name], rel=TOLERANCE, abs=TOLERANCE), name
    ours, theirs = (path / f"checkpoint-{steps}" for path in (folder, reference))
    adapters = [path / "adapter_model.safetensors" for path in (ours, theirs)]
    for files in ([weights_in(ours), weights_in(theirs)], adapters):
        saved, expected = map(load_file, files)
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            assert tensor.abs().sum() > 0 or "lora_B" in name
            assert torch.allclose(tensor, expected[name], atol=1e-3), name


def test_ddp(tmp_path, one_process):
    two_processes("ddp", tmp_path, STEPS)
    same_trajectory(tmp_path, one_process, "MULTI_CPU")


@pytest.mark.parametrize("method", ["ddp-madtp", pytest.param("ddp-dynamic", marks=REST)])
def test_ddp_with_a_number_of_tokens_per_image(tmp_path, method):
    """Thresholds are found again on the way, by each process for itself."""
    run(method, tmp_path / "one", 1, 12)
    two_processes(method, tmp_path, 12)
    same_trajectory(tmp_path, tmp_path / "one", "MULTI_CPU", 12)
    settings = [json.loads((path / "checkpoint-12/crossget_config.json").read_text())
                for path in (tmp_path, tmp_path / "one")]  # fmt: skip
    assert settings[0]["threshold"] == pytest.approx(settings[1]["threshold"], abs=1e-5)


def test_a_backend_that_is_not_active_is_an_error(tmp_path):
    """On CPUs the Trainer would quietly replace FSDP by DDP."""
    children = ranks(distributed_training, "fsdp2-as-users-do", str(tmp_path), "2", folder=tmp_path)
    assert any(child.process.exitcode for child in children)
    said = "".join(child.said() for child in children)
    assert "fsdp was asked for, but training would run as MULTI_CPU" in said
    assert not (tmp_path / "losses.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "mllm_crossget"],
        ["deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2", "--module", "mllm_crossget"],
    ],
    ids=["accelerate", "deepspeed"],
)
def test_the_launchers_of_the_ecosystem_start_the_command(tmp_path, launcher):
    pytest.importorskip(launcher[0].partition(".")[0])
    data = tmp_path / "data"
    subprocess.run(
        [sys.executable, "scripts/make_toy_data.py", "--folder", data, "--samples", "32"], cwd=ROOT, check=True
    )
    command = [sys.executable, "-m", *launcher, "train", "scripts/configs/embedded.yaml"]
    options = {"train_data": data / "train.json", "output_dir": tmp_path / "out", "max_steps": 2}
    options |= {"per_device_train_batch_size": 2, "logging_steps": 1}
    options |= {"deepspeed": "scripts/configs/zero3.json"} if "deepspeed" in launcher[0] else {}
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"crossget_weights", "adapter_model.safetensors"} <= saved


def two_processes(*words):
    """Two ranks as torchrun makes them, without its own start; what is slow, and tests/api, go through torchrun."""
    for child in ranks(distributed_training, *map(str, words), folder=words[1]):
        assert child.process.exitcode == 0, child.said()[-3000:]


def torchrun(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.train_distributed", *map(str, words)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "kind"), [("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP")])
def test_sharded(tmp_path, one_process, backend, kind):
    pytest.importorskip("deepspeed" if "zero" in backend else "torch")
    torchrun(backend, tmp_path, STEPS)
    same_trajectory(tmp_path, one_process, kind)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp2"])
def test_text_only_rows_do_not_hang(tmp_path, backend):
    """Every second micro-batch of a process has no image at all: hang or crash without the dummy image."""
    pytest.importorskip("deepspeed" if "zero" in backend else "torch")
    torchrun(backend, tmp_path, 12, 2)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found["loss"]) == 12
