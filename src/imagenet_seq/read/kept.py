"""Memory for kept blocks, made once a node: all processes of a user that open a key share it.

The memory is a memfd: a file without a name, which the kernel frees when no process has it open or
mapped, so kill -9 leaves nothing behind. It is not in /dev/shm, so the size of that (64 MB in many
containers) doesn't matter. The system counts it as shared memory (``shared`` in ``free``, ``Shmem``
in /proc/meminfo), and charges each page to the cgroup of the process that filled it. The first
process hands the file to the others over a Unix socket in the abstract namespace, whose name also
disappears when that process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagenet_seq import native
from imagenet_seq.machine import limits, read_number
from imagenet_seq.text import format_bytes

_PATIENCE_S = 5.0  # how long to wait for a process that holds the name but doesn't answer
_PAUSE_S = 0.01


# ---- The memory ----


class KeptMemory:
    """Memory for kept blocks, shared by the processes of this user and node that open one key.

    Made by `open_kept`. It is zero at first, and a page uses memory once it is written. A forked
    child shares the same memory. The kernel frees it when every process has closed it or ended.
    """

    def __init__(
        self, memory: mmap.mmap | None, file: int, giver: _Giver | None, notes: tuple[str, ...]
    ) -> None:
        self.size_bytes = len(memory) if memory else 0  # 0: none, and `notes` says why
        self.is_shared = file >= 0  # other processes with the same key get this memory
        self.notes = notes  # what the user should know
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

        The caller must hold a reference to this object, and must not use the address after `close`.
        """
        return self._address if self._release.alive else 0

    def close(self) -> None:
        """Unmap the memory and stop handing it out; other processes keep theirs.

        Idempotent, thread-safe. An engine that uses the memory must be closed first.
        """
        self._release()


def open_kept(key: str, size_bytes: int, *, num_ranks: int = 1) -> KeptMemory:
    """Make the memory of `key`, or join the processes of this user on this node that have it.

    The first process decides the size, and hands the memory to the others as long as it lives.
    After that the next process makes new memory, and those before it keep theirs. Two jobs with
    the same key share, so the key must contain everything that the content depends on. Versions of
    the package with different native interfaces don't share. Ranks in separate network namespaces
    (one container each) don't see each other, so each makes the whole size: set ``ram=`` there.

    Where sharing is not possible, this process gets its share of the size for itself. Where the
    machine has swap, pages are locked as they are filled, if the limits allow it. Where no memory
    can be had, its `size_bytes` is 0, and a note says why.

    `num_ranks` processes of this node will open it.
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
    """Make memory for this process alone; forked children share it, so it is not copied."""
    size_bytes = size_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    if not size_bytes:
        return KeptMemory(None, -1, None, (f"no blocks are kept in memory: {why}",))
    try:
        memory = mmap.mmap(-1, size_bytes)
    except OSError as error:
        note = f"no blocks are kept in memory: {format_bytes(size_bytes)} were refused: {error}"
        return KeptMemory(None, -1, None, (note,))
    note = (
        f"the {num_ranks} ranks of this node can't share memory for kept blocks, so each keeps "
        f"{format_bytes(size_bytes)} of its own, and may read from disk what another keeps: {why}"
    )
    return KeptMemory(memory, -1, None, (*((note,) if num_ranks > 1 else ()), *_prepare(memory)))


def _prepare(memory: mmap.mmap) -> tuple[str, ...]:
    """Tell the kernel how the memory is used; return what the user should know about that."""
    # Huge pages save TLB misses where the administrator allows them for shared memory. Core dumps
    # should not contain the dataset. MADV_DONTFORK is not used: fork copies no page tables of
    # shared memory, so it would save nothing, and a child's munmap of the hole could hit memory
    # that the child mapped there since.
    for name in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(getattr(mmap, name))
    machine = limits()
    if not machine.has_swap:  # shared memory can't be swapped out
        return ()
    address = np.frombuffer(memory, np.uint8).ctypes.data
    error = native.lock_on_fault(address, len(memory))
    if not error:
        return ()
    limit = "none" if machine.memlock_bytes < 0 else format_bytes(machine.memlock_bytes)
    return (
        f"kept blocks ({format_bytes(len(memory))}) can't be locked in memory "
        f"({os.strerror(error)}; limit {limit}), so under memory pressure the kernel may swap them "
        "out, which is slower than reading them again; allow it with 'ulimit -l unlimited', or in "
        "a container with 'docker run --ulimit memlock=-1'",
    )


# ---- What this process has open ----


@dataclass(frozen=True)
class _Reservation:
    """An open memory: its size, and its file (-1: none), whose status says how much is filled."""

    size_bytes: int
    file: int


_open: dict[int, _Reservation] = {}
_givers: set[_Giver] = set()
_lock = threading.RLock()  # guards both; reentrant: a finaliser may run in the thread that holds it


def _release(memory: mmap.mmap | None, reservation: _Reservation, giver: _Giver | None) -> None:
    with _lock:
        del _open[id(reservation)]
        if reservation.file >= 0:
            os.close(reservation.file)
    if giver:
        giver.stop()
    if memory:
        memory.close()


def unfilled_bytes() -> int:
    """Return the bytes of this process's open memory that no process has written yet."""
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
        giver.close_files()  # else the child would hold the socket's name after its parent's end
    _givers.clear()
    _lock.release()


# The fork waits for the lock, so that the child knows every socket it inherits, and gets it free.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child
)


# ---- Handing the memory from process to process ----


class _Giver:
    """A thread that hands a file to every process of this user that connects to a socket."""

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
            # Sending doesn't block: the message fits in the new socket's buffer.
            with connection, contextlib.suppress(OSError):
                if _uid_of_peer(connection) == os.geteuid():
                    socket.send_fds(connection, [self._greeting], [self._file])
        with _lock:
            _givers.discard(self)
            self.close_files()

    def stop(self) -> None:
        """Free the name and end the thread; in a forked child, which has neither, do nothing."""
        self._is_stopping = True
        with contextlib.suppress(OSError):  # a forked child has closed it
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._thread is not threading.current_thread():  # a finaliser may run in any thread
            self._thread.join(_PATIENCE_S)

    def close_files(self) -> None:
        """Close the socket, which frees its name, and the file."""
        self._listener.close()
        os.close(self._file)


def _socket_name(key: str) -> bytes:
    """Return the name of a key's abstract socket; all users of a network namespace see it."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"\0imagenet-seq-kept-{native.ABI}-{os.geteuid()}-{digest}".encode()


def _greeting(size_bytes: int) -> bytes:
    return f"imagenet-seq kept blocks, {size_bytes} bytes".encode()


def _join_or_make(name: bytes, size_bytes: int) -> tuple[int, _Giver | None]:
    """Return the memory file of a name, and its giver if this process made it.

    Raises:
        OSError: memory can't be shared; the message says why.
    """
    if sys.platform != "linux":
        raise OSError("it takes Linux")
    if read_number(Path("/proc/sys/vm/overcommit_memory"), 0) == 2:
        # A page of a memfd is accounted when it is touched, and SIGBUS follows if it is refused.
        raise OSError("vm.overcommit_memory is 2")
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        made = _make(name, size_bytes)
        if made:
            return made
        try:
            return _join(name), None
        except (ConnectionError, BlockingIOError, TimeoutError) as error:
            # The owner does not listen yet, has just ended, or has very many to answer.
            if time.monotonic() > deadline:
                raise OSError(f"the process that holds socket {_text(name)} sends none") from error
        time.sleep(_PAUSE_S)


def _make(name: bytes, size_bytes: int) -> tuple[int, _Giver] | None:
    """Make the memory and offer it to others; None where another process holds the name."""
    with contextlib.ExitStack() as on_failure:
        listener = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        with _lock:  # a fork must not copy the socket before _givers knows it
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
    """Return the memory file that the holder of a name hands out, after checking it."""
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


# From linux/memfd.h and linux/fcntl.h: a Python built on an old system (conda's, uv's) lacks them.
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 1, 2, 8
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SIZE_IS_FINAL = 1 | 2 | 4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW


def _sealed_memory(size_bytes: int) -> int:
    """Return a memfd whose size nobody can change, so that no access raises SIGBUS."""
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:  # exists since Linux 6.3, and is mandatory where vm.memfd_noexec is 2
        file = native.memory_file("imagenet-seq-kept", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        file = native.memory_file("imagenet-seq-kept", flags)
    try:
        os.ftruncate(file, size_bytes)
        fcntl.fcntl(file, _F_ADD_SEALS, _SIZE_IS_FINAL)
    except OSError:
        os.close(file)
        raise
    return file


def _check_memory(file: int, greeting: bytes) -> None:
    """Raise OSError unless the file is a memfd of the announced size, sealed against changes."""
    size_bytes = os.fstat(file).st_size
    if greeting != _greeting(size_bytes):
        raise OSError(f"expected the greeting {_greeting(size_bytes)!r}, got {greeting!r}")
    if fcntl.fcntl(file, _F_GET_SEALS) & _SIZE_IS_FINAL != _SIZE_IS_FINAL:
        raise OSError("the received memory is not sealed against changes of its size")


def _uid_of_peer(connection: socket.socket) -> int:
    """Return the effective user id of the process on the other side, from the kernel."""
    layout = struct.Struct("3i")  # struct ucred: pid, uid, gid
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return int(layout.unpack(ucred)[1])


def _text(name: bytes) -> str:
    return name.decode().replace("\0", "@")
