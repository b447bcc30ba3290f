"""How fast a disk is: measured once on the data itself, and kept for a month."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import BinaryIO, NamedTuple

from imagenet_seq.machine import cache_folder
from imagenet_seq.read.disk import SYS, Disk, read_text, sanitised
from imagenet_seq.read.turns import lock_file, turn

_FASTEST_HEAD_MS = 2.0
"""No disk with a head finds a random place faster: at 15,000 rpm half a turn alone takes 2.0 ms."""


@dataclass(frozen=True)
class Speed:
    """What a disk does, as measured here.

    Args:
        sequential_mb_s: rate of large reads, MB = 10**6 bytes.
        positioning_ms: median time of a 4 KB read at a random place of the data.
        measured_at: day of the measurement, ISO 8601.
    """

    sequential_mb_s: float
    positioning_ms: float
    measured_at: str


def effective(disk: Disk, speed: Speed | None) -> Disk:
    """Return `disk` as its speed shows it to be, unless the user said what it is.

    Virtual machines call their disks rotating whatever lies below, and a cache may stand before a
    hard disk: what finds random places faster than any head is an SSD to its readers.
    """
    is_too_fast = speed is not None and speed.positioning_ms < _FASTEST_HEAD_MS
    if disk.kind == "hdd" and not disk.chosen and is_too_fast:
        return replace(disk, kind="ssd")
    return disk


# ---- how fast ------------------------------------------------------------------------------------

_PAGE_BYTES = 4096
"""Small reads, and the alignment that O_DIRECT asks for on any disk of today."""


_LARGEST_RUN_BYTES = 16 << 20


_FIRST_RUN_BYTES = 1 << 20


_LARGE_FILE_BYTES = 64 << 20


_NUM_FILES = 8


_NUM_PLACES = 16


_MEMORY_MB_S = 20_000.0


_MEMORY_MS = 0.02
"""What is faster than these came from memory, whatever was asked for."""


_KEPT_DAYS = 30


class _Probe(NamedTuple):
    """One visit to a random place: a small read to get there, and a large one right behind it."""

    positioning_s: float
    run_bytes: int
    run_s: float


def measure(files: Sequence[str], seed: int = 0, seconds: float = 1.0) -> Speed | None:
    """Measure the disk that `files` lie on by reading them at random places, past the page cache.

    At each place 4 KB are read, which takes the head there, and then up to 16 MB right behind them:
    the first is the positioning time, the second the sequential rate without it. Small files are
    read up to their end, which measures the rate less well. Data of less than about 100 MB, or what
    has just been read, says nothing: the disk's own memory may hold it.

    Args:
        files: what to read, from all over the data; of many, 8 are used.
        seed: of the choice of files and places.
        seconds: when to stop. A read that has begun then is waited for as long again; if the disk
            does not answer, it is left to a thread of its own, and this function returns.

    Returns:
        None where nothing was measured: no file of at least 8 KB, nothing answered in time, or so
        fast that it came from memory.
    """
    if not files:
        return None
    probes: list[_Probe] = []
    until = time.monotonic() + seconds
    # A thread, because nothing can interrupt a read from a disk that does not answer.
    reader = threading.Thread(
        target=_probe, args=(files, seed, until, probes), daemon=True, name="measure disk"
    )
    reader.start()
    reader.join(2 * seconds)
    done = list(probes)
    if not done:
        return None
    # Medians: what another program, or the scheduler, did to some of the reads is not the disk's.
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
            # Runs grow while they are short: 16 MB of a slow network would take all the time.
            if run_s * _NUM_PLACES < until - time.monotonic():
                run_bytes = min(2 * run_bytes, _LARGEST_RUN_BYTES)


def _open_some(
    files: Sequence[str], rng: random.Random, until: float, stack: contextlib.ExitStack
) -> list[tuple[BinaryIO, int]]:
    """Open some files, past the page cache where that works; return each with its size."""
    chosen = rng.sample(range(len(files)), min(_NUM_FILES + 1, len(files)))
    flags = os.O_DIRECT if reads_direct(files[chosen[0]]) else 0
    opened = []
    # The first has been read, so a page of it may be in the disk's own memory.
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
    """Yield places in files: (file, offset, bytes that follow the page there)."""
    large = [(file, size) for file, size in opened if size >= _LARGE_FILE_BYTES]
    for file, size in opened:
        if (file, size) not in large and size >= 2 * _PAGE_BYTES:
            yield file, 0, size // _PAGE_BYTES * _PAGE_BYTES - _PAGE_BYTES
    for (
        file,
        _,
    ) in large:  # where its parts lie is itself on the disk: find out before the clock runs
        _read_at(file, 0, page)
    for number in range(_NUM_PLACES if large else 0):
        file, size = large[number % len(large)]
        num_pages = size // _PAGE_BYTES
        place = rng.randrange(1, num_pages - _LARGEST_RUN_BYTES // _PAGE_BYTES)
        yield file, place * _PAGE_BYTES, (num_pages - place - 1) * _PAGE_BYTES


def reads_direct(path: str | os.PathLike[str]) -> bool:
    """Tell whether the file `path` can be read past the page cache (O_DIRECT), by doing it."""
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


def speed_of(disk: Disk, files: Sequence[str], *, remeasure: bool = False) -> Speed | None:
    """Return the speed of a disk: kept from the last 30 days, else measured now.

    Processes that ask at once (the ranks of a node) measure one after the other; all but the first
    find what that one has kept. A disk whose lock is taken for 3 s is not measured.

    Args:
        disk: what the files lie on.
        files: what to read to measure it (see `measure`); none: don't measure.
        remeasure: whether to measure although a speed is kept.

    Returns:
        None where it is memory, or could not be measured.
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
        # Other places each time: those read last may still be in the disk's own memory.
        speed = measure(files, seed=random.randrange(2**32))
        if speed is not None:
            _keep_speed(key, speed)
        return speed


def _key(disk: Disk) -> str:
    """Name a disk so that another one that has its number after a restart is not taken for it."""
    parts = []
    for number in disk.device.split("+"):
        folder = SYS / "dev" / "block" / number
        facts = [number]
        for file in ("size", "device/model", "device/wwid"):
            with contextlib.suppress(OSError):
                facts.append(sanitised(read_text(folder / file)))
        parts.append(" ".join(facts))
    return " + ".join(parts)


def _speeds_file() -> str:
    return os.path.join(cache_folder(), "disks.json")


def _kept_speeds() -> dict[str, Speed]:
    """Read the speeds that are not too old; of a damaged file, those that can be read."""
    try:
        with open(_speeds_file(), encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, ValueError):
        return {}
    speeds = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            speed = _parsed(entry)
            if 0 <= (date.today() - date.fromisoformat(speed.measured_at)).days < _KEPT_DAYS:
                speeds[key] = speed
    return speeds


def _parsed(entry: Mapping[str, object]) -> Speed:
    speed = Speed(
        float(str(entry["sequential_mb_s"])),
        float(str(entry["positioning_ms"])),
        str(entry["measured_at"]),
    )
    if not all(0 < value < math.inf for value in (speed.sequential_mb_s, speed.positioning_ms)):
        raise ValueError(f"expected two positive numbers, got {speed}")
    return speed


def _keep_speed(key: str, speed: Speed) -> None:
    """Note a speed. Of two processes that note one at once, one may have to measure again later."""
    entries = {key: asdict(speed) for key, speed in {**_kept_speeds(), key: speed}.items()}
    path = _speeds_file()
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix="disks.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
