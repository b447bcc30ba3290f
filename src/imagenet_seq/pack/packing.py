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
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from tqdm import tqdm  # type: ignore[import-untyped]

from imagenet_seq.errors import DataError, PackError
from imagenet_seq.index.cache import OnError
from imagenet_seq.machine import num_cores
from imagenet_seq.pack.claim import claim_destination, clear_errors, clear_scrap, delete_scrap
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.inputs import Folder, LargeFiles, Origin, Packed
from imagenet_seq.pack.io_log import IoLog
from imagenet_seq.pack.lmdb import LmdbPacker
from imagenet_seq.pack.plan import (
    Failure,
    Form,
    OnImageError,
    PackPlan,
    RunOptions,
    Task,
    agree_on_plan,
    settings_differences,
)
from imagenet_seq.pack.selection import Selection
from imagenet_seq.pack.shards import Packer, Summary, fits_policy, summary_of
from imagenet_seq.pack.while_indexing import deal_while_indexing
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.place import SPLITS, Found, Opening, SplitNeededError, is_split, split_of
from imagenet_seq.sources.recognise import find_source, open_source

__all__ = ["Failure", "Format", "OnError", "Settings", "Summary", "pack", "reshuffle", "summary_of"]


Format = Literal["pack", "lmdb"]


DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the buffers of the deal; finishing a shard takes that shard's size beside."""


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
    on_error: OnImageError = "fail",
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
    if on_error not in get_args(OnImageError):
        raise ValueError(f"on_error: expected one of {get_args(OnImageError)}, got {on_error!r}")
    kept = settings or Settings()
    names = None if classes is None else tuple(classes)
    selection = Selection(tuple(include), tuple(exclude), names, limit)

    def prepare(found: Found, log: IoLog) -> Origin | LargeFiles:
        indexing: OnError = "skip" if on_error == "skip" else "fail"
        if found.files:
            return LargeFiles(found, kept, selection, log, indexing, progress)
        return Folder(found.open(Opening(indexing, progress)), kept, selection, log, progress)

    options = RunOptions(on_error, num_workers or num_cores(), memory_bytes, progress)
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

    options = RunOptions(None, num_workers or num_cores(), memory_bytes, progress)
    return _pack_all(source, destination, splits, io_log, prepare, options)


def _pack_all(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    splits: Sequence[str] | None,
    io_log: str | os.PathLike[str] | None,
    prepare: Callable[[Found, IoLog], Origin | LargeFiles],
    options: RunOptions,
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
            task.split: _pack_one(origin, task, options._replace(split=task.split))
            for task, origin in zip(tasks, prepared, strict=True)
        }
    return {**done, **made}


def _tasks(
    source: str, destination: str, splits: Sequence[str] | None, format: Format
) -> list[Task]:
    found = _found(source, splits)
    if format == "pack":
        return [
            Task(split, found[split], os.path.join(destination, split) if split else destination)
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
        tasks.append(Task(split, found[split], path, Form(True, meant == "val")))
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


def _refuse_overlap(read: Sequence[str], tasks: Sequence[Task]) -> None:
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


def _pack_one(source: Origin | LargeFiles, task: Task, options: RunOptions) -> Summary:
    destination, partial = task.destination, task.partial
    if os.path.lexists(destination):
        summary = _finished_before(source, task, options)
        clear_scrap(partial)
        return summary
    with clear_errors(partial), claim_destination(partial), _quiet_pillow():
        if os.path.lexists(destination):  # another process finished it just before we got the lock
            summary = _finished_before(source, task, options)
            delete_scrap(partial)
            return summary
        if isinstance(source, LargeFiles):
            source = deal_while_indexing(source, task, options)
        plan = PackPlan.make(source, task.form, options)
        agreed = agree_on_plan(partial, plan, options)
        if plan.forecast and plan.settings.shrink and options.progress:
            text = plan.forecast.text(plan.settings.shrink, plan.source_bytes)
            tqdm.write(f"{destination}: {text}", file=sys.stderr)
        make_workshop = LmdbPacker if task.form.is_lmdb else Packer
        workshop = make_workshop(partial, agreed, plan.image_bytes, options)
        workshop.deal()
        summary = workshop.finish(destination)
    return dataclasses.replace(summary, notes=source.notes)


def _opened(source: Origin | LargeFiles) -> Origin:
    return source.open() if isinstance(source, LargeFiles) else source


def _finished_lmdb(task: Task) -> Summary:
    """Accept an LMDB file, whatever made it: nothing in it says how."""
    clear_scrap(task.partial)
    path = task.destination
    source = open_source(path)
    size, num_samples = os.path.getsize(path), len(source.index)
    return Summary(path, num_samples, size, size, 0, 0, num_samples, (), source.notes, True)


def _finished_before(source: Origin | LargeFiles, task: Task, options: RunOptions) -> Summary:
    """Accept a pack that the same command made before; refuse everything else that is there."""
    destination = task.destination
    if task.form.is_lmdb:
        return _finished_lmdb(task)
    plan = PackPlan.make(_opened(source), task.form, options)
    summary, differences = None, ""
    with contextlib.suppress(DataError, OSError):
        about = layout.read_pack(destination).about
        differences = settings_differences(about["settings"], plan.origin.settings_record)
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
    if not fits_policy(options.on_error, [failure.kept for failure in summary.failures]):
        kept = sum(failure.kept for failure in summary.failures)
        raise PackError(
            f"{destination}: exists already, with {kept} damaged samples kept and "
            f"{len(summary.failures) - kept} left out, which --on-error {options.on_error} would "
            "not do. Nothing was changed: name another destination, or delete it first"
        )
    return dataclasses.replace(summary, notes=plan.origin.notes, was_complete=True)


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on odd metadata: what it decodes is good."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def preprocess(
    source: str | os.PathLike[str] | None = None,
    destination: str | os.PathLike[str] | None = None,
    *,
    keep_bytes: bool = False,
    seed: int = 0,
    on_error: OnImageError = "fail",
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[str, Summary]:
    """Make ILSVRC-train.lmdb and ILSVRC-val.lmdb of the splits that are there.

    Train gets a random order, val keeps its own, as tensorpack has them. A file that is there
    already is left as it is. When interrupted, the same call continues.

    Args:
        source: any data set, such as a folder with train/ and val/; None: that in $IMAGENET.
        destination: folder for the files; None: `source`, or the folder that it lies in.
        keep_bytes: store every image's own bytes; otherwise they are re-coded losslessly, which
            lets the Loader decode them faster.
        seed: of train's order.
        on_error: as for `pack`.
        num_workers: threads that re-code; None: one for each available core.
        progress: whether to show progress on stderr.

    Returns:
        For each split what its file holds.

    Raises:
        ValueError: where there is no source; else as `pack`.
    """
    source = source or os.environ.get("IMAGENET")
    if not source:
        raise ValueError("expected a path with ImageNet as argument or in $IMAGENET, got none")
    source = os.path.abspath(os.path.expanduser(os.fspath(source)))
    return pack(
        source,
        destination or (source if os.path.isdir(source) else os.path.dirname(source)),
        format="lmdb",
        settings=Settings(keep_bytes=keep_bytes, seed=seed),
        on_error=on_error,
        num_workers=num_workers,
        progress=progress,
    )
