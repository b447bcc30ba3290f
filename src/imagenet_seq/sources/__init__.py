"""Sources: what lies on disk, recognised by its content and given to plan, loader and pack."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.index import Index

SPLITS = ("train", "val")


class Block(NamedTuple):
    """The bytes of a foreign block, and where each of its samples lies in them."""

    bytes: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


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
    """

    kind: str
    index: Index
    permuted: bool = False
    foreign: bool = False

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


def open_source(
    path: str | os.PathLike[str], split: str | None = None, progress: bool = True
) -> Source:
    """Open the dataset at `path`, recognised by its content: a pack or an ImageFolder.

    With a split, `path/split` is looked at first, then `path` itself.

    Args:
        path: a pack, a folder of class folders, or a root that holds either as train/ and val/.
        split: "train" or "val"; None where `path` is the split's folder itself.
        progress: whether to show progress where indexing takes long.

    Raises:
        ValueError: where a split has to be given, or is not one of the two.
        FileNotFoundError: where nothing is recognised; says what was looked for and what was found.
        DataError: where what is there is damaged.
    """
    path = os.path.expanduser(os.fspath(path))
    if split is not None and split not in SPLITS:
        raise ValueError(f"expected split 'train' or 'val' (or None), got {split!r}")
    looked_at: list[str] = []
    for folder in [path] if split is None else [os.path.join(path, split), path]:
        found = _look_at(folder, split)
        if found.kind == "pack":
            from imagenet_seq.sources.pack import open_pack

            return open_pack(folder)
        if found.kind == "imagefolder":
            from imagenet_seq.sources.imagefolder import open_imagefolder

            return open_imagefolder(folder, progress)
        if found.kind == "root" and split is None:
            raise ValueError(f"{path} {found.text}: pass split='train' or split='val'")
        looked_at.append(f"  {folder} {found.text}")
        if folder != path and found.kind != "nothing":
            break  # what lies at path/split is meant, so `path` must not pass for a class folder
    raise FileNotFoundError(
        f"no data set{f' for split {split!r}' if split else ''} at {path}. Looked at\n"
        + "\n".join(looked_at)
        + "\nand expected a pack (a folder with pack.json, made by 'imagenet-seq pack') "
        "or an ImageFolder (one folder of images for each class)."
    )


class _Found(NamedTuple):
    kind: str  # "pack", "imagefolder", "root" of splits, "other", "nothing"
    text: str = ""  # for messages, where it can't be opened


def _look_at(folder: str, split: str | None) -> _Found:
    from imagenet_seq.sources.pack import refuse_unfinished

    refuse_unfinished(folder)
    if not os.path.exists(folder):
        return _Found("nothing", "does not exist")
    if not os.path.isdir(folder):
        return _Found("other", "is a file, expected a folder")
    base = os.path.basename(os.path.abspath(folder))
    if split is not None and base in SPLITS and base != split:
        return _Found("other", f"is by its name the other split, {base}")
    if os.path.exists(os.path.join(folder, "pack.json")):
        return _Found("pack")
    if splits := [name for name in SPLITS if is_split(os.path.join(folder, name))]:
        return _Found("root", f"holds {' and '.join(f'{name}/' for name in splits)}")
    for name in SPLITS:  # their folders must not pass for classes
        refuse_unfinished(os.path.join(folder, name))
    with os.scandir(folder) as entries:
        is_folder = [entry.is_dir() for entry in entries]
    if any(is_folder):
        return _Found("imagefolder")
    if is_folder:
        return _Found(
            "other",
            f"holds {len(is_folder)} files but no class folders; sort the images into one folder "
            "for each class (torchvision.datasets.ImageNet does it for the official archives)",
        )
    return _Found("other", "is empty")


def is_split(folder: str) -> bool:
    """Tell a split's folder from a class that is called "train": that one holds only images."""
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.name == "pack.json" or entry.is_dir() for entry in entries)
