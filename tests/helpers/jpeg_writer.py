"""Writes JPEGs that no ordinary encoder writes: any sampling, any coefficients, any marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def quant_table(index: int, values: Sequence[int], *, wide: bool = False) -> bytes:
    """A DQT segment; values in zigzag order, of 16 bits if wide."""
    size = 2 if wide else 1
    head = bytes([index | (0x10 if wide else 0)])
    return segment(0xDB, head + b"".join(int(v).to_bytes(size, "big") for v in values))


# All symbols that a block can need.
DC_SYMBOLS = bytes(range(16))
AC_SYMBOLS = bytes([0x00, 0xF0] + [run << 4 | size for run in range(16) for size in range(1, 15)])


class Code:
    """A Huffman code: the symbols that have codes of 1, 2, ... 16 bits."""

    def __init__(self, symbols: Mapping[int, bytes]) -> None:
        self._symbols = symbols
        self.bits: dict[int, str] = {}
        code = 0
        for length in range(1, 17):
            for symbol in symbols.get(length, b""):
                self.bits[symbol] = f"{code:0{length}b}"
                code += 1
            code <<= 1

    def segment(self, table: int) -> bytes:
        """The DHT segment; table: class << 4 | number."""
        by_length = [self._symbols.get(length, b"") for length in range(1, 17)]
        counts = bytes(len(symbols) for symbols in by_length)
        return segment(0xC4, bytes([table]) + counts + b"".join(by_length))


# Codes of equal length: the code of a symbol is its place.
FLAT_DC, FLAT_AC = Code({5: DC_SYMBOLS}), Code({8: AC_SYMBOLS})


def value_bits(value: int) -> tuple[int, str]:
    size = abs(value).bit_length()
    extra = value if value > 0 else value + (1 << size) - 1
    return size, f"{extra:0{size}b}" if size else ""


def _block_bits(block: Sequence[int], difference: int, dc: Code, ac: Code) -> str:
    size, extra = value_bits(difference)
    bits = [dc.bits[size], extra]
    run = 0
    last = max((k for k in range(1, 64) if block[k]), default=0)
    for k in range(1, last + 1):
        if block[k] == 0:
            run += 1
            continue
        while run > 15:
            bits.append(ac.bits[0xF0])
            run -= 16
        size, extra = value_bits(block[k])
        bits += [ac.bits[run << 4 | size], extra]
        run = 0
    if last < 63:
        bits.append(ac.bits[0x00])
    return "".join(bits)


def stuffed(bits: str) -> bytes:
    """The bytes of an interval: padded with ones, and a zero byte behind every 0xFF."""
    bits += "1" * (-len(bits) % 8)
    data = int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:]
    return data.replace(b"\xff", b"\xff\0")


@dataclass
class Jpeg:
    """What to write; `data()` is the file.

    Attributes:
        sampling: (horizontal, vertical) factors of each component.
        restart_interval: MCUs, 0: none.
        head: segments behind SOI.
        tables: the DQT segments.
        ids: component ids; 1, 2, 3 if empty.
        amplitude: coefficients are drawn up to it, the higher the frequency the fewer.
        dc_limit: DC values are drawn from -dc_limit ... dc_limit.
        full: no coefficient is zero.
        dc_code, ac_code: the codes of all components.
    """

    width: int
    height: int
    sampling: Sequence[tuple[int, int]] = ((1, 1), (1, 1), (1, 1))
    restart_interval: int = 0
    head: bytes = segment(0xE0, JFIF)
    tables: bytes = quant_table(0, [8] * 64)
    frame: int = 0xC0
    precision: int = 8
    ids: Sequence[int] = ()
    amplitude: int = 12
    dc_limit: int = 120
    full: bool = False
    dc_code: Code = FLAT_DC
    ac_code: Code = FLAT_AC
    before_scan: bytes = b""
    tail: bytes = b""
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def _block(self) -> list[int]:
        block = [0] * 64
        block[0] = int(self.rng.integers(-self.dc_limit, self.dc_limit + 1))
        if self.amplitude == 0:
            return block
        if self.full:
            signs = self.rng.choice([-1, 1], 63)
            return block[:1] + (signs * self.rng.integers(1, self.amplitude + 1, 63)).tolist()
        for _ in range(int(self.rng.integers(0, 9))):
            k = int(self.rng.integers(1, self.rng.integers(2, 65)))
            block[k] = int(self.rng.integers(-self.amplitude, self.amplitude + 1))
        return block

    def header(self) -> bytes:
        """Everything up to the entropy-coded data."""
        ids = self.ids or range(1, len(self.sampling) + 1)
        frame = bytes([self.precision]) + self.height.to_bytes(2, "big")
        frame += self.width.to_bytes(2, "big") + bytes([len(self.sampling)])
        for id_, (h, v) in zip(ids, self.sampling, strict=True):
            frame += bytes([id_, h << 4 | v, 0])
        restart = segment(0xDD, self.restart_interval.to_bytes(2, "big"))
        scan = bytes([len(self.sampling)]) + b"".join(bytes([id_, 0]) for id_ in ids) + b"\0\x3f\0"
        return (
            SOI
            + self.head
            + self.tables
            + segment(self.frame, frame)
            + self.dc_code.segment(0x00)
            + self.ac_code.segment(0x10)
            + (restart if self.restart_interval else b"")
            + self.before_scan
            + segment(0xDA, scan)
        )

    def intervals(self) -> list[bytes]:
        """The entropy-coded data, restart interval by restart interval."""
        lone = len(self.sampling) == 1
        factors = [(1, 1)] if lone else list(self.sampling)
        mcu_width = 8 * max(h for h, _ in factors)
        mcu_height = 8 * max(v for _, v in factors)
        num_mcus = -(-self.width // mcu_width) * -(-self.height // mcu_height)
        step = self.restart_interval or num_mcus
        result = []
        for first in range(0, num_mcus, step):
            bits, predictions = [], [0] * len(factors)
            for _ in range(min(step, num_mcus - first)):
                for c, (h, v) in enumerate(factors):
                    for _ in range(h * v):
                        block = self._block()
                        difference = block[0] - predictions[c]
                        bits.append(_block_bits(block, difference, self.dc_code, self.ac_code))
                        predictions[c] = block[0]
            result.append(stuffed("".join(bits)))
        return result

    def data(self) -> bytes:
        scan = b""
        for i, interval in enumerate(self.intervals()):
            scan += (bytes([0xFF, 0xD0 + (i - 1) % 8]) if i else b"") + interval
        return self.header() + scan + EOI + self.tail
