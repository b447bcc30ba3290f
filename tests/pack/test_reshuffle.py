"""A pack in another order: the images as they are, as if packed anew with another seed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from PIL import Image
from test_pack import add_image, image_of, problems, tree

from imagenet_seq import native
from imagenet_seq.cli import main
from imagenet_seq.errors import DataError, PackError
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset, reshuffle
from imagenet_seq.pack.shards import Summary
from imagenet_seq.pack.shrink import Shrink
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.recognise import open_source

SETTINGS = {
    "tables of the pack": Settings(shard_bytes=60_000),
    "own tables": Settings(shard_bytes=60_000, tables="image", restart_interval=3, strip=True),
    "own bytes": Settings(shard_bytes=60_000, keep_bytes=True, seed=2**64 - 1),
    "smaller copies": Settings(shard_bytes=60_000, shrink=Shrink(60)),
}


@pytest.fixture(scope="module")
def source(make_folder: Callable[..., Path]) -> Path:
    return make_folder(40, num_classes=4) / "train"


def make_pack(source: Path, folder: Path, settings: Settings, **options: Any) -> Summary:
    return pack_dataset(
        source, folder, settings=settings, progress=False, num_workers=2, **options
    )[""]


def other_order(source: Path, folder: Path, **options: Any) -> Summary:
    return reshuffle(source, folder, progress=False, **{"num_workers": 2, **options})[""]


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    make_pack(source, tmp_path / "pack", SETTINGS["tables of the pack"])
    return tmp_path / "pack"


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_is_the_pack_of_the_source_with_that_seed(
    source: Path, tmp_path: Path, kind: str
) -> None:
    settings = SETTINGS[kind]
    make_pack(source, tmp_path / "pack", settings)
    summary = other_order(tmp_path / "pack", tmp_path / "other")
    assert (summary.num_samples, summary.was_complete) == (40, False)
    seed = (settings.seed + 1) % 2**64
    values = {field: getattr(settings, field) for field in vars(settings)}
    make_pack(source, tmp_path / "anew", Settings(**{**values, "seed": seed}))
    assert tree(tmp_path / "other") == tree(tmp_path / "anew")
    assert tree(tmp_path / "other") != tree(tmp_path / "pack")
    assert problems(tmp_path / "other", source) == ""
    # And back again.
    other_order(tmp_path / "other", tmp_path / "back", seed=settings.seed)
    assert tree(tmp_path / "back") == tree(tmp_path / "pack")


def test_images_stay_where_tables_would_change(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables are fitted to the images that come first, which another seed makes others."""
    monkeypatch.setattr("imagenet_seq.pack.plan.TABLES_SAMPLES", 10)
    make_pack(source, tmp_path / "pack", SETTINGS["tables of the pack"])
    monkeypatch.setattr(native, "transcode", None)
    other_order(tmp_path / "pack", tmp_path / "other", seed=9)
    images = []
    for folder in (tmp_path / "pack", tmp_path / "other"):
        index = open_source(folder).index
        images.append({name: image_of(folder, i) for i, name in enumerate(index.name)})
    assert images[0] == images[1]
    assert list(images[0]) != list(images[1])
    assert problems(tmp_path / "other") == ""


@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_damaged_samples_stay_left_out_or_kept(tmp_path: Path, on_error: Any) -> None:
    rng = np.random.default_rng(6)
    for number in range(9):
        data = jpeg_bytes(photo_like(rng, 60, 40))
        is_damaged = number in (2, 5, 6)
        add_image(tmp_path / "source", f"a/{number}.jpg", data[:99] if is_damaged else data)
    add_image(tmp_path / "source", "a/2.jpeg", jpeg_bytes(Image.new("RGB", (8, 8))))
    settings = [Settings(shard_bytes=5_000, tables="image", seed=seed) for seed in (0, 1)]
    make_pack(tmp_path / "source", tmp_path / "pack", settings[0], on_error=on_error)
    make_pack(tmp_path / "source", tmp_path / "anew", settings[1], on_error=on_error)
    summary = other_order(tmp_path / "pack", tmp_path / "other")
    assert [failure.kept for failure in summary.failures] == [on_error == "keep"] * 3
    assert tree(tmp_path / "other") == tree(tmp_path / "anew")
    assert problems(tmp_path / "other", tmp_path / "source") == ""


def test_a_root_with_both_splits(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder(6, 2)
    for name in ("class_000", "class_001"):
        add_image(root / "val", f"{name}/v.jpg", jpeg_bytes(Image.new("RGB", (16, 16))))
    pack_dataset(root, tmp_path / "pack", progress=False)
    both = reshuffle(tmp_path / "pack", tmp_path / "other", progress=False)
    assert {split: summary.num_samples for split, summary in both.items()} == {"train": 6, "val": 2}


# ---- sequential, resumable, checked --------------------------------------------------------------


@pytest.mark.parametrize("memory_bytes", [512 << 20, 1 << 20], ids=["one level", "two levels"])
def test_each_byte_is_moved_once_a_pass_and_in_order(
    packed: Path, tmp_path: Path, memory_bytes: int
) -> None:
    log = tmp_path / "log"
    other_order(packed, tmp_path / "other", io_log=log, memory_bytes=memory_bytes)
    reads = [line for line in map(json.loads, log.read_text().splitlines()) if "address" in line]
    places = [(line["address"], line["offset"]) for line in reads]
    shards = sorted(packed.glob("*.tar"))
    assert {line["pass"] for line in reads} == {"deal"}
    assert [line["file"] for line in reads] == list(map(str, shards))
    assert places == sorted(places)
    assert sum(line["bytes"] for line in reads) < sum(shard.stat().st_size for shard in shards)


def test_a_piece_ends_where_a_sample_ends(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagenet_seq.pack.input_files._READ_BYTES", 20_000)
    log = tmp_path / "log"
    other_order(packed, tmp_path / "other", io_log=log)
    reads = [line for line in map(json.loads, log.read_text().splitlines()) if "address" in line]
    rows = np.load(packed / "index.npy")
    ends = set(zip(rows["shard"].tolist(), (rows["offset"] + rows["length"]).tolist(), strict=True))
    assert len(reads) > 4
    for line in reads:
        assert (line["address"], line["offset"] + line["bytes"]) in ends
        assert line["bytes"] <= max(20_000, rows["length"].max())
    assert problems(tmp_path / "other") == ""


@pytest.mark.parametrize("where", ["dealt", "rows-000000", "rows-000001", "shard-000001.tar"])
def test_an_interrupted_run_goes_on(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    other_order(packed, tmp_path / "whole")
    original, crc32c, checked = os.replace, native.crc32c, []

    def stopping(old: str, new: str) -> None:
        if new.endswith(where) and (where != "dealt" or checked):
            raise KeyboardInterrupt
        original(old, new)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", stopping)
        if where == "dealt":  # in the middle of the first pass

            def interrupting(*arguments: Any) -> int:
                checked.append(1)
                if len(checked) == 30:
                    raise KeyboardInterrupt
                return crc32c(*arguments)

            context.setattr(native, "crc32c", interrupting)
        with pytest.raises(KeyboardInterrupt):
            other_order(packed, tmp_path / "other", num_workers=1)
    assert not (tmp_path / "other").exists()
    with pytest.raises(PackError, match=r"seed: 1 before, 7 now"):
        other_order(packed, tmp_path / "other", seed=7)
    other_order(packed, tmp_path / "other")
    assert tree(tmp_path / "other") == tree(tmp_path / "whole")
    assert not (tmp_path / "other.partial").exists()


def test_the_same_command_again_does_nothing(packed: Path, source: Path, tmp_path: Path) -> None:
    other_order(packed, tmp_path / "other")
    before = tree(tmp_path / "other")
    assert other_order(packed, tmp_path / "other").was_complete
    with pytest.raises(PackError, match=r"exists already[\s\S]*seed: 1 before, 5 now"):
        other_order(packed, tmp_path / "other", seed=5)
    make_pack(source, tmp_path / "third", Settings(shard_bytes=60_000, strip=True))
    with pytest.raises(PackError, match=r"exists already[\s\S]*strip: False before, True now"):
        other_order(tmp_path / "third", tmp_path / "other")
    assert tree(tmp_path / "other") == before


def test_a_damaged_sample_is_named(packed: Path, tmp_path: Path) -> None:
    row = np.load(packed / "index.npy")[11]
    shard = packed / pack_format.shard_file(row["shard"])
    content = shard.read_bytes()
    place = int(row["offset"]) + 50
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    name = open_source(packed).index.name[11]
    with pytest.raises(PackError) as caught:
        other_order(packed, tmp_path / "other")
    message = str(caught.value)
    assert "1 of 40 images cannot be packed" in message
    assert f"{name}: {shard} offset {row['offset']}: sample 11: expected" in message
    assert "bring these shards back from a copy, or pack the original images" in message
    assert not (tmp_path / "other").exists()
    shard.write_bytes(content)
    other_order(packed, tmp_path / "other")
    assert problems(tmp_path / "other") == ""


def test_a_shard_that_cannot_be_read_is_named(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    original = builtins.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(packed / "shard-000001.tar"):
            raise OSError(5, os.strerror(5), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(PackError, match=r"cannot be read: Input/output error \(EIO\)"):
        other_order(packed, tmp_path / "other")


@pytest.mark.parametrize("settings", [{}, {"seed": "x"}, {"shard_bytes": 0}])
def test_settings_that_are_none_are_refused(
    packed: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    about = json.loads((packed / "pack.json").read_text())
    about["settings"] = {**about["settings"], **settings} if settings else {}
    (packed / "pack.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"pack\.json: 'settings': .*run 'imagenet-seq verify'"):
        other_order(packed, tmp_path / "other")


# ---- what is refused -----------------------------------------------------------------------------


def test_only_a_pack_can_be_reshuffled(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a pack to reshuffle, found a imagefolder"):
        other_order(source, tmp_path / "other")
    with pytest.raises(ValueError, match="seed: expected 0"):
        other_order(packed, tmp_path / "other", seed=-1)
    with pytest.raises(ValueError, match="lie in, one another"):
        other_order(packed, packed)


def test_the_command(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tmp_path / "other")
    assert main(["pack", "--reshuffle", str(packed), other, "--seed", "4"]) == 0
    assert "40 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "other/pack.json").read_text())["settings"]["seed"] == 4


@pytest.mark.parametrize(
    "options",
    [["--keep-bytes"], ["--strip"], ["--on-error", "fail"], ["--shard-size", "1GB"],
     ["--restart-interval", "8"], ["--tables", "pack"], ["--max-side", "500"],
     ["--quality", "90"], ["--subsampling", "420"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_the_command_refuses_settings_of_transcoding(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["pack", "--reshuffle", str(packed), str(tmp_path / "other"), *options]) == 1
    assert f"{options[0]}: is for packing images, and --reshuffle keeps" in capsys.readouterr().err
    assert not (tmp_path / "other.partial").exists()
