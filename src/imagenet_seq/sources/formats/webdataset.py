"""WebDataset shards, and tar archives of class folders.

In a shard, the files of a sample follow each other and share its key: the path up to the first dot
of the base name, as in webdataset's `base_plus_ext`. The extension behind the dot says what a file
is: `.jpg` and the like an image, `.cls`, `.json` or `.txt` its label. A tar archive without such
labels is read like the folder that it would be extracted to.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of, is_wnid, sorted_classes
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats.official import DEVKIT, NAMES, split_in
from imagenet_seq.sources.formats.tar_file import Member, first_members, members
from imagenet_seq.sources.images import IMAGE_EXTENSIONS
from imagenet_seq.sources.place import Found, Opening, Place, Seen, split_needed, split_of
from imagenet_seq.sources.scan import FileStream, Problems, Rows, bytes_bar

LOOKS_FOR = (
    "WebDataset shards: *.tar with .jpg, .jpeg or .png and .cls, .json or .txt of the same name; "
    "or *.tar of class folders"
)
_IMAGES = frozenset(extension[1:] for extension in IMAGE_EXTENSIONS)
_LABELS = ("cls", "json", "txt")  # the first of them that has a label counts
_LABEL_KEYS = ("label", "cls", "class")
_NAME_KEYS = ("wnid", "class_name")
_MAX_LABEL_BYTES = 1 << 20
_MAX_NAME_LENGTH = 200

_SIDECAR = re.compile(
    r"(readme|licen[cs]e|index|info|meta(data)?|dataset|dataset_infos?|classes|labels|synsets?"
    r"|manifest|checksums?|__[^/]*__)\.",
    re.IGNORECASE,
)
"""Files about the data set, which belong to no sample."""

_NUM_LOOKED_AT = 64
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def find(place: Place) -> Found | str | None:
    """Recognise shards or archives of class folders, by the first files in the first of them."""
    if "pack.json" in place.files:
        return None
    tars = [name for name in place.files if _is_candidate(name, place)]
    if not tars:
        compressed = [name for name in place.files if name.lower().endswith(_COMPRESSED)]
        if compressed and compressed[0] != DEVKIT:
            return f"holds {compressed[0]}, which is compressed: decompress it first"
        if place.is_folder:
            return None
    paths = place.of_split(tars or place.files)
    if not paths:
        return f"holds {len(tars)} tar archives, none of split {place.split!r} by its name"
    if split_in(paths[0]) is not None:
        return None
    try:
        kind = _kind_of(paths[0])
    except (DataError, OSError) as error:  # a broken link may lie beside folders
        return str(error) if tars else None
    if kind is None:
        without = "holds no images with labels (.cls, .json, .txt) or in class folders"
        return f"{paths[0]}: {without}" if tars else None
    what = "WebDataset shard" if kind == "webdataset" else "tar of class folders,"
    what += f" {os.path.basename(paths[0])}"
    if len(paths) > 1:
        what += f" and {len(paths) - 1} more up to {os.path.basename(paths[-1])}"
    return Found(kind, what, lambda how: _open(kind, place, paths, how), paths)


def _is_candidate(name: str, place: Place) -> bool:
    """Whether a file may be a shard: not an official archive, nor one extracted beside itself."""
    stem, extension = os.path.splitext(name)
    if extension.lower() != ".tar" or (place.is_folder and stem in place.folders):
        return False
    return name not in NAMES or not split_in(os.path.join(place.folder, name))


def _kind_of(path: str) -> str | None:
    first = first_members(path, _NUM_LOOKED_AT)
    fields = [_key_and_extension(member.name) for member in first]
    images = {key for key, extension in fields if extension.lower() in _IMAGES}
    if any(key in images and extension.lower() in _LABELS for key, extension in fields):
        return "webdataset"
    if any(member.is_image and _folder_of(member.name, path) for member in first):
        return "tar"
    return None


def _key_and_extension(name: str) -> tuple[str, str]:
    """Split as webdataset does; no key if the base name is hidden or has no extension."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return (name[:dot], name[dot + 1 :]) if dot > base else ("", "")


def _folder_of(name: str, path: str) -> str:
    """Return an image's folder; if it has none, the archive's own name if that is a class."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return name.rpartition("/")[0] or (stem if is_wnid(stem) else "")


def _open(kind: str, place: Place, paths: list[str], how: Opening) -> Source:
    # An archive may hold both splits.
    key = kind if kind == "webdataset" else f"{kind}-{place.split or 'all'}"
    source = place.path if place.is_folder else paths[0]
    scanned = indexed(key, source, paths, lambda: _scan(kind, place, paths, how), how.on_error)
    return Source(kind, scanned.index, permuted=is_permuted(scanned.index), notes=scanned.notes)


def _scan(kind: str, place: Place, paths: list[str], how: Opening) -> Scanned:
    collector = (_Samples if kind == "webdataset" else _ClassFolders)(place, how)
    total_bytes = sum(map(os.path.getsize, paths))
    with bytes_bar(os.path.basename(place.path), total_bytes, how.progress) as bar:
        for number, path in enumerate(paths):
            collector.begin(number, path, len(paths) > 1)
            with FileStream(path, bar) as stream:
                collector.read(stream)
    label, classes = collector.labels_and_classes()
    files = [os.path.basename(path) for path in paths]
    index = collector.rows.index(place.folder, files, classes, label)
    problems = collector.problems
    return Scanned(index, {}, problems.messages, problems.count, collector.remarks)


class _WrongSampleError(Exception):
    """Says what is wrong with a sample."""


class _Collector:
    """Collects the samples of archives, one after the other; the base of both layouts."""

    def __init__(self, place: Place, how: Opening) -> None:
        self.rows, self.problems = Rows(), Problems(how.on_error)
        self.remarks: list[str] = []
        self._source, self._split = place.path, place.split
        self._visit = how.visit
        self._names_in_file: set[str] = set()

    def begin(self, file: int, path: str, is_one_of_many: bool) -> None:
        """Start with the archive number `file`."""
        self._file, self._path = file, path
        stem = os.path.splitext(os.path.basename(path))[0]
        self._prefix = f"{stem}/" if is_one_of_many else ""
        self._names_in_file.clear()

    def read(self, stream: FileStream) -> None:
        """Add the samples of an archive."""
        raise NotImplementedError

    def labels_and_classes(self) -> tuple[npt.NDArray[np.int32], Sequence[str]]:
        """Return the label of each sample, and the class names."""
        raise NotImplementedError

    def _check(self, name: str, image: Member) -> None:
        """Refuse what can be wrong in both layouts."""
        if image.leads_outside:
            raise _WrongSampleError("expected a path inside the archive, got one outside")
        if not image.length:
            raise _WrongSampleError(f"expected an image, got 0 bytes in {image.name!r}")
        if name in self._names_in_file:
            raise _WrongSampleError("expected one of this name, got another (a duplicate)")
        self._names_in_file.add(name)

    def _add(self, image: Member, label: int, data: memoryview | None) -> None:
        name = self._prefix + image.name
        sample = self.rows.add(name, self._file, image.offset, image.length, label)
        if self._visit is not None and data is not None:
            self._visit(Seen(sample, name, data))

    def _report(self, name: str, offset: int, wrong: _WrongSampleError) -> None:
        self.problems.report(f"{self._path}: sample {name!r} at offset {offset}: {wrong}")


# ---- WebDataset ----------------------------------------------------------------------------------


class _Fields:
    """The members of one sample."""

    __slots__ = ("data", "images", "key", "offset", "twice")

    def __init__(self, key: str, offset: int) -> None:
        self.key, self.offset = key, offset
        self.images: list[Member] = []
        self.data: dict[str, memoryview] = {}
        self.twice = ""


class _Samples(_Collector):
    """Samples of WebDataset shards."""

    def __init__(self, place: Place, how: Opening) -> None:
        super().__init__(place, how)
        self._numbers: dict[str, int] = {}  # by class name, if labels are names
        self._named: dict[int, str] = {}  # class names that accompany numbers

    def read(self, stream: FileStream) -> None:
        fields = _Fields("", 0)
        for member in members(stream, self.problems, self.remarks):
            key, extension = _key_and_extension(member.name)
            if not key:
                continue
            if key != fields.key:
                self._finish(fields)
                fields = _Fields(key, member.offset)
            extension = extension.lower()
            if extension in _IMAGES:
                fields.images.append(member)
                if self._visit is not None:
                    fields.data["image"] = stream.take(member.offset, member.length)
            elif extension in _LABELS:
                if extension in fields.data:
                    fields.twice = extension
                shown = min(member.length, _MAX_LABEL_BYTES + 1)
                fields.data[extension] = stream.take(member.offset, shown)
        self._finish(fields)

    def _finish(self, fields: _Fields) -> None:
        if not fields.images:
            has_label = any(extension in fields.data for extension in _LABELS)
            if not has_label or _SIDECAR.match(fields.key.rpartition("/")[2] + "."):
                return
        try:
            if len(fields.images) != 1:
                found = " and ".join(repr(image.name) for image in fields.images[:3]) or "none"
                raise _WrongSampleError(f"expected one image, got {found}")
            if fields.twice:
                raise _WrongSampleError(f"expected one member .{fields.twice}, got two")
            self._check(fields.key, fields.images[0])
            label = self._label(fields.data)
        except _WrongSampleError as wrong:
            self._report(fields.key, fields.offset, wrong)
            return
        self._add(fields.images[0], label, fields.data.get("image"))

    def _label(self, data: dict[str, memoryview]) -> int:
        value = _label_in(data)
        is_name, by_name = isinstance(value, str), bool(self._numbers)
        if len(self.rows) and is_name != by_name:
            kinds = ("a number", "a class name")
            raise _WrongSampleError(
                f"expected {kinds[by_name]} as label, as before, got {kinds[is_name]}, {value!r}"
            )
        if isinstance(value, str):
            value = self._numbers.setdefault(value, len(self._numbers))
        if not 0 <= value < MAX_CLASSES:
            raise _WrongSampleError(f"expected a label in [0, {MAX_CLASSES}), got {value}")
        if not is_name and value not in self._named:
            self._named[value] = _class_name_in(data)
        return value

    def labels_and_classes(self) -> tuple[npt.NDArray[np.int32], Sequence[str]]:
        label = self.rows.label
        if self._numbers:
            return sorted_classes(list(self._numbers), label)
        classes = list(classes_of(label, self.rows.names))
        if classes == [str(number) for number in range(len(classes))]:
            named = [self._named.get(number, "") for number in range(len(classes))]
            if all(named) and len(set(named)) == len(named):
                classes = named
        if num_unused := len(classes) - len(np.unique(label)):
            self.remarks.append(
                f"{self._source}: labels go up to {len(classes) - 1}, and {num_unused} of them "
                "occur in no sample"
            )
        return label, classes


def _label_in(data: dict[str, memoryview]) -> int | str:
    """Return a label: a number or a class name."""
    for extension in _LABELS:
        if extension not in data:
            continue
        text = bytes(data[extension])
        if len(text) > _MAX_LABEL_BYTES:
            raise _WrongSampleError(
                f"expected at most {_MAX_LABEL_BYTES} bytes in .{extension}, got more"
            )
        if extension == "json":
            fields = _json_fields(text)
            value = next((fields[key] for key in _LABEL_KEYS if key in fields), None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise _WrongSampleError(
                    f"expected a number or a class name as label in .json, got {value!r:.80}"
                )
            if isinstance(value, int):
                return value
            text = value.encode("utf-8", "surrogatepass")
        number = re.fullmatch(rb"\s*(-?\d{1,18})\s*", text)
        if number:
            return int(number[1])
        if extension == "json":
            return _class_name(str(value))
        if extension == "cls":
            raise _WrongSampleError(f"expected a whole number in .cls, got {text[:40]!r}")
        try:
            return _class_name(text.decode().strip())
        except UnicodeDecodeError as error:
            raise _WrongSampleError(f"expected UTF-8 in .txt, got {text[:40]!r}") from error
    found = ", ".join(f".{extension}" for extension in _LABELS if extension in data)
    raise _WrongSampleError(
        f"expected a label in .cls, .json ({', '.join(_LABEL_KEYS)}) or .txt, got none"
        + (f" in {found}" if found else "")
    )


def _class_name(name: str) -> str:
    # Unpaired surrogates are not printable either.
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME_LENGTH:
        raise _WrongSampleError(
            f"expected a class name of 1 to {_MAX_NAME_LENGTH} printable characters, got "
            f"{name!r:.80}"
        )
    return name


def _json_fields(text: bytes) -> dict[str, object]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _WrongSampleError(f"expected JSON in .json, got {text[:40]!r} ({error})") from error
    if not isinstance(fields, dict):
        raise _WrongSampleError(f"expected an object in .json, got {text[:40]!r}")
    return fields


def _class_name_in(data: dict[str, memoryview]) -> str:
    """Return the class name that accompanies the number in a .json; "" if there is none."""
    try:
        fields = _json_fields(bytes(data.get("json", b"{}")))
        names = [fields[key] for key in _NAME_KEYS if isinstance(fields.get(key), str)]
        return _class_name(str(names[0])) if names else ""
    except _WrongSampleError:
        return ""


# ---- tar archives of class folders ---------------------------------------------------------------


class _ClassFolders(_Collector):
    """Images of an archived ImageFolder; until all are read, a label is a folder's number."""

    def __init__(self, place: Place, how: Opening) -> None:
        super().__init__(place, how)
        self._folders: dict[str, int] = {}
        self._splits: set[str] = set()

    def read(self, stream: FileStream) -> None:
        for member in members(stream, self.problems, self.remarks):
            hidden = member.name.startswith("._", member.name.rfind("/") + 1)
            if not member.is_image or hidden:  # macOS puts "._x.jpg" beside x.jpg
                continue
            folder = _folder_of(member.name, self._path)
            if not self._is_of_split(folder):
                continue
            try:
                if not folder:
                    raise _WrongSampleError("expected an image in a class folder, got one outside")
                self._check(member.name, member)
            except _WrongSampleError as wrong:
                self._report(member.name, member.offset, wrong)
                continue
            label = self._folders.setdefault(folder, len(self._folders))
            data = stream.take(member.offset, member.length) if self._visit is not None else None
            self._add(member, label, data)

    def _is_of_split(self, folder: str) -> bool:
        """Whether a folder is of the split: by the first above it called "train" or "val"."""
        if folder in self._folders:
            return True
        above = folder.split("/")[:-1]
        split = next(filter(None, (split_of(name) for name in above)), None)
        if split is None:
            return True
        self._splits.add(split)
        if self._split is None and len(self._splits) > 1:
            raise split_needed(f"{self._path} holds train and val")
        return self._split in (None, split)

    def labels_and_classes(self) -> tuple[npt.NDArray[np.int32], Sequence[str]]:
        """Name classes by the first folders in which paths differ, sorted as in torchvision."""
        paths = [folder.split("/") for folder in self._folders]
        levels = zip(*paths, strict=False)
        above = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
        if any(len(path) == above for path in paths):
            above -= 1
            if len(paths) > 1:  # else an image above the class folders would put all in one class
                inner = max(self._folders, key=lambda folder: folder.count("/"))
                raise DataError(
                    f"{self._source}: expected images in class folders alone, found some in "
                    f"{'/'.join(paths[0][: above + 1])}/ and in folders below it, such as {inner}/:"
                    " make the archive again without the former"
                )
        return sorted_classes([path[above] for path in paths], self.rows.label)
