"""The index.json of MDS shards: which shards there are, and what columns their samples have."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from imagenet_seq.errors import DataError

INDEX_FILE = "index.json"
_MAX_INDEX_BYTES = 1 << 28
_MAX_SHARD_BYTES = (1 << 32) - 1  # offsets are u32
_IMAGES = ("jpeg", "png", "pil", "jpeg_array", "jpegarray")
INTS = {
    "int": "<q", "int64": "<q", "int32": "<i", "int16": "<h", "int8": "<b",
    "uint64": "<Q", "uint32": "<I", "uint16": "<H", "uint8": "<B",
}  # fmt: skip
TEXTS = ("str", "str_int")
_IMAGE_NAMES = ("image", "x", "img", "jpg", "jpeg")
_LABEL_NAMES = ("label", "class", "y", "target", "cls")


def described_shards(path: str) -> list[dict[str, Any]] | None:
    """Return the shards in an index.json; None if it is not MosaicML Streaming's."""
    if os.path.getsize(path) > _MAX_INDEX_BYTES:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError):
        return None
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return None
    return shards


class Columns(NamedTuple):
    """The columns of a sample: their encodings and sizes, and which are image and label."""

    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]
    image: int
    label: int


class Shard(NamedTuple):
    """A shard, and the file that it is read from."""

    path: str
    name: str  # prefix of its samples' names; empty if there is only one shard
    compression: str | None  # "zstd", "gz", "bz2" or None
    raw_bytes: int  # size without compression
    num_samples: int
    columns: Columns
    hashes: Mapping[str, str]  # by algorithm, of the bytes without compression

    @property
    def has_pixels(self) -> bool:
        """Whether its images are raw pixels."""
        return self.columns.encodings[self.columns.image] == "pil"


class MdsError(ValueError):
    """A part of a shard or of its description is wrong; says what was expected and what came."""


def read_shards(folder: str) -> list[Shard]:
    """Read index.json; DataError if it is damaged, or a file is missing or has another size."""
    where = os.path.join(folder, INDEX_FILE)
    described = described_shards(where)
    if not described:
        raise DataError(f"{where}: expected a list of shards, found none")
    shards = []
    for number, about in enumerate(described):
        try:
            shards.append(_shard(folder, about))
        except MdsError as error:
            raise DataError(f"{where}: shard {number}: {error}") from error
    if len(shards) == 1:
        return [shards[0]._replace(name="")]
    if len({shard.columns for shard in shards}) > 1:
        raise DataError(f"{where}: expected the same columns in all shards, got different ones")
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{where}: expected a file of its own for each shard, one is named twice")
    return shards


def _shard(folder: str, about: dict[str, Any]) -> Shard:
    if about.get("version") != 2 or about.get("format") != "mds":
        raise MdsError(
            f"expected version 2 and format 'mds', got {about.get('version')!r:.50} and "
            f"{about.get('format')!r:.50}"
        )
    raw_name, raw_bytes, hashes = _file_of(about, "raw_data")
    num_samples = about.get("samples")
    if not isinstance(num_samples, int) or not 0 <= num_samples <= raw_bytes // 4 - 2:
        raise MdsError(
            f"expected a number of 'samples' that fit into {raw_bytes} bytes, got "
            f"{num_samples!r:.50}"
        )
    path, size, compression = os.path.join(folder, raw_name), raw_bytes, None
    if not os.path.exists(path) and about.get("zip_data"):
        zip_name, size, _ = _file_of(about, "zip_data")
        path, compression = os.path.join(folder, zip_name), _algorithm(about)
    if not os.path.exists(path):
        raise MdsError(f"{path} is missing: download the shard, or write the data set again")
    if os.path.getsize(path) != size:
        raise MdsError(
            f"{path}: expected {size} bytes, got {os.path.getsize(path)}: it is truncated or "
            "another one; download it again"
        )
    columns, name = _columns(about), os.path.splitext(raw_name)[0] + "/"
    return Shard(path, name, compression, raw_bytes, num_samples, columns, hashes)


def _file_of(about: dict[str, Any], which: str) -> tuple[str, int, Mapping[str, str]]:
    """Return a file's name, bytes and hashes."""
    file = about.get(which)
    if not isinstance(file, dict):
        raise MdsError(f"expected '{which}' with 'basename' and 'bytes', got {file!r:.50}")
    name, size, hashes = file.get("basename"), file.get("bytes"), file.get("hashes") or {}
    if not isinstance(name, str) or not _is_inside(name):
        raise MdsError(f"{which}: expected the name of a file in the folder, got {name!r:.100}")
    if not isinstance(size, int) or not 0 <= size <= _MAX_SHARD_BYTES:
        raise MdsError(f"{which}: expected at most {_MAX_SHARD_BYTES} bytes, got {size!r:.50}")
    if not isinstance(hashes, dict):
        raise MdsError(f"{which}: expected 'hashes' by algorithm, got {hashes!r:.50}")
    return name, size, hashes


def _is_inside(name: str) -> bool:
    parts = name.split("/")  # shards of a merged index lie in folders
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(parts)


def _columns(about: dict[str, Any]) -> Columns:
    names, encodings, sizes = _lists(about)
    kinds = tuple(encoding.split(":")[0] for encoding in encodings)
    image = _chosen(names, [i for i, kind in enumerate(kinds) if kind in _IMAGES], _IMAGE_NAMES)
    if image is None:
        image = _chosen(names, [i for i, kind in enumerate(kinds) if kind == "bytes"], _IMAGE_NAMES)
    label = _chosen(names, [i for i, kind in enumerate(kinds) if kind in INTS], _LABEL_NAMES)
    if label is None:
        label = _chosen(names, [i for i, kind in enumerate(kinds) if kind in TEXTS], _LABEL_NAMES)
    if image is None or label is None:
        shown = ", ".join(f"{name}: {kind}" for name, kind in zip(names, encodings, strict=True))
        raise MdsError(
            f"expected a column of images ({', '.join(_IMAGES)} or bytes) and one of labels "
            f"(integers or str), called {' or '.join(_IMAGE_NAMES)} and "
            f"{' or '.join(_LABEL_NAMES)} where there are several; got {shown}"
        )
    return Columns(kinds, tuple(size or None for size in sizes), image, label)


def _lists(about: dict[str, Any]) -> tuple[list[str], list[str], list[int | None]]:
    """Return names, encodings and sizes of the columns."""
    lists = [about.get(f"column_{what}") for what in ("names", "encodings", "sizes")]
    names, encodings, sizes = (values if isinstance(values, list) else [] for values in lists)
    if (
        not 0 < len(names) == len(encodings) == len(sizes)
        or not all(isinstance(text, str) for text in (*names, *encodings))
        or not all(size is None or (isinstance(size, int) and size >= 0) for size in sizes)
    ):
        raise MdsError(f"expected names, encodings and sizes of columns, got {lists!r:.200}")
    return names, encodings, sizes


def _chosen(names: Sequence[str], choice: Sequence[int], known: Sequence[str]) -> int | None:
    """Return the column in `choice` with the first known name, or the only one."""
    by_name = {names[i].lower(): i for i in choice}
    found = next((by_name[name] for name in known if name in by_name), None)
    return choice[0] if found is None and len(choice) == 1 else found


def _algorithm(about: dict[str, Any]) -> str:
    """Return how a shard is compressed: the "zstd" of "zstd:7"."""
    algorithm = str(about.get("compression")).split(":")[0]
    if algorithm not in ("zstd", "gz", "bz2"):
        raise MdsError(
            f"expected shards that are not compressed, or by zstd, gz or bz2, got {algorithm!r:.50}"
            ": decompress them (StreamingDataset does where it downloads to)"
        )
    return algorithm
