"""Projectors of the whole grid: the tower is reduced, its tokens are copied back to their patches in front of the
projector, and the cells behind it are merged again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import CrossGetConfig, ToMeConfig, accelerate_mllm, restore_mllm, trace_merges
from mllm_crossget.families.family import families, module_at
from mllm_crossget.hooks.ground.cross_tokens import recorded_cross_tokens
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.look.visualize import merged_groups, tokens_per_layer
from mllm_crossget.ops.guidance.alignment import alignment_loss
from tests.helpers import reference
from tests.helpers.families.case_grid import BUILDS, TILES, alone
from tests.helpers.methods import FIXED
from tests.helpers.products import pairwise, rest_unless
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava
from tests.helpers.tiny_grid import (
    PATCHES,
    TOKENS,
    padded,
    rows_of,
    tiles,
    tiny_aya_vision,
    tiny_idefics3,
    tiny_internvl,
)

grids = pytest.mark.parametrize("model_type", sorted(BUILDS))


def pixels_of(model: nn.Module, count: int = 2, seed: int = 0) -> Tensor:
    """Pixels of so many tiles as the family's ``get_image_features`` takes them."""
    made = tiles(count, seed)
    return made[None] if families()[model.config.model_type].modalities[0].ndim == (5,) else made


def tower_of(model: nn.Module) -> Any:
    return module_at(model, families()[model.config.model_type].tower)


def features_of(model: nn.Module, **options: Any) -> Tensor:
    """(tiles, tokens, D) of two tiles."""
    found = model.model.get_image_features(pixels_of(model), return_dict=True, **options).pooler_output
    return found if isinstance(found, Tensor) else torch.cat(list(found)).unflatten(0, (2, -1))


@grids
@torch.no_grad()
def test_nothing_merged_is_the_stock_model(model_type: str) -> None:
    """``r=0`` goes through every hook and changes nothing."""
    build, _ = BUILDS[model_type]
    model = build()
    stock = features_of(model)
    assert stock.shape[1] == TOKENS
    accelerate_mllm(model, ToMeConfig(r=0))
    assert handle_of(model).second_merge is not None
    torch.testing.assert_close(features_of(model), stock)
    restore_mllm(model)
    assert torch.equal(features_of(model), stock)


@pairwise(model_type=sorted(BUILDS), method=FIXED, dial=[{"keep_ratio": 0.5}, {"visual_tokens": 8}, {"r": 11}])
@torch.no_grad()
def test_tower_and_language_model_get_the_same_share(model_type: str, method: str, dial: dict[str, Any]) -> None:
    model = accelerate_mllm(BUILDS[model_type][0](), method=method, **dial)
    randomise_cross_tokens(model)
    handle = handle_of(model)
    cross, prefix = handle.schedule.cross, handle.geometry.prefix
    assert cross == (method == "crossget")
    left = PATCHES - 22 if "r" in dial else PATCHES // 2
    with trace_merges(model) as trace, trace_merges(model, tower="cells") as cells:
        features = features_of(model)
    assert trace[-1].size.shape[1] == left + prefix + cross
    assert features.shape[1] == handle.schedule.features == max(1, round(TOKENS * left / PATCHES))
    assert cells[-1].size.shape == (2, features.shape[1])
    assert torch.equal(cells[-1].size.sum(dim=1), torch.full((2,), float(TOKENS)))


@grids
@torch.no_grad()
def test_the_projector_gets_every_patch_with_its_tokens_state(model_type: str) -> None:
    """States in ``get_image_features`` are whole; those of the tower itself are the reduced ones."""
    model = accelerate_mllm(BUILDS[model_type][0](), CrossGetConfig(keep_ratio=0.5))
    randomise_cross_tokens(model)
    prefix, tower = handle_of(model).geometry.prefix, tower_of(model)
    flags = {"output_hidden_states": True, "return_dict": True}
    with trace_merges(model) as trace:
        reduced = tower(tiles(2), **flags)
    whole = model.model.get_image_features(pixels_of(model), **flags)
    counts = [PATCHES + prefix + 1, *(entry.size.shape[1] for entry in trace)]
    assert [states.shape[1] for states in reduced.hidden_states] == counts
    assert {states.shape[1] for states in whole.hidden_states} == {PATCHES + prefix}
    torch.testing.assert_close(whole.hidden_states[0], reduced.hidden_states[0][:, :-1])
    pairs = zip(whole.hidden_states[1:], reduced.hidden_states[1:], trace, strict=True)
    for states, tokens, entry in [*pairs, (whole.last_hidden_state, reduced.last_hidden_state, trace[-1])]:
        for patch in range(PATCHES + prefix):
            for image in range(2):
                torch.testing.assert_close(states[image, patch], tokens[image, entry.source[image, patch]])


@torch.no_grad()
def test_internvl_layers_scale_what_they_add() -> None:
    """One layer of InternVL by hand: LayerScale on both branches, merging between them."""
    model = tiny_internvl("eager")
    layer = model.model.vision_tower.encoder.layer[0]
    layer.lambda_1.copy_(torch.linspace(0.2, 1.4, len(layer.lambda_1)))
    layer.lambda_2.copy_(torch.linspace(-1.0, 0.7, len(layer.lambda_2)))
    hidden = torch.randn(1, PATCHES + 1, 32, generator=torch.Generator().manual_seed(0))
    normed = layer.layernorm_before(hidden)
    heads = layer.attention.k_norm(layer.attention.k_proj(normed)).view(PATCHES + 1, 4, 8)
    after = hidden + layer.lambda_1 * layer.attention(normed)[0]
    decision = reference.bipartite_matching(heads.mean(dim=1), 9, keep_order=True, class_token=True)
    merged = reference.mean_merge(after[0], torch.ones(PATCHES + 1), decision)[0].float()
    expected = merged + layer.lambda_2 * layer.mlp(layer.layernorm_after(merged))
    accelerate_mllm(model, ToMeConfig(r=[9, 0]))
    found = layer(hidden, None, None, None, 9)[0][0]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_dropout_of_internvls_layers_is_theirs() -> None:
    model = tiny_internvl()
    layer = model.model.vision_tower.encoder.layer[0]
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    without_mlp = hidden + layer.lambda_1 * layer.attention(layer.layernorm_before(hidden))[0]
    accelerate_mllm(model, ToMeConfig(r=0))
    layer.dropout.p = 1.0
    layer.train()
    torch.testing.assert_close(layer(hidden)[0], without_mlp)


@pytest.mark.parametrize("build", [tiny_internvl, tiny_aya_vision])
@torch.no_grad()
def test_an_earlier_layer_may_be_read(build: Any) -> None:
    model = build()
    model.config.vision_feature_layer = -2
    stock = features_of(model, vision_feature_layer=-2)
    accelerate_mllm(model, ToMeConfig(keep_ratio=0.5))
    schedule, geometry = handle_of(model).schedule, handle_of(model).geometry
    assert geometry.read == 1
    assert schedule.tokens[1] == PATCHES // 2 + geometry.prefix
    assert features_of(model, vision_feature_layer=-2).shape == (2, TOKENS // 2, stock.shape[2])


def test_several_layers_are_refused() -> None:
    model = tiny_aya_vision()
    model.config.vision_feature_layer = [-1, -2]
    with pytest.raises(ValueError, match="use a single layer"):
        accelerate_mllm(model, keep_ratio=0.5)
    assert handle_of(model) is None


@pytest.mark.parametrize(
    ("dial", "of_patches", "of_cells"),
    [
        ({"keep_ratio": 0.5}, {28: 8, 84: 72}, {28: 2, 84: 18}),
        ({"visual_tokens": 8}, {28: 16, 84: 36}, {28: 4, 84: 8}),  # a limit: four cells stay four; 8 of 36: 32 patches
        ({"r": 11}, {28: 4, 84: 122}, {28: 1, 84: 30}),
        ({"r": 24}, {28: 4, 84: 96}, {28: 1, 84: 24}),
    ],
    ids=str,
)
@torch.no_grad()
def test_tiles_of_another_size(dial: dict[str, Any], of_patches: dict[int, int], of_cells: dict[int, int]) -> None:
    """Tower and cells keep the same share of an image of any size: 4 x 4 patches of 28 pixels, 12 x 12 of 84."""
    model = accelerate_mllm(tiny_idefics3(), ToMeConfig(**dial))
    for side, cells in of_cells.items():
        pixels = torch.randn(1, 2, 3, side, side, generator=torch.Generator().manual_seed(side))
        with trace_merges(model) as trace:
            features = model.model.get_image_features(pixels, return_dict=True).pooler_output
        assert trace[-1].size.shape[1] == of_patches[side]
        assert sum(entry.shape[:-1].numel() for entry in features) == 2 * cells
        placeholders = (side // 14) ** 2
        batch = padded(rows_of([[placeholders] * 2]))
        logits = model(**batch, pixel_values=pixels).logits
        assert logits.shape[1] == batch["input_ids"].shape[1]


# A tower and a projector of every kind of code; the others differ from one of them by numbers alone.
COMPILED = ("gemma3", "idefics3", "internvl")


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=rest_unless(name in COMPILED)) for name in sorted(BUILDS)]
)
@torch.no_grad()
def test_a_compiled_model_says_the_same(model_type: str) -> None:
    """Also where the mask of patches cannot be looked at, and where the tower alone is wrapped. The whole model takes
    twice as long to compile, and what stands behind the features is the same in all families: two of them."""
    build, batch_of = BUILDS[model_type]
    model = accelerate_mllm(build(), ToMeConfig(keep_ratio=0.5))
    features = features_of(model)
    if model_type in ("idefics3", "internvl"):
        batch = batch_of(model)
        expected = model(**batch).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).logits, expected)
    else:
        torch.testing.assert_close(torch.compile(features_of, backend="eager")(model), features)
    path = families()[model_type].tower
    owner, name = module_at(model, path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
    torch.testing.assert_close(features_of(model), features)
    restore_mllm(model)
    accelerate_mllm(model, ToMeConfig(keep_ratio=0.5))
    torch.testing.assert_close(features_of(model), features)


@grids
@torch.no_grad()
def test_a_tuple_instead_of_an_output(model_type: str) -> None:
    model = accelerate_mllm(BUILDS[model_type][0](), ToMeConfig(keep_ratio=0.5))
    features = model.model.get_image_features(pixels_of(model), return_dict=True)
    found = model.model.get_image_features(pixels_of(model), return_dict=False)
    assert isinstance(found, tuple)
    for ours, expected in zip(found, features.to_tuple(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("model_type", ["gemma3", "idefics3", "smolvlm"])  # the others' stock forward breaks then
@torch.no_grad()
def test_tuples_by_configuration(model_type: str) -> None:
    build, batch_of = BUILDS[model_type]
    model = accelerate_mllm(build(), ToMeConfig(keep_ratio=0.5))
    batch = batch_of(model)
    expected = model(**batch, use_cache=False)
    model.config.return_dict = False
    found = model(**batch, use_cache=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected.logits)
    assert torch.equal(model(**batch, return_dict=True).logits, expected.logits)


@pytest.mark.parametrize("layers", [[0, -1], [1]])
@torch.no_grad()
def test_some_hidden_states(layers: list[int]) -> None:
    """transformers counts the first one among them since 5.23."""
    stock = tiny_internvl()
    flags = {"output_hidden_states": layers, "return_dict": True}
    expected = stock.model.get_image_features(pixels_of(stock), **flags).hidden_states
    model = accelerate_mllm(tiny_internvl(), ToMeConfig(keep_ratio=0.5))
    found = model.model.get_image_features(pixels_of(model), **flags).hidden_states
    shapes = [[None if one is None else one.shape for one in states] for states in (found, expected)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_tiles_with_padded_margins_are_refused(model_type: str) -> None:
    model = tiny_idefics3(model_type=model_type)
    mask = torch.ones(1, 2, 56, 56, dtype=torch.bool)
    mask[0, 1, :, 28:] = False
    accelerate_mllm(model, keep_ratio=0.5)
    with pytest.raises(ValueError, match="a tile has a padded margin"):
        model.model.get_image_features(pixels_of(model), pixel_attention_mask=mask)
    assert features_of(model, pixel_attention_mask=torch.ones_like(mask)).shape[1] == TOKENS // 2


@grids
def test_more_tokens_than_there_are_cells_are_refused(model_type: str) -> None:
    model = BUILDS[model_type][0]()
    with pytest.raises(ValueError, match=f"more than the {TOKENS} tokens of an image"):
        accelerate_mllm(model, visual_tokens=TOKENS + 1)
    assert handle_of(model) is None


@grids
@torch.no_grad()
def test_pictures_show_the_cells_and_the_towers_counts(model_type: str) -> None:
    model = accelerate_mllm(BUILDS[model_type][0](), ToMeConfig(visual_tokens=5))
    groups = merged_groups(model, pixels_of(model))
    assert groups.shape == (2, TOKENS)
    assert [sorted(set(row.tolist())) for row in groups] == [list(range(5))] * 2
    prefix = handle_of(model).geometry.prefix
    assert tokens_per_layer(model, pixels_of(model))[:, -1].tolist() == [20 + prefix] * 2
    accelerate_mllm(model, ToMeConfig(r=1))
    assert merged_groups(model, pixels_of(model)).tolist() == [list(range(TOKENS))] * 2, "two patches fewer: all cells"


def test_cells_cannot_be_traced_where_there_are_none() -> None:
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    with pytest.raises(ValueError, match="no cells are merged behind the tower"), trace_merges(model, tower="cells"):
        pass


@pytest.mark.parametrize("model_type", sorted(set(BUILDS) - {"gemma3"}))
def test_the_alignment_loss_compares_what_the_projector_makes_of_a_grid_of_cross_tokens(model_type: str) -> None:
    build, batch_of = BUILDS[model_type]
    stock, model = build(), accelerate_mllm(build(), CrossGetConfig(keep_ratio=0.5)).train()
    randomise_cross_tokens(model)
    batch, family = batch_of(model), families()[model_type]
    encoder, text = module_at(model, handle_of(model).encoder_path), module_at(model, handle_of(model).text_path)
    with recorded_cross_tokens(encoder, text) as (vision, heard):
        output = model(**batch)
    projected = []
    for layer in vision[0]:  # (tiles, D): a tower whose every patch is its tile's cross token
        grid = layer[:, None].repeat(1, PATCHES + handle_of(model).geometry.prefix, 1)
        hook = module_at(stock, family.tower).register_forward_hook(lambda _, args, out, grid=grid: whole_of(out, grid))
        cells = stock.model.get_image_features(pixels_of(stock, len(layer)), return_dict=True).pooler_output
        hook.remove()
        cells = cells if isinstance(cells, Tensor) else torch.cat(list(cells)).unflatten(0, (len(layer), -1))
        torch.testing.assert_close(cells, cells[:, :1].expand_as(cells))
        projected.append(cells[:, 0])
    rows = [row for row, count in enumerate(TILES) for _ in range(count)]
    expected = alignment_loss(torch.stack(projected), heard[0], torch.tensor(rows), "reference")[0]
    torch.testing.assert_close(output.alignment_loss, expected)
    output.alignment_loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched
    assert all("cross_tokens" in name for name in touched)


def whole_of(output: Any, grid: Tensor) -> Any:
    output.last_hidden_state = grid
    if output.get("hidden_states"):
        output.hidden_states = (*[None] * (len(output.hidden_states) - 1), grid)
    return output


@grids
def test_everything_that_is_learned_gets_a_gradient(model_type: str) -> None:
    """Cross tokens of tower and text learn from the answer alone."""
    build, batch_of = BUILDS[model_type]
    model = accelerate_mllm(build(), CrossGetConfig(keep_ratio=0.5)).train()
    batch = alone(batch_of(model), 0)
    model(**batch, use_cache=False).logits.float().logsumexp(dim=-1).sum().backward()
    crossed = {name: p.grad for name, p in model.named_parameters() if "cross_tokens" in name}
    assert len(crossed) == 2
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in crossed.values())
