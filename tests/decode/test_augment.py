"""The draws of the core: golden crops, an independent recomputation, torchvision's distributions.

``PYTHONPATH=tests python tests/decode/test_augment.py --write-golden`` writes
tests/golden/crops.txt anew. That may only happen with a release note: other crops are another
training run for the same seed.
"""

from __future__ import annotations

import hashlib
import math
import sys
from itertools import islice
from pathlib import Path

import conftest  # noqa: F401  (torchvision needs its operators when this file is run by itself)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import functional as F

from imagenet_seq import native
from imagenet_seq.decode.transforms import interpret
from imagenet_seq.native.recipe import Geometry, Recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "crops.txt"
NUM_CROPS, NUM_IN_CLEAR, BLOCK = 10_000, 200, 500

Key = tuple[int, int, int]
Crop = tuple[int, int, int, int, int]  # top, left, height, width, flip

TRAIN = interpret(None, train=True).recipe


def draw(recipe: Recipe, key: Key, width: int, height: int) -> native.View:
    view = native.draw(recipe, *key, width, height)
    assert view is not None, "the core refused a view that it can make"
    return view


def core_crop(key: Key, width: int, height: int, recipe: Recipe = TRAIN) -> Crop:
    view = draw(recipe, key, width, height)
    return view.top, view.left, view.height, view.width, view.flip


# ---- the same on every platform, for ever ----


def golden_case(number: int) -> tuple[Key, int, int]:
    """Seeds, epochs, samples and image sizes from usual to extreme."""
    key = ((0, 1234, 2**64 - 1)[number % 3], number % 90, number * 128_119 % 14_000_000)
    width, height = 1 + number * 7919 % 4001, 1 + number * 104_729 % 3001
    if number % 4 == 0:
        width, height = ((500, 375), (1, 4000), (5000, 3), (65_535, 65_535))[number // 4 % 4]
    return key, width, height


def golden_lines() -> list[str]:
    crops = [core_crop(*golden_case(number)) for number in range(NUM_CROPS)]
    lines = [" ".join(map(str, crop)) for crop in crops]
    blocks = (lines[begin : begin + BLOCK] for begin in range(0, NUM_CROPS, BLOCK))
    hashes = [hashlib.sha256("\n".join(block).encode()).hexdigest() for block in blocks]
    return [
        f"# top left height width flip of crops 0 to {NUM_IN_CLEAR - 1} (test_augment.golden_case)",
        *lines[:NUM_IN_CLEAR],
        f"# SHA-256 of the lines of every {BLOCK} crops, 0 to {NUM_CROPS - 1}",
        *hashes,
    ]


def test_golden_crops() -> None:
    expected = GOLDEN.read_text().splitlines()
    for number, (line, wanted) in enumerate(zip(golden_lines(), expected, strict=True)):
        assert line == wanted, f"line {number + 1} of {GOLDEN}"


def reference_crop(key: Key, width: int, height: int) -> Crop:
    """The training crop recomputed with NumPy's Philox, libm and torchvision's formulas."""
    seed, epoch, sample = key
    tag = int.from_bytes(b"imseq", "little")

    def stream(purpose: int) -> np.random.Philox:
        words = np.array([0, sample, epoch, purpose], np.uint64)
        return np.random.Philox(counter=words, key=np.array([seed, tag], np.uint64))

    crops = stream(0)

    def uniform(low: float, high: float, bits: np.random.Philox = crops) -> float:
        return low + (high - low) * ((int(bits.random_raw()) >> 11) * 2.0**-53)

    def below(n: int) -> int:
        return int(crops.random_raw()) * n >> 64

    flip = int(uniform(0.0, 1.0, stream(1)) < 0.5)
    for _ in range(10):
        area = height * width * uniform(0.08, 1.0)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return below(height - h + 1), below(width - w + 1), h, w, flip
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w, flip


def test_draws_can_be_recomputed_with_numpy() -> None:
    for number in range(3000):
        case = golden_case(number)
        assert core_crop(*case) == reference_crop(*case), case


# ---- torchvision's distributions ----


def largest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The statistic of Kolmogorov and Smirnov of two samples."""
    points = np.union1d(a, b)
    ranks = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [
        (500, 375, (0.08, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.35, 1.0), (3 / 4, 4 / 3)),
        (300, 90, (0.2, 1.0), (3 / 4, 4 / 3)),  # most tries fail here, and many crops are central
        (7, 5, (0.08, 1.0), (0.5, 3.0)),
    ],
)
def test_crops_are_distributed_as_torchvisions(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    n = 6000
    theirs_transform = v1.RandomResizedCrop(224, scale=scale, ratio=ratio)
    recipe = interpret(v1.Compose([theirs_transform, v1.ToTensor()]), train=True).recipe
    ours = np.array([core_crop((5, 0, i), width, height, recipe)[:4] for i in range(n)])
    image = Image.new("L", (width, height))
    torch.manual_seed(11)
    theirs = np.array(
        [theirs_transform.get_params(image, list(scale), list(ratio)) for _ in range(n)]
    )
    limit = 1.95 * math.sqrt(2 / n)  # exceeded by chance once in a thousand
    statistics = {
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
        "height": lambda c: c[:, 2],
        "width": lambda c: c[:, 3],
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 3] / c[:, 2],
        "place": lambda c: c[:, 0] / (height - c[:, 2] + 1) + c[:, 1] / (width - c[:, 3] + 1),
    }
    for name, statistic in statistics.items():
        distance = largest_distance(statistic(ours), statistic(theirs))
        assert distance < limit, f"{name}: distance {distance:.4f}, limit {limit:.4f}"


def test_a_wrong_distribution_would_be_noticed() -> None:
    rng = np.random.default_rng(0)
    n = 6000
    limit = 1.95 * math.sqrt(2 / n)
    assert largest_distance(rng.random(n), rng.random(n) ** 1.15) > limit
    assert largest_distance(rng.random(n), rng.random(n)) < limit


def test_crop_and_flip_of_samples_and_epochs_are_independent() -> None:
    crops = np.array(
        [[core_crop((3, epoch, i), 500, 375) for i in range(2000)] for epoch in range(2)]
    )
    streams = [crops[e, :, c].astype(float) for e in range(2) for c in (0, 1, 3, 4)]
    correlation = np.corrcoef(streams)
    # Within an epoch a crop's place depends on its size; everything else must be unrelated.
    for a in range(8):
        for b in range(a):
            if a // 4 != b // 4 or a % 4 == 3:
                assert abs(correlation[a, b]) < 0.1, (a, b, correlation[a, b])


# ---- properties ----

sides = st.one_of(st.integers(1, 40), st.integers(1, 70_000))
keys = st.tuples(
    st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)
)
ratios = st.floats(0.05, 20).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 20)))
scales = st.floats(0, 2).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 2)))


@settings(deadline=None, max_examples=400)
@given(key=keys, width=sides, height=sides, scale=scales, ratio=ratios)
def test_crops_lie_inside_and_keep_scale_and_ratio(
    key: Key, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    transform = v1.RandomResizedCrop((60, 80), scale=scale, ratio=ratio)
    recipe = interpret(v1.Compose([transform, v1.ToTensor()]), train=True).recipe
    view = native.draw(recipe, *key, width, height)
    central = fallback(width, height, ratio)
    if view is None:
        assert 0 in central, "only an empty crop may be refused"
        return
    assert (view.resized_height, view.resized_width) == (60, 80)
    assert 0 <= view.top <= height - view.height
    assert 0 <= view.left <= width - view.width
    assert min(view.height, view.width) >= 1
    if (view.height, view.width) == central:
        return
    # Each side is off by at most half a pixel from one with area and ratio within their bounds.
    low = (view.width - 0.5) * (view.height - 0.5)
    high = (view.width + 0.5) * (view.height + 0.5)
    area = width * height
    assert low <= scale[1] * area * (1 + 1e-9)
    assert high >= scale[0] * area * (1 - 1e-9)
    assert (view.width - 0.5) / (view.height + 0.5) <= ratio[1] * (1 + 1e-9)
    assert (view.width + 0.5) / (view.height - 0.5) >= ratio[0] * (1 - 1e-9)


def fallback(width: int, height: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of torchvision's central crop."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def test_impossible_scale_gives_torchvisions_central_crop() -> None:
    transform = v1.RandomResizedCrop(
        224, scale=(1.5, 2.0)
    )  # larger than the image: no try succeeds
    recipe = interpret(v1.Compose([transform, v1.ToTensor()]), train=True).recipe
    for width, height in ((500, 375), (100, 300), (300, 100), (33, 44), (1, 1), (3, 4), (65, 2)):
        image = Image.new("L", (width, height))
        expected = transform.get_params(image, [1.5, 2.0], [3 / 4, 4 / 3])
        assert core_crop((0, 0, 0), width, height, recipe)[:4] == tuple(expected)


@settings(deadline=None, max_examples=300)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.one_of(
        st.none(), st.integers(1, 60), st.tuples(st.integers(1, 60), st.integers(1, 60))
    ),
    max_extra=st.one_of(st.none(), st.integers(1, 30)),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_resize_and_center_crop_are_torchvisions(
    width: int,
    height: int,
    size: int | tuple[int, int] | None,
    max_extra: int | None,
    crop: tuple[int, int],
) -> None:
    members: list[object] = []
    max_size = size + max_extra if isinstance(size, int) and max_extra else None
    if size is not None:
        members.append(v1.Resize(size, max_size=max_size))
    members += [v1.CenterCrop(crop), v1.ToTensor()]
    recipe = interpret(v1.Compose(members), train=False).recipe
    try:
        resized = (
            F.resize(Image.new("L", (width, height)), size, max_size=max_size) if size else None
        )
    except ValueError:  # a side of 0
        assert native.draw(recipe, 0, 0, 0, width, height) is None
        return
    view = draw(recipe, (0, 0, 0), width, height)
    resized_width, resized_height = resized.size if resized else (width, height)
    assert (view.resized_width, view.resized_height) == (resized_width, resized_height)
    # An image whose pixels are their own numbers, from 1, shows what was cut and what was padded.
    numbers = np.arange(1, resized_width * resized_height + 1, dtype=np.int32)
    image = Image.fromarray(numbers.reshape(resized_height, resized_width))
    expected = np.asarray(F.center_crop(image, list(crop)))
    window = np.zeros(crop, np.int32)
    for y, x in np.ndindex(*crop):
        row, column = view.window_top + y, view.window_left + x
        if 0 <= row < resized_height and 0 <= column < resized_width:
            window[y, x] = numbers[row * resized_width + column]
    assert np.array_equal(window, expected)


def test_invalid_recipes_are_refused_with_field_and_value() -> None:
    with pytest.raises(ValueError, match=r"recipe\.crop_height must be 0 or equal to out_height"):
        native.draw(Recipe(Geometry.RESIZE_CROP, 5, 5, crop_height=4, crop_width=5), 0, 0, 0, 9, 9)
    with pytest.raises(ValueError, match=r"recipe\.out_width must be between 1 and 65536, got 0"):
        native.draw(Recipe(Geometry.FIXED_CROP, 5, 0), 0, 0, 0, 9, 9)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-golden"]:
        sys.exit("usage: PYTHONPATH=tests python tests/decode/test_augment.py --write-golden")
    GOLDEN.write_text("\n".join(golden_lines()) + "\n")
    print(f"wrote {GOLDEN}:", *islice(golden_lines(), 1, 4), "...", sep="\n")
