"""Stages in families whose towers merge cells, pack images, or have a merging behind the projector."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchFeature

from mllm_crossget import ToMeConfig
from mllm_crossget.look.stages import attention_received, follow
from mllm_crossget.methods.rivals import CdPrunerConfig
from tests.helpers.matrix import CASES


class Numbers:
    """A processor that writes ids as numbers."""

    def decode(self, ids: torch.Tensor, **_: object) -> str:
        return str(ids.tolist())


# family -> row of its batch with pictures of one size, (rows, columns) of the first and the last stage, read layers
GRIDS = {
    "internvl": (0, (8, 8), (4, 4), 2),
    "mistral3": (2, (4, 10), (2, 5), 2),
    "qwen2_5_vl": (2, (2, 3), (2, 3), 2),
    "onevision-tiled": (0, (4, 4), (4, 4), 4),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_and_counts(name: str) -> None:
    row, first, last, read = GRIDS[name]
    case = next(case for case in CASES if case.name == name)
    model = case.build("sdpa")
    inputs = BatchFeature(case.row(case.batch(model), row))
    followed = follow(model, Numbers(), inputs, ToMeConfig(keep_ratio=0.5), new_tokens=2)
    stages = followed.stages
    assert (stages[0].rows, stages[0].columns) == first
    assert (stages[-1].rows, stages[-1].columns) == last
    assert [stage.name for stage in stages] == ["input", *(f"layer {n + 1}" for n in range(read)), "language model"]
    assert stages[0].tokens == first[0] * first[1]
    assert stages[-1].tokens == last[0] * last[1] // 2
    counts = [stage.tokens for stage in stages]
    assert counts == sorted(counts, reverse=True)
    before = stages[0]
    for stage in stages[1:-1]:  # what is together stays together
        pairs = set(zip(before.groups, stage.groups, strict=True))
        assert len(pairs) == before.tokens
        before = stage


def test_a_selection_behind_the_projector_leaves_the_tower_alone() -> None:
    case = next(case for case in CASES if case.name == "qwen2_5_vl")
    model = case.build("sdpa")
    inputs = BatchFeature(case.row(case.batch(model), 2))
    followed = follow(model, Numbers(), inputs, CdPrunerConfig(keep_ratio=0.5), new_tokens=1)
    assert [stage.tokens for stage in followed.stages] == [6, 6, 6, 3]
    assert followed.stages[-1].groups.count(-1) == 3
    assert attention_received(model, lambda: model(**inputs)) is None


def test_pictures_of_several_sizes_are_refused() -> None:
    case = next(case for case in CASES if case.name == "qwen2_5_vl")
    model = case.build("sdpa")
    inputs = BatchFeature(case.row(case.batch(model), 0))
    with pytest.raises(ValueError, match=r"images of \[4, 12\] tokens"):
        follow(model, Numbers(), inputs, ToMeConfig(keep_ratio=0.5), new_tokens=1)
