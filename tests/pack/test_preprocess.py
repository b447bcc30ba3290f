"""The original project's LMDB files: as tensorpack has them, made again to the same bytes."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from test_pack import pixels, run_until_killed

from imagenet_seq.cli import main
from imagenet_seq.errors import PackError
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset, preprocess
from imagenet_seq.pack.shards import Summary
from imagenet_seq.sources.recognise import open_source

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def entries(path: Path) -> dict[bytes, bytes]:
    """Keys and values as the lmdb package reads them."""
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as file,
        file.begin() as read,
    ):
        return dict(read.cursor())


def stored(path: Path) -> list[tuple[bytes, int]]:
    """Images and labels in the order of the keys, as pickle reads them."""
    content = entries(path)
    keys = pickle.loads(content.pop(b"__keys__"))
    assert keys == list(content) == [b"%08d" % number for number in range(len(keys))]
    return [(image.tobytes(), label) for image, label in map(pickle.loads, content.values())]


def as_indexed(folder: Path) -> list[tuple[Any, int]]:
    """Pixels and labels of a folder of class folders, in its order."""
    index = open_source(folder).index
    return [
        (pixels((folder / name).read_bytes()), label)
        for name, label in zip(index.name, index.targets, strict=True)
    ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "images", tmp_path / "imagenet")
    return tmp_path / "imagenet"


def test_files_beside_the_folders_hold_their_images_and_labels(root: Path) -> None:
    made = preprocess(root, progress=False)
    assert list(made) == ["train", "val"]
    for split, summary in made.items():
        path = root / f"ILSVRC-{split}.lmdb"
        expected = as_indexed(root / split)
        found = [(pixels(image), label) for image, label in stored(path)]
        assert summary.folder == str(path)
        assert summary.num_samples == len(found) == len(expected)
        assert summary.pack_bytes == path.stat().st_size
        if split == "val":
            assert found == expected
        else:
            assert found != expected
            assert sorted(found) == sorted(expected)
    assert not list(root.glob("*.partial"))


def test_images_are_re_coded_unless_their_bytes_are_kept(root: Path, tmp_path: Path) -> None:
    preprocess(root, tmp_path / "transcoded", progress=False)
    kept = preprocess(root, tmp_path / "kept", keep_bytes=True, progress=False)
    assert kept["val"].num_canonical == 0
    originals = {path.read_bytes() for path in (root / "val").rglob("*") if path.is_file()}
    images = {image for image, _ in stored(tmp_path / "kept/ILSVRC-val.lmdb")}
    assert images == originals
    assert images.isdisjoint(
        image
        for image, _ in stored(tmp_path / "transcoded/ILSVRC-val.lmdb")
        if image not in originals or b"imseq" in image
    )


def test_the_loader_takes_the_files_for_the_splits(root: Path) -> None:
    preprocess(root, progress=False)
    for split in ("train", "val"):
        source = open_source(root, split)
        path = root / f"ILSVRC-{split}.lmdb"
        assert source.kind == open_source(path).kind != "imagefolder"
        labels = {f"{key:08d}": label for key, (_, label) in enumerate(stored(path))}
        found = zip(source.index.name, source.index.targets, strict=True)
        assert {Path(name).stem: label for name, label in found} == labels


def test_a_finished_file_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", str(root)]) == 0
    (root / "ILSVRC-val.lmdb").unlink()
    before = (root / "ILSVRC-train.lmdb").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["preprocess", str(root)]) == 0
    assert (root / "ILSVRC-train.lmdb").stat().st_mtime_ns == before
    assert (root / "ILSVRC-val.lmdb").exists()
    said = capsys.readouterr().out
    assert "ILSVRC-train.lmdb: 20 samples, complete already: nothing was done" in said
    assert "ILSVRC-val.lmdb: 10 samples\n" in said


def test_as_a_script_with_the_source_in_the_environment(root: Path, tmp_path: Path) -> None:
    script = str(ROOT / "preprocess_sequential.py")
    environment = {**os.environ, "IMAGENET": str(root)}
    subprocess.run([sys.executable, script], env=environment, check=True, capture_output=True)
    again = [sys.executable, script, str(root), str(tmp_path / "other")]
    for split in ("train", "val"):
        shutil.move(root / f"ILSVRC-{split}.lmdb", tmp_path)
    subprocess.run(again, check=True, capture_output=True)
    for split in ("train", "val"):
        name = f"ILSVRC-{split}.lmdb"
        assert digest(tmp_path / name) == digest(tmp_path / "other" / name)


def test_without_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET", raising=False)
    with pytest.raises(ValueError, match=r"as argument or in \$IMAGENET"):
        preprocess()


def test_the_official_archives_get_files_beside_them(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "official", tmp_path / "archives")
    preprocess(tmp_path / "archives", progress=False)
    preprocess(FIXTURES / "images", tmp_path / "folders", progress=False)
    for split in ("train", "val"):
        name = f"ILSVRC-{split}.lmdb"
        found, expected = (
            sorted((pixels(image), label) for image, label in stored(tmp_path / place / name))
            for place in ("archives", "folders")
        )
        assert found == expected


def test_labels_of_a_flat_val_come_from_tensorpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURES / "images" / "train", tmp_path / "root" / "train")
    shutil.copytree(FIXTURES / "flat" / "val", tmp_path / "root" / "val")
    monkeypatch.setenv("TENSORPACK_DATASET", str(FIXTURES / "flat" / "tensorpack_dataset"))
    made = preprocess(tmp_path / "root", progress=False)
    assert list(made) == ["train", "val"]
    expected = dict(as_indexed(FIXTURES / "images" / "val"))
    assert {pixels(i): label for i, label in stored(Path(made["val"].folder))} == expected


def test_a_file_among_the_images_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"lie in, one another.*name a destination"):
        preprocess(root / "train", progress=False)
    assert not list((root / "train").glob("ILSVRC*"))


def test_one_file_cannot_hold_two_splits(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder for the files of train and val"):
        preprocess(root, tmp_path / "all.lmdb", progress=False)
    made = pack_dataset(root / "val", tmp_path / "one.lmdb", format="lmdb", progress=False)
    assert stored(tmp_path / "one.lmdb") == stored_by(root, tmp_path)
    assert made[""].folder == str(tmp_path / "one.lmdb")


def stored_by(root: Path, tmp_path: Path) -> list[tuple[bytes, int]]:
    preprocess(root, tmp_path / "both", progress=False)
    return stored(tmp_path / "both/ILSVRC-val.lmdb")


def test_a_pack_and_an_lmdb_have_the_same_order(root: Path, tmp_path: Path) -> None:
    pack_dataset(root / "train", tmp_path / "pack", progress=False)
    preprocess(root, tmp_path / "lmdb", progress=False)
    index = open_source(tmp_path / "pack").index
    labels = [label for _, label in stored(tmp_path / "lmdb/ILSVRC-train.lmdb")]
    assert list(index.targets) == labels


def test_images_that_are_none(root: Path, tmp_path: Path) -> None:
    first = next(path for path in sorted((root / "val").rglob("*")) if path.is_file())
    first.write_bytes(b"no image")
    with pytest.raises(PackError, match=f"1 of 10 images cannot be packed:\n.*{first.name}"):
        preprocess(root, tmp_path / "lmdb", progress=False)
    skipped = preprocess(root, tmp_path / "lmdb", on_error="skip", progress=False)["val"]
    assert (skipped.num_samples, [f.kept for f in skipped.failures]) == (9, [False])
    kept = preprocess(root, tmp_path / "kept", on_error="keep", progress=False)["val"]
    assert (kept.num_samples, [f.kept for f in kept.failures]) == (10, [True])
    assert b"no image" in [image for image, _ in stored(tmp_path / "kept/ILSVRC-val.lmdb")]


def test_earlier_releases_of_tensorpack_get_msgpack(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    msgpack = pytest.importorskip("msgpack")
    preprocess(root, tmp_path / "pickled", progress=False)
    monkeypatch.setenv("TENSORPACK_SERIALIZE", "msgpack")
    path = Path(preprocess(root, tmp_path / "packed", progress=False)["val"].folder)
    image, label = msgpack.unpackb(entries(path)[b"00000000"])
    assert (image[b"data"], label) == stored(tmp_path / "pickled/ILSVRC-val.lmdb")[0]


# ---- interrupted ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 100 KB: the buffers of a deal overflow in the middle of it."""
    root = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(6)
    for i in range(48):
        folder = root / f"n{i % 3:08d}"
        folder.mkdir(exist_ok=True)
        image = photo_like(rng, 500, 375)
        (folder / f"{i}.jpg").write_bytes(jpeg_bytes(image, quality=98))
    return root


def make(source: Path, destination: Path, **options: Any) -> Summary:
    settings = Settings(shard_bytes=1_300_000)
    options = {"settings": settings, "num_workers": 2, "progress": False, **options}
    return pack_dataset(source, destination, format="lmdb", **options)[""]


@pytest.fixture(scope="module")
def uninterrupted(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("uninterrupted") / "all.lmdb"
    make(noisy, path)
    return digest(path)


@pytest.mark.parametrize("memory_bytes", [4 << 20, 2 << 20], ids=["one level", "two levels"])
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("imagenet_seq.native", "transcode", 0),
        ("imagenet_seq.native", "transcode", 40),
        ("os", "replace", 0),
        ("os", "replace", 1),
        ("imagenet_seq.pack.lmdb", "tensorpack_value", 0),
        ("imagenet_seq.pack.lmdb", "tensorpack_value", 30),
        ("imagenet_seq.pack.lmdb", "tensorpack_keys", 0),
        ("os", "rename", 0),
        ("os", "rmdir", 0),
    ],
)
def test_killed_then_run_again_gives_the_same_bytes(
    noisy: Path,
    uninterrupted: str,
    tmp_path: Path,
    module: str,
    name: str,
    count: int,
    memory_bytes: int,
) -> None:
    path = tmp_path / "all.lmdb"
    code = run_until_killed(noisy, path, module, name, count, memory_bytes, "lmdb")
    assert code == -signal.SIGKILL
    assert path.exists() == (name == "rmdir")
    make(noisy, path, memory_bytes=memory_bytes)
    assert digest(path) == uninterrupted
    assert not list(tmp_path.glob("*.partial"))


def test_another_form_does_not_go_on_with_a_pack(noisy: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.lmdb"
    run_until_killed(noisy, path, "os", "rename", 0, 4 << 20)  # a pack of this name
    with pytest.raises(PackError, match="format: None before, 'lmdb' now"):
        make(noisy, path)


def test_an_unfinished_file_among_archives_is_no_source(tmp_path: Path) -> None:
    archives = tmp_path / "archives"
    shutil.copytree(FIXTURES / "official", archives)
    run_until_killed(
        archives, archives, "imagenet_seq.pack.lmdb", "tensorpack_value", 0, 4 << 20, "lmdb"
    )
    assert (archives / "ILSVRC-train.lmdb.partial").exists()
    assert open_source(archives, "train").kind == "ilsvrc2012"
    settings = Settings(shard_bytes=1_300_000)
    made = pack_dataset(archives, archives, format="lmdb", settings=settings, progress=False)
    assert [summary.num_samples for summary in made.values()] == [20, 10]
    assert not list(archives.glob("*.partial"))
