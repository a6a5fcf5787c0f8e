"""Model types that cannot be served, each with the reason; ``unsupported_reason`` and the table of families say it.

What each reason says was read in transformers 5.23; the class to look at is named.
"""

from __future__ import annotations

from mllm_crossget.families.base import refuse_family

_TIMM = "its vision tower is a timm model, which has no transformer layers of transformers' to merge tokens in"

REFUSED = {
    # Mistral3PatchMerger: unfold over the grid that image_sizes gives
    "mistral3": (
        "its tower packs all images into one sequence with a block mask and positions from the patch grid, and squares "
        "of patches are merged by that grid"
    ),
    # MllamaVisionModel.num_patches, _prepare_cross_attention_mask(num_vision_tokens)
    "mllama": (
        "the language model cross-attends to tiles, with a mask that has a fixed number of patches for each; there are "
        "no placeholders that could be fewer"
    ),
    "gemma3n": f"{_TIMM} (a convolutional network)",
    "fast_vlm": f"{_TIMM} (mostly convolutions)",
    "perception_lm": f"{_TIMM}, and the square grid of patches is pooled behind it",
    # Ovis2VisionModel.forward: hidden_stride, "Token sequence length must be a perfect square"
    "ovis2": (
        "its tower makes visual words from squares of the patch grid inside of its own forward, so merged tokens would "
        "have no place"
    ),
    "florence2": "its tower attends in windows and over channels and keeps the patch grid from stage to stage",
    "fuyu": "it has no vision tower: patches go into the language model directly",
    "chameleon": "it has no vision transformer: images become words of a codebook",
    "emu3": "it has no vision transformer: images become words of a codebook",
}

for _model_type, _reason in REFUSED.items():
    refuse_family(_model_type, _reason)
