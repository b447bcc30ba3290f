"""MosaicML Streaming's MDS: a folder of shards and an index.json that describes them.

    index.json   for each shard: columns with encodings and sizes, number of samples, names, bytes
                 and hashes of its file and of its compressed file
    shard        number of samples and where each begins (u32), a copy of the description, samples
    sample       bytes of each column without a fixed size (u32), then the columns

Labels lie between the images, so indexing reads everything once. Images of uncompressed shards are
byte ranges. Compressed shards, and raw pixels (encoding "pil"), which become PPM, come as python
blocks. A shard is compressed as a whole, so it is one block. Shards have 64 MB by default, so the
64 blocks of a block shuffle take 4 GB; packing avoids that.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import itertools
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
from imagenet_seq.index.classes import MAX_CLASSES, classes_of, sorted_classes
from imagenet_seq.index.columns import Index
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read.turns import Turns
from imagenet_seq.sources.formats.mds_index import (
    INDEX_FILE,
    INTS,
    TEXTS,
    MdsError,
    Shard,
    described_shards,
    read_shards,
)
from imagenet_seq.sources.images import image_extension, ppm_header
from imagenet_seq.sources.place import SPLITS, Found, Opening, Place, Seen, split_needed
from imagenet_seq.sources.scan import FileStream, Problems, Rows, bytes_bar

LOOKS_FOR = "MosaicML Streaming's MDS: a folder of index.json and shard.00000.mds, ..."


def find(place: Place) -> Found | str | None:
    """Recognise a folder of shards by its index.json."""
    if not place.is_folder:
        return None
    splits = [name for name in place.folders if name in SPLITS]
    if place.split is None and any(_is_mds(os.path.join(place.folder, name)) for name in splits):
        raise split_needed(f"{place.path} holds MDS shards in {' and '.join(splits)}")
    if INDEX_FILE not in place.files:
        return None
    path = os.path.join(place.folder, INDEX_FILE)
    described = described_shards(path)
    if described is None:
        return None
    formats = sorted({str(shard.get("format")) for shard in described})
    if formats != ["mds"]:
        return f"has an {INDEX_FILE} of shards in format {', '.join(formats) or 'unknown'}, not mds"
    what = f"MDS, {len(described)} shards in {place.folder}"
    return Found("mds", what, lambda how: _open(place.folder, how), [path])


def _is_mds(folder: str) -> bool:
    path = os.path.join(folder, INDEX_FILE)
    return os.path.exists(path) and described_shards(path) is not None


# ---- compression ---------------------------------------------------------------------------------


def _decompressor(algorithm: str, data: bytes) -> Any:
    """Return a file object that decompresses bytes."""
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


def _decompressed(shard: Shard, data: bytes) -> npt.NDArray[np.uint8]:
    """Decompress a shard."""
    assert shard.compression is not None
    # Raised by the decompressors: nothing is read from a disk here.
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if shard.compression == "zstd":
        errors = (_zstandard().ZstdError,)
    raw = np.empty(shard.raw_bytes, np.uint8)
    try:
        with _decompressor(shard.compression, data) as file:
            num_bytes = _fill(raw, file)
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


def _fill(data: npt.NDArray[np.uint8], file: Any) -> int:
    """Read into `data` until it is full or the file ends; return the number of bytes read."""
    num_bytes = 0
    while count := file.readinto(data.data[num_bytes:]):
        num_bytes += count
    return num_bytes


# ---- scanning ------------------------------------------------------------------------------------


def _open(folder: str, how: Opening) -> Source:
    shards = read_shards(folder)
    files = [os.path.join(folder, INDEX_FILE), *(shard.path for shard in shards)]
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
    """Return the first sample of each shard, and the end of the last."""
    return np.searchsorted(index.file, np.arange(num_shards + 1)).astype(np.int64)


def _needs_python(shards: Iterable[Shard]) -> bool:
    return any(shard.compression is not None or shard.has_pixels for shard in shards)


def _scan(folder: str, shards: Sequence[Shard], how: Opening) -> Scanned:
    problems = Problems(how.on_error)
    scan = _Scan(problems, how)
    total_bytes = sum(os.path.getsize(shard.path) for shard in shards)
    with bytes_bar("MDS shards", total_bytes, how.progress) as bar:
        for number, shard in enumerate(shards):
            scan.add_shard(number, shard, bar)
    files = [os.path.relpath(shard.path, folder) for shard in shards]
    index = scan.index(folder, files)
    if _needs_python(shards):
        first = _first_of(index, len(shards))
        index = dataclasses.replace(index, offset=np.arange(len(index)) - first[index.file])
    extra = {"begin": np.array(scan.begin, np.int64)}
    return Scanned(index, extra, problems.messages, problems.count)


def _whole(stream: FileStream) -> bytes:
    piece = 4 << 20
    places = range(0, stream.size, piece)
    return b"".join(stream.take(at, min(piece, stream.size - at)) for at in places)


class _Image(NamedTuple):
    """Where an image lies in a sample, and of what kind it is."""

    begin: int
    end: int
    extension: str
    header: bytes = b""  # for pixels: replaces as many bytes before `begin`, to make a PPM
    width: int = -1
    height: int = -1


Take = Callable[[int, int], memoryview]
"""Returns bytes of a shard: offset, length."""


class _Scan:
    """Collects the samples of all shards."""

    def __init__(self, problems: Problems, how: Opening) -> None:
        self._problems, self._visit = problems, how.visit
        self._rows = Rows()
        self._labels: dict[str, int] = {}  # numbers of the texts, if labels are texts
        self._width, self._height = array("i"), array("i")
        self.begin = array("q")  # offset of each image in its shard

    def add_shard(self, number: int, shard: Shard, bar: Any) -> None:
        """Add a shard's samples."""
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

    def _add_samples(self, number: int, shard: Shard, take: Take) -> None:
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
            except MdsError as error:
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
        if encoding in TEXTS:
            text = bytes(data[:256]).decode("utf-8", "surrogateescape").strip()
            if not text or len(self._labels) == MAX_CLASSES:
                raise MdsError(f"expected a class as text, of at most {MAX_CLASSES}")
            return self._labels.setdefault(text, len(self._labels))
        layout = INTS[encoding]
        if len(data) != struct.calcsize(layout):
            raise MdsError(f"expected a label of type {encoding}, got {len(data)} bytes")
        label = int(struct.unpack(layout, data)[0])
        if not 0 <= label < MAX_CLASSES:
            raise MdsError(f"expected a label in [0, {MAX_CLASSES}), got {label}")
        return label

    def index(self, folder: str, files: Sequence[str]) -> Index:
        """Return the index of all samples, with their offsets in the shards."""
        rows, texts = self._rows, list(self._labels)
        label, classes = rows.label, tuple[str, ...]()
        if not all(text.isdecimal() and len(text) < 6 for text in texts):
            label, classes = sorted_classes(texts, label)
        elif texts:  # they are numbers: these are the labels
            label = np.array(list(map(int, texts)), np.int32)[label]
        index = rows.index(folder, files, classes or classes_of(label, rows.names), label)
        return dataclasses.replace(
            index, width=np.array(self._width, np.int32), height=np.array(self._height, np.int32)
        )


def _algorithm_of(hashes: Mapping[str, Any]) -> str:
    """Return the name of a hash that Python has; "" if there is none, such as xxhash only."""
    known = hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}
    return next((name for name in hashes if name in known), "")


def _ends(shard: Shard, take: Take) -> list[int]:
    """Return where each sample begins, and where the last one ends."""
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
    """Finds the columns of samples by their sizes; None if each sample says its own."""

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._sizes = sizes
        self._head = struct.Struct(f"<{sum(size is None for size in sizes)}I")

    def spans(self, data: memoryview) -> list[tuple[int, int]]:
        """Return where each column begins and ends."""
        if len(data) < self._head.size:
            raise MdsError(f"expected {self._head.size} bytes of lengths, got {len(data)}")
        lengths = iter(self._head.unpack_from(data))
        spans, at = [], self._head.size
        for size in self._sizes:
            end = at + (next(lengths) if size is None else size)
            spans.append((at, end))
            at = end
        if at != len(data):
            raise MdsError(f"expected columns of {at} bytes in all, got {len(data)}")
        return spans


def _image(encoding: str, data: memoryview, begin: int, end: int) -> _Image:
    if encoding == "pil":
        return _pixels(data, begin, end)
    if begin == end:
        raise MdsError("expected an image, got no bytes")
    return _Image(begin, end, image_extension(data[begin:end]) or ".bin")


def _pixels(data: memoryview, begin: int, end: int) -> _Image:
    """Find the pixels of encoding "pil": after width, height, length of the mode, and mode.

    A PPM's header is never longer than these and the column's length, and takes their place.
    """
    if end - begin < 13:
        raise MdsError(f"expected pixels with their size and mode, got {end - begin} bytes")
    width, height, mode_bytes = struct.unpack_from("<3I", data, begin)
    first = begin + 12 + min(mode_bytes, end - begin - 12)
    mode = bytes(data[begin + 12 : first][:16])
    if mode not in (b"RGB", b"L"):
        raise MdsError(f"expected pixels of mode RGB or L, got {mode!r}: write JPEG or PNG")
    num_bytes = width * height * len(mode)
    if not 0 < num_bytes == end - first or max(width, height) > 99_999:
        raise MdsError(
            f"expected {width} x {height} pixels of mode {mode.decode()}, got {end - first} bytes"
        )
    return _Image(first, end, ".ppm", ppm_header(width, height, mode == b"RGB"), width, height)


# ---- blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Where the samples of all shards lie.

    The source's own index may be a selection; this one is whole.
    """

    shards: Sequence[Shard]  # one for each block
    first: npt.NDArray[np.int64]  # the first sample of each shard, and the end of the last
    begin: npt.NDArray[np.int64]  # offset of each image in its shard
    index: Index

    def check(self) -> None:
        """Check the cached index, which may be damaged: each sample has to lie in its shard."""
        index, length = self.index, self.index.length
        shard_bytes = np.array([shard.raw_bytes for shard in self.shards], np.int64)
        if (
            length is None
            or (np.diff(index.file) < 0).any()
            or len(self.begin) != len(index)
            or (np.minimum(self.begin, length) < 0).any()
            or (self.begin + length > shard_bytes[index.file]).any()
        ):
            raise DataError(f"{index.root}: its cached index is damaged: delete the index")


@dataclass(frozen=True, eq=False, kw_only=True)
class _ShardSource(Source):
    """Shards that are compressed or have pixels; each is a block."""

    blocks: _Blocks
    turns: AbstractContextManager[Any]

    def read_block(self, number: int) -> Block:
        """Read a shard, decompress it, and turn its pixels into PPMs."""
        shard, index = self.blocks.shards[number], self.blocks.index
        samples = slice(self.blocks.first[number], self.blocks.first[number + 1])
        begin = self.blocks.begin[samples]
        assert index.length is not None
        length = index.length[samples]
        data = self._read(shard)
        if shard.has_pixels:
            assert index.width is not None
            assert index.height is not None
            columns = (index.width[samples], index.height[samples], begin, length)
            for width, height, at, size in np.transpose(columns).tolist():
                is_rgb = size == 3 * width * height + len(ppm_header(width, height, True))
                header = np.frombuffer(ppm_header(width, height, is_rgb), np.uint8)
                data[at : at + len(header)] = header
        return Block(data, begin, length)

    def _read(self, shard: Shard) -> npt.NDArray[np.uint8]:
        """Return the bytes of a shard, decompressed."""
        with self.turns, open(shard.path, "rb", buffering=0) as file:
            if shard.compression is None:
                data = np.empty(shard.raw_bytes, np.uint8)
                if (num_bytes := _fill(data, file)) < len(data):
                    raise DataError(f"{shard.path}: expected {len(data)} bytes, got {num_bytes}")
                return data
            compressed = file.readall()
        return _decompressed(shard, compressed)
