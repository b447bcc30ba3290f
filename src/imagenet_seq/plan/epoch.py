"""The plan of an epoch: which blocks are read in which order, which samples are in which batch.

Pure functions from an index and settings to arrays; no file is touched. The order depends on the
index, `Order` and the epoch alone: not on ranks, batch size, position or machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Index, IntArray, Names
from imagenet_seq.plan import order as orders
from imagenet_seq.plan.arrays import Int32Array, Int64Array, changes, gather, index_dtype, slices
from imagenet_seq.plan.blocks import Blocks, is_in_disk_order
from imagenet_seq.plan.order import MB, Order
from imagenet_seq.plan.splitmix import hash_words, mixed

MAX_GAP_BYTES = MB // 8
"""In a sampler's order, neighbours on disk are read together if at most this lies between them: a
hard disk at 180 MB/s passes it in 0.7 ms, while a seek takes 8 ms."""


@dataclass(frozen=True, eq=False)
class EnginePlan:
    """One rank's plan of one epoch: the arrays of `imseq_plan` in core/imagenet_seq.h.

    A position is a place in the rank's order of delivery. Arrays are narrower than `imseq_plan`'s
    where values allow: a position takes 16 bytes (sample, block, offset, length) and 5 more with
    checksums and flags, a block 20. The engine's own copy takes 28 to 33 bytes a position.
    `samples_done` counts the samples of the epoch that all ranks have had before each batch, and
    after the last one; a saved state has this count. Blocks are in the order of reading. A
    `block_key` is the same in all plans with the same index, block_bytes and `reads_blocks`.
    """

    seed: int  # of the epoch's random draws
    epoch: int
    samples_done: Int64Array  # num_batches + 1
    batch_begin: Int64Array  # first position of each batch, and the end of the last
    sample: IntArray  # at each position
    block: Int32Array  # of each position: a place in the block columns
    offset: IntArray  # where it begins in the block, bytes; python block: its ordinal
    length: IntArray  # its bytes; -1: up to the end of the block
    checksum: npt.NDArray[np.uint32] | None  # CRC-32C
    flags: npt.NDArray[np.uint8] | None  # IMSEQ_SAMPLE_...
    block_file: IntArray  # of each block: a place in the paths; -1: python block
    block_offset: IntArray  # where it begins in the file; python block: its number in the source
    block_length: IntArray  # its bytes; -1: up to the end of the file (python_blocks: unknown)
    root: str  # folder that the paths are relative to
    paths: npt.NDArray[np.uint8]  # bytes of the paths of the files used, one after the other
    path_begin: Int64Array  # where each path begins, and the end of the last
    block_key: IntArray  # number of a block; -1: none
    draw: Int64Array | None = None  # takes the sample's place in the key of its random draws
    window_begin: Int64Array | None = None  # first block of each window, and the number of blocks


def reads_blocks(index: Index, order: Order) -> bool:
    """Return whether `rank_plan` reads the blocks of `blocks_of`; `block_key` is then their number.

    Otherwise it reads sample by sample, and `block_key` is the sample.
    """
    if order.shuffle == "none":  # an index that is not in disk order is not read in blocks
        return is_in_disk_order(index)
    return order.shuffle == "block"


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
    """Plan the rest of an epoch for one rank.

    Takes 0.05 to 0.2 s of one core for 1.28 million samples, 0.4 to 5 s for 14 million (a rank of
    eight with blocks, one rank with a uniform permutation of a pack; benchmarks/bench_plan.py).
    `batch_size` is that of this rank; `samples_done` of the epoch were delivered before, over all
    ranks; `drop_last` leaves out a smaller last global batch. `order.num_streams` need not be
    `world_size`.

    Raises:
        ValueError: where an argument is outside its domain.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected a value in [0, {world_size}), got {rank}")
    if epoch < 0:
        raise ValueError(f"epoch: expected a value >= 0, got {epoch}")
    size = orders.epoch_size(len(index), order)
    begins = orders.batch_begins(size, batch_size, world_size, drop_last, samples_done)
    batch_begin = np.zeros(len(begins), np.int64)
    np.cumsum(orders.shares(np.diff(begins), rank, world_size), out=batch_begin[1:])
    sequence = orders.sequence_of(index, order, epoch, python_blocks)
    sample, entry = orders.samples_of_rank(sequence, order, begins, rank, world_size)
    offset, length = _extents(index, sample)
    if sequence.blocks is None:
        file = gather(index.file, sample, np.int32)
        reads = _reads_in_order(sample, file, offset, length, order.block_bytes, python_blocks)
    else:
        reads = _reads_of_blocks(sequence.blocks, sequence.block, entry, offset, python_blocks)
    return _engine_plan(
        index, sample, length, reads, batch_begin, begins, order.seed, epoch, python_blocks
    )


def explicit_plan(
    index: Index,
    sample: npt.ArrayLike,
    batch_begin: npt.ArrayLike,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    block_bytes: int = 16 * MB,
    python_blocks: bool = False,
) -> EnginePlan:
    """Plan the order of a sampler or batch sampler, for the rank that it is for.

    Samples that follow each other both here and on disk, with at most `MAX_GAP_BYTES` between them,
    are read as one block of about block_bytes; every other sample is read alone.

    A sample that comes again, in this order or on another rank, is augmented differently each time:
    samplers that repeat samples (repeated augmentation, weights) are meant that way. `batch_begin`
    has the place in `sample` where each batch begins, and the end of the last.

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
    chosen = chosen.astype(index_dtype(len(index)))
    offset, length = _extents(index, chosen)
    file = index.file[chosen]
    reads = _reads_in_order(chosen, file, offset, length, block_bytes, python_blocks)
    made = _engine_plan(index, chosen, length, reads, begins, begins, seed, epoch, python_blocks)
    return replace(made, draw=_draws(chosen, rank))


def _draws(sample: IntArray, rank: int) -> Int64Array | None:
    """Return `EnginePlan.draw`: the sample itself where it comes first on rank 0."""
    order = np.argsort(sample, kind="stable")
    is_first = np.ones(len(sample), bool)
    is_first[1:] = sample[order[1:]] != sample[order[:-1]]
    if rank == 0 and is_first.all():
        return None
    place = np.arange(len(sample))
    time = np.empty(len(sample), np.int64)  # how often the sample came before
    time[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    # Numbers from 2**62 on: no sample has one of these.
    repeat = mixed(time.astype(np.uint64) ^ np.uint64(hash_words(rank)))
    drawn = mixed(sample.astype(np.uint64) ^ repeat) >> np.uint64(2) | np.uint64(1 << 62)
    return np.where((time == 0) & (rank == 0), sample, drawn.astype(np.int64))


def in_windows(plan: EnginePlan, window_blocks: int) -> EnginePlan:
    """Return the plan with its blocks read in windows, for a random order on a hard disk.

    A window's blocks are sorted by file and offset; the engine then reads them in the order in
    which they lie on the disk. The order of delivery stays the same. Windows grow from 256 blocks,
    so that the first batch does not wait for a whole one.
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


def peak_block_bytes(plan: EnginePlan, unknown_bytes: int = 0) -> int:
    """Return the largest number of bytes of blocks that a plan needs in memory at once.

    A block is needed from its first sample in the order of delivery to its last. One of unknown
    length is taken to have `unknown_bytes`.
    """
    size = len(plan.sample)
    if not size:
        return 0
    first, last = _first_uses(plan.block, len(plan.block_file)), np.empty(len(plan.block_file), int)
    last[plan.block] = np.arange(size)  # of repeated blocks the value assigned last stays
    length = np.where(plan.block_length < 0, unknown_bytes, plan.block_length).astype(np.int64)
    change = np.zeros(size + 1, np.int64)  # every position is the first, or last, of one block only
    change[first] += length
    change[last + 1] -= length
    return int(np.cumsum(change, out=change).max())


# ---- reads ---------------------------------------------------------------------------------------


class _Reads(NamedTuple):
    """The blocks a rank reads, in the order of first use, and where each position's sample lies."""

    block: Int32Array  # of each position: place of its block in file, offset, length and key
    offset_in_block: IntArray
    file: IntArray
    offset: IntArray
    length: IntArray
    key: IntArray


def _extents(index: Index, sample: IntArray) -> tuple[IntArray, IntArray]:
    """Return where the sample of each position lies in its file: offset and length."""
    length = np.broadcast_to(np.int64(-1), len(index)) if index.length is None else index.length
    longest_file = int(index.offset.max(initial=0)) + int(length.max(initial=0))
    dtype = index_dtype(longest_file + 1)
    return gather(index.offset, sample, dtype), gather(length, sample, dtype)


def _reads_of_blocks(
    blocks: Blocks,
    block_of_entry: IntArray,
    entry: Int32Array,
    sample_offset: IntArray,
    python_blocks: bool,
) -> _Reads:
    """Read every entry once, in the order in which first samples are delivered."""
    first = _first_uses(entry, len(block_of_entry))
    used = np.flatnonzero(first < len(entry))
    used = used[np.argsort(first[used])]
    place = np.empty(len(block_of_entry), np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    block = place[entry]
    number = block_of_entry[used]
    offset = blocks.offset[number]
    if not python_blocks:
        sample_offset = sample_offset - offset.astype(sample_offset.dtype)[block]
    return _Reads(block, sample_offset, blocks.file[number], offset, blocks.length[number], number)


def _first_uses(block: Int32Array, num_blocks: int) -> IntArray:
    """Return the first position of each block in `block`; len(block) where it has none."""
    first = np.full(num_blocks, len(block), index_dtype(len(block) + 1))
    # From the last position to the first: where a block repeats, the value assigned last stays.
    first[block[::-1]] = np.arange(len(block) - 1, -1, -1, dtype=first.dtype)
    return first


def _reads_in_order(
    sample: IntArray,
    file: IntArray,
    offset: IntArray,
    length: IntArray,
    block_bytes: int,
    python_blocks: bool,
) -> _Reads:
    """Read neighbours on disk that follow each other together, and other samples alone."""
    begins_read = changes(file)
    if not python_blocks:
        _split_at_gaps(begins_read, offset, length)
    if np.all(begins_read) and not python_blocks:
        alone = np.arange(len(file), dtype=np.int32)
        return _Reads(alone, np.broadcast_to(np.int32(0), len(file)), file, offset, length, sample)
    first = np.flatnonzero(begins_read)
    if not python_blocks:
        run_offset = np.repeat(offset[first], np.diff(np.append(first, len(file))))
        begins_read |= changes((offset - run_offset) // block_bytes)
        first = np.flatnonzero(begins_read)
    block = np.cumsum(begins_read, dtype=np.int32)
    block -= 1
    if python_blocks:
        unknown = np.broadcast_to(np.int32(-1), len(first))
        return _Reads(block, offset, file[first], file[first], unknown, unknown)
    last = np.append(first[1:], len(file)) - 1
    read_length = np.where(length[last] < 0, -1, offset[last] + length[last] - offset[first])
    key = np.where(last == first, sample[first], -1)  # the next epoch has other runs
    return _Reads(
        block, offset - offset[first][block], file[first], offset[first], read_length, key
    )


def _split_at_gaps(begins_read: npt.NDArray[np.bool_], offset: IntArray, length: IntArray) -> None:
    """Begin a read at every sample that does not lie closely behind the one before it."""
    for part in slices(len(begins_read), overlap=1):
        begin, size = offset[part], length[part]
        gap = begin[1:] - begin[:-1] - size[:-1]
        cut = (gap < 0) | (gap > MAX_GAP_BYTES) | (size[1:] < 0) | (size[:-1] < 0)
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
