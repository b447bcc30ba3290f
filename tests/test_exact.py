"""Every sample photo, bit for bit, through the public Loader, against Pillow and torchvision."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from imagenet_seq import _native
from imagenet_seq.loader import Loader
from imagenet_seq.pack import pack

NUM_CROPS = 20
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TRAIN = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
EVAL = [v2.Resize(256), v2.CenterCrop(224)]


@dataclass
class Reference:
    """What Pillow and torchvision make of the photos, by name of the photo without extension."""

    crops: list[dict[str, np.ndarray]]  # by epoch: uint8 (3, 224, 224), crops drawn for the folder
    decoded: dict[str, Image.Image]
    validation: dict[str, np.ndarray]


def key_of(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def drawn_crop(loader: Loader, image: Image.Image, epoch: int, sample: int) -> np.ndarray:
    """The same crop and flip by torchvision: only the numbers come from us."""
    view = _native.draw(loader._pipeline.recipe, 0, epoch, sample, *image.size)
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
    pack(sample_folder / "train", destination, progress=False)
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
    assert len(names) == 500
    for epoch in range(NUM_CROPS):
        begin = 0
        for (images, _), (again, _) in zip(*loaders, strict=True):
            assert torch.equal(images, again)
            for pixels in images.numpy():
                expected = drawn_crop(loaders[0], decoded[names[begin]], epoch, begin)
                assert np.array_equal(pixels, expected), (names[begin], epoch)
                begin += 1
        assert begin == 500
    # Only what the core does not decode went to Pillow, and from a pack the same.
    assert loaders[0].stats()["foreign_rows"] < 5 * NUM_CROPS


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
    assert begin == 500


CONVERSIONS = {
    "ToTensor": [v1.ToTensor(), v1.Normalize(MEAN, STD)],
    "ToDtype": [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
}


@pytest.mark.parametrize("kind", ["folder", "pack"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_every_format_is_the_users_conversion_of_the_same_crops(
    sources: dict[str, Path], kind: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    bytes_loader = loader_of(sources[kind], [*TRAIN, v2.PILToTensor()], num_workers=2)
    conversion = {"bytes": [v2.PILToTensor()]} if dtype == torch.uint8 else CONVERSIONS
    settings = {"memory_format": memory_format, "dtype": dtype}
    for members in conversion.values():
        loaders = [
            loader_of(sources[kind], [*TRAIN, *members], num_workers=n, **settings) for n in (1, 8)
        ]
        bytes_loader.set_epoch(0)
        convert = v2.Compose(members)
        for (pixels, _), (images, _), (again, _) in zip(bytes_loader, *loaders, strict=True):
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=memory_format)
            assert torch.equal(images, again)
            for i in range(
                0, len(pixels), 8
            ):  # torchvision converts slowly; each format sees 64 photos
                image = Image.fromarray(pixels[i].permute(1, 2, 0).numpy())
                assert torch.equal(images[i], convert(image).to(dtype))
