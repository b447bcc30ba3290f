"""Turns at a disk with one head, taken by all processes that read from it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator

from imagenet_seq.read.disk import Disk, choose_disk, sanitised

_LOCK_WAIT_S = 3.0
"""How long to wait for another process that measures, or that reads a block, of the same disk."""


# ---- taking turns --------------------------------------------------------------------------------


def lock_path(disk: Disk) -> str:
    """Return the file whose flock(2) the readers of a disk with one head take in turns.

    The file exists then, and any user can open it for reading, which is all that flock needs:
    opening it with O_CREAT may fail for other users (fs.protected_regular). It lies in
    $IMAGENET_SEQ_LOCKS, or in imagenet-seq-locks in the folder for temporary files; containers that
    read the same disk need one such folder in common.

    Returns:
        "" where the disk needs no lock or none can be made (then its readers don't take turns).
    """
    return lock_file(disk.device) if disk.has_one_head else ""


def lock_file(device: str) -> str:
    try:
        folder = os.environ.get("IMAGENET_SEQ_LOCKS") or os.path.join(
            tempfile.gettempdir(),  # raises where no folder can be written, as in some containers
            "imagenet-seq-locks",
        )
        path = os.path.join(folder, f"{sanitised(device)}.lock")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            os.chmod(folder, 0o1777)  # past the umask: other users take turns, too
        # Someone else may have been here first with a link to what is not theirs.
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            return ""
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.fchmod(handle, 0o666)
            os.close(handle)
        return path if stat.S_ISREG(os.lstat(path).st_mode) else ""
    except OSError:
        return ""


@contextlib.contextmanager
def turn(lock: str) -> Iterator[bool]:
    """Hold a lock where there is one; yields False where others held it for all of 3 s."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(lock, "rb"))
        except OSError:  # also where there is no lock: ""
            yield True
            return
        until = time.monotonic() + _LOCK_WAIT_S
        is_mine = False
        while not is_mine and time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_mine = True
            except OSError:
                time.sleep(0.01)
        yield is_mine


class Turns:
    """What a thread holds while it reads for a python block: its turn at the disk of `path`.

    A disk with one head that goes to and fro between several long reads is slow, whichever threads
    and processes they are of. Other disks need no turns.
    """

    def __init__(self, path: str) -> None:
        where = choose_disk(path)
        self.are_needed = where.has_one_head
        self._threads = threading.Lock()
        self._processes = lock_path(where)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> None:
        if not self.are_needed:
            return
        held = contextlib.ExitStack()
        held.enter_context(self._threads)
        with held:
            held.enter_context(turn(self._processes))
            self._held = held.pop_all()

    def __exit__(self, *unused: object) -> None:
        if self.are_needed:
            self._held.close()
