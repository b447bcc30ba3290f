"""Where an image lies in a value of an LMDB, and its label, without building what was serialised.

The values of the LMDBs of ImageNet are pairs: (image, label) or [image, label], put into bytes by
msgpack, pickle or pyarrow. The image is a byte string or a one-dimensional uint8 array, the label
an integer, Python's or NumPy's. Each parser accepts that and nothing else: it executes nothing and
makes no object but of numbers, short byte strings and places in the value. Only headers are read,
never the image: a value takes about as long whatever its size.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ACCEPTED = (
    "msgpack, a pickle or pyarrow.serialize of (image, label) or [image, label], the image a byte "
    "string or a one-dimensional uint8 array, the label an integer"
)


class ValueFormError(ValueError):
    """A value isn't a pair of an image and a label, or isn't made as expected."""


class Pair(NamedTuple):
    """An image in a value, and its label.

    Attributes:
        offset: where its bytes begin in the value.
        length: how many there are.
        label: its class.
        stored: how the bytes are stored: `RAW`, or one of the ways that `stored_bytes` undoes.
    """

    offset: int
    length: int
    label: int
    stored: int


RAW = 0


UTF8 = 1
"""As text in UTF-8 of one character for each byte: pickles of protocol 1 and 2 by Python 3."""


ESCAPED_TEXT = 2
"""As text in which some are written \\u0000: protocol 0 by Python 3."""


ESCAPED_BYTES = 3
"""As Python 2 writes a string with its quotes removed: protocol 0 by Python 2."""


def stored_bytes(content: memoryview, stored: int) -> bytes:
    """Return the bytes that are stored in a way that `Pair.stored` names.

    Raises:
        ValueFormError: where they are not.
    """
    try:
        if stored == UTF8:
            return str(content, "utf-8").encode("latin-1")
        if stored == ESCAPED_TEXT:
            return str(content, "raw-unicode-escape").encode("latin-1")
        if stored == ESCAPED_BYTES:
            return _unescaped(bytes(content))
    except ValueError as error:
        raise ValueFormError(f"a byte string that can't be read: {error}") from None
    return bytes(content)


def _unescaped(content: bytes) -> bytes:
    unescaped: bytes = codecs.escape_decode(content)[0]
    return unescaped


def find_pair(value: memoryview) -> Pair:
    """Find the image and the label in a value.

    Raises:
        ValueFormError: where it is anything else than such a pair; says what.
    """
    if not len(value):
        raise ValueFormError("no bytes")
    parse = _PARSERS.get(value[0])
    if parse is None:
        raise ValueFormError(f"none of these: it begins with {bytes(value[:16])!r}")
    try:
        image, label = _two(parse(value))
    except (IndexError, struct.error, OverflowError):  # the last: a place beyond 63 bits
        raise ValueFormError("cut short or damaged") from None
    if isinstance(image, _Array):
        image = image.content()
    if not isinstance(image, _Bytes):
        raise ValueFormError(f"an image that is {_described(image)}")
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueFormError(f"a label that is {_described(label)}")
    if image.end > len(value):
        raise ValueFormError("cut short or damaged")
    return Pair(image.begin, image.end - image.begin, label, image.stored)


class _Bytes(NamedTuple):
    """A byte string, or text, that lies in the value."""

    begin: int
    end: int
    stored: int = RAW


class _Text(NamedTuple):
    begin: int
    end: int
    stored: int


class _Type:
    """A NumPy dtype: of a kind and a size, and in which order the bytes lie."""

    def __init__(self, code: str) -> None:
        self.order, self.code = (code[0], code[1:]) if code[:1] in "<>|=" else ("=", code)

    def integer(self, content: bytes) -> int:
        """Read a scalar."""
        if self.code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise ValueFormError(f"a number of type {self.code!r:.20}")
        if len(content) != int(self.code[1]):
            raise ValueFormError(f"a number of type {self.code} in {len(content)} bytes")
        order = "big" if self.order == ">" else "little"
        return int.from_bytes(content, order, signed=self.code[0] == "i")  # type: ignore[arg-type]


class _Array:
    """A NumPy array; a pickle makes it first and fills it then."""

    def __init__(self, shape: Any = None, dtype: Any = None, data: Any = None) -> None:
        self.shape, self.dtype, self.data = shape, dtype, data

    def content(self) -> _Bytes:
        if not isinstance(self.dtype, _Type) or self.dtype.code != "u1":
            raise ValueFormError("an image that is an array of another type than uint8")
        shape = self.shape if isinstance(self.shape, (list, tuple)) else ()
        if len(shape) != 1 or not isinstance(shape[0], int):
            raise ValueFormError(
                f"an image that is an array of {len(shape)} dimensions: decoded pixels, not a file"
            )
        if not isinstance(self.data, _Bytes):
            raise ValueFormError("an image that is an array without its bytes")
        if self.data.stored == RAW and shape[0] != self.data.end - self.data.begin:
            raise ValueFormError(
                f"an array of {shape[0]} bytes in {self.data.end - self.data.begin}"
            )
        return self.data


def _two(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, (list, tuple)) or isinstance(found, (_Bytes, _Text)):
        raise ValueFormError(f"not two things but {_described(found)}")
    if len(found) != 2:
        raise ValueFormError(f"not two things but {len(found)}")
    return found[0], found[1]


def _described(found: Any) -> str:
    if isinstance(found, _Bytes):
        return "a byte string"
    if isinstance(found, _Text):
        return "text"
    if isinstance(found, _Array):
        return "an array"
    names = {dict: "a dictionary", list: "a list", tuple: "a tuple", int: "an integer"}
    return names.get(type(found), f"{found!r:.30}")


# ---- msgpack -------------------------------------------------------------------------------------

_MAX_DEPTH = 4


_MSGPACK_NUMBERS = {
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip


_MSGPACK_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
"""bin, and the older raw that is str now: writers without use_bin_type put byte strings there."""


_MSGPACK_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def _parse_msgpack(value: memoryview) -> Any:
    found, end = _msgpack_object(value, 0, 0)
    if end != len(value):
        raise ValueFormError(f"msgpack that ends {len(value) - end} bytes before its value does")
    return found


def _msgpack_object(value: memoryview, at: int, depth: int) -> tuple[Any, int]:
    """Read the object that begins at `at`; return it, and where it ends."""
    head = value[at]
    at += 1
    if head < 0x80:
        return head, at
    if head >= 0xE0:
        return head - 0x100, at
    if 0x80 <= head < 0xA0:
        return _msgpack_container(value, at, depth, head)
    if 0xA0 <= head < 0xC0:
        return _Bytes(at, at + head - 0xA0), at + head - 0xA0
    if head in _MSGPACK_CONSTANTS:
        return _MSGPACK_CONSTANTS[head], at
    form = _MSGPACK_NUMBERS.get(head) or _MSGPACK_BYTES.get(head)
    if form is None:
        raise ValueFormError(f"a msgpack object of kind {head:#x} at byte {at - 1}")
    (number,) = struct.unpack_from(form, value, at)
    at += struct.calcsize(form)
    if head in _MSGPACK_NUMBERS:
        return number, at
    return _Bytes(at, at + number), at + number


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
    entries = zip(found[::2], found[1::2], strict=True)
    return _numpy_object(value, {_short(value, key): entry for key, entry in entries}), at


def _short(value: memoryview, found: Any) -> bytes:
    """Return a byte string that has to be short, such as a key."""
    if not isinstance(found, _Bytes) or found.end - found.begin > 64 or found.end > len(value):
        raise ValueFormError(f"{_described(found)} where a short byte string is expected")
    return bytes(value[found.begin : found.end])


def _numpy_object(value: memoryview, entries: dict[bytes, Any]) -> _Array | int:
    """Read what msgpack_numpy makes of an array or a number; up to release 0.3.6 without a kind."""
    if entries.keys() - {b"nd", b"type", b"kind", b"shape", b"data"}:
        raise ValueFormError(f"a dictionary with the keys {sorted(entries)!r:.60}")
    if b"kind" in entries and _short(value, entries[b"kind"]):
        raise ValueFormError("an array of objects or structures")
    dtype = _Type(_short(value, entries.get(b"type")).decode("latin-1"))
    if entries.get(b"nd") is True:
        return _Array(entries.get(b"shape"), dtype, entries.get(b"data"))
    return dtype.integer(_short(value, entries.get(b"data")))


# ---- pickle --------------------------------------------------------------------------------------

_MAX_OPCODES = 256
"""A pair takes 50."""


class _Mark(NamedTuple):
    pass


class _Name(NamedTuple):
    """A function or class that a pickle refers to; never looked up."""

    name: str


_NAMES = {
    f"{module}{end}": meaning
    for end, meaning in (
        (".multiarray._reconstruct", "array"),
        (".multiarray.scalar", "scalar"),
        (".numeric._frombuffer", "frombuffer"),
    )
    for module in ("numpy.core", "numpy._core")
} | {"numpy.ndarray": "ndarray", "numpy.dtype": "dtype", "_codecs.encode": "encode"}


class _Pickle:
    """Follows the opcodes of a pickle that can only be a pair of an image and a label.

    Source of the opcodes: Lib/pickletools.py of CPython 3.13. A name is a name here; what calls it
    in a pickle is told by the few names that arrays and numbers of NumPy have, or refused.
    """

    def __init__(self, value: memoryview) -> None:
        self._value = value
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        value, steps = self._value, _PICKLE_STEPS
        for _ in range(_MAX_OPCODES):
            opcode = value[self._at]
            self._at += 1
            if opcode == 0x2E:  # STOP
                return self._ended()
            step = steps.get(opcode)
            if step is None:
                raise ValueFormError(f"a pickle with opcode {chr(opcode)!r} at byte {self._at - 1}")
            step(self)
        raise ValueFormError("a pickle of more than a pair")

    def _ended(self) -> Any:
        if len(self._stack) != 1 or self._at != len(self._value):
            raise ValueFormError("a pickle that ends before its value does")
        return self._stack[0]

    # -- arguments

    def _number(self, form: struct.Struct) -> int:
        (number,) = form.unpack_from(self._value, self._at)
        self._at += form.size
        return int(number)

    def _skip(self, num_bytes: int) -> int:
        """Step over bytes and return where they begin."""
        begin = self._at
        self._at += num_bytes
        if num_bytes < 0 or self._at > len(self._value):
            raise ValueFormError("a pickle that is cut short")
        return begin

    def _line(self) -> tuple[int, int]:
        """Step over a line and return where it begins and ends."""
        begin, piece_bytes = self._at, 64
        while True:
            end = bytes(self._value[begin : begin + piece_bytes]).find(b"\n")
            if end >= 0:
                self._at = begin + end + 1
                return begin, begin + end
            if begin + piece_bytes >= len(self._value):
                raise ValueFormError("a pickle that is cut short")
            piece_bytes *= 16

    def _ascii_line(self) -> str:
        begin, end = self._line()
        return bytes(self._value[begin : min(end, begin + 100)]).decode("latin-1")

    def _decimal_line(self) -> int:
        line = self._ascii_line().removesuffix("L")
        if len(line) > 20 or not line.removeprefix("-").isdecimal():
            raise ValueFormError(f"a pickle with the number {line!r:.30}")
        return int(line)

    # -- steps

    def _pop_to_mark(self) -> list[Any]:
        for i in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[i], _Mark):
                found = self._stack[i + 1 :]
                del self._stack[i:]
                return found
        raise ValueFormError("a damaged pickle")

    def protocol(self) -> None:
        self._skip(1)

    def frame(self) -> None:
        self._skip(8)

    def mark(self) -> None:
        self._stack.append(_Mark())

    def constant(self, constant: Any) -> None:
        self._stack.append(constant)

    def integer(self, form: struct.Struct) -> None:
        self._stack.append(self._number(form))

    def decimal(self) -> None:
        begin = self._at
        number = self._decimal_line()
        is_bool = bytes(self._value[begin : begin + 3]) in (b"00\n", b"01\n")
        self._stack.append(bool(number) if is_bool else number)

    def long(self) -> None:
        num_bytes = self._number(_U8)
        begin = self._skip(num_bytes)
        if num_bytes > 8:
            raise ValueFormError("a pickle with a number of more than 64 bits")
        content = bytes(self._value[begin : self._at])
        self._stack.append(int.from_bytes(content, "little", signed=True))

    def byte_string(self, form: struct.Struct) -> None:
        begin = self._skip(self._number(form))
        self._stack.append(_Bytes(begin, self._at))

    def text(self, form: struct.Struct) -> None:
        begin = self._skip(self._number(form))
        self._stack.append(_Text(begin, self._at, UTF8))

    def text_line(self) -> None:
        self._stack.append(_Text(*self._line(), ESCAPED_TEXT))

    def quoted_line(self) -> None:
        begin, end = self._line()
        quotes = bytes(self._value[begin : begin + 1]), bytes(self._value[end - 1 : end])
        if end - begin < 2 or quotes[0] != quotes[1] or quotes[0] not in (b"'", b'"'):
            raise ValueFormError("a pickle with a string without quotes")
        self._stack.append(_Bytes(begin + 1, end - 1, ESCAPED_BYTES))

    def put(self, form: struct.Struct) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def put_line(self) -> None:
        self._memo[self._decimal_line()] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, form: struct.Struct) -> None:
        self._stack.append(self._remembered(self._number(form)))

    def get_line(self) -> None:
        self._stack.append(self._remembered(self._decimal_line()))

    def _remembered(self, place: int) -> Any:
        if place not in self._memo:
            raise ValueFormError("a damaged pickle")
        return self._memo[place]

    def tuple_of(self, size: int) -> None:
        if len(self._stack) < size:
            raise ValueFormError("a damaged pickle")
        found = tuple(self._stack[len(self._stack) - size :])
        del self._stack[len(self._stack) - size :]
        self._stack.append(found)

    def tuple_to_mark(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def empty_list(self) -> None:
        self._stack.append([])

    def list_to_mark(self) -> None:
        self._stack.append(self._pop_to_mark())

    def append(self) -> None:
        element = self._stack.pop()
        self._extend([element])

    def appends(self) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, elements: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueFormError("a damaged pickle")
        self._stack[-1].extend(elements)

    def name_in_lines(self) -> None:
        self._stack.append(_Name(f"{self._ascii_line()}.{self._ascii_line()}"))

    def name_on_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_Name(f"{self._string(module)}.{self._string(name)}"))

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Name) or type(arguments) is not tuple:
            raise ValueFormError("a pickle that calls what has no name")
        meaning = _NAMES.get(function.name)
        if meaning == "array" and arguments and arguments[0] == _Name("numpy.ndarray"):
            self._stack.append(_Array())
        elif meaning == "dtype" and arguments:
            self._stack.append(_Type(self._string(arguments[0])))
        elif meaning == "frombuffer" and len(arguments) == 4:
            data, dtype, shape, _ = arguments
            self._stack.append(_Array(shape, dtype, data))
        elif meaning == "scalar" and len(arguments) == 2 and isinstance(arguments[0], _Type):
            self._stack.append(arguments[0].integer(self._short_bytes(arguments[1])))
        elif meaning == "encode" and len(arguments) == 2 and isinstance(arguments[0], _Text):
            if self._string(arguments[1]) != "latin1":
                raise ValueFormError("a pickle with text of another encoding than latin1")
            self._stack.append(_Bytes(*arguments[0]))
        else:
            raise ValueFormError(
                f"a pickle that calls {function.name!r:.80}, which is not executed"
            )

    def build(self) -> None:
        state, made = self._stack.pop(), self._stack[-1]
        if type(state) is not tuple:
            raise ValueFormError("a damaged pickle")
        if isinstance(made, _Type) and len(state) in (8, 9):
            made.order = self._string(state[1])
        elif isinstance(made, _Array) and made.data is None and len(state) == 5:
            made.shape, made.dtype, made.data = state[1], state[2], state[4]
        else:
            raise ValueFormError("a pickle that builds something else than an array")

    # -- short strings

    def _short_bytes(self, found: Any) -> bytes:
        if not isinstance(found, (_Bytes, _Text)) or found.end - found.begin > 100:
            raise ValueFormError(f"a pickle with {_described(found)} where a short one is expected")
        return stored_bytes(self._value[found.begin : found.end], found.stored)

    def _string(self, found: Any) -> str:
        return self._short_bytes(found).decode("latin-1")


_U8, _U16, _I32, _U32, _U64 = map(struct.Struct, ("<B", "<H", "<i", "<I", "<Q"))


def _with(step: Callable[[_Pickle, Any], None], argument: Any) -> Callable[[_Pickle], None]:
    return lambda pickle: step(pickle, argument)


_PICKLE_STEPS: dict[int, Callable[[_Pickle], None]] = {
    ord("\x80"): _Pickle.protocol,
    ord("\x95"): _Pickle.frame,
    ord("("): _Pickle.mark,
    ord("N"): _with(_Pickle.constant, None),
    ord("\x88"): _with(_Pickle.constant, True),
    ord("\x89"): _with(_Pickle.constant, False),
    ord("K"): _with(_Pickle.integer, _U8),
    ord("M"): _with(_Pickle.integer, _U16),
    ord("J"): _with(_Pickle.integer, _I32),
    ord("I"): _Pickle.decimal,
    ord("L"): _Pickle.decimal,
    ord("\x8a"): _Pickle.long,
    ord("C"): _with(_Pickle.byte_string, _U8),
    ord("B"): _with(_Pickle.byte_string, _U32),
    ord("\x8e"): _with(_Pickle.byte_string, _U64),
    ord("\x96"): _with(_Pickle.byte_string, _U64),
    ord("U"): _with(_Pickle.byte_string, _U8),
    ord("T"): _with(_Pickle.byte_string, _I32),
    ord("S"): _Pickle.quoted_line,
    ord("X"): _with(_Pickle.text, _U32),
    ord("\x8c"): _with(_Pickle.text, _U8),
    ord("\x8d"): _with(_Pickle.text, _U64),
    ord("V"): _Pickle.text_line,
    ord("q"): _with(_Pickle.put, _U8),
    ord("r"): _with(_Pickle.put, _U32),
    ord("p"): _Pickle.put_line,
    ord("\x94"): _Pickle.memoize,
    ord("h"): _with(_Pickle.get, _U8),
    ord("j"): _with(_Pickle.get, _U32),
    ord("g"): _Pickle.get_line,
    ord(")"): _with(_Pickle.tuple_of, 0),
    ord("\x85"): _with(_Pickle.tuple_of, 1),
    ord("\x86"): _with(_Pickle.tuple_of, 2),
    ord("\x87"): _with(_Pickle.tuple_of, 3),
    ord("t"): _Pickle.tuple_to_mark,
    ord("]"): _Pickle.empty_list,
    ord("l"): _Pickle.list_to_mark,
    ord("a"): _Pickle.append,
    ord("e"): _Pickle.appends,
    ord("c"): _Pickle.name_in_lines,
    ord("\x93"): _Pickle.name_on_stack,
    ord("R"): _Pickle.call,
    ord("b"): _Pickle.build,
}


def _parse_pickle(value: memoryview) -> Any:
    return _usual_pair(value) or _Pickle(value).run()


_USUAL_BEGIN, _USUAL_END = (
    re.compile(pattern.replace(b" ", rb"(?:q.)?"), re.DOTALL)
    for pattern in (
        rb"\x80\x03\] \(cnumpy\._?core\.multiarray\n_reconstruct\n cnumpy\nndarray\n K\x00\x85 "
        rb"C\x01b \x87 R \(K\x01(?P<shape>K.|M..|J....)\x85 cnumpy\ndtype\n X\x02\x00\x00\x00u1 "
        rb"\x89\x88\x87 R \(K\x03X\x01\x00\x00\x00\| NNNJ\xff{4}J\xff{4}K\x00t b\x89"
        rb"B(?P<size>....)",
        rb" t b(?P<label>K.|M..|J...[\x00-\x7f])e\.",
    )
)
"""[uint8 array, label] in protocol 3 before and behind the image; a blank is a PUT, which nothing
here needs, or nothing. So `lmdb_file` writes them, and so did Python 3 by default up to 3.7."""


_USUAL_BEGIN_BYTES, _USUAL_END_BYTES = 256, 16


def _usual_pair(value: memoryview) -> list[Any] | None:
    """Find image and label in the pickle that most files have; None where it is another one.

    Its 40 opcodes take 25 us one by one, and a data set has 1.3 million of them.
    """
    head = _USUAL_BEGIN.match(bytes(value[:_USUAL_BEGIN_BYTES]))
    if head is None:
        return None
    size = int.from_bytes(head["size"], "little")
    begin, end = head.end(), head.end() + size
    tail = _USUAL_END.fullmatch(bytes(value[end : end + _USUAL_END_BYTES]))
    if tail is None or int.from_bytes(head["shape"][1:], "little") != size:
        return None
    return [_Bytes(begin, end), int.from_bytes(tail["label"][1:], "little")]


# ---- pyarrow -------------------------------------------------------------------------------------

_SCHEMA, _RECORD_BATCH, _TENSOR = 1, 3, 4
"""Kinds of messages: `MessageHeader` of Arrow's Message.fbs."""


_NULL, _INT, _BINARY, _LIST, _STRUCT, _UNION = 1, 2, 4, 12, 13, 14
"""Kinds of columns: `Type` of Arrow's Schema.fbs."""


_NUM_BUFFERS = {_NULL: 0, _INT: 2, _BINARY: 3, _LIST: 2, _STRUCT: 1}


_MAX_MESSAGE_BYTES = 1 << 14


_MAX_COLUMNS = 32


_MAX_STREAM_AT = 72


_MAX_PADDING_BYTES = 72


class _Column(NamedTuple):
    """A column of a schema; `bits` of an integer."""

    kind: int
    children: tuple[_Column, ...]
    bits: int


class _Filled(NamedTuple):
    """A column, and where its buffers lie behind the batch's message: (offset, length) each."""

    kind: int
    children: tuple[_Filled, ...]
    bits: int
    buffers: tuple[tuple[int, int], ...]


def _parse_pyarrow(value: memoryview) -> list[Any]:
    """Follow pyarrow.serialize of releases 0.8 to 11 (SerializedPyObject::WriteTo).

    Some counts; a stream of a schema and a batch of one row, a union that holds the pair in a list;
    then the arrays as tensors, each a message and its bytes.
    """
    begin = next(
        (at for at in range(8, _MAX_STREAM_AT, 8) if _U32.unpack_from(value, at)[0] >= 64), 0
    )
    schema, at = _message(value, begin)
    batch, body = _message(value, at)
    columns, after = _filled(schema, batch)
    sequence = _element(value, body, columns, 0)
    if not isinstance(sequence, _Filled):
        raise ValueFormError(f"not two things but {_described(sequence)}")
    first, end = (_number(value, body, sequence.buffers[1], "<i", row) for row in (0, 1))
    if end - first != 2:
        raise ValueFormError(f"not two things but {end - first}")
    pair = [_element(value, body, sequence.children[0], row) for row in (first, first + 1)]
    return [_tensor(value, body + after) if e is _FIRST_TENSOR else e for e in pair]


_FIRST_TENSOR = object()


def _element(value: memoryview, body: int, union: _Filled, row: int) -> Any:
    """Return an element of a union: an integer, bytes, the first tensor, or a list's column."""
    if union.kind != _UNION:
        raise ValueFormError("pyarrow's serialisation, damaged")
    code = _number(value, body, union.buffers[-2], "<b", row)
    place = _number(value, body, union.buffers[-1], "<i", row)
    if not 0 <= code < len(union.children):
        raise ValueFormError("pyarrow's serialisation, damaged")
    child = union.children[code]  # so it is in all releases, whatever the schema's own codes say
    if child.kind == _INT and child.bits == 64:
        return _number(value, body, child.buffers[1], "<q", place)
    if child.kind == _INT and _number(value, body, child.buffers[1], "<i", place) == 0:
        return _FIRST_TENSOR
    if child.kind == _BINARY:
        begin, end = (_number(value, body, child.buffers[1], "<i", place + i) for i in (0, 1))
        offset, length = child.buffers[2]
        if not 0 <= begin <= end <= length:
            raise ValueFormError("pyarrow's serialisation, damaged")
        return _Bytes(body + offset + begin, body + offset + end)
    if child.kind == _STRUCT and len(child.children) == 1:  # of releases before 0.14
        child = child.children[0]
    if child.kind == _LIST and place == 0:
        return child
    raise ValueFormError("something else than an array, bytes or an integer")


def _number(value: memoryview, body: int, buffer: tuple[int, int], form: str, row: int) -> int:
    offset, length = buffer
    size = struct.calcsize(form)
    if not 0 <= row * size <= length - size:
        raise ValueFormError("pyarrow's serialisation, damaged")
    return int(struct.unpack_from(form, value, body + offset + row * size)[0])


def _message(value: memoryview, at: int) -> tuple[bytes, int]:
    """Return the message at a place, and where it ends; releases from 0.15 mark its begin."""
    (size,) = _U32.unpack_from(value, at)
    at += 4
    if size == 0xFFFFFFFF:
        (size,) = _U32.unpack_from(value, at)
        at += 4
    message = bytes(value[at : at + size]) if size <= _MAX_MESSAGE_BYTES else b""
    if not message or len(message) != size:
        raise ValueFormError("pyarrow's serialisation, damaged or of an unknown release")
    return message, at + size


def _tensor(value: memoryview, after: int) -> _Array:
    """Read the first message behind the stream, whose end and padding are zeros."""
    places = range(after, after + _MAX_PADDING_BYTES, 4)
    at = next((at for at in places if _begins_message(value, at)), after)
    message, body = _message(value, at)
    table, body_bytes = _header(message, _TENSOR)
    kind = message[_field(message, table, 0)]
    bits, signed = _integer_type(message, table, 1) if kind == _INT else (0, False)
    dims, num_dims = _vector(message, table, 2)
    shape = []
    for i in range(num_dims):
        dim = _indirect(message, dims + 4 * i)
        shape.append(_I64.unpack_from(message, _field(message, dim, 0))[0])
    offset, length = _I64_PAIR.unpack_from(message, _field(message, table, 4))
    if not 0 <= offset <= offset + length <= body_bytes:
        raise ValueFormError("pyarrow's serialisation, damaged")
    dtype = _Type(f"{'i' if signed else 'u'}{bits // 8}")
    return _Array(shape, dtype, _Bytes(body + offset, body + offset + length))


def _begins_message(value: memoryview, at: int) -> bool:
    first, second = _U32_PAIR.unpack_from(value, at)
    return first != 0 and (first, second) != (0xFFFFFFFF, 0)  # the latter ends a stream


@functools.lru_cache(maxsize=64)  # most values of a database have the same
def _filled(schema: bytes, batch: bytes) -> tuple[_Filled, int]:
    """Return the batch's only column, and the size of what its buffers lie in."""
    table, body_bytes = _header(batch, _RECORD_BATCH)
    (num_rows,) = _I64.unpack_from(batch, _field(batch, table, 0))
    if num_rows != 1:
        raise ValueFormError(f"pyarrow's serialisation of {num_rows} things")
    begin, num_buffers = _vector(batch, table, 2)
    buffers = [_I64_PAIR.unpack_from(batch, begin + 16 * i) for i in range(num_buffers)]
    if not all(0 <= offset <= offset + length <= body_bytes for offset, length in buffers):
        raise ValueFormError("pyarrow's serialisation, damaged")
    column, has_validity = _schema(schema)
    return _fill(column, iter(buffers), has_validity), body_bytes


def _fill(column: _Column, buffers: Iterator[tuple[int, int]], has_validity: bool) -> _Filled:
    """Give each column its buffers: they come in the order of the columns, parents first."""
    unions = 3 if has_validity else 2
    num_buffers = unions if column.kind == _UNION else _NUM_BUFFERS[column.kind]
    own = tuple(itertools.islice(buffers, num_buffers))
    if len(own) != num_buffers:
        raise ValueFormError("pyarrow's serialisation, damaged")
    children = tuple(_fill(child, buffers, has_validity) for child in column.children)
    return _Filled(column.kind, children, column.bits, own)


@functools.lru_cache(maxsize=64)
def _schema(message: bytes) -> tuple[_Column, bool]:
    """Return a schema's only column, and whether unions have a validity: to metadata version 4."""
    table, _ = _header(message, _SCHEMA)
    (version,) = _U16.unpack_from(message, _field(message, _indirect(message, 0), 0))
    fields, num_fields = _vector(message, table, 1)
    if num_fields != 1:
        raise ValueFormError(f"pyarrow's serialisation of {num_fields} columns")
    return _column(message, _indirect(message, fields), []), version < 4


def _column(message: bytes, table: int, so_far: list[int]) -> _Column:
    """Return a column; `so_far`: places of all before it, which bounds their number and depth."""
    kind = message[_field(message, table, 2)]
    so_far.append(table)
    if (kind != _UNION and kind not in _NUM_BUFFERS) or len(so_far) > _MAX_COLUMNS:
        raise ValueFormError("something else than an array, bytes or an integer")
    bits = _integer_type(message, table, 3)[0] if kind == _INT else 0
    begin, num_children = _vector(message, table, 5) if _has(message, table, 5) else (0, 0)
    children = tuple(
        _column(message, _indirect(message, begin + 4 * i), so_far) for i in range(num_children)
    )
    if kind == _LIST and len(children) != 1:
        raise ValueFormError("pyarrow's serialisation, damaged")
    return _Column(kind, children, bits)


# -- flatbuffers: a table begins with how far before it the table of its fields' places lies


_I64, _I64_PAIR, _U32_PAIR = map(struct.Struct, ("<q", "<qq", "<II"))


def _header(message: bytes, kind: int) -> tuple[int, int]:
    """Return the place of a message's header, which has to be of a kind, and its body's size."""
    table = _indirect(message, 0)
    if message[_field(message, table, 1)] != kind:
        raise ValueFormError("pyarrow's serialisation with another message than expected")
    body_bytes = 0
    if _has(message, table, 3):
        (body_bytes,) = _I64.unpack_from(message, _field(message, table, 3))
    return _indirect(message, _field(message, table, 2)), body_bytes


def _has(message: bytes, table: int, field: int) -> bool:
    places = table - _I32.unpack_from(message, table)[0]
    if places < 0:
        raise ValueFormError("pyarrow's serialisation, damaged")
    if 6 + 2 * field > _U16.unpack_from(message, places)[0]:
        return False
    return bool(_U16.unpack_from(message, places + 4 + 2 * field)[0])


def _field(message: bytes, table: int, field: int) -> int:
    if not _has(message, table, field):
        raise ValueFormError("pyarrow's serialisation, damaged")
    places = table - _I32.unpack_from(message, table)[0]
    return table + int(_U16.unpack_from(message, places + 4 + 2 * field)[0])


def _indirect(message: bytes, at: int) -> int:
    return at + int(_U32.unpack_from(message, at)[0])


def _vector(message: bytes, table: int, field: int) -> tuple[int, int]:
    begin = _indirect(message, _field(message, table, field))
    (size,) = _U32.unpack_from(message, begin)
    if size > _MAX_COLUMNS:
        raise ValueFormError("pyarrow's serialisation, damaged")
    return begin + 4, size


def _integer_type(message: bytes, table: int, field: int) -> tuple[int, bool]:
    """Return bits and signedness of a field that is an Int."""
    integer = _indirect(message, _field(message, table, field))
    (bits,) = _I32.unpack_from(message, _field(message, integer, 0))
    return bits, _has(message, integer, 1) and message[_field(message, integer, 1)] != 0


_PARSERS: dict[int, Callable[[memoryview], Any]] = {
    0x92: _parse_msgpack,
    0x80: _parse_pickle,
    ord("("): _parse_pickle,
    ord("]"): _parse_pickle,
    0: _parse_pyarrow,
    1: _parse_pyarrow,
}
"""By the first byte: a list of two, the protocol's opcode, a mark or a list, a count of tensors."""
