"""A bounded store of encoded images, keyed by content. It does not depend on a model."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Encoded:
    """One encoded image.

    Attributes:
        features: (k, D) features for the language model.
        companions: (k, ·) further features of the same tokens, one entry per layer that adds some (deepstack).
        cells: for every part of the image, (k,) cells of the grid that were kept, where positions need them.
        groups: for every part of the image, (k,) token sizes and (k,) places of the placeholders that each feature
            stands for.
        form: structure of the output that the features are returned in; the same for every image of a model.
    """

    features: Tensor
    companions: tuple[Tensor, ...] = ()
    cells: tuple[Tensor, ...] = ()
    form: Any = None
    groups: tuple[Any, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its tensors."""
        return (self.features, *self.companions, *self.cells, *(part for group in self.groups for part in group))

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def copied(self) -> Encoded:
        """A copy with tensors of its own, detached from any graph and from larger tensors."""
        features, *companions = (tensor.detach().clone() for tensor in (self.features, *self.companions))
        cells = tuple(part.detach().clone() for part in self.cells)
        groups = tuple(type(group)(*(part.clone() for part in group)) for group in self.groups)
        return Encoded(features, tuple(companions), cells, self.form, groups)


class VisionCache:
    """Features of encoded images, of which the least recently used are dropped first. Threads may share it.

    Give one to ``accelerate_mllm(model, ..., reuse_vision=VisionCache(max_bytes=...))`` to choose its size. It stays on
    the device where the features were made.

    Args:
        max_bytes: bound of the memory for features. 336 px images of LLaVA-1.5-7B at ``keep_ratio=0.5`` in half
            precision take 2.25 MiB each, so the default holds 113 of them. An image that is larger than the bound is
            not kept.

    Attributes:
        hits, misses: images found and not found so far. The same image twice in one batch is encoded once and counts
            as one of each.

    Raises:
        ValueError: a bound below 0.
        TypeError: a bound that is no integer.
    """

    def __init__(self, max_bytes: int = 256 * MEBIBYTE) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be an integer, got {max_bytes!r}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}; 0 keeps nothing")
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._entries: OrderedDict[bytes, Encoded] = OrderedDict()
        self._used = 0
        self._made_by: Hashable = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return (
            f"VisionCache({len(self)} images, {self.used_bytes / MEBIBYTE:.1f} of {self.max_bytes / MEBIBYTE:.1f} MiB, "
            f"{self.hits} hits, {self.misses} misses)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionCache:
        """A copy of a model starts with an empty cache, because its weights may change independently."""
        return VisionCache(self.max_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """An unpickled model starts with an empty cache too."""
        return VisionCache, (self.max_bytes,)

    @property
    def used_bytes(self) -> int:
        """Memory of the features that are kept; never above ``max_bytes``."""
        return self._used

    def clear(self) -> None:
        """Forget every image. Call it after a change of weights that PyTorch does not count (``parameter.data``)."""
        with self._lock:
            self._entries.clear()
            self._used = 0

    def belongs_to(self, maker: Hashable) -> None:
        """Forget every image unless the images were encoded with ``maker``, which identifies the weights."""
        with self._lock:
            if maker != self._made_by:
                self.clear()
                self._made_by = maker

    def find(self, key: bytes) -> Encoded | None:
        """The image of a key, which becomes the most recently used one; None if it is not in the cache."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry

    def count_hit(self) -> None:
        """Count a hit for an image that is in the same batch twice."""
        with self._lock:
            self.hits += 1

    def keep(self, key: bytes, entry: Encoded) -> None:
        """Copy an image into the cache; the least recently used images are dropped to make room."""
        size = entry.size
        if size > self.max_bytes:
            return
        entry = entry.copied()
        with self._lock:
            old = self._entries.pop(key, None)
            self._used += size - (0 if old is None else old.size)
            self._entries[key] = entry
            while self._used > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._used -= oldest.size


def content_key(tensors: Iterable[Tensor], words: Any = None) -> bytes:
    """A key that differs for different contents: 256 bits of BLAKE2b over types, shapes and every byte.

    Args:
        tensors: of any type; read on the CPU.
        words: anything else that distinguishes contents; its ``repr`` enters the key.
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=32)
    for tensor in tensors:
        digest.update(f"|{tensor.dtype}{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
