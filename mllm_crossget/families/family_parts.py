"""The parts of a family: its structure, its costs, and its line in the table of families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.geometry import TowerCosts
from mllm_crossget.families.feature_kind import FeatureKind, Positions
from mllm_crossget.families.modality import Modality, Tiles
from mllm_crossget.families.tower_kinds import TextSide, TextTower, TowerKind
from mllm_crossget.schedule import Geometry


@dataclass(frozen=True)
class VisionSide:
    """The vision tower, and the modules that read its tokens.

    Args:
        tower: path to the vision tower; "" if the model is the tower, None if it has none.
        config: path from the configuration to the vision configuration.
        geometry: configuration -> the tower's geometry, or a ``MergeGeometry`` if tokens are merged behind the
            projector. Raises ``ValueError`` if the configuration is not supported.
        kinds: supported kinds of towers.
        projector: path to the module that maps vision features to the text width, or None.
        view: paths of the modules (norm, projector) that turn the tower's tokens into features, in order, if they map
            each token separately. Empty if a feature is made of several tokens or layers.
        dynamic: whether methods that choose the number of tokens per image are supported.
        cosine: whether CrossGET was published for it as for CLIP: importance is the cosine of a token's key with the
            cross token's query, and the metric is the keys of all heads. Otherwise, as for LLaVA, importance is the
            attention received, and the metric is the keys summed over heads.
        readers: paths of the modules that cross-attend to the tower's tokens. If ``dynamic``, they do so after its
            ``post_layernorm`` and use ``encoder_attention_mask``.
        cross_attentions: for a reader that ignores this mask (BLIP's text models): path to its list of layers, and path
            from a layer to the module that computes its cross-attention.
    """

    tower: str | None
    config: str
    geometry: Callable[[Any], Geometry]
    kinds: tuple[TowerKind, ...]
    projector: str | None = None
    view: tuple[str, ...] = ()
    dynamic: bool = False
    cosine: bool = False
    readers: tuple[str, ...] = ()
    cross_attentions: tuple[str, str] | None = None

    @property
    def is_read_across(self) -> bool:
        """Whether modules cross-attend to the tower's tokens."""
        return bool(self.readers) or self.cross_attentions is not None


@dataclass(frozen=True)
class PromptSide:
    """How features reach the prompt.

    Args:
        owner: path to the module whose ``get_image_features`` the top model calls, or None.
        kind: how its features are made.
        modalities: visual inputs with placeholders in the prompt. Empty if the language side gets as many tokens as
            without reduction, or has no prompt.
        positions: positions of image tokens.
        first_position: position of a prompt's first token, if the model's forward is given no positions.
        images_per_row: (configuration, keyword arguments of the call) -> (B,) number of images in each row of the text.
            None: the same number for every row. Only used if ``modalities`` is empty.
    """

    owner: str | None = None
    kind: FeatureKind = FeatureKind.PLAIN
    modalities: tuple[Modality, ...] = ()
    positions: Positions = Positions.CONTIGUOUS
    first_position: int = 0
    images_per_row: Callable[[Any, dict[str, Any]], Tensor] | None = None


@dataclass(frozen=True)
class LanguageSide:
    """The language model or text tower.

    Args:
        model: path to the language model (its decoder, or the model with its head), or None.
        text_side: configuration -> where text cross tokens are written; None: in the ``layers`` of ``model``.
        layers: configuration -> paths of the language model's lists of layers, which LoRA adapts; None: ``layers`` of
            ``model``.
        text_tower: text tower of a dual encoder or another model whose text can be reduced, else None.
    """

    model: str | None = None
    text_side: Callable[[Any], TextSide | None] | None = None
    layers: Callable[[Any], tuple[str, ...]] | None = None
    text_tower: TextTower | None = None


@dataclass(frozen=True)
class CrossPaths:
    """The space in which the cross tokens of both sides are compared, for the alignment loss.

    Args:
        vision: paths of the modules, in order, that map a vision cross token to the space of the comparison. Empty if
            there are none; then there is no alignment loss.
        cell: for a first module that takes cells of the grid: (configuration, (images, D) cross tokens) -> (images,
            ...) its input for a cell whose patches are all that token. None: the input is the token itself.
        text: paths of the modules that map a text cross token to that space; empty if it is not mapped.
    """

    vision: tuple[str, ...] = ()
    cell: Callable[[Any, Tensor], Tensor] | None = None
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyCosts:
    """FLOP formulas that depend on the family.

    Args:
        tiles: configuration -> how often the tower runs for a typical image, for costs without an image; None: once.
        llm_tokens: (configuration, tower features) -> visual tokens that the language model gets; None: all features.
        connector: (configuration, tower features) -> FLOPs between tower and language model. ``tower features`` are all
            tokens of an image if tokens are merged behind the projector.
        connector_text: (configuration, text tokens) -> FLOPs that the text adds between tower and language model.
        tower: configuration -> FLOPs of patch embedding and of layers, for one image that is not reduced.
        language: (configuration, visual tokens, text tokens, new tokens) -> FLOPs of prefill, of the logits of the last
            token, and of decoding. For a decoder that reads a text tower, the tower's tokens replace the visual tokens.
            None: a language model that reads visual and text tokens as one prompt.
        layers: configuration -> costs of the layers of a tower whose tokens are cells of a patch merger, for the
            example image. None: a plain vision transformer with the widths of the vision configuration.
    """

    tiles: Callable[[Any], Tiles] | None = None
    llm_tokens: Callable[[Any, int], int] | None = None
    connector: Callable[[Any, int], int] | None = None
    connector_text: Callable[[Any, int], int] | None = None
    tower: Callable[[Any], tuple[int, int]] | None = None
    language: Callable[[Any, int, int, int], tuple[int, int, int]] | None = None
    layers: Callable[[Any], TowerCosts] | None = None


@dataclass(frozen=True)
class FamilyDocs:
    """A family's line in the table.

    Args:
        note: where tokens are reduced.
        exact: what equals the untouched model or a reference exactly, and what is not supported.
    """

    note: str
    exact: str = ""
