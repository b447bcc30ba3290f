"""What a process finds out about its machine, in made-up environments and file trees."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from imagenet_seq import machine
from imagenet_seq.machine import (
    LoaderNote,
    available_cores,
    cache_folder,
    find_ranks,
    limits,
    node_ranks,
    note_once,
    say_once,
)

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL")
KB = 1024


@pytest.fixture(autouse=True)
def _unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that nobody launched, without a terminal, whatever runs the tests."""
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "isatty", lambda _: False)


# ---- A table of environments ----


def torchrun(rank: int, world: int, local: int, node: int) -> dict[str, object]:
    return {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": node,
        "GROUP_RANK": rank // node, "MASTER_ADDR": "node0", "MASTER_PORT": 29500,
    }  # fmt: skip


def open_mpi(rank: int, world: int, local: int, node: int) -> dict[str, object]:
    return {
        "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": world,
        "OMPI_COMM_WORLD_LOCAL_RANK": local, "OMPI_COMM_WORLD_LOCAL_SIZE": node,
    }  # fmt: skip


def hydra(rank: int, world: int, local: int, node: int) -> dict[str, object]:
    """What mpiexec of MPICH and Intel MPI sets."""
    return {
        "PMI_RANK": rank, "PMI_SIZE": world, "PMI_FD": 9,
        "MPI_LOCALRANKID": local, "MPI_LOCALNRANKS": node,
    }  # fmt: skip


def srun(rank: int, local: int, nodes: str, node: int, world: int, **more: object) -> dict:
    """What Slurm sets in a task of an ordinary step."""
    return {
        "SLURM_JOB_ID": 77, "SLURM_STEP_ID": 0, "SLURM_PROCID": rank, "SLURM_NTASKS": world,
        "SLURM_STEP_NUM_TASKS": world, "SLURM_LOCALID": local, "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": nodes, "SLURM_TASKS_PER_NODE": nodes, **more,
    }  # fmt: skip


BATCH = {
    "SLURM_JOB_ID": 77, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0,
    "SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4, "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
"""The script of sbatch and the shell of salloc: the job's number of tasks, but one process."""


@dataclass
class Case:
    """An environment, and what is to be found there.

    Attributes:
        env: environment variables.
        ranks: rank and world size.
        on_node: ranks on this node.
        cores: for this rank.
        says: whether it says what is said once a node.
        affinity: CPUs that the scheduler may use for this process, of 64 in the machine.
        own: /proc/self/cgroup.
        cgroup: files under /sys/fs/cgroup.
        memory_kb: available memory; /proc/meminfo says 1000.
        terminal: whether standard input is one.
    """

    env: dict[str, object]
    ranks: tuple[int, int] = (0, 1)
    on_node: int = 1
    cores: int = 64
    says: bool = True
    affinity: int = 64
    own: str = "0::/\n"
    cgroup: dict[str, str] = field(default_factory=dict)
    memory_kb: int = 1000
    terminal: bool = False


CPUSET_16 = {"job/cpuset.cpus.effective": "0-7,32-38,63\n", "cpuset.cpus.effective": "0-63\n"}
DOCKER_V2 = {
    "cpu.max": "450000 100000\n", "memory.max": f"{500 * KB}\n", "memory.current": f"{100 * KB}\n",
}  # fmt: skip
DOCKER_V1 = {
    "cpu/cpu.cfs_quota_us": "450000\n", "cpu/cpu.cfs_period_us": "100000\n",
    "memory/memory.limit_in_bytes": f"{500 * KB}\n",
    "memory/memory.usage_in_bytes": f"{100 * KB}\n",
}  # fmt: skip
OWN_V1 = "4:memory:/docker/01ab\n3:cpu,cpuacct:/docker/01ab\n2:cpuset:/docker/01ab\n0::/\n"

CASES = {
    "alone": Case({}),
    "alone, empty variables": Case({"RANK": "", "WORLD_SIZE": "", "LOCAL_WORLD_SIZE": ""}),
    "alone, taskset": Case({}, affinity=5, cores=5),
    "one of a node's processes, by LOCAL_RANK alone": Case({"LOCAL_RANK": 1}, says=False),
    "not distributed, as some scripts write it": Case({"LOCAL_RANK": -1}),
    "torchrun, first": Case(torchrun(0, 8, 0, 4), (0, 8), 4, 16),
    "torchrun, first of a node": Case(torchrun(4, 8, 0, 4), (4, 8), 4, 16),
    "torchrun, last": Case(torchrun(7, 8, 3, 4), (7, 8), 4, 16, says=False),
    "torchrun, taskset": Case(torchrun(3, 4, 3, 4), (3, 4), 4, 2, says=False, affinity=10),
    "torchrun, more ranks than cores": Case(
        torchrun(3, 4, 3, 4), (3, 4), 4, 1, says=False, affinity=3
    ),
    "torchrun, one task of srun a node": Case(
        {**srun(1, 0, "1(x2)", 1, 2), **torchrun(5, 8, 1, 4)}, (5, 8), 4, 4, False, affinity=16
    ),
    "torchrun in a shell of salloc": Case(
        {**BATCH, **torchrun(1, 4, 1, 4)}, (1, 4), 4, 16, says=False, terminal=True
    ),
    "RANK and WORLD_SIZE alone": Case({"RANK": 3, "WORLD_SIZE": 4}, (3, 4), 4, says=False),
    "RANK and WORLD_SIZE copied from srun's": Case(
        {**srun(4, 0, "4(x2)", 1, 8), "RANK": 4, "WORLD_SIZE": 8}, (4, 8), 4, 16
    ),
    "srun, first of the second node": Case(srun(4, 0, "4(x2)", 1, 8), (4, 8), 4, 16),
    "srun, last": Case(srun(7, 3, "4(x2)", 1, 8), (7, 8), 4, 16, says=False),
    "srun, other counts a node": Case(srun(6, 0, "2(x3),1", 3, 7), (6, 7), 1),
    "srun, bound to cores": Case(srun(1, 1, "4", 0, 4), (1, 4), 4, 8, False, affinity=8),
    "srun, part of a node": Case(
        srun(1, 1, "4", 0, 4), (1, 4), 4, 4, False, affinity=16, own="0::/job", cgroup=CPUSET_16
    ),
    "srun, part of a node, bound": Case(
        srun(1, 1, "4", 0, 4), (1, 4), 4, 4, False, affinity=4, own="0::/job", cgroup=CPUSET_16
    ),
    "srun, few variables in a container": Case(
        {
            "SLURM_STEP_ID": 3,
            "SLURM_PROCID": 1,
            "SLURM_NTASKS": 2,
            "SLURM_NTASKS_PER_NODE": 2,
            "SLURM_LOCALID": 1,
        },
        (1, 2),
        2,
        32,
        says=False,
    ),
    "srun --preserve-env keeps the job's tasks": Case(
        {**srun(1, 1, "2", 0, 2), "SLURM_NTASKS": 8}, (1, 2), 2, 32, says=False
    ),
    "srun --mpi=pmi2": Case(
        {**srun(1, 1, "4", 0, 4), "PMI_RANK": 1, "PMI_SIZE": 4}, (1, 4), 4, 16, says=False
    ),
    "srun --mpi=pmix": Case({**srun(1, 1, "4", 0, 4), "PMIX_RANK": 1}, (1, 4), 4, 16, says=False),
    "script of sbatch": Case({**BATCH, "SLURM_STEP_ID": -5}),
    "script of sbatch, without a step": Case(BATCH),
    "script of sbatch, sent from a task of srun": Case(
        {**srun(1, 1, "4", 0, 4), **BATCH, "SLURM_STEP_ID": -5}
    ),
    "shell of salloc": Case({"SLURM_JOB_ID": 77, "SLURM_NTASKS": 8}, terminal=True),
    "shell of salloc on the node": Case({**BATCH, "SLURM_STEP_ID": 4294967290}),
    "shell of srun --pty": Case(
        {**srun(0, 0, "4", 0, 4), "PMI_RANK": 0, "PMI_SIZE": 4, "PMIX_RANK": 0}, terminal=True
    ),
    "mpirun of Open MPI": Case(open_mpi(5, 8, 1, 4), (5, 8), 4, 16, says=False),
    "mpirun of Open MPI, first of a node": Case(open_mpi(4, 8, 0, 4), (4, 8), 4, 16),
    "mpirun of Open MPI with PMIx": Case(
        {**open_mpi(5, 8, 1, 4), "PMIX_RANK": 5}, (5, 8), 4, 16, says=False
    ),
    "mpirun of Open MPI, bound to a core": Case(
        open_mpi(1, 2, 1, 2), (1, 2), 2, 1, says=False, affinity=1
    ),
    "mpirun of Open MPI, whose daemon srun started": Case(
        {**srun(0, 0, "1", 0, 1), **open_mpi(5, 8, 1, 4)}, (5, 8), 4, 16, says=False
    ),
    "mpiexec of MPICH": Case(hydra(6, 8, 2, 4), (6, 8), 4, 16, says=False),
    "mpiexec of MPICH, whose proxy srun started": Case(
        {**srun(1, 0, "1(x2)", 1, 2), **hydra(4, 8, 0, 4)}, (4, 8), 4, 16
    ),
    "mpiexec of PALS": Case(
        {"PMI_RANK": 5, "PMI_SIZE": 8, "PMI_LOCAL_RANK": 1, "PMI_LOCAL_SIZE": 4},
        (5, 8),
        4,
        16,
        says=False,
    ),
    "container, cgroup 2": Case({}, cores=4, cgroup=DOCKER_V2, memory_kb=400),
    "container, cgroup 1": Case({}, cores=4, own=OWN_V1, cgroup=DOCKER_V1, memory_kb=400),
    "container, torchrun": Case(
        torchrun(1, 2, 1, 2), (1, 2), 2, 2, False, cgroup=DOCKER_V2, memory_kb=400
    ),
    "container, srun": Case(
        srun(1, 1, "2", 0, 2), (1, 2), 2, 2, False, own=OWN_V1, cgroup=DOCKER_V1, memory_kb=400
    ),
    "container, half a core": Case({}, cores=1, cgroup={"cpu.max": "50000 100000\n"}),
    "quota of a parent": Case(
        {},
        cores=2,
        own="0::/a/b",
        cgroup={"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"},
    ),
    "no quota": Case(
        {},
        own="3:cpu:/\n0::/",
        cgroup={
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "cpu.max": "max 1",
        },
    ),
    "strange files": Case(
        {},
        own="0::/../elsewhere\n2:cpu:/x",
        cgroup={"cpu.max": "", "cpu/cpu.cfs_quota_us": "5", "cpu/x/cpu.cfs_quota_us": "many"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_environments(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in case.env.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(case.affinity), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "isatty", lambda file: case.terminal and file == 0)
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    files = {"self/cgroup": case.own, "meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n"}
    for root, texts in ((proc, files), (cgroup, case.cgroup)):
        for name, text in texts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    rank, world_size = find_ranks(None, None)
    assert (rank, world_size) == case.ranks
    assert node_ranks(world_size) == case.on_node
    assert available_cores(proc, cgroup) == case.cores
    assert limits(proc, cgroup).available_bytes == case.memory_kb * KB
    say_once("said")
    assert capsys.readouterr().err == ("said\n" if case.says else "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        note_once("noted")
    assert [warning.category for warning in caught] == ([LoaderNote] if case.says else [])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set without RANK: set both, unset both"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "RANK=0 is set without WORLD_SIZE"),
        (
            {"OMPI_COMM_WORLD_RANK": "0"},
            "without OMPI_COMM_WORLD_SIZE.* pass rank= and world_size=",
        ),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK='two': expected a whole number"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2x"}, "PMI_SIZE='2x': expected a whole number.* unset it"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "0 <= rank < world_size, got rank 4 of 4"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "got rank -1 of 4"),
        ({"PMIX_RANK": "2"}, "PMIX_RANK=2 is set, but no variable says how many ranks"),
    ],
)
def test_half_a_pair_and_garbage_are_refused(
    env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        find_ranks(None, None)
    assert find_ranks(1, 2) == (1, 2)  # the remedy


def test_garbage_in_the_number_of_local_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "all")
    for asks in (available_cores, lambda: node_ranks(4)):
        with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE='all': expected a whole number"):
            asks()


def test_arguments_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="together"):
        find_ranks(0, None)


def test_a_process_group_overrules_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a script that starts its own processes (torch.multiprocessing.spawn)."""
    group = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_rank=lambda: 2,
        get_world_size=lambda: 4,
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find_ranks(None, None) == (2, 4)
    assert find_ranks(0, 3) == (0, 3)
    say_once("said")
    assert capsys.readouterr().err == ""


def test_no_more_ranks_are_on_a_node_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert node_ranks(2) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert node_ranks(2) == 2


def test_importing_it_does_not_import_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, machine.__file__], check=True)


# ---- The cache folder ----


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == "/a"
    monkeypatch.delenv("IMAGENET_SEQ_CACHE")
    assert cache_folder() == "/b/imagenet-seq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == "/c/.cache/imagenet-seq"


# ---- Memory ----


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    write_meminfo(tmp_path / "proc", MemTotal=200_000, MemAvailable=100_000, SwapTotal=0)
    return tmp_path / "proc"


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def write_meminfo(proc: Path, **kilobytes: int) -> None:
    lines = [f"{name + ':':<15}{value:>9} kB" for name, value in kilobytes.items()]
    (proc / "meminfo").write_text("\n".join([*lines, "HugePages_Total:       0"]))


def write_group(folder: Path, stat: str = "", **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{stat}\n")


def test_without_cgroups_meminfo_decides(proc: Path, mount: Path) -> None:
    found = limits(proc, mount)
    assert found.total_bytes == 200_000 * 1024
    assert found.available_bytes == 100_000 * 1024
    assert (found.has_swap, found.cgroup) == (False, None)
    write_meminfo(proc, MemTotal=200_000, MemAvailable=100_000, SwapTotal=7)
    assert limits(proc, mount).has_swap


def test_without_proc_half_of_the_machine_counts_as_available(tmp_path: Path) -> None:
    found = limits(tmp_path / "none", tmp_path / "none")
    assert found.total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.total_bytes // 2 - 1024 < found.available_bytes <= found.total_bytes // 2


def test_every_cgroup_up_to_the_root_may_limit(proc: Path, mount: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/slice/job/step\n")
    write_group(mount / "slice" / "job" / "step", max="max", current=4_000_000)
    write_group(
        mount / "slice" / "job", "inactive_file 500000\n", max=10_000_000, current=4_000_000
    )
    write_group(mount / "slice", max=90_000_000, current=60_000_000)
    found = limits(proc, mount)
    assert found.total_bytes == 10_000_000
    assert found.available_bytes == 10_000_000 - 4_000_000 + 500_000
    assert found.cgroup == str(mount / "slice" / "job")
    write_group(mount / "slice", max=90_000_000, current=85_000_000)  # a sibling grew
    found = limits(proc, mount)
    assert (found.available_bytes, found.cgroup) == (5_000_000, str(mount / "slice"))
    assert found.total_bytes == 10_000_000


def test_memory_high_limits_too_and_an_overfull_group_leaves_nothing(
    proc: Path, mount: Path
) -> None:
    (proc / "self" / "cgroup").write_text("0::/job\n")
    write_group(mount / "job", max="max", high=8_000_000, current=9_000_000)
    assert limits(proc, mount).total_bytes == 8_000_000
    assert limits(proc, mount).available_bytes == 0


def test_a_container_sees_its_own_cgroup_as_the_root_of_the_mount(proc: Path, mount: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/docker/0123456789ab\n")
    write_group(mount, "inactive_file 0\n", max=30_000_000, current=10_000_000)
    found = limits(proc, mount)
    assert (found.available_bytes, found.cgroup) == (20_000_000, str(mount))


@pytest.mark.parametrize("own", ["4:memory:/vm/job", "4:cpu,memory:/vm/job\n3:pids:/\n0::/"])
def test_version_1_beside_version_2(proc: Path, mount: Path, own: str) -> None:
    (proc / "self" / "cgroup").write_text(own)
    stat = "inactive_file 1\ntotal_inactive_file 3000000\n"
    group = mount / "memory" / "vm" / "job"
    write_group(group, stat, limit_in_bytes=20_000_000, usage_in_bytes=15_000_000)
    write_group(mount / "memory", limit_in_bytes=9223372036854771712, usage_in_bytes=15_000_000)
    (mount / "unified").mkdir()
    found = limits(proc, mount)
    assert (found.total_bytes, found.available_bytes) == (20_000_000, 8_000_000)
    assert found.cgroup == str(group)


def test_files_that_are_missing_or_strange_limit_nothing(proc: Path, mount: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/../elsewhere\n2:cpu:/x\n")
    (mount / "memory.max").write_text("")
    assert limits(proc, mount).available_bytes == 100_000 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="half is guessed elsewhere")
def test_the_limits_of_this_machine_are_plausible() -> None:
    found = limits()
    assert 0 < found.available_bytes <= found.total_bytes
