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
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read.turns import Turns
from imagenet_seq.sources.formats import huggingface as hf
from imagenet_seq.sources.place import Found, Opening, Place
from imagenet_seq.text import progress_bar

LOOKS_FOR = "Parquet files of Hugging Face: columns image (bytes, path) and label"
_MAGIC = b"PAR1"
_LARGE_GROUP_BYTES = 256 << 20


def find(place: Place) -> Found | str | None:
    """Recognise Parquet files by their names and the first one's first bytes.

    Raises:
        SplitNeededError: if there are several splits and none was given.
    """
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


@dataclass(frozen=True, eq=False)
class _ParquetSource(Source):
    """A source whose blocks are row groups.

    Attributes:
        group: for each block, the number of its row group in the file.
        column: name of the column of images.
        turns: held while reading from a hard disk.
        metadata: of the files read so far; parsing it takes as long as reading 20 photos.
        versions: of the files when they were opened: another version has other labels.
    """

    group: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    column: str = "image"
    turns: Turns | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, _Version] = field(default_factory=dict)

    def read_block(self, number: int) -> Block:
        """Read and decompress the images of a row group."""
        path = os.path.join(self.index.root, self.index.files[number])
        if _version(path) != self.versions[path]:
            raise DataError(
                f"{path}: was replaced or written to since it was opened: open the data set again"
            )
        known = self.metadata.get(path)
        with hf.damage(path, "Parquet"), _opened(path, self.turns, known) as file:
            self.metadata[path] = file.metadata
            return _images_of(file, int(self.group[number]), self.column)


_Version = tuple[int, int]


def _version(path: str) -> _Version:
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
    sizes = [len(block.bytes) for block in blocks]  # several if they have more than 2 GB
    shifts = np.cumsum([0, *sizes[:-1]])
    return Block(
        np.concatenate([block.bytes for block in blocks] or [np.zeros(0, np.uint8)]),
        np.concatenate(
            [b.offsets + shift for b, shift in zip(blocks, shifts, strict=False)] or [shifts[:0]]
        ),
        np.concatenate([block.lengths for block in blocks] or [shifts[:0]]),
    )


def _images_in(structs: Any) -> Block:
    block = hf.images_in(structs.field(0))
    block.lengths[hf.nulls_of(structs)] = 0
    return block


# ---- indexing ------------------------------------------------------------------------------------


def _open(place: Place, paths: Sequence[str], how: Opening) -> Source:
    hf.import_pyarrow(paths[0])
    if place.is_folder:
        hf.check_complete(paths)
    scanned = indexed(
        "parquet",
        place.path,
        paths,
        lambda: _scan(place.folder, paths, how),
        how.on_error,
    )
    versions = {
        os.path.join(scanned.index.root, name): _version(os.path.join(scanned.index.root, name))
        for name in set(scanned.index.files)
    }
    with hf.damage(paths[0], "Parquet"), _opened(paths[0]) as file:
        column = hf.columns_of(file.schema_arrow, paths[0]).image
    return _ParquetSource(
        "parquet",
        scanned.index,
        permuted=is_permuted(scanned.index),
        python_blocks=True,
        notes=scanned.notes,
        group=scanned.extra["group"].astype(np.int32),
        column=column,
        turns=Turns(paths[0]),
        versions=versions,
    )


class _Group(NamedTuple):
    """A row group.

    Attributes:
        number: its number in the file.
        first_row: number of its first row in the file.
        num_rows: number of rows.
        image_bytes: bytes of its images after decompression.
        has_nulls: whether the file says that some rows have no image.
    """

    number: int
    first_row: int
    num_rows: int
    image_bytes: int
    has_nulls: bool


def _scan(root: str, paths: Sequence[str], how: Opening) -> Scanned:
    """Read the labels and paths of all files."""
    scan = hf.Scan(root, how.on_error)
    groups: list[_Group] = []
    files: list[str] = []
    sizes = [os.path.getsize(path) for path in paths]
    with progress_bar(
        f"index {os.path.basename(root)}", sum(sizes), unit="B", enabled=how.progress, delay_s=1
    ) as bar:
        for path, size in zip(paths, sizes, strict=True):
            with hf.damage(path, "Parquet"), _opened(path) as file:
                columns = scan.columns(file.schema_arrow, path)
                found = _groups_of(file.metadata, columns.image)
                for block, group in enumerate(found, len(groups)):
                    _scan_group(scan, path, file, columns, block, group)
            groups += found
            files += [os.path.basename(path)] * len(found)
            bar.update(size)
    largest_bytes = max((group.image_bytes for group in groups), default=0)
    remarks = [_too_large(root, largest_bytes)] if largest_bytes > _LARGE_GROUP_BYTES else []
    return scan.scanned(files, remarks, group=np.array([group.number for group in groups]))


def _scan_group(
    scan: hf.Scan, path: str, file: Any, columns: hf.Columns, block: int, group: _Group
) -> None:
    wanted = [columns.label, *([f"{columns.image}.path"] if columns.has_path else [])]
    table = file.read_row_group(group.number, columns=wanted, use_threads=False).combine_chunks()
    if len(table) != group.num_rows:
        raise ValueError(
            f"row group {group.number}: expected {group.num_rows} rows, got {len(table)}"
        )
    if not group.num_rows:
        return
    images = functools.cache(lambda: _images_of(file, group.number, columns.image))
    missing = images().lengths == 0 if group.has_nulls else np.zeros(group.num_rows, np.bool_)
    part = hf.Part(
        path,
        group.first_row,
        block,
        offset=np.arange(group.num_rows),
        length=np.full(group.num_rows, -1),
        missing=missing,
        begins=lambda row: hf.begin_of(images(), row),
    )
    structs = table.column(columns.image).chunk(0) if columns.has_path else None
    scan.add(part, table.column(columns.label).chunk(0), structs and structs.field("path"))


def _too_large(root: str, group_bytes: int) -> str:
    return (
        f"{root}: its row groups have up to {group_bytes >> 20} MB, which are read and held as a "
        "whole: 'imagenet-seq pack' makes a pack of it that is read in smaller blocks"
    )


def _groups_of(metadata: Any, image: str) -> list[_Group]:
    """Return a file's row groups, as its metadata describes them."""
    groups, first_row = [], 0
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
        groups.append(
            _Group(number, first_row, about.num_rows, data.total_uncompressed_size, has_nulls)
        )
        first_row += about.num_rows
    return groups
