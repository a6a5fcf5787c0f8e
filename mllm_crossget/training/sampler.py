"""Batches of rows of similar length and one modality, in an order that follows from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Orders a dataset so that a batch holds either images or text alone, and rows of similar length.

    As LLaVA's ``group_by_modality_length``. Every process gets the same order, and a resumed epoch the same as the
    interrupted one. The last, incomplete group of each modality is mixed; the collator copes with it.

    Args:
        lengths: length of every sample, in any unit.
        has_image: whether it has an image.
        batch_size: rows of one process and micro-batch.
        batches: micro-batches of an optimiser step over all processes.
        seed: of the order.
    """

    def __init__(
        self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, batches: int, seed: int = 0
    ) -> None:
        if len(lengths) != len(has_image):
            raise ValueError(f"{len(lengths)} lengths for {len(has_image)} samples")
        self.lengths, self.has_image = list(lengths), list(has_image)
        self.batch_size, self.batches, self.seed, self.epoch = batch_size, batches, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [index for index, value in enumerate(self.has_image) if value == modality]
            whole, left = self._grouped(members, generator)
            groups += whole
            rest += left
        order = torch.randperm(len(groups), generator=generator).tolist()
        yield from (index for group in order for index in groups[group])
        yield from rest

    def _grouped(self, members: list[int], generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
        """Random groups of one optimiser step's size, each sorted by length and dealt out to its micro-batches."""
        size = self.batch_size * self.batches
        shuffled = [members[index] for index in torch.randperm(len(members), generator=generator).tolist()]
        whole = len(shuffled) // size * size
        groups = [shuffled[start : start + size] for start in range(0, whole, size)]
        return [sorted(group, key=lambda index: -self.lengths[index]) for group in groups], shuffled[whole:]
