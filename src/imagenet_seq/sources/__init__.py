"""Sources: what lies on disk, recognised by its content and given to plan, loader and pack.

Each format is one module here; nothing outside it knows the format. It has `LOOKS_FOR`, a line for
messages, and `find(place)`, which looks at names and a few first bytes and returns

* a `Found`, which `open_source` opens,
* a string: why something that looks like the format is none, for the message,
* None: nothing of the kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.disk import choose_disk, lock_path, turn
from imagenet_seq.errors import DataError
from imagenet_seq.index import Index
from imagenet_seq.sources.scan import OnError, Visit

SPLITS = ("train", "val")

_SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip

_FORMATS = (
    "pack",
    "arrow",
    "beton",
    "flat",
    "imagefolder",
    "lmdb",
    "mds",
    "official",
    "parquet",
    "tfrecord",
    "webdataset",
)
"""Modules that are asked, in this order."""

_NEARBY = 16
"""Folders that are looked into for what may have been meant."""


class Block(NamedTuple):
    """The bytes of a foreign block, and where each of its samples lies in them."""

    bytes: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class Turns:
    """What a thread holds while it reads for a foreign block: its turn at the disk of `path`.

    A disk with one head that goes to and fro between several long reads is slow, whichever threads
    and processes they are of. Other disks need no turns.
    """

    def __init__(self, path: str) -> None:
        where = choose_disk(path)
        self.are_needed = where.has_one_head
        self._threads = threading.Lock()
        self._processes = lock_path(where)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> None:
        if not self.are_needed:
            return
        held = contextlib.ExitStack()
        held.enter_context(self._threads)
        with held:
            held.enter_context(turn(self._processes))
            self._held = held.pop_all()

    def __exit__(self, *unused: object) -> None:
        if self.are_needed:
            self._held.close()


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset as plan, loader and pack need it. Subclass it to add a foreign source.

    Args:
        kind: what it is, in a word, for messages: "imagefolder", "pack", ...
        index: its samples.
        permuted: whether samples are known to lie in random order, so that their classes are mixed
            and a block shuffle is as good as a uniform one.
        foreign: whether blocks have to be produced by `read_block` instead of being byte ranges of
            files. Then the index's `file` is the number of a sample's block and `offset` its
            ordinal in that block.
        notes: what the user should know about it: samples left out, for example.
    """

    kind: str
    index: Index
    permuted: bool = False
    foreign: bool = False
    notes: tuple[str, ...] = ()

    def read_block(self, number: int) -> Block:
        """Produce foreign block `number`; called from several threads at once.

        Element k of `offsets` and `lengths` belongs to the sample whose ordinal is k.
        """
        raise TypeError(
            f"source '{self.kind}' has no foreign blocks: read its files (block {number})"
        )

    def take(self, indices: npt.ArrayLike) -> Source:
        """Return the source of the samples at `indices`, in that order (as torch's Subset)."""
        return dataclasses.replace(self, index=self.index.take(indices))


class Opening(NamedTuple):
    """How a source is opened.

    Attributes:
        on_error: what to do with samples that can't be indexed.
        progress: whether to show progress where indexing takes long.
        visit: gets the samples, where the index is not there yet and images pass by while it is
            made.
    """

    on_error: OnError = "fail"
    progress: bool = True
    visit: Visit | None = None


@dataclass(frozen=True)
class Found:
    """A source that was recognised, and not yet opened.

    Attributes:
        kind: as `Source.kind`.
        what: what was seen, for messages: "WebDataset shards a.tar to z.tar".
        open: opens it.
        files: paths of the files with the data; empty for folders of images.
    """

    kind: str
    what: str
    open: Callable[[Opening], Source]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """A folder, a file or a pattern of files, looked at once for all formats.

    Attributes:
        path: the folder, file or pattern.
        split: "train", "val" or None.
        folder: the folder that `files` lie in.
        files: names of the files in the folder, or of those that the path names; sorted.
        folders: names of the folders in a folder; sorted.
    """

    path: str
    split: str | None
    folder: str
    files: tuple[str, ...] = field(repr=False)
    folders: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def at(cls, path: str, split: str | None) -> Place | None:
        """Look at a path; None where nothing is there.

        Raises:
            OSError: where a folder can't be read.
            ValueError: where a pattern names files in different folders, or one twice; where the
                path is neither a folder nor a file.
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
        """Whether a folder was given, not files."""
        return self.path == self.folder

    def below(self, *names: str) -> Place | None:
        """Look at a folder in this one; None where there is none."""
        path = os.path.join(self.folder, *names)
        return Place.at(path, self.split) if self.is_folder and os.path.isdir(path) else None

    def of_split(self, names: Iterable[str]) -> list[str]:
        """Return the paths of those files that are of the split, told by words in their names.

        Where no name says which split it is of, and where the path names files, all are meant.

        Raises:
            SplitNeededError: where there are files of both splits, or of one and of none, and none
                was asked for.
        """
        names = list(names)
        splits = {split_of(name) for name in names} - {None}
        if self.split is None and len(splits) > 1 and self.is_folder:
            raise SplitNeededError(
                f"{self.path} holds files of train and val, such as {names[0]}: pass "
                "split='train' or split='val'"
            )
        if self.split is None and splits and self.is_folder:
            other = next((name for name in names if split_of(name) is None), None)
            if other is not None:  # of a test split, say
                [split] = splits
                raise SplitNeededError(
                    f"{self.path} holds files of {split} and others, such as {other}: pass "
                    f"split='{split}', or a pattern of the files that you mean"
                )
        if self.is_folder and self.split is not None and splits:
            names = [name for name in names if split_of(name) == self.split]
        return [os.path.join(self.folder, name) for name in names]


class SplitNeededError(ValueError):
    """There are two splits at a path, and none was asked for."""


def split_of(name: str) -> str | None:
    """Tell by a word in a file's name which split it is of: "train", "val" or None."""
    return next(iter(_splits_in(name)), None)


def _splits_in(name: str) -> list[str]:
    words = re.findall(r"[a-z]+", os.path.basename(name).lower())
    return [_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS]


def expand_pattern(pattern: str) -> list[str]:
    """Return the paths that a pattern names: braces as in webdataset, then * ? [] as in a shell.

    ``imagenet1k-train-{0000..1023}.tar`` counts, with leading zeros where the first number has
    some; ``{a,b}`` is either. With braces, the order is theirs; what * finds is sorted.

    Raises:
        FileNotFoundError: where a file that braces name is not there.
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


def open_source(
    path: str | os.PathLike[str],
    split: str | None = None,
    progress: bool = True,
    on_error: OnError = "fail",
) -> Source:
    """Open the dataset at `path`, recognised by its content.

    With a split, `path/split` is looked at first, then files of that split in `path`.

    Args:
        path: a folder, a file, or a pattern of files such as ``train-{0000..1023}.tar``.
        split: "train" or "val"; None where `path` is the split's folder or file itself.
        progress: whether to show progress where indexing takes long.
        on_error: what to do with samples that can't be indexed: "fail" raises, "skip" leaves them
            out and says so in the source's `notes`.

    Raises:
        ValueError: where a split has to be given, or is not one of the two; where what is there
            may be read as two different things.
        FileNotFoundError: where nothing is recognised; says what was looked for and what was found.
        DataError: where what is there is damaged.
    """
    return find_source(path, split).open(Opening(on_error, progress))


def find_source(path: str | os.PathLike[str], split: str | None = None) -> Found:
    """Recognise the dataset at `path` without opening it; arguments and errors of `open_source`."""
    path = os.path.expanduser(os.fspath(path))
    if split is not None and split not in SPLITS:
        raise ValueError(f"expected split 'train' or 'val' (or None), got {split!r}")
    looked_at: list[str] = []
    for candidate in _candidates(path, split):
        found = _recognised(candidate, split)
        if isinstance(found, Found):
            return found
        looked_at.append(f"  {candidate} {found}")
    formats = "\n".join(f"  {module.LOOKS_FOR}" for module in _modules())
    nearby = _nearby(path, split)
    raise FileNotFoundError(
        f"no data set{f' for split {split!r}' if split else ''} at {path}. "
        + (f"Did you mean {nearby}? " if nearby else "")
        + "Looked at\n"
        + "\n".join(looked_at)
        + f"\nand expected one of\n{formats}"
    )


def _nearby(path: str, split: str | None) -> str | None:
    """Return a folder in `path`, or the one above a class's, where there is a data set."""
    if not os.path.isdir(path):
        return None
    with os.scandir(path) as entries:
        folders = sorted(entry.path for entry in entries if is_directory(entry))[:_NEARBY]
    if not folders and split_of(path) is None:
        folders = [os.path.dirname(os.path.abspath(path))]
    return next((folder for folder in folders if _has_source(folder, split)), None)


def _has_source(path: str, split: str | None) -> bool:
    try:
        return any(isinstance(_recognised(at, split), Found) for at in _candidates(path, split))
    except SplitNeededError:
        return True
    except (OSError, ValueError, DataError):
        return False


def _candidates(path: str, split: str | None) -> Iterator[str]:
    """Yield where a split may be: what was made for fast reading first, then what it was made of.

    The original project's LMDB lies beside the folders that it was made of.
    """
    if split is not None and os.path.isdir(path):
        folders = [os.path.join(path, word) for word, of in _SPLIT_WORDS.items() if of == split]
        there = [folder for folder in folders if os.path.exists(folder)] or folders[:1]
        lmdb = os.path.join(path, f"ILSVRC-{split}.lmdb")
        if os.path.exists(lmdb) and not os.path.exists(os.path.join(there[0], "pack.json")):
            yield lmdb
        yield from there
    yield path


def _recognised(path: str, split: str | None) -> Found | str:
    """Return what lies at a path, or why nothing is recognised there."""
    from imagenet_seq.sources.pack import refuse_unfinished

    refuse_unfinished(path)
    place = Place.at(path, split)
    if place is None:
        return "does not exist"
    if not place.is_folder or os.path.basename(path) in _SPLIT_WORDS:
        by_name = _splits_in(path)
        if split is not None and by_name and split not in by_name:
            return f"is by its name the other split, {by_name[0]}"
    answers: list[Found | str] = []
    for module in _modules():
        if (answer := module.find(place)) is not None:
            answers.append(answer)
        if isinstance(answer, Found) and answer.kind == "pack":
            return answer  # its shards are tars, too
    found = [answer for answer in answers if isinstance(answer, Found)]
    if len(found) > 1:
        raise ValueError(
            f"{path} may be read as different things: "
            + "; ".join(answer.what for answer in found)
            + ". Pass the path of the one that you mean"
        )
    if found:
        return found[0]
    return "; ".join(map(str, answers)) or _described(place)


def _described(place: Place) -> str:
    if not place.files and not place.folders:
        return "is empty"
    if not place.is_folder:
        return "is a file of none of the formats"
    shown = ", ".join((*(f"{name}/" for name in place.folders), *place.files)[:4])
    return f"holds {len(place.folders)} folders and {len(place.files)} files ({shown}, ...)"


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    return tuple(importlib.import_module(f"imagenet_seq.sources.{name}") for name in _FORMATS)


def _may_be_data(entry: os.DirEntry[str]) -> bool:
    """Tell what may be from what is made beside data, and from pipes and devices.

    Beside it lie kept indexes, and LMDB files that are not finished. To open a pipe would wait for
    its writer. A link that leads nowhere may be data that is missing.
    """
    if entry.name.startswith(".imagenet-seq-") or entry.name.endswith(".lmdb.partial"):
        return False
    try:
        return entry.is_file() or entry.is_dir() or not os.path.exists(entry.path)
    except OSError:
        return True


def is_split(folder: str) -> bool:
    """Tell a split's folder from a class that is called "train": that one holds only images."""
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.name == "pack.json" or is_directory(entry) for entry in entries)


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Tell a directory, or a link to one, as os.walk does: a link that leads nowhere is a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False
