"""A strict reader of tar archives: which members there are, and where in the file their bytes lie.

Reads ustar, GNU (long names, sizes in base 256) and PAX, as POSIX.1-2024 (pax, "ustar Interchange
Format") and GNU tar's manual ("Basic Tar Format") describe them. Python's tarfile takes ten times
as long for a member, seeks, and does not notice that an archive was cut between two members.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from imagenet_seq.errors import DataError
from imagenet_seq.sources.images import is_image_name
from imagenet_seq.sources.scan import Problems

_BLOCK = 512
_ZEROS = bytes(_BLOCK)

_MAX_EXTENDED_BYTES = 1 << 20
"""Long names and PAX headers have some hundred bytes; a wrong size must not allocate memory."""

_LOOK_BYTES = 1 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ\0": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\x04\x22\x4d\x18": "lz4 -d",
}
_HERE = re.compile(r"(\./)+")
_NO_FILES = {
    ord("1"): "a hard link", ord("2"): "a symbolic link", ord("3"): "a character device",
    ord("4"): "a block device", ord("6"): "a FIFO",
}  # fmt: skip
_REGULAR = frozenset(b"07\0")
_FOLDERS_AND_LABELS = frozenset(b"5DV")
_WITHOUT_DATA = frozenset(b"123456V")
_EXTENDED = frozenset(b"xXgLK")


class Readable(Protocol):
    """What holds an archive: a `FileStream`, or one of the classes below."""

    path: str
    size: int

    def take(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes at `offset`; DataError if the file ends before them."""


class RandomAccess:
    """A file of which only a few bytes are read, here and there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by __exit__)
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> RandomAccess:
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def take(self, offset: int, length: int) -> memoryview:
        """Read `length` bytes at `offset`."""
        found = os.pread(self._file.fileno(), length, offset)
        if len(found) < length:
            raise DataError(
                f"{self.path}: expected {length} bytes at offset {offset}, got {len(found)}: it is "
                "truncated or damaged"
            )
        return memoryview(found)


class InMemory:
    """An archive in memory; `path` is the file that it was decompressed from, for messages."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.size, self._data = path, len(data), memoryview(data)

    def take(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes at `offset`."""
        return self._data[offset : offset + length]


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: as in the archive (os.fsdecode), without "./" in front.
        offset: where its bytes begin in the file, also if the archive lies in another one.
        length: its bytes.
    """

    name: str
    offset: int
    length: int

    @property
    def is_image(self) -> bool:
        """Whether torchvision's ImageFolder would take it for an image, by its extension."""
        return is_image_name(self.name)

    @property
    def leads_outside(self) -> bool:
        """Whether extracting it would write outside the destination folder."""
        name = self.name
        return name.startswith("/") or (".." in name and ".." in name.split("/"))


def members(
    data: Readable, problems: Problems, remarks: list[str], within: Member | None = None
) -> Iterator[Member]:
    """Yield the files of an archive in their order, reading headers only; about 5 us each.

    Folders are skipped. Links and devices, which have no bytes of their own, are reported.

    Args:
        data: holds the archive.
        problems: gets members that are not files, and bytes behind the archive's end.
        remarks: gets a line if the archive may be incomplete.
        within: the member that is the archive, if it lies in another one.

    Raises:
        DataError: if the archive is truncated, damaged, or of a kind that has to be converted.
    """
    archive, begin, end = data.path, 0, data.size
    if within is not None:
        archive = f"{data.path}: {within.name}"
        begin, end = within.offset, within.offset + within.length
    for kind, member in _headers(data, archive, begin, end, problems, remarks):
        if kind in _REGULAR:
            if not member.name.endswith("/"):  # which marks a folder in old archives
                yield member
            continue
        where = f"{archive}: member {member.name!r} at offset {member.offset}"
        if kind in _NO_FILES:
            problems.report(f"{where}: expected a file, got {_NO_FILES[kind]}")
        elif kind not in _FOLDERS_AND_LABELS:
            raise DataError(
                f"{where}: expected a plain file, got type {chr(kind)!r} (sparse, or part of a "
                "multi-volume archive): make it again without such options"
            )


def first_members(path: str, count: int) -> list[Member]:
    """Return the first files of an archive, or those before its first damage.

    Raises:
        DataError: if it is no archive, or damaged before the first file.
    """
    found: list[Member] = []
    with RandomAccess(path) as data:
        if not any(data.take(0, min(_BLOCK, data.size))):
            return []  # an empty archive; or gigabytes of zeros, all of which `members` would read
        try:
            for member in islice(members(data, Problems("skip"), []), count):
                found.append(member)
        except DataError:
            if not found:
                raise
    return found


# ---- headers -------------------------------------------------------------------------------------


def _headers(
    data: Readable, archive: str, begin: int, end: int, problems: Problems, remarks: list[str]
) -> Iterator[tuple[int, Member]]:
    """Yield members of all kinds, as (kind, member); extended headers have been applied to them."""
    ahead: dict[bytes, bytes] = {}  # fields of the next member
    always: dict[bytes, bytes] = {}  # fields of all members that follow
    position = begin
    while position < end:
        header = bytes(data.take(position, min(_BLOCK, end - position)))
        if header == _ZEROS:
            _check_rest(data, archive, position + _BLOCK, end, problems)
            return
        if not _is_header(header):
            raise DataError(f"{archive}: {_no_header(header, position)}")
        kind, name, length = header[156], _name(header), _number(header[124:136])
        if (ahead or always) and kind not in _EXTENDED:
            name, length = _overridden({**always, **ahead}, name, length)
            ahead = {}
        if name.startswith("./"):
            name = _HERE.sub("", name, count=1)
        offset = position + _BLOCK
        if kind in _WITHOUT_DATA:
            length = 0  # some writers give a link the size of what it leads to
        if length is None or offset + length > end:
            raise DataError(f"{archive}: {_wrong_size(name, header, offset, length, end)}")
        if kind in _EXTENDED:
            said = _extended(data, archive, kind, offset, length)
            (always if kind == ord("g") else ahead).update(said)
        else:
            yield kind, Member(name, offset, length)
        position = offset + -(-length // _BLOCK) * _BLOCK
    if position > end:
        raise DataError(
            f"{archive}: truncated: expected its last member to be padded to offset {position}, "
            f"got an end at {end}. Copy or download the archive again"
        )
    remarks.append(
        f"{archive}: ends without the mark of an archive's end: it may be truncated behind its "
        "last member"
    )


def _is_header(header: bytes) -> bool:
    """Compare a header with its checksum: the sum of its bytes, the checksum taken as spaces."""
    expected = _number(header[148:156])
    # Adler-32's lower half is 1 + the sum of the bytes mod 65521: a sum computed in C. The parts
    # are too short to reach the modulus.
    total = 8 * 32 - 3
    for part in (header[:148], header[156:400], header[400:]):
        total += zlib.adler32(part) & 0xFFFF
    if len(header) < _BLOCK or total == expected:
        return len(header) == _BLOCK
    # Some old tars added signed bytes.
    return total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]) == expected


def _no_header(header: bytes, position: int) -> str:
    if position == 0:
        for magic, command in _COMPRESSED.items():
            if header.startswith(magic):
                return f"is compressed: decompress it first ({command})"
        return "is no tar archive: expected a header at offset 0, got bytes of another kind"
    if len(header) < _BLOCK:
        return (
            f"truncated: expected a header of {_BLOCK} bytes at offset {position}, got "
            f"{len(header)}. Copy or download it again"
        )
    return (
        f"damaged: expected a member's header at offset {position}, got bytes whose checksum is "
        "wrong; or the member before lies about its size. Copy or download it again"
    )


def _wrong_size(name: str, header: bytes, offset: int, length: int | None, end: int) -> str:
    member = f"member {name!r} at offset {offset}"
    if length is None:
        return (
            f"damaged: {member}: expected a size, got {header[124:136]!r} in its header. Copy or "
            "download the archive again"
        )
    return (
        f"truncated: {member}: expected {length} bytes, got {end - offset}; or its header lies "
        "about its size. Copy or download the archive again"
    )


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return os.fsdecode(name)


def _number(field: bytes) -> int | None:
    """Read a number: octal digits, or GNU's 95 bits after a leading 1; None if it is neither."""
    if field[:1] >= b"\x80":
        negative = field[0] & 0x40
        return None if negative else int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return None
    return int(digits, 8)


def _extended(
    data: Readable, archive: str, kind: int, offset: int, length: int
) -> dict[bytes, bytes]:
    """Read the fields of an extended header, which concern members that follow."""
    if length > _MAX_EXTENDED_BYTES:
        raise DataError(
            f"{archive}: damaged: expected at most {_MAX_EXTENDED_BYTES} bytes in the extended "
            f"header at offset {offset}, got {length}. Copy or download it again"
        )
    said = bytes(data.take(offset, length))
    if kind == ord("L"):
        return {b"path": said.partition(b"\0")[0]}
    if kind == ord("K"):  # the target of a link
        return {}
    fields: dict[bytes, bytes] = {}
    said, begin = said.rstrip(b"\0"), 0
    while begin < len(said):
        digits = said[begin : begin + 20].partition(b" ")[0]
        end = begin + int(digits) if digits.isdigit() else 0
        keyword, equals, value = said[begin + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(said) or value[-1:] != b"\n":
            raise DataError(
                f"{archive}: damaged: expected lines '<length> <key>=<value>' in the PAX header at "
                f"offset {offset}, got {said[begin : begin + 40]!r}. Copy or download it again"
            )
        if keyword.startswith(b"GNU.sparse."):
            raise DataError(
                f"{archive}: the member behind the PAX header at offset {offset} is sparse: its "
                "bytes don't lie in one piece. Make the archive again without --sparse"
            )
        fields[keyword] = value[:-1]
        begin = end
    return fields


def _overridden(
    fields: dict[bytes, bytes], name: str, length: int | None
) -> tuple[str, int | None]:
    if b"path" in fields:
        name = os.fsdecode(fields[b"path"])
    if b"size" in fields:
        digits = fields[b"size"]
        length = int(digits) if digits.isdigit() and len(digits) < 20 else None
    return name, length


def _check_rest(data: Readable, archive: str, position: int, end: int, problems: Problems) -> None:
    """Report bytes other than zeros behind an archive's end: one of its blocks may be lost."""
    for begin in range(position, end, _LOOK_BYTES):
        rest = bytes(data.take(begin, min(_LOOK_BYTES, end - begin)))
        if rest.count(0) != len(rest):
            problems.report(
                f"{archive}: an empty block at offset {position - _BLOCK} ends the archive, but "
                f"{end - position} bytes follow that are not all zero: a block of it was lost, or "
                "archives were put one behind the other"
            )
            return
