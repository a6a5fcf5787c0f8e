"""What a model family is: data about where tower and language model are, and what the language side gets.

Families do not depend on methods. A new family is one new file that builds a ``Family`` and calls ``register_family``.

Lengths of the outputs of a reduced model, in every family, with T_i for ``Schedule.tokens``. A reduced model returns as
many tensors as the untouched one, and outputs that are not named here have the untouched lengths.

- Vision tower of L layers whose tokens merge inside it: ``hidden_states`` are L + 1 tensors of T_0 ... T_L tokens,
  where T_i is the number after layer i (T_0: the patches, with class token and cross token). ``attentions`` are L maps
  of T_0 ... T_(L-1) tokens, because a layer attends before it merges. ``last_hidden_state`` has T_L. Images of several
  sizes in one call are padded with zeros after their own tokens. If tokens are merged only behind the projector, the
  tower is unchanged. With a projector that needs the whole grid, ``get_image_features`` returns states of all patches,
  each with the state of its token (attention maps are the reduced ones). If such a tower takes images of any size in
  one call, it always returns states of all patches, with zeros at padding. Its attention maps are then separate per
  image (or per group of images of one size), layer by layer.
- Modules that cross-attend to the tower (Q-Former, BLIP's text models): keys of T_L tokens, queries as before.
- Text tower of a dual encoder, text encoder of BLIP: as the vision tower, with the lengths of the longest text without
  padding. ``last_hidden_state`` has the columns of ``input_ids``, and in BLIP so has the last entry of
  ``hidden_states``. A text decoder reads the kept tokens.
- Language model whose prompt has placeholders: ``hidden_states``, ``attentions`` and the KV cache have the length of
  the compact prompt (of the longest row), in every layer; ``logits`` have the full length.
- ``image_hidden_states`` (and those of videos, if videos are reduced): the features that the language model gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mllm_crossget.arithmetic.flop_formulas import mlp_width
from mllm_crossget.arithmetic.geometry import Geometry, TowerCosts, TowerGeometry
from mllm_crossget.arithmetic.language_flops import token_flops
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


@dataclass(frozen=True)
class Family:
    """A model family: data in named parts. The fields of the parts can also be read from the family, by these names.

    Args:
        model_type: model type of the top configuration (``model.config.model_type``).
        vision: the tower, and the modules that read it.
        docs: its line in the table of families.
        prompt: how features reach the prompt.
        language: the language model or text tower.
        crossing: where cross tokens are compared.
        costs: FLOP formulas.
        classes: names of the supported model classes, if the model type has others of another structure. Empty: all
            classes that no other family of this model type names.
        variant: distinguishes families of one model type; "" for the one that a configuration without class names
            means.
        configured: whether a configuration of this model type means this variant. None: a configuration alone never
            means it.
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
        """Pickle and copy by key, because the parts hold functions."""
        return registered_family, (self.key,)

    @property
    def key(self) -> str:
        """Its name in ``families()``: the model type, and the variant if there is one."""
        return f"{self.model_type}:{self.variant}" if self.variant else self.model_type

    @property
    def title(self) -> str:
        """Its name for readers: the model type, with the classes or the variant."""
        suffix = ", ".join(self.classes) or self.variant
        return f"{self.model_type} ({suffix})" if self.variant else self.model_type

    def serves(self, class_names: Iterable[str]) -> bool:
        """Whether a model with one of these class names has this family's structure."""
        return not self.classes or not set(self.classes).isdisjoint(class_names)

    @property
    def towers(self) -> tuple[str, ...]:
        """Model types of the supported towers."""
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
        """See ``VisionSide.geometry``; the geometry has the costs that the schedule needs."""
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
    """Geometry of a modality's own tower. Raises ``TypeError`` for a modality without one."""
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
    if family.costs.layers is not None:
        return replace(made, costs=replace(family.costs.layers(config), language_token=per_token))
    view = family.connector_flops(config, 1) if family.vision.view and family.connector_flops else 0
    return replace(made, costs=TowerCosts(vision.hidden_size, mlp_width(vision), per_token, view))


_FAMILIES: dict[str, Family] = {}
_REFUSED: dict[str, str] = {}


def register_family(family: Family) -> Family:
    """Register a family for ``accelerate_mllm``, the command line and the tests."""
    _FAMILIES[family.key] = family
    return family


def registered_family(key: str) -> Family:
    """The family of a key. Raises ``ValueError`` for an unknown one."""
    if key not in _FAMILIES:
        raise ValueError(f"unknown family {key!r}; known are {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[key]


def families() -> dict[str, Family]:
    """The registered families by key: the model type, with ``:variant`` if a type has several."""
    return dict(_FAMILIES)


def family_of(config: Any, class_names: Iterable[str] = ()) -> Family | None:
    """The family of a configuration, or of a model whose class and base classes have these names; None if unknown.

    Without class names those in the configuration's ``architectures`` are used. The search has this order: a variant
    that the configuration itself means; a family that names one of the classes; the family of the model type that takes
    any class. A configuration without class names means the family without variant.
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
    """Register a model type that is not supported, with the reason, for messages and for the table of families."""
    _REFUSED[model_type] = reason


def refused_families() -> dict[str, str]:
    """Reasons by model type."""
    return dict(_REFUSED)


def text_side_of(family: Family, config: Any) -> TextSide | None:
    """The text side that text cross tokens are written into, for a model with this configuration; or None."""
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
