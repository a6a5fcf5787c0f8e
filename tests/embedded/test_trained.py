"""The adapters that ship: small, for one keep ratio each, and better than no training."""

from __future__ import annotations

import json

import pytest

from mllm_crossget.embedded import answer, held_out_questions, score
from mllm_crossget.embedded.demo import DemoOptions, run
from mllm_crossget.embedded.trained import ADAPTERS_FOLDER, load_trained, trained_method, trained_ratios

pytest.importorskip(
    "mllm_crossget.training", reason="loading an adapter needs the training extra", exc_type=ImportError
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up


def test_all_adapters_together_are_small_and_name_no_path() -> None:
    files = [path for path in ADAPTERS_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3 * 2**20
    for path in ADAPTERS_FOLDER.glob("*/adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"] == "mllm_crossget/embedded"


@pytest.mark.parametrize("keep_ratio", trained_ratios())
def test_an_adapter_is_of_its_keep_ratio_and_changes_answers_for_the_better(keep_ratio) -> None:
    model, processor = load_trained(keep_ratio)
    assert trained_method(keep_ratio).keep_ratio == keep_ratio
    questions = [one for one in held_out_questions(240) if one.kind != "count"][::3]
    trained = score(questions, answer(model, processor, questions)).overall
    assert trained.share >= 0.85
    states = {name: tensor for name, tensor in model.named_parameters() if "lora_B" in name or "cross_tokens" in name}
    assert states
    assert any(bool(tensor.any()) for tensor in states.values())


def test_a_ratio_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no adapter ships for keep_ratio=0\.3; there are some for \["):
        load_trained(0.3)
    with pytest.raises(ValueError, match="no adapter ships"):
        DemoOptions(methods=["crossget-trained"], keep_ratios=[0.3])


def test_the_demo_has_a_trained_row_beside_the_others(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    ratio = trained_ratios()[0]
    run(DemoOptions(["crossget", "crossget-trained"], [ratio], limit=24, rounds=1, output_dir=str(tmp_path)))
    rows = {row["setting"]: row for row in json.loads((tmp_path / "demo.json").read_text())["rows"]}
    assert set(rows) == {"untouched", f"crossget {ratio:g}", f"crossget-trained {ratio:g}"}
    assert rows[f"crossget-trained {ratio:g}"]["visual_tokens"] == rows[f"crossget {ratio:g}"]["visual_tokens"]
    assert f"crossget-trained {ratio:g}: " in capsys.readouterr().out
