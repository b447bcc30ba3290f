"""Files written in long sequential runs, and synced before they get their name."""

from __future__ import annotations

import io
import os

from imagenet_seq import native
from imagenet_seq.pack.io_log import NO_LOG, IoLog


class ShardFile:
    """A file written in large pieces and synced at the end.

    `expected_bytes`, its approximate size, are reserved on the disk while it is written.

    Attributes:
        size: bytes written so far.
        crc32c: CRC-32C of the file, once the `with` block has ended.
    """

    _PIECE_BYTES = 4 << 20

    def __init__(self, path: str, expected_bytes: int, log: IoLog = NO_LOG) -> None:
        self._path = path
        self._log = log
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # closed by __exit__
        self._expected_bytes = expected_bytes
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
        self.crc32c = native.crc32c(memoryview(self._buffer), self.crc32c)
        write_through(self._file, self._path, self._buffer, self._log)
        self._buffer = bytearray()

    def __enter__(self) -> ShardFile:
        try:
            reserve(self._file, self._path, self._expected_bytes, self._log)
        except OSError:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
                self._file.truncate(self.size)  # frees what was reserved in excess
                os.fsync(self._file.fileno())


def reserve(file: io.FileIO, path: str, size: int, log: IoLog) -> None:
    """Reserve room on the disk, so that a file lies in one piece; its size stays as it is."""
    if size:
        native.preallocate(file.fileno(), size)
    log.note("reserve", path, 0, size)


def write_through(file: io.FileIO, path: str, content: bytearray, log: IoLog) -> None:
    """Write all of `content` at the file's position, and have it sent to the disk at once.

    Otherwise the kernel gathers gigabytes, then writes them in an order of its own, a few MB of one
    file after the other, while reads have to wait.
    """
    log.note("write", path, file.tell(), len(content))
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    if hasattr(os, "posix_fadvise"):
        # On Linux this starts to write dirty pages without waiting (mm/fadvise.c), and drops from
        # the page cache what earlier calls have written.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_whole(path: str, content: bytes, log: IoLog = NO_LOG) -> None:
    """Write a small file so that it exists whole or not at all."""
    log.note("write", path, 0, len(content))
    with open(path + ".tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
