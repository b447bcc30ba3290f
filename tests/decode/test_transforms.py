"""Transforms: what runs in the core, what in Python, and that both give what torchvision gives."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from helpers.images import jpeg_bytes, photo_like
from PIL import Image, ImageFile
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

from imagenet_seq import native
from imagenet_seq.decode.pipeline import Pipeline
from imagenet_seq.decode.transforms import interpret, pass_order
from imagenet_seq.native.recipe import Center, Key, Layout, Passes, Recipe, Rows

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGES = [
    photo_like(np.random.default_rng(i), width, height)
    for i, (width, height) in enumerate([(190, 141), (90, 160), (301, 64), (40, 33), (1, 50)])
]


def core_row(pipeline: Pipeline, image: Image.Image, key: Key, recipe: Recipe | None = None) -> Any:
    """The row that the core writes, as the tensor that a batch shows."""
    recipe = recipe or pipeline.recipe
    assert pipeline.out_shape is not None
    _, height, width = pipeline.out_shape
    is_hwc = recipe.layout == Layout.HWC
    dtype = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)[recipe.dtype]
    memory = torch.empty((height, width, 3) if is_hwc else (3, height, width), dtype=dtype)
    assert native.apply(recipe, key, np.asarray(image), memory.data_ptr())
    return memory.permute(2, 0, 1) if is_hwc else memory


def members_of(transform: Any) -> list[Any]:
    return list(getattr(transform, "transforms", None) or transform)


def torchvision_result(transform: Any, image: Image.Image, view: native.View) -> Any:
    """torchvision's own result where its random members do what the view says."""
    value: Any = image
    flips = [view.flip]  # the view holds the outcome of all flips together
    for member in members_of(transform):
        name = type(member).__name__
        if name == "RandomResizedCrop":
            box = (view.top, view.left, view.height, view.width)
            value = F.resized_crop(
                value, *box, member.size, InterpolationMode(member.interpolation)
            )
        elif name == "RandomHorizontalFlip":
            if flips and flips.pop():
                value = v2.functional.horizontal_flip(value)
        else:
            value = member(value)
    return value


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    same = actual.contiguous().view(bits) == expected.as_subclass(torch.Tensor).contiguous().view(
        bits
    )
    assert same.all(), f"{int((~same).sum())} of {same.numel()} values differ"


IN_CORE: dict[str, Callable[[], Any]] = {
    "v1 train": lambda: v1.Compose(
        [
            v1.RandomResizedCrop(56),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    ),
    "v1 val": lambda: v1.Compose(
        [v1.Resize(64), v1.CenterCrop(56), v1.ToTensor(), v1.Normalize(MEAN, STD)]
    ),
    "v1 nested, flip last, in place": lambda: v1.Compose(
        [
            v1.RandomResizedCrop((40, 60), scale=(0.3, 1), ratio=(0.5, 2)),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD, inplace=True),
            v1.RandomHorizontalFlip(1.0),
        ]
    ),
    "v1 bytes": lambda: v1.Compose([v1.RandomResizedCrop(56, interpolation=3), v1.PILToTensor()]),
    "v1 convert": lambda: v1.Compose(
        [
            v1.Resize((33, 47), InterpolationMode.BOX),
            v1.PILToTensor(),
            v1.ConvertImageDtype(torch.float32),
            v1.Normalize((0.5,), (0.25,)),
        ]
    ),
    "v1 convert to half": lambda: v1.Compose(
        [v1.CenterCrop((70, 45)), v1.PILToTensor(), v1.ConvertImageDtype(torch.float16)]
    ),
    "v2 train": lambda: v2.Compose(
        [
            v2.RandomResizedCrop(56, antialias=True),
            v2.RandomHorizontalFlip(p=0.5),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
            v2.ToPureTensor(),
        ]
    ),
    "v2 val": lambda: v2.Compose(
        [
            v2.Resize(64, interpolation=InterpolationMode.BICUBIC, max_size=130),
            v2.CenterCrop(50),
            v2.PILToTensor(),
            v2.ToDtype({torch.Tensor: torch.bfloat16, "others": None}, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
        ]
    ),
    "v2 unscaled, two flips": lambda: v2.Compose(
        [
            v2.RandomResizedCrop(32),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32),  # does nothing to a PIL image
            v2.ToImage(),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype(torch.float32, scale=False),
        ]
    ),
    "v2 by way of float64": lambda: v2.Compose(
        [
            v2.RandomResizedCrop(32),
            v2.ToImage(),
            v2.ToDtype(torch.float64, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
            v2.ToDtype(torch.float32),
        ]
    ),
    "sequential": lambda: torch.nn.Sequential(
        v1.Resize(40), torch.nn.Identity(), v1.CenterCrop(40), v2.ToImage()
    ),
}


@pytest.mark.parametrize("name", IN_CORE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_core_gives_torchvisions_values(name: str, channels_last: bool) -> None:
    transform = IN_CORE[name]()
    pipeline = interpret(transform, train=True, channels_last=channels_last)
    assert pipeline.rows == Rows.DECODED
    assert pipeline.notes == ()
    num_compared = 0
    for image in IMAGES:
        for sample in range(8):
            key = (9, 1, sample)
            view = native.draw(pipeline.recipe, *key, *image.size)
            if view is None:  # Resize gave the image of one column a side of 0
                continue
            expected = torchvision_result(transform, image, view)
            row = core_row(pipeline, image, key)
            assert pipeline.dtype == expected.dtype
            assert_same(row, expected)
            num_compared += 1
            if pipeline.table is not None:  # the same from bytes and the table, as on a GPU
                raw = core_row(pipeline, image, key, pipeline.uint8_recipe).long()
                by_table = torch.stack([pipeline.table[c][raw[c]] for c in range(3)])
                assert_same(by_table, expected)
    assert num_compared >= 32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_standard_transforms_are_torchvisions(train: bool, dtype: torch.dtype) -> None:
    crop = [v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()]
    if not train:
        crop = [v1.Resize(256), v1.CenterCrop(224)]
    convert = (
        [v1.PILToTensor()] if dtype == torch.uint8 else [v1.ToTensor(), v1.Normalize(MEAN, STD)]
    )
    ours = interpret(None, train=train, dtype=dtype)
    theirs = interpret(v1.Compose(crop + convert), train=train, dtype=dtype)
    for name in vars(ours.recipe):
        if name != "table":
            assert getattr(ours.recipe, name) == getattr(theirs.recipe, name), name
    assert ours.dtype == theirs.dtype == dtype
    if dtype == torch.uint8:
        assert ours.table is None
        return
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2))
    expected = v1.Normalize(MEAN, STD)(v1.ToTensor()(image)).to(dtype)
    assert_same(ours.table, expected.reshape(3, 256))
    assert_same(theirs.table, expected.reshape(3, 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_what_to_gives(dtype: torch.dtype) -> None:
    for name in ("v1 train", "v1 bytes", "v2 unscaled, two flips"):
        transform = IN_CORE[name]()
        pipeline = interpret(transform, train=True, dtype=dtype)
        assert (pipeline.rows, pipeline.dtype) == (Rows.DECODED, dtype)
        view = native.draw(pipeline.recipe, 0, 0, 4, *IMAGES[0].size)
        expected = torchvision_result(transform, IMAGES[0], view)
        assert_same(core_row(pipeline, IMAGES[0], (0, 0, 4)), expected.to(dtype))


def test_to_tensor_and_to_dtype_keep_their_difference() -> None:
    divided = interpret(IN_CORE["v1 train"](), train=True).table
    multiplied = interpret(IN_CORE["v2 train"](), train=True).table
    assert int((divided != multiplied).sum()) > 200


def test_default_dtype_of_torch_is_followed() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        assert interpret(IN_CORE["v1 train"](), train=True).dtype == torch.float16
        assert interpret(None, train=True).dtype == torch.float16
        torch.set_default_dtype(torch.float64)
        pipeline = interpret(IN_CORE["v1 train"](), train=True)
        assert pipeline.rows == Rows.FINISHED_BY_PYTHON
        assert "float64" in pipeline.notes[0]
        with pytest.raises(ValueError, match=r"float64.*pass dtype=torch\.float32"):
            interpret(None, train=True)
        narrowed = interpret(IN_CORE["v1 train"](), train=True, dtype=torch.float32)
        assert (narrowed.rows, narrowed.dtype) == (Rows.DECODED, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- where the core's part ends ----


class MyCrop(v1.RandomResizedCrop):
    pass


class CenterCrop(v1.Resize):
    """A class of the user's with torchvision's name."""


def modified_flip() -> Any:
    flip = v1.RandomHorizontalFlip(0.5)
    flip.forward = lambda image: image
    return flip


def hooked_crop() -> Any:
    crop = v2.CenterCrop(50)
    crop.register_forward_hook(lambda module, args, output: output)
    return crop


def resize_to_longer_side(size: int) -> Any:
    resize = v2.Resize(size - 1, max_size=size)
    resize.size = None  # what Resize(None, max_size=50) is since torchvision 0.20
    return resize


CUTS: list[tuple[str, list[Any], int, str]] = [
    # members, how many of them the core runs, what the note says
    (
        "unknown member",
        [v1.RandomResizedCrop(40), v1.RandAugment(), v1.ToTensor()],
        1,
        "RandAugment",
    ),
    ("subclass", [MyCrop(40), v1.ToTensor()], 0, "MyCrop"),
    (
        "same name",
        [CenterCrop((40, 40)), v1.ToTensor()],
        0,
        "CenterCrop is not a torchvision class",
    ),
    ("function", [v1.CenterCrop(40), lambda image: image, v1.ToTensor()], 1, "<lambda>"),
    ("replaced method", [v1.CenterCrop(40), modified_flip(), v1.ToTensor()], 1, "modified"),
    ("hook", [hooked_crop(), v1.ToTensor()], 0, "modified"),
    ("no fixed size", [v1.Resize(40), v1.ToTensor()], 0, "same size"),
    ("random crop", [v1.Resize(40), v1.RandomCrop(32), v1.ToTensor()], 0, "RandomCrop"),
    ("nearest", [v1.Resize((40, 40), InterpolationMode.NEAREST), v1.ToTensor()], 0, "nearest"),
    ("lanczos", [v2.RandomResizedCrop(40, interpolation=1), v2.ToImage()], 0, "interpolation"),
    ("tensor resize", [v2.ToImage(), v2.Resize(40), v2.CenterCrop(40)], 0, "put ToImage"),
    ("tensor crop", [v2.ToImage(), v2.RandomResizedCrop(40)], 0, "put ToImage"),
    ("flip first", [v1.RandomHorizontalFlip(), v1.RandomResizedCrop(40)], 0, "flip comes before"),
    ("two crops", [v1.CenterCrop(40), v1.CenterCrop(20), v1.ToTensor()], 1, "cropped before"),
    ("crop, resize", [v1.CenterCrop(40), v1.Resize((20, 20)), v1.ToTensor()], 1, "cropped before"),
    ("no size", [resize_to_longer_side(50), v2.CenterCrop(40)], 0, "size=None"),
    ("scale reversed", [v1.RandomResizedCrop(40, scale=(0, 0)), v1.ToTensor()], 2, ""),
    ("ratio of zero", [v1.RandomResizedCrop(40, ratio=(0.0, 1.0)), v1.ToTensor()], 0, "ratio"),
    ("p above one", [v1.CenterCrop(40), v1.RandomHorizontalFlip(1.5), v1.ToTensor()], 1, "p=1.5"),
    ("double", [v1.CenterCrop(40), v2.ToImage(), v2.ToDtype(torch.float64)], 2, "float64"),
    ("shifted", [v1.CenterCrop(40), v2.ToImage(), v2.ToDtype(torch.int16, True)], 2, "int16"),
    (
        "bytes of other values",
        [v1.CenterCrop(40), v2.ToImage(), v2.ToDtype(torch.int16, True), v2.ToDtype(torch.uint8)],
        2,
        "uint8 with these values",
    ),
    (
        "mean image",
        [v1.CenterCrop(40), v1.ToTensor(), v1.Normalize(torch.zeros(3, 1, 256), STD)],
        2,
        "mean",
    ),
    (
        "bytes normalised",
        [v1.CenterCrop(40), v1.PILToTensor(), v1.Normalize(MEAN, STD)],
        2,
        "float",
    ),
    (
        "erasing",
        [v1.RandomResizedCrop(40), v1.ToTensor(), v1.Normalize(MEAN, STD), v1.RandomErasing(1.0)],
        3,
        "RandomErasing",
    ),
]


@pytest.mark.parametrize(
    ("members", "num_core", "says"), [c[1:] for c in CUTS], ids=[c[0] for c in CUTS]
)
def test_core_part_ends_where_exactness_would(members: list[Any], num_core: int, says: str) -> None:
    for transform in (v1.Compose(members), v1.Compose([v2.Compose(members[:1]), *members[1:]])):
        pipeline = interpret(transform, train=True)
        if num_core == len(members):
            assert (pipeline.rows, pipeline.notes) == (Rows.DECODED, ())
            continue
        assert says in pipeline.notes[0]
        if num_core == 0:
            assert pipeline.rows == Rows.FROM_BYTES
            assert "the whole transform runs in Python" in pipeline.notes[0]
        else:
            assert pipeline.rows == Rows.FINISHED_BY_PYTHON
            assert list(pipeline.tail) == members[num_core:]
            assert f"member {num_core + 1} of {len(members)}" in pipeline.notes[0]


@pytest.mark.parametrize(
    ("p", "q", "together"), [(0.5, 0.5, 0.5), (1, 1, 0), (1, 0, 1), (0, 0, 0), (0.2, 0.1, 0.26)]
)
def test_two_flips_are_one(p: float, q: float, together: float) -> None:
    flips = [v1.RandomHorizontalFlip(p), v2.RandomHorizontalFlip(q)]
    pipeline = interpret(v1.Compose([v1.CenterCrop(40), *flips, v1.ToTensor()]), train=True)
    assert pipeline.recipe.flip_probability == pytest.approx(together, abs=1e-15)
    assert together not in (0, 1) or pipeline.recipe.flip_probability == together


def test_a_subclass_of_compose_is_not_looked_into() -> None:
    class MyCompose(v1.Compose):
        pass

    pipeline = interpret(MyCompose([v1.CenterCrop(40), v1.ToTensor()]), train=True)
    assert pipeline.rows == Rows.FROM_BYTES
    assert "MyCompose" in pipeline.notes[0]


BEFORE_TAIL: dict[str, list[Any]] = {
    "image": [v1.RandomResizedCrop((40, 30)), v1.RandomHorizontalFlip()],
    "bytes": [v1.RandomResizedCrop((40, 30)), v1.PILToTensor()],
    "bytes, flipped": [v1.CenterCrop((40, 30)), v1.PILToTensor(), v1.RandomHorizontalFlip(1.0)],
    "tv_tensors.Image": [v2.RandomResizedCrop((40, 30)), v2.ToImage()],
    "floats": [v1.Resize(50), v1.CenterCrop((40, 30)), v1.ToTensor(), v1.Normalize(MEAN, STD)],
    "float image": [v2.CenterCrop((40, 30)), v2.ToImage(), v2.ToDtype(torch.float16, scale=True)],
}


@pytest.mark.parametrize("name", BEFORE_TAIL)
@pytest.mark.parametrize("channels_last", [False, True])
def test_python_part_receives_what_torchvision_gives_it(name: str, channels_last: bool) -> None:
    received: list[Any] = []
    members = BEFORE_TAIL[name]
    transform = v1.Compose([*members, lambda value: received.append(value) or value])
    pipeline = interpret(transform, train=True, channels_last=channels_last)
    assert len(pipeline.tail) == 1
    key = (1, 2, 3)
    view = native.draw(pipeline.recipe, *key, *IMAGES[0].size)
    row = core_row(pipeline, IMAGES[0], key)
    before = row.clone()
    assert pipeline.finish(row, key) is received[0]
    expected = torchvision_result(v1.Compose(members), IMAGES[0], view)
    assert type(received[0]) is type(expected)
    if isinstance(expected, Image.Image):
        assert received[0].mode == "RGB"
        assert received[0].tobytes() == expected.tobytes()
        return
    assert_same(received[0].as_subclass(torch.Tensor), expected)
    assert received[0].stride() == expected.stride()
    received[0].zero_()
    assert torch.equal(row, before), "a tail that works in place must not change the batch's memory"


def test_transform_without_conversion_gives_images() -> None:
    pipeline = interpret(v1.Compose([v1.CenterCrop(40)]), train=True)
    assert (pipeline.rows, pipeline.tail) == (Rows.FINISHED_BY_PYTHON, ())
    result = pipeline.finish(core_row(pipeline, IMAGES[0], (0, 0, 0)), (0, 0, 0))
    assert result.tobytes() == v1.CenterCrop(40)(IMAGES[0]).tobytes()
    with pytest.raises(ValueError, match="ends in a PIL image"):
        interpret(v1.Compose([v1.CenterCrop(40)]), train=True, dtype=torch.float32)


def test_dtype_is_applied_after_the_python_part() -> None:
    members = [v1.CenterCrop(40), v1.ToTensor(), torch.neg]
    pipeline = interpret(v1.Compose(members), train=True, dtype=torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16
    result = pipeline.finish(core_row(pipeline, IMAGES[0], (0, 0, 0)), (0, 0, 0))
    assert_same(result, v1.Compose(members)(IMAGES[0]).to(torch.bfloat16))
    not_a_tensor = interpret(lambda image: image, train=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"ends in a tensor; it returned Image"):
        not_a_tensor.from_bytes(jpeg_bytes(IMAGES[0]), (0, 0, 0))


# ---- arguments ----


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="transform must be callable or None, got list"):
        interpret([v1.ToTensor()], train=True)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"dtype must be one of torch\.uint8, .*got torch\.float64"
    ):
        interpret(None, train=True, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"would cut the transform's torch\.float32 values"):
        interpret(IN_CORE["v1 train"](), train=True, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"a version of Pillow from 10 on.* got 'latest'"):
        interpret(None, train=True, pillow="latest")
    with pytest.raises(ValueError, match=r"got '9\.5'"):
        pass_order("9.5")


def test_pillow_rule_is_pinned_or_refused() -> None:
    assert interpret(None, train=True, pillow="12").recipe.passes == Passes.HORIZONTAL_FIRST
    assert interpret(None, train=True, pillow="13.0").recipe.passes == Passes.PILLOW_13
    other = "12" if pass_order() == Passes.PILLOW_13 else "13"
    with pytest.raises(ValueError, match=f"pillow='{other}' can't be honoured"):
        interpret(lambda image: image, train=True, pillow=other)


def test_pass_order_is_that_of_the_installed_pillow() -> None:
    differ = 0
    for seed, (width, height, out_width, out_height) in enumerate(
        [(60, 400, 50, 40), (50, 300, 56, 30), (400, 60, 40, 50), (90, 90, 30, 30)]
    ):
        image = photo_like(np.random.default_rng(seed), width, height)
        bilinear = Image.Resampling.BILINEAR
        once = image.resize((out_width, out_height), bilinear).tobytes()
        horizontal = image.resize((out_width, height), bilinear)
        horizontal_first = horizontal.resize((out_width, out_height), bilinear).tobytes()
        vertical = image.resize((width, out_height), bilinear)
        vertical_first = vertical.resize((out_width, out_height), bilinear).tobytes()
        is_vertical = pass_order() == Passes.PILLOW_13 and height - out_height > 2 * (
            width - out_width
        )
        assert once == (vertical_first if is_vertical else horizontal_first)
        differ += horizontal_first != vertical_first
    assert differ >= 2, "these images can't tell the orders apart"


def test_center_rule_is_that_of_the_installed_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = v1.Compose([v1.CenterCrop(40), v1.ToTensor()])
    assert interpret(transform, train=False).recipe.center_rule == Center.ROUND

    def crop_with(halve: Callable[[int], int]) -> Callable[..., Any]:
        return lambda image, size: F.crop(
            image, halve(image.height - size[0]), halve(image.width - size[1]), *size
        )

    monkeypatch.setattr(F, "center_crop", crop_with(lambda n: n // 2))
    assert interpret(transform, train=False).recipe.center_rule == Center.FLOOR
    monkeypatch.setattr(F, "center_crop", crop_with(lambda n: (n + 1) // 2))  # torchvision 0.8
    pipeline = interpret(transform, train=False)
    assert pipeline.rows == Rows.FROM_BYTES
    assert "rounds in a way" in pipeline.notes[0]


def test_torchvision_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from imagenet_seq.decode.transforms import interpret\n"
        "for train in (True, False): print(interpret(None, train=train).table.shape)\n"
        "print(interpret(lambda image: image, train=True).rows.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["torch.Size([3, 256])"] * 2 + ["FROM_BYTES"]


# ---- Pillow's images ----


def test_images_are_opened_as_torchvision_does(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = interpret(lambda image: image, train=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = {
        "grey.jpg": jpeg_bytes(IMAGES[0].convert("L")),
        "cmyk.jpg": jpeg_bytes(IMAGES[0].convert("CMYK")),
        "rotated.jpg": jpeg_bytes(IMAGES[0], exif=rotated),
    }
    buffer = io.BytesIO()
    IMAGES[0].convert("RGBA").save(buffer, "PNG")
    files["alpha.png"] = buffer.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        expected = pil_loader(str(tmp_path / name))
        assert pipeline.open_image(data).tobytes() == expected.tobytes()
        assert pipeline.from_bytes(data, (0, 0, 0)).size == expected.size

    truncated = files["grey.jpg"][:-400]
    with pytest.raises(OSError, match="truncated"):
        pipeline.open_image(truncated)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert pipeline.open_image(truncated).size == IMAGES[0].size


def test_pixel_limit_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    assert interpret(None, train=True).recipe.max_pixels == 12345
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert interpret(None, train=True).recipe.max_pixels == 0


# ---- random numbers of the Python part ----


def user_noise(tensor: torch.Tensor) -> torch.Tensor:
    """Draws from every global generator there is."""
    noise = torch.rand_like(tensor) + torch.nn.functional.dropout(tensor, 0.5)
    return noise + random.random() + float(np.random.rand())


def scripted(module: torch.nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which old scripts use
        return torch.jit.script(module)


TAILS: dict[str, list[Any]] = {
    "torchvision": [v1.RandAugment(), v1.ColorJitter(0.4, 0.4, 0.4, 0.1), v1.ToTensor()],
    "erasing": [v1.ToTensor(), v1.RandomErasing(1.0, value="random")],
    "v2": [v2.RandomChoice([v2.RandomRotation(30), v2.AugMix()]), v2.ToImage(), v2.GaussianNoise()]
    if hasattr(v2, "GaussianNoise")
    else [v2.RandomChoice([v2.RandomRotation(30), v2.AugMix()]), v2.ToImage()],
    "random": [v1.RandomChoice([v1.RandomRotation(30), v1.GaussianBlur(3)]), v1.ToTensor()],
    "the user's": [v1.ToTensor(), user_noise],
    "compiled": [v1.ToTensor(), scripted(v1.RandomErasing(1.0))],
}
FROM_THE_LOCK = {"random", "the user's", "compiled"}


def flat(value: Any) -> bytes:
    return value.contiguous().numpy().tobytes()


def global_states() -> tuple[bytes, Any, list[Any]]:
    name, keys, *rest = np.random.get_state()
    return flat(torch.get_rng_state()), random.getstate(), [name, keys.tobytes(), *rest]


@pytest.mark.parametrize("name", TAILS)
def test_python_part_is_a_function_of_the_key(name: str) -> None:
    data = jpeg_bytes(IMAGES[0])
    finished = interpret(v1.Compose([v1.RandomResizedCrop(40), *TAILS[name]]), train=True)
    from_bytes = interpret(v1.Compose([v1.RandomCrop(30), *TAILS[name]]), train=True)
    assert (finished.rows, from_bytes.rows) == (Rows.FINISHED_BY_PYTHON, Rows.FROM_BYTES)
    assert (len(finished.notes) == 2) == (name in FROM_THE_LOCK)
    keys = [(seed, epoch, i) for seed in (0, 2**64 - 1) for epoch in range(2) for i in range(12)]
    row = core_row(finished, IMAGES[0], keys[0])

    def run(key: Key) -> tuple[bytes, bytes]:
        return flat(finished.finish(row, key)), flat(from_bytes.from_bytes(data, key))

    before = global_states()
    expected = [run(key) for key in keys]
    assert global_states() == before
    assert len({e[0] for e in expected}) > len(keys) * 3 // 4, "keys must make a difference"
    assert len({e[1] for e in expected}) > len(keys) * 3 // 4, "keys must make a difference"

    shuffled = random.Random(1).sample(range(len(keys)), len(keys))
    torch.manual_seed(5)
    start = threading.Barrier(8)
    with ThreadPoolExecutor(8, initializer=start.wait) as threads:
        results = list(threads.map(lambda i: run(keys[i]), shuffled))
    assert [expected[i] for i in shuffled] == results
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    finished.finish(row, keys[0])
    assert torch.equal(torch.rand(1), undisturbed)


def test_random_and_numpy_are_keyed_too() -> None:
    data = jpeg_bytes(IMAGES[0])
    for draw in (random.random, np.random.rand):
        pipeline = interpret(lambda image, draw=draw: draw(), train=True)
        results = []
        for seed in (1, 2):  # of the user's own global state
            random.seed(seed)
            np.random.seed(seed)
            results.append([pipeline.from_bytes(data, (0, 0, i)) for i in range(50)])
        assert results[0] == results[1]
        assert len(set(results[0])) == 50


def test_draws_of_the_python_part_are_uniform_over_samples() -> None:
    pipeline = interpret(lambda image: torch.rand(1).item(), train=True)
    data = jpeg_bytes(IMAGES[-1])
    fractions = [pipeline.from_bytes(data, (0, 0, i)) for i in range(2000)]
    histogram = np.histogram(fractions, bins=10, range=(0, 1))[0]
    assert ((histogram - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees, one in a thousand


@pytest.mark.parametrize(
    ("like", "plain"),
    [
        (lambda t: torch.rand_like(t), lambda: torch.rand(5, 7)),
        (
            lambda t: torch.rand_like(t, dtype=torch.float64),
            lambda: torch.rand(5, 7, dtype=torch.float64),
        ),
        (lambda t: torch.randn_like(t), lambda: torch.randn(5, 7)),
        (lambda t: torch.randint_like(t, 9), lambda: torch.randint(0, 9, (5, 7)).float()),
        (lambda t: torch.randint_like(t, 3, 9), lambda: torch.randint(3, 9, (5, 7)).float()),
    ],
)
def test_draws_like_a_tensor_come_from_the_same_stream(
    like: Callable[[torch.Tensor], Any], plain: Callable[[], Any]
) -> None:
    data = jpeg_bytes(IMAGES[-1])
    results = [
        interpret(lambda image, draw=draw: draw(), train=True).from_bytes(data, (1, 2, 3))
        for draw in (lambda: like(torch.zeros(5, 7)), plain)
    ]
    assert results[0].dtype == results[1].dtype
    assert torch.equal(*results)


def test_draws_that_take_no_generator_are_refused() -> None:
    def attend(image: Image.Image) -> torch.Tensor:
        tensor = torch.rand(1, 1, 4, 4, requires_grad=True)
        return torch.native_dropout(tensor, 0.5, True)[0]

    pipeline = interpret(attend, train=True)
    with pytest.raises(RuntimeError, match=r"native_dropout.* takes no generator"):
        pipeline.from_bytes(jpeg_bytes(IMAGES[0]), (0, 0, 0))


def test_an_exception_in_the_python_part_restores_everything() -> None:
    def fail(image: Image.Image) -> None:
        random.random()
        torch.rand(1)
        raise KeyError("the user's error")

    pipeline = interpret(fail, train=True)
    before = global_states()
    for _ in range(2):  # the lock is free again
        with pytest.raises(KeyError, match="the user's error"):
            pipeline.from_bytes(jpeg_bytes(IMAGES[0]), (0, 0, 0))
    assert global_states() == before


def test_supported_torchvision() -> None:
    major, minor = (int(part) for part in torchvision.__version__.split(".")[:2])
    assert (major, minor) >= (0, 16), "the oldest torchvision that is supported"
    assert isinstance(v2.ToImage()(IMAGES[0]), tv_tensors.Image)
