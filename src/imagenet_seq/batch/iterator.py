"""The iterator of an epoch's batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imagenet_seq import native
from imagenet_seq.batch.crew import Crew, Work, pairs_of
from imagenet_seq.decode.pipeline import images_of
from imagenet_seq.errors import ForkError, LoaderClosedError, SampleError
from imagenet_seq.native.recipe import Rows

_POLL_S = 0.1  # a wait for a batch is cut into pieces of this, so that Ctrl-C is seen


_STALL_S = 10.0  # a disk that takes longer over one request is worth a word


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

    def _wait(self, crew: Crew) -> native.Batch | None:
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

    def _take(self, crew: Crew, batch: native.Batch) -> Any:
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
            return work.collate(pairs_of(images, targets), batch.batch)
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
