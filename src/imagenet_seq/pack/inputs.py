"""What is packed: the interface that packing reads its samples through, and what inputs share.

There are three kinds: folders of image files (here), large files of any format (`input_files`), and
a finished pack that gets another order (`input_pack`). All read samples in the order they lie on
the disk, so that the head of a hard disk moves in one direction.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.index.columns import Index
from imagenet_seq.index.source import Source
from imagenet_seq.pack.encode import Refused, Settings, encode
from imagenet_seq.pack.selection import Selection
from imagenet_seq.pack.task import RunOptions
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded

Image = tuple[int, "bytes | Refused"]
"""A sample and its bytes."""


class Stamps(NamedTuple):
    """Tells whether a sample's bytes were replaced; -1 where the file cannot be looked at."""

    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]


class Inputs(Protocol):
    """Samples to pack. Used by one thread, except `encode`.

    Attributes:
        index: all samples, with those that are known to be left out.
        settings: what the pack is to be like.
        tables: its Huffman tables, where they are given.
        notes: what the user should know about the source.
        split: "train" or "val", where the source itself says so.
        path: where the source lies.
        id: digest that a continued run must find again.
        settings_record: the member `settings` of pack.json.
        known_failures: samples that an earlier packing left out, or kept although damaged.
        some_images: images from all over the source, where they can be found without its index.
    """

    index: Index
    settings: Settings
    tables: bytes | None = None
    notes: tuple[str, ...] = ()
    split: str | None
    path: str
    id: str
    settings_record: dict[str, Any]
    known_failures: dict[int, dict[str, Any]]
    some_images: Sequence[bytes] = ()

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Approximate bytes of each sample; -1: unknown."""

    @property
    def stamps(self) -> Stamps:
        """Size and time of the file that holds each sample."""

    @property
    def record(self) -> dict[str, Any]:
        """The member `source` of pack.json."""

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes."""

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Yield samples and their bytes in the order they lie on the disk."""

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return `count` samples from the beginning of a random order that are cheap to read."""
        return order[:count]

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return a sample as it is to be stored in a pack with these Huffman tables."""


def known_bytes(sizes: npt.NDArray[np.int64]) -> int:
    """Return the sum of the sizes that are known."""
    return int(sizes[sizes > 0].sum())


class EncodedInputs(Inputs):
    """What inputs share whose images are encoded anew: a selection of any source but a pack."""

    def __init__(self, source: Source, settings: Settings, selection: Selection) -> None:
        if source.kind == "pack":
            raise ValueError(
                f"{source.index.root}: is a pack already; --reshuffle makes a pack of another "
                "order of it"
            )
        _refuse_unlabelled(source.index)
        source = selection.of(source)
        self.index = source.index
        self.settings = settings
        self.settings_record = {**settings.describe(), **selection.describe()}
        self.notes = source.notes
        self.split = source.split
        self.path = source.index.root
        self.id = source.index.id
        self.known_failures: dict[int, dict[str, Any]] = {}
        self._kind = source.kind
        self._file_bytes: int | None = None

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Encode an image as the settings say."""
        return encode(data, self.settings, tables)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The member `source` of pack.json."""
        record: dict[str, Any] = {
            "kind": self._kind,
            "num_samples": len(self.index),
            "bytes": known_bytes(self.lengths),
            "index_id": self.id,
        }
        if self._file_bytes is not None:
            record["file_bytes"] = self._file_bytes
        return record


def _refuse_unlabelled(index: Index) -> None:
    label = np.asarray(index.targets)
    if int(label.min(initial=0)) < 0:
        sample = int(label.argmin())
        raise ValueError(
            f"{index.root}: sample {sample} ({index.name[sample]}) has no label, and a pack needs "
            "one for each"
        )


def unreadable(error: OSError) -> Refused:
    """Return why a sample has no bytes that the operating system could not read."""
    code = errno.errorcode.get(error.errno or 0, "?")
    return Refused(f"cannot be read: {error.strerror} ({code})", None, is_read_error=True)


def storable(data: bytes) -> bytes | Refused:
    """Return the bytes, or why a shard cannot hold them."""
    if len(data) > pack_format.MAX_IMAGE_BYTES:
        return Refused(f"{len(data)} bytes are more than a tar member can hold", None)
    return data


class FolderInputs(EncodedInputs):
    """Images in one file each."""

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
