"""The ``README.md`` beside a saved model: what was reduced and how to load it.

A card that a person wrote or changed is never replaced: a comment in the card has the hash of the text behind it. What
PEFT appends, and the metadata, do not count as changes; metadata of others are kept.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.hooks.ground.hosts import config_of
from mllm_crossget.hooks.ground.state import HANDLE, Handle, base_model

CARD_NAME = "README.md"
_EMBEDDED = Path(__file__).parents[2] / "embedded"
_METRICS = "| last training log | |"
_OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "tags")  # the other metadata are kept
_MARK = "<!-- written by mllm_crossget; a changed text is kept ({}) -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{\}", r"([0-9a-f]{16})"))
_APPENDED_BY_PEFT = re.compile(r"^(?:## Training procedure|### Framework versions)$.*", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CardParts:
    """What a card says beside the settings.

    Args:
        title: the heading.
        base: name of the base model, a repository of the hub or words.
        loading: the lines of Python that load the model, with the folder's name in the last one.
        trained: a sentence about a training, or "".
        metrics: figures by name.
        data: further metadata.
    """

    title: str
    base: str
    loading: list[str]
    trained: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def card_of(handle: Handle, parts: CardParts) -> ModelCard:
    """A card with metadata for the hub, method and budget, metrics if there are any, and the way to load."""
    method = handle.method.to_dict()
    tags = [method["method"], "token-merging", "mllm-crossget"]
    base = parts.base if is_of_hub(parts.base) else None
    data = ModelCardData(tags=tags, base_model=base, **parts.data)
    paragraphs = [
        f"# {parts.title}",
        f"{parts.base} with {_budget(handle)}: its visual tokens are reduced with the method `{method['method']}` of "
        f"mllm_crossget.{' ' + parts.trained if parts.trained else ''}",
        "```python\n" + "\n".join(parts.loading) + "\n```",
        settings_of(handle),
    ]
    if parts.metrics:
        rows = [f"| {name} | {value:.6g} |" for name, value in parts.metrics.items()]
        paragraphs.append("\n".join([_METRICS, "|---|---|", *rows]))
    body = "\n\n".join(paragraphs)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_MARK.format(_hash(body))}\n\n{body}\n")


def saved_card(model: nn.Module, folder: str) -> ModelCard:
    """The card of a model that ``save_pretrained`` writes.

    Args:
        model: the accelerated model.
        folder: name of the folder or repository, for the heading and the lines that load it.
    """
    base, kind = public_name(str(config_of(model)._name_or_path), type(model).__name__), type(model).__name__
    has_adapter = bool(getattr(model, "_hf_peft_config_loaded", False))
    loading = [
        f"from transformers import {kind}",
        "from mllm_crossget import load_crossget",
        "",
        f'model = {kind}.from_pretrained("{base if has_adapter and is_of_hub(base) else folder}")',
        f'load_crossget(model, "{folder}")  # the settings and the learned tokens',
    ]
    data: dict[str, Any] = {"library_name": "peft" if has_adapter else "transformers"}
    if type(config_of(model)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        data["pipeline_tag"] = "image-text-to-text"
    return card_of(base_model(model).__dict__[HANDLE], CardParts(folder.split("/")[-1], base, loading, data=data))


def settings_of(handle: Handle) -> str:
    """The settings of the reduction, as the card has them."""
    lines = [f"    {name}: {value}" for name, value in handle.method.to_dict().items()]
    return "\n".join(["Settings of the reduction:", "", *lines])


def write_card(folder: Path, card: ModelCard, settings: str | None = None) -> bool:
    """Write a card, unless there is one that a person wrote or changed. Returns whether it was written.

    Args:
        folder: where to.
        card: the new card.
        settings: a card of a training with these settings is kept, because it says more than the new one.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / CARD_NAME
    if path.exists():
        old = read_card(path)
        says_more = old is not None and settings is not None and settings in old.text and _METRICS in old.text
        if old is None or says_more or not is_untouched(old):
            return False
        card = with_metadata_of(old, card)
    write_text(path, str(card))
    return True


def with_metadata_of(old: ModelCard, card: ModelCard) -> ModelCard:
    """The new card, with those metadata of the old one that are not this library's, such as a licence."""
    for name, value in old.data.to_dict().items():
        if name not in _OURS:
            card.data[name] = value
    return card


def read_card(path: Path) -> ModelCard | None:
    """The card in a file; None if its metadata are none that the hub could read."""
    try:
        text = path.read_text(encoding="utf-8")
        return ModelCard(text) if text.startswith("---") else None  # without metadata the hub's library warns
    except (ValueError, OSError, yaml.YAMLError):
        return None


def is_untouched(card: ModelCard) -> bool:
    """Whether a card's text is as this library or PEFT's template wrote it."""
    text = _APPENDED_BY_PEFT.sub("", card.text)
    found = _MARKED.search(text)
    if found:
        return not text[: found.start()].strip() and _hash(text[found.end() :]) == found[1]
    try:
        stub = ModelCard.from_template(ModelCardData()).text
    except ImportError:  # without Jinja PEFT writes no stub
        return False
    return text.strip() == _APPENDED_BY_PEFT.sub("", stub).strip()


def is_of_hub(base: str) -> bool:
    """Whether a base model's name can be a repository of the hub; a local folder and words are not."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).expanduser().is_dir()


def public_name(base: str, kind: str) -> str:
    """The name of a base model for readers on other machines, without a path of this one."""
    if _EMBEDDED in Path(base).parents:
        return "The small model that ships with mllm_crossget"
    return base if is_of_hub(base) else f"A local model ({Path(base).name or kind})"


def _budget(handle: Handle) -> str:
    before, after = handle.schedule.placeholders, handle.schedule.features
    part = "tile" if handle.family.tiles is not None else "image"
    average = " on average" if handle.method.is_dynamic else ""
    return f"{after} instead of {before} visual tokens per {part}{average}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
