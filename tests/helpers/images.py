"""Generated images and folders of them, and the bytes that an index names."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from imagenet_seq.index.source import Source


def photo_like(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An RGB image with smooth areas, edges and some noise: every part of a codec has work."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = rng.uniform(0.005, 0.2, (3, 3, 2))
    phases = rng.uniform(0, 6.28, (3, 3))
    planes = [
        sum(np.sin(x * waves[c, k, 0] + y * waves[c, k, 1] + phases[c, k]) for k in range(3))
        for c in range(3)
    ]
    pixels = np.stack(planes, -1) * 40 + 128 + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] += 60
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    """Encode with Pillow; options as Image.save."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """Marker and payload of every segment up to the entropy-coded data of a JPEG."""
    found, at = [], 2
    while True:
        assert data[at] == 0xFF
        marker, size = struct.unpack(">xBH", data[at : at + 4])
        found.append((marker, data[at + 4 : at + 2 + size]))
        at += 2 + size
        if marker == 0xDA:
            return found


def add_split(root: Path, num_samples: int, num_classes: int, split: str, seed: int = 0) -> None:
    """Write num_samples JPEGs of varied size, sampling and quality to root/split/class_*/."""
    rng = np.random.default_rng(seed)
    for i in range(num_samples):
        folder = root / split / f"class_{i % num_classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = (int(v) for v in rng.integers(40, 260, 2))
        image = photo_like(rng, width, height)
        if i % 11 == 5:
            image = image.convert("L")
        options = {"quality": int(rng.integers(40, 98)), "subsampling": int(i % 3)}
        (folder / f"image_{i:05d}.jpg").write_bytes(jpeg_bytes(image, **options))


def stored_bytes(source: Source) -> list[bytes]:
    """Each sample's bytes, read from where the index says they are."""
    index, found = source.index, []
    assert index.length is not None
    for file, offset, length in zip(index.file, index.offset, index.length, strict=True):
        with open(os.path.join(index.root, index.files[file]), "rb") as opened:
            opened.seek(offset)
            found.append(opened.read(length))
    return found
