"""The engine, and the Python threads that do what the core can't.

The core fills the rows of batches. It hands out *python rows* (an image that only Pillow decodes, a
transform that only Python knows) and *python blocks* (bytes that only Python can make). Order,
back-pressure and cancellation stay the core's.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref

import numpy as np

from imagenet_seq import native
from imagenet_seq.batch.work import Work
from imagenet_seq.errors import LoaderClosedError

_IDLE_S = 1.0  # an idle thread checks this often whether its Workers are gone
_EXIT_JOIN_S = 5.0  # the interpreter's exit waits no longer for a transform


class Workers:
    """An engine and the Python threads that serve it, for one epoch after the other.

    Close them when an epoch is abandoned: threads may still hold rows of that epoch. When nothing
    refers to them any more, they close themselves.
    """

    def __init__(self, engine: native.Engine, num_threads: int) -> None:
        self._shared = _Shared(engine, weakref.ref(self))
        weakref.finalize(self, self._shared.close).atexit = False
        self.num_slots = engine.num_slots
        for number in range(num_threads):
            self._shared.add_thread(f"imagenet-seq-{number}")

    @property
    def engine(self) -> native.Engine:
        """The engine; a LoaderClosedError once it is closed."""
        return self._shared.engine()

    def start(self, work: Work, prepared: bool = False) -> None:
        """Begin an epoch; all batches of the one before must have been delivered.

        Args:
            work: the epoch.
            prepared: whether the engine has its plan.
        """
        work.slots = [work.memory.allocate() for _ in range(self.num_slots)]
        addresses = [slot.data_ptr() for slot in work.slots]
        engine = self.engine
        self._shared.work = work
        engine.start(None if prepared else work.plan, addresses, len(work.slots[0]))

    def rest(self) -> None:
        """Drop the memory of an epoch whose batches have all been delivered."""
        self._shared.work = None

    def close(self) -> None:
        """End the epoch and the threads, without waiting for a transform that runs. Idempotent.

        May be called from any thread, also from one of these: garbage collection can run there. In
        a forked child it does nothing.
        """
        self._shared.close()


class _Shared:
    """State shared by `Workers` and its threads, which must not refer to `Workers` itself.

    Ctrl-C may raise between any two steps of the main thread, also in a finaliser, which is then
    cut short. So one call of the core closes the engine, and if the main thread drops `Workers`
    without closing it, the threads notice and close it.
    """

    def __init__(self, engine: native.Engine, workers: weakref.ref[Workers]) -> None:
        self.work: Work | None = None
        self._engine: native.Engine | None = engine  # None: closed
        self._workers = workers
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
            if self._workers() is None:
                self.close()

    def _do(self, engine: native.Engine, task: native.Task) -> None:
        work = self.work
        if work is None:  # closed meanwhile
            return
        failure = None
        try:
            if task.kind == native.TASK_BLOCK:
                engine.finish_block(task.ticket, *work.source.read_block(task.sample))
                return
            work.fill_row(task)
        except BaseException as error:  # any exception of a user's code is the sample's failure
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
        self.work = None
        self._engine = None  # last, so that a close that Ctrl-C interrupted is repeated

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


_all_shared: weakref.WeakSet[_Shared] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all threads: none may be inside torch or Pillow when the interpreter ends."""
    everything = list(_all_shared)
    for shared in everything:
        shared.close()
    deadline = time.monotonic() + _EXIT_JOIN_S
    for shared in everything:
        shared.join(deadline)
