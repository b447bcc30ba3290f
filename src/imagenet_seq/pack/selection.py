"""Which samples of a source are packed."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Source


@dataclass(frozen=True)
class Selection:
    """Which samples of a source are packed; without arguments, all.

    The chosen classes get the labels 0, 1, ... in the order that they have in the source: for
    wnids, as in an ImageFolder of the chosen class folders.

    Attributes:
        include: patterns of class names, as in a shell; empty: all classes.
        exclude: patterns of class names to leave out.
        classes: class names; words behind a name are ignored. None: all classes.
        limit: maximum number of samples of each class. A hash of their names chooses them, so a
            larger limit only adds samples, and the seed of the order does not matter.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected 1 or more samples of a class, got {self.limit}")
        if self.classes is not None and not self.classes:
            raise ValueError("classes: expected names of classes, got none")

    def describe(self) -> dict[str, Any]:
        """Return the selection as pack.json records it: only the arguments that were given."""
        chosen = {name: value for name, value in asdict(self).items() if value}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items()}

    @classmethod
    def recorded(cls, settings: Mapping[str, Any]) -> Selection:
        """Return the selection that the settings in pack.json describe."""
        names = [field.name for field in fields(cls)]
        chosen = {name: settings[name] for name in names if name in settings}
        limit = chosen.pop("limit", None)
        lists = all(
            isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in chosen.values()
        )
        if not lists or not isinstance(limit, (int, type(None))):
            raise ValueError(f"'settings': {settings} describe no selection of classes")
        return cls(**{name: tuple(names) for name, names in chosen.items()}, limit=limit)

    def of(self, source: Source) -> Source:
        """Return the source of the chosen samples, of which there must be some."""
        if self == Selection():
            return source
        index = source.index
        chosen = self._chosen(index)
        number = np.full(len(index.classes), -1, np.int32)
        number[chosen] = np.arange(len(chosen))
        label = number[np.asarray(index.targets)]
        samples = np.flatnonzero(label >= 0)
        if self.limit is not None:
            samples = _limited(index.name, label, samples, self.limit)
        if not len(samples):
            raise ValueError(f"{index.root}: there is no sample of the chosen classes")
        classes = tuple(index.classes[place] for place in chosen)
        taken = dataclasses.replace(index.take(samples), classes=classes, label=label[samples])
        return dataclasses.replace(source, index=taken)

    def _chosen(self, index: Index) -> list[int]:
        """Return the labels that the chosen classes have in the source."""
        listed = {_name_in(line, index) for line in self.classes or ()}
        matched = [_matching(pattern, index) for pattern in self.include]
        included = set().union(*matched) if matched else set(index.classes)
        excluded: set[str] = set().union(*(_matching(pattern, index) for pattern in self.exclude))
        chosen = [
            place
            for place, name in enumerate(index.classes)
            if name in included - excluded and (self.classes is None or name in listed)
        ]
        if not chosen:
            raise ValueError(f"{index.root}: no class is left of its {len(index.classes)}")
        return chosen


def _name_in(line: str, index: Index) -> str:
    """Return the class that a whole line names, or its first word."""
    for name in (line, line.split()[0]):
        if name in index.class_to_idx:
            return name
    raise ValueError(f"{line!r} is no class of {index.root}: {_some_classes(index)}")


def _matching(pattern: str, index: Index) -> set[str]:
    found = {name for name in index.classes if fnmatch.fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(f"{pattern!r} matches no class of {index.root}: {_some_classes(index)}")
    return found


def _some_classes(index: Index) -> str:
    more = ", ..." * (len(index.classes) > 3)
    return f"its {len(index.classes)} classes are {', '.join(index.classes[:3])}{more}"


def _limited(
    names: Names, label: npt.NDArray[np.int32], samples: npt.NDArray[np.int64], limit: int
) -> npt.NDArray[np.int64]:
    """Return up to `limit` samples of each class: those whose names have the smallest hashes.

    These are not the hashes of the order, in which the chosen samples would all come first.
    """
    digests = (
        hashlib.blake2b(os.fsencode(names[sample]), digest_size=8, person=b"limit").digest()
        for sample in samples.tolist()
    )
    hashes = np.frombuffer(b"".join(digests), "<u8")
    order = np.lexsort((hashes, label[samples]))
    in_order = label[samples][order]
    rank = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    return np.sort(samples[order[rank < limit]])


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a file with one class per line, in UTF-8; # begins a comment."""
    with open(path, encoding="utf-8") as file:
        lines = [line.partition("#")[0].strip() for line in file]
    return tuple(filter(None, lines))
