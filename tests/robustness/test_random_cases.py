"""Random models, batches, methods, dials and ways to generate: what must hold for all of them.

A refused setting must leave the model as it was. One that is taken answers a row in a batch as the row alone, says what
prompts compacted by hand say, and is undone bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from mllm_crossget import accelerate_mllm, calibrate, restore_mllm
from mllm_crossget.config import method_class
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.exploring import SEED, explore, in_double, in_parts, redrawn, shaken
from tests.helpers.families.cases import Case, all_cases
from tests.helpers.methods import OWN as OURS
from tests.helpers.oracle import Oracle, strip_end
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, text_batch, tiny_llava

METHODS = OURS
DIALS = st.one_of(
    st.fixed_dictionaries({"keep_ratio": st.floats(0.05, 1.0)}),
    st.fixed_dictionaries({"visual_tokens": st.integers(1, 30)}),
    st.fixed_dictionaries({"r": st.one_of(st.integers(0, 9), st.lists(st.integers(0, 8), min_size=2, max_size=6))}),
)
COMMON = {
    "positions": st.sampled_from(["original", "contiguous"]),
    "size_bias": st.booleans(),
    "schedule": st.sampled_from(["auto", "constant", "late", "output"]),
    "merge_every": st.integers(1, 3),
}
OWN = {
    "crossget": {
        "importance": st.sampled_from(["published", "attention", "cosine"]),
        "dynamic": st.booleans(),
        "max_visual_tokens": st.integers(1, 20),
    },
    "madtp": {"max_visual_tokens": st.integers(1, 20), "min_keep": st.integers(1, 3)},
    "random": {"seed": st.integers(0, 99), "drop": st.booleans()},
    "tome": {"order": st.sampled_from(["position", "reference"])},
}
SMALL = {"madtp": {"alignment_tokens": 5, "alignment_width": 8}}


@st.composite
def settings_of_a_method(draw: st.DrawFn) -> dict[str, Any]:
    """The keywords of ``accelerate_mllm``: a method, a dial, and a few of the other settings."""
    method = draw(st.sampled_from(METHODS))
    others = draw(st.fixed_dictionaries({}, optional={**COMMON, **OWN[method]}))
    return {"method": method, **SMALL.get(method, {}), **draw(DIALS), **others}


@st.composite
def ways_to_generate(draw: st.DrawFn) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 5)), "do_sample": False}
    beams = draw(st.sampled_from([1, 1, 2, 3]))
    if beams > 1:
        options |= {"num_beams": beams, "num_return_sequences": draw(st.integers(1, beams))}
    way = draw(st.sampled_from(["plain", "plain", "static", "no cache"]))
    if way == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    elif way == "no cache":
        options["use_cache"] = False
    return options


@st.composite
def llavas(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``tiny_llava``."""
    layers = draw(st.integers(2, 5))
    return {
        "tower": draw(st.sampled_from(["clip", "siglip"])),
        "layers": layers,
        "text": draw(st.sampled_from(["llama", "mistral", "qwen2"])),
        "image_size": 14 * draw(st.integers(2, 5)),
        "text_layers": draw(st.integers(1, 3)),
        "strategy": draw(st.sampled_from([None, "full"])),
        "feature_layer": draw(st.one_of(st.none(), st.integers(1, layers), st.integers(-layers, -1))),
        # Eager language models have no number for padding in float64.
        "attention": draw(st.sampled_from(["sdpa", {"vision_config": "eager", "text_config": "sdpa"}])),
        "seed": draw(st.integers(0, 10**6)),
    }


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, state: dict[str, torch.Tensor], names: list[Any]) -> None:
    assert handle_of(model) is None
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert shape_of(model) == names


def shape_of(model: nn.Module) -> list[Any]:
    """Classes and attributes, but for what transformers' own ``generate`` leaves on a model with a static cache."""
    return [(type(module), sorted(set(vars(module)) - {"_previous_max_cache_length"})) for module in model.modules()]


def accelerated_or_refused(model: nn.Module, settings: dict[str, Any]) -> bool:
    """Accelerate with random settings and random learned tokens; False where they are refused, with a reason."""
    state, names = state_of(model), shape_of(model)
    try:
        accelerate_mllm(model, **settings)
        calibrate_if_asked(model)
    except ValueError:
        restore_mllm(model)
        assert_untouched(model, state, names)
        return False
    randomise_cross_tokens(model)
    calibrate_if_asked(model)
    return True


def calibrate_if_asked(model: nn.Module) -> None:
    handle = handle_of(model)
    if handle is not None and handle.method.is_dynamic and not getattr(handle.method, "reference", False):
        prunes_texts = handle.method.per_text is not None and handle.text_tower is not None
        calibrate(
            model,
            pixels(model, 8, seed=5) if handle.tower is not None else None,
            texts=text_batch(model) if prunes_texts else None,
        )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, and NaN where the other has it: eager attention in float64 gives that for padding."""
    return torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def check_llava(model: dict, settings: dict, images: list[int], options: dict, seed: int, side: str) -> None:
    with in_double():
        accelerated = tiny_llava(**model)
        accelerated.generation_config.suppress_tokens = [accelerated.config.image_token_id]
        oracle, batch = Oracle(accelerated), prompt_batch(accelerated, images, seed, padding_side=side)
        stock, state, names = accelerated(**batch).logits, state_of(accelerated), shape_of(accelerated)
        if not accelerated_or_refused(accelerated, settings):
            return
        cross = getattr(accelerated.model.language_model, "cross_tokens", None)
        if cross is not None:
            oracle.guide(cross())
        logits = accelerated(**batch).logits
        for row, (compact, wanted) in enumerate(oracle.logits(accelerated, batch)):
            close(logits[row, compact.columns], wanted)
        if handle_of(accelerated).method.is_identity:
            assert same(logits, stock)
        if side == "left":  # on the right, pads stand between a prompt and its answer, as in the untouched model
            said = accelerated.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
            wanted = oracle.new_tokens(accelerated, batch, **options)
            assert list(map(strip_end, said)) == list(map(strip_end, wanted))
        restore_mllm(accelerated)
        assert_untouched(accelerated, state, names)
        assert same(accelerated(**batch).logits, stock)


@in_parts(short=12, long=5000)
def test_a_random_llava_says_what_compacted_rows_say(examples: int, part: int) -> None:
    explore(
        check_llava,
        examples,
        SEED + part,
        model=llavas(),
        settings=settings_of_a_method(),
        images=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        options=ways_to_generate(),
        seed=st.integers(0, 10**6),
        side=st.sampled_from(["left", "right"]),
    )


@torch.no_grad()
def check_family(case: Case, settings: dict, attention: str, beams: int, seed: int) -> None:
    mixes_experts = any("experts" in name for name, _ in case.build(attention).named_parameters())
    stock_is_single = mixes_experts or case.name.startswith("glm")  # grouped products, and positions of a grid
    with nullcontext() if stock_is_single else in_double():
        model = shaken(case.build(attention), seed)
        batch = redrawn(case.batch(model), seed)
        if "text_keep_ratio" in case.dial:  # without it, stock BLIP lets a question read its batch's padding
            settings = {**settings, "text_keep_ratio": case.dial["text_keep_ratio"]}
        before, state, names = case.answers(model, batch), state_of(model), shape_of(model)
        if not accelerated_or_refused(model, settings):
            return
        says_something = all(torch.isfinite(row).all() for row in before)  # InstructBLIP's eager padding does not
        together = case.answers(model, batch) if says_something else []
        for index, row in enumerate(together):
            assert torch.isfinite(row).all()
            (alone,) = case.answers(model, case.row(batch, index))
            torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)
        if case.generates and says_something:
            check_generate(case, model, batch, {"max_new_tokens": 4, "do_sample": False, "num_beams": beams})
        restore_mllm(model)
        assert_untouched(model, state, names)
        assert all(map(same, case.answers(model, batch), before))


def check_generate(case: Case, model: nn.Module, batch: dict, options: dict) -> None:
    """In a batch and alone."""
    together = new_tokens(model, batch, options)
    alone = [new_tokens(model, case.row(batch, row), options)[0] for row in range(len(together))]
    assert together == alone


def new_tokens(model: nn.Module, batch: dict, options: dict) -> list[list[int]]:
    encodes = getattr(model.config, "text_config", model.config).is_encoder_decoder
    prompt = batch["input_ids"].shape[1] if "input_ids" in batch and not encodes else 0
    pad = model.generation_config.pad_token_id
    return [strip_end(row, pad) for row in model.generate(**batch, **options)[:, prompt:].tolist()]


@in_parts(short=12, long=5000)
def test_a_random_model_of_any_family(examples: int, part: int) -> None:
    explore(
        check_family,
        examples,
        SEED + part,
        case=st.sampled_from(all_cases()),
        settings=settings_of_a_method(),
        attention=st.sampled_from(["sdpa", "eager"]),
        beams=st.sampled_from([1, 1, 2]),
        seed=st.integers(0, 10**6),
    )


def test_every_method_has_its_settings_here() -> None:
    assert set(OWN) == set(METHODS)
    for method, own in OWN.items():
        assert set(own) <= set(method_class(method).__dataclass_fields__)
