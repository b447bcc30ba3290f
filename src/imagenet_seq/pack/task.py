"""What a run of packing is asked to do, and the images that it could not pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from imagenet_seq.errors import PackError
from imagenet_seq.pack.io_log import NO_LOG, IoLog
from imagenet_seq.sources.formats.pack import PARTIAL_SUFFIX
from imagenet_seq.sources.place import Found
from imagenet_seq.text import progress_bar

OnImageError = Literal["fail", "skip", "keep"]
"""What to do with an image that cannot be read or decoded."""


class Form(NamedTuple):
    """What is made: a pack, or an LMDB file in random order or in that of the source."""

    is_lmdb: bool = False
    in_source_order: bool = False

    def describe(self) -> dict[str, Any]:
        """Return what a continued run must agree on, beside the settings."""
        return {"format": "lmdb", "in_source_order": self.in_source_order} if self.is_lmdb else {}


class Task(NamedTuple):
    """One pack or LMDB file to make.

    Attributes:
        key: its key in what `pack_dataset` returns: a split, or "" where the source is no root.
        split: the split that it holds; None: not known.
        found: the source.
        destination: path of the pack or file.
        form: which of the two it is.
    """

    key: str
    split: str | None
    found: Found
    destination: str
    form: Form = Form()

    @property
    def partial(self) -> str:
        """The folder that it is made in."""
        return self.destination + PARTIAL_SUFFIX

    @property
    def title(self) -> str:
        """What its progress bars begin with."""
        return f"pack {self.split}" if self.split else "pack"


class RunOptions(NamedTuple):
    """How to work; changes no byte of a pack that is finished without failures.

    Attributes:
        on_error: what to do with bad images; None: stop, as reshuffling does.
        num_workers: threads that encode.
        memory_bytes: bound on the buffers of scratch files.
        progress: whether to show progress on stderr.
        log: of requests.
        title: what progress bars begin with.
    """

    on_error: OnImageError | None
    num_workers: int
    memory_bytes: int
    progress: bool
    log: IoLog = NO_LOG
    title: str = "pack"

    def bar(self, what: str, total: int, done: int = 0, unit: str = "img") -> Any:
        """Return a progress bar for one pass of the run."""
        what = f"{self.title}: {what}"
        return progress_bar(what, total, unit=unit, enabled=self.progress, done=done)


# ---- failures ------------------------------------------------------------------------------------

MAX_REPORTED = 20
"""Failures that a message names."""

_MAX_UNREADABLE = 20
"""With every on_error: so many files that the system cannot read mean a dying disk."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be packed as an image.

    Attributes:
        name: its name in the source.
        reason: what is wrong with it.
        kept: whether its bytes are in the pack all the same (on_error="keep").
    """

    name: str
    reason: str
    kept: bool


def list_failures(failures: Sequence[Failure]) -> str:
    """Return a line for each failure, by name; of many, the first 20."""
    by_name = sorted(failures, key=lambda failure: failure.name)
    lines = [f"  {failure.name}: {failure.reason}" for failure in by_name[:MAX_REPORTED]]
    if len(by_name) > MAX_REPORTED:
        lines.append(f"  and {len(by_name) - MAX_REPORTED} more")
    return "\n".join(lines)


def refuse_dying_disk(unreadable: Sequence[Failure], root: str, partial: str) -> None:
    """Stop in every mode: on_error is for a few bad images, not for a disk that fails."""
    if len(unreadable) >= _MAX_UNREADABLE:
        raise PackError(
            f"{len(unreadable)} files cannot be read, so packing stops:\n"
            + list_failures(unreadable)
            + f"\nCheck the disk, the connection and the permissions of {root}, or take these "
            f"files out of it; then run the command again: it continues from {partial}"
        )
