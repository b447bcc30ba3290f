"""The read stage on Python's side: how a source is read on this machine.

The core reads (``core/read.cpp``, ``core/engine.cpp``). Decided here, once a loader: on which disk
the data lies, how many readers there are and whether they take turns, what goes past the page
cache, and which memory keeps blocks. Nothing of it touches the order or the pixels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from imagenet_seq import native
from imagenet_seq.machine import limits
from imagenet_seq.read.budget import Budget, ram_budget
from imagenet_seq.read.disk import Disk, choose_disk
from imagenet_seq.read.kept import KeptMemory, open_kept
from imagenet_seq.read.speed import Speed, effective, reads_direct, speed_of
from imagenet_seq.read.turns import lock_path

if TYPE_CHECKING:
    from imagenet_seq.index.columns import Index
    from imagenet_seq.index.source import Source


MEASURED_BYTES = 2 * 10**9
"""A disk is measured on data of this size: less may lie in the drive's own memory."""


WINDOW_SAMPLES = 4096
"""Of all ranks of a node: 450 MB of ImageNet, twice. Of 1.28 million files in random order, a hard
disk read those of windows 2.9 times as fast as torchvision asked for them (docs/hard-disk.md)."""


_HEAD_READERS = 2  # the second request waits in the disk's queue; 3 % more than with one


_BLOCK_READERS = 4  # several large requests in flight keep an SSD or a network busy


_FILE_READERS = 2  # threads that read small files: one waits for the disk while one opens the next


_STATTED_FILES = 64


_KEPT_FLOOR = 16  # blocks are kept only while 1/16 of the machine's memory is still available


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; None, "auto": what suits the disk and the memory.

    Attributes:
        ram: see `Loader`.
        disk: see `Loader`.
        num_readers: see `Loader`.
        direct: see `Loader`.
        window: see `Loader`.
    """

    ram: str | int | float | None = "auto"
    disk: str = "auto"
    num_readers: int | None = None
    direct: bool | None = None
    window: int | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError where a wish is not what it should be."""
        ram_budget(self.ram, dataset_bytes=0)
        choose_disk(os.sep, self.disk)


@dataclass
class Reading:
    """How a source is read.

    Attributes:
        disk: what the source lies on.
        speed: of the disk, where it was measured.
        budget: what stays in memory.
        data_bytes: bytes of the source's images; of a folder an estimate.
        native: what the engine is told.
        window: samples that are read in the order they lie on the disk; 0: none.
        reads_on: whether the next epoch's first blocks are read before the present one ends.
        num_ranks: ranks of this node.
        notes: what the user should know.
    """

    disk: Disk
    speed: Speed | None
    budget: Budget
    data_bytes: int
    native: native.ReadConfig
    window: int
    reads_on: bool
    num_ranks: int = 1
    notes: list[str] = field(default_factory=list)


def arrange(
    source: Source, wishes: Wishes, *, in_blocks: bool, units: str, num_ranks: int
) -> Reading:
    """Decide how a source is read.

    Args:
        source: the data.
        wishes: what the user asked for.
        in_blocks: whether it is read in blocks of many samples, not sample by sample.
        units: says what the keys of a plan's blocks number.
        num_ranks: ranks of this node, which share disk and memory.

    Raises:
        ValueError, TypeError: a wish is not what it should be.
    """
    if source.python_blocks:
        return _of_python_blocks(source, wishes)
    index = source.index
    data_bytes = source_bytes(source)
    files = some_files(index)
    where = disk_of([*files[:1], index.root], wishes.disk)
    speed = speed_of(where, files if data_bytes >= MEASURED_BYTES else [])
    if wishes.disk == "auto":
        where = effective(where, speed)
    budget = ram_budget(wishes.ram, data_bytes)
    notes = list(budget.notes)
    direct = _is_direct(wishes, budget, files, in_blocks, notes)
    kept = _kept_memory(source, budget, data_bytes, units, num_ranks, notes)
    lock = lock_path(where)
    if where.has_one_head and not lock:
        notes.append(
            "there is no folder for locks, so the processes that read from this hard disk don't "
            "take turns: set IMAGENET_SEQ_LOCKS to a folder that all of them can write to"
        )
    window = 0
    if not in_blocks and where.has_one_head:
        window = max(256, WINDOW_SAMPLES // num_ranks)
    if wishes.window is not None and not in_blocks:
        window = wishes.window
    told = native.ReadConfig(
        num_readers=wishes.num_readers or num_readers(where, in_blocks),
        direct=direct,
        disk_lock=lock,
        kept=kept,
        kept_keys=len(index) if kept else 0,
        kept_floor_bytes=limits().total_bytes // _KEPT_FLOOR,
    )
    reads_on = not budget.page_cache
    return Reading(where, speed, budget, data_bytes, told, window, reads_on, num_ranks, notes)


def _of_python_blocks(source: Source, wishes: Wishes) -> Reading:
    """Blocks that Python makes are not read by the core; the system may keep their files."""
    data_bytes = source_bytes(source)
    files = some_files(source.index)
    where = disk_of([*files[:1], source.index.root], wishes.disk)
    speed = speed_of(where, files if data_bytes >= MEASURED_BYTES else [])
    fits = ram_budget(wishes.ram, data_bytes).page_cache
    budget = Budget(page_cache=fits, kept_bytes=0, notes=())
    return Reading(where, speed, budget, data_bytes, native.ReadConfig(), window=0, reads_on=False)


def num_readers(where: Disk, in_blocks: bool) -> int:
    """Return how many threads read from a disk, where the user does not say.

    Two on a hard disk: the second one's request lies in its queue when the first one's ends.
    """
    if where.has_one_head:
        return _HEAD_READERS
    return _BLOCK_READERS if in_blocks else _FILE_READERS


def some_files(index: Index) -> list[str]:
    """Return paths of some files from all over an index, to try and to measure."""
    return [os.path.join(index.root, index.files[i]) for i in _spread(len(index.files))]


def source_bytes(source: Source) -> int:
    """Return the bytes of a source's images; where lengths are not known, an estimate.

    Of a folder from some of its files; of blocks that Python makes, the bytes of all of them: there
    is little else in them.
    """
    index = source.index
    known = np.zeros(0, np.int64) if index.length is None else index.length[index.length >= 0]
    if len(known):
        return int(known.sum()) * len(index) // len(known)
    if source.python_blocks:
        return sum(_sizes(index, set(index.files)))
    sizes = _sizes(index, (index.files[index.file[i]] for i in _spread(len(index))))
    return sum(sizes) * len(index) // max(1, len(sizes))


def mean_block_bytes(source: Source, block_bytes: int) -> int:
    """Return about how much memory a block takes: of python blocks, what the source decides."""
    if not source.python_blocks:
        return block_bytes
    num_blocks = 1 + int(source.index.file.max(initial=0))
    return max(1, source_bytes(source) // num_blocks)


def blocks_of_pool(source: Source, shuffle_blocks: int, block_bytes: int) -> int:
    """Return how many of a source's blocks a shuffle pools.

    Where the source decides how large its blocks are, as many as take the memory of
    `shuffle_blocks` blocks of `block_bytes`: 64 blocks may be 700 MB (parquet) or 4 GB (MDS).
    Follows from the data and the arguments alone, as everything that an order depends on.
    """
    if not source.python_blocks:
        return shuffle_blocks
    return max(1, shuffle_blocks * block_bytes // mean_block_bytes(source, block_bytes))


def _sizes(index: Index, names: Iterable[str]) -> list[int]:
    """Return the sizes of those files that are there; that others are not is said by reading."""
    sizes = []
    for name in names:
        with contextlib.suppress(OSError):
            sizes.append(os.stat(os.path.join(index.root, name)).st_size)
    return sizes


def disk_of(paths: Sequence[str], wish: str) -> Disk:
    """Return the disk of the first path that is there; that others are not is said by reading."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            return choose_disk(path, wish)
    return Disk("unknown", "no such folder", "")


def _spread(size: int) -> Sequence[int]:
    """Return some places that lie evenly in range(size)."""
    number = min(size, _STATTED_FILES)
    return [i * size // number for i in range(number)]


def _is_direct(
    wishes: Wishes, budget: Budget, files: Sequence[str], in_blocks: bool, notes: list[str]
) -> bool:
    """Decide whether to read past the page cache.

    Single small files are read through it: there the kernel's read-ahead is of use.
    """
    wanted = wishes.direct if wishes.direct is not None else in_blocks and not budget.page_cache
    if not wanted or not files:
        return False
    if reads_direct(files[0]):
        return True
    notes.append(
        f"{files[0]}: O_DIRECT does not work there, so data is read through the page cache: a "
        "little slower from a hard disk, and it displaces what other programs have there"
    )
    return False


def _kept_memory(
    source: Source,
    budget: Budget,
    data_bytes: int,
    units: str,
    num_ranks: int,
    notes: list[str],
) -> KeptMemory | None:
    if budget.kept_bytes <= 0:
        return None
    index = source.index
    # Room is given out in whole pages, and a request begins and ends on one.
    slack = 2 * 4096 * len(index) if budget.kept_bytes >= data_bytes else 0
    table = native.kept_table_bytes(len(index))
    memory = open_kept(
        _kept_key(source, units), table + budget.kept_bytes + slack, num_ranks=num_ranks
    )
    notes += memory.notes
    return memory if memory.size_bytes > table else None


def _kept_key(source: Source, units: str) -> str:
    """Name what is kept: processes with the same name share it.

    Of a pack, jobs of one user may: its file times tell it apart, and every process checks the
    checksums itself. A folder's files may change and nothing would tell, so only the ranks of one
    job do (or what one shell or notebook starts). Processes that can't see each other's numbers
    don't: they could not tell who has died.
    """
    root = os.path.realpath(source.index.root)
    stat = os.stat(root)
    with contextlib.suppress(OSError):
        units += f" {os.stat('/proc/self/ns/pid').st_ino}"
    job = "" if source.kind == "pack" else _job()
    place = f"{root} {stat.st_dev} {stat.st_ino} {stat.st_mtime_ns}"
    return f"{place} {source.index.id} {units} {job}"


def _job() -> str:
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    return " ".join([*(os.environ.get(name, "") for name in names), str(os.getppid())])
