"""Check a pack: every byte against the pack's own tables, and pixels against the source."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.errors import DataError
from imagenet_seq.index.columns import Names
from imagenet_seq.index.source import Source
from imagenet_seq.machine import available_cores
from imagenet_seq.pack.selection import Selection
from imagenet_seq.pack.shards import around_image
from imagenet_seq.pack.shrink import Shrink, smaller_copy
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.recognise import open_source
from imagenet_seq.text import progress_bar

_READ_BYTES = 8 << 20
"""Shards are read in pieces of this size, so that threads that share a hard disk seldom seek."""

_MAX_PROBLEMS = 1000
"""After this many problems in a shard, the rest of it is not checked."""


@dataclass(frozen=True)
class Report:
    """Result of a check.

    Attributes:
        num_samples: samples in the pack.
        num_compared: samples whose pixels were compared with the source's.
        problems: one line for each problem; empty: the pack is sound.
    """

    num_samples: int
    num_compared: int
    problems: tuple[str, ...]


def verify(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Read a whole pack and compare every byte with what its tables promise.

    The tables determine every byte of a shard but its images (docs/format.md), so headers, padding
    and labels are compared byte by byte, and images by their CRC-32C.

    Args:
        folder: the pack.
        against: the source that it was made of. Then names, labels and pixels are compared too,
            decoded by Pillow on both sides; smaller copies are made again and compared. On a hard
            disk this reads the source in random order, or the pack, where the source's blocks have
            to be unpacked.
        split: "train" or "val", where `against` holds both.
        num_workers: threads; None: one for each available core.
        progress: whether to show progress on stderr.

    Raises:
        OSError: where the operating system refuses to read `against`.
        FileNotFoundError: where `against` is no data set.
        ValueError: where `against` can't be compared: the pack's smaller copies were encoded by
            another version of Pillow or libjpeg-turbo.
    """
    try:
        pack = pack_format.read_pack(folder, check_shards=False)
    except (DataError, OSError) as error:
        return Report(0, 0, (str(error),))
    problems = list(_check_tables(pack))
    reference = None
    if against is not None:
        selection = Selection.recorded(pack.about["settings"])
        source = selection.of(open_source(against, split, progress, "skip"))
        reference = _Reference(pack, source)
        problems += reference.check_names()
    bar = progress_bar(f"verify {pack.folder}", len(pack.rows), enabled=progress)
    with bar, ThreadPoolExecutor(num_workers or available_cores()) as threads:
        check = _ShardCheck(pack, reference, bar)
        try:
            for found in threads.map(check.run, range(len(pack.shard_bytes))):
                problems += found
            if reference is not None and reference.in_python_blocks:
                for found in threads.map(check.compare_block, reference.blocks):
                    problems += found
        except BaseException:
            check.stop.set()
            raise
    return Report(len(pack.rows), reference.num_compared if reference else 0, tuple(problems))


def _check_tables(pack: pack_format.Pack) -> Iterator[str]:
    """Check everything but the shards."""
    about, rows = pack.about, pack.rows
    yield from _check_files(pack)
    yield from _check_counts(pack)
    settings, has_tables = about["settings"], pack.tables is not None
    shares_tables = settings.get("tables") == "pack" and settings.get("keep_bytes") is False
    if has_tables != shares_tables:
        where = os.path.join(pack.folder, pack_format.PACK_FILE)
        has = "some" if has_tables else "none"
        yield f"{where}: 'huffman_tables' has {has}, which contradicts 'settings' {settings}"
    index = pack_format.make_index(
        pack.folder, rows, pack.names, pack.classes, len(pack.shard_bytes)
    )
    try:
        index.validate(os.path.join(pack.folder, pack_format.INDEX_FILE))
    except DataError as error:
        yield str(error)
    if index.id != about.get("index_id"):
        yield (
            f"{pack.folder}/{pack_format.PACK_FILE}: 'index_id' is {about.get('index_id')!r}, "
            f"names, labels, offsets and classes give {index.id!r}: one of them was changed"
        )
    place = rows["shard"].astype(np.int64) << 48 | rows["offset"]
    is_wrong = np.diff(place) <= 0
    if is_wrong.any():
        sample = int(is_wrong.argmax()) + 1
        path = os.path.join(pack.folder, pack_format.INDEX_FILE)
        yield f"{path}: sample {sample} does not lie behind the one before it"


def _check_files(pack: pack_format.Pack) -> Iterator[str]:
    """Check that the pack's files are those that pack.json must name, and no others."""
    tables = {pack_format.INDEX_FILE, pack_format.NAMES_FILE, pack_format.NAMES_BEGIN_FILE}
    if pack.about["counts"]["failures"]:
        tables.add(pack_format.FAILURES_FILE)
    files = pack.about["files"]
    if files.keys() != tables:
        where = os.path.join(pack.folder, pack_format.PACK_FILE)
        yield f"{where}: 'files': expected {sorted(tables)}, got {sorted(files)}"
    for name in sorted(tables & files.keys()):
        path = os.path.join(pack.folder, name)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            yield str(error)
            continue
        crc = f"{native.crc32c(content):08x}"
        if files[name] != {"bytes": len(content), "crc32c": crc}:
            yield f"{path}: expected {files[name]}, got {len(content)} bytes with CRC-32C {crc}"
    known = tables.union(map(pack_format.shard_file, range(len(pack.shard_bytes))))
    for name in sorted(set(os.listdir(pack.folder)) - known):
        if name == pack_format.FAILURES_FILE or (
            name.startswith("shard-") and name.endswith(".tar")
        ):
            yield f"{os.path.join(pack.folder, name)}: does not belong to the pack"


def _check_counts(pack: pack_format.Pack) -> Iterator[str]:
    """Compare the counts in pack.json with the tables."""
    about, rows = pack.about, pack.rows
    failures: list[dict[str, Any]] = []
    if about["counts"]["failures"]:
        try:
            failures = pack_format.read_failures(pack.folder)
        except (DataError, OSError) as error:
            yield str(error)
            return
    skipped = sum(not failure["kept"] for failure in failures)
    damaged, canonical, shrunk = (
        int(np.count_nonzero(rows["flags"] & flag))
        for flag in (pack_format.FLAG_DAMAGED, pack_format.FLAG_CANONICAL, pack_format.FLAG_SHRUNK)
    )
    in_shard = np.bincount(rows["shard"], minlength=len(pack.shard_bytes)).tolist()
    counts = about["counts"]
    for what, said, counted in [
        ("image_bytes", about["image_bytes"], int(rows["length"].sum())),
        ("counts.canonical", counts["canonical"], canonical),
        ("counts.shrunk", counts["shrunk"], shrunk),
        ("counts.failures", counts["failures"], damaged + skipped),
        ("counts.failures", counts["failures"], len(failures)),
        ("counts.skipped", counts["skipped"], skipped),
        ("source.num_samples", about["source"]["num_samples"], len(rows) + skipped),
        ("shards[].num_samples", [s.get("num_samples") for s in about["shards"]], in_shard),
    ]:
        if said != counted:
            where = os.path.join(pack.folder, pack_format.PACK_FILE)
            yield f"{where}: '{what}' is {said}, the tables give {counted}"


def _huffman_tables(image: bytes) -> bytes:
    """Return the payloads of the DHT segments of a JPEG without fill bytes."""
    tables, at, marker = b"", 2, 0
    while marker != 0xDA and image[at : at + 1] == b"\xff" and at + 4 <= len(image):  # up to SOS
        marker, size = image[at + 1], int.from_bytes(image[at + 2 : at + 4], "big")
        if marker == 0xC4:  # DHT
            tables += image[at + 4 : at + 2 + size]
        at += 2 + size
    return tables


def _left_out(pack: pack_format.Pack) -> list[str]:
    """Return the names of the samples that the pack says it left out."""
    if pack.about["counts"]["skipped"]:
        # Damage of this file is reported by the check of the tables.
        with contextlib.suppress(DataError, OSError):
            failures = pack_format.read_failures(pack.folder)
            return [failure["name"] for failure in failures if not failure["kept"]]
    return []


class _Reference:
    """The source that a pack is compared with."""

    def __init__(self, pack: pack_format.Pack, source: Source) -> None:
        self._pack = pack
        self._shrink = _shrink_of(pack)
        self._source = source
        self._index = source.index
        self._label = np.asarray(source.index.targets)
        self._sample = {name: sample for sample, name in enumerate(source.index.name)}
        self._lock = threading.Lock()
        self.in_python_blocks = source.python_blocks
        self.num_compared = 0

    @functools.cached_property
    def blocks(self) -> list[npt.NDArray[np.int64]]:
        """The samples of each python block."""
        order = np.argsort(self._index.file, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self._index.file[order])) + 1)

    def images_of(self, samples: npt.NDArray[np.int64]) -> Iterator[tuple[str, bytes]]:
        """Yield names and bytes of the samples of one python block."""
        block = self._source.read_block(int(self._index.file[samples[0]]))
        for sample in samples.tolist():
            data = block.image(int(self._index.offset[sample])).tobytes()
            yield self._index.name[sample], data

    def check_names(self) -> Iterator[str]:
        """Report the source's samples that the pack lacks, beside those it says it left out."""
        missing = set(self._sample).difference(self._pack.names, _left_out(self._pack))
        for name in sorted(missing)[:_MAX_PROBLEMS]:
            yield f"{name}: is in {self._index.root} but not in the pack"

    def check(self, name: str, label: int, data: bytes) -> str | None:
        """Compare one sample, without pixels where it is in a python block; return its problem."""
        sample = self._sample.get(name)
        if sample is None:
            return f"is in the pack but not in {self._index.root}"
        expected = self._index.classes[int(self._label[sample])]
        if not 0 <= label < len(self._pack.classes) or self._pack.classes[label] != expected:
            return f"label {label} does not mean class {expected}, as in the source"
        if self.in_python_blocks:
            return None
        path = os.path.join(self._index.root, self._index.files[int(self._index.file[sample])])
        length = -1 if self._index.length is None else int(self._index.length[sample])
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(int(self._index.offset[sample]))
                original = file.read(length)
        except OSError as error:
            return f"cannot be compared: {path}: {error.strerror or error}"
        return self.compare(original, data)

    def compare(self, original: bytes, data: bytes) -> str | None:
        """Compare a sample's pixels; return their problem."""
        with self._lock:
            self.num_compared += 1
        if self._shrink is not None:
            original = smaller_copy(original, self._shrink) or original
        if original == data:
            return None
        try:
            same = _pixels(original) == _pixels(data)
        except Exception as error:  # Pillow raises almost anything on a damaged image
            return f"differs from the source's bytes, and Pillow cannot decode both: {error}"
        return None if same else "its pixels differ from the source's"


def _shrink_of(pack: pack_format.Pack) -> Shrink | None:
    """Return how the pack's smaller copies were made; None where it has none."""
    settings, where = pack.about["settings"], os.path.join(pack.folder, pack_format.PACK_FILE)
    if settings.get("max_side") is None:
        return None
    values = {name: settings.get(name) for name in ("max_side", "quality", "subsampling")}
    try:
        shrink = Shrink(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: 'settings': {values} describe no smaller copies: the pack is damaged: pack "
            "again"
        ) from error
    if settings.get("encoder") != shrink.encoder:
        raise ValueError(
            f"{where}: smaller copies made by {settings.get('encoder')} can be compared with their "
            f"source only by the same versions, and these are {shrink.encoder}: install those, or "
            "verify the pack by itself"
        )
    return shrink


def _pixels(data: bytes) -> tuple[str, tuple[int, int], bytes]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.mode, image.size, image.tobytes()


@dataclass
class _ShardCheck:
    """Checks shards, several at once in threads."""

    pack: pack_format.Pack
    reference: _Reference | None
    bar: Any
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # Samples that were left out also had keys, which the others' keys had to differ from.
        left_out = Names.from_strings(_left_out(self.pack))
        self.members = pack_format.MemberNames(Names.concatenate([self.pack.names, left_out]))

    def run(self, shard: int) -> list[str]:
        """Return the problems of one shard."""
        path = os.path.join(self.pack.folder, pack_format.shard_file(shard))
        problems: list[str] = []
        try:
            with open(path, "rb", buffering=_READ_BYTES) as file:
                for problem in itertools.islice(self._problems(shard, path, file), _MAX_PROBLEMS):
                    problems.append(problem)
            if len(problems) >= _MAX_PROBLEMS:
                problems.append(f"{path}: {_MAX_PROBLEMS} problems; the rest is not checked")
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
        return problems

    def compare_block(self, samples: npt.NDArray[np.int64]) -> list[str]:
        """Return the problems of samples whose originals are in one python block."""
        assert self.reference is not None
        problems = []
        try:
            for name, original in self.reference.images_of(samples):
                if (row := self._row_of.get(name)) is not None and not self.stop.is_set():
                    problem = self.reference.compare(original, self._read(row))
                    problems += [f"{name}: {problem}"] if problem else []
        except (DataError, OSError) as error:
            problems.append(f"cannot be compared: {error}")
        return problems

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.pack.names)}

    def _read(self, sample: int) -> bytes:
        row = self.pack.rows[sample]
        path = os.path.join(self.pack.folder, pack_format.shard_file(int(row["shard"])))
        with open(path, "rb", buffering=0) as file:
            file.seek(int(row["offset"]))
            return file.read(int(row["length"]))

    def _problems(self, shard: int, path: str, file: BinaryIO) -> Iterator[str]:
        size = os.fstat(file.fileno()).st_size
        expected = int(self.pack.shard_bytes[shard])
        if size != expected:
            yield f"{path}: expected {expected} bytes, got {size}"
        first, end = np.searchsorted(self.pack.rows["shard"], [shard, shard + 1])
        crc, position = 0, 0
        for sample in range(int(first), int(end)):
            if self.stop.is_set():
                return
            expected_parts = self._parts(sample)
            where = f"{path} offset {position}: sample {sample} ({self.pack.names[sample]})"
            if int(self.pack.rows[sample]["offset"]) != position + len(expected_parts[0][1]):
                yield f"{where}: the index places its image at {self.pack.rows[sample]['offset']}"
                return
            for what, content, length in expected_parts:
                got = file.read(length)
                crc = native.crc32c(got, crc)
                if len(got) != length:
                    yield f"{where}: {what}: the shard ends {length - len(got)} bytes too early"
                    return
                problem = self._compare(sample, what, content, got)
                if problem:
                    yield f"{where}: {problem}"
                position += length
            with self.lock:
                self.bar.update(1)
        tail = file.read()
        if tail != pack_format.END_OF_SHARD:
            yield f"{path} offset {position}: expected 1024 zero bytes and the end, got {len(tail)}"
        crc = native.crc32c(tail, crc)
        promised = self.pack.about["shards"][shard].get("crc32c")
        if f"{crc:08x}" != promised:
            yield f"{path}: CRC-32C is {crc:08x}, pack.json says {promised}"

    def _parts(self, sample: int) -> list[tuple[str, bytes, int]]:
        """Return (what, content, length) of a sample's parts; an image's content is empty."""
        row, name = self.pack.rows[sample], self.pack.names[sample]
        label, length, flags = (int(row[key]) for key in ("label", "length", "flags"))
        header, behind = around_image(self.members, name, label, length, flags)
        return [
            ("tar header of the image", header, len(header)),
            ("image", b"", length),
            ("padding and label", behind, len(behind)),
        ]

    def _compare(self, sample: int, what: str, content: bytes, got: bytes) -> str | None:
        if what != "image":
            if got == content:
                return None
            at = next(i for i, (a, b) in enumerate(zip(got, content, strict=True)) if a != b)
            return f"{what}: byte {at} is {got[at]:#04x}, expected {content[at]:#04x}"
        row = self.pack.rows[sample]
        crc = native.crc32c(got)
        if crc != row["crc32c"]:
            return f"image: CRC-32C is {crc:08x}, the index says {int(row['crc32c']):08x}"
        if row["flags"] & pack_format.FLAG_CANONICAL:
            header = native.read_header(got)
            size = (header.width, header.height) if header else None
            if size != (row["width"], row["height"]):
                expected = f"{row['width']} x {row['height']}"
                return f"image: its header says {size}, the index {expected} pixels"
            if header and not self._has_tables_of_pack(got, header.num_components):
                return f"image: its Huffman tables are not those in {pack_format.PACK_FILE}"
        if self.reference is not None:
            return self.reference.check(self.pack.names[sample], int(row["label"]), got)
        return None

    def _has_tables_of_pack(self, image: bytes, num_components: int) -> bool:
        tables = self.pack.tables
        if tables is not None and num_components == 1:
            tables = tables[: len(tables) // 2]  # the first two of the four
        return tables is None or _huffman_tables(image) == tables
