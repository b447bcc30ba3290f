"""The ABI of ``core/imagenet_seq.h`` in ctypes: constants, structs, prototypes, errors.

``tests/native/test_abi.py`` compares the two line by line.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

from imagenet_seq.errors import DataError, ForkError, ImagenetSeqError, SampleError

ABI = 7
OK, TIMEOUT, END, CANCELLED, NOT_DECODED = 0, 1, 2, 3, 4
ERROR_ARGUMENT, ERROR_MEMORY, ERROR_READ, ERROR_DATA = -1, -2, -3, -4
ERROR_SAMPLE, ERROR_FORK, ERROR_CAPACITY = -5, -6, -7
SAMPLE_CLEAN = 1
MAX_GROUP = 8
STRIP_METADATA = 1
TABLES_BYTES = 416
TASK_ROW, TASK_BLOCK = 1, 2
ROWS_READ = 3


class CError(Structure):
    """What went wrong in a call; fields as ``imseq_error``."""

    _fields_ = [
        ("code", c_int32),
        ("os_errno", c_int32),
        ("sample", c_int64),
        ("offset", c_int64),
        ("message", c_char * 512),
    ]


class CRecipe(Structure):
    """What is done to every sample; fields as ``imseq_recipe``."""

    _fields_ = [
        ("geometry", c_int32),
        ("out_height", c_int32),
        ("out_width", c_int32),
        ("filter", c_int32),
        ("passes", c_int32),
        ("dtype", c_int32),
        ("layout", c_int32),
        ("strict", c_int32),
        ("scale_min", c_double),
        ("scale_max", c_double),
        ("ratio_min", c_double),
        ("ratio_max", c_double),
        ("resize_height", c_int32),
        ("resize_width", c_int32),
        ("resize_max", c_int32),
        ("crop_height", c_int32),
        ("crop_width", c_int32),
        ("center_rule", c_int32),
        ("fixed_top", c_int32),
        ("fixed_left", c_int32),
        ("fixed_height", c_int32),
        ("fixed_width", c_int32),
        ("fixed_flip", c_int32),
        ("flip_probability", c_double),
        ("max_pixels", c_int64),
        ("table", c_void_p),
    ]


class CKey(Structure):
    """The key of a sample's random draws; fields as ``imseq_key``."""

    _fields_ = [("seed", c_uint64), ("epoch", c_int64), ("sample", c_int64)]


class Sample(Structure):
    """One of several samples that are decoded together; fields as ``imseq_sample``."""

    _fields_ = [
        ("key", CKey),
        ("bytes", c_void_p),
        ("size", c_int64),
        ("row", c_void_p),
        ("flags", c_uint32),
        ("status", c_int32),
    ]


class Times(Structure):
    """Time of each step of decoding, in ticks of the processor's counter; as ``imseq_times``."""

    _fields_ = [
        ("header", c_int64),
        ("markers", c_int64),
        ("entropy", c_int64),
        ("idct", c_int64),
        ("colour", c_int64),
        ("resize", c_int64),
        ("store", c_int64),
    ]


class View(Structure):
    """The geometry drawn for one image; fields as ``imseq_view``, in pixels."""

    _fields_ = [
        ("top", c_int32),
        ("left", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("resized_height", c_int32),
        ("resized_width", c_int32),
        ("window_top", c_int32),
        ("window_left", c_int32),
        ("flip", c_int32),
    ]


class Header(Structure):
    """A JPEG's header; fields as ``imseq_header``."""

    _fields_ = [
        ("width", c_int32),
        ("height", c_int32),
        ("num_components", c_int32),
        ("h_sampling", c_int32 * 4),
        ("v_sampling", c_int32 * 4),
        ("restart_interval", c_int32),
        ("progressive", c_int32),
        ("supported", c_int32),
        ("entropy_offset", c_int64),
    ]


class CEngineConfig(Structure):
    """The settings of an engine; fields as ``imseq_engine_config``."""

    _fields_ = [
        ("num_decoders", c_int32),
        ("num_readers", c_int32),
        ("num_slots", c_int32),
        ("rows", c_int32),
        ("verify_checksums", c_int32),
        ("direct", c_int32),
        ("row_bytes", c_int64),
        ("block_budget_bytes", c_int64),
        ("disk_lock", c_char_p),
        ("kept", c_void_p),
        ("kept_bytes", c_int64),
        ("kept_keys", c_int64),
        ("kept_floor_bytes", c_int64),
        ("record_requests", c_int32),
        ("reserved", c_int32),
        ("recipe", CRecipe),
    ]


class CPlan(Structure):
    """One rank's plan of an epoch; fields as ``imseq_plan``."""

    _fields_ = [
        ("seed", c_uint64),
        ("epoch", c_int64),
        ("num_positions", c_int64),
        ("num_batches", c_int64),
        ("num_blocks", c_int64),
        ("num_files", c_int64),
        ("slot_rows", c_int64),
        ("batch_begin", c_void_p),
        ("sample", c_void_p),
        ("draw", c_void_p),
        ("block", c_void_p),
        ("offset", c_void_p),
        ("length", c_void_p),
        ("checksum", c_void_p),
        ("flags", c_void_p),
        ("block_file", c_void_p),
        ("block_offset", c_void_p),
        ("block_length", c_void_p),
        ("block_key", c_void_p),
        ("window_begin", c_void_p),
        ("num_windows", c_int64),
        ("root", c_char_p),
        ("paths", c_void_p),
        ("path_begin", c_void_p),
    ]


class Batch(Structure):
    """A finished batch; fields as ``imseq_batch``."""

    _fields_ = [
        ("batch", c_int64),
        ("begin", c_int64),
        ("end", c_int64),
        ("slot", c_int32),
        ("reserved", c_int32),
    ]


class Task(Structure):
    """A python row or block; fields as ``imseq_task``."""

    _fields_ = [
        ("kind", c_int32),
        ("slot", c_int32),
        ("ticket", c_int64),
        ("position", c_int64),
        ("sample", c_int64),
        ("draw", c_int64),
        ("batch", c_int64),
        ("row_index", c_int64),
        ("row", c_void_p),
        ("bytes", c_void_p),
        ("size", c_int64),
        ("prefix_done", c_int32),
        ("reserved", c_int32),
    ]

    def encoded(self) -> bytes:
        """Return a copy of the encoded image, for a row that the core did not decode."""
        return ctypes.string_at(self.bytes, self.size)


class CStats(Structure):
    """An engine's counters; fields as ``imseq_stats``."""

    _fields_ = [
        (name, c_int64)
        for name in (
            "read_bytes",
            "read_requests",
            "read_seeks",
            "read_ns",
            "read_wait_ns",
            "read_lock_wait_ns",
            "read_direct_requests",
            "read_lookups",
            "read_cached_bytes",
            "read_kept_bytes",
            "decode_samples",
            "decode_ns",
            "decode_wait_read_ns",
            "decode_wait_batch_ns",
            "python_rows",
            "python_blocks",
            "batch_count",
            "batch_wait_ns",
            "block_bytes",
            "block_bytes_peak",
            "kept_bytes",
            "kept_blocks",
            "block_budget_bytes",
        )
    ]


class Pending(Structure):
    """A read that the operating system has not answered; fields as ``imseq_pending``."""

    _fields_ = [("age_ns", c_int64), ("offset", c_int64), ("path", c_char * 512)]


class Request(Structure):
    """A range that was read from a file; fields as ``imseq_request``."""

    _fields_ = [
        ("epoch", c_int64),
        ("file", c_int64),
        ("offset", c_int64),
        ("length", c_int64),
        ("direct", c_int32),
        ("locked", c_int32),
        ("cached", c_int32),
        ("reserved", c_int32),
    ]


_ERROR, _RECIPE, _KEY = POINTER(CError), POINTER(CRecipe), POINTER(CKey)

# name -> (result, arguments)
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "imseq_abi": (c_int32, []),
    "imseq_build_info": (c_char_p, []),
    "imseq_cpu": (c_char_p, []),
    "imseq_use_cpu": (c_int32, [c_char_p, _ERROR]),
    "imseq_read_header": (c_int32, [c_void_p, c_size_t, POINTER(Header), _ERROR]),
    "imseq_draw": (c_int32, [_RECIPE, _KEY, c_int32, c_int32, POINTER(View), _ERROR]),
    "imseq_decode": (c_int32, [_RECIPE, _KEY, c_void_p, c_size_t, c_uint32, c_void_p, _ERROR]),
    "imseq_decode_group": (c_int32, [_RECIPE, POINTER(Sample), c_int32, POINTER(Times), _ERROR]),
    "imseq_apply": (c_int32, [_RECIPE, _KEY, c_void_p, c_int32, c_int32, c_void_p, _ERROR]),
    "imseq_transcode": (
        c_int32,
        [
            c_void_p,
            c_size_t,
            c_int32,
            c_uint32,
            c_void_p,
            c_void_p,
            c_size_t,
            POINTER(c_size_t),
            POINTER(Header),
            _ERROR,
        ],
    ),
    "imseq_count_symbols": (c_int32, [c_void_p, c_size_t, c_int32, c_void_p, _ERROR]),
    "imseq_fit_tables": (c_int32, [c_void_p, c_void_p, _ERROR]),
    "imseq_crc32c": (c_uint32, [c_uint32, c_void_p, c_size_t]),
    "imseq_engine_create": (c_int32, [POINTER(CEngineConfig), POINTER(c_void_p), _ERROR]),
    "imseq_look_up": (c_int32, [c_char_p, c_void_p, c_void_p, _ERROR]),
    "imseq_preallocate": (c_int32, [c_int32, c_int64, _ERROR]),
    "imseq_kept_table_bytes": (c_int64, [c_int64]),
    "imseq_engine_prepare": (c_int32, [c_void_p, POINTER(CPlan), _ERROR]),
    "imseq_engine_start": (c_int32, [c_void_p, POINTER(CPlan), POINTER(c_void_p), _ERROR]),
    "imseq_engine_next": (c_int32, [c_void_p, c_int64, POINTER(Batch), _ERROR]),
    "imseq_engine_release": (c_int32, [c_void_p, c_int32, c_void_p, _ERROR]),
    "imseq_engine_cancel": (c_int32, [c_void_p, _ERROR]),
    "imseq_engine_stats": (c_int32, [c_void_p, POINTER(CStats), _ERROR]),
    "imseq_engine_pending": (c_int32, [c_void_p, POINTER(Pending), _ERROR]),
    "imseq_engine_requests": (c_int32, [c_void_p, POINTER(Request), c_int64, c_void_p, _ERROR]),
    "imseq_engine_close": (c_int32, [c_void_p, _ERROR]),
    "imseq_engine_destroy": (None, [c_void_p]),
    "imseq_engine_take": (c_int32, [c_void_p, c_int64, POINTER(Task), _ERROR]),
    "imseq_engine_finish_row": (c_int32, [c_void_p, c_int64, c_char_p, _ERROR]),
    "imseq_engine_finish_block": (
        c_int32,
        [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_char_p, _ERROR],
    ),
}


def _load() -> ctypes.CDLL:
    # Developers set IMAGENET_SEQ_LIBRARY: to a build folder, or a build with sanitizers.
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = os.environ.get("IMAGENET_SEQ_LIBRARY") or str(
        Path(__file__).parents[1] / f"libimagenet_seq.{suffix}"
    )
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"imagenet_seq: cannot load its native library {path}: {error}. "
            "Reinstall the package: pip install --force-reinstall, with the folder of its sources."
        ) from error
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
        if name == "imseq_abi" and function() != ABI:
            raise ImportError(
                f"imagenet_seq: {path} has ABI {function()}, this Python code needs ABI {ABI}: "
                "files of two versions are mixed; reinstall the package."
            )
    return library


lib = _load()

_EXCEPTIONS: dict[int, type[Exception]] = {
    ERROR_ARGUMENT: ValueError,
    ERROR_MEMORY: MemoryError,
    ERROR_DATA: DataError,
    ERROR_SAMPLE: SampleError,
    ERROR_FORK: ForkError,
}


def check(status: int, error: CError, name_of_sample: Any = None) -> int:
    """Return a status of zero or above; raise an exception for a negative one.

    Args:
        status: result of a native function.
        error: the error struct that was passed to the function.
        name_of_sample: function from a sample's number to its name, for the message; may be None.

    Raises:
        OSError: the operating system reported an error.
        SampleError, DataError, ForkError, ValueError, MemoryError: depending on the status.
    """
    if status >= 0:
        return status
    message = error.message.decode("utf-8", "replace")
    sample, name = error.sample, ""
    if sample >= 0:
        name = name_of_sample(sample) if name_of_sample else ""
        message = f"sample {sample}{f' ({name})' if name else ''}: {message}"
    if status == ERROR_READ and error.os_errno:
        raise OSError(error.os_errno, f"{message}: {os.strerror(error.os_errno)}")
    exception = _EXCEPTIONS.get(status, ImagenetSeqError)
    if sample >= 0 and issubclass(exception, DataError):
        raise SampleError(message, sample, name)
    raise exception(message)
