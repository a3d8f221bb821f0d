"""The endless stream of training examples: everything about example p follows from p alone.

Order, time, noise and dropped captions are drawn from the seed and the position, so that a resumed run goes on exactly,
and two processes see together what one with twice the batch would.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .store import LATENTS, Store

GOLDEN = 0.6180339887498949
NOISE, QUANTILE, DROPPED = "noise", "quantile", "dropped"


class Stream(Dataset):
    """Examples by position."""

    def __init__(self, store: Store, seed: int, caption_dropout: float) -> None:
        self.store, self.seed, self.caption_dropout = store, seed, caption_dropout
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """The stored sample, with `noise` like its latents, `quantile` of the time in [0, 1), and `dropped`."""
        epoch, place = divmod(position, len(self.store))
        if epoch != self._epoch:
            order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(len(self.store), generator=order), epoch
        example = self.store[int(self._order[place])]
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + 7) * 1_000_003 + position)
        # golden steps spread the times of every run of positions evenly, which lowers the variance of the loss
        quantile = (position * GOLDEN + self.seed * 0.381966) % 1.0
        dropped = torch.rand((), generator=draw) < self.caption_dropout
        noise = torch.randn(example[LATENTS].shape, generator=draw)
        return example | {NOISE: noise, QUANTILE: torch.tensor(quantile), DROPPED: dropped}


class Positions(Sampler[list[int]]):
    """Batches of one process, from batch `first` on, without end."""

    def __init__(self, first: int, batch: int, rank: int, world: int) -> None:
        self.first, self.batch, self.rank, self.world = first, batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first
        while True:
            start = (number * self.world + self.rank) * self.batch
            yield list(range(start, start + self.batch))
            number += 1


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacked; ValueError where samples differ in shape (prompts of different lengths in one batch)."""
    for key, value in examples[0].items():
        for other in examples:
            if other[key].shape != value.shape:
                raise ValueError(
                    f"Samples differ in {key}: {tuple(value.shape)} and {tuple(other[key].shape)}. Train with "
                    "train_batch_size 1 and more gradient_accumulation_steps."
                )
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def batches(stream: Stream, positions: Positions, workers: int, pin: bool) -> Iterator[dict[str, Tensor]]:
    """Batches in order, read ahead by `workers` processes."""
    loader = DataLoader(
        stream, batch_sampler=positions, collate_fn=collate, num_workers=workers, pin_memory=pin,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return iter(loader)
