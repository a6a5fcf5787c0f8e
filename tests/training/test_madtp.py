"""MADTP learns: the alignment loss, the budget that is kept meanwhile, and what is saved of both."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm, load_crossget, trace_merges
from mllm_crossget.cli import main
from mllm_crossget.costs.budget import counts_of, dial_for_savings, measured_flops
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from mllm_crossget.training import (
    PUBLISHED_BUDGETS,
    BudgetCallback,
    Collator,
    CrossGetTrainer,
    budget_of,
    check_adapter,
    load_finetuned,
    lora_config,
    method_for,
)
from tests.helpers.reference import guidance
from tests.helpers.small_files import weights_in
from tests.helpers.tiny import pixels, tiny_llava
from tests.helpers.tiny_blip import blip2_batch, tiny_blip2
from tests.helpers.toy import IMAGE, PLACEHOLDERS, ToySamples, losses, toy_arguments

SIZES = {"alignment_tokens": 6, "alignment_width": 10}


def heard(layers) -> dict[int, torch.Tensor]:
    """What will enter each of the layers."""
    inputs = {}

    def hear(layer, args, kwargs, index):
        inputs.setdefault(index, args[0] if args else kwargs["hidden_states"])

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(hear, index=index), with_kwargs=True)
    return inputs


def madtp(lora: bool = True, dropout: float = 0.0, **settings):
    model = accelerate_mllm(tiny_llava(), MadtpConfig(**{"keep_ratio": 0.5, **SIZES, **settings}))
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(model, r=4, alpha=8, dropout=dropout)) if lora else model


def train(folder, model, steps=4, resume=None, budget=None, every=2, **changes):
    callback = BudgetCallback(pixels(model, 12, seed=5), every=every, budget=budget)
    trainer = CrossGetTrainer(
        model=model,
        args=toy_arguments(folder, max_steps=steps, **changes),
        train_dataset=ToySamples(),
        data_collator=Collator(model, pad_token_id=0),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def batch_of(rows):
    """Right-padded rows of [start, image, words]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[1, *[IMAGE] * PLACEHOLDERS, *row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * (1 + PLACEHOLDERS + len(row)) + [0] * (longest - len(row)) for row in rows])


def test_loss_against_the_slow_version_and_its_gradients() -> None:
    model = madtp(lora=False, threshold=[-2.0] * 4)  # nothing leaves: every layer's input can be read from a plain run
    tokens = live_cross_tokens(model)["alignment"]
    assert tokens.draw_maps()
    model.train()
    rows, images = [[5, 6, 7, 8], [9, 4]], pixels(model, 2)
    ids, mask = batch_of(rows)
    output = model(input_ids=ids, attention_mask=mask, pixel_values=images)
    output.alignment_loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tokens.parameters())
    with torch.no_grad():
        tower = model.model.vision_tower
        inside, seen = {}, {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, index=index: inside.__setitem__(index, args[0]))
            for index, layer in enumerate(tower.encoder.layers)
        ]
        tower(images)
        for hook in hooks:
            hook.remove()
        plain = model.model.language_model(inputs_embeds=_embedded(model, ids, images), attention_mask=mask,
                                           output_hidden_states=True)  # fmt: skip
        seen = plain.hidden_states[: model.config.text_config.num_hidden_layers]
        wanted = []
        for row, words in enumerate(rows):
            text = slice(1 + PLACEHOLDERS, 1 + PLACEHOLDERS + len(words))
            vision = [tokens.maps[layer](inside[layer][row, 1:]) for layer in sorted(inside)]
            wanted.append(guidance(vision, [tokens.text_maps[0](one[row, text]) for one in seen], tokens.tokens))
    assert output.alignment_loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-4)


def _embedded(model, ids, images):
    embeds = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.model.get_image_features(images, return_dict=True).pooler_output))
    return embeds.masked_scatter((ids == IMAGE)[..., None], features)


def test_rows_have_the_loss_that_they_have_alone() -> None:
    model = madtp(lora=False, threshold=[0.9, 0.9, 0.9, 0.9]).train()
    live_cross_tokens(model)["alignment"].draw_maps()
    images, rows = pixels(model, 3), [[5, 6, 7, 8], [9, 4], [11]]
    ids, mask = batch_of(rows)
    together = model(input_ids=ids, attention_mask=mask, pixel_values=images).alignment_loss
    alone = []
    for index, row in enumerate(rows):
        ids, mask = batch_of([row])
        output = model(input_ids=ids, attention_mask=mask, pixel_values=images[index : index + 1])
        alone.append(output.alignment_loss)
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.mark.parametrize("kind", ["instructblip", "instructblipvideo"])
def test_an_instruction_is_compared_in_the_q_former(kind) -> None:
    """Behind its queries, without padding, its first token and what the language model reads; frame by frame."""
    model = accelerate_mllm(tiny_blip2(kind, "llama"), MadtpConfig(keep_ratio=0.5, threshold=[-2.0] * 4, **SIZES))
    tokens = live_cross_tokens(model)["alignment"]
    assert tokens.draw_maps()
    batch = blip2_batch(model, rows=2)
    lengths = batch["qformer_attention_mask"].sum(dim=1).tolist()
    assert lengths[0] != lengths[1]
    former = model.qformer.encoder.layer
    inside, inputs = heard(model.vision_model.encoder.layers), heard(former)
    loss = model.train()(**batch).alignment_loss
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tokens.parameters())
    wanted, frames, queries = [], len(inputs[0]) // 2, model.config.num_query_tokens
    with torch.no_grad():
        for image in range(2 * frames):
            text = slice(queries + 1, queries + lengths[image // frames])
            vision = [tokens.maps[layer](inside[layer][image, 1:]) for layer in sorted(inside)]
            words = [tokens.text_maps[0](inputs[layer][image, text]) for layer in sorted(inputs)]
            wanted.append(guidance(vision, words, tokens.tokens))
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)


def test_no_loss_without_weight_image_or_training() -> None:
    model = madtp(lora=False, threshold=[0.9] * 4)
    ids, mask = batch_of([[5, 6]])
    images = pixels(model, 1)
    assert not hasattr(model.eval()(input_ids=ids, attention_mask=mask, pixel_values=images), "alignment_loss")
    assert model.train()(input_ids=torch.tensor([[1, 5, 6]])).alignment_loss == 0
    silent = madtp(lora=False, threshold=[0.9] * 4, alignment_weight=0.0).train()
    assert not hasattr(silent(input_ids=ids, attention_mask=mask, pixel_values=images), "alignment_loss")


def test_training_keeps_the_average_and_goes_on_where_it_stopped(tmp_path) -> None:
    whole, callback = train(tmp_path / "a", madtp(dropout=0.1), steps=6)
    assert [entry["step"] for entry in callback.history] == [0, 2, 4, 6]
    assert losses(whole, "alignment_loss")[-1] < losses(whole, "alignment_loss")[0]
    with torch.no_grad(), trace_merges(whole.model) as trace:
        whole.model.base_model.model.model.vision_tower(pixels(whole.model, 12, seed=5))
    kept = (trace[-1].size > 0).sum(dim=1).float() - 1
    assert kept.mean().item() == pytest.approx(handle_of(whole.model).schedule.features, abs=0.5)
    train(tmp_path / "b", madtp(dropout=0.1), steps=3, save_strategy="steps", save_steps=3)
    second, _ = train(tmp_path / "b", madtp(dropout=0.1), steps=6, resume=str(tmp_path / "b" / "checkpoint-3"))
    assert losses(second) == losses(whole)
    assert handle_of(second.model).method == handle_of(whole.model).method
    other = madtp(dropout=0.1, keep_ratio=0.75)
    with pytest.raises(ValueError, match="was trained with"):
        train(tmp_path / "b", other, steps=6, resume=str(tmp_path / "b" / "checkpoint-3"))


def test_an_adapter_brings_its_alignment_tokens_and_thresholds(tmp_path) -> None:
    trainer, _ = train(tmp_path, madtp())
    trainer.save_model()
    again = load_finetuned(tiny_llava(), tmp_path)
    ids, mask = batch_of([[5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(again, 1)}
    assert torch.equal(again.eval()(**batch).logits, trainer.model.eval()(**batch).logits)
    assert handle_of(again).method == handle_of(trainer.model).method
    learned = load_file(weights_in(tmp_path))
    assert learned["alignment.text_maps.0.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match="holds alignment tokens"):
        check_adapter(accelerate_mllm(tiny_llava(), CrossGetConfig()), tmp_path)


def test_full_tuning_is_saved_beside_stock_weights(tmp_path) -> None:
    trainer, _ = train(tmp_path, madtp(lora=False))
    trainer.save_model()
    again = load_crossget(type(tiny_llava()).from_pretrained(tmp_path), tmp_path)
    for (name, value), (_, wanted) in zip(again.state_dict().items(), trainer.model.state_dict().items(), strict=True):
        assert torch.equal(value, wanted), name


def test_refuses_what_would_not_learn_or_not_be_kept(tmp_path) -> None:
    arguments = {"args": toy_arguments(tmp_path), "train_dataset": ToySamples()}
    with pytest.raises(ValueError, match="not calibrated"):
        CrossGetTrainer(model=madtp(), **arguments)
    frozen = accelerate_mllm(tiny_llava(), MadtpConfig(**SIZES))
    frozen = get_peft_model(frozen, lora_config(frozen, cross_tokens=False))
    with pytest.raises(ValueError, match=r"alignment tokens are frozen.*modules_to_save"):
        CrossGetTrainer(model=frozen, callbacks=[BudgetCallback(pixels(frozen, 2))], **arguments)
    with pytest.raises(ValueError, match="decides by temperature"):
        CrossGetTrainer(model=madtp(reference=True), callbacks=[BudgetCallback(pixels(frozen, 2))], **arguments).train()
    fixed = accelerate_mllm(tiny_llava(), CrossGetConfig())
    with pytest.raises(ValueError, match="method that chooses per image"):
        CrossGetTrainer(model=fixed, callbacks=[BudgetCallback(pixels(frozen, 2))], **arguments).train()
    with pytest.raises(TypeError, match="pixel values"):
        BudgetCallback(["a.jpg"])
    with pytest.raises(ValueError, match="at least 1"):
        BudgetCallback(pixels(frozen, 2), every=0)


def test_published_budgets() -> None:
    """GFLOPs and ratios of MADTP's scripts, and their table of steps for NLVR2."""
    targets = {name: round(budget.target_gflops, 2) for name, budget in PUBLISHED_BUDGETS.items()}
    assert targets["nlvr2-0.8"] == 26.51
    assert targets["caption-0.5"] == 32.85
    assert targets["retrieval-0.75"] == 38.3
    assert targets["vqa-0.5"] == 93.05
    assert targets["clip-retrieval-0.75"] == 98.92
    assert len(targets) == 13
    budget = budget_of("nlvr2-0.5")
    for gflops_above, step in ((31, 1.0), (11, 0.5), (6, 0.25), (2, 0.1), (0.5, 0.01), (-0.5, -0.01), (-11, -0.5)):
        assert budget.step(0.5 + gflops_above / 132.54) == step
    assert budget_of("0.8").saved == 0.8
    for wrong in ("nlvr2", "2", "0"):
        with pytest.raises(ValueError, match=r"share of FLOPs"):
            budget_of(wrong)


@pytest.mark.parametrize("saved", [0.2, 0.5])
def test_the_dial_of_a_budget_is_the_largest_that_meets_it(saved) -> None:
    config = tiny_llava(image_size=84).config
    found = dial_for_savings(config, MadtpConfig(**SIZES), saved, text_tokens=20)
    untouched = model_flops(config, MadtpConfig(keep_ratio=1.0), text_tokens=20).total

    def share(tokens):
        return 1 - model_flops(config, MadtpConfig(visual_tokens=tokens, **SIZES), text_tokens=20).total / untouched

    assert share(found.visual_tokens) >= saved > share(found.visual_tokens + 1)
    reference = MadtpConfig(reference=True)
    assert method_for(config, reference, budget_of(saved)) is reference
    with pytest.raises(ValueError, match="cannot be saved"):
        dial_for_savings(config, MadtpConfig(**SIZES), 0.99)


def test_temperature_is_moved_towards_the_budget(tmp_path) -> None:
    """In reference mode: searched first, then moved by the published steps; a later run takes it over."""
    model = accelerate_mllm(tiny_llava(image_size=84), MadtpConfig(reference=True, **SIZES))
    ready = get_peft_model(model, lora_config(model, r=2))
    callback = BudgetCallback(pixels(model, 6, seed=5), every=1, budget=budget_of(0.2), text_tokens=10)
    CrossGetTrainer(model=ready, args=toy_arguments(tmp_path), train_dataset=ToySamples(4), callbacks=[callback])
    callback._adjust(ready, 0, search=True)
    first = callback.history[0]
    assert first["share"] == pytest.approx(0.8, abs=0.05)
    with torch.no_grad(), trace_merges(ready) as trace:
        model.model.vision_tower(pixels(model, 6, seed=5))
    counts = counts_of([entry.size for entry in trace], 37)
    whole = model_flops(model.config, MadtpConfig(keep_ratio=1.0), text_tokens=10).total
    measured = measured_flops(model.config, handle_of(ready).method, counts, text_tokens=10)
    assert measured / whole == pytest.approx(first["share"])
    callback.budget = budget_of(0.5)  # too dear now: hotter
    callback._adjust(ready, 1)
    assert callback.history[1]["temperature"] == pytest.approx(first["temperature"] + 0.3)
    callback.budget = budget_of(0.95)
    with pytest.warns(UserWarning, match="no temperature makes"):
        callback._adjust(ready, 2, search=True)


def test_the_command(work, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))  # the command sets it for good
    words = ["--method", "madtp", "--alignment_tokens", "6", "--alignment_width", "10", "--budget", "nlvr2-0.3"]
    words += ["--calibration_images", "4", "--calibration_every", "2", "--output_dir", str(tmp_path)]
    words += ["--report_to", "none", "--max_steps", "2"]
    lines = [line for line in (work / "config.yaml").read_text().splitlines() if "keep_ratio" not in line]
    (tmp_path / "madtp.yaml").write_text("\n".join(lines))
    assert main(["train", str(tmp_path / "madtp.yaml"), *words]) == 0
    saved = json.loads((tmp_path / "crossget_config.json").read_text())
    assert len(saved["threshold"]) == 8
    entry = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert entry["flops_saved"] == pytest.approx(0.3, abs=0.05)
    assert entry["alignment_loss"] > 0
