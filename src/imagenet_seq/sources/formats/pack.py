"""The pack format: packs as a source, and the names, headers and rows that writer and check share.

docs/format.md describes every byte. All content is untrusted: what is inconsistent raises a
`DataError` that says what was expected, what came, and where.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.errors import DataError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Source
from imagenet_seq.sources.place import SPLITS, Found, Place

LOOKS_FOR = "a pack: a folder with pack.json, made by 'imagenet-seq pack'"

FORMAT = "imagenet-seq pack"
FORMAT_VERSION = 1
PACK_FILE = "pack.json"
INDEX_FILE = "index.npy"
NAMES_FILE = "names.npy"
NAMES_BEGIN_FILE = "names_begin.npy"
FAILURES_FILE = "failures.json"
PARTIAL_SUFFIX = ".partial"
"""A pack is made in DESTINATION.partial and renamed when it is whole."""

SETTINGS_FILE = "settings.json"
"""In DESTINATION.partial: what is being packed, and how."""

RUN_VERIFY = "run 'imagenet-seq verify' on the pack, and pack again if it is damaged"

FLAG_CLEAN = 1
"""Decoded in full without any anomaly: IMSEQ_SAMPLE_CLEAN of core/imagenet_seq.h."""

FLAG_CANONICAL = 2
"""In canonical form; otherwise the bytes are the source's own."""

FLAG_DAMAGED = 4
"""Pillow could not decode it; kept because the user said so (--on-error keep)."""

FLAG_SHRUNK = 8
"""A smaller copy: encoded anew, so its pixels are not those of the source."""

ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i8"),
        ("shard", "<i4"),
        ("label", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("crc32c", "<u4"),
        ("flags", "u1"),
        ("reserved", "u1", (3,)),
    ]
)
"""One sample in index.npy; docs/format.md says what each field means."""


def shard_file(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:06d}.tar"


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """The tables of a pack, checked as far as that is cheap.

    Attributes:
        folder: the pack.
        about: the content of pack.json.
        rows: one `ROW` for each sample, memory-mapped.
        names: the samples' names in the source, memory-mapped.
        classes: class names; a label is a place in them.
        shard_bytes: size of each shard.
        tables: the Huffman tables of all images in canonical form; None: each has its own.
        split: the split that pack.json names; None: it names none.
    """

    folder: str
    about: dict[str, Any]
    rows: npt.NDArray[np.void]
    names: Names
    classes: tuple[str, ...]
    shard_bytes: npt.NDArray[np.int64]
    tables: bytes | None
    split: str | None


def find(place: Place) -> Found | None:
    """Recognise a pack."""
    if not place.is_folder or PACK_FILE not in place.files:
        return None
    return Found("pack", f"a pack ({PACK_FILE})", lambda _: open_pack(place.path, place.split))


def open_pack(folder: str | os.PathLike[str], split: str | None = None) -> Source:
    """Open the pack in `folder` without reading any image.

    1.28 million samples take about 0.1 s: columns are memory-mapped, and each is checked once.

    Raises:
        ValueError: where it names another split than `split`.
        DataError, OSError: as `read_pack`.
    """
    pack = read_pack(folder)
    known_id = _field(pack.about, "index_id", str, pack.folder)
    index = make_index(
        pack.folder, pack.rows, pack.names, pack.classes, len(pack.shard_bytes), known_id
    )
    index.validate(os.path.join(pack.folder, INDEX_FILE))
    source = Source("pack", index, permuted=True, split=pack.split)
    source.agreed_split(split)
    return source


def make_index(
    folder: str,
    rows: npt.NDArray[np.void],
    names: Names,
    classes: Sequence[str],
    num_shards: int,
    known_id: str | None = None,
) -> Index:
    """Return a pack's rows as an index, whose columns are views."""
    same = ("offset", "length", "label", "width", "height", "flags")
    return Index(
        file=rows["shard"],
        checksum=rows["crc32c"],
        **{column: rows[column] for column in same},
        name=names,
        root=folder,
        files=Names.from_strings(map(shard_file, range(num_shards))),
        classes=tuple(classes),
        known_id=known_id,
    )


def read_pack(folder: str | os.PathLike[str], check_shards: bool = True) -> Pack:
    """Read a pack's tables; `check_shards`: compare the sizes of the shards with pack.json.

    Raises:
        DataError: where the pack is of another version, incomplete or inconsistent.
        OSError: where a file can't be read.
    """
    folder = os.fspath(folder)
    about = _read_about(folder)
    classes = _field(about, "classes", list, folder)
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise DataError(f"{folder}/{PACK_FILE}: 'classes': expected names that do not repeat")
    _check_members(about, folder)
    try:
        tables = parse_tables(about["huffman_tables"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder}/{PACK_FILE}: 'huffman_tables': {error}; {RUN_VERIFY}") from error
    split = about.get("split")
    if split is not None and split not in SPLITS:
        where = f"{folder}/{PACK_FILE}: 'split'"
        raise DataError(f"{where}: expected one of {SPLITS}, got {split!r:.80}; {RUN_VERIFY}")
    num_samples = _field(about, "num_samples", int, folder)
    rows = _map_npy(folder, INDEX_FILE, ROW, num_samples)
    begin = _map_npy(folder, NAMES_BEGIN_FILE, np.dtype("<i8"), num_samples + 1)
    blob = _map_npy(folder, NAMES_FILE, np.dtype("u1"), int(begin[-1]))
    shard_bytes = _shard_sizes(folder, about, check_shards)
    _check_extents(folder, rows, shard_bytes)
    return Pack(folder, about, rows, Names(blob, begin), tuple(classes), shard_bytes, tables, split)


def read_failures(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read failures.json: objects with `name`, `reason` and `kept`; raises as `read_pack`."""
    path = os.path.join(os.fspath(folder), FAILURES_FILE)
    try:
        failures = _read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {RUN_VERIFY}") from None
    expected = {"name": str, "reason": str, "kept": bool}
    if not isinstance(failures, list):
        raise DataError(f"{path}: expected a list, got {failures!r:.80}; {RUN_VERIFY}")
    for failure in failures:
        types = {key: type(v) for key, v in failure.items()} if isinstance(failure, dict) else None
        if types != expected:
            wrong = f"expected objects with name, reason and kept, got {failure!r:.80}"
            raise DataError(f"{path}: {wrong}; {RUN_VERIFY}")
    return failures


def describe_tables(tables: bytes | None) -> dict[str, str] | None:
    """Return Huffman tables as pack.json has them."""
    if tables is None:
        return None
    return {"dht": tables.hex(), "crc32c": f"{native.crc32c(tables):08x}"}


def parse_tables(described: Any) -> bytes | None:
    """Return the Huffman tables that `describe_tables` described.

    Raises:
        ValueError: where `described` is malformed or damaged.
    """
    if described is None:
        return None
    if not isinstance(described, dict) or not isinstance(described.get("dht"), str):
        raise ValueError(f"expected null or an object with dht and crc32c, got {described!r:.80}")
    tables = bytes.fromhex(described["dht"])
    crc = f"{native.crc32c(tables):08x}"
    if len(tables) != native.TABLES_BYTES or described.get("crc32c") != crc:
        raise ValueError(
            f"expected {native.TABLES_BYTES} bytes with CRC-32C {described.get('crc32c')!r:.20}, "
            f"got {len(tables)} with {crc!r}"
        )
    return tables


def refuse_unfinished(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that an unfinished run works in, or that it would make.

    Raises:
        DataError: saying how to finish it.
    """
    partial = os.path.abspath(os.path.expanduser(os.fspath(folder)))
    if not partial.endswith(PARTIAL_SUFFIX):
        partial += PARTIAL_SUFFIX
        if os.path.exists(folder):
            return
    if os.path.exists(os.path.join(partial, SETTINGS_FILE)):
        raise DataError(
            f"{partial}: unfinished pack: its packing was interrupted or is still running; "
            "run the same 'imagenet-seq pack' command again to finish it"
        )


def _read_about(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, PACK_FILE)
    try:
        about = _read_json(path)
    except FileNotFoundError:
        raise DataError(f"{folder}: not a pack: it has no {PACK_FILE}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise DataError(f"{path}: expected an object whose 'format' is {FORMAT!r}")
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: this pack has format version {version!r}, this program reads version "
            f"{FORMAT_VERSION}: update imagenet-seq, or pack again"
        )
    return about


def _read_json(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:  # the latter: nested without end
        raise DataError(f"{path}: expected JSON: {error}; {RUN_VERIFY}") from error


def _check_members(about: dict[str, Any], folder: str) -> None:
    """Check the types of the members that packing and verifying use."""
    for key in ("settings", "source", "counts", "files"):
        _field(about, key, dict, folder)
    for key in ("canonical", "shrunk", "failures", "skipped"):
        _field(about["counts"], key, int, folder)
    for key in ("num_samples", "bytes"):
        _field(about["source"], key, int, folder)
    _field(about["source"], "index_id", str, folder)
    _field(about, "image_bytes", int, folder)


def _field(about: dict[str, Any], key: str, kind: type, folder: str) -> Any:
    value: Any = about.get(key)
    valid = isinstance(value, kind) and not isinstance(value, bool)
    if not valid or (kind is int and not 0 <= value < 2**63):
        expected = "an integer from 0 to 2**63 - 1" if kind is int else f"a {kind.__name__}"
        raise DataError(
            f"{folder}/{PACK_FILE}: '{key}': expected {expected}, got {value!r:.80}; {RUN_VERIFY}"
        )
    return value


def _map_npy(folder: str, name: str, dtype: np.dtype[Any], size: int) -> npt.NDArray[Any]:
    path = os.path.join(folder, name)
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {RUN_VERIFY}") from None
    except OSError:
        raise
    except Exception as error:  # NumPy raises almost anything on a damaged header
        raise DataError(f"{path}: damaged or truncated: {error}; {RUN_VERIFY}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (size,):
        got = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "no array"
        raise DataError(f"{path}: expected shape ({size},) of {dtype}, got {got}; {RUN_VERIFY}")
    # A plain array over the same memory: views of np.memmap cost time.
    return array.view(np.ndarray)


def _shard_sizes(folder: str, about: dict[str, Any], check: bool) -> npt.NDArray[np.int64]:
    """Return the shards' sizes in pack.json; `check`: compare them with the files."""
    sizes = []
    for shard, entry in enumerate(_field(about, "shards", list, folder)):
        if not isinstance(entry, dict) or entry.get("file") != shard_file(shard):
            raise DataError(
                f"{folder}/{PACK_FILE}: 'shards' [{shard}]: expected file {shard_file(shard)!r}, "
                f"got {entry!r:.80}; {RUN_VERIFY}"
            )
        expected, path = _field(entry, "bytes", int, folder), os.path.join(folder, entry["file"])
        sizes.append(expected)
        try:
            got = os.path.getsize(path) if check else expected
        except FileNotFoundError:
            raise DataError(f"{path}: shard is missing; {RUN_VERIFY}") from None
        if got != expected:
            raise DataError(f"{path}: expected {expected} bytes, got {got}; {RUN_VERIFY}")
    return np.array(sizes, np.int64)


def _check_extents(
    folder: str, rows: npt.NDArray[np.void], shard_bytes: npt.NDArray[np.int64]
) -> None:
    """Check that every sample lies inside its shard."""
    shard, offset, length = rows["shard"], rows["offset"], rows["length"]
    wrong = (shard < 0) | (shard >= len(shard_bytes)) | (offset < 0) | (length < 0)
    if not wrong.any():
        wrong = length > shard_bytes[shard] - offset
    if wrong.any():
        sample = int(wrong.argmax())
        raise DataError(
            f"{folder}/{INDEX_FILE}: sample {sample}: bytes {offset[sample]} to "
            f"{int(offset[sample]) + int(length[sample])} of shard {shard[sample]} lie outside the "
            f"{len(shard_bytes)} shards; {RUN_VERIFY}"
        )


# ---- members of the shards -----------------------------------------------------------------------

_BLOCK_BYTES = 512

_MTIME = 315532800
"""1 January 1980 UTC: every archive format can hold it, and tar does not warn of it."""

MAX_IMAGE_BYTES = 8**11 - 1
"""The largest number that the size field of a tar header can hold."""

END_OF_SHARD = bytes(2 * _BLOCK_BYTES)
_UNSAFE = re.compile("[%\x00-\x1f\x7f\udc80-\udcff]")
_UNSAFE_OR_DOT = re.compile("[.%\x00-\x1f\x7f\udc80-\udcff]")


def _escape(match: re.Match[str]) -> str:
    # os.fsdecode maps a byte that is not UTF-8 to a lone surrogate with the byte as its low byte.
    return f"%{ord(match.group()) & 0xFF:02X}"


def _split_extension(name: str) -> tuple[str, str]:
    """Split "folder/base.ext"; a leading dot of the base name begins no extension."""
    stem, dot, extension = name.rpartition(".")
    if not dot or "/" in extension or not stem or stem.endswith("/"):
        return name, ""
    return stem, extension


class MemberNames:
    """The names of a sample's members in a shard: `<key>.<extension>` and `<key>.cls`.

    The key is the sample's name without its extension, escaped so that it ends at the first dot of
    the base name (webdataset's rule). Samples that differ in the extension alone keep it in the
    key, so that no two samples have the same key. `names` are those of all samples of the pack.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._shared_stems = _repeated(lambda: (_split_extension(name)[0] for name in names))

    def key(self, name: str) -> str:
        """Return the key of a sample."""
        stem, extension = _split_extension(name)
        folder, slash, base = stem.rpartition("/")
        key = _UNSAFE.sub(_escape, folder) + slash + _UNSAFE_OR_DOT.sub(_escape, base)
        if stem in self._shared_stems:
            # No escape looks like "%_", so this key differs from that of any other stem.
            key += "%_" + _UNSAFE_OR_DOT.sub(_escape, extension)
        if key.startswith("__"):
            # webdataset skips members called __name__ as metadata.
            key = "%5F" + key[1:]
        return key

    def image(self, name: str, canonical: bool) -> str:
        """Return the member name of a sample's image."""
        return f"{self.key(name)}.{'jpg' if canonical else _own_extension(name)}"

    def label(self, name: str) -> str:
        """Return the member name of a sample's label."""
        return f"{self.key(name)}.cls"


def _repeated(strings: Callable[[], Iterable[str]]) -> frozenset[str]:
    """Return the strings that occur more than once, with only their hashes in memory."""
    hashes = np.fromiter(map(hash, strings()), np.int64)
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return frozenset()
    counts = Counter(string for string in strings() if hash(string) in suspects)
    return frozenset(string for string, count in counts.items() if count > 1)


def _own_extension(name: str) -> str:
    extension = _split_extension(name)[1].lower()
    usable = extension.isascii() and extension.isalnum() and extension != "cls"
    return extension if usable else "bin"


def label_content(label: int) -> bytes:
    """Return the content of a `.cls` member: the label as decimal text."""
    return b"%d" % label


def padding(size: int) -> bytes:
    """Return the zeros that fill a member of `size` bytes up to a whole tar block."""
    return bytes(-size % _BLOCK_BYTES)


def shard_bytes(lengths: npt.NDArray[np.int64]) -> int:
    """Return the size of a shard of images of these lengths, whose names need no pax header."""
    padded = -(-lengths // _BLOCK_BYTES) * _BLOCK_BYTES
    return int(padded.sum()) + 3 * _BLOCK_BYTES * len(lengths) + len(END_OF_SHARD)


def member_header(name: str, size: int) -> bytes:
    """Return the tar header of a regular file; a pure function, so shards are reproducible.

    POSIX ustar (IEEE Std 1003.1, pax, "ustar Interchange Format") where the name is ASCII and fits
    its fields; otherwise preceded by a pax extended header that holds the name in UTF-8.
    """
    encoded = name.encode("utf-8")
    if name.isascii() and (fields := _ustar_name(encoded)):
        return _ustar_header(*fields, size, b"0")
    record = _pax_record(encoded)
    stand_in = re.sub(rb"[^ -~]", b"_", encoded)[-100:]
    return (
        _ustar_header(b"././@PaxHeader", b"", len(record), b"x")
        + record
        + padding(len(record))
        + _ustar_header(stand_in, b"", size, b"0")
    )


def _ustar_name(name: bytes) -> tuple[bytes, bytes] | None:
    """Split a name into the 100 and 155 bytes of a ustar header, or None where it does not fit."""
    if len(name) <= 100:
        return name, b""
    slash = name.find(b"/", len(name) - 101)
    if 0 < slash <= 155 and slash + 1 < len(name):
        return name[slash + 1 :], name[:slash]
    return None


def _pax_record(path: bytes) -> bytes:
    """Return a pax record, "<length> path=<path>"; the length counts its own digits too."""
    rest = b" path=" + path + b"\n"
    size = len(rest)
    while len(record := b"%d" % size + rest) != size:
        size = len(record)
    return record


_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")


def _ustar_header(name: bytes, prefix: bytes, size: int, kind: bytes) -> bytes:
    header = _HEADER.pack(
        name, b"0000644", b"0000000", b"0000000", b"%011o" % size, b"%011o" % _MTIME, b" " * 8,
        kind, b"", b"ustar", b"00", b"", b"", b"0000000", b"0000000", prefix,
    )  # fmt: skip
    # The checksum is the sum of all bytes, with spaces in place of its own eight.
    return b"%b%06o\0 %b" % (header[:148], sum(header), header[156:])


class Encoded(NamedTuple):
    """An image as it is stored; `flags` and unknown sizes as in a row of the index."""

    data: memoryview
    width: int
    height: int
    crc32c: int
    flags: int


def encoded_from(data: memoryview, row: Any) -> Encoded:
    """Return the image whose bytes are `data` and whose other fields are those of `row`."""
    fields = (int(row[key]) for key in ("width", "height", "crc32c", "flags"))
    return Encoded(data, *fields)
