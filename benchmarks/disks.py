"""The disk that a benchmark reads from: a real one, or spindle's model of one (a FUSE file system).

Both give a folder with cold caches (`cold`), count what the disk reads, and measure the sequential
rate of one file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

READ_BYTES = 16 << 20
SEQUENTIAL_BYTES = 1 << 30
LEAST_SEQUENTIAL_BYTES = 256 << 20
MOST_LATE, MOST_LATE_SHARE = 5, 0.01  # replies of the model; of a run's time, waiting for them


class Counters(NamedTuple):
    """The disk's counters, and when they were read."""

    seconds: float  # of time.monotonic(), which all processes share
    read_bytes: int
    requests: int  # metadata included
    seeks: int | None  # None: a real disk does not say
    busy_s: float
    late: int = 0  # replies that the model gave over 1 ms too late
    late_most_s: float = 0.0  # the latest of them


class Disk(Protocol):
    """A disk with a folder on it."""

    def describe(self) -> dict[str, Any]:
        """Describe the disk, for the results."""

    def cold(self, readahead_kb: int | None = None) -> contextlib.AbstractContextManager[Path]:
        """Return the folder, with nothing of it in memory."""

    def reset(self) -> None:
        """Reset the counters, if the disk can."""

    def counters(self) -> Counters | None:
        """Return the counters; None if there are none."""


# ---- spindle -------------------------------------------------------------------------------------


class Spindle:
    """The model, showing `backing` (which should lie in tmpfs) at `mountpoint`."""

    def __init__(
        self, program: Path, backing: Path, mountpoint: Path, options: Sequence[str] = ()
    ) -> None:
        self._program, self._backing, self._mountpoint = program, backing, mountpoint
        self._options = list(options)

    def describe(self) -> dict[str, Any]:
        return {"disk": "spindle", "options": " ".join(self._options)}

    @contextlib.contextmanager
    def cold(self, readahead_kb: int | None = None) -> Iterator[Path]:
        """Mount, which begins with empty caches, and unmount."""
        options = [*self._options, f"--ra-kb={readahead_kb or 128}", "--daemon=1"]
        self._mountpoint.mkdir(parents=True, exist_ok=True)
        command = [str(self._program), *options, str(self._backing), str(self._mountpoint)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            raise SystemExit(f"{made.stdout}{made.stderr}{' '.join(command)}: failed")
        try:
            yield self._mountpoint
        finally:
            self._unmount()

    def _unmount(self) -> None:
        for _ in range(50):  # a process that has just ended may still hold files for a moment
            unmounted = subprocess.run(
                ["umount", str(self._mountpoint)], capture_output=True, text=True
            )
            if unmounted.returncode == 0:
                return
            time.sleep(0.1)
        raise SystemExit(f"umount {self._mountpoint}: {unmounted.stderr}")

    def reset(self) -> None:
        os.getxattr(self._mountpoint, "user.spindle.reset")

    def counters(self) -> Counters:
        told = json.loads(os.getxattr(self._mountpoint, "user.spindle"))
        requests = told["reads"] + told["meta_reads"]
        return Counters(
            time.monotonic(),
            told["bytes"],
            requests,
            told["seeks"],
            told["busy_s"],
            told["late"],
            told["late_max_ms"] / 1e3,
        )


# ---- a real disk ---------------------------------------------------------------------------------


class RealDisk:
    """The disk that a folder lies on."""

    def __init__(self, folder: Path, drop_all: bool) -> None:
        """Args:
        folder: what is read.
        drop_all: empty all of the system's caches, names and inodes included; needs root, and slows
            everybody down. Otherwise only the pages of the folder's files.
        """
        self._folder, self._drop_all = folder, drop_all
        device = os.stat(folder).st_dev
        self._block_device = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")

    def describe(self) -> dict[str, Any]:
        return {"disk": self._block_device.resolve().name, "options": ""}

    @contextlib.contextmanager
    def cold(self, readahead_kb: int | None = None) -> Iterator[Path]:
        """Drop the folder's pages from memory; those that are mapped or being written stay."""
        if readahead_kb is not None:
            raise SystemExit(
                "readahead is set for spindle alone; for a disk: blockdev --setra, before this"
            )
        os.sync()
        if self._drop_all:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        else:
            for path in self._folder.rglob("*"):
                if path.is_file():
                    drop_pages(path)
        yield self._folder

    def reset(self) -> None:
        """Do nothing: the system's counters can't be reset."""

    def counters(self) -> Counters | None:
        """Read the kernel's counts (Documentation/admin-guide/iostats)."""
        try:
            fields = (self._block_device / "stat").read_text().split()
        except OSError:  # a network or stacked file system
            return None
        requests, sectors, milliseconds = int(fields[0]), int(fields[2]), int(fields[9])
        return Counters(time.monotonic(), sectors * 512, requests, None, milliseconds / 1e3)


def drop_pages(path: Path) -> None:
    """Ask the kernel to forget the clean pages of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# ---- measuring -----------------------------------------------------------------------------------


def is_void(seen: Sequence[Counters]) -> bool:
    """Return whether the machine was too slow for the model, which makes the run void.

    A few late replies always happen; more than that may not add up to a hundredth of the run.
    """
    if not seen or seen[-1].late <= MOST_LATE:
        return False
    at_most_s = seen[-1].late * seen[-1].late_most_s
    return at_most_s > MOST_LATE_SHARE * (seen[-1].seconds - seen[0].seconds)


class Watch:
    """Read a disk's counters 20 times a second while something runs."""

    PAUSE_S = 0.05

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.seen: list[Counters] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            ended = self._end.wait(self.PAUSE_S if self.seen else 0)
            if (counters := self._disk.counters()) is not None:
                self.seen.append(counters)
            if ended:
                return


def sequential_rate(path: Path) -> float:
    """Return the MB/s at which up to 1 GB of a file are read in blocks, past the page cache."""
    size = min(path.stat().st_size, SEQUENTIAL_BYTES) // READ_BYTES * READ_BYTES
    if size < LEAST_SEQUENTIAL_BYTES:
        raise SystemExit(
            f"{path}: {path.stat().st_size} bytes are too few to measure the disk; name a file of "
            f"{LEAST_SEQUENTIAL_BYTES >> 20} MB or more on the same disk with --sequential"
        )
    drop_pages(path)
    buffer = mmap.mmap(-1, READ_BYTES)  # page-aligned, as O_DIRECT needs it
    file = open_direct(path)
    try:
        os.preadv(file, [buffer], 0)  # the seek to the file
        begin = time.monotonic()
        for offset in range(READ_BYTES, size, READ_BYTES):
            if os.preadv(file, [buffer], offset) != READ_BYTES:
                raise SystemExit(f"{path}: short read at {offset} of {size} bytes")
        return (size - READ_BYTES) / (time.monotonic() - begin) / 1e6
    finally:
        os.close(file)
        buffer.close()


def open_direct(path: Path) -> int:
    """Open a file with O_DIRECT, or without it if the file system does not have it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)
