"""Which of an image's tokens each feature stands for: its token size and its place, for the language model.

An image has N tokens in the untouched model and k features in the reduced one. B images of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm_crossget.hooks.ground.state import LayerTrace
from mllm_crossget.ops.matching import Match

_GROUPS = "_mllm_crossget_groups"


class Groups(NamedTuple):
    """The features of one image.

    Attributes:
        size: (k,) float32 number of tokens of the untouched model that each feature stands for, at least 1.
        place: (k,) int64 lower median of these tokens' indices, 0 ... N - 1. A feature that stands for no token (a
            cross token, a newline) has size 1 and a place of its own.
    """

    size: Tensor
    place: Tensor


def groups_of_source(source_BN: Tensor, features: int) -> list[Groups]:
    """The groups of images whose token n was merged into the feature ``source[b, n]``; a negative source means none.

    A feature without tokens (the cross token, which is the last one) has size 1 and the last place.

    Args:
        source_BN: (B, N) int64.
        features: k.
    """
    batch, tokens = source_BN.shape
    gone = source_BN < 0
    row = source_BN.masked_fill(gone, features)  # one spare row for pruned tokens
    size = torch.zeros(batch, features + 1, dtype=torch.int64, device=row.device)
    size = size.scatter_add(1, row, torch.ones_like(row))[:, :features]
    members = row.argsort(dim=1, stable=True)  # tokens sorted by feature, ascending within each
    first = size.cumsum(1) - size
    place = members.gather(1, (first + (size - 1).clamp_min(0) // 2).clamp_max(tokens - 1))
    place = torch.where(size > 0, place, tokens - 1)
    return [Groups(*one) for one in zip(size.clamp_min(1).float(), place, strict=True)]


def source_of_trace(trace: Sequence[LayerTrace]) -> Tensor:
    """(B, N) row after the last layer of a trace that each token of the tower was merged into; -1 if it was pruned."""
    source = trace[-1].source
    matches = [layer.match for layer in trace if isinstance(layer.match, Match)]
    if not any(match.pruned for match in matches):
        return source
    own = torch.arange(source.shape[1], device=source.device).expand(len(source), -1)
    for match in matches:
        own = own.gather(1, match.kept)
    rows = torch.arange(own.shape[1], device=own.device).expand_as(own)
    return torch.full_like(source, -1).scatter(1, own, rows)


def joined_groups(parts: Sequence[Groups], lengths: Sequence[int]) -> Groups:
    """Groups of several parts of an image in sequence. ``lengths``: tokens of each part in the untouched model."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    size = torch.cat([part.size for part in parts])
    return Groups(size, torch.cat([part.place + start for part, start in zip(parts, starts, strict=True)]))


def groups_of(output: Any) -> list[Groups] | None:
    """The groups of every image in an output of ``get_image_features``; None if the output has none."""
    return getattr(output, _GROUPS, None)


def with_groups(output: Any, groups: list[Groups]) -> Any:
    """The output with the groups of its features. Tuples cannot hold them and are returned as they are."""
    if not isinstance(output, tuple):
        setattr(output, _GROUPS, groups)
    return output
