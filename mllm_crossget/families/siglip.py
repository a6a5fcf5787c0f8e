"""SigLIP's dual encoder (``SiglipModel``).

It differs from CLIP as follows. The vision tower has no class token, its cross token starts as the mean of the patches,
and the pooling head counts a merged token as often as it has patches. The text tower is bidirectional, and the
embedding is read from the last column, which is usually padding. That token is protected and guides the matching, and
the cross token starts as its copy. SigLIP is trained on texts padded to the full length without a mask; attention masks
with zeros are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.family import (
    SIGLIP_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    TextTower,
    VisionSide,
    register_family,
)
from mllm_crossget.families.tower_geometry import read_at_the_end
from mllm_crossget.schedule import TowerGeometry


def last_token(text_config: Any, input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B,) the last column."""
    del text_config
    return torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)


def geometry(config: Any) -> TowerGeometry:
    """Geometry of the vision tower of a ``SiglipConfig``.

    Raises:
        ValueError: a tower without a pooling head, and so without an image embedding.
    """
    vision = config.vision_config
    if not getattr(vision, "vision_use_head", True):
        raise ValueError(
            "vision_use_head=False: the vision tower has no pooling head and gives no image embedding; load the tower "
            "alone (SiglipVisionModel)"
        )
    return read_at_the_end(SIGLIP_TOWER)(config)


def head_flops(config: Any, features: int) -> int:
    """FLOPs of the text head on one token; the vision tower's pooling head is counted with its encoder."""
    del features
    text = config.text_config
    return linear_flops(1, text.hidden_size, text.projection_size)


SIGLIP = register_family(
    Family(
        model_type="siglip",
        classes=("SiglipModel",),
        vision=VisionSide(
            tower="vision_model",
            config="vision_config",
            geometry=geometry,
            kinds=(SIGLIP_TOWER,),
            dynamic=True,
            cosine=True,
        ),
        language=LanguageSide(
            text_tower=TextTower("text_model", "text_config", last_token, causal=False, first=False, takes_mask=False)
        ),
        crossing=CrossPaths(
            vision=("vision_model.post_layernorm", "vision_model.head"),
            text=("text_model.final_layer_norm", "text_model.head"),
        ),
        costs=FamilyCosts(connector=head_flops),
        docs=FamilyDocs(
            note="inside the vision tower, and inside the text tower with text_r or text_keep_ratio",
            exact="no published reference: CLIP's rules, the pooling head weighs merged tokens by their patches",
        ),
    )
)
