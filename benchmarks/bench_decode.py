"""Measure the decoder alone, beside Pillow + torchvision on the same crops: CPU time of one core.

    python benchmarks/bench_decode.py [DIR] [--images 500] [--rounds 7] [--crop 128 160 192]
                                      [--group N] [--json OUT]

DIR is an ImageFolder (default: train/ of $IMAGENET_SEQ_SAMPLE). Its photos are decoded from memory
as they are, from packs of them with the default and the other `--tables`, and from a pack of
smaller copies (`--max-side 500 --quality 90`); by every set of kernels that this processor has; as
the standard training (RandomResizedCrop(224), flip) and validation (Resize(256), CenterCrop(224))
transforms.

The baseline, for uint8: `Image.open(BytesIO(b)).convert("RGB")`, crop, `resize(BILINEAR)`, flip,
`np.asarray`, which is the cheapest way to the bytes (PILToTensor adds to it), and neither draws the
crop nor puts the image in a batch, which the decoder does. For float32, torchvision's ToTensor and
Normalize follow. Photos are decoded from their own bytes, smaller copies from the copies'.

One thread pinned to one core. In every round the baseline and then every way of ours decode all
images once, with the crops of an epoch of its own: the crops of one epoch may be a tenth larger
than those of another. A ratio is that of CPU times within a round; shown are medians over the
rounds, and the least and the greatest ratio. Before that, every image of every way is compared with
the baseline's: a pixel that differs ends the run. Images that the core leaves to Pillow in any of
the ways are left out of all, and counted.
"""

from __future__ import annotations

import argparse
import gc
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import photos
import results
import torch
from kernel import Kernel, cpu_levels
from peers.torchvision import import_torchvision
from photos import Encoded
from PIL import Image

from imagenet_seq import native
from imagenet_seq.decode import transforms
from imagenet_seq.native.recipe import Recipe

SMALL = "smaller copies"
SMALL_OPTIONS = ("--max-side", "500", "--quality", "90")
NUM_STAGE_PASSES = 5
STAGES = [field[0] for field in native.Times._fields_]


class Work(NamedTuple):
    """What is done to every image."""

    split: str
    dtype: str = "uint8"
    size: int = 224

    def recipe(self) -> Recipe:
        """Return the recipe that a Loader makes of the standard transform, for other sizes too."""
        dtype = getattr(torch, self.dtype)
        recipe = transforms.interpret(None, train=self.split == "train", dtype=dtype).recipe
        changed: dict[str, Any] = {"out_height": self.size, "out_width": self.size}
        if self.split == "val":
            changed |= {"crop_height": self.size, "crop_width": self.size}
            changed |= {"resize_height": self.size * 256 // 224}
        return replace(recipe, **changed)

    def __str__(self) -> str:
        return f"{self.split} {self.size} {self.dtype}"


class Way(NamedTuple):
    """One way of decoding in the core."""

    source: str
    level: str
    group: int | None  # samples a call; None: the function for single samples

    def __str__(self) -> str:
        call = "one by one" if self.group is None else f"groups of {self.group}"
        return f"{self.source}, {self.level}, {call}"


# ---- the baseline ----


def pillow_image(data: bytes, view: native.View, size: int) -> Image.Image:
    """Decode as torchvision's transforms do, with the geometry of a view."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    if box != (0, 0, *image.size):
        image = image.crop(box)
    image = image.resize((view.resized_width, view.resized_height), Image.Resampling.BILINEAR)
    if image.size != (size, size):
        left, top = view.window_left, view.window_top
        image = image.crop((left, top, left + size, top + size))
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def make_converter(dtype: str) -> Any:
    """Return a function from a PIL image to an array or tensor."""
    if dtype == "uint8":
        return np.asarray
    members = import_torchvision().transforms
    normalize = members.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return members.Compose([members.ToTensor(), normalize])


class Baseline:
    """Pillow + torchvision on the crops that the core draws for the same samples."""

    def __init__(self, work: Work, samples: Sequence[Encoded]) -> None:
        self._size, self._convert = work.size, make_converter(work.dtype)
        self._recipe, self._samples = work.recipe(), samples
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the crops of another epoch."""
        self._jobs = [(sample.data, self._view(sample, epoch)) for sample in self._samples]

    def _view(self, sample: Encoded, epoch: int) -> native.View:
        with Image.open(io.BytesIO(sample.data)) as image:
            view = native.draw(self._recipe, 0, epoch, sample.sample, *image.size)
        if view is None:
            raise SystemExit(f"sample {sample.sample}: the core can't draw its crop")
        return view

    def run(self) -> None:
        """Decode all samples."""
        for data, view in self._jobs:
            self._convert(pillow_image(data, view, self._size))

    def outputs(self) -> Iterable[np.ndarray]:
        """Yield each sample as (3, height, width)."""
        for data, view in self._jobs:
            pixels = np.asarray(self._convert(pillow_image(data, view, self._size)))
            yield pixels if pixels.shape[0] == 3 else pixels.transpose(2, 0, 1)


# ---- what is decoded ----


def pack_options() -> dict[str, tuple[str, ...]]:
    """Return the packs that this version of imagenet-seq can make: name and options of each."""
    command = [sys.executable, "-m", "imagenet_seq.cli", "pack", "--help"]
    known = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    packs: dict[str, tuple[str, ...]] = {"pack": ()}
    if "--tables" in known:
        packs |= {f"pack --tables {which}": ("--tables", which) for which in ("pack", "image")}
    if "--max-side" in known:
        packs[SMALL] = SMALL_OPTIONS
    return packs


def prepare_sources(folder: Path | None, num_images: int) -> dict[str, list[Encoded]]:
    """Read the photos and packs of them into memory; equal packs are measured once."""
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as temporary:
        linked = photos.link_photos(folder, num_images, Path(temporary, "train"))
        sources = {"files": photos.read_samples(linked)}
        for number, (name, options) in enumerate(pack_options().items()):
            pack = Path(temporary, f"pack{number}")
            photos.make_pack(linked, pack, options)
            samples = photos.read_samples(pack)
            same = [other for other in sources if sources[other] == samples]
            if same:
                print(f"{name} is the same as {same[0]}")
            else:
                sources[name] = samples
    return sources


def sampling_class(data: bytes) -> str:
    """Name a JPEG's chroma subsampling."""
    header = native.read_header(data)
    if header is None or header.num_components not in (1, 3):
        return "other"
    if header.num_components == 1:
        return "grey"
    luma = (header.h_sampling[0], header.v_sampling[0])
    names = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0", (1, 2): "4:4:0", (4, 1): "4:1:1"}
    chroma = [(header.h_sampling[c], header.v_sampling[c]) for c in (1, 2)]
    return names.get(luma, "other") if chroma == [(1, 1), (1, 1)] else "other"


def keep_decodable(sources: dict[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """Leave out photos that Pillow decodes in any of the sources."""
    left_to_pillow = set()
    for samples in sources.values():
        outputs = Kernel(Work("train").recipe(), samples).outputs()
        left_to_pillow |= {i for i, row in enumerate(outputs) if row is None}
    num_images = len(sources["files"])
    print(
        f"{num_images} photos, of which the core leaves {len(left_to_pillow)} to Pillow (left out)"
    )
    return {
        name: [sample for i, sample in enumerate(samples) if i not in left_to_pillow]
        for name, samples in sources.items()
    }


# ---- measuring ----


@dataclass
class Measurement:
    """CPU seconds of every round, and of the baseline in the same rounds."""

    num_images: int
    seconds: list[float]
    baseline_seconds: list[float]

    @property
    def ns_per_image(self) -> float:
        return statistics.median(self.seconds) / self.num_images * 1e9

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.baseline_seconds, self.seconds, strict=True)
        return [baseline / seconds for baseline, seconds in pairs]

    def describe(self) -> dict[str, Any]:
        """Return the part that the results file has."""
        return {
            "images": self.num_images,
            "ns_per_image": round(self.ns_per_image),
            "images_per_second": round(1e9 / self.ns_per_image, 1),
            "ratio": round(statistics.median(self.ratios), 3),
            "ratio_least": round(min(self.ratios), 3),
            "ratio_greatest": round(max(self.ratios), 3),
            "seconds": self.seconds,
            "baseline_seconds": self.baseline_seconds,
        }


def cpu_seconds(run: Callable[[], None]) -> float:
    begin = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - begin) / 1e9


def verify(work: Work, kernels: dict[Way, Kernel], baseline: Baseline) -> None:
    """Compare every image of every way with the baseline's; end the run where one differs."""
    for way, kernel in kernels.items():
        native.use_cpu(way.level)
        pairs = zip(kernel.outputs(), baseline.outputs(), strict=True)
        for place, (ours, expected) in enumerate(pairs):
            if ours is None:
                raise SystemExit(f"{work}, {way}: image {place} is left to Pillow by this way only")
            if not np.array_equal(ours, expected):
                worst = np.abs(ours.astype(np.float64) - expected).max()
                raise SystemExit(
                    f"{work}, {way}: image {place} differs from Pillow's by up to {worst:g}; "
                    "nothing was measured, since every way must give the same pixels"
                )


def measure(
    work: Work, sources: dict[str, list[Encoded]], ways: Sequence[Way], rounds: int
) -> dict[Way, Measurement]:
    """Verify and measure ways that share one baseline, that of the first of the sources."""
    baseline = Baseline(work, next(iter(sources.values())))
    kernels = {way: Kernel(work.recipe(), sources[way.source], way.group) for way in ways}
    verify(work, kernels, baseline)
    num_images = len(next(iter(sources.values())))
    baseline_seconds: list[float] = []
    measured = {way: Measurement(num_images, [], baseline_seconds) for way in ways}
    for epoch in range(rounds):
        baseline.set_epoch(epoch)
        baseline_seconds.append(cpu_seconds(baseline.run))
        for way, kernel in kernels.items():
            native.use_cpu(way.level)
            kernel.set_epoch(epoch)
            measured[way].seconds.append(cpu_seconds(kernel.run))
    return measured


def measure_stages(
    work: Work, samples: Sequence[Encoded], way: Way, ns_per_image: float
) -> dict[str, int]:
    """Divide the time of an image among the stages, in proportion to the core's counters.

    They count time on the clock, so each stage's is the median of several passes.
    """
    kernel, ticks = Kernel(work.recipe(), samples, way.group), []
    native.use_cpu(way.level)
    for _ in range(NUM_STAGE_PASSES):
        times = native.Times()
        kernel.run(times)
        ticks.append([getattr(times, name) for name in STAGES])
    medians = [statistics.median(column) for column in zip(*ticks, strict=True)]
    shares = [median / (sum(medians) or 1) for median in medians]
    return {name: round(ns_per_image * s) for name, s in zip(STAGES, shares, strict=True) if s}


# ---- the report ----


class Report:
    """Prints rows as they are measured, and keeps them for the results."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def begin(self, title: str, num_images: int, baseline_seconds: Sequence[float]) -> None:
        ns = statistics.median(baseline_seconds) / num_images * 1e9
        head = f"{'images/s':>9} {'ns/image':>10}  times Pillow (least to greatest)"
        print(f"\n{title:58} {head}")
        print(f"  {'Pillow + torchvision':56} {1e9 / ns:9.0f} {ns:10.0f}", flush=True)

    def add(
        self, work: Work, way: Way, measured: Measurement, stages: dict[str, int], images: str
    ) -> None:
        row = {**work._asdict(), **way._asdict(), "class": images, **measured.describe()}
        row["stages_ns"] = stages
        self.rows.append(row)
        print(
            f"  {way!s:56} {row['images_per_second']:9.0f} {row['ns_per_image']:10.0f}  "
            f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_greatest']:.2f})"
        )
        if stages:
            print("    ns: " + ", ".join(f"{name} {ns}" for name, ns in stages.items()))
        sys.stdout.flush()


def bench(
    report: Report,
    work: Work,
    sources: dict[str, list[Encoded]],
    ways: Sequence[Way],
    rounds: int,
    images: str = "all",
) -> None:
    """Measure one piece of work and report it."""
    measured = measure(work, sources, ways, rounds)
    first = measured[ways[0]]
    title = f"{work}, {images} ({first.num_images} images)"
    report.begin(title, first.num_images, first.baseline_seconds)
    for way, of_way in measured.items():
        stages = {}
        if way.group is not None:
            stages = measure_stages(work, sources[way.source], way, of_way.ns_per_image)
        report.add(work, way, of_way, stages, images)


def bench_all(args: argparse.Namespace, sources: dict[str, list[Encoded]]) -> Report:
    """Measure everything that was asked for."""
    report, levels = Report(), cpu_levels()
    originals = {name: samples for name, samples in sources.items() if name != SMALL}
    small = {name: samples for name, samples in sources.items() if name == SMALL}
    works = [Work("train"), Work("val"), Work("train", "float32")]
    works += [Work("train", size=size) for size in args.crop]
    for work in works:
        grouped = [Way(name, level, args.group) for name in originals for level in levels]
        single = [Way(name, levels[-1], None) for name in originals]
        bench(report, work, originals, grouped + single, args.rounds)
        if small and work.split == "train":
            ways = [Way(SMALL, level, args.group) for level in levels]
            bench(report, work, small, ways, args.rounds, SMALL)
    bench_classes(report, originals, levels[-1], args)
    return report


def bench_classes(
    report: Report, sources: dict[str, list[Encoded]], level: str, args: argparse.Namespace
) -> None:
    """Measure the training crop for the photos of each chroma subsampling apart."""
    classes: dict[str, list[int]] = {}
    for i, sample in enumerate(sources["files"]):
        classes.setdefault(sampling_class(sample.data), []).append(i)
    for name, members in sorted(classes.items()):
        subset = {source: [samples[i] for i in members] for source, samples in sources.items()}
        ways = [Way(source, level, args.group) for source in subset]
        bench(report, Work("train"), subset, ways, args.rounds, name)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", type=Path, default=photos.TRAIN, help=photos.WHERE)
    add("--images", type=int, default=500, metavar="N")
    add("--rounds", type=int, default=7, metavar="N", help="alternating measurements (default: 7)")
    add("--crop", type=int, nargs="*", default=[], metavar="PX", help="further sizes of the crop")
    add("--core", type=int, help="the core to run on (default: the last one available)")
    add(
        "--group",
        type=int,
        default=native.MAX_GROUP,
        metavar="N",
        help=f"samples decoded together (default: as the engine, {native.MAX_GROUP})",
    )
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if not 1 <= args.group <= native.MAX_GROUP:
        parser.error(f"--group: expected 1 to {native.MAX_GROUP}, got {args.group}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = results.begin(args)
    sources = prepare_sources(args.folder, args.images)
    results.pin_to([args.core if args.core is not None else results.available_cores()[-1]])
    torch.set_num_threads(1)
    sources = keep_decodable(sources)
    mean_kb = {
        name: round(statistics.mean(len(sample.data) for sample in samples) / 1000, 1)
        for name, samples in sources.items()
    }
    print("mean KB: " + ", ".join(f"{name} {kb}" for name, kb in mean_kb.items()), flush=True)
    gc.collect()
    gc.freeze()
    gc.disable()
    rows = bench_all(args, sources).rows
    results.write(args, origin, {"rounds": args.rounds, "mean_kb": mean_kb, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
