"""The folder DESTINATION.partial that a run works in: locked, continued and deleted here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator

from imagenet_seq.errors import PackError
from imagenet_seq.sources.formats.pack import SETTINGS_FILE
from imagenet_seq.text import format_bytes

JOURNAL_FILE, PACK_FOLDER, LMDB_FILE, _LOCK_FILE = "dealt", "pack", "lmdb", "lock"

_OURS = re.compile(r"(dealt|lmdb|(deal|split|rows)-\d{6,})(\.tmp)?|settings\.json\.tmp")
"""What packing writes into DESTINATION.partial, beside settings, lock and the folder `pack`."""

_OURS_IN_PACK = re.compile(
    r"(shard-\d{6,}\.tar|(index|names|names_begin)\.npy|(pack|failures)\.json)(\.tmp)?"
)


@contextlib.contextmanager
def claim_destination(partial: str) -> Iterator[None]:
    """Make the folder and hold its lock, which the kernel releases when the process ends."""
    _refuse_files_of_others(partial)
    os.makedirs(partial, exist_ok=True)
    path = os.path.join(partial, _LOCK_FILE)
    with open(path, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held the lock may have finished and deleted the folder.
            held = os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise PackError(
                f"{path}: this file system has no file locks ({error.strerror}), which keep two "
                "runs apart: pack to another one, and copy the finished pack"
            ) from error
        if not held:
            raise PackError(f"{partial}: another process is packing there; wait for it, or stop it")
        os.makedirs(os.path.join(partial, PACK_FOLDER), exist_ok=True)
        yield


def _refuse_files_of_others(partial: str) -> None:
    """Refuse a folder that packing did not make: nothing in it may be touched.

    A folder that packing made has its lock first and loses it last.
    """
    lock = os.path.join(partial, _LOCK_FILE)
    is_folder = os.path.isdir(partial) and not os.path.islink(partial)
    has_lock = os.path.isfile(lock) and not os.path.islink(lock)
    ours = is_folder and (has_lock or not os.listdir(partial))
    if os.path.lexists(partial) and not ours:
        raise PackError(
            f"{partial}: exists and was not made by imagenet-seq pack: move it, or name another "
            "destination"
        )


def clear_scrap(partial: str) -> None:
    """Delete leftovers of a run killed after its last rename.

    A folder that packing did not make, or that another process holds, stays.
    """
    if os.path.lexists(partial):
        with contextlib.suppress(PackError), claim_destination(partial):
            delete_scrap(partial)


def delete_scrap(partial: str) -> None:
    """Delete the files that packing made, which it knows by name; others stay.

    Settings and lock go last, so that after an interrupted deletion the folder is still known.
    """
    pack_folder = os.path.join(partial, PACK_FOLDER)
    if os.path.isdir(pack_folder):
        _delete_in(pack_folder, filter(_OURS_IN_PACK.fullmatch, os.listdir(pack_folder)))
    ours = filter(_OURS.fullmatch, os.listdir(partial))
    _delete_in(partial, [*ours, SETTINGS_FILE, _LOCK_FILE])


def _delete_in(folder: str, names: Iterable[str]) -> None:
    """Delete files of a folder, and the folder if nothing else is in it."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextlib.contextmanager
def explain_write_errors(partial: str) -> Iterator[None]:
    """Say how to continue after the operating system refused to write."""
    try:
        yield
    except OSError as error:
        how = f"What is done is kept in {partial}: run the same command again to continue"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(os.path.dirname(partial)).free
            raise PackError(
                f"{error}: the disk is full ({format_bytes(free)} free). {how} once there is room, "
                "or delete that folder"
            ) from error
        raise PackError(f"{error}. {how}") from error
