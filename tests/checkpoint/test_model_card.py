"""The card beside a saved model: what it says, that its lines load the model, and that a person's text stays."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from mllm_crossget import accelerate_mllm
from mllm_crossget.embedded import load_embedded
from tests.helpers.families.case_dual import tiny_metaclip
from tests.helpers.hub import Hub
from tests.helpers.small_files import learned, logits
from tests.helpers.tiny import tiny_llava

OWN = "---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n"


def card_in(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def test_it_names_method_budget_and_settings(tmp_path: Path) -> None:
    model = accelerate_mllm(load_embedded()[0], method="tome", keep_ratio=0.25)
    model.save_pretrained(tmp_path / "reduced")
    card = card_in(tmp_path / "reduced")
    assert card.data.tags == ["tome", "token-merging", "mllm-crossget"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "base_model" not in card.data.to_dict()  # it is no repository of the hub
    assert "# reduced\n" in card.text
    assert "The small model that ships with mllm_crossget with 36 instead of 144 visual tokens per image" in card.text
    assert "    keep_ratio: 0.25\n" in card.text
    assert str(tmp_path) not in str(card)


def test_its_lines_load_the_model(tmp_path: Path) -> None:
    model = learned(keep_ratio=0.5)
    model.save_pretrained(tmp_path / "saved")
    code = re.search(r"```python\n(.*?)```", card_in(tmp_path / "saved").text, flags=re.DOTALL)[1]
    names: dict = {}
    with contextlib.chdir(tmp_path):
        exec(code, names)
    assert len(code.strip().splitlines()) == 5  # two imports, and two lines
    assert torch.equal(logits(names["model"]), logits(model))


def test_a_base_model_of_the_hub_is_named_and_a_path_is_not(tmp_path: Path) -> None:
    for name, said in (("someone/base", "someone/base"), ("/secret/place/base", "A local model (base)")):
        model = learned()
        model.config._name_or_path = name
        model.save_pretrained(tmp_path / "saved")
        card = card_in(tmp_path / "saved")
        assert card.data.to_dict().get("base_model") == (name if "secret" not in name else None)
        assert f"{said} with" in card.text
        assert "secret" not in str(card)


def test_a_dual_encoder_has_no_pipeline_of_chats(tmp_path: Path) -> None:
    accelerate_mllm(tiny_metaclip("sdpa"), keep_ratio=0.5).save_pretrained(tmp_path)
    assert card_in(tmp_path).data.pipeline_tag is None


def test_a_new_budget_replaces_an_untouched_card_and_keeps_its_licence(tmp_path: Path) -> None:
    learned(keep_ratio=0.5).save_pretrained(tmp_path)
    card = card_in(tmp_path)
    card.data.license = "mit"
    (tmp_path / "README.md").write_text(str(card))
    learned(keep_ratio=0.25).save_pretrained(tmp_path)
    assert "keep_ratio: 0.25" in card_in(tmp_path).text
    assert card_in(tmp_path).data.license == "mit"


@pytest.mark.parametrize("change", ["own", "appended", "inserted", "one word", "no metadata", "broken"])
def test_a_persons_text_is_never_replaced(tmp_path: Path, change: str) -> None:
    learned(keep_ratio=0.5).save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    text = path.read_text()
    changed = {
        "own": OWN,
        "appended": f"{text}\nMy results.\n",
        "inserted": text.replace("<!-- written", "My results.\n\n<!-- written"),
        "one word": text.replace("visual tokens", "image tokens"),
        "no metadata": "# Mine",
        "broken": "---\n: [\n---\n",
    }[change]
    assert changed != text
    path.write_text(changed)
    learned(keep_ratio=0.25).save_pretrained(tmp_path)
    assert path.read_text() == changed


def test_push_to_hub_writes_a_card_with_the_repositorys_name(hub: Hub) -> None:
    learned(keep_ratio=0.5).push_to_hub("someone/model", tags=["mine"])
    card = card_in(hub.root / "someone/model")
    assert 'load_crossget(model, "someone/model")' in card.text
    assert "# model\n" in card.text
    assert card.data.tags == ["crossget", "token-merging", "mllm-crossget", "mine"]


def test_a_persons_card_on_the_hub_stays(hub: Hub, tmp_path: Path) -> None:
    (hub.root / "someone/model").mkdir(parents=True)
    (hub.root / "someone/model/README.md").write_text(OWN)
    learned(keep_ratio=0.5).push_to_hub("someone/model")
    assert (hub.root / "someone/model/README.md").read_text() == OWN
    learned().save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="someone/model")
    assert (hub.root / "someone/model/README.md").read_text() == OWN


def test_metadata_on_the_hub_stay_and_a_persons_local_card_goes_up(hub: Hub, tmp_path: Path) -> None:
    learned(keep_ratio=0.5).push_to_hub("someone/model")
    path = hub.root / "someone/model/README.md"
    card = ModelCard(path.read_text())
    card.data.license = "mit"
    path.write_text(str(card))
    learned(keep_ratio=0.25).push_to_hub("someone/model")
    assert ModelCard(path.read_text()).data.license == "mit"
    assert "keep_ratio: 0.25" in path.read_text()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text(OWN)
    learned().save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="someone/model")
    assert path.read_text() == OWN


def test_an_unknown_keyword_of_a_push_is_refused() -> None:
    with pytest.raises(TypeError, match="knows no \\['privat'\\]"):
        accelerate_mllm(tiny_llava(), keep_ratio=0.5).push_to_hub("someone/model", privat=True)
