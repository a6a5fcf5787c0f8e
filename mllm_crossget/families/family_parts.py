"""The parts that a family is made of: what it looks like, what it costs, and what its line in the table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_crossget.families.feature_kind import FeatureKind, Positions
from mllm_crossget.families.modality import Modality, Tiles
from mllm_crossget.families.tower_kinds import TextSide, TextTower, TowerKind
from mllm_crossget.schedule import Geometry


@dataclass(frozen=True)
class VisionSide:
    """The vision tower, and what reads its tokens.

    Args:
        tower: path to the vision tower; "" if the model is the tower, None if it has none.
        config: path from the configuration to the vision configuration.
        geometry: configuration -> the tower's geometry, or a ``MergeGeometry`` where tokens are merged behind the
            projector. Raises ``ValueError`` where the configuration cannot be served.
        kinds: of towers that are served.
        projector: path to the module that maps vision features to the text width, or None.
        view: paths of the modules that make the features of the tokens that the tower hands on, one after the other and
            each token by itself (norm, projector); empty where features are made of several tokens or layers.
        dynamic: whether every image may keep its own number of tokens (methods that choose per image).
        cosine: CrossGET's CLIP flavour was published for it: importance is the cosine of a token's key with the cross
            token's query, the metric the keys of all heads. Otherwise, as for LLaVA, attention received and keys added
            up over heads.
        readers: paths of the models that cross-attend to the tower's tokens, behind its ``post_layernorm``, and heed
            ``encoder_attention_mask``.
        cross_attentions: for a reader that does not (BLIP's text models): path to its list of layers, and path from a
            layer to the module that computes its cross-attention.
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


@dataclass(frozen=True)
class PromptSide:
    """How features reach the prompt.

    Args:
        owner: path to the module whose ``get_image_features`` the top model calls, or None.
        kind: how its features come about.
        modalities: visual inputs with placeholders in the prompt; empty where the language side gets as many tokens as
            without reduction, or has no prompt.
        positions: of image tokens.
        first_position: of a prompt's first token, where the model's forward is given no positions.
        images_per_row: (configuration, keyword arguments of the call) -> (B,) images in every row of the text; None:
            the same number for every row. Only asked where ``modalities`` is empty.
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
        text_tower: of a dual encoder or another model whose text can be reduced, else None.
    """

    model: str | None = None
    text_side: Callable[[Any], TextSide | None] | None = None
    layers: Callable[[Any], tuple[str, ...]] | None = None
    text_tower: TextTower | None = None


@dataclass(frozen=True)
class CrossPaths:
    """Where the cross tokens of both sides are compared, for the alignment loss.

    Args:
        vision: paths of the modules that map a vision cross token, one after the other, to where it is compared with
            the text cross token; empty where there is no such map (then there is no alignment loss).
        cell: (configuration, (images, D) cross tokens) -> (images, ...) what the first of these modules takes for a
            cell of the grid all of whose patches are that token, where it takes cells; None: the token itself.
        text: likewise for a text cross token; empty leaves it as it is.
    """

    vision: tuple[str, ...] = ()
    cell: Callable[[Any, Tensor], Tensor] | None = None
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyCosts:
    """Formulas for what depends on the family.

    Args:
        tiles: configuration -> how often the tower runs for a typical image, for costs without an image; None: once.
        llm_tokens: (configuration, tower features) -> visual tokens that the language model gets; None: all features.
        connector: (configuration, tower features) -> FLOPs between tower and language model; all tokens of an image
            where they are merged behind the projector.
        connector_text: (configuration, text tokens) -> FLOPs that the text adds there.
        tower: configuration -> FLOPs of patch embedding and layers for one image that is not reduced.
        language: (configuration, visual tokens, text tokens, new tokens) -> FLOPs of prefill, logits of the last token,
            decoding; of a decoder that reads a text tower, whose tokens then take the place of the visual ones; None: a
            language model that reads visual and text tokens as one prompt.
    """

    tiles: Callable[[Any], Tiles] | None = None
    llm_tokens: Callable[[Any, int], int] | None = None
    connector: Callable[[Any, int], int] | None = None
    connector_text: Callable[[Any, int], int] | None = None
    tower: Callable[[Any], tuple[int, int]] | None = None
    language: Callable[[Any, int, int, int], tuple[int, int, int]] | None = None


@dataclass(frozen=True)
class FamilyDocs:
    """A family's line in the table.

    Args:
        note: where tokens are reduced.
        exact: what equals the untouched model or a reference exactly, what is left out.
    """

    note: str
    exact: str = ""
