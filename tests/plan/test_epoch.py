"""The plan: order, streams, batches, ranks, blocks and state."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_seq.errors import StateError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.plan.blocks import blocks_of
from imagenet_seq.plan.epoch import (
    MAX_GAP_BYTES,
    EnginePlan,
    explicit_plan,
    peak_block_bytes,
    rank_plan,
)
from imagenet_seq.plan.order import Order, batch_begins, epoch_order, epoch_size
from imagenet_seq.plan.state import State, check_state

HEADER_BYTES = 512  # between samples, as in a tar


def pack_index(num_samples: int, num_files: int = 3) -> Index:
    """Samples of 1 to 3000 bytes one after the other in files, with headers between them."""
    number = np.arange(num_samples)
    length = 1 + number * 7919 % 3000
    file = number * num_files // max(1, num_samples)
    end = np.cumsum(length + HEADER_BYTES)
    first = np.searchsorted(file, np.arange(num_files))
    file_begin = np.concatenate([[0], end])[first]
    return Index(
        file=file,
        offset=end - length - file_begin[file],
        length=length,
        name=Names.from_strings(f"sample_{i}" for i in range(num_samples)),
        root="/pack",
        files=Names.from_strings(f"shard-{i}.tar" for i in range(num_files)),
        checksum=number * 2654435761 % (1 << 32),
        flags=number % 2,
    )


def folder_index(num_samples: int) -> Index:
    names = Names.from_strings(f"class/{i}.jpg" for i in range(num_samples))
    return Index(
        file=np.arange(num_samples),
        offset=np.broadcast_to(np.int64(0), num_samples),
        name=names,
        root="/folder",
        files=names,
    )


def index_of_python_blocks(num_blocks: int, block_samples: int) -> Index:
    size = num_blocks * block_samples
    return Index(
        file=np.repeat(np.arange(num_blocks), block_samples),
        offset=np.tile(np.arange(block_samples), num_blocks),
        name=Names.from_strings(map(str, range(size))),
        root="",
        files=Names.from_strings(f"row group {i}" for i in range(num_blocks)),
    )


orders = st.builds(
    Order,
    shuffle=st.sampled_from(["none", "uniform", "block"]),
    seed=st.integers(0, 2**64 - 1),
    block_bytes=st.sampled_from([1, 5000, 20_000, 10**6]),
    shuffle_blocks=st.integers(1, 20),
    num_streams=st.integers(1, 9),
    exact=st.booleans(),
)
sizes = st.integers(0, 300)


def batches(plan: EnginePlan) -> list[list[int]]:
    return [part.tolist() for part in np.split(plan.sample, plan.batch_begin[1:-1])][
        : len(plan.batch_begin) - 1
    ]


def global_batches(plans: list[EnginePlan]) -> list[list[int]]:
    """Put the ranks' batches together: position i of a global batch is rank i % world_size's."""
    merged = []
    for parts in zip(*map(batches, plans), strict=True):
        whole = [-1] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: len(parts)] = part
        merged.append(whole)
    return merged


def all_ranks(index: Index, order: Order, world_size: int, **options: int) -> list[EnginePlan]:
    return [
        rank_plan(index, order, 0, rank=r, world_size=world_size, **options)
        for r in range(world_size)
    ]


# ---- order ---------------------------------------------------------------------------------------


@given(sizes, orders, st.integers(0, 5))
def test_an_epoch_has_every_sample_at_most_once_and_leaves_out_fewer_than_streams(
    size: int, order: Order, epoch: int
) -> None:
    samples = epoch_order(pack_index(size), order, epoch).tolist()
    assert len(samples) == epoch_size(size, order)
    assert len(set(samples)) == len(samples)
    assert set(samples) <= set(range(size))
    assert size - len(samples) < (1 if order.exact else order.num_streams)


@given(sizes, orders, st.integers(0, 3))
def test_streams_are_cut_by_sample_count(size: int, order: Order, epoch: int) -> None:
    index = pack_index(size)
    samples = epoch_order(index, order, epoch)
    num_streams = order.num_streams
    for stream in range(num_streams):
        extra = order.exact and stream < size % num_streams
        assert len(samples[stream::num_streams]) == size // num_streams + extra
    if order.shuffle == "none":
        in_turn = np.concatenate([samples[s::num_streams] for s in range(num_streams)])
        assert in_turn.tolist() == list(range(epoch_size(size, order)))


def test_the_order_never_changes() -> None:
    """These orders are part of saved states: a change here breaks every run in progress."""
    index = pack_index(1000)
    for shuffle, first, checksum in GOLDEN_ORDERS:
        order = Order(shuffle, seed=7, block_bytes=20_000, shuffle_blocks=8, num_streams=2)
        samples = epoch_order(index, order, epoch=3)
        assert samples[:8].tolist() == first
        assert zlib.crc32(samples.astype("<i8").tobytes()) == checksum


GOLDEN_ORDERS = [
    ("uniform", [81, 108, 909, 601, 121, 582, 28, 97], 656889350),
    ("block", [295, 383, 303, 376, 297, 381, 299, 382], 2752652418),
]


def test_the_order_differs_between_seeds_epochs_and_shuffles() -> None:
    index = pack_index(400)
    base = Order("uniform", block_bytes=10_000, shuffle_blocks=4)
    seen = [
        tuple(epoch_order(index, order, epoch).tolist())
        for order in (base, replace(base, seed=1), replace(base, shuffle="block"))
        for epoch in range(2)
    ]
    assert len(set(seen)) == len(seen)


def test_the_samples_left_over_vary_by_epoch() -> None:
    order = Order("uniform", num_streams=8)
    index = folder_index(103)
    left = [frozenset(range(103)) - set(epoch_order(index, order, e).tolist()) for e in range(4)]
    assert all(len(samples) == 7 for samples in left)
    assert len(set(left)) == 4


@pytest.mark.parametrize("shuffle", ["uniform", "block"])
def test_places_of_a_sample_are_uniform(shuffle: str) -> None:
    """Chi-square over where samples go in 2000 epochs; 16 x 16 cells, fixed seeds."""
    size, epochs = 64, 2000
    index = folder_index(size)
    order = Order(shuffle, shuffle_blocks=size)
    counts = np.zeros((16, 16))
    for epoch in range(epochs):
        samples = epoch_order(index, order, epoch)
        np.add.at(counts, (np.arange(size) // 4, samples // 4), 1)
    expected = size * epochs / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Rows and columns have fixed sums: 225 degrees of freedom, mean 225, standard deviation 21.
    assert 130 < statistic < 330


def test_neighbours_are_independent() -> None:
    """Pairs of successive samples in one long permutation: no serial correlation."""
    samples = epoch_order(folder_index(100_000), Order("uniform"), 0).astype(float)
    correlation = np.corrcoef(samples[:-1], samples[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(100_000)


def test_streams_do_not_share_draws() -> None:
    """Two streams of the same shape must not have their pools permuted in the same way."""
    order = Order("block", block_bytes=10**9, num_streams=2)
    samples = epoch_order(pack_index(400, num_files=1), order, 0)
    first, second = samples[0::2], samples[1::2]
    assert sorted(first) == list(range(200))
    assert (first + 200).tolist() != second.tolist()


# ---- block shuffle -------------------------------------------------------------------------------


@given(st.integers(1, 300), orders, st.integers(0, 3))
def test_a_pool_never_exceeds_its_size_and_begins_with_one_block(
    size: int, order: Order, epoch: int
) -> None:
    order = replace(order, shuffle="block")
    index = pack_index(size)
    blocks = blocks_of(index, order.block_bytes)
    block_of_sample = np.repeat(np.arange(len(blocks.file)), np.diff(blocks.begin))
    samples = epoch_order(index, order, epoch)
    for stream in range(order.num_streams):
        used = block_of_sample[samples[stream :: order.num_streams]]
        if not len(used):
            continue
        _, first = np.unique(used, return_index=True)
        _, last = np.unique(used[::-1], return_index=True)
        place = np.arange(len(used))
        held = (first <= place[:, None]) & (place[:, None] <= len(used) - 1 - last)
        assert held.sum(1).max() <= order.pool_blocks
        assert (used[: (used == used[0]).sum()] == used[0]).all()  # alone until it is used up


def test_samples_are_given_out_evenly_while_their_block_is_in_the_pool() -> None:
    num_blocks, block_samples, pool = 400, 50, 16
    length = np.full(num_blocks * block_samples, 1000)
    index = replace(
        pack_index(len(length), num_files=1), offset=np.cumsum(length) - 1000, length=length
    )
    order = Order("block", block_bytes=1000 * block_samples, shuffle_blocks=pool)
    used = epoch_order(index, order, 0) // block_samples
    opened = {block: place for place, block in enumerate(dict.fromkeys(used.tolist()))}
    lag = np.arange(len(used)) / block_samples - [opened[block] for block in used.tolist()]
    steady = lag[5000:-2000] / pool
    # Places are about times, all shifted alike: uniform over a range of 1, a little blurred.
    counts, _ = np.histogram(steady - np.median(steady), np.linspace(-0.5, 0.5, 11))
    assert abs(counts[1:-1] / len(steady) - 0.1).max() < 0.015


def test_a_block_across_a_cut_is_read_by_both_streams_and_others_by_one() -> None:
    index = pack_index(1000)
    order = Order("block", block_bytes=20_000, shuffle_blocks=8, num_streams=4)
    plans = all_ranks(index, order, 4, batch_size=8)
    reads = [
        (int(f), int(o))
        for plan in plans
        for f, o in zip(plan.block_file, plan.block_offset, strict=True)
    ]
    num_blocks = len(blocks_of(index, order.block_bytes).file)
    assert num_blocks <= len(reads) <= num_blocks + 3


# ---- blocks --------------------------------------------------------------------------------------


@given(sizes, st.integers(1, 4), st.sampled_from([1, 700, 5000, 20_000, 10**9]))
def test_blocks_are_runs_of_whole_samples(size: int, num_files: int, block_bytes: int) -> None:
    index = pack_index(size, num_files)
    assert index.length is not None
    blocks = blocks_of(index, block_bytes)
    assert blocks.begin[0] == 0
    assert blocks.begin[-1] == size
    assert (np.diff(blocks.begin) > 0).all()
    longest = int(index.length.max(initial=0))
    for k, (first, end) in enumerate(zip(blocks.begin[:-1], blocks.begin[1:], strict=True)):
        assert (index.file[first:end] == blocks.file[k]).all()
        assert blocks.offset[k] == index.offset[first]
        assert blocks.offset[k] + blocks.length[k] == index.offset[end - 1] + index.length[end - 1]
        assert blocks.length[k] <= max(block_bytes, 0) + longest
        if index.length[first:end].max() > block_bytes:
            assert end - first == 1


def test_blocks_are_about_block_bytes() -> None:
    index = pack_index(10_000, num_files=4)
    blocks = blocks_of(index, 100_000)
    assert 80_000 < blocks.length.mean() < 100_000
    assert blocks.length.min() > 70_000


def test_blocks_of_a_folder_are_its_files() -> None:
    blocks = blocks_of(folder_index(5), 1 << 24)
    assert blocks.begin.tolist() == [0, 1, 2, 3, 4, 5]
    assert blocks.length.tolist() == [-1] * 5


def test_blocks_of_a_shuffled_index_lie_as_on_disk() -> None:
    index = pack_index(500)
    order = np.random.default_rng(0).permutation(500)
    blocks, shuffled = blocks_of(index, 20_000), blocks_of(index.take(order), 20_000)
    assert shuffled.sample is not None
    assert order[shuffled.sample].tolist() == list(range(500))
    assert shuffled.offset.tolist() == blocks.offset.tolist()


# ---- batches and ranks ---------------------------------------------------------------------------


@given(sizes, st.integers(1, 20), st.integers(1, 9), st.booleans(), st.data())
def test_global_batches_cover_the_rest_of_the_epoch(
    size: int, batch_size: int, world_size: int, drop_last: bool, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, size))
    begins = batch_begins(size, batch_size, world_size, drop_last, done)
    batch_sizes = np.diff(begins)
    whole = batch_size * world_size
    assert begins[0] == done
    assert (batch_sizes > 0).all()
    assert (batch_sizes[:-2] == whole).all()
    if drop_last:
        assert (batch_sizes == whole).all()
        assert size - begins[-1] < whole
    else:
        assert begins[-1] == size
        assert (batch_sizes <= whole).all()
        if batch_size > 1 and len(batch_sizes) > 1:
            assert (batch_sizes >= world_size).all()


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [
        (64, 8, [32, 32]),
        (68, 8, [32, 32, 4]),
        (65, 8, [32, 29, 4]),  # each of the four ranks has one sample in the last batch
        (3, 8, [3]),
        (9, 1, [4, 4, 1]),
        (0, 8, []),
    ],
)
def test_sizes_of_global_batches(size: int, batch_size: int, expected: list[int]) -> None:
    assert np.diff(batch_begins(size, batch_size, world_size=4)).tolist() == expected


@given(sizes, orders, st.integers(1, 12), st.integers(1, 9), st.booleans())
def test_ranks_have_equal_batches_and_together_the_epoch(
    size: int, order: Order, batch_size: int, world_size: int, drop_last: bool
) -> None:
    index = pack_index(size)
    plans = all_ranks(index, order, world_size, batch_size=batch_size, drop_last=drop_last)
    assert len({len(plan.batch_begin) for plan in plans}) == 1
    batch_sizes = np.array([np.diff(plan.batch_begin) for plan in plans])
    if batch_sizes.size:
        assert (batch_sizes.max(0) - batch_sizes.min(0)).max() <= 1
        assert batch_sizes.max() <= batch_size
        if batch_size > 1 and batch_sizes.shape[1] > 1:
            assert batch_sizes.min() >= 1
    merged = list(chain(*global_batches(plans)))
    assert merged == epoch_order(index, order, 0)[: len(merged)].tolist()
    whole = batch_size * world_size
    expected = epoch_size(size, order)
    assert len(merged) == (expected // whole * whole if drop_last else expected)


@given(sizes, orders, st.integers(1, 12), st.integers(1, 9), st.data())
def test_resume_is_the_tail_of_the_uninterrupted_plan(
    size: int, order: Order, batch_size: int, world_size: int, data: st.DataObject
) -> None:
    index = pack_index(size)
    rank = data.draw(st.integers(0, world_size - 1))
    options = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    whole = rank_plan(index, order, 2, **options)
    batch = data.draw(st.integers(0, len(whole.batch_begin) - 1))
    rest = rank_plan(index, order, 2, **options, samples_done=int(whole.samples_done[batch]))
    assert batches(rest) == batches(whole)[batch:]
    assert rest.samples_done.tolist() == whole.samples_done[batch:].tolist()


@given(sizes, orders, st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.data())
def test_another_world_size_continues_with_the_same_global_batches(
    size: int, order: Order, first_world: int, second_world: int, scale: int, data: st.DataObject
) -> None:
    """The batch sizes are chosen so that the global batch stays the same."""
    index = pack_index(size)
    before = all_ranks(index, order, first_world, batch_size=second_world * scale)
    done = int(data.draw(st.sampled_from(before[0].samples_done.tolist())))
    after = all_ranks(index, order, second_world, batch_size=first_world * scale, samples_done=done)
    rest = list(chain(*global_batches(after)))
    assert rest == epoch_order(index, order, 0)[done:].tolist()
    whole = [batch for batch in global_batches(before) if batch]
    skipped = before[0].samples_done.tolist().index(done)
    same = len(whole) - skipped - 2  # the last two depend on the number of ranks
    assert global_batches(after)[: max(0, same)] == whole[skipped : skipped + max(0, same)]


@given(sizes, orders, st.integers(1, 12), st.integers(0, 20))
def test_a_rank_of_as_many_ranks_as_streams_reads_its_own_stream(
    size: int, order: Order, batch_size: int, done_of_each: int
) -> None:
    order = replace(order, exact=False)
    index = pack_index(size)
    world_size = order.num_streams
    done = min(done_of_each, size // world_size) * world_size
    order_of_epoch = epoch_order(index, order, 0)
    plans = all_ranks(index, order, world_size, batch_size=batch_size, samples_done=done)
    for rank, plan in enumerate(plans):
        assert plan.sample.tolist() == order_of_epoch[done:][rank::world_size].tolist()


# ---- the engine's arrays -------------------------------------------------------------------------


def check_arrays(index: Index, plan: EnginePlan) -> None:
    """Every position's bytes are where the index says, and every block is used, in order."""
    size = len(plan.sample)
    assert plan.batch_begin[0] == 0
    assert plan.batch_begin[-1] == size
    paths = Names(plan.paths, plan.path_begin)
    assert plan.path_begin[0] == 0
    for i in range(size):
        sample, block = int(plan.sample[i]), int(plan.block[i])
        assert paths[int(plan.block_file[block])] == index.files[int(index.file[sample])]
        assert plan.block_offset[block] + plan.offset[i] == index.offset[sample]
        if index.length is None:
            assert plan.length[i] == plan.block_length[block] == -1
        else:
            assert plan.length[i] == index.length[sample]
            assert 0 <= plan.offset[i] <= plan.block_length[block] - plan.length[i]
        if index.checksum is not None:
            assert plan.checksum is not None
            assert plan.checksum[i] == index.checksum[sample]
        if index.flags is not None:
            assert plan.flags is not None
            assert plan.flags[i] == index.flags[sample]
    first_uses = list(dict.fromkeys(plan.block.tolist()))
    assert first_uses == list(range(len(plan.block_file)))
    assert len(set(paths)) == len(paths)
    assert set(plan.block_file.tolist()) == set(range(len(paths)))


@settings(max_examples=60)
@given(sizes, orders, st.integers(1, 12), st.integers(1, 5), st.booleans(), st.data())
def test_arrays_lead_to_the_bytes_of_every_sample(
    size: int,
    order: Order,
    batch_size: int,
    world_size: int,
    folder: bool,
    data: st.DataObject,
) -> None:
    index = folder_index(size) if folder else pack_index(size)
    if data.draw(st.booleans(), "subset"):
        chosen = data.draw(st.permutations(range(size)))[: size // 2]
        index = index.take(np.array(chosen, int))
    for plan in all_ranks(index, order, world_size, batch_size=batch_size):
        check_arrays(index, plan)


@given(st.lists(st.integers(0, 99), max_size=60), st.sampled_from([1, 5000, 10**9]))
def test_an_explicit_order_is_kept(samples: list[int], block_bytes: int) -> None:
    index = pack_index(100)
    batch_begin = [0, len(samples) // 2, len(samples)]
    plan = explicit_plan(index, samples, batch_begin, seed=3, epoch=4, block_bytes=block_bytes)
    assert plan.sample.tolist() == samples
    assert plan.batch_begin.tolist() == batch_begin
    assert (plan.seed, plan.epoch) == (3, 4)
    check_arrays(index, plan)


def test_neighbours_in_an_explicit_order_are_read_together() -> None:
    index = pack_index(300, num_files=1)
    plan = explicit_plan(index, np.arange(300), [0, 300], seed=0, epoch=0, block_bytes=50_000)
    total = int(index.offset[-1] - index.offset[0])
    assert total // 50_000 <= len(plan.block_file) <= total // 50_000 + 1
    assert plan.block_length.max() < 53_000

    backwards = explicit_plan(index, np.arange(300)[::-1], [0, 300], seed=0, epoch=0)
    assert len(backwards.block_file) == 300

    far = Index(
        file=[0, 0, 0],
        offset=[0, 10 + MAX_GAP_BYTES, 21 + 2 * MAX_GAP_BYTES],
        length=[10, 10, 10],
        name=Names.from_strings("abc"),
        root="",
        files=Names.from_strings(["f"]),
    )
    plan = explicit_plan(far, [0, 1, 2], [0, 3], seed=0, epoch=0)
    assert plan.block.tolist() == [0, 0, 1]


@pytest.mark.parametrize("shuffle", ["none", "uniform", "block"])
def test_files_may_be_longer_than_four_gigabytes(shuffle: str) -> None:
    base = pack_index(100, num_files=2)
    index = replace(base, offset=base.offset + 5 * 10**9)
    plan = rank_plan(index, Order(shuffle, block_bytes=20_000), 0, batch_size=8)
    check_arrays(index, plan)
    huge = replace(index, offset=base.offset * 10**9, length=np.full(100, 3 * 10**9))
    check_arrays(huge, rank_plan(huge, Order(shuffle), 0, batch_size=8))


def test_an_index_in_an_order_of_its_own_is_not_reordered() -> None:
    order = np.random.default_rng(0).permutation(200)
    index = pack_index(200).take(order)
    plan = rank_plan(index, Order("none", exact=True), 0, batch_size=10)
    assert plan.sample.tolist() == list(range(200))
    check_arrays(index, plan)


def test_samples_of_unknown_length_are_read_alone() -> None:
    base = pack_index(100)
    assert base.length is not None
    length = base.length.copy()
    length[::7] = -1
    index = replace(base, length=length)
    plan = rank_plan(index, Order("block", block_bytes=10_000), 0, batch_size=10)
    unknown = plan.length == -1
    assert unknown.sum() == 15
    assert (plan.offset[unknown] == 0).all()
    assert (plan.block_length[plan.block[unknown]] == -1).all()
    assert (np.bincount(plan.block)[plan.block[unknown]] == 1).all()


@pytest.mark.parametrize("shuffle", ["none", "uniform", "block"])
def test_python_blocks_are_named_by_number_and_ordinal(shuffle: str) -> None:
    index = index_of_python_blocks(num_blocks=12, block_samples=10)
    order = Order(shuffle, shuffle_blocks=3, num_streams=2)
    for rank in range(2):
        plan = rank_plan(index, order, 0, batch_size=7, rank=rank, world_size=2, python_blocks=True)
        assert (plan.block_file == -1).all()
        assert plan.block_offset[plan.block].tolist() == index.file[plan.sample].tolist()
        assert plan.offset.tolist() == index.offset[plan.sample].tolist()
        assert len(plan.path_begin) == 1
        if shuffle != "uniform":
            assert len(plan.block_file) == 6


def test_peak_of_block_bytes() -> None:
    index = pack_index(2000, num_files=2)
    for shuffle, pools in (("none", 1), ("block", 4), ("uniform", 1)):
        order = Order(shuffle, block_bytes=50_000, shuffle_blocks=4)
        plan = rank_plan(index, order, 0, batch_size=32)
        peak = 0
        last = {block: i for i, block in enumerate(plan.block.tolist())}
        live: dict[int, int] = {}
        for i, block in enumerate(plan.block.tolist()):
            live[block] = int(plan.block_length[block])
            peak = max(peak, sum(live.values()))
            if last[block] == i:
                del live[block]
        assert peak_block_bytes(plan) == peak
        assert peak <= pools * 53_000
    folder = rank_plan(folder_index(10), order, 0, batch_size=4)
    assert peak_block_bytes(folder, unknown_bytes=110_000) == 110_000
    assert peak_block_bytes(rank_plan(folder_index(0), order, 0, batch_size=4)) == 0


# ---- arguments and state -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Order("sideways"), "shuffle: expected 'none', 'uniform' or 'block'"),
        (lambda: Order(seed=-1), "seed: expected"),
        (lambda: Order(num_streams=0), "num_streams: expected at least 1, got 0"),
        (lambda: rank_plan(folder_index(4), Order(), 0, batch_size=0), "batch_size"),
        (lambda: rank_plan(folder_index(4), Order(), -1, batch_size=1), "epoch: expected"),
        (lambda: rank_plan(folder_index(4), Order(), 0, batch_size=1, rank=1), r"rank: .*\[0, 1\)"),
        (
            lambda: rank_plan(folder_index(4), Order(), 0, batch_size=1, samples_done=5),
            r"samples_done: expected a value in \[0, 4\], got 5",
        ),
        (
            lambda: explicit_plan(folder_index(4), [0, 1], [0, 1], seed=0, epoch=0),
            "batch_begin: expected to rise from 0 to 2",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_explicit_sample_outside_the_index_is_refused() -> None:
    with pytest.raises(IndexError, match=r"expected samples in \[0, 4\), got 1 to 4"):
        explicit_plan(folder_index(4), [4, 1], [0, 2], seed=0, epoch=0)


def state() -> State:
    return State.of(folder_index(10), Order("block", seed=5, num_streams=3), "pillow-13", 2, 96)


def test_state_survives_json() -> None:
    saved = State.from_dict(json.loads(json.dumps(state().to_dict())))
    assert saved == state()
    assert saved.order == Order("block", seed=5, num_streams=3)


def test_a_state_of_another_run_is_refused_with_every_difference() -> None:
    other = replace(state(), seed=6, shuffle="uniform", index_id="abc")
    with pytest.raises(StateError) as caught:
        check_state(state(), other)
    message = str(caught.value)
    assert "seed: expected 5, got 6; pass seed=6" in message
    assert "shuffle: expected 'block', got 'uniform'; pass shuffle='uniform'" in message
    assert "index_id" in message
    assert "open the dataset" in message
    assert "block_bytes" not in message


def test_a_state_of_another_place_or_world_size_is_welcome() -> None:
    check_state(state(), replace(state(), epoch=7, samples_done=0, num_streams=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "expected format version 2, got 1"),
        ({"seed": "5"}, "seed: expected int, got '5'"),
        ({"exact": 1}, "exact: expected bool, got 1"),
        ({"colour": 3}, "colour: unknown"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(StateError, match=message):
        State.from_dict({**asdict(state()), **change})


def test_a_state_with_a_missing_field_is_refused() -> None:
    values = state().to_dict()
    del values["epoch"]
    with pytest.raises(StateError, match="epoch: expected int, got 'nothing'"):
        State.from_dict(values)
