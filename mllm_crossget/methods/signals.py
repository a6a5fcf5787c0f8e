"""What a layer, a tower's output or a projector tells a method. Tensors alone; B batch, T tokens, D width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AskedText:
    """What is asked about every image, for methods whose selection depends on it (``Method.needs_text``).

    Attributes:
        embeddings: (B, L, D) input embeddings of the language model, without gradient; D is that of the features.
        alive: (B, L) True for tokens of the text; the others are padding.
    """

    embeddings: Tensor
    alive: Tensor


@dataclass
class NextLayer:
    """What the layer behind the one that is read makes of that one's tokens, all of its heads taken as a single one.

    Attributes:
        attention: (B, T) float32 of the class token to every token; of the mean query where a tower has none.
        keys: (B, T, D) of every token, heads side by side.
    """

    attention: Tensor
    keys: Tensor


@dataclass
class Signals:
    """What a method sees where every image keeps the same number of tokens.

    Attributes:
        keys: (B, T, D) keys added up over heads (their cosines are those of the mean); of all heads side by side where
            the family's importance is a cosine; behind the projector, features of length 1.
        importance: (B, T) float32 attention received (``ops.attention_importance``), or the cosine of every key with
            one token's query (``ops.cosine_importance``); None if not asked for.
        protected: tokens that must neither leave nor receive (class token, cross token, end mark): indices, or a
            (B, T) bool mask where they lie elsewhere in every row.
        in_order: survivors must stay in their original order (texts under a causal mask).
        features: (B, T, D) the tokens themselves, without gradient; None if not asked for (``needs_features``).
        class_attention: (B, T) float32 attention that the class token pays, the mean over heads; None if not asked for
            (``needs_class_attention``).
        salience: (B, T) float32 the same in towers with a class token; in others the attention received, the mean over
            heads and queries. Behind a projector it is that of the layer that is read. None if not asked for
            (``needs_salience``).
        middle: (B, T) float32 attention received in the middle layer of those that run; None if not asked for
            (``needs_middle``).
        following: what the layer behind makes of the tokens; None if not asked for (``needs_next_layer``).
        text: what is asked about the image; None if not asked for (``needs_text``).
        depth: share of the tower's layers in front of this one.
    """

    keys: Tensor
    importance: Tensor | None
    protected: tuple[int, ...] | Tensor
    in_order: bool = False
    features: Tensor | None = None
    class_attention: Tensor | None = None
    salience: Tensor | None = None
    middle: Tensor | None = None
    following: NextLayer | None = None
    text: AskedText | None = None
    depth: float = 0.0


@dataclass
class RaggedSignals:
    """What one layer tells a method that chooses per image. T rows, N rows behind the class token, K alignment tokens.

    Attributes:
        size: (B, T) original tokens in each row; 0 for dead rows, which stand behind an image's tokens.
        shielded: (B, T) True for tokens that neither leave nor receive: class token, cross token, dead rows.
        prefix: tokens in front (the class token).
        keys: (B, T, D) keys added up over heads, where the method asks for them.
        importance: (B, T) float32 attention received, where the method asks for it.
        received: (B, N) ``ops.attention_received``, for methods that prune.
        class_received: (B, N) ``ops.class_attention``, for methods that prune a tower with a class token.
        alignment: (B, N, K) ``ops.alignment_scores`` of the layer's input, or None.
        alignment_width: of the alignment tokens.
    """

    size: Tensor
    shielded: Tensor
    prefix: int = 0
    keys: Tensor | None = None
    importance: Tensor | None = None
    received: Tensor | None = None
    class_received: Tensor | None = None
    alignment: Tensor | None = None
    alignment_width: int = 1


def shielded_tokens(signals: Signals) -> Tensor:
    """(B, T) True for the protected tokens."""
    batch, tokens = signals.keys.shape[:2]
    if isinstance(signals.protected, Tensor):
        return signals.protected
    mask = torch.zeros(tokens, dtype=torch.bool, device=signals.keys.device)
    for index in signals.protected:
        mask[index] = True
    return mask.repeat(batch, 1)


def protected_count(signals: Signals) -> int:
    """How many tokens of every row are protected; with a mask, of the first row, which stands for all."""
    if isinstance(signals.protected, Tensor):
        return int(signals.protected[0].sum())
    return len(set(signals.protected))
