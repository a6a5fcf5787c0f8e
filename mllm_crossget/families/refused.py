"""Model types that are not supported, each with the reason that ``unsupported_reason`` and the table of families give.

Each reason follows from the code of transformers 5.23. It names an identifier in the file that was read, and a test
checks that the file still has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mllm_crossget.families.family import refuse_family


@dataclass(frozen=True)
class Refusal:
    """Why a model type is refused.

    Args:
        reason: for messages and tables.
        evidence: identifier in transformers' ``modeling_<model type>.py``.
        file: the model type of that file, if it is another one.
    """

    reason: str
    evidence: str
    file: str = ""


_TIMM = "its vision tower is a timm model, which has no transformer layers of transformers' to merge tokens in"
_CODEBOOK = (
    "it has no vision transformer: a convolutional encoder turns images into words of a codebook, and the language "
    "model reads the embeddings of these words"
)

_OMNI = (
    "a part of it, the thinker, reads the pictures, beside audio that shares the count of 3-D positions and may lie "
    "between the frames of a video; the talker then reads the thinker's states token by token, and none of this is "
    "written and tested for fewer tokens"
)

REFUSED = {
    "mllama": Refusal(
        "the language model cross-attends to tiles, with a mask that has a fixed number of patches for each; there are "
        "no placeholders that could be fewer",
        "num_vision_tokens: int",
    ),
    "gemma3n": Refusal(f"{_TIMM} (MobileNet, mostly convolutions)", "self.vision_tower = AutoModel.from_config("),
    "fast_vlm": Refusal(f"{_TIMM} (mostly convolutions)", "self.vision_tower = AutoModel.from_config("),
    "florence2": Refusal(
        "its tower attends in windows and over channels and keeps the patch grid from stage to stage",
        "class Florence2VisionChannelAttention",
    ),
    "fuyu": Refusal(
        "it has no vision tower: one matrix takes patches of pixels to the width of the language model",
        "self.vision_embed_tokens = nn.Linear(",
    ),
    "chameleon": Refusal(_CODEBOOK, "class ChameleonVQVAEEncoder("),
    "emu3": Refusal(_CODEBOOK, "class Emu3VQVAEEncoder("),
    "gemma4_unified": Refusal(
        "it has no vision tower: a few matrices take patches of pixels to the width of the language model",
        "class Gemma4UnifiedVisionEmbedder(",
    ),
    "ernie4_5_vl_moe": Refusal(
        "its tower packs all images into one sequence, a resampler merges 2x2 blocks of the patch grid and pairs of "
        "frames, and the experts of its language model are chosen by a mask of the visual tokens; none of this is "
        "written and tested for fewer tokens",
        "class Ernie4_5_VLMoeVariableResolutionResamplerModel(",
    ),
    "siglip2": Refusal(
        "its tower takes images of any size, padded to one length, and a pooling head reads them with the mask of that "
        "padding; a head on fewer tokens of several sizes is not written and tested (checkpoints of one size have the "
        "type 'siglip', which is served)",
        "self.head(last_hidden_state, pixel_attention_mask)",
    ),
    "qwen2_5_omni": Refusal(_OMNI, "thinker_result.hidden_states"),
    "qwen3_omni_moe": Refusal(_OMNI, "thinker_result.hidden_states"),
}

for _model_type, _refusal in REFUSED.items():
    refuse_family(_model_type, _refusal.reason)
