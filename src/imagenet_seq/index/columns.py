"""The index stage: a dataset on disk as columns over N samples.

Columns are NumPy arrays, memory-mapped if they come from a file, so that eight ranks of a training
job share one copy and 14 million samples open in a moment. Names, samples and targets look like
lists of Python objects; they are lazy sequences over those columns.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.column_file import read_columns, slices, write_columns

IntArray = npt.NDArray[np.integer[Any]]


class Names(Sequence[str]):
    """Immutable sequence of strings, stored as one array of bytes; strings are made on access.

    String i is `os.fsdecode(blob[begin[i]:begin[i + 1]])`, so file names need not be UTF-8.

    Attributes:
        blob: bytes of all strings (uint8, read-only).
        begin: `len + 1` ascending positions in `blob` (int64, read-only); need not start at 0.

    Raises:
        TypeError: if an array has another dtype or shape.
    """

    __slots__ = ("begin", "blob")

    def __init__(self, blob: npt.NDArray[np.uint8], begin: npt.NDArray[np.int64]) -> None:
        self.blob: npt.NDArray[np.uint8] = _column("blob of names", blob, np.uint8)
        self.begin: npt.NDArray[np.int64] = _column("begin of names", begin, np.int64)
        if not len(begin):
            raise TypeError("begin of names: expected len + 1 positions, got none")

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> Names:
        """Encode strings with `os.fsencode`."""
        encoded = [os.fsencode(string) for string in strings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), _begin_of(lengths))

    @classmethod
    def concatenate(cls, parts: Sequence[Names]) -> Names:
        """Concatenate several sequences of names."""
        if not parts:
            return cls.from_strings(())
        blob = np.concatenate([part.used() for part in parts])
        return cls(blob, _begin_of(np.concatenate([np.diff(part.begin) for part in parts])))

    def used(self) -> npt.NDArray[np.uint8]:
        """Return the part of `blob` that the names take."""
        return self.blob[self.begin[0] : self.begin[-1]]

    def __len__(self) -> int:
        return len(self.begin) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(np.arange(start, stop, step, dtype=np.int64))
            return Names(self.blob, self.begin[start : max(start, stop) + 1])
        i = _position(index, len(self))
        return os.fsdecode(self.blob[self.begin[i] : self.begin[i + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        # In slices: one call into NumPy for many names instead of three for each.
        for names in slices(len(self)):
            begin = self.begin[names.start : names.stop + 1]
            part = self.blob[begin[0] : begin[-1]].tobytes()
            ends = (begin - begin[0]).tolist()
            for i in range(len(ends) - 1):
                yield os.fsdecode(part[ends[i] : ends[i + 1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names):
            return NotImplemented
        return (
            len(self) == len(other)
            and np.array_equal(np.diff(self.begin), np.diff(other.begin))
            and np.array_equal(self.used(), other.used())
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content, which may be gigabytes

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Names([{shown}{', ...' if len(self) > 3 else ''}], len={len(self)})"

    def take(self, indices: npt.ArrayLike) -> Names:
        """Return the names at `indices` (integers in [0, len)), in that order.

        Time and memory are proportional to the bytes copied: 0.8 s for a million names of 33 bytes.
        """
        chosen = _indices(indices, len(self))
        lengths = np.empty(len(chosen), np.int64)
        for part in slices(len(chosen)):
            lengths[part] = self.begin[chosen[part] + 1] - self.begin[chosen[part]]
        begin = _begin_of(lengths)
        blob = np.empty(begin[-1], np.uint8)
        for part in slices(len(chosen)):
            # Output byte k comes from k + shift, where all bytes of a name have one shift.
            first, last = begin[part.start], begin[part.stop]
            shift = np.repeat(self.begin[chosen[part]] - begin[part], lengths[part])
            blob[first:last] = self.blob[shift + np.arange(first, last)]
        return Names(blob, begin)


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of a dataset as immutable columns; element i of each belongs to sample i.

    Arrays are converted to the stated dtypes (without a copy if they have them already, so columns
    may be strided views of a memory-mapped structured array) and made read-only. Shapes are checked
    here; call `validate` to check the values of columns that come from a file.

    For a source of python blocks `file` is the number of the block that holds the sample,
    `offset` its ordinal in the block and `length` the bytes of the encoded image.

    Args:
        file: number of the file in `files` that holds the sample (int32).
        offset: byte in the file where the sample begins (int64).
        name: what the source calls the sample; unique. For files, the path relative to `root`.
        root: folder that `files` are relative to.
        files: path of each file.
        classes: names of the classes, by label.
        length: bytes of the sample (int64); -1 or None: unknown, up to the end of the file.
        label: class of the sample (int32); -1 or None: unknown.
        width: width of the image in pixels (int32); -1 or None: unknown.
        height: height of the image in pixels (int32); -1 or None: unknown.
        checksum: CRC-32C of the sample's bytes (uint32), or None.
        flags: IMSEQ_SAMPLE_... of core/imagenet_seq.h (uint8), or None.
        known_id: the `id` if it is already known, else it is computed on first use.

    Raises:
        TypeError: if a column is not a one-dimensional array of integers.
        ValueError: if columns differ in length.
    """

    file: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    name: Names
    root: str
    files: Names
    classes: tuple[str, ...] = ()
    length: npt.NDArray[np.int64] | None = None
    label: npt.NDArray[np.int32] | None = None
    width: npt.NDArray[np.int32] | None = None
    height: npt.NDArray[np.int32] | None = None
    checksum: npt.NDArray[np.uint32] | None = None
    flags: npt.NDArray[np.uint8] | None = None
    known_id: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", os.fspath(self.root))
        object.__setattr__(self, "classes", tuple(self.classes))
        for column, dtype in _COLUMNS.items():
            values = getattr(self, column)
            if values is None:
                if column in _MANDATORY:
                    raise TypeError(f"column '{column}' is mandatory, got None")
                continue
            values = _column(f"column '{column}'", values, dtype)
            if len(values) != len(self.name):
                raise ValueError(
                    f"column '{column}' has {len(values)} elements for {len(self.name)} names"
                )
            object.__setattr__(self, column, values)

    def __len__(self) -> int:
        return len(self.name)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.name)

    @functools.cached_property
    def id(self) -> str:
        """Hex digest of names, labels, offsets, lengths and class names.

        The path is not in it: a dataset that is moved keeps its id, its order and saved states.
        Computed from the raw column bytes (about 1 s for 14 million samples) unless already known.
        """
        return self.known_id or _digest(self)

    @functools.cached_property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class name."""
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def samples(self) -> Samples:
        """Lazy sequence of (path, label), as in torchvision's ImageFolder."""
        return Samples(self)

    @property
    def targets(self) -> Targets:
        """Lazy sequence of labels, as in torchvision's ImageFolder; `np.asarray` is free."""
        return Targets(self)

    def take(self, indices: npt.ArrayLike) -> Index:
        """Return the index of the samples at `indices`, in that order (like torch's Subset)."""
        chosen = _indices(indices, len(self))
        columns = {column: values[chosen] for column, values in self._columns().items()}
        return replace(self, **columns, name=self.name.take(chosen), known_id=None)

    def validate(self, where: str) -> None:
        """Check the values of all columns; call it for columns that come from a file.

        Args:
            where: path of the file that the columns were read from, for the message.

        Raises:
            DataError: naming the column, the sample and the value.
        """
        _validate_names(self.name, "name", where)
        if self.files is not self.name:
            _validate_names(self.files, "files", where)
        if not self.files.blob.all():
            raise DataError(f"{where}: a path in 'files' contains a zero byte")
        if len(set(self.classes)) != len(self.classes):
            raise DataError(f"{where}: class names repeat")
        _validate_range(self.file, "file", 0, len(self.files), where)
        _validate_range(self.offset, "offset", 0, 1 << 62, where)
        _validate_range(self.length, "length", -1, 1 << 62, where)
        _validate_range(self.label, "label", -1, len(self.classes), where)
        _validate_range(self.width, "width", -1, 1 << 31, where)
        _validate_range(self.height, "height", -1, 1 << 31, where)

    def _columns(self) -> dict[str, Any]:
        return {key: values for key in _COLUMNS if (values := getattr(self, key)) is not None}

    def to_columns(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return (header, columns) for `write_columns`; `from_columns` is the inverse."""
        columns = self._columns()
        columns["name.blob"], columns["name.begin"] = self.name.blob, self.name.begin
        if self.files is not self.name:
            columns["files.blob"], columns["files.begin"] = self.files.blob, self.files.begin
        header = {"root": self.root, "classes": list(self.classes), "id": self.id}
        return header, columns

    @classmethod
    def from_columns(
        cls, header: Mapping[str, Any], columns: Mapping[str, npt.NDArray[Any]], where: str
    ) -> Index:
        """Rebuild an index from what `to_columns` returned; every value is checked.

        Raises:
            DataError: if something in it is wrong; says what.
        """
        root, classes, known_id = (header.get(key) for key in ("root", "classes", "id"))
        if not isinstance(root, str) or not isinstance(known_id, str):
            raise DataError(
                f"{where}: header: expected strings 'root' and 'id', got {header!r:.200}"
            )
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise DataError(
                f"{where}: header: expected a list of class names, got {classes!r:.200}"
            )
        try:
            name = files = Names(columns["name.blob"], columns["name.begin"])
            if "files.blob" in columns:
                files = Names(columns["files.blob"], columns["files.begin"])
            there = [key for key in _COLUMNS if key in columns or key in _MANDATORY]
            index = cls(
                **{column: columns[column] for column in there},
                name=name,
                root=root,
                files=files,
                classes=tuple(classes),
                known_id=known_id,
            )
        except KeyError as error:
            raise DataError(f"{where}: column {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {error}") from error
        index.validate(where)
        return index

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file, atomically; `Index.open` maps it into memory."""
        header, columns = self.to_columns()
        write_columns(path, header, columns)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Index:
        """Map an index written by `save` into memory and check every value in it.

        Raises:
            DataError: if the file is damaged or no index.
            OSError: if it can't be read.
        """
        header, columns = read_columns(path)
        return cls.from_columns(header, columns, os.fspath(path))


_COLUMNS: dict[str, type[np.integer[Any]]] = {
    "file": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "label": np.int32,
    "width": np.int32,
    "height": np.int32,
    "checksum": np.uint32,
    "flags": np.uint8,
}
_MANDATORY = ("file", "offset")


class Samples(Sequence[tuple[str, int]]):
    """Lazy sequence of (path, label) over an index; label -1 if unknown."""

    __slots__ = ("_index",)

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, int] | list[tuple[str, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return os.path.join(self._index.root, self._index.name[index]), self._index.targets[index]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for name, label in zip(self._index.name, self._index.targets, strict=True):
            yield os.path.join(self._index.root, name), label

    def __repr__(self) -> str:
        return f"Samples(len={len(self)}, root={self._index.root!r})"


class Targets(Sequence[int]):
    """Lazy sequence of labels over an index; -1 if unknown. `np.asarray` returns the column."""

    __slots__ = ("_label",)

    def __init__(self, index: Index) -> None:
        unknown = np.broadcast_to(np.int32(-1), len(index))
        self._label = unknown if index.label is None else index.label

    def __len__(self) -> int:
        return len(self._label)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            labels: list[int] = self._label[index].tolist()
            return labels
        return int(self._label[_position(index, len(self))])

    def __iter__(self) -> Iterator[int]:
        for part in slices(len(self)):
            yield from self._label[part].tolist()

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        if copy:
            return np.array(self._label, dtype)
        return np.asarray(self._label, dtype)

    def __repr__(self) -> str:
        return f"Targets(len={len(self)})"


# ---- details -------------------------------------------------------------------------------------


def _column(what: str, values: npt.ArrayLike, dtype: type[np.integer[Any]]) -> npt.NDArray[Any]:
    """Return `values` as a read-only array of dtype: a view, or a cast without loss."""
    array = _integers(what, values)
    if array.dtype != dtype:
        cast = array.astype(dtype)
        if not np.array_equal(cast, array):
            raise TypeError(f"{what}: values of {array.dtype} don't fit {np.dtype(dtype)}")
        array = cast
    view = array.view()
    view.flags.writeable = False
    return view


def _integers(what: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(
            f"{what}: expected a one-dimensional array of integers, "
            f"got shape {array.shape} of {array.dtype}"
        )
    return array


def _begin_of(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    begin = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=begin[1:])
    return begin


def _position(index: int, size: int) -> int:
    i = index.__index__()
    if not -size <= i < size:
        raise IndexError(f"index {i} of a sequence of {size}")
    return i % size


def _indices(indices: npt.ArrayLike, size: int) -> IntArray:
    chosen = _integers("indices", indices)
    if chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < size:
        raise IndexError(f"expected indices in [0, {size}), got {chosen.min()} to {chosen.max()}")
    return chosen.astype(np.int64, copy=False)


def _digest(index: Index) -> str:
    digest = hashlib.sha256(b"imagenet-seq index 1\0")
    digest.update(json.dumps([len(index), list(index.classes)]).encode("ascii"))
    columns: dict[str, Any] = {"name": index.name.used(), "name.begin": index.name.begin}
    columns |= {column: getattr(index, column) for column in ("label", "file", "offset", "length")}
    for column, values in columns.items():
        if values is None:
            continue
        digest.update(column.encode("ascii"))
        first = values[0] if column == "name.begin" else 0
        for part in slices(len(values)):
            chosen = values[part] - first if first else values[part]
            digest.update(np.ascontiguousarray(chosen, chosen.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def _validate_names(names: Names, column: str, where: str) -> None:
    begin, size = names.begin, len(names.blob)
    descending = ", descending somewhere" if np.any(begin[1:] < begin[:-1]) else ""
    if begin[0] < 0 or begin[-1] > size or descending:
        raise DataError(
            f"{where}: '{column}': expected positions ascending in [0, {size}], "
            f"got {begin[0]} to {begin[-1]}{descending}"
        )


def _validate_range(values: IntArray | None, column: str, first: int, end: int, where: str) -> None:
    if values is None or not len(values):
        return
    for sample in (int(values.argmin()), int(values.argmax())):
        if not first <= int(values[sample]) < end:
            raise DataError(
                f"{where}: column '{column}' of sample {sample}: "
                f"expected a value in [{first}, {end}), got {values[sample]}"
            )
