"""From records to batches: the chat template masks the prompt, bad samples are reported, and text-only batches get a
dummy image so that all processes of a sharded run do the same.

``load_records`` reads these formats. A JSON file holds a list of samples, and a JSONL file one sample per line. LLaVA's
format, where ``<image>`` stands for a picture::

    {"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

Chat messages, whose content is text or a list of parts::

    {"id": "2", "images": ["a.jpg", "b.jpg"], "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": "Yes."}]}

``id`` may be left out, and so may ``image`` if a sample has no picture. Pictures are paths (relative ones start at
``image_folder``, by default the data file's folder). In parquet files and data sets they may also be bytes or pictures,
and in Python arrays or tensors. The number of ``<image>`` tags or image parts must be that of the pictures, or zero;
the pictures then come first. A picture may also be given in its part: ``{"type": "image", "path": "a.jpg"}``. The
labels are the words of ``assistant`` and ``gpt``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from mllm_crossget.families.family import config_at
from mllm_crossget.field_types import check_type
from mllm_crossget.files.atomic_files import append_lines, read_lines
from mllm_crossget.files.records import BadSampleError, Record, Records, load_records
from mllm_crossget.hooks.ground.hosts import config_of
from mllm_crossget.hooks.ground.state import base_model, handle_of
from mllm_crossget.training.end_marks import unknown_words, with_end_marks
from mllm_crossget.training.losses import IGNORE
from mllm_crossget.training.pairs import answers_apart, encode_pair, prompt_tokens_per_image, writes_pairs

# LLaVA-1.5's conversation ("vicuna_v1"), with marks around the assistant's tokens.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} {% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT:{% generation %} "
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "</s>{% endgeneration %}{% elif not loop.first %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_ON_BAD_SAMPLE = ("skip", "stop")
_ASPECTS = ("pad", "keep")
_MEAN_COLOUR = (122, 116, 104)  # CLIP's mean colour, with which LLaVA-1.5 pads pictures


class TrainingData(Dataset[dict[str, Tensor]]):
    """Encoded samples, which are made on access.

    Args:
        records: result of ``load_records``.
        processor: the model's processor. Its chat template must mark the assistant's words with ``{% generation %}``;
            one that does not is replaced by LLaVA-1.5's (``VICUNA_TEMPLATE``, with the tokenizer's own end mark). An
            answer that the template does not end gets the tokenizer's end mark, which is learned. Words that the
            tokenizer does not know are warned of, with their share.
        max_length: largest number of tokens of a sample, including image placeholders; longer ones are cut at the end.
        on_bad_sample: "skip" takes the next good sample of the same modality instead and writes id and reason to
            ``bad_sample_file``; "stop" raises.
        bad_sample_file: file of JSON lines, one per bad sample.
        image_aspect: "pad" makes pictures square first, as LLaVA-1.5 was trained; "keep" leaves that to the processor.
        prompt_template: for models without a chat template, such as BLIP-2: the text around the question, which
            replaces ``{}``.
        model: for those models: the model; its language model determines where the answer is put and how it ends.

    Raises:
        ValueError: an unknown setting, a setting that would not be used, or no model although one is needed.
        TypeError: ``max_length`` is not an integer.
        BadSampleError: from ``data[i]`` with ``on_bad_sample="stop"``.
    """

    def __init__(
        self,
        records: Records,
        processor: Any,
        *,
        max_length: int = 2048,
        on_bad_sample: str = "skip",
        bad_sample_file: str | Path | None = None,
        image_aspect: str = "pad",
        prompt_template: str = "{}",
        model: nn.Module | None = None,
    ) -> None:
        if writes_pairs(processor) and model is None:
            raise ValueError(f"{type(processor).__name__} knows no chat: give TrainingData(..., model=model) too")
        check_type("max_length", max_length, int)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}; it counts image placeholders too")
        if processor is not None and prompt_template != "{}" and not writes_pairs(processor):
            raise ValueError(
                f"prompt_template={prompt_template!r} is for models that know no chat; {type(processor).__name__} has "
                "a chat template: leave prompt_template out"
            )
        if "{}" not in prompt_template:
            raise ValueError(f"prompt_template={prompt_template!r} has no {{}}, where the question goes")
        for name, value, known in (
            ("on_bad_sample", on_bad_sample, _ON_BAD_SAMPLE),
            ("image_aspect", image_aspect, _ASPECTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        self.records, self.processor, self.max_length = records, processor, max_length
        self.on_bad_sample, self.image_aspect = on_bad_sample, image_aspect
        self.bad_sample_file = Path(bad_sample_file) if bad_sample_file is not None else None
        self.bad: dict[str, str] = {}
        self.lengths, self.has_image = records.sketch()
        self.prompt_template = prompt_template
        self.text_config = config_of(base_model(model)).text_config if model is not None else None
        marked = "{% generation" in (processor.chat_template or "")
        end = processor.tokenizer.eos_token or ""
        self.template = processor.chat_template if marked else VICUNA_TEMPLATE.replace("</s>", end)
        unknown = unknown_words(records, processor.tokenizer)
        if unknown is not None:
            warnings.warn(unknown, stacklevel=2)
        bos = processor.tokenizer.bos_token
        self.adds_bos = bos is not None and bos not in self.template and "bos_token" not in self.template

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` (both (L,)) and, with an image, ``pixel_values`` (images, 3, height, width).

        For an encoder-decoder the labels are the answer alone, with their own length.
        """
        for candidate in self._candidates(index):
            try:
                return self.encode(self.records[candidate])
            except BadSampleError as error:
                if self.on_bad_sample == "stop":
                    raise
                self._report(error)
        raise ValueError(
            f"no usable sample like number {index} is left: all {len(self.records)} were tried. "
            f"The last reason: {next(reversed(self.bad.values()))}"
        )

    def encode(self, record: Record) -> dict[str, Tensor]:
        """One record as tensors. Raises ``BadSampleError``."""
        images = [self._square(self.records.open(image, record.identity)) for image in record.images]
        if writes_pairs(self.processor):
            return encode_pair(self.processor, record, images, self.prompt_template, self.text_config, self.max_length)
        try:
            encoded = self.processor.apply_chat_template(
                _with_images(record.messages, images),
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                return_tensors="pt",
                processor_kwargs={"add_special_tokens": self.adds_bos},
            )
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BadSampleError(record.identity, f"the chat template or processor failed: {error}") from error
        learned = torch.as_tensor(encoded["assistant_masks"][0]).tolist()
        token_ids, learned = with_end_marks(encoded["input_ids"][0].tolist(), learned, self.processor.tokenizer)
        ids = torch.tensor(token_ids)
        labels = ids.masked_fill(torch.tensor(learned) == 0, IGNORE)
        cut = ids[self.max_length :]
        if (cut == self.processor.image_token_id).any():
            raise BadSampleError(record.identity, f"its images do not fit into {self.max_length} tokens")
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if (labels[1:] == IGNORE).all():
            raise BadSampleError(record.identity, f"no answer is left within {self.max_length} tokens")
        sample = {"input_ids": ids, "labels": labels}
        return sample | ({"pixel_values": encoded["pixel_values"]} if images else {})

    def _candidates(self, index: int) -> list[int]:
        """The sample, then later ones of the same modality, so that grouping by modality does not break."""
        order = [*range(index, len(self)), *range(index)]
        return [candidate for candidate in order if self.has_image[candidate] == self.has_image[index]]

    def _report(self, error: BadSampleError) -> None:
        if error.identity in self.bad:
            return
        self.bad[error.identity] = error.reason
        if self.bad_sample_file is not None:
            try:
                append_lines(self.bad_sample_file, [{"id": error.identity, "reason": error.reason}])
            except OSError as problem:  # a failed report must not end the run
                warnings.warn(f"{problem}; the sample is skipped all the same: {error}", stacklevel=2)

    def _square(self, image: Image.Image) -> Image.Image:
        if self.image_aspect == "keep" or image.width == image.height:
            return image
        side = max(image.size)
        square = Image.new("RGB", (side, side), _MEAN_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


class Collator:
    """Pads rows on the right and stacks images; a batch without images gets one masked dummy image.

    Without it, one process would run the vision tower and another would not: DDP and FSDP would hang, ZeRO would crash.

    Args:
        model: the accelerated model; its configuration gives the size of the dummy image.
        pad_token_id: padding token id of the tokenizer.
        pad_to: pad rows to a multiple of this.

    Raises:
        ValueError: the model is not accelerated, or takes pixel values in rows of tiles.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, pad_to: int = 1) -> None:
        handle = handle_of(model)
        if handle is None:
            raise ValueError("the model is not accelerated; call accelerate_mllm(model) before Collator(model, ...)")
        if handle.family.modalities and 4 not in handle.family.modalities[0].ndim:
            raise ValueError(
                f"{handle.family.key!r} takes pixel values of another shape than (images, channels, height, width), "
                "which Collator does not pad; write a data_collator with the model's processor"
            )
        config = base_model(model).config
        self.placeholders, self.pad, self.pad_to = prompt_tokens_per_image(model), pad_token_id, pad_to
        self.image_token = getattr(
            config, handle.family.modalities[0].token if handle.family.modalities else "image_token_id"
        )
        self.answers_apart = answers_apart(config)
        side = config_at(config, handle.family.vision_config).image_size
        self.sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` (all (B, L)), ``pixel_values``; with a dummy ``dummy_image``.

        An encoder-decoder's labels have their own length; a Q-Former's text comes with its mask.
        """
        rows = [(sample["input_ids"], sample["labels"]) for sample in samples]
        masks = [torch.ones_like(ids) for ids, _ in rows]
        pixels = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        batch: dict[str, Any] = {}
        if not pixels:
            rows[0], masks[0] = self._with_dummy(*rows[0])
            pixels, batch["dummy_image"] = [torch.zeros(1, 3, *self.sides)], True
        if "qformer_input_ids" in samples[0]:
            texts = [sample["qformer_input_ids"] for sample in samples]
            longest = max(map(len, texts))
            batch["qformer_input_ids"] = _padded(texts, longest, 0)
            batch["qformer_attention_mask"] = _padded([torch.ones_like(text) for text in texts], longest, 0)
        length = self._rounded(max(len(ids) for ids, _ in rows))
        answer = self._rounded(max(len(labels) for _, labels in rows)) if self.answers_apart else length
        return {
            "input_ids": _padded([ids for ids, _ in rows], length, self.pad),
            "attention_mask": _padded(masks, length, 0),
            "labels": _padded([labels for _, labels in rows], answer, IGNORE),
            "pixel_values": torch.cat(pixels),
            **batch,
        }

    def _rounded(self, length: int) -> int:
        return -(-length // self.pad_to) * self.pad_to

    def _with_dummy(self, ids: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Append a masked block of placeholders to the row, then one unmasked token without a label. Without this token
        the block would be outer padding, which is removed from the prompt, and would no longer match the image."""
        block = torch.full((self.placeholders,), self.image_token)
        tail = torch.cat([block, torch.tensor([self.pad])]).to(ids)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(block).to(ids), torch.ones_like(ids[:1])])
        labels = labels if self.answers_apart else torch.cat([labels, torch.full_like(tail, IGNORE)])
        return (torch.cat([ids, tail]), labels), mask


def bad_samples(path: str | Path) -> dict[str, str]:
    """Id -> reason of the skipped samples, over all workers and epochs; empty if the file does not exist."""
    file = Path(path)
    rows = read_lines(file) if file.is_file() else []
    entries = [row for row in rows if isinstance(row, dict) and {"id", "reason"} <= row.keys()]
    return {row["id"]: row["reason"] for row in entries}


def _padded(rows: list[Tensor], length: int, value: int) -> Tensor:
    return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])


def _with_images(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    """The messages with the decoded pictures in their image parts."""
    rest = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


__all__ = [
    "VICUNA_TEMPLATE",
    "BadSampleError",
    "Collator",
    "Record",
    "Records",
    "TrainingData",
    "bad_samples",
    "load_records",
]
