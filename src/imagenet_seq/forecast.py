"""What disk and memory allow a training to do, before its first batch.

Pure arithmetic: no file is touched here. An epoch takes the disk one positioning for every request
that does not begin where the last one ended, and the bytes at its sequential rate. Decoding may
take longer; nothing makes the disk faster.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from imagenet_seq.disk import Disk, Speed

REQUESTS_PER_FILE = 2
"""Of an unpacked folder: a file's inode lies elsewhere than its bytes."""

WINDOW_GAIN = 2.2
"""How much faster files are found that are read by the thousand in the order they lie on the disk,
instead of in random order: measured with windows of 4096 of 1.28 million files on the disk model."""

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
    """What would make the epochs shorter, and the epochs with it."""

    what: str
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
        """Return what matters in one line."""
        job, later = self.job, self.later
        start = f"imagenet-seq: {job.name} on {_where(job)}: {_amount(job)}"
        if job.disk.kind == "memory":
            return f"{start} an epoch, no disk is read"
        if not later.bytes_from_disk:
            first = _time(job, self.first)
            return (
                f"{start} fit in memory: from the second epoch on the disk is not read"
                + (f"; the first takes {first}" if first else "")
            )
        part = f"{_size(later.bytes_from_disk)} of it" if later.bytes_from_memory else "all of it"
        times = _time_and_rate(job, later, "an epoch") or "how fast it is was not measured"
        hints = "".join(
            f"; {_in_a_line(choice.what)} {_duration(choice.later.minutes)}"
            for choice in self.choices[:1]
            if choice.later.minutes
        )
        return f"{start} an epoch, {part} from the disk: {times}{hints}; `imagenet-seq info` says more"

    def text(self) -> str:
        """Return all of it, for people: several lines."""
        job = self.job
        lines = [("disk", _where(job) + (f", measured {job.speed.measured_at}" if job.speed else ""))]
        if job.order in ("files", "window"):
            lines.append(("data", f"{_amount(job)} in {job.num_samples:,} files"))
        else:
            lines.append(
                ("data", f"{_amount(job)} in {job.num_requests:,} blocks of about {_size(job.block_bytes)}")
            )
        kept = self.later.bytes_from_memory
        if job.disk.kind == "memory":
            lines.append(("memory", "all of it; no disk is read"))
        elif not self.later.bytes_from_disk:
            lines.append(("memory", "all of it from the second epoch on; then the disk is not read"))
        else:
            lines.append(("memory", f"{_size(kept)} stay there from epoch to epoch"))
        lines.append(("first epoch", _described(job, self.first)))
        lines.append(("later epochs", _described(job, self.later)))
        lines += [
            ("with " + choice.what, _described(job, choice.later if choice.later.bytes_from_disk else choice.first)) for choice in self.choices
        ]
        if job.speed is None and job.disk.kind != "memory":
            lines.append(("note", "how fast the disk is was not measured, so no times are given"))
        width = max(20, *(len(name) + 2 for name, _ in lines))
        return "\n".join(f"{name + ':':{width}} {value}" for name, value in lines)

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
