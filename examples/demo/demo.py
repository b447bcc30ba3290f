"""The whole job in a few minutes on a CPU: pack a dataset, measure the loader, train, look.

    IMAGENET=/data/imagenet python demo.py     # ten classes of your ImageNet (train/ and val/)
    python demo.py                             # a small photo-like dataset that is generated

Everything it makes lies in demo-output/. Exit status 1 means that accuracy stayed near chance.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import make_dataset
import torch
from PIL import Image, ImageDraw, ImageFont

from imagenet_seq.loader import Loader

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "demo-output"

NUM_CLASSES = 10
TRAIN_LIMIT, VAL_LIMIT = 300, 50  # samples taken of each class of $IMAGENET
NUM_GENERATED_TRAIN, NUM_GENERATED_VAL = 2000, 500
# Top-1 to reach, where chance is 10 %. Ten classes of real photos are a harder task.
REQUIRED_ACC1_GENERATED, REQUIRED_ACC1_IMAGENET = 60.0, 20.0

TRAINING = "--arch tiny --epochs 8 --batch-size 32 --lr 0.05 --lr-step 6 --seed 0 --no-accel"

LOADERS = {
    "torchvision": "torchvision, the folder",
    "imagenet_seq": "imagenet-seq, the folder",
    "imagenet_seq_pack": "imagenet-seq, the pack",
}

SHEET_COLUMNS, SHEET_ROWS = 6, 4
TILE_PX, GAP_PX, CAPTION_PX, TITLE_PX = 224, 12, 26, 52


def announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: str | Path) -> None:
    """Run one of the project's commands, shown as a user would type it."""
    words = [os.path.relpath(word) if isinstance(word, Path) else word for word in command]
    print("$ " + shlex.join(["python", *words]), flush=True)
    # GNU OpenMP's threads spin while they wait, which starves the loader's on the same few cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    subprocess.run([sys.executable, *map(str, command)], env=environment, check=True)


def take_subset(imagenet: Path, destination: Path) -> Path:
    """Link some samples of ten classes, evenly spaced over all, below destination."""
    classes = sorted(path.name for path in (imagenet / "train").iterdir() if path.is_dir())
    if len(classes) < NUM_CLASSES:
        raise SystemExit(
            f"{imagenet}/train has {len(classes)} class folders, expected at least {NUM_CLASSES}"
        )
    chosen = [classes[i * len(classes) // NUM_CLASSES] for i in range(NUM_CLASSES)]
    shutil.rmtree(destination, ignore_errors=True)
    for split, limit in (("train", TRAIN_LIMIT), ("val", VAL_LIMIT)):
        for name in chosen:
            folder = destination / split / name
            folder.mkdir(parents=True)
            for image in sorted((imagenet / split / name).iterdir())[:limit]:
                (folder / image.name).symlink_to(image.resolve())
    return destination


def generate(destination: Path) -> Path:
    """Generate the dataset, unless a former run has."""
    if not destination.exists():
        unfinished = destination.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_dataset.make_dataset(unfinished, NUM_GENERATED_TRAIN, NUM_GENERATED_VAL)
        unfinished.rename(destination)
    return destination


def find_data() -> tuple[Path, float]:
    """Return an ImageFolder root with train/ and val/, and the top-1 to reach on it."""
    imagenet = os.environ.get("IMAGENET")
    if not imagenet:
        announce("Data: IMAGENET is not set, so photo-like images of ten classes are generated")
        return generate(OUTPUT / "generated"), REQUIRED_ACC1_GENERATED
    announce(f"Data: up to {TRAIN_LIMIT} + {VAL_LIMIT} images of each of ten classes of {imagenet}")
    for split in ("train", "val"):
        if not Path(imagenet, split).is_dir():
            raise SystemExit(f"no folder {imagenet}/{split}: IMAGENET must hold train/ and val/")
    return take_subset(Path(imagenet), OUTPUT / "imagenet-subset"), REQUIRED_ACC1_IMAGENET


def pack(data: Path) -> Path:
    announce("Pack: lossless, into files that are read in sequence")
    destination = OUTPUT / "pack"
    shutil.rmtree(destination, ignore_errors=True)  # a former run's, perhaps of other data
    run("-m", "imagenet_seq.cli", "pack", data, destination)
    run("-m", "imagenet_seq.cli", "info", destination / "train")
    return destination


def measure(data: Path) -> dict[str, float]:
    """Load train/ with each loader; return images/s by its name in benchmarks/compare.py."""
    announce("Loading alone: images/s of train/, without a network")
    num_images = len(Loader(data, "train").dataset)
    options = f"--images {num_images} --rounds 1 --epochs 2 --cores all --dtype uint8 --allow-dirty"
    measured = OUTPUT / "compare.json"
    script = ROOT / "benchmarks" / "compare.py"
    run(script, data / "train", *shlex.split(options), "--json", measured, "--peers", *LOADERS)
    rows = json.loads(measured.read_text())["rows"]
    return {row["peer"]: row["images_per_second"] for row in rows}


def print_rates(rates: dict[str, float]) -> None:
    """Print images/s beside torchvision's: the same random crops, uint8, all cores."""
    baseline = rates.get("torchvision")
    for loader, name in LOADERS.items():
        if loader in rates:
            times = f"   {rates[loader] / baseline:.1f} x" if baseline else ""
            print(f"  {name:28} {rates[loader]:8,.0f} images/s{times}")
        else:
            print(f"  {name:28} not installed (pip install torchvision)")


def train(packed: Path) -> float:
    """Train with the example and return the best top-1 in percent."""
    announce("Train: a small network on augmented 224-pixel crops, on the CPU")
    script = ROOT / "examples" / "imagenet" / "main.py"
    run(script, packed, *shlex.split(TRAINING), "--print-freq", "1000", "--output", OUTPUT)
    best = torch.load(OUTPUT / "model_best.pth.tar", weights_only=True)
    return float(best["best_acc1"])


def draw_batch(packed: Path) -> Path:
    """Write a contact sheet of one training batch, as the network sees it."""
    announce("Look: one augmented training batch")
    num_tiles = SHEET_COLUMNS * SHEET_ROWS
    loader = Loader(packed, "train", batch_size=num_tiles, dtype=torch.uint8)
    images, target = next(iter(loader))
    names = [loader.dataset.classes[label] for label in target]

    width = SHEET_COLUMNS * (TILE_PX + GAP_PX) + GAP_PX
    height = TITLE_PX + SHEET_ROWS * (TILE_PX + CAPTION_PX + GAP_PX)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    title = "A training batch: RandomResizedCrop(224), RandomHorizontalFlip"
    draw.text((GAP_PX, GAP_PX), title, "black", ImageFont.load_default(24))
    font = ImageFont.load_default(17)
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(i, SHEET_COLUMNS)
        left = GAP_PX + column * (TILE_PX + GAP_PX)
        top = TITLE_PX + row * (TILE_PX + CAPTION_PX + GAP_PX)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, top))
        draw.text((left, top + TILE_PX + 3), name, "black", font)
    path = OUTPUT / "batch.png"
    sheet.save(path)
    print(os.path.relpath(path))
    return path


def main() -> int:
    begin = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    data, required_acc1 = find_data()
    packed = pack(data)
    rates = measure(data)
    picture = draw_batch(packed)
    acc1 = train(packed)

    well = acc1 >= required_acc1
    announce("Summary")
    print(f"top-1     {acc1:.1f} % of ten classes (chance: 10 %; asked for: {required_acc1:.0f} %)")
    print(f"picture   {os.path.relpath(picture)}")
    print(f"network   {os.path.relpath(OUTPUT / 'model_best.pth.tar')}")
    print(f"pack      {os.path.relpath(packed)}")
    print(f"time      {time.perf_counter() - begin:.0f} s")
    if not well:
        print("FAILED: the network has not learnt. Look at the picture: do images and names fit?")
    print(f"\nloading train/ alone, random crops of 224 pixels, on {os.cpu_count()} cores:")
    print_rates(rates)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
