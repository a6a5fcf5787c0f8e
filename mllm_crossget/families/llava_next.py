"""LLaVA-NeXT (LLaVA-1.6): an image is a base image and a grid of tiles, each encoded separately by the tower.

Tokens merge inside the tower, tile by tile. The stock model's later steps are kept: grid, unpadding, a newline vector
after every row of patches. A merged token appears once, at the place of its first patch that is not padding. So

* a token whose patches are all in the padding that the stock model cuts off does not reach the language model;
* a newline is kept if its row of patches still holds a token, and dropped with the row otherwise;
* CrossGET's cross token of the base image follows the base image's tokens; those of the tiles are dropped.

The number of features depends on the content of the image, so images are encoded once, before the prompt is compacted.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.families.family import (
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    VisionSide,
    patches_per_image,
    register_family,
)
from mllm_crossget.families.llava import TOWERS, geometry, layered, layered_geometry, two_layer_projector_flops
from mllm_crossget.families.modality import Modality, Tiles
from mllm_crossget.families.tile_packing import layouts, tile_counts
from mllm_crossget.schedule import TowerGeometry

EXACT = "order, unpadding and newlines are the stock packing's; every patch that is not padding is in exactly one token"


def grid_geometry(config: Any) -> TowerGeometry:
    """Geometry of one tile.

    Raises:
        ValueError: as for LLaVA; and if the class token is read like a patch, because it has no place in the grid.
    """
    return _in_a_grid(config, geometry(config))


def layered_grid_geometry(config: Any) -> TowerGeometry:
    """The same for features concatenated from several layers (Granite Vision)."""
    return _in_a_grid(config, layered_geometry(config))


def _in_a_grid(config: Any, made: TowerGeometry) -> TowerGeometry:
    if made.placeholders != made.patches:
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} reads the class token as a "
            "patch, which does not fit into the grid of patches; use 'default'"
        )
    return made


def require_sizes(kwargs: dict[str, Any]) -> Tensor:
    """(images, 2) height and width of the images in pixels. Raises ``ValueError`` if they are missing."""
    sizes = kwargs.get("image_sizes")
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(
            f"image_sizes must be a tensor (images, 2) of heights and widths, got {sizes!r}; pass what the processor "
            "returns, together with pixel_values"
        )
    return sizes


def parts(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of tiles of each image of a call."""
    return tile_counts(model.model, require_sizes(kwargs), kwargs.get("batch_num_images"))


def counts(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of features of each image of a call in the untouched model."""
    owner, config = model.model, model.config
    stock_layouts = layouts(
        owner.pack_image_features,
        parts(model, kwargs),
        patches_per_image(config.vision_config),
        require_sizes(kwargs),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return [len(layout) for layout in stock_layouts]


def square_tiles(config: Any, most: float = float("inf")) -> Tiles:
    """Tiles of a square image: the base image and the largest square grid of the model, with a newline after every row.

    Args:
        config: configuration of the model.
        most: largest number of tiles in the grid.
    """
    size = config.vision_config.image_size
    sides = [height // size for height, width in config.image_grid_pinpoints if height == width]
    side = max((side for side in sides if side * side <= most), default=1)
    return Tiles(1 + side * side, side * (size // config.vision_config.patch_size))


IMAGE = Modality(ndim=(5, 4), arguments=("image_sizes",), counts=counts, parts=parts)

LLAVA_NEXT = register_family(
    Family(
        model_type="llava_next",
        vision=VisionSide(
            tower="model.vision_tower",
            config="vision_config",
            geometry=grid_geometry,
            kinds=TOWERS,
            projector="model.multi_modal_projector",
            view=("model.multi_modal_projector",),
        ),
        prompt=PromptSide(
            owner="model",
            kind=FeatureKind.GRID,
            modalities=(IMAGE,),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(vision=("model.multi_modal_projector",)),
        costs=FamilyCosts(
            tiles=square_tiles,
            connector=two_layer_projector_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; each token stands where its first patch stood",
            exact=EXACT,
        ),
    )
)

LLAVA_NEXT_LAYERS = register_family(layered(LLAVA_NEXT, layered_grid_geometry, FeatureKind.CONCATENATED_GRID))
