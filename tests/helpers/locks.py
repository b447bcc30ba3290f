"""Locks that tell a test when somebody wants them."""

from __future__ import annotations

import threading


class NotedLock:
    """A lock that counts in `asked` how often it was asked for."""

    def __init__(self) -> None:
        self._lock, self.asked = threading.Lock(), threading.Semaphore(0)

    def __enter__(self) -> None:
        self.asked.release()
        self._lock.acquire()

    def __exit__(self, *unused: object) -> None:
        self._lock.release()

    def was_asked(self, times: int) -> bool:
        """Wait until it was asked for so often since the last call."""
        return all(self.asked.acquire(timeout=60) for _ in range(times))
