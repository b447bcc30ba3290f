"""A folder of class folders of images, as torchvision's ImageFolder reads it.

Indexed by scandir alone, without opening any file or asking for its size. The order of classes and
samples is exactly torchvision's (`find_classes` and `make_dataset` of
torchvision/datasets/folder.py, 0.15 to 0.28). The index is cached in one memory-mapped file, which
eight ranks share, and is valid as long as no directory has another modification time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import FileStamps, OnError, Scanned, indexed
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats.pack import refuse_unfinished
from imagenet_seq.sources.images import IMAGE_EXTENSIONS, is_image_name
from imagenet_seq.sources.place import (
    SPLITS,
    Found,
    Opening,
    Place,
    is_directory,
    is_split,
    split_needed,
    split_of,
)
from imagenet_seq.sources.scan import Problems
from imagenet_seq.text import progress_bar

LOOKS_FOR = "an ImageFolder: one folder of images for each class"

_SCAN_THREADS = 4
"""Directories read at once: hides a network's latency, and lets a disk sort the requests."""

_MAX_DEPTH = 128
"""More levels than any data set has; Python limits recursion."""

_LOOKED_INTO = 8
"""How many folders to look into for images, to tell classes from other folders."""

_APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""First bytes of AppleDouble files, in which macOS keeps metadata on other file systems."""


def find(place: Place) -> Found | str | None:
    """Recognise a folder of class folders."""
    if not place.is_folder or "pack.json" in place.files:
        return None
    folders = [name for name in SPLITS if is_split(os.path.join(place.path, name))]
    if folders:
        holds = f"holds {' and '.join(f'{name}/' for name in folders)}"
        if place.split is None:
            raise split_needed(f"{place.path} {holds}")
        return holds
    if place.split is not None and (others := [name for name in SPLITS if name in place.folders]):
        return f"holds {' and '.join(f'{name}/' for name in others)}"  # so these are not classes
    for name in SPLITS:  # folders of an unfinished pack must not pass for classes
        refuse_unfinished(os.path.join(place.path, name))
    if not has_classes(place):
        return None
    what = f"an ImageFolder with {len(place.folders)} class folders"
    return Found("imagefolder", what, lambda how: open_imagefolder(place.path, how))


def has_classes(place: Place) -> bool:
    """Whether there are class folders: one of the first holds images, or holds a folder that does.

    A folder that holds train/ or val/ is a data set of its own, not a class.
    """
    for name in place.folders[:_LOOKED_INTO]:
        path = os.path.join(place.folder, name)
        try:
            deeper: list[str] = []
            for entry in _entries(path):
                if not is_directory(entry):
                    if is_image_name(entry.name):
                        return True
                elif split_of(entry.name) == entry.name:
                    return False
                elif len(deeper) < _LOOKED_INTO:
                    deeper.append(entry.path)
            inside = itertools.chain.from_iterable(map(_entries, deeper))
            if any(is_image_name(entry.name) for entry in inside):
                return True
        except OSError:
            return True  # can't be read: opening will say so
    return False


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        yield from entries


def open_imagefolder(root: str | os.PathLike[str], how: Opening | None = None) -> Source:
    """Index the class folders below `root`.

    1.28 million files take about 3 s when the directories are in memory, and 0.1 s if the cached

    index is still valid. With on_error="skip", classes without images stay classes.

    Raises:
        FileNotFoundError: if `root` has no class folders, or one of them has no image.
        OSError: if a directory can't be read (torchvision would skip it silently).
        DataError: if a file with an image's name holds macOS metadata.
    """
    root, how = os.path.expanduser(os.fspath(root)), how or Opening()
    scanned = indexed("imagefolder", root, [root], lambda: _scan(root, how), how.on_error)
    index = scanned.index
    if index.root != root:  # cached under another name: torchvision's paths begin with the user's
        index = dataclasses.replace(index, root=root)
    notes = (*scanned.notes, *_notes_on_empty_classes(index, how.on_error))
    return Source("imagefolder", index, notes=notes)


def from_samples(
    samples: Iterable[tuple[str, int]], classes: Sequence[str], root: str | os.PathLike[str]
) -> Source:
    """Make a source of given (path, label) pairs, such as an ImageFolder's `.samples`.

    Order, paths and labels stay as they are. Names are relative to `root`, or to "/" if one of the
    paths is not below `root`. Classes are named by label: for torchvision's ImageNet, its `wnids`.

    Raises:
        ValueError: if a label is not in [0, len(classes)).
    """
    root = os.path.expanduser(os.fspath(root))
    pairs = [(os.fspath(path), label) for path, label in samples]
    paths = [path for path, _ in pairs]
    label_column = np.array([label for _, label in pairs], np.int32)
    prefix = os.path.join(root, "")
    if all(path.startswith(prefix) for path in paths):
        names = Names.from_strings(path[len(prefix) :] for path in paths)
    else:
        root = "/"
        names = Names.from_strings(os.path.abspath(path)[1:] for path in paths)
    wrong = np.flatnonzero((label_column < 0) | (label_column >= len(classes)))
    if len(wrong):
        raise ValueError(
            f"sample {wrong[0]} ({paths[wrong[0]]}): expected a label in [0, {len(classes)}), "
            f"got {label_column[wrong[0]]}"
        )
    return Source("imagefolder", index_of_files(root, names, label_column, classes))


def index_of_files(
    root: str, names: Names, label: npt.NDArray[np.int32], classes: Sequence[str]
) -> Index:
    """Return the index of samples that are one file each."""
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


class _Directory(NamedTuple):
    path: str  # relative to the root
    mtime_ns: int | None  # None: it can't be read
    files: list[str]  # names of the images, sorted
    ignored: list[str]  # names of other files
    wrong: list[str]  # messages


def _scan(root: str, how: Opening) -> Scanned:
    top = os.stat(root)  # before reading: a change meanwhile gives another time than the one noted
    classes = sorted(entry.name for entry in _entries(root) if is_directory(entry))
    if not classes:
        raise FileNotFoundError(
            f"{root}: expected one folder for each class, found no folder at all"
        )
    names: list[Names] = []
    seen: list[_Directory] = []
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        scanned = threads.map(lambda name: _scan_class(root, name, how.on_error), classes)
        with progress_bar(
            f"index {root}", len(classes), unit="class", enabled=how.progress, delay_s=1
        ) as bar:
            for names_of_class, directories in scanned:
                names.append(names_of_class)
                seen += directories
                bar.update()
    problems = Problems(how.on_error)
    for directory in seen:
        for message in directory.wrong:
            problems.report(message)
    label = np.repeat(np.arange(len(classes), dtype=np.int32), list(map(len, names)))
    index = index_of_files(root, Names.concatenate(names), label, classes)
    remarks, stamps = _remarks(root, seen), _stamps(root, top.st_mtime_ns, seen)
    lasting = all(directory.mtime_ns is not None for directory in seen)
    return Scanned(index, {}, problems.messages, problems.count, remarks, stamps, lasting)


def _stamps(root: str, top_ns: int, seen: Sequence[_Directory]) -> FileStamps:
    times = {"": top_ns} | {found.path: found.mtime_ns for found in seen if found.mtime_ns}
    name = os.path.basename(os.path.abspath(root))
    return FileStamps(
        Names.from_strings(os.path.join(name, path) for path in times),
        np.full(len(times), -1, np.int64),
        np.array(list(times.values()), np.int64),
    )


def _remarks(root: str, seen: Sequence[_Directory]) -> tuple[str, ...]:
    """Say what torchvision ignores silently."""
    count = sum(len(found.ignored) for found in seen)
    if not count:
        return ()
    first = next(os.path.join(found.path, min(found.ignored)) for found in seen if found.ignored)
    number = f"{count} files in its class folders, such as {first}, are no images by their names"
    return (f"{root}: {number}: left out as torchvision does",)


def _scan_class(root: str, name: str, on_error: OnError) -> tuple[Names, list[_Directory]]:
    """Return a class's images and directories, in torchvision's order: both are sorted."""
    found = sorted(_walk(root, name, frozenset(), on_error))
    names = Names.from_strings(f"{seen.path}/{file}" for seen in found for file in seen.files)
    return names, [seen._replace(files=[]) for seen in found]


def _walk(
    root: str, path: str, above: frozenset[tuple[int, int]], on_error: OnError
) -> list[_Directory]:
    """Read the directory root/path and those below it.

    Links to directories are followed, but not to one of the parents, which os.walk would follow
    round and round. `above` has device and inode of the parents.
    """
    full = os.path.join(root, path)
    try:
        stat = os.stat(full)
        identity = (stat.st_dev, stat.st_ino)
        if identity in above:
            return []
        if len(above) == _MAX_DEPTH:
            raise DataError(f"{full}: expected folders of at most {_MAX_DEPTH} levels, got more")
        entries = list(_entries(full))
    except OSError as error:
        if on_error == "fail":
            raise
        return [_Directory(path, None, [], [], [f"{full}: can't be read: {error.strerror}"])]
    read = _Directory(path, stat.st_mtime_ns, [], [], [])
    folders: list[str] = []
    for entry in entries:
        if is_directory(entry):
            folders.append(entry.name)
        elif not is_image_name(entry.name):
            if not entry.name.startswith("."):  # nobody takes .DS_Store for an image
                read.ignored.append(entry.name)
        elif entry.name.startswith("._") and _is_apple_double(entry.path):
            read.wrong.append(
                f"{entry.path}: expected an image, found metadata that macOS keeps beside "
                f"{entry.name[2:]} (AppleDouble); `dot_clean {root}` removes such files"
            )
        else:
            read.files.append(entry.name)
    read.files.sort()
    found = [read]
    for name in folders:
        found += _walk(root, f"{path}/{name}", above | {identity}, on_error)
    return found


def _is_apple_double(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(4) == _APPLE_DOUBLE
    except OSError:
        return False  # reading the image will say why


def _notes_on_empty_classes(index: Index, on_error: OnError) -> Iterator[str]:
    """Say which classes have no images; with on_error="fail", refuse them."""
    counts = np.bincount(index.targets, minlength=len(index.classes))
    empty = [index.classes[label] for label in np.flatnonzero(counts == 0)]
    if not empty:
        return
    shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    if on_error == "fail":
        raise FileNotFoundError(
            f"{index.root}: expected images ({', '.join(IMAGE_EXTENSIONS)}) in each of "
            f"{len(index.classes)} class folders, found none in: {shown}. Remove these folders, "
            "complete the data set, or keep them as classes: on_error='skip' (--on-error skip)"
        )
    yield f"{index.root}: these class folders have no images: {shown}"
