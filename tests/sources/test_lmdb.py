"""LMDB: files are written and walked as LMDB does it; values are parsed, never executed."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.locks import NotedLock
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq.errors import DataError
from imagenet_seq.index.source import Source
from imagenet_seq.pack import lmdb as lmdb_file
from imagenet_seq.pack.lmdb import LmdbWriter, tensorpack_key, tensorpack_keys, tensorpack_value
from imagenet_seq.sources.formats.lmdb_objects import ValueFormError, stored_bytes
from imagenet_seq.sources.formats.lmdb_tree import BRANCH, KEYS, LEAF
from imagenet_seq.sources.formats.lmdb_values import find_pair
from imagenet_seq.sources.place import Opening, Seen, SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

lmdb = pytest.importorskip("lmdb")
msgpack = pytest.importorskip("msgpack")
msgpack_numpy = pytest.importorskip("msgpack_numpy")

GOLDEN = Path(__file__).parents[1] / "golden" / "pyarrow_serialize"
IMAGE = b"\xff\xd8" + bytes(range(1, 60)) + b"\xff\xd9"
ARRAY = np.frombuffer(IMAGE, np.uint8)
PAGE = 4096

Pairs = dict[bytes, bytes]


def write(path: Path, pairs: Pairs) -> Path:
    with LmdbWriter(path) as file:
        for key in sorted(pairs):
            file.append(key, [pairs[key]])
    return path


def open_in_lmdb(path: Path, **settings: Any) -> Any:
    return lmdb.open(str(path), subdir=False, **settings)


def pairs_in_lmdb(path: Path) -> list[tuple[bytes, bytes]]:
    with open_in_lmdb(path, readonly=True, lock=False) as env, env.begin() as transaction:
        return list(transaction.cursor())


def value_of(image: bytes, label: int) -> bytes:
    return bytes(msgpack.packb((image, label)))


def image_of(size: int, content: int = 0) -> bytes:
    return b"\xff\xd8\xff" + bytes([content & 0xFF]) * size


def samples_of(source: Source) -> dict[str, tuple[bytes, int]]:
    """Image and label by name, read at the places that the index has."""
    index = source.index
    data = Path(index.root, index.files[0]).read_bytes()
    assert index.length is not None
    return {
        name: (data[begin : begin + length], label)
        for name, begin, length, label in zip(
            index.name, index.offset.tolist(), index.length.tolist(), index.targets, strict=True
        )
    }


def opened(path: Path, **settings: Any) -> Source:
    return open_source(path, progress=False, **settings)


def numbered(path: Path, num_samples: int, image_bytes: int = 3000) -> Path:
    """Write a file as tensorpack does, of images that differ."""
    with LmdbWriter(path) as file:
        for i in range(num_samples):
            file.append(tensorpack_key(i), tensorpack_value(image_of(image_bytes + i, i), i % 5))
        file.append(KEYS, [tensorpack_keys(num_samples)])
    return path


# ---- writing -------------------------------------------------------------------------------------

VALUE_BYTES = st.one_of(
    st.integers(0, 40), st.integers(2000, 2050), st.integers(4060, 4100), st.integers(0, 20_000)
)
CONTENTS = st.dictionaries(
    st.one_of(st.binary(min_size=1, max_size=12), st.binary(min_size=480, max_size=511)),
    VALUE_BYTES,
    max_size=60,
)


@given(CONTENTS)
@settings(max_examples=60, deadline=None)
def test_lmdb_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[bytes, int]
) -> None:
    path = tmp_path_factory.mktemp("written") / "a.lmdb"
    pairs = {key: os.urandom(size) for key, size in sorted(contents.items())}
    with LmdbWriter(path) as file:
        offsets = [
            file.append(key, [value[:3], memoryview(value)[3:]]) for key, value in pairs.items()
        ]
    data = path.read_bytes()
    for offset, value in zip(offsets, pairs.values(), strict=True):
        assert data[offset : offset + len(value)] == value
    assert pairs_in_lmdb(path) == list(pairs.items())
    with open_in_lmdb(path, readonly=True, lock=False) as env:
        stat, last_page = env.stat(), env.info()["last_pgno"]
        num_tree_pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        assert stat["entries"] == len(pairs)
        assert len(data) == (last_page + 1) * PAGE == (2 + num_tree_pages) * PAGE
        env.copy(str(path.with_name("copy.lmdb")), compact=True)
    assert pairs_in_lmdb(path.with_name("copy.lmdb")) == list(pairs.items())


@given(CONTENTS, CONTENTS, st.randoms())
@settings(max_examples=25, deadline=None)
def test_lmdb_goes_on_writing_to_it(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[bytes, int],
    added: dict[bytes, int],
    random: Any,
) -> None:
    pairs = {key: os.urandom(size) for key, size in before.items()}
    path = write(tmp_path_factory.mktemp("more") / "a.lmdb", pairs)
    with open_in_lmdb(path, map_size=1 << 26, lock=False) as env:
        for key, size in added.items():
            with env.begin(write=True) as transaction:
                pairs[key] = os.urandom(size)
                assert transaction.put(key, pairs[key])
                if random.random() < 0.5:
                    gone = random.choice(sorted(pairs))
                    assert transaction.delete(gone)
                    del pairs[gone]
    assert pairs_in_lmdb(path) == sorted(pairs.items())


@pytest.mark.parametrize("num_values", [*range(5, 12), *range(46, 62), 343, 344, 350, 351, 393])
def test_trees_of_every_shape_are_accepted(tmp_path: Path, num_values: int) -> None:
    # Seven keys of 500 bytes fill a page, so these have one child too many on some level.
    pairs = {b"%0500d" % i: bytes(2100) for i in range(num_values)}
    path = write(tmp_path / "a.lmdb", pairs)
    assert pairs_in_lmdb(path) == list(pairs.items())
    with open_in_lmdb(path, map_size=1 << 26, lock=False) as env, env.begin(write=True) as changed:
        for key in pairs:
            assert changed.delete(key)
    assert pairs_in_lmdb(path) == []


def test_the_same_appends_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (numbered(tmp_path / name, 700).read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("key", [b"", b"a" * 512, b"0001", b"0000"])
def test_keys_that_lmdb_would_not_take_are_refused(tmp_path: Path, key: bytes) -> None:
    with LmdbWriter(tmp_path / "a.lmdb") as file:
        file.append(b"0001", [b""])
        with pytest.raises(ValueError, match="key"):
            file.append(key, [b""])


def test_a_file_that_was_not_finished_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"

    def interrupted() -> None:
        with LmdbWriter(path) as file:
            file.append(b"0", [value_of(image_of(9000), 1)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(lmdb.Error):
        open_in_lmdb(path, readonly=True, lock=False)
    with pytest.raises(FileNotFoundError, match="which is no LMDB"):
        opened(path)


# ---- tensorpack ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 255, 256, 65535, 65536])
@pytest.mark.parametrize("label", [0, 127, 128, 255, 256, 999, 65536])
def test_values_are_tensorpacks(size: int, label: int) -> None:
    image = os.urandom(size)
    pair = [np.frombuffer(image, np.uint8), label]
    value = b"".join(tensorpack_value(image, label, "msgpack"))
    assert value == msgpack_numpy.dumps(pair, use_bin_type=True)
    array, got = pickle.loads(b"".join(tensorpack_value(image, label)))
    assert (array.dtype, array.shape, array.tobytes(), got) == (np.uint8, (size,), image, label)


@pytest.mark.parametrize("num_samples", [0, 1, 15, 16, 70_000])
def test_lists_of_keys_are_tensorpacks(num_samples: int) -> None:
    keys = [b"%08d" % i for i in range(num_samples)]
    assert pickle.loads(tensorpack_keys(num_samples)) == keys
    assert tensorpack_keys(num_samples, "msgpack") == msgpack_numpy.dumps(keys, use_bin_type=True)


@pytest.mark.parametrize("label", [-1, 1 << 31])
def test_labels_that_are_none_are_not_written(label: int) -> None:
    with pytest.raises(ValueError, match="a label"):
        tensorpack_value(b"", label)


# ---- walking the pages ---------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.integers(0, 400), VALUE_BYTES, max_size=40), max_size=8))
@settings(max_examples=40, deadline=None)
def test_samples_are_those_that_lmdb_finds(
    tmp_path_factory: pytest.TempPathFactory, transactions: list[dict[int, int]]
) -> None:
    """Also in a file with freed pages: each transaction deletes half of the samples."""
    path = tmp_path_factory.mktemp("walked") / "a.lmdb"
    expected: dict[bytes, tuple[bytes, int]] = {b"always": (image_of(9), 1)}
    with open_in_lmdb(path, map_size=1 << 26, lock=False) as env:
        for number, added in enumerate([{}, *transactions]):
            with env.begin(write=True) as transaction:
                for key in [key for key in expected if key != b"always"][::2]:
                    assert transaction.delete(key)
                    del expected[key]
                expected |= {b"%d" % i: (image_of(n, number), i) for i, n in added.items()}
                for key, pair in expected.items():
                    transaction.put(key, value_of(*pair), overwrite=True)
    found = samples_of(opened(path))
    assert found == {f"{key.decode()}.jpg": pair for key, pair in expected.items()}


@pytest.mark.parametrize("page_bytes", [1 << bits for bits in range(10, 16)])
def test_pages_of_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int
) -> None:
    monkeypatch.setattr(lmdb_file, "_PAGE_BYTES", page_bytes)
    monkeypatch.setattr(lmdb_file, "_MAX_NODE_BYTES", ((page_bytes - 16) // 2 & -2) - 2)
    path = numbered(tmp_path / "a.lmdb", 500)
    with open_in_lmdb(path, readonly=True, lock=False) as env:
        assert env.stat()["psize"] == page_bytes
        assert env.stat()["entries"] == 501
    found = samples_of(opened(path))
    assert found == {f"{i:08}.jpg": (image_of(3000 + i, i), i % 5) for i in range(500)}


def test_samples_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    source = opened(numbered(tmp_path / "a.lmdb", 500))
    assert list(source.index.name) == [f"{i:08}.jpg" for i in range(500)]
    assert (np.diff(source.index.offset) > 0).all()
    assert source.notes == ()


def test_all_samples_pass_by_once(tmp_path: Path) -> None:
    seen: list[tuple[int, str, bytes]] = []

    def visit(sample: Seen) -> None:
        seen.append((sample.sample, sample.name, bytes(sample.data)))

    path = numbered(tmp_path / "a.lmdb", 200)
    index = find_source(path).open(Opening(progress=False, visit=visit)).index
    expected = [(i, f"{i:08}.jpg", image_of(3000 + i, i)) for i in range(200)]
    assert seen == expected
    assert list(index.name) == [name for _, name, _ in expected]


def test_a_folder_with_data_mdb(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "a"), map_size=1 << 20) as env, env.begin(write=True) as changed:
        changed.put(b"cat.JPEG", value_of(IMAGE, 3))
        changed.put(b"n/dog.png", value_of(b"\x89PNG\r\n", 2))
    expected = {"cat.JPEG": (IMAGE, 3), "n/dog.png": (b"\x89PNG\r\n", 2)}
    assert samples_of(opened(tmp_path / "a")) == expected
    assert samples_of(opened(tmp_path)) == expected


def test_the_split_is_told_by_the_files_name(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val"), 1):
        numbered(tmp_path / f"ILSVRC-{split}.lmdb", number)
    assert len(opened(tmp_path, split="train").index) == 1
    assert len(opened(tmp_path, split="val").index) == 2
    with pytest.raises(SplitNeededError, match="split='train'"):
        opened(tmp_path)


def test_an_lmdb_is_recognised_by_its_content(tmp_path: Path) -> None:
    path = numbered(tmp_path / "imagenet", 3)
    assert find_source(path).kind == "lmdb"
    for name in ("a.lmdb", "a.mdb"):
        (tmp_path / name).write_bytes(b"no such thing" * 20)
        with pytest.raises(FileNotFoundError, match="expected 0xbeefc0de at byte 16"):
            opened(tmp_path / name)


# ---- values --------------------------------------------------------------------------------------


def parsed(value: bytes) -> tuple[bytes, int]:
    pair = find_pair(memoryview(value))
    content = memoryview(value)[pair.offset : pair.offset + pair.length]
    assert len(content) == pair.length
    return stored_bytes(content, pair.stored), pair.label


PAIRS = {
    "tuple of bytes": (IMAGE, 7),
    "list of bytes": [IMAGE, 7],
    "list of array": [ARRAY, 7],
    "tuple of writable array": (ARRAY.copy(), 7),
    "NumPy label": (IMAGE, np.int64(7)),
    "big-endian label": [ARRAY, np.array(7, ">i4")[()]],
    "uint8 label": [ARRAY, np.uint8(7)],
    "all bytes": (b"\xff\xd8" + bytes(range(256)) * 500, 7),
    "high label": (IMAGE, 70_000),
    "negative label": (IMAGE, -7),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", PAIRS)
def test_pickles(name: str, protocol: int) -> None:
    image, label = PAIRS[name]
    assert parsed(pickle.dumps(PAIRS[name], protocol)) == (bytes(image), label)


@pytest.mark.parametrize("use_bin_type", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_msgpack(name: str, use_bin_type: bool) -> None:
    image, label = PAIRS[name]
    value = msgpack_numpy.dumps(PAIRS[name], use_bin_type=use_bin_type)
    assert parsed(value) == (bytes(image), label)


PYTHON_2 = {
    "pickle, protocol 0": b"(S'\\xff\\xd8a\\'b\"c\\n\\\\'\np0\nI5\ntp1\n.",
    "cPickle, protocol 0": b"(lp1\nS'\\xff\\xd8a\\'b\"c\\n\\\\'\np2\naL5L\na.",
    "protocol 1": b"(U\x09\xff\xd8a'b\"c\n\\q\x00K\x05tq\x01.",
    "protocol 2": b"\x80\x02U\x09\xff\xd8a'b\"c\n\\q\x00K\x05\x86q\x01.",
}


@pytest.mark.parametrize("name", PYTHON_2)
def test_pickles_of_python_2(name: str) -> None:
    assert parsed(PYTHON_2[name]) == (b"\xff\xd8a'b\"c\n\\", 5)


def test_msgpack_of_the_first_releases() -> None:
    """msgpack_numpy 0.3.6 with msgpack-python 0.4.8 and use_bin_type=False."""
    value = b"\x92\x84\xa2nd\xc3\xa4type\xa3|u1\xa5shape\x91\x04\xa4data\xa4\xff\xd8\x01\x02\x07"
    assert parsed(value) == (b"\xff\xd8\x01\x02", 7)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.bin")), ids=lambda path: path.stem)
def test_pyarrow(path: Path) -> None:
    assert parsed(path.read_bytes()) == (IMAGE, 7)


def test_pyarrow_was_tested_in_all_its_forms() -> None:
    releases = {path.name.split("-")[0] for path in GOLDEN.glob("*.bin")}
    assert releases == {"0.8.0", "0.11.1", "0.14.1", "0.15.1", "0.17.1", "2.0.0", "10.0.1"}


NOT_PAIRS = {
    "one thing": [IMAGE],
    "three things": [IMAGE, 7, 8],
    "a number": 7,
    "a dictionary": {"image": IMAGE, "label": 7},
    "label first": (7, IMAGE),
    "text": ("\xff\xd8", 7),
    "label as text": (IMAGE, "7"),
    "label as a float": (IMAGE, 7.0),
    "label as a bool": (IMAGE, True),
    "no label": (IMAGE, None),
    "pixels": (ARRAY.reshape(9, 7), 7),
    "wide array": (ARRAY.astype(np.int16), 7),
    "array of objects": (np.array([IMAGE], object), 7),
    "label array": (IMAGE, np.array([7])),
    "nested": ([IMAGE, 7], 7),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NOT_PAIRS)
def test_pickles_of_other_things_are_refused(name: str, protocol: int) -> None:
    with pytest.raises(ValueFormError):
        parsed(pickle.dumps(NOT_PAIRS[name], protocol))


@pytest.mark.parametrize("name", [name for name in NOT_PAIRS if name != "text"])
def test_msgpack_of_other_things_is_refused(name: str) -> None:
    # Text is accepted: old writers put bytes there.
    with pytest.raises(ValueFormError):
        parsed(msgpack_numpy.dumps(NOT_PAIRS[name]))


class _Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["whole", "image", "label", "hidden"])
def test_nothing_that_a_pickle_calls_is_executed(tmp_path: Path, protocol: int, place: str) -> None:
    marker = tmp_path / "executed"
    evil = _Runs(os.system, f"touch {marker}")
    things = {
        "whole": evil,
        "image": (evil, 7),
        "label": (IMAGE, evil),
        "hidden": (IMAGE, _Runs(np.dtype, evil)),
    }
    value = pickle.dumps(things[place], protocol)
    path = write(tmp_path / "a.lmdb", {b"0": value})
    with pytest.raises(ValueFormError, match="system"):
        parsed(value)
    with pytest.raises(DataError, match="system"):
        opened(path)
    assert not marker.exists()
    if place == "whole":
        pickle.loads(value)
        assert marker.exists()  # unpickling executes it


@pytest.mark.parametrize(
    "value",
    [
        b"\x80\x04\x8c\x08builtins\x94\x8c\x04eval\x94\x93\x94\x8c\x03f()\x94\x85\x94R\x94.",
        b"(S'f()'\nios\nsystem\n.",
        b"(cos\nsystem\nS'f()'\no.",
        b"\x80\x02cos\nsystem\nX\x03\x00\x00\x00f()\x85\x81.",
        b"\x80\x02P1\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x97.",
        b"\x80\x02" + b"]q\x00h\x00a" * 200 + b".",
        b"\x80\x02(" * 100,
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"\x80\x04C\x05\xff\xd8",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80",
        b"I" + b"9" * 100_000 + b"\n.",
        b"(I" + b"9" * 100_000 + b"\nI1\nt.",
        b"\x92" * 1000,
        b"\x92\x84\xa2nd\xc3\xa4type\xa3|u1\xa5shape\x91\x04\xa4data\xc6\xff\xff\xff\xff\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"",
        b"\x00" * 4096,
        b"\x01" + b"\x00" * 7 + b"\xff" * 200,
    ],
)
def test_what_is_no_pair_is_refused(value: bytes) -> None:
    with pytest.raises(ValueFormError):
        parsed(value)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*")), ids=lambda path: path.name)
def test_places_of_64_bits_are_refused(path: Path) -> None:
    value = path.read_bytes()
    for at in range(0, len(value) - 8, 4):
        damaged = value[:at] + b"\xff" * 7 + b"\x7f" + value[at + 8 :]
        with contextlib.suppress(ValueFormError):
            parsed(damaged)


class _Array:
    """Pickles as an array with a shape that is none."""

    def __init__(self, shape: Any) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments, _ = np.arange(3, dtype=np.uint8).__reduce__()
        return function, arguments, (1, self._shape, np.dtype(np.uint8), False, b"abc")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda it: (_Array(it), 7),
        lambda it: (_Array((it,)), 7),
        lambda it: (it, 7),
        lambda it: (IMAGE, it),
        lambda it: (IMAGE, _Runs(it.__class__, it)),
    ],
)
def test_messages_do_not_grow_with_what_they_are_about(wrap: Callable[[Any], Any]) -> None:
    nested: Any = (3, 3)
    for _ in range(40):
        nested = (nested, nested)  # 2**40 numbers in 40 tuples
    with pytest.raises(ValueFormError) as error:
        parsed(pickle.dumps(wrap(nested), 2))
    assert len(str(error.value)) < 200


def _table(fields: dict[int, bytes], rest: bytes = b"") -> bytes:
    """A flatbuffers table of fields of 4 bytes, its places in front of it; then what it leads to.

    A field that is b"rest" gets the offset of `rest`.
    """
    places = struct.pack(f"<{max(fields) + 1}H", *(
        4 + 4 * list(fields).index(i) if i in fields else 0 for i in range(max(fields) + 1)
    ))  # fmt: skip
    places = struct.pack("<HH", 4 + len(places), 4 + 4 * len(fields)) + places
    table = struct.pack("<i", len(places))
    for value in fields.values():
        left = 4 * len(fields) + 4 - len(table)
        table += struct.pack("<I", left) if value == b"rest" else value
    return places + table + rest


def _at(content: bytes) -> bytes:
    """Put the offset of a table in front of it."""
    (size,) = struct.unpack_from("<H", content)
    return struct.pack("<I", 4 + size) + content


def test_a_schema_that_would_be_endless_is_refused() -> None:
    column = _table({2: struct.pack("<I", 13)})
    for _ in range(7):
        # 16 children that are one: each offset counts from its own place.
        begin = 4 * 16 + struct.unpack_from("<H", column)[0]
        children = struct.pack("<17I", 16, *(begin - 4 * i for i in range(16)))
        column = _table({2: struct.pack("<I", 13), 5: b"rest"}, children + column)
    fields = struct.pack("<I", 1) + _at(column)
    schema = _table({1: b"rest"}, fields)
    message = _at(_table({0: struct.pack("<I", 4), 1: struct.pack("<I", 1), 2: b"rest"}, b""))
    # The header is a table whose places come first, as those of all here do.
    message = message[:-4] + struct.pack("<I", 4 + struct.unpack_from("<H", schema)[0]) + schema
    value = (GOLDEN / "10.0.1-list_array.bin").read_bytes()
    (old_bytes,) = struct.unpack_from("<I", value, 20)
    message += bytes(-len(message) % 8)
    crafted = value[:20] + struct.pack("<I", len(message)) + message + value[24 + old_bytes :]
    with pytest.raises(ValueFormError, match="something else than an array, bytes or an integer"):
        parsed(crafted)


VALID = (
    *(pickle.dumps(pair, protocol) for pair in PAIRS.values() for protocol in (0, 2, 3, 4, 5)),
    *(msgpack_numpy.dumps(pair) for pair in PAIRS.values()),
    *(path.read_bytes() for path in sorted(GOLDEN.glob("*.bin"))),
)


@given(st.sampled_from([value for value in VALID if len(value) < 3000]), st.data())
@settings(max_examples=600, deadline=None)
def test_damaged_values_give_an_error_or_a_pair_inside(value: bytes, data: st.DataObject) -> None:
    damaged = bytearray(value)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.sampled_from([len(value), len(value) // 2, 700]))])
    try:
        image, label = parsed(cut)
    except ValueFormError:
        return
    assert len(image) <= len(cut)
    assert isinstance(label, int)


def outcome(value: bytes) -> tuple[bytes, int] | None:
    with contextlib.suppress(ValueFormError):
        return parsed(value)
    return None


USUAL = [
    *(pickle.dumps([ARRAY, label], 3) for label in (7, 300, 70_000, -7)),
    *(b"".join(tensorpack_value(IMAGE, label)) for label in (0, 999)),
]


@given(st.sampled_from(USUAL), st.data())
@settings(max_examples=400, deadline=None)
def test_the_usual_pickle_is_understood_as_any_other(value: bytes, data: st.DataObject) -> None:
    """Protocol 3 is matched as a whole; declared protocol 4, it is followed opcode by opcode."""
    damaged = bytearray(value)
    for _ in range(data.draw(st.integers(0, 2))):
        damaged[data.draw(st.integers(2, len(value) - 1))] = data.draw(st.integers(0, 255))
    rest = bytes(damaged[2 : data.draw(st.sampled_from([None, None, -1]))])
    assert outcome(b"\x80\x03" + rest) == outcome(b"\x80\x04" + rest)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_an_error_or_a_pair_inside(value: bytes) -> None:
    for begin in (b"", b"\x80\x04", b"(", b"\x92", bytes(8)):
        with contextlib.suppress(ValueFormError):
            assert len(parsed(begin + value)[0]) <= len(begin + value)


# ---- samples that can't be used ------------------------------------------------------------------

BAD = {
    "negative label": (value_of(IMAGE, -1), r"expected a label in \[0, 100000\), got -1"),
    "high label": (value_of(IMAGE, 1 << 40), r"expected a label in \[0, 100000\), got 1099511627"),
    "no image": (value_of(b"hello", 1), "expected an image, got 5 bytes that begin with b'hello'"),
    "another shape": (msgpack.packb(7), "expected msgpack, a pickle or pyarrow.serialize of"),
    "caffe": (b"\x08\x03\x10\x80\x02", r"begins with b'\\x08\\x03\\x10\\x80\\x02'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_an_error_or_is_left_out(tmp_path: Path, name: str) -> None:
    value, message = BAD[name]
    good = {b"%d" % i: value_of(image_of(i), i) for i in range(3)}
    path = write(tmp_path / "a.lmdb", {**good, b"1x": value})
    with pytest.raises(DataError, match=message) as error:
        opened(path)
    assert "b'1x'" in str(error.value)
    assert str(path) in str(error.value)
    source = opened(path, on_error="skip")
    assert sorted(source.index.name) == ["0.jpg", "1.jpg", "2.jpg"]
    assert any("left out 1 of 4" in note for note in source.notes)


# ---- images that are text ------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_images_that_are_stored_as_text(tmp_path: Path, protocol: int) -> None:
    images = [image_of(50_000 + i, i) + os.urandom(99) for i in range(200)]
    values = {b"%03d" % i: pickle.dumps((image, i), protocol) for i, image in enumerate(images)}
    path = write(tmp_path / "a.lmdb", {**values, KEYS: pickle.dumps(sorted(values), protocol)})
    os.utime(path, (1e9, 1e9))  # long ago, so that the index is kept
    ids = set()
    for _ in range(2):
        source = opened(path)
        index = source.index
        ids.add(index.id)  # it decides the order, which all ranks must agree on
        assert len(ids) == 1
        assert source.python_blocks == (protocol < 3)
        assert index.length is not None
        index.validate("here")
        assert list(index.targets) == list(range(200))
        assert list(index.length) == [len(image) for image in images]
        if source.python_blocks:
            blocks = [source.read_block(i) for i in range(len(index.files))]
            assert len(blocks) > 1
            found = [
                block.image(k).tobytes() for block in blocks for k in range(len(block.offsets))
            ]
            assert found == images
            chosen = source.take([150, 3])
            block = chosen.read_block(int(chosen.index.file[0]))
            assert block.image(int(chosen.index.offset[0])).tobytes() == images[150]
        else:
            assert [image for image, _ in samples_of(source).values()] == images


def test_one_thread_at_a_time_reads_from_a_disk_with_one_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.lmdb", {b"0": pickle.dumps((IMAGE, 0), 2)})
    for kind in ("hdd", "ssd"):
        monkeypatch.setenv("IMAGENET_SEQ_DISK", kind)
        source: Any = opened(path)
        with ThreadPoolExecutor(1) as pool:
            source.turns._threads = lock = NotedLock()
            with source.turns:
                block = pool.submit(source.read_block, 0)
                if kind == "hdd":
                    assert lock.was_asked(2)  # by this thread, and by the other
                    assert not block.done()
                else:
                    block.result(timeout=60)
            assert block.result().bytes.tobytes() == IMAGE


# ---- files that are not whole --------------------------------------------------------------------


def test_an_interrupted_run_of_tensorpack_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", {b"%08d" % i: value_of(IMAGE, 1) for i in range(3)})
    (note,) = opened(path).notes
    assert "has no __keys__" in note
    assert "3 samples" in note


@pytest.mark.parametrize(
    "about",
    [
        {b"__len__": pickle.dumps(4)},
        {b"__len__": pickle.dumps(4, 2)},
        {b"__len__": msgpack.packb(4)},
        {b"__keys__": msgpack.packb([b"%08d" % i for i in range(4)])},
        {b"__keys__": msgpack.packb([b"%08d" % i for i in range(400)])},
    ],
)
def test_a_count_that_is_not_met_is_an_error(tmp_path: Path, about: Pairs) -> None:
    samples = {b"%08d" % i: value_of(IMAGE, 1) for i in range(4)}
    short = dict(list(samples.items())[:3])
    path = write(tmp_path / "a.lmdb", {**short, **about})
    with pytest.raises(DataError, match="samples as it says itself, found 3: it is incomplete"):
        opened(path)
    os.utime(path, (1e9, 1e9))  # long ago, so that the index is kept
    assert "found 3" in opened(path, on_error="skip").notes[0]
    with pytest.raises(DataError, match="it is incomplete"):
        opened(path)
    if about != {b"__keys__": msgpack.packb([b"%08d" % i for i in range(400)])}:
        assert len(opened(write(tmp_path / "b.lmdb", {**samples, **about})).index) == 4


WRITER = """
import sys, lmdb, msgpack
env = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 24)
with env.begin(write=True) as transaction:
    for i in range(3):
        transaction.put(b"%08d" % i, msgpack.packb((b"\\xff\\xd8", 1)))
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="needs /proc/locks of Linux")
def test_a_file_that_a_writer_has_open(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        with pytest.raises(DataError, match=f"in use by a writer: process {process.pid}"):
            opened(path)
        (note,) = opened(path, on_error="skip").notes
        assert "has no __keys__" in note
        process.kill()
    assert path.with_name("a.lmdb-lock").exists()  # left over, and no obstacle
    assert len(opened(path).index) == 3


def test_a_file_that_is_written_to_meanwhile(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.lmdb", 300)

    def visit(sample: Seen) -> None:
        if sample.sample == 100:
            with open_in_lmdb(path, map_size=1 << 24) as env, env.begin(write=True) as changed:
                changed.delete(b"00000000")

    with pytest.raises(DataError, match=r"was written to while it was indexed"):
        find_source(path).open(Opening(progress=False, visit=visit))


def test_named_databases_and_several_values_are_refused(tmp_path: Path) -> None:
    for name, settings_ in ("named", {}), ("dupsort", {"dupsort": True}):
        path = tmp_path / f"{name}.lmdb"
        with open_in_lmdb(path, max_dbs=2, map_size=1 << 20) as env:
            database = env.open_db(b"images", **settings_)
            with env.begin(write=True, db=database) as transaction:
                transaction.put(b"0", value_of(IMAGE, 1)[:400])
        with pytest.raises(DataError, match="holds the named database b'images'"):
            opened(path)


def test_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected images, found none"):
        opened(write(tmp_path / "a.lmdb", {}))


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some short values in leaves, some long ones, two levels of pages."""
    path = tmp_path_factory.mktemp("small") / "a.lmdb"
    sizes = [30, 9000, 60, 2500]
    pairs = {b"%0400d" % i: value_of(image_of(sizes[i % 4] + i), i % 5) for i in range(12)}
    return write(path, pairs)


def _opened_or_none(path: Path) -> dict[str, tuple[bytes, int]] | None:
    try:
        return samples_of(opened(path))
    except (DataError, FileNotFoundError):
        return None


def _places(data: bytes) -> Iterable[int]:
    """Every byte of headers, tables and numbers, and some of the keys; images are zeros."""
    return (i for i, b in enumerate(data) if i % PAGE < 40 or (b and (b != 0x30 or i % 29 == 0)))


def test_any_byte_may_be_wrong(small: Path, tmp_path: Path) -> None:
    data, expected = small.read_bytes(), samples_of(opened(small))
    path = tmp_path / "a.lmdb"
    num_refused = 0
    for i in _places(data):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        found = _opened_or_none(path)
        num_refused += found is None
        if found is not None:  # one sample may have another name, image or label
            assert len(found.items() ^ expected.items()) <= 2, i
    assert num_refused > 300


def test_a_truncated_file(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    path = tmp_path / "a.lmdb"
    for size in [*range(0, len(data), 1999), *range(PAGE, len(data), PAGE), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises((DataError, FileNotFoundError), match=r"truncated|no LMDB|expected"):
            opened(path)


def _branch_and_leaves(data: bytes) -> tuple[int, list[int]]:
    """Root, and the pages that it leads to, of a tree of two levels."""
    flags = {i: struct.unpack_from("<H", data, i * PAGE + 10)[0] for i in range(len(data) // PAGE)}
    (root,) = (i for i, flag in flags.items() if flag == BRANCH)
    return root, [i for i, flag in flags.items() if flag == LEAF]


@pytest.mark.parametrize("where", ["itself", "its sibling", "outside", "a meta page"])
def test_pages_that_lead_round_or_outside(tmp_path: Path, where: str) -> None:
    path = numbered(tmp_path / "a.lmdb", 30, image_bytes=300)
    data = bytearray(path.read_bytes())
    root, leaves = _branch_and_leaves(data)
    target = {"itself": root, "its sibling": leaves[1], "outside": len(data), "a meta page": 1}
    (place,) = struct.unpack_from("<H", data, root * PAGE + 16)
    struct.pack_into("<HHH", data, root * PAGE + place, target[where], 0, 0)
    path.write_bytes(data)
    messages = {
        "itself": "two pages lead to it",
        "its sibling": "is not where it belongs",
        "outside": "expected a page number from 2 to",
        "a meta page": "expected a page number from 2 to",
    }
    with pytest.raises(DataError, match=messages[where]):
        opened(path)


def test_values_that_lie_over_one_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", {b"%d" % i: value_of(image_of(5000), i) for i in (1, 2)})
    data = bytearray(path.read_bytes())
    leaf = len(data) - PAGE
    first, second = struct.unpack_from("<HH", data, leaf + 16)
    data[leaf + second + 9 : leaf + second + 17] = data[leaf + first + 9 : leaf + first + 17]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"the values of b'1' and b'2' overlap"):
        opened(path)


def test_the_newer_meta_page_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    with open_in_lmdb(path, map_size=1 << 20) as env:
        for i in range(5):
            with env.begin(write=True) as transaction:
                transaction.put(b"cat %d" % i, value_of(image_of(i), i))
            assert len(opened(path).index) == i + 1
    data = bytearray(path.read_bytes())
    data[PAGE + 16] ^= 0xFF  # the second one, of transactions 1, 3, 5, damaged
    path.write_bytes(data)
    assert len(opened(path).index) == 4
