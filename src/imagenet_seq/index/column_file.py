"""Files of columns: written atomically, and mapped into memory."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError

_MAGIC = b"imseqix1"
_ALIGNMENT = 64
_SLICE = 1 << 16
"""Elements converted at once; temporary arrays of a whole column would take much memory."""


def slices(size: int) -> Iterator[slice]:
    """Yield slices that cover [0, size), short enough for temporary arrays."""
    for first in range(0, size, _SLICE):
        yield slice(first, min(first + _SLICE, size))


def write_columns(
    path: str | os.PathLike[str], header: Mapping[str, Any], columns: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write a header, which JSON can express, and one-dimensional arrays to one file, atomically.

    The file gets its name by a rename when everything is on disk: a reader sees the old file or the
    new one, and a process that has the old one mapped keeps it. An array whose elements share one
    place in memory (`np.broadcast_to`) is stored as one element.

    Layout: magic (8 bytes), length of the JSON text (little-endian uint64), JSON text, arrays in
    little-endian order at multiples of 64 bytes counted from the end of the text's padding.
    """
    stored = {
        name: values[:1] if values.strides == (0,) else values for name, values in columns.items()
    }
    table, end = {}, 0
    for name, values in stored.items():
        table[name] = {
            "dtype": values.dtype.newbyteorder("<").str,
            "offset": end,
            "size": len(columns[name]),
            "stored": len(values),
        }
        end += _padded(values.nbytes)
    text = json.dumps({"header": dict(header), "columns": table, "bytes": end}).encode("ascii")
    prefix = _MAGIC + len(text).to_bytes(8, "little") + text

    folder, base = os.path.split(os.path.abspath(os.fspath(path)))
    temporary = os.path.join(folder, f".{base}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(prefix.ljust(_padded(len(prefix)), b"\0"))
            for values in stored.values():
                for part in slices(len(values)):
                    file.write(values[part].astype(values.dtype.newbyteorder("<")).data)
                file.write(bytes(_padded(values.nbytes) - values.nbytes))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_columns(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Map a file of `write_columns` into memory; return the header and read-only arrays.

    Raises:
        DataError: if the file is damaged, or not such a file.
        OSError: if it can't be read.
    """
    with open(path, "rb") as file:
        prefix = file.read(16)
        if len(prefix) < 16 or prefix[:8] != _MAGIC:
            raise DataError(
                f"{path}: expected a file that begins with {_MAGIC!r}, got {prefix[:8]!r}; "
                "delete it and let it be written again"
            )
        size = os.fstat(file.fileno()).st_size
        text_bytes = int.from_bytes(prefix[8:], "little")
        if text_bytes > size - 16:
            raise DataError(f"{path}: header of {text_bytes} bytes in a file of {size} bytes")
        text = file.read(text_bytes)
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    try:
        described = json.loads(text)
        header, table, data_bytes = (described[key] for key in ("header", "columns", "bytes"))
        if not isinstance(header, dict) or not isinstance(table, dict):
            raise ValueError("expected objects 'header' and 'columns'")
        data = mapped[_padded(16 + text_bytes) :]
        if len(data) != data_bytes:
            raise ValueError(f"expected {data_bytes} bytes of columns, got {len(data)}")
        return header, {name: _mapped_column(data, entry) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: damaged header: {type(error).__name__}: {error}; "
            "delete the file and let it be written again"
        ) from error


def _mapped_column(data: npt.NDArray[np.uint8], entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    dtype, offset, size, stored = (entry[key] for key in ("dtype", "offset", "size", "stored"))
    if dtype not in ("|u1", "<u4", "<i4", "<i8"):
        raise ValueError(f"dtype {dtype!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, size, stored)):
        raise ValueError(f"expected sizes >= 0, got {entry!r:.200}")
    end = offset + stored * np.dtype(dtype).itemsize
    if offset % _ALIGNMENT or end > len(data):
        raise ValueError(f"bytes {offset} to {end} of {len(data)}")
    values: npt.NDArray[Any] = data[offset:end].view(dtype)
    if stored == size:
        return values
    if stored != 1:
        raise ValueError(f"{stored} elements stored for {size}")
    return np.broadcast_to(values, size)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
