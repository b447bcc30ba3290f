"""What every peer does: measure epochs of one loader in this process and say so as JSON.

Runs under each peer's own Python (3.9 or later) and needs nothing but what the peer needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP, RESIZE = 224, 256


class Task(NamedTuple):
    """What one process does."""

    folder: str  # an ImageFolder to train on
    val_folder: str  # one to compare pixels on, read in sorted order
    prepared: str  # a folder for what the peer makes of the two beforehand
    dtype: str  # "uint8" or "float32" (normalised)
    num_cores: int
    batch_size: int
    epochs: int  # measured after a first one, which warms up


class Peer(NamedTuple):
    """A loader to measure."""

    install: str  # the command that installs it
    # Returns what makes an epoch: an iterator over the images of each batch. Imports the peer.
    train: Callable[[Task], Callable[[], Iterator[int]]]
    # Returns the images of val_folder after Resize(256) and CenterCrop(224), as uint8 of shape
    # (N, 224, 224, 3).
    validate: Callable[[Task], Any]
    version: Callable[[], str]
    # Makes what it reads of the two folders, once for all measurements.
    prepare: Callable[[Task], None] = lambda task: None


def sorted_photos(folder: str) -> list[str]:
    """Return the photos of an ImageFolder in the order in which results are compared."""
    return sorted(str(path) for path in Path(folder).glob("*/*"))


def main(peer: Peer) -> None:
    """Do what the command line asks for: MODE TASK, with the task as JSON.

    Writes the result to the file descriptor that was standard output; what libraries print goes
    to standard error.
    """
    mode, task = sys.argv[1], Task(*json.loads(sys.argv[2]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.num_cores])
    try:
        result = _run(peer, mode, task)
    except ImportError as error:
        result = {"missing": f"{error}; {peer.install}"}
    json.dump(result, out)
    out.close()


def _run(peer: Peer, mode: str, task: Task) -> dict[str, Any]:
    if mode == "prepare":
        version = peer.version()
        peer.prepare(task)
        return {"version": version}
    if mode == "validate":
        import numpy as np

        path = os.path.join(task.prepared, "validated.npy")
        np.save(path, peer.validate(task))
        return {"path": path}
    return measure(peer.train(task), task.epochs)


def measure(epoch: Callable[[], Iterator[int]], num_epochs: int) -> dict[str, float]:
    """Run a first epoch and then as many as asked for; the rate is that of the latter."""
    begin = time.perf_counter()
    first = epoch()
    next(first)
    first_batch_seconds = time.perf_counter() - begin
    for _ in first:
        pass
    cpu_begin, begin = cpu_seconds(), time.perf_counter()
    num_images = sum(sum(epoch()) for _ in range(num_epochs))
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu_begin
    return {
        "images_per_second": num_images / seconds,
        "cpu_seconds_per_1000": 1000 * cpu / num_images,
        "first_batch_seconds": first_batch_seconds,
        "peak_megabytes": peak_bytes() / 1e6,
    }


# ---- the process and its workers ----


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children, also of those still running."""
    total = sum(os.times()[:4])
    ticks = os.sysconf("SC_CLK_TCK")
    for process in _children(os.getpid()):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / ticks
    return total


def peak_bytes() -> int:
    """Return the sum of the most memory that this process and each child has had.

    Pages that they share count for each of them.
    """
    if not os.path.exists("/proc/self/status"):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    total = 0
    for process in [os.getpid(), *_children(os.getpid())]:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


def _children(process: int) -> list[int]:
    children: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        children += map(int, path.read_text().split())
    return children + [grandchild for child in children for grandchild in _children(child)]
