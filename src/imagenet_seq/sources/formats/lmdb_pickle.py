"""Finds the image and the label in a pickled pair, opcode by opcode; executes nothing.

The opcodes and the sizes of their arguments come from the standard library's `pickletools`. Its
`genops` is not used because it reads the arguments: it copies images, takes 1.2 ms for one of
110 kB in protocol 0, and fails on those of Python 2 in protocol 0.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from imagenet_seq.sources.formats.lmdb_objects import (
    ESCAPED_BYTES,
    ESCAPED_TEXT,
    UTF8,
    Array,
    ArrayType,
    ByteString,
    Text,
    ValueFormError,
    describe,
    stored_bytes,
)


def parse_pickle(value: memoryview) -> Any:
    """Return the object that a pickle holds, byte strings and arrays as places in it.

    Raises:
        ValueFormError, LookupError: if it is damaged; the first also if it is no pair.
    """
    return _usual_pair(value) or _Pickle(value).run()


# ---- the pickle of nearly all files --------------------------------------------------------------

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
"""What precedes and follows the image in a pickle of [uint8 array, label] of protocol 3, as
`lmdb_file` and Python 3.0 to 3.7 write it by default. A blank stands for an optional BINPUT."""


def _usual_pair(value: memoryview) -> list[Any] | None:
    """Return image and label of the usual pickle, or None if it is another one.

    This takes 4 us, its 40 opcodes one by one 50 us, and a data set has 1.3 million of them.
    """
    head = _USUAL_BEGIN.match(bytes(value[:256]))
    if head is None:
        return None
    size = int.from_bytes(head["size"], "little")
    end = head.end() + size
    tail = _USUAL_END.fullmatch(bytes(value[end : end + 16]))
    if tail is None or int.from_bytes(head["shape"][1:], "little") != size:
        return None
    return [ByteString(head.end(), end), int.from_bytes(tail["label"][1:], "little")]


# ---- all others, opcode by opcode ----------------------------------------------------------------

_OPCODES = {ord(it.code): (it.name, it.arg.n if it.arg else 0) for it in pickletools.opcodes}
"""Names, and sizes of arguments; a negative one says how the size is stored."""
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
"""Size of the length that precedes an argument of variable size."""


def _opcodes(value: memoryview) -> Iterator[tuple[str, int, int]]:
    """Yield the opcodes up to STOP, which has to end the value: names and places of arguments."""
    at = 0
    for _ in range(256):  # a pair takes about 50
        name, size = _OPCODES[value[at]]
        begin = at + 1
        if name == "STOP":
            if begin != len(value):
                raise ValueFormError("a pickle that ends before its value does")
            return
        if size == pickletools.UP_TO_NEWLINE:
            end = _line_end(value, begin)
            if name == "GLOBAL":
                end = _line_end(value, end + 1)
            at = end + 1
        else:
            if size < 0:
                length_bytes = _LENGTH_BYTES[size]
                size = int.from_bytes(value[begin : begin + length_bytes], "little")
                begin += length_bytes
            end = at = begin + size
        if end > len(value):
            raise ValueFormError("a pickle that is cut short")
        yield name, begin, end
    raise ValueFormError("a pickle of more than a pair")


def _line_end(value: memoryview, begin: int) -> int:
    """Return where a line ends: most have a few bytes, that of an image 100,000."""
    for line in (value[begin : begin + 64], value[begin:]):
        length = bytes(line).find(b"\n")
        if length >= 0:
            return begin + length
    raise ValueFormError("a pickle that is cut short")


class _Name(NamedTuple):
    """A function or class that a pickle refers to; it is never looked up."""

    name: str


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_COLLECTIONS: dict[str, tuple[type, int | None]] = {
    "EMPTY_LIST": (list, 0), "EMPTY_TUPLE": (tuple, 0), "TUPLE1": (tuple, 1), "TUPLE2": (tuple, 2),
    "TUPLE3": (tuple, 3), "LIST": (list, None), "TUPLE": (tuple, None),
}  # fmt: skip
"""Type, and how many objects of the stack it takes; None: all after the last mark."""


class _Pickle:
    """Follows the opcodes of a pair; byte strings and arrays become places in the value."""

    def __init__(self, value: memoryview) -> None:
        self._value = value
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for name, begin, end in _opcodes(self._value):
            if name not in _STEPS:
                raise ValueFormError(f"a pickle with opcode {name}")
            _STEPS[name](self, name, begin, end)
        if len(self._stack) != 1:
            raise ValueFormError("a damaged pickle")
        return self._stack[0]

    # -- constants, numbers and strings

    def constant(self, name: str, begin: int, end: int) -> None:
        self._stack.append(_CONSTANTS[name])

    def number(self, name: str, begin: int, end: int) -> None:
        self._stack.append(self._number(name, begin, end))

    def byte_string(self, name: str, begin: int, end: int) -> None:
        self._stack.append(ByteString(begin, end))

    def text(self, name: str, begin: int, end: int) -> None:
        stored = ESCAPED_TEXT if name == "UNICODE" else UTF8
        self._stack.append(Text(begin, end, stored))

    def quoted_string(self, name: str, begin: int, end: int) -> None:
        quotes = bytes(self._value[begin : begin + 1]), bytes(self._value[end - 1 : end])
        if end - begin < 2 or quotes not in ((b"'", b"'"), (b'"', b'"')):
            raise ValueFormError("a pickle with a string without quotes")
        self._stack.append(ByteString(begin + 1, end - 1, ESCAPED_BYTES))

    def _number(self, name: str, begin: int, end: int) -> int:
        if name not in ("INT", "LONG", "PUT", "GET"):
            if end - begin > 8:
                raise ValueFormError("a pickle with a number of more than 64 bits")
            is_signed = name in ("BININT", "LONG1")
            return int.from_bytes(self._value[begin:end], "little", signed=is_signed)
        line = self._ascii(begin, end)
        digits = line.removesuffix("L")
        if len(digits) > 20 or not digits.removeprefix("-").isdecimal():
            raise ValueFormError(f"a pickle with the number {line!r:.30}")
        return line == "01" if line in ("00", "01") else int(digits)

    def _ascii(self, begin: int, end: int) -> str:
        return bytes(self._value[begin : min(end, begin + 200)]).decode("latin-1")

    # -- memo and collections

    def put(self, name: str, begin: int, end: int) -> None:
        place = len(self._memo) if name == "MEMOIZE" else self._number(name, begin, end)
        self._memo[place] = self._stack[-1]

    def get(self, name: str, begin: int, end: int) -> None:
        self._stack.append(self._memo[self._number(name, begin, end)])

    def collection(self, name: str, begin: int, end: int) -> None:
        kind, size = _COLLECTIONS[name]
        self._stack.append(kind(self._pop_to_mark() if size is None else self._pop(size)))

    def append(self, name: str, begin: int, end: int) -> None:
        elements = self._pop(1) if name == "APPEND" else self._pop_to_mark()
        if type(self._stack[-1]) is not list:
            raise ValueFormError("a damaged pickle")
        self._stack[-1].extend(elements)

    def _pop(self, size: int) -> list[Any]:
        begin = len(self._stack) - size
        if begin < 0:
            raise ValueFormError("a damaged pickle")
        found = self._stack[begin:]
        del self._stack[begin:]
        return found

    def _pop_to_mark(self) -> list[Any]:
        mark = [i for i, element in enumerate(self._stack) if element is _MARK][-1]
        found = self._stack[mark + 1 :]
        del self._stack[mark:]
        return found

    # -- functions

    def name_in_lines(self, name: str, begin: int, end: int) -> None:
        self._stack.append(_Name(self._ascii(begin, end).replace("\n", ".", 1)))

    def name_on_stack(self, name: str, begin: int, end: int) -> None:
        module, function = map(self._string, self._pop(2))
        self._stack.append(_Name(f"{module}.{function}"))

    def call(self, name: str, begin: int, end: int) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, _Name) or type(arguments) is not tuple:
            raise ValueFormError("a pickle that calls what has no name")
        called = function.name.replace("numpy._core.", "numpy.core.")
        match called, *arguments:
            case "numpy.core.multiarray._reconstruct", _Name("numpy.ndarray"), *_:
                made: Any = Array()
            case "numpy.core.numeric._frombuffer", data, dtype, shape, _:
                made = Array(shape, dtype, data)
            case "numpy.core.multiarray.scalar", ArrayType() as dtype, content:
                made = dtype.integer(self._short_bytes(content))
            case "numpy.dtype", code, *_:
                made = ArrayType(self._string(code))
            case "_codecs.encode", Text() as text, code if self._string(code) == "latin1":
                made = ByteString(*text)
            case _:
                raise ValueFormError(f"a pickle that calls {called!r:.80}, which is not executed")
        self._stack.append(made)

    def build(self, name: str, begin: int, end: int) -> None:
        """Fill in a dtype or an array from the state that NumPy pickles."""
        state, made = self._stack.pop(), self._stack[-1]
        if type(state) is not tuple:
            raise ValueFormError("a damaged pickle")
        if isinstance(made, ArrayType) and len(state) in (8, 9):
            made.order = self._string(state[1])
        elif isinstance(made, Array) and made.data is None and len(state) == 5:
            made.shape, made.dtype, made.data = state[1], state[2], state[4]
        else:
            raise ValueFormError("a pickle that builds something else than an array")

    def _string(self, found: Any) -> str:
        return self._short_bytes(found).decode("latin-1")

    def _short_bytes(self, found: Any) -> bytes:
        if not isinstance(found, (ByteString, Text)) or found.end - found.begin > 100:
            raise ValueFormError(f"a pickle with {describe(found)} where a short one is expected")
        return stored_bytes(self._value[found.begin : found.end], found.stored)


_STEPS: dict[str, Callable[[_Pickle, str, int, int], None]] = {
    name: step
    for names, step in (
        ("PROTO FRAME", lambda *_: None),
        (" ".join(_CONSTANTS), _Pickle.constant),
        ("BININT BININT1 BININT2 LONG1 INT LONG", _Pickle.number),
        ("BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8", _Pickle.byte_string),
        ("BINSTRING SHORT_BINSTRING", _Pickle.byte_string),
        ("BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE", _Pickle.text),
        ("STRING", _Pickle.quoted_string),
        ("PUT BINPUT LONG_BINPUT MEMOIZE", _Pickle.put),
        ("GET BINGET LONG_BINGET", _Pickle.get),
        (" ".join(_COLLECTIONS), _Pickle.collection),
        ("APPEND APPENDS", _Pickle.append),
        ("GLOBAL", _Pickle.name_in_lines),
        ("STACK_GLOBAL", _Pickle.name_on_stack),
        ("REDUCE", _Pickle.call),
        ("BUILD", _Pickle.build),
    )
    for name in names.split()
}
