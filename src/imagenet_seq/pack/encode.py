"""Encode one image as a pack stores it: smaller if asked for, then in canonical form."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from imagenet_seq import native
from imagenet_seq.pack.shrink import Shrink, smaller_copy
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.formats.pack import Encoded

Tables = Literal["pack", "image"]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a pack, beside its source.

    Attributes:
        keep_bytes: store every image's own bytes instead of transcoding it.
        strip: drop ICC profiles, Exif thumbnails and comments.
        restart_interval: MCUs between restart markers, 1 to 65535.
        tables: "pack": all images share Huffman tables and decode fastest; "image": each has its
            own, which takes 2.5 % fewer bytes. Without effect where `keep_bytes` is set.
        shard_bytes: approximate bytes of the source per shard.
        seed: of the random order.
        shrink: how smaller copies are made; None: every image keeps its pixels.
    """

    keep_bytes: bool = False
    strip: bool = False
    restart_interval: int = 8
    tables: Tables = "pack"
    shard_bytes: int = 10**9
    seed: int = 0
    shrink: Shrink | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2**64 - 1, got {self.seed}")
        if not 1 <= self.restart_interval <= 65535:
            raise ValueError(
                f"restart_interval: expected 1 to 65535 MCUs, got {self.restart_interval}"
            )
        if self.tables not in get_args(Tables):
            raise ValueError(f"tables: expected one of {get_args(Tables)}, got {self.tables!r}")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes: expected 1 or more, got {self.shard_bytes}")
        if self.keep_bytes and self.strip:
            raise ValueError("keep_bytes and strip contradict each other: give one of the two")
        if self.keep_bytes and self.shrink:
            raise ValueError("keep_bytes and max_side contradict each other: give one of the two")

    def describe(self) -> dict[str, Any]:
        """Return the settings as pack.json records them."""
        settings = asdict(self)
        shrink = settings.pop("shrink")
        if shrink is None:
            shrink = dict.fromkeys(field.name for field in dataclasses.fields(Shrink))
        return {**settings, **shrink}


class Refused(NamedTuple):
    """A sample that is no image, or could not be read.

    Attributes:
        reason: why.
        data: its bytes; None: there are none to keep.
        is_read_error: whether the disk failed, not the image.
    """

    reason: str
    data: bytes | None
    is_read_error: bool = False


def encode(data: bytes, settings: Settings, tables: bytes | None) -> Encoded | Refused:
    """Return an image as it is to be stored in a pack whose Huffman tables are `tables`."""
    copy = smaller_copy(data, settings.shrink) if settings.shrink else None
    if copy is None:
        return _transcode(data, settings, tables)
    encoded = _transcode(copy, settings, tables)
    if isinstance(encoded, Encoded):
        encoded = encoded._replace(flags=encoded.flags | pack_format.FLAG_SHRUNK)
    return encoded


def _transcode(data: bytes, settings: Settings, tables: bytes | None) -> Encoded | Refused:
    """Transcode one image losslessly, or keep its bytes where only Pillow can decode it."""
    transcoded = native.transcode(data, settings.restart_interval, settings.strip, tables)
    if transcoded is not None and _is_trusted(transcoded[0].data, data, settings):
        stored = memoryview(data) if settings.keep_bytes else transcoded[0].data
        flags = pack_format.FLAG_CLEAN | (0 if settings.keep_bytes else pack_format.FLAG_CANONICAL)
        header = transcoded[1]
        return Encoded(stored, header.width, header.height, native.crc32c(stored), flags)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address, so it would differ between runs.
        return Refused("is no image that Pillow can identify", data)
    except Exception as error:  # a damaged image raises almost anything
        return Refused(f"Pillow cannot decode it: {type(error).__name__}: {error}", data)
    return Encoded(memoryview(data), width, height, native.crc32c(data), 0)


def _is_trusted(transcoded: memoryview, data: bytes, settings: Settings) -> bool:
    """Tell whether the transcoded image surely has the pixels of `data`.

    It has where the core decodes `data`, too. Images in several scans are decoded by Pillow alone,
    so Pillow has to confirm that their pixels stay the same.
    """
    header = native.read_header(data)
    if header is not None and header.supported:
        return True
    return not settings.keep_bytes and _pixels_are_equal(transcoded, data)


def _pixels_are_equal(first: memoryview, second: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(first)) as one, Image.open(io.BytesIO(second)) as other:
            same_kind = (one.mode, one.size) == (other.mode, other.size)
            return same_kind and one.tobytes() == other.tobytes()
    except Exception:  # a damaged image raises almost anything
        return False


def keep_damaged(refused: Refused) -> Encoded | None:
    """Return how a sample is stored that is no image (on_error="keep"); None: it has no bytes."""
    if refused.data is None:
        return None
    crc = native.crc32c(refused.data)
    return Encoded(memoryview(refused.data), -1, -1, crc, pack_format.FLAG_DAMAGED)
