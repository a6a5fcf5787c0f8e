"""What a model family is: data that says where tower and language model are, and what reaches the language side.

Knows no method. A new family is one new file that builds a ``Family`` and calls ``register_family``.

Lengths of what a reduced model returns, in every family (T_i: ``Schedule.tokens``; as many tensors as the untouched
model returns, and its lengths for everything that is not named here):

- Vision tower of L layers whose tokens merge inside it: ``hidden_states`` are L + 1 of T_0 ... T_L tokens, T_i being
  those behind layer i (T_0: the patches, with class token and cross token); ``attentions`` are L maps of T_0 ...
  T_(L-1) tokens, as a layer attends before it merges; ``last_hidden_state`` has T_L. Images of several sizes in one
  call are padded with zeros behind their own tokens. A tower whose tokens are merged behind the projector alone is as
  it was; in front of a projector of the whole grid, ``get_image_features`` returns states of all patches, each of them
  that of the token it is in (attention maps are the reduced ones). A tower that takes images of any size in one call,
  in front of such a projector, gives states of all patches always, zeros at padding; its attention maps are those of
  every image (or of images of one size) by itself, layer by layer.
- What reads the tower with cross-attention (Q-Former, BLIP's text models): keys of T_L tokens, queries as before.
- Text tower of a dual encoder, text encoder of BLIP: as the vision tower, of the longest text without padding; its
  ``last_hidden_state`` has the columns of ``input_ids`` (in BLIP it is the last entry of ``hidden_states`` as well).
  What a text decoder reads of it are the tokens that are left.
- Language model whose prompt has placeholders: ``hidden_states``, ``attentions`` and the KV cache have the compact
  prompt (of the longest row), in every layer; ``logits`` have the full one.
- ``image_hidden_states`` (and those of videos, where they become fewer): the features that the language model gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mllm_crossget.families.family_parts import (
    CrossPaths,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    PromptSide,
    VisionSide,
)
from mllm_crossget.families.feature_kind import FeatureKind, Positions
from mllm_crossget.families.modality import Modality, Tiles
from mllm_crossget.families.tower_kinds import (
    BLIP2_TOWER,
    BLIP_TOWER,
    CLIP_TOWER,
    INSTRUCTBLIP_TOWER,
    INSTRUCTBLIPVIDEO_TOWER,
    SIGLIP_TOWER,
    BertNames,
    LayerNames,
    TextSide,
    TextTower,
    TowerKind,
    config_at,
    patches_per_image,
    tower_kind,
)
from mllm_crossget.flop_formulas import mlp_width
from mllm_crossget.geometry import Geometry, TowerCosts, TowerGeometry
from mllm_crossget.language_flops import token_flops


@dataclass(frozen=True)
class Family:
    """A model family: data in named parts. Whatever is in a part can be read from the family too, by the names below.

    Args:
        model_type: of the top configuration (``model.config.model_type``).
        vision: the tower, and what reads it.
        docs: its line in the table of families.
        prompt: how features reach the prompt.
        language: language model or text tower.
        crossing: where cross tokens are compared.
        costs: formulas.
        classes: names of the model classes that are served, where the model type has others of another structure;
            empty: all that no other family of this model type names.
        variant: tells families of one model type apart; "" for the one that a bare configuration means.
        configured: whether a configuration of this model type means this variant; None: no configuration by itself.
    """

    model_type: str
    vision: VisionSide
    docs: FamilyDocs
    prompt: PromptSide = field(default_factory=PromptSide)
    language: LanguageSide = field(default_factory=LanguageSide)
    crossing: CrossPaths = field(default_factory=CrossPaths)
    costs: FamilyCosts = field(default_factory=FamilyCosts)
    classes: tuple[str, ...] = ()
    variant: str = ""
    configured: Callable[[Any], bool] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its key: it is made of functions."""
        return registered_family, (self.key,)

    @property
    def key(self) -> str:
        """Its name in ``families()``: the model type, and the variant where there is one."""
        return f"{self.model_type}:{self.variant}" if self.variant else self.model_type

    @property
    def title(self) -> str:
        """Its name for readers: the model type, and the classes or the variant that it is about."""
        told = ", ".join(self.classes) or self.variant
        return f"{self.model_type} ({told})" if self.variant else self.model_type

    def serves(self, class_names: Iterable[str]) -> bool:
        """Whether a model with one of these class names has this family's structure."""
        return not self.classes or not set(self.classes).isdisjoint(class_names)

    @property
    def towers(self) -> tuple[str, ...]:
        """Model types of the towers that are served."""
        return tuple(kind.model_type for kind in self.vision.kinds)

    @property
    def tower(self) -> str | None:
        """See ``VisionSide.tower``."""
        return self.vision.tower

    @property
    def vision_config(self) -> str:
        """See ``VisionSide.config``."""
        return self.vision.config

    @property
    def geometry(self) -> Callable[[Any], Geometry]:
        """See ``VisionSide.geometry``; with what the schedule needs to know of costs."""
        return partial(_geometry_with_costs, self)

    @property
    def projector(self) -> str | None:
        """See ``VisionSide.projector``."""
        return self.vision.projector

    @property
    def dynamic(self) -> bool:
        """See ``VisionSide.dynamic``."""
        return self.vision.dynamic

    @property
    def cosine(self) -> bool:
        """See ``VisionSide.cosine``."""
        return self.vision.cosine

    @property
    def readers(self) -> tuple[str, ...]:
        """See ``VisionSide.readers``."""
        return self.vision.readers

    @property
    def cross_attentions(self) -> tuple[str, str] | None:
        """See ``VisionSide.cross_attentions``."""
        return self.vision.cross_attentions

    @property
    def features_owner(self) -> str | None:
        """See ``PromptSide.owner``."""
        return self.prompt.owner

    @property
    def features(self) -> FeatureKind:
        """See ``PromptSide.kind``."""
        return self.prompt.kind

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """See ``PromptSide.modalities``."""
        return self.prompt.modalities

    @property
    def positions(self) -> Positions:
        """See ``PromptSide.positions``."""
        return self.prompt.positions

    @property
    def first_position(self) -> int:
        """See ``PromptSide.first_position``."""
        return self.prompt.first_position

    @property
    def images_per_row(self) -> Callable[[Any, dict[str, Any]], Tensor] | None:
        """See ``PromptSide.images_per_row``."""
        return self.prompt.images_per_row

    @property
    def language_model(self) -> str | None:
        """See ``LanguageSide.model``."""
        return self.language.model

    @property
    def text_side(self) -> Callable[[Any], TextSide | None] | None:
        """See ``LanguageSide.text_side``."""
        return self.language.text_side

    @property
    def language_layers(self) -> Callable[[Any], tuple[str, ...]] | None:
        """See ``LanguageSide.layers``."""
        return self.language.layers

    @property
    def text_tower(self) -> TextTower | None:
        """See ``LanguageSide.text_tower``."""
        return self.language.text_tower

    @property
    def vision_projection(self) -> tuple[str, ...]:
        """See ``CrossPaths.vision``."""
        return self.crossing.vision

    @property
    def cross_cell(self) -> Callable[[Any, Tensor], Tensor] | None:
        """See ``CrossPaths.cell``."""
        return self.crossing.cell

    @property
    def text_projection(self) -> tuple[str, ...]:
        """See ``CrossPaths.text``."""
        return self.crossing.text

    @property
    def tiles(self) -> Callable[[Any], Tiles] | None:
        """See ``FamilyCosts.tiles``."""
        return self.costs.tiles

    @property
    def llm_tokens(self) -> Callable[[Any, int], int] | None:
        """See ``FamilyCosts.llm_tokens``."""
        return self.costs.llm_tokens

    @property
    def connector_flops(self) -> Callable[[Any, int], int] | None:
        """See ``FamilyCosts.connector``."""
        return self.costs.connector

    @property
    def connector_text_flops(self) -> Callable[[Any, int], int] | None:
        """See ``FamilyCosts.connector_text``."""
        return self.costs.connector_text

    @property
    def tower_flops(self) -> Callable[[Any], tuple[int, int]] | None:
        """See ``FamilyCosts.tower``."""
        return self.costs.tower

    @property
    def language_flops(self) -> Callable[[Any, int, int, int], tuple[int, int, int]] | None:
        """See ``FamilyCosts.language``."""
        return self.costs.language

    @property
    def note(self) -> str:
        """See ``FamilyDocs.note``."""
        return self.docs.note

    @property
    def exact(self) -> str:
        """See ``FamilyDocs.exact``."""
        return self.docs.exact


def modality_geometry(family: Family, modality: Modality, config: Any) -> TowerGeometry:
    """Geometry of the tower of its own that a modality has. Raises ``TypeError`` for one without."""
    if modality.geometry is None:
        raise TypeError(f"{modality.name} have no tower of their own")
    return _with_costs(family, config, modality.geometry(config))


def _geometry_with_costs(family: Family, config: Any) -> Geometry:
    return _with_costs(family, config, family.vision.geometry(config))


def _with_costs(family: Family, config: Any, made: Any) -> Any:
    if not isinstance(made, TowerGeometry) or not family.modalities:
        return made
    vision, per_token = config_at(config, family.vision_config), token_flops(config.get_text_config())
    if per_token is None:
        return made
    view = family.connector_flops(config, 1) if family.vision.view and family.connector_flops else 0
    return replace(made, costs=TowerCosts(vision.hidden_size, mlp_width(vision), per_token, view))


_FAMILIES: dict[str, Family] = {}
_REFUSED: dict[str, str] = {}


def register_family(family: Family) -> Family:
    """Make a family known to ``accelerate_mllm``, the command line and the tests."""
    _FAMILIES[family.key] = family
    return family


def registered_family(key: str) -> Family:
    """The family of a key. Raises ``ValueError`` for an unknown one."""
    if key not in _FAMILIES:
        raise ValueError(f"unknown family {key!r}; known are {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[key]


def families() -> dict[str, Family]:
    """The registered families by their keys: the model type, with ``:variant`` where a type has several."""
    return dict(_FAMILIES)


def family_of(config: Any, class_names: Iterable[str] = ()) -> Family | None:
    """The family of a configuration, or of a model whose class and base classes have these names; None if unknown.

    Without class names those in the configuration's ``architectures`` count. A variant that the configuration itself
    means goes first. Classes that a family names are looked for then, then the family of the model type that takes any
    class; a bare configuration means the one without variant.
    """
    model_type = getattr(config, "model_type", None)
    of_type = [family for family in _FAMILIES.values() if family.model_type == model_type]
    meant = [family for family in of_type if family.configured is not None and family.configured(config)]
    of_type = meant or [family for family in of_type if family.configured is None]
    names = tuple(class_names) or tuple(getattr(config, "architectures", None) or ())
    if not names:
        return next((family for family in of_type if meant or not family.variant), None)
    return next(
        (family for family in sorted(of_type, key=lambda one: not one.classes) if family.serves(names)), None
    )  # fmt: skip


def refuse_family(model_type: str, reason: str) -> None:
    """Name a model type that cannot be served, with the reason, for messages and for the table of families."""
    _REFUSED[model_type] = reason


def refused_families() -> dict[str, str]:
    """Reasons by model type."""
    return dict(_REFUSED)


def text_side_of(family: Family, config: Any) -> TextSide | None:
    """Where the text cross tokens of a model with this configuration are written, or None."""
    if family.text_side is not None:
        return family.text_side(config)
    return None if family.language_model is None else TextSide(family.language_model)


def language_layers_of(family: Family, config: Any) -> tuple[str, ...]:
    """Paths of the language model's lists of layers; empty for a family without a language model."""
    if family.language_layers is not None:
        return family.language_layers(config)
    return () if family.language_model is None else (f"{family.language_model}.layers",)


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Submodule at a dotted path; "" is the root."""
    return root.get_submodule(path) if path else root


__all__ = [
    "BLIP2_TOWER",
    "BLIP_TOWER",
    "CLIP_TOWER",
    "INSTRUCTBLIPVIDEO_TOWER",
    "INSTRUCTBLIP_TOWER",
    "SIGLIP_TOWER",
    "BertNames",
    "CrossPaths",
    "Family",
    "FamilyCosts",
    "FamilyDocs",
    "FeatureKind",
    "LanguageSide",
    "LayerNames",
    "Positions",
    "PromptSide",
    "TextSide",
    "TextTower",
    "TowerKind",
    "VisionSide",
    "config_at",
    "families",
    "family_of",
    "language_layers_of",
    "module_at",
    "patches_per_image",
    "refuse_family",
    "refused_families",
    "register_family",
    "text_side_of",
    "tower_kind",
]
