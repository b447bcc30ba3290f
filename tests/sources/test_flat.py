"""Folders of images with a list of labels: Kaggle's, Caffe's and tensorpack's, anybody's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagenet_seq.errors import DataError
from imagenet_seq.index.classes import imagenet_classes
from imagenet_seq.index.source import Source
from imagenet_seq.sources.place import SplitNeededError
from imagenet_seq.sources.recognise import find_source, open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
WNIDS = ("n01440764", "n01443537", "n02123045", "n07753592", "n15075141")
CLS_LOC = "ILSVRC/Data/CLS-LOC"
LABELS = [3, 0, 4, 1, 1, 2, 0, 4, 2, 3]


@pytest.fixture(autouse=True)
def _no_tensorpack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORPACK_DATASET", raising=False)


def flat(folder: Path, lists: dict[str, str], images: str = "a.jpg b.png c.jpeg") -> Path:
    """Write images (empty: they are only opened when they are read) and lists of labels."""
    (folder / "images").mkdir(parents=True)
    for name in images.split():
        (folder / "images" / name).touch()
    for name, text in lists.items():
        (folder / name).write_bytes(os.fsencode(text))
    return folder / "images"


def labels_of(source: Source) -> dict[str, int]:
    return dict(zip(source.index.name, source.index.targets, strict=True))


# ---- Kaggle's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", CLS_LOC, f"{CLS_LOC}/val"])
def test_kaggles_validation_images(below: str) -> None:
    source = open_source(FIXTURES / "kaggle" / below, "val")
    assert (source.kind, source.permuted, source.python_blocks) == ("flat", False, False)
    assert source.index.classes == WNIDS
    assert list(source.index.name) == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 11)]
    assert list(source.index.targets) == LABELS
    assert Path(source.index.samples[0][0]).is_file()


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", CLS_LOC, f"{CLS_LOC}/train"])
def test_kaggles_training_images_are_an_imagefolder(below: str) -> None:
    source = open_source(FIXTURES / "kaggle" / below, "train")
    assert (source.kind, source.index.classes, len(source.index)) == ("imagefolder", WNIDS, 20)


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", CLS_LOC])
def test_kaggles_root_needs_a_split(below: str) -> None:
    with pytest.raises(SplitNeededError, match="pass split='train' or split='val'"):
        find_source(FIXTURES / "kaggle" / below)


def test_kaggles_images_without_labels_are_explained() -> None:
    with pytest.raises(FileNotFoundError, match=r"CLS-LOC/test holds 1 files .* no list of their"):
        find_source(FIXTURES / "kaggle" / CLS_LOC / "test")


def copied(tmp_path: Path, *without: str) -> Path:
    root = tmp_path / "kaggle"
    shutil.copytree(FIXTURES / "kaggle", root)
    for name in without:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return root


def test_classes_come_from_the_mapping_then_from_train_then_from_the_labels(
    tmp_path: Path,
) -> None:
    root = copied(tmp_path)
    shutil.rmtree(root / CLS_LOC / "train" / WNIDS[0])
    source = open_source(root, "val")
    assert source.index.classes == WNIDS
    (note,) = source.notes
    assert "has 5 classes, and they are not the 4 class folders of" in note
    (root / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(DataError, match=r"solution\.csv:\d+: expected .* in \[0, 4\).* n01440764"):
        open_source(root, "val")
    shutil.rmtree(root / CLS_LOC / "train")
    source = open_source(root, "val")
    assert (source.index.classes, source.notes) == (WNIDS, ())
    assert list(source.index.targets) == LABELS


@pytest.mark.parametrize("line", ["\0\0\0", "n0144076", f"{WNIDS[1]} again"])
def test_a_damaged_list_of_classes_changes_no_label(tmp_path: Path, line: str) -> None:
    root = copied(tmp_path)
    with open(root / "LOC_synset_mapping.txt", "a") as file:
        file.write(line)
    with pytest.raises(DataError, match=r"LOC_synset_mapping\.txt:6: expected a class of its own"):
        open_source(root, "val")


def test_kaggles_copy_with_training_images_only(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "kaggle", tmp_path / "kaggle")
    shutil.rmtree(tmp_path / "kaggle" / CLS_LOC / "val")
    assert open_source(tmp_path / "kaggle", "train").kind == "imagefolder"


def test_kaggles_copy_without_one_split_says_so(tmp_path: Path) -> None:
    root = copied(tmp_path, f"{CLS_LOC}/train")
    with pytest.raises(FileNotFoundError, match="holds ILSVRC/Data/CLS-LOC/, but no train/ in it"):
        open_source(root, "train")


# ---- Caffe's and tensorpack's val.txt ------------------------------------------------------------


@pytest.mark.parametrize(("first", "num_notes"), [(0, 0), (1, 1)])
def test_labels_that_may_count_from_1_are_remarked(
    tmp_path: Path, first: int, num_notes: int
) -> None:
    lines = f"a.jpg {first + 1}\nb.png {first}\nc.jpeg {first + 2}\n"
    source = open_source(flat(tmp_path, {"labels.txt": lines}))
    assert labels_of(source) == {"a.jpg": first + 1, "b.png": first, "c.jpeg": first + 2}
    assert len([note for note in source.notes if "no image has label 0" in note]) == num_notes


def test_a_val_txt_beside_the_folder() -> None:
    source = open_source(FIXTURES / "flat", "val")
    assert list(source.index.targets) == LABELS
    assert source.index.classes == ("0", "1", "2", "3", "4")
    assert open_source(FIXTURES / "flat" / "val").index.id == source.index.id
    with pytest.raises(SplitNeededError, match="flat holds images with labels in val/"):
        find_source(FIXTURES / "flat")


def test_tensorpacks_metadata_are_found_by_their_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURES / "flat" / "val", tmp_path / "val")
    with pytest.raises(FileNotFoundError, match="no list of their labels"):
        open_source(tmp_path, "val")
    monkeypatch.setenv("TENSORPACK_DATASET", str(FIXTURES / "flat" / "tensorpack_dataset"))
    source = open_source(tmp_path, "val")
    assert (source.index.classes, list(source.index.targets)) == (WNIDS, LABELS)


def test_labels_up_to_999_are_imagenets(tmp_path: Path) -> None:
    folder = flat(tmp_path, {"labels.txt": "a.jpg 999\nb.png 0\nc.jpeg 65\n"})
    assert open_source(folder).index.classes == imagenet_classes()


# ---- anybody's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels.csv", "images.csv", "images/labels.txt", "images.tsv"])
@pytest.mark.parametrize(
    "text",
    [
        "a.jpg 1\nb.png 0\nc.jpeg 2\n",
        "name,label\na.jpg,1\nb.png,0\nc.jpeg,2",
        "what ever\n\n# a comment\na.jpg 1\n\nb.png 0\r\nc.jpeg\t2\n",
        "\ufeffid,label,filename\r\n7,1,some/folder/a.jpg\r\n8,0,b.png\r\n9,2,\"c.jpeg\"\r\n",
        "c\t2\nb\t0\na\t1\n",
    ],
)  # fmt: skip
def test_lists_of_names_and_numbers(tmp_path: Path, name: str, text: str) -> None:
    source = open_source(flat(tmp_path, {name: text}))
    assert labels_of(source) == {"a.jpg": 1, "b.png": 0, "c.jpeg": 2}
    assert source.index.classes == ("0", "1", "2")
    assert source.notes == ()


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    text = "image,class\na.jpg,golden retriever\nb.png,cat\nc.jpeg,golden retriever\n"
    source = open_source(flat(tmp_path, {"labels.csv": text}))
    assert source.index.classes == ("cat", "golden retriever")
    assert list(source.index.targets) == [1, 0, 1]


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\x80.jpg")
    try:
        folder = flat(tmp_path, {"labels.txt": f"{name} 0\n"}, name)
    except OSError:
        pytest.skip("this file system only has UTF-8 names")
    assert labels_of(open_source(folder)) == {name: 0}


def test_a_list_of_other_images_is_none(tmp_path: Path) -> None:
    folder = flat(tmp_path, {"labels.txt": "cat\ndog\n", "images.csv": "a.jpg,1\nb,0\nc,0\n"})
    assert labels_of(open_source(folder))["a.jpg"] == 1
    assert "images.csv" in find_source(folder).what
    assert "labels.txt" not in find_source(folder).what


GOOD = "a.jpg 1\nb.png 0\nc.jpeg 2\n"


@pytest.mark.parametrize(
    ("text", "message", "left"),
    [
        ("a.jpg 1\nb.png 0\n", r"images/c\.jpeg: .*labels\.txt has no label for it", 2),
        (GOOD + "d.jpg 3\n", r"labels\.txt:4: there is no image d\.jpg", 3),
        (GOOD + "nonsense\n", r"labels\.txt:4: expected a name and a label", 3),
        (GOOD.replace("2", "-2"), r"labels\.txt:3: expected a class's name or a label .*got -2", 2),
        (GOOD.replace("2", "9" * 40), r"labels\.txt:3: expected .* in \[0, 100000\), got 999", 2),
        (GOOD.replace("2", "x"), r"labels\.txt:3: expected .*got x", 2),
    ],
)
def test_what_is_wrong_with_a_sample_is_raised_or_skipped(
    tmp_path: Path, text: str, message: str, left: int
) -> None:
    folder = flat(tmp_path, {"labels.txt": text})
    with pytest.raises(DataError, match=message):
        open_source(folder)
    source = open_source(folder, on_error="skip")
    assert len(source.index) == left
    (note,) = source.notes
    assert f"left out 1 of {left + 1}:" in note


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"labels.txt": GOOD + "a.jpg 2\n"},
         r"labels\.txt:4: expected one label for a\.jpg, got 2 after 1 at .*labels\.txt:1"),
        ({"labels.txt": GOOD, "images.csv": GOOD.replace("1", "2")},
         r"images\.csv and .*labels\.txt disagree.* of a\.jpg .* says 2, .*labels\.txt 1\. Remove"),
        ({"labels.txt": "a 1\nb 2\nc 3\n"}, r"numbered from 1 to 3: a list of images"),
    ],
)  # fmt: skip
def test_lists_that_contradict_are_never_used(
    tmp_path: Path, lists: dict[str, str], message: str
) -> None:
    folder = flat(tmp_path, lists)
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=message):
            open_source(folder, on_error=on_error)  # type: ignore[arg-type]


def test_lists_that_agree_may_be_there_twice(tmp_path: Path) -> None:
    folder = flat(tmp_path, {"labels.txt": GOOD, "images.csv": GOOD.replace(" ", ",")})
    assert list(open_source(folder).index.targets) == [1, 0, 2]


def test_images_that_share_a_stem_need_their_extension(tmp_path: Path) -> None:
    folder = flat(tmp_path, {"labels.txt": "a 1\nb.jpg 0\n"}, "a.jpg a.png b.jpg")
    with pytest.raises(DataError, match=r"labels\.txt:1: there is no image a"):
        open_source(folder)


def test_a_changed_list_is_noticed(tmp_path: Path) -> None:
    folder = flat(tmp_path, {"labels.txt": GOOD})
    for path in (folder, tmp_path / "labels.txt"):
        os.utime(path, ns=(10**18, 10**18))
    assert labels_of(open_source(folder))["a.jpg"] == 1
    (tmp_path / "labels.txt").write_text(GOOD.replace("1", "4"))
    assert labels_of(open_source(folder))["a.jpg"] == 4


def test_links_that_lead_round_end(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(".")  # 2 ** 40 paths
    with pytest.raises(SplitNeededError):
        open_source(tmp_path)


def test_class_folders_beside_loose_images_are_an_imagefolder(tmp_path: Path) -> None:
    folder = flat(tmp_path, {"labels.txt": GOOD})
    (folder / "dogs").mkdir()
    (folder / "dogs" / "1.jpg").touch()
    assert find_source(folder).kind == "imagefolder"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(damage=st.binary(max_size=60), at=st.integers(0, len(GOOD)))
def test_no_list_does_more_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: int
) -> None:
    folder = flat(tmp_path_factory.mktemp("flat"), {"labels.txt": ""})
    content = GOOD.encode()[:at] + damage + GOOD.encode()[at:]
    (folder.parent / "labels.txt").write_bytes(content)
    try:
        index = open_source(folder, on_error="skip").index
    except (DataError, FileNotFoundError):
        return
    assert 0 < len(index) <= 3
    assert all(0 <= label < len(index.classes) for label in index.targets)
