"""The benchmarks: they refuse inexact ways, skip who is missing, and README shows their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark without the sample photos' folder being needed."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture
def bench_decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_decode

    return bench_decode


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    """A README in a folder of its own, with a section to be made."""
    path = tmp_path / "README.md"
    path.write_text(
        "before\n<!-- performance: made by benchmarks/report.py -->\nold\n"
        "<!-- performance: end -->\nafter\n"
    )
    return path


def report(readme: Path, results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run("report.py", "--root", readme.parent, "--results", results, *options)


def test_readme_shows_the_committed_results() -> None:
    checked = run("report.py", "--check")
    assert checked.returncode == 0, checked.stdout


def test_decoder_results_reach_readme(make_folder: Callable[..., Path], readme: Path) -> None:
    folder = make_folder(6, num_classes=2) / "train"
    results = readme.parent / "results"
    options = ("--images", 6, "--rounds", 2, "--json", results / "decode.json", "--allow-dirty")
    measured = run("bench_decode.py", folder, *options)
    assert measured.returncode == 0, measured.stderr
    rows = json.loads((results / "decode.json").read_text())["rows"]
    assert {(row["split"], row["dtype"]) for row in rows} == {
        ("train", "uint8"),
        ("val", "uint8"),
        ("train", "float32"),
    }
    assert {row["source"] for row in rows} >= {"files", "pack"}
    assert all(row["images"] > 0 and row["ratio"] > 0 for row in rows)

    assert report(readme, results, "--check").returncode == 1
    assert report(readme, results).returncode == 0
    assert report(readme, results, "--check").returncode == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    best = [row for row in rows if row["class"] == "all" and row["group"] is not None][-1]
    assert f"| {best['images_per_second']:,.0f} |" in text


def test_a_way_with_other_pixels_is_not_measured(
    bench_decode: Any, make_folder: Callable[..., Path]
) -> None:
    samples = bench_decode.photos.read_samples(make_folder(3, num_classes=1) / "train")
    work = bench_decode.Work("train")
    way = bench_decode.Way("files", "portable", 2)
    baseline = bench_decode.Baseline(work, samples)
    same = bench_decode.Kernel(work.recipe(), samples, way.group)
    other_crops = bench_decode.Kernel(work.recipe(), samples, way.group, epoch=1)
    level = bench_decode._native.cpu()
    try:
        bench_decode.verify(work, {way: same}, baseline)
        with pytest.raises(SystemExit, match="differs from Pillow's"):
            bench_decode.verify(work, {way: other_crops}, baseline)
    finally:
        bench_decode._native.use_cpu(level)


def test_loaders_are_compared_and_missing_ones_skipped(
    make_folder: Callable[..., Path], readme: Path
) -> None:
    folder = make_folder(6, num_classes=2) / "train"
    absent = readme.parent / "absent"
    absent.mkdir()
    (absent / "cv2.py").write_text("raise ImportError('cv2 is not here')\n")
    paths = os.pathsep.join(filter(None, [str(absent), os.environ.get("PYTHONPATH")]))
    results = readme.parent / "results"
    compared = run(
        "compare.py",
        *(folder, "--images", 6, "--rounds", 1, "--cores", "one", "--dtype", "uint8"),
        *("--peers", "opencv", "imagenet_seq"),
        *("--json", results / "compare.json", "--allow-dirty"),
        PYTHONPATH=paths,
    )
    assert compared.returncode == 0, compared.stderr
    assert "cv2 is not here; pip install opencv-python-headless" in compared.stdout
    result = json.loads((results / "compare.json").read_text())
    assert list(result["peers"]) == ["imagenet_seq"]
    assert result["peers"]["imagenet_seq"]["max_difference"] == 0
    assert report(readme, results).returncode == 0
    assert "the same folder | exact |" in readme.read_text()
    assert "<svg" in (readme.parent / "docs" / "performance.svg").read_text()
