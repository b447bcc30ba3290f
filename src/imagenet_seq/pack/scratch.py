"""Files that packing writes: scratch for dealt samples, their journal, and shards."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.pack.files import reserve, sync, write_through, write_whole
from imagenet_seq.pack.io_log import NO_LOG, IoLog
from imagenet_seq.sources.formats.pack import Encoded

_READ_BYTES = 8 << 20


_MAX_BUFFER_BYTES = 16 << 20
"""A longer append saves a hard disk little more, and a kill loses what was not yet written."""


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


class Buckets:
    """Scratch files that samples are appended to through large buffers.

    The fullest buffers are written first: appends are then twice as long as with a fixed share of
    the memory for each, half of which would be empty.

    Args:
        folder: where the files lie.
        prefix: of the files' names.
        memory_bytes: bound on all buffers together.
        expected_bytes: what each bucket will hold, at most, as far as is known; that much is
            reserved on the disk.
        on_flush: called with the rows of buffers after these have been written.
        waits: whether to go on only when what was written is on the disk. A disk with one head is
            otherwise sent from the write to the source and back for every MB: a kernel lets waiting
            reads pass, of which there is never more than one.
        log: of requests.
    """

    def __init__(
        self,
        folder: str,
        prefix: str,
        memory_bytes: int,
        expected_bytes: Mapping[int, int],
        on_flush: Callable[[npt.NDArray[np.void]], None],
        waits: bool = False,
        log: IoLog = NO_LOG,
    ) -> None:
        self._folder = folder
        self._prefix = prefix
        self._memory_bytes = memory_bytes
        self._expected_bytes = expected_bytes
        self._on_flush = on_flush
        self._waits = waits
        self._log = log
        self._buffers: dict[int, bytearray] = {}
        self._buffered_bytes = 0
        self._pending: dict[int, list[tuple[int, ...]]] = {}
        self._ends: dict[int, int] = {}
        self._reserved: set[int] = set()

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
        self._buffered_bytes += len(encoded.data)
        buffer += encoded.data
        data, width, height, crc, flags = encoded
        image = (sample, offset, len(data), bucket, width, height, crc, flags, 0)
        row = (*image, source_length, source_mtime_ns)
        self._pending.setdefault(bucket, []).append(row)
        if self._buffered_bytes >= self._memory_bytes or len(buffer) >= _MAX_BUFFER_BYTES:
            self._flush(self._fullest())

    def _fullest(self) -> list[int]:
        """Return the buckets to write when memory is full.

        So many at a time that a disk's head moves least: with B buckets, k at a time, the journal
        and the way back to the source, it moves k + 2 times for a kth part of 2 / (B + k) of the
        memory. (k + 2)(B + k) / k is least at k = sqrt(2 B).
        """
        fullest = sorted(self._buffers, key=lambda bucket: -len(self._buffers[bucket]))
        return fullest[: math.isqrt(2 * len(self._expected_bytes))]

    def flush(self) -> None:
        """Write what is still in buffers."""
        self._flush(list(self._buffers))

    def _flush(self, buckets: list[int]) -> None:
        rows: list[tuple[int, ...]] = []
        try:
            for bucket in sorted(buckets):
                # An interrupt may have come between the two steps of `append`: then the buffer's
                # end has no row, and nobody will read it.
                buffer, mine = self._buffers.pop(bucket), self._pending.pop(bucket, [])
                self._buffered_bytes -= len(buffer)
                self._write(bucket, buffer)
                rows += mine
            if self._waits:
                # When all are under way: the file system then commits its journal once for all.
                for bucket in buckets:
                    sync(self.path(bucket))
        finally:  # a bucket that could not be written must not cost those that were
            if rows:
                self._on_flush(np.array(rows, DEALT))

    def _write(self, bucket: int, content: bytearray) -> None:
        path, end = self.path(bucket), self._ends.get(bucket, 0)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
            if bucket not in self._reserved:
                reserve(file, path, self._expected_bytes[bucket], self._log)
                self._reserved.add(bucket)
            file.seek(end)
            write_through(file, path, content, self._log)
        self._ends[bucket] = end + len(content)

    def load(self, bucket: int) -> memoryview:
        """Read a bucket's file whole, in one sequential run."""
        try:
            with open(self.path(bucket), "rb", buffering=0) as file:
                content = memoryview(file.readall())
        except FileNotFoundError:
            return memoryview(b"")
        self._log.note("read", self.path(bucket), 0, len(content))
        return content

    def read(self, bucket: int, rows: npt.NDArray[np.void]) -> Iterator[tuple[Any, memoryview]]:
        """Yield rows, which must ascend by offset, with their data: one run over the file."""
        if not len(rows):
            return  # nothing was ever written there
        begin, end = rows["offset"], rows["offset"] + rows["length"]
        first = 0
        with open(self.path(bucket), "rb", buffering=0) as file:
            while first < len(rows):
                last = int(np.searchsorted(end, begin[first] + _READ_BYTES))
                last = max(last, first + 1)
                at, size = int(begin[first]), int(end[last - 1] - begin[first])
                file.seek(at)
                piece = memoryview(file.read(size))
                self._log.note("read", self.path(bucket), at, len(piece))
                for row in rows[first:last]:
                    place = int(row["offset"]) - at
                    yield row, piece[place : place + int(row["length"])]
                first = last

    def remove(self, bucket: int) -> None:
        """Delete a bucket's file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(bucket))
            self._log.note("delete", self.path(bucket), 0, 0)


class Journal:
    """What has been dealt, appended after buffers were written to their buckets.

    A batch of rows is preceded by its number of rows and its CRC-32C: what a kill tore is
    recognised and cut off. Buckets are not synced: after a power failure the images' own CRC tells
    what is missing, and that is read from the source again.
    """

    _HEADER = struct.Struct("<4sII")
    _MAGIC = b"dlt2"

    def __init__(self, path: str, log: IoLog = NO_LOG) -> None:
        self._path = path
        self._log = log
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
        content = self._encode(rows)
        with open(self._path, "ab") as file:
            self._log.note("write", self._path, file.tell(), len(content))
            file.write(content)
        self._batches.append(rows)

    def rows(self) -> npt.NDArray[np.void]:
        """Return all rows, in the order they were added."""
        return np.concatenate([np.empty(0, DEALT), *self._batches])

    def _encode(self, rows: npt.NDArray[np.void]) -> bytes:
        content = rows.tobytes()
        return self._HEADER.pack(self._MAGIC, len(rows), native.crc32c(content)) + content

    def _read(self, file: BinaryIO) -> Iterator[npt.NDArray[np.void]]:
        while len(header := file.read(self._HEADER.size)) == self._HEADER.size:
            magic, num_rows, crc = self._HEADER.unpack(header)
            content = file.read(num_rows * DEALT.itemsize) if magic == self._MAGIC else b""
            if not content or len(content) % DEALT.itemsize or native.crc32c(content) != crc:
                return
            yield np.frombuffer(content, DEALT)
