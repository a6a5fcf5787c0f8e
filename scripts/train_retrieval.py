"""Train the small CLIP of the retrieval demo from nothing on a CPU.

    python scripts/train_retrieval.py               # a quarter of an hour on one core; run again to go on after a stop
    python scripts/train_retrieval.py --warm_up_steps 20 --joint_steps 20 --run_folder runs/try

First the vision tower learns from dense labels of every patch, then both towers from captions by the contrastive loss.
A step's data comes from (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen. The
weights are written into the run folder and not shipped; ``eval/retrieval_miniature.py`` measures them.
"""

import json
import platform
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPModel, HfArgumentParser

from mllm_crossget.embedded.loop import Phase, Run
from mllm_crossget.embedded.pretraining import cell_mask, label_patches
from mllm_crossget.embedded.scenes import Layout, render, sample_layouts
from mllm_crossget.embedded.small_clip import (
    RetrievalSet,
    SceneHeads,
    build_model,
    build_tokenizer,
    caption,
    held_out_set,
    tokenize,
)
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.ops.guidance.contrastive import contrastive_loss
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


def start(options: Options) -> Run:
    """The run before its first step."""
    model = build_model(options.seed).train()
    model.set_attn_implementation("eager")  # the fused kernel's backward is slower on a CPU in bfloat16
    phases = (Phase(options.warm_up_steps, 1.0, 0.5), Phase(options.joint_steps, 0.8, 0.005))
    return Run(model, SceneHeads(), phases, Path(options.run_folder), options.peak, options.decay, ramp=50)


def see(model: CLIPModel, pixels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, 1 + P, V] of the vision tower and image embeddings [B, E]; pixels in 0..1."""
    tower = model.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(pixels * 2 - 1))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, mask)
    return hidden, model.visual_projection(tower.post_layernorm(hidden[:, 0]))


def step_loss(run: Run, options: Options, tokenizer: Any) -> tuple[Tensor, dict[str, float]]:
    """Loss and readable numbers of the run's present step."""
    seed = options.seed * 1_000_003 + run.step
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
        loss = caption_loss(run.model, tokenizer, layout, embeds, random.Random(seed))
    report["contrastive"] = loss.item()
    return loss + options.dense * dense + options.shown * shown, report


def caption_loss(model: CLIPModel, tokenizer: Any, layout: Layout, embeds: Tensor, chance: random.Random) -> Tensor:
    """Contrastive loss of pictures and one caption each."""
    texts = [caption(scene, chance) for scene in layout.scenes()]
    features = model.get_text_features(**tokenize(tokenizer, texts)).pooler_output
    return contrastive_loss(embeds, features, model.logit_scale.exp().clamp(max=100))


@torch.no_grad()
def check(model: CLIPModel, tokenizer: object, test: RetrievalSet, batch: int = 100) -> dict[str, float]:
    """Recall of the model on held-out pictures; logged only, nothing is chosen by it."""
    images = [model.get_image_features(pixel_values=part).pooler_output for part in test.pixels.split(batch)]
    inputs = tokenize(tokenizer, test.captions)  # type: ignore[arg-type]
    texts = model.get_text_features(**inputs).pooler_output
    recall = retrieval_recall(torch.cat(images), texts, test.image_of_caption)
    return {name: round(value, 4) for name, value in recall.items()}


def export(run: Run, options: Options) -> None:
    """Save model and tokenizer, and what they score on the held-out pictures."""
    folder = run.folder / "model"
    model = run.model.eval()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    test = held_out_set()
    record = {
        "recall": check(model, build_tokenizer(), test),
        "images": len(test.pixels),
        "captions": len(test.captions),
        "minutes": round(run.seconds / 60, 1),
        "core_minutes": round(run.core_seconds / 60, 1),
        "options": {name: value for name, value in asdict(options).items() if name != "run_folder"},
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
    run, tokenizer = start(options), build_tokenizer()
    if options.resume:
        run.load()
    for _ in run.train(lambda _: step_loss(run, options, tokenizer), options.save_every):
        pass
    export(run, options)


if __name__ == "__main__":
    main()
