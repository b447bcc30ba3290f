"""Memory of batches: ordinary or page-locked."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Memory(Protocol):
    """Where batches come from: see `imagenet_seq.device`."""

    def allocate(self) -> Tensor:
        """Return a batch with arbitrary content."""


_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector a kernel stores


class PagedMemory:
    """Batches in ordinary memory, used again once nothing refers to them.

    Reuse saves a page fault for every 4 KB of every batch. A tensor's memory comes back only when
    its *storage* is freed, so a slice of a batch that a script keeps never changes. Thread-safe.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, keep: int) -> None:
        """shape: of a batch as it lies in memory; keep: batches, used and unused, beyond which a
        batch that nothing refers to is given back to the system.
        """
        self._shape, self._dtype = shape, dtype
        self._num_bytes = int(np.prod(shape)) * dtype.itemsize
        self._keep = keep
        self._num_batches = 0
        self._unused: list[np.ndarray] = []
        self._lock = threading.RLock()  # garbage collection may end a storage anywhere

    def allocate(self) -> Tensor:
        """Return a batch with arbitrary content."""
        with self._lock:
            memory = self._unused.pop() if self._unused else self._new()
        # The storage refers to `owner` and to nothing else of ours: its end is the storage's end.
        owner = memory[:]
        weakref.finalize(owner, self._take_back, memory).atexit = False
        return torch.from_numpy(owner).view(self._dtype).view(self._shape)

    def _new(self) -> np.ndarray:
        raw = np.empty(self._num_bytes + _ALIGNMENT_BYTES, np.uint8)
        begin = -raw.ctypes.data % _ALIGNMENT_BYTES
        self._num_batches += 1
        return raw[begin : begin + self._num_bytes]

    def _take_back(self, memory: np.ndarray) -> None:
        with self._lock:
            if self._num_batches <= self._keep:
                self._unused.append(memory)
            else:
                self._num_batches -= 1


class PinnedMemory:
    """Batches in page-locked memory, each fresh from torch's caching allocator.

    Never recycled here: only that allocator knows of a copy that still runs on a stream.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype

    def allocate(self) -> Tensor:
        """Return a batch with arbitrary content."""
        return torch.empty(self._shape, dtype=self._dtype, pin_memory=True)
