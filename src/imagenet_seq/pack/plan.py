"""The plan of a pack: which sample goes to which place and shard, with which Huffman tables.

An interrupted run leaves its plan in DESTINATION.partial; a run that continues must agree with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from imagenet_seq import __version__, native
from imagenet_seq.errors import PackError
from imagenet_seq.pack.encode import Refused, Settings, encode
from imagenet_seq.pack.files import sync, write_whole
from imagenet_seq.pack.inputs import Inputs, known_bytes
from imagenet_seq.pack.shrink import NUM_SAMPLED, Forecast, Pair, smaller_copy
from imagenet_seq.pack.task import Failure, Form, RunOptions, Task, refuse_dying_disk
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded
from imagenet_seq.sources.place import SPLITS
from imagenet_seq.text import format_bytes

_MIN_BUFFER_BYTES = 1 << 20
"""Minimum memory for each scratch file: appends take about twice that, so that a hard disk seldom
seeks."""

SPACE_MARGIN = 0.05
"""The pack's tables and the restart markers make ImageNet's images 4.3 % larger."""

TABLES_SAMPLES = 512
"""A pack's Huffman tables are fitted to this many of its samples, which takes about 6 s on a hard
disk. Tables of 250 ImageNet photos cost 0.005 % more bytes than those of 500."""

_FORECAST_MARGIN = 0.12
"""Twice the scatter of the bytes saved that 100 ImageNet photos show: 5 % at 500 px, 6 at 224."""

_TAR_BYTES = 2048
"""Approximate bytes of a sample in a shard beside its image: headers, label and padding."""

# ---- which sample goes where ---------------------------------------------------------------------


class Sharding(NamedTuple):
    """How samples are dealt to shards, and the tables that they are encoded with.

    Attributes:
        num_shards: shards of the pack.
        shards_per_bucket: shards that share a scratch file, or bucket; with more than one, buckets
            are dealt once more.
        tables: Huffman tables of the pack; None: not chosen yet, or each image has its own.
    """

    num_shards: int
    shards_per_bucket: int
    tables: bytes | None

    @classmethod
    def of(
        cls, source_bytes: int, settings: Settings, memory_bytes: int, at_most: int = sys.maxsize
    ) -> Sharding:
        """Return the number of shards for a source, and how many of them share a bucket."""
        num_shards = max(1, min(at_most, -(-source_bytes // settings.shard_bytes)))
        most_buckets = max(1, memory_bytes // _MIN_BUFFER_BYTES)
        return cls(num_shards, -(-num_shards // most_buckets), None)

    @property
    def num_buckets(self) -> int:
        """Scratch files of the first round of dealing."""
        return -(-self.num_shards // self.shards_per_bucket)


@dataclass(frozen=True)
class PackPlan:
    """Everything that is known before the first image is read.

    Attributes:
        inputs: what is packed, and what the pack is to be like.
        form: what is made; scratch goes by shards also for an LMDB file, which has none.
        sharding: how samples are dealt to shards.
        split: the split that pack.json names; None: it is unknown, or the pack's own name says it.
    """

    inputs: Inputs
    form: Form
    sharding: Sharding
    split: str | None

    @classmethod
    def make(cls, inputs: Inputs, task: Task, options: RunOptions) -> PackPlan:
        """Plan a task; the tables are those that the inputs have, if any."""
        record = inputs.record
        source_bytes = record.get("file_bytes", record["bytes"])
        most_shards = sys.maxsize if "file_bytes" in record else len(inputs.index)
        sharding = Sharding.of(source_bytes, inputs.settings, options.memory_bytes, most_shards)
        is_named = os.path.basename(task.destination) in SPLITS
        split = None if is_named else task.split or inputs.split
        return cls(inputs, task.form, sharding._replace(tables=inputs.tables), split)

    @property
    def source_bytes(self) -> int:
        """Bytes of the images in the source."""
        return known_bytes(self.inputs.lengths)

    @functools.cached_property
    def forecast(self) -> Forecast | None:
        """Estimate of smaller copies, measured on some images; None where none are made."""
        num_samples = len(self.inputs.index)
        num_sampled = min(NUM_SAMPLED, num_samples)
        evenly = (place * num_samples // num_sampled for place in range(num_sampled))
        images = self.inputs.some_images[:NUM_SAMPLED] or map(self.inputs.read, evenly)
        return forecast_smaller(images, self.inputs.settings, self.sharding.tables)

    @property
    def image_bytes(self) -> int:
        """Upper estimate of what the images will take in the pack."""
        return expected_pack_bytes(self.source_bytes, self.forecast)

    @functools.cached_property
    def _hashes(self) -> npt.NDArray[np.uint64]:
        return place_hashes(self.inputs.index.name, self.inputs.settings.seed)

    @functools.cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """The sample at each place of the pack."""
        if self.form.in_source_order:
            return np.arange(len(self.inputs.index))
        return np.argsort(self._hashes, kind="stable")

    @functools.cached_property
    def shard_begin(self) -> npt.NDArray[np.int64]:
        """The place where each shard begins, and last the number of places."""
        num_shards = self.sharding.num_shards
        numbers = np.arange(num_shards + 1, dtype=np.int64)
        if "file_bytes" in self.inputs.record and not self.form.in_source_order:
            # A sample's name says which shard it goes to, so it can be dealt before all are known.
            return np.searchsorted(shard_of_hash(self._hashes[self.order], num_shards), numbers)
        # Equal numbers of samples, not of bytes, so that a place depends on names alone.
        return numbers * len(self.inputs.index) // num_shards

    @functools.cached_property
    def shard_of_sample(self) -> npt.NDArray[np.int64]:
        """The shard of each sample."""
        shard = np.empty(len(self.inputs.index), np.int64)
        num_samples = np.diff(self.shard_begin)
        shard[self.order] = np.repeat(np.arange(len(num_samples)), num_samples)
        return shard

    def shards_of_bucket(self, bucket: int) -> range:
        """Return the shards whose samples are dealt to a bucket."""
        first = bucket * self.sharding.shards_per_bucket
        return range(first, min(first + self.sharding.shards_per_bucket, self.sharding.num_shards))

    def expected_bytes(self, image_bytes: int) -> dict[int, int]:
        """Return the most that each bucket will hold where all images take `image_bytes`."""
        ratio = image_bytes * (1 + SPACE_MARGIN) / max(self.source_bytes, 1)
        buckets = self.shard_of_sample // self.sharding.shards_per_bucket
        sizes = np.maximum(self.inputs.lengths, 0)
        source_bytes = np.bincount(buckets, sizes, self.sharding.num_buckets)
        return dict(enumerate((source_bytes * ratio).astype(np.int64).tolist()))


def place_hashes(names: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """Return the hash that each sample is sorted by; ties keep the source's order."""
    keyed = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))

    def digest(name: str) -> bytes:
        state = keyed.copy()
        state.update(os.fsencode(name))
        return state.digest()

    return np.frombuffer(b"".join(map(digest, names)), "<u8").astype(np.uint64)


def shard_of_hash(hashes: npt.NDArray[np.uint64], num_shards: int) -> npt.NDArray[np.int64]:
    """Return floor(hash * num_shards / 2**64), computed in halves so that nothing overflows."""
    low = (hashes & np.uint64(2**32 - 1)) * np.uint64(num_shards)
    high = (hashes >> np.uint64(32)) * np.uint64(num_shards)
    return ((high + (low >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


# ---- an interrupted run --------------------------------------------------------------------------


def agree_on_plan(partial: str, plan: PackPlan, options: RunOptions) -> PackPlan:
    """Return the plan with the Huffman tables and the sharding of the run that is continued."""

    def check_space(sharding: Sharding) -> None:
        tar_bytes = _TAR_BYTES * len(plan.inputs.index)
        require_space(partial, plan.source_bytes, plan.image_bytes, tar_bytes, sharding, plan.form)

    choose_tables = functools.partial(_choose_tables, partial, plan, options)
    now = describe_run(plan.inputs.settings_record, plan.form, plan.inputs.path, plan.inputs.id)
    sharding = agree_on_sharding(partial, now, plan.sharding, check_space, choose_tables)
    return dataclasses.replace(plan, sharding=sharding)


def agree_on_sharding(
    partial: str,
    now: dict[str, Any],
    sharding: Sharding,
    check_space: Callable[[Sharding], None],
    choose_tables: Callable[[], bytes | None],
) -> Sharding:
    """Begin a run that is described by `now`, or continue an interrupted one as it was begun.

    `sharding` has no tables yet; `choose_tables` fits them when a run begins. `check_space` refuses
    a disk with too little room.

    Raises:
        PackError: naming each difference to the interrupted run.
    """
    path = os.path.join(partial, pack_format.SETTINGS_FILE)
    try:
        with open(path, "rb") as file:
            before = json.load(file)
    except FileNotFoundError:
        check_space(sharding)
        sharding = sharding._replace(tables=choose_tables())
        _write_settings(path, now, sharding)
        return sharding
    was_indexed = before.get("source_id") is not None
    if not was_indexed:
        before = {**before, "source_id": now["source_id"]}
    elif now["source_id"] is None:
        now = {**now, "source_id": before["source_id"]}
    differences = settings_differences(before, now)
    if differences:
        raise PackError(
            f"{partial}: an unfinished pack made with other settings or of another source:"
            f"{differences}\nRun the command with the former settings to continue it, or delete "
            "that folder to begin again"
        )
    if before["num_shards"] != sharding.num_shards:
        # The number of shards follows from the source's bytes, and decides where all samples go.
        raise PackError(
            f"{partial}: the source changed since the interrupted run: it now makes "
            f"{sharding.num_shards} shards, {before['num_shards']} before: delete that folder and "
            "run again"
        )
    try:
        tables = pack_format.parse_tables(before["huffman_tables"])
    except (KeyError, ValueError) as error:
        raise PackError(
            f"{path}: 'huffman_tables': {error}: delete the folder {partial} to begin again"
        ) from error
    # The number of scratch files follows from the memory allowed; the pack does not depend on it.
    sharding = Sharding(sharding.num_shards, before["shards_per_bucket"], tables)
    check_space(sharding)
    if not was_indexed:
        _write_settings(path, now, sharding)
    return sharding


def _write_settings(path: str, now: dict[str, Any], sharding: Sharding) -> None:
    content = {
        **now,
        "num_shards": sharding.num_shards,
        "shards_per_bucket": sharding.shards_per_bucket,
        "huffman_tables": pack_format.describe_tables(sharding.tables),
    }
    write_whole(path, json.dumps(content, indent=1).encode())
    sync(os.path.dirname(path))


def settings_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a line for each setting that differs; "" for none."""
    return "".join(
        f"\n  {key}: {before.get(key)!r} before, {value!r} now"
        for key, value in now.items()
        if before.get(key) != value
    )


def describe_run(
    settings: dict[str, Any], form: Form, path: str, source_id: str | None
) -> dict[str, Any]:
    """Return what a continued run must agree on; an id of None: not known yet."""
    run = {"version": __version__, "source": os.path.abspath(path), "source_id": source_id}
    return {**settings, **form.describe(), **run}


def require_space(
    folder: str, source_bytes: int, image_bytes: int, tar_bytes: int, sharding: Sharding, form: Form
) -> None:
    """Refuse to begin where scratch files and shards do not fit on the disk."""
    shards_at_once = sharding.shards_per_bucket + (sharding.shards_per_bucket > 1)
    at_once = image_bytes // sharding.num_shards * shards_at_once
    if form.is_lmdb:  # all scratch stays until the file is whole
        at_once = image_bytes
    needed = image_bytes * (1 + SPACE_MARGIN) + tar_bytes + at_once
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    # What a file takes on the disk, including what is reserved behind its end.
    present = sum(max(stat.st_size, stat.st_blocks * 512) for stat in map(os.stat, paths))
    free = shutil.disk_usage(folder).free
    if needed - present > free:
        raise PackError(
            f"{folder}: not enough room: packing {format_bytes(source_bytes)} of images takes "
            f"{format_bytes(needed)} while it runs, {format_bytes(present)} are there already, and "
            f"the disk has {format_bytes(free)} free: make room for "
            f"{format_bytes(needed - present - free)}"
        )


# ---- Huffman tables ------------------------------------------------------------------------------


def _choose_tables(partial: str, plan: PackPlan, options: RunOptions) -> bytes | None:
    """Fit Huffman tables to some of the images, unless they are given or not needed."""
    if plan.inputs.tables or not needs_tables(plan.inputs.settings):
        return plan.inputs.tables
    if found := plan.inputs.some_images[:TABLES_SAMPLES]:
        return fit_tables(found, len(found), plan.inputs.settings, options)
    # The places in the pack are random, so its first samples are as good as any.
    samples = plan.inputs.first(plan.order, TABLES_SAMPLES)

    def images() -> Iterator[bytes]:
        unreadable: list[Failure] = []
        for sample, data in plan.inputs.read_all(samples):
            if not isinstance(data, Refused):
                yield data
            elif data.is_read_error:
                unreadable.append(Failure(plan.inputs.index.name[sample], data.reason, False))
                refuse_dying_disk(unreadable, plan.inputs.index.root, partial)

    return fit_tables(images(), len(samples), plan.inputs.settings, options)


def needs_tables(settings: Settings) -> bool:
    """Tell whether all images of the pack share Huffman tables."""
    return settings.tables == "pack" and not settings.keep_bytes


def fit_tables(
    images: Iterable[bytes], num_images: int, settings: Settings, options: RunOptions
) -> bytes:
    """Fit the Huffman tables of a pack to some of its images."""

    def count(data: bytes) -> npt.NDArray[np.uint64] | None:
        copy = smaller_copy(data, settings.shrink) if settings.shrink else None
        return native.count_symbols(copy or data, settings.restart_interval)

    options.log.begin_pass("choose tables")
    counts = np.zeros((4, 256), np.uint64)
    bar = options.bar("choose tables", num_images)
    with ThreadPoolExecutor(options.num_workers) as threads, bar:
        for more in map_ahead(threads, count, images, 2 * options.num_workers):
            if more is not None:
                counts += more
            bar.update()
    return native.fit_tables(counts)


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_ahead(
    threads: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    num_ahead: int,
) -> Iterator[_Result]:
    """Yield results in the order of the items, at most `num_ahead` of which wait in memory."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# ---- smaller copies ------------------------------------------------------------------------------


def forecast_smaller(
    images: Iterable[bytes | Refused], settings: Settings, tables: bytes | None
) -> Forecast | None:
    """Estimate from some images the size and speed of smaller copies; None: no image to measure.

    This comes before the tables of the pack are chosen, which add about 3 %.
    """
    if settings.shrink is None:
        return None
    lossless = dataclasses.replace(settings, shrink=None)
    pairs = []
    for data in images:
        if isinstance(data, Refused):
            continue
        before, after = (encode(data, kind, tables) for kind in (lossless, settings))
        if isinstance(before, Encoded) and isinstance(after, Encoded):
            pairs.append(Pair(len(data), before, after))
    return Forecast.measure(pairs, settings.shrink) if pairs else None


def expected_pack_bytes(source_bytes: int, forecast: Forecast | None) -> int:
    """Return an upper estimate of what the images will take in the pack."""
    if forecast is None:
        return source_bytes
    ratio = forecast.small_bytes / forecast.source_bytes
    return int(source_bytes * ratio * (1 + _FORECAST_MARGIN))
