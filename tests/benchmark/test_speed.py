"""The harness runs any model, its parts add up, and its ceilings follow from the device and the FLOPs."""

import json
import os
from functools import partial

import pytest
import torch

from mllm_crossget.benchmark import speed
from mllm_crossget.benchmark.parts import PARTS, PartClock, parts_of
from mllm_crossget.benchmark.roofline import Device, Sizes, least_seconds, probe
from mllm_crossget.benchmark.sample_inputs import prompt_inputs
from mllm_crossget.benchmark.speed import (
    BenchOptions,
    load,
    make_settings,
    run,
    time_towers,
    timed_run,
    with_shared_weights,
)
from mllm_crossget.benchmark.timing import environment, seconds_of, spread
from mllm_crossget.cli import main
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.families.family import family_of
from mllm_crossget.methods import CrossGetConfig, ToMeConfig
from tests.helpers.tiny import tiny_llava
from tests.helpers.tiny_blip import tiny_blip2
from tests.helpers.tiny_grid import tiny_internvl, tiny_qwen

CPU = torch.device("cpu")
_compile = torch.compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lines(folder):
    output = folder / "speed.jsonl"
    words = ["bench", "--geometry", str(folder), "--keep_ratios", "0.5", "0.25", "--methods", "crossget", "tome"]
    words += [
        "--batch_sizes",
        "1",
        "2",
        "--new_tokens",
        "1",
        "3",
        "--rounds",
        "2",
        "--tower_rounds",
        "3",
        "--text_tokens",
        "6",
        "--memory",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "probe", lambda device, dtype: Device(1e11, 1e10))  # large matrices take seconds
        assert main([*words, "--output", str(output), "--plot", str(folder / "speed.png")]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_one_line_per_setting_batch_and_answer(lines, folder):
    names = ["untouched", "crossget keep_ratio=0.5", "crossget keep_ratio=0.25", "tome keep_ratio=0.5",
             "tome keep_ratio=0.25"]  # fmt: skip
    cases = [(batch, new, name) for batch in (1, 2) for new in (1, 3) for name in names]
    assert [(line["batch"], line["new_tokens"], line["setting"]) for line in lines] == cases
    assert (folder / "speed.png").stat().st_size > 1000


def test_compiled_towers_take_turns_with_the_others(folder):
    options = BenchOptions(geometry=str(folder), compile=True, keep_ratios=[0.75], vision_layers=2, llm_layers=1)
    model, family = load(options, CPU, torch.float32)
    assert (len(model.model.vision_tower.encoder.layers), len(model.model.language_model.layers)) == (2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # machine code takes a minute
        settings = make_settings(model, family, options, CPU)
    names = ["untouched", "untouched, compiled", "crossget keep_ratio=0.75", "crossget keep_ratio=0.75, compiled"]
    assert [setting.name for setting in settings] == names
    inputs = prompt_inputs(model.config, family, 1, 5, CPU, torch.float32)
    torch._dynamo.reset()
    runs = [timed_run(setting, family, inputs, 1) for setting in settings]
    with pytest.MonkeyPatch.context() as patch:  # the towers to compare with are compiled where the setting's is
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        time_towers(settings, family, inputs["pixel_values"], 2)
    torch._dynamo.reset()
    assert all(run["encoder"] > 0 for run in runs)
    assert [setting.way for setting in settings] == ["plain", "compiled"] * 2
    assert [len(setting.overheads) for setting in settings] == [0, 0, 2, 2]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_frozen_models_answer_as_plain_ones_and_their_weights_are_constants(folder, backend, monkeypatch):
    """Tower and prefill compiled with their weights packed, decoding as it is: the compiler is given tokens and pixels
    to work on, not weights. Machine code takes a minute: slow."""
    given = {False: [], True: []}
    found = {}
    for freeze, sizes in given.items():
        if backend == "eager":

            def recorded(graph, inputs, sizes=sizes):
                sizes += [value.numel() for value in inputs if isinstance(value, torch.Tensor)]
                return graph.forward

            monkeypatch.setattr(torch, "compile", partial(_compile, backend=recorded))
        torch._dynamo.reset()
        options = BenchOptions(geometry=str(folder), keep_ratios=[0.5], compile=not freeze, freeze=freeze,
                               vision_layers=2, llm_layers=1)  # fmt: skip
        model, family = load(options, CPU, torch.float32)
        inputs = prompt_inputs(model.config, family, 2, 6, CPU, torch.float32)
        settings = make_settings(model, family, options, CPU)
        answers = {setting.name: speed.generate(setting.model, inputs, 4) for setting in settings}
        found[freeze] = [answers[setting.name] for setting in settings if setting.way != "compiled"]
    seconds = timed_run(settings[1], family, inputs, 3)
    assert min(seconds[part] for part in ("encoder", "prefill", "decode")) > 0
    assert [setting.name for setting in settings] == ["untouched, frozen", "crossget keep_ratio=0.5, frozen"]
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    if backend == "eager":
        assert {parameter.numel() for parameter in model.parameters()} & set(given[False])
        assert given[True]
        assert max(given[True]) <= max(value.numel() for value in inputs.values())


def test_parts_add_up_to_the_whole(lines):
    for line in lines:
        seconds = line["seconds"]
        assert set(seconds) == {"total", *PARTS}
        assert all(value["min"] >= 0 for value in seconds.values())
        assert (seconds["decode"]["max"] == 0) == (line["new_tokens"] == 1)
        for part in ("encoder", "projector", "prefill"):
            assert 0 < seconds[part]["median"] < seconds["total"]["max"]
        assert ("tokens_per_second" in line) == (line["new_tokens"] == 3)
        assert line["peak_bytes"] > 0
        assert ("reducer_overhead" in line) == (line["setting"] != "untouched")
        if "reducer_overhead" in line:
            assert line["reducer_overhead"]["rounds"] == 3
            share = line["encoder_and_prefill"]["share_of_ideal"]
            # its size is not tested: overhead is a difference of two times, and noise may make it negative
            assert (share < 1) == (line["reducer_overhead"]["median"] > 0)


def test_what_is_compared_with_the_untouched_model(lines, folder):
    config = tiny_llava().config
    for line in lines:
        untouched = next(other for other in lines if other["setting"] == "untouched")
        keeps = line["method"].get("keep_ratio")
        method = {"crossget": CrossGetConfig, "tome": ToMeConfig}[line["method"]["method"]](keep_ratio=keeps)
        before, after = (model_flops(config, kind, text_tokens=6) for kind in (CrossGetConfig(keep_ratio=1.0), method))
        expected = (before.total - before.lm_head) / (after.total - after.lm_head - after.reducer)
        assert line["encoder_and_prefill"]["flop_ratio"] == pytest.approx(expected)
        assert line["cache_bytes"] / line["batch"] < untouched["cache_bytes"] * (1.2 if keeps == 1 else 0.9)
        if keeps == 1:
            assert line["whole"]["speed_up"]["median"] == line["whole"]["ceiling"] == 1.0
        else:
            assert line["whole"]["ceiling"] > 1
            assert line["visual_tokens"] < line["visual_tokens_untouched"]


def test_copies_share_the_weights_and_nothing_else():
    model = tiny_llava()
    twin = with_shared_weights(model)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}


def tiny_qwen2_5():
    return tiny_qwen(model_type="qwen2_5_vl")


@pytest.mark.parametrize("make", [tiny_llava, tiny_blip2, tiny_internvl, tiny_qwen2_5])
def test_the_clock_sees_every_part(make):
    model = make().eval()
    family = family_of(model.config, [type(model).__name__])
    inputs = prompt_inputs(model.config, family, 2, 5, CPU, torch.float32)
    clock = PartClock(CPU)
    with clock.watching(parts_of(model, family)), torch.no_grad():
        total = seconds_of(lambda: model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False))
    found = clock.seconds(total)
    assert all(found[part] > 0 for part in ("encoder", "projector", "prefill", "decode"))
    assert sum(found.values()) == pytest.approx(total)
    watched = [module for members in parts_of(model, family).values() for module in members]
    assert not any(module._forward_pre_hooks for module in watched)
    assert clock.seconds(1.0) == {"encoder": 0, "projector": 0, "prefill": 0, "decode": 0, "rest": 1.0}


def test_tiles_are_written_as_the_processor_would():
    config = resolve("llava-next-7b")
    inputs = prompt_inputs(config, family_of(config), 1, 8, CPU, torch.float32)
    assert inputs["pixel_values"].shape == (1, 5, 3, 336, 336)
    assert inputs["image_sizes"].tolist() == [[672, 672]]
    assert (inputs["input_ids"] == config.image_token_id).sum() == 2928  # 5 x 576 patches and 48 newlines


def test_a_model_without_prompts_of_its_own_is_refused():
    config = resolve("gemma3-4b")
    with pytest.raises(ValueError, match="gemma3"):
        prompt_inputs(config, family_of(config), 1, 8, CPU, torch.float32)
    with pytest.raises(ValueError, match="no built-in geometry"):
        run(BenchOptions(geometry="no-such-model"))


def test_the_roofline_is_the_slower_of_computing_and_reading():
    config = resolve("llava-1.5-7b")
    flops = model_flops(config, ToMeConfig(keep_ratio=1.0), text_tokens=60, new_tokens=3)
    sizes = Sizes(encoder=600, language=13000, cache=10)
    slow_memory, slow_products = Device(1e30, 100.0), Device(1e12, 1e30)
    steps = 2 * (13000 + 4 * 10 * (636 + 1.5))
    assert least_seconds(slow_memory, flops, sizes, 4, 636, 3) == pytest.approx((600 + 13000 + steps) / 100)
    total = 4 * (flops.total - flops.reducer)
    assert least_seconds(slow_products, flops, sizes, 4, 636, 3) == pytest.approx(total / 1e12)


def test_a_device_is_probed():
    found = probe(CPU, torch.float32, side=256)
    assert 1e8 < found.flops < 1e16
    assert 1e7 < found.bandwidth < 1e14


def test_spread():
    found = spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found == {"median": 3.0, "p10": 1.4, "p90": 4.6, "min": 1.0, "max": 5.0, "rounds": 5}


@pytest.mark.parametrize("command", ["bench", "bench-reducer", "bench-reuse"])
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(command, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "result.json", tmp_path):
        assert main([command, "--output", str(wrong)]) == 2
        assert f"cannot write {wrong}" in capsys.readouterr().err


def test_what_the_allocator_was_told_is_part_of_a_figure(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "LD_PRELOAD"]:
        monkeypatch.delenv(name)
    assert "allocator" not in environment()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1024")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert environment()["allocator"] == "MALLOC_TRIM_THRESHOLD_=1024 LD_PRELOAD=libjemalloc.so.2"
