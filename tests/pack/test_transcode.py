"""Lossless transcoding: the same pixels by Pillow, the same metadata, in canonical form."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like, segments
from PIL import ExifTags, Image

from imagenet_seq import native


def pixels(data: bytes) -> tuple[str, tuple[int, int], bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.size, image.tobytes()


def transcode(
    data: bytes, restart_interval: int = 8, strip: bool = False, tables: bytes | None = None
) -> bytes | None:
    result = native.transcode(data, restart_interval, strip, tables)
    return None if result is None else result[0].tobytes()


def fitted_tables(*images: bytes) -> bytes:
    """Tables of a pack that has these images."""
    return native.fit_tables(np.sum([native.count_symbols(data) for data in images], axis=0))


SIZES = b"imseq\0"
"""Identifier of the APP9 segment with the sizes of the restart intervals."""


def without_sizes(data: bytes) -> bytes:
    payload = dict(segments(data))[0xE9]
    return data.replace(struct.pack(">BBH", 0xFF, 0xE9, len(payload) + 2) + payload, b"", 1)


def intervals(data: bytes) -> list[bytes]:
    """The restart intervals, found by their markers alone; each ends with its marker."""
    begin = 2 + sum(4 + len(payload) for _, payload in segments(data))
    found = re.findall(rb".*?\xff[\xd0-\xd7\xd9]", data[begin:], re.DOTALL)
    assert b"".join(found) == data[begin:]
    return found


def assert_canonical(
    data: bytes, restart_interval: int = 8, strip: bool = False, tables: bytes | None = None
) -> bytes:
    """Check that `data` is transcoded without loss; return the result."""
    result = transcode(data, restart_interval, strip, tables)
    assert result is not None
    assert pixels(result) == pixels(data)
    assert transcode(result, restart_interval, strip, tables) == result
    found = segments(result)
    sizes = [len(part) for part in intervals(result)]
    expected = [(0xDD, struct.pack(">H", restart_interval))]
    if max(sizes) < 2**16 and len(SIZES) + 2 * len(sizes) <= 65533:
        expected.append((0xE9, SIZES + struct.pack(f">{len(sizes)}H", *sizes)))
    assert found[-1 - len(expected) : -1] == expected
    assert sum(payload.startswith(SIZES) for _, payload in found) == len(expected) - 1
    if tables is not None:
        grey = found[-1][1][0] == 1
        written = b"".join(payload for marker, payload in found if marker == 0xC4)
        assert written == (tables[:208] if grey else tables)
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
    images = [path.read_bytes() for path in photos]
    tables = fitted_tables(*images[::10])
    for data in images:
        own = assert_canonical(data)
        # From one form to the other and back.
        assert transcode(assert_canonical(own, tables=tables)) == own


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
    result = transcode(data)
    assert result is not None
    # The codes take no more bits than libjpeg's; where 0xFF bytes fall is chance.
    assert len(without_sizes(result)) <= 1.001 * len(data)


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
    after = [segment for segment in segments(kept) if is_metadata(segment[0])]
    assert after[:-1] == before

    stripped = assert_canonical(data, strip=True)
    assert [s[0] for s in segments(stripped) if is_metadata(s[0])] == [0xE0, 0xE1, 0xE9]
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
    assert assert_canonical(data + b"trailing") == transcode(data)


def test_multi_picture_files_stay_as_they_are_unless_stripped() -> None:
    rng = np.random.default_rng(9)
    buffer = io.BytesIO()
    further = [photo_like(rng, 24, 24)]
    photo_like(rng, 48, 32).save(buffer, "MPO", save_all=True, append_images=further)
    assert transcode(buffer.getvalue()) is None
    assert_canonical(buffer.getvalue(), strip=True)


def test_other_kinds_and_damage_are_left_to_pillow() -> None:
    image = photo_like(np.random.default_rng(10), 60, 50)
    data = jpeg_bytes(image)
    png = io.BytesIO()
    image.save(png, "PNG")
    for other in (
        jpeg_bytes(image.convert("CMYK")),
        png.getvalue(),
        b"",
        b"\xff\xd8",
        data[: len(data) // 2],
        data[:-2],
    ):
        assert transcode(other) is None


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
        result = transcode(bytes(damaged))
        if result is not None:
            accepted += 1
            assert pixels(result) == pixels(bytes(damaged))
    assert accepted > 100  # otherwise the test shows nothing


@pytest.mark.parametrize("restart_interval", [-1, 65536])
def test_restart_interval_outside_its_domain(restart_interval: int) -> None:
    with pytest.raises(ValueError, match="restart_interval: expected 0 to 65535"):
        native.transcode(b"", restart_interval)


# ---- tables of a pack ----------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 60, 100])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_tables_of_other_images_code_any_image(quality: int, subsampling: int) -> None:
    rng = np.random.default_rng(quality)
    flat = jpeg_bytes(Image.new("RGB", (16, 16)))
    noise = Image.fromarray(rng.integers(0, 256, (83, 61, 3), np.uint8))
    for image in (noise, photo_like(rng, 97, 50)):
        data = jpeg_bytes(image, quality=quality, subsampling=subsampling)
        grey = jpeg_bytes(image.convert("L"), quality=quality)
        for tables in (fitted_tables(flat), fitted_tables(data, grey)):
            assert_canonical(data, tables=tables)
            assert_canonical(grey, tables=tables)


def test_symbols_are_those_of_the_output_whatever_the_input_looks_like() -> None:
    image = photo_like(np.random.default_rng(12), 200, 120)
    data = jpeg_bytes(image)
    expected = native.count_symbols(data)
    assert expected is not None
    assert (expected[0].sum(), expected[2].sum()) == (13 * 8 * 4, 13 * 8 * 2)  # blocks, 4:2:0
    assert expected.max(axis=0)[[255, 254, 12]].tolist() == [0, 0, 0]  # no symbols of baseline
    for other in (transcode(data), transcode(data, tables=fitted_tables(data)), transcode(data, 1)):
        assert other is not None
        assert np.array_equal(native.count_symbols(other), expected)
    assert native.count_symbols(data[:-2]) is None


def test_tables_must_be_tables() -> None:
    data = jpeg_bytes(photo_like(np.random.default_rng(13), 20, 20))
    tables = fitted_tables(data)
    for wrong in (tables[:-1], tables + b"\0", b""):
        with pytest.raises(ValueError, match="tables: expected 416 bytes"):
            transcode(data, tables=wrong)
    for place in range(0, 416):
        damaged = bytearray(tables)
        damaged[place] ^= 0x80
        with pytest.raises(ValueError, match="expected 416 bytes as imseq_fit_tables gives"):
            transcode(data, tables=bytes(damaged))


def test_counts_must_be_counts() -> None:
    for wrong in (np.zeros((4, 255), np.uint64), np.zeros((4, 256), np.int64)):
        with pytest.raises(ValueError, match="counts: expected"):
            native.fit_tables(wrong)
    counts = np.zeros((4, 256), np.uint64)
    counts[1, 7] = 2**48
    with pytest.raises(ValueError, match=r"counts\[263\]: expected less than 2\^48"):
        native.fit_tables(counts)


# ---- sizes of the restart intervals --------------------------------------------------------------


def test_sizes_are_left_out_where_they_do_not_fit() -> None:
    noise = np.random.default_rng(14).integers(0, 256, (300, 300), np.uint8)
    large = jpeg_bytes(Image.fromarray(noise), quality=100)  # one interval of more than 64 KB
    many = jpeg_bytes(Image.new("L", (1456, 1440), 9))  # 32760 intervals of one block
    too_many = jpeg_bytes(Image.new("L", (1456, 1448), 9))  # 32942, of which 32763 would fit
    for data, restart_interval, expected in (
        (large, 65535, False), (large, 8, True), (many, 1, True), (too_many, 1, False)
    ):  # fmt: skip
        result = assert_canonical(data, restart_interval)
        assert (0xE9 in dict(segments(result))) == expected


def test_an_app9_segment_of_others_stays() -> None:
    data = jpeg_bytes(photo_like(np.random.default_rng(15), 40, 30))
    other = b"\xff\xe9" + struct.pack(">H", 2 + 8) + b"imseq 1\0"
    result = transcode(data[:2] + other + data[2:])
    assert result is not None
    assert [s[1][:7] for s in segments(result) if s[0] == 0xE9] == [b"imseq 1", SIZES + b"\1"]
