"""What Hugging Face's Parquet and Arrow files share: their places, columns, classes and names.

A sample is a row: a struct of the image's bytes and its original path, and an integer label. Class
names are in the schema's metadata. Files are read through pyarrow, which is needed only for them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import OnError, Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of, imagenet_classes, is_wnid
from imagenet_seq.index.columns import Names
from imagenet_seq.index.source import Block
from imagenet_seq.sources.images import NAMED_EXTENSIONS, image_extension
from imagenet_seq.sources.place import Opening, Place, SplitNeededError
from imagenet_seq.sources.scan import Problems, Rows, bytes_bar

_MAX_DEPTH = 5
_LARGE_GROUP_BYTES = 256 << 20
_PURGE_DELAY = "MIMALLOC_PURGE_DELAY"
_OF = re.compile(r"(?P<set>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?!\d)")
_INTEGERS = ("int8", "int16", "int32", "int64")
_LABELS = ("label", "labels", "class", "cls", "target", "fine_label")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")


# ---- files ---------------------------------------------------------------------------------------


def places(place: Place) -> Iterator[Place]:
    """Yield a place, and folders in it where Hugging Face's tools put files.

    These are `data/` of a repository, the only snapshot in the hub's cache, and the only
    configuration, version and hash in the cache of `datasets`.
    """
    yield place
    for _ in range(_MAX_DEPTH):
        folders = [name for name in place.folders if not name.startswith(".")]
        inner: list[str] = [name for name in ("snapshots", "data") if name in folders]
        if not inner and len(folders) == 1 and not place.path.endswith(os.sep + "data"):
            inner = folders
        below = place.below(inner[0]) if inner else None
        if below is None:
            return
        place = below
        yield place


def files_of(place: Place, names: Sequence[str]) -> list[str]:
    """Return the paths of the split's files among these."""
    paths = place.of_split(names)
    sets = sorted({found["set"] for path in paths if (found := _OF.match(os.path.basename(path)))})
    if place.is_folder and len(sets) > 1:
        raise SplitNeededError(
            f"{place.path} holds files of {' and '.join(sets[:3])}: pass split='train' or "
            "split='val', or a pattern of the files that you mean"
        )
    return paths


def _check_complete(paths: Sequence[str]) -> None:
    """Check that no file is missing, if the first one's name says "number of count"."""
    first, *others = [_OF.match(os.path.basename(path)) for path in paths]
    if first is None:
        return
    there = {int(found["number"]) for found in (first, *others) if found}
    missing = sorted(set(range(int(first["count"]))) - there)
    if missing:
        raise DataError(
            f"{os.path.dirname(paths[0])}: expected {int(first['count'])} files "
            f"{first['set']}-*-of-{first['count']}, but {len(missing)} are missing, number "
            f"{missing[0]:05d} first: download them, or pass a pattern of the files that are to be "
            "used"
        )


def begins_with(path: str, magic: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


# ---- pyarrow -------------------------------------------------------------------------------------


def import_pyarrow(path: str, name: str = "pyarrow") -> Any:
    """Import pyarrow, or a module of it; if it is not installed, say how to install it."""
    # Ten blocks a second are read: getting cleared memory for each takes a tenth of decoding time.
    # So its allocator, which reads the setting when it is imported, keeps freed memory for 10 s.
    sets_delay = "pyarrow" not in sys.modules and _PURGE_DELAY not in os.environ
    if sets_delay:
        os.environ[_PURGE_DELAY] = "10000"  # ms
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{path}: Parquet and Arrow files are read through pyarrow: pip install pyarrow"
        ) from error
    finally:
        if sets_delay:
            del os.environ[_PURGE_DELAY]


@contextlib.contextmanager
def damage(path: str, what: str) -> Iterator[None]:
    """Turn what pyarrow raises for damaged bytes of `what`, such as "Parquet", into a DataError."""
    pyarrow = import_pyarrow(path)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path}: expected a sound {what} file, but pyarrow says: {error}. It is damaged or "
            "incomplete: compare its size and checksum with the original's, copy it again"
        ) from error


# ---- columns -------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """Names of the columns of images and labels, and names of the classes if the file has some."""

    image: str
    label: str
    has_path: bool
    class_names: tuple[str, ...]


def columns_of(schema: Any, path: str) -> Columns:
    """Find the columns by their types, and by their names if several have the same type."""
    fields = [schema.field(i) for i in range(len(schema.names))]
    features = _features(schema)
    labels = [field.name for field in fields if str(field.type).lstrip("u") in _INTEGERS]
    named = [name for name in labels if "names" in features.get(name, {})]
    image = _the_one([field.name for field in fields if _is_image(field.type)], _IMAGES)
    label = _the_one(named or labels, _LABELS)
    if image is None or label is None or schema.names.count(image) + schema.names.count(label) != 2:
        listed = ", ".join(f"{field.name}: {field.type}" for field in fields)
        raise DataError(
            f"{path}: expected one column of images, struct<bytes: binary, path: string>, and one "
            f"of integers, the labels; got the columns {listed:.500}"
        )
    names = features.get(label, {}).get("names")
    return Columns(
        image,
        label,
        has_path="path" in _children(schema.field(image).type),
        class_names=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def _the_one(names: Sequence[str], usual: Sequence[str]) -> str | None:
    if len(names) == 1:
        return names[0]
    return next((name for name in usual if name in names), None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what `datasets` wrote about the columns; what is malformed is left out."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _children(arrow_type: Any) -> dict[str, Any]:
    fields = [arrow_type.field(i) for i in range(arrow_type.num_fields)]
    return {field.name: field.type for field in fields}


def _is_image(arrow_type: Any) -> bool:
    has_bytes = str(_children(arrow_type).get("bytes")) in ("binary", "large_binary")
    return has_bytes and str(arrow_type).startswith("struct<")


# ---- values --------------------------------------------------------------------------------------


def images_in(array: Any) -> Block:
    """View the bytes of a pyarrow array of binaries without a copy; nulls have length 0.

    Raises:
        ValueError: if its offsets don't ascend within its bytes.
    """
    _, begins, data = array.buffers()
    size = 0 if data is None else data.size
    ends = np.zeros(1, np.int64)
    if len(array):
        wide = str(array.type) == "large_binary"
        ends = np.frombuffer(begins, np.int64 if wide else np.int32)
        ends = ends[array.offset : array.offset + len(array) + 1].astype(np.int64)
    lengths = np.diff(ends)
    if len(ends) != len(array) + 1 or ends[0] < 0 or ends[-1] > size or (lengths < 0).any():
        raise ValueError(
            f"expected {len(array) + 1} offsets that ascend in [0, {size}], got {len(ends)} from "
            f"{ends[:1]} to {ends[-1:]}"
        )
    lengths[nulls_of(array)] = 0
    values = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return Block(values, ends[:-1], lengths)


def nulls_of(array: Any) -> npt.NDArray[np.bool_]:
    """Return which values of a pyarrow array are null."""
    validity = array.buffers()[0]
    if validity is None:
        return np.zeros(len(array), np.bool_)
    bits = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")
    valid = bits[array.offset : array.offset + len(array)]
    if len(valid) != len(array):
        raise ValueError(f"expected {len(array)} bits of validity, got {len(valid)}")
    return np.equal(valid, 0)


def _labels_in(array: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the values of a pyarrow array of integers, and which of them are null."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    values = np.frombuffer(array.buffers()[1] or b"", dtype)
    values = values[array.offset : array.offset + len(array)].astype(np.int64)
    if len(values) != len(array):
        raise ValueError(f"expected {len(array)} labels, got {len(values)}")
    return values, nulls_of(array)


def _base_names(array: Any) -> list[str]:
    """Return the base names of the paths in a pyarrow array of strings; "" if there is none."""
    names = images_in(array)
    text, begins, lengths = names.bytes.tobytes(), names.offsets.tolist(), names.lengths.tolist()
    paths = [text[at : at + length] for at, length in zip(begins, lengths, strict=True)]
    return [os.fsdecode(path.rpartition(b"/")[2].replace(b"\0", b"")) for path in paths]


# ---- indexing ------------------------------------------------------------------------------------


class Scan:
    """Collects the rows of files that have the same columns.

    Attributes:
        files: names of the files that samples lie in, or of the file of each python block.
        group: number of each python block in its file.
        largest_group_bytes: bytes of the images of the largest python block.
        path: the file that is scanned.
        first_row: number of its next row.
    """

    def __init__(self, root: str, on_error: OnError) -> None:
        self.files: list[str] = []
        self.group: list[int] = []
        self.largest_group_bytes = 0
        self._root = root
        self._problems = Problems(on_error)
        self._rows = Rows()
        self._columns: Columns | None = None
        self.path, self.first_row = "", 0

    def begin(self, path: str, schema: Any) -> Columns:
        """Begin a file, and return its columns, which must be those of the files before."""
        columns = columns_of(schema, path)
        if self._columns not in (None, columns):
            raise DataError(
                f"{path}: expected the columns and classes of the files before it, "
                f"{self._columns!r:.300}; got {columns!r:.300}"
            )
        self._columns, self.path, self.first_row = columns, path, 0
        return columns

    def add(
        self,
        offset: npt.NDArray[np.int64],
        length: npt.NDArray[np.int64],
        missing: npt.NDArray[np.bool_],
        labels: Any,
        paths: Any,
        images: Callable[[], Block],
    ) -> None:
        """Add the next rows of the file; their images lie in the last one of `files`.

        Args:
            offset: of each image, as in `Index`.
            length: of each image, as in `Index`.
            missing: which rows have no image.
            labels: a pyarrow array.
            paths: a pyarrow array of the images' paths, or None.
            images: returns the images; called if a path does not say what an image is.
        """
        assert self._columns is not None
        label, no_label = _labels_in(labels)
        bases = [""] * len(label) if paths is None else _base_names(paths)
        columns = (offset, length, missing, label, no_label)
        rows = zip(bases, *(column.tolist() for column in columns), strict=True)
        stem = os.path.splitext(os.path.basename(self.path))[0]
        num_classes = len(self._columns.class_names) or MAX_CLASSES
        for i, (base, begin, num_bytes, is_missing, number, is_null) in enumerate(rows):
            row = self.first_row + i
            if is_missing or is_null or not -1 <= number < num_classes:
                got = "no image" if is_missing else f"the label {None if is_null else number}"
                self._problems.report(
                    f"{self.path}: row {row} {base}: expected an image and a label in "
                    f"[0, {num_classes}), or -1 where it is unknown; got {got}"
                )
                continue
            # File and row make it unique.
            name = f"{stem}/{row}-{base}" if base else f"{stem}/{row}"
            if not base.lower().endswith(NAMED_EXTENSIONS):
                name += image_extension(images().image(i)[:16].tobytes()) or ".jpg"
            self._rows.add(name, len(self.files) - 1, begin, num_bytes, number)
        self.first_row += len(label)

    def result(self) -> Scanned:
        """Return the samples."""
        names = self._columns.class_names if self._columns else ()
        classes = _name_classes(names, self._rows.label, self._rows.names)
        index = self._rows.index(self._root, self.files, classes)
        extra = {"group": np.array(self.group, np.int64)} if self.group else {}
        remarks = []
        if self.largest_group_bytes > _LARGE_GROUP_BYTES:
            remarks.append(
                f"{self._root}: its row groups have up to {self.largest_group_bytes >> 20} MB, "
                "which are read and held as a whole: 'imagenet-seq pack' makes a pack of it that "
                "is read in smaller blocks"
            )
        return Scanned(index, extra, self._problems.messages, self._problems.count, remarks)


def index_files(
    kind: str, place: Place, paths: Sequence[str], how: Opening, scan: Callable[[Scan, str], None]
) -> Scanned:
    """Index all files, or take the cached index."""
    import_pyarrow(paths[0])
    if place.is_folder:
        _check_complete(paths)

    def scan_all() -> Scanned:
        rows = Scan(place.folder, how.on_error)
        total_bytes = sum(map(os.path.getsize, paths))
        with bytes_bar(os.path.basename(place.folder), total_bytes, how.progress) as bar:
            for path in paths:
                with damage(path, kind.capitalize()):
                    scan(rows, path)
                bar.update(os.path.getsize(path))
        return rows.result()

    return indexed(kind, place.path, paths, scan_all, how.on_error)


def _name_classes(
    names: tuple[str, ...], label: npt.NDArray[np.int32], samples: Names
) -> tuple[str, ...]:
    """Return the class names: wnids if these are known, so that they are torchvision's."""
    if len(names) == 1000 and names[0].startswith("tench") and names[-1].startswith("toilet"):
        return imagenet_classes()
    by_samples = classes_of(label, samples)
    if not names or (len(by_samples) == len(names) and all(map(is_wnid, by_samples))):
        return by_samples
    # ImageNet has two classes called crane: they stay two.
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names))
