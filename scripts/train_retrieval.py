"""Train the small CLIP of the retrieval demo from nothing on a CPU.

    python scripts/train_retrieval.py               # a quarter of an hour on one core; run again to go on after a stop
    python scripts/train_retrieval.py --warm_up_steps 20 --joint_steps 20 --run_folder runs/try

First the vision tower learns from dense labels of every patch, then both towers from captions by the contrastive loss.
A step's data comes from (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen. The
weights are written into the run folder and not shipped; ``eval/retrieval_miniature.py`` measures them.
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
from transformers import CLIPModel, HfArgumentParser

from mllm_crossget.atomic_files import append_lines, write_text
from mllm_crossget.embedded.dual_encoder import (
    RetrievalSet,
    SceneHeads,
    build_model,
    build_tokenizer,
    caption,
    held_out_set,
    tokenize,
)
from mllm_crossget.embedded.pretraining import cell_mask, label_patches
from mllm_crossget.embedded.scenes import Layout, render, sample_layouts
from mllm_crossget.ops.contrastive import contrastive_loss
from mllm_crossget.retrieval import retrieval_recall


@dataclass
class Options:
    """Options of the training run."""

    warm_up_steps: int = field(default=1300, metadata={"help": "steps of the vision tower on dense labels"})
    joint_steps: int = field(default=1300, metadata={"help": "steps of both towers on captions"})
    warm_up_batch: int = field(default=16, metadata={"help": "scenes in a warm-up step"})
    joint_batch: int = field(default=24, metadata={"help": "scenes in a joint step, with one caption each"})
    peak: float = field(default=2.5e-3, metadata={"help": "highest learning rate"})
    decay: float = field(default=0.03, metadata={"help": "weight decay of the matrices"})
    dense: float = field(default=0.15, metadata={"help": "weight of the dense labels in the joint phase"})
    shown: float = field(default=0.1, metadata={"help": "weight of the coloured digits read from the embedding"})
    seed: int = field(default=1, metadata={"help": "seed of weights and data"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    bfloat16: bool = field(default=True, metadata={"help": "autocast to bfloat16"})
    resume: bool = field(default=True, metadata={"help": "go on from the run folder's checkpoint if there is one"})
    run_folder: str = field(default="runs/retrieval", metadata={"help": "checkpoints, log and the trained model"})
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints"})

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.warm_up_steps + self.joint_steps


class Run:
    """Everything that changes while training: weights, training-only heads, optimiser, step and seconds spent."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer = build_tokenizer()
        self.model = build_model(options.seed).train()
        self.model.set_attn_implementation("eager")  # the fused kernel's backward is slower on a CPU in bfloat16
        self.heads = SceneHeads()
        self.optimizer = make_optimizer(self.model, self.heads, options)
        self.step, self.seconds, self.core_seconds = 0, 0.0, 0.0
        self.folder = Path(options.run_folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "heads", "optimizer")}
        numbers = {name: getattr(self, name) for name in ("step", "seconds", "core_seconds")}
        torch.save(parts | numbers, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint where there is one."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name in ("model", "heads", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.seconds, self.core_seconds = (
                state[name] for name in ("step", "seconds", "core_seconds")
            )  # fmt: skip

    def log(self, **numbers: object) -> None:
        """Append a line of JSON to the run's log."""
        append_lines(
            self.folder / "log.jsonl", [{"step": self.step, "minutes": round(self.seconds / 60, 2), **numbers}]
        )


def make_optimizer(model: torch.nn.Module, heads: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW; matrices decay, embeddings, norms, biases and the logit scale do not."""
    named = [*model.named_parameters(), *heads.named_parameters()]
    matrices = [weight for name, weight in named if weight.ndim > 1 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim <= 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": options.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.peak, betas=(0.9, 0.98))


def learning_rate(step: int, options: Options, ramp: int = 50) -> float:
    """The rate of a step: both phases ramp up and fall on a cosine, from and to their own shares of the peak."""
    for length, high, low in ((options.warm_up_steps, 1.0, 0.5), (options.joint_steps, 0.8, 0.005)):
        if step < length:
            fall = low + (high - low) * (1 + math.cos(math.pi * step / length)) / 2
            return options.peak * fall * min(1.0, (step + 1) / ramp)
        step -= length
    return 0.0


def see(model: CLIPModel, pixels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, 1 + P, V] of the vision tower and image embeddings [B, E]; pixels in 0..1."""
    tower = model.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(pixels * 2 - 1))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, mask)
    return hidden, model.visual_projection(tower.post_layernorm(hidden[:, 0]))


def step_loss(run: Run) -> tuple[Tensor, dict[str, float]]:
    """Loss and readable numbers of the run's present step."""
    options, seed = run.options, run.options.seed * 1_000_003 + run.step
    generator = torch.Generator().manual_seed(seed)
    warm_up = run.step < options.warm_up_steps
    layout = sample_layouts(options.warm_up_batch if warm_up else options.joint_batch, "train", generator)
    pixels, ink = render(layout, jitter=generator)
    # Half of the warm-up attends inside a cell only: digits are learnt much faster when nothing else is in sight.
    mask = cell_mask() if run.step < options.warm_up_steps // 2 else None
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        hidden, embeds = see(run.model, pixels, mask)
        dense = run.heads.patch_losses(hidden[:, 1:], label_patches(layout, ink))
        shown = run.heads.shown_loss(embeds, layout)
        report = {"dense": dense.item(), "shown": shown.item()}
        if warm_up:
            return dense + options.shown * shown, report
        loss = caption_loss(run, layout, embeds, random.Random(seed))
    report["contrastive"] = loss.item()
    return loss + options.dense * dense + options.shown * shown, report


def caption_loss(run: Run, layout: Layout, embeds: Tensor, chance: random.Random) -> Tensor:
    """Contrastive loss of pictures and one caption each."""
    texts = [caption(scene, chance) for scene in layout.scenes()]
    features = run.model.get_text_features(**tokenize(run.tokenizer, texts)).pooler_output
    return contrastive_loss(embeds, features, run.model.logit_scale.exp().clamp(max=100))


def take_step(run: Run) -> dict[str, float]:
    """One optimiser step; returns the step's readable numbers."""
    started, core = time.monotonic(), time.process_time()
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
    run.core_seconds += time.process_time() - core
    return {"loss": loss.item(), "gradient": norm.item()} | report


@torch.no_grad()
def check(model: CLIPModel, tokenizer: object, test: RetrievalSet, batch: int = 100) -> dict[str, float]:
    """Recall of the model on held-out pictures; logged only, nothing is chosen by it."""
    images = [model.get_image_features(pixel_values=part).pooler_output for part in test.pixels.split(batch)]
    inputs = tokenize(tokenizer, test.captions)  # type: ignore[arg-type]
    texts = model.get_text_features(**inputs).pooler_output
    recall = retrieval_recall(torch.cat(images), texts, test.image_of_caption)
    return {name: round(value, 4) for name, value in recall.items()}


def train(run: Run) -> None:
    """Take all steps that are left, with a progress bar."""
    options = run.options
    mean: dict[str, float] = {}
    for _ in tqdm(range(run.step, options.steps), initial=run.step, total=options.steps, mininterval=20):
        report = take_step(run)
        mean = {name: 0.95 * mean.get(name, value) + 0.05 * value for name, value in report.items()}
        if run.step % 50 == 0:
            run.log(**{name: round(value, 4) for name, value in mean.items()})
        if run.step % options.save_every == 0:
            run.save()
    run.save()


def export(run: Run) -> None:
    """Save model and tokenizer, and what they score on the held-out pictures."""
    folder = run.folder / "model"
    model = run.model.eval()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    test = held_out_set()
    record = {
        "recall": check(model, run.tokenizer, test),
        "images": len(test.pixels),
        "captions": len(test.captions),
        "minutes": round(run.seconds / 60, 1),
        "core_minutes": round(run.core_seconds / 60, 1),
        "options": {name: value for name, value in asdict(run.options).items() if name != "run_folder"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_text(run.folder / "training.json", json.dumps(record, indent=2) + "\n")
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
