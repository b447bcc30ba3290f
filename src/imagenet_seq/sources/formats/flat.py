"""A folder of images without class folders, and a file with their labels.

The labels are in Kaggle's solution, in Caffe's and tensorpack's val.txt, or in any list of names
and labels. Names are matched without their folder, and without extension if the list has none.
Samples are in the order of their names.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of
from imagenet_seq.index.columns import Names
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats import imagefolder
from imagenet_seq.sources.images import is_image_name
from imagenet_seq.sources.place import SPLITS, Found, Opening, Place, split_needed, split_of
from imagenet_seq.sources.scan import Problems

LOOKS_FOR = (
    "a folder of images and their labels: Kaggle's ILSVRC/Data/CLS-LOC with LOC_val_solution.csv, "
    "or val.txt, labels.csv, labels.txt in the folder or beside it ('name label' lines)"
)
_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_KAGGLE = (("ILSVRC", "Data", "CLS-LOC"), ("Data", "CLS-LOC"), ("CLS-LOC",))

_LEVELS = 4
"""How far above Kaggle's folder of images the one with the lists may be."""

_KINDS = ("csv", "txt", "tsv")
_PEEK_BYTES = 64 << 10
_NAME_HEADS = (
    "imageid", "image_id", "image", "filename", "file_name", "file", "name", "path", "id",
)  # fmt: skip
_LABEL_HEADS = (
    "predictionstring", "label", "class", "target", "label_id", "class_id", "wnid", "category",
)  # fmt: skip
_WNID, _NUMBER = re.compile(r"n\d{8}"), re.compile(r"[+-]?[0-9]+")


def find(place: Place) -> Found | str | None:
    """Recognise a folder of images with labels, or the root of Kaggle's copy."""
    if not place.is_folder or "pack.json" in place.files:
        return None
    for names in _KAGGLE:
        if any(os.path.isdir(os.path.join(place.path, *names, split)) for split in SPLITS):
            return _find_in_kaggle(place, *names)
    if place.split is None:
        for name in set(SPLITS).intersection(place.folders):
            inside = place.below(name)
            # With a split it looks no deeper, since links may go round in circles.
            if inside and isinstance(find(dataclasses.replace(inside, split=name)), Found):
                raise split_needed(f"{place.path} holds images with labels in {name}/")
    if not any(map(is_image_name, place.files)) or imagefolder.has_classes(place):
        return None
    known = _Images.of(place.files)
    lists = [path for path in _possible_lists(place.path) if _is_about(path, known)]
    if not lists:
        looked_for = dict.fromkeys(map(os.path.basename, _possible_lists(place.path)))
        return (
            f"holds {len(place.files)} files but no class folders, and no list of their labels in "
            f"it or beside it ({', '.join(looked_for)}); sort the images into one folder for each "
            "class, or put such a list there: lines of 'name label'"
        )
    what = f"a folder of {len(place.files)} files with labels in {' and '.join(lists)}"
    return Found("flat", what, lambda how: _open(place.path, lists, how))


def _find_in_kaggle(place: Place, *names: str) -> Found | str | None:
    if place.split is None:
        raise split_needed(f"{place.path} is Kaggle's copy of ImageNet")
    inside = place.below(*names, place.split)
    if inside is None:
        return f"holds {os.path.join(*names)}/, but no {place.split}/ in it"
    return imagefolder.find(inside) if imagefolder.has_classes(inside) else find(inside)


def _open(folder: str, lists: Sequence[str], how: Opening) -> Source:
    depends_on = [folder, *lists, *filter(None, [_class_list(folder, lists)])]
    if train := _train_folder(folder):
        depends_on.append(train.path)
    scanned = indexed("flat", folder, depends_on, lambda: _scan(folder, lists, how), how.on_error)
    return Source("flat", scanned.index, notes=scanned.notes)


def _scan(folder: str, lists: Sequence[str], how: Opening) -> Scanned:
    with os.scandir(folder) as entries:
        files = sorted(entry.name for entry in entries if is_image_name(entry.name))
    images, problems = _Images.of(files), Problems(how.on_error)
    told = [_read_list(path, images, problems) for path in lists]
    classes, from_where = _classes(folder, lists, told)
    found = [_labels(entries, classes, from_where, problems) for entries in told]
    _refuse_disagreement(lists, found)
    labels = found[0]
    for file in files:
        if file not in told[0]:
            problems.report(f"{os.path.join(folder, file)}: {lists[0]} has no label for it")
    if not labels:
        raise DataError(f"{folder}: expected images with labels in {lists[0]}, found none")
    chosen = [file for file in files if file in labels]
    names = Names.from_strings(chosen)
    label = np.array([labels[file] for file in chosen], np.int32)
    index = imagefolder.index_of_files(folder, names, label, classes or classes_of(label, names))
    remarks = _remarks(folder, index.classes, from_where)
    if not classes and label.min() > 0:
        remarks += (
            f"{lists[0]}: no image has label 0. Labels are taken as they stand there: if they "
            "count from 1, write them again from 0",
        )
    return Scanned(index, {}, problems.messages, problems.count, remarks)


# ---- where lists of labels are -------------------------------------------------------------------


def _possible_lists(folder: str) -> list[str]:
    """Return the paths where a folder's labels may be."""
    folder = os.path.abspath(folder)
    above, name = os.path.split(folder)
    split = split_of(name) or "val"
    places = [
        *(os.path.join(at, f"{split}.txt") for at in (folder, above)),
        *(os.path.join(folder, f"labels.{kind}") for kind in _KINDS),
        *(os.path.join(above, f"{stem}.{kind}") for stem in (name, "labels") for kind in _KINDS),
    ]
    if split == "val":
        places += [os.path.join(at, _SOLUTION) for at in _upwards(folder)]
        tensorpack = os.environ.get("TENSORPACK_DATASET")
        if tensorpack and not any(map(os.path.isfile, places)):
            places.append(os.path.join(tensorpack, "ilsvrc_metadata", "val.txt"))
    return list(dict.fromkeys(places))


def _upwards(folder: str) -> list[str]:
    """Return a folder and those above it."""
    found = [os.path.abspath(folder)]
    for _ in range(_LEVELS):
        found.append(os.path.dirname(found[-1]))
    return found


def _is_about(path: str, images: _Images) -> bool:
    """Whether a file has labels of these images, by its first lines."""
    try:
        with open(path, "rb") as file:
            lines = file.read(_PEEK_BYTES).decode("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    return any(images.find(line.name) for line in _parsed(lines) if isinstance(line, _Line))


# ---- reading them --------------------------------------------------------------------------------


class _Images(NamedTuple):
    """Names of images, and the name of each by its stem; "" for a stem that several share."""

    names: frozenset[str]
    of_stem: Mapping[str, str]

    @classmethod
    def of(cls, files: Iterable[str]) -> _Images:
        names = [name for name in files if is_image_name(name)]
        of_stem: dict[str, str] = {}
        for name in names:
            stem = os.path.splitext(name)[0]
            of_stem[stem] = "" if stem in of_stem else name
        return cls(frozenset(names), of_stem)

    def find(self, name: str) -> str | None:
        """Return the image that a list means by `name`."""
        base = os.path.basename(name)
        return base if base in self.names else self.of_stem.get(base) or None


class _Line(NamedTuple):
    number: int
    name: str
    label: str


class _Told(NamedTuple):
    """The label that a list gives to an image, and where."""

    where: str
    label: str


def _parsed(lines: Iterable[str]) -> Iterator[_Line | int]:
    """Yield the lines of a list, or the number of one that has no name and label."""
    name_at, label_at = 0, 1
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = _fields(line)
        if number == 1:
            heads = [head.lower() for head in fields]
            names = [heads.index(head) for head in _NAME_HEADS if head in heads]
            labels = [heads.index(head) for head in _LABEL_HEADS if head in heads]
            if names and labels:
                name_at, label_at = names[0], labels[0]
                continue
        if len(fields) <= max(name_at, label_at):
            yield number
            continue
        label = fields[label_at]
        wnid = _WNID.match(label)  # in Kaggle's solution, boxes follow it
        yield _Line(number, fields[name_at], wnid[0] if wnid else label)


def _fields(line: str) -> list[str]:
    for separator in ("\t", ","):
        if separator in line:
            try:
                return [field.strip() for field in next(csv.reader([line], delimiter=separator))]
            except csv.Error:
                return []
    return line.rsplit(None, 1)


def _read_list(path: str, images: _Images, problems: Problems) -> dict[str, _Told]:
    """Return the labels that a list gives to the images that exist."""
    told: dict[str, _Told] = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in _parsed(file):
            if isinstance(line, int):
                problems.report(f"{path}:{line}: expected a name and a label")
                continue
            where, image = f"{path}:{line.number}", images.find(line.name)
            is_header = line.number == 1 and not is_image_name(line.name)
            if image is None and is_header and not _NUMBER.fullmatch(line.label):
                continue
            if image is None:
                problems.report(f"{where}: there is no image {line.name}")
                continue
            before = told.setdefault(image, _Told(where, line.label))
            if before.label != line.label:
                raise DataError(
                    f"{where}: expected one label for {image}, got {line.label} after "
                    f"{before.label} at {before.where}"
                )
    counted = [str(number + 1) for number in range(len(told))]
    if len(told) > 2 and [entry.label for entry in told.values()] == counted:
        raise DataError(
            f"{path}: expected labels, found the images numbered from 1 to {len(told)}: a list of "
            "images, as in ILSVRC/ImageSets. Remove it"
        )
    return told


def _labels(
    told: Mapping[str, _Told], classes: Sequence[str], from_where: str, problems: Problems
) -> dict[str, int]:
    """Return the label of each image."""
    number_of = {name: number for number, name in enumerate(classes)}
    end = len(classes) or MAX_CLASSES
    of_classes = f" (of {from_where})" if from_where else ""
    labels: dict[str, int] = {}
    for image, (where, text) in told.items():
        number = number_of.get(text, -1)
        if number < 0 and _NUMBER.fullmatch(text):
            number = int(text) if len(text) < 10 else end
        if 0 <= number < end:
            labels[image] = number
        else:
            problems.report(
                f"{where}: expected a class's name or a label in [0, {end}){of_classes}, got {text}"
            )
    return labels


def _refuse_disagreement(lists: Sequence[str], found: Sequence[Mapping[str, int]]) -> None:
    for path, labels in zip(lists[1:], found[1:], strict=True):
        for image in sorted(labels.keys() | found[0].keys()):
            first, other = found[0].get(image), labels.get(image)
            if first != other:
                raise DataError(
                    f"{' and '.join(lists)} disagree, so the labels are ambiguous: of {image} "
                    f"{lists[0]} says {first}, {path} {other}. Remove all but one"
                )


# ---- classes -------------------------------------------------------------------------------------


def _classes(
    folder: str, lists: Sequence[str], told: Sequence[Mapping[str, _Told]]
) -> tuple[list[str], str]:
    """Return the class names and their origin; none if labels are numbers without names.

    ImageNet's classes are numbered by their sorted wnids, whatever the order of a list.
    """
    if path := _class_list(folder, lists):
        return sorted(_wnids_in(path)), path
    if train := _train_folder(folder):
        return list(train.folders), train.path
    texts = {entry.label for entries in told for entry in entries.values()}
    if 2 * sum(1 for text in texts if _NUMBER.fullmatch(text)) > len(texts):
        return [], ""  # the few that are not numbers are mistakes
    return sorted(texts), lists[0]


def _wnids_in(path: str) -> set[str]:
    """Return the first words of a file's lines.

    If there are wnids, refuses a word that is none; also one that occurs twice: one wrong word
    would change the labels of classes that sort behind it.
    """
    wnids: dict[str, None] = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name = line.split()[0]
            first = next(iter(wnids), name)
            is_wrong = bool(_WNID.fullmatch(first)) and not _WNID.fullmatch(name)
            if is_wrong or name in wnids:
                raise DataError(
                    f"{path}:{number}: expected a class of its own, such as {first}, got {name!r}"
                )
            wnids[name] = None
    return set(wnids)


def _class_list(folder: str, lists: Sequence[str]) -> str | None:
    """Return the path of a file whose lines begin with the wnids of the classes."""
    beside = [os.path.join(os.path.dirname(path), "synsets.txt") for path in lists]
    places = [*beside, *(os.path.join(at, _MAPPING) for at in _upwards(folder))]
    return next(filter(os.path.isfile, places), None)


def _train_folder(folder: str) -> Place | None:
    """Return the folder train/ beside a folder, if it holds class folders."""
    train = os.path.join(os.path.dirname(os.path.abspath(folder)), "train")
    place = Place.at(train, None) if os.path.isdir(train) else None
    return place if place is not None and imagefolder.has_classes(place) else None


def _remarks(folder: str, classes: Sequence[str], from_where: str) -> tuple[str, ...]:
    train = _train_folder(folder)
    if train is None or train.folders == tuple(classes):
        return ()
    return (
        f"{from_where or folder} has {len(classes)} classes, and they are not the "
        f"{len(train.folders)} class folders of {train.path}: one label means different things in "
        "the two",
    )
