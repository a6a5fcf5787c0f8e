"""The input of a method, from a layer, a tower's output or a projector. Only tensors; B batch, T tokens, D width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AskedText:
    """The question about each image, for methods whose selection depends on it (``Method.needs_text``).

    Attributes:
        embeddings: (B, L, D) input embeddings of the language model, without gradient; D is the width of the features.
        alive: (B, L) True for tokens of the text; the others are padding.
    """

    embeddings: Tensor
    alive: Tensor


@dataclass
class NextLayer:
    """Projections by the layer after the one that is read, of that one's output, with all heads as a single one.

    Attributes:
        attention: (B, T) float32 attention of the class token to every token; in a tower without one, of the mean
            query.
        keys: (B, T, D) keys of every token, with concatenated heads.
    """

    attention: Tensor
    keys: Tensor


@dataclass
class Signals:
    """Input of a method if every image keeps the same number of tokens.

    Attributes:
        keys: (B, T, D) keys, summed over heads (with the same cosines as their mean). With concatenated heads if the
            family's importance is a cosine. Behind the projector, features scaled to length 1.
        importance: (B, T) float32 attention received (``ops.attention_importance``), or the cosine of every key with
            one token's query (``ops.cosine_importance``); None if not asked for.
        protected: tokens that must neither be removed nor take in others (class token, cross token, end mark): indices,
            or a (B, T) bool mask if they differ per row.
        in_order: kept tokens must stay in their original order (texts under a causal mask).
        features: (B, T, D) the tokens themselves, without gradient; None if not asked for (``needs_features``).
        class_attention: (B, T) float32 attention of the class token to every token, mean over heads; None if not asked
            for (``needs_class_attention``).
        salience: (B, T) float32 class attention in towers with a class token, else the attention received, mean over
            heads and queries. Behind a projector it is that of the layer that is read. None if not asked for
            (``needs_salience``).
        middle: (B, T) float32 attention received in the middle one of the layers that run; None if not asked for
            (``needs_middle``).
        following: projections of the next layer; None if not asked for (``needs_next_layer``).
        text: the question about the image; None if not asked for (``needs_text``).
        depth: share of the tower's layers that come before this one.
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
    """Input of a method that chooses per image, from one layer. T rows, N rows after the prefix, K alignment tokens.

    Attributes:
        size: (B, T) number of original tokens in each row; 0 for dead rows, which come after an image's tokens.
        shielded: (B, T) True for tokens that are neither removed nor take in others: class token, cross token, dead
            rows.
        prefix: number of tokens before the patches (the class token).
        keys: (B, T, D) keys summed over heads, if the method asks for them.
        importance: (B, T) float32 attention received, if the method asks for it.
        received: (B, N) ``ops.attention_received``, for methods that prune.
        class_received: (B, N) ``ops.class_attention``, for methods that prune a tower with a class token.
        alignment: (B, N, K) ``ops.alignment_scores`` of the layer's input, or None.
        alignment_width: channels of the alignment tokens.
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


@dataclass
class PromptSignals:
    """Input of a method that acts in the language model: one prompt at one stage. N visual tokens, M tokens of the
    question, D width; float32, without gradient. What a method does not need is None (``capabilities.PromptNeeds``).

    Attributes:
        count: N, the tokens of all images of the prompt that are left, in order.
        needed: (N,) True for tokens that must stay, because their output is read.
        attention: (N,) attention of the asking tokens to every visual token, mean over heads and asking tokens.
        states: (N, D) hidden states of the visual tokens.
        normed, normed_text: (N, D) and (M, D) hidden states behind the last norm.
        key_lengths, text_key_lengths: (N,) and (M,) sums of the absolute values of each token's keys, all heads.
    """

    count: int
    needed: Tensor
    attention: Tensor | None = None
    states: Tensor | None = None
    normed: Tensor | None = None
    normed_text: Tensor | None = None
    key_lengths: Tensor | None = None
    text_key_lengths: Tensor | None = None


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
    """Number of protected tokens per row; with a mask, that of the first row, which must hold for all."""
    if isinstance(signals.protected, Tensor):
        return int(signals.protected[0].sum())
    return len(set(signals.protected))
