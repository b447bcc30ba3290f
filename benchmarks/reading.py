"""One process that reads, ours or a peer, and notes when each batch came; see bench_read.py.

    python benchmarks/reading.py TASK

TASK is JSON of the fields of `Task`. When it is ready for the first batch, the process writes a
line and waits for one, so that all ranks begin together; then it iterates and writes its results as
JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from imagenet_seq import native
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Source
from imagenet_seq.loader import Loader
from imagenet_seq.read.options import DiskKind, ReadOptions
from imagenet_seq.sources.formats.pack import shard_file
from imagenet_seq.sources.recognise import open_source

SHARD_BYTES = 10**9
HEADER_BYTES = 512  # of a tar's member; its data are filled up to a multiple of this
MEAN_BYTES, DEVIATION = 109_600, 0.55  # of ImageNet's photos; of the logarithm of their sizes


class Task(NamedTuple):
    """What one process reads."""

    reader: str  # a key of READERS
    folder: str
    made_up_bytes: int = 0  # the folder holds shards of zeros: use a made-up index
    decoded: bool = True  # ours: False gives the bytes alone
    rank: int = 0
    world_size: int = 1
    batch_size: int = 256
    num_workers: int = 2
    num_epochs: int = 1
    most_batches: int = 0  # of an epoch; 0: all
    block_bytes: int = 16 << 20
    disk: DiskKind = "auto"
    loader_arguments: Mapping[str, Any] = MappingProxyType({})
    pace_s: float = 0.0  # the script takes no batch sooner after the one before: it trains
    digest: bool = False  # of all batches, to compare runs


class Batch(NamedTuple):
    """A batch as the script got it."""

    epoch: int
    images: int
    sample_bytes: int  # of its encoded images; 0: unknown
    seconds: float = 0.0  # of time.monotonic()
    waited_s: float = 0.0


class Reading(NamedTuple):
    """The results of one process."""

    begin: float  # when it was told to begin
    batches: list[Batch]
    stats: dict[str, float]  # the Loader's counters
    digests: list[int]  # CRC-32C of every epoch's batches, in their order


# ---- a made-up pack ------------------------------------------------------------------------------


def made_up_source(root: Path, total_bytes: int) -> Source:
    """Return a source like a pack of `total_bytes` in shards of 1 GB, whose files hold zeros.

    Sizes are lognormal around ImageNet's mean; each sample lies between tar headers as in a pack.
    """
    num_shards = max(1, round(total_bytes / SHARD_BYTES))
    generator = np.random.default_rng(0)
    between = 2 * HEADER_BYTES + HEADER_BYTES  # its own header, and the member of its label
    count = round(total_bytes / num_shards / (MEAN_BYTES + between + HEADER_BYTES / 2))
    sizes = generator.lognormal(0, DEVIATION, (num_shards, count)) * MEAN_BYTES
    length = (sizes / np.exp(DEVIATION**2 / 2)).astype(np.int64) + 1
    taken = between + -(-length // HEADER_BYTES) * HEADER_BYTES
    offset = np.cumsum(taken, axis=1) - taken + HEADER_BYTES
    number = num_shards * count
    digits = len(str(number))
    names = np.char.zfill(np.arange(number).astype(f"S{digits}"), digits)
    index = Index(
        file=np.repeat(np.arange(num_shards, dtype=np.int32), count),
        offset=offset.ravel(),
        length=length.ravel(),
        label=generator.integers(0, 1000, number).astype(np.int32),
        name=Names(names.view(np.uint8), np.arange(number + 1, dtype=np.int64) * digits),
        root=str(root),
        files=Names.from_strings(shard_file(shard) for shard in range(num_shards)),
        classes=tuple(f"{label:03d}" for label in range(1000)),
        known_id="made-up",
    )
    return Source("made-up pack", index, permuted=True)


def write_made_up(folder: Path, total_bytes: int) -> None:
    """Make the shards of `made_up_source`: sparse files, which take no space and read as zeros."""
    folder.mkdir(parents=True)
    index = made_up_source(folder, total_bytes).index
    assert index.length is not None
    ends = np.zeros(len(index.files), np.int64)
    np.maximum.at(ends, index.file, index.offset + index.length)
    for name, end in zip(index.files, ends.tolist(), strict=True):
        with open(folder / name, "wb") as file:
            file.truncate(end)


# ---- ours ----------------------------------------------------------------------------------------


class BytesOnly(native.Engine):
    """Reads samples and does nothing with them."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "rows": native.ROWS_READ})


def make_loader(task: Task) -> Loader:
    folder = Path(task.folder)
    made_up = task.made_up_bytes > 0
    loader = Loader(
        made_up_source(folder, task.made_up_bytes) if made_up else open_source(folder, "train"),
        "train",
        batch_size=task.batch_size,
        num_workers=task.num_workers,
        rank=task.rank,
        world_size=task.world_size,
        reading=ReadOptions(
            disk=task.disk, block_bytes=task.block_bytes, verify_checksums=not made_up
        ),
        forecast=False,
        **task.loader_arguments,
    )
    if not task.decoded:
        native.Engine = BytesOnly  # type: ignore[misc]
        loader._pipeline = dataclasses.replace(loader._pipeline, out_shape=None)  # of no bytes
    loader.forecast()  # measures the disk, once
    return loader


def batch_bytes(loader: Loader, epoch: int) -> list[int]:
    """Return the bytes of the images of each batch of an epoch; 0 where they are unknown."""
    index = loader.dataset._source.index
    made = loader._schedule.plan(epoch)
    if index.length is None:
        return [0] * (len(made.batch_begin) - 1)
    return [int(n) for n in np.add.reduceat(index.length[made.sample], made.batch_begin[:-1])]


def ours(task: Task) -> tuple[Callable[[], Iterator[Batch]], Callable[[], Reading]]:
    loader = make_loader(task)
    planned = [batch_bytes(loader, epoch) for epoch in range(task.num_epochs)]
    digests: list[int] = []

    def read() -> Iterator[Batch]:
        for epoch in range(task.num_epochs):
            digest = 0
            for number, (images, _) in enumerate(loader):
                yield Batch(epoch, len(images), planned[epoch][number])
                if task.digest:
                    digest = native.crc32c(images.numpy(), digest)
                if number + 1 == task.most_batches:
                    break
            digests.append(digest)

    return read, lambda: Reading(0, [], loader.stats(), digests)


# ---- peers ---------------------------------------------------------------------------------------


def standard_transform() -> Any:
    from peers.measuring import CROP, MEAN, STD
    from peers.torchvision import import_torchvision

    transforms = import_torchvision().transforms
    members = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*members, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def torchvision_folder(task: Task) -> Any:
    """ImageFolder of torchvision in torch's DataLoader."""
    transform = standard_transform()
    from torchvision.datasets import ImageFolder

    return torch.utils.data.DataLoader(
        ImageFolder(task.folder, transform),
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.num_workers,
    )


def webdataset_shards(task: Task) -> Any:
    """WebDataset on the shards of a pack, shuffled as its documentation shows."""
    import webdataset

    shards = sorted(str(path) for path in Path(task.folder).glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
    if task.decoded:
        dataset = dataset.decode("pil").to_tuple("jpg", "cls")
        dataset = dataset.map_tuple(standard_transform(), int)
    else:
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(len, int)
    batched = dataset.batched(task.batch_size)
    return webdataset.WebLoader(batched, batch_size=None, num_workers=task.num_workers)


def peer(make: Callable[[Task], Any]) -> Any:
    def prepare(task: Task) -> tuple[Callable[[], Iterator[Batch]], Callable[[], Reading]]:
        loader = make(task)

        def read() -> Iterator[Batch]:
            for epoch in range(task.num_epochs):
                for number, (images, _) in enumerate(loader):
                    yield Batch(epoch, len(images), 0)
                    if number + 1 == task.most_batches:
                        break

        return read, lambda: Reading(0, [], {}, [])

    return prepare


READERS = {
    "imagenet_seq": ours,
    "torchvision": peer(torchvision_folder),
    "webdataset": peer(webdataset_shards),
}


def timed(batches: Iterator[Batch], pace_s: float) -> Iterator[Batch]:
    """Note when each batch came, and how long the script waited for it."""
    asked = time.monotonic()
    for batch in batches:
        came = time.monotonic()
        yield batch._replace(seconds=came, waited_s=came - asked)
        time.sleep(max(0.0, came + pace_s - time.monotonic()))
        asked = time.monotonic()


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    task = Task(*json.loads(sys.argv[1]))
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    torch.set_num_threads(1)
    read, finish = READERS[task.reader](task)
    print("ready", file=out, flush=True)
    sys.stdin.readline()
    begin = time.monotonic()
    batches = list(timed(read(), task.pace_s))
    print(json.dumps(finish()._replace(begin=begin, batches=batches)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
