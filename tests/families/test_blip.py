"""What is special in the BLIP families: where text cross tokens are written, the alignment loss, generation without a
prompt, retrieval models, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval, Blip2VisionModelWithProjection

from mllm_crossget import accelerate_mllm, load_crossget, restore_mllm, save_crossget, trace_merges, unsupported_reason
from mllm_crossget.families.family import families, module_at
from mllm_crossget.hooks.ground.cross_tokens import recorded_cross_tokens
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.model.placeholder_model import AlignedModel
from mllm_crossget.ops.guidance.alignment import alignment_loss
from tests.helpers.families.case_blip import captions, question_answers
from tests.helpers.families.case_blip import loss as blip_loss
from tests.helpers.families.case_blip2 import answers, loss, retrieval
from tests.helpers.gradients import assert_same_gradients, checkpoint_activations
from tests.helpers.tiny import BOS, PAD, pixels, randomise_cross_tokens
from tests.helpers.tiny_blip import (
    FRAMES,
    IMAGE,
    QUERIES,
    answer_ids,
    blip2_batch,
    blip_batch,
    padded,
    row_of,
    tiny_blip,
    tiny_blip2,
    words,
)

Q_FORMER_KINDS = [("blip-2", "opt"), ("blip-2", "t5"), ("instructblip", "llama"), ("instructblipvideo", "llama")]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3}


def learned(model: nn.Module, **settings: Any) -> nn.Module:
    accelerate_mllm(model, **(settings or {"keep_ratio": 0.5}))
    randomise_cross_tokens(model)
    return model


def text_layers(model: nn.Module) -> list[nn.Module]:
    return list(
        {
            "OPTForCausalLM": lambda: model.language_model.model.decoder.layers,
            "T5ForConditionalGeneration": lambda: model.language_model.encoder.block,
            "LlamaForCausalLM": lambda: model.qformer.encoder.layer,
        }[type(model.language_model).__name__]()
    )


def text_columns(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """First text token of every row of the text side, found by looking at the ids one by one."""
    if model.config.model_type == "blip-2":
        columns = []
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            text = [column for column, token in enumerate(ids) if mask[column] and token != IMAGE]
            columns.append(text[0])
        return columns
    frames = FRAMES if model.config.model_type == "instructblipvideo" else 1
    return [QUERIES] * frames * len(batch["input_ids"])  # the Q-Former's text is padded on the right


@pytest.mark.parametrize("side", ["processor", "front"])
@pytest.mark.parametrize(("model_type", "text"), Q_FORMER_KINDS)
@torch.no_grad()
def test_text_cross_tokens_are_written_into_the_first_text_token(model_type: str, text: str, side: str) -> None:
    model = learned(tiny_blip2(model_type, text))
    batch = blip2_batch(model, side=None if side == "processor" else side)
    found = torch.cat(answers(model, batch))
    side_module = module_at(model, handle_of(model).text_path)
    vectors = side_module.cross_tokens.weight.clone()
    side_module.cross_tokens.weight.zero_()
    without = torch.cat(answers(model, batch))
    columns = text_columns(model, batch)
    rows = torch.arange(len(columns))

    def write(vector: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0].clone()
            hidden[rows, columns] += vector
            return (hidden, *args[1:])

        return hook

    for layer, vector in zip(text_layers(model), vectors, strict=True):
        layer.register_forward_pre_hook(write(vector))
    torch.testing.assert_close(found, torch.cat(answers(model, batch)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, without, atol=1e-2)


@pytest.mark.parametrize("kl", ["reference", "js"])
@pytest.mark.parametrize(("model_type", "text"), Q_FORMER_KINDS)
def test_alignment_loss_of_q_former_models(model_type: str, text: str, kl: str) -> None:
    model = learned(tiny_blip2(model_type, text), keep_ratio=0.5, kl=kl)
    batch = blip2_batch(model)
    handle = handle_of(model)
    assert not hasattr(model(**batch, **decoder_inputs(model)), "alignment_loss")
    model.train()
    output = model(**batch, **decoder_inputs(model))
    encoder, text_side = module_at(model, handle.encoder_path), module_at(model, handle.text_path)
    with recorded_cross_tokens(encoder, text_side) as (vision, texts):
        super(AlignedModel, model).forward(**batch, **decoder_inputs(model))
    images = vision[0].shape[1]
    assert images == len(batch["input_ids"]) * (FRAMES if model_type == "instructblipvideo" else 1)
    mapped = model.vision_model.post_layernorm(vision[0])
    mapped = model.qformer.encoder.layer[0].crossattention.attention.value(mapped)
    if model_type == "blip-2":
        mapped = model.language_projection(mapped)
    expected = alignment_loss(mapped, texts[0], torch.arange(images), kl)[0]
    torch.testing.assert_close(output.alignment_loss, expected)
    model.zero_grad()
    output.alignment_loss.backward()
    assert sorted(name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()) == sorted(
        f"{path}.weight" for path in handle.cross_paths.values()
    )


def decoder_inputs(model: nn.Module) -> dict[str, Tensor]:
    return {"decoder_input_ids": answer_ids(3)} if model.config.text_config.is_encoder_decoder else {}


@pytest.mark.parametrize("task", ["captioning", "questions", "retrieval", "both towers"])
def test_alignment_loss_of_blip_reaches_cross_tokens_only(task: str) -> None:
    model = learned(tiny_blip(task)).train()
    batch = blip_batch(model)
    labels = {"labels": batch["input_ids"]} if task in ("captioning", "questions") else {}
    alignment = model(**batch, **labels).alignment_loss
    assert alignment > 0
    alignment.backward()
    named = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert named == {f"{path}.weight" for path in handle_of(model).cross_paths.values()}
    assert len(named) == 2


def test_text_only_rows_have_no_part_in_the_alignment() -> None:
    """Three rows, two images: the row without placeholders is left out, and no row is taken for another."""
    model = learned(tiny_blip2()).train()
    batch = blip2_batch(model, side="front")
    two = {name: value[[0, 2]] for name, value in batch.items()}
    batch["input_ids"][1][batch["input_ids"][1] == IMAGE] = 5
    batch["pixel_values"] = batch["pixel_values"][[0, 2]]
    torch.testing.assert_close(model(**batch).alignment_loss, model(**two).alignment_loss)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model_type", "text"), [("blip-2", "opt"), ("blip-2", "t5"), ("instructblip", "llama")])
def test_two_forwards_before_one_backward(model_type: str, text: str, checkpointing: bool) -> None:
    model = learned(tiny_blip2(model_type, text)).train()
    batches = blip2_batch(model), blip2_batch(model, seed=3, rows=2)

    def gradients(*chosen: dict[str, Tensor]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        torch.stack([loss(model, batch) for batch in chosen]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = [gradients(batch) for batch in batches]
    if checkpointing:
        checkpoint_activations(model, reentrant=False)
    assert_same_gradients(gradients(*batches), {name: alone[0][name] + alone[1][name] for name in alone[0]})


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("text", ["opt", "t5"])
@torch.no_grad()
def test_captions_without_a_prompt(text: str, options: dict[str, Any]) -> None:
    model = learned(tiny_blip2("blip-2", text))
    images = pixels(model, 3)
    together = model.generate(pixel_values=images, **options)
    assert (together != 0).sum() > 3
    for row in range(3):
        alone = model.generate(pixel_values=images[row : row + 1], **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@torch.no_grad()
def test_instructblip_generates_with_padding_between_image_and_text(options: dict[str, Any]) -> None:
    model = learned(tiny_blip2("instructblip", "llama"))
    batch = blip2_batch(model, side="left")
    prompt = batch["input_ids"].shape[1]
    together = model.generate(**batch, **options)[:, prompt:]
    for row in range(3):
        alone = row_of(batch, row)
        assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], together[row])


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@torch.no_grad()
def test_blip_generates(options: dict[str, Any]) -> None:
    """Rows of one length: the stock decoder counts positions through padding."""
    captioner, answerer = learned(tiny_blip("captioning")), learned(tiny_blip("questions"))
    images, ids = pixels(captioner, 3), padded([row[:4] for row in words(3)])[0]
    for model, inputs in (
        (captioner, {"pixel_values": images}),
        (captioner, {"pixel_values": images, "input_ids": ids}),
        (answerer, {"pixel_values": images, "input_ids": ids}),
    ):
        together = model.generate(**{name: value.clone() for name, value in inputs.items()}, **options)
        assert len(set(map(tuple, together.tolist()))) > 1
        for row in range(3):
            alone = {name: value[row : row + 1].clone() for name, value in inputs.items()}
            assert torch.equal(model.generate(**alone, **options)[0], together[row])


@torch.no_grad()
def test_the_q_former_sees_fewer_tokens_and_the_language_model_as_many() -> None:
    model = accelerate_mllm(tiny_blip2(attention="eager"), visual_tokens=9)
    output = model.get_image_features(pixels(model, 2), return_dict=True)
    assert output.vision_outputs.last_hidden_state.shape[1] == 9
    assert output.pooler_output.shape[1] == QUERIES
    former = model.qformer(
        query_embeds=model.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=output.vision_outputs.last_hidden_state,
        output_attentions=True,
    )
    assert {weights.shape[-2:] for weights in former.cross_attentions} == {(QUERIES, 9)}
    vision = model.vision_model(pixels(model, 2), output_hidden_states=True, output_attentions=True)
    tokens = list(handle_of(model).schedule.tokens)
    assert [states.shape[1] for states in vision.hidden_states][1:] == tokens[1:]
    assert [weights.shape[-1] for weights in vision.attentions] == tokens[:-1]


@torch.no_grad()
def test_attentions_of_blip_have_the_schedules_lengths() -> None:
    model = learned(tiny_blip())
    vision = model.vision_model(pixels(model, 2), output_hidden_states=True, output_attentions=True)
    tokens = list(handle_of(model).schedule.tokens)
    assert [states.shape[1] for states in vision.hidden_states][1:] == tokens[1:]
    assert [weights.shape[-1] for weights in vision.attentions] == tokens[:-1]


@torch.no_grad()
def test_blip_without_merging_is_the_stock_blip() -> None:
    """The attention that goes through the interface computes what BLIP's own does."""
    model = tiny_blip()
    batch = blip_batch(model)
    expected = captions(model, batch)
    accelerate_mllm(model, method="tome", r=0)
    for found, wanted in zip(captions(model, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("matching_head", [True, False])
@torch.no_grad()
def test_retrieval_with_blip2(matching_head: bool) -> None:
    model = retrieval(Blip2ForImageTextRetrieval, "sdpa")
    batch = blip2_batch(model, side="right")
    before = model(**batch, use_image_text_matching_head=matching_head).logits_per_image
    learned(model, keep_ratio=0.5)
    assert set(handle_of(model).cross_paths) == {"vision"}
    with trace_merges(model) as trace:
        after = model(**batch, use_image_text_matching_head=matching_head).logits_per_image
    assert trace[-1].size.shape[1] == 8
    assert not torch.allclose(before, after)
    restore_mllm(model)
    assert torch.equal(model(**batch, use_image_text_matching_head=matching_head).logits_per_image, before)


@torch.no_grad()
def test_image_embeddings_of_blip2() -> None:
    model = learned(retrieval(Blip2VisionModelWithProjection, "sdpa"), keep_ratio=0.5)
    assert model(pixels(model, 2)).image_embeds.shape[:2] == (2, QUERIES)


def test_unknown_language_models_are_refused_by_name() -> None:
    model = tiny_blip2()
    model.config.text_config.model_type = "bloom"
    assert "with a 'bloom' language model is not supported" in unsupported_reason(model)


def test_half_precision_with_a_q_former_in_float32() -> None:
    model = tiny_blip2().to(torch.bfloat16)
    model.qformer.float()
    model.query_tokens.data = model.query_tokens.data.float()
    learned(model, keep_ratio=0.5).train()
    total = loss(model, blip2_batch(model))
    total.backward()
    assert torch.isfinite(total)
    assert model.vision_model.encoder.cross_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [tiny_blip2, lambda: tiny_blip2("instructblip", "llama"), tiny_blip])
def test_files_hold_both_places_and_load_again(tmp_path, build) -> None:
    model = learned(build())
    model.save_pretrained(tmp_path / "whole")
    save_crossget(model, tmp_path / "alone")
    blip = model.config.model_type == "blip"
    batch, read = (blip_batch(model), captions) if blip else (blip2_batch(model), answers)
    with torch.no_grad():
        expected = read(model, batch)
        for folder in ("whole", "alone"):
            again = load_crossget(build(), tmp_path / folder)
            assert set(handle_of(again).cross_paths) == {"vision", "text"}
            assert all(torch.equal(a, b) for a, b in zip(read(again, batch), expected, strict=True))
        stock, problems = type(build()).from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(problems.values())
        restored = read(restore_mllm(model), batch)
        assert all(torch.equal(a, b) for a, b in zip(read(stock.eval(), batch), restored, strict=True))


def test_every_blip_family_says_what_is_exact() -> None:
    named = [family for name, family in families().items() if "blip" in name]
    assert len(named) == 9
    assert all(family.exact for family in named)


def test_questions_of_a_batch_with_a_loss() -> None:
    model = learned(tiny_blip("questions")).train()
    blip_loss(model, blip_batch(model)).backward()
    path = handle_of(model).cross_paths["text"]
    assert path == "text_encoder.cross_tokens"
    assert module_at(model, path).weight.grad.abs().sum() > 0
    assert len(question_answers(model.eval(), blip_batch(model))) == 3


@pytest.mark.parametrize(
    ("settings", "same"),
    [(None, False), ({"keep_ratio": 0.5}, False), ({"keep_ratio": 0.5, "text_keep_ratio": 0.5}, True)],
)
@torch.no_grad()
def test_padding_of_a_question_is_read_without_a_text_dial_as_in_stock_blip(settings: dict | None, same: bool) -> None:
    """What the table of families says of rows alone and together."""
    model = tiny_blip("questions")
    if settings is not None:
        accelerate_mllm(model, **settings)
    ids = torch.tensor([[BOS, 20, 21, 22, 23, 24, 25], [BOS, 11, PAD, PAD, PAD, PAD, PAD]])
    mask, images = (ids != PAD).long(), blip_batch(model)["pixel_values"][:2]
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images, **options).logits[0][1]
    alone = model.generate(input_ids=ids[1:, :2], attention_mask=mask[1:, :2], pixel_values=images[1:], **options)
    assert torch.allclose(together, alone.logits[0][0], atol=1e-4) == same
