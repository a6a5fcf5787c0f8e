"""Train the embedded LLaVA from nothing on a CPU and write `mllm_crossget/embedded/weights`.

    python scripts/train_embedded.py                # under an hour on one core; run again to go on after a stop
    python scripts/train_embedded.py --warm_up_steps 50 --joint_steps 50 --weights_folder runs/try --run_folder runs/t

A step's data comes from (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen; the same
options, thread count and library versions give the same weights. The shipped weights are from a run whose options were
changed on the way (`history` in their scores.json): a fresh run follows the defaults from the first step, and reached
94.1 % in 34 minutes on one core, where the shipped weights have 94.7 % (eval/results/embedded_fresh_run.json).
"""

import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, HfArgumentParser, LlavaForConditionalGeneration

from mllm_crossget.atomic_files import append_lines, write_text
from mllm_crossget.embedded import WEIGHTS_FOLDER, answer, held_out_questions, score
from mllm_crossget.embedded.architecture import build_model, build_processor
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

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return self.warm_up_steps + self.joint_steps + self.polish_steps


class Run:
    """Everything that changes while training: weights, training-only heads, optimiser, step and seconds spent."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.processor = build_processor()
        self.model = build_model(options.seed).train()
        self.model.set_attn_implementation("eager")  # fused attention's backward is twice as slow on a CPU in bfloat16
        self.heads = DenseHeads()
        self.optimizer = make_optimizer(self.model, self.heads, options)
        self.step, self.seconds = 0, 0.0
        self.folder = Path(options.run_folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "heads", "optimizer")}
        torch.save(parts | {"step": self.step, "seconds": self.seconds}, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint where there is one."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name in ("model", "heads", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]

    def log(self, **numbers: object) -> None:
        """Append a line of JSON to the run's log."""
        append_lines(
            self.folder / "log.jsonl", [{"step": self.step, "minutes": round(self.seconds / 60, 2), **numbers}]
        )


def make_optimizer(model: torch.nn.Module, heads: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW; matrices decay, embeddings, norms and biases do not."""
    named = [*model.named_parameters(), *heads.named_parameters()]
    matrices = [weight for name, weight in named if weight.ndim > 1 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim <= 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": options.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.peak, betas=(0.9, 0.98))


def learning_rate(step: int, options: Options, ramp: int = 100) -> float:
    """The rate of a step: every phase ramps up and falls on a cosine, from and to its own shares of the peak."""
    phases = ((options.warm_up_steps, 1.0, 0.5), (options.joint_steps, 0.8, 0.005), (options.polish_steps, 0.3, 0.003))
    for length, high, low in phases:
        if step < length:
            fall = low + (high - low) * (1 + math.cos(math.pi * step / length)) / 2
            return options.peak * fall * min(1.0, (step + 1) / ramp)
        step -= length
    return 0.0


def step_loss(run: Run) -> tuple[Tensor, dict[str, float]]:
    """Loss and readable numbers of the run's present step."""
    options, seed = run.options, run.options.seed * 1_000_003 + run.step
    generator = torch.Generator().manual_seed(seed)
    if run.step < options.warm_up_steps:
        # Half of the warm-up attends inside a cell only: digits are learnt much faster when nothing else is in sight.
        mask = cell_mask() if run.step < options.warm_up_steps // 2 else None
        return dense_step(run, sample_layouts(options.warm_up_batch, "train", generator), generator, mask)[:2]
    layout = sample_layouts(options.joint_batch, "train", generator)
    dense, report, visual = dense_step(run, layout, generator)
    if (
        options.crowd_from <= run.step < options.crowd_until
    ):  # digits are what the model is weakest at: more of them, for the tower alone
        crowd = sample_layouts(options.joint_batch, "train", generator, crowded=True)
        more, report, _ = dense_step(run, crowd, generator)
        dense = dense + more
    pack = pack_questions(layout.scenes(), run.processor.tokenizer, random.Random(seed))
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        answers, right = answer_loss(run.model, visual, pack)
    return answers + options.dense * dense, report | {"answer": answers.item(), "right": right}


def dense_step(
    run: Run, layout: Layout, generator: torch.Generator, mask: Tensor | None = None
) -> tuple[Tensor, dict[str, float], Tensor]:
    """Loss of the dense labels on bent drawings of a layout, its parts, and the visual tokens."""
    pixels, ink = render(layout, jitter=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.options.bfloat16):
        hidden, visual = see(run.model, pixels, mask)
        loss, report = dense_loss(run.model, run.heads, hidden, visual, label_patches(layout, ink))
    return loss, report, visual


def take_step(run: Run) -> dict[str, float]:
    """One optimiser step; returns the step's readable numbers."""
    started = time.monotonic()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.options)
    loss, report = step_loss(run)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights = [weight for group in run.optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    if not math.isfinite(norm.item()):
        raise FloatingPointError(f"the gradient at step {run.step} is not finite: lower --peak, now {run.options.peak}")
    run.optimizer.step()
    run.step += 1
    run.seconds += time.monotonic() - started
    return {"loss": loss.item(), "gradient": norm.item()} | report


def check(run: Run, limit: int | None) -> dict[str, object]:
    """Scores of the model as it is on held-out questions; logged only, nothing is chosen by them."""
    run.model.eval()
    questions = held_out_questions(limit)
    result = score(questions, answer(run.model, run.processor, questions)).as_dict()
    run.model.train()
    return result


def train(run: Run) -> None:
    """Take all steps that are left, with a progress bar."""
    options = run.options
    mean: dict[str, float] = {}
    for _ in tqdm(range(run.step, options.steps), initial=run.step, total=options.steps, mininterval=2, smoothing=0.05):
        report = take_step(run)
        mean = {name: 0.95 * mean.get(name, value) + 0.05 * value for name, value in report.items()}
        if run.step % 50 == 0:
            run.log(**{name: round(value, 4) for name, value in mean.items()})
        if run.step % options.save_every == 0:
            run.save()
        if run.step > options.warm_up_steps and (run.step - options.warm_up_steps) % options.check_every == 0:
            run.log(held_out=check(run, 240))
    run.save()


def export(run: Run) -> None:
    """Save model and processor as bfloat16, load them again, and score what was loaded on the whole test set."""
    folder = Path(run.options.weights_folder)
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
        "evaluation": {"seconds": round(seconds, 1), "threads": run.options.threads, "dtype": "float32"},
        "training": {
            "minutes": round(run.seconds / 60, 1),
            **{name: value for name, value in asdict(run.options).items() if name not in _NOT_RECORDED},
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
    run = Run(options)
    if options.resume:
        run.load()
    train(run)
    export(run)


if __name__ == "__main__":
    main()
