"""Families whose tower is left alone, because it packs or pads images of any size or keeps their grid: tokens are
merged behind the projector.

Every image (tile, frame) is merged by itself. Images have different numbers of tokens: ``keep_ratio`` is a share of
each, ``visual_tokens`` a limit per image that small ones stay below. Image tokens have positions like words.
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
    """Geometry of a family whose images have as many tokens as their size gives.

    Args:
        example: configuration -> tokens of the image that tables and ``inspect`` show.
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
    """A family whose features ``model.get_image_features`` gives image by image, and which are merged there.

    Args:
        model_type: see ``Family``.
        tower: model type of the tower.
        modalities: see ``PromptSide``; with ``counts``.
        example: see ``of_any_size``.
        costs: formulas for the example image.
        path, projector: of the tower and of what reads it.
        kind: see ``PromptSide``.
        docs: None for the usual ones.
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
