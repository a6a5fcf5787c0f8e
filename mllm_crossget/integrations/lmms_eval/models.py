"""The models that lmms-eval calls: ``llava_hf_crossget`` and ``blip2_hf_crossget``, each chat and simple.

A base class does all but the conversion of messages to inputs, which a subclass does for its family. An error stops the
run and is never turned into an empty answer.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from mllm_crossget.integrations.lmms_eval.answers import AnswerLog
from mllm_crossget.integrations.lmms_eval.loading import ModelArgs, load_model, used_method
from mllm_crossget.integrations.lmms_eval.requests import (
    Request,
    batches,
    cut,
    generate_options,
    images_of,
    read_requests,
    text_of,
)
from mllm_crossget.integrations.lmms_eval.token_costs import (
    Stopwatch,
    gflops_counter,
    peak_memory,
    reset_peak_memory,
    summary,
    tokens_per_image,
)

_WARM_UP_TOKENS = 2
Result = TypeVar("Result")


class CrossGetModel(lmms):
    """A transformers model with a reduction from this library, for lmms-eval.

    Args:
        pretrained: folder, repository of the hub, or "embedded" for the model of this package.
        batch_size: requests in a batch of one process.
        journal: folder of the answer log, with which a killed run can resume; None: no log.
        device: such as "cuda:1"; by default a GPU if there is one. Under torchrun every process has its own.
        max_batch_size: not used; lmms-eval may pass it.
        model_args: see ``ModelArgs``; names that are not its fields go to the method.
    """

    encoder_parts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        journal: str | None = None,
        device: str | None = None,
        max_batch_size: Any = None,
        **model_args: Any,
    ) -> None:
        super().__init__()
        stopping(lambda: self._load(pretrained, batch_size, journal, device, model_args))

    def _load(
        self, pretrained: str, batch_size: int | str, journal: str | None, device: str | None, words: dict[str, Any]
    ) -> None:
        words = {name: None if value == "None" else value for name, value in words.items()}
        fields = {name: words.pop(name) for name in list(words) if name in ModelArgs.__dataclass_fields__}
        args = ModelArgs(pretrained, device=device, **fields, options=words)
        self.batch_size_per_gpu = _checked_batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and args.device_map:
            raise ValueError(f"device_map={args.device_map!r} with {self._world_size} processes: leave device_map out")
        self.device = self._device(args)
        model, self.processor = load_model(args, self.device, self.encoder_parts)
        self._model: Any = model
        self._prepare_processor()
        self._args = args
        self._log = AnswerLog(Path(journal) if journal else None, self._answer_settings(), self._rank)
        self._stopwatch = Stopwatch(self._model, self.encoder_parts, self.device)
        self._gflops = gflops_counter(self._model)
        self._image_tokens = tokens_per_image(self._model)
        self._warm = False

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers to lmms-eval's requests, in their order. Errors of ``generate`` end the run."""
        return stopping(lambda: self._answers(requests))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: raises ``NotImplementedError``."""
        raise NotImplementedError("several rounds are not supported; choose a task of type generate_until")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported (lmms-eval 0.7.3 cannot score it for any model): raises ``NotImplementedError``."""
        raise NotImplementedError("log-likelihoods are not supported; choose the generative task, such as seedbench")

    def inputs(self, conversations: list[list[dict[str, Any]]]) -> tuple[Any, list[int]]:
        """The processor's padded batch for ``generate``, and every row's number of images."""
        raise NotImplementedError

    def new_tokens(self, output: torch.Tensor, inputs: Any) -> torch.Tensor:
        """(B, new) tokens that ``generate`` added to the prompt."""
        return output[:, inputs["input_ids"].shape[1] :]

    def _prepare_processor(self) -> None:
        """Make the processor pad on the side that generation needs."""
        self.processor.tokenizer.padding_side = "right" if self._is_encoder_decoder else "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token

    def _answer_settings(self) -> dict[str, Any]:
        """Settings that the answers depend on besides the question, as JSON types."""
        args, method = self._args, used_method(self._model)
        return {
            "model": type(self).__name__,
            "pretrained": args.pretrained,
            "adapter": args.adapter,
            "files": _files(args.source) + (_files(args.adapter) if args.adapter else []),
            "reduction": method.to_dict() if method else "none",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "quantised": 4 if args.load_in_4bit else 8 if args.load_in_8bit else None,
            "attn_implementation": args.attn_implementation,
            "mllm_crossget": version("mllm-crossget"),
        }

    def _device(self, args: ModelArgs) -> torch.device:
        if self._world_size > 1:
            return self.accelerator.device
        return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _answers(self, instances: list[Instance]) -> list[GenerationResult]:
        requests = read_requests(instances, self.task_dict, self.is_simple)
        missing = [request for request in requests if not request.padding and self._log.get(request) is None]
        with tqdm(total=len(missing), disable=self._rank != 0, desc="answering") as progress:
            for batch in batches(missing, self.batch_size_per_gpu):
                self._log.add(self._answer_batch(batch))
                progress.update(len(batch))
        self._report()
        return [self._result(request) for request in requests]

    @torch.inference_mode()
    def _answer_batch(self, batch: list[Request]) -> dict[str, Any]:
        inputs, images = self.inputs([request.make_messages() for request in batch])
        inputs = inputs.to(self.device, self._model.dtype)
        options = generate_options(batch[0].generation)
        if not self._warm:
            warm_up = {**options, "max_new_tokens": _WARM_UP_TOKENS, "min_new_tokens": None}
            self._model.generate(**inputs, **warm_up)
            reset_peak_memory(self.device)
            self._warm = True
        with self._stopwatch.running():
            output = self._model.generate(**inputs, **options)
        phases = self._stopwatch.phases
        assert phases is not None  # set at the end of the block above
        new = self.new_tokens(output, inputs)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        rows = zip(batch, texts, new, inputs["input_ids"], inputs["attention_mask"], images, strict=True)
        return {
            "answers": [self._answer(*row) for row in rows],
            "seconds": vars(phases),
            "peak_memory": peak_memory(self.device),
        }

    def _answer(
        self, request: Request, text: str, new: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, images: int
    ) -> dict[str, Any]:
        placeholders = int(((ids == self._image_token) & (mask != 0)).sum())
        text_tokens = int(mask.sum()) - placeholders
        tower, language = self._visual_tokens(images, placeholders)
        answer_length = self._length(new)
        return {
            "key": request.key,
            "text": cut(text, request.generation),
            "input_tokens": None if language is None else text_tokens + language,
            "tower_tokens": tower,
            "visual_tokens": language,
            "new_tokens": answer_length,
            "gflops": None if tower is None else self._gflops(images, text_tokens, answer_length),
        }

    def _visual_tokens(self, images: int, placeholders: int) -> tuple[int | None, int | None]:
        """Numbers of tokens after the tower and in the language model. None if pictures are cut into tiles."""
        counts = self._image_tokens
        if counts is None:
            return None, placeholders
        if placeholders != images * counts.placeholders:
            return (None, None) if used_method(self._model) else (None, placeholders)
        return images * counts.tower, images * counts.language

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self._model, "language_model", self._model).config.is_encoder_decoder)

    @property
    def _image_token(self) -> int:
        config = self._model.config
        return int(getattr(config, "image_token_id", None) or config.image_token_index)

    def _length(self, new: torch.Tensor) -> int:
        """Number of tokens of one answer, up to and including its end mark."""
        ends = self._model.generation_config.eos_token_id
        marks = ends if isinstance(ends, (list, tuple)) else [ends]
        ends_at = torch.isin(
            new, torch.tensor([mark for mark in marks if mark is not None], device=new.device)
        ).nonzero()
        return int(ends_at[0]) + 1 if len(ends_at) else len(new)

    def _result(self, request: Request) -> GenerationResult:
        answer = self._log.get(request)
        if answer is None:  # a copy that only pads this rank's share
            return GenerationResult(text="")
        counts = TokenCounts(input_tokens=answer["input_tokens"], output_tokens=answer["new_tokens"])
        return GenerationResult(text=answer["text"], token_counts=counts)

    def _report(self) -> None:
        """Add this rank's throughput, without the warm-up, to lmms-eval's own results, under the key ``throughput``."""
        batches = self._log.batches
        if not batches:
            return
        seconds = sum(sum(batch["seconds"].values()) for batch in batches)
        tokens = sum(answer["new_tokens"] for batch in batches for answer in batch["answers"])
        costs = summary(batches)
        log_metrics(seconds, tokens, tokens / seconds, {"total_requests": costs.pop("requests"), **costs})


class LlavaHfCrossGet(CrossGetModel):
    """LLaVA and other models with a chat template and ``<image>`` placeholders; a request may have several images."""

    is_simple = False
    encoder_parts = ("model.vision_tower", "model.multi_modal_projector")

    def inputs(self, conversations: list[list[dict[str, Any]]]) -> tuple[Any, list[int]]:
        """See the base class. Raises ``ValueError`` for a processor without chat template."""
        if self.processor.chat_template is None:
            raise ValueError("the processor has no chat template: save one with it (chat_template.jinja)")
        images = [images_of(messages) for messages in conversations]
        texts = [self.processor.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
        flat = [image for row in images for image in row]
        batch = self.processor(images=flat or None, text=texts, padding=True, return_tensors="pt")
        return batch, [len(row) for row in images]


class LlavaHfCrossGetSimple(LlavaHfCrossGet):
    """The same for a task's plain text and pictures (``--force_simple``)."""

    is_simple = True


class Blip2HfCrossGet(CrossGetModel):
    """BLIP-2 and InstructBLIP: one image per request, and no chat template.

    Args:
        prompt: the prompt, with ``{}`` for the task's text, such as ``Question: {} Short answer:``.
        arguments: see ``CrossGetModel``.
    """

    is_simple = False
    encoder_parts = ("vision_model", "qformer", "language_projection")

    def __init__(self, pretrained: str, prompt: str = "{}", **arguments: Any) -> None:
        self._prompt = prompt
        super().__init__(pretrained, **arguments)

    def _answer_settings(self) -> dict[str, Any]:
        return {**super()._answer_settings(), "prompt": self._prompt}

    def inputs(self, conversations: list[list[dict[str, Any]]]) -> tuple[Any, list[int]]:
        """See the base class. Raises ``ValueError`` for a request without image or with several."""
        images = [images_of(messages) for messages in conversations]
        counts = [len(row) for row in images]
        if set(counts) != {1}:
            raise ValueError(f"BLIP-2 takes one image in a request, got {sorted(set(counts))}")
        texts = [self._prompt.replace("{}", text_of(messages)) for messages in conversations]
        flat = [row[0] for row in images]
        return self.processor(images=flat, text=texts, padding=True, return_tensors="pt"), counts

    def new_tokens(self, output: torch.Tensor, inputs: Any) -> torch.Tensor:
        """(B, new) tokens; outputs of decoders start with the prompt, those of encoder-decoders with a start mark."""
        if self._is_encoder_decoder:
            return output[:, 1:]
        prompt = inputs["input_ids"]
        length = prompt.shape[1]
        repeated = output.shape[1] >= length and torch.equal(output[:, :length], prompt)
        return output[:, length:] if repeated else output


class Blip2HfCrossGetSimple(Blip2HfCrossGet):
    """The same for a task's plain text and picture (``--force_simple``)."""

    is_simple = True


def stopping(work: Callable[[], Result]) -> Result:
    """Run ``work``; an error ends the process with its reason, also if lmms-eval's command line would continue.

    Without ``--verbosity DEBUG``, lmms-eval 0.7.3 prints an ``Exception`` and exits with status 0.
    """
    try:
        return work()
    except Exception as error:
        if os.environ.get("VERBOSITY", "DEBUG") == "DEBUG":  # set by the command line only
            raise
        traceback.print_exc()
        raise SystemExit(f"the evaluation stopped: {type(error).__name__}: {error}") from error


def _checked_batch_size(value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"batch_size must be a whole number, at least 1, got {value!r}")
    return int(value)


def _files(name: str) -> list[list[str | int]]:
    """Names and sizes of local files that the answers depend on; empty for a repository of the hub."""
    path = Path(name)
    files = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path] * path.is_file()
    return [[item.name, item.stat().st_size] for item in files]
