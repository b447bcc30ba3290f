"""The core's decoder alone: one thread, samples in memory, no Loader."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from photos import Encoded

from imagenet_seq import native
from imagenet_seq.native import abi, core
from imagenet_seq.native.recipe import Dtype, Layout, Recipe

BATCH_ROWS = 256
BYTES = {Dtype.UINT8: 1, Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}
LEVELS = ("portable", "neon", "avx2", "avx512")


def cpu_levels() -> list[str]:
    """Return the sets of kernels that this processor has, the best one last."""
    best = native.cpu()
    levels = []
    for level in LEVELS:
        try:
            native.use_cpu(level)
        except ValueError:
            continue
        levels.append(level)
    native.use_cpu(best)
    return levels


class _Group(NamedTuple):
    samples: ctypes.Array[abi.Sample]
    first: int  # place of its first sample in the order of decoding


class Kernel:
    """Decodes the same samples over and over, into the rows of a batch in turn.

    All calls are prepared beforehand: what is measured of Python is one ctypes call a group. Goes
    below the functions of `native` for that, which prepare a call each time.

    Args:
        recipe: what to do.
        samples: what to decode; must stay alive.
        group: samples a call. None: one, by the function for single samples.
        epoch: of the samples' keys; the seed is 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Sequence[Encoded],
        group: int | None = native.MAX_GROUP,
        epoch: int = 0,
    ) -> None:
        self.recipe = recipe
        row_bytes = recipe.out_height * recipe.out_width * 3 * BYTES[recipe.dtype]
        # Filled, so that no page fault comes into the measurement.
        self._rows = np.full((BATCH_ROWS, row_bytes), 255, np.uint8)
        self._native_recipe = core.c_recipe(recipe)
        self._error = abi.CError()
        self._single = group is None
        self._data = [sample.data for sample in samples]
        size = group or 1
        self._groups = [
            self._prepare(samples[first : first + size], first, epoch)
            for first in range(0, len(samples), size)
        ]

    def _prepare(self, samples: Sequence[Encoded], first: int, epoch: int) -> _Group:
        prepared = (abi.Sample * len(samples))()
        for place, (slot, sample) in enumerate(zip(prepared, samples, strict=True), first):
            slot.key = abi.CKey(0, epoch, sample.sample)
            slot.bytes = ctypes.cast(ctypes.c_char_p(sample.data), ctypes.c_void_p).value
            slot.size, slot.flags = len(sample.data), sample.flags
            slot.row = self._rows[place % BATCH_ROWS].ctypes.data
        return _Group(prepared, first)

    def set_epoch(self, epoch: int) -> None:
        """Use the crops of another epoch."""
        for samples, _ in self._groups:
            for sample in samples:
                sample.key.epoch = epoch

    def run(self, times: native.Times | None = None) -> None:
        """Decode all samples; `times` is added to."""
        recipe, error = ctypes.byref(self._native_recipe), ctypes.byref(self._error)
        if self._single:
            self._run_single()
            return
        stages = ctypes.byref(times) if times is not None else None
        decode = abi.lib.imseq_decode_group
        for samples, _ in self._groups:
            if decode(recipe, samples, len(samples), stages, error) != abi.OK:
                self._fail()

    def _run_single(self) -> None:
        recipe, error = ctypes.byref(self._native_recipe), ctypes.byref(self._error)
        decode, ok = abi.lib.imseq_decode, abi.OK
        for (sample,), _ in self._groups:
            key = ctypes.byref(sample.key)
            sample.status = decode(
                recipe, key, sample.bytes, sample.size, sample.flags, sample.row, error
            )
            if sample.status < ok:
                self._fail()

    def _fail(self) -> None:
        abi.check(self._error.code, self._error)

    def outputs(self) -> Iterator[np.ndarray | None]:
        """Decode group by group; yield each sample's row as (3, height, width), in order.

        A row is valid until the next one is asked for; None: the core leaves it to Pillow.
        """
        groups = self._groups
        try:
            for group in groups:
                self._groups = [group]
                self.run()
                for place, sample in enumerate(group.samples, group.first):
                    decoded = sample.status == abi.OK
                    yield self._pixels(place) if decoded else None
        finally:
            self._groups = groups

    def _pixels(self, place: int) -> np.ndarray:
        recipe = self.recipe
        dtype = {Dtype.UINT8: np.uint8, Dtype.FLOAT32: np.float32}[recipe.dtype]
        row: np.ndarray = self._rows[place % BATCH_ROWS].view(dtype)
        if recipe.layout == Layout.HWC:
            return row.reshape(recipe.out_height, recipe.out_width, 3).transpose(2, 0, 1)
        return row.reshape(3, recipe.out_height, recipe.out_width)
