"""Every format that people have ImageNet in: the samples and the pixels of the ImageFolder.

tests/fixtures holds the same generated images in each of them, written by the format's own library
(tests/fixtures/make.py).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fixtures import make
from PIL import Image
from torchvision.transforms import v2

from imagenet_seq.loader import ImagenetLoader, Loader
from imagenet_seq.pack import pack
from imagenet_seq.sources import Source, open_source
from imagenet_seq.sources.imagefolder import from_samples

FIXTURES = Path(make.__file__).parent
BOTH, TRAIN, VAL = ("train", "val"), ("train",), ("val",)

SOURCES = {
    "images": BOTH,
    "official": BOTH,
    "kaggle": BOTH,
    "flat": VAL,
    "webdataset": BOTH,
    "webdataset_variants/png_json": VAL,
    "webdataset_variants/jpeg_txt_number": VAL,
    "webdataset_variants/jpeg_txt_wnid": VAL,
    "tensorpack/msgpack": BOTH,
    "tensorpack/pickle": BOTH,
    "tensorpack/pyarrow": BOTH,
    "lmdb/common/msgpack": BOTH,
    "lmdb/common/msgpack_old": VAL,
    "lmdb/common/pickle": BOTH,
    "lmdb/common/pickle_numpy_label": VAL,
    "lmdb/common/pickle_protocol2": VAL,
    "lmdb/pyarrow": BOTH,
    "parquet": BOTH,
    "hf_disk": BOTH,
    "hf_cache": BOTH,
    "tfrecord/inception": BOTH,
    "tfrecord/tfds": BOTH,
    "ffcv": BOTH,
    "ffcv/train_raw.beton": TRAIN,
    "ffcv/train_proportion.beton": TRAIN,
    "mds": BOTH,
    "mds_zstd": BOTH,
    "mds_bytes": BOTH,
    "mds_xy": BOTH,
}
"""What is below tests/fixtures, and which splits there are."""

NUMBERED = ("lmdb/", "tensorpack/", "ffcv", "mds")
"""Formats that have labels and no names for them."""

CROPS = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.PILToTensor()])
CENTRE = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])

Row = tuple[int, bytes]  # label and pixels
Epoch = list[list[Row]]


class Original(NamedTuple):
    """An image that was put into all formats."""

    path: Path
    label: int
    data: bytes
    pixels: np.ndarray


class Case(NamedTuple):
    """A source, and the ImageFolder of the same images in the same order."""

    place: str
    split: str
    source: Source
    reference: Source

    def loader(self, *arguments: Any, **settings: Any) -> Loader:
        return Loader(self.source, self.split, *arguments, batch_size=3, **settings)

    def reference_loader(self, *arguments: Any, **settings: Any) -> Loader:
        return Loader(self.reference, self.split, *arguments, batch_size=3, **settings)


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def originals_of(images: Path, split: str) -> list[Original]:
    return [
        Original(sample.path, sample.label, sample.data, rgb(sample.data))
        for sample in make.by_class(images, split)
    ]


def original_of(data: bytes, originals: list[Original]) -> Original:
    """Which image a sample is: by its bytes, or by its pixels where it was encoded again."""
    for original in originals:
        if original.data == data:
            return original
    pixels = rgb(data).astype(np.int16)
    of_size = [original for original in originals if original.pixels.shape == pixels.shape]
    distances = [np.abs(original.pixels - pixels).mean() for original in of_size]
    order = np.argsort(distances)
    assert len(order), f"no image of {pixels.shape}"
    assert distances[order[0]] < 4
    assert len(order) == 1 or distances[order[1]] > 12
    return of_size[order[0]]


def reference_of(source: Source, images: Path, split: str, stored: Path) -> Source:
    """The ImageFolder of a source's images in its order, with the labels of the originals.

    Of images that the format's writer encoded again, its bytes are written to the folder `stored`.
    """
    dataset = Loader(source, split, CENTRE).dataset
    originals = originals_of(images, split)
    samples = []
    for i in range(len(dataset)):
        data = dataset.encoded(i)
        original = original_of(data, originals)
        path = original.path
        if data != original.data:
            path = stored / f"{i}.{Image.open(io.BytesIO(data)).format}"
            path.write_bytes(data)
        samples.append((str(path), original.label))
        originals.remove(original)  # each is there once
    return from_samples(samples, make.wnids_of(images), images / split)


def rows_of(batch: tuple[torch.Tensor, torch.Tensor]) -> list[Row]:
    images, target = batch
    return [
        (int(label), pixels.numpy().tobytes()) for pixels, label in zip(images, target, strict=True)
    ]


def epoch_of(loader: Loader) -> Epoch:
    return [rows_of(batch) for batch in loader]


def resumed_epoch_of(loader: Loader, other: Loader) -> Epoch:
    """An epoch of which one loader gives two batches and another one the rest."""
    batches = iter(loader)
    begun = [rows_of(next(batches)), rows_of(next(batches))]
    other.load_state_dict(loader.state_dict())
    return begun + epoch_of(other)


def in_any_order(epoch: Epoch) -> list[Row]:
    return sorted(row for batch in epoch for row in batch)


@pytest.fixture(
    scope="module",
    params=[(place, split) for place, splits in SOURCES.items() for split in splits],
    ids=lambda param: "-".join(param),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    place, split = request.param
    source = open_source(FIXTURES / place, split, progress=False)
    stored = tmp_path_factory.mktemp("stored")
    return Case(place, split, source, reference_of(source, FIXTURES / "images", split, stored))


def test_every_fixture_is_tested() -> None:
    tested = {place.split("/")[0] for place in SOURCES}
    assert tested == {path.name for path in FIXTURES.iterdir() if path.is_dir()} - {"__pycache__"}
    assert tested == {name.split("/")[0] for name in make.FORMATS}


def test_samples_labels_and_classes_are_those_of_the_images(case: Case) -> None:
    index, wnids = case.source.index, make.wnids_of(FIXTURES / "images")
    images = make.by_class(FIXTURES / "images", case.split)
    assert list(index.targets) == list(case.reference.index.targets)
    assert len(index) == (4 if "png_json" in case.place else len(images))
    numbered = case.place.startswith(NUMBERED)
    assert list(index.classes) == (list(map(str, range(len(wnids)))) if numbered else wnids)
    assert len(set(index.name)) == len(index)
    assert all(
        Path(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".ppm") for name in index.name
    )
    assert not case.source.notes
    index.validate(case.place)


def test_validation_gives_pillows_pixels_in_the_sources_order(case: Case) -> None:
    loader = case.loader(CENTRE, shuffle=False, num_workers=8)
    epoch = epoch_of(loader)
    rows = [row for batch in epoch for row in batch]
    assert len(rows) == len(case.source.index)
    for i, (label, pixels) in enumerate(rows):
        expected = CENTRE(Image.fromarray(rgb(loader.dataset.encoded(i))))
        assert pixels == expected.numpy().tobytes(), case.source.index.name[i]
        assert label == case.reference.index.targets[i]
    other = case.loader(CENTRE, shuffle=False, num_workers=1)
    assert resumed_epoch_of(other, loader) == epoch


def test_random_crops_are_the_imagefolders(case: Case) -> None:
    reference = case.reference_loader(CROPS, shuffle=True, num_workers=1)
    loader = case.loader(CROPS, shuffle=True, num_workers=8)
    first, second = epoch_of(reference), epoch_of(reference)
    assert first != second
    assert epoch_of(loader) == first
    other = case.loader(CROPS, shuffle=True, num_workers=1)
    assert resumed_epoch_of(loader, other) == second


def test_a_block_shuffle_changes_nothing_but_the_order(case: Case) -> None:
    """The order is that of the source's own blocks; a sample's crop is the same in any order."""
    settings = {"shuffle": "block", "block_bytes": 8192, "shuffle_blocks": 2}
    reference = case.reference_loader(CROPS, shuffle=False)
    loader, other = (case.loader(CROPS, num_workers=n, **settings) for n in (1, 8))
    epoch = epoch_of(loader)
    assert in_any_order(epoch) == in_any_order(epoch_of(reference))
    assert resumed_epoch_of(other, case.loader(CROPS, num_workers=8, **settings)) == epoch


def test_two_ranks_together_see_every_sample_once(case: Case) -> None:
    halves = [
        epoch_of(case.loader(CENTRE, shuffle=False, num_workers=2, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    whole = epoch_of(case.reference_loader(CENTRE, shuffle=False))
    assert len(halves[0]) == len(halves[1])
    assert in_any_order(halves[0] + halves[1]) == in_any_order(whole)
