"""What the first argument of Loader names: a path, a split, or a torchvision dataset."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from imagenet_seq.decode.pipeline import Pipeline
from imagenet_seq.index.cache import OnError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats.imagefolder import from_samples
from imagenet_seq.sources.place import SPLITS, split_of_path
from imagenet_seq.sources.recognise import open_source


class Dataset(Sequence[Any]):
    """The samples behind a loader, as torchvision's ImageFolder shows them.

    ``dataset[i]`` is (image, target) through the loader's transform, with the draws of epoch 0; it
    reads one file and is meant for a look, not for training.
    """

    def __init__(
        self,
        source: Source,
        pipeline: Pipeline,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[int], Any] | None,
    ) -> None:
        self._source, self._pipeline = source, pipeline
        self.transform, self.target_transform = transform, target_transform
        index = source.index
        self.root = index.root
        self.classes = list(index.classes)
        self.class_to_idx = index.class_to_idx
        self.samples = self.imgs = index.samples
        self.targets = index.targets

    def __len__(self) -> int:
        return self._source.index.num_samples

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"expected a sample from 0 to {len(self) - 1}, got {number}")
        number %= len(self)
        image = self._pipeline.decode_one(self.encoded(number), (0, 0, number))
        label = self.targets[number]
        return image, label if self.target_transform is None else self.target_transform(label)

    def encoded(self, index: int) -> bytes:
        """Return the bytes of a sample's image file."""
        columns = self._source.index
        offset = int(columns.offset[index])
        length = -1 if columns.length is None else int(columns.length[index])
        if self._source.python_blocks:
            return self._source.read_block(int(columns.file[index])).image(offset).tobytes()
        with open(os.path.join(columns.root, columns.files[columns.file[index]]), "rb") as file:
            file.seek(offset)
            return file.read(length)

    def __repr__(self) -> str:
        return f"Dataset({self._source.kind} at {self.root!r}, {len(self)} samples)"


_Resolved = tuple[Source, str | None, Callable[[Any], Any] | None, Callable[[int], Any] | None]


def resolve_dataset(dataset: Any, split: str | None, on_error: OnError) -> _Resolved:
    """Return (source, split, transform, target_transform) of what the first argument names."""
    if isinstance(dataset, str) and dataset in SPLITS and split is None:
        dataset, split = None, dataset
    if dataset is None:
        dataset = os.environ.get("IMAGENET")
        if not dataset:
            raise ValueError(
                "no dataset: pass its path, as in Loader('/data/imagenet', 'train'), or set the "
                "environment variable IMAGENET to the folder that holds train/ and val/"
            )
    if isinstance(dataset, (str, os.PathLike)):
        path = os.path.abspath(os.path.expanduser(os.fspath(dataset)))
        source = open_source(dataset, split, on_error=on_error)
        return source, source.agreed_split(split or split_of_path(path)), None, None
    if isinstance(dataset, Source):
        return dataset, dataset.agreed_split(split), None, None
    return _from_torch_dataset(dataset, split, on_error)


def _from_torch_dataset(dataset: Any, split: str | None, on_error: OnError) -> _Resolved:
    if type(dataset) is torch.utils.data.Subset:
        source, split, transform, target_transform = resolve_dataset(
            dataset.dataset, split, on_error
        )
        return source.take(np.asarray(dataset.indices)), split, transform, target_transform
    folder = sys.modules.get("torchvision.datasets.folder")
    if folder is None or not isinstance(dataset, folder.DatasetFolder):
        raise TypeError(
            "expected a path, 'train', 'val', a torchvision ImageFolder or ImageNet, or a Subset "
            f"of one, got {type(dataset).__module__}.{type(dataset).__qualname__}"
        )
    if (
        type(dataset).__getitem__ is not folder.DatasetFolder.__getitem__
        or dataset.loader is not folder.default_loader
    ):
        raise TypeError(
            f"{type(dataset).__qualname__} reads its samples in its own way (a __getitem__ or "
            "loader of its own), which this Loader would bypass; keep torch's DataLoader for it or "
            "move the change into transform"
        )
    if dataset.transform is None:
        raise ValueError(
            "the dataset has no transform, and images of different sizes can't be batched; pass "
            "transform= to the dataset or to the Loader"
        )
    source = from_samples(dataset.samples, dataset.classes, dataset.root)
    split = split or getattr(dataset, "split", None)
    return source, split, dataset.transform, dataset.target_transform
