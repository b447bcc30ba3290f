"""Measure time and memory to open and plan a synthetic index of 1.28 and 14 million samples.

    python benchmarks/bench_plan.py [--samples 1281167] [--samples 14197122] [--keep FOLDER]

Each row is measured in a fresh process on an index file in the page cache, imports not counted; the
plan is that of rank 0. `CPU s` is the time of open and plan if nothing else runs. `peak` is the
growth of the resident set, mapped pages of the index included, which processes share; `plan` the
arrays of the plan. Exits with status 1 if open and plan together take longer than promised.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from imagenet_seq.index.columns import Index, Names
from imagenet_seq.plan.epoch import peak_block_bytes, rank_plan
from imagenet_seq.plan.order import Order

IMAGENET_1K, IMAGENET_21K = 1_281_167, 14_197_122
LIMIT_S = {IMAGENET_1K: 1.0, IMAGENET_21K: 8.0}
SHARD_BYTES, MEAN_BYTES, HEADER_BYTES = 10**9, 110_000, 2048
CASES = (("pack", "block"), ("pack", "uniform"), ("pack", "none"), ("folder", "uniform"))


def made_up_names(num_samples: int) -> Names:
    """Names such as n00000012/n00000012_00001234.JPEG, made without a loop over them."""
    width = len("n00000000/n00000000_00000000.JPEG")
    text = np.tile(np.frombuffer(b"n00000000/n00000000_00000000.JPEG", np.uint8), (num_samples, 1))
    number = np.arange(num_samples)
    for first, value in ((1, number // 1300), (11, number // 1300), (20, number)):
        for place in range(8):
            text[:, first + 7 - place] += (value // 10**place % 10).astype(np.uint8)
    return Names(text.reshape(-1), np.arange(num_samples + 1, dtype=np.int64) * width)


def made_up_index(kind: str, num_samples: int) -> Index:
    """A pack's index in about 1 GB shards, or a folder's."""
    names = made_up_names(num_samples)
    classes = tuple(f"n{i:08d}" for i in range(-(-num_samples // 1300)))
    rng = np.random.default_rng(0)
    label = rng.integers(0, len(classes), num_samples, dtype=np.int32)
    if kind == "folder":
        zero = np.broadcast_to(np.int64(0), num_samples)
        file = np.arange(num_samples, dtype=np.int32)
        return Index(file, zero, names, "/data", names, classes, label=np.sort(label))
    length = rng.integers(10_000, 2 * MEAN_BYTES - 10_000, num_samples)
    begin = np.cumsum(length + HEADER_BYTES) - length
    file = (begin // SHARD_BYTES).astype(np.int32)
    first = np.searchsorted(file, np.arange(file[-1] + 1))
    return Index(
        file=file,
        offset=begin - begin[first][file] + HEADER_BYTES,
        name=names,
        root="/data",
        files=Names.from_strings(f"shard-{i:06d}.tar" for i in range(int(file[-1]) + 1)),
        classes=classes,
        length=length,
        label=label,
        width=np.full(num_samples, 500, np.int32),
        height=np.full(num_samples, 375, np.int32),
        checksum=rng.integers(0, 1 << 32, num_samples, dtype=np.uint32),
        flags=np.ones(num_samples, np.uint8),
    )


def peak_resident_bytes() -> int:
    """Return this process's peak memory; ru_maxrss would be inherited from its parent."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(path: str, shuffle: str, world_size: int) -> dict[str, Any]:
    """Open the index and plan an epoch of one rank, in this process."""
    before = peak_resident_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    index = Index.open(path)
    opened = time.perf_counter()
    order = Order(shuffle, num_streams=world_size)
    planned = rank_plan(index, order, 0, batch_size=256, world_size=world_size)
    end = time.perf_counter()
    end_cpu = time.process_time()
    peak = peak_resident_bytes() - before
    arrays = {
        id(a): a for a in vars(planned).values() if isinstance(a, np.ndarray) and a.strides[0]
    }
    return {
        "open_s": opened - start,
        "plan_s": end - opened,
        "cpu_s": end_cpu - start_cpu,
        "peak_bytes": peak,
        "plan_bytes": sum(array.nbytes for array in arrays.values() if array.flags.owndata),
        "live_block_bytes": peak_block_bytes(planned, unknown_bytes=MEAN_BYTES),
    }


def measure_apart(path: str, shuffle: str, world_size: int) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", path, shuffle, str(world_size)]
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )
    return result


def main() -> int:
    """Make the indices, measure every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, action="append", help="size of the index")
    parser.add_argument("--keep", help="folder to keep the index files in")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, shuffle, world_size = arguments.measure
        print(json.dumps(measure(path, shuffle, int(world_size))))
        return 0
    too_slow = False
    columns = ("samples", "source", "shuffle", "ranks", "open s", "plan s", "CPU s", "peak MB")
    print(("{:>10}" * 10).format(*columns, "plan MB", "blocks MB"))
    with tempfile.TemporaryDirectory() as temporary:
        for size in arguments.samples or LIMIT_S:
            for kind, shuffle in CASES:
                path = os.path.join(arguments.keep or temporary, f"{kind}-{size}.index")
                if not os.path.exists(path):
                    made_up_index(kind, size).save(path)
                for world_size in (1, 8):
                    result = measure_apart(path, shuffle, world_size)
                    seconds = [result[key] for key in ("open_s", "plan_s", "cpu_s")]
                    sizes = [result[f"{key}_bytes"] / 1e6 for key in ("peak", "plan", "live_block")]
                    print(f"{size:10}{kind:>10}{shuffle:>10}{world_size:10}", end="")
                    print(("{:10.2f}" * 3 + "{:10.0f}" * 3).format(*seconds, *sizes), flush=True)
                    too_slow |= result["cpu_s"] > LIMIT_S.get(size, float("inf"))
    if too_slow:
        print(f"too slow: expected at most so many CPU seconds: {LIMIT_S}", file=sys.stderr)
    return int(too_slow)


if __name__ == "__main__":
    sys.exit(main())
