"""The Loader's arguments: what they may be, and what follows from them."""

from __future__ import annotations

from typing import Any, get_args

import torch

from imagenet_seq.index.cache import OnError
from imagenet_seq.index.mixing import MIN_PERMUTED
from imagenet_seq.index.source import Source
from imagenet_seq.sources.place import SPLITS

ADOPTED_SAMPLERS = {  # samplers whose order is ours, and where they keep what they sample from
    "torch.utils.data.distributed.DistributedSampler": "dataset",
    "torch.utils.data.sampler.SequentialSampler": "data_source",
    "torch.utils.data.sampler.RandomSampler": "data_source",
}


def check_arguments(**given: Any) -> None:
    """Raise for arguments outside their domain, in the order in which a user wrote them."""

    def positive(name: str, least: int = 1) -> None:
        value = given[name]
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected an int for {name}, got {value!r}")
        if value < least:
            raise ValueError(f"expected {name} of {least} or more, got {value}")

    split, transform = given["split"], given["transform"]
    if isinstance(split, int):
        raise TypeError(
            f"the second argument is the split, 'train' or 'val', got {split!r}; "
            f"pass batch_size={split}"
        )
    if split is not None and split not in SPLITS:
        raise ValueError(f"expected split 'train' or 'val' (or None), got {split!r}")
    if transform is not None and not callable(transform):
        raise TypeError(f"expected a callable transform, got {transform!r}")
    for name in ("batch_size", "prefetch_factor", "block_bytes", "shuffle_blocks", "cache"):
        positive(name)
    positive("num_streams")
    positive("num_readers")
    positive("window", least=0)
    positive("seed", least=0)
    positive("num_workers", least=0)
    if given["timeout"] < 0:
        raise ValueError(f"expected timeout of 0 or more seconds, got {given['timeout']}")
    shuffle, sampler, batch_sampler = given["shuffle"], given["sampler"], given["batch_sampler"]
    if shuffle not in (None, True, False, "uniform", "block"):
        raise ValueError(f"expected shuffle True, False, 'uniform' or 'block', got {shuffle!r}")
    if sampler is not None and shuffle:
        raise ValueError("sampler and shuffle exclude each other: the sampler decides the order")
    if batch_sampler is not None and (
        sampler is not None or shuffle or given["drop_last"] or given["batch_size"] not in (1, 256)
    ):
        raise ValueError(
            "batch_sampler excludes batch_size, shuffle, sampler and drop_last: it decides them"
        )
    if given["batch_size"] is None and batch_sampler is None:
        raise ValueError(
            "batch_size=None (samples without batches) is not supported; use batch_size=1"
        )
    if given["memory_format"] not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "expected memory_format torch.contiguous_format or torch.channels_last, got "
            f"{given['memory_format']}"
        )
    if given["on_error"] not in get_args(OnError):
        raise ValueError(f"expected on_error 'fail' or 'skip', got {given['on_error']!r}")
    if given["exact"] not in ("crop", "strict"):
        raise ValueError(f"expected exact 'crop' or 'strict', got {given['exact']!r}")


def shuffle_kind(shuffle: bool | str, source: Source) -> str:
    """Return the plan's word for a shuffle: "block" by itself only where the data is permuted."""
    if isinstance(shuffle, str):
        return shuffle
    if not shuffle:
        return "none"
    return "block" if source.permuted else "uniform"


def notes_on_order(shuffle: str, source: Source) -> list[str]:
    """Say where a shuffle does not suit the order in which samples lie."""
    if len(source.index) < MIN_PERMUTED:
        return []
    where = f"{source.index.root}: "
    packing = "'imagenet-seq pack' makes a pack of it whose samples lie in random order"
    if shuffle == "block" and not source.permuted:
        return [
            f"{where}shuffle='block' mixes samples that lie close together, and these are not "
            f"known to lie in random order, so batches may have few classes: {packing}"
        ]
    if shuffle == "uniform" and source.python_blocks:
        return [
            f"{where}a uniform shuffle reads a whole block of this {source.kind} for every image: "
            f"{packing}; or pass shuffle='block' where they do already"
        ]
    return []


def cuda_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return the GPU that batches go to, None for the CPU."""
    if device is None:
        return None
    resolved = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if resolved.type == "cpu":
        return None
    if resolved.type != "cuda":
        raise ValueError(f"expected device 'cpu' or 'cuda', got {device!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device={device!r}: this PyTorch sees no CUDA device")
    return torch.device(
        "cuda", resolved.index if resolved.index is not None else torch.cuda.current_device()
    )


def is_default_collate(collate_fn: Any) -> bool:
    return collate_fn is None or collate_fn is torch.utils.data.default_collate
