"""BLIP, BLIP-2 and InstructBLIP with a number of tokens per image: readers of the tower see an image's own tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm, calibrate, restore_mllm, trace_merges
from mllm_crossget.hooks.projector.readers import padding_rows
from tests.helpers.products import rest_unless
from tests.helpers.tiny import PAD, pixels, randomise_cross_tokens
from tests.helpers.tiny_blip import blip2_batch, blip_batch, row_of, tiny_blip, tiny_blip2

METHODS = {
    "crossget": lambda: CrossGetConfig(dynamic=True, keep_ratio=0.5),
    "madtp": lambda: MadtpConfig(keep_ratio=0.5, alignment_tokens=6, alignment_width=10),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "blip": (tiny_blip, blip_batch),
    "blip-2-opt": (tiny_blip2, blip2_batch),
    "blip-2-t5": (lambda: tiny_blip2(text="t5"), blip2_batch),
    "instructblip": (lambda: tiny_blip2("instructblip", "llama"), blip2_batch),
    "instructblip-t5": (lambda: tiny_blip2("instructblip", "t5"), blip2_batch),
    "instructblipvideo": (lambda: tiny_blip2("instructblipvideo", "llama"), blip2_batch),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3}


def ready(name: str, method: str) -> nn.Module:
    model = MODELS[name][0]()
    accelerate_mllm(model, METHODS[method]())
    randomise_cross_tokens(model)
    calibrate(model, pixels(model, 16, seed=5))
    return model


def read(model: nn.Module, images: Tensor) -> Tensor:
    """What the text side gets: the Q-Former's queries, or the states of a text that has read the image."""
    states = model.vision_model(images).last_hidden_state
    ids = torch.tensor([[1, 5, 9, 11]]).expand(len(images), -1)
    if hasattr(model, "qformer"):
        queries = model.query_tokens.expand(len(images), -1, -1)
        text = {} if model.config.model_type == "blip-2" else {"input_ids": ids}  # InstructBLIP reads the instruction
        return model.qformer(query_embeds=queries, encoder_hidden_states=states, **text,
                             encoder_attention_mask=torch.ones(states.shape[:2])).last_hidden_state  # fmt: skip
    return model.text_decoder.bert(ids, encoder_hidden_states=states, is_decoder=True).last_hidden_state


@pytest.mark.parametrize("batches", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["blip", "blip-2-opt", "instructblip"])
@torch.no_grad()
def test_what_is_read_of_a_batch_is_what_is_read_of_each_image(name, method, batches) -> None:
    """To 1e-5 of its size, in different company."""
    model = ready(name, method)
    images = pixels(model, 20, seed=3)
    with trace_merges(model) as trace:
        model.vision_model(images)
    counts = (trace[-1].size > 0).sum(dim=1)
    assert len(counts.unique()) > 2, "every image keeps the same number: nothing is dynamic here"
    alone = torch.cat([read(model, images[index : index + 1]) for index in range(len(images))])
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        chosen = torch.randint(len(images), (int(torch.randint(2, 5, (), generator=generator)),), generator=generator)
        together = read(model, images[chosen])
        torch.testing.assert_close(together, alone[chosen], atol=1e-5 * alone.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [  # beams repeat what a greedy answer reads
        pytest.param(name, options, id=f"{name}-{kind}", marks=rest_unless((kind == "beams") == (place % 2 == 0)))
        for place, name in enumerate(MODELS)
        for kind, options in (("greedy", GREEDY), ("beams", BEAMS))
    ],
)
@torch.no_grad()
def test_answers_of_a_batch_are_those_of_each_image(name, options) -> None:
    model, make = ready(name, "madtp"), MODELS[name][1]
    for seed in range(4):
        batch = make(model, seed=seed)
        if name == "blip":  # prompts of one length: its decoder goes on behind the padding
            batch = {**batch, "input_ids": batch["input_ids"][:, :5], "attention_mask": batch["attention_mask"][:, :5]}
        together = new_tokens(model, batch, options)
        assert together == [new_tokens(model, row_of(batch, row), options)[0] for row in range(len(together))]


def new_tokens(model: nn.Module, batch: dict[str, Tensor], options: dict) -> list[list[int]]:
    """Of every row, without padding at the end; BLIP's with the prompt, which has the same length everywhere."""
    begin = batch["input_ids"].shape[1] if model.config.text_config.model_type in ("opt", "llama") else 0
    return [strip_end(row, PAD) for row in model.generate(**batch, **options)[:, begin:].tolist()]


def strip_end(row: list[int], pad: int) -> list[int]:
    while row and row[-1] == pad:
        row = row[:-1]
    return row


def test_padding_is_rows_of_zeros_behind_the_last_norm() -> None:
    model = ready("blip", "crossget")
    with torch.no_grad():
        model.vision_model.post_layernorm.bias.normal_()
        with trace_merges(model) as trace:
            states = model.vision_model(pixels(model, 8, seed=7)).last_hidden_state
    padding = padding_rows(states)
    assert torch.equal(padding, trace[-1].size == 0)
    assert padding.any()
    reading = [type(module).forward for module in model.modules()]
    restore_mllm(model)
    assert [type(module).forward for module in model.modules()] != reading
