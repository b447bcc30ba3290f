"""The engine: threads of the core that read, decode and batch one plan after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from imagenet_seq.errors import LoaderClosedError
from imagenet_seq.native.abi import (
    CANCELLED,
    OK,
    TIMEOUT,
    Batch,
    CEngineConfig,
    CPlan,
    CStats,
    Pending,
    Request,
    Task,
    call,
    lib,
)
from imagenet_seq.native.core import address_of, c_recipe
from imagenet_seq.native.recipe import Recipe
from imagenet_seq.plan.epoch import EnginePlan


class LentMemory(Protocol):
    """Memory that the caller owns and the engine uses."""

    size_bytes: int

    @property
    def address(self) -> int:
        """Address of the first byte."""


@dataclass(frozen=True)
class ReadConfig:
    """How an engine reads.

    Attributes:
        num_readers: threads that read.
        direct: bypass the page cache where the file system allows it.
        disk_lock: path prefix of the lock files by which processes take turns at a disk; "": none.
        kept: page-aligned memory for kept blocks; None: no blocks are kept.
        kept_keys: number of block keys: each key is below it.
        kept_floor_bytes: no more blocks are kept while the machine has less memory available.
        record_requests: record each read for `Engine.requests`.
    """

    num_readers: int = 1
    direct: bool = False
    disk_lock: str = ""
    kept: LentMemory | None = None
    kept_keys: int = 0
    kept_floor_bytes: int = 0
    record_requests: bool = False


class Engine:
    """The core's threads: read, decode and batch one plan at a time, without the GIL.

    Thread-safe, but only one thread at a time may call `next`. The last reference closes it. In a
    forked child every method raises ForkError, and dropping the engine does nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        num_decoders: int,
        num_slots: int,
        rows: int,
        row_bytes: int,
        block_budget_bytes: int,
        verify_checksums: bool,
        reading: ReadConfig | None = None,
    ) -> None:
        reading = reading or ReadConfig()
        kept = reading.kept
        config = CEngineConfig(
            num_decoders=num_decoders,
            num_readers=reading.num_readers,
            num_slots=num_slots,
            rows=rows,
            verify_checksums=int(verify_checksums),
            row_bytes=row_bytes,
            block_budget_bytes=block_budget_bytes,
            direct=int(reading.direct),
            disk_lock=os.fsencode(reading.disk_lock) or None,
            kept=kept.address if kept else None,
            kept_bytes=kept.size_bytes if kept else 0,
            kept_keys=reading.kept_keys,
            kept_floor_bytes=reading.kept_floor_bytes,
            record_requests=int(reading.record_requests),
            recipe=c_recipe(recipe),
        )
        self.num_slots = num_slots
        self._reading = reading  # its memory must outlive the core's threads
        # The core writes the handle into it: Ctrl-C can't come between creation and assignment.
        self._handle = c_void_p()
        call(lib.imseq_engine_create, byref(config), byref(self._handle))

    def prepare(self, plan: EnginePlan, slot_rows: int) -> None:
        """Announce the next plan: it is read ahead once the present one has been read.

        Args:
            plan: arrays, copied.
            slot_rows: as in `start`.
        """
        native, _keep = _c_plan(plan, slot_rows)
        call(lib.imseq_engine_prepare, self._handle, byref(native))

    def start(self, plan: EnginePlan | None, rows: Sequence[int], slot_rows: int) -> None:
        """Begin a plan.

        Args:
            plan: arrays, copied; None: the prepared plan.
            rows: address of each slot's memory, lent until its batch is returned.
            slot_rows: number of rows that each of them holds.
        """
        if len(rows) != self.num_slots:
            raise ValueError(f"expected memory for {self.num_slots} slots, got {len(rows)}")
        native, _keep = (None, []) if plan is None else _c_plan(plan, slot_rows)
        addresses = (c_void_p * len(rows))(*rows)
        announced = byref(native) if native else None
        call(lib.imseq_engine_start, self._handle, announced, addresses)

    def next(self, timeout_s: float, name_of: Any = None) -> Batch | Literal[False] | None:
        """Return the next batch, None at the end of the plan, False when the time-out passed.

        Raises:
            LoaderClosedError: the plan was cancelled meanwhile.
        """
        batch, wait_ns = Batch(), int(timeout_s * 1e9)
        status = call(lib.imseq_engine_next, self._handle, wait_ns, byref(batch), name_of=name_of)
        if status == CANCELLED:
            raise LoaderClosedError("the loader was closed while it was iterated")
        return batch if status == OK else False if status == TIMEOUT else None

    def release(self, slot: int, row: int) -> None:
        """Lend the memory at address `row` for the slot's next batch."""
        call(lib.imseq_engine_release, self._handle, slot, row)

    def stats(self) -> dict[str, int]:
        """Return the counters; names begin with their stage, times are in ns."""
        stats = CStats()
        call(lib.imseq_engine_stats, self._handle, byref(stats))
        return {field[0]: int(getattr(stats, field[0])) for field in CStats._fields_}

    def pending(self) -> tuple[float, str, int] | None:
        """Return the oldest unanswered read: seconds so far, path and offset in bytes; or None."""
        pending = Pending()
        call(lib.imseq_engine_pending, self._handle, byref(pending))
        if pending.age_ns < 0:
            return None
        return pending.age_ns / 1e9, os.fsdecode(pending.path), int(pending.offset)

    def requests(self) -> list[Request]:
        """Return the reads since the last call, if `ReadConfig.record_requests` is set."""
        found: list[Request] = []
        part = (Request * 1024)()
        count = c_int64(len(part))
        while count.value == len(part):
            call(lib.imseq_engine_requests, self._handle, part, len(part), byref(count))
            found += [Request.from_buffer_copy(request) for request in part[: count.value]]
        return found

    def take(self, timeout_s: float) -> Task | Literal[False] | None:
        """Return a task for Python, None after `close`, False when the time-out passed."""
        task = Task()
        status = call(lib.imseq_engine_take, self._handle, int(timeout_s * 1e9), byref(task))
        return task if status == OK else False if status == TIMEOUT else None

    def finish_row(self, ticket: int, failure: str | None = None) -> None:
        """Report that a python row is filled, or why it can't be."""
        call(lib.imseq_engine_finish_row, self._handle, ticket, _text(failure))

    def finish_block(
        self,
        ticket: int,
        data: bytes | memoryview | np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
        failure: str | None = None,
    ) -> None:
        """Hand in the bytes of a python block; sample i is data[offsets[i]:][:lengths[i]]."""
        address, size, _keep = address_of(data)
        begins = np.ascontiguousarray(offsets, np.int64)
        sizes = np.ascontiguousarray(lengths, np.int64)
        if begins.shape != sizes.shape:
            raise ValueError(f"{len(begins)} offsets but {len(sizes)} lengths")
        samples = (begins.ctypes.data, sizes.ctypes.data, len(begins))
        block = (self._handle, ticket, address, size)
        call(lib.imseq_engine_finish_block, *block, *samples, _text(failure))

    def close(self) -> None:
        """End the plan and the core's threads; every `take` returns None from now on.

        After it no thread of the core touches lent memory. Idempotent.
        """
        call(lib.imseq_engine_close, self._handle)

    def __del__(self) -> None:
        """Close and free; no other call can run, because nothing refers to the engine."""
        if getattr(self, "_handle", None):
            lib.imseq_engine_destroy(self._handle)


_PLAN_COLUMNS: tuple[tuple[type, str], ...] = (
    (np.int64, "batch_begin sample draw offset length block_offset block_length block_key"),
    (np.int64, "window_begin path_begin"),
    (np.int32, "block block_file"),
    (np.uint32, "checksum"),
    (np.uint8, "flags paths"),
)


def _c_plan(plan: EnginePlan, slot_rows: int) -> tuple[CPlan, list[np.ndarray]]:
    """Return a plan as a C struct, and the arrays it points to."""
    native = CPlan(
        seed=plan.seed,
        epoch=plan.epoch,
        num_positions=len(plan.sample),
        num_batches=len(plan.batch_begin) - 1,
        num_blocks=len(plan.block_file),
        num_files=len(plan.path_begin) - 1,
        num_windows=0 if plan.window_begin is None else len(plan.window_begin) - 1,
        slot_rows=slot_rows,
        root=os.fsencode(plan.root),
    )
    keep: list[np.ndarray] = []
    for dtype, names in _PLAN_COLUMNS:
        for name in names.split():
            if (column := getattr(plan, name)) is not None:
                keep.append(np.ascontiguousarray(column, dtype))
                setattr(native, name, keep[-1].ctypes.data)
    return native, keep


def _text(failure: str | None) -> bytes | None:
    return None if failure is None else failure.encode("utf-8", "replace").replace(b"\0", b"?")
