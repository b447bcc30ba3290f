"""What is packed: the interface that packing reads its samples through, and what inputs share.

There are three kinds: folders of image files (`input_folder`), large files of any format
(`input_files`), and a finished pack that gets another order (`input_pack`). All read samples in the
order they lie on the disk, so that the head of a hard disk moves in one direction.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import Index
from imagenet_seq.index.source import Source
from imagenet_seq.pack.encode import Refused, Settings, encode
from imagenet_seq.pack.selection import Selection
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded

Image = tuple[int, "bytes | Refused"]
"""A sample and its bytes."""


class Stamps(NamedTuple):
    """Tells whether a sample's bytes were replaced; -1 where the file cannot be looked at."""

    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]


class Inputs(Protocol):
    """Samples to pack. Used by one thread, except `encode`.

    Attributes:
        index: all samples, with those that are known to be left out.
        settings: what the pack is to be like.
        tables: its Huffman tables, where they are given.
        notes: what the user should know about the source.
        split: "train" or "val", where the source itself says so.
    """

    index: Index
    settings: Settings
    tables: bytes | None
    notes: tuple[str, ...]
    split: str | None

    @property
    def path(self) -> str:
        """Where the source lies."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Approximate bytes of each sample; -1: unknown."""

    @property
    def stamps(self) -> Stamps:
        """Size and time of the file that holds each sample."""

    @property
    def id(self) -> str:
        """Digest that a continued run must find again."""

    @property
    def record(self) -> dict[str, Any]:
        """The member `source` of pack.json."""

    @property
    def settings_record(self) -> dict[str, Any]:
        """The member `settings` of pack.json."""

    @property
    def known_failures(self) -> dict[int, dict[str, Any]]:
        """Samples that an earlier packing left out, or kept although damaged."""

    @property
    def some_images(self) -> Sequence[bytes]:
        """Images from all over the source, where they can be found without its index."""

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes."""

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Yield samples and their bytes in the order they lie on the disk."""

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return `count` samples from the beginning of a random order that are cheap to read."""

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Return a sample as it is to be stored in a pack with these Huffman tables."""


def known_bytes(sizes: npt.NDArray[np.int64]) -> int:
    """Return the sum of the sizes that are known."""
    return int(sizes[sizes > 0].sum())


class EncodedInputs:
    """What inputs share whose images are encoded anew: a selection of a source, and settings.

    Args:
        source: any source but a pack.
        settings: what the pack is to be like.
        selection: of the source's samples.
    """

    def __init__(self, source: Source, settings: Settings, selection: Selection) -> None:
        if source.kind == "pack":
            raise ValueError(
                f"{source.index.root}: is a pack already; --reshuffle makes a pack of another "
                "order of it"
            )
        _refuse_unlabelled(source.index)
        source = selection.of(source)
        self.index = source.index
        self.settings = settings
        self.selection = selection
        self.tables: bytes | None = None
        self.notes = source.notes
        self.split = source.split
        self.known_failures: dict[int, dict[str, Any]] = {}
        self.some_images: Sequence[bytes] = ()
        self._kind = source.kind

    @property
    def path(self) -> str:
        """The folder that the files lie in."""
        return self.index.root

    @property
    def id(self) -> str:
        """Digest of names, labels and classes."""
        return self.index.id

    @property
    def settings_record(self) -> dict[str, Any]:
        """The member `settings` of pack.json."""
        return {**self.settings.describe(), **self.selection.describe()}

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return the first samples: all are equally cheap to read."""
        return order[:count]

    def encode(self, sample: int, data: bytes, tables: bytes | None) -> Encoded | Refused:
        """Encode an image as the settings say."""
        return encode(data, self.settings, tables)

    def _record(self, lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
        return {
            "kind": self._kind,
            "num_samples": len(self.index),
            "bytes": known_bytes(lengths),
            "index_id": self.index.id,
        }


def _refuse_unlabelled(index: Index) -> None:
    label = np.asarray(index.targets)
    if int(label.min(initial=0)) < 0:
        sample = int(label.argmin())
        raise ValueError(
            f"{index.root}: sample {sample} ({index.name[sample]}) has no label, and a pack needs "
            "one for each"
        )


def unreadable(error: OSError) -> Refused:
    """Return why a sample has no bytes that the operating system could not read."""
    code = errno.errorcode.get(error.errno or 0, "?")
    return Refused(f"cannot be read: {error.strerror} ({code})", None, is_read_error=True)


def storable(data: bytes) -> bytes | Refused:
    """Return the bytes, or why a shard cannot hold them."""
    if len(data) > pack_format.MAX_IMAGE_BYTES:
        return Refused(f"{len(data)} bytes are more than a tar member can hold", None)
    return data
