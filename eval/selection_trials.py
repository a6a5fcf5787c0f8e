"""Other ways to select and merge tokens at the tower's output, against the default, on scenes of the training split.

    python eval/selection_trials.py

Training-free, ``schedule="output"``, an eighth of the tokens. Questions are of the kinds that lose most. Every trial
replaces one step of the default and is scored on the same questions. ``python eval/paired.py`` on the result compares
them. Nothing here is chosen on the held-out questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from result_files import add_run, read_runs
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from tqdm import tqdm
from training_questions import training_questions
from transformers import AutoProcessor, HfArgumentParser, LlavaForConditionalGeneration

from mllm_crossget import CrossGetConfig, accelerate_mllm
from mllm_crossget.arithmetic.intervals import paired_difference
from mllm_crossget.embedded import WEIGHTS_FOLDER, Question, answer
from mllm_crossget.hooks.request import compaction
from mllm_crossget.methods.signals import Signals, protected_count, shielded_tokens
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.selection import farthest_first, merge_into_nearest

HARDEST = ("caption", "count", "position")
_PATCHES = 12  # per side of the embedded model's pictures
_DEFAULT = CrossGetConfig.match_at_output


@dataclass
class Options:
    """Options of the experiment."""

    keep_ratio: float = field(default=0.125, metadata={"help": "visual tokens kept"})
    schedule: str = field(default="output", metadata={"help": "where tokens leave"})
    kinds: list[str] = field(
        default_factory=lambda: ["caption", "count", "position"], metadata={"help": "of questions"}
    )
    questions: int = field(default=900, metadata={"help": "number of questions"})
    seed: int = field(default=991, metadata={"help": "of the scenes"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str = field(default="eval/results/selection_trials", metadata={"help": "folder of the results"})


def nearest_centre(signals: Signals, r: int, rounds: int, distance_weight: float = 0.0) -> Match:
    """As the default, with rounds of k-means after the selection: tokens go to the nearest mean of a group, not to the
    nearest kept token. With a weight, coordinates (0..1) are part of what is compared."""
    shielded = shielded_tokens(signals)
    keys = normalize(signals.keys.float(), dim=-1)
    if distance_weight:
        keys = torch.cat([keys, distance_weight * _coordinates(shielded)], dim=-1)
    kept = shielded.shape[1] - protected_count(signals) - r
    stays = shielded.scatter(1, farthest_first(keys, _importance(signals), kept, shielded), True)
    match = merge_into_nearest(stays, shielded.shape[1] - r, keys, shielded)
    for _ in range(rounds):
        match = _to_centres(keys, match, shielded)
    return match


def facility(signals: Signals, r: int) -> Match:
    """As the default, with kept tokens that maximise the sum of every token's best similarity (greedy, submodular)."""
    shielded = shielded_tokens(signals)
    keys = normalize(signals.keys.float(), dim=-1)
    similarity, taken = keys @ keys.mT, shielded.clone()
    best = torch.full(shielded.shape, -1.0)
    for _ in range(shielded.shape[1] - protected_count(signals) - r):
        gain = (similarity - best[:, :, None]).clamp_min(0) * ~shielded[:, :, None]
        place = gain.sum(dim=1).masked_fill(taken, -1).argmax(dim=1, keepdim=True)
        taken = taken.scatter(1, place, True)
        best = torch.maximum(best, similarity.gather(2, place[:, None].expand(-1, len(best[0]), 1))[..., 0])
    return merge_into_nearest(taken, shielded.shape[1] - r, keys, shielded)


def share_of_mean(config: CrossGetConfig, signals: Signals, r: int, share: float) -> Match:
    """The default's groups, whose feature is only in part their mean and for the rest the kept token itself."""
    match = _DEFAULT(config, signals, r)
    members = one_hot(match.slot, match.kept.shape[1]).float()
    mean = (members / members.sum(dim=1, keepdim=True)).mT
    own = one_hot(match.kept, match.slot.shape[1]).float()
    return match._replace(mix=share * mean + (1 - share) * own)


def _to_centres(keys: Tensor, match: Match, shielded: Tensor) -> Match:
    members = one_hot(match.slot, match.kept.shape[1]).float()
    centres = members.mT @ keys / members.sum(dim=1)[..., None]
    distance = torch.cdist(keys, centres).masked_fill(shielded.gather(1, match.kept)[:, None], torch.inf)
    rows = torch.arange(match.kept.shape[1]).expand_as(match.kept)
    slot = distance.argmin(dim=-1).scatter(1, match.kept, rows)
    return match._replace(dst=match.kept.gather(1, slot.gather(1, match.src)), slot=slot)


def _importance(signals: Signals) -> Tensor:
    if signals.importance is None:
        raise ValueError("CrossGET needs the importance of the tokens; got none")
    return signals.importance


def _coordinates(shielded: Tensor) -> Tensor:
    """(B, T, 2) coordinates 0..1 of the patches; 0 for protected tokens."""
    index = torch.arange(_PATCHES**2)
    places = torch.stack([index // _PATCHES, index % _PATCHES], dim=-1) / _PATCHES
    found = torch.zeros(*shielded.shape, 2)
    found[~shielded] = places.repeat(len(shielded), 1)
    return found


TRIALS = {
    "default": _DEFAULT,
    "k-means, 1 round": lambda _, signals, r: nearest_centre(signals, r, rounds=1),
    "k-means, 3 rounds": lambda _, signals, r: nearest_centre(signals, r, rounds=3),
    "k-means, 1 round, coordinates 0.3": lambda _, signals, r: nearest_centre(signals, r, 1, 0.3),
    "k-means, 1 round, coordinates 1": lambda _, signals, r: nearest_centre(signals, r, 1, 1.0),
    "facility location": lambda _, signals, r: facility(signals, r),
    "three quarters of the mean": lambda config, signals, r: share_of_mean(config, signals, r, 0.75),
    "half of the mean": lambda config, signals, r: share_of_mean(config, signals, r, 0.5),
    "no mean, sizes alone": lambda config, signals, r: share_of_mean(config, signals, r, 0.0),
    "size to the power 0.8": _DEFAULT,
    "size to the power 1.2": _DEFAULT,
}


@contextmanager
def trial(name: str) -> Iterator[None]:
    """The library with one step replaced."""
    power = float(name.rsplit(" ", 1)[1]) if name.startswith("size") else 1.0
    log_sizes = compaction.log_sizes_of
    with (
        patch.object(CrossGetConfig, "match_at_output", TRIALS[name]),
        patch.object(compaction, "log_sizes_of", lambda *given: power * log_sizes(*given)),
    ):
        yield


def right_of(options: Options, questions: list[Question]) -> str:
    """1 for every right answer, 0 for every wrong one."""
    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS_FOLDER, dtype=torch.float32).eval()
    accelerate_mllm(model, CrossGetConfig(keep_ratio=options.keep_ratio, schedule=options.schedule))
    texts = answer(model, AutoProcessor.from_pretrained(WEIGHTS_FOLDER), questions)
    return "".join("1" if text == one.answer else "0" for text, one in zip(texts, questions, strict=True))


def main() -> None:
    """Run what is missing, and say every trial's difference to the default."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = 2 * (options.questions // len(options.kinds) + 1)  # not every scene allows a question of every kind
    questions = training_questions(options.questions, scenes, options.seed, options.kinds)
    setting = f"{options.schedule} {options.keep_ratio:g}"
    for name in tqdm(TRIALS, desc="trials"):
        if f"{name} {setting}" not in read_runs(folder):
            with trial(name):
                result = {"right": right_of(options, questions), "options": vars(options)}
            add_run(folder, f"{name} {setting}", result)
    marks = {name: [int(one) for one in run["right"]] for name, run in read_runs(folder).items()}
    base = marks[f"default {setting}"]
    for name, own in marks.items():
        found = paired_difference(base, own)
        points = [100 * value for value in (found.difference, found.low, found.high)]
        print(
            f"{name}: {100 * sum(own) / len(own):.1f} %, {points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f})"
        )


if __name__ == "__main__":
    main()
