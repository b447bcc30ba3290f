"""Measure reading from a hard disk, against its sequential rate and two other loaders.

    python benchmarks/bench_read.py DIR [--ranks 1 4 8] [--limit 4GB] [--ram 48GB] [--json OUT]
    python benchmarks/bench_read.py DIR --spindle PROGRAM [--spindle-options="--ncq=32"]
    python benchmarks/bench_read.py --spindle PROGRAM [--cases bytes decoded ...] [--json OUT]

The first reads a pack or an ImageFolder on its own disk: as bytes and decoded, with nothing kept in
memory and, with --ram, with that much kept, each from cold caches and by each number of ranks. The
sequential rate is measured just before, on the same disk, with O_DIRECT, on the largest file of DIR
or on --sequential FILE. Cold means that the pages of DIR's files are dropped; with --drop-caches,
as root, all of the system's caches, names and inodes included.

The second does the same with DIR (in memory: in tmpfs) as the backing of spindle, a FUSE model of
one disk. The third makes its data in tmpfs and measures every case of docs/hard-disk.md:

    bytes       140 GB like a pack, in sparse files with a made-up index, stopped after --limit
    decoded     --images photos packed, with seeks stretched to those of 140 GB
    training    the same, as bytes, over three epochs, by a script that takes 256 images in 0.19 s
    ram         the same, with half of the set kept in memory, and with no argument
    folder      --images photos in an ImageFolder: ours and torchvision
    large-folder  the same with 1.28 million names of the photos
    webdataset  WebDataset on the shards of `decoded`
    sources     --images photos as WebDataset shards, as LMDB and as the official tar, each read by
                our Loader: the pass that indexes it, then three epochs decoded

Every run begins with cold caches, in fresh processes that start together; times begin with the
first request. A run is void, and repeated once, if late answers of the model may have taken a
hundredth of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import disks
import photos
import results
import sources
from disks import Counters, Disk, RealDisk, Spindle
from reading import MEAN_BYTES, Batch, Reading, Task, write_made_up

from imagenet_seq.sources.recognise import open_source

IMAGENET_BYTES = 140 * 10**9
IMAGENET_IMAGES = 1_281_167
IMAGENET_CLASSES = 1000
GLOBAL_BATCH = 256
POOL_BLOCKS = 64  # of all ranks; while it fills, fewer images come out than go in
START_S = 2.0  # of an epoch, in which long waits for a batch are looked for
TRAINING_S = 0.19  # for 256 images: a network that is trained a little slower than the disk reads
WINDOW_BATCHES = 16  # of 256, that ours reads ahead in the order of the disk from a folder
PEER_WORKERS = 4
SEQUENTIAL_FILE = "sequential"  # beside the data, behind it in the model's order of names


class Case(NamedTuple):
    """One run to make."""

    name: str
    task: Task
    num_ranks: int = 1
    readahead_kb: int | None = None
    # Before the steady state, in which the rate of images is taken.
    skip_epochs: int = 0
    skip_batches: int = 0


# ---- one run -------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Results for one or several data sets."""

    rows: list[dict[str, Any]]
    sequential_mb_per_s: list[float]
    indexing_mb_per_s: dict[str, float]  # by kind of source


class Rank:
    """A process of reading.py."""

    def __init__(self, task: Task) -> None:
        command = [
            sys.executable,
            str(Path(__file__).with_name("reading.py")),
            json.dumps(task._replace(loader_arguments=dict(task.loader_arguments))),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_ready(self) -> None:
        self._line()

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()

    def reading(self) -> Reading:
        begin, batches, stats, digests = json.loads(self._line())
        self._process.wait()
        return Reading(begin, [Batch(*batch) for batch in batches], stats, digests)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process that reads ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run_ranks(disk: Disk, tasks: Sequence[Task]) -> tuple[list[Reading], list[Counters]]:
    """Run the tasks at once; return their results and the disk's counters meanwhile."""
    with contextlib.ExitStack() as stack:
        ranks = [Rank(task) for task in tasks]
        for rank in ranks:
            stack.callback(rank.close)
        for rank in ranks:
            rank.wait_until_ready()
        disk.reset()
        with disks.Watch(disk) as watch:
            for rank in ranks:
                rank.begin()
            readings = [rank.reading() for rank in ranks]
    return readings, watch.seen


def tasks_of(case: Case, folder: Path) -> list[Task]:
    """Return a task for each rank; together they make batches of 256."""
    cores = len(results.available_cores())
    workers = max(1, cores // case.num_ranks) if is_ours(case) else PEER_WORKERS
    return [
        case.task._replace(
            folder=str(folder / case.task.folder),
            rank=rank,
            world_size=case.num_ranks,
            batch_size=GLOBAL_BATCH // case.num_ranks,
            num_workers=workers,
        )
        for rank in range(case.num_ranks)
    ]


def is_ours(case: Case) -> bool:
    return case.task.reader == "imagenet_seq"


def measure(disk: Disk, case: Case) -> dict[str, Any]:
    """Make a run from cold caches, and once more if the model was too slow."""
    for _ in range(2):
        with disk.cold(case.readahead_kb) as folder:
            readings, seen = run_ranks(disk, tasks_of(case, folder))
        row = describe(case, readings, seen)
        show(row)
        if not row["void"]:
            break
    return row


# ---- what a run shows ----------------------------------------------------------------------------


def describe(case: Case, readings: Sequence[Reading], seen: Sequence[Counters]) -> dict[str, Any]:
    """Return the part of a run that the results file has."""
    begin = first_request(seen) or min(reading.begin for reading in readings)
    end = min(reading.batches[-1].seconds for reading in readings)
    paces = [pace(case, reading, begin) for reading in readings]
    rates = [a_pace.mb_per_s for a_pace in paces]
    return {
        "case": case.name,
        "reader": case.task.reader,
        "decoded": case.task.decoded,
        "ranks": case.num_ranks,
        "readahead_kb": case.readahead_kb,
        "block_mb": case.task.block_bytes >> 20,
        "ram": case.task.loader_arguments.get("ram"),
        "seconds": end - begin,
        "images": sum(batch.images for reading in readings for batch in reading.batches),
        **disk_rates(seen, begin, end),
        "sample_mb_per_s": sum(rates),
        "slowest": min(rates) / statistics.mean(rates) if min(rates) else None,
        "seconds_per_256": GLOBAL_BATCH / sum(a_pace.images_per_s for a_pace in paces),
        "first_batch_s": max(r.batches[0].seconds - r.begin for r in readings),
        "start_wait_s": max(start_wait(reading) for reading in readings),
        "change_wait_s": max(change_wait(reading) for reading in readings),
        "epoch_disk_bytes": epoch_bytes(readings, seen),
        "seeks": seen[-1].seeks if seen else None,
        "stats": [reading.stats for reading in readings],
        "digests": [reading.digests for reading in readings],
        "late": seen[-1].late if seen else 0,
        "void": disks.is_void(seen),
    }


def first_request(seen: Sequence[Counters]) -> float | None:
    """Return when the disk was last seen idle before its first request."""
    for before, after in itertools.pairwise(seen):
        if after.requests > seen[0].requests:
            return before.seconds
    return None


def disk_rates(seen: Sequence[Counters], begin: float, end: float) -> dict[str, float | None]:
    """Return the MB/s that the disk read between two times, and how much of them it was busy."""
    inside = [counters for counters in seen if begin <= counters.seconds <= end]
    if len(inside) < 2:
        return {"disk_mb_per_s": None, "busy": None}
    seconds = inside[-1].seconds - inside[0].seconds
    return {
        "disk_mb_per_s": (inside[-1].read_bytes - inside[0].read_bytes) / seconds / 1e6,
        "busy": (inside[-1].busy_s - inside[0].busy_s) / seconds,
    }


class Pace(NamedTuple):
    """Images a second that a rank got in the steady state."""

    images_per_s: float
    mb_per_s: float  # of their encoded bytes


def pace(case: Case, reading: Reading, begin: float) -> Pace:
    skip = case.skip_batches + sum(b.epoch < case.skip_epochs for b in reading.batches)
    if len(reading.batches) <= skip:
        raise SystemExit(f"{case.name}: {len(reading.batches)} batches, expected over {skip}")
    since = reading.batches[skip - 1].seconds if skip else begin
    seconds = reading.batches[-1].seconds - since
    steady = reading.batches[skip:]
    return Pace(
        sum(batch.images for batch in steady) / seconds,
        sum(batch.sample_bytes for batch in steady) / seconds / 1e6,
    )


def epochs_of(reading: Reading) -> list[list[Batch]]:
    return [list(group) for _, group in itertools.groupby(reading.batches, lambda b: b.epoch)]


def start_wait(reading: Reading) -> float:
    """Return the longest wait for a batch asked for in an epoch's first seconds, but the first."""
    longest, begin = 0.0, reading.begin
    for batches in epochs_of(reading):
        early = [b.waited_s for b in batches[1:] if b.seconds - b.waited_s <= begin + START_S]
        longest = max([longest, *early])
        begin = batches[-1].seconds
    return longest


def change_wait(reading: Reading) -> float:
    """Return the longest wait for the first batch of an epoch that follows another."""
    return max((batches[0].waited_s for batches in epochs_of(reading)[1:]), default=0.0)


def epoch_bytes(readings: Sequence[Reading], seen: Sequence[Counters]) -> list[int]:
    """Return what the disk read from one end of an epoch, over all ranks, to the next."""
    if not seen:
        return []
    ends = [
        max(epoch[-1].seconds for epoch in epochs)
        for epochs in zip(*map(epochs_of, readings), strict=True)
    ]
    # What was counted when it was next looked at: by then all reads of the epoch are in.
    at_end = (next((c for c in seen if c.seconds >= end), seen[-1]) for end in ends)
    counts = [seen[0].read_bytes, *(counters.read_bytes for counters in at_end)]
    return [after - before for before, after in itertools.pairwise(counts)]


HEAD = (
    f"{'case':16} {'reader':19} {'ranks':>5} {'ra KB':>5} {'MB':>3} {'ram':>7} {'disk MB/s':>9} "
    f"{'busy':>5} {'images MB/s':>11} {'slowest':>7} {'s/256':>6} {'first':>6} {'start':>6} "
    f"{'change':>6} {'late':>4}"
)


def show(row: dict[str, Any]) -> None:
    def number(name: str, form: str) -> str:
        return format(row[name], form) if row[name] else "-"

    reader = row["reader"] + ("" if row["decoded"] else ", bytes")
    ram = "-" if row["ram"] is None else f"{row['ram'] / 1e9:.2f}G"
    print(
        f"{row['case']:16} {reader:19} {row['ranks']:5} {number('readahead_kb', 'd'):>5} "
        f"{row['block_mb']:3} {ram:>7} {number('disk_mb_per_s', '.1f'):>9} "
        f"{number('busy', '.0%'):>5} {number('sample_mb_per_s', '.1f'):>11} "
        f"{number('slowest', '.0%'):>7} {row['seconds_per_256']:6.3f} {row['first_batch_s']:6.2f} "
        f"{row['start_wait_s']:6.2f} {number('change_wait_s', '.2f'):>6} {row['late']:4}"
        f"{'  VOID' if row['void'] else ''}",
        flush=True,
    )


# ---- the cases -----------------------------------------------------------------------------------


def batches_of(size: int) -> int:
    """Return how many batches, over all ranks, have this many bytes."""
    return size // MEAN_BYTES // GLOBAL_BATCH


def bytes_cases(limit_bytes: int) -> list[Case]:
    """Bytes only of 140 GB, as long as the pool of blocks fills and then up to the limit."""

    def case(block_mb: int, num_ranks: int, readahead_kb: int) -> Case:
        fill = batches_of(2 * POOL_BLOCKS * (block_mb << 20))
        task = Task(
            "imagenet_seq",
            "data",
            made_up_bytes=IMAGENET_BYTES,
            decoded=False,
            most_batches=fill + batches_of(limit_bytes),
            block_bytes=block_mb << 20,
            disk="hdd",
            loader_arguments={"ram": 0},
        )
        return Case("bytes", task, num_ranks, readahead_kb, skip_batches=fill)

    alone = [case(16, 1, 128), case(16, 1, 4096), case(32, 1, 128)]
    return [*alone, case(16, 4, 128), case(16, 8, 128)]


def pack_task(decoded: bool, num_epochs: int, **given: Any) -> Task:
    return Task(
        "imagenet_seq",
        "data",
        decoded=decoded,
        num_epochs=num_epochs,
        disk="hdd",
        loader_arguments=given,
    )


def decoded_cases() -> list[Case]:
    """The steady state are the epochs after the first: the disk then never waits for decoding."""
    return [
        Case("decoded", pack_task(True, 3, ram=0), readahead_kb=readahead_kb, skip_epochs=1)
        for readahead_kb in (128, 4096)
    ]


def training_cases() -> list[Case]:
    task = pack_task(False, 3, ram=0)._replace(pace_s=TRAINING_S)
    return [Case("training", task, num_ranks, readahead_kb=128) for num_ranks in (1, 4, 8)]


def ram_cases(half_of_set: int) -> list[Case]:
    """Many epochs, since where one ends what the disk has read of the next is not exactly known."""
    whole = pack_task(True, 5, ram=0)._replace(digest=True)
    half = pack_task(True, 5, ram=half_of_set)._replace(digest=True)
    return [
        Case("nothing kept", whole, readahead_kb=128),
        Case("half kept", half, readahead_kb=128),
        Case("no argument", pack_task(True, 2), readahead_kb=128),
    ]


def folder_cases(name: str) -> list[Case]:
    """Ours over two windows behind the first one; torchvision over as many rounds of its workers as
    reach a steady state, since it takes minutes.
    """
    task = Task("imagenet_seq", "data", disk="hdd")
    ours = task._replace(most_batches=3 * WINDOW_BATCHES)
    peer = Task("torchvision", "data", most_batches=6 * PEER_WORKERS)
    return [
        Case(name, ours, readahead_kb=128, skip_batches=WINDOW_BATCHES),
        Case(name, peer, readahead_kb=128, skip_batches=2 * PEER_WORKERS),
    ]


def webdataset_cases() -> list[Case]:
    return [
        Case(
            "shards",
            Task("webdataset", "data", decoded=decoded),
            readahead_kb=readahead_kb,
        )
        for decoded in (False, True)
        for readahead_kb in (128, 4096)
    ]


def source_cases(kind: str) -> list[Case]:
    """An official archive lies in the order of its classes: in that order, then shuffled."""
    if kind != "official":
        return [Case(kind, pack_task(True, 3, ram=0), readahead_kb=128, skip_epochs=1)]
    in_order = pack_task(True, 3, ram=0, shuffle=False)
    shuffled = Task("imagenet_seq", "data", disk="hdd", loader_arguments={"ram": 0})
    shuffled = shuffled._replace(most_batches=3 * WINDOW_BATCHES)
    return [
        Case(f"{kind}, in order", in_order, readahead_kb=128, skip_epochs=1),
        Case(f"{kind}, shuffled", shuffled, readahead_kb=128, skip_batches=WINDOW_BATCHES),
    ]


def cases_of_folder(folder: Path, args: argparse.Namespace) -> list[Case]:
    """The cases of a data set of the user's: as bytes and decoded, without and with memory."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    fill_bytes = 2 * POOL_BLOCKS * (16 << 20)
    fill = batches_of(fill_bytes) if size > 2 * fill_bytes else 0  # small sets: all of an epoch
    # spindle is FUSE, so what disk it models has to be said.
    task = Task("imagenet_seq", ".", disk="hdd" if args.spindle else "auto")
    cases = []
    for decoded, num_ranks in itertools.product((False, True), args.ranks):
        name = "decoded" if decoded else "bytes"
        cold = task._replace(
            decoded=decoded,
            most_batches=fill + batches_of(args.limit),
            loader_arguments={**task.loader_arguments, "ram": 0},
        )
        cases.append(Case(name, cold, num_ranks, skip_batches=fill))
        if args.ram:
            kept = cold._replace(
                num_epochs=2,
                most_batches=0,
                loader_arguments={**task.loader_arguments, "ram": args.ram},
            )
            cases.append(Case(name, kept, num_ranks, skip_epochs=1))
    return cases


# ---- what spindle shows --------------------------------------------------------------------------


class Scene(NamedTuple):
    """A data set in memory, the options that make it lie as ImageNet would, and its runs."""

    backing: Path
    options: list[str]
    cases: list[Case]
    is_indexed: bool = False  # by reading it, before the first case


def make_scenes(chosen: Sequence[str], root: Path, args: argparse.Namespace) -> Iterator[Scene]:
    """Make the data of the chosen cases, one set at a time."""
    if "bytes" in chosen:
        write_made_up(root / "made-up/data", IMAGENET_BYTES)
        yield Scene(root / "made-up", [], bytes_cases(args.limit))
    of_pack = {"decoded", "training", "ram", "webdataset"} & set(chosen)
    if of_pack or {"folder", "large-folder", "sources"} & set(chosen):
        originals = copy_photos(args.photos, root / "photos")
    if of_pack:
        link_names(originals, args.images, num_classes=10, folder=root / "packed")
        photos.make_pack(root / "packed", root / "pack/data", pack_options(args.images))
        yield pack_scene(root / "pack", of_pack)
    if "sources" in chosen:
        link_names(originals, args.images, num_classes=100, folder=root / "images/train")
        yield from source_scenes(root / "images", root / "sources")
    if "folder" in chosen:
        few = f"{args.images:,} files"
        link_names(originals, args.images, num_classes=100, folder=root / "few/data")
        stretch = stretch_of(args.images * MEAN_BYTES)
        yield Scene(root / "few", [stretch], folder_cases(few))
    if "large-folder" in chosen:
        many = f"{args.names:,} files"
        link_names(originals, args.names, IMAGENET_CLASSES, root / "many/data")
        stretch = stretch_of(args.names * MEAN_BYTES)
        yield Scene(root / "many", [stretch], folder_cases(many))


def pack_scene(backing: Path, chosen: Iterable[str]) -> Scene:
    size = sum(path.stat().st_size for path in (backing / "data").glob("*.tar"))
    cases = {
        "decoded": decoded_cases(),
        "training": training_cases(),
        "ram": ram_cases(size // 2),
        "webdataset": webdataset_cases(),
    }
    return Scene(
        backing,
        [stretch_of(size)],
        [case for name in cases if name in chosen for case in cases[name]],
    )


def source_scenes(images: Path, root: Path) -> Iterator[Scene]:
    """Make one kind of source after the other, since each takes as much memory as the photos."""
    for kind in ("webdataset", "lmdb", "official"):
        backing = root / f"{kind}-disk"
        backing.mkdir(parents=True)
        if kind == "lmdb":  # of the photos' own bytes, as the original project has it
            photos.make_pack(images, backing / "data", ["--format", "lmdb", "--keep-bytes"])
        else:
            sources.make_source(kind, images, root).rename(backing / "data")
        size = sum(path.stat().st_size for path in (backing / "data").iterdir())
        yield Scene(backing, [stretch_of(size)], source_cases(kind), is_indexed=True)
        shutil.rmtree(backing)


def pack_options(num_images: int) -> list[str]:
    """Few bytes, since the disk is the limit; and shards enough for the peers' workers."""
    shard_bytes = num_images * MEAN_BYTES // (3 * PEER_WORKERS)
    return ["--tables", "image", "--shard-size", f"{shard_bytes}B"]


def stretch_of(size: int) -> str:
    """Return the option with which `size` bytes are as far apart as ImageNet's."""
    return f"--stretch={max(1.0, IMAGENET_BYTES / size):.3f}"


def copy_photos(source: Path | None, folder: Path) -> list[Path]:
    """Copy photos, so that names in the same file system can be linked to them."""
    folder.mkdir()
    return [
        Path(shutil.copyfile(photo, folder / photo.name)) for photo in photos.find_photos(source)
    ]


def link_names(originals: Sequence[Path], num_names: int, num_classes: int, folder: Path) -> None:
    """Make an ImageFolder of hard links: to the model each name is a file of its own."""
    for label in range(num_classes):
        (folder / f"n{label:08d}").mkdir(parents=True)
    for number in range(num_names):
        name = f"n{number % num_classes:08d}/{number:07d}.JPEG"
        os.link(originals[number % len(originals)], folder / name)


def measure_spindle(args: argparse.Namespace) -> Measured:
    """Make the chosen cases' data and measure them."""
    rows, rates, indexing = Measured([], [], {})
    with tempfile.TemporaryDirectory(prefix="bench-read-", dir=args.memory) as temporary:
        root = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")  # indexes of earlier runs
        for scene in make_scenes(args.cases, root, args):
            with open(scene.backing / SEQUENTIAL_FILE, "wb") as file:
                file.truncate(disks.SEQUENTIAL_BYTES)
            options = [*scene.options, *args.spindle_options.split()]
            disk = Spindle(args.spindle, scene.backing, root / "mountpoint", options)
            rates.append(show_rate(disk, SEQUENTIAL_FILE))
            if scene.is_indexed:
                indexing |= show_indexing(disk)
            rows += [measure(disk, case) for case in scene.cases]
    return Measured(rows, rates, indexing)


def show_indexing(disk: Disk) -> dict[str, float]:
    """Return the MB/s at which a source is indexed, which reads all of it once."""
    with disk.cold() as folder:
        begin = time.monotonic()
        source = open_source(folder / "data", "train", progress=False)
        seconds = time.monotonic() - begin
        size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    rate = size / seconds / 1e6
    print(f"{source.kind}: {len(source.index)} samples indexed at {rate:.1f} MB/s")
    return {source.kind: rate}


def show_rate(disk: Disk, file: str) -> float:
    with disk.cold() as folder:
        rate = disks.sequential_rate(folder / file)
    print(f"{json.dumps(disk.describe())}: {rate:.1f} MB/s from one end of a file to the other")
    return rate


def measure_folder(args: argparse.Namespace) -> Measured:
    """Measure a data set of the user's."""
    disk: Disk = RealDisk(args.folder, args.drop_caches)
    with contextlib.ExitStack() as stack:
        if args.spindle:
            mountpoint = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-read-"))
            disk = Spindle(
                args.spindle, args.folder, Path(mountpoint), args.spindle_options.split()
            )
        files = (path for path in args.folder.rglob("*") if path.is_file())
        largest = max(files, key=lambda path: path.stat().st_size)
        rate = show_rate(disk, args.sequential or str(largest.relative_to(args.folder)))
        rows = [measure(disk, case) for case in cases_of_folder(args.folder, args)]
        return Measured(rows, [rate], {})


# ---- targets -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What has to be reached, and what was."""

    measure: str
    wanted: str
    value: float
    met: bool


def at_least(measure: str, value: float, bound: float) -> Target:
    return Target(measure, f">= {bound:g}", value, value >= bound)


def at_most(measure: str, value: float, bound: float) -> Target:
    return Target(measure, f"<= {bound:g}", value, value <= bound)


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """Compare the model's rows with what the project promises; void ones are left out."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["void"]:
            by_case.setdefault(row["case"], []).append(row)
    found = [target for row in by_case.get("bytes", []) for target in bytes_targets(row)]
    for row in by_case.get("training", []):
        where = f"{row['ranks']} ranks" if row["ranks"] > 1 else "1 process"
        found.append(at_most(f"longest gap as epochs begin, s, {where}", longest_wait(row), 1.0))
    for case in ("decoded", "webdataset", "lmdb", "official, in order"):
        where = "" if case == "decoded" else f", {case}"
        for row in by_case.get(case, []):
            found.append(at_most(f"s for 256 images decoded{where}", row["seconds_per_256"], 0.18))
    found += ram_targets(by_case)
    for case in (name for name in by_case if name.endswith(" files")):
        seconds = {row["reader"]: row["seconds_per_256"] for row in by_case[case]}
        if len(seconds) == 2:
            ratio = seconds["torchvision"] / seconds["imagenet_seq"]
            found.append(at_least(f"times torchvision's speed, {case}", ratio, 1.8))
    return found


def longest_wait(row: dict[str, Any]) -> float:
    return max(row["start_wait_s"], row["change_wait_s"])


def bytes_targets(row: dict[str, Any]) -> list[Target]:
    block = f"{row['block_mb']} MB blocks, readahead {row['readahead_kb']} KB"
    if row["block_mb"] > 16:
        return [at_least(f"disk MB/s, {block}", row["disk_mb_per_s"], 165)]
    if row["ranks"] == 1:
        return [
            at_least(f"disk MB/s, {block}", row["disk_mb_per_s"], 160),
            at_least(f"JPEG MB/s, {block}", row["sample_mb_per_s"], 157),
        ]
    ranks = f"{row['ranks']} ranks"
    return [
        at_least(f"disk MB/s, {ranks}", row["disk_mb_per_s"], 155),
        at_least(f"slowest to mean, {ranks}", row["slowest"], 0.9),
    ]


def ram_targets(by_case: dict[str, list[dict[str, Any]]]) -> list[Target]:
    found = []
    nothing, half = (by_case.get(name) for name in ("nothing kept", "half kept"))
    if nothing and half:
        share = sum(half[0]["epoch_disk_bytes"][1:]) / sum(nothing[0]["epoch_disk_bytes"][1:])
        found.append(at_most("half kept: disk bytes, off one half by", abs(share - 0.5), 0.02))
        differ = half[0]["digests"] != nothing[0]["digests"]
        found.append(at_most("half kept: other order or pixels", float(differ), 0))
    for row in by_case.get("no argument", []):
        found.append(at_most("no argument: bytes in epoch 2", row["epoch_disk_bytes"][1], 0))
    return found


def show_targets(found: Sequence[Target]) -> None:
    print(f"\n{'target':60} {'wanted':>8} {'measured':>10}")
    for target in found:
        print(
            f"{target.measure:60} {target.wanted:>8} {target.value:10.3f}  "
            f"{'met' if target.met else 'MISSED'}"
        )


# ---- main ----------------------------------------------------------------------------------------

CASES = (
    "bytes", "decoded", "training", "ram", "folder", "large-folder", "webdataset", "sources",
)  # fmt: skip
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def byte_size(text: str) -> int:
    matched = re.fullmatch(r"([0-9.]+) *([KMGT]?B?)", text)
    if matched is None or matched[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GB, got {text!r}")
    return int(float(matched[1]) * UNITS[matched[2]])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", type=Path, help="a pack or an ImageFolder")
    add("--ranks", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="default: 1 4 8")
    add("--limit", type=byte_size, default="4GB", metavar="SIZE", help="a run (default: 4GB)")
    add("--ram", type=byte_size, metavar="SIZE", help="also keep so much, over two whole epochs")
    add("--sequential", metavar="FILE", help="to measure the disk on")
    add("--drop-caches", action="store_true", help="empty the system's caches before each run")
    add("--spindle", type=Path, metavar="PROGRAM", help="the disk model's program")
    add("--spindle-options", default="", metavar="OPTIONS", help="of the model, such as --ncq=32")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="of the model")
    add("--photos", type=Path, default=photos.TRAIN, metavar="DIR", help=photos.WHERE)
    add("--images", type=int, default=10_000, metavar="N", help="of a pack (default: 10000)")
    add("--names", type=int, default=IMAGENET_IMAGES, metavar="N", help="of the large folder")
    add("--memory", default="/dev/shm", metavar="DIR", help="a tmpfs (default: /dev/shm)")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.folder is None and args.spindle is None:
        parser.error("expected DIR to read, or --spindle PROGRAM, or both")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = results.begin(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unmounts, as Ctrl-C does
    print(HEAD)
    made = measure_spindle(args) if args.folder is None else measure_folder(args)
    found = targets(made.rows) if args.folder is None else []
    if found:
        show_targets(found)
    measured = {
        **made._asdict(),
        "limit_bytes": args.limit,
        "targets": [target._asdict() for target in found],
    }
    results.write(args, origin, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
