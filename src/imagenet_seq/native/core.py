"""The native core through ctypes: prototypes, structs and one function that raises.

The only file that imports ctypes. It mirrors ``core/imagenet_seq.h`` line by line;
``tests/test_abi.py`` compares the two. ctypes releases the GIL during every call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import byref, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from imagenet_seq.errors import LoaderClosedError
from imagenet_seq.native.abi import (
    CANCELLED,
    ERROR_CAPACITY,
    OK,
    STRIP_METADATA,
    TABLES_BYTES,
    TIMEOUT,
    Batch,
    CEngineConfig,
    CError,
    CKey,
    CPlan,
    CRecipe,
    CStats,
    Header,
    Pending,
    Request,
    Sample,
    Task,
    Times,
    View,
    check,
    lib,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagenet_seq.native.recipe import Recipe
    from imagenet_seq.plan.epoch import EnginePlan


def build_info() -> str:
    """Return version, compiler, architecture and kernels of the native core."""
    return str(lib.imseq_build_info().decode())


def cpu() -> str:
    """Return the kernels in use: "portable", "avx2", "avx512" or "neon"."""
    return str(lib.imseq_cpu().decode())


def use_cpu(level: str) -> None:
    """Choose the kernels that decode from now on; all give the same bits.

    Raises:
        ValueError: this processor has no such kernels; the message names those it has.
    """
    error = CError()
    check(lib.imseq_use_cpu(level.encode(), byref(error)), error)


def _use_cpu_of_environment() -> None:
    level = os.environ.get("IMAGENET_SEQ_CPU")
    if not level:
        return
    try:
        use_cpu(level)
    except ValueError as error:
        raise ImportError(f"the environment variable IMAGENET_SEQ_CPU: {error}") from None


_use_cpu_of_environment()


def _address(data: bytes | bytearray | memoryview | np.ndarray) -> tuple[int, int, object]:
    """Return address and size in bytes of contiguous memory, and what keeps it alive."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("expected a C-contiguous array")
        return data.ctypes.data, data.nbytes, data
    array = np.frombuffer(data, np.uint8)
    return array.ctypes.data, array.nbytes, array


def c_recipe(recipe: Recipe) -> CRecipe:
    """Copy a recipe; its table must outlive the result."""
    native = CRecipe()
    for name in (field[0] for field in CRecipe._fields_):
        if name != "table":
            setattr(native, name, getattr(recipe, name))
    native.table = recipe.table.ctypes.data if recipe.table is not None else None
    return native


def read_header(data: bytes | memoryview | np.ndarray) -> Header | None:
    """Read a JPEG's header; None where the bytes are no JPEG or its header is damaged."""
    header, error = Header(), CError()
    address, size, _keep = _address(data)
    status = check(lib.imseq_read_header(address, size, byref(header), byref(error)), error)
    return header if status == OK else None


def draw(
    recipe: Recipe, seed: int, epoch: int, sample: int, width: int, height: int
) -> View | None:
    """Draw a sample's geometry; None where the recipe can't be met in the core.

    Pure: a function of its arguments alone, the same on every platform.
    """
    view, error = View(), CError()
    native, key = c_recipe(recipe), CKey(seed, epoch, sample)
    status = lib.imseq_draw(byref(native), byref(key), width, height, byref(view), byref(error))
    return view if check(status, error) == OK else None


def decode(
    recipe: Recipe,
    key: tuple[int, int, int],
    data: bytes | memoryview | np.ndarray,
    row: int,
    flags: int = 0,
) -> bool:
    """Decode one JPEG into the memory at address `row`; False: Pillow must decode it.

    Args:
        recipe: what to do; `row` must hold out_height * out_width * 3 values of its dtype.
        key: (seed, epoch, sample).
        data: the whole file.
        row: address of the output.
        flags: SAMPLE_CLEAN or 0.
    """
    error = CError()
    address, size, _keep = _address(data)
    native, native_key = c_recipe(recipe), CKey(*key)
    status = lib.imseq_decode(
        byref(native), byref(native_key), address, size, flags, row, byref(error)
    )
    return check(status, error) == OK


def decode_group(
    recipe: Recipe,
    keys: Sequence[tuple[int, int, int]],
    data: Sequence[bytes | memoryview | np.ndarray],
    rows: Sequence[int],
    flags: int = 0,
    times: Times | None = None,
) -> list[bool]:
    """Decode up to MAX_GROUP JPEGs together: faster than one by one, with the same results.

    Args:
        recipe: what to do; each row must hold out_height * out_width * 3 values of its dtype.
        keys: (seed, epoch, sample) of each.
        data: the whole files.
        rows: addresses of the memory to fill.
        flags: SAMPLE_CLEAN where all were decoded once in full without any anomaly.
        times: where the time goes is added to it.

    Returns:
        For each sample whether its row is filled; False: Pillow must decode it.

    Raises:
        ValueError: a wrong recipe or too many samples.
        MemoryError: no memory.
    """
    samples = (Sample * len(data))()
    keep = []
    for sample, key, encoded, row in zip(samples, keys, data, rows, strict=True):
        address, size, kept = _address(encoded)
        keep.append(kept)
        sample.key, sample.bytes, sample.size = CKey(*key), address, size
        sample.row, sample.flags = row, flags
    native, error = c_recipe(recipe), CError()
    status = lib.imseq_decode_group(
        byref(native), samples, len(samples), byref(times) if times else None, byref(error)
    )
    check(status, error)
    return [sample.status == OK for sample in samples]


def apply(recipe: Recipe, key: tuple[int, int, int], pixels: np.ndarray, row: int) -> bool:
    """Crop, resize, flip and convert decoded pixels into the memory at address `row`.

    Args:
        recipe: what to do.
        key: (seed, epoch, sample).
        pixels: uint8 array of shape (height, width, 3), C-contiguous.
        row: address of the output.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"expected uint8 pixels of shape (height, width, 3), got {pixels.dtype} {pixels.shape}"
        )
    error = CError()
    address, _, _keep = _address(pixels)
    height, width, _ = pixels.shape
    native, native_key = c_recipe(recipe), CKey(*key)
    status = lib.imseq_apply(
        byref(native), byref(native_key), address, width, height, row, byref(error)
    )
    return check(status, error) == OK


def transcode(
    data: bytes | memoryview | np.ndarray,
    restart_interval: int = 8,
    strip: bool = False,
    tables: bytes | None = None,
) -> tuple[np.ndarray, Header] | None:
    """Re-code a JPEG losslessly into canonical form.

    Args:
        data: the whole file.
        restart_interval: MCUs between restart markers, 1 to 65535.
        strip: drop ICC profiles, Exif thumbnails and comments.
        tables: the pack's Huffman tables, of `fit_tables`; None: tables fitted to this image.

    Returns:
        The new file as a uint8 array, and its header; None where the input is damaged or out of
        scope.
    """
    if tables is not None and len(tables) != TABLES_BYTES:
        raise ValueError(f"tables: expected {TABLES_BYTES} bytes, got {len(tables)}")
    header, error, size_out = Header(), CError(), c_size_t(0)
    address, size, _keep = _address(data)
    out = np.empty(size + size // 4 + 4096, np.uint8)
    while True:
        status = lib.imseq_transcode(
            address,
            size,
            restart_interval,
            STRIP_METADATA if strip else 0,
            tables,
            out.ctypes.data,
            out.nbytes,
            byref(size_out),
            byref(header),
            byref(error),
        )
        if status == ERROR_CAPACITY and size_out.value > out.nbytes:
            out = np.empty(size_out.value, np.uint8)
            continue
        return (out[: size_out.value], header) if check(status, error) == OK else None


def count_symbols(
    data: bytes | memoryview | np.ndarray, restart_interval: int = 8
) -> np.ndarray | None:
    """Count how often each symbol occurs in a JPEG as `transcode` would write it.

    Returns:
        A uint64 array of shape (4, 256): DC and AC table of the first component, DC and AC table of
        the others; None where the input is damaged or out of scope.
    """
    counts, error = np.zeros((4, 256), np.uint64), CError()
    address, size, _keep = _address(data)
    status = lib.imseq_count_symbols(
        address, size, restart_interval, counts.ctypes.data, byref(error)
    )
    return counts if check(status, error) == OK else None


def fit_tables(counts: np.ndarray) -> bytes:
    """Choose Huffman tables for all images of a pack.

    Pure: a function of the counts alone, the same on every platform.

    Args:
        counts: a sum of what `count_symbols` gives; each below 2**48.

    Returns:
        The payloads of the four tables' DHT segments, one after the other.
    """
    if counts.shape != (4, 256) or counts.dtype != np.uint64:
        raise ValueError(
            f"counts: expected (4, 256) of uint64, got {counts.shape} of {counts.dtype}"
        )
    table, error = np.ascontiguousarray(counts), CError()
    out = np.empty(TABLES_BYTES, np.uint8)
    check(lib.imseq_fit_tables(table.ctypes.data, out.ctypes.data, byref(error)), error)
    return out.tobytes()


def crc32c(data: bytes | memoryview | np.ndarray, crc: int = 0) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of data, continuing from crc."""
    if isinstance(data, bytes):  # ctypes takes their address: spares 1.5 us
        return int(lib.imseq_crc32c(crc, data, len(data)))
    address, size, _keep = _address(data)
    return int(lib.imseq_crc32c(crc, address, size))


def look_up(path: str) -> tuple[int, int]:
    """Return a file's size and the physical address of its first byte on the disk.

    The address is -1 where the file system does not say (FIEMAP; Linux only).

    Raises:
        OSError: the file can't be opened.
    """
    size, address, error = c_int64(), c_int64(), CError()
    status = lib.imseq_look_up(os.fsencode(path), byref(size), byref(address), byref(error))
    check(status, error)
    return size.value, address.value


def preallocate(fd: int, size_bytes: int) -> None:
    """Reserve room on the disk for an open file, if possible in one piece; its size stays.

    Does nothing where the file system can't.

    Raises:
        OSError: the disk is full.
    """
    error = CError()
    check(lib.imseq_preallocate(fd, size_bytes, byref(error)), error)


def kept_table_bytes(num_keys: int) -> int:
    """Return what of the memory lent for kept blocks their table takes, in bytes."""
    return int(lib.imseq_kept_table_bytes(num_keys))


@dataclass(frozen=True)
class Reading:
    """How an engine reads.

    Attributes:
        num_readers: threads that read.
        direct: past the page cache, where that works.
        disk_lock: path of the files that keep readers of one disk apart; "": no turns.
        kept: memory for blocks that stay, page-aligned, and its bytes; lent as long as this object
            lives.
        kept_keys: keys of blocks are below this.
        kept_floor_bytes: no more blocks are kept while the machine has less memory available.
        record_requests: keep what is read for `Engine.requests`.
    """

    num_readers: int = 1
    direct: bool = False
    disk_lock: str = ""
    kept: Lent | None = None
    kept_keys: int = 0
    kept_floor_bytes: int = 0
    record_requests: bool = False


class Lent(Protocol):
    """Memory that somebody else owns."""

    size_bytes: int

    @property
    def address(self) -> int:
        """Address of the first byte."""


class Engine:
    """The core's threads: read, decode and batch one plan at a time, without the GIL.

    Thread-safe except that one thread at a time may call `next`. It goes with the last reference to
    it. In a forked child every method raises ForkError, and going only forgets.
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
        reading: Reading | None = None,
    ) -> None:
        reading = reading or Reading()
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
        self._reading = reading  # what it lends must outlive the core's threads
        # The core writes to it: were it copied here, Ctrl-C could come in between.
        self._handle, error = c_void_p(), CError()
        check(lib.imseq_engine_create(byref(config), byref(self._handle), byref(error)), error)

    def prepare(self, plan: EnginePlan, slot_rows: int) -> None:
        """Name the plan that will probably come next: it is read when the present one has been.

        Args:
            plan: arrays, copied.
            slot_rows: as for `start`.
        """
        native, _keep = _c_plan(plan, slot_rows)
        error = CError()
        check(lib.imseq_engine_prepare(self._handle, byref(native), byref(error)), error)

    def start(self, plan: EnginePlan | None, rows: Sequence[int], slot_rows: int) -> None:
        """Begin a plan.

        Args:
            plan: arrays, copied; None: the prepared plan.
            rows: address of each slot's memory, lent until its batch is returned.
            slot_rows: rows of a batch that each of them holds.
        """
        if len(rows) != self.num_slots:
            raise ValueError(f"expected memory for {self.num_slots} slots, got {len(rows)}")
        error = CError()
        addresses = (c_void_p * len(rows))(*rows)
        if plan is None:
            check(lib.imseq_engine_start(self._handle, None, addresses, byref(error)), error)
            return
        native, _keep = _c_plan(plan, slot_rows)
        check(lib.imseq_engine_start(self._handle, byref(native), addresses, byref(error)), error)

    def next(self, timeout_s: float, name_of_sample: Any = None) -> Batch | Literal[False] | None:
        """Return the next batch, None at the end of the plan, False when the time-out passed.

        Raises:
            LoaderClosedError: the plan was cancelled meanwhile.
        """
        batch, error = Batch(), CError()
        status = lib.imseq_engine_next(
            self._handle, int(timeout_s * 1e9), byref(batch), byref(error)
        )
        check(status, error, name_of_sample)
        if status == CANCELLED:
            raise LoaderClosedError("the loader was closed while it was iterated")
        return batch if status == OK else False if status == TIMEOUT else None

    def release(self, slot: int, row: int) -> None:
        """Lend the memory at address `row` for the slot's next batch."""
        error = CError()
        check(lib.imseq_engine_release(self._handle, slot, row, byref(error)), error)

    def stats(self) -> dict[str, int]:
        """Return the counters; names begin with their stage, times are in ns."""
        stats, error = CStats(), CError()
        check(lib.imseq_engine_stats(self._handle, byref(stats), byref(error)), error)
        return {field[0]: int(getattr(stats, field[0])) for field in CStats._fields_}

    def pending(self) -> tuple[float, str, int] | None:
        """Return what a stalled disk is asked for: seconds so far, path and offset in bytes."""
        pending, error = Pending(), CError()
        check(lib.imseq_engine_pending(self._handle, byref(pending), byref(error)), error)
        if pending.age_ns < 0:
            return None
        return pending.age_ns / 1e9, os.fsdecode(pending.path), int(pending.offset)

    def requests(self) -> list[Request]:
        """Return what was read since the last call, where `Reading.record_requests` says so."""
        found: list[Request] = []
        part, error = (Request * 1024)(), CError()
        count = c_int64(len(part))
        while count.value == len(part):
            status = lib.imseq_engine_requests(
                self._handle, part, len(part), byref(count), byref(error)
            )
            check(status, error)
            found += [Request.from_buffer_copy(request) for request in part[: count.value]]
        return found

    def take(self, timeout_s: float) -> Task | Literal[False] | None:
        """Return work for Python, None when no more will come, False when the time-out passed."""
        task, error = Task(), CError()
        status = lib.imseq_engine_take(
            self._handle, int(timeout_s * 1e9), byref(task), byref(error)
        )
        check(status, error)
        return task if status == OK else False if status == TIMEOUT else None

    def finish_row(self, ticket: int, failure: str | None = None) -> None:
        """Say that a python row is filled, or why it can't be."""
        error = CError()
        check(
            lib.imseq_engine_finish_row(self._handle, ticket, _text(failure), byref(error)),
            error,
        )

    def finish_block(
        self,
        ticket: int,
        data: bytes | memoryview | np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
        failure: str | None = None,
    ) -> None:
        """Hand in the bytes of a python block; sample i is data[offsets[i]:][:lengths[i]]."""
        error = CError()
        address, size, _keep = _address(data)
        begins = np.ascontiguousarray(offsets, np.int64)
        sizes = np.ascontiguousarray(lengths, np.int64)
        if begins.shape != sizes.shape:
            raise ValueError(f"{len(begins)} offsets but {len(sizes)} lengths")
        check(
            lib.imseq_engine_finish_block(
                self._handle,
                ticket,
                address,
                size,
                begins.ctypes.data,
                sizes.ctypes.data,
                len(begins),
                _text(failure),
                byref(error),
            ),
            error,
        )

    def close(self) -> None:
        """End the plan and the core's threads; every waiting and later `take` returns None.

        On return no thread of the core touches lent memory. Idempotent.
        """
        error = CError()
        check(lib.imseq_engine_close(self._handle, byref(error)), error)

    def __del__(self) -> None:
        """Close and free: nobody refers to the engine, so no other call runs or follows."""
        if getattr(self, "_handle", None):
            lib.imseq_engine_destroy(self._handle)


def _c_plan(plan: EnginePlan, slot_rows: int) -> tuple[CPlan, list[np.ndarray]]:
    """Return a plan as the core wants it, and the arrays it points to."""
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
    keep = []
    for name, dtype in _PLAN_DTYPES.items():
        column = getattr(plan, name)
        if column is None:
            continue
        array: np.ndarray = np.ascontiguousarray(column, dtype)
        keep.append(array)
        setattr(native, name, array.ctypes.data)
    return native, keep


def _text(failure: str | None) -> bytes | None:
    return None if failure is None else failure.encode("utf-8", "replace").replace(b"\0", b"?")


_PLAN_DTYPES: dict[str, type] = {
    "batch_begin": np.int64,
    "sample": np.int64,
    "draw": np.int64,
    "block": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "checksum": np.uint32,
    "flags": np.uint8,
    "block_file": np.int32,
    "block_offset": np.int64,
    "block_length": np.int64,
    "block_key": np.int64,
    "window_begin": np.int64,
    "paths": np.uint8,
    "path_begin": np.int64,
}


# ---- The C library: what Python's own modules lack; nothing of the native core ----


def lock_on_fault(address: int, size_bytes: int) -> int:
    """Have pages stay in memory from the moment each is first touched (Linux's mlock2).

    Returns:
        0, or the errno that says why not: ENOMEM or EPERM where RLIMIT_MEMLOCK is too small.
    """
    mlock2 = getattr(ctypes.CDLL(None, use_errno=True), "mlock2", None)
    if mlock2 is None:  # not Linux, or glibc before 2.27
        return errno.ENOSYS
    mlock2.argtypes = [c_void_p, c_size_t, c_int32]
    on_fault = 1  # MLOCK_ONFAULT: mlock alone would fill all pages at once
    return 0 if mlock2(address, size_bytes, on_fault) == 0 else ctypes.get_errno()


def memory_file(name: str, flags: int) -> int:
    """Return the descriptor of a new memfd; os.memfd_create is missing in Pythons built long ago.

    Raises:
        OSError: the system has no such call, or refuses it.
    """
    memfd_create = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
    if memfd_create is None:  # not Linux, or glibc before 2.27
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "memfd_create")
    memfd_create.argtypes = [c_char_p, c_uint32]
    file = int(memfd_create(name.encode(), flags))
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "memfd_create")
    return file
