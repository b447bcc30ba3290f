"""Types of arrays, and operations on long ones in slices that fit the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import IntArray

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_SLICE = 1 << 16


def index_dtype(size: int) -> type[np.signedinteger[Any]]:
    """Return the narrowest type that holds places below `size`."""
    return np.int32 if size < 1 << 31 else np.int64


def slices(size: int, overlap: int = 0) -> Iterator[slice]:
    """Cut range(size) into slices; each also has the last `overlap` elements of the one before."""
    for first in range(0, size, _SLICE):
        yield slice(max(0, first - overlap), min(first + _SLICE, size))


def changes(values: IntArray) -> npt.NDArray[np.bool_]:
    """Return for each element whether it differs from the one before; True for the first."""
    result = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=result[1:])
    return result


def gather(column: IntArray, chosen: IntArray, dtype: type[np.signedinteger[Any]]) -> IntArray:
    """Return column[chosen] as dtype; a view where the column is one broadcast value."""
    if column.strides == (0,) and len(column):
        return np.broadcast_to(column[:1].astype(dtype), len(chosen))
    gathered: IntArray = np.empty(len(chosen), dtype)
    for part in slices(len(chosen)):
        gathered[part] = column[chosen[part]]
    return gathered
