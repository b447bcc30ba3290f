"""MosaicML Streaming's MDS: a folder of shards and an index.json that describes them.

    index.json   of each shard: columns with encodings and sizes, number of samples, names, bytes
                 and hashes of its file and of its compressed file
    shard        number of samples and where each begins (u32), a copy of the description, samples
    sample       bytes of each column without a fixed size (u32), then the columns

Labels lie between the images, so indexing reads everything once. Images of uncompressed shards are
byte ranges of them. Compressed shards come as python blocks, and so do raw pixels (encoding
"pil"), which become PPM. A block is a shard: it is compressed as a whole. Shards have 64 MB unless
their writer said otherwise, so the 64 blocks of a block shuffle take 4 GB; packing avoids that.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import Scanned, indexed
from imagenet_seq.index.classes import MAX_CLASSES, classes_of
from imagenet_seq.index.columns import Index
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read.turns import Turns
from imagenet_seq.sources.images import image_extension
from imagenet_seq.sources.place import SPLITS, Found, Opening, Place, Seen, SplitNeededError
from imagenet_seq.sources.scan import FileStream, Problems, Rows
from imagenet_seq.text import progress_bar

LOOKS_FOR = "MosaicML Streaming's MDS: a folder of index.json and shard.00000.mds, ..."


_INDEX = "index.json"


_MAX_INDEX_BYTES = 1 << 28


_MAX_SHARD_BYTES = (1 << 32) - 1  # where a sample begins is a u32


_IMAGES = ("jpeg", "png", "pil", "jpeg_array", "jpegarray")


_INTS = {
    "int": "<q", "int64": "<q", "int32": "<i", "int16": "<h", "int8": "<b",
    "uint64": "<Q", "uint32": "<I", "uint16": "<H", "uint8": "<B",
}  # fmt: skip


_TEXTS = ("str", "str_int")


_IMAGE_NAMES = ("image", "x", "img", "jpg", "jpeg")


_LABEL_NAMES = ("label", "class", "y", "target", "cls")


# ---- finding -------------------------------------------------------------------------------------


def find(place: Place) -> Found | str | None:
    """Recognise a folder of shards by its index.json.

    Raises:
        SplitNeededError: where it is a folder of such folders, and no split was asked for.
    """
    if not place.is_folder:
        return None
    splits = [name for name in place.folders if name in SPLITS]
    if place.split is None and any(_is_mds(os.path.join(place.folder, name)) for name in splits):
        raise SplitNeededError(
            f"{place.path} holds MDS shards in {' and '.join(splits)}: pass split='train' or "
            "split='val'"
        )
    if _INDEX not in place.files:
        return None
    path = os.path.join(place.folder, _INDEX)
    described = _described(path)
    if described is None:
        return None
    formats = sorted({str(shard.get("format")) for shard in described})
    if formats != ["mds"]:
        return f"has an {_INDEX} of shards in format {', '.join(formats) or 'unknown'}, not mds"
    what = f"MDS, {len(described)} shards in {place.folder}"
    return Found("mds", what, lambda how: _open(place.folder, how), [path])


def _is_mds(folder: str) -> bool:
    path = os.path.join(folder, _INDEX)
    return os.path.exists(path) and _described(path) is not None


def _described(path: str) -> list[dict[str, Any]] | None:
    """Return what an index.json says of each shard; None where it is not of MosaicML Streaming."""
    if os.path.getsize(path) > _MAX_INDEX_BYTES:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError):
        return None
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return None
    return shards


# ---- what index.json says ------------------------------------------------------------------------


class _Columns(NamedTuple):
    """A sample's columns, and which two are meant."""

    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]
    image: int
    label: int


class _Shard(NamedTuple):
    """A shard, and the file that it is read from."""

    path: str
    name: str  # of its samples' names; one shard's only
    compression: str | None  # of that file
    raw_bytes: int
    num_samples: int
    columns: _Columns
    hashes: Mapping[str, str]  # of the raw bytes


class _WrongError(ValueError):
    """Something is not what it should be; says what was expected and what came."""


def _shards(folder: str) -> list[_Shard]:
    """Read index.json.

    Raises:
        DataError: where it is damaged, or a file is not there or has another size.
    """
    where = os.path.join(folder, _INDEX)
    described = _described(where)
    if not described:
        raise DataError(f"{where}: expected a list of shards, found none")
    shards = []
    for number, about in enumerate(described):
        try:
            shards.append(_shard(folder, about))
        except _WrongError as error:
            raise DataError(f"{where}: shard {number}: {error}") from error
    if len(shards) == 1:
        return [shards[0]._replace(name="")]
    if len({shard.columns for shard in shards}) > 1:
        raise DataError(f"{where}: expected the same columns in all shards, got different ones")
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{where}: expected a file of its own for each shard, one is named twice")
    return shards


def _shard(folder: str, about: dict[str, Any]) -> _Shard:
    if about.get("version") != 2 or about.get("format") != "mds":
        raise _WrongError(
            f"expected version 2 and format 'mds', got {about.get('version')!r:.50} and "
            f"{about.get('format')!r:.50}"
        )
    raw_name, raw_bytes, hashes = _file_of(about, "raw_data")
    num_samples = about.get("samples")
    if not isinstance(num_samples, int) or not 0 <= num_samples <= raw_bytes // 4 - 2:
        raise _WrongError(
            f"expected a number of 'samples' that fit into {raw_bytes} bytes, got "
            f"{num_samples!r:.50}"
        )
    path, size, compression = os.path.join(folder, raw_name), raw_bytes, None
    if not os.path.exists(path) and about.get("zip_data"):
        zip_name, size, _ = _file_of(about, "zip_data")
        path, compression = os.path.join(folder, zip_name), _algorithm(about)
    if not os.path.exists(path):
        raise _WrongError(f"{path} is missing: download the shard, or write the data set again")
    if os.path.getsize(path) != size:
        raise _WrongError(
            f"{path}: expected {size} bytes, got {os.path.getsize(path)}: it is truncated or "
            "another one; download it again"
        )
    columns, name = _columns(about), os.path.splitext(raw_name)[0] + "/"
    return _Shard(path, name, compression, raw_bytes, num_samples, columns, hashes)


def _file_of(about: dict[str, Any], which: str) -> tuple[str, int, Mapping[str, str]]:
    """Return a file's name, bytes and hashes."""
    file = about.get(which)
    if not isinstance(file, dict):
        raise _WrongError(f"expected '{which}' with 'basename' and 'bytes', got {file!r:.50}")
    name, size, hashes = file.get("basename"), file.get("bytes"), file.get("hashes") or {}
    if not isinstance(name, str) or not _is_inside(name):
        raise _WrongError(f"{which}: expected the name of a file in the folder, got {name!r:.100}")
    if not isinstance(size, int) or not 0 <= size <= _MAX_SHARD_BYTES:
        raise _WrongError(f"{which}: expected at most {_MAX_SHARD_BYTES} bytes, got {size!r:.50}")
    if not isinstance(hashes, dict):
        raise _WrongError(f"{which}: expected 'hashes' by algorithm, got {hashes!r:.50}")
    return name, size, hashes


def _is_inside(name: str) -> bool:
    parts = name.split("/")  # shards of a merged index lie in folders
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(parts)


def _columns(about: dict[str, Any]) -> _Columns:
    names, encodings, sizes = _lists(about)
    kinds = tuple(encoding.split(":")[0] for encoding in encodings)
    image = _chosen(names, [i for i, kind in enumerate(kinds) if kind in _IMAGES], _IMAGE_NAMES)
    if image is None:
        image = _chosen(names, [i for i, kind in enumerate(kinds) if kind == "bytes"], _IMAGE_NAMES)
    label = _chosen(names, [i for i, kind in enumerate(kinds) if kind in _INTS], _LABEL_NAMES)
    if label is None:
        label = _chosen(names, [i for i, kind in enumerate(kinds) if kind in _TEXTS], _LABEL_NAMES)
    if image is None or label is None:
        shown = ", ".join(f"{name}: {kind}" for name, kind in zip(names, encodings, strict=True))
        raise _WrongError(
            f"expected a column of images ({', '.join(_IMAGES)} or bytes) and one of labels "
            f"(integers or str), called {' or '.join(_IMAGE_NAMES)} and "
            f"{' or '.join(_LABEL_NAMES)} where there are several; got {shown}"
        )
    return _Columns(kinds, tuple(size or None for size in sizes), image, label)


def _lists(about: dict[str, Any]) -> tuple[list[str], list[str], list[int | None]]:
    """Return names, encodings and sizes of the columns."""
    lists = [about.get(f"column_{what}") for what in ("names", "encodings", "sizes")]
    names, encodings, sizes = (values if isinstance(values, list) else [] for values in lists)
    if (
        not 0 < len(names) == len(encodings) == len(sizes)
        or not all(isinstance(text, str) for text in (*names, *encodings))
        or not all(size is None or (isinstance(size, int) and size >= 0) for size in sizes)
    ):
        raise _WrongError(f"expected names, encodings and sizes of columns, got {lists!r:.200}")
    return names, encodings, sizes


def _chosen(names: Sequence[str], choice: Sequence[int], known: Sequence[str]) -> int | None:
    """Return the column with the first known name among `choice`, or the only one there is."""
    by_name = {names[i].lower(): i for i in choice}
    found = next((by_name[name] for name in known if name in by_name), None)
    return choice[0] if found is None and len(choice) == 1 else found


# ---- compression ---------------------------------------------------------------------------------


def _algorithm(about: dict[str, Any]) -> str:
    """Return how a shard is compressed: the "zstd" of "zstd:7"."""
    algorithm = str(about.get("compression")).split(":")[0]
    if algorithm not in ("zstd", "gz", "bz2"):
        raise _WrongError(
            f"expected shards that are not compressed, or by zstd, gz or bz2, got {algorithm!r:.50}"
            ": decompress them (StreamingDataset does where it downloads to)"
        )
    return algorithm


def _decompressor(algorithm: str, data: bytes) -> Any:
    """Return a file object of what is in compressed bytes."""
    if algorithm == "gz":
        return gzip.GzipFile(fileobj=io.BytesIO(data))
    if algorithm == "bz2":
        return bz2.BZ2File(io.BytesIO(data))
    return _zstandard().ZstdDecompressor().stream_reader(data)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        message = "MDS shards compressed by zstd need a package: pip install zstandard"
        raise ImportError(message) from error
    return zstandard


def _decompressed(shard: _Shard, data: bytes) -> npt.NDArray[np.uint8]:
    """Return what is in a compressed shard.

    Raises:
        DataError: where it is damaged, or has not as many bytes as index.json says.
    """
    assert shard.compression is not None
    # Of the decompressors: nothing is read from a disk here.
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if shard.compression == "zstd":
        errors = (_zstandard().ZstdError,)
    raw, num_bytes = np.empty(shard.raw_bytes, np.uint8), 0
    try:
        with _decompressor(shard.compression, data) as file:
            while count := file.readinto(raw.data[num_bytes:]):
                num_bytes += count
            has_more = bool(file.read(1))
    except errors as error:
        raise DataError(
            f"{shard.path}: expected {shard.raw_bytes} bytes compressed by {shard.compression}, "
            f"got damaged ones ({error}): download the shard again"
        ) from error
    if num_bytes < len(raw) or has_more:
        raise DataError(
            f"{shard.path}: expected {shard.raw_bytes} bytes when decompressed, got "
            f"{'more' if has_more else num_bytes}: download the shard again"
        )
    return raw


# ---- scanning ------------------------------------------------------------------------------------


def _open(folder: str, how: Opening) -> Source:
    shards = _shards(folder)
    files = [os.path.join(folder, _INDEX), *(shard.path for shard in shards)]
    scanned = indexed("mds", folder, files, lambda: _scan(folder, shards, how), how.on_error)
    index, notes = scanned.index, scanned.notes
    if not _needs_python(shards):
        return Source("mds", index, permuted=is_permuted(index), notes=notes)
    blocks = _Blocks(shards, _first_of(index, len(shards)), scanned.extra["begin"], index)
    blocks.check()
    return _ShardSource(
        "mds", index, permuted=is_permuted(index), python_blocks=True, notes=notes, blocks=blocks,
        turns=Turns(folder),
    )  # fmt: skip


def _first_of(index: Index, num_shards: int) -> npt.NDArray[np.int64]:
    """Return which sample each shard begins with, and where the last one ends."""
    return np.searchsorted(index.file, np.arange(num_shards + 1)).astype(np.int64)


def _needs_python(shards: Iterable[_Shard]) -> bool:
    return any(shard.compression is not None or _has_pixels(shard) for shard in shards)


def _has_pixels(shard: _Shard) -> bool:
    return shard.columns.encodings[shard.columns.image] == "pil"


def _scan(folder: str, shards: Sequence[_Shard], how: Opening) -> Scanned:
    problems = Problems(how.on_error)
    scan = _Scan(problems, how)
    total_bytes = sum(os.path.getsize(shard.path) for shard in shards)
    with progress_bar(
        "index MDS shards", total_bytes, unit="B", enabled=how.progress, delay_s=1
    ) as bar:
        for number, shard in enumerate(shards):
            scan.add_shard(number, shard, bar)
    files = [os.path.relpath(shard.path, folder) for shard in shards]
    index = scan.index(folder, files)
    if _needs_python(shards):
        first = _first_of(index, len(shards))
        index = dataclasses.replace(index, offset=np.arange(len(index)) - first[index.file])
    return Scanned(
        index,
        extra={"begin": np.array(scan.begin, np.int64)},
        problems=problems.messages,
        num_problems=problems.count,
    )


def _whole(stream: FileStream) -> bytes:
    piece = 4 << 20
    places = range(0, stream.size, piece)
    return b"".join(stream.take(at, min(piece, stream.size - at)) for at in places)


class _Image(NamedTuple):
    """Where an image lies in a sample, and what it is to be."""

    begin: int
    end: int
    extension: str
    header: bytes = b""  # of a PPM: the last bytes before `begin` are to be replaced by it
    width: int = -1
    height: int = -1


Take = Callable[[int, int], memoryview]
"""Returns bytes of a shard: offset, length."""


class _Scan:
    """Collects the samples of all shards."""

    def __init__(self, problems: Problems, how: Opening) -> None:
        self._problems, self._visit = problems, how.visit
        self._rows = Rows()
        self._labels: dict[str, int] = {}  # a number of its own for each text that is a label
        self._width, self._height = array("i"), array("i")
        self.begin = array("q")  # of each sample's bytes in its shard

    def add_shard(self, number: int, shard: _Shard, bar: Any) -> None:
        """Add a shard's samples.

        Raises:
            DataError: where the shard is damaged; with on_error="fail" for any problem.
        """
        algorithm = _algorithm_of(shard.hashes)
        digest = hashlib.new(algorithm) if algorithm else None
        whole = shard.compression is not None
        with FileStream(shard.path, bar, None if whole else digest) as stream:
            if whole:
                raw = _decompressed(shard, _whole(stream)).data
                if digest is not None:
                    digest.update(raw)
                self._add_samples(number, shard, lambda at, length: raw[at : at + length])
            else:
                self._add_samples(number, shard, stream.take)
                stream.finish()
        if digest is not None and digest.hexdigest() != shard.hashes[algorithm]:
            raise DataError(
                f"{shard.path}: expected bytes whose {algorithm} is {shard.hashes[algorithm]}, got "
                f"{digest.hexdigest()}: the shard is damaged; download it again"
            )

    def _add_samples(self, number: int, shard: _Shard, take: Take) -> None:
        ends = _ends(shard, take)
        columns = shard.columns
        lengths_of = _Lengths(columns.sizes)
        for i, (begin, end) in enumerate(itertools.pairwise(ends)):
            data = take(begin, end - begin)
            try:
                spans = lengths_of.spans(data)
                image = _image(columns.encodings[columns.image], data, *spans[columns.image])
                label_begin, label_end = spans[columns.label]
                label = self._label(columns.encodings[columns.label], data[label_begin:label_end])
            except _WrongError as error:
                self._problems.report(f"{shard.path}: sample {i} at offset {begin}: {error}")
            else:
                name = f"{shard.name}{i:06d}{image.extension}"
                self._add(name, number, begin, image, label, data)

    def _add(
        self, name: str, file: int, offset: int, image: _Image, label: int, data: memoryview
    ) -> None:
        begin, length = offset + image.begin, image.end - image.begin + len(image.header)
        row = self._rows.add(name, file, begin, length, label)
        self.begin.append(begin - len(image.header))
        self._width.append(image.width)
        self._height.append(image.height)
        if self._visit is not None:
            stored = data[image.begin : image.end]
            seen = memoryview(image.header + bytes(stored)) if image.header else stored
            self._visit(Seen(row, name, seen))

    def _label(self, encoding: str, data: memoryview) -> int:
        if encoding in _TEXTS:
            text = bytes(data[:256]).decode("utf-8", "surrogateescape").strip()
            if not text or len(self._labels) == MAX_CLASSES:
                raise _WrongError(f"expected a class as text, of at most {MAX_CLASSES}")
            return self._labels.setdefault(text, len(self._labels))
        layout = _INTS[encoding]
        if len(data) != struct.calcsize(layout):
            raise _WrongError(f"expected a label of type {encoding}, got {len(data)} bytes")
        label = int(struct.unpack(layout, data)[0])
        if not 0 <= label < MAX_CLASSES:
            raise _WrongError(f"expected a label in [0, {MAX_CLASSES}), got {label}")
        return label

    def index(self, folder: str, files: Sequence[str]) -> Index:
        """Return the index of all that was added; offsets are those of bytes in the shards."""
        rows = self._rows
        label, classes = rows.label, tuple[str, ...]()
        if self._labels:
            label, classes = _numbered(list(self._labels), label)
        classes = classes or classes_of(label, rows.names)
        index = rows.index(folder, files, classes, label)
        return dataclasses.replace(
            index, width=np.array(self._width, np.int32), height=np.array(self._height, np.int32)
        )


def _algorithm_of(hashes: Mapping[str, Any]) -> str:
    """Return a hash that Python has; "" where there is none (xxhash only, for example)."""
    known = hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}
    return next((name for name in hashes if name in known), "")


def _numbered(
    texts: Sequence[str], label: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Return labels, and names of the classes, for labels that are places in `texts`.

    Texts are numbers of classes if all of them are, else names, numbered as they sort.
    """
    if all(text.isdecimal() and len(text) < 6 for text in texts):
        return np.array([int(text) for text in texts], np.int32)[label], ()
    classes = sorted(texts)
    places = {text: place for place, text in enumerate(classes)}
    return np.array([places[text] for text in texts], np.int32)[label], tuple(classes)


def _ends(shard: _Shard, take: Take) -> list[int]:
    """Return where each sample begins, and where the last one ends.

    Raises:
        DataError: where that can't be.
    """
    table_bytes = 4 * (shard.num_samples + 2)
    table = np.frombuffer(take(0, table_bytes), "<u4").astype(np.int64)
    ends = table[1:]
    if (
        table[0] != shard.num_samples
        or ends[0] < table_bytes
        or ends[-1] != shard.raw_bytes
        or (np.diff(ends) < 0).any()
    ):
        raise DataError(
            f"{shard.path}: expected {shard.num_samples} samples that begin one after the other "
            f"between offsets {table_bytes} and {shard.raw_bytes}, got {table[0]} between "
            f"{ends[0]} and {ends[-1]}: the shard is damaged; download it again"
        )
    found: list[int] = ends.tolist()
    return found


class _Lengths:
    """Finds columns in samples."""

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._sizes = sizes
        self._head = struct.Struct(f"<{sum(size is None for size in sizes)}I")

    def spans(self, data: memoryview) -> list[tuple[int, int]]:
        """Return where each column begins and ends."""
        if len(data) < self._head.size:
            raise _WrongError(f"expected {self._head.size} bytes of lengths, got {len(data)}")
        lengths = iter(self._head.unpack_from(data))
        spans, at = [], self._head.size
        for size in self._sizes:
            end = at + (next(lengths) if size is None else size)
            spans.append((at, end))
            at = end
        if at != len(data):
            raise _WrongError(f"expected columns of {at} bytes in all, got {len(data)}")
        return spans


def _image(encoding: str, data: memoryview, begin: int, end: int) -> _Image:
    if encoding == "pil":
        return _pixels(data, begin, end)
    if begin == end:
        raise _WrongError("expected an image, got no bytes")
    return _Image(begin, end, image_extension(data[begin:end]) or ".bin")


def _pixels(data: memoryview, begin: int, end: int) -> _Image:
    """Find pixels as encoding "pil" has them: after width, height, a mode's length and the mode."""
    if end - begin < 13:
        raise _WrongError(f"expected pixels with their size and mode, got {end - begin} bytes")
    width, height, mode_bytes = struct.unpack_from("<3I", data, begin)
    first = begin + 12 + min(mode_bytes, end - begin - 12)
    mode = bytes(data[begin + 12 : first][:16])
    if mode not in (b"RGB", b"L"):
        raise _WrongError(f"expected pixels of mode RGB or L, got {mode!r}: write JPEG or PNG")
    num_bytes = width * height * len(mode)
    if not 0 < num_bytes == end - first or max(width, height) > 99_999:
        raise _WrongError(
            f"expected {width} x {height} pixels of mode {mode.decode()}, got {end - first} bytes"
        )
    return _Image(first, end, ".ppm", _ppm_header(width, height, mode == b"RGB"), width, height)


def _ppm_header(width: int, height: int, is_rgb: bool) -> bytes:
    """Return what makes pixels a PPM (or PGM).

    It is never longer than what comes before them in a shard: the column's length and pil's header.
    """
    return b"P%d\n%d %d\n255\n" % (6 if is_rgb else 5, width, height)


# ---- blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """What a source of python blocks needs of its shards beyond the index, which may be a part of it."""

    shards: Sequence[_Shard]
    first: npt.NDArray[np.int64]  # of each shard's samples, and the end of the last
    begin: npt.NDArray[np.int64]  # of each sample in its shard
    index: Index

    def check(self) -> None:
        """Check what comes from a file that may be damaged.

        Raises:
            DataError: where a sample does not lie in its shard.
        """
        index, length = self.index, self.index.length
        shard_bytes = np.array([shard.raw_bytes for shard in self.shards], np.int64)
        if (
            length is None
            or (np.diff(index.file) < 0).any()
            or len(self.begin) != len(index)
            or (
                (self.begin < 0) | (length < 0) | (self.begin + length > shard_bytes[index.file])
            ).any()
        ):
            raise DataError(f"{index.root}: the index kept of it is damaged: delete it")


@dataclass(frozen=True, eq=False, kw_only=True)
class _ShardSource(Source):
    """Shards that are compressed, or have pixels."""

    blocks: _Blocks
    turns: AbstractContextManager[Any]

    def read_block(self, number: int) -> Block:
        """Read a shard, decompress it, and make PPMs of its pixels."""
        shard, index = self.blocks.shards[number], self.blocks.index
        samples = slice(self.blocks.first[number], self.blocks.first[number + 1])
        begin = self.blocks.begin[samples]
        assert index.length is not None
        length = index.length[samples]
        data = self._read(shard)
        if _has_pixels(shard):
            assert index.width is not None
            assert index.height is not None
            sizes = zip(index.width[samples].tolist(), index.height[samples].tolist(), strict=True)
            for (width, height), at, size in zip(
                sizes, begin.tolist(), length.tolist(), strict=True
            ):
                is_rgb = size == 3 * width * height + len(_ppm_header(width, height, True))
                header = np.frombuffer(_ppm_header(width, height, is_rgb), np.uint8)
                data[at : at + len(header)] = header
        return Block(data, begin, length)

    def _read(self, shard: _Shard) -> npt.NDArray[np.uint8]:
        """Return the bytes of a shard, decompressed."""
        with self.turns, open(shard.path, "rb", buffering=0) as file:
            if shard.compression is None:
                return _filled(file, shard.raw_bytes)
            compressed = file.readall()
        return _decompressed(shard, compressed)


def _filled(file: io.FileIO, num_bytes: int) -> npt.NDArray[np.uint8]:
    data, num_read = np.empty(num_bytes, np.uint8), 0
    while count := file.readinto(data.data[num_read:]):
        num_read += count
    if num_read < num_bytes:
        raise DataError(f"{file.name}: expected {num_bytes} bytes, got {num_read}")
    return data
