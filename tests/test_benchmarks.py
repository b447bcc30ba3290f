"""The benchmarks: they refuse inexact ways, skip who is missing, and the pages show results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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
def bench_read(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_read

    return bench_read


PAGES = {
    "README.md": ["performance"],
    "docs/performance.md": ["performance", "stages"],
    "docs/sources.md": ["sources", "disk"],
    "docs/hard-disk.md": ["reading"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the pages that have sections to be made."""
    for page, sections in PAGES.items():
        path = tmp_path / page
        path.parent.mkdir(exist_ok=True)
        markers = (
            f"<!-- {name}: made by benchmarks/report.py -->\nold\n<!-- {name}: end -->\n"
            for name in sections
        )
        path.write_text(f"before\n{''.join(markers)}after\n")
    return tmp_path


def report(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run("report.py", "--root", root, "--results", root / "results", *options)


def test_the_pages_show_the_committed_results() -> None:
    checked = run("report.py", "--check")
    assert checked.returncode == 0, checked.stdout


def test_decoder_results_reach_their_page(make_folder: Callable[..., Path], root: Path) -> None:
    folder = make_folder(6, num_classes=2) / "train"
    results = root / "results"
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

    assert report(root, "--check").returncode == 1
    assert report(root).returncode == 0
    assert report(root, "--check").returncode == 0
    text = (root / "docs" / "performance.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    best = [row for row in rows if row["class"] == "all" and row["group"] is not None][-1]
    assert f"| {best['images_per_second']:,.0f} |" in text
    assert f"| files, portable | {rows[0]['stages_ns']['header'] / 1e3:.0f} |" in text
    assert "old" in (root / "README.md").read_text()  # it compares loaders, which were not run


def test_a_way_with_other_pixels_is_not_measured(
    bench_decode: Any, make_folder: Callable[..., Path]
) -> None:
    samples = bench_decode.photos.read_samples(make_folder(3, num_classes=1) / "train")
    work = bench_decode.Work("train")
    way = bench_decode.Way("files", "portable", 2)
    baseline = bench_decode.Baseline(work, samples)
    same = bench_decode.Kernel(work.recipe(), samples, way.group)
    other_crops = bench_decode.Kernel(work.recipe(), samples, way.group, epoch=1)
    level = bench_decode.native.cpu()
    try:
        bench_decode.verify(work, {way: same}, baseline)
        with pytest.raises(SystemExit, match="differs from Pillow's"):
            bench_decode.verify(work, {way: other_crops}, baseline)
    finally:
        bench_decode.native.use_cpu(level)


def test_sources_are_compared_with_their_folder_and_unwritable_ones_left_out(
    make_folder: Callable[..., Path], root: Path
) -> None:
    folder = make_folder(6, num_classes=2) / "train"
    absent = root / "absent"
    absent.mkdir()
    (absent / "tensorflow.py").write_text("raise ImportError('tensorflow is not here')\n")
    paths = os.pathsep.join(filter(None, [str(absent), os.environ.get("PYTHONPATH")]))
    results = root / "results"
    compared = run(
        "bench_loader.py",
        *(folder, "--source", "pack,tfrecord", "--images", 8, "--rounds", 1, "--cores", 1),
        *("--json", results / "sources.json", "--allow-dirty"),
        PYTHONPATH=paths,
    )
    assert compared.returncode == 0, compared.stderr
    assert "tfrecord     left out: tensorflow is not here" in compared.stdout
    rows = json.loads((results / "sources.json").read_text())["rows"]
    assert [(row["kind"], row["split"]) for row in rows] == [("pack", "val"), ("pack", "train")]
    assert all(row["source"] > 0 and row["folder"] > 0 for row in rows)
    assert report(root).returncode == 0
    assert "| source | val, 1 core |" in (root / "docs" / "sources.md").read_text()


def test_every_kind_of_source_is_where_its_writer_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sources

    fixtures = BENCHMARKS.parent / "tests" / "fixtures"
    absent = {kind for kind, path in sources.KINDS.items() if not (fixtures / path).exists()}
    assert absent == {"pack"}


def test_a_source_of_other_images_is_not_compared(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(6, num_classes=2) / "train"
    made = ("bench_loader.py", folder, "--source", "pack", "--made", tmp_path, "--allow-dirty")
    assert run(*made, "--images", 8, "--rounds", 1, "--cores", 1).returncode == 0
    refused = run(*made, "--images", 7, "--rounds", 1, "--cores", 1)
    assert refused.returncode != 0
    assert "expected the 7 images of the ImageFolder, got 8" in refused.stderr


def test_an_unknown_source_is_refused() -> None:
    refused = run("bench_loader.py", "--source", "pack,floppy")
    assert refused.returncode == 2
    assert "got {'floppy'}" in refused.stderr


def test_loaders_are_compared_and_missing_ones_skipped(
    make_folder: Callable[..., Path], root: Path
) -> None:
    folder = make_folder(6, num_classes=2) / "train"
    absent = root / "absent"
    absent.mkdir()
    (absent / "cv2.py").write_text("raise ImportError('cv2 is not here')\n")
    paths = os.pathsep.join(filter(None, [str(absent), os.environ.get("PYTHONPATH")]))
    results = root / "results"
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
    assert report(root).returncode == 0
    for page in ("README.md", "docs/performance.md"):
        assert "the same folder | exact |" in (root / page).read_text()
    assert "<svg" in (root / "docs" / "performance.svg").read_text()


def test_readme_compares_loaders_and_adds_smaller_copies(root: Path) -> None:
    committed = BENCHMARKS / "results"
    (root / "results").mkdir()
    for name in ("compare", "decode"):
        (root / "results" / f"{name}.json").write_bytes((committed / f"{name}.json").read_bytes())
    assert report(root).returncode == 0
    text = (root / "README.md").read_text()
    rows = json.loads((committed / "compare.json").read_text())["rows"]
    for row in rows:
        if (row["cores"], row["dtype"]) == (1, "uint8") and row["peer"] != "opencv":
            assert f"| {row['images_per_second']:,.0f} |" in text
    assert "| exact, of lossy copies |" in text


# ---- reading from a disk -------------------------------------------------------------------------


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file that is large enough to measure a disk on; sparse."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(256 << 20)
    return path


def test_reading_is_measured_on_the_disk_it_lies_on(
    make_folder: Callable[..., Path], large_file: Path
) -> None:
    folder = make_folder(7, num_classes=2) / "train"
    results = large_file.parent / "read.json"
    measured = run(
        "bench_read.py",
        *(folder, "--ranks", 2, "--ram", "1MB", "--sequential", large_file),
        *("--json", results, "--allow-dirty"),
    )
    assert measured.returncode == 0, measured.stderr
    result = json.loads(results.read_text())
    assert result["sequential_mb_per_s"][0] > 0
    rows = result["rows"]
    assert [(row["case"], bool(row["ram"])) for row in rows] == [
        ("bytes", False),
        ("bytes", True),
        ("decoded", False),
        ("decoded", True),
    ]
    assert all(row["ranks"] == 2 and not row["void"] for row in rows)
    # 7 images for two ranks: 3 each; with memory kept, two epochs.
    assert [row["images"] for row in rows] == [6, 12, 6, 12]
    assert result["targets"] == []


def test_a_small_file_does_not_pass_for_the_disk(make_folder: Callable[..., Path]) -> None:
    measured = run("bench_read.py", make_folder(2, num_classes=1) / "train", "--ranks", 1)
    assert measured.returncode != 0
    assert "too few to measure the disk" in measured.stderr
    assert "--sequential" in measured.stderr


def reading_of(bench_read: Any, begin: float, batches: Sequence[tuple[int, float, float]]) -> Any:
    """A rank that got batches of 128 images and 10 MB; of each: epoch, seconds, seconds waited."""
    made = [bench_read.Batch(epoch, 128, 10**7, at, waited) for epoch, at, waited in batches]
    return bench_read.Reading(begin, made, {}, [])


def test_a_run_is_described_by_what_ranks_and_disk_saw(bench_read: Any) -> None:
    first = reading_of(bench_read, 10.0, [(0, 11, 1), (0, 12, 0.5), (1, 14, 1.5), (1, 20, 5)])
    second = reading_of(bench_read, 10.0, [(0, 11, 1), (0, 12, 0.5), (1, 13, 0.2), (1, 15, 0.1)])
    seen = [
        bench_read.Counters(10.0, 0, 0, 0, 0.0),
        bench_read.Counters(10.5, 0, 0, 0, 0.0),
        bench_read.Counters(11.0, 80 * 10**6, 5, 1, 0.5),
        bench_read.Counters(12.5, 290 * 10**6, 20, 4, 1.75),
        bench_read.Counters(15.0, 800 * 10**6, 50, 9, 4.5),
        bench_read.Counters(20.0, 900 * 10**6, 60, 9, 5.0, 3, 0.05),
    ]
    case = bench_read.Case("made up", bench_read.Task("imagenet_seq", "."), 2, skip_batches=1)
    row = bench_read.describe(case, [first, second], seen)
    assert row["images"] == 8 * 128
    assert row["seconds"] == 15 - 10.5  # up to where the first of them ended
    assert row["disk_mb_per_s"] == pytest.approx(800 / 4.5)
    assert row["busy"] == 1.0
    assert row["sample_mb_per_s"] == pytest.approx(30 / 9 + 30 / 4)  # behind the skipped batch
    assert row["slowest"] == pytest.approx((30 / 9) / ((30 / 9 + 30 / 4) / 2))
    assert row["seconds_per_256"] == pytest.approx(256 / (384 / 9 + 384 / 4))
    assert row["first_batch_s"] == 1.0
    assert row["start_wait_s"] == 0.5  # the last batch was asked for three seconds into its epoch
    assert row["change_wait_s"] == 1.5
    assert row["epoch_disk_bytes"] == [290 * 10**6, 610 * 10**6]
    assert (row["late"], row["void"]) == (3, False)  # 0.15 of 10 s, but few
    later = bench_read.describe(case._replace(skip_epochs=1, skip_batches=0), [first, second], seen)
    assert later["sample_mb_per_s"] == pytest.approx(20 / 8 + 20 / 3)
    late = [*seen[:-1], seen[-1]._replace(late=6)]  # 0.3 of 10 s
    assert bench_read.describe(case, [first, second], late)["void"]


def test_targets_are_met_or_missed_and_void_runs_are_left_out(bench_read: Any) -> None:
    row = {
        "case": "bytes",
        "block_mb": 16,
        "readahead_kb": 128,
        "ranks": 1,
        "void": False,
        "disk_mb_per_s": 162.0,
        "sample_mb_per_s": 150.0,
        "slowest": 1.0,
    }
    ranks = {**row, "ranks": 8, "disk_mb_per_s": 150.0, "slowest": 0.95}
    folder = {"case": "9 files", "void": False, "reader": "imagenet_seq", "seconds_per_256": 2.0}
    peer = {**folder, "reader": "torchvision", "seconds_per_256": 5.0}
    found = bench_read.targets([row, ranks, {**row, "void": True}, folder, peer])
    assert [(target.value, target.met) for target in found] == [
        (162.0, True),
        (150.0, False),
        (150.0, False),
        (0.95, True),
        (2.5, True),
    ]


def test_a_kept_half_has_to_save_half_and_change_nothing(bench_read: Any) -> None:
    nothing = {
        "case": "nothing kept",
        "void": False,
        "epoch_disk_bytes": [100, 100, 100],
        "digests": [[[1, 2, 3]]],
    }
    half = {**nothing, "case": "half kept", "epoch_disk_bytes": [100, 51, 51]}
    share, same = bench_read.targets([nothing, half])
    assert (share.met, same.met) == (True, True)
    half = {**half, "epoch_disk_bytes": [100, 51, 60], "digests": [[[1, 2, 4]]]}
    share, same = bench_read.targets([nothing, half])
    assert (share.met, same.met) == (False, False)


def test_a_made_up_pack_lies_in_its_files(bench_read: Any, tmp_path: Path) -> None:
    import reading

    from imagenet_seq.plan.blocks import blocks_of

    folder = tmp_path / "made-up"
    reading.write_made_up(folder, 2 * 10**9)
    index = reading.made_up_source(folder, 2 * 10**9).index
    sizes = [(folder / name).stat().st_size for name in index.files]
    assert len(sizes) == 2
    assert sum(sizes) == pytest.approx(2 * 10**9, rel=0.02)
    assert index.length.mean() == pytest.approx(reading.MEAN_BYTES, rel=0.02)
    assert index.name[7] == "00007"
    blocks = blocks_of(index, 16 << 20)
    ends = blocks.offset + blocks.length
    assert all(ends[blocks.file == shard].max() <= size for shard, size in enumerate(sizes))
    gaps = index.offset[1:] - index.offset[:-1] - index.length[:-1]
    assert gaps[index.file[1:] == index.file[:-1]].min() >= 3 * 512  # three headers


def test_reading_results_reach_the_page(bench_read: Any, root: Path) -> None:
    row = {
        "case": "bytes",
        "reader": "imagenet_seq",
        "decoded": False,
        "block_mb": 16,
        "readahead_kb": 128,
        "ranks": 4,
        "void": False,
        "disk_mb_per_s": 162.0,
        "sample_mb_per_s": 159.4,
        "slowest": 0.97,
        "seconds_per_256": 0.176,
    }
    rows = [
        row,
        {**row, "void": True, "disk_mb_per_s": 99.0},
        {**row, "case": "half kept", "epoch_disk_bytes": [2 * 10**9, 10**9]},
        {**row, "case": "shards", "reader": "webdataset", "seconds_per_256": 2.5},
    ]
    targets = [bench_read.at_least("disk MB/s", 162.0, 160)._asdict()]
    origin = bench_read.results.describe_origin()
    results = root / "results"
    results.mkdir()
    made = {"origin": origin, "sequential_mb_per_s": [180.0], "rows": rows, "targets": targets}
    (results / "read.json").write_text(json.dumps(made))
    assert report(root).returncode == 0
    text = (root / "docs" / "hard-disk.md").read_text()
    assert "old" not in text
    assert "| 140 GB, bytes, blocks of 16 MB | 4 | 128 | **162.0** | 90% | 159.4 | 97% |" in text
    assert "99.0" not in text
    assert "| half kept | 2.000 | 1.000 |" in text
    assert "| WebDataset | shards | bytes | 128 | **2.500** |" in text
    assert "| disk MB/s | >= 160 | 162 |" in text
    assert report(root, "--check").returncode == 0


def test_the_model_gives_a_cold_folder_and_counts(bench_read: Any, tmp_path: Path) -> None:
    program = os.environ.get("IMAGENET_SEQ_SPINDLE")
    if not program:
        pytest.skip("no disk model: set IMAGENET_SEQ_SPINDLE to the program")
    backing = tmp_path / "backing"
    backing.mkdir()
    (backing / "file").write_bytes(bytes(1 << 20))
    disk = bench_read.Spindle(Path(program), backing, tmp_path / "mountpoint", ["--rate=100"])
    for _ in range(2):
        with disk.cold(128) as folder:
            disk.reset()
            assert (folder / "file").read_bytes() == bytes(1 << 20)
            counters = disk.counters()
        assert counters.read_bytes == 1 << 20
        assert counters.seeks > 0
