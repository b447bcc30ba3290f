"""A folder of class folders of images, as torchvision's ImageFolder reads it.

Indexed by scandir alone: no file is opened or stat'ed. The order of classes and samples is exactly
torchvision's (`find_classes` and `make_dataset` of torchvision/datasets/folder.py, 0.15 to 0.28).
The result is cached in one memory-mapped file that eight ranks share, and is used again as long as
every directory seen has the modification time it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from imagenet_seq.disk import cache_folder
from imagenet_seq.errors import DataError
from imagenet_seq.index import Index, Names, read_columns, write_columns
from imagenet_seq.sources import SPLITS, Found, Place, Source, is_split
from imagenet_seq.sources.pack import refuse_unfinished

LOOKS_FOR = "an ImageFolder: one folder of images for each class"

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""torchvision.datasets.folder.IMG_EXTENSIONS."""

_RACY_NS = 2_000_000_000
"""A directory changed this recently may change again without getting another modification time
(the coarsest common clock, FAT's, ticks every 2 s), so it proves nothing."""

_SCAN_THREADS = 4
"""Directories read at once: the waits of a network file system overlap, a disk can sort them."""


def find(place: Place) -> Found | str | None:
    """Recognise a folder of class folders.

    Raises:
        ValueError: where it is a root of splits and none was asked for.
    """
    if not place.is_folder or "pack.json" in place.files:
        return None
    folders = [name for name in SPLITS if is_split(os.path.join(place.path, name))]
    if folders:
        holds = f"holds {' and '.join(f'{name}/' for name in folders)}"
        if place.split is None:
            raise ValueError(f"{place.path} {holds}: pass split='train' or split='val'")
        return holds
    if place.split in place.folders:  # that one is meant, so `path` must not pass for classes
        return None
    for name in SPLITS:  # their folders must not pass for classes
        refuse_unfinished(os.path.join(place.path, name))
    if place.folders:
        what = f"an ImageFolder with {len(place.folders)} class folders"
        return Found("imagefolder", what, lambda how: open_imagefolder(place.path, how.progress))
    if place.files:
        return (
            f"holds {len(place.files)} files but no class folders; sort the images into one folder "
            "for each class (torchvision.datasets.ImageNet does it for the official archives)"
        )
    return None


def open_imagefolder(root: str | os.PathLike[str], progress: bool = True) -> Source:
    """Index the class folders below `root`.

    1.28 million files take about 3 s when the directories are in memory, and 0.1 s where the cached
    index is still valid.

    Args:
        root: folder that holds one folder for each class.
        progress: whether to show a progress bar when it takes more than a second.

    Raises:
        FileNotFoundError: where `root` has no class folders, or one of them has no image.
        OSError: where a directory can't be read (torchvision would skip it without a word).
    """
    root = os.path.expanduser(os.fspath(root))
    cache = _cache_path(root)
    index = _open_cached(cache, root)
    if index is None:
        began_ns = time.time_ns()
        index, directories = _scan(root, progress)
        if directories.newest_ns < began_ns - _RACY_NS:
            _write_cache(cache, index, directories)
    return Source("imagefolder", index)


def from_samples(
    samples: Iterable[tuple[str, int]], classes: Sequence[str], root: str | os.PathLike[str]
) -> Source:
    """Make a source of given (path, label) pairs, such as an ImageFolder's `.samples`.

    Order, paths and labels are kept as they are. Paths below `root` are kept relative to it; where
    one lies elsewhere, all are kept as absolute paths relative to "/".

    Args:
        samples: the pairs; labels are places in `classes`.
        classes: class names (of torchvision's ImageNet: its `wnids`).
        root: the dataset's folder.

    Raises:
        ValueError: where a label is not in [0, len(classes)).
    """
    root = os.path.expanduser(os.fspath(root))
    paths: list[str] = []
    labels: list[int] = []
    for path, label in samples:
        paths.append(os.fspath(path))
        labels.append(label)
    prefix = os.path.join(root, "")
    if all(path.startswith(prefix) for path in paths):
        names = Names.from_strings(path[len(prefix) :] for path in paths)
    else:
        root = "/"
        names = Names.from_strings(os.path.abspath(path)[1:] for path in paths)
    label_column = np.array(labels, np.int32)
    wrong = np.flatnonzero((label_column < 0) | (label_column >= len(classes)))
    if len(wrong):
        raise ValueError(
            f"sample {wrong[0]} ({paths[wrong[0]]}): expected a label in [0, {len(classes)}), "
            f"got {label_column[wrong[0]]}"
        )
    return Source("imagefolder", _index_of_files(root, names, label_column, classes))


def _index_of_files(
    root: str, names: Names, label: npt.NDArray[np.int32], classes: Sequence[str]
) -> Index:
    return Index(
        file=np.arange(len(names), dtype=np.int32),
        offset=np.broadcast_to(np.int64(0), len(names)),
        name=names,
        root=root,
        files=names,
        classes=tuple(classes),
        label=label,
    )


# ---- scanning ------------------------------------------------------------------------------------


class _Directories(NamedTuple):
    """The directories an index was made of: it holds as long as none of them changes."""

    paths: Names  # relative to the root; the root itself is ""
    mtime_ns: npt.NDArray[np.int64]

    @property
    def newest_ns(self) -> int:
        return int(self.mtime_ns.max())


class _Directory(NamedTuple):
    path: str  # relative to the root
    mtime_ns: int
    files: list[str]  # names of the images, sorted


def _scan(root: str, progress: bool) -> tuple[Index, _Directories]:
    top = os.stat(root)  # before reading: a change meanwhile gives another time than the one noted
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise FileNotFoundError(
            f"{root}: expected one folder for each class, found no folder at all"
        )
    names: list[Names] = []
    paths, times = [""], [top.st_mtime_ns]
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        scanned = threads.map(lambda name: _scan_class(root, name), classes)
        for part, directories in tqdm(
            scanned, f"index {root}", len(classes), delay=1, unit="class", disable=not progress
        ):
            names.append(part)
            for path, mtime_ns in directories:
                paths.append(path)
                times.append(mtime_ns)
    counts = [len(part) for part in names]
    _refuse_empty_classes(root, classes, counts)
    label = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    index = _index_of_files(root, Names.concatenate(names), label, classes)
    return index, _Directories(Names.from_strings(paths), np.array(times, np.int64))


def _scan_class(root: str, name: str) -> tuple[Names, list[tuple[str, int]]]:
    """Return the names of a class's images in torchvision's order, and its directories' times.

    torchvision sorts what os.walk(followlinks=True) yields by directory, then by file name.
    """
    found = sorted(_walk(root, name, frozenset()))
    names = Names.from_strings(f"{path}/{file}" for path, _, files in found for file in files)
    return names, [(path, mtime_ns) for path, mtime_ns, _ in found]


def _walk(root: str, path: str, above: frozenset[tuple[int, int]]) -> list[_Directory]:
    """Read the directory root/path and those below it; `above`: device and inode of its parents.

    Links to directories are followed, but not to one of the parents: there os.walk would go round
    until the operating system refuses.
    """
    full = os.path.join(root, path)
    stat = os.stat(full)
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        return []
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(full) as entries:
        for entry in entries:
            if _is_directory(entry):
                folders.append(entry.name)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                files.append(entry.name)
    files.sort()
    found = [_Directory(path, stat.st_mtime_ns, files)]
    for name in folders:
        found += _walk(root, f"{path}/{name}", above | {identity})
    return found


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere counts as a file, as in os.walk
        return False


def _refuse_empty_classes(root: str, classes: Sequence[str], counts: Sequence[int]) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise FileNotFoundError(
            f"{root}: expected images ({', '.join(IMAGE_EXTENSIONS)}) in each of {len(classes)} "
            f"class folders, found none in: {shown}. Remove these folders or complete the data set"
        )


# ---- the cache -----------------------------------------------------------------------------------


def _cache_path(root: str) -> str:
    key = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:32]
    return os.path.join(cache_folder(), f"{key}.index")


def _open_cached(cache: str, root: str) -> Index | None:
    """Return the cached index of `root`, or None where there is none that is valid."""
    try:
        header, columns = read_columns(cache)
        directories = _Directories(
            Names(columns["directories.blob"], columns["directories.begin"]),
            columns["directories.mtime_ns"],
        )
        for path, mtime_ns in zip(directories.paths, directories.mtime_ns.tolist(), strict=True):
            if os.stat(os.path.join(root, path)).st_mtime_ns != mtime_ns:
                return None
        return Index.from_columns({**header, "root": root}, columns, cache)
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return None


def _write_cache(cache: str, index: Index, directories: _Directories) -> None:
    """Cache an index; where that fails, the next process scans again, and nothing else is lost."""
    header, columns = index.to_columns()
    columns["directories.blob"] = directories.paths.blob
    columns["directories.begin"] = directories.paths.begin
    columns["directories.mtime_ns"] = directories.mtime_ns
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        write_columns(cache, header, columns)
