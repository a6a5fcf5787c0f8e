"""Does RESTORE's distance term help the reduced embedded model?

    python eval/distance_term.py

RESTORE (arXiv 2606.01711) adds log(2 - g(p_q - p_k)) to the logit of every query and key of the prompt, where g is the
mean cosine of the rotary angles between their positions: 0 for a token itself, up to log 2 and more for far ones. It
makes up for the attention that rotary positions take from distant keys. Here the term is added, times a strength, to
the default settings, which have RESTORE's two other parts already (positions of the full prompt, log token sizes).
Decoding steps have none, as in RESTORE.

Asked are questions about scenes of the training split, never the test's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_questions import training_questions
from transformers import HfArgumentParser
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_crossget import CrossGetConfig, accelerate_mllm
from mllm_crossget.embedded import Question, answer, load_embedded
from mllm_crossget.hooks.language.key_bias import IMPLEMENTATION, biased_attention, with_key_bias


@dataclass
class Options:
    """Options of the experiment."""

    keep_ratios: list[float] = field(default_factory=lambda: [0.25, 0.125], metadata={"help": "visual tokens kept"})
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0], metadata={"help": "RESTORE's is 1"})
    questions: int = field(default=2000, metadata={"help": "about scenes of the training split"})
    seed: int = field(default=78, metadata={"help": "of scenes and questions"})
    output: str = field(default="eval/results/distance_term.json", metadata={"help": "file of the results"})


def distance_term(positions_BT: Tensor, frequencies: Tensor) -> Tensor:
    """(B, T, T) float32 log(2 - g(p_q - p_k)) for the positions of queries and keys."""
    distance = (positions_BT[:, :, None] - positions_BT[:, None, :]).float()
    similarity = torch.zeros_like(distance)
    for frequency in frequencies.tolist():
        similarity += (distance * frequency).cos()
    return (2 - similarity / len(frequencies)).log()


class WithDistances:
    """The package's attention of the language model with the term, in the prompt; for the length of a block."""

    def __init__(self, frequencies: Tensor, strength: float) -> None:
        self.frequencies, self.strength = frequencies, strength

    def __enter__(self) -> None:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, self.attend)

    def __exit__(self, *error: object) -> None:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, biased_attention)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """As ``biased_attention``."""
        if query.shape[2] > 1:
            mask = with_key_bias(mask, torch.zeros(len(key), key.shape[2]), query, causal=True)
            mask = mask + self.strength * distance_term(kwargs["position_ids"], self.frequencies)[:, None]
        return biased_attention(module, query, key, value, mask, **kwargs)


def main(options: Options) -> None:
    """Answer with and without the term, and write accuracies and paired differences."""
    model, processor = load_embedded()
    questions = training_questions(options.questions, -(-options.questions // 4), options.seed)
    frequencies = model.model.language_model.rotary_emb.inv_freq
    rows = []
    for ratio in options.keep_ratios:
        accelerate_mllm(model, CrossGetConfig(keep_ratio=ratio))
        plain = _right(questions, answer(model, processor, questions))
        for strength in (0.0, *options.strengths):
            with WithDistances(frequencies, strength):
                right = plain if strength == 0 else _right(questions, answer(model, processor, questions))
            gain = right - plain
            rows.append(
                {
                    "keep_ratio": ratio,
                    "strength": strength,
                    "right": int(right.sum()),
                    "questions": len(questions),
                    "gain_in_points": round(100 * float(gain.mean()), 2),
                    "standard_error": round(100 * float(gain.std()) / len(questions) ** 0.5, 2),
                }
            )
            print(rows[-1], flush=True)
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    Path(options.output).write_text(json.dumps({"options": chosen, "rows": rows}, indent=1) + "\n")


def _right(questions: list[Question], answers: list[str]) -> Tensor:
    return torch.tensor([float(text == one.answer) for one, text in zip(questions, answers, strict=True)])


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    main(parsed)
