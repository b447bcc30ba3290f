"""Deal the samples of large files in the pass that indexes them, so that they are read once."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from imagenet_seq.pack import plan
from imagenet_seq.pack.claim import JOURNAL_FILE, delete_scrap
from imagenet_seq.pack.encode import Refused, encode
from imagenet_seq.pack.input_files import LargeFiles
from imagenet_seq.pack.inputs import Inputs
from imagenet_seq.pack.scratch import Buckets, Journal
from imagenet_seq.pack.shards import RUN_BYTES, RUN_SAMPLES, RUNS_AHEAD, on_same_hdd, take_over
from imagenet_seq.pack.shrink import NUM_SAMPLED
from imagenet_seq.pack.task import RunOptions, Task
from imagenet_seq.sources.formats.pack import SETTINGS_FILE, Encoded
from imagenet_seq.sources.place import Seen


def deal_while_indexing(files: LargeFiles, task: Task, options: RunOptions) -> Inputs:
    """Open large files; where they must be read to be indexed, deal the samples meanwhile."""
    if task.form.in_source_order:
        return files.open()  # the shard of a sample is known only when all have been counted
    if not files.is_whole or (plan.needs_tables(files.settings) and not files.some_images):
        return files.open()  # what to pack, or to fit tables to, is known only from the index
    try:
        with _Dealer(files, task, options) as dealer:
            return files.open(dealer.visit)
    except BaseException:
        if not os.path.exists(os.path.join(task.partial, SETTINGS_FILE)):
            delete_scrap(task.partial)  # nothing was dealt, so there is nothing to continue
        raise


class _Dealer:
    """Deals the samples of large files while these are indexed.

    It leaves scratch files and a journal, as an interrupted run does. What is no image is not
    dealt: `Packer.deal` finds it missing and treats it.
    """

    def __init__(self, files: LargeFiles, task: Task, options: RunOptions) -> None:
        self._files = files
        self._form = task.form
        self._partial = task.partial
        self._options = options
        self._sharding: plan.Sharding | None = None  # until the first sample is read
        self._threads = ThreadPoolExecutor(options.num_workers)
        self._waiting: deque[Future[list[tuple[int, str, Encoded | Refused]]]] = deque()
        self._run: list[tuple[int, str, bytes]] = []
        self._run_bytes = 0

    def __enter__(self) -> _Dealer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._run:
                self._hand_over()
            while kind is None and self._waiting:
                self._deal(self._waiting.popleft().result())
        finally:
            self._threads.shutdown(cancel_futures=True)
            if self._sharding is not None:
                self._buckets.flush()

    def visit(self, seen: Seen) -> None:
        """Take a sample that was not dealt before: encode it in a thread, deal it later."""
        if self._sharding is None:
            self._begin()
        if seen.sample < len(self._is_dealt) and self._is_dealt[seen.sample]:
            return
        self._run.append((seen.sample, seen.name, bytes(seen.data)))
        self._run_bytes += len(seen.data)
        if len(self._run) >= RUN_SAMPLES or self._run_bytes >= RUN_BYTES:
            self._hand_over()

    def _begin(self) -> None:
        """Begin or continue a run, as `agree_on_plan` does where the index is known."""
        files, options = self._files, self._options
        forecast = plan.forecast_smaller(files.some_images[:NUM_SAMPLED], files.settings, None)
        image_bytes = plan.expected_pack_bytes(files.num_bytes, forecast)

        def check_space(sharding: plan.Sharding) -> None:
            plan.require_space(self._partial, files.num_bytes, image_bytes, 0, sharding, self._form)

        def choose_tables() -> bytes | None:
            if not plan.needs_tables(files.settings):
                return None
            images = files.some_images[: plan.TABLES_SAMPLES]
            return plan.fit_tables(images, len(images), files.settings, options)

        now = plan.describe_run(files.settings_record, self._form, files.path, None)
        sharding = plan.Sharding.of(files.num_bytes, files.settings, options.memory_bytes)
        self._sharding = sharding = plan.agree_on_sharding(
            self._partial, now, sharding, check_space, choose_tables
        )
        self._journal = Journal(os.path.join(self._partial, JOURNAL_FILE), options.log)
        bucket_bytes = int(image_bytes * (1 + plan.SPACE_MARGIN)) // sharding.num_buckets
        self._buckets = Buckets(
            self._partial,
            "deal",
            options.memory_bytes,
            dict.fromkeys(range(sharding.num_buckets), bucket_bytes),
            self._journal.add,
            on_same_hdd(files.path, self._partial),
            options.log,
        )
        take_over(self._journal, self._buckets, sharding.num_buckets, self._is_good)
        dealt = self._journal.rows()["sample"]
        self._is_dealt = np.zeros(int(dealt.max(initial=-1)) + 1, np.bool_)
        self._is_dealt[dealt] = True
        options.log.begin_pass("deal")

    def _is_good(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Tell which rows are of the files as they are now: their samples have the same numbers."""
        good = (rows["sample"] >= 0) & (rows["source_length"] == self._files.num_bytes)
        return np.asarray(good & (rows["source_mtime_ns"] == self._files.mtime_ns))

    def _hand_over(self) -> None:
        self._waiting.append(self._threads.submit(self._encode_run, self._run))
        self._run, self._run_bytes = [], 0
        if len(self._waiting) > 2 * self._options.num_workers + RUNS_AHEAD:
            self._deal(self._waiting.popleft().result())

    def _encode_run(
        self, run: list[tuple[int, str, bytes]]
    ) -> list[tuple[int, str, Encoded | Refused]]:
        settings, tables = self._files.settings, self._sharding.tables if self._sharding else None
        return [(sample, name, encode(data, settings, tables)) for sample, name, data in run]

    def _deal(self, run: list[tuple[int, str, Encoded | Refused]]) -> None:
        assert self._sharding is not None
        hashes = plan.place_hashes((name for _, name, _ in run), self._files.settings.seed)
        shards = plan.shard_of_hash(hashes, self._sharding.num_shards)
        for (sample, _, encoded), shard in zip(run, shards.tolist(), strict=True):
            if isinstance(encoded, Encoded):
                bucket = shard // self._sharding.shards_per_bucket
                stamp = (self._files.num_bytes, self._files.mtime_ns)
                self._buckets.append(bucket, sample, encoded, *stamp)
