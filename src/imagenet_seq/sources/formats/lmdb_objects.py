"""What parsers of LMDB values find: byte strings, text and NumPy arrays, as places in the value."""

from __future__ import annotations

import codecs
from typing import Any, NamedTuple

RAW = 0
UTF8 = 1
"""Text in UTF-8, one character for each byte: pickles of protocol 1 and 2 by Python 3."""
ESCAPED_TEXT = 2
"""Text, some characters written as \\u0000: pickles of protocol 0 by Python 3."""
ESCAPED_BYTES = 3
"""A string literal of Python 2 without its quotes: pickles of protocol 0 by Python 2."""


class ValueFormError(ValueError):
    """A value is not a pair of an image and a label, or is damaged."""


class ByteString(NamedTuple):
    """Bytes `begin` to `end` of the value; `stored` says how they are stored."""

    begin: int
    end: int
    stored: int = RAW


class Text(NamedTuple):
    """Text in bytes `begin` to `end` of the value; `stored` says how it is stored."""

    begin: int
    end: int
    stored: int


class ArrayType:
    """A NumPy dtype: `code` is its kind and size, such as "u1"; `order` its byte order."""

    def __init__(self, code: str) -> None:
        self.order, self.code = (code[0], code[1:]) if code[:1] in "<>|=" else ("=", code)

    def integer(self, content: bytes) -> int:
        """Read a scalar, which has to be an integer."""
        if self.code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise ValueFormError(f"a number of type {self.code!r:.20}")
        if len(content) != int(self.code[1]):
            raise ValueFormError(f"a number of type {self.code} in {len(content)} bytes")
        order = "big" if self.order == ">" else "little"
        return int.from_bytes(content, order, signed=self.code[0] == "i")  # type: ignore[arg-type]


class Array:
    """A NumPy array, which a pickle fills after creating it; `content` checks its attributes."""

    def __init__(self, shape: Any = None, dtype: Any = None, data: Any = None) -> None:
        self.shape, self.dtype, self.data = shape, dtype, data

    def content(self) -> ByteString:
        """Return its bytes; it has to be a one-dimensional uint8 array."""
        if not isinstance(self.dtype, ArrayType) or self.dtype.code != "u1":
            raise ValueFormError("an image that is an array of another type than uint8")
        shape = self.shape if isinstance(self.shape, (list, tuple)) else ()
        if len(shape) != 1 or not isinstance(shape[0], int):
            raise ValueFormError(
                f"an image that is an array of {len(shape)} dimensions: decoded pixels, not a file"
            )
        if not isinstance(self.data, ByteString):
            raise ValueFormError("an image that is an array without its bytes")
        num_bytes = self.data.end - self.data.begin
        if self.data.stored == RAW and shape[0] != num_bytes:
            raise ValueFormError(f"an array of {shape[0]} bytes in {num_bytes}")
        return self.data


def stored_bytes(content: memoryview, stored: int) -> bytes:
    """Return the bytes that `content`, stored as `stored` says, stands for."""
    try:
        if stored == UTF8:
            return str(content, "utf-8").encode("latin-1")
        if stored == ESCAPED_TEXT:
            return str(content, "raw-unicode-escape").encode("latin-1")
        if stored == ESCAPED_BYTES:
            return bytes(codecs.escape_decode(bytes(content))[0])
        return bytes(content)
    except ValueError as error:
        raise ValueFormError(f"a byte string that can't be read: {error}") from None


def describe(found: Any) -> str:
    """Name an object in a message, in a few words whatever its size."""
    names = {
        ByteString: "a byte string", Text: "text", Array: "an array", dict: "a dictionary",
        list: "a list", tuple: "a tuple", int: "an integer",
    }  # fmt: skip
    return names.get(type(found)) or f"{found!r:.30}"  # a repr of nested tuples may be endless
