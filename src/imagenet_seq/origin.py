"""What is packed: a folder of image files, or a pack that is to get another order.

Images are read in the order they lie on the disk, so that a hard disk's head moves on and on.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from imagenet_seq import _native
from imagenet_seq.errors import DataError
from imagenet_seq.index import Index, Names
from imagenet_seq.io_log import IoLog
from imagenet_seq.recode import Refused, Settings, encode
from imagenet_seq.scratch import Encoded
from imagenet_seq.sources import open_source
from imagenet_seq.sources import pack as layout

_READ_BYTES = 8 << 20


class Stamps(NamedTuple):
    """What tells that a sample's bytes were replaced; -1 where they can't be looked at."""

    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]

    @property
    def known_bytes(self) -> int:
        """Sum of the sizes that are known."""
        return int(self.sizes[self.sizes > 0].sum())


class Origin(Protocol):
    """Where samples come from. Used by one thread, but for `encode`.

    Attributes:
        index: all samples, those that are known to be left out included.
        settings: what the pack is to be like.
        tables: its Huffman tables, where they are given.
    """

    index: Index
    settings: Settings
    tables: bytes | None

    @property
    def stamps(self) -> Stamps:
        """Size and time of what holds each sample."""

    @property
    def id(self) -> str:
        """What a continued packing must find again."""

    @property
    def record(self) -> dict[str, Any]:
        """The member `source` of pack.json."""

    @property
    def settings_record(self) -> dict[str, Any]:
        """The member `settings` of pack.json."""

    @property
    def known_failures(self) -> dict[int, dict[str, Any]]:
        """Samples that an earlier packing left out, or kept although damaged."""

    def in_disk_order(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort samples by where they lie on the disk."""

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes."""

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return a sample as it is to be stored in a pack with these tables."""


# ---- a folder ------------------------------------------------------------------------------------


class Folder:
    """An ImageFolder, whose images are re-coded as `settings` say."""

    def __init__(self, path: str, settings: Settings, log: IoLog, progress: bool) -> None:
        opened = open_source(path, progress=progress)
        if opened.kind != "imagefolder":
            how = "; --reshuffle makes a pack of another order of it" * (opened.kind == "pack")
            raise ValueError(
                f"{path}: expected a folder of class folders, found a {opened.kind}{how}"
            )
        self.index = opened.index
        self.settings = settings
        self.tables: bytes | None = None
        self.known_failures: dict[int, dict[str, Any]] = {}
        self._log = log
        self._progress = progress

    @property
    def stamps(self) -> Stamps:
        """Size and time of every file."""
        return self._looked_at[0]

    @property
    def id(self) -> str:
        """Digest of names and classes."""
        return self.index.id

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What pack.json says of the folder."""
        return {
            "kind": "imagefolder",
            "num_samples": len(self.index),
            "bytes": self.stamps.known_bytes,
            "index_id": self.index.id,
        }

    @property
    def settings_record(self) -> dict[str, Any]:
        """What pack.json says of the settings."""
        return self.settings.describe()

    def in_disk_order(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort samples by address, or by inode where the file system does not tell it.

        Inodes are given out about in the order of a file system's blocks.
        """
        _, addresses, inodes = self._looked_at
        return samples[np.lexsort((inodes[samples], addresses[samples]))]

    def read(self, sample: int) -> bytes | Refused:
        """Read a sample's file."""
        path = os.path.join(self.index.root, self.index.files[int(self.index.file[sample])])
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.readall()
        except OSError as error:
            return _unreadable(error)
        _, addresses, inodes = self._looked_at
        place = {"address": int(addresses[sample]), "inode": int(inodes[sample])}
        self._log.note("read", path, 0, len(data), **place)
        if len(data) > layout.MAX_IMAGE_BYTES:
            return Refused(f"{len(data)} bytes are more than a tar member can hold", None)
        return data

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Re-code an image."""
        return encode(data, self.settings, tables)

    @functools.cached_property
    def _looked_at(self) -> tuple[Stamps, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What the file system says of every file: stamps, addresses and inodes.

        Class folder by class folder: file systems keep the inodes of a folder together and read
        many at a time (ext4 512), and an inode holds the addresses of a small file.
        """
        index, slice_size = self.index, 1024

        def look(first: int) -> list[tuple[int, int, int, int]]:
            names = index.files[first : first + slice_size]
            return [_look_at(os.path.join(index.root, name)) for name in names]

        table = np.empty((len(index), 4), np.int64)
        firsts = range(0, len(index), slice_size)
        bar = tqdm(
            desc="look at files", total=len(index), unit="img", disable=not self._progress,
            dynamic_ncols=True, mininterval=0.5, file=sys.stderr,
        )  # fmt: skip
        # Threads overlap the waits for a disk or a network. One head is not the worse for it: the
        # number of tables of inodes that it goes to is the same, and its queue can be sorted.
        with ThreadPoolExecutor(8) as threads, bar:
            for first, found in zip(firsts, threads.map(look, firsts), strict=True):
                table[first : first + len(found)] = found
                bar.update(len(found))
        sizes, mtimes_ns, addresses, inodes = (column.copy() for column in table.T)
        return Stamps(sizes, mtimes_ns), addresses, inodes


def _look_at(path: str) -> tuple[int, int, int, int]:
    """Return size, modification time, address and inode; -1 where they can't be had."""
    try:
        stat = os.stat(path)
    except OSError:  # reading says why
        return -1, -1, -1, -1
    try:
        _, address = _native.look_up(path)
    except OSError:
        address = -1
    return stat.st_size, stat.st_mtime_ns, address, stat.st_ino & (2**63 - 1)


def _unreadable(error: OSError) -> Refused:
    code = errno.errorcode.get(error.errno or 0, "?")
    return Refused(f"cannot be read: {error.strerror} ({code})", None, is_read_error=True)


# ---- a pack --------------------------------------------------------------------------------------


class Packed:
    """A finished pack, whose images stay as they are and get the order of another seed.

    Samples that were left out of it have numbers, too, behind the others: they decide where shards
    end and what members are called, which then is as if the original images were packed anew.

    Args:
        path: the pack.
        seed: of the new order; None: one more than that of the pack's.
        log: of requests.

    Raises:
        DataError: where the pack is damaged.
    """

    def __init__(self, path: str, seed: int | None, log: IoLog) -> None:
        opened = open_source(path)
        if opened.kind != "pack":
            raise ValueError(f"{path}: expected a pack to reshuffle, found a {opened.kind}")
        self._pack = layout.read_pack(path)
        self._log = log
        self.settings, self.settings_record = _other_order(self._pack, seed)
        self.tables = self._pack.tables
        failures = []
        if self._pack.about["counts"]["failures"]:
            failures = layout.read_failures(path)
        left_out = [failure["name"] for failure in failures if not failure["kept"]]
        self.index = _with_left_out(opened.index, left_out)
        failure_of = {failure["name"]: failure for failure in failures}
        self.known_failures = {
            sample: failure_of[name]
            for sample, name in enumerate(self.index.name if failures else ())
            if name in failure_of
        }
        self._piece = _Piece(-1, 0, b"")

    @functools.cached_property
    def stamps(self) -> Stamps:
        """Size of every image and time of its shard."""
        rows, num_samples = self._pack.rows, len(self.index)
        shard_mtimes = [os.stat(self._path(s)).st_mtime_ns for s in range(len(self.index.files))]
        sizes = np.full(num_samples, -1, np.int64)
        mtimes_ns = np.full(num_samples, -1, np.int64)
        sizes[: len(rows)] = rows["length"]
        mtimes_ns[: len(rows)] = np.array(shard_mtimes, np.int64)[rows["shard"]]
        return Stamps(sizes, mtimes_ns)

    @property
    def id(self) -> str:
        """Digest of names, classes and places."""
        return str(self._pack.about["index_id"])

    @property
    def record(self) -> dict[str, Any]:
        """What the pack says of the source that it was made of."""
        return dict(self._pack.about["source"])

    def in_disk_order(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort samples by shard and offset: each shard lies in one piece."""
        return np.sort(samples)

    def read(self, sample: int) -> bytes | Refused:
        """Return what lies where the sample should."""
        row = self._pack.rows[sample]
        shard, begin = int(row["shard"]), int(row["offset"])
        end = begin + int(row["length"])
        if not self._piece.holds(shard, begin, end):
            try:
                self._piece = self._read_piece(sample)
            except OSError as error:
                return _unreadable(error)
        piece = self._piece
        return bytes(memoryview(piece.data)[begin - piece.begin : end - piece.begin])

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return the sample as it is, if it is what the pack promises."""
        row = self._pack.rows[sample]
        length, expected, crc = int(row["length"]), int(row["crc32c"]), _native.crc32c(data)
        if (len(data), crc) != (length, expected):
            path = self._path(int(row["shard"]))
            return Refused(
                f"{path} offset {row['offset']}: sample {sample}: expected "
                f"{length} bytes with CRC-32C {expected:08x}, got {len(data)} with {crc:08x}",
                None,
            )
        width, height, flags = (int(row[key]) for key in ("width", "height", "flags"))
        return Encoded(memoryview(data), width, height, crc, flags)

    @functools.cached_property
    def _shard_end(self) -> npt.NDArray[np.int64]:
        """Where in the rows each shard's end."""
        return np.searchsorted(self._pack.rows["shard"], range(len(self.index.files)), "right")

    def _path(self, shard: int) -> str:
        return os.path.join(self.index.root, layout.shard_file(shard))

    def _read_piece(self, sample: int) -> _Piece:
        """Read a sample, and with it those behind it up to a few MB of its shard."""
        rows = self._pack.rows
        shard, begin = int(rows["shard"][sample]), int(rows["offset"][sample])
        last = int(self._shard_end[shard])
        ends = rows["offset"][sample:last] + rows["length"][sample:last]
        end = int(ends[max(0, np.searchsorted(ends, begin + _READ_BYTES) - 1)])
        path = self._path(shard)
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            data = file.read(end - begin)
        self._log.note("read", path, begin, len(data), address=shard, inode=0)
        return _Piece(shard, begin, data)


class _Piece(NamedTuple):
    """Part of a shard in memory."""

    shard: int
    begin: int
    data: bytes

    def holds(self, shard: int, begin: int, end: int) -> bool:
        is_inside = self.begin <= begin and end <= self.begin + len(self.data)
        return shard == self.shard and is_inside


def _other_order(pack: layout.Pack, seed: int | None) -> tuple[Settings, dict[str, Any]]:
    """Return the pack's settings with another seed, to use and to record."""
    record = pack.about["settings"]
    keys = ("keep_bytes", "strip", "restart_interval", "tables", "shard_bytes", "seed")
    try:
        values = {key: record[key] for key in keys}
        values["seed"] = (values["seed"] + 1) % 2**64 if seed is None else seed
        # Without `shrink`: smaller copies stay what they are, whatever encoder made them.
        return Settings(**values), {**record, "seed": values["seed"]}
    except (KeyError, TypeError, ValueError) as error:
        if seed is not None and not 0 <= seed < 2**64:
            raise
        raise DataError(
            f"{os.path.join(pack.folder, layout.PACK_FILE)}: 'settings': {error!r}; "
            f"{layout.RUN_VERIFY}"
        ) from error


def _with_left_out(index: Index, left_out: list[str]) -> Index:
    """Return names, labels and classes of a pack's samples and of those left out of it."""
    zeros = np.zeros(len(left_out), np.int32)
    return Index(
        file=np.concatenate([index.file, zeros]),
        offset=np.concatenate([index.offset, zeros]),
        name=Names.concatenate([index.name, Names.from_strings(left_out)]),
        root=index.root,
        files=index.files,
        classes=index.classes,
        label=np.concatenate([np.asarray(index.targets, np.int32), zeros]),
    )
