"""Hugging Face's Parquet and Arrow files: what is recognised, read and refused."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq.errors import DataError
from imagenet_seq.index.source import Source
from imagenet_seq.loader import Loader
from imagenet_seq.read import disk, turns
from imagenet_seq.read.arrange import source_bytes
from imagenet_seq.read.turns import lock_path
from imagenet_seq.sources.recognise import open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FIXTURES = Path(__file__).parents[1] / "fixtures"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
WNIDS = ("n01440764", "n01443537", "n02123045", "n07753592", "n15075141")
IMAGES = [b"\xff\xd8\xff" + bytes([i]) * (50 + 7 * i) for i in range(30)]

Samples = list[tuple[bytes, int]]


def samples_of(source: Source) -> Samples:
    """All samples' bytes and labels, in the order of the index."""
    index, dataset = source.index, Loader(replace(source, notes=()), "val").dataset
    return [(dataset.encoded(i), int(index.targets[i])) for i in range(len(index))]


def rows(images: Sequence[Any] = IMAGES, labels: Sequence[Any] | None = None) -> Any:
    """A table of images, which may be None, or pairs of bytes and path."""
    pairs = [
        i if isinstance(i, tuple) or i is None else (i, f"{n}.jpg") for n, i in enumerate(images)
    ]
    structs = [
        None if pair is None else dict(zip(("bytes", "path"), pair, strict=True)) for pair in pairs
    ]
    labels = [n % 3 for n in range(len(images))] if labels is None else labels
    return pa.table({"image": pa.array(structs, IMAGE), "label": pa.array(labels, pa.int64())})


def named(table: Any, names: Sequence[str]) -> Any:
    """A table whose labels have names, as `datasets` keeps them."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": about})


def write_parquet(path: Path, table: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"row_group_size": 8, **options})
    return path


def write_arrow(path: Path, table: Any, **options: Any) -> Path:
    """A folder as save_to_disk makes it; returns the file in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table, max_chunksize=8)
    state = {"_data_files": [{"filename": path.name}], "_split": None}
    (path.parent / "state.json").write_text(json.dumps(state))
    return path


Write = Callable[[Path, Any], Path]
WRITERS = pytest.mark.parametrize(
    ("write", "name"), [(write_parquet, "a.parquet"), (write_arrow, "a.arrow")]
)


# ---- what is there -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["train", "val"])
def split(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def folder_samples(split: str) -> Samples:
    folders = sorted((FIXTURES / "images" / split).iterdir())
    return [(p.read_bytes(), n) for n, folder in enumerate(folders) for p in folder.iterdir()]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("parquet", "parquet"),
        ("parquet/data", "parquet"),
        ("hf_disk", "arrow"),
        ("hf_cache", "arrow"),
        ("hf_cache/imagenet-1k", "arrow"),
    ],
)
def test_what_datasets_writes_has_the_images_and_labels_of_the_folder(
    path: str, kind: str, split: str
) -> None:
    source = open_source(FIXTURES / path, split)
    assert source.kind == kind
    assert source.index.classes == WNIDS
    assert sorted(samples_of(source)) == sorted(folder_samples(split))
    assert len(set(source.index.name)) == len(source.index)
    assert source.notes == ()


@pytest.mark.parametrize(
    "path",
    [
        "parquet/data/validation-00000-of-00001-5f0cfcc4a9f4d3e0.parquet",
        "parquet/data/val*.parquet",
        "hf_disk/validation",
        "hf_disk/validation/data-00000-of-00001.arrow",
    ],
)
def test_a_file_a_pattern_and_a_splits_folder_need_no_split(path: str) -> None:
    assert sorted(samples_of(open_source(FIXTURES / path))) == sorted(folder_samples("val"))


def test_names_tell_file_row_and_what_the_row_was(tmp_path: Path) -> None:
    images = [
        (IMAGES[0], "a/b/c.png"), (b"\x89PNG 1", None), (IMAGES[1], "plain"), (b"GIF89a", None),
        (b"P5 1 1 255 x", "grey.pgm"), (b"of no format", None),
    ]  # fmt: skip
    for path in (
        write_parquet(tmp_path / "p" / "x.parquet", rows(images)),
        write_arrow(tmp_path / "a" / "x.arrow", rows(images)),
    ):
        names = list(open_source(path).index.name)
        assert names == [
            "x/0-c.png", "x/1.png", "x/2-plain.jpg", "x/3.gif", "x/4-grey.pgm", "x/5.jpg",
        ]  # fmt: skip


def test_the_hub_cache_is_looked_into(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--imagenet-1k"
    data = cache / "snapshots" / "0123abcd" / "data"
    (cache / "blobs").mkdir(parents=True)
    data.mkdir(parents=True)
    for number, path in enumerate(sorted((FIXTURES / "parquet" / "data").iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (data / path.name).symlink_to(f"../../../blobs/{number}")
    assert sorted(samples_of(open_source(cache, "train"))) == sorted(folder_samples("train"))


@WRITERS
def test_without_a_split_files_of_one_only(tmp_path: Path, write: Write, name: str) -> None:
    with pytest.raises(ValueError, match="pass split='train' or split='val'"):
        open_source(FIXTURES / "parquet" / "data")
    with pytest.raises(ValueError, match="train, validation of save_to_disk: pass a split"):
        open_source(FIXTURES / "hf_disk")
    write(tmp_path / f"x-test-00000-of-00001{name[1:]}", rows())
    write(tmp_path / f"x-train-00000-of-00001{name[1:]}", rows())
    (tmp_path / "state.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="files of train and others, such as x-test"):
        open_source(tmp_path)


@WRITERS
def test_classes_are_named_by_wnids_else_as_the_file_does(
    tmp_path: Path, write: Write, name: str
) -> None:
    thousand = ["tench, Tinca tinca", *map(str, range(998)), "toilet tissue"]
    first = open_source(write(tmp_path / "1" / name, named(rows(), thousand)))
    assert first.index.classes[:2] == WNIDS[:2]
    assert len(first.index.classes) == 1000
    second = open_source(write(tmp_path / "2" / name, named(rows(), ["crane", "ox", "crane", "x"])))
    assert second.index.classes == ("crane (0)", "ox", "crane (2)", "x")
    assert open_source(write(tmp_path / "3" / name, rows())).index.classes == ("0", "1", "2")


@WRITERS
def test_columns_are_found_by_type_else_by_name(tmp_path: Path, write: Write, name: str) -> None:
    table = rows().rename_columns(["photo", "kind"])
    found = open_source(write(tmp_path / "1" / name, table.append_column("text", [["x"] * 30])))
    assert samples_of(found)[4] == (IMAGES[4], 1)
    wide = rows().append_column("id", pa.array(range(30)))
    assert samples_of(open_source(write(tmp_path / "2" / name, wide)))[4] == (IMAGES[4], 1)


@WRITERS
@pytest.mark.parametrize(
    ("change", "listed"),
    [
        (lambda t: t.set_column(1, "label", [["dog"] * 30]), "label: string"),
        (lambda t: t.drop_columns("label"), "image: struct<"),
        (lambda t: t.set_column(0, "image", [IMAGES]), "image: binary"),
        (
            lambda t: t.rename_columns(["image", "a"]).append_column("b", pa.array(range(30))),
            "a: int64, b: int64",
        ),
    ],
)
def test_without_one_column_of_each_the_columns_are_listed(
    tmp_path: Path, write: Write, name: str, change: Callable[[Any], Any], listed: str
) -> None:
    path = write(tmp_path / name, change(rows()))
    with pytest.raises(DataError, match="expected one column of images") as caught:
        open_source(path)
    assert listed in str(caught.value)


@pytest.mark.parametrize("label", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
@WRITERS
def test_labels_of_any_width(tmp_path: Path, write: Write, name: str, label: Any) -> None:
    table = rows().set_column(1, "label", pa.array([5, 0, 1] * 10, label))
    assert open_source(write(tmp_path / name, table)).index.targets[:3] == [5, 0, 1]


def test_large_binary_and_several_buffers(tmp_path: Path) -> None:
    large = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    structs = [{"bytes": image, "path": None} for image in IMAGES]
    table = rows().set_column(0, "image", pa.array(structs, large))
    for path in (
        write_parquet(tmp_path / "p" / "x.parquet", table, data_page_size=100),
        write_arrow(tmp_path / "a" / "x.arrow", table),
    ):
        assert [data for data, _ in samples_of(open_source(path))] == IMAGES


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("shuffle", [False, True, "block"])
def test_row_groups_train(tmp_path: Path, compression: str, shuffle: Any) -> None:
    train = FIXTURES / "images" / "train"
    images = [(path.read_bytes(), path.name) for path in sorted(train.rglob("*.JPEG"))]
    path = write_parquet(tmp_path / "x.parquet", rows(images), compression=compression)
    loader = Loader(path, "train", batch_size=4, shuffle=shuffle, num_workers=2, drop_last=False)
    labels = np.concatenate([targets.numpy() for _, targets in loader])
    assert sorted(labels) == sorted(i % 3 for i in range(len(images)))
    assert loader.stats()["python_blocks"] >= 3


# ---- what is wrong -------------------------------------------------------------------------------


@WRITERS
@pytest.mark.parametrize("image", [None, (None, "gone.jpg")])
def test_a_row_without_image(tmp_path: Path, write: Write, name: str, image: Any) -> None:
    path = write(tmp_path / name, rows([*IMAGES[:12], image, *IMAGES[13:]]))
    with pytest.raises(DataError, match=r"row 12 .*got no image.*--on-error skip"):
        open_source(path)
    source = open_source(path, on_error="skip")
    assert [data for data, _ in samples_of(source)] == IMAGES[:12] + IMAGES[13:]
    assert "left out 1 of 30" in source.notes[0]


@WRITERS
@pytest.mark.parametrize(
    ("label", "got"), [(None, "None"), (4, "4"), (-2, "-2"), (1 << 40, "1099")]
)
def test_a_row_with_a_wrong_label(
    tmp_path: Path, write: Write, name: str, label: int | None, got: str
) -> None:
    labels = [0, 1, 2, label, -1, *[0] * 25]
    path = write(tmp_path / name, named(rows(labels=labels), ["a", "b", "c", "d"]))
    with pytest.raises(DataError, match=rf"row 3 3.jpg: .*got the label {got}"):
        open_source(path)
    found = samples_of(open_source(path, on_error="skip"))
    assert found[3] == (IMAGES[4], -1)
    assert len(found) == 29


@WRITERS
def test_a_label_that_no_data_set_has_does_not_name_so_many_classes(
    tmp_path: Path, write: Write, name: str
) -> None:
    path = write(tmp_path / name, rows(labels=[2_000_000_000] * 30))
    with pytest.raises(DataError, match=r"a label in \[0, 100000\)"):
        open_source(path)


@WRITERS
def test_no_row_at_all(tmp_path: Path, write: Write, name: str) -> None:
    with pytest.raises(DataError, match="expected images, found none"):
        open_source(write(tmp_path / name, rows([])))


@WRITERS
def test_files_with_other_classes(tmp_path: Path, write: Write, name: str) -> None:
    write(tmp_path / f"1-{name}", named(rows(), ["a", "b", "c"]))
    write(tmp_path / f"2-{name}", named(rows(), ["a", "c", "b"]))
    with pytest.raises(
        DataError, match=r"2-a.*expected the columns and classes of the files before"
    ):
        open_source(tmp_path / f"*{name}")


@pytest.mark.parametrize("folder", ["parquet/data", "hf_disk/train"])
def test_a_missing_shard(tmp_path: Path, folder: str) -> None:
    copy = tmp_path / folder
    shutil.copytree(FIXTURES / folder, copy)
    gone = next(copy.glob("*-00000-of-00002*"))
    gone.unlink()
    expected = FileNotFoundError if folder == "hf_disk/train" else DataError
    with pytest.raises(expected, match=r"00000"):
        open_source(copy, "train" if expected is DataError else None)
    assert len(open_source(copy / "*-00001-of-00002*").index) == 10


@pytest.mark.parametrize("path", ["parquet/data", "hf_disk/train"])
def test_wrong_first_bytes(tmp_path: Path, path: str) -> None:
    copy = tmp_path / path
    shutil.copytree(FIXTURES / path, copy)
    for file in copy.glob("*-of-*"):
        file.write_bytes(b"<html>" + file.read_bytes()[6:])
    with pytest.raises(FileNotFoundError, match="does not begin"):
        open_source(copy, "train" if "data" in copy.parts[-1] else None)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../other.arrow"}]}, "which are not beside it"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "'gone.arrow'.*not beside it"),
        ({"_data_files": []}, "not beside it"),
        ({"_data_files": 3}, "is not what save_to_disk writes"),
        (
            {"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i.arrow"}]},
            "flatten_indices",
        ),
    ],
)
def test_a_wrong_state(tmp_path: Path, state: Any, message: str) -> None:
    write_arrow(tmp_path / "a.arrow", rows())
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(FileNotFoundError, match=message):
        open_source(tmp_path)


def test_compressed_batches_are_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", rows(), compression="zstd")
    with pytest.raises(DataError, match="compressed: images can be read only where they lie"):
        open_source(path)


def test_without_pyarrow_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for folder in ("parquet/data", "hf_disk/train"):
        with pytest.raises(ImportError, match="pip install pyarrow"):
            open_source(FIXTURES / folder, "train" if "data" in folder else None)


def test_an_empty_image(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", rows([*IMAGES[:12], b""]))
    with pytest.raises(DataError, match=r"row 12 12.jpg: .*got no image"):
        open_source(path)
    # Of Parquet, indexing does not read lengths, so it shows when the image is wanted.
    path = write_parquet(tmp_path / "a.parquet", rows([*IMAGES[:12], b""]))
    assert samples_of(open_source(path))[12] == (b"", 0)


def test_files_are_read_in_turns_from_a_disk_with_one_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in turns with other processes, which hold the disk's lock."""
    path = write_parquet(tmp_path / "a.parquet", rows())
    monkeypatch.setenv("IMAGENET_SEQ_DISK", "hdd")
    monkeypatch.setattr(turns, "_LOCK_WAIT_S", 60)
    refused, flock = threading.Event(), fcntl.flock

    def noted_flock(*arguments: Any) -> None:
        try:
            flock(*arguments)
        except OSError:
            refused.set()
            raise

    monkeypatch.setattr(fcntl, "flock", noted_flock)
    source = open_source(path)
    with open(lock_path(disk.choose_disk(path)), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as pool:
            block = pool.submit(source.read_block, 0)
            assert refused.wait(60)
            assert not block.done()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert len(block.result().offsets)
    assert [data for data, _ in samples_of(source)] == IMAGES


def test_a_file_that_is_replaced_while_it_is_open_is_refused(tmp_path: Path) -> None:
    """Its rows would come with the labels of the rows before."""
    path = write_parquet(tmp_path / "a.parquet", rows())
    source = open_source(path)
    write_parquet(path, rows(IMAGES[::-1]))
    with pytest.raises(DataError, match=r"a\.parquet: was replaced or written to since"):
        source.read_block(0)


def test_the_size_of_a_source_without_lengths_is_that_of_its_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows())
    assert source_bytes(open_source(path)) == path.stat().st_size


def test_a_large_row_group_is_remarked(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    path = write_parquet(
        tmp_path / "a.parquet", rows([noise] * 258), row_group_size=258, use_dictionary=False
    )
    notes = open_source(path).notes
    assert "row groups have up to 258 MB" in notes[0]
    assert "imagenet-seq pack" in notes[0]


@WRITERS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_gives_an_error_or_bytes_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, write: Write, name: str, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("damaged") / name, rows(IMAGES[:20]))
    damaged = bytearray(path.read_bytes())
    end = len(damaged)
    if write is write_parquet:
        # Some damage to the description of columns, at the end, makes pyarrow end the process.
        end -= 8 + int.from_bytes(damaged[-8:-4], "little")
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(4, len(damaged) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(4, end - 1))
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        index = open_source(path, on_error="skip").index
    except DataError:
        return
    if write is write_arrow:
        assert (index.offset + index.length <= len(damaged)).all()
        assert (index.offset >= 0).all()
    else:
        read_all_blocks(open_source(path, on_error="skip"))


def read_all_blocks(source: Source) -> None:
    for number in range(len(source.index.files)):
        try:
            block = source.read_block(number)
        except DataError:
            continue
        assert (block.offsets + block.lengths <= len(block.bytes)).all()
