"""What is saved comes back bit for bit: for every family, method, adapter and type; twice, over one another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm_crossget import method_names
from mllm_crossget.families import families
from tests.helpers.methods import DYNAMIC, METHODS
from tests.helpers.round_trips import ADAPTERS, all_cases, case_of, check, save

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up


def kinds(case) -> list[tuple[str, str]]:
    family = case_of(case).model_type
    dynamic = families()[family].dynamic
    methods = [name for name in METHODS if name not in case_of(case).skip_methods and (dynamic or name not in DYNAMIC)]
    adapters = ADAPTERS if families()[family].language_model is not None else ("none",)
    return [(method, adapter) for method in methods for adapter in adapters]


def test_a_llava_comes_back(tmp_path) -> None:
    case = case_of("llava-clip")
    for number, method in enumerate(method_names()):
        save(case, method, ADAPTERS[number % 2], torch.float32, tmp_path / f"{method}-{number}")
    check(case, sorted(tmp_path.iterdir()), back=False)


@pytest.mark.slow
def test_fine_tuned_runs_come_back_over_one_another(tmp_path) -> None:
    case = case_of("llava-clip")
    for method in ("crossget", "tome"):
        save(case, method, "load_finetuned", torch.float32, tmp_path / method)
    check(case, sorted(tmp_path.iterdir()))


def test_a_model_without_a_place_for_tokens_comes_back(tmp_path) -> None:
    case = next(case for case in all_cases() if case.model_type.startswith("qwen"))
    save(case, "crossget", "none", torch.float32, tmp_path / "crossget")
    assert not (tmp_path / "crossget" / "crossget_weights").exists()
    check(case, [tmp_path / "crossget"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in all_cases()])
def test_every_family_in_a_fresh_process(name, tmp_path) -> None:
    case = case_of(name)
    for method, adapter in kinds(name):
        for dtype in (torch.float32, torch.bfloat16):
            save(case, method, adapter, dtype, tmp_path / f"{method} {adapter} {dtype}")
    command = [sys.executable, "-m", "tests.helpers.round_trips", name, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
