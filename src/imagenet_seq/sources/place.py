"""What lies at a path, for all formats to look at, and what a format answers."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from imagenet_seq.index.cache import OnError
from imagenet_seq.index.source import Source

SPLITS = ("train", "val")
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip


class Seen(NamedTuple):
    """A sample whose bytes are at hand while its source is indexed; valid during the call only.

    Attributes:
        sample: its number in the index.
        name: its name in the index.
        data: the encoded image.
    """

    sample: int
    name: str
    data: memoryview


Visit = Callable[[Seen], None]
"""Called with every sample while a scan reads it, so that packing needs no second pass."""


class Opening(NamedTuple):
    """How a source is opened.

    Attributes:
        on_error: what to do with samples that can't be indexed.
        progress: whether to show a progress bar if indexing takes long.
        visit: called with each sample if the index has to be made and that reads the images.
    """

    on_error: OnError = "fail"
    progress: bool = True
    visit: Visit | None = None


@dataclass(frozen=True)
class Found:
    """A source that was recognised and is not open yet.

    Attributes:
        kind: as `Source.kind`.
        what: a description for messages: "WebDataset shards a.tar to z.tar".
        open: opens it.
        files: paths of the data files; empty for folders of images.
    """

    kind: str
    what: str
    open: Callable[[Opening], Source]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """A folder, a file or a pattern of files, listed once for all formats.

    Attributes:
        path: the folder, file or pattern.
        split: "train", "val" or None.
        folder: the folder that `files` lie in.
        files: names of the files in the folder, or of those that the path names.
        folders: names of the folders in a folder. Both are sorted, but braces keep their order.
    """

    path: str
    split: str | None
    folder: str
    files: tuple[str, ...] = field(repr=False)
    folders: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def at(cls, path: str, split: str | None) -> Place | None:
        """List what lies at a path; None if nothing is there.

        Raises:
            ValueError: if a pattern names files in different folders, or one twice; if the path is
                neither a folder nor a file.
        """
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                is_folder = {e.name: is_directory(e) for e in entries if _may_be_data(e)}
            files = tuple(sorted(name for name, folder in is_folder.items() if not folder))
            folders = tuple(sorted(name for name, folder in is_folder.items() if folder))
            return cls(path, split, path, files, folders)
        paths = [path] if os.path.exists(path) else expand_pattern(path)
        if not paths:
            return None
        for found in paths:
            if not os.path.isfile(found) and not os.path.isdir(found):
                raise ValueError(f"{found}: expected a folder or a file, got a pipe or a device")
        if len(set(paths)) < len(paths):
            raise ValueError(f"{path}: names a file twice")
        parents = sorted({os.path.dirname(found) for found in paths})
        if len(parents) > 1:
            raise ValueError(
                f"{path}: expected files of one folder, found some in {parents[0]} and {parents[1]}"
            )
        return cls(path, split, parents[0] or os.curdir, tuple(map(os.path.basename, paths)))

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder, not files."""
        return self.path == self.folder

    def below(self, *names: str) -> Place | None:
        """Look at a folder in this one; None if there is none."""
        path = os.path.join(self.folder, *names)
        return Place.at(path, self.split) if self.is_folder and os.path.isdir(path) else None

    def of_split(self, names: Iterable[str]) -> list[str]:
        """Return the paths of those files whose names say that they belong to the split.

        All of them if no name says anything, or if the path names files.

        Raises:
            SplitNeededError: if no split was given, and there are files of both, or of one and
                others.
        """
        names = list(names)
        splits = {split_of(name) for name in names} - {None} if self.is_folder else set()
        if splits and self.split is None:
            if len(splits) > 1:
                raise split_needed(f"{self.path} holds files of train and val, such as {names[0]}")
            other = next((name for name in names if split_of(name) is None), None)
            if other is not None:  # of a test split, say
                [split] = splits
                raise SplitNeededError(
                    f"{self.path} holds files of {split} and others, such as {other}: pass "
                    f"split='{split}', or a pattern of the files that you mean"
                )
        elif splits:
            names = [name for name in names if split_of(name) == self.split]
        return [os.path.join(self.folder, name) for name in names]


class SplitNeededError(ValueError):
    """There are several splits at a path, and none was given."""


def split_needed(what: str) -> SplitNeededError:
    """Return the error that says what a path holds, and asks for a split."""
    return SplitNeededError(f"{what}: pass split='train' or split='val'")


def split_of(name: str) -> str | None:
    """Return the split that a file's name says it belongs to: "train", "val" or None."""
    return next(iter(splits_in(name)), None)


def split_of_path(path: str) -> str | None:
    """Return the split of a folder called "train" or "val", or of files whose names say it."""
    name = os.path.basename(path)
    if os.path.isdir(path):
        return name if name in SPLITS else None
    return split_of(name)


def splits_in(name: str) -> list[str]:
    """Return the splits that the words in a file's name mean, in their order."""
    words = re.findall(r"[a-z]+", os.path.basename(name).lower())
    return [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]


def expand_pattern(pattern: str) -> list[str]:
    """Return the paths that match a pattern: braces as in webdataset, then * ? [] as in a shell.

    ``imagenet1k-train-{0000..1023}.tar`` counts, with leading zeros if the first number has some;
    ``{a,b}`` is one or the other. Braces determine the order; what * matches is sorted.

    Raises:
        FileNotFoundError: if a file that braces name does not exist.
    """
    expanded = list(_expand_braces(pattern))
    paths: list[str] = []
    for path in expanded:
        if glob.has_magic(path) and not os.path.exists(path):
            paths += sorted(glob.glob(path))
        elif os.path.exists(path):
            paths.append(path)
        elif len(expanded) > 1:
            raise FileNotFoundError(f"{path}: no such file, but {pattern} names it")
    return paths


_MOST_FILES = 10**6


def _expand_braces(pattern: str) -> Iterator[str]:
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if counted:
        width = len(counted[1]) if counted[1].startswith("0") else 0
        numbers = range(int(counted[1]), int(counted[2]) + 1)
        if len(numbers) > _MOST_FILES:
            raise ValueError(f"{pattern}: names more than {_MOST_FILES} files")
        choices = [f"{n:0{width}d}" for n in numbers]
    else:
        choices = found[1].split(",")
    for choice, rest in itertools.product(choices, _expand_braces(pattern[found.end() :])):
        yield pattern[: found.start()] + choice + rest


def _may_be_data(entry: os.DirEntry[str]) -> bool:
    """Whether an entry may be data: not a cached index, an unfinished LMDB, a pipe or a device.

    Opening a pipe would wait for its writer. A link without a target may be data that is missing.
    """
    if entry.name.startswith(".imagenet-seq-") or entry.name.endswith(".lmdb.partial"):
        return False
    try:
        return entry.is_file() or entry.is_dir() or not os.path.exists(entry.path)
    except OSError:
        return True


def is_split(folder: str) -> bool:
    """Whether a folder is a split's, not a class called "train", which holds only images."""
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.name == "pack.json" or is_directory(entry) for entry in entries)


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory or a link to one; like os.walk, a broken link is a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False
