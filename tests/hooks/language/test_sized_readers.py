"""What cross-attends to a reduced tower reads a merged token as often as it has patches.

The oracle is a stock model whose tower hands on every merged token as often as its size says, one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval, Blip2VisionModelWithProjection
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget import CrossGetConfig, accelerate_mllm, calibrate, restore_mllm, trace_merges
from mllm_crossget.families.family import families
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families import case_aria, case_blip2, case_idefics2
from tests.helpers.families.cases import Batch, all_cases
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.tiny import PAD, pixels, randomise_cross_tokens
from tests.helpers.tiny_blip import IMAGE, answer_ids, row_of

CASES = {case.name: case for case in all_cases()}
# Families with a module that cross-attends to the tower; BLIP's attention has one implementation alone.
READERS = [case.name for case in CASES.values() if families()[case.model_type].vision.is_read_across]
ONE_KIND = [name for name in READERS if name.startswith("blip-") and not name.startswith("blip-2")]
BOTH_KINDS = [(name, kind) for name in READERS for kind in ("sdpa", "eager") if kind == "sdpa" or name not in ONE_KIND]
GENERATING = ["blip-captioning", "blip-questions", "blip-2-opt", "blip-2-t5", "instructblip-llama",
              "instructblipvideo-llama", "idefics2", "aria"]  # fmt: skip
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SETTINGS = {"method": "tome", "keep_ratio": 0.4}


def reduced(name: str, attention: str = "sdpa", **settings: Any) -> nn.Module:
    model = accelerate_mllm(CASES[name].build(attention), **(settings or SETTINGS))
    randomise_cross_tokens(model)
    return model


def tower_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(families()[CASES[name].model_type].tower)


@contextmanager
def written_out(stock: nn.Module, model: nn.Module, name: str, weighed: bool = True) -> Iterator[None]:
    """The stock model's tower hands on the tokens of the reduced one, each as often as its size (once if not
    ``weighed``)."""

    def replaced(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        images = args[0] if args else kwargs["pixel_values"]
        masks, asked = kwargs.get("patch_attention_mask"), {"output_hidden_states": bool(output.get("hidden_states"))}
        rows = []
        for index in range(len(images)):
            own = {} if masks is None else {"patch_attention_mask": masks[index : index + 1]}
            with trace_merges(model) as trace:
                (tokens,) = read_of(tower_of(model, name)(images[index : index + 1], **own, **asked))
            (size,) = trace[-1].size.long()
            rows.append(tokens.repeat_interleave(size if weighed else (size > 0).long(), dim=0))
            if masks is not None:
                read_of(output)[index, masks[index].flatten()] = rows[-1]
        if masks is None:
            output.last_hidden_state = torch.stack(rows)
        return output

    hook = tower_of(stock, name).register_forward_hook(replaced, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def read_of(output: Any) -> Tensor:
    """The states that the readers get."""
    return output.hidden_states[-1] if output.get("hidden_states") else output.last_hidden_state


def rows_of(name: str, batch: Batch) -> list[Batch]:
    rows = [CASES[name].row(batch, index) for index in range(3)]
    return [row for row in rows if "pixel_values" in row]


@pytest.mark.parametrize(("name", "attention"), BOTH_KINDS)
@torch.no_grad()
def test_a_reader_reads_a_merged_token_as_often_as_it_has_patches(name, attention) -> None:
    case = CASES[name]
    model, stock = reduced(name, attention, **SETTINGS, **text_dial(name)), reduced(name, attention, **only_text(name))
    for row in rows_of(name, case.batch(model)):
        (found,) = case.answers(model, row)
        with written_out(stock, model, name):
            (expected,) = case.answers(stock, row)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        (without,) = case.answers(accelerate_mllm(model, **SETTINGS, **text_dial(name), size_bias=False), row)
        assert not torch.allclose(found, without, atol=1e-3, rtol=1e-3)
        accelerate_mllm(model, **SETTINGS, **text_dial(name))


def text_dial(name: str) -> dict[str, float]:
    return {"text_keep_ratio": 0.5} if name.endswith("-text") else {}


def only_text(name: str) -> dict[str, Any]:
    return {"method": "tome", **(text_dial(name) or {"keep_ratio": 1.0})}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_every_decoding_step_reads_them_so(name, options) -> None:
    case = CASES[name]
    model, stock = reduced(name), case.build("sdpa")
    for row in rows_of(name, case.batch(model)):
        found = model.generate(**row, **GREEDY, **options)
        with written_out(stock, model, name):
            assert torch.equal(found, stock.generate(**row, **GREEDY, **options))
        assert (found != PAD).any()


@pytest.mark.parametrize("name", ["blip-captioning", "blip-retrieval", "blip-2-opt", "instructblip-llama"])
@torch.no_grad()
def test_without_sizes_every_token_is_read_once(name) -> None:
    """Bit for bit, and with no change to any reader."""
    case = CASES[name]
    stock = case.build("sdpa")
    classes = [type(module) for module in stock.modules()]
    published = reduced(name, config=CrossGetConfig.published(keep_ratio=0.4))
    assert not handle_of(published).weighs_readers
    for row in rows_of(name, case.batch(stock)):
        model = reduced(name, **SETTINGS, size_bias=False)
        found = case.answers(model, row)
        with written_out(stock, model, name, weighed=False):
            assert all(torch.equal(*pair) for pair in zip(found, case.answers(stock, row), strict=True))
        assert [type(module) for module in restore_mllm(model).modules()] == classes


@torch.no_grad()
def test_without_sizes_a_resampler_reads_every_token_once() -> None:
    model = reduced("idefics2", **SETTINGS, size_bias=False)
    stock, image = case_idefics2.tiny_idefics2(), pixels(model, 1)
    tokens = model.model.vision_model(image).last_hidden_state
    expected = stock.model.connector(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
    assert torch.equal(features(model.model.get_image_features(image[None], return_dict=True)), expected.flatten(0, 1))


@pytest.mark.parametrize("name", ["blip-captioning", "blip-2-opt", "instructblip-llama", "instructblipvideo-llama"])
@torch.no_grad()
def test_images_that_keep_different_numbers(name) -> None:
    case = CASES[name]
    model, stock = case.build("sdpa"), case.build("sdpa")
    accelerate_mllm(model, method="crossget", dynamic=True, keep_ratio=0.4)  # text cross tokens of zero change nothing
    calibrate(model, pixels(model, 16, seed=5))
    batch = case.batch(model)
    if name == "blip-captioning":  # prompts of one length: its decoder goes on behind the padding
        batch = {**batch, "input_ids": batch["input_ids"][:, :5], "attention_mask": batch["attention_mask"][:, :5]}
    with trace_merges(model) as trace:
        together = case.answers(model, batch)
    assert (trace[-1].size == 0).any(), "every image keeps the same number: nothing is dynamic here"
    for index, answer in enumerate(together):
        with written_out(stock, model, name):
            (expected,) = case.answers(stock, case.row(batch, index))
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)
    beams = model.generate(**batch, **GREEDY, num_beams=3)
    assert [said(row) for row in beams] == [
        said(model.generate(**row_of(batch, index), **GREEDY, num_beams=3)[0]) for index in range(3)
    ]


def said(row: Tensor) -> list[int]:
    """Without padding and without the image's placeholders."""
    return [token for token in row.tolist() if token not in (PAD, IMAGE)]


@pytest.mark.parametrize("name", ["blip-captioning", "blip-questions-text", "blip-2-opt", "instructblip-llama",
                                  "idefics2"])  # fmt: skip
def test_gradients_pass_through_weighted_keys_with_checkpointing(name) -> None:
    found = []
    for weighs, checkpoints in ((True, False), (True, True), (False, False)):
        model = reduced(name, **SETTINGS, **text_dial(name), size_bias=weighs).train()
        if checkpoints:
            checkpoint_activations(model, reentrant=False)
        CASES[name].loss(model, CASES[name].batch(model)).backward()
        found.append({path: weight.grad for path, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    tower = families()[CASES[name].model_type].tower
    assert any(path.startswith(tower) and bool(grad.any()) for path, grad in found[0].items())
    for path, grad in found[0].items():
        torch.testing.assert_close(found[1][path], grad, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(found[2][path], grad) for path, grad in found[0].items())


@pytest.mark.parametrize("name", ["blip-2-opt", "instructblip-llama", "idefics2"])
@torch.no_grad()
def test_kernels_without_a_mask_get_a_channel(name) -> None:
    """A stand-in for flash attention: it takes no additive mask."""

    def flash_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None or attention_mask.all()
        assert "crossget_keys" not in kwargs
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    model = reduced(name)
    reader = model.get_submodule(families()[CASES[name].model_type].readers[0])
    row = rows_of(name, CASES[name].batch(model))[1]
    (expected,) = CASES[name].answers(model, row)
    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", flash_like)
    try:
        reader.config._attn_implementation_internal = "flash_stand_in"
        (found,) = CASES[name].answers(model, row)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_stand_in")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_selection_at_the_output_that_merges_is_weighed_too() -> None:
    model = reduced("blip-2-opt", method="prumerge", keep_ratio=0.4)
    stock = CASES["blip-2-opt"].build("sdpa")
    row = rows_of("blip-2-opt", CASES["blip-2-opt"].batch(model))[0]
    (found,) = CASES["blip-2-opt"].answers(model, row)
    with written_out(stock, model, "blip-2-opt"):
        torch.testing.assert_close(found, CASES["blip-2-opt"].answers(stock, row)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_features_of_the_image_alone_are_weighed() -> None:
    """Every call of the whole model that reads the image, not its forward alone."""
    for name, call in (("blip-2-opt", "get_image_features"), ("instructblip-llama", "get_image_features"),
                       ("instructblipvideo-llama", "get_video_features")):  # fmt: skip
        model, stock = reduced(name), CASES[name].build("sdpa")
        row = rows_of(name, CASES[name].batch(model))[0]
        wanted = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        given = {key: value for key, value in row.items() if key in wanted}
        found = features(getattr(model, call)(**given, return_dict=True))
        with written_out(stock, model, name):
            expected = features(getattr(stock, call)(**given, return_dict=True))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def features(output: Any) -> Tensor:
    pooled = output.pooler_output
    return torch.cat(list(pooled)) if isinstance(pooled, (list, tuple)) else pooled


@torch.no_grad()
def test_a_reader_called_by_itself_counts_every_token_once_and_one_that_got_others_refuses() -> None:
    model, stock = reduced("blip-captioning"), CASES["blip-captioning"].build("sdpa")
    images = pixels(model, 2)
    states = model.vision_model(images).last_hidden_state
    reads = {"input_ids": answer_ids(2), "encoder_hidden_states": states, "is_decoder": True}
    alone = model.text_decoder.bert(**reads).last_hidden_state
    assert torch.equal(alone, stock.text_decoder.bert(**reads).last_hidden_state)
    wrong = model.text_decoder.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][:, 1:]}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match=r"their token sizes are not known.*size_bias=False"):
        model(pixel_values=images, input_ids=answer_ids(2))
    wrong.remove()


def test_where_nothing_cross_attends_it_is_refused() -> None:
    for name in ("clip-vision-projection", "blip-both-towers"):
        model = CASES[name].build("sdpa")
        with pytest.raises(ValueError, match=r"size_bias=True is not possible in .*no module cross-attends"):
            accelerate_mllm(model, keep_ratio=0.5, size_bias=True)
        assert handle_of(model) is None
    for make in (case_aria.tiny_aria, case_idefics2.tiny_idefics2,
                 lambda: case_blip2.retrieval(Blip2ForImageTextRetrieval, "sdpa"),
                 lambda: case_blip2.retrieval(Blip2VisionModelWithProjection, "sdpa")):  # fmt: skip
        assert handle_of(accelerate_mllm(make(), keep_ratio=0.5, size_bias=True)).weighs_readers
