"""The command line: what it prints, how it exits, that it never shows a traceback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagenet_seq import cli, info, native
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Block, Source
from imagenet_seq.read import arrange, speed
from imagenet_seq.read.disk import Disk
from imagenet_seq.read.speed import Speed
from imagenet_seq.sources.place import Found

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def root(make_folder: Callable[..., Path]) -> Path:
    return make_folder(12, 3)


@pytest.fixture
def packed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["pack", str(root), str(tmp_path / "pack"), "--workers", "2"]) == 0
    capsys.readouterr()
    return tmp_path / "pack"


def test_pack_then_info_then_verify(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = str(tmp_path / "pack")
    assert cli.main(["pack", str(root), destination, "--shard-size", "50kB", "--strip"]) == 0
    captured = capsys.readouterr()
    assert f"{destination}/train: 12 samples" in captured.out
    assert "12 re-coded losslessly, 0 stored as they are" in captured.out
    assert "pack train: read and encode" in captured.err  # the progress bars
    assert "12/12" in captured.err
    used = captured.out.splitlines()[-1].strip()
    assert used == f'train = Loader("{destination}", "train", batch_size=256, num_workers=8)'

    assert cli.main(["info", destination, "--split", "train", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["samples"], facts["classes"]) == ("pack", 12, 3)
    assert facts["shards"] > 1
    assert facts["settings"]["strip"] is True
    assert facts["settings"]["shard_bytes"] == 50_000
    assert cli.main(["info", destination, "--split", "train", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "shards:" in text
    assert "strip True" in text

    assert cli.main(["verify", destination, "--against", str(root)]) == 0
    assert f"12 samples, 12 compared with {root}: sound" in capsys.readouterr().out


def test_info_says_whose_huffman_tables_images_have(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tables, expected in (
        ("pack", "chosen for the pack (CRC-32C "),
        ("image", "each image's own"),
    ):
        destination = str(tmp_path / tables)
        assert cli.main(["pack", str(root / "train"), destination, "--tables", tables]) == 0
        assert ("choose tables" in capsys.readouterr().err) == (tables == "pack")
        assert cli.main(["info", destination, "-v"]) == 0
        text = capsys.readouterr().out
        assert f"huffman tables:      {expected}" in text
        assert f"tables {tables}" in text


def info_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["info", *arguments, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_info_of_a_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((root / "train").rglob("*.jpg"))
    sizes = [Image.open(io.BytesIO(file.read_bytes())).size for file in files]
    num_bytes = sum(file.stat().st_size for file in files)
    facts = info_of(capsys, str(root / "train"))
    assert facts.pop("forecast")["num_samples"] == 12
    texts = {key: facts.pop(key) for key in ("reading", "training_shuffle", "packing", "disk")}
    assert facts == {
        "path": str(root / "train"),
        "kind": "imagefolder",
        "found": "an ImageFolder with 3 class folders",
        "samples": 12,
        "classes": 3,
        "bytes": num_bytes,
        "mean_image_bytes": round(num_bytes / 12),
        "mean_width_px": pytest.approx(np.mean(sizes, axis=0)[0], abs=0.06),
        "mean_height_px": pytest.approx(np.mean(sizes, axis=0)[1], abs=0.06),
        "sampled_images": 12,
        "jpegs_among_them": 12,
        "canonical_among_them": 0,
        "order": "class by class",
        "validation": "in the order of the index",
        "notes": [],
    }
    assert texts["reading"].startswith("files one by one")
    assert texts["training_shuffle"].startswith("uniform: samples are not known to lie in random")
    assert len(texts["packing"]) == 3
    assert cli.main(["info", str(root / "train"), "-v"]) == 0
    out = capsys.readouterr().out
    assert f"mean width px:       {facts['mean_width_px']} (of 12 samples)\n" in out
    assert "notes:" not in out


def test_info_shows_both_splits_wherever_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    facts = info_of(capsys, str(FIXTURES / "kaggle"))
    assert {split: (of["kind"], of["samples"]) for split, of in facts.items()} == {
        "train": ("imagefolder", 20),
        "val": ("flat", 10),
    }
    assert cli.main(["info", str(FIXTURES / "kaggle")]) == 0
    out = capsys.readouterr().out
    assert out.count("  training  ") == 2
    assert f"\n\n{FIXTURES}" in out
    assert cli.main(["info", str(FIXTURES / "kaggle"), "--verbose"]) == 0
    assert capsys.readouterr().out.count("training, as far as the disk allows it:") == 2
    facts = info_of(capsys, str(FIXTURES / "kaggle"), "--split", "val")
    assert facts["kind"] == "flat"
    facts = info_of(capsys, str(FIXTURES / "images"))
    assert facts["val"]["classes"] == 5


def test_info_shows_notes_of_a_source(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "empty").mkdir(parents=True)
    (tmp_path / "data" / "full").symlink_to(root / "train" / "class_000")
    assert cli.main(["info", str(tmp_path / "data")]) == 1
    assert "--on-error skip" in capsys.readouterr().err
    (note,) = info_of(capsys, str(tmp_path / "data"), "--on-error", "skip")["notes"]
    assert note.endswith("these class folders have no images: empty")


def test_info_says_what_packing_brings(
    root: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IMAGENET_SEQ_DISK", "hdd")
    folder = str(root / "train")
    unknown = info_of(capsys, folder, "--ram", "0")
    assert unknown["packing"][0] == "an epoch takes 1 instead of 24 disk seeks"
    measured = Speed(100.0, 10.0, date.today().isoformat())
    monkeypatch.setattr(speed, "measure", lambda files, seed: measured)
    monkeypatch.setattr(arrange, "MEASURED_BYTES", 0)
    known = info_of(capsys, folder, "--ram", "0")
    now, then = (
        60 * of["minutes"]
        for of in (
            known["forecast"]["later_epochs"],
            known["forecast"]["choices"][0]["later_epochs"],
        )
    )
    assert now > 5 * then
    times = f"{then:.1f} s instead of {now:.1f} s"
    assert known["packing"][0] == f"an epoch takes the disk about {times}"
    in_memory = info_of(capsys, folder)["packing"][0]
    assert in_memory == f"epoch 1 takes the disk about {times}"
    assert "about twice as fast" in known["packing"][1]
    pack = info_of(capsys, str(packed / "train"))
    assert "packing" not in pack
    assert (pack["sampled_images"], pack["training_shuffle"][:6]) == (12, "block:")


def test_info_answers_in_a_few_lines(
    root: Path, packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrange, "_disk_of", lambda *_: Disk("hdd", "sda", "8:0"))
    monkeypatch.setattr(arrange, "speed_of", lambda *_: None)
    for path in (root / "train", packed / "train"):
        assert cli.main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert 3 <= len(out.splitlines()) <= 6
        assert out.count("not measured") == 1
        assert "sda (hard disk, speed not measured): that takes 2.0 GB of data or more" in out
        assert 'set IMAGENET_SEQ_DISK=ssd, or ReadOptions(disk="ssd") in Python' in out
        command = f"imagenet-seq pack {path} DESTINATION"
        assert (out.splitlines()[-1].strip() == command) == (path == root / "train")
    assert cli.main(["info", str(packed / "train"), "--no-measure"]) == 0
    assert "not measured): leave out --no-measure" in capsys.readouterr().out
    speed = Speed(180.0, 12.5, "2026-01-01")
    monkeypatch.setattr(arrange, "speed_of", lambda *_: speed)
    assert cli.main(["info", str(packed / "train"), "--ram", "0"]) == 0
    out = capsys.readouterr().out
    assert "disk      sda (hard disk, 180 MB/s, 12.5 ms)\n" in out
    assert "if it is an SSD" not in out
    assert "  faster    with " in out


def test_info_promises_no_faster_decoding_of_images_that_are_as_in_a_pack(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faster = "images decode about twice as fast, with the same pixels"
    for name, arguments in (("canonical", []), ("own", ["--keep-bytes"])):
        folder = str(tmp_path / name)
        assert cli.main(["preprocess", str(root), folder, *arguments]) == 0
        capsys.readouterr()
        facts = info_of(capsys, folder)
        assert facts["jpegs_among_them"] == 12
        assert facts["canonical_among_them"] == (12 if name == "canonical" else 0)
        assert (faster in facts["packing"]) == (name == "own")


def test_a_closed_pipe_is_no_error(packed: Path) -> None:
    command = [sys.executable, "-m", "imagenet_seq.cli", "info", str(packed), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.close()  # as `head` does when it has seen enough
        assert run.stderr is not None
        assert run.stderr.read() == b""
    assert run.returncode == 141


class Unpacked(Source):
    """A source of two python blocks of two images: one is a PNG, one no image at all."""

    def read_block(self, number: int) -> Block:
        images = [io.BytesIO() for _ in range(2)]
        Image.new("RGB", (30, 20)).save(images[0], "PNG" if number else "JPEG")
        images[1].write(b"nothing")
        parts = [image.getvalue() for image in images]
        lengths = np.array([len(part) for part in parts])
        bytes_ = np.frombuffer(b"".join(parts), np.uint8)
        return Block(bytes_, np.array([0, lengths[0]]), lengths)


def test_info_reads_headers_of_python_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    index = Index(
        [0, 0, 1, 1], [0, 1, 0, 1], Names.from_strings("abcd"), str(tmp_path),
        Names.from_strings(["file", "file"]), ("x",), length=[5, 5, 5, 5], label=[0] * 4,
    )  # fmt: skip
    source = Unpacked("numbers", index, python_blocks=True)
    found = Found("numbers", "numbers", lambda how: source, [str(tmp_path / "file")])
    facts = info.report(source, found, ram="0", measure=False).facts
    assert (facts["bytes"], facts["mean_image_bytes"]) == (1000, 5)
    assert (facts["mean_width_px"], facts["mean_height_px"]) == (30, 20)
    assert (facts["sampled_images"], facts["jpegs_among_them"]) == (2, 1)
    assert "Every image costs a whole block" in facts["training_shuffle"]


def test_info_forecasts_training(
    root: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IMAGENET_SEQ_DISK", "hdd")
    measured = Speed(100.0, 10.0, date.today().isoformat())
    monkeypatch.setattr(speed, "measure", lambda files, seed: measured)

    def forecast(*arguments: str) -> dict[str, Any]:
        assert cli.main(["info", *arguments, "--json"]) == 0
        made: dict[str, Any] = json.loads(capsys.readouterr().out)["forecast"]
        return made

    pack = str(packed / "train")
    made = forecast(pack, "--ram", "0", "--ranks", "2")
    assert (made["order"], made["num_ranks"], made["kept_bytes"]) == ("blocks", 2, 0)
    assert made["speed"] is None  # so little data says nothing about a disk
    monkeypatch.setattr(arrange, "MEASURED_BYTES", 0)
    assert forecast(pack, "--no-measure")["speed"] is None
    assert forecast(pack)["speed"] == asdict(measured)
    assert forecast(pack, "--no-measure")["speed"] == asdict(measured)  # it was kept
    assert forecast(pack)["page_cache"] is True

    made = forecast(str(root / "train"), "--ram", "4096")
    files = [path.stat().st_size for path in (root / "train").rglob("*.*")]
    assert (made["order"], made["is_estimate"]) == ("window", True)
    assert (made["data_bytes"], made["kept_bytes"]) == (sum(files), 4096)
    assert made["later_epochs"]["bytes_from_disk"] == sum(files) - 4096

    assert cli.main(["info", str(root), "--split", "train"]) == 0
    assert "(hard disk, 100 MB/s, 10.0 ms)" in capsys.readouterr().out
    (tmp_path / "linked" / "class").mkdir(parents=True)
    (tmp_path / "linked" / "class" / "0.jpg").symlink_to(tmp_path / "none")
    assert forecast(str(tmp_path / "linked"))["disk"]["kind"] == "hdd"
    assert cli.main(["info", pack, "--ram", "much"]) == 1
    assert "expected 'auto', a size such as '48GB'" in capsys.readouterr().err


def test_verify_exits_with_1_and_names_the_sample(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = packed / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert cli.main(["verify", str(packed)]) == 1
    out = capsys.readouterr().out
    assert "shard-000000.tar offset 0: sample 0 (class_" in out
    assert "problems" in out.splitlines()[-1]


def test_verify_refuses_a_root_with_an_unfinished_split(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packed / "val.partial").mkdir()
    (packed / "val.partial" / "settings.json").write_text("{}")
    assert cli.main(["verify", str(packed)]) == 1
    assert "val.partial: unfinished pack" in capsys.readouterr().err
    assert cli.main(["verify", str(packed / "train")]) == 0


def test_damaged_images_in_the_summary(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (root / "train").rglob("*.jpg"):
        copy = tmp_path / "source" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    copy.write_bytes(b"nothing")
    arguments = ["pack", str(tmp_path / "source"), str(tmp_path / "pack")]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "imagenet-seq: error: 1 of 12 images cannot be packed" in error
    assert "Traceback" not in error
    assert cli.main([*arguments, "--on-error", "skip"]) == 0
    out = capsys.readouterr().out
    assert "1 could not be decoded or read: 0 kept, 1 left out" in out
    assert f"{copy.parent.name}/{copy.name}: is no image that Pillow can identify" in out


def test_splits_with_different_classes_are_pointed_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, name in (("train", "a"), ("val", "b")):
        folder = tmp_path / "source" / split / name
        folder.mkdir(parents=True)
        data = next((root / "train").rglob("*.jpg")).read_bytes()
        (folder / "one.jpg").write_bytes(data)
    assert cli.main(["pack", str(tmp_path / "source"), str(tmp_path / "pack")]) == 0
    assert "the splits have different classes" in capsys.readouterr().err


def test_an_interrupt_says_how_to_continue(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "transcode", interrupt)
    assert cli.main(["pack", str(root), str(tmp_path / "pack")]) == 130
    assert "interrupted; run the same command again to continue" in capsys.readouterr().err
    assert cli.main(["info", str(tmp_path / "pack"), "--split", "train"]) == 1
    assert "unfinished pack" in capsys.readouterr().err


def test_errors_are_one_line_unless_debugging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["info", str(tmp_path / "none")], ["verify", str(tmp_path)]):
        assert cli.main(command) == 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert str(tmp_path) in captured.out + captured.err
    with pytest.raises(FileNotFoundError):
        cli.main(["info", "--debug", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["pack", "a"], "destination"),
        (["pack", "a", "b", "--shard-size", "big"], "expected a size such as 1GB"),
        (["pack", "a", "b", "--splits", "test"], "expected train, val or train,val"),
        (["pack", "a", "b", "--on-error", "ignore"], "invalid choice"),
        (["unknown"], "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("imagenet-seq ")
    for command in ("pack", "info", "verify"):
        assert cli.main([command, "--help"]) == 0
        assert f"imagenet-seq {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("command", ["verify", "info"])
def test_the_command_line_does_not_import_torch(packed: Path, command: str) -> None:
    script = (
        "import sys; from imagenet_seq.cli import main; "
        f"status = main([{command!r}, {str(packed)!r}]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
