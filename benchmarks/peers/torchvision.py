"""torchvision's ImageFolder and transforms in torch's DataLoader: what others are compared with.

On one core the DataLoader works in its own process (num_workers=0), which costs it least; on more
it gets one worker a core, kept from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peers.measuring import CROP, MEAN, RESIZE, STD, Peer, Task, main


def import_torchvision() -> Any:
    """Import torchvision, also one whose compiled operators were built for another torch.

    Its transforms need none of them, but its import fails where these two are unknown.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.library_of_missing_operators = library  # it must live as long as they are used
    return torchvision


def version() -> str:
    return str(import_torchvision().__version__)


def make_loader(folder: str, transform: Any, task: Task, shuffle: bool) -> Any:
    import torch
    from torchvision.datasets import ImageFolder

    num_workers = 0 if task.num_cores == 1 else task.num_cores
    return torch.utils.data.DataLoader(
        ImageFolder(folder, transform),
        batch_size=task.batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def train(task: Task) -> Callable[[], Iterator[int]]:
    import torch

    transforms = import_torchvision().transforms
    members = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
    if task.dtype == "float32":
        members += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    else:
        members.append(transforms.PILToTensor())
    torch.set_num_threads(task.num_cores)
    loader = make_loader(task.folder, transforms.Compose(members), task, shuffle=True)
    return lambda: (len(images) for images, _ in loader)


def validate(task: Task) -> Any:
    import torch

    transforms = import_torchvision().transforms
    members = [transforms.Resize(RESIZE), transforms.CenterCrop(CROP), transforms.PILToTensor()]
    loader = make_loader(task.val_folder, transforms.Compose(members), task, shuffle=False)
    return torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    main(Peer("pip install torch torchvision", train, validate, version))
