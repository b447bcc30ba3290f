"""Packs: reproducible, whole or absent, readable by anyone, and never believed blindly."""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers.images import jpeg_bytes, photo_like, segments
from helpers.jpeg_writer import Jpeg
from PIL import Image

from imagenet_seq import native
from imagenet_seq.errors import DataError, PackError
from imagenet_seq.index.columns import Names
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.io_log import IoLog
from imagenet_seq.pack.packing import pack_dataset
from imagenet_seq.pack.scratch import Buckets
from imagenet_seq.pack.shards import Summary
from imagenet_seq.pack.task import OnImageError
from imagenet_seq.pack.verify import verify
from imagenet_seq.read.disk import Disk
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded
from imagenet_seq.sources.recognise import open_source

SMALL_SHARDS = Settings(shard_bytes=60_000)
OWN_TABLES = Settings(shard_bytes=60_000, tables="image")
"""Bytes of an image then follow from it alone, not from others that tables are fitted to."""
FOUR_SHARDS = Settings(shard_bytes=1_300_000)
"""Of `noisy_source`."""


def make_pack(source: Path, destination: Path, **options: Any) -> Summary:
    options = {"settings": SMALL_SHARDS, "num_workers": 2, "progress": False, **options}
    return pack_dataset(source, destination, **options)[""]


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels(data: bytes) -> tuple[str, tuple[int, int], bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.size, image.tobytes()


def image_of(folder: Path, sample: int) -> bytes:
    """The stored bytes of a sample, found through the public index."""
    index = open_source(folder).index
    path = folder / index.files[int(index.file[sample])]
    assert index.length is not None
    begin = int(index.offset[sample])
    return path.read_bytes()[begin : begin + int(index.length[sample])]


def read_webdataset(shards: list[str]) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        # The package leaves its files to the garbage collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def huffman_tables(data: bytes) -> list[bytes]:
    """The payloads of a JPEG's DHT segments."""
    return [payload for marker, payload in segments(data) if marker == 0xC4]


def problems(folder: Path, against: Path | None = None) -> str:
    return "\n".join(verify(folder, against, num_workers=2, progress=False).problems)


def add_image(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def source(make_folder: Callable[..., Path]) -> Path:
    return make_folder(40, num_classes=4) / "train"


@pytest.fixture(scope="module")
def noisy_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 100 KB: the buffers of a deal overflow in the middle of it."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(5)
    for i in range(48):
        noise = rng.integers(0, 256, (320, 320, 3), np.uint8)
        add_image(folder, f"class_{i % 3}/{i}.jpg", jpeg_bytes(Image.fromarray(noise), quality=92))
    return folder


# ---- what a pack holds ---------------------------------------------------------------------------


def test_samples_labels_and_pixels_are_those_of_the_source(source: Path, tmp_path: Path) -> None:
    summary = make_pack(source, tmp_path / "pack")
    original = open_source(source).index
    assert (summary.num_samples, summary.num_canonical, summary.failures) == (40, 40, ())
    opened = open_source(tmp_path / "pack")
    index = opened.index
    assert opened.kind == "pack"
    assert opened.permuted
    assert index.classes == original.classes
    assert sorted(zip(index.name, index.targets, strict=True)) == sorted(
        zip(original.name, original.targets, strict=True)
    )
    assert list(index.name) != list(original.name)
    assert len(index.files) > 2
    assert index.width is not None
    assert index.height is not None
    assert index.checksum is not None
    for sample, name in enumerate(index.name):
        data = image_of(tmp_path / "pack", sample)
        assert pixels(data) == pixels((source / name).read_bytes())
        assert (index.width[sample], index.height[sample]) == pixels(data)[1]
        assert index.checksum[sample] == native.crc32c(data)
    assert problems(tmp_path / "pack", source) == ""


def test_photos(sample_folder: Path, tmp_path: Path) -> None:
    settings = Settings(shard_bytes=10**7)
    summary = make_pack(sample_folder / "train", tmp_path / "pack", settings=settings)
    assert summary.num_samples == summary.num_canonical >= 500
    report = verify(tmp_path / "pack", sample_folder / "train", progress=False)
    assert report.problems == ()
    assert report.num_compared == summary.num_samples


def test_tarfile_tar_and_webdataset_read_the_shards(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "pack")
    expected = {
        name.removesuffix(".jpg"): (label, pixels((source / name).read_bytes()))
        for name, label in zip(
            open_source(source).index.name, open_source(source).index.targets, strict=True
        )
    }
    shards = sorted(map(str, (tmp_path / "pack").glob("*.tar")))
    members, listed = [], []
    for shard in shards:
        with tarfile.open(shard) as archive:
            members += archive.getnames()
        listing = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
        assert listing.stderr == ""
        listed += listing.stdout.split()
    assert members == listed
    assert sorted(members) == sorted(
        [k + ".jpg" for k in expected] + [k + ".cls" for k in expected]
    )
    found = {s["__key__"]: (int(s["cls"]), pixels(s["jpg"])) for s in read_webdataset(shards)}
    assert found == expected


STRANGE_NAMES = [
    "class/plain.jpg",
    "class/two.dots.jpg",
    "class/two%2Edots.jpg",
    "class/same.jpg",
    "class/same.JPEG",
    "class/same.jpeg.jpg",
    "class/.jpg",
    "class/.jpg.jpg",
    "class/spaces and 'quotes'.jpg",
    "class/line\nbreak.jpg",
    "class/gr\u00fc\u00dfe \u65e5\u672c.jpg",
    "class/" + os.fsdecode(b"not utf-8 \xff.jpg"),
    "class/" + "n" * 200 + ".jpg",
    "class/" + "\u00e9" * 110 + ".jpg",
    "__odd__/plain.jpg",
    "cl.ass/plain.jpg",
    "cl.ass/" + "/".join(["deep" * 20] * 5) + "/plain.jpg",
]


def test_strange_names_stay_apart_and_readable(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in STRANGE_NAMES:
        add_image(tmp_path / "source", name, jpeg_bytes(photo_like(rng, 24, 20)))
    make_pack(tmp_path / "source", tmp_path / "pack")
    assert problems(tmp_path / "pack", tmp_path / "source") == ""
    index = open_source(tmp_path / "pack").index
    assert sorted(index.name) == sorted(STRANGE_NAMES)
    keys = {pack_format.MemberNames(index.name).key(name) for name in index.name}
    assert len(keys) == len(STRANGE_NAMES)
    shards = sorted(map(str, (tmp_path / "pack").glob("*.tar")))
    found = {s["__key__"]: pixels(s["jpg"]) for s in read_webdataset(shards)}
    assert found.keys() == keys
    by_key = {pack_format.MemberNames(index.name).key(name): name for name in index.name}
    for key, stored in found.items():
        assert stored == pixels((tmp_path / "source" / by_key[key]).read_bytes())
    for shard in shards:
        assert subprocess.run(["tar", "tf", shard], capture_output=True, check=True).stderr == b""


def test_what_cannot_be_transcoded_is_stored_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    image = photo_like(rng, 40, 30)
    png = io.BytesIO()
    image.save(png, "PNG")
    two_frames = io.BytesIO()
    image.save(two_frames, "MPO", save_all=True, append_images=[image])
    kept = {
        "a/png.JPEG": png.getvalue(),
        "a/real.png": png.getvalue(),
        "a/cmyk.jpg": jpeg_bytes(image.convert("CMYK")),
        "b/two_frames.jpeg": two_frames.getvalue(),
    }
    for name, data in {**kept, "b/plain.JPEG": jpeg_bytes(image)}.items():
        add_image(tmp_path / "source", name, data)
    summary = make_pack(tmp_path / "source", tmp_path / "pack", settings=Settings())
    assert (summary.num_canonical, summary.num_as_is, summary.failures) == (1, 4, ())
    index = open_source(tmp_path / "pack").index
    for sample, name in enumerate(index.name):
        if name in kept:
            assert image_of(tmp_path / "pack", sample) == kept[name]
    with tarfile.open(tmp_path / "pack" / "shard-000000.tar") as archive:
        images = {name for name in archive.getnames() if not name.endswith(".cls")}
    assert images == {"a/png.jpeg", "a/real.png", "a/cmyk.jpg", "b/two_frames.jpeg", "b/plain.jpg"}
    assert problems(tmp_path / "pack", tmp_path / "source") == ""


def test_progressive_files_become_canonical(tmp_path: Path) -> None:
    image = photo_like(np.random.default_rng(5), 61, 43)
    data = jpeg_bytes(image, progressive=True)
    add_image(tmp_path / "source", "a/progressive.jpeg", data)
    settings = Settings(tables="image")
    summary = make_pack(tmp_path / "source", tmp_path / "pack", settings=settings)
    assert (summary.num_canonical, summary.num_as_is) == (1, 0)
    stored = image_of(tmp_path / "pack", 0)
    assert stored == native.transcode(jpeg_bytes(image))[0].tobytes()
    assert pixels(stored) == pixels(data)
    assert problems(tmp_path / "pack", tmp_path / "source") == ""

    keep = Settings(keep_bytes=True)
    make_pack(tmp_path / "source", tmp_path / "kept", settings=keep)
    assert image_of(tmp_path / "kept", 0) == data
    assert open_source(tmp_path / "kept").index.flags[0] == 0


@pytest.mark.parametrize("wrong", ["pixels", "size", "mode", "bytes"])
def test_progressive_files_stay_where_pillow_sees_a_difference(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photo_like(np.random.default_rng(6), 40, 30)
    data = jpeg_bytes(image, progressive=True)
    add_image(tmp_path / "source", "a/progressive.jpeg", data)
    other = {
        "pixels": jpeg_bytes(image.point(lambda value: value // 2)),
        "size": jpeg_bytes(image.crop((0, 0, 30, 40))),
        "mode": jpeg_bytes(image.convert("L")),
        "bytes": jpeg_bytes(image)[:-400],
    }[wrong]
    header = native.read_header(other)
    transcoded = np.frombuffer(other, np.uint8), header
    monkeypatch.setattr(native, "transcode", lambda *_: transcoded)
    summary = make_pack(tmp_path / "source", tmp_path / "pack", settings=Settings())
    assert (summary.num_canonical, summary.num_as_is) == (0, 1)
    assert image_of(tmp_path / "pack", 0) == data


def test_keep_bytes_stores_the_files(source: Path, tmp_path: Path) -> None:
    settings = Settings(keep_bytes=True, shard_bytes=60_000)
    assert make_pack(source, tmp_path / "pack", settings=settings).num_canonical == 0
    for sample, name in enumerate(open_source(tmp_path / "pack").index.name):
        assert image_of(tmp_path / "pack", sample) == (source / name).read_bytes()
    assert problems(tmp_path / "pack", source) == ""


def test_strip_and_restart_interval_reach_the_core(source: Path, tmp_path: Path) -> None:
    settings = Settings(strip=True, restart_interval=3, tables="image")
    make_pack(source, tmp_path / "pack", settings=settings)
    index = open_source(tmp_path / "pack").index
    for sample, name in enumerate(index.name):
        expected = native.transcode((source / name).read_bytes(), 3, True)
        assert expected is not None
        assert image_of(tmp_path / "pack", sample) == expected[0].tobytes()


def test_single_sample(tmp_path: Path) -> None:
    add_image(tmp_path / "source", "only/one.jpg", jpeg_bytes(Image.new("RGB", (8, 8))))
    assert make_pack(tmp_path / "source", tmp_path / "pack").num_samples == 1
    assert problems(tmp_path / "pack", tmp_path / "source") == ""


def test_an_empty_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    add_image(tmp_path / "source", "full/one.jpg", jpeg_bytes(Image.new("RGB", (8, 8))))
    (tmp_path / "source" / "hollow").mkdir()
    with pytest.raises(FileNotFoundError, match="hollow"):
        make_pack(tmp_path / "source", tmp_path / "pack")
    assert not (tmp_path / "pack.partial").exists()


def test_root_with_both_splits(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder(6, 2)
    for name in ("class_000", "class_001"):
        add_image(root / "val", f"{name}/v.jpg", jpeg_bytes(Image.new("RGB", (16, 16))))
    only_val = pack_dataset(root, tmp_path / "pack", splits=["val"], progress=False)
    assert list(only_val) == ["val"]
    both = pack_dataset(root, tmp_path / "pack", progress=False)
    assert {split: summary.num_samples for split, summary in both.items()} == {"train": 6, "val": 2}
    for split in both:
        assert open_source(tmp_path / "pack", split).kind == "pack"
    with pytest.raises(FileNotFoundError, match="is by its name the other split, val"):
        pack_dataset(root / "val", tmp_path / "other", splits=["train"], progress=False)


def test_a_split_that_cannot_be_packed_is_refused_before_the_other_is_packed(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_folder(6, 2)
    add_image(root / "val", "flat.jpg", jpeg_bytes(Image.new("RGB", (16, 16))))
    with pytest.raises(FileNotFoundError, match="val holds 1 files but no class folders"):
        pack_dataset(root, tmp_path / "pack", progress=False)
    assert not (tmp_path / "pack").exists()


def test_classes_called_train_and_val_are_no_splits(tmp_path: Path) -> None:
    for name in ("train/a.jpg", "val/b.jpg", "bus/c.jpg"):
        add_image(tmp_path / "source", name, jpeg_bytes(Image.new("RGB", (16, 16))))
    make_pack(tmp_path / "source", tmp_path / "pack")
    assert open_source(tmp_path / "pack").index.classes == ("bus", "train", "val")


# ---- what packing must not touch -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("from_", "to"),
    [
        ("x/train.partial", "x/train"),
        ("x/train.partial/deep", "x/train"),
        ("x/train", "x/train"),
        ("x/train", "x/train/pack"),
        ("x/train", "x"),
        ("x/train", "link/train/pack"),
        ("x/train", "alias"),
    ],
)
def test_source_and_destination_must_lie_apart(
    make_folder: Callable[..., Path], tmp_path: Path, from_: str, to: str
) -> None:
    source = tmp_path / from_
    for name in ("a/one.jpg", "b/two.jpg"):
        add_image(source, name, jpeg_bytes(Image.new("RGB", (16, 16))))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "alias.partial").symlink_to(tmp_path / "x/train")
    before = tree(tmp_path / "x")
    with pytest.raises(ValueError, match=r"lie in, one another.*name a destination"):
        make_pack(source, tmp_path / to)
    assert tree(tmp_path / "x") == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "symlink", "symlink to an unfinished pack"])
def test_a_partial_folder_of_somebody_else_is_not_touched(
    source: Path, tmp_path: Path, kind: str, finished: bool
) -> None:
    if finished:
        make_pack(source, tmp_path / "pack")
    other = tmp_path / "other"
    add_image(other, "dealt", b"mine")
    partial = tmp_path / "pack.partial"
    if kind == "folder":
        other.rename(partial)
    elif kind == "file":
        partial.write_bytes(b"mine")
    else:
        partial.symlink_to(other)
    if kind == "symlink to an unfinished pack":
        add_image(other, "lock", b"")
    before = tree(tmp_path)
    if finished:
        assert make_pack(source, tmp_path / "pack").was_complete
    else:
        with pytest.raises(PackError, match="was not made by imagenet-seq pack: move it"):
            make_pack(source, tmp_path / "pack")
    assert tree(tmp_path) == before
    assert partial.is_symlink() == kind.startswith("symlink")


def test_a_strange_file_in_the_partial_folder_outlives_the_packing(
    source: Path, tmp_path: Path
) -> None:
    add_image(tmp_path / "pack.partial", "lock", b"")
    add_image(tmp_path / "pack.partial", "notes.txt", b"mine")
    make_pack(source, tmp_path / "pack")
    assert tree(tmp_path / "pack.partial").keys() == {"notes.txt"}


def test_a_deletion_cut_short_is_still_known_as_ours(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, left = os.unlink, []

    def dying(path: Any, *arguments: Any, **options: Any) -> None:
        if not left and str(path).endswith("pack.partial/lock"):
            left.extend(os.listdir(tmp_path / "pack.partial"))
            raise KeyboardInterrupt
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        make_pack(source, tmp_path / "pack")
    assert left == ["lock"]
    assert make_pack(source, tmp_path / "pack").was_complete
    assert not (tmp_path / "pack.partial").exists()


# ---- reproducible --------------------------------------------------------------------------------


def test_same_bytes_from_any_disk_order_and_number_of_threads(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "one", num_workers=1)
    copy = tmp_path / "copy/train"
    for path in sorted(source.rglob("*.jpg"), reverse=True):
        add_image(copy, str(path.relative_to(source)), path.read_bytes())
    make_pack(copy, tmp_path / "two", num_workers=4)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_bytes_of_a_pack_stay_what_they_always_were(tmp_path: Path) -> None:
    """A pack made by the first version of the format, of images that no library encoded."""
    for i in range(12):
        image = Jpeg(24 + i, 20, sampling=[(2, 2), (1, 1), (1, 1)] if i % 2 else [(1, 1)])
        add_image(tmp_path / "source", f"class_{i % 3}/{i}.jpg", image.data())
    make_pack(tmp_path / "source", tmp_path / "pack", settings=Settings(shard_bytes=3500, seed=3))
    (tmp_path / "pack/pack.json").unlink()  # it names the program's version
    assert {name: digest[:16] for name, digest in tree(tmp_path / "pack").items()} == {
        "index.npy": "8eeeaa4cc9818682",
        "names.npy": "62211b48d0f83323",
        "names_begin.npy": "f78edca7ca2cbfd5",
        "shard-000000.tar": "81ab267334421ca5",
        "shard-000001.tar": "af5273f9ce2ce1ad",
    }


def test_seed_moves_samples(source: Path, tmp_path: Path) -> None:
    names = []
    for seed in (0, 1):
        make_pack(source, tmp_path / str(seed), settings=Settings(seed=seed))
        names.append(list(open_source(tmp_path / str(seed)).index.name))
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1])


def test_a_place_depends_on_seed_and_name_alone(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "all", settings=Settings())
    order = list(open_source(tmp_path / "all").index.name)
    fewer = tmp_path / "fewer"
    for name in order[::2]:
        add_image(fewer, name, jpeg_bytes(Image.new("RGB", (9, 9))))
    make_pack(fewer, tmp_path / "pack", settings=Settings())
    assert list(open_source(tmp_path / "pack").index.name) == order[::2]


def test_dealing_in_two_levels_gives_the_same_pack(noisy_source: Path, tmp_path: Path) -> None:
    settings = Settings(shard_bytes=400_000)
    make_pack(noisy_source, tmp_path / "one", settings=settings)
    assert len(list((tmp_path / "one").glob("*.tar"))) > 8
    make_pack(noisy_source, tmp_path / "two", settings=settings, memory_bytes=3 << 20)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# ---- requests of the disk ------------------------------------------------------------------------


def requests(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("known", ["all", "some", "none"])
def test_the_source_is_read_in_the_order_it_lies_on_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    def look_up(path: str) -> tuple[int, int]:
        digest = hashlib.sha256(os.path.basename(path).encode()).digest()
        is_known = known == "all" or (known == "some" and digest[0] % 2)
        return os.stat(path).st_size, digest[1] << 12 if is_known else -1

    monkeypatch.setattr(native, "look_up", look_up)
    make_pack(source, tmp_path / "pack", io_log=tmp_path / "log")
    for name in ("choose tables", "deal"):
        reads = [r for r in requests(tmp_path / "log") if r["pass"] == name and "address" in r]
        assert sorted(r["file"] for r in reads) == sorted(map(str, source.rglob("*.jpg")))
        expected = [(look_up(r["file"])[1], os.stat(r["file"]).st_ino) for r in reads]
        assert [(r["address"], r["inode"]) for r in reads] == expected == sorted(expected)
        assert all((r["offset"], r["bytes"]) == (0, os.stat(r["file"]).st_size) for r in reads)


@pytest.mark.parametrize("memory_bytes", [4 << 20, 2 << 20], ids=["one level", "two levels"])
def test_the_log_has_every_byte_that_is_moved(
    noisy_source: Path, tmp_path: Path, memory_bytes: int
) -> None:
    options = {"settings": FOUR_SHARDS, "memory_bytes": memory_bytes}
    make_pack(noisy_source, tmp_path / "pack", io_log=tmp_path / "log", **options)
    bytes_of: dict[tuple[str, str], int] = {}
    ends: dict[str, int] = {}
    for request in requests(tmp_path / "log"):
        file = os.path.basename(request["file"]).removesuffix(".tmp")
        if request["op"] == "write" and file.startswith(("deal-", "split-", "shard-")):
            assert request["offset"] == ends.get(file, 0)  # appended, without holes
            ends[file] = request["offset"] + request["bytes"]
        key = request["op"], file.split("-")[0]
        bytes_of[key] = bytes_of.get(key, 0) + request["bytes"]
    image_bytes = json.loads((tmp_path / "pack/pack.json").read_text())["image_bytes"]
    for shard in (tmp_path / "pack").glob("*.tar"):
        assert ends[shard.name] == shard.stat().st_size
    kinds = {"deal", "split"} if memory_bytes == 2 << 20 else {"deal"}
    for operation in ("write", "read"):
        moved = {kind: n for (op, kind), n in bytes_of.items() if op == operation}
        assert {kind: moved.get(kind) for kind in kinds} == dict.fromkeys(kinds, image_bytes)
        assert ("split" in moved) == ("split" in kinds)


def test_a_continued_packing_goes_on_with_the_log(source: Path, tmp_path: Path) -> None:
    pack_until("replace", "rows-000000", source, tmp_path / "pack", io_log=tmp_path / "log")
    before = (tmp_path / "log").read_text()
    make_pack(source, tmp_path / "pack", io_log=tmp_path / "log")
    after = (tmp_path / "log").read_text()
    assert after.startswith(before)
    assert {r["pass"] for r in requests(tmp_path / "log")} == {"choose tables", "deal", "finish"}


def test_appends_are_long_and_memory_is_bounded(tmp_path: Path) -> None:
    num_buckets, memory_bytes, image_bytes = 50, 1_000_000, 1000
    log = IoLog(str(tmp_path / "log"))
    buffered = [0]

    def on_flush(rows: Any) -> None:
        buffered[0] -= int(rows["length"].sum())

    expected = dict.fromkeys(range(num_buckets), 400_000)
    buckets = Buckets(str(tmp_path), "deal", memory_bytes, expected, on_flush, log=log)
    rng = np.random.default_rng(9)
    image = Encoded(memoryview(bytes(image_bytes)), 1, 1, 0, 0)
    for sample in range(20_000):
        buffered[0] += image_bytes
        buckets.append(int(rng.integers(num_buckets)), sample, image, image_bytes, 0)
        assert buffered[0] < memory_bytes
    buckets.flush()
    assert buffered[0] == 0
    with log:
        pass
    writes = [r["bytes"] for r in requests(tmp_path / "log") if r["op"] == "write"]
    assert sum(writes) == 20_000 * image_bytes
    # A fixed share of the memory for each bucket would be half of this on average.
    assert np.mean(writes) > 1.5 * memory_bytes / num_buckets


def test_room_for_scratch_and_shards_is_reserved(
    noisy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: dict[str, int] = {}

    def preallocate(descriptor: int, size: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        assert os.path.getsize(path) == 0
        reserved[os.path.basename(path)] = size

    monkeypatch.setattr(native, "preallocate", preallocate)
    make_pack(noisy_source, tmp_path / "pack", settings=FOUR_SHARDS)
    shards = {f"{p.name}.tmp": p.stat().st_size for p in (tmp_path / "pack").glob("*.tar")}
    scratch = {name: size for name, size in reserved.items() if name.startswith("deal-")}
    assert len(scratch) == len(shards) == 4
    assert {name: reserved[name] for name in shards} == shards
    source_bytes = sum(path.stat().st_size for path in noisy_source.rglob("*.jpg"))
    assert sum(scratch.values()) == pytest.approx(1.05 * source_bytes, abs=4)


@pytest.mark.parametrize("file", ["deal-000001", "shard-000001.tar.tmp"])
def test_no_room_to_reserve_is_a_full_disk(
    noisy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str,
    uninterrupted: dict[str, str],
) -> None:  # fmt: skip
    def preallocate(descriptor: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(file):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as context:
        context.setattr(native, "preallocate", preallocate)
        with pytest.raises(PackError, match=r"the disk is full .*run the same command again"):
            continue_packing(noisy_source, tmp_path / "pack")
    continue_packing(noisy_source, tmp_path / "pack")
    assert tree(tmp_path / "pack") == uninterrupted


def test_room_that_is_reserved_already_is_not_asked_for_again(
    noisy_source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    scratch = unfinished.with_name("pack.partial") / "deal-000000"
    needed = 12_000_000
    with open(scratch, "r+b") as file:
        native.preallocate(file.fileno(), needed)
    if os.stat(scratch).st_blocks * 512 < needed:
        pytest.skip("this file system reserves nothing")
    usage = shutil.disk_usage(unfinished.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    continue_packing(noisy_source, unfinished)


@pytest.mark.parametrize("kind", ["hdd", "ssd", "two hdd"])
def test_one_head_writes_before_it_reads_on(
    noisy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def choose_disk(path: str) -> Disk:
        device = "8:16" if kind == "two hdd" and "pack" in os.path.basename(path) else "8:0"
        return Disk(kind.split()[-1], "made up", device)

    synced: list[str] = []
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr("imagenet_seq.pack.shards.choose_disk", choose_disk)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    log, options = tmp_path / "log", {"settings": FOUR_SHARDS, "memory_bytes": 4 << 20}
    make_pack(noisy_source, tmp_path / "pack", io_log=log, **options)
    appended = [
        os.path.basename(r["file"])
        for r in requests(log)
        if (r["pass"], r["op"]) == ("deal", "write") and "deal-" in r["file"]
    ]
    assert len(appended) >= 4
    waited = [name for name in synced if name.startswith("deal-")]
    assert sorted(waited) == (sorted(appended) if kind == "hdd" else [])


# ---- Huffman tables ------------------------------------------------------------------------------


def chosen_tables(folder: Path) -> bytes | None:
    described = json.loads((folder / "pack.json").read_text())["huffman_tables"]
    return described and bytes.fromhex(described["dht"])


def test_all_images_have_the_tables_of_their_pack(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "pack")
    counts = [native.count_symbols(path.read_bytes()) for path in source.rglob("*.jpg")]
    tables = native.fit_tables(np.sum(counts, axis=0))
    assert chosen_tables(tmp_path / "pack") == tables
    num_tables = set()
    for sample, name in enumerate(open_source(tmp_path / "pack").index.name):
        data = image_of(tmp_path / "pack", sample)
        transcoded = native.transcode((source / name).read_bytes(), tables=tables)
        assert transcoded is not None
        assert transcoded[0].tobytes() == data
        found = huffman_tables(data)
        assert tables.startswith(b"".join(found))
        num_tables.add(len(found))
    assert num_tables == {2, 4}  # grey images have the first two


def test_tables_are_fitted_to_a_sample_that_seed_and_names_choose(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagenet_seq.pack.plan.TABLES_SAMPLES", 10)
    chosen = set()
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        make_pack(source, folder, settings=Settings(shard_bytes=60_000, seed=seed))
        first = [source / name for name in open_source(folder).index.name[:10]]
        counts = [native.count_symbols(path.read_bytes()) for path in first]
        assert chosen_tables(folder) == native.fit_tables(np.sum(counts, axis=0))
        chosen.add(chosen_tables(folder))
    assert len(chosen) == 2


def test_each_image_may_have_its_own_tables(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "pack", settings=OWN_TABLES)
    assert chosen_tables(tmp_path / "pack") is None
    assert problems(tmp_path / "pack", source) == ""
    found = {b"".join(huffman_tables(image_of(tmp_path / "pack", i))) for i in range(40)}
    assert len(found) == 40
    with pytest.raises(PackError, match="exists already"):
        make_pack(source, tmp_path / "pack")


def test_a_source_without_any_image_to_fit_to(tmp_path: Path) -> None:
    image = photo_like(np.random.default_rng(8), 30, 20)
    add_image(tmp_path / "source", "a/other.jpg", jpeg_bytes(image.convert("CMYK")))
    assert make_pack(tmp_path / "source", tmp_path / "pack").num_as_is == 1
    assert problems(tmp_path / "pack", tmp_path / "source") == ""


def test_tables_stay_when_the_source_changes_before_the_packing_ends(
    editable: Path, source: Path, tmp_path: Path
) -> None:
    finish_shards_only(editable, tmp_path / "pack", on_error="skip")
    before = json.loads((tmp_path / "pack.partial/settings.json").read_text())["huffman_tables"]
    for path in source.rglob("*.jpg"):
        add_image(editable, str(path.relative_to(source)), path.read_bytes())
    make_pack(editable, tmp_path / "pack")
    make_pack(source, tmp_path / "whole")
    assert chosen_tables(tmp_path / "pack") == bytes.fromhex(before["dht"])
    assert chosen_tables(tmp_path / "pack") != chosen_tables(tmp_path / "whole")
    assert problems(tmp_path / "pack", source) == ""


def changed_tables(tables: bytes, crc: int | None = None) -> dict[str, str]:
    return {"dht": tables.hex(), "crc32c": f"{native.crc32c(tables) if crc is None else crc:08x}"}


@pytest.mark.parametrize(
    "tables",
    [5, {}, {"dht": 5}, {"dht": "xy", "crc32c": ""}, changed_tables(bytes(416), 1),
     changed_tables(bytes(415)), "missing"],
    ids=["number", "empty", "no text", "no hexadecimal", "checksum", "size", "missing"],
)  # fmt: skip
def test_tampered_tables_are_refused(source: Path, tmp_path: Path, tables: Any) -> None:
    finish_shards_only(source, tmp_path / "pack")
    partial = tmp_path / "pack.partial"
    for path in (partial / "settings.json", partial / "pack/pack.json"):
        content = json.loads(path.read_text())
        content["huffman_tables"] = tables
        if tables == "missing":
            del content["huffman_tables"]
        path.write_text(json.dumps(content))
    with pytest.raises(PackError, match=r"settings\.json: 'huffman_tables': .*delete the folder"):
        make_pack(source, tmp_path / "pack")
    with pytest.raises(
        DataError, match=r"pack\.json: 'huffman_tables': .*run 'imagenet-seq verify'"
    ):
        open_source(partial / "pack")


def test_tables_that_are_no_code_are_refused(source: Path, tmp_path: Path) -> None:
    finish_shards_only(source, tmp_path / "pack")
    path = tmp_path / "pack.partial/settings.json"
    content = json.loads(path.read_text())
    content["huffman_tables"] = changed_tables(bytes(416))
    path.write_text(json.dumps(content))
    next((tmp_path / "pack.partial").glob("rows-*")).unlink()
    with pytest.raises(ValueError, match="tables: expected 416 bytes as imseq_fit_tables gives"):
        make_pack(source, tmp_path / "pack")


# ---- interrupted ---------------------------------------------------------------------------------

KILLED = """
import importlib, os, signal, sys
from pathlib import Path
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset
source, destination, module, name, count, memory, format = sys.argv[1:]
module, left = importlib.import_module(module), int(count)
original = getattr(module, name)
def dying(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(module, name, dying)
settings = Settings(shard_bytes=1_300_000)
options = {"num_workers": 2, "memory_bytes": int(memory), "progress": False}
pack_dataset(source, destination, settings=settings, format=format, **options)
"""


def run_until_killed(source: Path, destination: Path, module: str, name: str, count: int,
                     memory_bytes: int, format: str = "pack") -> int:  # fmt: skip
    arguments = [source, destination, module, name, count, memory_bytes, format]
    # Calls are counted, and a cached scan, written only when the source is 2 s old, would be one.
    environment = {**os.environ, "IMAGENET_SEQ_CACHE": os.devnull}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.fixture(scope="module")
def uninterrupted(noisy_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "pack"
    make_pack(noisy_source, folder, settings=FOUR_SHARDS)
    return tree(folder)


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("imagenet_seq.native", "count_symbols", 20),
        ("imagenet_seq.native", "transcode", 0),
        ("imagenet_seq.native", "transcode", 40),
        ("os", "replace", 0),
        ("os", "replace", 1),
        ("os", "replace", 2),
        ("os", "replace", 5),
        ("os", "replace", 10),
        ("os", "replace", 13),
        ("os", "unlink", 0),
        ("os", "rename", 0),
        ("os", "rmdir", 0),
    ],
)
@pytest.mark.parametrize("memory_bytes", [4 << 20, 2 << 20], ids=["one level", "two levels"])
def test_killed_then_run_again_gives_the_same_bytes(
    noisy_source: Path,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    module: str,
    name: str,
    count: int,
    memory_bytes: int,
) -> None:
    destination = tmp_path / "pack"
    code = run_until_killed(noisy_source, destination, module, name, count, memory_bytes)
    assert code == -signal.SIGKILL
    if name != "rmdir":
        assert not destination.exists()
        with pytest.raises((DataError, FileNotFoundError)):
            open_source(destination)
    continue_packing(noisy_source, destination, memory_bytes=memory_bytes)
    assert tree(destination) == uninterrupted
    assert not (tmp_path / "pack.partial").exists()


@pytest.fixture
def unfinished(noisy_source: Path, tmp_path: Path) -> Path:
    """DESTINATION of a packing that was killed when all was dealt and no shard written."""
    code = run_until_killed(noisy_source, tmp_path / "pack", "os", "replace", 2, 4 << 20)
    assert code == -signal.SIGKILL
    return tmp_path / "pack"


def continue_packing(source: Path, destination: Path, **options: Any) -> Summary:
    return make_pack(source, destination, **{"settings": FOUR_SHARDS, **options})


def test_an_unfinished_pack_says_so(unfinished: Path) -> None:
    for path in (unfinished, unfinished.with_name("pack.partial")):
        with pytest.raises(DataError, match=r"unfinished pack.*run the same .*command again"):
            open_source(path)


def test_an_unfinished_root_says_so(unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    unfinished.with_name("pack.partial").rename(tmp_path / "root/train.partial")
    for split in (None, "train", "val"):
        with pytest.raises(DataError, match=r"train\.partial: unfinished pack.*run the same"):
            open_source(tmp_path / "root", split)


def test_a_second_run_reads_only_what_is_missing(
    noisy_source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    transcode = native.transcode
    monkeypatch.setattr(native, "transcode", lambda *a: calls.append(1) or transcode(*a))
    continue_packing(noisy_source, unfinished)
    assert len(calls) == 0


@pytest.mark.parametrize("damage", ["flip", "cut scratch", "cut journal", "append", "delete"])
def test_damaged_scratch_is_made_good_from_the_source(
    noisy_source: Path, unfinished: Path, uninterrupted: dict[str, str], damage: str
) -> None:
    partial = unfinished.with_name("pack.partial")
    scratch = partial / "deal-000001"
    content = bytearray(scratch.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        scratch.write_bytes(content)
    elif damage == "cut scratch":
        scratch.write_bytes(content[:-1000])
    elif damage == "cut journal":
        journal = partial / "dealt"
        journal.write_bytes(journal.read_bytes()[:-10])
    elif damage == "append":
        for path in (scratch, partial / "dealt"):
            path.write_bytes(path.read_bytes() + b"torn" * 100)
    else:
        scratch.unlink()
    continue_packing(noisy_source, unfinished)
    assert tree(unfinished) == uninterrupted


def test_other_settings_or_another_source_are_refused(
    noisy_source: Path, unfinished: Path, source: Path
) -> None:
    with pytest.raises(PackError, match=r"restart_interval: 8 before, 4 now[\s\S]*delete"):
        continue_packing(
            noisy_source, unfinished, settings=Settings(shard_bytes=1_300_000, restart_interval=4)
        )
    with pytest.raises(PackError, match=r"source: .* before, .* now"):
        continue_packing(source, unfinished)


def pack_until(name: str, suffix: str, source: Path, destination: Path, **options: Any) -> None:
    """Pack until os.`name` gets a last path that ends with `suffix`: there an interrupt comes."""
    original = getattr(os, name)

    def stopping(*paths: Any) -> Any:
        if str(paths[-1]).endswith(suffix):
            raise KeyboardInterrupt
        return original(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            make_pack(source, destination, **options)


def finish_shards_only(source: Path, destination: Path, **options: Any) -> None:
    """Pack up to the last rename."""
    pack_until("rename", destination.name, source, destination, **options)


@pytest.fixture
def editable(source: Path, tmp_path: Path) -> Path:
    """A copy of the source, with one damaged image."""
    copy = tmp_path / "editable/train"
    for path in source.rglob("*.jpg"):
        add_image(copy, str(path.relative_to(source)), path.read_bytes())
    next((copy / "class_001").glob("*.jpg")).write_bytes(b"damaged")
    return copy


@pytest.mark.parametrize("first", ["skip", "keep"])
@pytest.mark.parametrize("then", ["fail", "skip", "keep"])
def test_a_finished_shard_must_be_what_on_error_asks_for_now(
    editable: Path, tmp_path: Path, first: OnImageError, then: OnImageError
) -> None:
    finish_shards_only(editable, tmp_path / "pack", on_error=first)
    if then == "fail":
        with pytest.raises(PackError, match="1 of 40 images cannot be packed"):
            make_pack(editable, tmp_path / "pack")
        return
    make_pack(editable, tmp_path / "pack", on_error=then)
    make_pack(editable, tmp_path / "whole", on_error=then)
    assert tree(tmp_path / "pack") == tree(tmp_path / "whole")


def test_failures_that_were_repaired_leave_no_trace(
    editable: Path, source: Path, tmp_path: Path
) -> None:
    finish_shards_only(editable, tmp_path / "pack", on_error="skip", settings=OWN_TABLES)
    for path in source.rglob("*.jpg"):
        add_image(editable, str(path.relative_to(source)), path.read_bytes())
    make_pack(editable, tmp_path / "pack", settings=OWN_TABLES)
    make_pack(source, tmp_path / "whole", settings=OWN_TABLES)
    assert not (tmp_path / "pack/failures.json").exists()
    assert tree(tmp_path / "pack") == tree(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False], ids=["in a shard", "dealt"])
@pytest.mark.parametrize("same_length", [True, False])
def test_a_replaced_source_file_is_noticed(
    source: Path, tmp_path: Path, finished: bool, same_length: bool
) -> None:
    copy = tmp_path / "copy"
    for path in source.rglob("*.jpg"):
        add_image(copy, str(path.relative_to(source)), path.read_bytes())
    if finished:
        finish_shards_only(copy, tmp_path / "pack", settings=OWN_TABLES)
    else:
        pack_until("replace", "rows-000000", copy, tmp_path / "pack", settings=OWN_TABLES)
    name = open_source(copy).index.name[3]
    data = (copy / name).read_bytes()
    new = jpeg_bytes(Image.new("RGB", (8, 8)))
    (copy / name).write_bytes(new + bytes(len(data) - len(new)) if same_length else new)
    make_pack(copy, tmp_path / "pack", settings=OWN_TABLES)
    make_pack(copy, tmp_path / "whole", settings=OWN_TABLES)
    assert tree(tmp_path / "pack") == tree(tmp_path / "whole")
    assert problems(tmp_path / "pack", copy) == ""


def test_a_source_that_makes_another_number_of_shards_is_refused(
    noisy_source: Path, unfinished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for path in noisy_source.rglob("*.jpg"):
        add_image(copy, str(path.relative_to(noisy_source)), path.read_bytes())
    settings = unfinished.with_name("pack.partial") / "settings.json"
    settings.write_text(settings.read_text().replace(str(noisy_source), str(copy)))
    name = open_source(copy).index.name[0]
    (copy / name).write_bytes((copy / name).read_bytes() + bytes(10**6))
    with pytest.raises(PackError, match=r"source changed since .* delete that folder"):
        continue_packing(copy, unfinished)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_shard_without_its_rows_is_not_finished(
    source: Path, tmp_path: Path, damage: str
) -> None:
    finish_shards_only(source, tmp_path / "pack")
    rows = tmp_path / "pack.partial/rows-000001"
    if damage == "missing":
        rows.unlink()
    else:
        os.truncate(rows, 700)
    make_pack(source, tmp_path / "pack")
    make_pack(source, tmp_path / "whole")
    assert tree(tmp_path / "pack") == tree(tmp_path / "whole")


def test_rows_are_on_disk_before_their_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, replace, fsync = [], os.replace, os.fsync

    def noting_replace(old: str, new: str) -> None:
        steps.append(os.path.basename(new))
        replace(old, new)

    def noting_fsync(descriptor: int) -> None:
        steps.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    make_pack(source, tmp_path / "pack")
    for shard in range(2):
        rows, image = steps.index(f"rows-{shard:06d}"), steps.index(f"shard-{shard:06d}.tar")
        assert "sync pack.partial" in steps[rows:image]


def test_two_packers_keep_apart(
    noisy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcode, refused = native.transcode, []

    def meanwhile(*arguments: Any) -> Any:
        if not refused:
            refused.append(None)
            with pytest.raises(PackError, match="another process is packing there"):
                make_pack(noisy_source, tmp_path / "pack")
        return transcode(*arguments)

    monkeypatch.setattr(native, "transcode", meanwhile)
    make_pack(noisy_source, tmp_path / "pack")
    assert refused


def test_existing_destination_is_refused_and_the_same_pack_is_accepted(
    source: Path, tmp_path: Path
) -> None:
    make_pack(source, tmp_path / "pack")
    before = tree(tmp_path / "pack")
    assert make_pack(source, tmp_path / "pack").num_samples == 40
    for settings in (Settings(), Settings(shard_bytes=60_000, strip=True)):
        with pytest.raises(PackError, match="exists already"):
            make_pack(source, tmp_path / "pack", settings=settings)
    assert tree(tmp_path / "pack") == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackError, match="exists already"):
        make_pack(source, tmp_path / "empty")


def test_a_finished_pack_of_a_changed_source_is_refused(editable: Path, tmp_path: Path) -> None:
    make_pack(editable, tmp_path / "pack", on_error="skip")
    assert make_pack(editable, tmp_path / "pack", on_error="skip").was_complete
    for other in ("fail", "keep"):
        with pytest.raises(PackError, match=f"0 damaged samples kept and 1 left out.*{other}"):
            make_pack(editable, tmp_path / "pack", on_error=other)
    path = next(editable.rglob("*.jpg"))
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(PackError, match="exists already and is no pack of this source, as it is"):
        make_pack(editable, tmp_path / "pack", on_error="skip")


def test_a_pack_that_another_process_finished_meanwhile_is_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pack(source, tmp_path / "elsewhere")
    before, flock = tree(tmp_path / "elsewhere"), fcntl.flock

    def finishing_first(*arguments: Any) -> None:
        (tmp_path / "elsewhere").rename(tmp_path / "pack")
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finishing_first)
    assert make_pack(source, tmp_path / "pack").was_complete
    assert tree(tmp_path / "pack") == before
    assert not (tmp_path / "pack.partial").exists()


def test_scratch_outlives_an_interrupt_in_the_middle_of_a_sample(tmp_path: Path) -> None:
    class Interrupting:
        data = memoryview(b"half")

        def __iter__(self) -> Iterator[Any]:
            raise KeyboardInterrupt

    flushed: list[Any] = []
    buckets = Buckets(str(tmp_path), "deal", 1 << 20, {0: 0, 1: 0}, flushed.append)
    with pytest.raises(KeyboardInterrupt):
        buckets.append(0, 1, Interrupting(), 4, 0)
    buckets.append(1, 2, Encoded(memoryview(b"whole"), 1, 1, 0, 0), 5, 0)
    buckets.flush()
    assert [rows["sample"].tolist() for rows in flushed] == [[2]]
    assert buckets.load(1) == b"whole"


def test_interrupt_keeps_what_is_done(
    noisy_source: Path,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transcode, calls = native.transcode, []

    def interrupting(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return transcode(*arguments)

    monkeypatch.setattr(native, "transcode", interrupting)
    with pytest.raises(KeyboardInterrupt):
        continue_packing(noisy_source, tmp_path / "pack", num_workers=1)
    calls.clear()
    continue_packing(noisy_source, tmp_path / "pack")
    assert 0 < len(calls) < 48
    assert tree(tmp_path / "pack") == uninterrupted


# ---- a disk that refuses -------------------------------------------------------------------------


def test_room_is_checked_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(PackError, match=r"not enough room: .* KB of images takes .* KB free"):
        make_pack(source, tmp_path / "pack")


def test_room_is_left_for_what_tar_adds_to_small_images(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    for number in range(100):
        image = jpeg_bytes(Image.new("RGB", (8, 8)))
        add_image(tmp_path / "tiny", f"a/{number}.jpg", image)
    make_pack(tmp_path / "tiny", tmp_path / "pack")
    taken = sum(shard.stat().st_size for shard in (tmp_path / "pack").glob("*.tar"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=taken))
    with pytest.raises(PackError, match="not enough room"):
        make_pack(tmp_path / "tiny", tmp_path / "again")


def test_a_file_system_without_locks_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(PackError, match=r"no file locks.*pack to another one"):
        make_pack(source, tmp_path / "pack")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_and_the_run_continues(
    noisy_source: Path,
    uninterrupted: dict[str, str],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    with pytest.raises(PackError, match="not enough room"):
        continue_packing(noisy_source, small_disk / "pack")
    usage = shutil.disk_usage(small_disk)
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        with pytest.raises(PackError, match=r"disk is full .*run the same command again"):
            continue_packing(noisy_source, small_disk / "pack", memory_bytes=4 << 20)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    continue_packing(noisy_source, small_disk / "pack", memory_bytes=4 << 20)
    assert tree(small_disk / "pack") == uninterrupted


def test_a_failing_sync_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", refuse)
        with pytest.raises(PackError, match=r"Input/output error.*run the same command again"):
            make_pack(source, tmp_path / "pack")
    make_pack(source, tmp_path / "pack")
    assert problems(tmp_path / "pack", source) == ""


# ---- bad images ----------------------------------------------------------------------------------


@pytest.fixture
def damaged_source(tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    good = jpeg_bytes(photo_like(np.random.default_rng(6), 90, 60))
    add_image(folder, "a/good.jpg", good)
    add_image(folder, "a/torn.jpg", good[: len(good) // 2])
    add_image(folder, "b/text.jpg", b"no image at all")
    add_image(folder, "b/empty.jpg", b"")
    add_image(folder, "b/fine.jpg", good)
    return folder


def test_damaged_images_stop_the_packing_by_default(damaged_source: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError) as caught:
        make_pack(damaged_source, tmp_path / "pack")
    message = str(caught.value)
    assert "3 of 5 images cannot be packed" in message
    for part in ("a/torn.jpg: Pillow cannot decode it", "b/text.jpg", "b/empty.jpg",
                 "--on-error skip", "--on-error keep", "continues from"):  # fmt: skip
        assert part in message
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("first_policy", ["fail", None])
@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_damaged_images_are_left_out_or_kept(
    damaged_source: Path, tmp_path: Path, on_error: OnImageError, first_policy: OnImageError | None
) -> None:
    if first_policy:
        with pytest.raises(PackError):
            make_pack(damaged_source, tmp_path / "pack", on_error=first_policy)
    summary = make_pack(damaged_source, tmp_path / "pack", on_error=on_error)
    kept = on_error == "keep"
    assert summary.num_samples == (5 if kept else 2)
    assert [(f.name, f.kept) for f in summary.failures] == [
        (name, kept) for name in ("a/torn.jpg", "b/empty.jpg", "b/text.jpg")
    ]
    assert "0x" not in "".join(failure.reason for failure in summary.failures)
    report = json.loads((tmp_path / "pack" / "failures.json").read_text())
    assert [entry["name"] for entry in report] == ["a/torn.jpg", "b/empty.jpg", "b/text.jpg"]
    index = open_source(tmp_path / "pack").index
    for sample, name in enumerate(index.name):
        if name in ("a/torn.jpg", "b/empty.jpg", "b/text.jpg"):
            assert kept
            assert image_of(tmp_path / "pack", sample) == (damaged_source / name).read_bytes()
            assert index.flags is not None
            assert not index.flags[sample] & pack_format.FLAG_CLEAN
    assert problems(tmp_path / "pack", damaged_source) == ""


def test_a_repaired_image_is_taken_by_the_next_run(damaged_source: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError):
        make_pack(damaged_source, tmp_path / "pack")
    good = (damaged_source / "a/good.jpg").read_bytes()
    for name in ("a/torn.jpg", "b/text.jpg", "b/empty.jpg"):
        add_image(damaged_source, name, good)
    assert make_pack(damaged_source, tmp_path / "pack").num_canonical == 5
    assert problems(tmp_path / "pack", damaged_source) == ""


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_unreadable_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refused = open_source(source).index.name[7]
    original = builtins.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(refused):
            raise OSError(code, os.strerror(code), path)
        return original(path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(builtins, "open", refusing)
        for on_error in ("fail", "keep"):  # what can't be read can't be kept
            with pytest.raises(
                PackError, match=f"{refused}: cannot be read.*{errno.errorcode[code]}"
            ):
                make_pack(source, tmp_path / "pack", on_error=on_error)
        skipped = make_pack(source, tmp_path / "skipped", on_error="skip")
        assert (skipped.num_samples, skipped.failures[0].name) == (39, refused)
    assert make_pack(source, tmp_path / "pack").num_samples == 40


@pytest.mark.parametrize("on_error", ["fail", "skip", "keep"])
def test_a_dying_disk_stops_the_packing_whatever_on_error_says(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: OnImageError
) -> None:
    original, left = builtins.open, [15]

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(".jpg"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return original(path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(builtins, "open", refusing)
        with pytest.raises(
            PackError, match=r"20 files cannot be read[\s\S]*EIO[\s\S]*Check the disk"
        ):
            make_pack(source, tmp_path / "pack", on_error=on_error)
    assert not (tmp_path / "pack").exists()
    make_pack(source, tmp_path / "pack", on_error=on_error)
    assert problems(tmp_path / "pack", source) == ""


def test_many_damaged_images_are_no_dying_disk(tmp_path: Path) -> None:
    add_image(tmp_path / "source", "a/good.jpg", jpeg_bytes(Image.new("RGB", (8, 8))))
    for number in range(30):
        add_image(tmp_path / "source", f"a/{number}.jpg", b"damaged")
    summary = make_pack(tmp_path / "source", tmp_path / "pack", on_error="skip")
    assert len(summary.failures) == 30


@pytest.mark.parametrize("memory_bytes", [8 << 20, 2 << 20], ids=["one level", "two levels"])
def test_a_shard_may_lose_all_its_samples(
    damaged_source: Path, tmp_path: Path, memory_bytes: int
) -> None:
    make_pack(
        damaged_source,
        tmp_path / "pack",
        settings=Settings(shard_bytes=1),
        on_error="skip",
        memory_bytes=memory_bytes,
    )
    assert len(list((tmp_path / "pack").glob("*.tar"))) == 5
    assert problems(tmp_path / "pack", damaged_source) == ""


def test_a_pack_is_no_source(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a pack already; --reshuffle makes"):
        make_pack(packed, tmp_path / "again")


def test_nothing_left_to_pack(tmp_path: Path) -> None:
    add_image(tmp_path / "source", "a/bad.jpg", b"bad")
    with pytest.raises(PackError, match="no image is left"):
        make_pack(tmp_path / "source", tmp_path / "pack", on_error="skip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restart_interval": 0}, "restart_interval: expected 1 to 65535"),
        ({"shard_bytes": 0}, "shard_bytes: expected 1"),
        ({"seed": -1}, "seed: expected 0"),
        ({"keep_bytes": True, "strip": True}, "contradict"),
    ],
)
def test_settings_outside_their_domain(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**arguments)


# ---- a pack is not believed ----------------------------------------------------------------------


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    make_pack(source, tmp_path / "pack")
    return tmp_path / "pack"


def edit_index(folder: Path, **fields: int) -> None:
    rows = np.load(folder / "index.npy")
    for field, value in fields.items():
        rows[11][field] = value
    np.save(folder / "index.npy", rows)


def edit_about(folder: Path, **entries: Any) -> None:
    path = folder / "pack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def edit_shard(folder: Path, **entries: Any) -> None:
    shards = json.loads((folder / "pack.json").read_text())["shards"]
    edit_about(folder, shards=[shards[0], {**shards[1], **entries}, *shards[2:]])


OPENING_DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("version", lambda f: edit_about(f, format_version=2), "format version 2.*update"),
    ("format", lambda f: edit_about(f, format="other"), "expected an object whose 'format'"),
    ("no json", lambda f: (f / "pack.json").write_text("{"), "expected JSON"),
    ("num_samples", lambda f: edit_about(f, num_samples=41), r"expected shape \(41,\)"),
    ("bad count", lambda f: edit_about(f, num_samples="many"), "expected an integer"),
    ("classes", lambda f: edit_about(f, classes=["a", "a"]), "do not repeat"),
    ("shards", lambda f: edit_about(f, shards=[{"file": "/etc/passwd"}]), "expected file"),
    ("files", lambda f: edit_about(f, files=5), "'files': expected a dict"),
    ("counts", lambda f: edit_about(f, counts={"failures": "x"}), "'canonical': expected an int"),
    ("size", lambda f: edit_shard(f, bytes=2**70), "'bytes': expected an integer from 0 to"),
    ("nested", lambda f: (f / "pack.json").write_text("[" * 10**5), "expected JSON"),
    ("no index", lambda f: (f / "index.npy").unlink(), "index.npy: missing"),
    ("cut index", lambda f: os.truncate(f / "index.npy", 700), "index.npy: damaged or truncated"),
    ("pickle", lambda f: np.save(f / "names.npy", np.array([{}])), "names.npy: damaged"),
    ("cut names", lambda f: np.save(f / "names.npy", np.zeros(3, "u1")), "names.npy: expected"),
    ("shard number", lambda f: edit_index(f, shard=99), "sample 11: bytes .* outside"),
    ("offset", lambda f: edit_index(f, offset=1 << 40), "sample 11: bytes .* outside"),
    ("negative offset", lambda f: edit_index(f, offset=-1), "sample 11: bytes .* outside"),
    ("overflow", lambda f: edit_index(f, length=2**63 - 1), "sample 11: bytes .* outside"),
    ("label", lambda f: edit_index(f, label=4), "'label' of sample 11"),
    ("missing shard", lambda f: (f / "shard-000001.tar").unlink(), "shard is missing"),
    ("cut shard", lambda f: os.truncate(f / "shard-000001.tar", 99), r"expected \d+ bytes, got 99"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [(d, m) for _, d, m in OPENING_DAMAGE],
    ids=[i for i, _, _ in OPENING_DAMAGE],
)
def test_opening_a_damaged_pack(packed: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(packed)
    with pytest.raises(DataError, match=message):
        open_source(packed)
    assert problems(packed) != ""


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_verify_finds_a_flipped_bit_wherever_it_is(packed: Path) -> None:
    assert problems(packed) == ""
    rows = np.load(packed / "index.npy")
    row, size = rows[3], (packed / "shard-000000.tar").stat().st_size
    begin, end = int(row["offset"]), int(row["offset"] + row["length"])
    name = open_source(packed).index.name[3]
    padded = end + -end % 512
    for place, expected in {
        begin - 500: "tar header of the image",
        begin + 100: "image: CRC-32C",
        padded + 3: "padding and label",
        padded + 512: "padding and label",
        size - 1: "expected 1024 zero bytes",
    }.items():
        flip(packed / "shard-000000.tar", place)
        found = problems(packed)
        assert expected in found
        assert "shard-000000.tar" in found
        if place != size - 1:
            assert f"sample 3 ({name})" in found
        flip(packed / "shard-000000.tar", place)
    assert problems(packed) == ""


def test_verify_finds_every_flipped_bit_of_the_tables(packed: Path) -> None:
    rng = np.random.default_rng(7)
    for name in ("index.npy", "names.npy", "names_begin.npy"):
        size = (packed / name).stat().st_size
        for offset in rng.integers(0, size, 20):
            flip(packed / name, int(offset))
            assert problems(packed) != ""
            flip(packed / name, int(offset))
    assert problems(packed) == ""


def test_verify_finds_missing_and_truncated_shards(packed: Path) -> None:
    shard = packed / "shard-000001.tar"
    content = shard.read_bytes()
    os.truncate(shard, len(content) - 3000)
    assert "ends" in problems(packed)
    assert f"expected {len(content)} bytes" in problems(packed)
    shard.unlink()
    assert "shard-000001.tar: No such file" in problems(packed)


def test_verify_finds_an_edited_label(packed: Path, source: Path) -> None:
    label = int(np.load(packed / "index.npy")[11]["label"])
    edit_index(packed, label=(label + 1) % 4)
    found = problems(packed, source)
    assert "index_id" in found
    assert "padding and label" in found
    assert "does not mean class" in found


def edit_member(folder: Path, member: str, key: str, value: Any) -> None:
    about = json.loads((folder / "pack.json").read_text())
    edit_about(folder, **{member: {**about[member], key: value}})


def edit_width_consistently(folder: Path) -> None:
    """As a writer with a wrong idea of a size would have made the pack."""
    edit_index(folder, width=77)
    content = (folder / "index.npy").read_bytes()
    entry = {"bytes": len(content), "crc32c": f"{native.crc32c(content):08x}"}
    edit_member(folder, "files", "index.npy", entry)


OTHER = changed_tables(native.fit_tables(np.zeros((4, 256), np.uint64)))
VERIFY_DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no files", lambda f: edit_about(f, files={}), "'files': expected"),
    ("strange file", lambda f: edit_member(f, "files", "../x", {}), "'files': expected"),
    ("image bytes", lambda f: edit_about(f, image_bytes=1), "'image_bytes' is 1, the tables give"),
    ("canonical", lambda f: edit_member(f, "counts", "canonical", 1), "'counts.canonical' is 1"),
    ("failures", lambda f: edit_member(f, "counts", "failures", 1), "failures.json: missing"),
    ("skipped", lambda f: edit_member(f, "counts", "skipped", 1), "'counts.skipped' is 1"),
    ("source", lambda f: edit_member(f, "source", "num_samples", 1), "'source.num_samples' is 1"),
    ("in a shard", lambda f: edit_shard(f, num_samples=1), "'shards[].num_samples' is ["),
    ("shard", lambda f: add_image(f, "shard-000099.tar", b""), "shard-000099.tar: does not belong"),
    ("failures", lambda f: add_image(f, "failures.json", b"[]"), "failures.json: does not belong"),
    ("width", edit_width_consistently, "the index 77 x "),
    ("tables", lambda f: edit_about(f, huffman_tables=OTHER), "its Huffman tables are not those"),
    ("no tables", lambda f: edit_about(f, huffman_tables=None), "'huffman_tables' has none, which"),
    ("own tables", lambda f: edit_member(f, "settings", "tables", "image"), "tables' has some"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(d, e) for _, d, e in VERIFY_DAMAGE],
    ids=[i for i, _, _ in VERIFY_DAMAGE],
)
def test_verify_compares_all_that_pack_json_says(
    packed: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    damage(packed)
    assert expected in problems(packed)


@pytest.mark.parametrize(
    "content",
    ["5", '{"name": "", "reason": "", "kept": true}', "[5]", '[{"name": 1}]', "{", "[" * 10**5],
)
def test_verify_reads_failures_with_care(
    damaged_source: Path, tmp_path: Path, content: str
) -> None:
    make_pack(damaged_source, tmp_path / "pack", on_error="skip")
    (tmp_path / "pack/failures.json").write_text(content)
    assert "failures.json: expected" in problems(tmp_path / "pack", damaged_source)
    with pytest.raises(PackError, match="exists already"):
        make_pack(damaged_source, tmp_path / "pack", on_error="skip")


def test_verify_goes_on_where_the_source_cannot_be_read(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, refused = builtins.open, str(source / open_source(source).index.name[7])

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refusing)
    report = verify(packed, source, num_workers=2, progress=False)
    assert report.num_compared == 39
    assert len(report.problems) == 1
    assert f"cannot be compared: {refused}: Input/output error" in report.problems[0]


def test_verify_against_finds_missing_extra_and_changed_samples(
    source: Path, packed: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for path in source.rglob("*.jpg"):
        add_image(other, str(path.relative_to(source)), path.read_bytes())
    names = open_source(source).index.name
    (other / names[0]).unlink()
    add_image(other, "class_001/new.jpg", (source / names[1]).read_bytes())
    add_image(other, names[2], jpeg_bytes(Image.new("RGB", (50, 50))))
    found = problems(packed, other)
    assert f"({names[0]}): is in the pack but not in {other}" in found
    assert f"class_001/new.jpg: is in {other} but not in the pack" in found
    assert f"({names[2]}): its pixels differ" in found
    assert len(found.splitlines()) == 3


def test_opening_a_large_pack_takes_well_under_a_second(packed: Path) -> None:
    num_samples = 1_281_167
    about = json.loads((packed / "pack.json").read_text())
    rows = np.resize(np.load(packed / "index.npy"), num_samples)
    names = Names.from_strings(
        f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(num_samples)
    )
    np.save(packed / "index.npy", rows)
    np.save(packed / "names.npy", names.blob)
    np.save(packed / "names_begin.npy", names.begin)
    edit_about(packed, num_samples=num_samples)
    began = time.perf_counter()
    index = open_source(packed).index
    elapsed_s = time.perf_counter() - began
    assert len(index) == num_samples
    assert index.id == about["index_id"]
    assert elapsed_s < 1
