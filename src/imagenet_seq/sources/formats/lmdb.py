"""LMDB files of images and labels: those of the original project, of tensorpack, of folder2lmdb.

The tree of pages is read without the LMDB library (lmdb_tree.py), which maps the file and so reads
a disk page by page. The tree says where each value lies. The values are then read once, in the
order of the file, to find the image and the label in each (lmdb_values.py). From then on images are
byte ranges of the file.

Every number in a file is checked before it is used, pages outside the tree are never read, and
nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import HOW_TO_SKIP, Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of
from imagenet_seq.index.columns import Names
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read.turns import Turns
from imagenet_seq.sources.formats import lmdb_tree
from imagenet_seq.sources.formats.lmdb_objects import RAW, ValueFormError, stored_bytes
from imagenet_seq.sources.formats.lmdb_values import ACCEPTED, Pair, find_pair
from imagenet_seq.sources.images import NAMED_EXTENSIONS, image_extension
from imagenet_seq.sources.place import Found, Opening, Place, Seen
from imagenet_seq.sources.scan import FileStream, Problems, Rows, bytes_bar

LOOKS_FOR = "an LMDB (*.lmdb, or a folder with data.mdb) of images and labels, as tensorpack's"
_DATA_FILE = "data.mdb"
_SUFFIXES = (".lmdb", ".mdb")
_BLOCK_BYTES = 4 << 20
_INCOMPLETE = "it is incomplete"


def find(place: Place) -> Found | str | None:
    """Recognise an LMDB file, or the folder that LMDB keeps one in."""
    names = _candidates(place)
    if not names:
        return None
    paths = place.of_split(names)
    if len(paths) != 1:
        shown = ", ".join(map(os.path.basename, paths[:3]))
        return f"holds {len(paths)} LMDB files ({shown}): pass the path of one" if paths else None
    path = paths[0]
    if os.path.isdir(path):
        path = os.path.join(path, _DATA_FILE)
    with open(path, "rb") as file:
        head = file.read(lmdb_tree.META_BYTES)
    wrong = lmdb_tree.why_none(head)
    if wrong:
        return f"holds {os.path.basename(path)}, {wrong}" if path.endswith(_SUFFIXES) else None
    what = f"an LMDB ({os.path.basename(paths[0])})"
    return Found("lmdb", what, lambda how: _open(path, how), [path])


def _candidates(place: Place) -> list[str]:
    """Return the names of files, and of folders with a data.mdb, that may be an LMDB."""
    if not place.is_folder and len(place.files) == 1:
        return list(place.files)
    if _DATA_FILE in place.files:
        return [_DATA_FILE]
    data_files = {name: os.path.join(place.folder, name, _DATA_FILE) for name in place.folders}
    folders = [name for name, path in data_files.items() if os.path.isfile(path)]
    return [name for name in place.files if name.endswith(_SUFFIXES)] + folders


def _open(path: str, how: Opening) -> Source:
    scanned = indexed("lmdb", path, [path], lambda: _scan(path, how), how.on_error)
    incomplete = [remark for remark in scanned.remarks if remark.endswith(_INCOMPLETE)]
    if incomplete and how.on_error == "fail":  # also if a cached index says so
        raise DataError(f"{incomplete[0]}. {HOW_TO_SKIP}")
    if "stored" in scanned.extra:
        return _StoredSource.of(path, scanned)
    index = scanned.index
    return Source("lmdb", index, permuted=is_permuted(index), notes=scanned.notes)


# ---- the values ----------------------------------------------------------------------------------


def _scan(path: str, how: Opening) -> Scanned:
    """Read the tree, then all values in one sequential pass."""
    with open(path, "rb", buffering=0) as file:
        meta = lmdb_tree.newer_meta(path, file.fileno())
        values = lmdb_tree.Tree(path, file.fileno(), meta).values(how.progress)
        scan = _Scan(path, how, meta.page_bytes, values)
        scan.read()
        now = lmdb_tree.newer_meta(path, file.fileno())
    if now.transaction != meta.transaction:
        raise DataError(
            f"{path}: was written to while it was indexed (transaction {meta.transaction}, now "
            f"{now.transaction}): wait until whoever writes there is done"
        )
    return scan.result()


class _Scan:
    """One pass over the values."""

    def __init__(self, path: str, how: Opening, page_bytes: int, values: lmdb_tree.Values) -> None:
        self._path, self._how, self._values = path, how, values
        self._page_bytes = page_bytes
        self._rows = Rows()
        self._problems = Problems(how.on_error)
        self._count: int | None = None  # number of samples according to the file
        self._has_keys = False
        self._num_numbers = self._num_samples = 0
        self._size, self._stored = array("q"), array("B")
        keys = map(values.key, range(len(values)))
        self._named = all(_has_extension(key) for key in keys if not _is_about(key))

    def read(self) -> None:
        values = self._values
        offset = np.array(values.offset, np.int64)
        length = np.array(values.length, np.int64)
        order = np.argsort(offset, kind="stable")
        overlap = np.flatnonzero(offset[order][1:] < (offset + length)[order][:-1])
        if len(overlap):
            first, second = order[overlap[0] : overlap[0] + 2].tolist()
            raise DataError(
                f"{self._path}: the values of {values.key(first)!r} and "
                f"{values.key(second)!r} overlap at offset {offset[second]}: it is damaged"
            )
        name, file_bytes = os.path.basename(self._path), os.path.getsize(self._path)
        with (
            bytes_bar(name, file_bytes, self._how.progress) as bar,
            FileStream(self._path, bar) as stream,
        ):
            for i in order.tolist():
                self._read_value(stream, values.key(i), values.offset[i], values.length[i])

    def _read_value(self, stream: FileStream, key: bytes, offset: int, length: int) -> None:
        if _is_about(key):
            self._read_count(key, stream.take(offset, min(length, 16)), length)
            return
        self._num_samples += 1
        self._num_numbers += key.isdigit()
        value = self._value(stream, key, offset, length)
        try:
            pair = find_pair(value)
            image = value[pair.offset : pair.offset + pair.length]
            if pair.stored != RAW:
                image = memoryview(stored_bytes(image, pair.stored))
        except ValueFormError as error:
            got = f"{error} (begins with {bytes(value[:16])!r})"
            self._report(key, offset, f"{ACCEPTED}; got {got}")
            return
        extension = image_extension(image)
        if extension is None:
            got = f"{len(image)} bytes that begin with {bytes(image[:8])!r}"
            self._report(key, offset, f"an image, got {got}")
        elif not 0 <= pair.label < MAX_CLASSES:
            self._report(key, offset, f"a label in [0, {MAX_CLASSES}), got {pair.label}")
        else:
            self._add(key, extension, offset, pair, image)

    def _report(self, key: bytes, offset: int, expected: str) -> None:
        self._problems.report(f"{self._path}: key {key!r} (offset {offset}): expected {expected}")

    def _value(self, stream: FileStream, key: bytes, offset: int, length: int) -> memoryview:
        """Return a value; if it is in overflow pages, check their header."""
        if offset % self._page_bytes != lmdb_tree.PAGE_HEADER.size:
            return stream.take(offset, length)
        begin = offset - lmdb_tree.PAGE_HEADER.size
        content = stream.take(begin, lmdb_tree.PAGE_HEADER.size + length)
        number, _, flags, num_pages = lmdb_tree.OVERFLOW_HEADER.unpack_from(content)
        if (number * self._page_bytes, flags) != (begin, lmdb_tree.OVERFLOW) or (
            num_pages * self._page_bytes < len(content)
        ):
            raise DataError(
                f"{self._path}: key {key!r}: expected the overflow pages of {length} bytes at "
                f"offset {begin}, got page {number}, flags {flags:#x}, {num_pages} pages: the file "
                "is damaged, or another process writes to it"
            )
        return content[lmdb_tree.PAGE_HEADER.size :]

    def _add(self, key: bytes, extension: str, offset: int, pair: Pair, image: memoryview) -> None:
        name = os.fsdecode(key) + ("" if self._named else extension)
        sample = self._rows.add(name, 0, offset + pair.offset, len(image), pair.label)
        self._size.append(pair.length)
        self._stored.append(pair.stored)
        if self._how.visit is not None:
            self._how.visit(Seen(sample, name, image))

    # -- whether the file is complete

    def _read_count(self, key: bytes, head: memoryview, length: int) -> None:
        """Take the number of samples from __len__, or from the begin of the list of keys."""
        count = None
        self._has_keys |= key == lmdb_tree.KEYS
        if key == lmdb_tree.KEYS and length:
            count = _msgpack_count(bytes(head))
        elif key == b"__len__":
            count = _integer(bytes(head))
        self._count = self._count if count is None else count

    def _remarks(self) -> list[str]:
        """Say what is missing if a run of the writer may have been interrupted."""
        if self._count is not None and self._count != self._num_samples:
            return [
                f"{self._path}: expected {self._count} samples as it says itself, found "
                f"{self._num_samples}: {_INCOMPLETE}"
            ]
        if self._has_keys or not self._num_samples or self._num_numbers < self._num_samples:
            return []
        what = "has no __keys__, which tensorpack and scripts like it write last"
        process = _in_use_by(self._path)
        if process is not None and self._how.on_error == "fail":
            raise DataError(
                f"{self._path}: is in use by a writer: process {process} has it open, and it {what}"
                ". Wait until that is done; if it only reads, pass on_error='skip' "
                "(--on-error skip)"
            )
        return [
            f"{self._path}: {what}: check that {self._num_samples} samples are all, or a run was "
            "interrupted"
        ]

    def result(self) -> Scanned:
        remarks, rows = self._remarks(), self._rows
        root, name = os.path.split(os.path.abspath(self._path))
        index = rows.index(root, [name], classes_of(rows.label, rows.names))
        stored = np.array(self._stored, np.uint8)
        extra: dict[str, npt.NDArray[Any]] = {}
        if stored.any():
            extra = {"stored": stored, "size": np.array(self._size, np.int64)}
        problems = self._problems
        return Scanned(index, extra, problems.messages, problems.count, remarks)


def _is_about(key: bytes) -> bool:
    """Whether a key is about the others, such as __keys__ and __len__."""
    return len(key) > 4 and key[:2] == b"__" == key[-2:]


def _has_extension(key: bytes) -> bool:
    return os.path.splitext(os.fsdecode(key))[1].lower() in NAMED_EXTENSIONS


def _msgpack_count(head: bytes) -> int | None:
    """Return the length of a list in msgpack, by its first bytes; None if it is no list."""
    if head[0] >> 4 == 9:
        return head[0] & 0xF
    form = {0xDC: ">H", 0xDD: ">I"}.get(head[0])
    return struct.unpack_from(form, head, 1)[0] if form and len(head) > 4 else None


_PICKLED_INTEGER = re.compile(
    rb"\x80.(?:\x95.{8})?(?:K(?P<u8>.)|M(?P<u16>..)|J(?P<i32>.{4}))\.", re.DOTALL
)


def _integer(content: bytes) -> int | None:
    """Return the integer that a value holds, in msgpack or as a pickle; None if it is none."""
    pickled = _PICKLED_INTEGER.fullmatch(content)
    if pickled is not None:
        return int.from_bytes(pickled[pickled.lastindex or 0], "little")
    if len(content) == 1 and content[0] < 0x80:
        return content[0]
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(content[0]) if content else None
    return int.from_bytes(content[1:], "big") if size == len(content) - 1 else None


def _in_use_by(path: str) -> int | None:
    """Return a process that has the LMDB open with LMDB's own lock, if the kernel lists locks.

    Such a process locks the first byte of the lock file; the file's existence says nothing. Opening
    and closing the lock file here would end the locks that our own process has on it.
    """
    folder, name = os.path.split(path)
    lock = os.path.join(folder, "lock.mdb") if name == _DATA_FILE else f"{path}-lock"
    try:
        found = os.stat(lock)
        with open("/proc/locks", encoding="ascii") as locks:
            lines = [line.split() for line in locks]
    except OSError:
        return None
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return next((int(line[4]) for line in lines if len(line) > 5 and line[5] == device), None)


# ---- images that are stored as text -----------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _StoredSource(Source):
    """An LMDB of pickles of protocol 0 to 2, where images are text: see lmdb_objects.py."""

    path: str
    # Offset, size and form of each image as it is stored, in the order of the file.
    places: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]
    first: npt.NDArray[np.int64]  # first sample of each block; then their number
    turns: Turns
    python_blocks: bool = True

    @classmethod
    def of(cls, path: str, scanned: Scanned) -> _StoredSource:
        """Make it from the result of a scan; a block is a run of samples that lie together."""
        index, size, stored = scanned.index, scanned.extra["size"], scanned.extra["stored"]
        offset = index.offset
        same_length = len(size) == len(stored) == len(index)
        if not same_length or not _in_order(offset, size, os.path.getsize(path)):
            raise DataError(
                f"{path}: its cached index is damaged: remove .imagenet-seq-lmdb-*.index in "
                "its folder, or the cache folder"
            )
        block = offset // _BLOCK_BYTES
        _, first, number = np.unique(block, return_index=True, return_inverse=True)
        blocks = dataclasses.replace(
            index,
            file=number.astype(np.int32),
            offset=np.arange(len(index)) - first[number],
            files=Names.from_strings([index.files[0]] * len(first)),  # one for each block
            known_id=index.id,  # the same, whether the index was cached or has just been made
        )
        return cls(
            "lmdb",
            blocks,
            permuted=is_permuted(index),
            notes=scanned.notes,
            path=path,
            places=(offset, size, stored),
            first=np.append(first, len(index)),
            turns=Turns(path),
        )

    def read_block(self, number: int) -> Block:
        """Read a run of the file, and decode each image from its text."""
        run = slice(self.first[number], self.first[number + 1])
        offset, size, stored = (column[run] for column in self.places)
        begin, end = int(offset[0]), int(offset[-1] + size[-1])
        with self.turns, open(self.path, "rb", buffering=0) as file:
            file.seek(begin)
            content = memoryview(file.read(end - begin))
        if len(content) != end - begin:
            raise DataError(f"{self.path}: expected {end} bytes, got less: it was truncated")
        rows = zip((offset - begin).tolist(), size.tolist(), stored.tolist(), strict=True)
        images = [stored_bytes(content[at : at + length], how) for at, length, how in rows]
        lengths = np.fromiter(map(len, images), np.int64, len(images))
        data = np.frombuffer(b"".join(images), np.uint8)
        return Block(data, np.cumsum(lengths) - lengths, lengths)


def _in_order(offset: npt.NDArray[np.int64], size: npt.NDArray[np.int64], file_bytes: int) -> bool:
    """Whether places follow one another inside the file."""
    follow = (size >= 0) & (offset >= 0) & (size <= file_bytes - offset)
    return bool(follow.all() and (offset[1:] >= (offset + size)[:-1]).all())
