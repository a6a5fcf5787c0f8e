"""Methods that act once per image, behind the tower or behind the projector, need one file and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from mllm_crossget import CrossGetConfig, accelerate_mllm, restore_mllm, reuse_vision, trace_merges
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.inspect_model import inspection
from mllm_crossget.families.family import families
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from mllm_crossget.look.visualize import merged_groups, tokens_per_layer
from mllm_crossget.methods import Method, Place, PromptSignals, SelectionMethod, Signals
from mllm_crossget.methods.capabilities import PromptSelection
from mllm_crossget.methods.language_selection import OneStage
from mllm_crossget.ops import Match, merge
from mllm_crossget.schedule import MergeGeometry, TowerGeometry, make_schedule
from tests.helpers.families.cases import all_cases
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.generation import ENCODES_IMAGES_FIRST
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.oracle import Oracle
from tests.helpers.products import rest_unless
from tests.helpers.tiny import pixels, prompt_batch, tiny_llava

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def sizes_of_features(output):
    """(k,) token sizes of every image."""
    return [one.size for one in groups_of(output)]


@dataclass
class LongestFeatures(Method):
    """Behind the projector: the longest features stay, the others are dropped."""

    method: ClassVar[str] = "throw-away-longest"
    place: ClassVar[Place] = Place.PROJECTOR
    needs_features: ClassVar[bool] = True

    @property
    def prunes(self) -> bool:
        """Always."""
        return True

    def match(self, signals: Signals, r: int) -> Match:
        """Written out, without the helpers."""
        assert signals.features is not None
        order = signals.features.float().norm(dim=-1).argsort(dim=-1, descending=True, stable=True)
        count = order.shape[1] - r
        kept, src = order[:, :count].sort(dim=-1).values, order[:, count:].sort(dim=-1).values
        slot = torch.zeros_like(order).scatter(1, kept, torch.arange(count, device=kept.device).expand_as(kept))
        return Match(src, kept[:, :1].expand_as(src), kept, slot, pruned=True)


@dataclass
class MostAttended(SelectionMethod):
    """At the tower's output: what the class token looks at stays, and takes in the others."""

    method: ClassVar[str] = "throw-away-attended"
    needs_class_attention: ClassVar[bool] = True

    @property
    def prunes(self) -> bool:
        """Never."""
        return False

    def select(self, signals: Signals, kept: int) -> Tensor:
        """By the class token's attention."""
        assert signals.class_attention is not None
        return 1 + signals.class_attention[:, 1:].topk(kept, dim=-1).indices


@dataclass
class MostReceived(SelectionMethod):
    """At the tower's output: what all tokens look at stays, the others are dropped; needs no class token."""

    method: ClassVar[str] = "throw-away-received"
    needs_importance: ClassVar[bool] = True

    def select(self, signals: Signals, kept: int) -> Tensor:
        """By the attention received."""
        assert signals.importance is not None
        protected = torch.tensor(signals.protected, dtype=torch.int64, device=signals.keys.device)
        return signals.importance.index_fill(1, protected, -1.0).topk(kept, dim=-1).indices


@dataclass
class InLanguageModel(SelectionMethod):
    """Inside the language model, without saying where."""

    method: ClassVar[str] = "throw-away-language"
    place: ClassVar[Place] = Place.LANGUAGE_MODEL


@dataclass
class LastTokens(OneStage):
    """Inside the language model: the last tokens of a prompt's images stay."""

    method: ClassVar[str] = "throw-away-last"
    layer: int | None = 1

    def choose(self, signals: PromptSignals, kept: int) -> PromptSelection:
        """The last ones."""
        return PromptSelection(torch.arange(signals.count - kept, signals.count))


METHODS = (LongestFeatures, MostAttended, MostReceived)


def stock_selection(model, method, images: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(images, kept, D) features and the sizes of their tokens, worked out on the stock model, image by image."""
    config, owner = model.config, model.model
    states = owner.vision_tower(images, output_hidden_states=True, output_attentions=True)
    tokens = states.hidden_states[config.vision_feature_layer]
    read = range(len(states.attentions))[config.vision_feature_layer]
    attention = states.attentions[read].float().mean(dim=1)
    prefix = tokens.shape[1] - 16
    if isinstance(method, LongestFeatures):
        features = owner.multi_modal_projector(tokens[:, prefix:])
        order = features.norm(dim=-1).topk(kept, dim=-1).indices.sort(dim=-1).values
        picked = torch.stack([image[index] for image, index in zip(features, order, strict=True)])
        return picked, torch.ones(picked.shape[:2])
    received = attention[:, 0] if isinstance(method, MostAttended) else attention.mean(dim=1)
    order = prefix + received[:, prefix:].topk(kept, dim=-1).indices.sort(dim=-1).values
    chosen, sizes = [], []
    for image, index in enumerate(order):
        rows, count = tokens[image, index].clone(), torch.ones(kept)
        if isinstance(method, MostAttended):
            keys = key_states(owner, read, states.hidden_states[read][image : image + 1])[0]
            nearest = torch.nn.functional.normalize(keys, dim=-1) @ torch.nn.functional.normalize(keys[index], dim=-1).T
            members = [[int(one)] for one in index]
            for token in range(prefix, tokens.shape[1]):
                if token not in index:
                    members[int(nearest[token].argmax())].append(token)
            rows = torch.stack([tokens[image, member].mean(dim=0) for member in members])
            count = torch.tensor([float(len(member)) for member in members])
        chosen.append(rows)
        sizes.append(count)
    return owner.multi_modal_projector(torch.stack(chosen)), torch.stack(sizes)


def key_states(owner, layer: int, hidden: Tensor) -> Tensor:
    """(B, T, D) keys of a layer added up over its heads."""
    one = owner.vision_tower.encoder.layers[layer]
    keys = one.self_attn.k_proj(one.layer_norm1(hidden))
    return keys.unflatten(-1, (one.self_attn.num_heads, -1)).sum(dim=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [1, 3, 15])
@torch.no_grad()
def test_what_stays_is_what_the_method_says(method, kept) -> None:
    """Far below half of the tokens too, which no layer could do at once."""
    stock = tiny_llava("clip", attention="eager")
    images = pixels(stock, 3)
    expected, sizes = stock_selection(stock, method(), images, kept)
    model = accelerate_mllm(tiny_llava("clip"), method(visual_tokens=kept))
    output = model.model.get_image_features(images, return_dict=True)
    found = torch.stack(list(output.pooler_output))
    assert found.shape == (3, kept, expected.shape[-1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.stack(sizes_of_features(output)), sizes)
    assert (kept_cells(output) is not None) == (method is LongestFeatures)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_generate_is_that_of_a_prompt_compacted_by_hand(method, tower) -> None:
    if tower == "siglip" and method.needs_class_attention:
        pytest.skip("its tower has no class token")
    model = accelerate_mllm(tiny_llava(tower), method(visual_tokens=5))
    batch = prompt_batch(model, (2, 0, 1))
    expected = Oracle(tiny_llava(tower)).new_tokens(model, batch, **GREEDY)
    found = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    assert [row[: len(new)] for row, new in zip(found, expected, strict=True)] == expected
    logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_restored_bit_for_bit_and_one_is_the_untouched_model(method) -> None:
    model = tiny_llava("clip")
    before = fingerprint(model)
    accelerate_mllm(model, method(visual_tokens=4))
    assert not torch.equal(fingerprint(model)["logits"], before["logits"])
    accelerate_mllm(model, method(keep_ratio=1.0))
    assert_identical(fingerprint(model), before, but=("attributes",))
    assert_identical(fingerprint(restore_mllm(model)), before)


def test_schedules_have_one_step() -> None:
    geometry = TowerGeometry(patches=16, prefix=1, layers=4, read=3)
    behind = make_schedule(LongestFeatures(visual_tokens=2), geometry)
    assert (behind.removals, behind.tokens, behind.placeholders, behind.features) == ((14,), (16, 2), 16, 2)
    assert make_schedule(LongestFeatures(visual_tokens=2), MergeGeometry(16)) == behind
    assert make_schedule(LongestFeatures(keep_ratio=1.0), geometry).removals == ()
    output = make_schedule(MostAttended(visual_tokens=2), geometry)
    assert (output.removals, output.tokens) == ((0, 0, 14, 0), (17, 17, 17, 3, 3))
    assert (output.placeholders, output.features, output.cross) == (16, 2, False)
    for dial in ({"r": 2}, {"merge_every": 2}):
        for method in (LongestFeatures, MostAttended):
            with pytest.raises(ValueError, match="counts"):
                make_schedule(method(**dial), geometry)
    kept = TowerGeometry(patches=16, prefix=1, layers=4, read=3, drops_prefix=False)
    assert make_schedule(MostAttended(visual_tokens=2), kept).tokens[-1] == 2
    with pytest.raises(ValueError, match="visual_tokens>=2"):
        make_schedule(MostAttended(visual_tokens=1), kept)


@torch.no_grad()
def test_traces_tell_of_every_layer_and_of_the_step() -> None:
    model = accelerate_mllm(tiny_llava("clip"), MostAttended(visual_tokens=5))
    images, schedule = pixels(model, 2), handle_of(model).schedule
    counts = tokens_per_layer(model, images)
    assert counts.tolist() == [list(schedule.tokens)] * 2
    groups = merged_groups(model, images)
    assert groups.shape == (2, 16)
    assert all(len(set(row.tolist())) == 5 for row in groups)
    accelerate_mllm(model, method="fastervlm", visual_tokens=5)
    dropped = merged_groups(model, images)
    assert (dropped < 0).sum(dim=1).tolist() == [11, 11], "they belong to no group"
    accelerate_mllm(model, LongestFeatures(visual_tokens=5))
    with trace_merges(model) as trace:
        model.model.get_image_features(images)
    assert [len(one.match.src[0]) for one in trace] == [11]
    assert tokens_per_layer(model, images).tolist() == [[16, 5]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_tower_with_and_without_checkpointing(method) -> None:
    """The same ones; what decides has none."""
    found = []
    for checkpoints in (False, True):
        model = accelerate_mllm(tiny_llava("clip"), method(visual_tokens=5)).train()
        if checkpoints:
            checkpoint_activations(model, reentrant=False)
        batch = prompt_batch(model, (1, 1))
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        tower = model.model.vision_tower
        found.append(tower.embeddings.patch_embedding.weight.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_reused_images_say_their_sizes_too(method) -> None:
    model = accelerate_mllm(tiny_llava("clip"), method(visual_tokens=5), reuse_vision=True)
    images = pixels(model, 2)
    first, again = (model.model.get_image_features(images, return_dict=True) for _ in range(2))
    assert reuse_vision(model).hits == 2
    assert torch.equal(torch.stack(sizes_of_features(again)), torch.stack(sizes_of_features(first)))


@pytest.mark.parametrize("method", ["crossget", "tome", "random"])
@torch.no_grad()
def test_merging_behind_a_projector_says_its_sizes(method) -> None:
    case = next(case for case in all_cases() if case.model_type == "gemma3")
    model = accelerate_mllm(case.build("sdpa"), method=method, keep_ratio=0.5)
    output = model.model.get_image_features(case.batch(model)["pixel_values"], return_dict=True)
    cells = model.config.mm_tokens_per_image
    for image, size in zip(output.pooler_output, sizes_of_features(output), strict=True):
        assert len(image) == len(size)
        assert size.sum() == cells


def test_flops_count_one_step_and_a_whole_tower() -> None:
    config = tiny_llava("clip").config
    untouched = model_flops(config, LongestFeatures(keep_ratio=1.0))
    inside = model_flops(config, CrossGetConfig(visual_tokens=5))
    for method in METHODS:
        reduced = model_flops(config, method(visual_tokens=5))
        assert reduced.prefill == model_flops(config, LongestFeatures(visual_tokens=5)).prefill < untouched.prefill
        assert inside.encoder < reduced.encoder <= untouched.encoder
        assert reduced.patch_embedding == untouched.patch_embedding
    assert model_flops(config, LongestFeatures(visual_tokens=5)).encoder == untouched.encoder
    assert model_flops(config, LongestFeatures(visual_tokens=5)).projector == untouched.projector
    assert model_flops(config, MostAttended(visual_tokens=5)).projector < untouched.projector
    assert inspection(config, LongestFeatures(visual_tokens=5))["visual_tokens"] == {"before": 16, "after": 5}


SERVED = {
    Place.PROJECTOR: {
        "aya_vision", "cohere2_vision", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "gemma3", "gemma4",
        "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "idefics3", "internvl", "janus", "lfm2_vl", "lighton_ocr",
        "llava", "llava:several feature layers", "minicpmv4_6", "mistral3", "ovis2", "paddleocr_vl", "paligemma",
        "perception_lm", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
        "vipllava",
    },
    Place.TOWER_OUTPUT: {
        "blip", "blip-2", "blip-2:projection", "blip-2:retrieval", "blip:questions", "blip:retrieval",
        "clip_vision_model", "clip_vision_model:projection", "deepseek_vl", "instructblip", "instructblipvideo",
        "janus", "llava", "paligemma", "siglip_vision_model",
    },
    Place.LANGUAGE_MODEL: {
        "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "idefics3",
        "internvl", "janus", "lighton_ocr", "llava", "llava:several feature layers", "llava_next_video",
        "llava_onevision", "ovis2", "paddleocr_vl", "paligemma", "perception_lm", "qwen2_5_vl", "qwen2_vl", "smolvlm",
        "video_llava", "vipllava",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "case"),
    [  # the two kinds of selection at the tower's output in turns
        pytest.param(method, case, marks=rest_unless(number in (0, place % 2 + 1)), id=f"{case.name}-{number}")
        for place, case in enumerate(all_cases())
        for number, method in enumerate(METHODS)
    ],
)
@torch.no_grad()
def test_a_family_serves_the_place_or_says_why_not(method, case) -> None:
    """Refused before anything is changed; served with finite answers, and put back."""
    model, settings = case.build("sdpa"), method(keep_ratio=0.5)
    classes = [type(module) for module in model.modules()]
    family = families()[case.model_type]
    has_class_token = getattr(family.geometry(model.config), "prefix", 0) > 0
    if case.model_type in SERVED[method.place] and (has_class_token or not method.needs_class_attention):
        accelerate_mllm(model, settings)
        answers = case.answers(model, case.batch(model))
        assert all(torch.isfinite(found).all() for found in answers)
        restore_mllm(model)
    else:
        with pytest.raises(ValueError, match="which is not possible"):
            accelerate_mllm(model, settings)
    assert handle_of(model) is None
    assert classes == [type(module) for module in model.modules()]


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
@torch.no_grad()
def test_a_family_serves_the_language_model_or_says_why_not(case) -> None:
    """Refused before anything is changed; or with rows in a batch as alone, the same answers with and without a cache,
    and put back."""
    model = case.build("sdpa")
    classes = [type(module) for module in model.modules()]
    is_served = case.model_type in SERVED[Place.LANGUAGE_MODEL] and case.name != "paligemma-gemma2"
    if is_served:
        batch = case.batch(model)
        before = case.answers(model, batch)
        accelerate_mllm(model, LastTokens(keep_ratio=0.4))
        together = case.answers(model, batch)
        for index, row in enumerate(together):
            torch.testing.assert_close(case.answers(model, case.row(batch, index))[0], row, atol=1e-4, rtol=1e-4)
        assert any(not torch.equal(*pair) for pair in zip(together, before, strict=True))
        if case.generates and ENCODES_IMAGES_FIRST:
            assert torch.equal(*(model.generate(**batch, **GREEDY, use_cache=cached) for cached in (True, False)))
        restore_mllm(model)
        assert all(torch.equal(*pair) for pair in zip(case.answers(model, batch), before, strict=True))
    else:
        with pytest.raises(ValueError, match="which is not possible"):
            accelerate_mllm(model, LastTokens(keep_ratio=0.4))
    assert handle_of(model) is None
    assert classes == [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        (InLanguageModel, {}, "does not say where tokens leave"),
        (MostAttended, {"text_keep_ratio": 0.5}, "text tower's layers alone"),
    ],
)
def test_refused_with_a_reason(method, settings, reason) -> None:
    model = tiny_llava("clip")
    with pytest.raises(ValueError, match=reason):
        accelerate_mllm(model, method(**settings))
    assert handle_of(model) is None


def test_a_tower_without_class_token_refuses_its_attention() -> None:
    with pytest.raises(ValueError, match="has no class token"):
        accelerate_mllm(tiny_llava("siglip"), MostAttended(visual_tokens=4))


def test_a_selection_keeps_protected_tokens_and_their_order() -> None:
    keys = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    signals = Signals(keys, None, (0,), class_attention=torch.tensor([[9.0, 1, 5, 2, 4, 3]]).expand(2, -1))
    match = MostAttended(visual_tokens=1).match(signals, 3)
    assert match.kept.tolist() == [[0, 2, 4]] * 2
    assert not match.pruned
    merged, size = merge(keys, torch.ones(2, 6), match)
    assert merged.shape == (2, 3, 4)
    assert torch.equal(merged[:, 0], keys[:, 0])  # a protected token takes in no other
    assert size.sum(dim=1).tolist() == [6.0, 6.0]
