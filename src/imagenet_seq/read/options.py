"""What the user may say about reading; everything else follows from disk and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DiskKind = Literal["auto", "hdd", "ssd"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a Loader reads its data. The defaults suit the disk that the data lies on.

        Loader("/data/imagenet", "train", reading=ReadOptions(disk="hdd", num_readers=1))

    Only `block_bytes` changes the order of a block shuffle; nothing here changes pixels.

    Attributes:
        disk: "auto", "hdd" (one process at a time, in turns) or "ssd" (several requests at a
            time). Also from the environment variable IMAGENET_SEQ_DISK.
        num_readers: threads that read, 1 or more; None: what suits the disk.
        direct: read past the page cache (O_DIRECT). None: where data is read in blocks and does not
            stay in the page cache.
        window: samples that are read in the order they lie on the disk and delivered in the order
            of the shuffle, where samples are read one by one; 0: none. None: 4096 over the node's
            ranks on a hard disk, else 0.
        block_bytes: size of a read where data is read in blocks, such as from a pack.
        verify_checksums: check the CRC-32C of every sample of a pack on its first read. Later
            epochs of the same loader rely on it.

    Raises:
        TypeError, ValueError: a value is outside its domain.
    """

    disk: DiskKind = "auto"
    num_readers: int | None = None
    direct: bool | None = None
    window: int | None = None
    block_bytes: int = 16 << 20
    verify_checksums: bool = True

    def __post_init__(self) -> None:
        if self.disk not in get_args(DiskKind):
            raise ValueError(f"expected disk 'auto', 'hdd' or 'ssd', got {self.disk!r}")
        check_count("num_readers", self.num_readers)
        check_count("window", self.window, least=0)
        if self.block_bytes is None:
            raise TypeError("expected an int for block_bytes, got None")
        check_count("block_bytes", self.block_bytes)
        for name, choices in (("direct", (None, True, False)), ("verify_checksums", (True, False))):
            value = getattr(self, name)
            if not any(value is choice for choice in choices):
                raise TypeError(f"expected True or False for {name}, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless value is None or an int of `least` or more; a bool is no int here."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an int for {name}, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} of {least} or more, got {value}")
