"""Measures how fast a disk is, on the data itself; results are cached for a month."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import BinaryIO, NamedTuple

from imagenet_seq.machine import cache_folder
from imagenet_seq.read.disk import SYS, Disk, read_text, sanitised
from imagenet_seq.read.turns import lock_file, turn

_FASTEST_HEAD_MS = 2.0
"""Bound on the positioning time of hard disks: half a turn at 15,000 rpm takes 2.0 ms."""


@dataclass(frozen=True)
class Speed:
    """The measured speed of a disk."""

    sequential_mb_s: float  # rate of large reads, MB = 10**6 bytes
    positioning_ms: float  # median time of a 4 KB read at a random place of the data
    measured_at: str  # day, ISO 8601


def effective(disk: Disk, speed: Speed | None) -> Disk:
    """Return `disk`, as an SSD if it is faster than any hard disk, unless the user chose its kind.

    Virtual machines may call every disk rotational, and a hard disk may have a faster cache.
    """
    is_too_fast = speed is not None and speed.positioning_ms < _FASTEST_HEAD_MS
    if disk.kind == "hdd" and not disk.chosen and is_too_fast:
        return replace(disk, kind="ssd")
    return disk


# ---- Measuring ----

_PAGE_BYTES = 4096
"""Size of small reads, and the alignment that O_DIRECT needs on all current disks."""

_LARGEST_RUN_BYTES = 16 << 20
_FIRST_RUN_BYTES = 1 << 20
_LARGE_FILE_BYTES = 64 << 20
_NUM_FILES = 8
_NUM_PLACES = 16

_MEMORY_MB_S = 20_000.0
_MEMORY_MS = 0.02
"""Faster reads than these two came from memory, even if O_DIRECT was asked for."""

_KEPT_DAYS = 30


class _Probe(NamedTuple):
    """Times of a small read at a random place, and of a large one directly behind it."""

    positioning_s: float
    run_bytes: int
    run_s: float


def measure(files: Sequence[str], seed: int = 0, seconds: float = 1.0) -> Speed | None:
    """Measure the disk of `files` by reading them at random places, past the page cache.

    At each place 4 KB are read, which moves the head there, and then up to 16 MB behind them. The
    first read gives the positioning time, the second the sequential rate. Small files are read to
    their end, which measures the rate less well. Data of less than about 100 MB, or data that has
    just been read, can't be measured: it may come from the disk's own cache.
    Of many files 8 are read, which `seed` chooses. A read that is under way after so many seconds
    gets the same time again. If the disk does not answer, this function returns, and its thread
    stays behind.

    Returns:
        None where nothing was measured: no file of at least 8 KB, no answer in time, or reads so
        fast that they came from memory.
    """
    if not files:
        return None
    probes: list[_Probe] = []
    until = time.monotonic() + seconds
    # In a thread, because a read from a disk that does not answer can't be interrupted.
    reader = threading.Thread(
        target=_probe, args=(files, seed, until, probes), daemon=True, name="measure disk"
    )
    reader.start()
    reader.join(2 * seconds)
    done = list(probes)
    if not done:
        return None
    # Medians, because other programs and the scheduler delay some of the reads.
    largest = max(probe.run_bytes for probe in done)
    runs = [probe for probe in done if 2 * probe.run_bytes >= largest]
    rate = statistics.median(run.run_bytes / max(run.run_s, 1e-9) for run in runs) / 1e6
    positioning = statistics.median(probe.positioning_s for probe in done) * 1e3
    if rate > _MEMORY_MB_S or positioning < _MEMORY_MS:
        return None
    return Speed(round(rate, 1), round(positioning, 3), date.today().isoformat())


def _probe(files: Sequence[str], seed: int, until: float, probes: list[_Probe]) -> None:
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        buffer = memoryview(stack.enter_context(mmap.mmap(-1, _LARGEST_RUN_BYTES)))
        stack.callback(buffer.release)
        opened = _open_some(files, rng, until, stack)
        run_bytes = _FIRST_RUN_BYTES
        for file, offset, rest in _places(opened, rng, buffer[:_PAGE_BYTES]):
            if time.monotonic() >= until:
                return
            begin = time.perf_counter()
            _read_at(file, offset, buffer[:_PAGE_BYTES])
            middle = time.perf_counter()
            done = _read_at(file, offset + _PAGE_BYTES, buffer[: min(run_bytes, rest)])
            run_s = time.perf_counter() - middle
            probes.append(_Probe(middle - begin, done, run_s))
            # Start small: 16 MB from a slow network could take all the time.
            if run_s * _NUM_PLACES < until - time.monotonic():
                run_bytes = min(2 * run_bytes, _LARGEST_RUN_BYTES)


def _open_some(
    files: Sequence[str], rng: random.Random, until: float, stack: contextlib.ExitStack
) -> list[tuple[BinaryIO, int]]:
    """Open some files, with O_DIRECT where that works; return each with its size."""
    chosen = rng.sample(range(len(files)), min(_NUM_FILES + 1, len(files)))
    flags = os.O_DIRECT if reads_direct(files[chosen[0]]) else 0
    opened = []
    # Not the first: a page of it has just been read, so the disk's cache may hold it.
    for path in (files[number] for number in chosen[1:] or chosen):
        if time.monotonic() >= until:
            break
        file = stack.enter_context(_open(path, flags))
        if not flags and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead at all
        opened.append((file, os.fstat(file.fileno()).st_size))
    return opened


def _places(
    opened: list[tuple[BinaryIO, int]], rng: random.Random, page: memoryview
) -> Iterator[tuple[BinaryIO, int, int]]:
    """Yield places in files: (file, offset, number of bytes behind the page there)."""
    large = [(file, size) for file, size in opened if size >= _LARGE_FILE_BYTES]
    for file, size in opened:
        if (file, size) not in large and size >= 2 * _PAGE_BYTES:
            yield file, 0, size // _PAGE_BYTES * _PAGE_BYTES - _PAGE_BYTES
    for file, _ in large:  # reading the extent map costs a disk access: do it before timing
        _read_at(file, 0, page)
    for number in range(_NUM_PLACES if large else 0):
        file, size = large[number % len(large)]
        num_pages = size // _PAGE_BYTES
        place = rng.randrange(1, num_pages - _LARGEST_RUN_BYTES // _PAGE_BYTES)
        yield file, place * _PAGE_BYTES, (num_pages - place - 1) * _PAGE_BYTES


def reads_direct(path: str | os.PathLike[str]) -> bool:
    """Tell whether the file `path` can be read with O_DIRECT, by trying it."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return False
    with contextlib.suppress(OSError), _open(path, direct) as file, mmap.mmap(-1, _PAGE_BYTES) as m:
        file.readinto(m)  # type: ignore[attr-defined]
        return True
    return False


def _open(path: str | os.PathLike[str], flags: int = 0) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    return open(handle, "rb", buffering=0)


def _read_at(file: BinaryIO, offset: int, into: memoryview) -> int:
    file.seek(offset)
    return int(file.readinto(into))  # type: ignore[attr-defined]


# ---- Cached results ----


def speed_of(disk: Disk, files: Sequence[str], *, remeasure: bool = False) -> Speed | None:
    """Return the speed of a disk: a result of the last 30 days, else measured now.

    Of processes that ask at once (the ranks of a node), the first measures, and the others wait for
    its result. A disk whose lock stays taken for 3 s is not measured.
    None where the disk is memory or could not be measured, or there are no `files` to measure with.
    With `remeasure` it is measured even if there is a result.
    """
    if not disk.device:
        return None
    key = _key(disk)
    if not remeasure and (kept := _kept_speeds().get(key)):
        return kept
    if not files:
        return None
    with turn(lock_file(disk.device)) as is_mine:
        if not is_mine:
            return None
        if not remeasure and (kept := _kept_speeds().get(key)):
            return kept
        # Other places each time: those read last may still be in the disk's own cache.
        speed = measure(files, seed=random.randrange(2**32))
        if speed is not None:
            _keep_speed(key, speed)
        return speed


def _key(disk: Disk) -> str:
    """Return a name of a disk that another one with its number after a restart won't have."""
    parts = []
    for number in disk.device.split("+"):
        folder = SYS / "dev" / "block" / number
        facts = [number]
        for file in ("size", "device/model", "device/wwid"):
            with contextlib.suppress(OSError):
                facts.append(sanitised(read_text(folder / file)))
        parts.append(" ".join(facts))
    return " + ".join(parts)


def _speeds_file() -> Path:
    return Path(cache_folder(), "disks.json")


def _kept_speeds() -> dict[str, Speed]:
    """Read the results that are not too old; from a damaged file, those that can be read."""
    try:
        entries = json.loads(_speeds_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    speeds = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            rate, positioning = (
                float(str(entry[name])) for name in ("sequential_mb_s", "positioning_ms")
            )
            age = date.today() - date.fromisoformat(str(entry["measured_at"]))
            are_valid = 0 < rate < math.inf and 0 < positioning < math.inf
            if are_valid and 0 <= age.days < _KEPT_DAYS:
                speeds[key] = Speed(rate, positioning, str(entry["measured_at"]))
    return speeds


def _keep_speed(key: str, speed: Speed) -> None:
    """Save a result. Of two processes that save at once, one result may be lost."""
    entries = {key: asdict(speed) for key, speed in {**_kept_speeds(), key: speed}.items()}
    path = _speeds_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="disks.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
