"""Class names for sources that have labels without names."""

from __future__ import annotations

import functools
import re
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
    """Return the 1000 classes of ILSVRC2012 as wnids, in the order of torchvision's labels.

    It is their sorted order, in which torchvision numbers class folders.
    """
    text = (
        resources.files("imagenet_seq").joinpath("index", "imagenet_classes.txt").read_text("ascii")
    )
    return tuple(text.split())


def is_wnid(name: str) -> bool:
    """Whether a name is a WordNet id, as ImageNet's classes are called."""
    return re.fullmatch(r"n\d{8}", name) is not None


def classes_of(label: npt.NDArray[np.int32], names: Names) -> tuple[str, ...]:
    """Name the classes of labels that come without names.

    They are the wnids in the samples' names if each label has one and each wnid one label; those of
    ImageNet if the largest label is 999; else the labels' numbers.

    Args:
        label: class of each sample; -1: unknown.
        names: name of each sample.
    """
    num_classes = int(label.max(initial=-1)) + 1
    wnids = _wnids(label, names)
    if wnids is not None:
        found = [wnids.get(number, str(number)) for number in range(num_classes)]
        if len(set(found)) == num_classes:
            return tuple(found)
    if num_classes == len(imagenet_classes()):
        return imagenet_classes()
    return tuple(map(str, range(num_classes)))


def _wnids(label: npt.NDArray[np.int32], names: Names) -> dict[int, str] | None:
    """Return the wnid of each label by the samples' names; None if these disagree."""
    found: dict[int, str] = {}
    for number, name in zip(label.tolist(), names, strict=True):
        wnid = _WNID.search(name)
        if number >= 0 and (wnid is None or found.setdefault(number, wnid[0]) != wnid[0]):
            return None
    return found
