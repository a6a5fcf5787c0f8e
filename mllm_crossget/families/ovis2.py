"""Ovis 2: a tower whose output is a mixture of visual words, from squares of the patch grid; Qwen2.

Tokens merge inside the tower. Its own forward makes a cell of every square of patches, so every token is copied back to
its patches after the last layer. The embeddings of the cells' words are merged again, separately for each tile.
``visual_tokens`` counts tokens per tile. The marks around tiles are kept.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
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

OVIS2_TOWER = TowerKind(
    "ovis2_vision",
    prefix=0,
    encoder="transformer.encoder",
    names=LayerNames(norm1="rms_norm1", attention="attention", norm2="rms_norm2", mlp="ffn"),
)


def cells_of_tile(config: Any) -> int:
    """Number of cells of a tile: squares of ``hidden_stride`` patches a side.

    Raises:
        ValueError: a tower that draws its words by chance, or a grid without whole squares, which the stock model
            cannot run either.
    """
    vision = config.vision_config
    if vision.tokenize_function == "gumbel_argmax":
        raise ValueError(
            "tokenize_function='gumbel_argmax' draws visual words by chance in every call, so a picture's features are "
            "never the same twice; use 'softmax' or 'st_argmax'"
        )
    side = vision.image_size // vision.patch_size
    if side % vision.hidden_stride:
        raise ValueError(
            f"{side} patches a side are no whole squares of hidden_stride={vision.hidden_stride}; choose an image_size "
            f"that is a multiple of {vision.hidden_stride * vision.patch_size} pixels"
        )
    return int(side // vision.hidden_stride) ** 2


def tower_flops(config: Any) -> tuple[int, int]:
    """FLOPs of patch embedding and of layers on one tile; the layers' MLP is gated."""
    vision = config.vision_config
    patches, width = patches_per_image(vision), vision.hidden_size
    layer = 4 * linear_flops(patches, width, width) + attention_flops(patches, patches, width)
    layer += 3 * linear_flops(patches, width, vision.intermediate_size)
    return linear_flops(patches, vision.num_channels * vision.patch_size**2, width), vision.num_hidden_layers * layer


def words_flops(config: Any, features: int) -> int:
    """FLOPs of the matrix that makes logits of visual words, and of the mixture of these words' embeddings."""
    vision = config.vision_config
    words = vision.vocab_size - vision.num_visual_indicator_tokens
    logits = linear_flops(features, vision.hidden_size * vision.hidden_stride**2, words)
    return logits + linear_flops(features, vision.vocab_size, config.hidden_size)


OVIS2 = register_family(
    Family(
        model_type="ovis2",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=read_at_the_end(OVIS2_TOWER, owner="Ovis 2", cells=cells_of_tile),
            kinds=(OVIS2_TOWER,),
            projector="model.visual_embeddings_table",
        ),
        prompt=PromptSide(owner="model", kind=FeatureKind.PADDED_GRID, modalities=(Modality(),)),
        language=LanguageSide(model="model.language_model"),
        costs=FamilyCosts(connector=words_flops, tower=tower_flops),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; copied back to the grid, and merged again as embeddings of "
            "visual words",
            exact="prompts compacted by hand; no alignment loss in training",
        ),
    )
)
