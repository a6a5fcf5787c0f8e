"""Families whose tower is not changed, because it packs or pads images of any size, or needs their grid. Tokens are
merged behind the projector.

Each image (tile, frame) is merged separately. Images have different numbers of tokens: ``keep_ratio`` is a share of
each, and ``visual_tokens`` is a limit per image, which small images do not reach. Image tokens have contiguous
positions, like words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mllm_crossget.families.family import (
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    TowerKind,
    VisionSide,
)
from mllm_crossget.families.modality import Modality
from mllm_crossget.schedule import MergeGeometry

BEHIND_NOTE = "behind the projector, each image by itself; the vision tower is left alone"
BEHIND_EXACT = "prompts compacted by hand; no cross tokens (crossget runs without learned parameters)"


def of_any_size(example: Callable[[Any], int]) -> Callable[[Any], MergeGeometry]:
    """Geometry of a family whose number of tokens per image depends on the image's size.

    Args:
        example: configuration -> number of tokens of the example image in tables and ``inspect``.
    """

    def geometry(config: Any) -> MergeGeometry:
        return MergeGeometry(example(config), fixed=False)

    return geometry


def behind_projector(
    model_type: str,
    tower: str,
    modalities: tuple[Modality, ...],
    example: Callable[[Any], int],
    costs: FamilyCosts,
    *,
    path: str = "model.vision_tower",
    projector: str = "model.multi_modal_projector",
    kind: FeatureKind = FeatureKind.MERGED,
    docs: FamilyDocs | None = None,
) -> Family:
    """A family whose features are merged in ``model.get_image_features``, separately for each image.

    Args:
        model_type: see ``Family``.
        tower: model type of the tower.
        modalities: see ``PromptSide``; with ``counts``.
        example: see ``of_any_size``.
        costs: formulas for the example image.
        path, projector: paths of the tower and of the module that reads it.
        kind: see ``PromptSide``.
        docs: None for the default text.
    """
    return Family(
        model_type=model_type,
        vision=VisionSide(
            tower=path,
            config="vision_config",
            geometry=of_any_size(example),
            kinds=(TowerKind(tower, prefix=0, encoder=""),),
            projector=projector,
        ),
        prompt=PromptSide(owner="model", kind=kind, modalities=modalities),
        language=LanguageSide(model="model.language_model"),
        costs=costs,
        docs=docs or FamilyDocs(note=BEHIND_NOTE, exact=BEHIND_EXACT),
    )
