"""``schedule="auto"`` by measured time, with tables in which FLOPs and seconds disagree."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mllm_crossget import CrossGetConfig, ReductionConfig, ToMeConfig, accelerate_mllm, load_crossget, save_crossget
from mllm_crossget.arithmetic.layer_times import checked_times, layer_times
from mllm_crossget.cli import main
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.costs.inspect_model import inspection
from mllm_crossget.families.family import family_of
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.schedule import make_schedule
from tests.helpers.tiny import prompt_batch, tiny_llava
from tests.helpers.tiny_blip import tiny_blip

TOKENS = [1, 578]
# The tower of LLaVA-1.5-7B has 4 % of the FLOPs. Here it takes nearly half of the time: late merging costs too much ...
SLOW_TOWER = {"tokens": TOKENS, "layers_ms": [[1.0, 578.0]], "language_ms": [15000.0, 15000.0]}
# ... and here its tokens cost nothing.
FREE_TOWER = {"tokens": TOKENS, "layers_ms": [[1.0, 1.0]], "language_ms": [1.0, 578.0]}


def geometry():
    config = resolve("llava-1.5-7b")
    return family_of(config).geometry(config)


@pytest.mark.parametrize("kind", [CrossGetConfig, ToMeConfig])
def test_times_and_not_flops_choose(kind) -> None:
    by_flops = make_schedule(kind(keep_ratio=0.25), geometry())
    slow, free = (make_schedule(kind(keep_ratio=0.25, layer_times=table), geometry())
                  for table in (SLOW_TOWER, FREE_TOWER))  # fmt: skip
    first = {name: next(i for i, removed in enumerate(one.removals) if removed)
             for name, one in (("slow", slow), ("flops", by_flops), ("free", free))}  # fmt: skip
    assert first["slow"] < first["flops"] <= first["free"]
    latest = make_schedule(kind(keep_ratio=0.25, schedule="output" if kind is CrossGetConfig else "late"), geometry())
    assert free.removals == latest.removals
    assert slow.features == free.features == by_flops.features


def test_times_between_two_counts() -> None:
    """Tokens leave in the middle of a layer; those that a selection at the output averages had features first."""
    table = checked_times({"tokens": [10, 20, 40], "layers_ms": [[1, 2, 4], [3, 3, 9]], "language_ms": [0, 10, 50],
                           "view_ms": [0, 1, 3]})  # fmt: skip
    times = layer_times(table, layers=2, most=40)
    millisecond = 1_000_000
    assert times.language(30) == 30 * millisecond
    assert times.language(5) == 0
    assert times.tower([40, 30, 10]) == round(((4 + 3) / 2 + (6 + 3) / 2) * millisecond)
    assert times.tower([40, 30, 10], output=True) == round(((4 + 3) / 2 + 6 + 2) * millisecond)
    alike = layer_times({**table, "layers_ms": [[1, 2, 4]]}, layers=3, most=40)
    assert alike.tower([40, 40, 40, 40]) == 3 * 4 * millisecond


def test_saved_and_loaded_with_the_settings(tmp_path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({**SLOW_TOWER, "measured": {"where": "by hand"}}))
    config = CrossGetConfig(keep_ratio=0.25, layer_times=str(path))
    path.unlink()
    config.save_pretrained(tmp_path)
    assert ReductionConfig.from_pretrained(tmp_path) == config
    assert config.layer_times["measured"] == {"where": "by hand"}
    model = accelerate_mllm(tiny_llava(), replace(config, keep_ratio=0.5, layer_times=FREE_TOWER))
    removals = handle_of(model).schedule.removals
    assert removals != handle_of(accelerate_mllm(tiny_llava(), keep_ratio=0.5)).schedule.removals
    save_crossget(model, tmp_path)
    again = load_crossget(tiny_llava(), tmp_path)
    assert handle_of(again).schedule.removals == removals
    with torch.no_grad():
        batch = prompt_batch(model, (1,))
        assert torch.equal(model(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [1, 577]}, "measured up to 577 tokens, but 578 enter the vision tower"),
        ({"layers_ms": [[1.0, 2.0]] * 23}, "times of 23 layers, the vision tower has 24"),
        ({"layers_ms": [[1.0, 2.0, 3.0]]}, r"layers_ms\[0\] must have 2 times"),
        ({"layers_ms": []}, "layers_ms is empty"),
        ({"language_ms": [1.0, -2.0]}, "language_ms must have 2 times of 0 ms or more"),
        ({"tokens": [5, 5]}, "two or more ascending counts"),
        ({"tokens": [0, 578]}, "tokens must be at least 1"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_schedule(CrossGetConfig(keep_ratio=0.25, layer_times={**SLOW_TOWER, **change}), geometry())


def test_other_mistakes_say_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no \['layers_ms', 'language_ms'\]; mllm-crossget bench-layers"):
        CrossGetConfig(layer_times={"tokens": TOKENS})
    with pytest.raises(ValueError, match=r"none\.json is not a JSON file"):
        CrossGetConfig(layer_times=str(tmp_path / "none.json"))
    with pytest.raises(TypeError, match="layer_times must be a JSON file or an object"):
        CrossGetConfig(layer_times=[1])
    with pytest.raises(ValueError, match="these settings have schedule='constant'; leave one of them out"):
        CrossGetConfig(r=3, layer_times=SLOW_TOWER)
    with pytest.raises(ValueError, match="no language model reads its tokens in a prompt"):
        accelerate_mllm(tiny_blip(), keep_ratio=0.5, layer_times=SLOW_TOWER)


def test_inspect_prints_the_time_of_every_schedule(tmp_path, capsys) -> None:
    model = tiny_llava()
    report = inspection(model.config, CrossGetConfig(keep_ratio=0.25, layer_times=SLOW_TOWER))
    assert list(report["schedule_ms"]) == ["constant", "late", "output", "auto"]
    output = report["schedule_ms"]["output"]
    assert output["tower"] == pytest.approx(3 * 18)  # of three layers that are read, on 18 tokens each
    assert output["total"] == output["tower"] + output["language_model"]
    assert report["schedule_ms"]["constant"]["tower"] < output["tower"]
    path, folder = tmp_path / "times.json", tmp_path / "model"
    path.write_text(json.dumps(FREE_TOWER))
    model.save_pretrained(folder)
    assert main(["inspect", str(folder), "--keep_ratio", "0.25", "--layer_times", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "ms of tower + language model by schedule, from layer_times: constant 3.00 +" in printed
    assert inspection(model.config, CrossGetConfig(keep_ratio=0.25))["schedule_ms"] == {}


def test_the_command_measures_a_table_that_fits(tmp_path) -> None:
    tiny_llava().save_pretrained(tmp_path / "model")
    path = tmp_path / "times.json"
    assert main(["bench-layers", str(tmp_path / "model"), "--rounds", "1", "--output", str(path)]) == 0
    table = json.loads(path.read_text())
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5, layer_times=str(path))
    tower = handle_of(model).tower_geometry
    assert len(table["layers_ms"]) == tower.layers
    assert table["tokens"][-1] == tower.patches + tower.prefix + 1
    assert all(time > 0 for row in (*table["layers_ms"], table["language_ms"], table["view_ms"]) for time in row)
    assert table["measured"]["environment"]["torch"] == torch.__version__
