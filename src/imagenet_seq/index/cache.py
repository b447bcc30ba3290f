"""The cache of indexes: files beside the data, checked before they are used again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.classes import is_wnid
from imagenet_seq.index.column_file import read_columns, write_columns
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.machine import cache_folder

OnError = Literal["fail", "skip"]
"""What to do with a sample that can't be indexed: raise, or leave it out, count and report it."""

_FORMAT = 2
"""Version of cached files; others are ignored. Raise it when a scan would give another result."""

_RACY_NS = 2_000_000_000
"""A file or folder that changed less than this ago may change again and keep its modification time
(FAT's clock, the coarsest in use, ticks every 2 s)."""

_LONG_SCAN_NS = 10_000_000_000
"""If indexing took longer, say why the result was not cached."""

HOW_TO_SKIP = "Repair it, or leave such samples out: on_error='skip' (--on-error skip)"
_KEPT_DTYPES = (np.uint8, np.uint32, np.int32, np.int64)  # of `read_columns`


class FileStamps(NamedTuple):
    """Sizes and times of the files that an index depends on; it is valid while they stay the same.

    Attributes:
        paths: relative to the folder that holds the source, so that they move with it.
        size: bytes; -1 for a folder, whose size depends on the file system.
        mtime_ns: modification times, ns.
    """

    paths: Names
    size: npt.NDArray[np.int64]
    mtime_ns: npt.NDArray[np.int64]

    @classmethod
    def of(cls, files: Iterable[str], place: str) -> FileStamps:
        """Record the present state of files and folders of the source at `place`."""
        folder, paths = _folder_of(place), list(files)
        size, mtime_ns = np.array([_stamp(path) for path in paths], np.int64).reshape(-1, 2).T
        names = Names.from_strings(os.path.relpath(path, folder) for path in paths)
        return cls(names, size, mtime_ns)

    def first_changed(self, place: str) -> str | None:
        """Return the first path whose size or time differs, or None."""
        folder = _folder_of(place)
        recorded = zip(self.paths, self.size.tolist(), self.mtime_ns.tolist(), strict=True)
        for name, size, mtime_ns in recorded:
            path = os.path.join(folder, name)
            try:
                if _stamp(path) != (size, mtime_ns):
                    return path
            except OSError:
                return path
        return None


def _stamp(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return -1 if stat.S_ISDIR(found.st_mode) else found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Scanned:
    """The result of indexing a source.

    Attributes:
        index: its samples.
        extra: further columns that the source needs, by name (uint8, uint32, int32 or int64). They
            may come from a cached file: check their values before use.
        problems: why samples were left out; the first messages.
        num_problems: number of samples left out.
        remarks: other notes for the user, shown each time the source is opened.
        stamps: what the index depends on, if only the scan can tell.
        lasting: whether the result may be cached. It must not be if something that was left out may
            come back without a sign: a permission changes no modification time.
    """

    index: Index
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    problems: Sequence[str] = ()
    num_problems: int = 0
    remarks: Sequence[str] = ()
    stamps: FileStamps | None = None
    lasting: bool = True

    def __post_init__(self) -> None:
        for name, column in self.extra.items():
            if column.dtype not in _KEPT_DTYPES:  # else it would be indexed each time, silently
                raise TypeError(f"extra column '{name}': can't be cached as {column.dtype}")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user is told when the source is opened."""
        remarks = (*self.remarks, *_notes_on_labels(self.index))
        if not self.num_problems:
            return remarks
        more = self.num_problems - len(self.problems)
        shown = "\n  ".join([*self.problems, f"and {more} more"] if more else self.problems)
        left_out = f"left out {self.num_problems} of {self.num_problems + len(self.index)}"
        return (*remarks, f"{self.index.root}: {left_out}:\n  {shown}")


def _notes_on_labels(index: Index) -> Iterator[str]:
    """Warn if labels are probably not those of torchvision's ImageNet."""
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
    """Return the result of `scan`, from the cache if nothing has changed since.

    The cached file lies beside the data (in the folder that holds `place`), or in the cache folder
    if that can't be written or IMAGENET_SEQ_CACHE is set. If several processes want the same index,
    one scans and the others wait. Two formats (`kind`) never share a cached file. `files` are those
    that the index depends on; if only the scan can tell, it is a path that identifies the source,
    and the result of the scan has `stamps`.

    Raises:
        DataError: if the scan raises it; if a file changed meanwhile; with on_error="fail" also if
            samples were left out of the cached index.
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
    before = FileStamps.of(filter(os.path.exists, files), place)
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
        why = "one of its files was changed just now, or has a modification time in the future"
    elif any(_keep(path, scanned, stamps, place) for path in kept_in):  # in the first that works
        return scanned
    else:
        folders = " or ".join(map(os.path.dirname, kept_in))
        why = f"it can't be written in {folders}: set IMAGENET_SEQ_CACHE to a folder where it can"
    if time.time_ns() - began_ns < _LONG_SCAN_NS:
        return scanned
    remark = f"{place}: the index was not cached, so the next process makes it again: {why}"
    return dataclasses.replace(scanned, remarks=(*scanned.remarks, remark))


def _folder_of(place: str) -> str:
    return os.path.dirname(os.path.abspath(place))


def _key(kind: str, place: str, files: Sequence[str]) -> str:
    """Return a name for a cached index: from relative paths, so that it can move with the data."""
    folder = _folder_of(place)
    digest = hashlib.sha256(os.fsencode(os.path.basename(os.path.abspath(place))) + b"\0")
    for path in files:
        digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0")
    return f"{kind}-{digest.hexdigest()[:16]}"


def _kept_in(key: str, place: str) -> list[str]:
    """Return the paths where an index may be cached, the preferred one first."""
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
"""What reading a damaged file, or one of another program, may raise."""


def _open_kept(path: str, place: str) -> Scanned | None:
    """Return the index cached in `path`, or None if there is no valid one."""
    try:
        header, columns = read_columns(path)
        if header["format"] != _FORMAT:
            return None
        paths = Names(columns["stamps.blob"], columns["stamps.begin"])
        stamps = FileStamps(paths, columns["stamps.size"], columns["stamps.mtime_ns"])
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


def _keep(path: str, scanned: Scanned, stamps: FileStamps, place: str) -> bool:
    """Write an index; return whether that worked. If not, the next process scans again."""
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
    """Let one process of this machine scan at a time, if the file system has locks.

    Waits while another one scans; the kernel releases the lock of a process that ends. `path` is
    that of the index in the cache folder.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            os.makedirs(cache_folder(), exist_ok=True)
            lock = stack.enter_context(open(f"{path}.lock", "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
