"""Test by labels whether the samples of an index lie in random order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Index

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class LabelRuns:
    """How often two neighbouring samples have the same class.

    Attributes:
        num_pairs: number of such neighbours.
        num_pairs_uniform: the number expected after a uniform shuffle.
        z: the difference in standard deviations; standard normal after a uniform shuffle.
        p: p-value of the two-sided test of `z`.
    """

    num_pairs: int
    num_pairs_uniform: float
    z: float
    p: float


def label_runs(label: IntArray) -> LabelRuns:
    """Compare how often neighbours have the same class with a uniform shuffle.

    The number of runs is the number of samples less that of such neighbours. Its mean and variance
    over all permutations: A. M. Mood, Annals of Mathematical Statistics 11 (1940) 367. `z` is close
    to normal if about 100 such neighbours or more are expected. Labels are 0 or more.
    """
    size = len(label)
    num_pairs = int(np.count_nonzero(label[1:] == label[:-1]))
    sizes = np.bincount(label).astype(np.float64)
    squares, cubes = float((sizes**2).sum()), float((sizes**3).sum())
    expected = (squares - size) / max(size, 1)
    variance = 0.0
    if size > 1:
        mean_square, mean_cube = squares / size, cubes / size
        variance = (mean_square * (mean_square + size + 1) - 2 * mean_cube - size) / (size - 1)
    z = (num_pairs - expected) / math.sqrt(variance) if variance > 0 else 0.0
    return LabelRuns(num_pairs, expected, z, two_sided(z))


def two_sided(z: float) -> float:
    """Return the two-sided p-value of a standard normal number."""
    return math.erfc(abs(z) / math.sqrt(2))


MIN_PERMUTED = 1000
"""With fewer samples the tests can't tell."""

_MAX_Z, _SORTED_Z = 5.0, 20.0


def is_permuted(index: Index) -> bool:
    """Whether samples lie in random order, as far as their labels tell.

    If so, the classes in each block are mixed, and a block shuffle is as good as a uniform one. Two
    tests must find no difference from a random order: how often neighbours have the same class
    (finds sorted data), and where each class lies on average (finds shards that are mixed in
    themselves, but not with each other). False if the labels can't tell: fewer than 1000 samples,
    or nearly all of one class.
    """
    label = index.label
    if label is None or len(label) < MIN_PERMUTED or int(label.min()) < 0:
        return False
    in_disk_order = label[np.lexsort((index.offset, index.file))]
    if abs(label_runs(in_disk_order).z) > _MAX_Z or abs(_places_z(in_disk_order)) > _MAX_Z:
        return False
    return label_runs(np.sort(label)).z > _SORTED_Z


def _places_z(label: npt.NDArray[np.int32]) -> float:
    """Compare the mean place of each class with a random order, where this is about normal.

    W. H. Kruskal and W. A. Wallis, JASA 47 (1952) 583: H is nearly chi-squared distributed, with
    one degree of freedom less than there are classes.
    """
    size, counts = len(label), np.bincount(label)
    sums = np.bincount(label, np.arange(size) - (size - 1) / 2)
    there = counts > 0
    degrees = int(there.sum()) - 1
    h = 12 / (size * (size + 1)) * float((sums[there] ** 2 / counts[there]).sum())
    return (h - degrees) / math.sqrt(2 * max(degrees, 1))
