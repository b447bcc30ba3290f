"""Compare the Loader with other loaders that do the same work: speed, CPU time, memory, pixels.

    python benchmarks/compare.py [DIR] [--images 2000] [--rounds 5] [--peers torchvision dali ...]
                                 [--python dali=/path/to/python] [--json OUT]

The work: RandomResizedCrop(224) and a random flip of every photo of DIR (an ImageFolder; default:
train/ of $IMAGENET_SEQ_SAMPLE; links repeat photos up to --images), shuffled, to uint8 or to
normalised float32, in batches of 256, from the page cache. Every loader is a script in
benchmarks/peers/, which says how it does it; one that is not installed is skipped.

Loaders take turns. Each measurement runs in a fresh process, bound to the first core, or on all
cores with a thread (torchvision: a worker) for each. A first epoch warms up: `first batch` is the
time to its first batch, without imports. CPU seconds and memory (the sum of each process's peak)
are those of the process and its workers.

Pixels: Resize(256) and CenterCrop(224) of up to 64 of the photos, compared with Pillow's: `exact`,
or the mean and the greatest difference. Photos whose center lies between two pixels are chosen
last, because every loader rounds in its own way there.

Other loaders may need a Python of their own: --python NAME=PATH or the environment variable
IMAGENET_SEQ_PEER_PYTHON_NAME (such as ..._DALI).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import photos
import results
from peers.measuring import CROP, RESIZE, Task, sorted_photos
from PIL import Image

PEERS = {
    "torchvision": "torchvision, DataLoader",
    "opencv": "OpenCV",
    "tensorflow": "tf.data",
    "dali": "DALI, CPU",
    "ffcv": "FFCV",
    "imagenet_seq": "imagenet-seq, the same folder",
    "imagenet_seq_pack": "imagenet-seq, a pack of it",
}
BASELINE = "torchvision"
NUM_VAL_IMAGES = 64


# ---- one process of a peer ----


def python_of(peer: str, args: argparse.Namespace) -> str:
    """Return the interpreter that runs a peer."""
    given = dict(pair.split("=", 1) for pair in args.python)
    variable = os.environ.get(f"IMAGENET_SEQ_PEER_PYTHON_{peer.upper()}")
    return given.get(peer) or variable or sys.executable


def run_peer(peer: str, mode: str, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Run one mode of a peer's script in a fresh process; show its output if it fails."""
    command = [python_of(peer, args), "-m", f"peers.{peer}", mode, json.dumps(task)]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{run.stderr}{' '.join(command)}: ended with status {run.returncode}")
    result: dict[str, Any] = json.loads(run.stdout)
    return result


# ---- pixels ----


def pillow_validation(path: str) -> np.ndarray:
    """Return the pixels that torchvision's Resize and CenterCrop give with Pillow."""
    image = Image.open(path).convert("RGB")
    short, long = sorted(image.size)
    scaled = (RESIZE, int(RESIZE * long / short))
    size = scaled if image.width <= image.height else scaled[::-1]
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((image.width - CROP) / 2), round((image.height - CROP) / 2)
    return np.asarray(image.crop((left, top, left + CROP, top + CROP)))


def link_centred(folder: Path | None, destination: Path) -> Path:
    """Make an ImageFolder of photos, those first whose center is a whole pixel."""
    found = photos.find_photos(folder)
    chosen = sorted(found[:: max(1, len(found) // (4 * NUM_VAL_IMAGES))], key=is_off_center)
    for photo in chosen[:NUM_VAL_IMAGES]:
        link = destination / photo.parent.name / photo.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo.resolve())
    return destination


def is_off_center(photo: Path) -> bool:
    with Image.open(photo) as image:
        short, long = sorted(image.size)
    return int(RESIZE * long / short) % 2 == 1


def compare_pixels(peer: str, task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Return the greatest and the mean difference from Pillow."""
    images = np.load(run_peer(peer, "validate", task, args)["path"])
    expected = np.stack([pillow_validation(path) for path in sorted_photos(task.val_folder)])
    if images.shape != expected.shape:
        raise SystemExit(f"{peer}: expected images of {expected.shape}, got {images.shape}")
    difference = np.abs(images.astype(np.int16) - expected)
    return {"max_difference": int(difference.max()), "mean_difference": float(difference.mean())}


# ---- measuring ----


def prepare(peers: Sequence[str], task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Let each installed peer make its files, and compare its pixels."""
    found = {}
    for peer in peers:
        about = run_peer(peer, "prepare", task, args)
        if "missing" in about:
            print(f"{PEERS[peer]}: skipped, {about['missing']}", flush=True)
            continue
        found[peer] = {**about, **compare_pixels(peer, task, args)}
        print(f"{PEERS[peer]}: version {about['version']}, pixels {exactness(found[peer])}")
    photos.read_all(Path(task.prepared))
    photos.read_all(Path(task.folder))
    return found


def exactness(about: dict[str, Any]) -> str:
    if about["max_difference"] == 0:
        return "exact"
    return f"differ by {about['mean_difference']:.2f}, at most {about['max_difference']}"


def compare(
    peers: Sequence[str], task: Task, args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Measure all peers in turn, args.rounds times."""
    measured: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for _, peer in itertools.product(range(args.rounds), peers):
        measured[peer].append(run_peer(peer, "measure", task, args))
    return measured


def summarise(
    measured: dict[str, list[dict[str, float]]],
) -> dict[str, dict[str, float]]:
    """Return medians, and how many times better than the baseline a peer is in the same round."""
    summary = {}
    for peer, runs in measured.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if BASELINE in measured:
            pairs = list(zip(runs, measured[BASELINE], strict=True))
            rate, cpu = "images_per_second", "cpu_seconds_per_1000"
            medians["ratio"] = statistics.median(run[rate] / base[rate] for run, base in pairs)
            medians["cpu_ratio"] = statistics.median(base[cpu] / run[cpu] for run, base in pairs)
        summary[peer] = medians
    return summary


def show(title: str, summary: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:36} images/s (times)  CPU s/1000 (times)  first batch s  peak MB")
    for peer, row in summary.items():
        ratios = [f"({row[key]:.2f})" if key in row else "" for key in ("ratio", "cpu_ratio")]
        print(
            f"  {PEERS[peer]:34} {row['images_per_second']:8.0f} {ratios[0]:>7}  "
            f"{row['cpu_seconds_per_1000']:10.2f} {ratios[1]:>7}  "
            f"{row['first_batch_seconds']:13.2f}  {row['peak_megabytes']:7.0f}",
            flush=True,
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", type=Path, default=photos.TRAIN, help=photos.WHERE)
    add("--images", type=int, default=2000, metavar="N", help="of an epoch (default: 2000)")
    add("--batch-size", type=int, default=256, metavar="N")
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    add("--epochs", type=int, default=1, metavar="N", help="of a measurement, after the first")
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
    add("--python", action="append", default=[], metavar="NAME=PATH", help="a peer's interpreter")
    add("--cores", choices=("one", "all", "both"), default="both")
    add("--dtype", choices=("float32", "uint8", "both"), default="both")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    for pair in args.python:
        if pair.partition("=")[0] not in PEERS or "=" not in pair:
            parser.error(f"--python: expected one of {', '.join(PEERS)} and =PATH, got {pair!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = results.begin(args)
    num_cores = {"one": [1], "all": [origin["cores"]], "both": [1, origin["cores"]]}[args.cores]
    dtypes = ["float32", "uint8"] if args.dtype == "both" else [args.dtype]
    rows = []
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        folder = photos.link_photos(args.folder, args.images, Path(temporary, "train"))
        val = link_centred(args.folder, Path(temporary, "val"))
        prepared = Path(temporary, "prepared")
        prepared.mkdir()
        task = Task(
            str(folder),
            str(val),
            str(prepared),
            dtype="uint8",
            num_cores=origin["cores"],
            batch_size=args.batch_size,
            epochs=args.epochs,
        )
        peers = prepare(args.peers, task, args)
        for cores, dtype in itertools.product(dict.fromkeys(num_cores), dtypes):
            measured = compare(list(peers), task._replace(dtype=dtype, num_cores=cores), args)
            summary = summarise(measured)
            show(f"{cores} core{'s' if cores > 1 else ''}, {dtype}", summary)
            rows += [
                {"peer": peer, "cores": cores, "dtype": dtype, **row, "rounds": measured[peer]}
                for peer, row in summary.items()
            ]
    settings = {"images": args.images, "batch_size": args.batch_size}
    results.write(args, origin, {**settings, "peers": peers, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
