"""The batch stage on Python's side: threads that do what the core can't, and an epoch's iterator.

The core fills the rows of batches (``core/engine.cpp``). It hands out *foreign rows* (an image
only Pillow decodes, a transform only Python knows) and *foreign blocks* (bytes only Python can
produce); the threads of a `Crew` do those. Order, back-pressure and cancellation stay the core's.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from imagenet_seq import _native
from imagenet_seq.errors import ForkError, SampleError
from imagenet_seq.transforms import Key, Layout, Pipeline, Recipe, Rows, reproducible

if TYPE_CHECKING:
    from imagenet_seq.plan import EnginePlan
    from imagenet_seq.sources import Source

_POLL_S = 0.1  # a wait for a batch is cut into pieces of this, so that Ctrl-C is seen
_IDLE_S = 3600.0  # a thread that waits for work is woken by the core, not by this


class Memory(Protocol):
    """Where batches come from: see `imagenet_seq.device`."""

    def allocate(self) -> Tensor:
        """Return a batch with arbitrary content."""


@dataclass
class Work:
    """One epoch of one rank: what the threads and the iterator share."""

    plan: EnginePlan
    source: Source
    pipeline: Pipeline
    recipe: Recipe
    memory: Memory
    target_transform: Callable[[int], Any] | None
    collate_fn: Callable[[list[Any]], Any] | None  # None: torch's default
    slots: list[Tensor] = field(default_factory=list)
    # Batches whose samples Python finishes: number -> results by row, then their collation.
    results: dict[int, list[Any]] = field(default_factory=dict)
    num_missing: dict[int, int] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def name_of(self, sample: int) -> str:
        """Return a sample's name, for messages."""
        return self.source.index.name[sample]

    def targets(self, begin: int, end: int) -> list[Any] | Tensor:
        """Return the targets of positions [begin, end): int64, or what target_transform makes."""
        samples, column = self.plan.sample[begin:end], self.source.index.label
        labels = np.full(len(samples), -1) if column is None else column[samples]
        labels = labels.astype(np.int64)
        if self.target_transform is None:
            return torch.from_numpy(labels)
        return [self.target_transform(int(label)) for label in labels]

    def key(self, sample: int) -> Key:
        """Return what decides a sample's random draws."""
        return (self.plan.seed, self.plan.epoch, sample)

    # ---- foreign rows ----

    def fill_row(self, task: _native.Task) -> None:
        """Do what is left to do for a row that the core handed out."""
        if self.pipeline.rows == Rows.FROM_BYTES:
            result = self.pipeline.from_bytes(task.encoded(), self.key(task.sample))
            self._store(task, result)
            return
        slot = self.slots[task.slot]  # holds the memory while this thread writes to it
        if not task.prefix_done:
            data, key = task.encoded(), self.key(task.sample)
            _decode_with_pillow(self.pipeline, self.recipe, data, key, task.row)
        if self.pipeline.rows == Rows.FINISHED_BY_PYTHON:
            row = images_of(slot, self.recipe)[task.row_index]
            self._store(task, self.pipeline.finish(row, self.key(task.sample)))

    def _store(self, task: _native.Task, result: Any) -> None:
        """Keep a sample that Python finished; the last one of a batch collates it here."""
        batch, begin = task.batch, task.position - task.row_index
        with self.lock:
            end = int(self.plan.batch_begin[batch + 1])
            results = self.results.setdefault(batch, [None] * (end - begin))
            results[task.row_index] = result
            self.num_missing[batch] = self.num_missing.get(batch, end - begin) - 1
            last = self.num_missing[batch] == 0
        if last:
            samples = list(zip(results, self.targets(begin, end), strict=True))
            self.results[batch] = [self.collate(samples, batch)]

    def collate(self, samples: list[Any], batch: int) -> Any:
        """Make a batch of samples; random draws in a collate_fn are keyed by the batch's place."""
        try:
            if self.collate_fn is None:
                return self._stacked(torch.utils.data.default_collate(samples))
            # Its place in the epoch, which a resume does not change; below 0, where no sample is.
            place = -1 - int(self.plan.samples_done[batch])
            with reproducible(self.key(place), one_at_a_time=True):
                return self.collate_fn(samples)
        except Exception as error:
            raise RuntimeError(f"batch {batch} can't be collated: {error}") from error

    def _stacked(self, batch: Any) -> Any:
        images = batch[0]
        if self.pipeline.channels_last and isinstance(images, Tensor) and images.ndim == 4:
            batch[0] = images.contiguous(memory_format=torch.channels_last)
        return batch


def images_of(memory: Tensor, recipe: Recipe) -> Tensor:
    """View a batch's memory as images of shape (N, 3, H, W), whatever its layout."""
    return memory.permute(0, 3, 1, 2) if recipe.layout == Layout.HWC else memory


def memory_shape(pipeline: Pipeline, recipe: Recipe) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of a row as it lies in memory; empty where Python makes it all."""
    if pipeline.out_shape is None:
        return (0,), torch.uint8
    channels, height, width = pipeline.out_shape
    hwc = recipe.layout == Layout.HWC
    shape = (height, width, channels) if hwc else (channels, height, width)
    dtype = torch.uint8 if recipe.table is None or pipeline.table is None else pipeline.table.dtype
    return shape, dtype


def one_sample(pipeline: Pipeline, data: bytes, key: Key) -> Any:
    """Return what the pipeline makes of one encoded image, as a row of a batch would be."""
    if pipeline.rows == Rows.FROM_BYTES:
        return pipeline.from_bytes(data, key)
    shape, dtype = memory_shape(pipeline, pipeline.recipe)
    memory = torch.empty((1, *shape), dtype=dtype)
    if not _native.decode(pipeline.recipe, key, data, memory.data_ptr()):
        _decode_with_pillow(pipeline, pipeline.recipe, data, key, memory.data_ptr())
    row = images_of(memory, pipeline.recipe)[0]
    return pipeline.finish(row, key) if pipeline.rows == Rows.FINISHED_BY_PYTHON else row


def _decode_with_pillow(
    pipeline: Pipeline, recipe: Recipe, data: bytes, key: Key, row: int
) -> None:
    """Fill the row at an address from an image that the core does not decode."""
    pixels = np.ascontiguousarray(pipeline.open_image(data))
    if not _native.apply(recipe, key, pixels, row):
        height, width, _ = pixels.shape
        raise ValueError(
            f"the transform turns this image of {width} x {height} pixels into another size than "
            f"{recipe.out_width} x {recipe.out_height}, so it can't be batched; add a "
            "RandomResizedCrop or a CenterCrop"
        )


class Crew:
    """An engine and the Python threads that serve it, for one epoch after the other.

    Close it when an epoch is abandoned: rows that threads still hold belong to that epoch.
    """

    def __init__(self, engine: _native.Engine, num_threads: int) -> None:
        self.engine = engine
        self._work: Work | None = None
        self._lock = threading.Lock()
        self._users = 1  # whoever closes; each thread adds one. The last one out frees the engine.
        self._closed = False
        self._threads: list[threading.Thread] = []
        _crews.add(self)
        for number in range(num_threads):
            thread = threading.Thread(
                target=self._serve, name=f"imagenet-seq-{number}", daemon=True
            )
            self._users += 1
            thread.start()
            self._threads.append(thread)

    def start(self, work: Work) -> None:
        """Begin an epoch; the former one must have been delivered whole."""
        work.slots = [work.memory.allocate() for _ in range(self.engine.num_slots)]
        self._work = work
        addresses = [slot.data_ptr() for slot in work.slots]
        self.engine.start(work.plan, addresses)

    def _serve(self) -> None:
        try:
            while task := self.engine.take(_IDLE_S):
                self._do(task)
        finally:
            self._leave()

    def _do(self, task: _native.Task) -> None:
        work, failure = self._work, None
        assert work is not None
        try:
            if task.kind == _native.TASK_BLOCK:
                data, offsets, lengths = work.source.read_block(task.sample)
                self.engine.finish_block(task.ticket, data, offsets, lengths)
                return
            work.fill_row(task)
        except BaseException as error:  # whatever a user's transform raises is the sample's failure
            failure = f"{type(error).__name__}: {error}"
            work.failures[task.sample if task.kind == _native.TASK_ROW else -1] = error
            if task.kind == _native.TASK_BLOCK:
                empty = np.empty(0, np.int64)
                self.engine.finish_block(task.ticket, b"", empty, empty, failure)
                return
        self.engine.finish_row(task.ticket, failure)

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.engine.destroy()

    def close(self, join_s: float = 0.0) -> None:
        """Cancel the epoch and end the threads; the last one to leave frees the engine. Idempotent.

        Does not wait for a user's transform that is still running, unless join_s says for how
        long. May be called from any thread, also from one of the crew's (a collection of garbage
        can run there); in a forked child it only forgets.
        """
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            try:
                self.engine.cancel()
                self.engine.close_tasks()
            except ForkError:
                self.engine.destroy()
                return
            self._leave()
        deadline = time.monotonic() + join_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


_EXIT_JOIN_S = 5.0
_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


@atexit.register
def _close_crews() -> None:
    """No thread may be inside torch or Pillow when the interpreter goes."""
    for crew in list(_crews):
        crew.close(_EXIT_JOIN_S)


class EpochIterator:
    """The batches of one epoch, in plan order.

    Yields pairs of the batch and a function to call when the script gets it, which keeps
    `state_dict` exact however far the device stage runs ahead. Used by one thread at a time.
    """

    def __init__(
        self,
        crew: Crew,
        work: Work,
        *,
        timeout_s: float,
        on_delivered: Callable[[int], None],
        on_end: Callable[[Crew | None], None],
    ) -> None:
        """Args:
        crew: starts with work here; given back through on_end(crew) after the last batch, closed
            and on_end(None) otherwise.
        work: the epoch.
        timeout_s: how long to wait for a batch, 0: for ever.
        on_delivered: called with the batch's number when the script gets it.
        on_end: called once.
        """
        self._crew: Crew | None = crew
        self._work = work
        self._timeout_s = timeout_s
        self._on_delivered = on_delivered
        self._on_end = on_end
        try:
            crew.start(work)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> EpochIterator:
        """Return itself."""
        return self

    def __next__(self) -> tuple[Any, Callable[[], None]]:
        """Return the next batch and its function."""
        if self._crew is None:
            raise StopIteration
        try:
            batch = self._wait(self._crew)
        except BaseException as error:
            self.close()
            if isinstance(error, SampleError):
                raise error from self._work.failures.get(error.sample, self._work.failures.get(-1))
            raise
        if batch is None:
            crew, self._crew = self._crew, None
            self._on_end(crew)
            raise StopIteration
        number = batch.batch
        return self._take(self._crew, batch), lambda: self._on_delivered(number)

    def _wait(self, crew: Crew) -> _native.Batch | None:
        deadline = time.monotonic() + self._timeout_s if self._timeout_s > 0 else None
        while (batch := crew.engine.next(_POLL_S, self._work.name_of)) is False:
            if deadline is not None and time.monotonic() > deadline:
                raise RuntimeError(
                    f"no batch came within timeout={self._timeout_s:g} s; loader.stats() says who "
                    "waits for whom"
                )
        return batch  # type: ignore[return-value]

    def _take(self, crew: Crew, batch: _native.Batch) -> Any:
        work = self._work
        memory = work.slots[batch.slot]
        work.slots[batch.slot] = work.memory.allocate()
        crew.engine.release(batch.slot, work.slots[batch.slot].data_ptr())
        if work.pipeline.rows != Rows.DECODED and batch.end > batch.begin:
            work.num_missing.pop(batch.batch, None)
            return work.results.pop(batch.batch)[0]
        images = images_of(memory, work.recipe)[: batch.end - batch.begin]
        targets = work.targets(batch.begin, batch.end)
        if work.collate_fn is not None:
            return work.collate(_samples(images, targets), batch.batch)
        if not isinstance(targets, Tensor):
            targets = torch.utils.data.default_collate(targets)
        return [images, targets]

    def stats(self) -> dict[str, int] | None:
        """Return the engine's counters, None after the end."""
        return None if self._crew is None else self._crew.engine.stats()

    def close(self) -> None:
        """Give everything back; no more batches come. Idempotent."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()
            self._on_end(None)

    def __del__(self) -> None:
        if getattr(self, "_crew", None) is not None:
            self.close()


def _samples(images: Tensor, targets: Sequence[Any] | Tensor) -> list[Any]:
    """Split a batch into what a collate_fn expects: pairs of an image and a plain int."""
    labels = targets.tolist() if isinstance(targets, Tensor) else targets
    return list(zip(images, labels, strict=True))
