"""Answer a file of questions about images with an accelerated model, on one process or many (data parallel).

    python scripts/batch_inference.py --questions questions.jsonl                                # one process
    accelerate launch scripts/batch_inference.py --questions questions.jsonl --model llava-hf/llava-1.5-7b-hf
    torchrun --nproc_per_node 8 scripts/batch_inference.py --questions questions.jsonl --model llava-hf/llava-1.5-7b-hf

Each line of the questions is ``{"image": "cat.jpg", "question": "What is this?"}``, the image relative to the file;
a line without an image is a question in words alone. Every process holds a whole model and takes a part of the lines,
neighbours together, so that questions about one image find it encoded (``reuse_vision``); it groups them by compact
length. Process 0 writes every line with its ``"answer"``, in the order of the questions. The answers are those of one
process up to rounding, which in half precision may turn a word where two are about equally likely: batches are others.
For a model that is too large for one device start one process with ``--device_map auto``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from mllm_crossget import accelerate_mllm, generate_in_batches, load_crossget, reuse_vision
from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.user_files import open_picture


@dataclass
class Options:
    """What to answer, and how."""

    questions: str = field(metadata={"help": "JSON lines with image and question"})
    output: str = field(default="runs/answers.jsonl", metadata={"help": "JSON lines, written by process 0"})
    model: str = field(default=str(WEIGHTS_FOLDER), metadata={"help": "folder or repository; the embedded model"})
    method: str = field(default="crossget", metadata={"help": "reduction method"})
    keep_ratio: float = field(default=0.5, metadata={"help": "share of the visual tokens; 1 leaves the model as it is"})
    crossget: str = field(
        default="", metadata={"help": "folder or repository with settings and learned tokens instead"}
    )
    max_tokens: int = field(default=16_384, metadata={"help": "rows times columns of a batch, after merging"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer"})
    dtype: str = field(default="auto", metadata={"help": "of the weights; auto as they are stored"})
    window: int = field(default=512, metadata={"help": "questions that are in the memory of a process at a time"})
    device_map: str = field(default="", metadata={"help": "such as auto: one model over several devices"})


def main() -> None:
    """Answer and write."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(args_filename=None)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if options.device_map and accelerator.num_processes > 1:
        raise SystemExit("--device_map spreads one model over all devices: start one process, or leave it out")
    model, processor = load(options, accelerator)
    file = Path(options.questions)
    questions = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    with accelerator.split_between_processes(questions) as mine:
        answers = answer(model, processor, mine, file.parent, options)
    answers = gather_object(answers)  # of all processes, in their order
    if accelerator.is_main_process:
        output = Path(options.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**row, "answer": text}) for row, text in zip(questions, answers, strict=True)]
        write_text(output, "".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} answers in {output}; process 0: {reuse_vision(model)}")
    accelerator.end_training()


def load(options: Options, accelerator: Accelerator) -> tuple[Any, Any]:
    """The accelerated model on this process's device, and its processor."""
    place = options.device_map or {"": accelerator.device}
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype, device_map=place).eval()
    if options.crossget:
        load_crossget(model, options.crossget)
        reuse_vision(model)
    else:
        accelerate_mllm(model, method=options.method, keep_ratio=options.keep_ratio, reuse_vision=True)
    return model, AutoProcessor.from_pretrained(options.model)


def answer(model: Any, processor: Any, questions: list[dict[str, str]], folder: Path, options: Options) -> list[str]:
    """The answers to this process's questions, in their order."""
    texts: list[str] = []
    for start in tqdm(range(0, len(questions), options.window), disable=None):
        requests = [request(processor, row, folder) for row in questions[start : start + options.window]]
        answers = generate_in_batches(
            model, requests, max_tokens=options.max_tokens, max_new_tokens=options.max_new_tokens, do_sample=False
        )
        texts += [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]
    return texts


def request(processor: Any, row: dict[str, str], folder: Path) -> dict[str, Any]:
    """One question as the model takes it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": row["question"]}]
    images = [open_picture(folder / row["image"])] if row.get("image") else None
    if images:
        content.insert(0, {"type": "image"})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=images, text=text, return_tensors="pt"))


if __name__ == "__main__":
    main()
