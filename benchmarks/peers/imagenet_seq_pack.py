"""The Loader of this project, on a pack of the ImageFolder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from peers.imagenet_seq import make_loader, train_on, version
from peers.measuring import Peer, Task, main, sorted_photos


def pack_path(task: Task, folder: str) -> str:
    return os.path.join(task.prepared, "pack-" + os.path.basename(folder))


def prepare(task: Task) -> None:
    for folder in (task.folder, task.val_folder):
        command = [sys.executable, "-m", "imagenet_seq.cli", "pack"]
        subprocess.run([*command, folder, pack_path(task, folder)], check=True)


def train(task: Task) -> Callable[[], Iterator[int]]:
    return train_on(pack_path(task, task.folder), task)


def validate(task: Task) -> Any:
    """Sort the rows, since a pack's order is not that of the folder."""
    import torch

    loader = make_loader(pack_path(task, task.val_folder), "val", "uint8", task)
    images = torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()
    names = [os.path.splitext(path)[0] for path, _ in loader.dataset.samples]
    order = sorted(range(len(names)), key=lambda i: names[i].split("/")[-2:])
    assert len(order) == len(sorted_photos(task.val_folder))
    return images[order]


if __name__ == "__main__":
    main(Peer("pip install .", train, validate, version, prepare))
