"""The order of an epoch: its settings, its samples in sequence, and each rank's part.

Three steps:

1. The samples are put into one sequence: as they are ("none"), in a uniform permutation
   ("uniform"), or as their blocks in random order ("block").
2. The sequence is cut by sample count into `num_streams` runs of equal size. For "block", a
   stream's blocks are mixed: its samples are drawn from a pool of the last blocks read.
3. The streams are drawn from in turn: global position g of the epoch is sample g // num_streams of
   stream g % num_streams. Global batches are runs of global positions; position i of a global batch
   goes to rank i % world_size.

So rank r of `num_streams` ranks reads stream r and no other, and any other number of ranks
continues the same global order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from imagenet_seq.index.columns import Index, IntArray
from imagenet_seq.plan.arrays import Int32Array, Int64Array, index_dtype, slices
from imagenet_seq.plan.blocks import Blocks, blocks_of
from imagenet_seq.plan.splitmix import hash_words, permutation, splitmix

MB = 1 << 20

_UNIFORM, _BLOCKS, _POOLS = 1, 2, 3
"""Purpose of a random draw, a part of its key, so that no two purposes share draws."""


@dataclass(frozen=True)
class Order:
    """Settings that decide the order of an epoch, together with the index and the epoch's number.

    `exact`: an epoch has every sample exactly once. Otherwise all streams have the same size, and
    each epoch leaves out up to num_streams - 1 samples, different ones each time.

    Raises:
        ValueError: where a value is outside its domain.
    """

    shuffle: str = "uniform"  # "none", "uniform" or "block"
    seed: int = 0  # in [0, 2**64)
    block_bytes: int = 16 * MB  # approximate size of a block: whole samples of one file
    shuffle_blocks: int = 64  # pooled at once, over all streams
    num_streams: int = 1  # the world size of the run that began
    exact: bool = False

    def __post_init__(self) -> None:
        if self.shuffle not in ("none", "uniform", "block"):
            raise ValueError(
                f"shuffle: expected 'none', 'uniform' or 'block', got {self.shuffle!r}"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: expected an integer in [0, 2**64), got {self.seed}")
        for name in ("block_bytes", "shuffle_blocks", "num_streams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def pool_blocks(self) -> int:
        """Blocks that one stream pools at once."""
        return max(1, self.shuffle_blocks // self.num_streams)


def epoch_size(num_samples: int, order: Order) -> int:
    """Return the number of samples in an epoch, over all ranks."""
    return num_samples if order.exact else num_samples - num_samples % order.num_streams


def batch_begins(
    size: int, batch_size: int, world_size: int, drop_last: bool = False, samples_done: int = 0
) -> Int64Array:
    """Cut the rest of an epoch into global batches of batch_size * world_size samples.

    The last one may be smaller; `drop_last` leaves it out. If it had fewer samples than there are
    ranks, it takes the missing ones from the batch before, so that every rank has a sample in every
    batch. If that is impossible (no batch before, or batch_size = 1), some ranks' batch is empty.

    Returns:
        Global position where each batch begins, and the end of the last, of an epoch of `size`
        samples that has had `samples_done` of them.
    """
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"expected batch_size and world_size >= 1, got {batch_size}, {world_size}")
    if not 0 <= samples_done <= size:
        raise ValueError(f"samples_done: expected a value in [0, {size}], got {samples_done}")
    global_batch = batch_size * world_size
    num_whole, rest = divmod(size - samples_done, global_batch)
    begins = samples_done + global_batch * np.arange(num_whole + 1, dtype=np.int64)
    if not rest or drop_last:
        return begins
    if rest < world_size and num_whole and batch_size > 1:
        begins[-1] = size - world_size
    return np.append(begins, size)


def epoch_order(index: Index, order: Order, epoch: int, python_blocks: bool = False) -> IntArray:
    """Return the samples of an epoch in global order, over all ranks."""
    begins = np.array([0, epoch_size(len(index), order)], np.int64)
    sequence = sequence_of(index, order, epoch, python_blocks)
    return samples_of_rank(sequence, order, begins, rank=0, world_size=1)[0]


# ---- step 1: one sequence, cut into streams ------------------------------------------------------


class Sequence(NamedTuple):
    """All samples in one sequence, as entries: runs of samples of one block and one stream.

    A uniform permutation is one block, whose samples lie in random order.
    """

    key: int  # of the epoch's random draws
    blocks: Blocks | None  # None: samples are read one by one
    sample: IntArray | None  # samples as they lie in the blocks; None: in the order of the index
    begin: Int64Array  # place in the sequence where each entry begins, and the end of the last
    block: IntArray  # block of each entry
    start: IntArray  # place in `sample` of its first sample
    stream: Int64Array  # first entry of each stream, and the end of the last


def sequence_of(index: Index, order: Order, epoch: int, python_blocks: bool) -> Sequence:
    """Put the samples of an epoch into one sequence, and cut it into streams."""
    size, key = len(index), hash_words(order.seed, epoch)
    dtype = index_dtype(size)
    blocks = None
    if order.shuffle != "uniform":
        blocks = blocks_of(index, order.block_bytes, python_blocks)
        if order.shuffle == "none" and blocks.sample is not None:
            blocks = None  # the index has an order of its own, across the blocks
    if blocks is None:
        sample = None if order.shuffle == "none" else permutation(size, hash_words(key, _UNIFORM))
        block, block_begin = np.zeros(1, dtype), np.array([0, size], dtype)
    else:
        sample, block_begin = blocks.sample, blocks.begin
        num_blocks = len(block_begin) - 1
        if order.shuffle == "block":
            block = permutation(num_blocks, hash_words(key, _BLOCKS))
        else:
            block = np.arange(num_blocks, dtype=dtype)
    # An entry begins where a block begins, and where a stream does.
    begin = np.zeros(len(block) + 1, np.int64)
    np.cumsum(np.diff(block_begin)[block], out=begin[1:])
    cuts = _stream_begins(size, order)
    within = np.unique(cuts)
    within = within[begin[np.searchsorted(begin, within)] != within]
    entry_begin = np.insert(begin, np.searchsorted(begin, within), within)
    entry_begin = entry_begin[: np.searchsorted(entry_begin, cuts[-1]) + 1]
    place = np.searchsorted(begin, entry_begin[:-1], "right") - 1
    start = block_begin[block[place]] + (entry_begin[:-1] - begin[place])
    stream = np.searchsorted(entry_begin, cuts)
    return Sequence(key, blocks, sample, entry_begin, block[place], start.astype(dtype), stream)


def _stream_begins(num_samples: int, order: Order) -> Int64Array:
    """Return the place in the sequence where each stream begins, and the end of the last."""
    share, extra = divmod(num_samples, order.num_streams)
    number = np.arange(order.num_streams + 1, dtype=np.int64)
    return number * share + (np.minimum(number, extra) if order.exact else 0)


# ---- step 2: streams -----------------------------------------------------------------------------


def _stream(sequence: Sequence, order: Order, number: int) -> tuple[IntArray, Int32Array]:
    """Return the samples of a stream in its order, and the entry of each."""
    first, last = sequence.stream[number], sequence.stream[number + 1]
    begin = sequence.begin[first : last + 1] - sequence.begin[first]
    count = np.diff(begin)
    dtype = sequence.start.dtype
    sample = np.repeat(sequence.start[first:last] - begin[:-1].astype(dtype), count)
    sample += np.arange(len(sample), dtype=dtype)
    entry = np.repeat(np.arange(first, last, dtype=np.int32), count)
    if order.shuffle == "block":
        key = hash_words(sequence.key, _POOLS, number)
        mixed = _mixed_runs(begin, entry - np.int32(first), order.pool_blocks, key)
        sample, entry = sample[mixed], entry[mixed]
    if sequence.sample is not None:
        sample = sequence.sample[sample]
    return sample, entry


def _mixed_runs(begin: IntArray, run: Int32Array, pool_blocks: int, key: int) -> IntArray:
    """Return a permutation of range(begin[-1]) that mixes each run with its neighbours.

    Run i is read at time i. A sample of it is delivered at time i + u * w, with u uniform in [0, 1)
    and w = pool_blocks. So samples come from the last pool_blocks runs, and each run is delivered
    evenly while it is in memory. At the start of an epoch w = i + 1, so that the first batch waits
    for two or three blocks only.
    """
    size, num_runs = int(begin[-1]), len(begin) - 1
    place_bits = max(size - 1, 0).bit_length()
    due_bits = 64 - place_bits
    fraction_bits = min(32, due_bits - (2 * num_runs).bit_length())  # due < 2 * num_runs
    width = np.minimum(np.arange(1, num_runs + 1), pool_blocks).astype(np.uint64)
    keys = np.empty(size, np.uint64)
    for part in slices(size):
        place = np.arange(part.start, part.stop, dtype=np.uint64)
        fraction = splitmix(place, key) >> np.uint64(64 - fraction_bits)
        due = run[part].astype(np.uint64) << np.uint64(fraction_bits)
        due += fraction * width[run[part]]
        keys[part] = due << np.uint64(place_bits) | place
    keys.sort()
    keys &= np.uint64((1 << place_bits) - 1)
    return keys.astype(index_dtype(size))


# ---- step 3: ranks -------------------------------------------------------------------------------


def shares(sizes: Int64Array, rank: int, world_size: int) -> Int64Array:
    """Return how many of each global batch's samples go to a rank."""
    return np.maximum(0, -((rank - sizes) // world_size))


def samples_of_rank(
    sequence: Sequence, order: Order, begins: Int64Array, rank: int, world_size: int
) -> tuple[IntArray, Int32Array]:
    """Return a rank's samples in the order of delivery, and the entry of each.

    The rank's global positions rise by world_size in two runs: all global batches but the last,
    and the last, which may begin elsewhere. In a run, every period-th position is of the same
    stream, so the samples of a stream are copied with strides.
    """
    num_streams = order.num_streams
    common = math.gcd(num_streams, world_size)
    period, step = num_streams // common, world_size // common
    last = max(len(begins) - 2, 0)
    copies: dict[int, list[tuple[slice, slice]]] = {}  # of each stream: from where to where
    size = 0
    for begin, end in ((begins[0], begins[last]), (begins[last], begins[-1])):
        number = int(shares(end - begin, rank, world_size))
        for i in range(min(period, number)):
            start, stream = divmod(int(begin) + rank + i * world_size, num_streams)
            stop = start + (number - 1 - i) // period * step + 1
            copy = slice(start, stop, step), slice(size + i, size + number, period)
            copies.setdefault(stream, []).append(copy)
        size += number
    sample, entry = np.empty(size, sequence.start.dtype), np.empty(size, np.int32)
    for stream, parts in copies.items():
        from_sample, from_entry = _stream(sequence, order, stream)
        for source, target in parts:
            sample[target] = from_sample[source]
            entry[target] = from_entry[source]
    return sample, entry
