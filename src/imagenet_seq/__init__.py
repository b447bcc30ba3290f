"""A plug-in ImageNet DataLoader for PyTorch: exact pixels, sequential reads.

    from imagenet_seq import Loader

    train_loader = Loader("train", batch_size=256, num_workers=8)   # root from $IMAGENET

Importing this package is quick: torch is imported when a Loader is first asked for.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagenet_seq.loader import ImagenetLoader, Loader

try:
    __version__ = version("imagenet-seq")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["ImagenetLoader", "Loader", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Loader", "ImagenetLoader"):
        from imagenet_seq import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
