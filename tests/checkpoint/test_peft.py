"""LoRA beside learned cross tokens: trained together, saved together, loaded onto an accelerated base."""

from __future__ import annotations

import warnings

import pytest
import torch

from mllm_crossget import accelerate_mllm, load_crossget, save_crossget
from tests.helpers.llava import labels_of
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **{"modules_to_save": ["cross_tokens"], **options})


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**prompt_batch(model, (2, 0, 1))).logits


def trained():
    base = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    randomise_cross_tokens(base)
    model = peft.get_peft_model(base, lora())
    batch = prompt_batch(model, (2, 0, 1), padding_side="right")
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in learned if "cross_tokens" in name]) == 2
    before = {name: p.detach().clone() for name, p in learned.items()}
    optimizer = torch.optim.SGD(learned.values(), lr=0.1)
    model.train()
    for _ in range(2):  # LoRA's second matrix is zero at first, so its first one learns from the second step on
        optimizer.zero_grad()
        model(**batch, labels=labels_of(model, batch)).loss.backward()
        optimizer.step()
    read = {name for name in learned if "vision_tower" not in name or ".layers.3." not in name}
    assert all(not torch.equal(learned[name], before[name]) for name in read)
    return model


def test_adapter_with_cross_tokens_is_saved_and_loaded(tmp_path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    base = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)
    untrained = logits(accelerate_mllm(tiny_llava(), keep_ratio=0.5))
    assert not torch.allclose(logits(again), untrained, atol=1e-3)


def test_generate_through_the_adapter() -> None:
    model = trained().eval()
    batch = prompt_batch(model, (2, 0, 1))
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    first = logits(model)[:, -1]
    first[:, model.config.image_token_id] = -float("inf")
    assert torch.equal(out[:, batch["input_ids"].shape[1]], first.argmax(-1))


def test_merging_the_adapter_keeps_the_outputs() -> None:
    model = trained()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_save_crossget_takes_the_trained_copies(tmp_path) -> None:
    model = trained()
    save_crossget(model, tmp_path)
    fresh = load_crossget(tiny_llava(), tmp_path)
    ours = {name: value for name, value in fresh.state_dict().items() if "cross_tokens" in name}
    theirs = [p for name, p in model.named_parameters() if "cross_tokens" in name and p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs, strict=True))


def test_accelerating_after_the_adapter_warns() -> None:
    model = peft.get_peft_model(tiny_llava(), lora(modules_to_save=None))
    with pytest.warns(UserWarning, match="before get_peft_model"):
        accelerate_mllm(model)


def test_methods_without_cross_tokens_do_not_warn() -> None:
    model = peft.get_peft_model(tiny_llava(), lora(modules_to_save=None))
    expected = logits(accelerate_mllm(tiny_llava(), method="tome"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate_mllm(model, method="tome")
    torch.testing.assert_close(logits(model), expected)
