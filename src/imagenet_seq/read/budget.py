"""The RAM budget: how many bytes of a dataset stay in memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from imagenet_seq import machine
from imagenet_seq.read.kept import unfilled_bytes
from imagenet_seq.text import format_bytes, parse_bytes

_MOST_OF_AVAILABLE = 0.9  # what an explicit ram= may take; training needs memory, too


@dataclass(frozen=True)
class Budget:
    """How a dataset is kept in memory."""

    page_cache: bool  # the whole source fits, so it is read buffered and the kernel keeps it
    kept_bytes: int  # of blocks to keep in `KeptMemory`, for the whole node; 0: none
    notes: tuple[str, ...] = ()  # what the user should know, such as what limited it
    reason: str = ""  # where the number comes from, as `describe` says it


def ram_budget(
    ram: str | int | float | None, dataset_bytes: int, *, limits: machine.Limits | None = None
) -> Budget:
    """Decide how many bytes of a dataset stay in memory.

    Memory that this process opened with `open_kept` and has not filled yet counts as used. The
    result depends on what is available now, so ranks that start at different times may get
    different numbers; the first to call `open_kept` decides for all.

    `ram` is "auto" (or None): a dataset that fits in half of the available memory is left to the
    page cache; of a larger one, half of the available memory is filled with its blocks. A size
    ("48GB", "512MiB", a number of bytes) or a share of the memory that this process's cgroup may
    use ("30%"): so much is filled, at most 90 % of what is available. 0: nothing is kept.

    Raises:
        ValueError: `ram` is no size, or one of less than a page.
        TypeError: `ram` is neither text nor a number.
    """
    limits = limits or machine.limits()
    wanted = _wanted_bytes(ram, limits.total_bytes)
    available = max(0, limits.available_bytes - unfilled_bytes())
    if wanted is None:
        half = available // 2
        reason = f"half of the {format_bytes(available)} available"
        if dataset_bytes <= half:
            return Budget(True, 0, reason=f"fits in {reason}")
        return Budget(False, half, reason=reason)
    kept, most = min(wanted, dataset_bytes), int(available * _MOST_OF_AVAILABLE)
    if kept <= most:
        return Budget(False, kept, reason=f"ram={ram!r}")
    by = f" under the limit of the cgroup {limits.cgroup}" if limits.cgroup else ""
    note = (
        f"ram={ram!r}: {format_bytes(most)} are kept in memory instead of {format_bytes(kept)}: "
        f"{format_bytes(available)} are available{by}, of which a tenth is left for other uses"
    )
    return Budget(False, most, (note,), f"90 % of the {format_bytes(available)} available")


def describe(budget: Budget, dataset_bytes: int) -> str:
    """Return a budget as one line, such as "keeps 64.0 GB of 146.2 GB in memory (ram='64GB')"."""
    if budget.page_cache:
        return f"leaves {format_bytes(dataset_bytes)} to the page cache ({budget.reason})"
    if not budget.kept_bytes:
        return f"keeps nothing in memory ({budget.reason})"
    kept = format_bytes(min(budget.kept_bytes, dataset_bytes))
    return f"keeps {kept} of {format_bytes(dataset_bytes)} in memory ({budget.reason})"


def _wanted_bytes(ram: str | int | float | None, total_bytes: int) -> int | None:
    """Return the bytes that `ram` asks for; None: it says "auto"."""
    expected = "expected 'auto', a size such as '48GB' or '512MiB', a share such as '30%', or 0"
    if ram is None:
        return None
    if isinstance(ram, bool) or not isinstance(ram, (str, int, float, np.integer)):
        raise TypeError(f"ram: {expected}; got {ram!r}")
    if not isinstance(ram, str):
        wanted = float(ram)
    elif ram.strip().lower() == "auto":
        return None
    elif (share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", ram.strip())) and float(share[1]) <= 100:
        wanted = float(share[1]) * (total_bytes / 100)
    else:
        try:
            wanted = parse_bytes(ram)
        except ValueError:
            raise ValueError(f"ram: {expected}; got {ram!r}") from None
    # Nobody means less than a page: 48 was meant as GB, 0.3 as a share.
    if not (wanted == 0 or 4096 <= wanted < math.inf):
        raise ValueError(f"ram: {expected}; got {ram!r}, which is {wanted:g} bytes")
    return int(wanted)
