"""The work behind ``mllm-crossget ui``: models that are asked by several visitors at a time. It draws no page.

One model is in one thread at a time: it is accelerated, asked and restored while a lock is held, so that no visitor
gets an answer with another one's settings. The thread that does so is not the visitor's, and ends when the visitor has
gone.
"""

from __future__ import annotations

import ipaddress
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, TextStreamer

from mllm_crossget.api import accelerated
from mllm_crossget.config import method_class, method_names
from mllm_crossget.embedded import load_embedded
from mllm_crossget.field_types import check_field_types
from mllm_crossget.files.user_files import load_model
from mllm_crossget.look.page import gflops_of
from mllm_crossget.look.prompts import picture_seen, placeholders, question_inputs
from mllm_crossget.look.stages import Stage, follow
from mllm_crossget.methods.method import Method
from mllm_crossget.support import unsupported_reason

EMBEDDED = "the embedded model"
UNTOUCHED = "untouched"
MOST_NEW_TOKENS = 256
_LONGEST_QUESTION = 2000  # characters
_MOST_PORT = 65535


@dataclass
class UiOptions:
    """A page to try models on, in a browser.

    Args:
        models: folders or repositories of models to choose from, beside the embedded model.
        host: address to listen on. With the default only this machine can open the page. With another one visitors
            choose from the given models alone; without, they may name any.
        port: port to listen on.
    """

    models: list[str] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self) -> None:
        check_field_types(self)
        if not 1 <= self.port <= _MOST_PORT:
            raise ValueError(f"port must be from 1 to {_MOST_PORT}, got {self.port}")

    @property
    def is_private(self) -> bool:
        """Whether only this machine can open the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked.

    Attributes:
        name: its name, folder or repository.
        model, processor: the model and its processor.
        lock: held by the thread that is inside the model.
    """

    name: str
    model: Any
    processor: Any
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Answer:
    """What is known of an answer so far.

    Attributes:
        text: the words so far.
        finished: whether there will be no more.
        visual_tokens: of the picture in the language model; None until known.
        seconds: to the first token; None until known.
        gflops: of vision tower, projector and prompt, by formula; None where there is no formula.
        stages: what became of every patch; empty for the untouched model.
        picture: as the tower sees it.
    """

    text: str = ""
    finished: bool = False
    visual_tokens: int | None = None
    seconds: float | None = None
    gflops: float | None = None
    stages: tuple[Stage, ...] = ()
    picture: Image.Image | None = None


class Models:
    """Models by name: the embedded one, and the one that was asked for last.

    Args:
        names: allowed names beside ``EMBEDDED``.
        any_name: whether others are allowed too.
    """

    def __init__(self, names: list[str] | None = None, any_name: bool = False) -> None:
        self.names = [EMBEDDED, *(names or [])]
        self.any_name = any_name
        self._loaded: dict[str, Loaded] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Loaded:
        """The model of that name, loaded at the first call; for any other than the embedded one, the last is let go.

        Raises:
            ValueError: a name that is not allowed, or a model that cannot be loaded or reduced.
        """
        name = name.strip() or EMBEDDED
        if name not in self.names and not self.any_name:
            raise ValueError(f"choose one of {', '.join(self.names)}; other models are not loaded for visitors")
        with self._lock:
            if name not in self._loaded:
                for other in set(self._loaded) - {EMBEDDED} if name != EMBEDDED else ():
                    del self._loaded[other]
                self._loaded[name] = _load(name)
            return self._loaded[name]


def _load(name: str) -> Loaded:
    if name == EMBEDDED:
        return Loaded(name, *load_embedded())

    def read() -> tuple[Any, Any]:
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), AutoProcessor.from_pretrained(name)

    model, processor = load_model(name, read, say=True)
    reason = unsupported_reason(model)
    if reason is not None:
        raise ValueError(reason)
    return Loaded(name, model, processor)


def choices() -> list[str]:
    """Names of the settings to choose from: the untouched model, and the methods that need no calibration."""
    return [UNTOUCHED, *(name for name in method_names() if not method_class(name)(keep_ratio=0.5).is_dynamic)]


def setting_of(name: str, keep_ratio: float) -> Method | None:
    """The method of a visitor's choice; None for the untouched model.

    Raises:
        ValueError: an unknown name, or a keep ratio that is not in (0, 1].
    """
    if name not in choices():
        raise ValueError(f"choose one of {', '.join(choices())}, got {name!r}")
    if name == UNTOUCHED:
        return None
    method: Any = method_class(name)(keep_ratio=keep_ratio)
    return None if method.is_identity else method


def ask(
    loaded: Loaded, picture: Image.Image, question: str, method: Method | None, new_tokens: int = 64
) -> Iterator[Answer]:
    """Ask a model, and give what is known whenever there is more of it; the last ``Answer`` is finished.

    The model runs twice. The first run makes one token, warms up and records the stages; the second one is timed and
    streams. Closing the iterator stops the model at its next token.

    Args:
        loaded: the model.
        picture: an RGB picture.
        question: what is asked.
        method: the reduction; None for the untouched model.
        new_tokens: most tokens of the answer.

    Raises:
        ValueError: no question, a number of tokens that is not from 1 to ``MOST_NEW_TOKENS``, or a setting that the
            model cannot meet.
    """
    question = question.strip()
    if not question:
        raise ValueError("write a question about the picture")
    if len(question) > _LONGEST_QUESTION:
        raise ValueError(f"the question has {len(question)} characters; at most {_LONGEST_QUESTION} are taken")
    if not 1 <= new_tokens <= MOST_NEW_TOKENS:
        raise ValueError(f"the answer may have 1 to {MOST_NEW_TOKENS} tokens, got {new_tokens}")
    run = _Run(loaded, picture, question, method, new_tokens)
    threading.Thread(target=run.work, daemon=True).start()
    try:
        yield from run.answers()
    finally:
        run.gone.set()


class _Run:
    """One question to one model, in a thread of its own."""

    def __init__(
        self, loaded: Loaded, picture: Image.Image, question: str, method: Method | None, new_tokens: int
    ) -> None:
        self.loaded, self.picture, self.question = loaded, picture, question
        self.method, self.new_tokens = method, new_tokens
        self.gone = threading.Event()
        self.found: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()

    def answers(self) -> Iterator[Answer]:
        while True:
            found = self.found.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if found.finished:
                return

    def work(self) -> None:
        try:
            with self.loaded.lock:
                last = None if self.gone.is_set() else self._ask()
            if last is not None:  # given only now that the model is restored and free for the next visitor
                self.found.put(last)
        except BaseException as error:  # raised again where the answers are read
            self.found.put(error)

    def _ask(self) -> Answer:
        model, processor = self.loaded.model, self.loaded.processor
        inputs = question_inputs(model, processor, self.picture, self.question)
        stages: tuple[Stage, ...] = ()
        if self.method is not None:
            stages = follow(model, processor, inputs, self.method, new_tokens=1).stages
            with accelerated(model, self.method):
                gflops = gflops_of(model, inputs, self.method)
                return self._stream(inputs, _known(processor, inputs, self.picture, stages, gflops))
        _generate(model, inputs, 1)
        gflops = gflops_of(model, inputs, method_class("crossget")(keep_ratio=1.0))  # type: ignore[arg-type]
        return self._stream(inputs, _known(processor, inputs, self.picture, (), gflops))

    def _stream(self, inputs: Any, known: dict[str, Any]) -> Answer:
        model = self.loaded.model
        if not known["stages"]:
            known["visual_tokens"] = placeholders(model, inputs)
        streamer = _Words(self.loaded.processor, self.found, known)
        _generate(model, inputs, self.new_tokens, streamer=streamer, stopping_criteria=[_Gone(self.gone)])
        return streamer.so_far(finished=True)


def _known(
    processor: Any, inputs: Any, picture: Image.Image, stages: tuple[Stage, ...], gflops: float | None
) -> dict[str, Any]:
    """What is known before the first word."""
    return {
        "visual_tokens": stages[-1].tokens if stages else None,
        "gflops": gflops,
        "stages": stages,
        "picture": picture_seen(processor, inputs, picture),
    }


@torch.no_grad()
def _generate(model: Any, inputs: Any, new_tokens: int, **options: Any) -> None:
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)


class _Words(TextStreamer):
    """Puts the words into a queue, and takes the time of the first token."""

    def __init__(self, processor: Any, found: queue.SimpleQueue[Any], known: dict[str, Any]) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.found, self.known = found, known
        self.text = ""
        self.seconds: float | None = None
        self.start = time.perf_counter()

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt and self.seconds is None:
            self.seconds = time.perf_counter() - self.start
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.found.put(self.so_far())

    def so_far(self, finished: bool = False) -> Answer:
        return Answer(self.text.strip(), finished, seconds=self.seconds, **self.known)


class _Gone(StoppingCriteria):
    """Stops where the visitor has gone."""

    def __init__(self, gone: threading.Event) -> None:
        self.gone = gone

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.gone.is_set(), dtype=torch.bool, device=input_ids.device)
