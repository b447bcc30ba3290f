"""The command line: what it prints, how it exits, that it never shows a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from imagenet_seq import _native, cli, disk, read


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
    assert "12/12" in captured.err  # the progress bars

    assert cli.main(["info", destination, "--split", "train", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["samples"], facts["classes"]) == ("pack", 12, 3)
    assert facts["shards"] > 1
    assert facts["settings"]["strip"] is True
    assert facts["settings"]["shard_bytes"] == 50_000
    assert cli.main(["info", destination, "--split", "train"]) == 0
    text = capsys.readouterr().out
    assert "shards:" in text
    assert "strip True" in text

    assert cli.main(["verify", destination, "--against", str(root)]) == 0
    assert f"12 samples, 12 compared with {root}/train: sound" in capsys.readouterr().out


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
        assert cli.main(["info", destination]) == 0
        text = capsys.readouterr().out
        assert f"huffman tables:      {expected}" in text
        assert f"tables {tables}" in text


def test_info_of_a_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(root / "train"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("forecast")["num_samples"] == 12
    assert facts == {
        "path": str(root / "train"),
        "kind": "imagefolder",
        "samples": 12,
        "classes": 3,
    }


def test_info_forecasts_training(
    root: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IMAGENET_SEQ_DISK", "hdd")
    measured = disk.Speed(100.0, 10.0, date.today().isoformat())
    monkeypatch.setattr(disk, "measure", lambda files, seed: measured)

    def forecast(*arguments: str) -> dict[str, Any]:
        assert cli.main(["info", *arguments, "--json"]) == 0
        made: dict[str, Any] = json.loads(capsys.readouterr().out)["forecast"]
        return made

    pack = str(packed / "train")
    made = forecast(pack, "--ram", "0", "--ranks", "2")
    assert (made["order"], made["num_ranks"], made["kept_bytes"]) == ("blocks", 2, 0)
    assert made["speed"] is None  # so little data says nothing about a disk
    monkeypatch.setattr(read, "MEASURED_BYTES", 0)
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
    text = capsys.readouterr().out
    assert "training, as far as the disk allows it:" in text
    assert "(hard disk, 100 MB/s, 10.0 ms)" in text
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

    monkeypatch.setattr(_native, "transcode", interrupt)
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


def test_the_command_line_does_not_import_torch(packed: Path) -> None:
    script = (
        "import sys; from imagenet_seq.cli import main; "
        f"status = main(['verify', {str(packed)!r}]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
