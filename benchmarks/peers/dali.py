"""NVIDIA DALI on the CPU, as in its ImageNet example: fused crop and decode, triangular resize."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from peers.measuring import CROP, MEAN, RESIZE, STD, Peer, Task, main, sorted_photos


def version() -> str:
    import nvidia.dali

    return str(nvidia.dali.__version__)


def make_pipeline(folder: str, dtype: str, task: Task, is_train: bool) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def pipeline() -> Any:
        files = {"files": sorted_photos(folder)}
        encoded, _ = fn.readers.file(**files, random_shuffle=is_train, initial_fill=1024)
        if is_train:
            images = fn.decoders.image_random_crop(encoded, adjust_orientation=False)
            size: dict[str, Any] = {"size": (CROP, CROP)}
        else:
            images = fn.decoders.image(encoded, adjust_orientation=False)
            size = {"resize_shorter": float(RESIZE)}
        images = fn.resize(images, **size, interp_type=types.INTERP_TRIANGULAR)
        values = {"mean": [255 * m for m in MEAN], "std": [255 * s for s in STD]}
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT if dtype == "float32" else types.UINT8,
            output_layout="CHW",
            crop=(CROP, CROP),
            mirror=fn.random.coin_flip() if is_train else 0,
            **(values if dtype == "float32" else {}),
        )

    made = pipeline(batch_size=task.batch_size, num_threads=task.num_cores, device_id=None)
    made.build()
    return made


def train(task: Task) -> Callable[[], Iterator[int]]:
    pipeline = make_pipeline(task.folder, task.dtype, task, is_train=True)
    num_batches = math.ceil(len(sorted_photos(task.folder)) / task.batch_size)

    def epoch() -> Iterator[int]:
        for _ in range(num_batches):  # every batch is full: the reader goes on into the next epoch
            (images,) = pipeline.run()
            yield len(images.as_array())

    return epoch


def validate(task: Task) -> Any:
    import numpy as np

    num_images = len(sorted_photos(task.val_folder))
    pipeline = make_pipeline(task.val_folder, "uint8", task, is_train=False)
    num_batches = math.ceil(num_images / task.batch_size)
    batches = [np.array(pipeline.run()[0].as_array()) for _ in range(num_batches)]
    return np.concatenate(batches)[:num_images].transpose(0, 2, 3, 1)


if __name__ == "__main__":
    main(Peer("pip install nvidia-dali-cuda120 numpy", train, validate, version))
