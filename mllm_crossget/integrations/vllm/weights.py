"""Names of a checkpoint's weights inside the served model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

_TOWER = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?")
_NOT_WEIGHTS = re.compile(r"^(?:vision|text|video)\.cross$|\.position_ids$")
"""Learned tokens of version 0.1, whose file vLLM takes for a part of the checkpoint; and a buffer of old towers."""
_UNREAD = re.compile(r"^vision_tower\.(?:vision_model\.)?(?:head|post_layernorm)\.")


def served_names(weights: Iterable[tuple[str, Tensor]], inside: str) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of the served model, without what is none.

    Args:
        weights: (name, tensor) of a checkpoint; transformers has written the tower's names with ``vision_model.`` and
            without it.
        inside: what stands between ``vision_tower.`` and the name in the model that serves, "vision_model." or "".
    """
    for name, tensor in weights:
        if not _NOT_WEIGHTS.search(name):
            yield _TOWER.sub(f"vision_tower.{inside}", name), tensor


def may_be_missing(name: str) -> bool:
    """Whether a parameter of the served model need not be in the checkpoint: no feature depends on it."""
    return _UNREAD.match(name) is not None or "cross_tokens." in name
