"""Llama 4: a tower with rotary positions and a class token behind its patches, pixel shuffle, an MLP, one matrix.

Tokens merge inside the tower; a merged token has the place of the one that is kept. The tower's own forward shuffles
squares of patches into channels, so every token is copied back to its patches after the last layer. The cells are
merged again in front of the last matrix, separately for each tile. ``visual_tokens`` counts tokens per tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import linear_flops, vit_flops
from mllm_crossget.arithmetic.language_flops import language_costs
from mllm_crossget.families.family import (
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    LayerNames,
    PromptSide,
    TowerKind,
    VisionSide,
    patches_per_image,
    register_family,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.families.tower_geometry import read_at_the_end


class Turns:
    """Turns of every image's own tokens, where the stock attention takes those that all images share.

    Args:
        table: (B, T, 2 ·) real and imaginary parts in turns.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def view(self, *shape: int) -> Tensor:
        """(B, T, 1, ·) complex; the stock attention asks for (1, T, 1, ·)."""
        pairs = self._table.unflatten(-1, (shape[-1], 2)).contiguous()
        return torch.view_as_complex(pairs)[:, :, None]


def by_turns(tables: tuple[Tensor, ...]) -> dict[str, Any]:
    """Arguments of the attention."""
    return {"freqs_ci": Turns(tables[0])}


LLAMA4_TOWER = TowerKind(
    "llama4_vision_model",
    prefix=1,
    encoder="model",
    names=LayerNames(norm1="input_layernorm", norm2="post_attention_layernorm", rotary=by_turns),
)


def cells_of_tile(config: Any) -> int:
    """Number of cells that pixel shuffle makes of a tile."""
    vision = config.vision_config
    return round(patches_per_image(vision) * vision.pixel_shuffle_ratio**2)


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on one tile, with its class token."""
    vision, patches = config.vision_config, patches_per_image(config.vision_config)
    inputs = vision.num_channels * vision.patch_size**2
    return linear_flops(patches, inputs, vision.hidden_size), vit_flops(vision, patches + 1)


def adapter_flops(config: Any, features: int) -> int:
    """FLOPs of two matrices behind pixel shuffle."""
    vision = config.vision_config
    first = linear_flops(features, vision.intermediate_size, vision.projector_input_dim)
    return first + linear_flops(features, vision.projector_output_dim, vision.projector_output_dim)


def language_flops(config: Any, visual: int, text: int, new_tokens: int) -> tuple[int, int, int]:
    """FLOPs of the language model, and in the prefill those of the matrix in front of it on the visual tokens."""
    costs = language_costs(config.text_config, visual + text, new_tokens)
    matrix = linear_flops(visual, config.vision_config.vision_output_dim, config.text_config.hidden_size)
    return costs.prefill + matrix, costs.lm_head, costs.decode


LLAMA4 = register_family(
    Family(
        model_type="llama4",
        vision=VisionSide(
            tower="vision_model",
            config="vision_config",
            geometry=read_at_the_end(LLAMA4_TOWER, owner="Llama 4", cells=cells_of_tile),
            kinds=(LLAMA4_TOWER,),
            projector="multi_modal_projector",
        ),
        prompt=PromptSide(owner="", kind=FeatureKind.CLASS_LAST_GRID, modalities=(Modality(),)),
        language=LanguageSide(model="language_model.model"),
        costs=FamilyCosts(connector=adapter_flops, tower=tower_flops, language=language_flops),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; copied back to the grid, and merged again in front of the "
            "projector",
            exact="prompts compacted by hand; no alignment loss in training",
        ),
    )
)
