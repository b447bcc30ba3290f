"""The names the original project (sequential-imagenet-dataloader) used, with its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from imagenet_seq import loader
from imagenet_seq.options import Split, blocks_of_cache
from imagenet_seq.read.options import check_count

__all__ = ["ImagenetLoader", "Loader"]


class ImagenetLoader(loader.Loader):
    """`Loader` with the arguments of the original project (sequential-imagenet-dataloader).

    ``ImagenetLoader('train', batch_size=..., num_workers=...)``,
    ``ImagenetLoader(root, 'train', transform, batch_size=..., num_workers=..., cache=...,
    shuffle=True)``.

    Args:
        dataset, split, transform, arguments: as `Loader`.
        cache: samples that a block shuffle mixes at a time, in place of `shuffle_blocks`. A uniform
            shuffle has no such pool.
        cuda: True for device="cuda".

    Raises:
        ValueError: cache beside shuffle_blocks, or cuda beside device; and as `Loader`.
    """

    def __init__(
        self,
        dataset: Any = None,
        split: Split | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        cache: int | None = None,
        cuda: bool | None = None,
        **arguments: Any,
    ) -> None:
        check_count("cache", cache)
        for given, value, excluded in (
            ("cache", cache, "shuffle_blocks"),
            ("cuda", cuda, "device"),
        ):
            if value is not None and excluded in arguments:
                raise ValueError(f"{given} and {excluded} exclude each other: pass one of them")
        self._cache = cache
        if cuda:
            arguments["device"] = "cuda"
        super().__init__(dataset, split, transform, **arguments)

    def _pooled_blocks(self, shuffle_blocks: int) -> int:
        if self._cache is not None:
            shuffle_blocks = blocks_of_cache(self._source, self._cache, self._block_bytes)
        return super()._pooled_blocks(shuffle_blocks)


Loader = ImagenetLoader
