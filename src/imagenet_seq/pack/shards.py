"""The two passes over the data: deal samples to scratch files, then finish each shard."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from imagenet_seq import __version__, native
from imagenet_seq.errors import PackError
from imagenet_seq.index.columns import Names
from imagenet_seq.pack.claim import JOURNAL_FILE, PACK_FOLDER, delete_scrap
from imagenet_seq.pack.encode import Refused, keep_damaged
from imagenet_seq.pack.files import ShardFile, sync, write_whole
from imagenet_seq.pack.inputs import Image
from imagenet_seq.pack.plan import PackPlan, map_ahead
from imagenet_seq.pack.scratch import DEALT, Buckets, Journal
from imagenet_seq.pack.task import (
    MAX_REPORTED,
    Failure,
    OnImageError,
    RunOptions,
    list_failures,
    refuse_dying_disk,
)
from imagenet_seq.read.disk import choose_disk
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded, encoded_from


@dataclass(frozen=True)
class Summary:
    """What a finished pack holds.

    Attributes:
        folder: path of the pack or LMDB file.
        num_samples: samples in it.
        source_bytes: bytes of the source's images.
        pack_bytes: bytes of the shards or of the LMDB file.
        num_canonical: samples in canonical form.
        num_shrunk: those of them that are smaller copies; the others keep their pixels.
        num_as_is: samples stored with their own bytes.
        failures: samples left out, or kept although damaged.
        notes: what the user should know about the source, such as samples that can't be indexed.
        was_complete: whether it existed already, and nothing was done.
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


def summary_of(folder: str) -> Summary:
    """Return the summary of the finished pack in `folder`."""
    about = pack_format.read_pack(folder).about
    failures = pack_format.read_failures(folder) if about["counts"]["failures"] else []
    return Summary(
        folder,
        about["num_samples"],
        about["source"]["bytes"],
        sum(shard["bytes"] for shard in about["shards"]),
        about["counts"]["canonical"],
        about["counts"]["shrunk"],
        about["num_samples"] - about["counts"]["canonical"],
        tuple(Failure(**failure) for failure in failures),
    )


def fits_policy(on_error: OnImageError | None, kept: Sequence[bool]) -> bool:
    """Tell whether a run with `on_error` keeps, or leaves out, failures as `kept` says."""
    if on_error is None:
        return True
    if on_error == "fail":
        return not kept
    return all(kept) if on_error == "keep" else not any(kept)


# ---- the two passes ------------------------------------------------------------------------------

RUN_SAMPLES, RUN_BYTES = 16, 4 << 20
"""Samples that a worker gets at once, so that handing them over costs little."""

RUNS_AHEAD = 32
"""Additional runs, 60 MB, that keep workers busy while the disk writes."""

_MAX_FAILURES = 1000
"""With on_error="fail": this many mean a broken disk or a wrong folder, not a few bad files."""


def on_same_hdd(source: str, destination: str) -> bool:
    """Tell whether what is read and what is written lie on the same hard disk."""
    read, written = choose_disk(source), choose_disk(destination)
    return read.has_one_head and read.device == written.device


class _ShardRows(NamedTuple):
    """What is written beside a finished shard: its rows, samples, failures and source files."""

    about: dict[str, Any]
    failures: list[dict[str, Any]]
    table: npt.NDArray[np.void]
    samples: npt.NDArray[np.int64]
    source_files: npt.NDArray[np.int64]


def take_over(
    journal: Journal,
    buckets: Buckets,
    num_buckets: int,
    is_good: Callable[[npt.NDArray[np.void]], npt.NDArray[np.bool_]],
) -> None:
    """Keep the dealt samples of an earlier run that are good and whole; truncate the rest."""
    journal.recover()
    rows = journal.rows()
    rows = rows[(rows["bucket"] >= 0) & (rows["bucket"] < num_buckets)]
    file_size = np.zeros(num_buckets, np.int64)
    for bucket in range(num_buckets):
        with contextlib.suppress(FileNotFoundError):
            file_size[bucket] = os.stat(buckets.path(bucket)).st_size
    rows = rows[rows["offset"] + rows["length"] <= file_size[rows["bucket"]]]
    rows = rows[is_good(rows)]
    # Of a sample that was dealt twice, the last one counts.
    _, last = np.unique(rows["sample"][::-1], return_index=True)
    rows = rows[len(rows) - 1 - last]
    journal.rewrite(rows)
    for bucket in range(num_buckets):
        mine = rows[rows["bucket"] == bucket]
        end = int((mine["offset"] + mine["length"]).max()) if len(mine) else 0
        buckets.set_end(bucket, end)


class Packer:
    """Deals samples to scratch files, then makes a pack of them, in the claimed folder `partial`.

    `image_bytes` is an estimate of what the images will take.
    """

    def __init__(self, partial: str, plan: PackPlan, image_bytes: int, options: RunOptions) -> None:
        self._partial = partial
        self._pack_folder = os.path.join(partial, PACK_FOLDER)
        self._plan = plan
        self._inputs = plan.inputs
        self._options = options
        known = plan.inputs.known_failures
        self._failures = {sample: Failure(**failure) for sample, failure in known.items()}
        self._unreadable: list[Failure] = []
        self._journal = Journal(os.path.join(partial, JOURNAL_FILE), options.log)
        self._buckets = Buckets(
            partial,
            "deal",
            options.memory_bytes,
            plan.expected_bytes(image_bytes),
            self._journal.add,
            on_same_hdd(plan.inputs.index.root, partial),
            options.log,
        )
        self._finished = self._keep_finished()
        take_over(self._journal, self._buckets, plan.sharding.num_buckets, self._is_good)

    def _keep_finished(self) -> set[int]:
        """Return the shards that are as this run would write them.

        All others are deleted, and their samples are dealt again.
        """
        finished = {
            shard for shard in range(self._plan.sharding.num_shards) if self._is_finished(shard)
        }
        for shard in set(range(self._plan.sharding.num_shards)) - finished:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._shard_path(shard))
        # Otherwise a power failure could restore an old shard beside its new rows.
        sync(self._pack_folder)
        return finished

    def _is_finished(self, shard: int) -> bool:
        rows, path = self._read_rows(shard), self._shard_path(shard)
        if rows is None or not os.path.exists(path):
            return False
        kept = [failure["kept"] for failure in rows.failures]
        return (
            os.path.getsize(path) == rows.about["bytes"]
            and np.array_equal(rows.source_files, self._source_files(shard))
            and fits_policy(self._options.on_error, kept)
        )

    def _is_good(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        plan = self._plan
        good = (rows["sample"] >= 0) & (rows["sample"] < len(self._inputs.index))
        sample = np.where(good, rows["sample"], 0)
        expected = plan.shard_of_sample[sample] // plan.sharding.shards_per_bucket
        good &= rows["bucket"] == expected
        good &= rows["source_length"] == self._inputs.stamps.sizes[sample]
        good &= rows["source_mtime_ns"] == self._inputs.stamps.mtimes_ns[sample]
        if self._options.on_error in ("fail", "skip"):
            good &= (rows["flags"] & pack_format.FLAG_DAMAGED) == 0
        return np.asarray(good)

    # ---- deal

    def deal(self) -> None:
        """Read, encode and deal all samples that are missing."""
        missing = np.ones(len(self._inputs.index), np.bool_)
        missing[self._journal.rows()["sample"]] = False
        for shard in self._finished:
            missing[self._samples_of(shard)] = False
        known = self._inputs.known_failures
        missing[[sample for sample, failure in known.items() if not failure["kept"]]] = False
        samples = np.flatnonzero(missing)
        self._options.log.begin_pass("deal")
        done = len(missing) - len(samples)
        bar = self._options.bar("read and encode", len(missing), done)
        with ThreadPoolExecutor(self._options.num_workers) as threads, bar:
            try:
                runs = self._read_runs(samples)  # in this thread, in this order
                ahead = 2 * self._options.num_workers + RUNS_AHEAD
                for run, num_bytes in map_ahead(threads, self._encode_run, runs, ahead):
                    for sample, encoded in run:
                        self._deal_one(sample, encoded)
                    advance(bar, len(run), num_bytes)
            finally:
                self._buckets.flush()
        self._stop_on_failures()

    def _read_runs(self, samples: npt.NDArray[np.int64]) -> Iterator[tuple[list[Image], int]]:
        """Yield samples in disk order, in runs worth handing to a thread, and the runs' bytes."""
        run: list[Image] = []
        run_bytes = 0
        for sample, data in self._inputs.read_all(samples):
            run.append((sample, data))
            run_bytes += 0 if isinstance(data, Refused) else len(data)
            if len(run) >= RUN_SAMPLES or run_bytes >= RUN_BYTES:
                yield run, run_bytes
                run, run_bytes = [], 0
        if run:
            yield run, run_bytes

    def _encode_run(
        self, run: tuple[list[Image], int]
    ) -> tuple[list[tuple[int, Encoded | Refused]], int]:
        return [(sample, self._encode(sample, data)) for sample, data in run[0]], run[1]

    def _encode(self, sample: int, data: bytes | Refused) -> Encoded | Refused:
        if isinstance(data, Refused):
            return data
        return self._inputs.encode(sample, data, self._plan.sharding.tables)

    def _deal_one(self, sample: int, encoded: Encoded | Refused) -> None:
        stored = self._fail(sample, encoded) if isinstance(encoded, Refused) else encoded
        if stored is not None:
            shard = int(self._plan.shard_of_sample[sample])
            stamps = self._inputs.stamps
            stamp = (int(stamps.sizes[sample]), int(stamps.mtimes_ns[sample]))
            bucket = shard // self._plan.sharding.shards_per_bucket
            self._buckets.append(bucket, sample, stored, *stamp)

    def _fail(self, sample: int, refused: Refused) -> Encoded | None:
        """Record a failure; return what is stored of the sample under on_error="keep"."""
        kept = keep_damaged(refused) if self._options.on_error == "keep" else None
        name = self._inputs.index.name[sample]
        failure = Failure(name, refused.reason, kept is not None)
        self._failures[sample] = failure
        if self._options.progress and len(self._failures) <= MAX_REPORTED:
            tqdm.write(f"{name}: {refused.reason}", file=sys.stderr)
        if refused.is_read_error:
            self._unreadable.append(failure)
            refuse_dying_disk(self._unreadable, self._inputs.index.root, self._partial)
        if self._options.on_error in ("fail", None) and len(self._failures) >= _MAX_FAILURES:
            self._stop_on_failures()
        return kept

    def _stop_on_failures(self) -> None:
        known = self._inputs.known_failures
        stopping = [f for s, f in self._failures.items() if not f.kept and s not in known]
        on_error = self._options.on_error
        if not stopping or on_error == "skip":
            return
        how = "Repair them, or add --on-error skip to leave them out"
        if on_error == "fail":
            how += ", or --on-error keep to store their bytes as they are"
        if on_error is None:
            how = "The pack is damaged: bring these shards back from a copy, or pack the original "
            how += "images with the new seed instead"
        raise PackError(
            f"{len(stopping)} of {len(self._inputs.index)} images cannot be packed:\n"
            + list_failures(stopping)
            + f"\n{how}; then run the command again: it continues from {self._partial}"
        )

    # ---- finish

    def finish(self, destination: str) -> Summary:
        """Make the pack from the dealt samples."""
        self._finish_shards()
        self._write_tables()
        self._publish(self._pack_folder, destination)
        return summary_of(destination)

    def _finish_shards(self) -> None:
        """Make every missing shard from one sequential read of its scratch file."""
        plan = self._plan
        rows = self._journal.rows()
        self._options.log.begin_pass("finish")
        done = sum(len(self._samples_of(shard)) for shard in self._finished)
        with self._options.bar("write shards", len(self._inputs.index), done) as bar:
            for bucket in range(plan.sharding.num_buckets):
                shards = [s for s in plan.shards_of_bucket(bucket) if s not in self._finished]
                if not shards:
                    continue
                mine = rows[rows["bucket"] == bucket]
                if plan.sharding.shards_per_bucket == 1:
                    self._finish_shard(shards[0], self._buckets.load(bucket), mine, bar)
                else:
                    self._finish_group(bucket, shards, mine, bar)
                self._discard(bucket)

    def _discard(self, bucket: int) -> None:
        """Delete a scratch file that is not needed any more."""
        self._buckets.remove(bucket)

    def _finish_group(
        self, bucket: int, shards: list[int], rows: npt.NDArray[np.void], bar: Any
    ) -> None:
        """Deal the scratch file of several shards once more, to one file each; then finish them.

        This has no journal: after a kill it begins again with the shared scratch file.
        """
        again = [np.empty(0, DEALT)]
        rows = rows[np.isin(self._plan.shard_of_sample[rows["sample"]], shards)]
        in_shard = self._plan.shard_of_sample[rows["sample"]]
        expected_bytes = {s: int(rows["length"][in_shard == s].sum()) for s in shards}
        memory_bytes, log = self._options.memory_bytes, self._options.log
        waits = on_same_hdd(self._partial, self._partial)
        split = Buckets(
            self._partial, "split", memory_bytes, expected_bytes, again.append, waits, log
        )
        for shard in shards:
            split.remove(shard)
        for row, data in self._buckets.read(bucket, np.sort(rows, order="offset")):
            sample, size, mtime_ns = (
                int(row[key]) for key in ("sample", "source_length", "source_mtime_ns")
            )
            shard = int(self._plan.shard_of_sample[sample])
            split.append(shard, sample, encoded_from(data, row), size, mtime_ns)
        split.flush()
        rows = np.concatenate(again)
        for shard in shards:
            self._finish_shard(shard, split.load(shard), rows[rows["bucket"] == shard], bar)
            split.remove(shard)

    def _finish_shard(
        self, shard: int, scratch: memoryview, rows: npt.NDArray[np.void], bar: Any
    ) -> None:
        """Write one shard, and beside it the rows that the index will need."""
        path = self._shard_path(shard)
        expected_bytes = pack_format.shard_bytes(rows["length"])
        table: list[tuple[Any, ...]] = []
        samples: list[int] = []
        with ShardFile(path + ".tmp", expected_bytes, self._options.log) as file:
            for sample, encoded in self._take_all(shard, scratch, rows, bar):
                table.append(self._write_sample(file, shard, sample, encoded))
                samples.append(sample)
            file.write(pack_format.END_OF_SHARD)
        about = {
            "file": pack_format.shard_file(shard),
            "bytes": file.size,
            "crc32c": f"{file.crc32c:08x}",
            "num_samples": len(table),
        }
        failed = [sample for sample in self._samples_of(shard) if sample in self._failures]
        failures = [asdict(self._failures[sample]) for sample in failed]
        content = json.dumps({"about": about, "failures": failures}).encode() + b"\n"
        content += np.array(table, pack_format.ROW).tobytes() + np.array(samples, "<i8").tobytes()
        content += self._source_files(shard).tobytes()
        write_whole(self._rows_path(shard), content, self._options.log)
        sync(self._partial)  # a power failure must not leave a shard without its rows
        os.replace(path + ".tmp", path)

    def _write_sample(
        self, file: ShardFile, shard: int, sample: int, encoded: Encoded
    ) -> tuple[Any, ...]:
        name, label = self._inputs.index.name[sample], int(self._label[sample])
        data, width, height, crc, flags = encoded
        before, behind = around_image(self._members, name, label, len(data), flags)
        file.write(before)
        offset = file.size
        file.write(data)
        file.write(behind)
        return (offset, len(data), shard, label, width, height, crc, flags, (0, 0, 0))

    def _take_all(
        self, shard: int, scratch: memoryview, rows: npt.NDArray[np.void], bar: Any
    ) -> Iterator[tuple[int, Encoded]]:
        """Yield the samples of a shard that are not left out, in order, and advance the bar."""
        dealt = {int(row["sample"]): row for row in rows}
        for sample in self._samples_of(shard).tolist():
            encoded = self._take_dealt(scratch, dealt.get(sample), sample)
            if encoded is not None:
                yield sample, encoded
            advance(bar, 1, 0 if encoded is None else len(encoded.data))

    def _take_dealt(self, scratch: memoryview, row: Any, sample: int) -> Encoded | None:
        """Return a sample from its scratch file, or from the source where that is damaged.

        None: the sample is to be left out.
        """
        if row is not None:
            data = scratch[int(row["offset"]) : int(row["offset"]) + int(row["length"])]
            if len(data) == row["length"] and native.crc32c(data) == row["crc32c"]:
                if row["flags"] & pack_format.FLAG_DAMAGED and sample not in self._failures:
                    self._encode_again(sample, bytes(data))  # an earlier run knew the reason
                return encoded_from(data, row)
        if sample in self._failures and not self._failures[sample].kept:
            return None
        encoded = self._encode_again(sample, self._inputs.read(sample))
        self._stop_on_failures()
        return encoded

    def _encode_again(self, sample: int, data: bytes | Refused) -> Encoded | None:
        encoded = self._encode(sample, data)
        return self._fail(sample, encoded) if isinstance(encoded, Refused) else encoded

    @functools.cached_property
    def _members(self) -> pack_format.MemberNames:
        return pack_format.MemberNames(self._inputs.index.name)

    @functools.cached_property
    def _label(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._inputs.index.targets, np.int32)

    def _samples_of(self, shard: int) -> npt.NDArray[np.int64]:
        begin, end = self._plan.shard_begin[shard : shard + 2]
        return self._plan.order[begin:end]

    def _rows_path(self, shard: int) -> str:
        return os.path.join(self._partial, f"rows-{shard:06d}")

    def _shard_path(self, shard: int) -> str:
        return os.path.join(self._pack_folder, pack_format.shard_file(shard))

    def _source_files(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the shard's source files: their sizes and times, taken before reading."""
        samples, stamps = self._samples_of(shard), self._inputs.stamps
        return np.stack([stamps.sizes[samples], stamps.mtimes_ns[samples]]).astype("<i8")

    def _read_rows(self, shard: int) -> _ShardRows | None:
        """Return what was written beside a shard; None where it is missing or torn."""
        try:
            with open(self._rows_path(shard), "rb") as file:
                header = json.loads(file.readline())
                content = file.read()
            num_rows = header["about"]["num_samples"]
            split = np.cumsum([num_rows * pack_format.ROW.itemsize, num_rows * 8])
            return _ShardRows(
                header["about"],
                header["failures"],
                np.frombuffer(content[: split[0]], pack_format.ROW),
                np.frombuffer(content[split[0] : split[1]], "<i8"),
                np.frombuffer(content[split[1] :], "<i8").reshape(2, -1),
            )
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _write_tables(self) -> None:
        shards: list[_ShardRows] = []
        for shard in range(self._plan.sharding.num_shards):
            written = self._read_rows(shard)
            if written is None:
                raise PackError(f"{self._rows_path(shard)}: damaged; run the same command again")
            shards.append(written)
        rows = np.concatenate([shard.table for shard in shards])
        if not len(rows):
            raise PackError(f"{self._inputs.index.root}: no image is left to pack")
        names = self._inputs.index.name.take(np.concatenate([shard.samples for shard in shards]))
        files = {
            pack_format.INDEX_FILE: _npy(rows),
            pack_format.NAMES_FILE: _npy(names.blob),
            pack_format.NAMES_BEGIN_FILE: _npy(names.begin.astype("<i8")),
        }
        failures = [failure for shard in shards for failure in shard.failures]
        if failures:
            failures.sort(key=lambda failure: str(failure["name"]))
            files[pack_format.FAILURES_FILE] = json.dumps(failures, indent=1).encode()
        else:
            # A run that was killed here may have had failures that have been repaired since.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._pack_folder, pack_format.FAILURES_FILE))
        about = self._about(rows, names, [shard.about for shard in shards], failures, files)
        files[pack_format.PACK_FILE] = json.dumps(about, indent=1).encode()
        for file_name, content in files.items():
            write_whole(os.path.join(self._pack_folder, file_name), content)
        sync(self._pack_folder)

    def _publish(self, path: str, destination: str) -> None:
        """Give what was made its name, which is when it comes to exist."""
        os.rename(path, destination)
        sync(os.path.dirname(destination))
        delete_scrap(self._partial)

    def _about(
        self,
        rows: npt.NDArray[np.void],
        names: Names,
        shards: list[dict[str, Any]],
        failures: list[dict[str, Any]],
        files: dict[str, bytes],
    ) -> dict[str, Any]:
        plan = self._plan
        index = pack_format.make_index("", rows, names, self._inputs.index.classes, len(shards))
        return {
            "format": pack_format.FORMAT,
            "format_version": pack_format.FORMAT_VERSION,
            "created_by": f"imagenet-seq {__version__}",
            "index_id": index.id,
            "num_samples": len(rows),
            **({"split": plan.split} if plan.split else {}),
            "image_bytes": int(rows["length"].sum()),
            "classes": list(self._inputs.index.classes),
            "settings": self._inputs.settings_record,
            "huffman_tables": pack_format.describe_tables(plan.sharding.tables),
            "source": self._inputs.record,
            "counts": {
                "canonical": int(np.count_nonzero(rows["flags"] & pack_format.FLAG_CANONICAL)),
                "shrunk": int(np.count_nonzero(rows["flags"] & pack_format.FLAG_SHRUNK)),
                "failures": len(failures),
                "skipped": sum(not failure["kept"] for failure in failures),
            },
            "files": {
                name: {"bytes": len(content), "crc32c": f"{native.crc32c(content):08x}"}
                for name, content in files.items()
            },
            "shards": shards,
        }


def around_image(
    members: pack_format.MemberNames, name: str, label: int, size: int, flags: int
) -> tuple[bytes, bytes]:
    """Return what a shard holds in front of and behind a sample's image of `size` bytes."""
    header, padding = pack_format.member_header, pack_format.padding
    content = pack_format.label_content(label)
    label_header = header(members.label(name), len(content))
    behind = padding(size) + label_header + content + padding(len(content))
    is_canonical = bool(flags & pack_format.FLAG_CANONICAL)
    return header(members.image(name, is_canonical), size), behind


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def advance(bar: Any, num_samples: int, num_bytes: int) -> None:
    """Advance a progress bar, and show MB/s beside images/s."""
    bar.moved_bytes = getattr(bar, "moved_bytes", 0) + num_bytes
    if bar.update(num_samples) and not bar.disable:
        elapsed = bar.format_dict["elapsed"] or 1
        bar.set_postfix_str(f"{bar.moved_bytes / 1e6 / elapsed:.0f} MB/s", refresh=False)
