"""The iterator over an epoch's batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imagenet_seq import native
from imagenet_seq.batch.work import Work
from imagenet_seq.batch.workers import Workers
from imagenet_seq.decode.pipeline import images_of
from imagenet_seq.errors import ForkError, LoaderClosedError, SampleError
from imagenet_seq.machine import note_once
from imagenet_seq.native.recipe import Rows

_POLL_S = 0.1  # a wait for a batch is cut into pieces of this, so that Ctrl-C is seen
_STALL_S = 10.0  # the user is told about a disk that takes longer over one request


class EpochIterator:
    """The batches of one epoch, in plan order.

    Yields pairs of a batch and a function to call when the script gets the batch: so `state_dict`
    is exact however far the device stage runs ahead. One thread at a time may use it.
    """

    def __init__(
        self,
        workers: Workers,
        work: Work,
        *,
        timeout_s: float,
        on_delivered: Callable[[int], None],
        on_end: Callable[[Workers | None, dict[str, int]], None],
        on_taken: Callable[[Workers, int], None],
        prepared: bool,
    ) -> None:
        """Begin the epoch.

        Args:
            workers: do the work; they must be idle.
            work: the epoch.
            timeout_s: how long to wait for a batch; 0: for ever.
            on_delivered: called with a batch's number when the script gets it.
            on_end: called once with the counters; and with `workers` after the last batch, or with
                None after an error or `close`, when they are closed.
            on_taken: called with `workers` and a batch's number when it leaves the engine.
            prepared: whether `workers` have the plan already.
        """
        self._workers: Workers | None = workers
        self._work = work
        self._timeout_s = timeout_s
        self._on_delivered = on_delivered
        self._on_end = on_end
        self._on_taken = on_taken
        self._complete = False
        try:
            workers.start(work, prepared)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> EpochIterator:
        """Return itself."""
        return self

    def __next__(self) -> tuple[Any, Callable[[], None]]:
        """Return the next batch and its function."""
        workers = self._workers
        if workers is None:
            if self._complete:
                raise StopIteration
            raise LoaderClosedError("the loader was closed while it was iterated")
        try:
            batch = self._wait(workers)
            if batch is not None:
                number = batch.batch
                self._on_taken(workers, number)
                return self._take(workers, batch), lambda: self._on_delivered(number)
        except BaseException as error:
            self.close()
            if isinstance(error, SampleError):
                raise self._work.explained(error)  # noqa: B904 -- it sets the cause
            raise
        self._end(workers)
        raise StopIteration

    def _wait(self, workers: Workers) -> native.Batch | None:
        began, stalled = time.monotonic(), False
        while (batch := workers.engine.next(_POLL_S, self._work.name_of)) is False:
            waited_s = time.monotonic() - began
            if not stalled and waited_s > _STALL_S and (text := _stall(workers)):
                stalled = True
                note_once(text)
            if 0 < self._timeout_s < waited_s:
                raise RuntimeError(
                    f"no batch came within timeout={self._timeout_s:g} s; "
                    + (_stall(workers) or "loader.stats() says who waits for whom")
                )
        return batch

    def _take(self, workers: Workers, batch: native.Batch) -> Any:
        work = self._work
        memory = work.slots[batch.slot]
        work.slots[batch.slot] = work.memory.allocate()
        workers.engine.release(batch.slot, work.slots[batch.slot].data_ptr())
        if work.pipeline.rows != Rows.DECODED and batch.end > batch.begin:
            work.num_missing.pop(batch.batch, None)
            return work.results.pop(batch.batch)[0]
        images = images_of(memory, work.recipe)[: batch.end - batch.begin]
        targets = work.targets(batch.begin, batch.end)
        if work.collate_fn is not None:
            return work.collate(images, targets, batch.batch)
        if not isinstance(targets, Tensor):
            targets = torch.utils.data.default_collate(targets) if targets else torch.empty(0)
        return [images, targets]

    def stats(self) -> dict[str, int] | None:
        """Return the engine's counters; None after the end."""
        return None if self._workers is None else self._workers.engine.stats()

    def _end(self, workers: Workers) -> None:
        self._complete = True
        self._workers = None
        self._work.slots.clear()
        workers.rest()
        self._on_end(workers, workers.engine.stats())

    def close(self) -> None:
        """End the epoch and close its workers; no more batches come. Idempotent."""
        workers, self._workers = self._workers, None
        if workers is None:
            return
        try:
            stats = workers.engine.stats()
        except (ForkError, LoaderClosedError):
            stats = {}
        workers.close()
        self._work.slots.clear()  # a traceback may keep this object
        self._on_end(None, stats)

    def __del__(self) -> None:
        if getattr(self, "_workers", None) is not None:
            self.close()


def _stall(workers: Workers) -> str:
    """Name the request that the disk has not answered for long; "": there is none."""
    pending = workers.engine.pending()
    if pending is None or pending[0] < _STALL_S / 2:
        return ""
    seconds, path, offset = pending
    return (
        f"the disk has not answered for {seconds:.0f} s: {path}, offset {offset}. A disk that "
        "spins up or repairs a sector may take half a minute; see 'dmesg' if it lasts"
    )
