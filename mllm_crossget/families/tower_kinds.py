"""Supported towers: names of their layers, and tokens before the patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_crossget.schedule import TextGeometry


@dataclass(frozen=True)
class LayerNames:
    """Attribute names inside an encoder (``layers``) and inside its pre-norm layers.

    ``fused``: True if the attention multiplies ``qkv`` itself and does not use transformers' attention interface.
    ``scale1``, ``scale2``: factors of the outputs of attention and MLP (LayerScale). ``after1``, ``after2``: norms of
    these outputs. ``dropout``: dropout of the MLP's output. "" if a layer has none of these. ``rotary``: tables of the
    tokens' rotary embeddings, each (B, T, ·), -> keyword arguments of the attention; None if positions are added to the
    patches. ``packed``: True if all images are in one row, ``cu_seqlens`` gives their ends, and layers merge whole
    cells of a patch merger.
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
    after1: str = ""
    after2: str = ""
    rotary: Callable[[tuple[Tensor, ...]], dict[str, Any]] | None = None
    packed: bool = False
    inner: ClassVar[str] = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """What a layer must have."""
        named = (self.norm1, self.attention, self.norm2, self.mlp, self.scale1, self.scale2, self.dropout)
        return tuple(filter(None, (*named, self.after1, self.after2)))


@dataclass(frozen=True)
class TowerKind:
    """A kind of vision tower, identified by the ``model_type`` of its configuration.

    Args:
        model_type: model type of the vision configuration.
        prefix: number of tokens before the patches (1 for a class token).
        encoder: path from the tower to the module that holds the layers.
        names: attribute names inside it.
    """

    model_type: str
    prefix: int
    encoder: str = "encoder"
    names: LayerNames = LayerNames()


@dataclass(frozen=True)
class BertNames:
    """Attribute names inside an encoder and inside its post-norm layers, which may cross-attend to an image after their
    self-attention (BLIP). ``attention`` is the module with attention, norm and residual; ``inner`` is the module inside
    it that multiplies queries and keys."""

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


@dataclass(frozen=True)
class TextSide:
    """Where text cross tokens are written: into the first real token of every row's text, before every layer.

    Args:
        model: path to the module that is called with the text and its mask (a decoder, an encoder, a Q-Former).
        layers: path from there to the list of layers.
        config: path from the configuration to the part that holds ``hidden_size``.
        skip: number of real tokens before the text (query tokens, image features).
        keyword: prefix of the text's argument names in the model's call: "qformer_" for ``qformer_input_ids`` and
            ``qformer_attention_mask``. The text then follows ``skip`` tokens that are in neither of them.
    """

    model: str
    layers: str = "layers"
    config: str = "text_config"
    skip: int = 0
    keyword: str = ""


@dataclass(frozen=True)
class TextTower:
    """The text tower of a dual encoder, or a BERT that reads a text and an image.

    Args:
        path: path to the module whose ``forward`` takes ``input_ids``.
        config: path from the configuration to the text configuration; "" if it is the text configuration.
        end: (text configuration, (B, T) input ids) -> (B,) column of the token that the text's embedding is read from,
            by the model's own rule. This token guides the matching and is never removed.
        causal: whether attention is causal.
        first: whether the first token is protected too (CLIP's start mark).
        takes_mask: whether padding, as given by an attention mask, can be removed; False if the model always reads the
            last column (SigLIP).
        encoder: path from the module to the one that holds the layers.
        names: attribute names inside it; their class gives the kind of its layers.
        reads_image: whether its layers cross-attend to the image.
        reader: path to the text decoder, inside the module with its head, that cross-attends to the tower's states; ""
            if there is none.
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
        """Whether its cross token is one more token. The cross token of a BERT is written into its first token instead,
        as in models whose text is not reduced (``Family.text_side``)."""
        return isinstance(self.names, LayerNames)

    def geometry(self, config: Any) -> TextGeometry:
        """The geometry that a schedule needs, from the model's configuration."""
        text = config_at(config, self.config)
        return TextGeometry(text.num_hidden_layers, text.max_position_embeddings, 1 + self.first, self.appends)


def config_at(config: Any, path: str) -> Any:
    """Sub-configuration at a dotted path; "" is the configuration itself."""
    for name in filter(None, path.split(".")):
        config = getattr(config, name)
    return config


def patches_per_image(vision_config: Any) -> int:
    """Patch tokens of one image: (image_size // patch_size)²; image and patch size in pixels."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


def tower_kind(model_type: str, kinds: tuple[TowerKind, ...], owner: str) -> TowerKind:
    """The kind of a vision tower, among those that a family supports.

    Raises:
        ValueError: the tower is none of these; the message names them.
    """
    if not model_type and len(kinds) == 1:  # some towers have no name before transformers 5.23
        return kinds[0]
    found = next((kind for kind in kinds if kind.model_type == model_type), None)
    if found is None:
        reason = _TOWER_REASONS.get(model_type, "its layers are not known to mllm_crossget")
        raise ValueError(
            f"{owner} with a {model_type!r} vision tower is not supported: {reason}; supported towers: "
            f"{', '.join(kind.model_type for kind in kinds)}"
        )
    return found


_TOWER_REASONS = {
    "pixtral": "it packs all images into one sequence with a block mask and splits the features by the patch grid",
    "qwen2_vl": "it packs all images into one sequence and merges 2x2 blocks of the patch grid",
}
