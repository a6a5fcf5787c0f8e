"""FLOPs of the families whose tokens are merged (once more) behind the projector, against torch's counter."""

from __future__ import annotations

import pytest

from mllm_crossget import CrossGetConfig, accelerate_mllm
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.families.qwen_vl import EXAMPLE_SIDE
from tests.helpers.families.case_grid import BUILDS, alone
from tests.helpers.families.case_packed import BUILDS as ONE_SIZE
from tests.helpers.families.case_packed import WHOLE, flat, prompt_of
from tests.helpers.families.case_packed import alone as packed_alone
from tests.helpers.families.case_qwen import batch_from
from tests.helpers.flops import counted, first_token
from tests.helpers.methods import FIXED
from tests.helpers.products import pairwise
from tests.helpers.tiny_grid import QWEN_VISION, tiny_qwen

SAME_TOWER = ("qwen3_vl_moe", "qwen3_5_moe", "glm46v", "glm_ocr")  # as another, with another language model
DIALS = [{"keep_ratio": 1.0}, {"keep_ratio": 0.5}, {"visual_tokens": 3}]


@pairwise(family=sorted(BUILDS), method=FIXED, dial=DIALS)
def test_grid_families(family: str, method: str, dial: dict) -> None:
    build, batch_of = BUILDS[family]
    model = build()
    batch = alone(batch_of(model), 2)  # one tile
    config = method_class(method)(**dial)
    accelerate_mllm(model, config)
    text = int((batch["input_ids"] != model.config.image_token_id).sum())
    flops = model_flops(model.config, config, text_tokens=text, one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == pytest.approx(flops.total, rel=0.01)
    assert (flops.reducer > 0) == (dial != {"keep_ratio": 1.0} and method != "random")


@pytest.mark.parametrize("family", sorted(WHOLE))
@pytest.mark.parametrize("dial", DIALS)
def test_towers_that_make_cells_themselves(family: str, dial: dict) -> None:
    model = ONE_SIZE[family][0]()
    sizes = flat(family)
    batch = packed_alone(prompt_of(model, ONE_SIZE[family][1](sizes)), 2)  # one image
    config = CrossGetConfig(**dial)
    accelerate_mllm(model, config)
    text = int((batch["input_ids"] != model.config.image_token_id).sum())
    flops = model_flops(model.config, config, text_tokens=text, one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == pytest.approx(flops.total, rel=0.01)


@pytest.mark.parametrize("model_type", sorted(QWEN_VISION))
def test_qwen_on_the_example_image(model_type: str) -> None:
    model = tiny_qwen(model_type=model_type)
    model.set_experts_implementation("eager")  # torch's counter sees no grouped products
    side = 2 * EXAMPLE_SIDE
    batch = batch_from([[(1, side, side)]])
    config = CrossGetConfig(visual_tokens=100)
    accelerate_mllm(model, config)
    text = int((batch["input_ids"] != model.config.image_token_id).sum())
    flops = model_flops(model.config, config, text_tokens=text, one_softmax=True)
    assert counted(lambda: first_token(model, batch)) == pytest.approx(flops.total, rel=0.01)
    if model_type in SAME_TOWER:
        return
    vision = flops.patch_embedding + flops.encoder + flops.projector + flops.reducer
    grid = batch["image_grid_thw"]
    assert counted(lambda: model.model.get_image_features(batch["pixel_values"], grid)) == pytest.approx(
        vision, rel=0.01
    )
