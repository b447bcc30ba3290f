"""Finds the image and the label in a pair serialised by pyarrow.serialize of releases 0.8 to 11.

It wrote some counts; a stream of a schema and a batch of one row, in which a union holds the pair
as a list; and the arrays as tensors, each a message and its bytes (SerializedPyObject::WriteTo).

pyarrow could read these parts, but not safely from an untrusted file: it decompresses buffers of
any size (a value of 34 kB took 2.1 GB), builds schemas of a million columns, and calls extension
types that the program has registered. It also takes three times as long.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from imagenet_seq.sources.formats.lmdb_objects import (
    Array,
    ArrayType,
    ByteString,
    ValueFormError,
    describe,
)

_SCHEMA, _RECORD_BATCH, _TENSOR = 1, 3, 4
"""Kinds of messages: `MessageHeader` of Arrow's Message.fbs."""
_NULL, _INT, _BINARY, _LIST, _STRUCT, _UNION = 1, 2, 4, 12, 13, 14
"""Kinds of columns: `Type` of Arrow's Schema.fbs."""
_NUM_BUFFERS = {_NULL: 0, _INT: 2, _BINARY: 3, _LIST: 2, _STRUCT: 1, _UNION: 2}

_MAX_MESSAGE_BYTES, _MAX_COLUMNS = 1 << 14, 32
_MAX_STREAM_AT, _MAX_PADDING_BYTES = 72, 72
_U8, _U16, _I32, _U32, _I64 = map(struct.Struct, ("<B", "<H", "<i", "<I", "<q"))
_I64_PAIR, _U32_PAIR = map(struct.Struct, ("<qq", "<II"))
_FIRST_TENSOR = object()

_DAMAGED = "pyarrow's serialisation, damaged"
_OTHER_THING = "something else than an array, bytes or an integer"


class _Column(NamedTuple):
    """A column of the batch, and where its buffers lie behind the message: (offset, length) each.

    `bits` is the size of an integer. The schema alone gives columns without buffers.
    """

    kind: int
    children: tuple[_Column, ...]
    bits: int
    buffers: tuple[tuple[int, int], ...] = ()


def parse_pyarrow(value: memoryview) -> list[Any]:
    """Return the two elements of a pair, a byte string or an array as a place in the value.

    Raises:
        ValueFormError: if it is damaged or something else.
        LookupError, struct.error, OverflowError: if it is damaged.
    """
    places = range(8, _MAX_STREAM_AT, 8)
    begin = next((at for at in places if _U32.unpack_from(value, at)[0] >= 64), 0)
    schema, at = _message(value, begin)
    batch, body = _message(value, at)
    column, body_bytes = _batch_column(schema, batch)
    pair = _element(value, body, column, 0)
    if not isinstance(pair, _Column):
        raise ValueFormError(f"not two things but {describe(pair)}")
    first, end = (_number(value, body, pair.buffers[1], "<i", row) for row in (0, 1))
    if end - first != 2:
        raise ValueFormError(f"not two things but {end - first}")
    found = [_element(value, body, pair.children[0], row) for row in (first, first + 1)]
    return [_tensor(value, body + body_bytes) if e is _FIRST_TENSOR else e for e in found]


def _element(value: memoryview, body: int, union: _Column, row: int) -> Any:
    """Return an element of a union: an integer, bytes, the first tensor, or a list's column."""
    if union.kind != _UNION:
        raise ValueFormError(_DAMAGED)
    code = _number(value, body, union.buffers[-2], "<b", row)
    place = _number(value, body, union.buffers[-1], "<i", row)
    if not 0 <= code < len(union.children):
        raise ValueFormError(_DAMAGED)
    # All releases count the children, even where the schema gives them other codes.
    child = union.children[code]
    if child.kind == _INT and child.bits == 64:
        return _number(value, body, child.buffers[1], "<q", place)
    if child.kind == _INT and _number(value, body, child.buffers[1], "<i", place) == 0:
        return _FIRST_TENSOR
    if child.kind == _BINARY:
        begin, end = (_number(value, body, child.buffers[1], "<i", place + i) for i in (0, 1))
        offset, length = child.buffers[2]
        if not 0 <= begin <= end <= length:
            raise ValueFormError(_DAMAGED)
        return ByteString(body + offset + begin, body + offset + end)
    if child.kind == _STRUCT and len(child.children) == 1:  # releases before 0.14
        child = child.children[0]
    if child.kind == _LIST and place == 0:
        return child
    raise ValueFormError(_OTHER_THING)


def _number(value: memoryview, body: int, buffer: tuple[int, int], form: str, row: int) -> int:
    offset, length = buffer
    size = struct.calcsize(form)
    if not 0 <= row * size <= length - size:
        raise ValueFormError(_DAMAGED)
    return int(struct.unpack_from(form, value, body + offset + row * size)[0])


def _tensor(value: memoryview, after: int) -> Array:
    """Read the first message after the stream's end and the zeros that pad it."""
    places = range(after, after + _MAX_PADDING_BYTES, 4)
    message, body = _message(value, next((at for at in places if _begins(value, at)), after))
    tensor, body_bytes = _header(message, _TENSOR)
    is_integer = tensor.number(0, _U8) == _INT
    bits, is_signed = tensor.table(1).integer_type() if is_integer else (0, False)
    shape = [dim.number(0, _I64) for dim in tensor.tables(2)]
    offset, length = _I64_PAIR.unpack_from(message, tensor.place(4))
    if not 0 <= offset <= offset + length <= body_bytes:
        raise ValueFormError(_DAMAGED)
    dtype = ArrayType(f"{'i' if is_signed else 'u'}{bits // 8}")
    return Array(shape, dtype, ByteString(body + offset, body + offset + length))


def _begins(value: memoryview, at: int) -> bool:
    first, second = _U32_PAIR.unpack_from(value, at)
    return first != 0 and (first, second) != (0xFFFFFFFF, 0)  # the latter ends a stream


# ---- messages ------------------------------------------------------------------------------------


def _message(value: memoryview, at: int) -> tuple[bytes, int]:
    """Return the message at `at`, and where it ends; releases from 0.15 put a mark in front."""
    (size,) = _U32.unpack_from(value, at)
    at += 4
    if size == 0xFFFFFFFF:
        (size,) = _U32.unpack_from(value, at)
        at += 4
    message = bytes(value[at : at + size]) if size <= _MAX_MESSAGE_BYTES else b""
    if not message or len(message) != size:
        raise ValueFormError("pyarrow's serialisation, damaged or of an unknown release")
    return message, at + size


def _header(message: bytes, kind: int) -> tuple[_Table, int]:
    """Return the header of a message, which must be of `kind`, and the size of its body."""
    table = _Table.at(message, 0)
    if table.number(1, _U8) != kind:
        raise ValueFormError("pyarrow's serialisation with another message than expected")
    return table.table(2), table.number(3, _I64) if table.has(3) else 0


@functools.lru_cache(maxsize=64)  # many values of a database have the same messages
def _batch_column(schema: bytes, batch: bytes) -> tuple[_Column, int]:
    """Return the only column of a batch, and the size of its body."""
    table, body_bytes = _header(batch, _RECORD_BATCH)
    num_rows = table.number(0, _I64)
    if num_rows != 1:
        raise ValueFormError(f"pyarrow's serialisation of {num_rows} things")
    begin, num_buffers = table.vector(2)
    buffers = [_I64_PAIR.unpack_from(batch, begin + 16 * i) for i in range(num_buffers)]
    if not all(0 <= offset <= offset + length <= body_bytes for offset, length in buffers):
        raise ValueFormError(_DAMAGED)
    column, has_validity = _schema_column(schema)
    return _with_buffers(column, iter(buffers), has_validity), body_bytes


def _with_buffers(
    column: _Column, buffers: Iterator[tuple[int, int]], has_validity: bool
) -> _Column:
    """Give each column its buffers, which lie in the order of the columns, parents first."""
    num_buffers = _NUM_BUFFERS[column.kind] + (has_validity and column.kind == _UNION)
    own = tuple(itertools.islice(buffers, num_buffers))
    if len(own) != num_buffers:
        raise ValueFormError(_DAMAGED)
    children = tuple(_with_buffers(child, buffers, has_validity) for child in column.children)
    return column._replace(children=children, buffers=own)


@functools.lru_cache(maxsize=64)
def _schema_column(message: bytes) -> tuple[_Column, bool]:
    """Return the only column of a schema, and whether unions have a validity buffer."""
    schema, _ = _header(message, _SCHEMA)
    version = _Table.at(message, 0).number(0, _U16)
    fields = schema.tables(1)
    if len(fields) != 1:
        raise ValueFormError(f"pyarrow's serialisation of {len(fields)} columns")
    return _column(fields[0], itertools.count(1)), version < 4  # 4 is metadata version 5


def _column(field: _Table, counter: Iterator[int]) -> _Column:
    """Return a column; `counter` counts all columns, to bound their number and depth."""
    kind = field.number(2, _U8)
    if kind not in _NUM_BUFFERS or next(counter) > _MAX_COLUMNS:
        raise ValueFormError(_OTHER_THING)
    bits = field.table(3).integer_type()[0] if kind == _INT else 0
    children = tuple(_column(child, counter) for child in field.tables(5)) if field.has(5) else ()
    if kind == _LIST and len(children) != 1:
        raise ValueFormError(_DAMAGED)
    return _Column(kind, children, bits)


class _Table(NamedTuple):
    """A table of Flatbuffers; at `places` are the offsets of its fields."""

    message: bytes
    begin: int
    places: int

    @classmethod
    def at(cls, message: bytes, place: int) -> _Table:
        """Return the table that the offset at a place leads to."""
        begin = _indirect(message, place)
        places = begin - _I32.unpack_from(message, begin)[0]
        if places < 0:
            raise ValueFormError(_DAMAGED)
        return cls(message, begin, places)

    def has(self, field: int) -> bool:
        in_table = 6 + 2 * field <= _U16.unpack_from(self.message, self.places)[0]
        return in_table and bool(_U16.unpack_from(self.message, self.places + 4 + 2 * field)[0])

    def place(self, field: int) -> int:
        if not self.has(field):
            raise ValueFormError(_DAMAGED)
        return self.begin + int(_U16.unpack_from(self.message, self.places + 4 + 2 * field)[0])

    def number(self, field: int, form: struct.Struct) -> int:
        return int(form.unpack_from(self.message, self.place(field))[0])

    def table(self, field: int) -> _Table:
        return _Table.at(self.message, self.place(field))

    def vector(self, field: int) -> tuple[int, int]:
        """Return where a vector begins, and how many elements it has."""
        begin = _indirect(self.message, self.place(field))
        (size,) = _U32.unpack_from(self.message, begin)
        if size > _MAX_COLUMNS:
            raise ValueFormError(_DAMAGED)
        return begin + 4, size

    def tables(self, field: int) -> list[_Table]:
        begin, size = self.vector(field)
        return [_Table.at(self.message, begin + 4 * i) for i in range(size)]

    def integer_type(self) -> tuple[int, bool]:
        """Return bits and signedness of an Int."""
        return self.number(0, _I32), self.has(1) and self.number(1, _U8) != 0


def _indirect(message: bytes, at: int) -> int:
    return at + int(_U32.unpack_from(message, at)[0])
