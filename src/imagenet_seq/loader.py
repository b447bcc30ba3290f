"""The Loader: PyTorch's DataLoader with one word changed."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagenet_seq import native, options
from imagenet_seq.batch.iterator import EpochIterator
from imagenet_seq.batch.memory import Memory, PagedMemory, PinnedMemory
from imagenet_seq.batch.progress import PlanAhead, Progress
from imagenet_seq.batch.work import Work
from imagenet_seq.batch.workers import Workers
from imagenet_seq.dataset import Dataset, resolve_dataset
from imagenet_seq.decode.pipeline import memory_shape
from imagenet_seq.decode.transforms import interpret
from imagenet_seq.device import CudaFeeder, stay_on_cpu
from imagenet_seq.errors import StateError
from imagenet_seq.index.cache import OnError
from imagenet_seq.machine import available_cores, find_ranks, node_ranks, note_once, say_once
from imagenet_seq.native.recipe import Rows
from imagenet_seq.plan.epoch import EnginePlan, in_windows
from imagenet_seq.plan.order import Order
from imagenet_seq.plan.schedule import Schedule
from imagenet_seq.plan.state import State, check_state
from imagenet_seq.read import arrange
from imagenet_seq.read.budget import ram_budget
from imagenet_seq.read.forecast import FORECAST_BYTES, Forecast, Pace, forecast_reading
from imagenet_seq.read.options import ReadOptions

_DEFAULT_BATCH_SIZE = options.Default(256)
_LONG_PLAN = 100_000  # samples whose plan takes long enough to be made ahead


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
        rank, world_size: of this process; None: from torch.distributed, else from the environment
            of torchrun, mpirun or srun.
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
        shuffle_blocks: blocks pooled and mixed together by a block shuffle, over all ranks. Where
            the source decides how large its blocks are (parquet), as many as have those bytes.
        num_streams: independent runs the order is cut into, one for each rank; None: world_size.
            Part of the state: a run that continues on another number of ranks keeps it.
        ram: memory for data that stays from epoch to epoch, for all ranks of the node together:
            "auto", "48GB", "30%", a number of bytes, or 0. "auto": data that fits in half of what
            is available is read through the page cache; of larger data that much is kept. What is
            kept is read once; each epoch reads exactly the rest. Never changes the order.
        reading: `ReadOptions`: the kind of disk, readers, block size, checksums. None: what suits
            the disk.
        on_error: what to do with samples that the source's index can't hold (a tar member that
            is cut short, a label out of range): "fail" raises a DataError, "skip" leaves them out
            and says so. It is about indexing; an image that can't be decoded always raises.
        forecast: print one line before the first batch: what the disk allows. For data of less than
            100 MB nothing is printed.
        worker_init_fn, multiprocessing_context, persistent_workers, pin_memory_device, in_order,
            snapshot_every_n_steps: accepted for scripts that pass them; threads have no use for
                them.

    Attributes:
        dataset: the samples: `len`, `classes`, `class_to_idx`, `samples`, `targets`, and
            ``dataset[i]`` for a look at one.
        sampler: the sampler that was passed, or one with `set_epoch` and `len`.
        batch_sampler, batch_size, drop_last, num_workers, collate_fn, pin_memory, timeout,
            generator, prefetch_factor, persistent_workers: as they were passed; batch_size is None
            beside a batch_sampler.
        memory_bytes: bound of what one iteration holds in memory.

    Raises:
        ValueError, TypeError: an argument is not what it should be; the message says what was
            expected.
        FileNotFoundError: nothing that can be read lies at the path; says what was looked for.
        DataError: an index or a pack is damaged.
    """

    def __init__(
        self,
        dataset: Any = None,
        split: options.Split | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        batch_size: int | None = _DEFAULT_BATCH_SIZE,
        shuffle: bool | options.Shuffle | None = None,
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
        exact: options.Exact = "crop",
        pillow: str | None = None,
        shuffle_blocks: int = 64,
        num_streams: int | None = None,
        ram: str | int | float | None = "auto",
        reading: ReadOptions | None = None,
        on_error: OnError = "fail",
        forecast: bool = True,
    ) -> None:
        options.check_arguments(locals())
        self._read_options = reading or ReadOptions()
        if not isinstance(self._read_options, ReadOptions):
            raise TypeError(f"expected ReadOptions(...) for reading, got {reading!r}")
        ram_budget(ram, dataset_bytes=0)  # raises for what is no amount of memory
        self._ram = ram
        if worker_init_fn is not None:
            note_once("worker_init_fn is not called: there are no worker processes")
        self._source, found_split, own_transform, own_target_transform = resolve_dataset(
            dataset, split, on_error
        )
        transform = transform if transform is not None else own_transform
        if transform is None and found_split is None:
            raise ValueError(
                "without a split there is no standard transform: pass split='train' or 'val', or "
                "transform="
            )
        self._rank, self._world_size = find_ranks(rank, world_size)
        num_samples = self._source.index.num_samples
        self._adopted = adopted = options.adopt_sampler(
            sampler, batch_sampler, shuffle, seed, num_samples
        )
        self._followed_epoch: int | None = None
        if adopted.followed is not None:
            if rank is not None and (rank, world_size) != (sampler.rank, sampler.num_replicas):
                raise ValueError(
                    f"rank {rank} of {world_size} was passed beside a DistributedSampler of rank "
                    f"{sampler.rank} of {sampler.num_replicas}; pass one of them"
                )
            self._rank, self._world_size = sampler.rank, sampler.num_replicas
        shuffled = found_split == "train" if adopted.shuffle is None else adopted.shuffle
        self._shuffle = options.shuffle_kind(shuffled, self._source)
        for note in (*self._source.notes, *options.notes_on_order(self._shuffle, self._source)):
            note_once(note)
        seed = adopted.seed
        if seed is None:
            seed = generator.initial_seed() if generator is not None else 0
        self._seed = int(seed) & 0xFFFF_FFFF_FFFF_FFFF
        self._num_streams = num_streams if num_streams is not None else self._world_size
        self._block_bytes = self._read_options.block_bytes
        self._shuffle_blocks = self._pooled_blocks(int(shuffle_blocks))
        self._device = options.cuda_device(device)
        self._channels_last = memory_format == torch.channels_last
        self._pipeline = interpret(
            transform,
            train=found_split == "train",
            dtype=dtype,
            channels_last=self._channels_last,
            pillow=pillow,
            strict=exact == "strict",
        )
        if self._pipeline.notes:
            note_once("; ".join(self._pipeline.notes))
        self._collate_fn = None if options.is_default_collate(collate_fn) else collate_fn
        self._table_on_device = (
            self._device is not None
            and self._pipeline.rows == Rows.DECODED
            and self._pipeline.table is not None
            and self._collate_fn is None
        )
        self._recipe = (
            self._pipeline.uint8_recipe if self._table_on_device else self._pipeline.recipe
        )
        self._target_transform = target_transform or own_target_transform
        self._num_threads = num_workers or available_cores()
        self._num_slots = prefetch_factor or 3
        self._timeout_s = timeout

        self._batch_size = int(batch_size or 1)
        self.batch_size = self._batch_size if batch_sampler is None else None
        self.num_workers = num_workers or 0
        self.drop_last = drop_last
        self.batch_sampler = batch_sampler
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self.timeout = timeout
        self.generator = generator
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.sampler = sampler if sampler is not None else options.EpochSampler(self)
        self.dataset = Dataset(self._source, self._pipeline, transform, self._target_transform)

        self._progress = Progress(epoch=0, ended=False)
        self._resumed = True  # the next iter() begins where _progress stands
        self._lock = threading.Lock()
        self._idle_workers: Workers | None = None
        self._memory: Memory | None = None
        self._memory_rows = 0
        self._pins = torch.cuda.is_available() and (pin_memory or self._device is not None)
        self._strategy: arrange.ReadStrategy | None = None
        self._reading: tuple[native.ReadConfig, tuple[str, ...]] | None = None
        self._ahead: PlanAhead | None = None
        self._forecast = forecast
        self._announced = False
        self._pace = Pace()
        self._stats: dict[str, int] = {}
        self._iterators: weakref.WeakSet[EpochIterator] = weakref.WeakSet()

    def _pooled_blocks(self, shuffle_blocks: int) -> int:
        """Return how many of the source's own blocks a block shuffle pools."""
        return arrange.blocks_of_pool(self._source, shuffle_blocks, self._block_bytes)

    # ---- the DataLoader surface ----

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.dataset!r}, batch_size={self.batch_size}, "
            f"shuffle={self._shuffle!r}, rank {self._rank} of {self._world_size})"
        )

    def __len__(self) -> int:
        """Return the number of batches an epoch has on this rank."""
        return self._schedule.num_batches

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or go on with the one that load_state_dict or set_epoch named."""
        self._follow_sampler()
        before = self._progress
        if self._resumed:
            progress = Progress(before.epoch, before.samples_done)
        else:
            progress = Progress(before.epoch + 1)
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

        def taken(workers: Workers, number: int) -> None:
            owner = loader() if number == plan_ahead_at else None
            if owner is not None:
                rows = owner._memory_rows if owner._arranged().reads_on else None
                owner._ahead = PlanAhead(Progress(progress.epoch + 1), workers, owner._plan, rows)

        def ended(workers: Workers | None, stats: dict[str, int]) -> None:
            progress.ended = workers is not None
            owner = loader()
            if owner is not None:
                owner._stats = stats or owner._stats
                workers = owner._keep(workers)
            if workers is not None:
                workers.close()

        with self._lock:
            workers, self._idle_workers = self._idle_workers, None
        workers = workers or self._new_workers()
        iterator = EpochIterator(
            workers,
            work,
            timeout_s=self._timeout_s,
            on_delivered=delivered,
            on_end=ended,
            on_taken=taken,
            prepared=ahead is not None and fits and ahead.is_prepared(workers),
        )
        # Only now: an epoch that could not begin is not an epoch that was begun.
        self._progress, self._resumed = progress, False
        self._iterators.add(iterator)
        if self._device is None:
            return stay_on_cpu(iterator, pin=self._pins)
        return CudaFeeder(iterator, *self._on_device, depth=2)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iter() epoch number `epoch`; a resumed position in that epoch is kept.

        Without it each iter() is the next epoch.
        """
        if epoch < 0:
            raise ValueError(f"expected an epoch of 0 or above, got {epoch}")
        if not (self._resumed and self._progress.epoch == epoch):
            self._progress = Progress(int(epoch))
            self._resumed = True

    def state_dict(self) -> dict[str, Any]:
        """Return where the script is, to the batch: plain numbers and strings, the same on every
        rank.

        Batches that were prepared but not yet handed to the script are not counted.
        """
        if self._schedule.is_explicit:
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
        if self._schedule.is_explicit:
            raise StateError("a loader that executes the order of a sampler can't load a state")
        saved = State.from_dict(state)
        check_state(self._state(saved.epoch, saved.samples_done), saved)
        if saved.num_streams != self._num_streams:
            # The run that began decides how its order is cut; other worlds deal the same order
            # again.
            self._num_streams = saved.num_streams
            self._close_idle_workers()  # made for another number of streams
        self._progress = Progress(saved.epoch, saved.samples_done)
        self._resumed = True

    def stats(self) -> dict[str, float]:
        """Return counters of the current or last epoch's engine.

        ``read_``: bytes, requests, seeks (requests that do not begin where the last one ended),
        requests past the page cache, bytes of all these that were found in it; and kept bytes,
        which were in memory and not read at all. ``decode_``: samples. ``batch_``: batches given to
        the script. ``python_``: rows and blocks that Python made. ``block_``: bytes of blocks in
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

        It begins with the bottleneck and for how much of the time training waited for data; then
        come how fast the disk read, of what it can do, and what came from memory.
        """
        return self._pace.line(self.stats(), self._arranged().speed, self._num_threads)

    def forecast(self) -> Forecast:
        """Return what disk and memory allow: bytes, seeks and minutes an epoch."""
        return forecast_reading(self._source, self._arranged(), self._schedule.order)

    @property
    def memory_bytes(self) -> int:
        """Bound of what one iteration holds in this rank's memory: batches, and blocks of data.

        What `ram` keeps for all ranks of the node is not counted here.

        The batches are those in the engine, the script's, and one on its way. On top come scratch
        memory of the threads (a few MB each), more batches that the script keeps, what a
        transform's Python part makes for the batches in the engine, and on a GPU up to three
        batches there.
        """
        shape, dtype = memory_shape(self._pipeline, self._recipe)
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
        if self._ahead is not None:
            self._ahead.wait()  # its thread would open the memory for kept blocks again
        self._close_idle_workers()
        self._strategy = None
        self._reading = None  # the memory goes with the last engine that uses it

    def _close_idle_workers(self) -> None:
        self._ahead = None  # it is in their engine, or made for another order
        with self._lock:
            workers, self._idle_workers = self._idle_workers, None
        if workers is not None:
            workers.close()

    # ---- one epoch ----

    def _follow_sampler(self) -> None:
        """A DistributedSampler's set_epoch decides, where the script calls it."""
        sampler = self._adopted.followed
        if sampler is not None and sampler.epoch != self._followed_epoch:
            if self._followed_epoch is not None or sampler.epoch != 0:
                self.set_epoch(sampler.epoch)
            self._followed_epoch = sampler.epoch

    def _keep(self, workers: Workers | None) -> Workers | None:
        """Keep idle workers for the next epoch, with their scratch memory; else return them."""
        with self._lock:
            if self._idle_workers is None:
                self._idle_workers, workers = workers, None
        return workers

    @property
    def _schedule(self) -> Schedule:
        """What decides the batches; follows `drop_last`, which a script may set."""
        order = Order(
            shuffle=self._shuffle,
            seed=self._seed,
            block_bytes=self._block_bytes,
            shuffle_blocks=self._shuffle_blocks,
            num_streams=self._num_streams,
            exact=self._shuffle == "none" and not self._adopted.drops_rest,
        )
        return Schedule(
            self._source.index,
            self._source.python_blocks,
            order,
            self._batch_size,
            self._rank,
            self._world_size,
            self.drop_last,
            self._adopted.executed,
            self.batch_sampler,
        )

    def _state(self, epoch: int, samples_done: int) -> State:
        pillow, order = self._pipeline.recipe.passes.name, self._schedule.order
        return State.of(self._source.index, order, pillow, epoch, samples_done)

    def _announce(self) -> None:
        """Tell the user how the source is read and what the disk allows, once."""
        strategy, (_, notes) = self._arranged(), self._opened()
        self._announced = True
        if strategy.notes or notes:
            note_once("; ".join(strategy.notes + notes))
        if self._forecast and strategy.data_bytes >= FORECAST_BYTES:
            say_once(self.forecast().line())

    def _arranged(self) -> arrange.ReadStrategy:
        """Decide how the source is read."""
        if self._strategy is None:
            order = None if self._schedule.is_explicit else self._schedule.order
            num_ranks = node_ranks(self._world_size)
            self._strategy = arrange.choose_strategy(
                self._source, self._ram, self._read_options, order, num_ranks
            )
        return self._strategy

    def _opened(self) -> tuple[native.ReadConfig, tuple[str, ...]]:
        """Open what the strategy needs; return what the engine is told, and notes."""
        if self._reading is None:
            self._reading = arrange.open_reading(self._source, self._arranged())
        return self._reading

    def _plan(self, progress: Progress) -> EnginePlan:
        made = self._schedule.plan(progress.epoch, progress.samples_done)
        window = self._arranged().window
        return in_windows(made, window) if window else made

    def _plan_ahead_at(self, epoch_plan: EnginePlan) -> int:
        """Return the batch with which to begin the next epoch's plan; -1: never.

        Well before the last blocks are read, so that the disk does not wait.
        """
        reading, num_batches = self._arranged(), len(epoch_plan.batch_begin) - 1
        if self._schedule.is_explicit or not num_batches:
            return -1
        if not reading.reads_on and len(self._source.index) < _LONG_PLAN:
            return -1
        ahead = self._block_budget() / max(1, reading.data_bytes // self._world_size)
        return max(0, int(num_batches * (0.9 - 1.5 * ahead)))

    def _work(self, progress: Progress, epoch_plan: EnginePlan | None) -> Work:
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
            shape, dtype = memory_shape(self._pipeline, self._recipe)
            if self._pins and self._pipeline.rows == Rows.DECODED:
                self._memory = PinnedMemory((rows, *shape), dtype)
            else:
                self._memory = PagedMemory((rows, *shape), dtype, keep=self._num_batches_held())
            self._memory_rows = rows
        return self._memory

    @functools.cached_property
    def _on_device(self) -> tuple[torch.cuda.Stream, Tensor | None]:
        """The side stream and the table on the GPU.

        One stream for all epochs: torch's allocator keeps freed memory for the stream that used it.
        """
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        table = self._pipeline.table if self._table_on_device else None
        return stream, None if table is None else table.to(self._device)

    def _new_workers(self) -> Workers:
        shape, dtype = memory_shape(self._pipeline, self._recipe)
        engine = native.Engine(
            self._recipe,
            num_decoders=self._num_threads,
            num_slots=self._num_slots,
            rows=self._pipeline.rows,
            row_bytes=int(np.prod(shape)) * dtype.itemsize,
            block_budget_bytes=self._block_budget(),
            verify_checksums=self._read_options.verify_checksums,
            reading=self._opened()[0],
        )
        return Workers(engine, self._num_threads)

    def _block_budget(self) -> int:
        return arrange.block_memory_bytes(self._source, self._schedule, self._arranged())
