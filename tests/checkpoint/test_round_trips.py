"""What is saved comes back bit for bit: for every family, method, adapter and type; twice, over one another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm_crossget.families import families
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import DYNAMIC, METHODS, OWN
from tests.helpers.round_trips import ADAPTERS, case_of, check, save

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up


def kinds(case: Case) -> list[tuple[str, str, torch.dtype]]:
    """Every method, every kind of adapter, every type of numbers, but not each with each: loading takes its time."""
    family = families()[case.model_type]
    methods = [one for one in METHODS if one not in case.skip_methods and (family.dynamic or one not in DYNAMIC)]
    learning = [method for method in ("crossget", "madtp", "tome") if method in methods][:2]
    adapters = ADAPTERS[1:] if family.language_model is not None else ()
    return [
        *((method, "none", torch.float32) for method in methods),
        *((method, adapter, torch.float32) for method in learning for adapter in adapters),
        *((method, "none", dtype) for method in learning for dtype in (torch.bfloat16, torch.float16)),
    ]


def test_a_llava_comes_back(tmp_path) -> None:
    case = case_of("llava-clip")
    for number, method in enumerate(OWN):
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
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_family_in_a_fresh_process(case, tmp_path) -> None:
    for method, adapter, dtype in kinds(case):
        save(case, method, adapter, dtype, tmp_path / f"{method} {adapter} {dtype}")
    command = [sys.executable, "-m", "tests.helpers.round_trips", case.name, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
