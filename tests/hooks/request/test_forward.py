"""``forward`` with labels: loss and logits of padded batches equal those of rows compacted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import accelerate_mllm
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.llava import CASES, FEATURES, accelerated_pair, labels_of
from tests.helpers.methods import FIXED
from tests.helpers.oracle import Row
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava


def compact_loss(pairs: list[tuple[Row, Tensor]], labels: Tensor) -> Tensor:
    """Mean over all scored tokens of the batch, from one unpadded row at a time."""
    losses = []
    for index, (row, logits) in enumerate(pairs):
        targets = labels[index, row.columns][1:]
        scored = targets != -100
        losses.append(nn.functional.cross_entropy(logits[:-1][scored], targets[scored], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "tower"), CASES)
def test_loss_and_logits(method, tower, side) -> None:
    model, oracle = accelerated_pair(method, tower)
    batch = prompt_batch(model, (2, 0, 1), padding_side=side)
    labels = labels_of(model, batch)
    output = model(**batch, labels=labels)
    pairs = oracle.logits(model, batch)
    torch.testing.assert_close(output.loss, compact_loss(pairs, labels), atol=1e-5, rtol=1e-5)
    assert output.logits.shape[:2] == batch["input_ids"].shape
    for index, (row, logits) in enumerate(pairs):
        torch.testing.assert_close(output.logits[index, row.columns], logits, atol=1e-4, rtol=1e-4)
        others = sorted(set(range(output.logits.shape[1])) - set(row.columns))
        assert not output.logits[index, others].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_can_be_computed_again_from_logits_and_the_users_labels(side) -> None:
    """What evaluation loops and log-likelihood scoring do: every scored token has the logits in front of it."""
    model, _ = accelerated_pair()
    batch = prompt_batch(model, (2, 0, 1), padding_side=side)
    labels = labels_of(model, batch)
    output = model(**batch, labels=labels)
    again = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, again, atol=1e-5, rtol=1e-5)


def test_learned_cross_tokens_shift_the_first_real_token() -> None:
    model, oracle = accelerated_pair()
    randomise_cross_tokens(model)
    batch = prompt_batch(model, (2, 0, 1))
    unguided = oracle.logits(model, batch)
    oracle.guide(model.model.language_model.cross_tokens.weight)
    for index, (row, logits) in enumerate(oracle.logits(model, batch)):
        ours = model(**batch).logits[index, row.columns]
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours, unguided[index][1], atol=1e-2)


def test_rows_without_images_at_all() -> None:
    model, oracle = accelerated_pair()
    batch = prompt_batch(model, (0, 0), padding_side="right")
    labels = labels_of(model, batch)
    output = model(**batch, labels=labels)
    pairs = oracle.logits(model, batch)
    torch.testing.assert_close(output.loss, compact_loss(pairs, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([-1]), torch.tensor([3, 20, 31])], ids=str)
def test_logits_to_keep_counts_the_users_columns(keep, side) -> None:
    model, _ = accelerated_pair()
    batch = prompt_batch(model, (2, 0, 1), padding_side=side)
    whole = model(**batch).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, expected)


@pytest.mark.parametrize("with_labels", [False, True])
def test_tuples_hold_what_the_dictionary_holds(with_labels) -> None:
    model, _ = accelerated_pair()
    batch = prompt_batch(model, (2, 0, 1))
    extra = {"labels": labels_of(model, batch)} if with_labels else {}
    named = model(**batch, **extra, use_cache=False)
    plain = model(**batch, **extra, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple)
    expected = named.to_tuple()
    assert torch.equal(plain[0], expected[0])
    if with_labels:
        assert torch.equal(plain[1], expected[1])


def test_tuples_in_training() -> None:
    model, _ = accelerated_pair()
    batch = prompt_batch(model, (2, 0, 1))
    model.train()
    loss, logits, *_ = model(**batch, labels=labels_of(model, batch), return_dict=False)
    assert loss.ndim == 0
    assert logits.shape[:2] == batch["input_ids"].shape


def test_arguments_by_position() -> None:
    model, _ = accelerated_pair()
    batch = prompt_batch(model, (2, 0, 1))
    by_position = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    assert torch.equal(by_position.logits, model(**batch).logits)


def test_one_row_without_a_mask() -> None:
    model, oracle = accelerated_pair()
    batch = prompt_batch(model, (2,))
    output = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    row, logits = oracle.logits(model, batch)[0]
    torch.testing.assert_close(output.logits[0, row.columns], logits, atol=1e-4, rtol=1e-4)


def test_position_ids_of_the_full_prompt() -> None:
    model, oracle = accelerated_pair()
    batch = prompt_batch(model, (2, 0, 1))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = model(**batch, position_ids=positions)
    for index, (row, logits) in enumerate(oracle.logits(model, batch)):
        torch.testing.assert_close(output.logits[index, row.columns], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "tower"), [case for case in CASES if case[0] in FIXED])
def test_hidden_states_and_attentions_have_the_schedules_lengths(method, tower) -> None:
    model, oracle = accelerated_pair(method, tower, attention="eager")
    batch = prompt_batch(model, (2, 0, 1))
    compact = max(len(row.ids) for row in oracle.rows(model, batch))
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [states.shape[1] for states in output.hidden_states] == [compact] * 4
    assert [weights.shape[-2:] for weights in output.attentions] == [(compact, compact)] * 3
    vision = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    tokens = list(model.__dict__["_mllm_crossget"].schedule.tokens)
    start = model.config.image_seq_length + (tower == "clip")  # the first entry is what the embeddings made
    assert [states.shape[1] for states in vision.hidden_states][1:] == tokens[1:]
    assert vision.hidden_states[0].shape[1] in (start, start + 1)
    assert [weights.shape[-1] for weights in vision.attentions] == tokens[:-1]
    assert not torch.isnan(torch.stack([weights.sum() for weights in vision.attentions])).any()


def test_feature_layer_is_the_hidden_state_of_that_layer() -> None:
    """Without a selection at the output, which averages features behind the projector."""
    model = accelerate_mllm(tiny_llava(), visual_tokens=FEATURES, schedule="late")
    batch = prompt_batch(model, (1,))
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
    expected = model.model.multi_modal_projector(states[:, 1:-1])  # without class token and cross token
    features = model.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), expected)
    assert expected.shape[1] == FEATURES


@torch.no_grad()
def test_flex_attention_in_the_tower_is_refused_before_and_after() -> None:
    model = tiny_llava()
    pixels = prompt_batch(model)["pixel_values"]
    model.model.vision_tower.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"set_attn_implementation\(\"sdpa\"\) on the vision tower"):
        accelerate_mllm(model, keep_ratio=0.5)
    assert handle_of(model) is None
    model.model.vision_tower.set_attn_implementation("sdpa")
    accelerate_mllm(model, keep_ratio=0.5)
    model.model.vision_tower.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        model.model.vision_tower(pixels)


def cross_token_tower() -> tuple[nn.Module, nn.ModuleList, Tensor]:
    """A reduced model with cross tokens that are not zero, the layers of its tower, and pixels."""
    model, _ = accelerated_pair()
    randomise_cross_tokens(model)
    return model, model.model.vision_tower.encoder.layers, prompt_batch(model, (1,))["pixel_values"]


@torch.no_grad()
def test_what_a_layer_gave_stays_as_it_was() -> None:
    """The next layer writes its cross token into these tokens, and puts back what stood there."""
    model, layers, pixels = cross_token_tower()
    held, then = [], []

    def hold(_layer, _inputs, output):
        held.append(output[0])
        then.append(output[0].clone())

    for layer in layers:
        layer.register_forward_hook(hold)
    model.model.get_image_features(pixels)
    assert len(held) == len(layers)
    for now, before in zip(held, then, strict=True):
        assert torch.equal(now, before)


@torch.no_grad()
def test_what_a_layer_gave_stays_as_it_was_when_attention_fails() -> None:
    model, layers, pixels = cross_token_tower()
    given = []

    def hold(_layer, _inputs, output):
        given.extend([output[0], output[0].clone()])

    def fail(*_):
        raise MemoryError("no room")

    layers[0].register_forward_hook(hold)
    layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="no room"):
        model.model.get_image_features(pixels)
    assert torch.equal(*given)


def test_copied_and_lent_cross_tokens_give_the_same_features() -> None:
    """With gradients the tokens are copied for the cross token, without them its place is lent."""
    model, _, pixels = cross_token_tower()
    copied = model.model.get_image_features(pixels)
    with torch.no_grad():
        lent = model.model.get_image_features(pixels)
    torch.testing.assert_close(lent.pooler_output[0], copied.pooler_output[0], atol=1e-4, rtol=1e-4)
