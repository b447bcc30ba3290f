"""Packs of any source: the same samples, read once where they must be read to be indexed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from PIL import Image
from test_pack import FOUR_SHARDS, image_of, pixels, run_until_killed, tree

from imagenet_seq import native
from imagenet_seq.cli import main
from imagenet_seq.errors import DataError, PackError
from imagenet_seq.loader import Loader
from imagenet_seq.pack import input_files
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset, reshuffle
from imagenet_seq.pack.shards import Summary
from imagenet_seq.pack.shrink import Shrink
from imagenet_seq.pack.verify import verify
from imagenet_seq.sources.recognise import open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"

SOURCES = [
    "official", "webdataset", "tfrecord/tfds", "tfrecord/inception", "parquet", "hf_disk", "kaggle",
    "tensorpack/pickle", "tensorpack/pyarrow",
]  # fmt: skip
"""The same photos in train and val, as each format's own users have them."""

RECODED_TRAIN = ["mds", "mds_zstd", "lmdb/pickle"]
"""Sources whose train images are others."""

FEW_BYTES = Settings(shard_bytes=10_000)


@pytest.fixture(autouse=True)
def no_kept_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every opening scans, as the first one does, unless a test wants otherwise."""
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", os.devnull)


def make_pack(source: Path, destination: Path, **options: Any) -> Summary:
    options = {"settings": FOUR_SHARDS, "num_workers": 2, "progress": False, **options}
    return pack_dataset(source, destination, **options)[""]


def contents(folder: Path) -> list[tuple[int, bytes]]:
    """Label and pixels of every sample of a pack."""
    found = []
    for sample, label in enumerate(open_source(folder).index.targets):
        with Image.open(io.BytesIO(image_of(folder, sample))) as image:
            found.append((label, image.convert("RGB").tobytes()))
    return sorted(found)


def noise(seed: int) -> bytes:
    """A JPEG of 100 KB."""
    values = np.random.default_rng(seed).integers(0, 256, (320, 320, 3), np.uint8)
    return jpeg_bytes(Image.fromarray(values), quality=92)


def write_tar(path: Path, images: dict[str, tuple[bytes, int]]) -> None:
    """Write a WebDataset shard; it is old enough for its index to be kept."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, (data, label) in images.items():
            for name, content in ((f"{key}.jpg", data), (f"{key}.cls", b"%d" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    os.utime(path, (time.time() - 100,) * 2)


@pytest.fixture(scope="module")
def images() -> dict[str, tuple[bytes, int]]:
    """48 images of 100 KB, sorted by class: the buffers of a deal overflow in the middle of it."""
    return {f"n{i // 16:08d}_{i}": (noise(i), i // 16) for i in range(48)}


@pytest.fixture(scope="module")
def tars(images: dict[str, tuple[bytes, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images in two shards."""
    folder = tmp_path_factory.mktemp("tars")
    keys = list(images)
    write_tar(folder / "photos-0.tar", {key: images[key] for key in keys[:30]})
    write_tar(folder / "photos-1.tar", {key: images[key] for key in keys[30:]})
    return folder


@pytest.fixture(scope="module")
def expected(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pack of the tars, made without a break."""
    folder = tmp_path_factory.mktemp("expected") / "pack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGENET_SEQ_CACHE", os.devnull)
        make_pack(tars, folder)
    return tree(folder)


@pytest.fixture
def editable(tars: Path, tmp_path: Path) -> Path:
    shutil.copytree(tars, tmp_path / "tars")
    return tmp_path / "tars"


# ---- what a pack of each source holds ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "splits"),
    [(name, None) for name in SOURCES] + [(name, ["val"]) for name in RECODED_TRAIN],
)
def test_both_splits_of_every_source(name: str, splits: list[str] | None, tmp_path: Path) -> None:
    options = {"settings": FEW_BYTES, "splits": splits, "progress": False}
    made = pack_dataset(FIXTURES / name, tmp_path / "pack", **options)
    folders = pack_dataset(FIXTURES / "images", tmp_path / "folders", **options)
    assert list(made) == list(folders) == (splits or ["train", "val"])
    for split, summary in made.items():
        assert summary.num_samples == folders[split].num_samples > 5
        assert contents(tmp_path / "pack" / split) == contents(tmp_path / "folders" / split)
        report = verify(tmp_path / "pack" / split, FIXTURES / name, split=split, progress=False)
        assert report.problems == ()
        assert report.num_compared == summary.num_samples
        about = json.loads((tmp_path / "pack" / split / "pack.json").read_text())
        assert about["source"]["kind"] == open_source(FIXTURES / name, split).kind


def test_a_root_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, destination = str(FIXTURES / "official"), str(tmp_path / "pack")
    assert main(["pack", source, destination]) == 0
    assert main(["verify", destination, "--against", source]) == 0
    said = capsys.readouterr().out
    assert f"{destination}/train: 20 samples, 20 compared with {source}: sound" in said
    assert f"{destination}/val: 10 samples, 10 compared with {source}: sound" in said
    assert main(["pack", "--format", "lmdb", source, f"{destination}.lmdb", "--splits", "val"]) == 0
    assert f"{destination}.lmdb: 10 samples\n" in capsys.readouterr().out
    assert main(["pack", "--reshuffle", "--limit", "3", destination, f"{destination}2"]) == 1
    assert "--limit: is for packing images" in capsys.readouterr().err


def test_raw_pixels_are_stored_as_they_are(tmp_path: Path) -> None:
    source = FIXTURES / "ffcv" / "val_raw.beton"
    summary = make_pack(source, tmp_path / "pack")
    assert (summary.num_canonical, summary.num_as_is) == (0, summary.num_samples)
    opened, packed = open_source(source), open_source(tmp_path / "pack").index
    blocks = {number: opened.read_block(number) for number in set(opened.index.file.tolist())}
    for sample, name in enumerate(packed.name):
        original = list(opened.index.name).index(name)
        block = blocks[int(opened.index.file[original])]
        ordinal = int(opened.index.offset[original])
        begin, length = int(block.offsets[ordinal]), int(block.lengths[ordinal])
        stored = image_of(tmp_path / "pack", sample)
        assert stored == block.bytes[begin : begin + length].tobytes()
        assert pixels(stored)[0] == "RGB"
    assert verify(tmp_path / "pack", source, progress=False).problems == ()


def test_verify_compares_the_pixels_of_python_blocks(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (path,) = (FIXTURES / "parquet/data").glob("val*.parquet")
    make_pack(path, tmp_path / "pack")
    table = parquet.read_table(path)
    rows = table.column("image").to_pylist()
    rows[0]["bytes"] = noise(0)
    column = pyarrow.array(rows, table.schema.field("image").type)
    changed = tmp_path / path.name
    place = table.schema.get_field_index("image")
    parquet.write_table(table.set_column(place, "image", column), changed)
    (problem,) = verify(tmp_path / "pack", changed, progress=False).problems
    assert "its pixels differ from the source's" in problem


def test_a_pattern_of_files_is_a_source(
    tars: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    make_pack(tars / "photos-{0..1}.tar", tmp_path / "pack")
    assert tree(tmp_path / "pack") == expected


def test_a_pack_beside_its_files_is_refused(editable: Path) -> None:
    with pytest.raises(ValueError, match=r"lie in, one another.*name a destination"):
        make_pack(editable, editable / "pack")
    with pytest.raises(ValueError, match=r"lie in, one another.*name a destination"):
        make_pack(editable / "photos-0.tar", editable / "photos-0.tar")


# ---- one pass ------------------------------------------------------------------------------------


def reads_while_dealing(log: Path) -> int:
    """Bytes of the source that were read after the tables were chosen."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return sum(
        line["bytes"]
        for line in lines
        if line["pass"] == "deal" and line["op"] == "read" and line["file"].endswith(".tar")
    )


def test_large_files_are_read_once_to_index_and_pack_them(
    tars: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    make_pack(tars, tmp_path / "pack", io_log=tmp_path / "log")
    assert tree(tmp_path / "pack") == expected
    assert reads_while_dealing(tmp_path / "log") == 0


@pytest.mark.parametrize("memory_bytes", [4 << 20, 2 << 20], ids=["one level", "two levels"])
def test_a_kept_index_gives_the_same_pack_in_one_pass(
    tars: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory_bytes: int,
) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    open_source(tars)
    make_pack(tars, tmp_path / "pack", memory_bytes=memory_bytes, io_log=tmp_path / "log")
    assert tree(tmp_path / "pack") == expected
    total = sum(path.stat().st_size for path in tars.glob("*.tar"))
    assert 0.95 * total < reads_while_dealing(tmp_path / "log") <= total


def test_threads_and_memory_do_not_matter(
    tars: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    make_pack(tars, tmp_path / "pack", num_workers=5, memory_bytes=2 << 20)
    assert tree(tmp_path / "pack") == expected


@pytest.mark.parametrize(
    "settings",
    [
        Settings(shard_bytes=1_300_000, shrink=Shrink(200)),
        Settings(shard_bytes=1_300_000, keep_bytes=True),
        Settings(shard_bytes=1_300_000, tables="image"),
    ],
    ids=["smaller", "own bytes", "own tables"],
)
def test_other_settings_give_one_pack_on_both_ways(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    make_pack(tars, tmp_path / "dealt while indexing", settings=settings)
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    open_source(tars)
    make_pack(tars, tmp_path / "indexed", settings=settings)
    assert tree(tmp_path / "indexed") == tree(tmp_path / "dealt while indexing")
    assert verify(tmp_path / "indexed", tars, progress=False).problems == ()


def test_tables_are_fitted_to_images_of_all_classes(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bytes] = []
    look = input_files._images_all_over
    monkeypatch.setattr(
        input_files, "_images_all_over", lambda paths, log: found.extend(look(paths, log)) or found
    )
    make_pack(tars, tmp_path / "pack")
    about = json.loads((tmp_path / "pack/pack.json").read_text())
    counts = sum(native.count_symbols(data) for data in found)
    assert about["huffman_tables"]["dht"] == native.fit_tables(counts).hex()
    loader = Loader(tars, "val", forecast=False)
    label_of = {loader.dataset.encoded(i): label for i, label in enumerate(loader.dataset.targets)}
    assert {label_of[data] for data in found} == set(loader.dataset.targets)


def test_another_order_of_such_a_pack_is_the_pack_of_another_seed(
    tars: Path, tmp_path: Path
) -> None:
    make_pack(tars, tmp_path / "pack")
    reshuffle(tmp_path / "pack", tmp_path / "other", seed=7, progress=False)
    make_pack(tars, tmp_path / "seed", settings=Settings(shard_bytes=1_300_000, seed=7))
    assert tree(tmp_path / "other") == tree(tmp_path / "seed")


# ---- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("imagenet_seq.native", "count_symbols", 20),
        ("imagenet_seq.native", "transcode", 0),
        ("imagenet_seq.native", "transcode", 40),
        ("os", "replace", 0),
        ("os", "replace", 1),
        ("os", "replace", 2),
        ("os", "replace", 3),
        ("os", "replace", 6),
        ("os", "replace", 12),
        ("os", "unlink", 0),
        ("os", "rename", 0),
        ("os", "rmdir", 0),
    ],
)
@pytest.mark.parametrize("memory_bytes", [4 << 20, 2 << 20], ids=["one level", "two levels"])
def test_killed_then_run_again_gives_the_same_bytes(
    tars: Path,
    expected: dict[str, str],
    tmp_path: Path,
    module: str,
    name: str,
    count: int,
    memory_bytes: int,
) -> None:
    destination = tmp_path / "pack"
    code = run_until_killed(tars, destination, module, name, count, memory_bytes)
    assert code == -signal.SIGKILL
    if name != "rmdir":
        with pytest.raises((DataError, FileNotFoundError)):
            open_source(destination)
    make_pack(tars, destination, memory_bytes=memory_bytes)
    assert tree(destination) == expected
    assert not (tmp_path / "pack.partial").exists()


@pytest.fixture
def half_dealt(editable: Path, tmp_path: Path) -> Path:
    """DESTINATION of a packing that was killed in the middle of the one pass."""
    # When the buffers are full for the second time.
    scratch = "imagenet_seq.pack.scratch"
    code = run_until_killed(editable, tmp_path / "pack", scratch, "write_through", 2, 2 << 20)
    assert code == -signal.SIGKILL
    assert (tmp_path / "pack.partial" / "dealt").stat().st_size > 0
    return tmp_path / "pack"


def test_a_second_run_re_codes_only_what_is_missing(
    editable: Path, half_dealt: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    transcode = native.transcode
    monkeypatch.setattr(native, "transcode", lambda *a: calls.append(1) or transcode(*a))
    make_pack(editable, half_dealt)
    assert 0 < len(calls) < 48
    assert tree(half_dealt) == expected


def test_files_replaced_meanwhile_are_dealt_again(
    editable: Path,
    images: dict[str, tuple[bytes, int]],
    half_dealt: Path,
    tmp_path: Path,
) -> None:
    keys = list(images)
    turned = {key: images[other] for key, other in zip(keys[:30], keys[29::-1], strict=True)}
    write_tar(editable / "photos-0.tar", turned)
    os.utime(editable / "photos-0.tar", (time.time() - 50,) * 2)
    make_pack(editable, half_dealt, settings=FOUR_SHARDS)
    make_pack(editable, tmp_path / "new")
    assert contents(half_dealt) == contents(tmp_path / "new")
    assert verify(half_dealt, editable, progress=False).problems == ()


def test_other_settings_are_refused_before_the_files_are_read(
    editable: Path, half_dealt: Path
) -> None:
    with pytest.raises(PackError, match=r"other settings[^\n]*\n  seed: 0 before, 1 now"):
        make_pack(editable, half_dealt, settings=Settings(shard_bytes=1_300_000, seed=1))


def test_an_interrupt_in_the_pass_keeps_what_was_dealt(
    tars: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcode, calls = native.transcode, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return transcode(*arguments)

    monkeypatch.setattr(native, "transcode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pack(tars, tmp_path / "pack", memory_bytes=2 << 20)
    calls.clear()
    monkeypatch.setattr(native, "transcode", lambda *a: calls.append(1) or transcode(*a))
    make_pack(tars, tmp_path / "pack")
    assert len(calls) < 48
    assert tree(tmp_path / "pack") == expected


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture
def damaged(
    images: dict[str, tuple[bytes, int]], tmp_path: Path
) -> tuple[Path, dict[str, tuple[bytes, int]]]:
    """Tars of which two samples are no images."""
    (tmp_path / "damaged").mkdir()
    contents = {**images, "n00000000_3": (b"no image", 0), "n00000002_40": (b"\xff\xd8\xff", 2)}
    write_tar(tmp_path / "damaged/photos.tar", contents)
    return tmp_path / "damaged", contents


def test_damaged_images_stop_the_packing_at_its_end(
    damaged: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(PackError, match=r"2 of 48 images(.|\n)*n00000000_3(.|\n)*n00000002_40"):
        make_pack(damaged[0], tmp_path / "pack")


@pytest.mark.parametrize("on_error", ["skip", "keep"])
@pytest.mark.parametrize("index", ["kept", "made"])
def test_damaged_images_are_left_out_or_kept(
    damaged: tuple[Path, dict[str, tuple[bytes, int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_error: str,
    index: str,
) -> None:
    if index == "kept":
        monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
        open_source(damaged[0])
    summary = make_pack(damaged[0], tmp_path / "pack", on_error=on_error)
    kept = on_error == "keep"
    assert summary.num_samples == (48 if kept else 46)
    assert [failure.kept for failure in summary.failures] == [kept, kept]
    again = make_pack(damaged[0], tmp_path / "pack", on_error=on_error)
    assert again.was_complete
    assert verify(tmp_path / "pack", progress=False).problems == ()


def test_a_truncated_file_stops_the_pass_and_a_whole_one_continues_it(
    editable: Path, tars: Path, tmp_path: Path
) -> None:
    os.truncate(editable / "photos-1.tar", 10**6)
    with pytest.raises(DataError, match=r"photos-1\.tar"):
        make_pack(editable, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    with pytest.raises(DataError, match=r"photos-1\.tar"):
        make_pack(editable, tmp_path / "pack", on_error="keep")
    shutil.copy2(tars / "photos-1.tar", editable)
    assert make_pack(editable, tmp_path / "pack").num_samples == 48
    assert verify(tmp_path / "pack", tars, progress=False).problems == ()


def test_a_source_that_cannot_be_opened_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/photos.tar", {"a": (noise(0), -5)})
    with pytest.raises(DataError):
        make_pack(tmp_path / "tars", tmp_path / "pack")
    assert not (tmp_path / "pack.partial").exists()


def test_what_cannot_be_indexed_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/photos.tar", {"a": (noise(0), 0), "b": (noise(1), -5)})
    with pytest.raises(DataError):
        make_pack(tmp_path / "tars", tmp_path / "pack")
    summary = make_pack(tmp_path / "tars", tmp_path / "pack", on_error="skip")
    assert summary.num_samples == 1
    assert "left out 1 of 2" in "".join(summary.notes)


# ---- subsets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each of four classes."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(8)
    for name in ("n01", "n02", "n10", "n20"):
        (root / name).mkdir()
        for i in range(10):
            (root / name / f"{name}_{i}.jpg").write_bytes(jpeg_bytes(photo_like(rng, 24, 20)))
    return root


def chosen(folder: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Classes of a pack, and how many samples each has."""
    index = open_source(folder).index
    counts = np.bincount(index.targets, minlength=len(index.classes)).tolist()
    for name, label in zip(index.name, index.targets, strict=True):
        assert name.startswith(index.classes[label])
    return index.classes, dict(zip(index.classes, counts, strict=True))


@pytest.mark.parametrize(
    ("options", "expected_classes"),
    [
        ({"include": ["n0*"]}, ("n01", "n02")),
        ({"include": ["n20", "n01"]}, ("n01", "n20")),
        ({"exclude": ["*0"]}, ("n01", "n02")),
        ({"include": ["n[01]*"], "exclude": ["n02"]}, ("n01", "n10")),
        ({"classes": ["n20 tench, Tinca tinca", "n02"]}, ("n02", "n20")),
        ({"classes": ["n20", "n02"], "exclude": ["n2*"]}, ("n02",)),
    ],
)
def test_classes_are_chosen_and_numbered_anew(
    classes: Path, tmp_path: Path, options: dict[str, Any], expected_classes: tuple[str, ...]
) -> None:
    make_pack(classes, tmp_path / "pack", **options)
    assert chosen(tmp_path / "pack") == (expected_classes, dict.fromkeys(expected_classes, 10))
    assert verify(tmp_path / "pack", classes, progress=False).problems == ()


def test_a_subset_is_the_pack_of_a_folder_with_these_classes(classes: Path, tmp_path: Path) -> None:
    for name in ("n02", "n10"):
        shutil.copytree(classes / name, tmp_path / "two" / name)
    make_pack(classes, tmp_path / "subset", include=["n02", "n10"])
    make_pack(tmp_path / "two", tmp_path / "pack")
    subset, whole = tree(tmp_path / "subset"), tree(tmp_path / "pack")
    assert subset.pop("pack.json") != whole.pop("pack.json")  # which records how it was chosen
    assert subset == whole


def test_a_limit_takes_the_same_samples_whatever_the_order(classes: Path, tmp_path: Path) -> None:
    names = {}
    for limit, seed in ((3, 0), (3, 1), (5, 0), (50, 0)):
        folder = tmp_path / f"{limit} {seed}"
        make_pack(classes, folder, limit=limit, settings=Settings(seed=seed))
        assert set(chosen(folder)[1].values()) == {min(limit, 10)}
        names[limit, seed] = set(open_source(folder).index.name)
    assert names[3, 0] == names[3, 1] < names[5, 0] < names[50, 0]
    assert {int(name[-5]) for name in names[3, 0]} != {0, 1, 2}


def test_a_subset_of_large_files_is_that_of_folders(tmp_path: Path) -> None:
    for name in ("official", "webdataset", "images", "parquet"):
        pack_dataset(FIXTURES / name, tmp_path / name, limit=2, exclude=["n0144*"], progress=False)
    for split in ("train", "val"):
        labels = {
            name: open_source(tmp_path / name, split).index.classes
            for name in ("official", "images")
        }
        assert labels["official"]
        assert not any(wnid.startswith("n0144") for wnid in labels["official"])
        report = verify(
            tmp_path / "parquet" / split, FIXTURES / "parquet", split=split, progress=False
        )
        assert report.problems == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["x*"]},
            r"'x\*' matches no class of .*: its 4 classes are n01, n02, n10, ...",
        ),
        ({"exclude": ["n3"]}, "'n3' matches no class"),
        ({"classes": ["n01", "tench"]}, "'tench' is no class of"),
        ({"exclude": ["*"]}, "no class is left of its 4"),
        ({"limit": 0}, "limit: expected 1 or more"),
        ({"classes": []}, "expected names of classes, got none"),
    ],
)
def test_a_selection_that_selects_nothing_is_refused(
    classes: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_pack(classes, tmp_path / "pack", **options)
    assert not list(tmp_path.iterdir())


def test_another_selection_is_another_pack(classes: Path, tmp_path: Path) -> None:
    make_pack(classes, tmp_path / "pack", limit=2)
    assert make_pack(classes, tmp_path / "pack", limit=2).was_complete
    with pytest.raises(PackError, match="limit: 2 before, 3 now"):
        make_pack(classes, tmp_path / "pack", limit=3)
    with pytest.raises(PackError, match="is no pack of this source"):
        make_pack(classes, tmp_path / "pack")


def test_a_file_of_classes_on_the_command_line(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_text("# two of them\nn20\nn02 # a comment\n\nn10 with a name\n")
    command = ["pack", str(classes), str(tmp_path / "pack"), "--classes", str(tmp_path / "list")]
    assert main([*command, "--exclude", "n10,n01", "--limit", "4"]) == 0
    assert chosen(tmp_path / "pack") == (("n02", "n20"), {"n02": 4, "n20": 4})
    assert main([*command[:3], "--include", "x"]) == 1
    assert "'x' matches no class" in capsys.readouterr().err
