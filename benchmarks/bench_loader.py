"""Measure what the Loader adds to the decoder: both on the same samples in the same run.

    python benchmarks/bench_loader.py [DIR] [--images 4000] [--rounds 7] [--cores 2] [--json OUT]
    python benchmarks/bench_loader.py [DIR] --source KIND[,KIND...]|all [--made CACHE] ...

DIR is an ImageFolder (default: train/ of $IMAGENET_SEQ_SAMPLE); its photos are packed under several
names, up to --images. The Loader reads that pack, which is in the page cache, in batches of 256;
the kernel alone decodes the same samples with the same crops from memory, in the groups that the
engine forms, into the rows of one batch in turn. They take turns, an epoch each, after one that
warms up and shows that both give the same sum of pixels.

One core: both in a process pinned to it. Several cores: the Loader with as many threads, in turns
with as many processes of the kernel at once, each pinned to a core of its own.

A ratio is that of images/s on the clock, and beside it that of CPU seconds, within one round; shown
are medians over the rounds, and the least and the greatest ratio.

With --source, a Loader on each of these kinds of sources takes turns with one on the ImageFolder
that they were made of: as validation reads, and as training does, from the source by block shuffle.
Each kind is written by its own library, and left out where that is not installed; --made says where
sources lie that were made before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import photos
import results
import sources
import torch
from kernel import Kernel
from photos import Encoded

from imagenet_seq.decode import transforms
from imagenet_seq.loader import Loader
from imagenet_seq.native.recipe import Recipe
from imagenet_seq.sources.recognise import open_source

BATCH_SIZE = 256


class Case(NamedTuple):
    """What one process measures."""

    pack: str
    dtype: str
    num_cores: int
    rounds: int


class SourceCase(NamedTuple):
    """What one process measures of a source."""

    folder: str
    path: str
    split: str
    num_cores: int
    rounds: int


class Cost(NamedTuple):
    """The cost of an epoch."""

    images_per_second: float
    cpu_seconds_per_1000: float


def recipe_of(dtype: str) -> Recipe:
    return transforms.interpret(None, train=True, dtype=getattr(torch, dtype)).recipe


def read_pack(pack: str) -> list[Encoded]:
    """Read a pack's samples, numbered as the Loader numbers them, so that their crops agree."""
    return photos.read_samples(Path(pack), by_name=False)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- the two that are compared ----


def run_loader(loader: Loader, epoch: int) -> Cost:
    """Iterate one epoch and drop its batches."""
    loader.set_epoch(epoch)
    num_images = 0
    cpu_begin, begin = cpu_seconds(), time.perf_counter()
    for images, _ in loader:
        num_images += len(images)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu_begin
    return Cost(num_images / seconds, 1000 * cpu / num_images)


def run_kernel(dtype: str, samples: Sequence[Encoded], epoch: int) -> Cost:
    """Decode all samples with an epoch's crops."""
    kernel = Kernel(recipe_of(dtype), samples, epoch=epoch)
    cpu_begin, begin = cpu_seconds(), time.perf_counter()
    kernel.run()
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu_begin
    return Cost(len(samples) / seconds, 1000 * cpu / len(samples))


def verify(case: Case, loader: Loader, samples: Sequence[Encoded]) -> None:
    """Compare the sums of all pixels of epoch 0, as integers, so that order does not matter."""
    loader.set_epoch(0)
    unit = np.uint8 if case.dtype == "uint8" else np.uint32  # the bits of a float
    ours = sum(int(images.numpy().view(unit).sum(dtype=np.uint64)) for images, _ in loader)
    rows = Kernel(recipe_of(case.dtype), samples).outputs()
    alone = sum(int(row.view(unit).sum(dtype=np.uint64)) for row in rows if row is not None)
    if ours % (1 << 64) != alone % (1 << 64):
        raise SystemExit(
            f"{case.dtype}: the Loader's pixels differ from the kernel's (sums {ours} and {alone}),"
            " or the core left images to Pillow; nothing was measured"
        )


# ---- processes of the kernel at once ----


class Workers:
    """Processes that decode the same samples at the same time, each on a core of its own."""

    def __init__(self, case: Case, cores: Sequence[int]) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps(case)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes = [
            subprocess.Popen([*command, "--core", str(core)], **pipes)  # type: ignore[call-overload]
            for core in cores
        ]
        for process in self._processes:
            self._answer(process)

    def run(self, epoch: int) -> Cost:
        """Decode in all of them; return the sum of their rates."""
        for process in self._processes:
            process.stdin.write(f"{epoch}\n")
            process.stdin.flush()
        costs = [Cost(*self._answer(process)) for process in self._processes]
        return Cost(
            sum(cost.images_per_second for cost in costs),
            statistics.mean(cost.cpu_seconds_per_1000 for cost in costs),
        )

    @staticmethod
    def _answer(process: Any) -> Any:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the kernel ended with status {process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait()


def work(case: Case, core: int) -> None:
    """Decode an epoch for every line of standard input, as one of the processes."""
    results.pin_to([core])
    samples = read_pack(case.pack)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run_kernel(case.dtype, samples, int(line))), flush=True)


# ---- measuring ----


class Ratios(NamedTuple):
    """Ratio of the two over rounds: median, least, greatest; and the median for CPU time."""

    ratio: float
    ratio_least: float
    ratio_greatest: float
    cpu_ratio: float


def compare(ours: Sequence[Cost], others: Sequence[Cost]) -> Ratios:
    pairs = list(zip(ours, others, strict=True))
    rates = [our.images_per_second / other.images_per_second for our, other in pairs]
    cpu = [other.cpu_seconds_per_1000 / our.cpu_seconds_per_1000 for our, other in pairs]
    return Ratios(statistics.median(rates), min(rates), max(rates), statistics.median(cpu))


def median_rate(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.images_per_second for cost in costs)


@dataclass
class Comparison:
    """Costs of each round."""

    loader: list[Cost] = field(default_factory=list)
    kernel: list[Cost] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return the part that the results file has."""
        return {
            "loader": median_rate(self.loader),
            "kernel": median_rate(self.kernel),
            **compare(self.loader, self.kernel)._asdict(),
            "rounds": [ours + alone for ours, alone in zip(self.loader, self.kernel, strict=True)],
        }


@contextlib.contextmanager
def kernels(case: Case, cores: Sequence[int]) -> Iterator[Any]:
    """Give a function that runs the kernel alone on all of the cores."""
    if len(cores) == 1:
        samples = read_pack(case.pack)
        yield lambda epoch: run_kernel(case.dtype, samples, epoch)
        return
    workers = Workers(case, cores)
    try:
        yield workers.run
    finally:
        workers.close()


def measure(case: Case) -> dict[str, Any]:
    """Compare in this process, which is pinned to as many cores."""
    cores = results.available_cores()[-case.num_cores :]
    results.pin_to(cores)
    dtype = getattr(torch, case.dtype)
    loader = Loader(
        case.pack, "train", batch_size=BATCH_SIZE, num_workers=case.num_cores, dtype=dtype
    )
    comparison = Comparison()
    verify(case, loader, read_pack(case.pack))
    with kernels(case, cores) as run:
        for epoch in range(case.rounds + 1):
            of_kernel, of_loader = run(epoch), run_loader(loader, epoch)
            if epoch > 0:
                comparison.kernel.append(of_kernel)
                comparison.loader.append(of_loader)
    return comparison.describe()


def apart(mode: str, case: Case | SourceCase) -> dict[str, Any]:
    """Measure a case in a fresh process."""
    command = [sys.executable, __file__, mode, json.dumps(case)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"cores": case.num_cores, **json.loads(output)}


def measure_apart(case: Case) -> dict[str, Any]:
    """Run `measure` in a fresh process and print what it found."""
    row: dict[str, Any] = {"dtype": case.dtype, **apart("--measure", case)}
    name = f"{case.dtype}, {case.num_cores} core{'s' if case.num_cores > 1 else ''}"
    print(f"{name:18} {described(row, 'loader', 'kernel')}", flush=True)
    return row


def described(row: dict[str, Any], *rates: str) -> str:
    return (
        f"{' '.join(f'{row[rate]:9.0f}' for rate in rates)}   {row['ratio']:6.1%} "
        f"({row['ratio_least']:.1%} to {row['ratio_greatest']:.1%})  {row['cpu_ratio']:6.1%}"
    )


# ---- sources beside the ImageFolder ----


def measure_source(case: SourceCase) -> dict[str, Any]:
    """Compare a source with the ImageFolder, in this process, which is pinned to as many cores."""
    results.pin_to(results.available_cores()[-case.num_cores :])
    # All are the training images, also where they get the validation transform.
    source, folder = (
        dataclasses.replace(open_source(path, "train"), split=None)
        for path in (case.path, case.folder)
    )
    if len(source.index) != len(folder.index):
        raise SystemExit(
            f"{case.path}: expected the {len(folder.index)} images of the ImageFolder, got "
            f"{len(source.index)}: it was made of others"
        )
    options: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "num_workers": case.num_cores,
        "forecast": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a block shuffle of a sorted source: it is meant here
        shuffle = "block" if case.split == "train" else False
        ours = Loader(source, case.split, shuffle=shuffle, **options)
        other = Loader(folder, case.split, **options)
        rounds = [(run_loader(ours, e), run_loader(other, e)) for e in range(case.rounds + 1)][1:]
    costs = [list(of_one) for of_one in zip(*rounds, strict=True)]
    return {
        "split": case.split,
        "source": median_rate(costs[0]),
        "folder": median_rate(costs[1]),
        **compare(*costs)._asdict(),
        "rounds": [ours + other for ours, other in rounds],
    }


def compare_sources(args: argparse.Namespace, images: Path, cache: Path) -> list[dict[str, Any]]:
    """Measure each source that can be made; print a row for each."""
    kinds = list(sources.KINDS) if args.source == "all" else args.source.split(",")
    photos.read_all(images)
    rows = []
    print("source              cores      img/s   of ImageFolder (least to greatest)  CPU")
    for kind in kinds:
        try:
            path = sources.make_source(kind, images, cache)
        except sources.MissingWriterError as error:
            print(f"{kind:12} left out: {error}", flush=True)
            continue
        photos.read_all(path)
        for split in ("val", "train"):
            for num_cores in sorted({1, min(args.cores, len(results.available_cores()))}):
                case = SourceCase(str(images), str(path), split, num_cores, args.rounds)
                row = {"kind": kind, **apart("--measure-source", case)}
                rows.append(row)
                print(f"{kind:12} {split:6} {num_cores:5} {described(row, 'source')}", flush=True)
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", type=Path, default=photos.TRAIN, help=photos.WHERE)
    add("--images", type=int, default=4000, metavar="N", help="of an epoch (default: 4000)")
    add("--rounds", type=int, default=7, metavar="N", help="alternating measurements (default: 7)")
    add("--cores", type=int, default=2, metavar="N", help="of the comparison on several cores")
    add(
        "--source",
        metavar="KIND",
        help=f"sources to compare: all, or of {', '.join(sources.KINDS)}",
    )
    add("--made", type=Path, metavar="CACHE", help="where sources lie, and are made if missing")
    add("--measure", help=argparse.SUPPRESS)
    add("--measure-source", help=argparse.SUPPRESS)
    add("--worker", help=argparse.SUPPRESS)
    add("--core", type=int, help=argparse.SUPPRESS)
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    unknown = set((args.source or "all").split(",")) - {"all", *sources.KINDS}
    if unknown:
        parser.error(f"--source: expected all or some of {', '.join(sources.KINDS)}, got {unknown}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.measure:
        print(json.dumps(measure(Case(*json.loads(args.measure)))))
        return 0
    if args.measure_source:
        print(json.dumps(measure_source(SourceCase(*json.loads(args.measure_source)))))
        return 0
    if args.worker:
        work(Case(*json.loads(args.worker)), args.core)
        return 0
    origin = results.begin(args)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        folder = photos.link_photos(
            args.folder, args.images, Path(temporary, "images", "train"), copies=bool(args.source)
        )
        if args.source:
            rows = compare_sources(args, folder.parent, args.made or Path(temporary))
            measured = {"images": args.images, "batch_size": BATCH_SIZE, "rows": rows}
            results.write(args, origin, measured)
            return 0
        pack = Path(temporary, "pack")
        photos.make_pack(folder, pack)
        photos.read_all(pack)
        print("                      Loader    kernel   ratio of images/s (least to greatest)  CPU")
        cases = [("uint8", 1), ("float32", 1)]
        if 1 < args.cores <= origin["cores"]:
            cases += [("uint8", args.cores), ("float32", args.cores)]
        else:
            print(f"not measured on {args.cores} cores: {origin['cores']} are available")
        rows = [measure_apart(Case(str(pack), *case, args.rounds)) for case in cases]
    results.write(args, origin, {"images": args.images, "batch_size": BATCH_SIZE, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
