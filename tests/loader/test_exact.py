"""Every sample photo, bit for bit, through the public Loader, against Pillow and torchvision."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from imagenet_seq import native
from imagenet_seq.loader import Loader
from imagenet_seq.pack.packing import pack_dataset

NUM_CROPS = 20
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TRAIN = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
EVAL = [v2.Resize(256), v2.CenterCrop(224)]


def key_of(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def drawn_crop(loader: Loader, image: Image.Image, epoch: int, sample: int) -> np.ndarray:
    """The same crop and flip by torchvision: only the numbers come from us."""
    view = native.draw(loader._pipeline.recipe, 0, epoch, sample, *image.size)
    assert view is not None
    crop = F.resized_crop(image, view.top, view.left, view.height, view.width, [224, 224])
    if view.flip:
        crop = F.hflip(crop)
    return np.asarray(crop).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def decoded(photos: list[Path]) -> dict[str, Image.Image]:
    return {
        key_of(f"{p.parent.name}/{p.name}"): Image.open(io.BytesIO(p.read_bytes())).convert("RGB")
        for p in photos
    }


@pytest.fixture(scope="module")
def sources(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The photos as a folder and as a pack."""
    destination = tmp_path_factory.mktemp("packs") / "pack"
    pack_dataset(sample_folder / "train", destination, progress=False)
    return {"folder": sample_folder / "train", "pack": destination}


def loader_of(source: Path, transform: list, **settings: object) -> Loader:
    return Loader(source, None, v2.Compose(transform), batch_size=64, shuffle=False, **settings)


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_random_crops_of_every_photo(
    sources: dict[str, Path], decoded: dict[str, Image.Image], kind: str
) -> None:
    loaders = [loader_of(sources[kind], [*TRAIN, v2.PILToTensor()], num_workers=n) for n in (1, 8)]
    names = [key_of(name) for name in loaders[0]._source.index.name]
    assert sorted(names) == sorted(decoded)
    for epoch in range(NUM_CROPS):
        begin = 0
        for (images, _), (again, _) in zip(*loaders, strict=True):
            assert torch.equal(images, again)
            for pixels in images.numpy():
                expected = drawn_crop(loaders[0], decoded[names[begin]], epoch, begin)
                assert np.array_equal(pixels, expected), (names[begin], epoch)
                begin += 1
        assert begin == len(names) > 0
    # Only what the core does not decode went to Pillow, and from a pack the same.
    assert loaders[0].stats()["python_rows"] < len(names) / 100 * NUM_CROPS


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_validation_of_every_photo(
    sources: dict[str, Path], decoded: dict[str, Image.Image], kind: str
) -> None:
    reference = v2.Compose([*EVAL, v2.PILToTensor()])
    loaders = [loader_of(sources[kind], [*EVAL, v2.PILToTensor()], num_workers=n) for n in (1, 8)]
    names = [key_of(name) for name in loaders[0]._source.index.name]
    begin = 0
    for (images, _), (again, _) in zip(*loaders, strict=True):
        assert torch.equal(images, again)
        for pixels in images:
            assert torch.equal(pixels, reference(decoded[names[begin]])), names[begin]
            begin += 1
    assert begin == len(names) > 0


CONVERSIONS = {
    "ToTensor": [v1.ToTensor(), v1.Normalize(MEAN, STD)],
    "ToDtype": [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
}


def converted(members: list, pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images (N, 3, 224, 224) by the user's own objects, as one tall image."""
    tall = Image.fromarray(pixels.permute(0, 2, 3, 1).reshape(-1, 224, 3).numpy())
    return v2.Compose(members)(tall).reshape(3, len(pixels), 224, 224).transpose(0, 1)


@pytest.mark.parametrize("kind", ["folder", "pack"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", [TRAIN, EVAL], ids=["crops", "validation"])
def test_every_format_is_the_users_conversion_of_the_same_pixels(
    sources: dict[str, Path],
    kind: str,
    geometry: list,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    bytes_loader = loader_of(sources[kind], [*geometry, v2.PILToTensor()], num_workers=2)
    conversions = {"bytes": [v2.PILToTensor()]} if dtype == torch.uint8 else CONVERSIONS
    settings = {"memory_format": memory_format, "dtype": dtype}
    for members in conversions.values():
        loaders = [
            loader_of(sources[kind], [*geometry, *members], num_workers=n, **settings)
            for n in (1, 8)
        ]
        bytes_loader.set_epoch(0)
        num = 0
        for (pixels, _), (images, _), (again, _) in zip(bytes_loader, *loaders, strict=True):
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=memory_format)
            assert torch.equal(images, again)
            assert torch.equal(images, converted(members, pixels).to(dtype))
            num += len(images)
        assert num == len(bytes_loader.dataset) > 0
