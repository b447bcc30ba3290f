"""What disk and memory allow a training to do, before it begins; and what limits it while it runs.

Pure arithmetic: no file is touched here. An epoch takes the disk one positioning for every request
that does not begin where the last one ended, and the bytes at its sequential rate. Decoding may
take longer.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from imagenet_seq.plan.order import Order, epoch_size
from imagenet_seq.read.arrange import ReadStrategy, num_python_blocks
from imagenet_seq.read.disk import Disk
from imagenet_seq.read.speed import Speed
from imagenet_seq.text import format_bytes, format_seconds

if TYPE_CHECKING:
    from imagenet_seq.index.source import Source


FORECAST_BYTES = 100 * 10**6
"""Smaller data gets no forecast: it is read before one would help."""

REQUESTS_PER_FILE = 2
"""Of an unpacked folder: a file's inode lies elsewhere than its bytes."""

WINDOW_GAIN = 2.2
"""Speed-up of positioning from reading files sorted by disk position instead of in random order. It
makes 8 ms a file, as measured with windows of 4096 of 1.28 million files (docs/hard-disk.md)."""

SMALLER_RATIO = 54.5 / 109.6
"""Share of the bytes that `pack --max-side 500 --quality 90` leaves of ImageNet's photos."""

_LEAST_TO_SHRINK_BYTES = 80_000
"""Below this mean size shrinking no longer saves half, so it is not offered."""

_MORE_RAM_BYTES = 16 * 10**9

_KINDS = {
    "hdd": "hard disk", "ssd": "SSD", "network": "network", "fuse": "FUSE", "memory": "memory",
    "unknown": "of unknown kind",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be read, and from what.

    `order` is "blocks" in random order; "sequence": blocks as they lie; "files" in random order;
    "window": files in random order, but read by the thousand as they lie; "block per sample": a
    whole block for every sample.
    """

    name: str  # for messages, such as "train"
    kind: str  # of the source: "pack", "imagefolder", ...
    num_samples: int  # of an epoch, over all ranks of the node
    data_bytes: int  # of those samples on the disk
    order: str
    disk: Disk
    speed: Speed | None = None  # None: unknown, and no time is forecast
    block_bytes: int = 16 << 20
    num_blocks: int = 0  # of a source that decides how large they are; 0: it does not
    kept_bytes: int = 0  # that stay in memory from epoch to epoch
    page_cache: bool = False  # everything stays in memory
    num_readers: int = 1  # requests under way at once, on a disk without a head
    num_ranks: int = 1  # on the node
    is_estimate: bool = False  # `data_bytes` was estimated from some of the files

    @property
    def num_requests(self) -> int:
        """Requests of an epoch that comes from the disk as a whole."""
        if self.order in ("files", "window"):
            return REQUESTS_PER_FILE * self.num_samples
        if self.order == "block per sample":
            return self.num_samples
        num_blocks = self.num_blocks or math.ceil(self.data_bytes / self.block_bytes)
        return num_blocks + self.num_ranks - 1  # a block across the cut between ranks is read twice

    @property
    def epoch_bytes(self) -> int:
        """Bytes that an epoch needs, from the disk or from memory."""
        if self.order == "block per sample":
            return self.num_samples * self.data_bytes // max(1, self.num_blocks)
        return self.data_bytes


@dataclass(frozen=True)
class Epoch:
    """What an epoch costs."""

    bytes_from_disk: int  # over all ranks
    bytes_from_memory: int  # the rest
    seeks: int  # requests that don't begin where the last one ended
    minutes: float | None  # that the disk takes; None: unknown
    images_per_s: float | None  # over all ranks; None: unknown, or the disk is not read


@dataclass(frozen=True)
class Choice:
    """What would make the epochs shorter, the job that it makes of this one, and its epochs."""

    what: str
    job: Job
    first: Epoch
    later: Epoch


@dataclass(frozen=True)
class Forecast:
    """What disk and memory allow."""

    job: Job
    first: Epoch  # with nothing in memory yet
    later: Epoch  # each one after it
    choices: tuple[Choice, ...]  # what the user could do about it

    def line(self) -> str:
        """Return what matters, in one line."""
        hint = ""
        if self.choices and self.later.bytes_from_disk and self.choices[0].later.minutes:
            hint = f"; with {self.choices[0].what} {_duration(self.choices[0].later)}"
        return f"imagenet-seq: {self.job.name} on {self.disk()}: {self.epochs()}{hint}"

    def disk(self) -> str:
        """Return the disk's name, kind and speed, such as "sda (hard disk, 180 MB/s, 12.5 ms)"."""
        disk, speed = self.job.disk, self.job.speed
        facts = [_KINDS[disk.kind]]
        if speed:
            facts += [f"{speed.sequential_mb_s:,.0f} MB/s", f"{speed.positioning_ms:.1f} ms"]
        elif disk.kind != "memory":
            facts.append("speed not measured")
        return f"{disk.name} ({', '.join(facts)})"

    def epochs(self) -> str:
        """Return what the epochs read, and how long that takes where it is known."""
        job, later = self.job, self.later
        amount = _about(job, job.epoch_bytes)
        if job.disk.kind == "memory":
            return f"{amount} in memory; no disk is read"
        if not later.bytes_from_disk:
            return f"{amount} fit in memory; only epoch 1 reads the disk{_pace(job, self.first)}"
        part = f"{_about(job, later.bytes_from_disk)} of {amount}"
        read = part if later.bytes_from_memory else f"all {amount}"
        return f"each epoch reads {read} from the disk{_pace(job, later)}"

    def text(self) -> str:
        """Return all of it for people, a line for each fact."""
        job = self.job
        measured = f", measured {job.speed.measured_at}" if job.speed else ""
        facts = {
            "disk": self.disk() + measured,
            "epoch": f"{_about(job, job.epoch_bytes)} in {_parts(job)}",
            "first epoch": _described(job, self.first),
            "later epochs": _described(job, self.later),
        }
        for choice in self.choices:
            # Where only the first epoch reads the disk, that is the one to compare.
            epoch = choice.later if self.later.bytes_from_disk else choice.first
            facts[f"with {choice.what}"] = _described(choice.job, epoch)
        width = max(20, *(len(name) + 2 for name in facts))
        return "\n".join(f"{name + ':':{width}} {value}" for name, value in facts.items())

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        choices = [{"what": choice.what, **_epochs_of(choice)} for choice in self.choices]
        return {**asdict(self.job), **_epochs_of(self), "choices": choices}


def _epochs_of(made: Forecast | Choice) -> dict[str, Any]:
    return {"first_epoch": asdict(made.first), "later_epochs": asdict(made.later)}


def forecast_job(job: Job) -> Forecast:
    """Forecast a job's epochs, also with more memory, with a pack and with a smaller pack."""
    later = _later(job)
    choices: dict[str, Job] = {}
    packed = job
    if job.kind != "pack":
        choices["a pack"] = packed = replace(job, kind="pack", order="blocks", num_blocks=0)
    if later.bytes_from_disk and job.order != "block per sample":
        missing = later.bytes_from_disk
        if missing > _MORE_RAM_BYTES:
            choices["16 GB more RAM"] = _with_more_ram(job, _MORE_RAM_BYTES)
        choices[f"{format_bytes(missing)} more RAM"] = _with_more_ram(job, missing)
    if job.num_samples and job.data_bytes / job.num_samples >= _LEAST_TO_SHRINK_BYTES:
        small_bytes = round(job.data_bytes * SMALLER_RATIO)
        choices["pack --max-side 500 --quality 90"] = replace(
            packed, data_bytes=small_bytes, is_estimate=True
        )
    if job.disk.kind == "memory" or (job.kind == "pack" and not later.bytes_from_disk):
        choices = {}
    made = (Choice(what, other, _first(other), _later(other)) for what, other in choices.items())
    return Forecast(job, _first(job), later, tuple(made))


def _with_more_ram(job: Job, more_bytes: int) -> Job:
    return replace(job, kept_bytes=min(job.kept_bytes, job.data_bytes) + more_bytes)


def _first(job: Job) -> Epoch:
    return _epoch(job, 0)


def _later(job: Job) -> Epoch:
    return _epoch(job, job.epoch_bytes if job.page_cache else min(job.kept_bytes, job.epoch_bytes))


def _epoch(job: Job, kept_bytes: int) -> Epoch:
    """Return the cost of an epoch of which `kept_bytes` are in memory already."""
    if job.disk.kind == "memory":
        kept_bytes = job.epoch_bytes
    from_disk = job.epoch_bytes - kept_bytes
    num_requests = math.ceil(job.num_requests * from_disk / max(1, job.epoch_bytes))
    # Adjacent blocks need no positioning, except where each rank begins.
    seeks = min(job.num_ranks, num_requests) if job.order == "sequence" else num_requests
    seconds = _seconds(job, from_disk, seeks)
    return Epoch(
        bytes_from_disk=from_disk,
        bytes_from_memory=kept_bytes,
        seeks=seeks,
        minutes=None if seconds is None else seconds / 60,
        images_per_s=job.num_samples / seconds if seconds else None,
    )


def _seconds(job: Job, num_bytes: int, seeks: int) -> float | None:
    if not num_bytes:
        return 0.0
    if job.speed is None:
        return None
    positioning_s = seeks * job.speed.positioning_ms / 1e3
    if job.order == "window":
        positioning_s /= WINDOW_GAIN
    if not job.disk.has_one_head:
        positioning_s /= job.num_readers
    return positioning_s + num_bytes / (job.speed.sequential_mb_s * 1e6)


def forecast_reading(source: Source, strategy: ReadStrategy, order: Order) -> Forecast:
    """Forecast training on a source that is read in this way and order."""
    index = source.index
    num_samples = epoch_size(len(index), order)
    data_bytes = strategy.data_bytes * num_samples // max(1, len(index))
    return forecast_job(
        Job(
            name=os.path.basename(os.path.abspath(index.root)),
            kind=source.kind,
            num_samples=num_samples,
            data_bytes=data_bytes,
            order=_read_order(source, strategy, order),
            disk=strategy.disk,
            speed=strategy.speed,
            block_bytes=order.block_bytes,
            num_blocks=num_python_blocks(source) if source.python_blocks else 0,
            kept_bytes=min(strategy.budget.kept_bytes, data_bytes),
            page_cache=strategy.budget.page_cache,
            num_readers=strategy.num_readers,
            num_ranks=strategy.num_ranks,
            is_estimate=index.length is None and not source.python_blocks,
        )
    )


def _read_order(source: Source, strategy: ReadStrategy, order: Order) -> str:
    """Return what `Job.order` calls the order in which the disk is read."""
    if strategy.in_blocks:
        return "sequence" if order.shuffle == "none" else "blocks"
    if source.python_blocks:  # once a file has been read, the page cache has it
        return "blocks" if strategy.budget.page_cache else "block per sample"
    return "window" if strategy.window else "files"


# ---- words ---------------------------------------------------------------------------------------


def _about(job: Job, num_bytes: int) -> str:
    return f"{'about ' if job.is_estimate else ''}{format_bytes(num_bytes)}"


def _parts(job: Job) -> str:
    if job.order in ("files", "window"):
        return f"{job.num_samples:,} files"
    return f"{job.num_requests:,} blocks"


def _described(job: Job, epoch: Epoch) -> str:
    if not epoch.bytes_from_disk:
        return "the disk is not read"
    kept = epoch.bytes_from_memory
    memory = f", {format_bytes(kept)} from memory" if kept else ""
    from_disk = f"{_about(job, epoch.bytes_from_disk)} from the disk, {epoch.seeks:,} seeks"
    return from_disk + memory + _pace(job, epoch)


def _pace(job: Job, epoch: Epoch) -> str:
    """Return how long an epoch takes and what that is in images; "" where it is not known."""
    if epoch.images_per_s is None:
        return ""
    # Only a head that reads blocks certainly takes that long.
    is_bound = job.disk.has_one_head and job.order in ("blocks", "sequence")
    word = "at least" if is_bound and not job.is_estimate else "about"
    each = f", {epoch.images_per_s / job.num_ranks:,.0f} a rank" if job.num_ranks > 1 else ""
    return f": {word} {_duration(epoch)}, {epoch.images_per_s:,.0f} images/s{each}"


def _duration(epoch: Epoch) -> str:
    return format_seconds(60 * (epoch.minutes or 0))


# ---- while it runs -------------------------------------------------------------------------------


_HARDLY_WAITS = 0.05  # share of the time that training may wait and still be the bottleneck


class Pace:
    """What happened between one look at an engine's counters and the next."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._looked_s = time.monotonic()

    def line(self, stats: dict[str, float], speed: Speed | None, num_decoders: int) -> str:
        """Return one line on the time since the last call, such as "bottleneck: ... | read ...".

        `stats` are the counters, as `Loader.stats` gives them.
        """
        now_s = time.monotonic()
        elapsed_s, self._looked_s = max(1e-9, now_s - self._looked_s), now_s
        before, self._before = self._before, stats
        if any(stats.get(name, 0) < before.get(name, 0) for name in ("read_bytes", "batch_count")):
            before = {}  # another engine counts from zero
        more = {name: value - before.get(name, 0) for name, value in stats.items()}
        if not more.get("batch_count"):
            return "bottleneck: not known, no batch was made"
        said = f"bottleneck: {bottleneck(more, elapsed_s, num_decoders)}"
        read = more["read_bytes"] - more["read_cached_bytes"]
        kept = more["read_kept_bytes"] + more["read_cached_bytes"]
        can = f" of {speed.sequential_mb_s:.0f}" if speed else ""
        from_memory = f", {100 * kept / (read + kept):.0f} % from memory" if kept else ""
        return f"{said} | read {read / 1e6 / elapsed_s:.0f}{can} MB/s{from_memory}"


def bottleneck(counts: dict[str, float], elapsed_s: float, num_decoders: int) -> str:
    """Return what limits the speed, and for how much of the time training waits for data.

    Training that hardly waits is the bottleneck itself. Otherwise it is what decoders do or wait
    for most of the time:

    * they wait for blocks: the disk, or Python where it unpacks the blocks;
    * they wait for a free batch, and Python finishes rows: the Python part of the transform;
    * they wait for a free batch, and Python does nothing: your training, which takes batches
      unevenly;
    * they decode: decoding.

    `counts` say how far the counters of `Loader.stats` have moved in this time.
    """
    waits = counts["batch_wait_s"] / elapsed_s
    for_blocks = counts["decode_wait_read_s"] / elapsed_s / num_decoders
    for_batch = counts["decode_wait_batch_s"] / elapsed_s / num_decoders
    busy = 1 - for_blocks - for_batch
    if waits < _HARDLY_WAITS:
        name = "your training"
    elif for_blocks >= max(for_batch, busy):
        name = "unpacking blocks in Python" if counts["python_blocks"] else "the disk"
    elif for_batch >= busy:
        name = "the Python part of the transform" if counts["python_rows"] else "your training"
    else:
        name = "decoding"
    who = "" if name == "your training" else "training "
    return f"{name} ({who}waits {100 * waits:.0f} % for data)"
