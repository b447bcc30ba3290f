"""What can go wrong with data, and the one place that turns a native status into an exception.

Mistakes in arguments raise ``ValueError`` or ``TypeError``, as everywhere in Python. Everything
below is about data, state or the machine, and derives from `ImagenetSeqError`.
"""

from __future__ import annotations


class ImagenetSeqError(Exception):
    """Base of the errors that are particular to this package."""


class DataError(ImagenetSeqError):
    """Bytes on disk are not what they should be: a damaged pack, index or image."""


class SampleError(DataError):
    """One sample could not be delivered.

    Attributes:
        sample: index of the sample in the dataset.
        name: its name (path relative to the dataset), or "" where unknown.
    """

    def __init__(self, message: str, sample: int = -1, name: str = "") -> None:
        super().__init__(message)
        self.sample = sample
        self.name = name


class StateError(ImagenetSeqError):
    """A saved loader state does not fit this loader; the message says expected and got."""


class ForkError(ImagenetSeqError):
    """A loader made in a parent process was used in a forked child."""


class PackError(ImagenetSeqError):
    """Packing stopped; the message says why and how to go on."""


class CollateError(ImagenetSeqError):
    """The samples of a batch could not be made into one."""


class LoaderClosedError(ImagenetSeqError):
    """A loader was closed while it was iterated, so the epoch ends before its last batch."""
