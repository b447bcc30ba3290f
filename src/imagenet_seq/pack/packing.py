"""Packing as functions: pack a data set, reorder a pack, make the original project's LMDB files.

Packs have the format that docs/format.md describes, and nothing else writes it. The place of each
sample is a function of (seed, name) alone, so a pack has the same bytes whatever the disk order,
the number of threads and the interruptions. A disk is read and written in long sequential runs, in
three passes:

1. **choose tables**: fit Huffman tables for the whole pack to 512 of its images. Only this pass may
   read at random; it takes seconds.
2. **deal**: read the source once in disk order, encode in threads, and append each sample to its
   shard's scratch file. Where memory is too small for a buffer per shard, several shards share a
   scratch file, which is dealt once more.
3. **finish**: read each scratch file whole, put its samples in order in memory, write the shard.

Large files that must be read to be indexed are dealt meanwhile (`while_indexing`), so that they are
read once. Pass 2 then only deals samples that could not be dealt.

Everything happens in DESTINATION.partial. The last step is a rename, so a pack is whole or absent.
A journal of what was dealt lets the next run continue where a killed one stopped.
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
from imagenet_seq.machine import available_cores
from imagenet_seq.pack import claim
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.input_files import LargeFiles
from imagenet_seq.pack.input_pack import PackInputs
from imagenet_seq.pack.inputs import FolderInputs, Inputs
from imagenet_seq.pack.io_log import IoLog
from imagenet_seq.pack.lmdb import LmdbPacker
from imagenet_seq.pack.plan import PackPlan, agree_on_plan, settings_differences
from imagenet_seq.pack.selection import Selection
from imagenet_seq.pack.shards import Packer, Summary, fits_policy, summary_of
from imagenet_seq.pack.task import Form, OnImageError, RunOptions, Task
from imagenet_seq.pack.while_indexing import deal_while_indexing
from imagenet_seq.sources import place
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.recognise import find_source, open_source

Format = Literal["pack", "lmdb"]

DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the buffers of scratch files; finishing a shard takes that shard's size in addition."""


def pack_dataset(
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
        format: "pack", or "lmdb" for the files of the original project, as tensorpack has them:
            destination/ILSVRC-train.lmdb and so on, or one file where destination ends in .lmdb.
            Images are encoded in the same way; train is in the order of the seed, val in that of
            the source. A file that exists already is left as it is.
        settings: what the pack is to be like; None: the defaults.
        include: patterns of class names, as in a shell, to pack only these.
        exclude: patterns of class names to leave out.
        classes: names of classes to pack only these. The chosen classes get the labels 0, 1, ...
            in the order that they have in the source.
        limit: maximum number of samples of each class; a hash of their names chooses them.
        on_error: what to do with an image that cannot be read or decoded. "fail" reads all others,
            then stops and names the bad ones; "skip" leaves them out, and also what can't be
            indexed; "keep" stores their bytes as they are.
        splits: which splits of a root to pack; None: those that are there.
        num_workers: threads that encode; None: one for each available core.
        memory_bytes: bound on the buffers for dealing samples to shards.
        progress: whether to show progress on stderr, and before that what smaller copies do to size
            and speed.
        io_log: file to append all requests to, in order; docs/packing.md describes it.

    Returns:
        For each split packed ("" where source is no root) what its pack holds.

    Raises:
        PackError: where packing stops; the message says why and how to continue.
        FileNotFoundError: where the source is not recognised.
        ValueError: where an argument is out of its domain.
    """
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {get_args(Format)}, got {format!r}")
    if on_error not in get_args(OnImageError):
        raise ValueError(f"on_error: expected one of {get_args(OnImageError)}, got {on_error!r}")
    wanted = settings or Settings()
    names = None if classes is None else tuple(classes)
    selection = Selection(tuple(include), tuple(exclude), names, limit)
    on_index_error: OnError = "skip" if on_error == "skip" else "fail"

    def prepare(task: Task, options: RunOptions) -> Inputs | LargeFiles:
        if task.found.files:
            return LargeFiles(task.found, wanted, selection, options, on_index_error)
        source = task.found.open(place.Opening(on_index_error, progress))
        return FolderInputs(source, wanted, selection, options)

    options = RunOptions(on_error, num_workers or available_cores(), memory_bytes, progress)
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
    """Make a pack with the images of the pack `source`, byte for byte, in another order.

    The new pack is the one that `pack_dataset` makes of the original images with this seed, except
    for the Huffman tables, which were fitted to the images that came first in `source`. With
    tables="image" or keep_bytes, or up to 512 images, both packs have the same bytes. Every image's
    checksum is compared. When interrupted, the same call continues.

    Args:
        source: a pack, or a root that holds the packs train/ and/or val/.
        destination: the pack to make; of a root, the folder for destination/train and so on.
        seed: of the new order; None: one more than the pack's.
        splits: which splits of a root to pack; None: those that are there.
        num_workers: threads that check; None: one for each available core.
        memory_bytes: bound on the buffers for dealing samples to shards.
        progress: whether to show progress on stderr.
        io_log: file to append all requests to, in order; docs/packing.md describes it.

    Returns:
        For each split packed ("" where source is no root) what its pack holds.

    Raises:
        PackError: where packing stops; the message says why and how to continue.
        DataError: where the pack's tables are damaged.
        FileNotFoundError: where the source is not recognised.
        ValueError: where an argument is out of its domain.
    """

    def prepare(task: Task, options: RunOptions) -> Inputs:
        return PackInputs(task.found, seed, options.log)

    options = RunOptions(None, num_workers or available_cores(), memory_bytes, progress)
    return _pack_all(source, destination, splits, io_log, prepare, options)


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

    As in tensorpack's files, train is in random order and val in that of the source. A file that
    exists already is left as it is. When interrupted, the same call continues.

    Args:
        source: any data set, such as a folder with train/ and val/; None: $IMAGENET.
        destination: folder for the files; None: `source`, or the folder that it lies in.
        keep_bytes: store every image's own bytes; otherwise images are transcoded losslessly, and
            the Loader decodes them faster.
        seed: of train's order.
        on_error: as for `pack_dataset`.
        num_workers: threads that encode; None: one for each available core.
        progress: whether to show progress on stderr.

    Returns:
        For each split what its file holds.

    Raises:
        ValueError: where there is no source; otherwise as `pack_dataset`.
    """
    source = source or os.environ.get("IMAGENET")
    if not source:
        raise ValueError("expected a path with ImageNet as argument or in $IMAGENET, got none")
    source = os.path.abspath(os.path.expanduser(os.fspath(source)))
    return pack_dataset(
        source,
        destination or (source if os.path.isdir(source) else os.path.dirname(source)),
        format="lmdb",
        settings=Settings(keep_bytes=keep_bytes, seed=seed),
        on_error=on_error,
        num_workers=num_workers,
        progress=progress,
    )


# ---- what is made of what ------------------------------------------------------------------------


def _pack_all(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    splits: Sequence[str] | None,
    io_log: str | os.PathLike[str] | None,
    prepare: Callable[[Task, RunOptions], Inputs | LargeFiles],
    options: RunOptions,
    format: Format = "pack",
) -> dict[str, Summary]:
    source = os.path.abspath(os.path.expanduser(os.fspath(source)))
    destination = os.path.abspath(os.path.expanduser(os.fspath(destination)))
    tasks = _tasks(source, destination, splits, format)
    if format == "pack":
        _refuse_overlap([source], tasks)
    done = [task for task in tasks if task.form.is_lmdb and os.path.lexists(task.destination)]
    summaries = {task.key: _finished_lmdb(task) for task in done}
    tasks = [task for task in tasks if task.key not in summaries]
    with IoLog(None if io_log is None else os.fspath(io_log)) as log:
        # All inputs are checked before the first pack, which may take hours.
        runs = [options._replace(log=log, title=task.title) for task in tasks]
        inputs = [prepare(*run) for run in zip(tasks, runs, strict=True)]
        _refuse_overlap([each.path for each in inputs], tasks)
        for each, task, run in zip(inputs, tasks, runs, strict=True):
            summaries[task.key] = _pack_one(each, task, run)
    return summaries


def _tasks(
    source: str, destination: str, splits: Sequence[str] | None, format: Format
) -> list[Task]:
    found = _found(source, splits)
    if format == "pack":
        # A pattern such as {train,val}-*.tar names files of both splits.
        named = place.split_of_path(source) if len(set(place.splits_in(source))) == 1 else None
        folders = {key: os.path.join(destination, key) if key else destination for key in found}
        return [Task(key, key or named, found[key], folders[key]) for key in found]
    is_file = destination.endswith(".lmdb") and not os.path.isdir(destination)
    if is_file and len(found) > 1:
        raise ValueError(
            f"{destination}: expected a folder for the files of {' and '.join(found)}, or one of "
            "them as splits (--splits)"
        )
    tasks = []
    for key in found:
        split = key or place.split_of(source) or "train"
        path = destination if is_file else os.path.join(destination, f"ILSVRC-{split}.lmdb")
        tasks.append(Task(key, split, found[key], path, Form(True, split == "val")))
    return tasks


def _found(source: str, splits: Sequence[str] | None) -> dict[str, place.Found]:
    """Return the source of each split that is wanted; the key is "" for a path without splits."""
    folders = [split for split in place.SPLITS if os.path.isdir(os.path.join(source, split))]
    if not splits and not any(place.is_split(os.path.join(source, split)) for split in folders):
        try:
            return {"": find_source(source)}
        except place.SplitNeededError:
            pass
        except FileNotFoundError:
            if not folders:
                raise
    found = {}
    for split in splits or place.SPLITS:
        try:
            found[split] = find_source(source, split)
        except FileNotFoundError:
            if split in (splits or folders):
                raise
    return found or {"": find_source(source)}  # raises, and says that there are two


def _refuse_overlap(read: Sequence[str], tasks: Sequence[Task]) -> None:
    """Refuse a destination that is, holds, or lies in what is read: packing would change it."""
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


# ---- one pack ------------------------------------------------------------------------------------


def _pack_one(inputs: Inputs | LargeFiles, task: Task, options: RunOptions) -> Summary:
    destination, partial = task.destination, task.partial
    if os.path.lexists(destination):
        summary = _finished_before(inputs, task, options)
        claim.clear_scrap(partial)
        return summary
    with claim.explain_write_errors(partial), claim.claim_destination(partial), _quiet_pillow():
        if os.path.lexists(destination):  # another process finished it just before we got the lock
            summary = _finished_before(inputs, task, options)
            claim.delete_scrap(partial)
            return summary
        if isinstance(inputs, LargeFiles):
            inputs = deal_while_indexing(inputs, task, options)
        plan = PackPlan.make(inputs, task, options)
        agreed = agree_on_plan(partial, plan, options)
        if plan.forecast and plan.inputs.settings.shrink and options.progress:
            text = plan.forecast.text(plan.inputs.settings.shrink, plan.source_bytes)
            tqdm.write(f"{destination}: {text}", file=sys.stderr)
        kind = LmdbPacker if task.form.is_lmdb else Packer
        packer = kind(partial, agreed, plan.image_bytes, options)
        packer.deal()
        summary = packer.finish(destination)
    return dataclasses.replace(summary, notes=inputs.notes)


def _finished_lmdb(task: Task) -> Summary:
    """Accept an LMDB file, whatever made it: nothing in the file says how it was made."""
    claim.clear_scrap(task.partial)
    path = task.destination
    source = open_source(path)
    size, num_samples = os.path.getsize(path), len(source.index)
    return Summary(path, num_samples, size, size, 0, 0, num_samples, (), source.notes, True)


def _finished_before(inputs: Inputs | LargeFiles, task: Task, options: RunOptions) -> Summary:
    """Accept a pack that the same call made before; refuse anything else at the destination."""
    destination = task.destination
    if task.form.is_lmdb:
        return _finished_lmdb(task)
    opened = inputs.open() if isinstance(inputs, LargeFiles) else inputs
    plan = PackPlan.make(opened, task, options)
    summary, differences = None, ""
    with contextlib.suppress(DataError, OSError):
        about = pack_format.read_pack(destination).about
        differences = settings_differences(about["settings"], opened.settings_record)
        same = not differences and about["source"] == opened.record
        if plan.sharding.tables is not None:
            same = same and about["huffman_tables"] == pack_format.describe_tables(
                plan.sharding.tables
            )
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
    return dataclasses.replace(summary, notes=opened.notes, was_complete=True)


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings of odd metadata: the images are good."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
