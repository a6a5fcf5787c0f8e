"""What ``Collator`` does for models whose projectors want a grid of patches."""

from __future__ import annotations

import pytest
import torch

from mllm_crossget import accelerate_mllm
from mllm_crossget.training import Collator
from tests.helpers.tiny import PAD
from tests.helpers.tiny_grid import tiny_idefics3, tiny_internvl


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_the_collator_refuses_rows_of_tiles(model_type: str) -> None:
    model = accelerate_mllm(tiny_idefics3(model_type=model_type), keep_ratio=0.5)
    with pytest.raises(ValueError, match="data_collator with the model's processor"):
        Collator(model, PAD)


def test_the_collators_dummy_has_internvls_size() -> None:
    """Its configuration gives height and width."""
    model = accelerate_mllm(tiny_internvl(), keep_ratio=0.5)
    batch = Collator(model, PAD)([{"input_ids": torch.tensor([1, 5, 6]), "labels": torch.tensor([-100, 5, 6])}])
    assert batch["pixel_values"].shape == (1, 3, 56, 56)
    batch.pop("dummy_image")
    assert torch.isfinite(model(**batch).loss)
