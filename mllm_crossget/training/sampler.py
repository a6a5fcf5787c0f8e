"""Batches of rows of similar length and one modality, in an order that depends only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Orders a dataset so that a batch has rows of similar length, either all with images or all without.

    It works as LLaVA's ``group_by_modality_length``. Every process gets the same order, and a resumed epoch has the
    same order as the interrupted one. The last, incomplete groups of both modalities are mixed, which the collator
    handles.

    Args:
        lengths: length of every sample, in any unit.
        has_image: whether each sample has an image.
        batch_size: number of rows of one process and micro-batch.
        batches: number of micro-batches of an optimiser step over all processes.
        seed: seed of the order.
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
        """Set the epoch, which changes the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [index for index, value in enumerate(self.has_image) if value == modality]
            whole, incomplete = self._grouped(members, generator)
            groups += whole
            rest += incomplete
        order = torch.randperm(len(groups), generator=generator).tolist()
        yield from (index for group in order for index in groups[group])
        yield from rest

    def _grouped(self, members: list[int], generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
        """Random groups of one optimiser step's size, each sorted by length and distributed over its micro-batches."""
        size = self.batch_size * self.batches
        shuffled = [members[index] for index in torch.randperm(len(members), generator=generator).tolist()]
        whole = len(shuffled) // size * size
        groups = [shuffled[start : start + size] for start in range(0, whole, size)]
        return [sorted(group, key=lambda index: -self.lengths[index]) for group in groups], shuffled[whole:]
