"""Measure packing: images/s of one core, and bytes in and out.

    python benchmarks/bench_pack.py [DIR] [--images 4000] [--repeats 3] [--tables image]

DIR is an ImageFolder (default: train/ of $IMAGENET_SEQ_SAMPLE); links repeat photos up to --images.
Each repeat packs into a fresh temporary folder with one worker; images/s is per second of CPU time
of the whole process: reading, checksums and writing included, and choosing tables, for which 512
images are decoded once more. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import photos

from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=photos.TRAIN, help=photos.WHERE)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tables", choices=("pack", "image"), default="pack")
    args = parser.parse_args()
    rates = []
    with tempfile.TemporaryDirectory(prefix="bench-pack-") as temporary:
        folder = photos.link_photos(args.folder, args.images, Path(temporary, "train"))
        source_bytes = photos.read_all(folder)
        for repeat in range(args.repeats):
            destination = Path(temporary, f"pack{repeat}")
            cpu_begin, begin = time.process_time(), time.perf_counter()
            settings = Settings(tables=args.tables)
            pack_dataset(folder, destination, settings=settings, num_workers=1, progress=False)
            cpu_s, wall_s = time.process_time() - cpu_begin, time.perf_counter() - begin
            rates.append(args.images / cpu_s)
            shard_bytes = sum(p.stat().st_size for p in destination.glob("*.tar"))
            print(
                f"{args.images} images: {args.images / cpu_s:.0f} images/s of one core's CPU time, "
                f"{args.images / wall_s:.0f} images/s on the clock, shards "
                f"{shard_bytes / 1e6:.1f} MB from {source_bytes / 1e6:.1f} MB",
                flush=True,
            )
    print(f"median: {statistics.median(rates):.0f} images/s a core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
