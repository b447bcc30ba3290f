"""What is packed: folders of image files, large files of any format, or a pack in another order.

Images are read in the order they lie on the disk, so that a hard disk's head moves on and on.
"""

from __future__ import annotations

import bisect
import errno
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import OnError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Block, Source
from imagenet_seq.pack.encode import Refused, Settings, encode
from imagenet_seq.pack.io_log import IoLog
from imagenet_seq.pack.selection import Selection
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.formats.pack import Encoded
from imagenet_seq.sources.place import Found, Opening, Visit
from imagenet_seq.text import progress_bar

_READ_BYTES = 8 << 20


_GAP_BYTES = 1 << 20
"""What lies between two samples is read with them up to here: a hard disk reads it in the time of
half a move."""


Image = tuple[int, "bytes | Refused"]
"""A sample and its bytes."""


class Stamps(NamedTuple):
    """What tells that a sample's bytes were replaced; -1 where it can't be looked at."""

    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]


class Origin(Protocol):
    """Where samples come from. Used by one thread, but for `encode`.

    Attributes:
        index: all samples, those that are known to be left out included.
        settings: what the pack is to be like.
        tables: its Huffman tables, where they are given.
        notes: what the user should know about the source.
    """

    index: Index
    settings: Settings
    tables: bytes | None
    notes: tuple[str, ...]

    @property
    def path(self) -> str:
        """Where it lies."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample, about; -1: not known."""

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

    @property
    def some_images(self) -> Sequence[bytes]:
        """Images from all over the source, where they can be had without its index."""

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes."""

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Yield samples and their bytes in the order in which they lie on the disk."""

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return `count` samples that come first in a random order and are cheap to read."""

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return a sample as it is to be stored in a pack with these tables."""


def known_bytes(sizes: npt.NDArray[np.int64]) -> int:
    """Return the sum of the sizes that are known."""
    return int(sizes[sizes > 0].sum())


class _Recoded:
    """A source of which `selection` is re-coded as `settings` say."""

    def __init__(
        self, source: Source, settings: Settings, selection: Selection, log: IoLog
    ) -> None:
        if source.kind == "pack":
            raise ValueError(
                f"{source.index.root}: is a pack already; --reshuffle makes a pack of another "
                "order of it"
            )
        _refuse_unlabelled(source.index)
        source = selection.of(source)
        self.index = source.index
        self.settings = settings
        self.selection = selection
        self.tables: bytes | None = None
        self.notes = source.notes
        self.known_failures: dict[int, dict[str, Any]] = {}
        self.some_images: Sequence[bytes] = ()
        self._kind = source.kind
        self._log = log

    @property
    def path(self) -> str:
        """The folder that the files lie in."""
        return self.index.root

    @property
    def id(self) -> str:
        """Digest of names, labels and classes."""
        return self.index.id

    @property
    def settings_record(self) -> dict[str, Any]:
        """What pack.json says of the settings."""
        return {**self.settings.describe(), **self.selection.describe()}

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return the first samples."""
        return order[:count]

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Re-code an image."""
        return encode(data, self.settings, tables)

    def _record(self, lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
        return {
            "kind": self._kind,
            "num_samples": len(self.index),
            "bytes": known_bytes(lengths),
            "index_id": self.index.id,
        }


def _refuse_unlabelled(index: Index) -> None:
    label = np.asarray(index.targets)
    if int(label.min(initial=0)) < 0:
        sample = int(label.argmin())
        raise ValueError(
            f"{index.root}: sample {sample} ({index.name[sample]}) has no label, and a pack needs "
            "one for each"
        )


# ---- folders -------------------------------------------------------------------------------------


class Folder(_Recoded):
    """Images in a file each."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        selection: Selection,
        log: IoLog,
        progress: bool,
    ) -> None:
        super().__init__(source, settings, selection, log)
        self._progress = progress

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
        """What pack.json says of the folder."""
        return self._record(self.lengths)

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Read files in the order of their addresses, or inodes where these are not known.

        Inodes are given out about in the order of a file system's blocks.
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
            return _unreadable(error)
        _, addresses, inodes = self._looked_at
        place = {"address": int(addresses[sample]), "inode": int(inodes[sample])}
        self._log.note("read", path, 0, len(data), **place)
        return _storable(data)

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
        bar = progress_bar("look at files", len(index), unit="file", enabled=self._progress)
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
        _, address = native.look_up(path)
    except OSError:
        address = -1
    return stat.st_size, stat.st_mtime_ns, address, stat.st_ino & (2**63 - 1)


def _unreadable(error: OSError) -> Refused:
    code = errno.errorcode.get(error.errno or 0, "?")
    return Refused(f"cannot be read: {error.strerror} ({code})", None, is_read_error=True)


def _storable(data: bytes) -> bytes | Refused:
    if len(data) > layout.MAX_IMAGE_BYTES:
        return Refused(f"{len(data)} bytes are more than a tar member can hold", None)
    return data


# ---- large files ---------------------------------------------------------------------------------


class LargeFiles:
    """A source of large files, which may have to be read to index it.

    Args:
        found: the source.
        settings: what the pack is to be like.
        selection: of the samples.
        log: of requests.
        on_error: what to do with samples that can't be indexed.
        progress: whether to show progress.
    """

    def __init__(
        self,
        found: Found,
        settings: Settings,
        selection: Selection,
        log: IoLog,
        on_error: OnError,
        progress: bool,
    ) -> None:
        self.settings = settings
        self.selection = selection
        self.paths = list(found.files)
        self._found = found
        self._log = log
        self._on_error = on_error
        self._progress = progress

    @property
    def path(self) -> str:
        """The first of the files."""
        return self.paths[0]

    @property
    def settings_record(self) -> dict[str, Any]:
        """What pack.json says of the settings."""
        return {**self.settings.describe(), **self.selection.describe()}

    @property
    def is_whole(self) -> bool:
        """Whether all samples are packed: otherwise only an index tells which are."""
        return self.selection == Selection()

    @functools.cached_property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(os.path.getsize(path) for path in self.paths)

    @functools.cached_property
    def mtime_ns(self) -> int:
        """A number in place of a time, that changes with the size or time of any file.

        Not each sample its own file's: with one more sample in one file, those in the files behind
        it get other numbers.
        """
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            stat = os.stat(path)
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + os.fsencode(path))
        return int.from_bytes(digest.digest(), "little") >> 1

    @functools.cached_property
    def some_images(self) -> list[bytes]:
        """Images from all over the files, found without an index; none in compressed files.

        The same ones as long as the files are the same, whether they have been indexed or not.
        """
        return _images_all_over(self.paths, self._log)

    def open(self, visit: Visit | None = None) -> Origin:
        """Open the source; `visit` gets the samples that pass by where it must be indexed."""
        source = self._found.open(Opening(self._on_error, self._progress, visit))
        kind = _Blocks if source.python_blocks else _Ranges
        return kind(source, self, self._log)


class _InFiles(_Recoded):
    """Samples in large files."""

    def __init__(self, source: Source, files: LargeFiles, log: IoLog) -> None:
        super().__init__(source, files.settings, files.selection, log)
        if files.is_whole:
            self.some_images = files.some_images
        self._files = files
        self._mean_bytes = files.num_bytes // max(1, len(source.index))

    @property
    def path(self) -> str:
        """The first of the files, which is known without an index."""
        return self._files.path

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample; where the index does not know, an even share of the files'."""
        length = self.index.length
        if length is not None and int(length.min(initial=0)) >= 0:
            return np.asarray(length)
        return np.full(len(self.index), self._mean_bytes, np.int64)

    @functools.cached_property
    def stamps(self) -> Stamps:
        """Size and time of all files together."""
        size, mtime_ns = self._files.num_bytes, self._files.mtime_ns
        return Stamps(np.full(len(self.index), size), np.full(len(self.index), mtime_ns))

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What pack.json says of the source."""
        record = self._record(self.lengths)
        return {**record, "file_bytes": self._files.num_bytes} if self._files.is_whole else record


class _Ranges(_InFiles):
    """Images that are byte ranges of files."""

    @functools.cached_property
    def _reader(self) -> RangeReader:
        return RangeReader(self.index, self._log)

    def read(self, sample: int) -> bytes | Refused:
        """Read a sample's bytes."""
        return self._checked(sample, self._reader.read(sample))

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Read samples in the order of files and offsets."""
        for sample, data in self._reader.read_all(samples):
            yield sample, self._checked(sample, data)

    def _checked(self, sample: int, data: bytes | Refused) -> bytes | Refused:
        expected = int(self._reader.end[sample] - self._reader.begin[sample])
        if isinstance(data, Refused) or len(data) == expected:
            return data if isinstance(data, Refused) else _storable(data)
        path = self._reader.path(sample)
        begin = int(self._reader.begin[sample])
        reason = f"{path} offset {begin}: expected {expected} bytes, the file has {len(data)}"
        return Refused(reason, None)


_SAMPLES_OF_BLOCK = 16
"""So many images of each block that is looked into: 32 blocks for 512."""


class _Blocks(_InFiles):
    """Images whose bytes the source has to produce, a block at a time."""

    def __init__(self, source: Source, files: LargeFiles, log: IoLog) -> None:
        super().__init__(source, files, log)
        self._source = source
        self._held: tuple[int, Block | Refused] = (-1, Refused("", None))

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes; its block is held for the next one."""
        number, ordinal = int(self.index.file[sample]), int(self.index.offset[sample])
        if self._held[0] != number:
            self._held = (number, self._produce(number))
        block = self._held[1]
        if isinstance(block, Refused):
            return block
        if ordinal >= len(block.offsets):
            return Refused(f"block {number} holds {len(block.offsets)} images, not this one", None)
        return _storable(block.image(ordinal).tobytes())

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Produce samples block by block."""
        order = np.lexsort((self.index.offset[samples], self.index.file[samples]))
        for sample in samples[order].tolist():
            yield sample, self.read(sample)

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return the first samples of a few blocks: to have one, a block is unpacked whole."""
        blocks = self.index.file[order]
        few = np.unique(blocks[: count // _SAMPLES_OF_BLOCK])
        return order[np.isin(blocks, few)][:count]

    def _produce(self, number: int) -> Block | Refused:
        try:
            return self._source.read_block(number)
        except OSError as error:
            return _unreadable(error)
        except DataError as error:
            return Refused(str(error), None)


class RangeReader:
    """Reads byte ranges of files: many in file order, in pieces of several MB.

    Args:
        index: whose files, offsets and lengths; -1: up to the file's end.
        log: of requests.
    """

    def __init__(self, index: Index, log: IoLog) -> None:
        self._index = index
        self._log = log
        self.begin = np.asarray(index.offset)
        self.end = self.begin + self._lengths()

    def _lengths(self) -> npt.NDArray[np.int64]:
        index = self._index
        length = np.full(len(index), -1, np.int64) if index.length is None else index.length
        if int(length.min(initial=0)) >= 0:
            return np.asarray(length)
        sizes = [os.path.getsize(os.path.join(index.root, name)) for name in index.files]
        to_end = np.array(sizes, np.int64)[index.file] - index.offset
        return np.where(length < 0, np.maximum(to_end, 0), length)

    def path(self, sample: int) -> str:
        """Return the path of the file that holds a sample."""
        return os.path.join(self._index.root, self._index.files[int(self._index.file[sample])])

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes, fewer where the file ends before them."""
        return next(iter(self._read_piece([sample])))[1]

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Yield samples and their bytes by file and offset."""
        order = np.lexsort((self.begin[samples], self._index.file[samples]))
        piece: list[int] = []
        for sample in samples[order].tolist():
            if piece and not self._fits(piece, sample):
                yield from self._read_piece(piece)
                piece = []
            piece.append(sample)
        if piece:
            yield from self._read_piece(piece)

    def _fits(self, piece: list[int], sample: int) -> bool:
        """Tell whether a sample is read with those before it."""
        first, last = piece[0], piece[-1]
        return bool(
            self._index.file[first] == self._index.file[sample]
            and self.begin[sample] - self.end[last] <= _GAP_BYTES
            and self.end[sample] - self.begin[first] <= _READ_BYTES
        )

    def _read_piece(self, samples: list[int]) -> Iterator[Image]:
        begin = int(self.begin[samples[0]])
        path, end = self.path(samples[0]), int(self.end[samples].max())
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(begin)
                data = memoryview(file.read(end - begin))
        except OSError as error:
            yield from ((sample, _unreadable(error)) for sample in samples)
            return
        place = {"address": int(self._index.file[samples[0]]), "inode": 0}
        self._log.note("read", path, begin, len(data), **place)
        for sample in samples:
            yield sample, bytes(data[int(self.begin[sample]) - begin : self.end[sample] - begin])


# ---- images found by their markers ---------------------------------------------------------------

_NUM_IMAGES, _NUM_PLACES, _PLACE_BYTES = 512, 64, 2 << 20
"""Of ImageNet's photos, about 18 lie in 2 MB; where files are sorted by class, 64 classes are seen.
A hard disk takes 2 s."""


_BEGIN = b"\xff\xd8\xff"


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends entropy-coded data: no stuffed byte, no RSTn, no fill byte (T.81, B.1.1)."""


def _images_all_over(paths: Sequence[str], log: IoLog) -> list[bytes]:
    """Return up to 512 JPEG images from evenly spread places in files."""
    ends = list(itertools.accumulate(os.path.getsize(path) for path in paths))
    total = ends[-1] if ends else 0
    step = max(_PLACE_BYTES, -(-total // _NUM_PLACES))
    places = range(0, total, step)
    images: list[bytes] = []
    for at in places:
        file = bisect.bisect_right(ends, at)
        begin = at - (ends[file] - os.path.getsize(paths[file]))
        with open(paths[file], "rb", buffering=0) as opened:
            opened.seek(begin)
            data = opened.read(_PLACE_BYTES)
        log.note("read", paths[file], begin, len(data), address=file, inode=0)
        images += itertools.islice(_images_in(data), -(-_NUM_IMAGES // len(places)))
    return images[:_NUM_IMAGES]


def _images_in(data: bytes) -> Iterator[bytes]:
    """Yield what looks like a whole JPEG image; what is inside of one is part of it."""
    begin = data.find(_BEGIN)
    while begin >= 0:
        end = _end_of_image(data, begin)
        if end:
            yield data[begin:end]
        begin = data.find(_BEGIN, end or begin + 2)


def _end_of_image(data: bytes, begin: int) -> int:
    """Return where an image ends, behind its EOI; 0 where it does not, or is none."""
    at = begin + 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xD9:  # EOI
            return at + 2
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # SOS, and entropy-coded data behind it
            found = _MARKER.search(data, at)
            if found is None:
                return 0
            at = found.start()
    return at + 2 if data[at : at + 2] == b"\xff\xd9" else 0


# ---- a pack --------------------------------------------------------------------------------------


class Packed:
    """A finished pack, whose images stay as they are and get the order of another seed.

    Samples that were left out of it have numbers, too, behind the others: they decide where shards
    end and what members are called, which then is as if the original images were packed anew.

    Args:
        found: the pack.
        seed: of the new order; None: one more than that of the pack's.
        log: of requests.

    Raises:
        DataError: where the pack is damaged.
    """

    def __init__(self, found: Found, seed: int | None, log: IoLog) -> None:
        opened = found.open(Opening())
        path = opened.index.root
        if opened.kind != "pack":
            raise ValueError(f"{path}: expected a pack to reshuffle, found a {opened.kind}")
        self._pack = layout.read_pack(path)
        self.settings, self.settings_record = _other_order(self._pack, seed)
        self.tables = self._pack.tables
        self.notes: tuple[str, ...] = ()
        self.some_images: Sequence[bytes] = ()
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
        self._reader = RangeReader(opened.index, log)

    @property
    def path(self) -> str:
        """The pack's folder."""
        return self.index.root

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of every image; -1 of those that were left out."""
        lengths = np.full(len(self.index), -1, np.int64)
        lengths[: len(self._pack.rows)] = self._pack.rows["length"]
        return lengths

    @functools.cached_property
    def stamps(self) -> Stamps:
        """Size of every image and time of its shard."""
        rows = self._pack.rows
        shards = [os.path.join(self.index.root, name) for name in self.index.files]
        mtimes_ns = np.full(len(self.index), -1, np.int64)
        shard_mtimes = np.array([os.stat(shard).st_mtime_ns for shard in shards], np.int64)
        mtimes_ns[: len(rows)] = shard_mtimes[rows["shard"]]
        return Stamps(self.lengths, mtimes_ns)

    @property
    def id(self) -> str:
        """Digest of names, classes and places."""
        return str(self._pack.about["index_id"])

    @property
    def record(self) -> dict[str, Any]:
        """What the pack says of the source that it was made of."""
        return dict(self._pack.about["source"])

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Read shard by shard: each lies in one piece."""
        return self._reader.read_all(samples)

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return the first samples."""
        return order[:count]

    def read(self, sample: int) -> bytes | Refused:
        """Return what lies where the sample should."""
        return self._reader.read(sample)

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return the sample as it is, if it is what the pack promises."""
        row = self._pack.rows[sample]
        length, expected, crc = int(row["length"]), int(row["crc32c"]), native.crc32c(data)
        if (len(data), crc) != (length, expected):
            return Refused(
                f"{self._reader.path(sample)} offset {row['offset']}: sample {sample}: expected "
                f"{length} bytes with CRC-32C {expected:08x}, got {len(data)} with {crc:08x}",
                None,
            )
        width, height, flags = (int(row[key]) for key in ("width", "height", "flags"))
        return Encoded(memoryview(data), width, height, crc, flags)


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
