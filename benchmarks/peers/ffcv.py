"""FFCV on a .beton of the photos in their own size, each JPEG as it is where FFCV allows it.

Its RandomResizedCrop decodes whole images and resizes with OpenCV's INTER_AREA; its center crop
cuts a square of 224/256 of the shorter side and resizes that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from peers.measuring import CROP, MEAN, RESIZE, STD, Peer, Task, main, sorted_photos


def version() -> str:
    from importlib.metadata import version as version_of

    import ffcv.loader  # noqa: F401  (it is installed but can't be imported on some machines)

    return version_of("ffcv")


def beton_path(task: Task, folder: str) -> str:
    return os.path.join(task.prepared, os.path.basename(folder) + ".beton")


class Photos:
    """What FFCV's writer asks for: images and labels by number, in sorted order."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted_photos(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self.paths[i]).convert("RGB"), 0


def prepare(task: Task) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    for folder in (task.folder, task.val_folder):
        fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
        writer = DatasetWriter(beton_path(task, folder), fields, num_workers=task.num_cores)
        writer.from_indexed_dataset(Photos(folder))


def make_loader(folder: str, decoder: Any, operations: list[Any], task: Task, order: Any) -> Any:
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor, ToTorchImage

    return Loader(
        beton_path(task, folder),
        batch_size=task.batch_size,
        num_workers=task.num_cores,
        order=order,
        os_cache=True,
        drop_last=False,
        pipelines={
            # On the CPU it normalises arrays only, which is before they become tensors.
            "image": [decoder, *operations, ToTensor(), ToTorchImage(convert_back_int16=False)],
            "label": None,
        },
    )


def train(task: Task) -> Callable[[], Iterator[int]]:
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip

    operations: list[Any] = [RandomHorizontalFlip()]
    if task.dtype == "float32":
        mean, std = np.array(MEAN) * 255, np.array(STD) * 255
        operations.append(NormalizeImage(mean, std, np.float32))
    decoder = RandomResizedCropRGBImageDecoder((CROP, CROP))
    loader = make_loader(task.folder, decoder, operations, task, OrderOption.RANDOM)
    return lambda: (len(batch[0]) for batch in loader)


def validate(task: Task) -> Any:
    import numpy as np
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import OrderOption

    decoder = CenterCropRGBImageDecoder((CROP, CROP), ratio=CROP / RESIZE)
    loader = make_loader(task.val_folder, decoder, [], task, OrderOption.SEQUENTIAL)
    return np.concatenate([batch[0].numpy().copy() for batch in loader]).transpose(0, 2, 3, 1)


if __name__ == "__main__":
    main(Peer("see https://github.com/libffcv/ffcv", train, validate, version, prepare))
