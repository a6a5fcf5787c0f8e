"""QLoRA on the CPU with a tiny model. Needs bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget
from mllm_crossget.training import load_finetuned, lora_config, prepare_quantized, quantization_config
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava
from tests.helpers.toy import ToySamples, losses, toy_trainer

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llava(text_width=64).save_pretrained(folder)
    return folder


def quantized(folder, bits):
    return LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=quantization_config(bits), dtype=torch.bfloat16
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_trains_after_an_evaluation_too(tmp_path, stored, bits):
    """bitsandbytes 0.50 repacks 4-bit weights in an evaluation on some CPUs; gradients were zero from then on."""
    model = prepare_quantized(quantized(stored, bits))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all(("Linear4bit" if bits == 4 else "Linear8bitLt") == kind for n, kind in kinds.items() if "layers" in n
               and "language_model" in n)  # fmt: skip
    assert all(kind == "Linear" for name, kind in kinds.items() if "vision_tower" in name or "projector" in name)
    accelerate_mllm(model, CrossGetConfig(keep_ratio=0.5, alignment_weight=0.1))
    model = get_peft_model(model, lora_config(model, r=4, alpha=8, dropout=0.0))
    trainer = toy_trainer(
        tmp_path, model, eval_dataset=ToySamples(4), max_steps=6, eval_strategy="steps", eval_steps=2, bf16=True
    )
    trainer.train()
    evaluated = losses(trainer, "eval_loss")
    assert len(evaluated) == 3
    assert all(norm > 0.05 for norm in losses(trainer, "grad_norm"))
    assert min(evaluated[1:]) < evaluated[0]  # of the same samples, unlike the losses of two training batches
    trainer.save_model()
    again = load_finetuned(prepare_quantized(quantized(stored, bits)), tmp_path)
    batch = trainer.data_collator(ToySamples(2).samples)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which the trainer left on its model's forward
        wanted, found = model.eval()(**batch).logits, again.eval()(**batch).logits
    assert torch.equal(wanted.float(), found.float())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_saved_model_holds_stock_weights_alone(tmp_path, stored, bits):
    """transformers asks a quantiser for the state dict, and leaves aside the one that it is given."""
    model = accelerate_mllm(quantized(stored, bits), keep_ratio=0.5)
    randomise_cross_tokens(model)
    model.save_pretrained(tmp_path)
    assert not any("cross_tokens" in name for name in load_file(tmp_path / "model.safetensors"))
    again, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    load_crossget(again, tmp_path)
    batch = prompt_batch(model, (1, 1))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
