"""Indexing what has to be read for it: one pass from front to back, whose result is kept.

A source's module parses; here is what they share: files read in large pieces by a thread
(`FileStream`), samples collected in columns (`Rows`), what is wrong with some of them (`Problems`),
the order their classes lie in (`is_permuted`), and the index kept beside the data (`indexed`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
import queue
import stat
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from imagenet_seq import shuffle
from imagenet_seq.disk import cache_folder
from imagenet_seq.errors import DataError
from imagenet_seq.index import Index, Names, read_columns, write_columns
from imagenet_seq.sources.classes import is_wnid

OnError = Literal["fail", "skip"]
"""What to do with a sample that can't be indexed: raise, or leave it out, count and report it."""

_PIECE_BYTES = 4 << 20
_PIECES_AHEAD = 4
_MOST_BYTES = 1 << 30
"""More than this no sample takes: a length that says so is damaged, and must not cost memory."""

_FORMAT = 1
"""Of kept indexes. Another one is made anew: raise it when a scan would give another result."""

_RACY_NS = 2_000_000_000
"""A file or folder changed this recently may change again without getting another modification time
(the coarsest common clock, FAT's, ticks every 2 s), so it proves nothing."""

_LONG_SCAN_NS = 10_000_000_000
"""Who waits longer for an index is told why it is not kept."""


# ---- reading -------------------------------------------------------------------------------------


class FileStream:
    """A file read once, from front to back, in large pieces by a thread of its own.

        with FileStream(path, bar) as stream:
            header = stream.take(0, 512)

    Args:
        path: the file.
        bar: a `progress_bar`, moved on by what is read.
        digest: a hashlib object that gets all bytes; then call `finish`.

    Raises:
        OSError: where the file can't be read.
    """

    def __init__(self, path: str, bar: Any = None, digest: Any = None) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by __exit__)
        self.size = os.fstat(self._file.fileno()).st_size
        self._bar, self._digest = bar, digest
        self._pieces: queue.Queue[bytes | Exception] = queue.Queue(_PIECES_AHEAD)
        self._end: bytes | Exception | None = None  # what the thread put last, once it came
        self._stopped = threading.Event()
        self._window, self._begin = b"", 0  # what is in memory, and where in the file it begins
        self._thread = threading.Thread(target=self._read, name="imagenet-seq-scan", daemon=True)
        self._thread.start()

    def __enter__(self) -> FileStream:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:  # the thread may wait for room
                self._pieces.get_nowait()
        self._thread.join()
        self._file.close()

    def take(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes at `offset`, which must not lie before those taken last.

        Raises:
            DataError: where the file ends before them, or they are more than an image can take.
            OSError: where they can't be read.
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
        """Read what is left, for the digest."""
        self._move(self.size, 0)

    def _move(self, offset: int, length: int) -> None:
        """Make the window begin at `offset`, or where a piece with it does, and hold `length`."""
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
        self._window = b"".join(kept)  # no copy of a single one
        self._begin = end - len(self._window)

    def _read(self) -> None:
        """Put pieces into the queue: the disk works while the parser does."""
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while not self._stopped.is_set():
                piece = self._file.read(_PIECE_BYTES)
                self._pieces.put(piece)
                if not piece:
                    return
        except Exception as error:  # whatever it is, the parser waits for it
            self._pieces.put(error)


def progress_bar(what: str, total_bytes: int, enabled: bool) -> Any:
    """Return a tqdm over bytes, which shows itself where indexing takes more than a second."""
    return tqdm(
        desc=f"index {what}", total=total_bytes, unit="B", unit_scale=True, delay=1,
        dynamic_ncols=True, disable=not enabled,
    )  # fmt: skip


# ---- what is found -------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A sample whose bytes pass by while its source is indexed; valid during the call only."""

    sample: int  # its number in the index
    name: str
    data: memoryview


Visit = Callable[[Seen], None]
"""Gets every sample of a scan that reads images: packing can then do with one pass."""


class Problems:
    """What is wrong with single samples, and what the user wants done about it.

    Args:
        on_error: "fail" or "skip".
    """

    SHOWN = 20

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self.count = 0
        self.messages: list[str] = []

    def report(self, message: str) -> None:
        """Raise, or note that a sample is left out.

        Args:
            message: what is wrong, where, expected and got.

        Raises:
            DataError: with on_error="fail".
        """
        if self._on_error == "fail":
            raise DataError(f"{message}. {HOW_TO_SKIP}")
        self.count += 1
        if len(self.messages) < self.SHOWN:
            self.messages.append(message)


HOW_TO_SKIP = "Repair it, or leave such samples out: on_error='skip' (--on-error skip)"


_SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"), (b"\x89PNG\r\n\x1a\n", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"),
    (b"RIFF", ".webp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"), (b"P6", ".ppm"), (b"P5", ".pgm"),
)  # fmt: skip


def image_extension(data: bytes | memoryview) -> str:
    """Return the extension that image bytes should have; ".bin" where no format is recognised."""
    head = bytes(data[:8])
    return next((found for magic, found in _SIGNATURES if head.startswith(magic)), ".bin")


class Rows:
    """Samples in the order in which a scan finds them, in 32 bytes each and their names."""

    def __init__(self) -> None:
        self._file, self._label = array("i"), array("i")
        self._offset, self._length = array("q"), array("q")
        self._names, self._name_bytes = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._file)

    def add(self, name: str, file: int, offset: int, length: int, label: int = -1) -> int:
        """Add a sample and return its number; arguments as the columns of `Index`.

        Raises:
            DataError: where the name or the label is none; then nothing was added.
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
        self._name_bytes.append(len(encoded))
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
        begin = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.array(self._name_bytes, np.int64), out=begin[1:])
        return Names(np.frombuffer(bytes(self._names), np.uint8), begin)

    def index(
        self,
        root: str,
        files: Sequence[str],
        classes: Sequence[str],
        label: npt.NDArray[np.int32] | None = None,
    ) -> Index:
        """Return the samples as an index.

        Args:
            root: folder that `files` are relative to.
            files: paths of the files that `add` numbered.
            classes: class names.
            label: labels in place of those that were added.

        Raises:
            DataError: where there is no sample, or a label is not in [0, len(classes)).
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


MIN_PERMUTED = 1000
"""Of fewer samples the order can't be told."""

_MAX_Z, _SORTED_Z = 5.0, 20.0


def is_permuted(index: Index) -> bool:
    """Tell whether samples lie in random order, as far as their labels tell.

    Then blocks of them are mixed, and a block shuffle of them is as good as a uniform one. Two
    tests must not tell them from a random order: of neighbours with one class (sorted data), and of
    where each class lies on average (shards that are mixed in themselves, but not with each other).
    Where the labels of fewer than 1000 samples, or of one class, couldn't tell: False.
    """
    label = index.label
    if label is None or len(label) < MIN_PERMUTED or int(label.min()) < 0:
        return False
    in_disk_order = label[np.lexsort((index.offset, index.file))]
    runs_z = abs(shuffle.label_runs(in_disk_order).z)
    if runs_z > _MAX_Z or abs(_places_z(in_disk_order)) > _MAX_Z:
        return False
    return shuffle.label_runs(np.sort(label)).z > _SORTED_Z


def _places_z(label: npt.NDArray[np.int32]) -> float:
    """Compare the classes' mean places with those of a random order; about standard normal there.

    W. H. Kruskal and W. A. Wallis, JASA 47 (1952) 583: H has nearly the chi-squared distribution of
    one degree of freedom less than there are classes.
    """
    size, counts = len(label), np.bincount(label)
    sums = np.bincount(label, np.arange(size) - (size - 1) / 2)
    there = counts > 0
    degrees = int(there.sum()) - 1
    h = 12 / (size * (size + 1)) * float((sums[there] ** 2 / counts[there]).sum())
    return (h - degrees) / math.sqrt(2 * max(degrees, 1))


# ---- an index that is kept -----------------------------------------------------------------------

_KEPT_DTYPES = (np.uint8, np.uint32, np.int32, np.int64)  # of `read_columns`


class Stamps(NamedTuple):
    """Files and folders that an index was made of, as they were; it holds while they stay so.

    Attributes:
        paths: relative to the folder that holds the source, so that they move with it.
        size: bytes; -1 of a folder, where it may differ from machine to machine.
        mtime_ns: modification times, ns.
    """

    paths: Names
    size: npt.NDArray[np.int64]
    mtime_ns: npt.NDArray[np.int64]

    @classmethod
    def of(cls, files: Iterable[str], place: str) -> Stamps:
        """Look at files and folders.

        Args:
            files: their paths.
            place: the source.

        Raises:
            OSError: where one can't be looked at.
        """
        folder, names, sizes, times = _folder_of(place), [], [], []
        for path in files:
            found = os.stat(path)
            names.append(os.path.relpath(path, folder))
            sizes.append(-1 if stat.S_ISDIR(found.st_mode) else found.st_size)
            times.append(found.st_mtime_ns)
        return cls(Names.from_strings(names), np.array(sizes, np.int64), np.array(times, np.int64))

    def first_changed(self, place: str) -> str | None:
        """Return the path of the first file or folder that is not as it was; None: all are."""
        folder = _folder_of(place)
        was = zip(self.paths, self.size.tolist(), self.mtime_ns.tolist(), strict=True)
        for name, size, mtime_ns in was:
            path = os.path.join(folder, name)
            try:
                found = os.stat(path)
            except OSError:
                return path
            now = -1 if stat.S_ISDIR(found.st_mode) else found.st_size
            if (now, found.st_mtime_ns) != (size, mtime_ns):
                return path
        return None


@dataclass(frozen=True)
class Scanned:
    """What a scan finds out about a source.

    Attributes:
        index: its samples.
        extra: further columns that the source needs, by names of its own (uint8, uint32, int32 or
            int64). They come from a file: check them before use.
        problems: samples left out: the first messages.
        num_problems: how many.
        remarks: what the user should know besides; shown each time the source is opened.
        stamps: what the index depends on, where only the scan knows.
        lasting: whether the result may be kept. Not where what was left out may be there next time
            without any sign: a permission changes no modification time.
    """

    index: Index
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    problems: Sequence[str] = ()
    num_problems: int = 0
    remarks: Sequence[str] = ()
    stamps: Stamps | None = None
    lasting: bool = True

    def __post_init__(self) -> None:
        for name, column in self.extra.items():
            if column.dtype not in _KEPT_DTYPES:  # it would be made anew each time, without a word
                raise TypeError(f"extra column '{name}': can't be kept as {column.dtype}")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user is told when the source is opened."""
        remarks = (*self.remarks, *_notes_on_labels(self.index))
        if not self.num_problems:
            return remarks
        total = self.num_problems + len(self.index)
        shown = "\n  ".join(self.problems)
        more = self.num_problems - len(self.problems)
        tail = f"\n  and {more} more" if more else ""
        left_out = f"left out {self.num_problems} of {total}:\n  {shown}{tail}"
        return (*remarks, f"{self.index.root}: {left_out}")


def _notes_on_labels(index: Index) -> Iterator[str]:
    """Say where labels are probably not those of torchvision's ImageNet."""
    classes = index.classes
    occur = np.unique(np.asarray(index.targets)) if classes[:1] == ("0",) else np.zeros(0)
    if len(occur) > 1 and np.array_equal(occur, np.arange(1, len(classes))):
        yield (
            f"{index.root}: no sample has label 0, and labels go up to {len(classes) - 1}: if they "
            f"count from 1, pass target_transform to subtract it, or train with {len(classes)} "
            "classes"
        )
    if all(map(is_wnid, classes)) and list(classes) != sorted(classes):
        yield (
            f"{index.root}: its labels number the classes in another order than torchvision does, "
            "which sorts their wnids: models trained elsewhere take them for other classes"
        )


def indexed(
    kind: str, place: str, files: Sequence[str], scan: Callable[[], Scanned], on_error: OnError
) -> Scanned:
    """Return what `scan` finds, from the file where it was kept if nothing has changed since.

    The file lies beside the data (in the folder that holds `place`), or in the cache folder where
    that can't be written or IMAGENET_SEQ_CACHE is set. Processes that want the same index wait for
    the one that scans.

    Args:
        kind: of the source; two kinds never share a file.
        place: the file or folder that is the source.
        files: paths of the files that the index is made of; where only the scan can tell, a name
            for what it depends on, and its result has `stamps`.
        scan: makes the index.
        on_error: as the scan was told.

    Raises:
        DataError: what the scan raises; where a file changed meanwhile; with on_error="fail" also
            where the kept index is one that samples were left out of.
    """
    kept_in = _kept_in(_key(kind, place, files), place)
    found = _first_kept(kept_in, place)
    if found is None:
        with _alone(kept_in[-1]):
            found = _first_kept(kept_in, place)  # another process may have made it meanwhile
            if found is None:
                return _scan_and_keep(kept_in, place, files, scan)
    if found.num_problems and on_error == "fail":
        raise DataError(f"{found.problems[0]}. {HOW_TO_SKIP}")
    return found


def _scan_and_keep(
    kept_in: Sequence[str], place: str, files: Sequence[str], scan: Callable[[], Scanned]
) -> Scanned:
    began_ns = time.time_ns()
    # Before reading: a change meanwhile gives another time than the one noted.
    before = Stamps.of(filter(os.path.exists, files), place)
    scanned = scan()
    stamps = scanned.stamps or before
    if changed := stamps.first_changed(place):
        raise DataError(
            f"{changed}: changed while {place} was indexed: wait until whoever writes there is "
            "done, then open it again"
        )
    newest_ns = int(stamps.mtime_ns.max(initial=0))
    if not scanned.lasting:
        why = "what was left out may be there next time"
    elif newest_ns >= began_ns - _RACY_NS:
        why = "a file of it was changed just now, or in the future as its time has it"
    elif any(_keep(path, scanned, stamps, place) for path in kept_in):  # in the first that works
        return scanned
    else:
        folders = " or ".join(map(os.path.dirname, kept_in))
        why = f"it can't be written in {folders}: set IMAGENET_SEQ_CACHE to a folder where it can"
    if time.time_ns() - began_ns < _LONG_SCAN_NS:
        return scanned
    remark = f"{place}: the index is not kept, so the next process makes it anew: {why}"
    return dataclasses.replace(scanned, remarks=(*scanned.remarks, remark))


def _folder_of(place: str) -> str:
    return os.path.dirname(os.path.abspath(place))


def _key(kind: str, place: str, files: Sequence[str]) -> str:
    """Name an index: by relative paths, so that it moves with the data."""
    folder = _folder_of(place)
    digest = hashlib.sha256(os.fsencode(os.path.basename(os.path.abspath(place))) + b"\0")
    for path in files:
        digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0")
    return f"{kind}-{digest.hexdigest()[:16]}"


def _kept_in(key: str, place: str) -> list[str]:
    """Return where an index may be kept: the best place first, the cache folder last."""
    folder = _folder_of(place)
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    in_cache = os.path.join(cache_folder(), f"{key}-{digest}.index")
    if os.environ.get("IMAGENET_SEQ_CACHE"):
        return [in_cache]
    return [os.path.join(folder, f".imagenet-seq-{key}.index"), in_cache]


def _first_kept(kept_in: Sequence[str], place: str) -> Scanned | None:
    return next(filter(None, (_open_kept(path, place) for path in kept_in)), None)


_DAMAGED = (
    OSError, DataError, KeyError, TypeError, ValueError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip
"""What reading a file may raise that was damaged, or made by somebody else."""


def _open_kept(path: str, place: str) -> Scanned | None:
    """Return the index kept in `path`, or None where there is none that is valid."""
    try:
        header, columns = read_columns(path)
        if header["format"] != _FORMAT:
            return None
        stamps = Stamps(
            Names(columns["stamps.blob"], columns["stamps.begin"]),
            columns["stamps.size"],
            columns["stamps.mtime_ns"],
        )
        if stamps.first_changed(place):
            return None
        root = os.path.normpath(os.path.join(_folder_of(place), header["root"]))
        index = Index.from_columns({**header, "root": root}, columns, path)
        said = header["said"]
        problems, remarks = (tuple(map(str, said[key])) for key in ("problems", "remarks"))
        num_problems = int(said["num_problems"])
        if (num_problems > 0) != bool(problems):
            return None
        extra = {name[6:]: column for name, column in columns.items() if name[:6] == "extra."}
        return Scanned(index, extra, problems, num_problems, remarks, stamps)
    except _DAMAGED:
        return None


def _keep(path: str, scanned: Scanned, stamps: Stamps, place: str) -> bool:
    """Write an index; where that fails the next process scans again, and nothing else is lost."""
    header, columns = scanned.index.to_columns()
    header["format"] = _FORMAT
    header["root"] = os.path.relpath(scanned.index.root, _folder_of(place))
    header["said"] = {
        "problems": list(scanned.problems),
        "num_problems": scanned.num_problems,
        "remarks": list(scanned.remarks),
    }
    columns["stamps.blob"], columns["stamps.begin"] = stamps.paths.blob, stamps.paths.begin
    columns["stamps.size"], columns["stamps.mtime_ns"] = stamps.size, stamps.mtime_ns
    columns.update({f"extra.{name}": column for name, column in scanned.extra.items()})
    try:
        if os.path.dirname(path) == cache_folder():
            os.makedirs(cache_folder(), exist_ok=True)
        write_columns(path, header, columns)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Keep other processes of this machine from scanning the same, where there are file locks.

    Waits as long as the other one scans; the kernel ends its lock with it.

    Args:
        path: of the index in the cache folder.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            os.makedirs(cache_folder(), exist_ok=True)
            lock = stack.enter_context(open(f"{path}.lock", "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
