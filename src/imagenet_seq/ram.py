"""The RAM budget: how many bytes of a dataset stay in memory, and the memory they stay in.

`budget` turns the user's ``ram=`` and what the machine has into a number of bytes. `open_kept`
makes that memory, once a node: all processes of a user that open the same key share it.

The memory is a memfd: a file without a name that lives as long as a process has it open or mapped,
so nothing is left behind by kill -9. It is not in /dev/shm, whose size (64 MB in many containers)
doesn't matter; the system counts it as shared memory (``shared`` in ``free``, ``Shmem`` in
/proc/meminfo), and the cgroup of the process that filled a page is charged for it. The process that
comes first hands the file to the others over a Unix socket in the abstract namespace, whose name
ends with that process, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import mmap
import os
import re
import resource
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagenet_seq import _native

_PATIENCE_S = 5.0  # for a process that holds the name but doesn't answer
_PAUSE_S = 0.01
_MOST_OF_AVAILABLE = 0.9  # what an explicit ram= may take; training needs memory, too


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
    limit = min(_number(folder / name, math.inf) for name in names)
    used = _number(folder / "memory.current", 0) or _number(folder / "memory.usage_in_bytes", 0)
    stat = _numbers(folder / "memory.stat")
    # Version 1 has both, where the plain one leaves out the cgroups below.
    droppable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return limit, limit - used + droppable


def _number(path: Path, otherwise: float) -> float:
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


# ---- How much is kept ----


@dataclass(frozen=True)
class Budget:
    """How a dataset is kept in memory.

    Attributes:
        page_cache: the whole source fits, so it is read buffered and the kernel keeps it.
        kept_bytes: bytes of blocks to keep in memory of our own, for the whole node; 0: none.
        notes: what the user should know, such as what limited it; () normally.
        reason: where the number comes from, as `describe` says it.
    """

    page_cache: bool
    kept_bytes: int
    notes: tuple[str, ...] = ()
    reason: str = ""


def budget(
    ram: str | int | float | None, dataset_bytes: int, *, limits: Limits | None = None
) -> Budget:
    """Decide how many bytes of a dataset stay in memory.

    Memory that this process opened with `open_kept` and has not filled yet counts as taken. The
    result depends on what is available now, so ranks that start at different times may get
    different numbers: the one whose `open_kept` comes first decides for all.

    Args:
        ram: "auto" (or None): a dataset that fits in half of the available memory is left to
            the page cache; of others, that much is kept in memory of our own. A size ("48GB",
            "512MiB", a number of bytes) or a share of the node's memory as this cgroup may use it
            ("30%"): so much in memory of our own, at most 90 % of what is available. 0: none.
        dataset_bytes: size of all blocks of the dataset.
        limits: what the machine has; None: measure it.

    Raises:
        ValueError: a size that can't be meant.
        TypeError: `ram` is neither text nor a number.
    """
    machine = limits or _measured_limits()
    wanted = _wanted_bytes(ram, machine.total_bytes)
    available = max(0, machine.available_bytes - _unfilled_bytes())
    if wanted is None:
        half = available // 2
        reason = f"half of the {_size(available)} available"
        if dataset_bytes <= half:
            return Budget(True, 0, reason=f"fits in {reason}")
        return Budget(False, half, reason=reason)
    kept, most = min(wanted, dataset_bytes), int(available * _MOST_OF_AVAILABLE)
    if kept <= most:
        return Budget(False, kept, reason=f"ram={ram!r}")
    by = f" under the limit of the cgroup {machine.cgroup}" if machine.cgroup else ""
    note = (
        f"ram={ram!r}: {_size(most)} are kept in memory instead of {_size(kept)}: "
        f"{_size(available)} are available{by}, of which a tenth is left for other uses"
    )
    return Budget(False, most, (note,), f"90 % of the {_size(available)} available")


def describe(budget: Budget, dataset_bytes: int) -> str:
    """Return a budget as one line, such as "keeps 64.0 of 146.2 GB in memory (ram='64GB')"."""
    if budget.page_cache:
        return f"leaves {_size(dataset_bytes)} to the page cache ({budget.reason})"
    if not budget.kept_bytes:
        return f"keeps nothing in memory ({budget.reason})"
    unit, name = _unit(dataset_bytes)
    kept = min(budget.kept_bytes, dataset_bytes)
    return (
        f"keeps {kept / unit:.1f} of {dataset_bytes / unit:.1f} {name} in memory ({budget.reason})"
    )


def _measured_limits() -> Limits:
    return limits()  # `limits` names an argument of budget()


UNITS = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)},
}
"""Bytes of a unit, without the B: "G" is 10**9, "GI" 2**30."""


def _wanted_bytes(ram: str | int | float | None, total_bytes: int) -> int | None:
    """Return the bytes that `ram` asks for; None: as many as fit well."""
    expected = "expected 'auto', a size such as '48GB' or '512MiB', a share such as '30%', or 0"
    if ram is None:
        return None
    if isinstance(ram, bool) or not isinstance(ram, (str, int, float, np.integer)):
        raise TypeError(f"ram: {expected}; got {ram!r}")
    if not isinstance(ram, str):
        wanted = float(ram)
    elif ram.strip().lower() == "auto":
        return None
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?I?B?)", ram.strip().upper())
        unit = match and (
            total_bytes / 100 if match[2] == "%" else UNITS.get(match[2].removesuffix("B"))
        )
        if not match or unit is None or (match[2] == "%" and float(match[1]) > 100):
            raise ValueError(f"ram: {expected}; got {ram!r}")
        wanted = float(match[1]) * unit
    # Less than a page is no size anyone wants: 48 is meant to be GB, 0.3 a share.
    if not (wanted == 0 or 4096 <= wanted < math.inf):
        raise ValueError(f"ram: {expected}; got {ram!r}, which is {wanted:g} bytes")
    return int(wanted)


def _unit(size_bytes: int) -> tuple[float, str]:
    return (1e9, "GB") if size_bytes >= 1e9 else (1e6, "MB")


def _size(size_bytes: int) -> str:
    unit, name = _unit(size_bytes)
    return f"{size_bytes / unit:.1f} {name}"


# ---- The memory ----


class KeptMemory:
    """Memory for kept blocks, shared by all processes of this user on this node with one `key`.

    Made by `open_kept`. It is zero at first, and pages take room as they are written. A forked
    child has the same memory, shared, not copied. The kernel frees it when no process has it any
    more: each has closed it or ended, however it ended.

    Attributes:
        size_bytes: its size; 0: there is none, `notes` says why.
        is_shared: other processes with the same key get this memory.
        notes: what the user should know; () normally.
    """

    def __init__(
        self, memory: mmap.mmap | None, file: int, giver: _Giver | None, notes: tuple[str, ...]
    ) -> None:
        self.size_bytes = len(memory) if memory else 0
        self.is_shared = file >= 0
        self.notes = notes
        self._address = np.frombuffer(memory, np.uint8).ctypes.data if memory else 0
        reservation = _Reservation(self.size_bytes, file)
        with _lock:
            _open[id(reservation)] = reservation
        self._release = weakref.finalize(self, _release, memory, reservation, giver)
        # At the interpreter's end threads of an engine may still use it; the kernel unmaps it.
        self._release.atexit = False

    @property
    def address(self) -> int:
        """Address of the first byte in this process; 0 once closed.

        Whoever uses it must hold a reference to this object, and stop before `close`.
        """
        return self._address if self._release.alive else 0

    def close(self) -> None:
        """Unmap the memory and stop handing it to others, who keep theirs. Idempotent, thread-safe.

        An engine that uses it must be closed first.
        """
        self._release()


def open_kept(key: str, size_bytes: int, *, num_ranks: int = 1) -> KeptMemory:
    """Make the memory of `key`, or join the processes of this user on this node that have it.

    Whoever comes first decides the size, and hands it to the others while it lives; should it be
    gone, the next to come makes new memory, and those before it keep theirs. Two jobs with the
    same key share, so the key must say everything that the content depends on. Versions of the
    package with different native interfaces don't share. Ranks in network namespaces of their own
    (a container each) don't see each other, and each makes the whole size: give them ``ram=``.

    Where sharing is not possible, the memory is this process's own and has its part of the size.
    Where the machine has swap, and the limits allow it, pages are locked as they are filled.

    Args:
        key: what the memory holds, as text of any length.
        size_bytes: the size if this process is the first.
        num_ranks: processes of this node that will open it.

    Returns:
        The memory. It never fails for want of memory: `size_bytes` is 0 then, with a note.
    """
    if size_bytes < 1 or num_ranks < 1:
        raise ValueError(f"expected a positive size and ranks, got {size_bytes} and {num_ranks}")
    try:
        return _open_shared(key, size_bytes)
    except OSError as error:
        return _open_private(size_bytes // num_ranks, num_ranks, error)


def _open_shared(key: str, size_bytes: int) -> KeptMemory:
    file, giver = _join_or_make(_socket_name(key), size_bytes)
    try:
        memory = mmap.mmap(file, os.fstat(file).st_size)
    except OSError:
        if giver:
            giver.stop()
        os.close(file)
        raise
    return KeptMemory(memory, file, giver, _prepare(memory))


def _open_private(size_bytes: int, num_ranks: int, why: OSError) -> KeptMemory:
    """Make memory of this process alone; shared with forked children, so that none is copied."""
    size_bytes = size_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    if not size_bytes:
        return KeptMemory(None, -1, None, (f"no blocks are kept in memory: {why}",))
    try:
        memory = mmap.mmap(-1, size_bytes)
    except OSError as error:
        note = f"no blocks are kept in memory: {_size(size_bytes)} were refused: {error}"
        return KeptMemory(None, -1, None, (note,))
    note = (
        f"the {num_ranks} ranks of this node can't share memory for kept blocks, so each keeps "
        f"its own {_size(size_bytes)}, and reads from disk what others may have: {why}"
    )
    return KeptMemory(memory, -1, None, (*((note,) if num_ranks > 1 else ()), *_prepare(memory)))


def _prepare(memory: mmap.mmap) -> tuple[str, ...]:
    """Tell the kernel how the memory is used; return what the user should know about that."""
    # Huge pages save TLB misses where the administrator allows them for shared memory. A core dump
    # need not hold the dataset. Not MADV_DONTFORK: fork copies no page tables of shared memory, so
    # children cost nothing, and a child's munmap of a hole could hit what it mapped there since.
    for name in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(getattr(mmap, name))
    machine = limits()
    if not machine.has_swap:  # then shared memory has nowhere to go
        return ()
    address = np.frombuffer(memory, np.uint8).ctypes.data
    error = _native.lock_on_fault(address, len(memory))
    if not error:
        return ()
    limit = "none" if machine.memlock_bytes < 0 else _size(machine.memlock_bytes)
    return (
        f"kept blocks ({_size(len(memory))}) can't be locked in memory ({os.strerror(error)}; "
        f"limit {limit}), so under memory pressure the kernel may swap them out, which is slower "
        "than reading them again; allow it with 'ulimit -l unlimited', or in a container with "
        "'docker run --ulimit memlock=-1'",
    )


# ---- What this process has open ----


@dataclass(frozen=True)
class _Reservation:
    """An open memory: its size, and its file (-1: none) that says how much of it is filled."""

    size_bytes: int
    file: int


_open: dict[int, _Reservation] = {}
_givers: set[_Giver] = set()
_lock = threading.RLock()  # guards both; a finaliser may run in the thread that holds it


def _release(memory: mmap.mmap | None, reservation: _Reservation, giver: _Giver | None) -> None:
    with _lock:
        del _open[id(reservation)]
        if reservation.file >= 0:
            os.close(reservation.file)
    if giver:
        giver.stop()
    if memory:
        memory.close()


def _unfilled_bytes() -> int:
    """Return what this process has open and nobody has written yet."""
    unfilled = {}
    with _lock:
        for own, reservation in _open.copy().items():
            if reservation.file < 0:
                unfilled[own] = reservation.size_bytes
            else:  # memory that is open twice counts once
                status = os.fstat(reservation.file)
                unfilled[status.st_ino] = status.st_size - status.st_blocks * 512
    return sum(max(0, size) for size in unfilled.values())


def _after_fork_in_child() -> None:
    for giver in _givers:
        giver.close_files()  # a child that had the socket would hold its name beyond its owner
    _givers.clear()
    _lock.release()


# Held across a fork, the lock is free in the child, and no giver's socket goes there unseen.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child
)


# ---- Handing the memory from process to process ----


class _Giver:
    """Hands a file to every process of this user that connects to a socket, until stopped."""

    def __init__(self, listener: socket.socket, file: int) -> None:
        self._listener = listener
        self._file = os.dup(file)
        self._greeting = _greeting(os.fstat(file).st_size)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="imagenet-seq-kept", daemon=True)
        self._thread.start()
        _givers.add(self)

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                connection = self._listener.accept()[0]
            except OSError:  # stopped; or out of file descriptors for now
                time.sleep(_PAUSE_S)
                continue
            # Neither waits for the other side: the message fits in the new socket's buffer.
            with connection, contextlib.suppress(OSError):
                if _uid_of_peer(connection) == os.geteuid():
                    socket.send_fds(connection, [self._greeting], [self._file])
        with _lock:
            _givers.discard(self)
            self.close_files()

    def stop(self) -> None:
        """Free the name and end the thread; nothing is left to do in a forked child."""
        self._is_stopping = True
        with contextlib.suppress(OSError):  # closed, in a forked child
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._thread is not threading.current_thread():  # garbage is collected in any thread
            self._thread.join(_PATIENCE_S)

    def close_files(self) -> None:
        """Close the socket, which frees its name, and the file."""
        self._listener.close()
        os.close(self._file)


def _socket_name(key: str) -> bytes:
    """Return the abstract socket's name, which all users of one network namespace share."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"\0imagenet-seq-kept-{_native.ABI}-{os.geteuid()}-{digest}".encode()


def _greeting(size_bytes: int) -> bytes:
    return f"imagenet-seq kept blocks, {size_bytes} bytes".encode()


def _join_or_make(name: bytes, size_bytes: int) -> tuple[int, _Giver | None]:
    """Return the memory file of a name, and the giver if this process made it.

    Raises:
        OSError: nothing can be shared; the message says why.
    """
    if sys.platform != "linux":
        raise OSError("it takes Linux")
    if _number(Path("/proc/sys/vm/overcommit_memory"), 0) == 2:
        # A page of a memfd is accounted when it is touched, and refusing it means SIGBUS.
        raise OSError("vm.overcommit_memory is 2")
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        made = _make(name, size_bytes)
        if made:
            return made
        try:
            return _join(name), None
        except (ConnectionError, BlockingIOError, TimeoutError) as error:
            # The owner does not listen yet, or has just gone, or is asked by very many.
            if time.monotonic() > deadline:
                raise OSError(f"the process that holds socket {_text(name)} sends none") from error
        time.sleep(_PAUSE_S)


def _make(name: bytes, size_bytes: int) -> tuple[int, _Giver] | None:
    """Make the memory and offer it to others; None where somebody holds the name."""
    with contextlib.ExitStack() as on_failure:
        listener = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        with _lock:  # a fork must not carry the socket into a child unseen
            try:
                listener.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return None
            listener.listen(128)
            file = _sealed_memory(size_bytes)
            on_failure.callback(os.close, file)
            giver = _Giver(listener, file)
        on_failure.pop_all()
        return file, giver


def _join(name: bytes) -> int:
    """Return the memory file that the holder of a name hands out, once it is known to be sound."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE_S)
        connection.connect(name)
        uid = _uid_of_peer(connection)
        if uid != os.geteuid():
            raise PermissionError(f"user {uid} holds socket {_text(name)}")
        greeting, files, _, _ = socket.recv_fds(connection, 256, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise ConnectionResetError("closed before it sent a file")
    try:
        _check_memory(files[0], greeting)
    except OSError:
        os.close(files[0])
        raise
    return files[0]


# Of linux/memfd.h and linux/fcntl.h: a Python that was built on an old system (conda's, uv's) does
# not have them, although it runs on a new one.
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 1, 2, 8
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SIZE_IS_FINAL = 1 | 2 | 4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW


def _sealed_memory(size_bytes: int) -> int:
    """Return a memfd whose size nobody can change, so that no access ends in SIGBUS."""
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:  # from Linux 6.3, and some systems insist on it
        file = _native.memory_file("imagenet-seq-kept", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        file = _native.memory_file("imagenet-seq-kept", flags)
    try:
        os.ftruncate(file, size_bytes)
        fcntl.fcntl(file, _F_ADD_SEALS, _SIZE_IS_FINAL)
    except OSError:
        os.close(file)
        raise
    return file


def _check_memory(file: int, greeting: bytes) -> None:
    """Raise OSError unless the file is a memfd of the announced size, and that for good."""
    size_bytes = os.fstat(file).st_size
    if greeting != _greeting(size_bytes):
        raise OSError(f"expected the greeting {_greeting(size_bytes)!r}, got {greeting!r}")
    if fcntl.fcntl(file, _F_GET_SEALS) & _SIZE_IS_FINAL != _SIZE_IS_FINAL:
        raise OSError("the memory that came is not sealed against changes of its size")


def _uid_of_peer(connection: socket.socket) -> int:
    """Return the effective user of the process on the other side, as the kernel knows it."""
    layout = struct.Struct("3i")  # struct ucred: pid, uid, gid
    return int(
        layout.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))[1]
    )


def _text(name: bytes) -> str:
    return name.decode().replace("\0", "@")
