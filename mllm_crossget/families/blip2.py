"""BLIP-2: ViT, Q-Former with query tokens, language model (OPT or T5).

Tokens merge inside the ViT. The Q-Former cross-attends to the kept tokens, including class token and cross token. The
language model gets ``num_query_tokens`` (32) features as before, so prompts do not change. Text cross tokens are in the
language model (OPT's decoder, T5's encoder), in the first token after the 32 image features that the processor puts
before every prompt.

``Blip2ForImageTextRetrieval`` and ``Blip2VisionModelWithProjection`` have no language model and are separate families.
Their tower merges with vision cross tokens alone, without an alignment loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm_crossget.arithmetic.flop_formulas import attention_flops, linear_flops
from mllm_crossget.families.family import (
    BLIP2_TOWER,
    CrossPaths,
    Family,
    FamilyCosts,
    FamilyDocs,
    LanguageSide,
    PromptSide,
    TextSide,
    TowerKind,
    VisionSide,
    register_family,
)
from mllm_crossget.families.tower_geometry import read_at_the_end
from mllm_crossget.schedule import TowerGeometry


@dataclass(frozen=True)
class LanguageModel:
    """Paths of the layers in a transformers language model with its head.

    Args:
        prompt: path to the stack that reads the prompt, and path from there to its list of layers.
        others: paths to further lists of layers (T5's decoder).
    """

    prompt: tuple[str, str] = ("model", "layers")
    others: tuple[str, ...] = ()


LANGUAGE_MODELS = {
    "gemma": LanguageModel(),
    "llama": LanguageModel(),
    "mistral": LanguageModel(),
    "opt": LanguageModel(("model.decoder", "layers")),
    "qwen2": LanguageModel(),
    "qwen3": LanguageModel(),
    "t5": LanguageModel(("encoder", "block"), ("decoder.block",)),
}
Q_FORMER_INPUT = ("vision_model.post_layernorm", "qformer.encoder.layer.0.crossattention.attention.value")


def language_model(config: Any) -> LanguageModel:
    """Paths of the layers in a configuration's language model. Raises ``ValueError`` that names the known models."""
    kind = config.text_config.model_type
    if kind not in LANGUAGE_MODELS:
        raise ValueError(
            f"{type(config).__name__} with a {kind!r} language model is not supported: its layers are not known to "
            f"mllm_crossget; known: {', '.join(LANGUAGE_MODELS)}"
        )
    return LANGUAGE_MODELS[kind]


def vit_geometry(kind: TowerKind) -> Callable[[Any], TowerGeometry]:
    """Geometry of a BLIP tower, all of whose tokens are read after the last layer and its norm."""
    return read_at_the_end(kind, drops_prefix=False)


def text_side(config: Any) -> TextSide:
    """The stack of the language model that reads the prompt."""
    model, layers = language_model(config).prompt
    return TextSide(f"language_model.{model}", layers, skip=config.num_query_tokens)


def language_layers(config: Any) -> tuple[str, ...]:
    """All lists of layers of the language model."""
    kind = language_model(config)
    return tuple(f"language_model.{path}" for path in (".".join(kind.prompt), *kind.others))


def images_per_row(config: Any, kwargs: dict[str, Any]) -> Tensor:
    """(B,) number of images in each row, from its placeholders."""
    return (kwargs["input_ids"] == config.image_token_id).sum(dim=1) // config.num_query_tokens


def connector_flops(config: Any, features: int) -> int:
    """FLOPs of the Q-Former on its query tokens, and of the projection to the language model's width."""
    former, queries = config.qformer_config, config.num_query_tokens
    return q_former_flops(config, features) + linear_flops(queries, former.hidden_size, config.text_config.hidden_size)


def embedding_flops(config: Any, features: int) -> int:
    """FLOPs of the Q-Former on its query tokens, and of projecting all of them to the space shared with texts."""
    former, queries = config.qformer_config, config.num_query_tokens
    return q_former_flops(config, features) + linear_flops(queries, former.hidden_size, config.image_text_hidden_size)


def text_embedding_flops(config: Any, text_tokens: int) -> int:
    """FLOPs of the Q-Former on a text alone, and of projecting its first token to the space shared with images."""
    former = config.qformer_config
    layers = former.num_hidden_layers * self_attention_block_flops(former, text_tokens)
    return layers + linear_flops(1, former.hidden_size, config.image_text_hidden_size)


def q_former_flops(config: Any, features: int) -> int:
    """FLOPs of the Q-Former on its query tokens.

    Per layer: self-attention and an MLP on the queries; in every ``cross_attention_frequency``-th layer the queries
    also attend to the tower's ``features``.
    """
    former, queries = config.qformer_config, config.num_query_tokens
    width = former.hidden_size
    total = former.num_hidden_layers * self_attention_block_flops(former, queries)
    crossing = -(-former.num_hidden_layers // former.cross_attention_frequency)
    total += crossing * (
        2 * linear_flops(queries, width, width)
        + 2 * linear_flops(features, former.encoder_hidden_size, width)
        + attention_flops(queries, features, width)
    )
    return int(total)


def self_attention_block_flops(former: Any, tokens: int) -> int:
    """FLOPs of one layer of a BERT-like stack without its cross-attention: q, k, v, o, attention, two MLP matrices."""
    width = former.hidden_size
    return (
        4 * linear_flops(tokens, width, width)
        + attention_flops(tokens, tokens, width)
        + 2 * linear_flops(tokens, width, former.intermediate_size)
    )


BLIP2 = register_family(
    Family(
        model_type="blip-2",
        vision=VisionSide(
            tower="vision_model",
            config="vision_config",
            geometry=vit_geometry(BLIP2_TOWER),
            kinds=(BLIP2_TOWER,),
            projector="language_projection",
            dynamic=True,
            readers=("qformer",),
        ),
        prompt=PromptSide(images_per_row=images_per_row),
        language=LanguageSide(
            model="language_model",
            text_side=text_side,
            layers=language_layers,
        ),
        crossing=CrossPaths(vision=(*Q_FORMER_INPUT, "language_projection")),
        costs=FamilyCosts(
            llm_tokens=lambda config, features: int(config.num_query_tokens),
            connector=connector_flops,
        ),
        docs=FamilyDocs(
            note="inside the vision tower; the Q-Former attends to the merged tokens, the language model still gets 32",
            exact="rows of ragged batches alone or together; OPT and T5, greedy and beams; no reference vectors exist",
        ),
    )
)

BLIP2_PROJECTION = register_family(
    Family(
        model_type="blip-2",
        classes=("Blip2VisionModelWithProjection",),
        variant="projection",
        vision=VisionSide(
            tower="vision_model",
            config="vision_config",
            geometry=vit_geometry(BLIP2_TOWER),
            kinds=(BLIP2_TOWER,),
            dynamic=True,
            readers=("qformer",),
        ),
        costs=FamilyCosts(connector=embedding_flops),
        docs=FamilyDocs(
            note="inside the vision tower; the Q-Former attends to the merged tokens and gives 32 embeddings",
            exact="as BLIP-2, without an alignment loss",
        ),
    )
)

# Its matching head reads text and image together. transformers then makes an image mask that also has rows for the
# text, which the cross-attention of the Q-Former's queries does not accept. So all images keep the same number.
BLIP2_RETRIEVAL = register_family(
    dataclasses.replace(
        BLIP2_PROJECTION,
        classes=("Blip2ForImageTextRetrieval",),
        variant="retrieval",
        vision=dataclasses.replace(BLIP2_PROJECTION.vision, dynamic=False),
        costs=dataclasses.replace(BLIP2_PROJECTION.costs, connector_text=text_embedding_flops),
    )
)
