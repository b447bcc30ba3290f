"""Finds the image and the label in a value of an LMDB without deserialising it.

The values of ImageNet LMDBs are pairs, (image, label) or [image, label], serialised by msgpack,
pickle or pyarrow. The image is a byte string or a one-dimensional uint8 array, the label an integer
of Python or NumPy. Each parser accepts that and nothing else. It executes nothing, and creates only
numbers, short byte strings and places in the value. It reads headers, never the image, so that the
size of a value hardly matters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from imagenet_seq.sources.formats.lmdb_objects import (
    Array,
    ArrayType,
    ByteString,
    ValueFormError,
    describe,
)
from imagenet_seq.sources.formats.lmdb_pickle import parse_pickle
from imagenet_seq.sources.formats.lmdb_pyarrow import parse_pyarrow

ACCEPTED = (
    "msgpack, a pickle or pyarrow.serialize of (image, label) or [image, label], the image a byte "
    "string or a one-dimensional uint8 array, the label an integer"
)


class Pair(NamedTuple):
    """Where an image lies in a value, and its label."""

    offset: int
    length: int
    label: int
    stored: int  # how the bytes are stored: RAW, or a form that `stored_bytes` decodes


def find_pair(value: memoryview) -> Pair:
    """Find the image and the label in a value, or raise a ValueFormError that says what it is."""
    if not len(value):
        raise ValueFormError("no bytes")
    parse = _PARSERS.get(value[0])
    if parse is None:
        raise ValueFormError(f"none of these: it begins with {bytes(value[:16])!r}")
    try:
        found = parse(value)
    except (LookupError, struct.error, OverflowError):  # the last: a place beyond 63 bits
        raise ValueFormError("cut short or damaged") from None
    is_sequence = type(found) in (list, tuple)
    if not is_sequence or len(found) != 2:
        raise ValueFormError(f"not two things but {len(found) if is_sequence else describe(found)}")
    image, label = found
    if isinstance(image, Array):
        image = image.content()
    if not isinstance(image, ByteString):
        raise ValueFormError(f"an image that is {describe(image)}")
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueFormError(f"a label that is {describe(label)}")
    if image.end > len(value):
        raise ValueFormError("cut short or damaged")
    return Pair(image.begin, image.end - image.begin, label, image.stored)


# ---- msgpack -------------------------------------------------------------------------------------

_MAX_DEPTH = 4
_MSGPACK_NUMBERS = {
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_MSGPACK_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
"""bin and str; writers without use_bin_type store byte strings as str."""
_MSGPACK_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def _parse_msgpack(value: memoryview) -> Any:
    found, end = _msgpack_object(value, 0, 0)
    if end != len(value):
        raise ValueFormError(f"msgpack that ends {len(value) - end} bytes before its value does")
    return found


def _msgpack_object(value: memoryview, at: int, depth: int) -> tuple[Any, int]:
    """Return the object that begins at `at`, and where it ends."""
    head = value[at]
    at += 1
    if head < 0x80:
        return head, at
    if head >= 0xE0:
        return head - 0x100, at
    if 0x80 <= head < 0xA0:
        return _msgpack_container(value, at, depth, head)
    if 0xA0 <= head < 0xC0:
        return ByteString(at, at + head - 0xA0), at + head - 0xA0
    if head in _MSGPACK_CONSTANTS:
        return _MSGPACK_CONSTANTS[head], at
    form = _MSGPACK_NUMBERS.get(head) or _MSGPACK_BYTES.get(head)
    if form is None:
        raise ValueFormError(f"a msgpack object of kind {head:#x} at byte {at - 1}")
    (number,) = struct.unpack_from(form, value, at)
    at += struct.calcsize(form)
    if head in _MSGPACK_NUMBERS:
        return number, at
    return ByteString(at, at + number), at + number


def _msgpack_container(value: memoryview, at: int, depth: int, head: int) -> tuple[Any, int]:
    if depth == _MAX_DEPTH:
        raise ValueFormError("msgpack nested deeper than a pair is")
    is_map = head < 0x90
    found = []
    for _ in range((head & 0xF) * (2 if is_map else 1)):
        element, at = _msgpack_object(value, at, depth + 1)
        found.append(element)
    if not is_map:
        return found, at
    keys = [_short(value, key) for key in found[::2]]
    return _numpy_object(value, dict(zip(keys, found[1::2], strict=True))), at


def _short(value: memoryview, found: Any) -> bytes:
    """Return a byte string that must be short, such as a key."""
    if not isinstance(found, ByteString) or found.end - found.begin > 64 or found.end > len(value):
        raise ValueFormError(f"{describe(found)} where a short byte string is expected")
    return bytes(value[found.begin : found.end])


def _numpy_object(value: memoryview, entries: dict[bytes, Any]) -> Array | int:
    """Return an array or a number of msgpack_numpy; up to its release 0.3.6 it has no kind."""
    if entries.keys() - {b"nd", b"type", b"kind", b"shape", b"data"}:
        raise ValueFormError(f"a dictionary with the keys {sorted(entries)!r:.60}")
    if b"kind" in entries and _short(value, entries[b"kind"]):
        raise ValueFormError("an array of objects or structures")
    dtype = ArrayType(_short(value, entries.get(b"type")).decode("latin-1"))
    if entries.get(b"nd") is True:
        return Array(entries.get(b"shape"), dtype, entries.get(b"data"))
    return dtype.integer(_short(value, entries.get(b"data")))


_PARSERS: dict[int, Callable[[memoryview], Any]] = {
    0x92: _parse_msgpack,
    **dict.fromkeys(b"\x80(]", parse_pickle),
    **dict.fromkeys((0, 1), parse_pyarrow),
}
"""By the first byte: a list of two; a pickle's protocol, mark or list; a count of tensors."""
