"""Train the embedded LLaVA from nothing on a CPU and write `mllm_crossget/embedded/weights`.

    python scripts/train_embedded.py                # under an hour on one core; run again to go on after a stop
    python scripts/train_embedded.py --warm_up_steps 50 --joint_steps 50 --weights_folder runs/try --run_folder runs/t

A step's data comes from (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen; the same
options, thread count and library versions give the same weights. The shipped weights are from a run whose options were
changed on the way (`history` in their scores.json): a fresh run follows the defaults from the first step, and reached
94.1 % in 34 minutes on one core, where the shipped weights have 94.7 % (eval/results/embedded_fresh_run.json).
"""

import json
import platform
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor, HfArgumentParser, LlavaForConditionalGeneration

from mllm_crossget.embedded import WEIGHTS_FOLDER, answer, held_out_questions, score
from mllm_crossget.embedded.architecture import build_model, build_processor
from mllm_crossget.embedded.loop import Phase, Run
from mllm_crossget.embedded.pretraining import (
    DenseHeads,
    answer_loss,
    cell_mask,
    dense_loss,
    label_patches,
    pack_questions,
    see,
)
from mllm_crossget.embedded.scenes import Layout, render, sample_layouts
from mllm_crossget.files.atomic_files import write_text

_NOT_RECORDED = ("resume", "run_folder", "weights_folder", "save_every", "check_every")  # change nothing in the weights


@dataclass
class Options:
    """Options of the training run."""

    warm_up_steps: int = field(default=2400, metadata={"help": "steps of the tower and projector on dense labels"})
    joint_steps: int = field(default=1800, metadata={"help": "steps of the whole model on questions"})
    polish_steps: int = field(default=600, metadata={"help": "further joint steps, from a quarter of the peak"})
    warm_up_batch: int = field(default=16, metadata={"help": "scenes in a warm-up step"})
    joint_batch: int = field(default=8, metadata={"help": "scenes in a joint step, 16 questions each"})
    peak: float = field(default=2.5e-3, metadata={"help": "highest learning rate"})
    decay: float = field(default=0.03, metadata={"help": "weight decay of the matrices"})
    dense: float = field(default=0.15, metadata={"help": "weight of the dense labels in the joint phase"})
    crowd_from: int = field(default=2600, metadata={"help": "step from which crowded scenes are shown as well"})
    crowd_until: int = field(default=3200, metadata={"help": "step from which they are not any more"})
    seed: int = field(default=1, metadata={"help": "seed of weights and data"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    bfloat16: bool = field(default=False, metadata={"help": "products in bfloat16; only fast on a CPU that has it"})
    resume: bool = field(default=True, metadata={"help": "go on from the run folder's checkpoint if there is one"})
    run_folder: str = field(default="runs/embedded", metadata={"help": "checkpoints and log"})
    weights_folder: str = field(default=str(WEIGHTS_FOLDER), metadata={"help": "where the result goes"})
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints"})
    check_every: int = field(default=800, metadata={"help": "steps between looks at 240 held-out questions (logged)"})


def start(options: Options) -> Run:
    """The run before its first step."""
    model = build_model(options.seed).train()
    model.set_attn_implementation("eager")  # fused attention's backward is twice as slow on a CPU in bfloat16
    lengths = (options.warm_up_steps, options.joint_steps, options.polish_steps)
    phases = tuple(Phase(*each) for each in zip(lengths, (1.0, 0.8, 0.3), (0.5, 0.005, 0.003), strict=True))
    return Run(model, DenseHeads(), phases, Path(options.run_folder), options.peak, options.decay)


def step_loss(run: Run, options: Options, tokenizer: Any) -> tuple[Tensor, dict[str, float]]:
    """Loss and readable numbers of the run's present step."""
    seed = options.seed * 1_000_003 + run.step
    generator = torch.Generator().manual_seed(seed)
    if run.step < options.warm_up_steps:
        # Half of the warm-up attends inside a cell only: digits are learnt much faster when nothing else is in sight.
        mask = cell_mask() if run.step < options.warm_up_steps // 2 else None
        return dense_step(run, options, sample_layouts(options.warm_up_batch, "train", generator), generator, mask)[:2]
    layout = sample_layouts(options.joint_batch, "train", generator)
    dense, report, visual = dense_step(run, options, layout, generator)
    if (
        options.crowd_from <= run.step < options.crowd_until
    ):  # digits are what the model is weakest at: more of them, for the tower alone
        crowd = sample_layouts(options.joint_batch, "train", generator, crowded=True)
        more, report, _ = dense_step(run, options, crowd, generator)
        dense = dense + more
    pack = pack_questions(layout.scenes(), tokenizer, random.Random(seed))
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        answers, right = answer_loss(run.model, visual, pack)
    return answers + options.dense * dense, report | {"answer": answers.item(), "right": right}


def dense_step(
    run: Run, options: Options, layout: Layout, generator: torch.Generator, mask: Tensor | None = None
) -> tuple[Tensor, dict[str, float], Tensor]:
    """Loss of the dense labels on bent drawings of a layout, its parts, and the visual tokens."""
    pixels, ink = render(layout, jitter=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        hidden, visual = see(run.model, pixels, mask)
        loss, report = dense_loss(run.model, run.heads, hidden, visual, label_patches(layout, ink))
    return loss, report, visual


def check(run: Run, limit: int | None) -> dict[str, object]:
    """Scores of the model as it is on held-out questions; logged only, nothing is chosen by them."""
    run.model.eval()
    questions = held_out_questions(limit)
    result = score(questions, answer(run.model, build_processor(), questions)).as_dict()
    run.model.train()
    return result


def train(run: Run, options: Options) -> None:
    """Take all steps that are left, with a look at held-out questions now and then."""
    processor = build_processor()
    for step in run.train(lambda _: step_loss(run, options, processor.tokenizer), options.save_every):
        if step > options.warm_up_steps and (step - options.warm_up_steps) % options.check_every == 0:
            run.log(held_out=check(run, 240))


def export(run: Run, options: Options) -> None:
    """Save model and processor as bfloat16, load them again, and score what was loaded on the whole test set."""
    folder = Path(options.weights_folder)
    run.model.eval().to(torch.bfloat16).save_pretrained(folder)
    build_processor().save_pretrained(folder)  # a fresh one: a used tokenizer would save the padding of its last batch
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    questions = held_out_questions()
    started = time.monotonic()
    answers = answer(model, processor, questions)
    seconds = time.monotonic() - started
    record = score(questions, answers).as_dict() | {
        "split": "held-out digits (other writers) and backgrounds",
        "visual_tokens": 144,
        "evaluation": {"seconds": round(seconds, 1), "threads": options.threads, "dtype": "float32"},
        "training": {
            "minutes": round(run.seconds / 60, 1),
            **{name: value for name, value in asdict(options).items() if name not in _NOT_RECORDED},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_text(folder / "scores.json", json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def main() -> None:
    """Train, or go on training, and export."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    run = start(options)
    if options.resume:
        run.load()
    train(run, options)
    export(run, options)


if __name__ == "__main__":
    main()
