"""Images are recognised by their first bytes, in the same way in every format."""

from __future__ import annotations

import io
from pathlib import Path

import msgpack
import pytest
from PIL import Image

from imagenet_seq.errors import DataError
from imagenet_seq.pack.lmdb import LmdbWriter
from imagenet_seq.sources.images import NAMED_EXTENSIONS, image_extension
from imagenet_seq.sources.recognise import open_source

EXTENSIONS = {
    "JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp",
    "PPM": ".ppm",
}  # fmt: skip
WAVE = b"RIFF\x24\0\0\0WAVEfmt "


def encoded(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (5, 3)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_what_pillow_writes(kind: str) -> None:
    assert image_extension(encoded(kind)) == EXTENSIONS[kind]
    assert image_extension(memoryview(encoded(kind))[:12]) in NAMED_EXTENSIONS


def test_grey_pixels_are_pgm() -> None:
    assert image_extension(encoded("PPM", "L")) == ".pgm"


@pytest.mark.parametrize("data", [b"", b"\xff", b"RIFF", WAVE, b"text"])
def test_other_bytes_have_no_extension(data: bytes) -> None:
    assert image_extension(data) is None


def test_sound_in_an_lmdb_is_no_image(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "a.lmdb") as file:
        for key, data in ((b"0", encoded("GIF")), (b"1", WAVE)):
            file.append(key, [msgpack.packb((data, 0))])
    with pytest.raises(DataError, match="expected an image, got 16 bytes that begin with b'RIFF"):
        open_source(tmp_path / "a.lmdb", progress=False)
    source = open_source(tmp_path / "a.lmdb", progress=False, on_error="skip")
    assert list(source.index.name) == ["0.gif"]
