"""The kernels of every kind of processor give the same bits, alone and in groups."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from helpers.images import jpeg_bytes, photo_like
from PIL import Image

from imagenet_seq import native
from imagenet_seq.native.recipe import Dtype, Geometry, Layout, Passes, Recipe

NAMES = ("portable", "avx2", "avx512", "neon")
TRAIN = Recipe(
    geometry=Geometry.RANDOM_RESIZED_CROP,
    out_height=96,
    out_width=128,
    passes=Passes.PILLOW_13 if int(PIL.__version__.split(".")[0]) >= 13 else 0,
    scale_min=0.08,
    scale_max=1.0,
    ratio_min=0.75,
    ratio_max=4 / 3,
    flip_probability=0.5,
)


@pytest.fixture
def levels() -> Iterator[list[str]]:
    """The levels that this processor has; the one in use is restored afterwards."""
    before, found = native.cpu(), []
    for name in NAMES:
        with contextlib.suppress(ValueError):
            native.use_cpu(name)
            assert native.cpu() == name
            found.append(name)
    assert "portable" in found
    yield found
    native.use_cpu(before)


def packed(data: bytes) -> bytes:
    """In canonical form: restart markers, and their places stated."""
    recoded = native.transcode(data, 8, False)
    assert recoded is not None
    return bytes(recoded[0])


def rows_of(recipe: Recipe, data: list[bytes], flags: int, group: int) -> np.ndarray:
    value_bytes = {Dtype.UINT8: 1, Dtype.FLOAT32: 4}.get(recipe.dtype, 2)
    row_bytes = recipe.out_height * recipe.out_width * 3 * value_bytes
    rows = np.full((len(data), row_bytes), 77, np.uint8)
    for first in range(0, len(data), group):
        part = range(first, min(first + group, len(data)))
        decoded = native.decode_group(
            recipe,
            [(5, 1, i) for i in part],
            [data[i] for i in part],
            [rows[i].ctypes.data for i in part],
            flags,
        )
        assert all(decoded)
    return rows


def check_all(data: list[bytes], levels: list[str]) -> None:
    packs = [packed(image) for image in data]
    table = np.random.default_rng(2).integers(0, 256, 3 * 256 * 4, np.uint8)
    formats = [
        {},
        {"layout": Layout.HWC},
        {"dtype": Dtype.FLOAT32, "table": table},
        {"dtype": Dtype.BFLOAT16, "table": table[: 3 * 256 * 2], "layout": Layout.HWC},
    ]
    for options in formats:
        recipe = dataclasses.replace(TRAIN, **options)
        native.use_cpu("portable")
        expected = rows_of(recipe, data, 0, 1)
        for level in levels:
            native.use_cpu(level)
            for group in (1, native.MAX_GROUP):
                assert np.array_equal(rows_of(recipe, data, 0, group), expected), (level, group)
                clean = rows_of(recipe, packs, native.SAMPLE_CLEAN, group)
                assert np.array_equal(clean, expected), (level, group, "canonical form")


def test_levels_agree_on_generated_images(levels: list[str]) -> None:
    rng = np.random.default_rng(1)
    data = []
    for i in range(24):
        image = photo_like(rng, int(rng.integers(1, 400)), int(rng.integers(1, 300)))
        if i % 6 == 5:
            image = image.convert("L")
        data.append(jpeg_bytes(image, quality=int(rng.integers(30, 100)), subsampling=i % 3))
    check_all(data, levels)


def test_levels_agree_on_photos(levels: list[str], photos: list[Path]) -> None:
    check_all([photo.read_bytes() for photo in photos[::12]], levels)


def test_images_with_the_same_tables(levels: list[str]) -> None:
    """Images in a row with the same Huffman tables are decoded by larger tables of their own."""
    rng = np.random.default_rng(3)
    images = [photo_like(rng, 300, 200 + i) for i in range(32)]
    images[20] = images[20].convert("L")
    check_all([jpeg_bytes(image, quality=95) for image in images], levels)


def test_a_whole_image_is_pillows_on_every_level(levels: list[str]) -> None:
    data = jpeg_bytes(photo_like(np.random.default_rng(4), 123, 77), subsampling=2)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    recipe = Recipe(
        geometry=Geometry.FIXED_CROP, out_height=77, out_width=123, layout=Layout.HWC,
        fixed_height=77, fixed_width=123,
    )  # fmt: skip
    for level in levels:
        native.use_cpu(level)
        got = rows_of(recipe, [data], 0, 1).reshape(77, 123, 3)
        assert np.array_equal(got, expected), level


def import_with(level: str) -> subprocess.CompletedProcess[str]:
    code = "from imagenet_seq import native; print(native.cpu())"
    environment = {**os.environ, "IMAGENET_SEQ_CPU": level}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_the_environment_chooses(levels: list[str]) -> None:
    for level in levels:
        assert import_with(level).stdout.strip() == level
    assert import_with("").stdout.strip() in levels
    wrong = import_with("sse9")
    assert wrong.returncode != 0
    last = wrong.stderr.strip().splitlines()[-1]
    assert re.search("IMAGENET_SEQ_CPU.*'sse9'.*portable", last)


def test_too_many_samples_are_refused() -> None:
    data = [jpeg_bytes(photo_like(np.random.default_rng(0), 8, 8))] * (native.MAX_GROUP + 1)
    with pytest.raises(ValueError, match=f"0 to {native.MAX_GROUP}, got {native.MAX_GROUP + 1}"):
        rows_of(TRAIN, data, 0, len(data))
