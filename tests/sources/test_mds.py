"""MosaicML's MDS with columns of all kinds, compressed and not, and damaged in every way.

That labels and pixels are the images' is in test_sources.py.
"""

from __future__ import annotations

import builtins
import bz2
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from helpers.locks import NotedLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagenet_seq.errors import DataError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.place import Opening, SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
JPEG = jpeg_bytes(photo_like(np.random.default_rng(0), 40, 30))


# ---- a writer ------------------------------------------------------------------------------------

LAYOUTS = {"int": "<q", "uint16": "<H", "int8": "<b"}


def pil(image: Image.Image) -> bytes:
    mode = image.mode.encode()
    return struct.pack("<3I", *image.size, len(mode)) + mode + image.tobytes()


def encoded(encoding: str, value: Any) -> bytes:
    if encoding in LAYOUTS:
        return struct.pack(LAYOUTS[encoding], value)
    return value.encode() if isinstance(value, str) else bytes(value)


def shard_bytes(columns: Mapping[str, str], samples: Iterable[Mapping[str, Any]]) -> bytes:
    """Encode samples; columns are sorted, as MDSWriter sorts them."""
    parts = []
    for sample in samples:
        data = [encoded(columns[name], sample[name]) for name in sorted(columns)]
        free = [
            len(d)
            for d, name in zip(data, sorted(columns), strict=True)
            if columns[name] not in LAYOUTS
        ]
        parts.append(struct.pack(f"<{len(free)}I", *free) + b"".join(data))
    described = b'{"a copy": "of what index.json says"}'
    begins = 4 * (len(parts) + 2) + len(described) + np.cumsum([0, *map(len, parts)])
    table = struct.pack("<I", len(parts)) + begins.astype("<u4").tobytes()
    return table + described + b"".join(parts)


class Mds:
    """A folder of shards; change `about` (its index.json) before `save`."""

    def __init__(self, folder: Path, columns: Mapping[str, str]) -> None:
        self.folder, self.columns = folder, columns
        self.about: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        *samples: Mapping[str, Any],
        compression: str | None = None,
        compress: Callable[[bytes], bytes] = bytes,
        hashed: str = "sha1",
    ) -> Mds:
        raw = shard_bytes(self.columns, samples)
        name = f"shard.{len(self.about):05d}.mds"
        about = {
            "version": 2,
            "format": "mds",
            "column_names": sorted(self.columns),
            "column_encodings": [self.columns[n] for n in sorted(self.columns)],
            "column_sizes": [
                struct.calcsize(LAYOUTS[self.columns[n]]) if self.columns[n] in LAYOUTS else None
                for n in sorted(self.columns)
            ],
            "compression": compression,
            "samples": len(samples),
            "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}},
            "zip_data": None,
        }
        if hashed in hashlib.algorithms_available:
            about["raw_data"]["hashes"] = {hashed: hashlib.new(hashed, raw).hexdigest()}
        if compression is not None:
            data, name = compress(raw), f"{name}.{compression.split(':')[0]}"
            about["zip_data"] = {"basename": name, "bytes": len(data), "hashes": {}}
            (self.folder / name).write_bytes(data)
        else:
            (self.folder / name).write_bytes(raw)
        self.about.append(about)
        return self

    def save(self) -> Path:
        text = json.dumps({"version": 2, "shards": self.about})
        (self.folder / "index.json").write_text(text)
        return self.folder


COLUMNS = {"image": "jpeg", "label": "int"}


def sample(label: Any, image: bytes = JPEG, **others: Any) -> dict[str, Any]:
    return {"image": image, "label": label, **others}


def two_shards(folder: Path, **options: Any) -> Mds:
    return Mds(folder, COLUMNS).add(sample(0), sample(1)).add(sample(2), **options)


def stored(source: Source, number: int) -> bytes:
    """Return a sample's bytes as the loader gets them."""
    index = source.index
    if not source.python_blocks:
        data = (Path(index.root) / index.files[index.file[number]]).read_bytes()
        return data[index.offset[number] :][: index.length[number]]
    block = source.read_block(int(index.file[number]))
    ordinal = int(index.offset[number])
    assert block.lengths[ordinal] == index.length[number]
    return block.image(ordinal).tobytes()


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_source(path, progress=False)
    return str(caught.value)


# ---- what is found -------------------------------------------------------------------------------


def test_splits_are_folders(tmp_path: Path) -> None:
    two_shards(tmp_path / "train").save()
    Mds(tmp_path / "val", COLUMNS).add(sample(1)).save()
    assert list(open_source(tmp_path, "train").index.targets) == [0, 1, 2]
    assert list(open_source(tmp_path, "val").index.targets) == [1]
    with pytest.raises(SplitNeededError, match="MDS shards in train and val"):
        open_source(tmp_path)


def test_an_index_json_of_something_else_is_none(tmp_path: Path) -> None:
    for text in ('{"weight_map": {}}', "[1, 2]", "no json", "[" * 100_000):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(FileNotFoundError):
            find_source(tmp_path)
    mds = two_shards(tmp_path)
    mds.about[0]["format"] = "csv"
    with pytest.raises(FileNotFoundError, match=r"shards in format csv, mds, not mds"):
        find_source(mds.save())


def test_images_are_read_in_place(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n and so on"
    mds = Mds(tmp_path, {"i": "int", "x": "bytes", "y": "uint16"})
    mds.add({"i": 7, "x": JPEG, "y": 300}, {"i": 8, "x": png, "y": 0})
    source = open_source(mds.save())
    assert not source.python_blocks
    assert [stored(source, 0), stored(source, 1)] == [JPEG, png]
    assert list(source.index.targets) == [300, 0]
    assert list(source.index.name) == ["000000.jpg", "000001.png"]


def test_a_scan_shows_the_images_that_pass_by(tmp_path: Path) -> None:
    pixels = Image.new("RGB", (5, 4), "red")
    mds = Mds(tmp_path, {"image": "pil", "label": "int"})
    seen = []
    how = Opening(progress=False, visit=lambda s: seen.append((s.name, bytes(s.data))))
    find_source(mds.add(sample(1, pil(pixels))).save()).open(how)
    assert seen == [("000000.ppm", b"P6\n5 4\n255\n" + pixels.tobytes())]


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["n02", "n01", "n02"], ("n01", "n02")),
        (["1", "0", "1"], ("0", "1")),
        (["crane", "12", "crane"], ("12", "crane")),
        (["1234567890", "crane", "1234567890"], ("1234567890", "crane")),
    ],
)
def test_labels_may_be_text(tmp_path: Path, texts: list[str], classes: tuple[str, ...]) -> None:
    mds = Mds(tmp_path, {"image": "jpeg", "class": "str"})
    mds.add(*({"image": JPEG, "class": text} for text in texts))
    index = open_source(mds.save()).index
    assert index.classes == classes
    assert [index.classes[label] for label in index.targets] == texts


# ---- blocks --------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))


@pytest.mark.parametrize(
    ("compression", "compress"), [("zstd:7", zstd), ("gz", gzip.compress), ("bz2", bz2.compress)]
)
def test_a_compressed_shard_is_a_block(
    tmp_path: Path, compression: str, compress: Callable[[bytes], bytes]
) -> None:
    mds = two_shards(tmp_path, compression=compression, compress=compress)
    for _ in range(2):  # scanned, and kept
        source = open_source(mds.save())
        assert source.python_blocks
        assert list(source.index.file) == [0, 0, 1]
        assert list(source.index.offset) == [0, 1, 0]
        assert {stored(source, i) for i in range(3)} == {JPEG}
    assert stored(source.take([2]), 0) == JPEG


def test_uncompressed_shards_are_preferred(tmp_path: Path) -> None:
    mds = two_shards(tmp_path, compression="gz", compress=gzip.compress)
    raw = gzip.decompress((tmp_path / "shard.00001.mds.gz").read_bytes())
    (tmp_path / "shard.00001.mds").write_bytes(raw)
    assert not open_source(mds.save()).python_blocks


def test_one_thread_at_a_time_reads_from_a_disk_with_one_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for its turn, whatever the block; elsewhere several threads read."""
    mds = two_shards(tmp_path, compression="gz", compress=gzip.compress).save()
    for kind in ("hdd", "ssd"):
        monkeypatch.setenv("IMAGENET_SEQ_DISK", kind)
        source: Any = open_source(mds)
        with ThreadPoolExecutor(2) as pool:
            source.turns._threads = lock = NotedLock()
            with source.turns:
                blocks = [pool.submit(source.read_block, number) for number in (0, 1)]
                if kind == "hdd":
                    assert lock.was_asked(3)  # by this thread, and by the others
                    assert not any(block.done() for block in blocks)
                else:
                    assert len(wait(blocks, timeout=60).done) == 2
            assert all(len(block.result().bytes) for block in blocks)


def test_pixels_come_as_they_are(tmp_path: Path) -> None:
    photo = photo_like(np.random.default_rng(1), 40, 30)
    images = [photo, photo.convert("L"), photo.resize((12345, 1)), photo.resize((1, 1))]
    images += [image.convert("L") for image in images[2:]]  # less bytes than the header has
    mds = Mds(tmp_path, {"image": "pil", "label": "int"})
    mds.add(*(sample(i, pil(image)) for i, image in enumerate(images)))
    source = open_source(mds.save())
    assert source.python_blocks
    assert (source.index.width[2], source.index.height[2]) == (12345, 1)
    for i, image in enumerate(images):
        read = Image.open(io.BytesIO(stored(source, i)))
        assert read.mode == image.mode
        assert np.array_equal(np.asarray(read), np.asarray(image))


def test_pixels_of_another_mode_are_a_problem(tmp_path: Path) -> None:
    mds = Mds(tmp_path, {"image": "pil", "label": "int"})
    mds.add(sample(0, pil(Image.new("CMYK", (2, 2)))), sample(1, pil(Image.new("L", (2, 2)))))
    assert "sample 0 at offset" in refusal(mds.save())
    assert "expected pixels of mode RGB or L, got b'CMYK'" in refusal(tmp_path)
    source = open_source(tmp_path, on_error="skip", progress=False)
    assert Image.open(io.BytesIO(stored(source, 0))).size == (2, 2)


# ---- damage --------------------------------------------------------------------------------------


def test_zstd_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *others: Any, **named: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *others, **named)

    mds = two_shards(tmp_path, compression="zstd", compress=bytes)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install zstandard"):
        open_source(mds.save(), progress=False)


def test_another_compression_is_named(tmp_path: Path) -> None:
    mds = two_shards(tmp_path, compression="snappy")
    assert "shard 1: expected shards that are not compressed" in refusal(mds.save())
    assert "got 'snappy': decompress them" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("compression", "compress"), [("zstd", zstd), ("gz", gzip.compress), ("bz2", bz2.compress)]
)
@pytest.mark.parametrize("damage", ["changed", "short", "long", "truncated"])
def test_damaged_compressed_shards_are_refused(
    tmp_path: Path, compression: str, compress: Callable[[bytes], bytes], damage: str
) -> None:
    def damaged(raw: bytes) -> bytes:
        if damage == "short":
            return compress(raw[:-1])
        if damage == "long":
            return compress(raw + b"x")
        data = compress(raw)
        if damage == "truncated":
            return data[: len(data) // 2]
        return bytes([*data[:9], *(byte ^ 0x5A for byte in data[9:60]), *data[60:]])

    mds = two_shards(tmp_path, compression=compression, compress=damaged, hashed="sha1")
    said = refusal(mds.save())
    assert f"shard.00001.mds.{compression}" in said
    assert "download" in said


def test_a_block_that_was_damaged_since_is_refused(tmp_path: Path) -> None:
    mds = two_shards(tmp_path, compression="gz", compress=gzip.compress)
    source = open_source(mds.save())
    (tmp_path / "shard.00001.mds.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"shard\.00001\.mds\.gz: .* got damaged ones"):
        source.read_block(1)
    (tmp_path / "shard.00000.mds").write_bytes(b"short")
    with pytest.raises(DataError, match=r"shard\.00000\.mds: expected .* bytes, got 5"):
        source.read_block(0)


def test_a_wrong_hash_is_found(tmp_path: Path) -> None:
    path = two_shards(tmp_path).save() / "shard.00001.mds"
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"\0" + data[-19:])  # inside the image
    assert "shard.00001.mds: expected bytes whose sha1 is" in refusal(tmp_path)


def test_a_hash_that_python_lacks_is_not_checked(tmp_path: Path) -> None:
    mds = two_shards(tmp_path)
    mds.about[0]["raw_data"]["hashes"] = {"xxh64": "0" * 16}
    assert len(open_source(mds.save()).index) == 3


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (two_shards(tmp_path).save() / "shard.00001.mds").unlink()
    said = refusal(tmp_path)
    assert "shard 1:" in said
    assert "shard.00001.mds is missing: download" in said


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    path = two_shards(tmp_path).save() / "shard.00001.mds"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    assert f"expected {len(data)} bytes, got {len(data) + change}" in refusal(tmp_path)


ABOUT = {
    "version": ("version", 1, "expected version 2 and format 'mds', got 1"),
    "samples": ("samples", -1, "expected a number of 'samples' that fit into"),
    "no samples": ("samples", None, "bytes, got None"),
    "other samples": ("samples", 1, "expected 1 samples that begin one after the other"),
    "many samples": ("samples", 1 << 20, f"bytes, got {1 << 20}"),
    "no file": ("raw_data", None, "expected 'raw_data' with 'basename' and 'bytes', got None"),
    "columns": ("column_names", ["image"], "expected names, encodings and sizes of columns"),
    "no columns": ("column_sizes", None, "expected names, encodings and sizes of columns"),
    "size": ("column_sizes", [None, -8], "expected names, encodings and sizes of columns"),
    "no image": ("column_encodings", ["int", "int"], "expected a column of images"),
    "no label": ("column_encodings", ["jpeg", "float32"], "one of labels (integers or str)"),
    "pickles": ("column_encodings", ["pkl", "int"], "got image: pkl, label: int"),
    "other label": ("column_encodings", ["jpeg", "int8"], "expected a label of type int8, got 8"),
}


@pytest.mark.parametrize("name", ABOUT)
def test_a_wrong_description_is_refused(tmp_path: Path, name: str) -> None:
    key, value, said = ABOUT[name]
    mds = Mds(tmp_path, COLUMNS).add(sample(0), sample(1))
    mds.about[0][key] = value
    assert said in refusal(mds.save())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("basename", "../shard.00000.mds", "expected the name of a file in the folder"),
        ("basename", "/etc/passwd", "expected the name of a file in the folder"),
        ("basename", "a\0b", "expected the name of a file in the folder"),
        ("basename", 5, "expected the name of a file in the folder"),
        ("bytes", 1 << 32, f"expected at most {(1 << 32) - 1} bytes"),
        ("hashes", [1], "expected 'hashes' by algorithm"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, key: str, value: object, said: str) -> None:
    mds = two_shards(tmp_path)
    mds.about[0]["raw_data"][key] = value
    assert said in refusal(mds.save())


def test_shards_must_be_alike_and_different(tmp_path: Path) -> None:
    mds = two_shards(tmp_path / "a")
    mds.about[1]["column_encodings"] = ["jpeg", "int64"]
    assert "expected the same columns in all shards" in refusal(mds.save())
    mds = two_shards(tmp_path / "b")
    mds.about[1] = mds.about[0]
    assert "one is named twice" in refusal(mds.save())
    mds.about = []
    with pytest.raises(FileNotFoundError, match=r"index\.json of shards in format unknown"):
        find_source(mds.save())


def test_columns_that_leave_a_choice_are_refused(tmp_path: Path) -> None:
    mds = Mds(tmp_path, {"a": "jpeg", "b": "jpeg", "label": "int"})
    mds.add({"a": JPEG, "b": JPEG, "label": 1})
    assert "got a: jpeg, b: jpeg, label: int" in refusal(mds.save())


PROBLEMS = {
    "negative label": (sample(-1), "expected a label in [0, 100000), got -1"),
    "huge label": (sample(1 << 40), f"expected a label in [0, 100000), got {1 << 40}"),
    "no image": (sample(1, b""), "expected an image, got no bytes"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_sample_that_is_none_is_a_problem(tmp_path: Path, name: str) -> None:
    wrong, said = PROBLEMS[name]
    mds = Mds(tmp_path, COLUMNS).add(sample(0), wrong, sample(2))
    found = refusal(mds.save())
    assert "sample 1 at offset" in found
    assert said in found
    source = open_source(tmp_path, on_error="skip", progress=False)
    assert list(source.index.targets) == [0, 2]
    assert list(source.index.name) == ["000000.jpg", "000002.jpg"]
    assert "left out 1 of 3" in source.notes[0]


def test_text_that_is_no_class_is_a_problem(tmp_path: Path) -> None:
    mds = Mds(tmp_path, {"image": "jpeg", "label": "str"}).add(sample(" "), sample("n01"))
    assert "expected a class as text" in refusal(mds.save())


def test_a_sample_of_another_length_is_a_problem(tmp_path: Path) -> None:
    mds = Mds(tmp_path, COLUMNS).add(sample(0), hashed="none")
    path = mds.save() / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<I", len(JPEG)))
    data[at] ^= 1
    path.write_bytes(data)
    assert f"expected columns of {4 + 8 + (len(JPEG) ^ 1)} bytes in all, got" in refusal(tmp_path)


def test_a_kept_index_that_is_damaged_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sample lies in its block comes from there, and is used by native code."""
    mds = two_shards(tmp_path / "data", compression="gz", compress=gzip.compress)
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    old = 1_000_000_000
    for path in mds.save().iterdir():
        os.utime(path, (old, old))
    source = open_source(tmp_path / "data")
    [kept] = (tmp_path / "cache").glob("*.index")
    begin = source.read_block(0).offsets.astype("<i8").tobytes()
    data = kept.read_bytes()
    assert data.count(begin) == 1
    kept.write_bytes(data.replace(begin, b"\xff" * 7 + b"\x3f" + begin[8:]))
    with pytest.raises(DataError, match="its cached index is damaged"):
        open_source(tmp_path / "data")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_shard_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    compressed = data.draw(st.booleans())
    pixels = pil(Image.new("RGB", (7, 5), "blue"))
    mds = Mds(folder, {"image": "pil" if compressed else "jpeg", "label": "int"})
    mds.add(*(sample(i, pixels if compressed else JPEG[:200]) for i in range(3)), hashed="none")
    path = mds.save() / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 130))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        source = open_source(folder, on_error="skip", progress=False)
    except DataError:
        return
    for i in range(len(source.index)):
        assert len(stored(source, i)) == source.index.length[i] > 0


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10_000), new=st.binary(min_size=1, max_size=2))
def test_any_index_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any") / "val"
    shutil.copytree(FIXTURES / "mds" / "val", folder)
    content = bytearray((folder / "index.json").read_bytes())
    content[at % len(content)] = new[0]
    content[at % len(content) : at % len(content) + 1] = new
    (folder / "index.json").write_bytes(content)
    try:
        source = open_source(folder, progress=False)
    except (DataError, FileNotFoundError):
        return
    assert 0 < len(source.index) <= 10
