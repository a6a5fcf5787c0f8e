"""InstructBLIP and InstructBlipVideo: BLIP-2 whose Q-Former also reads the instruction.

Tokens merge inside the ViT, separately for each frame of a video. The language model gets 32 features per image or
frame as before. Text cross tokens are in the Q-Former's text side, in the first token after its query tokens. They are
compared with the vision cross tokens in the Q-Former's width. The language model is not changed.
"""

from __future__ import annotations

from typing import Any

from mllm_crossget.arithmetic.flop_formulas import attention_flops
from mllm_crossget.families.blip2 import (
    Q_FORMER_INPUT,
    connector_flops,
    language_layers,
    self_attention_block_flops,
    vit_geometry,
)
from mllm_crossget.families.family import (
    INSTRUCTBLIP_TOWER,
    INSTRUCTBLIPVIDEO_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    TextSide,
    TowerKind,
    VisionSide,
    register_family,
)


def text_side(config: Any) -> TextSide:
    """The Q-Former, whose text follows its query tokens."""
    skip = config.num_query_tokens
    return TextSide("qformer", "encoder.layer", config="qformer_config", skip=skip, keyword="qformer_")


def connector_text_flops(config: Any, text_tokens: int) -> int:
    """FLOPs that the instruction adds to the Q-Former: its own rows, and the attention between queries and text."""
    former, queries = config.qformer_config, config.num_query_tokens
    seen_by_each_other = 2 * attention_flops(queries, text_tokens, former.hidden_size)
    return former.num_hidden_layers * (self_attention_block_flops(former, text_tokens) + seen_by_each_other)


def _family(model_type: str, tower: TowerKind, unit: str) -> Family:
    return Family(
        model_type=model_type,
        vision=VisionSide(
            tower="vision_model",
            config="vision_config",
            geometry=vit_geometry(tower),
            kinds=(tower,),
            projector="language_projection",
            dynamic=True,
            readers=("qformer",),
        ),
        language=LanguageSide(
            model="language_model",
            text_side=text_side,
            layers=language_layers,
        ),
        crossing=CrossPaths(vision=Q_FORMER_INPUT),
        costs=FamilyCosts(
            llm_tokens=lambda config, features: int(config.num_query_tokens),
            connector=connector_flops,
            connector_text=connector_text_flops,
        ),
        docs=FamilyDocs(
            note=(
                "inside the vision tower; the Q-Former attends to the merged tokens, the language model still gets 32 "
                f"per {unit}"
            ),
            exact="rows of ragged batches alone or together; Llama and T5, greedy and beams; no reference vectors "
            "exist",
        ),
    )


INSTRUCTBLIP = register_family(_family("instructblip", INSTRUCTBLIP_TOWER, "image"))
INSTRUCTBLIPVIDEO = register_family(_family("instructblipvideo", INSTRUCTBLIPVIDEO_TOWER, "frame"))
