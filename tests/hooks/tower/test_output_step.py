"""A selection at the tower's output: the stock tower runs as it is, then its tokens are averaged in groups."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm, trace_merges
from tests.helpers import reference
from tests.helpers.methods import WithoutCrossTokens
from tests.helpers.tiny import pixels, tiny_llava


def signals_of(tower: torch.nn.Module, images: torch.Tensor, read: int) -> tuple[torch.Tensor, ...]:
    """Stock hidden states behind the layer that is read, and its attention."""
    states = tower(images, output_hidden_states=True, output_attentions=True)
    return states.hidden_states[read], states.attentions[read - 1]


@pytest.mark.parametrize("kept", [1, 4, 9])
@torch.no_grad()
def test_features_are_means_of_stock_features(kept: int) -> None:
    stock, model = tiny_llava(attention="eager"), tiny_llava(attention="eager")
    accelerate_mllm(model, WithoutCrossTokens(visual_tokens=kept, schedule="output"))
    images, read = pixels(stock, 2), stock.config.vision_config.num_hidden_layers - 1
    hidden, attention = signals_of(stock.model.vision_tower, images, read)
    with trace_merges(model) as trace:
        found = model.model.get_image_features(images, return_dict=True).pooler_output
    for image in range(2):
        importance = reference.attention_importance(attention[image], cross_token=False)
        source = trace[read - 1].source[image].tolist()
        groups = [[t for t in range(1, len(source)) if source[t] == row] for row in range(1, kept + 1)]
        seen = stock.model.multi_modal_projector(hidden[image])
        expected = torch.stack([seen[group].mean(dim=0) for group in groups])
        torch.testing.assert_close(found[image], expected, atol=1e-4, rtol=1e-4)
        first = 1 + int(importance[1:].argmax())
        seen = seen.tolist()
        stays = {first}
        while len(stays) < kept:
            rest = [token for token in range(1, len(source)) if token not in stays]
            nearest = {t: max(reference.cosine(seen[t], seen[s]) for s in stays) for t in rest}
            stays.add(min(rest, key=lambda token: (nearest[token], token)))
        for group in groups:
            assert len(stays & set(group)) == 1  # every group is one token that stays and those nearest to it


@torch.no_grad()
def test_layers_in_front_merge_and_the_output_selects() -> None:
    model = accelerate_mllm(tiny_llava(layers=6), visual_tokens=3)
    with trace_merges(model) as trace:
        model.model.get_image_features(pixels(model, 2), return_dict=True)
    sizes = [layer.size.shape[1] for layer in trace]
    assert sizes[-1] < sizes[0]
    assert torch.equal(trace[-1].size.sum(dim=1), trace[0].size.sum(dim=1))
