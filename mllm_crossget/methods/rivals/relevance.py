"""Relevance of an image's features to the question, in the space of the language model's input embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mllm_crossget.methods.signals import AskedText
from mllm_crossget.ops.precision import without_autocast


@torch.no_grad()
def relevance(features_BND: Tensor, text: AskedText) -> Tensor:
    """(B, N) mean cosine of every feature with the tokens of its image's question, in float32."""
    words = normalize(text.embeddings.float(), dim=-1) * text.alive[..., None]
    mean = words.sum(dim=1) / text.alive.sum(dim=1, keepdim=True).clamp_min(1)
    with without_autocast(features_BND.device):
        return (normalize(features_BND.float(), dim=-1) @ mean[..., None])[..., 0]
