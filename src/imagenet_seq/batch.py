"""The batch stage on Python's side: threads that do what the core can't, and an epoch's iterator.

The core fills the rows of batches (``core/engine.cpp``). It hands out *foreign rows* (an image
only Pillow decodes, a transform only Python knows) and *foreign blocks* (bytes only Python can
produce); the threads of a `Crew` do those. Order, back-pressure and cancellation stay the core's.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from imagenet_seq import _native
from imagenet_seq.errors import CollateError, ForkError, LoaderClosedError, SampleError
from imagenet_seq.transforms import Key, Layout, Pipeline, Recipe, Rows, reproducible

if TYPE_CHECKING:
    from imagenet_seq.plan import EnginePlan
    from imagenet_seq.sources import Source

_POLL_S = 0.1  # a wait for a batch is cut into pieces of this, so that Ctrl-C is seen
_STALL_S = 10.0  # a disk that takes longer over one request is worth a word
_IDLE_S = 1.0  # an idle thread looks this often whether its crew has gone


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

    def failed(self, task: _native.Task, error: BaseException) -> str:
        """Keep an exception as the cause of what the iteration will raise; return its text."""
        if task.kind == _native.TASK_ROW:
            self.failures[task.sample] = error
        else:
            for sample in self.plan.sample[self.plan.block == task.position]:
                self.failures[int(sample)] = error
        try:
            return f"{type(error).__name__}: {error}"
        except Exception:  # an exception whose text can't be had
            return type(error).__name__

    def explained(self, error: SampleError) -> Exception:
        """Return what to raise: that a batch can't be collated is no sample's fault."""
        cause = self.failures.get(error.sample)
        if isinstance(cause, CollateError):
            return cause
        error.__cause__ = cause
        return error

    def targets(self, begin: int, end: int) -> list[Any] | Tensor:
        """Return the targets of positions [begin, end): int64, or what target_transform makes."""
        samples, column = self.plan.sample[begin:end], self.source.index.label
        labels = np.full(len(samples), -1) if column is None else column[samples]
        labels = labels.astype(np.int64)
        if self.target_transform is None:
            return torch.from_numpy(labels)
        return [self.target_transform(int(label)) for label in labels]

    def key(self, draw: int) -> Key:
        """Return what decides random draws; draw: what stands for the sample."""
        return (self.plan.seed, self.plan.epoch, draw)

    # ---- foreign rows ----

    def fill_row(self, task: _native.Task) -> None:
        """Do what is left to do for a row that the core handed out."""
        if self.pipeline.rows == Rows.FROM_BYTES:
            result = self.pipeline.from_bytes(task.encoded(), self.key(task.draw))
            self._store(task, result)
            return
        slot = self.slots[task.slot]  # holds the memory while this thread writes to it
        if not task.prefix_done:
            data, key = task.encoded(), self.key(task.draw)
            _decode_with_pillow(self.pipeline, self.recipe, data, key, task.row)
        if self.pipeline.rows == Rows.FINISHED_BY_PYTHON:
            row = images_of(slot, self.recipe)[task.row_index]
            self._store(task, self.pipeline.finish(row, self.key(task.draw)))

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
            samples = _samples(results, self.targets(begin, end))
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

    Close it when an epoch is abandoned: rows that threads still hold belong to that epoch. A crew
    that nothing refers to any more closes itself.
    """

    def __init__(self, engine: _native.Engine, num_threads: int) -> None:
        self._shared = _Shared(engine, weakref.ref(self))
        weakref.finalize(self, self._shared.close).atexit = False
        self.num_slots = engine.num_slots
        for number in range(num_threads):
            self._shared.add_thread(f"imagenet-seq-{number}")

    def prepare(self, plan: EnginePlan, slot_rows: int) -> None:
        """As `_native.Engine.prepare`."""
        self._shared.engine().prepare(plan, slot_rows)

    def start(self, work: Work, prepared: bool = False) -> None:
        """Begin an epoch; the former one must have been delivered whole.

        prepared: its plan is the one that was given to `prepare`.
        """
        work.slots = [work.memory.allocate() for _ in range(self.num_slots)]
        addresses = [slot.data_ptr() for slot in work.slots]
        engine = self._shared.engine()
        self._shared.work = work
        engine.start(None if prepared else work.plan, addresses, len(work.slots[0]))

    def next(
        self, timeout_s: float, name_of: Callable[[int], str]
    ) -> _native.Batch | Literal[False] | None:
        """As `_native.Engine.next`."""
        return self._shared.engine().next(timeout_s, name_of)

    def release(self, slot: int, address: int) -> None:
        """As `_native.Engine.release`."""
        self._shared.engine().release(slot, address)

    def stats(self) -> dict[str, int]:
        """As `_native.Engine.stats`."""
        return self._shared.engine().stats()

    def pending(self) -> tuple[float, str, int] | None:
        """As `_native.Engine.pending`."""
        return self._shared.engine().pending()

    def rest(self) -> None:
        """Forget the epoch that was delivered whole; its memory is not kept until the next one."""
        self._shared.work = None

    def close(self) -> None:
        """End the epoch and the threads; does not wait for a transform that still runs. Idempotent.

        May be called from any thread, also from one of the crew's (a collection of garbage can run
        there). In a forked child it does nothing.
        """
        self._shared.close()


class _Shared:
    """What a crew and its threads have in common. Threads refer to this and never to the crew.

    Ctrl-C may raise between any two steps of the main thread, also in a finaliser, which then does
    not run. So the engine is closed by one call of the core, its memory belongs to who refers to
    it, and where the main thread drops a crew without closing it, the crew's threads close it.
    """

    def __init__(self, engine: _native.Engine, crew: weakref.ref[Crew]) -> None:
        self.work: Work | None = None
        self._engine: _native.Engine | None = engine  # None: closed
        self._crew = crew
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        _all_shared.add(self)

    def engine(self) -> _native.Engine:
        engine = self._engine
        if engine is None:
            raise LoaderClosedError("the loader was closed while it was iterated")
        return engine

    def add_thread(self, name: str) -> None:
        thread = threading.Thread(target=self._serve, args=(self.engine(),), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, engine: _native.Engine) -> None:
        while (task := engine.take(_IDLE_S)) is not None:
            if task:
                self._do(engine, task)
            if self._crew() is None:
                self.close()

    def _do(self, engine: _native.Engine, task: _native.Task) -> None:
        work = self.work
        assert work is not None
        failure = None
        try:
            if task.kind == _native.TASK_BLOCK:
                block = work.source.read_block(task.sample)
                engine.finish_block(task.ticket, *block)
                return
            work.fill_row(task)
        except BaseException as error:  # whatever a user's code raises is the sample's failure
            failure = work.failed(task, error)
        if task.kind == _native.TASK_BLOCK:
            nothing = np.empty(0, np.int64)
            engine.finish_block(task.ticket, b"", nothing, nothing, failure)
        else:
            engine.finish_row(task.ticket, failure)

    def close(self) -> None:
        engine = self._engine
        if engine is None or os.getpid() != self._pid:
            return
        engine.close()
        self._engine = None  # last: a close that Ctrl-C forestalled is done again

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


_EXIT_JOIN_S = 5.0
_all_shared: weakref.WeakSet[_Shared] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """No thread may be inside torch or Pillow when the interpreter goes."""
    everything = list(_all_shared)
    for shared in everything:
        shared.close()
    deadline = time.monotonic() + _EXIT_JOIN_S
    for shared in everything:
        shared.join(deadline)


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
        on_end: Callable[[Crew | None, dict[str, int]], None],
        on_taken: Callable[[Crew, int], None],
        on_stall: Callable[[str], None],
        prepared: bool,
    ) -> None:
        """Args:
        crew: starts with work here.
        work: the epoch.
        timeout_s: how long to wait for a batch, 0: for ever.
        on_delivered: called with the batch's number when the script gets it.
        on_taken: called with crew and number when the batch leaves the engine.
        on_stall: called with what to tell the user when the disk does not answer.
        prepared: the crew has the plan already.
        on_end: called once with the counters, and with the crew after the last batch, or None where
            the epoch is given up and the crew closed.
        """
        self._crew: Crew | None = crew
        self._work = work
        self._timeout_s = timeout_s
        self._on_delivered = on_delivered
        self._on_end = on_end
        self._on_taken = on_taken
        self._on_stall = on_stall
        self._complete = False
        try:
            crew.start(work, prepared)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> EpochIterator:
        """Return itself."""
        return self

    def __next__(self) -> tuple[Any, Callable[[], None]]:
        """Return the next batch and its function."""
        crew = self._crew
        if crew is None:
            if self._complete:
                raise StopIteration
            raise LoaderClosedError("the loader was closed while it was iterated")
        try:
            batch = self._wait(crew)
            if batch is not None:
                number = batch.batch
                self._on_taken(crew, number)
                return self._take(crew, batch), lambda: self._on_delivered(number)
        except BaseException as error:
            self.close()
            if isinstance(error, SampleError):
                raise self._work.explained(error)  # noqa: B904 -- it sets the cause
            raise
        self._end(crew)
        raise StopIteration

    def _wait(self, crew: Crew) -> _native.Batch | None:
        began, stalled = time.monotonic(), False
        while (batch := crew.next(_POLL_S, self._work.name_of)) is False:
            waited_s = time.monotonic() - began
            if not stalled and waited_s > _STALL_S and (text := _stall(crew)):
                stalled = True
                self._on_stall(text)
            if 0 < self._timeout_s < waited_s:
                raise RuntimeError(
                    f"no batch came within timeout={self._timeout_s:g} s; "
                    + (_stall(crew) or "loader.stats() says who waits for whom")
                )
        return batch

    def _take(self, crew: Crew, batch: _native.Batch) -> Any:
        work = self._work
        memory = work.slots[batch.slot]
        work.slots[batch.slot] = work.memory.allocate()
        crew.release(batch.slot, work.slots[batch.slot].data_ptr())
        if work.pipeline.rows != Rows.DECODED and batch.end > batch.begin:
            work.num_missing.pop(batch.batch, None)
            return work.results.pop(batch.batch)[0]
        images = images_of(memory, work.recipe)[: batch.end - batch.begin]
        targets = work.targets(batch.begin, batch.end)
        if work.collate_fn is not None:
            return work.collate(_samples(images, targets), batch.batch)
        if not isinstance(targets, Tensor):
            targets = torch.utils.data.default_collate(targets) if targets else torch.empty(0)
        return [images, targets]

    def stats(self) -> dict[str, int] | None:
        """Return the engine's counters, None after the end."""
        return None if self._crew is None else self._crew.stats()

    def _end(self, crew: Crew) -> None:
        self._complete = True
        self._crew = None
        self._work.slots.clear()
        crew.rest()
        self._on_end(crew, crew.stats())

    def close(self) -> None:
        """Give everything back; no more batches come. Idempotent."""
        crew, self._crew = self._crew, None
        if crew is None:
            return
        try:
            stats = crew.stats()
        except (ForkError, LoaderClosedError):
            stats = {}
        crew.close()
        self._on_end(None, stats)

    def __del__(self) -> None:
        if getattr(self, "_crew", None) is not None:
            self.close()


def _stall(crew: Crew) -> str:
    """Say which request the disk has not answered for long; empty: there is none."""
    pending = crew.pending()
    if pending is None or pending[0] < _STALL_S / 2:
        return ""
    seconds, path, offset = pending
    return (
        f"the disk has not answered for {seconds:.0f} s: {path}, offset {offset}. A disk that "
        "wakes up or repairs a sector may take half a minute; see 'dmesg' if it lasts"
    )


def _samples(images: Sequence[Any] | Tensor, targets: Sequence[Any] | Tensor) -> list[Any]:
    """Split a batch into what a collate_fn expects: pairs of an image and a plain int."""
    labels = targets.tolist() if isinstance(targets, Tensor) else targets
    return list(zip(images, labels, strict=True))
