"""What a method saves on one picture: tokens as the processors make them, shares as ``model_flops`` says."""

from __future__ import annotations

import pytest
import transformers

from mllm_crossget import CrossGetConfig
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.picture import PIXELS, TILES, default_config, saving_of, square_picture
from mllm_crossget.families.family import families

PROCESSORS = {
    "aya_vision": "GotOcr2ImageProcessorPil",
    "idefics3": "Idefics3ImageProcessorPil",
    "internvl": "GotOcr2ImageProcessorPil",
    "smolvlm": "SmolVLMImageProcessorPil",
}  # those that count without torchvision


@pytest.mark.parametrize("model_type", sorted(PROCESSORS))
def test_as_many_tiles_as_the_processor_makes(model_type: str) -> None:
    try:
        processor = getattr(transformers, PROCESSORS[model_type])()
    except ImportError as error:  # transformers before 5.23
        pytest.skip(f"this processor needs torchvision: {error}")
    counted = processor.get_number_of_image_patches(PIXELS, PIXELS, {})
    assert TILES.get(model_type, 1) == (counted[0] if isinstance(counted, tuple) else counted)


@pytest.mark.parametrize("model_type", ["glm4v", "paddleocr_vl"])
def test_as_many_cells_as_the_processor_makes(model_type: str) -> None:
    name = {"glm4v": "Glm4vImageProcessorPil", "paddleocr_vl": "PaddleOCRVLImageProcessorPil"}[model_type]
    patches = getattr(transformers, name)().get_number_of_image_patches(PIXELS, PIXELS, {})
    assert saving_of(families()[model_type], CrossGetConfig(keep_ratio=0.5)).before == patches // 4


def test_the_share_is_that_of_all_tiles() -> None:
    method, family = CrossGetConfig(keep_ratio=0.25), families()["idefics3"]
    config = square_picture(default_config("idefics3"))
    before, after = (model_flops(config, kind, images=17) for kind in (CrossGetConfig(keep_ratio=1.0), method))
    saved = before.encoder + before.prefill - after.encoder - after.prefill - after.reducer
    assert saving_of(family, method).share == pytest.approx(saved / (before.encoder + before.prefill))
