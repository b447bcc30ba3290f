"""Replay a log of packing's requests on a model of a hard disk, to estimate its time there.

    imagenet-seq pack imagenet /disk/pack --log-io pack.log
    python benchmarks/replay.py pack.log [--stretch 127] [--two-disks]

The disk is the one of the measurements in docs: 7200 rpm, 180 MB/s, 4 TB; a seek over the share x
of its addresses takes 1 + 12.5 sqrt(x) + 2.5 x ms (so that track to track, average and full stroke
are 1, 8.5 and 16 ms), then half a turn on average, and 0.1 ms for the command. A request that
begins where the last one ended, or up to 1 MiB behind it, moves over what lies between instead.
Assumptions:

* The order of the log is the order at the disk, for writes too: where source and pack share a head,
  packing reads on only when what it appended is on the disk.
* The source's files lie one behind the other from the disk's edge on, in order of their address, or
  of their inode where it is not known. Behind them lie scratch and shards: a file with reserved
  room in one piece, others in pieces as they were written. No place is used twice. With
  --two-disks, they lie at the edge of another disk, and a pass takes as long as its slower disk.
* Inodes, directories and the file system's journal cost nothing.

The bound is the time of all bytes at the sequential rate, and of moving from each source file to
the next in the order of addresses. A small run stands for a large one with --stretch: seeks are as
wide as if every file were so many times larger. Appends must then be as long as they would be: make
fewer shards, and give less memory in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RATE_BYTES_PER_S = 180e6
CAPACITY_BYTES = 4e12
SKIP_BYTES = 1 << 20
TURN_S = 60 / 7200
COMMAND_S = 1e-4
ALIGN_BYTES = 4096

IMAGENET_BYTES = 140e9
CONSTANT_PASSES = ("forecast", "choose tables")
"""They look at a fixed number of images however many there are."""


@dataclass
class Head:
    """One disk's head: its position, and its counters."""

    stretch: float
    at: int = 0
    num_bytes: int = 0
    num_moves: int = 0
    move_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.num_bytes / RATE_BYTES_PER_S + self.move_s

    def transfer(self, address: int, size: int) -> None:
        gap = address - self.at
        if 0 <= gap <= SKIP_BYTES:
            self.move_s += gap / RATE_BYTES_PER_S
        else:
            x = min(abs(gap) * self.stretch / CAPACITY_BYTES, 1)
            self.move_s += (1 + 12.5 * math.sqrt(x) + 2.5 * x) / 1e3 + TURN_S / 2 + COMMAND_S
            self.num_moves += 1
        self.num_bytes += size
        self.at = address + size


class Extent(NamedTuple):
    """A part of a file that is contiguous on the disk."""

    begin: int
    end: int
    address: int


class Space:
    """The places of files on a disk, assigned from `free` on."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._extents: dict[str, list[Extent]] = {}
        self._taken = 0
        self.peak_bytes = 0

    def extend(self, file: str, end: int) -> None:
        """Give a file room up to its byte `end`."""
        extents = self._extents.setdefault(file, [])
        begin = extents[-1].end if extents else 0
        if end <= begin:
            return
        size = -(-(end - begin) // ALIGN_BYTES) * ALIGN_BYTES
        extents.append(Extent(begin, begin + size, self._free))
        self._free += size
        self._taken += size
        self.peak_bytes = max(self.peak_bytes, self._taken)

    def delete(self, file: str) -> None:
        self._taken -= sum(extent.end - extent.begin for extent in self._extents.pop(file, []))

    def pieces(self, file: str, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield address and size of what a request touches."""
        for extent in self._extents[file]:
            begin, end = max(offset, extent.begin), min(offset + size, extent.end)
            if begin < end:
                yield extent.address + begin - extent.begin, end - begin


@dataclass
class Pass:
    """The cost of one pass over the data."""

    source: Head
    destination: Head  # the same head, where there is one disk
    source_reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def heads(self) -> list[Head]:
        return [self.source] + [self.destination] * (self.destination is not self.source)

    @property
    def seconds(self) -> float:
        return max(head.seconds for head in self.heads)

    @property
    def bound_s(self) -> float:
        """The sequential time of its bytes, and the way through the source's files in order."""
        alone = Head(self.source.stretch)
        for address, size in sorted(self.source_reads):
            alone.transfer(address, size)
        if self.destination is self.source:
            return self.source.num_bytes / RATE_BYTES_PER_S + alone.move_s
        return max(alone.seconds, self.destination.num_bytes / RATE_BYTES_PER_S)


@dataclass
class Replay:
    """A whole log: its passes by name, the source's bytes, and the room that packing took."""

    passes: dict[str, Pass]
    source_bytes: int
    peak_bytes: int


def replay(lines: Iterable[dict[str, Any]], stretch: float = 1, two_disks: bool = False) -> Replay:
    """Run a log's requests through the model."""
    requests = list(lines)
    source = Space(0)
    sizes: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for request in requests:
        if "address" in request:
            file, end = request["file"], request["offset"] + request["bytes"]
            sizes[file] = max(sizes.get(file, 0), end)
            places[file] = request["address"], request["inode"]
    for file in sorted(places, key=places.__getitem__):
        source.extend(file, sizes[file])
    destination = Space(0 if two_disks else source.peak_bytes)
    passes: dict[str, Pass] = {}
    source_at = destination_at = 0
    for request in requests:
        name, file = request["pass"], request["file"]
        if name not in passes:
            head = Head(stretch, source_at)
            passes[name] = Pass(head, Head(stretch, destination_at) if two_disks else head)
        now = passes[name]
        if request["op"] == "delete":
            destination.delete(file)
            continue
        if request["op"] in ("write", "reserve"):
            destination.extend(file, request["offset"] + request["bytes"])
        if request["op"] == "reserve":
            continue
        is_source = file in sizes
        space, head = (source, now.source) if is_source else (destination, now.destination)
        for address, size in space.pieces(file, request["offset"], request["bytes"]):
            head.transfer(address, size)
            if is_source:
                now.source_reads.append((address, size))
        source_at, destination_at = now.source.at, now.destination.at
    return Replay(passes, sum(sizes.values()), destination.peak_bytes)


def report(done: Replay) -> None:
    """Print what each pass takes, and what all would take for ImageNet."""
    print(f"{'pass':14} {'GB':>8} {'moves':>8} {'modelled s':>11} {'bound s':>9} {'ratio':>6}")
    scale = IMAGENET_BYTES / done.source_bytes
    total_s = bound_s = imagenet_s = imagenet_bound_s = 0.0
    for name, one in done.passes.items():
        times = 1 if name in CONSTANT_PASSES else scale
        num_bytes = sum(head.num_bytes for head in one.heads)
        num_moves = sum(head.num_moves for head in one.heads)
        ratio = one.seconds / one.bound_s
        print(
            f"{name:14} {num_bytes / 1e9:8.3f} {num_moves:8d} {one.seconds:11.2f} "
            f"{one.bound_s:9.2f} {ratio:6.3f}"
        )
        total_s, bound_s = total_s + one.seconds, bound_s + one.bound_s
        imagenet_s += times * one.seconds
        imagenet_bound_s += times * one.bound_s
    print(f"{'all':14} {'':8} {'':8} {total_s:11.2f} {bound_s:9.2f} {total_s / bound_s:6.3f}")
    print(f"room taken at most: {done.peak_bytes / done.source_bytes:.3f} of the source's bytes")
    print(
        f"for {IMAGENET_BYTES / 1e9:.0f} GB: {imagenet_s / 60:.1f} min, bound "
        f"{imagenet_bound_s / 60:.1f} min, ratio {imagenet_s / imagenet_bound_s:.3f}"
    )


def read_log(path: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="ascii") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise SystemExit(f"{path} line {number}: expected a JSON object: {error}") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", help="what imagenet-seq pack --log-io wrote")
    parser.add_argument("--stretch", type=float, default=1, help="one byte is so many in seeks")
    parser.add_argument("--two-disks", action="store_true", help="the pack lies on another disk")
    args = parser.parse_args()
    try:
        report(replay(read_log(args.log), args.stretch, args.two_disks))
    except OSError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
