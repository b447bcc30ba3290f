"""A plug-in ImageNet DataLoader for PyTorch: exact pixels, sequential reads.

    from imagenet_seq import Loader

    train_loader = Loader("train", batch_size=256, num_workers=8)   # root from $IMAGENET

Importing this package is quick: torch is imported when a Loader is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from imagenet_seq.errors import (
    CollateError,
    DataError,
    ForkError,
    ImagenetSeqError,
    LoaderClosedError,
    PackError,
    SampleError,
    StateError,
)

if TYPE_CHECKING:
    from imagenet_seq.data import ImagenetLoader
    from imagenet_seq.loader import Loader
    from imagenet_seq.machine import LoaderNote
    from imagenet_seq.pack.packing import pack_dataset
    from imagenet_seq.read.options import ReadOptions
    from imagenet_seq.sources.recognise import open_source

try:
    __version__ = version("imagenet-seq")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_MODULES = {
    "Loader": "loader",
    "ImagenetLoader": "data",
    "ReadOptions": "read.options",
    "LoaderNote": "machine",
    "open_source": "sources.recognise",
    "pack_dataset": "pack.packing",
}
"""Where the other public names are defined; a module is imported when its name is asked for."""

__all__ = [
    "CollateError",
    "DataError",
    "ForkError",
    "ImagenetLoader",
    "ImagenetSeqError",
    "Loader",
    "LoaderClosedError",
    "LoaderNote",
    "PackError",
    "ReadOptions",
    "SampleError",
    "StateError",
    "__version__",
    "open_source",
    "pack_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
