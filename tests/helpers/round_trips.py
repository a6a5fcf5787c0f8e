"""Saving and loading for the property test: of a family's tiny model, with a method, an adapter and a type of numbers.

Run as a program it loads, in a process of its own, what a test has saved: ``python -m tests.helpers.round_trips
<case> <folder>``. Every sub-folder of the folder is one saved model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from mllm_crossget import load_crossget, restore_mllm, save_crossget
from mllm_crossget.training import load_finetuned, lora_config
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import prepare
from tests.helpers.tiny import randomise_cross_tokens

ADAPTERS = ("none", "load_crossget", "load_finetuned")


def case_of(name: str) -> Case:
    return next(case for case in all_cases() if case.name == name)


def build(case: Case, dtype: torch.dtype) -> nn.Module:
    return case.build("sdpa").to(dtype)


def answers(case: Case, model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    batch = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.batch(case.build("sdpa")).items()
    }
    with torch.no_grad():
        return case.answers(model.eval(), batch)


def save(case: Case, method: str, adapter: str, dtype: torch.dtype, folder: Path) -> None:
    """Make an accelerated model with learned state of every kind, and save it and what it answers."""
    torch.manual_seed(len(method))
    model = prepare(build(case, torch.float32), method=method, **case.dial)
    randomise_cross_tokens(model, seed=len(method))
    model = model.to(dtype)
    if adapter != "none":
        config = lora_config(model, r=2, alpha=4, dropout=0.0)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in (one for one in model.parameters() if one.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    save_crossget(model, folder)
    torch.save({"answers": answers(case, model, dtype), "adapter": adapter, "dtype": dtype}, folder / "expected.pt")


def load(model: nn.Module, folder: Path) -> nn.Module:
    adapter = torch.load(folder / "expected.pt", weights_only=False)["adapter"]
    return load_finetuned(model, folder) if adapter == "load_finetuned" else load_crossget(model, folder)


def check(case: Case, folders: list[Path], back: bool = True) -> None:
    """Every folder on a fresh model, and again, and all over one another on one model; then the stock model is back."""
    kept: dict[tuple[torch.dtype, bool], nn.Module] = {}
    for folder in [*folders, *(reversed(folders) if back else ())]:
        saved: dict[str, Any] = torch.load(folder / "expected.pt", weights_only=False)
        dtype = saved["dtype"]
        fresh = load(load(build(case, dtype), folder), folder)
        _equal(answers(case, fresh, dtype), saved["answers"], f"{folder.name}, fresh, twice")
        group = (dtype, saved["adapter"] == "load_finetuned")
        kept[group] = load(kept.get(group, build(case, dtype)), folder)
        _equal(answers(case, kept[group], dtype), saved["answers"], f"{folder.name}, over others")
    for (dtype, wrapped), model in kept.items():
        if not wrapped:
            stock = answers(case, build(case, dtype), dtype)
            _equal(answers(case, restore_mllm(model), dtype), stock, f"restored, {dtype}")


def _equal(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    assert all(torch.isfinite(one).all() for one in wanted), f"{what}: the model itself says nothing"
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), what


if __name__ == "__main__":
    torch.set_num_threads(1)
    check(case_of(sys.argv[1]), sorted(path for path in Path(sys.argv[2]).iterdir() if path.is_dir()), back=False)
