"""The archives of ILSVRC2012 as they are downloaded, read where they lie.

`ILSVRC2012_img_train.tar` is a tar of one tar for each class. `ILSVRC2012_img_val.tar` holds images
without labels; those are in `ILSVRC2012_devkit_t12.tar.gz`: for each image an ILSVRC2012_ID, which
meta.mat translates to a wnid. Names and labels are those of torchvision.datasets.ImageNet, which
extracts the archives.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.classes import is_wnid, sorted_classes
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats.tar_file import InMemory, Member, first_members, members
from imagenet_seq.sources.place import Found, Opening, Place, Seen, split_needed
from imagenet_seq.sources.scan import FileStream, Problems, Rows, bytes_bar


class Download(NamedTuple):
    """Name, size and MD5 of an archive that is offered for download."""

    name: str
    size_bytes: int
    md5: str


DOWNLOADS = {
    "train": Download(
        "ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"
    ),
    "val": Download("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
}
"""The archives by split. MD5: torchvision.datasets.imagenet.ARCHIVE_META."""

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_DEVKIT_MD5 = "fa75699e90414af021442c21a62c3abf"
_MAX_DEVKIT_BYTES = 256 << 20  # decompressed; 2.5 MB are downloaded
NAMES = frozenset(download.name for download in DOWNLOADS.values())
LOOKS_FOR = (
    f"the ILSVRC2012 archives: {DOWNLOADS['train'].name}; {DOWNLOADS['val'].name} with {DEVKIT} "
    "beside it"
)
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_DAMAGED = "damaged: expected MD5"

_FEW = 4
"""How many archives of other names to look into; shards come in hundreds, each costs a seek."""


def find(place: Place) -> Found | str | None:
    """Recognise the train or the val archive by its first member; ValueError if one is twice."""
    names = [name for name in place.files if name in NAMES]
    if not names:
        names = [name for name in place.files if name.endswith(".tar") or not place.is_folder]
    paths = [os.path.join(place.folder, name) for name in names[: _FEW + 1]]
    if not paths or len(paths) > _FEW or "pack.json" in place.files:
        return None
    found = {path: split for path in paths if (split := split_in(path))}
    if place.split is None and len(set(found.values())) > 1:
        raise split_needed(f"{place.path} holds the archives of train and val")
    of_split = [path for path, split in found.items() if place.split in (None, split)]
    if len(of_split) > 1:
        raise ValueError(
            f"{place.path}: expected one archive of a split, got {' and '.join(of_split)}. Pass "
            "the path of the one that you mean"
        )
    if not of_split:
        return f"holds the archive of {found.popitem()[1]} only" if found else None
    return _found(of_split[0], found[of_split[0]])


def _found(path: str, split: str) -> Found:
    def open_archive(how: Opening) -> Source:
        # Notice a missing devkit before reading the archive.
        needed = [path] if split == "train" else [path, _devkit_of(path)]
        scan = _TrainScan if split == "train" else _ValScan
        scanned = indexed(
            "ilsvrc2012", path, needed, lambda: scan(needed, how).result(), how.on_error
        )
        damaged = [remark for remark in scanned.remarks if _DAMAGED in remark]
        if damaged and how.on_error == "fail":  # also if a cached index says so
            raise DataError(
                f"{damaged[0]}. Download it again, or use it as it is: on_error='skip' "
                "(--on-error skip)"
            )
        return Source("ilsvrc2012", scanned.index, is_permuted(scanned.index), notes=scanned.notes)

    what = f"the archive of ILSVRC2012's {split} images {os.path.basename(path)}"
    return Found("ilsvrc2012", what, open_archive, [path])


def split_in(path: str) -> str | None:
    """Return the split of an archive, by its first member; None if it is neither of the two."""
    try:
        first = first_members(path, 1)
        if not first:
            return None
        if _VAL_IMAGE.fullmatch(first[0].name):
            return "val"
        return "train" if _CLASS_TAR.fullmatch(first[0].name) else None
    except (DataError, OSError):
        return None


def _devkit_of(archive: str) -> str:
    """Return the path of the devkit beside an archive, or one folder up."""
    folder = os.path.dirname(os.path.abspath(archive))
    for candidate in (folder, os.path.dirname(folder)):
        path = os.path.join(candidate, DEVKIT)
        if os.path.exists(path):
            return path
    raise FileNotFoundError(
        f"{archive}: its images have no labels without {DEVKIT}: put that (2.5 MB, from the same "
        f"download page) into {folder}"
    )


# ---- scanning ------------------------------------------------------------------------------------


class _Scan:
    """One pass over an archive, which also computes its MD5."""

    split: str

    def __init__(self, paths: list[str], how: Opening) -> None:
        self._path, self._download, self._how = paths[0], DOWNLOADS[self.split], how
        self._rows, self._problems = Rows(), Problems(how.on_error)
        self._remarks: list[str] = []
        self._names: set[str] = set()  # in the archive; for the train archive, in the class's tar
        self._classes: list[str] = []

    def result(self) -> Scanned:
        size, digest = os.path.getsize(self._path), None
        if size == self._download.size_bytes:
            digest = hashlib.md5(usedforsecurity=False)
        else:
            self._remarks.append(
                f"{self._path}: not the official archive, which has {self._download.size_bytes} "
                f"bytes, not {size}: MD5 not compared"
            )
        folder, name = os.path.split(self._path)
        with (
            bytes_bar(name, size, self._how.progress) as bar,
            FileStream(self._path, bar, digest) as stream,
        ):
            self._read(stream)
            if digest is not None:
                stream.finish()
                if digest.hexdigest() != self._download.md5:
                    self._remarks.append(
                        f"{self._path}: {_DAMAGED} {self._download.md5}, got {digest.hexdigest()}"
                    )
        label, classes = self._labels_and_classes()
        index, problems = self._rows.index(folder, [name], classes, label), self._problems
        return Scanned(index, {}, problems.messages, problems.count, self._remarks)

    def _read(self, stream: FileStream) -> None:
        raise NotImplementedError

    def _labels_and_classes(self) -> tuple[npt.NDArray[np.int32], Sequence[str]]:
        return self._rows.label, self._classes

    def _add(self, stream: FileStream, member: Member, name: str, label: int) -> None:
        wrong = ""
        if not member.length:
            wrong = "expected an image, got 0 bytes"
        elif name in self._names:
            wrong = "expected one image of this name, got another (a duplicate)"
        elif member.leads_outside:
            wrong = "expected a path inside the archive, got one outside"
        if wrong:
            self._problems.report(f"{self._path}: {name!r} at offset {member.offset}: {wrong}")
            return
        self._names.add(name)
        sample = self._rows.add(name, 0, member.offset, member.length, label)
        if self._how.visit is not None:
            self._how.visit(Seen(sample, name, stream.take(member.offset, member.length)))


class _TrainScan(_Scan):
    """A tar of tars; until all have been read, a label is the ordinal of the class's tar."""

    split = "train"

    def _read(self, stream: FileStream) -> None:
        for inner in members(stream, self._problems, self._remarks):
            is_class = _CLASS_TAR.fullmatch(inner.name)
            if is_class is None or is_class[1] in self._classes:
                got = "another one of that name" if is_class else "something else"
                self._problems.report(
                    f"{self._path}: member {inner.name!r} at offset {inner.offset}: expected the "
                    f"tar of one class, such as n01440764.tar, got {got}"
                )
                continue
            self._classes.append(is_class[1])
            self._read_class(stream, inner, is_class[1])

    def _read_class(self, stream: FileStream, inner: Member, wnid: str) -> None:
        self._names.clear()
        before = len(self._rows)
        for member in members(stream, self._problems, self._remarks, inner):
            if member.is_image:
                self._add(stream, member, f"{wnid}/{member.name}", len(self._classes) - 1)
        if len(self._rows) == before:
            self._problems.report(
                f"{self._path}: {inner.name} at offset {inner.offset}: expected images of the "
                "class, got none"
            )

    def _labels_and_classes(self) -> tuple[npt.NDArray[np.int32], Sequence[str]]:
        return sorted_classes(self._classes, self._rows.label)


class _ValScan(_Scan):
    split = "val"

    def __init__(self, paths: list[str], how: Opening) -> None:
        super().__init__(paths, how)
        self._classes, self._truth, md5 = _read_devkit(paths[1])
        if md5 != _DEVKIT_MD5:
            self._remarks.append(
                f"{paths[1]}: not the official devkit: expected MD5 {_DEVKIT_MD5}, got {md5}"
            )

    def _read(self, stream: FileStream) -> None:
        truth, classes = self._truth, self._classes
        for member in members(stream, self._problems, self._remarks):
            is_image = _VAL_IMAGE.fullmatch(member.name)
            number = int(is_image[1]) if is_image else 0
            if not 1 <= number <= len(truth):
                self._problems.report(
                    f"{self._path}: member {member.name!r} at offset {member.offset}: expected "
                    f"ILSVRC2012_val_00000001.JPEG to {len(truth):08d}.JPEG"
                )
                continue
            label = truth[number - 1]
            self._add(stream, member, f"{classes[label]}/{member.name}", label)
        if len(self._rows) != len(truth):
            self._remarks.append(
                f"{self._path}: holds {len(self._rows)} of the {len(truth)} images of the ground "
                "truth"
            )


# ---- the devkit ----------------------------------------------------------------------------------


def _read_devkit(path: str) -> tuple[list[str], list[int], str]:
    """Return the sorted classes, the label of each val image by its number, and the MD5."""
    meta, truth, md5 = _devkit_files(path)
    wnid_of_id = _classes_in(path, meta)
    wnids = sorted(wnid_of_id.values())
    label_of_id = {number: wnids.index(wnid) for number, wnid in wnid_of_id.items()}
    labels = []
    for i, line in enumerate(truth.split()):
        label = label_of_id.get(int(line)) if line.isdigit() and len(line) < 10 else None
        if label is None:
            raise DataError(
                f"{path}: ground truth of image {i + 1}: expected an ILSVRC2012_ID of a class in "
                f"meta.mat, got {line[:20]!r}. Download it again"
            )
        labels.append(label)
    return wnids, labels, md5


def _devkit_files(path: str) -> tuple[bytes, bytes, str]:
    """Return meta.mat, the ground truth, and the archive's MD5."""
    with open(path, "rb") as file:
        packed = file.read(_MAX_DEVKIT_BYTES)
    try:
        with gzip.open(io.BytesIO(packed)) as unpacked:
            data = unpacked.read(_MAX_DEVKIT_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a whole gzip file ({error}). Download it again"
        ) from error
    found = {
        os.path.basename(member.name): data[member.offset : member.offset + member.length]
        for member in members(InMemory(path, data), Problems("skip"), [])
    }
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"{path}: expected data/{missing[0]} in it, found {', '.join(sorted(found)[:8])}. "
            "Download it again"
        )
    md5 = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    return found[wanted[0]], found[wanted[1]], md5


def _classes_in(path: str, meta: bytes) -> dict[int, str]:
    """Return the wnid of each ILSVRC2012_ID that is a class: a synset without children."""
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"{path}: its meta.mat is in MATLAB's format and needs scipy: pip install scipy"
        ) from error
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        classes = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
            for synset in synsets
            if int(synset["num_children"]) == 0
        }
    except Exception as error:  # scipy raises anything if the file is damaged
        raise DataError(
            f"{path}: meta.mat: expected a table 'synsets' with ILSVRC2012_ID, WNID and "
            f"num_children ({error!r}). Download it again"
        ) from error
    wnids = set(classes.values())
    if not wnids or len(wnids) < len(classes) or not all(map(is_wnid, wnids)):
        raise DataError(
            f"{path}: meta.mat: expected classes with a wnid each, got {len(classes)}, such as "
            f"{next(iter(classes.values()), None)!r}. Download it again"
        )
    return classes
