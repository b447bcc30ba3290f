"""The forecast: numbers worked out by hand, and what must hold whatever the numbers are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet_seq.read.disk import Disk
from imagenet_seq.read.forecast import Choice, Forecast, Job, bottleneck, forecast_job
from imagenet_seq.read.speed import Speed

GB = 10**9
MB = 10**6

HDD = Disk("hdd", "sda", "8:0")
SSD = Disk("ssd", "nvme0n1", "259:0")
SPEED = Speed(200.0, 10.0, "2026-11-22")

# 1000 blocks of 16 MB at 200 MB/s and 10 ms: 80 s + 10 s.
PACK = Job("train", "pack", 180_000, 16 * GB, "blocks", HDD, SPEED, block_bytes=16 * MB)
# 9000 files of 100 KB, 2 requests each: 4.5 s + 180 s.
FOLDER = Job("train", "imagefolder", 9_000, 900 * MB, "files", HDD, SPEED, is_estimate=True)


def choice(made: Forecast, what: str) -> Choice:
    return next(choice for choice in made.choices if choice.what == what)


# ---- by hand -------------------------------------------------------------------------------------


def test_a_pack_that_all_comes_from_the_disk() -> None:
    made = forecast_job(PACK)
    assert made.first == made.later
    assert (made.later.bytes_from_disk, made.later.bytes_from_memory) == (16 * GB, 0)
    assert made.later.seeks == 1000
    assert made.later.minutes == pytest.approx(1.5)
    assert made.later.images_per_s == pytest.approx(2000)


def test_what_is_kept_is_not_read_from_the_second_epoch_on() -> None:
    made = forecast_job(replace(PACK, kept_bytes=12 * GB))
    assert made.first == forecast_job(PACK).first
    assert (made.later.bytes_from_disk, made.later.bytes_from_memory) == (4 * GB, 12 * GB)
    assert made.later.seeks == 250
    assert made.later.minutes == pytest.approx(22.5 / 60)
    assert made.later.images_per_s == pytest.approx(8000)


@pytest.mark.parametrize("fits", [{"page_cache": True}, {"kept_bytes": 17 * GB}])
def test_what_fits_is_read_once(fits: dict[str, int]) -> None:
    made = forecast_job(replace(PACK, **fits))  # type: ignore[arg-type]
    assert made.first.minutes == pytest.approx(1.5)
    assert (made.later.bytes_from_disk, made.later.bytes_from_memory) == (0, 16 * GB)
    assert (made.later.seeks, made.later.minutes, made.later.images_per_s) == (0, 0, None)
    assert made.choices == ()


def test_more_memory() -> None:
    job = replace(PACK, data_bytes=32 * GB, kept_bytes=8 * GB, num_samples=10**6)
    made = forecast_job(job)
    # 8 GB remain: 500 blocks.
    assert choice(made, "16 GB more RAM").later.minutes == pytest.approx(45 / 60)
    assert choice(made, "24.0 GB more RAM").later.bytes_from_disk == 0
    assert [c.what for c in made.choices] == ["16 GB more RAM", "24.0 GB more RAM"]
    # Where less than 16 GB is enough, that much is what is said.
    assert [c.what for c in forecast_job(replace(job, kept_bytes=17 * GB)).choices] == [
        "15.0 GB more RAM"
    ]


def test_a_smaller_pack_is_worth_it_for_large_images_only() -> None:
    small = choice(forecast_job(PACK), "pack --max-side 500 --quality 90")
    assert small.first.bytes_from_disk == round(16 * GB * 54.5 / 109.6)
    assert small.job.is_estimate
    few_bytes = replace(PACK, num_samples=16 * GB // 79_000)
    assert all("--max-side" not in c.what for c in forecast_job(few_bytes).choices)


def test_files_in_random_order_and_in_windows() -> None:
    made = forecast_job(FOLDER)
    assert made.later.seeks == 18_000
    assert made.later.minutes == pytest.approx(184.5 / 60)
    windows = forecast_job(replace(FOLDER, order="window"))
    assert windows.later.minutes == pytest.approx((4.5 + 180 / 2.2) / 60)


def test_packing_a_folder() -> None:
    packed = choice(forecast_job(FOLDER), "a pack")
    assert packed.later.seeks == 54  # blocks of 16 MiB
    assert packed.later.minutes == pytest.approx((4.5 + 0.54) / 60)
    # What fits in memory still gains: in its first epoch.
    fits = forecast_job(replace(FOLDER, page_cache=True))
    assert choice(fits, "a pack").first.minutes == packed.later.minutes
    assert "0.9 GB more RAM" not in [c.what for c in fits.choices]


def test_a_whole_block_for_every_sample() -> None:
    """Of 90 blocks of 10 MB that only Python unpacks, in a uniform order."""
    job = replace(FOLDER, kind="parquet", order="block per sample", num_blocks=90)
    made = forecast_job(job)
    assert (made.later.bytes_from_disk, made.later.seeks) == (9_000 * 10 * MB, 9_000)
    packed = choice(made, "a pack")
    assert (packed.later.bytes_from_disk, packed.later.seeks) == (900 * MB, 54)
    assert not [c.what for c in made.choices if "RAM" in c.what]  # none is kept by the loader
    assert forecast_job(replace(job, order="blocks", num_ranks=8)).later.seeks == 97


def test_a_block_across_the_cut_between_two_ranks_is_read_for_both() -> None:
    assert forecast_job(replace(PACK, num_ranks=8)).later.seeks == 1007


def test_blocks_as_they_lie_need_no_seeks() -> None:
    made = forecast_job(replace(PACK, order="sequence", num_ranks=2))
    assert made.later.seeks == 2
    assert made.later.minutes == pytest.approx(80.02 / 60)


def test_several_requests_wait_at_once_where_there_is_no_head() -> None:
    made = forecast_job(
        replace(FOLDER, disk=SSD, speed=Speed(900.0, 0.1, "2026-11-22"), num_readers=4)
    )
    assert made.later.minutes == pytest.approx((1 + 1.8 / 4) / 60)
    alone = replace(FOLDER, num_readers=4)
    assert forecast_job(alone).later == forecast_job(FOLDER).later


def test_memory_is_no_disk() -> None:
    made = forecast_job(replace(PACK, disk=Disk("memory", "tmpfs", ""), speed=None))
    assert made.first.bytes_from_disk == made.later.bytes_from_disk == 0
    assert made.choices == ()
    assert (
        made.line() == "imagenet-seq: train on tmpfs (memory): 16.0 GB in memory; no disk is read"
    )


def test_no_data_at_all() -> None:
    made = forecast_job(replace(PACK, num_samples=0, data_bytes=0))
    assert made.first.minutes == 0
    assert made.line()
    assert made.text()


# ---- words ---------------------------------------------------------------------------------------


def test_the_line_of_a_pack() -> None:
    assert forecast_job(replace(PACK, data_bytes=32 * GB, kept_bytes=8 * GB)).line() == (
        "imagenet-seq: train on sda (hard disk, 200 MB/s, 10.0 ms): each epoch reads 24.0 GB of "
        "32.0 GB from the disk: at least 2.2 min, 1,333 images/s; with 16 GB more RAM 45.0 s"
    )


def test_the_line_of_a_folder_says_what_packing_gains() -> None:
    assert forecast_job(replace(FOLDER, order="window")).line() == (
        "imagenet-seq: train on sda (hard disk, 200 MB/s, 10.0 ms): each epoch reads all about "
        "900.0 MB from the disk: about 1.4 min, 104 images/s; with a pack 5.0 s"
    )


def test_the_line_of_what_fits() -> None:
    assert forecast_job(replace(PACK, page_cache=True)).line() == (
        "imagenet-seq: train on sda (hard disk, 200 MB/s, 10.0 ms): 16.0 GB fit in memory; only "
        "epoch 1 reads the disk: at least 1.5 min, 2,000 images/s"
    )


def test_without_a_measurement_no_time_is_made_up() -> None:
    for kind in ("hdd", "ssd", "network", "fuse", "unknown"):
        made = forecast_job(
            replace(PACK, disk=Disk(kind, "sda", ""), speed=None, kept_bytes=8 * GB)
        )
        assert made.later.minutes is None
        assert made.later.images_per_s is None
        assert made.later.bytes_from_disk == 8 * GB
        assert made.line().endswith(
            "speed not measured): each epoch reads 8.0 GB of 16.0 GB from the disk"
        )
        assert "images/s" not in made.text()


def test_the_text_is_aligned_and_complete() -> None:
    text = forecast_job(replace(FOLDER, num_ranks=2)).text().splitlines()
    assert [line.split(":")[0] for line in text] == [
        "disk",
        "epoch",
        "first epoch",
        "later epochs",
        "with a pack",
        "with 900.0 MB more RAM",
        "with pack --max-side 500 --quality 90",
    ]
    begins = [len(line) - len(line.split(":", 1)[1].lstrip()) for line in text]
    assert len(set(begins)) == 1
    assert text[1].endswith("about 900.0 MB in 9,000 files")
    assert text[3].endswith(
        "about 900.0 MB from the disk, 18,000 seeks: about 3.1 min, 49 images/s, 24 a rank"
    )
    assert text[5].endswith(" the disk is not read")


def test_as_plain_data() -> None:
    data = forecast_job(replace(PACK, data_bytes=32 * GB)).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["disk"]["kind"] == "hdd"
    assert data["speed"]["sequential_mb_s"] == 200.0
    assert data["later_epochs"]["bytes_from_disk"] == 32 * GB
    assert data["choices"][0]["what"] == "16 GB more RAM"
    assert data["choices"][0]["later_epochs"]["bytes_from_disk"] == 16 * GB


# ---- what limits a training that runs ------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "for_blocks", "for_batch", "python", "expected"),
    [
        (0.1, 0.0, 15.0, {}, "your training (waits 1 % for data)"),
        # Training that takes batches in bursts: decoders wait for it, and now and then it for them.
        (1.0, 0.0, 15.0, {}, "your training (waits 10 % for data)"),
        (6.0, 16.0, 1.0, {}, "the disk (training waits 60 % for data)"),
        (6.0, 16.0, 1.0, {"python_rows": 9}, "the disk (training waits 60 % for data)"),
        (6.0, 16.0, 1.0, {"python_blocks": 9}, "unpacking blocks in Python"),
        (6.0, 1.0, 1.0, {}, "decoding (training waits 60 % for data)"),
        (6.0, 1.0, 1.0, {"python_rows": 9}, "decoding (training waits 60 % for data)"),
        (6.0, 1.0, 15.0, {"python_rows": 9}, "the Python part of the transform (training waits"),
    ],
)
def test_the_bottleneck(
    wait: float, for_blocks: float, for_batch: float, python: dict[str, float], expected: str
) -> None:
    """Of 10 seconds, and of 20 seconds of two decoders."""
    counts = {
        "batch_wait_s": wait,
        "decode_wait_read_s": for_blocks,
        "decode_wait_batch_s": for_batch,
        "python_rows": 0,
        "python_blocks": 0,
        **python,
    }
    assert bottleneck(counts, elapsed_s=10, num_decoders=2).startswith(expected)


# ---- whatever the numbers are --------------------------------------------------------------------

jobs = st.builds(
    Job,
    name=st.just("train"),
    kind=st.sampled_from(["pack", "imagefolder"]),
    num_samples=st.integers(1, 10**7),
    data_bytes=st.integers(1, 10**13),
    order=st.sampled_from(["blocks", "sequence", "files", "window"]),
    disk=st.sampled_from([HDD, SSD, Disk("network", "nfs server:/", "server")]),
    speed=st.none() | st.builds(Speed, st.floats(1, 10**4), st.floats(0.02, 100), st.just("")),
    block_bytes=st.integers(10**5, 10**8),
    kept_bytes=st.integers(0, 10**13),
    page_cache=st.booleans(),
    num_readers=st.integers(1, 8),
    num_ranks=st.integers(1, 16),
    is_estimate=st.booleans(),
)


@given(jobs)
def test_bytes_add_up(job: Job) -> None:
    made = forecast_job(job)
    for epoch in (made.first, made.later):
        assert epoch.bytes_from_disk + epoch.bytes_from_memory == job.data_bytes
        assert epoch.bytes_from_disk >= 0 <= epoch.bytes_from_memory
        assert 0 <= epoch.seeks <= job.num_requests
        assert (epoch.seeks == 0) == (epoch.bytes_from_disk == 0)
    assert made.later.bytes_from_disk <= made.first.bytes_from_disk == job.data_bytes


@given(jobs, st.integers(0, 10**13))
def test_more_memory_is_never_slower(job: Job, more: int) -> None:
    less = forecast_job(job).later
    with_more = forecast_job(replace(job, kept_bytes=job.kept_bytes + more)).later
    assert with_more.bytes_from_disk <= less.bytes_from_disk
    assert with_more.seeks <= less.seeks
    assert (with_more.minutes or 0) <= (less.minutes or 0)


@given(jobs)
def test_nothing_is_faster_than_the_disk(job: Job) -> None:
    for epoch in (forecast_job(job).first, forecast_job(job).later):
        if job.speed and epoch.bytes_from_disk:
            assert epoch.minutes is not None
            floor_s = epoch.bytes_from_disk / (job.speed.sequential_mb_s * 1e6)
            assert epoch.minutes * 60 >= floor_s * (1 - 1e-9)


@given(jobs)
def test_choices_of_memory_read_less_and_everything_reads_nothing(job: Job) -> None:
    made = forecast_job(job)
    of_memory = [c for c in made.choices if c.what.endswith("more RAM")]
    for c in of_memory:
        assert c.later.bytes_from_disk < made.later.bytes_from_disk
    assert not of_memory or of_memory[-1].later.bytes_from_disk == 0
    assert bool(of_memory) == (made.later.bytes_from_disk > 0)


@given(jobs)
def test_words_fit_any_numbers(job: Job) -> None:
    made = forecast_job(job)
    assert "\n" not in made.line()
    assert len(made.text().splitlines()) == 4 + len(made.choices)
    json.dumps(made.to_dict(), allow_nan=False)
