"""lmms-eval's request tuples, chat and simple, as one type of request. It does not depend on a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

_IMAGE_TOKEN = "<image>"
# lmms-eval writes this into every task without a stop string; its own llava_hf ignores stop strings.
_DEFAULT_UNTIL = ["\n\n"]
_PASSED_ON = (
    "min_new_tokens",
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "length_penalty",
    "early_stopping",
)
_DEFAULT_NEW_TOKENS = 1024  # as in lmms-eval's llava_hf


@dataclass
class Request:
    """One question.

    Attributes:
        key: identifies the question over runs: task, split, document, repetition, and a digest of the text and of the
            generation settings.
        messages: chat messages of ``{"type": "image"}`` and ``{"type": "text"}`` parts, made on first use.
        generation: the task's generation settings.
        padding: whether it only makes the ranks equal, so that its answer is not used.
    """

    key: tuple[str, ...]
    make_messages: Callable[[], list[dict[str, Any]]] = field(repr=False)
    generation: dict[str, Any]
    padding: bool = False

    @property
    def group(self) -> str:
        """A key that all requests of a batch must share."""
        return json.dumps(self.generation, sort_keys=True, default=str)


def read_requests(instances: Iterable[Any], task_dict: Any, simple: bool) -> list[Request]:
    """lmms-eval's instances as requests, in their order."""
    seen: dict[tuple[str, ...], int] = {}
    return [_read(instance, task_dict, simple, seen) for instance in instances]


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Batches of at most ``size`` requests with the same generation settings, in order."""
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.group, []).append(request)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def images_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    """The pictures of a conversation, RGB, in order.

    Raises:
        TypeError: a video, a sound, or a picture that is not a PIL image.
    """
    images = []
    for part in _parts(messages):
        if part["type"] == "image":
            if not isinstance(part["image"], Image.Image):
                raise TypeError(f"an image of a task must be a PIL image, got {type(part['image']).__name__}")
            images.append(part["image"].convert("RGB"))
        elif part["type"] != "text":
            raise TypeError(f"a task asks about a {part['type']}; only images and text are supported")
    return images


def text_of(messages: list[dict[str, Any]]) -> str:
    """The text of a conversation without its roles, for models without a chat template."""
    return "\n".join(part["text"] for part in _parts(messages) if part["type"] == "text").strip()


def generate_options(generation: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings as options of ``generate``. Greedy unless the task has a temperature above 0."""
    options = {name: generation[name] for name in _PASSED_ON if generation.get(name) is not None}
    options["max_new_tokens"] = generation.get("max_new_tokens", _DEFAULT_NEW_TOKENS)
    temperature = generation.get("temperature") or 0
    sample = bool(generation.get("do_sample", temperature > 0)) and temperature > 0
    options["do_sample"] = sample
    if sample:
        sampling = {name: generation.get(name) for name in ("top_p", "top_k")}
        options |= {"temperature": temperature, **{name: value for name, value in sampling.items() if value}}
    return options


def cut(text: str, generation: dict[str, Any]) -> str:
    """The answer up to the task's first stop string, without the one that lmms-eval adds itself."""
    until = generation.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    if stops != _DEFAULT_UNTIL:
        for stop in filter(None, stops):
            text = text.split(stop)[0]
    return text.strip()


def _read(instance: Any, task_dict: Any, simple: bool, seen: dict[tuple[str, ...], int]) -> Request:
    if simple:
        context, generation, to_visual, document, task, split = instance.args
    else:
        context, to_messages, generation, document, task, split = instance.args

    def make_messages() -> list[dict[str, Any]]:
        doc = task_dict[task][split][document]
        return _simple_messages(context, to_visual(doc)) if simple else _chat_messages(to_messages(doc))

    digest = hashlib.sha256(json.dumps([context, generation], sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = (str(task), str(split), str(document), digest)
    padding = bool((instance.metadata or {}).get("__padding_only__"))
    repetition = seen.get(name, 0)
    seen[name] = repetition + (not padding)
    return Request((*name, str(repetition)), make_messages, dict(generation), padding)


def _chat_messages(messages: Any) -> list[dict[str, Any]]:
    def part(content: dict[str, Any]) -> dict[str, Any]:
        if content["type"] == "text":
            return {"type": "text", "text": content["text"]}
        return {"type": content["type"], content["type"]: content["url"]}

    return [{"role": message["role"], "content": [part(item) for item in message["content"]]} for message in messages]


def _simple_messages(context: str, visuals: Any) -> list[dict[str, Any]]:
    """One user turn, with pictures at the ``<image>`` tags, or before the text if it has no tags."""
    pictures = [{"type": "image", "image": visual} for visual in visuals or []]
    words = context.split(_IMAGE_TOKEN)
    if len(words) == 1:
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": context}]}]
    if len(words) != len(pictures) + 1:
        raise ValueError(f"the task's text has {len(words) - 1} times {_IMAGE_TOKEN!r} for {len(pictures)} pictures")
    content: list[dict[str, Any]] = []
    for text, picture in zip(words, [*pictures, None], strict=True):
        content += [{"type": "text", "text": text}] if text.strip() else []
        content += [picture] if picture else []
    return [{"role": "user", "content": content}]


def _parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from message["content"]
