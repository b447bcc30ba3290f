"""A finished pack as input of another one: its images as they are, in the order of another seed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from imagenet_seq import native
from imagenet_seq.errors import DataError
from imagenet_seq.index.columns import Index, Names
from imagenet_seq.pack.encode import Refused, Settings
from imagenet_seq.pack.input_files import RangeReader
from imagenet_seq.pack.inputs import Image, Inputs, Stamps
from imagenet_seq.pack.io_log import IoLog
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded
from imagenet_seq.sources.place import Found, Opening


class PackInputs(Inputs):
    """The samples of a pack, and behind them those that were left out of it.

    The latter also decide where shards end and what tar members are called. With them, the new pack
    is as if the original images were packed with the new seed.

    A seed of None means one more than the pack's.
    """

    def __init__(self, found: Found, seed: int | None, log: IoLog) -> None:
        opened = found.open(Opening())
        path = opened.index.root
        if opened.kind != "pack":
            raise ValueError(f"{path}: expected a pack to reshuffle, found a {opened.kind}")
        self._pack = pack_format.read_pack(path)
        self.settings, self.settings_record = _other_order(self._pack, seed)
        self.tables = self._pack.tables
        self.split = opened.split
        has_failures = self._pack.about["counts"]["failures"]
        failures = pack_format.read_failures(path) if has_failures else []
        left_out = [failure["name"] for failure in failures if not failure["kept"]]
        self.index = _with_left_out(opened.index, left_out)
        self.path = path
        self.id = str(self._pack.about["index_id"])
        failure_of = {failure["name"]: failure for failure in failures}
        self.known_failures = {
            sample: failure_of[name]
            for sample, name in enumerate(self.index.name if failures else ())
            if name in failure_of
        }
        self._reader = RangeReader(opened.index, log)

    @property
    def record(self) -> dict[str, Any]:
        """The member `source` of pack.json: what the given pack was made of."""
        return dict(self._pack.about["source"])

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of every image; -1 for those that were left out."""
        lengths = np.full(len(self.index), -1, np.int64)
        lengths[: len(self._pack.rows)] = self._pack.rows["length"]
        return lengths

    @functools.cached_property
    def stamps(self) -> Stamps:
        """Size of every image and time of its shard."""
        rows = self._pack.rows
        shards = [os.path.join(self.index.root, name) for name in self.index.files]
        mtimes_ns = np.full(len(self.index), -1, np.int64)
        shard_mtimes = np.array([os.stat(shard).st_mtime_ns for shard in shards], np.int64)
        mtimes_ns[: len(rows)] = shard_mtimes[rows["shard"]]
        return Stamps(self.lengths, mtimes_ns)

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Read shard by shard, each of which lies in one piece on the disk."""
        return self._reader.read_all(samples)

    def read(self, sample: int) -> bytes | Refused:
        """Return the bytes at the sample's place; `encode` checks them."""
        return self._reader.read(sample)

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return the sample as it is, if its checksum is right."""
        row = self._pack.rows[sample]
        length, expected, crc = int(row["length"]), int(row["crc32c"]), native.crc32c(data)
        if (len(data), crc) != (length, expected):
            return Refused(
                f"{self._reader.path(sample)} offset {row['offset']}: sample {sample}: expected "
                f"{length} bytes with CRC-32C {expected:08x}, got {len(data)} with {crc:08x}",
                None,
            )
        width, height, flags = (int(row[key]) for key in ("width", "height", "flags"))
        return Encoded(memoryview(data), width, height, crc, flags)


def _other_order(pack: pack_format.Pack, seed: int | None) -> tuple[Settings, dict[str, Any]]:
    """Return the pack's settings with another seed: those to use, and those to record."""
    record = pack.about["settings"]
    keys = ("keep_bytes", "strip", "restart_interval", "tables", "shard_bytes", "seed")
    try:
        values = {key: record[key] for key in keys}
        values["seed"] = (values["seed"] + 1) % 2**64 if seed is None else seed
        # Without `shrink`: smaller copies stay as they are, whatever encoder made them.
        return Settings(**values), {**record, "seed": values["seed"]}
    except (KeyError, TypeError, ValueError) as error:
        if seed is not None and not 0 <= seed < 2**64:
            raise
        raise DataError(
            f"{os.path.join(pack.folder, pack_format.PACK_FILE)}: 'settings': {error!r}; "
            f"{pack_format.RUN_VERIFY}"
        ) from error


def _with_left_out(index: Index, left_out: list[str]) -> Index:
    """Return names, labels and classes of a pack's samples and of those left out of it."""
    zeros = np.zeros(len(left_out), np.int32)
    return Index(
        file=np.concatenate([index.file, zeros]),
        offset=np.concatenate([index.offset, zeros]),
        name=Names.concatenate([index.name, Names.from_strings(left_out)]),
        root=index.root,
        files=index.files,
        classes=index.classes,
        label=np.concatenate([np.asarray(index.targets, np.int32), zeros]),
    )
