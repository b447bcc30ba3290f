"""Finds which disk a path lies on.

A hard disk is read best by one request at a time, over all processes; other disks by several. The
kernel says which kind a disk is (sysfs, mountinfo), a short measurement (`speed`) corrects it where
it is wrong, and the user overrules both.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

SYS = Path("/sys")
_MOUNTINFO = Path("/proc/self/mountinfo")
_MEMORY_TYPES = {"tmpfs", "ramfs", "devtmpfs"}
_NETWORK_TYPES = {
    "nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs", "9p",
    "virtiofs",
}  # fmt: skip
_MAX_LAYERS = 8
"""Bound on stacked devices (partition, md, LUKS, LVM and loop are 5): a damaged sysfs may form a
cycle."""


@dataclass(frozen=True)
class Disk:
    """What a path lies on.

    `device` names the physical disk for locks and measurements: "8:0", or "8:0+8:16" for several.
    For what is not a disk of this machine: what is mounted, in characters that are safe in a file
    name. "" where there is nothing to measure.
    """

    kind: str  # "hdd", "ssd", "network", "fuse", "memory" or "unknown"
    name: str  # for messages: "sda", "md0 (sda, sdb)", "nfs server:/export", "fuse.sshfs", "tmpfs"
    device: str
    chosen: bool = False  # the user chose the kind, so no measurement overrules it

    @property
    def has_one_head(self) -> bool:
        """Whether one request at a time, under the lock of `turns.lock_path`, reads it best."""
        return self.kind == "hdd"


def choose_disk(path: str | os.PathLike[str], wish: str = "auto") -> Disk:
    """Return the disk of a file or folder, of the kind that the user chose.

    `wish` is "hdd", "ssd", or "auto": what $IMAGENET_SEQ_DISK says, else what `find_disk` finds.

    Raises:
        ValueError: `wish` or $IMAGENET_SEQ_DISK is another word.
        FileNotFoundError: `path` does not exist.
    """
    words, said_by = ("auto", "hdd", "ssd"), "disk"
    if wish == "auto":
        wish, said_by = os.environ.get("IMAGENET_SEQ_DISK") or "auto", "IMAGENET_SEQ_DISK"
    if wish not in words:
        raise ValueError(f"{said_by}: expected one of {', '.join(words)}, got {wish!r}")
    found = find_disk(path)
    if wish == "auto":
        return found
    return replace(found, kind=wish, device=found.device or _number(path), chosen=True)


def find_disk(
    path: str | os.PathLike[str], *, sys: Path = SYS, mountinfo: Path = _MOUNTINFO
) -> Disk:
    """Find which disk a path lies on, through partitions, LVM, LUKS, md, loops and mounts.

    A disk behind a faster cache (bcache, dm-cache) has its own kind; `speed.effective` takes the
    cache into account. Where the kernel does not say (or is not Linux), the kind is "unknown".
    `sys` is where sysfs is mounted, `mountinfo` the list of mounts: see proc(5).

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    return _Finder(sys, mountinfo).of_path(os.fspath(path), 0)


class _Mount(NamedTuple):
    number: str  # st_dev of its files, "major:minor"
    point: str
    type: str
    source: str
    options: dict[str, str]  # of the file system


class _Finder:
    """Follows a path down to physical disks; `layers` counts the devices on the way."""

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
            return Disk("network", name, sanitised(mount.source))
        device = sanitised(f"{mount.source}@{mount.point}")
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
        """Return the sysfs folders of the block devices of a file system."""
        blocks = self._sys / "class" / "block"
        # bcachefs names all its members; btrfs names one, but sysfs has a folder with all of them.
        sources = mount.source.split(":") if mount.type == "bcachefs" else [mount.source]
        folders = []
        for source in sources:
            folder = blocks / os.path.basename(os.path.realpath(source))
            if not folder.exists():  # /dev/mapper/NAME that is no link, as in some containers
                mapped, name = blocks.glob("dm-*/dm/name"), os.path.basename(source)
                named = (file.parent.parent for file in mapped if read_text(file) == name)
                folder = next(named, folder)
            folders.append(folder)
        if mount.type == "btrfs":
            for member in self._sys.glob(f"fs/btrfs/*/devices/{folders[0].name}"):
                return sorted(member.parent.iterdir())
        return folders

    def _of_folders(self, folders: list[Path], number: str, layers: int) -> Disk:
        """Return the disk of block devices, given by their sysfs folders."""
        label = folders[0].name
        try:
            disks: list[Disk] = []
            labels = []
            for folder in (folder.resolve(strict=True) for folder in folders):
                labels.append(_label(folder))
                disks += self._below(folder, layers)
        except (OSError, RuntimeError, ValueError):  # RuntimeError: a cycle of links
            return Disk("unknown", label, number)
        return _merge(labels[0] if len(folders) == 1 else "", disks)

    def _below(self, folder: Path, layers: int) -> list[Disk]:
        """Return the physical disks below a block device."""
        if layers > _MAX_LAYERS:
            raise ValueError(f"{folder}: more than {_MAX_LAYERS} devices on top of each other")
        if (folder / "partition").exists():
            return self._below(folder.parent, layers + 1)
        if re.fullmatch(r"z?ram\d+", folder.name):
            return [Disk("memory", folder.name, "")]
        if (folder / "loop" / "backing_file").exists():
            return [self._of_layer(read_text(folder / "loop" / "backing_file"), layers)]
        slaves = folder / "slaves"
        if slaves.is_dir() and (below := sorted(slaves.iterdir())):
            found = (self._below(slave.resolve(strict=True), layers + 1) for slave in below)
            return list(itertools.chain.from_iterable(found))
        rotational = read_text(folder / "queue" / "rotational")
        if rotational not in ("0", "1"):
            raise ValueError(f"{folder}: expected queue/rotational 0 or 1, got {rotational!r}")
        kind = "hdd" if rotational == "1" else "ssd"
        return [Disk(kind, folder.name, read_text(folder / "dev"))]


def _merge(label: str, below: list[Disk]) -> Disk:
    """Return several disks as one: as slow as the slowest of them."""
    disks = list({(disk.name, disk.device): disk for disk in below}.values())
    kinds = {disk.kind for disk in disks}
    kind = "hdd" if "hdd" in kinds else kinds.pop() if len(kinds) == 1 else "unknown"
    names = ", ".join(disk.name for disk in disks)
    # Where an SSD caches an HDD, only the HDD needs the lock.
    numbers = {d.device for d in disks if d.device and (kind != "hdd" or d.kind == "hdd")}
    device = "+".join(sorted(numbers, key=_by_number))
    if not label or label == names:
        return Disk(kind, names, device)
    return Disk(kind, f"{label} ({names})", device)


def _by_number(device: str) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", device)], device


def _label(folder: Path) -> str:
    """Return the name by which a user knows a block device; for a partition, its disk's."""
    if (folder / "partition").exists():
        return folder.parent.name
    mapped = folder / "dm" / "name"
    return read_text(mapped) if mapped.exists() else folder.name


def read_text(path: Path) -> str:
    """Return the text of a file in sysfs, without the newline."""
    return os.fsdecode(path.read_bytes()).strip()


def _number(path: str | os.PathLike[str]) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def sanitised(text: str) -> str:
    """Return `text` shortened and in characters that are safe in a file name."""
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
    """Return the mount of `path`, whose st_dev is `number`.

    A mount with the same device number is preferred (btrfs and overlay may show another one), then
    the one with the longest mount point above the path, then the one mounted last.
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
    """Return where the file or folder `path` of an overlay lies in a layer, if one is visible."""
    layers = [mount.options.get("upperdir", ""), *mount.options.get("lowerdir", "").split(":")]
    relative = os.path.relpath(path, mount.point)
    candidates = [os.path.join(layer, relative) for layer in layers if layer.startswith("/")]
    return next(filter(os.path.exists, candidates), None)
