"""A dataset as the other stages see it: an index, and blocks that only Python can decode."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Index


class Block(NamedTuple):
    """The bytes of a python block, and where each of its samples lies in them.

    Attributes:
        bytes: the encoded images, and maybe other bytes (uint8).
        offsets: first byte of each sample, by its ordinal in the block.
        lengths: bytes of each sample; 0 if it has no image.
    """

    bytes: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def image(self, ordinal: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of the sample with this ordinal, as a view."""
        begin = int(self.offsets[ordinal])
        return self.bytes[begin : begin + int(self.lengths[ordinal])]


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset as plan, loader and pack need it. Subclass it to add a source of python blocks.

    Args:
        kind: the format in one word, for messages: "imagefolder", "pack", ...
        index: its samples.
        permuted: whether samples are known to lie in random order, so that their classes are mixed
            and a block shuffle is as good as a uniform one.
        python_blocks: whether blocks have to be produced by `read_block` instead of being byte
            ranges of files. Then the index's `file` is the number of a sample's block and `offset`
            its ordinal in that block.
        notes: what the user should know about it, such as samples left out.
        split: "train" or "val", where the data itself says so; None: not known.
    """

    kind: str
    index: Index
    permuted: bool = False
    python_blocks: bool = False
    notes: tuple[str, ...] = ()
    split: str | None = field(default=None, kw_only=True)

    def read_block(self, number: int) -> Block:
        """Produce python block `number`; called from several threads at once.

        Element k of its `offsets` and `lengths` belongs to the sample with ordinal k.
        """
        raise TypeError(
            f"source '{self.kind}' has no python blocks: read its files (block {number})"
        )

    def agreed_split(self, split: str | None) -> str | None:
        """Return the split asked for, or else that of the data; ValueError if they differ."""
        if split and self.split and split != self.split:
            raise ValueError(
                f"{self.index.root}: holds the split {self.split!r}, not {split!r}: ask for "
                f"{self.split!r} or for none, or give the path of {split!r}"
            )
        return split or self.split

    def take(self, indices: npt.ArrayLike) -> Source:
        """Return the source of the samples at `indices`, in that order (like torch's Subset)."""
        return dataclasses.replace(self, index=self.index.take(indices))
