"""FLOPs of one image whose tokens are cells of a patch merger, which move whole inside the tower."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from mllm_crossget.arithmetic.geometry import TowerCosts
from mllm_crossget.costs.matching_flops import matching_flops, merging_flops
from mllm_crossget.families.family import Family, config_at
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import Schedule, behind_cells


def cell_parts(
    config: Any, family: Family, schedule: Schedule, method: Method, one_softmax: bool
) -> tuple[int, int, int, int]:
    """Patch embedding, layers, reduction, and the merger with the taps of other layers, which run on the cells that
    the tower hands on.

    In layers that attend within windows, cells are taken to be spread evenly over these. Taps of layers in front of the
    last one are counted like it, though more cells may have been left there.

    Raises:
        ValueError: the family has no formulas for such a tower.
    """
    if family.costs.layers is None or family.tower_flops is None or family.connector_flops is None:
        raise ValueError(f"no FLOPs formula for the tower of model type {family.model_type!r}")
    costs: TowerCosts = replace(family.costs.layers(config), view_token=0)
    reducer = 0
    for layer, (entering, left) in enumerate(itertools.pairwise(schedule.tokens)):
        if entering > left and layer != schedule.output:
            window = costs.windows[layer] if costs.windows else None
            reducer += _layer(config, family, method, costs, entering, entering - left, window, one_softmax)
    behind = behind_cells(schedule)
    return (
        family.tower_flops(config)[0],
        costs.tower(schedule.tokens, schedule.output is not None),
        reducer + merging_flops(config.get_text_config().hidden_size, behind, method),
        family.connector_flops(config, behind.tokens[0]),
    )


def _layer(
    config: Any,
    family: Family,
    method: Method,
    costs: TowerCosts,
    cells: int,
    removed: int,
    window: tuple[int, int] | None,
    one_softmax: bool,
) -> int:
    """What the reduction adds to one layer: the matching of cells by the mean of their patches' keys, and where asked
    for the importance of the patches (as ``costs.flops`` says for plain towers)."""
    heads = config_at(config, family.vision_config).num_heads
    windows = 1 if window is None else window[1] // window[0]
    each = max(1, round(cells / windows))
    matched = min(windows, removed)
    total = matched * matching_flops(method, each, costs.width // heads, min(each // 2, -(-removed // windows)))
    if method.needs_importance:
        patches, attended = cells * costs.block, each * costs.block
        total += 2 * patches * attended * (2 * heads + (0 if one_softmax else costs.width))
    return total
