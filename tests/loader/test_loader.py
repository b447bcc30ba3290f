"""The Loader's surface: call forms, order, resume, formats, python rows and blocks, samplers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pydoc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import add_split, jpeg_bytes, photo_like
from PIL import Image, ImageFile
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.transforms import v2

import imagenet_seq
import imagenet_seq.batch.workers as workers_module
from imagenet_seq.data import ImagenetLoader
from imagenet_seq.device import CudaFeeder
from imagenet_seq.errors import CollateError, DataError, LoaderClosedError, SampleError, StateError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Block, Source
from imagenet_seq.loader import Loader
from imagenet_seq.machine import LoaderNote
from imagenet_seq.pack.packing import pack_dataset
from imagenet_seq.read.options import ReadOptions

UNCHECKED = ReadOptions(verify_checksums=False)
SMALL = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.PILToTensor()])
EVAL = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])


@pytest.fixture(scope="module")
def root(make_folder: Callable[..., Path]) -> Path:
    folder = make_folder(67, num_classes=5)
    add_split(folder, 23, 5, "val", seed=1)
    return folder


def epoch_of(loader: Loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), target.clone()) for images, target in loader]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


# ---- call forms and surface ----------------------------------------------------------------------


def test_call_forms_of_the_original_project(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="IMAGENET"):
        ImagenetLoader("train")
    monkeypatch.setenv("IMAGENET", str(root))
    loader = ImagenetLoader("train", batch_size=16, num_workers=2)
    images, target = next(iter(loader))
    assert images.shape == (16, 3, 224, 224)
    assert images.dtype == torch.float32
    assert target.dtype == torch.int64
    val = ImagenetLoader("val", batch_size=16, num_workers=2)
    assert [len(t) for _, t in val] == [16, 7]
    explicit = ImagenetLoader(
        root, "train", SMALL, batch_size=16, num_workers=2, shuffle=True, cache=5000
    )
    assert next(iter(explicit))[0].shape == (16, 3, 32, 32)
    from imagenet_seq.data import ImagenetLoader as named
    from imagenet_seq.data import Loader as short

    assert named is short is imagenet_seq.ImagenetLoader
    assert issubclass(short, imagenet_seq.Loader)


def test_a_checksum_is_checked_on_the_first_read(root: Path, tmp_path: Path) -> None:
    pack_dataset(root / "train", tmp_path / "pack", progress=False)
    loader = Loader(tmp_path / "pack", "train", EVAL, batch_size=8, num_workers=2, shuffle=False)
    before = epoch_of(loader)
    first = loader.dataset.encoded(0)
    shard = next((tmp_path / "pack").glob("*.tar"))
    content = shard.read_bytes()
    place = content.index(first) + len(first) - 3  # before the end marker
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    os.utime(shard, ns=times)  # as a disk does it that loses a bit
    assert len(epoch_of(loader)) == len(before)  # it was right when it was first read
    loader.close()
    with pytest.raises(DataError, match=r"CRC-32C is [0-9a-f]{8}, expected"):
        epoch_of(loader)  # a new engine
    unchecked = Loader(
        tmp_path / "pack", "train", EVAL, batch_size=8, shuffle=False, reading=UNCHECKED
    )
    assert len(epoch_of(unchecked)) == len(before)


def test_cache_is_the_pool_of_a_block_shuffle(root: Path, tmp_path: Path) -> None:
    pack_dataset(root / "train", tmp_path / "pack", progress=False)
    mean_bytes = np.mean([p.stat().st_size for p in (root / "train").rglob("*.jpg")])
    reading = ReadOptions(block_bytes=int(4 * mean_bytes))
    settings = {"reading": reading, "batch_size": 8}

    def order(loader_type: type[Loader] = Loader, **arguments: int) -> list[int]:
        loader = loader_type(tmp_path / "pack", "train", SMALL, **settings, **arguments)
        return [x.sum().item() for images, _ in loader for x in images]

    assert order(ImagenetLoader, cache=8) == order(shuffle_blocks=2) != order(shuffle_blocks=9)
    assert order(ImagenetLoader, cache=36) == order(shuffle_blocks=9)


def test_a_split_is_taken_from_the_folder_or_asked_for(root: Path, tmp_path: Path) -> None:
    assert "shuffle='uniform'" in repr(Loader(root / "train"))
    assert "shuffle='none'" in repr(Loader(root / "val"))
    (tmp_path / "mine").symlink_to(root / "train")
    with pytest.raises(ValueError, match="pass split="):
        Loader(tmp_path / "mine")
    assert len(Loader(tmp_path / "mine", transform=EVAL, batch_size=67)) == 1


def test_length_classes_samples_and_targets(root: Path) -> None:
    loader = Loader(root, "train", SMALL, batch_size=10)
    assert len(loader) == 7
    assert len(Loader(root, "train", SMALL, batch_size=10, drop_last=True)) == 6
    reference = datasets.ImageFolder(str(root / "train"))
    assert loader.dataset.classes == reference.classes
    assert loader.dataset.class_to_idx == reference.class_to_idx
    assert list(loader.dataset.samples) == reference.samples
    assert list(loader.dataset.targets) == reference.targets
    assert len(loader.dataset) == 67
    image, label = loader.dataset[3]
    assert image.shape == (3, 32, 32)
    assert label == reference.targets[3]
    with pytest.raises(IndexError):
        loader.dataset[67]


def test_every_sample_once_and_another_order_each_epoch(root: Path) -> None:
    seen = SMALL_INDEX(root)
    loader = Loader(root, "train", v2.Compose([*SMALL.transforms]), batch_size=10, num_workers=3)
    labels = [torch.cat([t for _, t in loader]).tolist() for _ in range(2)]
    assert Counter(labels[0]) == Counter(labels[1]) == Counter(seen)
    assert labels[0] != labels[1]
    again = Loader(root, "train", SMALL, batch_size=10, num_workers=1)
    assert torch.cat([t for _, t in again]).tolist() == labels[0]
    again.set_epoch(1)
    assert torch.cat([t for _, t in again]).tolist() == labels[1]
    again.sampler.set_epoch(0)
    assert torch.cat([t for _, t in again]).tolist() == labels[0]


def SMALL_INDEX(root: Path) -> list[int]:
    return datasets.ImageFolder(str(root / "train")).targets


@pytest.mark.parametrize(
    "settings",
    [{"num_workers": 8}, {"prefetch_factor": 1}, {"num_workers": 3, "prefetch_factor": 9}],
)
def test_order_and_pixels_do_not_depend_on_threads_or_prefetch(root: Path, settings: dict) -> None:
    reference = epoch_of(Loader(root, "train", SMALL, batch_size=9, num_workers=1))
    assert same(epoch_of(Loader(root, "train", SMALL, batch_size=9, **settings)), reference)


def test_validation_is_in_order_and_complete(root: Path) -> None:
    loader = Loader(root, "val", EVAL, batch_size=5, num_workers=4)
    expected = datasets.ImageFolder(str(root / "val"), EVAL)
    images = torch.cat([x for x, _ in loader])
    assert torch.equal(images, torch.stack([x for x, _ in expected]))
    assert torch.cat([t for _, t in loader]).tolist() == expected.targets


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formats_are_the_users_own_conversion(
    root: Path, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    to_float = [v1.ToTensor(), v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    transform = v1.Compose([v1.Resize(40), v1.CenterCrop(32), *to_float])
    loader = Loader(
        root,
        "val",
        transform,
        batch_size=6,
        num_workers=2,
        dtype=dtype,
        memory_format=memory_format,
    )
    expected = datasets.ImageFolder(str(root / "val"), transform)
    begin = 0
    for images, target in loader:
        assert images.is_contiguous(memory_format=memory_format)
        reference = torch.stack([expected[begin + i][0] for i in range(len(target))]).to(dtype)
        assert torch.equal(images, reference)
        begin += len(target)
    assert begin == 23


def test_target_transform_and_collate_fn(root: Path) -> None:
    loader = Loader(root, "val", EVAL, batch_size=23, target_transform=lambda label: label * 10)
    ((_, target),) = loader
    expected = [10 * label for label in datasets.ImageFolder(str(root / "val")).targets]
    assert target.tolist() == expected

    def collate(samples: list) -> tuple:
        return len(samples), samples[0][1], torch.rand(1).item(), random.random()

    loader = Loader(root, "val", EVAL, batch_size=8, collate_fn=collate)
    first = list(loader)
    assert [batch[0] for batch in first] == [8, 8, 7]
    assert isinstance(first[0][1], int)
    again = Loader(root, "val", EVAL, batch_size=8, collate_fn=collate, num_workers=4)
    assert list(again) == first  # random draws of a collate_fn are keyed too


# ---- torch datasets and samplers -----------------------------------------------------------------


def test_an_imagefolder_a_subset_and_samplers_work_unchanged(root: Path) -> None:
    dataset = datasets.ImageFolder(str(root / "train"), EVAL)
    plain = torch.utils.data.DataLoader(dataset, batch_size=10)
    assert same(epoch_of(Loader(dataset, batch_size=10, num_workers=2)), epoch_of(plain))
    subset = torch.utils.data.Subset(dataset, [40, 3, 3, 66, 12])
    reference = epoch_of(torch.utils.data.DataLoader(subset, batch_size=2))
    assert same(epoch_of(Loader(subset, batch_size=2)), reference)
    order = [5, 60, 2, 2, 33, 7, 8]
    reference = epoch_of(torch.utils.data.DataLoader(dataset, batch_size=3, sampler=order))
    loader = Loader(dataset, batch_size=3, sampler=order)
    assert same(epoch_of(loader), reference)
    assert len(loader) == 3
    batches = [[1, 2, 3], [50], [4, 9]]
    reference = epoch_of(torch.utils.data.DataLoader(dataset, batch_sampler=batches))
    assert same(epoch_of(Loader(dataset, batch_sampler=batches)), reference)
    with pytest.raises(StateError, match="sampler"):
        loader.state_dict()
    shuffled = Loader(dataset, batch_size=10, sampler=torch.utils.data.RandomSampler(dataset))
    assert Counter(torch.cat([t for _, t in shuffled]).tolist()) == Counter(dataset.targets)


def test_kept_blocks_of_one_order_are_not_taken_for_anothers(root: Path) -> None:
    # A shuffled subset is read in blocks by a block shuffle, and sample by sample in its own order.
    chosen = torch.randperm(67, generator=torch.Generator().manual_seed(1)).tolist()
    subset = torch.utils.data.Subset(datasets.ImageFolder(root / "train", EVAL), chosen)
    expected = epoch_of(Loader(subset, batch_size=8, shuffle=False, ram=0))
    by_block = Loader(subset, batch_size=8, shuffle="block", ram="16MB")
    epoch_of(by_block)
    assert by_block.stats()["kept_blocks"]
    by_sample = Loader(subset, batch_size=8, shuffle=False, ram="16MB")
    assert same(epoch_of(by_sample), expected)
    by_sample.close()
    by_block.close()


def test_a_distributed_sampler_is_taken_over(root: Path) -> None:
    dataset = datasets.ImageFolder(str(root / "train"), SMALL)
    counts: Counter = Counter()
    for rank in range(3):
        sampler = torch.utils.data.distributed.DistributedSampler(
            dataset, num_replicas=3, rank=rank, shuffle=False
        )
        counts.update(
            torch.cat([t for _, t in Loader(dataset, batch_size=4, sampler=sampler)]).tolist()
        )
    assert counts == Counter(dataset.targets)  # exact: nothing is repeated to fill up
    sampler = torch.utils.data.distributed.DistributedSampler(
        dataset, num_replicas=1, rank=0, seed=5
    )
    loader = Loader(dataset, batch_size=10, sampler=sampler)
    first, second = epoch_of(loader), epoch_of(loader)
    assert not same(first, second)
    sampler.set_epoch(1)
    assert same(epoch_of(loader), second)
    assert same(epoch_of(Loader(dataset, batch_size=10, shuffle=True, seed=5)), first)


def test_datasets_that_would_be_changed_are_refused(root: Path) -> None:
    class Other(datasets.ImageFolder):
        def __getitem__(self, index: int) -> tuple:
            return super().__getitem__(index)[0], 0

    with pytest.raises(TypeError, match="own way"):
        Loader(Other(str(root / "train"), SMALL))
    with pytest.raises(TypeError, match="own way"):
        Loader(datasets.ImageFolder(str(root / "train"), SMALL, loader=Image.open))
    with pytest.raises(ValueError, match="transform"):
        Loader(datasets.ImageFolder(str(root / "train")))
    with pytest.raises(TypeError, match="expected a path"):
        Loader([1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": 32}, TypeError, "batch_size=32"),
        ({"split": "test"}, ValueError, "split"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 2.5}, TypeError, "batch_size"),
        ({"num_workers": -1}, ValueError, "num_workers"),
        ({"shuffle": "always"}, ValueError, "shuffle"),
        ({"sampler": [1], "shuffle": True}, ValueError, "exclude"),
        ({"transform": 3}, TypeError, "callable"),
        ({"exact": "no"}, ValueError, "exact"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "memory_format"),
        ({"device": "meta"}, ValueError, "device"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank"),
        ({"rank": 0}, ValueError, "together"),
        ({"prefetch_factor": 0}, ValueError, "prefetch_factor"),
        ({"ram": "48 PB"}, ValueError, "ram: expected 'auto'.* got '48 PB'"),
        ({"ram": 48}, ValueError, "ram: .* 48 bytes"),
        ({"ram": "130%"}, ValueError, "ram"),
        ({"ram": [1]}, TypeError, "ram"),
        ({"cache": 8}, TypeError, "cache"),
        ({"cuda": True}, TypeError, "cuda"),
        ({"disk": "hdd"}, TypeError, "disk"),
        ({"reading": {"disk": "hdd"}}, TypeError, r"expected ReadOptions\(...\) for reading"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    root: Path, arguments: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        Loader(root, **{"split": "train", **arguments})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"disk": "floppy"}, ValueError, "expected disk 'auto', 'hdd' or 'ssd', got 'floppy'"),
        ({"num_readers": 0}, ValueError, "num_readers of 1 or more, got 0"),
        ({"num_readers": True}, TypeError, "num_readers"),
        ({"window": -1}, ValueError, "window of 0 or more, got -1"),
        ({"window": 0.5}, TypeError, "window"),
        ({"block_bytes": 0}, ValueError, "block_bytes of 1 or more, got 0"),
        ({"block_bytes": None}, TypeError, "block_bytes"),
        ({"direct": "yes"}, TypeError, "True or False for direct, got 'yes'"),
        ({"verify_checksums": 1}, TypeError, "True or False for verify_checksums, got 1"),
    ],
)
def test_wrong_read_options_say_what_was_expected(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ReadOptions(**options)


def test_read_options_are_one_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReadOptions().disk = "hdd"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ReadOptions("hdd")  # type: ignore[call-arg, misc]


def test_arguments_that_exclude_each_other_are_refused_also_at_their_default(root: Path) -> None:
    dataset = datasets.ImageFolder(root / "train", EVAL)
    batches = [[0, 1], [2]]
    with pytest.raises(ValueError, match="batch_sampler excludes batch_size"):
        Loader(dataset, batch_sampler=batches, batch_size=256)
    # DataLoader's own defaults say nothing, and frameworks pass them on.
    assert len(Loader(dataset, batch_sampler=batches, batch_size=1, drop_last=False)) == 2
    with pytest.raises(ValueError, match="cache and shuffle_blocks exclude each other"):
        ImagenetLoader(root, "train", cache=100, shuffle_blocks=64)
    with pytest.raises(ValueError, match="cuda and device exclude each other"):
        ImagenetLoader(root, "train", cuda=False, device=None)
    sampler = torch.utils.data.distributed.DistributedSampler(dataset, num_replicas=2, rank=1)
    with pytest.raises(ValueError, match="rank 0 of 2 was passed beside a DistributedSampler"):
        Loader(dataset, sampler=sampler, rank=0, world_size=2)
    assert len(Loader(dataset, sampler=sampler, shuffle=False, rank=1, world_size=2)) > 0


def test_public_names_are_listed_and_typed() -> None:
    assert set(dir(imagenet_seq)) == set(imagenet_seq.__all__)
    for name in imagenet_seq.__all__:
        value = getattr(imagenet_seq, name)
        assert name == "__version__" or value.__doc__, name
    assert "Loader" in pydoc.plain(pydoc.render_doc(imagenet_seq))


def test_arguments_that_threads_make_moot_are_accepted(root: Path) -> None:
    loader = Loader(
        root,
        "train",
        SMALL,
        persistent_workers=True,
        pin_memory=True,
        pin_memory_device="",
        in_order=True,
        multiprocessing_context="spawn",
        generator=torch.Generator().manual_seed(3),
    )
    assert same(epoch_of(loader), epoch_of(Loader(root, "train", SMALL, seed=3)))
    with pytest.warns(LoaderNote, match="worker_init_fn"):
        Loader(root, "train", SMALL, worker_init_fn=print)


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_resume_is_exact_with_another_number_of_threads(root: Path, stop: int) -> None:
    whole = Loader(root, "train", SMALL, batch_size=10, num_workers=2)
    expected = epoch_of(whole) + epoch_of(whole) + epoch_of(whole)
    first = Loader(root, "train", SMALL, batch_size=10, num_workers=3)
    seen = epoch_of(first)
    iterator = iter(first)
    for _ in range(stop):
        images, target = next(iterator)
        seen.append((images.clone(), target.clone()))
    state = json.loads(json.dumps(first.state_dict()))
    second = Loader(root, "train", SMALL, batch_size=10, num_workers=1, prefetch_factor=7)
    second.load_state_dict(state)
    if stop:
        second.set_epoch(1)  # scripts call it with the epoch they are in
    rest = epoch_of(second)
    assert len(seen) + len(rest) == 14
    rest += epoch_of(second)
    assert same(seen + rest, expected)


def test_state_at_the_end_of_an_epoch_is_the_next_epoch(root: Path) -> None:
    loader = Loader(root, "train", SMALL, batch_size=10)
    epoch_of(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["samples_done"]) == (1, 0)
    expected = epoch_of(loader)
    resumed = Loader(root, "train", SMALL, batch_size=10)
    resumed.load_state_dict(state)
    assert same(epoch_of(resumed), expected)


def test_a_state_of_other_data_or_settings_is_refused(root: Path) -> None:
    state = Loader(root, "train", SMALL).state_dict()
    with pytest.raises(StateError, match="seed"):
        Loader(root, "train", SMALL, seed=1).load_state_dict(state)
    with pytest.raises(StateError, match="index_id"):
        Loader(root, "val", EVAL, shuffle=True).load_state_dict(state)
    with pytest.raises(StateError, match="format version"):
        Loader(root, "train", SMALL).load_state_dict({"epoch": 3})


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_an_epoch_and_other_worlds_continue_it(root: Path, world_size: int) -> None:
    """A run on two ranks stops in the middle; world_size ranks go on with exactly the rest."""
    ids = v2.Compose([v2.Lambda(lambda image: torch.tensor(int(np.asarray(image).sum())))])

    def loaders(world: int) -> list[Loader]:
        with pytest.warns(LoaderNote):
            return [
                Loader(root, "train", ids, batch_size=6, rank=r, world_size=world)
                for r in range(world)
            ]

    begun = loaders(2)
    iterators = [iter(loader) for loader in begun]
    done = [next(it) for _ in range(2) for it in iterators]
    states = [loader.state_dict() for loader in begun]
    assert states[0] == states[1]
    assert states[0]["samples_done"] == 24
    rest = [batch for it in iterators for batch in it]
    continued = []
    lengths = []
    for loader in loaders(world_size):
        loader.load_state_dict(states[0])
        batches = list(loader)
        lengths.append(len(batches))
        continued += batches
    assert len(set(lengths)) == 1

    def flat(batches: list) -> Counter:
        return Counter(
            (value, label)
            for x, t in batches
            for value, label in zip(x.tolist(), t.tolist(), strict=True)
        )

    assert flat(continued) == flat(rest)
    assert sum(flat(done).values()) == 24
    assert sum(flat(rest).values()) == 66 - 24  # 67 samples on two streams: one is left over


def test_validation_over_ranks_is_exact(root: Path) -> None:
    for world in (2, 3, 7):
        sizes = []
        labels: list[int] = []
        for rank in range(world):
            loader = Loader(root, "val", EVAL, batch_size=4, rank=rank, world_size=world)
            batches = [t.tolist() for _, t in loader]
            assert len(batches) == len(loader)
            sizes.append([len(b) for b in batches])
            labels += [label for b in batches for label in b]
        assert Counter(labels) == Counter(datasets.ImageFolder(str(root / "val")).targets)
        assert len({len(s) for s in sizes}) == 1
        assert all(max(column) - min(column) <= 1 for column in zip(*sizes, strict=True))
        assert all(min(column) > 0 for column in zip(*sizes, strict=True))


# ---- python rows and blocks ---------------------------------------------------------------------


def test_a_folder_of_pngs_is_decoded_by_pillow(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for i in range(20):
        folder = tmp_path / "train" / f"c{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image = photo_like(rng, 50 + i, 60)
        image = image.convert(("RGB", "L", "P", "RGBA")[i % 4])
        image.save(folder / f"{i}.png")
    reference = datasets.ImageFolder(str(tmp_path / "train"), EVAL)
    for workers in (1, 8):
        loader = Loader(tmp_path, "train", EVAL, batch_size=7, num_workers=workers, shuffle=False)
        assert torch.equal(
            torch.cat([x for x, _ in loader]), torch.stack([x for x, _ in reference])
        )
    assert loader.stats()["python_rows"] == 20
    # Random crops of python rows follow the draws of the core, too.
    a = epoch_of(Loader(tmp_path, "train", SMALL, batch_size=7, num_workers=1))
    assert same(epoch_of(Loader(tmp_path, "train", SMALL, batch_size=7, num_workers=8)), a)


def test_a_python_transform_in_the_middle(root: Path) -> None:
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(32),
            v1.RandomHorizontalFlip(),
            v1.ColorJitter(0.4, 0.4, 0.4),
            v1.ToTensor(),
            v1.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    with pytest.warns(LoaderNote, match="ColorJitter"):
        one = Loader(root, "train", transform, batch_size=10, num_workers=1)
    with pytest.warns(LoaderNote, match="ColorJitter"):
        eight = Loader(root, "train", transform, batch_size=10, num_workers=8)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    first = epoch_of(one)
    assert same(epoch_of(eight), first)
    assert not same(epoch_of(one), first)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert first[0][0].shape == (10, 3, 32, 32)
    # The crops are those of the same transform without the jitter.
    plain = v1.Compose([*transform.transforms[:2], v1.PILToTensor()])
    gentle = v1.Compose([*transform.transforms[:2], v1.ColorJitter(0, 0, 0), v1.PILToTensor()])
    with pytest.warns(LoaderNote):
        gentle_loader = Loader(root, "train", gentle, batch_size=10)
    assert same(epoch_of(gentle_loader), epoch_of(Loader(root, "train", plain, batch_size=10)))


def test_any_callable_is_a_transform(root: Path) -> None:
    reference = datasets.ImageFolder(str(root / "val"))

    def transform(image: Image.Image) -> dict:
        return {"size": torch.tensor(image.size), "mode": image.mode}

    with pytest.warns(LoaderNote, match="transform"):
        loader = Loader(root, "val", transform, batch_size=10, num_workers=4)
    sizes = torch.cat([x["size"] for x, _ in loader])
    assert [tuple(s) for s in sizes.tolist()] == [x.size for x, _ in reference]


class Decompressed(Source):
    """A source whose blocks only Python can make: here, four samples joined for each block."""

    def read_block(self, number: int) -> Block:
        encoded = [_generated_jpeg(4 * number + i) for i in range(4)]
        lengths = np.array([len(e) for e in encoded])
        gap = b"junk between samples"
        offsets = np.cumsum([0, *(lengths[:-1] + len(gap))])
        return Block(np.frombuffer(gap.join(encoded), np.uint8), offsets, lengths)


def blocks_source(kind: type[Source], num_samples: int = 40) -> Source:
    index = Index(
        file=np.arange(num_samples) // 4,
        offset=np.arange(num_samples) % 4,
        name=Names.from_strings(f"s{i}" for i in range(num_samples)),
        root="",
        files=Names.from_strings([]),
        classes=("a", "b"),
        label=np.arange(num_samples) % 2,
    )
    return kind("made here", index, python_blocks=True)


def _generated_jpeg(number: int) -> bytes:
    return jpeg_bytes(photo_like(np.random.default_rng(number), 64 + number, 50))


@pytest.mark.parametrize("shuffle", [False, True, "block"])
def test_a_source_that_hands_in_blocks(shuffle: bool | str, tmp_path: Path) -> None:
    size = 40
    source = blocks_source(Decompressed, size)
    for i in range(size):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{i:03d}.jpg").write_bytes(_generated_jpeg(i))
    folder = datasets.ImageFolder(str(tmp_path), EVAL)
    pixels = {x.numpy().tobytes(): i for i, (x, _) in enumerate(folder)}
    for workers in (1, 8):
        loader = Loader(source, "val", EVAL, batch_size=7, num_workers=workers, shuffle=shuffle)
        order = [pixels[x.numpy().tobytes()] for images, _ in loader for x in images]
        assert sorted(order) == list(range(size))
        assert (order == list(range(size))) == (shuffle is False)
        labels = [t for _, target in loader for t in target.tolist()]
        assert Counter(labels) == {0: 20, 1: 20}
    assert loader.stats()["python_blocks"] >= 20
    assert loader.dataset[9][0].shape == (3, 32, 32)


def test_a_block_that_fails_is_reported(tmp_path: Path) -> None:
    class Broken(Decompressed):
        def read_block(self, number: int) -> Block:
            if number == 2:
                raise ConnectionError("the bucket is gone")
            return super().read_block(number)

    loader = Loader(blocks_source(Broken), "val", EVAL, batch_size=4)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    with pytest.raises(SampleError, match=r"sample 8 \(s8\).*bucket is gone") as caught:
        next(iterator)
    assert isinstance(caught.value.__cause__, ConnectionError)


# ---- bad images ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    add_split(tmp_path, 12, 2, "train")
    victim = sorted((tmp_path / "train").rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:-200])
    return tmp_path


def test_a_damaged_image_raises_as_pillow_does(damaged: Path) -> None:
    loader = Loader(damaged, "train", EVAL, batch_size=2, shuffle=False)
    with pytest.raises(SampleError, match=r"sample 3 \(.*class_000.*truncated") as caught:
        list(loader)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.sample == 3


def test_the_users_pillow_settings_are_respected(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    reference = datasets.ImageFolder(str(damaged / "train"), EVAL)
    loader = Loader(damaged, "train", EVAL, batch_size=5, shuffle=False)
    assert torch.equal(torch.cat([x for x, _ in loader]), torch.stack([x for x, _ in reference]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    add_split(tmp_path, 12, 2, "train")
    loader = Loader(tmp_path, "train", EVAL, batch_size=2, shuffle=False)
    victim = Path(loader.dataset.samples[5][0])
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=victim.name):
        list(loader)


def test_images_of_different_sizes_say_what_to_do(root: Path) -> None:
    with pytest.warns(LoaderNote):
        loader = Loader(root, "val", v2.PILToTensor(), batch_size=4)
    with pytest.raises(CollateError, match=r"batch 0 can't be collated.*one size"):
        list(loader)


# ---- memory --------------------------------------------------------------------------------------


def test_a_slice_held_over_many_batches_never_changes(root: Path) -> None:
    loader = Loader(root, "train", SMALL, batch_size=2, num_workers=4, prefetch_factor=2)
    iterator = iter(loader)
    held = [next(iterator)[0][0, :, 3:5] for _ in range(3)]
    copies = [h.clone() for h in held]
    for _ in range(4):
        for _ in loader:
            pass
    assert all(torch.equal(h, c) for h, c in zip(held, copies, strict=True))


def test_memory_of_batches_is_used_again(root: Path) -> None:
    loader = Loader(root, "train", SMALL, batch_size=8, num_workers=2, prefetch_factor=2)
    addresses = {images.data_ptr() for _ in range(6) for images, _ in loader}
    assert len(addresses) <= 4  # two in the engine, one with the script, one on its way
    assert loader.memory_bytes == 4 * 8 * 3 * 32 * 32 + (64 << 20)
    assert loader.stats()["block_bytes_peak"] <= 64 << 20


def test_iterators_side_by_side_are_independent(root: Path) -> None:
    expected = epoch_of(Loader(root, "train", SMALL, batch_size=10))
    loader = Loader(root, "train", SMALL, batch_size=10, num_workers=2)
    first = iter(loader)
    head = [next(first) for _ in range(2)]
    second = epoch_of(loader)  # the next epoch, beside the first
    rest = [*head, *first]
    assert same([(x, t) for x, t in rest], expected)
    other = Loader(root, "train", SMALL, batch_size=10)
    other.set_epoch(1)
    assert same(second, epoch_of(other))


def test_two_threads_may_iterate_at_once(root: Path) -> None:
    loader = Loader(root, "val", EVAL, batch_size=4, num_workers=2)
    expected = epoch_of(loader)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(epoch_of(loader))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(same(result, expected) for result in results)


# ---- what a review found once --------------------------------------------------------------------


def pngs(root: Path, num: int) -> Path:
    for i in range(num):
        folder = root / "train" / f"c{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo_like(np.random.default_rng(i), 60, 50).save(folder / f"{i:03d}.png")
    return root


def test_idle_python_threads_stay_for_later_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_IDLE_S", 0.02)
    loader = Loader(
        pngs(tmp_path, 12), "train", EVAL, batch_size=1, num_workers=2, prefetch_factor=1
    )
    num = 0
    for _ in loader:
        time.sleep(0.03)
        num += 1
    assert num == 12


def test_batches_of_a_batch_sampler_may_grow(root: Path) -> None:
    class Growing(list):
        pass

    batches = Growing([[0, 1], [2]])
    dataset = datasets.ImageFolder(str(root / "train"), EVAL)
    loader = Loader(dataset, batch_sampler=batches, num_workers=2)
    assert [len(t) for _, t in loader] == [2, 1]
    batches[:] = [list(range(60)), [5]]
    got = epoch_of(loader)
    assert torch.equal(got[0][0], torch.stack([dataset[i][0] for i in range(60)]))


def test_repeated_samples_are_drawn_differently(root: Path) -> None:
    dataset = datasets.ImageFolder(str(root / "train"), SMALL)
    loader = Loader(dataset, batch_size=4, sampler=[7, 7, 7, 3], num_workers=3)
    ((images, target),) = epoch_of(loader)
    assert target[0] == target[1] == target[2]
    assert len({images[i].numpy().tobytes() for i in range(3)}) == 3
    again = Loader(dataset, batch_size=4, sampler=[7, 7, 7, 3], num_workers=1)
    assert same(epoch_of(again), [(images, target)])
    other = Loader(dataset, batch_size=4, sampler=[7, 7, 7, 3], rank=1, world_size=2)
    ((elsewhere, _),) = epoch_of(other)
    assert not torch.equal(elsewhere, images)


def test_samplers_say_what_they_say(root: Path) -> None:
    dataset = datasets.ImageFolder(str(root / "train"), EVAL)

    class Own(list):
        data_source = None  # an attribute that means something else here

    assert sum(len(t) for _, t in Loader(dataset, sampler=Own([3, 4]))) == 2
    part = torch.utils.data.SequentialSampler(range(10))
    assert sum(len(t) for _, t in Loader(dataset, sampler=part)) == 10

    def order(generator_seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(generator_seed)
        sampler = torch.utils.data.RandomSampler(dataset, generator=generator)
        return torch.cat([t for _, t in Loader(dataset, sampler=sampler)]).tolist()

    assert order(1) == order(1) != order(2)
    for drop_last, expected in ((True, [16, 16, 16, 16]), (False, [17, 17, 17, 16])):
        sizes = []
        for rank in range(4):
            sampler = torch.utils.data.distributed.DistributedSampler(
                dataset, num_replicas=4, rank=rank, shuffle=False, drop_last=drop_last
            )
            sizes.append(sum(len(t) for _, t in Loader(dataset, sampler=sampler)))
        assert sizes == expected
    assert len(Loader(root, "train", EVAL, rank=0, world_size=2).sampler) == 33


@pytest.mark.parametrize("arguments", [{"num_streams": 0}, {"num_streams": 2.5}, {"seed": 1.7}])
def test_numbers_are_checked_at_once(root: Path, arguments: dict) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        Loader(root, "train", EVAL, **arguments)


@pytest.mark.parametrize("wrong", [-5_000_000_000, -1, 1 << 40])
def test_wrong_offsets_of_a_python_block_are_refused(wrong: int) -> None:
    class Wrong(Decompressed):
        def read_block(self, number: int) -> Block:
            block = super().read_block(number)
            return Block(block.bytes, np.array([wrong, *block.offsets[1:]]), block.lengths)

    with pytest.raises(SampleError, match="sample 0"):
        list(Loader(blocks_source(Wrong), "val", EVAL, batch_size=4))


def test_python_blocks_are_not_all_asked_for_at_once() -> None:
    asked: list[int] = []

    class Counting(Decompressed):
        def read_block(self, number: int) -> Block:
            asked.append(number)
            block = super().read_block(number % 4)
            return Block(np.resize(block.bytes, 20 << 20), block.offsets, block.lengths)

    loader = Loader(blocks_source(Counting, 160), "val", EVAL, batch_size=4, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    time.sleep(0.2)
    assert len(asked) < 12  # of 40: three batches are prepared, 64 MB and two threads ahead
    assert sum(len(t) for _, t in iterator) == 156
    assert loader.stats()["block_bytes_peak"] < 200 << 20


def test_an_exception_without_a_text_is_a_failure_too(root: Path) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def transform(image: Image.Image) -> None:
        raise Mute

    with pytest.warns(LoaderNote):
        loader = Loader(root, "val", transform, batch_size=4)
    with pytest.raises(SampleError, match="Mute"):
        list(loader)


def test_a_transform_may_look_at_the_dataset(root: Path) -> None:
    other = Loader(root, "train", EVAL)

    def mixed(image: Image.Image) -> torch.Tensor:
        partner = other.dataset[random.randrange(len(other.dataset))][0]
        return EVAL(image) // 2 + partner // 2

    def collate(samples: list) -> torch.Tensor:
        return samples[0][0] + loader.dataset[1][0]

    with pytest.warns(LoaderNote):
        loader = Loader(root, "val", mixed, batch_size=4, num_workers=2, collate_fn=collate)
    assert len(list(loader)) == 6


def test_a_time_out_is_an_error(root: Path) -> None:
    def slow(image: Image.Image) -> torch.Tensor:
        time.sleep(1.0)
        return torch.zeros(1)

    with pytest.warns(LoaderNote):
        loader = Loader(root, "val", slow, batch_size=20, num_workers=1, timeout=0.2)
    with pytest.raises(RuntimeError, match=r"timeout=0\.2"):
        next(iter(loader))


def test_closing_a_loader_while_it_is_iterated_is_seen(root: Path) -> None:
    loader = Loader(root, "train", EVAL, batch_size=4, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    with pytest.raises(LoaderClosedError):
        list(iterator)
    assert len(list(loader)) == 17


def test_an_epoch_that_could_not_begin_is_not_lost(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(root, "train", EVAL, batch_size=10)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = Loader(root, "train", EVAL, batch_size=10)
    resumed.load_state_dict(state)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_new_workers", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            iter(resumed)
    assert resumed.state_dict() == state
    assert same(epoch_of(resumed), [(x, t) for x, t in iterator])


def test_counters_are_there_after_a_break(root: Path) -> None:
    loader = Loader(root, "train", EVAL, batch_size=4, num_workers=2)
    for _ in loader:
        break
    assert loader.stats()["decode_samples"] >= 4


class FakeStream:
    """What the feeder asks of torch.cuda, in the order it asks; copies happen at once."""

    device = torch.device("cpu")

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        assert event.recorded


class FakeEvent:
    recorded = False

    def record(self, stream: object) -> None:
        self.recorded = True


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_device_stage_gives_the_same_bits_and_an_exact_state(
    root: Path, monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(32),
            v1.ToTensor(),
            v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    settings = {"batch_size": 10, "memory_format": memory_format}
    expected = epoch_of(Loader(root, "train", transform, **settings))
    monkeypatch.setattr("imagenet_seq.options.cuda_device", lambda device: device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    loader = Loader(root, "train", transform, device=torch.device("cpu"), **settings)
    assert loader._table_on_device
    got = []
    for number, (images, target) in enumerate(loader):
        assert images.is_contiguous(memory_format=memory_format)
        got.append((images.clone(), target.clone()))
        state = loader.state_dict()
        done = min(10 * (number + 1), 67)
        if number < 6:
            assert (state["epoch"], state["samples_done"]) == (0, done)
    assert (loader.state_dict()["epoch"], loader.state_dict()["samples_done"]) == (1, 0)
    assert same(got, expected)


@pytest.mark.usefixtures("fake_cuda")
def test_the_device_stage_raises_in_turn(damaged: Path) -> None:
    loader = Loader(damaged, "train", EVAL, batch_size=1, shuffle=False)
    pairs = ((batch, lambda: None) for batch in loader)
    feeder = CudaFeeder(pairs, FakeStream(), None, depth=2)
    for _ in range(3):
        next(feeder)
    for _ in range(2):
        with pytest.raises(SampleError, match="sample 3"):
            next(feeder)
