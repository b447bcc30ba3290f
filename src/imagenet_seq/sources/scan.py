"""Indexes formats that must be read in full: one sequential pass.

The module of a format parses it. The parts that they share: files read in large pieces by a thread
(`FileStream`), samples collected in columns (`Rows`), and samples that are wrong (`Problems`).
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import HOW_TO_SKIP, OnError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.text import progress_bar

_PIECE_BYTES = 4 << 20
_PIECES_AHEAD = 4

_MOST_BYTES = 1 << 30
"""No sample is larger: such a length means damage, and must not allocate memory."""


def bytes_bar(what: str, total_bytes: int, enabled: bool) -> Any:
    """Return a progress bar over the bytes that indexing reads; it appears after a second."""
    return progress_bar(f"index {what}", total_bytes, unit="B", enabled=enabled, delay_s=1)


# ---- reading -------------------------------------------------------------------------------------


class FileStream:
    """A file read once and sequentially, in large pieces, by a thread of its own.

        with FileStream(path, bar) as stream:
            header = stream.take(0, 512)

    Args:
        path: the file.
        bar: a `progress_bar`, updated with the bytes read.
        digest: a hashlib object, updated with all bytes if `finish` is called at the end.
    """

    def __init__(self, path: str, bar: Any = None, digest: Any = None) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by __exit__)
        self.size = os.fstat(self._file.fileno()).st_size
        self._bar, self._digest = bar, digest
        self._pieces: queue.Queue[bytes | Exception] = queue.Queue(_PIECES_AHEAD)
        self._end: bytes | Exception | None = None  # the last piece of the thread, once received
        self._stopped = threading.Event()
        self._window, self._begin = b"", 0  # what is in memory, and where in the file it begins
        self._thread = threading.Thread(target=self._read, name="imagenet-seq-scan", daemon=True)
        self._thread.start()

    def __enter__(self) -> FileStream:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:  # the thread may be waiting for room in the queue
                self._pieces.get_nowait()
        self._thread.join()
        self._file.close()

    def take(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes at `offset`, which must not lie before those taken last.

        Raises:
            DataError: if the file ends before them, or they are more than any image has.
        """
        if length < 0 or offset + length > self.size:
            raise DataError(
                f"{self.path}: expected {length} bytes at offset {offset}, but the file ends after "
                f"{self.size}: it is truncated or damaged"
            )
        if length > _MOST_BYTES:
            raise DataError(
                f"{self.path}: offset {offset}: expected at most {_MOST_BYTES} bytes at once, got "
                f"a length of {length}: the file is damaged"
            )
        if offset < self._begin:
            raise ValueError(f"offset {offset}: what lies before {self._begin} is gone")
        if offset + length > self._begin + len(self._window):
            self._move(offset, length)
        first = offset - self._begin
        return memoryview(self._window)[first : first + length]

    def finish(self) -> None:
        """Read the rest of the file, for the digest."""
        self._move(self.size, 0)

    def _move(self, offset: int, length: int) -> None:
        """Move the window so that it holds `length` bytes at `offset`."""
        end = self._begin + len(self._window)
        kept = [self._window[offset - self._begin :]] if offset < end else []
        while end < offset + length:
            piece = self._pieces.get() if self._end is None else self._end
            if isinstance(piece, Exception) or not piece:
                self._end = piece
            if isinstance(piece, Exception):
                raise piece
            if not piece:
                raise DataError(f"{self.path}: was cut short to {end} bytes while it was read")
            if self._digest is not None:
                self._digest.update(piece)
            if self._bar is not None:
                self._bar.update(len(piece))
            end += len(piece)
            if end > offset:
                kept.append(piece)
        self._window = b"".join(kept)  # a single one is not copied
        self._begin = end - len(self._window)

    def _read(self) -> None:
        """Put pieces into the queue, so that the disk works while the parser does."""
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while not self._stopped.is_set():
                piece = self._file.read(_PIECE_BYTES)
                self._pieces.put(piece)
                if not piece:
                    return
        except Exception as error:  # the parser, which waits for a piece, raises it
            self._pieces.put(error)


# ---- what is found -------------------------------------------------------------------------------


class Problems:
    """Collects what is wrong with single samples, or raises at the first, as the user wants."""

    SHOWN = 20

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self.count = 0
        self.messages: list[str] = []

    def report(self, message: str) -> None:
        """Raise a DataError (on_error="fail"), or record that a sample is left out."""
        if self._on_error == "fail":
            raise DataError(f"{message}. {HOW_TO_SKIP}")
        self.count += 1
        if len(self.messages) < self.SHOWN:
            self.messages.append(message)


class Rows:
    """Samples in the order in which a scan finds them; takes 32 bytes for each, and its name."""

    def __init__(self) -> None:
        self._file, self._label = array("i"), array("i")
        self._offset, self._length = array("q"), array("q")
        self._names, self._name_begin = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._file)

    def add(self, name: str, file: int, offset: int, length: int, label: int = -1) -> int:
        """Add a sample and return its number; the arguments are columns of `Index`.

        Raises:
            DataError: if the name or the label is not valid; then nothing was added.
        """
        try:
            encoded = os.fsencode(name)
            self._label.append(label)
        except (UnicodeEncodeError, OverflowError) as error:
            raise DataError(
                f"file {file} offset {offset}: expected a name of valid characters and a label of "
                f"32 bits, got {name!r:.200} and {label}"
            ) from error
        self._names += encoded
        self._name_begin.append(len(self._names))
        self._file.append(file)
        self._offset.append(offset)
        self._length.append(length)
        return len(self._file) - 1

    @property
    def label(self) -> npt.NDArray[np.int32]:
        """Labels so far (int32, a copy)."""
        return np.array(self._label, np.int32)

    @property
    def names(self) -> Names:
        """Names so far (a copy)."""
        blob = np.frombuffer(bytes(self._names), np.uint8)
        return Names(blob, np.array(self._name_begin, np.int64))

    def index(
        self,
        root: str,
        files: Sequence[str],
        classes: Sequence[str],
        label: npt.NDArray[np.int32] | None = None,
    ) -> Index:
        """Return the samples as an index; `label` stands for the labels that were added.

        Raises:
            DataError: if there is no sample, or a label is not in [0, len(classes)).
        """
        label = self.label if label is None else label
        if not len(self):
            raise DataError(f"{root}: {', '.join(files[:3])}: expected images, found none")
        wrong = (label < -1) | (label >= len(classes))
        if wrong.any():
            sample = int(wrong.argmax())
            raise DataError(
                f"{root}: sample {sample} ({self.names[sample]}): expected a label in "
                f"[0, {len(classes)}), got {label[sample]}"
            )
        return Index(
            file=np.array(self._file, np.int32),
            offset=np.array(self._offset, np.int64),
            name=self.names,
            root=root,
            files=Names.from_strings(files),
            classes=tuple(classes),
            length=np.array(self._length, np.int64),
            label=label,
        )
