"""Photos for the benchmarks: folders of links to them, packs of them, and their bytes in memory."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = os.environ.get("IMAGENET_SEQ_SAMPLE")
TRAIN = Path(SAMPLE, "train") if SAMPLE else None
WHERE = "an ImageFolder of photos (default: train/ of $IMAGENET_SEQ_SAMPLE)"


class Encoded(NamedTuple):
    """The bytes of one image, as a Loader gives them to the core."""

    sample: int  # its number, on which its crop depends
    data: bytes
    flags: int


def find_photos(folder: Path | None) -> list[Path]:
    """Return the files of an ImageFolder in sorted order."""
    if folder is None:
        raise SystemExit(
            "no photos: name an ImageFolder, such as imagenet/train, or set IMAGENET_SEQ_SAMPLE to "
            "a folder with train/<class>/*.JPEG"
        )
    photos = sorted(path for path in folder.glob("*/*") if path.is_file())
    if not photos:
        raise SystemExit(f"no photos in {folder}/*/: give an ImageFolder, such as imagenet/train")
    return photos


def link_photos(
    folder: Path | None, num_images: int, destination: Path, copies: bool = False
) -> Path:
    """Make an ImageFolder of num_images links to the photos of folder, repeating them if needed.

    Copies instead of links are for a comparison with formats that hold every image's bytes: both
    then use the processor's caches alike.
    """
    photos = find_photos(folder)
    if len(photos) > num_images:  # of all classes alike
        photos = [photos[i * len(photos) // num_images] for i in range(num_images)]
    for number, photo in zip(range(num_images), itertools.cycle(photos), strict=False):
        # Repeats go to other classes: decoding one photo several times in a row would be cheaper.
        of_class = photos[(number + number // len(photos)) % len(photos)].parent.name
        link = destination / of_class / f"{number:07d}_{photo.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if copies:
            shutil.copyfile(photo, link)
        else:
            link.symlink_to(photo.resolve())
    return destination


def make_pack(folder: Path, pack: Path, options: Sequence[str] = ()) -> None:
    command = [sys.executable, "-m", "imagenet_seq.cli", "pack", str(folder), str(pack), *options]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        raise SystemExit(f"{made.stdout}{made.stderr}{' '.join(command)}: failed")


def read_all(path: Path) -> int:
    """Bring a file, or a folder's files, into the page cache; returns their bytes."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(len(file.read_bytes()) for file in paths if file.is_file())


def read_samples(path: Path, by_name: bool = True) -> list[Encoded]:
    """Read all samples of an ImageFolder or a pack into memory.

    by_name: in the order of names, so that a photo has the same number, and crop, in a folder and
    in any pack of it. Otherwise in the order of a Loader's numbers.
    """
    from imagenet_seq.sources.recognise import open_source

    index = open_source(path).index
    files = [(Path(index.root) / file).read_bytes() for file in index.files]
    order = list(range(len(index)))
    if by_name:
        names = [str(Path(name).with_suffix("")) for name in index.name]
        order.sort(key=names.__getitem__)
    samples = []
    for number, i in enumerate(order):
        begin = int(index.offset[i])
        end = None if index.length is None or index.length[i] < 0 else begin + int(index.length[i])
        flags = 0 if index.flags is None else int(index.flags[i])
        samples.append(Encoded(number, files[index.file[i]][begin:end], flags))
    return samples
