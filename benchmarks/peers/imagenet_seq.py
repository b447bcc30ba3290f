"""The Loader of this project, on an ImageFolder; peers/imagenet_seq_pack.py: on a pack of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peers.measuring import Peer, Task, main


def version() -> str:
    import imagenet_seq

    return imagenet_seq.__version__


def make_loader(path: str, split: str, dtype: str, task: Task) -> Any:
    import torch

    from imagenet_seq.loader import Loader

    return Loader(
        path,
        split,
        batch_size=task.batch_size,
        num_workers=task.num_cores,
        dtype=getattr(torch, dtype),
    )


def train_on(path: str, task: Task) -> Callable[[], Iterator[int]]:
    loader = make_loader(path, "train", task.dtype, task)
    return lambda: (len(images) for images, _ in loader)


def validate(task: Task) -> Any:
    import torch

    loader = make_loader(task.val_folder, "val", "uint8", task)
    return torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    main(Peer("pip install .", lambda task: train_on(task.folder, task), validate, version))
