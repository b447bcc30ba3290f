"""The Loader: PyTorch's DataLoader with one word changed."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from imagenet_seq import _native, batch, forecast, plan, read, transforms
from imagenet_seq.batch import Crew, EpochIterator, Memory, Work
from imagenet_seq.device import CudaFeeder, PagedMemory, PinnedMemory, pinned, to_device
from imagenet_seq.errors import StateError
from imagenet_seq.sources import SPLITS, Source, open_source, split_of
from imagenet_seq.sources.imagefolder import from_samples
from imagenet_seq.sources.scan import MIN_PERMUTED, OnError
from imagenet_seq.transforms import Rows

MB = 1 << 20
_OWN_CGROUPS = Path("/proc/self/cgroup")
_ADOPTED_SAMPLERS = {  # samplers whose order is ours, and where they keep what they sample from
    "torch.utils.data.distributed.DistributedSampler": "dataset",
    "torch.utils.data.sampler.SequentialSampler": "data_source",
    "torch.utils.data.sampler.RandomSampler": "data_source",
}
_READ_AHEAD_BYTES = 64 * MB  # beyond what the shuffle itself keeps in memory
_FILE_OVERHEAD_BYTES = 16 * 1024  # memory that a file takes beyond its bytes, about
_BLOCK_OVERHEAD_BYTES = 32 * 1024  # the same of a block: pages at both ends, steps of 16 KB
_LONG_PLAN = 100_000  # samples whose plan takes long enough to be made ahead
_MEAN_FILE_BYTES = 128 * 1024  # of files whose size is not known; ImageNet's are 110 KB


class LoaderNote(UserWarning):
    """Something to know: what runs in Python and why, what an argument no longer does."""


@dataclass
class _Progress:
    """How far an epoch has come; shared by the loader and the epoch's iterator."""

    epoch: int
    samples_done: int = 0  # that scripts have, over all ranks
    samples_end: int = -1  # samples_done after the last batch
    ended: bool = False  # the engine has no more; a device stage may still have some


class _Ahead:
    """The next epoch's plan, made while the present one is delivered."""

    def __init__(self, loader: Loader, progress: _Progress, crew: Crew) -> None:
        self.progress = progress
        self.crew = crew
        self.plan: plan.EnginePlan | None = None
        self.in_engine = False
        self.thread = threading.Thread(target=self._make, args=(loader,), name="imagenet-seq-plan")

    def _make(self, loader: Loader) -> None:
        with contextlib.suppress(Exception):  # what is wrong is said when the epoch begins
            made = loader._plan(self.progress)
            if loader._arranged().reads_on:
                self.crew.prepare(made, loader._memory_rows)
                self.in_engine = True
            self.plan = made

    def fits(self, progress: _Progress) -> bool:
        """Wait for the plan; return whether it is the one of an epoch that begins now."""
        self.thread.join()
        return self.plan is not None and self.progress == progress


class Loader:
    """Iterate over ImageNet in batches, as ``torch.utils.data.DataLoader`` does.

        loader = Loader("train", batch_size=256, num_workers=8)           # root from $IMAGENET
        loader = Loader(args.data, "train", transform, batch_size=256, num_workers=8, shuffle=True)
        loader = Loader(train_dataset, batch_size=256, sampler=train_sampler, num_workers=8)
        for images, target in loader: ...

    Threads of the native core read, decode and batch; there are no worker processes. Order and
    pixels depend on the arguments and the data alone: not on `num_workers`, `prefetch_factor`, or
    a resume. Each sample's random draws are keyed by (seed, epoch, sample).

    Memory: `memory_bytes` says how much the loader may hold at once.

    Args:
        dataset: a path, recognised by its content (a pack, class folders, the official archives,
            LMDB, WebDataset, ...: docs/sources.md; a folder, a file, or a pattern of files), or
            "train" or "val" with the root in $IMAGENET, or a torchvision ImageFolder or ImageNet
            dataset, or a torch Subset of one.
        split: "train" or "val"; chooses among what lies at the path and decides the defaults of
            shuffle and transform. None: what the name of the folder or file says.
        transform: torchvision transforms (v1 or v2), or any callable from a PIL image. The core
            runs the longest prefix it knows exactly; a note says what runs in Python. None: the
            standard ImageNet transforms of the split, or those of the dataset object.
        batch_size: samples a batch and rank.
        shuffle: None: True for train, False otherwise. True: block shuffle where samples are known
            to lie in random order (packs, and what their labels' runs show it of), a uniform
            permutation otherwise; "uniform" and "block" force one.
        sampler: a DistributedSampler's rank, seed, shuffle and drop_last are taken over and its
            set_epoch is followed; the order of any other sampler is executed.
        batch_sampler: its batches are executed.
        num_workers: decoding threads; 0 or None: one for every core available to this rank.
        collate_fn: gets a list of (image, target), as in torch. None: images and targets are
            stacked.
        pin_memory: put batches in page-locked memory (where CUDA is available).
        drop_last: drop a last batch that is smaller than the others.
        timeout: seconds to wait for a batch before a RuntimeError; 0: for ever.
        generator: its initial seed becomes `seed`, unless that is given.
        prefetch_factor: batches in memory ahead of the script, in total; None: 3.
        target_transform: applied to every label.
        seed: of order and augmentation.
        rank, world_size: of this process; None: from torch.distributed or torchrun's environment.
        device: "cuda" (or a GPU): batches come on it, copied on a side stream ahead of the script
            and normalised there, with the same bits as on the CPU. None or "cpu": batches stay on
            the CPU.
        dtype: of the images: torch.float32, float16 or bfloat16 in place of what the transform
            gives.
        memory_format: torch.contiguous_format or torch.channels_last.
        exact: "crop": only what a crop needs is decoded, so damage elsewhere in an *unpacked*
            file's data goes unnoticed; "strict": everything is decoded. Packs were decoded in full
            once, and damaged files otherwise give Pillow's result either way.
        pillow: the Pillow version whose resize rule is followed, such as "12"; None: the installed
            one's.
        block_bytes: size of a read from a pack.
        shuffle_blocks: blocks pooled and mixed together by a block shuffle, over all ranks. Where
            the source decides how large its blocks are (parquet), as many as have those bytes.
        num_streams: independent runs the order is cut into, one for each rank; None: world_size.
            Part of the state: a run that continues on another number of ranks keeps it.
        cache: the original project's name for the samples in the shuffle pool; sets shuffle_blocks.
            A uniform shuffle has no pool.
        cuda: the original project's name for device="cuda".
        verify_checksums: check the CRC-32C of every sample of a pack on its first read. Later
            epochs of this loader take it for granted.
        ram: memory for data that stays from epoch to epoch, for all ranks of the node together:
            "auto", "48GB", "30%", a number of bytes, or 0. "auto": data that fits in half of what
            is available is read through the page cache; of larger data that much is kept. What is
            kept is read once; each epoch reads exactly the rest. Never changes the order.
        disk: "auto", "hdd" (one process at a time, in turns) or "ssd" (several requests at a
            time). Also from the environment variable IMAGENET_SEQ_DISK.
        num_readers: threads that read; None: what suits the disk.
        direct: read past the page cache (O_DIRECT). None: where data is read in blocks and does not
            stay in the page cache.
        window: samples that are read in the order they lie on the disk and delivered in the order
            of the shuffle, where samples are read one by one. None: 4096 over the node's ranks on a
            hard disk, else 0.
        on_error: what to do with samples that the source's index can't hold (a tar member that
            is cut short, a label out of range): "fail" raises a DataError, "skip" leaves them out
            and says so. It is about indexing; an image that can't be decoded always raises.
        forecast: print one line before the first batch: what the disk allows. For data of less than
            100 MB nothing is printed.
        worker_init_fn, multiprocessing_context, persistent_workers, pin_memory_device, in_order,
            snapshot_every_n_steps: accepted for scripts that pass them; threads have no use for
                them.

    Raises:
        ValueError, TypeError: an argument is not what it should be; the message says what was
            expected.
        FileNotFoundError: nothing that can be read lies at the path; says what was looked for.
        DataError: an index or a pack is damaged.
    """

    def __init__(
        self,
        dataset: Any = None,
        split: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        batch_size: int | None = 256,
        shuffle: bool | str | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int | None = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        snapshot_every_n_steps: int | None = 1,
        target_transform: Callable[[int], Any] | None = None,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        exact: str = "crop",
        pillow: str | None = None,
        block_bytes: int = 16 * MB,
        shuffle_blocks: int = 64,
        num_streams: int | None = None,
        cache: int | None = None,
        cuda: bool = False,
        verify_checksums: bool = True,
        ram: str | int | float | None = "auto",
        disk: str = "auto",
        num_readers: int | None = None,
        direct: bool | None = None,
        window: int | None = None,
        on_error: OnError = "fail",
        forecast: bool = True,
    ) -> None:
        _check_arguments(
            split=split,
            transform=transform,
            batch_size=batch_size,
            batch_sampler=batch_sampler,
            sampler=sampler,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            timeout=timeout,
            memory_format=memory_format,
            exact=exact,
            on_error=on_error,
            block_bytes=block_bytes,
            shuffle_blocks=shuffle_blocks,
            cache=cache,
            num_streams=num_streams,
            seed=seed,
            num_readers=num_readers,
            window=window,
        )
        self._wishes = read.Wishes(ram, disk, num_readers, direct, window)
        self._wishes.check()
        if worker_init_fn is not None:
            _note("worker_init_fn is not called: there are no worker processes")
        self._source, split, own_transform, own_target_transform = _resolve_dataset(
            dataset, split, on_error
        )
        transform = transform if transform is not None else own_transform
        if transform is None and split is None:
            raise ValueError(
                "without a split there is no standard transform: pass split='train' or 'val', or "
                "transform="
            )
        self._rank, self._world_size = _ranks(rank, world_size)
        self._explicit_order, shuffle, drop_last, seed = self._adopt_sampler(
            sampler, batch_sampler, shuffle, drop_last, seed
        )
        if shuffle is None:
            shuffle = split == "train"
        self._shuffle = _shuffle_kind(shuffle, self._source)
        for note in (*self._source.notes, *_notes_on_order(self._shuffle, self._source)):
            _note(note)
        if seed is None:
            seed = generator.initial_seed() if generator is not None else 0
        self._seed = int(seed) & 0xFFFF_FFFF_FFFF_FFFF
        self._num_streams = num_streams if num_streams is not None else self._world_size
        self._block_bytes = block_bytes
        if cache is not None:
            shuffle_blocks = self._blocks_of_cache(cache, block_bytes)
        self._shuffle_blocks = read.blocks_of_pool(self._source, shuffle_blocks, block_bytes)
        self._device = _cuda_device("cuda" if cuda and device is None else device)
        self._channels_last = memory_format == torch.channels_last
        self._pipeline = transforms.interpret(
            transform,
            train=split == "train",
            dtype=dtype,
            channels_last=self._channels_last,
            pillow=pillow,
            strict=exact == "strict",
        )
        if self._pipeline.notes:
            _note("; ".join(self._pipeline.notes))
        decoded = self._pipeline.rows == Rows.DECODED
        self._table_on_device = (
            self._device is not None
            and decoded
            and self._pipeline.table is not None
            and _is_default_collate(collate_fn)
        )
        self._recipe = (
            self._pipeline.uint8_recipe if self._table_on_device else self._pipeline.recipe
        )
        self._target_transform = target_transform or own_target_transform
        self._collate_fn = None if _is_default_collate(collate_fn) else collate_fn
        self._num_threads = num_workers or _available_cores()
        self._num_slots = prefetch_factor or 3
        self._timeout_s = timeout
        self._verify_checksums = verify_checksums

        self._batch_size = batch_size or 1
        self.batch_size = batch_size if batch_sampler is None else None
        self.num_workers = num_workers or 0
        self.drop_last = drop_last
        self.batch_sampler = batch_sampler
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self.timeout = timeout
        self.generator = generator
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.sampler = sampler if sampler is not None else EpochSampler(self)
        self.dataset = Dataset(self._source, self._pipeline, transform, self._target_transform)

        self._progress = _Progress(epoch=0, ended=False)
        self._resumed = True  # the next iter() begins where _progress stands
        self._lock = threading.Lock()
        self._idle_crew: Crew | None = None
        self._memory: Memory | None = None
        self._memory_rows = 0
        self._pins = torch.cuda.is_available() and (pin_memory or self._device is not None)
        self._on_device: tuple[torch.cuda.Stream, Tensor | None] | None = None
        self._reading: read.Reading | None = None
        self._ahead: _Ahead | None = None
        self._forecast = forecast
        self._announced = False
        self._pace = read.Pace()
        self._stats: dict[str, int] = {}
        self._iterators: weakref.WeakSet[EpochIterator] = weakref.WeakSet()

    # ---- arguments that need the loader ----

    def _adopt_sampler(
        self,
        sampler: Any,
        batch_sampler: Any,
        shuffle: bool | str | None,
        drop_last: bool,
        seed: int | None,
    ) -> tuple[Any, bool | str | None, bool, int | None]:
        """Take over what a torch sampler says; return (order, shuffle, drop_last, seed)."""
        self._followed_sampler: Any = None
        self._leave_over = False  # in an order that is not shuffled
        if batch_sampler is not None:
            return batch_sampler, False, drop_last, seed
        if sampler is None:
            return None, shuffle, drop_last, seed
        kind = f"{type(sampler).__module__}.{type(sampler).__qualname__}"
        data = getattr(sampler, _ADOPTED_SAMPLERS.get(kind, ""), ())
        if len(data) != self._source.index.num_samples:
            # Not one we know, or made for something else: a subset, say.
            return sampler, False, drop_last, seed
        if kind == "torch.utils.data.distributed.DistributedSampler":
            self._rank, self._world_size = sampler.rank, sampler.num_replicas
            self._followed_sampler = sampler
            self._followed_epoch: int | None = None
            self._leave_over = bool(sampler.drop_last)
            return None, sampler.shuffle, drop_last, sampler.seed if seed is None else seed
        if kind == "torch.utils.data.sampler.SequentialSampler":
            return None, False, drop_last, seed
        if kind == "torch.utils.data.sampler.RandomSampler" and not (
            sampler.replacement or sampler.num_samples != len(data)
        ):
            if seed is None and sampler.generator is not None:
                seed = sampler.generator.initial_seed()
            return None, True, drop_last, seed
        return sampler, False, drop_last, seed

    def _blocks_of_cache(self, cache: int, block_bytes: int) -> int:
        """Return the blocks that hold about `cache` samples."""
        length = self._source.index.length
        if length is None or len(length) == 0:
            return 64
        mean_bytes = max(1.0, float(np.mean(length[:65536])))
        return max(1, round(cache * mean_bytes / block_bytes))

    # ---- the DataLoader surface ----

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.dataset!r}, batch_size={self.batch_size}, "
            f"shuffle={self._shuffle!r}, rank {self._rank} of {self._world_size})"
        )

    def __len__(self) -> int:
        """Return the number of batches an epoch has on this rank."""
        if self._explicit_order is not None:
            if self.batch_sampler is not None:
                return len(self.batch_sampler)
            full, rest = divmod(len(self._explicit_order), self._batch_size)
            return full + (rest > 0 and not self.drop_last)
        size = plan.epoch_size(len(self.dataset), self._order())
        begins = plan.batch_begins(size, self._batch_size, self._world_size, self.drop_last)
        return len(begins) - 1

    def _num_samples(self) -> int:
        size = plan.epoch_size(len(self.dataset), self._order())
        return size // self._world_size + (self._rank < size % self._world_size)

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or go on with the one that load_state_dict or set_epoch named."""
        self._follow_sampler()
        before = self._progress
        if self._resumed:
            progress = _Progress(before.epoch, before.samples_done)
        else:
            progress = _Progress(before.epoch + 1)
        if not self._announced:
            self._announce()
        ahead, self._ahead = self._ahead, None
        fits = ahead is not None and ahead.fits(progress)
        work = self._work(progress, ahead.plan if ahead is not None and fits else None)
        progress.samples_end = int(work.plan.samples_done[-1])

        def delivered(number: int) -> None:
            progress.samples_done = int(work.plan.samples_done[number + 1])

        # The iterator outlives the loader in `for batch in Loader(...)`, and must not keep it.
        loader = weakref.ref(self)
        plan_ahead_at = self._plan_ahead_at(work.plan)

        def taken(crew: Crew, number: int) -> None:
            owner = loader() if number == plan_ahead_at else None
            if owner is not None:
                owner._ahead = _Ahead(owner, _Progress(progress.epoch + 1), crew)
                owner._ahead.thread.start()

        def ended(crew: Crew | None, stats: dict[str, int]) -> None:
            progress.ended = crew is not None
            owner = loader()
            if owner is not None:
                owner._stats = stats or owner._stats
                crew = owner._keep(crew)
            if crew is not None:
                crew.close()

        with self._lock:
            crew, self._idle_crew = self._idle_crew, None
        crew = crew or self._new_crew()
        iterator = EpochIterator(
            crew,
            work,
            timeout_s=self._timeout_s,
            on_delivered=delivered,
            on_end=ended,
            on_taken=taken,
            on_stall=_note,
            prepared=ahead is not None and fits and ahead.in_engine and ahead.crew is crew,
        )
        # Only now: an epoch that could not begin is not an epoch that was begun.
        self._progress, self._resumed = progress, False
        self._iterators.add(iterator)
        if self._device is None:
            return _delivering(iterator, pin=self._pins)
        stream, table = self._device_state(self._device)
        return CudaFeeder(iterator, stream, table, depth=2)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iter() epoch number `epoch`; a resumed position in that epoch is kept.

        Without it each iter() is the next epoch.
        """
        if epoch < 0:
            raise ValueError(f"expected an epoch of 0 or above, got {epoch}")
        if not (self._resumed and self._progress.epoch == epoch):
            self._progress = _Progress(int(epoch))
            self._resumed = True

    def state_dict(self) -> dict[str, Any]:
        """Return where the script is, to the batch: plain numbers and strings, the same on every
        rank.

        Batches that were prepared but not yet handed to the script are not counted.
        """
        if self._explicit_order is not None:
            raise StateError(
                "a loader that executes the order of a sampler has no state: the order is the "
                "sampler's. Use shuffle=True or a DistributedSampler"
            )
        progress = self._progress
        if progress.ended and progress.samples_done == progress.samples_end:
            return self._state(progress.epoch + 1, 0).to_dict()
        return self._state(progress.epoch, progress.samples_done).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, bit for bit, on any number of ranks and threads.

        Raises:
            StateError: the state was taken on other data or with other settings of order or seed;
                says expected and got.
        """
        if self._explicit_order is not None:
            raise StateError("a loader that executes the order of a sampler can't load a state")
        saved = plan.State.from_dict(state)
        plan.check_state(self._state(saved.epoch, saved.samples_done), saved)
        if saved.num_streams != self._num_streams:
            # The run that began decides how its order is cut; other worlds deal the same order
            # again.
            self._num_streams = saved.num_streams
            self._close_idle_crew()  # made for another number of streams
        self._progress = _Progress(saved.epoch, saved.samples_done)
        self._resumed = True

    def stats(self) -> dict[str, float]:
        """Return counters of the current or last epoch's engine.

        ``read_``: bytes, requests, seeks (requests that do not begin where the last one ended),
        requests past the page cache, bytes of all these that were found in it; and kept bytes,
        which were in memory and not read at all. ``decode_``: samples. ``batch_``: batches given to
        the script. ``foreign_``: rows and blocks that Python made. ``block_``: bytes of blocks in
        memory, now and at most, and their bound. ``kept_``: bytes and blocks that stay in memory,
        of all ranks of the node. ``*_s``: seconds a stage worked or waited for another, summed over
        threads.
        """
        for iterator in list(self._iterators):
            self._stats = iterator.stats() or self._stats
        return {
            (name[:-3] + "_s" if name.endswith("_ns") else name): (
                value / 1e9 if name.endswith("_ns") else value
            )
            for name, value in self._stats.items()
        }

    def progress_line(self) -> str:
        """Return one line on what happened since the last call: for a script's own log.

        How fast the disk read, against what it can do; what came from memory; how full the memory
        for blocks is; and which share of the time who waited for whom.
        """
        reading = self._arranged()
        return self._pace.line(self.stats(), reading, self._num_threads)

    def forecast(self) -> forecast.Forecast:
        """Return what disk and memory allow: bytes, seeks and minutes an epoch."""
        reading = self._arranged()
        return read.forecast_of(
            self._source,
            reading,
            num_samples=plan.epoch_size(len(self.dataset), self._order()),
            block_bytes=self._block_bytes,
            order={"block": "blocks", "none": "sequence"}.get(self._shuffle, "files"),
        )

    @property
    def memory_bytes(self) -> int:
        """Bound of what one iteration holds in this rank's memory: batches, and blocks of data.

        What `ram` keeps for all ranks of the node is not counted here.

        The batches are those in the engine, the script's, and one on its way. On top come scratch
        memory of the threads (a few MB each), more batches that the script keeps, what a
        transform's Python part makes for the batches in the engine, and on a GPU up to three
        batches there.
        """
        shape, dtype = batch.memory_shape(self._pipeline, self._recipe)
        rows = max(self._batch_size, self._memory_rows)
        row_bytes = int(np.prod(shape)) * dtype.itemsize
        return self._num_batches_held() * rows * row_bytes + self._block_budget()

    def _num_batches_held(self) -> int:
        return self._num_slots + 2  # the script's, and one on its way to it

    def close(self) -> None:
        """End the threads of every epoch in progress, and give memory for kept blocks back.

        Later iteration starts new ones.
        """
        for iterator in list(self._iterators):
            iterator.close()
        self._close_idle_crew()
        self._reading = None  # the memory goes with the last engine that uses it

    def _close_idle_crew(self) -> None:
        self._ahead = None  # it is in that crew's engine, or made for another order
        with self._lock:
            crew, self._idle_crew = self._idle_crew, None
        if crew is not None:
            crew.close()

    # ---- one epoch ----

    def _follow_sampler(self) -> None:
        """A DistributedSampler's set_epoch decides, where the script calls it."""
        sampler = self._followed_sampler
        if sampler is not None and sampler.epoch != self._followed_epoch:
            if self._followed_epoch is not None or sampler.epoch != 0:
                self.set_epoch(sampler.epoch)
            self._followed_epoch = sampler.epoch

    def _keep(self, crew: Crew | None) -> Crew | None:
        """Keep one idle crew for the next epoch, with its scratch memory; return another one."""
        with self._lock:
            if self._idle_crew is None:
                self._idle_crew, crew = crew, None
        return crew

    def _order(self) -> plan.Order:
        return plan.Order(
            shuffle=self._shuffle,
            seed=self._seed,
            block_bytes=self._block_bytes,
            shuffle_blocks=self._shuffle_blocks,
            num_streams=self._num_streams,
            exact=self._shuffle == "none" and not self._leave_over,
        )

    def _state(self, epoch: int, samples_done: int) -> plan.State:
        rule = self._pipeline.recipe.passes.name
        return plan.State.of(self._source.index, self._order(), rule, epoch, samples_done)

    def _announce(self) -> None:
        """Tell the user how the source is read and what the disk allows, once."""
        reading, self._announced = self._arranged(), True
        if reading.notes:
            _note("; ".join(reading.notes))
        if self._forecast and reading.data_bytes >= read.FORECAST_BYTES:
            _say(self.forecast().line())

    def _arranged(self) -> read.Reading:
        """Decide how the source is read."""
        if self._reading is None:
            index = self._source.index
            by_sample = self._explicit_order is not None or not plan.reads_blocks(
                index, self._order()
            )
            self._reading = read.arrange(
                self._source,
                self._wishes,
                in_blocks=not by_sample and index.length is not None,
                units="samples" if by_sample else f"blocks of {self._block_bytes}",
                num_ranks=_node_ranks(self._world_size),
            )
        return self._reading

    def _plan(self, progress: _Progress) -> plan.EnginePlan:
        made = self._plan_of_order(progress)
        window = self._arranged().window
        return plan.in_windows(made, window) if window else made

    def _plan_ahead_at(self, epoch_plan: plan.EnginePlan) -> int:
        """Return the batch with which to begin the next epoch's plan; -1: never.

        Well before the last blocks are read, so that the disk does not wait.
        """
        reading, num_batches = self._arranged(), len(epoch_plan.batch_begin) - 1
        if self._explicit_order is not None or not num_batches:
            return -1
        if not reading.reads_on and len(self._source.index) < _LONG_PLAN:
            return -1
        ahead = self._block_budget() / max(1, reading.data_bytes // self._world_size)
        return max(0, int(num_batches * (0.9 - 1.5 * ahead)))

    def _plan_of_order(self, progress: _Progress) -> plan.EnginePlan:
        index, foreign = self._source.index, self._source.foreign
        if self._explicit_order is None:
            return plan.rank_plan(
                index,
                self._order(),
                progress.epoch,
                batch_size=self._batch_size,
                rank=self._rank,
                world_size=self._world_size,
                drop_last=self.drop_last,
                samples_done=progress.samples_done,
                foreign=foreign,
            )
        if self.batch_sampler is not None:
            batches = [list(indices) for indices in self.batch_sampler]
            begins = np.cumsum([0, *map(len, batches)])
            samples = np.fromiter((i for indices in batches for i in indices), np.int64)
        else:
            samples = np.fromiter(self._explicit_order, np.int64)
            begins = np.append(np.arange(0, len(samples), self._batch_size), len(samples))
            if self.drop_last:
                begins = np.arange(0, len(samples) + 1, self._batch_size)
                samples = samples[: begins[-1]]
        return plan.explicit_plan(
            index,
            samples,
            begins,
            seed=self._seed,
            epoch=progress.epoch,
            rank=self._rank,
            block_bytes=self._block_bytes,
            foreign=foreign,
        )

    def _work(self, progress: _Progress, epoch_plan: plan.EnginePlan | None) -> Work:
        epoch_plan = epoch_plan or self._plan(progress)
        rows = self._batch_size
        if self.batch_sampler is not None:  # its batches may be of any size
            rows = int(np.diff(epoch_plan.batch_begin).max(initial=1))
        return Work(
            plan=epoch_plan,
            source=self._source,
            pipeline=self._pipeline,
            recipe=self._recipe,
            memory=self._batch_memory(rows),
            target_transform=self._target_transform,
            collate_fn=self._collate_fn,
        )

    def _batch_memory(self, rows: int) -> Memory:
        """Return where batches of up to `rows` rows come from."""
        if self._memory is None or self._memory_rows < rows:
            shape, dtype = batch.memory_shape(self._pipeline, self._recipe)
            if self._pins and self._pipeline.rows == Rows.DECODED:
                self._memory = PinnedMemory((rows, *shape), dtype)
            else:
                self._memory = PagedMemory((rows, *shape), dtype, keep=self._num_batches_held())
            self._memory_rows = rows
        return self._memory

    def _device_state(self, device: torch.device) -> tuple[torch.cuda.Stream, Tensor | None]:
        """Return the side stream and the table on the GPU.

        One stream for all epochs: torch's allocator keeps freed memory for the stream that used it.
        """
        if self._on_device is None:
            table = self._pipeline.table if self._table_on_device else None
            self._on_device = (
                torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
                None if table is None else table.to(device),
            )
        return self._on_device

    def _new_crew(self) -> Crew:
        shape, dtype = batch.memory_shape(self._pipeline, self._recipe)
        engine = _native.Engine(
            self._recipe,
            num_decoders=self._num_threads,
            num_slots=self._num_slots,
            rows=self._pipeline.rows,
            row_bytes=int(np.prod(shape)) * dtype.itemsize,
            block_budget_bytes=self._block_budget(),
            verify_checksums=self._verify_checksums,
            reading=self._arranged().native,
        )
        return Crew(engine, self._num_threads)

    def _block_budget(self) -> int:
        """Return the bound of block memory.

        A block shuffle has a pool, and half as many blocks read ahead of it; windows are two: one
        in use and one being read.
        """
        source = self._source
        if self._shuffle != "block" or (source.index.length is None and not source.foreign):
            window = min(self._arranged().window, len(self._source.index))
            return max(_READ_AHEAD_BYTES, 2 * window * (self._mean_bytes() + _FILE_OVERHEAD_BYTES))
        # Global positions go to streams and to ranks in turn, so this many streams meet a rank.
        streams = self._num_streams // math.gcd(self._num_streams, self._world_size)
        pool_blocks = self._order().pool_blocks
        num_blocks = streams * (pool_blocks + max(2, pool_blocks // 2))
        block_bytes = read.mean_block_bytes(source, self._block_bytes)
        return num_blocks * (block_bytes + _BLOCK_OVERHEAD_BYTES)

    def _mean_bytes(self) -> int:
        num_samples = max(1, len(self._source.index))
        return self._arranged().data_bytes // num_samples or _MEAN_FILE_BYTES


def _delivering(iterator: EpochIterator, pin: bool) -> Iterator[Any]:
    for prepared, delivered in iterator:
        delivered()
        yield to_device(prepared, pinned) if pin else prepared


class ImagenetLoader(Loader):
    """The original project's name for `Loader`; all its call forms work.

    ``ImagenetLoader('train', batch_size=..., num_workers=...)``,
    ``ImagenetLoader(root, 'train', transform, batch_size=..., num_workers=..., cache=...,
    shuffle=True)``.
    """


class EpochSampler:
    """Stands in for ``loader.sampler`` in scripts that call ``loader.sampler.set_epoch(epoch)``."""

    def __init__(self, loader: Loader) -> None:
        self._loader = weakref.ref(loader)

    def __len__(self) -> int:
        """Return the samples of an epoch on this rank."""
        loader = self._loader()
        return 0 if loader is None else loader._num_samples()

    def set_epoch(self, epoch: int) -> None:
        """Forward to `Loader.set_epoch`."""
        loader = self._loader()
        if loader is not None:
            loader.set_epoch(epoch)


class Dataset(Sequence[Any]):
    """The samples behind a loader, as torchvision's ImageFolder shows them.

    ``dataset[i]`` is (image, target) through the loader's transform, with the draws of epoch 0; it
    reads one file and is meant for a look, not for training.
    """

    def __init__(
        self,
        source: Source,
        pipeline: transforms.Pipeline,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[int], Any] | None,
    ) -> None:
        self._source, self._pipeline = source, pipeline
        self.transform = transform
        self.target_transform = target_transform
        index = source.index
        self.root = index.root
        self.classes = list(index.classes)
        self.class_to_idx = index.class_to_idx
        self.samples = index.samples
        self.imgs = index.samples
        self.targets = index.targets

    def __len__(self) -> int:
        return self._source.index.num_samples

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"expected a sample from 0 to {len(self) - 1}, got {number}")
        number %= len(self)
        image = batch.one_sample(self._pipeline, self.encoded(number), (0, 0, number))
        label = self.targets[number]
        return image, label if self.target_transform is None else self.target_transform(label)

    def encoded(self, index: int) -> bytes:
        """Return the bytes of a sample's image file."""
        columns = self._source.index
        offset = int(columns.offset[index])
        length = -1 if columns.length is None else int(columns.length[index])
        if self._source.foreign:
            block = self._source.read_block(int(columns.file[index]))
            begin = int(block.offsets[offset])
            return bytes(block.bytes[begin : begin + int(block.lengths[offset])])
        with open(os.path.join(columns.root, columns.files[columns.file[index]]), "rb") as file:
            file.seek(offset)
            return file.read(length)

    def __repr__(self) -> str:
        return f"Dataset({self._source.kind} at {self.root!r}, {len(self)} samples)"


def _check_arguments(**given: Any) -> None:
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


def _resolve_dataset(
    dataset: Any, split: str | None, on_error: OnError
) -> tuple[Source, str | None, Callable[[Any], Any] | None, Callable[[int], Any] | None]:
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
        return source, split or _split_of_path(path), None, None
    if isinstance(dataset, Source):
        return dataset, split, None, None
    return _from_torch_dataset(dataset, split, on_error)


def _split_of_path(path: str) -> str | None:
    """Return the split of a path that is called "train" or "val", or is of files that are."""
    name = os.path.basename(path)
    if os.path.isdir(path):
        return name if name in SPLITS else None
    return split_of(name)


def _from_torch_dataset(
    dataset: Any, split: str | None, on_error: OnError
) -> tuple[Source, str | None, Callable[[Any], Any] | None, Callable[[int], Any] | None]:
    if type(dataset) is torch.utils.data.Subset:
        source, split, transform, target_transform = _resolve_dataset(
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
    return (
        source,
        split or getattr(dataset, "split", None),
        dataset.transform,
        dataset.target_transform,
    )


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if (rank is None) != (world_size is None):
        raise ValueError("pass rank and world_size together, or neither")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
        else:  # torchrun's environment
            rank = int(os.environ.get("RANK", "0"))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank {rank} of {world_size}")
    return rank, world_size


def _node_ranks(world_size: int) -> int:
    """Return the number of ranks on this node, as far as the launcher says."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return max(1, min(int(os.environ[name]), world_size))
    return world_size


def _shuffle_kind(shuffle: bool | str, source: Source) -> str:
    """Return the plan's word for a shuffle: "block" by itself only where the data is permuted."""
    if isinstance(shuffle, str):
        return shuffle
    if not shuffle:
        return "none"
    return "block" if source.permuted else "uniform"


def _notes_on_order(shuffle: str, source: Source) -> list[str]:
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
    if shuffle == "uniform" and source.foreign:
        return [
            f"{where}a uniform shuffle reads a whole block of this {source.kind} for every image: "
            f"{packing}; or pass shuffle='block' where they do already"
        ]
    return []


def _cuda_device(device: torch.device | str | int | None) -> torch.device | None:
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


def _is_default_collate(collate_fn: Any) -> bool:
    return collate_fn is None or collate_fn is torch.utils.data.default_collate


def _available_cores() -> int:
    """Return the cores of this rank: affinity and cgroup quota, divided among the node's ranks."""
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    cores = min(cores, _cgroup_cores())
    return max(1, int(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = _OWN_CGROUPS) -> float:
    """Return the least CPU quota of this process's cgroups (version 2) in cores, or infinity."""
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    cores = math.inf
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota = "max"
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
        if folder == root:
            break
    return cores


def _say(line: str) -> None:
    """Print a line once a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _note(message: str) -> None:
    """Tell the user once a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(message, LoaderNote, stacklevel=3)
