"""FLOPs of one forward pass, by formula, from a configuration and the schedule of a reduction. No weights, no model.

A multiply-add counts as 2. Counted are matrix products and convolutions, attention with its full T x T map (also where
it is causal), as ``torch.utils.flop_counter`` does. Left out: norms, softmax, activations, biases, embeddings, rotary
positions, the ranking and the merging of tokens, all of them linear in the tokens or without products.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from mllm_crossget.arithmetic.flop_formulas import (
    attention_flops,
    layer_flops,
    linear_flops,
    mlp_width,
    pooling_head_flops,
)
from mllm_crossget.arithmetic.language_flops import language_costs
from mllm_crossget.costs.cell_flops import cell_parts
from mllm_crossget.costs.matching_flops import matching_flops, merging_flops
from mllm_crossget.costs.stage_flops import StagedPrompt, staged_flops
from mllm_crossget.families.family import Family, TextTower, config_at, families, family_of
from mllm_crossget.families.modality import Tiles
from mllm_crossget.methods.capabilities import LayerShape
from mllm_crossget.methods.method import Method, Place
from mllm_crossget.schedule import (
    MergeGeometry,
    Schedule,
    TowerGeometry,
    acting_geometry,
    behind_grid,
    make_schedule,
    make_text_schedule,
    patches_left,
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one prompt and its images, by part.

    Attributes:
        patch_embedding: the convolution that makes patches into tokens.
        encoder: every layer of the vision tower that the model runs (also those behind the one that is read), and
            SigLIP's pooling head where the tower has one.
        reducer: what the reduction itself adds: similarities of the matching and importance of the tokens, in the tower
            or behind the projector; inside the language model, the rows of attention that a method reads.
        projector: vision features to the width of the language model, with a Q-Former where there is one; image and
            text to the shared space of a dual encoder.
        prefill: the layers of the language model on visual and text tokens. Of an encoder-decoder it is the encoder,
            and the decoder on its first token. Of a dual encoder it is the text tower on the text tokens, with its
            reduction. Of BLIP it is the text encoder, and the answer's decoder on its first token.
        lm_head: logits of the prompt's last token.
        decode: the steps for the second and later new tokens, with a KV cache, logits included.
    """

    patch_embedding: int
    encoder: int
    reducer: int
    projector: int
    prefill: int
    lm_head: int
    decode: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """The parts and their ``total``, by name."""
        return {**dataclasses.asdict(self), "total": self.total}


def model_flops(
    config: Any,
    method: Method,
    *,
    text_tokens: int = 60,
    new_tokens: int = 0,
    images: int = 1,
    one_softmax: bool = False,
    schedule: Schedule | None = None,
) -> Flops:
    """FLOPs of a model for one prompt, with one image by default, under a reduction; ``keep_ratio=1`` gives the
    untouched model.

    Args:
        config: a transformers configuration of a registered family, such as a ``LlavaConfig``.
        method: the reduction, such as ``CrossGetConfig(r=13)``.
        text_tokens: tokens of the prompt that are no image placeholders; of one text, for a dual encoder.
        new_tokens: tokens to generate. The first one comes from the prompt's logits, so 0 and 1 decode nothing.
        images: images in the prompt, 0 or more. Models that cut images into tiles: square ones, of as many tiles as
            ``Family.tiles`` says, none of whose rows of patches loses its newline.
        one_softmax: how the importance is computed. False: from a second QKᵀ beside a fused attention kernel (GPU, or
            with gradients). True: attention and importance share one map (CPU without gradients).
        schedule: token counts that were measured, instead of those that follow from the dial.

    Returns:
        The parts. For a vision tower on its own, those of the language side are 0.

    Raises:
        ValueError: a model type without a formula, a negative count, or a dial that the tower cannot meet.
    """
    _check_counts(text_tokens=text_tokens, new_tokens=new_tokens, images=images)
    family = _family(config)
    if family.tower is None:
        text = _text_tower(config, family.text_tower, method, text_tokens, 0)[0] if family.text_tower else 0
        return Flops(0, 0, 0, _projection(config, family), text, 0, 0)
    geometry = acting_geometry(method, family.geometry(config))
    schedule = make_schedule(method, geometry) if schedule is None else schedule
    runs = images * tiles_of(config, family).count
    visual = visual_tokens(config, family, schedule)
    prompt = StagedPrompt(visual, images, text_tokens, schedule.placeholders)
    (prefill, lm_head, decode), choosing = _prompt_flops(config, family, method, prompt, new_tokens)
    if isinstance(geometry, MergeGeometry):
        parts = _merged_parts(config, family, schedule, method)
    elif family.costs.layers is not None:
        parts = cell_parts(config, family, schedule, method, one_softmax)
    else:
        parts = _tower_parts(config, family, schedule, method, one_softmax, text_tokens)
        if geometry.cells is not None:
            parts = _grid_parts(config, family, schedule, method, parts, geometry)
    patch_embedding, encoder, reducer, projector = (runs * part for part in parts)
    return Flops(
        patch_embedding=patch_embedding,
        encoder=encoder,
        reducer=reducer + choosing,
        projector=projector,
        prefill=prefill,
        lm_head=lm_head,
        decode=decode,
    )


def tiles_of(config: Any, family: Family) -> Tiles:
    """How often the tower runs for one image."""
    return Tiles() if family.tiles is None else family.tiles(config)


def visual_tokens(config: Any, family: Family, schedule: Schedule) -> int:
    """Tokens of one image that the language model gets: of all tiles, with one cross token and the newlines."""
    tiles = tiles_of(config, family)
    kept_cross = int(schedule.cross and not schedule.drop_cross)
    features = tiles.count * (schedule.features - kept_cross) + kept_cross + tiles.newlines
    return features if family.llm_tokens is None else family.llm_tokens(config, features)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _family(config: Any) -> Family:
    family = family_of(config)
    if family is None:
        model_type = getattr(config, "model_type", None)
        supported = ", ".join(sorted({one.model_type for one in families().values()}))
        raise ValueError(f"model type {model_type!r} is not supported; supported: {supported}")
    return family


def _patch_embedding(vision: Any, family: Family) -> int:
    patches = (vision.image_size // vision.patch_size) ** 2
    channels = getattr(vision, "num_channels", 3)  # the BLIP towers' configurations do not say
    return linear_flops(patches, channels * vision.patch_size**2, vision.hidden_size)


def _encoder(vision: Any, schedule: Schedule, inside: bool = True) -> int:
    """Per layer: q, k, v, o and attention on the tokens that enter, two MLP matrices on those that are left, where
    tokens leave ``inside`` the layer and not behind it."""
    width, inner, total = vision.hidden_size, mlp_width(vision), 0
    for layer, (tokens, left) in enumerate(itertools.pairwise(schedule.tokens)):
        total += layer_flops(tokens, left if inside and layer != schedule.output else tokens, width, inner)
    return total + (pooling_head_flops(vision, schedule.tokens[-1]) if getattr(vision, "vision_use_head", False) else 0)


def _reducer(
    vision: Any,
    schedule: Schedule,
    method: Method,
    one_softmax: bool,
    cosine: bool,
    prefix: int,
    ends: int = 0,
    has_map: bool = False,
    view: int = 0,
) -> int:
    """FLOPs that the reduction adds to the layers: the method's own formula, if it has one.

    Otherwise it is, per reducing layer, the matching on the keys of a head and, if the method uses it, the importance.
    Importance is a product of the query weights with every head's map, and QKᵀ once more unless attention shares its
    map. Token sizes enter it as one more channel (a GPU adds them for nothing). Padding of maps to whole registers is
    not counted. Salience is the class token's attention or, in towers without one, such an importance. A middle layer's
    attention is one too, and the next layer runs its whole attention. If the importance is a cosine, the matching is on
    the keys of all heads, and the cosines with one query are not counted (a product per channel, no matrix product).
    The class token's attention is one query's QKᵀ.

    Args:
        has_map: whether the attention keeps its map, so that the mean over heads is enough.
        view: width of the features that a selection at the tower's output compares; 0: the keys.
    """
    heads, width = vision.num_attention_heads, vision.hidden_size
    total = 0
    for layer, (tokens, removed) in enumerate(zip(schedule.tokens, schedule.removals, strict=False)):
        own = method.layer_flops(LayerShape(tokens, removed, prefix, width, heads))
        if own is not None or not removed:
            total += own or 0
            continue
        at_output = layer == schedule.output
        metric = view if at_output and view else width if cosine else width // heads
        total += matching_flops(method, tokens, metric, removed, ends, at_output, features_width=width)
        received = 2 * tokens * tokens * (1 if has_map else heads)
        if not has_map:
            received += 2 * tokens * tokens * (heads + (0 if one_softmax else width))
        total += received * ((method.needs_importance and not cosine) or (method.needs_salience and not prefix))
        total += received * method.needs_middle
        total += 2 * tokens * width * (method.needs_class_attention or (method.needs_salience and prefix > 0))
        if method.needs_next_layer:
            total += 4 * linear_flops(tokens, width, width) + attention_flops(tokens, tokens, width)
    return total


def _tower_parts(
    config: Any, family: Family, schedule: Schedule, method: Method, one_softmax: bool, text_tokens: int
) -> tuple[int, int, int, int]:
    """Patch embedding, layers, reduction and connector of one image whose tokens are merged inside the tower."""
    vision = config_at(config, family.vision_config)
    cosine = schedule.cross and method.uses_cosine(family.cosine)
    prefix = getattr(family.geometry(config), "prefix", 0)
    view = config.get_text_config().hidden_size if family.vision.view else 0
    has_map = any(kind.names.fused for kind in family.vision.kinds if kind.model_type == vision.model_type)
    return (
        family.tower_flops(config)[0] if family.tower_flops else _patch_embedding(vision, family),
        _encoder(vision, schedule, inside=method.place is Place.TOWER_LAYERS),
        _reducer(vision, schedule, method, one_softmax, cosine, prefix, prefix + schedule.cross, has_map, view)
        if method.reduces_vision
        else 0,
        _connector(config, family, schedule, text_tokens),
    )


def _grid_parts(
    config: Any,
    family: Family,
    schedule: Schedule,
    method: Method,
    parts: tuple[int, int, int, int],
    geometry: TowerGeometry,
) -> tuple[int, int, int, int]:
    """Likewise where the projector makes its cells of the whole grid: all of them, and their merging."""
    dial = behind_grid(method, geometry, patches_left(schedule, geometry))
    behind = make_schedule(dial, MergeGeometry(geometry.placeholders, geometry.fixed))
    projector = family.connector_flops(config, schedule.placeholders) if family.connector_flops else 0
    merging = merging_flops(config.get_text_config().hidden_size, behind, method)
    return parts[0], parts[1], parts[2] + merging, projector


def _merged_parts(config: Any, family: Family, schedule: Schedule, method: Method) -> tuple[int, int, int, int]:
    """Likewise for one image whose tokens are merged behind the projector."""
    patch_embedding, encoder = family.tower_flops(config) if family.tower_flops else _untouched_tower(config, family)
    projector = family.connector_flops(config, schedule.placeholders) if family.connector_flops else 0
    merging = merging_flops(config.get_text_config().hidden_size, schedule, method) + _heard(config, family, method)
    return patch_embedding, encoder, merging, projector


def _heard(config: Any, family: Family, method: Method) -> int:
    """What a method behind the projector is told of the tower's attention: the class token's, or an importance."""
    geometry = family.geometry(config)
    if not method.needs_salience or not isinstance(geometry, TowerGeometry):
        return 0
    vision, tokens = config_at(config, family.vision_config), geometry.patches + geometry.prefix
    if geometry.prefix:
        return 2 * tokens * int(vision.hidden_size)
    return 2 * tokens * tokens * int(2 * vision.num_attention_heads + vision.hidden_size)


def _untouched_tower(config: Any, family: Family) -> tuple[int, int]:
    """Patch embedding and layers of a tower that is left alone; nothing where no geometry tells of one."""
    geometry = family.geometry(config)
    if isinstance(geometry, MergeGeometry):
        return 0, 0
    vision = config_at(config, family.vision_config)
    tokens = (geometry.patches + geometry.prefix,) * (geometry.layers + 1)
    whole = Schedule((0,) * geometry.layers, tokens, geometry.placeholders, geometry.placeholders, False, False)
    return _patch_embedding(vision, family), _encoder(vision, whole)


def _projection(config: Any, family: Family) -> int:
    return 0 if family.connector_flops is None else family.connector_flops(config, 1)


def _connector(config: Any, family: Family, schedule: Schedule, text_tokens: int) -> int:
    """What lies between tower and language model. A cross token that would not fit is cut off behind it. A selection at
    the tower's output compares and averages the features of all tokens, class token and cross token too."""
    if family.connector_flops is None:
        return 0
    text = 0 if family.connector_text_flops is None else family.connector_text_flops(config, text_tokens)
    if schedule.output is not None and family.vision.view:
        return text + family.connector_flops(config, schedule.tokens[schedule.output])
    return text + family.connector_flops(config, schedule.features + schedule.drop_cross)


def text_tower_flops(config: Any, method: Method, tokens: int, visual: int = 0) -> int:
    """A text tower on one text of ``tokens`` tokens, with what its reduction adds.

    ``visual`` tokens are read by text encoders that cross-attend to an image.

    Raises:
        ValueError: the model has no text tower, or the text is longer than its context.
    """
    family = _family(config)
    if family.text_tower is None:
        raise ValueError(f"model type {config.model_type!r} has no text tower of its own")
    return _text_tower(config, family.text_tower, method, tokens, visual)[0]


def _text_tower(config: Any, tower: TextTower, method: Method, tokens: int, visual: int) -> tuple[int, int]:
    """FLOPs, and tokens behind the last layer."""
    geometry = tower.geometry(config)
    if not 1 <= tokens <= geometry.context:
        raise ValueError(f"text_tokens={tokens}: the text tower takes 1 to {geometry.context} tokens")
    text = config_at(config, tower.config)
    schedule = make_text_schedule(method, geometry, tokens)
    total = _encoder(text, schedule)
    if method.reduces_text:
        total += _reducer(text, schedule, method, False, method.needs_importance, prefix=1)
    if tower.reads_image:
        width = text.hidden_size
        for left in schedule.tokens[1:]:
            total += 2 * linear_flops(left, width, width) + 2 * linear_flops(visual, text.encoder_hidden_size, width)
            total += attention_flops(left, visual, width)
    return total, schedule.tokens[-1]


def _prompt_flops(
    config: Any, family: Family, method: Method, prompt: StagedPrompt, new_tokens: int
) -> tuple[tuple[int, int, int], int]:
    """Prefill, logits of the last token and decoding; and what choosing tokens inside the language model adds."""
    if method.in_language_model is not None and method.reduces_vision and prompt.images:
        return staged_flops(config, method.in_language_model, prompt, new_tokens)
    visual = prompt.images * prompt.visual
    return _language_flops(config, family, method, visual, prompt.text, new_tokens), 0


def _language_flops(
    config: Any, family: Family, method: Method, visual: int, text_tokens: int, new_tokens: int
) -> tuple[int, int, int]:
    """Prefill, logits of the last token, and decoding."""
    tower = family.text_tower
    if tower is not None:
        text, left = _text_tower(config, tower, method, text_tokens, visual)
        if family.language_flops is None:
            return text, 0, 0
        prefill, lm_head, decode = family.language_flops(config, left, 1, new_tokens)  # a decoder that reads the text
        return text + prefill, lm_head, decode
    if family.language_flops is not None:
        return family.language_flops(config, visual, text_tokens, new_tokens)
    if family.language_model is None:
        return 0, 0, 0
    costs = language_costs(getattr(config, "text_config", config), visual + text_tokens, new_tokens)
    return costs.prefill, costs.lm_head, costs.decode
