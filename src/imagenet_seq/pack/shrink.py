"""Smaller copies: images encoded by Pillow with fewer pixels and fewer bytes, for slow disks.

Only one ImageNet photo in nine has a side of more than 500 px, but most are stored at a quality
that takes twice the bytes of quality 90. So an image is resized where a side is too long, and
encoded anew where that takes fewer bytes. No image is enlarged.

A copy depends on the image, the `Shrink` and the versions of Pillow and libjpeg-turbo, not on the
machine: the weights of the bicubic resize are polynomials rounded to integers (those of Lanczos
come from the C library's sine), and libjpeg-turbo's SIMD kernels give the same as its C code.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import PIL
from PIL import Image, features

from imagenet_seq import native
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded
from imagenet_seq.text import format_bytes

Subsampling = Literal["420", "422", "444"]

_PILLOW_SUBSAMPLING = {"444": 0, "422": 1, "420": 2}

_MAX_SIDE = 65_500
"""JPEG_MAX_DIMENSION of libjpeg-turbo."""

_ORIENTATION_TAG = 0x0112
"""Exif 2.3, 4.6.4 A."""


def encoder_versions() -> str:
    """Return the versions of Pillow and libjpeg-turbo: others may give other bytes."""
    turbo = features.version("libjpeg_turbo")
    codec = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    return f"Pillow {PIL.__version__}, {codec}"


@dataclass(frozen=True)
class Shrink:
    """How smaller copies are made.

    Attributes:
        max_side: maximum pixels of the longer side, 1 to 65500.
        quality: of the encoder, 1 to 100.
        subsampling: of the colours: "420" halves both sides, "422" the width, "444" none.
        encoder: the installed versions of Pillow and libjpeg-turbo.
    """

    max_side: int
    quality: int = 90
    subsampling: Subsampling = "420"
    encoder: str = field(init=False, default_factory=encoder_versions)

    def __post_init__(self) -> None:
        if not 1 <= self.max_side <= _MAX_SIDE:
            raise ValueError(f"max_side: expected 1 to {_MAX_SIDE} pixels, got {self.max_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality}")
        if self.subsampling not in get_args(Subsampling):
            raise ValueError(
                f"subsampling: expected one of {get_args(Subsampling)}, got {self.subsampling!r}"
            )


# ---- copies --------------------------------------------------------------------------------------


def smaller_copy(data: bytes, shrink: Shrink) -> bytes | None:
    """Return a smaller JPEG of an image; None where the image is to stay as it is.

    An image with a side of more than `shrink.max_side` pixels is always resized. Any other is
    encoded anew, and stays as it is where that saves no byte. Thread-safe; Pillow releases the GIL
    for nearly all of its work.

    Grey images (mode L) stay grey; all others are converted to RGB, as torchvision's ImageFolder
    does. The copy keeps the Exif orientation, which ImageFolder ignores, as a tag, and an ICC
    profile that fits the copy's colours; other metadata is dropped.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = "L" if image.mode == "L" else "RGB"
            size = shrunk_size(image.size, shrink.max_side)
            is_resized = size != image.size
            pixels = image.convert(mode)
            kept = {"icc_profile": _profile(image, mode), "exif": _orientation(image)}
        if is_resized:
            pixels = pixels.resize(size, Image.Resampling.BICUBIC)
        copy, subsampling = io.BytesIO(), _PILLOW_SUBSAMPLING[shrink.subsampling]
        pixels.save(
            copy, "JPEG", quality=shrink.quality, subsampling=subsampling, comment=b"", **kept
        )
    except Exception:  # a damaged image raises almost anything, and the caller treats it
        return None
    return copy.getvalue() if is_resized or copy.tell() < len(data) else None


def shrunk_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Return the size of a copy: the longer side is `max_side`, the other one is rounded down.

    Rounding down is what torchvision's Resize does; no side becomes less than 1.
    """
    longer = max(size)
    if longer <= max_side:
        return size
    width, height = (max(1, side * max_side // longer) for side in size)
    return width, height


def _profile(image: Image.Image, mode: str) -> bytes | None:
    """Return the image's ICC profile where it describes the copy's colours, too.

    A profile's bytes 16 to 19 name its colour space (ICC.1:2022, 7.2.8).
    """
    profile = image.info.get("icc_profile")
    fits = isinstance(profile, bytes) and profile[16:20] == {"L": b"GRAY", "RGB": b"RGB "}[mode]
    return profile if fits else None


def _orientation(image: Image.Image) -> bytes:
    """Return Exif data with the image's orientation alone; b"" where it is upright."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged Exif raises almost anything, too
        return b""
    if not isinstance(value, int) or not 2 <= value <= 8:
        return b""
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = value
    return exif.tobytes()


# ---- the forecast --------------------------------------------------------------------------------

NUM_SAMPLED = 100
"""Images that a forecast measures; they take a few seconds on a hard disk."""

_NUM_CROPS = 3
"""Per image; the first only warms up caches and memory."""


class Pair(NamedTuple):
    """One image as a lossless pack would store it, and as this pack will."""

    source_bytes: int
    lossless: Encoded
    small: Encoded


@dataclass(frozen=True)
class Forecast:
    """What smaller copies do to size and speed, measured on a few images.

    Attributes:
        num_sampled: images measured.
        resized: share of the images that get fewer pixels.
        encoded: share of the images that are encoded anew, with or without a resize.
        source_bytes: mean size of the files.
        small_bytes: mean size of what will be stored of them.
        shard_bytes: the same with tar headers and padding.
        source_px: mean longer side.
        small_px: mean longer side of what will be stored.
        read_gain: images/s from a disk that is the limit, compared with a lossless pack.
        decode_cost: CPU time for a training crop, compared with a lossless pack; None: unknown,
            because the core decodes none of the images.
        crop_px: side of that crop.
    """

    num_sampled: int
    resized: float
    encoded: float
    source_bytes: float
    small_bytes: float
    shard_bytes: float
    source_px: float
    small_px: float
    read_gain: float
    decode_cost: float | None
    crop_px: int

    @classmethod
    def measure(cls, pairs: Sequence[Pair], shrink: Shrink) -> Forecast:
        """Measure one or more pairs; this decodes crops of them."""

        def mean(values: Sequence[float]) -> float:
            return float(np.mean(values))

        crop_px = min(224, shrink.max_side)
        shard_bytes = mean([_in_shard(p.small) for p in pairs])
        sides = [(_longer(p.lossless), _longer(p.small)) for p in pairs]
        return cls(
            len(pairs),
            mean([after < before for before, after in sides]),
            mean([bool(p.small.flags & pack_format.FLAG_SHRUNK) for p in pairs]),
            mean([p.source_bytes for p in pairs]),
            mean([len(p.small.data) for p in pairs]),
            shard_bytes,
            mean([before for before, _ in sides]),
            mean([after for _, after in sides]),
            mean([_in_shard(p.lossless) for p in pairs]) / shard_bytes,
            _decode_cost(pairs, crop_px),
            crop_px,
        )

    def text(self, shrink: Shrink, source_bytes: int) -> str:
        """Return what a user should know before packing; `source_bytes` are those of all images."""
        ratio = self.shard_bytes / self.source_bytes
        decoding = ""
        if self.decode_cost is not None:
            decoding = (
                f", {self.decode_cost:.2f} x the CPU time to decode a {self.crop_px} px training "
                "crop"
            )
        return (
            f"smaller copies, NOT lossless: longer side at most {shrink.max_side} px, quality "
            f"{shrink.quality}, {':'.join(shrink.subsampling)} ({shrink.encoder})\n"
            f"  size, from {self.num_sampled} images: {self.resized:.0%} get fewer pixels, "
            f"{self.encoded:.0%} are encoded anew, {self.source_px:.0f} -> {self.small_px:.0f} px, "
            f"{self.source_bytes / 1e3:.1f} -> {self.small_bytes / 1e3:.1f} KB: "
            f"{format_bytes(source_bytes)} of images become about "
            f"{format_bytes(source_bytes * ratio)} of shards ({ratio:.0%})\n"
            f"  speed against a lossless pack: about {self.read_gain:.1f} x the images/s where the "
            f"disk is the limit{decoding}"
        )


def _longer(encoded: Encoded) -> int:
    return max(encoded.width, encoded.height)


def _in_shard(encoded: Encoded) -> int:
    """Return the bytes of a sample in a shard: two headers, the label and the padded image."""
    return len(encoded.data) + len(pack_format.padding(len(encoded.data))) + 3 * 512


def _decode_cost(pairs: Sequence[Pair], crop_px: int) -> float | None:
    """Return the CPU time of the small images' crops divided by that of the lossless ones'."""
    # Imported here because it imports torch, which nothing else in packing needs.
    from imagenet_seq.native.recipe import Geometry, Recipe

    recipe = Recipe(
        Geometry.RANDOM_RESIZED_CROP,
        crop_px,
        crop_px,
        scale_min=0.08,
        scale_max=1.0,
        ratio_min=3 / 4,
        ratio_max=4 / 3,
    )
    row = np.empty((crop_px, crop_px, 3), np.uint8)

    def cpu_seconds(encoded: Encoded, sample: int, crop: int) -> float | None:
        begin = time.thread_time()
        flags = encoded.flags & pack_format.FLAG_CLEAN
        image: Any = encoded.data
        if not native.decode(recipe, (0, crop, sample), image, row.ctypes.data, flags):
            return None
        return time.thread_time() - begin

    before = after = 0.0
    for sample, pair in enumerate(pairs):
        for crop in range(_NUM_CROPS):
            lossless, small = (cpu_seconds(e, sample, crop) for e in pair[1:])
            if crop and lossless is not None and small is not None:
                before += lossless
                after += small
    return after / before if before else None
