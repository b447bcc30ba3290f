"""Names of classes, where a source has labels but no names for them."""

from __future__ import annotations

import functools
import re
from importlib import resources

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Names

MAX_CLASSES = 100_000
"""More than any data set of images has (ImageNet-21k: 21,841); a label beyond is damage, and
must not make us name that many classes."""

_WNID = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1000 classes of ILSVRC2012 as wnids, in the order of torchvision's labels.

    That is their sorted order, in which class folders are numbered.
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

    By the wnids in the samples' names, where each label has one and each wnid one label; by
    ImageNet's, where labels go up to 999; else by their numbers.

    Args:
        label: class of each sample; -1: unknown.
        names: of the samples.
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
    """Return the wnid of each label as the samples' names have it; None where they don't agree."""
    found: dict[int, str] = {}
    for number, name in zip(label.tolist(), names, strict=True):
        wnid = _WNID.search(name)
        if number >= 0 and (wnid is None or found.setdefault(number, wnid[0]) != wnid[0]):
            return None
    return found
