"""Parquet files as on the Hugging Face hub: a row is a sample, a row group a python block.

The images of a row group are compressed together, so a row group is the unit of reading. Labels and
paths are columns of their own, and indexing reads only those.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read.turns import Turns
from imagenet_seq.sources.formats import huggingface as hf
from imagenet_seq.sources.place import Found, Opening, Place

LOOKS_FOR = "Parquet files of Hugging Face: columns image (bytes, path) and label"
_MAGIC = b"PAR1"


def find(place: Place) -> Found | str | None:
    """Recognise Parquet files by their names and the first one's first bytes."""
    for at in hf.places(place):
        names = [name for name in at.files if name.endswith(".parquet") or not at.is_folder]
        if not names:
            continue
        paths = hf.files_of(at, names)
        if not paths:
            return f"{at.path} holds Parquet files, but none of split {place.split!r}"
        if hf.begins_with(paths[0], _MAGIC):
            what = f"{len(paths)} Parquet files, {os.path.basename(paths[0])} first"
            return Found("parquet", what, functools.partial(_open, at, paths), paths)
        if paths[0].endswith(".parquet"):
            return f"{paths[0]} does not begin with PAR1, as Parquet does: it is damaged"
        return None
    return None


@dataclass(frozen=True, eq=False, kw_only=True)
class _ParquetSource(Source):
    """A source whose blocks are row groups."""

    group: npt.NDArray[np.int32]  # number of each block's row group in its file
    column: str  # name of the column of images
    turns: Turns
    versions: dict[str, tuple[int, int]]  # as opened: another version has other labels
    metadata: dict[str, Any] = field(default_factory=dict)  # parsing it takes as long as 20 photos
    python_blocks: bool = True

    def read_block(self, number: int) -> Block:
        """Read and decompress the images of a row group."""
        name = self.index.files[number]
        path = os.path.join(self.index.root, name)
        if _version(path) != self.versions[name]:
            raise DataError(
                f"{path}: was replaced or written to since it was opened: open the data set again"
            )
        known = self.metadata.get(name)
        with hf.damage(path, "Parquet"), _opened(path, self.turns, known) as file:
            self.metadata[name] = file.metadata
            return _images_of(file, int(self.group[number]), self.column)


def _version(path: str) -> tuple[int, int]:
    """Return size and modification time (ns) of a file."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _opened(path: str, turns: Turns | None = None, metadata: Any = None) -> Iterator[Any]:
    """Open a file for one thread: pyarrow's files must not be shared between threads."""
    with open(path, "rb", buffering=0) as raw:
        file = _InTurns(raw, turns) if turns and turns.are_needed else raw
        yield hf.import_pyarrow(path, "pyarrow.parquet").ParquetFile(file, metadata=metadata)


class _InTurns:
    """A file that threads read in turns: a hard disk is slow if several read at once."""

    def __init__(self, raw: io.FileIO, turns: Turns) -> None:
        self._raw, self._turns = raw, turns
        self.seek, self.tell, self.close = raw.seek, raw.tell, raw.close

    def read(self, size: int = -1) -> bytes:
        with self._turns:
            return self._raw.read(size)

    @property
    def closed(self) -> bool:
        return self._raw.closed


def _images_of(file: Any, group: int, column: str) -> Block:
    # The engine's threads call this; more threads would not help.
    table = file.read_row_group(group, columns=[f"{column}.bytes"], use_threads=False)
    blocks = [_images_in(part) for part in table.column(0).chunks]
    if len(blocks) == 1:
        return blocks[0]
    # None, or several if they have more than 2 GB.
    begins = np.cumsum([0, *(len(block.bytes) for block in blocks)])
    offsets = (block.offsets + begin for block, begin in zip(blocks, begins, strict=False))
    return Block(
        np.concatenate([np.zeros(0, np.uint8), *(block.bytes for block in blocks)]),
        np.concatenate([begins[:0], *offsets]),
        np.concatenate([begins[:0], *(block.lengths for block in blocks)]),
    )


def _images_in(structs: Any) -> Block:
    block = hf.images_in(structs.field(0))
    block.lengths[hf.nulls_of(structs)] = 0
    return block


# ---- indexing ------------------------------------------------------------------------------------


def _open(place: Place, paths: Sequence[str], how: Opening) -> Source:
    scanned = hf.index_files("parquet", place, paths, how, _scan_file)
    index = scanned.index
    with hf.damage(paths[0], "Parquet"), _opened(paths[0]) as file:
        column = hf.columns_of(file.schema_arrow, paths[0]).image
    return _ParquetSource(
        "parquet",
        index,
        permuted=is_permuted(index),
        notes=scanned.notes,
        group=scanned.extra["group"].astype(np.int32),
        column=column,
        turns=Turns(paths[0]),
        versions={name: _version(os.path.join(index.root, name)) for name in set(index.files)},
    )


class _Group(NamedTuple):
    """A row group: its number, and what the file's metadata say about it."""

    number: int
    num_rows: int
    image_bytes: int  # after decompression
    has_nulls: bool  # whether the file says that some rows have no image


def _scan_file(scan: hf.Scan, path: str) -> None:
    """Read the labels and paths of a file."""
    with _opened(path) as file:
        columns = scan.begin(path, file.schema_arrow)
        for group in _groups_of(file.metadata, columns.image):
            scan.files.append(os.path.basename(path))
            scan.group.append(group.number)
            scan.largest_group_bytes = max(scan.largest_group_bytes, group.image_bytes)
            _scan_group(scan, file, columns, group)


def _scan_group(scan: hf.Scan, file: Any, columns: hf.Columns, group: _Group) -> None:
    wanted = [columns.label, *([f"{columns.image}.path"] if columns.has_path else [])]
    table = file.read_row_group(group.number, columns=wanted, use_threads=False).combine_chunks()
    num_rows = group.num_rows
    if len(table) != num_rows:
        raise ValueError(f"row group {group.number}: expected {num_rows} rows, got {len(table)}")
    if not num_rows:
        return
    images = functools.cache(lambda: _images_of(file, group.number, columns.image))
    missing = images().lengths == 0 if group.has_nulls else np.zeros(num_rows, np.bool_)
    labels = table.column(columns.label).chunk(0)
    structs = table.column(columns.image).chunk(0) if columns.has_path else None
    paths = structs and structs.field("path")
    scan.add(np.arange(num_rows), np.full(num_rows, -1), missing, labels, paths, images)


def _groups_of(metadata: Any, image: str) -> list[_Group]:
    """Return a file's row groups, as its metadata describes them."""
    groups = []
    for number in range(metadata.num_row_groups):
        about = metadata.row_group(number)
        columns = [about.column(i) for i in range(about.num_columns)]
        wanted = [column for column in columns if column.path_in_schema == f"{image}.bytes"]
        if [column.physical_type for column in wanted] != ["BYTE_ARRAY"]:
            # Asked for the statistics of another type, pyarrow would end the process.
            raise ValueError(f"row group {number}: expected one column {image}.bytes of bytes")
        [data] = wanted
        # If the file does not say, reading the row will show it.
        known = data.is_stats_set and data.statistics.has_null_count
        has_nulls = known and data.statistics.null_count > 0
        groups.append(_Group(number, about.num_rows, data.total_uncompressed_size, has_nulls))
    return groups
