"""TFRecord files, as TFDS, Inception and others write them, and damaged in every way.

That labels and pixels are the images' is in test_sources.py.
"""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq import native
from imagenet_seq.errors import DataError
from imagenet_seq.index.classes import imagenet_classes
from imagenet_seq.index.source import Source
from imagenet_seq.sources.place import Opening, SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tfrecord"
INCEPTION, TFDS = FIXTURES / "inception", FIXTURES / "tfds"
JPEG = jpeg_bytes(photo_like(np.random.default_rng(0), 40, 30))

Value = bytes | int | float


# ---- a writer ------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(value: Value, packed: bool = True) -> bytes:
    if isinstance(value, bytes):
        return field(1, field(1, value))
    if isinstance(value, float):
        return field(2, field(1, struct.pack("<f", value)))
    encoded = varint(value & (1 << 64) - 1)
    return field(3, field(1, encoded) if packed else b"\x08" + encoded)


def entry(key: str, value: bytes, key_first: bool = True) -> bytes:
    parts = [field(1, key.encode()), field(2, value)]
    return field(1, b"".join(parts if key_first else reversed(parts)))


def example(values: Mapping[str, Value], packed: bool = True, key_first: bool = True) -> bytes:
    entries = (entry(key, feature(value, packed), key_first) for key, value in values.items())
    return field(1, b"".join(entries))


def masked_crc(data: bytes) -> bytes:
    crc = native.crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return length + masked_crc(length) + message + masked_crc(message)


def write(path: Path, *messages: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(framed, messages)))
    return path


def tfds(label: int, name: str = "", image: bytes = JPEG) -> dict[str, Value]:
    named = {"file_name": name.encode()} if name else {}
    return {"image": image, "label": label, **named}


def inception(label: int, wnid: str, name: str) -> dict[str, Value]:
    return {
        "image/height": 30,
        "image/object/bbox/xmin": 0.25,
        "image/class/label": label,
        "image/class/synset": wnid.encode(),
        "image/filename": name.encode(),
        "image/encoded": JPEG,
    }


def stored(source: Source, sample: int) -> bytes:
    index = source.index
    data = (Path(index.root) / index.files[index.file[sample]]).read_bytes()
    return data[index.offset[sample] :][: index.length[sample]]


def refusal(path: Path, split: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_source(path, split, progress=False)
    return str(caught.value)


# ---- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [TFDS, TFDS / "imagenet2012", TFDS / "imagenet2012" / "5.1.0"])
def test_tfds_is_found_from_each_of_its_folders(root: Path) -> None:
    source = open_source(root, "train")
    assert (source.kind, len(source.index)) == ("tfrecord", 20)
    assert source.index.name[0] == "imagenet2012-train-00000/n02123045_9229.JPEG"


def test_the_newest_version_is_taken(tmp_path: Path) -> None:
    for version, label in (("5.9.0", 1), ("5.10.0", 2)):
        folder = tmp_path / "imagenet2012" / version
        write(folder / "imagenet2012-train.tfrecord-00000-of-00001", example(tfds(label)))
    assert list(open_source(tmp_path, "train").index.targets) == [2]


@pytest.mark.parametrize("size", [5, 123, 124, 125, 126, 127, 128, 1024])
def test_names_of_all_lengths(tmp_path: Path, size: int) -> None:
    """Up to 125 bytes, the length of the list around a name takes one byte."""
    name = "n" * (size - 4) + ".jpg"
    path = write(tmp_path / "a.tfrecord", example(tfds(1, name)))
    assert list(open_source(path).index.name) == [name]


def test_a_split_is_needed_where_there_are_two() -> None:
    with pytest.raises(SplitNeededError, match="pass split='train'"):
        open_source(INCEPTION)


def test_a_split_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001", example(tfds(1)))
    with pytest.raises(FileNotFoundError, match=r"such as train-00000.*, but none of split val"):
        find_source(tmp_path, "val")


def test_a_file_or_a_pattern_is_what_it_names() -> None:
    assert len(open_source(INCEPTION / "train-00001-of-00002").index) == 10
    assert len(open_source(f"{INCEPTION}/train-{{00000..00001}}-of-00002").index) == 20
    assert len(open_source(f"{INCEPTION}/*").index) == 30


def test_files_are_told_by_content(tmp_path: Path) -> None:
    write(tmp_path / "anything", example(tfds(3)))
    assert list(open_source(tmp_path / "anything").index.targets) == [3]
    (tmp_path / "b.tfrecord").write_bytes(b"no such file" * 9)
    with pytest.raises(FileNotFoundError, match=r"b\.tfrecord: expected a TFRecord file, but its"):
        find_source(tmp_path / "b.tfrecord")


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00002").touch()
    assert_is_none(tmp_path)
    write(tmp_path / "train-00001-of-00002", example(tfds(1)))
    assert list(open_source(tmp_path, "train").index.targets) == [1]


def assert_is_none(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_source(path)


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.tfrecord").write_bytes(gzip.compress(framed(example(tfds(3)))))
    with pytest.raises(FileNotFoundError, match=r"gzip'ed TFRecord file.*gunzip it"):
        find_source(tmp_path)


def test_a_length_that_looks_like_gzip_is_none(tmp_path: Path) -> None:
    rest = 0x8B1F - len(example(tfds(3, image=JPEG + bytes(20_000)))) + 20_000
    message = example(tfds(3, image=JPEG + bytes(rest)))
    path = write(tmp_path / "f", message)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert list(open_source(path).index.targets) == [3]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shutil.copytree(INCEPTION, tmp_path / "data")
    (tmp_path / "data" / "train-00001-of-00002").unlink()
    said = refusal(tmp_path / "data", "train")
    assert "train-00001-of-00002 is missing: expected 2 files, found 1" in said
    assert len(open_source(tmp_path / "data", "val").index) == 10


def test_two_sets_in_a_folder_are_ambiguous(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "small-train-00000-of-00001"):
        write(tmp_path / name, example(tfds(0)))
    with pytest.raises(ValueError, match=r"small-train-\*-of-00001 and train-\*-of-00001: pass"):
        open_source(tmp_path, "train")


def test_images_are_read_in_place(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n and so on"
    path = write(tmp_path / "a.tfrecord", example(tfds(1)), example(tfds(0, image=png)))
    source = open_source(path)
    assert [stored(source, 0), stored(source, 1)] == [JPEG, png]
    assert list(source.index.name) == ["00000000.jpg", "00000001.png"]


def test_a_scan_shows_the_images_that_pass_by(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", *(example(tfds(i, f"{i}.jpg")) for i in range(3)))
    seen = []
    how = Opening(progress=False, visit=lambda s: seen.append((s.sample, s.name, bytes(s.data))))
    find_source(path).open(how)
    assert seen == [(i, f"{i}.jpg", JPEG) for i in range(3)]


# ---- labels --------------------------------------------------------------------------------------


def test_inceptions_labels_begin_at_1(tmp_path: Path) -> None:
    samples = [inception(2, "n02", "b.jpg"), inception(1, "n01", "a.jpg")]
    index = open_source(write(tmp_path / "f", *map(example, samples))).index
    assert list(index.targets) == [1, 0]
    assert index.classes == ("n01", "n02")


def test_labels_with_0_begin_there(tmp_path: Path) -> None:
    samples = [inception(2, "n02", "b.jpg"), inception(0, "n00", "a.jpg")]
    index = open_source(write(tmp_path / "f", *map(example, samples))).index
    assert list(index.targets) == [2, 0]
    assert index.classes == ("n00", "1", "n02")


def test_classes_are_imagenets_where_the_synsets_are(tmp_path: Path) -> None:
    samples = [inception(4, "n01491361", "b.jpg"), inception(1, "n01440764", "a.jpg")]
    unnamed = inception(6, "", "c.jpg")
    del unnamed["image/class/synset"]
    path = write(tmp_path / "f", *map(example, [*samples, unnamed]))
    index = open_source(path).index
    assert list(index.targets) == [3, 0, 5]
    assert index.classes == imagenet_classes()[:6]


def test_labels_that_are_imagenets_from_0_stay_though_none_is_0(tmp_path: Path) -> None:
    samples = [inception(3, "n01491361", "b.jpg"), inception(1, "n01443537", "a.jpg")]
    index = open_source(write(tmp_path / "f", *map(example, samples))).index
    assert list(index.targets) == [3, 1]
    assert index.classes == imagenet_classes()[:4]


def test_synsets_in_another_order_are_refused(tmp_path: Path) -> None:
    samples = [inception(1, "n02", "b.jpg"), inception(2, "n01", "a.jpg")]
    said = refusal(write(tmp_path / "f", *map(example, samples)))
    assert "label 0 is n02 and 1 is n01 (counted from 0)" in said


def test_a_label_with_two_synsets_is_a_problem(tmp_path: Path) -> None:
    samples = [inception(1, "n01", "b.jpg"), inception(1, "n02", "a.jpg")]
    said = refusal(write(tmp_path / "f", *map(example, samples)))
    assert "sample 1 at offset" in said
    assert "label 1: expected synset n01 as in samples before, got n02" in said


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("key_first", [True, False])
def test_all_encodings_of_a_message_are_read(tmp_path: Path, packed: bool, key_first: bool) -> None:
    values = {"other": b"x" * 300, **inception(300, "n03", "a.jpg"), "z": 1.5}
    path = write(tmp_path / "f", example(values, packed, key_first))
    source = open_source(path)
    assert list(source.index.targets) == [299]
    assert stored(source, 0) == JPEG


# ---- damage --------------------------------------------------------------------------------------


def damaged(tmp_path: Path, at: int, flip: int = 1) -> Path:
    """Three samples, of which a byte of the second is changed; `at` counts from its message."""
    messages = [example(tfds(i, f"{i}.jpg")) for i in range(3)]
    path = write(tmp_path / "f", *messages)
    data = bytearray(path.read_bytes())
    data[len(framed(messages[0])) + 12 + at] ^= flip
    path.write_bytes(data)
    return path


def test_a_wrong_crc_is_one_samples_problem(tmp_path: Path) -> None:
    path = damaged(tmp_path, 500)
    said = refusal(path)
    assert "sample 1 at offset" in said
    assert "bytes have CRC-32C" in said
    source = open_source(path, on_error="skip", progress=False)
    assert list(source.index.targets) == [0, 2]
    assert "left out 1 of 3" in source.notes[0]


def test_a_wrong_length_ends_a_file(tmp_path: Path) -> None:
    path = damaged(tmp_path, -12)
    assert "the length" in refusal(path)
    with pytest.raises(DataError, match="the file is damaged from here on"):
        open_source(path, on_error="skip", progress=False)


@pytest.mark.parametrize("missing_bytes", [1, 4, 700])
def test_a_truncated_file_is_refused(tmp_path: Path, missing_bytes: int) -> None:
    path = write(tmp_path / "f", *(example(tfds(i)) for i in range(3)))
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    assert "but the file ends after" in refusal(path)


def test_a_length_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    length = struct.pack("<Q", 1 << 62)
    (tmp_path / "f").write_bytes(length + masked_crc(length) + b"x" * 99)
    assert f"expected {(1 << 62) + 4} bytes at offset 12" in refusal(tmp_path / "f")


PROBLEMS = {
    "no image": ({"label": 1}, "expected an Example with an image .*, got one of .* with label"),
    "no label": ({"image": JPEG}, "and a label .*, got one of .* with image"),
    "empty image": ({"image": b"", "label": 1}, "feature 'image': expected an image, got no bytes"),
    "image is a number": ({"image": 3, "label": 1}, "'image': expected one value of bytes, got no"),
    "label is text": ({"image": JPEG, "label": b"1"}, "'label': expected one integer, got none"),
    "negative label": ({"image": JPEG, "label": -1}, r"expected a label in \[0, .*, got -1"),
    "huge label": ({"image": JPEG, "label": 1 << 40}, f"expected a label in .*, got {1 << 40}"),
    "empty name": ({**tfds(1), "file_name": b""}, "expected 1 to 1024 bytes of text, got 0"),
    "long name": ({**tfds(1), "file_name": b"n" * 2000}, "1 to 1024 bytes of text, got 2000"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_sample_that_is_none_is_a_problem(tmp_path: Path, name: str) -> None:
    values, said = PROBLEMS[name]
    path = write(tmp_path / "f", example(values), example({**values, **tfds(1, "a.jpg")}))
    with pytest.raises(DataError, match=said):
        open_source(path, progress=False)
    source = open_source(path, on_error="skip", progress=False)
    assert list(source.index.targets) == [1]


def test_several_values_are_a_problem(tmp_path: Path) -> None:
    two_images = field(1, field(1, JPEG) + field(1, JPEG))
    two_labels = field(3, field(1, b"\x01\x02"))
    label, image = feature(1), feature(JPEG)
    for i, (a, b) in enumerate([(two_images, label), (image, two_labels)]):
        path = write(tmp_path / str(i), field(1, entry("image", a) + entry("label", b)))
        assert ("expected one value of bytes, got more", "one integer, got more")[i] in refusal(
            path
        )


def test_a_label_beyond_the_names_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "label.labels.txt").write_text("n01\nn02\n")
    write(tmp_path / "a-train.tfrecord", example(tfds(1)), example(tfds(2)))
    assert "expected a label in [0, 2), got 2" in refusal(tmp_path)
    source = open_source(tmp_path, on_error="skip", progress=False)
    assert source.index.classes == ("n01", "n02")


def test_names_of_classes_that_repeat_are_refused(tmp_path: Path) -> None:
    (tmp_path / "label.labels.txt").write_text("crane\ncrane\n")
    write(tmp_path / "a-train.tfrecord", example(tfds(1)))
    assert "some come twice" in refusal(tmp_path)


def test_a_name_that_comes_twice_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "f", *(example(tfds(i, "same.jpg")) for i in range(2)))
    assert "another sample has the name 'same.jpg', too" in refusal(path)
    assert len(open_source(path, on_error="skip", progress=False).index) == 1


def test_names_that_are_no_text_or_point_outside_are_only_names(tmp_path: Path) -> None:
    names = (b"../../outside.jpg", b"\xff\xfe.jpg")
    samples = ({**tfds(i), "file_name": name} for i, name in enumerate(names))
    source = open_source(write(tmp_path / "f", *map(example, samples)))
    assert list(source.index.name) == ["../../outside.jpg", "\udcff\udcfe.jpg"]
    assert list(source.index.files) == ["f"]


def test_only_samples_that_are_none_are_no_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "f", example({"label": 1}))
    with pytest.raises(DataError, match="expected images, found none"):
        open_source(path, on_error="skip", progress=False)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_message_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """CRCs that are right don't make a message sound: its parser sees all of these."""
    message = bytearray(example(inception(3, "n01", "a.jpg")))
    interesting = [*range(140), *range(len(message) - 40, len(message))]
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.sampled_from(interesting)) % len(message)] = data.draw(
            st.integers(0, 255)
        )
    cut = data.draw(st.integers(0, len(message)) | st.just(len(message)))
    path = write(tmp_path_factory.mktemp("any") / "f", bytes(message[:cut]))
    try:
        source = open_source(path, progress=False)
    except DataError:
        return
    index = source.index
    assert index.offset[0] >= 12
    assert 0 < index.length[0] <= path.stat().st_size - 4 - index.offset[0]


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 3000), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    data = bytearray((INCEPTION / "validation-00000-of-00001").read_bytes())
    data[at] ^= flip
    path = tmp_path_factory.mktemp("changed") / "validation-00000-of-00001"
    path.write_bytes(data)
    with pytest.raises((DataError, FileNotFoundError)):
        open_source(path, progress=False)
