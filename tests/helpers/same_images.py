"""The same images in many formats: which sample is which image, and what its pixels must be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fixtures import make
from PIL import Image
from torchvision.transforms import v2

from imagenet_seq.index.source import Source
from imagenet_seq.loader import Loader
from imagenet_seq.sources.formats.imagefolder import from_samples
from imagenet_seq.sources.recognise import open_source

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
    "tensorpack/pickle4": VAL,
    "tensorpack/pyarrow": BOTH,
    "lmdb/msgpack": VAL,
    "lmdb/msgpack_old": VAL,
    "lmdb/pickle": BOTH,
    "lmdb/pickle_numpy_label": VAL,
    "lmdb/pickle_protocol2": VAL,
    "lmdb_pyarrow": VAL,
    "parquet": BOTH,
    "hf_disk": BOTH,
    "hf_cache": BOTH,
    "tfrecord/inception": BOTH,
    "tfrecord/tfds/imagenet2012/5.1.0": BOTH,
    "ffcv/train.beton": TRAIN,
    "ffcv/val.beton": VAL,
    "ffcv/val_raw.beton": VAL,
    "ffcv/val_proportion.beton": VAL,
    "mds": BOTH,
    "mds_zstd": BOTH,
    "mds_variants/bytes": VAL,
    "mds_variants/ixy": VAL,
}
"""What is below tests/fixtures, and which splits there are."""

OWN_CLASSES = "webdataset_variants/jpeg_txt_wnid"
"""Numbers its classes itself, and only those of its own samples, as ImageFolder does."""

OF_FEW = ("webdataset_variants/", "lmdb/msgpack_old", "lmdb/pickle_", "ffcv/val_")
"""Those of a few samples only."""

CROPS = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.PILToTensor()])
CENTRE = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])

Row = tuple[int, bytes]  # label and pixels
Epoch = list[list[Row]]


class Original(NamedTuple):
    """An image that was put into all formats."""

    path: Path
    wnid: str
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


def num_samples(images: Path, place: str, split: str) -> int:
    return make.FEW if place.startswith(OF_FEW) else len(make.by_class(images, split))


def originals_of(images: Path, split: str) -> list[Original]:
    return [
        Original(sample.path, sample.wnid, sample.data, rgb(sample.data))
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
    assert distances[order[0]] < 15
    assert len(order) == 1 or distances[order[1]] > 2 * distances[order[0]]
    return of_size[order[0]]


def case_of(formats: Path, images: Path, place: str, split: str, stored: Path) -> Case:
    """Open what a writer made of the ImageFolder `images`, and the same images in its order.

    Of images that the format's writer encoded again, its bytes are written to the folder `stored`.
    """
    source = open_source(formats / place, split, progress=False)
    dataset = Loader(source, split, CENTRE).dataset
    originals = originals_of(images, split)
    samples = []
    for i in range(len(dataset)):
        data = dataset.encoded(i)
        original = original_of(data, originals)
        originals.remove(original)  # each is there once
        path = original.path
        if data != original.data:
            path = stored / f"{i}.{Image.open(io.BytesIO(data)).format}"
            path.write_bytes(data)
        samples.append((str(path), original.wnid))
    wnids = make.wnids_of(images)
    if place == OWN_CLASSES:
        wnids = sorted({wnid for _, wnid in samples})
    labelled = [(path, wnids.index(wnid)) for path, wnid in samples]
    return Case(place, split, source, from_samples(labelled, wnids, images / split))


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
