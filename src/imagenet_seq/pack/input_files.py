"""Large files of any format as inputs of a pack: archives, WebDataset, TFRecord, Parquet, ..."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from imagenet_seq.errors import DataError
from imagenet_seq.index.cache import OnError
from imagenet_seq.index.columns import Index
from imagenet_seq.index.source import Block, Source
from imagenet_seq.pack.encode import Refused, Settings
from imagenet_seq.pack.inputs import EncodedInputs, Image, Inputs, Stamps, storable, unreadable
from imagenet_seq.pack.io_log import IoLog
from imagenet_seq.pack.selection import Selection
from imagenet_seq.pack.task import RunOptions
from imagenet_seq.sources.place import Found, Opening, Visit

_READ_BYTES = 8 << 20
_GAP_BYTES = 1 << 20
"""A gap between two samples is read with them up to this size: a hard disk reads it in the time of
half a seek."""

_BLOCK_SAMPLES = 16
"""Images taken of each block that tables are fitted to: 32 blocks for 512 images."""


class LargeFiles:
    """Files that may have to be read in full to index them; `open` gives the inputs.

    `on_error` says what to do with samples that can't be indexed.

    Attributes:
        path: the first of the files.
        settings_record: the member `settings` of pack.json.
        is_whole: whether all samples are packed; only an index tells the samples of a subset.
    """

    def __init__(
        self,
        found: Found,
        settings: Settings,
        selection: Selection,
        options: RunOptions,
        on_error: OnError,
    ) -> None:
        self.settings = settings
        self.settings_record = {**settings.describe(), **selection.describe()}
        self.selection = selection
        self.is_whole = selection == Selection()
        self.paths = list(found.files)
        self.path = self.paths[0]
        self._found = found
        self._options = options
        self._on_error = on_error

    @functools.cached_property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(os.path.getsize(path) for path in self.paths)

    @functools.cached_property
    def mtime_ns(self) -> int:
        """A hash in place of a time: it changes with the size or time of any of the files.

        One for all files, because one more sample in a file renumbers those of the files behind it.
        """
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            stat = os.stat(path)
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + os.fsencode(path))
        return int.from_bytes(digest.digest(), "little") >> 1

    @functools.cached_property
    def some_images(self) -> list[bytes]:
        """Images from all over the files, found without an index; none in compressed files.

        The same images while the files are the same, whether these have been indexed or not.
        """
        return _images_all_over(self.paths, self._options.log)

    def open(self, visit: Visit | None = None) -> Inputs:
        """Open the source; where it must be indexed for that, `visit` gets every sample read."""
        source = self._found.open(Opening(self._on_error, self._options.progress, visit))
        kind = _BlockInputs if source.python_blocks else _RangeInputs
        return kind(source, self, self._options.log)


class _FileInputs(EncodedInputs):
    """Samples in large files."""

    def __init__(self, source: Source, files: LargeFiles, log: IoLog) -> None:
        super().__init__(source, files.settings, files.selection)
        if files.is_whole:
            self.some_images = files.some_images
            self._file_bytes = files.num_bytes
        self.path = files.path  # known without an index
        self._files = files
        self._log = log
        self._mean_bytes = files.num_bytes // max(1, len(source.index))

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample; where the index does not know them, the mean."""
        length = self.index.length
        if length is not None and int(length.min(initial=0)) >= 0:
            return np.asarray(length)
        return np.full(len(self.index), self._mean_bytes, np.int64)

    @functools.cached_property
    def stamps(self) -> Stamps:
        """Size and time of all files together."""
        size, mtime_ns = self._files.num_bytes, self._files.mtime_ns
        return Stamps(np.full(len(self.index), size), np.full(len(self.index), mtime_ns))


class _RangeInputs(_FileInputs):
    """Images that are byte ranges of files."""

    @functools.cached_property
    def _reader(self) -> RangeReader:
        return RangeReader(self.index, self._log)

    def read(self, sample: int) -> bytes | Refused:
        """Read a sample's bytes."""
        return self._checked(sample, self._reader.read(sample))

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Read samples in the order of files and offsets."""
        for sample, data in self._reader.read_all(samples):
            yield sample, self._checked(sample, data)

    def _checked(self, sample: int, data: bytes | Refused) -> bytes | Refused:
        expected = int(self._reader.end[sample] - self._reader.begin[sample])
        if isinstance(data, Refused) or len(data) == expected:
            return data if isinstance(data, Refused) else storable(data)
        path = self._reader.path(sample)
        begin = int(self._reader.begin[sample])
        reason = f"{path} offset {begin}: expected {expected} bytes, the file has {len(data)}"
        return Refused(reason, None)


class _BlockInputs(_FileInputs):
    """Images whose bytes the source has to produce, a block at a time."""

    def __init__(self, source: Source, files: LargeFiles, log: IoLog) -> None:
        super().__init__(source, files, log)
        self._source = source
        self._held: tuple[int, Block | Refused] = (-1, Refused("", None))

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes; its block is kept for the next sample."""
        number, ordinal = int(self.index.file[sample]), int(self.index.offset[sample])
        if self._held[0] != number:
            self._held = (number, self._produce(number))
        block = self._held[1]
        if isinstance(block, Refused):
            return block
        if ordinal >= len(block.offsets):
            return Refused(f"block {number} holds {len(block.offsets)} images, not this one", None)
        return storable(block.image(ordinal).tobytes())

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Produce samples block by block."""
        order = np.lexsort((self.index.offset[samples], self.index.file[samples]))
        for sample in samples[order].tolist():
            yield sample, self.read(sample)

    def first(self, order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return the first samples of a few blocks, as a block has to be unpacked whole."""
        blocks = self.index.file[order]
        few = np.unique(blocks[: count // _BLOCK_SAMPLES])
        return order[np.isin(blocks, few)][:count]

    def _produce(self, number: int) -> Block | Refused:
        try:
            return self._source.read_block(number)
        except OSError as error:
            return unreadable(error)
        except DataError as error:
            return Refused(str(error), None)


class RangeReader:
    """Reads samples that are byte ranges of files: many in file order, in pieces of several MB.

    A length of -1 means up to the end of the file.
    """

    def __init__(self, index: Index, log: IoLog) -> None:
        self._index = index
        self._log = log
        self.begin = np.asarray(index.offset)
        self.end = self.begin + self._lengths()

    def _lengths(self) -> npt.NDArray[np.int64]:
        index = self._index
        length = np.full(len(index), -1, np.int64) if index.length is None else index.length
        if int(length.min(initial=0)) >= 0:
            return np.asarray(length)
        sizes = [os.path.getsize(os.path.join(index.root, name)) for name in index.files]
        to_end = np.array(sizes, np.int64)[index.file] - index.offset
        return np.where(length < 0, np.maximum(to_end, 0), length)

    def path(self, sample: int) -> str:
        """Return the path of the file that holds a sample."""
        return os.path.join(self._index.root, self._index.files[int(self._index.file[sample])])

    def read(self, sample: int) -> bytes | Refused:
        """Return a sample's bytes; fewer where the file ends too early."""
        return next(iter(self._read_piece([sample])))[1]

    def read_all(self, samples: npt.NDArray[np.int64]) -> Iterator[Image]:
        """Yield samples and their bytes by file and offset."""
        order = np.lexsort((self.begin[samples], self._index.file[samples]))
        piece: list[int] = []
        for sample in samples[order].tolist():
            if piece and not self._fits(piece, sample):
                yield from self._read_piece(piece)
                piece = []
            piece.append(sample)
        if piece:
            yield from self._read_piece(piece)

    def _fits(self, piece: list[int], sample: int) -> bool:
        """Tell whether a sample is read in one piece with those before it."""
        first, last = piece[0], piece[-1]
        return bool(
            self._index.file[first] == self._index.file[sample]
            and self.begin[sample] - self.end[last] <= _GAP_BYTES
            and self.end[sample] - self.begin[first] <= _READ_BYTES
        )

    def _read_piece(self, samples: list[int]) -> Iterator[Image]:
        begin = int(self.begin[samples[0]])
        path, end = self.path(samples[0]), int(self.end[samples].max())
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(begin)
                data = memoryview(file.read(end - begin))
        except OSError as error:
            yield from ((sample, unreadable(error)) for sample in samples)
            return
        place = {"address": int(self._index.file[samples[0]]), "inode": 0}
        self._log.note("read", path, begin, len(data), **place)
        for sample in samples:
            yield sample, bytes(data[int(self.begin[sample]) - begin : self.end[sample] - begin])


# ---- images found by their markers ---------------------------------------------------------------

_NUM_IMAGES, _NUM_PLACES, _PLACE_BYTES = 512, 64, 2 << 20
"""2 MB hold about 18 ImageNet photos; of files sorted by class, 64 classes are seen. A hard disk
takes 2 s."""

_BEGIN = b"\xff\xd8\xff"

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends entropy-coded data: no stuffed byte, no RSTn, no fill byte (T.81, B.1.1)."""


def _images_all_over(paths: Sequence[str], log: IoLog) -> list[bytes]:
    """Return up to 512 JPEG images from evenly spread places in files."""
    ends = list(itertools.accumulate(os.path.getsize(path) for path in paths))
    total = ends[-1] if ends else 0
    step = max(_PLACE_BYTES, -(-total // _NUM_PLACES))
    places = range(0, total, step)
    images: list[bytes] = []
    for at in places:
        file = bisect.bisect_right(ends, at)
        begin = at - (ends[file] - os.path.getsize(paths[file]))
        with open(paths[file], "rb", buffering=0) as opened:
            opened.seek(begin)
            data = opened.read(_PLACE_BYTES)
        log.note("read", paths[file], begin, len(data), address=file, inode=0)
        images += itertools.islice(_images_in(data), -(-_NUM_IMAGES // len(places)))
    return images[:_NUM_IMAGES]


def _images_in(data: bytes) -> Iterator[bytes]:
    """Yield what looks like a whole JPEG image; one inside another is part of the outer one."""
    begin = data.find(_BEGIN)
    while begin >= 0:
        end = _end_of_image(data, begin)
        if end:
            yield data[begin:end]
        begin = data.find(_BEGIN, end or begin + 2)


def _end_of_image(data: bytes, begin: int) -> int:
    """Return the offset behind an image's EOI marker; 0 where there is no whole image."""
    at = begin + 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xD9:  # EOI
            return at + 2
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # SOS, and entropy-coded data behind it
            found = _MARKER.search(data, at)
            if found is None:
                return 0
            at = found.start()
    return at + 2 if data[at : at + 2] == b"\xff\xd9" else 0
