"""Write packs, the only writer of the format that docs/format.md describes, and LMDB files.

The place of every sample in the pack is a function of (seed, name) alone, so packs are
byte-identical from any disk order, number of threads or restarts. A disk is not read at random:

1. **choose tables**: fit Huffman tables for the whole pack to a sample of it (the one exception to
   the rule above, as it costs seconds).
2. **deal**: read the source once in the order it lies on the disk, re-code in threads, append every
   sample to the scratch file of its shard (or of a group of shards, where buffers for all shards
   would not fit in memory; groups are dealt once more).
3. **finish**: read each shard's scratch whole, put its samples in order in memory, write the shard.

Large files that must be read to index them are dealt on the way (`_Passing`), so that they are read
once; what is left of the deal is then what an interrupted run leaves.

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
from imagenet_seq.disk import choose_disk
from imagenet_seq.errors import DataError, PackError
from imagenet_seq.index import Index, Names
from imagenet_seq.io_log import NO_LOG, IoLog
from imagenet_seq.lmdb_file import (
    KEYS,
    LmdbWriter,
    Serializer,
    tensorpack_key,
    tensorpack_keys,
    tensorpack_value,
)
from imagenet_seq.origin import Folder, LargeFiles, Origin, Packed, Selection, known_bytes
from imagenet_seq.recode import Refused, Settings, encode, keep_damaged
from imagenet_seq.scratch import (
    DEALT,
    Buckets,
    Encoded,
    Journal,
    ShardFile,
    encoded_from,
    sync,
    write_whole,
)
from imagenet_seq.shrink import NUM_SAMPLED, Forecast, Pair, smaller_copy
from imagenet_seq.sources import (
    SPLITS,
    Found,
    Opening,
    SplitNeededError,
    find_source,
    is_split,
    open_source,
    scan,
    split_of,
)
from imagenet_seq.sources import pack as layout

__all__ = ["Failure", "Format", "OnError", "Settings", "Summary", "pack", "reshuffle", "summary_of"]

OnError = Literal["fail", "skip", "keep"]

Format = Literal["pack", "lmdb"]

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
        folder: the pack; or the LMDB file.
        num_samples: samples in it.
        source_bytes: bytes of the source's images.
        pack_bytes: bytes of the shards, or of the LMDB file.
        num_canonical: samples re-coded into canonical form.
        num_shrunk: those of them that are smaller copies; the others keep their pixels.
        num_as_is: samples whose own bytes are stored.
        failures: samples left out, or kept although damaged.
        notes: what the source says of itself: samples that could not be indexed, for example.
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
    notes: tuple[str, ...] = ()
    was_complete: bool = False


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Format = "pack",
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    on_error: OnError = "fail",
    splits: Sequence[str] | None = None,
    num_workers: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: bool = True,
    io_log: str | os.PathLike[str] | None = None,
) -> dict[str, Summary]:
    """Pack a data set of any format that `open_source` reads into `destination`.

    Deterministic: the bytes written depend on the source's names, bytes and classes and on
    `settings` alone. When interrupted, the same call continues.

    Args:
        source: a folder of class folders, a file, a pattern of files, or a folder with both splits.
        destination: the pack to make; of a root, the folder for destination/train and so on.
        format: "pack", or "lmdb" for destination/ILSVRC-train.lmdb and so on, or for a destination
            that ends in .lmdb: files as tensorpack has them, whose images are re-coded in the same
            way; train in the order of the seed, val in that of the source. One that is there
            already is left as it is.
        settings: what the pack is to be like; None: the defaults.
        include: patterns of class names, as in a shell, to pack only these.
        exclude: patterns of class names to leave out.
        classes: names of classes to pack only these. What is chosen has the labels 0, 1, ... in the
            order that the classes have in the source.
        limit: samples of each class to pack, at most; a hash of their names chooses them.
        on_error: what to do with an image that cannot be read or decoded. "fail" deals all others
            and then stops, naming them; "skip" leaves them out, as well as what can't be indexed;
            "keep" stores their bytes as they are.
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
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {get_args(Format)}, got {format!r}")
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error: expected one of {get_args(OnError)}, got {on_error!r}")
    kept = settings or Settings()
    names = None if classes is None else tuple(classes)
    selection = Selection(tuple(include), tuple(exclude), names, limit)

    def prepare(found: Found, log: IoLog) -> Origin | LargeFiles:
        indexing: scan.OnError = "skip" if on_error == "skip" else "fail"
        if found.files:
            return LargeFiles(found, kept, selection, log, indexing, progress)
        return Folder(found.open(Opening(indexing, progress)), kept, selection, log, progress)

    options = _RunOptions(on_error, num_workers or layout.num_cores(), memory_bytes, progress)
    return _pack_all(source, destination, splits, io_log, prepare, options, format)


def reshuffle(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    seed: int | None = None,
    splits: Sequence[str] | None = None,
    num_workers: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: bool = True,
    io_log: str | os.PathLike[str] | None = None,
) -> dict[str, Summary]:
    """Make a pack of another order of the pack `source`, whose images stay byte for byte.

    The new pack is the one that `pack` makes of the original images with this seed, but for the
    pack's Huffman tables, which were fitted to the images that came first; with tables="image" or
    keep_bytes, or up to 512 images, it is the same to the last byte. Every image's checksum is
    compared. When interrupted, the same call continues.

    Args:
        source: a pack, or a root that holds the packs train/ and/or val/.
        destination: the pack to make; of a root, the folder for destination/train and so on.
        seed: of the new permutation; None: one more than that of the pack.
        splits: which splits of a root to pack; None: those that are there.
        num_workers: threads that check; None: one for each available core.
        memory_bytes: bound on the buffers for dealing samples to shards.
        progress: whether to show progress on stderr.
        io_log: file to append all requests to, in order; docs/packing.md describes it.

    Returns:
        For each split packed ("" where source is no root) what its pack holds.

    Raises:
        PackError: where packing stops; the message says why and how to go on.
        DataError: where the pack's tables are damaged.
        FileNotFoundError: where the source is not recognised.
        ValueError: where an argument is out of its domain.
    """

    def prepare(found: Found, log: IoLog) -> Origin:
        return Packed(found, seed, log)

    options = _RunOptions(None, num_workers or layout.num_cores(), memory_bytes, progress)
    return _pack_all(source, destination, splits, io_log, prepare, options)


def _pack_all(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    splits: Sequence[str] | None,
    io_log: str | os.PathLike[str] | None,
    prepare: Callable[[Found, IoLog], Origin | LargeFiles],
    options: _RunOptions,
    format: Format = "pack",
) -> dict[str, Summary]:
    source = os.path.abspath(os.path.expanduser(os.fspath(source)))
    destination = os.path.abspath(os.path.expanduser(os.fspath(destination)))
    tasks = _tasks(source, destination, splits, format)
    if format == "pack":
        _refuse_overlap([source], tasks)
    done = {
        task.split: _finished_lmdb(task)
        for task in tasks
        if task.form.is_lmdb and os.path.lexists(task.destination)
    }
    tasks = [task for task in tasks if task.split not in done]
    with IoLog(None if io_log is None else os.fspath(io_log)) as log:
        options = options._replace(log=log)
        # All are looked at before the first is packed for hours.
        prepared = [prepare(task.found, log) for task in tasks]
        _refuse_overlap([origin.path for origin in prepared], tasks)
        made = {
            task.split: _pack_one(origin, task, options)
            for task, origin in zip(tasks, prepared, strict=True)
        }
    return {**done, **made}


class _Form(NamedTuple):
    """What is made of a source: a pack, or an LMDB file."""

    is_lmdb: bool = False
    in_source_order: bool = False

    def describe(self) -> dict[str, Any]:
        return {"format": "lmdb", "in_source_order": self.in_source_order} if self.is_lmdb else {}


class _Task(NamedTuple):
    """One pack or LMDB file to make; `split` is "" where the source is no root."""

    split: str
    found: Found
    destination: str
    form: _Form = _Form()

    @property
    def partial(self) -> str:
        return self.destination + layout.PARTIAL_SUFFIX


def _tasks(
    source: str, destination: str, splits: Sequence[str] | None, format: Format
) -> list[_Task]:
    found = _found(source, splits)
    if format == "pack":
        return [
            _Task(split, found[split], os.path.join(destination, split) if split else destination)
            for split in found
        ]
    is_file = destination.endswith(".lmdb") and not os.path.isdir(destination)
    if is_file and len(found) > 1:
        raise ValueError(
            f"{destination}: expected a folder for the files of {' and '.join(found)}, or one of "
            "them as splits (--splits)"
        )
    tasks = []
    for split in found:
        meant = split or split_of(source) or "train"
        path = destination if is_file else os.path.join(destination, f"ILSVRC-{meant}.lmdb")
        tasks.append(_Task(split, found[split], path, _Form(True, meant == "val")))
    return tasks


def _found(source: str, splits: Sequence[str] | None) -> dict[str, Found]:
    """Return the sources of the splits that are wanted, or "" and that of a path without splits."""
    folders = [split for split in SPLITS if os.path.isdir(os.path.join(source, split))]
    if not splits and not any(is_split(os.path.join(source, split)) for split in folders):
        try:
            return {"": find_source(source)}
        except SplitNeededError:
            pass
        except FileNotFoundError:
            if not folders:
                raise
    found = {}
    for split in splits or SPLITS:
        try:
            found[split] = find_source(source, split)
        except FileNotFoundError:
            if split in (splits or folders):
                raise
    return found or {"": find_source(source)}  # which says that there are two


def _refuse_overlap(read: Sequence[str], tasks: Sequence[_Task]) -> None:
    """Refuse paths of which one is, or lies in, another: packing would write to its source."""
    read = [*read, *(file for task in tasks for file in task.found.files)]
    written = [path for task in tasks for path in (task.destination, task.partial)]
    pairs = [(path, folder) for path in written for folder in dict.fromkeys(read)]
    pairs += [(task.partial, task.destination) for task in tasks]
    for path, folder in pairs:
        if _is_inside(path, folder) or _is_inside(folder, path):
            raise ValueError(
                f"{path} and {folder} are, or lie in, one another: packing reads one and writes "
                "the other. Nothing was changed: name a destination outside the source that does "
                "not hold it either"
            )


def _is_inside(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


class _RunOptions(NamedTuple):
    """What does not change the bytes of a pack that gets finished without failures."""

    on_error: OnError | None  # None: as a pack that is reshuffled has it; further failures stop
    num_workers: int
    memory_bytes: int
    progress: bool
    log: IoLog = NO_LOG

    def bar(self, what: str, total: int, done: int = 0) -> Any:
        return tqdm(
            desc=what, total=total, initial=done, unit="img", disable=not self.progress,
            dynamic_ncols=True, mininterval=0.5, file=sys.stderr,
        )  # fmt: skip


def _pack_one(source: Origin | LargeFiles, task: _Task, options: _RunOptions) -> Summary:
    destination, partial = task.destination, task.partial
    if os.path.lexists(destination):
        summary = _finished_before(source, task, options)
        _clear_scrap(partial)
        return summary
    with _clear_errors(partial), _claim(partial), _quiet_pillow():
        if os.path.lexists(destination):  # another process finished it just before we got the lock
            summary = _finished_before(source, task, options)
            _delete_scrap(partial)
            return summary
        if isinstance(source, LargeFiles):
            source = _deal_while_indexing(source, task, options)
        plan = _Plan.make(source, task.form, options)
        agreed = _agree_on_plan(partial, plan, options)
        if plan.forecast and plan.settings.shrink and options.progress:
            text = plan.forecast.text(plan.settings.shrink, plan.source_bytes)
            tqdm.write(f"{destination}: {text}", file=sys.stderr)
        make_workshop = _LmdbWorkshop if task.form.is_lmdb else _Workshop
        workshop = make_workshop(partial, agreed, plan.image_bytes, options)
        workshop.deal()
        summary = workshop.finish(destination)
    return dataclasses.replace(summary, notes=source.notes)


def _opened(source: Origin | LargeFiles) -> Origin:
    return source.open() if isinstance(source, LargeFiles) else source


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


def _finished_lmdb(task: _Task) -> Summary:
    """Accept an LMDB file, whatever made it: nothing in it says how."""
    _clear_scrap(task.partial)
    path = task.destination
    source = open_source(path)
    size, num_samples = os.path.getsize(path), len(source.index)
    return Summary(path, num_samples, size, size, 0, 0, num_samples, (), source.notes, True)


def _finished_before(source: Origin | LargeFiles, task: _Task, options: _RunOptions) -> Summary:
    """Accept a pack that the same command made before; refuse everything else that is there."""
    destination = task.destination
    if task.form.is_lmdb:
        return _finished_lmdb(task)
    plan = _Plan.make(_opened(source), task.form, options)
    summary, differences = None, ""
    with contextlib.suppress(DataError, OSError):
        about = layout.read_pack(destination).about
        differences = _differences(about["settings"], plan.origin.settings_record)
        same = not differences and about["source"] == plan.origin.record
        if plan.tables is not None:
            same = same and about["huffman_tables"] == layout.describe_tables(plan.tables)
        if same:
            summary = summary_of(destination)
    if summary is None:
        raise PackError(
            f"{destination}: exists already and is no pack of this source, as it is now, with "
            f"these settings.{differences}\nNothing was changed: name another destination, or "
            "delete it first"
        )
    if not _fits_policy(options.on_error, [failure.kept for failure in summary.failures]):
        kept = sum(failure.kept for failure in summary.failures)
        raise PackError(
            f"{destination}: exists already, with {kept} damaged samples kept and "
            f"{len(summary.failures) - kept} left out, which --on-error {options.on_error} would "
            "not do. Nothing was changed: name another destination, or delete it first"
        )
    return dataclasses.replace(summary, notes=plan.origin.notes, was_complete=True)


def _clear_scrap(partial: str) -> None:
    """Delete what a run left that was killed after its last rename.

    A folder that is not ours, or that another process holds, stays.
    """
    if os.path.lexists(partial):
        with contextlib.suppress(PackError), _claim(partial):
            _delete_scrap(partial)


def _fits_policy(on_error: OnError | None, kept: Sequence[bool]) -> bool:
    """Tell whether failures, each kept or left out, are what a run with `on_error` gives."""
    if on_error is None:
        return True
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

_LMDB_FILE = "lmdb"

_OURS = re.compile(r"(dealt|lmdb|(deal|split|rows)-\d{6,}|settings\.json)(\.tmp)?")
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


class _Cut(NamedTuple):
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
        options: _RunOptions,
        most_shards: int = sys.maxsize,
    ) -> _Cut:
        num_shards = max(1, min(most_shards, -(-source_bytes // settings.shard_bytes)))
        most_buckets = max(1, options.memory_bytes // _MIN_BUFFER_BYTES)
        return cls(num_shards, -(-num_shards // most_buckets), None)

    @property
    def num_buckets(self) -> int:
        return -(-self.num_shards // self.shards_per_bucket)


def _agree_on_plan(partial: str, plan: _Plan, options: _RunOptions) -> _Plan:
    """Compare with the run that is to be continued, and take over its tables and how it cut shards.

    Raises:
        PackError: naming each difference.
    """

    def check_space(cut: _Cut) -> None:
        tar_bytes = _TAR_BYTES * len(plan.index)
        _check_space(partial, plan.source_bytes, plan.image_bytes, tar_bytes, cut, plan.form)

    def choose_tables() -> bytes | None:
        return _choose_tables(partial, plan, options)

    return dataclasses.replace(
        plan, cut=_agree(partial, plan.describe(), plan.cut, check_space, choose_tables)
    )


def _agree(
    partial: str,
    now: dict[str, Any],
    cut: _Cut,
    check_space: Callable[[_Cut], None],
    choose_tables: Callable[[], bytes | None],
) -> _Cut:
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
    differences = _differences(before, now)
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


def _write_settings(path: str, now: dict[str, Any], cut: _Cut) -> None:
    chosen = {
        "num_shards": cut.num_shards,
        "shards_per_bucket": cut.shards_per_bucket,
        "huffman_tables": layout.describe_tables(cut.tables),
    }
    content = {**now, **chosen}
    write_whole(path, json.dumps(content, indent=1).encode())
    sync(os.path.dirname(path))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "".join(
        f"\n  {key}: {before.get(key)!r} before, {value!r} now"
        for key, value in now.items()
        if before.get(key) != value
    )


def _check_space(
    partial: str, source_bytes: int, image_bytes: int, tar_bytes: int, cut: _Cut, form: _Form
) -> None:
    """Refuse to begin where the scratch and the shards cannot fit."""
    shard_bytes = image_bytes // cut.num_shards
    at_once = shard_bytes * (1 if cut.shards_per_bucket == 1 else cut.shards_per_bucket + 1)
    if form.is_lmdb:  # all scratch stays until the file is whole
        at_once = image_bytes
    needed = image_bytes * (1 + _SPACE_MARGIN) + tar_bytes + at_once
    present = sum(
        _allocated_bytes(os.path.join(folder, name))
        for folder, _, names in os.walk(partial)
        for name in names
    )
    free = shutil.disk_usage(partial).free
    if needed - present > free:
        raise PackError(
            f"{partial}: not enough room: packing {_megabytes(source_bytes)} of images takes "
            f"{_megabytes(needed)} while it runs, {_megabytes(present)} are there already, and the "
            f"disk has {_megabytes(free)} free: make room for {_megabytes(needed - present - free)}"
        )


def _allocated_bytes(path: str) -> int:
    """Return what a file takes on the disk, with what is reserved behind its end."""
    stat = os.stat(path)
    return max(stat.st_size, stat.st_blocks * 512)


def _choose_tables(partial: str, plan: _Plan, options: _RunOptions) -> bytes | None:
    """Fit Huffman tables to some of the images, if there must be some and are none yet.

    Raises:
        PackError: where so many of them cannot be read that the disk must be dying.
    """
    if plan.origin.tables or not _needs_tables(plan.settings):
        return plan.origin.tables
    if found := plan.origin.some_images[:_TABLES_SAMPLES]:
        return _fit_tables(found, len(found), plan.settings, options)
    # The places in the pack are random, so its first samples are as good as any.
    samples = plan.origin.first(plan.order, _TABLES_SAMPLES)

    def images() -> Iterator[bytes]:
        unreadable: list[Failure] = []
        for sample, data in plan.origin.read_all(samples):
            if not isinstance(data, Refused):
                yield data
            elif data.is_read_error:
                unreadable.append(Failure(plan.index.name[sample], data.reason, False))
                _refuse_dying_disk(unreadable, plan.index.root, partial)

    return _fit_tables(images(), len(samples), plan.settings, options)


def _needs_tables(settings: Settings) -> bool:
    return settings.tables == "pack" and not settings.keep_bytes


def _fit_tables(
    images: Iterable[bytes], num_images: int, settings: Settings, options: _RunOptions
) -> bytes:
    def count(data: bytes) -> npt.NDArray[np.uint64] | None:
        copy = smaller_copy(data, settings.shrink) if settings.shrink else None
        return _native.count_symbols(copy or data, settings.restart_interval)

    options.log.begin_pass("choose tables")
    counts = np.zeros((4, 256), np.uint64)
    with (
        ThreadPoolExecutor(options.num_workers) as threads,
        options.bar("choose tables", num_images) as bar,
    ):
        for more in _map_ahead(threads, count, images, 2 * options.num_workers):
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


@dataclass(frozen=True)
class _Plan:
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
    form: _Form
    cut: _Cut

    @classmethod
    def make(cls, origin: Origin, form: _Form, options: _RunOptions) -> _Plan:
        record = origin.record
        if "file_bytes" in record:
            cut = _Cut.of(record["file_bytes"], origin.settings, options)
        else:
            cut = _Cut.of(record["bytes"], origin.settings, options, len(origin.index))
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
        return _forecast(images, self.settings, self.tables)

    @property
    def image_bytes(self) -> int:
        """What the images will take in the pack, about, and not less."""
        return _expected_bytes(self.source_bytes, self.forecast)

    @functools.cached_property
    def _hashes(self) -> npt.NDArray[np.uint64]:
        return _place_hashes(self.index.name, self.settings.seed)

    @functools.cached_property
    def order(self) -> npt.NDArray[np.int64]:
        if self.form.in_source_order:
            return np.arange(len(self.index))
        return np.argsort(self._hashes, kind="stable")

    @functools.cached_property
    def shard_begin(self) -> npt.NDArray[np.int64]:
        if "file_bytes" in self.origin.record and not self.form.in_source_order:
            # A sample's name says which shard it goes to, so it can be dealt before all are known.
            shards = _shard_of_hash(self._hashes[self.order], self.num_shards)
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
        ratio = image_bytes * (1 + _SPACE_MARGIN) / max(self.source_bytes, 1)
        buckets = self.shard_of_sample // self.shards_per_bucket
        sizes = np.maximum(self.origin.lengths, 0)
        source_bytes = np.bincount(buckets, sizes, self.cut.num_buckets)
        return dict(enumerate((source_bytes * ratio).astype(np.int64).tolist()))

    def describe(self) -> dict[str, Any]:
        """Return what a continued packing must agree on."""
        settings = {**self.origin.settings_record, **self.form.describe()}
        return _described(settings, self.origin.path, self.origin.id)


def _described(settings: dict[str, Any], path: str, source_id: str | None) -> dict[str, Any]:
    """Return what a continued packing must agree on; an id of None: not known yet."""
    source = os.path.abspath(path)
    return {**settings, "version": __version__, "source": source, "source_id": source_id}


def _place_hashes(names: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """Return the number that each sample is sorted by; ties keep the source's order."""
    keyed = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))

    def digest(name: str) -> bytes:
        state = keyed.copy()
        state.update(os.fsencode(name))
        return state.digest()

    return np.frombuffer(b"".join(map(digest, names)), "<u8").astype(np.uint64)


def _shard_of_hash(hashes: npt.NDArray[np.uint64], num_shards: int) -> npt.NDArray[np.int64]:
    """Return floor(hash * num_shards / 2**64), in halves so that nothing overflows."""
    low = (hashes & np.uint64(2**32 - 1)) * np.uint64(num_shards)
    high = (hashes >> np.uint64(32)) * np.uint64(num_shards)
    return ((high + (low >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def _forecast(
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


def _expected_bytes(source_bytes: int, forecast: Forecast | None) -> int:
    if forecast is None:
        return source_bytes
    ratio = forecast.small_bytes / forecast.source_bytes
    return int(source_bytes * ratio * (1 + _FORECAST_MARGIN))


# ---- the two passes ------------------------------------------------------------------------------

_RUN_SAMPLES, _RUN_BYTES = 16, 4 << 20
"""A worker gets this many samples at once: enough to hide what handing over costs."""

_RUNS_AHEAD = 32
"""So many more runs, 60 MB, give the workers something to do while a disk is busy writing."""

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


def _share_a_head(source: str, destination: str) -> bool:
    """Tell whether what is read and what is written lie on the same hard disk."""
    read, written = choose_disk(source), choose_disk(destination)
    return read.has_one_head and read.device == written.device


class _ShardRows(NamedTuple):
    """What is written beside a finished shard: its rows, and what it was made of."""

    about: dict[str, Any]
    failures: list[dict[str, Any]]
    table: npt.NDArray[np.void]
    samples: npt.NDArray[np.int64]
    source_files: npt.NDArray[np.int64]


def _take_over(
    journal: Journal,
    buckets: Buckets,
    num_buckets: int,
    is_good: Callable[[npt.NDArray[np.void]], npt.NDArray[np.bool_]],
) -> None:
    """Take over those dealt samples that are good and whole, and cut off what a kill tore."""
    journal.recover()
    rows = journal.rows()
    rows = rows[(rows["bucket"] >= 0) & (rows["bucket"] < num_buckets)]
    file_size = np.zeros(num_buckets, np.int64)
    for bucket in range(num_buckets):
        with contextlib.suppress(FileNotFoundError):
            file_size[bucket] = os.stat(buckets.path(bucket)).st_size
    rows = rows[rows["offset"] + rows["length"] <= file_size[rows["bucket"]]]
    rows = rows[is_good(rows)]
    # Where a sample was dealt twice, the later one counts.
    _, last = np.unique(rows["sample"][::-1], return_index=True)
    rows = rows[len(rows) - 1 - last]
    journal.rewrite(rows)
    for bucket in range(num_buckets):
        mine = rows[rows["bucket"] == bucket]
        end = int((mine["offset"] + mine["length"]).max()) if len(mine) else 0
        buckets.set_end(bucket, end)


# ---- dealing while a source is indexed -----------------------------------------------------------


def _deal_while_indexing(files: LargeFiles, task: _Task, options: _RunOptions) -> Origin:
    """Open a source, and deal its samples where they pass by for that."""
    if task.form.in_source_order:
        return files.open()  # where a sample goes is known only when all have been counted
    if not files.is_whole or (_needs_tables(files.settings) and not files.some_images):
        return files.open()  # what to pack, or to fit tables to, is known only from the index
    try:
        with _Passing(files, task, options) as passing:
            return files.open(passing.visit)
    except BaseException:
        if not os.path.exists(os.path.join(task.partial, layout.SETTINGS_FILE)):
            _delete_scrap(task.partial)  # nothing was dealt, so there is nothing to continue
        raise


class _Passing:
    """Deals the samples of large files that pass by while these are indexed.

    It leaves behind what an interrupted deal leaves: scratch and a journal. Images that are none
    are left to `_Workshop.deal`, which finds them missing.
    """

    def __init__(self, files: LargeFiles, task: _Task, options: _RunOptions) -> None:
        self._files = files
        self._form = task.form
        self._partial = task.partial
        self._options = options
        self._cut: _Cut | None = None  # until the first sample passes
        self._threads = ThreadPoolExecutor(options.num_workers)
        self._waiting: deque[Future[list[tuple[int, str, Encoded | Refused]]]] = deque()
        self._run: list[tuple[int, str, bytes]] = []
        self._run_bytes = 0

    def __enter__(self) -> _Passing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._run:
                self._hand_over()
            while kind is None and self._waiting:
                self._deal(self._waiting.popleft().result())
        finally:
            self._threads.shutdown(cancel_futures=True)
            if self._cut is not None:
                self._buckets.flush()

    def visit(self, seen: scan.Seen) -> None:
        """Take a sample: re-code it in a thread, deal it later; one that is dealt is not taken."""
        if self._cut is None:
            self._begin()
        if seen.sample < len(self._is_dealt) and self._is_dealt[seen.sample]:
            return
        self._run.append((seen.sample, seen.name, bytes(seen.data)))
        self._run_bytes += len(seen.data)
        if len(self._run) >= _RUN_SAMPLES or self._run_bytes >= _RUN_BYTES:
            self._hand_over()

    def _begin(self) -> None:
        """Begin or continue a packing, as `_agree_on_plan` does where the index is known."""
        files, options = self._files, self._options
        forecast = _forecast(files.some_images[:NUM_SAMPLED], files.settings, None)
        image_bytes = _expected_bytes(files.num_bytes, forecast)

        def check_space(cut: _Cut) -> None:
            _check_space(self._partial, files.num_bytes, image_bytes, 0, cut, self._form)

        def choose_tables() -> bytes | None:
            if not _needs_tables(files.settings):
                return None
            images = files.some_images[:_TABLES_SAMPLES]
            return _fit_tables(images, len(images), files.settings, options)

        now = _described({**files.settings_record, **self._form.describe()}, files.path, None)
        cut = _Cut.of(files.num_bytes, files.settings, options)
        self._cut = cut = _agree(self._partial, now, cut, check_space, choose_tables)
        self._journal = Journal(os.path.join(self._partial, _JOURNAL_FILE), options.log)
        bucket_bytes = int(image_bytes * (1 + _SPACE_MARGIN)) // cut.num_buckets
        self._buckets = Buckets(
            self._partial,
            "deal",
            options.memory_bytes,
            dict.fromkeys(range(cut.num_buckets), bucket_bytes),
            self._journal.add,
            waits=_share_a_head(files.path, self._partial),
            log=options.log,
        )
        _take_over(self._journal, self._buckets, cut.num_buckets, self._is_good)
        dealt = self._journal.rows()["sample"]
        self._is_dealt = np.zeros(int(dealt.max(initial=-1)) + 1, np.bool_)
        self._is_dealt[dealt] = True
        options.log.begin_pass("deal")

    def _is_good(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Tell rows of the files as they are: then their samples still have the same numbers."""
        good = (rows["sample"] >= 0) & (rows["source_length"] == self._files.num_bytes)
        return np.asarray(good & (rows["source_mtime_ns"] == self._files.mtime_ns))

    def _hand_over(self) -> None:
        self._waiting.append(self._threads.submit(self._encode_run, self._run))
        self._run, self._run_bytes = [], 0
        if len(self._waiting) > 2 * self._options.num_workers + _RUNS_AHEAD:
            self._deal(self._waiting.popleft().result())

    def _encode_run(
        self, run: list[tuple[int, str, bytes]]
    ) -> list[tuple[int, str, Encoded | Refused]]:
        settings, tables = self._files.settings, self._cut.tables if self._cut else None
        return [(sample, name, encode(data, settings, tables)) for sample, name, data in run]

    def _deal(self, run: list[tuple[int, str, Encoded | Refused]]) -> None:
        assert self._cut is not None
        hashes = _place_hashes((name for _, name, _ in run), self._files.settings.seed)
        shards = _shard_of_hash(hashes, self._cut.num_shards)
        for (sample, _, encoded), shard in zip(run, shards.tolist(), strict=True):
            if isinstance(encoded, Encoded):
                bucket = shard // self._cut.shards_per_bucket
                stamp = (self._files.num_bytes, self._files.mtime_ns)
                self._buckets.append(bucket, sample, encoded, *stamp)


# ---- the workshop --------------------------------------------------------------------------------


class _Workshop:
    """Deals samples to scratch files, then makes shards of them, in a claimed folder."""

    def __init__(self, partial: str, plan: _Plan, image_bytes: int, options: _RunOptions) -> None:
        self._partial = partial
        self._pack_folder = os.path.join(partial, _PACK_FOLDER)
        self._plan = plan
        self._options = options
        known = plan.origin.known_failures
        self._failures = {sample: Failure(**failure) for sample, failure in known.items()}
        self._unreadable: list[Failure] = []
        self._journal = Journal(os.path.join(partial, _JOURNAL_FILE), options.log)
        expected_bytes = plan.expected_bytes(image_bytes)
        self._buckets = Buckets(
            partial,
            "deal",
            options.memory_bytes,
            expected_bytes,
            self._journal.add,
            waits=_share_a_head(plan.index.root, partial),
            log=options.log,
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
        sync(self._pack_folder)
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
        _take_over(self._journal, self._buckets, self._plan.cut.num_buckets, self._is_good)

    def _is_good(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        plan = self._plan
        good = (rows["sample"] >= 0) & (rows["sample"] < len(plan.index))
        sample = np.where(good, rows["sample"], 0)
        expected = plan.shard_of_sample[sample] // plan.shards_per_bucket
        good &= rows["bucket"] == expected
        good &= rows["source_length"] == plan.origin.stamps.sizes[sample]
        good &= rows["source_mtime_ns"] == plan.origin.stamps.mtimes_ns[sample]
        if self._options.on_error in ("fail", "skip"):
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
        known = self._plan.origin.known_failures
        missing[[sample for sample, failure in known.items() if not failure["kept"]]] = False
        samples = np.flatnonzero(missing)
        self._options.log.begin_pass("deal")
        done = len(missing) - len(samples)
        with (
            ThreadPoolExecutor(self._options.num_workers) as threads,
            self._options.bar("read and re-code", len(missing), done) as bar,
        ):
            try:
                runs = self._read_runs(samples)  # in this thread, in this order
                ahead = 2 * self._options.num_workers + _RUNS_AHEAD
                for run in _map_ahead(threads, self._encode_run, runs, ahead):
                    for sample, _, encoded in run:
                        self._deal_one(sample, encoded)
                    _advance(bar, len(run), sum(num_bytes for _, num_bytes, _ in run))
            finally:
                self._buckets.flush()
        self._stop_on_failures()

    def _read_runs(
        self, samples: npt.NDArray[np.int64]
    ) -> Iterator[list[tuple[int, bytes | Refused]]]:
        run: list[tuple[int, bytes | Refused]] = []
        run_bytes = 0
        for sample, data in self._plan.origin.read_all(samples):
            run.append((sample, data))
            run_bytes += 0 if isinstance(data, Refused) else len(data)
            if len(run) >= _RUN_SAMPLES or run_bytes >= _RUN_BYTES:
                yield run
                run, run_bytes = [], 0
        if run:
            yield run

    def _encode_run(
        self, run: list[tuple[int, bytes | Refused]]
    ) -> list[tuple[int, int, Encoded | Refused]]:
        return [
            (sample, 0, data)
            if isinstance(data, Refused)
            else (sample, len(data), self._encode(sample, data))
            for sample, data in run
        ]

    def _encode(self, sample: int, data: bytes) -> Encoded | Refused:
        return self._plan.origin.encode(sample, data, self._plan.tables)

    def _deal_one(self, sample: int, encoded: Encoded | Refused) -> None:
        if isinstance(encoded, Refused):
            encoded = self._fail(sample, encoded)
        if isinstance(encoded, Encoded):
            bucket = int(self._plan.shard_of_sample[sample]) // self._plan.shards_per_bucket
            stamps = self._plan.origin.stamps
            stamp = (int(stamps.sizes[sample]), int(stamps.mtimes_ns[sample]))
            self._buckets.append(bucket, sample, encoded, *stamp)

    def _fail(self, sample: int, refused: Refused) -> Encoded | Refused:
        """Note a failure; return what is to be stored under on_error="keep"."""
        kept = keep_damaged(refused) if self._options.on_error == "keep" else refused
        name = self._plan.index.name[sample]
        failure = Failure(name, refused.reason, isinstance(kept, Encoded))
        self._failures[sample] = failure
        if self._options.progress and len(self._failures) <= _MAX_REPORTED:
            tqdm.write(f"{name}: {refused.reason}", file=sys.stderr)
        if refused.is_read_error:
            self._unreadable.append(failure)
            _refuse_dying_disk(self._unreadable, self._plan.index.root, self._partial)
        is_stopping = self._options.on_error in ("fail", None)
        if is_stopping and len(self._failures) >= _MAX_FAILURES:
            self._stop_on_failures()
        return kept

    def _stop_on_failures(self) -> None:
        known = self._plan.origin.known_failures
        stopping = [f for s, f in self._failures.items() if not f.kept and s not in known]
        on_error = self._options.on_error
        if not stopping or on_error == "skip":
            return
        how = "Repair them, or add --on-error skip to leave them out"
        if on_error == "fail":
            how += ", or --on-error keep to store their bytes as they are"
        if on_error is None:
            how = (
                "The pack is damaged: bring these shards back from a copy, or pack the original "
                "images with the new seed instead"
            )
        raise PackError(
            f"{len(stopping)} of {len(self._plan.index)} images cannot be packed:\n"
            + _listed(stopping)
            + f"\n{how}; then run the command again: it continues from {self._partial}"
        )

    # ---- finish

    def finish(self, destination: str) -> Summary:
        """Make the pack of what was dealt."""
        self._finish_shards()
        self._finish_pack(destination)
        return summary_of(destination)

    def _finish_shards(self) -> None:
        """Make every shard that is not there yet, each from one sequential read of its scratch."""
        plan = self._plan
        rows = self._journal.rows()
        self._options.log.begin_pass("finish")
        done = sum(len(self._samples_of(shard)) for shard in self._finished)
        with self._options.bar("write shards", len(plan.index), done) as bar:
            for bucket in range(plan.cut.num_buckets):
                shards = [s for s in plan.shards_of_bucket(bucket) if s not in self._finished]
                if not shards:
                    continue
                mine = rows[rows["bucket"] == bucket]
                if plan.shards_per_bucket == 1:
                    self._finish_shard(shards[0], self._buckets.load(bucket), mine, bar)
                else:
                    self._finish_group(bucket, shards, mine, bar)
                self._forget(bucket)

    def _forget(self, bucket: int) -> None:
        """Delete scratch that is not needed any more."""
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
        split = Buckets(
            self._partial, "split", memory_bytes, expected_bytes, again.append,
            waits=_share_a_head(self._partial, self._partial), log=log,
        )  # fmt: skip
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
        sync(self._partial)  # a power failure must not leave a shard without its rows
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
        if sample in self._failures and not self._failures[sample].kept:
            return None
        encoded = self._encode_again(sample, self._plan.origin.read(sample))
        self._stop_on_failures()
        return encoded

    def _encode_again(self, sample: int, data: bytes | Refused) -> Encoded | None:
        encoded = data if isinstance(data, Refused) else self._encode(sample, data)
        if isinstance(encoded, Refused):
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
        samples, stamps = self._samples_of(shard), self._plan.origin.stamps
        return np.stack([stamps.sizes[samples], stamps.mtimes_ns[samples]]).astype("<i8")

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

    def _finish_pack(self, destination: str) -> None:
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
        sync(self._pack_folder)
        os.rename(self._pack_folder, destination)
        sync(os.path.dirname(destination))
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
            "settings": plan.origin.settings_record,
            "huffman_tables": layout.describe_tables(plan.tables),
            "source": plan.origin.record,
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


class _LmdbWorkshop(_Workshop):
    """Deals as for a pack, and makes of it one LMDB file, as tensorpack has it.

    An interrupted run begins the file again, so its scratch stays until the file is whole.
    """

    def __init__(self, partial: str, plan: _Plan, image_bytes: int, options: _RunOptions) -> None:
        super().__init__(partial, plan, image_bytes, options)
        # tensorpack decides by this how it reads a file.
        named = os.environ.get("TENSORPACK_SERIALIZE")
        self._serializer: Serializer = "msgpack" if named == "msgpack" else "pickle"
        self._num_samples = self._num_canonical = self._num_shrunk = 0

    def _keep_finished(self) -> set[int]:
        return set()

    def _forget(self, bucket: int) -> None:
        pass

    def finish(self, destination: str) -> Summary:
        """Make the file of what was dealt."""
        path = os.path.join(self._partial, _LMDB_FILE)
        with LmdbWriter(path) as self._file:
            self._finish_shards()
            if not self._num_samples:
                raise PackError(f"{self._plan.index.root}: no image is left to pack")
            self._file.append(KEYS, [tensorpack_keys(self._num_samples, self._serializer)])
        os.rename(path, destination)
        sync(os.path.dirname(destination))
        _delete_scrap(self._partial)
        return Summary(
            destination,
            self._num_samples,
            self._plan.origin.record["bytes"],
            os.path.getsize(destination),
            self._num_canonical,
            self._num_shrunk,
            self._num_samples - self._num_canonical,
            tuple(sorted(self._failures.values(), key=lambda failure: failure.name)),
        )

    def _finish_shard(
        self, shard: int, scratch: memoryview, rows: npt.NDArray[np.void], bar: Any
    ) -> None:
        """Append the samples of what would be a shard."""
        dealt = {int(row["sample"]): row for row in rows}
        for sample in self._samples_of(shard).tolist():
            encoded = self._take_dealt(scratch, dealt.get(sample), sample)
            if encoded is not None:
                key = tensorpack_key(self._num_samples)
                label = int(self._label[sample])
                self._file.append(key, tensorpack_value(encoded.data, label, self._serializer))
                self._num_samples += 1
                self._num_canonical += bool(encoded.flags & layout.FLAG_CANONICAL)
                self._num_shrunk += bool(encoded.flags & layout.FLAG_SHRUNK)
            _advance(bar, 1, 0 if encoded is None else len(encoded.data))


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
