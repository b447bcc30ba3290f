"""How a source is read is decided once: `imagenet-seq info` forecasts what a Loader does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagenet_seq import cli
from imagenet_seq.loader import Loader
from imagenet_seq.pack.packing import pack_dataset
from imagenet_seq.read import arrange

FIXTURES = Path(__file__).parents[1] / "fixtures"

SOURCES = {
    "folder": "",
    "pack": "",
    "parquet": FIXTURES / "parquet",
    "webdataset": FIXTURES / "webdataset",
    "mds": FIXTURES / "mds_zstd",
    "lmdb": FIXTURES / "lmdb" / "pickle",
    "tfrecord": FIXTURES / "tfrecord" / "inception",
}


NEEDED = {"parquet": ["pyarrow"], "mds": ["zstandard"]}


@pytest.fixture(scope="module")
def paths(
    make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = make_folder(30, 3) / "train"
    packed = tmp_path_factory.mktemp("packs") / "train"
    pack_dataset(folder, packed, progress=False)
    return {**SOURCES, "folder": folder, "pack": packed}


def info_forecast(
    capsys: pytest.CaptureFixture[str], path: Path, ram: str, ranks: int
) -> dict[str, Any]:
    arguments = [str(path), "--split", "train", "--ram", ram, "--ranks", str(ranks), "--json"]
    assert cli.main(["info", *arguments]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)["forecast"]
    return made


@pytest.mark.filterwarnings("ignore::imagenet_seq.machine.LoaderNote")
@pytest.mark.parametrize("disk", ["auto", "hdd"])
@pytest.mark.parametrize("ram", ["auto", "0", "1MB", "50%"])
@pytest.mark.parametrize("name", SOURCES)
def test_info_and_the_loader_forecast_the_same(
    paths: dict[str, Path],
    name: str,
    ram: str,
    disk: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("IMAGENET_SEQ_DISK", disk)
    for ranks in (1, 2, 8):
        said = info_forecast(capsys, paths[name], ram, ranks)
        loader = Loader(paths[name], "train", ram=ram, rank=0, world_size=ranks, forecast=False)
        made = json.loads(json.dumps(loader.forecast().to_dict()))
        loader.close()
        assert made == said, f"{ranks} ranks"


def test_a_forecast_opens_no_memory(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(arrange, "open_kept", lambda key, *_, **__: opened.append(key))
    loader = Loader(paths["pack"], "train", ram="1MB", forecast=False)
    assert loader.forecast().job.kept_bytes > 0
    assert not opened
