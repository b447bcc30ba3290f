"""Arrow files as `datasets` keeps them: `save_to_disk` folders and its local cache.

They are streams of record batches without compression, so every image lies in a file byte by byte:
pyarrow says where, on the mapped file. From then on images are byte ranges like any other.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from imagenet_seq.errors import DataError
from imagenet_seq.index.mixing import is_permuted
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats import huggingface as hf
from imagenet_seq.sources.place import Found, Opening, Place, SplitNeededError

LOOKS_FOR = "Arrow files of Hugging Face: a folder of save_to_disk, or of the cache of datasets"

_MAGIC = b"\xff\xff\xff\xff"
"""Precedes the first message of a stream."""

_OF_CACHE = re.compile(r"(?!cache-).+-[a-z]+(-\d{5}-of-\d{5})?\.arrow")
"""Files of a split, without those that `map` and `shuffle` write beside them."""


def find(place: Place) -> Found | str | None:
    """Recognise a folder by the file that describes it, Arrow files by their first bytes."""
    if "dataset_dict.json" in place.files:
        splits = ", ".join(place.folders)
        if place.split is None:
            raise SplitNeededError(f"{place.path} holds {splits} of save_to_disk: pass a split")
        return f"holds {splits} of save_to_disk, but no folder of split {place.split!r}"
    for at in hf.places(place):
        if "state.json" in at.files:
            paths = _saved_files(at)
        else:
            names = [name for name in at.files if _OF_CACHE.fullmatch(name) or not at.is_folder]
            if not names:
                continue
            paths = hf.files_of(at, names)
            if not paths:
                return f"{at.path} holds Arrow files, but none of split {place.split!r}"
        if isinstance(paths, str):
            return paths
        if not hf.begins_with(paths[0], _MAGIC):
            return f"{paths[0]} does not begin as a stream of Arrow does" if at.is_folder else None
        what = f"{len(paths)} Arrow files, {os.path.basename(paths[0])} first"
        return Found("arrow", what, functools.partial(_open, at, paths), paths)
    return None


def _saved_files(place: Place) -> list[str] | str:
    """Return the files that `state.json` names, in its order, or why it can't be used."""
    path = os.path.join(place.folder, "state.json")
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        shuffled = [key for key in state if "indices" in key and state[key]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{path} is not what save_to_disk writes"
    if shuffled:
        return (
            f"{path} names indices ({shuffled[0]}), a selection of its rows that is not applied "
            "here: save it again with load_from_disk(...).flatten_indices().save_to_disk(...)"
        )
    outside = [name for name in names if os.path.basename(name) != name]
    missing = [name for name in names if name not in place.files]
    if outside or missing or not names:
        return f"{path} names the files {outside or missing or names}, which are not beside it"
    return [os.path.join(place.folder, name) for name in names]


def _open(place: Place, paths: Sequence[str], how: Opening) -> Source:
    scanned = hf.index_files("arrow", place, paths, how, _scan_file)
    index = scanned.index
    return Source("arrow", index, permuted=is_permuted(index), notes=scanned.notes)


def _scan_file(scan: hf.Scan, path: str) -> None:
    """Index a file; only pages with messages, offsets, paths and labels are read."""
    pyarrow = hf.import_pyarrow(path)
    scan.files.append(os.path.basename(path))
    with pyarrow.memory_map(path) as file:
        mapped = file.read_buffer()
    with hf.import_pyarrow(path, "pyarrow.ipc").open_stream(pyarrow.BufferReader(mapped)) as stream:
        columns = scan.begin(path, stream.schema)
        for batch in stream:
            batch.validate()
            _scan_batch(scan, columns, batch, mapped)


def _scan_batch(scan: hf.Scan, columns: hf.Columns, batch: Any, mapped: Any) -> None:
    structs, labels = batch.column(columns.image), batch.column(columns.label)
    images, data = hf.images_in(structs.field("bytes")), structs.field("bytes").buffers()[2]
    begin = int(data.address - mapped.address) if data is not None and data.size else 0
    if begin and not 0 <= begin <= mapped.size - data.size:
        raise DataError(
            f"{scan.path}: the batch of row {scan.first_row} is compressed: images can be read "
            "only where they lie as they are. Write it as `datasets` does, with save_to_disk"
        )
    missing = hf.nulls_of(structs) | (images.lengths == 0)
    paths = structs.field("path") if columns.has_path else None
    scan.add(begin + images.offsets, images.lengths, missing, labels, paths, lambda: images)
