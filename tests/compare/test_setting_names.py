"""Which settings a model can serve: asked of its configuration alone, before anything runs."""

from __future__ import annotations

import pytest
import transformers

from mllm_crossget.compare.setting_names import UNTOUCHED, chosen_methods, named_method
from mllm_crossget.config import method_names
from tests.helpers.tiny_grid import tiny_qwen


def test_names_with_endings() -> None:
    assert named_method("tome", 0.25).to_dict()["keep_ratio"] == 0.25
    assert named_method("visionzip-published", 0.25).is_published
    assert named_method("random-drop", 0.25).to_dict()["drop"] is True
    for name in ("nonsense", "nonsense-published"):
        with pytest.raises(ValueError, match=f"unknown method '{name}'"):
            named_method(name, 0.5)


def test_all_that_a_model_can_serve() -> None:
    """What selects at the output of a tower cannot act where the projector needs the whole grid."""
    found, left_out = chosen_methods(tiny_qwen().config, [], [0.5, 0.25])
    assert list(found)[:3] == [UNTOUCHED, "crossget 0.5", "crossget 0.25"]
    assert "tower output, which is not possible" in left_out["visionzip"]
    assert "number of tokens per image" in left_out["madtp"]
    served = {name.rpartition(" ")[0] for name in found} - {""}
    assert served | left_out.keys() == {*method_names()}
    assert not served & left_out.keys()
    assert found[UNTOUCHED].is_identity


def test_a_named_method_must_be_possible() -> None:
    config = tiny_qwen().config
    found, left_out = chosen_methods(config, ["tome"], [0.5])
    assert (list(found), left_out) == ([UNTOUCHED, "crossget 0.5", "tome 0.5"], {})
    with pytest.raises(ValueError, match=r"'visionzip' is not possible here: .*leave it out of methods"):
        chosen_methods(config, ["tome", "visionzip"], [0.5])
    with pytest.raises(ValueError, match="'madtp' is not possible here: it chooses"):
        chosen_methods(config, ["madtp"], [0.5])
    with pytest.raises(ValueError, match="is not supported"):
        chosen_methods(transformers.BertConfig(), ["tome"], [0.5])
