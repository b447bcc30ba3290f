"""What disk and memory allow a training to do, before its first batch.

Pure arithmetic: no file is touched here. An epoch takes the disk one positioning for every request
that does not begin where the last one ended, and the bytes at its sequential rate. Decoding may
take longer; nothing makes the disk faster.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from imagenet_seq.read.arrange import Reading
from imagenet_seq.read.disk import Disk
from imagenet_seq.read.speed import Speed
from imagenet_seq.text import format_bytes, format_seconds

if TYPE_CHECKING:
    from imagenet_seq.index.source import Source


REQUESTS_PER_FILE = 2
"""Of an unpacked folder: a file's inode lies elsewhere than its bytes."""


WINDOW_GAIN = 2.2
"""How much faster files are found that are read by the thousand in the order they lie on the disk,
instead of in random order. With it a file takes what was measured with windows of 4096 of 1.28
million files on the disk model (docs/hard-disk.md): 8 ms."""


SMALLER_RATIO = 54.5 / 109.6
"""Bytes that `pack --max-side 500 --quality 90` leaves, measured on ImageNet's photos, in KB."""


_SMALLER = "pack --max-side 500 --quality 90"


_LEAST_TO_SHRINK_BYTES = 80_000
"""Images that are smaller than this on average were not made for such a pack to save half."""


_MORE_RAM_BYTES = 16 * 10**9


_KINDS = {
    "hdd": "hard disk", "ssd": "SSD", "network": "network", "fuse": "FUSE", "memory": "memory",
    "unknown": "of unknown kind",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be read, and from what.

    Args:
        name: for messages, such as "train".
        kind: of the source: "pack", "imagefolder", ...
        num_samples: samples of an epoch, over all ranks of the node.
        data_bytes: bytes of an epoch, over all ranks of the node.
        order: "blocks" in random order, "sequence" (blocks as they lie), "files" in random order,
            or "window": files in random order, but read by the thousand as they lie.
        disk: what the data lies on.
        speed: of the disk; None: unknown, and no time is forecast.
        block_bytes: bytes of a block.
        kept_bytes: bytes that stay in memory from epoch to epoch.
        page_cache: whether everything stays in memory.
        num_readers: requests under way at once, where the disk has not one head.
        num_ranks: ranks on the node.
        is_estimate: whether `data_bytes` was estimated from some of the files.
    """

    name: str
    kind: str
    num_samples: int
    data_bytes: int
    order: str
    disk: Disk
    speed: Speed | None = None
    block_bytes: int = 16 << 20
    kept_bytes: int = 0
    page_cache: bool = False
    num_readers: int = 1
    num_ranks: int = 1
    is_estimate: bool = False

    @property
    def num_requests(self) -> int:
        """Requests of an epoch that comes from the disk as a whole."""
        if self.order in ("files", "window"):
            return REQUESTS_PER_FILE * self.num_samples
        # A block across the cut between two ranks is read for both.
        return math.ceil(self.data_bytes / self.block_bytes) + self.num_ranks - 1


@dataclass(frozen=True)
class Epoch:
    """What an epoch costs.

    Attributes:
        bytes_from_disk: over all ranks.
        bytes_from_memory: the rest.
        seeks: requests that don't begin where the last one ended.
        minutes: that the disk takes; None: unknown.
        images_per_s: over all ranks; None: unknown, or the disk is not read.
    """

    bytes_from_disk: int
    bytes_from_memory: int
    seeks: int
    minutes: float | None
    images_per_s: float | None


@dataclass(frozen=True)
class Choice:
    """What would make the epochs shorter, the job that it makes of this one, and its epochs."""

    what: str
    job: Job
    first: Epoch
    later: Epoch


@dataclass(frozen=True)
class Forecast:
    """What disk and memory allow; `forecast` makes it.

    Attributes:
        job: what it is about.
        first: the first epoch, with nothing in memory yet.
        later: each epoch after it.
        choices: what the user could do about it.
    """

    job: Job
    first: Epoch
    later: Epoch
    choices: tuple[Choice, ...]

    def line(self) -> str:
        """Return what matters, in one line."""
        job, later = self.job, self.later
        start = f"imagenet-seq: {job.name} on {_where(job)}: {_amount(job)}"
        if job.disk.kind == "memory":
            return f"{start} an epoch, no disk is read"
        if not later.bytes_from_disk:
            first = f"; the first takes {_time(job, self.first)}" if self.first.minutes else ""
            return f"{start} fit in memory: from the second epoch on the disk is not read{first}"
        part = (
            f"{format_bytes(later.bytes_from_disk)} of it"
            if later.bytes_from_memory
            else "all of it"
        )
        hint = ""
        if self.choices and (minutes := self.choices[0].later.minutes):
            hint = f"; with {self.choices[0].what} {format_seconds(60 * minutes)}"
        return (
            f"{start} an epoch, {part} from the disk: {_time(job, later, ' an epoch')}{hint}; "
            "`imagenet-seq info` says more"
        )

    def text(self) -> str:
        """Return all of it for people, a line for each fact."""
        job = self.job
        measured = f", measured {job.speed.measured_at}" if job.speed else ""
        facts = {
            "disk": _where(job) + measured,
            "epoch": f"{_amount(job)} in {_parts(job)}",
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
        job = self.job
        return {
            **asdict(job),
            "first_epoch": asdict(self.first),
            "later_epochs": asdict(self.later),
            "choices": [
                {
                    "what": choice.what,
                    "first_epoch": asdict(choice.first),
                    "later_epochs": asdict(choice.later),
                }
                for choice in self.choices
            ],
        }


def forecast_job(job: Job) -> Forecast:
    """Forecast the epochs of a job, and what they would be with more memory or a (smaller) pack."""
    later = _later(job)
    choices: dict[str, Job] = {}
    if job.kind != "pack":
        choices["a pack"] = packed = replace(job, kind="pack", order="blocks")
    else:
        packed = job
    if later.bytes_from_disk:
        missing = later.bytes_from_disk
        if missing > _MORE_RAM_BYTES:
            choices["16 GB more RAM"] = _with_more_ram(job, _MORE_RAM_BYTES)
        choices[f"{format_bytes(missing)} more RAM"] = _with_more_ram(job, missing)
    if job.num_samples and job.data_bytes / job.num_samples >= _LEAST_TO_SHRINK_BYTES:
        small_bytes = round(job.data_bytes * SMALLER_RATIO)
        smaller = replace(packed, data_bytes=small_bytes, is_estimate=True)
        choices[_SMALLER] = smaller
    if job.disk.kind == "memory" or (job.kind == "pack" and not later.bytes_from_disk):
        choices = {}
    return Forecast(
        job,
        _first(job),
        later,
        tuple(Choice(what, other, _first(other), _later(other)) for what, other in choices.items()),
    )


def _with_more_ram(job: Job, more_bytes: int) -> Job:
    kept_bytes = min(job.kept_bytes, job.data_bytes)
    return replace(job, kept_bytes=kept_bytes + more_bytes)


def _first(job: Job) -> Epoch:
    return _epoch(job, 0)


def _later(job: Job) -> Epoch:
    return _epoch(job, job.data_bytes if job.page_cache else min(job.kept_bytes, job.data_bytes))


def _epoch(job: Job, kept_bytes: int) -> Epoch:
    """Return the cost of an epoch of which `kept_bytes` are in memory already."""
    if job.disk.kind == "memory":
        kept_bytes = job.data_bytes
    from_disk = job.data_bytes - kept_bytes
    num_requests = math.ceil(job.num_requests * from_disk / max(1, job.data_bytes))
    # Blocks that lie behind each other need no positioning, except where each rank begins.
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


# ---- words ---------------------------------------------------------------------------------------


def _where(job: Job) -> str:
    facts = _KINDS[job.disk.kind]
    if job.speed:
        facts += f", {job.speed.sequential_mb_s:,.0f} MB/s, {job.speed.positioning_ms:.1f} ms"
    return f"{job.disk.name} ({facts})"


def _amount(job: Job) -> str:
    return f"{'about ' if job.is_estimate else ''}{format_bytes(job.data_bytes)}"


def _parts(job: Job) -> str:
    if job.order in ("files", "window"):
        return f"{job.num_samples:,} files"
    return f"{job.num_requests:,} blocks"


def _described(job: Job, epoch: Epoch) -> str:
    if not epoch.bytes_from_disk:
        return "the disk is not read"
    memory = (
        f", {format_bytes(epoch.bytes_from_memory)} from memory" if epoch.bytes_from_memory else ""
    )
    time = _time(job, epoch)
    about = "about " if job.is_estimate else ""
    from_disk = f"{about}{format_bytes(epoch.bytes_from_disk)} from the disk"
    return f"{from_disk}, {epoch.seeks:,} seeks{memory}: {time}"


def _time(job: Job, epoch: Epoch, per: str = "") -> str:
    """Return how long an epoch takes and what that is in images, as far as it is known."""
    if epoch.minutes is None or epoch.images_per_s is None:
        return "time unknown, the disk was not measured"
    # A head that reads blocks can't be faster than this; the rest is less certain.
    is_bound = job.disk.has_one_head and job.order in ("blocks", "sequence")
    is_bound = is_bound and not job.is_estimate
    each = f", {epoch.images_per_s / job.num_ranks:,.0f} a rank" if job.num_ranks > 1 else ""
    return (
        f"{'at least' if is_bound else 'about'} {format_seconds(60 * epoch.minutes)}{per}, "
        f"{epoch.images_per_s:,.0f} images/s{each}"
    )


FORECAST_BYTES = 100 * 10**6
"""Of less there is nothing to forecast: it is read before anybody would know."""


def forecast_of(
    source: Source, reading: Reading, *, num_samples: int, block_bytes: int, order: str
) -> Forecast:
    """Return what disk and memory allow.

    Args:
        source: the data.
        reading: how it is read.
        num_samples: samples of an epoch, over all ranks.
        block_bytes: bytes of a block.
        order: "blocks", "sequence" or "files", as `forecast.Job` has it.
    """
    data_bytes = reading.data_bytes * num_samples // max(1, len(source.index))
    kept = reading.native.kept
    return forecast_job(
        Job(
            name=os.path.basename(os.path.abspath(source.index.root)),
            kind=source.kind,
            num_samples=num_samples,
            data_bytes=data_bytes,
            order="window" if order == "files" and reading.window else order,
            disk=reading.disk,
            speed=reading.speed,
            block_bytes=block_bytes,
            kept_bytes=min(reading.budget.kept_bytes, data_bytes) if kept else 0,
            page_cache=reading.budget.page_cache,
            num_readers=reading.native.num_readers,
            num_ranks=reading.num_ranks,
            is_estimate=source.index.length is None,
        )
    )


class Pace:
    """What happened between one look at an engine's counters and the next."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._looked_s = time.monotonic()

    def line(self, stats: dict[str, float], reading: Reading, num_decoders: int) -> str:
        """Return one line on the time since the last call.

        Args:
            stats: the counters, as `Loader.stats` gives them.
            reading: how the source is read.
            num_decoders: threads that decode.
        """
        now_s = time.monotonic()
        elapsed_s, self._looked_s = max(1e-9, now_s - self._looked_s), now_s
        before, self._before = self._before, stats
        if any(stats.get(name, 0) < before.get(name, 0) for name in ("read_bytes", "batch_count")):
            before = {}  # another engine counts from zero

        def more(name: str) -> float:
            return stats.get(name, 0) - before.get(name, 0)

        def share(name: str, num_threads: int = 1) -> str:
            return f"{100 * more(name) / elapsed_s / num_threads:.0f} %"

        can = f" of {reading.speed.sequential_mb_s:.0f}" if reading.speed else ""
        read = more("read_bytes") - more("read_cached_bytes")
        kept = more("read_kept_bytes") + more("read_cached_bytes")
        from_memory = f", {100 * kept / (read + kept):.0f} % from memory" if kept else ""
        filled = stats.get("block_bytes", 0) / max(1, stats.get("block_budget_bytes", 0))
        return (
            f"read {read / 1e6 / elapsed_s:.0f}{can} MB/s{from_memory}, "
            f"blocks {100 * filled:.0f} % full; waiting: training for data "
            f"{share('batch_wait_s')}, decoding for the disk "
            f"{share('decode_wait_read_s', num_decoders)} and for training "
            f"{share('decode_wait_batch_s', num_decoders)}, reading for decoding "
            f"{share('read_wait_s', reading.native.num_readers)} and for its turn "
            f"{share('read_lock_wait_s', reading.native.num_readers)}"
        )
