"""Errors about data, saved state or the machine; all derive from `ImagenetSeqError`.

Wrong arguments raise ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations


class ImagenetSeqError(Exception):
    """Base class of this package's errors."""


class DataError(ImagenetSeqError):
    """Data on disk is damaged: a pack, an index or an image."""


class SampleError(DataError):
    """One sample could not be delivered.

    Attributes:
        sample: index of the sample in the dataset.
        name: its name (path relative to the dataset), "" if unknown.
    """

    def __init__(self, message: str, sample: int = -1, name: str = "") -> None:
        super().__init__(message)
        self.sample = sample
        self.name = name


class StateError(ImagenetSeqError):
    """A saved loader state does not fit this loader; the message says what was expected."""


class ForkError(ImagenetSeqError):
    """A loader made in a parent process was used in a forked child."""


class PackError(ImagenetSeqError):
    """Packing stopped; the message says why and how to continue."""


class CollateError(ImagenetSeqError):
    """The samples of a batch could not be combined, by collate_fn or the default."""


class LoaderClosedError(ImagenetSeqError):
    """A loader was closed during iteration, so the epoch ends before its last batch."""
