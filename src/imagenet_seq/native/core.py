"""The core's functions in Python: they take bytes and arrays, and raise exceptions.

ctypes releases the GIL during every call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p

import numpy as np

from imagenet_seq.native.abi import (
    ERROR_CAPACITY,
    OK,
    STRIP_METADATA,
    TABLES_BYTES,
    CError,
    CKey,
    CRecipe,
    Header,
    Sample,
    Times,
    View,
    call,
    check,
    lib,
)
from imagenet_seq.native.recipe import Key, Recipe


def build_info() -> str:
    """Return version, compiler, architecture and kernels of the native core."""
    return str(lib.imseq_build_info().decode())


def cpu() -> str:
    """Return the kernels in use: "portable", "avx2", "avx512" or "neon"."""
    return str(lib.imseq_cpu().decode())


def use_cpu(level: str) -> None:
    """Choose the kernels used from now on; all give the same bits.

    Raises:
        ValueError: this processor has no such kernels; the message names those it has.
    """
    call(lib.imseq_use_cpu, level.encode())


if _level := os.environ.get("IMAGENET_SEQ_CPU"):
    try:
        use_cpu(_level)
    except ValueError as error:
        raise ImportError(f"the environment variable IMAGENET_SEQ_CPU: {error}") from None


def address_of(data: bytes | bytearray | memoryview | np.ndarray) -> tuple[int, int, object]:
    """Return address and size in bytes of contiguous memory, and the object that keeps it alive."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("expected a C-contiguous array")
        return data.ctypes.data, data.nbytes, data
    array = np.frombuffer(data, np.uint8)
    return array.ctypes.data, array.nbytes, array


def c_recipe(recipe: Recipe) -> CRecipe:
    """Copy a recipe; its table must outlive the result."""
    table = None if recipe.table is None else recipe.table.ctypes.data
    return CRecipe(**{**vars(recipe), "table": table})


def read_header(data: bytes | memoryview | np.ndarray) -> Header | None:
    """Read a JPEG's header; None if the bytes are no JPEG or the header is damaged."""
    header = Header()
    address, size, _keep = address_of(data)
    status = call(lib.imseq_read_header, address, size, byref(header))
    return header if status == OK else None


def draw(
    recipe: Recipe, seed: int, epoch: int, sample: int, width: int, height: int
) -> View | None:
    """Draw a sample's geometry; None if the core can't apply the recipe to this image size.

    Pure: a function of its arguments alone, the same on every platform.
    """
    native, key, view = c_recipe(recipe), CKey(seed, epoch, sample), View()
    status = call(lib.imseq_draw, byref(native), byref(key), width, height, byref(view))
    return view if status == OK else None


def decode(
    recipe: Recipe, key: Key, data: bytes | memoryview | np.ndarray, row: int, flags: int = 0
) -> bool:
    """Decode one JPEG into the memory at address `row`; return False if Pillow must decode it.

    `row` must hold out_height * out_width * 3 values of the recipe's dtype; `data` is the whole
    file, `flags` SAMPLE_CLEAN or 0.
    """
    address, size, _keep = address_of(data)
    native, c_key = byref(c_recipe(recipe)), byref(CKey(*key))
    return call(lib.imseq_decode, native, c_key, address, size, flags, row) == OK


def decode_group(
    recipe: Recipe,
    keys: Sequence[Key],
    data: Sequence[bytes | memoryview | np.ndarray],
    rows: Sequence[int],
    flags: int = 0,
    times: Times | None = None,
) -> list[bool]:
    """Decode up to MAX_GROUP JPEGs together: faster than one by one, with the same results.

    It takes what `decode` takes, for each sample. `flags` may be SAMPLE_CLEAN if all were decoded
    once in full without any anomaly. The time of each step is added to `times`.

    Returns:
        For each sample whether its row was filled; if not, Pillow must decode it.

    Raises:
        ValueError: a wrong recipe or too many samples.
        MemoryError: no memory.
    """
    samples = (Sample * len(data))()
    keep = []
    for sample, key, encoded, row in zip(samples, keys, data, rows, strict=True):
        address, size, kept = address_of(encoded)
        keep.append(kept)
        sample.key, sample.bytes, sample.size = CKey(*key), address, size
        sample.row, sample.flags = row, flags
    native, measured = byref(c_recipe(recipe)), byref(times) if times else None
    call(lib.imseq_decode_group, native, samples, len(samples), measured)
    return [sample.status == OK for sample in samples]


def apply(recipe: Recipe, key: Key, pixels: np.ndarray, row: int) -> bool:
    """Crop, resize, flip and convert decoded pixels into the memory at address `row`.

    `pixels` are a C-contiguous uint8 array of shape (height, width, 3). False: the core can't apply
    the recipe to this size.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"expected uint8 pixels of shape (height, width, 3), got {pixels.dtype} {pixels.shape}"
        )
    address, _, _keep = address_of(pixels)
    height, width, _ = pixels.shape
    native, c_key = byref(c_recipe(recipe)), byref(CKey(*key))
    return call(lib.imseq_apply, native, c_key, address, width, height, row) == OK


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
        tables: the pack's Huffman tables from `fit_tables`; None: tables fitted to this image.

    Returns:
        The new file as a uint8 array, and its header; None if the input is damaged or unsupported.
    """
    if tables is not None and len(tables) != TABLES_BYTES:
        raise ValueError(f"tables: expected {TABLES_BYTES} bytes, got {len(tables)}")
    header, error, size_out = Header(), CError(), c_size_t(0)
    address, size, _keep = address_of(data)
    out = np.empty(size + size // 4 + 4096, np.uint8)
    how = (restart_interval, STRIP_METADATA if strip else 0, tables)
    results = (byref(size_out), byref(header), byref(error))
    while True:
        status = lib.imseq_transcode(address, size, *how, out.ctypes.data, out.nbytes, *results)
        if status != ERROR_CAPACITY or size_out.value <= out.nbytes:
            return (out[: size_out.value], header) if check(status, error) == OK else None
        out = np.empty(size_out.value, np.uint8)


def count_symbols(
    data: bytes | memoryview | np.ndarray, restart_interval: int = 8
) -> np.ndarray | None:
    """Count how often each symbol occurs in a JPEG as `transcode` would write it.

    Returns:
        A uint64 array of shape (4, 256): DC and AC table of the first component, DC and AC table of
        the others; None if the input is damaged or unsupported.
    """
    counts = np.zeros((4, 256), np.uint64)
    address, size, _keep = address_of(data)
    status = call(lib.imseq_count_symbols, address, size, restart_interval, counts.ctypes.data)
    return counts if status == OK else None


def fit_tables(counts: np.ndarray) -> bytes:
    """Choose Huffman tables for all images of a pack.

    Pure: a function of the counts alone, the same on every platform.

    Args:
        counts: sum of results of `count_symbols`; each below 2**48.

    Returns:
        The payloads of the four tables' DHT segments, one after the other.
    """
    if counts.shape != (4, 256) or counts.dtype != np.uint64:
        raise ValueError(
            f"counts: expected (4, 256) of uint64, got {counts.shape} of {counts.dtype}"
        )
    table, out = np.ascontiguousarray(counts), np.empty(TABLES_BYTES, np.uint8)
    call(lib.imseq_fit_tables, table.ctypes.data, out.ctypes.data)
    return out.tobytes()


def crc32c(data: bytes | memoryview | np.ndarray, crc: int = 0) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of data, continuing from crc."""
    if isinstance(data, bytes):  # ctypes takes their address by itself, which saves 1.5 us
        return int(lib.imseq_crc32c(crc, data, len(data)))
    address, size, _keep = address_of(data)
    return int(lib.imseq_crc32c(crc, address, size))


def look_up(path: str) -> tuple[int, int]:
    """Return a file's size and the physical address of its first byte on the disk.

    The address is -1 if the file system does not tell it (FIEMAP; Linux only).

    Raises:
        OSError: the file can't be opened.
    """
    size, address = c_int64(), c_int64()
    call(lib.imseq_look_up, os.fsencode(path), byref(size), byref(address))
    return size.value, address.value


def preallocate(fd: int, size_bytes: int) -> None:
    """Reserve space on the disk for an open file, contiguous if possible; its size stays.

    Does nothing if the file system can't.

    Raises:
        OSError: the disk is full.
    """
    call(lib.imseq_preallocate, fd, size_bytes)


def kept_table_bytes(num_keys: int) -> int:
    """Return the bytes that the table of kept blocks takes of the memory lent for them."""
    return int(lib.imseq_kept_table_bytes(num_keys))


# ---- functions of the C library that Python lacks ------------------------------------------------


def lock_on_fault(address: int, size_bytes: int) -> int:
    """Lock pages in memory from the moment each is first touched (Linux's mlock2).

    Returns:
        0, or the errno of the failure: ENOMEM or EPERM if RLIMIT_MEMLOCK is too small.
    """
    mlock2 = getattr(ctypes.CDLL(None, use_errno=True), "mlock2", None)
    if mlock2 is None:  # not Linux, or glibc before 2.27
        return errno.ENOSYS
    mlock2.argtypes = [c_void_p, c_size_t, c_int32]
    on_fault = 1  # MLOCK_ONFAULT: mlock alone would fill all pages at once
    return 0 if mlock2(address, size_bytes, on_fault) == 0 else ctypes.get_errno()


def memory_file(name: str, flags: int) -> int:
    """Return the descriptor of a new memfd; some builds of Python lack os.memfd_create.

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
