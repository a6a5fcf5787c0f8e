"""Training steps are timed in turns, with FLOPs that torch counts, and leave the weights as they were."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_crossget.benchmark.speed import BenchOptions, load, reductions, run
from tests.helpers.tiny import tiny_llava

pytest.importorskip("mllm_crossget.training", reason="LoRA needs the training extra", exc_type=ImportError)
training_steps = pytest.importorskip("mllm_crossget.benchmark.training_steps")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(path)
    return path


def test_lines_of_both_tunings(folder, tmp_path, capsys) -> None:
    output = tmp_path / "steps.jsonl"
    options = BenchOptions(
        geometry=str(folder),
        train=True,
        tunings=["lora", "full"],
        checkpointing=["off", "on"],
        batch_sizes=[2],
        keep_ratios=[0.5],
        rounds=2,
        text_tokens=8,
        ragged=True,
        output=str(output),
    )
    assert run(options) == 0
    assert "share of FLOP ratio" in capsys.readouterr().out.replace("\n", " ")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["tuning"], line["checkpointing"]) for line in lines] == [
        (tuning, checkpointing) for tuning in ("lora", "full") for checkpointing in ("off", "on") for _ in range(2)
    ]
    by_case = {(line["tuning"], line["checkpointing"], line["setting"]): line for line in lines}
    for (tuning, checkpointing, setting), line in by_case.items():
        assert line["total_seconds"]["rounds"] == 2
        assert line["flop_ratio"] == (1 if setting == "untouched" else pytest.approx(line["flop_ratio"]))
        if checkpointing == "on":  # recomputes what the other keeps
            assert line["gflops"] > by_case[tuning, "off", setting]["gflops"]
    whole = by_case["full", "off", "untouched"]
    assert whole["trained_parameters"] == sum(one.numel() for one in tiny_llava().parameters())
    assert by_case["full", "off", "crossget keep_ratio=0.5"]["flop_ratio"] > 1
    assert by_case["lora", "off", "untouched"]["trained_parameters"] < whole["trained_parameters"]


def test_memory_is_that_of_one_step(folder, tmp_path) -> None:
    output = tmp_path / "steps.jsonl"
    options = BenchOptions(
        geometry=str(folder), train=True, memory=True, keep_ratios=[0.5], batch_sizes=[1], rounds=1, output=str(output)
    )
    assert run(options) == 0
    untouched, reduced = (json.loads(line)["peak_bytes"] for line in output.read_text().splitlines())
    assert untouched > 0  # a tiny model keeps less than its attention works with
    assert reduced > 0


def test_a_step_changes_no_weight_and_every_row_has_an_answer(folder) -> None:
    options = BenchOptions(geometry=str(folder), train=True, text_tokens=8, ragged=True, keep_ratios=[0.5])
    model, family = load(options, CPU, torch.float32)
    inputs = training_steps.training_batch(model, family, options, 3, CPU)
    lengths = inputs["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) == 3
    labelled = inputs["labels"] != -100
    assert bool(labelled.any(dim=1).all())
    assert not bool((labelled & (inputs["attention_mask"] == 0)).any())
    assert not bool((inputs["labels"] == model.config.image_token_id).any())
    before = [parameter.clone() for parameter in model.parameters()]
    setting = training_steps._setting(model, "crossget", options_method(options), "full", "off")
    seconds = training_steps.timed_step(setting, inputs, CPU)
    assert set(seconds) == {"forward", "backward", "optimizer"}
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def options_method(options: BenchOptions):
    return reductions(options)[1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": True, "compile": True}, "compile is not used with train"),
        ({"train": True, "new_tokens": [8]}, "new_tokens is not used with train"),
        ({"ragged": True}, "ragged is not used without train"),
        ({"tunings": ["full"]}, "tunings is not used without train"),
        ({"train": True, "tunings": ["all"]}, "tunings must be some of"),
        ({"train": True, "checkpointing": []}, "checkpointing must be some of"),
    ],
)
def test_options_that_would_not_be_used(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        BenchOptions(**settings)
