"""One model that answers questions: loading, prompts, greedy ``generate`` on ordinary padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_crossget.compare.compare_options import CompareOptions
from mllm_crossget.compare.samples import Question, batches
from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.files.quiet import no_bars
from mllm_crossget.files.user_files import load_model

EMBEDDED = "embedded"


def source_of(model: str) -> str:
    """The folder or repository; for "embedded" the package's own folder."""
    return str(WEIGHTS_FOLDER) if model == EMBEDDED else model


@dataclass
class Answerer:
    """A loaded model with its processor.

    Args:
        model: in evaluation mode.
        processor: its processor; padding is set to the side that generation needs.
        prompt_template: text around each question.
        max_new_tokens: largest number of tokens of an answer.
    """

    model: Any
    processor: Any
    prompt_template: str = "{}"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right" if self.is_encoder_decoder else "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt is read by an encoder."""
        config = self.model.config
        return bool(getattr(config, "text_config", config).is_encoder_decoder or config.is_encoder_decoder)

    def inputs(self, questions: Sequence[Question], blank: bool = False) -> Any:
        """The processor's padded batch for ``generate``, on the model's device.

        Args:
            questions: a row each.
            blank: with grey pictures instead of the questions' own.

        Raises:
            ValueError: a question that the processor cannot write, with its id.
        """
        prompts = [self._prompt(question) for question in questions]
        images = [image for question in questions for image in question.images(blank)]
        start = self.processor.tokenizer.bos_token
        marked = bool(start) and all(prompt.startswith(start) for prompt in prompts)
        words: dict[str, Any] = {"add_special_tokens": False} if marked else {}
        batch = self.processor(images=images, text=prompts, padding=True, return_tensors="pt", **words)
        return batch.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answers(
        self,
        questions: Sequence[Question],
        batch_size: int,
        blank: bool = False,
        done: Callable[[int], Any] = lambda count: None,
    ) -> list[str]:
        """Answers in the order of the questions.

        A batch ends with its longest answer, so questions with right answers of similar length share one.

        Args:
            questions: what is asked.
            batch_size: questions in a batch.
            blank: with grey pictures.
            done: called with the number of questions of each finished batch.
        """
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].answer))
        found: list[str] = []
        for batch in batches([questions[index] for index in order], batch_size):
            inputs = self.inputs(batch, blank)
            output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            new = self._new_tokens(output, inputs["input_ids"])
            found += [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
            done(len(batch))
        placed = dict(zip(order, found, strict=True))
        return [placed[index] for index in range(len(questions))]

    def _prompt(self, question: Question) -> str:
        asked = self.prompt_template.replace("{}", question.text)
        if not self.processor.chat_template:
            self._check_one_turn(question)
            return asked
        pictures = [part for part in question.messages[-1]["content"] if part["type"] == "image"]
        last = {"role": "user", "content": [*pictures, {"type": "text", "text": asked}]}
        messages = [*question.messages[:-1], last]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def _check_one_turn(self, question: Question) -> None:
        if getattr(self.processor, "image_token", None) and not hasattr(self.processor, "num_query_tokens"):
            raise ValueError(
                f"{type(self.processor).__name__} has no chat template, so nobody knows where its prompt has the "
                "picture; save one with it (chat_template.jinja)"
            )
        if len(question.messages) > 1 or len(question.pictures) != 1:
            raise ValueError(
                f"the question {question.identity!r} has {len(question.messages)} turns and {len(question.pictures)} "
                f"pictures; {type(self.processor).__name__} knows no chat and takes one of each"
            )

    def _new_tokens(self, output: Tensor, prompt: Tensor) -> Tensor:
        """(B, new) what ``generate`` added: decoders repeat the prompt, encoder-decoders begin with a start mark."""
        if self.is_encoder_decoder:
            return output[:, 1:]
        length = prompt.shape[1]
        repeated = output.shape[1] >= length and torch.equal(output[:, :length], prompt)
        return output[:, length:] if repeated else output


def load_answerer(options: CompareOptions) -> Answerer:
    """Load model and processor.

    Raises:
        ValueError: there is no such model, or its files are damaged; or a device that is not there.
    """
    device = _device(options.device)
    source = source_of(options.model)
    dtype: Any = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32

    def load() -> tuple[Any, Any]:
        with no_bars():
            model: Any = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, attn_implementation=options.attn_implementation
            )
        return model.to(device).eval(), AutoProcessor.from_pretrained(source)

    model, processor = load_model(source, load, say=options.model != EMBEDDED)
    return Answerer(model, processor, options.prompt_template, options.max_new_tokens)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {name!r} cannot be used: {reason}; give cpu, or leave device out") from error
    return device


__all__ = ["EMBEDDED", "Answerer", "load_answerer", "source_of"]
