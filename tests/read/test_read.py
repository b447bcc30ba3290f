"""The read stage: an engine's exact requests, reading on, windows, kept blocks, bad disks.

Every sample's bytes are compared with what was written to its file, so a block that is read from
the wrong place, into the wrong memory, or given back too early fails whatever was requested.
"""

from __future__ import annotations

import fcntl
import gc
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms as v1
from torchvision.transforms import v2

from imagenet_seq import loader as loader_module
from imagenet_seq import native
from imagenet_seq.batch import iterator
from imagenet_seq.errors import LoaderClosedError, SampleError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.index.source import Source
from imagenet_seq.loader import Loader
from imagenet_seq.machine import LoaderNote
from imagenet_seq.native.recipe import Geometry, Recipe, Rows
from imagenet_seq.pack.packing import pack_dataset
from imagenet_seq.plan.epoch import EnginePlan, explicit_plan, in_windows, rank_plan
from imagenet_seq.plan.order import Order
from imagenet_seq.read import arrange, disk
from imagenet_seq.read import kept as ram
from imagenet_seq.read.options import ReadOptions
from imagenet_seq.read.speed import Speed, reads_direct
from imagenet_seq.read.turns import lock_path
from imagenet_seq.sources.recognise import open_source

BLOCK_BYTES = 20_000
BATCH_SIZE = 16
HEADER_BYTES = 512  # between samples, as in a tar
DEADLINE_S = 30  # far above what anything here takes; a hang fails instead of stopping the suite
AMPLE_BYTES = 1 << 24
ANY_RECIPE = Recipe(Geometry.FIXED_CROP, 1, 1)  # no pixels are made

Request = tuple[int, int, int, int]  # epoch, file, offset, length


class Data:
    """Samples of random bytes in files of a folder, and their index."""

    def __init__(self, folder: Path, num_samples: int, num_files: int, *, as_pack: bool) -> None:
        rng = np.random.default_rng(num_samples)
        self.bytes = [rng.bytes(int(size)) for size in rng.integers(1, 3000, num_samples)]
        number = np.arange(num_samples)
        file = number * num_files // num_samples
        files = [f"file-{i}" for i in range(num_files)]
        length = np.array(list(map(len, self.bytes)))
        offset = np.zeros(num_samples, np.int64)
        for i in rng.permutation(num_files):  # numbers say nothing of where files lie
            with open(folder / files[i], "wb") as out:
                for sample in number[file == i]:
                    out.write(b"h" * HEADER_BYTES * as_pack)
                    offset[sample] = out.tell()
                    out.write(self.bytes[sample])
                out.flush()
                os.fsync(out.fileno())  # a file gets its place on the disk when it is written there
        self.index = Index(
            file=file,
            offset=offset,
            name=Names.from_strings(f"sample_{i}" for i in number),
            root=str(folder),
            files=Names.from_strings(files),
            length=length if as_pack else None,
            checksum=np.array(list(map(native.crc32c, self.bytes))) if as_pack else None,
        )

    def forget(self) -> None:
        """Have the next read go to the disk, where the system does as it is asked."""
        for path in map(self.path, range(len(self.index.files))):
            with open(path, "rb") as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def path(self, file: int) -> str:
        return os.path.join(self.index.root, self.index.files[file])

    def plan(self, epoch: int = 0, shuffle: str = "block", **options: object) -> EnginePlan:
        order = Order(
            shuffle=shuffle,
            seed=3,
            block_bytes=BLOCK_BYTES,
            shuffle_blocks=4,
            num_streams=int(options.get("world_size", 1)),
        )
        return rank_plan(self.index, order, epoch, batch_size=BATCH_SIZE, **options)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("pack"), 300, 4, as_pack=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("folder"), 90, 90, as_pack=False)


@pytest.fixture
def lock(tmp_path: Path) -> str:
    return str(tmp_path / "disk.lock")


class Rig:
    """An engine, and a thread that takes every sample's bytes as it does for Python transforms."""

    def __init__(self, data: Data, *, budget_bytes: int = AMPLE_BYTES, **reading: object) -> None:
        self._bytes = data.bytes
        self._rows = np.zeros((2, BATCH_SIZE), np.uint8)
        self.engine = native.Engine(
            ANY_RECIPE,
            num_decoders=2,
            num_slots=len(self._rows),
            rows=Rows.FROM_BYTES,
            row_bytes=1,
            block_budget_bytes=budget_bytes,
            verify_checksums=True,
            reading=native.ReadConfig(record_requests=True, **reading),
        )
        self.right: set[int] = set()  # positions of the plan whose bytes were right
        self.requested: list[native.Request] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while (task := self.engine.take(1.0)) is not None:
            if task:
                if task.encoded() == self._bytes[task.sample]:
                    self.right.add(task.position)
                self.engine.finish_row(task.ticket)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def prepare(self, plan: EnginePlan) -> None:
        self.engine.prepare(plan, BATCH_SIZE)

    def start(self, plan: EnginePlan | None) -> None:
        self.right.clear()
        self.engine.start(plan, [row.ctypes.data for row in self._rows], BATCH_SIZE)

    def batch(self) -> bool:
        """Take a batch, all of whose bytes must have been right; False at the end."""
        batch = self.engine.next(DEADLINE_S, lambda sample: f"name of {sample}")
        assert batch is not False
        if batch is None:
            return False
        assert self.right.issuperset(range(batch.begin, batch.end))
        self.engine.release(batch.slot, self._rows[batch.slot].ctypes.data)
        return True

    def finish(self) -> int:
        """Take the remaining batches and return how many there were."""
        num_batches = 0
        while self.batch():
            num_batches += 1
        return num_batches

    def epoch(self, plan: EnginePlan) -> list[Request]:
        """Deliver a plan whole; return what was read since the last look."""
        self.start(plan)
        assert self.finish() == len(plan.batch_begin) - 1
        return self.requests()

    def requests(self) -> list[Request]:
        """What was read since the last look; `requested` has all of it."""
        found = self.engine.requests()
        self.requested += found
        return [(r.epoch, r.file, r.offset, r.length) for r in found]

    def wait_for_requests(
        self, count: int, epoch: int | None = None, within_s: float = DEADLINE_S
    ) -> list[Request]:
        """Wait until so many requests were made since the last look, and a little for any more.

        epoch: only requests of this epoch count, and are returned.
        """

        def wanted() -> list[Request]:
            return [r for r in self.requests() if epoch is None or r[0] == epoch]

        found = wanted()
        until = time.monotonic() + within_s
        while len(found) < count and time.monotonic() < until:
            time.sleep(0.002)
            found += wanted()
        time.sleep(0.05)
        return found + wanted()

    def wait_until_pending(self) -> tuple[float, str, int]:
        """Wait until a reader waits for the disk; return for how long, path and offset."""
        until = time.monotonic() + DEADLINE_S
        while (pending := self.engine.pending()) is None and time.monotonic() < until:
            time.sleep(0.002)
        assert pending is not None
        return pending

    def stat(self, name: str) -> int:
        return self.engine.stats()[name]


def blocks_of(plan: EnginePlan, data: Data | None = None) -> list[Request]:
    """The requests that read a plan's blocks, one for each, in the plan's order."""
    lengths = plan.block_length
    if data is not None:  # files of unknown length
        lengths = np.array([len(data.bytes[_sample_of(plan, b)]) for b in range(len(lengths))])
    columns = plan.block_file, plan.block_offset, lengths
    return [(plan.epoch, *map(int, block)) for block in zip(*columns, strict=True)]


BLOCK_OVERHEAD_BYTES = 512  # at most, of what the engine notes of a block


def memory_bytes(blocks: list[Request]) -> list[int]:
    """What each block takes of memory without what is noted of it: whole pages, in 16 KB steps."""
    pages = [(o // 4096 * 4096, -(-(o + length) // 4096) * 4096) for *_, o, length in blocks]
    return [-(-(end - begin) // (16 << 10)) * (16 << 10) for begin, end in pages]


def most_bytes(blocks: list[Request]) -> int:
    """More than which they don't take together."""
    return sum(memory_bytes(blocks)) + BLOCK_OVERHEAD_BYTES * len(blocks)


def _sample_of(plan: EnginePlan, block: int) -> int:
    return int(plan.sample[np.flatnonzero(plan.block == block)[0]])


@contextmanager
def held(path: str) -> Iterator[None]:
    """Another program has the disk."""
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", ["block", "none"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_block_is_one_request_in_the_plans_order(pack: Data, shuffle: str, direct: bool) -> None:
    plan = pack.plan(shuffle=shuffle)
    works = direct and reads_direct(pack.path(0))
    with Rig(pack, direct=direct) as rig:
        requests = rig.epoch(plan)
        assert requests == blocks_of(plan)
        assert len(requests) > 20
        assert {r.direct for r in rig.requested} == {works}
        assert {r.locked for r in rig.requested} == {0}
        assert rig.stat("read_direct_requests") == works * len(requests)
        assert rig.stat("read_requests") == len(requests)
        assert rig.stat("read_bytes") == sum(length for *_, length in requests)
        follows = [a[1] == b[1] and a[2] + a[3] == b[2] for a, b in pairwise(requests)]
        assert rig.stat("read_seeks") == len(requests) - sum(follows)
        assert rig.stat("block_bytes") == 0


def test_blocks_are_read_in_order_with_the_least_memory(pack: Data) -> None:
    plan = pack.plan()
    with Rig(pack, budget_bytes=0) as rig:
        assert rig.epoch(plan) == blocks_of(plan)
        assert 0 < rig.stat("block_bytes_peak") <= bytes_of_open_batches(plan)


def bytes_of_open_batches(plan: EnginePlan) -> int:
    """The most bytes of blocks that two batches, one behind the other, lie in."""
    begins = [*plan.batch_begin, plan.batch_begin[-1]]
    blocks = blocks_of(plan)
    needed = []
    for begin, end in zip(begins[:-2], begins[2:], strict=True):
        seen = set(plan.block[:end]) & set(plan.block[begin:])
        needed.append(most_bytes([blocks[block] for block in seen]))
    return max(needed)


def test_several_readers_read_every_block_once(pack: Data) -> None:
    plan = pack.plan()
    with Rig(pack, num_readers=4) as rig:
        assert sorted(rig.epoch(plan)) == sorted(blocks_of(plan))


def test_samples_read_one_by_one(pack: Data) -> None:
    for plan in (pack.plan(shuffle="uniform"), explicit(pack, [5, 6, 7, 200, 5, 299])):
        with Rig(pack) as rig:
            assert rig.epoch(plan) == blocks_of(plan)


def explicit(data: Data, samples: list[int]) -> EnginePlan:
    plan = explicit_plan(data.index, samples, [0, len(samples)], seed=3, epoch=0)
    assert plan.block_length[0] > len(data.bytes[5]) + len(data.bytes[6])  # 5, 6 and 7 are one
    return plan


def test_readers_of_one_disk_take_turns(pack: Data, lock: str) -> None:
    if not reads_direct(pack.path(0)):
        pytest.skip("what the page cache has needs no turn, and here all of it is there")
    plan = pack.plan()
    with Rig(pack, direct=True, disk_lock=lock) as rig:
        with held(lock):
            rig.start(plan)
            before = rig.wait_until_pending()
            assert rig.wait_for_requests(0) == []
            after = rig.wait_until_pending()
            assert before[1:] == after[1:] == (pack.path(plan.block_file[0]), plan.block_offset[0])
            assert after[0] >= before[0] + 0.05
        assert rig.finish() == len(plan.batch_begin) - 1
        assert rig.requests() == blocks_of(plan)
        assert {r.locked for r in rig.requested} == {1}
        assert rig.stat("read_lock_wait_ns") > 0.04 * 1e9
        assert rig.engine.pending() is None
        with held(lock):  # who has nothing to read does not keep the disk
            pass


def test_two_engines_in_turns(pack: Data, lock: str) -> None:
    plans = [pack.plan(rank=rank, world_size=2) for rank in (0, 1)]
    reading = {"direct": True, "disk_lock": lock}
    with Rig(pack, **reading) as first, Rig(pack, **reading) as second:
        for rig, plan in zip((first, second), plans, strict=True):
            rig.start(plan)
        for rig, plan in zip((first, second), plans, strict=True):
            assert rig.finish() == len(plan.batch_begin) - 1
            assert rig.requests() == blocks_of(plan)
            assert all(r.locked or r.cached for r in rig.requested)


def test_what_the_page_cache_has_needs_no_turn(pack: Data, lock: str) -> None:
    plan = pack.plan()
    with Rig(pack) as rig:
        rig.epoch(plan)  # now it is there
    with held(lock), Rig(pack, disk_lock=lock) as rig:
        rig.start(plan)
        requests = rig.wait_for_requests(len(plan.block_file), within_s=1.0)
        if not requests:
            pytest.skip("this file system can't say what is in the page cache")
        assert requests == blocks_of(plan)
        assert {(r.cached, r.locked) for r in rig.requested} == {(1, 0)}
        assert rig.stat("read_cached_bytes") == rig.stat("read_bytes") == sum(plan.block_length)
        assert rig.finish() == len(plan.batch_begin) - 1


# ---- reading on into the next epoch --------------------------------------------------------------


def test_the_next_plan_is_read_before_it_starts(pack: Data) -> None:
    plans = [pack.plan(epoch) for epoch in range(3)]
    with Rig(pack) as rig:
        rig.start(plans[0])
        for ahead in plans[1:]:
            rig.prepare(ahead)
            rig.batch()
            both = blocks_of(plans[0]) * (ahead.epoch == 1) + blocks_of(ahead)
            assert rig.wait_for_requests(len(both)) == both
            assert rig.stat("block_bytes") >= sum(ahead.block_length)
            rig.finish()
            rig.start(None)
        assert rig.finish() == len(plans[2].batch_begin) - 1
        assert rig.requests() == []  # nothing is read twice
        assert rig.stat("block_bytes") == 0


def test_reading_on_stays_within_the_budget(pack: Data) -> None:
    # Enough for two batches, and half a block more, so that it does not matter what is noted.
    budget_bytes = 7 * (32 << 10) + (16 << 10) - 4096
    plans = [pack.plan(epoch, "none") for epoch in range(4)]
    with Rig(pack, budget_bytes=budget_bytes) as rig:
        rig.start(plans[0])
        for ahead in plans[1:]:
            rig.prepare(ahead)
            rig.finish()
            # Of all that was planned only what fits is there before the start.
            sizes = np.cumsum(memory_bytes(blocks_of(ahead)))
            num_early = int(np.searchsorted(sizes, budget_bytes, "right"))
            early = rig.wait_for_requests(num_early, ahead.epoch)
            assert early == blocks_of(ahead)[:num_early]
            rig.start(None)
        rig.finish()
        rig.requests()
        made = [(r.epoch, r.file, r.offset, r.length) for r in rig.requested]
        assert made == [block for plan in plans for block in blocks_of(plan)]
        assert rig.stat("block_bytes") == 0
        # A block may get memory that was used before and is larger than it needs.
        assert rig.stat("block_bytes_peak") <= budget_bytes + (32 << 10)


def test_another_plan_drops_the_prepared_one(pack: Data) -> None:
    with Rig(pack) as rig:
        rig.epoch(pack.plan(0))
        rig.prepare(pack.plan(1))
        expected = blocks_of(pack.plan(1))
        assert rig.wait_for_requests(len(expected)) == expected
        assert rig.epoch(pack.plan(7)) == blocks_of(pack.plan(7))
        assert rig.stat("block_bytes") == 0
        with pytest.raises(ValueError, match="no plan was prepared"):
            rig.start(None)


def test_a_prepared_plan_replaces_another(pack: Data) -> None:
    with Rig(pack) as rig:
        rig.prepare(pack.plan(1))  # before any plan was started
        expected = blocks_of(pack.plan(1))
        assert rig.wait_for_requests(len(expected)) == expected
        for epoch in (2, 3):
            rig.prepare(pack.plan(epoch))
            expected = blocks_of(pack.plan(epoch))
            assert rig.wait_for_requests(len(expected)) == expected
        read = blocks_of(pack.plan(3))
        assert sum(memory_bytes(read)) < rig.stat("block_bytes") <= most_bytes(read)
        rig.start(None)
        assert rig.finish() == len(pack.plan(3).batch_begin) - 1
        assert rig.requests() == []
        assert rig.stat("block_bytes") == 0


def test_a_plan_dropped_while_it_is_read(pack: Data, lock: str) -> None:
    """Whatever a reader is doing just then."""
    with Rig(pack, disk_lock=lock) as rig:
        for epoch in range(40):
            rig.prepare(pack.plan(epoch + 100))
            time.sleep(0.0003 * (epoch % 5))
            rig.start(pack.plan(epoch))
            if epoch % 2:
                rig.prepare(pack.plan(epoch + 200))
            rig.finish()
        rig.prepare(pack.plan(1, world_size=2))  # of another size
        rig.start(None)
        rig.finish()
        assert rig.stat("block_bytes") == 0


@pytest.mark.parametrize("pause_s", [0, 0.0005, 0.003])
def test_close_while_reading_on(pack: Data, pause_s: float) -> None:
    for _ in range(5):
        with Rig(pack, num_readers=2) as rig:
            rig.epoch(pack.plan(0))
            rig.prepare(pack.plan(1))
            time.sleep(pause_s)
            rig.engine.close()
            assert rig.stat("block_bytes") == 0
            rig.prepare(pack.plan(2))  # too late, and no error
            with pytest.raises(LoaderClosedError):
                rig.batch()


def test_closing_does_not_wait_for_a_turn(pack: Data, lock: str) -> None:
    if not reads_direct(pack.path(0)):
        pytest.skip("what the page cache has needs no turn, and here all of it is there")
    with held(lock), Rig(pack, direct=True, disk_lock=lock) as rig:
        rig.prepare(pack.plan(1))
        rig.start(pack.plan(0))
        rig.wait_until_pending()
        assert rig.wait_for_requests(0) == []
        began = time.monotonic()
        rig.engine.close()
        assert time.monotonic() - began < 4.5  # patience with other readers is 5 s
        assert rig.requests() == []


def test_python_blocks_are_not_made_ahead(pack: Data) -> None:
    index = replace(pack.index, offset=np.arange(300) - pack.index.file * 75, checksum=None)
    order = Order(shuffle="none")
    plan = rank_plan(index, order, 1, batch_size=BATCH_SIZE, python_blocks=True)
    rows = np.zeros(BATCH_SIZE, np.uint8)
    engine = native.Engine(
        ANY_RECIPE,
        num_decoders=1,
        num_slots=1,
        rows=Rows.FROM_BYTES,
        row_bytes=1,
        block_budget_bytes=AMPLE_BYTES,
        verify_checksums=True,
    )
    engine.prepare(plan, BATCH_SIZE)
    assert engine.take(0.05) is False
    engine.start(None, [rows.ctypes.data], BATCH_SIZE)
    task = engine.take(DEADLINE_S)
    assert task
    assert (task.kind, task.sample) == (native.TASK_BLOCK, 0)
    engine.close()


# ---- windows -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(0, 1500),
    window=st.integers(1, 3000),
    num_files=st.sampled_from([0, 1, 3]),
    batch_size=st.integers(1, 700),
)
def test_windows_change_the_order_of_reading_only(
    num_samples: int, window: int, num_files: int, batch_size: int
) -> None:
    number = np.arange(num_samples)
    names = Names.from_strings(map(str, range(num_samples)))
    index = Index(
        file=number % num_files if num_files else number,
        offset=number * 10 if num_files else number * 0,
        length=np.full(num_samples, 10) if num_files else None,
        name=names,
        root="",
        files=names,
    )
    plan = rank_plan(index, Order(), 5, batch_size=batch_size)
    made = in_windows(plan, window)
    begins = made.window_begin
    assert begins is not None
    assert (begins[0], begins[-1]) == (0, len(plan.block_file))
    sizes = np.diff(begins).tolist()
    assert sizes[:-1] == [min(256 << i, window) for i in range(len(sizes[:-1]))]
    assert all(size <= min(256 << i, window) for i, size in enumerate(sizes))
    columns = ("block_file", "block_offset", "block_length", "block_key")
    for begin, end in pairwise(begins):
        before, after = (
            list(zip(*(getattr(p, name)[begin:end].tolist() for name in columns), strict=True))
            for p in (plan, made)
        )
        assert after == sorted(before)  # by file and offset
    for name in columns:  # what is delivered stays
        assert np.array_equal(getattr(made, name)[made.block], getattr(plan, name)[plan.block])
    for name in ("sample", "offset", "length", "batch_begin", "samples_done", "path_begin"):
        assert np.array_equal(getattr(made, name), getattr(plan, name))


def as_they_lie(data: Data, plan: EnginePlan) -> list[Request]:
    """What is to be read of files in windows: each window in the order of addresses, or inodes."""
    requests = blocks_of(plan, data)
    begins = plan.window_begin
    assert begins is not None

    def place(request: Request) -> tuple[int, int]:
        path = data.path(int(plan.sample[plan.block == requests.index(request)][0]))
        return native.look_up(path)[1], os.stat(path).st_ino

    return [r for begin, end in pairwise(begins) for r in sorted(requests[begin:end], key=place)]


def test_files_of_a_window_are_looked_up_and_then_read_as_they_lie(folder: Data, lock: str) -> None:
    folder.forget()
    plan = in_windows(folder.plan(shuffle="uniform"), 25)
    expected = as_they_lie(folder, plan)
    assert expected != blocks_of(plan, folder)
    with Rig(folder, disk_lock=lock) as rig:
        assert rig.epoch(plan) == expected
        assert rig.stat("read_lookups") == 90
        assert all(r.locked or r.cached for r in rig.requested)
        assert {r.direct for r in rig.requested} == {0}
        assert rig.stat("block_bytes") == 0
        plans = [in_windows(folder.plan(epoch, "uniform"), 25) for epoch in (1, 2)]
        rig.start(plans[0])
        rig.prepare(plans[1])  # is looked up and read ahead as well
        rig.batch()
        both = as_they_lie(folder, plans[0]) + as_they_lie(folder, plans[1])
        assert rig.wait_for_requests(len(both)) == both
        rig.finish()
        rig.start(None)
        assert rig.finish() == 6
        assert rig.requests() == []


def test_several_readers_of_windows(folder: Data) -> None:
    plan = in_windows(folder.plan(shuffle="uniform"), 25)
    with Rig(folder, num_readers=3) as rig:
        assert sorted(rig.epoch(plan)) == sorted(blocks_of(plan, folder))


def test_ranges_of_files_in_windows_need_no_look_up(pack: Data) -> None:
    plan = in_windows(pack.plan(shuffle="uniform"), 60)
    with Rig(pack) as rig:
        assert rig.epoch(plan) == blocks_of(plan)
        assert rig.stat("read_lookups") == 0


@pytest.mark.parametrize("num_windows", [0, 2])
def test_windows_need_no_more_memory_than_two(folder: Data, num_windows: int) -> None:
    plan = in_windows(folder.plan(shuffle="uniform"), 30)
    blocks = blocks_of(plan, folder)
    windows = [most_bytes(blocks[begin : begin + 30]) for begin in (0, 30, 60)]
    most = max(windows[0] + windows[1], windows[1] + windows[2])
    with Rig(folder, budget_bytes=num_windows * max(windows)) as rig:
        rig.epoch(plan)
        # A file's size is not known before it is opened: 128 KB are reserved for the first.
        assert rig.stat("block_bytes_peak") <= max(most, num_windows * max(windows)) + (128 << 10)


def test_a_missing_file_of_a_window_fails_its_own_sample_only(tmp_path: Path, lock: str) -> None:
    data = Data(tmp_path, 60, 60, as_pack=False)
    plan = in_windows(data.plan(shuffle="uniform"), 30)
    position = 40
    gone = int(plan.sample[position])
    os.unlink(data.path(gone))
    with Rig(data, disk_lock=lock) as rig:
        rig.start(plan)
        assert [rig.batch(), rig.batch()] == [True, True]
        with pytest.raises(FileNotFoundError, match=rf"name of {gone}.*{data.path(gone)}"):
            rig.batch()
        rest = set(range(48)) - {position}
        until = time.monotonic() + DEADLINE_S
        while not rig.right >= rest and time.monotonic() < until:
            time.sleep(0.002)
        assert rest <= rig.right
        assert position not in rig.right


def test_closing_while_files_are_looked_up(folder: Data, lock: str) -> None:
    with held(lock), Rig(folder, disk_lock=lock) as rig:
        rig.start(in_windows(folder.plan(shuffle="uniform"), 25))
        assert os.path.dirname(rig.wait_until_pending()[1]) == folder.index.root
        assert rig.wait_for_requests(0) == []
        began = time.monotonic()
        rig.engine.close()
        assert time.monotonic() - began < 4.5
        assert rig.stat("read_lookups") <= 1


# ---- kept blocks ---------------------------------------------------------------------------------


@contextmanager
def kept_memory(data: Data, arena_bytes: int, name: str) -> Iterator[dict[str, object]]:
    """What `Reading` needs to keep blocks."""
    keys = len(data.index)
    size = native.kept_table_bytes(keys) + arena_bytes
    memory = ram.open_kept(f"{os.getpid()} {name}", size)
    assert memory.size_bytes >= size
    try:
        yield {"kept": memory, "kept_keys": keys}
    finally:
        memory.close()


def kept_keys(plan: EnginePlan, arena_bytes: int) -> set[int]:
    """First come, first kept, in whole pages, as long as there is room."""
    kept, used = set(), 0
    for key, offset, length in zip(
        plan.block_key.tolist(), plan.block_offset.tolist(), plan.block_length.tolist(), strict=True
    ):
        pages = -(-(offset + length) // 4096) - offset // 4096
        if key >= 0 and key not in kept and used + pages * 4096 <= arena_bytes:
            kept.add(key)
            used += pages * 4096
    return kept


@pytest.mark.parametrize("shuffle", ["block", "uniform"])
def test_of_half_the_set_each_epoch_reads_exactly_the_rest(pack: Data, shuffle: str) -> None:
    plans = [pack.plan(epoch, shuffle) for epoch in range(3)]
    arena_bytes = sum(plans[0].block_length) // 2 // 4096 * 4096
    kept = kept_keys(plans[0], arena_bytes)
    assert 5 < len(kept) < len(plans[0].block_key) - 5
    with kept_memory(pack, arena_bytes, f"half {shuffle}") as memory, Rig(pack, **memory) as rig:
        assert rig.epoch(plans[0]) == blocks_of(plans[0])
        kept_bytes = 0
        assert rig.stat("read_kept_bytes") == 0
        assert rig.stat("kept_blocks") == len(kept)
        for epoch in (1, 2):
            plan, is_kept = plans[epoch], np.isin(plans[epoch].block_key, list(kept))
            expected = [b for b, k in zip(blocks_of(plan), is_kept, strict=True) if not k]
            assert rig.epoch(plan) == expected
            kept_bytes += int(sum(plan.block_length[is_kept]))
            assert rig.stat("read_kept_bytes") == kept_bytes
            assert rig.stat("block_bytes") == 0


def test_files_of_unknown_length_are_kept(folder: Data) -> None:
    plans = [in_windows(folder.plan(epoch, "uniform"), 25) for epoch in (0, 1)]
    with kept_memory(folder, 90 * 4096, "folder") as memory, Rig(folder, **memory) as rig:
        assert rig.epoch(plans[0]) == as_they_lie(folder, plans[0])
        assert rig.epoch(plans[1]) == []
        assert rig.stat("read_kept_bytes") == sum(map(len, folder.bytes))
        assert rig.stat("read_lookups") == 90  # where a kept file lies is no matter


def test_reading_on_takes_what_is_kept(pack: Data) -> None:
    arena_bytes = sum(pack.plan().block_length) // 2 // 4096 * 4096
    kept = kept_keys(pack.plan(), arena_bytes)
    with kept_memory(pack, arena_bytes, "ahead") as memory, Rig(pack, **memory) as rig:
        rig.epoch(pack.plan())
        plan = pack.plan(1)
        rig.prepare(plan)
        is_kept = np.isin(plan.block_key, list(kept))
        rest = [b for b, k in zip(blocks_of(plan), is_kept, strict=True) if not k]
        assert rig.wait_for_requests(len(rest)) == rest
        of_kept = rig.stat("block_bytes") - sum(memory_bytes(rest))
        assert 0 < of_kept <= BLOCK_OVERHEAD_BYTES * len(plan.block_length)
        rig.start(None)
        assert rig.finish() == len(plan.batch_begin) - 1
        rig.prepare(pack.plan(2))
        rig.wait_for_requests(1)
        assert rig.epoch(pack.plan(3)) != []  # another plan; what was kept stays so
        assert rig.stat("block_bytes") == 0
        assert rig.stat("kept_blocks") == len(kept)


def test_kept_blocks_are_not_all_taken_ahead(folder: Data) -> None:
    """Of a million kept files the engine's notes alone would take hundreds of megabytes."""
    plans = [folder.plan(epoch, "uniform") for epoch in (0, 1)]
    with kept_memory(folder, 90 * 4096, "notes") as memory:
        with Rig(folder, **memory) as rig:
            rig.epoch(plans[0])
        with Rig(folder, budget_bytes=1000, **memory) as rig:
            rig.prepare(plans[1])
            assert rig.wait_for_requests(0) == []
            assert 0 < rig.stat("read_kept_bytes") < sum(map(len, folder.bytes)) / 2
            rig.start(None)
            assert rig.finish() == len(plans[1].batch_begin) - 1
            assert rig.stat("read_kept_bytes") == sum(map(len, folder.bytes))
            assert rig.stat("block_bytes") == 0


def test_two_ranks_read_each_block_once(pack: Data) -> None:
    plans = [[pack.plan(e, rank=r, world_size=2) for r in (0, 1)] for e in range(3)]
    room = 2 * sum(pack.plan().block_length)
    with (
        kept_memory(pack, room // 4096 * 4096, "ranks") as memory,
        Rig(pack, **memory) as first,
        Rig(pack, **memory) as second,
    ):
        read: list[list[Request]] = []
        for epoch in range(3):
            for rig, plan in zip((first, second), plans[epoch], strict=True):
                rig.start(plan)
            for rig, plan in zip((first, second), plans[epoch], strict=True):
                assert rig.finish() == len(plan.batch_begin) - 1
            read.append(first.requests() + second.requests())
        blocks = blocks_of(plans[0][0]) + blocks_of(plans[0][1])
        # One block may lie across the cut between the streams: both read it where both want it.
        assert set(read[0]) == set(blocks)
        assert len(read[0]) <= len(set(blocks)) + 1
        assert read[1:] == [[], []]
        first.engine.close()  # what it kept stays
        second.start(plans[0][0])
        assert second.finish() == len(plans[0][0].batch_begin) - 1
        assert second.requests() == []


def test_no_engine_believes_a_damaged_kept_block(tmp_path: Path) -> None:
    data = Data(tmp_path, 100, 1, as_pack=True)
    plan = data.plan(shuffle="none")
    offset = int(data.index.offset[70])
    with open(data.path(0), "r+b") as file:
        file.seek(offset)
        file.write(bytes([data.bytes[70][0] ^ 1]))
    with kept_memory(data, 1 << 20, "damaged") as memory:
        for _ in range(2):  # the first reads and keeps the block, the second finds it
            with Rig(data, **memory) as rig:
                rig.start(plan)
                with pytest.raises(SampleError, match="CRC-32C") as raised:
                    rig.finish()
                assert raised.value.sample == 70
                assert 70 not in rig.right


# ---- a disk that changes, or does not answer -----------------------------------------------------


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    data = Data(tmp_path, 100, 2, as_pack=True)
    plan = data.plan(shuffle="none")
    with Rig(data) as rig:
        rig.epoch(plan)
        size = os.path.getsize(data.path(1))
        os.truncate(data.path(1), size - 1)
        rig.start(plan)
        with pytest.raises(SampleError, match=rf"name of.*{data.path(1)}.*{size - 1}") as raised:
            rig.finish()
        assert int(data.index.file[raised.value.sample]) == 1
        assert str(plan.block_offset[-1]) in str(raised.value)


def test_a_file_replaced_between_epochs(tmp_path: Path) -> None:
    data = Data(tmp_path, 100, 4, as_pack=True)
    plan = data.plan(shuffle="none")
    with Rig(data) as rig:
        rig.epoch(plan)  # in the end another file is open
        (tmp_path / "new").write_bytes(b"x" * 100)
        os.replace(tmp_path / "new", data.path(0))
        rig.start(plan)
        with pytest.raises(SampleError, match=rf"name of 0\b.*{data.path(0)}.*byte 100,"):
            rig.finish()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_replaced_by_one_of_the_same_size(tmp_path: Path, in_place: bool) -> None:
    """Its checksums were right once; that does not count for what lies there now."""
    data = Data(tmp_path, 100, 4, as_pack=True)
    plan = data.plan(shuffle="none")
    with Rig(data) as rig:
        rig.epoch(plan)
        rig.epoch(plan)  # nothing changed
        old = data.path(0)
        content = bytes(255 - byte for byte in Path(old).read_bytes())
        if in_place:
            Path(old).write_bytes(content)
        else:
            (tmp_path / "new").write_bytes(content)
            os.replace(tmp_path / "new", old)
        rig.start(plan)
        with pytest.raises(SampleError, match=r"name of 0\b.*CRC-32C"):
            rig.finish()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    data = Data(tmp_path, 40, 40, as_pack=False)
    os.unlink(data.path(39))
    os.mkfifo(data.path(39))  # opening it would wait for ever
    with Rig(data) as rig:
        rig.start(data.plan(shuffle="none"))
        with pytest.raises((OSError, SampleError), match=data.path(39)):
            rig.finish()


# ---- through a Loader ----------------------------------------------------------------------------

SMALL = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.PILToTensor()])
FLOAT = v1.Compose([v1.RandomResizedCrop(16), v1.ToTensor()])
IN_BLOCKS = {"shuffle": True, "block_bytes": BLOCK_BYTES, "shuffle_blocks": 4}


@pytest.fixture(scope="module")
def photos_folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(120, num_classes=5) / "train"


@pytest.fixture(scope="module")
def photos_pack(photos_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "pack"
    pack_dataset(photos_folder, folder, progress=False)
    return folder


@pytest.fixture
def own_pack(photos_pack: Path, tmp_path: Path) -> Path:
    """A pack that no other test's loader keeps in memory."""
    return Path(shutil.copytree(photos_pack, tmp_path / "pack"))


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for another program that reads this machine's disk."""
    monkeypatch.setenv("IMAGENET_SEQ_LOCKS", str(tmp_path / "locks"))


class Recorder:
    """Every request of all engines that loaders make."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[native.Engine] = []
        recorder = self

        class Recording(native.Engine):
            def __init__(self, recipe: Recipe, **arguments: object) -> None:
                reading = replace(arguments.pop("reading"), record_requests=True)
                super().__init__(recipe, reading=reading, **arguments)
                recorder.engines.append(self)

        monkeypatch.setattr(native, "Engine", Recording)

    def requests(self) -> list[native.Request]:
        return [request for engine in self.engines for request in engine.requests()]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder(monkeypatch)
    yield recorder
    recorder.engines.clear()
    gc.collect()  # whoever has kept memory gives it back


def loader_of(dataset: Path, transform: object = SMALL, **arguments: object) -> Loader:
    names = {field.name for field in fields(ReadOptions)}
    reading = ReadOptions(**{name: arguments.pop(name) for name in names & arguments.keys()})
    defaults = {"batch_size": BATCH_SIZE, "num_workers": 2, "forecast": False}
    return Loader(dataset, "train", transform, reading=reading, **{**defaults, **arguments})


def epoch_of(loader: Loader) -> torch.Tensor:
    return torch.cat([images.flatten(1) for images, _ in loader])


def expected_epochs(dataset: Path, num_epochs: int, **arguments: object) -> list[torch.Tensor]:
    """What plain reading delivers: a loader of its own for every epoch."""
    epochs = []
    for epoch in range(num_epochs):
        loader = loader_of(dataset, ram="auto", **arguments)
        loader.set_epoch(epoch)
        epochs.append(epoch_of(loader))
        loader.close()
    return epochs


def test_a_loader_reads_on_and_reads_nothing_twice(photos_pack: Path, recorder: Recorder) -> None:
    threads = num_threads()
    loader = loader_of(photos_pack, **IN_BLOCKS, ram=0, disk="hdd", num_readers=1)
    epochs = [epoch_of(loader) for _ in range(3)]
    index = open_source(photos_pack).index
    order = Order("block", 0, BLOCK_BYTES, 4)
    planned = [
        block
        for epoch in range(4)
        for block in blocks_of(rank_plan(index, order, epoch, batch_size=BATCH_SIZE))
    ]
    requests: list[native.Request] = []
    until = time.monotonic() + DEADLINE_S
    while not any(r.epoch == 3 for r in requests) and time.monotonic() < until:
        requests += recorder.requests()
    made = [(r.epoch, r.file, r.offset, r.length) for r in requests]
    assert made == planned[: len(made)]
    assert made[-1][0] == 3  # the epoch that nobody asked for yet
    assert len(recorder.engines) == 1
    direct = reads_direct(os.path.join(index.root, index.files[0]))
    assert {r.direct for r in requests} == {direct}
    assert all(r.locked or r.cached for r in requests)
    stats = loader.stats()
    largest = max(length for *_, length in made)
    assert 0 < stats["block_bytes_peak"] <= stats["block_budget_bytes"] + largest
    assert stats["block_budget_bytes"] <= loader.memory_bytes
    loader.close()
    while num_threads() > threads and time.monotonic() < until:
        time.sleep(0.005)
    assert num_threads() <= threads
    for got, expected in zip(epochs, expected_epochs(photos_pack, 3, **IN_BLOCKS), strict=True):
        assert torch.equal(got, expected)


def num_threads() -> int:
    folder = "/proc/self/task"
    return len(os.listdir(folder)) if os.path.isdir(folder) else threading.active_count()


@pytest.mark.parametrize("arguments", [IN_BLOCKS, {"shuffle": "uniform", "window": 50}])
def test_whatever_was_read_ahead_the_epoch_asked_for_comes(
    photos_pack: Path, arguments: dict
) -> None:
    expected = expected_epochs(photos_pack, 6, **arguments)
    loader = loader_of(photos_pack, **arguments, ram=0, disk="hdd")
    assert torch.equal(epoch_of(loader), expected[0])
    loader.set_epoch(4)  # not 1, which has been read ahead
    assert torch.equal(epoch_of(loader), expected[4])
    assert torch.equal(epoch_of(loader), expected[5])
    loader.set_epoch(0)
    iterator = iter(loader)
    first = [next(iterator)[0].flatten(1) for _ in range(3)]
    state = loader.state_dict()
    loader.load_state_dict(state)
    del iterator
    assert torch.equal(torch.cat([*first, epoch_of(loader)]), expected[0])
    for _ in loader:  # epoch 1, which is given up
        break
    assert torch.equal(epoch_of(loader), expected[2])
    loader.close()
    assert torch.equal(epoch_of(loader), expected[3])
    assert loader.stats()["block_bytes_peak"] <= loader.memory_bytes
    loader.close()


def test_a_folder_on_a_hard_disk_is_read_in_windows(
    photos_folder: Path, recorder: Recorder
) -> None:
    reading = {"ram": 0, "disk": "hdd", "window": 50, "num_readers": 1}
    loader = loader_of(photos_folder, shuffle=True, **reading)
    epochs = [epoch_of(loader) for _ in range(2)]
    requests = [r for r in recorder.requests() if r.epoch == 0]
    index = open_source(photos_folder).index
    plan = rank_plan(index, Order("uniform"), 0, batch_size=BATCH_SIZE)
    begins = in_windows(plan, 50).window_begin
    assert begins is not None

    def path(file: int) -> str:
        name = plan.paths[plan.path_begin[file] : plan.path_begin[file + 1]].tobytes()
        return os.path.join(plan.root, os.fsdecode(name))

    def place(file: int) -> tuple[int, int]:
        return native.look_up(path(file))[1], os.stat(path(file)).st_ino

    windows = [plan.block_file[begin:end].tolist() for begin, end in pairwise(begins)]
    expected = [file for window in windows for file in sorted(window, key=place)]
    assert [r.file for r in requests] == expected
    assert {(r.direct, r.offset) for r in requests} == {(0, 0)}
    assert [r.length for r in requests] == [os.path.getsize(path(r.file)) for r in requests]
    stats = loader.stats()
    assert stats["read_lookups"] >= 240
    loader.close()
    for got, want in zip(epochs, expected_epochs(photos_folder, 2, shuffle=True), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("transform", [SMALL, FLOAT], ids=["uint8", "float32"])
def test_a_loader_keeps_half_of_the_set(
    own_pack: Path, recorder: Recorder, transform: object
) -> None:
    arguments = {"transform": transform, **IN_BLOCKS}
    expected = expected_epochs(own_pack, 3, **arguments)
    index = open_source(own_pack).index
    plans = [rank_plan(index, Order("block", 0, BLOCK_BYTES, 4), e, batch_size=16) for e in (0, 1)]
    budget_bytes = int(sum(plans[0].block_length)) // 2
    kept = kept_keys(plans[0], budget_bytes // 4096 * 4096)
    recorder.requests()
    recorder.engines.clear()
    gc.collect()
    loader = loader_of(own_pack, **arguments, ram=budget_bytes, disk="ssd", num_readers=1)
    for epoch in range(3):
        assert torch.equal(epoch_of(loader), expected[epoch])
    made = [(r.epoch, r.file, r.offset, r.length) for r in recorder.requests()]
    is_kept = np.isin(plans[1].block_key, list(kept))
    rest = [b for b, k in zip(blocks_of(plans[1]), is_kept, strict=True) if not k]
    assert [r for r in made if r[0] == 0] == blocks_of(plans[0])
    assert [r for r in made if r[0] == 1] == rest
    assert loader.stats()["kept_blocks"] == len(kept)
    loader.close()


def test_what_is_kept_whole_is_read_once(own_pack: Path, recorder: Recorder) -> None:
    loader = loader_of(own_pack, **IN_BLOCKS, ram="64MB", num_readers=1)
    first = epoch_of(loader)
    assert recorder.requests() != []
    second = epoch_of(loader)
    assert recorder.requests() == []
    assert first.shape == second.shape
    stats = loader.stats()
    assert stats["read_kept_bytes"] >= stats["read_bytes"] == stats["kept_bytes"] - waste(stats)
    loader.close()
    assert epoch_of(loader).shape == first.shape  # a new engine finds what the former one kept
    assert recorder.requests() == []
    loader.close()


def waste(stats: dict[str, float]) -> float:
    """Blocks are kept in whole pages."""
    lost = stats["kept_bytes"] - stats["read_bytes"]
    assert 0 <= lost <= 2 * 4096 * stats["kept_blocks"]
    return lost


def test_an_order_of_a_sampler_is_kept_by_sample(own_pack: Path, recorder: Recorder) -> None:
    order = list(range(118, -1, -2))  # backwards: no two of them are read together
    loader = loader_of(own_pack, sampler=order, ram="64MB", num_readers=1)
    first = epoch_of(loader)
    assert len(recorder.requests()) == len(order)
    order[:] = order[30:] + order[:30]
    assert epoch_of(loader).shape == first.shape
    assert recorder.requests() == []
    loader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="processes share kept memory on Linux only")
def test_ranks_share_what_is_kept(own_pack: Path, recorder: Recorder) -> None:
    ranks = [
        loader_of(own_pack, **IN_BLOCKS, ram="64MB", num_readers=1, rank=rank, world_size=2, seed=1)
        for rank in (0, 1)
    ]
    expected = [
        expected_epochs(own_pack, 2, **IN_BLOCKS, rank=rank, world_size=2, seed=1)
        for rank in (0, 1)
    ]
    recorder.requests()
    for rank, loader in enumerate(ranks):
        assert torch.equal(epoch_of(loader), expected[rank][0])
    requests = [(r.file, r.offset, r.length) for r in recorder.requests()]
    assert len(requests) == len(set(requests))  # each block once in sum
    ranks[0].close()
    assert torch.equal(epoch_of(ranks[1]), expected[1][1])
    assert torch.equal(epoch_of(ranks[0]), expected[0][1])
    assert recorder.requests() == []
    ranks[0].close()
    ranks[1].close()


def test_small_data_is_left_to_the_page_cache(own_pack: Path, recorder: Recorder) -> None:
    loader = loader_of(own_pack, **IN_BLOCKS)
    epoch_of(loader)
    assert {r.direct for r in recorder.requests()} == {0}
    epoch_of(loader)
    again = recorder.requests()
    assert {r.epoch for r in again} == {1}
    if not all(r.cached for r in again):
        pytest.skip("this file system can't say what is in the page cache")
    assert loader.stats()["kept_blocks"] == 0
    loader.close()


# ---- a disk that does not answer -----------------------------------------------------------------


Stalled = Callable[..., tuple[Loader, Callable[[float], None]]]


@pytest.fixture
def stalled(photos_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stalled]:
    """Makes a loader whose turn at the disk does not come, and a function that lets it come."""
    shard = str(next(photos_pack.glob("*.tar")))
    if not reads_direct(shard):
        pytest.skip("what the page cache has needs no turn, and here all of it is there")
    with open(lock_path(disk.choose_disk(shard, "hdd")), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def answer_in(seconds: float) -> None:
            threading.Timer(seconds, fcntl.flock, (file.fileno(), fcntl.LOCK_UN)).start()

        def make(stall_s: float, timeout: float = 0) -> tuple[Loader, Callable[[float], None]]:
            monkeypatch.setattr(iterator, "_STALL_S", stall_s)
            made = loader_of(photos_pack, **IN_BLOCKS, ram=0, disk="hdd", timeout=timeout)
            return made, answer_in

        yield make


def test_a_stalled_disk_is_named_and_waited_for(photos_pack: Path, stalled: Stalled) -> None:
    loader, answer_in = stalled(stall_s=0.2)
    answer_in(0.8)
    with pytest.warns(LoaderNote, match=rf"not answered for .*{photos_pack}.*offset \d") as notes:
        assert len(epoch_of(loader)) == 120
    assert len(notes) == 1
    loader.close()


def test_a_time_out_names_what_the_disk_was_asked_for(photos_pack: Path, stalled: Stalled) -> None:
    loader, _ = stalled(stall_s=0.1, timeout=0.7)
    with (
        pytest.warns(LoaderNote, match="not answered"),
        pytest.raises(RuntimeError, match=rf"timeout=0\.7 s; .*{photos_pack}.*offset \d"),
    ):
        next(iter(loader))
    loader.close()


def test_ctrl_c_while_the_disk_does_not_answer(stalled: Stalled) -> None:
    loader, _ = stalled(stall_s=60)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
    began = time.monotonic()
    # Again after a while: one that comes in a finaliser is swallowed.
    signal.setitimer(signal.ITIMER_REAL, 0.15, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    loader.close()
    assert time.monotonic() - began < 4.5  # a disk's turn is waited for up to 5 s


# ---- what the user is told -----------------------------------------------------------------------


def test_the_forecast_is_one_line_before_the_first_batch(
    photos_pack: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = {**IN_BLOCKS, "ram": 0, "disk": "hdd"}
    speed = Speed(180.0, 12.5, "2026-01-01")
    monkeypatch.setattr(arrange, "speed_of", lambda *_: speed)
    epoch_of(loader_of(photos_pack, **arguments, forecast=True))
    assert capfd.readouterr().err == ""  # so little is read before anybody would know
    monkeypatch.setattr(loader_module, "FORECAST_BYTES", 1)
    loader = loader_of(photos_pack, **arguments, forecast=True)
    assert capfd.readouterr().err == ""
    iterator = iter(loader)
    said = capfd.readouterr().err
    assert re.fullmatch(r"imagenet-seq: pack on .*180 MB/s.*\n", said), said
    assert said == loader.forecast().line() + "\n"
    assert sum(1 for _ in iterator) == 8
    epoch_of(loader)
    epoch_of(loader_of(photos_pack, **arguments, forecast=False))
    monkeypatch.setenv("LOCAL_RANK", "1")  # once a node
    epoch_of(loader_of(photos_pack, **arguments, forecast=True))
    assert capfd.readouterr().err == ""


def test_a_progress_line_says_what_happened_since_the_last(
    own_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrange, "speed_of", lambda *_: None)
    loader = loader_of(own_pack, **IN_BLOCKS, ram="64MB", num_readers=1)
    pattern = (
        r"read (\d+) MB/s(?:, (\d+) % from memory)?, blocks (\d+) % full; waiting: training for "
        r"data \d+ %, decoding for the disk \d+ % and for training \d+ %, reading for decoding "
        r"\d+ % and for its turn \d+ %"
    )
    assert re.fullmatch(pattern, loader.progress_line())  # before the first batch
    epoch_of(loader)
    loader.progress_line()
    epoch_of(loader)
    said = re.fullmatch(pattern, loader.progress_line())
    assert said
    assert said[1] == "0"
    loader.close()


def test_counters_have_names_that_say_their_stage(photos_pack: Path) -> None:
    loader = loader_of(photos_pack, **IN_BLOCKS, ram=0)
    epoch_of(loader)
    stats = loader.stats()
    stages = {"read", "decode", "python", "batch", "block", "kept"}
    assert {name.split("_")[0] for name in stats} == stages
    assert not [name for name in stats if name.endswith("_ns")]
    assert stats["read_requests"] >= stats["read_seeks"] >= 1
    assert stats["read_s"] > 0
    assert stats["batch_count"] == 8
    loader.close()


# ---- blocks that Python makes --------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "pooled"), [(10, 16), (40, 64), (1, 1)])
def test_a_pool_of_python_blocks_takes_the_bytes_that_were_asked_for(
    num_blocks: int, pooled: int
) -> None:
    """Of 40,000 bytes in so many blocks: 16 blocks of 4000 where 64 of 1000 were asked for."""
    size = 400
    names = Names.from_strings(map(str, range(size)))
    index = Index(
        np.arange(size) * num_blocks // size, np.arange(size), names, "", names[:1],
        length=np.full(size, 100),
    )  # fmt: skip
    source = Source("made here", index, python_blocks=True)
    assert arrange.blocks_of_pool(source, 64, 1000) == pooled
    assert arrange.blocks_of_pool(replace(source, python_blocks=False), 64, 1000) == 64
    loader = Loader(
        source, "train", shuffle="block", reading=ReadOptions(block_bytes=1000), forecast=False
    )
    assert loader.state_dict()["shuffle_blocks"] == pooled
