"""TFRecord files of `tf.train.Example`, as TFDS and Inception's scripts write ImageNet.

A file is a sequence of: length (u64), its masked CRC-32C, that many bytes, their masked CRC-32C.
The bytes are a protobuf message, `Example{features: Features{feature: map<string, Feature>}}`, in
which an encoded image lies in one piece. The index points at it; neither TensorFlow nor protobuf is
needed. Labels lie between the images, so indexing reads everything once.

    TFDS        image, label (from 0, in the order of label.labels.txt), file_name
    Inception   image/encoded, image/class/label (from 1), image/class/synset, image/filename

Inception's 0 is a background class without images. If some image has label 0, as in files of slim's
other scripts, labels count from 0.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imagenet_seq import native
from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of, imagenet_classes
from imagenet_seq.index.columns import Index
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Source
from imagenet_seq.sources.images import image_extension
from imagenet_seq.sources.place import Found, Opening, Place, Seen
from imagenet_seq.sources.scan import FileStream, Problems, Rows, bytes_bar

LOOKS_FOR = "TFRecord files: imagenet2012/5.1.0/imagenet2012-train.tfrecord-00000-of-01024, ..."
_IMAGE = (b"image/encoded", b"image", b"image_raw", b"jpeg", b"jpg")
_LABEL = (b"image/class/label", b"label", b"class")
_NAME = (b"image/filename", b"file_name", b"filename")
_SYNSET = b"image/class/synset"
_INTERESTING = frozenset((*_IMAGE, *_LABEL, *_NAME, _SYNSET))
_COUNTS_FROM_1 = b"image/class/label"
_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(?:\.tfrecords?)?", re.IGNORECASE)
_NAMED = re.compile(r"\.tfrec(?:ords?)?(?![a-z])", re.IGNORECASE)
_LABEL_NAMES = "label.labels.txt"
_HEADER = struct.Struct("<QI")


# ---- finding -------------------------------------------------------------------------------------


def find(place: Place) -> Found | str | None:
    """Recognise TFRecord files: in a folder, in a folder of TFDS's above it, or named by a path."""
    place = _with_files(place)
    names = place.files
    if place.is_folder:
        names = tuple(name for name in names if _SHARD.fullmatch(name) or _NAMED.search(name))
    paths = (os.path.join(place.folder, name) for name in names)
    first = next(filter(os.path.getsize, paths), None)  # a shard may be empty
    if first is None:
        return None
    reason = _why_none(first)
    if reason is not None:  # only a file with such a name was meant to be one
        return f"{os.path.basename(first)}: {reason}" if any(map(_NAMED.search, names)) else None
    files = place.of_split(names)
    if not files:
        return f"holds TFRecord files, such as {names[0]}, but none of split {place.split}"
    what = f"{len(files)} TFRecord files, {os.path.basename(files[0])}, ..."
    return Found("tfrecord", what, functools.partial(_open, place, files), files)


def _with_files(place: Place) -> Place:
    """Return the folder with the files, if the given one is TFDS's data folder or dataset."""
    dataset = place.below("imagenet2012") or place
    versions = list(filter(re.compile(r"\d+\.\d+\.\d+").fullmatch, dataset.folders))
    if not versions:
        return place
    newest = max(versions, key=lambda name: tuple(map(int, name.split("."))))
    return dataset.below(newest) or place


def _why_none(path: str) -> str | None:
    """Return why a file is no TFRecord file, or None if it is one."""
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return f"expected a TFRecord file, got one of {len(head)} bytes"
    if _HEADER.unpack(head)[1] == _masked_crc(head[:8]):
        return None
    if head[:2] == b"\x1f\x8b":
        return "a gzip'ed TFRecord file, whose images can't be read in place: gunzip it first"
    return "expected a TFRecord file, but its first bytes are not a length and its CRC"


def _open(place: Place, files: Sequence[str], how: Opening) -> Source:
    if place.is_folder:
        _check_complete(place, files)
    about = os.path.join(place.folder, _LABEL_NAMES)
    read = [*files, about] if os.path.exists(about) else files
    scanned = indexed("tfrecord", place.path, read, lambda: _scan(place, files, how), how.on_error)
    index = scanned.index
    return Source("tfrecord", index, permuted=is_permuted(index), notes=scanned.notes)


def _check_complete(place: Place, files: Sequence[str]) -> None:
    """Check that the files are one complete set."""
    shards = [_SHARD.fullmatch(os.path.basename(path)) for path in files]
    sets = sorted({(shard[1], shard[3]) if shard else ("", "") for shard in shards})
    if len(sets) > 1:
        shown = " and ".join(f"{name}-*-of-{total}" if name else "others" for name, total in sets)
        raise ValueError(
            f"{place.folder} holds several sets of TFRecord files, {shown}: pass a pattern that "
            "names the files that you mean"
        )
    [(name, total)] = sets
    there = {int(shard[2]) for shard in shards if shard}
    missing = next((number for number in range(int(total or 0)) if number not in there), None)
    if missing is not None:
        raise DataError(
            f"{place.folder}: {name}-{missing:05d}-of-{total} is missing: expected {int(total)} "
            f"files, found {len(there)}. Add it, or pass a pattern of those that are meant"
        )


# ---- scanning ------------------------------------------------------------------------------------


class _Keys(NamedTuple):
    """Names of the features, as the first sample has them."""

    image: bytes
    label: bytes
    name: bytes | None


class _Sample(NamedTuple):
    """What a sample's message says; the image as its place in the message."""

    begin: int
    end: int
    label: int
    name: str


class _MalformedError(ValueError):
    """A message is not what it should be; says how."""


def _wrong(key: bytes, expected: str, got: object) -> _MalformedError:
    return _MalformedError(f"feature '{key.decode()}': expected {expected}, got {got}")


def _scan(place: Place, files: Sequence[str], how: Opening) -> Scanned:
    scan = _Scan(place, files, how)
    with bytes_bar("TFRecord files", sum(map(os.path.getsize, files)), how.progress) as bar:
        for number, path in enumerate(files):
            with FileStream(path, bar) as stream:
                scan.add_file(number, stream)
    problems = scan.problems
    return Scanned(scan.index(), problems=problems.messages, num_problems=problems.count)


class _Scan:
    """Collects the samples of all files."""

    def __init__(self, place: Place, files: Sequence[str], how: Opening) -> None:
        self._place, self._files, self._visit = place, files, how.visit
        self.problems = Problems(how.on_error)
        self._prefixes = _prefixes(files)
        self._label_names = _label_names(place.folder)
        self._num_labels = len(self._label_names) or MAX_CLASSES
        self._rows = Rows()
        self._keys: _Keys | None = None
        self._wnids: dict[int, str] = {}

    def add_file(self, number: int, stream: FileStream) -> None:
        """Add a file's samples."""
        at, in_file, names = 0, 0, set[str]()
        while at < stream.size:
            length = _message_length(stream, at)
            begin = at + _HEADER.size
            data = stream.take(begin, length + 4)
            try:
                _check_crc(data)
                message = data[:length]
                sample = self._parsed(message, in_file)
                if sample.name in names:
                    raise _MalformedError(f"another sample has the name {sample.name!r}, too")
            except _MalformedError as error:
                self.problems.report(f"{stream.path}: sample {in_file} at offset {at}: {error}")
            else:
                names.add(sample.name)
                self._add(sample, message, number, begin)
            at = begin + length + 4
            in_file += 1

    def _add(self, sample: _Sample, message: memoryview, file: int, offset: int) -> None:
        name = self._prefixes[file] + sample.name
        length = sample.end - sample.begin
        row = self._rows.add(name, file, offset + sample.begin, length, sample.label)
        if self._visit is not None:
            self._visit(Seen(row, name, message[sample.begin : sample.end]))

    def _parsed(self, message: memoryview, in_file: int) -> _Sample:
        features = _features(message)
        if self._keys is None:
            self._keys = _keys_of(features, message)
        image, label_key, name_key = self._keys
        begin, end = _only_bytes(message, features, image)
        if begin == end:
            raise _wrong(image, "an image", "no bytes")
        label = self._checked_label(message, features, label_key)
        name = _text(message, features, name_key) if name_key else f"{in_file:08d}"
        if not os.path.splitext(name)[1]:
            name += image_extension(message[begin:end]) or ".bin"
        wnid = _text(message, features, _SYNSET) if _SYNSET in features else ""
        if wnid and self._wnids.setdefault(label, wnid) != wnid:
            raise _MalformedError(
                f"label {label}: expected synset {self._wnids[label]} as in samples before, "
                f"got {wnid}"
            )
        return _Sample(begin, end, label, name)

    def _checked_label(self, message: memoryview, features: _Features, key: bytes) -> int:
        begin, end = features.get(key, (0, 0))
        values = list(itertools.islice(_ints(message, begin, end), 2))
        if len(values) != 1:
            raise _wrong(key, "one integer", "more" if values else "none")
        [label] = values
        first = 1 if key == _COUNTS_FROM_1 else 0
        if not 0 <= label < self._num_labels + first:
            raise _wrong(key, f"a label in [{first}, {self._num_labels + first})", label)
        return label

    def index(self) -> Index:
        """Return the index of all samples; its labels count from 0."""
        rows, label, wnids = self._rows, self._rows.label, self._wnids
        counts_from_1 = self._keys is not None and self._keys.label == _COUNTS_FROM_1
        if counts_from_1 and int(label.min(initial=1)) > 0 and not _are_imagenets(wnids):
            label, wnids = label - 1, {number - 1: wnid for number, wnid in wnids.items()}
        classes = self._label_names
        if not classes and wnids:
            classes = _classes_of_wnids(wnids, int(label.max(initial=-1)) + 1, self._place.path)
        elif not classes:
            classes = classes_of(label, rows.names)
        names = [os.path.relpath(path, self._place.folder) for path in self._files]
        return rows.index(self._place.folder, names, classes, label)


def _prefixes(files: Sequence[str]) -> list[str]:
    """Return prefixes that make names unique over all files: the files' names, if several."""
    if len(files) == 1:
        return [""]
    names = [os.path.basename(path) for path in files]
    stems = [_NAMED.sub("", re.sub(r"-of-\d+", "", name)) for name in names]
    chosen = stems if len(set(stems)) == len(stems) else names
    return [f"{name}/" for name in chosen]


def _label_names(folder: str) -> tuple[str, ...]:
    """Return the class names in the file that TFDS writes beside its own, if it is there."""
    path = os.path.join(folder, _LABEL_NAMES)
    if not os.path.exists(path):
        return ()
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        names = tuple(line.strip() for line in file if line.strip())
    if len(set(names)) < len(names):
        raise DataError(f"{path}: expected the name of one class in each line, some come twice")
    return names


def _classes_of_wnids(wnids: dict[int, str], num_classes: int, where: str) -> tuple[str, ...]:
    """Name the classes by the samples' wnids; refuse labels in another order than theirs."""
    for (label, wnid), (next_label, next_wnid) in itertools.pairwise(sorted(wnids.items())):
        if wnid >= next_wnid:
            raise DataError(
                f"{where}: expected labels in the order of their synsets, as in ImageNet; label "
                f"{label} is {wnid} and {next_label} is {next_wnid} (counted from 0). Write the "
                "files again with sorted synsets"
            )
    names = dict(enumerate(imagenet_classes())) if _are_imagenets(wnids) else wnids
    return tuple(names.get(label, str(label)) for label in range(num_classes))


def _are_imagenets(wnids: dict[int, str]) -> bool:
    """Whether there are wnids, and all labels are torchvision's."""
    return bool(wnids) and wnids.items() <= dict(enumerate(imagenet_classes())).items()


# ---- the messages -------------------------------------------------------------------------


def _message_length(stream: FileStream, at: int) -> int:
    """Return the bytes of the message whose header is at `at`."""
    header = stream.take(at, _HEADER.size)
    length, crc = _HEADER.unpack(header)
    expected = _masked_crc(bytes(header[:8]))
    if crc != expected:  # the next message can't be found
        raise DataError(
            f"{stream.path}: offset {at}: the length {length} has CRC-32C {expected:08x} (masked), "
            f"but {crc:08x} is stored with it: the file is damaged from here on; get it again"
        )
    return int(length)


def _check_crc(data: memoryview) -> None:
    """Check a message against the CRC that follows it."""
    (crc,) = struct.unpack("<I", data[-4:])
    expected = _masked_crc(data[:-4])
    if crc != expected:
        raise _MalformedError(
            f"its {len(data) - 4} bytes have CRC-32C {expected:08x} (masked), but {crc:08x} is "
            "stored with them: they are damaged"
        )


def _masked_crc(data: bytes | memoryview) -> int:
    """Return the CRC as TFRecord stores it: rotated and with a constant added."""
    crc = native.crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- protobuf ------------------------------------------------------------------------------------

# Tags of fields with a length: number << 3 | 2.
_FIRST, _SECOND, _THIRD = 0x0A, 0x12, 0x1A
_PLAIN_INT = 0x08

_Features = dict[bytes, tuple[int, int]]
"""Where the value of each feature in `_INTERESTING` begins and ends in the message."""


def _features(message: memoryview) -> _Features:
    found: _Features = {}
    for tag, begin, end in _fields(message, 0, len(message)):
        if tag == _FIRST:
            while (begin := _take_short_entries(message, begin, end, found)) < end:
                entry_tag, entry_begin, begin = next(_fields(message, begin, end))
                if entry_tag == _FIRST:
                    _take_entry(message, entry_begin, begin, found)
    return found


def _take_short_entries(message: memoryview, at: int, end: int, found: _Features) -> int:
    """Read short entries of a map, key before value; return where the first other one begins.

    Nearly all of the dozen entries of a sample are such, and `_fields` takes 1 us for a field.
    """
    while end - at >= 4:
        tag, length, key_tag, key_length = message[at : at + 4]
        value = at + 4 + key_length
        entry_end = at + 2 + length
        is_short = length < 0x80 and key_length < 0x80 and value + 2 <= entry_end <= end
        if tag != _FIRST or key_tag != _FIRST or not is_short:
            break
        key = message[at + 4 : value].tobytes()
        if key in _INTERESTING:
            if message[value] != _SECOND or value + 2 + message[value + 1] != entry_end:
                break
            found[key] = value + 2, entry_end
        at = entry_end
    return at


def _take_entry(message: memoryview, begin: int, end: int, found: _Features) -> None:
    """Read an entry of the map: field 1 is its key, field 2 its value."""
    key, value = b"", None
    for tag, field_begin, field_end in _fields(message, begin, end):
        if tag == _FIRST:
            key = bytes(message[field_begin : min(field_end, field_begin + 256)])
        elif tag == _SECOND:
            value = field_begin, field_end
    if value is not None and key in _INTERESTING:
        found[key] = value


def _keys_of(features: _Features, message: memoryview) -> _Keys:
    """Find out by a sample which features hold image, label and name."""
    image = next((key for key in _IMAGE if key in features), None)
    label = next((key for key in _LABEL if key in features), None)
    name = next((key for key in _NAME if key in features), None)
    if image is None or label is None:
        raise _MalformedError(
            f"expected an Example with an image ({_listed(_IMAGE)}) and a label "
            f"({_listed(_LABEL)}), got one of {len(message)} bytes with {_listed(features)}"
        )
    return _Keys(image, label, name)


def _listed(keys: Sequence[bytes] | _Features) -> str:
    return ", ".join(key.decode() for key in keys) or "none of these features"


def _only_bytes(message: memoryview, features: _Features, key: bytes) -> tuple[int, int]:
    """Return where the only value of a BytesList begins and ends."""
    begin, end = features.get(key, (0, 0))
    # A short value in a list of one, such as a name: saves the 2 us of the general way.
    rest = end - begin - 4
    if 0 <= rest < 0x7E and message[begin : begin + 4] == bytes((_FIRST, rest + 2, _FIRST, rest)):
        return begin + 4, end
    all_values = (
        (value_begin, value_end)
        for tag, list_begin, list_end in _fields(message, begin, end)
        if tag == _FIRST
        for value_tag, value_begin, value_end in _fields(message, list_begin, list_end)
        if value_tag == _FIRST
    )
    values = list(itertools.islice(all_values, 2))  # there may be millions of empty ones
    if len(values) != 1:
        raise _wrong(key, "one value of bytes", "more" if values else "none")
    return values[0]


def _text(message: memoryview, features: _Features, key: bytes) -> str:
    begin, end = _only_bytes(message, features, key)
    if not 0 < end - begin <= 1024:
        raise _wrong(key, "1 to 1024 bytes of text", end - begin)
    return os.fsdecode(bytes(message[begin:end]))


def _ints(message: memoryview, begin: int, end: int) -> Iterator[int]:
    """Yield the values of an Int64List, packed or not."""
    for tag, list_begin, list_end in _fields(message, begin, end):
        if tag != _THIRD:
            continue
        for value_tag, at, value_end in _fields(message, list_begin, list_end):
            while value_tag in (_PLAIN_INT, _FIRST) and at < value_end:
                value, at = _varint(message, at, value_end)
                yield value - (1 << 64) if value >> 63 else value


def _fields(message: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield tag, begin and end of each field of the message in [at, end)."""
    while at < end:
        tag, at = message[at], at + 1
        if tag >= 0x80:
            tag, at = _varint(message, at - 1, end)
        wire_type = tag & 7
        if wire_type == 2:
            length, at = _varint(message, at, end)
        elif wire_type == 0:
            length = _varint(message, at, end)[1] - at
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            what = "a protobuf field"
            raise _MalformedError(f"byte {at}: expected {what}, got wire type {wire_type}")
        if length > end - at:
            what = f"a protobuf field within {end - at} bytes"
            raise _MalformedError(f"byte {at}: expected {what}, got {length}")
        yield tag, at, at + length
        at += length


def _varint(message: memoryview, at: int, end: int) -> tuple[int, int]:
    """Return the number at `at` and where it ends."""
    value, shift = 0, 0
    while at < end and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise _MalformedError(f"byte {at}: expected a number's last byte")
