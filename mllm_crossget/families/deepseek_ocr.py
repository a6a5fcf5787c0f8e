"""DeepSeek-OCR 2: SAM's tower, a language model as an encoder whose queries read its map, one matrix, DeepSeek-V2.

An image is tiles of 144 queries each, where it is large, a global view of 256 (144 up to 768 pixels) and a separator.
There is no layer whose tokens could become fewer without the queries; these are merged behind the projector, each tile
and each view by itself, and the separator stays. Text is lost with the tokens it is read from.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.families.behind_projector import BEHIND_EXACT, behind_projector
from mllm_crossget.families.family import FamilyCosts, FamilyDocs, register_family
from mllm_crossget.families.modality import Modality
from mllm_crossget.flop_formulas import linear_flops

_SMALL, _LARGE = 144, 256  # queries, by the number of patches that SAM's tower leaves
_STEPS = 4  # two convolutions behind SAM's tower halve its map


def tokens_of_parts(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Placeholders of every part of every image: its tiles, its global view, the separator behind it."""
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
    """One matrix."""
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
