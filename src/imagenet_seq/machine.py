"""What this machine grants this process: ranks, cores, memory, the cache folder.

Everything is read when it is asked for, because a script may start its process group after import.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def cache_folder() -> str:
    """Return the folder for cached results: $IMAGENET_SEQ_CACHE, else imagenet-seq in XDG's."""
    if folder := os.environ.get("IMAGENET_SEQ_CACHE"):
        return folder
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "imagenet-seq")


# ---- Ranks ----

_RESERVED_STEPS = 0xFFFF_FFF0
"""Slurm's step ids from here on are no steps of srun: slurm/slurm.h, SLURM_BATCH_SCRIPT."""


def find_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks.

    The first of these that says it: the arguments, an initialised process group of
    torch.distributed, the environment of torchrun, Open MPI's mpirun, PMI (mpiexec of MPICH and
    Intel MPI), srun. A process that nobody launched is rank 0 of 1.

    Raises:
        ValueError: one of a pair is missing, is not a number, or the two contradict each other.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("pass rank and world_size together, or neither")
    if rank is None or world_size is None:
        rank, world_size = _process_group() or _launched_ranks()
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank {rank} of {world_size}")
    return rank, world_size


def node_ranks(world_size: int) -> int:
    """Return the number of ranks on this node; all of them where the launcher doesn't say."""
    return max(1, min(_launched_node_ranks() or world_size, world_size))


def say_once(line: str) -> None:
    """Print a line to stderr, in the first rank of each node."""
    if _local_rank() <= 0:
        print(line, file=sys.stderr, flush=True)


class LoaderNote(UserWarning):
    """Warning category for things worth knowing: a Python transform, an argument without effect."""


def note_once(message: str) -> None:
    """Warn with a `LoaderNote`, in the first rank of each node."""
    if _local_rank() <= 0:
        warnings.warn(message, LoaderNote, stacklevel=3)


def _process_group() -> tuple[int, int] | None:
    """Return rank and world size of torch.distributed's process group, if there is one."""
    # A script that has a process group has imported torch; the command line need not.
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return None


def _launched_ranks() -> tuple[int, int]:
    """Return rank and world size as the launcher's environment says."""
    for names in _rank_variables():
        rank, world_size = (_number(name) for name in names)
        if rank is not None and world_size is not None:
            return rank, world_size
        if rank is not None or world_size is not None:
            present, absent = names if world_size is None else reversed(names)
            raise ValueError(
                f"{present}={os.environ[present]} is set without {absent}: set both, unset both "
                "to run alone, or pass rank= and world_size="
            )
    if rank := _number("PMIX_RANK"):  # PMIx has no variable for the number of ranks
        raise ValueError(
            f"PMIX_RANK={rank} is set, but no variable says how many ranks there are: pass rank= "
            "and world_size="
        )
    return 0, 1


def _rank_variables() -> list[tuple[str, str]]:
    """Return the variables of rank and world size, those of the innermost launcher first.

    mpirun comes before srun: in a Slurm job it starts its daemons with srun, and the ranks inherit
    the SLURM variables of the daemons.
    """
    names = [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")]
    if not os.isatty(0):  # else a shell of `srun --pty`: see _is_srun_task
        names.append(("PMI_RANK", "PMI_SIZE"))
    if _is_srun_task():
        # srun --preserve-env leaves the job's SLURM_NTASKS; the step's number is always right.
        is_known = os.environ.get("SLURM_STEP_NUM_TASKS")
        names.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if is_known else "SLURM_NTASKS"))
    return names


def _is_srun_task() -> bool:
    """Tell whether srun started this process, as one of a step's tasks.

    SLURM_PROCID (0) and SLURM_NTASKS (of the job) are also set in the script of sbatch and the
    shell of salloc, which run once, however many tasks the job has. Their SLURM_STEP_ID is missing
    or a reserved one (written as a negative number). The shell of `srun --pty` is task 0 of an
    ordinary step, but its standard input is a terminal, which srun gives to no other task.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    is_step = step.isdecimal() and int(step) < _RESERVED_STEPS
    return is_step and bool(os.environ.get("SLURM_PROCID")) and not os.isatty(0)


def _local_rank() -> int:
    """Return the rank among those of this node; the rank in the job where nobody says."""
    names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK"]
    local = _number(*names, *(["SLURM_LOCALID"] if _is_srun_task() else []))
    if local is None and (group := _process_group()):
        return group[0]
    if local is None:
        local = _number(*(rank for rank, _ in _rank_variables()))
    return local or 0


def _launched_node_ranks() -> int | None:
    """Return the number of ranks on this node as the launcher says; None: it doesn't."""
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
    num_ranks = _number(*names)
    if num_ranks is not None or not _is_srun_task():
        return num_ranks
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        # "2(x3),1": three nodes of two tasks, and one of one.
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get(name, ""))
        counts = [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]
        if counts:
            return counts[min(_number("SLURM_NODEID") or 0, len(counts) - 1)]
    return None


def _number(*names: str) -> int | None:
    """Return the first of these environment variables that is set; "" counts as not set."""
    for name in names:
        if text := os.environ.get(name):
            try:
                return int(text)
            except ValueError:
                raise ValueError(
                    f"{name}={text!r}: expected a whole number, as torchrun, mpirun and srun set "
                    "it; correct it, or unset it to run alone"
                ) from None
    return None


# ---- Cores ----


def available_cores(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Return the number of cores this rank may use, at least 1.

    Those of its CPU affinity and its cgroups' quotas, divided among the ranks of the node.
    """
    num_cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        num_cpus = len(os.sched_getaffinity(0))
    shared = num_cpus
    num_ranks = max(1, _launched_node_ranks() or 1)
    # torchrun's ranks share one affinity; those of mpirun and srun may each have their own part.
    if not os.environ.get("LOCAL_WORLD_SIZE"):
        folders = _cgroups("cpuset", proc, cgroup)
        cpusets = [size for folder in folders if (size := _cpuset_cores(folder))]
        shared = max(shared, min(cpusets, default=os.cpu_count() or 1))
    quota = min(map(_quota_cores, _cgroups("cpu", proc, cgroup)), default=math.inf)
    return max(1, min(num_cpus, int(min(shared, quota)) // num_ranks))


def _cpuset_cores(folder: Path) -> int:
    """Return the number of CPUs of a cgroup, which its file writes as "0-3,8"; 0: none named."""
    texts = (_text(folder / f"cpuset.{name}") for name in ("cpus.effective", "effective_cpus"))
    runs = re.findall(r"(\d+)(?:-(\d+))?", next(filter(None, texts), ""))
    return sum(int(last or first) - int(first) + 1 for first, last in runs)


def _quota_cores(folder: Path) -> float:
    """Return the CPU quota of a cgroup in cores; infinity where it has none."""
    files = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # version 2; version 1
    for names in files:
        # A file that is missing, "max" or -1: no quota.
        with contextlib.suppress(ValueError, ZeroDivisionError):
            quota, period = map(int, " ".join(_text(folder / name) for name in names).split())
            return quota / period if quota > 0 else math.inf
    return math.inf


# ---- Memory ----


@dataclass(frozen=True)
class Limits:
    """What this process may use of the node's memory."""

    total_bytes: int  # of the node, or the least limit of this process's cgroups
    available_bytes: int  # can be used now without swapping, as /proc/meminfo or a cgroup says
    memlock_bytes: int = -1  # the limit of locked memory (RLIMIT_MEMLOCK, soft); -1: none
    has_swap: bool = False
    cgroup: str | None = None  # folder of the one that sets `available_bytes`


def limits(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Limits:
    """Measure what this process may use of the node's memory, in about a millisecond.

    A cgroup's available memory is its limit less what it uses. File pages that were read once and
    not used again (inactive_file) don't count as used, because the kernel can drop them at once.
    """
    meminfo = _fields(proc / "meminfo")
    total = meminfo.get("MemTotal:", 0) * 1024
    if not total:  # not Linux, where nothing tells what is available: take half
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = meminfo.get("MemAvailable:", total // 2048) * 1024
    limiting = None
    for folder in _cgroups("memory", proc, cgroup):
        limit, left = _cgroup_memory(folder)
        total = int(min(total, limit))
        if left < available:
            available, limiting = int(max(left, 0)), str(folder)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    memlock = -1 if memlock == resource.RLIM_INFINITY else memlock
    has_swap = meminfo.get("SwapTotal:", 0) > 0
    return Limits(total, available, memlock, has_swap, limiting)


def _cgroup_memory(folder: Path) -> tuple[float, float]:
    """Return the limit of a cgroup and what is left of it in bytes; infinity where it has none."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limit = min(read_number(folder / name, math.inf) for name in names)
    used_in_version_1 = read_number(folder / "memory.usage_in_bytes", 0)
    used = read_number(folder / "memory.current", 0) or used_in_version_1
    stat = _fields(folder / "memory.stat")
    # Version 1 has both, where the plain one leaves out the cgroups below.
    droppable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return limit, limit - used + droppable


# ---- Files of the kernel ----


def _cgroups(controller: str, proc: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups that may limit it; some may not exist.

    Versions 1 and 2 are read, mounted alone or side by side, from the process's own cgroup up to
    the root of the mount. In a container the paths in /proc/self/cgroup are often the host's, while
    the mount shows the container's own cgroup as its root; so every parent is tried.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / name for name in dict.fromkeys((controller, controllers))]
        else:
            continue
        for mount in mounts:
            folder = mount / path.strip("/")
            while folder != mount and mount in folder.parents:
                yield folder
                folder = folder.parent
            yield mount


def read_number(path: Path, otherwise: float) -> float:
    """Return the number in a file, or `otherwise` where there is none."""
    try:
        return int(_text(path))
    except ValueError:  # no such file, or "max"
        return otherwise


def _fields(path: Path) -> dict[str, int]:
    """Read lines of a name and a number; {} where there is no such file."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str:
    """Return the text of a file; "" where it can't be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
