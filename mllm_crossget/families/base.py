"""What a model family is: data that says where tower and language model are, and what reaches the language side.

Knows no method. A new family is one new file that builds a ``Family`` and calls ``register_family``.

Lengths of what a reduced model returns, in every family (T_i: ``Schedule.tokens``; as many tensors as the untouched
model returns, and its lengths for everything that is not named here):

- Vision tower of L layers whose tokens merge inside it: ``hidden_states`` are L + 1 of T_0 ... T_L tokens, T_i being
  those behind layer i (T_0: the patches, with class token and cross token); ``attentions`` are L maps of T_0 ...
  T_(L-1) tokens, as a layer attends before it merges; ``last_hidden_state`` has T_L. Images of several sizes in one
  call are padded with zeros behind their own tokens. A tower whose tokens are merged behind the projector alone is as
  it was; in front of a projector of the whole grid, ``get_image_features`` returns states of all patches, each of them
  that of the token it is in (attention maps are the reduced ones).
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
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm_crossget.families.modality import Modality, Tiles
from mllm_crossget.schedule import Geometry, TextGeometry


@dataclass(frozen=True)
class LayerNames:
    """Attribute names inside an encoder (``layers``) and inside its pre-norm layers.

    ``fused`` tells that the attention multiplies ``qkv`` itself and does not use transformers' attention interface.
    ``scale1``, ``scale2``: factors of what attention and MLP add (LayerScale), ``dropout``: of what the MLP adds; ""
    where a layer has none.
    """

    layers: str = "layers"
    norm1: str = "layer_norm1"
    attention: str = "self_attn"
    norm2: str = "layer_norm2"
    mlp: str = "mlp"
    fused: bool = False
    scale1: str = ""
    scale2: str = ""
    dropout: str = ""
    inner: ClassVar[str] = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """What a layer must have."""
        named = (self.norm1, self.attention, self.norm2, self.mlp, self.scale1, self.scale2, self.dropout)
        return tuple(filter(None, named))


@dataclass(frozen=True)
class TowerKind:
    """A kind of vision tower, known by the ``model_type`` of its configuration.

    Args:
        model_type: of the vision configuration.
        prefix: tokens in front of the patches (1 for a class token).
        encoder: path from the tower to the module that holds the layers.
        names: attribute names inside it.
    """

    model_type: str
    prefix: int
    encoder: str = "encoder"
    names: LayerNames = LayerNames()


@dataclass(frozen=True)
class BertNames:
    """Attribute names inside an encoder and inside its post-norm layers, which may cross-attend to an image behind
    their self-attention (BLIP). ``attention`` is the module that attends, norms and adds; ``inner`` the one inside it
    that multiplies queries and keys."""

    layers: str = "layer"
    attention: str = "attention"
    inner: str = "self"
    crossing: str = "crossattention"
    mlp: str = "feed_forward_chunk"

    @property
    def parts(self) -> tuple[str, ...]:
        """What a layer must have."""
        return self.attention, self.mlp


CLIP_TOWER = TowerKind("clip_vision_model", prefix=1)
SIGLIP_TOWER = TowerKind("siglip_vision_model", prefix=0)
BLIP_TOWER = TowerKind("blip_vision_model", prefix=1, names=LayerNames(fused=True))
BLIP2_TOWER = TowerKind("blip_2_vision_model", prefix=1)
INSTRUCTBLIP_TOWER = TowerKind("instructblip_vision_model", prefix=1)
INSTRUCTBLIPVIDEO_TOWER = TowerKind("instructblipvideo_vision_model", prefix=1)
TOWERS = {
    kind.model_type: kind
    for kind in (CLIP_TOWER, SIGLIP_TOWER, BLIP_TOWER, BLIP2_TOWER, INSTRUCTBLIP_TOWER, INSTRUCTBLIPVIDEO_TOWER)
}


@dataclass(frozen=True)
class TextSide:
    """Where text cross tokens are written: into the first real token of every row's text, in front of every layer.

    Args:
        model: path to the module that is called with the text and its mask (a decoder, an encoder, a Q-Former).
        layers: path from there to the list of layers.
        config: path from the configuration to the part that holds ``hidden_size``.
        skip: real tokens in front of the text that are no text (query tokens, image features).
        keyword: what the text and its mask begin with in the model's call: "qformer_" for ``qformer_input_ids`` and
            ``qformer_attention_mask``, whose text then stands behind ``skip`` tokens that are in neither of them.
    """

    model: str
    layers: str = "layers"
    config: str = "text_config"
    skip: int = 0
    keyword: str = ""


def register_tower(kind: TowerKind) -> TowerKind:
    """Make a kind of tower known, from the file of the family that has it."""
    TOWERS[kind.model_type] = kind
    return kind


@dataclass(frozen=True)
class TextTower:
    """The text tower of a dual encoder, or a BERT that reads a text and an image.

    Args:
        path: to the module whose ``forward`` takes ``input_ids``.
        config: path from the configuration to the text configuration; "" if it is the text configuration.
        end: (text configuration, (B, T) input ids) -> (B,) place of the token that the text's embedding is read from,
            as the model itself finds it. It guides the matching and survives to the last layer.
        causal: whether a token sees only those in front of it.
        first: whether the first token is protected as well (CLIP's start mark).
        takes_mask: whether padding that an attention mask names can be taken out; False where the model reads the last
            column whatever it is (SigLIP).
        encoder: path from the module to the one that holds the layers.
        names: attribute names inside it, which say what kind of layers these are.
        reads_image: whether its layers cross-attend to the image.
        reader: path to the text decoder, inside the module with its head, that cross-attends to its states; "" where
            there is none.
    """

    path: str
    config: str
    end: Callable[[Any, Tensor], Tensor]
    causal: bool = True
    first: bool = True
    takes_mask: bool = True
    encoder: str = "encoder"
    names: LayerNames | BertNames = LayerNames()
    reads_image: bool = False
    reader: str = ""

    @property
    def appends(self) -> bool:
        """Whether its cross token travels as one more token; a BERT's is written into its first token instead, as
        where text is not reduced (``Family.text_side``)."""
        return isinstance(self.names, LayerNames)

    def geometry(self, config: Any) -> TextGeometry:
        """What a schedule needs to know, from the model's configuration."""
        text = config_at(config, self.config)
        return TextGeometry(text.num_hidden_layers, text.max_position_embeddings, 1 + self.first, self.appends)


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        model_type: of the top configuration (``model.config.model_type``).
        tower: path to the vision tower; "" if the model is the tower, None if it has none.
        vision_config: path from the configuration to the vision configuration.
        geometry: configuration -> the tower's geometry, or a ``MergeGeometry`` where tokens are merged behind the
            projector. Raises ``ValueError`` where the configuration cannot be served.
        towers: the tower kinds that are served.
        note: one line for the table of families: where tokens are reduced.
        exact: one line for the table: what equals the untouched model or a reference exactly, what is left out.
        language_model: path to the language model (its decoder, or the model with its head), or None.
        text_side: configuration -> where text cross tokens are written; None: in the ``layers`` of ``language_model``.
        language_layers: configuration -> paths of the language model's lists of layers, which LoRA adapts; None:
            ``layers`` of ``language_model``.
        projector: path to the module that maps vision features to the text width, or None.
        vision_projection: paths of the modules that map a vision cross token, one after the other, to where it is
            compared with the text cross token; empty where there is no such map (then there is no alignment loss).
        cross_cell: (configuration, (images, D) cross tokens) -> (images, ...) what the first of these modules takes for
            a cell of the grid all of whose patches are that token, where it takes cells; None: the token itself.
        text_projection: likewise for a text cross token; empty leaves it as it is.
        images_per_row: (configuration, keyword arguments of the call) -> (B,) images in every row of the text; None:
            the same number for every row. Only asked where ``modalities`` is empty.
        features_owner: path to the module whose ``get_image_features`` the top model calls, or None.
        features: how features reach the prompt, a name known to ``hooks.projector.features``.
        dynamic: whether every image may keep its own number of tokens (methods that choose per image).
        readers: paths of the models that cross-attend to the tower's tokens, behind its ``post_layernorm``, and heed
            ``encoder_attention_mask``.
        cross_attentions: for a reader that does not (BLIP's text models): path to its list of layers, and path from a
            layer to the module that computes its cross-attention.
        modalities: visual inputs with placeholders in the prompt; empty where the language side gets as many tokens as
            without reduction, or has no prompt.
        positions: "contiguous", or "grid": image tokens have positions in time, height and width, and those that stay
            keep their own (``hooks.request.rope_positions``).
        first_position: of a prompt's first token, where the model's forward is given no positions.
        tiles: configuration -> how often the tower runs for a typical image, for costs without an image; None: once.
        llm_tokens: (configuration, tower features) -> visual tokens that the language model gets; None: all features.
        connector_flops: (configuration, tower features) -> FLOPs between tower and language model; all tokens of an
            image where they are merged behind the projector.
        tower_flops: configuration -> FLOPs of patch embedding and layers for one image that is not reduced.
        connector_text_flops: (configuration, text tokens) -> FLOPs that the text adds there.
        language_flops: (configuration, visual tokens, text tokens, new tokens) -> FLOPs of prefill, logits of the last
            token, decoding; of a decoder that reads a text tower, whose tokens then take the place of the visual ones;
            None: a language model that reads visual and text tokens as one prompt.
        classes: names of the model classes that are served, where the model type has others of another structure;
            empty: all that no other family of this model type names.
        variant: tells families of one model type apart; "" for the one that a bare configuration means.
        cosine: CrossGET's CLIP flavour was published for it: importance is the cosine of a token's key with the cross
            token's query, the metric the keys of all heads. Otherwise, as for LLaVA, attention received and keys
            added up over heads.
        text_tower: of a dual encoder or another model whose text can be reduced, else None.
    """

    model_type: str
    tower: str | None
    vision_config: str
    geometry: Callable[[Any], Geometry]
    towers: tuple[str, ...]
    note: str
    exact: str = ""
    language_model: str | None = None
    text_side: Callable[[Any], TextSide | None] | None = None
    language_layers: Callable[[Any], tuple[str, ...]] | None = None
    projector: str | None = None
    vision_projection: tuple[str, ...] = ()
    cross_cell: Callable[[Any, Tensor], Tensor] | None = None
    text_projection: tuple[str, ...] = ()
    images_per_row: Callable[[Any, dict[str, Any]], Tensor] | None = None
    features_owner: str | None = None
    features: str = "plain"
    positions: str = "contiguous"
    first_position: int = 0
    dynamic: bool = False
    readers: tuple[str, ...] = ()
    cross_attentions: tuple[str, str] | None = None
    modalities: tuple[Modality, ...] = ()
    tiles: Callable[[Any], Tiles] | None = None
    llm_tokens: Callable[[Any, int], int] | None = None
    connector_flops: Callable[[Any, int], int] | None = None
    tower_flops: Callable[[Any], tuple[int, int]] | None = None
    connector_text_flops: Callable[[Any, int], int] | None = None
    language_flops: Callable[[Any, int, int, int], tuple[int, int, int]] | None = None
    classes: tuple[str, ...] = ()
    variant: str = ""
    cosine: bool = False
    text_tower: TextTower | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its key: it is made of functions."""
        return registered_family, (self.key,)

    @property
    def key(self) -> str:
        """Its name in ``families()``: the model type, and the variant where there is one."""
        return f"{self.model_type}:{self.variant}" if self.variant else self.model_type

    def serves(self, class_names: Iterable[str]) -> bool:
        """Whether a model with one of these class names has this family's structure."""
        return not self.classes or not set(self.classes).isdisjoint(class_names)


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

    Without class names those in the configuration's ``architectures`` count. Classes that a family names are looked for
    first, then the family of the model type that takes any class; a bare configuration means the one without variant.
    """
    model_type = getattr(config, "model_type", None)
    of_type = [family for family in _FAMILIES.values() if family.model_type == model_type]
    names = tuple(class_names) or tuple(getattr(config, "architectures", None) or ())
    if not names:
        return next((family for family in of_type if not family.variant), None)
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


def config_at(config: Any, path: str) -> Any:
    """Sub-configuration at a dotted path; "" is the configuration itself."""
    for name in filter(None, path.split(".")):
        config = getattr(config, name)
    return config


def patches_per_image(vision_config: Any) -> int:
    """Patch tokens of one image: (image_size // patch_size)²; image and patch size in pixels."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


def tower_kind(model_type: str, towers: tuple[str, ...], owner: str) -> TowerKind:
    """The kind of a vision tower. Raises ``ValueError`` that names the supported ones."""
    if model_type not in towers:
        reason = _TOWER_REASONS.get(model_type, "its layers are not known to mllm_crossget")
        raise ValueError(
            f"{owner} with a {model_type!r} vision tower is not supported: {reason}; supported towers: "
            f"{', '.join(towers)}"
        )
    return TOWERS[model_type]


_TOWER_REASONS = {
    "pixtral": "it packs all images into one sequence with a block mask and splits the features by the patch grid",
    "qwen2_vl": "it packs all images into one sequence and merges 2x2 blocks of the patch grid",
}
