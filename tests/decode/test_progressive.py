"""JPEGs in several scans: re-coded into the same bytes as the same coefficients in one scan.

Canonical form is a function of the coefficients and the metadata, so equal bytes are equal
coefficients.
"""

from __future__ import annotations

import dataclasses
import io
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.images import jpeg_bytes, photo_like
from helpers.jpeg_writer import EOI, quant_table, segment, stuffed
from helpers.scan_writer import (
    EVERY_BAND,
    SEQUENTIAL,
    Picture,
    Scan,
    frame_header,
    random_picture,
    scan_header,
    write,
    write_baseline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagenet_seq import native

SAMPLINGS = {
    "4:4:4": ((1, 1), (1, 1), (1, 1)),
    "4:2:0": ((2, 2), (1, 1), (1, 1)),
    "4:2:2": ((2, 1), (1, 1), (1, 1)),
    "4:4:0": ((1, 2), (1, 1), (1, 1)),
    "4:1:1": ((4, 1), (1, 1), (1, 1)),
    "1x4": ((1, 4), (1, 1), (1, 2)),
    "chroma finer": ((1, 1), (2, 2), (1, 1)),
    "grey": ((1, 1),),
    "grey 2x2": ((2, 2),),
}


def recode(data: bytes, strip: bool = False) -> bytes | None:
    result = native.transcode(data, 8, strip)
    return None if result is None else result[0].tobytes()


def pixels(data: bytes) -> tuple[str, tuple[int, int], bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.size, image.tobytes()


def assert_recoded_as(data: bytes, baseline: bytes) -> None:
    """Check that `data` has the coefficients of `baseline`, and its own pixels still."""
    result = recode(data)
    assert result is not None
    assert result == recode(baseline)
    assert pixels(result) == pixels(data)


# ---- Pillow's files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(1, 1), (7, 9), (8, 8), (17, 31), (64, 64), (70, 50), (1, 70), (33, 2)]
)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [1, 60, 100])
def test_pillows_files(size: tuple[int, int], subsampling: int, quality: int) -> None:
    image = photo_like(np.random.default_rng(quality), *size)
    options: Sequence[dict[str, int]] = (
        {},
        {"optimize": 1},
        {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1},
    )
    for of_kind in (image, image.convert("L")):
        baseline = jpeg_bytes(of_kind, quality=quality, subsampling=subsampling)
        for extra in options:
            progressive = jpeg_bytes(
                of_kind, quality=quality, subsampling=subsampling, progressive=True, **extra
            )
            assert_recoded_as(progressive, baseline)


def test_rgb_files_stay_rgb() -> None:
    image = photo_like(np.random.default_rng(1), 40, 30)
    options = {"keep_rgb": True, "subsampling": 0}
    assert_recoded_as(jpeg_bytes(image, progressive=True, **options), jpeg_bytes(image, **options))


def test_photos(photos: list[Path]) -> None:
    for path in photos[::20]:
        with Image.open(path) as image:
            assert_recoded_as(jpeg_bytes(image, progressive=True), jpeg_bytes(image))


def test_metadata_is_kept_or_stripped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo_like(np.random.default_rng(2), 50, 40)
    options = {"exif": exif, "comment": b"words", "icc_profile": b"p" * 300}
    progressive, baseline = (jpeg_bytes(image, progressive=p, **options) for p in (True, False))
    assert_recoded_as(progressive, baseline)
    assert recode(progressive, strip=True) == recode(baseline, strip=True)


# ---- other scans ---------------------------------------------------------------------------------

PICTURE = random_picture(np.random.default_rng(6), 41, 27, SAMPLINGS["4:2:0"], density=0.5)
RGB = (0, 1, 2)
WHOLE_BANDS = [Scan((c,), 1, 63) for c in RGB]
SCRIPTS = {
    "one bit left out at first": EVERY_BAND,
    "all bits at once": [Scan(RGB), *WHOLE_BANDS],
    "components one by one": [scan for c in RGB for scan in (Scan((c,)), Scan((c,), 1, 63))],
    "two components together": [Scan((0, 2)), Scan((1,)), *WHOLE_BANDS],
    "bands from the end": [
        Scan(RGB),
        *(Scan((c,), *band) for c in RGB for band in ((40, 63), (6, 39), (1, 5))),
    ],
    "DC refined last": [Scan(RGB, low=1), *WHOLE_BANDS, Scan(RGB, high=1)],
    "DC refined apart": [Scan(RGB, low=1), *WHOLE_BANDS, *(Scan((c,), high=1) for c in RGB)],
    "every bit by itself": [
        Scan(RGB, low=13),
        *(Scan(RGB, high=low + 1, low=low) for low in range(12, -1, -1)),
        *(Scan((c,), 1, 63, low=13) for c in RGB),
        *(Scan((c,), 1, 63, high=low + 1, low=low) for low in range(12, -1, -1) for c in RGB),
    ],
    "bands cut anew for refinement": [
        Scan(RGB),
        *(Scan((c,), *band, low=1) for c in RGB for band in ((1, 20), (21, 63))),
        *(Scan((c,), *band, high=1) for c in RGB for band in ((1, 9), (10, 63))),
    ],
    "ends of block one by one": [dataclasses.replace(scan, longest_run=1) for scan in EVERY_BAND],
    "long codes": [dataclasses.replace(scan, long_codes=True) for scan in EVERY_BAND],
    "tables change": [
        dataclasses.replace(scan, long_codes=i % 2 == 1) for i, scan in enumerate(EVERY_BAND)
    ],
    "tables stay": [dataclasses.replace(scan, tables=i == 0) for i, scan in enumerate(EVERY_BAND)],
    "restart intervals change": [
        dataclasses.replace(scan, restart_interval=interval)
        for scan, interval in zip(EVERY_BAND, (2, 1, None, 9, 0, None, 5, 3), strict=True)
    ],
    "restart after each": [dataclasses.replace(scan, restart_interval=1) for scan in EVERY_BAND],
    "fill bytes": [dataclasses.replace(scan, before=b"\xff\xff") for scan in EVERY_BAND],
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str, sampling: str) -> None:
    rng = np.random.default_rng(3)
    num_components = len(SAMPLINGS[sampling])
    scans = []
    for scan in SCRIPTS[name]:
        present = tuple(c for c in scan.components if c < num_components)
        if present:
            scans.append(dataclasses.replace(scan, components=present))
    for size in ((1, 1), (17, 33), (70, 50)):
        picture = random_picture(rng, *size, SAMPLINGS[sampling])
        assert_recoded_as(write(picture, scans), write_baseline(picture))


def random_scans(draw: random.Random, num_components: int) -> list[Scan]:
    """Any order of scans that codes every coefficient in full."""
    unknown = -1
    known = [[unknown] * 64 for _ in range(num_components)]  # the lowest bit, as Scan.low
    cuts_left = 6
    scans = []

    def take(components: tuple[int, ...], first: int, last: int) -> None:
        before = known[components[0]][first]
        low = draw.choice((0, 0, 1, 2)) if before == unknown else before - 1
        for c in components:
            known[c][first : last + 1] = [low] * (last + 1 - first)
        scans.append(
            Scan(
                components,
                first,
                last,
                high=max(before, 0),
                low=low,
                restart_interval=draw.choice((None, None, 0, 1, 2, 7)),
                long_codes=draw.random() < 0.3,
                longest_run=draw.choice((1, 2, 5, 32767)),
            )
        )

    while open_places := [
        (c, k) for c in range(num_components) for k in range(64) if known[c][k] != 0
    ]:
        c, k = draw.choice(open_places)
        if k == 0 or known[c][0] == unknown:
            like = [d for d in range(num_components) if known[d][0] == known[c][0]]
            chosen = {c, *draw.sample(like, draw.randint(0, len(like)))}
            take(tuple(sorted(chosen)), 0, 0)
            continue
        first = last = k
        while first > 1 and known[c][first - 1] == known[c][k]:
            first -= 1
        while last < 63 and known[c][last + 1] == known[c][k]:
            last += 1
        if cuts_left > 0 and draw.random() < 0.5:
            cuts_left -= 1
            first, last = draw.choice(((first, k), (k, last)))
        take((c,), first, last)
    return scans


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    draw=st.randoms(use_true_random=False),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    sampling=st.sampled_from(sorted(SAMPLINGS)),
    density=st.sampled_from((0.0, 0.02, 0.2, 1.0)),
    largest=st.sampled_from((2, 60, 1023)),
)
def test_any_script(
    seed: int,
    draw: random.Random,
    size: tuple[int, int],
    sampling: str,
    density: float,
    largest: int,
) -> None:
    factors = SAMPLINGS[sampling]
    picture = random_picture(np.random.default_rng(seed), *size, factors, density, largest)
    data = write(picture, random_scans(draw, len(factors)))
    assert_recoded_as(data, write_baseline(picture))


def test_runs_of_32767_blocks() -> None:
    picture = Picture(1464, 1464, SAMPLINGS["grey"])
    picture.components = [np.zeros((183, 183, 64), np.int16)]
    for y, x in ((0, 0), (100, 5), (182, 182)):
        picture.components[0][y, x, [1, 17, 63]] = (9, -5, 1)
    scans = [
        Scan((0,)),
        Scan((0,), 1, 16, low=1),
        Scan((0,), 17, 62, low=3),  # not a block of the whole band is other than zero
        Scan((0,), 63, 63),
        Scan((0,), 1, 16, high=1),
        *(Scan((0,), 17, 62, high=high, low=high - 1) for high in (3, 2, 1)),
    ]
    assert_recoded_as(write(picture, scans), write_baseline(picture))


def test_whatever_fills_up_mcus_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    picture = random_picture(rng, 17, 17, SAMPLINGS["4:2:0"])
    baseline = write_baseline(picture)
    high, wide = picture.real_blocks(0)
    outside = picture.components[0].copy()
    outside[:high, :wide] = 0
    outside[high:, :, 0] = 77
    outside[:, wide:, 0] = -55
    other = dataclasses.replace(picture, components=list(picture.components))
    other.components[0] = np.where(outside != 0, outside, picture.components[0])
    assert not np.array_equal(other.components[0], picture.components[0])
    assert_recoded_as(write(other, EVERY_BAND), baseline)


def test_fill_bytes_before_restarts_and_the_end() -> None:
    scans = [dataclasses.replace(scan, restart_interval=3) for scan in EVERY_BAND]
    data = write(PICTURE, scans, end=b"\xff\xff" + EOI)
    filled = data.replace(b"\xff\xd0", b"\xff\xff\xff\xd0")
    assert len(filled) > len(data)
    assert_recoded_as(filled, write_baseline(PICTURE))


@pytest.mark.parametrize("frame", [0xC0, 0xC1])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0", "1x4", "chroma finer"])
@pytest.mark.parametrize(
    "parts", [((0,), (1,), (2,)), ((0,), (1, 2)), ((0, 2), (1,)), ((2,), RGB[:2])]
)
def test_sequential_in_several_scans(
    frame: int, sampling: str, parts: tuple[tuple[int, ...], ...]
) -> None:
    picture = random_picture(np.random.default_rng(5), 41, 27, SAMPLINGS[sampling])
    for restart_interval in (0, 1, 4):
        scans = [Scan(part, restart_interval=restart_interval, **SEQUENTIAL) for part in parts]
        assert_recoded_as(write(picture, scans, frame), write_baseline(picture))


# ---- what is left to Pillow ----------------------------------------------------------------------


def without(index: int) -> list[Scan]:
    return EVERY_BAND[:index] + EVERY_BAND[index + 1 :]


def with_segment(data: bytes) -> list[Scan]:
    return [*EVERY_BAND[:3], dataclasses.replace(EVERY_BAND[3], before=data), *EVERY_BAND[4:]]


BAD_SCRIPTS = {
    "no scan of AC": EVERY_BAND[:1] + EVERY_BAND[4:5],
    "DC not refined": without(4),
    "DC of one component not refined": [
        *without(4),
        Scan((0, 1), high=1),
    ],
    "AC not refined": without(7),
    "a component left out": [Scan((0, 1)), *WHOLE_BANDS[:2]],
    "high frequencies left out": [Scan(RGB), *(Scan((c,), 1, 62) for c in RGB)],
    "AC before DC": [WHOLE_BANDS[0], Scan(RGB), *WHOLE_BANDS[1:]],
    "AC of one component before its DC": [
        Scan((0, 1)),
        *WHOLE_BANDS,
        Scan((2,)),
    ],
    "AC of two components": [Scan(RGB), Scan((0, 1), 1, 63), WHOLE_BANDS[2]],
    "DC and AC in one scan": [Scan((c,), 0, 63) for c in RGB],
    "band backwards": [*EVERY_BAND, Scan((0,), 5, 2)],
    "14 low bits": [
        Scan(RGB, low=14),
        *(Scan(RGB, high=low + 1, low=low) for low in range(13, -1, -1)),
        *WHOLE_BANDS,
    ],
    "two bits refined at once": [Scan(RGB, low=2), Scan(RGB, high=2), *WHOLE_BANDS],
    "a bit skipped": [Scan(RGB, low=2), Scan(RGB, high=1), *WHOLE_BANDS],
    "refined before the first scan": [*EVERY_BAND[4:5], *EVERY_BAND],
    "DC twice": [Scan(RGB), Scan(RGB), *WHOLE_BANDS],
    "AC twice": [Scan(RGB), *WHOLE_BANDS, WHOLE_BANDS[1]],
    "refined twice": [*EVERY_BAND, EVERY_BAND[-1]],
    "components in another order": [Scan((1, 0, 2)), *WHOLE_BANDS],
    "a component twice in a scan": [Scan((0, 0)), Scan((1, 2)), *WHOLE_BANDS],
    "no tables": [dataclasses.replace(scan, tables=False) for scan in EVERY_BAND],
    "a comment between scans": with_segment(segment(0xFE, b"words")),
    "APP1 between scans": with_segment(segment(0xE1, b"words")),
    "DQT between scans": with_segment(quant_table(0, [3] * 64)),
    "DNL between scans": with_segment(segment(0xDC, b"\0\x1b")),
    "a second frame": with_segment(segment(0xC2, b"\x08\0\x1b\0\x29\x01\x01\x11\0")),
    "a byte between segments": with_segment(b"\0"),
    "a marker cut short": with_segment(b"\xff\xdd\0\1"),
}


@pytest.mark.parametrize("name", BAD_SCRIPTS)
def test_bad_scripts(name: str) -> None:
    assert recode(write(PICTURE, BAD_SCRIPTS[name])) is None


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def bad_files() -> dict[str, bytes]:
    good = write(PICTURE, EVERY_BAND)
    restarts = write(PICTURE, [dataclasses.replace(s, restart_interval=3) for s in EVERY_BAND])
    last_scan = b"\x01\x03\x00\x01\x3f\x10"  # of EVERY_BAND, from the number of components on
    assert recode(good) is not None
    assert recode(restarts) is not None
    first_restart = restarts.index(b"\xff\xd0")
    last_scan_end = good.index(last_scan) + len(last_scan)
    return {
        "an unknown component": replaced(good, last_scan, b"\x01\x04\x00\x01\x3f\x10"),
        "five components": replaced(good, last_scan, b"\x05\x03\x00\x01\x3f\x10"),
        "a band up to 64": replaced(good, last_scan, b"\x01\x03\x00\x01\x40\x10"),
        "table 4": replaced(good, last_scan, b"\x01\x03\x04\x01\x3f\x10"),
        "no EOI": good[:-2],
        "half an EOI": good[:-1],
        "the last scan cut": good[:-9] + EOI,
        "cut in a segment": good[: good.index(last_scan)],
        "nothing in the last scan": good[:last_scan_end] + EOI,
        "bits that are no code": good[:last_scan_end] + b"\xff\0" * 40 + EOI,
        "a byte too many": good[:-2] + b"\x55" + EOI,
        "a restart too many": good[:-2] + b"\xff\xd0" + EOI,
        "another marker": good[:-2] + b"\xff\xdc\0\2" + EOI,
        "a restart left out": restarts[:first_restart] + restarts[first_restart + 2 :],
        "a restart out of turn": restarts[:first_restart]
        + b"\xff\xd1"
        + restarts[first_restart + 2 :],
    }


@pytest.mark.parametrize("name", bad_files())
def test_damage(name: str) -> None:
    assert recode(bad_files()[name]) is None


def test_every_truncation() -> None:
    data = jpeg_bytes(photo_like(np.random.default_rng(7), 33, 21), quality=60, progressive=True)
    assert recode(data) is not None
    for size in range(len(data)):
        assert recode(data[:size]) is None


def test_runs_beyond_the_last_block() -> None:
    flat = Picture(16, 8, SAMPLINGS["grey"], [np.zeros((1, 2, 64), np.int16)])
    data = write(flat, [Scan((0,)), Scan((0,), 1, 63)])
    assert recode(data) is not None
    # Half as wide, the DC scan keeps four bits, which may fill its byte, and the run is too long.
    narrow = replaced(data, b"\0\x08\0\x10", b"\0\x08\0\x08")
    assert recode(narrow) is None
    runs_of_one = write(flat, [Scan((0,)), Scan((0,), 1, 63, longest_run=1)])
    assert recode(replaced(runs_of_one, b"\0\x08\0\x10", b"\0\x08\0\x08")) is None  # 8 bits
    one_block = Picture(8, 8, SAMPLINGS["grey"], [np.zeros((1, 1, 64), np.int16)])
    assert recode(write(one_block, [Scan((0,)), Scan((0,), 1, 63)])) is not None


def test_runs_beyond_a_restart() -> None:
    two, three = (
        Picture(8 * n, 8, SAMPLINGS["grey"], [np.zeros((1, n, 64), np.int16)]) for n in (2, 3)
    )
    dc = write(two, [Scan((0,))], end=b"")

    def intervals_of_one(picture: Picture, restart_interval: int) -> bytes:
        """Its AC scan, of two intervals: each is given out as one of a block."""
        data = write(picture, [Scan((0,), 1, 63, restart_interval=restart_interval)])
        found = data[data.index(b"\xff\xdd") :]
        return found[:4] + b"\0\1" + found[6:]

    assert recode(dc + intervals_of_one(two, 1)) is not None
    assert recode(dc + intervals_of_one(three, 2)) is None


@pytest.mark.parametrize(("place", "accepted"), [(30, True), (31, False), (47, False), (63, False)])
def test_runs_beyond_the_band(place: int, accepted: bool) -> None:
    picture = Picture(8, 8, SAMPLINGS["grey"], [np.zeros((1, 1, 64), np.int16)])
    picture.components[0][0, 0, place] = 2
    data = write(picture, [Scan((0,)), Scan((0,), 1, place), Scan((0,), 31, 63)])
    # The first band is given out as one up to 30; its last symbol leads to `place`.
    data = replaced(data, bytes([1, 1, 0, 1, place, 0]), bytes([1, 1, 0, 1, 30, 0]))
    assert (recode(data) is not None) == accepted


@pytest.mark.parametrize(
    ("band", "bits", "accepted"),
    [
        ((1, 63), "01000001" + "1" + "00000000", True),
        ((1, 63), "01000010" + "00000000", False),
        ((1, 63), "01000010" + "11" + "00000000", False),
        ((1, 5), "01000001" + "1", True),
        ((1, 5), "01010001" + "1", False),
    ],
    ids=["one bit", "two bits left out", "two bits", "the band's last", "beyond the band"],
)
def test_new_coefficients_in_a_refinement(band: tuple[int, int], bits: str, accepted: bool) -> None:
    picture = Picture(8, 8, SAMPLINGS["grey"], [np.zeros((1, 1, 64), np.int16)])
    rest = [Scan((0,), band[1] + 1, 63)] if band[1] < 63 else []
    data = write(picture, [Scan((0,)), Scan((0,), *band, low=1), *rest, Scan((0,), *band, high=1)])
    assert data.endswith(b"\0" + EOI)  # the last scan's only symbol, an end of block
    assert (recode(data[:-3] + stuffed(bits) + EOI) is not None) == accepted


@pytest.mark.parametrize(
    ("table", "accepted"),
    [
        (b"\x10" + bytes([1]) + bytes(15) + b"\0", True),
        (b"\x10" + bytes([2]) + bytes(15) + b"\0\1", False),
        (b"\x10" + bytes([3]) + bytes(15) + b"\0\1\2", False),
        (b"\x00" + bytes([1, 1]) + bytes(14) + b"\0\x0f", True),
        (b"\x00" + bytes([1, 1]) + bytes(14) + b"\0\x10", False),
    ],
    ids=["one code", "a code of ones", "more codes than fit", "15 bits of DC", "16 bits of DC"],
)
def test_tables_that_are_none(table: bytes, accepted: bool) -> None:
    """Whether or not what is wrong with them is used: the only code in the scan is a bit, 0."""
    picture = Picture(8, 8, SAMPLINGS["grey"], [np.zeros((1, 1, 64), np.int16)])
    dc_bits, ac_bits = ("0", "00000000") if table[0] == 0 else ("0000", "0")
    data = frame_header(picture, 0xC2)
    data += scan_header(Scan((0,), before=segment(0xC4, table))) + stuffed(dc_bits)
    data += scan_header(Scan((0,), 1, 63, tables=False)) + stuffed(ac_bits) + EOI
    assert (recode(data) is not None) == accepted


@pytest.mark.parametrize(
    ("bits", "accepted"), [("00000000" + "0000" + "00000000", True), ("000100000" + "0000", False)]
)
def test_runs_of_ends_of_block_are_not_sequential(bits: str, accepted: bool) -> None:
    picture = Picture(16, 8, SAMPLINGS["4:4:4"], [np.zeros((1, 2, 64), np.int16)] * 3)
    data = write(picture, [Scan((c,), **SEQUENTIAL) for c in RGB], 0xC0)
    assert data.endswith(b"\0\0\0" + EOI)
    no_difference = "0000"
    assert (recode(data[:-5] + stuffed(no_difference + bits) + EOI) is not None) == accepted


@pytest.mark.parametrize(
    "scans",
    [
        [Scan((0,), **SEQUENTIAL), Scan((1,), **SEQUENTIAL)],
        [Scan((0, 1), **SEQUENTIAL), Scan((1, 2), **SEQUENTIAL)],
        [Scan((1, 0, 2), **SEQUENTIAL)],
        [Scan((0, 1), **SEQUENTIAL), Scan((2,), 0, 62)],
        [Scan((0, 1), **SEQUENTIAL), Scan((2,), 0, 63, low=1)],
        [Scan((0, 1), **SEQUENTIAL), Scan((2,), 1, 63)],
    ],
    ids=["a component left out", "one twice", "order", "cut band", "low bits", "no DC"],
)
def test_bad_sequential_scripts(scans: list[Scan]) -> None:
    assert recode(write(PICTURE, scans, 0xC0)) is None


@pytest.mark.parametrize(("value", "accepted"), [(1023, True), (-1023, True), (1024, False)])
@pytest.mark.parametrize("low", [0, 3])
def test_largest_ac(value: int, accepted: bool, low: int) -> None:
    picture = Picture(8, 8, SAMPLINGS["grey"], [np.zeros((1, 1, 64), np.int16)])
    picture.components[0][0, 0, 7] = value
    scans = [Scan((0,)), Scan((0,), 1, 63, low=low)]
    scans += [Scan((0,), 1, 63, high=high, low=high - 1) for high in range(low, 0, -1)]
    assert (recode(write(picture, scans)) is not None) == accepted


@pytest.mark.parametrize(("value", "accepted"), [(2047, True), (-2047, True), (2048, False)])
def test_largest_dc_difference(value: int, accepted: bool) -> None:
    picture = Picture(16, 8, SAMPLINGS["grey"], [np.zeros((1, 2, 64), np.int16)])
    picture.components[0][0, 1, 0] = value
    for scans in ([Scan((0,))], [Scan((0,), low=1), Scan((0,), high=1)]):
        data = write(picture, [*scans, Scan((0,), 1, 63)])
        assert (recode(data) is not None) == accepted


def test_dc_beyond_16_bits() -> None:
    picture = Picture(8, 8, SAMPLINGS["grey"], [np.zeros((1, 1, 64), np.int16)])
    refinements = [Scan((0,), high=low + 1, low=low) for low in range(12, -1, -1)]
    data = write(picture, [Scan((0,), low=13), *refinements, Scan((0,), 1, 63)])
    assert recode(data) is not None
    header, no_difference, eight = b"\x01\x01\x00\x00\x00\x0d", b"\x0f", stuffed("0100" + "1000")
    # 8 * 2**13 is 0 in 16 bits.
    assert recode(replaced(data, header + no_difference, header + eight)) is None


@pytest.mark.parametrize(("num_refined", "accepted"), [(36, True), (37, False)])
def test_at_most_100_scans(num_refined: int, accepted: bool) -> None:
    picture = random_picture(np.random.default_rng(8), 20, 20, SAMPLINGS["grey"])
    scans = [Scan((0,))]
    scans += [Scan((0,), k, k, low=1 if k <= num_refined else 0) for k in range(1, 64)]
    scans += [Scan((0,), k, k, high=1) for k in range(1, num_refined + 1)]
    assert len(scans) == 64 + num_refined
    assert (recode(write(picture, scans)) is not None) == accepted


def test_size_that_the_bytes_cannot_hold() -> None:
    """At once, and without memory for it: within Pillow's limit it would be a gigabyte."""
    data = write(PICTURE, EVERY_BAND)
    begin = time.process_time()
    for width, height in ((65500, 65500), (13000, 13000), (1, 65500), (65500, 1)):
        size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        assert recode(replaced(data, b"\0\x1b\0\x29", size)) is None
    assert time.process_time() - begin < 0.5


def test_what_is_accepted_after_random_damage_has_pillows_pixels() -> None:
    rng = np.random.default_rng(9)
    data = jpeg_bytes(photo_like(rng, 33, 21), quality=80, subsampling=2, progressive=True)
    accepted = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 3)):
            damaged[position] = rng.integers(0, 256)
        result = recode(bytes(damaged))
        if result is not None:
            accepted += 1
            assert pixels(result) == pixels(bytes(damaged))
    assert accepted > 100  # otherwise the test shows nothing
