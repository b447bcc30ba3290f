"""Write the corpus that fuzzing starts from and that tests replay: small JPEGs of every kind.

Usage: python tests/fuzz/corpus.py FOLDER

Writes FOLDER/header, FOLDER/decode and FOLDER/transcode, inputs of the targets beside this file.
The same NumPy and Pillow write the same bytes.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.jpeg_writer import (
    AC_SYMBOLS,
    DC_SYMBOLS,
    EOI,
    FLAT_AC,
    FLAT_DC,
    JFIF,
    SOI,
    Code,
    Jpeg,
    adobe,
    quant_table,
    segment,
    stuffed,
)

# As tests/fuzz/fuzz.h has them.
OPTION_BYTES = 32
SEPARATOR = b"|next|"
MAX_GROUP = 8

SAMPLINGS = {
    "444": ((1, 1), (1, 1), (1, 1)),
    "422": ((2, 1), (1, 1), (1, 1)),
    "420": ((2, 2), (1, 1), (1, 1)),
    "440": ((1, 2), (1, 1), (1, 1)),
    "411": ((4, 1), (1, 1), (1, 1)),
    "410": ((4, 2), (1, 1), (1, 1)),
    "441": ((1, 4), (1, 1), (1, 1)),
    "mixed": ((2, 2), (2, 1), (1, 2)),
    "luma-smaller": ((1, 1), (2, 2), (1, 2)),
    "grey": ((1, 1),),
    "grey-2x2": ((2, 2),),
}

# The most frequent symbols have the longest codes, so that decoders leave their look-up tables.
_RARE_DC, _RARE_AC = DC_SYMBOLS[::-1], AC_SYMBOLS[::-1]
LONG_DC = Code({n: _RARE_DC[n - 1 : n] for n in range(1, 17)})
LONG_AC = Code({n: _RARE_AC[n - 1 : n] for n in range(1, 9)} | {16: _RARE_AC[8:]})
# Short codes for what is frequent and 12 bits at most, as in tables for a whole pack.
PACK_DC = Code({2: DC_SYMBOLS[:2], 3: DC_SYMBOLS[2:4], 4: DC_SYMBOLS[4:6], 7: DC_SYMBOLS[6:]})
_FIRST_AC = bytes([0x01, 0x00, 0x02, 0x11, 0x03, 0x12, 0x21])
PACK_AC = Code(
    {
        2: _FIRST_AC[:2],
        3: _FIRST_AC[2:3],
        4: _FIRST_AC[3:5],
        5: _FIRST_AC[5:],
        12: bytes(symbol for symbol in AC_SYMBOLS if symbol not in _FIRST_AC),
    }
)
LIBJPEG_TABLES = {"444": 0, "422": 1, "420": 2}


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours with some noise and an edge."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 90 * np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.05, 0.6, (3, 3))]
    pixels = np.stack(planes, -1) + rng.normal(0, 8, (height, width, 3))
    pixels[height // 3 :, width // 2 :] += 60
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _unbalanced_symbols() -> bytes:
    """A scan to which a Huffman code of unlimited length would give codes of more than 16 bits.

    Symbols occur as often as Fibonacci's numbers say, so that a tree of them has one on each level.
    """
    counts = [2584, 1597, 987, 610, 377, 233, 144, 89, 55, 34, 21, 13, 8, 5, 3, 2, 1, 1]
    num_blocks = 144  # and ends of a block
    symbols = [*range(0x01, 0x0B), *(run << 4 | 1 for run in range(1, 8))]
    left = dict(zip(symbols, (n for n in counts if n != num_blocks), strict=True))
    ac = Code({n: bytes([n - 1]) for n in range(1, 12)} | {16: bytes(symbols[10:])})
    bits = []
    for _ in range(num_blocks):
        bits.append(FLAT_DC.bits[0])
        index = 0
        for symbol in reversed(symbols):
            run, size = symbol >> 4, symbol & 15
            while left[symbol] and index + run + 1 < 63:
                left[symbol] -= 1
                index += run + 1
                bits.append(ac.bits[symbol] + "1" * size)
        bits.append(ac.bits[0x00])
    assert not any(left.values())
    return Jpeg(96, 96, ((1, 1),), ac_code=ac).header() + stuffed("".join(bits)) + EOI


def valid_streams() -> dict[str, bytes]:
    """Streams without an anomaly, in the scope of the core's decoder."""
    rng = np.random.default_rng(1)
    streams = {}
    for name, sampling in SAMPLINGS.items():
        for width, height in ((1, 1), (2, 3), (9, 17), (16, 16), (40, 33), (150, 9), (9, 150)):
            jpeg = Jpeg(width, height, sampling, rng=rng)
            streams[f"{name}-{width}x{height}"] = jpeg.data()
        for interval in (1, 2, 3, 8):
            jpeg = Jpeg(40, 37, sampling, interval, rng=rng)
            streams[f"{name}-every-{interval}"] = jpeg.data()
        codes = {"pack": (PACK_DC, PACK_AC), "long": (LONG_DC, LONG_AC)}
        for kind, (dc, ac) in codes.items():
            for interval in (0, 2, 8):
                jpeg = Jpeg(35, 38, sampling, interval, rng=rng, dc_code=dc, ac_code=ac)
                streams[f"{name}-{kind}-codes-{interval}"] = jpeg.data()
        streams[f"{name}-full"] = Jpeg(17, 9, sampling, rng=rng, full=True).data()
    for name, subsampling in LIBJPEG_TABLES.items():
        for optimize in (False, True):
            image = _picture(rng, 40, 34)
            streams[f"pillow-{name}-{'own' if optimize else 'standard'}"] = _encoded(
                image, quality=80, subsampling=subsampling, optimize=optimize
            )
    canonical = {"quality": 85, "optimize": True, "restart_marker_blocks": 8}
    for width, height in ((40, 40), (96, 64)):
        streams[f"canonical-{width}x{height}"] = _encoded(_picture(rng, width, height), **canonical)
    streams["rgb"] = Jpeg(20, 20, head=adobe(0), rng=rng).data()
    streams["rgb-ids"] = Jpeg(20, 20, head=b"", ids=(82, 71, 66), rng=rng).data()
    streams["adobe-ycc"] = Jpeg(20, 20, head=adobe(1), rng=rng).data()
    streams["wide-tables"] = Jpeg(
        20, 20, tables=quant_table(0, range(200, 8200, 125), wide=True), frame=0xC1, rng=rng
    ).data()
    streams["out-of-range"] = Jpeg(
        24, 24, tables=quant_table(0, [255] * 64), rng=rng, amplitude=1000, dc_limit=1000
    ).data()
    streams["greatest-values"] = Jpeg(
        16, 16, rng=rng, amplitude=16000, dc_limit=16000, full=True, dc_code=LONG_DC
    ).data()
    streams["dc-only"] = Jpeg(33, 20, SAMPLINGS["420"], 2, rng=rng, amplitude=0).data()
    streams["large-dc-differences"] = Jpeg(64, 8, rng=rng, amplitude=0, dc_limit=1023).data()
    streams["dri-0"] = Jpeg(20, 20, rng=rng, before_scan=segment(0xDD, b"\0\0")).data()
    streams["dri-twice"] = Jpeg(
        20, 20, rng=rng, before_scan=segment(0xDD, b"\0\1") + segment(0xDD, b"\0\0")
    ).data()
    streams["fill-bytes"] = Jpeg(20, 20, rng=rng, before_scan=b"\xff" * 5).data()
    streams["tables-again"] = Jpeg(
        20, 20, rng=rng, before_scan=LONG_DC.segment(0) + FLAT_DC.segment(0)
    ).data()
    streams["behind-the-end"] = Jpeg(20, 20, rng=rng, tail=b"tail\xff\xd8\xff\xd9").data()
    ones = FLAT_DC.bits[0] + (FLAT_AC.bits[0x0A] + "1" * 10) * 63
    streams["stuffed-bytes"] = Jpeg(16, 16, ((1, 1),)).header() + stuffed(ones * 4) + EOI
    streams["unbalanced-symbols"] = _unbalanced_symbols()
    no_orientation = segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x0f\1\2\0\4\0\0\0who\0\0\0\0\0")
    streams["no-orientation"] = Jpeg(9, 9, head=no_orientation, rng=rng).data()
    metadata = segment(0xE0, JFIF) + segment(0xFE, b"a comment")
    metadata += segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    metadata += segment(0xE2, b"ICC_PROFILE\0\1\1profile")
    metadata += segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\2ab")
    streams["metadata"] = Jpeg(20, 20, head=metadata, rng=rng).data()
    return streams


def doubtful_streams() -> dict[str, bytes]:
    """Valid JPEGs in canonical form, but the sizes of their intervals in APP9 may be wrong."""
    rng = np.random.default_rng(5)
    jpeg = Jpeg(60, 41, SAMPLINGS["420"], 2, rng=rng, dc_code=PACK_DC, ac_code=PACK_AC)
    intervals = jpeg.intervals()
    scan = intervals[0]
    for i, interval in enumerate(intervals[1:]):
        scan += bytes([0xFF, 0xD0 + i % 8]) + interval
    true = [len(interval) + 2 for interval in intervals]
    lists = {
        "true": true,
        "none": [],
        "too-few": true[:-1],
        "too-many": [*true, 9],
        "swapped": [true[1], true[0], *true[2:]],
        "zero": [0] * len(true),
        "one": [1] * len(true),
        "small": [2] * len(true),
        "large": [0xFFFF] * len(true),
        "first-large": [0xFFFF, *true[1:]],
        "last-large": [*true[:-1], 0xFFFF],
        "one-off": [true[0] + 1, true[1] - 1, *true[2:]],
    }
    streams = {}
    for name, sizes in lists.items():
        payload = b"imseq\0" + b"".join(size.to_bytes(2, "big") for size in sizes)
        jpeg.before_scan = segment(0xE9, payload)
        streams[f"sizes-{name}"] = jpeg.header() + scan + EOI
    jpeg.before_scan = segment(0xE9, payload[:-1])
    streams["sizes-half-a-number"] = jpeg.header() + scan + EOI
    return streams


def _grey_block(bits: str) -> bytes:
    return Jpeg(8, 8, ((1, 1),)).header() + stuffed(bits) + EOI


def damaged_streams() -> dict[str, bytes]:
    """Streams with a header in scope and an anomaly behind it: the core must give them up."""
    rng = np.random.default_rng(2)
    jpeg = Jpeg(40, 33, SAMPLINGS["420"], 2, rng=rng)
    header, intervals = jpeg.header(), jpeg.intervals()

    def joined(parts: list[bytes], order: list[int] | None = None) -> bytes:
        numbers = order or [i % 8 for i in range(len(parts) - 1)]
        scan = parts[0]
        for number, part in zip(numbers, parts[1:], strict=True):
            scan += bytes([0xFF, 0xD0 + number]) + part
        return header + scan + EOI

    assert len(intervals) == 5
    whole, restart = joined(intervals), b"\xff\xd0"
    streams = {f"cut-{n}": whole[:n] for n in range(len(header), len(whole), 23)}
    streams |= {
        "no-end-marker": whole[:-2],
        "half-an-end-marker": whole[:-1],
        "restarts-swapped": joined(intervals, [0, 2, 1, 3]),
        "restarts-from-1": joined(intervals, [1, 2, 3, 4]),
        "interval-missing": joined(intervals[:-1]),
        "interval-empty": joined([*intervals[:2], b"", *intervals[3:]]),
        "interval-twice": joined([*intervals, intervals[0]]),
        "comment-within": whole.replace(restart, segment(0xFE, b"words") + restart),
        "number-of-lines-within": whole.replace(
            b"\xff\xd0", segment(0xDC, b"\0\x21") + b"\xff\xd0"
        ),
        "end-marker-early": whole.replace(b"\xff\xd1", EOI),
        "bytes-before-the-end": whole[:-2] + b"\x55" * 4 + EOI,
    }
    one = FLAT_AC.bits[0x01] + "1"
    dc, end = FLAT_DC.bits[0], FLAT_AC.bits[0x00]
    streams |= {
        "runs-beyond-the-block": _grey_block(dc + FLAT_AC.bits[0xF0] * 4 + end),
        "value-beyond-the-block": _grey_block(dc + one * 60 + FLAT_AC.bits[0xF1] + "1" + end),
        "run-and-no-end": _grey_block(dc + FLAT_AC.bits[0xF0] * 3),
        "no-such-code": _grey_block(dc + "1" * 48),
        "dc-sum-beyond-16-bits": Jpeg(16, 8, ((1, 1),)).header()
        + stuffed((FLAT_DC.bits[15] + "1" * 15 + end) * 2)
        + EOI,
        "symbol-of-no-meaning": Jpeg(8, 8, ((1, 1),), ac_code=Code({1: b"\x10", 2: b"\0"})).header()
        + stuffed(dc + "0" * 10)
        + EOI,
        "nothing": header + EOI,
        "huge": Jpeg(65500, 65500, ((1, 1),)).header() + stuffed("0" * 64) + EOI,
    }
    return streams


def pillow_streams() -> dict[str, bytes]:
    """What Pillow decides: out of the core's scope, or no JPEG."""
    rng = np.random.default_rng(3)
    image = _picture(rng, 40, 34)
    png = io.BytesIO()
    image.save(png, "PNG")
    ordinary = Jpeg(20, 20, rng=rng)
    data = ordinary.data()
    streams = {f"no-header-{n}": data[:n] for n in (0, 1, 2, 4, 20, 40, 100, 300)}
    return streams | {
        "progressive-420": _encoded(image, quality=80, progressive=True),
        "progressive-444": _encoded(image, quality=90, progressive=True, subsampling=0),
        "progressive-grey": _encoded(image.convert("L"), progressive=True),
        "progressive-every-3": _encoded(image, progressive=True, restart_marker_blocks=3),
        "four-components": _encoded(image.convert("CMYK")),
        "png": png.getvalue(),
        "twelve-bits": Jpeg(20, 20, precision=12, frame=0xC1, rng=rng).data(),
        "arithmetic": Jpeg(20, 20, frame=0xC9, rng=rng).data(),
        "no-height": Jpeg(20, 0).header() + stuffed("0" * 64) + EOI,
        "not-integral": Jpeg(20, 20, ((3, 1), (2, 1), (1, 1)), rng=rng).data(),
        "adobe-transform-2": Jpeg(20, 20, head=adobe(2), rng=rng).data(),
        "sampling-0": Jpeg(8, 8, ((0, 1),)).header() + EOI,
        "unknown-segment": Jpeg(8, 8, head=segment(0xF0, b"?"), rng=rng).data(),
        "no-tables": SOI + data[data.index(b"\xff\xc0") :],
        "photoshop-cut": Jpeg(
            20, 20, head=segment(0xED, b"Photoshop 3.0\x008BIM\4\4"), rng=rng
        ).data(),
    }


def short_segments() -> dict[str, bytes]:
    """Headers that end with a segment too short for what it should hold."""
    segments = {
        "dqt": quant_table(0, [1] * 64),
        "dqt-wide": quant_table(0, [1] * 64, wide=True),
        "dht": PACK_DC.segment(0),
        "sof": segment(0xC0, b"\x08\0\1\0\1\1\1\x11\0"),
        "dri": segment(0xDD, b"\0\1"),
        "jfif": segment(0xE0, JFIF),
        "adobe": adobe(1),
        "exif": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0"),
        "icc": segment(0xE2, b"ICC_PROFILE\0\1\1"),
        "photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\2ab"),
    }
    frame = segments["sof"]
    segments["sos"] = segment(0xDA, b"\1\1\0\0\x3f\0")
    streams = {}
    for name, whole in segments.items():
        payload = whole[4:]
        for n in {*range(min(len(payload), 34)), len(payload) - 1}:
            head = SOI + (frame if name == "sos" else b"")
            streams[f"{name}-of-{n}"] = head + segment(whole[1], payload[:n])
    return streams


def streams() -> dict[str, bytes]:
    """All of them; names begin with valid, doubtful, damaged or python_blocks."""
    kinds = {
        "valid": valid_streams(),
        "doubtful": doubtful_streams(),
        "damaged": damaged_streams(),
        "pillow": pillow_streams(),
    }
    return {f"{kind}-{name}": data for kind, each in kinds.items() for name, data in each.items()}


def inputs() -> dict[str, dict[str, bytes]]:
    """Inputs of each target: streams, or groups of them, and the options behind them."""
    rng = np.random.default_rng(4)
    all_streams = streams()

    def with_options(data: bytes) -> bytes:
        return data + rng.bytes(OPTION_BYTES)

    single = {name: with_options(data) for name, data in all_streams.items()}
    again = {f"{name}-again": with_options(data) for name, data in all_streams.items()}
    small = [data for data in all_streams.values() if len(data) < 700]
    groups = {}
    for i in range(60):
        parts = [small[k] for k in rng.integers(0, len(small), 2 + i % (MAX_GROUP - 1))]
        groups[f"group-{i}"] = with_options(SEPARATOR.join(parts))
    # Many recipes are drawn for images of a few shapes.
    shapes = [Jpeg(*size).header() for size in ((1, 1), (500, 375), (9, 4000), (65500, 2))]
    draws = {f"draw-{i}": with_options(shapes[i % len(shapes)]) for i in range(400)}
    short = {name: with_options(data) for name, data in short_segments().items()}
    return {
        "header": {"empty": b"", **single, **draws, **short},
        "decode": {"empty": b"", **single, **again, **groups},
        "transcode": {"empty": b"", **single, **again},
    }


def write(folder: Path) -> int:
    """Write the corpus in place of an older one; returns the number of files."""
    num_files = 0
    for target, files in inputs().items():
        shutil.rmtree(folder / target, ignore_errors=True)
        (folder / target).mkdir(parents=True)
        for name, data in files.items():
            (folder / target / name).write_bytes(data)
            num_files += 1
    return num_files


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    print(f"{write(Path(sys.argv[1]))} files in {sys.argv[1]}")
