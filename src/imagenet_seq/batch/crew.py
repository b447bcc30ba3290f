"""The batch stage on Python's side: threads that do what the core can't, and an epoch's iterator.
The core fills the rows of batches (``core/engine.cpp``). It hands out *python rows* (an image
only Pillow decodes, a transform only Python knows) and *python blocks* (bytes only Python can
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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from imagenet_seq import native
from imagenet_seq.batch.memory import Memory
from imagenet_seq.decode.pipeline import Pipeline, decode_with_pillow, images_of
from imagenet_seq.decode.random import reproducible
from imagenet_seq.errors import CollateError, LoaderClosedError, SampleError
from imagenet_seq.native.recipe import Key, Recipe, Rows

if TYPE_CHECKING:
    from imagenet_seq.index.source import Source
    from imagenet_seq.plan.epoch import EnginePlan


_IDLE_S = 1.0  # an idle thread looks this often whether its crew has gone


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

    def failed(self, task: native.Task, error: BaseException) -> str:
        """Keep an exception as the cause of what the iteration will raise; return its text."""
        if task.kind == native.TASK_ROW:
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

    # ---- python rows ----

    def fill_row(self, task: native.Task) -> None:
        """Do what is left to do for a row that the core handed out."""
        if self.pipeline.rows == Rows.FROM_BYTES:
            result = self.pipeline.from_bytes(task.encoded(), self.key(task.draw))
            self._store(task, result)
            return
        slot = self.slots[task.slot]  # holds the memory while this thread writes to it
        if not task.prefix_done:
            data, key = task.encoded(), self.key(task.draw)
            decode_with_pillow(self.pipeline, self.recipe, data, key, task.row)
        if self.pipeline.rows == Rows.FINISHED_BY_PYTHON:
            row = images_of(slot, self.recipe)[task.row_index]
            self._store(task, self.pipeline.finish(row, self.key(task.draw)))

    def _store(self, task: native.Task, result: Any) -> None:
        """Keep a sample that Python finished; the last one of a batch collates it here."""
        batch, begin = task.batch, task.position - task.row_index
        with self.lock:
            end = int(self.plan.batch_begin[batch + 1])
            results = self.results.setdefault(batch, [None] * (end - begin))
            results[task.row_index] = result
            self.num_missing[batch] = self.num_missing.get(batch, end - begin) - 1
            last = self.num_missing[batch] == 0
        if last:
            samples = pairs_of(results, self.targets(begin, end))
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


class Crew:
    """An engine and the Python threads that serve it, for one epoch after the other.

    Close it when an epoch is abandoned: rows that threads still hold belong to that epoch. A crew
    that nothing refers to any more closes itself.
    """

    def __init__(self, engine: native.Engine, num_threads: int) -> None:
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
    ) -> native.Batch | Literal[False] | None:
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

    def __init__(self, engine: native.Engine, crew: weakref.ref[Crew]) -> None:
        self.work: Work | None = None
        self._engine: native.Engine | None = engine  # None: closed
        self._crew = crew
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        _all_shared.add(self)

    def engine(self) -> native.Engine:
        engine = self._engine
        if engine is None:
            raise LoaderClosedError("the loader was closed while it was iterated")
        return engine

    def add_thread(self, name: str) -> None:
        thread = threading.Thread(target=self._serve, args=(self.engine(),), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, engine: native.Engine) -> None:
        while (task := engine.take(_IDLE_S)) is not None:
            if task:
                self._do(engine, task)
            if self._crew() is None:
                self.close()

    def _do(self, engine: native.Engine, task: native.Task) -> None:
        work = self.work
        assert work is not None
        failure = None
        try:
            if task.kind == native.TASK_BLOCK:
                block = work.source.read_block(task.sample)
                engine.finish_block(task.ticket, *block)
                return
            work.fill_row(task)
        except BaseException as error:  # whatever a user's code raises is the sample's failure
            failure = work.failed(task, error)
        if task.kind == native.TASK_BLOCK:
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


def pairs_of(images: Sequence[Any] | Tensor, targets: Sequence[Any] | Tensor) -> list[Any]:
    """Split a batch into what a collate_fn expects: pairs of an image and a plain int."""
    labels = targets.tolist() if isinstance(targets, Tensor) else targets
    return list(zip(images, labels, strict=True))
