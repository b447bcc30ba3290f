"""FFCV's .beton files with JPEGs, pixels and other fields, and damaged in every way.

That labels and pixels are those that FFCV stored is in test_sources.py.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagenet_seq.errors import DataError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.place import SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

FIXTURES = Path(__file__).parents[1] / "fixtures" / "ffcv"
FLOAT, INT, IMAGE, BYTES, ARRAY, JSON = range(6)
DATA_BEGIN = 8192


# ---- a writer ------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """An image as a .beton file has it."""

    mode: int  # 0: JPEG, 1: pixels
    width: int
    height: int
    data: bytes


def photo(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return photo_like(np.random.default_rng(seed), width, height)


def as_jpeg(image: Image.Image) -> Stored:
    return Stored(0, image.width, image.height, jpeg_bytes(image))


def as_pixels(image: Image.Image) -> Stored:
    return Stored(1, image.width, image.height, image.tobytes())


class Beton:
    """The parts of a file; change them before `write`."""

    def __init__(self, samples: Sequence[tuple[Stored, int]]) -> None:
        self.version, self.fields = 2, [(IMAGE, b"image"), (INT, b"label")]
        self.rows, self.allocations, self.data = [], [], b""
        for i, (image, label) in enumerate(samples):
            begin = DATA_BEGIN + len(self.data)
            self.rows.append([image.mode, image.width, image.height, begin, label])
            self.allocations.append([i, begin, len(image.data)])
            self.data += image.data
        self.num_samples = len(samples)

    def metadata(self) -> bytes:
        return b"".join(struct.pack("<BHHQ3xq", *row) for row in self.rows)

    def write(self, path: Path) -> Path:
        table = b"".join(struct.pack("<QQQ", *row) for row in self.allocations)
        header = struct.pack(
            "<HHIQQ", self.version, len(self.fields), 1 << 21, self.num_samples,
            DATA_BEGIN + len(self.data),
        )  # fmt: skip
        described = b"".join(
            struct.pack("<B16s1024x", number, name) for number, name in self.fields
        )
        tables = (header + described + self.metadata()).ljust(DATA_BEGIN, b"\0")
        path.write_bytes(tables + self.data + table)
        return path


def three() -> Beton:
    return Beton([(as_jpeg(photo(i)), i) for i in range(3)])


def stored(source: Source, sample: int) -> bytes:
    """Return a sample's bytes as the loader gets them."""
    index = source.index
    if not source.python_blocks:
        data = (Path(index.root) / index.files[index.file[sample]]).read_bytes()
        return data[index.offset[sample] :][: index.length[sample]]
    block = source.read_block(int(index.file[sample]))
    ordinal = int(index.offset[sample])
    assert block.lengths[ordinal] == index.length[sample]
    return block.image(ordinal).tobytes()


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_source(path)
    return str(caught.value)


# ---- what is found -------------------------------------------------------------------------------


def test_a_folder_has_one_file_of_a_split(tmp_path: Path) -> None:
    three().write(tmp_path / "train_500_0.50_90.ffcv")
    assert len(open_source(tmp_path, "train").index) == 3
    with pytest.raises(FileNotFoundError, match=r"90\.ffcv, but no \.beton file of split val"):
        open_source(tmp_path, "val")
    Beton([(as_jpeg(photo(9)), 4)]).write(tmp_path / "val.beton")
    assert len(open_source(tmp_path, "val").index) == 1
    with pytest.raises(SplitNeededError):
        open_source(tmp_path)
    three().write(tmp_path / "train_400.beton")
    with pytest.raises(ValueError, match=r"several \.beton files: train_400\.beton, train_500"):
        open_source(tmp_path, "train")


def test_a_file_of_any_name_is_told_by_content(tmp_path: Path) -> None:
    assert find_source(three().write(tmp_path / "imagenet")).kind == "beton"


def test_a_file_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its index is kept: for files that were not changed a moment ago."""
    os.utime(three().write(tmp_path / "a.beton"), (1_000_000_000, 1_000_000_000))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert stored(open_source("a.beton"), 1) == jpeg_bytes(photo(1))


def test_jpegs_are_read_in_place(tmp_path: Path) -> None:
    source = open_source(three().write(tmp_path / "a.beton"))
    assert not source.python_blocks
    assert [stored(source, i) for i in range(3)] == [jpeg_bytes(photo(i)) for i in range(3)]
    assert list(source.index.name) == [f"0000000{i}.jpg" for i in range(3)]
    assert (source.index.width[0], source.index.height[0]) == (40, 30)


def test_pixels_come_as_they_are(tmp_path: Path) -> None:
    """In blocks of samples that lie together; a JPEG among them keeps its bytes."""
    images = [photo(i, 900 + i, 1000) for i in range(8)]
    samples = [(as_jpeg(im) if i == 5 else as_pixels(im), i) for i, im in enumerate(images)]
    beton = Beton(samples)
    beton.rows.reverse()  # samples are in the order of the metadata
    source = open_source(beton.write(tmp_path / "a.beton"))
    assert source.python_blocks
    assert list(source.index.targets) == list(range(7, -1, -1))
    assert sorted(source.index.file) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(source.index.files) == 2
    for i, image in enumerate(reversed(images)):
        data = stored(source, i)
        if i == 2:
            assert data == jpeg_bytes(image)
        else:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))
    taken = source.take([6, 1])
    assert stored(taken, 1) == stored(source, 1)


def test_other_fields_are_passed_over(tmp_path: Path) -> None:
    beton = three()
    names = [(FLOAT, b"weight"), (BYTES, b"key"), (IMAGE, b"x"), (JSON, b"j"), (ARRAY, b"a")]
    beton.fields = [*names, (INT, b"index"), (INT, b"label")]
    beton.metadata = lambda: b"".join(
        struct.pack("<dQQBHHQ3xQQQqq", 0.5, row[3], 0, *row[:4], row[3], 0, 0, 77, row[4])
        for row in beton.rows
    )
    for row in list(beton.allocations):
        beton.allocations.insert(0, [row[0], row[1], 0])  # an empty field begins there, too
    source = open_source(beton.write(tmp_path / "a.beton"))
    assert list(source.index.targets) == [0, 1, 2]
    assert stored(source, 2) == jpeg_bytes(photo(2))


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        [(INT, b"label")],
        [(IMAGE, b"image")],
        [(IMAGE, b"a"), (IMAGE, b"b"), (INT, b"label")],
        [(IMAGE, b"image"), (INT, b"a"), (INT, b"b")],
        [(IMAGE, b"image"), (INT, b"label"), (255, b"own")],
    ],
)
def test_fields_that_leave_a_choice_are_refused(
    tmp_path: Path, fields: list[tuple[int, bytes]]
) -> None:
    beton = three()
    beton.fields = fields
    said = refusal(beton.write(tmp_path / "a.beton"))
    assert "among them one image (type 2) and one integer (type 1)" in said
    assert f"'{fields[-1][1].decode()}' (type {fields[-1][0]})" in said


def test_another_version_is_named(tmp_path: Path) -> None:
    beton = three()
    beton.version = 1
    with pytest.raises(
        FileNotFoundError, match=r"expected a \.beton file of version 2 .* version 1"
    ):
        find_source(beton.write(tmp_path / "a.beton"))


def test_a_file_that_was_not_written_to_its_end_is_refused(tmp_path: Path) -> None:
    path = three().write(tmp_path / "a.beton")
    data = path.read_bytes()
    path.write_bytes(data[:10])
    with pytest.raises(FileNotFoundError, match="got one of 10 bytes"):
        find_source(path)
    path.write_bytes(data[: DATA_BEGIN + 100])
    assert "truncated, or was not written to its end" in refusal(path)
    path.write_bytes(data[:-1])
    assert "truncated or damaged" in refusal(path)


def test_more_samples_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    beton = three()
    beton.num_samples = 5000
    assert "expected 5000 rows of 24 bytes" in refusal(beton.write(tmp_path / "a.beton"))


PROBLEMS = {
    "not allocated": ("allocations", 1, None, "its data, allocated before"),
    "beyond the data": ("allocations", 2, 1 << 40, "its data, allocated before"),
    "size that wraps": ("allocations", 2, (1 << 64) - 1, "its data, allocated before"),
    "mode": ("rows", 0, 7, "mode 0 (JPEG) or 1 (pixels), got 7"),
    "pixels of another size": ("rows", 0, 1, "an image, got one of 40 x 30 pixels in"),
    "no width": ("rows", 1, 0, "an image, got one of 0 x 30 pixels"),
    "place": ("rows", 3, (1 << 64) - 5, f"its data, .* got offset {(1 << 64) - 5}"),
    "negative label": ("rows", 4, -1, "a label in [0, 100000), got -1"),
    "huge label": ("rows", 4, 1 << 50, f"a label in [0, 100000), got {1 << 50}"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_damaged_sample_is_a_problem(tmp_path: Path, name: str) -> None:
    table, column, value, said = PROBLEMS[name]
    beton = three()
    getattr(beton, table)[1][column] = 5 if value is None else value
    path = beton.write(tmp_path / "a.beton")
    found = refusal(path)
    assert "sample 1: expected" in found
    assert all(part in found for part in said.split(" .* "))
    source = open_source(path, on_error="skip")
    assert list(source.index.targets) == [0, 2]
    assert list(source.index.name) == ["00000000.jpg", "00000002.jpg"]
    assert "left out 1 of 3" in source.notes[0]


def test_a_file_without_samples_is_none(tmp_path: Path) -> None:
    beton = three()
    beton.allocations = []  # as FFCV writes it where that failed
    path = beton.write(tmp_path / "a.beton")
    with pytest.raises(DataError, match="expected images, found none"):
        open_source(path, on_error="skip")


def test_a_file_cut_short_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    path = Beton([(as_pixels(photo(i)), i) for i in range(2)]).write(tmp_path / "a.beton")
    source = open_source(path)
    path.write_bytes(path.read_bytes()[: DATA_BEGIN + 5000])
    with pytest.raises(DataError, match="cut short since it was opened"):
        source.read_block(0)


def test_a_kept_index_that_is_damaged_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Beton([(as_pixels(photo(i)), i) for i in range(2)]).write(tmp_path / "a.beton")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    open_source(path)
    [kept] = (tmp_path / "cache").glob("*.index")
    data, begins = kept.read_bytes(), struct.pack("<QQ", DATA_BEGIN, DATA_BEGIN + 3600)
    assert data.count(begins) == 1
    kept.write_bytes(data.replace(begins, b"\xff" * 7 + b"\x3f" + begins[8:]))
    with pytest.raises(DataError, match="its cached index is damaged"):
        open_source(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tables_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["val.beton", "val_proportion.beton"]))
    content = bytearray((FIXTURES / name).read_bytes())
    (table,) = struct.unpack_from("<Q", content, 16)
    interesting = [*range(42), *range(1065, 1083), *range(2106, 2106 + 240)]
    interesting += range(table, len(content))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.sampled_from(interesting))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    try:
        source = open_source(path, on_error="skip")
    except (DataError, FileNotFoundError):
        return
    index = source.index
    if source.python_blocks:
        for number in set(index.file.tolist()):
            block = source.read_block(number)
            assert (block.offsets + block.lengths <= len(block.bytes)).all()
    else:
        assert (index.offset >= 24).all()
        assert (index.offset + index.length <= len(content)).all()
