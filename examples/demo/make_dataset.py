"""Generate a small photo-like dataset in ImageFolder layout: ten learnable classes, no download.

Ten classes of objects, each with its own shape and surface, lie in random number, pose, size and
colour on backgrounds of natural-looking 1/f texture under uneven light. Colour says nothing about
the class, so a network has to learn shape and surface. To a loader the files look like ImageNet's:
about 500 x 375 pixels with other sizes and aspects mixed in, JPEG quality 75 to 95, mostly 4:4:4,
some 4:2:0 and 4:2:2, some grey, and in the first class one file each of ImageNet's oddities (a PNG
named .JPEG, CMYK, progressive).

    python make_dataset.py DESTINATION [--train 2000] [--val 500] [--seed 0]

Each image is a function of (seed, split, class, number) alone, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[Any]  # float32: (height, width), or (height, width, 3) with values in [0, 1]
Form = Callable[[Plane, Plane], Plane]

# A form maps coordinates in the object's own frame, where the object fills about [-1, 1] x [-1, 1],
# to the signed distance from its outline (negative inside) or to the share of its second colour.


def _radius(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, v)


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(abs(u) - half_width, abs(v) - half_height)


def _wave(phase: Plane) -> Plane:
    """A sine with flattened tops: bands with soft edges, which no JPEG encoder rings on."""
    return 0.5 + 0.5 * np.tanh(3 * np.sin(phase))


def _disc(u: Plane, v: Plane) -> Plane:
    return _radius(u, v) - 0.9


def _square(u: Plane, v: Plane) -> Plane:
    return _box(u, v, 0.8, 0.8)


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(0.866 * abs(u) + 0.5 * v, -v) - 0.5


def _star(u: Plane, v: Plane) -> Plane:
    return _radius(u, v) - 0.65 - 0.32 * np.cos(5 * np.arctan2(v, u))


def _flower(u: Plane, v: Plane) -> Plane:
    return _radius(u, v) - 0.78 - 0.18 * np.cos(9 * np.arctan2(v, u))


def _cross(u: Plane, v: Plane) -> Plane:
    return np.minimum(_box(u, v, 0.32, 0.95), _box(u, v, 0.95, 0.32))


def _ring(u: Plane, v: Plane) -> Plane:
    return abs(_radius(u, v) - 0.68) - 0.27


def _crescent(u: Plane, v: Plane) -> Plane:
    return np.maximum(_radius(u, v) - 0.95, 0.75 - _radius(u - 0.5, v))


def _bar(u: Plane, v: Plane) -> Plane:
    return _box(u, v, 1.0, 0.42)


def _hexagon(u: Plane, v: Plane) -> Plane:
    return np.maximum(0.866 * abs(u) + 0.5 * abs(v), abs(v)) - 0.8


def _stripes(u: Plane, v: Plane) -> Plane:
    return _wave(15 * u)


def _checks(u: Plane, v: Plane) -> Plane:
    return 0.5 + 0.5 * np.tanh(6 * np.sin(8 * u) * np.sin(8 * v))


def _dots(u: Plane, v: Plane) -> Plane:
    return 0.5 + 0.5 * np.tanh(4 * (np.cos(13 * u) + np.cos(13 * v) - 0.7))


def _circles(u: Plane, v: Plane) -> Plane:
    return _wave(19 * _radius(u, v))


def _spokes(u: Plane, v: Plane) -> Plane:
    return _wave(9 * np.arctan2(v, u))


def _ripples(u: Plane, v: Plane) -> Plane:
    return _wave(15 * v + 2.5 * np.sin(9 * u))


def _spiral(u: Plane, v: Plane) -> Plane:
    return _wave(14 * _radius(u, v) + 2 * np.arctan2(v, u))


def _bricks(u: Plane, v: Plane) -> Plane:
    course = np.floor(v * 4)
    joint = np.minimum(abs(np.sin(4 * np.pi * v)), abs(np.sin(2 * np.pi * (u + 0.25 * course))))
    return 0.5 + 0.5 * np.tanh(12 * (joint - 0.3))


def _lattice(u: Plane, v: Plane) -> Plane:
    return np.maximum(_wave(11 * (u + v)), _wave(11 * (u - v)))


def _plain(u: Plane, v: Plane) -> Plane:
    return 0.5 + 0.5 * u


# A crop may show a part of an object only, so that each class differs in its surface as well.
CLASSES: dict[str, tuple[Form, Form]] = {
    "anchor_ring": (_ring, _spokes),
    "beach_ball": (_disc, _circles),
    "brick_cross": (_cross, _bricks),
    "chess_square": (_square, _checks),
    "dotted_tent": (_triangle, _dots),
    "fence_hexagon": (_hexagon, _lattice),
    "moon": (_crescent, _plain),
    "ripple_star": (_star, _ripples),
    "spiral_flower": (_flower, _spiral),
    "zebra_bar": (_bar, _stripes),
}
SPLITS = ("train", "val")

# (width, height, share): ImageNet's photos are mostly Flickr's 500-pixel size.
SIZES = (
    (500, 375, 0.42),
    (375, 500, 0.16),
    (500, 333, 0.14),
    (333, 500, 0.06),
    (400, 300, 0.06),
    (500, 500, 0.05),
    (640, 480, 0.05),
    (250, 200, 0.03),
    (800, 600, 0.02),
    (110, 150, 0.01),
)
# (Pillow's name of the chroma subsampling, share), measured over ImageNet's training photos.
SUBSAMPLINGS = (("4:4:4", 0.76), ("4:2:0", 0.20), ("4:2:2", 0.02), ("grey", 0.02))
# Files that ImageNet holds a few of and that a baseline-JPEG decoder can't read.
ODDITIES = {0: "PNG", 1: "CMYK", 2: "progressive"}

TEXTURE_SIZE_PX = 1024
NUM_TEXTURES = 5


class Sample(NamedTuple):
    """What decides one image."""

    seed: int
    split: str
    class_name: str
    number: int

    def path(self, root: Path) -> Path:
        name = f"{self.class_name}_{self.number:05d}.JPEG"
        return root / self.split / self.class_name / name

    def generator(self) -> np.random.Generator:
        key = (
            self.seed,
            SPLITS.index(self.split),
            list(CLASSES).index(self.class_name),
            self.number,
        )
        return np.random.default_rng(key)


@functools.cache
def textures() -> tuple[Plane, ...]:
    """Seamless 1/f noise planes in [0, 1]; amplitude falls with frequency as in photos.

    See Field, "Relations between the statistics of natural images and the response properties of
    cortical cells", 1987. Made once a process: a transform per image would take most of the time.
    """
    frequency = np.hypot(
        np.fft.fftfreq(TEXTURE_SIZE_PX)[:, None], np.fft.rfftfreq(TEXTURE_SIZE_PX)[None, :]
    )
    frequency[0, 0] = 1
    planes = []
    for number in range(NUM_TEXTURES):
        noise = np.random.default_rng(number).standard_normal((TEXTURE_SIZE_PX, TEXTURE_SIZE_PX))
        plane = np.fft.irfft2(np.fft.rfft2(noise) / frequency ** (1.0 + 0.12 * number))
        low, high = np.percentile(plane, (1, 99))
        planes.append(np.clip((plane - low) / (high - low), 0, 1).astype(np.float32))
    return tuple(planes)


def cut_texture(rng: np.random.Generator, height: int, width: int) -> Plane:
    """A window of a random texture, turned and flipped at random."""
    plane = textures()[rng.integers(NUM_TEXTURES)]
    if rng.random() < 0.5:
        plane = plane.T
    top, left = rng.integers(TEXTURE_SIZE_PX, size=2)
    rows = np.arange(top, top + height)[:: rng.choice((-1, 1))] % TEXTURE_SIZE_PX
    columns = np.arange(left, left + width)[:: rng.choice((-1, 1))] % TEXTURE_SIZE_PX
    return plane[np.ix_(rows, columns)]


def colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> Plane:
    """A random colour with saturation and value in the ranges given."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, np.float32)


def mix(first: Plane, second: Plane, share: Plane) -> Plane:
    return first + (second - first) * share[..., None]


def background(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Two tones mixed by 1/f texture, with a finer texture on top."""
    tones = colour(rng, (0.05, 0.5), (0.1, 0.45)), colour(rng, (0.05, 0.45), (0.45, 0.9))
    canvas = mix(*tones, cut_texture(rng, height, width))
    canvas *= 0.8 + 0.4 * cut_texture(rng, height, width)[..., None]
    return canvas


def draw_object(rng: np.random.Generator, canvas: Plane, shape: Form, surface: Form) -> None:
    """Draw one object of random pose, size and colour, with shading and a soft shadow."""
    height, width = canvas.shape[:2]
    radius = min(height, width) * rng.uniform(0.26, 0.46)
    centre_y = rng.uniform(0.25, 0.75) * height
    centre_x = rng.uniform(0.25, 0.75) * width
    angle = rng.uniform(0, 2 * math.pi)
    squeeze = rng.uniform(0.75, 1.0)

    top, bottom = max(0, int(centre_y - 1.5 * radius)), min(height, int(centre_y + 1.5 * radius))
    left, right = max(0, int(centre_x - 1.5 * radius)), min(width, int(centre_x + 1.5 * radius))
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    y, x = (y - centre_y) / radius, (x - centre_x) / radius
    u = math.cos(angle) * x + math.sin(angle) * y
    v = (math.cos(angle) * y - math.sin(angle) * x) / squeeze

    light_y, light_x = -rng.uniform(0.1, 0.3), rng.uniform(-0.3, 0.3)
    region = canvas[top:bottom, left:right]
    shadow = np.clip(0.5 - 6 * shape(u - 0.1, v - 0.1), 0, 1)
    region *= 1 - 0.45 * shadow[..., None]

    dark, bright = colour(rng, (0.2, 1.0), (0.05, 0.35)), colour(rng, (0.0, 0.8), (0.7, 1.0))
    paint = mix(dark, bright, surface(u, v))
    grain = cut_texture(rng, *y.shape)
    paint *= (0.8 + 0.3 * grain + light_x * x + light_y * y)[..., None]
    cover = np.clip(0.5 - shape(u, v) * radius, 0, 1)[..., None]
    region += (paint - region) * cover


def paint_image(rng: np.random.Generator, class_name: str) -> NDArray[np.uint8]:
    """The pixels of an image of the class, height x width x 3."""
    shares = [share for _, _, share in SIZES]
    width, height, _ = SIZES[rng.choice(len(SIZES), p=shares)]
    width, height = width + int(rng.integers(-8, 9)), height + int(rng.integers(-8, 9))
    canvas = background(rng, height, width)
    for _ in range(rng.integers(1, 4)):
        draw_object(rng, canvas, *CLASSES[class_name])

    slope_y, slope_x = rng.uniform(-0.35, 0.35, 2)
    light = 1 + slope_y * np.linspace(-1, 1, height)[:, None] + slope_x * np.linspace(-1, 1, width)
    canvas *= light.astype(np.float32)[..., None] * rng.uniform(0.8, 1.15)
    canvas += rng.standard_normal((height, width, 1), np.float32) * rng.uniform(0.005, 0.03)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def write_image(sample: Sample, root: Path) -> int:
    """Paint a sample and write its file; returns the bytes written."""
    rng = sample.generator()
    image = Image.fromarray(paint_image(rng, sample.class_name))
    quality = int(rng.integers(75, 96))
    subsampling = str(
        rng.choice([name for name, _ in SUBSAMPLINGS], p=[share for _, share in SUBSAMPLINGS])
    )
    path = sample.path(root)
    odd_one_out = sample.split == "train" and sample.class_name == next(iter(CLASSES))
    oddity = ODDITIES.get(sample.number) if odd_one_out else None
    if oddity == "PNG":
        image.save(path, "PNG")
    elif oddity == "CMYK":
        image.convert("CMYK").save(path, "JPEG", quality=quality)
    elif oddity == "progressive":
        image.save(path, "JPEG", quality=quality, progressive=True)
    elif subsampling == "grey":
        image.convert("L").save(path, "JPEG", quality=quality)
    else:
        image.save(path, "JPEG", quality=quality, subsampling=subsampling)
    return path.stat().st_size


def samples(split: str, num_samples: int, seed: int) -> list[Sample]:
    """As many samples of a split, dealt to the classes in turn."""
    names = list(CLASSES)
    return [Sample(seed, split, names[i % len(names)], i // len(names)) for i in range(num_samples)]


def make_dataset(
    root: Path, num_train: int = 2000, num_val: int = 500, seed: int = 0, processes: int = 0
) -> int:
    """Write the dataset below root and return its size in bytes.

    Args:
        root: Folder to hold train/<class>/*.JPEG and val/<class>/*.JPEG.
        num_train: Samples in the training split.
        num_val: Samples in the validation split.
        seed: Another seed gives other images.
        processes: Processes to paint in; 0 means one for every core. Doesn't affect the images.
    """
    todo = samples("train", num_train, seed) + samples("val", num_val, seed)
    for folder in {sample.path(root).parent for sample in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(write_image, root=root)
    if processes == 1:
        return sum(map(write, todo))
    # spawn: fork is unsafe once a caller's process runs threads, as torch's does.
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        return sum(pool.imap_unordered(write, todo, chunksize=16))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("destination", type=Path, help="folder to hold train/ and val/")
    parser.add_argument("--train", type=int, default=2000, metavar="N", help="training images")
    parser.add_argument("--val", type=int, default=500, metavar="N", help="validation images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    num_bytes = make_dataset(args.destination, args.train, args.val, args.seed)
    print(
        f"{args.train} + {args.val} images of {len(CLASSES)} classes, {num_bytes / 1e6:.0f} MB, "
        f"in {args.destination} ({time.perf_counter() - begin:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
