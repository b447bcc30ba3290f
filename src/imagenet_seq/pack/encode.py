"""How images are re-coded for a pack: settings in, one image in, one image as it is stored out."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from imagenet_seq import native
from imagenet_seq.pack.shrink import Shrink, smaller_copy
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.formats.pack import Encoded

Tables = Literal["pack", "image"]


DEFAULT_SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a pack, beside the source.

    Attributes:
        keep_bytes: store every image's own bytes instead of re-coding it.
        strip: drop ICC profiles, Exif thumbnails and comments while re-coding.
        restart_interval: MCUs between restart markers, 1 to 65535.
        tables: whose Huffman tables images have: those of the "pack", which decode fastest, or
            each "image" its own, which takes 2.5 % fewer bytes. Means nothing with keep_bytes.
        shard_bytes: bytes of the source that go into one shard, about.
        seed: of the permutation.
        shrink: what smaller copies are to be like; None: every image keeps its pixels.
    """

    keep_bytes: bool = False
    strip: bool = False
    restart_interval: int = 8
    tables: Tables = "pack"
    shard_bytes: int = DEFAULT_SHARD_BYTES
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
    """Why a sample is no image, or could not be read."""

    reason: str
    data: bytes | None  # None: there is nothing to keep
    is_read_error: bool = False  # the disk's failure, not the image's


def encode(data: bytes, settings: Settings, tables: bytes | None) -> Encoded | Refused:
    """Return an image as it is to be stored in a pack whose Huffman tables are `tables`."""
    copy = smaller_copy(data, settings.shrink) if settings.shrink else None
    if copy is None:
        return _recode(data, settings, tables)
    encoded = _recode(copy, settings, tables)
    if isinstance(encoded, Encoded):
        encoded = encoded._replace(flags=encoded.flags | layout.FLAG_SHRUNK)
    return encoded


def _recode(data: bytes, settings: Settings, tables: bytes | None) -> Encoded | Refused:
    """Re-code one image, or keep it where the core can't but Pillow can decode it."""
    recoded = native.transcode(data, settings.restart_interval, settings.strip, tables)
    if recoded is not None and _is_trusted(recoded[0].data, data, settings):
        stored = memoryview(data) if settings.keep_bytes else recoded[0].data
        flags = layout.FLAG_CLEAN | (0 if settings.keep_bytes else layout.FLAG_CANONICAL)
        header = recoded[1]
        return Encoded(stored, header.width, header.height, native.crc32c(stored), flags)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address, and reports must not differ between runs.
        return Refused("is no image that Pillow can identify", data)
    except Exception as error:  # a damaged image raises almost anything
        return Refused(f"Pillow cannot decode it: {type(error).__name__}: {error}", data)
    return Encoded(memoryview(data), width, height, native.crc32c(data), 0)


def _is_trusted(recoded: memoryview, data: bytes, settings: Settings) -> bool:
    """Whether what was re-coded may stand for `data`.

    What the core decodes anyway is exact. Images in several scans are otherwise left to Pillow, so
    that their pixels are Pillow's by construction; Pillow has to confirm that they stay the same.
    """
    header = native.read_header(data)
    if header is not None and header.supported:
        return True
    return not settings.keep_bytes and _pixels_are_equal(recoded, data)


def _pixels_are_equal(first: memoryview, second: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(first)) as one, Image.open(io.BytesIO(second)) as other:
            same_kind = (one.mode, one.size) == (other.mode, other.size)
            return same_kind and one.tobytes() == other.tobytes()
    except Exception:  # a damaged image raises almost anything
        return False


def keep_damaged(refused: Refused) -> Encoded | Refused:
    """Return what is stored of an image that is no image (on_error="keep")."""
    if refused.data is None:
        return refused
    crc = native.crc32c(refused.data)
    return Encoded(memoryview(refused.data), -1, -1, crc, layout.FLAG_DAMAGED)
