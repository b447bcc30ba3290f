"""Files that packing writes: scratch for dealt samples, their journal, and shards."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq import _native


class Encoded(NamedTuple):
    """An image as it will be stored; `flags` and unknown sizes as in a row of the index."""

    data: memoryview
    width: int
    height: int
    crc32c: int
    flags: int


_READ_BYTES = 8 << 20

DEALT = np.dtype(
    [
        ("sample", "<i8"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("bucket", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("crc32c", "<u4"),
        ("flags", "<u4"),
        ("reserved", "<u4"),
        ("source_length", "<i8"),
        ("source_mtime_ns", "<i8"),
    ]
)
"""One dealt sample: where it lies in the scratch file of its bucket, and what it is.

`source_length` and `source_mtime_ns` tell a source file that was replaced meanwhile: it is dealt
again."""


def encoded_from(data: memoryview, row: Any) -> Encoded:
    """Return a dealt sample of row `row` whose bytes are `data`."""
    fields = (int(row[key]) for key in ("width", "height", "crc32c", "flags"))
    return Encoded(data, *fields)


class Buckets:
    """Scratch files that samples are appended to through large buffers.

    Args:
        folder: where the files lie.
        prefix: of the files' names.
        buffer_bytes: a bucket is written when its buffer has grown to this.
        on_flush: called with the rows of a buffer after it has been written.
    """

    def __init__(
        self,
        folder: str,
        prefix: str,
        buffer_bytes: int,
        on_flush: Callable[[npt.NDArray[np.void]], None],
    ) -> None:
        self._folder = folder
        self._prefix = prefix
        self._buffer_bytes = buffer_bytes
        self._on_flush = on_flush
        self._buffers: dict[int, bytearray] = {}
        self._pending: dict[int, list[tuple[int, ...]]] = {}
        self._ends: dict[int, int] = {}

    def path(self, bucket: int) -> str:
        """Return the file of a bucket; it appears with the first flush."""
        return os.path.join(self._folder, f"{self._prefix}-{bucket:06d}")

    def set_end(self, bucket: int, end: int) -> None:
        """Continue a bucket that has `end` good bytes; what follows them is cut off."""
        if os.path.exists(self.path(bucket)):
            os.truncate(self.path(bucket), end)
        self._ends[bucket] = end

    def append(
        self, bucket: int, sample: int, encoded: Encoded, source_length: int, source_mtime_ns: int
    ) -> None:
        """Add a sample; its bytes are copied."""
        buffer = self._buffers.setdefault(bucket, bytearray())
        offset = self._ends.get(bucket, 0) + len(buffer)
        buffer += encoded.data
        data, width, height, crc, flags = encoded
        image = (sample, offset, len(data), bucket, width, height, crc, flags, 0)
        row = (*image, source_length, source_mtime_ns)
        self._pending.setdefault(bucket, []).append(row)
        if len(buffer) >= self._buffer_bytes:
            self._flush(bucket)

    def flush(self) -> None:
        """Write what is still in buffers."""
        for bucket in list(self._buffers):
            self._flush(bucket)

    def _flush(self, bucket: int) -> None:
        # An interrupt may have come between the two steps of `append`: then the buffer's end has no
        # row, and nobody will read it.
        buffer, rows = self._buffers.pop(bucket), self._pending.pop(bucket, [])
        with open(self.path(bucket), "ab") as file:
            file.write(buffer)
        self._ends[bucket] = self._ends.get(bucket, 0) + len(buffer)
        if rows:
            self._on_flush(np.array(rows, DEALT))

    def load(self, bucket: int) -> memoryview:
        """Read a bucket's file whole, in one sequential run."""
        try:
            with open(self.path(bucket), "rb", buffering=0) as file:
                return memoryview(file.readall())
        except FileNotFoundError:
            return memoryview(b"")

    def read(self, bucket: int, rows: npt.NDArray[np.void]) -> Iterator[tuple[Any, memoryview]]:
        """Yield rows, which must ascend by offset, with their data: one run over the file."""
        if not len(rows):
            return  # nothing was ever written there
        with open(self.path(bucket), "rb", buffering=_READ_BYTES) as file:
            for row in rows:
                file.seek(int(row["offset"]))
                yield row, memoryview(file.read(int(row["length"])))

    def remove(self, bucket: int) -> None:
        """Delete a bucket's file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(bucket))


class Journal:
    """What has been dealt, appended after every buffer that was written to its bucket.

    A batch of rows is preceded by its number of rows and its CRC-32C: what a kill tore is
    recognised and cut off. Buckets are not synced: after a power failure the images' own CRC tells
    what is missing, and that is read from the source again.
    """

    _HEADER = struct.Struct("<4sII")
    _MAGIC = b"dlt2"

    def __init__(self, path: str) -> None:
        self._path = path
        self._batches: list[npt.NDArray[np.void]] = []

    def recover(self) -> None:
        """Read the batches that are whole; `rewrite` must follow before anything is added."""
        try:
            with open(self._path, "rb") as file:
                self._batches = list(self._read(file))
        except FileNotFoundError:
            return

    def rewrite(self, rows: npt.NDArray[np.void]) -> None:
        """Replace the journal by one that holds `rows`, whole or not at all."""
        self._batches = [rows] if len(rows) else []
        content = b"".join(map(self._encode, self._batches))
        write_whole(self._path, content)

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """Append rows whose data is in its bucket."""
        with open(self._path, "ab") as file:
            file.write(self._encode(rows))
        self._batches.append(rows)

    def rows(self) -> npt.NDArray[np.void]:
        """Return all rows, in the order they were added."""
        return np.concatenate([np.empty(0, DEALT), *self._batches])

    def _encode(self, rows: npt.NDArray[np.void]) -> bytes:
        content = rows.tobytes()
        return self._HEADER.pack(self._MAGIC, len(rows), _native.crc32c(content)) + content

    def _read(self, file: BinaryIO) -> Iterator[npt.NDArray[np.void]]:
        while len(header := file.read(self._HEADER.size)) == self._HEADER.size:
            magic, num_rows, crc = self._HEADER.unpack(header)
            content = file.read(num_rows * DEALT.itemsize) if magic == self._MAGIC else b""
            if not content or len(content) % DEALT.itemsize or _native.crc32c(content) != crc:
                return
            yield np.frombuffer(content, DEALT)


class ShardFile:
    """A file written in large pieces, synced at the end, whose size and CRC-32C are known."""

    _PIECE_BYTES = 4 << 20

    def __init__(self, path: str) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # closed by __exit__
        self._buffer = bytearray()
        self.size = 0
        self.crc32c = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are copied."""
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= self._PIECE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self.crc32c = _native.crc32c(memoryview(self._buffer), self.crc32c)
        left = memoryview(self._buffer)
        while left:
            left = left[self._file.write(left) :]
        self._buffer = bytearray()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
                os.fsync(self._file.fileno())


def write_whole(path: str, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with open(path + ".tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def sync_folder(folder: str) -> None:
    """Make renames in a folder last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
