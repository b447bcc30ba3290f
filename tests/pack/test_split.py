"""A pack remembers which split it is, where its own name does not say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagenet_seq.errors import DataError
from imagenet_seq.loader import Loader
from imagenet_seq.pack.packing import pack_dataset, reshuffle
from imagenet_seq.sources.recognise import open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def root() -> Path:
    return FIXTURES / "images"


@pytest.fixture
def of_train(root: Path, tmp_path: Path) -> Path:
    make_pack(root / "train", tmp_path / "X")
    return tmp_path / "X"


def make_pack(source: Path, destination: Path, **options: Any) -> None:
    pack_dataset(source, destination, num_workers=2, progress=False, **options)


def noted(folder: Path) -> str | None:
    split: str | None = json.loads((folder / "pack.json").read_text()).get("split")
    return split


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_loader_takes_the_split_from_the_pack(root: Path, tmp_path: Path, split: str) -> None:
    make_pack(root / split, tmp_path / "X")
    assert noted(tmp_path / "X") == split
    found, asked = Loader(tmp_path / "X", batch_size=2), Loader(tmp_path / "X", split, batch_size=2)
    assert found.state_dict() == asked.state_dict()
    assert str(found.dataset.transform) == str(asked.dataset.transform)


def test_the_other_split_is_refused(of_train: Path) -> None:
    refusal = "X: holds the split 'train', not 'val'"
    for dataset in (of_train, open_source(of_train)):
        with pytest.raises(ValueError, match=refusal):
            Loader(dataset, "val")
    with pytest.raises(ValueError, match=refusal):
        open_source(of_train, "val")


def test_a_pack_that_was_renamed_to_the_other_split_is_refused(of_train: Path) -> None:
    renamed = of_train.rename(of_train.with_name("val"))
    for arguments in [(renamed,), (renamed.parent, "val")]:
        with pytest.raises(ValueError, match="val: holds the split 'train', not 'val'"):
            Loader(*arguments)


def test_nothing_is_noted_where_the_name_of_the_pack_tells(root: Path, tmp_path: Path) -> None:
    make_pack(root, tmp_path / "both")
    make_pack(root / "train", tmp_path / "train")
    folders = [tmp_path / "both/train", tmp_path / "both/val", tmp_path / "train"]
    assert [noted(folder) for folder in folders] == [None] * 3


def test_nothing_is_noted_where_the_source_does_not_tell(root: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(root / "train")
    make_pack(tmp_path / "photos", tmp_path / "X")
    assert noted(tmp_path / "X") is None
    with pytest.raises(ValueError, match="split"):
        Loader(tmp_path / "X")


def test_names_of_files_tell(tmp_path: Path) -> None:
    make_pack(FIXTURES / "webdataset" / "imagenet1k-validation-*.tar", tmp_path / "X")
    assert noted(tmp_path / "X") == "val"


def test_nothing_is_noted_of_files_of_both_splits(tmp_path: Path) -> None:
    files = FIXTURES / "webdataset" / "imagenet1k-{train-0000,validation-00}.tar"
    make_pack(files, tmp_path / "X")
    assert noted(tmp_path / "X") is None


def test_another_order_of_a_pack_notes_its_split(of_train: Path, tmp_path: Path) -> None:
    reshuffle(of_train, tmp_path / "Y", progress=False)
    assert noted(tmp_path / "Y") == "train"


def test_a_pack_from_before_is_complete(root: Path, of_train: Path) -> None:
    content = json.loads((of_train / "pack.json").read_text())
    del content["split"]
    (of_train / "pack.json").write_text(json.dumps(content))
    assert pack_dataset(root / "train", of_train, progress=False)[""].was_complete


@pytest.mark.parametrize("split", ["test", 5, ["train"], ""])
def test_a_split_that_is_none_is_refused(of_train: Path, split: Any) -> None:
    content = json.loads((of_train / "pack.json").read_text())
    (of_train / "pack.json").write_text(json.dumps({**content, "split": split}))
    with pytest.raises(DataError, match=r"pack\.json: 'split': expected one of"):
        open_source(of_train)


def test_progress_names_the_split(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_dataset(root, tmp_path / "both", num_workers=2)
    pack_dataset(root / "val", tmp_path / "X", num_workers=2)
    shown = capsys.readouterr().err
    for name in ("look up files", "choose tables", "read and encode", "write shards"):
        assert f"pack train: {name}: 100%" in shown
        assert shown.count(f"pack val: {name}: 100%") == 2
