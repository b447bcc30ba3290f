"""How a source is read on this machine.

`choose_strategy` decides: how the disk is read, by how many readers, what stays in memory. The
Loader and `imagenet-seq info` both ask it, so that a forecast is of what a Loader does.
`open_reading` then opens what the core needs for it. Neither changes the order or the pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from imagenet_seq import native
from imagenet_seq.machine import limits
from imagenet_seq.plan.epoch import reads_blocks
from imagenet_seq.plan.order import Order
from imagenet_seq.plan.schedule import Schedule
from imagenet_seq.read.budget import Budget, ram_budget
from imagenet_seq.read.disk import Disk, choose_disk
from imagenet_seq.read.kept import KeptMemory, open_kept
from imagenet_seq.read.options import ReadOptions
from imagenet_seq.read.speed import Speed, effective, reads_direct, speed_of
from imagenet_seq.read.turns import lock_path

if TYPE_CHECKING:
    from imagenet_seq.index.columns import Index
    from imagenet_seq.index.source import Source


MEASURED_BYTES = 2 * 10**9
"""A disk is measured on data of this size or more: the drive's own memory may hold less."""

WINDOW_SAMPLES = 4096
"""Shared by a node's ranks; two windows are held, 450 MB each for ImageNet. A hard disk reads files
2.9 times as fast in windows as in random order (docs/hard-disk.md)."""

_READ_AHEAD_BYTES = 64 << 20  # beyond what the shuffle itself keeps in memory
_FILE_OVERHEAD_BYTES = 16 * 1024  # approximate overhead per open file
_BLOCK_OVERHEAD_BYTES = 32 * 1024  # per block: partial pages at both ends, rounded to 16 KB
_MEAN_FILE_BYTES = 128 * 1024  # assumed where file sizes are not known; ImageNet's mean is 110 KB
_HEAD_READERS = 2  # the second request waits in the disk's queue; 3 % more than with one
_BLOCK_READERS = 4  # several large requests in flight keep an SSD or a network busy
_FILE_READERS = 2  # one waits for the disk while the other opens the next file
_STATTED_FILES = 64
_KEPT_FLOOR = 16  # blocks are kept only while 1/16 of the machine's memory is still available


@dataclass(frozen=True)
class ReadStrategy:
    """How a source is read."""

    disk: Disk
    speed: Speed | None  # where it was measured
    budget: Budget
    data_bytes: int  # on the disk; of a folder an estimate
    in_blocks: bool  # blocks of many samples are read, not sample by sample
    block_keys: str  # what the keys of a plan's blocks number, in words
    direct: bool  # read past the page cache
    num_readers: int
    window: int  # samples that are read in the order they lie on the disk; 0: none
    reads_on: bool  # the next epoch's first blocks are read before the present one ends
    num_ranks: int  # of this node, which share disk and memory
    notes: tuple[str, ...]  # what the user should know


def choose_strategy(
    source: Source,
    ram: str | int | float | None,
    options: ReadOptions,
    order: Order | None,
    num_ranks: int = 1,
    *,
    measure: bool = True,
) -> ReadStrategy:
    """Decide how a source is read, in this order of an epoch (None: a sampler decides it).

    All `num_ranks` are of this node. With `measure`, a disk whose speed is not known is measured.

    Raises:
        ValueError, TypeError: `ram` is not what it should be.
    """
    index = source.index
    by_blocks = order is not None and reads_blocks(index, order)
    in_blocks = by_blocks and (source.python_blocks or index.length is not None)
    data_bytes = disk_bytes(source)
    files = [os.path.join(index.root, index.files[i]) for i in _spread(len(index.files))]
    disk = _disk_of([*files[:1], index.root], options.disk)
    speed = speed_of(disk, files if measure and data_bytes >= MEASURED_BYTES else [])
    disk = effective(disk, speed)
    budget = ram_budget(ram, data_bytes)
    if source.python_blocks:  # the core does not read them; the page cache may keep their files
        budget = replace(budget, kept_bytes=0, notes=())
    num_readers = _BLOCK_READERS if in_blocks else _FILE_READERS
    if disk.has_one_head:
        num_readers = _HEAD_READERS
    notes = list(budget.notes)
    reads_past_cache = in_blocks and not budget.page_cache
    direct = reads_past_cache if options.direct is None else options.direct
    return ReadStrategy(
        disk=disk,
        speed=speed,
        budget=budget,
        data_bytes=data_bytes,
        in_blocks=in_blocks,
        block_keys=f"blocks of {order.block_bytes}" if order and by_blocks else "samples",
        direct=direct and not source.python_blocks and _can_read_direct(files, notes),
        num_readers=options.num_readers or num_readers,
        window=0 if in_blocks or source.python_blocks else _window(disk, options, num_ranks),
        reads_on=not (budget.page_cache or source.python_blocks),
        num_ranks=num_ranks,
        notes=tuple(notes),
    )


def open_reading(
    source: Source, strategy: ReadStrategy
) -> tuple[native.ReadConfig, tuple[str, ...]]:
    """Open the memory for kept blocks and the disk's lock.

    Returns what the engine is told, and what the user should know.
    """
    if source.python_blocks:
        return native.ReadConfig(), ()
    notes: list[str] = []
    kept = _kept_memory(source, strategy, notes)
    lock = lock_path(strategy.disk)
    if strategy.disk.has_one_head and not lock:
        notes.append(
            "there is no folder for locks, so the processes that read from this hard disk don't "
            "take turns: set IMAGENET_SEQ_LOCKS to a folder that all of them can write to"
        )
    reading = native.ReadConfig(
        num_readers=strategy.num_readers,
        direct=strategy.direct,
        disk_lock=lock,
        kept=kept,
        kept_keys=len(source.index) if kept else 0,
        kept_floor_bytes=limits().total_bytes // _KEPT_FLOOR,
    )
    return reading, tuple(notes)


# ---- the disk ------------------------------------------------------------------------------------


def _window(disk: Disk, options: ReadOptions, num_ranks: int) -> int:
    if options.window is not None:
        return options.window
    return max(256, WINDOW_SAMPLES // num_ranks) if disk.has_one_head else 0


def _disk_of(paths: Sequence[str], wish: str) -> Disk:
    """Return the disk of the first path that exists; reading reports those that don't."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            return choose_disk(path, wish)
    return Disk("unknown", "no such folder", "")


def _can_read_direct(files: Sequence[str], notes: list[str]) -> bool:
    if not files or reads_direct(files[0]):
        return bool(files)
    notes.append(
        f"{files[0]}: O_DIRECT does not work there, so data is read through the page cache: a "
        "little slower from a hard disk, and it displaces what other programs have there"
    )
    return False


# ---- sizes ---------------------------------------------------------------------------------------


def disk_bytes(source: Source) -> int:
    """Return what is read to see every sample once: of python blocks, their files."""
    if source.python_blocks:
        return sum(_sizes(source.index, set(source.index.files)))
    return source_bytes(source)


def source_bytes(source: Source) -> int:
    """Return the bytes of a source's images, estimated where lengths are not known.

    The estimate of a folder comes from some of its files. Of python blocks it is the size of their
    files, which hold little else.
    """
    index = source.index
    known = np.zeros(0, np.int64) if index.length is None else index.length[index.length >= 0]
    if len(known):
        return int(known.sum()) * len(index) // len(known)
    if source.python_blocks:
        return disk_bytes(source)
    sizes = _sizes(index, (index.files[index.file[i]] for i in _spread(len(index))))
    return sum(sizes) * len(index) // max(1, len(sizes))


def num_python_blocks(source: Source) -> int:
    """Return how many blocks a source of python blocks has."""
    return 1 + int(source.index.file.max(initial=0))


def mean_block_bytes(source: Source, block_bytes: int) -> int:
    """Return about how much memory a block takes; a source of python blocks decides that."""
    if not source.python_blocks:
        return block_bytes
    return max(1, source_bytes(source) // num_python_blocks(source))


def blocks_of_pool(source: Source, shuffle_blocks: int, block_bytes: int) -> int:
    """Return how many of a source's blocks a shuffle pools.

    Where the source decides how large its blocks are, as many as take the memory of
    `shuffle_blocks` blocks of `block_bytes`: 64 blocks may be 700 MB (Parquet) or 4 GB (MDS). The
    order of an epoch depends on the result, so it follows from the data and the arguments alone.
    """
    if not source.python_blocks:
        return shuffle_blocks
    return max(1, shuffle_blocks * block_bytes // mean_block_bytes(source, block_bytes))


def _sizes(index: Index, names: Iterable[str]) -> list[int]:
    """Return the sizes of those files that exist; reading reports the others."""
    sizes = []
    for name in names:
        with contextlib.suppress(OSError):
            sizes.append(os.stat(os.path.join(index.root, name)).st_size)
    return sizes


def _spread(size: int) -> Sequence[int]:
    """Return some places that lie evenly in range(size)."""
    number = min(size, _STATTED_FILES)
    return [i * size // number for i in range(number)]


# ---- memory for blocks ---------------------------------------------------------------------------


def block_memory_bytes(source: Source, schedule: Schedule, strategy: ReadStrategy) -> int:
    """Return the bound of the memory of one rank's blocks: those drawn from, those read ahead.

    A block shuffle has a pool, and half as many blocks read ahead of it. Windows are two: one in
    use and one being read.
    """
    order = schedule.order
    if order.shuffle != "block" or (source.index.length is None and not source.python_blocks):
        num_samples = len(source.index)
        mean_bytes = strategy.data_bytes // max(1, num_samples) or _MEAN_FILE_BYTES
        window = min(strategy.window, num_samples)
        return max(_READ_AHEAD_BYTES, 2 * window * (mean_bytes + _FILE_OVERHEAD_BYTES))
    # Global positions go to streams and to ranks in turn, so this many streams meet a rank.
    streams = order.num_streams // math.gcd(order.num_streams, schedule.world_size)
    num_blocks = streams * (order.pool_blocks + max(2, order.pool_blocks // 2))
    return num_blocks * (mean_block_bytes(source, order.block_bytes) + _BLOCK_OVERHEAD_BYTES)


def _kept_memory(source: Source, strategy: ReadStrategy, notes: list[str]) -> KeptMemory | None:
    kept_bytes, num_keys = strategy.budget.kept_bytes, len(source.index)
    if kept_bytes <= 0:
        return None
    # Room is given out in whole pages, and a request begins and ends on one.
    slack = 2 * 4096 * num_keys if kept_bytes >= strategy.data_bytes else 0
    table = native.kept_table_bytes(num_keys)
    key = _kept_key(source, strategy.block_keys)
    memory = open_kept(key, table + kept_bytes + slack, num_ranks=strategy.num_ranks)
    notes += memory.notes
    return memory if memory.size_bytes > table else None


def _kept_key(source: Source, block_keys: str) -> str:
    """Name the kept memory: processes with the same name share it.

    All jobs of a user share that of a pack: its file times identify it, and every process checks
    the checksums itself. A folder's files may change unnoticed, so only the ranks of one job share
    theirs (or what one shell or notebook starts). Processes in different PID namespaces share
    nothing: they can't tell whether the other is still alive.
    """
    root = os.path.realpath(source.index.root)
    stat = os.stat(root)
    with contextlib.suppress(OSError):
        block_keys += f" {os.stat('/proc/self/ns/pid').st_ino}"
    job = ""
    if source.kind != "pack":
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
        job = " ".join([*(os.environ.get(name, "") for name in names), str(os.getppid())])
    place = f"{root} {stat.st_dev} {stat.st_ino} {stat.st_mtime_ns}"
    return f"{place} {source.index.id} {block_keys} {job}"
