"""The index: names, columns, the file they are kept in, folders, and what lies at a path."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from imagenet_seq.errors import DataError
from imagenet_seq.index.column_file import read_columns, write_columns
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Block, Source
from imagenet_seq.sources.formats.imagefolder import from_samples, open_imagefolder
from imagenet_seq.sources.place import Opening, SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD_NS = 1_600_000_000 * 10**9
SKIP = Opening("skip", progress=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the tests' indices out of the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(folder))
    return folder


def make_tree(root: Path, files: list[str]) -> Path:
    """Create empty files, and make all directories old enough for the cache to trust them."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    age(root)
    return root


def age(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(OLD_NS, OLD_NS))


def small_index() -> Index:
    names = Names.from_strings(["a/x.jpg", "a/ü.jpg", "b/y.jpg"])
    return Index(
        file=[0, 0, 1],
        offset=[0, 700, 0],
        length=[600, 100, -1],
        label=[0, 0, 1],
        name=names,
        root="/data",
        files=Names.from_strings(["shard-0.tar", "shard-1.tar"]),
        classes=("a", "b"),
        checksum=[1, 2, 2**32 - 1],
        flags=[1, 0, 1],
    )


# ---- names ---------------------------------------------------------------------------------------

file_names = st.lists(st.binary(max_size=12).map(os.fsdecode), max_size=40)


@given(file_names, st.data())
def test_names_behave_as_a_list(strings: list[str], data: st.DataObject) -> None:
    names = Names.from_strings(strings)
    assert list(names) == strings
    assert [names[i] for i in range(-len(strings), len(strings))] == strings * 2
    part = data.draw(st.slices(len(strings)))
    assert list(names[part]) == strings[part]
    assert names[part] == Names.from_strings(strings[part])
    if strings:
        chosen = data.draw(st.lists(st.integers(0, len(strings) - 1)))
        assert list(names[part].take(np.arange(len(names[part])))) == strings[part]
        assert list(names.take(chosen)) == [strings[i] for i in chosen]
    cut = data.draw(st.integers(0, len(strings)))
    assert Names.concatenate([names[:cut], names[cut:]]) == names


def test_names_longer_than_one_slice() -> None:
    strings = [f"n{i % 1000:08d}/{i}" for i in range(150_000)]
    names = Names.from_strings(strings)
    order = np.random.default_rng(0).permutation(150_000)
    assert list(names) == strings
    assert list(names.take(order)) == [strings[i] for i in order]


def test_names_refuse_what_is_outside() -> None:
    names = Names.from_strings("abc")
    with pytest.raises(IndexError, match="index 3 of a sequence of 3"):
        names[3]
    with pytest.raises(IndexError, match=r"expected indices in \[0, 3\), got -1 to 2"):
        names.take([2, -1])
    with pytest.raises(TypeError, match="one-dimensional array of integers"):
        names.take([0.5])


# ---- index ---------------------------------------------------------------------------------------


def test_samples_and_targets_are_those_of_an_image_folder() -> None:
    index = small_index()
    pairs = [("/data/a/x.jpg", 0), ("/data/a/ü.jpg", 0), ("/data/b/y.jpg", 1)]
    assert list(index.samples) == pairs
    assert index.samples[1:] == pairs[1:]
    assert index.samples[-1] == pairs[-1]
    assert list(index.targets) == [index.targets[i] for i in range(3)] == [0, 0, 1]
    assert index.targets[1:] == [0, 1]
    assert np.asarray(index.targets).tolist() == [0, 0, 1]
    assert np.array(index.targets, np.int64).dtype == np.int64
    assert index.class_to_idx == {"a": 0, "b": 1}
    assert len(index) == index.num_samples == len(index.samples) == 3


def test_labels_may_be_unknown() -> None:
    index = replace(small_index(), label=None)
    assert list(index.targets) == [-1, -1, -1]


def test_columns_are_immutable_and_of_fixed_dtype() -> None:
    index = small_index()
    assert (index.file.dtype, index.offset.dtype) == (np.int32, np.int64)
    for column in (index.file, index.offset, index.name.blob):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_strided_columns_are_not_copied() -> None:
    rows = np.zeros(3, [("offset", "<i8"), ("file", "<i4")])
    index = replace(small_index(), offset=rows["offset"], file=rows["file"])
    assert np.shares_memory(index.offset, rows)
    assert np.shares_memory(index.file, rows)


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="column 'label' has 2 elements for 3 names"):
        replace(small_index(), label=[0, 1])
    with pytest.raises(TypeError, match="column 'offset': expected a one-dimensional array"):
        replace(small_index(), offset=[0.0, 1.0, 2.0])
    with pytest.raises(TypeError, match="column 'file': values of int64 don't fit int32"):
        replace(small_index(), file=np.array([0, 1, 2**31]))
    with pytest.raises(TypeError, match="column 'file' is mandatory"):
        replace(small_index(), file=None)


def test_take_is_a_subset_in_the_given_order() -> None:
    index = small_index().take(np.array([2, 0]))
    assert list(index.samples) == [("/data/b/y.jpg", 1), ("/data/a/x.jpg", 0)]
    assert index.offset.tolist() == [0, 0]
    assert index.file.tolist() == [1, 0]
    assert index.checksum is not None
    assert index.checksum.tolist() == [2**32 - 1, 1]
    assert index.id != small_index().id


def test_id_is_of_the_content_and_not_of_the_place() -> None:
    index = small_index()
    assert index.id == replace(index, root="/elsewhere").id
    assert index.id == index.take(np.arange(3)).id
    changed = [
        replace(index, name=Names.from_strings(["a/x.jpg", "a/u.jpg", "b/y.jpg"])),
        replace(index, name=Names.from_strings(["a/x.jpga", "/ü.jpg", "b/y.jpg"])),
        replace(index, label=[0, 1, 1]),
        replace(index, label=None),
        replace(index, offset=[0, 701, 0]),
        replace(index, length=[600, 101, -1]),
        replace(index, classes=("a", "c")),
    ]
    ids = {other.id for other in changed}
    assert len(ids) == len(changed)
    assert index.id not in ids
    assert index.id == GOLDEN_ID


GOLDEN_ID = "415968b8c8ab329e0fe8dca2eb4537b1fd4297a332362c8f2a4f448e82a0b299"
"""Part of saved states: a change breaks every run in progress."""


# ---- the file ------------------------------------------------------------------------------------


def test_an_index_survives_its_file(tmp_path: Path) -> None:
    index = small_index()
    path = tmp_path / "an.index"
    index.save(path)
    opened = Index.open(path)
    assert list(opened.samples) == list(index.samples)
    for column in ("file", "offset", "length", "label", "checksum", "flags"):
        assert getattr(opened, column).tolist() == getattr(index, column).tolist()
    assert (opened.width, opened.height) == (None, None)
    assert list(opened.files) == list(index.files)
    assert opened.classes == index.classes
    assert opened.id == replace(opened, known_id=None).id == index.id
    assert os.listdir(tmp_path) == ["an.index"]
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode  # others may read it


def test_names_that_are_not_unicode_survive_the_file(tmp_path: Path) -> None:
    strange = os.fsdecode(b"caf\xe9/\xff.jpg")
    names = Names.from_strings([strange])
    index = Index([0], [0], names, os.fsdecode(b"/\xff"), names, (os.fsdecode(b"caf\xe9"),))
    index.save(tmp_path / "i")
    opened = Index.open(tmp_path / "i")
    assert opened.name[0] == strange
    assert opened.classes == index.classes
    assert opened.root == index.root
    assert opened.files is opened.name


def test_a_constant_column_is_stored_once(tmp_path: Path) -> None:
    write_columns(tmp_path / "c", {}, {"zero": np.broadcast_to(np.int64(0), 10**6)})
    assert (tmp_path / "c").stat().st_size < 1000
    _, columns = read_columns(tmp_path / "c")
    assert columns["zero"].shape == (10**6,)
    assert not columns["zero"].any()


def test_whoever_has_the_file_open_keeps_it(tmp_path: Path) -> None:
    small_index().save(tmp_path / "i")
    opened = Index.open(tmp_path / "i")
    small_index().take([1]).save(tmp_path / "i")
    assert len(opened) == 3
    assert list(opened.name) == list(small_index().name)
    assert len(Index.open(tmp_path / "i")) == 1


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_columns(tmp_path / "i", {"root": object()}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        small_index().save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("file", [0, 2, 1], r"'file' of sample 1: expected a value in \[0, 2\), got 2"),
        ("offset", [0, -5, 0], r"'offset' of sample 1: .* got -5"),
        ("length", [1, 1, -2], r"'length' of sample 2: .* got -2"),
        ("label", [0, 2, 0], r"'label' of sample 1: expected a value in \[-1, 2\), got 2"),
        ("width", [1, -7, 1], r"'width' of sample 1"),
        ("name.begin", [0, 9, 7, 20], "'name': expected positions ascending"),
        ("name.begin", [0, 7, 14, 99], "'name': expected positions ascending"),
        ("name.begin", [-1, 7, 14, 20], "'name': expected positions ascending"),
        ("files.begin", [0, 30, 22], "'files': expected positions ascending"),
        ("label", [0, 1], "column 'label' has 2 elements for 3 names"),
    ],
)
def test_wrong_values_in_a_file_are_named(
    tmp_path: Path, column: str, values: list[int], message: str
) -> None:
    header, columns = small_index().to_columns()
    dtype = columns[column].dtype if column in columns else np.dtype(np.int32)
    write_columns(tmp_path / "i", header, {**columns, column: np.array(values, dtype)})
    with pytest.raises(DataError, match=message) as caught:
        Index.open(tmp_path / "i")
    assert str(tmp_path / "i") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "expected strings 'root' and 'id'"),
        ({"classes": [1]}, "expected a list of class names"),
        ({"classes": ["a", "a"]}, "class names repeat"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    header, columns = small_index().to_columns()
    write_columns(tmp_path / "i", {**header, **change}, columns)
    with pytest.raises(DataError, match=message):
        Index.open(tmp_path / "i")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    header, columns = small_index().to_columns()
    del columns["offset"]
    write_columns(tmp_path / "i", header, columns)
    with pytest.raises(DataError, match="column 'offset' is missing"):
        Index.open(tmp_path / "i")


def test_a_path_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    index = replace(small_index(), files=Names.from_strings(["a", "b\0c"]))
    index.save(tmp_path / "i")
    with pytest.raises(DataError, match="zero byte"):
        Index.open(tmp_path / "i")


def test_every_cut_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i"
    small_index().save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            Index.open(path)


@given(st.data())
def test_damage_to_the_file_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "i"
    small_index().save(path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        opened = Index.open(path)
    except DataError:
        return
    assert len(list(opened.samples)) == len(opened)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "|O"}, "dtype '|O'"),
        ({"offset": -64}, "expected sizes >= 0"),
        ({"offset": 3}, "bytes 3 to"),
        ({"stored": 10**9}, "bytes 0 to"),
        ({"size": 7}, "3 elements stored for 7"),
        ({"size": "3"}, "expected sizes >= 0"),
    ],
)
def test_a_column_that_lies_about_itself_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "i"
    write_columns(path, {}, {"file": np.arange(3, dtype=np.int32)})
    data = path.read_bytes()[-64:]
    entry = {"dtype": "<i4", "offset": 0, "size": 3, "stored": 3, **change}
    text = json.dumps({"header": {}, "columns": {"file": entry}, "bytes": 64}).encode()
    prefix = b"imseqix1" + len(text).to_bytes(8, "little") + text
    path.write_bytes(prefix + bytes(-len(prefix) % 64) + data)
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        read_columns(path)


# ---- folders -------------------------------------------------------------------------------------


def same_as_torchvision(root: Path) -> Index:
    ours, theirs = open_imagefolder(root).index, ImageFolder(str(root))
    assert list(ours.samples) == theirs.samples
    assert list(ours.classes) == theirs.classes
    assert ours.class_to_idx == theirs.class_to_idx
    assert list(ours.targets) == theirs.targets
    return ours


def test_a_folder_has_torchvisions_order(tmp_path: Path) -> None:
    files = [
        "b/2.jpg", "b/10.JPEG", "b/1.Png", "b/notes.txt", "b/.jpg", "b/no_extension",
        "b/sub/z.jpg", "b/sub-1/y.jpg", "b/sub/deep/x.webp", "b/sub.jpg/inside.tif", "b/a.jpg.txt",
        "a/ä.bmp", "a/B.ppm", "a/b.pgm", "a/_.tiff", "A/1.jpeg", ".hidden/1.jpg", "loose.jpg",
    ]  # fmt: skip
    index = same_as_torchvision(make_tree(tmp_path / "train", files))
    assert len(index) == 14
    assert index.files is index.name


def test_names_that_are_not_unicode_have_torchvisions_order(tmp_path: Path) -> None:
    strange = [os.fsdecode(name) for name in (b"\xff.jpg", b"\x80.jpg", "\U0001f600.jpg".encode())]
    try:
        root = make_tree(tmp_path / "train", [f"a/{name}" for name in [*strange, "\uffee.jpg"]])
    except OSError:
        pytest.skip("this file system only has UTF-8 names")
    assert len(same_as_torchvision(root)) == 4
    assert len(same_as_torchvision(root)) == 4  # from the cache


def test_links_are_followed_as_torchvision_does(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "b/2.jpg"])
    elsewhere = make_tree(tmp_path / "elsewhere", ["3.jpg", "deep/4.jpg"])
    (root / "linked_class").symlink_to(elsewhere)
    (root / "a" / "linked_folder").symlink_to(elsewhere / "deep")
    (root / "a" / "linked_file.jpg").symlink_to(elsewhere / "3.jpg")
    (root / "a" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    age(root)
    assert len(same_as_torchvision(root)) == 7


def write_shard(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.jpg", b"\xff\xd8\xff"), ("a.cls", b"0")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def test_folders_deeper_than_python_recurses(tmp_path: Path) -> None:
    folder = tmp_path / "n01"
    folder.mkdir()
    (folder / "a.jpg").touch()
    for _ in range(200):
        folder /= "d"
        folder.mkdir()
    with pytest.raises(DataError, match="folders of at most 128 levels"):
        open_source(tmp_path)


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    for name in ("a.tar", "b.lmdb", "c.beton", "d.parquet", "e.tfrecord"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is empty"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="got a pipe or a device"):
        open_source(tmp_path / "a.tar")


def test_files_of_a_test_split_are_not_mixed_into_those_of_train(tmp_path: Path) -> None:
    for name in ("train-0.tar", "test-0.tar"):
        write_shard(tmp_path / name)
    with pytest.raises(SplitNeededError, match=r"of train and others, such as test-0\.tar"):
        open_source(tmp_path)
    assert list(open_source(tmp_path, "train").index.files) == ["train-0.tar"]


def test_a_pattern_that_names_a_file_twice(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match="names a file twice"):
        open_source(tmp_path / "{a,a}.tar")


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "a/sub/2.jpg"])
    (root / "a" / "sub" / "up").symlink_to(root / "a")
    (root / "a" / "self").symlink_to("self")
    index = open_imagefolder(root).index
    assert list(index.name) == ["a/1.jpg", "a/sub/2.jpg"]


def test_class_folders_without_images_are_named(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "empty_1/readme.txt"])
    (root / "empty_2").mkdir()
    with pytest.raises(FileNotFoundError, match="found none in: empty_1, empty_2") as caught:
        open_imagefolder(root)
    message = str(caught.value)
    assert ".jpg" in message
    assert str(root) in message


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a folder be one that can't be read; root may read those without permission."""
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_directory_that_cannot_be_read_is_an_error_or_skipped(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "a/sub/2.jpg", "b/3.jpg"])
    refuse(monkeypatch, root / "a" / "sub")
    with pytest.raises(PermissionError, match="a/sub"):
        open_imagefolder(root)
    source = open_imagefolder(root, SKIP)
    assert list(source.index.name) == ["a/1.jpg", "b/3.jpg"]
    (note,) = source.notes
    assert "left out 1 of 3:" in note
    assert f"{root}/a/sub: can't be read: Permission denied" in note
    monkeypatch.undo()  # nothing but the permission changes, and no time tells
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(cache))
    assert len(open_imagefolder(root, SKIP).index) == 3


def test_a_class_that_cannot_be_read_stays_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "b/2.jpg"])
    refuse(monkeypatch, root / "a")
    index = open_imagefolder(root, SKIP).index
    assert (index.classes, list(index.targets)) == (("a", "b"), [1])


def test_skipping_keeps_classes_without_images(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/readme.txt", "b/2.jpg"])
    for _ in range(2):  # the second time from the kept index
        source = open_imagefolder(root, SKIP)
        assert (source.index.classes, list(source.index.targets)) == (("a", "b"), [1])
        assert any("have no images: a" in note for note in source.notes)
        with pytest.raises(FileNotFoundError, match="found none in: a"):
            open_imagefolder(root)


def test_what_macos_keeps_beside_images_is_named_or_skipped(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "a/._1.jpg", "a/._image.jpg", "a/._x/2.jpg"])
    (root / "a" / "._1.jpg").write_bytes(bytes.fromhex("00051607 00020000") + bytes(100))
    age(root)
    for _ in range(2):
        source = open_imagefolder(root, SKIP)
        assert list(source.index.name) == ["a/._image.jpg", "a/1.jpg", "a/._x/2.jpg"]
        assert "left out 1 of 4:" in source.notes[0]
        with pytest.raises(DataError, match=r"a/\._1\.jpg: expected an image.*on_error='skip'"):
            open_imagefolder(root)


def test_files_that_are_no_images_are_ignored_and_counted(tmp_path: Path) -> None:
    files = ["a/1.jpg", "a/1.txt", "a/1.jpg.part", "b/x/2.png", "b/x/Thumbs.db", "a/.DS_Store"]
    root = make_tree(tmp_path / "train", files)
    same_as_torchvision(root)
    for _ in range(2):
        (note,) = open_imagefolder(root).notes
        assert "3 files in its class folders, such as a/1.jpg.part, are no images" in note


# ---- the cache of folders ------------------------------------------------------------------------


def test_an_unchanged_folder_is_not_scanned_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "b/2.jpg"])
    first = open_imagefolder(root).index
    assert len(list(cache.glob("*.index"))) == 1

    def refuse(path: object) -> None:
        raise AssertionError(f"scanned {path} again")

    monkeypatch.setattr(os, "scandir", refuse)
    again = open_imagefolder(root).index
    assert list(again.samples) == list(first.samples)
    assert again.id == first.id
    assert not again.name.blob.flags.owndata
    monkeypatch.chdir(tmp_path)
    assert open_imagefolder("train").index.samples[0] == ("train/a/1.jpg", 0)


@pytest.mark.parametrize("change", ["add", "remove", "add class", "deep"])
def test_a_changed_folder_is_scanned_again(tmp_path: Path, change: str) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "a/2.jpg", "b/sub/3.jpg"])
    assert len(open_imagefolder(root).index) == 3
    if change == "add":
        (root / "a" / "0.jpg").touch()
    elif change == "remove":
        (root / "a" / "2.jpg").unlink()
    elif change == "add class":
        (root / "c").mkdir()
        (root / "c" / "4.jpg").touch()
    else:
        (root / "b" / "sub" / "4.jpg").touch()
    same_as_torchvision(root)


def test_a_folder_changed_just_now_is_not_cached(tmp_path: Path, cache: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "b/2.jpg"])
    (root / "b" / "3.jpg").touch()
    assert len(open_imagefolder(root).index) == 3
    assert not list(cache.glob("*.index"))


def test_a_damaged_cache_is_replaced(tmp_path: Path, cache: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "b/2.jpg"])
    open_imagefolder(root)
    (file,) = cache.glob("*.index")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], b"x" * len(whole)):
        file.write_bytes(damaged)
        assert len(open_imagefolder(root).index) == 2
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "file"))
    root = make_tree(tmp_path / "train", ["a/1.jpg"])
    assert len(open_imagefolder(root).index) == 1


def test_the_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET_SEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_imagefolder(make_tree(tmp_path / "train", ["a/1.jpg"]))
    assert len(list((tmp_path / "xdg" / "imagenet-seq").iterdir())) == 1


def test_processes_that_index_at_once_do_not_hurt_each_other(tmp_path: Path, cache: Path) -> None:
    root = make_tree(tmp_path / "train", [f"c{i % 7}/{i}.jpg" for i in range(200)])
    seen: list[list[tuple[str, int]]] = []
    threads = [
        threading.Thread(target=lambda: seen.append(list(open_imagefolder(root).index.samples)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [ImageFolder(str(root)).samples] * 6
    assert len(list(cache.glob("*.index"))) == 1


# ---- given samples -------------------------------------------------------------------------------


def test_from_samples_keeps_order_and_paths(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "train", ["a/1.jpg", "b/2.jpg", "b/3.jpg"])
    dataset = ImageFolder(str(root))
    chosen = dataset.samples[::-1]
    index = from_samples(chosen, dataset.classes, dataset.root).index
    assert list(index.samples) == chosen
    assert list(index.name) == ["b/3.jpg", "b/2.jpg", "a/1.jpg"]
    whole = from_samples(dataset.samples, dataset.classes, dataset.root).index
    assert whole.id == open_imagefolder(root).index.id


def test_from_samples_takes_paths_from_anywhere(tmp_path: Path) -> None:
    index = from_samples([("/x/1.jpg", 0), ("/y/2.jpg", 0)], ["a"], "/x").index
    assert list(index.samples) == [("/x/1.jpg", 0), ("/y/2.jpg", 0)]


def test_from_samples_refuses_labels_without_a_class() -> None:
    with pytest.raises(ValueError, match=r"sample 1 \(/x/2.jpg\): expected a label in \[0, 1\)"):
        from_samples([("/x/1.jpg", 0), ("/x/2.jpg", 1)], ["a"], "/x")


# ---- what lies at a path -------------------------------------------------------------------------


def test_open_source_finds_splits(tmp_path: Path) -> None:
    make_tree(tmp_path, ["train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg"])
    assert open_source(tmp_path, "train").index.samples[0][0] == str(tmp_path / "train/a/1.jpg")
    assert list(open_source(tmp_path, "val").index.name) == ["a/3.jpg", "b/4.jpg"]
    source = open_source(tmp_path / "val")
    assert (source.kind, source.permuted, source.python_blocks) == ("imagefolder", False, False)
    assert list(open_source(tmp_path / "val", "val").index.name) == ["a/3.jpg", "b/4.jpg"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "vehicles", ["train/1.jpg", "tram/2.jpg"])
    assert open_source(root).index.classes == ("train", "tram")


def folder(*files: str) -> Callable[[Path], Path]:
    return lambda tmp_path: make_tree(tmp_path / "root", list(files))


@pytest.mark.parametrize(
    ("make", "split", "error", "message"),
    [
        (folder("train/a/1.jpg", "val/a/2.jpg"), None, ValueError,
         r"root holds train/ and val/: pass split='train' or split='val'"),
        (folder("train/a/1.jpg"), "val", FileNotFoundError,
         r"root/val does not exist\n  .*root holds train/\n"),
        (folder("train/a/1.jpg", "val/1.jpg", "val/2.jpg"), "val", FileNotFoundError,
         r"root/val holds 2 files but no class folders, and no list of their labels in it or "
         r"beside it \(val.txt, labels.csv, .*LOC_val_solution.csv\); sort the images"),
        (folder("val/1.jpg"), "val", FileNotFoundError, "root/val holds 1 files"),
        (lambda path: path / "nothing", "train", FileNotFoundError,
         r"nothing does not exist\nand expected one of\n  a pack"),
        (lambda path: path, None, FileNotFoundError, "is empty"),
        (lambda path: Path(__file__), None, FileNotFoundError, "is a file of no known format"),
        (folder("a/1.jpg"), "test", ValueError, "expected split 'train' or 'val'"),
    ],
)  # fmt: skip
def test_what_is_not_a_dataset_is_explained(
    tmp_path: Path,
    make: Callable[[Path], Path],
    split: str | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        open_source(make(tmp_path), split)


def test_the_other_splits_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC-val.lmdb").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is by its name the other split, val"):
        open_source(tmp_path / "ILSVRC-val.lmdb", "train")


def test_a_pattern_of_too_many_files_is_refused() -> None:
    with pytest.raises(ValueError, match="names more than 1000000 files"):
        open_source("train-{0..99999999}.tar")


def test_the_other_splits_folder_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, ["train/a/1.jpg"])
    with pytest.raises(FileNotFoundError, match="is by its name the other split, train"):
        open_source(tmp_path / "train", "val")


def fixtures(tmp_path: Path, **copies: str) -> Path:
    """Put copies of fixtures into one root."""
    for name, source in copies.items():
        at = tmp_path / "root" / name.replace("__", "/").replace("_dot_", ".")
        at.parent.mkdir(parents=True, exist_ok=True)
        path = FIXTURES / source
        (shutil.copytree if path.is_dir() else shutil.copy)(path, at)
    return tmp_path / "root"


LMDB, TAR = "tensorpack/msgpack/ILSVRC-train.lmdb", "webdataset/imagenet1k-train-0000.tar"


def test_what_was_made_for_fast_reading_comes_first(tmp_path: Path) -> None:
    root = fixtures(tmp_path, train="images/train", val="images/val")
    assert find_source(root, "train").kind == "imagefolder"
    shutil.copy(FIXTURES / LMDB, root)
    assert find_source(root, "train").kind == "lmdb"
    assert find_source(root / "train").kind == "imagefolder"
    assert find_source(root, "val").kind == "imagefolder"


def test_what_is_no_lmdb_leaves_the_folder(tmp_path: Path) -> None:
    root = fixtures(tmp_path, train="images/train")
    (root / "ILSVRC-train.lmdb").write_bytes(b"x" * 10_000)
    assert find_source(root, "train").kind == "imagefolder"


def test_folders_come_before_the_archives_they_were_made_of(tmp_path: Path) -> None:
    root = fixtures(tmp_path, train="images/train")
    for archive in (FIXTURES / "official").glob("*.tar*"):
        shutil.copy(archive, root)
    assert find_source(root, "train").kind == "imagefolder"
    assert find_source(root, "val").kind == "ilsvrc2012"
    assert find_source(root / "ILSVRC2012_img_train.tar").kind == "ilsvrc2012"
    with pytest.raises(SplitNeededError):
        find_source(root)


def test_content_of_two_formats_is_ambiguous(tmp_path: Path) -> None:
    root = fixtures(tmp_path, data="images/train", data__0_dot_tar=TAR)
    with pytest.raises(ValueError, match=r"may be read as different things: an ImageFolder with 5"):
        find_source(root / "data")
    assert find_source(root / "data" / "0.tar").kind == "webdataset"


def test_the_tars_of_a_pack_are_not_ambiguous(tmp_path: Path) -> None:
    root = fixtures(tmp_path, data__0_dot_tar=TAR)
    (root / "data" / "pack.json").write_text("{}")
    assert find_source(root / "data").kind == "pack"


@pytest.mark.parametrize(
    ("make", "path", "split", "meant"),
    [
        ({"imagenet__train": "images/train"}, "", None, "imagenet"),
        ({"imagenet__train": "images/train"}, "", "train", "imagenet"),
        ({"other__x": "images/train", "kaggle": "kaggle"}, "", "val", "kaggle"),
        ({"imagenet__val": "images/val"}, "imagenet/val/n01440764", None, "imagenet/val"),
        ({"a__shards__0_dot_tar": TAR}, "a", None, "a/shards"),
    ],
)
def test_a_wrong_level_is_pointed_out(
    tmp_path: Path, make: dict[str, str], path: str, split: str | None, meant: str
) -> None:
    root = fixtures(tmp_path, **make)
    with pytest.raises(FileNotFoundError, match=re.escape(f"Did you mean {root / meant}? Looked")):
        open_source(root / path, split)


def test_nothing_is_meant_where_nothing_is_near(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "a" / "b" / "c"):
        with pytest.raises(FileNotFoundError) as caught:
            open_source(path)
        assert "Did you mean" not in str(caught.value)


def test_the_message_lists_every_format(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_source(tmp_path, "train")
    message = str(caught.value)
    assert f"  {tmp_path}/train does not exist\n" in message
    assert f"  {tmp_path} is empty\n" in message
    for word in ("pack.json", "WebDataset", "LMDB", "Parquet", "TFRecord", ".beton", "MDS", "tar"):
        assert word in message.split("and expected one of\n")[1]


def test_folders_of_other_things_are_no_classes(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "root", ["docs/a.txt", "src/b/c.py"])
    with pytest.raises(FileNotFoundError, match=r"holds 2 folders and 0 files \(docs/, src/"):
        open_source(root)
    make_tree(root, ["src/b/1.png"])  # as deep as ImageFolder goes
    assert find_source(root).kind == "imagefolder"


def test_the_other_split_is_no_class(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "root", ["val/1.jpg", "other/2.jpg"])
    with pytest.raises(FileNotFoundError, match=r"root holds val/\n"):
        open_source(root, "train")


def test_links_that_lead_nowhere_or_round_do_no_harm(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "root", ["a/1.jpg"])
    (root / "self").symlink_to("self")
    (root / "nowhere").symlink_to("none")
    assert open_source(root).index.classes == ("a",)


# ---- sources -------------------------------------------------------------------------------------


class Numbers(Source):
    """A source of python blocks: block k holds the numbers 2k and 2k + 1 as text."""

    def read_block(self, number: int) -> Block:
        text = f"{2 * number}{2 * number + 1}".encode()
        return Block(np.frombuffer(text, np.uint8), np.array([0, 1]), np.array([1, 1]))


def test_a_python_source_is_a_subclass() -> None:
    names = Names.from_strings(map(str, range(4)))
    index = Index([0, 0, 1, 1], [0, 1, 0, 1], names, "", Names.from_strings("ab"))
    source = Numbers("numbers", index, python_blocks=True).take([3, 0])
    assert isinstance(source, Numbers)
    found = []
    for file, offset in zip(source.index.file, source.index.offset, strict=True):
        block = source.read_block(int(file))
        found.append(block.image(int(offset)).tobytes().decode())
    assert found == list(source.index.name) == ["3", "0"]


def test_other_sources_have_no_python_blocks(tmp_path: Path) -> None:
    source = open_imagefolder(make_tree(tmp_path / "train", ["a/1.jpg"]))
    with pytest.raises(TypeError, match="'imagefolder' has no python blocks"):
        source.read_block(0)


def test_indexing_imports_no_torch() -> None:
    code = (
        "import imagenet_seq.sources.formats.imagefolder, imagenet_seq.plan.epoch, sys; "
        "assert 'torch' not in sys.modules"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
