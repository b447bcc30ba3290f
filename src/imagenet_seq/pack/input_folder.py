"""Folders of image files as inputs of a pack."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.index.source import Source
from imagenet_seq.pack.encode import Refused, Settings
from imagenet_seq.pack.inputs import EncodedInputs, Image, Stamps, storable, unreadable
from imagenet_seq.pack.selection import Selection
from imagenet_seq.pack.task import RunOptions


class FolderInputs(EncodedInputs):
    """Images in one file each.

    Args:
        source: folders of images.
        settings: what the pack is to be like.
        selection: of the source's samples.
        options: of the run.
    """

    def __init__(
        self, source: Source, settings: Settings, selection: Selection, options: RunOptions
    ) -> None:
        super().__init__(source, settings, selection)
        self._options = options

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Size of every file."""
        return self.stamps.sizes

    @property
    def stamps(self) -> Stamps:
        """Size and time of every file."""
        return self._looked_at[0]

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The member `source` of pack.json."""
        return self._record(self.lengths)

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Read files in the order of their addresses, or of inodes where these are unknown.

        File systems give out inodes in about the order of their blocks.
        """
        _, addresses, inodes = self._looked_at
        order = np.lexsort((inodes[samples], addresses[samples]))
        for sample in samples[order].tolist():
            yield sample, self.read(sample)

    def read(self, sample: int) -> bytes | Refused:
        """Read a sample's file."""
        path = os.path.join(self.index.root, self.index.files[int(self.index.file[sample])])
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.readall()
        except OSError as error:
            return unreadable(error)
        _, addresses, inodes = self._looked_at
        place = {"address": int(addresses[sample]), "inode": int(inodes[sample])}
        self._options.log.note("read", path, 0, len(data), **place)
        return storable(data)

    @functools.cached_property
    def _looked_at(self) -> tuple[Stamps, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What the file system says of every file: stamps, addresses and inodes.

        Class folder by class folder: file systems keep the inodes of a folder together and read
        many at a time (ext4 512), and an inode holds the addresses of a small file.
        """
        index, slice_size = self.index, 1024

        def look(first: int) -> list[tuple[int, int, int, int]]:
            names = index.files.take(index.file[first : first + slice_size])
            return [_look_at(os.path.join(index.root, name)) for name in names]

        table = np.empty((len(index), 4), np.int64)
        firsts = range(0, len(index), slice_size)
        bar = self._options.bar("look up files", len(index), unit="file")
        # Threads overlap the waits for a disk or a network. A hard disk does not get slower by
        # them: it reads as many tables of inodes, and can sort the requests in its queue.
        with ThreadPoolExecutor(8) as threads, bar:
            for first, found in zip(firsts, threads.map(look, firsts), strict=True):
                table[first : first + len(found)] = found
                bar.update(len(found))
        sizes, mtimes_ns, addresses, inodes = (column.copy() for column in table.T)
        return Stamps(sizes, mtimes_ns), addresses, inodes


def _look_at(path: str) -> tuple[int, int, int, int]:
    """Return size, modification time, address and inode; -1 where they are unknown."""
    try:
        stat = os.stat(path)
    except OSError:  # reading the file says why
        return -1, -1, -1, -1
    try:
        _, address = native.look_up(path)
    except OSError:
        address = -1
    return stat.st_size, stat.st_mtime_ns, address, stat.st_ino & (2**63 - 1)
