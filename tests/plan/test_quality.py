"""Shuffle quality: every measure against brute force, calibrated, and able to tell bad shuffles."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq import cli
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.mixing import IntArray, label_runs
from imagenet_seq.pack.plan import place_hashes
from imagenet_seq.plan import order as plan
from imagenet_seq.plan import quality as shuffle

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def cuts(size: int, batch_size: int) -> plan.Int64Array:
    return plan.batch_begins(size, batch_size, 1)


def class_sorted(num_samples: int, num_classes: int) -> IntArray:
    return np.arange(num_samples) * num_classes // num_samples


def index_of(label: IntArray, sample_bytes: int = 100) -> Index:
    """Samples of one size, one after the other in one file."""
    number = np.arange(len(label))
    return Index(
        file=np.zeros(len(label), np.int32),
        offset=number * sample_bytes,
        length=np.full(len(label), sample_bytes),
        name=Names.from_strings(map(str, number)),
        root="/data",
        files=Names.from_strings(["shard.tar"]),
        label=label,
    )


def far_from_uniform(p_values: Iterable[float]) -> float:
    """The Kolmogorov-Smirnov statistic of p-values; above 1.95 for one set of good ones in 1000."""
    p = np.sort(np.fromiter(p_values, np.float64))
    number = np.arange(len(p))
    distance = max(((number + 1) / len(p) - p).max(), (p - number / len(p)).max())
    return float(distance) * math.sqrt(len(p))


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_shuffle

    return bench_shuffle.buffered


# ---- against brute force -------------------------------------------------------------------------

few_labels = st.lists(st.integers(0, 3), min_size=4, max_size=6)


def table(label: IntArray, batch_begin: IntArray) -> shuffle.FloatArray:
    batch = np.repeat(np.arange(len(batch_begin) - 1), np.diff(batch_begin))
    counts = np.zeros((len(batch_begin) - 1, int(label.max()) + 1))
    np.add.at(counts, (batch, label), 1)
    return counts[:, counts.any(axis=0)]


def chi_square(counts: shuffle.FloatArray) -> float:
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@given(few_labels, st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_moments_of_chi_square_are_those_over_all_permutations(
    label: list[int], batch_size: int
) -> None:
    begins = cuts(len(label), batch_size)
    values = [chi_square(table(np.array(order), begins)) for order in itertools.permutations(label)]
    sizes = np.bincount(label)
    # No public name: a wrong variance would only show as p-values that are a little off.
    mean, variance = shuffle._chi_square_moments(np.diff(begins), sizes[sizes > 0])
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert variance == pytest.approx(np.var(values), abs=1e-9)


@given(few_labels, st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_expected_classes_are_those_over_all_permutations(
    label: list[int], batch_size: int
) -> None:
    begins = cuts(len(label), batch_size)
    counted = [
        shuffle.class_counts(np.array(order), begins)
        for order in set(itertools.permutations(label))
    ]
    expected = np.mean([counts.classes_per_batch for counts in counted])
    assert counted[0].classes_per_batch_uniform == pytest.approx(expected)
    assert counted[0].num_classes == len(set(label))


def test_class_counts_of_many_slices_are_those_of_the_whole_table() -> None:
    label = np.random.default_rng(0).integers(0, 12, 600_000)
    label[label == 5] = 6  # a class without samples
    begins = np.array([0, 0, 1, 299_999, *range(300_000, 600_001, 25_000)])
    counts = shuffle.class_counts(label, begins)
    rows = table(label, begins)
    rows = rows[rows.any(axis=1)]
    mean = 600_000 / 599_999 * (len(rows) - 1) * 10
    assert (counts.num_batches, counts.num_classes) == (len(rows), 11)
    assert counts.dispersion == pytest.approx(chi_square(rows) / mean)
    assert counts.classes_per_batch == np.count_nonzero(rows) / len(rows)


@given(few_labels)
@settings(max_examples=20, deadline=None)
def test_label_runs_are_standardised_over_all_permutations(label: list[int]) -> None:
    measured = [label_runs(np.array(order)) for order in itertools.permutations(label)]
    z = [runs.z for runs in measured]
    pairs = [runs.num_pairs for runs in measured]
    assert measured[0].num_pairs == sum(a == b for a, b in itertools.pairwise(label))
    assert measured[0].num_pairs_uniform == pytest.approx(np.mean(pairs))
    assert np.mean(z) == pytest.approx(0, abs=1e-9)
    assert np.var(z) == pytest.approx(1 if np.var(pairs) else 0, abs=1e-9)


@given(st.permutations(range(9)), st.permutations(range(9)))
def test_distance_is_to_the_displacements_of_all_pairs_of_places(
    before: list[int], after: list[int]
) -> None:
    moves = np.array([abs(before.index(i) - after.index(i)) for i in range(9)])
    all_moves = np.abs(np.subtract.outer(np.arange(9), np.arange(9))).reshape(-1)
    distance = max(abs((moves <= d).mean() - (all_moves <= d).mean()) for d in range(9))
    moved = shuffle.displacement(np.array(before), np.array(after))
    assert moved.distance == pytest.approx(distance)
    assert moved.move_distance == pytest.approx(distance)
    assert moved.mean == pytest.approx(moves.mean() / 9)
    assert moved.num_moves == 9


def test_samples_of_one_epoch_alone_do_not_count() -> None:
    before, after = np.array([3, 0, 1]), np.array([1, 3, 2])
    moved = shuffle.displacement(before, after)
    assert moved.num_moves == 2
    assert moved.mean == pytest.approx((1 + 2) / 2 / 3)
    assert moved.p == 1  # two samples can't tell


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(2, 12), st.randoms())
def test_block_mates_are_counted_pair_by_pair(
    block: list[int], batch_size: int, random: Any
) -> None:
    order = list(range(len(block)))
    random.shuffle(order)
    pairs = list(itertools.combinations(range(len(block)), 2))
    mates = [(i, j) for i, j in pairs if block[order[i]] == block[order[j]]]
    together = [(i, j) for i, j in pairs if i // batch_size == j // batch_size]
    measured = shuffle.block_mates(np.array(order), np.array(block), cuts(len(block), batch_size))
    assert measured.num_blocks == len(set(block))
    assert measured.meet == pytest.approx(len({*mates} & {*together}) / max(len(mates), 1))
    assert measured.meet_uniform == pytest.approx(len(together) / len(pairs))


@given(st.integers(2, 40), st.integers(1, 60))
def test_formula_is_the_mean_over_all_cuts_of_a_pool(pool_samples: int, batch_size: int) -> None:
    order = plan.Order("block", shuffle_blocks=1)
    pairs = list(itertools.combinations(range(pool_samples), 2))
    together = sum(
        (i + cut) // batch_size == (j + cut) // batch_size
        for cut in range(batch_size)
        for i, j in pairs
    )
    formula = shuffle.block_mates_formula(pool_samples, 1, order, batch_size)
    assert formula == pytest.approx(together / batch_size / len(pairs))


@pytest.mark.parametrize("num_streams", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [8, 64, 1000])
def test_formula_is_what_the_plan_gives(num_streams: int, batch_size: int) -> None:
    index = index_of(np.zeros(16_400, np.int32))
    # Blocks of 41 samples: the formula is for pools that batches are cut from anywhere.
    order = plan.Order("block", block_bytes=4100, shuffle_blocks=16, num_streams=num_streams)
    block = shuffle.block_of_samples(index, order)
    assert block is not None
    begins = plan.batch_begins(len(index), batch_size, num_streams)
    mates = [
        shuffle.block_mates(plan.epoch_order(index, order, epoch), block, begins).meet
        for epoch in range(8)
    ]
    formula = shuffle.block_mates_formula(len(index), 400, order, batch_size)
    # Few batches an epoch do not begin anywhere in a pool, but at few places.
    assert np.mean(mates) == pytest.approx(formula, rel=0.03 if batch_size < 1000 else 0.1)


# ---- calibration: uniform shuffles ---------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "num_classes", "batch_size"), [
    (1000, 3, 50), (3000, 20, 64), (3000, 300, 8),
])  # fmt: skip
def test_p_values_of_uniform_shuffles_are_uniform(
    num_samples: int, num_classes: int, batch_size: int
) -> None:
    rng = np.random.default_rng(0)
    label, begins = class_sorted(num_samples, num_classes), cuts(num_samples, batch_size)
    orders = [rng.permutation(num_samples) for _ in range(301)]
    assert far_from_uniform(shuffle.class_counts(label[o], begins).p for o in orders) < 1.95
    if num_samples / num_classes > 100:  # otherwise there are few different numbers of runs
        assert far_from_uniform(label_runs(label[o]).p for o in orders) < 1.95
    pairs = itertools.pairwise(orders)
    assert far_from_uniform(shuffle.displacement(*pair).p for pair in pairs) < 1.95


def test_distances_drawn_of_one_size_serve_for_others() -> None:
    # No public name: p of large data would be off by 0.02, which p-values alone hardly show.
    medians = [
        np.median(shuffle._size_free(shuffle._distances_drawn(size), size))
        for size in (200, 500, 2000)
    ]
    assert np.ptp(medians) < 0.015


@pytest.mark.parametrize(("kind", "num_streams"), [("uniform", 1), ("block", 1), ("block", 8)])
def test_our_shuffle_is_indistinguishable_from_uniform(kind: str, num_streams: int) -> None:
    label = np.random.default_rng(0).permutation(class_sorted(12_000, 40))
    index = index_of(label.astype(np.int32))
    qualities = [
        shuffle.measure(
            index,
            plan.Order(kind, seed, block_bytes=3000, shuffle_blocks=16, num_streams=num_streams),
            batch_size=64 // num_streams,
        )
        for seed in range(150)
    ]
    counts = [q.class_counts.p for q in qualities if q.class_counts is not None]
    runs = [q.label_runs.p for q in qualities if q.label_runs is not None]
    moves = [q.displacement.p for q in qualities]
    for p_values in (counts, runs, moves):
        assert len(p_values) == 150
        assert far_from_uniform(p_values) < 1.95
    assert {q.displacement.num_moves for q in qualities} == {12_000 if kind == "uniform" else 400}


def test_order_of_packs_is_indistinguishable_from_uniform() -> None:
    label = class_sorted(4000, 25)
    names = Names.from_strings(f"n{c:08d}/n{c:08d}_{i}.JPEG" for i, c in enumerate(label))
    # No public name but packing itself, and 4000 images a seed.
    orders = [np.argsort(place_hashes(names, seed)) for seed in range(150)]
    begins = cuts(4000, 64)
    assert far_from_uniform(shuffle.class_counts(label[o], begins).p for o in orders) < 1.95
    assert far_from_uniform(label_runs(label[o]).p for o in orders) < 1.95
    pairs = itertools.pairwise(orders)
    assert far_from_uniform(shuffle.displacement(*pair).p for pair in pairs) < 1.95


# ---- power: bad shuffles -------------------------------------------------------------------------


def test_a_shuffle_buffer_on_sorted_data_is_told(buffered: Any) -> None:
    label, begins = class_sorted(40_000, 80), cuts(40_000, 64)
    first, second = (buffered(np.arange(40_000), 1000, np.random.default_rng(e)) for e in (0, 1))
    assert sorted(first) == list(range(40_000))
    counts = shuffle.class_counts(label[first], begins)
    assert counts.p < 1e-9
    assert counts.dispersion > 10
    assert counts.classes_per_batch < 0.3 * counts.classes_per_batch_uniform
    assert label_runs(label[first]).p < 1e-9
    moved = shuffle.displacement(first, second)
    assert moved.p < shuffle.ALPHA
    assert moved.distance > 0.8


def test_classes_rationed_to_batches_are_told() -> None:
    label = np.tile(np.arange(64), 50)  # each batch has each class once
    counts = shuffle.class_counts(label, cuts(3200, 64))
    assert counts.dispersion == pytest.approx(0, abs=1e-9)
    assert counts.z < -10
    assert counts.p < 1e-9
    assert label_runs(label).p < 1e-9


def test_a_rotated_order_is_told() -> None:
    order = np.random.default_rng(0).permutation(5000)
    moved = shuffle.displacement(order, np.roll(order, 1700))
    assert moved.p < shuffle.ALPHA


def test_blocks_of_sorted_data_without_a_pool_are_told() -> None:
    index = index_of(class_sorted(20_000, 50).astype(np.int32))
    quality = shuffle.measure(
        index, plan.Order("block", block_bytes=4000, shuffle_blocks=1), batch_size=64
    )
    assert quality.class_counts is not None
    assert quality.class_counts.p < 1e-9
    assert quality.label_runs is not None
    assert quality.label_runs.p < 1e-9
    assert quality.displacement.p >= shuffle.ALPHA  # the blocks' order is random all the same


def test_samples_that_move_in_blocks_are_told_where_blocks_are_not_named() -> None:
    index = index_of(class_sorted(20_000, 50).astype(np.int32))
    order = plan.Order("block", block_bytes=20_000, shuffle_blocks=1)
    first, second = (plan.epoch_order(index, order, epoch) for epoch in (0, 1))
    assert shuffle.displacement(first, second).p < shuffle.ALPHA
    block = shuffle.block_of_samples(index, order)
    assert shuffle.displacement(first, second, block).p >= shuffle.ALPHA


# ---- edges, words, command line ------------------------------------------------------------------


def test_one_class_or_one_batch_can_not_be_told() -> None:
    for label, begins in ((np.zeros(50, int), cuts(50, 8)), (class_sorted(50, 5), cuts(50, 50))):
        counts = shuffle.class_counts(label, begins)
        assert (counts.dispersion, counts.p) == (1, 1)
    assert label_runs(np.zeros(50, int)).p == 1


def test_unknown_labels_are_said() -> None:
    quality = shuffle.measure(index_of(np.full(50, -1, np.int32)), plan.Order(), 8)
    assert quality.class_counts is None
    assert quality.label_runs is None
    assert "labels are not known" in shuffle.describe(quality)["class_counts"]


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5 samples for 8 ranks"):
        shuffle.measure(index_of(np.zeros(5, np.int32)), plan.Order(num_streams=8), 1)


def test_verdict() -> None:
    assert shuffle.verdict(0.43) == "indistinguishable from a uniform shuffle: p = 0.43"
    assert shuffle.verdict(2e-5) == "DIFFERENT from a uniform shuffle: p = 2e-05"
    assert shuffle.verdict(0.0) == "DIFFERENT from a uniform shuffle: p < 1e-300"


def test_info_shuffle(
    make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(12, 3) / "train"
    assert cli.main(["info", str(folder), "--shuffle", "--batch-size", "4"]) == 0
    text = capsys.readouterr().out
    assert "a uniform permutation; seed 0, epochs 0 and 1, batches of 4 over 1 rank\n" in text
    assert "class counts:        indistinguishable from a uniform shuffle: p = " in text
    assert "among 12 samples" in text
    assert "block mates" not in text

    destination = str(tmp_path / "pack")
    assert cli.main(["pack", str(folder), destination]) == 0
    capsys.readouterr()
    shown = ["info", destination, "--shuffle", "--batch-size", "2", "--ranks", "2"]
    assert cli.main(shown) == 0
    text = capsys.readouterr().out
    assert "blocks of 16.8 MB, 64 pooled; seed 0, epochs 0 and 1, batches of 4 over 2 ranks" in text
    assert "two samples of one block meet in a batch with probability" in text
    assert cli.main([*shown, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["shuffle"]
    assert facts["order"]["num_streams"] == 2
    assert facts["batch_size"] == 4
    assert facts["class_counts"]["num_batches"] == 3
    assert facts["block_mates"]["meet"] == facts["block_mates"]["meet_uniform"]  # one block


def test_needs_no_torch() -> None:
    command = "import sys, imagenet_seq.plan.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_the_table_of_the_docs_can_be_made() -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "bench_shuffle.py"),
        "--samples",
        "20000",
        "--seeds",
        "1",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "9 p of 1 seeds of ours: " in made
    lines = [line for line in made.splitlines() if line.startswith("| ")]
    told = {line.split(" | ")[0][2:]: "< 0.001" in line.split(" | ")[3] for line in lines}
    assert told["imagenet-seq, pack"] is False
    assert told["buffer of 1k, sorted"] is True
