"""What ``inspect`` says of published models, against torch's counter on models of that size on the meta device.

No weight exists there, and no value of a tensor either. Prompts cannot be compacted, so the parts of a model run one by
one on as many tokens as the schedule says: the vision tower of every tile with its reduction, what lies behind it, and
the language model with its head on the last token. Layers are alike: a quarter of them always, all with ``-m slow``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText

from mllm_crossget import CrossGetConfig, accelerate_mllm
from mllm_crossget.costs.flops import model_flops, tiles_of, visual_tokens
from mllm_crossget.costs.geometries.llava import geometry_names, resolve
from mllm_crossget.costs.inspect_model import inspection
from mllm_crossget.families.family import Family, config_at, family_of, module_at
from mllm_crossget.families.qwen_vl import EXAMPLE_SIDE
from mllm_crossget.schedule import MergeGeometry, Schedule, make_schedule
from tests.helpers.flops import counted

NAMED = ["blip2-opt-2.7b", "llava-1.5-7b", "llava-next-7b", "llava-onevision-7b", "qwen2.5-vl-7b"]
TEXT = 60
Run = Callable[[], Any]


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def words(count: int) -> Tensor:
    return torch.ones(1, count, dtype=torch.int64, device="meta")


def on_meta(config: Any) -> nn.Module:
    has_prompt = type(config) in AutoModelForImageTextToText._model_mapping
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if has_prompt else AutoModel).from_config(config)
    return model.eval().requires_grad_(False)


def merged_vision(model: Any, config: Any) -> Run:
    """Tower, projector and merging of one image."""
    vision = config.vision_config
    if config.model_type.startswith("qwen"):
        side = 2 * EXAMPLE_SIDE
        model.model.visual.rotary_pos_emb.register_forward_pre_hook(
            lambda _, args: tuple(part.to("meta") if isinstance(part, Tensor) else part for part in args)
        )
        pixels = empty(side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
        return lambda: model.model.get_image_features(pixels, torch.tensor([[1, side, side]]))
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return lambda: model.model.get_image_features(empty(1, 3, size, size))


def behind_the_tower(model: Any, config: Any, family: Family, schedule: Schedule) -> Iterator[Run]:
    """From the tower's tokens to what the language side gets."""
    tokens = schedule.features + schedule.drop_cross
    if hasattr(model, "qformer"):
        former, queries = config.qformer_config, config.num_query_tokens
        text = {"input_ids": words(TEXT)} if config.model_type == "instructblip" else {}
        yield lambda: model.qformer(
            query_embeds=empty(1, queries, former.hidden_size),
            encoder_hidden_states=empty(1, tokens, former.encoder_hidden_size),
            **text,
        )
        yield lambda: model.language_projection(empty(1, queries, former.hidden_size))
    elif family.projector is not None and not (family.vision.view and schedule.output is not None):
        projector = module_at(model, family.projector)
        yield lambda: projector(empty(tiles_of(config, family).count, tokens, config.vision_config.hidden_size))
    elif family.text_tower is not None and family.text_tower.appends:
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        for name, width in (("visual_projection", vision), ("text_projection", text)):
            if hasattr(model, name):
                yield lambda name=name, width=width: getattr(model, name)(empty(1, width))


def language(model: Any, config: Any, family: Family, schedule: Schedule) -> Iterator[Run]:
    """The text, the prompt's last logits included."""
    visual = visual_tokens(config, family, schedule)
    if config.model_type == "blip":
        image = empty(1, schedule.tokens[-1], config.vision_config.hidden_size)
        yield lambda: model.text_decoder(words(TEXT), encoder_hidden_states=image, logits_to_keep=1)
    elif family.text_tower is not None:
        yield lambda: model.text_model(words(TEXT))
    else:
        prompt = empty(1, visual + TEXT, config.get_text_config().hidden_size)
        decodes = {"decoder_input_ids": words(1)} if config.text_config.is_encoder_decoder else {}
        if hasattr(model, "qformer"):
            keeps = decodes or {"logits_to_keep": 1}
            model.language_model.set_attn_implementation("eager")  # OPT's mask looks at values for sdpa before 5.23
            yield lambda: model.language_model(inputs_embeds=prompt, **keeps)
        else:
            yield lambda: module_at(model, family.language_model)(inputs_embeds=prompt)
            yield lambda: model.lm_head(prompt[:, -1:])


def published(name: str, layers: str) -> Any:
    """A configuration, with all layers or with a quarter of them.

    Which window a cell is in is data, which no meta device has: Qwen2.5-VL attends to whole images here,
    ``test_merging_flops`` counts its windows.
    """
    config = resolve(name)
    if layers == "quarter":
        for part in (config.vision_config, config.get_text_config(), getattr(config, "qformer_config", None)):
            if part is not None:
                depth = "depth" if hasattr(part, "depth") else "num_hidden_layers"
                setattr(part, depth, getattr(part, depth) // 4)
                if getattr(part, "layer_types", None):
                    part.layer_types = part.layer_types[: getattr(part, depth)]
    if hasattr(getattr(config, "vision_config", None), "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes = list(range(config.vision_config.depth))
    return config


def counted_total(config: Any, method: CrossGetConfig) -> int:
    model, family = accelerate_mllm(on_meta(config), method), family_of(config)
    geometry = family.geometry(config)
    schedule = make_schedule(method, geometry)
    if isinstance(geometry, MergeGeometry) or geometry.cells is not None or geometry.block > 1:
        runs = [merged_vision(model, config)]
    else:
        size, tiles = config_at(config, family.vision_config).image_size, tiles_of(config, family).count
        runs = [lambda: module_at(model, family.tower)(empty(tiles, 3, size, size))]
        runs += behind_the_tower(model, config, family, schedule)
    return sum(counted(run) for run in [*runs, *language(model, config, family, schedule)])


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, "quarter") for name in NAMED),
        *(pytest.param(name, "all", marks=pytest.mark.slow) for name in geometry_names()),
    ],
)
def test_inspect_agrees_with_torch(name: str, layers: str) -> None:
    config, method = published(name, layers), CrossGetConfig(keep_ratio=0.5)
    flops = inspection(config, method, text_tokens=TEXT)["flops"]
    assert flops["after"]["total"] == pytest.approx(counted_total(config, method), rel=0.01)
    if name in NAMED:
        assert flops["ratio"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", geometry_names())
def test_inspect_agrees_with_torch_on_the_untouched_model(name: str) -> None:
    config = published(name, "all")
    flops = inspection(config, CrossGetConfig(keep_ratio=0.5), text_tokens=TEXT)["flops"]
    assert flops["before"]["total"] == pytest.approx(counted_total(config, CrossGetConfig(keep_ratio=1.0)), rel=0.01)


RATIOS = {"llava-1.5-7b": (0.5, 0.25, 0.125), "llava-next-7b": (0.5, 0.125), "internvl3-8b": (0.5, 0.125)}


@pytest.mark.parametrize(("name", "ratio"), [(name, ratio) for name, ratios in RATIOS.items() for ratio in ratios])
def test_the_default_costs_three_percent_more_than_constant_at_most(name, ratio) -> None:
    auto, constant = (
        model_flops(resolve(name), CrossGetConfig(keep_ratio=ratio, schedule=schedule), text_tokens=TEXT).total
        for schedule in ("auto", "constant")
    )
    assert auto <= 1.03 * constant


def test_inspect_lists_the_totals_of_every_schedule() -> None:
    """BLIP-2 is read by queries: there the default is constant."""
    config = resolve("llava-1.5-7b")
    totals = inspection(config, CrossGetConfig(keep_ratio=0.5), text_tokens=TEXT)["schedules"]
    for schedule in ("auto", "constant"):
        method = CrossGetConfig(keep_ratio=0.5, schedule=schedule)
        assert totals[schedule] == model_flops(config, method, text_tokens=TEXT).total
    queries = inspection(published("blip2-opt-2.7b", "quarter"), CrossGetConfig(keep_ratio=0.5), text_tokens=TEXT)
    assert queries["schedules"]["auto"] == queries["schedules"]["constant"]


def test_inspect_lists_no_schedules_for_removals_by_layer() -> None:
    assert inspection(resolve("llava-1.5-7b"), CrossGetConfig(r=13), text_tokens=TEXT)["schedules"] == {}
