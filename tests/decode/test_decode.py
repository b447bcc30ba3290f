"""The decode stage against its reference: Pillow's decoder and resize, torchvision's geometry."""

from __future__ import annotations

import dataclasses
import io
import platform
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from helpers.images import jpeg_bytes, photo_like
from helpers.jpeg_writer import EOI, JFIF, SOI, Jpeg, adobe, quant_table, segment
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from imagenet_seq import native
from imagenet_seq.native.recipe import Dtype, Filter, Geometry, Layout, Passes, Recipe

PASSES = Passes.PILLOW_13 if int(PIL.__version__.split(".")[0]) >= 13 else Passes.HORIZONTAL_FIRST
PILLOW_FILTERS = {
    Filter.BOX: Image.Resampling.BOX,
    Filter.BILINEAR: Image.Resampling.BILINEAR,
    Filter.BICUBIC: Image.Resampling.BICUBIC,
}
SAMPLINGS = {
    "444": ((1, 1), (1, 1), (1, 1)),
    "422": ((2, 1), (1, 1), (1, 1)),
    "420": ((2, 2), (1, 1), (1, 1)),
    "440": ((1, 2), (1, 1), (1, 1)),
    "411": ((4, 1), (1, 1), (1, 1)),
    "410": ((4, 2), (1, 1), (1, 1)),
    "441": ((1, 4), (1, 1), (1, 1)),
    "mixed": ((2, 2), (2, 1), (1, 2)),
    "luma smaller": ((1, 1), (2, 2), (1, 2)),
    "luma half": ((1, 1), (2, 1), (2, 1)),
    "grey": ((1, 1),),
    "grey 2x2": ((2, 2),),
}


def crop_recipe(
    top: int, left: int, height: int, width: int, out: tuple[int, int], **options: Any
) -> Recipe:
    return Recipe(
        geometry=Geometry.FIXED_CROP,
        out_height=out[0],
        out_width=out[1],
        passes=PASSES,
        layout=options.pop("layout", Layout.HWC),
        fixed_top=top,
        fixed_left=left,
        fixed_height=height,
        fixed_width=width,
        **options,
    )


def decode(recipe: Recipe, data: bytes, flags: int = 0) -> np.ndarray | None:
    """uint8 pixels as height x width x 3; None: python_blocks."""
    row = np.full((recipe.out_height, recipe.out_width, 3), 77, np.uint8)
    # Bytes that end where their memory ends: a sanitizer sees a read behind them.
    exact = np.frombuffer(data, np.uint8).copy()
    return row if native.decode(recipe, (0, 0, 0), exact, row.ctypes.data, flags) else None


def decode_all(data: bytes, *, strict: int = 1) -> np.ndarray | None:
    """The whole image as it is."""
    header = native.read_header(data)
    if header is None or not header.supported:
        out = (1, 1)
    else:
        out = (header.height, header.width)
    return decode(crop_recipe(0, 0, *out, out, strict=strict), data)


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def assert_as_pillow(data: bytes, what: object) -> None:
    pixels, expected = decode_all(data), by_pillow(data)
    assert pixels is not None, f"{what}: python_blocks"
    assert pixels.shape == expected.shape, what
    different = np.argwhere((pixels != expected).any(-1))
    assert not len(different), (
        f"{what}: {len(different)} pixels differ, first (y, x) {different[0]}"
    )


# ---- photos ------------------------------------------------------------------------------------


def test_photos_random_crops(photos: list[Path]) -> None:
    """20 crops of every photo, resized by the three filters, every other file decoded strictly."""
    generator = random.Random(7)
    torch.manual_seed(7)
    for number, path in enumerate(photos):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
        for i in range(20):
            scale, ratio = ([0.08, 1.0], [3 / 4, 4 / 3]) if i < 15 else ([0.001, 1.0], [0.1, 10.0])
            top, left, height, width = transforms.RandomResizedCrop.get_params(image, scale, ratio)
            flip = generator.random() < 0.5
            filter_ = (Filter.BILINEAR, Filter.BILINEAR, Filter.BICUBIC, Filter.BOX)[i % 4]
            recipe = crop_recipe(
                top,
                left,
                height,
                width,
                (224, 224),
                filter=filter_,
                fixed_flip=int(flip),
                strict=number % 2,
            )
            expected = image.crop((left, top, left + width, top + height)).resize(
                (224, 224), PILLOW_FILTERS[filter_]
            )
            if i % 4 == 0:  # the crop and resize that users run
                expected = functional.resized_crop(image, top, left, height, width, [224, 224])
            if flip:
                expected = functional.hflip(expected)
            pixels = decode(recipe, data)
            assert pixels is not None, f"{path}: python_blocks"
            assert np.array_equal(pixels, np.asarray(expected)), f"{path}: {recipe}"


def test_photos_validation_transform(photos: list[Path]) -> None:
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    recipe = Recipe(
        geometry=Geometry.RESIZE_CROP,
        out_height=224,
        out_width=224,
        passes=PASSES,
        layout=Layout.HWC,
        resize_height=256,
        crop_height=224,
        crop_width=224,
    )
    for path in photos:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(reference(image.convert("RGB")))
        pixels = decode(recipe, data)
        assert pixels is not None, f"{path}: python_blocks"
        assert np.array_equal(pixels, expected), path


# ---- what a baseline JPEG can be ---------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_small_sizes(sampling: str) -> None:
    """Upsampling at the edges: every width at some heights, every height at some widths."""
    sizes = {(w, h) for w in range(1, 41) for h in (1, 2, 3, 17)}
    sizes |= {(w, h) for h in range(1, 41) for w in (1, 2, 5, 16, 33)}
    rng = np.random.default_rng(1)
    for width, height in sorted(sizes):
        data = Jpeg(width, height, SAMPLINGS[sampling], rng=rng).data()
        assert_as_pillow(data, (sampling, width, height))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_all_sizes_by_pillow(subsampling: int) -> None:
    """Smooth images from an ordinary encoder, all sizes up to 24."""
    rng = np.random.default_rng(2)
    for width in range(1, 25):
        for height in range(1, 25):
            data = jpeg_bytes(photo_like(rng, width, height), subsampling=subsampling)
            assert_as_pillow(data, (width, height))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_crops_of_small_images(sampling: str) -> None:
    """A crop's pixels are the image's: the margins of upsampling, with and without restarts."""
    rng = np.random.default_rng(3)
    generator = random.Random(3)
    for restart_interval in (0, 1, 2, 3, 5, 7, 8, 17):
        width, height = generator.randint(30, 90), generator.randint(30, 90)
        data = Jpeg(width, height, SAMPLINGS[sampling], restart_interval, rng=rng).data()
        image = by_pillow(data)
        for i in range(60):
            top, left = generator.randrange(height), generator.randrange(width)
            size = generator.randint(1, height - top), generator.randint(1, width - left)
            recipe = crop_recipe(top, left, *size, size, strict=i % 2)
            pixels = decode(recipe, data, native.SAMPLE_CLEAN if i % 3 == 0 else 0)
            expected = image[top : top + size[0], left : left + size[1]]
            assert pixels is not None
            assert np.array_equal(pixels, expected), (restart_interval, top, left, size)


def test_restart_intervals() -> None:
    rng = np.random.default_rng(4)
    image = photo_like(rng, 123, 77)
    for interval in range(1, 18):
        for subsampling in (0, 2):
            options = {"restart_marker_blocks": interval, "subsampling": subsampling}
            assert_as_pillow(jpeg_bytes(image, **options), options)


def test_qualities_and_tables() -> None:
    rng = np.random.default_rng(5)
    images = [photo_like(rng, 64, 48), photo_like(rng, 48, 64).convert("L")]
    images.append(Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)))
    for quality in range(1, 101):
        for i, image in enumerate(images):
            options = {"quality": quality, "optimize": bool(quality % 2), "subsampling": i}
            assert_as_pillow(jpeg_bytes(image, **options), options)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 is the reference")
def test_arithmetic_out_of_range() -> None:
    """Products that leave 16 bits and sums that saturate, as libjpeg-turbo's x86 code has them."""
    rng = np.random.default_rng(6)
    for i in range(200):
        wide = i % 2 == 1
        quant = rng.integers(1, 65536 if wide else 256, 64).tolist()
        jpeg = Jpeg(
            40,
            24,
            amplitude=int(rng.integers(1, 4096)),
            dc_limit=int(rng.integers(1, 8192)),
            rng=rng,
        )
        jpeg.tables = quant_table(0, quant, wide=wide)
        if i % 5 == 0:
            jpeg.amplitude = 0  # DC only: its short cut wraps, too
        assert_as_pillow(jpeg.data(), i)


def test_wide_quant_tables() -> None:
    for value in (1, 8, 255, 256, 300):
        tables = quant_table(0, [value] * 64, wide=True)
        assert_as_pillow(Jpeg(33, 21, tables=tables).data(), value)


@pytest.mark.parametrize(
    ("head", "ids", "is_rgb"),
    [
        (segment(0xE0, JFIF), (), False),
        (b"", (), False),
        (b"", b"RGB", True),
        (b"", (0, 1, 2), False),
        (b"", (7, 200, 9), False),
        (adobe(0), (), True),
        (adobe(1), (), False),
        (adobe(1), b"RGB", False),
        (adobe(0), b"RGB", True),
        (segment(0xE0, JFIF) + adobe(0), b"RGB", False),
        (segment(0xE0, b"JFXX\0" + bytes(12)), b"RGB", True),
    ],
)
def test_colour_space(head: bytes, ids: Any, is_rgb: bool) -> None:
    """Which files are RGB, by libjpeg's rules; is_rgb: the reference itself is what we think."""
    data = Jpeg(20, 12, head=head, ids=ids, dc_limit=60).data()
    assert_as_pillow(data, (head, ids))
    as_ycc = by_pillow(Jpeg(20, 12, dc_limit=60).data())
    assert np.array_equal(by_pillow(data), as_ycc) != is_rgb


def test_grey_and_rgb_by_pillow() -> None:
    image = photo_like(np.random.default_rng(8), 50, 41)
    assert_as_pillow(jpeg_bytes(image.convert("L")), "grey")
    assert_as_pillow(jpeg_bytes(image, keep_rgb=True), "RGB")


def test_unusual_but_sound_files() -> None:
    plain = Jpeg(30, 20, SAMPLINGS["420"], restart_interval=2)
    tables, header, scan = plain.tables, plain.header(), plain.data()[len(plain.header()) :]
    bad_table = quant_table(0, [255] * 64)
    cases = {
        "fill bytes before markers": header.replace(b"\xff\xdb", b"\xff\xff\xff\xdb") + scan,
        "fill byte before SOS": header.replace(b"\xff\xda", b"\xff\xff\xda") + scan,
        "trailing garbage": header + scan + b"\xff\xd8 anything \xff\xd0",
        "another image behind": header + scan + header + scan,
        "comment": SOI + segment(0xFE, b"hello \xff\xd9") + header[2:] + scan,
        "application data": SOI + segment(0xE5, b"\xff\xda" * 40) + header[2:] + scan,
        "table redefined": SOI + bad_table + header[2:] + scan,
        "table behind the frame": dataclasses.replace(plain, before_scan=tables).data(),
        "SOF1": dataclasses.replace(plain, frame=0xC1).data(),
        "DRI changed to 0": dataclasses.replace(
            plain,
            restart_interval=0,
            head=plain.head + segment(0xDD, b"\0\3"),
            before_scan=segment(0xDD, b"\0\0"),
        ).data(),
        "DRI changed to 2": dataclasses.replace(plain, head=segment(0xDD, b"\1\0")).data(),
    }
    for name, data in cases.items():
        assert_as_pillow(data, name)


def test_multi_picture_file() -> None:
    """MPO: the first image counts."""
    rng = np.random.default_rng(9)
    first, second = photo_like(rng, 40, 30), photo_like(rng, 40, 30)
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    with Image.open(buffer) as image:
        assert image.format == "MPO"
    assert_as_pillow(buffer.getvalue(), "MPO")


def test_python_files() -> None:
    image = photo_like(np.random.default_rng(10), 40, 30)
    png = io.BytesIO()
    image.save(png, "PNG")
    plain = Jpeg(24, 16)
    cases = {
        "CMYK": jpeg_bytes(image.convert("CMYK")),
        "progressive": jpeg_bytes(image, progressive=True),
        "12 bit": dataclasses.replace(plain, precision=12).data(),
        "arithmetic": dataclasses.replace(plain, frame=0xC9).data(),
        "height 0": dataclasses.replace(plain, height=0).header() + plain.data()[-40:],
        "Adobe transform 2": dataclasses.replace(plain, head=adobe(2)).data(),
        "fractional sampling": Jpeg(24, 16, ((3, 1), (2, 1), (1, 1))).data(),
        "MCU of 12 blocks": Jpeg(64, 64, ((4, 2), (2, 1), (1, 2))).data(),
        "component twice": dataclasses.replace(plain, ids=(1, 2, 2)).data(),
        "PNG": png.getvalue(),
        "empty": b"",
        "SOI": SOI,
        "SOI EOI": SOI + EOI,
    }
    for name, data in cases.items():
        assert decode_all(data) is None, name
    header = native.read_header(cases["progressive"])
    assert header is not None
    assert (header.width, header.height, header.num_components) == (40, 30, 3)
    assert header.progressive
    assert not header.supported
    header = native.read_header(cases["CMYK"])
    assert header is not None
    assert (header.num_components, header.supported) == (4, 0)
    assert native.read_header(cases["PNG"]) is None
    assert native.read_header(b"") is None


def test_header_of_a_baseline_file() -> None:
    jpeg = Jpeg(123, 45, SAMPLINGS["420"], restart_interval=7)
    header = native.read_header(jpeg.data())
    assert header is not None
    assert (header.width, header.height, header.supported, header.progressive) == (123, 45, 1, 0)
    assert list(header.h_sampling) == [2, 1, 1, 0]
    assert list(header.v_sampling) == [2, 1, 1, 0]
    assert header.restart_interval == 7
    assert header.entropy_offset == len(jpeg.header())


def test_max_pixels() -> None:
    data = jpeg_bytes(photo_like(np.random.default_rng(11), 40, 30))
    assert decode(crop_recipe(0, 0, 30, 40, (8, 8), max_pixels=1200), data) is not None
    assert decode(crop_recipe(0, 0, 30, 40, (8, 8), max_pixels=1199), data) is None


# ---- damage ------------------------------------------------------------------------------------


def test_truncated_files() -> None:
    """However short a file is cut, it is python_blocks, with every way of checking."""
    for restart_interval in (0, 3):
        jpeg = Jpeg(60, 50, SAMPLINGS["420"], restart_interval)
        data = jpeg.data()
        corner = crop_recipe(0, 0, 8, 8, (8, 8))
        assert decode(corner, data) is not None
        for size in range(len(data)):
            assert decode_all(data[:size]) is None, size
            assert decode_all(data[:size], strict=0) is None, size
            assert decode(corner, data[:size]) is None, size


def test_restart_markers_must_be_right() -> None:
    jpeg = Jpeg(64, 64, restart_interval=4)
    data, at = jpeg.data(), len(jpeg.header())
    second = data.index(b"\xff\xd1", at)
    corner = crop_recipe(0, 0, 8, 8, (8, 8))
    damaged = {
        "wrong number": data[:second] + b"\xff\xd2" + data[second + 2 :],
        "missing": data[:second] + data[second + 2 :],
        "twice": data[:second] + b"\xff\xd1" + data[second:],
        "one too many": data[:-2] + b"\xff\xd0\xff\xd9",
        "a stray marker": data[:second] + b"\xff\xfe" + data[second + 2 :],
        "end too early": data[:second] + EOI + data[second:],
        "a byte too many": data[:second] + b"\x55" + data[second:],
        "a byte too few": data[: second - 1] + data[second:],
    }
    assert decode(corner, data) is not None
    for name, bytes_ in damaged.items():
        assert decode_all(bytes_) is None, name
        if (
            "a byte" not in name
        ):  # those are damage outside the crop, which only strict decoding sees
            assert decode(corner, bytes_) is None, name


def test_metadata_that_pillow_refuses() -> None:
    """Damage in application segments that matter to Pillow alone."""
    rest = Jpeg(16, 16, head=b"").data()[2:]
    segments = {
        "JFIF too short": segment(0xE0, b"JFIF\0"),
        "Adobe too short": segment(0xEE, b"Adobe"),
        "ICC without number": segment(0xE2, b"ICC_PROFILE\0"),
        "Photoshop block without name": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    }
    assert_as_pillow(SOI + rest, "no metadata")
    for name, damaged in segments.items():
        with pytest.raises(PIL.UnidentifiedImageError):
            by_pillow(SOI + damaged + rest)
        assert decode_all(SOI + damaged + rest) is None, name
    sound = segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\2ab8BIM\4\4\3abc\0\0\0\1x\0")
    assert_as_pillow(SOI + sound + rest, "Photoshop blocks")


def mutations(generator: random.Random, seeds: list[bytes]) -> Iterator[bytes]:
    while True:
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.choice([1, 1, 2, 4])):
            at = generator.randrange(len(data))
            if generator.random() < 0.5:  # the header is short, but most can go wrong there
                at = generator.randrange(min(len(data), 650))
            kind = generator.randrange(7)
            if kind <= 1:
                data[at] ^= 1 << generator.randrange(8)
            elif kind == 2:
                data[at] = generator.choice(
                    [0, 0xFF, 0xD0, 0xD9, 0xDA, 0xC4, generator.randrange(256)]
                )
            elif kind == 3:
                del data[at : at + generator.randint(1, 12)]
            elif kind == 4:
                data[at:at] = generator.choice(
                    [b"\xff", b"\xff\xd0", b"\xff\xd9", b"\xff\0", b"\x12"]
                )
            elif kind == 5:
                other = generator.choice(seeds)
                data[at:] = other[generator.randrange(len(other)) :]
            else:
                data[at:] = b""
            if not data:
                break
        yield bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_pillows_or_python() -> None:
    """Whatever the core decodes, Pillow decodes too, to the same pixels."""
    rng = np.random.default_rng(12)
    seeds = []
    for i in range(24):
        image = photo_like(rng, int(rng.integers(1, 60)), int(rng.integers(1, 60)))
        options: dict[str, Any] = {"quality": int(rng.integers(30, 100)), "optimize": i % 2 == 0}
        if i % 3 == 0:
            options["restart_marker_blocks"] = int(rng.integers(1, 6))
        if i % 6 == 1:
            image = image.convert("L")
        seeds.append(jpeg_bytes(image, **options, subsampling=i % 3))
    num_decoded = 0
    source = mutations(random.Random(12), seeds)
    for _ in range(3000):
        data = next(source)
        header = native.read_header(data)
        if header is not None and header.width * header.height > 1_000_000:
            continue
        pixels = decode_all(data)
        if pixels is None:
            continue
        num_decoded += 1
        try:
            expected = by_pillow(data)
        except Exception as error:
            pytest.fail(f"the core decodes what Pillow refuses ({error}): {data!r}")
        assert np.array_equal(pixels, expected), data
    assert num_decoded > 300  # otherwise the mutations test nothing


# ---- geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("filter_", PILLOW_FILTERS)
def test_resize_of_extreme_shapes(filter_: Filter) -> None:
    rng = np.random.default_rng(13)
    shapes = [(1, 1), (1, 4000), (5000, 3), (65500, 1), (2, 3), (7, 700), (224, 500), (500, 224)]
    for width, height in shapes:
        data = Jpeg(width, height, ((1, 1),), rng=rng).data()
        image = Image.fromarray(by_pillow(data))
        for out_width, out_height in [(224, 224), (1, 1), (3, 5), (500, 2), (width, 9)]:
            recipe = crop_recipe(0, 0, height, width, (out_height, out_width), filter=filter_)
            expected = np.asarray(image.resize((out_width, out_height), PILLOW_FILTERS[filter_]))
            pixels = decode(recipe, data)
            assert pixels is not None
            assert np.array_equal(pixels, expected), (width, height, out_width, out_height)


def test_resize_of_random_shapes() -> None:
    """Both orders of the passes occur, up and down, equal sizes included."""
    rng = np.random.default_rng(14)
    for _ in range(400):
        width, height, out_width, out_height = (int(v) for v in rng.integers(1, 120, 4))
        if rng.random() < 0.2:
            out_width = width
        if rng.random() < 0.2:
            out_height = height
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        for filter_, pillow_filter in PILLOW_FILTERS.items():
            recipe = crop_recipe(0, 0, height, width, (out_height, out_width), filter=filter_)
            row = np.empty((out_height, out_width, 3), np.uint8)
            assert native.apply(recipe, (0, 0, 0), pixels, row.ctypes.data)
            expected = Image.fromarray(pixels).resize((out_width, out_height), pillow_filter)
            assert np.array_equal(row, np.asarray(expected)), recipe


@pytest.mark.parametrize("resize", [None, 40, 256, (50, 70)])
def test_resize_and_center_crop(resize: int | tuple[int, int] | None) -> None:
    """Windows inside and, padded with zeros, around the resized image."""
    rng = np.random.default_rng(15)
    for width, height in [(1, 1), (10, 300), (300, 10), (41, 40), (224, 223), (130, 97)]:
        image = photo_like(rng, width, height)
        data = jpeg_bytes(image)
        steps = [] if resize is None else [transforms.Resize(resize)]
        for crop in [(32, 32), (51, 20), (224, 224), (1, 1)]:
            with Image.open(io.BytesIO(data)) as file:
                reference = transforms.Compose([*steps, transforms.CenterCrop(crop)])
                expected = np.asarray(reference(file.convert("RGB")))
            sides = (resize, 0) if isinstance(resize, int) else resize or (0, 0)
            recipe = Recipe(
                geometry=Geometry.RESIZE_CROP,
                out_height=crop[0],
                out_width=crop[1],
                passes=PASSES,
                layout=Layout.HWC,
                resize_height=sides[0],
                resize_width=sides[1],
                crop_height=crop[0],
                crop_width=crop[1],
            )
            pixels = decode(recipe, data)
            assert pixels is not None
            assert np.array_equal(pixels, expected), (width, height, resize, crop)


# ---- output formats ----------------------------------------------------------------------------

DTYPES = {
    Dtype.UINT8: torch.uint8,
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
}


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", Dtype)
def test_output_formats(dtype: Dtype, layout: Layout, grey: bool) -> None:
    """Every dtype and layout, with and without a flip, through a table of arbitrary bits."""
    rng = np.random.default_rng(16)
    image = photo_like(rng, 61, 47)
    data = jpeg_bytes(image.convert("L") if grey else image)
    table = None
    if dtype is not Dtype.UINT8:
        values = torch.from_numpy(rng.normal(size=(3, 256)).astype(np.float32)).to(DTYPES[dtype])
        table = values.view(torch.uint8).numpy().reshape(3, -1)
    for flip in (0, 1):
        options = {"dtype": dtype, "layout": layout, "fixed_flip": flip}
        recipe = crop_recipe(3, 4, 40, 50, (32, 27), table=table, **options)
        shape = (3, 32, 27) if layout is Layout.CHW else (32, 27, 3)
        row = torch.zeros(shape, dtype=DTYPES[dtype])
        assert native.decode(recipe, (0, 0, 0), data, row.data_ptr())
        expected = torch.from_numpy(decode(crop_recipe(3, 4, 40, 50, (32, 27)), data))
        expected = expected.permute(2, 0, 1)
        if flip:
            expected = expected.flip(-1)
        if table is not None:
            expected = torch.stack([values[c][expected[c].long()] for c in range(3)])
        if layout is Layout.HWC:
            expected = expected.permute(1, 2, 0)
        assert torch.equal(row, expected)


def test_apply_equals_decode() -> None:
    """Pixels that Pillow decoded take the same way as the core's own, random draws included."""
    data = jpeg_bytes(photo_like(np.random.default_rng(17), 140, 120))
    pixels = by_pillow(data)
    recipe = Recipe(
        geometry=Geometry.RANDOM_RESIZED_CROP,
        out_height=48,
        out_width=40,
        passes=PASSES,
        scale_min=0.08,
        scale_max=1.0,
        ratio_min=0.75,
        ratio_max=4 / 3,
        flip_probability=0.5,
    )
    rows = np.zeros((2, 3, 48, 40), np.uint8)
    results = []
    for sample in range(50):
        key = (1, 2, sample)
        assert native.decode(recipe, key, data, rows[0].ctypes.data)
        assert native.apply(recipe, key, pixels, rows[1].ctypes.data)
        assert np.array_equal(rows[0], rows[1]), sample
        results.append(rows[0].tobytes())
    assert len(set(results)) == 50


def test_a_decoder_keeps_nothing_from_image_to_image() -> None:
    """One thread decodes large and small, grey and colour, with equal and other tables in turn."""
    rng = np.random.default_rng(18)
    files = []
    for i, (width, height) in enumerate([(200, 150), (9, 9), (64, 300), (31, 17), (1, 1)]):
        image = photo_like(rng, width, height)
        files.append(jpeg_bytes(image, subsampling=i % 3, optimize=i % 2 == 0))
        files.append(jpeg_bytes(image.convert("L"), quality=30))
    for _ in range(40):
        assert_as_pillow(files[int(rng.integers(len(files)))], "repeated")


def test_crc32c() -> None:
    """RFC 3720 appendix B.4, and a checksum in parts."""
    assert native.crc32c(b"") == 0
    assert native.crc32c(bytes(32)) == 0x8A9136AA
    assert native.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert native.crc32c(bytes(range(32))) == 0x46DD794E
    assert native.crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert native.crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(19).bytes(1000)
    for cut in range(0, 40):
        assert native.crc32c(data[cut:], native.crc32c(data[:cut])) == native.crc32c(data)
        assert native.crc32c(memoryview(data)[cut:]) == native.crc32c(data[cut:])


def test_wrong_arguments_are_refused() -> None:
    data = Jpeg(8, 8).data()
    row = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="filter"):
        native.decode(crop_recipe(0, 0, 8, 8, (8, 8), filter=9), (0, 0, 0), data, row.ctypes.data)
