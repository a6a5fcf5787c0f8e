"""LoRA with cross tokens: what is adapted, what is saved, and that every way of loading gives the same logits."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget
from mllm_crossget.hooks.ground.state import live_cross_tokens
from mllm_crossget.training import check_adapter, load_finetuned, lora_config, quantization_config
from tests.helpers.families.case_video_llava import tiny_video_llava
from tests.helpers.tiny import prompt_batch, tiny_llava
from tests.helpers.toy import toy_model, toy_trainer


def logits(model):
    stock = tiny_llava()
    with torch.no_grad():
        return model.eval()(**prompt_batch(stock)).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run: its folder and the logits of the trained model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = toy_model()
    trainer = toy_trainer(folder, model, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert all(module().abs().sum() > 0 for module in live_cross_tokens(model).values())
    return folder, logits(model), model


def test_every_way_of_loading_gives_the_same_logits(trained):
    folder, wanted, _ = trained
    config = CrossGetConfig.from_pretrained(folder)
    ways = {
        "PeftModel": PeftModel.from_pretrained(accelerate_mllm(tiny_llava(), config), folder),
        "load_finetuned": load_finetuned(tiny_llava(), folder),
        "checkpoint": load_finetuned(tiny_llava(), folder / "checkpoint-4"),
    }
    base = accelerate_mllm(tiny_llava(), config)
    base.load_adapter(str(folder))
    ways["load_adapter"] = base
    ways["load_crossget"] = load_crossget(tiny_llava(), folder)
    for name, model in ways.items():
        assert torch.equal(logits(model), wanted), name


def test_merge_and_unload_keeps_tokens_and_logits(trained):
    folder, wanted, _ = trained
    merged = load_finetuned(tiny_llava(), folder).merge_and_unload()
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
    assert torch.allclose(logits(merged), wanted, atol=2e-4, rtol=1e-4)
    merged.save_pretrained(folder / "merged")
    again = load_crossget(type(tiny_llava()).from_pretrained(folder / "merged"), folder / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_files_of_a_run(trained):
    folder = trained[0]
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "crossget_weights", "crossget_config.json"} <= names
    assert {"trainer_state.json", "optimizer.pt", "crossget_weights"} <= {
        path.name for path in (folder / "checkpoint-4").iterdir()
    }
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["cross_tokens"]
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "task_loss" in card
    assert "keep_ratio: 0.5" in card


def test_adapter_with_cross_tokens_needs_an_accelerated_model(trained):
    folder = trained[0]
    for model in (tiny_llava(), accelerate_mllm(tiny_llava(), method="tome", keep_ratio=0.5)):
        with pytest.raises(ValueError, match="holds cross tokens"):
            check_adapter(model, folder)
    check_adapter(accelerate_mllm(tiny_llava(), keep_ratio=0.5), folder)


def test_lora_config_names_the_places():
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)

    def adapted(**options):
        pattern = lora_config(model, **options).target_modules
        return {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}

    text = adapted()
    assert len(text) == 3 * 7
    assert all(name.startswith("model.language_model.layers") for name in text)
    assert adapted(projector="lora") - text == {
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    }
    assert len(adapted(vision_tower=True) - text) == 4 * 6
    assert lora_config(model, projector="full").modules_to_save == ["cross_tokens", "multi_modal_projector"]
    assert lora_config(model, cross_tokens=False).modules_to_save is None


def test_adapters_reach_the_towers_of_images_and_of_videos():
    model = accelerate_mllm(tiny_video_llava(), visual_tokens=8)
    model = get_peft_model(model, lora_config(model, vision_tower=True))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    for tower in ("image_tower", "video_tower"):
        assert any(tower in name for name in adapted)


def test_a_fully_trained_projector_travels_with_the_adapter(tmp_path):
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    model = get_peft_model(model, lora_config(model, r=2, projector="full", dropout=0.0))
    trainer = toy_trainer(tmp_path, model)
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits(load_finetuned(tiny_llava(), tmp_path)), logits(model))


def test_refusals():
    with pytest.raises(ValueError, match="not accelerated"):
        lora_config(tiny_llava())
    with pytest.raises(ValueError, match="projector must be"):
        lora_config(accelerate_mllm(tiny_llava()), projector="all")
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        quantization_config(2)


def test_the_card_names_its_base_and_leaves_a_persons_text(tmp_path):
    trainer = toy_trainer(tmp_path, toy_model())
    path = tmp_path / "README.md"
    trainer.save_model()  # PEFT's template
    for base, said, line in (
        ("embedded", "The small model that ships with mllm_crossget", "base_model, _ = load_embedded()"),
        ("someone/base", "someone/base", 'from_pretrained("someone/base")'),
        ("/secret/folder", "A local model (folder)", 'from_pretrained("folder")'),
    ):
        trainer.create_model_card(finetuned_from=base)
        trainer.save_model()  # PEFT changes the metadata and appends its version
        text = path.read_text()
        assert f"{said} with" in text
        assert line in text
        assert f'load_finetuned(base_model, "{tmp_path.name}")' in text
        assert "secret" not in text.split("---", 2)[2]
    path.write_text(text.replace("Settings", "My settings"))
    before = path.read_text()
    trainer.create_model_card(finetuned_from="embedded")
    assert path.read_text() == before
