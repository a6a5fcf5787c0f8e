"""Two processes on the CPU: data-parallel answers equal those of one process, and so does a tensor-parallel model.

Tensor parallelism runs where asked for (about 20 seconds): ``python -m pytest tests/api -m slow``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm_crossget import accelerate_mllm
from mllm_crossget.embedded import load_embedded
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from tests.helpers.methods import METHODS
from tests.helpers.tiny import tiny_llava

ROOT = Path(__file__).parents[2]
QUESTIONS = ["How many digits are there?", "What is the largest digit?", "Is there a 6?"]
NEW = 8


def torchrun(*words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(word) for word in words]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.timeout(300)
def test_gathered_answers_are_those_of_one_process(tmp_path) -> None:
    """Seven questions about three images, one without; two processes take four and three of them."""
    pytest.importorskip("accelerate")
    layouts = sample_layouts(3, "test", torch.Generator().manual_seed(0))
    images = [to_image(picture) for picture in render(layouts)[0]]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    rows = [{"id": n, "image": f"{n // 2}.png", "question": QUESTIONS[n % 3]} for n in range(6)]
    rows.append({"id": 6, "question": QUESTIONS[0]})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    files = ("--questions", tmp_path / "questions.jsonl", "--output", tmp_path / "answers.jsonl")
    said = torchrun(
        "scripts/batch_inference.py", *files, "--dtype", "float32", "--max_new_tokens", NEW, "--max_tokens", 200,
    )  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    model, processor = load_embedded()
    accelerate_mllm(model, keep_ratio=0.5)
    expected = []
    for row in rows:
        picture, mark = ([images[row["id"] // 2]], "<image>\n") if "image" in row else (None, "")
        text = f"USER: {mark}{row['question']} ASSISTANT:"
        inputs = processor(images=picture, text=text, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append({**row, "answer": processor.decode(tokens, skip_special_tokens=True).strip()})
    assert found == expected
    assert len({row["answer"] for row in found}) > 2
    assert "7 answers" in said
    assert "VisionCache(2 images" in said  # process 0 has seen two of the three images, each once
    assert "2 hits, 2 misses" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tensor_parallel_language_model(tmp_path) -> None:
    """transformers' own plan shards the decoder; tower and projector are whole on every process."""
    tiny_llava().save_pretrained(tmp_path / "model")
    torchrun("-m", "tests.helpers.tensor_parallel", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["shards"] == [16, 32]  # half of the heads, else this would be a test of one process
    for name in ("untouched", "restored", "reused", *METHODS):
        assert found[name]["same tokens"], name
        assert found[name]["difference"] < 1e-4, name  # sums in another order
    assert found["hits"] > 0
    assert "sharded by a tensor-parallel plan" in found["sharded tower"]
    assert "sharded already (fully_shard)" in found["fully sharded"]
