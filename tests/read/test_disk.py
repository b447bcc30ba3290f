"""Which disk a path lies on, its speed, its lock: on made-up sysfs trees and lists of mounts."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
import threading
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import pytest

from imagenet_seq.machine import cache_folder
from imagenet_seq.read import speed, turns
from imagenet_seq.read.disk import Disk, choose_disk, find_disk
from imagenet_seq.read.speed import Speed, _read_at, effective, measure, reads_direct, speed_of
from imagenet_seq.read.turns import lock_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sysfs and /proc are Linux's")

HDD = Disk("hdd", "sda", "8:0")
SLOW = Speed(182.0, 9.1, date.today().isoformat())
FAST = Speed(900.0, 0.2, date.today().isoformat())

NO_DEVICE = "/proc"
"""A folder whose file system has no block device, whatever machine this is."""


class Machine:
    """A sysfs and a list of mounts under `root`, made piece by piece."""

    def __init__(self, root: Path) -> None:
        self.sys = root / "sys"
        self.mountinfo = root / "mountinfo"
        self.mountinfo.write_text("")
        self.folder = root / "data"
        self.folder.mkdir()
        self._numbers = 0

    def block(
        self,
        name: str,
        rotational: str | None = None,
        on: Sequence[Path] = (),
        parent: Path | None = None,
        number: str = "",
    ) -> Path:
        """Add a block device: a disk, one that lies on others, or a partition of `parent`."""
        self._numbers += 1
        number = number or f"240:{self._numbers}"
        folder = (parent or self.sys / "devices") / name
        (folder / "slaves").mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        if parent is not None:
            (folder / "partition").write_text("1\n")
            (folder / "slaves").rmdir()
        if rotational is not None:
            (folder / "queue").mkdir()
            (folder / "queue" / "rotational").write_text(f"{rotational}\n")
        for below in on:
            (folder / "slaves" / below.name).symlink_to(below)
        self._link(folder, "dev", "block", number)
        self._link(folder, "class", "block", name)
        return folder

    def mapped(self, name: str, label: str, on: Sequence[Path]) -> Path:
        """Add a device of the device mapper."""
        folder = self.block(name, "1", on)
        (folder / "dm").mkdir()
        (folder / "dm" / "name").write_text(f"{label}\n")
        return folder

    def loop(self, name: str, file: str | Path) -> Path:
        folder = self.block(name, "0")
        (folder / "loop").mkdir()
        (folder / "loop" / "backing_file").write_text(f"{file}\n")
        return folder

    def _link(self, folder: Path, *place: str) -> None:
        link = self.sys.joinpath(*place)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)

    def mount(self, point: str, kind: str, source: str, options: str = "rw") -> None:
        """Add a mount of a file system that NO_DEVICE is seen through."""
        self.mount_numbered(number_of(NO_DEVICE), point, kind, source, options)

    def mount_numbered(
        self, number: str, point: str, kind: str, source: str, options: str = "rw"
    ) -> None:
        with self.mountinfo.open("a") as file:
            line = f"36 35 {number} / {point} rw,relatime shared:1 - {kind} {source} {options}\n"
            file.write(line)

    def holds(self, folder: Path) -> None:
        """Let the data lie on a block device, whatever it lies on here (CI: an overlay)."""
        number = number_of(self.folder)
        if number.startswith("0:"):
            self.mount_numbered(number, "/", "ext4", f"/dev/{folder.name}")
        else:
            self._link(folder, "dev", "block", number)

    def find(self, path: str | Path | None = None) -> Disk:
        return find_disk(path or self.folder, sys=self.sys, mountinfo=self.mountinfo)


def number_of(path: str | Path) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IMAGENET_SEQ_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("IMAGENET_SEQ_DISK", raising=False)


# ---- block devices -------------------------------------------------------------------------------


def test_a_disk_without_partitions(machine: Machine) -> None:
    machine.holds(machine.block("sdb", "1", number="8:16"))
    assert machine.find() == Disk("hdd", "sdb", "8:16")


def test_a_file_lies_where_its_folder_does(machine: Machine) -> None:
    machine.holds(machine.block("sdb", "1", number="8:16"))
    (machine.folder / "file").write_text("")
    assert machine.find(machine.folder / "file").device == "8:16"


def test_a_partition_is_its_disk(machine: Machine) -> None:
    sda = machine.block("sda", "1", number="8:0")
    machine.holds(machine.block("sda1", parent=sda))
    assert machine.find() == HDD
    assert HDD.has_one_head


def test_nvme(machine: Machine) -> None:
    nvme = machine.block("nvme0n1", "0", number="259:0")
    machine.holds(machine.block("nvme0n1p2", parent=nvme))
    found = machine.find()
    assert found == Disk("ssd", "nvme0n1", "259:0")
    assert not found.has_one_head


def test_lvm_over_a_partition(machine: Machine) -> None:
    sda = machine.block("sda", "1", number="8:0")
    machine.holds(machine.mapped("dm-0", "vg-data", [machine.block("sda2", parent=sda)]))
    assert machine.find() == Disk("hdd", "vg-data (sda)", "8:0")


def test_luks_on_lvm(machine: Machine) -> None:
    nvme = machine.block("nvme0n1", "0", number="259:0")
    lvm = machine.mapped("dm-0", "vg-data", [machine.block("nvme0n1p2", parent=nvme)])
    machine.holds(machine.mapped("dm-1", "luks-data", [lvm]))
    assert machine.find() == Disk("ssd", "luks-data (nvme0n1)", "259:0")


def test_a_raid_names_its_members_in_numerical_order(machine: Machine) -> None:
    members = [machine.block("sda", "1", number="8:0"), machine.block("sdb", "1", number="8:16")]
    members.append(machine.block("sdz", "1", number="65:144"))
    machine.holds(machine.block("md0", "1", members))
    assert machine.find() == Disk("hdd", "md0 (sda, sdb, sdz)", "8:0+8:16+65:144")


def test_a_volume_on_two_partitions_of_one_disk_is_one_disk(machine: Machine) -> None:
    sda = machine.block("sda", "1", number="8:0")
    parts = [machine.block(f"sda{number}", parent=sda) for number in (1, 2)]
    machine.holds(machine.mapped("dm-0", "vg-data", parts))
    assert machine.find() == Disk("hdd", "vg-data (sda)", "8:0")


def test_of_a_cached_disk_the_rotating_member_is_taken_in_turns(machine: Machine) -> None:
    sda = machine.block("sda", "1", number="8:0")
    machine.holds(machine.block("bcache0", "0", [sda, machine.block("nvme0n1", "0")]))
    found = machine.find()
    assert found == Disk("hdd", "bcache0 (nvme0n1, sda)", "8:0")
    assert effective(found, FAST).kind == "ssd"


def test_a_loop_lies_where_its_file_does(machine: Machine) -> None:
    # The file of the loop is on the (only) block device of this test, the data in what it holds.
    machine.holds(machine.block("sda", "1", number="8:0"))
    loop = machine.loop("loop0", machine.folder)
    machine.mount("/", "ext4", "/dev/loop0")
    assert machine.find(NO_DEVICE) == Disk("hdd", "loop0 (sda)", "8:0")
    (loop / "loop" / "backing_file").write_text("/gone/image (deleted)\n")
    assert machine.find(NO_DEVICE).kind == "unknown"


def test_zram_is_memory(machine: Machine) -> None:
    machine.holds(machine.block("zram0", "0"))
    assert machine.find() == Disk("memory", "zram0", "")


def test_a_virtual_disk_is_what_it_was_measured_to_be() -> None:
    virtual = Disk("hdd", "vda", "254:0")
    assert effective(virtual, FAST) == Disk("ssd", "vda", "254:0")
    assert effective(virtual, SLOW) == virtual
    assert effective(virtual, None) == virtual
    unknown = Disk("unknown", "overlay", "overlay")
    assert effective(unknown, FAST) == unknown


# ---- damaged or missing information --------------------------------------------------------------


def test_no_sysfs_at_all(machine: Machine) -> None:
    assert machine.find().kind == "unknown"
    assert machine.find(NO_DEVICE).kind == "unknown"


@pytest.mark.parametrize("text", ["", "2", "\xff"])
def test_a_rotational_that_is_no_answer(machine: Machine, text: str) -> None:
    machine.holds(machine.block("sda", text))
    assert machine.find().kind == "unknown"


def test_a_disk_without_rotational_or_number(machine: Machine) -> None:
    sda = machine.block("sda", "1")
    machine.holds(sda)
    (sda / "dev").unlink()
    assert machine.find().kind == "unknown"
    (sda / "queue" / "rotational").unlink()
    assert machine.find().kind == "unknown"


def test_slaves_in_a_circle(machine: Machine) -> None:
    first = machine.block("dm-0", "1")
    second = machine.block("dm-1", "1", [first])
    (first / "slaves" / "dm-1").symlink_to(second)
    (first / "slaves" / "dm-0").symlink_to(first)
    machine.holds(second)
    assert machine.find().kind == "unknown"


def test_a_loop_in_itself(machine: Machine) -> None:
    machine.holds(machine.loop("loop0", machine.folder))
    assert machine.find().kind == "unknown"


def test_a_link_in_a_circle(machine: Machine) -> None:
    link = machine.sys / "dev" / "block" / number_of(machine.folder)
    link.parent.mkdir(parents=True)
    link.symlink_to(link)
    assert machine.find().kind == "unknown"


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\n", b"36 35 0:1\n", b"36 35 - ext4\n"])
def test_a_damaged_or_missing_list_of_mounts(machine: Machine, text: bytes) -> None:
    machine.mountinfo.write_bytes(text)
    assert machine.find(NO_DEVICE).kind == "unknown"
    machine.mountinfo.unlink()
    assert machine.find(NO_DEVICE).kind == "unknown"


def test_a_path_that_does_not_exist(machine: Machine) -> None:
    with pytest.raises(FileNotFoundError):
        machine.find(machine.folder / "none")


# ---- file systems without a block device of their own --------------------------------------------


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("tmpfs", "tmpfs", Disk("memory", "tmpfs", "")),
        ("ramfs", "none", Disk("memory", "ramfs", "")),
        ("nfs4", "server:/export", Disk("network", "nfs4 server:/export", "server:-export")),
        ("cifs", "//nas/my\\040data", Disk("network", "cifs //nas/my data", "nas-my-data")),
        ("lustre", "10.0.0.1@tcp:/l", Disk("network", "lustre 10.0.0.1@tcp:/l", "10-0-0-1@tcp:-l")),
        ("9p", "host", Disk("network", "9p host", "host")),
        ("fuse.sshfs", "me@host:/d", Disk("fuse", "fuse.sshfs", "me@host:-d@-proc")),
        ("fuse", "spindle", Disk("fuse", "fuse", "spindle@-proc")),
        ("zfs", "tank/data", Disk("unknown", "zfs tank/data", "tank-data@-proc")),
        ("overlay", "overlay", Disk("unknown", "overlay", "overlay@-proc")),
    ],
)
def test_file_systems(machine: Machine, kind: str, source: str, expected: Disk) -> None:
    machine.mount("/proc", kind, source)
    assert machine.find(NO_DEVICE) == expected
    assert lock_path(expected) == ""


def test_btrfs_is_the_disk_it_lies_on(machine: Machine) -> None:
    sda = machine.block("sda", "1", number="8:0")
    machine.block("sda3", parent=sda)
    # The st_dev of a subvolume is in no list: the mount point has to tell.
    machine.mount_numbered("0:9999", "/", "ext4", "/dev/none")
    machine.mount_numbered("0:9998", "/proc", "btrfs", "/dev/sda3", "rw,subvol=/@data")
    assert machine.find(NO_DEVICE) == HDD


def test_btrfs_over_two_disks(machine: Machine) -> None:
    members = machine.sys / "fs" / "btrfs" / "uuid" / "devices"
    members.mkdir(parents=True)
    for name, number in (("sda", "8:0"), ("sdb", "8:16")):
        (members / name).symlink_to(machine.block(name, "1", number=number))
    machine.mount("/proc", "btrfs", "/dev/sdb")
    assert machine.find(NO_DEVICE) == Disk("hdd", "sda, sdb", "8:0+8:16")


def test_bcachefs_names_its_members(machine: Machine) -> None:
    machine.block("sda", "1", number="8:0")
    machine.block("nvme0n1", "0")
    machine.mount("/proc", "bcachefs", "/dev/sda:/dev/nvme0n1")
    assert machine.find(NO_DEVICE) == Disk("hdd", "sda, nvme0n1", "8:0")


def test_a_mapped_source_whose_link_in_dev_is_missing(machine: Machine) -> None:
    machine.mapped("dm-3", "vg-data", [machine.block("sda", "1", number="8:0")])
    machine.mount("/proc", "btrfs", "/dev/mapper/vg-data")
    assert machine.find(NO_DEVICE) == Disk("hdd", "vg-data (sda)", "8:0")


def test_fuseblk_is_the_disk_it_lies_on(machine: Machine) -> None:
    sdb = machine.block("sdb", "1", number="8:16")
    machine.block("sdb1", parent=sdb)
    machine.mount("/proc", "fuseblk", "/dev/sdb1")
    assert machine.find(NO_DEVICE) == Disk("hdd", "sdb", "8:16")


def test_a_source_that_sysfs_does_not_know(machine: Machine) -> None:
    machine.mount("/proc", "fuseblk", "/dev/sdb1")
    assert machine.find(NO_DEVICE).kind == "unknown"


def test_overlay_is_the_layer_that_has_the_path(machine: Machine, tmp_path: Path) -> None:
    machine.holds(machine.block("sda", "1", number="8:0"))
    (tmp_path / "lower layer").mkdir()
    lower = f"/none:{tmp_path}/lower\\040layer"
    machine.mount("/proc", "overlay", "overlay", f"rw,upperdir=/none,lowerdir={lower}")
    assert machine.find(NO_DEVICE) == HDD
    machine.mount("/proc", "overlay", "overlay", "rw,lowerdir=/none,upperdir=/none2")
    assert machine.find(NO_DEVICE).kind == "unknown"


def test_the_last_of_the_mounts_on_top_of_each_other_counts(machine: Machine) -> None:
    machine.mount("/proc", "nfs", "first:/")
    machine.mount("/proc", "nfs", "second:/")
    machine.mount_numbered("0:9999", "/proc/self", "nfs", "elsewhere:/")
    assert machine.find(NO_DEVICE).name == "nfs second:/"


def test_a_mount_with_the_number_counts_more_than_a_longer_one(machine: Machine) -> None:
    machine.mount("/", "nfs", "right:/")
    machine.mount_numbered("0:9999", "/proc", "nfs", "hidden:/")
    machine.mount_numbered("0:9999", "/pro", "nfs", "no-parent:/")
    assert machine.find(NO_DEVICE).name == "nfs right:/"


# ---- what the user says --------------------------------------------------------------------------


def test_the_user_overrules_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_disk(tmp_path)
    assert choose_disk(tmp_path) == found
    hdd = choose_disk(tmp_path, "hdd")
    assert (hdd.kind, hdd.name) == ("hdd", found.name)
    assert effective(hdd, FAST) == hdd
    monkeypatch.setenv("IMAGENET_SEQ_DISK", "ssd")
    assert choose_disk(tmp_path).kind == "ssd"
    assert choose_disk(tmp_path, "hdd").kind == "hdd"


def test_what_has_no_disk_can_be_locked_if_the_user_wants() -> None:
    hdd = choose_disk("/proc", "hdd")
    assert hdd.device
    assert lock_path(hdd)


def test_other_words_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="disk: expected one of auto, hdd, ssd, got 'floppy'"):
        choose_disk(tmp_path, "floppy")
    monkeypatch.setenv("IMAGENET_SEQ_DISK", "tape")
    with pytest.raises(ValueError, match=r"IMAGENET_SEQ_DISK: expected one of .* got 'tape'"):
        choose_disk(tmp_path)


# ---- the lock ------------------------------------------------------------------------------------


def test_a_lock_is_one_file_for_all_users(tmp_path: Path) -> None:
    path = lock_path(HDD)
    assert path == lock_path(HDD) == str(tmp_path / "locks" / "8:0.lock")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    assert stat.S_IMODE(os.stat(tmp_path / "locks").st_mode) == 0o1777
    assert lock_path(Disk("hdd", "md0", "8:0+8:16")) != path
    assert lock_path(Disk("ssd", "sda", "8:0")) == ""


def test_a_lock_stays_in_its_folder(tmp_path: Path) -> None:
    path = lock_path(Disk("hdd", "odd", "../../etc/" + "x" * 300))
    assert Path(path).parent == tmp_path / "locks"


def test_the_default_folder_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET_SEQ_LOCKS")
    monkeypatch.setattr(turns.tempfile, "tempdir", str(tmp_path))
    assert lock_path(HDD) == str(tmp_path / "imagenet-seq-locks" / "8:0.lock")


def test_without_a_folder_for_temporary_files_there_is_no_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> str:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.delenv("IMAGENET_SEQ_LOCKS")
    monkeypatch.setattr(turns.tempfile, "gettempdir", refused)
    assert lock_path(HDD) == ""


def test_links_and_files_in_the_place_of_locks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    assert lock_path(HDD) == ""
    (tmp_path / "locks").unlink()
    (tmp_path / "locks").write_text("")
    assert lock_path(HDD) == ""
    (tmp_path / "locks").unlink()
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "8:0.lock").symlink_to(tmp_path / "elsewhere")
    assert lock_path(HDD) == ""


# ---- speeds --------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Let measuring give SLOW; the list has what was asked to be measured."""
    calls: list[Sequence[str]] = []

    def made_up(files: Sequence[str], seed: int) -> Speed:
        calls.append(files)
        return SLOW

    monkeypatch.setattr(speed, "measure", made_up)
    return calls


def kept_file() -> Path:
    return Path(cache_folder()) / "disks.json"


def test_a_speed_is_measured_once(measured: list[Sequence[str]]) -> None:
    assert speed_of(HDD, ["a"]) == SLOW
    assert speed_of(HDD, ["b"]) == SLOW
    assert measured == [["a"]]
    assert speed_of(Disk("hdd", "sdb", "8:16"), ["c"]) == SLOW
    assert speed_of(HDD, ["d"], remeasure=True) == SLOW
    assert measured == [["a"], ["c"], ["d"]]
    assert len(json.loads(kept_file().read_text())) == 2
    assert [path.name for path in kept_file().parent.iterdir()] == ["disks.json"]


def test_memory_and_nothing_are_not_measured(measured: list[Sequence[str]]) -> None:
    assert speed_of(Disk("memory", "tmpfs", ""), ["a"]) is None
    assert speed_of(HDD, []) is None
    assert measured == []
    speed_of(HDD, ["a"])
    assert speed_of(HDD, []) == SLOW


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-3],
        lambda text: "[1, 2]",
        lambda text: text.replace("182.0", "-1.0"),
        lambda text: text.replace("182.0", "NaN"),
        lambda text: text.replace("9.1", '"fast"'),
        lambda text: text.replace("positioning_ms", "other"),
        lambda text: text.replace(SLOW.measured_at, "yesterday"),
        lambda text: text.replace(
            SLOW.measured_at, (date.today() - timedelta(days=31)).isoformat()
        ),
        lambda text: text.replace(SLOW.measured_at, (date.today() + timedelta(2)).isoformat()),
        lambda text: json.dumps(dict.fromkeys(json.loads(text), "text")),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_or_old_speed_is_measured_again(
    measured: list[Sequence[str]], damage: object
) -> None:
    speed_of(HDD, ["a"])
    assert callable(damage)
    kept_file().write_text(damage(kept_file().read_text()), encoding="latin-1")
    assert speed_of(HDD, ["b"]) == SLOW
    assert speed_of(HDD, ["c"]) == SLOW
    assert measured == [["a"], ["b"]]


def test_without_a_place_to_keep_it_a_speed_is_measured_each_time(
    measured: list[Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMAGENET_SEQ_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("IMAGENET_SEQ_LOCKS", str(tmp_path / "file" / "locks"))
    assert speed_of(HDD, ["a"]) == speed_of(HDD, ["b"]) == SLOW
    assert len(measured) == 2


def test_a_disk_whose_lock_is_taken_is_not_measured(
    measured: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_LOCK_WAIT_S", 0.05)
    with open(lock_path(HDD), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert speed_of(HDD, ["a"]) is None
    assert speed_of(HDD, ["a"]) == SLOW
    assert len(measured) == 1


def test_of_several_that_ask_at_once_one_measures(measured: list[Sequence[str]]) -> None:
    speeds: list[Speed | None] = []
    threads = [
        threading.Thread(target=lambda: speeds.append(speed_of(HDD, ["a"]))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert speeds == [SLOW] * 6
    assert len(measured) == 1


# ---- measuring -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("large") / "file"
    with path.open("wb") as file:
        for _ in range(13):
            file.write(os.urandom(8 << 20))
        os.fsync(file.fileno())
    return str(path)


def test_measuring_a_real_disk(large: str) -> None:
    speed = measure([large], seconds=0.5)
    if find_disk(large).kind == "memory":
        pytest.skip("the folder for temporary files is in memory")
    if speed is None:
        pytest.skip("this disk answers as fast as memory")
    assert 1 < speed.sequential_mb_s < 20_000
    assert 0.02 <= speed.positioning_ms < 1000
    assert speed.measured_at == date.today().isoformat()


def test_what_is_in_memory_is_not_taken_for_a_disk(
    large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1e-6
            return self.now

        monotonic = staticmethod(speed.time.monotonic)

    monkeypatch.setattr(speed, "time", Clock())
    assert measure([large]) is None


def test_a_read_that_was_held_up_does_not_count(
    large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = threading.local()
    reads = iter(range(10**6))
    original = _read_at

    def timed(file: object, offset: int, into: memoryview) -> int:
        """A disk of 9 ms and 100 MB/s, of whose reads every fifth takes a second more."""
        done = original(file, offset, into)  # type: ignore[arg-type]
        now = getattr(clock, "now", 0.0)
        stall = 1.0 if next(reads) % 5 == 0 else 0.0
        clock.now = now + stall + (0.009 if done == 4096 else done / 1e8)
        return done

    class Clock:
        monotonic = staticmethod(speed.time.monotonic)

        @staticmethod
        def perf_counter() -> float:
            return getattr(clock, "now", 0.0)

    monkeypatch.setattr(speed, "_read_at", timed)
    monkeypatch.setattr(speed, "time", Clock())
    measured = measure([large], seconds=5)
    assert measured is not None
    assert (measured.sequential_mb_s, measured.positioning_ms) == (100.0, 9.0)


def test_files_without_two_pages_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(8191))
    assert measure([str(tmp_path / "small")] * 9) is None


def test_small_files_are_read_from_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(os.urandom(100_000))
    os.sync()
    seen: list[tuple[int, int]] = []
    original = _read_at

    def noted(file: object, offset: int, into: memoryview) -> int:
        seen.append((offset, len(into)))
        return original(file, offset, into)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_read_at", noted)
        measure([str(tmp_path / "small")] * 20)
    assert seen == [(0, 4096), (4096, 94_208)] * 8  # whole pages of 100,000 bytes


def test_files_that_cannot_be_opened_give_nothing(tmp_path: Path) -> None:
    assert measure([str(tmp_path / "none")] * 9) is None
    assert measure([]) is None


def test_a_disk_that_does_not_answer_does_not_hold_anybody_up(
    large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled = threading.Event()

    def never(file: object, offset: int, into: memoryview) -> int:
        stalled.wait(60)
        return 0

    monkeypatch.setattr(speed, "_read_at", never)
    assert measure([large], seconds=0.05) is None
    stalled.set()
    for thread in threading.enumerate():
        if thread.name == "measure disk":
            thread.join()


def test_reading_directly(tmp_path: Path, large: str) -> None:
    assert not reads_direct("/proc/self/status")  # the kernel has no O_DIRECT for it
    assert not reads_direct(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"")
    assert reads_direct(large) == reads_direct(tmp_path / "empty")
