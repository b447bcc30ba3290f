"""The plan stage: which blocks are read in which order, which samples are in which batch.

Pure functions from an index and settings to arrays; no file is touched. The order of an epoch
depends on the index, on `Order` and on the epoch, and on nothing else: not on ranks, batch size,
position or machine. Three steps:

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Index, Names

Int32Array = npt.NDArray[np.int32]


Int64Array = npt.NDArray[np.int64]


IntArray = npt.NDArray[np.integer[Any]]


MEBIBYTE = 1 << 20


MAX_GAP_BYTES = MEBIBYTE // 8
"""Samples in an order given from outside are read together when at most this lies between them: a
disk that turns at 180 MB/s passes it in 0.7 ms, while a seek takes 8 ms."""


_SLICE = 1 << 16
"""Elements handled at once, so that temporary arrays stay in the processor's cache."""


@dataclass(frozen=True)
class Order:
    """What decides the order of an epoch besides the index and the epoch's number.

    Args:
        shuffle: "none", "uniform" (a permutation of all samples) or "block" (blocks in random
            order, the samples drawn from a pool of the last blocks).
        seed: in [0, 2**64).
        block_bytes: bytes of a block, about; a block holds whole samples of one file.
        shuffle_blocks: blocks pooled at once, over all streams.
        num_streams: runs that the epoch is cut into: the world size of the run that began.
        exact: whether an epoch has every sample exactly once. Otherwise all streams have the same
            size, and up to num_streams - 1 samples are left over, others in each epoch.

    Raises:
        ValueError: where a value is outside its domain.
    """

    shuffle: str = "uniform"
    seed: int = 0
    block_bytes: int = 16 * MEBIBYTE
    shuffle_blocks: int = 64
    num_streams: int = 1
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


@dataclass(frozen=True, eq=False)
class EnginePlan:
    """One rank's work of one epoch: the arrays of `imseq_plan` in core/imagenet_seq.h.

    A position is a place in the rank's order of delivery. Arrays are narrower than `imseq_plan`'s
    where values allow: a position takes 16 bytes (sample, block, offset, length) and 5 more with
    checksums and flags, a block 20. The engine's own copy takes 28 to 33 bytes a position.

    Attributes:
        seed: seed of the epoch's random draws.
        epoch: number of the epoch.
        samples_done: samples of the epoch that all ranks have had before each batch, and after the
            last one (int64, num_batches + 1); what a saved state counts.
        batch_begin: first position of each batch, and the end of the last (int64, num_batches + 1).
        sample: sample at each position.
        block: its block, a place in the block columns.
        offset: where it begins in the block, bytes; python block: its ordinal.
        length: its bytes; -1: up to the end of the block.
        checksum: CRC-32C, or None.
        flags: IMSEQ_SAMPLE_..., or None.
        block_file: file of each block, a place in the paths; -1: python block. In the order of reading.
        block_offset: where it begins in the file, bytes; python block: its number in the source.
        block_length: its bytes; -1: up to the end of the file (python_blocks: unknown).
        root: folder that the paths are relative to.
        paths: bytes of the paths of the files used, one after the other (uint8).
        path_begin: where each path begins, and the end of the last (int64, num_files + 1).
        draw: what stands for the sample in the key of its random draws; None: the sample.
        block_key: names a block's bytes in all plans of one index and block_bytes that agree in
            `reads_blocks`; -1: none.
        window_begin: first block of each window, and the number of blocks; None: no windows.
    """

    seed: int
    epoch: int
    samples_done: Int64Array
    batch_begin: Int64Array
    sample: IntArray
    block: Int32Array
    offset: IntArray
    length: IntArray
    checksum: npt.NDArray[np.uint32] | None
    flags: npt.NDArray[np.uint8] | None
    block_file: IntArray
    block_offset: IntArray
    block_length: IntArray
    root: str
    paths: npt.NDArray[np.uint8]
    path_begin: Int64Array
    block_key: IntArray
    draw: Int64Array | None = None
    window_begin: Int64Array | None = None


class Blocks(NamedTuple):
    """The blocks of an index in the order they lie on disk.

    Attributes:
        begin: place in `sample` of the first sample of each block, and the end (num_blocks + 1).
        sample: all samples as they lie on disk; None where that is the order of the index.
        file: file of each block (python_blocks: number of the block).
        offset: byte where it begins in the file.
        length: bytes; -1: unknown, up to the end of the file.
    """

    begin: IntArray
    sample: IntArray | None
    file: Int32Array
    offset: Int64Array
    length: IntArray


# ---- what callers use ----------------------------------------------------------------------------


def epoch_size(num_samples: int, order: Order) -> int:
    """Return the number of samples in an epoch, over all ranks."""
    return num_samples if order.exact else num_samples - num_samples % order.num_streams


def batch_begins(
    size: int, batch_size: int, world_size: int, drop_last: bool = False, samples_done: int = 0
) -> Int64Array:
    """Cut what is left of an epoch into global batches of batch_size * world_size samples.

    The last one may be smaller; `drop_last` leaves it out. Where it had fewer samples than there
    are ranks, it takes the missing ones from the batch before, so that every rank has something in
    every batch. Only where that can't be (no batch before, or batch_size = 1) a batch is empty.

    Args:
        size: samples in the epoch (`epoch_size`).
        batch_size: samples of one rank in a batch.
        world_size: number of ranks.
        drop_last: whether to leave out a smaller last batch.
        samples_done: samples the epoch has already had.

    Returns:
        int64 array: global position where each batch begins, and the end of the last.
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


def blocks_of(index: Index, block_bytes: int, python_blocks: bool = False) -> Blocks:
    """Cut the files of an index into blocks: runs of whole samples, about block_bytes long.

    A file is cut into cells of equal size, at most block_bytes; a block is what begins in a cell. A
    sample longer than block_bytes, or of unknown length, is a block of its own. What lies between
    samples of a block (headers of a tar) is part of it. Takes 0.3 s for 14 million samples.
    """
    sample = None if _is_in_disk_order(index) else _disk_order(index)
    file = index.file if sample is None else index.file[sample]
    if python_blocks:
        return _python_blocks(index, sample, file)
    offset = index.offset if sample is None else index.offset[sample]
    if index.length is None:
        unknown = np.broadcast_to(np.int32(-1), len(file))
        return Blocks(np.arange(len(file) + 1, dtype=np.int32), sample, file, offset, unknown)
    length = index.length if sample is None else index.length[sample]
    begin = _block_begins(file, offset, length, block_bytes)
    first, last = begin[:-1], begin[1:] - 1
    block_length = np.where(length[last] < 0, -1, offset[last] + length[last] - offset[first])
    return Blocks(begin, sample, file[first], offset[first], block_length)


def reads_blocks(index: Index, order: Order) -> bool:
    """Tell whether `rank_plan` reads the blocks of `blocks_of`, and its `block_key` numbers those.

    Otherwise it reads sample by sample, and `block_key` is the sample.
    """
    if order.shuffle == "none":  # an index in an order of its own goes across the blocks
        return _is_in_disk_order(index)
    return order.shuffle == "block"


def epoch_order(index: Index, order: Order, epoch: int, python_blocks: bool = False) -> IntArray:
    """Return the samples of an epoch in global order: what all ranks together deliver."""
    begins = np.array([0, epoch_size(len(index), order)], np.int64)
    return _deal(
        _sequence(index, order, epoch, python_blocks), order, begins, rank=0, world_size=1
    )[0]


def rank_plan(
    index: Index,
    order: Order,
    epoch: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    samples_done: int = 0,
    python_blocks: bool = False,
) -> EnginePlan:
    """Plan what is left of an epoch for one rank.

    Takes 0.05 to 0.2 s of one core for 1.28 million samples, 0.4 to 5 s for 14 million (a rank of
    eight with blocks, one rank with a uniform permutation of a pack; benchmarks/bench_plan.py).

    Args:
        index: the dataset.
        order: what decides the order; its `num_streams` need not be `world_size`.
        epoch: number of the epoch, from 0.
        batch_size: samples of this rank in a batch.
        rank: number of this rank.
        world_size: number of ranks.
        drop_last: whether to leave out a smaller last global batch.
        samples_done: samples of the epoch that all ranks together have already had.
        python_blocks: `Source.python_blocks`.

    Raises:
        ValueError: where an argument is outside its domain.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected a value in [0, {world_size}), got {rank}")
    if epoch < 0:
        raise ValueError(f"epoch: expected a value >= 0, got {epoch}")
    size = epoch_size(len(index), order)
    begins = batch_begins(size, batch_size, world_size, drop_last, samples_done)
    batch_begin = np.zeros(len(begins), np.int64)
    np.cumsum(_shares(np.diff(begins), rank, world_size), out=batch_begin[1:])
    sequence = _sequence(index, order, epoch, python_blocks)
    sample, entry = _deal(sequence, order, begins, rank, world_size)
    extents = _extents(index, sample)
    if sequence.blocks is None:
        file = _gather(index.file, sample, np.int32)
        reads = _reads_in_order(sample, file, extents, order.block_bytes, python_blocks)
    else:
        reads = _reads_of_blocks(sequence.blocks, sequence.block, entry, extents, python_blocks)
    return _engine_plan(
        index, sample, extents.length, reads, batch_begin, begins, order.seed, epoch, python_blocks
    )


def explicit_plan(
    index: Index,
    sample: npt.ArrayLike,
    batch_begin: npt.ArrayLike,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    block_bytes: int = 16 * MEBIBYTE,
    python_blocks: bool = False,
) -> EnginePlan:
    """Plan an order given from outside (a sampler's or batch sampler's), for the rank that asked.

    Samples that follow each other on disk as in the order, with at most `MAX_GAP_BYTES` between
    them, are read as one block of about block_bytes; every other sample is read alone.

    A sample that comes again, in this order or on another rank, is drawn differently each time, as
    samplers that repeat samples (repeated augmentation, weights) mean it.

    Args:
        index: the dataset.
        sample: samples in the order of delivery; may repeat.
        batch_begin: place in `sample` where each batch begins, and the end of the last.
        seed: seed of the epoch's random draws.
        epoch: number of the epoch.
        rank: number of this rank.
        block_bytes: bytes of a block, about.
        python_blocks: `Source.python_blocks`.

    Raises:
        ValueError: where `batch_begin` does not rise from 0 to the number of samples.
        IndexError: where a sample is not in the index.
    """
    chosen, begins = np.asarray(sample), np.asarray(batch_begin, np.int64)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise TypeError(f"expected a list of sample numbers, got {chosen.dtype} {chosen.shape}")
    if chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(index):
        raise IndexError(
            f"expected samples in [0, {len(index)}), got {chosen.min()} to {chosen.max()}"
        )
    if not len(begins) or begins[0] or begins[-1] != len(chosen) or np.any(np.diff(begins) < 0):
        raise ValueError(f"batch_begin: expected to rise from 0 to {len(chosen)}, got {begins}")
    chosen = chosen.astype(_index_dtype(len(index)))
    extents = _extents(index, chosen)
    reads = _reads_in_order(chosen, index.file[chosen], extents, block_bytes, python_blocks)
    made = _engine_plan(
        index, chosen, extents.length, reads, begins, begins, seed, epoch, python_blocks
    )
    return replace(made, draw=_draws(chosen, rank))


def in_windows(plan: EnginePlan, window_blocks: int) -> EnginePlan:
    """Return the plan with its blocks read in windows: what one hard disk wants of a random order.

    The blocks of a window are put into the order of files and offsets; the engine then reads them
    in the order in which they lie on the disk. What is delivered, and in which order, stays.
    Windows grow from 256 blocks, so that the first batch does not wait for a whole one.

    Args:
        plan: a plan of samples that are read one by one.
        window_blocks: blocks of a window, at most.
    """
    num_blocks = len(plan.block_file)
    ramp = [1 << i for i in range(8, 63) if 1 << i < window_blocks]
    begins = np.cumsum([0, *ramp])
    steady = np.arange(begins[-1] + window_blocks, num_blocks, window_blocks)
    begins = np.concatenate([begins[begins < num_blocks], steady, [num_blocks]]).astype(np.int64)
    order = np.empty(num_blocks, np.int32)
    for first, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        keys = plan.block_offset[first:end], plan.block_file[first:end]
        order[first:end] = first + np.lexsort(keys)
    place = np.empty(num_blocks, np.int32)
    place[order] = np.arange(num_blocks, dtype=np.int32)
    return replace(
        plan,
        block=place[plan.block],
        block_file=plan.block_file[order],
        block_offset=plan.block_offset[order],
        block_length=plan.block_length[order],
        block_key=plan.block_key[order],
        window_begin=begins,
    )


def _draws(sample: IntArray, rank: int) -> Int64Array | None:
    """Return what stands for each sample in its key: itself where it comes first on rank 0."""
    order = np.argsort(sample, kind="stable")
    is_first = np.ones(len(sample), bool)
    is_first[1:] = sample[order[1:]] != sample[order[:-1]]
    if rank == 0 and is_first.all():
        return None
    place = np.arange(len(sample))
    time = np.empty(len(sample), np.int64)  # how often the sample has come before
    time[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    # Numbers from 2**62 on, where no sample is.
    mixed = _mixed(
        sample.astype(np.uint64) ^ _mixed(time.astype(np.uint64) ^ np.uint64(_key(rank)))
    )
    drawn = (mixed >> np.uint64(2) | np.uint64(1 << 62)).astype(np.int64)
    return np.where((time == 0) & (rank == 0), sample, drawn)


def peak_block_bytes(plan: EnginePlan, unknown_bytes: int = 0) -> int:
    """Return the most bytes of blocks that a plan needs in memory at once.

    A block is needed from its first sample in the order of delivery to its last.

    Args:
        plan: the plan.
        unknown_bytes: what to count for a block of unknown length.
    """
    size = len(plan.sample)
    if not size:
        return 0
    first, last = _first_uses(plan.block, len(plan.block_file)), np.empty(len(plan.block_file), int)
    last[plan.block] = np.arange(size)  # where a block repeats, the last value stays
    length = np.where(plan.block_length < 0, unknown_bytes, plan.block_length).astype(np.int64)
    change = np.zeros(size + 1, np.int64)  # every position is the first, or last, of one block only
    change[first] += length
    change[last + 1] -= length
    return int(np.cumsum(change, out=change).max())


# ---- step 1: one sequence, cut into streams ------------------------------------------------------


class _Sequence(NamedTuple):
    """All samples in one sequence, as entries: runs of samples of one block and one stream.

    A uniform permutation is one block, the samples of which lie in random order.
    """

    key: int  # of the epoch's random draws
    blocks: Blocks | None  # None: samples are read one by one
    sample: IntArray | None  # samples as they lie in the blocks; None: in the order of the index
    begin: Int64Array  # place in the sequence where each entry begins, and the end of the last
    block: IntArray  # block of each entry
    start: IntArray  # place in `sample` of its first sample
    stream: Int64Array  # first entry of each stream, and the end of the last


def _sequence(index: Index, order: Order, epoch: int, python_blocks: bool) -> _Sequence:
    size, key = len(index), _key(order.seed, epoch)
    dtype = _index_dtype(size)
    blocks = None
    if order.shuffle != "uniform":
        blocks = blocks_of(index, order.block_bytes, python_blocks)
        if order.shuffle == "none" and blocks.sample is not None:
            blocks = None  # the index has an order of its own, across the blocks
    if blocks is None:
        sample = None if order.shuffle == "none" else _permutation(size, _key(key, _UNIFORM))
        block, block_begin = np.zeros(1, dtype), np.array([0, size], dtype)
    else:
        sample, block_begin = blocks.sample, blocks.begin
        num_blocks = len(block_begin) - 1
        if order.shuffle == "block":
            block = _permutation(num_blocks, _key(key, _BLOCKS))
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
    return _Sequence(key, blocks, sample, entry_begin, block[place], start.astype(dtype), stream)


def _stream_begins(num_samples: int, order: Order) -> Int64Array:
    """Return the place in the sequence where each stream begins, and the end of the last."""
    share, extra = divmod(num_samples, order.num_streams)
    number = np.arange(order.num_streams + 1, dtype=np.int64)
    return number * share + (np.minimum(number, extra) if order.exact else 0)


_MASK = (1 << 64) - 1


_GOLDEN = 0x9E3779B97F4A7C15


_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


_UNIFORM, _BLOCKS, _POOLS = 1, 2, 3
"""What a random draw is for: part of its key, so that no two purposes share draws."""


def _key(*words: int) -> int:
    """Hash integers into a 64-bit key, by the mixing function of SplitMix64."""
    key = 0
    for word in words:
        key = ((key ^ word) + _GOLDEN) & _MASK
        key = ((key ^ key >> 30) * _FACTORS[0]) & _MASK
        key = ((key ^ key >> 27) * _FACTORS[1]) & _MASK
        key ^= key >> 31
    return key


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix each word as `_key` does."""
    key = words + np.uint64(_GOLDEN)
    key = (key ^ key >> np.uint64(30)) * np.uint64(_FACTORS[0])
    key = (key ^ key >> np.uint64(27)) * np.uint64(_FACTORS[1])
    return key ^ key >> np.uint64(31)


def _permutation(size: int, key: int) -> IntArray:
    """Return the places 0 to size, sorted by random numbers that have the place as low bits."""
    low = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    keys = np.empty(size, np.uint64)
    for part in _slices(size):
        place = np.arange(part.start, part.stop, dtype=np.uint64)
        keys[part] = (_splitmix(place, key) & ~low) | place
    keys.sort()
    keys &= low
    return keys.astype(_index_dtype(size))


def _splitmix(place: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Return outputs of the SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014).

    Output i of the generator seeded with `key` belongs to place i. We don't use numpy.random, whose
    streams may change between versions.
    """
    mixed = (place + np.uint64(1)) * np.uint64(_GOLDEN)
    mixed += np.uint64(key)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


# ---- step 2: streams -----------------------------------------------------------------------------


def _stream(sequence: _Sequence, order: Order, number: int) -> tuple[IntArray, Int32Array]:
    """Return the samples of a stream in its order, and the entry of each."""
    first, last = sequence.stream[number], sequence.stream[number + 1]
    begin = sequence.begin[first : last + 1] - sequence.begin[first]
    count = np.diff(begin)
    dtype = sequence.start.dtype
    sample = np.repeat(sequence.start[first:last] - begin[:-1].astype(dtype), count)
    sample += np.arange(len(sample), dtype=dtype)
    entry = np.repeat(np.arange(first, last, dtype=np.int32), count)
    if order.shuffle == "block":
        key = _key(sequence.key, _POOLS, number)
        mixed = _mixed_runs(begin, entry - np.int32(first), order.pool_blocks, key)
        sample, entry = sample[mixed], entry[mixed]
    if sequence.sample is not None:
        sample = sequence.sample[sample]
    return sample, entry


def _mixed_runs(begin: IntArray, run: Int32Array, pool_blocks: int, key: int) -> IntArray:
    """Return the places 0 to begin[-1], runs one after the other, mixed over `pool_blocks` of them.

    While runs are read at times 0, 1, 2, ..., a sample of run i is due at i + u * w, with u uniform
    in [0, 1) and w = pool_blocks: so at any time samples come from the last pool_blocks runs, each
    of which is given out evenly, as long as it is held. At the begin of an epoch w = i + 1, so that
    the first batch waits for two or three blocks and not for many.

    Args:
        begin: place where each run begins, and the end of the last.
        run: run of each place.
        pool_blocks: runs held at once, at most.
        key: of the random draws.
    """
    size, num_runs = int(begin[-1]), len(begin) - 1
    place_bits = max(size - 1, 0).bit_length()
    due_bits = 64 - place_bits
    fraction_bits = min(32, due_bits - (2 * num_runs).bit_length())  # due < 2 * num_runs
    width = np.minimum(np.arange(1, num_runs + 1), pool_blocks).astype(np.uint64)
    keys = np.empty(size, np.uint64)
    for part in _slices(size):
        place = np.arange(part.start, part.stop, dtype=np.uint64)
        fraction = _splitmix(place, key) >> np.uint64(64 - fraction_bits)
        due = run[part].astype(np.uint64) << np.uint64(fraction_bits)
        due += fraction * width[run[part]]
        keys[part] = due << np.uint64(place_bits) | place
    keys.sort()
    keys &= np.uint64((1 << place_bits) - 1)
    return keys.astype(_index_dtype(size))


# ---- step 3: ranks -------------------------------------------------------------------------------


def _shares(sizes: Int64Array, rank: int, world_size: int) -> Int64Array:
    """Return how many of each global batch's samples go to a rank."""
    return np.maximum(0, -((rank - sizes) // world_size))


def _deal(
    sequence: _Sequence, order: Order, begins: Int64Array, rank: int, world_size: int
) -> tuple[IntArray, Int32Array]:
    """Return a rank's samples in the order of delivery, and the entry of each.

    The rank's global positions rise by world_size in two runs: all global batches but the last,
    and the last, which may begin elsewhere. In a run, every period-th position is of the same
    stream, so a stream is dealt by strided copies.
    """
    num_streams = order.num_streams
    common = math.gcd(num_streams, world_size)
    period, step = num_streams // common, world_size // common
    last = max(len(begins) - 2, 0)
    copies: dict[int, list[tuple[slice, slice]]] = {}  # of each stream: from where to where
    size = 0
    for begin, end in ((begins[0], begins[last]), (begins[last], begins[-1])):
        number = int(_shares(end - begin, rank, world_size))
        for i in range(min(period, number)):
            start, stream = divmod(int(begin) + rank + i * world_size, num_streams)
            stop = start + (number - 1 - i) // period * step + 1
            copy = slice(start, stop, step), slice(size + i, size + number, period)
            copies.setdefault(stream, []).append(copy)
        size += number
    sample, entry = np.empty(size, sequence.start.dtype), np.empty(size, np.int32)
    for stream, slices in copies.items():
        from_sample, from_entry = _stream(sequence, order, stream)
        for source, target in slices:
            sample[target] = from_sample[source]
            entry[target] = from_entry[source]
    return sample, entry


# ---- blocks --------------------------------------------------------------------------------------


def _is_in_disk_order(index: Index) -> bool:
    for part in _slices(len(index), overlap=1):
        file, offset = index.file[part], index.offset[part]
        rises = file[1:] > file[:-1]
        rises |= (file[1:] == file[:-1]) & (offset[1:] >= offset[:-1])
        if not rises.all():
            return False
    return True


def _disk_order(index: Index) -> IntArray:
    return np.lexsort((index.offset, index.file)).astype(_index_dtype(len(index)))


def _python_blocks(index: Index, sample: IntArray | None, file: Int32Array) -> Blocks:
    first = np.flatnonzero(_changes(file)).astype(_index_dtype(len(file)))
    begin = np.append(first, len(file)).astype(first.dtype)
    length = np.broadcast_to(np.int32(-1), len(first))
    return Blocks(begin, sample, file[first], file[first].astype(np.int64), length)


def _block_begins(
    file: Int32Array, offset: Int64Array, length: Int64Array, block_bytes: int
) -> IntArray:
    """Return where each block begins among samples in disk order, and the end of the last."""
    begins_block = _changes(file)
    first = np.flatnonzero(begins_block)
    last = np.append(first[1:], len(file))[: len(first)] - 1
    file_begin = offset[first]
    span = np.maximum(1, offset[last] + np.maximum(0, length[last]) - file_begin)
    cell_bytes = -(-span // -(-span // block_bytes))
    file_run, cell, alone = -1, -1, True  # of the sample before
    for part in _slices(len(file)):
        runs = np.cumsum(begins_block[part]) + file_run
        cells = (offset[part] - file_begin[runs]) // cell_bytes[runs]
        are_alone = (length[part] > block_bytes) | (length[part] < 0)
        begins_block[part] |= cells != np.concatenate([[cell], cells[:-1]])
        begins_block[part] |= are_alone | np.concatenate([[alone], are_alone[:-1]])
        file_run, cell, alone = runs[-1], cells[-1], are_alone[-1]
    begin = np.flatnonzero(begins_block)
    return np.append(begin, len(file)).astype(_index_dtype(len(file)))


# ---- reads ---------------------------------------------------------------------------------------


class _Extents(NamedTuple):
    """Where the sample of each position lies in its file."""

    offset: IntArray
    length: IntArray


class _Reads(NamedTuple):
    """What a rank reads, in the order of first use, and where in it each position's sample lies."""

    block: Int32Array  # of each position: the place of its read in the other columns
    offset_in_block: IntArray
    file: IntArray
    offset: IntArray
    length: IntArray
    key: IntArray


def _extents(index: Index, sample: IntArray) -> _Extents:
    length = np.broadcast_to(np.int64(-1), len(index)) if index.length is None else index.length
    longest_file = int(index.offset.max(initial=0)) + int(length.max(initial=0))
    dtype = _index_dtype(longest_file + 1)
    return _Extents(_gather(index.offset, sample, dtype), _gather(length, sample, dtype))


def _reads_of_blocks(
    blocks: Blocks,
    block_of_entry: IntArray,
    entry: Int32Array,
    extents: _Extents,
    python_blocks: bool,
) -> _Reads:
    """Read every entry once, when its first sample is wanted."""
    first = _first_uses(entry, len(block_of_entry))
    used = np.flatnonzero(first < len(entry))
    used = used[np.argsort(first[used])]
    place = np.empty(len(block_of_entry), np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    block = place[entry]
    number = block_of_entry[used]
    offset = blocks.offset[number]
    offset_in_block = extents.offset
    if not python_blocks:
        offset_in_block = offset_in_block - offset.astype(offset_in_block.dtype)[block]
    return _Reads(
        block, offset_in_block, blocks.file[number], offset, blocks.length[number], number
    )


def _first_uses(block: Int32Array, num_blocks: int) -> IntArray:
    """Return the first position that each block is used at; len(block) where it never is."""
    first = np.full(num_blocks, len(block), _index_dtype(len(block) + 1))
    # Assigned from the last position to the first: where a block repeats, the last value stays.
    first[block[::-1]] = np.arange(len(block) - 1, -1, -1, dtype=first.dtype)
    return first


def _reads_in_order(
    sample: IntArray, file: IntArray, extents: _Extents, block_bytes: int, python_blocks: bool
) -> _Reads:
    """Read every sample alone, but neighbours on disk that follow each other in one go."""
    offset, length = extents
    begins_read = _changes(file)
    if not python_blocks:
        _split_at_gaps(begins_read, extents)
    if np.all(begins_read) and not python_blocks:
        alone = np.arange(len(file), dtype=np.int32)
        return _Reads(alone, np.broadcast_to(np.int32(0), len(file)), file, offset, length, sample)
    first = np.flatnonzero(begins_read)
    if not python_blocks:
        run_offset = np.repeat(offset[first], np.diff(np.append(first, len(file))))
        begins_read |= _changes((offset - run_offset) // block_bytes)
        first = np.flatnonzero(begins_read)
    block = np.cumsum(begins_read, dtype=np.int32)
    block -= 1
    if python_blocks:
        unknown = np.broadcast_to(np.int32(-1), len(first))
        return _Reads(block, offset, file[first], file[first], unknown, unknown)
    last = np.append(first[1:], len(file)) - 1
    read_length = np.where(length[last] < 0, -1, offset[last] + length[last] - offset[first])
    key = np.where(last == first, sample[first], -1)  # a run of neighbours is another one next time
    return _Reads(
        block, offset - offset[first][block], file[first], offset[first], read_length, key
    )


def _split_at_gaps(begins_read: npt.NDArray[np.bool_], extents: _Extents) -> None:
    """Begin a read where a sample does not lie closely behind the one before it."""
    for part in _slices(len(begins_read), overlap=1):
        offset, length = extents.offset[part], extents.length[part]
        gap = offset[1:] - offset[:-1] - length[:-1]
        cut = (gap < 0) | (gap > MAX_GAP_BYTES) | (length[1:] < 0) | (length[:-1] < 0)
        begins_read[part.start + 1 : part.stop] |= cut


def _engine_plan(
    index: Index,
    sample: IntArray,
    length: IntArray,
    reads: _Reads,
    batch_begin: Int64Array,
    samples_done: Int64Array,
    seed: int,
    epoch: int,
    python_blocks: bool,
) -> EnginePlan:
    files = Names.from_strings(())
    block_file: IntArray = np.broadcast_to(np.int32(-1), len(reads.file))
    if not python_blocks:
        files, block_file = _files_used(index.files, reads.file)
    first, end = files.begin[0], files.begin[-1]
    return EnginePlan(
        seed=seed,
        epoch=epoch,
        samples_done=samples_done,
        batch_begin=batch_begin,
        sample=sample,
        block=reads.block,
        offset=reads.offset_in_block,
        length=length,
        checksum=None if index.checksum is None else index.checksum[sample],
        flags=None if index.flags is None else index.flags[sample],
        block_file=block_file,
        block_offset=reads.offset,
        block_length=reads.length,
        root=index.root,
        paths=files.blob[first:end],
        path_begin=files.begin - first if first else files.begin,
        block_key=reads.key,
    )


def _files_used(files: Names, file: IntArray) -> tuple[Names, IntArray]:
    """Return the names of the files that are used, and the new number of each of `file`."""
    is_used = np.zeros(len(files), bool)
    is_used[file] = True
    if is_used.all():
        return files, file
    number = np.cumsum(is_used, dtype=np.int32)
    number -= 1
    return files.take(np.flatnonzero(is_used)), number[file]


# ---- arrays --------------------------------------------------------------------------------------


def _index_dtype(size: int) -> type[np.signedinteger[Any]]:
    return np.int32 if size < 1 << 31 else np.int64


def _slices(size: int, overlap: int = 0) -> Iterator[slice]:
    """Cut range(size) into slices; each also has the last `overlap` elements of the one before."""
    for first in range(0, size, _SLICE):
        yield slice(max(0, first - overlap), min(first + _SLICE, size))


def _changes(values: IntArray) -> npt.NDArray[np.bool_]:
    """Return for each element whether it differs from the one before; True for the first."""
    result = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=result[1:])
    return result


def _gather(column: IntArray, chosen: IntArray, dtype: type[np.signedinteger[Any]]) -> IntArray:
    """Return column[chosen] as dtype; without memory where all elements are one and the same."""
    if column.strides == (0,) and len(column):
        return np.broadcast_to(column[:1].astype(dtype), len(chosen))
    gathered: IntArray = np.empty(len(chosen), dtype)
    for part in _slices(len(chosen)):
        gathered[part] = column[chosen[part]]
    return gathered
