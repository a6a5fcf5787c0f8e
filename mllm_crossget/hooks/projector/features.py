"""From the tower's tokens to the features that take the placeholders' places.

A family names a kind of features (``FeatureKind``), for which ``kinds`` has a mixin; it is put in front of the class
that owns ``get_image_features``. Features that had to be computed before the prompt could be shrunk (their number
depends on the image) are kept for the stock code's own call, so that nothing is encoded twice.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import Family, module_at
from mllm_crossget.families.modality import Modality
from mllm_crossget.hooks.ground.arguments import kept_per_class
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.hosts import FeaturesOwner
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.averages import averages_of
from mllm_crossget.hooks.projector.groups import Groups, groups_of_source, source_of_trace, with_groups
from mllm_crossget.hooks.tower.encoder import Encoding
from mllm_crossget.hooks.tower.fixed_counts import kept_trace, trace_of
from mllm_crossget.methods.method import Place
from mllm_crossget.schedule import Schedule, TowerGeometry

_AHEAD = "ahead"
_RECORDED = ("output_hidden_states", "output_attentions")  # which stock models hand on to their towers
_PLACES = "_mllm_crossget_places"


class FeaturesMixin(FeaturesOwner):
    """Base of the mixins for the owner of ``get_image_features``.

    Class attributes:
        refused: places where no method can act in models of this kind, and why not.
    """

    refused: ClassVar[Mapping[Place, str]] = {}

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """Put the mixin into ``owner``, and change what else it needs; all of it through the journal."""
        journal.swap_class(owner, cls)


@dataclass(frozen=True)
class TowerPlaces:
    """How the features of an image follow from its tokens in the tower.

    Attributes:
        encoder: path from the features' owner to the module that holds the layers.
        read: layers that have run when the features are read.
        dropped: tokens in front of the patches that are dropped.
        cross: whether a cross token travels as the last token.
        drop_cross: whether it is cut off.
        placeholders: tokens that the untouched model makes of one tower image.
    """

    encoder: str
    read: int
    dropped: int
    cross: bool
    drop_cross: bool
    placeholders: int

    @classmethod
    def of(cls, handle: Handle, encoder_path: str, schedule: Schedule, geometry: TowerGeometry) -> TowerPlaces:
        """The places for a tower of this geometry whose layers are at ``encoder_path`` in the model."""
        path = encoder_path.removeprefix(f"{handle.family.features_owner}.")
        dropped = geometry.prefix if geometry.drops_prefix else 0
        return cls(path, geometry.read, dropped, schedule.cross, schedule.drop_cross, schedule.placeholders)

    def groups(self, encoding: Encoding) -> list[Groups]:
        """What the features of every image of an encoding stand for."""
        layers = encoding[: self.read]
        source = source_of_trace(layers)
        source = source[:, self.dropped : source.shape[1] - self.cross] - self.dropped
        return groups_of_source(source, layers[-1].size.shape[1] - self.dropped - self.drop_cross)


class ReducedFeatures(FeaturesMixin):
    """Hands out what was encoded ahead."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        return encoded_ahead(self, "get_image_features", args, kwargs) or super().get_image_features(*args, **kwargs)


class TowerFeatures(ReducedFeatures):
    """The tower's tokens themselves, one feature each: says what they stand for, and cuts the cross token off where it
    would not fit."""

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``FeaturesMixin.install``."""
        journal.set_attribute(
            owner, _PLACES, TowerPlaces.of(handle, handle.encoder_path, handle.schedule, handle.tower_geometry)
        )
        journal.swap_class(owner, cls)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with fewer features per image."""
        places: TowerPlaces = self.__dict__[_PLACES]
        return tower_features(self, places, super().get_image_features, args, kwargs)


def tower_features(
    owner: nn.Module,
    places: TowerPlaces,
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    readers: tuple[nn.Module, ...] = (),
) -> Any:
    """The stock features of a reduced tower, with their groups, without a cross token that does not fit.

    ``readers`` see what the tower merges, as the encoder itself does.
    """
    encoder = module_at(owner, places.encoder)
    with kept_trace(encoder, *readers, *averages_of(owner, kwargs)):
        output = stock(*args, **kwargs)
        encoding = trace_of(encoder)
        if not encoding:  # encoded ahead
            return output
        groups = places.groups(encoding)
    return with_groups(with_features(output, without_last) if places.drop_cross else output, groups)


def features_of(output: Any) -> Any:
    """The projected features in what ``get_image_features`` returns: a list of (k, D) or a tensor (images, k, D)."""
    return output.pooler_output if hasattr(output, "pooler_output") else output[1]


def with_features(output: Any, change: Any) -> Any:
    """The same output with its features changed by a function of them."""
    if hasattr(output, "pooler_output"):
        output.pooler_output = change(output.pooler_output)
        return output
    return (output[0], change(output[1]), *output[2:])


def without_last(features: Any) -> Any:
    """Features of every image but the last one, which is the cross token."""
    if isinstance(features, Tensor):
        return features[:, :-1]
    return [image[:-1] for image in features]


def encode_ahead(model: nn.Module, family: Family, modality: Modality, kwargs: dict[str, Any]) -> list[int]:
    """Encode the images of a call now, unless that was done already, and return the number of features of each."""
    return [len(image) for image in features_of(ahead_of(model, family, modality, kwargs))]


def ahead_of(model: nn.Module, family: Family, modality: Modality, kwargs: dict[str, Any]) -> Any:
    """The features of the images of a call, encoded now or before; kept until ``forget_ahead``'s block ends."""
    owner = module_at(model, family.features_owner or "")
    records = modality.counts is None and _hands_on_keywords(type(owner), modality.encode)
    wanted = (*modality.arguments, *(_RECORDED if records else ()))
    arguments = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
    pixels = kwargs[modality.pixels]
    output = encoded_ahead(owner, modality.encode, (pixels,), {})
    if output is None:
        output = getattr(owner, modality.encode)(pixels, **arguments, return_dict=True)
        kept: dict[str, Any] | None = lent(_AHEAD, owner)
        if kept is not None:
            kept[modality.encode] = (_identity(pixels), output)
    return output


@kept_per_class
def _hands_on_keywords(kind: type[nn.Module], encode: str) -> bool:
    """True if the stock ``forward`` calls its method ``encode`` with ``**kwargs``, as its source says: the tower then
    gets ``output_hidden_states`` and ``output_attentions``."""
    try:
        lines = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):  # no source at hand
        return False
    calls = [node for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Call)]
    own = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == encode]
    return any(keyword.arg is None for call in own for keyword in call.keywords)


def encoded_ahead(owner: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``encode_ahead`` has kept for this call, or None. It is handed out for the very same pixels only: beams and
    samples repeat the images in transformers before 5.23, which are then encoded as usual."""
    kept = (lent(_AHEAD, owner) or {}).get(method)
    if kept is None:
        return None
    pixels = args[0] if args else next((v for k, v in kwargs.items() if k.startswith("pixel_values")), None)
    return kept[1] if isinstance(pixels, Tensor) and _identity(pixels) == kept[0] else None


@contextmanager
def forget_ahead(model: nn.Module, family: Family) -> Iterator[None]:
    """Drop what was encoded ahead in this thread when the ``with`` block ends, also for a block around it."""
    if family.features_owner is None:
        yield
        return
    owner = module_at(model, family.features_owner)
    kept: dict[str, Any] | None = lent(_AHEAD, owner)
    kept = {} if kept is None else kept
    try:
        with Lent(_AHEAD, kept, owner):
            yield
    finally:
        if not torch.compiler.is_compiling():  # else a guard of every decoding step asks whether something is kept
            kept.clear()


def _identity(pixels: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    return pixels.data_ptr(), pixels.shape, pixels.dtype
