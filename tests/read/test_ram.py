"""The RAM budget: sizes and limits on made-up machines, and memory that real processes share."""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from imagenet_seq import native
from imagenet_seq.machine import Limits
from imagenet_seq.read import kept as ram
from imagenet_seq.read.budget import Budget, describe, ram_budget
from imagenet_seq.read.kept import KeptMemory, open_kept

linux = pytest.mark.skipif(sys.platform != "linux", reason="sharing takes Linux")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

GB = 10**9
MIB = 1 << 20
DEADLINE_S = 60  # far above what anything here takes; a hang fails instead of stopping the suite
NO_SUCH_USER = 54321


def machine(available_bytes: int = 100 * GB, total_bytes: int = 200 * GB, **rest: object) -> Limits:
    return Limits(total_bytes, available_bytes, **rest)


# ---- How much is kept ----


@pytest.mark.parametrize("ram", ["auto", "AUTO", None])
def test_auto_leaves_what_fits_in_half_to_the_page_cache(ram: str | None) -> None:
    assert ram_budget(ram, 50 * GB, limits=machine()).page_cache
    assert ram_budget(ram, 50 * GB, limits=machine()).kept_bytes == 0


def test_auto_keeps_half_of_the_available_memory_of_what_does_not_fit() -> None:
    found = ram_budget("auto", 50 * GB + 1, limits=machine())
    assert (found.page_cache, found.kept_bytes, found.notes) == (False, 50 * GB, ())


@pytest.mark.parametrize(
    ("ram", "kept_bytes"),
    [
        ("48GB", 48 * GB),
        ("48 gb", 48 * GB),
        ("48G", 48 * GB),
        ("1.5GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("64kB", 64_000),
        ("4096", 4096),
        ("4096B", 4096),
        ("30%", 60 * GB),
        ("12.5 %", 25 * GB),
        (48 * GB, 48 * GB),
        (48e9, 48 * GB),
        (0, 0),
        ("0", 0),
        ("0%", 0),
    ],
)
def test_a_size_or_share_is_kept_in_memory_of_our_own(ram: object, kept_bytes: int) -> None:
    found = ram_budget(ram, 146 * GB, limits=machine())
    assert (found.page_cache, found.kept_bytes, found.notes) == (False, kept_bytes, ())


@pytest.mark.parametrize(
    "ram", ["", "lots", "-1GB", "48XB", "GB", "110%", "1e9", -1, 0.3, 48, "48B", float("nan")]
)
def test_a_size_that_cannot_be_meant_is_refused_with_examples(ram: object) -> None:
    with pytest.raises(ValueError, match=r"'48GB' or '512MiB', a share such as '30%', or 0; got"):
        ram_budget(ram, GB, limits=machine())


@pytest.mark.parametrize("ram", [True, b"48GB", [1]])
def test_what_is_neither_text_nor_a_number_is_refused(ram: object) -> None:
    with pytest.raises(TypeError, match="expected 'auto'"):
        ram_budget(ram, GB, limits=machine())


def test_no_more_than_the_dataset_is_kept() -> None:
    assert ram_budget("80GB", 7 * GB, limits=machine()) == Budget(False, 7 * GB, (), "ram='80GB'")


def test_more_than_is_available_is_clipped_and_said() -> None:
    found = ram_budget("95GB", 146 * GB, limits=machine(cgroup="/sys/fs/cgroup/job"))
    assert found.kept_bytes == 90 * GB
    (note,) = found.notes
    assert "ram='95GB': 90.0 GB are kept in memory instead of 95.0 GB" in note
    assert "100.0 GB are available under the limit of the cgroup /sys/fs/cgroup/job" in note
    assert "cgroup" not in ram_budget("95GB", 146 * GB, limits=machine()).notes[0]


def test_a_budget_describes_itself_in_one_line() -> None:
    def line(ram: object, dataset_bytes: int) -> str:
        return describe(ram_budget(ram, dataset_bytes, limits=machine()), dataset_bytes)

    assert line("auto", 146_200_000_000) == (
        "keeps 50.0 GB of 146.2 GB in memory (half of the 100.0 GB available)"
    )
    assert line("auto", 7 * GB) == (
        "leaves 7.0 GB to the page cache (fits in half of the 100.0 GB available)"
    )
    assert line("40%", 146 * GB) == "keeps 80.0 GB of 146.0 GB in memory (ram='40%')"
    assert line(0, GB) == "keeps nothing in memory (ram=0)"
    assert line("1GB", 5_000_000) == "keeps 5.0 MB of 5.0 MB in memory (ram='1GB')"


@linux
def test_memory_that_is_open_but_not_filled_counts_as_taken_once(key: str) -> None:
    def kept() -> int:
        return ram_budget("auto", 146 * GB, limits=machine()).kept_bytes

    first, again = open_kept(key, 64 * MIB), open_kept(key, 64 * MIB)
    assert kept() == 50 * GB - 32 * MIB
    fill(first, 0, 16 * MIB)
    assert kept() == 50 * GB - 24 * MIB
    first.close()
    assert kept() == 50 * GB - 24 * MIB
    again.close()
    assert kept() == 50 * GB


# ---- The memory ----


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"{request.node.nodeid} {os.getpid()} {time.time_ns()}"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No test may leave a thread or a file descriptor behind, nor a process when it fails."""
    before = (threading.active_count(), sorted(open_files().values()))
    yield
    while Process.started:
        Process.started.pop().kill()
    assert (threading.active_count(), sorted(open_files().values())) == before


def open_files() -> dict[str, str]:
    """What the open file descriptors of this process are, by their paths in /proc."""
    folder = Path("/proc/self/fd")
    files = folder.iterdir() if folder.is_dir() else []
    # The listing's own is gone when it is looked at.
    return {str(file): os.readlink(file) for file in files if file.is_symlink()}


def memory_files() -> list[str]:
    return [file for file, name in open_files().items() if "memfd:imagenet-seq-kept" in name]


def fill(memory: KeptMemory, value: int, size_bytes: int, offset: int = 0) -> None:
    ctypes.memset(memory.address + offset, value, size_bytes)


def content(memory: KeptMemory, size_bytes: int, offset: int = 0) -> bytes:
    return ctypes.string_at(memory.address + offset, size_bytes)


def socket_names() -> list[str]:
    """The abstract sockets of this package that exist now, without listing one twice."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "@imagenet-seq-kept-" in line})


def name_of(key: str) -> str:
    """The socket's name of a key as /proc/net/unix shows it, found by opening the key."""
    before = socket_names()
    memory = open_kept(key, MIB)
    (name,) = set(socket_names()) - set(before)
    memory.close()
    assert name not in socket_names()
    return name


PROCESS = """
import ctypes, os, sys, time
from imagenet_seq.read.kept import open_kept

key = sys.argv[1]

def open_it(size_bytes, num_ranks=1):
    global memory
    memory = open_kept(key, size_bytes, num_ranks=num_ranks)
    assert memory.is_shared, memory.notes
    print("open", memory.size_bytes, flush=True)

def content(size_bytes):
    return ctypes.string_at(memory.address, size_bytes)

def wait_for_line():
    return sys.stdin.readline()
"""


class Process:
    """A Python process that runs a script after PROCESS, and talks by lines."""

    started: ClassVar[list[Process]] = []

    def __init__(self, key: str, script: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-X", "dev", "-c", PROCESS + textwrap.dedent(script), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(self)

    def line(self) -> str:
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(DEADLINE_S)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            pipe.close()

    def end(self, line: str = "go\n") -> str:
        """Send a line, and return the rest of the output of a process that must end well."""
        out, err = self.popen.communicate(line, timeout=DEADLINE_S)
        assert (self.popen.returncode, err) == (0, ""), err
        return out.strip()


@linux
def test_memory_is_zero_writable_and_of_the_size_asked_for(key: str) -> None:
    memory = open_kept(key, 3 * MIB + 5)
    assert memory.size_bytes == 3 * MIB + 5
    assert memory.is_shared
    assert memory.address % mmap.PAGESIZE == 0
    assert content(memory, MIB) == bytes(MIB)
    fill(memory, 7, 5, offset=3 * MIB)
    assert content(memory, 5, offset=3 * MIB) == b"\7" * 5
    memory.close()


@linux
def test_opening_twice_gives_the_same_memory_and_the_size_of_the_first(key: str) -> None:
    first, second, other = open_kept(key, MIB), open_kept(key, 9), open_kept(key + "x", 4096)
    assert second.size_bytes == MIB
    assert second.address != first.address
    fill(first, 1, MIB)
    first.close()  # its owner leaves, the memory stays
    assert content(second, MIB) == b"\1" * MIB
    assert content(other, 4096) == bytes(4096)
    newer = open_kept(key, 8192)  # nobody hands the old one out any more
    assert (newer.size_bytes, content(newer, 8192)) == (8192, bytes(8192))
    for memory in (second, other, newer):
        memory.close()


@linux
def test_processes_share_it_and_a_later_one_takes_the_size_of_the_first(key: str) -> None:
    memory = open_kept(key, 2 * MIB, num_ranks=2)
    fill(memory, 3, 100)
    script = """
        open_it(1, num_ranks=2)
        print(content(100) == b"\\3" * 100)
        ctypes.memset(memory.address, 4, 100)
    """
    assert Process(key, script).end().split() == ["open", str(2 * MIB), "True"]
    assert content(memory, 100) == b"\4" * 100
    memory.close()


@linux
def test_ranks_that_start_at_once_all_get_one_memory(key: str) -> None:
    script = """
        wait_for_line()
        rank = int(wait_for_line())
        open_it((1 + rank) << 20, num_ranks=4)
        ctypes.memset(memory.address + rank, 1, 1)
        while content(4) != b"\\1" * 4:
            time.sleep(0.01)
        wait_for_line()
    """
    ranks = [Process(key, script) for _ in range(4)]
    for number, rank in enumerate(ranks):
        rank.popen.stdin.write(f"\n{number}\n")
        rank.popen.stdin.flush()
    sizes = {rank.line() for rank in ranks}  # the same for all, and content agrees
    assert len(sizes) == 1
    for rank in ranks:
        assert rank.end() == ""


@linux
def test_kill_9_of_the_owner_leaves_the_memory_to_the_others(key: str) -> None:
    script = """
        open_it(1 << 20)
        ctypes.memset(memory.address, 9, 8)
        print("filled", flush=True)
        wait_for_line()
    """
    owner = Process(key, script)
    assert (owner.line(), owner.line()) == (f"open {MIB}", "filled")
    memory = open_kept(key, 1)
    assert memory.size_bytes == MIB
    owner.kill()
    assert content(memory, 8) == b"\t" * 8
    fill(memory, 10, MIB)
    newer = open_kept(key, 4096)
    assert (newer.size_bytes, newer.is_shared) == (4096, True)
    memory.close()
    newer.close()


def shmem_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


@linux
def test_kill_9_of_all_frees_memory_and_name(key: str) -> None:
    size_bytes = 192 * MIB
    names, before = socket_names(), shmem_bytes()
    script = f"""
        open_it({size_bytes})
        ctypes.memset(memory.address, 1, memory.size_bytes)
        print("filled", flush=True)
        wait_for_line()
    """
    processes = [Process(key, script)]
    assert (processes[0].line(), processes[0].line()) == (f"open {size_bytes}", "filled")
    processes.append(Process(key, script))
    assert (processes[1].line(), processes[1].line()) == (f"open {size_bytes}", "filled")
    assert len(socket_names()) == len(names) + 1
    filled = shmem_bytes() - before
    for process in processes:
        process.kill()
    assert socket_names() == names
    deadline = time.monotonic() + DEADLINE_S
    # Others on this machine use shared memory, too: half of ours must show, and must go.
    assert filled > size_bytes // 2
    while shmem_bytes() - before > size_bytes // 2:
        assert time.monotonic() < deadline, "the kernel still has the memory"
        time.sleep(0.05)


@linux
def test_a_forked_child_has_the_memory_but_neither_serves_nor_frees_it(key: str) -> None:
    script = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, in 3.12
        open_it(1 << 20)
        inside, outside = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            ctypes.memset(memory.address, 5, 8)
            os.write(inside[1], b"x")
            os.read(outside[0], 1)
            memory.close()
            memory.close()
            again = open_kept(key, 4096)  # the parent hands it out as before
            os._exit(0 if ctypes.string_at(again.address, 8) == b"\\5" * 8 else 1)
        os.read(inside[0], 1)
        print(content(8) == b"\\5" * 8, flush=True)
        again = open_kept(key, 4096)
        print(again.size_bytes, flush=True)
        os.write(outside[1], b"x")
        print(os.waitpid(child, 0)[1], flush=True)
        print(open_kept(key, 4096).size_bytes, flush=True)
    """
    assert Process(key, script).end().split() == [
        *["open", str(MIB), "True", str(MIB), "0", str(MIB)]
    ]


@linux
def test_a_child_that_outlives_the_owner_does_not_hold_the_name(key: str) -> None:
    script = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        open_it(1 << 20)
        child = os.fork()
        if not child:
            os.close(0), os.close(1), os.close(2)
            time.sleep(600)
        print(child, flush=True)
        wait_for_line()
    """
    owner = Process(key, script)
    assert owner.line() == f"open {MIB}"
    child = int(owner.line())
    try:
        owner.kill()
        memory = open_kept(key, 4096)
        assert (memory.size_bytes, memory.is_shared) == (4096, True)
        memory.close()
    finally:
        os.kill(child, signal.SIGKILL)


@linux
def test_nobody_can_change_its_size(key: str) -> None:
    memory = open_kept(key, MIB)
    with open(memory_files()[0], "r+b") as file:
        for size_bytes in (0, 4096, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(file.fileno(), size_bytes)
    memory.close()


@linux
def test_it_does_not_lie_in_dev_shm(key: str) -> None:
    """So a container's 64 MB there are no limit."""
    memory = open_kept(key, MIB)
    shm = os.stat("/dev/shm").st_dev
    assert memory_files()
    assert all(os.stat(file).st_dev != shm for file in memory_files())
    memory.close()


@as_root
@linux
def test_a_small_dev_shm_is_no_limit(key: str) -> None:
    mounted = "mount -t tmpfs -o size=64k none /dev/shm && df --output=size /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small /dev/shm")
    script = """
        import subprocess
        os.unshare(os.CLONE_NEWNS) if hasattr(os, "unshare") else ctypes.CDLL(None).unshare(0x20000)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"], check=True)
        open_it(8 << 20)
        ctypes.memset(memory.address, 1, memory.size_bytes)
        print(os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_bsize)
    """
    assert Process(key, script).end().split() == ["open", str(8 * MIB), "65536"]


@linux
def test_close_is_idempotent_and_garbage_is_closed(key: str) -> None:
    memory = open_kept(key, MIB)
    threads = [threading.Thread(target=memory.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.close()
    assert memory.address == 0
    first, second = open_kept(key, MIB), open_kept(key, 4096)
    assert second.size_bytes == MIB
    del first, second  # the fixture sees to it that nothing is left
    gc.collect()
    newest = open_kept(key, 4096)
    assert newest.size_bytes == 4096
    newest.close()


@linux
def test_it_is_mapped_until_the_process_ends(key: str) -> None:
    """Threads of an engine may still write to it when the interpreter calls what ends with it."""
    script = """
        import atexit
        atexit.register(lambda: print(content(3)))
        open_it(1 << 20)
        ctypes.memset(memory.address, 65, 3)
    """
    assert Process(key, script).end().splitlines() == [f"open {MIB}", "b'AAA'"]


@linux
def test_threads_that_open_and_close_at_once_see_whole_memory(key: str) -> None:
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            memory = open_kept(key, MIB)
            if not memory.is_shared or memory.size_bytes != MIB:
                wrong.append(memory.notes)
            fill(memory, 1, 4096, offset=MIB - 4096)
            ram_budget("auto", GB, limits=machine())
            memory.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert wrong == []


@pytest.mark.parametrize(("size_bytes", "num_ranks"), [(0, 1), (-1, 1), (1, 0)])
def test_sizes_and_ranks_must_be_positive(key: str, size_bytes: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        open_kept(key, size_bytes, num_ranks=num_ranks)


# ---- Where sharing fails ----


def assert_private(memory: KeptMemory, size_bytes: int, why: str) -> None:
    assert (memory.is_shared, memory.size_bytes) == (False, size_bytes)
    assert len(memory.notes) == 1
    assert "can't share memory for kept blocks" in memory.notes[0]
    assert why in memory.notes[0]
    fill(memory, 1, size_bytes)
    memory.close()


@as_root
@linux
def test_the_name_held_by_another_user(key: str) -> None:
    script = f"""
        import socket
        os.setuid({NO_SUCH_USER})
        listener = socket.socket(socket.AF_UNIX)
        listener.bind({name_of(key)!r}.replace("@", "\\0"))
        listener.listen()
        print("holds it", flush=True)
        wait_for_line()
        listener.close()
    """
    squatter = Process(key, script)
    assert squatter.line() == "holds it", squatter.popen.stderr.read()
    assert_private(open_kept(key, 8 * MIB, num_ranks=4), 2 * MIB, f"user {NO_SUCH_USER} holds")
    squatter.end()


@as_root
@linux
def test_another_user_who_asks_gets_nothing(key: str) -> None:
    name = name_of(key)
    memory = open_kept(key, MIB)
    script = f"""
        import socket
        os.setuid({NO_SUCH_USER})
        connection = socket.socket(socket.AF_UNIX)
        connection.connect({name!r}.replace("@", "\\0"))
        print(socket.recv_fds(connection, 100, 1)[:2])
        connection.close()
    """
    assert Process(key, script).end() == "(b'', [])"
    memory.close()


@linux
def test_the_user_on_the_other_side_is_checked_on_both_sides(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the two tests above, where the tests don't run as root."""
    owner = open_kept(key, MIB)
    monkeypatch.setattr(ram, "_uid_of_peer", lambda _: NO_SUCH_USER)
    assert "user 54321" in open_kept(key, MIB, num_ranks=2).notes[0]
    main = threading.get_ident()
    monkeypatch.setattr(
        ram, "_uid_of_peer", lambda _: os.geteuid() + (threading.get_ident() != main)
    )
    monkeypatch.setattr(ram, "_PATIENCE_S", 0.2)
    assert_private(open_kept(key, 2 * MIB, num_ranks=2), MIB, "sends none")
    owner.close()


@pytest.fixture
def squat(key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that takes a key's name and answers one process with a message and a file."""
    monkeypatch.setattr(ram, "_PATIENCE_S", 0.3)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name_of(key).replace("@", "\0"))
    threads: list[threading.Thread] = []

    def answer(message: bytes, file: int) -> None:
        with listener.accept()[0] as connection:
            socket.send_fds(connection, [message], [file])

    def start(message: bytes, file: int) -> None:
        listener.listen()
        threads.append(threading.Thread(target=answer, args=(message, file)))
        threads[0].start()

    yield start
    for thread in threads:
        thread.join(DEADLINE_S)
    listener.close()


@linux
@pytest.mark.usefixtures("squat")
def test_a_name_that_is_bound_but_never_listens(key: str) -> None:
    assert_private(open_kept(key, 2 * MIB, num_ranks=2), MIB, "sends none")


@linux
def test_an_owner_that_is_stopped(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "_PATIENCE_S", 0.3)
    owner = Process(key, "open_it(1 << 20); wait_for_line()")
    assert owner.line() == f"open {MIB}"
    owner.popen.send_signal(signal.SIGSTOP)
    os.waitpid(owner.popen.pid, os.WUNTRACED)  # its threads run on until then
    assert_private(open_kept(key, 2 * MIB, num_ranks=2), MIB, "sends none")
    owner.popen.send_signal(signal.SIGCONT)
    owner.end()


@linux
def test_a_file_that_somebody_could_cut_short_is_not_mapped(
    key: str, squat: Callable[..., None]
) -> None:
    file = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, MIB)
    squat(f"imagenet-seq kept blocks, {MIB} bytes".encode(), file)
    assert_private(open_kept(key, 2 * MIB, num_ranks=2), MIB, "not sealed")
    os.close(file)


@linux
def test_a_file_that_is_no_memory_is_not_mapped(
    key: str, squat: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    with open(tmp_path / "file", "r+b") as file:
        squat(f"imagenet-seq kept blocks, {MIB} bytes".encode(), file.fileno())
        assert_private(open_kept(key, 2 * MIB, num_ranks=2), MIB, "share")


@linux
def test_a_program_that_says_something_else(key: str, squat: Callable[..., None]) -> None:
    squat(b"hello", 0)
    assert_private(open_kept(key, 2 * MIB, num_ranks=2), MIB, "got b'hello'")


def refuse(*_: object) -> int:
    raise PermissionError(errno.EPERM, "Operation not permitted")


class SocketWithoutBind(socket.socket):
    bind = refuse


@linux
@pytest.mark.parametrize(
    ("module", "name", "replacement", "why"),
    [
        (sys, "platform", "darwin", "it takes Linux"),
        (socket, "socket", refuse, "Operation not permitted"),
        (socket, "socket", SocketWithoutBind, "Operation not permitted"),
        (native, "memory_file", refuse, "Operation not permitted"),
        (ram, "read_number", lambda *_: 2, "vm.overcommit_memory is 2"),
    ],
)
def test_a_system_that_forbids_sharing(
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    replacement: object,
    why: str,
) -> None:
    monkeypatch.setattr(module, name, replacement)
    assert_private(open_kept(key, 4 * MIB, num_ranks=4), MIB, why)
    before = ram_budget("auto", 146 * GB, limits=machine()).kept_bytes
    alone = open_kept(key, 4 * MIB)
    assert (alone.size_bytes, alone.notes) == (4 * MIB, ())  # one rank loses nothing
    assert ram_budget("auto", 146 * GB, limits=machine()).kept_bytes == before - 2 * MIB
    alone.close()


@linux
def test_memory_that_the_system_refuses_is_done_without(key: str) -> None:
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        memory = open_kept(key, 1 << 36)
        print(memory.size_bytes, memory.address, len(os.listdir("/proc/self/fd")), memory.notes)
        memory.close()
    """
    size_bytes, address, num_files, note = Process(key, script).end().split(maxsplit=3)
    assert (size_bytes, address, num_files) == ("0", "0", "4")  # three, and the listing
    assert "no blocks are kept in memory: 68.7 GB were refused" in note


# ---- Locking ----


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "limits", lambda: machine(memlock_bytes=8 * MIB, has_swap=True))


@linux
@pytest.mark.usefixtures("swap")
def test_memory_is_locked_page_by_page_as_it_is_filled(key: str) -> None:
    def smaps(memory: KeptMemory) -> dict[str, list[str]]:
        """The kernel's lines on the mapping, by their names."""
        text = Path("/proc/self/smaps").read_text().split(f"\n{memory.address:08x}-")[1]
        lines = (line.split() for line in text.split("VmFlags:")[0].splitlines()[1:])
        flags = text.split("VmFlags:")[1].splitlines()[0].split()
        return {"VmFlags:": flags, **{name: values for name, *values in lines}}

    size_bytes = 64 * 1024  # within what every system allows
    memory = open_kept(key, size_bytes)
    assert memory.notes == ()
    assert "lo" in smaps(memory)["VmFlags:"]
    assert "dd" in smaps(memory)["VmFlags:"], "and is not in core dumps"
    assert smaps(memory)["Locked:"] == ["0", "kB"]
    fill(memory, 1, size_bytes)
    assert smaps(memory)["Locked:"] == ["64", "kB"]
    memory.close()


@linux
@pytest.mark.usefixtures("swap")
def test_where_locking_is_refused_a_note_says_what_to_do(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "lock_on_fault", lambda *_: errno.ENOMEM)
    memory = open_kept(key, 64 * MIB)
    (note,) = memory.notes
    assert "(67.1 MB) can't be locked in memory (Cannot allocate memory; limit 8.4 MB)" in note
    assert "ulimit -l unlimited" in note
    assert "docker run --ulimit memlock=-1" in note
    assert memory.is_shared
    memory.close()


@linux
def test_without_swap_nothing_is_locked(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "limits", lambda: machine(memlock_bytes=0, has_swap=False))
    monkeypatch.setattr(native, "lock_on_fault", lambda *_: errno.EPERM)
    memory = open_kept(key, MIB)
    assert memory.notes == ()
    memory.close()


@linux
def test_a_key_of_any_text_and_length(key: str) -> None:
    odd = key + "\udcff" + hashlib.sha256(key.encode()).hexdigest() * 100
    first, second = open_kept(odd, MIB), open_kept(odd, 1)
    assert (second.is_shared, second.size_bytes) == (True, MIB)
    first.close()
    second.close()
