"""How images are recognised: by their names and by their first bytes."""

from __future__ import annotations

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""torchvision.datasets.folder.IMG_EXTENSIONS: files that an ImageFolder takes for images."""

NAMED_EXTENSIONS = (*IMAGE_EXTENSIONS, ".gif")
"""With one of these at its end, a sample's name already says which kind of image it is."""

_SIGNATURES = (
    (b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"),
    (b"II*\0", ".tif"), (b"MM\0*", ".tif"), (b"P6", ".ppm"), (b"P5", ".pgm"),
)  # fmt: skip
"""First bytes of each format; the most frequent one first. WebP's are in two places."""


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
    head = bytes(data[:12])
    for signature, extension in _SIGNATURES:
        if head.startswith(signature):
            return extension
    return ".webp" if head[:4] == b"RIFF" and head[8:] == b"WEBP" else None
