"""Memory of batches, pageable or page-locked."""

from __future__ import annotations

import threading
import weakref
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector a kernel stores


class PagedMemory:
    """Batches in pageable memory, used again once nothing refers to them.

    Reuse saves a page fault for every 4 KB of every batch. A tensor's memory comes back only when
    its *storage* is freed, so a slice of a batch that a script keeps never changes. Thread-safe.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, keep: int) -> None:
        """Args:
        shape: of a batch as it lies in memory.
        dtype: of its elements.
        keep: unused batches are freed while there are more than this many, used ones included.
        """
        self._shape, self._dtype = shape, dtype
        self._num_bytes = int(np.prod(shape)) * dtype.itemsize
        self._keep = keep
        self._num_batches = 0
        self._unused: list[np.ndarray] = []
        self._lock = threading.RLock()  # reentrant: garbage collection may free a storage anywhere

    def allocate(self) -> Tensor:
        """Return a batch with arbitrary content."""
        with self._lock:
            memory = self._unused.pop() if self._unused else self._new()
        # Only the storage refers to `owner`, so `owner` is freed when the storage is.
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
    """Batches in page-locked memory, each allocated by torch's caching allocator.

    Never reused here: only that allocator knows which copies still run on a stream.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype

    def allocate(self) -> Tensor:
        """Return a batch with arbitrary content."""
        return torch.empty(self._shape, dtype=self._dtype, pin_memory=True)


Memory: TypeAlias = PagedMemory | PinnedMemory
