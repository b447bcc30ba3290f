"""What this machine grants: cores, memory, ranks of the node, the cache folder."""

from __future__ import annotations

import math
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def cache_folder() -> str:
    """Return the folder for what is found out once: $IMAGENET_SEQ_CACHE, else XDG's cache."""
    if folder := os.environ.get("IMAGENET_SEQ_CACHE"):
        return folder
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "imagenet-seq")


_OWN_CGROUPS = Path("/proc/self/cgroup")


class LoaderNote(UserWarning):
    """Something to know: what runs in Python and why, what an argument no longer does."""


def find_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if (rank is None) != (world_size is None):
        raise ValueError("pass rank and world_size together, or neither")
    if rank is None or world_size is None:
        # A script that has a process group has imported torch; the command line need not.
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
        else:  # torchrun's environment
            rank = int(os.environ.get("RANK", "0"))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank {rank} of {world_size}")
    return rank, world_size


def node_ranks(world_size: int) -> int:
    """Return the number of ranks on this node, as far as the launcher says."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return max(1, min(int(os.environ[name]), world_size))
    return world_size


def available_cores() -> int:
    """Return the cores of this rank: affinity and cgroup quota, divided among the node's ranks."""
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    cores = min(cores, _cgroup_cores())
    return max(1, int(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = _OWN_CGROUPS) -> float:
    """Return the least CPU quota of this process's cgroups (version 2) in cores, or infinity."""
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    cores = math.inf
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota = "max"
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
        if folder == root:
            break
    return cores


def say_once(line: str) -> None:
    """Print a line once a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def note_once(message: str) -> None:
    """Tell the user once a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(message, LoaderNote, stacklevel=3)


# ---- How much there is ----


@dataclass(frozen=True)
class Limits:
    """What this process may use of the node's memory.

    Attributes:
        total_bytes: the node's memory, or the least limit of this process's cgroups.
        available_bytes: what can be used now without swapping, says /proc/meminfo or a cgroup.
        memlock_bytes: the limit of locked memory (RLIMIT_MEMLOCK, soft); -1: none.
        has_swap: the machine has swap space.
        cgroup: folder of the cgroup that sets `available_bytes`; None: none does.
    """

    total_bytes: int
    available_bytes: int
    memlock_bytes: int = -1
    has_swap: bool = False
    cgroup: str | None = None


def limits(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Limits:
    """Measure what this process may use of the node's memory, in about a millisecond.

    A cgroup's memory is its limit less what it uses, of which files that were read once and not
    used again (inactive_file) can be dropped at once. Versions 1 and 2 are read, mounted
    alone or side by side, from the process's own cgroup up to the root of the mount.
    """
    meminfo = _numbers(proc / "meminfo")
    total = meminfo.get("MemTotal:", 0) * 1024
    if not total:  # not Linux: nobody says what is available, so call half of it that
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = meminfo.get("MemAvailable:", total // 2048) * 1024
    limiting = None
    for folder in _memory_cgroups(proc / "self" / "cgroup", cgroup):
        limit, left = _cgroup_memory(folder)
        total = int(min(total, limit))
        if left < available:
            available, limiting = int(max(left, 0)), str(folder)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Limits(
        total_bytes=total,
        available_bytes=available,
        memlock_bytes=-1 if memlock == resource.RLIM_INFINITY else memlock,
        has_swap=meminfo.get("SwapTotal:", 0) > 0,
        cgroup=limiting,
    )


def _memory_cgroups(own: Path, root: Path) -> Iterator[Path]:
    """Yield the folders that may limit this process's memory; some may not exist.

    In a container the paths in /proc/self/cgroup are often the host's, while the mount shows the
    container's own cgroup as its root; so every parent is tried.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts = [root, root / "unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "memory"]
        else:
            continue
        for mount in mounts:
            folder = mount / path.strip("/")
            while folder != mount and mount in folder.parents:
                yield folder
                folder = folder.parent
            yield mount


def _cgroup_memory(folder: Path) -> tuple[float, float]:
    """Return the limit of a cgroup and what is left of it in bytes; infinity where it has none."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limit = min(read_number(folder / name, math.inf) for name in names)
    used = read_number(folder / "memory.current", 0) or read_number(
        folder / "memory.usage_in_bytes", 0
    )
    stat = _numbers(folder / "memory.stat")
    # Version 1 has both, where the plain one leaves out the cgroups below.
    droppable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return limit, limit - used + droppable


def read_number(path: Path, otherwise: float) -> float:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return otherwise


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of a name and a number; {} where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def measured_limits() -> Limits:
    return limits()  # `limits` names an argument of budget()


def num_cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
