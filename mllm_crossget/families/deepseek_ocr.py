"""DeepSeek-OCR 2: SAM's tower, a language model as encoder whose queries read SAM's output, one matrix, DeepSeek-V2.

An image has a global view of 256 queries (144 up to 768 pixels) and a separator; a large image also has tiles of 144
queries each. No layer can lose tokens without losing queries, so the queries are merged behind the projector,
separately for each tile and view. The separator is kept. Removed tokens can lose text of the image.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import linear_flops
from mllm_crossget.families.behind_projector import BEHIND_EXACT, behind_projector
from mllm_crossget.families.family import FamilyCosts, FamilyDocs, register_family
from mllm_crossget.families.modality import Modality

_SMALL, _LARGE = 144, 256  # number of queries, which depends on the size of SAM's output
_STEPS = 4  # two convolutions after SAM's tower halve its map, each by 2


def tokens_of_parts(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders of every part of every image: its tiles, its global view, the separator after it."""
    config, counts = model.config, kwargs.get("num_local_patches")
    tiles = [0] * len(kwargs["pixel_values"]) if counts is None else [int(count) for count in counts]
    local, view = (_queries(config, kwargs.get(name)) for name in ("pixel_values_local", "pixel_values"))
    return [part for count in tiles for part in (*[local] * count, view, 1)]


def _queries(config: Any, pixels: Tensor | None) -> int:
    if pixels is None:
        return 0
    side = config.vision_config.sam_config.patch_size * _STEPS
    return _SMALL if (pixels.shape[-2] // side) * (pixels.shape[-1] // side) <= _SMALL else _LARGE


def projector_flops(config: Any, features: int) -> int:
    """FLOPs of one matrix."""
    return linear_flops(features, config.vision_config.encoder_config.hidden_size, config.text_config.hidden_size)


DEEPSEEK_OCR2 = register_family(
    behind_projector(
        "deepseek_ocr2",
        "deepseek_ocr2_vision",
        (Modality(arguments=("pixel_values_local", "num_local_patches"), counts=tokens_of_parts),),
        lambda config: _LARGE,
        FamilyCosts(connector=projector_flops),
        docs=FamilyDocs(
            note="behind the projector, each tile and the global view by itself; the vision tower is left alone; text "
            "is lost with the tokens it is read from",
            exact=BEHIND_EXACT,
        ),
    )
)
