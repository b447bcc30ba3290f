"""Measure our shuffles and others on a synthetic ImageNet: the tables of docs/shuffle.md.

    python benchmarks/bench_shuffle.py [--samples 1281167] [--seeds 40]

The data set has 1000 classes of 732 to 1300 samples (fewer samples: fewer classes), JPEGs of 110 KB
in the mean (log-normal) and shards of 1 GB. "pack" has the order that `imagenet-seq pack` gives
these names, "sorted" that of the class folders. Batches have 256 samples over all ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.mixing import IntArray, label_runs
from imagenet_seq.pack.plan import place_hashes
from imagenet_seq.plan import order as plan
from imagenet_seq.plan import quality as shuffle

IMAGENET_SAMPLES = 1_281_167
SHARD_BYTES, MEAN_BYTES, HEADER_BYTES = 10**9, 110_000, 1536
BATCH_SIZE, NUM_RANKS = 256, 8
EPOCHS = (0, 1)


class Row(NamedTuple):
    """One way to shuffle."""

    name: str
    index: Index
    epoch_order: Callable[[int], IntArray]
    order: plan.Order | None = None  # of this project's loader
    moves: IntArray | None = None  # of every sample; its samples move together


def class_sizes(num_samples: int) -> IntArray:
    """Sizes as ImageNet's: most classes have 1300 samples, the smallest of 1000 has 732."""
    sizes = np.full(1000, 1300)
    sizes[:105] = np.linspace(942, 1290, 105)
    sizes[0] = 732
    more, rest = divmod(IMAGENET_SAMPLES - int(sizes.sum()), 104)
    sizes[1:105] += more + (np.arange(104) < rest)
    num_classes = int(np.searchsorted(np.cumsum(sizes), num_samples)) + 1
    sizes = sizes[:num_classes]
    sizes[-1] -= sizes.sum() - num_samples
    return sizes


def made_up_index(num_samples: int, *, permuted: bool) -> Index:
    """Shards of 1 GB of samples in the order of the class folders, or in that of a pack."""
    label = np.repeat(np.arange(len(class_sizes(num_samples))), class_sizes(num_samples))
    names = Names.from_strings(f"n{c:08d}/n{c:08d}_{i}.JPEG" for i, c in enumerate(label.tolist()))
    if permuted:
        place = np.argsort(place_hashes(names, seed=0), kind="stable")
        label, names = label[place], names.take(place)
    sigma = 0.6
    rng = np.random.default_rng(0)
    length = rng.lognormal(np.log(MEAN_BYTES) - sigma**2 / 2, sigma, num_samples).astype(np.int64)
    begin = np.cumsum(length + HEADER_BYTES) - length
    file = begin // SHARD_BYTES
    first = np.searchsorted(file, np.arange(file[-1] + 1))
    return Index(
        file=file,
        offset=begin - begin[first][file] + HEADER_BYTES,
        name=names,
        root="/data",
        files=Names.from_strings(f"shard-{i:06d}.tar" for i in range(len(first))),
        classes=tuple(map(str, range(int(label.max()) + 1))),
        length=length,
        label=label,
    )


def buffered(samples: IntArray, buffer_size: int, rng: np.random.Generator) -> IntArray:
    """Shuffle with a buffer: a random sample of it is delivered, and the next one takes its place.

    As tf.data.Dataset.shuffle defines it, and close to webdataset's `shuffle`, which also delivers
    samples while its buffer fills.
    """
    buffer, rest = samples[:buffer_size].tolist(), samples[buffer_size:].tolist()
    slots = rng.integers(len(buffer), size=len(rest)).tolist()
    shuffled = []
    for slot, sample in zip(slots, rest, strict=True):
        shuffled.append(buffer[slot])
        buffer[slot] = sample
    return np.array(shuffled + rng.permutation(buffer).tolist())


def rows(packed: Index, by_class: Index) -> list[Row]:
    """Return all shuffles to compare."""
    num_samples, num_shards = len(by_class), len(by_class.files)

    def torch_order(epoch: int) -> IntArray:
        sampler = torch.utils.data.RandomSampler(
            range(num_samples), generator=torch.Generator().manual_seed(epoch)
        )
        return np.fromiter(sampler, np.int64, num_samples)

    def of_buffer(size: int) -> Callable[[int], IntArray]:
        return lambda epoch: buffered(np.arange(num_samples), size, np.random.default_rng(epoch))

    def of_shards(epoch: int) -> IntArray:
        rng = np.random.default_rng(epoch)
        place = rng.permutation(num_shards)[by_class.file]
        return buffered(np.argsort(place, kind="stable"), 5000, rng)

    def ours(name: str, index: Index, how: str, num_streams: int = 1) -> Row:
        order = plan.Order(how, num_streams=num_streams)
        return Row(
            name,
            index,
            lambda epoch: plan.epoch_order(index, order, epoch),
            order,
            shuffle.block_of_samples(index, order),
        )

    return [
        Row("torch RandomSampler (torchvision)", by_class, torch_order),
        ours("imagenet-seq, class folders", by_class, "uniform"),
        ours("imagenet-seq, pack", packed, "block"),
        ours(f"imagenet-seq, pack, {NUM_RANKS} ranks", packed, "block", NUM_RANKS),
        ours('imagenet-seq, sorted, `shuffle="block"` forced', by_class, "block"),
        Row("buffer of 1k, sorted", by_class, of_buffer(1000)),
        Row("buffer of 5k, sorted", by_class, of_buffer(5000)),
        Row("buffer of 50k, sorted", by_class, of_buffer(50_000)),
        Row(
            "shards in random order, buffer of 5k, sorted",
            by_class,
            of_shards,
            moves=by_class.file,
        ),
    ]


COLUMNS = (
    "shuffle",
    "classes in a batch",
    "chi-square / its mean",
    "p",
    "label runs, p",
    "displacement: KS distance",
    "moves",
    "p",
    "block mates / uniform",
    "formula",
)


def measured(row: Row) -> list[str]:
    """Measure one shuffle; return the cells of its row."""
    first, second = map(row.epoch_order, EPOCHS)
    begins = plan.batch_begins(len(first), BATCH_SIZE, 1)
    assert row.index.label is not None
    label = row.index.label[first]
    counts, runs = shuffle.class_counts(label, begins), label_runs(label)
    moved = shuffle.displacement(first, second, row.moves)
    order = row.order or plan.Order()
    block = shuffle.block_of_samples(row.index, plan.Order("block"))
    assert block is not None
    formula = None
    if order.shuffle == "block":
        batch_size = BATCH_SIZE // order.num_streams
        num_blocks = int(block.max()) + 1
        formula = shuffle.block_mates_formula(len(first), num_blocks, order, batch_size)
    mates = shuffle.block_mates(first, block, begins, formula)
    by_formula = "" if formula is None else f"{formula / mates.meet_uniform:.3g}"
    return [
        row.name,
        f"{counts.classes_per_batch:.1f}",
        f"{counts.dispersion:#.4g}",
        p_cell(counts.p),
        p_cell(runs.p),
        f"{moved.distance:.2g}",
        str(moved.num_moves),
        p_cell(moved.p),
        f"{mates.meet / mates.meet_uniform:.3g}",
        by_formula,
    ]


def p_cell(p: float) -> str:
    """Format a p; mark one that means "different"."""
    return f"{p:.2f}" if p >= 0.01 else f"{p:.3f}" if p >= shuffle.ALPHA else "**< 0.001**"


POOL_COLUMNS = (
    "blocks pooled",
    "ranks x batch",
    "block mates meet",
    "formula",
    "/ uniform",
    "formula",
)
POOLS = ((16, 1, 256), (64, 1, 256), (256, 1, 256), (1024, 1, 256), (64, 8, 32), (64, 8, 256))
"""Blocks pooled over all ranks, ranks, samples of one rank in a batch."""


def measured_pool(index: Index, num_blocks: int, num_ranks: int, batch_size: int) -> list[str]:
    """Measure how often block mates meet with pools of this size; return the cells of the row."""
    order = plan.Order("block", shuffle_blocks=num_blocks, num_streams=num_ranks)
    mates = shuffle.measure(index, order, batch_size).block_mates
    assert mates is not None
    assert mates.meet_formula is not None
    return [
        str(num_blocks),
        f"{num_ranks} x {batch_size}",
        f"{mates.meet:.2%}",
        f"{mates.meet_formula:.2%}",
        f"{mates.meet / mates.meet_uniform:.3g}",
        f"{mates.meet_formula / mates.meet_uniform:.3g}",
    ]


def p_of_seeds(index: Index, seeds: range) -> list[float]:
    """Return all p of the pack's shuffle, with one rank and several, and of the uniform one."""
    found = []
    for how, num_ranks in (("block", 1), ("block", NUM_RANKS), ("uniform", 1)):
        for seed in seeds:
            order = plan.Order(how, seed, num_streams=num_ranks)
            quality = shuffle.measure(index, order, BATCH_SIZE // num_ranks)
            tests = (quality.class_counts, quality.label_runs, quality.displacement)
            found += [test.p for test in tests if test is not None]
    return found


def print_row(cells: Iterable[str]) -> None:
    """Print one row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the tables, and what `imagenet-seq info --shuffle` prints for the pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=IMAGENET_SAMPLES, help="of the data set")
    parser.add_argument("--seeds", type=int, default=0, help="count small p over so many seeds")
    arguments = parser.parse_args()
    packed = made_up_index(arguments.samples, permuted=True)
    by_class = made_up_index(arguments.samples, permuted=False)
    start = time.process_time()
    quality = shuffle.measure(packed, plan.Order("block"), BATCH_SIZE)
    seconds = time.process_time() - start
    print(f"imagenet-seq info --shuffle of the pack ({seconds:.1f} s of one core):\n")
    for name, text in shuffle.describe(quality).items():
        print(f"{name.replace('_', ' ') + ':':20} {text}")
    print()
    print_row(COLUMNS)
    print("|---" * len(COLUMNS) + "|")
    for row in rows(packed, by_class):
        print_row(measured(row))
    print()
    print_row(POOL_COLUMNS)
    print("|---" * len(POOL_COLUMNS) + "|")
    for pool in POOLS:
        print_row(measured_pool(packed, *pool))
    print()
    if arguments.seeds:
        found = np.array(p_of_seeds(packed, range(1, arguments.seeds + 1)))
        below = f"{(found < 0.05).sum()} below 0.05, {(found < shuffle.ALPHA).sum()} below 0.001"
        print(f"{len(found)} p of {arguments.seeds} seeds of ours: {below}")
    apart = shuffle.displacement(
        *(plan.epoch_order(packed, plan.Order("block"), e) for e in EPOCHS)
    )
    print(f"displacement in the pack, were all samples to move independently: p: {p_cell(apart.p)}")


if __name__ == "__main__":
    main()
