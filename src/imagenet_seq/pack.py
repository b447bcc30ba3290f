"""Write packs: the only writer of the format that docs/format.md describes.

The place of every sample in the pack is a function of (seed, name) alone, so packs are
byte-identical from any disk order, number of threads or restarts. A disk is not read at random:

1. **choose tables**: fit Huffman tables for the whole pack to a sample of it (the one exception to
   the rule above, as it costs seconds).
2. **deal**: read the source once in the order it lies on the disk, re-code in threads, append every
   sample to the scratch file of its shard (or of a group of shards, where buffers for all shards
   would not fit in memory; groups are dealt once more).
3. **finish**: read each shard's scratch whole, put its samples in order in memory, write the shard.

Everything happens in DESTINATION.partial; the last step is a rename, so a pack is whole or absent.
A journal of what has been dealt lets a second run continue where a killed one stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from imagenet_seq import __version__, _native
from imagenet_seq.errors import DataError, PackError
from imagenet_seq.index import Index, Names
from imagenet_seq.io_log import IoLog
from imagenet_seq.scratch import (
    DEALT,
    Buckets,
    Encoded,
    Journal,
    ShardFile,
    encoded_from,
    sync_folder,
    write_whole,
)
from imagenet_seq.shrink import NUM_SAMPLED, Forecast, Pair, Shrink, smaller_copy
from imagenet_seq.sources import SPLITS, is_split, open_source
from imagenet_seq.sources import pack as layout

OnError = Literal["fail", "skip", "keep"]
Tables = Literal["pack", "image"]

DEFAULT_SHARD_BYTES = 10**9
DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the buffers of the deal; finishing a shard takes that shard's size beside."""

_MIN_BUFFER_BYTES = 1 << 20
"""Memory for each scratch file, at least: it grows by about twice that at a time, so that a hard
disk seldom seeks."""

_SPACE_MARGIN = 0.05
"""The pack's tables and the restart markers make ImageNet's images 4.3 % larger."""

_TABLES_SAMPLES = 512
"""A pack's Huffman tables are fitted to this many of its samples, which takes about 6 s on a hard
disk. Tables of 250 ImageNet photos cost 0.005 % more bytes than those of 500."""

_FORECAST_MARGIN = 0.12
"""Twice the scatter of the bytes saved that 100 ImageNet photos show: 5 % at 500 px, 6 at 224."""

_TAR_BYTES = 2048
"""What a sample takes in a shard beside its image: headers, label and padding, about."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a pack, beside the source.

    Attributes:
        keep_bytes: store every image's own bytes instead of re-coding it.
        strip: drop ICC profiles, Exif thumbnails and comments while re-coding.
        restart_interval: MCUs between restart markers, 1 to 65535.
        tables: whose Huffman tables images have: those of the "pack", which decode fastest, or
            each "image" its own, which takes 2.5 % fewer bytes. Means nothing with keep_bytes.
        shard_bytes: bytes of the source that go into one shard, about.
        seed: of the permutation.
        shrink: what smaller copies are to be like; None: every image keeps its pixels.
    """

    keep_bytes: bool = False
    strip: bool = False
    restart_interval: int = 8
    tables: Tables = "pack"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    seed: int = 0
    shrink: Shrink | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2**64 - 1, got {self.seed}")
        if not 1 <= self.restart_interval <= 65535:
            raise ValueError(
                f"restart_interval: expected 1 to 65535 MCUs, got {self.restart_interval}"
            )
        if self.tables not in get_args(Tables):
            raise ValueError(f"tables: expected one of {get_args(Tables)}, got {self.tables!r}")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes: expected 1 or more, got {self.shard_bytes}")
        if self.keep_bytes and self.strip:
            raise ValueError("keep_bytes and strip contradict each other: give one of the two")
        if self.keep_bytes and self.shrink:
            raise ValueError("keep_bytes and max_side contradict each other: give one of the two")

    def describe(self) -> dict[str, Any]:
        """Return the settings as pack.json records them."""
        settings = asdict(self)
        shrink = settings.pop("shrink")
        if shrink is None:
            shrink = dict.fromkeys(field.name for field in dataclasses.fields(Shrink))
        return {**settings, **shrink}


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


@dataclass(frozen=True)
class Summary:
    """What a finished pack holds.

    Attributes:
        folder: the pack.
        num_samples: samples in it.
        source_bytes: bytes of the source's images.
        pack_bytes: bytes of the shards.
        num_canonical: samples re-coded into canonical form.
        num_shrunk: those of them that are smaller copies; the others keep their pixels.
        num_as_is: samples whose own bytes are stored.
        failures: samples left out, or kept although damaged.
        was_complete: the pack was there already, and nothing was done.
    """

    folder: str
    num_samples: int
    source_bytes: int
    pack_bytes: int
    num_canonical: int
    num_shrunk: int
    num_as_is: int
    failures: tuple[Failure, ...]
    was_complete: bool = False


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    on_error: OnError = "fail",
    splits: Sequence[str] | None = None,
    num_workers: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: bool = True,
    io_log: str | os.PathLike[str] | None = None,
) -> dict[str, Summary]:
    """Pack a folder of class folders, or a root with train/ and val/, into `destination`.

    Deterministic: the bytes written depend on the source's names, bytes and classes and on
    `settings` alone. When interrupted, the same call continues.

    Args:
        source: a folder of class folders, or a root that holds train/ and/or val/.
        destination: the pack to make; of a root, the folder for destination/train and so on.
        settings: what the pack is to be like; None: the defaults.
        on_error: what to do with an image that cannot be read or decoded. "fail" deals all others
            and then stops, naming them; "skip" leaves them out; "keep" stores their bytes as they
            are.
        splits: which splits of a root to pack; None: those that are there.
        num_workers: threads that re-code; None: one for each available core.
        memory_bytes: bound on the buffers for dealing samples to shards.
        progress: whether to show progress on stderr, and before that what smaller copies do to size
            and speed.
        io_log: file to append all requests to, in order; docs/packing.md describes it.

    Returns:
        For each split packed ("" where source is no root) what its pack holds.

    Raises:
        PackError: where packing stops; the message says why and how to go on.
        FileNotFoundError: where the source is not recognised.
        ValueError: where an argument is out of its domain.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error: expected one of {get_args(OnError)}, got {on_error!r}")
    settings = settings or Settings()
    source = os.path.abspath(os.path.expanduser(os.fspath(source)))
    destination = os.path.abspath(os.path.expanduser(os.fspath(destination)))
    tasks = _tasks(source, destination, splits)
    _refuse_overlap(source, destination, tasks)
    # All are opened before the first is packed for hours.
    opened = [_open_folder(task.source, progress) for task in tasks]
    with IoLog(None if io_log is None else os.fspath(io_log)) as log:
        num_workers = num_workers or layout.num_cores()
        options = _RunOptions(on_error, num_workers, memory_bytes, progress, log)
        return {
            task.split: _pack_one(index, task.destination, settings, options)
            for task, index in zip(tasks, opened, strict=True)
        }


class _Task(NamedTuple):
    """One pack to make; `split` is "" where the source is no root."""

    split: str
    source: str
    destination: str

    @property
    def partial(self) -> str:
        return self.destination + layout.PARTIAL_SUFFIX


def _tasks(source: str, destination: str, splits: Sequence[str] | None) -> list[_Task]:
    folders = [split for split in SPLITS if os.path.isdir(os.path.join(source, split))]
    if not any(is_split(os.path.join(source, split)) for split in folders):
        if splits:
            raise ValueError(f"{source}: expected a folder {' or '.join(splits)} in it, found none")
        return [_Task("", source, destination)]
    missing = [split for split in splits or () if split not in folders]
    if missing:
        raise ValueError(f"{source}: expected a folder {missing[0]} in it, found {folders}")
    return [
        _Task(split, os.path.join(source, split), os.path.join(destination, split))
        for split in splits or folders
    ]


def _refuse_overlap(source: str, destination: str, tasks: Sequence[_Task]) -> None:
    """Refuse folders of which one is, or lies in, another: packing would write to its source."""
    read = [source, *(task.source for task in tasks)]
    written = [destination, *(path for task in tasks for path in (task.destination, task.partial))]
    pairs = [(path, folder) for path in written for folder in read]
    pairs += [(task.partial, task.destination) for task in tasks]
    for path, folder in pairs:
        if _is_inside(path, folder) or _is_inside(folder, path):
            raise ValueError(
                f"{path} and {folder} are, or lie in, one another: packing {source} to "
                f"{destination} reads one and writes the other. Nothing was changed: name a "
                "destination outside the source that does not hold it either"
            )


def _is_inside(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


class _RunOptions(NamedTuple):
    """What does not change the bytes of a pack that gets finished without failures."""

    on_error: OnError
    num_workers: int
    memory_bytes: int
    progress: bool
    log: IoLog

    def bar(self, what: str, total: int, done: int = 0) -> Any:
        return tqdm(
            desc=what, total=total, initial=done, unit="img", disable=not self.progress,
            dynamic_ncols=True, mininterval=0.5, file=sys.stderr,
        )  # fmt: skip


def _open_folder(source: str, progress: bool) -> Index:
    opened = open_source(source, progress=progress)
    if opened.kind != "imagefolder":
        raise ValueError(f"{source}: expected a folder of class folders, found a {opened.kind}")
    return opened.index


def _pack_one(index: Index, destination: str, settings: Settings, options: _RunOptions) -> Summary:
    partial = destination + layout.PARTIAL_SUFFIX
    files = _look_at_files(index, options)
    plan = _Plan.make(index, files, settings, options)
    if os.path.lexists(destination):
        summary = _finished_before(destination, plan, options.on_error)
        _clear_scrap(partial)
        return summary
    with _clear_errors(partial), _claim(partial), _quiet_pillow():
        if os.path.lexists(destination):  # another process finished it just before we got the lock
            summary = _finished_before(destination, plan, options.on_error)
            _delete_scrap(partial)
            return summary
        agreed = _agree_on_plan(partial, plan, options)
        if plan.forecast and plan.settings.shrink and options.progress:
            text = plan.forecast.text(plan.settings.shrink, plan.source_bytes)
            tqdm.write(f"{destination}: {text}", file=sys.stderr)
        workshop = _Workshop(partial, agreed, plan.image_bytes, options)
        workshop.deal()
        workshop.finish_shards()
        workshop.finish_pack(destination)
    return summary_of(destination)


def summary_of(folder: str) -> Summary:
    """Return what the finished pack in `folder` says about itself."""
    about = layout.read_pack(folder).about
    failures = []
    if about["counts"]["failures"]:
        failures = [Failure(**failure) for failure in layout.read_failures(folder)]
    return Summary(
        folder,
        about["num_samples"],
        about["source"]["bytes"],
        sum(shard["bytes"] for shard in about["shards"]),
        about["counts"]["canonical"],
        about["counts"]["shrunk"],
        about["num_samples"] - about["counts"]["canonical"],
        tuple(failures),
    )


def _finished_before(destination: str, plan: _Plan, on_error: OnError) -> Summary:
    """Accept a pack that the same command made before; refuse everything else that is there."""
    summary, differences = None, ""
    with contextlib.suppress(DataError, OSError):
        about = layout.read_pack(destination).about
        differences = _differences(about["settings"], plan.settings.describe())
        same = not differences and about["source"]["index_id"] == plan.index.id
        if same and about["source"]["bytes"] == plan.source_bytes:
            summary = summary_of(destination)
    if summary is None:
        raise PackError(
            f"{destination}: exists already and is no pack of this source, as it is now, with "
            f"these settings.{differences}\nNothing was changed: name another destination, or "
            "delete it first"
        )
    if not _fits_policy(on_error, [failure.kept for failure in summary.failures]):
        kept = sum(failure.kept for failure in summary.failures)
        raise PackError(
            f"{destination}: exists already, with {kept} damaged samples kept and "
            f"{len(summary.failures) - kept} left out, which --on-error {on_error} would not do. "
            "Nothing was changed: name another destination, or delete it first"
        )
    return dataclasses.replace(summary, was_complete=True)


def _clear_scrap(partial: str) -> None:
    """Delete what a run left that was killed after its last rename.

    A folder that is not ours, or that another process holds, stays.
    """
    if os.path.lexists(partial):
        with contextlib.suppress(PackError), _claim(partial):
            _delete_scrap(partial)


def _fits_policy(on_error: OnError, kept: Sequence[bool]) -> bool:
    """Tell whether failures, each kept or left out, are what a run with `on_error` gives."""
    if on_error == "fail":
        return not kept
    return all(kept) if on_error == "keep" else not any(kept)


@contextlib.contextmanager
def _clear_errors(partial: str) -> Iterator[None]:
    """Say how to go on where the operating system refuses to write."""
    try:
        yield
    except OSError as error:
        how = f"What is done is kept in {partial}: run the same command again to continue"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(os.path.dirname(partial)).free
            raise PackError(
                f"{error}: the disk is full ({_megabytes(free)} free). {how} once there is room, "
                "or delete that folder"
            ) from error
        raise PackError(f"{error}. {how}") from error


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


# ---- the folder that a pack is made in -----------------------------------------------------------


_LOCK_FILE, _JOURNAL_FILE, _PACK_FOLDER = "lock", "dealt", "pack"

_OURS = re.compile(r"(dealt|(deal|split|rows)-\d{6,}|settings\.json)(\.tmp)?")
"""What packing writes into DESTINATION.partial, beside the lock and the folder `pack`."""

_OURS_IN_PACK = re.compile(
    r"(shard-\d{6,}\.tar|(index|names|names_begin)\.npy|(pack|failures)\.json)(\.tmp)?"
)


@contextlib.contextmanager
def _claim(partial: str) -> Iterator[None]:
    """Make the folder and hold its lock, which the kernel releases when the process ends.

    Raises:
        PackError: where another packer holds it, or where the folder is somebody else's.
    """
    _refuse_foreign(partial)
    os.makedirs(partial, exist_ok=True)
    path = os.path.join(partial, _LOCK_FILE)
    with open(path, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have finished and removed the folder since.
            held = os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise PackError(
                f"{path}: this file system has no file locks ({error.strerror}), which keep two "
                "packers apart: pack to another one, and copy the finished pack"
            ) from error
        if not held:
            raise PackError(f"{partial}: another process is packing there; wait for it, or stop it")
        os.makedirs(os.path.join(partial, _PACK_FOLDER), exist_ok=True)
        yield


def _refuse_foreign(partial: str) -> None:
    """Refuse a folder that packing did not make: what is in it must not be touched.

    The lock is the first thing in a folder of ours and the last one deleted.
    """
    if not os.path.lexists(partial):
        return
    ours = False
    if os.path.isdir(partial) and not os.path.islink(partial):
        names = os.listdir(partial)
        lock = os.path.join(partial, _LOCK_FILE)
        ours = not names or (os.path.isfile(lock) and not os.path.islink(lock))
    if not ours:
        raise PackError(
            f"{partial}: exists and was not made by imagenet-seq pack: move it, or name another "
            "destination"
        )


def _delete_scrap(partial: str) -> None:
    """Delete what packing made, by its names; a file that somebody else put there stays.

    Settings and lock go last, so that a folder whose deletion was cut short is still ours.
    """
    pack_folder = os.path.join(partial, _PACK_FOLDER)
    if os.path.isdir(pack_folder):
        _delete_matching(pack_folder, _OURS_IN_PACK)
        _remove_empty(pack_folder)
    _delete_matching(partial, _OURS, keep=layout.SETTINGS_FILE)
    for name in (layout.SETTINGS_FILE, _LOCK_FILE):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(partial, name))
    _remove_empty(partial)


def _delete_matching(folder: str, pattern: re.Pattern[str], keep: str = "") -> None:
    for name in os.listdir(folder):
        if pattern.fullmatch(name) and name != keep:
            os.unlink(os.path.join(folder, name))


def _remove_empty(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _agree_on_plan(partial: str, plan: _Plan, options: _RunOptions) -> _Plan:
    """Compare with the run that is to be continued, and take over its tables and how it cut shards.

    Raises:
        PackError: naming each difference.
    """
    path = os.path.join(partial, layout.SETTINGS_FILE)
    now = plan.describe()
    try:
        with open(path, "rb") as file:
            before = json.load(file)
    except FileNotFoundError:
        _check_space(partial, plan)
        plan = dataclasses.replace(plan, tables=_choose_tables(partial, plan, options))
        chosen = {
            "num_shards": plan.num_shards,
            "shards_per_bucket": plan.shards_per_bucket,
            "huffman_tables": layout.describe_tables(plan.tables),
        }
        write_whole(path, json.dumps({**now, **chosen}, indent=1).encode())
        sync_folder(partial)
        return plan
    differences = _differences(before, now)
    if differences:
        raise PackError(
            f"{partial}: an unfinished pack made with other settings or of another source:"
            f"{differences}\nRun the command with the former settings to continue it, or delete "
            "that folder to begin again"
        )
    if before["num_shards"] != plan.num_shards:
        # The number of shards follows from the source's bytes, and decides where all samples go.
        raise PackError(
            f"{partial}: the source changed since the interrupted run: its "
            f"{_megabytes(plan.source_bytes)} now make {plan.num_shards} shards, "
            f"{before['num_shards']} before: delete that folder and run again"
        )
    # How scratch is grouped follows from the memory allowed and does not show in the pack.
    plan = dataclasses.replace(plan, shards_per_bucket=before["shards_per_bucket"])
    try:
        plan = dataclasses.replace(plan, tables=layout.parse_tables(before["huffman_tables"]))
    except (KeyError, ValueError) as error:
        raise PackError(
            f"{path}: 'huffman_tables': {error}: delete the folder {partial} to begin again"
        ) from error
    _check_space(partial, plan)
    return plan


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "".join(
        f"\n  {key}: {before.get(key)!r} before, {value!r} now"
        for key, value in now.items()
        if before.get(key) != value
    )


def _check_space(partial: str, plan: _Plan) -> None:
    """Refuse to begin where the scratch and the shards cannot fit."""
    image_bytes = plan.image_bytes
    shard_bytes = image_bytes // plan.num_shards
    at_once = shard_bytes * (1 if plan.shards_per_bucket == 1 else plan.shards_per_bucket + 1)
    tar_bytes = _TAR_BYTES * len(plan.index)
    needed = image_bytes * (1 + _SPACE_MARGIN) + tar_bytes + at_once
    present = sum(
        _allocated_bytes(os.path.join(folder, name))
        for folder, _, names in os.walk(partial)
        for name in names
    )
    free = shutil.disk_usage(partial).free
    if needed - present > free:
        raise PackError(
            f"{partial}: not enough room: packing {_megabytes(plan.source_bytes)} of images takes "
            f"{_megabytes(needed)} while it runs, {_megabytes(present)} are there already, and the "
            f"disk has {_megabytes(free)} free: make room for {_megabytes(needed - present - free)}"
        )


def _allocated_bytes(path: str) -> int:
    """Return what a file takes on the disk, with what is reserved behind its end."""
    stat = os.stat(path)
    return max(stat.st_size, stat.st_blocks * 512)


def _choose_tables(partial: str, plan: _Plan, options: _RunOptions) -> bytes | None:
    """Fit Huffman tables to the first samples of the pack; None where none are needed.

    Raises:
        PackError: where so many of them cannot be read that the disk must be dying.
    """
    if plan.settings.keep_bytes or plan.settings.tables == "image":
        return None

    def images() -> Iterator[bytes]:
        unreadable: list[Failure] = []
        for sample in samples.tolist():
            data = plan.read(sample)
            if not isinstance(data, _Refused):
                yield data
            elif data.is_read_error:
                unreadable.append(Failure(plan.index.name[sample], data.reason, False))
                _refuse_dying_disk(unreadable, plan.index.root, partial)

    def count(data: bytes) -> npt.NDArray[np.uint64] | None:
        copy = smaller_copy(data, plan.settings.shrink) if plan.settings.shrink else None
        return _native.count_symbols(copy or data, plan.settings.restart_interval)

    # The places in the pack are random, so its first samples are as good as any.
    samples = plan.order[:_TABLES_SAMPLES]
    samples = plan.files.in_disk_order(samples)
    options.log.begin_pass("choose tables")
    counts = np.zeros((4, 256), np.uint64)
    with (
        ThreadPoolExecutor(options.num_workers) as threads,
        options.bar("choose tables", len(samples)) as bar,
    ):
        for more in _map_ahead(threads, count, images(), 2 * options.num_workers):
            if more is not None:
                counts += more
            bar.update()
    return _native.fit_tables(counts)


_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


def _map_ahead(
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


def _refuse_dying_disk(unreadable: Sequence[Failure], root: str, partial: str) -> None:
    """Stop in every mode: on_error is about a few bad images, not about a disk that fails."""
    if len(unreadable) >= _MAX_UNREADABLE:
        raise PackError(
            f"{len(unreadable)} files cannot be read, so packing stops:\n"
            + _listed(unreadable)
            + f"\nCheck the disk, the connection and the permissions of {root}, or take these "
            f"files out of it; then run the command again: it continues from {partial}"
        )


# ---- the plan: which sample goes where -----------------------------------------------------------


class _Files(NamedTuple):
    """What the file system says of every sample's file; -1 where it does not."""

    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]
    inodes: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.int64]

    def in_disk_order(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort samples by where their files lie on the disk, so that its head moves on and on.

        Inodes, which are given out about in the order of a file system's blocks, decide where it
        does not tell addresses.
        """
        return samples[np.lexsort((self.inodes[samples], self.addresses[samples]))]


def _look_at_files(index: Index, options: _RunOptions) -> _Files:
    def look(first: int) -> list[tuple[int, int, int, int]]:
        found = []
        for name in index.files[first : first + slice_size]:
            path = os.path.join(index.root, name)
            try:
                stat = os.stat(path)
                _, address = _native.look_up(path)
                inode = stat.st_ino & (2**63 - 1)
                found.append((stat.st_size, stat.st_mtime_ns, inode, address))
            except OSError:  # reading says why
                found.append((-1, -1, -1, -1))
        return found

    # Class folder by class folder: file systems keep the inodes of a folder together and read many
    # at a time (ext4 512), and an inode holds the addresses of a small file.
    slice_size = 1024
    table = np.empty((len(index), 4), np.int64)
    firsts = range(0, len(index), slice_size)
    # Threads overlap the waits for a disk or a network; eight keep a disk's queue full.
    with ThreadPoolExecutor(8) as threads, options.bar("look at files", len(index)) as bar:
        for first, found in zip(firsts, threads.map(look, firsts), strict=True):
            table[first : first + len(found)] = found
            bar.update(len(found))
    return _Files(*(column.copy() for column in table.T))


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before the first image is read.

    Attributes:
        index: the source.
        settings: what the pack is to be like.
        files: size, time and place of each sample's file.
        num_shards: shards of the pack.
        shards_per_bucket: shards that share a scratch file in the first round of dealing.
        order: sample of each place in the pack.
        shard_begin: place where each shard begins, and the number of places.
        shard_of_sample: shard of each sample.
        tables: Huffman tables of the pack; None: not chosen yet, or each image has its own.
        log: of requests.
    """

    index: Index
    settings: Settings
    files: _Files
    log: IoLog
    num_shards: int
    shards_per_bucket: int
    tables: bytes | None = None

    @classmethod
    def make(cls, index: Index, files: _Files, settings: Settings, options: _RunOptions) -> _Plan:
        source_bytes = _known_bytes(files)
        num_shards = max(1, min(len(index), -(-source_bytes // settings.shard_bytes)))
        most_buckets = max(1, options.memory_bytes // _MIN_BUFFER_BYTES)
        shards_per_bucket = -(-num_shards // most_buckets)
        return cls(index, settings, files, options.log, num_shards, shards_per_bucket)

    @functools.cached_property
    def source_bytes(self) -> int:
        return _known_bytes(self.files)

    @functools.cached_property
    def forecast(self) -> Forecast | None:
        """What smaller copies will come to, from some images; None where none are made.

        Made before the tables of the pack are chosen, which add about 3 %.
        """
        if self.settings.shrink is None:
            return None
        lossless = dataclasses.replace(
            self, settings=dataclasses.replace(self.settings, shrink=None)
        )
        num_sampled = min(NUM_SAMPLED, len(self.index))
        pairs = []
        for place in range(num_sampled):
            data = self.read(place * len(self.index) // num_sampled)
            if isinstance(data, _Refused):
                continue
            before, after = _encode(data, lossless), _encode(data, self)
            if isinstance(before, Encoded) and isinstance(after, Encoded):
                pairs.append(Pair(len(data), before, after))
        return Forecast.measure(pairs, self.settings.shrink) if pairs else None

    @property
    def image_bytes(self) -> int:
        """What the images will take in the pack, about, and not less."""
        if self.forecast is None:
            return self.source_bytes
        ratio = self.forecast.small_bytes / self.forecast.source_bytes
        return int(self.source_bytes * ratio * (1 + _FORECAST_MARGIN))

    @functools.cached_property
    def order(self) -> npt.NDArray[np.int64]:
        return np.argsort(_place_hashes(self.index.name, self.settings.seed), kind="stable")

    @functools.cached_property
    def shard_begin(self) -> npt.NDArray[np.int64]:
        # Shards of equal numbers of samples, not of bytes: so a place depends on names alone.
        return np.arange(self.num_shards + 1, dtype=np.int64) * len(self.index) // self.num_shards

    @functools.cached_property
    def shard_of_sample(self) -> npt.NDArray[np.int64]:
        shard = np.empty(len(self.index), np.int64)
        shard[self.order] = np.repeat(np.arange(self.num_shards), np.diff(self.shard_begin))
        return shard

    @property
    def num_buckets(self) -> int:
        return -(-self.num_shards // self.shards_per_bucket)

    def shards_of_bucket(self, bucket: int) -> range:
        first = bucket * self.shards_per_bucket
        return range(first, min(first + self.shards_per_bucket, self.num_shards))

    def expected_bytes(self, image_bytes: int) -> dict[int, int]:
        """Return what each bucket will hold, about, where all images take `image_bytes`."""
        ratio = image_bytes / max(self.source_bytes, 1)
        buckets = self.shard_of_sample // self.shards_per_bucket
        source_bytes = np.bincount(buckets, np.maximum(self.files.sizes, 0), self.num_buckets)
        return dict(enumerate((source_bytes * ratio).astype(np.int64).tolist()))

    def read(self, sample: int) -> bytes | _Refused:
        """Return the content of a sample's file."""
        path = os.path.join(self.index.root, self.index.files[int(self.index.file[sample])])
        data = _read(path)
        place = {"address": int(self.files.addresses[sample])}
        place["inode"] = int(self.files.inodes[sample])
        self.log.note("read", path, 0, 0 if isinstance(data, _Refused) else len(data), **place)
        return data

    def describe(self) -> dict[str, Any]:
        """Return what a continued packing must agree on."""
        return {
            **self.settings.describe(),
            "version": __version__,
            "source": os.path.abspath(self.index.root),
            "source_id": self.index.id,
        }


def _known_bytes(files: _Files) -> int:
    return int(files.sizes[files.sizes > 0].sum())


def _place_hashes(names: Names, seed: int) -> npt.NDArray[np.uint64]:
    """Return the number that each sample is sorted by; ties keep the source's order."""
    keyed = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))

    def digest(name: str) -> bytes:
        state = keyed.copy()
        state.update(os.fsencode(name))
        return state.digest()

    return np.frombuffer(b"".join(map(digest, names)), "<u8").astype(np.uint64)


# ---- encoding ------------------------------------------------------------------------------------


class _Refused(NamedTuple):
    """Why a sample is no image, or could not be read."""

    reason: str
    data: bytes | None  # None: there is nothing to keep
    is_read_error: bool = False  # the disk's failure, not the image's


def _read(path: str) -> bytes | _Refused:
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "?")
        return _Refused(f"cannot be read: {error.strerror} ({code})", None, is_read_error=True)
    if len(data) > layout.MAX_IMAGE_BYTES:
        return _Refused(f"{len(data)} bytes are more than a tar member can hold", None)
    return data


def _encode(data: bytes, plan: _Plan) -> Encoded | _Refused:
    """Return an image as it is to be stored."""
    copy = smaller_copy(data, plan.settings.shrink) if plan.settings.shrink else None
    if copy is None:
        return _recode(data, plan)
    encoded = _recode(copy, plan)
    if isinstance(encoded, Encoded):
        encoded = encoded._replace(flags=encoded.flags | layout.FLAG_SHRUNK)
    return encoded


def _recode(data: bytes, plan: _Plan) -> Encoded | _Refused:
    """Re-code one image, or keep it where the core can't but Pillow can decode it."""
    settings = plan.settings
    recoded = _native.transcode(data, settings.restart_interval, settings.strip, plan.tables)
    if recoded is not None and _is_trusted(recoded[0].data, data, settings):
        stored = memoryview(data) if settings.keep_bytes else recoded[0].data
        flags = layout.FLAG_CLEAN | (0 if settings.keep_bytes else layout.FLAG_CANONICAL)
        header = recoded[1]
        return Encoded(stored, header.width, header.height, _native.crc32c(stored), flags)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address, and reports must not differ between runs.
        return _Refused("is no image that Pillow can identify", data)
    except Exception as error:  # a damaged image raises almost anything
        return _Refused(f"Pillow cannot decode it: {type(error).__name__}: {error}", data)
    return Encoded(memoryview(data), width, height, _native.crc32c(data), 0)


def _is_trusted(recoded: memoryview, data: bytes, settings: Settings) -> bool:
    """Whether what was re-coded may stand for `data`.

    What the core decodes anyway is exact. Images in several scans are otherwise left to Pillow, so
    that their pixels are Pillow's by construction; Pillow has to confirm that they stay the same.
    """
    header = _native.read_header(data)
    if header is not None and header.supported:
        return True
    return not settings.keep_bytes and _pixels_are_equal(recoded, data)


def _pixels_are_equal(first: memoryview, second: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(first)) as one, Image.open(io.BytesIO(second)) as other:
            same_kind = (one.mode, one.size) == (other.mode, other.size)
            return same_kind and one.tobytes() == other.tobytes()
    except Exception:  # a damaged image raises almost anything
        return False


def _keep_damaged(refused: _Refused) -> Encoded | _Refused:
    if refused.data is None:
        return refused
    crc = _native.crc32c(refused.data)
    return Encoded(memoryview(refused.data), -1, -1, crc, layout.FLAG_DAMAGED)


# ---- the two passes ------------------------------------------------------------------------------

_RUN_SAMPLES, _RUN_BYTES = 16, 4 << 20
"""A worker gets this many samples at once: enough to hide what handing over costs."""

_MAX_REPORTED = 20
_MAX_FAILURES = 1000
"""With on_error="fail": more than this is a broken disk or a wrong folder, not a few bad files."""

_MAX_UNREADABLE = 20
"""With every on_error: so many files that the system refuses to read are a dying disk."""


def _listed(failures: Sequence[Failure]) -> str:
    by_name = sorted(failures, key=lambda failure: failure.name)
    lines = [f"  {failure.name}: {failure.reason}" for failure in by_name[:_MAX_REPORTED]]
    if len(by_name) > _MAX_REPORTED:
        lines.append(f"  and {len(by_name) - _MAX_REPORTED} more")
    return "\n".join(lines)


class _ShardRows(NamedTuple):
    """What is written beside a finished shard: its rows, and what it was made of."""

    about: dict[str, Any]
    failures: list[dict[str, Any]]
    table: npt.NDArray[np.void]
    samples: npt.NDArray[np.int64]
    source_files: npt.NDArray[np.int64]


class _Workshop:
    """Deals samples to scratch files, then makes shards of them, in a claimed folder."""

    def __init__(self, partial: str, plan: _Plan, image_bytes: int, options: _RunOptions) -> None:
        self._partial = partial
        self._pack_folder = os.path.join(partial, _PACK_FOLDER)
        self._plan = plan
        self._options = options
        self._failures: dict[int, Failure] = {}
        self._unreadable: list[Failure] = []
        self._journal = Journal(os.path.join(partial, _JOURNAL_FILE), options.log)
        expected_bytes = plan.expected_bytes(image_bytes)
        self._buckets = Buckets(
            partial, "deal", options.memory_bytes, expected_bytes, self._journal.add, options.log
        )
        self._finished = self._keep_finished()
        self._recover()

    def _keep_finished(self) -> set[int]:
        """Return the shards that are as this run would write them; delete all others.

        Their samples are dealt again.
        """
        finished = {shard for shard in range(self._plan.num_shards) if self._is_finished(shard)}
        for shard in set(range(self._plan.num_shards)) - finished:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._shard_path(shard))
        # Otherwise a power failure could bring an old shard back beside its new rows.
        sync_folder(self._pack_folder)
        return finished

    def _is_finished(self, shard: int) -> bool:
        rows = self._read_rows(shard)
        if rows is None:
            return False
        try:
            size = os.stat(self._shard_path(shard)).st_size
        except FileNotFoundError:
            return False
        kept = [failure["kept"] for failure in rows.failures]
        return (
            size == rows.about["bytes"]
            and np.array_equal(rows.source_files, self._source_files(shard))
            and _fits_policy(self._options.on_error, kept)
        )

    def _recover(self) -> None:
        """Take over what earlier runs have dealt, without what a kill tore."""
        self._journal.recover()
        rows = self._journal.rows()
        rows = rows[self._is_good(rows)]
        # Where a sample was dealt twice, the later one counts.
        _, last = np.unique(rows["sample"][::-1], return_index=True)
        rows = rows[len(rows) - 1 - last]
        self._journal.rewrite(rows)
        for bucket in range(self._plan.num_buckets):
            mine = rows[rows["bucket"] == bucket]
            end = int((mine["offset"] + mine["length"]).max()) if len(mine) else 0
            self._buckets.set_end(bucket, end)

    def _is_good(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        plan = self._plan
        good = (rows["sample"] >= 0) & (rows["sample"] < len(plan.index))
        sample = np.where(good, rows["sample"], 0)
        file_size = np.zeros(plan.num_buckets, np.int64)
        for bucket in range(plan.num_buckets):
            with contextlib.suppress(FileNotFoundError):
                file_size[bucket] = os.stat(self._buckets.path(bucket)).st_size
        expected = plan.shard_of_sample[sample] // plan.shards_per_bucket
        good &= rows["bucket"] == expected
        good &= rows["offset"] + rows["length"] <= file_size[expected]
        good &= rows["source_length"] == plan.files.sizes[sample]
        good &= rows["source_mtime_ns"] == plan.files.mtimes_ns[sample]
        if self._options.on_error != "keep":
            good &= (rows["flags"] & layout.FLAG_DAMAGED) == 0
        return np.asarray(good)

    # ---- deal

    def deal(self) -> None:
        """Read, re-code and deal all samples that are missing.

        Raises:
            PackError: where samples fail and on_error asks to stop.
        """
        missing = np.ones(len(self._plan.index), np.bool_)
        missing[self._journal.rows()["sample"]] = False
        for shard in self._finished:
            missing[self._samples_of(shard)] = False
        samples = self._plan.files.in_disk_order(np.flatnonzero(missing))
        self._options.log.begin_pass("deal")
        done = len(missing) - len(samples)
        with (
            ThreadPoolExecutor(self._options.num_workers) as threads,
            self._options.bar("read and re-code", len(missing), done) as bar,
        ):
            try:
                runs = self._read_runs(samples)  # in this thread, in this order
                ahead = 2 * self._options.num_workers
                for run in _map_ahead(threads, self._encode_run, runs, ahead):
                    for sample, length, encoded in run:
                        self._deal_one(sample, length, encoded)
                    _advance(bar, len(run), sum(max(length, 0) for _, length, _ in run))
            finally:
                self._buckets.flush()
        self._stop_on_failures()

    def _read_runs(
        self, samples: npt.NDArray[np.int64]
    ) -> Iterator[list[tuple[int, bytes | _Refused]]]:
        run: list[tuple[int, bytes | _Refused]] = []
        run_bytes = 0
        for sample in samples.tolist():
            data = self._plan.read(sample)
            run.append((sample, data))
            run_bytes += 0 if isinstance(data, _Refused) else len(data)
            if len(run) >= _RUN_SAMPLES or run_bytes >= _RUN_BYTES:
                yield run
                run, run_bytes = [], 0
        if run:
            yield run

    def _encode_run(
        self, run: list[tuple[int, bytes | _Refused]]
    ) -> list[tuple[int, int, Encoded | _Refused]]:
        return [
            (sample, -1, data)
            if isinstance(data, _Refused)
            else (sample, len(data), _encode(data, self._plan))
            for sample, data in run
        ]

    def _deal_one(self, sample: int, length: int, encoded: Encoded | _Refused) -> None:
        if isinstance(encoded, _Refused):
            encoded = self._fail(sample, encoded)
        if isinstance(encoded, Encoded):
            bucket = int(self._plan.shard_of_sample[sample]) // self._plan.shards_per_bucket
            mtime_ns = int(self._plan.files.mtimes_ns[sample])
            self._buckets.append(bucket, sample, encoded, length, mtime_ns)

    def _fail(self, sample: int, refused: _Refused) -> Encoded | _Refused:
        """Note a failure; return what is to be stored under on_error="keep"."""
        kept = _keep_damaged(refused) if self._options.on_error == "keep" else refused
        name = self._plan.index.name[sample]
        failure = Failure(name, refused.reason, isinstance(kept, Encoded))
        self._failures[sample] = failure
        if self._options.progress and len(self._failures) <= _MAX_REPORTED:
            tqdm.write(f"{name}: {refused.reason}", file=sys.stderr)
        if refused.is_read_error:
            self._unreadable.append(failure)
            _refuse_dying_disk(self._unreadable, self._plan.index.root, self._partial)
        if self._options.on_error == "fail" and len(self._failures) >= _MAX_FAILURES:
            self._stop_on_failures()
        return kept

    def _stop_on_failures(self) -> None:
        stopping = [f for f in self._failures.values() if not f.kept]
        if not stopping or self._options.on_error == "skip":
            return
        keep = ", or --on-error keep to store their bytes as they are"
        raise PackError(
            f"{len(stopping)} of {len(self._plan.index)} images cannot be packed:\n"
            + _listed(stopping)
            + "\nRepair them, or add --on-error skip to leave them out"
            + (keep if self._options.on_error == "fail" else "")
            + f"; then run the command again: it continues from {self._partial}"
        )

    # ---- finish

    def finish_shards(self) -> None:
        """Make every shard that is not there yet, each from one sequential read of its scratch."""
        plan = self._plan
        rows = self._journal.rows()
        self._options.log.begin_pass("finish")
        done = sum(len(self._samples_of(shard)) for shard in self._finished)
        with self._options.bar("write shards", len(plan.index), done) as bar:
            for bucket in range(plan.num_buckets):
                shards = [s for s in plan.shards_of_bucket(bucket) if s not in self._finished]
                if not shards:
                    continue
                mine = rows[rows["bucket"] == bucket]
                if plan.shards_per_bucket == 1:
                    self._finish_shard(shards[0], self._buckets.load(bucket), mine, bar)
                else:
                    self._finish_group(bucket, shards, mine, bar)
                self._buckets.remove(bucket)

    def _finish_group(
        self, bucket: int, shards: list[int], rows: npt.NDArray[np.void], bar: Any
    ) -> None:
        """Deal the scratch of several shards once more, to a file for each; then finish them.

        Nothing of this is journalled: a killed run begins again with the group's scratch.
        """
        again: list[npt.NDArray[np.void]] = []
        rows = rows[np.isin(self._plan.shard_of_sample[rows["sample"]], shards)]
        in_shard = self._plan.shard_of_sample[rows["sample"]]
        expected_bytes = {s: int(rows["length"][in_shard == s].sum()) for s in shards}
        memory_bytes, log = self._options.memory_bytes, self._options.log
        split = Buckets(self._partial, "split", memory_bytes, expected_bytes, again.append, log)
        for shard in shards:
            split.remove(shard)
        for row, data in self._buckets.read(bucket, np.sort(rows, order="offset")):
            sample = int(row["sample"])
            shard = int(self._plan.shard_of_sample[sample])
            stamp = (int(row["source_length"]), int(row["source_mtime_ns"]))
            split.append(shard, sample, encoded_from(data, row), *stamp)
        split.flush()
        rows = np.concatenate([np.empty(0, DEALT), *again])
        for shard in shards:
            self._finish_shard(shard, split.load(shard), rows[rows["bucket"] == shard], bar)
            split.remove(shard)

    def _finish_shard(
        self, shard: int, scratch: memoryview, rows: npt.NDArray[np.void], bar: Any
    ) -> None:
        """Write one shard, and beside it the rows that the index will need."""
        dealt = {int(row["sample"]): row for row in rows}
        path = self._shard_path(shard)
        expected_bytes = layout.shard_bytes(rows["length"])
        table: list[tuple[Any, ...]] = []
        samples: list[int] = []
        with ShardFile(path + ".tmp", expected_bytes, self._options.log) as file:
            for sample in self._samples_of(shard).tolist():
                encoded = self._take_dealt(scratch, dealt.get(sample), sample)
                if encoded is not None:
                    table.append(self._write_sample(file, shard, sample, encoded))
                    samples.append(sample)
                _advance(bar, 1, 0 if encoded is None else len(encoded.data))
            file.write(layout.END_OF_SHARD)
        about = {
            "file": layout.shard_file(shard),
            "bytes": file.size,
            "crc32c": f"{file.crc32c:08x}",
            "num_samples": len(table),
        }
        failures = [
            asdict(self._failures[s]) for s in self._samples_of(shard) if s in self._failures
        ]
        content = json.dumps({"about": about, "failures": failures}).encode() + b"\n"
        content += np.array(table, layout.ROW).tobytes() + np.array(samples, "<i8").tobytes()
        content += self._source_files(shard).tobytes()
        write_whole(self._rows_path(shard), content, self._options.log)
        sync_folder(self._partial)  # a power failure must not leave a shard without its rows
        os.replace(path + ".tmp", path)

    def _write_sample(
        self, file: ShardFile, shard: int, sample: int, encoded: Encoded
    ) -> tuple[Any, ...]:
        name, label = self._plan.index.name[sample], int(self._label[sample])
        canonical = bool(encoded.flags & layout.FLAG_CANONICAL)
        file.write(layout.member_header(self._members.image(name, canonical), len(encoded.data)))
        offset = file.size
        file.write(encoded.data)
        file.write(layout.padding(len(encoded.data)))
        content = layout.label_content(label)
        file.write(layout.member_header(self._members.label(name), len(content)))
        file.write(content)
        file.write(layout.padding(len(content)))
        data, width, height, crc, flags = encoded
        return (offset, len(data), shard, label, width, height, crc, flags, (0, 0, 0))

    def _take_dealt(self, scratch: memoryview, row: Any, sample: int) -> Encoded | None:
        """Return a sample from the scratch, or from the source where the scratch is not sound.

        None: the sample is to be left out.
        """
        if row is not None:
            data = scratch[int(row["offset"]) : int(row["offset"]) + int(row["length"])]
            if len(data) == row["length"] and _native.crc32c(data) == row["crc32c"]:
                if row["flags"] & layout.FLAG_DAMAGED and sample not in self._failures:
                    self._encode_again(sample, bytes(data))  # an earlier run knew what is wrong
                return encoded_from(data, row)
        if sample in self._failures:
            return None
        encoded = self._encode_again(sample, self._plan.read(sample))
        self._stop_on_failures()
        return encoded

    def _encode_again(self, sample: int, data: bytes | _Refused) -> Encoded | None:
        encoded = data if isinstance(data, _Refused) else _encode(data, self._plan)
        if isinstance(encoded, _Refused):
            encoded = self._fail(sample, encoded)
        return encoded if isinstance(encoded, Encoded) else None

    @functools.cached_property
    def _members(self) -> layout.MemberNames:
        return layout.MemberNames(self._plan.index.name)

    @functools.cached_property
    def _label(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._plan.index.targets, np.int32)

    def _samples_of(self, shard: int) -> npt.NDArray[np.int64]:
        begin, end = self._plan.shard_begin[shard : shard + 2]
        return self._plan.order[begin:end]

    def _rows_path(self, shard: int) -> str:
        return os.path.join(self._partial, f"rows-{shard:06d}")

    def _shard_path(self, shard: int) -> str:
        return os.path.join(self._pack_folder, layout.shard_file(shard))

    def _source_files(self, shard: int) -> npt.NDArray[np.int64]:
        """Return sizes and times, before reading, of the files that the shard is made of."""
        samples, files = self._samples_of(shard), self._plan.files
        return np.stack([files.sizes[samples], files.mtimes_ns[samples]]).astype("<i8")

    def _read_rows(self, shard: int) -> _ShardRows | None:
        """Return what was written beside a shard; None where it is missing or torn."""
        try:
            with open(self._rows_path(shard), "rb") as file:
                header = json.loads(file.readline())
                content = file.read()
            num_rows = header["about"]["num_samples"]
            split = np.cumsum([num_rows * layout.ROW.itemsize, num_rows * 8])
            return _ShardRows(
                header["about"],
                header["failures"],
                np.frombuffer(content[: split[0]], layout.ROW),
                np.frombuffer(content[split[0] : split[1]], "<i8"),
                np.frombuffer(content[split[1] :], "<i8").reshape(2, -1),
            )
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def finish_pack(self, destination: str) -> None:
        """Write the tables, then give the pack its name: the moment it comes to exist."""
        abouts: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        tables, samples = [], []
        for shard in range(self._plan.num_shards):
            written = self._read_rows(shard)
            if written is None:
                raise PackError(f"{self._rows_path(shard)}: damaged; run the same command again")
            abouts.append(written.about)
            failures += written.failures
            tables.append(written.table)
            samples.append(written.samples)
        rows = np.concatenate(tables)
        if not len(rows):
            raise PackError(f"{self._plan.index.root}: no image is left to pack")
        names = self._plan.index.name.take(np.concatenate(samples))
        files = {
            layout.INDEX_FILE: _npy(rows),
            layout.NAMES_FILE: _npy(names.blob),
            layout.NAMES_BEGIN_FILE: _npy(names.begin.astype("<i8")),
        }
        if failures:
            text = json.dumps(sorted(failures, key=lambda f: str(f["name"])), indent=1)
            files[layout.FAILURES_FILE] = text.encode()
        else:
            # A run that was killed here may have had failures that are repaired now.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._pack_folder, layout.FAILURES_FILE))
        for file_name, content in files.items():
            write_whole(os.path.join(self._pack_folder, file_name), content)
        about = self._about(rows, names, abouts, failures, files)
        text = json.dumps(about, indent=1, ensure_ascii=True)
        write_whole(os.path.join(self._pack_folder, layout.PACK_FILE), text.encode())
        sync_folder(self._pack_folder)
        os.rename(self._pack_folder, destination)
        sync_folder(os.path.dirname(destination))
        _delete_scrap(self._partial)

    def _about(
        self,
        rows: npt.NDArray[np.void],
        names: Names,
        shards: list[dict[str, Any]],
        failures: list[dict[str, Any]],
        files: dict[str, bytes],
    ) -> dict[str, Any]:
        plan = self._plan
        index = layout.make_index("", rows, names, plan.index.classes, len(shards))
        return {
            "format": layout.FORMAT,
            "format_version": layout.FORMAT_VERSION,
            "created_by": f"imagenet-seq {__version__}",
            "index_id": index.id,
            "num_samples": len(rows),
            "image_bytes": int(rows["length"].sum()),
            "classes": list(plan.index.classes),
            "settings": plan.settings.describe(),
            "huffman_tables": layout.describe_tables(plan.tables),
            "source": {
                "kind": "imagefolder",
                "num_samples": len(plan.index),
                "bytes": plan.source_bytes,
                "index_id": plan.index.id,
            },
            "counts": {
                "canonical": int(np.count_nonzero(rows["flags"] & layout.FLAG_CANONICAL)),
                "shrunk": int(np.count_nonzero(rows["flags"] & layout.FLAG_SHRUNK)),
                "failures": len(failures),
                "skipped": sum(not failure["kept"] for failure in failures),
            },
            "files": {
                name: {"bytes": len(content), "crc32c": f"{_native.crc32c(content):08x}"}
                for name, content in files.items()
            },
            "shards": shards,
        }


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _advance(bar: Any, num_samples: int, num_bytes: int) -> None:
    """Move a progress bar on and show the rate in MB/s beside images/s."""
    bar.moved_bytes = getattr(bar, "moved_bytes", 0) + num_bytes
    if bar.update(num_samples) and not bar.disable:
        elapsed = bar.format_dict["elapsed"] or 1
        bar.set_postfix_str(f"{bar.moved_bytes / 1e6 / elapsed:.0f} MB/s", refresh=False)


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on odd metadata: what it decodes is good."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
