"""Merging behind the projector, worked out a second way: slow matchings on the stock model's features, one image at a
time, prompts compacted by hand, and a stock model that is handed these features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.methods.method import Signals
from tests.helpers import reference
from tests.helpers.families.prompts import kept_log_sizes, kept_positions, weighed
from tests.helpers.oracle import original_positions

Row = dict[str, Any]


def steps(tokens: int, target: int) -> list[int]:
    """Tokens removed in each step: as few steps as halving needs, as even as halving allows."""
    count, left = 0, tokens
    while left > target:
        count, left = count + 1, left - left // 2
    for even in range(tokens):
        removed, left = [], tokens
        for _ in range(count):
            removed.append(min(even, left // 2, left - target))
            left -= removed[-1]
        if left == target:
            return removed
    raise AssertionError("no even schedule")


def target_of(model: nn.Module, tokens: int) -> int:
    method = handle_of(model).method
    if method.visual_tokens is not None:
        return min(tokens, method.visual_tokens)
    return max(1, round(method.keep_ratio * tokens))


def merge_by_hand(model: nn.Module, features_ND: Tensor, companions: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """One image: merged features and companions, and the cells that stayed."""
    method = handle_of(model).method
    values = [features_ND, *companions]
    size, cells = torch.ones(len(features_ND)), list(range(len(features_ND)))
    if method.selects_at_output and method.schedule_kind != "constant":  # one choice among all
        decision = chosen_by_hand(features_ND, target_of(model, len(features_ND)))
        return [reference.mean_merge(value, size, decision)[0].float() for value in values], decision.kept
    for removed in steps(len(features_ND), target_of(model, len(features_ND))):
        metric = values[0]
        if method.method == "crossget":
            scaled = metric / metric.square().mean(dim=1, keepdim=True).sqrt()
            attention = reference.attention_map(scaled[None], scaled[None], metric.shape[1] ** -0.5, size.log())
            importance = reference.attention_importance(attention, cross_token=False)
            decision = reference.complete_graph_matching(metric, importance, removed, set())
            weights = reference.pair_weights(importance, decision)
            merged = [reference.ensemble_merge(value, size, decision, weights) for value in values]
        else:
            if method.method == "tome":
                decision = reference.bipartite_matching(metric, removed, keep_order=True)
            else:
                match = method.match(Signals(metric[None], None, (), depth=1.0), removed)
                decision = reference.Decision(*(part[0].tolist() for part in match[:3]))
            merged = [reference.mean_merge(value, size, decision) for value in values]
        values, size = [value.float() for value, _ in merged], merged[0][1]
        cells = [cells[place] for place in decision.kept]
    return values, cells


def chosen_by_hand(features_ND: Tensor, count: int) -> reference.Decision:
    """The feature that the others attend to most, then always the one least like those that stay; every other one goes
    into the most similar of them. Equal values: the lower index."""
    features = features_ND.double()
    scaled = (features / features.square().mean(dim=1, keepdim=True).sqrt())[None]
    attention = reference.attention_map(scaled, scaled, features.shape[1] ** -0.5, torch.zeros(len(features)))
    importance = reference.attention_importance(attention, cross_token=False)
    unit = features / features.norm(dim=1, keepdim=True)
    alike = (unit @ unit.T).tolist()
    stays = [max(range(len(features)), key=lambda token: (float(importance[token]), -token))]
    while len(stays) < count:
        rest = [token for token in range(len(features)) if token not in stays]
        stays.append(min(rest, key=lambda token: (max(alike[token][other] for other in stays), token)))
    kept = sorted(stays)
    src = [token for token in range(len(features)) if token not in stays]
    dst = [max(kept, key=lambda one, row=alike[token]: (row[one], -one)) for token in src]
    return reference.Decision(src, dst, kept)


def compacted(ids: list[int], token: int, runs: list[tuple[int, int]]) -> list[int]:
    """Columns of one unpadded row that stay: of every image's n placeholders the last k."""
    columns, left = [], iter(runs)
    column = 0
    while column < len(ids):
        if ids[column] != token:
            columns.append(column)
            column += 1
            continue
        n, k = next(left)
        assert ids[column : column + n] == [token] * n
        columns += range(column + n - k, column + n)
        column += n
    assert next(left, None) is None
    return columns


def expected_tokens(
    stock: nn.Module,
    model: nn.Module,
    rows: list[Row],
    features: Callable[[nn.Module, Row], list[Tensor]],
    stacked: bool = True,
    **options: Any,
) -> list[list[int]]:
    """New tokens of every row, from a stock model on a hand-compacted prompt and hand-merged features.

    Args:
        features: (stock model, row) -> (n, D) features of every tile of a row.
        stacked: see ``handed_out``.
    """
    found = []
    for row in rows:
        images = [merge_by_hand(model, image, [])[0][0] for image in features(stock, row)]
        before = [len(image) for image in features(stock, row)]
        token = stock.config.image_token_id
        ids, runs = row["input_ids"][0].tolist(), list(zip(before, map(len, images), strict=True))
        columns = compacted(ids, token, runs)
        compact = {name: values[:, columns] for name, values in row.items() if name not in PIXELS}
        pixels = {name: values for name, values in row.items() if name in PIXELS}
        groups = (
            groups_of(getattr(model, "model", model).get_image_features(**pixels, return_dict=True)) if images else []
        )
        if original_positions(model):
            places = [(n, group.place.tolist()) for n, group in zip(before, groups, strict=True)]
            compact["position_ids"] = kept_positions(ids, token, places)
        sizes = None
        if handle_of(model).size_bias:
            sizes = kept_log_sizes(row["input_ids"][0, columns].tolist(), token, [group.size for group in groups])
        compact |= pixels
        with handed_out(getattr(stock, "model", stock), images, stacked), weighed(stock, sizes):
            output = stock.generate(**compact, **options)
        found += output[:, len(columns) :].tolist()
    return found


PIXELS = (
    "pixel_values", "pixel_attention_mask", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "image_sizes",
    "image_position_ids", "spatial_shapes", "target_sizes", "high_res_pixel_values", "pixel_values_local",
    "num_local_patches",
)  # fmt: skip


@contextmanager
def handed_out(owner: nn.Module, images: list[Tensor], stacked: bool = True) -> Iterator[None]:
    """The owner's ``get_image_features`` gives ready features of one row, whatever it is asked for: of equal tiles one
    tensor, or ``stacked=False`` a list."""

    def get_image_features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        given = pixel_values[..., 0, 0, 0].numel() if pixel_values.ndim > 3 else len(pixel_values)
        given = max(given, len(images))  # all side by side
        features = images * (given // len(images))  # before 5.23 the pixels are repeated
        given_back = torch.stack(features) if stacked else features
        output = BaseModelOutputWithPooling(
            last_hidden_state=given_back, pooler_output=given_back
        )  # Llama 4: the first
        if hasattr(owner, "visual_indicator_token_ids"):  # Ovis 2: the last words are marks around images
            output.visual_indicator_features = owner.visual_embeddings_table.weight[-5:]
        return output

    owner.get_image_features = get_image_features
    try:
        yield
    finally:
        del owner.get_image_features
