"""The progress of an epoch, and the next epoch's plan, made before this one ends."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from imagenet_seq.batch.workers import Workers
from imagenet_seq.plan.epoch import EnginePlan


@dataclass
class Progress:
    """How far an epoch has come; shared by the loader and the epoch's iterator.

    Attributes:
        epoch: its number.
        samples_done: samples that scripts have, over all ranks.
        samples_end: samples_done after the last batch; -1: not known yet.
        ended: the engine has no more; a device stage may still have some.
    """

    epoch: int
    samples_done: int = 0
    samples_end: int = -1
    ended: bool = False


class PlanAhead:
    """The next epoch's plan, made in a thread while the present one is delivered."""

    def __init__(
        self,
        progress: Progress,
        workers: Workers,
        make_plan: Callable[[Progress], EnginePlan],
        prepare_rows: int | None,
    ) -> None:
        """Start the thread.

        Args:
            progress: position where the planned epoch begins.
            workers: their engine gets the plan.
            make_plan: makes the plan.
            prepare_rows: rows of a slot, if the engine reads ahead into that epoch; None: it
                doesn't.
        """
        self.plan: EnginePlan | None = None
        self._progress = progress
        self._workers = weakref.ref(workers)  # they close themselves when nothing refers to them
        self._in_engine = False
        self._thread = threading.Thread(
            target=self._make, args=(make_plan, prepare_rows), name="imagenet-seq-plan"
        )
        self._thread.start()

    def _make(self, make_plan: Callable[[Progress], EnginePlan], prepare_rows: int | None) -> None:
        with contextlib.suppress(Exception):  # the error is raised when the epoch begins
            plan = make_plan(self._progress)
            if prepare_rows is not None and (workers := self._workers()) is not None:
                workers.engine.prepare(plan, prepare_rows)
                self._in_engine = True
            self.plan = plan

    def wait(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def fits(self, progress: Progress) -> bool:
        """Wait for the plan; return whether it is for an epoch that begins at `progress`."""
        self.wait()
        return self.plan is not None and self._progress == progress

    def is_prepared(self, workers: Workers) -> bool:
        """Return whether the engine of `workers` has the plan."""
        return self._in_engine and self._workers() is workers
