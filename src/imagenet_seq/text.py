"""Sizes, durations and progress bars, in one form everywhere."""

from __future__ import annotations

import re
import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

_UNITS: dict[str, int] = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> float:
    """Return the bytes of a size such as "48GB" (10**9), "1.5 GiB" (2**30), "64k" or "4096".

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"expected a size such as 1GB or 512MiB, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def format_bytes(num_bytes: float) -> str:
    """Return a number of bytes in decimal units, such as "146.2 GB" or "48.9 KB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= 0.99995 * size:  # not "1000.0 KB"
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def format_seconds(seconds: float) -> str:
    """Return a duration, such as "4.2 s", "13.5 min" or "2.1 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def progress_bar(
    what: str,
    total: int,
    *,
    unit: str = "img",
    enabled: bool = True,
    done: int = 0,
    delay_s: int = 0,
) -> Any:
    """Return a progress bar on stderr; the caller closes it.

    Args:
        what: the work, such as "pack train".
        total: number of units.
        unit: "img", "class", "file", or "B", which is shown as KB, MB, ...
        enabled: whether anything is shown.
        done: number of units done before.
        delay_s: time before the bar appears.
    """
    return tqdm(
        desc=what, total=total, initial=done, unit=unit, unit_scale=unit == "B", delay=delay_s,
        disable=not enabled, dynamic_ncols=True, mininterval=0.5, file=sys.stderr,
    )  # fmt: skip
