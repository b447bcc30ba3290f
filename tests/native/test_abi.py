"""core/imagenet_seq.h and src/imagenet_seq/native/abi.py say the same thing."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from imagenet_seq import native
from imagenet_seq.native import abi

HEADER = Path(__file__).parents[2] / "core" / "imagenet_seq.h"

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
    "imseq_error": abi.CError,
    "imseq_recipe": abi.CRecipe,
    "imseq_key": abi.CKey,
    "imseq_sample": abi.Sample,
    "imseq_times": abi.Times,
    "imseq_view": abi.View,
    "imseq_header": abi.Header,
    "imseq_engine_config": abi.CEngineConfig,
    "imseq_plan": abi.CPlan,
    "imseq_batch": abi.Batch,
    "imseq_task": abi.Task,
    "imseq_stats": abi.CStats,
    "imseq_pending": abi.Pending,
    "imseq_request": abi.Request,
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
    assert {name for _, name, _ in found} == set(abi._PROTOTYPES)
    for result, name, arguments in found:
        expected_result = ctypes_of(f"{result} x", in_struct=False)[0]
        expected = [
            ctypes_of(argument, in_struct=False)[0]
            for argument in arguments.split(",")
            if argument.strip() != "void"
        ]
        assert abi._PROTOTYPES[name] == (expected_result, expected), name


def test_constants_match(header: str) -> None:
    values = {m[0]: int(m[1]) for m in re.findall(r"IMSEQ_(\w+) = (-?\d+)", header)}
    values["ABI"] = int(re.search(r"#define IMSEQ_ABI (\d+)", header)[1])
    shared = [name for name in values if hasattr(abi, name)]
    assert {"ABI", "OK", "NOT_DECODED", "ERROR_CAPACITY", "TASK_ROW", "SAMPLE_CLEAN"} <= set(shared)
    for name in shared:
        assert getattr(abi, name) == values[name], name


def test_library_reports_its_abi_and_build() -> None:
    assert abi.lib.imseq_abi() == abi.ABI
    assert native.build_info()
