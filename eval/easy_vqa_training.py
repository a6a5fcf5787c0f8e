"""Train a small LLaVA on easy-VQA's training split, as the embedded one was trained; write ``eval/weights/easy_vqa``.

    pip install easy-vqa --no-deps
    python eval/easy_vqa_training.py        # run again to go on after a stop

It is an example for one's own pictures and vocabulary: ``architecture`` makes tokenizer, processor and model from a
word list, ``own_pictures`` takes over the embedded model's weights and labels patches by words, ``pretraining`` packs
the questions of a picture into a row. 400 steps on patch labels come first, because the shapes are not found without
them. Positions are a LLaVA's, nothing is squeezed or reduced. The test split is read once, when training is over.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from easy_vqa_data import GROUPS, Labelled, asked_questions, label_split, read_split, word_list
from torch import Tensor
from transformers import HfArgumentParser, LlavaForConditionalGeneration

from mllm_crossget.embedded import answer, load_embedded, score
from mllm_crossget.embedded.architecture import build_model, build_processor
from mllm_crossget.embedded.loop import Phase, Run
from mllm_crossget.embedded.own_pictures import WordHeads, adopt_weights, word_label_loss
from mllm_crossget.embedded.pretraining import answer_loss, pack_rows, see
from mllm_crossget.files.atomic_files import write_text

_NOT_RECORDED = ("run_folder", "weights_folder", "save_every", "data_folder")  # change nothing in the weights


@dataclass
class Options:
    """Options of the training run."""

    label_steps: int = field(default=400, metadata={"help": "steps of the tower and projector on patch labels"})
    joint_steps: int = field(default=1000, metadata={"help": "steps of the whole model on questions"})
    label_batch: int = field(default=16, metadata={"help": "pictures in a step on labels"})
    joint_batch: int = field(default=8, metadata={"help": "pictures in a joint step, with all of their questions"})
    peak: float = field(default=2e-3, metadata={"help": "highest learning rate"})
    dense: float = field(default=0.15, metadata={"help": "weight of the patch labels in the joint phase"})
    seed: int = field(default=1, metadata={"help": "seed of new weights and data"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    data_folder: str | None = field(default=None, metadata={"help": "the data; the installed package's if not given"})
    run_folder: str = field(default="runs/easy_vqa", metadata={"help": "checkpoints and log"})
    weights_folder: str = field(default="eval/weights/easy_vqa", metadata={"help": "where the result goes"})
    save_every: int = field(default=100, metadata={"help": "steps between checkpoints"})


class Lesson:
    """What a step is shown, and its loss."""

    def __init__(self, options: Options, data: Labelled, processor: Any, model: LlavaForConditionalGeneration) -> None:
        self.options, self.data, self.tokenizer, self.model = options, data, processor.tokenizer, model
        self.heads = WordHeads(GROUPS)
        self.groups = {name: self.tokenizer.convert_tokens_to_ids(list(words)) for name, words in GROUPS.items()}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss and readable numbers of a step; its pictures come from its number alone."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        joint = step >= options.label_steps
        size = options.joint_batch if joint else options.label_batch
        rows = torch.randint(len(self.data.pixels), (size,), generator=generator)
        mirrored = torch.rand(size, generator=generator) < 0.5  # no question depends on left and right
        pixels = self.data.pixels[rows].float() / 255
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        hidden, visual = see(self.model, pixels)
        labels = {name: (self._mirror(own, mirrored), shown)
                  for name, (own, shown) in self.data.patch_labels(rows).items()}  # fmt: skip
        dense, report = word_label_loss(self.model, self.heads, hidden, visual, labels, self.groups)
        if not joint:
            return dense, report | {"dense": dense.item()}
        dialogues = [[(*pair, 1.0) for pair in self.data.dialogues[row]] for row in rows.tolist()]
        answers, right = answer_loss(self.model, visual, pack_rows(dialogues, self.tokenizer))
        return answers + options.dense * dense, report | {"answer": answers.item(), "right": right}

    @staticmethod
    def _mirror(labels: Tensor, mirrored: Tensor) -> Tensor:
        side = int(labels.shape[1] ** 0.5)
        flipped = labels.unflatten(1, (side, side)).flip(-1).flatten(1)
        return torch.where(mirrored[:, None], flipped, labels)


def prepare(options: Options) -> tuple[Run, Lesson, tuple[str, ...]]:
    """The run before its first step or as its checkpoint has it, its lesson, and the word list."""
    split = read_split("train", Path(options.data_folder) if options.data_folder else None)
    words = word_list(split)
    processor = build_processor(words)
    model = build_model(options.seed, words).train()
    adopt_weights(model, load_embedded()[0], words)
    model.set_attn_implementation("eager")
    lesson = Lesson(options, label_split(split, processor.image_processor), processor, model)
    phases = (Phase(options.label_steps, 1.0, 0.5), Phase(options.joint_steps, 0.8, 0.003))
    run = Run(model, lesson.heads, phases, Path(options.run_folder), options.peak)
    run.load()
    return run, lesson, words


def export(run: Run, words: tuple[str, ...], options: Options) -> dict[str, Any]:
    """Save model and processor as bfloat16, load them again, and score them on the questions of the test split."""
    folder = Path(options.weights_folder)
    run.model.eval().to(torch.bfloat16).save_pretrained(folder)
    build_processor(words).save_pretrained(folder)  # a used tokenizer would save the padding of its last batch
    model, processor = load_embedded(folder=folder)
    questions = asked_questions(read_split("test", Path(options.data_folder) if options.data_folder else None))
    record = score(questions, answer(model, processor, questions)).as_dict() | {
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
    return record


def main() -> None:
    """Train, or go on training, and export."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    run, lesson, words = prepare(options)
    for _ in run.train(lesson.loss, options.save_every):
        pass
    print(json.dumps(export(run, words, options), indent=2))


if __name__ == "__main__":
    main()
