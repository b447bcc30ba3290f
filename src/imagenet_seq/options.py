"""The Loader's arguments: what they may be, and what follows from them."""

from __future__ import annotations

import weakref
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from imagenet_seq.index.cache import OnError
from imagenet_seq.index.mixing import MIN_PERMUTED
from imagenet_seq.index.source import Source
from imagenet_seq.read.options import check_count
from imagenet_seq.sources.place import SPLITS

Split = Literal["train", "val"]
Shuffle = Literal["uniform", "block"]
Exact = Literal["crop", "strict"]

_NATIVE_SAMPLERS = {  # samplers we run natively, and their attribute that holds the dataset
    "torch.utils.data.distributed.DistributedSampler": "dataset",
    "torch.utils.data.sampler.SequentialSampler": "data_source",
    "torch.utils.data.sampler.RandomSampler": "data_source",
}


class Default(int):
    """The default of an argument that another one excludes: told from the same number, given."""


def check_arguments(given: dict[str, Any]) -> None:
    """Raise for arguments outside their domain, or beside one that excludes them."""
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
    for name in ("batch_size", "prefetch_factor", "shuffle_blocks", "num_streams"):
        check_count(name, given[name])
    for name in ("seed", "num_workers"):
        check_count(name, given[name], least=0)
    if not given["timeout"] >= 0:
        raise ValueError(f"expected timeout of 0 or more seconds, got {given['timeout']}")
    _check_order(**given)
    if given["memory_format"] not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "expected memory_format torch.contiguous_format or torch.channels_last, got "
            f"{given['memory_format']}"
        )
    for name, (first, second) in (("on_error", get_args(OnError)), ("exact", get_args(Exact))):
        if given[name] not in (first, second):
            raise ValueError(f"expected {name} {first!r} or {second!r}, got {given[name]!r}")


def _check_order(
    *, shuffle: Any, sampler: Any, batch_sampler: Any, batch_size: Any, drop_last: Any, **_: Any
) -> None:
    """Check the arguments of which one decides the order, as DataLoader does.

    What says "no" (shuffle=False, drop_last=False) is no second decision, and batch_size=1 is
    DataLoader's own default: scripts pass these beside a sampler.
    """
    if shuffle not in (None, True, False, *get_args(Shuffle)):
        raise ValueError(f"expected shuffle True, False, 'uniform' or 'block', got {shuffle!r}")
    if sampler is not None and shuffle:
        raise ValueError("sampler and shuffle exclude each other: the sampler decides the order")
    if batch_sampler is None:
        if batch_size is None:
            raise ValueError(
                "batch_size=None (samples without batches) is not supported; use batch_size=1"
            )
        return
    sized = batch_size not in (None, 1) and not isinstance(batch_size, Default)
    if sampler is not None or shuffle or drop_last or sized:
        raise ValueError(
            "batch_sampler excludes batch_size, shuffle, sampler and drop_last: it decides them"
        )


class Adopted(NamedTuple):
    """What a sampler says of the order; `shuffle` and `seed` are as the Loader's.

    `drops_rest`: in an order that is not shuffled, leave samples over so that all ranks have
    equally many.
    """

    executed: Any  # the sampler whose order is executed; None: the order is ours
    shuffle: bool | str | None
    seed: int | None
    followed: Any = None  # a DistributedSampler whose rank, world size and epochs are taken over
    drops_rest: bool = False


def adopt_sampler(
    sampler: Any,
    batch_sampler: Any,
    shuffle: bool | str | None,
    seed: int | None,
    num_samples: int,
) -> Adopted:
    """Return what torch's samplers say, where they sample all of the dataset."""
    if sampler is None:
        return Adopted(None, shuffle if batch_sampler is None else False, seed)
    executed = Adopted(sampler, False, seed)
    kind = f"{type(sampler).__module__}.{type(sampler).__qualname__}"
    data = getattr(sampler, _NATIVE_SAMPLERS.get(kind, ""), ())
    if len(data) != num_samples:  # not one we know, or made for something else: a subset, say
        return executed
    if kind == "torch.utils.data.distributed.DistributedSampler":
        seed = sampler.seed if seed is None else seed
        return Adopted(None, sampler.shuffle, seed, sampler, bool(sampler.drop_last))
    if kind == "torch.utils.data.sampler.SequentialSampler":
        return Adopted(None, False, seed)
    if sampler.replacement or sampler.num_samples != len(data):
        return executed
    if seed is None and sampler.generator is not None:
        seed = sampler.generator.initial_seed()
    return Adopted(None, True, seed)


def blocks_of_cache(source: Source, cache: int, block_bytes: int) -> int:
    """Return the blocks that hold about `cache` samples: the original project's unit."""
    length = source.index.length
    if length is None or len(length) == 0:
        return 64
    mean_bytes = max(1.0, float(np.mean(length[:65536])))
    return max(1, round(cache * mean_bytes / block_bytes))


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
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    return torch.device("cuda", index)


def is_default_collate(collate_fn: Any) -> bool:
    """Tell whether batches are stacked as torch does it by default."""
    return collate_fn is None or collate_fn is torch.utils.data.default_collate


class EpochSampler:
    """Stands in for ``loader.sampler`` in scripts that call ``loader.sampler.set_epoch(epoch)``."""

    def __init__(self, loader: Any) -> None:
        self._loader = weakref.ref(loader)

    def __len__(self) -> int:
        """Return the samples of an epoch on this rank."""
        loader = self._loader()
        return 0 if loader is None else int(loader._schedule.rank_samples)

    def set_epoch(self, epoch: int) -> None:
        """Forward to `Loader.set_epoch`."""
        loader = self._loader()
        if loader is not None:
            loader.set_epoch(epoch)
