"""Methods of others, on a few families: laws that hold for all of them, and which family refuses which."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mllm_crossget import accelerate_mllm, restore_mllm, reuse_vision
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.families.family import families
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.methods import Method, Place, SelectionMethod, Signals
from mllm_crossget.methods.signals import AskedText, NextLayer
from mllm_crossget.ops import merge
from mllm_crossget.support import place_problem
from tests.helpers.families.cases import all_cases
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.methods import RIVALS
from tests.helpers.tiny import pixels, prompt_batch, tiny_llava

GREEDY = {"max_new_tokens": 4, "do_sample": False}
CASES = [case for case in all_cases() if case.name in ("llava-clip", "llava-siglip", "gemma3", "qwen2_5_vl")]
ASKING = [name for name in RIVALS if method_class(name).needs_text]
INSIDE = [name for name in RIVALS if method_class(name).place is Place.LANGUAGE_MODEL]
MERGING = [name for name in RIVALS if not method_class(name)().prunes]


def pairs() -> list[Any]:
    """Every rival on every family that can serve it."""
    found = []
    for case in CASES:
        model = case.build("sdpa")
        for name in RIVALS:
            if place_problem(method_class(name)(), families()[case.model_type], model) is None:
                found.append(pytest.param(name, case, id=f"{case.name}-{name}"))
    return found


PAIRS = pairs()


def reached(method: str, kept: int) -> int:
    """As many tokens as an average over three layers can have, the first of which has all 16."""
    return max(kept, 6) if method in ("pyramiddrop", "sparsevlm") else kept


def test_every_rival_is_served_by_two_families() -> None:
    served = [one.values[0] for one in PAIRS]
    assert set(served) == set(RIVALS)
    assert len(RIVALS) >= 16
    assert all(served.count(name) >= 2 for name in RIVALS)


@pytest.mark.parametrize(("method", "case"), PAIRS)
@torch.no_grad()
def test_a_row_in_a_batch_equals_the_row_alone_and_one_is_the_identity(method, case) -> None:
    """With eager attention; fused kernels must say the same."""
    model = case.build("eager")
    batch = case.batch(model)
    before = case.answers(model, batch)
    accelerate_mllm(model, method=method, keep_ratio=1)
    assert all(torch.equal(a, b) for a, b in zip(case.answers(model, batch), before, strict=True))
    accelerate_mllm(model, method=method, **case.dial)
    together = case.answers(model, batch)
    assert any(not torch.equal(a, b) for a, b in zip(together, before, strict=True))
    fused = case.answers(accelerate_mllm(case.build("sdpa"), method=method, **case.dial), batch)
    for index, row in enumerate(together):
        (alone,) = case.answers(model, case.row(batch, index))
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused[index], row, atol=1e-4, rtol=1e-4)
    restore_mllm(model)
    assert all(torch.equal(a, b) for a, b in zip(case.answers(model, batch), before, strict=True))
    assert not [name for module in model.modules() for name in vars(module) if "crossget" in name]


@pytest.mark.parametrize(("method", "case"), [pair for pair in PAIRS if pair.values[1].name.startswith("llava")])
@torch.no_grad()
def test_generate_equals_prompts_compacted_by_hand(method, case) -> None:
    positions = "original" if case.name == "llava-clip" or method in INSIDE else "contiguous"
    model = accelerate_mllm(case.build("sdpa"), method=method, positions=positions, **case.dial)
    batch = case.batch(model)
    prompt = batch["input_ids"].shape[1]
    found = model.generate(**batch, **GREEDY)[:, prompt:].tolist()
    if method not in ASKING and method not in INSIDE:  # by hand nobody asks
        expected = case.expected(case.build("sdpa"), model, batch, **GREEDY)
        assert [row[: len(new)] for row, new in zip(found, expected, strict=True)] == expected
        return
    for index, row in enumerate(found):
        alone = case.row(batch, index)
        (new,) = model.generate(**alone, **GREEDY)[:, alone["input_ids"].shape[1] :].tolist()
        assert row[: len(new)] == new


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("kept", [1, 5, 15])
@torch.no_grad()
def test_any_number_of_tokens_and_every_patch_counted_once(method, kept) -> None:
    """Sizes add up to the patches where tokens merge, and are 1 where they are dropped."""
    kind = method_class(method)
    if kind.place is Place.TOWER_LAYERS and kept == 1:
        kept = 3  # a layer removes at most half
    kept = reached(method, kept)
    model = accelerate_mllm(tiny_llava("clip"), kind(visual_tokens=kept))
    batch = prompt_batch(model, (1, 2))
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    if method in ASKING or method in INSIDE:
        return
    output = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    for image, group in zip(output.pooler_output, groups_of(output), strict=True):
        assert image.shape[0] == group.size.shape[0] == kept
        assert group.size.sum() == (kept if kind().prunes else 16)


@pytest.mark.parametrize("method", MERGING)
def test_sizes_weigh_in_the_language_model_where_tokens_merge(method) -> None:
    assert method_class(method)().weighs_sizes
    assert not method_class(method).published().weighs_sizes
    answers = []
    for size_bias in (True, False):
        kept = 10 if method == "sparsevlm" else 4  # on average: with fewer nothing is recycled
        settings = {"visual_tokens": kept, "size_bias": size_bias}
        model = accelerate_mllm(tiny_llava("clip"), method=method, **settings)
        with torch.no_grad():
            answers.append(model(**prompt_batch(model, (1, 1))).logits)
    assert not torch.equal(*answers)


@pytest.mark.parametrize("method", [name for name in RIVALS if method_class(name).place is not Place.TOWER_LAYERS])
def test_gradients_reach_the_tower_and_do_not_depend_on_checkpoints(method) -> None:
    found = []
    for checkpoints in (False, True):
        model = accelerate_mllm(tiny_llava("clip"), method=method, visual_tokens=reached(method, 5)).train()
        if checkpoints:
            checkpoint_activations(model, reentrant=False)
        batch = prompt_batch(model, (1, 1))
        labels = batch["input_ids"].clone()
        labels[:, :-3] = -100
        loss = model(**batch, labels=labels, use_cache=False).loss
        if checkpoints and method_class(method).needs_middle:
            with pytest.raises(RuntimeError, match="gradient checkpointing replays"):
                loss.backward()
            return
        loss.backward()
        found.append(model.model.vision_tower.embeddings.patch_embedding.weight.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0])


def test_flops_of_every_rival_are_fewer_than_the_untouched_models() -> None:
    for tower in ("clip", "siglip"):
        config = tiny_llava(tower, image_size=14 * 12, text_layers=6, text_width=64).config
        full = model_flops(config, method_class("crossget")(keep_ratio=1.0))
        for name in RIVALS:
            reduced = model_flops(config, method_class(name)(keep_ratio=0.25))
            assert reduced.prefill < full.prefill
            assert reduced.encoder <= full.encoder
            if method_class(name).needs_salience:
                assert reduced.reducer > 0


# What the methods are told


SEEN: list[Signals] = []


@dataclass
class Curious(SelectionMethod):
    """Notes down what it is told."""

    method: ClassVar[str] = "throw-away-curious"
    needs_salience: ClassVar[bool] = True
    needs_middle: ClassVar[bool] = True
    needs_next_layer: ClassVar[bool] = True
    needs_importance: ClassVar[bool] = True

    def select(self, signals: Signals, kept: int) -> Tensor:
        """The first ones."""
        SEEN.append(signals)
        first = len(signals.protected)
        return torch.arange(first, first + kept).expand(len(signals.keys), -1)


@dataclass
class Asking(SelectionMethod):
    """The same behind the projector."""

    method: ClassVar[str] = "throw-away-asking"
    place: ClassVar[Place] = Place.PROJECTOR
    needs_text: ClassVar[bool] = True
    needs_salience: ClassVar[bool] = True

    def select(self, signals: Signals, kept: int) -> Tensor:
        """The first ones."""
        SEEN.append(signals)
        return torch.arange(kept).expand(len(signals.keys), -1)


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_signals_are_those_of_the_stock_model(tower, attention) -> None:
    stock = tiny_llava(tower, attention="eager", layers=5)
    images = pixels(stock, 2)
    states = stock.model.vision_tower(images, output_hidden_states=True, output_attentions=True)
    read = range(5)[stock.config.vision_feature_layer]
    maps = [one.float().mean(dim=1) for one in states.attentions]
    model = accelerate_mllm(tiny_llava(tower, attention=attention, layers=5), Curious(visual_tokens=4))
    model.model.get_image_features(images)
    (seen,) = SEEN
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(seen.importance, maps[read].mean(dim=1), **close)
    torch.testing.assert_close(seen.middle, maps[read // 2].mean(dim=1), **close)
    salience = maps[read][:, 0] if tower == "clip" else maps[read].mean(dim=1)
    torch.testing.assert_close(seen.salience, salience, **close)
    layers = stock.model.vision_tower.encoder.layers
    behind = min(read + 1, 4)
    hidden = layers[behind].layer_norm1(states.hidden_states[behind])
    query, keys = layers[behind].self_attn.q_proj(hidden), layers[behind].self_attn.k_proj(hidden)
    asks = query[:, 0] if tower == "clip" else query.mean(dim=1)
    expected = ((keys @ asks[..., None])[..., 0] / 32**0.5).softmax(dim=1)
    torch.testing.assert_close(seen.following.keys, keys, **close)
    torch.testing.assert_close(seen.following.attention, expected, **close)
    SEEN.clear()
    model = accelerate_mllm(tiny_llava(tower, attention=attention, layers=5), Asking(visual_tokens=4))
    model(**prompt_batch(model, (1, 1)))
    assert SEEN[0].salience.shape == (2, 16)
    batch_maps = stock.model.vision_tower(
        prompt_batch(model, (1, 1))["pixel_values"], output_attentions=True
    ).attentions[read].float().mean(dim=1)  # fmt: skip
    expected = batch_maps[:, 0, 1:] if tower == "clip" else batch_maps.mean(dim=1)
    torch.testing.assert_close(SEEN[0].salience, expected, **close)


def asked_about(model: Any) -> list[Tensor]:
    """(words, D) embeddings of what was asked about each image."""
    return [words[alive] for seen in SEEN for words, alive in zip(seen.text.embeddings, seen.text.alive, strict=True)]


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("way", ["forward", "generate", "beams", "headless"])
@torch.no_grad()
def test_what_follows_an_image_is_what_is_asked_about_it(way, positions) -> None:
    model = accelerate_mllm(tiny_llava("clip"), Asking(visual_tokens=4, positions=positions))
    batch = prompt_batch(model, (2, 0, 1))
    expected = []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        real = [(token, token == 99) for token, is_real in zip(ids, mask, strict=True) if is_real]
        seen = 0
        for place, (_, is_image) in enumerate(real):
            seen += is_image
            if is_image and seen % 16 == 0:
                words = [token for token, picture in real[place + 1 :] if not picture]
                expected.append(model.get_input_embeddings()(torch.tensor(words)))
    call = {
        "forward": lambda: model(**batch),
        "headless": lambda: model.model(**batch),
        "generate": lambda: model.generate(**batch, **GREEDY),
        "beams": lambda: model.generate(**batch, **GREEDY, num_beams=2),
    }[way]
    call()
    found = asked_about(model)
    assert len(expected) == 3
    assert len(found) >= 3
    for words, right in zip(found[:3], expected, strict=True):
        assert torch.equal(words, right)


@torch.no_grad()
def test_a_question_in_front_of_the_image_and_answers_to_be_learned() -> None:
    model = accelerate_mllm(tiny_llava("clip"), Asking(visual_tokens=4))
    images = pixels(model, 1)
    embed = model.get_input_embeddings()
    model(input_ids=torch.tensor([[1, 7, 8, *[99] * 16]]), pixel_values=images)
    ids = torch.tensor([[1, 7, *[99] * 16, 8, 9, 10]])
    model(input_ids=ids, pixel_values=images, labels=torch.where(ids > 8, ids, -100).masked_fill(ids == 99, -100))
    in_front, learned = asked_about(model)
    assert torch.equal(in_front, embed(torch.tensor([1, 7, 8])))
    assert torch.equal(learned, embed(torch.tensor([8])))


@pytest.mark.parametrize("method", ASKING)
@torch.no_grad()
def test_another_question_selects_other_tokens(method) -> None:
    model = accelerate_mllm(tiny_llava("clip"), method=method, visual_tokens=4)
    images = pixels(model, 1)
    kept = []
    for word in (7, 40, 60):
        ids = torch.tensor([[1, *[99] * 16, word, word, word]])
        output = model(input_ids=ids, pixel_values=images, use_cache=True)
        kept.append(tuple(output.past_key_values.layers[0].keys.flatten().tolist()[:200]))
    assert len(set(kept)) > 1


def test_who_selects_by_the_question_keeps_no_images_and_wants_a_prompt() -> None:
    model = tiny_llava("clip")
    with pytest.raises(ValueError, match="depend on the question"):
        accelerate_mllm(model, method="cdpruner", reuse_vision=True)
    accelerate_mllm(model, method="divprune", reuse_vision=True)
    with pytest.raises(ValueError, match="depend on the question"):
        accelerate_mllm(model, method="cdpruner")
    accelerate_mllm(model, method="cdpruner", reuse_vision=False)
    with pytest.raises(ValueError, match="depend on the question"):
        reuse_vision(model)
    with pytest.raises(ValueError, match="came without one: call forward or generate"):
        model.model.get_image_features(pixels(model, 1))


def test_refused_where_the_tower_cannot_tell() -> None:
    gemma = next(case for case in CASES if case.name == "gemma3").build("sdpa")
    with pytest.raises(ValueError, match="no single tokens of its tower"):
        accelerate_mllm(gemma, method="holov")
    with pytest.raises(ValueError, match="does not reduce texts"):
        method_class("pitome")(text_keep_ratio=0.5)


@dataclass
class InLayers(Method):
    """Wants inside a layer what no layer knows."""

    method: ClassVar[str] = "throw-away-in-layers"
    needs_salience: ClassVar[bool] = True


def test_inside_layers_nobody_knows_of_other_layers() -> None:
    with pytest.raises(ValueError, match="inside layers there are keys and importance"):
        accelerate_mllm(tiny_llava("clip"), InLayers())


@pytest.mark.parametrize("method", [name for name in RIVALS if name not in INSIDE])
@torch.no_grad()
def test_protected_tokens_stay_and_nothing_depends_on_the_batch(method) -> None:
    kind = method_class(method)
    torch.manual_seed(0)
    batch, tokens, first = 3, 17, 0 if kind.place is Place.PROJECTOR else 1
    keys = torch.nn.functional.normalize(torch.randn(batch, tokens, 8), dim=-1)
    values = torch.randn(batch, tokens, 5)
    signals = Signals(keys, torch.rand(batch, tokens), tuple(range(first)), features=torch.randn(batch, tokens, 6))
    signals.salience, signals.middle = torch.rand(batch, tokens), torch.rand(batch, tokens)
    signals.following = signals_following(batch, tokens)
    signals.text = signals_text(batch)
    match = kind().match(signals, 8)
    made, size = merge(values, torch.ones(batch, tokens), match)
    assert made.shape == (batch, tokens - 8, 5)
    assert torch.equal(match.kept[:, :first], torch.arange(first).expand(batch, -1))
    assert torch.equal(made[:, :first], values[:, :first])
    together = torch.cat([match.src, match.kept], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(tokens).expand(batch, -1))
    assert torch.equal(match.slot.gather(1, match.kept), torch.arange(tokens - 8).expand(batch, -1))
    assert torch.equal(match.slot.gather(1, match.src), match.slot.gather(1, match.dst))
    assert torch.equal(size.sum(dim=1), torch.full((batch,), tokens - 8.0 if match.pruned else float(tokens)))
    for row in range(batch):
        alone = kind().match(row_of(signals, row), 8)
        assert torch.equal(alone.slot, match.slot[row : row + 1])
        torch.testing.assert_close(merge(values[row : row + 1], torch.ones(1, tokens), alone)[0], made[row : row + 1])


def signals_following(batch: int, tokens: int) -> Any:
    return NextLayer(torch.rand(batch, tokens), torch.randn(batch, tokens, 12))


def signals_text(batch: int) -> Any:
    return AskedText(torch.randn(batch, 4, 8), torch.tensor([[True, True, True, False]] * batch))


def row_of(signals: Signals, row: int) -> Signals:
    def one(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[row : row + 1]

    return Signals(
        one(signals.keys),
        one(signals.importance),
        signals.protected,
        features=one(signals.features),
        salience=one(signals.salience),
        middle=one(signals.middle),
        following=NextLayer(one(signals.following.attention), one(signals.following.keys)),
        text=AskedText(one(signals.text.embeddings), one(signals.text.alive)),
    )


@pytest.mark.parametrize("method", ["hiprune", "prumerge", "holov", "cdpruner"])
@torch.no_grad()
def test_copies_compute_the_same_and_listen_to_their_own_layers(method) -> None:
    model = accelerate_mllm(tiny_llava("clip"), method=method, visual_tokens=5)
    batch = prompt_batch(model, (1, 1))
    expected = model(**batch).logits
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    restore_mllm(model)
    for other in (copied, unpickled):
        assert torch.equal(other(**batch).logits, expected)
        restore_mllm(other)
        assert torch.equal(other(**batch).logits, model(**batch).logits)
