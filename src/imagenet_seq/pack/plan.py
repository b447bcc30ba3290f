"""What a packing is to make: settings, tables, shards, and the space they take."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from imagenet_seq import __version__, native
from imagenet_seq.errors import PackError
from imagenet_seq.index.columns import Index
from imagenet_seq.pack.encode import Refused, Settings, encode
from imagenet_seq.pack.files import sync, write_whole
from imagenet_seq.pack.inputs import Origin, known_bytes
from imagenet_seq.pack.io_log import NO_LOG, IoLog
from imagenet_seq.pack.shrink import NUM_SAMPLED, Forecast, Pair, smaller_copy
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.formats.pack import Encoded
from imagenet_seq.sources.place import Found
from imagenet_seq.text import format_bytes, progress_bar

OnImageError = Literal["fail", "skip", "keep"]


_MIN_BUFFER_BYTES = 1 << 20
"""Memory for each scratch file, at least: it grows by about twice that at a time, so that a hard
disk seldom seeks."""


SPACE_MARGIN = 0.05
"""The pack's tables and the restart markers make ImageNet's images 4.3 % larger."""


TABLES_SAMPLES = 512
"""A pack's Huffman tables are fitted to this many of its samples, which takes about 6 s on a hard
disk. Tables of 250 ImageNet photos cost 0.005 % more bytes than those of 500."""


_FORECAST_MARGIN = 0.12
"""Twice the scatter of the bytes saved that 100 ImageNet photos show: 5 % at 500 px, 6 at 224."""


_TAR_BYTES = 2048
"""What a sample takes in a shard beside its image: headers, label and padding, about."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be packed as an image.

    Attributes:
        name: its name in the source.
        reason: what is wrong with it.
        kept: whether its bytes are in the pack all the same (on_error="keep").
    """

    name: str
    reason: str
    kept: bool


class Form(NamedTuple):
    """What is made of a source: a pack, or an LMDB file."""

    is_lmdb: bool = False
    in_source_order: bool = False

    def describe(self) -> dict[str, Any]:
        return {"format": "lmdb", "in_source_order": self.in_source_order} if self.is_lmdb else {}


class Task(NamedTuple):
    """One pack or LMDB file to make; `split` is "" where the source is no root."""

    split: str
    found: Found
    destination: str
    form: Form = Form()

    @property
    def partial(self) -> str:
        return self.destination + layout.PARTIAL_SUFFIX


class RunOptions(NamedTuple):
    """What does not change the bytes of a pack that gets finished without failures."""

    on_error: (
        OnImageError | None
    )  # None: as a pack that is reshuffled has it; further failures stop
    num_workers: int
    memory_bytes: int
    progress: bool
    log: IoLog = NO_LOG
    split: str = ""  # for progress bars

    def bar(self, what: str, total: int, done: int = 0) -> Any:
        name = f"{self.split}: {what}" if self.split else what
        return progress_bar(name, total, enabled=self.progress, done=done)


class Sharding(NamedTuple):
    """How samples are dealt to shards, and the tables that they are re-coded with.

    Attributes:
        num_shards: shards of the pack.
        shards_per_bucket: shards that share a scratch file in the first round of dealing.
        tables: Huffman tables of the pack; None: not chosen yet, or each image has its own.
    """

    num_shards: int
    shards_per_bucket: int
    tables: bytes | None

    @classmethod
    def of(
        cls,
        source_bytes: int,
        settings: Settings,
        options: RunOptions,
        most_shards: int = sys.maxsize,
    ) -> Sharding:
        num_shards = max(1, min(most_shards, -(-source_bytes // settings.shard_bytes)))
        most_buckets = max(1, options.memory_bytes // _MIN_BUFFER_BYTES)
        return cls(num_shards, -(-num_shards // most_buckets), None)

    @property
    def num_buckets(self) -> int:
        return -(-self.num_shards // self.shards_per_bucket)


def agree_on_plan(partial: str, plan: PackPlan, options: RunOptions) -> PackPlan:
    """Compare with the run that is to be continued, and take over its tables and how it cut shards.

    Raises:
        PackError: naming each difference.
    """

    def check_space(cut: Sharding) -> None:
        tar_bytes = _TAR_BYTES * len(plan.index)
        require_space(partial, plan.source_bytes, plan.image_bytes, tar_bytes, cut, plan.form)

    def choose_tables() -> bytes | None:
        return _choose_tables(partial, plan, options)

    return dataclasses.replace(
        plan, cut=agree(partial, plan.describe(), plan.cut, check_space, choose_tables)
    )


def agree(
    partial: str,
    now: dict[str, Any],
    cut: Sharding,
    check_space: Callable[[Sharding], None],
    choose_tables: Callable[[], bytes | None],
) -> Sharding:
    """Begin a packing that is described by `now`, or continue it as it was begun."""
    path = os.path.join(partial, layout.SETTINGS_FILE)
    try:
        with open(path, "rb") as file:
            before = json.load(file)
    except FileNotFoundError:
        check_space(cut)
        cut = cut._replace(tables=choose_tables())
        _write_settings(path, now, cut)
        return cut
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
    if before["num_shards"] != cut.num_shards:
        # The number of shards follows from the source's bytes, and decides where all samples go.
        raise PackError(
            f"{partial}: the source changed since the interrupted run: it now makes "
            f"{cut.num_shards} shards, {before['num_shards']} before: delete that folder and run "
            "again"
        )
    # How scratch is grouped follows from the memory allowed and does not show in the pack.
    cut = cut._replace(shards_per_bucket=before["shards_per_bucket"])
    try:
        cut = cut._replace(tables=layout.parse_tables(before["huffman_tables"]))
    except (KeyError, ValueError) as error:
        raise PackError(
            f"{path}: 'huffman_tables': {error}: delete the folder {partial} to begin again"
        ) from error
    check_space(cut)
    if not was_indexed:
        _write_settings(path, now, cut)
    return cut


def _write_settings(path: str, now: dict[str, Any], cut: Sharding) -> None:
    chosen = {
        "num_shards": cut.num_shards,
        "shards_per_bucket": cut.shards_per_bucket,
        "huffman_tables": layout.describe_tables(cut.tables),
    }
    content = {**now, **chosen}
    write_whole(path, json.dumps(content, indent=1).encode())
    sync(os.path.dirname(path))


def settings_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "".join(
        f"\n  {key}: {before.get(key)!r} before, {value!r} now"
        for key, value in now.items()
        if before.get(key) != value
    )


def require_space(
    partial: str, source_bytes: int, image_bytes: int, tar_bytes: int, cut: Sharding, form: Form
) -> None:
    """Refuse to begin where the scratch and the shards cannot fit."""
    shard_bytes = image_bytes // cut.num_shards
    at_once = shard_bytes * (1 if cut.shards_per_bucket == 1 else cut.shards_per_bucket + 1)
    if form.is_lmdb:  # all scratch stays until the file is whole
        at_once = image_bytes
    needed = image_bytes * (1 + SPACE_MARGIN) + tar_bytes + at_once
    present = sum(
        _allocated_bytes(os.path.join(folder, name))
        for folder, _, names in os.walk(partial)
        for name in names
    )
    free = shutil.disk_usage(partial).free
    if needed - present > free:
        raise PackError(
            f"{partial}: not enough room: packing {format_bytes(source_bytes)} of images takes "
            f"{format_bytes(needed)} while it runs, {format_bytes(present)} are there already, and the "
            f"disk has {format_bytes(free)} free: make room for {format_bytes(needed - present - free)}"
        )


def _allocated_bytes(path: str) -> int:
    """Return what a file takes on the disk, with what is reserved behind its end."""
    stat = os.stat(path)
    return max(stat.st_size, stat.st_blocks * 512)


def _choose_tables(partial: str, plan: PackPlan, options: RunOptions) -> bytes | None:
    """Fit Huffman tables to some of the images, if there must be some and are none yet.

    Raises:
        PackError: where so many of them cannot be read that the disk must be dying.
    """
    if plan.origin.tables or not needs_tables(plan.settings):
        return plan.origin.tables
    if found := plan.origin.some_images[:TABLES_SAMPLES]:
        return fit_tables(found, len(found), plan.settings, options)
    # The places in the pack are random, so its first samples are as good as any.
    samples = plan.origin.first(plan.order, TABLES_SAMPLES)

    def images() -> Iterator[bytes]:
        unreadable: list[Failure] = []
        for sample, data in plan.origin.read_all(samples):
            if not isinstance(data, Refused):
                yield data
            elif data.is_read_error:
                unreadable.append(Failure(plan.index.name[sample], data.reason, False))
                refuse_dying_disk(unreadable, plan.index.root, partial)

    return fit_tables(images(), len(samples), plan.settings, options)


def needs_tables(settings: Settings) -> bool:
    return settings.tables == "pack" and not settings.keep_bytes


def fit_tables(
    images: Iterable[bytes], num_images: int, settings: Settings, options: RunOptions
) -> bytes:
    def count(data: bytes) -> npt.NDArray[np.uint64] | None:
        copy = smaller_copy(data, settings.shrink) if settings.shrink else None
        return native.count_symbols(copy or data, settings.restart_interval)

    options.log.begin_pass("choose tables")
    counts = np.zeros((4, 256), np.uint64)
    with (
        ThreadPoolExecutor(options.num_workers) as threads,
        options.bar("choose tables", num_images) as bar,
    ):
        for more in map_ahead(threads, count, images, 2 * options.num_workers):
            if more is not None:
                counts += more
            bar.update()
    return native.fit_tables(counts)


_Input = TypeVar("_Input")


_Output = TypeVar("_Output")


def map_ahead(
    threads: ThreadPoolExecutor,
    function: Callable[[_Input], _Output],
    inputs: Iterable[_Input],
    num_ahead: int,
) -> Iterator[_Output]:
    """Yield the outputs in the order of the inputs, of which few are in memory at once."""
    waiting: deque[Future[_Output]] = deque()
    try:
        for value in inputs:
            waiting.append(threads.submit(function, value))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def refuse_dying_disk(unreadable: Sequence[Failure], root: str, partial: str) -> None:
    """Stop in every mode: on_error is about a few bad images, not about a disk that fails."""
    if len(unreadable) >= _MAX_UNREADABLE:
        raise PackError(
            f"{len(unreadable)} files cannot be read, so packing stops:\n"
            + listed(unreadable)
            + f"\nCheck the disk, the connection and the permissions of {root}, or take these "
            f"files out of it; then run the command again: it continues from {partial}"
        )


# ---- the plan: which sample goes where -----------------------------------------------------------


@dataclass(frozen=True)
class PackPlan:
    """Everything that is known before the first image is read.

    Attributes:
        origin: what is packed, and what the pack is to be like.
        form: what is made of it; scratch goes by shards also where there will be none.
        cut: how it is dealt to shards.
        order: sample of each place in the pack.
        shard_begin: place where each shard begins, and the number of places.
        shard_of_sample: shard of each sample.
    """

    origin: Origin
    form: Form
    cut: Sharding

    @classmethod
    def make(cls, origin: Origin, form: Form, options: RunOptions) -> PackPlan:
        record = origin.record
        if "file_bytes" in record:
            cut = Sharding.of(record["file_bytes"], origin.settings, options)
        else:
            cut = Sharding.of(record["bytes"], origin.settings, options, len(origin.index))
        return cls(origin, form, cut._replace(tables=origin.tables))

    @property
    def num_shards(self) -> int:
        return self.cut.num_shards

    @property
    def shards_per_bucket(self) -> int:
        return self.cut.shards_per_bucket

    @property
    def tables(self) -> bytes | None:
        return self.cut.tables

    @property
    def index(self) -> Index:
        return self.origin.index

    @property
    def settings(self) -> Settings:
        return self.origin.settings

    @property
    def source_bytes(self) -> int:
        """What is read of the source."""
        return known_bytes(self.origin.lengths)

    @functools.cached_property
    def forecast(self) -> Forecast | None:
        """What smaller copies will come to, from some images; None where none are made."""
        if self.settings.shrink is None:
            return None
        num_sampled = min(NUM_SAMPLED, len(self.index))
        evenly = (place * len(self.index) // num_sampled for place in range(num_sampled))
        images = self.origin.some_images[:NUM_SAMPLED] or map(self.origin.read, evenly)
        return forecast_smaller(images, self.settings, self.tables)

    @property
    def image_bytes(self) -> int:
        """What the images will take in the pack, about, and not less."""
        return expected_pack_bytes(self.source_bytes, self.forecast)

    @functools.cached_property
    def _hashes(self) -> npt.NDArray[np.uint64]:
        return place_hashes(self.index.name, self.settings.seed)

    @functools.cached_property
    def order(self) -> npt.NDArray[np.int64]:
        if self.form.in_source_order:
            return np.arange(len(self.index))
        return np.argsort(self._hashes, kind="stable")

    @functools.cached_property
    def shard_begin(self) -> npt.NDArray[np.int64]:
        if "file_bytes" in self.origin.record and not self.form.in_source_order:
            # A sample's name says which shard it goes to, so it can be dealt before all are known.
            shards = shard_of_hash(self._hashes[self.order], self.num_shards)
            return np.searchsorted(shards, np.arange(self.num_shards + 1))
        # Shards of equal numbers of samples, not of bytes: so a place depends on names alone.
        return np.arange(self.num_shards + 1, dtype=np.int64) * len(self.index) // self.num_shards

    @functools.cached_property
    def shard_of_sample(self) -> npt.NDArray[np.int64]:
        shard = np.empty(len(self.index), np.int64)
        shard[self.order] = np.repeat(np.arange(self.num_shards), np.diff(self.shard_begin))
        return shard

    def shards_of_bucket(self, bucket: int) -> range:
        first = bucket * self.shards_per_bucket
        return range(first, min(first + self.shards_per_bucket, self.num_shards))

    def expected_bytes(self, image_bytes: int) -> dict[int, int]:
        """Return what each bucket will hold, at most, where all images take `image_bytes`."""
        ratio = image_bytes * (1 + SPACE_MARGIN) / max(self.source_bytes, 1)
        buckets = self.shard_of_sample // self.shards_per_bucket
        sizes = np.maximum(self.origin.lengths, 0)
        source_bytes = np.bincount(buckets, sizes, self.cut.num_buckets)
        return dict(enumerate((source_bytes * ratio).astype(np.int64).tolist()))

    def describe(self) -> dict[str, Any]:
        """Return what a continued packing must agree on."""
        settings = {**self.origin.settings_record, **self.form.describe()}
        return described(settings, self.origin.path, self.origin.id)


def described(settings: dict[str, Any], path: str, source_id: str | None) -> dict[str, Any]:
    """Return what a continued packing must agree on; an id of None: not known yet."""
    source = os.path.abspath(path)
    return {**settings, "version": __version__, "source": source, "source_id": source_id}


def place_hashes(names: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """Return the number that each sample is sorted by; ties keep the source's order."""
    keyed = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))

    def digest(name: str) -> bytes:
        state = keyed.copy()
        state.update(os.fsencode(name))
        return state.digest()

    return np.frombuffer(b"".join(map(digest, names)), "<u8").astype(np.uint64)


def shard_of_hash(hashes: npt.NDArray[np.uint64], num_shards: int) -> npt.NDArray[np.int64]:
    """Return floor(hash * num_shards / 2**64), in halves so that nothing overflows."""
    low = (hashes & np.uint64(2**32 - 1)) * np.uint64(num_shards)
    high = (hashes >> np.uint64(32)) * np.uint64(num_shards)
    return ((high + (low >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def forecast_smaller(
    images: Iterable[bytes | Refused], settings: Settings, tables: bytes | None
) -> Forecast | None:
    """Say from some images what smaller copies will come to; None where there is nothing to go by.

    Made before the tables of the pack are chosen, which add about 3 %.
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
    if forecast is None:
        return source_bytes
    ratio = forecast.small_bytes / forecast.source_bytes
    return int(source_bytes * ratio * (1 + _FORECAST_MARGIN))


MAX_REPORTED = 20


_MAX_UNREADABLE = 20
"""With every on_error: so many files that the system refuses to read are a dying disk."""


def listed(failures: Sequence[Failure]) -> str:
    by_name = sorted(failures, key=lambda failure: failure.name)
    lines = [f"  {failure.name}: {failure.reason}" for failure in by_name[:MAX_REPORTED]]
    if len(by_name) > MAX_REPORTED:
        lines.append(f"  and {len(by_name) - MAX_REPORTED} more")
    return "\n".join(lines)
