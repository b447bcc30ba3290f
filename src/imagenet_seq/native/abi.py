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
    byref,
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


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Return fields of one type, as C declares several of them at once."""
    return [(name, kind) for name in names.split()]


class CError(Structure):
    """What went wrong in a call; fields as ``imseq_error``."""

    _fields_ = [
        *_all(c_int32, "code os_errno"),
        *_all(c_int64, "sample offset"),
        ("message", c_char * 512),
    ]


class CRecipe(Structure):
    """What is done to every sample; fields as ``imseq_recipe``."""

    _fields_ = [
        *_all(c_int32, "geometry out_height out_width filter passes dtype layout strict"),
        *_all(c_double, "scale_min scale_max ratio_min ratio_max"),
        *_all(c_int32, "resize_height resize_width resize_max"),
        *_all(c_int32, "crop_height crop_width center_rule"),
        *_all(c_int32, "fixed_top fixed_left fixed_height fixed_width fixed_flip"),
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

    _fields_ = _all(c_int64, "header markers entropy idct colour resize store")


class View(Structure):
    """The geometry drawn for one image; fields as ``imseq_view``, in pixels."""

    _fields_ = _all(
        c_int32,
        "top left height width resized_height resized_width window_top window_left flip",
    )


class Header(Structure):
    """A JPEG's header; fields as ``imseq_header``."""

    _fields_ = [
        *_all(c_int32, "width height num_components"),
        *_all(c_int32 * 4, "h_sampling v_sampling"),
        *_all(c_int32, "restart_interval progressive supported"),
        ("entropy_offset", c_int64),
    ]


class CEngineConfig(Structure):
    """The settings of an engine; fields as ``imseq_engine_config``."""

    _fields_ = [
        *_all(c_int32, "num_decoders num_readers num_slots rows verify_checksums direct"),
        *_all(c_int64, "row_bytes block_budget_bytes"),
        ("disk_lock", c_char_p),
        ("kept", c_void_p),
        *_all(c_int64, "kept_bytes kept_keys kept_floor_bytes"),
        *_all(c_int32, "record_requests reserved"),
        ("recipe", CRecipe),
    ]


class CPlan(Structure):
    """One rank's plan of an epoch; fields as ``imseq_plan``."""

    _fields_ = [
        ("seed", c_uint64),
        *_all(c_int64, "epoch num_positions num_batches num_blocks num_files slot_rows"),
        *_all(c_void_p, "batch_begin sample draw block offset length checksum flags"),
        *_all(c_void_p, "block_file block_offset block_length block_key window_begin"),
        ("num_windows", c_int64),
        ("root", c_char_p),
        *_all(c_void_p, "paths path_begin"),
    ]


class Batch(Structure):
    """A finished batch; fields as ``imseq_batch``."""

    _fields_ = [*_all(c_int64, "batch begin end"), *_all(c_int32, "slot reserved")]


class Task(Structure):
    """A python row or block; fields as ``imseq_task``."""

    _fields_ = [
        *_all(c_int32, "kind slot"),
        *_all(c_int64, "ticket position sample draw batch row_index"),
        *_all(c_void_p, "row bytes"),
        ("size", c_int64),
        *_all(c_int32, "prefix_done reserved"),
    ]

    def encoded(self) -> bytes:
        """Return a copy of the encoded image, for a row that the core did not decode."""
        return ctypes.string_at(self.bytes, self.size)


class CStats(Structure):
    """An engine's counters; fields as ``imseq_stats``."""

    _fields_ = _all(
        c_int64,
        "read_bytes read_requests read_seeks read_ns read_wait_ns read_lock_wait_ns "
        "read_direct_requests read_lookups read_cached_bytes read_kept_bytes "
        "decode_samples decode_ns decode_wait_read_ns decode_wait_batch_ns "
        "python_rows python_blocks batch_count batch_wait_ns "
        "block_bytes block_bytes_peak kept_bytes kept_blocks block_budget_bytes",
    )


class Pending(Structure):
    """A read that the operating system has not answered; fields as ``imseq_pending``."""

    _fields_ = [*_all(c_int64, "age_ns offset"), ("path", c_char * 512)]


class Request(Structure):
    """A range that was read from a file; fields as ``imseq_request``."""

    _fields_ = [
        *_all(c_int64, "epoch file offset length"),
        *_all(c_int32, "direct locked cached reserved"),
    ]


_ERROR, _RECIPE, _KEY = POINTER(CError), POINTER(CRecipe), POINTER(CKey)
_BYTES: list[Any] = [c_void_p, c_size_t]

# name -> (result, arguments)
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "imseq_abi": (c_int32, []),
    "imseq_build_info": (c_char_p, []),
    "imseq_cpu": (c_char_p, []),
    "imseq_use_cpu": (c_int32, [c_char_p, _ERROR]),
    "imseq_read_header": (c_int32, [*_BYTES, POINTER(Header), _ERROR]),
    "imseq_draw": (c_int32, [_RECIPE, _KEY, c_int32, c_int32, POINTER(View), _ERROR]),
    "imseq_decode": (c_int32, [_RECIPE, _KEY, *_BYTES, c_uint32, c_void_p, _ERROR]),
    "imseq_decode_group": (c_int32, [_RECIPE, POINTER(Sample), c_int32, POINTER(Times), _ERROR]),
    "imseq_apply": (c_int32, [_RECIPE, _KEY, c_void_p, c_int32, c_int32, c_void_p, _ERROR]),
    "imseq_transcode": (
        c_int32,
        [*_BYTES, c_int32, c_uint32, c_void_p, *_BYTES, POINTER(c_size_t), POINTER(Header), _ERROR],
    ),
    "imseq_count_symbols": (c_int32, [*_BYTES, c_int32, c_void_p, _ERROR]),
    "imseq_fit_tables": (c_int32, [c_void_p, c_void_p, _ERROR]),
    "imseq_crc32c": (c_uint32, [c_uint32, *_BYTES]),
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


def check(status: int, error: CError, name_of: Any = None) -> int:
    """Return a status of zero or above; raise an exception for a negative one.

    `name_of`, if given, names the sample in the message.

    Raises:
        OSError: the operating system reported an error.
        SampleError, DataError, ForkError, ValueError, MemoryError: depending on the status.
    """
    if status >= 0:
        return status
    message = error.message.decode("utf-8", "replace")
    sample, name = error.sample, ""
    if sample >= 0:
        name = name_of(sample) if name_of else ""
        message = f"sample {sample}{f' ({name})' if name else ''}: {message}"
    if status == ERROR_READ and error.os_errno:
        raise OSError(error.os_errno, f"{message}: {os.strerror(error.os_errno)}")
    exception = _EXCEPTIONS.get(status, ImagenetSeqError)
    if sample >= 0 and issubclass(exception, DataError):
        raise SampleError(message, sample, name)
    raise exception(message)


def call(function: Any, *arguments: Any, name_of: Any = None) -> int:
    """Call a function of the core, whose last argument is the error, and `check` its status."""
    error = CError()
    return check(function(*arguments, byref(error)), error, name_of)
