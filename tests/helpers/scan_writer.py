"""Writes given coefficients as a JPEG in given scans: any order, any bands, right or wrong.

ITU-T T.81 annexes F (sequential) and G (progressive) are what the code below follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from helpers.jpeg_writer import EOI, JFIF, SOI, quant_table, segment, stuffed, value_bits

Blocks = npt.NDArray[np.int16]
"""Coefficients of a component: [row, column, zigzag index]."""


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Picture:
    """An image as coefficients.

    Attributes:
        sampling: (horizontal, vertical) factors of each component.
        components: the blocks of each, those that only fill up an MCU included.
    """

    width: int
    height: int
    sampling: Sequence[tuple[int, int]] = ((1, 1), (1, 1), (1, 1))
    components: list[Blocks] = field(default_factory=list)

    @property
    def mcus(self) -> tuple[int, int]:
        """Rows and columns of MCUs in a scan of all components."""
        factors = self.mcu_blocks
        tallest, widest = max(v for v, _ in factors), max(h for _, h in factors)
        return _divide_up(self.height, 8 * tallest), _divide_up(self.width, 8 * widest)

    @property
    def mcu_blocks(self) -> list[tuple[int, int]]:
        """Rows and columns of blocks in an MCU, for each component."""
        return [(1, 1)] if len(self.sampling) == 1 else [(v, h) for h, v in self.sampling]

    def real_blocks(self, component: int) -> tuple[int, int]:
        """Rows and columns of blocks that hold a part of the image."""
        h, v = self.sampling[component]
        widest, tallest = max(h for h, _ in self.sampling), max(v for _, v in self.sampling)
        high = _divide_up(self.height * v, 8 * tallest)
        return high, _divide_up(self.width * h, 8 * widest)

    def coded_blocks(self, component: int) -> tuple[int, int]:
        """The same with the blocks that only fill up an MCU."""
        rows, columns = self.mcus
        v, h = self.mcu_blocks[component]
        return rows * v, columns * h

    def fill_padding(self) -> None:
        """Give the blocks outside the image what libjpeg's encoder writes there."""
        for c, blocks in enumerate(self.components):
            high, wide = self.real_blocks(c)
            blocks[:high, wide:] = 0
            blocks[:high, wide:, 0] = blocks[:high, wide - 1 : wide, 0]
            _, h = self.mcu_blocks[c]
            blocks[high:] = 0
            for y in range(high, len(blocks)):
                blocks[y, :, 0] = np.repeat(blocks[y - 1, h - 1 :: h, 0], h)


def random_picture(
    rng: np.random.Generator,
    width: int,
    height: int,
    sampling: Sequence[tuple[int, int]] = ((1, 1), (1, 1), (1, 1)),
    density: float = 0.1,
    largest: int = 60,
) -> Picture:
    """Sparse coefficients, larger ones rarer; about a third of the blocks without AC."""
    picture = Picture(width, height, sampling)
    for c in range(len(sampling)):
        shape = (*picture.coded_blocks(c), 64)
        values = largest * rng.random(shape) ** 3 * rng.choice((-1, 1), shape)
        values *= (rng.random(shape) < density) & (rng.random((*shape[:2], 1)) < 0.67)
        values[..., 0] = rng.integers(-300, 300, shape[:2])
        picture.components.append(values.astype(np.int16))
    picture.fill_padding()
    return picture


@dataclass(frozen=True)
class Scan:
    """One scan.

    Attributes:
        components: as numbered in the frame.
        first: zigzag index of the band's first coefficient (Ss); `last` (Se) likewise.
        high: the last scan's `low` where this one refines, or 0 (Ah).
        low: lowest bit that is coded (Al).
        restart_interval: MCUs; None leaves the one before.
        long_codes: of 15 and 16 bits, not of 8 and 9.
        longest_run: of blocks that end together.
        before: segments before the scan header.
        tables: whether the Huffman tables come with it.
    """

    components: Sequence[int]
    first: int = 0
    last: int = 0
    high: int = 0
    low: int = 0
    restart_interval: int | None = None
    long_codes: bool = False
    longest_run: int = 32767
    before: bytes = b""
    tables: bool = True


SEQUENTIAL = {"first": 0, "last": 63}
EVERY_BAND = [
    Scan((0, 1, 2), low=1),
    *(Scan((c,), 1, 63, low=1) for c in range(3)),
    Scan((0, 1, 2), high=1),
    *(Scan((c,), 1, 63, high=1) for c in range(3)),
]
"""All three components in two steps: the shortest script with scans of all four kinds."""


class _Codes:
    """All 256 symbols (16 for DC), in codes of two lengths."""

    def __init__(self, num_symbols: int, long_codes: bool) -> None:
        lengths = (15, 16) if long_codes else (8, 9) if num_symbols > 16 else (4, 5)
        counts = [0] * 17
        self.bits = []
        num_short = 1 if long_codes else num_symbols // 2
        for symbol in range(num_symbols):
            is_short = symbol < num_short
            length = lengths[0] if is_short else lengths[1]
            code = symbol if is_short else num_short * 2 + symbol - num_short
            counts[length] += 1
            self.bits.append(f"{code:0{length}b}")
        self.spec = bytes(counts[1:]) + bytes(range(num_symbols))


_CODES = {(n, long): _Codes(n, long) for n in (16, 256) for long in (False, True)}


class _ScanWriter:
    def __init__(self, picture: Picture, scan: Scan, sequential: bool) -> None:
        self._picture, self._scan, self._sequential = picture, scan, sequential
        self._dc = _CODES[16, scan.long_codes].bits
        self._ac = _CODES[256, scan.long_codes].bits
        self._begin()

    def _begin(self) -> None:
        self._bits: list[str] = []
        self._predictions = [0] * len(self._picture.sampling)
        self._run = 0
        self._corrections: list[str] = []

    def intervals(self, restart_interval: int) -> Iterator[bytes]:
        for i, mcu in enumerate(self._mcus()):
            if restart_interval and i and i % restart_interval == 0:
                yield self._end()
            for component, y, x in mcu:
                self._block(component, self._picture.components[component][y, x].tolist())
        yield self._end()

    def _mcus(self) -> Iterator[list[tuple[int, int, int]]]:
        components = self._scan.components
        if len(components) == 1:
            (component,) = components
            high, wide = self._picture.real_blocks(component)
            yield from ([(component, y, x)] for y in range(high) for x in range(wide))
            return
        rows, columns = self._picture.mcus
        for row in range(rows):
            for column in range(columns):
                mcu = []
                for c in components:
                    v, h = self._picture.mcu_blocks[c]
                    mcu += [(c, row * v + y, column * h + x) for y in range(v) for x in range(h)]
                yield mcu

    def _end(self) -> bytes:
        self._end_run()
        data = stuffed("".join(self._bits))
        self._begin()
        return data

    def _block(self, component: int, block: list[int]) -> None:
        scan = self._scan
        if scan.first == 0:
            self._dc_value(component, block[0] >> scan.low)
        if scan.last > 0 and scan.high > 0:
            self._refine_ac([abs(v) >> scan.low for v in block], block)
        elif scan.last > 0:
            self._first_ac([abs(v) >> scan.low if v > 0 else -(-v >> scan.low) for v in block])

    def _dc_value(self, component: int, value: int) -> None:
        if self._scan.high > 0:
            self._bits.append(str(value & 1))
            return
        size, extra = value_bits(value - self._predictions[component])
        self._bits += [self._dc[size], extra]
        self._predictions[component] = value

    def _first_ac(self, values: list[int]) -> None:
        zeros = 0
        for k in range(max(self._scan.first, 1), self._scan.last + 1):
            if values[k] == 0:
                zeros += 1
                continue
            self._end_run()
            while zeros > 15:
                self._bits.append(self._ac[0xF0])
                zeros -= 16
            size, extra = value_bits(values[k])
            self._bits += [self._ac[zeros << 4 | size], extra]
            zeros = 0
        if zeros and self._sequential:
            self._bits.append(self._ac[0])
        elif zeros:
            self._lengthen_run([])

    def _refine_ac(self, magnitudes: list[int], block: list[int]) -> None:
        scan = self._scan
        new = [k for k in range(scan.first, scan.last + 1) if magnitudes[k] == 1]
        last_new = new[-1] if new else -1
        zeros, corrections = 0, []
        for k in range(scan.first, scan.last + 1):
            if magnitudes[k] == 0:
                zeros += 1
                continue
            while zeros > 15 and k <= last_new:
                self._end_run()
                self._bits += [self._ac[0xF0], *corrections]
                zeros, corrections = zeros - 16, []
            if magnitudes[k] > 1:
                corrections.append(str(magnitudes[k] & 1))
                continue
            self._end_run()
            sign = "1" if block[k] > 0 else "0"
            self._bits += [self._ac[zeros << 4 | 1], sign, *corrections]
            zeros, corrections = 0, []
        if zeros or corrections:
            self._lengthen_run(corrections)

    def _lengthen_run(self, corrections: list[str]) -> None:
        self._run += 1
        self._corrections += corrections
        if self._run == self._scan.longest_run:
            self._end_run()

    def _end_run(self) -> None:
        if self._run > 0:
            size = self._run.bit_length() - 1
            extra = f"{self._run - (1 << size):0{size}b}" if size else ""
            self._bits += [self._ac[size << 4], extra, *self._corrections]
            self._run, self._corrections = 0, []


def frame_header(picture: Picture, frame: int) -> bytes:
    """Everything before the first scan."""
    payload = b"\x08" + picture.height.to_bytes(2, "big") + picture.width.to_bytes(2, "big")
    payload += bytes([len(picture.sampling)])
    for c, (h, v) in enumerate(picture.sampling):
        payload += bytes([c + 1, h << 4 | v, 0])
    head = SOI + segment(0xE0, JFIF) + quant_table(0, [3] * 64)
    return head + segment(frame, payload)


def scan_header(scan: Scan) -> bytes:
    """The scan's own tables, and SOS."""
    head = b""
    if scan.restart_interval is not None:
        head += segment(0xDD, scan.restart_interval.to_bytes(2, "big"))
    if scan.tables:
        head += segment(0xC4, b"\x00" + _CODES[16, scan.long_codes].spec)
        head += segment(0xC4, b"\x10" + _CODES[256, scan.long_codes].spec)
    components = b"".join(bytes([c + 1, 0]) for c in scan.components)
    band = bytes([scan.first, scan.last, scan.high << 4 | scan.low])
    return head + scan.before + segment(0xDA, bytes([len(scan.components)]) + components + band)


def write(picture: Picture, scans: Sequence[Scan], frame: int = 0xC2, end: bytes = EOI) -> bytes:
    """The file."""
    parts, restart_interval = [frame_header(picture, frame)], 0
    for scan in scans:
        if scan.restart_interval is not None:
            restart_interval = scan.restart_interval
        parts.append(scan_header(scan))
        writer = _ScanWriter(picture, scan, frame != 0xC2)
        for i, interval in enumerate(writer.intervals(restart_interval)):
            parts += [bytes([0xFF, 0xD0 + (i - 1) % 8]) if i else b"", interval]
    return b"".join(parts) + end


def write_baseline(picture: Picture) -> bytes:
    """The same coefficients in one scan."""
    return write(picture, [Scan(range(len(picture.sampling)), **SEQUENTIAL)], 0xC0)
