"""Scratch files that samples are dealt to, and the journal of what was dealt."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.pack.files import reserve, sync, write_through, write_whole
from imagenet_seq.pack.io_log import NO_LOG, IoLog
from imagenet_seq.sources.formats.pack import Encoded

_READ_BYTES = 8 << 20
_MAX_BUFFER_BYTES = 16 << 20
"""Longer appends would save a hard disk little, and a kill loses what is buffered."""

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
"""One dealt sample: its place in the scratch file of its bucket, and what the index will need.

`source_length` and `source_mtime_ns` tell whether the source file was replaced since; then it is
dealt again."""


@dataclass
class Buckets:
    """Scratch files that samples are appended to through large buffers.

    The fullest buffers are written first. Appends are then twice as long as with a fixed share of
    the memory for each buffer, half of which would be empty.

    Args:
        folder: where the files lie.
        prefix: of the files' names.
        memory_bytes: bound on all buffers together.
        expected_bytes: estimated maximum of each bucket; that much is reserved on the disk.
        on_flush: called with the rows of buffers after these have been written.
        waits: whether a flush ends only when its bytes are on the disk. Set it where the source
            lies on the same hard disk: the kernel gives reads priority over writes, and the head
            would move between both for every MB.
        log: of requests.
    """

    folder: str
    prefix: str
    memory_bytes: int
    expected_bytes: Mapping[int, int]
    on_flush: Callable[[npt.NDArray[np.void]], None]
    waits: bool = False
    log: IoLog = NO_LOG

    def __post_init__(self) -> None:
        self._buffers: dict[int, bytearray] = {}
        self._buffered_bytes = 0
        self._pending: dict[int, list[tuple[int, ...]]] = {}
        self._ends: dict[int, int] = {}
        self._reserved: set[int] = set()

    def path(self, bucket: int) -> str:
        """Return the file of a bucket; the first flush makes it."""
        return os.path.join(self.folder, f"{self.prefix}-{bucket:06d}")

    def set_end(self, bucket: int, end: int) -> None:
        """Continue a bucket whose first `end` bytes are good; truncate the rest."""
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
        row = (sample, offset, len(data), bucket, width, height, crc, flags, 0)
        self._pending.setdefault(bucket, []).append((*row, source_length, source_mtime_ns))
        if self._buffered_bytes >= self.memory_bytes or len(buffer) >= _MAX_BUFFER_BYTES:
            self._flush(self._fullest())

    def _fullest(self) -> list[int]:
        """Return the buckets to write when memory is full: as many as cost the fewest seeks.

        Writing k of B buckets takes k + 2 seeks (with the journal and the way back to the source)
        and writes k times 2 / (B + k) of the memory. (k + 2)(B + k) / k is least at k = sqrt(2 B).
        """
        fullest = sorted(self._buffers, key=lambda bucket: -len(self._buffers[bucket]))
        return fullest[: math.isqrt(2 * len(self.expected_bytes))]

    def flush(self) -> None:
        """Write what is still in buffers."""
        self._flush(list(self._buffers))

    def _flush(self, buckets: list[int]) -> None:
        rows: list[tuple[int, ...]] = []
        try:
            for bucket in sorted(buckets):
                # After an interrupt inside `append`, the end of a buffer has no row; it is never
                # read.
                buffer, mine = self._buffers.pop(bucket), self._pending.pop(bucket, [])
                self._buffered_bytes -= len(buffer)
                self._write(bucket, buffer)
                rows += mine
            if self.waits:
                # After all writes have begun, so that the file system commits its journal once.
                for bucket in buckets:
                    sync(self.path(bucket))
        finally:  # where a bucket can't be written, those before it still count
            if rows:
                self.on_flush(np.array(rows, DEALT))

    def _write(self, bucket: int, content: bytearray) -> None:
        path, end = self.path(bucket), self._ends.get(bucket, 0)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
            if bucket not in self._reserved:
                reserve(file, path, self.expected_bytes[bucket], self.log)
                self._reserved.add(bucket)
            file.seek(end)
            write_through(file, path, content, self.log)
        self._ends[bucket] = end + len(content)

    def load(self, bucket: int) -> memoryview:
        """Read a bucket's whole file at once."""
        path = self.path(bucket)
        if not os.path.exists(path):
            return memoryview(b"")
        with open(path, "rb", buffering=0) as file:
            content = memoryview(file.readall())
        self.log.note("read", path, 0, len(content))
        return content

    def read(self, bucket: int, rows: npt.NDArray[np.void]) -> Iterator[tuple[Any, memoryview]]:
        """Yield rows with their data in one pass over the file; rows must ascend by offset."""
        if not len(rows):
            return  # there is no file
        begin, end = rows["offset"], rows["offset"] + rows["length"]
        first = 0
        with open(self.path(bucket), "rb", buffering=0) as file:
            while first < len(rows):
                last = int(np.searchsorted(end, begin[first] + _READ_BYTES))
                last = max(last, first + 1)
                at, size = int(begin[first]), int(end[last - 1] - begin[first])
                file.seek(at)
                piece = memoryview(file.read(size))
                self.log.note("read", self.path(bucket), at, len(piece))
                for row in rows[first:last]:
                    place = int(row["offset"]) - at
                    yield row, piece[place : place + int(row["length"])]
                first = last

    def remove(self, bucket: int) -> None:
        """Delete a bucket's file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(bucket))
            self.log.note("delete", self.path(bucket), 0, 0)


class Journal:
    """List of the dealt samples, appended to after each flush of buckets.

    Rows come in batches, each with its length and CRC-32C, so that a batch torn by a kill is
    recognised and dropped. Buckets need not be synced: after a power failure the images' own CRCs
    tell what is missing, and that is read from the source again.
    """

    _HEADER = struct.Struct("<4sII")
    _MAGIC = b"dlt2"

    def __init__(self, path: str, log: IoLog = NO_LOG) -> None:
        self._path = path
        self._log = log
        self._batches: list[npt.NDArray[np.void]] = []

    def recover(self) -> None:
        """Read the whole batches of an earlier run; `rewrite` must follow before `add`."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            self._batches = list(self._read(file))

    def rewrite(self, rows: npt.NDArray[np.void]) -> None:
        """Replace the journal atomically by one that holds `rows`."""
        self._batches = [rows] if len(rows) else []
        write_whole(self._path, b"".join(map(self._encode, self._batches)))

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """Append rows whose data was written to its bucket."""
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
