"""Class names for sources that have labels without names."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Names

MAX_CLASSES = 100_000
"""More than any data set of images has (ImageNet-21k: 21,841). A larger label means damage; never
allocate that many names."""

_WNID = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1000 classes of ILSVRC2012 as sorted wnids, the order of torchvision's labels."""
    file = resources.files("imagenet_seq").joinpath("index", "imagenet_classes.txt")
    return tuple(file.read_text("ascii").split())


def is_wnid(name: str) -> bool:
    """Whether a name is a WordNet id, as ImageNet's classes are called."""
    return re.fullmatch(r"n\d{8}", name) is not None


def classes_of(label: npt.NDArray[np.int32], names: Names) -> tuple[str, ...]:
    """Name the classes of labels that come without names.

    They are the wnids in the samples' names if each label has one and each wnid one label; those of
    ImageNet if the largest label is 999; else the labels' numbers. A label of -1 is unknown.
    """
    num_classes = int(label.max(initial=-1)) + 1
    if (wnids := _wnids(label, names)) is not None:
        found = [wnids.get(number, str(number)) for number in range(num_classes)]
        if len(set(found)) == num_classes:
            return tuple(found)
    if num_classes == len(imagenet_classes()):
        return imagenet_classes()
    return tuple(map(str, range(num_classes)))


def sorted_classes(
    names: Sequence[str], label: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Renumber labels, which are places in `names`, by the sorted names; return both."""
    classes = sorted(set(names))
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places[name] for name in names], np.int32)[label], tuple(classes)


def _wnids(label: npt.NDArray[np.int32], names: Names) -> dict[int, str] | None:
    """Return the wnid of each label by the samples' names; None if these disagree."""
    found: dict[int, str] = {}
    for number, name in zip(label.tolist(), names, strict=True):
        wnid = _WNID.search(name)
        if number >= 0 and (wnid is None or found.setdefault(number, wnid[0]) != wnid[0]):
            return None
    return found
