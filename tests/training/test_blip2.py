"""BLIP-2: samples of one prompt and one answer, the tiny model of ``scripts/finetune_blip2.sh``, OPT and T5."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration

from mllm_crossget import accelerate_mllm
from mllm_crossget.cli import main
from mllm_crossget.files.records import BadSampleError
from mllm_crossget.training import Collator, TrainingData, load_finetuned, load_records, lora_config
from mllm_crossget.training.pairs import prompt_tokens_per_image
from tests.helpers.small_files import weights_in
from tests.helpers.tiny_blip import IMAGE, tiny_blip, tiny_blip2
from tests.helpers.toy import losses, toy_trainer

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("make_tiny_blip2", ROOT / "scripts" / "make_tiny_blip2.py")
maker = importlib.util.module_from_spec(_SPEC)
sys.modules["make_tiny_blip2"] = maker  # dataclasses look their module up
_SPEC.loader.exec_module(maker)
QUESTION, ANSWER = "How many digits are there?", "3"


@pytest.fixture(scope="module")
def processor():
    return maker.build_processor()


def write_data(folder: Path, rows: int = 8) -> Path:
    samples = []
    for index in range(rows):
        Image.new("RGB", (96, 96), (30 * index, 90, 90)).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
        samples.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


def model_and_data(folder: Path, processor, text: str, **options):
    model = accelerate_mllm(maker.build_model(processor, text), keep_ratio=0.25)
    return model, TrainingData(load_records(write_data(folder)), processor, model=model, image_aspect="keep", **options)


@pytest.mark.parametrize("text", ["opt", "t5"])
def test_a_sample_is_the_processors_prompt_and_the_answer(tmp_path, processor, text: str) -> None:
    model, data = model_and_data(tmp_path, processor, text, prompt_template="{}")
    sample, tokenizer = data[0], processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    prompt = [image] * maker.QUERIES + [tokenizer.bos_token_id]
    prompt += tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if text == "opt":
        assert sample["input_ids"].tolist() == prompt + answer
        assert sample["labels"].tolist() == [-100] * len(prompt) + answer
    else:
        assert (sample["input_ids"].tolist(), sample["labels"].tolist()) == (prompt, answer)
    batch = Collator(model, tokenizer.pad_token_id)([data[0], data[1]])
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    assert batch["labels"].shape[1] == len(sample["labels"])
    assert torch.isfinite(model.train()(**batch).loss)


def test_the_template_stands_around_the_question(tmp_path, processor) -> None:
    _, data = model_and_data(tmp_path, processor, "t5", prompt_template="digits {} red")
    words = processor.tokenizer("digits how many digits are there ? red")["input_ids"]
    assert data[0]["input_ids"].tolist()[maker.QUERIES :] == words


def test_bad_samples_and_settings(tmp_path, processor) -> None:
    model, data = model_and_data(tmp_path, processor, "opt", on_bad_sample="stop")
    data.records.rows[0] |= {"image": None, "conversations": [{"from": "human", "value": QUESTION},
                                                              {"from": "gpt", "value": ANSWER}]}  # fmt: skip
    data.records.rows[1]["conversations"] *= 2
    data.records.rows[1]["image"] = ["1.png", "1.png"]
    data.records.rows[2]["conversations"] *= 2
    data.records.rows[2]["conversations"][2]["value"] = QUESTION
    for index, message in enumerate(("it has 0 images", "it has 2 images", "one question and one answer")):
        with pytest.raises(BadSampleError, match=message):
            data[index]
    data.max_length = 10
    with pytest.raises(BadSampleError, match="longer than 10 tokens"):
        data[3]
    with pytest.raises(ValueError, match=r"give TrainingData\(..., model=model\)"):
        TrainingData(data.records, processor)
    with pytest.raises(ValueError, match=r"has no \{\}, where the question goes"):
        TrainingData(data.records, processor, model=model, prompt_template="Question:")


def test_a_batch_for_instructblip_brings_the_q_formers_text() -> None:
    model = accelerate_mllm(tiny_blip2("instructblip", "llama"), keep_ratio=0.5)
    samples = [
        {
            "input_ids": torch.tensor([IMAGE] * 4 + [1] + [5] * length),
            "labels": torch.tensor([-100] * 5 + [5] * length),
            "qformer_input_ids": torch.tensor([7] * length),
            "pixel_values": torch.zeros(1, 3, 56, 56),
        }
        for length in (2, 4)
    ]
    batch = Collator(model, 0)(samples)
    assert batch["qformer_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert prompt_tokens_per_image(model) == 4
    output = model.train()(**batch)
    assert torch.isfinite(output.loss + output.alignment_loss)


@pytest.fixture(scope="module")
def work(tmp_path_factory, processor):
    """A folder with an untrained BLIP-2 and its data."""
    folder = tmp_path_factory.mktemp("blip2")
    maker.build_model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_data(folder)
    return folder


def command(work: Path, out: Path, *words: str) -> list[str]:
    return ["train", "--model", str(work / "model"), "--train_data", str(work / "data.json"), "--output_dir", str(out),
            "--keep_ratio", "0.25", "--max_steps", "3", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3",
            "--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none",
            *words]  # fmt: skip


def test_lora_is_trained_saved_and_loaded(work, tmp_path) -> None:
    words = ["--tuning", "lora", "--lora_r", "2", "--projector", "full", "--save_steps", "3"]
    assert main(command(work, tmp_path, *words)) == 0
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["visual_tokens"] == 36  # a quarter of 145
    assert 0 < history[0]["flops_saved"] < 1
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    for part in ("decoder.layers.1.fc2.lora_A", "vision_model.encoder.cross_tokens", "decoder.cross_tokens",
                 "language_projection.weight"):  # fmt: skip
        assert any(part in name for name in names), part
    assert set(load_file(weights_in(tmp_path))) == {"vision.cross", "text.cross"}
    model = load_finetuned(Blip2ForConditionalGeneration.from_pretrained(work / "model"), tmp_path)
    pixels = torch.randn(2, 3, 96, 96)
    trained = model.generate(pixel_values=pixels, max_new_tokens=3)
    assert trained.shape[0] == 2


def test_bridge_tuning_leaves_the_language_model_alone(work, tmp_path) -> None:
    assert main(command(work, tmp_path, "--tuning", "bridge", "--vision_tower", "true")) == 0
    saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path, work / "model"))
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert {"query_tokens", "language_projection.weight"} <= changed
    assert any(name.startswith("vision_model") for name in changed)
    assert not any(name.startswith("language_model") for name in changed)
    assert load_file(weights_in(tmp_path))["text.cross"].abs().sum() > 0


def test_accumulated_micro_batches_of_t5_are_the_whole_batch(tmp_path, processor) -> None:
    """T5 ignores the number of answer tokens that Trainer hands over, so Trainer must divide."""
    found = []
    for size, steps in ((4, 1), (2, 2)):
        model, data = model_and_data(tmp_path, processor, "t5")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = toy_trainer(tmp_path / "out", model, data, max_steps=2, per_device_train_batch_size=size,
                              gradient_accumulation_steps=steps, learning_rate=1e-3)  # fmt: skip
        trainer.train()
        found.append([*losses(trainer), *losses(trainer, "task_loss"), *losses(trainer, "alignment_loss")])
    assert found[0] == pytest.approx(found[1], rel=0.02)  # logged with four digits


def test_distillation_of_an_encoder_decoder_is_refused(tmp_path, processor) -> None:
    model, data = model_and_data(tmp_path, processor, "t5")
    with pytest.raises(ValueError, match="this language model has an encoder too"):
        toy_trainer(tmp_path / "out", model, data, distillation_weight=1.0)


def test_lora_for_blip_has_no_projector() -> None:
    model = accelerate_mllm(tiny_blip("questions"), keep_ratio=0.5)
    assert "text_decoder" in lora_config(model).target_modules
    with pytest.raises(ValueError, match="a 'blip' has no projector"):
        lora_config(model, projector="full")


@pytest.mark.slow
def test_the_script_trains_the_tiny_model(tmp_path) -> None:
    """``scripts/finetune_blip2.sh tiny``: 20 steps lower the loss by a quarter. Half a minute."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("scripts", "mllm_crossget"):
        (folder / name).symlink_to(ROOT / name)
    script = folder / "finetune_blip2.sh"
    text = (ROOT / "scripts" / "finetune_blip2.sh").read_text()
    script.write_text(text.replace('"$(dirname "$0")/.."', f'"{folder}"'))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    data = [sys.executable, str(ROOT / "scripts" / "make_toy_data.py"), "--samples", "160"]
    subprocess.run(data, cwd=folder, env=environment, check=True)
    words = ["bash", str(script), "tiny", "--max_steps", "20", "--per_device_train_batch_size", "8"]
    subprocess.run([*words, "--save_steps", "20", "--report_to", "none"], cwd=folder, env=environment, check=True)
    state = folder / "runs" / "tiny-blip2-crossget" / "checkpoint-20" / "trainer_state.json"
    values = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert values[-1] < 3 / 4 * values[0]
