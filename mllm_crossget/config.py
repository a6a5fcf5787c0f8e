"""The settings that all reduction methods share, their checks, and how they are written to and read from a file.

They do not depend on models. A method (see ``mllm_crossget.methods``) is a dataclass derived from ``ReductionConfig``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from mllm_crossget.arithmetic.layer_times import checked_times
from mllm_crossget.field_types import check_field_types, checked_count, checked_ratio, checked_removals
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.hub_files import find_file

CONFIG_NAME = "crossget_config.json"
FORMAT_VERSION = 2
WEIGHTS_FIELD = "weights"
"""A field of the file and not of the settings: the learned weights that belong to them."""
_DIALS = ("keep_ratio", "visual_tokens", "r", "vision_r")
_TEXT_DIALS = ("text_keep_ratio", "text_r")
DIALS = (*_DIALS, *_TEXT_DIALS)
POSITIONS = ("contiguous", "original")
SCHEDULES = ("constant", "late", "output", "auto")
_METHODS: dict[str, type[ReductionConfig]] = {}

Config = TypeVar("Config", bound="ReductionConfig")


class Place(Enum):
    """The place between pixels and answer where a method acts.

    TOWER_LAYERS: in the layers of a tower, between attention and MLP; in several steps behind the projector, if a
    model's tower is not changed. TOWER_OUTPUT: once, at the output of the layer that the language side reads.
    PROJECTOR: once, on the features that replace the placeholders. LANGUAGE_MODEL: in front of layers of the language
    model; all visual tokens enter it.
    """

    TOWER_LAYERS = "tower layers"
    TOWER_OUTPUT = "tower output"
    PROJECTOR = "projector"
    LANGUAGE_MODEL = "language model"


@dataclass
class ReductionConfig:
    """The token budget, set by one dial: ``keep_ratio`` (by default 0.5), ``visual_tokens`` or ``r``.

    Dual encoders (CLIP, SigLIP) and BLIP's models with a text encoder have text dials too: ``text_keep_ratio``,
    ``text_r``. A dial reduces its own tower alone. Without a text dial the text tower is unchanged, with a text dial
    alone the vision tower.

    Args:
        keep_ratio: share of the visual tokens that reaches the language side, in (0, 1]. 1 does not change the model.
        visual_tokens: the same as a number of tokens per image.
        r: tokens removed in each layer of the vision tower (one integer for all layers, or a list with one per layer);
            a layer removes at most half of its unprotected tokens.
        vision_r: another name of ``r`` for dual encoders; 0 merges nothing, but adds the cross token.
        text_keep_ratio: share of a text's tokens that are left after the last layer of the text tower.
        text_r: tokens removed in each layer of the text tower, as ``r``.
        merge_every: merge only in every n-th layer of the vision tower, from the first on: fewer matchings, later
            reduction. None is 1. With a list ``r`` it is not needed.
        positions: positions of image tokens and text in the language model. None or "original": text has the positions
            of the full prompt, and an image token the lower median position of the tokens that it stands for, so that
            distances are as the model has learned. "contiguous": positions without gaps, as in the official code.
        size_bias: whether a token that stands for n visual tokens weighs as much as n in the attention of the language
            model, or of modules that cross-attend to the tower (log n is added to its logits), in the prompt and in
            decoding. None: True for methods that weigh tokens by size inside the tower.
        schedule: where a vision tower removes the tokens of ``keep_ratio`` or ``visual_tokens``. "constant": evenly
            over its layers, as published. "late": in the last layers before the one that is read, which costs more in
            the tower but changes fewer layers. "output": all at once, at the output of the layer that is read, for
            methods that can do so. None or "auto": as late as costs allow, in layers and at the output
            (``removals.auto_removals``); evenly without a language model, and with ``r``.
        layer_times: measured times by which "auto" chooses instead of FLOPs: the JSON file that ``mllm-crossget
            bench-layers`` writes on the machine that will run the model, or its content, which is saved with the
            settings (``layer_times.checked_times``).

    Raises:
        ValueError: two dials of one tower at once, a value outside its range, or ``layer_times`` without "auto".
        TypeError: a value of the wrong type.
    """

    keep_ratio: float | None = None
    visual_tokens: int | None = None
    r: int | list[int] | None = None
    vision_r: int | list[int] | None = None
    text_keep_ratio: float | None = None
    text_r: int | list[int] | None = None
    merge_every: int | None = None
    positions: str | None = None
    size_bias: bool | None = None
    schedule: str | None = None
    layer_times: dict[str, Any] | str | None = None

    published_settings: ClassVar[Mapping[str, Any]] = {
        "positions": "contiguous",
        "size_bias": False,
        "schedule": "constant",
    }
    method: ClassVar[str] = ""
    place: ClassVar[Place] = Place.TOWER_LAYERS
    uses_cross_tokens: ClassVar[bool] = False
    selects_at_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_dials()
        check_field_types(self)

    def _check_dials(self) -> None:
        given = self._given(_DIALS)
        if len(given) + len(self._given(_TEXT_DIALS)) == 0:
            self.keep_ratio = 0.5
        elif not given:
            self.keep_ratio = 1.0
        for name in ("keep_ratio", "text_keep_ratio"):
            if getattr(self, name) is not None:
                setattr(self, name, checked_ratio(name, getattr(self, name)))
        if self.visual_tokens is not None:
            self.visual_tokens = checked_count("visual_tokens", self.visual_tokens, least=1)
        if self.merge_every is not None:
            self._check_merge_every()
        if self.schedule is not None:
            self._check_schedule()
        if self.layer_times is not None:
            self.layer_times = checked_times(self.layer_times)
            if self.schedule_kind != "auto":
                raise ValueError(
                    'layer_times is what schedule="auto" chooses by, and these settings have schedule='
                    f"{self.schedule_kind!r}; leave one of them out"
                )
        if self.positions not in (None, *POSITIONS):
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")
        for name in ("r", "vision_r", "text_r"):
            if getattr(self, name) is not None:
                setattr(self, name, checked_removals(name, getattr(self, name)))

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.schedule == "constant":
            return
        if self.schedule == "output" and not self.selects_at_output:
            raise ValueError(
                f"schedule='output' is for methods that select among all tokens at once, and {type(self).__name__} "
                "removes at most half of a layer's; use CrossGetConfig, or schedule='late'"
            )
        given = [name for name in ("r", "vision_r", "merge_every") if getattr(self, name) is not None]
        if given or self.is_dynamic or self.place is not Place.TOWER_LAYERS:
            what = given[0] if given else "dynamic counts" if self.is_dynamic else "a method that acts once"
            raise ValueError(
                f"schedule={self.schedule!r} and {what}: both say where tokens leave; give keep_ratio or visual_tokens "
                "to a method with a fixed number of tokens in the tower's layers, or leave the schedule out"
            )

    def _check_merge_every(self) -> None:
        self.merge_every = checked_count("merge_every", self.merge_every, least=1)
        if isinstance(self.vision_removals, list):
            raise ValueError(
                f"merge_every={self.merge_every} and a list r={self.vision_removals!r}: the list says already which "
                "layers merge; give one of them"
            )
        if self.is_dynamic and self.merge_every > 1:
            raise ValueError(f"merge_every={self.merge_every}: dynamic counts are decided in every layer; leave it out")

    def _given(self, dials: tuple[str, ...]) -> list[str]:
        """The given dials of one tower. Raises ``ValueError`` for more than one."""
        given = [name for name in dials if getattr(self, name) is not None]
        if len(given) > 1:
            settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"got {settings}: these are spellings of the same dial, give exactly one of {dials}")
        return given

    @classmethod
    def published(cls: type[Config], **settings: Any) -> Config:
        """The method exactly as its authors published it: positions without gaps, and equal weights of all tokens in
        the language model.

        Args:
            settings: a dial and further fields, such as ``r=13``.
        """
        return _marked_published(cls(**{**cls.published_settings, **settings}))

    @property
    def is_published(self) -> bool:
        """Whether it was made by ``published``, or read from a file of version 0.1. Settings of the language model are
        then allowed for models without one."""
        return bool(vars(self).get(_MARK))

    @property
    def is_identity(self) -> bool:
        """Whether these settings leave the model unchanged."""
        return not self.reduces_vision and not self.reduces_text

    @property
    def reduces_vision(self) -> bool:
        """Whether the vision tower is changed."""
        return self.keep_ratio != 1.0

    @property
    def reduces_text(self) -> bool:
        """Whether the text tower (of a dual encoder or of BLIP) is changed."""
        return self.text_r is not None or self.text_keep_ratio not in (None, 1.0)

    @property
    def schedule_kind(self) -> str:
        """The given schedule; else "auto", or "constant" if another setting chooses the layers."""
        if self.schedule is not None:
            return self.schedule
        by_layer = self.vision_removals is not None or self.merge_every is not None or self.is_dynamic
        return "constant" if by_layer or self.place is not Place.TOWER_LAYERS else "auto"

    @property
    def keeps_positions(self) -> bool:
        """Whether text and images keep their positions in the language model."""
        return self.positions != "contiguous"

    @property
    def vision_removals(self) -> int | list[int] | None:
        """``r`` or ``vision_r``, whichever was given."""
        return self.r if self.vision_r is None else self.vision_r

    @property
    def is_dynamic(self) -> bool:
        """Whether the number of tokens is chosen per image; a dial then sets the average."""
        return False

    @property
    def has_learned_parts(self) -> bool:
        """Whether the method adds learned modules to a model."""
        return self.uses_cross_tokens

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, with the method's name and the version of the format."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"method": self.method, "format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: an unknown method, field or format version, or a value outside its range.
            TypeError: a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"expected the fields of a method by name, got {type(values).__name__}")
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        if version == 1:  # 0.1 had only the published settings, which are written out here
            values = {**method_class(values.get("method", cls.method)).published_settings, **values}
            return _marked_published(cls.from_dict({**values, "format_version": FORMAT_VERSION}))
        if version != FORMAT_VERSION:
            raise ValueError(
                f"the settings have format_version={version!r}, this version of mllm_crossget reads {FORMAT_VERSION}: "
                "upgrade mllm_crossget"
            )
        kind = method_class(values.pop("method", cls.method))
        if not issubclass(kind, cls):
            raise ValueError(f"the settings are for method {kind.method!r}, not {cls.method!r}: use {kind.__name__}")
        known = {f.name for f in dataclasses.fields(kind)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {unknown}; its fields are {sorted(known)}")
        return kind(**values)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write ``crossget_config.json`` into a folder (made if absent) and return the file's path.

        The file is replaced atomically. Learned weights of the old settings then belong to the new ones.

        Raises:
            OSError: the file cannot be written; an existing file is unchanged.
        """
        path = Path(save_directory).expanduser() / CONFIG_NAME
        return write_settings(self, path, _weights_named_in(path))

    @classmethod
    def from_pretrained(cls: type[Config], name_or_path: str | Path, **hub_kwargs: Any) -> Config:
        """Read ``crossget_config.json`` from a folder, or from a repository of the hub.

        Args:
            name_or_path: the folder or the repository.
            hub_kwargs: as in ``find_file``.

        Raises:
            ValueError: the file is missing from the folder, is not JSON, or does not hold valid settings; or a keyword
                does not apply to a folder.
            TypeError: a keyword that ``hf_hub_download`` does not know.
        """
        path = find_file(name_or_path, CONFIG_NAME, **hub_kwargs)
        return cls._from_file(read_settings(path), path)

    @classmethod
    def _from_file(cls: type[Config], values: Mapping[str, Any], path: Path) -> Config:
        """As ``from_dict``, but every error is a ``ValueError`` that names the file."""
        try:
            return cls.from_dict({name: value for name, value in values.items() if name != WEIGHTS_FIELD})
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} holds no valid settings: {error}") from error

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Upload ``crossget_config.json`` to a repository of the hub (made if absent). Returns the commit's address."""
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        try:
            weights = _weights_named_in(Path(hf_hub_download(repo_id, CONFIG_NAME, token=token)))
        except EntryNotFoundError:
            weights = None
        commit = api.upload_file(
            path_or_fileobj=_as_text(self, weights).encode(), path_in_repo=CONFIG_NAME, repo_id=repo_id
        )
        return str(commit)


_MARK = "_is_published"


def _marked_published(config: Config) -> Config:
    vars(config)[_MARK] = True
    return config


def register_method(kind: type[Config]) -> type[Config]:
    """Class decorator: register a method by name for ``accelerate_mllm``, the command line and the tests."""
    _METHODS[kind.method] = kind
    return kind


def method_class(name: str) -> type[ReductionConfig]:
    """The dataclass of the method called ``name``. Raises ``ValueError`` that lists the known names."""
    if not isinstance(name, str) or name not in method_names():
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(method_names())}")
    return _METHODS[name]


def method_names() -> list[str]:
    """Names of the registered methods, sorted."""
    if not _METHODS:  # importing the package imports none of them, as they need torch
        importlib.import_module(f"{__package__}.methods")
    return sorted(_METHODS)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a ``crossget_config.json``. Raises ``ValueError`` if the file has none."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not a JSON file ({reason}); write it with save_pretrained") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object with the method's fields")
    return values


def write_settings(settings: ReductionConfig, path: Path, weights: Mapping[str, str] | None = None) -> Path:
    """Write settings, and the entry of their learned weights. Raises ``OSError``; see ``save_pretrained``."""
    return write_text(path, _as_text(settings, weights))


def _as_text(settings: ReductionConfig, weights: Mapping[str, str] | None) -> str:
    values = settings.to_dict() | ({} if weights is None else {WEIGHTS_FIELD: dict(weights)})
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _weights_named_in(path: Path) -> Mapping[str, str] | None:
    """The entry of learned weights in an existing file; None if there is none or the file cannot be read."""
    try:
        found = read_settings(path).get(WEIGHTS_FIELD)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


__all__ = [
    "CONFIG_NAME",
    "DIALS",
    "Place",
    "ReductionConfig",
    "find_file",
    "method_class",
    "method_names",
    "register_method",
]
