"""One epoch's work for Python: the rows and batches that the core can't finish."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagenet_seq import native
from imagenet_seq.batch.memory import Memory
from imagenet_seq.decode.pipeline import Pipeline, images_of
from imagenet_seq.decode.random import reproducible
from imagenet_seq.errors import CollateError, SampleError
from imagenet_seq.index.source import Source
from imagenet_seq.native.recipe import Key, Recipe, Rows
from imagenet_seq.plan.epoch import EnginePlan


@dataclass
class Work:
    """One epoch of one rank, shared by the Python threads and the epoch's iterator.

    Attributes:
        plan: the epoch's plan.
        source: the dataset.
        pipeline: what is done to every sample.
        recipe: the core's part of it.
        memory: makes the memory of batches.
        target_transform: applied to every label, if any.
        collate_fn: makes a batch of a list of samples; None: torch's default.
        slots: memory of each slot of the engine.
        results: of each batch that Python finishes: results by row, then the batch made of them.
        num_missing: rows of each such batch that are not finished.
        failures: exception of each sample that failed in Python.
        lock: guards results and num_missing.
    """

    plan: EnginePlan
    source: Source
    pipeline: Pipeline
    recipe: Recipe
    memory: Memory
    target_transform: Callable[[int], Any] | None
    collate_fn: Callable[[list[Any]], Any] | None
    slots: list[Tensor] = field(default_factory=list)
    results: dict[int, list[Any]] = field(default_factory=dict)
    num_missing: dict[int, int] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def name_of(self, sample: int) -> str:
        """Return a sample's name, for messages."""
        return self.source.index.name[sample]

    def targets(self, begin: int, end: int) -> list[Any] | Tensor:
        """Return the targets of positions [begin, end): int64, or results of target_transform."""
        samples, column = self.plan.sample[begin:end], self.source.index.label
        labels = np.full(len(samples), -1) if column is None else column[samples]
        labels = labels.astype(np.int64)
        if self.target_transform is None:
            return torch.from_numpy(labels)
        return [self.target_transform(int(label)) for label in labels]

    # ---- python rows ----

    def fill_row(self, task: native.Task) -> None:
        """Do what the core left to do for a row."""
        key = self._key(task.draw)
        if self.pipeline.rows == Rows.FROM_BYTES:
            self._store(task, self.pipeline.from_bytes(task.encoded(), key))
            return
        slot = self.slots[task.slot]  # keeps the memory alive while this thread writes to it
        if not task.prefix_done:
            self.pipeline.decode_with_pillow(self.recipe, task.encoded(), key, task.row)
        if self.pipeline.rows == Rows.FINISHED_BY_PYTHON:
            row = images_of(slot, self.recipe)[task.row_index]
            self._store(task, self.pipeline.finish(row, key))

    def _key(self, draw: int) -> Key:
        return (self.plan.seed, self.plan.epoch, draw)

    def _store(self, task: native.Task, result: Any) -> None:
        """Keep the result of a row; the thread that finishes a batch's last row collates it."""
        batch, begin = task.batch, task.position - task.row_index
        with self.lock:
            end = int(self.plan.batch_begin[batch + 1])
            results = self.results.setdefault(batch, [None] * (end - begin))
            results[task.row_index] = result
            self.num_missing[batch] = self.num_missing.get(batch, end - begin) - 1
            is_last = self.num_missing[batch] == 0
        if is_last:
            self.results[batch] = [self.collate(results, self.targets(begin, end), batch)]

    # ---- batches ----

    def collate(
        self, images: Sequence[Any] | Tensor, targets: Sequence[Any] | Tensor, batch: int
    ) -> Any:
        """Make a batch of pairs (image, target); a target without target_transform is an int.

        Random draws in a collate_fn are keyed by the batch's place in the epoch.
        """
        labels = targets.tolist() if isinstance(targets, Tensor) else targets
        samples = list(zip(images, labels, strict=True))
        try:
            if self.collate_fn is None:
                return self._stacked(torch.utils.data.default_collate(samples))
            # A place that a resume does not change; negative, because samples are 0 and above.
            place = -1 - int(self.plan.samples_done[batch])
            with reproducible(self._key(place), one_at_a_time=True):
                return self.collate_fn(samples)
        except Exception as error:
            raise CollateError(
                f"batch {batch} can't be collated: {error}. A batch needs samples of one size: let "
                "the transform end in a crop or a Resize to (height, width), and in a tensor "
                "(ToTensor, PILToTensor)"
            ) from error

    def _stacked(self, batch: Any) -> Any:
        images = batch[0]
        if self.pipeline.channels_last and isinstance(images, Tensor) and images.ndim == 4:
            batch[0] = images.contiguous(memory_format=torch.channels_last)
        return batch

    # ---- failures ----

    def failed(self, task: native.Task, error: BaseException) -> str:
        """Keep an exception as the cause of what the iterator will raise; return its text."""
        if task.kind == native.TASK_ROW:
            self.failures[task.sample] = error
        else:
            for sample in self.plan.sample[self.plan.block == task.position]:
                self.failures[int(sample)] = error
        try:
            return f"{type(error).__name__}: {error}"
        except Exception:  # its __str__ raises
            return type(error).__name__

    def explained(self, error: SampleError) -> Exception:
        """Return the exception to raise: a CollateError, which is no sample's fault, or `error`."""
        cause = self.failures.get(error.sample)
        if isinstance(cause, CollateError):
            return cause
        error.__cause__ = cause
        return error
