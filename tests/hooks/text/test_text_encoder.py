"""BLIP's text encoder with fewer tokens: worked out row by row in plain loops, with stock modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import ToMeConfig, accelerate_mllm, load_crossget, restore_mllm, save_crossget, trace_merges
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.methods.method import Signals
from tests.helpers import reference
from tests.helpers.families.case_blip import embeddings, loss, matching, question_answers, ragged_batch
from tests.helpers.methods import FIXED
from tests.helpers.tiny import randomise_cross_tokens
from tests.helpers.tiny_blip import answer_ids, row_of, tiny_blip

TASKS = {"questions": question_answers, "retrieval": matching, "both towers": embeddings}
ENCODERS = {"questions": "text_encoder", "retrieval": "text_encoder", "both towers": "text_model"}
BEAMS = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}


def reduced(task: str = "questions", **settings: Any) -> nn.Module:
    model = accelerate_mllm(tiny_blip(task), **settings)
    randomise_cross_tokens(model)
    return model


def merged(model: nn.Module, row: Tensor, size: Tensor, keys: Tensor, guide: Tensor, removed: int) -> list[Tensor]:
    """One row after the method's merge: tokens and sizes."""
    method = handle_of(model).method
    if method.method == "crossget":
        importance = reference.cosine_importance(keys, guide)
        decision = reference.complete_graph_matching(keys, importance, removed, {0})
        weights = reference.pair_weights(importance, decision)
        return list(reference.ensemble_merge(row, size, decision, weights))
    keys, first = keys.unflatten(-1, (4, -1)).mean(dim=1), torch.arange(len(keys)) == 0
    match = method.match(Signals(keys[None], None, first[None], in_order=True), removed)
    decision = reference.Decision(*(part[0].tolist() for part in match[:3]))
    return list(reference.mean_merge(row, size, decision))


def by_hand(stock: nn.Module, model: nn.Module, ids: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T', D) states of one text without padding, and the sizes of its tokens.

    Args:
        stock: the text encoder, untouched.
        model: the accelerated model, for its counts and cross tokens.
        ids: (1, T).
        image: (1, V, D) what the encoder cross-attends to.
    """
    handle = handle_of(model)
    vectors = handle.cross_tokens["text"]() if "text" in handle.cross_paths else None
    row, size = stock.embeddings(ids)[0], torch.ones(ids.shape[1])
    for index, layer in enumerate(stock.encoder.layer):
        if vectors is not None:
            row = torch.cat([row[:1] + vectors[index], row[1:]])
        attention = layer.attention.self
        query, keys, value = attention.query(row), attention.key(row), attention.value(row)
        heads = []
        for one in range(4):
            part = slice(8 * one, 8 * one + 8)
            logits = query[:, part] @ keys[:, part].T / 8**0.5 + size.log()
            heads.append(logits.softmax(dim=-1) @ value[:, part])
        row = layer.attention.output(torch.cat(heads, dim=-1), row)
        removed = handle.text_tower.schedule(ids.shape[1]).removals[index]
        if removed:
            row, size = (part.float() for part in merged(model, row, size, keys, query[0], removed))
        if image is not None:
            row = layer.crossattention(row[None], encoder_hidden_states=image)[0][0]
        row = layer.feed_forward_chunk(row)
    return row, size


@pytest.mark.parametrize("dial", [{"text_r": 2}, {"keep_ratio": 0.5, "text_r": [3, 0, 2]}], ids=str)
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_every_row_is_what_plain_loops_make_of_it(task: str, method: str, dial: dict) -> None:
    model, stock = reduced(task, method=method, **dial), getattr(tiny_blip(task), ENCODERS[task])
    batch = ragged_batch(model)
    image = model.vision_model(batch["pixel_values"]).last_hidden_state
    given = {} if task == "both towers" else {"encoder_hidden_states": image}
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with trace_merges(model, tower="text") as trace:
        found = getattr(model, ENCODERS[task])(**texts, **given).last_hidden_state
    for index in range(3):
        row = row_of(batch, index)
        expected, size = by_hand(stock, model, row["input_ids"], image[index][None] if given else None)
        length = row["input_ids"].shape[1]
        own = trace[-1].source[index, :length]
        torch.testing.assert_close(found[index, :length], expected[own], atol=1e-4, rtol=1e-4)
        assert not found[index, length:].any()
        assert len(size) < length
        assert torch.equal(size, trace[-1].size[index, : len(size)])
        assert own[0] == 0
        assert size[0] == 1


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_the_decoder_reads_a_merged_token_as_often_as_it_has_tokens(method: str) -> None:
    """So it says what a stock decoder says of states that are written out."""
    model, stock = reduced(method=method, keep_ratio=0.5, text_r=3), tiny_blip("questions")
    batch = ragged_batch(model)
    with trace_merges(model) as trace:
        image = model.vision_model(batch["pixel_values"]).last_hidden_state
    logits, generated = question_answers(model, batch), model.generate(**batch, **BEAMS)
    for index in range(3):
        ids = row_of(batch, index)["input_ids"]
        patches = image[index].repeat_interleave(trace[-1].size[index].long(), dim=0)
        states, size = by_hand(stock.text_encoder, model, ids, patches[None])
        written_out = states.repeat_interleave(size.long(), dim=0)[None]
        assert written_out.shape[1] == ids.shape[1]
        expected = stock.text_decoder(input_ids=answer_ids(1), encoder_hidden_states=written_out).logits[0]
        torch.testing.assert_close(logits[index], expected, atol=1e-4, rtol=1e-4)
        start = torch.full((1, 1), stock.decoder_start_token_id)
        marks = {"eos_token_id": stock.config.text_config.sep_token_id, "pad_token_id": 0}
        answer = stock.text_decoder.generate(start, encoder_hidden_states=written_out, **marks, **BEAMS)[0]
        assert generated[index, : len(answer)].tolist() == answer.tolist()


@torch.no_grad()
def test_a_method_may_leave_sizes_out(monkeypatch) -> None:
    monkeypatch.setattr(ToMeConfig, "proportional_attention", False)
    model, stock = reduced(method="tome", text_r=[0, 0, 3]), tiny_blip("questions")
    batch = ragged_batch(model)
    image = model.vision_model(batch["pixel_values"]).last_hidden_state
    for index, logits in enumerate(question_answers(model, batch)):
        ids = row_of(batch, index)["input_ids"]
        states, size = by_hand(stock.text_encoder, model, ids, image[index][None])
        assert size.max() > 1
        expected = stock.text_decoder(input_ids=answer_ids(1), encoder_hidden_states=states[None]).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_with_nothing_to_remove_a_row_in_a_batch_is_the_stock_models_row_alone(task: str) -> None:
    """The stock decoder looks at a question's padding; behind a reduced encoder it does not."""
    stock = tiny_blip(task)
    batch = ragged_batch(stock)
    expected = [TASKS[task](stock, row_of(batch, index))[0] for index in range(3)]
    found = TASKS[task](reduced(task, method="tome", text_r=0), batch)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(task: str) -> None:
    model = reduced(task, text_keep_ratio=0.5)
    batch = ragged_batch(model)
    expected = TASKS[task](model, batch)
    wider = {**batch, **{n: nn.functional.pad(batch[n], (0, 3)) for n in ("input_ids", "attention_mask")}}
    wider["input_ids"] = wider["input_ids"].masked_fill(wider["attention_mask"] == 0, 7)
    for ours, theirs in zip(TASKS[task](model, wider), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    one = row_of(batch, 2)
    del one["attention_mask"]
    torch.testing.assert_close(TASKS[task](model, one)[0], expected[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_a_dial_reduces_its_own_tower_alone(method: str) -> None:
    model = tiny_blip("questions")
    batch = ragged_batch(model)

    def lengths() -> tuple[int, int]:
        seen: list[int] = []
        hook = model.text_decoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        output = model(**batch, decoder_input_ids=answer_ids(3))
        hook.remove()
        return output.image_embeds.shape[1], seen[0]

    assert lengths() == (17, 12)
    before = torch.cat(question_answers(model, batch))
    assert lengths() == (17, 12)
    accelerate_mllm(model, method=method, keep_ratio=0.5)
    assert lengths() == (8, 12)
    accelerate_mllm(model, method=method, text_keep_ratio=0.5)
    assert lengths() == (17, 6)
    accelerate_mllm(model, method=method, keep_ratio=0.5, text_keep_ratio=0.5)
    assert lengths() == (8, 6)
    assert torch.equal(torch.cat(question_answers(restore_mllm(model), batch)), before)


@pytest.mark.parametrize("task", TASKS)
def test_the_alignment_loss_reaches_both_cross_tokens_alone(task: str) -> None:
    model = reduced(task, keep_ratio=0.5, text_r=2).train()
    batch = ragged_batch(model)
    labels = {"labels": answer_ids(3)} if task == "questions" else {}
    alignment = model(**batch, **labels).alignment_loss
    assert alignment > 0
    alignment.backward()
    named = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert named == {f"{path}.weight" for path in handle_of(model).cross_paths.values()}
    assert len(named) == 2
    accelerate_mllm(model, text_r=2)
    assert "alignment_loss" not in model(**batch, **labels)
    model.zero_grad()
    loss(model, batch).backward()
    assert handle_of(model).cross_tokens["text"].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_saved_and_loaded(tmp_path) -> None:
    model = reduced(keep_ratio=0.5, text_r=2)
    batch = ragged_batch(model)
    expected = question_answers(model, batch)
    save_crossget(model, tmp_path)
    again = load_crossget(tiny_blip("questions"), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(question_answers(again, batch), expected, strict=True))


def test_errors_say_what_to_do() -> None:
    model = reduced(text_r=2)
    batch = ragged_batch(model)
    texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    with pytest.raises(ValueError, match="pad texts on the right"):
        model.text_encoder(**texts)
    with pytest.raises(ValueError, match=r"attention_mask must be \(rows, columns\)"):
        model.text_encoder(batch["input_ids"], attention_mask=torch.ones(3, 1, 12, 12))
    with pytest.raises(ValueError, match="cannot run as a decoder"):
        model.text_encoder(batch["input_ids"], is_decoder=True)
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model.text_encoder()
    with pytest.raises(ValueError, match="text_r lists 2 layers, the text tower has 3"):
        accelerate_mllm(model, text_r=[1, 1])
    with pytest.raises(ValueError, match=r"BlipForConditionalGeneration has no text tower of its own"):
        accelerate_mllm(tiny_blip("captioning"), text_r=2)
