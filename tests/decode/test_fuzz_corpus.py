"""The corpus of the fuzz targets: that it is what its names say, by Pillow and by the core."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagenet_seq import native
from imagenet_seq.native.recipe import Geometry, Layout, Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import corpus

STREAMS = corpus.streams()


def decode(data: bytes, height: int, width: int) -> np.ndarray | None:
    """The top left pixels, of data decoded up to its end; None: python_blocks."""
    recipe = Recipe(
        geometry=Geometry.FIXED_CROP,
        out_height=height,
        out_width=width,
        layout=Layout.HWC,
        fixed_height=height,
        fixed_width=width,
        strict=1,
    )
    row = np.full((height, width, 3), 77, np.uint8)
    exact = np.frombuffer(data, np.uint8).copy()
    return row if native.decode(recipe, (0, 0, 0), exact, row.ctypes.data) else None


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def named(kind: str) -> list[str]:
    return [name for name in STREAMS if name.startswith(kind)]


@pytest.mark.parametrize("name", named("valid"))
def test_valid_streams_have_pillows_pixels(name: str) -> None:
    data = STREAMS[name]
    header = native.read_header(data)
    assert header is not None
    assert header.supported
    pixels = decode(data, header.height, header.width)
    assert pixels is not None
    assert np.array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize("name", named("doubtful"))
def test_doubtful_streams_have_pillows_pixels_or_none(name: str) -> None:
    data = STREAMS[name]
    header = native.read_header(data)
    assert header is not None
    pixels = decode(data, header.height, header.width)
    assert pixels is None or np.array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize("name", named("damaged"))
def test_damaged_streams_are_given_up(name: str) -> None:
    header = native.read_header(STREAMS[name])
    assert header is not None
    assert header.supported
    assert decode(STREAMS[name], 1, 1) is None
    assert native.transcode(STREAMS[name]) is None


@pytest.mark.parametrize("name", named("pillow"))
def test_pillow_streams_are_known_by_their_headers(name: str) -> None:
    header = native.read_header(STREAMS[name])
    assert header is None or not header.supported


def test_every_target_has_its_inputs(tmp_path: Path) -> None:
    assert corpus.write(tmp_path) > 1000
    for target in ("header", "decode", "transcode"):
        assert (Path(corpus.__file__).parent / f"fuzz_{target}.cpp").is_file()
        files = list((tmp_path / target).iterdir())
        assert len(files) > len(STREAMS)
        assert max(file.stat().st_size for file in files) <= 8192  # -max_len in Makefile


def test_corpus_is_deterministic() -> None:
    assert corpus.inputs() == corpus.inputs()
