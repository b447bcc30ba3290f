"""Which disk a path lies on, how fast that disk is, and the lock that its readers take in turns.

How a disk is best read depends on what it is: one with a head wants one request at a time, over all
processes; everything else wants several. The kernel says which it is (sysfs, mountinfo), a short
measurement corrects the kernel where it is wrong, and the user overrules both.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import random
import re
import stat
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import BinaryIO, NamedTuple

_SYS = Path("/sys")
_MOUNTINFO = Path("/proc/self/mountinfo")

_MEMORY_TYPES = {"tmpfs", "ramfs", "devtmpfs"}
_NETWORK_TYPES = {
    "nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs", "9p",
    "virtiofs",
}  # fmt: skip

_MAX_LAYERS = 8
"""Devices on top of each other (a partition, md, LUKS, LVM, a loop: 5 are many). A bound, because a
damaged sysfs may go in circles."""

_FASTEST_HEAD_MS = 2.0
"""No disk with a head finds a random place faster: at 15,000 rpm half a turn alone takes 2.0 ms."""


@dataclass(frozen=True)
class Disk:
    """What a path lies on.

    Args:
        kind: "hdd", "ssd", "network", "fuse", "memory" or "unknown".
        name: for messages: "sda", "md0 (sda, sdb)", "nfs server:/export", "fuse.sshfs", "tmpfs".
        device: names the physical disk for locks and measurements: "8:0", of several members
            "8:0+8:16"; without a disk of this machine what is mounted, in characters that a file's
            name may have; "" where there is nothing to measure.
        chosen: whether the user said so, so that no measurement overrules it.
    """

    kind: str
    name: str
    device: str
    chosen: bool = False

    @property
    def has_one_head(self) -> bool:
        """Whether it is read best by one request at a time, under the lock of `lock_path`."""
        return self.kind == "hdd"


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


# ---- which disk ----------------------------------------------------------------------------------


def choose_disk(path: str | os.PathLike[str], wish: str = "auto") -> Disk:
    """Return the disk of `path`, of the kind that the user wishes.

    Args:
        path: a file or folder.
        wish: "hdd", "ssd", or "auto": what $IMAGENET_SEQ_DISK says, else what it is found to be.

    Raises:
        ValueError: where `wish` or $IMAGENET_SEQ_DISK is another word.
        FileNotFoundError: where `path` does not exist.
    """
    words = ("auto", "hdd", "ssd")
    if wish not in words:
        raise ValueError(f"disk: expected one of {', '.join(words)}, got {wish!r}")
    if wish == "auto":
        wish = os.environ.get("IMAGENET_SEQ_DISK") or "auto"
        if wish not in words:
            raise ValueError(f"IMAGENET_SEQ_DISK: expected one of {', '.join(words)}, got {wish!r}")
    found = find_disk(path)
    if wish == "auto":
        return found
    return replace(found, kind=wish, device=found.device or _number(path), chosen=True)


def find_disk(
    path: str | os.PathLike[str], *, sys: Path = _SYS, mountinfo: Path = _MOUNTINFO
) -> Disk:
    """Find which disk a path lies on, through partitions, LVM, LUKS, md, loops and mounts.

    A disk behind a faster cache (bcache, dm-cache) counts as what it is itself; `effective` sees
    the cache. Where the kernel does not say (or is not Linux), the kind is "unknown".

    Args:
        path: a file or folder.
        sys: where sysfs is mounted.
        mountinfo: the list of mounts, as in proc(5).

    Raises:
        FileNotFoundError: where `path` does not exist.
    """
    return _Finder(sys, mountinfo).of_path(os.fspath(path), 0)


def effective(disk: Disk, speed: Speed | None) -> Disk:
    """Return `disk` as its speed shows it to be, unless the user said what it is.

    Virtual machines call their disks rotating whatever lies below, and a cache may stand before a
    hard disk: what finds random places faster than any head is an SSD to its readers.
    """
    is_too_fast = speed is not None and speed.positioning_ms < _FASTEST_HEAD_MS
    if disk.kind == "hdd" and not disk.chosen and is_too_fast:
        return replace(disk, kind="ssd")
    return disk


class _Mount(NamedTuple):
    number: str  # st_dev of its files, "major:minor"
    point: str
    type: str
    source: str
    options: dict[str, str]  # of the file system


class _Finder:
    """Follows a path down to physical disks; `layers` counts the devices passed on the way."""

    def __init__(self, sys: Path, mountinfo: Path) -> None:
        self._sys = sys
        self._mountinfo = mountinfo

    def of_path(self, path: str, layers: int) -> Disk:
        number = _number(path)
        if not number.startswith("0:"):
            return self._of_folders([self._sys / "dev" / "block" / number], number, layers)
        try:
            return self._of_mount(path, number, layers)
        except (OSError, ValueError):
            return Disk("unknown", f"device {number}", "")

    def _of_mount(self, path: str, number: str, layers: int) -> Disk:
        """Find the disk of a file system that has no block device of its own."""
        path = os.path.realpath(path)
        mount = _mount_of(path, number, _read_mounts(self._mountinfo))
        if mount is None:
            return Disk("unknown", f"device {number}", "")
        name = f"{mount.type} {mount.source}".removesuffix(f" {mount.type}")
        if mount.type in _MEMORY_TYPES:
            return Disk("memory", mount.type, "")
        if mount.type in _NETWORK_TYPES:
            return Disk("network", name, _sanitised(mount.source))
        device = _sanitised(f"{mount.source}@{mount.point}")
        if mount.source.startswith("/dev/"):
            return self._of_folders(self._folders_of(mount), device, layers)
        if mount.type == "fuse" or mount.type.startswith("fuse."):
            return Disk("fuse", mount.type, device)
        if mount.type == "overlay" and (layer := _overlay_layer(path, mount)) is not None:
            return self._of_layer(layer, layers)
        return Disk("unknown", name, device)

    def _of_layer(self, path: str, layers: int) -> Disk:
        if layers >= _MAX_LAYERS:
            raise ValueError(f"{path}: more than {_MAX_LAYERS} devices on top of each other")
        return self.of_path(path, layers + 1)

    def _folders_of(self, mount: _Mount) -> list[Path]:
        """Return the sysfs folders of the block devices that a file system consists of."""
        blocks = self._sys / "class" / "block"
        # bcachefs names all its members; btrfs only one, but sysfs has a folder of them all.
        sources = mount.source.split(":") if mount.type == "bcachefs" else [mount.source]
        folders = []
        for source in sources:
            folder = blocks / os.path.basename(os.path.realpath(source))
            if not folder.exists():  # /dev/mapper/NAME, where /dev lacks the link
                folder = next(
                    (
                        name.parent.parent
                        for name in blocks.glob("dm-*/dm/name")
                        if _read(name) == os.path.basename(source)
                    ),
                    folder,
                )
            folders.append(folder)
        if mount.type == "btrfs":
            for member in self._sys.glob(f"fs/btrfs/*/devices/{folders[0].name}"):
                return sorted(member.parent.iterdir())
        return folders

    def _of_folders(self, folders: list[Path], number: str, layers: int) -> Disk:
        """Return the disk that sysfs folders of block devices stand for."""
        label = folders[0].name
        try:
            disks: list[Disk] = []
            labels = []
            for folder in (folder.resolve(strict=True) for folder in folders):
                labels.append(_label(folder))
                disks += self._below(folder, layers)
        except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle
            return Disk("unknown", label, number)
        if len(folders) == 1:
            return _merge(labels[0], disks)
        return _merge("", disks)

    def _below(self, folder: Path, layers: int) -> list[Disk]:
        """Return the physical disks below a block device."""
        if layers > _MAX_LAYERS:
            raise ValueError(f"{folder}: more than {_MAX_LAYERS} devices on top of each other")
        if (folder / "partition").exists():
            return self._below(folder.parent, layers + 1)
        if re.fullmatch(r"z?ram\d+", folder.name):
            return [Disk("memory", folder.name, "")]
        if (folder / "loop" / "backing_file").exists():
            return [self._of_layer(_read(folder / "loop" / "backing_file"), layers)]
        slaves = folder / "slaves"
        if slaves.is_dir() and (below := sorted(slaves.iterdir())):
            return [
                disk
                for slave in below
                for disk in self._below(slave.resolve(strict=True), layers + 1)
            ]
        kind = {"0": "ssd", "1": "hdd"}[_one_of(folder / "queue" / "rotational", ("0", "1"))]
        return [Disk(kind, folder.name, _read(folder / "dev"))]


def _merge(label: str, below: list[Disk]) -> Disk:
    """Return what several disks are to a reader: as slow as the slowest of them."""
    disks = list({(disk.name, disk.device): disk for disk in below}.values())
    kinds = {disk.kind for disk in disks}
    kind = "hdd" if "hdd" in kinds else kinds.pop() if len(kinds) == 1 else "unknown"
    names = ", ".join(disk.name for disk in disks)
    # Of an HDD with an SSD as its cache, the HDD is what has to be taken in turns.
    numbers = {d.device for d in disks if d.device and (kind != "hdd" or d.kind == "hdd")}
    device = "+".join(sorted(numbers, key=_by_number))
    if not label or label == names:
        return Disk(kind, names, device)
    return Disk(kind, f"{label} ({names})", device)


def _by_number(device: str) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", device)], device


def _label(folder: Path) -> str:
    """Return the name a user knows a block device by; of a partition: its disk's."""
    if (folder / "partition").exists():
        return folder.parent.name
    mapped = folder / "dm" / "name"
    return _read(mapped) if mapped.exists() else folder.name


def _read(path: Path) -> str:
    return os.fsdecode(path.read_bytes()).strip()


def _one_of(path: Path, expected: Sequence[str]) -> str:
    text = _read(path)
    if text not in expected:
        raise ValueError(f"{path}: expected one of {expected}, got {text!r}")
    return text


def _number(path: str | os.PathLike[str]) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _sanitised(text: str) -> str:
    """Return `text` in characters that are harmless in a file's name, and not too many of them."""
    return re.sub(r"[^A-Za-z0-9_:@+-]+", "-", text)[:100].strip("-")


# ---- mounts --------------------------------------------------------------------------------------


def _read_mounts(mountinfo: Path) -> list[_Mount]:
    mounts = []
    for line in os.fsdecode(mountinfo.read_bytes()).splitlines():
        head, separator, tail = line.partition(" - ")
        fields, about = head.split(" "), tail.split(" ")
        if not separator or len(fields) < 6 or len(about) < 2:
            continue
        pairs = [option.partition("=") for option in ",".join(about[2:]).split(",")]
        options = {key: _unescaped(value) for key, _, value in pairs}
        point, source = _unescaped(fields[4]), _unescaped(about[1])
        mounts.append(_Mount(fields[2], point, about[0], source, options))
    return mounts


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _mount_of(path: str, number: str, mounts: Sequence[_Mount]) -> _Mount | None:
    """Return the mount that `path`, whose st_dev is `number`, is seen through.

    The device number is the surest sign, where the file system shows the same one in both places
    (btrfs and overlay need not); then the longest mount point above the path, the last one of those
    on top of each other.
    """
    best, best_rank = None, (False, -1)
    for mount in mounts:
        above = os.path.join(mount.point, "")
        length = len(above) if os.path.join(path, "").startswith(above) else -1
        rank = (mount.number == number, length)
        if rank >= best_rank and rank != (False, -1):
            best, best_rank = mount, rank
    return best


def _overlay_layer(path: str, mount: _Mount) -> str | None:
    """Return where the file or folder `path` of an overlay really lies, if that can be seen."""
    layers = [mount.options.get("upperdir", ""), *mount.options.get("lowerdir", "").split(":")]
    relative = os.path.relpath(path, mount.point)
    candidates = [os.path.join(layer, relative) for layer in layers if layer.startswith("/")]
    return next(filter(os.path.exists, candidates), None)


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
_LOCK_WAIT_S = 3.0
"""How long to wait for another process that measures, or that reads a block, of the same disk."""


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
    with turn(_lock_file(disk.device)) as is_mine:
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
        folder = _SYS / "dev" / "block" / number
        facts = [number]
        for file in ("size", "device/model", "device/wwid"):
            with contextlib.suppress(OSError):
                facts.append(_sanitised(_read(folder / file)))
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


def cache_folder() -> str:
    """Return the folder for what is found out once: $IMAGENET_SEQ_CACHE, else XDG's cache."""
    if folder := os.environ.get("IMAGENET_SEQ_CACHE"):
        return folder
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "imagenet-seq")


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
    return _lock_file(disk.device) if disk.has_one_head else ""


def _lock_file(device: str) -> str:
    try:
        folder = os.environ.get("IMAGENET_SEQ_LOCKS") or os.path.join(
            tempfile.gettempdir(),  # raises where no folder can be written, as in some containers
            "imagenet-seq-locks",
        )
        path = os.path.join(folder, f"{_sanitised(device)}.lock")
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
