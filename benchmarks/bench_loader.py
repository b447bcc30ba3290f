"""Compare the Loader with torchvision's DataLoader: images/s and CPU seconds for the same work.

    python benchmarks/bench_loader.py [DIR] [--pack DIR] [--images 2000] [--pairs 5] [--json OUT]

The work: RandomResizedCrop(224) and a random flip of every photo, to normalised float32 or to
uint8, batched. Three ways: torchvision's ImageFolder in torch's DataLoader, our Loader on the same
folder, and our Loader on a pack of it. They take turns (A B C A B C ...), each measurement in a
fresh process, with the files in the page cache.

On one core the process is pinned to one CPU; the DataLoader then works in its own process
(num_workers=0), which costs it least. On all cores it gets one worker a core, and our Loader one
thread a core. CPU seconds are those of the process and its workers, from iter() to the last batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = os.environ.get("IMAGENET_SEQ_SAMPLE") or ROOT.parent / "shared/data/imagenet-sample"

WAYS = {
    "torchvision": "torchvision ImageFolder, DataLoader",
    "folder": "imagenet_seq, the same folder",
    "pack": "imagenet_seq, a pack of it",
}
BASELINE = "torchvision"


class Run(NamedTuple):
    """What one process measures."""

    way: str
    path: str
    dtype: str
    num_cores: int
    batch_size: int


class Result(NamedTuple):
    images_per_second: float
    cpu_seconds_per_1000: float
    first_batch_seconds: float
    peak_megabytes: float  # resident memory of the largest process


# ---- in the measuring process ----

PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def import_torchvision() -> Any:
    """Import torchvision, also one whose compiled operators were built for another torch.

    Its transforms need none of them, but its import fails where these two are unknown.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.library_of_missing_operators = library  # it must live as long as they are used
    return torchvision


def make_torchvision_loader(run: Run) -> Any:
    import torch

    transforms = import_torchvision().transforms
    from torchvision.datasets import ImageFolder

    members = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    if run.dtype == "float32":
        members.append(transforms.ToTensor())
        members.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    else:
        members.append(transforms.PILToTensor())
    return torch.utils.data.DataLoader(
        ImageFolder(run.path, transforms.Compose(members)),
        batch_size=run.batch_size,
        shuffle=True,
        num_workers=0 if run.num_cores == 1 else run.num_cores,
    )


def make_our_loader(run: Run) -> Any:
    import torch

    from imagenet_seq import Loader

    return Loader(
        run.path,
        "train",
        batch_size=run.batch_size,
        num_workers=run.num_cores,
        dtype=getattr(torch, run.dtype),
    )


def measure(run: Run) -> Result:
    """Run one epoch in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: run.num_cores])
    loader = (make_torchvision_loader if run.way == BASELINE else make_our_loader)(run)
    num_images = 0
    first_batch_seconds = 0.0
    cpu_begin, begin = _cpu_seconds(), time.perf_counter()
    for images, _ in loader:
        if num_images == 0:
            first_batch_seconds = time.perf_counter() - begin
        num_images += len(images)
    seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - cpu_begin
    peak = max(resource.getrusage(who).ru_maxrss for who in PROCESSES)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return Result(
        images_per_second=num_images / seconds,
        cpu_seconds_per_1000=1000 * cpu_seconds / num_images,
        first_batch_seconds=first_batch_seconds,
        peak_megabytes=peak * unit / 1e6,
    )


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in PROCESSES]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ---- in the process that compares ----


def link_photos(folder: Path, num_images: int, destination: Path) -> Path:
    """Make an ImageFolder of num_images links to the photos of folder, repeating them if needed."""
    photos = sorted(path for path in folder.glob("*/*") if path.is_file())
    if not photos:
        raise SystemExit(f"no photos in {folder}/*/: give an ImageFolder, such as imagenet/train")
    if len(photos) > num_images:  # of all classes alike
        photos = [photos[i * len(photos) // num_images] for i in range(num_images)]
    for number, photo in zip(range(num_images), itertools.cycle(photos), strict=False):
        link = destination / photo.parent.name / f"{number:07d}_{photo.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo.resolve())
    return destination


def make_pack(folder: Path, pack: Path) -> None:
    command = [sys.executable, "-m", "imagenet_seq.cli", "pack", str(folder), str(pack)]
    subprocess.run(command, check=True)


def read_all(folder: Path) -> int:
    """Bring a folder's files into the page cache; returns their bytes."""
    return sum(len(path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def run_in_fresh_process(run: Run) -> Result:
    command = [sys.executable, __file__, "--measure", json.dumps(run)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Result(*json.loads(output))


def compare(
    paths: dict[str, Path], dtype: str, num_cores: int, args: argparse.Namespace
) -> dict[str, list[Result]]:
    """Measure all ways in turn, args.pairs times."""
    results: dict[str, list[Result]] = {way: [] for way in paths}
    for _ in range(args.pairs):
        for way, path in paths.items():
            run = Run(way, str(path), dtype, num_cores, args.batch_size)
            results[way].append(run_in_fresh_process(run))
    return results


def report(title: str, results: dict[str, list[Result]]) -> dict[str, dict[str, float]]:
    """Print a table of medians and return what it says.

    The last columns: ratio of the median rates, median of the ratios of each pair of runs, ratio of
    the CPU seconds (the steadiest of the three on a machine that has other work).
    """
    comparison = "times torchvision (rate, of pairs, CPU)" if BASELINE in results else ""
    print(f"\n{title:38}  images/s  CPU s/1000  first batch s  peak MB  {comparison}")
    summary = {}
    for way, of_way in results.items():
        median = Result(*(statistics.median(column) for column in zip(*of_way, strict=True)))
        columns = [
            f"  {WAYS[way]:36}",
            f"{median.images_per_second:8.0f}",
            f"{median.cpu_seconds_per_1000:10.2f}",
            f"{median.first_batch_seconds:13.2f}",
            f"{median.peak_megabytes:7.0f}",
        ]
        summary[way] = median._asdict()
        if comparison and way != BASELINE:
            summary[way] |= compare_to_baseline(of_way, results[BASELINE])
            columns.append(
                "{ratio:.2f}  {ratio_of_pairs:.2f}  {cpu_ratio:.2f}".format(**summary[way])
            )
        print("  ".join(columns), flush=True)
    return summary


def compare_to_baseline(results: list[Result], base: list[Result]) -> dict[str, float]:
    """Say how many times better the results are."""
    median = statistics.median
    rates = [result.images_per_second for result in results]
    base_rates = [result.images_per_second for result in base]
    cpu = median(result.cpu_seconds_per_1000 for result in results)
    base_cpu = median(result.cpu_seconds_per_1000 for result in base)
    return {
        "ratio": median(rates) / median(base_rates),
        "ratio_of_pairs": median(a / b for a, b in zip(rates, base_rates, strict=True)),
        "cpu_ratio": base_cpu / cpu,
    }


def describe_machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": f"{_processor()}, {_num_cores()} cores, {platform.system()}",
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("imagenet-seq", "torch", "torchvision", "Pillow")},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    where = "ImageFolder of photos (default: $IMAGENET_SEQ_SAMPLE/train or ../shared/data/...)"
    add("folder", metavar="DIR", nargs="?", type=Path, default=Path(SAMPLE, "train"), help=where)
    add(
        "--pack",
        type=Path,
        help="a pack of the photos (default: one is made in a temporary folder)",
    )
    add("--images", type=int, default=2000, metavar="N", help="an epoch (repeats photos if needed)")
    add("--batch-size", type=int, default=64, metavar="N")
    add("--pairs", type=int, default=5, metavar="N", help="measurements of each way (default: 5)")
    add("--cores", choices=("one", "all", "both"), default="both")
    add("--dtype", choices=("float32", "uint8", "both"), default="both")
    add("--json", type=Path, metavar="OUT", help="write every measurement there")
    add("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.measure:
        print(json.dumps(measure(Run(*json.loads(args.measure)))))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        folder = link_photos(args.folder, args.images, Path(temporary, "train"))
        pack = args.pack or Path(temporary, "pack")
        if not pack.exists():
            make_pack(folder, pack)
        paths = {"torchvision": folder, "folder": folder, "pack": pack}
        machine = describe_machine()
        if machine["torchvision"] == "not installed":
            print("torchvision is not installed: there is nothing to compare with")
            del paths["torchvision"]
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        mean_kb = read_all(folder) / args.images / 1000
        read_all(pack)
        print(
            f"{args.images} photos of {mean_kb:.1f} KB in the page cache, "
            f"RandomResizedCrop(224) and flip, batches of {args.batch_size}; "
            f"medians of {args.pairs} alternating measurements"
        )
        cores = {"one": [1], "all": [_num_cores()], "both": [1, _num_cores()]}[args.cores]
        dtypes = ["float32", "uint8"] if args.dtype == "both" else [args.dtype]
        runs = []
        for num_cores, dtype in itertools.product(dict.fromkeys(cores), dtypes):
            results = compare(paths, dtype, num_cores, args)
            name = "one core" if num_cores == 1 else f"{num_cores} cores"
            summary = report(f"{name}, {dtype}", results)
            runs.append(
                {"cores": num_cores, "dtype": dtype, "medians": summary, "measured": results}
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
