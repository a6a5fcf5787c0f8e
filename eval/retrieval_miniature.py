"""Image-text retrieval with a reduced CLIP: CrossGET against ToMe and random merging at equal FLOPs.

    python scripts/train_retrieval.py        # first: trains the small CLIP into runs/retrieval
    python eval/retrieval_miniature.py                 # every run that has no result yet, then the summary

The paper's Table 1 in miniature. A method gets the largest number of tokens whose FLOPs (both towers, reduction
included) do not exceed the budget. Training-free: the trained CLIP as it is; CrossGET with the importance of the
official CLIP code (the cosine with the cross token's query) and with that of its LLaVA code (attention received).
Fine-tuned: the same few steps, data and weights for every method; CrossGET has cross tokens in both towers (no token is
removed from the text, the published setting) and the alignment loss. Recall on 1000 held-out pictures with three
captions each; 95 % intervals by bootstrap over pictures.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from result_files import add_run, read_runs
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, HfArgumentParser

from mllm_crossget import ReductionConfig, accelerate_mllm, retrieval_ranks
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.embedded.scenes import render, sample_layouts
from mllm_crossget.embedded.small_clip import LAYERS, RetrievalSet, build_tokenizer, caption, held_out_set, tokenize
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.ops.guidance.contrastive import contrastive_loss

ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name of an arm -> method and its settings
    "crossget": ("crossget", {"importance": "published"}),
    "crossget-attention": ("crossget", {"importance": "attention"}),
    "tome": ("tome", {}),
    "random": ("random", {}),
}
DIRECTIONS = ("image_to_text", "text_to_image")
TEXT_TOKENS = 26  # of a caption with six digits and no opening words, for the FLOPs
RECORDED = ("steps", "batch", "learning_rate", "alignment_weight", "images", "threads")
RESAMPLES = 2000
OUT = 10  # ranks from here on are not told apart


@dataclass
class Options:
    """Options of the experiment."""

    model: str = field(default="runs/retrieval/model", metadata={"help": "what scripts/train_retrieval.py wrote"})
    budgets: list[float] = field(
        default_factory=lambda: [0.8, 0.7, 0.6, 0.5], metadata={"help": "share of the untouched model's FLOPs"}
    )
    methods: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"of {list(ARMS)}"})
    tuned_budgets: list[float] = field(default_factory=lambda: [0.6], metadata={"help": "budgets to fine-tune at"})
    tuned_methods: list[str] = field(
        default_factory=lambda: ["crossget", "crossget-attention", "tome"], metadata={"help": "to fine-tune"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "of the fine-tuning's data"})
    steps: int = field(default=60, metadata={"help": "fine-tuning steps"})
    batch: int = field(default=24, metadata={"help": "pictures in a step, one caption each"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak; short warm-up, then cosine to 0"})
    alignment_weight: float = field(default=1.0, metadata={"help": "of the alignment loss; published: as the other's"})
    images: int = field(default=1000, metadata={"help": "held-out pictures"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str = field(default="eval/results/retrieval", metadata={"help": "folder of the results"})


@dataclass(frozen=True)
class Plan:
    """One run: method ("none": untouched), share of the FLOPs, and the fine-tuning's seed (None: training-free)."""

    method: str
    budget: float
    seed: int | None

    @property
    def name(self) -> str:
        """What its result is found by."""
        kind = "training-free" if self.seed is None else f"tuned_{self.seed}"
        return f"{self.method}_{self.budget:g}_{kind}"


def plans(options: Options) -> list[Plan]:
    """Every run, cheap ones first."""
    free = [Plan(method, budget, None) for budget in options.budgets for method in options.methods]
    tuned = [
        Plan(method, budget, seed)
        for seed in options.seeds
        for method, budget in [("none", 1.0)]
        + [(name, share) for share in options.tuned_budgets for name in options.tuned_methods]
    ]
    return [Plan("none", 1.0, None), *free, *tuned]


def total_flops(config: Any, method: Any) -> int:
    """FLOPs of one picture and one caption, with the importance from a map that attention shares (CPU)."""
    return model_flops(config, method, text_tokens=TEXT_TOKENS, one_softmax=True).total


def setting(config: Any, plan: Plan) -> ReductionConfig | None:
    """The method with the most visual tokens that keeps to the budget; None for the untouched model."""
    if plan.method == "none":
        return None
    name, settings = ARMS[plan.method]
    if name == "crossget" and plan.seed is not None:
        settings = {**settings, "text_r": 0}
    kind: Any = method_class(name)
    most = plan.budget * total_flops(config, kind(keep_ratio=1.0))
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    fits, too_many = (patches >> LAYERS) + 3, patches + 1  # each layer can halve the tokens at most
    while too_many - fits > 1:  # more tokens cost more
        tokens = (fits + too_many) // 2
        if total_flops(config, kind(visual_tokens=tokens, **settings)) <= most:
            fits = tokens
        else:
            too_many = tokens
    method = kind(visual_tokens=fits, **settings)
    if total_flops(config, method) > most:
        raise ValueError(f"{plan.method} cannot keep to {plan.budget} of the FLOPs; ask for a larger budget")
    return method


def fine_tune(model: Any, plan: Plan, options: Options) -> list[dict[str, float]]:
    """All weights and cross tokens, on training scenes; returns every tenth step's losses."""
    tokenizer = build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    model.train().set_attn_implementation("eager")  # the fused kernel's backward is slower on a CPU in bfloat16
    log = []
    for step in range(options.steps):
        seed = (plan.seed or 0) * 1_000_003 + 500_000 + step  # scenes that the training has not seen
        generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
        layout = sample_layouts(options.batch, "train", generator)
        texts = tokenize(tokenizer, [caption(scene, chance) for scene in layout.scenes()])
        share = (step + 1) / 6 if step < 6 else (1 + math.cos(math.pi * step / options.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, share)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**texts, pixel_values=render(layout, jitter=generator)[0] * 2 - 1)
            task = contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp().clamp(max=100))
        alignment = output.get("alignment_loss")
        loss = task if alignment is None else task + options.alignment_weight * alignment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            parts = {"contrastive": task} | ({} if alignment is None else {"alignment": alignment})
            log.append({"step": step} | {name: round(part.item(), 5) for name, part in parts.items()})
    model.eval().set_attn_implementation("sdpa")
    return log


@torch.no_grad()
def ranks(model: Any, test: RetrievalSet) -> dict[str, str]:
    """Rank of the right answer for every picture and for every caption: one digit each, "-" for 10 and more."""
    images = [model.get_image_features(pixel_values=part).pooler_output for part in test.pixels.split(50)]
    tokenizer = build_tokenizer()
    texts = []
    for start in range(0, len(test.captions), 200):
        inputs = tokenize(tokenizer, test.captions[start : start + 200])
        texts.append(model.get_text_features(**inputs).pooler_output)
    found = retrieval_ranks(torch.cat(images), torch.cat(texts), test.image_of_caption)
    return {
        name: "".join("-" if rank >= OUT else str(rank) for rank in part.tolist())
        for name, part in zip(DIRECTIONS, found, strict=True)
    }


def run_once(options: Options, plan: Plan, test: RetrievalSet) -> dict[str, Any]:
    """Reduce, fine-tune where the plan says so, and measure."""
    torch.manual_seed(plan.seed or 0)
    model: Any = CLIPModel.from_pretrained(options.model).eval()
    method = setting(model.config, plan)
    full = total_flops(model.config, method_class("crossget")(keep_ratio=1.0))
    if method is not None:
        accelerate_mllm(model, method)
    started = time.process_time()
    log = [] if plan.seed is None else fine_tune(model, plan, options)
    seconds = time.process_time() - started
    flops = full if method is None else total_flops(model.config, method)
    return {
        "method": plan.method,
        "budget": plan.budget,
        "seed": plan.seed,
        "settings": None if method is None else method.to_dict(),
        "gflops": round(flops / 1e9, 5),
        "share_of_flops": round(flops / full, 4),
        "tuning_core_seconds": round(seconds, 1),
        "log": log,
        "ranks": ranks(model, test),
        "versions": versions(),
        "options": {name: getattr(options, name) for name in RECORDED},
    }


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()} CPU, float32",
    }


def hits(results: list[dict[str, Any]], direction: str, k: int, images: int) -> Tensor:
    """(images,) share of each picture's queries answered within k, mean over seeds."""
    rows = torch.tensor(
        [[OUT if rank == "-" else int(rank) for rank in result["ranks"][direction]] for result in results]
    )
    return (rows < k).double().view(len(results), images, -1).mean(dim=(0, 2))


def mean(values: Tensor) -> float:
    """Rounded for the file."""
    return round(values.mean().item(), 4)


def interval(values: Tensor) -> list[float]:
    """95 % bootstrap interval of the mean over pictures."""
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return [round(low, 4), round(high, 4)]


def summary(options: Options) -> dict[str, Any]:
    """Recall of every arm, and CrossGET minus ToMe on the same pictures, from the results that are there."""
    arms: dict[tuple[str, float, bool], list[dict[str, Any]]] = {}
    runs = read_runs(Path(options.output))
    for plan in plans(options):
        if plan.name in runs:
            arms.setdefault((plan.method, plan.budget, plan.seed is not None), []).append(runs[plan.name])
    rows = []
    for (method, budget, tuned), results in arms.items():
        row: dict[str, Any] = {"method": method, "budget": budget, "tuned": tuned, "seeds": len(results)}
        row |= {name: results[0][name] for name in ("gflops", "share_of_flops", "settings")}
        for direction in DIRECTIONS:
            found = hits(results, direction, 1, options.images)
            row[direction] = {f"recall@{k}": mean(hits(results, direction, k, options.images)) for k in (1, 5, 10)}
            row[direction]["recall@1 interval"] = interval(found)
            row[direction]["recall@1 by seed"] = [mean(hits([one], direction, 1, options.images)) for one in results]
            other = arms.get(("tome", budget, tuned))
            if method.startswith("crossget") and other is not None and len(other) == len(results):
                gap = found - hits(other, direction, 1, options.images)
                row[direction]["recall@1 minus tome"] = mean(gap)
                row[direction]["recall@1 minus tome interval"] = interval(gap)
        rows.append(row)
    training = Path(options.model).parent / "training.json"
    return {
        "images": options.images,
        "layers": LAYERS,
        "intervals": f"95 %, bootstrap over pictures, {RESAMPLES} resamples; the seeds' hits are averaged first",
        "training": json.loads(training.read_text()) if training.exists() else None,
        "versions": versions(),
        "rows": rows,
    }


def main() -> None:
    """Run what is missing, then write and print the summary."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    unknown = sorted({*options.methods, *options.tuned_methods} - set(ARMS))
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known: {', '.join(ARMS)}")
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_runs(folder)
    missing = [plan for plan in plans(options) if plan.name not in done]
    test = held_out_set(options.images) if missing else None
    for plan in tqdm(missing, desc="runs"):
        result = run_once(options, plan, test)  # type: ignore[arg-type]
        add_run(folder, plan.name, result)
    made = summary(options)
    write_text(folder / "summary.json", json.dumps(made, indent=1) + "\n")
    for row in made["rows"]:
        print(row["method"], row["budget"], "tuned" if row["tuned"] else "free", row["gflops"],
              *(row[direction]["recall@1"] for direction in DIRECTIONS))  # fmt: skip


if __name__ == "__main__":
    main()
