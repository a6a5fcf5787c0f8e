"""LLaVA-OneVision: single images cut into tiles, several images of one tile each, and videos.

Single images are packed as in ``llava_next``. A merged token appears once, at the place of its first patch that is not
padding. Newlines of rows that hold a token are kept, and the base image's cross token follows its tokens. A row with
several images (``batch_num_images``) has one tile and one newline for each.

For two inputs the stock model computes new vectors from the grid of patches. The grid of an image with many tiles is
resized (``vision_aspect_ratio="anyres_max_9"`` with more than nine tiles), and the frames of videos are pooled. Every
token is then copied back to its patches before that step. The cells after it are merged again, to the share that the
tower keeps (``hooks.projector.pooled_tiles``). A resized grid keeps newlines as above, and a video keeps its one
newline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mllm_crossget.families.family import (
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    FeatureKind,
    LanguageSide,
    PromptSide,
    VisionSide,
    register_family,
)
from mllm_crossget.families.llava import TOWERS, two_layer_projector_flops
from mllm_crossget.families.llava_next import EXACT, grid_geometry, parts, require_sizes, square_tiles
from mllm_crossget.families.modality import Modality, Tiles, all_of
from mllm_crossget.families.tile_packing import layouts


def counts(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of features of each image of a call in the untouched model."""
    owner, config = model.model, model.config
    stock_layouts = layouts(
        owner.pack_image_features,
        parts(model, kwargs),
        grid_geometry(config).patches,
        require_sizes(kwargs),
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    return [len(layout) for layout in stock_layouts]


def video_counts(model: Any, kwargs: dict[str, Any], kept: Callable[[int], int] = all_of) -> list[int]:
    """Number of features of each video: frames of half the height and width, and one newline."""
    vision = model.config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    return [frames * kept(side * side) + 1 for frames in frame_counts(model, kwargs)]


def frame_counts(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """Number of frames of each video of a call."""
    videos = kwargs["pixel_values_videos"]
    return [videos.shape[1]] * videos.shape[0]


def largest_whole_grid(config: Any) -> Tiles:
    """Tiles of the largest square image whose grid the model does not resize."""
    return square_tiles(config, most=int(config.vision_aspect_ratio.removeprefix("anyres_max_")))


IMAGE = Modality(ndim=(5, 4), arguments=("image_sizes", "batch_num_images"), counts=counts, parts=parts)
VIDEO = Modality(
    name="video",
    pixels="pixel_values_videos",
    token="video_token_id",
    encode="get_video_features",
    ndim=(5,),
    counts=video_counts,
    reduced_counts=video_counts,
    parts=frame_counts,
)

LLAVA_ONEVISION = register_family(
    Family(
        model_type="llava_onevision",
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
            kind=FeatureKind.LIMITED_GRID,
            modalities=(IMAGE, VIDEO),
        ),
        language=LanguageSide(model="model.language_model"),
        crossing=CrossPaths(vision=("model.multi_modal_projector",)),
        costs=FamilyCosts(
            tiles=largest_whole_grid,
            connector=two_layer_projector_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower, tile by tile; each token stands where its first patch stood",
            exact=f"{EXACT}; cells of resized grids and of pooled frames are merged again, without cross tokens",
        ),
    )
)
