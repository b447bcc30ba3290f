"""Recognises the format of a dataset by its content, and opens it.

Each format is a module in `formats`; nothing outside it knows the format. It has `LOOKS_FOR`, a
line for messages, and `find(place)`, which looks at names and a few first bytes and returns

* a `Found`, which `open_source` opens,
* a string: why something that resembles this format is not it,
* None: nothing like it.

It raises `SplitNeededError` if there are several splits and none was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import OnError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats import (
    arrow,
    beton,
    flat,
    imagefolder,
    lmdb,
    mds,
    official,
    pack,
    parquet,
    tfrecord,
    webdataset,
)
from imagenet_seq.sources.place import (
    SPLIT_WORDS,
    SPLITS,
    Found,
    Opening,
    Place,
    SplitNeededError,
    is_directory,
    split_of,
    splits_in,
)

_FORMATS = (
    pack,
    arrow,
    beton,
    flat,
    imagefolder,
    lmdb,
    mds,
    official,
    parquet,
    tfrecord,
    webdataset,
)
"""Asked in this order."""

_NEARBY = 16
"""How many folders to look into for a suggestion in the error message."""


def open_source(
    path: str | os.PathLike[str],
    split: str | None = None,
    progress: bool = True,
    on_error: OnError = "fail",
) -> Source:
    """Open the dataset at `path`, recognised by its content.

    With a split, looks at `path/split` first, then for files of that split in `path`.

    Args:
        path: a folder, a file, or a pattern of files such as ``train-{0000..1023}.tar``.
        split: "train" or "val"; None if `path` is the split's folder or file itself.
        progress: whether to show a progress bar if indexing takes long.
        on_error: what to do with samples that can't be indexed: "fail" raises, "skip" leaves them
            out and says so in the source's `notes`.

    Raises:
        ValueError: if a split has to be given, or is not one of the two; if several formats fit.
        FileNotFoundError: if no format fits; says what was looked for and what was found.
        DataError: if the data is damaged.
    """
    return find_source(path, split).open(Opening(on_error, progress))


def find_source(path: str | os.PathLike[str], split: str | None = None) -> Found:
    """Recognise the dataset at `path` without opening it; arguments and errors as `open_source`."""
    path = os.path.expanduser(os.fspath(path))
    if split is not None and split not in SPLITS:
        raise ValueError(f"expected split 'train' or 'val' (or None), got {split!r}")
    looked_at: list[str] = []
    for candidate in _candidates(path, split):
        found = _recognised(candidate, split)
        if isinstance(found, Found):
            return found
        looked_at.append(f"  {candidate} {found}")
    of_split = f" for split {split!r}" if split else ""
    nearby = f"Did you mean {folder}? " if (folder := _nearby(path, split)) else ""
    formats = (f"  {module.LOOKS_FOR}" for module in _FORMATS)
    lines = ("Looked at", *looked_at, "and expected one of", *formats)
    raise FileNotFoundError(f"no data set{of_split} at {path}. {nearby}" + "\n".join(lines))


def _nearby(path: str, split: str | None) -> str | None:
    """Return a folder in `path`, or the parent of a class's folder, if it holds a data set."""
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
    """Yield the paths where a split may be, first those of files made for fast reading.

    The original project's LMDB lies beside the folders that it was made from.
    """
    if split is not None and os.path.isdir(path):
        folders = [os.path.join(path, word) for word, of in SPLIT_WORDS.items() if of == split]
        there = [folder for folder in folders if os.path.exists(folder)] or folders[:1]
        lmdb = os.path.join(path, f"ILSVRC-{split}.lmdb")
        if os.path.exists(lmdb) and not os.path.exists(os.path.join(there[0], "pack.json")):
            yield lmdb
        yield from there
    yield path


def _recognised(path: str, split: str | None) -> Found | str:
    """Return what lies at a path, or why no format fits."""
    pack.refuse_unfinished(path)
    place = Place.at(path, split)
    if place is None:
        return "does not exist"
    if not place.is_folder or os.path.basename(path) in SPLIT_WORDS:
        by_name = splits_in(path)
        if split is not None and by_name and split not in by_name:
            return f"is by its name the other split, {by_name[0]}"
    answers: list[Found | str] = []
    for module in _FORMATS:
        if (answer := module.find(place)) is not None:
            answers.append(answer)
        if isinstance(answer, Found) and answer.kind == "pack":
            return answer  # its shards are tars, too
    found = [answer for answer in answers if isinstance(answer, Found)]
    if len(found) > 1:
        different = "; ".join(answer.what for answer in found)
        raise ValueError(
            f"{path} may be read as different things: {different}. Pass the path of the one that "
            "you mean"
        )
    if found:
        return found[0]
    return "; ".join(map(str, answers)) or _described(place)


def _described(place: Place) -> str:
    if not place.files and not place.folders:
        return "is empty"
    if not place.is_folder:
        return "is a file of no known format"
    shown = ", ".join((*(f"{name}/" for name in place.folders), *place.files)[:4])
    return f"holds {len(place.folders)} folders and {len(place.files)} files ({shown}, ...)"
