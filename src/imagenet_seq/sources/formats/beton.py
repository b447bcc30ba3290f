"""FFCV's .beton files, whose tables say where each image lies and what its label is.

    header         version 2, number of fields, page size, number of samples, where the table
                   of allocations begins
    fields         for each: type, name (16 bytes), arguments (1024 bytes)
    metadata       for each sample: its fields, aligned as in C; for an image: mode, width, height,
                   where its data begin
    data           in pages; JPEGs, or pixels
    allocations    for each piece of data: sample, where it begins, its bytes; up to the file's end

The index is made from the tables alone. JPEGs are byte ranges of the file. If a file has raw
pixels, all its samples come in python blocks, the pixels as PPM.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read.turns import Turns
from imagenet_seq.sources.images import ppm_header
from imagenet_seq.sources.place import Found, Opening, Place
from imagenet_seq.sources.scan import Problems

LOOKS_FOR = "FFCV's files: train.beton, val.beton"
_EXTENSIONS = (".beton", ".ffcv")
_VERSION = 2
_HEADER = struct.Struct("<HHIQQ")
_FIELD = struct.Struct("<B16s1024x")
_IMAGE, _INT = 2, 1
_JPEG, _RAW = 0, 1
_IMAGE_ROW = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("begin", "<u8")])
_PIECE_ROW = np.dtype([("begin", "<u8"), ("size", "<u8")])

_FIELD_ROWS = {
    0: np.dtype("<f8"), _INT: np.dtype("<i8"), _IMAGE: _IMAGE_ROW, 3: _PIECE_ROW,
    4: np.dtype("<u8"), 5: _PIECE_ROW, 6: np.dtype("<u8"),
}  # fmt: skip
"""Metadata of each type of field: float, int, image, bytes, array, JSON, tensor."""

_ALLOCATION = np.dtype([("sample", "<u8"), ("begin", "<u8"), ("size", "<u8")])
_MAX_FIELDS = 256
_BLOCK_BYTES = 8 << 20


# ---- finding -------------------------------------------------------------------------------------


def find(place: Place) -> Found | str | None:
    """Recognise a .beton file, alone or in a folder."""
    names = [name for name in place.files if name.endswith(_EXTENSIONS)]
    if not place.is_folder and len(place.files) == 1:
        names = list(place.files)
    if not names:
        return None
    paths = place.of_split(names)
    if len(paths) > 1:
        shown = ", ".join(map(os.path.basename, paths))
        raise ValueError(f"{place.path} holds several .beton files: {shown}. Pass the path of one")
    if not paths:
        return f"holds {', '.join(names)}, but no .beton file of split {place.split}"
    [path] = paths
    is_named_so = path.endswith(_EXTENSIONS)
    try:
        with open(path, "rb") as file:
            header = _header(file)
    except DataError as error:
        return str(error) if is_named_so else None
    if not is_named_so and not header.is_whole:  # any file may begin with a 2
        return None
    what = f"FFCV's {os.path.basename(path)}"
    return Found("beton", what, lambda how: _open(path, how), [path])


class _Header(NamedTuple):
    """The header of a file, and its size."""

    num_fields: int
    num_samples: int
    allocations_begin: int
    file_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether the tables lie within the file."""
        tables_bytes = _HEADER.size + self.num_fields * _FIELD.size + self.num_samples
        return tables_bytes <= self.allocations_begin <= self.file_bytes


def _header(file: BinaryIO) -> _Header:
    data = file.read(_HEADER.size)
    file_bytes = os.fstat(file.fileno()).st_size
    if len(data) < _HEADER.size:
        raise DataError(f"{file.name}: expected a .beton file, got one of {file_bytes} bytes")
    version, num_fields, _, num_samples, allocations_begin = _HEADER.unpack(data)
    if version != _VERSION or not 0 < num_fields <= _MAX_FIELDS:
        raise DataError(
            f"{file.name}: expected a .beton file of version {_VERSION} with 1 to {_MAX_FIELDS} "
            f"fields, got version {version} and {num_fields} fields"
        )
    return _Header(num_fields, num_samples, allocations_begin, file_bytes)


# ---- the tables ----------------------------------------------------------------------------------


class _Tables(NamedTuple):
    """What the tables say about each sample; a size of 0 means no data."""

    image: npt.NDArray[Any]  # _IMAGE_ROW
    label: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]


def _read_tables(path: str) -> tuple[_Header, _Tables]:
    """Read everything but the data."""
    with open(path, "rb") as file:
        header = _header(file)
        if not header.is_whole:
            raise DataError(
                f"{path}: expected data of {header.num_samples} samples and then a table of "
                f"allocations at offset {header.allocations_begin}, but the file has "
                f"{header.file_bytes} bytes: it is truncated, or was not written to its end; write "
                "it again"
            )
        fields = [_FIELD.unpack(file.read(_FIELD.size)) for _ in range(header.num_fields)]
        image, label = _places(path, fields)
        row = np.dtype([(f"f{i}", _FIELD_ROWS[field[0]]) for i, field in enumerate(fields)], True)
        rows = _table(file, row, header.num_samples, header.allocations_begin)
        file.seek(header.allocations_begin)
        rest, most = header.file_bytes - file.tell(), header.num_samples * header.num_fields
        count, beyond = divmod(rest, _ALLOCATION.itemsize)
        if beyond or count > most:
            raise DataError(
                f"{path}: offset {header.allocations_begin}: expected a table of at most "
                f"{most} allocations of {_ALLOCATION.itemsize} "
                f"bytes up to the end of the file, got {rest} bytes: it is truncated or damaged"
            )
        allocations = _table(file, _ALLOCATION, count, header.file_bytes)
    images = rows[f"f{image}"]
    return header, _Tables(images, rows[f"f{label}"], _sizes(allocations, images["begin"]))


def _places(path: str, fields: Sequence[tuple[int, bytes]]) -> tuple[int, int]:
    """Return which field is the image and which one the label."""
    kinds = [kind for kind, _ in fields]
    names = [raw.split(b"\0")[0].decode("ascii", "replace") for _, raw in fields]
    images, labels = ([i for i, kind in enumerate(kinds) if kind == of] for of in (_IMAGE, _INT))
    if len(labels) > 1:
        labels = [i for i in labels if names[i] == "label"]
    if set(kinds) - _FIELD_ROWS.keys() or len(images) != 1 or len(labels) != 1:
        shown = ", ".join(
            f"'{name}' (type {kind})" for name, kind in zip(names, kinds, strict=True)
        )
        raise DataError(
            f"{path}: expected fields of FFCV's own types, among them one image (type {_IMAGE}) "
            f"and one integer (type {_INT}), or one called 'label'; got {shown}"
        )
    return images[0], labels[0]


def _table(file: BinaryIO, row: np.dtype[Any], count: int, end: int) -> npt.NDArray[Any]:
    """Read `count` rows that must end by `end`."""
    begin = file.tell()
    if count * row.itemsize > end - begin:
        raise DataError(
            f"{file.name}: offset {begin}: expected {count} rows of {row.itemsize} bytes, but "
            f"there are only {end - begin} bytes: it is damaged"
        )
    rows = np.fromfile(file, row, count)
    if len(rows) != count:
        raise DataError(f"{file.name}: was cut short while it was read")
    return rows


def _sizes(allocations: npt.NDArray[Any], begin: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the bytes allocated at the place where each sample's image begins; 0: none."""
    # Not the empty ones, which begin where the next one does.
    allocations = allocations[allocations["size"] > 0]
    order = np.argsort(allocations["begin"], kind="stable")
    begins, sizes = allocations["begin"][order], allocations["size"][order]
    if not len(begins):
        return np.zeros(len(begin), np.int64)
    found = np.searchsorted(begins, begin).clip(max=len(begins) - 1)
    sizes = np.minimum(sizes, np.uint64(1 << 62)).astype(np.int64)
    return np.where(begins[found] == begin, sizes[found], 0)


# ---- opening -------------------------------------------------------------------------------------


def _open(path: str, how: Opening) -> Source:
    scanned = indexed("beton", path, [path], lambda: _scan(path, how), how.on_error)
    index, notes, permuted = scanned.index, scanned.notes, is_permuted(scanned.index)
    if not scanned.extra:
        return Source("beton", index, permuted=permuted, notes=notes)
    parts = _Parts.of(path, index, scanned.extra)
    return _RawSource(
        "beton", index, permuted=permuted, notes=notes, path=path, parts=parts, turns=Turns(path)
    )


def _scan(path: str, how: Opening) -> Scanned:
    """Make the index from the tables; a file with raw pixels has further columns."""
    header, tables = _read_tables(path)
    problems = Problems(how.on_error)
    kept = _sound(path, header.allocations_begin, tables, problems)
    if not kept.any():
        raise DataError(f"{path}: expected images, found none")
    image, label = tables.image[kept], tables.label[kept].astype(np.int32)
    is_raw = image["mode"] == _RAW
    numbered = zip(np.flatnonzero(kept).tolist(), is_raw.tolist(), strict=True)
    names = Names.from_strings(f"{i:08d}.{'ppm' if raw else 'jpg'}" for i, raw in numbered)
    index = Index(
        file=np.zeros(len(label), np.int32),
        offset=image["begin"].astype(np.int64),
        name=names,
        root=os.path.dirname(path),
        files=Names.from_strings([os.path.basename(path)]),
        classes=classes_of(label, names),
        length=tables.size[kept],
        label=label,
        width=image["width"].astype(np.int32),
        height=image["height"].astype(np.int32),
    )
    extra: dict[str, npt.NDArray[Any]] = {}
    if is_raw.any():
        extra = {"begin": index.offset, "is_raw": is_raw.astype(np.uint8)}
        index = _in_blocks(index, is_raw)
    return Scanned(index, extra, problems.messages, problems.count)


def _sound(path: str, data_end: int, tables: _Tables, problems: Problems) -> npt.NDArray[np.bool_]:
    """Report samples that are damaged; return which ones are not."""
    image, label, size = tables
    begin = image["begin"]
    last = data_end - np.minimum(size, data_end)
    pixels_bytes: npt.NDArray[np.int64] = 3 * image["width"].astype(np.int64) * image["height"]
    has_place = (size > 0) & (begin >= _HEADER.size) & (begin <= last.astype(np.uint64))
    has_mode = (image["mode"] == _JPEG) | (image["mode"] == _RAW)
    has_size = (pixels_bytes > 0) & ((image["mode"] != _RAW) | (size == pixels_bytes))
    has_label = (label >= 0) & (label < MAX_CLASSES)
    sound: npt.NDArray[np.bool_] = has_place & has_mode & has_size & has_label
    for i in np.flatnonzero(~sound).tolist():
        mode, width, height, at = image[i].tolist()
        if not has_place[i]:
            what = f"its data, allocated before {data_end}, got offset {at}"
        elif not has_mode[i]:
            what = f"mode {_JPEG} (JPEG) or {_RAW} (pixels), got {mode}"
        elif not has_size[i]:
            what = f"an image, got one of {width} x {height} pixels in {size[i]} bytes"
        else:
            what = f"a label in [0, {MAX_CLASSES}), got {label[i]}"
        problems.report(f"{path}: sample {i}: expected {what}")
    return sound


def _in_blocks(index: Index, is_raw: npt.NDArray[np.bool_]) -> Index:
    """Return the index of a source of python blocks, each of samples that lie together."""
    assert index.length is not None
    order = np.argsort(index.offset, kind="stable")
    # By their bytes, not their places: a damaged file may put many samples at one place.
    size = index.length[order]
    block = (np.cumsum(size) - size) // _BLOCK_BYTES
    _, first, number = np.unique(block, return_index=True, return_inverse=True)
    file, ordinal = np.empty(len(order), np.int32), np.empty(len(order), np.int64)
    file[order] = number
    ordinal[order] = np.arange(len(order)) - first[number]
    return dataclasses.replace(
        index,
        file=file,
        offset=ordinal,
        length=index.length + np.where(is_raw, _header_bytes(index), 0),
        files=Names.from_strings([index.files[0]] * len(first)),  # one for each block
    )


def _header_bytes(index: Index) -> npt.NDArray[np.int64]:
    """Return the length of `ppm_header` for each sample."""
    digits = sum(
        1 + sum((values >= 10**k).astype(np.int64) for k in range(1, 5))
        for values in (index.width, index.height)
        if values is not None
    )
    return np.asarray(digits + len(ppm_header(0, 0)) - 2, np.int64)


class _Parts(NamedTuple):
    """Where the samples of all blocks lie in the file, block after block."""

    begin: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]  # including the header
    header: npt.NDArray[np.int64]  # bytes of the header; 0: a JPEG
    width: npt.NDArray[np.int64]
    height: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]  # first sample of each block; then their number

    @classmethod
    def of(cls, path: str, index: Index, extra: Mapping[str, npt.NDArray[Any]]) -> _Parts:
        """Sort samples by blocks, and check the cached index, which may be damaged."""
        assert index.length is not None
        assert index.width is not None
        assert index.height is not None
        order = np.lexsort((index.offset, index.file))
        begin, length = extra["begin"][order], index.length[order]
        header = np.where(extra["is_raw"] != 0, _header_bytes(index), 0)[order]
        end = begin + length - header
        if (begin < 0).any() or (length < header).any() or (end > os.path.getsize(path)).any():
            raise DataError(f"{path}: its cached index is damaged: delete the index")
        first = np.searchsorted(index.file[order], np.arange(len(index.files) + 1))
        width, height = (size[order].astype(np.int64) for size in (index.width, index.height))
        return cls(begin, length, header, width, height, first)


@dataclass(frozen=True, eq=False, kw_only=True)
class _RawSource(Source):
    """A file with pixels; a block is a run of samples that lie together."""

    path: str
    parts: _Parts
    turns: Turns
    python_blocks: bool = True

    def read_block(self, number: int) -> Block:
        """Read the samples of a block, and put headers in front of pixels."""
        run = slice(*self.parts.first[number : number + 2])
        begin, lengths, header, width, height = (column[run] for column in self.parts[:-1])
        offsets = np.cumsum(lengths) - lengths
        data = np.empty(int(lengths.sum()), np.uint8)
        rows = np.stack([begin, offsets, lengths, header, width, height], axis=1).tolist()
        with self.turns, open(self.path, "rb", buffering=0) as file:
            for at, offset, length, skip, *size in rows:
                if skip:
                    data.data[offset : offset + skip] = ppm_header(*size)
                file.seek(at)
                _read_into(file, data.data[offset + skip : offset + length])
        return Block(data, offsets, lengths)


def _read_into(file: io.FileIO, room: memoryview) -> None:
    while room:
        num_read = file.readinto(room)
        if not num_read:
            raise DataError(
                f"{file.name}: expected {len(room)} more bytes at offset {file.tell()}, but the "
                "file ends: it was cut short since it was opened"
            )
        room = room[num_read:]
