"""PaddleOCR-VL with images of different sizes; positions worked out by hand, as for Qwen-VL."""

from __future__ import annotations

from torch import nn

from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.case_qwen import GRIDS, alone, answers, batch_from, expected, loss
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.tiny_grid import TOWER, VIDEO_TOKEN, VISION_END, VISION_START, tiny


def tiny_paddleocr_vl(attention: str = "sdpa") -> nn.Module:
    """Cells of 2 x 2 patches of 2 x 2 pixels."""
    vision = {**TOWER, "image_size": 16, "patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    marks = {"video_token_id": VIDEO_TOKEN, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return tiny("paddleocr_vl", attention, vision, {"head_dim": 8, "rope_parameters": rope}, **marks)


def batch_of(model: nn.Module) -> Batch:
    batch = batch_from(GRIDS)
    return {**batch, "pixel_values": batch["pixel_values"][:, :12].unflatten(1, (3, 2, 2))}


add_case(
    Case(
        name="paddleocr_vl",
        model_type="paddleocr_vl",
        build=tiny_paddleocr_vl,
        batch=batch_of,
        row=alone,
        answers=answers,
        dial={"keep_ratio": 0.4},
        loss=loss,
        generates=True,
        expected=expected,
        schedule=lambda model: handle_of(model).merge.schedule(4),  # groups of one size, the smallest first
        methods=("crossget",),
    )
)
