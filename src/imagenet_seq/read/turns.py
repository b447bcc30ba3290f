"""The lock under which processes read from a hard disk in turns."""

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
"""How long to wait for another process that measures the disk or reads a block from it."""


def lock_path(disk: Disk) -> str:
    """Return the lock file of a disk, made by `lock_file`.

    Returns:
        "" where the disk is no hard disk, or where no lock file can be made.
    """
    return lock_file(disk.device) if disk.has_one_head else ""


def lock_file(device: str) -> str:
    """Return the file of a device for flock(2), and make it if need be.

    It is in $IMAGENET_SEQ_LOCKS, or in imagenet-seq-locks in the folder for temporary files;
    containers that read the same disk must share this folder. Any user can open the file for
    reading, which is all that flock needs. Opening it with O_CREAT may fail for other users
    (fs.protected_regular).

    Returns:
        "" where it can't be made: then readers don't take turns.
    """
    try:
        folder = os.environ.get("IMAGENET_SEQ_LOCKS") or os.path.join(
            tempfile.gettempdir(),  # raises where no folder can be written, as in some containers
            "imagenet-seq-locks",
        )
        path = os.path.join(folder, f"{sanitised(device)}.lock")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            os.chmod(folder, 0o1777)  # other users need it too, whatever the umask
        # Another user may have made a link to a folder or file that isn't theirs.
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
    """Hold a lock file's lock, if there is a file; yields False if others held it for 3 s."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(lock, "rb"))
        except OSError:  # also of "", no lock file
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
    """A lock that a thread holds while it reads a python block from the disk of `path`.

    A hard disk whose head moves between several long reads is slow, whether they come from threads
    or processes. For other disks the lock does nothing.
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
