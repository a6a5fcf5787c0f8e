"""Model types that no list names get a sentence from their configuration."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from mllm_crossget import unsupported_reason
from mllm_crossget.costs.family_table import other_rows, refused_rows, served_rows
from mllm_crossget.families.family import families
from mllm_crossget.unlisted import picture_types, reason_of_type

SAID = {
    "whisper": "it takes no pictures: audio only",
    "bert": "it takes no pictures: its configuration has no vision part",
    "got_ocr2": "not written yet: the layers of its vision tower ('",
    "shieldgemma2": "its vision tower ('siglip_vision_model') is one that is served",
    "pi0": "a part of it reads the pictures ('vlm_config' of its configuration)",
    "vit": "it is a vision model without a text side",
}


@pytest.mark.parametrize("model_type", sorted(SAID))
def test_the_configuration_says_why(model_type: str) -> None:
    model = nn.Linear(1, 1)
    model.config = CONFIG_MAPPING[model_type]()
    reason = unsupported_reason(model)
    assert SAID[model_type] in reason
    assert SAID[model_type] in reason_of_type(model_type)
    assert ":dual" not in reason, "a key of the registry is not for readers"
    assert "supported model types: aria, " in reason


def test_every_picture_taking_type_is_served_or_has_a_reason() -> None:
    served = {family.model_type for family in families().values()}
    named = {name for name, _ in refused_rows()} | {name for name, _ in other_rows()}
    assert not served & named
    assert set(picture_types()) <= served | named
    assert len(picture_types()) > 80
    assert all(reason for _, reason in other_rows())


def test_titles_are_for_readers() -> None:
    titles = [row[0] for row in served_rows()]
    assert not any(":" in title for title in titles)
    assert len(set(titles)) == len(titles) == len(families())


def test_a_name_that_transformers_does_not_know() -> None:
    with pytest.raises(ValueError, match="knows no model type 'qwen9'"):
        reason_of_type("qwen9")
