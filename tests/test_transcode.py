"""Lossless re-coding: the same pixels by Pillow, the same metadata, in canonical form."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg_bytes, photo_like
from PIL import ExifTags, Image

from imagenet_seq import _native


def pixels(data: bytes) -> tuple[str, tuple[int, int], bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.size, image.tobytes()


def recode(data: bytes, restart_interval: int = 8, strip: bool = False) -> bytes | None:
    result = _native.transcode(data, restart_interval, strip)
    return None if result is None else result[0].tobytes()


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """Marker and payload of every segment up to the entropy-coded data."""
    found, at = [], 2
    while True:
        assert data[at] == 0xFF
        marker, size = struct.unpack(">xBH", data[at : at + 4])
        found.append((marker, data[at + 4 : at + 2 + size]))
        at += 2 + size
        if marker == 0xDA:
            return found


def assert_canonical(data: bytes, restart_interval: int = 8, strip: bool = False) -> bytes:
    """Check that `data` is re-coded without loss; return the result."""
    result = recode(data, restart_interval, strip)
    assert result is not None
    assert pixels(result) == pixels(data)
    assert recode(result, restart_interval, strip) == result
    assert (0xDD, struct.pack(">H", restart_interval)) in segments(result)
    return result


def patch_frame(data: bytes, size: tuple[int, int], sampling: int) -> bytes:
    """Give a JPEG another size and another sampling of the first component."""
    at = data.index(b"\xff\xc0")
    frame = bytearray(data)
    frame[at + 5 : at + 9] = struct.pack(">HH", size[1], size[0])
    frame[at + 11] = sampling
    return bytes(frame)


def test_photos(photos: list[Path]) -> None:
    assert len(photos) >= 500
    for path in photos:
        assert_canonical(path.read_bytes())


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (17, 31), (64, 64), (1, 300), (301, 3)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [1, 60, 100])
def test_sizes_samplings_and_qualities(
    size: tuple[int, int], subsampling: int, quality: int
) -> None:
    image = photo_like(np.random.default_rng(quality), *size)
    data = jpeg_bytes(image, quality=quality, subsampling=subsampling)
    for restart_interval in (1, 3, 8, 65535):
        assert_canonical(data, restart_interval)
    assert_canonical(jpeg_bytes(image.convert("L"), quality=quality))


@pytest.mark.parametrize("sampling", [0x12, 0x21, 0x22, 0x31, 0x44])
def test_lone_component_has_one_block_mcus_whatever_its_sampling(sampling: int) -> None:
    grey = photo_like(np.random.default_rng(1), 61, 43).convert("L")
    data = jpeg_bytes(grey)
    result = assert_canonical(patch_frame(data, grey.size, sampling))
    assert pixels(result) == pixels(data)


@pytest.mark.parametrize(
    ("subsampling", "size", "sampling"),
    [(1, (32, 96), 0x12), (2, (128, 24), 0x41), (2, (32, 96), 0x14)],
    ids=["4:4:0", "4:1:1", "1x4"],
)
def test_unusual_samplings(subsampling: int, size: tuple[int, int], sampling: int) -> None:
    # An MCU of 2 x 1 blocks has the bits of one of 1 x 2, so another frame header is enough; the
    # picture is a jumble, but a valid one.
    image = photo_like(np.random.default_rng(2), 64, 48)
    data = patch_frame(jpeg_bytes(image, subsampling=subsampling), size, sampling)
    assert_canonical(data)


def test_rgb_and_restart_markers_of_the_source() -> None:
    image = photo_like(np.random.default_rng(3), 100, 75)
    result = assert_canonical(jpeg_bytes(image, keep_rgb=True, subsampling=0))
    assert any(marker == 0xEE for marker, _ in segments(result))
    assert_canonical(jpeg_bytes(image, restart_marker_blocks=3))
    assert_canonical(jpeg_bytes(image, restart_marker_rows=1))


def test_sixteen_bit_quantisation_stays() -> None:
    image = photo_like(np.random.default_rng(4), 40, 40)
    data = jpeg_bytes(image.convert("L"), qtables=[[90] * 64])
    at = data.index(b"\xff\xdb")
    wide = b"\xff\xdb" + struct.pack(">HB64H", 131, 0x10, 300, *[90] * 63)
    data = data[:at] + wide + data[at + 69 :].replace(b"\xff\xc0", b"\xff\xc1", 1)
    result = assert_canonical(data)
    found = dict(segments(result))
    assert 0xC1 in found
    assert found[0xDB] == wide[4:]


def test_tables_are_no_larger_than_those_of_libjpeg() -> None:
    image = photo_like(np.random.default_rng(5), 320, 240)
    data = jpeg_bytes(image, optimize=True, restart_marker_blocks=8)
    result = recode(data)
    assert result is not None
    # The codes take no more bits than libjpeg's; where 0xFF bytes fall is chance.
    assert len(result) <= 1.001 * len(data)


def test_metadata_is_kept_in_order_or_stripped() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    image = photo_like(np.random.default_rng(6), 50, 40)
    data = jpeg_bytes(image, exif=exif, icc_profile=b"p" * 70000, comment=b"words", dpi=(72, 72))
    kept = assert_canonical(data)
    is_metadata = lambda marker: 0xE0 <= marker <= 0xEF or marker == 0xFE  # noqa: E731
    before = [segment for segment in segments(data) if is_metadata(segment[0])]
    assert {0xE0, 0xE1, 0xE2, 0xFE} == {marker for marker, _ in before}
    assert [segment for segment in segments(kept) if is_metadata(segment[0])] == before

    stripped = assert_canonical(data, strip=True)
    assert [s[0] for s in segments(stripped) if is_metadata(s[0])] == [0xE0, 0xE1]
    with Image.open(io.BytesIO(stripped)) as opened:
        assert dict(opened.getexif()) == {ExifTags.Base.Orientation: 6}
        assert "icc_profile" not in opened.info
        assert opened.info["dpi"] == (72, 72)


def test_stripping_drops_an_upright_orientation() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    data = jpeg_bytes(photo_like(np.random.default_rng(7), 20, 20), exif=exif)
    assert 0xE1 not in {marker for marker, _ in segments(assert_canonical(data, strip=True))}


def test_bytes_behind_the_image_are_dropped() -> None:
    data = jpeg_bytes(photo_like(np.random.default_rng(8), 20, 20))
    assert assert_canonical(data + b"trailing") == recode(data)


def test_multi_picture_files_stay_as_they_are_unless_stripped() -> None:
    rng = np.random.default_rng(9)
    buffer = io.BytesIO()
    further = [photo_like(rng, 24, 24)]
    photo_like(rng, 48, 32).save(buffer, "MPO", save_all=True, append_images=further)
    assert recode(buffer.getvalue()) is None
    assert_canonical(buffer.getvalue(), strip=True)


def test_other_kinds_and_damage_are_left_to_pillow() -> None:
    image = photo_like(np.random.default_rng(10), 60, 50)
    data = jpeg_bytes(image)
    png = io.BytesIO()
    image.save(png, "PNG")
    for other in (
        jpeg_bytes(image, progressive=True),
        jpeg_bytes(image.convert("CMYK")),
        png.getvalue(),
        b"",
        b"\xff\xd8",
        data[: len(data) // 2],
        data[:-2],
    ):
        assert recode(other) is None


def test_output_larger_than_the_first_buffer() -> None:
    # A flat image with a marker behind every block grows far beyond its own size.
    data = jpeg_bytes(Image.new("L", (3000, 3000), 90), optimize=True)
    result = assert_canonical(data, restart_interval=1)
    assert len(result) > 2 * len(data)


def test_what_is_accepted_after_random_damage_has_pillows_pixels() -> None:
    rng = np.random.default_rng(11)
    data = jpeg_bytes(photo_like(rng, 33, 21), quality=80, subsampling=2)
    accepted = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        result = recode(bytes(damaged))
        if result is not None:
            accepted += 1
            assert pixels(result) == pixels(bytes(damaged))
    assert accepted > 100  # otherwise the test shows nothing


@pytest.mark.parametrize("restart_interval", [-1, 65536])
def test_restart_interval_outside_its_domain(restart_interval: int) -> None:
    with pytest.raises(ValueError, match="restart_interval: expected 0 to 65535"):
        _native.transcode(b"", restart_interval)
