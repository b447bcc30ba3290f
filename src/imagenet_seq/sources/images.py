"""How images are recognised: by their names and by their first bytes."""

from __future__ import annotations

import re

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""torchvision.datasets.folder.IMG_EXTENSIONS: files that an ImageFolder takes for images."""

NAMED_EXTENSIONS = (*IMAGE_EXTENSIONS, ".gif")
"""With one of these at its end, a sample's name already says which kind of image it is."""

_SIGNATURES = {
    ".jpg": rb"\xff\xd8", ".png": rb"\x89PNG", ".gif": rb"GIF8", ".bmp": rb"BM",
    ".tif": rb"II\*\0|MM\0\*", ".webp": rb"RIFF.{4}WEBP", ".ppm": rb"P6", ".pgm": rb"P5",
}  # fmt: skip
"""First bytes of each format."""
_EXTENSIONS = (None, *_SIGNATURES)
_SIGNATURE = re.compile(b"|".join(b"(%b)" % form for form in _SIGNATURES.values()), re.DOTALL)


def is_image_name(name: str) -> bool:
    """Whether torchvision's ImageFolder would take a file of this name for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def ppm_header(width: int, height: int, is_rgb: bool = True) -> bytes:
    """Return the bytes that make pixels behind them a PPM, or a PGM if they are grey."""
    return b"P%d\n%d %d\n255\n" % (6 if is_rgb else 5, width, height)


def image_extension(data: bytes | memoryview) -> str | None:
    """Return the extension that belongs to an image, or None if no format is recognised.

    Args:
        data: the image, or its first 12 bytes at least.
    """
    found = _SIGNATURE.match(data)
    return _EXTENSIONS[found.lastindex or 0] if found else None
