"""core/imagenet_seq.h and src/imagenet_seq/_native.py say the same thing."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from imagenet_seq import _native

HEADER = Path(__file__).parents[1] / "core" / "imagenet_seq.h"

C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "char": ctypes.c_char,
    "void": None,
}
STRUCTS = {
    "imseq_error": _native._Error,
    "imseq_recipe": _native._Recipe,
    "imseq_key": _native._Key,
    "imseq_sample": _native.Sample,
    "imseq_times": _native.Times,
    "imseq_view": _native.View,
    "imseq_header": _native.Header,
    "imseq_engine_config": _native._EngineConfig,
    "imseq_plan": _native._Plan,
    "imseq_batch": _native.Batch,
    "imseq_task": _native.Task,
    "imseq_stats": _native._Stats,
    "imseq_pending": _native.Pending,
    "imseq_request": _native.Request,
}


@pytest.fixture(scope="module")
def header() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


def ctypes_of(declaration: str, in_struct: bool) -> tuple[object, str]:
    """A ctypes type and the name of one C declaration such as `const void* const* rows`."""
    match = re.fullmatch(r"(.*?)(\w+)(\[\d+\])?", declaration.strip())
    assert match, declaration
    base = re.sub(r"\bconst\b", "", match[1]).strip()
    stars = base.count("*")
    base = base.replace("*", "").strip()
    if stars == 0:
        kind = STRUCTS.get(base) or C_TYPES[base]
        return (kind * int(match[3][1:-1]) if match[3] else kind), match[2]
    if base == "char":
        # A text that ends with a zero byte; `paths` does not and is a plain address.
        return (ctypes.c_void_p if match[2] == "paths" else ctypes.c_char_p), match[2]
    if stars == 2 or (base in ("size_t",)):
        inner = ctypes.c_size_t if base == "size_t" else ctypes.c_void_p
        return ctypes.POINTER(inner), match[2]
    if base in STRUCTS and not in_struct:
        return ctypes.POINTER(STRUCTS[base]), match[2]
    return ctypes.c_void_p, match[2]


def test_structs_match(header: str) -> None:
    found = re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", header, flags=re.S)
    assert {name for name, _ in found} == set(STRUCTS)
    for name, body in found:
        fields = []
        for line in body.split(";"):
            if not line.strip():
                continue
            first, *others = line.split(",")
            kind, field = ctypes_of(first, in_struct=True)
            fields.append((field, kind))
            base = first.strip().rsplit(maxsplit=1)[0]
            fields += [ctypes_of(f"{base} {other}", in_struct=True)[::-1] for other in others]
        assert fields == list(STRUCTS[name]._fields_), name


def test_prototypes_match(header: str) -> None:
    pattern = r"IMSEQ_(?:API|CHECKED)\s+([\w\s*]+?)(imseq_\w+)\(([^)]*)\);"
    found = re.findall(pattern, header)
    assert {name for _, name, _ in found} == set(_native._PROTOTYPES)
    for result, name, arguments in found:
        expected_result = ctypes_of(f"{result} x", in_struct=False)[0]
        expected = [
            ctypes_of(argument, in_struct=False)[0]
            for argument in arguments.split(",")
            if argument.strip() != "void"
        ]
        assert _native._PROTOTYPES[name] == (expected_result, expected), name


def test_constants_match(header: str) -> None:
    values = {m[0]: int(m[1]) for m in re.findall(r"IMSEQ_(\w+) = (-?\d+)", header)}
    values["ABI"] = int(re.search(r"#define IMSEQ_ABI (\d+)", header)[1])
    shared = [name for name in values if hasattr(_native, name)]
    assert {"ABI", "OK", "FOREIGN", "ERROR_CAPACITY", "TASK_ROW", "SAMPLE_CLEAN"} <= set(shared)
    for name in shared:
        assert getattr(_native, name) == values[name], name


def test_library_reports_its_abi_and_build() -> None:
    assert _native._lib.imseq_abi() == _native.ABI
    assert _native.build_info()
