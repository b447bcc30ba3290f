"""The order of a Loader's epochs on one rank: their length and plans."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagenet_seq.index.columns import Index
from imagenet_seq.plan.arrays import Int64Array
from imagenet_seq.plan.epoch import EnginePlan, explicit_plan, rank_plan
from imagenet_seq.plan.order import Order, batch_begins, epoch_size


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order of a Loader's epochs, for one rank."""

    index: Index
    python_blocks: bool  # `Source.python_blocks`
    order: Order
    batch_size: int  # of this rank
    rank: int
    world_size: int
    drop_last: bool = False  # leave out a smaller last batch
    sampler: Any = None  # whose order is executed; None: the order is `order`
    batch_sampler: Any = None  # the same, with batches of any size

    @property
    def is_explicit(self) -> bool:
        """Whether the order is a sampler's, and so there is no state to resume from."""
        return self.sampler is not None or self.batch_sampler is not None

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch, over all ranks."""
        return epoch_size(self.index.num_samples, self.order)

    @property
    def rank_samples(self) -> int:
        """Samples of an epoch on this rank."""
        size = self.epoch_samples
        return size // self.world_size + (self.rank < size % self.world_size)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch on this rank."""
        if self.batch_sampler is not None:
            return len(self.batch_sampler)
        if self.sampler is not None:
            full, rest = divmod(len(self.sampler), self.batch_size)
            return full + (rest > 0 and not self.drop_last)
        begins = batch_begins(self.epoch_samples, self.batch_size, self.world_size, self.drop_last)
        return len(begins) - 1

    def plan(self, epoch: int, samples_done: int = 0) -> EnginePlan:
        """Plan the rest of an epoch; iterates the sampler, if there is one."""
        if not self.is_explicit:
            return rank_plan(
                self.index,
                self.order,
                epoch,
                batch_size=self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
                drop_last=self.drop_last,
                samples_done=samples_done,
                python_blocks=self.python_blocks,
            )
        return explicit_plan(
            self.index,
            *self._given_samples(),
            seed=self.order.seed,
            epoch=epoch,
            rank=self.rank,
            block_bytes=self.order.block_bytes,
            python_blocks=self.python_blocks,
        )

    def _given_samples(self) -> tuple[Int64Array, Int64Array]:
        """Return the samples that the sampler gives, and where their batches begin and end."""
        if self.batch_sampler is not None:
            batches = [list(indices) for indices in self.batch_sampler]
            samples = np.fromiter(itertools.chain.from_iterable(batches), np.int64)
            return samples, np.cumsum([0, *map(len, batches)])
        samples = np.fromiter(self.sampler, np.int64)
        if self.drop_last:
            begins = np.arange(0, len(samples) + 1, self.batch_size)
            return samples[: begins[-1]], begins
        return samples, np.append(np.arange(0, len(samples), self.batch_size), len(samples))
