"""Photos in every format that a Loader reads, written by the writers of tests/fixtures/make.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import photos

MAKE = photos.ROOT / "tests" / "fixtures" / "make.py"

KINDS = {
    "pack": "pack",
    "official": "official",
    "kaggle": "kaggle",
    "webdataset": "webdataset",
    "tensorpack": "tensorpack/msgpack",
    "lmdb": "lmdb/pickle",
    "parquet": "parquet",
    "hf_disk": "hf_disk",
    "tfrecord": "tfrecord/inception",
    "tfds": "tfrecord/tfds",
    "ffcv": "ffcv/train.beton",
    "mds": "mds",
    "mds_zstd": "mds_zstd",
}
"""The path to open for each kind of source, relative to the folder where all are made."""


class MissingWriterError(Exception):
    """A format's own library is not installed here."""


def make_source(kind: str, images: Path, cache: Path) -> Path:
    """Return the path of a source of `kind` in `cache`, made of `images` unless it is there.

    Args:
        kind: one of KINDS.
        images: a folder with the ImageFolder train/, of .JPEG files.
        cache: where sources are made; those whose writers are installed only in another
            environment are made there by `make.py FORMAT --images IMAGES --destination CACHE`.

    Raises:
        MissingWriterError: where the writer can't be imported.
    """
    path = cache / KINDS[kind]
    if path.exists():
        return path
    if kind == "pack":
        photos.make_pack(images / "train", path)
        return path
    name, write = _writer_of(kind)
    try:
        write(images, cache / name)
    except ImportError as error:
        raise MissingWriterError(f"{error}; or make it elsewhere: {MAKE.name} {name}") from error
    return path


def _writer_of(kind: str) -> tuple[str, Callable[[Path, Path], None]]:
    """Return the name of the format that holds a kind's files, and what writes it."""
    formats = _make().FORMATS
    name = next(name for name in formats if f"{KINDS[kind]}/".startswith(f"{name}/"))
    return name, formats[name]


def _make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imagenet_seq_fixtures", MAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
